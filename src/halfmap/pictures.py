"""What the steps' pictures have in common: places in pixels, text, heads above panels, saving.

Pictures are laid out in pixels: matplotlib's own layout would take longer than all the drawing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
