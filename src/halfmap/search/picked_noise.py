"""Particle images and twins of noise, aligned to the template that particles were picked with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from halfmap.data import ParticleSet
from halfmap.errors import FileFormatError, ParameterError
from halfmap.io.mrc import read_header, read_mrc
from halfmap.io.volumes import read_volume
from halfmap.ops.fourier import resample
from halfmap.ops.masks import soft_circle
from halfmap.ops.rotations import healpix_grid, view_direction
from halfmap.ops.symmetry import in_asymmetric_unit, order
from halfmap.search.particles import ParticleImages
from halfmap.search.polar import PolarGrid
from halfmap.search.prepared import on_rings
from halfmap.search.projector import SplineVolume, polar_references
from halfmap.search.source import phase_flipped
from halfmap.search.template_bias import (
    Common,
    Matches,
    aligned,
    averages,
    best_matches,
    common_signal,
    correlation,
    random_phases,
    turned_back,
)

_BATCH = 200

_FINER = 2.0
"""Finest frequency that images are compared with each other by, over the template's."""

_REACH, _WIDEST, _EDGE = 1.1, 0.92, 0.1
"""Diameter of what is compared over the particle's, and over the box at most; soft edge over its radius."""

_RANGE = 0.15
"""Farthest shift over the diameter."""

_MORE_VIEWS = 4
"""Order of a point group from which on so few views are left that they are taken closer."""


@dataclass(frozen=True, eq=False)
class Plan:
    """On which rings images are compared.

    Attributes
    ----------
    grid : PolarGrid
        To the finest detail that images are compared with each other by.
    side, reach : float
        Of the box, and from its centre to the edge of what is compared, Å.
    radius : int
        Outermost ring that images are compared with templates by.
    first : int
        Ring from which on they are compared with each other alone.
    """

    grid: PolarGrid
    side: float
    reach: float
    radius: int
    first: int

    @property
    def pixel_size(self) -> float:
        """Of the grid's box, Å."""
        return self.side / self.grid.box

    def detail(self, ring: int) -> float:
        """Resolution in Å of a ring."""
        return self.side / ring


@dataclass(frozen=True, eq=False)
class Aligned:
    """Images that were aligned to templates.

    Attributes
    ----------
    matches : Matches
    means : Tensor (k, rings, angles / 2)
        Of the images of each template, divided by the noise.
    seen : Tensor (k, rings, angles / 2)
        What these means would be if all images were the templates.
    likeness : float
        Correlation of both.
    common : Common
        What images share beyond the detail that templates were compared by.
    """

    matches: Matches
    means: Tensor
    seen: Tensor
    likeness: float
    common: Common


@dataclass(frozen=True, eq=False)
class Compared:
    """What was found of particles, and of their twins of noise."""

    plan: Plan
    templates: Tensor
    particles: Aligned
    noise: Aligned


def compare(
    particles: ParticleSet,
    template: Path,
    *,
    project: Path,
    diameter: float,
    detail: float,
    group: str = "C1",
    most: int = 1000,
    seed: int = 0,
) -> Compared:
    """Align a sample of images, and their twins of noise, to templates.

    Parameters
    ----------
    particles : ParticleSet
        With images.
    template : path
        Map or stack of images.
    project : path
        Folder that names of stacks are relative to.
    diameter : float
        Of the particle, Å.
    detail : float
        Finest that is compared with the template, Å; half of that is looked at besides.
    group : str
        Point group of the map.
    most : int
        Particles that are taken at most.
    seed : int
        Of the sample and of the noise.

    Raises
    ------
    TableError, FileFormatError, ShapeError, ParameterError
        If images or template cannot be used.
    """
    images = ParticleImages(particles, project, memory=0)
    plan = plan_rings(particles, images, diameter=diameter, detail=detail)
    templates = read_templates(template, plan, group=group)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(particles), generator=generator)[:most].sort().values
    both = _sampled(particles, images, chosen, plan, generator)
    range_px = _RANGE * diameter / plan.pixel_size
    one, two = (_align(*kept, templates, plan, range_px, generator) for kept in both)
    return Compared(plan, templates, one, two)


def plan_rings(particles: ParticleSet, images: ParticleImages, *, diameter: float, detail: float) -> Plan:
    """Choose rings for images of a size.

    Raises
    ------
    ParameterError
        If they do not hold finer detail than the template's.
    """
    side = images.box * images.pixel_size
    outer = int(min(side * _FINER / detail, images.box / 2 - 1))
    radius = min(round(side / detail), int(outer / _FINER))
    # A mask smears what is known of a ring over those beside it.
    first = radius + 1 + math.ceil(side / diameter)
    if radius < 2 or first >= outer:
        raise ParameterError(
            f"images of {images.box} px of {images.pixel_size:g} Å hold no detail finer than {detail:g} Å",
            path=particles.path,
            hint="extract the particles with smaller pixels",
        )
    box = min(images.box, 2 * (outer + 3))
    reach = min(_REACH * diameter, _WIDEST * side) / 2
    grid = PolarGrid(box, outer, min(box / 2, reach * box / side + 1))
    return Plan(grid, side, reach, radius, first)


def read_templates(path: Path, plan: Plan, *, group: str) -> Tensor:
    """Templates on the rings of a plan: projections of a map, or images and their mirror images.

    Raises
    ------
    FileFormatError, ShapeError
        If the file holds neither a map nor square images with a pixel size.
    """
    header = read_header(path)
    depth, height, width = header.shape
    if ".mrcs" not in path.suffixes and depth == height == width:
        volume = read_volume(path, cubic=True)
        resized = _resized(torch.from_numpy(volume.array), volume.pixel_size, plan)
        return polar_references(SplineVolume.of(resized), _views(group), plan.grid)
    if height != width or header.pixel_size is None:
        message = (
            f"holds neither a map nor square images that state a pixel size: {width} × {height} × {depth}"
        )
        raise FileFormatError(message, path=path, hint="give the template that particles were picked with")
    stack = torch.from_numpy(read_mrc(path).astype(np.float32))
    resized = _resized(stack, header.pixel_size, plan)
    origin = plan.grid.box % 2 == 0
    mirrored = resized.flip(-1).roll(int(origin), -1)
    return plan.grid.sample(torch.cat([resized, mirrored]) * _circle(plan.grid.box, plan))


def _views(group: str) -> Tensor:
    """Rotations of evenly spread views, one of each that a point group makes alike."""
    rotations = healpix_grid(2 if order(group) >= _MORE_VIEWS else 1, psi_step=360.0)
    return rotations[in_asymmetric_unit(view_direction(rotations), group)]


def _resized(images: Tensor, pixel_size: float, plan: Plan) -> Tensor:
    """Images or a volume (..., n, n), cut or padded to a plan's side, in its pixels."""
    n, axes = images.shape[-1], 3 if len(set(images.shape)) == 1 else 2
    wanted = 2 * round(plan.side / pixel_size / 2)
    before = wanted // 2 - n // 2
    cut = pad(images, (before, wanted - n - before) * axes)
    return resample(cut, new_shape=(plan.grid.box,) * axes)


def _circle(box: int, plan: Plan) -> Tensor:
    edge = _EDGE * plan.reach
    return soft_circle((box, box), radius=plan.reach - edge, edge=edge, pixel_size=plan.side / box)


def _sampled(
    particles: ParticleSet, images: ParticleImages, chosen: Tensor, plan: Plan, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Samples and CTFs on rings of some images, and of their twins with random phases."""
    mask = _circle(images.box, plan)
    ctf, flipped = particles.ctf[chosen], torch.from_numpy(phase_flipped(particles))[chosen]
    both: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for start in range(0, len(chosen), _BATCH):
        part = slice(start, start + _BATCH)
        read = images.read(chosen[part].numpy())
        for kept, each in zip(both, (read, random_phases(read, generator=generator)), strict=True):
            level = (each * mask).sum((1, 2), keepdim=True) / mask.sum()
            rings = ctf[part], plan.grid, plan.pixel_size
            kept.append(on_rings(each - level, mask, *rings, phase_flipped=flipped[part]))
    return [(torch.cat([one for one, _ in kept]), torch.cat([two for _, two in kept])) for kept in both]


def _align(
    samples: Tensor,
    ctf: Tensor,
    templates: Tensor,
    plan: Plan,
    range_px: float,
    generator: torch.Generator,
) -> Aligned:
    noise = samples.abs().square().mean((0, 2)).clamp_min(1e-30)
    matches = best_matches(samples, ctf, noise, templates, plan.grid, radius=plan.radius, range_px=range_px)
    count, deviation = len(templates), noise.sqrt()[:, None]
    white = aligned(samples * ctf / deviation, matches, plan.grid)
    means = averages(white, matches.template, count)
    seen = templates * averages(turned_back(ctf.square() / deviation, matches.angle), matches.template, count)
    common = common_signal(
        white, matches.template, plan.grid, first=plan.first, last=plan.grid.radius, generator=generator
    )
    return Aligned(matches, means, seen, correlation(means, seen, plan.grid, radius=plan.radius), common)
