"""Score micrographs by a network that was trained on simulated ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from halfmap.io.micrographs import Image, local_mean
from halfmap.nets.picker import STRIDE, Picker, score_image
from halfmap.nets.weights import load_weights, shipped
from halfmap.ops.fourier import irfft2, resize_spectrum, rfft2
from halfmap.ops.threads import one_torch_thread
from halfmap.steps.pick.candidates import Candidates, find_peaks
from halfmap.steps.pick.learned_calibration import fewer_particles
from halfmap.steps.pick.learned_noise import most_log_odds, noise_like
from halfmap.steps.pick.strength import evidence, strengths

PIXELS = 24
"""Pixels of a particle's diameter in the images that the network sees."""

KIND = "picker"

DISTANCE = 0.7
"""Least distance of two particles over the diameter: they may overlap in projection."""

_BACKGROUND = 1.0
"""Standard deviation in diameters of the Gaussian average that is subtracted."""

_OUTLIER = 6.0
"""Robust standard deviations at which contaminants and carbon are cut, so that they leave no halo."""

_LIMIT = 5.0


def load_network(model: Path | None = None, *, device: str = "cpu") -> tuple[Picker, dict[str, Any]]:
    """Read the general model, or one that `pick train` wrote.

    Parameters
    ----------
    model : path, optional
        File of weights; the one that is shipped if not given.
    device : str
        Where to compute.

    Returns
    -------
    Picker, dict
        The network, ready to score, and the record of its training.

    Raises
    ------
    FileFormatError
        If the file is no model of this kind.
    """
    network = Picker()
    record = load_weights(shipped(KIND) if model is None else model, network, kind=KIND)
    return network.to(device).eval(), record


@lru_cache(maxsize=2)
def _network(model: Path | None, device: str) -> Picker:
    """The same, read once by each worker."""
    return load_network(model, device=device)[0]


@dataclass(frozen=True)
class Learned:
    """A network that scores micrographs; a method of picking.

    Attributes
    ----------
    diameter : float
        Of the particles in Å.
    model : path or None
        File of weights; None for the general model.
    device : str
        Where to compute.
    """

    diameter: float
    model: Path | None = None
    device: str = "cpu"

    @property
    def pixel_size(self) -> float:
        """That micrographs are best loaded at, in Å."""
        return self.diameter / PIXELS

    def specimen(self, image: Image) -> Image:
        """The micrograph as it is: the network has seen carbon and contaminants."""
        return image

    def search(self, image: Image, rng: np.random.Generator) -> tuple[Candidates, NDArray[np.float32]]:
        """Candidates of a micrograph in its coarse pixels; noise is reckoned with in their log-odds."""
        return judged(image, self.diameter, _network(self.model, self.device), rng), np.zeros(0, np.float32)


def judged(
    image: Image, diameter: float, network: Picker, rng: np.random.Generator, share: float | None = None
) -> Candidates:
    """Candidates of a micrograph, best first, with the log-odds of being particles by all that is known.

    Looks and strength together, under the share of particles that the micrograph has, and no higher than
    noise like the micrograph allows. Of the candidates that score as high or higher, noise gives such a part
    (the q-value, the least over all lower thresholds too). It is no more than the candidate's own chance to
    be noise, so that the bound is a mild one: beside many particles it bounds little.

    Parameters
    ----------
    image, diameter, network
        As of `by_looks`.
    rng : Generator
        Draws the noise.
    share : float, optional
        Share of particles that the network was calibrated on; the general model's if not given.
    """
    found = by_looks(image, diameter, network)
    noise = by_looks(noise_like(image, rng), diameter, network)
    score = found.score + evidence(found.score, strengths(image, found, diameter), share)
    score = np.minimum(score + fewer_particles(score, share), most_log_odds(found.score, noise.score))
    order = np.argsort(-score, kind="stable")
    return replace(found, score=score.astype(np.float32)).select(order)


def by_looks(image: Image, diameter: float, network: Picker) -> Candidates:
    """Candidates of a micrograph in its coarse pixels, with the network's log-odds.

    Parameters
    ----------
    image : Image
        Micrograph with dark particles, best loaded at `Learned.pixel_size`.
    diameter : float
        Of the particles in Å.
    network : Picker
        As `load_network` gives it.
    """
    score, pixel_size = score_micrograph(image, diameter, network)
    mask = mask_at(image, score.shape)
    peaks = find_peaks(score, pixel_size=pixel_size, distance=DISTANCE * diameter, mask=mask)
    seen = network_shape(image.values.shape, image.pixel_size, diameter)
    y, x = (STRIDE * n / m for n, m in zip(image.values.shape, seen, strict=True))
    return peaks.scaled(x, y)


def network_shape(shape: tuple[int, ...], pixel_size: float, diameter: float) -> tuple[int, int]:
    """Even shape that an image of a pixel size has when it is scored."""
    h, w = (max(2, 2 * round(n * pixel_size * PIXELS / diameter / 2)) for n in shape)
    return h, w


def mask_at(image: Image, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Mask of an image in another number of pixels, the first one in its place."""
    places = (
        np.minimum((np.arange(n) * m / n).astype(int), m - 1)
        for n, m in zip(shape, image.mask.shape, strict=True)
    )
    return image.mask[np.ix_(*places)]


@one_torch_thread()
def score_micrograph(image: Image, diameter: float, network: Picker) -> tuple[NDArray[np.float32], float]:
    """Log-odds that a particle has its centre at a place.

    Parameters
    ----------
    image : Image
        Micrograph with dark particles, best loaded at `Learned.pixel_size`.
    diameter : float
        Of the particles in Å; the network bears a fifth more or less.
    network : Picker
        As `load_network` gives it.

    Returns
    -------
    array (h, w), float32
        Log-odds; pixel (0, 0) lies on that of the image.
    float
        Its pixel size in Å.
    """
    shape = network_shape(image.values.shape, image.pixel_size, diameter)
    values = resized(torch.from_numpy(image.values), shape).numpy()
    score = score_image(network, torch.from_numpy(normalised(values, mask_at(image, shape))))
    coarser = math.sqrt(math.prod(image.values.shape) / math.prod(shape))
    return score.numpy(), image.pixel_size * coarser * STRIDE


def resized(values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Resample an image (h, w) by Fourier crop or padding; its first pixel stays where it is."""
    old = tuple(values.shape)
    if old == shape:
        return values
    return irfft2(resize_spectrum(rfft2(values), shape=old, new_shape=shape), shape=shape)


def normalised(values: NDArray[np.float32], mask: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
    """Even background, robust deviation 1, and no values beyond 5: what the network was trained on.

    Parameters
    ----------
    values : array (h, w)
        Image with `PIXELS` pixels a diameter, of any mean and scale.
    mask : array (h, w), bool, optional
        What is usable; the rest counts for nothing and becomes 0.
    """
    mask = np.ones(values.shape, bool) if mask is None else mask
    middle, spread = _robust(values, mask)
    cut = np.where(mask, np.clip((values - middle) / spread, -_OUTLIER, _OUTLIER), 0)
    mean = local_mean(cut, _BACKGROUND * PIXELS)
    if not mask.all():
        mean /= np.maximum(local_mean(mask.astype(np.float32), _BACKGROUND * PIXELS), 1e-3)
    cut -= mean
    middle, spread = _robust(cut, mask)
    return np.where(mask, np.clip((cut - middle) / spread, -_LIMIT, _LIMIT), 0).astype(np.float32)


def _robust(values: NDArray, mask: NDArray[np.bool_]) -> tuple[np.float32, np.float32]:
    """Median and deviation of what is usable: of every fourth pixel, or of all where none of these is."""
    seen = (values[::2, ::2][mask[::2, ::2]], values[mask], values)
    low, middle, high = np.percentile(next(each for each in seen if each.size), (16, 50, 84))
    return np.float32(middle), np.float32(max((high - low) / 2, 1e-12))
