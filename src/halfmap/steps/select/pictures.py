"""The picture of a selection: all class averages by score, framed by what became of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.patches import Rectangle

from halfmap.ops.fourier import resample
from halfmap.pictures import MARGIN, QUIET, add_panel, add_text, new_figure, save
from halfmap.steps.select.choice import Choice
from halfmap.steps.select.classification import Classification

_TILE, _GAP, _CAPTION, _HEAD = 120, 12, 52, 70
_COLUMNS = 10
_SHOWN = 1.15
"""Side of the pictures over the diameter of the circle that averages are kept in."""

_KEPT, _LOST = "#1f77d0", "#e0312f"


def draw_classes(path: Path, found: Classification, chosen: Choice) -> None:
    """Draw all averages, kept ones first and the best first, with score, particles and resolution.

    Parameters
    ----------
    path : path
        PNG file to write.
    found, chosen
        The classification, and what is kept of it.
    """
    members = found.members
    shown = np.flatnonzero(members > 0)
    order = shown[np.lexsort((-chosen.class_score[shown], ~chosen.class_kept[shown]))]
    lines = math.ceil(len(order) / _COLUMNS)
    columns = min(_COLUMNS, max(len(order), 5))
    width = columns * (_TILE + _GAP) - _GAP + 2 * MARGIN
    height = _HEAD + lines * (_TILE + _CAPTION) + MARGIN
    figure = new_figure(width, height)
    title = f"{int(chosen.kept.sum()):,} of {len(chosen.kept):,} particles kept"
    add_text(figure, MARGIN, height - 34, title, size=13, weight="bold")
    count = int(chosen.class_kept[shown].sum())
    detail = f"{count} of {len(order)} classes (blue)"
    if chosen.good_lost is not None:
        detail += f"; expected: {100 * chosen.good_lost:.1f} % of the good particles lost"
    add_text(figure, MARGIN, height - 54, detail, size=9, color=QUIET)
    size = (_TILE, _TILE)
    box = found.averages.shape[-1]
    margin = max(0, math.floor((box - _SHOWN * found.diameter / found.pixel_size) / 2))
    inside = found.averages[order][:, margin : box - margin, margin : box - margin]
    tiles = resample(torch.from_numpy(np.ascontiguousarray(inside)), new_shape=size).numpy()
    kept = np.bincount(found.number[chosen.kept], minlength=len(members))
    for place, number in enumerate(order):
        line, column = divmod(place, columns)
        left = MARGIN + column * (_TILE + _GAP)
        bottom = height - _HEAD - line * (_TILE + _CAPTION) - _TILE
        axes = add_panel(figure, left, bottom, _TILE, _TILE)
        axes.imshow(tiles[place], cmap="gray", interpolation="bicubic", origin="lower")
        axes.set_axis_off()
        colour = _KEPT if chosen.class_kept[number] else _LOST
        frame = Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, ec=colour, lw=4)
        axes.add_patch(frame)
        resolution = found.resolutions[number]
        detail = f", {resolution:.3g} Å" if np.isfinite(resolution) else ""
        score = "" if found.of_maps else f": score {chosen.class_score[number]:.2f}"
        add_text(figure, left, bottom - 15, f"{number + 1}{score}", size=8)
        add_text(figure, left, bottom - 28, f"{members[number]:,}{detail}", size=8, color=QUIET)
        lost = members[number] - kept[number]
        if chosen.class_kept[number] and lost:
            add_text(figure, left, bottom - 41, f"less {lost:,}", size=8, color=_LOST)
    save(figure, path)
