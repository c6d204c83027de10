"""What all tests share: the folder of real data beside the project, and peers that may be missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[1] / "../shared/data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.exists():
        pytest.skip("the real data (../shared/data beside the project) are not here")
    return SHARED_DATA.resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("relion_refine"):
        return
    skip = pytest.mark.skip(reason="Debian's relion package is not installed")
    for item in items:
        if item.get_closest_marker("relion"):
            item.add_marker(skip)
