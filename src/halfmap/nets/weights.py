"""Files of weights, each with a record of how they were made, and those that are shipped."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from halfmap.errors import FileFormatError
from halfmap.io.atomic import atomic_path, write_text

SHIPPED = Path(__file__).with_name("weights")


def shipped(name: str) -> Path:
    """File of weights that comes with Halfmap, such as ``picker``."""
    return SHIPPED / f"{name}.npz"


def record_file(path: str | Path) -> Path:
    """The record that lies beside a file of weights."""
    return Path(path).with_suffix(".json")


def read_record(path: str | Path) -> dict[str, Any]:
    """Read how weights were made, from the record beside their file.

    Raises
    ------
    FileFormatError
        If it is missing, or no record.
    """
    try:
        record = json.loads(record_file(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise FileFormatError(
            f"{missing} is missing", path=path, hint="keep the .npz and the .json of a model together"
        ) from None
    except (OSError, ValueError) as error:
        raise FileFormatError(
            "is no record of weights that can be read", path=record_file(path), hint="copy it again"
        ) from error
    return record if isinstance(record, dict) else {}


def save_weights(path: str | Path, network: nn.Module, record: dict[str, Any]) -> None:
    """Write a network's weights in half precision, and beside them how they were made.

    Parameters
    ----------
    path : path
        Ends in ``.npz``; the record has the same name with ``.json``.
    network : Module
        Any.
    record : dict
        Plain data: ``kind``, ``version``, data, settings, results. ``sha256`` of the weights is added.
    """
    arrays = {
        name: tensor.detach().cpu().numpy().astype(np.float16)
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    record = {**record, "sha256": _digest(Path(path).read_bytes())}
    write_text(record_file(path), json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def load_weights(path: str | Path, network: nn.Module, *, kind: str) -> dict[str, Any]:
    """Read weights into a network and return their record.

    Parameters
    ----------
    path : path
        As `save_weights` wrote it, with its record beside it.
    network : Module
        Of the same layers.
    kind : str
        What the record must say that the weights are, such as ``picker``.

    Raises
    ------
    FileFormatError
        If one of the two files is missing, not what it should be, or does not belong to the other.
    """
    path = Path(path)
    record = read_record(path)
    try:
        data = path.read_bytes()
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name].astype(np.float32)) for name in file.files}
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise FileFormatError(
            f"{missing} is missing", path=path, hint="keep the .npz and the .json of a model together"
        ) from None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise FileFormatError(
            "holds no weights that can be read", path=path, hint="give the .npz of a model that halfmap wrote"
        ) from error
    if record.get("kind") != kind:
        raise FileFormatError(f"is no model of the kind {kind!r}", path=path, hint="give another file")
    if record.get("sha256") != _digest(data):
        raise FileFormatError("is not what its record describes", path=path, hint="copy both files again")
    own = network.state_dict()
    wanted = {name: tensor.shape for name, tensor in own.items() if tensor.is_floating_point()}
    if {name: array.shape for name, array in arrays.items()} != wanted:
        raise FileFormatError("has weights of another network", path=path, hint="train it again")
    network.load_state_dict(arrays, strict=False)
    return record


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
