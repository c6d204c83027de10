"""Compiled loops over the pixels of particle images; they hold no lock of the interpreter."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

N_STATISTICS = 5
"""Level and spread of the background as it was; mean, spread and skewness of the particle as it is."""


_ANY_ORDER = {"reassoc", "contract"}
"""Sums may be taken in any order, the same one every time: several pixels at once."""


FRAYED_px = 4
"""Outermost pixels that a mirrored image is made without: motion correction may leave there what is none."""


@njit(nogil=True, cache=True)
def fold(place, length, mirror):
    """Pixel that stands for one beyond the edges: that mirrored just inside, or the edge's own."""
    if mirror:
        if place < FRAYED_px:
            place = 2 * FRAYED_px - place
        if place >= length - FRAYED_px:
            place = 2 * (length - 1 - FRAYED_px) - place
    return min(max(place, 0), length - 1)


@njit(nogil=True, cache=True)
def cut(image, mirror, left, top, boxes):
    """Cut boxes out of a micrograph, no larger than it.

    Parameters
    ----------
    image : array (h, w)
        Micrograph.
    mirror : bool
        Whether the image is mirrored just inside its edges, or their pixels repeated.
    left, top : array (b,)
        Column and row of each box's first pixel.
    boxes : array (b, n, n)
        Written to.
    """
    height, width = image.shape
    n = boxes.shape[1]
    frayed = FRAYED_px if mirror else 0
    for i in range(len(boxes)):
        first = min(max(frayed - left[i], 0), n)
        last = max(min(width - frayed - left[i], n), first)
        for y in range(n):
            row = image[fold(top[i] + y, height, mirror)]
            out = boxes[i, y]
            for x in range(first):
                out[x] = row[fold(left[i] + x, width, mirror)]
            out[first:last] = row[left[i] + first : left[i] + last]
            for x in range(last, n):
                out[x] = row[fold(left[i] + x, width, mirror)]


@njit(nogil=True, cache=True, fastmath=_ANY_ORDER)
def normalise(starts, stops, solve, subtract, divide, sign, images, statistics):
    """Subtract the background's plane or mean, divide by its standard deviation, turn the contrast; in place.

    Parameters
    ----------
    starts, stops : array (m,)
        First column of the circle around the particle in each row, and the first behind it; all else is
        background.
    solve : array (3, 3)
        Takes the background's sums of v, x v and y v, with x and y counted from the middle, to its plane.
    subtract : int
        0 nothing, 1 the mean, 2 the plane.
    divide : bool
        Whether to divide by the standard deviation; images without any stay as they are.
    sign : float
        -1 turns the contrast.
    images : array (b, m, m)
        Particles.
    statistics : array (b, N_STATISTICS)
        Written to.
    """
    m = images.shape[1]
    middle = m // 2
    n_inside = (stops - starts).sum()
    n_outside = m * m - n_inside
    sums = np.empty(3)
    for i in range(len(images)):
        image = images[i]
        # Against a value of the image: the sums of squares below must not drown in its level.
        level = image[0, 0]
        sums[:] = 0.0
        for y in range(m):
            of_row = 0.0
            # Parts of rows: what is counted from zero needs no look at the sign of its index.
            for first, last in ((0, starts[y]), (stops[y], m)):
                part, moment, total = image[y, first:last], 0.0, 0.0
                for x in range(len(part)):
                    value = np.float64(part[x] - level)
                    total += value
                    moment += x * value
                of_row += total
                sums[1] += moment + first * total
            sums[0] += of_row
            sums[2] += (y - middle) * of_row
        sums[1] -= middle * sums[0]
        mean = sums[0] / n_outside
        plane = solve @ sums
        if subtract < 2:
            plane[0], plane[1:] = mean, 0.0
        squares, moments = 0.0, np.zeros(3)
        for y in range(m):
            row = image[y]
            # Of the pixel 0 of this row, which the loops below count from.
            base = np.float32(level + plane[0] + plane[2] * (y - middle) - plane[1] * middle)
            slope = np.float32(plane[1])
            if subtract > 0:
                for x in range(m):
                    row[x] -= base + slope * np.float32(x)
                base, slope = np.float32(0), np.float32(0)
            for first, last in ((0, starts[y]), (stops[y], m)):
                for pixel in row[first:last]:
                    value = np.float64(pixel - base)
                    squares += value * value
            first, second, third = 0.0, 0.0, 0.0
            for pixel in row[starts[y] : stops[y]]:
                value = np.float64(pixel - base)
                first += value
                second += value * value
                third += value * value * value
            moments[0] += first
            moments[1] += second
            moments[2] += third
        spread = math.sqrt(squares / n_outside)
        gain = sign / spread if divide and spread > 0 else sign
        for y in range(m):
            row = image[y]
            for x in range(m):
                row[x] *= np.float32(gain)
        first, second, third = moments / n_inside
        variance = max(second - first * first, 0.0)
        statistics[i, 0] = level + mean
        statistics[i, 1] = spread
        statistics[i, 2] = gain * (first if subtract > 0 else first + level + mean)
        statistics[i, 3] = abs(gain) * math.sqrt(variance)
        skewness = third - 3 * first * second + 2 * first**3
        statistics[i, 4] = sign * skewness / variance**1.5 if variance > 0 else 0.0
