"""Read maps and poses, tell their hand, and write them in the right one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl
import torch
from torch import Tensor

from halfmap.data import ParticleSet
from halfmap.errors import TableError
from halfmap.io.half_maps import HalfMaps
from halfmap.io.mrc import write_mrc
from halfmap.io.star import write_star
from halfmap.io.tables import read_particles, write_particles
from halfmap.log import log
from halfmap.ops import symmetry
from halfmap.ops.fsc import corrected_fsc, resolution
from halfmap.search.hand import Hand, draw_hand, tell_hand
from halfmap.search.volume_alignment import inverted

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.hand.step import HandStep

_PSI = "rlnAnglePsi"
_IN_PLANE = _PSI, "rlnAnglePsiPrior"
_DRAWS = 5
"""Times that random phases are drawn."""


@dataclass(frozen=True, eq=False)
class Given:
    """What has a hand: half maps and their mask, and the particles with their poses, if they are given."""

    halves: HalfMaps
    mask: Tensor
    particles: ParticleSet | None


def read(step: HandStep, ctx: Context) -> Given:
    """Read half maps, mask and particles.

    Raises
    ------
    FileFormatError, ShapeError, TableError, ParameterError
        If one of them cannot be used.
    """
    _ = symmetry.order(step.symmetry)
    particles = None
    if step.particles is not None:
        path = ctx.resolve(step.particles)
        particles = read_particles(path)
        if _PSI not in particles.rows.columns:
            raise TableError(
                f"the particles have no poses (column _{_PSI})", path=path, hint="give those of a refinement"
            )
    return Given(*step.read(ctx), particles)


def tell(step: HandStep, given: Given) -> Hand:
    """Tell the hand of the map by its helices, and say it."""
    halves = given.halves
    generator = torch.Generator().manual_seed(step.seed)
    curves = corrected_fsc(halves.first, halves.second, mask=given.mask, draws=_DRAWS, generator=generator)
    known = torch.arange(len(curves.corrected)) <= halves.last_shell
    fsc = torch.where(known, curves.corrected, 0.0)
    reached = resolution(fsc, pixel_size=halves.pixel_size, box=halves.box)
    hand = tell_hand(halves, given.mask, fsc=fsc, resolution=reached, group=step.symmetry)
    log.info("%s", hand.sentence)
    return hand


def write(step: HandStep, ctx: Context, given: Given, hand: Hand) -> None:
    """Write maps, mask and particles, mirrored if that is asked for or the helices are left-handed."""
    mirrored = step.mirror == "always" or hand.verdict == "left"
    what = "maps" if given.particles is None else "maps and poses"
    log.info("%s are %s", what, "mirrored" if mirrored else "left as they are")
    halves = given.halves
    for name, volume in (
        ("map", halves.mean),
        ("half1", halves.first),
        ("half2", halves.second),
        ("mask", given.mask),
    ):
        values = (inverted(volume) if mirrored else volume).numpy()
        path = ctx.folder / f"{name}.mrc"
        write_mrc(path, values, pixel_size=halves.pixel_size, origin=halves.origin, stack=False)
    if given.particles is not None:
        particles = mirrored_poses(given.particles) if mirrored else given.particles
        write_particles(ctx.folder / "particles.star", particles)
    general = {"hmMirrored": int(mirrored), "hmHand": hand.verdict, "rlnEstimatedResolution": hand.resolution}
    found = hand.helices
    if found is not None:
        right = int((found.right > found.left).sum())
        general |= {"hmHelixPlaces": len(found.right), "hmRightHanded": right}
    write_star(ctx.folder / "hand.star", {"hand": general})
    if hand.places is not None and len(hand.places.right):
        draw_hand(ctx.folder / "hand.png", hand.places)


def mirrored_poses(particles: ParticleSet) -> ParticleSet:
    """Poses in which the map of the other hand gives the same projections.

    What is inverted through the origin gives the projection that it gave before turned by 180° in the plane.
    """
    columns = [name for name in _IN_PLANE if name in particles.rows.columns]
    turned = [((pl.col(name) + 360.0) % 360.0 - 180.0).alias(name) for name in columns]
    return particles.with_columns(*turned)
