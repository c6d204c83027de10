"""Compiled kernels on the pixels of a movie: sums, bad pixels found, counts to replace theirs.

All of them are plain loops that hold no lock of the interpreter, to be called on strips of rows, on frames or
on parts of a list in threads, whose number changes nothing.
"""

from __future__ import annotations

import numpy as np
from numba import njit

TILE_px = 64
"""Median and spread of the counts are taken in tiles of this edge."""

_HALF_BOX_px = 15
"""The box whose mean a pixel is compared with reaches this far to every side."""

_STEP_px = 5
"""One pixel in so many along either axis tells the median and the spread of a tile."""

_CLIP = 6.0
"""Spreads from the tile's median at which counts are clipped for the mean of a box."""

_FEWEST = 8
"""Good pixels that a count is drawn from, at least."""

_MOST = 32

_RADIUS_px = 2
"""Of the box that counts are drawn from, where enough of it is good."""

_QUANTILE = 0.8
"""A hot block of 2 x 2 px or a dead line leaves four fifths of the neighbours good."""

_FAST = ("contract", "nsz", "reassoc")
"""Freedoms of the compiler that leave NaN and infinity as they are."""


@njit(nogil=True, cache=True)
def sum_frames(counts, begin, end, row, total):
    """Add up rows `begin` to `end` of all frames (n, h, w) into `total` (h, w).

    `row` (w,) is a buffer of the type that is summed in: an integer type sums counts fast and exactly.
    """
    n, width = counts.shape[0], counts.shape[2]
    for y in range(begin, end):
        row[:] = 0
        for frame in range(n):
            for x in range(width):
                row[x] += counts[frame, y, x]
        for x in range(width):
            total[y, x] = row[x]


@njit(nogil=True, cache=True)
def measure_tiles(total, gain, tile_y, counted, centre, spread):
    """Median and robust spread of gain-corrected counts in one row of tiles; NaN where few pixels are good.

    The spread of counts is not less than counting statistics would have it, since that of small ones, which
    take few values, is told poorly by their median deviation. Of other numbers the unit is not known: if most
    are equal, their spread is the largest deviation, and NaN if all are.
    """
    height, width = total.shape
    values = np.empty((TILE_px // _STEP_px + 1) ** 2)
    for tile_x in range(centre.shape[1]):
        found, gains = 0, 0.0
        for y in range(tile_y * TILE_px, min((tile_y + 1) * TILE_px, height), _STEP_px):
            for x in range(tile_x * TILE_px, min((tile_x + 1) * TILE_px, width), _STEP_px):
                if gain[y, x] > 0:
                    values[found] = total[y, x] * gain[y, x]
                    gains += gain[y, x]
                    found += 1
        centre[tile_y, tile_x] = spread[tile_y, tile_x] = np.nan
        if found >= 16:
            middle, unit = np.median(values[:found]), gains / found
            deviation = 1.4826 * np.median(np.abs(values[:found] - middle))
            centre[tile_y, tile_x] = middle
            if counted:
                deviation = max(deviation, np.sqrt(unit * max(middle, 0.0) + unit * unit))
            elif deviation == 0:
                deviation = np.max(np.abs(values[:found] - middle))
            spread[tile_y, tile_x] = deviation if deviation > 0 else np.nan


@njit(nogil=True, cache=True, fastmath=set(_FAST))
def _add_row(total, gain, centre, spread, y, sign, sums, numbers):
    """Add a row's good pixels, outliers clipped, to the sums of columns."""
    tile_y, width = y // TILE_px, total.shape[1]
    for tile_x in range(centre.shape[1]):
        low = centre[tile_y, tile_x] - np.float32(_CLIP) * spread[tile_y, tile_x]
        high = centre[tile_y, tile_x] + np.float32(_CLIP) * spread[tile_y, tile_x]
        for x in range(tile_x * TILE_px, min((tile_x + 1) * TILE_px, width)):
            factor = gain[y, x]
            weight = sign if factor > 0 else np.float32(0)
            sums[x + _HALF_BOX_px] += weight * min(max(total[y, x] * factor, low), high)
            numbers[x + _HALF_BOX_px] += weight


@njit(nogil=True, cache=True, fastmath=set(_FAST))
def deviations(total, gain, centre, spread, begin, end, counted, out):
    """How far pixels in rows `begin` to `end` are off the mean of the box around them.

    Parameters
    ----------
    total, gain : array (h, w) float32
        Sum of the frames, and gain; 0 where a pixel is bad.
    centre, spread : array (tiles y, tiles x) float32
        As `measure_tiles` gives them, NaN filled.
    begin, end : int
        Rows.
    counted : bool
        Whether to compare square roots of counts (Anscombe's transform), or numbers in units of the spread.
    out : array (end - begin, w) float32
        Deviations, 0 at bad pixels.
    """
    height, width = total.shape
    one, offset = np.float32(1), np.float32(0.375)
    # Padded, so that no box has a side: columns beyond the image hold nothing.
    sums = np.zeros(width + 2 * _HALF_BOX_px)
    numbers = np.zeros(width + 2 * _HALF_BOX_px)
    mean = np.empty(width, np.float32)
    for y in range(max(begin - _HALF_BOX_px, 0), min(begin + _HALF_BOX_px, height)):
        _add_row(total, gain, centre, spread, y, one, sums, numbers)
    for y in range(begin, end):
        if y + _HALF_BOX_px < height:
            _add_row(total, gain, centre, spread, y + _HALF_BOX_px, one, sums, numbers)
        if y > begin and y - _HALF_BOX_px - 1 >= 0:
            _add_row(total, gain, centre, spread, y - _HALF_BOX_px - 1, -one, sums, numbers)
        in_box, number = 0.0, 0.0
        for x in range(2 * _HALF_BOX_px):
            in_box += sums[x]
            number += numbers[x]
        for x in range(width):
            in_box += sums[x + 2 * _HALF_BOX_px]
            number += numbers[x + 2 * _HALF_BOX_px]
            mean[x] = in_box / max(number, 1.0)
            in_box -= sums[x]
            number -= numbers[x]
        row = out[y - begin]
        if counted:
            for x in range(width):
                factor = gain[y, x]
                expected = max(mean[x], np.float32(0)) / (factor if factor > 0 else one)
                change = np.sqrt(max(total[y, x], np.float32(0)) + offset) - np.sqrt(expected + offset)
                row[x] = change + change if factor > 0 else np.float32(0)
        else:
            for x in range(width):
                factor = gain[y, x]
                change = (total[y, x] * factor - mean[x]) / spread[y // TILE_px, x // TILE_px]
                row[x] = change if factor > 0 else np.float32(0)


@njit(nogil=True, cache=True)
def neighbour_levels(total, gain, places):
    """Gain-corrected counts that four fifths of a pixel's neighbours are below, and above.

    Parameters
    ----------
    total, gain
        As in `deviations`.
    places : array (m,) int32
        Flat indices of the pixels.

    Returns
    -------
    array (2, m) float32
        Of the good ones of the 24 neighbours; NaN where few are good.
    """
    height, width = total.shape
    out = np.full((2, places.size), np.nan, np.float32)
    values = np.empty(25)
    for i in range(places.size):
        y, x = places[i] // width, places[i] % width
        found = 0
        for v in range(max(y - 2, 0), min(y + 3, height)):
            for u in range(max(x - 2, 0), min(x + 3, width)):
                if gain[v, u] > 0 and (v != y or u != x):
                    values[found] = total[v, u] * gain[v, u]
                    found += 1
        if found >= _FEWEST:
            ordered = np.sort(values[:found])
            rank = int(_QUANTILE * (found - 1))
            out[0, i], out[1, i] = ordered[rank], ordered[found - 1 - rank]
    return out


@njit(nogil=True, cache=True)
def find_sources(gain, bad):
    """Good pixels to draw counts from, for every bad one.

    Those of a box of 5 x 5 px; where fewer than 8 of them are good, the box grows ring by ring, and a large
    defect takes from its nearest edge.

    Parameters
    ----------
    gain : array (h, w)
        0 where a pixel is bad.
    bad : array (m,) int32
        Flat indices of bad pixels.

    Returns
    -------
    sources : array (m, k) int32
        Flat indices of good pixels; the first few of each row count.
    n_sources : array (m,) int32
        How many.
    """
    height, width = gain.shape
    sources = np.zeros((bad.size, _MOST), np.int32)
    n_sources = np.zeros(bad.size, np.int32)
    for i in range(bad.size):
        y, x = bad[i] // width, bad[i] % width
        found = 0
        for radius in range(1, max(height, width)):
            if radius > _RADIUS_px and found >= _FEWEST:
                break
            for v in range(max(y - radius, 0), min(y + radius + 1, height)):
                inside = abs(v - y) < radius
                for u in range(x - radius, x + radius + 1, 2 * radius if inside else 1):
                    if 0 <= u < width and gain[v, u] > 0 and found < _MOST:
                        sources[i, found] = v * width + u
                        found += 1
        n_sources[i] = found
    return sources, n_sources


@njit(nogil=True, cache=True)
def replace(frame, gain, bad, sources, n_sources, key, number):
    """Give bad pixels of a frame the counts of good ones, drawn at random.

    Parameters
    ----------
    frame : array (h * w,)
        Counts, changed at `bad`.
    gain : array (h * w,)
        0 where a pixel is bad: a source that turned out bad is passed over.
    bad, sources, n_sources
        As in `find_sources`.
    key : uint64
        Decides the draws, together with the number of the frame and the place of the pixel.
    number : int
        Number of the frame in its movie.
    """
    for i in range(bad.size):
        n = n_sources[i]
        # SplitMix64's mixing function (Steele et al. 2014, DOI 10.1145/2660193.2660195).
        z = key + np.uint64(number) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) + np.uint64(bad[i]) * np.uint64(0xD1342543DE82EF95)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        first = np.int64(((z ^ (z >> np.uint64(31))) >> np.uint64(32)) % np.uint64(max(n, 1)))
        for step in range(n):
            source = sources[i, (first + step) % n]
            if gain[source] > 0:
                frame[bad[i]] = frame[source]
                break


@njit(nogil=True, cache=True)
def mean_gain(gain, sources, n_sources):
    """Mean gain of the good pixels that the counts of each bad one are drawn from."""
    out = np.zeros(n_sources.size, np.float32)
    for i in range(n_sources.size):
        number, added = 0, 0.0
        for j in range(n_sources[i]):
            factor = gain[sources[i, j]]
            if factor > 0:
                added += factor
                number += 1
        out[i] = added / max(number, 1)
    return out
