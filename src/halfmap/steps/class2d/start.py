"""The first model: noise from around the particles, signal from what they have more, and single particles."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.ops.masks import soft_circle
from halfmap.ops.threads import one_torch_thread
from halfmap.search.particles import ParticleImages
from halfmap.search.polar import PolarGrid, from_hartley, hartley
from halfmap.steps.class2d.model import Model, masked
from halfmap.steps.class2d.plan import FOLDS, Plan, to_device

_SAMPLE, _BATCH = 1000, 64
_LEAST = 1e-3
_SMOOTH = 1


@one_torch_thread()
def first_model(plan: Plan, images: ParticleImages) -> Model:
    """Estimate spectra from some particles, and take single ones for averages.

    Parameters
    ----------
    plan : Plan
        Of the classification.
    images : ParticleImages
        All of them.

    Returns
    -------
    Model

    Notes
    -----
    The noise of each optics group is that of the images' margins, outside the mask. What power particles have
    above it, over the mean CTF², is the signal. A single particle, divided by its CTF after Wiener with
    these spectra, is a better beginning than a mean of many that lie in all directions: nearly all such means
    are alike.
    """
    step = plan.step
    random = np.random.default_rng((step.seed, 0))
    whole = PolarGrid(plan.box, plan.radius, plan.box / 2, device=plan.device)
    groups = int(plan.groups.max()) + 1
    noise = torch.zeros(groups, whole.rings, device=plan.device)
    excess = torch.zeros(whole.rings, device=plan.device)
    transfer2 = torch.zeros(whole.rings, device=plan.device)
    support, margin = plan.support(), _margin(plan)
    inside = float(support.square().mean())
    for group in range(groups):
        members = np.flatnonzero(plan.groups == group)
        some = np.sort(random.permutation(members)[: max(50, _SAMPLE // groups)])
        for rows in np.array_split(some, -(-len(some) // _BATCH)):
            pictures = to_device(images.get(rows), plan.device)
            around = whole.sample(pictures * margin).abs().square().mean(2) / margin.square().mean()
            within = whole.sample(pictures * support).abs().square().mean(2)
            noise[group] += around.sum(0) / len(some)
            excess += (within - inside * around).sum(0)
            transfer2 += plan.transfer(rows, whole).abs().square().mean(2).sum(0)
        noise[group] = _smooth(noise[group])
    signal = _smooth(excess / transfer2)
    if float(signal.max()) <= 0:  # particles are weaker than what is around them
        signal = _LEAST * noise.mean(0)
    signal = signal.clamp(min=_LEAST * float(signal.max()) / max(1, plan.radius))
    seeds = np.sort(random.permutation(len(plan.groups))[: step.classes])
    radius = plan.iterations[0].radius
    first = [
        aligned_averages(plan, images, seed[None], np.zeros((1, 3)), noise, signal, radius) for seed in seeds
    ]
    # All folds begin alike; but a particle is not remembered where its own fold is compared.
    weights = torch.stack([weights for _, weights in first], dim=1)
    return Model(
        iteration=0,
        sets=torch.stack([sets[0] for sets, _ in first]).repeat(1 + FOLDS, 1, 1, 1),
        noise=noise,
        signal=signal.expand(step.classes, -1).clone(),
        agreed=torch.zeros(step.classes, len(signal), device=plan.device),
        weights=weights,
        left=left(weights, signal),
        scale=torch.ones(int(plan.micrographs.max()) + 1, device=plan.device),
        deviation_px=plan.range_px / 2,
        typical_signal=signal,
        supported=plan.iterations[0].radius,
    )


def aligned_averages(
    plan: Plan,
    images: ParticleImages,
    rows: NDArray[np.intp],
    poses: NDArray[np.float64],
    noise: Tensor,
    signal: Tensor,
    radius: int,
) -> tuple[Tensor, Tensor]:
    """Averages of particles whose poses are known: of all, and without those of each fold.

    Parameters
    ----------
    plan, images
        The classification and its images.
    rows : array (n,)
        Particles.
    poses : array (n, 3)
        Angle as ``rlnAnglePsi`` in degrees and shifts (x, y) in Å that bring them onto each other.
    noise : Tensor (groups, rings)
        Power of the noise.
    signal : Tensor (rings,)
        Variance of the average that Wiener's filter takes for granted.
    radius : int
        Outer ring.

    Returns
    -------
    averages : Tensor (1 + folds, box, box)
    weights : Tensor (1 + folds, rings)
        Mean over each ring of the summed CTF² over noise power; as many as `signal` has.
    """
    grid = PolarGrid(plan.box, radius, plan.support_px, device=plan.device)
    values = torch.zeros(FOLDS, grid.rings, grid.angles, device=plan.device)
    weights = torch.zeros(FOLDS, grid.rings, grid.angles // 2, device=plan.device)
    for first in range(0, len(rows), _BATCH):
        part = slice(first, first + _BATCH)
        samples = grid.sample(to_device(images.get(rows[part]), plan.device) * plan.support())
        ctf = plan.transfer(rows[part], grid)
        power = noise[torch.from_numpy(plan.groups[rows[part]]).to(noise.device), : grid.rings, None]
        linear, squared = samples * ctf.conj() / power, ctf.abs().square() / power
        shifts = torch.from_numpy(poses[part, 1:] / plan.pixel_size)
        turns = torch.deg2rad(torch.from_numpy(poses[part, 0])).to(power.device)
        fold = torch.from_numpy(plan.folds[rows[part]]).to(power.device)
        values.index_add_(0, fold, _turned(hartley(linear * grid.shifts(shifts)), turns, 1))
        weights.index_add_(0, fold, _turned(squared, turns, 2))
    values, weights = _sets(from_hartley(values)), _sets(weights)
    averages = values / (weights + 1 / signal[: grid.rings, None])
    padded = torch.zeros(len(weights), len(signal), device=plan.device)
    padded[:, : grid.rings] = weights.mean(-1)
    return masked(plan, grid.images(averages.to(torch.complex64))), padded


def _sets(folds: Tensor) -> Tensor:
    """Sum (1 + folds, ...) of all folds, and of all but each."""
    whole = folds.sum(0, keepdim=True)
    return torch.cat([whole, whole - folds])


def left(weights: Tensor, signal: Tensor) -> Tensor:
    """What Wiener's filter leaves of averages of these weights (..., rings), for this variance."""
    return weights / (weights + 1 / signal.clamp(min=1e-20))


def _turned(values: Tensor, turns: Tensor, period: int) -> Tensor:
    """Real functions (n, rings, angles), which repeat `period` times a circle, turned from x towards y."""
    harmonics = torch.fft.rfft(values, dim=-1)
    number = torch.arange(harmonics.shape[-1], device=values.device) * period
    phase = -number * turns[:, None, None]
    factors = torch.polar(torch.ones_like(phase), phase).to(harmonics.dtype)
    return torch.fft.irfft(harmonics * factors, n=values.shape[-1], dim=-1)


def _margin(plan: Plan) -> Tensor:
    """Soft mask (box, box) of what is around the particles, or of all where there is nothing around."""
    shape = (plan.box, plan.box)
    outer = soft_circle(shape, radius=plan.box / 2 - 4, edge=4.0).to(plan.device)
    margin = outer * (1 - plan.mask())
    if float(margin.square().mean()) < 0.02:
        margin = outer * (1 - soft_circle(shape, radius=0.38 * plan.box, edge=3.0).to(plan.device))
    return margin


def _smooth(spectrum: Tensor) -> Tensor:
    """Mean of each ring and its neighbours, but for the centre."""
    padded = torch.cat([spectrum[:1], spectrum, spectrum[-1:]])
    smooth = padded.unfold(0, 3, 1).mean(-1)
    smooth[: 1 + _SMOOTH] = spectrum[: 1 + _SMOOTH]
    return smooth
