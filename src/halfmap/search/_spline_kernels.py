"""Compiled CPU kernels: cubic interpolation in a volume's Fourier transform, and what is made of it at once.

Sixteen rows of four neighbours along x are read for each sample. A row is one vector; the sum over the other
two axes is made of whole rows, so that value and gradient together cost little more than twice the value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.errors import TypingError
from numba.extending import intrinsic

_FAST = ("contract", "nsz", "reassoc")
_FLAGS: set[str] = set(_FAST)
_TAPS = 4
_ROW = 2 * _TAPS
"""Real numbers in the four complex neighbours along x."""

# A product of single precision and a Python number would be one of double precision.
_ONE, _THREE, _FOUR, _SIX = (np.float32(n) for n in (1, 3, 4, 6))


def _vector_code(function: Callable) -> Any:
    """Make an intrinsic whose callers leave out the typing context, which type checkers do not know."""
    return intrinsic(function)


class _Rows:
    """Builds the code that sums rows of neighbours with weights."""

    def __init__(self, context, builder, array_type, array, at, steps) -> None:
        self.builder = builder
        self.element = context.get_data_type(array_type.dtype)
        self.kind = ir.VectorType(self.element, _ROW)
        self.align = context.get_abi_alignment(self.element)
        data = context.make_array(array_type)(context, builder, array).data
        self.start, self.y_step, self.z_step = builder.gep(data, [at]), *steps

    def splat(self, value):
        single = self.builder.insert_element(ir.Constant(self.kind, ir.Undefined), value, ir.IntType(32)(0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), _ROW), [0] * _ROW)
        return self.builder.shuffle_vector(single, single, mask)

    def splats(self, weights):
        return [self.splat(self.builder.extract_value(weights, i)) for i in range(_TAPS)]

    def zero(self):
        return ir.Constant(self.kind, [0.0] * _ROW)

    def add_scaled(self, total, row, weight):
        scaled = self.builder.fmul(row, weight, flags=_FAST)
        return self.builder.fadd(total, scaled, flags=_FAST)

    def plane(self, z: int):
        """Rows of the plane z, from the lowest y."""
        b, index = self.builder, ir.IntType(64)
        pointer = b.gep(self.start, [b.mul(self.z_step, index(z))])
        for y in range(_TAPS):
            row = b.gep(pointer, [b.mul(self.y_step, index(y))])
            yield b.load(b.bitcast(row, self.kind.as_pointer()), align=self.align)

    def along_x(self, total, weights):
        """Real and imaginary part of the four complex numbers of a row, summed with weights."""
        b, parts = self.builder, []
        for lane in range(2):
            terms = [
                b.fmul(
                    b.extract_element(total, ir.IntType(32)(2 * i + lane)),
                    b.extract_value(weights, i),
                    flags=_FAST,
                )
                for i in range(_TAPS)
            ]
            for term in terms[1:]:
                terms[0] = b.fadd(terms[0], term, flags=_FAST)
            parts.append(terms[0])
        return parts


def _check_one_type(volume, *weights):
    if any(weight != types.UniTuple(volume.dtype, _TAPS) for weight in weights):
        raise TypingError(f"the spline kernels need one real type throughout, not {(volume, *weights)}")


@_vector_code
def _value(typing, volume, at, y_step, z_step, wx, wy, wz):
    """Real and imaginary part of the sample whose lowest neighbour begins at `at`."""
    _check_one_type(volume, wx, wy, wz)

    def generate(context, builder, signature, arguments):
        array, at_, y_step_, z_step_, wx_, wy_, wz_ = arguments
        rows = _Rows(context, builder, signature.args[0], array, at_, (y_step_, z_step_))
        wy_, wz_, total = rows.splats(wy_), rows.splats(wz_), rows.zero()
        for z in range(_TAPS):
            plane = rows.zero()
            for row, weight in zip(rows.plane(z), wy_, strict=True):
                plane = rows.add_scaled(plane, row, weight)
            total = rows.add_scaled(total, plane, wz_[z])
        return context.make_tuple(builder, signature.return_type, rows.along_x(total, wx_))

    result = types.UniTuple(volume.dtype, 2)
    return result(volume, at, y_step, z_step, wx, wy, wz), generate


@_vector_code
def _value_and_gradient(typing, volume, at, y_step, z_step, wx, wy, wz, dx, dy, dz):
    """As `_value`, followed by real and imaginary parts of the derivatives along x, y and z."""
    _check_one_type(volume, wx, wy, wz, dx, dy, dz)

    def generate(context, builder, signature, arguments):
        array, at_, y_step_, z_step_, wx_, wy_, wz_, dx_, dy_, dz_ = arguments
        rows = _Rows(context, builder, signature.args[0], array, at_, (y_step_, z_step_))
        wy_, wz_, dy_, dz_ = (rows.splats(weights) for weights in (wy_, wz_, dy_, dz_))
        value, by_y, by_z = rows.zero(), rows.zero(), rows.zero()
        for z in range(_TAPS):
            plane = change = rows.zero()
            for row, weight, slope in zip(rows.plane(z), wy_, dy_, strict=True):
                plane, change = rows.add_scaled(plane, row, weight), rows.add_scaled(change, row, slope)
            value = rows.add_scaled(value, plane, wz_[z])
            by_y = rows.add_scaled(by_y, change, wz_[z])
            by_z = rows.add_scaled(by_z, plane, dz_[z])
        sums = ((value, wx_), (value, dx_), (by_y, wx_), (by_z, wx_))
        parts = [part for total, weights in sums for part in rows.along_x(total, weights)]
        return context.make_tuple(builder, signature.return_type, parts)

    result = types.UniTuple(volume.dtype, 8)
    return result(volume, at, y_step, z_step, wx, wy, wz, dx, dy, dz), generate


@njit(nogil=True, inline="always")
def _weights(f):
    """Six times the cubic B-spline at four neighbours of a sample a fraction `f` beyond the second."""
    g = _ONE - f
    return g * g * g, _FOUR + f * f * (_THREE * f - _SIX), _FOUR + g * g * (_THREE * g - _SIX), f * f * f


@njit(nogil=True, inline="always")
def _slopes(f):
    """Six times its derivative by `f`."""
    g = _ONE - f
    return (
        -_THREE * g * g,
        _THREE * f * (_THREE * f - _FOUR),
        _THREE * g * (_FOUR - _THREE * g),
        _THREE * f * f,
    )


@njit(nogil=True, inline="always")
def _locate(turn, x, y):
    """Position in voxels of a point of the slice, at -k if x were negative, and the sign that tells."""
    px = turn[0, 0] * x + turn[1, 0] * y
    py = turn[0, 1] * x + turn[1, 1] * y
    pz = turn[0, 2] * x + turn[1, 2] * y
    if px < 0:
        return -px, -py, -pz, -_ONE
    return px, py, pz, _ONE


@njit(nogil=True, inline="always")
def _place(origin, ix, iy, iz):
    """Element of the lowest neighbour of a sample between these voxels, and steps along y and z."""
    y_step = np.int64(2 * (origin + 2))
    z_step = y_step * (2 * origin + 1)
    low = np.int64(origin - 1)
    return (np.int64(iz) + low) * z_step + (np.int64(iy) + low) * y_step + 2 * np.int64(ix), y_step, z_step


@njit(nogil=True, inline="always")
def sample_point(volume, origin, turn, x, y):
    """Value (real, imaginary) of a slice at one point."""
    px, py, pz, sign = _locate(turn, x, y)
    ix, iy, iz = np.floor(px), np.floor(py), np.floor(pz)
    at, y_step, z_step = _place(origin, ix, iy, iz)
    re, im = _value(volume, at, y_step, z_step, _weights(px - ix), _weights(py - iy), _weights(pz - iz))
    return re, sign * im


@njit(nogil=True, inline="always")
def sample_point_gradient(volume, origin, turn, x, y):
    """Value and derivatives by the position in voxels, (real, imaginary) four times."""
    px, py, pz, sign = _locate(turn, x, y)
    ix, iy, iz = np.floor(px), np.floor(py), np.floor(pz)
    at, y_step, z_step = _place(origin, ix, iy, iz)
    fx, fy, fz = px - ix, py - iy, pz - iz
    weights, slopes = (_weights(fx), _weights(fy), _weights(fz)), (_slopes(fx), _slopes(fy), _slopes(fz))
    v = _value_and_gradient(volume, at, y_step, z_step, *weights, *slopes)
    # V(-k) = V(k)*, so that derivatives change their sign and are conjugate.
    return v[0], sign * v[1], sign * v[2], v[3], sign * v[4], v[5], sign * v[6], v[7]


@njit(nogil=True, cache=True, fastmath=_FLAGS)
def sample(volume, origin, turns, points, out):
    """Fill `out` (n, 2 p) with slices at `points` (p, 2).

    `turns` (n, 2 or 3, 3) are rows of rotations in voxels per Fourier pixel; `origin` is the index of
    frequency 0 along z and y of `volume`, the real numbers of `SplineVolume.values` in a row.
    """
    for n in range(turns.shape[0]):
        for p in range(points.shape[0]):
            re, im = sample_point(volume, origin, turns[n], points[p, 0], points[p, 1])
            out[n, 2 * p], out[n, 2 * p + 1] = re, im


@njit(nogil=True, cache=True, fastmath=_FLAGS)
def sample_gradients(volume, origin, turns, points, out):
    """Fill `out` (n, p, 8) with values and derivatives by the position in voxels."""
    for n in range(turns.shape[0]):
        for p in range(points.shape[0]):
            found = sample_point_gradient(volume, origin, turns[n], points[p, 0], points[p, 1])
            for i in range(8):
                out[n, p, i] = found[i]
