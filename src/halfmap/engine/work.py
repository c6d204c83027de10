"""The work of a loop as a file that workers on other machines read: data never pass a scheduler."""

from __future__ import annotations

import functools
import gc
import os
import pickle
import socket
import struct
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import halfmap
from halfmap.engine.attempt import Outcome, attempt_in_worker
from halfmap.engine.device import take_gpu
from halfmap.io.atomic import atomic_path

_PLACE = struct.Struct("<q")

_PATIENCE_s = 15.0
"""How long a file may take until a machine sees what another has written to a shared disk."""


def write_work(folder: Path, function: Callable[[Any], Any], items: Sequence[Any]) -> Path:
    """Write a function and its items to a file of a new name, each so that it can be read alone.

    Parameters
    ----------
    folder : path
        Where; workers must see it under the same name.
    function, items
        As of `executor.run_items`.

    Returns
    -------
    Path

    Notes
    -----
    A plan of a million particles takes tens of megabytes, and each item would carry it through the scheduler
    again. What passes there is the file's name and the item's number.
    """
    import cloudpickle

    path = folder / f"work-{uuid.uuid4().hex}.pickle"
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.seek(_PLACE.size * (len(items) + 2))
        ends = [file.tell()]
        for part in (function, *items):
            file.write(cloudpickle.dumps(part))
            ends.append(file.tell())
        file.seek(0)
        file.write(b"".join(map(_PLACE.pack, ends)))
    return path


def run_item(path: Path, number: int, version: str, gpus: Sequence[str] = ()) -> Outcome:
    """Run one item of such a file in a worker; what is amiss with the worker itself is fatal.

    Parameters
    ----------
    path, number
        The file, and the item's number in it from 0.
    version : str
        Of Halfmap where the job runs.
    gpus : sequence of str
        From which workers of one machine take one each, by their numbers.
    """
    host = socket.gethostname()
    if version != halfmap.__version__:
        text = f"the worker on {host} has Halfmap {halfmap.__version__}, this job {version}: install the same"
        return Outcome(error=text, fatal=True)
    if not _is_seen(path):
        text = (
            f"the worker on {host} does not see the folder {path.parent.parent}: projects must lie on "
            "a disk that all machines share, under the same name"
        )
        return Outcome(error=text, fatal=True)
    if gpus:
        from distributed import get_worker

        take_gpu(gpus, int(get_worker().name))
    try:
        function, item = _function(path), _part(path, number + 1)
    except Exception as error:
        text = f"the worker on {host} cannot load its work: {type(error).__name__}: {error}"
        return Outcome(error=text, fatal=True)
    return attempt_in_worker(function, item)


def _is_seen(path: Path) -> bool:
    """Whether the file is there, waiting for it as long as its folder is."""
    end = time.monotonic() + _PATIENCE_s
    while not path.exists():
        if not path.parent.exists() or time.monotonic() > end:
            return False
        # Network file systems look anew for names in a folder that was listed.
        os.listdir(path.parent)  # noqa: PTH208
        time.sleep(0.2)
    return True


@functools.lru_cache(maxsize=1)
def _function(path: Path) -> Callable[[Any], Any]:
    # A worker lives through loops of several steps: what the last one has left goes first.
    _function.cache_clear()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
    return _part(path, 0)


def _part(path: Path, number: int) -> Any:
    with path.open("rb") as file:
        file.seek(number * _PLACE.size)
        start, end = struct.unpack("<qq", file.read(2 * _PLACE.size))
        file.seek(start)
        return pickle.loads(file.read(end - start))
