"""The pictures of a refinement: correlation, slices of the map, directions of the views, progress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from halfmap.ops import symmetry
from halfmap.ops.fourier import resample
from halfmap.ops.rotations import view_direction
from halfmap.ops.symmetry import reduce_to_asymmetric_unit
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
from halfmap.search.checkpoint import FOLDER
from halfmap.steps.refine.expectation import ROTATION
from halfmap.steps.refine.model import THRESHOLD, Maps, Model
from halfmap.steps.refine.plan import Plan

if TYPE_CHECKING:
    from halfmap.engine import Context

_TILE, _GAP = 300, 10
_SHOWN = 1.25
"""Side of the pictures over the diameter of the particle's sphere."""

_DECADE = 15.0
"""Range of a logarithmic axis whose minor ticks have room for numbers."""

_MOST_BINS, _PER_BIN = 36, 6
"""Of the directions along the half circle of tilts, and particles that each should hold."""


def draw(ctx: Context, plan: Plan, model: Model, result: tuple[Maps, dict[str, NDArray]]) -> None:
    """Draw all pictures of a refinement into the job's folder.

    Parameters
    ----------
    ctx, plan
        Job and refinement.
    model : Model
        Of the last iteration.
    result : Maps and dict of arrays
        Half maps and poses that it found.
    """
    maps, poses = result
    draw_fsc(ctx.folder / "fsc.png", plan, model)
    draw_slices(ctx.folder / "slices.png", plan, maps)
    draw_directions(ctx.folder / "angular_distribution.png", plan, poses["best"])
    draw_progress(ctx.folder / "progress.png", ctx.folder / FOLDER)


def draw_fsc(path: Path, plan: Plan, model: Model) -> None:
    """Draw the correlation of the half maps against frequency."""
    figure = new_figure(640, 420)
    resolution = model.resolution(plan)
    add_text(figure, MARGIN, 420 - 30, f"half maps agree to {resolution:.2f} Å", size=13, weight="bold")
    mask = "the mask given" if plan.mask else "a mask of the map"
    add_text(
        figure, MARGIN, 420 - 50, f"at a correlation of {THRESHOLD}, within {mask}", size=10, color=QUIET
    )
    axes = add_panel(figure, 62, 62, 640 - 62 - MARGIN, 275)
    draw_correlations(axes, list(model.curves.numpy()), side=plan.side)
    axes.axhline(THRESHOLD, color=QUIET, lw=0.8, ls="--")
    axes.axvline(1 / resolution, color=QUIET, lw=0.8, ls="--")
    save(figure, path)


def draw_slices(path: Path, plan: Plan, maps: Maps) -> None:
    """Draw the filtered map's central slices and projections along its axes, with the outline of the mask."""
    volume, mask = maps.filtered, maps.mask
    shown = min(plan.box, round(_SHOWN * plan.diameter / plan.pixel_size))
    first = (plan.box - shown) // 2
    part = (slice(first, first + shown),) * 3
    volume, mask = volume[part], mask[part]
    width, height = 3 * (_TILE + _GAP) - _GAP + 2 * MARGIN, 2 * (_TILE + 30) + 50 + MARGIN
    figure = new_figure(width, height)
    add_text(figure, MARGIN, height - 30, "the map, filtered by its correlation", size=13, weight="bold")
    detail = f"{shown * plan.pixel_size:.0f} Å wide; the line is the mask"
    add_text(figure, MARGIN, height - 48, detail, size=10, color=QUIET)
    middle = shown // 2 + (plan.box // 2 - first - shown // 2)
    rows = (
        (
            "slice",
            [volume.select(axis, middle) for axis in range(3)],
            [mask.select(axis, middle) for axis in range(3)],
        ),
        ("projection", [volume.sum(axis) for axis in range(3)], [mask.amax(axis) for axis in range(3)]),
    )
    for line, (kind, images, outlines) in enumerate(rows):
        images = resample(torch.stack(images), new_shape=(_TILE, _TILE))
        for column, (image, outline) in enumerate(zip(images.numpy(), outlines, strict=True)):
            left = MARGIN + column * (_TILE + _GAP)
            bottom = height - 58 - (line + 1) * (_TILE + 30) + 26
            axes = add_panel(figure, left, bottom, _TILE, _TILE)
            low, high = np.percentile(image, (0.5, 99.8))
            extent = (0, shown, 0, shown)
            axes.imshow(image, cmap="gray", vmin=low, vmax=high, origin="lower", extent=extent)
            axes.contour(
                np.arange(shown) + 0.5,
                np.arange(shown) + 0.5,
                outline.numpy(),
                levels=[0.5],
                colors="tab:orange",
                linewidths=0.9,
            )
            axes.set_axis_off()
            add_text(figure, left, bottom - 16, f"{kind} along {'zyx'[column]}", size=9)
    save(figure, path)


def draw_directions(path: Path, plan: Plan, best: NDArray[np.float64]) -> None:
    """Draw how many particles are seen from each direction, over rot and the cosine of tilt: an even map."""
    rotations = torch.from_numpy(best[:, ROTATION].reshape(-1, 3, 3))
    group = plan.step.symmetry
    x, y, z = view_direction(reduce_to_asymmetric_unit(rotations, group)).numpy().T
    bins = int(np.clip((len(best) * symmetry.order(group) / _PER_BIN / 2) ** 0.5, 6, _MOST_BINS))
    counts, rot, level = np.histogram2d(
        np.degrees(np.arctan2(y, x)), z, bins=(2 * bins, bins), range=((-180, 180), (-1, 1))
    )
    figure = new_figure(720, 400)
    add_text(figure, MARGIN, 400 - 30, "directions that particles are seen from", size=13, weight="bold")
    detail = "equal areas; with symmetry, one asymmetric unit is filled"
    add_text(figure, MARGIN, 400 - 48, detail, size=10, color=QUIET)
    axes = add_panel(figure, 62, 56, 560, 280)
    mesh = axes.pcolormesh(rot, level, counts.T, cmap="viridis")
    tilts = np.array([0, 30, 60, 90, 120, 150, 180])
    axes.set_yticks(np.cos(np.radians(tilts)), [f"{tilt}" for tilt in tilts])
    axes.set_xticks(np.arange(-180, 181, 60))
    dress(axes, "rot, °")
    axes.set_ylabel("tilt, °", fontsize=9, color=INK)
    bar = figure.colorbar(mesh, cax=add_panel(figure, 636, 56, 14, 280))
    bar.ax.tick_params(labelsize=8)
    bar.set_label("particles", fontsize=9, color=INK)
    save(figure, path)


def draw_progress(path: Path, folder: Path) -> None:
    """Draw resolution, pose errors and changes over the iterations.

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
        ("resolution, Å", {"searched_A": "compared", "resolution_A": "half maps"}),
        ("angles, °", {"pose_error_deg": "stated error", "turned_deg": "turned"}),
        ("share of poses", {"jumped": "turned beyond their error", "mean_share": "of the best maximum"}),
    )
    figure = new_figure(3 * 330 + MARGIN, 330)
    for i, (title, curves) in enumerate(panels):
        axes = add_panel(figure, 60 + i * 330, 48, 240, 220)
        for name, label in curves.items():
            first = 1 if name in ("turned_deg", "jumped") else 0
            axes.plot(number[first:], [one[name] for one in figures][first:], label=label, lw=1.4, marker=".")
        if i < 2:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            shown = np.concatenate([line.get_ydata() for line in axes.lines])
            axes.yaxis.set_minor_formatter("{x:g}" if shown.max() < _DECADE * shown.min() else "")
            axes.tick_params(axis="y", which="minor", labelsize=7)
        axes.legend(fontsize=8, frameon=False)
        dress(axes, "iteration")
        add_text(figure, 60 + i * 330, 48 + 228, title, size=10)
    save(figure, path)
