"""What is fixed before a refinement begins: sizes, half sets, parts, memory."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from torch import Tensor

from halfmap.data import ParticleSet
from halfmap.data.optics import GROUP
from halfmap.engine.memory import available_memory
from halfmap.errors import ParameterError, TableError
from halfmap.log import log
from halfmap.ops import symmetry
from halfmap.ops.masks import soft_circle, soft_sphere
from halfmap.search.disc import FourierDisc
from halfmap.search.lens_noise import leakage
from halfmap.search.particles import ParticleImages
from halfmap.search.prepared import refuse_stretched
from halfmap.search.source import (
    MICROGRAPH,
    Source,
    farthest_shift,
    image_memory,
    mask_diameter,
    numbered,
    phase_flipped,
)
from halfmap.steps.refine.given import GivenPoses, given_poses

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.refine.step import RefineStep

SUBSET = "rlnRandomSubset"

_SHIFTS = 1 / 8
"""Farthest shift over the diameter."""

_EDGE_A = 8.0
_EDGE_PX = 3.0
"""Width of the soft edges of masks, of maps and of images."""

_MARGIN, _MORE = 1.25, 6
"""Frequencies that are put back over those that were compared: a factor, and rings more."""

PARTS = 4
"""Parts of a half set, each of which is searched by one process and leaves its sums in a file."""

_UNEVEN = 0.2
"""Difference of their sizes, over the mean, from which on particles are dealt one by one."""

_PADDINGS = 2.0, 1.5, 1.25
"""Of transforms, over the box, the best first."""

_FINE_A = 20.0
"""Detail of a reference that may be of another particle."""

_FEWEST = 20
"""Particles in a half set without which nothing can be refined."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Sizes and parts of a refinement.

    Attributes
    ----------
    step : RefineStep
        Parameters.
    source : Source
        Of the images.
    box, pixel_size : int, float
        Of the images, px and Å.
    diameter, shift_range : float
        Å.
    groups, micrographs : array (n,)
        Optics group and micrograph of each particle, from 0; where there are no micrographs, the former.
    names : tuple of str
        Of the micrographs.
    halves : array (n,)
        Half set of each particle, 0 or 1.
    flipped : array (n,) of bool
        Which images were multiplied by the sign of their CTF.
    mask : path or None
        Mask that was given.
    given : GivenPoses or None
        Of a local refinement.
    padding : float
        Of transforms, over the box.
    device : str
    """

    step: RefineStep
    source: Source
    box: int
    pixel_size: float
    diameter: float
    shift_range: float
    groups: NDArray[np.intp]
    micrographs: NDArray[np.intp]
    names: tuple[str, ...]
    halves: NDArray[np.intp]
    flipped: NDArray[np.bool_]
    mask: Path | None
    given: GivenPoses | None
    padding: float
    device: str

    @property
    def side(self) -> float:
        """Side of the box in Å."""
        return self.box * self.pixel_size

    @property
    def nyquist(self) -> int:
        """Largest radius of a disc."""
        return self.box // 2 - 1

    @property
    def n_groups(self) -> int:
        """Number of optics groups."""
        return int(self.groups.max()) + 1

    def ring(self, resolution_A: float) -> int:
        """Ring of a resolution."""
        return max(1, min(self.nyquist, round(self.side / resolution_A)))

    def disc(self, radius: int) -> FourierDisc:
        """Coefficients that are put back where those to `radius` are compared, in a box for these."""
        outer = min(self.nyquist, math.ceil(_MARGIN * radius) + _MORE)
        half = next_fast_len(outer + 2, real=True) or outer + 2
        return FourierDisc(min(self.box, 2 * half), outer, self.device)

    def whole_disc(self) -> FourierDisc:
        """All coefficients."""
        return FourierDisc(self.box, self.nyquist, self.device)

    def image_mask(self) -> Tensor:
        """Soft mask (box, box) of images: all that a particle may reach."""
        radius = (self.diameter / 2 + self.shift_range) / self.pixel_size
        shape = (self.box, self.box)
        return soft_circle(shape, radius=min(radius, self.box / 2 - _EDGE_PX), edge=_EDGE_PX).to(self.device)

    @functools.cached_property
    def leakage(self) -> Tensor:
        """Where power goes when images are masked; see `lens_noise.leakage`."""
        return leakage(self.image_mask().cpu())

    def support_px(self, box: int) -> float:
        """Radius of the disc that holds a masked image, in pixels of a box of other pixels."""
        radius = (self.diameter / 2 + self.shift_range) / self.pixel_size + _EDGE_PX
        return min(self.box / 2, radius) * box / self.box

    def sphere(self, box: int) -> Tensor:
        """Soft mask (box, box, box) of what the particle's diameter encloses."""
        radius = min(self.diameter / 2, self.side / 2 - _EDGE_A)
        pixel_size = self.side / box
        return soft_sphere((box,) * 3, radius=radius, edge=_EDGE_A, pixel_size=pixel_size).to(self.device)

    def parts(self) -> list[tuple[int, NDArray[np.intp]]]:
        """Half set and particles of each part, those of the first half set first."""
        found = []
        for half in (0, 1):
            own = np.flatnonzero(self.halves == half)
            part = dealt(self.micrographs[own], np.random.default_rng((self.step.seed, half)))
            found += [(half, own[part == number]) for number in range(PARTS)]
        return found


def make_plan(step: RefineStep, ctx: Context, particles: ParticleSet) -> tuple[ParticleImages, Plan]:
    """Choose sizes and half sets, and open the images.

    Raises
    ------
    ParameterError
        If the point group is unknown, or the diameter or the range of shifts do not fit the box.
    TableError
        If the images or half sets cannot be used.
    ResourceError
        If memory does not suffice.
    """
    _ = symmetry.order(step.symmetry)
    refuse_stretched(particles.ctf, particles.path)
    whole = ParticleImages(particles, ctx.project, memory=0)
    side = whole.box * whole.pixel_size
    diameter = mask_diameter(particles, step.diameter, side)
    mask = None if step.mask is None else ctx.resolve(step.mask)
    given = given_poses(step, particles, mask, side)
    farthest = _SHIFTS * diameter
    if given is not None:
        reach = float(given.shifts_A.norm(dim=1).max()) + 2 * given.shift_A
        farthest = min(max(farthest, reach), (side - diameter) / 2)
    shift_range = farthest_shift(step.shift_range, farthest, side)
    if step.initial_lowpass < 2 * whole.pixel_size:
        raise ParameterError(
            f"pixels of {whole.pixel_size:.3g} Å hold no detail of {step.initial_lowpass:g} Å",
            hint=f"give an --initial-lowpass of more than {2 * whole.pixel_size:.3g} Å",
        )
    if step.initial_lowpass < _FINE_A:
        log.warning(
            "detail of the reference of %g Å is in both half maps from the start: what they agree in is "
            "theirs only where it is finer",
            step.initial_lowpass,
        )
    names, micrographs = numbered(particles, MICROGRAPH)
    padding = affordable_padding(whole.box, step.memory * 1e9, ctx.options.workers)
    each = map_bytes(whole.box, padding)
    memory = image_memory(step.memory * 1e9, ctx.options.workers, each=each, purpose="refinement")
    plan = Plan(
        step=step,
        source=Source.of(ctx.resolve(step.particles), ctx.project, memory),
        box=whole.box,
        pixel_size=whole.pixel_size,
        diameter=diameter,
        shift_range=shift_range,
        groups=numbered(particles, GROUP)[1],
        micrographs=micrographs,
        names=names,
        halves=half_sets(particles, step.seed),
        flipped=phase_flipped(particles) | step.phase_flipped,
        mask=mask,
        given=given,
        padding=padding,
        device=ctx.device,
    )
    log.info(
        "%d particles, %d and %d in the half sets, box %d px of %.3g Å; %s, sphere of %.0f Å, "
        "shifts to %.0f Å",
        *(len(particles), *np.bincount(plan.halves), whole.box, whole.pixel_size, step.symmetry.upper()),
        *(diameter, shift_range),
    )
    return plan.source.images, plan


def dealt(micrographs: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.intp]:
    """Deal particles at random to parts of about one size, micrograph by micrograph.

    Parameters
    ----------
    micrographs : array (n,)
        Of each particle. Whole ones are dealt, so that a particle that was picked twice does not meet itself,
        unless they are so few or so different that parts would differ by more than a fifth.
    rng : Generator

    Returns
    -------
    array (n,) of int
    """
    counts = np.bincount(micrographs)
    part, sizes = np.zeros(len(counts), np.intp), np.zeros(PARTS, np.intp)
    order = rng.permutation(len(counts))
    for micrograph in order[np.argsort(-counts[order], kind="stable")]:
        part[micrograph] = sizes.argmin()
        sizes[part[micrograph]] += counts[micrograph]
    if np.ptp(sizes) <= _UNEVEN * len(micrographs) / PARTS:
        return part[micrographs]
    return rng.permutation(np.arange(len(micrographs)) % PARTS)


def affordable_padding(box: int, images: float, workers: int) -> float:
    """Largest of the paddings that memory suffices for, beside bytes of images, or the smallest."""
    processes, available = (workers + 1 if workers > 1 else 1), available_memory()
    fit = [each for each in _PADDINGS if images + processes * map_bytes(box, each) <= available]
    padding = fit[0] if fit else _PADDINGS[-1]
    if padding < _PADDINGS[0]:
        log.warning("memory does not suffice for transforms padded by 2: they are padded by %g", padding)
    return padding


def map_bytes(box: int, padding: float) -> float:
    """Memory that a process takes for maps: 2.5 sums of all frequencies, of which it was seen to take 2.2."""
    return 2.5 * 16 * (padding * box) ** 2 * (padding * box / 2 + 2)


def half_sets(particles: ParticleSet, seed: int) -> NDArray[np.intp]:
    """Half set (n,) of each particle, 0 or 1: that of the table, or one drawn.

    Raises
    ------
    TableError
        If the table has half sets other than 1 and 2, or too few particles in one.
    """
    if SUBSET not in particles.rows.columns:
        drawn = np.random.default_rng(seed).permutation(np.arange(len(particles)) % 2)
        halves = drawn.astype(np.intp)
    else:
        given = particles.rows[SUBSET].to_numpy()
        wrong = ~np.isin(given, (1, 2))
        if wrong.any():
            raise TableError(
                f"_{SUBSET} is {given[wrong][0]}, not 1 or 2",
                path=particles.path,
                row=int(wrong.argmax()) + 1,
                hint=f"remove the column _{SUBSET}, and half sets are drawn",
            )
        halves = given.astype(np.intp) - 1
    counts = np.bincount(halves, minlength=2)
    if counts.min() < _FEWEST:
        raise TableError(
            f"{counts.min()} particles in half set {int(counts.argmin()) + 1}: at least {_FEWEST} are needed",
            path=particles.path,
            hint=f"remove the column _{SUBSET}, and half sets are drawn"
            if SUBSET in particles.rows.columns
            else "give more particles",
        )
    return halves
