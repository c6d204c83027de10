"""Compiled kernels that move images on rings of Fourier space and make posteriors, for the CPU."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

_LEAST = np.float32(-80.0)
"""Logarithm of what counts as nothing; less would be slow, as numbers without a leading 1 are."""

_LOG2_E, _LN_2, _LN_2_REST = np.float32(1.442695041), np.float32(0.693359375), np.float32(-2.12194440e-4)
_ONE, _HALF, _BIAS = np.float32(1), np.float32(0.5), np.int32(127)
_C3, _C4, _C5, _C6 = np.float32(1 / 6), np.float32(1 / 24), np.float32(1 / 120), np.float32(1 / 720)


@njit(nogil=True, cache=True, fastmath={"contract", "nsz", "reassoc"})
def move(
    linear: NDArray[np.complex64],
    shifts: NDArray[np.float32],
    cosine: NDArray[np.float64],
    sine: NDArray[np.float64],
    turn: float,
    out: NDArray[np.float32],
) -> None:
    """Hartley transforms of images at all their shifts.

    Parameters
    ----------
    linear : array (angles / 2, b, rings)
        Samples on half circles.
    shifts : array (b, t, 2)
        In pixels, (x, y).
    cosine, sine : array (angles / 2,)
        Of the angles.
    turn : float
        Phase of one Fourier pixel times one pixel: -2 pi over the box.
    out : array (angles, b, t, rings)
        Filled.

    Notes
    -----
    Along a radius the phase factors of a shift are powers of one number; they are made by doubling.
    """
    half, batch, rings = linear.shape
    moves = shifts.shape[1]
    real, imaginary = np.empty(rings, np.float32), np.empty(rings, np.float32)
    x, y = np.empty(rings, np.float32), np.empty(rings, np.float32)
    for a in range(half):
        for b in range(batch):
            row = linear[a, b]
            for r in range(rings):
                x[r] = row[r].real
                y[r] = row[r].imag
            for t in range(moves):
                phase = turn * (cosine[a] * shifts[b, t, 0] + sine[a] * shifts[b, t, 1])
                real[0], imaginary[0] = np.float32(1.0), np.float32(0.0)
                known = np.uint64(1)
                cosine_known, sine_known = np.cos(phase), np.sin(phase)
                while known < rings:
                    c, s = np.float32(cosine_known), np.float32(sine_known)
                    more = min(known, np.uint64(rings) - known)
                    low_real, low_imaginary = real[:more], imaginary[:more]
                    high_real, high_imaginary = real[known : known + more], imaginary[known : known + more]
                    for r in range(more):
                        high_real[r] = c * low_real[r] - s * low_imaginary[r]
                        high_imaginary[r] = c * low_imaginary[r] + s * low_real[r]
                    known += more
                    cosine_known, sine_known = (
                        cosine_known * cosine_known - sine_known * sine_known,
                        2 * cosine_known * sine_known,
                    )
                front, back = out[a, b, t], out[half + a, b, t]
                for r in range(rings):
                    moved_real = x[r] * real[r] - y[r] * imaginary[r]
                    moved_imaginary = x[r] * imaginary[r] + y[r] * real[r]
                    front[r] = moved_real + moved_imaginary
                    back[r] = moved_real - moved_imaginary


@njit(nogil=True, cache=True, fastmath={"contract", "nsz", "reassoc"})
def move_back(
    values: NDArray[np.float32],
    shifts: NDArray[np.float32],
    cosine: NDArray[np.float64],
    sine: NDArray[np.float64],
    turn: float,
    out: NDArray[np.complex64],
) -> None:
    """Samples of the sum of images, each moved back by its shift: what `move` does, the other way round.

    Parameters
    ----------
    values : array (angles, b, t, rings)
        Hartley transforms.
    shifts, cosine, sine, turn
        As `move` has them.
    out : array (angles / 2, b, rings)
        Filled.
    """
    half, batch, rings = out.shape
    x, y = np.empty(rings, np.float32), np.empty(rings, np.float32)
    for a in range(half):
        for b in range(batch):
            x[:] = 0
            y[:] = 0
            for t in range(shifts.shape[1]):
                phase = -turn * (cosine[a] * shifts[b, t, 0] + sine[a] * shifts[b, t, 1])
                c, s = np.float32(np.cos(phase)), np.float32(np.sin(phase))
                real, imaginary = np.float32(0.5), np.float32(0.0)
                front, back = values[a, b, t], values[half + a, b, t]
                for r in range(rings):
                    even, odd = front[r] + back[r], front[r] - back[r]
                    x[r] += even * real - odd * imaginary
                    y[r] += even * imaginary + odd * real
                    real, imaginary = real * c - imaginary * s, real * s + imaginary * c
            for r in range(rings):
                out[a, b, r] = complex(x[r], y[r])


@njit(nogil=True, inline="always")
def _exp(x):
    """Exponential function from -87 to 0, as vector code: 2^n times a series about 0."""
    n = np.int32(x * _LOG2_E - _HALF)
    whole = np.float32(n)
    r = (x - whole * _LN_2) - whole * _LN_2_REST
    series = _HALF + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6)))
    return (_ONE + r + r * r * series) * np.int32((n + _BIAS) << 23).view(np.float32)


@njit(nogil=True, fastmath={"nnan", "nsz", "contract"})
def _exponentials(row, greatest, to, mass):
    for c in range(row.size):
        x = row[c] - greatest
        value = _exp(x if x > _LEAST else _LEAST)
        to[c] = value
        mass[c] += value


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz", "contract"})
def posterior(likely, greatest, out, mass, first):
    """Probabilities of some images from their logarithms.

    Parameters
    ----------
    likely : array (angles, b', c) float32
        Logarithms, but for a constant.
    greatest : array (b',) float32
        Of each image.
    out : array (angles, b, c) float32
        Filled with probabilities, whose sum is 1.
    mass : array (b, c) float32
        Filled with their sums over angles.
    first : int
        Place of the first image among those of `out` and `mass`.

    Returns
    -------
    array (b',) float32
        Logarithms of the sums of the exponentials of `likely`.
    """
    evidence = np.empty_like(greatest)
    for b in range(greatest.size):
        held, total = mass[first + b], 0.0
        held[:] = 0
        for a in range(likely.shape[0]):
            _exponentials(likely[a, b], greatest[b], out[a, first + b], held)
        for c in range(held.size):
            total += held[c]
        scale = np.float32(1 / total)
        held *= scale
        for a in range(likely.shape[0]):
            out[a, first + b] *= scale
        evidence[b] = greatest[b] + np.log(total)
    return evidence
