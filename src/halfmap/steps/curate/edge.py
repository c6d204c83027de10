"""The edge of the carbon film, or a gold one: a line or arc across the field, with a step along all of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.ndimage as ndi
from numpy.typing import NDArray
from scipy.optimize import minimize

from halfmap.steps.curate.features import Features, blur

_RADII_A = (math.inf, 16000.0, 10000.0, 7000.0, 5000.0)
"""Of curvature: holes of 1 to 3 µm, and squares."""

_ANGLES = 48
_REACH_A = 130.0
"""Half the distance across the edge over which the step is measured; Fresnel fringes are narrower."""

_SHORTEST_A = 500.0
_STEP, _TEXTURE_STEP = 0.05, 0.8
"""Smallest steps: darkness by 70 Å of carbon, and a power of the texture 2.2 times that of the ice."""

_SIGNIFICANT = 80.0
"""Of the score, in robust standard deviations of the scores of all arcs of the same micrograph."""

_UNEVEN = 1.6
"""How much a step that varies along the arc is worth less than an even one."""

_ALONG = 0.92
"""Share of the arc along which at least half of the mean step must be seen."""


@dataclass(frozen=True)
class Edge:
    """An arc: carbon lies where ``distance(x, y) > 0``.

    Parameters
    ----------
    angle : float
        Direction from the clear side to the carbon at the arc's middle, radians from x to y.
    offset : float
        Distance of the arc from the middle of the field along that direction, pixels of the grid.
    curvature : float
        Per pixel; positive if the clear side is the inside of the circle, a hole.
    """

    angle: float
    offset: float
    curvature: float

    def distance(self, x: NDArray, y: NDArray) -> NDArray:
        """Signed distance (same shape) of places (x, y) from the middle of the field; parabolic arcs."""
        along = -x * math.sin(self.angle) + y * math.cos(self.angle)
        across = x * math.cos(self.angle) + y * math.sin(self.angle)
        return across - self.offset + self.curvature / 2 * along**2


def find_edge(features: Features) -> tuple[Edge | None, NDArray[np.bool_]]:
    """Find the edge of the carbon and what lies beyond it.

    Parameters
    ----------
    features : Features
        Of the micrograph.

    Returns
    -------
    Edge or None
        None if there is none.
    array (h, w) of bool
        What is carbon.

    Notes
    -----
    Each arc is scored by the step of the level across it, and by that of the texture: how much darker, or
    rougher, it is on one side than on the other beyond what it changes a little further along the same
    direction. A step must be there along all of the arc, and its score stand out from those of all other arcs
    of the same micrograph, of which nearly all cross no edge.
    """
    shape = features.level.shape
    size = features.pixel_size
    level, texture = (_smoothed(values, size) for values in (-features.level, features.texture))
    edge = _best_arc(level, size, _STEP) or _best_arc(texture, size, _TEXTURE_STEP)
    if edge is None:
        return None, np.zeros(shape, bool)
    y, x = _places(shape)
    return edge, edge.distance(x, y) > 0


def _places(shape: tuple[int, ...]) -> tuple[NDArray, NDArray]:
    h, w = shape
    return np.arange(h)[:, None] - (h - 1) / 2, np.arange(w)[None] - (w - 1) / 2


def _smoothed(values: NDArray, pixel_size: float) -> NDArray[np.float32]:
    # A contaminant is no edge: what is far off counts as not much more than what is usual.
    low, middle, high = np.percentile(values, (2, 50, 98))
    reach = max(high - middle, middle - low)
    return blur(np.clip(values, middle - reach, middle + reach), 40 / pixel_size)


def _best_arc(values: NDArray[np.float32], pixel_size: float, least: float) -> Edge | None:
    """The arc with the most significant step, if it is an edge."""
    scores, arcs = [], []
    for radius in _RADII_A:
        for sign in (1,) if math.isinf(radius) else (1, -1):
            for angle in np.arange(_ANGLES) * (2 * math.pi / _ANGLES):
                curvature = sign * pixel_size / radius
                offsets, score = _scan(values, pixel_size, angle, curvature)
                scores.append(score)
                arcs += [(angle, offset, curvature) for offset in offsets]
    score = np.concatenate(scores)
    if not len(score):
        return None
    best = int(np.argmax(score))
    # Where carbon covers much of the field, a good part of all arcs cross its edge; the weakest do not.
    if score[best] < _SIGNIFICANT * np.percentile(np.abs(score), 30) / 0.385:
        return None
    edge = _refined(values, pixel_size, arcs[best])
    step = _steps(values, edge, _REACH_A / pixel_size)
    if not len(step) or step.mean() < least or (step > step.mean() / 2).mean() < _ALONG:
        return None
    return edge


def _refined(values: NDArray[np.float32], pixel_size: float, arc: tuple[float, float, float]) -> Edge:
    """The arc near a coarse one with the steepest step."""
    unit = np.array([0.05, _REACH_A / 3 / pixel_size, pixel_size / 20_000])
    reach = max(_REACH_A / 3 / pixel_size, 1.0)

    def loss(change: NDArray) -> float:
        step = _steps(values, Edge(*(np.array(arc) + change * unit)), reach)
        return -float(step.mean()) if len(step) else 0.0

    return Edge(*(np.array(arc) + minimize(loss, np.zeros(3), method="Nelder-Mead").x * unit))


def _steps(values: NDArray[np.float32], edge: Edge, reach: float) -> NDArray[np.float32]:
    """Differences across an arc, `reach` pixels beyond less as many before it, at places along it."""
    h, w = values.shape
    half = 0.5 * math.hypot(h, w)
    along = np.arange(-half, half, 2.0)
    across = edge.offset - edge.curvature / 2 * along**2
    sides = []
    for distance in (reach, -reach):
        x = (across + distance) * math.cos(edge.angle) - along * math.sin(edge.angle) + (w - 1) / 2
        y = (across + distance) * math.sin(edge.angle) + along * math.cos(edge.angle) + (h - 1) / 2
        sides.append(ndi.map_coordinates(values, [y, x], order=1, cval=np.nan))
    step = sides[0] - sides[1]
    return step[np.isfinite(step)]


def _scan(
    values: NDArray[np.float32], pixel_size: float, angle: float, curvature: float
) -> tuple[NDArray, NDArray]:
    """Offsets of arcs of one direction and their scores."""
    h, w = values.shape
    half = 0.5 * math.hypot(h, w)
    reach = max(_REACH_A / pixel_size, 1.5)
    stride = max(1.0, reach / 4)
    offsets = np.arange(-half, half, stride)
    along = np.arange(-half, half, reach / 2)
    # Rows: distance across; columns: place along the arc.
    across = offsets[:, None] - curvature / 2 * along[None] ** 2
    x = across * math.cos(angle) - along * math.sin(angle) + (w - 1) / 2
    y = across * math.sin(angle) + along * math.cos(angle) + (h - 1) / 2
    inside = (x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1)
    sampled = values[np.clip(np.rint(y), 0, h - 1).astype(int), np.clip(np.rint(x), 0, w - 1).astype(int)]
    # Four strides of a quarter of the reach to either side.
    both = inside[8:] & inside[:-8]
    count = both.sum(axis=1)
    enough = count * reach / 2 * pixel_size >= _SHORTEST_A
    if not enough.any():
        return np.empty(0), np.empty(0)
    both, count = both[enough], count[enough]
    step = np.where(both, sampled[8:][enough] - sampled[:-8][enough], 0)
    mean = step.sum(axis=1) / count
    spread = np.sqrt(np.maximum((step * step).sum(axis=1) / count - mean**2, 0))
    # What changes as much before and behind is a gradient.
    excess = mean - np.maximum(ndi.uniform_filter1d(mean, 33, mode="nearest"), 0)
    uneven = _UNEVEN * spread / np.maximum(np.abs(mean), 1e-9)
    return offsets[4:-4][enough], excess * np.sqrt(count) / np.sqrt(1 + uneven**2)
