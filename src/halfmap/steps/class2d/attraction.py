"""How sharp probabilities are, that no class attracts all particles."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_USUAL, _SHARPEST = 2.0, 4.0
"""Largest class over an equal share that is no attraction, and highest power of the likelihood."""


def next_sharpness(sharpness: float, kinds: NDArray[np.intp], classes: int) -> float:
    """Power of the likelihood for the next iteration.

    Parameters
    ----------
    sharpness : float
        Of this one.
    kinds : array (n,)
        Class of each particle, from 0.
    classes : int
        How many there are.

    Notes
    -----
    Half the way, in the logarithm, to what the classes as they are ask for: classes answer an iteration
    later, and the whole way would swing to and fro.
    """
    return math.sqrt(sharpness * sharpness_for(attraction(kinds, classes)))


def attraction(kinds: NDArray[np.intp], classes: int) -> float:
    """Particles of the largest class, less two standard deviations of chance, over an equal share."""
    largest = float(np.bincount(kinds).max())
    return max(0.0, largest - 2 * math.sqrt(largest)) * classes / len(kinds)


def sharpness_for(attraction: float) -> float:
    """Power of the likelihood: 1, or more where the largest class has over twice an equal share.

    Parameters
    ----------
    attraction : float
        Particles of the largest class over an equal share.

    Notes
    -----
    Where single particles hardly tell views apart, each adds a little to many averages. These grow alike and
    round, and the one of most particles, which has least noise, wins the others over. Sharper probabilities
    let classes part [1]_. Where none attracts they do harm: they make sure what is not.

    References
    ----------
    .. [1] Naim & Gildea 2012, Proc. 29th Int. Conf. Machine Learning, DOI 10.48550/arXiv.1206.6427
    """
    return min(max((attraction / _USUAL) ** 2, 1.0), _SHARPEST)
