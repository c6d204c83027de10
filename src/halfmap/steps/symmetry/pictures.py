"""The picture of a search for symmetry: scores of all groups, correlation by resolution, the turned map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from halfmap.pictures import MARGIN, QUIET, add_panel, add_text, new_figure, save
from halfmap.search.symmetry_search import FoundSymmetry, GroupScore, correlation_of_shells
from halfmap.steps.symmetry.search import averaged

_TILE, _GAP, _HEAD, _LABEL, _BARS = 250, 12, 66, 22, 230
_GOOD, _OTHER, _NULL = "#1f77d0", "#b9c4cf", "#e0312f"
_COLOURS = ("#1f77d0", "#ff9500", "#3aa655")


def draw_symmetry(
    path: Path, found: FoundSymmetry, turned: Tensor, pixel_size: float, least_share: float
) -> None:
    """Draw the scores, the shells of the best groups, and projections of the map in its standard setting.

    Parameters
    ----------
    path : path
        PNG file to write.
    found : FoundSymmetry
        Outcome of the search.
    turned : Tensor (n, n, n)
        The map in the standard setting.
    pixel_size : float
        Of the map, Å.
    least_share : float
        Part of what the noise leaves that a group must have.
    """
    width = 4 * _TILE + 3 * _GAP + 2 * MARGIN
    height = _HEAD + _BARS + 30 + 2 * _LABEL + _TILE + 40
    figure = new_figure(width, height)
    title = f"Symmetry: {found.best.group}"
    if averaged(found):
        title += ", but the map seems to have been averaged over it before"
    add_text(figure, MARGIN, height - 32, title, size=13, weight="bold")
    detail = f"compared to {found.band.resolution:.3g} Å in a sphere of {2 * found.band.radius:.0f} Å"
    detail += f"; noise leaves a correlation of {found.signal:.2f} between equal parts"
    add_text(figure, MARGIN, height - 52, detail, color=QUIET)
    bars = add_panel(figure, MARGIN + 40, height - _HEAD - _BARS, width - 2 * MARGIN - 45, _BARS - 10)
    _draw_scores(bars, found, least_share)
    bottom = 46
    shells = add_panel(figure, MARGIN + 40, bottom, _TILE - 30, _TILE)
    _draw_shells(shells, found)
    half = min(turned.shape[0] // 2, round(1.2 * found.band.radius / pixel_size) + 2)
    middle = turned.shape[0] // 2
    inner = slice(max(0, middle - half), middle + half)
    shown = turned[inner, inner, inner].numpy()
    for i, (axis, name) in enumerate(((0, "z"), (1, "y"), (2, "x"))):
        left = MARGIN + (i + 1) * (_TILE + _GAP)
        add_text(figure, left, bottom + _TILE + 3, f"turned map, along {name}", size=8)
        panel = add_panel(figure, left, bottom, _TILE, _TILE)
        panel.imshow(shown.sum(axis), cmap="gray", origin="lower", interpolation="bicubic")
        panel.set_axis_off()
    save(figure, path)


def _draw_scores(axes: Axes, found: FoundSymmetry, least_share: float) -> None:
    names = [score.group for score in found.scores]
    places = np.arange(len(names))
    colours = [_GOOD if name == found.best.group else _OTHER for name in names]
    means = [score.correlation for score in found.scores]
    axes.bar(places, means, color=colours, width=0.7, label="mean over operators")
    weakest = [score.weakest for score in found.scores]
    axes.plot(places, weakest, "_", color="black", ms=11, mew=2, label="weakest operators")
    null = np.array([score.null_mean for score in found.scores])
    if np.isfinite(null).all():
        spread = 2 * np.array([score.null_std for score in found.scores])
        axes.errorbar(
            places, null, spread, fmt=".", color=_NULL, ms=4, lw=1, label="maps of random phases, ±2 σ"
        )
    axes.axhline(found.signal, color=QUIET, lw=1, label="what the noise leaves")
    axes.axhline(least_share * found.signal, color=QUIET, lw=1, ls=":", label="limit for the weakest")
    axes.axhline(0, color="black", lw=0.6)
    axes.set_xticks(places, names, fontsize=8)
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.set_ylim(min(-0.08, *weakest), 1.05)
    axes.set_ylabel("correlation", fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, ncols=5, loc="lower right", bbox_to_anchor=(1, 1.0))


def _draw_shells(axes: Axes, found: FoundSymmetry) -> None:
    """Correlation by frequency of the best group, or of the best ones where there is none."""
    frequency = found.band.frequency.numpy()
    axes.plot(frequency, found.band.signal_of_shell.numpy(), color=QUIET, lw=1, label="noise leaves")
    for score, colour in zip(_shown(found), _COLOURS, strict=False):
        curve = correlation_of_shells(found, score).numpy()
        axes.plot(frequency, curve, color=colour, lw=1.5, label=score.group)
    axes.axhline(0, color="black", lw=0.6)
    axes.set_ylim(-0.2, 1.05)
    ticks = [tick for tick in axes.get_xticks() if frequency[0] <= tick <= frequency[-1]]
    axes.set_xticks(ticks, [f"{1 / tick:.0f}" for tick in ticks])
    axes.set_xlim(frequency[0], frequency[-1])
    axes.set_xlabel("resolution (Å)", fontsize=8)
    axes.set_title("correlation under the operators", fontsize=8, loc="left")
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)


def _shown(found: FoundSymmetry) -> list[GroupScore]:
    """The group found, and the best ones that it does not hold."""
    others = sorted(found.scores, key=lambda score: -score.weakest)
    if found.best.group == "C1":
        return others[:2]
    limit = 0.9 * found.best.weakest
    return [found.best, *[score for score in others if score.weakest < limit][:1]]
