"""The first search of a map's symmetry: turns about all axes, and groups in all orientations on a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.ops import harmonics
from halfmap.ops.rotations import grid_rotations, psi_count, to_rotation_vector, view_direction
from halfmap.ops.symmetry import in_asymmetric_unit, operators, order
from halfmap.search.symmetry_map import Band, Sphere

DEGREE = 24
"""Highest degree of the harmonics; it bounds the resolution of the first search."""

_TILT_STEP, _N_ROT = 3.0, 120
"""Grid of axes in degrees from z, and longitudes."""

_GRID_ORDER = 4
"""Of the HEALPix grid of orientations of a group."""


def axis_tables(band: Band, groups: Sequence[str]) -> dict[int, NDArray[np.float64]]:
    """Mean correlation under the turns of each fold about all axes of a hemisphere, (tilts, rots)."""
    degree = min(DEGREE, math.ceil(2 * math.pi * band.radius / band.resolution))
    count = max(4, round(3 * band.radius / band.resolution))
    radii_px = (torch.arange(count) + 0.5) * (band.radius_px / count)
    # A shell counts by its area. Degree 0, the spherical average, turns into itself whatever the map.
    shells = [values * radii_px for values in harmonics.expand(band.array, radii_px=radii_px, degree=degree)]
    shells[0] = torch.zeros_like(shells[0])
    tilts = np.arange(0, 90 + _TILT_STEP / 2, _TILT_STEP)
    power = harmonics.axial_power(shells, tilts=tilts, n_rot=_N_ROT)
    power /= power.sum(axis=-1, keepdims=True)
    folds = {int(fold) for group in groups for fold in _axes(group)[1]}
    # What is left by the mean over n turns are waves of multiples of n; the identity is one of the turns.
    return {fold: (fold * power[..., ::fold].sum(axis=-1) - 1) / (fold - 1) for fold in folds}


@lru_cache(maxsize=64)
def _axes(group: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Axes of a group (a, 3), each once, and their folds (a,)."""
    vectors = to_rotation_vector(operators(group)[1:]).numpy()
    axes = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    parallel = np.abs(axes @ axes.T) > 1 - 1e-6
    first = parallel.argmax(axis=1)
    kept, counts = np.unique(first, return_counts=True)
    return axes[kept], counts + 1


@lru_cache(maxsize=64)
def _orientations(group: str) -> NDArray[np.float64]:
    """Rotations that take axes of the standard setting to those of a map, each setting once: (n, 3, 3)."""
    turns = psi_count(_GRID_ORDER)
    first = torch.arange(0, 12 * 4**_GRID_ORDER) * turns
    unit = first[in_asymmetric_unit(view_direction(grid_rotations(first, order=_GRID_ORDER)), group)]
    if group.startswith("C"):
        # Turned about its only axis a group is the same: all directions of this axis do.
        return grid_rotations(first, order=_GRID_ORDER).transpose(-1, -2).numpy()
    rows = (unit[:, None] + torch.arange(turns)).flatten()
    return grid_rotations(rows, order=_GRID_ORDER).numpy()


def best_orientation(tables: dict[int, NDArray[np.float64]], group: str) -> tuple[float, Tensor]:
    """Highest mean correlation over the operators but the identity, and the rotation that has it."""
    rotations = _orientations(group)
    axes, folds = _axes(group)
    total = np.zeros(len(rotations))
    for axis, fold in zip(axes, folds.tolist(), strict=True):
        total += (fold - 1) * _look_up(tables[fold], rotations @ axis)
    best = int(total.argmax())
    return float(total[best]) / (order(group) - 1), torch.from_numpy(rotations[best]).float()


def _look_up(table: NDArray[np.float64], axes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values of a table of a hemisphere at axes (n, 3) of either sign, bilinear."""
    x, y, z = (axes * np.where(axes[:, 2:] < 0, -1, 1)).T
    tilt = np.degrees(np.arccos(np.clip(z, -1, 1))) / _TILT_STEP
    rot = np.degrees(np.arctan2(y, x)) % 360 * (_N_ROT / 360)
    row = np.minimum(tilt.astype(np.int64), len(table) - 2)
    column = rot.astype(np.int64)
    down, along = tilt - row, rot - column
    left, right = column % _N_ROT, (column + 1) % _N_ROT
    upper = (1 - along) * table[row, left] + along * table[row, right]
    lower = (1 - along) * table[row + 1, left] + along * table[row + 1, right]
    return (1 - down) * upper + down * lower


def null_scores(
    sphere: Sphere, volume: Tensor, resolution: float, groups: Sequence[str], count: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of the first search's score in maps of random phases, by group."""
    if count < 2:
        return dict.fromkeys(groups, (math.nan, math.nan))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        tables = axis_tables(sphere.random(volume, resolution, generator), groups)
        found.append([best_orientation(tables, group)[0] for group in groups])
    values = np.array(found)
    return {
        group: (float(mean), float(deviation))
        for group, mean, deviation in zip(groups, values.mean(0), values.std(0, ddof=1), strict=True)
    }
