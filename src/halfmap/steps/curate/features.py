"""Maps on the mask's grid that segmentation looks at: level of the image, strength of its texture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.ndimage as ndi
from numpy.typing import NDArray

PIXEL_SIZE_A = 20.0
"""What a pixel of the mask is to be; it is a whole number of the micrograph's, four times a small one."""

_FINE = 4
_TYPICAL_DOSE = 40.0
"""e/Å², assumed where counts have been rescaled; between 20 and 80 contrast is right within 1.4."""

_SAME_SCALE = 0.5, 1.5
"""Level stated by the noise over the mean, between which pixels are taken for counts."""

_TEXTURE_A = 12.0, 60.0
"""Period of the detail whose strength tells carbon from ice."""


@dataclass(frozen=True, eq=False)
class Features:
    """A micrograph reduced to the grid of its mask.

    Parameters
    ----------
    level : array (h, w)
        Mean of each block over the level of the whole: 1 is the median, less is darker.
    texture : array (h, w)
        Logarithm of the mean square of detail of 12 to 60 Å in each block.
    block : int
        Pixels of the micrograph that a pixel of the grid stands for, along each axis.
    pixel_size : float
        Of the grid, Å.
    preview : array (2 h, 2 w)
        Level on a grid twice as fine, for pictures.
    """

    level: NDArray[np.float32]
    texture: NDArray[np.float32]
    block: int
    pixel_size: float
    preview: NDArray[np.float32]


def reduce_image(image: NDArray[np.float32], pixel_size: float) -> Features:
    """Reduce a micrograph to the level and texture of its blocks.

    Parameters
    ----------
    image : array (h, w)
        Finite, hot pixels clipped.
    pixel_size : float
        In Å.

    Notes
    -----
    Levels are fractions of the transmitted intensity. Where a micrograph holds counts, its median is the
    unit. Where counts were shifted or scaled, the unit is what makes the noise of neighbouring pixels the
    shot noise of 40 e/Å². A darkness of 0.1 is then about that of 400 Å of ice, whatever the pixels' scale.
    """
    fine = max(1, round(PIXEL_SIZE_A / _FINE / pixel_size))
    block = _FINE * fine
    small = block_means(image, fine)
    rows = -(-image.shape[0] // block) * _FINE
    columns = -(-image.shape[1] // block) * _FINE
    small = np.pad(small, ((0, rows - small.shape[0]), (0, columns - small.shape[1])), mode="edge")
    level = block_means(small, _FINE)
    median = float(np.median(level))
    unit = _pixel_noise(image) * np.sqrt(_TYPICAL_DOSE) * pixel_size
    if median > 0 and _SAME_SCALE[0] < unit / median < _SAME_SCALE[1]:
        unit = median
    unit = max(unit, 1e-6 * float(np.abs(level).max()), 1e-30)
    return Features(
        level=1 + (level - median) / unit,
        texture=_texture(small / unit, fine * pixel_size),
        block=block,
        pixel_size=block * pixel_size,
        preview=1 + (block_means(small, _FINE // 2) - median) / unit,
    )


def block_means(image: NDArray, size: int) -> NDArray[np.float32]:
    """Means of blocks of size x size pixels; those cut by the lower and right edge are of what there is."""
    if size == 1:
        return np.asarray(image, np.float32)
    h, w = image.shape
    rows = np.arange(0, h, size)
    columns = np.arange(0, w, size)
    whole = image[: h // size * size, : w // size * size]
    out = np.empty((len(rows), len(columns)), np.float32)
    # Rows first: they are contiguous in memory.
    sums = whole.reshape(h // size, size, -1).sum(axis=1, dtype=np.float32)
    out[: h // size, : w // size] = sums.reshape(h // size, w // size, size).mean(axis=2) / size
    if h % size:
        last = image[rows[-1] :].mean(axis=0)
        out[-1] = np.add.reduceat(last, columns) / np.diff([*columns, w])
    if w % size:
        last = image[:, columns[-1] :].mean(axis=1)
        out[:, -1] = np.add.reduceat(last, rows) / np.diff([*rows, h])
    return out


def blur(values: NDArray, sigma: float) -> NDArray[np.float32]:
    """Values (h, w) under a Gaussian of `sigma` pixels; beyond the edge is what is at it."""
    return np.asarray(ndi.gaussian_filter(values, sigma, mode="nearest"), np.float32)


def _pixel_noise(image: NDArray[np.float32]) -> float:
    """Standard deviation of neighbouring pixels' difference, as that of a single one."""
    step = np.diff(image[:: max(1, len(image) // 500)], axis=1).ravel()
    low, high = np.percentile(step, (15.87, 84.13))
    return float(high - low) / 2 / np.sqrt(2)


def _texture(small: NDArray[np.float32], pixel_size: float) -> NDArray[np.float32]:
    """Logarithm of the mean square of detail in a band, on blocks of `_FINE` pixels."""
    fine, coarse = (period / 5 / pixel_size for period in _TEXTURE_A)
    band = (blur(small, fine) if fine > 0.4 else small) - blur(small, coarse)
    return np.log(block_means(band * band, _FINE) + 1e-30)
