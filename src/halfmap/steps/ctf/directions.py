"""Noise that is not the same in all directions, taken out of spectra before rings are looked for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_HARMONICS = 4, 8
"""Waves in a turn that what acts along both axes alike is made of. Drift has two."""

_POWERS = 4, 8, 16
"""Of the frequency over Nyquist's: near to that interpolation and cameras act along the axes, and far from it
nothing does that rings could be taken for."""

_BELIEVED = 1.0
"""Largest logarithm of a bin over its ring that is no lattice spot."""


def level_directions(power: NDArray, count: NDArray, frequency: NDArray, nyquist: float) -> NDArray:
    """Divide spectra by what they smoothly depend on the direction.

    Frames that were moved by interpolation have less noise towards the edges of the spectrum than towards
    its corners. At the frequency of a ring that is a wave over the directions, and would pass for rings of
    some strongly astigmatic defocus. Cosines of 4 and 8 times the direction, with amplitudes that rise
    steeply with the frequency, are fitted to the logarithm of the mean spectrum over its rings' means.

    Parameters
    ----------
    power : array (t, r, s)
        Power of tiles in rings and sectors of half a turn, the first of which begins at the x axis.
    count : array (r, s)
        Coefficients in each bin.
    frequency : array (r,)
        Of the rings.
    nyquist : float
        Nyquist's frequency, in the same unit.

    Returns
    -------
    array (t, r, s)
        Spectra with the same mean over directions, up to noise.
    """
    mean = power.mean(axis=0)
    ring = (mean * count).sum(axis=1) / np.maximum(count.sum(axis=1), 1)
    used = count * (mean > 0) * (ring > 0)[:, None]
    ratio = np.where(used > 0, mean / np.maximum(ring, 1e-300)[:, None], 1.0)
    logs = np.clip(np.log(ratio), -_BELIEVED, _BELIEVED)
    angle = (np.arange(power.shape[2]) + 0.5) * np.pi / power.shape[2]
    terms = np.stack(
        [np.outer((frequency / nyquist) ** p, np.cos(n * angle)) for n in _HARMONICS for p in _POWERS]
    )
    # What a ring has in common is not the directions'.
    total = np.maximum(used.sum(axis=1), 1e-9)[:, None]
    centred = np.stack([*terms, logs])
    centred = centred - ((centred * used).sum(axis=2) / total.T)[..., None]
    weighted = (centred * np.sqrt(used)).reshape(len(centred), -1)
    factors = np.linalg.lstsq(weighted[:-1].T, weighted[-1], rcond=1e-6)[0]
    direction = np.exp(np.tensordot(factors, terms, axes=1))
    return power / direction
