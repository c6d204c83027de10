"""Exhaustive search over references, angles in the plane and shifts, by products of matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfmap.ops.threads import one_blas_thread
from halfmap.search._inplane_kernels import move, posterior
from halfmap.search.polar import PolarGrid, hartley
from halfmap.search.ring_products import Precision, RingMatrices, from_harmonics, harmonics_of

_STEPS_A_RING = 4.0
"""Steps of the coarse grid of shifts in which the phase of the outer ring turns once."""

_MASS = 0.999
_MOST_CELLS = 8
"""Part of the posterior that the coarse shifts kept must hold, and how many of them are kept at the most."""

_EXCLUDED = -1000.0
"""Logarithm of the prior of shifts that an image does not keep, but others of its batch do."""

CELLS = 1 << 21
"""Angles, shifts and references compared at a time on a CPU: 8 MB of results, and as much on the way."""


@dataclass(frozen=True, eq=False)
class References:
    """Images that others are compared with, as harmonics along the rings.

    Attributes
    ----------
    linear : RingMatrices (angles / 2 + 1, rings, k)
        Conjugate harmonics of the Hartley transforms.
    squared : RingMatrices (angles / 4 + 1, rings, k)
        Conjugate harmonics of the powers, which repeat after half a turn.
    """

    linear: RingMatrices
    squared: RingMatrices

    @classmethod
    def of(cls, samples: Tensor, precision: Precision = "float32") -> References:
        """From samples (k, rings, angles / 2) on half circles, to be multiplied in this precision."""
        power = samples.real.square() + samples.imag.square()
        linear = harmonics_of(hartley(_rings_first(samples), dim=0)).conj()
        squared = harmonics_of(_rings_first(2 * power)).conj()
        return cls(RingMatrices.of(linear, precision), RingMatrices.of(squared, precision))

    def norms(self, images: Images) -> Tensor:
        """Harmonics (angles / 4 + 1, b, k) of half the references' norms under the images' CTFs."""
        # On a full circle a function that repeats after half a turn has twice the harmonics.
        return self.squared(images.squared)


@dataclass(frozen=True, eq=False)
class Images:
    """A batch of images, weighted as the likelihood has them.

    Attributes
    ----------
    linear : Tensor (angles / 2, b, rings), complex
        CTF times image over noise power, times the Fourier pixels that a sample stands for.
    squared : Tensor (angles / 4 + 1, b, rings), complex
        Squared CTF over noise power, times the same: its harmonics, as it repeats after half a turn.
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
        return cls(_angles_first(linear), harmonics_of(_angles_first(squared)), (power * weight).sum((1, 2)))

    def __getitem__(self, part: slice) -> Images:
        """Some of the images."""
        return Images(self.linear[:, part], self.squared[:, part], self.power[part])

    def parts(self, cells: int) -> list[slice]:
        """Images compared at a time, with as many cells each: few on a CPU, so that all stays in cache."""
        n = len(self.power)
        step = max(1, CELLS // cells) if self.power.device.type == "cpu" else n
        return [slice(i, min(i + step, n)) for i in range(0, n, step)]

    def shifted(self, shifts_px: Tensor, grid: PolarGrid) -> Tensor:
        """Harmonics (angles / 2 + 1, b, t, rings) of the images, each moved by its shifts (b, t, 2)."""
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
        return harmonics_of(moved)


def log_likelihood(
    images: Images, shifted: Tensor, references: References, log_prior: Tensor | None = None
) -> Tensor:
    """Logarithm of the likelihood of every reference at every angle and shift, but for a constant.

    Parameters
    ----------
    images : Images
        A batch of b.
    shifted : Tensor (angles / 2 + 1, b, t, rings)
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
    return scores(references.norms(images), shifted, references, log_prior)


def scores(norms: Tensor, shifted: Tensor, references: References, log_prior: Tensor | None = None) -> Tensor:
    """Compute `log_likelihood` from `References.norms`."""
    angles = 2 * (len(shifted) - 1)
    harmonics = references.linear(shifted)
    harmonics[::2] -= norms[:, :, None]
    if log_prior is not None:
        harmonics[0] += angles * log_prior
    return from_harmonics(harmonics, angles)


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
    mass : Tensor (b, t, k)
        Its sums over angles.
    log_evidence : Tensor (b,)
        Logarithm of the likelihood over that of noise alone, in the mean over the prior.
    shifts_px : Tensor (b, t, 2)
        Shifts (x, y) that were applied to the images.
    images : Images
    shifted : Tensor (angles / 2 + 1, b, t, rings)
    """

    probability: Tensor
    mass: Tensor
    log_evidence: Tensor
    shifts_px: Tensor
    images: Images
    shifted: Tensor


@dataclass(frozen=True, eq=False)
class _Pass:
    """References and shifts of one pass."""

    grid: PolarGrid
    stride: int
    """Of its angles among those of the last grid."""
    references: References
    shifts_px: Tensor
    """All (t, 2) in the first pass; those that divide a cell of the pass before in the others."""

    def prepare(
        self, samples: Tensor, ctf: Tensor, noise: Tensor, about: Tensor, excluded: Tensor
    ) -> tuple[Images, Tensor, Tensor]:
        """Images on this pass' grid, shifts about others (b, t, 2), and the prior that leaves some out."""
        rings, stride = self.grid.rings, self.stride
        images = Images.of(
            samples[:, :rings, ::stride], ctf[:, :rings, ::stride], noise[:, :rings], self.grid
        )
        shifts = (about[:, :, None] + self.shifts_px).flatten(1, 2)
        return images, shifts, excluded.repeat_interleave(len(self.shifts_px), 1)


class InPlaneSearch:
    """Search for the reference, the angle in the plane and the shift of images, in passes of growing radius.

    All references, angles and shifts are compared on the innermost rings with a coarse grid of shifts. The
    shifts that hold 99.9 % of the posterior, or the best 8 if it is flatter, are divided in four, and
    compared again on more rings, until it is all of them.

    Parameters
    ----------
    grids : sequence of PolarGrid
        Of the passes, each with twice the angles of the one before.
    references : Tensor (k, rings, angles / 2), complex
        On the last grid.
    log_weights : Tensor (k,)
        Logarithm of the references' prior, which sums to 1.
    range_px, deviation_px : float
        Largest shift, and standard deviation of its normal prior.
    precision : {"float32", "tf32", "bf16"}
        Of the factors of the scores; sums are in float32.
    """

    def __init__(
        self,
        grids: Sequence[PolarGrid],
        references: Tensor,
        log_weights: Tensor,
        *,
        range_px: float,
        deviation_px: float,
        precision: Precision = "float32",
    ) -> None:
        self.grids, self.grid = tuple(grids), grids[-1]
        self.log_weights, self.deviation_px = log_weights, deviation_px
        step = grids[0].box / (_STEPS_A_RING * grids[0].radius)
        shifts = shift_grid(range_px, step)
        self._passes, everywhere = [], torch.zeros(1, 2)
        for grid in grids:
            stride = self.grid.angles // grid.angles
            inner = References.of(references[:, : grid.rings, ::stride], precision)
            self._passes.append(_Pass(grid, stride, inner, shifts.to(grid.device)))
            everywhere = (everywhere[:, None] + shifts).flatten(0, 1)
            self.step_px = step
            step /= 2
            shifts = shift_grid(2 * step, step, square=True)
        # The prior is one over all angles and shifts of the last pass.
        self.log_cells = float(self._shift_prior(everywhere).logsumexp(0)) + math.log(self.grid.angles)

    def __call__(self, samples: Tensor, ctf: Tensor, noise: Tensor) -> Posterior:
        """Posterior of images.

        Parameters
        ----------
        samples, ctf : Tensor (b, rings, angles / 2)
            Images and their CTFs on the last grid.
        noise : Tensor (b or 1, rings)
            Power of the noise.
        """
        with one_blas_thread():
            return self._search(samples, ctf, noise)

    def _search(self, samples: Tensor, ctf: Tensor, noise: Tensor) -> Posterior:
        shifts = torch.zeros(len(samples), 1, 2, device=samples.device)
        excluded = torch.zeros_like(shifts[..., 0])
        for one in self._passes[:-1]:
            images, shifts, excluded = one.prepare(samples, ctf, noise, shifts, excluded)
            compared = self._compare(one, images, shifts, excluded)
            kept, excluded = _significant(torch.cat([likely.amax(0) for _, _, likely in compared]))
            shifts = shifts.gather(1, kept[:, :, None].expand(-1, -1, 2))
        one = self._passes[-1]
        images, shifts, excluded = one.prepare(samples, ctf, noise, shifts, excluded)
        shape = one.grid.angles, *shifts.shape[:2]
        shifted = shifts.new_empty(shape[0] // 2 + 1, *shape[1:], one.grid.rings, dtype=torch.complex64)
        probability = shifts.new_empty(*shape, len(self.log_weights))
        mass, evidence = torch.empty_like(probability[0]), shifts.new_empty(len(shifts))
        for part, shifted[:, part], likely in self._compare(one, images, shifts, excluded):
            evidence[part] = _normalise(likely, part, probability, mass)
        return Posterior(probability, mass, evidence - self.log_cells, shifts, images, shifted)

    def _compare(
        self, one: _Pass, images: Images, shifts: Tensor, excluded: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Harmonics and likelihoods in one pass at shifts (b, t, 2), of some images after the other."""
        prior = (self._shift_prior(shifts) + excluded)[:, :, None] + self.log_weights
        norms = one.references.norms(images)
        for part in images.parts(one.grid.angles * math.prod(prior.shape[1:])):
            shifted = images[part].shifted(shifts[part], one.grid)
            yield part, shifted, scores(norms[:, part], shifted, one.references, prior[part])

    def _shift_prior(self, shifts: Tensor) -> Tensor:
        """Logarithm of the prior of shifts (..., 2), but for a constant."""
        return shifts.square().sum(-1) / (-2 * self.deviation_px**2)


def _normalise(likely: Tensor, part: slice, probability: Tensor, mass: Tensor) -> Tensor:
    """Fill in probabilities of these images and sums over angles; returns their log-evidence."""
    if likely.device.type == "cpu":
        greatest = likely.amax((0, 2, 3)).numpy()
        places = probability.flatten(2).numpy(), mass.flatten(1).numpy(), part.start
        return torch.from_numpy(posterior(likely.flatten(2).numpy(), greatest, *places))
    evidence = likely.transpose(0, 1).flatten(1).logsumexp(1)
    probability[:, part] = (likely - evidence[:, None, None]).exp()
    mass[part] = probability[:, part].sum(0)
    return evidence


def _significant(peaks: Tensor) -> tuple[Tensor, Tensor]:
    """Shifts that hold the posterior's mass, by its logarithms (b, t, k) at best angles.

    As many (b, t') for each image as any needs, and the logarithm of a prior that leaves out those of them
    that it does not need itself: what is found of an image does not depend on others.
    """
    mass = peaks.logsumexp(2).softmax(1)
    mass, kept = mass.sort(1, descending=True)
    needed = (mass.cumsum(1) - mass < _MASS)[:, :_MOST_CELLS]
    needed = needed[:, : int(needed.sum(1).max())]
    return kept[:, : needed.shape[1]], torch.where(needed, 0.0, _EXCLUDED)


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
