"""What images of one half set add up to in Fourier space, and the map that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from halfmap.errors import FileFormatError, ShapeError
from halfmap.io.atomic import atomic_path
from halfmap.ops import symmetry
from halfmap.ops._slice_bodies import allocate, empty_like
from halfmap.ops.slices import SliceAccumulator, finish_reconstruction, insert_slices
from halfmap.ops.threads import in_threads
from halfmap.search import _symmetry_kernels as kernels
from halfmap.search.disc import DiscImages

Turn = tuple[int, ...]
"""Nine numbers of an operator, row by row."""

_NONE: Turn = (1, 0, 0, 0, 1, 0, 0, 0, 1)

_SAMPLES = 1 << 22
"""Samples of slices that are made at a time."""


@dataclass(frozen=True, eq=False)
class Backprojection:
    """Sums of images and of their weights in a volume's Fourier transform.

    Attributes
    ----------
    sums : SliceAccumulator
        Of CTF times image over noise power, and of squared CTF over noise power.
    group : str
        Point group. Operators that map the grid onto itself are applied at the end, the others to each image.
    """

    sums: SliceAccumulator
    group: str = "C1"

    @classmethod
    def empty(
        cls,
        box: int,
        radius: int,
        *,
        group: str = "C1",
        padding: float = 2.0,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> Backprojection:
        """Make sums of zeros, for images of `box` pixels and frequencies to `radius` Fourier pixels."""
        sums = SliceAccumulator.empty(box, padding=padding, radius_px=radius, dtype=dtype, device=device)
        _ = symmetry.order(group)
        return cls(sums, group)

    def add(
        self,
        images: DiscImages,
        rotations: Tensor,
        shifts_px: Tensor,
        weights: Tensor | None = None,
        *,
        owner: Tensor | None = None,
    ) -> None:
        """Add images at their poses, in place.

        Parameters
        ----------
        images : DiscImages
            b of them.
        rotations, shifts_px : Tensor (n, 3, 3), (n, 2)
            Poses; shifts move the images.
        weights : Tensor (n,), optional
            Probability of each pose, 1 by default.
        owner : Tensor (n,) of int, optional
            Image of each pose; by default the poses are one for each image.

        Raises
        ------
        ShapeError
            If box or radius of the images are not those of the sums.
        """
        disc = images.disc
        if disc.box != self.sums.box or disc.radius * self.sums.voxels_per_pixel > self.sums.limit:
            raise ShapeError(f"images of box {disc.box} and radius {disc.radius} do not fit the sums")
        owner = torch.arange(len(rotations), device=rotations.device) if owner is None else owner
        weights = torch.ones(len(rotations), device=rotations.device) if weights is None else weights
        turns, _ = _factorised(self.group)
        step = max(1, _SAMPLES // disc.side**2)
        for first in range(0, len(rotations), step):
            part = slice(first, first + step)
            weight = weights[part, None].to(images.squared)
            slices = images.linear[owner[part]] * disc.shifts(shifts_px[part]) * weight
            slices, squares = disc.unpack(slices), disc.unpack(images.squared[owner[part]] * weight)
            for turn in turns.to(rotations):
                insert_slices(slices, rotations[part] @ turn, out=self.sums, weights=squares)

    def __add__(self, other: Backprojection) -> Backprojection:
        if (self.sums.data.shape, self.sums.box, self.group) != (
            other.sums.data.shape,
            other.sums.box,
            other.group,
        ):
            raise ShapeError("sums of different boxes, radii or point groups cannot be added")
        data = self.sums.data + other.sums.data
        return Backprojection(SliceAccumulator(data, self.sums.box, self.sums.padded_box), self.group)

    def save(self, path: Path) -> None:
        """Write the sums to a file that `load` reads."""
        shape = np.array([self.sums.box, self.sums.padded_box])
        with atomic_path(path, durable=False) as temporary, temporary.open("wb") as file:
            data = self.sums.data[..., :3].cpu().numpy()
            np.savez(file, data=data, shape=shape, group=np.array(self.group))

    @classmethod
    def load(cls, path: Path) -> Backprojection:
        """Read sums that `save` wrote."""
        try:
            with np.load(path) as parts:
                data, (box, padded), group = parts["data"], parts["shape"], str(parts["group"])
        except (OSError, KeyError, ValueError) as error:
            raise FileFormatError("holds no sums of slices", path=path) from error
        whole = allocate((*data.shape[:3], 4), dtype=torch.from_numpy(data).dtype, device="cpu")
        whole[..., :3] = torch.from_numpy(data)
        return cls(SliceAccumulator(whole, int(box), int(padded)), group)

    def symmetrised(self) -> Backprojection:
        """The sums with every image at all its equivalent poses; their plane x = 0 is that of one half."""
        data = _summed(self.sums, _factorised(self.group)[1])
        return Backprojection(SliceAccumulator(data, self.sums.box, self.sums.padded_box), "C1")

    def solve(self, prior: Tensor) -> Tensor:
        """The map whose posterior is greatest.

        Parameters
        ----------
        prior : Tensor, broadcast to the sums' voxels (z, y, x)
            Reciprocal of the signal's power, from a `Regulariser`.

        Returns
        -------
        Tensor (box, box, box)
        """
        whole = self if symmetry.order(self.group) == 1 else self.symmetrised()
        return finish_reconstruction(whole.sums, regularisation=prior)


def _factorised(group: str) -> tuple[Tensor, Tensor]:
    """Operators c and h whose products c h are the group's, each once; those h map the grid onto itself."""
    operators = symmetry.operators(group)
    whole = operators.round()
    on_grid = whole[(operators - whole).abs().amax((1, 2)) < 1e-9]
    turns: list[Tensor] = []
    for operator in operators:
        quotients = [turn.T @ operator for turn in turns]
        if not any(bool(((on_grid - q).abs().amax((1, 2)) < 1e-6).any()) for q in quotients):
            turns.append(operator)
    return torch.stack(turns), on_grid


def few_turns(operators: Tensor) -> list[Tensor]:
    """Sets of operators whose products, one of each set after the other, are a group's, each once.

    Parameters
    ----------
    operators : Tensor (g, 3, 3)
        Of a group, of whole numbers.

    Returns
    -------
    list of Tensor (k, 3, 3)
        A sum over the group is one over the last set of one over that before: 9 turns for the 24 of an
        octahedron. Powers of an operator are added to a subgroup where this gives the next larger one.
    """
    every: list[Turn] = [tuple(each) for each in operators.round().long().flatten(1).tolist()]
    group, found = {_NONE}, list[list[Turn]]()
    while len(group) < len(every):
        larger = [_with_powers(group, turn) for turn in every if turn not in group]
        group, powers = min((one for one in larger if _is_group(one[0])), key=lambda one: len(one[1]))
        found.append(powers)
    return [torch.tensor(each).reshape(-1, 3, 3).to(operators) for each in found or [every]]


def _product(a: Turn, b: Turn) -> Turn:
    return tuple(sum(a[3 * i + k] * b[3 * k + j] for k in range(3)) for i in range(3) for j in range(3))


def _with_powers(group: set[Turn], turn: Turn) -> tuple[set[Turn], list[Turn]]:
    """A group's elements times the powers of a turn, up to the first that it holds, and these powers."""
    powers = [_NONE, turn]
    while (following := _product(powers[-1], turn)) not in group:
        powers.append(following)
    return {_product(each, power) for each in group for power in powers}, powers


def _is_group(turns: set[Turn]) -> bool:
    return all(_product(a, b) in turns for a in turns for b in turns)


def _summed(sums: SliceAccumulator, operators: Tensor) -> Tensor:
    """Sum (z, y, x, 4) over operators of the sums at S q; the plane x = 0 is that of one half."""
    out = empty_like(sums.data).copy_(sums.data)
    # Each voxel of the plane x = 0 holds part of what belongs to it and its Friedel mate.
    plane = out[:, :, 0]
    plane += _mates(plane)
    if out.device.type == "cpu":
        turns, origin, into = operators.round().long().flatten(1).numpy(), sums.limit + 1, out.numpy()
        in_threads(lambda z: kernels.add_orbits(into, turns, origin, z), range(1, 2 * origin))
        # Of each pair of mates one was summed.
        y, z = torch.meshgrid(*[torch.arange(len(out)) - origin] * 2, indexing="xy")
        plane[:] = torch.where(((y < 0) | ((y == 0) & (z < 0)))[..., None], _mates(plane), plane)
    else:
        for turns in few_turns(operators):
            out = _turned(out, turns)
    out[:, :, 0] /= 2
    return out


def _mates(plane: Tensor) -> Tensor:
    """What voxels (z, y, 4) of the plane x = 0 have at -q, as it counts at q."""
    return plane.flip(0, 1) * plane.new_tensor([1, -1, 1, 1])


def _turned(data: Tensor, operators: Tensor) -> Tensor:
    """As `_symmetry_kernels.add_orbits`, apart from what it is given, on any device."""
    out, origin = torch.zeros_like(data), data.shape[2] - 1
    for z in range(1, 2 * origin):
        out[z] = _turned_plane(data, operators.to(data.device).long(), origin, z)
    return out


def _turned_plane(data: Tensor, operators: Tensor, origin: int, z: int) -> Tensor:
    """One plane (y, x, 4) of the sum over operators of a half-space whose plane x = 0 is whole."""
    flat, n_y, n_x = data.reshape(-1, 4), data.shape[1], data.shape[2]
    reach = torch.arange(1 - origin, origin, device=data.device)
    y, x = torch.meshgrid(reach, reach[origin - 1 :], indexing="ij")
    position = torch.stack([x, y, torch.full_like(x, z - origin)], dim=-1)
    plane = data.new_zeros(n_y, n_x, 4)
    for operator in operators:
        turned = position @ operator.T
        flipped = turned[..., :1] < 0
        tx, ty, tz = torch.where(flipped, -turned, turned).unbind(-1)
        found = flat[((tz + origin) * n_y + ty + origin) * n_x + tx]
        found[..., 1] *= torch.where(flipped[..., 0], -1, 1)
        plane[1:-1, :-1] += found
    return plane


def shells_of(sums: SliceAccumulator) -> Tensor:
    """Shell of each voxel (z, y, x), int64: one Fourier pixel of the unpadded box wide."""
    axis = torch.arange(len(sums.data), device=sums.data.device) - (sums.limit + 1)
    square = (axis.square()[:, None, None] + axis.square()[:, None]) + axis[sums.limit + 1 :].square()
    return (square.sqrt() / sums.voxels_per_pixel).round().long()
