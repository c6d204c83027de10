"""Images on rings of Fourier space, where turning an image is moving along an axis of an array."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy.fft import next_fast_len
from scipy.sparse import csr_array
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError

_OVERSAMPLING = 2.0
_TAPS = 6
"""Grid points along each axis that a sample is interpolated from, with the kernel of Kaiser and Bessel."""

_BESSEL = math.pi * math.sqrt((_TAPS / _OVERSAMPLING * (_OVERSAMPLING - 0.5)) ** 2 - 0.8)
"""Shape of the kernel (Beatty, Nishimura & Pauly 2005)."""

_HARMONICS_MORE = 6
"""Harmonics beyond the support's circumference on the outer ring, where those of a disc fall off fast."""


@dataclass(frozen=True, eq=False)
class PolarGrid:
    """Rings 0, 1, … of Fourier pixels, with as many angles on all as the outer one needs.

    Parameters
    ----------
    box : int
        Side of the images in pixels.
    radius : int
        Outer ring in Fourier pixels.
    support_px : float
        Radius about the centre outside of which images are zero.
    angles : int, optional
        Samples on a full circle, a multiple of 4; default: as many as harmonics of the support need on the
        outer ring. A real image needs but half of the circle.
    device : str
        Where samples are computed.

    Raises
    ------
    ParameterError
        If the outer ring is none or beyond Nyquist's frequency, or the support is larger than the box.

    Notes
    -----
    The transform X of a real image has X(-k) = X(k)*. Real part plus imaginary part (Hartley's transform) on
    the full circle is a real function h with ``Σ_full circle h_a h_b = 2 Σ_half circle Re(X_a* X_b)``: even
    harmonics hold the real part, odd ones the imaginary part, and a product of the two sums to nothing. So
    the correlation of two images over all angles between them is a circular correlation of real rows.

    References
    ----------
    .. [1] Beatty, Nishimura & Pauly 2005, IEEE Trans. Med. Imaging 24, 799-808, DOI 10.1109/TMI.2005.848376
    .. [2] Penczek, Radermacher & Frank 1992, Ultramicroscopy 40, 33-53, DOI 10.1016/0304-3991(92)90233-A
    """

    box: int
    radius: int
    support_px: float
    angles: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 1 <= self.radius <= self.box // 2:
            raise ParameterError(f"rings to {self.radius} do not fit images of {self.box} pixels")
        if not 0 < self.support_px <= self.box / 2:
            raise ParameterError(f"a support of {self.support_px} px does not fit {self.box} pixels")
        if not self.angles:
            circumference = 2 * math.pi * self.radius * self.support_px / self.box
            quarter = math.ceil((circumference + _HARMONICS_MORE) / 2)
            object.__setattr__(self, "angles", 4 * (next_fast_len(quarter, real=True) or quarter))
        if self.angles % 4:
            raise ParameterError(f"{self.angles} angles are no multiple of 4")

    def finer(self, factor: int, radius: int) -> PolarGrid:
        """Rings farther out with `factor` times the angles, of which those of this grid are a subset."""
        return replace(self, radius=radius, angles=factor * self.angles)

    @property
    def rings(self) -> int:
        """Number of rings, the centre among them."""
        return self.radius + 1

    @cached_property
    def frequencies(self) -> Tensor:
        """Frequencies (rings, angles / 2, 2) of the samples on half circles, (kx, ky) in Fourier pixels."""
        angle = torch.arange(self.angles // 2, dtype=torch.float64) * (2 * math.pi / self.angles)
        ring = torch.arange(self.rings, dtype=torch.float64)[:, None]
        return torch.stack([ring * torch.cos(angle), ring * torch.sin(angle)], dim=-1)

    @cached_property
    def weights(self) -> Tensor:
        """Fourier pixels (rings, 1) for which each sample of a full circle stands."""
        area = 2 * math.pi * torch.arange(self.rings, dtype=torch.float32, device=self.device)
        # Euler and Maclaurin's correction of the sum over rings, whose summand rises from 0.
        area[0] = math.pi / 6
        return (area / self.angles)[:, None]

    def sample(self, images: Tensor) -> Tensor:
        """Fourier transforms of real images on the rings' half circles, their origin at the images' centre.

        Parameters
        ----------
        images : Tensor (b, box, box)
            Zero outside the support.

        Returns
        -------
        Tensor (b, rings, angles / 2), complex
        """
        if images.shape[-2:] != (self.box, self.box):
            raise ShapeError(f"images of shape {tuple(images.shape[-2:])} on rings for {self.box} pixels")
        corner, padded = -(self.box // 2), (self._padded, self._padded)
        enlarged = images.new_zeros(len(images), *padded)
        enlarged[:, : self.box, : self.box] = images * self._compensation
        spectrum = torch.fft.rfft2(enlarged.roll((corner, corner), (1, 2))).reshape(len(images), -1).T
        real, imaginary = self._interpolation
        shape = (self.rings, self.angles // 2, len(images))
        parts = (real @ spectrum.real.contiguous()).reshape(shape), imaginary @ spectrum.imag.contiguous()
        return torch.complex(parts[0], parts[1].reshape(shape)).permute(2, 0, 1).contiguous()

    def images(self, samples: Tensor) -> Tensor:
        """Real images of samples on half circles: the inverse of `sample` for images within the support.

        Parameters
        ----------
        samples : Tensor (b, rings, angles / 2), complex

        Returns
        -------
        Tensor (b, box, box)
            Without frequencies beyond the outer ring.
        """
        weighted = (samples * self.weights).reshape(len(samples), -1).T
        real, imaginary = self._spreading
        spectrum = torch.complex(real @ weighted.real.contiguous(), imaginary @ weighted.imag.contiguous())
        spectrum = spectrum.T.reshape(len(samples), self._padded, -1)
        # Of the pair k and -k only one is there, also in the column that holds both.
        spectrum[..., 0] *= 2
        enlarged = torch.fft.irfft2(spectrum, s=(self._padded, self._padded), norm="forward")
        corner = self.box // 2
        images = enlarged.roll((corner, corner), (1, 2))[:, : self.box, : self.box]
        return images * (self._compensation / self.box**2)

    def shifts(self, shifts_px: Tensor) -> Tensor:
        """Factors (t, rings, angles / 2) that move images by (x, y) pixels.

        Parameters
        ----------
        shifts_px : Tensor (t, 2)
        """
        phase = -2 * math.pi / self.box * (self.frequencies @ shifts_px.double().cpu().T).permute(2, 0, 1)
        return torch.polar(torch.ones_like(phase), phase).to(torch.complex64).to(self.device)

    @cached_property
    def _padded(self) -> int:
        half = math.ceil(_OVERSAMPLING * self.box / 2)
        return 2 * (next_fast_len(half) or half)

    @cached_property
    def _compensation(self) -> Tensor:
        """Reciprocal of the kernel's transform over the image."""
        position = (np.arange(self.box) - self.box // 2) / self._padded
        argument = np.sqrt(_BESSEL**2 - (np.pi * _TAPS * position) ** 2)
        axis = torch.from_numpy(argument / np.sinh(argument) / (_TAPS / np.i0(_BESSEL)))
        return (axis[:, None] * axis).float().to(self.device)

    @cached_property
    def _interpolation(self) -> tuple[Tensor, Tensor]:
        """Sparse matrices (samples, padded half-spectrum) for real and imaginary parts."""
        position = (self.frequencies.reshape(-1, 2) * (self._padded / self.box)).numpy()
        first = np.ceil(position - _TAPS / 2).astype(np.int64)
        taps = first[..., None] + np.arange(_TAPS)
        distance = (position[..., None] - taps) * (2 / _TAPS)
        kernel = np.i0(_BESSEL * np.sqrt(np.maximum(0, 1 - distance**2))) / np.i0(_BESSEL)
        values = kernel[:, 1, :, None] * kernel[:, 0, None, :]
        x, y = np.broadcast_arrays(taps[:, 0, None, :], taps[:, 1, :, None])
        other = x < 0  # the half that is not stored, conjugate to the one that is
        columns = np.where(other, -y, y) % self._padded * (self._padded // 2 + 1) + np.abs(x)
        rows = np.broadcast_to(np.arange(len(position))[:, None, None], columns.shape)
        shape = (len(position), self._padded * (self._padded // 2 + 1))
        places = rows.ravel(), columns.ravel()
        real = csr_array((values.ravel(), places), shape=shape)
        imaginary = csr_array((np.where(other, -values, values).ravel(), places), shape=shape)
        return _sparse(real, self.device), _sparse(imaginary, self.device)

    @cached_property
    def _spreading(self) -> tuple[Tensor, Tensor]:
        """Transposes of the matrices of `_interpolation`."""
        real, imaginary = self._interpolation
        return real.t().to_sparse_csr(), imaginary.t().to_sparse_csr()


def _sparse(matrix: csr_array, device: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its sparse matrices a beta
        parts = torch.from_numpy(matrix.indptr), torch.from_numpy(matrix.indices)
        values = torch.from_numpy(matrix.data).float()
        return torch.sparse_csr_tensor(*parts, values, size=matrix.shape, check_invariants=True).to(device)


def hartley(samples: Tensor, dim: int = -1) -> Tensor:
    """Real functions on full circles from complex samples on half circles, along axis `dim`."""
    half = samples.shape[dim]
    shape = list(samples.shape)
    shape[dim] = 2 * half
    values = torch.empty(shape, dtype=samples.real.dtype, device=samples.device)
    torch.add(samples.real, samples.imag, out=values.narrow(dim, 0, half))
    torch.sub(samples.real, samples.imag, out=values.narrow(dim, half, half))
    return values


def from_hartley(values: Tensor) -> Tensor:
    """Samples (..., angles / 2) on half circles from real functions (..., angles) on full circles."""
    front, back = values.chunk(2, dim=-1)
    return torch.complex(front + back, front - back) / 2
