"""The pictures of an extraction: particles at random, and what they are like as a whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from halfmap.data import ParticleSet
from halfmap.io.images import ImageStack
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft2, resample, rfft2
from halfmap.pictures import INK, MARGIN, QUIET, add_panel, add_text, new_figure, save
from halfmap.steps.extract.coordinates import IMAGE, MICROGRAPH
from halfmap.steps.extract.tables import OUTLYING, STATISTICS

if TYPE_CHECKING:
    from halfmap.engine import Context

OUTLIER = 6.0
"""Robust standard deviations from the median at which a particle is drawn as an outlier."""

_SIDE, _TILE, _GAP = 10, 96, 2
_LOW_PASS_A = 25.0
_ODD = "#e0312f"
_WIDTH, _HEIGHT, _PANEL, _LINE = 1500, 700, 400, 220
_BINS = 60


def draw_particles(path: Path, ctx: Context, particles: ParticleSet) -> None:
    """Draw a hundred particles at random, the same ones every time, as they are and low-pass filtered.

    Parameters
    ----------
    path : path
        PNG file to write.
    ctx : Context
        Where their stacks lie.
    particles : ParticleSet
        All of them.
    """
    rows = np.sort(np.random.default_rng(0).permutation(len(particles))[: _SIDE**2])
    stack = ImageStack(particles.rows[IMAGE][rows], root=ctx.project)
    images = torch.from_numpy(stack.read(np.arange(len(rows))))
    box, pixel_size = stack.shape[0], particles.pixel_size
    filtered = irfft2(
        rfft2(images) * low_pass(stack.shape, pixel_size=pixel_size, resolution=_LOW_PASS_A),
        shape=stack.shape,
    )
    lines = -(-len(rows) // _SIDE)
    width, height = _SIDE * (_TILE + _GAP), lines * (_TILE + _GAP)
    figure = new_figure(2 * width + 3 * MARGIN, height + 76)
    title = f"{len(rows)} of {len(particles):,} particles, {box} px of {pixel_size:.4g} Å"
    title += f", {box * pixel_size:.0f} Å wide"
    add_text(figure, MARGIN, height + 48, title, size=13, weight="bold")
    for number, (some, words) in enumerate(
        ((images, "as they are stored"), (filtered, f"low-pass filtered at {_LOW_PASS_A:g} Å"))
    ):
        left = MARGIN + number * (width + MARGIN)
        add_text(figure, left, height + 26, words, size=10, color=QUIET)
        axes = add_panel(figure, left, MARGIN, width, height)
        mosaic = _mosaic(some, lines)
        low, high = np.nanpercentile(mosaic, (0.5, 99.5))
        axes.imshow(mosaic, cmap="gray", vmin=low, vmax=high, interpolation="nearest", origin="upper")
        axes.set_axis_off()
    save(figure, path)


def _mosaic(images: torch.Tensor, lines: int) -> NDArray[np.float32]:
    """Images side by side, shrunk or enlarged to `_TILE` pixels, each with its first row below."""
    tiles = resample(images, new_shape=(_TILE, _TILE)).numpy()[:, ::-1]
    whole = np.full((lines, _SIDE, _TILE + _GAP, _TILE + _GAP), np.nan, np.float32)
    whole.reshape(-1, *whole.shape[2:])[: len(tiles), :_TILE, :_TILE] = tiles
    return whole.transpose(0, 2, 1, 3).reshape(lines * (_TILE + _GAP), -1)


def draw_summary(path: Path, particles: ParticleSet) -> None:
    """Draw particles per micrograph, defocus, and statistics of the images with outliers marked.

    Parameters
    ----------
    path : path
        PNG file to write.
    particles : ParticleSet
        All of them.
    """
    rows = particles.rows
    counts = rows.group_by(MICROGRAPH, maintain_order=True).len()["len"].to_numpy()
    odd = rows[OUTLYING].to_numpy() > OUTLIER
    figure = new_figure(_WIDTH, _HEIGHT)
    title = f"{len(rows):,} particles of {len(counts):,} micrograph{'s' if len(counts) > 1 else ''}"
    title += f", {int(odd.sum()):,} unlike the others" if odd.any() else ""
    add_text(figure, 24, _HEIGHT - 18, title, size=13, weight="bold", va="top")
    defocus = rows.select((pl.col("rlnDefocusU") + pl.col("rlnDefocusV")) / 2e4).to_series().to_numpy()
    normal = np.zeros(len(rows), bool)
    axes = _panel(figure, 0, "Particles per micrograph", f"median {np.median(counts):.0f}")
    axes.plot(np.arange(len(counts)) + 1, counts, color=INK, lw=0.8, marker="." if len(counts) < 300 else "")
    axes.set_ylim(0, 1.08 * counts.max())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panels = (
        ("Defocus, µm", defocus, normal),
        ("Noise around particles in the micrograph", rows[STATISTICS[1]].to_numpy(), normal),
        ("Mean of a particle, as stored", rows[STATISTICS[2]].to_numpy(), odd),
        ("Standard deviation of a particle, as stored", rows[STATISTICS[3]].to_numpy(), odd),
        ("Skewness of a particle", rows[STATISTICS[4]].to_numpy(), odd),
    )
    for place, (name, values, marked) in enumerate(panels, start=1):
        _histogram(_panel(figure, place, name, f"median {_median(values)}"), values, marked)
    if odd.any():
        text = f"red: particles with a value more than {OUTLIER:g} robust standard deviations from the median"
        add_text(figure, _WIDTH - 24, _HEIGHT - 18, text, size=9, color=_ODD, va="top", ha="right")
    save(figure, path)


def _median(values: NDArray) -> str:
    """Median to a tenth of the values' spread."""
    spread = np.median(np.abs(values - np.median(values)))
    decimals = max(0, 1 - math.floor(math.log10(spread))) if spread > 0 else 3
    return f"{np.median(values) + 0.0:.{decimals}f}".replace("-", "−")


def _panel(figure, place: int, title: str, detail: str) -> Axes:
    left = 60 + (place % 3) * (_PANEL + 80)
    bottom = _HEIGHT - 86 - _LINE - (place // 3) * (_LINE + 90)
    add_text(figure, left, bottom + _LINE + 6, title, size=10)
    add_text(figure, left + _PANEL, bottom + _LINE + 6, detail, size=9, color=QUIET, ha="right")
    axes = add_panel(figure, left, bottom, _PANEL, _LINE)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _histogram(axes: Axes, values: NDArray, odd: NDArray[np.bool_]) -> None:
    """Draw a histogram whose ends hold all that lies beyond."""
    low, high = values[~odd].min() if (~odd).any() else values.min(), values.max()
    middle = np.median(values)
    reach = 12 * 1.4826 * np.median(np.abs(values - middle)) or 1.0
    low, high = max(values.min(), middle - reach), min(high, middle + reach)
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    inside = np.clip(values, edges[0], edges[-1])
    axes.hist(inside[~odd], bins=edges.tolist(), color=INK)
    if odd.any():
        # Ticks, as a few among thousands would make bars too low to be seen.
        axes.plot(inside[odd], np.zeros(odd.sum()), "|", color=_ODD, ms=16, clip_on=False, zorder=3)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(7))
