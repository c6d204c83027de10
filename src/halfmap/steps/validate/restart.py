"""Whether a map that is made of the particles without any reference is the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from torch import Tensor

from halfmap.io.star import read_star
from halfmap.io.volumes import read_volume
from halfmap.log import log
from halfmap.ops import symmetry
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft3, resample, rfft3
from halfmap.ops.fsc import fsc, resolution
from halfmap.ops.masks import soft_sphere
from halfmap.pictures import MARGIN, QUIET, add_panel, add_text, new_figure, save
from halfmap.search.volume_alignment import Alignment, align_volume
from halfmap.steps.validate import controls
from halfmap.steps.validate.finding import Finding, Given, Light
from halfmap.steps.validate.sample import Sample

if TYPE_CHECKING:
    from halfmap.engine import Context

_THRESHOLD = 0.5

_NONE = 900.0
"""Resolution from which on runs are said not to agree at all."""

_OVER_CHANCE, _HARDLY = 1 / 3, 0.25
"""Correlation over that of chance from which on maps are the same, and under which they are not."""

_ALIKE = 0.9
"""Correlation by chance from which on maps are too coarse for one to be told from another."""

_FINE, _FINER = 10.0, 1.5
"""Resolution that maps which are the same agree to: the diameter over this, or this times the finest."""

_ACROSS = 64
"""Voxels of the maps that are compared."""

_EDGE_A = 8.0
_TILE = 220


def check_restart(ctx: Context, given: Given, sample: Sample) -> Finding:
    """Make a map from random poses, of several runs that agree, and compare it with the one examined."""
    log.info("control: a map without a reference")
    folder = ctx.run_within(
        "abinitio",
        f"{controls.RUNS}/restart",
        particles=ctx.relative(sample.table),
        symmetry=given.step.symmetry,
        diameter=min(given.diameter, 0.95 * given.side),
        shift_range=given.step.shift_range,
        memory=given.step.memory,
        seed=given.step.seed,
    )
    classes = read_star(folder / "model.star")["model_classes"]
    assert isinstance(classes, pl.DataFrame)
    agreement = float(classes["hmRunAgreement"][0])
    anew = torch.from_numpy(read_volume(folder / "class001.mrc", pixel_size=None, cubic=True).array)
    name = "Begun anew without a reference"
    method = (
        "Ab-initio runs from random poses; those that agree are averaged, and this map is turned, mirrored "
        "and moved onto the one examined. Chance is what the best of as many rotations correlates by."
    )
    if agreement > _NONE:
        sentence = (
            "No two runs from random poses agree: these particles do not say by themselves what they look "
            "like; compare refinements from different references (--other)."
        )
        return Finding(name, "amber", sentence, {"runs_agree_A": None}, (), method)
    finest = max(agreement, _FINER * given.resolution)
    # Finer voxels would hold nothing that both maps have.
    small = min(given.halves.box, max(_ACROSS, 2 * round(1.5 * given.side / finest)))
    fixed, moving = (resample(volume, new_shape=(small,) * 3) for volume in (given.halves.mean, anew))
    voxel = given.side / small
    radius = min(given.diameter / 2, given.side / 2 - _EDGE_A)
    mask = soft_sphere((small,) * 3, radius=radius, edge=_EDGE_A, pixel_size=voxel)
    limit = max(given.diameter / _FINE, _FINER * finest)
    # Few coefficients are alike by chance, so that all that both maps hold are compared.
    frequency = max(3, round(given.side / finest))
    found = align_volume(
        moving,
        fixed,
        mask=mask,
        radius_px=radius / voxel,
        frequency=frequency,
        turns=symmetry.equal_settings(given.step.symmetry),
        order=symmetry.order(given.step.symmetry),
    )
    placed = found.apply(moving)
    curve = fsc(placed * mask, fixed * mask)
    common = resolution(curve, pixel_size=voxel, box=small, threshold=_THRESHOLD)
    light, words = _judge(found, common, limit)
    above = f"{found.over_chance:.2f} above chance" if found.over_chance > 0 else "no more than by chance"
    hand = ", in the other hand" if found.mirrored else ""
    at = f"to {common:.0f} Å" if np.isfinite(common) and common < given.side else "at no resolution"
    sentence = (
        f"A map made from random poses without a reference (runs agree to {agreement:.0f} Å) agrees with "
        f"this one {at} at a correlation of {_THRESHOLD}{hand}, {above}: "
        f"{words}."
    )
    path = ctx.folder / "restart.png"
    passed = low_pass(tuple(fixed.shape), pixel_size=voxel, resolution=finest)
    _draw(path, irfft3(rfft3(fixed) * passed, shape=fixed.shape) * mask, placed * mask, voxel)
    values = {
        "runs_agree_A": agreement,
        "agrees_with_map_A": common if np.isfinite(common) else None,
        "correlation": found.correlation,
        "chance": found.chance,
        "over_chance": found.over_chance,
        "mirrored": found.mirrored,
    }
    return Finding(name, light, sentence, values, (path.name,), method)


def _judge(found: Alignment, common: float, limit: float) -> tuple[Light, str]:
    """Whether maps that agree to `common` Å, and would to `limit` if they were the same, are."""
    if common <= limit and found.over_chance >= _OVER_CHANCE:
        return "green", "the map is the particles', not its reference's"
    if found.chance < _ALIKE and (found.over_chance < _HARDLY or common > 2 * limit):
        return "red", "it is another map; refine from the new one, and compare"
    return "amber", "not surely the same map: refine from it, and compare by --other"


def _draw(path: Path, own: Tensor, anew: Tensor, voxel: float) -> None:
    """Draw central slices of both maps."""
    figure = new_figure(3 * _TILE + 2 * 10 + 2 * MARGIN, 2 * (_TILE + 26) + 56)
    height = 2 * (_TILE + 26) + 56
    add_text(figure, MARGIN, height - 28, "central slices", size=13, weight="bold")
    add_text(figure, MARGIN, height - 46, f"{len(own) * voxel:.0f} Å wide", size=10, color=QUIET)
    for line, (name, volume) in enumerate((("the map", own), ("without a reference", anew))):
        slices = torch.stack([volume.select(axis, len(volume) // 2) for axis in range(3)])
        for column, image in enumerate(resample(slices, new_shape=(_TILE, _TILE)).numpy()):
            left, bottom = MARGIN + column * (_TILE + 10), height - 54 - (line + 1) * (_TILE + 26) + 22
            axes = add_panel(figure, left, bottom, _TILE, _TILE)
            low, high = np.percentile(image, (0.5, 99.8))
            axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-30), origin="lower")
            axes.set_axis_off()
            add_text(figure, left, bottom - 16, f"{name}, along {'zyx'[column]}", size=9)
    save(figure, path)
