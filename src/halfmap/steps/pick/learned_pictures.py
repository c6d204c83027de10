"""The picture of a training: how the loss fell, and what the model says of the picks before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from halfmap.io.atomic import atomic_path

_PICKS, _OTHER, _INK, _QUIET = "#2f7ed8", "#9aa7b5", "#222222", "#666666"
_BINS = 60


def draw_training(
    path: str | Path,
    losses: Sequence[float],
    before: tuple[NDArray, NDArray],
    after: tuple[NDArray, NDArray],
) -> None:
    """Draw the losses along the training, and the scores before and after it.

    Parameters
    ----------
    path : path
        PNG file to write.
    losses : sequence of float
        Means over equal parts of the training.
    before, after : tuple of 2 arrays
        Log-odds at the picks, and of the candidates elsewhere.
    """
    figure = Figure(figsize=(12, 3.8), dpi=100, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    share = (np.arange(len(losses)) + 0.5) / max(len(losses), 1)
    left.plot(100 * share, losses, "o-", color=_INK, markersize=4, linewidth=1.2)
    left.set(xlabel="training, %", ylabel="loss", xlim=(0, 100))
    left.set_title("Loss", loc="left", size=10, weight="bold", color=_INK)
    every = np.concatenate([*before, *after])
    low, high = np.percentile(every, (0.2, 99.8)).tolist()
    bins = np.linspace(low, high, _BINS + 1)
    for axes, (picks, other), title in ((middle, before, "Before"), (right, after, "After")):
        _draw_scores(axes, picks, other, bins)
        axes.set_title(title, loc="left", size=10, weight="bold", color=_INK)
    highest = max(axes.get_ylim()[1] for axes in (middle, right))
    for axes in (middle, right):
        axes.set_ylim(0, highest)
    right.legend(frameon=False, fontsize=8, loc="upper left")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, color=_QUIET, labelcolor=_QUIET)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_scores(axes: Axes, picks: NDArray, other: NDArray, bins: NDArray) -> None:
    low, high = bins[0], bins[-1]
    axes.hist(
        np.clip(other, low, high), bins.tolist(), color=_OTHER, label=f"{len(other):,} other candidates"
    )
    axes.hist(
        np.clip(picks, low, high),
        bins.tolist(),
        histtype="step",
        color=_PICKS,
        linewidth=1.6,
        label=f"{len(picks):,} picks",
    )
    axes.axvline(0, color=_QUIET, linewidth=0.8, linestyle=":")
    axes.set(xlabel="log-odds of a particle", ylabel="candidates")
