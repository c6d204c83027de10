"""What the steps' pictures have in common: places in pixels, text, heads above panels, saving.

Pictures are laid out in pixels: matplotlib's own layout would take longer than all the drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import IdentityTransform

from halfmap.io.atomic import atomic_path

DPI = 100
HEIGHT, TOP, MARGIN = 560, 470, 18
"""Of the picture of one movie or micrograph: its height, the upper edge of its panels, and its margin."""

INK, QUIET = "#222222", "#666666"
SHADE = {"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 1.5}
"""Box that makes white text readable on a spectrum."""

STEPS = 1, 2, 5, 10
"""Of the ticks of an axis."""


def new_figure(width: float, height: float) -> Figure:
    """Make a figure of a size in pixels."""
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI)


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG file, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png", pil_kwargs={"compress_level": 1})


def add_panel(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add axes at a place in pixels."""
    w, h = figure.get_size_inches() * DPI
    return figure.add_axes((left / w, bottom / h, width / w, height / h))


def add_text(figure: Figure, x: float, y: float, text: str, *, size: float = 9, **style: Any) -> None:
    """Write at a place in pixels; dollar signs in the names of files are no formulae."""
    style = {"color": INK, "va": "bottom"} | style
    figure.text(x, y, text, size=size, parse_math=False, transform=IdentityTransform(), **style)


def add_head(figure: Figure, x: float, title: str, detail: str) -> None:
    """Write two lines above a panel that ends at `TOP`."""
    add_text(figure, x, TOP + 26, title, size=11)
    add_text(figure, x, TOP + 7, detail, size=9, color=QUIET)


def dress(axes: Axes, label: str) -> None:
    """Label the axis along x, and leave out the lines that close the panel."""
    axes.set_xlabel(label, fontsize=9, color=INK)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def resolution_axis(axes: Axes, last: float) -> None:
    """Make the axis along x one of frequencies to `last`, in 1/Å, with resolutions in Å at the ticks."""
    axes.set_xlim(0, last)
    ticks = [d for d in (50, 20, 10, 7, 5, 4, 3.5, 3, 2.5, 2, 1.7, 1.5, 1.2, 1) if 1 / d <= last]
    axes.set_xticks([1 / d for d in ticks], [f"{d:g}" for d in ticks])
    dress(axes, "resolution, Å")


def draw_correlations(axes: Axes, curves: Sequence[Any], *, side: float) -> None:
    """Draw what half maps correlate by against frequency, with resolutions in Å at the ticks.

    Parameters
    ----------
    axes : Axes
    curves : sequence of 4 arrays or tensors (shells,)
        Without a mask, masked, masked with random phases, and corrected.
    side : float
        Of the box, Å.
    """
    labels = ("without a mask", "masked", "masked, random phases", "corrected")
    styles = ((1.1, "-", "C0"), (1.1, "-", "C1"), (1.1, ":", "C1"), (2.0, "-", INK))
    frequency = np.arange(len(curves[0])) / side
    for curve, label, (width, line, colour) in zip(curves, labels, styles, strict=True):
        axes.plot(frequency, np.asarray(curve), label=label, lw=width, ls=line, color=colour)
    axes.set_ylim(-0.1, 1.04)
    resolution_axis(axes, frequency[-1])
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1.0, 1.0))
