"""Images of a made-up particle whose transforms and projections are known as formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfmap.ops.rotations import random_rotations
from halfmap.search.disc import DiscImages, FourierDisc

ATOM = 1.2
"""Standard deviation of an atom in pixels: beyond Nyquist's frequency its transform is below 1e-3."""


@dataclass(frozen=True)
class Particle:
    """Equal Gaussian atoms within a ball about the origin, in a box."""

    atoms: Tensor
    box: int

    @classmethod
    def random(cls, box: int, *, count: int = 100, radius_px: float, seed: int = 1) -> Particle:
        generator = torch.Generator().manual_seed(seed)
        atoms = torch.randn(count, 3, generator=generator, dtype=torch.float64) * radius_px / 2
        return cls(atoms * (radius_px / atoms.norm(dim=1, keepdim=True)).clamp_max(1), box)

    def volume(self) -> Tensor:
        x, y, z = self._profiles(self.atoms)
        return torch.einsum("nz,ny,nx->zyx", z, y, x).float()

    def images(self, rotations: Tensor) -> Tensor:
        turned = [self._profiles(self.atoms @ rotation.T)[:2] for rotation in rotations]
        return torch.stack([torch.einsum("ny,nx->yx", y, x) for x, y in turned]).float()

    def transform(self, frequencies: Tensor) -> Tensor:
        """Transform at frequencies (..., 3) in Fourier pixels, complex128."""
        phase = (frequencies.double() @ self.atoms.T) * (-2 * math.pi / self.box)
        radius = frequencies.double().norm(dim=-1) * (2 * math.pi * ATOM / self.box)
        return torch.polar(torch.ones_like(phase), phase).sum(-1) * torch.exp(-radius.square() / 2)

    def slices(self, rotations: Tensor, points: Tensor) -> Tensor:
        """Transforms (n, p) of projections at points (p, 2)."""
        return self.transform(points.double() @ rotations[:, :2].double())

    def _profiles(self, centres: Tensor) -> list[Tensor]:
        axis = torch.arange(self.box) - self.box // 2
        density = [torch.exp(-((axis - c[:, None]) ** 2) / (2 * ATOM**2)) for c in centres.T]
        return [profile / (math.sqrt(2 * math.pi) * ATOM) for profile in density]


@dataclass(frozen=True)
class Simulation:
    """Images with CTF, shifts and coloured noise, as their coefficients in a disc."""

    disc: FourierDisc
    coefficients: Tensor
    ctf: Tensor
    noise: Tensor
    rotations: Tensor
    shifts_px: Tensor

    @property
    def images(self) -> DiscImages:
        return DiscImages.of(self.disc, self.coefficients, self.ctf, self.noise)


def simulate(
    particle: Particle, disc: FourierDisc, n: int, *, snr: float, seed: int = 0, shift_px: float = 1.5
) -> Simulation:
    """Make images; the SNR is the ratio of variances over the disc, of the image but for its mean."""
    generator = torch.Generator().manual_seed(seed)
    rotations = random_rotations(n, generator=generator, dtype=torch.float64)
    shifts_px = torch.randn(n, 2, generator=generator, dtype=torch.float64) * shift_px
    ctf = simulated_ctf(disc.points.norm(dim=1), disc.box, n)
    clean = particle.slices(rotations, disc.points).to(torch.complex64) * ctf * disc.shifts(-shifts_px)
    rings = torch.arange(disc.radius + 1.0)
    colour = 1 + 2 * torch.exp(-rings / 6)
    mean = float((colour[disc.rings] * disc.multiplicity).sum() / disc.multiplicity.sum())
    power = float((clean.abs().square() * disc.multiplicity)[:, 1:].sum() / disc.multiplicity[1:].sum()) / n
    noise = colour * power / (snr * mean)
    parts = torch.randn(n, len(disc.points), 2, generator=generator)
    added = torch.view_as_complex(parts) * (noise[disc.rings] / 2).sqrt()
    return Simulation(disc, clean + added, ctf, noise[None], rotations, shifts_px)


def simulated_ctf(radius: Tensor, box: int, n: int, seed: int = 7) -> Tensor:
    """CTFs (n, ...) at radii (...) in Fourier pixels, that spread a point by less than 8 px."""
    spread = torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 15 + 10
    phase = spread.reshape(-1, *[1] * radius.ndim) * 3 * (radius / box).float().square()
    return -torch.sin(phase + 0.1)
