"""Sums over the pixels of images, in one pass."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

_ANY_ORDER = {"reassoc", "contract"}
"""Sums may be taken in any order, the same one every time: several pixels at once."""


@njit(nogil=True, cache=True, fastmath=_ANY_ORDER)
def mean_and_square(images: NDArray, found: NDArray[np.float64]) -> None:  # pragma: no cover - compiled
    """Mean and mean square deviation of every image.

    Parameters
    ----------
    images : array (n, size)
        Pixels of the images.
    found : array (n, 2)
        Written to.
    """
    count = images.shape[1]
    for i in range(len(images)):
        # Against a value of the image: the squares must not drown in its level.
        level = np.float64(images[i, 0])
        first, second = 0.0, 0.0
        for pixel in images[i]:
            value = np.float64(pixel) - level
            first += value
            second += value * value
        found[i, 0] = level + first / count
        found[i, 1] = max(second - first * first / count, 0.0) / count
