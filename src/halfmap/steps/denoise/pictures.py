"""Pictures of trainings, of denoised micrographs, and of what was measured of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from halfmap.nets.denoiser import Denoiser, denoise
from halfmap.ops.signal_bias import HalfPowers
from halfmap.pictures import (
    HEIGHT,
    MARGIN,
    TOP,
    add_head,
    add_panel,
    dress,
    new_figure,
    resolution_axis,
    save,
)
from halfmap.steps.denoise.halves import Halves

_PANEL, _SPACE, _BELOW = 440, 70, 45
_SIGNAL, _BEFORE, _AFTER, _BIAS = "#222222", "#9aa7b5", "#2f7ed8", "#c0392b"
_RINGS = 2
_SURE = 3.0
"""Standard errors above which the power of the signal is drawn."""

_SHOWN_px = 384


def draw_training(
    path: Path,
    network: Denoiser,
    image: NDArray,
    losses: Sequence[float],
    held_out: Sequence[tuple[int, float]],
    steps: int,
) -> None:
    """Draw the losses, and a part of a held-out half before and after.

    Parameters
    ----------
    path : path
        PNG file to write.
    network : Denoiser
        As it is at the end.
    image : array (2, h, w)
        Halves of a held-out micrograph.
    losses : sequence of float
        Means over equal parts of the training.
    held_out : sequence of (int, float)
        Steps, and the loss on held-out patches after them.
    steps : int
        Of the training.
    """
    figure = new_figure(MARGIN + 3 * (_PANEL + _SPACE), HEIGHT)
    axes = add_panel(figure, MARGIN + 50, _BELOW, _PANEL - 50, TOP - _BELOW)
    places = (np.arange(len(losses)) + 1) * steps / max(len(losses), 1)
    axes.plot(places, losses, color=_BEFORE, lw=1.2, label="trained on")
    axes.plot(*zip(*held_out, strict=True), "o-", color=_AFTER, ms=3, lw=1.2, label="held out")
    axes.legend(fontsize=8, frameon=False)
    dress(axes, "batches")
    add_head(figure, MARGIN, "Mean squared error", "of one half predicted from the other; the noise remains")
    h, w = image.shape[1:]
    y, x = (max(0, (length - _SHOWN_px) // 2) for length in (h, w))
    even = torch.from_numpy(np.asarray(image[0, y : y + _SHOWN_px, x : x + _SHOWN_px], np.float32))
    for i, (shown, title) in enumerate(((even, "Even half"), (denoise(network, even), "Denoised")), start=1):
        left = MARGIN + i * (_PANEL + _SPACE)
        add_head(figure, left, title, "a part of a micrograph that was held out")
        _show(add_panel(figure, left, TOP - _PANEL, _PANEL, _PANEL), shown)
    save(figure, path)


def draw_micrograph(path: Path, name: str, halves: Halves, denoised: Tensor, powers: HalfPowers) -> None:
    """Draw a micrograph before and after, and its powers by frequency."""
    figure = new_figure(MARGIN + 3 * (_PANEL + _SPACE), HEIGHT)
    pairs = ((halves.values.mean(0), name), (denoised.mean(0), "denoised"))
    for i, (image, title) in enumerate(pairs):
        left = MARGIN + i * (_PANEL + _SPACE)
        h, w = image.shape
        scale = _PANEL / max(h, w)
        add_head(figure, left, title, f"{h} × {w} px of {halves.pixel_size:.2f} Å")
        step = max(1, max(h, w) // (2 * _PANEL))
        small = (
            image[: h // step * step, : w // step * step].unflatten(0, (-1, step)).unflatten(2, (-1, step))
        )
        _show(add_panel(figure, left, TOP - h * scale, w * scale, h * scale), small.mean((1, 3)))
    axes = add_panel(figure, MARGIN + 2 * (_PANEL + _SPACE) + 50, _BELOW, _PANEL - 50, TOP - _BELOW)
    add_head(figure, MARGIN + 2 * (_PANEL + _SPACE), "Power by frequency", "of the mean of both halves")
    _draw_powers(axes, powers, halves.pixel_size)
    save(figure, path)


def draw_summary(path: Path, each: Sequence[tuple[HalfPowers, float]]) -> None:
    """Draw powers and signal-to-noise ratios of all micrographs by frequency, and those of each."""
    figure = new_figure(MARGIN + 3 * (_PANEL + _SPACE), HEIGHT)
    from halfmap.steps.denoise.measure import together

    powers, pixel_size = together(each)
    lefts = [MARGIN + i * (_PANEL + _SPACE) for i in range(3)]
    axes = [add_panel(figure, left + 50, _BELOW, _PANEL - 50, TOP - _BELOW) for left in lefts]
    add_head(figure, lefts[0], "Power by frequency", f"of the mean of both halves; {len(each)} micrographs")
    _draw_powers(axes[0], powers, pixel_size)
    add_head(
        figure, lefts[1], "Signal over noise", "of the mean of both halves; after: over noise and bias, too"
    )
    _draw_ratios(axes[1], powers, pixel_size)
    add_head(figure, lefts[2], "Signal-to-noise ratio of each micrograph", "all frequencies together")
    _draw_each(axes[2], [one for one, _ in each])
    save(figure, path)


def draw_defocus(path: Path, raw: NDArray, denoised: NDArray, alike_A: float) -> None:
    """Draw the defoci of denoised micrographs over those of raw ones, and how they differ."""
    figure = new_figure(MARGIN + 2 * (_PANEL + _SPACE), HEIGHT)
    lefts = [MARGIN + i * (_PANEL + _SPACE) for i in range(2)]
    axes = [add_panel(figure, left + 50, _BELOW, _PANEL - 50, TOP - _BELOW) for left in lefts]
    agree = np.abs(denoised - raw) <= alike_A
    add_head(figure, lefts[0], "Defocus", f"denoised over raw, µm; {int(agree.sum())} of {len(raw)} agree")
    ends = [float(min(raw.min(), denoised.min())) / 1e4, float(max(raw.max(), denoised.max())) / 1e4]
    axes[0].plot(ends, ends, color=_BEFORE, lw=1)
    for which, colour in ((agree, _AFTER), (~agree, _BIAS)):
        axes[0].plot(raw[which] / 1e4, denoised[which] / 1e4, ".", color=colour, ms=6)
    dress(axes[0], "raw, µm")
    add_head(figure, lefts[1], "Difference", "denoised less raw, Å; those further out are in the last bins")
    bins = np.linspace(-2 * alike_A, 2 * alike_A, 41)
    axes[1].hist(np.clip(denoised - raw, bins[0], bins[-1]), bins.tolist(), color=_AFTER)
    for edge in (-alike_A, alike_A):
        axes[1].axvline(edge, color=_BEFORE, lw=1, ls=":")
    dress(axes[1], "Å")
    save(figure, path)


def _draw_powers(axes: Axes, powers: HalfPowers, pixel_size: float) -> None:
    coarse, is_seen = powers.coarser(_RINGS), _is_seen(powers)
    frequency = _frequencies(powers, pixel_size)
    for label, colour, value in (
        ("noise before", _BEFORE, lambda p: p.noise_before / 2),
        ("noise after", _AFTER, lambda p: p.noise_after / 2),
        ("signal", _SIGNAL, lambda p: p.signal),
        ("bias", _BIAS, lambda p: p.bias),
    ):
        found, error = (each.numpy() for each in coarse.with_error(value))
        if not label.startswith("noise"):
            found = np.where(is_seen, found, np.nan)
        axes.plot(frequency, found, color=colour, lw=1.4, label=label)
        axes.fill_between(frequency, found - error, found + error, color=colour, alpha=0.25, lw=0)
    highest = float(torch.maximum(coarse.noise_before / 2, coarse.signal).max())
    axes.set_yscale("log")
    axes.set_ylim(1e-5 * highest, 2 * highest)
    axes.legend(fontsize=8, frameon=False)
    resolution_axis(axes, 0.5 / pixel_size)


def _draw_ratios(axes: Axes, powers: HalfPowers, pixel_size: float) -> None:
    coarse, is_seen = powers.coarser(_RINGS), _is_seen(powers)
    frequency = _frequencies(powers, pixel_size)
    ratios = (
        2 * coarse.signal / coarse.noise_before,
        2 * coarse.transfer.clamp(min=0).square() * coarse.signal / coarse.noise_after,
        coarse.signal / (coarse.noise_after / 2 + coarse.bias),
    )
    before, after, with_bias = (np.where(is_seen, ratio.numpy(), np.nan) for ratio in ratios)
    axes.plot(frequency, before, color=_BEFORE, lw=1.4, label="before")
    axes.plot(frequency, after, color=_AFTER, lw=1.4, label="after")
    axes.plot(frequency, with_bias, color=_BIAS, lw=1.4, label="after, over noise and bias")
    axes.set_yscale("log")
    axes.set_ylim(1e-3, 10 * max(float(np.nanmax(after[np.isfinite(after)], initial=1.0)), 1.0))
    axes.legend(fontsize=8, frameon=False)
    resolution_axis(axes, 0.5 / pixel_size)


def _draw_each(axes: Axes, each: Sequence[HalfPowers]) -> None:
    from halfmap.steps.denoise.apply import figures

    rows = [figures(powers) for powers in each]
    for name, colour, label in (
        ("snr_before", _BEFORE, "before"),
        ("snr_after", _AFTER, "after"),
        ("snbr", _BIAS, "after, over noise and bias"),
    ):
        values = np.array([max(row[name], 1e-6) for row in rows])
        axes.plot(np.arange(1, len(values) + 1), values, ".", color=colour, ms=5, label=label)
    axes.set_yscale("log")
    axes.legend(fontsize=8, frameon=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    dress(axes, "micrograph")


def _is_seen(powers: HalfPowers) -> NDArray[np.bool_]:
    """Groups of rings in which there surely is a signal; of others nothing can be said of it."""
    signal, error = powers.coarser(_RINGS).with_error(lambda p: p.signal)
    return (signal > _SURE * error).numpy()


def _frequencies(powers: HalfPowers, pixel_size: float) -> NDArray[np.floating]:
    side = 2 * (len(powers.counts) - 1)
    groups = len(powers.coarser(_RINGS).counts)
    return (1 + _RINGS * np.arange(groups) + (_RINGS - 1) / 2) / (side * pixel_size)


def _show(axes: Axes, image: Tensor) -> None:
    values = image.numpy()
    middle, spread = float(np.median(values)), float(values.std())
    axes.imshow(values, cmap="gray", vmin=middle - 3 * spread, vmax=middle + 3 * spread, origin="lower")
    axes.set_axis_off()
