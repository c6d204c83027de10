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
from halfmap.search import _sums_kernels as kernels
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
        kernels.unpack(total, z.start, z.stop, planes.numpy())
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
        data = held.data.cpu().numpy()
        for z in slabs(held.limit):
            inside = file[bounds[z.start + held.limit] : bounds[z.stop + held.limit]]
            kernels.pack(data, z.start, z.stop, inside)
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
    reach = range(-limit, limit + 1)
    return np.cumsum([0, *(sum(kernels.held(limit, y, z) for y in reach) for z in reach)])
