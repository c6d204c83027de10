"""What all tests share: the folder of real data beside the project, and peers that may be missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# Before torch is loaded. Its threads wait for each other by spinning: where several tests share the cores, a
# symmetry search took twelve times the time. Tests of threads ask for as many as they need.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

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
