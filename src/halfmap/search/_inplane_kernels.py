"""Compiled kernel that moves images on rings of Fourier space, for the CPU."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


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
                while known < rings:
                    c, s = np.float32(np.cos(known * phase)), np.float32(np.sin(known * phase))
                    more = min(known, np.uint64(rings) - known)
                    low_real, low_imaginary = real[:more], imaginary[:more]
                    high_real, high_imaginary = real[known : known + more], imaginary[known : known + more]
                    for r in range(more):
                        high_real[r] = c * low_real[r] - s * low_imaginary[r]
                        high_imaginary[r] = c * low_imaginary[r] + s * low_real[r]
                    known += more
                front, back = out[a, b, t], out[half + a, b, t]
                for r in range(rings):
                    moved_real = x[r] * real[r] - y[r] * imaginary[r]
                    moved_imaginary = x[r] * imaginary[r] + y[r] * real[r]
                    front[r] = moved_real + moved_imaginary
                    back[r] = moved_real - moved_imaginary
