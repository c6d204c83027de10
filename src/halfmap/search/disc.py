"""Fourier coefficients of images inside a radius, ring by ring, each of a Friedel pair once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops.fourier import fft_centred, ifft_centred


@dataclass(frozen=True, eq=False)
class FourierDisc:
    """Coefficients of square images up to a radius, sorted by radius so that a smaller disc comes first.

    Parameters
    ----------
    box : int
        Side of the images in pixels.
    radius : int
        Largest frequency in Fourier pixels, below Nyquist's.
    device : str
        Where coefficients are.

    Raises
    ------
    ParameterError
        If the radius is below 1 or reaches Nyquist's frequency.
    """

    box: int
    radius: int
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 1 <= self.radius < self.box / 2:
            raise ParameterError(
                f"a radius of {self.radius} Fourier pixels does not fit images of {self.box}"
            )

    @property
    def side(self) -> int:
        """Side of the smallest even image that holds the disc below its Nyquist frequency."""
        return 2 * (self.radius + 1)

    @cached_property
    def points(self) -> Tensor:
        """Frequencies (p, 2), (kx, ky) in Fourier pixels."""
        ky, kx = torch.meshgrid(
            torch.arange(-self.radius, self.radius + 1), torch.arange(self.radius + 1), indexing="ij"
        )
        points = torch.stack([kx.flatten(), ky.flatten()], dim=-1)
        once = (points[:, 0] > 0) | (points[:, 1] >= 0)
        points = points[once & (points.square().sum(1) <= self.radius**2)].double()
        # Along a ring, neighbours lie together in the volume that slices are cut from.
        angle = torch.atan2(points[:, 1], points[:, 0])
        return points[torch.argsort(points.norm(dim=1).round() * 8 + angle)].to(self.device)

    @cached_property
    def rings(self) -> Tensor:
        """Ring (p,) of each coefficient, int64: its radius rounded."""
        return self.points.norm(dim=1).round().long()

    @cached_property
    def multiplicity(self) -> Tensor:
        """Coefficients (p,) of the full transform that each stands for: 2, at the origin 1."""
        multiplicity = torch.full((len(self.points),), 2.0, device=self.device)
        multiplicity[0] = 1
        return multiplicity

    def count(self, radius: float) -> int:
        """How many coefficients, from the first, make up the rings to `radius`."""
        return int((self.rings <= radius).sum())

    def transform(self, images: Tensor) -> Tensor:
        """Coefficients (b, p) of images (b, box, box), their origin at the images' centre."""
        if images.shape[-2:] != (self.box, self.box):
            raise ShapeError(f"images of shape {tuple(images.shape[-2:])} in a disc for {self.box} pixels")
        return fft_centred(images, ndim=2).flatten(1)[:, self._places(self.box)]

    def images(self, coefficients: Tensor) -> Tensor:
        """Images (b, box, box) that have these coefficients (b, p) and no others; see `transform`."""
        half = coefficients.new_zeros(len(coefficients), self.box * (self.box // 2 + 1))
        half[:, self._places(self.box)] = coefficients
        half = half.unflatten(1, (self.box, self.box // 2 + 1))
        # Of the waves along y the disc holds one half, and the transform is to have both.
        half[:, 1:, 0] += half[:, 1:, 0].flip(1).conj()
        return ifft_centred(half, shape=(self.box, self.box))

    def pack(self, spectra: Tensor) -> Tensor:
        """Coefficients (b, p) of unshifted half-spectra (b, size, size // 2 + 1) of a size that has them."""
        return spectra.flatten(1)[:, self._places(spectra.shape[-2])]

    def unpack(self, coefficients: Tensor) -> Tensor:
        """Half-spectra (b, side, side // 2 + 1), unshifted, of coefficients; zero on ky < 0 = kx: (b, p)."""
        blank = coefficients.new_zeros(len(coefficients), self.side * (self.side // 2 + 1))
        blank[:, self._places(self.side)] = coefficients
        return blank.unflatten(1, (self.side, self.side // 2 + 1))

    def shifts(self, shifts_px: Tensor) -> Tensor:
        """Factors (..., p) that move images by (x, y) pixels (..., 2)."""
        phase = (shifts_px.to(self.points) @ self.points.T) * (-2 * math.pi / self.box)
        return torch.polar(torch.ones_like(phase), phase).to(torch.complex64)

    def _places(self, size: int) -> Tensor:
        x, y = self.points.long().unbind(1)
        return y % size * (size // 2 + 1) + x


@dataclass(frozen=True, eq=False)
class DiscImages:
    """A batch of images in a disc, weighted as the likelihood has them.

    Attributes
    ----------
    disc : FourierDisc
    linear : Tensor (b, p), complex
        CTF times image over noise power, times the coefficients that each stands for.
    squared : Tensor (b, p)
        Squared CTF over noise power, times the same.
    """

    disc: FourierDisc
    linear: Tensor
    squared: Tensor

    @classmethod
    def of(cls, disc: FourierDisc, coefficients: Tensor, ctf: Tensor, noise: Tensor) -> DiscImages:
        """From coefficients and CTFs (b, p), scale within the CTF, and noise power (b or 1, rings)."""
        weight = disc.multiplicity / noise[:, disc.rings]
        return cls(disc, coefficients * (ctf * weight), ctf.square() * weight)

    def __len__(self) -> int:
        """Count the images."""
        return len(self.linear)
