"""The pictures of a classification: class averages by population, also while it runs."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from halfmap.ops.fourier import resample
from halfmap.pictures import MARGIN, QUIET, add_panel, add_text, new_figure, save
from halfmap.search.checkpoint import FOLDER
from halfmap.steps.class2d import progress
from halfmap.steps.class2d.model import Model
from halfmap.steps.class2d.plan import Plan

if TYPE_CHECKING:
    from halfmap.engine import Context

_TILE, _GAP, _CAPTION = 120, 8, 34
_COLUMNS = 10
_SHOWN = 1.15
"""Side of the pictures over the diameter of the circle that averages are kept in."""

_EVERY_s = 60.0
"""Least age of pictures that are drawn anew while the job runs: then this takes no time to speak of."""


def draw(ctx: Context, plan: Plan, model: Model, best: np.ndarray) -> None:
    """Draw the averages of a model and how it was come to, into the job's folder.

    Parameters
    ----------
    ctx, plan, model
        Job, classification and model.
    best : array (n, columns)
        What the model's iteration found for the particles in it; see `expectation.BEST`.
    """
    draw_classes(ctx.folder / "classes.png", plan, model, best)
    progress.draw(ctx.folder / "progress.png", ctx.folder / FOLDER)


def draw_so_far(ctx: Context, plan: Plan, model: Model) -> None:
    """Draw what a running job has, unless that was drawn a short while ago."""
    path = ctx.folder / "classes.png"
    if not path.exists() or time.time() - path.stat().st_mtime > _EVERY_s:
        draw(ctx, plan, model, np.load(ctx.folder / FOLDER / f"it{model.iteration:03d}_best.npy"))


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
    if model.iteration < plan.step.iterations:
        detail += f"; iteration {model.iteration} of {plan.step.iterations}"
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
