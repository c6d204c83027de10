"""The maps, the table and the script for ChimeraX of a local resolution."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from halfmap.io.atomic import write_text
from halfmap.io.half_maps import HalfMaps
from halfmap.io.mrc import write_mrc
from halfmap.io.star import write_star
from halfmap.steps.localres.measure import LocalResolution

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.localres.step import LocalResStep

_BINS = 60
"""Of the histogram, evenly apart in frequency."""

_QUANTILES = (0.05, 0.25, 0.75, 0.95)

_SAME = 1e-4
"""Relative difference of resolutions that rounding explains."""

_COLOURS = ("#2c7bb6", "#abd9e9", "#ffffbf", "#fdae61", "#d7191c")
"""From fine to coarse; told apart by those who see no red or green."""


def write(step: LocalResStep, ctx: Context, halves: HalfMaps, found: LocalResolution) -> None:
    """Write the local resolutions, their figures, and the script that colours a map by them."""
    volumes = {
        "local_resolution.mrc": found.correlation,
        "local_resolution_monogenic.mrc": found.monogenic,
        "best_direction.mrc": found.best,
        "worst_direction.mrc": found.worst,
    }
    for name, volume in volumes.items():
        if volume is not None:
            # A surface that leaves the mask must not look as if it were known well, which 0 would.
            array = torch.where(found.masked, volume, found.coarsest).numpy().astype(np.float32)
            where = {"pixel_size": halves.pixel_size, "origin": halves.origin}
            write_mrc(ctx.folder / name, array, stack=False, **where)
    blocks: dict[str, dict[str, str | int | float] | pl.DataFrame] = {
        "general": _general(step, ctx, halves, found),
        "local_resolution": _figures(found),
        "histogram": _histogram(found),
    }
    if found.axes is not None and found.medians is not None:
        directions = {f"hmAxis{name}": found.axes[:, i].numpy() for i, name in enumerate("XYZ")}
        blocks["axes"] = pl.DataFrame(directions | {"hmLocalMedian": found.medians})
    write_star(ctx.folder / "localres.star", blocks)
    write_text(ctx.folder / "colour.cxc", _script(step, ctx, halves, found))


def histogram(found: LocalResolution) -> tuple[NDArray[np.float64], dict[str, NDArray[np.int64]]]:
    """Count voxels within the mask by their resolution.

    Returns
    -------
    edges : array (bins + 1,)
        In Å, from coarse to fine; evenly apart in frequency.
    counts : dict of array (bins,)
        By the column they are written in.
    """
    low, high = 1 / found.coarsest, 1 / found.finest
    frequencies = np.linspace(low, high, _BINS + 1)
    counts = {
        # Rounding must not put the ends outside.
        column: np.histogram((1 / volume[found.inside].double().numpy()).clip(low, high), frequencies)[0]
        for column, volume in (
            ("hmVoxelsCorrelation", found.correlation),
            ("hmVoxelsMonogenic", found.monogenic),
        )
    }
    return 1 / frequencies, counts


def _general(
    step: LocalResStep, ctx: Context, halves: HalfMaps, found: LocalResolution
) -> dict[str, str | int | float]:
    general: dict[str, str | int | float] = {
        "hmLocalThreshold": step.threshold,
        "hmNoiseConfidence": step.confidence,
        "hmLocalFinest": found.finest,
        "hmLocalCoarsest": found.coarsest,
        "rlnPixelSize": halves.pixel_size,
        "rlnUnfilteredMapHalf1": ctx.relative(halves.paths[0]),
        "rlnUnfilteredMapHalf2": ctx.relative(halves.paths[1]),
    }
    if step.mask is not None:
        general["rlnMaskName"] = ctx.relative(ctx.resolve(step.mask))
    return general


def _figures(found: LocalResolution) -> pl.DataFrame:
    rows = []
    for method, volume in (
        ("correlation", found.correlation),
        ("monogenic", found.monogenic),
        ("best direction", found.best),
        ("worst direction", found.worst),
    ):
        if volume is None:
            continue
        values = volume[found.inside].double().numpy()
        row = {"hmLocalMethod": method, "hmLocalMedian": float(np.median(values))}
        for part, value in zip(_QUANTILES, np.quantile(values, _QUANTILES), strict=True):
            row[f"hmLocalQuantile{100 * part:02.0f}"] = float(value)
        row["hmLocalNeverLost"] = float((values <= (1 + _SAME) * found.finest).mean())
        row["hmLocalUnresolved"] = float((values >= (1 - _SAME) * found.coarsest).mean())
        rows.append(row)
    return pl.DataFrame(rows)


def _histogram(found: LocalResolution) -> pl.DataFrame:
    edges, counts = histogram(found)
    return pl.DataFrame({"hmResolutionFrom": edges[1:], "hmResolutionTo": edges[:-1]} | counts)


def _script(step: LocalResStep, ctx: Context, halves: HalfMaps, found: LocalResolution) -> str:
    """Commands of ChimeraX, which goes to the folder of a script before it runs it."""
    shown = halves.paths[0] if step.show is None else ctx.resolve(step.show)
    path = os.path.relpath(shown, ctx.folder)
    low, high = colour_range(found)
    values = np.linspace(low, high, len(_COLOURS))
    palette = ":".join(f"{value:.3f},{colour}" for value, colour in zip(values, _COLOURS, strict=True))
    return "\n".join(
        (
            "# Open in ChimeraX without other models: a map, coloured by its local resolution in Å.",
            f'open "{path}" id 1',
            'open "local_resolution.mrc" id 2',
            "volume #2 hide",
            "volume #1 style surface step 1",
            f"color sample #1 map #2 palette {palette} key true",
            "",
        )
    )


def colour_range(found: LocalResolution) -> tuple[float, float]:
    """Resolutions in Å from the first to the last colour: the middle 90 % by the correlation."""
    low, high = np.quantile(found.correlation[found.inside].numpy(), (0.05, 0.95))
    return float(low), float(max(high, 1.01 * low))
