"""Move images: as a whole in Fourier space, and along a smooth field of displacements."""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.ops import fourier, grids


def spline_response(shape: tuple[int, int]) -> Tensor:
    """What a periodic image's half-spectrum is divided by to give that of its cubic B-spline coefficients.

    References
    ----------
    .. [1] Unser 1999, IEEE Signal Process. Mag. 16, 22-38, DOI 10.1109/79.799930
    """
    return ((2 + torch.cos(2 * torch.pi * grids.frequencies(shape))) / 3).prod(-1)


def spline_coefficients(image: Tensor) -> NDArray[np.float32]:
    """Coefficients (h, w) of the cubic B-spline through a periodic image."""
    shape = (image.shape[0], image.shape[1])
    return fourier.irfft2(fourier.rfft2(image) / spline_response(shape), shape=shape).numpy()


@numba.njit(parallel=True, cache=True, fastmath=True)
def displace(
    spectra: NDArray, weights: NDArray, shift_px: NDArray, smear_px: NDArray, moved: NDArray
) -> None:
    """Filter and shift images of even width, each blurred along a straight way at even speed.

    Parameters
    ----------
    spectra : array (n, h, w // 2 + 1), complex64
        Half-spectra.
    weights : array (h, w // 2 + 1), float32
        Filter.
    shift_px, smear_px : array (n, 2)
        Shift (x, y), exact to any fraction of a pixel, and the whole way (x, y), in pixels.
    moved : array as `spectra`
        Result: spectra * weights * exp(-2 pi i k . shift) * sinc(k . smear).
    """
    count, h, columns = spectra.shape
    w = 2 * (columns - 1)
    for task in numba.prange(count * h):
        i, iy = task // h, task % h
        ky = (iy if iy < (h + 1) // 2 else iy - h) / h
        # Phases grow evenly along a row: turning by a step replaces a sine and a cosine per coefficient.
        phase, half = -2 * np.pi * ky * shift_px[i, 1], np.pi * ky * smear_px[i, 1]
        phase_step, half_step = -2 * np.pi * shift_px[i, 0] / w, np.pi * smear_px[i, 0] / w
        factor, turn = np.exp(1j * phase), np.exp(1j * phase_step)
        blur, blur_turn = np.exp(1j * half), np.exp(1j * half_step)
        for ix in range(columns):
            angle = half + ix * half_step
            weight = weights[iy, ix] * (blur.imag / angle if abs(angle) > 1e-3 else 1.0)
            moved[i, iy, ix] = spectra[i, iy, ix] * np.complex64(weight * factor)
            factor *= turn
            blur *= blur_turn


@numba.njit(parallel=True, cache=True, fastmath=True)
def illuminate(
    passing: NDArray,
    below: NDArray,
    above: NDArray,
    number: int,
    count: int,
    weights: NDArray,
    particles: NDArray,
    nodes: NDArray,
    step: int,
    common_px: NDArray,
    margin: int,
    out: NDArray,
) -> None:
    """Intensity of a frame: transmission times (1 + ice + particles), what moves with the specimen warped.

    Only where the ice's noise is that of two given planes or between them.

    Parameters
    ----------
    passing : array (h + 2 margin, w + 2 margin), float32
        Spline coefficients of the transmission, as it was in the first frame.
    below, above : array (h + 2 margin, w + 2 margin), float32
        Those of the ice's noise at two defoci, the motion common to all already applied.
    number, count : int
        Number of the plane `below`, from 0, and of all planes; the next one is `above`, if there is any.
    weights : array (3,), float32
        Plane of noise, from 0, at the frame's first pixel, and its change per pixel along x and y.
    particles : array (h, w), float32
        Relative change of intensity by particles, where they are in this frame.
    nodes : array (ny, nx, 2), float32
        Position (x, y) in pixels of the specimen, in the first frame, that is seen at every `step`-th pixel.
    step : int
        Spacing of the nodes in pixels.
    common_px : array (2,), float32
        Motion (x, y) common to all.
    margin : int
        Pixels that the layers extend beyond the frame on the low sides.
    out : array (h, w), float32
        Result.
    """
    h, w = out.shape
    last = max(count - 2, 0)
    for y in numba.prange(h):
        row, part = y // step, np.float32((y % step) / step)
        line = nodes[row] + part * (nodes[row + 1] - nodes[row]) + np.float32(margin)
        wx, wy = np.empty(4, np.float32), np.empty(4, np.float32)
        for x in range(w):
            place = min(
                max(weights[0] + weights[1] * x + weights[2] * y, np.float32(0)), np.float32(count - 1)
            )
            if min(int(place), last) != number:
                continue
            column, along = x // step, np.float32((x % step) / step)
            source_x = line[column, 0] + along * (line[column + 1, 0] - line[column, 0])
            source_y = line[column, 1] + along * (line[column + 1, 1] - line[column, 1])
            ix, iy = int(source_x), int(source_y)
            _spline(source_x - np.float32(ix), wx)
            _spline(source_y - np.float32(iy), wy)
            transmission = _sample(passing, ix, iy, wx, wy)
            source_x, source_y = source_x + common_px[0], source_y + common_px[1]
            ix, iy = int(source_x), int(source_y)
            _spline(source_x - np.float32(ix), wx)
            _spline(source_y - np.float32(iy), wy)
            ice = _sample(below, ix, iy, wx, wy)
            if place > number:
                ice += (place - number) * (_sample(above, ix, iy, wx, wy) - ice)
            out[y, x] = transmission * (1 + ice + particles[y, x])


@numba.njit(inline="always")
def _sample(layer: NDArray, ix: int, iy: int, wx: NDArray, wy: NDArray) -> np.float32:
    """Sum of 4 x 4 spline coefficients around a point between (ix, iy) and the next."""
    total = np.float32(0)
    for j in range(4):
        line = layer[iy - 1 + j]
        total += wy[j] * (
            wx[0] * line[ix - 1] + wx[1] * line[ix] + wx[2] * line[ix + 1] + wx[3] * line[ix + 2]
        )
    return total


@numba.njit(inline="always")
def _spline(t: np.float32, weights: NDArray) -> None:
    """Cubic B-spline at the four samples around a point `t` after the second."""
    s = 1 - t
    weights[0] = s * s * s / 6
    weights[1] = (4 - 3 * t * t * (2 - t)) / 6
    weights[2] = (4 - 3 * s * s * (2 - s)) / 6
    weights[3] = t * t * t / 6
