"""How strong a candidate is beside the particles of its micrograph, which tells fragments from whole ones."""

from __future__ import annotations

import math

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray
from scipy.special import expit

from halfmap.io.micrographs import Image, coarser
from halfmap.steps.pick.candidates import Candidates
from halfmap.steps.pick.filter import match, whiten
from halfmap.steps.pick.learned_calibration import fewer_particles
from halfmap.steps.pick.obstacles import mask_obstacles
from halfmap.steps.pick.profiles import Shell

PIXELS = 12
"""Pixels that a particle is wide where strengths are measured."""

_BLUR = 0.1
_NEAR = 5
"""Pixels, a side, in which the best fit is looked for: the network's centres are not exact."""

_ROUNDS = 20
_USUAL, _DOUBT = 0.15, 10.0
"""Deviation of strengths that is expected, and with how many particles' weight."""

_FEWEST = 8
_LEAST = -10.0
"""Log-likelihood ratio beyond which a candidate is not worse."""

_OVERLAP = 2.0
"""Strength over that of particles up to which overlaps explain it; beyond lies dirt as well."""


def strengths(image: Image, candidates: Candidates, diameter: float) -> NDArray[np.float64]:
    """Matched filter's score of a ball at candidates, NaN beside obstacles.

    Parameters
    ----------
    image : Image
        Micrograph.
    candidates : Candidates
        Coordinates in pixels of the image.
    diameter : float
        Of the ball in Å.
    """
    coarse = coarser(image, diameter / PIXELS)
    factor = [new / old for new, old in zip(coarse.values.shape, image.values.shape, strict=True)]
    white = whiten(mask_obstacles(coarse, diameter), 2 * diameter)
    score, _ = match(white, Shell(diameter, 0.0, _BLUR).transform(white.frequency).astype(np.float32))
    score = np.where(white.image.mask, scipy.ndimage.maximum_filter(score, _NEAR), np.nan)
    return score[candidates.scaled(factor[1], factor[0]).pixels(score.shape)].astype(np.float64)


def evidence(log_odds: NDArray, strength: NDArray, share: float | None = None) -> NDArray[np.float64]:
    """What the strengths of a micrograph's candidates add to their log-odds of being particles.

    Parameters
    ----------
    log_odds : array (n,)
        Of being a particle, by the candidates' looks.
    strength : array (n,)
        Of any scale; NaN where it is not known, which adds nothing.
    share : float, optional
        As of `fewer_particles`.

    Returns
    -------
    array (n,)
        Log-likelihood ratios. All are 0 where there are too few particles to compare with.

    Notes
    -----
    Particles' strengths are normal about their middle, others' anywhere between that and nothing: the ratio
    of the two densities. The more alike particles are, the more those of their strength gain; where strengths
    are scattered, as noise's are, none does. What is stronger than the middle is neither more nor less a
    particle for it, since particles overlap; beyond two of them nothing gains. Middle and deviation are found
    by expectation-maximisation that starts from the looks alone.
    """
    result = np.zeros(len(log_odds))
    known = np.isfinite(strength)
    own, looks = strength[known], np.asarray(log_odds, np.float64)[known]
    # What looks like a few particles among much that does not is noise.
    if len(own) < _FEWEST or expit(looks + fewer_particles(looks, share)).sum() < _FEWEST:
        return result
    ratio = np.zeros(len(own))
    for _ in range(_ROUNDS):
        likely = expit(looks + ratio)
        if likely.sum() < _FEWEST:
            return result
        order = np.argsort(own)
        middle = float(np.interp(0.5, np.cumsum(likely[order]) / likely.sum(), own[order]))
        if middle <= 0:
            return result
        short = np.minimum(own / middle - 1, 0)
        # The lower half alone, which no overlap widens.
        square = 2 * float(likely @ short**2) + _DOUBT * _USUAL**2
        deviation = math.sqrt(square / (float(likely.sum()) + _DOUBT))
        normal = -((short / deviation) ** 2) / 2 - math.log(math.sqrt(2 * math.pi) * deviation)
        before, ratio = ratio, np.clip(normal, _LEAST, np.where(own > _OVERLAP * middle, 0, np.inf))
        if np.abs(ratio - before).max() < 1e-6:
            break
    result[known] = ratio
    return result
