"""The pictures of a comparison: the correlation of both maps, and slices of what they share and do not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from torch import Tensor

from halfmap.pictures import (
    INK,
    MARGIN,
    QUIET,
    add_panel,
    add_text,
    new_figure,
    resolution_axis,
    save,
)
from halfmap.steps.compare.difference import HALF, THRESHOLD, Difference
from halfmap.steps.compare.pair import Pair

if TYPE_CHECKING:
    from halfmap.engine import Context

_TILE, _GAP, _BAR = 230, 10, 12
_SHOWN = 1.2
"""Side of the slices over the mask's."""

_RANGE = 8.0
"""Standard deviations at which the colours of a difference end, at least."""


def draw(ctx: Context, pair: Pair, found: Difference) -> None:
    """Draw all pictures into the job's folder."""
    draw_fsc(ctx.folder / "fsc.png", pair, found)
    draw_slices(ctx.folder / "slices.png", pair, found)


def draw_fsc(path: Path, pair: Pair, found: Difference) -> None:
    """Draw the correlation of both maps against frequency."""
    figure = new_figure(680, 440)
    title = f"maps agree to {_told(found.resolution)} at 0.143, to {_told(found.resolution_half)} at 0.5"
    add_text(figure, MARGIN, 440 - 30, title, size=13, weight="bold")
    detail = f"{pair.paths[0].name} and {pair.paths[1].name}, within the mask"
    add_text(figure, MARGIN, 440 - 50, detail, size=10, color=QUIET)
    axes = add_panel(figure, 62, 62, 680 - 62 - MARGIN, 290)
    curves = found.fsc
    frequency = np.arange(len(curves.masked)) / pair.side
    for curve, label, (width, line, colour) in (
        (curves.unmasked, "without a mask", (1.1, "-", "C0")),
        (curves.masked, "masked", (1.1, "-", "C1")),
        (curves.randomised, "masked, random phases", (1.1, ":", "C1")),
        (curves.corrected, "corrected", (2.0, "-", INK)),
    ):
        axes.plot(frequency, curve.numpy(), label=label, lw=width, ls=line, color=colour)
    for level in (THRESHOLD, HALF):
        axes.axhline(level, color=QUIET, lw=0.8, ls="--")
    for resolution in (found.resolution, found.resolution_half):
        axes.axvline(1 / resolution, color=QUIET, lw=0.8, ls="--")
    axes.set_ylim(-0.2, 1.04)
    resolution_axis(axes, frequency[-1])
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    save(figure, path)


def draw_slices(path: Path, pair: Pair, found: Difference) -> None:
    """Draw central slices across z, y and x: both maps, their local correlation, and the difference."""
    low, high = np.percentile(found.first[pair.inside].numpy(), (1, 99.8))
    grey = {"cmap": "gray", "norm": Normalize(min(low, 0.0), max(high, low + 1e-30))}
    far = max(_RANGE, float(np.percentile(found.sigmas[pair.inside].abs().numpy(), 99.5)))
    columns: list[tuple[str, Tensor, dict[str, Any], bool]] = [
        (f"first, to {found.finest:.3g} Å", found.first, grey, False),
        ("second, amplitudes of the first", found.scaled, grey, False),
        (f"correlation within {found.window:.3g} Å", found.local, _colours("viridis", -0.2, 1), True),
        ("first less second, std. dev.", found.sigmas, _colours("RdBu_r", -far, far), False),
    ]
    half = _half(pair)
    width = 4 * (_TILE + _GAP) + 2 * (_BAR + 42) + 2 * MARGIN
    height = 3 * (_TILE + _GAP) + 92 + MARGIN
    figure = new_figure(width, height)
    add_text(figure, MARGIN, height - 30, "central slices across z, y and x", size=13, weight="bold")
    detail = f"{2 * half * pair.pixel_size:.0f} Å wide; the line is the mask"
    add_text(figure, MARGIN, height - 48, detail, size=10, color=QUIET)
    left = MARGIN
    for name, volume, colours, masked in columns:
        add_text(figure, left, height - 78, name, size=9)
        for axis in range(3):
            bottom = height - 84 - (axis + 1) * (_TILE + _GAP) + _GAP
            axes = add_panel(figure, left, bottom, _TILE, _TILE)
            values, inside = (_slice(each, axis, half).numpy() for each in (volume, pair.mask))
            shown = np.where(inside > 0, values, np.nan) if masked else values
            extent = (0, 2 * half, 0, 2 * half)
            axes.imshow(shown, **colours, origin="lower", extent=extent, interpolation="bilinear")
            middle = np.arange(2 * half) + 0.5
            if not masked and inside.min() < 0.5 < inside.max():
                axes.contour(middle, middle, inside, levels=[0.5], colors="tab:orange", linewidths=0.7)
            axes.set_axis_off()
        left += _TILE + _GAP
        if colours is not grey:
            bottom = height - 84 - 3 * (_TILE + _GAP) + _GAP
            bar = add_panel(figure, left - 4, bottom, _BAR, _TILE)
            figure.colorbar(ScalarMappable(**colours), cax=bar).ax.tick_params(labelsize=8)
            left += _BAR + 42
    save(figure, path)


def _colours(name: str, low: float, high: float) -> dict[str, Any]:
    return {"cmap": name, "norm": Normalize(low, high)}


def _told(resolution: float) -> str:
    return f"{resolution:.2f} Å" if np.isfinite(resolution) else "no resolution"


def _half(pair: Pair) -> int:
    """Half the side of what is drawn, in voxels."""
    reach = int((pair.inside.nonzero() - pair.box // 2).abs().max())
    return min(pair.box // 2, round(_SHOWN * reach) + 1)


def _slice(volume: Tensor, axis: int, half: int) -> Tensor:
    """Central part (2 half, 2 half) of the central slice across an axis of the array."""
    middle = len(volume) // 2
    part = slice(middle - half, middle + half)
    return volume.select(axis, middle)[part, part]
