"""The model of a classification: averages, their shares and spectra, the noise; and its estimation."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.ops.threads import one_torch_thread
from halfmap.search.checkpoint import Checkpoint
from halfmap.search.polar import PolarGrid, hartley
from halfmap.search.sums import Sums
from halfmap.steps.class2d.plan import Iteration, Plan

_TINY = 1e-20
_DENSE = 0.2
"""Density, over the greatest, of what the centre of an average is the centre of."""

_GROWTH = 3.0
"""Signal that averages are allowed, over that which both halves agree in."""

_SIGMAS = 3.0
"""Standard deviations of chance that halves must agree beyond."""

_LEAST = 0.1
"""Part of a class' weight that must be in either half."""

_SCALES = 0.2
"""Standard deviation of scales that is expected; none is believed to be off by more than three."""

_FAINT = 0.05
"""Part of an average left by Wiener's filter below which it is not made up for."""

_STRONG = 4.0
"""Ratio of signal to noise that counts as no more, where several rings are taken together."""


@dataclass(frozen=True, eq=False)
class Model(Checkpoint):
    """What is estimated.

    Attributes
    ----------
    iteration : int
        Number of the iteration that gave it; 0 to begin with.
    sets : Tensor (1 + folds, k, box, box)
        Class averages, masked: of all particles, and without those of each fold, for these to be compared
        with.
    noise : Tensor (groups, rings)
        Power of the noise of each optics group, for all rings that will ever be used.
    signal : Tensor (k, rings)
        Prior variance of the averages' transforms on each ring.
    agreed : Tensor (k, rings)
        Variance of the signal that both halves of the particles agree in.
    weights : Tensor (1 + folds, k, rings)
        Mean over each ring of the summed CTF² over noise power, of the last iteration.
    left : Tensor (1 + folds, k, rings)
        What Wiener's filter left of the averages.
    scale : Tensor (micrographs,)
        Strength of the particles' signal in each micrograph; 1 in the mean over particles.
    deviation_px : float
        Standard deviation of the particles' shifts along an axis.
    typical_signal : Tensor (rings,)
        Power of a particle's transform before the CTF, over all particles.
    supported : int
        Outer ring up to which any average has more signal than noise.
    """

    iteration: int
    sets: Tensor
    noise: Tensor
    signal: Tensor
    agreed: Tensor
    weights: Tensor
    left: Tensor
    scale: Tensor
    deviation_px: float
    typical_signal: Tensor
    supported: int

    @property
    def averages(self) -> Tensor:
        """Class averages (k, box, box) of all particles."""
        return self.sets[0]

    def without(self, fold: int) -> Tensor:
        """Class averages (k, box, box) without the particles of a fold."""
        return self.sets[1 + fold]

    @property
    def ratio(self) -> Tensor:
        """Signal-to-noise ratio (k, rings) of the averages' transforms."""
        return self.agreed * self.weights[0]

    def resolutions(self, plan: Plan) -> NDArray[np.float64]:
        """Resolution in Å of every average: where its signal falls below its noise."""
        return plan.side / np.maximum(last_ring(self.ratio).cpu().numpy(), 1)


@dataclass(eq=False)
class Statistics:
    """What an expectation step adds up beside the averages.

    Attributes
    ----------
    power : Tensor (groups, rings)
        Mean power of the images on each ring times `count`.
    signal : Tensor (groups, rings)
        Of this, what the averages explain.
    count : Tensor (groups,)
        Images.
    shares : Tensor (k,)
        Sum of the probabilities of each class.
    shift2 : float
        Sum of the expected squared shifts along one axis, px².
    """

    power: Tensor
    signal: Tensor
    count: Tensor
    shares: Tensor
    shift2: float = 0.0


@one_torch_thread()
def maximise(
    plan: Plan,
    model: Model,
    iteration: Iteration,
    grid: PolarGrid,
    folds: Sequence[Sums],
    statistics: Statistics,
    best: NDArray[np.float64],
) -> Model:
    """Estimate the model anew from the sums over images.

    Parameters
    ----------
    plan, model
        The classification, and the model that the sums were made with.
    iteration : Iteration
        In which they were. If not all particles took part, earlier ones are remembered.
    grid : PolarGrid
        Of the sums.
    folds : sequence of Sums
        Of the images of each fold that took part.
    statistics : Statistics
        Of the same.
    best : array (n, columns)
        What was found for each of them; see `expectation.BEST`.

    Returns
    -------
    Model

    Notes
    -----
    Averages are Wiener's estimate: ``Σ CTF X / σ²`` over ``Σ CTF² / σ² + 1 / τ²``. The signal's variance τ²
    of each ring is that of the posterior: what the average has there, and its own uncertainty. It takes many
    iterations to grow out of noise, and a blur of many views wins meanwhile. So it is at least a few times
    what both halves agree in, without what was made of noise by aligning it; see `Sums`.

    An image that has a part in the average it is compared with finds its own noise there, and stays. So each
    fold of the particles is compared with averages of the others. All begin with the same averages: were
    folds of two minds about which class is which, each would take over what the others have, without end.

    Where only a part of the particles took part, what former ones gave counts as an observation too, of an
    average as it was, and is forgotten by and by.
    """
    share = float(statistics.count.sum()) / len(plan.groups)
    all_folds = functools.reduce(operator.add, folds)
    whole = _estimated(model, 0, grid, all_folds, share)
    others = [_estimated(model, 1 + i, grid, all_folds - fold, share) for i, fold in enumerate(folds)]
    agreed = agreed_signal(plan, model, folds, grid)
    # After the last iteration the poses would be those of other averages.
    off = _off_centre(plan, grid.images(whole.average)) * (not iteration.last)
    centred = (grid.images(one.average * grid.shifts(-off)) for one in (whole, *others))
    return replace(
        model,
        iteration=model.iteration + 1,
        sets=torch.stack([masked(plan, images) for images in centred]),
        noise=_noise(model, grid, statistics),
        signal=_beyond(model, torch.maximum(whole.signal, _GROWTH * agreed)),
        agreed=_padded(model.agreed, agreed),
        weights=_padded(model.weights, torch.stack([one.weights for one in (whole, *others)])),
        left=_padded(model.left, torch.stack([one.left for one in (whole, *others)])),
        scale=_scale(plan, model, best),
        deviation_px=_deviation(plan, statistics),
        supported=_supported(_GROWTH * agreed * whole.weights, statistics.shares),
    )


@dataclass(frozen=True, eq=False)
class _Estimate:
    """Averages (k, rings, angles / 2), and of each ring (k, rings) what `Model` has of it."""

    average: Tensor
    signal: Tensor
    weights: Tensor
    left: Tensor


def _estimated(model: Model, number: int, grid: PolarGrid, sums: Sums, share: float) -> _Estimate:
    """Averages of a set, from the sums and from what averages remember."""
    linear, squared = (part / grid.weights for part in sums.samples())
    kept = model.weights[number, :, : grid.rings, None] * _memory(share)
    former = grid.sample(model.sets[number]) / model.left[number, :, : grid.rings, None].clamp(min=_FAINT)
    weights = squared + kept
    uncertainty = 1 / (weights + 1 / (model.signal[:, : grid.rings, None] + _TINY))
    average = (linear + kept * former) * uncertainty
    return _Estimate(
        average.to(torch.complex64),
        (average.abs().square() + uncertainty).mean(-1),
        weights.mean(-1),
        (weights * uncertainty).mean(-1),
    )


def agreed_signal(plan: Plan, model: Model, folds: Sequence[Sums], grid: PolarGrid) -> Tensor:
    """Power of the signal that both halves of the particles agree in.

    Parameters
    ----------
    plan, model
        The classification, and the model that the images were compared with.
    folds : sequence of Sums
        Of the images of each fold.
    grid : PolarGrid
        Of the sums.

    Returns
    -------
    Tensor (k, rings)
        0 where it may be chance.

    Notes
    -----
    The power of the sum of both, less that of their difference, each weighted as noise has them. Whether it
    is more than chance is asked of five rings together, with as many samples as the mask is large.
    """
    halves: list[tuple[Tensor, Tensor]] = []
    for fold, sums in enumerate(folds):
        linear, weights = sums.unbiased(grid.sample(model.without(fold)))
        if fold < 2:
            halves.append((linear, weights))
        else:
            halves[fold % 2] = halves[fold % 2][0] + linear, halves[fold % 2][1] + weights
    (first, u), (second, v) = halves
    u, v = u.clamp(min=_TINY), v.clamp(min=_TINY)
    power = ((first + second).abs().square() / (u + v) / grid.weights).mean(-1)
    noise = ((first / u - second / v).abs().square() * (u * v / (u + v)) / grid.weights).mean(-1)
    # Five rings are taken together.
    count = 5 * _five(_independent(plan, first / u - second / v))
    excess, deviation = _five(power - noise), _five(noise) * (2 / count).sqrt()
    # A class that one half has hardly any particles of has nothing to compare.
    least = torch.minimum(u.mean((1, 2)), v.mean((1, 2))) / (u + v).mean((1, 2))
    certain = (excess > _SIGMAS * deviation) & (least > _LEAST)[:, None]
    return (power - noise).clamp(min=0) * certain / ((u + v) / grid.weights).mean(-1)


def _independent(plan: Plan, samples: Tensor) -> Tensor:
    """Independent values (k, rings) of noise in samples (k, rings, angles / 2).

    No more than the mask is large; and fewer where images lie at all angles alike, which leaves of their
    noise the mean of a ring: hence as many as harmonics have power.
    """
    power = torch.fft.rfft(hartley(samples), dim=-1).abs().square()
    among = power.sum(-1).square() / power.square().sum(-1).clamp(min=_TINY)
    most = torch.arange(samples.shape[1], device=samples.device) * (
        math.pi * float(plan.mask().square().mean())
    )
    # Of powers with an exponential distribution the ratio is half their number.
    return torch.minimum(2 * among - 1, most).clamp(min=1)


def _five(rings: Tensor) -> Tensor:
    """Mean (k, rings) over each ring and two on either side."""
    padded = torch.nn.functional.pad(rings[:, None], (2, 2), mode="replicate")[:, 0]
    return padded.unfold(1, 5, 1).mean(-1)


def explained(sums: Sums, averages: Tensor, noise: Tensor, grid: PolarGrid) -> Tensor:
    """Power (rings,) of the images, summed, that averages (k, rings, angles / 2) explain.

    The images' mean power less this is what remains of them: ``2 Re Σ X* CTF A - Σ |CTF A|²``, expected over
    the posterior.
    """
    linear, squared = sums.samples()
    cross = (hartley(linear) * hartley(averages)).sum((0, 2))
    square = (2 * squared * averages.abs().square()).sum((0, 2))
    return (2 * cross - square) * noise / (grid.weights[:, 0] * grid.angles)


def _memory(share: float) -> float:
    """What earlier particles count, over what they did before."""
    return 0.0 if share >= 1 else 1 - share


def masked(plan: Plan, images: Tensor) -> Tensor:
    """Averages with nothing outside the mask, where their mean is taken for zero."""
    mask = plan.mask()
    outside = plan.support() * (1 - mask)
    level = (images * outside).sum((1, 2), keepdim=True) / outside.sum().clamp(min=1.0)
    return (images - level) * mask


def _off_centre(plan: Plan, images: Tensor) -> Tensor:
    """Centres of mass (k, 2) of averages, (x, y) in pixels; never beyond the range of shifts."""
    dense = masked(plan, images)
    # What is weaker is noise, whose mass would pull towards the middle.
    dense = (dense - _DENSE * dense.amax((1, 2), keepdim=True)).clamp(min=0)
    mass = dense.sum((1, 2)).clamp(min=_TINY)
    axis = torch.arange(plan.box, device=dense.device) - plan.box // 2
    centre = torch.stack([(dense.sum(1) @ axis.float()) / mass, (dense.sum(2) @ axis.float()) / mass], dim=-1)
    return centre * (plan.range_px / centre.norm(dim=1, keepdim=True).clamp(min=plan.range_px))


def _noise(model: Model, grid: PolarGrid, statistics: Statistics) -> Tensor:
    """Power of what the averages do not explain."""
    noise = model.noise.clone()
    seen = statistics.count > 0
    count = statistics.count[seen, None]
    rest = (statistics.power[seen] - statistics.signal[seen]) / count
    # An average may explain more than there is on a ring of few samples.
    least = 0.05 * statistics.power[seen] / count
    noise[seen, : grid.rings] = torch.maximum(rest, least).float()
    return noise


def _scale(plan: Plan, model: Model, best: NDArray[np.float64]) -> Tensor:
    """Scale of each micrograph that its particles match their averages best with, under a normal prior."""
    scale = model.scale.cpu().numpy().astype(float)
    micrograph = plan.micrographs[best[:, 0].astype(np.intp)]
    match = np.bincount(micrograph, best[:, 11] / scale[micrograph], len(scale))
    norm = np.bincount(micrograph, best[:, 12] / scale[micrograph] ** 2, len(scale))
    seen = np.bincount(micrograph, minlength=len(scale)) > 0
    prior = 1 / _SCALES**2
    scale[seen] = np.clip((match[seen] + prior) / (norm[seen] + prior), 1 - 3 * _SCALES, 1 + 3 * _SCALES)
    return torch.from_numpy(scale / scale[plan.micrographs].mean()).to(model.scale)


def _beyond(model: Model, signal: Tensor) -> Tensor:
    """Signal of rings seen for the first time: as that of all particles, as far as the class had it."""
    rings = signal.shape[1]
    result = model.signal.clone()
    result[:, :rings] = signal
    typical = model.typical_signal[max(rings - 3, 0) : rings].mean().clamp(min=_TINY)
    last = signal[:, -3:].mean(1) / typical
    result[:, rings:] = model.typical_signal[rings:] * last[:, None].clamp(max=1.0)
    return result


def _padded(old: Tensor, new: Tensor) -> Tensor:
    result = torch.zeros_like(old)
    result[..., : new.shape[-1]] = new
    return result


def _deviation(plan: Plan, statistics: Statistics) -> float:
    deviation = (statistics.shift2 / float(statistics.count.sum())) ** 0.5
    # Wide enough never to decide, narrow enough to help.
    return float(np.clip(deviation, 1.0, plan.range_px))


def _supported(ratio: Tensor, members: Tensor) -> int:
    """Outer ring with more signal than noise in any class that has members."""
    occupied = ratio[members > 1]
    return int(last_ring(occupied).max()) if len(occupied) else 0


def last_ring(ratio: Tensor) -> Tensor:
    """Last ring (k,) outward of the strongest before signal-to-noise ratios (k, rings) fall below 1.

    The lowest rings have hardly any contrast, and a hollow particle has rings without signal: hence the
    beginning at the strongest ring, and the mean of five, of which none counts more than a few. Such a mean
    goes beyond the last ring, and it is that ring which is given.
    """
    smooth = _five(ratio.clamp(max=_STRONG))
    ring = torch.arange(ratio.shape[1], device=ratio.device)
    inward = ring <= smooth.argmax(1, keepdim=True)
    run = ((smooth > 1) | inward).int().cumprod(1) == 1
    last = (ring * (run & (ratio > 1))).amax(1)
    return torch.where(smooth.amax(1) > 1, last, 0)
