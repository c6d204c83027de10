"""Compiled CPU kernels of the search for poses: the best of many, likelihoods one by one, their maxima."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from halfmap.search._spline_kernels import sample_point, sample_point_gradient

_FLAGS: set[str] = {"contract", "nsz", "reassoc"}
_UNKNOWNS = 5
"""Turns about x, y and z of the image, and shifts along x and y."""

_SUMS = 21
"""Log-likelihood, gradient (5) and lower triangle of the matrix of second derivatives (15)."""

_MARGIN, _LEVELS = 20.0, 32
"""Logarithm below the best at which a cell counts as nothing, and steps in each unit of it."""

BEGIN, LEAST, MOST, EASE = 0.01, 1e-5, 1e4, 5.0
"""Damping at first, its range, and what a good step divides it by; a bad one multiplies by the square."""


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def _greatest(row):
    """Largest number of a row, as vector code."""
    best = row[0]
    for k in range(1, row.size):
        best = max(best, row[k])
    return best


@njit(nogil=True)
def _count_levels(likely, tops, best, levels):
    """Add to `levels` how many cells lie so many steps below the best; the last one is what is left out."""
    angles, shifts, references = likely.shape
    last = levels.size - 1
    for a in range(angles):
        for t in range(shifts):
            if (best - tops[a, t]) * _LEVELS >= last:
                continue
            for k in range(references):
                levels[min(int((best - likely[a, t, k]) * _LEVELS), last)] += 1
    levels[last] = 0


@njit(nogil=True, cache=True)
def select(likely, mass, most, places, logs):
    """Find the cells that hold most of the posterior of one image.

    Parameters
    ----------
    likely : array (angles, t, k) float32
        Logarithm of the posterior, but for a constant.
    mass, most : float, int
        Part of the posterior wanted, and the largest number of cells.
    places, logs : arrays (most,) int64, float64
        Filled with the cells, best first, and the logarithm of their probability.

    Returns
    -------
    tuple of int, float
        Number of cells, and the logarithm of the sum over all cells, which is right to 1e-4.
    """
    angles, shifts, references = likely.shape
    tops = np.empty((angles, shifts), np.float32)
    for a in range(angles):
        for t in range(shifts):
            tops[a, t] = _greatest(likely[a, t])
    best = _greatest(tops.ravel())
    levels = np.zeros(int(_MARGIN * _LEVELS) + 1, np.int64)
    _count_levels(likely, tops, best, levels)
    total = 0.0
    for i in range(levels.size):
        total += levels[i] * math.exp(-(i + 0.5) / _LEVELS)
    held, count, depth = 0.0, 0, 0
    while depth < levels.size - 1 and count < most and held < mass * total:
        held += levels[depth] * math.exp(-(depth + 0.5) / _LEVELS)
        count += levels[depth]
        depth += 1
    found, at, n = np.empty(count, np.float32), np.empty(count, np.int64), 0
    for a in range(angles):
        for t in range(shifts):
            if int((best - tops[a, t]) * _LEVELS) < depth:
                for k in range(references):
                    if int((best - likely[a, t, k]) * _LEVELS) < depth:
                        found[n], at[n] = likely[a, t, k], (a * shifts + t) * references + k
                        n += 1
    # The steps are good enough for what is left out only.
    total = 0.0
    for i in range(n):
        total += math.exp(float(found[i] - best))
    for i in range(depth, levels.size):
        total += levels[i] * math.exp(-(i + 0.5) / _LEVELS)
    order, kept, held = np.argsort(-found[:n]), 0, 0.0
    while kept < min(most, n) and held < mass * total:
        i = order[kept]
        places[kept], logs[kept] = at[i], float(found[i] - best) - math.log(total)
        held += math.exp(float(found[i] - best))
        kept += 1
    return kept, float(best) + math.log(total)


@njit(nogil=True, inline="always")
def _fill_waves(waves, x, y, radius, box):
    """Fill (2, 2, 2 radius + 1): real and imaginary part of exp(-2 pi i k s / box), along x and along y."""
    for axis in range(2):
        step = -2.0 * math.pi / box * (x if axis == 0 else y)
        for k in range(-radius, radius + 1):
            waves[axis, 0, k + radius], waves[axis, 1, k + radius] = math.cos(step * k), math.sin(step * k)


@njit(nogil=True, inline="always")
def _wave(waves, x, y):
    """Factor at one place: real and imaginary part."""
    a, b, c, d = waves[0, 0, x], waves[0, 1, x], waves[1, 0, y], waves[1, 1, y]
    return a * c - b * d, a * d + b * c


@njit(nogil=True, cache=True, fastmath=_FLAGS)
def score(volume, origin, turns, owner, first, which, waves, points, linear, squared, out):
    """Fill `out` with the log-likelihoods of slices, each at several shifts.

    Parameters
    ----------
    volume, origin, turns, points
        As for `_spline_kernels.sample`.
    owner : array (n,) int64
        The image that each slice is compared with.
    first : array (n + 1,) int64
        Where the shifts of each slice begin.
    which, out : arrays (s,) int64, (s,) float64
        Number of each shift.
    waves : array (u, 2, p)
        Real and imaginary part of the factors that move an image by each distinct shift.
    linear, squared : arrays (b, 2 p), (b, p)
        Of `DiscImages`, the first interleaved; rows may be longer.
    """
    n_points = points.shape[0]
    products = np.empty((2, n_points), linear.dtype)
    for n in range(turns.shape[0]):
        image, power = owner[n], linear[0, 0] * 0
        for p in range(n_points):
            re, im = sample_point(volume, origin, turns[n], points[p, 0], points[p, 1])
            power += squared[image, p] * (re * re + im * im)
            a, b = linear[image, 2 * p], linear[image, 2 * p + 1]
            products[0, p], products[1, p] = a * re + b * im, b * re - a * im
        for s in range(first[n], first[n + 1]):
            wave, cross = waves[which[s]], power * 0
            for p in range(n_points):
                cross += products[0, p] * wave[0, p] - products[1, p] * wave[1, p]
            out[s] = cross - 0.5 * power


@njit(nogil=True, inline="always")
def _fill_columns(volume, origin, turn, r, points, linear, squared, waves, box, radius, columns):
    """Fill `columns` (14, p) at one pose.

    Rows: real and imaginary part of the slice's derivatives by the unknowns (turns in radians, shifts in
    pixels), of what the slice lacks, weights, and twice the terms of the log-likelihood. `r` is the rotation
    in voxels per Fourier pixel.
    """
    wave = 2.0 * math.pi / box
    for p in range(points.shape[0]):
        x, y = points[p, 0], points[p, 1]
        v = sample_point_gradient(volume, origin, turn, x, y)
        c, d = _wave(waves, int(x) + radius, int(y) + radius)
        a, b, weight = linear[2 * p], linear[2 * p + 1], squared[p]
        re, im = a * c - b * d, a * d + b * c
        for part in range(2):
            gx, gy, gz = v[2 + part], v[4 + part], v[6 + part]
            hz = r[2, 0] * gx + r[2, 1] * gy + r[2, 2] * gz
            columns[part, p], columns[2 + part, p] = -y * hz, x * hz
            hy = r[1, 0] * gx + r[1, 1] * gy + r[1, 2] * gz
            columns[4 + part, p] = y * (r[0, 0] * gx + r[0, 1] * gy + r[0, 2] * gz) - x * hy
        # The image moves by +s, so that the slice would move by -s: a factor of 2 pi i k.
        columns[6, p], columns[7, p] = -wave * x * v[1], wave * x * v[0]
        columns[8, p], columns[9, p] = -wave * y * v[1], wave * y * v[0]
        columns[10, p], columns[11, p] = re - weight * v[0], im - weight * v[1]
        columns[12, p] = weight
        # Re X* P - W |P|^2 / 2, with what is lacked.
        columns[13, p] = (re + columns[10, p]) * v[0] + (im + columns[11, p]) * v[1]


@njit(nogil=True, inline="always")
def _sum_products(a, b, c, d):
    total = a[0] * b[0] * 0
    for p in range(a.size):
        total += a[p] * b[p] + c[p] * d[p]
    return total


@njit(nogil=True, inline="always")
def _sum_weighted(a, b, c, d, weight):
    total = a[0] * b[0] * 0
    for p in range(a.size):
        total += weight[p] * (a[p] * b[p] + c[p] * d[p])
    return total


@njit(nogil=True, cache=True, fastmath=_FLAGS)
def evaluate(volume, origin, scale, rotation, shift, box, radius, points, linear, squared, sums):
    """Fill `sums` (21,) with the log-likelihood, its gradient and the Gauss-Newton matrix at one pose.

    Parameters
    ----------
    volume, origin, points
        As for `_spline_kernels.sample`.
    scale : float
        Voxels per Fourier pixel.
    rotation, shift : arrays (3, 3), (2,) float64
        The shift moves the image.
    box, radius : int
        As for `score`.
    linear, squared : arrays (2 p,), (p,)
        Of `DiscImages`.
    sums : array (21,) float64
        Written; the matrix as its lower triangle, row by row.
    """
    n_points = points.shape[0]
    waves = np.empty((2, 2, 2 * radius + 1), linear.dtype)
    columns = np.empty((14, n_points), linear.dtype)
    turn = np.empty((3, 3), linear.dtype)
    for i in range(3):
        for j in range(3):
            turn[i, j] = rotation[i, j] * scale
    _fill_waves(waves, shift[0], shift[1], radius, box)
    _fill_columns(volume, origin, turn, turn, points, linear, squared, waves, box, radius, columns)
    weight = columns[12]
    sums[0] = 0.5 * np.sum(columns[13])
    at = 1 + _UNKNOWNS
    for i in range(_UNKNOWNS):
        a, b = columns[2 * i], columns[2 * i + 1]
        sums[1 + i] = _sum_products(a, columns[10], b, columns[11])
        for j in range(i + 1):
            sums[at] = _sum_weighted(a, columns[2 * j], b, columns[2 * j + 1], weight)
            at += 1


@njit(nogil=True)
def _turn_between(rotation, centre, apart):
    """Write into `apart` the vector in radians, in the frame of the image, by which `centre` is turned."""
    turn = rotation @ centre.T
    x, y, z = turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]
    sine = 0.5 * math.sqrt(x * x + y * y + z * z)
    angle = math.atan2(sine, 0.5 * (turn[0, 0] + turn[1, 1] + turn[2, 2] - 1))
    stretch = 0.5 * (angle / sine if sine > 1e-9 else 1.0)
    apart[0], apart[1], apart[2] = stretch * x, stretch * y, stretch * z


@njit(nogil=True)
def _add_prior(rotation, shift, centre, middle, precision, apart, sums):
    """Add a normal prior about a pose to `sums`; `apart` (5,) is room to work in.

    The gradient takes turns for vectors that add, which they do where the prior turns about its centre alone.
    """
    _turn_between(rotation, centre, apart)
    apart[3], apart[4] = shift[0] - middle[0], shift[1] - middle[1]
    at = 1 + _UNKNOWNS
    for i in range(_UNKNOWNS):
        pull = 0.0
        for j in range(_UNKNOWNS):
            pull += precision[i, j] * apart[j]
        sums[0] -= 0.5 * pull * apart[i]
        sums[1 + i] -= pull
        for j in range(i + 1):
            sums[at] += precision[i, j]
            at += 1


@njit(nogil=True)
def _solve(sums, damping, factor, step):
    """Fill `step` with the damped Gauss-Newton step, by Cholesky's factor, and tell whether there is one."""
    for i in range(_UNKNOWNS):
        for j in range(i + 1):
            value = sums[1 + _UNKNOWNS + i * (i + 1) // 2 + j] * (1 + damping if i == j else 1)
            for k in range(j):
                value -= factor[i, k] * factor[j, k]
            if i == j:
                if not value > 0:
                    return False
                factor[i, i] = math.sqrt(value)
            else:
                factor[i, j] = value / factor[j, j]
    for i in range(_UNKNOWNS):
        value = sums[1 + i]
        for k in range(i):
            value -= factor[i, k] * step[k]
        step[i] = value / factor[i, i]
    for i in range(_UNKNOWNS - 1, -1, -1):
        for k in range(i + 1, _UNKNOWNS):
            step[i] -= factor[k, i] * step[k]
        step[i] /= factor[i, i]
    return True


@njit(nogil=True)
def _turned(rotation, x, y, z, out):
    """Write the rotation turned by a vector in radians, in the frame of the image."""
    angle = math.sqrt(x * x + y * y + z * z)
    sine, versine = (
        (math.sin(angle) / angle, (1 - math.cos(angle)) / angle**2) if angle > 1e-9 else (1.0, 0.5)
    )
    vector = (x, y, z)
    for j in range(3):
        a, b, c = rotation[0, j], rotation[1, j], rotation[2, j]
        cross = (y * c - z * b, z * a - x * c, x * b - y * a)
        along = x * a + y * b + z * c
        for i in range(3):
            out[i, j] = (
                rotation[i, j] + sine * cross[i] + versine * (vector[i] * along - angle**2 * rotation[i, j])
            )


@njit(nogil=True, cache=True)
def polish(
    volume, origin, scale, rotation, shift, box, radius, points, linear, squared, prior, limit, gain, sums
):
    """Climb from a pose to the next maximum of the posterior, by damped Gauss-Newton steps.

    Parameters
    ----------
    volume, origin, scale, box, radius, points, linear, squared
        As for `evaluate`.
    rotation, shift : arrays (3, 3), (2,) float64
        Where to begin; overwritten with the maximum.
    prior : tuple of arrays (3, 3), (2,), (5, 5) float64
        Rotation and shift that a normal prior is about, and the inverse of its covariance.
    limit : int
        Largest number of poses tried.
    gain : float
        End when a step promises less of the log-likelihood.
    sums : array (21,) float64
        Written, at the maximum, as by `evaluate` with the prior.

    Returns
    -------
    int
        Number of poses tried.
    """
    factor, step = np.zeros((_UNKNOWNS, _UNKNOWNS)), np.zeros(_UNKNOWNS)
    other, moved, tried, apart = np.empty((3, 3)), np.empty(2), np.empty(_SUMS), np.empty(_UNKNOWNS)
    centre, middle, precision = prior
    evaluate(volume, origin, scale, rotation, shift, box, radius, points, linear, squared, sums)
    _add_prior(rotation, shift, centre, middle, precision, apart, sums)
    damping = BEGIN
    for count in range(1, limit):
        if damping > MOST or not _solve(sums, damping, factor, step):
            return count
        promise = 0.0
        for i in range(_UNKNOWNS):
            promise += 0.5 * step[i] * sums[1 + i]
        if promise < gain:
            return count
        _turned(rotation, step[0], step[1], step[2], other)
        moved[0], moved[1] = shift[0] + step[3], shift[1] + step[4]
        evaluate(volume, origin, scale, other, moved, box, radius, points, linear, squared, tried)
        _add_prior(other, moved, centre, middle, precision, apart, tried)
        if tried[0] > sums[0]:
            rotation[:], shift[:], sums[:] = other, moved, tried
            damping = max(damping / EASE, LEAST)
        else:
            damping *= EASE**2
    return limit
