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
from halfmap.errors import ParameterError
from halfmap.log import log
from halfmap.ops import symmetry
from halfmap.ops.masks import soft_circle, soft_sphere
from halfmap.search.disc import FourierDisc
from halfmap.search.folds import SUBSET, dealt, half_sets
from halfmap.search.lens_noise import leakage
from halfmap.search.padding import affordable_padding, map_bytes
from halfmap.search.particles import ParticleImages
from halfmap.search.prepared import refuse_stretched
from halfmap.search.reference import read_mask
from halfmap.search.regularise import Regulariser
from halfmap.search.regularise.named import Named, Settings, find
from halfmap.search.source import (
    MICROGRAPH,
    Source,
    farthest_shift,
    image_memory,
    mask_diameter,
    numbered,
    phase_flipped,
    refuse_denoised,
)
from halfmap.steps.refine.extent import Extent
from halfmap.steps.refine.given import GivenPoses, given_poses
from halfmap.steps.refine.searched import Searched, make_searched

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.refine.step import RefineStep

_SHIFTS = 1 / 8
"""Farthest shift over the diameter."""

_EDGE_A = 8.0
_EDGE_PX = 3.0
"""Width of the soft edges of masks, of maps and of images."""

_MARGIN, _MORE = 1.25, 6
"""Frequencies that are put back over those that were compared: a factor, and rings more."""

PARTS = 4
"""Parts of a half set, each of which is searched by one process and leaves its sums in a file."""

_FIRST_A = 40.0
"""Detail of the reference that is used at first."""

_ACROSS = 3.0
"""Such details across an asymmetric unit of T, O or I on the particle's sphere, at least. What a map of these
groups has of coarser ones is a ball, in which no view differs from another."""

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
    diameter, shift_range, initial_lowpass : float
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
    extent : Extent
        Of this mask, or of the sphere of the particle's diameter.
    given : GivenPoses or None
        Of a local refinement.
    searched : Searched or None
        Other images of the particles, in which poses are searched.
    padding : float
        Of transforms, over the box.
    device : str
    regularisers : pair of Regulariser
        Of the maps that particles are compared with: in all directions, and once poses are nearly sure.
    """

    step: RefineStep
    source: Source
    box: int
    pixel_size: float
    diameter: float
    shift_range: float
    initial_lowpass: float
    groups: NDArray[np.intp]
    micrographs: NDArray[np.intp]
    names: tuple[str, ...]
    halves: NDArray[np.intp]
    flipped: NDArray[np.bool_]
    mask: Path | None
    extent: Extent
    given: GivenPoses | None
    searched: Searched | None
    padding: float
    device: str
    regularisers: tuple[Regulariser, Regulariser] = Named("fsc"), Named("fsc")

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

    def ring(self, resolution_A: float | None) -> int:
        """Ring of a resolution, or without one of the reference's detail that is used at first."""
        resolution_A = self.initial_lowpass if resolution_A is None else resolution_A
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

    def sphere(self, box: int, edge_A: float = _EDGE_A) -> Tensor:
        """Soft mask (box, box, box) of what the particle's diameter encloses."""
        radius = min(self.diameter / 2, self.side / 2 - edge_A)
        pixel_size = self.side / box
        return soft_sphere((box,) * 3, radius=radius, edge=edge_A, pixel_size=pixel_size).to(self.device)

    def parts(self) -> list[tuple[int, NDArray[np.intp]]]:
        """Half set and particles of each part, those of the first half set first."""
        found = []
        for half in (0, 1):
            own = np.flatnonzero(self.halves == half)
            part = dealt(self.micrographs[own], PARTS, np.random.default_rng((self.step.seed, half)))
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
    refuse_denoised(particles)
    refuse_stretched(particles.ctf, particles.path)
    whole = ParticleImages(particles, ctx.project, memory=0)
    side = whole.box * whole.pixel_size
    diameter = mask_diameter(particles, step.diameter, side)
    mask = None if step.mask is None else ctx.resolve(step.mask)
    extent = Extent.of_sphere(diameter) if mask is None else Extent.of_mask(read_mask(mask, side), side)
    given = given_poses(step, particles, extent.centre_A)
    farthest = _SHIFTS * diameter
    if given is not None:
        reach = float(given.shifts_A.norm(dim=1).max()) + 2 * given.shift_A
        farthest = min(max(farthest, reach), (side - diameter) / 2)
    shift_range = farthest_shift(step.shift_range, farthest, side)
    initial_lowpass = first_detail(step, diameter)
    if initial_lowpass < 2 * whole.pixel_size:
        raise ParameterError(
            f"pixels of {whole.pixel_size:.3g} Å hold no detail of {initial_lowpass:.3g} Å",
            hint=f"give an --initial-lowpass of more than {2 * whole.pixel_size:.3g} Å",
        )
    _warn_of_what_is_shared(particles, given, initial_lowpass)
    names, micrographs = numbered(particles, MICROGRAPH)
    padding = affordable_padding(whole.box, step.memory * 1e9, ctx.options)
    each = map_bytes(whole.box, padding)
    memory = image_memory(step.memory * 1e9, ctx.options, each=each, purpose="refinement")
    memory //= 1 if step.searched is None else 2
    plan = Plan(
        step=step,
        source=Source.of(particles.path or ctx.resolve(step.particles), ctx.project, memory),
        box=whole.box,
        pixel_size=whole.pixel_size,
        diameter=diameter,
        shift_range=shift_range,
        initial_lowpass=initial_lowpass,
        groups=numbered(particles, GROUP)[1],
        micrographs=micrographs,
        names=names,
        halves=half_sets(particles, micrographs, seed=step.seed, fewest=_FEWEST),
        flipped=phase_flipped(particles) | step.phase_flipped,
        mask=mask,
        extent=extent,
        given=given,
        searched=make_searched(step, ctx, particles, micrographs, memory),
        padding=padding,
        device=ctx.device,
        regularisers=_regularisers(step, ctx, diameter),
    )
    log.info(
        "%d particles, %d and %d in the half sets, box %d px of %.3g Å; %s, sphere of %.0f Å, "
        "shifts to %.0f Å; reference to %.3g Å",
        *(len(particles), *np.bincount(plan.halves), whole.box, whole.pixel_size, step.symmetry.upper()),
        *(diameter, shift_range, initial_lowpass),
    )
    return plan.source.images, plan


def _regularisers(step: RefineStep, ctx: Context, diameter: float) -> tuple[Regulariser, Regulariser]:
    weights = None if step.weights is None else ctx.resolve(step.weights)
    settings = Settings(ctx.folder, diameter, step.external_program, weights, ctx.device)
    names = step.regulariser_everywhere, step.regulariser
    for name in names:
        find(name, settings)
    return Named(names[0], settings), Named(names[1], settings)


def _warn_of_what_is_shared(particles: ParticleSet, given: GivenPoses | None, initial_lowpass: float) -> None:
    """Say what half maps will agree in because both began with it."""
    if initial_lowpass < _FINE_A:
        log.warning(
            "detail of the reference of %.3g Å is in both half maps from the start: what they agree in is "
            "theirs only where it is finer",
            initial_lowpass,
        )
    if given is not None and SUBSET not in particles.rows.columns:
        log.warning(
            "the table has no half sets (_%s): those drawn now have met in the map that the poses were found "
            "with. What half maps agree in is theirs only where it is finer than %.3g Å (--initial-lowpass), "
            "and only if these poses were found with no finer detail",
            *(SUBSET, initial_lowpass),
        )


def first_detail(step: RefineStep, diameter: float) -> float:
    """Detail of the reference that is used at first, as given or by default, in Å."""
    if step.initial_lowpass is not None:
        return step.initial_lowpass
    if step.symmetry.strip().upper()[0] not in "TOI":
        return _FIRST_A
    width = diameter * math.sqrt(math.pi / symmetry.order(step.symmetry))
    return min(_FIRST_A, width / _ACROSS)
