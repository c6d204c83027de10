"""Read what a search for symmetry needs, run it, and write its results."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import polars as pl
import torch
from torch import Tensor

from halfmap.errors import HalfmapError, ParameterError, ShapeError
from halfmap.io.mrc import write_mrc
from halfmap.io.star import write_star
from halfmap.io.volumes import MapFile, read_volume
from halfmap.log import log
from halfmap.ops.rotations import angular_distance, to_euler
from halfmap.ops.symmetry import operators, order, symmetrise_volume
from halfmap.search.symmetry_search import (
    GROUPS,
    FoundSymmetry,
    GroupScore,
    find_symmetry,
    to_standard_setting,
)

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.symmetry.step import SymmetryStep

NEARLY = 0.7
"""Share of what the noise leaves from which on a group is called nearly there."""

_TOO_ALIKE = 1.05
"""Share of what the noise leaves above that of maps that were not averaged: 0.98 to 1.04 if simulated."""

_ALIKE, _NOISY = 0.995, 0.98
"""Correlation that only averaging gives to a map whose noise leaves less than the latter."""

_SAME = 5.0
"""Degrees by which rotations of two groups may differ and be the same; those of other folds are 13 apart."""


def read(step: SymmetryStep, ctx: Context) -> tuple[MapFile, tuple[Tensor, Tensor] | None]:
    """Read the map, and its half maps where there are any.

    Raises
    ------
    ShapeError
        If the map is not a cube, or the half maps have not its box and voxels.
    """
    volume = read_volume(ctx.resolve(step.map), pixel_size=step.pixel_size, cubic=True)
    if step.half1 is None or step.half2 is None:
        return volume, None
    halves = []
    for path in (step.half1, step.half2):
        half = read_volume(ctx.resolve(path), pixel_size=step.pixel_size, cubic=True)
        same = abs(half.pixel_size - volume.pixel_size) <= 1e-3 * volume.pixel_size
        if half.array.shape != volume.array.shape or not same:
            mine, its = (f"{v.array.shape[0]}³ voxels of {v.pixel_size:g} Å" for v in (half, volume))
            hint = "give the half maps of this map"
            raise ShapeError(f"has {mine}, but {volume.path} {its}", path=half.path, hint=hint)
        halves.append(torch.from_numpy(half.array))
    return volume, (halves[0], halves[1])


def find(step: SymmetryStep, volume: MapFile, halves: tuple[Tensor, Tensor] | None) -> FoundSymmetry:
    """Search the groups that were asked for.

    Raises
    ------
    ParameterError
        If a group is unknown, or no particle stands out of the noise.
    """
    groups = tuple(name.upper() for name in step.groups) or GROUPS
    for name in groups:
        order(name)
    groups = tuple(dict.fromkeys("I2" if name == "I" else name for name in groups if name != "C1"))
    if not groups:
        raise ParameterError("there is nothing to compare with C1 alone", hint="give other --groups")
    try:
        return find_symmetry(
            torch.from_numpy(volume.array),
            pixel_size=volume.pixel_size,
            diameter=step.diameter,
            resolution=step.resolution,
            groups=groups,
            halves=halves,
            least_share=step.least_share,
            null_maps=step.null_maps,
            seed=step.seed,
        )
    except HalfmapError as error:
        raise type(error)(error.message, path=volume.path, hint=error.hint) from None


def turn(found: FoundSymmetry, volume: MapFile, *, symmetrise: bool) -> Tensor:
    """The map in the standard setting of its group, averaged over it if wanted."""
    turned = to_standard_setting(torch.from_numpy(volume.array), found.best)
    if symmetrise and found.best.group != "C1":
        turned = symmetrise_volume(turned, found.best.group)
    return turned


def write(ctx: Context, found: FoundSymmetry, volume: MapFile, turned: Tensor, *, least_share: float) -> None:
    """Write map and scores, and say what was found."""
    write_mrc(ctx.folder / "map.mrc", turned.numpy(), pixel_size=volume.pixel_size, stack=False)
    rows = [_row(found, score, volume.pixel_size, least_share) for score in found.scores]
    general = {
        "rlnSymmetryGroup": found.best.group,
        "hmSignalCorrelation": found.signal,
        "rlnParticleDiameter": 2 * found.band.radius,
        "hmComparedResolution": found.band.resolution,
    }
    write_star(
        ctx.folder / "symmetry.star", {"symmetry_general": general, "symmetry_groups": pl.DataFrame(rows)}
    )
    _say(found, least_share)


def verdict(found: FoundSymmetry, score: GroupScore, least_share: float) -> str:
    """Say whether the map has a group: yes, nearly or no; contained if it is part of the one it has."""
    share = found.share(score)
    if score.group == found.best.group:
        return "yes"
    if not score.refined or share < min(NEARLY, least_share):
        return "no"
    return "contained" if share >= least_share and _holds(found.best, score) else "nearly"


def averaged(found: FoundSymmetry) -> bool:
    """Whether parts of the map are more alike than its noise leaves any: those of a map that was averaged."""
    best = found.best
    if best.group == "C1":
        return False
    alike = best.correlation > _ALIKE and found.signal < _NOISY
    return alike or found.share(best) > _TOO_ALIKE


def _holds(whole: GroupScore, part: GroupScore) -> bool:
    """Whether the operators of one group, about its axes, are among those of another about its own."""
    theirs, own = (
        score.rotation.T.double() @ operators(score.group) @ score.rotation.double()
        for score in (part, whole)
    )
    return bool((angular_distance(theirs[:, None], own).amin(dim=1) < _SAME).all())


def _row(found: FoundSymmetry, score: GroupScore, pixel_size: float, least_share: float) -> dict:
    rot, tilt, psi = to_euler(score.rotation.double()).tolist()
    x, y, z = (score.origin_px * pixel_size).tolist()
    return {
        "rlnSymmetryGroup": score.group,
        "hmVerdict": verdict(found, score, least_share),
        "hmGroupOrder": order(score.group),
        "hmCorrelation": score.correlation,
        "hmWeakestCorrelation": score.weakest,
        "hmShareOfSignal": found.share(score),
        "hmSearchCorrelation": score.search,
        "hmNullCorrelation": score.null_mean,
        "hmNullStd": score.null_std,
        "rlnAngleRot": rot,
        "rlnAngleTilt": tilt,
        "rlnAnglePsi": psi,
        "hmCentreX": x,
        "hmCentreY": y,
        "hmCentreZ": z,
    }


def _say(found: FoundSymmetry, least_share: float) -> None:
    best = found.best
    if best.group == "C1":
        log.info("no symmetry: C1")
    else:
        null = "" if math.isnan(best.null_mean) else f", of random maps {best.null_mean:.2f}"
        log.info(
            "%s: correlation %.2f under its operators, %.2f under the weakest; noise leaves %.2f%s",
            *(best.group, best.correlation, best.weakest, found.signal, null),
        )
    if averaged(found):
        log.warning(
            "the map seems to have been averaged over %s already: its parts are more alike than its noise "
            "would leave them. That proves nothing: give a map without symmetry imposed",
            best.group,
        )
    nearly = [s for s in found.scores if verdict(found, s, least_share) == "nearly"]
    if nearly:
        most = max(nearly, key=lambda score: (order(score.group), score.weakest))
        log.warning(
            "the map nearly has %s, %.2f of what the noise leaves: either it is not quite symmetric, or "
            "there is more noise in the particle than around it, which half maps would tell",
            *(most.group, found.share(most)),
        )
