"""How a classification got on: the figures of its iterations, in a line and in a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from halfmap.pictures import INK, MARGIN, add_panel, add_text, new_figure, save

_WIDTH, _HEIGHT = 380, 220
_LEFT, _BELOW, _ABOVE = 76, 58, 58
"""Of a panel, and the room beside it in pixels."""

_RESOLUTIONS = np.array([1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 70, 100, 200, 500, 1000])
"""Ticks in Å."""

_PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "resolution, Å",
        {"searched_A": "searched", "best_resolution_A": "best average", "median_resolution_A": "median"},
    ),
    ("particles taken", {"particles": ""}),
    (
        "probability, share of the particles",
        {"mean_greatest_probability": "mean of the best pose", "largest_share": "largest class"},
    ),
    ("number of classes", {"effective_classes": "classes' worth of particles", "seeded": "begun anew"}),
)
"""What each panel shows, and how its curves are called."""


def said(folder: Path, number: int) -> str:
    """What an iteration gave, in a line.

    Parameters
    ----------
    folder : path
        Holds the figures of each iteration, ``it*.json``.
    number : int
        Of the iteration.
    """
    one = _read(folder / f"it{number:03d}.json")
    return f"{one['particles']:,} particles, {detail(one)}, largest class {100 * one['largest_share']:.0f} %"


def detail(figures: dict[str, Any]) -> str:
    """What the averages show."""
    best, median, side = (figures[f"{name}_A"] for name in ("best_resolution", "median_resolution", "side"))
    if best >= side:
        return "averages without detail"
    return f"averages to {best:.1f} Å (median {f'{median:.1f}' if median < side else 'none'})"


def draw(path: Path, folder: Path) -> None:
    """Draw resolution, particles, probabilities and the evenness of the classes over the iterations.

    Parameters
    ----------
    path : path
        PNG file to write.
    folder : path
        Holds the figures of each iteration, ``it*.json``.
    """
    figures = [_read(file) for file in sorted(folder.glob("it*.json"))]
    width, height = _LEFT + _WIDTH, _BELOW + _HEIGHT + _ABOVE
    figure = new_figure(2 * width + MARGIN, 2 * height)
    for place, (title, curves) in enumerate(_PANELS):
        line, column = divmod(place, 2)
        left, bottom = column * width + _LEFT, (1 - line) * height + _BELOW
        add_text(figure, left, bottom + _HEIGHT + 30, title, size=12)
        axes = _panel(figure, left, bottom, figures, curves)
        if place == 0:
            _in_angstroms(axes)
        else:
            axes.set_ylim(bottom=0)
    save(figure, path)


def _panel(
    figure: Figure, left: float, bottom: float, figures: list[dict[str, Any]], curves: dict[str, str]
) -> Axes:
    axes = add_panel(figure, left, bottom, _WIDTH, _HEIGHT)
    number = np.array([one["iteration"] for one in figures])
    for name, label in curves.items():
        axes.plot(number, [one[name] for one in figures], label=label, lw=1.8)
    axes.set_xlabel("iteration", fontsize=11, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=10.5)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        # Above the panel, where no curve runs.
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=len(curves),
            fontsize=10.5,
            frameon=False,
            borderaxespad=0.2,
            borderpad=0.2,
            handlelength=1.2,
            handletextpad=0.5,
            columnspacing=1.2,
        )
    return axes


def _in_angstroms(axes: Axes) -> None:
    low, high = axes.dataLim.intervaly
    first, last = _RESOLUTIONS.searchsorted((low, high))
    ticks = _RESOLUTIONS[max(first - 1, 0) : last + 1]
    axes.set_yscale("log")
    axes.set_ylim(ticks[0], ticks[-1])
    axes.set_yticks(ticks, ticks.astype(str).tolist())
    axes.yaxis.set_minor_locator(NullLocator())


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
