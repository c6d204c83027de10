"""Compiled CPU kernels over the spectra of one patch's frames; rings numbered as in `likelihood.Band`."""

from __future__ import annotations

import math

import numpy as np
from numba import njit


@njit(nogil=True, cache=True, fastmath={"contract", "nsz", "reassoc"})
def cut_patch(frames, top, left, offset, edges, limit, patch):
    """Cut a patch (n, h, w) that follows `offset` (n, 2) out of frames: no mean, no outliers, soft edges."""
    n, height, width = frames.shape
    h, w = patch.shape[1:]
    for f in range(n):
        y, x = top + offset[f, 1], left + offset[f, 0]
        y0, y1, x0, x1 = max(y, 0), min(y + h, height), max(x, 0), min(x + w, width)
        patch[f] = 0
        if y0 >= y1 or x0 >= x1:
            continue
        total = 0.0
        for i in range(y0, y1):
            row = np.float32(0)
            for value in frames[f, i, x0:x1]:
                row += value
            total += row
        mean = np.float32(total / ((y1 - y0) * (x1 - x0)))
        for i in range(y0, y1):
            line, out = frames[f, i, x0:x1], patch[f, i - y, x0 - x : x1 - x]
            edge, along = edges[0][i - y], edges[1][x0 - x : x1 - x]
            for j in range(x1 - x0):
                out[j] = min(max(line[j] - mean, -limit), limit) * (edge * along[j])


@njit(nogil=True, cache=True)
def ring_power(spectra, ring, half, n_rings):
    """Mean over frames (n, ky, kx) of the power, summed over each ring: (n_rings,)."""
    n, rows, columns = spectra.shape
    total = np.zeros(n_rings + 1)
    for f in range(n):
        for i in range(rows):
            for j in range(columns):
                value = spectra[f, i, j]
                total[ring[i, j]] += half[j] * (value.real * value.real + value.imag * value.imag)
    return total[:n_rings] / n


@njit(nogil=True, cache=True, fastmath={"contract", "nsz"})
def turn_and_sum(spectra, shift, kx, ky, damage, ring, half, total):
    """Multiply frames by exp(2 pi i k.shift), write sum_f damage_f spectrum_f, return its power by rings."""
    n, rows, columns = spectra.shape
    n_rings = damage.shape[1] - 1
    cos_x, sin_x = np.empty(columns, np.float32), np.empty(columns, np.float32)
    total[:] = 0
    for f in range(n):
        for j in range(columns):
            angle = 2 * math.pi * shift[f, 0] * kx[j]
            cos_x[j], sin_x[j] = math.cos(angle), math.sin(angle)
        fading = damage[f]
        for i in range(rows):
            angle = 2 * math.pi * shift[f, 1] * ky[i]
            cos_y, sin_y = np.float32(math.cos(angle)), np.float32(math.sin(angle))
            line, out, at = spectra[f, i], total[i], ring[i]
            for j in range(columns):
                re, im = line[j].real, line[j].imag
                turn_re = cos_y * cos_x[j] - sin_y * sin_x[j]
                turn_im = cos_y * sin_x[j] + sin_y * cos_x[j]
                line[j] = complex(re * turn_re - im * turn_im, re * turn_im + im * turn_re)
                out[j] += fading[at[j]] * line[j]
    power = np.zeros(n_rings + 1)
    for i in range(rows):
        for j in range(columns):
            value = total[i, j]
            power[ring[i, j]] += half[j] * (value.real * value.real + value.imag * value.imag)
    return power[:n_rings]


@njit(nogil=True, cache=True, fastmath={"contract", "nsz", "reassoc"})
def gradients(spectra, total, kx, ky, damage, weight, ring, half):
    """Derivatives (n, 2) of sum_k A |Z|² by the displacements of the frames."""
    n, rows, columns = spectra.shape
    result = np.zeros((n, 2))
    weighted = np.empty((rows, columns), np.complex64)
    for i in range(rows):
        for j in range(columns):
            weighted[i, j] = total[i, j] * np.float32(half[j] * weight[ring[i, j]])
    for f in range(n):
        fading = damage[f]
        slope_x, slope_y = 0.0, 0.0
        for i in range(rows):
            line, other, at = spectra[f, i], weighted[i], ring[i]
            row, row_x = np.float32(0), np.float32(0)
            for j in range(columns):
                # Imaginary part of conj(Z) Y.
                value = other[j].real * line[j].imag - other[j].imag * line[j].real
                value *= fading[at[j]]
                row += value
                row_x += value * kx[j]
            slope_x += row_x
            slope_y += row * ky[i]
        result[f, 0], result[f, 1] = -4 * math.pi * slope_x, -4 * math.pi * slope_y
    return result
