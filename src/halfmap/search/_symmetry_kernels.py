"""Compiled CPU kernel: sums over the operators of a point group that map a grid onto itself."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def add_orbits(data: np.ndarray, operators: np.ndarray, origin: int, z: int) -> None:
    """Put sums over operators (g, 9) at S q in the places of what a half-space (z, y, x, 4) holds.

    Voxels that the operators map to each other share a sum. It is made once, by the call for the plane `z` of
    the one that lies first, so that calls for other planes may run beside it. The plane x = 0 is whole. Of
    the four numbers two are a complex value, which at -q is the conjugate, the third is real. Nothing is
    beyond the ball of radius ``origin + 1``.
    """
    n_y, n_x = data.shape[1], data.shape[2]
    voxels = data.reshape(-1, data.shape[3])
    found = np.empty(len(operators), np.int64)
    conjugate = np.empty(len(operators), np.bool_)
    pz = z - origin
    for py in range(1 - origin, origin):
        for x in range(origin):
            if x * x + py * py + pz * pz > (origin + 1) ** 2:
                break
            if x == 0 and (py < 0 or (py == 0 and pz < 0)):
                continue
            own = (z * n_y + py + origin) * n_x + x
            is_first = True
            for g in range(len(operators)):
                turn = operators[g]
                tx = turn[0] * x + turn[1] * py + turn[2] * pz
                ty = turn[3] * x + turn[4] * py + turn[5] * pz
                tz = turn[6] * x + turn[7] * py + turn[8] * pz
                conjugate[g] = tx < 0 or (tx == 0 and (ty < 0 or (ty == 0 and tz < 0)))
                if conjugate[g]:
                    tx, ty, tz = -tx, -ty, -tz
                found[g] = ((tz + origin) * n_y + ty + origin) * n_x + tx
                if found[g] < own:
                    is_first = False
                    break
            if not is_first:
                continue
            real, imaginary, weight = 0.0, 0.0, 0.0
            for g in range(len(operators)):
                voxel = voxels[found[g]]
                real += voxel[0]
                imaginary += -voxel[1] if conjugate[g] else voxel[1]
                weight += voxel[2]
            for g in range(len(operators)):
                voxel = voxels[found[g]]
                voxel[0], voxel[2] = real, weight
                voxel[1] = -imaginary if conjugate[g] else imaginary
