"""What is expected of local motion before it is seen: smooth over the field, slowing down with dose.

Beam-induced motion is a Gaussian process. Over the field its correlation falls off as a Matérn-3/2 function,
for motion is alike over a few hundred nanometres; in time it is a Matérn-5/2 process of the logarithm of the
dose, for most of it happens in the first few electrons. Both are cut to their strongest modes, so that a
handful of coefficients of equal variance describe the motion of a movie.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SIDE = 9
"""Nodes along each axis on which spatial modes are computed."""

_LEFT_OUT = 0.002
"""Part of the variance that modes may leave out."""

_MOST_MODES = 20
_SETTLING_DOSE = 3.0
"""Dose in e/Å² that the logarithm of time is counted from."""

_TIME_SCALE = 1.0
"""Length scale of the process in that logarithm."""


@dataclass(frozen=True, eq=False)
class SpaceModes:
    """Functions of the place that span smooth fields of unit variance.

    Attributes
    ----------
    nodes : array (m, 2)
        Places (x, y) in Å.
    length : float
        Correlation length in Å.
    weights : array (m, modes)
        A mode at any place is the covariance with the nodes times these.
    """

    nodes: NDArray
    length: float
    weights: NDArray

    def __call__(self, places: NDArray) -> NDArray:
        """Modes (..., modes) at places (..., 2) in Å."""
        distance = np.linalg.norm(places[..., None, :] - self.nodes, axis=-1)
        return np.einsum("...m,mj->...j", _matern(distance, self.length, 1), self.weights)


def space_modes(size_A: tuple[float, float], *, length: float) -> SpaceModes:
    """Karhunen-Loève modes of the field of view.

    Parameters
    ----------
    size_A : tuple of 2 float
        Height and width in Å.
    length : float
        Correlation length in Å.
    """
    y, x = (np.linspace(0, size, _SIDE) for size in size_A)
    nodes = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    distance = np.linalg.norm(nodes[:, None] - nodes, axis=-1)
    values, vectors = _strongest(_matern(distance, length, 1) / len(nodes))
    # Nyström's method: eigenvectors on the nodes, carried to any place by the covariance.
    return SpaceModes(nodes, length, vectors / np.sqrt(values * len(nodes)))


def time_modes(dose: NDArray) -> NDArray:
    """Modes (n, modes) of the process at doses (n,) in e/Å², all zero at the first."""
    time = np.log1p(dose / _SETTLING_DOSE)
    covariance = _matern(np.abs(time[:, None] - time), _TIME_SCALE, 2)
    covariance -= np.outer(covariance[:, 0], covariance[0]) / covariance[0, 0]
    values, vectors = _strongest(covariance)
    modes = vectors * np.sqrt(values)
    modes[0] = 0
    return modes


def _strongest(covariance: NDArray) -> tuple[NDArray, NDArray]:
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    left_out = 1 - np.cumsum(values) / values.sum()
    count = min(int(np.searchsorted(-left_out, -_LEFT_OUT)) + 1, _MOST_MODES, len(values))
    return values[:count], vectors[:, :count]


def _matern(distance: NDArray, length: float, order: int) -> NDArray:
    """Matérn correlation of smoothness 3/2 (order 1) or 5/2 (order 2)."""
    scaled = np.sqrt(2 * order + 1) * distance / length
    polynomial = 1 + scaled if order == 1 else 1 + scaled + scaled**2 / 3
    return polynomial * np.exp(-scaled)
