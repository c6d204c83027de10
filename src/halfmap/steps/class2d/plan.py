"""What is fixed before a classification begins: sizes, rings, the schedule, memory."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from torch import Tensor

from halfmap.data import ParticleSet
from halfmap.data.ctf import CTFParameters
from halfmap.data.optics import GROUP
from halfmap.engine.memory import require_memory
from halfmap.errors import ParameterError, TableError
from halfmap.io.tables import read_particles
from halfmap.log import log
from halfmap.ops.fourier import resample
from halfmap.ops.masks import soft_circle
from halfmap.search.particles import ParticleImages
from halfmap.search.polar import PolarGrid
from halfmap.search.transfer import transfer_on_rings

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.class2d.step import Class2DStep

DIAMETER, MICROGRAPH = "hmParticleDiameter", "rlnMicrographName"

_INNER_RADIUS = 11
"""Rings of the pass over all shifts, about."""

_MARGIN = 1.15
"""Box of the images, as they are searched, over the smallest that holds the outer ring."""

_SMALLEST_BOX = 32
"""Pixels, unless the images have fewer: the soft edges of masks need their room."""

_TREATED = "rlnCtfDataArePhaseFlipped", "rlnCtfDataAreCtfPremultiplied"

_MASK = 1.15
_SHIFTS = 1 / 8
"""Diameter of the mask over the particle's, and farthest shift over the mask's."""

_EDGE_PX = 3.0
_GROWTH = 0.6
"""Part of the iterations in which the resolution grows."""

_EARLY = 0.8
"""Part of the iterations in which classes that starve begin anew."""

_FEWEST_RINGS = 3
_PER_CLASS, _FEWEST = 100, 2000
_SHARD, _MOST_SHARDS = 2048, 64
"""Particles whose sums are kept together, and the most files of such sums."""

_SUMS = 3
"""Sums of a part of the particles that a process holds at a time."""

_DISK_BYTES = 1e10
"""Of the files of sums of an iteration."""

_PROCESS_BYTES = 5e8
"""What a process takes beside the images that it keeps."""

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
    early : bool
        Classes that starve begin anew.
    last : bool
        There are none after it.
    """

    number: int
    radius: int
    size: int
    first: int
    early: bool
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
            _transfer_parameters(self.source)[torch.from_numpy(rows)],
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
        order = np.random.default_rng(self.step.seed).permutation(n)
        return np.sort(order[(iteration.first + np.arange(iteration.size)) % n])

    def shards(self, iteration: Iteration) -> list[NDArray[np.intp]]:
        """The particles of an iteration in parts, sorted by optics group.

        They are as many as sums of all of them may take on the disk, whatever the number of processes.
        """
        members = self.members(iteration)
        most = min(_MOST_SHARDS, max(1, int(_DISK_BYTES // self.sum_bytes(iteration.radius))))
        ordered = members[np.argsort(self.groups[members], kind="stable")]
        return np.array_split(ordered, min(most, -(-len(members) // _SHARD)))

    def sum_bytes(self, radius: int) -> float:
        """Bytes of the sums of a part of the particles, of both its halves."""
        grid = self.grids(radius)[-1]
        return 2 * 2.5 * 16 * self.step.classes * grid.rings * (grid.angles / 2 + 1)

    def batch(self, radius: int) -> int:
        """Images searched at a time, by the memory that their probabilities take."""
        coarse = self.grids(radius)[0]
        shifts = math.pi * (self.range_px * 4 * coarse.radius / self.box) ** 2 + 1
        per_image = 3 * 4 * coarse.angles * shifts * self.step.classes
        return int(np.clip(_BATCH_BYTES / per_image, 1, 64))


@dataclass(frozen=True)
class Source:
    """Where particle images come from, and how they are made ready for the search."""

    table: Path
    stamp: int
    """When the table was last written, so that a new one is not taken for it."""
    project: Path
    memory: int
    box: int


def make_plan(step: Class2DStep, ctx: Context, particles: ParticleSet) -> tuple[ParticleImages, Plan]:
    """Choose sizes and schedule, and open the images.

    Raises
    ------
    ParameterError
        If the diameter does not fit the box, or the resolution the pixels.
    TableError
        If the images cannot be used; see `ParticleImages`.
    """
    path, memory = ctx.resolve(step.particles), int(step.memory * 1e9 / _processes(ctx))
    whole = ParticleImages(particles, ctx.project, memory=0)
    side = whole.box * whole.pixel_size
    diameter = _diameter(step, particles, side)
    shift_range = diameter * _SHIFTS if step.shift_range is None else step.shift_range
    if shift_range > side / 2:
        raise ParameterError(
            f"shifts to {shift_range:.0f} Å go beyond boxes of {side:.0f} Å",
            hint="give a smaller --shift-range",
        )
    if step.full_iterations > step.iterations:
        raise ParameterError(
            f"{step.full_iterations} of {step.iterations} iterations cannot be with all particles",
            hint="give fewer --full-iterations",
        )
    finest = min(whole.box // 2 - 1, round(side / step.resolution))
    if finest < side / step.resolution - 1:
        log.warning("the pixels allow %.1f Å, not %g Å", side / finest, step.resolution)
    if len(particles) < step.classes:
        raise ParameterError(
            f"{len(particles)} particles cannot be sorted into {step.classes} classes",
            hint="give fewer --classes",
        )
    if finest < _FEWEST_RINGS:
        raise ParameterError(
            f"boxes of {side:.0f} Å have too few Fourier rings within {step.resolution:g} Å",
            hint=f"give a --resolution of {side / _FEWEST_RINGS:.0f} Å or finer",
        )
    coarsest = min(finest, max(_FEWEST_RINGS, round(side / step.first_resolution)))
    half = max(_SMALLEST_BOX // 2, math.ceil(_MARGIN * finest))
    box = min(whole.box, 2 * (next_fast_len(half, real=True) or half))
    source = Source(path, path.stat().st_mtime_ns, ctx.project, memory, box)
    groups = particles.rows[GROUP].to_numpy()
    names = particles.rows[MICROGRAPH].to_numpy() if MICROGRAPH in particles.rows.columns else groups
    names, micrographs = np.unique(names, return_inverse=True)
    plan = Plan(
        step=step,
        source=source,
        full_box=whole.box,
        full_pixel_size=whole.pixel_size,
        box=box,
        pixel_size=side / box,
        diameter=diameter,
        shift_range=shift_range,
        iterations=_schedule(step, len(particles), coarsest, finest),
        groups=np.unique(groups, return_inverse=True)[1],
        micrographs=micrographs,
        names=tuple(names.astype(str)),
        flipped=_flipped(step, particles),
        device=ctx.device,
    )
    _check_memory(plan, ctx)
    log.info(
        "%d particles, box %d px of %.3g Å, searched as %d px; circle of %.0f Å, shifts to %.0f Å",
        *(len(particles), whole.box, whole.pixel_size, box, diameter, shift_range),
    )
    return open_images(source), plan


def _processes(ctx: Context) -> int:
    """How many keep images and sums: with workers, this one as well."""
    return 1 if ctx.options.workers == 1 else ctx.options.workers + 1


def _check_memory(plan: Plan, ctx: Context) -> None:
    """Refuse what will not fit: images kept, and sums of a part, of all before, and of a batch."""
    each = _PROCESS_BYTES + _SUMS * plan.sum_bytes(plan.radius)
    require_memory(
        plan.step.memory * 1e9 + _processes(ctx) * each,
        purpose="classification",
        hint="give a smaller --memory, fewer --workers or fewer --classes",
    )


@functools.lru_cache(maxsize=1)
def open_images(source: Source) -> ParticleImages:
    """Images of a classification as they are searched, the same object for all of a process."""
    particles = read_particles(source.table)
    crop = functools.partial(resample, new_shape=(source.box, source.box))
    return ParticleImages(particles, source.project, memory=source.memory, transform=crop)


@functools.lru_cache(maxsize=1)
def _transfer_parameters(source: Source) -> CTFParameters:
    """Of all particles, made once."""
    return read_particles(source.table).ctf


def _flipped(step: Class2DStep, particles: ParticleSet) -> NDArray[np.bool_]:
    """Which images were multiplied by the sign of their CTF, by the table or by what the user says."""
    rows, optics = particles.rows[GROUP].to_numpy(), particles.optics
    flipped, multiplied = (
        np.isin(rows, optics[GROUP].filter(optics[name].cast(bool)) if name in optics.columns else [])
        for name in _TREATED
    )
    if multiplied.any():
        raise TableError(
            "the images have been multiplied by their CTF",
            path=particles.path,
            row=int(multiplied.argmax()) + 1,
            hint="extract them without",
        )
    return flipped | step.phase_flipped


def _diameter(step: Class2DStep, particles: ParticleSet, side: float) -> float:
    diameter = step.diameter
    if diameter is None:
        if DIAMETER in particles.rows.columns:
            diameter = _MASK * float(np.nanmedian(particles.rows[DIAMETER].to_numpy()))
        if diameter is None or not math.isfinite(diameter):
            raise ParameterError(
                "the table does not say how large the particles are", hint="give --diameter in Å"
            )
        diameter = min(diameter, 0.95 * side)
    if diameter > side:
        raise ParameterError(
            f"a circle of {diameter:.0f} Å does not fit boxes of {side:.0f} Å",
            hint="give a smaller --diameter",
        )
    return diameter


def _schedule(step: Class2DStep, n: int, coarsest: int, finest: int) -> tuple[Iteration, ...]:
    """Growing resolution, and growing parts of the data that end with all of it."""
    full = step.full_iterations
    partial = step.iterations - full
    smallest = min(n, step.first_batch or max(_FEWEST, _PER_CLASS * step.classes))
    iterations, first = [], 0
    for i in range(step.iterations):
        grown = min(1.0, i / (_GROWTH * step.iterations))
        size = n if i >= partial else min(n, round(smallest * (n / smallest) ** (i / max(partial, 1))))
        radius = round(coarsest + (finest - coarsest) * grown)
        early, last = i < _EARLY * step.iterations, i + 1 == step.iterations
        iterations.append(Iteration(i + 1, radius, size, first, early and not last, last))
        first = (first + size) % n
    return tuple(iterations)


def to_device(tensor: Tensor | NDArray, device: str) -> Tensor:
    """Tensor on the device of the search."""
    return torch.as_tensor(tensor).to(device)
