"""What is fixed before a classification begins: sizes, rings, the schedule, memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from torch import Tensor

from halfmap.data import ParticleSet
from halfmap.data.optics import GROUP
from halfmap.errors import ParameterError
from halfmap.log import log
from halfmap.ops.masks import soft_circle
from halfmap.search.particles import ParticleImages
from halfmap.search.polar import PolarGrid
from halfmap.search.source import (
    MICROGRAPH,
    Source,
    farthest_shift,
    image_memory,
    mask_diameter,
    numbered,
    phase_flipped,
)
from halfmap.search.transfer import transfer_on_rings

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.class2d.step import Class2DStep

_INNER_RADIUS = 11
"""Rings of the pass over all shifts, about."""

_MARGIN = 1.15
"""Box of the images, as they are searched, over the smallest that holds the outer ring."""

_SMALLEST_BOX = 32
"""Pixels, unless the images have fewer: the soft edges of masks need their room."""

_SHIFTS = 1 / 8
"""Farthest shift over the diameter of the mask."""

_EDGE_PX = 3.0
_GROWTH = 0.6
"""Part of the iterations in which the resolution grows."""

_FULL = 4
"""Iterations with all particles, of at least twice as many."""

FOLDS = 4
"""Parts that particles fall in; each is compared with averages of the others alone."""

_FEWEST_RINGS = 3
_PER_CLASS, _FEWEST = 100, 2000
_FEW = 30
"""Particles for each class below which averages show little."""

_SHARD, _MOST_SHARDS = 2048, 64
"""Particles whose sums are kept together, and the most files of such sums."""

_SUMS = FOLDS + 8
"""Sums of a part of the particles that a process holds at a time, but for those of batches."""

_AHEAD, _AHEAD_BYTES = 8, 2e8
"""Batches that are in work at a time, or wait, and what their sums may take; never fewer than two."""

_DISK_BYTES = 1e10
"""Of the files of sums of an iteration."""

_BATCH_BYTES = 2**23


@dataclass(frozen=True)
class Iteration:
    """One iteration of the schedule.

    Attributes
    ----------
    number : int
        From 1.
    radius : int
        Outer ring, in Fourier pixels, unless the averages support less.
    size : int
        Particles that take part.
    first : int
        Place of the first of them in the random order of all.
    last : bool
        There are none after it.
    """

    number: int
    radius: int
    size: int
    first: int
    last: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """Sizes, rings and schedule of a classification.

    Attributes
    ----------
    step : Class2DStep
        Parameters.
    source : Source
        Of the images.
    full_box, full_pixel_size : int, float
        Of the images as stored, px and Å.
    box, pixel_size : int, float
        Of the images as they are searched, px and Å.
    diameter, shift_range : float
        Å.
    iterations : tuple of Iteration
    groups, micrographs : array (n,)
        Optics group and micrograph of each particle, from 0; where there are no micrographs, the former.
    names : tuple of str
        Of the micrographs.
    flipped : array (n,) of bool
        Which images were multiplied by the sign of their CTF.
    folds : array (n,)
        Fold of each particle, from 0, in all iterations.
    device : str
    """

    step: Class2DStep
    source: Source
    full_box: int
    full_pixel_size: float
    box: int
    pixel_size: float
    diameter: float
    shift_range: float
    iterations: tuple[Iteration, ...]
    groups: NDArray[np.intp]
    micrographs: NDArray[np.intp]
    names: tuple[str, ...]
    flipped: NDArray[np.bool_]
    folds: NDArray[np.intp]
    device: str

    @property
    def side(self) -> float:
        """Side of the box in Å."""
        return self.full_box * self.full_pixel_size

    @property
    def range_px(self) -> float:
        """Farthest shift in pixels of the search."""
        return self.shift_range / self.pixel_size

    @property
    def radius(self) -> int:
        """Outer ring of the last iteration."""
        return self.iterations[-1].radius

    @property
    def support_px(self) -> float:
        """Radius of the disc that holds the particle wherever its shift puts it."""
        return min(self.box / 2, (self.diameter / 2 + self.shift_range) / self.pixel_size + _EDGE_PX)

    def support(self) -> Tensor:
        """Soft mask (box, box) of images: all that a particle may reach."""
        shape = (self.box, self.box)
        return soft_circle(shape, radius=self.support_px - _EDGE_PX, edge=_EDGE_PX).to(self.device)

    def mask(self) -> Tensor:
        """Soft mask (box, box) of class averages."""
        radius = min(self.diameter / 2 / self.pixel_size, self.box / 2 - _EDGE_PX)
        return soft_circle((self.box, self.box), radius=radius, edge=_EDGE_PX).to(self.device)

    def grids(self, radius: int) -> list[PolarGrid]:
        """Rings of the passes of a search, each with twice those of the one before."""
        passes = max(0, round(math.log2(radius / _INNER_RADIUS)))
        inner = max(1, radius >> passes)
        grids = [PolarGrid(self.box, inner, self.support_px, device=self.device)]
        for i in range(1, passes + 1):
            grids.append(grids[-1].finer(2, radius >> (passes - i)))
        return grids

    def transfer(self, rows: NDArray[np.intp], grid: PolarGrid) -> Tensor:
        """CTFs (n, rings, angles / 2) of particles; complex where there are odd aberrations."""
        return transfer_on_rings(
            self.source.ctf[torch.from_numpy(rows)],
            grid,
            self.pixel_size,
            phase_flipped=torch.from_numpy(self.flipped[rows]),
            intact_first_peak=self.step.intact_first_peak,
        )

    def members(self, iteration: Iteration) -> NDArray[np.intp]:
        """Particles of an iteration, in the order of the table; in turn, each as often as any other."""
        n = len(self.groups)
        if iteration.size == n:
            return np.arange(n)
        return np.sort(_order(self.step, n)[(iteration.first + np.arange(iteration.size)) % n])

    def rest(self, iteration: Iteration) -> float:
        """Work of all later iterations over that of this one, by particles and rings."""
        later = sum(one.size * one.radius for one in self.iterations[iteration.number :])
        return later / (iteration.size * iteration.radius)

    def shards(self, iteration: Iteration) -> list[NDArray[np.intp]]:
        """The particles of an iteration in parts, each of one fold, sorted by optics group.

        They are as many as sums of all of them may take on the disk, whatever the number of processes.
        """
        members = self.members(iteration)
        most = min(_MOST_SHARDS, max(FOLDS, int(_DISK_BYTES // self.sum_bytes(iteration.radius))))
        parts = min(most // FOLDS, -(-len(members) // (FOLDS * _SHARD)))
        shards = []
        for fold in range(FOLDS):
            own = members[self.folds[members] == fold]
            ordered = own[np.argsort(self.groups[own], kind="stable")]
            shards += [part for part in np.array_split(ordered, parts) if len(part)]
        return shards

    def sum_bytes(self, radius: int) -> float:
        """Bytes of the sums of a part of the particles."""
        grid = self.grids(radius)[-1]
        return 2.5 * 16 * self.step.classes * grid.rings * (grid.angles / 2 + 1)

    def model_bytes(self) -> float:
        """Bytes of the averages, of all sets."""
        return 4.0 * (1 + FOLDS) * self.step.classes * self.box**2

    def ahead(self, radius: int) -> int:
        """Batches in work at a time, or that wait."""
        return int(np.clip(_AHEAD_BYTES / self.sum_bytes(radius), 2, _AHEAD))

    def batch(self, radius: int) -> int:
        """Images searched at a time, by the memory that their probabilities take."""
        coarse = self.grids(radius)[0]
        shifts = math.pi * (self.range_px * 4 * coarse.radius / self.box) ** 2 + 1
        per_image = 3 * 4 * coarse.angles * shifts * self.step.classes
        return int(np.clip(_BATCH_BYTES / per_image, 1, 64))


def make_plan(step: Class2DStep, ctx: Context, particles: ParticleSet) -> tuple[ParticleImages, Plan]:
    """Choose sizes and schedule, and open the images.

    Raises
    ------
    ParameterError
        If the diameter does not fit the box, or the resolution the pixels.
    TableError
        If the images cannot be used; see `ParticleImages`.
    ResourceError
        If memory does not suffice.
    """
    whole = ParticleImages(particles, ctx.project, memory=0)
    side = whole.box * whole.pixel_size
    diameter = mask_diameter(particles, step.diameter, side)
    _check_counts(step, len(particles))
    coarsest, finest = _rings(step, whole)
    box = _search_box(whole.box, finest)
    names, micrographs = numbered(particles, MICROGRAPH)
    plan = Plan(
        step=step,
        source=Source.of(ctx.resolve(step.particles), ctx.project, box=box),
        full_box=whole.box,
        full_pixel_size=whole.pixel_size,
        box=box,
        pixel_size=side / box,
        diameter=diameter,
        shift_range=farthest_shift(step.shift_range, _SHIFTS * diameter, side),
        iterations=_schedule(step, len(particles), coarsest, finest),
        groups=numbered(particles, GROUP)[1],
        micrographs=micrographs,
        names=names,
        flipped=phase_flipped(particles) | step.phase_flipped,
        folds=_folds(step, len(particles)),
        device=ctx.device,
    )
    memory = image_memory(
        step.memory * 1e9,
        ctx.options,
        each=(_SUMS + plan.ahead(plan.radius)) * plan.sum_bytes(plan.radius) + plan.model_bytes(),
        purpose="classification",
        hint="give a smaller --memory, fewer --workers or fewer --classes",
    )
    plan = replace(plan, source=replace(plan.source, memory=memory))
    log.info(
        "%d particles, box %d px of %.3g Å, searched as %d px; circle of %.0f Å, shifts to %.0f Å",
        *(len(particles), whole.box, whole.pixel_size, box, diameter, plan.shift_range),
    )
    return plan.source.images, plan


def _check_counts(step: Class2DStep, n: int) -> None:
    """Refuse iterations and classes that cannot be, and warn of classes of few particles."""
    if step.full_iterations is not None and step.full_iterations > step.iterations:
        raise ParameterError(
            f"{step.full_iterations} of {step.iterations} iterations cannot be with all particles",
            hint="give fewer --full-iterations",
        )
    if n < step.classes:
        raise ParameterError(
            f"{n} particles cannot be sorted into {step.classes} classes", hint="give fewer --classes"
        )
    if n < _FEW * step.classes:
        log.warning(
            "%d particles are %.0f a class, too few to show much: fewer --classes may show more",
            *(n, n / step.classes),
        )


def _rings(step: Class2DStep, images: ParticleImages) -> tuple[int, int]:
    """Outer ring of the first iteration, and of the last."""
    side = images.box * images.pixel_size
    finest = min(images.box // 2 - 1, round(side / step.resolution))
    if finest < side / step.resolution - 1:
        log.warning("the pixels allow %.1f Å, not %g Å", side / finest, step.resolution)
    if finest < _FEWEST_RINGS:
        raise ParameterError(
            f"boxes of {side:.0f} Å have too few Fourier rings within {step.resolution:g} Å",
            hint=f"give a --resolution of {side / _FEWEST_RINGS:.0f} Å or finer",
        )
    return min(finest, max(_FEWEST_RINGS, round(side / step.first_resolution))), finest


def _search_box(box: int, finest: int) -> int:
    """Side in pixels of images that are searched to a ring."""
    half = max(_SMALLEST_BOX // 2, math.ceil(_MARGIN * finest))
    return min(box, 2 * (next_fast_len(half, real=True) or half))


def _order(step: Class2DStep, n: int) -> NDArray[np.intp]:
    """Random order in which particles take part."""
    return np.random.default_rng(step.seed).permutation(n)


def _folds(step: Class2DStep, n: int) -> NDArray[np.intp]:
    """Fold of each particle: equally many in any run of the order."""
    folds = np.empty(n, np.intp)
    folds[_order(step, n)] = np.arange(n) % FOLDS
    return folds


def _schedule(step: Class2DStep, n: int, coarsest: int, finest: int) -> tuple[Iteration, ...]:
    """Growing resolution, and growing parts of the data that end with all of it."""
    full = step.full_iterations or min(_FULL, step.iterations // 2)
    partial = step.iterations - full
    smallest = min(n, step.first_batch or max(_FEWEST, _PER_CLASS * step.classes))
    iterations, first = [], 0
    for i in range(step.iterations):
        grown = min(1.0, i / (_GROWTH * step.iterations))
        size = n if i >= partial else min(n, round(smallest * (n / smallest) ** (i / max(partial, 1))))
        radius = round(coarsest + (finest - coarsest) * grown)
        last = i + 1 == step.iterations
        iterations.append(Iteration(i + 1, radius, size, first, last))
        first = (first + size) % n
    return tuple(iterations)


def to_device(tensor: Tensor | NDArray, device: str) -> Tensor:
    """Tensor on the device of the search."""
    return torch.as_tensor(tensor).to(device)
