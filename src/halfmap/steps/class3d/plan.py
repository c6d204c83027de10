"""What is fixed before a classification begins: sizes, folds, parts, memory."""

from __future__ import annotations

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
from halfmap.errors import ParameterError, TableError
from halfmap.log import log
from halfmap.ops import symmetry
from halfmap.ops.fourier import resample
from halfmap.ops.masks import soft_circle, soft_sphere
from halfmap.search.disc import FourierDisc
from halfmap.search.folds import dealt, half_sets, same_images
from halfmap.search.particles import ParticleImages
from halfmap.search.prepared import refuse_stretched
from halfmap.search.reference import read_mask
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

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.class3d.step import Class3DStep

_SHIFTS = 1 / 8
"""Farthest shift over the diameter."""

_EDGE_A, _EDGE_PX = 8.0, 3.0
"""Width of the soft edges of masks, of maps and of images."""

_MARGIN, _MORE = 1.25, 4
"""Frequencies that are put back over those that are compared: a factor, and rings more."""

_FOLDS, _SEARCHED_FOLDS = 4, 8
"""Parts that particles fall in; each is compared with maps of the others alone. Where poses are searched, of
the others of its own half: noise that is aligned to maps of both halves is what these agree in."""

_CLASSES = 4
_FEWEST = 20
"""Particles for each class without which nothing can be said."""

_PART, _DISK_BYTES = 2000, 1e10
"""Particles that are compared by one process, and what all files of sums may take on the disk."""

_SUMS = 14
"""Sums, and what solves them, that the maximisation holds at a time."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Sizes and parts of a classification.

    Attributes
    ----------
    step : Class3DStep
        Parameters.
    classes : int
    source : Source
        Of the images.
    full_box, full_pixel_size : int, float
        Of the images as stored, px and Å.
    box, pixel_size : int, float
        Of the images as they are searched, px and Å.
    finest : int
        Largest ring that is compared.
    diameter, shift_range : float
        Å.
    groups, micrographs : array (n,)
        Optics group and micrograph of each particle, from 0; where there are no micrographs, the former.
    names : tuple of str
        Of the micrographs.
    flipped : array (n,) of bool
        Which images were multiplied by the sign of their CTF.
    folds : array (n,)
        Fold of each particle, from 0. The first half of them are one half of the particles.
    mask, focus : path or None
        Masks that were given.
    device : str
    """

    step: Class3DStep
    classes: int
    source: Source
    full_box: int
    full_pixel_size: float
    box: int
    pixel_size: float
    finest: int
    diameter: float
    shift_range: float
    groups: NDArray[np.intp]
    micrographs: NDArray[np.intp]
    names: tuple[str, ...]
    flipped: NDArray[np.bool_]
    folds: NDArray[np.intp]
    mask: Path | None
    focus: Path | None
    device: str

    @property
    def side(self) -> float:
        """Side of the box in Å."""
        return self.box * self.pixel_size

    @property
    def n_groups(self) -> int:
        """Number of optics groups."""
        return int(self.groups.max()) + 1

    @property
    def n_folds(self) -> int:
        """Number of folds, the same in both halves."""
        return 2 * _folds_of_half(self.step)

    @property
    def halves(self) -> NDArray[np.intp]:
        """Half of the particles (n,) that each is in, 0 or 1."""
        return self.folds // (self.n_folds // 2)

    def others(self, fold: int) -> list[int]:
        """Folds whose maps a fold is compared with."""
        half, apart = self.n_folds // 2, self.step.alignment
        near = [other for other in range(self.n_folds) if not apart or other // half == fold // half]
        return [other for other in near if other != fold]

    @property
    def first_ring(self) -> int:
        """Ring to which the references have detail at first."""
        return max(1, min(self.finest, round(self.side / self.step.initial_lowpass)))

    @property
    def disc(self) -> FourierDisc:
        """Coefficients that are put back."""
        return FourierDisc(self.box, self.box // 2 - 1, self.device)

    @property
    def support_px(self) -> float:
        """Radius of the disc that holds a masked image."""
        return min(self.box / 2, (self.diameter / 2 + self.shift_range) / self.pixel_size + _EDGE_PX)

    def image_mask(self) -> Tensor:
        """Soft mask (box, box) of images: all that a particle may reach."""
        radius = self.support_px - _EDGE_PX
        return soft_circle((self.box, self.box), radius=radius, edge=_EDGE_PX).to(self.device)

    def solvent(self) -> Tensor:
        """Soft mask (box, box, box) of maps: that given, within the sphere of the particle's diameter."""
        radius = min(self.diameter / 2, self.side / 2 - _EDGE_A)
        shape = (self.box,) * 3
        sphere = soft_sphere(shape, radius=radius, edge=_EDGE_A, pixel_size=self.pixel_size)
        return (sphere if self.mask is None else sphere * self._in_box(self.mask)).to(self.device)

    def compared_part(self) -> Tensor:
        """Soft mask (box, box, box) of where classes may differ."""
        solvent = self.solvent()
        return solvent if self.focus is None else solvent * self._in_box(self.focus).to(solvent)

    def parts(self) -> list[tuple[int, NDArray[np.intp]]]:
        """Fold and particles of each part, fold after fold; the same for any number of processes."""
        most = max(self.n_folds, int(_DISK_BYTES // (self.classes * sum_bytes(self.box))))
        each = min(most // self.n_folds, -(-len(self.folds) // (self.n_folds * _PART)))
        found = []
        for fold in range(self.n_folds):
            own = np.flatnonzero(self.folds == fold)
            found += [(fold, part) for part in np.array_split(own, each)]
        return found

    def _in_box(self, path: Path) -> Tensor:
        mask = read_mask(path, self.full_box * self.full_pixel_size)
        return resample(mask, new_shape=(self.box,) * 3).clamp(0, 1).float()


def make_plan(step: Class3DStep, ctx: Context, particles: ParticleSet) -> tuple[ParticleImages, Plan]:
    """Choose sizes and folds, and open the images.

    Raises
    ------
    ParameterError
        If the point group is unknown, the number of references is not that of classes, or diameter, shifts
        or detail do not fit the images.
    TableError
        If the images, or the poses where they are wanted, cannot be used, or there are too few.
    ResourceError
        If memory does not suffice.
    """
    _ = symmetry.order(step.symmetry)
    refuse_stretched(particles.ctf, particles.path)
    refuse_denoised(particles)
    classes = _classes(step, particles)
    whole = ParticleImages(particles, ctx.project, memory=0)
    side = whole.box * whole.pixel_size
    diameter = mask_diameter(particles, step.diameter, side)
    shift_range = farthest_shift(step.shift_range, _SHIFTS * diameter, side)
    if not step.alignment:
        shift_range = min(max(shift_range, float(particles.poses.shifts_A.norm(dim=1).max())), side / 2)
    _refuse_detail(step, whole.pixel_size)
    finest = min(whole.box // 2 - 1, round(side / step.resolution))
    outer = math.ceil(_MARGIN * finest) + _MORE
    box = min(whole.box, 2 * (next_fast_len(outer + 1, real=True) or outer + 1))
    names, micrographs = numbered(particles, MICROGRAPH)
    memory = image_memory(
        step.memory * 1e9,
        ctx.options,
        each=max(_SUMS, 1.5 * classes) * sum_bytes(box),
        purpose="classification",
        hint="give a smaller --memory, fewer --workers, fewer --classes or a coarser --resolution",
    )
    plan = Plan(
        step=step,
        classes=classes,
        source=Source.of(ctx.resolve(step.particles), ctx.project, memory, box),
        full_box=whole.box,
        full_pixel_size=whole.pixel_size,
        box=box,
        pixel_size=side / box,
        finest=finest,
        diameter=diameter,
        shift_range=shift_range,
        groups=numbered(particles, GROUP)[1],
        micrographs=micrographs,
        names=names,
        flipped=phase_flipped(particles) | step.phase_flipped,
        folds=_folds(particles, micrographs, step),
        mask=None if step.mask is None else ctx.resolve(step.mask),
        focus=None if step.focus_mask is None else ctx.resolve(step.focus_mask),
        device=ctx.device,
    )
    log.info(
        "%d particles in boxes of %d px of %.3g Å, compared in %d px of %.3g Å; %d classes, %s, "
        "sphere of %.0f Å; %s",
        *(len(particles), whole.box, whole.pixel_size, box, plan.pixel_size, classes),
        *(step.symmetry.upper(), diameter),
        f"shifts to {shift_range:.0f} Å" if step.alignment else "poses of the table",
    )
    return plan.source.images, plan


def _refuse_detail(step: Class3DStep, pixel_size: float) -> None:
    """Refuse detail that pixels do not hold, or that the reference has more of than is compared."""
    if step.resolution < 2 * pixel_size:
        raise ParameterError(
            f"pixels of {pixel_size:.3g} Å hold no detail of {step.resolution:g} Å",
            hint=f"give a --resolution of more than {2 * pixel_size:.3g} Å",
        )
    if step.resolution > step.initial_lowpass:
        raise ParameterError(
            f"detail of {step.initial_lowpass:g} Å of the reference is finer than --resolution",
            hint=f"give an --initial-lowpass of {step.resolution:g} Å or more",
        )


def sum_bytes(box: int) -> float:
    """Memory of the sums of one class."""
    return 16 * (2 * box) ** 2 * (box + 2)


def _classes(step: Class3DStep, particles: ParticleSet) -> int:
    """Check and give the number of classes."""
    given = len(step.reference)
    classes = step.classes or (given if given > 1 else _CLASSES)
    if given not in (1, classes):
        raise ParameterError(
            f"{given} references for {classes} classes", hint="give one, or one for each class"
        )
    if len(particles) < _FEWEST * classes:
        raise TableError(
            f"{len(particles)} particles: at least {_FEWEST * classes} are needed for {classes} classes",
            path=particles.path,
            hint="give more particles or fewer --classes",
        )
    return classes


def _folds(particles: ParticleSet, micrographs: NDArray[np.intp], step: Class3DStep) -> NDArray[np.intp]:
    """Fold (n,) of each particle, micrograph by micrograph; half sets of the table stay apart."""
    halves = half_sets(particles, micrographs, seed=step.seed, fewest=_FEWEST)
    folds, each, images = np.empty(len(halves), np.intp), _folds_of_half(step), same_images(particles)
    for half in (0, 1):
        own = halves == half
        rng = np.random.default_rng((step.seed, half))
        folds[own] = half * each + dealt(micrographs[own], each, rng, images=images[own])
    return folds


def _folds_of_half(step: Class3DStep) -> int:
    return (_SEARCHED_FOLDS if step.alignment else _FOLDS) // 2
