"""The pictures of a job: slices and projections of each map, how runs agree, how they got on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from halfmap.ops.fourier import resample
from halfmap.pictures import INK, MARGIN, QUIET, add_panel, add_text, new_figure, save
from halfmap.steps.abinitio.assign import Result
from halfmap.steps.abinitio.consensus import THRESHOLD, Agreement
from halfmap.steps.abinitio.plan import Plan
from halfmap.steps.abinitio.rounds import FOLDER, read_figures

if TYPE_CHECKING:
    from halfmap.engine import Context

_TILE, _GAP, _CAPTION = 170, 8, 40
_SHOWN = 1.1
"""Side of the pictures over the diameter of the particle's sphere."""

_HEAD, _BELOW, _LEFT = 78, 52, 64
"""Room above, below and left of panels in pixels."""


def draw(ctx: Context, plan: Plan, agreed: Agreement, result: Result) -> None:
    """Draw all pictures into the job's folder.

    Parameters
    ----------
    ctx, plan
        Job and sizes.
    agreed : Agreement
        Of the runs.
    result : Result
        Final maps and poses.
    """
    draw_maps(ctx.folder / "maps.png", plan, agreed, result)
    draw_runs(ctx.folder / "runs.png", plan, agreed)
    draw_progress(ctx.folder / "progress.png", agreed, read_figures(ctx.folder / FOLDER))


def draw_maps(path: Path, plan: Plan, agreed: Agreement, result: Result) -> None:
    """Draw the central slices and the projections along the axes of each map, one map a line."""
    k, columns = len(result.maps), 6
    width = columns * (_TILE + _GAP) - _GAP + 2 * MARGIN + 2 * _GAP
    height = k * (_TILE + _CAPTION) + _HEAD + MARGIN
    figure = new_figure(width, height)
    title = "1 map" if k == 1 else f"{k} maps"
    add_text(figure, MARGIN, height - 32, f"{title}, of either hand", size=13, weight="bold")
    shown = min(plan.box, 2 * round(_SHOWN * plan.diameter / plan.pixel_size / 2))
    detail = (
        f"{shown * plan.pixel_size:.0f} Å wide; slices through the centre, and projections, along z, y, x"
    )
    add_text(figure, MARGIN, height - 52, detail, size=10, color=QUIET)
    first = (plan.box - shown) // 2
    part = (slice(first, first + shown),) * 3
    members = result.members
    for line, volume in enumerate(result.maps.cpu()):
        bottom = height - _HEAD - (line + 1) * (_TILE + _CAPTION) + _CAPTION
        for column, image in enumerate(_views(volume[part])):
            left = MARGIN + column * (_TILE + _GAP) + (2 * _GAP if column > 2 else 0)
            axes = add_panel(figure, left, bottom, _TILE, _TILE)
            low, high = np.percentile(image, (0.5, 99.8))
            axes.imshow(image, cmap="gray", vmin=low, vmax=high, origin="lower")
            axes.set_axis_off()
        share = 100 * members[line] / members.sum()
        agreement = agreed.classes[line]
        said = f"runs agree to {agreement:.1f} Å" if np.isfinite(agreement) else "agrees with no other run"
        caption = f"class {line + 1}: {members[line]:,} particles ({share:.0f} %); {said}"
        add_text(figure, MARGIN, bottom - 20, caption, size=10)
    save(figure, path)


def draw_runs(path: Path, plan: Plan, agreed: Agreement) -> None:
    """Draw the resolution to which each two runs agree, and the correlation of those that were kept."""
    n, panel = len(agreed.resolutions), 300
    width, height = 2 * (panel + _LEFT) + 60 + MARGIN, panel + _HEAD + _BELOW
    figure = new_figure(width, height)
    kept = ", ".join(str(run + 1) for run in sorted(agreed.kept))
    if agreed.agreed:
        title = f"runs {kept} agree to {agreed.classes.min():.1f} Å"
        if len(agreed.rejected):
            title += f"; left out: {', '.join(str(run + 1) for run in agreed.rejected)}"
    elif n == 1:
        title = "one run, which nothing was compared with"
    else:
        title = f"run {kept}, the likeliest, agrees with no other"
    add_text(figure, MARGIN, height - 32, title, size=13, weight="bold")
    detail = f"resolution in Å to which the maps of two runs correlate by {THRESHOLD:g}"
    add_text(figure, MARGIN, height - 52, detail, size=10, color=QUIET)
    _draw_matrix(add_panel(figure, _LEFT, _BELOW, panel, panel), plan, agreed)
    axes = add_panel(figure, 2 * _LEFT + panel + 40, _BELOW, panel, panel)
    frequency = np.arange(agreed.curves.shape[1]) / plan.side
    for number, curve in enumerate(agreed.curves.numpy()):
        axes.plot(frequency[: plan.radius + 1], curve[: plan.radius + 1], label=f"class {number + 1}", lw=1.6)
    axes.axhline(THRESHOLD, color=QUIET, lw=0.8, ls="--")
    axes.set_xlim(0, plan.radius / plan.side)
    axes.set_ylim(-0.1, 1.04)
    ticks = [d for d in (100, 50, 30, 20, 15, 12, 10, 8, 6, 5) if 1 / d <= plan.radius / plan.side]
    axes.set_xticks([1 / d for d in ticks], [f"{d:g}" for d in ticks])
    if len(agreed.curves) > 1:
        axes.legend(fontsize=9, frameon=False)
    axes.set_ylabel("correlation of the runs kept", fontsize=10, color=INK)
    _dress(axes, "resolution, Å")
    save(figure, path)


def draw_progress(path: Path, agreed: Agreement, figures: list[dict[str, Any]]) -> None:
    """Draw detail, likelihood and spread of the poses of each run over the iterations."""
    panels = (("detail compared, Å", "searched_A"), ("log-evidence of a particle", "mean_evidence"))
    panels = (*panels, ("entropy of its poses, nats", "entropy"))
    side, gap = 270, 72
    figure = new_figure(3 * side + 3 * gap + MARGIN, 240 + 110)
    for place, (title, name) in enumerate(panels):
        left = gap + place * (side + gap) - 8
        axes = add_panel(figure, left, _BELOW, side, 230)
        add_text(figure, left, _BELOW + 238, title, size=11)
        for run in range(len(agreed.resolutions)):
            own = [one for one in figures if one["run"] == run + 1]
            style = "-" if run in agreed.kept else ":"
            number, values = ([one[key] for one in own] for key in ("iteration", name))
            axes.plot(number, values, style, label=f"run {run + 1}", lw=1.6)
        if name == "searched_A":
            axes.set_ylim(bottom=0)
            axes.legend(fontsize=9, frameon=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _dress(axes, "iteration")
    save(figure, path)


def _views(volume: Tensor) -> np.ndarray:
    """Slices through the centre and projections (6, tile, tile) along z, y and x."""
    middle = len(volume) // 2
    slices = [volume.select(axis, middle) for axis in range(3)]
    images = torch.stack([*slices, *(volume.sum(axis) for axis in range(3))])
    return resample(images, new_shape=(_TILE, _TILE)).numpy()


def _draw_matrix(axes: Axes, plan: Plan, agreed: Agreement) -> None:
    pairs = agreed.resolutions
    n = len(pairs)
    frequency = np.where(np.isfinite(pairs), 1 / pairs, 0.0)
    np.fill_diagonal(frequency, np.nan)
    axes.imshow(frequency, cmap="Blues", vmin=0, vmax=1.3 * plan.radius / plan.side)
    for one in range(n):
        for other in range(n):
            if one != other and n <= 12:
                value = pairs[one, other]
                text = f"{value:.0f}" if np.isfinite(value) else "–"
                dark = frequency[one, other] > 0.8 * plan.radius / plan.side
                colour = "white" if dark else INK
                axes.text(other, one, text, ha="center", va="center", fontsize=11, color=colour)
    names = [str(run + 1) for run in range(n)]
    axes.set_xticks(range(n), names)
    axes.set_yticks(range(n), names)
    axes.set_ylabel("run", fontsize=10, color=INK)
    _dress(axes, "run")


def _dress(axes: Axes, label: str) -> None:
    axes.set_xlabel(label, fontsize=10, color=INK)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
