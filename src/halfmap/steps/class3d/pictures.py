"""The pictures of a classification: class maps, how halves agree, directions of the views, progress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from halfmap.ops.fourier import resample
from halfmap.ops.rotations import view_direction
from halfmap.ops.symmetry import reduce_to_asymmetric_unit
from halfmap.pictures import INK, MARGIN, QUIET, add_panel, add_text, new_figure, save
from halfmap.search.checkpoint import FOLDER
from halfmap.steps.class3d.expectation import BEST, ROTATION
from halfmap.steps.class3d.model import THRESHOLD, Model
from halfmap.steps.class3d.plan import Plan
from halfmap.steps.class3d.tables import Result, members_of

if TYPE_CHECKING:
    from halfmap.engine import Context

_TILE, _GAP, _HEAD = 116, 6, 24
_SHOWN = 1.15
"""Side of the pictures over the diameter of the particle's sphere."""

_MOST = 16
"""Classes that are drawn, the largest ones."""

_MOST_BINS, _PER_BIN = 18, 6
"""Of the directions along the half circle of tilts, and particles that each should hold."""

_TICKS = (100, 50, 30, 20, 15, 12, 10, 8, 7, 6, 5, 4.5, 4, 3.5, 3, 2.5, 2)
"""In Å."""


def draw(ctx: Context, plan: Plan, model: Model, result: Result) -> None:
    """Draw all pictures of a classification into the job's folder.

    Parameters
    ----------
    ctx, plan
        Job and classification.
    model : Model
        Of the last iteration.
    result : Tensor (k, d, d, d) and array (n, columns)
        Filtered maps, and what was found for each particle; see `expectation.BEST`.
    """
    maps, best = result
    draw_classes(ctx.folder / "classes.png", plan, model, maps, members_of(model, best))
    draw_fsc(ctx.folder / "fsc.png", plan, model, members_of(model, best))
    draw_directions(ctx.folder / "angular_distribution.png", plan, best)
    draw_progress(ctx.folder / "progress.png", ctx.folder / FOLDER)


def draw_classes(path: Path, plan: Plan, model: Model, maps: Tensor, members: NDArray[np.intp]) -> None:
    """Draw slices and projections of each map, and what it has more or less than all together.

    Parameters
    ----------
    path : path
        PNG file to write.
    plan, model
        The classification and its last model.
    maps : Tensor (k, d, d, d)
    members : array (k,)
        Particles of each class.
    """
    order = _largest(members)
    shown = min(plan.box, 2 * round(_SHOWN * plan.diameter / plan.pixel_size / 2))
    first = plan.box // 2 - shown // 2
    part = (slice(None), *(slice(first, first + shown),) * 3)
    solvent, share = plan.solvent().cpu(), torch.from_numpy(members / members.sum()).float()
    mean = (maps * share[:, None, None, None]).sum(0)
    different = ((maps - mean) * plan.compared_part().cpu())[part]
    inside = (maps * solvent)[part]
    columns = 9
    width = columns * (_TILE + _GAP) + 2 * _GAP + 2 * MARGIN
    height = 84 + len(order) * (_TILE + _HEAD + _GAP) + MARGIN
    figure = new_figure(width, height)
    title = f"{int(members.sum()):,} particles in {int((members > 0).sum())} classes"
    if len(order) < len(members):
        title += f"; the largest {len(order)} of {len(members)}"
    add_text(figure, MARGIN, height - 30, title, size=13, weight="bold")
    detail = f"{shown * plan.pixel_size:.0f} Å wide; red is what the class has more of than all particles"
    add_text(figure, MARGIN, height - 48, detail, size=10, color=QUIET)
    for group, name in enumerate(("slices along z, y, x", "projections", "differences, projected")):
        left = MARGIN + group * (3 * (_TILE + _GAP) + _GAP)
        add_text(figure, left, height - 70, name, size=9, color=QUIET)
    flat = torch.stack([different.sum(axis) for axis in (1, 2, 3)], dim=1)
    reach = max(float(np.percentile(flat.abs().numpy(), 99.8)), 1e-12)
    resolutions = model.resolutions(plan)[1:]
    for line, number in enumerate(order):
        bottom = height - 84 - (line + 1) * (_TILE + _HEAD + _GAP) + _GAP
        text = f"class {number + 1}: {members[number]:,} particles, {100 * float(share[number]):.3g} %"
        add_text(figure, MARGIN, bottom + _TILE + 8, text, size=10)
        said = f"halves to {resolutions[number]:.3g} Å" if members[number] else "empty"
        add_text(figure, MARGIN + 3 * (_TILE + _GAP) + _GAP, bottom + _TILE + 8, said, size=10, color=QUIET)
        middle = [inside[number].select(axis, shown // 2) for axis in range(3)]
        summed = [inside[number].sum(axis) for axis in range(3)]
        tiles = resample(torch.stack([*middle, *summed, *flat[number]]), new_shape=(_TILE, _TILE)).numpy()
        for column, tile in enumerate(tiles):
            left = MARGIN + column * (_TILE + _GAP) + column // 3 * _GAP
            axes = add_panel(figure, left, bottom, _TILE, _TILE)
            if column < 6:
                low, high = np.percentile(tile, (0.5, 99.8))
                axes.imshow(tile, cmap="gray", vmin=low, vmax=high, origin="lower")
            else:
                axes.imshow(tile, cmap="RdBu_r", vmin=-reach, vmax=reach, origin="lower")
            axes.set_axis_off()
    save(figure, path)


def draw_fsc(path: Path, plan: Plan, model: Model, members: NDArray[np.intp]) -> None:
    """Draw how the halves of each class agree, in all and in what is its own."""
    figure = new_figure(920, 420)
    add_text(figure, MARGIN, 420 - 30, "halves of the particles of each class", size=13, weight="bold")
    detail = "halves are compared with common maps: these are no resolutions of a refinement"
    add_text(figure, MARGIN, 420 - 50, detail, size=10, color=QUIET)
    frequency = np.arange(model.curves.shape[1]) / plan.side
    panels = (("maps", model.curves[1:]), ("differences from all particles", model.differences))
    for place, (title, curves) in enumerate(panels):
        left = 62 + place * 400
        axes = add_panel(figure, left, 62, 330, 260)
        add_text(figure, left, 62 + 268, title, size=10)
        for number in _largest(members):
            axes.plot(
                frequency[1:],
                curves[number, 1:].numpy(),
                lw=1.5,
                color=f"C{number % 10}",
                label=str(number + 1),
            )
        axes.axhline(THRESHOLD, color=QUIET, lw=0.8, ls="--")
        axes.axvline(plan.finest / plan.side, color=QUIET, lw=0.8, ls=":")
        axes.set_xlim(0, frequency[-1])
        axes.set_ylim(-0.1, 1.04)
        ticks = [each for each in _TICKS if 4 / plan.side < 1 / each <= frequency[-1]][::2]
        axes.set_xticks([1 / each for each in ticks], [f"{each:g}" for each in ticks])
        _dress(axes, "resolution, Å")
    lines = figure.axes[-1].get_legend_handles_labels()
    figure.legend(*lines, title="class", fontsize=8, frameon=False, loc="center right")
    save(figure, path)


def draw_directions(path: Path, plan: Plan, best: NDArray[np.float64]) -> None:
    """Draw how many particles of each class are seen from each direction, in equal areas."""
    rotations = torch.from_numpy(best[:, ROTATION].reshape(-1, 3, 3))
    directions = view_direction(reduce_to_asymmetric_unit(rotations, plan.step.symmetry))
    x, y, z = directions.double().numpy().T
    number = best[:, BEST.index("class")].astype(np.intp)
    members = np.bincount(number, minlength=plan.classes)
    order = _largest(members)
    columns = min(3, len(order))
    lines = -(-len(order) // columns)
    width, height = 60 + columns * 300 + MARGIN, 64 + lines * 230
    figure = new_figure(max(width, 460), height)
    add_text(figure, MARGIN, height - 30, "directions that particles are seen from", size=13, weight="bold")
    detail = "rot and tilt in °, equal areas; with symmetry, one asymmetric unit is filled"
    add_text(figure, MARGIN, height - 48, detail, size=10, color=QUIET)
    tilts = np.array([0, 60, 90, 120, 180])
    for place, one in enumerate(order):
        line, column = divmod(place, columns)
        axes = add_panel(figure, 56 + column * 300, height - 64 - (line + 1) * 230 + 50, 240, 140)
        own = number == one
        bins = int(np.clip(np.sqrt(own.sum() / (2 * _PER_BIN)), 2, _MOST_BINS))
        counts, rot, level = np.histogram2d(
            np.degrees(np.arctan2(y[own], x[own])),
            z[own],
            bins=(2 * bins, bins),
            range=((-180, 180), (-1, 1)),
        )
        axes.pcolormesh(rot, level, counts.T, cmap="viridis", vmin=0)
        axes.set_yticks(np.cos(np.radians(tilts)), [f"{tilt}" for tilt in tilts])
        axes.set_xticks(np.arange(-180, 181, 90))
        axes.set_title(
            f"class {one + 1}: {members[one]:,}, at most {int(counts.max())}", fontsize=9, color=INK
        )
        axes.tick_params(labelsize=8)
    save(figure, path)


def draw_progress(path: Path, folder: Path) -> None:
    """Draw shares, changes and resolutions over the iterations.

    Parameters
    ----------
    path : path
        PNG file to write.
    folder : path
        Holds the figures of each iteration, ``it*.json``.
    """
    figures = [json.loads(file.read_text()) for file in sorted(folder.glob("it*.json"))]
    parted = [one for one in figures if len(one["shares"]) > 1]
    figure = new_figure(3 * 330 + MARGIN, 330)
    shares = _panel(figure, 0, "share of the particles", parted)
    for number in range(len(parted[0]["shares"]) if parted else 0):
        line = [one["shares"][number] for one in parted]
        shares.plot(_numbers(parted), line, lw=1.4, marker=".", color=f"C{number % 10}")
    shares.set_ylim(bottom=0)
    changes = _panel(figure, 1, "of the particles", parted)
    changes.plot(
        _numbers(parted),
        [one["probability"] for one in parted],
        lw=1.4,
        marker=".",
        label="mean probability of the class",
    )
    later = [one for one in parted if one["changed"] < 1]
    changes.plot(
        _numbers(later),
        [one["changed"] for one in later],
        lw=1.4,
        marker=".",
        label="share that changed its class",
    )
    changes.set_ylim(0, 1.35)
    changes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    changes.legend(fontsize=8, frameon=False, loc="upper left")
    detail = _panel(figure, 2, "resolution, Å", figures)
    detail.plot(
        _numbers(figures), [one["searched_A"] for one in figures], lw=1.4, marker=".", label="compared"
    )
    detail.plot(
        _numbers(figures), [one["resolution_A"] for one in figures], lw=1.4, marker=".", label="all particles"
    )
    detail.plot(
        _numbers(parted),
        [one["differing_A"] for one in parted],
        lw=1.4,
        marker=".",
        label="classes may differ",
    )
    detail.set_yscale("log")
    detail.yaxis.set_major_formatter("{x:g}")
    detail.yaxis.set_minor_formatter("{x:g}")
    detail.tick_params(axis="y", which="minor", labelsize=7)
    detail.legend(fontsize=8, frameon=False)
    save(figure, path)


def _panel(figure: Figure, place: int, title: str, figures: list[dict[str, Any]]) -> Axes:
    axes = add_panel(figure, 60 + place * 330, 48, 240, 220)
    add_text(figure, 60 + place * 330, 48 + 228, title, size=10)
    _dress(axes, "iteration")
    if figures:
        axes.set_xlim(0.5, figures[-1]["iteration"] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes


def _numbers(figures: list[dict[str, Any]]) -> list[int]:
    return [one["iteration"] for one in figures]


def _largest(members: NDArray[np.intp]) -> NDArray[np.intp]:
    """Classes that are drawn, the largest first."""
    return np.argsort(-members, kind="stable")[:_MOST]


def _dress(axes: Axes, label: str) -> None:
    axes.set_xlabel(label, fontsize=9, color=INK)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
