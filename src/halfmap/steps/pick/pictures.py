"""The pictures of picking: each micrograph with its picks, and the scores of the whole job."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import EllipseCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from halfmap.io.atomic import atomic_path
from halfmap.io.micrographs import Image, MicrographItem, load, local_mean
from halfmap.steps.pick.calibrate import Calibration
from halfmap.steps.pick.tables import PROBABILITY, X, Y

_DPI = 100
_SIDE = 1000
"""Pixels of the longer side of a micrograph in its picture."""

_BLUR_px = 1.0
_DETAIL = 8
"""Parts of a particle's diameter to which a micrograph is low-passed for the eye."""

_COLOURS = LinearSegmentedColormap.from_list("picks", ["#e0312f", "#f5a623", "#ffe95c", "#63d471"])
_BACKGROUND, _PARTICLES, _OTHER, _NEITHER, _INK, _QUIET = (
    "#9aa7b5",
    "#2f7ed8",
    "#d98f2b",
    "#8a63d2",
    "#222222",
    "#666666",
)
_UNSEEN = "#5b3fa8"
_AGREE = ("#d1495b", "#e9a23b", "#2a9d8f", "#2f5fd0", "#7b3fa0", "#444444")
"""Of picks that one, two, three and more pickers have."""

_LOWEST = 0.5
"""Probability at the red end of the colours."""


def draw_picks(
    path: str | Path,
    item: MicrographItem,
    picks: pl.DataFrame,
    diameter: float,
    searched: NDArray[np.bool_] | None = None,
) -> None:
    """Draw a micrograph, low-passed to an eighth of a particle, with a ring around each pick.

    Parameters
    ----------
    path : path
        PNG file to write.
    item : MicrographItem
        The micrograph.
    picks : DataFrame
        Coordinates in its pixels, probability.
    diameter : float
        Of the rings in Å.
    searched : array (h, w), bool, optional
        Where picks may be, in pixels of any size; default: where the micrograph's mask is.
    """
    image = load(item, max(diameter / _DETAIL / 2, 2 * item.pixel_size))
    values = local_mean(image.values, _BLUR_px)
    h, w = values.shape
    factor = _SIDE / max(h, w)
    width, height = round(w * factor), round(h * factor)
    head, bar = 46, 92
    figure = Figure(figsize=((width + bar) / _DPI, (height + head) / _DPI), dpi=_DPI)
    total_width, total_height = width + bar, height + head
    axes = figure.add_axes((0, 0, width / total_width, height / total_height))
    low, high = np.percentile(values[image.mask], (0.3, 99.8))
    shown = np.where(image.mask, values, low + 0.3 * (high - low))
    axes.imshow(
        shown,
        cmap="gray",
        vmin=low,
        vmax=high,
        origin="lower",
        interpolation="bilinear",
        extent=(-0.5, w - 0.5, -0.5, h - 0.5),
        aspect="auto",
    )
    axes.set_axis_off()
    unseen = ~(image.mask if searched is None else searched)
    if unseen.any():
        tint = unseen[..., None] * np.array(to_rgba(_UNSEEN, 0.5))
        axes.imshow(tint, origin="lower", extent=(-0.5, w - 0.5, -0.5, h - 0.5), aspect="auto")
        _add_unseen_key(figure, width, height)
    _add_rings(axes, picks, image, diameter)
    axes.set(xlim=(-0.5, w - 0.5), ylim=(-0.5, h - 0.5))
    _add_probability_key(figure, width, height, total_width, total_height)
    false = float((1 - picks[PROBABILITY]).sum()) if len(picks) else 0.0
    title = f"{len(picks):,} pick{'' if len(picks) == 1 else 's'}, {false:.1f} of them false on average"
    middle = (height + head / 2) / total_height
    figure.text(
        10 / total_width,
        middle,
        Path(item.name).name[-90:],
        size=10,
        weight="bold",
        color=_INK,
        va="center",
        parse_math=False,
    )
    figure.text((total_width - 12) / total_width, middle, title, size=10, color=_INK, va="center", ha="right")
    _save(figure, path)


def _add_rings(axes: Axes, picks: pl.DataFrame, image: Image, diameter: float) -> None:
    """A ring around each pick, coloured by its probability."""
    if not len(picks):
        return
    x, y = picks[X].to_numpy() / image.scale[0], picks[Y].to_numpy() / image.scale[1]
    wide = np.full(len(x), diameter / image.pixel_size)
    rings = EllipseCollection(
        wide,
        wide,
        np.zeros(len(x)),
        units="xy",
        offsets=np.stack([x, y], axis=-1),
        offset_transform=axes.transData,
        facecolors="none",
        linewidths=1.4,
        edgecolors=_COLOURS(_scale()(picks[PROBABILITY].to_numpy())),
    )
    axes.add_collection(rings, autolim=False)


def _add_probability_key(
    figure: Figure, width: float, height: float, total_width: float, total_height: float
) -> None:
    """The scale of the colours, right of a picture of this width and height in pixels."""
    left, bottom = (width + 22) / total_width, 0.2 * height / total_height
    colours = figure.add_axes((left, bottom, 16 / total_width, 0.6 * height / total_height))
    figure.colorbar(ScalarMappable(_scale(), _COLOURS), cax=colours, ticks=[0.5, 0.6, 0.7, 0.8, 0.9, 1])
    colours.tick_params(labelsize=8, color=_QUIET, labelcolor=_QUIET)
    figure.text((width + 14) / total_width, 0.82 * height / total_height, "probability", size=8, color=_QUIET)


def _add_unseen_key(figure: Figure, left: float, height: float) -> None:
    """Say beside a picture what the tint means; places in pixels."""
    wide, high = figure.get_size_inches() * _DPI
    box = Rectangle(((left + 8) / wide, 0.13 * height / high), 10 / wide, 10 / high, color=_UNSEEN, alpha=0.6)
    figure.add_artist(box)
    figure.text((left + 22) / wide, 0.13 * height / high, "not searched", size=7.5, color=_QUIET)


def _scale() -> Normalize:
    return Normalize(_LOWEST, 1, clip=True)


def draw_summary(
    path: str | Path, scores: np.ndarray, calibration: Calibration, table: pl.DataFrame, diameter: float
) -> None:
    """Draw the histogram of all scores with the populations and the threshold, and picks per micrograph.

    Parameters
    ----------
    path : path
        PNG file to write.
    scores : array (n,)
        Of all candidates.
    calibration : Calibration
        What they say.
    table : DataFrame
        A row a micrograph, with ``hmPicks`` and ``hmPicksFalse``.
    diameter : float
        Of the particle in Å.
    """
    figure = Figure(figsize=(13, 8.2), dpi=_DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(1.25, 1))
    total, false = int(table["hmPicks"].sum()), calibration.expected_false
    title = f"{total:,} picks in {len(table):,} micrograph{'' if len(table) == 1 else 's'}"
    if total:
        rate = 100 * calibration.false_discovery_rate
        title += f", about {false:,.0f} of them false ({rate:.1f} %); diameter {diameter:.0f} Å"
    figure.suptitle(title, size=13, weight="bold", x=0.01, ha="left", color=_INK)
    _draw_scores(upper, scores, calibration)
    _draw_counts(lower, table)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, color=_QUIET)
    _save(figure, path)


def _draw_scores(axes: Axes, scores: np.ndarray, calibration: Calibration) -> None:
    axes.set_xlabel("score", size=10)
    axes.set_ylabel("candidates", size=10)
    if len(scores) == 0:
        axes.text(0.5, 0.5, "no candidates", transform=axes.transAxes, ha="center", color=_QUIET)
        return
    low, high = np.percentile(scores, (0.1, 99.9))
    low, high = min(low, calibration.means[0]), max(high, low + 1e-3)
    count, edges, _ = axes.hist(
        np.clip(scores, low, high),
        bins=int(np.clip(np.sqrt(len(scores)) * 2, 20, 120)),
        range=(low, high),
        color="#e3e7ec",
        edgecolor="#b9c2cc",
        linewidth=0.5,
    )
    width = edges[1] - edges[0]
    grid, *parts = calibration.densities
    names = (("background", _BACKGROUND), ("particles", _PARTICLES), ("neither", _NEITHER))
    for part, (name, colour) in zip(parts, names, strict=True):
        if len(grid):
            axes.plot(grid, part * len(scores) * width, color=colour, linewidth=2, label=name)
    axes.set(xlim=(low, high))
    # The background may be many times as high as the particles: show these.
    right = np.asarray(count)[edges[:-1] >= calibration.threshold]
    if len(right) and right.max() > 0:
        axes.set_ylim(0, min(float(np.max(count)) * 1.08, float(right.max()) * 4))
    if np.isfinite(calibration.threshold):
        axes.axvline(
            calibration.threshold, color=_OTHER, linewidth=1.6, label=f"threshold {calibration.threshold:.2f}"
        )
    twin = axes.twinx()
    if len(calibration.grid) > 1:
        twin.plot(
            calibration.grid, calibration.probability, color="#3aa655", linewidth=1.4, linestyle=(0, (4, 2))
        )
    twin.set_ylim(0, 1.05)
    twin.set_ylabel("probability of a particle", size=10, color="#3aa655")
    twin.tick_params(labelsize=9, labelcolor="#3aa655", color="#3aa655")
    twin.spines["top"].set_visible(False)
    if calibration.kind == "none":
        axes.set_title("No particles are told apart from noise", size=11, loc="left", color="#e0312f")
    else:
        axes.set_title("Scores of all candidates, down to noise", size=11, loc="left", color=_INK)
        axes.legend(frameon=False, fontsize=9, loc="upper left")


def _draw_counts(axes: Axes, table: pl.DataFrame) -> None:
    picks, false = table["hmPicks"].to_numpy(), table["hmPicksFalse"].to_numpy()
    place = np.arange(1, len(picks) + 1)
    axes.bar(place, picks, color=_PARTICLES, width=0.8 if len(picks) < 200 else 1.0, label="picks")
    axes.bar(
        place, false, color=_OTHER, width=0.8 if len(picks) < 200 else 1.0, label="of them false on average"
    )
    axes.set(xlim=(0.3, len(picks) + 0.7), ylim=(0, max(1.0, 1.15 * float(picks.max(initial=0)))))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("micrograph", size=10)
    axes.set_ylabel("picks", size=10)
    axes.set_title("Picks in every micrograph", size=11, loc="left", color=_INK)
    axes.legend(frameon=False, fontsize=9, loc="upper right", ncols=2)


def _save(figure: Figure, path: str | Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=_DPI)


def draw_agreement(
    path: str | Path, votes: np.ndarray, probability: np.ndarray, least: float, table: pl.DataFrame
) -> None:
    """Draw how many pickers agree on how many picks, and picks per micrograph.

    Parameters
    ----------
    path : path
        PNG file to write.
    votes : array (n, pickers), bool
        Which pickers have each pick.
    probability : array (n,)
        Of the picks.
    least : float
        Least probability of those that are kept.
    table : DataFrame
        A row a micrograph, with ``hmPicks`` and ``hmPicksFalse``.
    """
    figure = Figure(figsize=(13, 8.2), dpi=_DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(1.25, 1))
    total, false = int(table["hmPicks"].sum()), float(table["hmPicksFalse"].sum())
    title = f"{total:,} picks of {votes.shape[1]} pickers, about {false:,.0f} of them false"
    figure.suptitle(title, size=13, weight="bold", x=0.01, ha="left", color=_INK)
    agree = votes.sum(axis=1)
    for number in range(1, votes.shape[1] + 1):
        part = np.sort(probability[agree == number])[::-1]
        if len(part):
            upper.plot(
                np.arange(1, len(part) + 1),
                part,
                linewidth=2,
                color=_AGREE[min(number, len(_AGREE)) - 1],
                label=f"of {number}: {len(part):,}",
            )
    if np.isfinite(least):
        upper.axhline(
            least, color=_QUIET, linewidth=1.2, linestyle=(0, (4, 3)), label=f"least probability {least:.2f}"
        )
    upper.set(ylim=(0, 1.03))
    upper.set_xlabel("picks, the most probable first", size=10)
    upper.set_ylabel("probability", size=10)
    upper.set_title("Picks by the number of pickers that have them", size=11, loc="left", color=_INK)
    if len(votes):
        upper.legend(frameon=False, fontsize=9, loc="lower right")
    _draw_counts(lower, table)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, color=_QUIET)
    _save(figure, path)
