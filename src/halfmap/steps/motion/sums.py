"""Sums of a movie's frames, moved to where the first was: what micrographs and spectra are made of."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from halfmap.data.motion import MotionTracks
from halfmap.ops.threads import one_blas_thread
from halfmap.steps.motion import correct, spectrum
from halfmap.steps.motion.frames import Frames

if TYPE_CHECKING:
    from halfmap.steps.motion.step import MotionStep

ALIKE = 1e-4
"""Pixels count as square if their sides differ by no more than this part."""

_NEAR = 0.01
"""A micrograph's pixels may be larger or smaller than asked for by this part, to be square."""


@dataclass(frozen=True, eq=False)
class Sums:
    """What is written of a movie.

    Attributes
    ----------
    weighted : array (h, w) or None
        Dose-weighted sum.
    even, odd : array (h, w)
        Sums of every other frame; the first used frame is of the even ones, as in RELION.
    spectrum : array (512, 512)
        Amplitude spectrum of groups of frames.
    spectrum_pixel_size : float
        Its pixel size in Å.
    """

    weighted: NDArray[np.float32] | None
    even: NDArray[np.float32]
    odd: NDArray[np.float32]
    spectrum: NDArray[np.float32]
    spectrum_pixel_size: float


def sum_frames(frames: Frames, tracks: MotionTracks, step: MotionStep, device: str) -> Sums:
    """Move every frame to where the first was and add: even and odd ones, by dose, in groups for the CTF."""
    n, pixel = len(frames.counts), tracks.pixel_size
    dose_filter = correct.factor_dose_weights(
        n,
        pixel_size=pixel,
        dose_per_frame=tracks.dose_per_frame,
        pre_exposure=tracks.pre_exposure + (tracks.first_frame - 1) * tracks.dose_per_frame,
        voltage_kV=tracks.voltage_kV,
    )
    weights = dose_filter.by_frame if step.dose_weighting else np.zeros((0, n))
    parity = np.arange(n) % 2
    kept = np.concatenate([[parity == 0, parity == 1], weights])
    per_group = max(1, round(step.spectrum_dose / tracks.dose_per_frame))
    grouped = np.arange(n) // per_group == np.arange(-(-n // per_group))[:, None]
    sums = np.empty((len(kept), *tracks.shape), np.float32)
    total = _move_part_by_part(
        frames,
        block_displacements(tracks),
        correct.make_recipe(np.concatenate([kept, grouped])),
        sums,
        spectrum.tile_side(pixel, tracks.shape),
        device,
    )
    new_shape, _ = binned_shape(tracks.shape, step.binning)
    weighted = None
    if step.dose_weighting:
        weighted = correct.weigh_by_dose(sums[2:], dose_filter, pixel_size=pixel, new_shape=new_shape)
    amplitude, spectrum_pixel_size = spectrum.amplitude_spectrum(total, pixel)
    return Sums(
        weighted=weighted,
        even=correct.bin_image(sums[0], new_shape),
        odd=correct.bin_image(sums[1], new_shape),
        spectrum=amplitude,
        spectrum_pixel_size=spectrum_pixel_size,
    )


def binned_shape(shape: tuple[int, int], binning: float) -> tuple[tuple[int, int], float]:
    """Even shape of a micrograph, and what its pixels are exactly larger by along x.

    Of the shapes whose pixels are square it is the nearest to the size asked for, up to a hundredth away;
    where there is none, y and x are rounded each by itself.
    """
    if binning == 1:
        return shape, 1.0
    height, width = shape
    new = _even(height / binning), _even(width / binning)
    if not _is_square(shape, new):
        low, high = _even(height / binning * (1 - _NEAR)), _even(height / binning * (1 + _NEAR))
        near = [(y, _even(y * width / height)) for y in range(low, min(high, height) + 1, 2)]
        square = [candidate for candidate in near if _is_square(shape, candidate)]
        new = min(square, key=lambda candidate: abs(candidate[0] * binning / height - 1), default=new)
    return new, width / new[1]


def _even(size: float) -> int:
    return max(2, 2 * round(size / 2))


def _is_square(shape: tuple[int, int], new: tuple[int, int]) -> bool:
    return abs(shape[0] / new[0] / (shape[1] / new[1]) - 1) <= ALIKE


def _move_part_by_part(
    frames: Frames,
    displacement: NDArray,
    recipe: correct.Recipe,
    sums: NDArray[np.float32],
    side: int,
    device: str,
) -> NDArray:
    """Write the first sums of a recipe to `sums`; the power spectrum of the others, tile by tile.

    Sums of groups of frames are needed only for their spectrum, in tiles of `side` pixels: one part of the
    field after another, as large as a tile or little more, saves the memory of all of them.
    """
    beyond = correct.background(frames.counts, frames.gain)
    total = np.zeros((side, side // 2 + 1))
    rows, columns = (
        _parts(length, block, side) for length, block in zip(sums.shape[1:], correct.BLOCK, strict=True)
    )
    for y in rows:
        for x in columns:
            part = correct.move_and_add(
                frames.counts,
                frames.gain,
                displacement,
                recipe,
                rows=y,
                columns=x,
                beyond=beyond,
                device=device,
            )
            sums[:, slice(*y), slice(*x)] = part[: len(sums)]
            spectrum.add_spectra(total, part[len(sums) :])
    return total


def _parts(length: int, block: int, least: int) -> list[tuple[int, int]]:
    """Parts of an axis, each of whole blocks but the last, and none shorter than `least`."""
    n_blocks = length // block
    count = max(1, n_blocks // -(-least // block))
    edges = (np.linspace(0, n_blocks, count + 1).astype(int) * block).tolist()
    edges[-1] = length
    return list(pairwise(edges))


def block_displacements(tracks: MotionTracks) -> NDArray:
    """Displacement (x, y) of the specimen in pixels at the centres of blocks: (n, by, bx, 2)."""
    y, x = correct.block_centres(tracks.shape)
    with one_blas_thread():
        local = np.stack([tracks.local_field(x, y, frame) for frame in range(tracks.n_used)])
    return -(tracks.global_shift[:, None, None] + local)
