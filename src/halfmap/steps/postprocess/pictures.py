"""The pictures of a post-processing: correlation, Guinier plot, slices of the maps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from halfmap.io.half_maps import HalfMaps
from halfmap.ops.fourier import resample
from halfmap.pictures import (
    INK,
    MARGIN,
    QUIET,
    add_panel,
    add_text,
    draw_correlations,
    dress,
    new_figure,
    save,
)
from halfmap.steps.postprocess.correlate import HALF, THRESHOLD, Curves
from halfmap.steps.postprocess.local import LocalMaps
from halfmap.steps.postprocess.sharpen import Sharpened

if TYPE_CHECKING:
    from halfmap.engine import Context

_TILE, _GAP = 300, 10
_SHOWN = 1.3
"""Side of the slices over the mask's."""


def draw(
    ctx: Context,
    halves: HalfMaps,
    mask: Tensor,
    curves: Curves,
    sharpened: Sharpened,
    maps: LocalMaps | None,
) -> None:
    """Draw all pictures into the job's folder."""
    draw_fsc(ctx.folder / "fsc.png", halves, curves)
    draw_guinier(ctx.folder / "guinier.png", sharpened, curves)
    shown = {"sharpened": sharpened.volume}
    if maps is not None:
        shown |= {
            "locally filtered": maps.filtered,
            "denoised": maps.denoised,
            "locally scaled": maps.scaled,
        }
    draw_slices(ctx.folder / "slices.png", halves, mask, shown)


def draw_fsc(path: Path, halves: HalfMaps, curves: Curves) -> None:
    """Draw the correlations against frequency, with the interval of the resolution."""
    figure = new_figure(680, 440)
    title = f"half maps agree to {curves.resolution:.2f} Å, {curves.interval.fine:.2f} to "
    title += f"{curves.interval.coarse:.2f} Å"
    add_text(figure, MARGIN, 440 - 30, title, size=13, weight="bold")
    detail = f"at a correlation of {THRESHOLD} within the mask; at {HALF} to {curves.resolution_half:.2f} Å"
    add_text(figure, MARGIN, 440 - 50, detail, size=10, color=QUIET)
    axes = add_panel(figure, 62, 62, 680 - 62 - MARGIN, 290)
    draw_correlations(axes, curves.fsc[:4], side=halves.box * halves.pixel_size)
    axes.axhline(THRESHOLD, color=QUIET, lw=0.8, ls="--")
    axes.axvspan(1 / curves.interval.coarse, 1 / curves.interval.fine, color="C0", alpha=0.2, lw=0)
    axes.axvline(1 / curves.resolution, color=QUIET, lw=0.8, ls="--")
    save(figure, path)


def draw_guinier(path: Path, sharpened: Sharpened, curves: Curves) -> None:
    """Draw logarithms of amplitudes against the squared frequency, and the line through them."""
    guinier = sharpened.guinier
    figure = new_figure(680, 440)
    how = "as given" if np.isnan(guinier.error) else f"± {guinier.error:.0f} Å², fitted"
    title = f"B-factor {guinier.b_factor:.0f} Å² {how}".replace("Å² ±", "±")
    add_text(figure, MARGIN, 440 - 30, title, size=13, weight="bold")
    detail = f"map filtered to {sharpened.lowpass:.2f} Å"
    add_text(figure, MARGIN, 440 - 50, detail, size=10, color=QUIET)
    axes = add_panel(figure, 62, 62, 680 - 62 - MARGIN, 290)
    last = 1.5 / curves.resolution**2 if np.isfinite(curves.resolution) else guinier.squared[-1]
    shown = (guinier.squared > 0) & (guinier.squared <= last)
    x = guinier.squared[shown]
    for values, label, (width, colour) in (
        (guinier.original, "mean of the half maps", (1.1, "C0")),
        (guinier.weighted, "weighted by its signal", (1.1, "C1")),
        (guinier.sharpened, "sharpened", (2.0, INK)),
    ):
        axes.plot(x, values[shown], label=label, lw=width, color=colour)
    if np.isfinite(guinier.intercept):
        axes.plot(x, guinier.intercept + guinier.b_factor / 4 * x, label="line", lw=1.0, ls="--", color="C3")
    axes.axvline(1 / curves.resolution**2, color=QUIET, lw=0.8, ls="--")
    axes.set_ylabel("logarithm of the amplitude", fontsize=9, color=INK)
    dress(axes, "squared frequency, 1/Å²")
    axes.legend(fontsize=8, frameon=False)
    save(figure, path)


def draw_slices(path: Path, halves: HalfMaps, mask: Tensor, maps: dict[str, Tensor]) -> None:
    """Draw the central slice along z of the mean and of maps by their names, with the outline of the mask."""
    shown = {"mean of the half maps": halves.mean, **maps}
    box = halves.box
    inside = (mask > 0.5).nonzero()
    reach = int((inside - box // 2).abs().max()) if len(inside) else box // 2
    half = min(box // 2, round(_SHOWN * reach) + 1)
    part = slice(box // 2 - half, box // 2 + half)
    columns = 3 if len(shown) > 2 else 2
    rows = -(-len(shown) // columns)
    width, height = columns * (_TILE + _GAP) - _GAP + 2 * MARGIN, rows * (_TILE + 30) + 50 + MARGIN
    figure = new_figure(width, height)
    add_text(figure, MARGIN, height - 30, "central slices along z", size=13, weight="bold")
    detail = f"{2 * half * halves.pixel_size:.0f} Å wide; the line is the mask"
    add_text(figure, MARGIN, height - 48, detail, size=10, color=QUIET)
    outline = mask[box // 2, part, part].numpy()
    for number, (name, volume) in enumerate(shown.items()):
        left = MARGIN + number % columns * (_TILE + _GAP)
        bottom = height - 58 - (number // columns + 1) * (_TILE + 30) + 26
        axes = add_panel(figure, left, bottom, _TILE, _TILE)
        image = resample(volume[box // 2, part, part], new_shape=(_TILE, _TILE)).numpy()
        low, high = np.percentile(image, (0.5, 99.8))
        extent = (0, 2 * half, 0, 2 * half)
        axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-30), origin="lower", extent=extent)
        middle = np.arange(2 * half) + 0.5
        if outline.min() < 0.5 < outline.max():
            axes.contour(middle, middle, outline, levels=[0.5], colors="tab:orange", linewidths=0.9)
        axes.set_axis_off()
        add_text(figure, left, bottom - 16, name, size=9)
    save(figure, path)
