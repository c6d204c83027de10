"""Power spectrum of a movie's frames for the estimation of the CTF."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from halfmap.ops.fourier import resample, rfft2
from halfmap.steps.motion import _correct_kernels as kernels
from halfmap.steps.motion.pairs import soft_edge

BOX = 512
PIXEL_SIZE_A = 1.4
"""Finer detail than twice this shows no Thon rings before particles are averaged."""

_TAPER = 0.1


def tile_side(pixel_size: float, shape: tuple[int, int]) -> int:
    """Side in pixels of the tiles whose spectra are averaged, even; `BOX` pixels of 1.4 Å or more."""
    side = round(BOX * max(1.0, PIXEL_SIZE_A / pixel_size))
    return min(side + side % 2, min(shape) // 2 * 2)


def add_spectra(total: NDArray, images: NDArray[np.float32]) -> None:
    """Add the power spectra of tiles, cut from the middle of images.

    Parameters
    ----------
    total : array (side, side // 2 + 1) float64
        Added to.
    images : array (n, h, w)
        Images of `side` pixels or more along each axis.
    """
    side = len(total)
    y, x = ((length - side) // 2 for length in images.shape[1:])
    edge = soft_edge(side, _TAPER)

    def spectrum(image: NDArray[np.float32]) -> NDArray:
        tile = image[y : y + side, x : x + side]
        tile = (tile - tile.mean()) * edge
        tile *= edge[:, None]
        return rfft2(torch.from_numpy(tile)).numpy()

    for image in images:
        kernels.add_power(spectrum(image), total)


def amplitude_spectrum(total: NDArray, pixel_size: float) -> tuple[NDArray[np.float32], float]:
    """Amplitude spectrum of `BOX` x `BOX` pixels, frequency 0 in the middle, as RELION's CTF step reads it.

    Parameters
    ----------
    total : array (side, side // 2 + 1)
        Sum of power spectra.
    pixel_size : float
        Of the images in Å.

    Returns
    -------
    spectrum : array (BOX, BOX) float32
        Cut off at the frequency of the pixel size returned, resampled if the tiles were smaller.
    pixel_size : float
        In Å: 1 / (BOX times this) is the spectrum's step in frequency.
    """
    side = len(total)
    amplitude = np.sqrt(total)
    whole = np.empty((side, side), np.float32)
    half = side // 2
    whole[:, half:] = np.fft.fftshift(amplitude, axes=0)[:, :half]
    # Friedel's law fills the other half; row and column of the Nyquist frequency have no partner.
    whole[1:, 1:half] = whole[1:, half + 1 :][::-1, ::-1]
    whole[0, 1:half] = whole[0, half + 1 :][::-1]
    whole[:, 0] = np.fft.fftshift(amplitude, axes=0)[:, half]
    wanted = min(side, max(2, int(np.ceil(side * pixel_size / PIXEL_SIZE_A / 2)) * 2))
    if pixel_size >= PIXEL_SIZE_A:
        wanted = side
    first = half - wanted // 2
    cropped = whole[first : first + wanted, first : first + wanted]
    if wanted != BOX:
        cropped = resample(torch.from_numpy(np.ascontiguousarray(cropped)), new_shape=(BOX, BOX)).numpy()
    return np.ascontiguousarray(cropped, np.float32), pixel_size * side / wanted
