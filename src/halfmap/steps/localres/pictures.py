"""The pictures of a local resolution: its histogram, and slices coloured by it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from numpy.typing import NDArray
from torch import Tensor

from halfmap.io.half_maps import HalfMaps
from halfmap.ops.fourier import resample
from halfmap.pictures import INK, MARGIN, QUIET, add_panel, add_text, dress, new_figure, save
from halfmap.steps.localres.measure import LocalResolution
from halfmap.steps.localres.tables import colour_range, histogram

if TYPE_CHECKING:
    from halfmap.engine import Context

_TILE, _GAP, _BAR = 260, 10, 14
_SHOWN = 1.2
"""Side of the slices over the mask's."""

_OVER = 0.55
"""Opacity of colours over the grey map."""

_TICKS = (40, 20, 12, 8, 6, 5, 4, 3.5, 3, 2.5, 2, 1.7, 1.5, 1.2, 1)
"""Å."""


def draw(ctx: Context, halves: HalfMaps, mask: Tensor, found: LocalResolution) -> None:
    """Draw all pictures into the job's folder."""
    draw_histogram(ctx.folder / "histogram.png", found)
    draw_slices(ctx.folder / "slices.png", halves, mask, found)


def draw_histogram(path: Path, found: LocalResolution) -> None:
    """Draw how many voxels within the mask have which resolution."""
    edges, counts = histogram(found)
    figure = new_figure(680, 440)
    medians = [float(volume[found.inside].median()) for volume in (found.correlation, found.monogenic)]
    title = f"median {medians[0]:.2f} Å by correlation, {medians[1]:.2f} Å by signal over noise"
    add_text(figure, MARGIN, 440 - 30, title, size=13, weight="bold")
    detail = f"voxels within the mask; the last shell is {found.finest:.2f} Å"
    add_text(figure, MARGIN, 440 - 50, detail, size=10, color=QUIET)
    axes = add_panel(figure, 62, 62, 680 - 62 - MARGIN, 290)
    labels = ("correlation of the half maps", "signal over noise")
    for number, (values, label) in enumerate(zip(counts.values(), labels, strict=True)):
        share = 100 * values / max(int(values.sum()), 1)
        axes.stairs(share, 1 / edges, label=label, color=f"C{number}", fill=True, alpha=0.25)
        axes.stairs(share, 1 / edges, color=f"C{number}", lw=1.3)
        axes.axvline(1 / medians[number], color=f"C{number}", lw=1.0, ls="--")
    ticks = [d for d in _TICKS if found.finest <= d <= found.coarsest]
    axes.set_xticks([1 / d for d in ticks], [f"{d:g}" for d in ticks])
    axes.set_ylabel("voxels, %", fontsize=9, color=INK)
    dress(axes, "local resolution, Å")
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    save(figure, path)


def draw_slices(path: Path, halves: HalfMaps, mask: Tensor, found: LocalResolution) -> None:
    """Draw central slices across z, y and x by both methods, and how much worse the worst direction is."""
    low, high = colour_range(found)
    resolution = {"cmap": "RdYlBu_r", "norm": Normalize(low, high)}
    rows: list[tuple[str, Tensor, dict[str, Any]]] = [
        ("by correlation, Å", found.correlation, resolution),
        ("by signal over noise, Å", found.monogenic, resolution),
    ]
    if found.worst is not None and found.best is not None:
        ratio = found.worst / found.best
        top = max(1.1, float(np.quantile(ratio[found.inside].numpy(), 0.95)))
        rows.append(("worst over best direction", ratio, {"cmap": "viridis", "norm": Normalize(1.0, top)}))
    width = 3 * (_TILE + _GAP) + _BAR + 50 + 2 * MARGIN
    height = len(rows) * (_TILE + 30) + 56 + MARGIN
    figure = new_figure(width, height)
    add_text(figure, MARGIN, height - 30, "local resolution of central slices", size=13, weight="bold")
    half = _half(halves, mask)
    detail = f"{2 * half * halves.pixel_size:.0f} Å wide, across z, y and x; over the mean of the half maps"
    add_text(figure, MARGIN, height - 48, detail, size=10, color=QUIET)
    mean, inside = halves.mean, found.inside
    for row, (name, volume, colours) in enumerate(rows):
        bottom = height - 62 - (row + 1) * (_TILE + 30) + 26
        for axis in range(3):
            axes = add_panel(figure, MARGIN + axis * (_TILE + _GAP), bottom, _TILE, _TILE)
            _grey(axes, _slice(mean, axis, half), half)
            values, shown = (_slice(each, axis, half).numpy() for each in (volume, inside))
            axes.imshow(
                np.where(shown, values, np.nan),
                **colours,
                alpha=_OVER,
                origin="lower",
                extent=(0, 2 * half, 0, 2 * half),
                interpolation="nearest",
            )
            axes.set_axis_off()
        bar = add_panel(figure, MARGIN + 3 * (_TILE + _GAP), bottom, _BAR, _TILE)
        figure.colorbar(ScalarMappable(**colours), cax=bar).ax.tick_params(labelsize=8)
        add_text(figure, MARGIN, bottom - 16, name, size=9)
    save(figure, path)


def _half(halves: HalfMaps, mask: Tensor) -> int:
    """Half the side of what is drawn, in voxels."""
    places = (mask > 0.5).nonzero()
    reach = int((places - halves.box // 2).abs().max()) if len(places) else halves.box // 2
    return min(halves.box // 2, round(_SHOWN * reach) + 1)


def _slice(volume: Tensor, axis: int, half: int) -> Tensor:
    """Central part (2 half, 2 half) of the central slice across an axis of the array."""
    middle = len(volume) // 2
    part = slice(middle - half, middle + half)
    return volume.select(axis, middle)[part, part]


def _grey(axes: Axes, part: Tensor, half: int) -> None:
    image: NDArray[np.float32] = resample(part, new_shape=(_TILE, _TILE)).numpy()
    low, high = np.percentile(image, (0.5, 99.8))
    extent = (0, 2 * half, 0, 2 * half)
    axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-30), origin="lower", extent=extent)
