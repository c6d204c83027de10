"""How many of a network's candidates noise alone would give: a mild guard against particles that are none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from halfmap.io.micrographs import Image

_CLIP = 5.0
_TAIL = 0.1
"""Part of noise's candidates, the best, that tells how fast they become fewer."""

_FEWEST = 8
_LEAST = 0.01
"""Probability at the least that a candidate is left: else ranks among the worst would be lost."""


def noise_like(image: Image, rng: np.random.Generator) -> Image:
    """Gaussian noise with the power spectrum and the mask of a micrograph.

    Parameters
    ----------
    image : Image
        Micrograph; what is masked is 0.
    rng : Generator
        Draws the phases.

    Notes
    -----
    Particles add to the spectrum, so that there is rather more noise than in the micrograph [1]_.

    References
    ----------
    .. [1] Theiler et al. 1992, Physica D 58, 77-94, DOI 10.1016/0167-2789(92)90102-S
    """
    shape = image.values.shape
    spectrum = np.asarray(scipy.fft.rfft2(np.clip(image.values, -_CLIP, _CLIP)))
    white = np.asarray(scipy.fft.rfft2(rng.standard_normal(shape, dtype=np.float32)))
    noise = np.asarray(scipy.fft.irfft2(np.abs(spectrum) * np.exp(1j * np.angle(white)), s=shape))
    # The power of the usable part was spread over all.
    values = noise * image.mask / np.sqrt(image.mask.mean())
    return replace(image, values=values.astype(np.float32), level=None)


def most_log_odds(score: NDArray, noise: NDArray) -> NDArray[np.float64]:
    """Log-odds of candidates that a micrograph's noise allows at the most.

    Parameters
    ----------
    score : array (n,)
        Of the micrograph's candidates.
    noise : array (m,)
        Of candidates in noise like it.

    Returns
    -------
    array (n,)
        They rise with the score.

    Notes
    -----
    Of the candidates that score as high or higher, noise gives such a part (the q-value [1]_, the least over
    all lower thresholds too). It is no more than the candidate's own chance to be noise, so that the bound is
    a mild one: beside many particles it bounds little. Beyond most scores of the noise their number falls
    exponentially [2]_, so that a few candidates that no noise comes near are not doubted.

    References
    ----------
    .. [1] Storey 2002, J. R. Stat. Soc. B 64, 479-498, DOI 10.1111/1467-9868.00346
    .. [2] Pickands 1975, Ann. Stat. 3, 119-131, DOI 10.1214/aos/1176343003
    """
    order = np.argsort(-score, kind="stable")
    part = _higher(np.asarray(score, np.float64)[order], noise) / np.arange(1, len(score) + 1)
    q = np.minimum.accumulate(part[::-1])[::-1].clip(1e-9, 1 - _LEAST)
    result = np.empty(len(score))
    result[order] = np.log((1 - q) / q)
    return result


def _higher(score: NDArray[np.float64], noise: NDArray) -> NDArray[np.float64]:
    """How many of noise's candidates are expected above scores."""
    noise = np.sort(noise).astype(np.float64)
    if len(noise) == 0:
        return np.zeros(len(score))
    count = min(len(noise), max(_FEWEST, round(_TAIL * len(noise))))
    begin = noise[-count]
    # One unit of log-odds more than there is: a few alike do not say that the tail ends.
    fall = (float((noise[-count:] - begin).sum()) + 1) / count
    beyond = count * np.exp(-np.maximum(score - begin, 0) / fall)
    return np.where(score > begin, beyond, len(noise) - np.searchsorted(noise, score, side="left"))
