"""The pictures of a classification: class averages by population, and how it got there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from halfmap.ops.fourier import resample
from halfmap.pictures import INK, MARGIN, QUIET, add_panel, add_text, new_figure, save
from halfmap.steps.class2d.model import Model
from halfmap.steps.class2d.plan import Plan

_TILE, _GAP, _CAPTION = 120, 8, 34
_COLUMNS = 10
_SHOWN = 1.15
"""Side of the pictures over the diameter of the circle that averages are kept in."""


def draw_classes(path: Path, plan: Plan, model: Model, best: np.ndarray) -> None:
    """Draw all averages, the largest class first, with their particles and resolutions.

    Parameters
    ----------
    path : path
        PNG file to write.
    plan, model
        The classification and its last model.
    best : array (n, columns)
        What was found for each particle; see `expectation.BEST`.
    """
    members = np.bincount(best[:, 1].astype(int), minlength=plan.step.classes)
    order = np.argsort(-members, kind="stable")[: int((members > 0).sum())]
    resolutions = model.resolutions(plan)
    columns = min(_COLUMNS, len(order))
    lines = math.ceil(len(order) / columns)
    width = columns * (_TILE + _GAP) - _GAP + 2 * MARGIN
    height = lines * (_TILE + _CAPTION) + 64 + MARGIN
    figure = new_figure(max(width, 560), height)
    title = f"{int(members.sum()):,} particles in {len(order)} classes"
    if len(order) < len(members):
        title += f"; {len(members) - len(order)} have none"
    add_text(figure, MARGIN, height - 32, title, size=13, weight="bold")
    # What is outside the circle is empty.
    margin = max(0, math.floor((plan.box - _SHOWN * plan.diameter / plan.pixel_size) / 2))
    shown = model.averages.cpu()[:, margin : plan.box - margin, margin : plan.box - margin]
    detail = f"{shown.shape[-1] * plan.pixel_size:.0f} Å wide, circle of {plan.diameter:.0f} Å"
    add_text(figure, MARGIN, height - 52, detail, size=10, color=QUIET)
    tiles = resample(shown, new_shape=(_TILE, _TILE)).numpy()
    for place, number in enumerate(order):
        line, column = divmod(place, columns)
        left = MARGIN + column * (_TILE + _GAP)
        bottom = height - 64 - (line + 1) * (_TILE + _CAPTION) + _CAPTION
        axes = add_panel(figure, left, bottom, _TILE, _TILE)
        axes.imshow(tiles[number], cmap="gray", interpolation="bicubic", origin="lower")
        axes.set_axis_off()
        share = 100 * members[number] / members.sum()
        caption = f"{number + 1}: {members[number]:,} ({share:.2g} %)"
        add_text(figure, left, bottom - 15, caption, size=8)
        add_text(figure, left, bottom - 28, f"{resolutions[number]:.3g} Å", size=8, color=QUIET)
    save(figure, path)


def draw_progress(path: Path, folder: Path) -> None:
    """Draw resolution, probabilities and the evenness of the classes over the iterations.

    Parameters
    ----------
    path : path
        PNG file to write.
    folder : path
        Holds the figures of each iteration, ``it*.json``.
    """
    figures = [json.loads(file.read_text()) for file in sorted(folder.glob("it*.json"))]
    number = np.array([one["iteration"] for one in figures])
    panels = (
        (
            "resolution, Å",
            {"searched_A": "searched", "best_resolution_A": "best", "median_resolution_A": "median"},
        ),
        ("particles", {"particles": ""}),
        ("probability", {"mean_greatest_probability": "best pose", "largest_share": "largest class"}),
        ("classes", {"effective_classes": "effective number", "seeded": "begun anew"}),
    )
    width, height, side = 4 * 330 + MARGIN, 330, 240
    figure = new_figure(width, height)
    for i, (title, curves) in enumerate(panels):
        axes = add_panel(figure, 60 + i * 330, 48, side, 220)
        for name, label in curves.items():
            axes.plot(number, [one[name] for one in figures], label=label, lw=1.4)
        if i == 0:
            axes.set_yscale("log")
            axes.set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
            axes.minorticks_off()
        _dress(axes)
        if len(curves) > 1:
            axes.legend(fontsize=8, frameon=False)
        add_text(figure, 60 + i * 330, 48 + 228, title, size=10)
    save(figure, path)


def _dress(axes: Axes) -> None:
    axes.set_xlabel("iteration", fontsize=9, color=INK)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
