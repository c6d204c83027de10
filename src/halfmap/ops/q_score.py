"""Q-score: how much the density about each atom looks like that of a well resolved atom."""

from __future__ import annotations

import math
from functools import cache

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree
from torch import Tensor

from halfmap.errors import ShapeError

SIGMA_A = 0.6
"""Width of the Gaussian that atoms are compared with; that of the data bank's scores is 0.4."""

REACH_A, STEP_A = 2.0, 0.1
"""Radius of the last shell, and the distance of shells."""

POINTS = 8
"""In each shell at least, and times that the atom's centre counts."""

TRIALS, MORE = 50, 2
"""Times that points are laid on a shell, and by how many more each time, until enough are free."""

NEARER = 0.9
"""Part of a point's distance from its atom within which no other atom may be."""

_HIGH, _LOW = 10.0, 1.0
"""Standard deviations above and below the map's mean between which the reference Gaussian lies."""


def q_scores(
    volume: Tensor,
    positions: Tensor,
    *,
    pixel_size: float,
    sigma: float = SIGMA_A,
    groups: Tensor | None = None,
) -> Tensor:
    """Score each atom by the correlation of the density about it with a Gaussian.

    About each atom, points are laid on spheres of radii 0 to 2 Å, every 0.1 Å: eight or more on each that
    are nearer to this atom than to others. The density at these points, interpolated linearly, is correlated
    about the mean with a Gaussian of their distance. Its width is that of an atom in a map of 1.5 Å or so;
    it falls from ten standard deviations above the map's mean, or its maximum, to one below, or its minimum.

    Parameters
    ----------
    volume : Tensor (d, h, w)
        Map.
    positions : Tensor (n, 3)
        Atoms (x, y, z) in Å from the first voxel's centre: all that are there, without hydrogens.
    pixel_size : float
        In Å.
    sigma : float
        Standard deviation of the Gaussian in Å.
    groups : Tensor (n,) of integers, optional
        Alternative locations: of atoms with different ones, other than 0, neither hides the other.

    Returns
    -------
    Tensor (n,) float64
        From -1 to 1; not a number for atoms outside the map, and where the density is the same everywhere.

    Raises
    ------
    ShapeError
        If there is no volume, or positions are not (n, 3).

    Notes
    -----
    A point is free if no other atom is within 0.9 of its distance from its own, as where scores were first
    calculated; shells whose points other atoms hide, however many are laid, are left out. Points on a sphere
    lie on the spiral of [2]_, so that nothing is drawn by chance. What is outside the map is 0.

    References
    ----------
    .. [1] Pintilie et al. 2020, Nat. Methods 17, 328-334, DOI 10.1038/s41592-020-0731-1
    .. [2] Saff & Kuijlaars 1997, Math. Intelligencer 19, 5-11, DOI 10.1007/BF03024331

    Examples
    --------
    >>> axis = (torch.arange(21) - 10).square()
    >>> square = (axis[:, None, None] + axis[:, None] + axis) * 0.25
    >>> atom = torch.exp(-square / (2 * 0.6**2))
    >>> round(float(q_scores(atom, torch.tensor([[5.0, 5.0, 5.0]]), pixel_size=0.5)), 2)
    1.0
    """
    if volume.ndim != 3 or positions.ndim != 2 or positions.shape[1] != 3:
        raise ShapeError(f"atoms {tuple(positions.shape)} in a map {tuple(volume.shape)} cannot be scored")
    array = np.ascontiguousarray(volume.detach().cpu().numpy(), np.float32)
    atoms = np.ascontiguousarray(positions.detach().cpu().double().numpy())
    labels = np.zeros(len(atoms), np.int64) if groups is None else groups.cpu().numpy().astype(np.int64)
    mean, deviation = float(array.mean(dtype=np.float64)), float(array.std(dtype=np.float64))
    high = min(mean + _HIGH * deviation, float(array.max()))
    low = max(mean - _LOW * deviation, float(array.min()))
    radii = STEP_A * np.arange(1, round(REACH_A / STEP_A) + 1)
    reference = low + (high - low) * np.exp(-np.square(radii / sigma) / 2)
    starts, neighbours = _neighbours(atoms, labels)
    directions, first = _spirals()
    scores = _scores(
        array, atoms, starts, neighbours, directions, first, radii, reference, high, 1 / pixel_size
    )
    return torch.from_numpy(scores)


def _neighbours(atoms: NDArray[np.float64], groups: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
    """Atoms near enough to hide points of each: where each one's begin (n + 1,), and all of them."""
    pairs = KDTree(atoms).query_pairs((1 + NEARER) * REACH_A, output_type="ndarray").astype(np.int64)
    one, two = groups[pairs[:, 0]], groups[pairs[:, 1]]
    pairs = pairs[(one == two) | (one == 0) | (two == 0)]
    both = np.concatenate([pairs, pairs[:, ::-1]])
    both = both[np.lexsort((both[:, 1], both[:, 0]))]
    starts = np.searchsorted(both[:, 0], np.arange(len(atoms) + 1))
    return starts, np.ascontiguousarray(both[:, 1])


@cache
def _spirals() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Points of all trials, one after the other (m, 3), and where each trial begins (trials + 1,)."""
    counts = POINTS + MORE * np.arange(TRIALS)
    return np.concatenate([spiral(int(n)) for n in counts]), np.append(0, np.cumsum(counts))


def spiral(n: int) -> NDArray[np.float64]:
    """Points evenly on the unit sphere, from pole to pole on a spiral: (n, 3).

    References
    ----------
    .. [1] Saff & Kuijlaars 1997, Math. Intelligencer 19, 5-11, DOI 10.1007/BF03024331
    """
    height = np.linspace(-1, 1, n)
    across = np.sqrt(np.clip(1 - height**2, 0, None))
    steps = np.zeros(n)
    steps[1:-1] = 3.6 / (math.sqrt(n) * across[1:-1])
    turn = np.cumsum(steps)
    turn[-1] = 0.0
    return np.stack([across * np.cos(turn), across * np.sin(turn), height], axis=1)


@numba.njit(cache=True)
def _at(volume: NDArray, x: float, y: float, z: float) -> float:
    """Density at a place in voxels, linearly; 0 where a voxel of the eight is missing."""
    depth, height, width = volume.shape
    x0, y0, z0 = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
    if x < 0 or y < 0 or z < 0 or x > width - 1 or y > height - 1 or z > depth - 1:
        return 0.0
    x1, y1, z1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1), min(z0 + 1, depth - 1)
    u, v, w = x - x0, y - y0, z - z0
    low = (1 - v) * ((1 - u) * volume[z0, y0, x0] + u * volume[z0, y0, x1])
    low += v * ((1 - u) * volume[z0, y1, x0] + u * volume[z0, y1, x1])
    high = (1 - v) * ((1 - u) * volume[z1, y0, x0] + u * volume[z1, y0, x1])
    high += v * ((1 - u) * volume[z1, y1, x0] + u * volume[z1, y1, x1])
    return (1 - w) * low + w * high


@numba.njit(parallel=True, cache=True)
def _scores(
    volume: NDArray,
    atoms: NDArray,
    starts: NDArray,
    neighbours: NDArray,
    directions: NDArray,
    first: NDArray,
    radii: NDArray,
    reference: NDArray,
    high: float,
    scale: float,
) -> NDArray:
    """Correlation of each atom (n,), nan where there is none."""
    scores = np.full(len(atoms), np.nan)
    most = first[-1] - first[-2]
    shape = volume.shape
    for i in numba.prange(len(atoms)):
        x, y, z = atoms[i, 0], atoms[i, 1], atoms[i, 2]
        inside = 0 <= x * scale <= shape[2] - 1 and 0 <= y * scale <= shape[1] - 1
        if not (inside and 0 <= z * scale <= shape[0] - 1):
            continue
        values = np.empty(POINTS + len(radii) * most)
        wanted = np.empty(len(values))
        values[:POINTS] = _at(volume, x * scale, y * scale, z * scale)
        wanted[:POINTS] = high
        n = POINTS
        for shell in range(len(radii)):
            radius = radii[shell]
            square = (NEARER * radius) ** 2
            for trial in range(TRIALS):
                free = 0
                for k in range(first[trial], first[trial + 1]):
                    px = x + radius * directions[k, 0]
                    py = y + radius * directions[k, 1]
                    pz = z + radius * directions[k, 2]
                    hidden = False
                    for j in range(starts[i], starts[i + 1]):
                        other = atoms[neighbours[j]]
                        apart = (px - other[0]) ** 2 + (py - other[1]) ** 2 + (pz - other[2]) ** 2
                        if apart < square:
                            hidden = True
                            break
                    if not hidden:
                        values[n + free] = _at(volume, px * scale, py * scale, pz * scale)
                        wanted[n + free] = reference[shell]
                        free += 1
                if free >= POINTS:
                    n += free
                    break
        a, b = values[:n] - values[:n].mean(), wanted[:n] - wanted[:n].mean()
        norm = np.sqrt((a * a).sum() * (b * b).sum())
        if norm > 0:
            scores[i] = (a * b).sum() / norm
    return scores
