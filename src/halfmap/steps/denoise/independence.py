"""Whether halves are independent: a network learns whatever they have in common, noise as well."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from halfmap.errors import ParameterError
from halfmap.log import log
from halfmap.ops.fourier import rfft2
from halfmap.steps.denoise.halves import highest_correlation

_ALIKE = 0.5
"""Correlation of halves at their highest frequencies from which on they are one image."""

_RELATED = 0.1
"""And from which on they share noise: signal has none to speak of there."""

_PATTERN = 0.02
"""The same of halves of different micrographs, which nothing but the camera can cause."""

_LOOKED_AT_px = 1024
_CHANCE = 5.0


def refuse_dependent(correlations: Sequence[float], images: Sequence[NDArray]) -> None:
    """Refuse halves that have noise in common.

    Parameters
    ----------
    correlations : sequence of float
        Of the two halves of each micrograph, at its highest frequencies.
    images : sequence of array (2, h, w)
        Halves as the network sees them, of the same micrographs.

    Raises
    ------
    ParameterError
        If they are the same image, or their noise is related within micrographs or between them.
    """
    typical = median(correlations)
    if typical > _ALIKE:
        raise ParameterError(
            f"even and odd sums are one image: they correlate by {typical:.2f} at the highest frequencies",
            hint="give sums of different frames, as motion writes them",
        )
    if typical > _RELATED:
        raise ParameterError(
            f"the noise of even and odd sums is related: they correlate by {typical:.2f} at the highest "
            "frequencies, where there is no signal",
            hint="was the gain reference applied, and are they sums of frames that no filter has mixed?",
        )
    across = [_across(one, other) for one, other in pairwise(images)]
    if across and median(across) > _PATTERN and median(across) > _CHANCE * _scatter(images[0]):
        raise ParameterError(
            f"micrographs have a pattern in common: the even sum of one correlates by {median(across):.2f} "
            "with the odd sum of the next at the highest frequencies",
            hint="apply the gain reference in motion: the network would keep its pattern for signal",
        )


def warn_of_dependent(correlations: Sequence[float]) -> None:
    """Warn where what is measured of halves that are denoised means nothing, as their noise is related."""
    typical = median(correlations)
    if abs(typical) > _RELATED:
        log.warning(
            "even and odd sums correlate by %.2f at the highest frequencies, where there is no signal: "
            "what is said of noise, bias and their ratios here is wrong",
            typical,
        )


def _across(one: NDArray, other: NDArray) -> float:
    """Correlation of the even half of one micrograph with the odd half of another."""
    side = _side(one, other)
    spectra = [
        rfft2(torch.from_numpy(np.asarray(half[:side, :side], np.float32))) for half in (one[0], other[1])
    ]
    return highest_correlation(spectra[0], spectra[1], shape=(side, side))


def _side(*images: NDArray) -> int:
    return min(_LOOKED_AT_px, *(length // 2 * 2 for image in images for length in image.shape[1:]))


def _scatter(image: NDArray) -> float:
    """Standard error of such a correlation by chance, of a ring from three quarters of Nyquist to it."""
    side = _side(image)
    return 1.0 / np.sqrt(np.pi / 2 * (side / 2) ** 2 * (1 - 0.75**2))
