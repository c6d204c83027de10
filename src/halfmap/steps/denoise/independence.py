"""Whether halves are independent: a network learns whatever they have in common, noise as well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from halfmap.errors import ParameterError
from halfmap.log import log
from halfmap.ops.fourier import rfft2
from halfmap.steps.denoise.halves import HalvesItem, highest_correlation, raw_halves

ALIKE = 0.5
"""Correlation of halves at high frequencies from which on they are one image."""

_RELATED, _DOUBTFUL = 0.1, 0.05
"""And from which on they share noise, or may do: signal has hardly any there, unless pixels are coarse."""

_PATTERN = 0.02
"""The same of halves of different micrographs, which nothing but the camera can cause."""

_PAIRS = 8
"""Pairs of micrographs that are compared for it, at the most."""

_LOOKED_AT_px = 1024
_CHANCE = 5.0


def refuse_dependent(correlations: Sequence[float], items: Sequence[HalvesItem]) -> None:
    """Refuse halves that have noise in common.

    Parameters
    ----------
    correlations : sequence of float
        Of the two halves of each micrograph, at high frequencies.
    items : sequence of HalvesItem
        The micrographs.

    Raises
    ------
    ParameterError
        If they are the same image, or their noise is related within micrographs or between them, or nothing
        can be said of it.
    """
    known = [value for value in correlations if math.isfinite(value)]
    if not known:
        raise ParameterError(
            "even and odd sums hold nothing beyond half of the Nyquist frequency, so that nobody can tell "
            "whether their noise is independent",
            hint="give sums that were not filtered",
        )
    typical = median(known)
    if typical > ALIKE:
        raise ParameterError(
            f"even and odd sums are one image: they correlate by {typical:.2f} at high frequencies",
            hint="give sums of different frames, as motion writes them",
        )
    # Before their phases are flipped: by each micrograph's own CTF a pattern of all would be lost.
    chosen = items[: _PAIRS + 1]
    halves = [_corners(item) for item in chosen] if len(chosen) > 1 else []
    across = [_across(one[0], other[1]) for one, other in pairwise(halves)]
    across = [value for value in across if math.isfinite(value)]
    if across and median(across) > max(_PATTERN, _CHANCE * _scatter(halves[0][0])):
        raise ParameterError(
            f"micrographs have a pattern in common: the even sum of one correlates by {median(across):.2f} "
            "with the odd sum of the next at high frequencies",
            hint="apply the gain reference in motion: the network would keep its pattern for signal",
        )
    warn_of_dependent([item.name for item in items], correlations)
    if abs(typical) > _RELATED:
        raise ParameterError(
            f"the noise of even and odd sums is related: they correlate by {typical:.2f} at high "
            "frequencies, where there is hardly any signal",
            hint="was the gain reference applied, and are they sums of frames that no filter has mixed?",
        )


def warn_of_dependent(names: Sequence[str], correlations: Sequence[float]) -> None:
    """Warn of halves whose noise may be related, so that what is measured of them would mean nothing."""
    related = [
        (name, value) for name, value in zip(names, correlations, strict=True) if abs(value) > _DOUBTFUL
    ]
    if related:
        log.warning(
            "even and odd sums of %d of %d micrographs correlate at high frequencies, where there is hardly "
            "any signal unless pixels are coarse, the first one, %s, by %.2f: if that is noise, what is said "
            "of noise, bias and ratios is wrong",
            *(len(related), len(names), *related[0]),
        )


def _corners(item: HalvesItem) -> list[NDArray[np.float32]]:
    """What is looked at of both halves: whole ones of all micrographs would fill the memory."""
    return [half[:_LOOKED_AT_px, :_LOOKED_AT_px].copy() for half in raw_halves(item)]


def _across(even: NDArray, odd: NDArray) -> float:
    """Correlation of the even half of one micrograph with the odd half of another."""
    side = _side(even, odd)
    spectra = [
        rfft2(torch.from_numpy(half[:side, :side] - half[:side, :side].mean())) for half in (even, odd)
    ]
    return highest_correlation(spectra[0], spectra[1], shape=(side, side), of_one=False)


def _side(*images: NDArray) -> int:
    return min(length // 2 * 2 for image in images for length in image.shape)


def _scatter(image: NDArray) -> float:
    """Standard error of such a correlation by chance, of all beyond half of Nyquist."""
    return 1.0 / np.sqrt(np.pi / 2 * (_side(image) / 2) ** 2 * (1 - 0.5**2))
