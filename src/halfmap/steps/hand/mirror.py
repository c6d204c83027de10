"""Read maps and poses, tell their hand, and write them in the right one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import torch
from torch import Tensor

from halfmap.data import ParticleSet
from halfmap.errors import ShapeError
from halfmap.io.half_maps import HalfMaps
from halfmap.io.mrc import write_mrc
from halfmap.io.star import write_star
from halfmap.io.tables import write_particles
from halfmap.io.volumes import read_volume
from halfmap.log import log
from halfmap.ops import symmetry
from halfmap.ops.fsc import resolution
from halfmap.search.half_map_step import refined_particles
from halfmap.search.hand import Hand, draw_hand, tell_hand
from halfmap.search.volume_alignment import inverted

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.hand.step import HandStep

_IN_PLANE = "rlnAnglePsi", "rlnAnglePsiPrior"

_SIDE = 0.02
"""Relative difference of the sides of boxes that a calibration explains."""


@dataclass(frozen=True, eq=False)
class Given:
    """What has a hand: half maps, their mask and their map, and particles with their poses, if given."""

    halves: HalfMaps
    mask: Tensor
    volume: Tensor
    particles: ParticleSet | None


def read(step: HandStep, ctx: Context) -> Given:
    """Read half maps, mask and particles.

    Raises
    ------
    FileFormatError, ShapeError, TableError, ParameterError
        If one of them cannot be used.
    """
    _ = symmetry.order(step.symmetry)
    halves, mask = step.read(ctx)
    particles = None if step.particles is None else _particles(ctx.resolve(step.particles), halves)
    volume = halves.mean if step.map is None else _volume(ctx.resolve(step.map), halves)
    return Given(halves, mask, volume, particles)


def _volume(path: Path, halves: HalfMaps) -> Tensor:
    found = read_volume(path, pixel_size=halves.pixel_size, cubic=True)
    if len(found.array) != halves.box:
        its = f"a box of {len(found.array)} voxels, the half maps of {halves.box}"
        raise ShapeError(f"has {its}", path=path, hint="give the map of these half maps")
    return torch.from_numpy(found.array)


def _particles(path: Path, halves: HalfMaps) -> ParticleSet:
    found = refined_particles(path)
    side = found.box_size * found.pixel_size
    if abs(side - halves.box * halves.pixel_size) > _SIDE * side:
        its = f"boxes of {side:.0f} Å, the half maps of {halves.box * halves.pixel_size:.0f} Å"
        raise ShapeError(f"the particles have {its}", path=path, hint="give those that the maps were made of")
    return found


def tell(step: HandStep, given: Given) -> Hand:
    """Tell the hand of the map by its helices, and say it."""
    halves = given.halves
    fsc = halves.corrected_fsc(given.mask, generator=torch.Generator().manual_seed(step.seed)).corrected
    reached = resolution(fsc, pixel_size=halves.pixel_size, box=halves.box)
    hand = tell_hand(halves, given.mask, fsc=fsc, resolution=reached, group=step.symmetry)
    log.info("%s", hand.sentence)
    return hand


def write(step: HandStep, ctx: Context, given: Given, hand: Hand) -> None:
    """Write maps, mask and particles, mirrored if that is asked for or the helices are left-handed."""
    mirrored = step.mirror == "always" or (step.mirror == "if-left-handed" and hand.verdict == "left")
    if hand.verdict == ("right" if mirrored else "left"):
        log.warning("the hand that the helices tell is not the one asked for: --mirror %s", step.mirror)
    what = "maps" if given.particles is None else "maps and poses"
    log.info("%s are %s", what, "mirrored" if mirrored else "left as they are")
    halves = given.halves
    for name, volume in (
        ("map", given.volume),
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
