"""Compiled CPU kernel: sums over the operators of a point group that map a grid onto itself."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def turn_planes(data: np.ndarray, operators: np.ndarray, origin: int, planes: tuple, out: np.ndarray) -> None:
    """Add planes z of the sum over operators (g, 3, 3) of a half-space (z, y, x, 4) at S q to zeros.

    Of the plane x = 0 it is half. Of the four numbers two are a complex value, which at -q is the conjugate.
    """
    limit = origin - 1
    for z in range(planes[0], planes[1]):
        for y in range(1, origin + limit + 1):
            for x in range(limit + 1):
                total = out[z, y, x]
                for g in range(len(operators)):
                    turn = operators[g]
                    tx = turn[0, 0] * x + turn[0, 1] * (y - origin) + turn[0, 2] * (z - origin)
                    ty = turn[1, 0] * x + turn[1, 1] * (y - origin) + turn[1, 2] * (z - origin)
                    tz = turn[2, 0] * x + turn[2, 1] * (y - origin) + turn[2, 2] * (z - origin)
                    sign = 1
                    if tx < 0:
                        tx, ty, tz, sign = -tx, -ty, -tz, -1
                    found = data[tz + origin, ty + origin, tx]
                    total[0] += found[0]
                    total[1] += sign * found[1]
                    total[2] += found[2]
                    total[3] += found[3]
                if x == 0:
                    for i in range(4):
                        total[i] /= 2
