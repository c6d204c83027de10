"""The matched filter: a micrograph with white noise, and how well templates fit at every place of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.fft
import scipy.ndimage
from numpy.typing import NDArray

from halfmap.steps.pick.candidates import find_peaks
from halfmap.steps.pick.image import Image

Map = NDArray[np.float32]

LEAST_COVERAGE = 0.3
"""Share of a template's energy that must lie in the usable part of a micrograph."""

_RINGS = 64
_FLOOR = 12
"""Last rings of a spectrum, whose median is the noise that is there at all frequencies."""

_CLIP = 5.0
_FAINT, _STRONG = 3.0, 6.0
"""Robust deviations of the average over a particle: where something begins, and what is no particle."""

_MANY, _TWICE = 8, 2.0
"""Dark spots of which most are particles, and how much darker than these something else is."""

_LARGE = 3.0
"""Areas of particles that something must be larger than to be masked."""


@dataclass(frozen=True, eq=False)
class Whitened:
    """A micrograph whose noise has the same power at all frequencies.

    Attributes
    ----------
    image : Image
        What it was made of, what is masked set to 0.
    shape : tuple of 2 int
        Of the padded box that the transforms are of.
    spectrum, mask : array (h, w // 2 + 1), complex
        Transforms of the whitened micrograph and of its mask, which are 0 outside.
    frequency : array (h, w // 2 + 1)
        In 1/Å.
    power : array (h, w // 2 + 1)
        Radial power spectrum of a pixel of the micrograph.
    noise : array (h, w // 2 + 1)
        That part of it which is taken for noise.
    profile : tuple of 2 arrays (n,)
        The same over frequencies in 1/Å.
    ctf : array (h, w // 2 + 1)
        With the sign of dark particles.
    """

    image: Image
    shape: tuple[int, int]
    spectrum: NDArray[np.complex64]
    mask: NDArray[np.complex64]
    frequency: Map
    power: Map
    noise: Map
    profile: tuple[NDArray, NDArray]
    ctf: Map


def whiten(image: Image, extent: float) -> Whitened:
    """Divide a micrograph by the root of its radial power spectrum.

    Parameters
    ----------
    image : Image
        Flat micrograph.
    extent : float
        Width in Å of the templates: by so much the image is padded.

    Notes
    -----
    The spectrum is that of all there is, particles included. A filter that took all of it for noise would
    see fine parts of particles better than whole ones; one that took nothing but the floor, at high
    frequencies, would not tell a particle from its neighbours. Noise is the geometric mean of the two. Pixels
    beyond five standard deviations are clipped.
    """
    h, w = image.values.shape
    pad = int(extent / image.pixel_size)
    shape = (_fast(h + pad), _fast(w + pad))
    values = np.where(image.mask, np.clip(image.values, -_CLIP, _CLIP), 0).astype(np.float32)
    spectrum = _forward(values, shape)
    y, x = scipy.fft.fftfreq(shape[0], image.pixel_size), scipy.fft.rfftfreq(shape[1], image.pixel_size)
    frequency = np.hypot(y[:, None], x[None]).astype(np.float32)
    width = 0.5 / image.pixel_size / _RINGS
    ring = np.minimum(frequency / width, 2 * _RINGS - 1).astype(np.intp).ravel()
    count = np.maximum(np.bincount(ring, minlength=2 * _RINGS), 1)
    square = (spectrum.real**2 + spectrum.imag**2).ravel()
    mean = np.bincount(ring, weights=square, minlength=2 * _RINGS) / count / max(image.mask.sum(), 1)
    middles = (np.arange(2 * _RINGS) + 0.5) * width
    mean = np.maximum(mean, 1e-6 * mean.max())
    filled = middles <= frequency.max()
    power = np.interp(frequency, middles[filled], mean[filled]).astype(np.float32)
    white = _backward(spectrum / np.sqrt(power), shape)[:h, :w] * image.mask
    return Whitened(
        image=replace(image, values=values),
        shape=shape,
        spectrum=_forward(white, shape),
        mask=_forward(image.mask.astype(np.float32), shape),
        frequency=frequency,
        power=power,
        noise=np.sqrt(power * np.float32(np.median(mean[middles <= 0.5 / image.pixel_size][-_FLOOR:]))),
        profile=(middles[filled], mean[filled]),
        ctf=image.ctf(shape),
    )


def match(white: Whitened, template: Map) -> tuple[Map, Map]:
    """Matched filter of a template without the CTF, in standard deviations of noise.

    Parameters
    ----------
    white : Whitened
        Micrograph.
    template : array (h, w // 2 + 1)
        Real transform of a centred, symmetric particle on the half-spectrum of the padded box; any scale.

    Returns
    -------
    score : array of the micrograph's shape
        Amplitude of the best fit over its standard error: mean 0 and deviation 1 where there is noise alone,
        also at edges, where part of the template is outside.
    coverage : array of the same shape
        Share of the template's energy that lies inside.

    Notes
    -----
    Turin 1960, IRE Trans. Inf. Theory 6, 311-329, DOI 10.1109/TIT.1960.1057571.
    """
    filtered = template * white.ctf * np.sqrt(white.power) / white.noise
    kernel = _backward(filtered, white.shape)
    norm = np.sqrt(np.sum(kernel * kernel, dtype=np.float64))
    if not norm > 0:
        empty = np.zeros(white.image.values.shape, np.float32)
        return empty, empty
    score = inside(white, white.spectrum * (filtered / np.float32(norm)))
    coverage = inside(white, white.mask * np.conj(_forward((kernel / norm) ** 2, white.shape)))
    covered = np.sqrt(np.maximum(coverage, LEAST_COVERAGE / 2))
    return (score / covered).astype(np.float32), coverage


def excess(white: Whitened, template: Map) -> float:
    """Deviation of a template's matched filter where there is no particle, over what the noise alone makes.

    A score of `match` times this is one against the noise. Templates of different sizes compare by it.
    """
    square = (template * white.ctf) ** 2 / white.noise
    return float(np.sqrt(np.sum(square * white.power / white.noise) / max(float(np.sum(square)), 1e-30)))


def inside(white: Whitened, spectrum: NDArray) -> Map:
    """Part of a padded box, given by its transform, that lies over the micrograph."""
    h, w = white.image.values.shape
    return _backward(spectrum, white.shape)[:h, :w]


def surrogate(white: Whitened, rng: np.random.Generator) -> Whitened:
    """The same with noise alone: white, as strong as the micrograph's, under the same mask."""
    image = white.image
    noise = rng.standard_normal(image.values.shape, dtype=np.float32) * image.mask
    return replace(white, spectrum=_forward(noise, white.shape))


def mask_obstacles(image: Image, diameter: float, *, largest: float = 0.0) -> Image:
    """Mask what is much darker or brighter than a micrograph's rest, and larger than particles.

    Parameters
    ----------
    image : Image
        Flat micrograph.
    diameter : float
        Of a particle in Å.
    largest : float
        Diameter in Å of particles that there may be as well.

    Notes
    -----
    Averages over a particle that differ from the median by six standard deviations, with all around them that
    differ by three. The deviation comes from the quartiles, so that it is large where particles are many.
    Where there are many dark spots, most are particles, and what is to be masked must be twice as dark:
    groups of particles are not.
    """
    sigma = diameter / 3 / image.pixel_size
    mean = scipy.ndimage.gaussian_filter(image.values, sigma)
    low, median, high = np.percentile(mean[image.mask], (25, 50, 75))
    darkness = (median - mean) * np.float32(1.349 / max(float(high - low), 1e-9))
    spots = find_peaks(darkness, pixel_size=image.pixel_size, distance=diameter, mask=image.mask).score
    spots = spots[spots > _FAINT]
    usual = float(np.median(spots)) if len(spots) >= _MANY else 0.0
    away = np.where(darkness > 0, darkness / max(_TWICE * usual / _STRONG, 1.0), -darkness)
    labelled: Any = scipy.ndimage.label((away > _FAINT) & image.mask)
    parts, count = labelled
    if count == 0:
        return image
    index = np.arange(1, count + 1)
    area = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    peak = scipy.ndimage.maximum(away, parts, index)
    least = np.pi / 4 * max(_LARGE * diameter**2, largest**2) / image.pixel_size**2
    odd = np.concatenate([[False], (np.asarray(peak) > _STRONG) & (area > least)])
    if not odd.any():
        return image
    near: Any = scipy.ndimage.distance_transform_edt(~odd[parts])
    mask = image.mask & (near > diameter / 3 / image.pixel_size)
    if not mask.any():
        return image
    return replace(image, mask=mask, values=np.where(mask, image.values, 0).astype(np.float32))


def _fast(length: int) -> int:
    return int(scipy.fft.next_fast_len(length, real=True) or length)


def _forward(values: NDArray, shape: tuple[int, int]) -> NDArray[np.complex64]:
    return np.asarray(scipy.fft.rfft2(values, s=shape))


def _backward(spectrum: NDArray, shape: tuple[int, int]) -> Map:
    return np.asarray(scipy.fft.irfft2(spectrum, s=shape))
