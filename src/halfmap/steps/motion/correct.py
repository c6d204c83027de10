"""Frames moved to where they belong and added up: by dose, by parity, in groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from halfmap.ops.dose import dose_weights
from halfmap.ops.fourier import irfft2, resize_spectrum, rfft2
from halfmap.ops.threads import in_threads
from halfmap.steps.motion import _correct_kernels as kernels

BLOCK = kernels.BLOCK_Y, kernels.BLOCK_X
_FRACTIONS = 512
"""Steps in which the part of a pixel is counted: the error is a thousandth of a pixel."""

_KAISER = 3.5
"""Shape of the window of the sinc: averaged over the parts of a pixel, waves up to 0.75 of Nyquist along an
axis keep their height within 3 %."""

_TABLE = 512
_TOLERANCE = 1e-3
"""Largest error of a dose weight, relative to the largest weight."""

_BACKGROUND = 8
"""Blocks along each axis whose mean stands in for what lies beyond an edge."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """Which sums a frame goes to, and with what weight.

    Attributes
    ----------
    n_sums : int
        Number of sums.
    first : array (n + 1,) int64
        Frame f goes to the sums ``target[first[f] : first[f + 1]]``.
    target : array (m,) int64
        Numbers of sums.
    weight : array (m,) float32
        What the frame is multiplied by in each.
    """

    n_sums: int
    first: NDArray
    target: NDArray
    weight: NDArray


def make_recipe(columns: NDArray) -> Recipe:
    """Recipe from the weights (sums, n) of all frames in all sums, zeros left out."""
    frame, target = np.nonzero(columns.T)
    first = np.searchsorted(frame, np.arange(columns.shape[1] + 1))
    return Recipe(
        len(columns),
        first.astype(np.int64),
        target.astype(np.int64),
        columns[target, frame].astype(np.float32),
    )


@dataclass(frozen=True, eq=False)
class DoseFilter:
    """Dose weights of frames as few products of a function of the frame and one of the frequency.

    Weights exp(-N / 2 N_c(k)) of all frames at all frequencies are a smooth table of low rank. A
    dose-weighted sum therefore takes as many transforms as the rank, some five, not one of every frame.

    Attributes
    ----------
    by_frame : array (r, n)
        Factors of the frames.
    by_frequency : array (r, entries) float32
        Factors at frequencies 0, `step`, 2 `step`, …
    step : float
        In 1/Å.
    """

    by_frame: NDArray
    by_frequency: NDArray[np.float32]
    step: float


def factor_dose_weights(
    n: int, *, pixel_size: float, dose_per_frame: float, pre_exposure: float, voltage_kV: float
) -> DoseFilter:
    """Factor the dose weights (`halfmap.ops.dose.dose_weights`) of frames to an error of a thousandth."""
    step = np.sqrt(0.5) / pixel_size / (_TABLE - 1)
    frequency = torch.arange(_TABLE, dtype=torch.float64) * step
    # The weights at zero are the limit; the formula has a pole there.
    frequency[0] = step * 1e-3
    weights = dose_weights(
        frequency,
        dose_per_frame=dose_per_frame,
        n_frames=n,
        pre_exposure=pre_exposure,
        voltage_kV=voltage_kV,
    ).numpy()
    left, values, right = np.linalg.svd(weights, full_matrices=False)
    rank = 1
    while (
        np.abs((left[:, :rank] * values[:rank]) @ right[:rank] - weights).max() > _TOLERANCE * weights.max()
    ):
        rank += 1
    by_frame = (left[:, :rank] * values[:rank]).T
    return DoseFilter(by_frame, right[:rank].astype(np.float32), float(step))


def move_and_add(
    counts: NDArray,
    gain: NDArray[np.float32],
    displacement_px: NDArray,
    recipe: Recipe,
    *,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
    beyond: NDArray[np.float32] | None = None,
    device: str = "cpu",
) -> NDArray[np.float32]:
    """Move every frame back by the displacement of its specimen, and add them up.

    Interpolation is by a Kaiser-windowed sinc of eight taps along each axis, once. Blocks of 32 x 32 pixels
    move as one: within them, motion differs by some hundredths of a pixel, at worst by a quarter.

    Parameters
    ----------
    counts : array (n, h, w)
        Frames in any real type.
    gain : array (h, w)
        What they are multiplied by.
    displacement_px : array (n, by, bx, 2)
        Displacement (x, y) in pixels at the centre of each block (`block_centres`).
    recipe : Recipe
        The sums wanted.
    rows, columns : tuple of 2 int, optional
        First and last + 1 wanted, the first a multiple of a block's; all if not given.
    beyond : array (n, by, bx) float32, optional
        What stands beyond the edges of a frame, for each block; `background` if not given.
    device : str
        "cpu" for compiled code, else torch's device.

    Returns
    -------
    array (n_sums, rows, columns) float32
        That part of the sums.
    """
    steps = np.rint(displacement_px * _FRACTIONS).astype(np.int64)
    whole = steps // _FRACTIONS
    part = steps - whole * _FRACTIONS
    fill = background(counts, gain) if beyond is None else beyond
    top, bottom = rows or (0, counts.shape[1])
    left, right = columns or (0, counts.shape[2])
    if device != "cpu":
        part_of_field = (top, bottom), (left, right)
        return _move_on_device(counts, gain, fill, whole, part, recipe, part_of_field, device)
    sums = np.empty((recipe.n_sums, bottom - top, right - left), np.float32)
    strip = 2 * kernels.BLOCK_Y

    def work(start: int) -> None:
        kernels.move_and_add(
            counts,
            gain,
            fill,
            whole,
            part,
            _taps(),
            recipe.first,
            recipe.target,
            recipe.weight,
            start,
            left,
            sums[:, start - top : min(start + strip, bottom) - top],
        )

    in_threads(work, range(top, bottom, strip))
    return sums


def block_centres(shape: tuple[int, int]) -> tuple[NDArray, NDArray]:
    """Rows and columns, in pixels, of the centres of the blocks that move as one."""
    y, x = (
        (np.arange(0, side, block) + np.minimum(np.arange(0, side, block) + block, side) - 1) / 2
        for side, block in zip(shape, BLOCK, strict=True)
    )
    return y, x


def shrink_frames(
    counts: NDArray, gain: NDArray[np.float32], factor: int, groups: Sequence[range]
) -> NDArray[np.float32]:
    """Sums of groups of frames, with pixels of `factor` x `factor` gain-corrected ones: (groups, h, w)."""
    h, w = (side // factor for side in counts.shape[1:])
    shrunk = np.zeros((len(groups), h, w), np.float32)

    def work(number: int) -> None:
        frame = np.empty((h, w), np.float32)
        for f in groups[number]:
            kernels.shrink(counts[f], gain, factor, frame)
            shrunk[number] += frame

    in_threads(work, range(len(groups)))
    return shrunk


def weigh_by_dose(
    sums: NDArray[np.float32], dose_filter: DoseFilter, *, pixel_size: float, new_shape: tuple[int, int]
) -> NDArray[np.float32]:
    """Dose-weighted image of `new_shape` from the sums (r, h, w) of a factored dose filter."""
    shape = sums.shape[1], sums.shape[2]
    ky, kx = np.fft.fftfreq(shape[0], pixel_size), np.fft.rfftfreq(shape[1], pixel_size)
    total = np.zeros((len(ky), len(kx)), np.complex64)
    cuts = list(pairwise(np.linspace(0, shape[0], torch.get_num_threads() + 1).astype(int)))
    # One after another: of a large image a transform takes as much memory as ten frames.
    for image, factor in zip(sums, dose_filter.by_frequency, strict=True):
        spectrum = rfft2(torch.from_numpy(image)).numpy()

        def work(some: tuple[int, int], spectrum: NDArray = spectrum, factor: NDArray = factor) -> None:
            rows = slice(*some)
            kernels.add_filtered(spectrum[rows], factor, ky[rows], kx, dose_filter.step, total[rows])

        in_threads(work, cuts)
    return _back(torch.from_numpy(total), shape, new_shape)


def bin_image(image: NDArray[np.float32], new_shape: tuple[int, int]) -> NDArray[np.float32]:
    """Shrink an image by Fourier cropping; its mean and its first pixel's place stay, as in RELION."""
    shape = image.shape[0], image.shape[1]
    return image if shape == new_shape else _back(rfft2(torch.from_numpy(image)), shape, new_shape)


def _back(spectrum: torch.Tensor, shape: tuple[int, int], new_shape: tuple[int, int]) -> NDArray[np.float32]:
    if shape != new_shape:
        spectrum = resize_spectrum(spectrum, shape=shape, new_shape=new_shape)
    return irfft2(spectrum, shape=new_shape).numpy()


@cache
def _taps() -> NDArray[np.float32]:
    """Weights (fractions, taps) of a windowed sinc, each row adding up to 1."""
    half = kernels.TAPS // 2
    offset = np.arange(kernels.TAPS) - (half - 1) - np.arange(_FRACTIONS)[:, None] / _FRACTIONS
    window = np.i0(_KAISER * np.sqrt(np.maximum(1 - np.square(offset / half), 0)))
    taps = np.sinc(offset) * window
    # What does not move stays as it is: the sine of whole turns is not exactly zero.
    taps[0] = offset[0] == 0
    return (taps / taps.sum(axis=1, keepdims=True)).astype(np.float32)


def background(counts: NDArray, gain: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of each frame near every block, which adds nothing to what is seen: (n, by, bx)."""
    h, w = counts.shape[1:]
    factor = max(1, min(h, w) // _BACKGROUND)
    # A hundred rows or so are enough for a mean.
    rows = np.arange(0, h, max(1, h // 128))
    sample = np.stack([frame[rows].astype(np.float32) * gain[rows] for frame in counts])
    row_of, column_of = rows // factor, np.arange(w) // factor
    by_column = np.add.reduceat(sample, np.flatnonzero(np.diff(column_of, prepend=-1)), axis=2)
    total = np.add.reduceat(by_column, np.flatnonzero(np.diff(row_of, prepend=-1)), axis=1)
    mean = total / (np.bincount(row_of)[:, None] * np.bincount(column_of))
    # The last coarse block may have no sampled row.
    y, x = (
        np.minimum(np.arange(0, side, block) // factor, count - 1)
        for side, block, count in zip((h, w), BLOCK, mean.shape[1:], strict=True)
    )
    return np.ascontiguousarray(mean[:, y][:, :, x], np.float32)


def _move_on_device(
    counts: NDArray,
    gain: NDArray[np.float32],
    fill: NDArray[np.float32],
    whole: NDArray,
    part: NDArray,
    recipe: Recipe,
    part_of_field: tuple[tuple[int, int], tuple[int, int]],
    device: str,
) -> NDArray[np.float32]:
    """The body for GPUs: the same sums, frame by frame, gathering the neighbours of all pixels at once."""
    h, w = counts.shape[1:]
    factor = torch.from_numpy(gain).to(device)
    y, x = (torch.arange(*span, device=device) for span in part_of_field)
    block = (y // kernels.BLOCK_Y)[:, None], (x // kernels.BLOCK_X)[None, :]
    taps = torch.from_numpy(_taps()).to(device)
    sums = torch.zeros(recipe.n_sums, len(y), len(x), device=device)
    before = kernels.TAPS // 2 - 1
    for f in range(len(counts)):
        # float32 first: torch has no arithmetic on unsigned 16 bits.
        frame = torch.from_numpy(counts[f].astype(np.float32)).to(device) * factor
        moves = torch.from_numpy(whole[f]).to(device)[block]
        parts = torch.from_numpy(part[f]).to(device)[block]
        beyond = torch.from_numpy(fill[f]).to(device)[block]
        x0, y0 = x + moves[..., 0] - before, y[:, None] + moves[..., 1] - before
        along_x, along_y = taps[parts[..., 0]], taps[parts[..., 1]]
        moved = torch.zeros_like(sums[0])
        for i in range(kernels.TAPS):
            line = torch.zeros_like(moved)
            inside_y = (y0 + i >= 0) & (y0 + i < h)
            row = (y0 + i).clamp(0, h - 1) * w
            for j in range(kernels.TAPS):
                inside = inside_y & (x0 + j >= 0) & (x0 + j < w)
                value = frame.view(-1)[row + (x0 + j).clamp(0, w - 1)]
                line += along_x[..., j] * torch.where(inside, value, beyond)
            moved += along_y[..., i] * line
        for place in range(recipe.first[f], recipe.first[f + 1]):
            sums[recipe.target[place]] += float(recipe.weight[place]) * moved
    return sums.cpu().numpy()
