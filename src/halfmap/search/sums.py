"""What aligned images add up to, and how much of it alignment has made of their noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfmap.search._inplane_kernels import move_back
from halfmap.search.inplane import CELLS, Posterior
from halfmap.search.polar import PolarGrid, from_hartley, hartley
from halfmap.search.ring_products import adjoint_product, from_harmonics, harmonics_of

_NEGLIGIBLE = 1e-9
"""Probability of a class or shift under which an image adds less than sums are rounded by."""


@dataclass(eq=False)
class Sums:
    """What images add up to, class by class: the right-hand side and the weights of the next averages.

    Attributes
    ----------
    linear : Tensor (angles / 2 + 1, k, rings), complex
        Harmonics of the images, each times its probability, turned back.
    squared : Tensor (angles / 4 + 1, k, rings), complex
        Harmonics of the squared CTFs, likewise.
    expected : Tensor (angles / 2 + 1, k, rings), complex
        As `linear`, of the images without noise that the posterior expects.

    Notes
    -----
    Noise that happens to look like an average is turned and moved until it does so most, and adds up to that
    average: Einstein from noise [1]_. How much it adds can be computed. For normal noise n of variance σ²
    Stein's lemma [2]_ has ``E[p n] = σ² E[∂p / ∂n]``, and the probability p of a pose depends on the image
    through ``Re(X* CTF A) / σ²`` alone. So to each average A noise adds, in the mean over noise,
    ``Σ p CTF² / σ² A`` less the sum of the images that the posterior expects, each turned back by the same
    probabilities. Both are known after the expectation step. Where poses are certain the two are equal, and
    nothing is taken away. It holds if the average does not depend on the images, as averages of other folds
    do not, and if no poses were left out by looking at them; shifts that a search drops leave a part behind.

    References
    ----------
    .. [1] Henderson 2013, Proc. Natl Acad. Sci. 110, 18037-18041, DOI 10.1073/pnas.1314449110
    .. [2] Stein 1981, Ann. Stat. 9, 1135-1151, DOI 10.1214/aos/1176345632
    """

    linear: Tensor
    squared: Tensor
    expected: Tensor

    @classmethod
    def of(cls, posterior: Posterior, references: Tensor, grid: PolarGrid) -> tuple[Sums, Tensor]:
        """From the posterior of a batch of images, in double precision; and how images match.

        Parameters
        ----------
        posterior : Posterior
        references : Tensor (k, rings, angles / 2), complex
            That the images were compared with.
        grid : PolarGrid
            Of these.

        Returns
        -------
        Sums
        Tensor (b,)
            What the posterior expects of ``Σ Re(X* CTF A) / σ²`` for each image.
        """
        images, shifted, shifts = posterior.images, posterior.shifted, posterior.shifts_px
        turned = harmonics_of(hartley(references).permute(2, 0, 1).contiguous())
        weights = from_harmonics(images.squared, grid.angles // 2)
        linear, squared = torch.zeros_like(turned), torch.zeros_like(turned[: grid.angles // 4 + 1])
        expected, match = torch.zeros_like(turned), torch.zeros_like(images.power)
        for part in images.parts(CELLS):
            mass = posterior.mass[part]
            kinds = (mass.amax((0, 1)) > _NEGLIGIBLE).nonzero().squeeze(1)
            moves = (mass.amax((0, 2)) > _NEGLIGIBLE).nonzero().squeeze(1)
            kept = posterior.probability[:, part].index_select(2, moves).index_select(3, kinds)
            harmonics = harmonics_of(kept)
            rows = harmonics.flatten(1, 2)
            moved = shifted[:, part].index_select(2, moves).flatten(1, 2)
            linear.index_add_(1, kinds, adjoint_product(rows, moved))
            # Folded onto a half circle, a function keeps every other harmonic.
            product = adjoint_product(harmonics[::2].sum(2), images.squared[:, part])
            squared.index_add_(1, kinds, product)
            clean = torch.bmm(rows, turned[:, kinds]).unflatten(1, harmonics.shape[1:3])
            by = shifts[part].index_select(1, moves)
            clean = _moved_back(from_harmonics(clean, grid.angles), by, grid)
            match[part] = 2 * (images.linear[:, part].conj() * clean).real.sum((0, 2))
            again = replace(images[part], linear=clean * weights[:, part]).shifted(by, grid)
            expected.index_add_(1, kinds, adjoint_product(rows, again.flatten(1, 2)))
        return cls(*(part.to(torch.complex128) for part in (linear, squared, expected))), match

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.linear + other.linear, self.squared + other.squared, self.expected + other.expected)

    def __sub__(self, other: Sums) -> Sums:
        return self + other.scaled(-1.0)

    def samples(self) -> tuple[Tensor, Tensor]:
        """Right-hand side (k, rings, angles / 2), complex, and weights (k, rings, angles / 2)."""
        return _samples(self.linear), self._weights()

    def scaled(self, factor: float) -> Sums:
        """All of it times a number."""
        return Sums(self.linear * factor, self.squared * factor, self.expected * factor)

    def unbiased(self, references: Tensor) -> tuple[Tensor, Tensor]:
        """As `samples`, without what alignment has made of noise.

        Parameters
        ----------
        references : Tensor (k, rings, angles / 2), complex
            That the images were compared with.
        """
        weights = self._weights()
        made = weights * references - _samples(self.expected)
        return _samples(self.linear) - made, weights

    def _weights(self) -> Tensor:
        angles = 2 * (len(self.linear) - 1)
        return torch.fft.irfft(self.squared.permute(1, 2, 0), n=angles // 2, dim=-1)


def _samples(harmonics: Tensor) -> Tensor:
    """Samples (k, rings, angles / 2) on half circles of harmonics (angles / 2 + 1, k, rings)."""
    angles = 2 * (len(harmonics) - 1)
    return from_hartley(torch.fft.irfft(harmonics.permute(1, 2, 0), n=angles, dim=-1))


def _moved_back(values: Tensor, shifts_px: Tensor, grid: PolarGrid) -> Tensor:
    """Samples (angles / 2, b, rings) of sums over t of images (angles, b, t, rings), each moved back."""
    half = grid.angles // 2
    angle = torch.arange(half, dtype=torch.float64) * (2 * torch.pi / grid.angles)
    turn = -2 * torch.pi / grid.box
    if values.device.type == "cpu":
        moved = torch.empty(half, values.shape[1], grid.rings, dtype=torch.complex64)
        cosine, sine = angle.cos().numpy(), angle.sin().numpy()
        move_back(values.numpy(), shifts_px.float().numpy(), cosine, sine, turn, moved.numpy())
        return moved
    direction = torch.stack([angle.cos(), angle.sin()]).to(shifts_px)
    phase = -turn * (shifts_px @ direction).permute(2, 0, 1)[..., None]
    phase = phase * torch.arange(grid.rings, device=phase.device)
    factors = torch.polar(torch.ones_like(phase), phase)
    samples = torch.complex(values[:half] + values[half:], values[:half] - values[half:]) / 2
    return (samples * factors).sum(2)
