"""Compiled kernel of rigid fits: density at the points of a model in a map, and its slopes there."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray


@numba.njit(cache=True, nogil=True)
def density_and_slopes(volume: NDArray, places: NDArray, values: NDArray, slopes: NDArray) -> None:
    """Density (n,) of a map (d, h, w) at places (n, 3) in voxels (x, y, z), linearly, and its slopes (n, 3).

    What is outside the map is 0.
    """
    depth, height, width = volume.shape
    for i in range(len(places)):
        x, y, z = places[i]
        x0, y0, z0 = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
        u, v, w = x - x0, y - y0, z - z0
        value = along_x = along_y = along_z = 0.0
        for corner in range(8):
            cx, cy, cz = corner & 1, (corner >> 1) & 1, corner >> 2
            px, py, pz = x0 + cx, y0 + cy, z0 + cz
            if px < 0 or py < 0 or pz < 0 or px >= width or py >= height or pz >= depth:
                continue
            density = volume[pz, py, px]
            wx, wy, wz = (u if cx else 1 - u), (v if cy else 1 - v), (w if cz else 1 - w)
            value += density * wx * wy * wz
            along_x += density * (1 if cx else -1) * wy * wz
            along_y += density * wx * (1 if cy else -1) * wz
            along_z += density * wx * wy * (1 if cz else -1)
        values[i] = value
        slopes[i, 0], slopes[i, 1], slopes[i, 2] = along_x, along_y, along_z
