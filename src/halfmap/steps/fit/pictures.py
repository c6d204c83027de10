"""The pictures of a fit: correlation of map and model, scores along the chains, slices with an outline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from halfmap.pictures import (
    INK,
    MARGIN,
    QUIET,
    add_panel,
    add_text,
    dress,
    new_figure,
    resolution_axis,
    save,
)
from halfmap.steps.fit.compare import HALF, THRESHOLD, Agreement
from halfmap.steps.fit.place import Given, Placed
from halfmap.steps.fit.scores import Scores

if TYPE_CHECKING:
    from halfmap.engine import Context

_TILE, _GAP = 300, 10
_LONGEST, _MOST = 600, 12
"""Residues in a panel, and panels in the picture of scores."""

_ROW, _HIGHER, _FEW, _HEAD = 130, 220, 2, 66
_AVERAGED = 7
"""Residues over which the thick line is averaged."""

_OUTLINE, _SMOOTH_A = 0.25, 1.5
"""Of the density in the model, at which its outline is drawn, and how far that is smoothed before."""

_SHOWN = 1.25
"""Side of the slices over the model's."""


def draw(ctx: Context, given: Given, placed: Placed, agreement: Agreement, scored: Scores) -> None:
    """Draw all pictures into the job's folder."""
    draw_fsc(ctx.folder / "fsc.png", given, agreement)
    draw_residues(ctx.folder / "residues.png", placed, scored)
    draw_slices(ctx.folder / "slices.png", given, placed, agreement)


def draw_fsc(path: Path, given: Given, agreement: Agreement) -> None:
    """Draw the correlation of map and model against frequency."""
    figure = new_figure(680, 440)
    title = f"map and model agree to {agreement.half:.2f} Å"
    add_text(figure, MARGIN, 440 - 30, title, size=13, weight="bold")
    detail = (
        f"at a correlation of {HALF:g} within the mask; at {THRESHOLD:g} to {agreement.threshold:.2f} Å; "
    )
    detail += f"without a mask to {agreement.whole_half:.2f} Å at {HALF:g}"
    add_text(figure, MARGIN, 440 - 50, detail, size=10, color=QUIET)
    axes = add_panel(figure, 62, 62, 680 - 62 - MARGIN, 290)
    frequency = np.arange(len(agreement.masked)) / (max(given.shape) * given.pixel_size)
    axes.plot(frequency, agreement.unmasked.numpy(), label="without a mask", lw=1.1, color="C0")
    axes.plot(frequency, agreement.masked.numpy(), label="within the mask", lw=2.0, color=INK)
    for level in (HALF, THRESHOLD):
        axes.axhline(level, color=QUIET, lw=0.8, ls="--")
    for found in (agreement.half, agreement.threshold):
        if np.isfinite(found):
            axes.axvline(1 / found, color=QUIET, lw=0.8, ls="--")
    if given.resolution is not None:
        label = f"resolution of the map, {given.resolution:.2f} Å"
        axes.axvline(1 / given.resolution, color="C3", lw=1.0, ls=":", label=label)
    axes.set_ylim(min(-0.1, float(agreement.masked.min())), 1.04)
    axes.set_ylabel("correlation", fontsize=9, color=INK)
    resolution_axis(axes, frequency[-1])
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    save(figure, path)


def draw_residues(path: Path, placed: Placed, scored: Scores) -> None:
    """Draw the Q-score of each residue along the chains."""
    panels = _panels(placed, scored)
    left_out = len(panels) - _MOST
    panels = panels[:_MOST]
    row = _HIGHER if len(panels) <= _FEW else _ROW
    height = _HEAD + len(panels) * row + MARGIN
    width = 900
    figure = new_figure(width, height)
    mean = float(np.nanmean(scored.q_atoms))
    title = f"mean Q-score of the atoms {mean:.3f}"
    add_text(figure, MARGIN, height - 30, title, size=13, weight="bold")
    detail = f"of residues, and their mean over {_AVERAGED} along the chain"
    if not np.isnan(scored.expected).all():
        detail += "; dotted: to be expected"
    if scored.fsc_q is not None:
        detail += "; blue: FSC-Q in Å, to the right"
    if left_out > 0:
        detail += f"; {left_out} further parts are in fit.star"
    add_text(figure, MARGIN, height - 48, detail, size=10, color=QUIET)
    fsc_q = None if scored.fsc_q is None else scored.residues.mean(scored.fsc_q.difference)
    for number, (chain, chosen) in enumerate(panels):
        bottom = height - _HEAD - (number + 1) * row + 30
        axes = add_panel(figure, 66, bottom, width - 66 - MARGIN - 36, row - 36)
        _draw_chain(axes, placed, scored, chosen, fsc_q)
        last = number == len(panels) - 1
        dress(axes, "number of the residue" if last else "")
        axes.set_ylabel(f"chain {chain}", fontsize=9, color=INK)
    save(figure, path)


def _panels(placed: Placed, scored: Scores) -> list[tuple[str, NDArray[np.int64]]]:
    """Residues (r,) of protein and nucleic acid by chain, long chains in parts; all, if there are none."""
    first = scored.residues.first
    chains = placed.model.chains[first]
    polymer = np.isin(scored.residues.kinds, ("protein", "nucleic"))
    polymer |= not polymer.any()
    panels = []
    for chain in dict.fromkeys(chains[polymer].tolist()):
        whole = np.flatnonzero((chains == chain) & polymer)
        whole = whole[np.argsort(placed.model.residue_numbers[first][whole], kind="stable")]
        parts = -(-len(whole) // _LONGEST)
        panels += [(chain, part) for part in np.array_split(whole, parts)]
    return panels


def _draw_chain(
    axes: Axes,
    placed: Placed,
    scored: Scores,
    chosen: NDArray[np.int64],
    fsc_q: NDArray[np.float64] | None,
) -> None:
    numbers = placed.model.residue_numbers[scored.residues.first][chosen]
    q = scored.q_residues[chosen]
    # A gap in the numbers is a gap in the line.
    breaks = np.flatnonzero(np.diff(numbers) > 1) + 1
    for part in np.split(np.arange(len(chosen)), breaks):
        axes.plot(numbers[part], q[part], color="C1", lw=0.8, alpha=0.7)
        axes.plot(numbers[part], _smooth(q[part]), color=INK, lw=1.6)
    axes.plot(numbers, scored.expected[chosen], color=QUIET, lw=1.0, ls=":")
    low = np.nanmin(q) if not np.isnan(q).all() else 0.0
    axes.set_ylim(min(0.0, float(low)), 1.0)
    axes.set_xlim(numbers[0] - 1, numbers[-1] + 1)
    if fsc_q is not None:
        other = axes.twinx()
        for part in np.split(np.arange(len(chosen)), breaks):
            other.plot(numbers[part], fsc_q[chosen][part], color="C0", lw=0.8)
        other.axhline(0.0, color="C0", lw=0.5, ls="--")
        reach = max(1.0, float(np.nanquantile(np.abs(fsc_q), 0.98)))
        other.set_ylim(-reach, reach)
        other.tick_params(labelsize=8, colors="C0")
        other.spines[["top"]].set_visible(False)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over neighbours, over fewer at the ends."""
    known = ~np.isnan(values)
    window = np.ones(_AVERAGED)
    total = np.convolve(np.where(known, values, 0.0), window)
    count = np.convolve(known.astype(float), window)
    part = slice(_AVERAGED // 2, _AVERAGED // 2 + len(values))
    return np.where(count[part] > 0, total[part] / np.maximum(count[part], 1), np.nan)


def draw_slices(path: Path, given: Given, placed: Placed, agreement: Agreement) -> None:
    """Draw slices through the model's centre across z, y and x, with the outline of the model's map."""
    voxels = given.voxels(placed.model.positions)
    limits = np.array(given.shape[::-1]) - 1
    middle = np.clip(np.rint(voxels.mean(0)), 0, limits).astype(int)
    reach = int(np.ceil(_SHOWN * np.abs(voxels - middle).max())) + 2
    width, height = 3 * (_TILE + _GAP) - _GAP + 2 * MARGIN, _TILE + 30 + 58 + MARGIN
    figure = new_figure(width, height)
    add_text(figure, MARGIN, height - 30, "slices through the model's centre", size=13, weight="bold")
    detail = f"{(2 * reach + 1) * given.pixel_size:.0f} Å wide, across z, y and x; orange: the model"
    add_text(figure, MARGIN, height - 48, detail, size=10, color=QUIET)
    for column, axis in enumerate(("z", "y", "x")):
        at = middle["xyz".index(axis)]
        left = MARGIN + column * (_TILE + _GAP)
        axes = add_panel(figure, left, MARGIN + 22, _TILE, _TILE)
        sigma = _SMOOTH_A / given.pixel_size
        _draw_slice(axes, given.volume, agreement.simulated, middle, axis, reach, sigma)
        add_text(figure, left, MARGIN + 2, f"{axis} = {at}", size=9)
    save(figure, path)


def _draw_slice(
    axes: Axes,
    volume: Tensor,
    model: Tensor,
    middle: NDArray[np.int64],
    axis: str,
    reach: int,
    sigma: float,
) -> None:
    parts = []
    for each in (volume, model):
        part = each.select("zyx".index(axis), int(middle["xyz".index(axis)])).numpy()
        down, across = (name for name in "zyx" if name != axis)
        parts.append(_window(part, middle["xyz".index(down)], middle["xyz".index(across)], reach))
    image, outline = parts
    low, high = np.nanpercentile(image, (0.5, 99.8))
    how: dict[str, Any] = {"origin": "lower", "interpolation": "bilinear"}
    axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-30), **how)
    outline = gaussian_filter(np.nan_to_num(outline), sigma)
    level = _OUTLINE * float(np.percentile(outline, 99))
    if outline.min() < level < outline.max():
        axes.contour(outline, levels=[level], colors="tab:orange", linewidths=0.9)
    axes.set_axis_off()


def _window(part: NDArray[np.float32], row: int, column: int, reach: int) -> NDArray[np.float32]:
    """Square about a place of a slice, not a number outside of it."""
    side = 2 * reach + 1
    found = np.full((side, side), np.nan, np.float32)
    height, width = part.shape
    top, left = row - reach, column - reach
    rows, columns = slice(max(0, top), min(height, top + side)), slice(max(0, left), min(width, left + side))
    found[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = part[
        rows, columns
    ]
    return found
