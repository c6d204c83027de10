"""The matched filter of many references in many angles, through the few images that they all consist of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.fft
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.io.micrographs import Image
from halfmap.ops.fourier import irfft2
from halfmap.steps.pick.candidates import Candidates, find_peaks
from halfmap.steps.pick.filter import LEAST_COVERAGE, Whitened, inside, surrogate, whiten
from halfmap.steps.pick.mixture import SCATTER
from halfmap.steps.pick.obstacles import mask_obstacles

DISTANCE = 0.7
"""Least distance of two particles over the diameter."""

_MARGIN = 1.5
"""Side of the references' boxes over the diameter: the CTF spreads them."""

_ENERGY = 0.98
"""Part of the references' energy that their common components hold."""

_MOST = 256
_EXACT = 1200
"""Kernels or pixels up to which components are computed in full."""

_SPARE, _PASSES = 24, 3
_BAND = 1 << 22
"""Scores that are held at a time."""

_MAPS_BYTES = 1 << 29
"""Of the components' scores that are held at a time."""


@dataclass(frozen=True, eq=False)
class Template:
    """References in all in-plane angles; a method of picking.

    Attributes
    ----------
    diameter : float
        Of the particle in Å.
    pixel_size : float
        Of the references and of the micrographs that are searched, in Å.
    images : array (n, angles, s, s), float32
        Bright particles on 0, each turned by each angle.
    angles : array (angles,)
        `rlnAnglePsi` in degrees.
    device : str
        Where scores are computed.
    numbers : array (n,), optional
        Places of the references in their file, from 1, where some are left out.
    usual : float
        How dark particles are, of `usual_darkness`; 0 where that is not known.
    """

    diameter: float
    pixel_size: float
    images: NDArray[np.float32]
    angles: NDArray[np.float64]
    device: str = "cpu"
    numbers: NDArray[np.int64] | None = None
    usual: float = 0.0

    @property
    def scatter(self) -> float:
        """Of the strengths of a micrograph's particles, over their mean: views differ as well."""
        norm = np.sqrt(np.sum(self.images.astype(np.float64) ** 2, axis=(-2, -1)))
        return float(np.hypot(SCATTER, norm.std() / norm.mean()))

    def specimen(self, image: Image) -> Image:
        """The micrograph with carbon and contaminants masked."""
        return mask_obstacles(image, self.diameter, usual=self.usual)

    def search(self, image: Image, rng: np.random.Generator) -> tuple[Candidates, NDArray[np.float32]]:
        """Candidates of a micrograph in its coarse pixels, and scores of noise alone."""
        white = whiten(image, _MARGIN * self.diameter)
        kernels = self.kernels(white)
        parts, mixture = components(kernels.reshape(len(kernels), -1))
        parts = parts.reshape(-1, *kernels.shape[1:])
        coverage = inside(white, white.mask * np.conj(_placed(np.mean(kernels**2, axis=0), white.shape)))
        mask = white.image.mask & (coverage > LEAST_COVERAGE)
        scale = 1 / np.sqrt(np.maximum(coverage, LEAST_COVERAGE / 2))
        found, best = self._peaks(white, parts, mixture, mask, scale)
        noise, _ = self._peaks(surrogate(white, rng), parts, mixture, mask, scale)
        chosen = best[found.pixels(best.shape)]
        turns = len(self.angles)
        numbers = np.arange(len(self.images)) + 1 if self.numbers is None else self.numbers
        return (
            Candidates(
                found.x,
                found.y,
                found.score,
                angle=self.angles[chosen % turns].astype(np.float32),
                reference=numbers[chosen // turns].astype(np.float32),
            ),
            noise.score,
        )

    def kernels(self, white: Whitened) -> NDArray[np.float32]:
        """Filters (n angles, s, s) of unit energy for a whitened micrograph, centres at index 0."""
        s = self.images.shape[-1]
        size = int(
            scipy.fft.next_fast_len(max(s, round(_MARGIN * self.diameter / self.pixel_size)), real=True) or s
        )
        # With noise as the geometric mean of floor and power, `filter.match` divides by the floor alone.
        weight = white.image.ctf((size, size))
        stack = self.images.reshape(-1, s, s)
        padded = np.zeros((len(stack), size, size), np.float32)
        padded[:, :s, :s] = stack
        padded = np.roll(padded, (-(s // 2), -(s // 2)), axis=(1, 2))
        spectra = np.asarray(scipy.fft.rfft2(padded, workers=torch.get_num_threads()))
        kernels = np.asarray(
            scipy.fft.irfft2(
                spectra * weight.astype(np.float32), s=(size, size), workers=torch.get_num_threads()
            )
        )
        norm = np.sqrt(np.sum(kernels**2, axis=(1, 2), keepdims=True))
        return (kernels / np.maximum(norm, 1e-12)).astype(np.float32)

    def _peaks(
        self, white: Whitened, parts: NDArray, mixture: NDArray, mask: NDArray, scale: NDArray
    ) -> tuple[Candidates, NDArray[np.int64]]:
        score, best = best_of(white, parts, mixture, self.device)
        found = find_peaks(
            score * scale, pixel_size=white.image.pixel_size, distance=DISTANCE * self.diameter, mask=mask
        )
        return found, best


def components(kernels: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Few images of which many consist: the principal components of kernels (n, pixels).

    Returns
    -------
    parts : array (k, pixels)
        Orthonormal images.
    mixture : array (n, k)
        How much of each is in each kernel, of unit length: an image's score is this times the parts' scores.

    Notes
    -----
    Turned copies of an image, and views of one particle, have much in common. A kernel that its parts do not
    hold in full finds its own image with that part of its energy; normalised, noise still has deviation 1.
    There are as many as hold 98 % of the energy, but not more than 256. Of many kernels of many pixels they
    are found in a random subspace that powers of the kernels turn to the strongest.

    References
    ----------
    .. [1] Halko, Martinsson & Tropp 2011, SIAM Rev. 53, 217-288, DOI 10.1137/090771806
    """
    values, vectors = _strongest(kernels)
    share = np.cumsum(values) / max(float(np.sum(kernels**2, dtype=np.float64)), 1e-30)
    count = min(int(np.searchsorted(share, _ENERGY)) + 1, _MOST, len(values))
    parts = vectors[:count]
    mixture = kernels @ parts.T
    mixture /= np.linalg.norm(mixture, axis=1, keepdims=True) + 1e-12
    return parts.astype(np.float32), mixture.astype(np.float32)


def _strongest(kernels: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Energies (k,) of the principal components of kernels (n, pixels), falling, and these (k, pixels)."""
    n, pixels = kernels.shape
    if min(n, pixels) > _EXACT:
        # The same numbers every time.
        base = np.random.default_rng(0).standard_normal((pixels, _MOST + _SPARE), np.float32)
        for _ in range(_PASSES):
            base, _ = np.linalg.qr(kernels.T @ (kernels @ base))
        values, vectors = np.linalg.eigh(_gram((kernels @ base).T))
        vectors = base @ vectors.astype(np.float32)
    elif pixels <= n:
        values, vectors = np.linalg.eigh(_gram(kernels.T))
    else:
        values, vectors = np.linalg.eigh(_gram(kernels))
        vectors = kernels.T @ (vectors / np.sqrt(np.maximum(values, 1e-12 * values.max())))
    return np.maximum(values[::-1], 0), vectors.T[::-1].astype(np.float32)


def _gram(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Products of all pairs of vectors (n, k)."""
    return (vectors @ vectors.T).astype(np.float64)


def best_of(
    white: Whitened, parts: NDArray[np.float32], mixture: NDArray[np.float32], device: str
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Best score of all kernels at every place, and which kernel it is.

    Parameters
    ----------
    white : Whitened
        Micrograph.
    parts : array (k, s, s)
        Components, centres at index 0.
    mixture : array (n, k)
        Of the kernels.
    device : str
        Where to compute.
    """
    h, w = white.image.values.shape
    size = parts.shape[-1]
    image = inside(white, white.spectrum)
    weights = torch.from_numpy(mixture).to(device)
    rows = min(max(size, _MAPS_BYTES // (4 * len(parts) * w)), h)
    score, best = np.empty((h, w), np.float32), np.empty((h, w), np.int64)
    for first in range(0, h, rows):
        # With what the kernels reach beside it, a strip has the scores of the whole.
        last, top = min(first + rows, h), max(first - size, 0)
        strip = image[top : min(last + size, h)]
        own = slice(first - top, last - top)
        score[first:last], best[first:last] = _best_in_strip(strip, own, white.shape[1], parts, weights)
    return score, best


def _best_in_strip(
    strip: NDArray[np.float32], own: slice, width: int, parts: NDArray[np.float32], weights: Tensor
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Best scores in some rows of a strip (h, w) of a whitened micrograph, padded to a width."""
    device, (h, w) = weights.device, strip.shape
    shape = int(scipy.fft.next_fast_len(h + parts.shape[-1], real=True) or h), width
    spectrum = torch.from_numpy(np.asarray(scipy.fft.rfft2(strip, s=shape))).to(device)
    maps = torch.empty((len(parts), own.stop - own.start, w), dtype=torch.float32, device=device)
    for i, part in enumerate(parts):
        kernel = torch.from_numpy(_placed(part, shape)).to(device)
        maps[i] = irfft2(spectrum * kernel.conj(), shape=shape)[own, :w]
    flat = maps.reshape(len(parts), -1)
    band = max(1, _BAND // len(weights))
    score = torch.empty(flat.shape[1], device=device)
    best = torch.empty(flat.shape[1], dtype=torch.int64, device=device)
    for start in range(0, flat.shape[1], band):
        piece: Tensor = weights @ flat[:, start : start + band]
        score[start : start + band], best[start : start + band] = piece.max(dim=0)
    return score.reshape(-1, w).cpu().numpy(), best.reshape(-1, w).cpu().numpy()


def _placed(kernel: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.complex64]:
    """Transform of a small kernel, its centre at index 0, in a large box."""
    size = len(kernel)
    half = size // 2
    box = np.zeros(shape, np.float32)
    rows = np.r_[0 : size - half, -half:0]
    place = np.r_[0 : size - half, size - half : size]
    box[np.ix_(rows, rows)] = kernel[np.ix_(place, place)]
    return np.asarray(scipy.fft.rfft2(box))
