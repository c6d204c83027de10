"""Compiled CPU kernels: sums of slices in files and in planes, and what their shells hold."""

from __future__ import annotations

import math

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def held(limit: int, y: int, z: int) -> int:
    """Voxels from x = 0 on that a row of the ball of radius ``limit + 1`` has in a half-space x <= limit."""
    square = (limit + 1) ** 2 - y * y - z * z
    return 0 if square < 0 else min(math.floor(math.sqrt(square)) + 1, limit + 1)


@njit(nogil=True, cache=True)
def pack(data: np.ndarray, first: int, stop: int, out: np.ndarray) -> None:
    """Copy planes from `first` on of sums (z, y, x, 4) to voxels (n, 3) of the ball, row after row.

    What the mates of voxels at x = 0 received is added to these.
    """
    limit, at = data.shape[2] - 2, 0
    origin = limit + 1
    for z in range(first, stop):
        for y in range(-limit, limit + 1):
            row, mate = data[z + origin, y + origin], data[origin - z, origin - y, 0]
            for x in range(held(limit, y, z)):
                for i in range(3):
                    out[at, i] = row[x, i]
                if x == 0:
                    out[at, 0] += mate[0]
                    out[at, 1] -= mate[1]
                    out[at, 2] += mate[2]
                at += 1


@njit(nogil=True, cache=True)
def unpack(voxels: np.ndarray, first: int, stop: int, out: np.ndarray) -> None:
    """Copy voxels (n, 3) that `pack` wrote to planes (stop - first, 2 limit + 1, limit + 1, 3) of zeros."""
    limit, at = out.shape[2] - 1, 0
    for z in range(first, stop):
        for y in range(-limit, limit + 1):
            count = held(limit, y, z)
            out[z - first, y + limit, :count] = voxels[at : at + count]
            at += count


@njit(nogil=True, cache=True)
def add_shells(planes: np.ndarray, first: int, scale: float, least: np.ndarray, out: np.ndarray) -> None:
    """Add up shells of planes (z, y, x, 3) that follow each other; shells of `out` are its last axis.

    With `least` of no length, `out` (2, n) takes weights and voxels. Else weights w count for v, `least` of
    their shell or more, and `out` (4, n) takes voxels, w / v², w / v and (w / v)².
    """
    limit = planes.shape[2] - 1
    for z in range(planes.shape[0]):
        for y in range(-limit, limit + 1):
            for x in range(limit + 1):
                square = (z + first) ** 2 + y * y + x * x
                shell = int(np.rint(math.sqrt(square) * scale))
                if shell >= out.shape[1]:
                    break
                weight = float(planes[z, y + limit, x, 2])
                if len(least) == 0:
                    out[0, shell] += weight
                    out[1, shell] += 1
                else:
                    counted = max(weight, least[shell])
                    part = weight / counted
                    out[0, shell] += 1
                    out[1, shell] += part / counted
                    out[2, shell] += part
                    out[3, shell] += part * part


@njit(nogil=True, cache=True)
def divide(
    planes: np.ndarray, first: int, scale: float, least: np.ndarray, prior: np.ndarray, out: np.ndarray
) -> None:
    """Write the sums of planes (z, y, x, 3) over their weights to zeros (z, y, x, 2), within the ball.

    Weights count for `least` (n,) of their shell or more, and `prior` (n,) is added to them; shells beyond
    count as the last one.
    """
    limit, last = planes.shape[2] - 1, len(least) - 1
    for z in range(planes.shape[0]):
        for y in range(-limit, limit + 1):
            square, row = (z + first) ** 2 + y * y, y + limit
            # Sums in memory reach a voxel further than those in files do.
            for x in range(min(held(limit + 1, y, z + first), limit + 1)):
                shell = min(int(np.rint(math.sqrt(float(square + x * x)) * scale)), last)
                weight = max(planes[z, row, x, 2], least[shell]) + prior[shell]
                if weight > 0:
                    out[z, row, x, 0] = planes[z, row, x, 0] / weight
                    out[z, row, x, 1] = planes[z, row, x, 1] / weight
