"""Sums of slices in files: what a ball holds, plane by plane, for boxes whose sums do not fit into memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.errors import FileFormatError, ShapeError
from halfmap.io.atomic import atomic_path
from halfmap.ops.slices import SliceAccumulator
from halfmap.search.backprojector import Backprojection


@dataclass(frozen=True, eq=False)
class StoredSums:
    """Sums of slices and of their weights, added up from some files of `store` while they are read.

    Attributes
    ----------
    files : tuple of array (voxels, 3)
        Mapped into memory, not read: real and imaginary part and weight of the voxels of the ball of radius
        ``limit + 1`` in the half-space x >= 0, plane by plane.
    box, padded_box, limit : int
        As of a `SliceAccumulator`.
    device : str
        Where planes are wanted.
    """

    files: tuple[NDArray[np.float32], ...]
    box: int
    padded_box: int
    limit: int
    device: str = "cpu"

    @classmethod
    def open(cls, paths: Sequence[Path], sizes: Sequence[int], *, device: str = "cpu") -> StoredSums:
        """Map files that `store` wrote, with the sizes that it gave.

        Raises
        ------
        FileFormatError
            If a file holds no sums of this size.
        """
        box, padded_box, limit = sizes
        voxels = int(_bounds(limit)[-1])
        files = []
        for path in paths:
            try:
                found = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise FileFormatError("holds no sums of slices", path=path) from error
            if found.shape != (voxels, 3):
                raise FileFormatError("holds sums of another size", path=path)
            files.append(found)
        return cls(tuple(files), box, padded_box, limit, device)

    def __add__(self, other: StoredSums) -> StoredSums:
        if (self.box, self.padded_box, self.limit) != (other.box, other.padded_box, other.limit):
            raise ShapeError("sums of different boxes or radii cannot be added")
        return replace(self, files=self.files + other.files)

    def plane(self, z: int) -> Tensor:
        """Plane z, (2 limit + 1, limit + 1, 3) in the order y, x; see `folded_plane`."""
        bounds = _bounds(self.limit)
        part = slice(bounds[z + self.limit], bounds[z + self.limit + 1])
        total = self.files[0][part].copy()
        for other in self.files[1:]:
            total += other[part]
        plane = torch.zeros(2 * self.limit + 1, self.limit + 1, 3)
        plane[_held(self.limit, z)] = torch.from_numpy(total)
        return plane.to(self.device)


def store(path: Path, sums: Backprojection) -> list[int]:
    """Write symmetrised sums as `StoredSums` reads them; their box, padded box and limit.

    It takes 0.39 of the room that they have in memory.
    """
    held = sums.sums
    bounds = _bounds(held.limit)
    with atomic_path(path, durable=False) as temporary:
        shape = int(bounds[-1]), 3
        file = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        for z in range(-held.limit, held.limit + 1):
            inside = folded_plane(held, z)[_held(held.limit, z, held.data.device)]
            file[bounds[z + held.limit] : bounds[z + held.limit + 1]] = inside.cpu().numpy()
        file.flush()
        del file
    return [held.box, held.padded_box, held.limit]


def folded_plane(sums: SliceAccumulator, z: int) -> Tensor:
    """Plane z, (2 limit + 1, limit + 1, 3), of sums, with what the mates of its voxels at x = 0 received."""
    origin = sums.limit + 1
    plane, mates = sums.data[origin + z, 1:-1, :-1, :3].clone(), sums.data[origin - z, 1:-1, 0, :3].flip(0)
    plane[:, 0] += mates * mates.new_tensor([1, -1, 1])
    return plane


@functools.lru_cache(maxsize=2)
def _bounds(limit: int) -> NDArray[np.int64]:
    """Where the voxels of each plane begin, and where the last ones end."""
    y = np.arange(-limit, limit + 1)
    square = (limit + 1) ** 2 - y[:, None] ** 2 - y**2
    rows = np.where(square >= 0, np.floor(np.sqrt(np.maximum(square, 0))) + 1, 0)
    return np.concatenate([[0], np.minimum(rows, limit + 1).sum(1).cumsum()]).astype(np.int64)


def _held(limit: int, z: int, device: torch.device | str = "cpu") -> Tensor:
    """Which voxels (y, x) of plane z are within the ball."""
    axis = torch.arange(-limit, limit + 1, device=device)
    return axis.square()[:, None] + axis[limit:].square() + z * z <= (limit + 1) ** 2
