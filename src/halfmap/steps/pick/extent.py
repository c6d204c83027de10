"""How far there is signal around what was picked: parts of particles are told from whole ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.signal
from numpy.typing import NDArray

from halfmap.steps.pick.candidates import Candidates
from halfmap.steps.pick.filter import Whitened, inside


def extent(searched: Sequence[tuple[Whitened, Candidates]], size: float) -> float:
    """Diameter in Å to which there is more signal around candidates than on average.

    Parameters
    ----------
    searched : sequence of (Whitened, Candidates)
        Micrographs and what was picked in them, in their pixels.
    size : float
        Diameter in Å of what was looked for.

    Returns
    -------
    float
        At the most six times the size.

    Notes
    -----
    The mean square of the micrographs, filtered to what is not noise and the CTF's signs undone, over the
    distance from candidates. Particles keep some distance, so that it falls below the average where a
    particle ends. It does not average out as the mean of particles does: around a part, it is high as far as
    the whole particle reaches, which lies on any side of it.
    """
    pixel_size = searched[0][0].image.pixel_size
    bins = int(3 * size / pixel_size) + 1
    total, count = np.zeros(bins), np.zeros(bins)
    for white, found in searched:
        mask = white.image.mask.astype(np.float32)
        energy = _signal(white) ** 2 * mask
        energy *= mask.sum() / max(float(energy.sum()), 1e-30)
        places = np.zeros(mask.shape, np.float32)
        places[found.pixels(mask.shape)] = 1
        total += _around(energy, places, bins)
        count += _around(mask, places, bins)
    more = total / np.maximum(count, 1) - 1
    more = np.convolve(np.pad(more, 1, mode="edge"), (0.25, 0.5, 0.25), mode="valid")
    begin = int(np.argmax(more[: max(1, int(0.7 * size / pixel_size))]))
    less = np.flatnonzero(more[begin:] <= 0)
    if len(less) == 0:
        return 6 * size
    if less[0] == 0:
        return 2 * pixel_size * begin
    last = begin + less[0] - 1
    return 2 * pixel_size * float(last + more[last] / (more[last] - more[last + 1]))


def _signal(white: Whitened) -> NDArray[np.float32]:
    """Micrograph with the amplitudes of what is not noise, and phases as without a CTF."""
    share = np.maximum(1 - (white.noise / white.power) ** 2, 0)
    return inside(white, white.spectrum * np.sqrt(share) * np.sign(white.ctf))


def _around(values: NDArray[np.float32], places: NDArray[np.float32], bins: int) -> NDArray:
    """Sums of values over the distance from all places, in pixels."""
    h, w = values.shape
    moved = scipy.signal.correlate(values, places, mode="full", method="fft")
    reach_y, reach_x = min(bins, h - 1), min(bins, w - 1)
    moved = moved[h - 1 - reach_y : h + reach_y, w - 1 - reach_x : w + reach_x]
    y, x = np.mgrid[-reach_y : reach_y + 1, -reach_x : reach_x + 1]
    ring = np.minimum(np.rint(np.hypot(y, x)).astype(int), bins)
    return np.bincount(ring.ravel(), weights=moved.ravel(), minlength=bins + 1)[:bins]
