"""Compiled CPU kernel that moves the frames of a movie and adds them up, each pixel read once."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

BLOCK_Y, BLOCK_X = 32, 32
"""Rows and columns of pixels that are moved together."""

TAPS = 8
"""Pixels along each axis that an interpolated value is made of."""


@njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def move_and_add(counts, gain, fill, whole, part, taps, first_target, targets, weights, top, left, sums):
    """Add moved frames to sums, over a part of the field.

    Parameters
    ----------
    counts : array (n, h, w)
        Frames, in any real type.
    gain : array (h, w) float32
        What counts are multiplied by.
    fill : array (n, by, bx) float32
        Value beyond the edges of a frame, for each block.
    whole, part : array (n, by, bx, 2) int64
        Where the content of a block is in a frame, less where it belongs, (x, y): whole pixels, and the rest
        as a row of `taps`.
    taps : array (m, TAPS) float32
        Weights of the neighbours of a position, by the part of a pixel.
    first_target : array (n + 1,) int64
        Frame f is added to the sums ``targets[first_target[f] : first_target[f + 1]]``.
    targets : array (m,) int64
        Numbers of sums.
    weights : array (m,) float32
        What a frame is multiplied by in a sum.
    top, left : int
        First row and column of the part, multiples of BLOCK_Y and BLOCK_X.
    sums : array (s, rows, columns) float32
        That part of every sum; written entirely.
    """
    n, h, w = counts.shape
    rows, columns = sums.shape[1:]
    before = TAPS // 2 - 1
    window = np.empty((BLOCK_Y + TAPS - 1, BLOCK_X + TAPS - 1), np.float32)
    along = np.empty((BLOCK_Y + TAPS - 1, BLOCK_X), np.float32)
    flat = along.reshape(-1)
    moved = np.empty(BLOCK_Y * BLOCK_X, np.float32)
    total = np.empty((sums.shape[0], BLOCK_Y * BLOCK_X), np.float32)
    for y in range(0, rows, BLOCK_Y):
        by, height = (top + y) // BLOCK_Y, min(BLOCK_Y, rows - y)
        for x in range(0, columns, BLOCK_X):
            bx, width = (left + x) // BLOCK_X, min(BLOCK_X, columns - x)
            total[:] = 0
            for f in range(n):
                x0, y0 = left + x + whole[f, by, bx, 0] - before, top + y + whole[f, by, bx, 1] - before
                high, wide = height + TAPS - 1, width + TAPS - 1
                if x0 >= 0 and y0 >= 0 and x0 + wide <= w and y0 + high <= h:
                    # Unsigned, for which Numba leaves out negative indices: four times as fast.
                    first_row, first_column = np.uint64(y0), np.uint64(x0)
                    for i in range(np.uint64(high)):
                        for j in range(np.uint64(wide)):
                            seen, factor = (
                                counts[f, first_row + i, first_column + j],
                                gain[first_row + i, first_column + j],
                            )
                            window[i, j] = np.float32(seen) * factor
                else:
                    for i in range(high):
                        for j in range(wide):
                            if 0 <= y0 + i < h and 0 <= x0 + j < w:
                                window[i, j] = np.float32(counts[f, y0 + i, x0 + j]) * gain[y0 + i, x0 + j]
                            else:
                                window[i, j] = fill[f, by, bx]
                t0, t1, t2, t3, t4, t5, t6, t7 = taps[part[f, by, bx, 0]]
                for i in range(BLOCK_Y + TAPS - 1):
                    line, out = window[i], along[i]
                    for j in range(BLOCK_X):
                        out[j] = (
                            t0 * line[j]
                            + t1 * line[j + 1]
                            + t2 * line[j + 2]
                            + t3 * line[j + 3]
                            + t4 * line[j + 4]
                            + t5 * line[j + 5]
                            + t6 * line[j + 6]
                            + t7 * line[j + 7]
                        )
                t0, t1, t2, t3, t4, t5, t6, t7 = taps[part[f, by, bx, 1]]
                for j in range(BLOCK_Y * BLOCK_X):
                    moved[j] = (
                        t0 * flat[j]
                        + t1 * flat[j + BLOCK_X]
                        + t2 * flat[j + 2 * BLOCK_X]
                        + t3 * flat[j + 3 * BLOCK_X]
                        + t4 * flat[j + 4 * BLOCK_X]
                        + t5 * flat[j + 5 * BLOCK_X]
                        + t6 * flat[j + 6 * BLOCK_X]
                        + t7 * flat[j + 7 * BLOCK_X]
                    )
                for place in range(first_target[f], first_target[f + 1]):
                    out, weight = total[targets[place]], weights[place]
                    for j in range(BLOCK_Y * BLOCK_X):
                        out[j] += weight * moved[j]
            for s in range(sums.shape[0]):
                for i in range(height):
                    for j in range(width):
                        sums[s, y + i, x + j] = total[s, i * BLOCK_X + j]


@njit(nogil=True, cache=True)
def shrink(counts, gain, factor, out):
    """Sum blocks of factor x factor gain-corrected pixels of one frame (h, w) into `out`."""
    rows, columns = out.shape
    line = np.empty(columns * factor, np.float32)
    for y in range(rows):
        line[:] = 0
        for i in range(factor):
            seen, scale = counts[y * factor + i], gain[y * factor + i]
            for j in range(columns * factor):
                line[j] += np.float32(seen[j]) * scale[j]
        for x in range(columns):
            total = np.float32(0)
            for j in range(factor):
                total += line[x * factor + j]
            out[y, x] = total


@njit(nogil=True, cache=True)
def add_filtered(spectrum, table, ky, kx, step, total):
    """Add table(|k|) times a spectrum; the table's entries are `step` apart, linear between them."""
    rows, columns = spectrum.shape
    for i in range(rows):
        for j in range(columns):
            place = math.sqrt(ky[i] * ky[i] + kx[j] * kx[j]) / step
            low = min(int(place), len(table) - 2)
            total[i, j] += spectrum[i, j] * (
                table[low] + np.float32(place - low) * (table[low + 1] - table[low])
            )


@njit(nogil=True, cache=True)
def add_power(spectrum, total):
    """Add the power of a spectrum (rows, columns) to a sum of others."""
    rows, columns = spectrum.shape
    for i in range(rows):
        for j in range(columns):
            value = spectrum[i, j]
            total[i, j] += value.real * value.real + value.imag * value.imag
