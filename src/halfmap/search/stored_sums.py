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

_SLAB = 1 << 17
"""Voxels that are worked on at a time: many small arrays take longer than few large ones, these take room."""


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

    def planes(self, z: range) -> Tensor:
        """Planes (len(z), 2 limit + 1, limit + 1, 3) that follow each other; see `folded_planes`."""
        bounds = _bounds(self.limit)
        part = slice(bounds[z.start + self.limit], bounds[z.stop + self.limit])
        total = self.files[0][part].copy()
        for other in self.files[1:]:
            total += other[part]
        planes = torch.zeros(len(z), 2 * self.limit + 1, self.limit + 1, 3)
        planes[_held(self.limit, z)] = torch.from_numpy(total)
        return planes.to(self.device)


def store(path: Path, sums: Backprojection) -> list[int]:
    """Write symmetrised sums as `StoredSums` reads them; their box, padded box and limit.

    It takes 0.39 of the room that they have in memory.
    """
    held = sums.sums
    bounds = _bounds(held.limit)
    with atomic_path(path, durable=False) as temporary:
        shape = int(bounds[-1]), 3
        file = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        for z in slabs(held.limit):
            inside = folded_planes(held, z)[_held(held.limit, z, held.data.device)]
            file[bounds[z.start + held.limit] : bounds[z.stop + held.limit]] = inside.cpu().numpy()
        file.flush()
        del file
    return [held.box, held.padded_box, held.limit]


def slabs(limit: int, reach: int | None = None) -> list[range]:
    """Planes z of sums, from -reach to reach, in parts that are worked on at a time; all without a reach."""
    reach = limit if reach is None else reach
    step = max(1, _SLAB // ((2 * limit + 1) * (limit + 1)))
    return [range(z, min(z + step, reach + 1)) for z in range(-reach, reach + 1, step)]


def folded_planes(sums: SliceAccumulator, z: range) -> Tensor:
    """Planes of sums that follow each other, with what the mates of their voxels at x = 0 received.

    Parameters
    ----------
    sums : SliceAccumulator
    z : range
        From -limit to limit at most.

    Returns
    -------
    Tensor (len(z), 2 limit + 1, limit + 1, 3)
        In the order z, y, x.
    """
    origin = sums.limit + 1
    planes = sums.data[origin + z.start : origin + z.stop, 1:-1, :-1, :3].clone()
    mates = sums.data[origin + 1 - z.stop : origin + 1 - z.start, 1:-1, 0, :3].flip(0, 1)
    planes[:, :, 0] += mates * mates.new_tensor([1, -1, 1])
    return planes


@functools.lru_cache(maxsize=2)
def _bounds(limit: int) -> NDArray[np.int64]:
    """Where the voxels of each plane begin, and where the last ones end."""
    y = np.arange(-limit, limit + 1)
    square = (limit + 1) ** 2 - y[:, None] ** 2 - y**2
    rows = np.where(square >= 0, np.floor(np.sqrt(np.maximum(square, 0))) + 1, 0)
    return np.concatenate([[0], np.minimum(rows, limit + 1).sum(1).cumsum()]).astype(np.int64)


def _held(limit: int, z: range, device: torch.device | str = "cpu") -> Tensor:
    """Which voxels (z, y, x) of planes are within the ball."""
    planes, axis = (
        torch.arange(z.start, z.stop, device=device),
        torch.arange(-limit, limit + 1, device=device),
    )
    square = planes.square()[:, None, None] + axis.square()[:, None] + axis[limit:].square()
    return square <= (limit + 1) ** 2
