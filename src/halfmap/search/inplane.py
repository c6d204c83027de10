"""Exhaustive search over references, angles in the plane and shifts, by products of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import scipy.fft
import torch
from torch import Tensor

from halfmap.search._inplane_kernels import move
from halfmap.search.polar import PolarGrid, from_hartley, hartley

_STEPS_A_RING = 4.0
"""Steps of the coarse grid of shifts in which the phase of the outer ring turns once."""

_MASS = 0.999
_MOST_CELLS = 8
"""Part of the posterior that the coarse shifts kept must hold, and how many of them are kept at the most."""

_LEAST = -80.0
"""Logarithm of what counts as nothing; less would be slow, as numbers without a leading 1 are."""


@dataclass(frozen=True, eq=False)
class References:
    """Images that others are compared with, as harmonics along the rings, in real matrices.

    Attributes
    ----------
    linear : Tensor (angles / 2 + 1, 2 rings, 2 k)
        Conjugate harmonics of the Hartley transforms.
    squared : Tensor (angles / 4 + 1, 2 rings, 2 k)
        Conjugate harmonics of the powers, which repeat after half a turn.
    """

    linear: Tensor
    squared: Tensor

    @classmethod
    def of(cls, samples: Tensor) -> References:
        """From samples (k, rings, angles / 2) on half circles."""
        power = samples.real.square() + samples.imag.square()
        linear = _rfft(hartley(_rings_first(samples), dim=0))
        return cls(_as_real_matrix(linear.conj()), _as_real_matrix(_rfft(_rings_first(2 * power)).conj()))


@dataclass(frozen=True, eq=False)
class Images:
    """A batch of images, weighted as the likelihood has them.

    Attributes
    ----------
    linear : Tensor (angles / 2, b, rings), complex
        CTF times image over noise power, times the Fourier pixels that a sample stands for.
    squared : Tensor (angles / 2, b, rings)
        Squared CTF over noise power, times the same.
    power : Tensor (b,)
        Of the images over that of noise, half of it: what is left of the likelihood without any reference.
    """

    linear: Tensor
    squared: Tensor
    power: Tensor

    @classmethod
    def of(cls, samples: Tensor, ctf: Tensor, noise: Tensor, grid: PolarGrid) -> Images:
        """From samples and CTFs (b, rings, angles / 2) and noise power (b or 1, rings)."""
        weight = grid.weights / noise[..., None]
        power = samples.real.square() + samples.imag.square()
        linear, squared = samples * (ctf * weight), ctf.square() * weight
        return cls(_angles_first(linear), _angles_first(squared), (power * weight).sum((1, 2)))

    def shifted(self, shifts_px: Tensor, grid: PolarGrid) -> Tensor:
        """Harmonics (angles / 2 + 1, b * t, rings) of the images, each moved by its shifts (b, t, 2)."""
        angle = torch.arange(len(self.linear), dtype=torch.float64) * (2 * torch.pi / grid.angles)
        turn = -2 * torch.pi / grid.box
        if self.linear.device.type == "cpu":
            shape = (grid.angles, *shifts_px.shape[:2], grid.rings)
            moved = torch.empty(shape)
            cosine, sine = angle.cos().numpy(), angle.sin().numpy()
            move(self.linear.numpy(), shifts_px.float().numpy(), cosine, sine, turn, moved.numpy())
        else:
            direction = torch.stack([angle.cos(), angle.sin()]).to(shifts_px)
            phase = turn * (shifts_px @ direction).permute(2, 0, 1)[..., None]
            phase = phase * torch.arange(grid.rings, device=phase.device)
            factors = torch.polar(torch.ones_like(phase), phase)
            moved = hartley(self.linear[:, :, None] * factors, dim=0)
        return _rfft(moved).flatten(1, 2)


def log_likelihood(
    images: Images, shifted: Tensor, references: References, log_prior: Tensor | None = None
) -> Tensor:
    """Logarithm of the likelihood of every reference at every angle and shift, but for a constant.

    Parameters
    ----------
    images : Images
        A batch of b.
    shifted : Tensor (angles / 2 + 1, b * t, rings)
        From `Images.shifted`.
    references : References
        k of them.
    log_prior : Tensor (b, t, k), optional
        Added to it.

    Returns
    -------
    Tensor (angles, b, t, k)
        ``Σ Re(X* CTF A) / σ² - ½ Σ |CTF A|² / σ²`` with the reference turned by the angle from the x axis
        towards y.

    Notes
    -----
    The first term is a circular correlation along each ring: a product of matrices for each harmonic, summed
    over rings, and one transform back [1]_. The second has no shifts, and even harmonics only. Turning costs
    no interpolation.

    References
    ----------
    .. [1] Joyeux & Penczek 2002, Ultramicroscopy 92, 33-46, DOI 10.1016/S0304-3991(01)00154-1
    """
    batch, angles = images.linear.shape[1], 2 * images.linear.shape[0]
    harmonics = _product(shifted, references.linear)
    harmonics = harmonics.reshape(len(shifted), batch, -1, harmonics.shape[-1])
    # Half of the norm, which on a full circle has twice the harmonics that it has on a half.
    harmonics[::2] -= _product(_rfft(images.squared), references.squared)[:, :, None]
    if log_prior is not None:
        harmonics[0] += angles * log_prior
    return _irfft(harmonics, angles)


@dataclass(eq=False)
class Sums:
    """What images add up to, class by class: the right-hand side and the weights of the next averages.

    Attributes
    ----------
    linear : Tensor (angles / 2 + 1, k, rings), complex
        Harmonics of the images, each times its probability, turned back.
    squared : Tensor (angles / 4 + 1, k, rings), complex
        Harmonics of the squared CTFs, likewise.
    """

    linear: Tensor
    squared: Tensor

    @classmethod
    def of(cls, images: Images, shifted: Tensor, probability: Tensor) -> Sums:
        """From posterior probabilities (angles, b, t, k) of the same images and shifts."""
        angles = len(probability)
        linear = _adjoint_product(_rfft(probability).flatten(1, 2), shifted)
        halves = probability.sum(2).unflatten(0, (2, angles // 2)).sum(0)
        return cls(linear, _adjoint_product(_rfft(halves), _rfft(images.squared)))

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.linear + other.linear, self.squared + other.squared)

    def double(self) -> Sums:
        """The same in double precision, to be added to."""
        return Sums(self.linear.to(torch.complex128), self.squared.to(torch.complex128))

    def samples(self) -> tuple[Tensor, Tensor]:
        """Right-hand side (k, rings, angles / 2), complex, and weights (k, rings, angles / 2)."""
        angles = 2 * (len(self.linear) - 1)
        linear = torch.fft.irfft(self.linear.permute(1, 2, 0), n=angles, dim=-1)
        squared = torch.fft.irfft(self.squared.permute(1, 2, 0), n=angles // 2, dim=-1)
        return from_hartley(linear), squared


def _rfft(values: Tensor) -> Tensor:
    """Harmonics along the first axis, contiguous."""
    if values.device.type != "cpu":
        return torch.fft.rfft(values, dim=0).contiguous()
    # Faster than torch's along this axis, by a factor of 2.
    return torch.from_numpy(scipy.fft.rfft(values.numpy(), axis=0, workers=torch.get_num_threads()))


def _irfft(harmonics: Tensor, n: int) -> Tensor:
    """Real functions of `n` samples along the first axis, contiguous."""
    if harmonics.device.type != "cpu":
        return torch.fft.irfft(harmonics, n=n, dim=0).contiguous()
    return torch.from_numpy(scipy.fft.irfft(harmonics.numpy(), n, axis=0, workers=torch.get_num_threads()))


def _as_real_matrix(matrix: Tensor) -> Tensor:
    """Real matrices (m, 2 a, 2 b) that do to interleaved numbers what complex ones (m, a, b) do."""
    times_one = torch.view_as_real(matrix.resolve_conj())
    times_i = torch.stack([-times_one[..., 1], times_one[..., 0]], dim=-1)
    return torch.stack([times_one, times_i], dim=2).flatten(1, 2).flatten(2, 3)


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Products (m, b, k) of complex rows (m, b, a) and matrices from `_as_real_matrix`."""
    # Twice as fast as the product of complex matrices.
    product = torch.bmm(torch.view_as_real(rows).flatten(2), matrix)
    return torch.view_as_complex(product.unflatten(-1, (-1, 2)))


def _adjoint_product(left: Tensor, right: Tensor) -> Tensor:
    """Sums over b of conjugates of `left` (m, b, k) times `right` (m, b, a): (m, k, a), complex."""
    parts = torch.bmm(
        torch.view_as_real(left).flatten(2).transpose(1, 2), torch.view_as_real(right).flatten(2)
    )
    parts = parts.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
    return torch.complex(
        parts[:, :, 0, :, 0] + parts[:, :, 1, :, 1], parts[:, :, 0, :, 1] - parts[:, :, 1, :, 0]
    )


def _angles_first(values: Tensor) -> Tensor:
    """Values (b, rings, angles) as (angles, b, rings)."""
    return values.permute(2, 0, 1).contiguous()


def _rings_first(values: Tensor) -> Tensor:
    """Values (k, rings, angles) as (angles, rings, k)."""
    return values.permute(2, 1, 0).contiguous()


@dataclass(frozen=True, eq=False)
class Posterior:
    """Probabilities of references, angles and shifts of a batch of images.

    Attributes
    ----------
    probability : Tensor (angles, b, t, k)
    log_evidence : Tensor (b,)
        Logarithm of the likelihood summed over all that was searched, each with its prior.
    shifts_px : Tensor (b, t, 2)
        Shifts (x, y) that were applied to the images.
    images : Images
    shifted : Tensor (angles / 2 + 1, b * t, rings)
    """

    probability: Tensor
    log_evidence: Tensor
    shifts_px: Tensor
    images: Images
    shifted: Tensor

    def sums(self) -> Sums:
        """What these images add to the averages."""
        return Sums.of(self.images, self.shifted, self.probability)


@dataclass(frozen=True, eq=False)
class _Pass:
    """References and shifts of one pass."""

    grid: PolarGrid
    stride: int
    """Of its angles among those of the last grid."""
    references: References
    shifts_px: Tensor
    """All (t, 2) in the first pass; those that divide a cell of the pass before in the others."""


class InPlaneSearch:
    """Search for the reference, the angle in the plane and the shift of images, in passes of growing radius.

    All references, angles and shifts are compared on the innermost rings with a coarse grid of shifts. The
    shifts that hold the posterior's mass are divided in four, and compared again on more rings, until it is
    all of them.

    Parameters
    ----------
    grids : sequence of PolarGrid
        Of the passes, each with twice the angles of the one before.
    references : Tensor (k, rings, angles / 2), complex
        On the last grid.
    log_weights : Tensor (k,)
        Logarithm of the references' prior.
    range_px, deviation_px : float
        Largest shift, and standard deviation of its normal prior.
    """

    def __init__(
        self,
        grids: Sequence[PolarGrid],
        references: Tensor,
        log_weights: Tensor,
        *,
        range_px: float,
        deviation_px: float,
    ) -> None:
        self.grids, self.grid = tuple(grids), grids[-1]
        self.log_weights, self.deviation_px = log_weights, deviation_px
        step = grids[0].box / (_STEPS_A_RING * grids[0].radius)
        shifts = shift_grid(range_px, step)
        self._passes = []
        for grid in grids:
            stride = self.grid.angles // grid.angles
            inner = References.of(references[:, : grid.rings, ::stride])
            self._passes.append(_Pass(grid, stride, inner, shifts.to(grid.device)))
            step /= 2
            shifts = shift_grid(2 * step, step, square=True)

    def __call__(self, samples: Tensor, ctf: Tensor, noise: Tensor) -> Posterior:
        """Posterior of images.

        Parameters
        ----------
        samples, ctf : Tensor (b, rings, angles / 2)
            Images and their CTFs on the last grid.
        noise : Tensor (b or 1, rings)
            Power of the noise.
        """
        shifts = torch.zeros(len(samples), 1, 2, device=samples.device)
        for one in self._passes[:-1]:
            _, _, likely, shifts = self._compare(one, samples, ctf, noise, shifts)
            kept = _significant(likely)
            shifts = shifts.gather(1, kept[:, :, None].expand(-1, -1, 2))
        images, shifted, likely, shifts = self._compare(self._passes[-1], samples, ctf, noise, shifts)
        greatest = likely.amax((0, 2, 3), keepdim=True)
        probability = likely.sub_(greatest).clamp_(min=_LEAST).exp_()
        total = probability.sum((0, 2, 3), keepdim=True)
        probability /= total
        evidence = (greatest + total.log()).flatten()
        return Posterior(probability, evidence, shifts, images, shifted)

    def _compare(
        self, one: _Pass, samples: Tensor, ctf: Tensor, noise: Tensor, about: Tensor
    ) -> tuple[Images, Tensor, Tensor, Tensor]:
        """Images, their harmonics and likelihoods in one pass, at its shifts (b, t, 2) about others."""
        shifts = (about[:, :, None] + one.shifts_px).flatten(1, 2)
        rings, stride = one.grid.rings, one.stride
        images = Images.of(samples[:, :rings, ::stride], ctf[:, :rings, ::stride], noise[:, :rings], one.grid)
        shifted = images.shifted(shifts, one.grid)
        likely = log_likelihood(images, shifted, one.references, self._log_prior(shifts))
        return images, shifted, likely, shifts

    def _log_prior(self, shifts: Tensor) -> Tensor:
        """Logarithm (b, t, k) of the prior of references and shifts."""
        prior = shifts.square().sum(-1) / (-2 * self.deviation_px**2)
        return prior[:, :, None] + self.log_weights


def _significant(likely: Tensor) -> Tensor:
    """Indices (b, t) of the shifts that hold the mass of the posterior, each taken at its best angle."""
    mass = likely.amax(0).logsumexp(2).softmax(1)
    mass, kept = mass.sort(1, descending=True)
    needed = 1 + int((mass.cumsum(1) < _MASS).sum(1).max())
    return kept[:, : min(needed, _MOST_CELLS)]


def shift_grid(range_px: float, step_px: float, *, square: bool = False) -> Tensor:
    """Shifts (t, 2) on a square grid about 0: within a circle, or cells that divide a square of this side."""
    if square:
        n = round(range_px / step_px)
        axis = (torch.arange(n) - (n - 1) / 2) * step_px
    else:
        n = int(range_px / step_px + 1e-6)
        axis = torch.arange(-n, n + 1) * step_px
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    shifts = torch.stack([x.flatten(), y.flatten()], dim=-1)
    return shifts if square else shifts[shifts.norm(dim=-1) <= range_px + 1e-6]
