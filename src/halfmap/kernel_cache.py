"""Give Numba a folder for compiled kernels where it has none: without one it refuses to import them."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def ensure_kernel_cache() -> None:
    """Name a temporary folder, kept until this process ends, if neither package nor home can be written.

    Worker processes inherit it. A folder that `NUMBA_CACHE_DIR` names already is left alone.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111 - never raises
    package = Path(__file__).parent
    if os.environ.get("NUMBA_CACHE_DIR") or _is_writable(package) or _is_writable(home / "numba"):
        return
    folder, owner = tempfile.mkdtemp(prefix="halfmap-kernels-"), os.getpid()
    os.environ["NUMBA_CACHE_DIR"] = folder

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


def _is_writable(folder: Path) -> bool:
    """Whether a folder can be written, or made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)
