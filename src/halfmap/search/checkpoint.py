"""Models kept in one file each between the iterations that estimate them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.errors import FileFormatError
from halfmap.io.atomic import atomic_path

FOLDER = "Iterations"
"""Folder of a job with the models of its iterations."""


def model_file(folder: Path, number: int) -> Path:
    """Where the model that an iteration gave is."""
    return folder / f"it{number:03d}_model.npz"


def poses_file(folder: Path, number: int) -> Path:
    """Where the poses that an iteration found are."""
    return folder / f"it{number:03d}_poses.npz"


def save_arrays(path: Path, **arrays: NDArray) -> None:
    """Write arrays as one file, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_arrays(path: Path) -> dict[str, NDArray]:
    """Read what `save_arrays` wrote."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


class Checkpoint:
    """Base of dataclasses of tensors, numbers and words that an interrupted job goes on from.

    Attributes
    ----------
    on_device : tuple of str, optional
        Tensors that images are compared with, which `load` puts where the search runs; all by default.
    """

    on_device: ClassVar[tuple[str, ...] | None] = None

    def save(self, path: Path) -> None:
        """Write all of it as one file."""
        arrays = {
            name: value.cpu().numpy() if isinstance(value, Tensor) else np.array(value)
            for name, value in vars(self).items()
        }
        save_arrays(path, **arrays)

    @classmethod
    def last(cls, folder: Path, device: str) -> Self | None:
        """That of the last iteration that was finished, if there is one."""
        found = sorted(folder.glob("it*_model.npz"))
        return cls.load(found[-1], device) if found else None

    @classmethod
    def load(cls, path: Path, device: str) -> Self:
        """Read what `save` wrote.

        Raises
        ------
        FileFormatError
            If another version wrote it.
        """
        with np.load(path) as file:
            values: dict[str, Any] = {
                name: file[name].item() if file[name].ndim == 0 else torch.from_numpy(file[name])
                for name in file.files
            }
        if values.keys() != {field.name for field in fields(cast("Any", cls))}:
            raise FileFormatError(
                "is of another version of Halfmap, which this one cannot go on from",
                path=path,
                hint="start the job anew",
            )
        for name, value in values.items():
            if isinstance(value, Tensor) and (cls.on_device is None or name in cls.on_device):
                values[name] = value.to(device)
        return cls(**values)
