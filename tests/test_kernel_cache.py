from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from halfmap import kernel_cache
from halfmap.kernel_cache import ensure_kernel_cache


@pytest.fixture
def closed(monkeypatch) -> set[Path]:
    """Folders that cannot be written; permissions alone do not stop root, whom tests often run as."""
    folders: set[Path] = set()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in folders and real(path, mode))
    # Also undoes what is set in a test.
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    return folders


def test_nothing_is_set_where_the_package_or_the_home_can_be_written(tmp_path, monkeypatch, closed):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ensure_kernel_cache()
    assert not os.environ["NUMBA_CACHE_DIR"]
    closed.add(Path(kernel_cache.__file__).parent)
    ensure_kernel_cache()
    assert not os.environ["NUMBA_CACHE_DIR"]


def test_a_private_temporary_folder_is_the_last_resort(tmp_path, monkeypatch, closed):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not/made"))
    closed |= {Path(kernel_cache.__file__).parent, tmp_path}
    removals = []
    monkeypatch.setattr(kernel_cache.atexit, "register", removals.append)
    ensure_kernel_cache()
    folder = Path(os.environ["NUMBA_CACHE_DIR"])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    ensure_kernel_cache()
    assert os.environ["NUMBA_CACHE_DIR"] == str(folder)
    removals[0]()
    assert not folder.exists()
