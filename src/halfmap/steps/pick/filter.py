"""The matched filter: a micrograph with white noise, and how well templates fit at every place of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from halfmap.io.micrographs import Image

Map = NDArray[np.float32]

LEAST_COVERAGE = 0.3
"""Share of a template's energy that must lie in the usable part of a micrograph."""

_RINGS = 64
_FLOOR = 12
"""Last rings of a spectrum, whose median is the noise that is there at all frequencies."""

_CLIP = 5.0


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


def _fast(length: int) -> int:
    return int(scipy.fft.next_fast_len(length, real=True) or length)


def _forward(values: NDArray, shape: tuple[int, int]) -> NDArray[np.complex64]:
    return np.asarray(scipy.fft.rfft2(values, s=shape))


def _backward(spectrum: NDArray, shape: tuple[int, int]) -> Map:
    return np.asarray(scipy.fft.irfft2(spectrum, s=shape))
