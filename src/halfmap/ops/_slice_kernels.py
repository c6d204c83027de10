"""Compiled CPU kernels that cut central slices out of a volume's Fourier transform and add them to one.

Both kernels walk the rows of a slice. A row crosses the plane x = 0 at most once, so it falls into at most
two runs, of which one is read at -k as a complex conjugate; within a run no sample needs a test. A run's
positions are computed first, as vector code, and then its samples are read or written one by one.

A slice of a large volume misses the caches about once a sample, and the time goes there. Volumes to cut from
are therefore stored in bricks of 2 x 2 x 2 voxels, one cache line each in single precision: a plane touches
0.56 such lines per sample on average over its directions, against 0.81 for lines of 8 x 1 x 1 voxels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.errors import TypingError
from numba.extending import intrinsic

_FAST = ("contract", "nsz", "reassoc")
"""Freedoms of the compiler that leave NaN and infinity as they are."""

_INT = ir.IntType(32)
_READ_AHEAD, _ADD_AHEAD = 32, 16
"""Samples between asking for memory and using it.

Measured: reading is a sixth slower with 16 and no faster with 48, adding a tenth slower with 32.
"""

_COLUMN = 8
"""Real numbers in the part of a brick that shares x: from a voxel to its next along x."""

EDGE = 1e-3
"""Slack in voxels at the faces of the volume, so that rounding cannot push a sample on a face outside."""


def _vector_code(function: Callable) -> Any:
    """Make an intrinsic whose callers leave out the typing context, which type checkers do not know."""
    return intrinsic(function)


@njit(nogil=True, inline="always")
def _clip_linear(begin, end, slope, offset, low, high):
    """Shrink [begin, end) to where ``low <= slope k + offset <= high``."""
    if slope == 0.0:
        if offset < low or offset > high:
            return begin, begin
        return begin, end
    first, last = (low - offset) / slope, (high - offset) / slope
    if first > last:
        first, last = last, first
    # Bounds before the conversion: a nearly flat line crosses at distances that no integer holds.
    first, last = max(first, float(begin)), min(last, float(end))
    if first > last:
        return begin, begin
    return math.ceil(first), min(math.floor(last) + 1, end)


@njit(nogil=True, inline="always")
def _needs_clipping(rotation, square, limit):
    """Whether a sample within the radius can leave the volume, as its ellipse's longest half axis tells."""
    a = rotation[0, 0] ** 2 + rotation[0, 1] ** 2 + rotation[0, 2] ** 2
    d = rotation[1, 0] ** 2 + rotation[1, 1] ** 2 + rotation[1, 2] ** 2
    b = rotation[0, 0] * rotation[1, 0] + rotation[0, 1] * rotation[1, 1] + rotation[0, 2] * rotation[1, 2]
    return square * ((a + d) / 2 + math.sqrt((a - d) ** 2 / 4 + b * b)) > limit * limit


@njit(nogil=True)
def _begin_slice(rotations, n, square, limit, turn):
    """Copy the part of a rotation that turns an image into `turn`, and tell whether rows need clipping."""
    for i in range(2):
        for j in range(3):
            turn[i, j] = rotations[n, i, j]
    return _needs_clipping(turn, square, limit)


@njit(nogil=True)
def _row_runs(rotation, ky, half, square, limit, clip, runs):
    """Write the runs (begin, end, sign) of one row of a slice into `runs` and count them.

    `rotation` is in voxels of the volume per Fourier pixel of the slice; `square` is the squared radius in
    Fourier pixels, `limit` the largest coordinate inside the volume.
    """
    rest = square - float(ky) * ky
    if rest < 0.0:
        return 0
    begin, end = 0, min(int(math.sqrt(rest)), half) + 1
    if clip:
        for axis in range(3):
            begin, end = _clip_linear(begin, end, rotation[0, axis], ky * rotation[1, axis], -limit, limit)
    if begin >= end:
        return 0
    slope, offset = rotation[0, 0], ky * rotation[1, 0]
    negative = begin * slope + offset < 0.0
    if ((end - 1) * slope + offset < 0.0) == negative:
        middle = end
    else:
        crossing = -offset / slope
        middle = math.ceil(crossing) if negative else math.floor(crossing) + 1
        middle = min(max(middle, begin), end)
    sign = -1 if negative else 1
    runs[0, 0], runs[0, 1], runs[0, 2] = begin, middle, sign
    runs[1, 0], runs[1, 1], runs[1, 2] = middle, end, -sign
    return 1 if middle == end else 2


@njit(nogil=True, inline="always")
def _aim(rotation, ky, sign, steps, starts):
    """Set the line, in voxels, that the samples of a run lie on."""
    for axis in range(3):
        steps[axis] = sign * rotation[0, axis]
        starts[axis] = sign * ky * rotation[1, axis]


# Strict arithmetic here and in `_locate`: a sample must come out on the same voxel whatever part of its row
# is computed with it. Put into a function, the lines that both share would no longer become vector code.
@njit(nogil=True)
def _locate_in_bricks(steps, starts, k, origin, begin, end, place, fraction):
    """Fill places (element, steps to the next along y, z) and fractions (x, y, z) of samples."""
    odd = np.int32(1)
    y_brick = np.int64(_COLUMN) * (origin + 1)
    z_brick = y_brick * (origin + 1)
    for j in range(end - begin):
        x = max(starts[0] + k[begin + j] * steps[0], k[0])
        y = starts[1] + k[begin + j] * steps[1]
        z = starts[2] + k[begin + j] * steps[2]
        fx, fy, fz = np.floor(x), np.floor(y), np.floor(z)
        ix, iy, iz = np.int32(fx), np.int32(fy) + np.int32(origin), np.int32(fz) + np.int32(origin)
        y_odd, z_odd = np.int64(iy & odd), np.int64(iz & odd)
        brick = (iz >> odd) * z_brick + (iy >> odd) * y_brick + ix * np.int64(_COLUMN)
        place[0, j] = brick + 4 * z_odd + 2 * y_odd
        place[1, j] = 2 + y_odd * (y_brick - 4)
        place[2, j] = 4 + z_odd * (z_brick - 8)
        fraction[0, j], fraction[1, j], fraction[2, j] = x - fx, y - fy, z - fz


@njit(nogil=True)
def _locate(steps, starts, k, origin, begin, end, place, fraction):
    """Fill places (x, row of the volume counted through z and y, z) and fractions (x, y, z) of samples."""
    n_rows = 2 * origin + 1
    for j in range(end - begin):
        x = max(starts[0] + k[begin + j] * steps[0], k[0])
        y = starts[1] + k[begin + j] * steps[1]
        z = starts[2] + k[begin + j] * steps[2]
        fx, fy, fz = np.floor(x), np.floor(y), np.floor(z)
        place[0, j] = np.int32(fx)
        place[1, j] = (np.int32(fz) + origin) * n_rows + np.int32(fy) + origin
        place[2, j] = np.int32(fz) + origin
        fraction[0, j], fraction[1, j], fraction[2, j] = x - fx, y - fy, z - fz


@njit(nogil=True, inline="always")
def _row_weights(fraction, j, one):
    """Bilinear weights of the four (z, y) neighbours of sample j: (0, 0), (0, 1), (1, 0), (1, 1)."""
    fy, fz = fraction[1, j], fraction[2, j]
    return (one - fz) * (one - fy), (one - fz) * fy, fz * (one - fy), fz * fy


def _splat(builder, value, width):
    kind = ir.VectorType(value.type, width)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _INT(0))
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(_INT, width), [0] * width))


def _vector_pointer(context, builder, array_type, array, index, width):
    """Address of `width` neighbours in a flat array, and the alignment of one, which is all that is known."""
    element = context.get_data_type(array_type.dtype)
    data = context.make_array(array_type)(context, builder, array).data
    pointer = builder.bitcast(builder.gep(data, [index]), ir.VectorType(element, width).as_pointer())
    return pointer, context.get_abi_alignment(element)


def _check_one_type(*kinds):
    if len({getattr(kind, "dtype", kind) for kind in kinds}) != 1:
        raise TypingError(f"the slice kernels need one real type throughout, not {kinds}")


# The compiler leaves the loads of a sample as scalars or gathers them over samples, both slower than these
# intrinsics.
@_vector_code
def _blend(typing, volume, rows, weights, along, sign, out, at):
    """Write the weighted sum of four rows, blended along x by `along`, its imaginary part times `sign`."""
    _check_one_type(volume, weights, along, sign, out)

    def generate(context, builder, signature, arguments):
        volume_, rows_, weights_, along_, sign_, out_, at_ = arguments
        pair = ir.VectorType(_INT, 2)
        total = ir.Constant(ir.VectorType(along_.type, 4), [0.0] * 4)
        for corner in range(4):
            start = builder.extract_value(rows_, corner)
            pointer, align = _vector_pointer(context, builder, signature.args[0], volume_, start, 2)
            near, far = (
                builder.load(builder.gep(pointer, [_INT(at)]), align=align) for at in (0, _COLUMN // 2)
            )
            voxels = builder.shuffle_vector(near, far, ir.Constant(ir.VectorType(_INT, 4), [0, 1, 2, 3]))
            weight = _splat(builder, builder.extract_value(weights_, corner), 4)
            scaled = builder.fmul(voxels, weight, flags=_FAST)
            total = builder.fadd(total, scaled, flags=_FAST)
        near = builder.shuffle_vector(total, total, ir.Constant(pair, [0, 1]))
        far = builder.shuffle_vector(total, total, ir.Constant(pair, [2, 3]))
        change = builder.fmul(builder.fsub(far, near, flags=_FAST), _splat(builder, along_, 2), flags=_FAST)
        signs = builder.insert_element(_splat(builder, along_.type(1.0), 2), sign_, _INT(1))
        value = builder.fmul(builder.fadd(near, change, flags=_FAST), signs, flags=_FAST)
        pointer, align = _vector_pointer(context, builder, signature.args[5], out_, at_, 2)
        builder.store(value, pointer, align=align)
        return context.get_dummy_value()

    return types.void(volume, rows, weights, along, sign, out, at), generate


@_vector_code
def _add(typing, volume, at, weight, sample):
    """Add `weight` times (real, imaginary, density, 0) to four neighbours; `sample` is the first three."""
    _check_one_type(volume, weight, sample)

    def generate(context, builder, signature, arguments):
        volume_, at_, weight_, sample_ = arguments
        lanes = ir.Constant(ir.VectorType(weight_.type, 4), [0.0] * 4)
        for lane in range(3):
            lanes = builder.insert_element(lanes, builder.extract_value(sample_, lane), _INT(lane))
        pointer, align = _vector_pointer(context, builder, signature.args[0], volume_, at_, 4)
        change = builder.fmul(lanes, _splat(builder, weight_, 4), flags=("contract",))
        builder.store(
            builder.fadd(builder.load(pointer, align=align), change, flags=("contract",)), pointer, align
        )
        return context.get_dummy_value()

    return types.void(volume, at, weight, sample), generate


@_vector_code
def _fetch(typing, volume, at):
    """Ask for the cache line that holds this element."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _INT, _INT, _INT])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(function, [pointer, _INT(0), _INT(3), _INT(1)])
        return context.get_dummy_value()

    return types.void(volume, at), generate


@njit(nogil=True, inline="always")
def _brick_rows(place, j):
    """Elements of the four (z, y) neighbours of sample j: (0, 0), (0, 1), (1, 0), (1, 1)."""
    near, y_step, z_step = place[0, j], place[1, j], place[2, j]
    return near, near + y_step, near + z_step, near + z_step + y_step


@njit(nogil=True, inline="always")
def _fetch_bricks(volume, place, j):
    """Fetch the bricks of a sample to come: no CPU guesses where a tilted line goes in memory."""
    a, b, c, d = _brick_rows(place, j)
    _fetch(volume, a)
    _fetch(volume, b)
    _fetch(volume, c)
    _fetch(volume, d)
    _fetch(volume, a + _COLUMN)
    _fetch(volume, b + _COLUMN)
    _fetch(volume, c + _COLUMN)
    _fetch(volume, d + _COLUMN)


@njit(nogil=True, inline="always")
def _fetch_sample(volume, place, j, voxel, y_step, z_step):
    """Fetch the four rows of a sample to come."""
    near = place[1, j] * y_step + voxel * place[0, j]
    _fetch(volume, near)
    _fetch(volume, near + y_step)
    _fetch(volume, near + z_step)
    _fetch(volume, near + z_step + y_step)


@njit(nogil=True, cache=True, fastmath=set(_FAST))
def extract(volume, origin, rotations, k, radius, limit, out):
    """Interpolate slices between the voxels of a Fourier transform.

    Parameters
    ----------
    volume : array (b * b * b * 8,)
        Complex voxels (z // 2, y // 2, x, z % 2, y % 2), interleaved, b = origin + 1.
    origin : int
        Index of frequency 0 along z and y; along x it is 0.
    rotations : array (n, 3, 3) float64
        In voxels of the volume per Fourier pixel of the slice.
    k : array (size // 2 + 1,)
        0, 1, 2, ... in the type of `volume`.
    radius, limit : float
        Largest frequency in Fourier pixels of the slice, and largest coordinate in voxels; zero beyond.
    out : array (n, size, 2 * (size // 2 + 1))
        Written entirely.
    """
    half, size, square = k.size - 1, out.shape[1], radius * radius
    place, fraction = np.empty((3, half + 1), np.int64), np.empty((3, half + 1), k.dtype)
    turn, runs = np.empty((2, 3)), np.zeros((2, 3), np.int64)
    steps, starts = np.empty(3, k.dtype), np.empty(3, k.dtype)
    one, flat, width = k[1], out.reshape(-1), out.shape[2]
    for n in range(rotations.shape[0]):
        clip = _begin_slice(rotations, n, square, limit, turn)
        for i in range(size):
            ky = i - size if 2 * i >= size else i
            n_runs = _row_runs(turn, ky, half, square, limit + EDGE, clip, runs)
            line = (n * size + i) * width
            for j in range(line, line + (2 * runs[0, 0] if n_runs else width)):
                flat[j] = 0
            for r in range(n_runs):
                begin, count = runs[r, 0], runs[r, 1] - runs[r, 0]
                _aim(turn, ky, runs[r, 2], steps, starts)
                _locate_in_bricks(steps, starts, k, origin, begin, begin + count, place, fraction)
                sign = one if runs[r, 2] > 0 else -one
                for j in range(min(_READ_AHEAD, count)):
                    _fetch_bricks(volume, place, j)
                for j in range(count):
                    _fetch_bricks(volume, place, min(j + _READ_AHEAD, count - 1))
                    rows, at = _brick_rows(place, j), line + 2 * (begin + j)
                    _blend(volume, rows, _row_weights(fraction, j, one), fraction[0, j], sign, flat, at)
            if n_runs:
                for j in range(line + 2 * runs[n_runs - 1, 1], line + width):
                    flat[j] = 0


@njit(nogil=True, inline="always")
def _add_pair(volume, near, voxel, weight, along, one, sample):
    """Share a sample between a voxel and the next one along x."""
    _add(volume, near, weight * (one - along), sample)
    _add(volume, near + voxel, weight * along, sample)


@njit(nogil=True, cache=True)
def insert(volume, pitch, origin, rotations, k, radius, limit, slices, weights, first, last):
    """Add slices to the voxels in planes `first` <= z < `last` of an accumulator: the adjoint of `extract`.

    Parameters
    ----------
    volume : array (n_rows * n_rows * pitch * 4,)
        Voxels (z, y, x) of (real, imaginary, weight, unused), added to; n_rows = 2 origin + 1.
    pitch : int
        Voxels along x.
    origin, rotations, k, radius, limit
        As for `extract`.
    slices : array (n, size, 2 * (size // 2 + 1))
        Interleaved complex samples.
    weights : array (n, size, size // 2 + 1), or with n = 0
        Added as the third lane; 1 everywhere if empty.
    first, last : int
        Planes that this call owns. A voxel gets its samples in the order of the slices whatever these are, so
        any division of the planes between threads gives the same sums to the last bit.
    """
    half, size, square = k.size - 1, slices.shape[1], radius * radius
    place, fraction = np.empty((3, half + 1), np.int32), np.empty((3, half + 1), k.dtype)
    turn, runs = np.empty((2, 3)), np.zeros((2, 3), np.int64)
    steps, starts = np.empty(3, k.dtype), np.empty(3, k.dtype)
    y_step = 4 * np.int64(pitch)
    z_step = y_step * (2 * origin + 1)
    # Samples of the plane before `first` reach into it.
    low, high = first - 1 - origin - EDGE, last - origin + EDGE
    one, weighted = k[1], weights.shape[0] > 0
    for n in range(rotations.shape[0]):
        clip = _begin_slice(rotations, n, square, limit, turn)
        for i in range(size):
            ky = i - size if 2 * i >= size else i
            n_runs = _row_runs(turn, ky, half, square, limit + EDGE, clip, runs)
            for r in range(n_runs):
                _aim(turn, ky, runs[r, 2], steps, starts)
                begin, end = _clip_linear(
                    runs[r, 0], runs[r, 1], float(steps[2]), float(starts[2]), low, high
                )
                count = end - begin
                _locate(steps, starts, k, origin, begin, end, place, fraction)
                sign = one if runs[r, 2] > 0 else -one
                for j in range(min(_ADD_AHEAD, count)):
                    _fetch_sample(volume, place, j, 4, y_step, z_step)
                for j in range(count):
                    _fetch_sample(volume, place, min(j + _ADD_AHEAD, count - 1), 4, y_step, z_step)
                    at = begin + j
                    density = weights[n, i, at] if weighted else one
                    sample = (slices[n, i, 2 * at], sign * slices[n, i, 2 * at + 1], density)
                    corners = _row_weights(fraction, j, one)
                    near = place[1, j] * y_step + 4 * place[0, j]
                    if first <= place[2, j] < last:
                        _add_pair(volume, near, 4, corners[0], fraction[0, j], one, sample)
                        _add_pair(volume, near + y_step, 4, corners[1], fraction[0, j], one, sample)
                    if first <= place[2, j] + 1 < last:
                        _add_pair(volume, near + z_step, 4, corners[2], fraction[0, j], one, sample)
                        _add_pair(volume, near + z_step + y_step, 4, corners[3], fraction[0, j], one, sample)
