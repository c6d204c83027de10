"""What is fixed before the first iteration: sizes, the schedule of each run, parts, memory."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from torch import Tensor

from halfmap.data import ParticleSet
from halfmap.data.optics import GROUP
from halfmap.errors import ParameterError, TableError
from halfmap.log import log
from halfmap.ops import symmetry
from halfmap.ops.fourier import resample
from halfmap.ops.masks import soft_circle, soft_sphere
from halfmap.search.disc import FourierDisc
from halfmap.search.particles import ParticleImages
from halfmap.search.source import (
    Source,
    image_memory,
    mask_diameter,
    numbered,
    phase_flipped,
    refuse_denoised,
)

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.abinitio.step import AbInitioStep

_SHIFTS = 1 / 10
"""Farthest shift over the diameter."""

_FIRST = 4.25
"""Diameter over the detail of the first iteration; in T, O and I times the cube root of the operators, so
that an asymmetric unit holds as many details. What such a group makes of coarser ones is a hollow ball."""

_FINEST = 15.0
"""Å: detail that is used by default, or that of the first iteration where it is finer."""

_TRIED = 0.35
"""Part of the iterations after which the likelier of a run's two starts goes on."""

_FORK, _CHOICE = 1 / 8, 1 / 2
"""The same in T, O and I, where the other one begins from the first after part of the iterations."""

_GROWN = 0.7
"""Part of the iterations in which detail grows; in the others it is what was asked for."""

_BATCH, _MORE = 200, 2.5
"""Particles of the first iteration for each map, and how many times as many of the last."""

_WARM, _RATE = 5, 0.3
"""Iterations that forget those before them, and the weight of the newest one in later ones."""

_RESOLVED, _REACH = 1.6, 3.6
"""Radius of the grid's search times angular step and radius of the particle, in Fourier pixels, at most:
where poses in between are found by ascents, and where they are not."""

_ORDER, _FINEST_ORDER, _SMALL_GROUP = 2, 4, 12
"""HEALPix orders of grids of directions, at least and at most, and the operators from which on an asymmetric
unit is small enough for the next one."""

_MARGIN = 1.2
"""Nyquist's frequency of the images as they are searched, over the finest one used."""

_EDGE_PX = 3.0
_FEWEST = 50
"""Particles without which nothing can be made."""

_LIKELY, _FEWER_LIKELY = 64, 32
"""Poses at which an image is put back at most, and those in large groups, where there are fewer in all."""

_JUDGES = 1000
"""Particles by whose evidence runs are compared, at most."""

_PART, _MOST_PARTS = 1000, 16
"""Particles that are placed together at the end, and the most such parts."""


@dataclass(frozen=True)
class Iteration:
    """One iteration of a run.

    Attributes
    ----------
    number : int
        From 1.
    radius : int
        Rings that are compared.
    first, size : int
        Place of its first particle in the run's random order, and how many there are.
    rate : float
        Weight of its sums beside those of the iterations before.
    """

    number: int
    radius: int
    first: int
    size: int
    rate: float


@dataclass(frozen=True, eq=False)
class Plan:
    """Sizes and schedule.

    Attributes
    ----------
    step : AbInitioStep
        Parameters.
    source : Source
        Of the images.
    full_box, full_pixel_size : int, float
        Of the images as stored, px and Å.
    box, pixel_size : int, float
        Of the images as they are searched, px and Å.
    radius : int
        Finest ring.
    diameter, shift_range : float
        Å.
    iterations : tuple of Iteration
    groups : array (n,)
        Optics group of each particle, from 0.
    flipped : array (n,) of bool
        Which images were multiplied by the sign of their CTF.
    device : str
    """

    step: AbInitioStep
    source: Source
    full_box: int
    full_pixel_size: float
    box: int
    pixel_size: float
    radius: int
    diameter: float
    shift_range: float
    iterations: tuple[Iteration, ...]
    groups: NDArray[np.intp]
    flipped: NDArray[np.bool_]
    device: str

    @property
    def side(self) -> float:
        """Side of the box in Å."""
        return self.full_box * self.full_pixel_size

    def order(self, radius: int) -> int:
        """HEALPix order of the grid of directions on which rings to a radius are compared."""
        order = self._least_order
        while order < _FINEST_ORDER and radius > self._rings(order, _REACH):
            order += 1
        return order

    @property
    def coarse(self) -> int:
        """Rings that are compared on the grid where ascents follow."""
        return max(3, round(self._rings(self._least_order, _RESOLVED)))

    @property
    def _least_order(self) -> int:
        return _ORDER + (symmetry.order(self.step.symmetry) >= _SMALL_GROUP)

    def _rings(self, order: int, reach: float) -> float:
        return reach * self.side / self.diameter / math.radians(58.6 / 2**order)

    @property
    def likely(self) -> int:
        """Poses at which an image is put back at most."""
        return _FEWER_LIKELY if symmetry.order(self.step.symmetry) >= _SMALL_GROUP else _LIKELY

    @property
    def fork(self) -> tuple[int, int]:
        """Iterations after which a run goes on with two maps, and after which the likelier is chosen.

        They are of two starts, or in T, O and I of both signs of what is not spherical.
        """
        fork, choice = (_FORK, _CHOICE) if _makes_balls(self.step.symmetry) else (0.0, _TRIED)
        n = len(self.iterations)
        first = math.ceil(fork * n)
        return first, max(first + 1, round(choice * n))

    @property
    def disc(self) -> FourierDisc:
        """Coefficients that are put back."""
        return FourierDisc(self.box, self.radius, self.device)

    @property
    def images(self) -> ParticleImages:
        """The images as they are searched, the same object for all of a process."""
        return _small_images(self.source, self.box)

    @property
    def support_px(self) -> float:
        """Radius of the disc that holds a masked image."""
        return min(self.box / 2, (self.diameter / 2 + self.shift_range) / self.pixel_size + _EDGE_PX)

    def image_mask(self) -> Tensor:
        """Soft mask (box, box) of images: all that a particle may reach."""
        shape, radius = (self.box, self.box), self.support_px - _EDGE_PX
        return soft_circle(shape, radius=radius, edge=_EDGE_PX).to(self.device)

    def sphere(self) -> Tensor:
        """Soft mask (box, box, box) of what the particle's diameter encloses."""
        radius = min(self.diameter / 2 / self.pixel_size, self.box / 2 - _EDGE_PX)
        return soft_sphere((self.box,) * 3, radius=radius, edge=_EDGE_PX).to(self.device)

    def random(self, run: int, *purpose: int) -> np.random.Generator:
        """Random numbers of a run, from 0, for some purpose."""
        return np.random.default_rng(np.random.SeedSequence(self.step.seed, spawn_key=(run, *purpose)))

    def beginning(self, run: int) -> NDArray[np.intp]:
        """Particles of a run's first map: where there are enough, none that its first iteration compares."""
        n = len(self.groups)
        return np.sort(self.random(run, 0, 0).permutation(n)[-min(self.iterations[0].size, n // 2) :])

    def batch(self, run: int, iteration: Iteration) -> NDArray[np.intp]:
        """Particles of an iteration of a run: all of them in turn, in a random order of each time."""
        n = len(self.groups)
        places = np.arange(iteration.first, iteration.first + iteration.size)
        epochs = [self.random(run, 0, int(epoch)).permutation(n) for epoch in np.unique(places // n)]
        return np.unique(np.concatenate(epochs)[places - places[0] // n * n])

    def judges(self) -> NDArray[np.intp]:
        """Particles by whose evidence runs are compared."""
        n = len(self.groups)
        return np.sort(self.random(0, 3).permutation(n)[:_JUDGES])

    def parts(self) -> list[NDArray[np.intp]]:
        """Particles that are placed together at the end."""
        n = len(self.groups)
        return np.array_split(np.arange(n), min(_MOST_PARTS, math.ceil(n / _PART)))


@functools.lru_cache(maxsize=1)
def _small_images(source: Source, box: int) -> ParticleImages:
    return source.images.transformed_by(functools.partial(resample, new_shape=(box, box)))


def make_plan(step: AbInitioStep, ctx: Context, particles: ParticleSet) -> tuple[ParticleImages, Plan]:
    """Choose sizes and schedule, and open the images.

    Raises
    ------
    ParameterError
        If the point group is unknown, or resolution, diameter or range of shifts do not fit the images.
    TableError
        If the images cannot be used, or are too few.
    ResourceError
        If memory does not suffice.
    """
    _ = symmetry.order(step.symmetry)
    refuse_denoised(particles)
    if len(particles) < _FEWEST:
        raise TableError(
            f"{len(particles)} particles: at least {_FEWEST} are needed",
            path=particles.path,
            hint="give more particles",
        )
    whole = ParticleImages(particles, ctx.project, memory=0)
    side = whole.box * whole.pixel_size
    diameter = mask_diameter(particles, step.diameter, side)
    shift_range = diameter * _SHIFTS if step.shift_range is None else step.shift_range
    if shift_range > side / 2:
        raise ParameterError(
            f"shifts to {shift_range:.0f} Å go beyond boxes of {side:.0f} Å",
            hint="give a smaller --shift-range",
        )
    first, radius = _rings(step, side, diameter, whole)
    half = next_fast_len(math.ceil(_MARGIN * radius), real=True) or radius
    box = min(whole.box, 2 * half)
    memory = image_memory(step.memory * 1e9, ctx.options, each=_map_bytes(box, step.classes), purpose="maps")
    plan = Plan(
        step=step,
        source=Source.of(ctx.resolve(step.particles), ctx.project, memory),
        full_box=whole.box,
        full_pixel_size=whole.pixel_size,
        box=box,
        pixel_size=side / box,
        radius=radius,
        diameter=diameter,
        shift_range=shift_range,
        iterations=_schedule(step, len(particles), first, radius),
        groups=numbered(particles, GROUP)[1],
        flipped=phase_flipped(particles) | step.phase_flipped,
        device=ctx.device,
    )
    log.info(
        "%d particles in boxes of %d px of %.3g Å, searched in %d px of %.3g Å; %s, sphere of %.0f Å, "
        "shifts to %.0f Å; detail from %.0f to %.1f Å",
        *(len(particles), whole.box, whole.pixel_size, box, plan.pixel_size, step.symmetry.upper()),
        *(diameter, shift_range, side / first, side / radius),
    )
    return plan.images, plan


def _rings(step: AbInitioStep, side: float, diameter: float, images: ParticleImages) -> tuple[int, int]:
    """Radius of the first iteration and of the last ones."""
    coarsest, operators = round(_FIRST * side / diameter), symmetry.order(step.symmetry)
    first = coarsest * (operators ** (1 / 3) if _makes_balls(step.symmetry) else 1)
    finest = min(_FINEST, max(side / first, _MARGIN * 2 * images.pixel_size))
    resolution = finest if step.resolution is None else step.resolution
    if resolution < 2 * images.pixel_size:
        raise ParameterError(
            f"pixels of {images.pixel_size:.3g} Å hold no detail of {resolution:g} Å",
            hint=f"give a --resolution of more than {2 * images.pixel_size:.3g} Å",
        )
    radius = min(images.box // 2 - 1, round(side / resolution))
    if radius < coarsest:
        raise ParameterError(
            f"a particle of {diameter:.0f} Å has no shape at {resolution:g} Å",
            hint=f"give a --resolution of {side / coarsest:.0f} Å or less",
        )
    return min(round(first), radius), radius


def _makes_balls(group: str) -> bool:
    """Whether the coarse detail of a group's maps is spherical, whatever the particle."""
    return group.strip().upper()[0] in "TOI"


def _schedule(step: AbInitioStep, n: int, first: int, radius: int) -> tuple[Iteration, ...]:
    """Radius, particles and weight of each iteration."""
    begin = step.batch or _BATCH * step.classes
    iterations, place = [], 0
    for i in range(step.iterations):
        done = i / (step.iterations - 1)
        size = min(n, round(begin * (1 + (_MORE - 1) * done)))
        ring = round(first + (radius - first) * min(1, done / _GROWN))
        rate = 1.0 if i < _WARM else _RATE
        iterations.append(Iteration(i + 1, ring, place, size, rate))
        place += size
    return tuple(iterations)


def _map_bytes(box: int, classes: int) -> float:
    """Memory of a process for sums, the ones before them, and padded transforms."""
    return classes * (2 * 16 + 3 * 8) * (2 * box) ** 2 * (box + 2)
