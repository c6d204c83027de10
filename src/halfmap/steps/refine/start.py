"""The beginning: the reference on the grid and grey scale of the particles, and the noise around them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from halfmap.errors import ParameterError
from halfmap.io.volumes import read_volume
from halfmap.log import log
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import fft_centred, ifft_centred, irfft3, resample, resize_spectrum, rfft3
from halfmap.ops.masks import soft_circle
from halfmap.ops.rotations import random_rotations
from halfmap.search.disc import FourierDisc
from halfmap.search.lens_noise import LensNoise, NoiseSums, ring_means
from halfmap.search.prepared import prepare
from halfmap.search.projector import SplineVolume, sample_slices
from halfmap.steps.refine.model import Model
from halfmap.steps.refine.plan import PARTS, Plan
from halfmap.steps.refine.solvent import given_mask

_SAMPLED, _BATCH = 1000, 50
"""Images that spectra are estimated from, and how many at a time."""

_DIRECTIONS = 200
"""Projections that the power of the reference is measured on."""

_FIRST_RING = 2
"""The rings within hold what normalisation has left of the background."""

_FAINT = 1e-4
"""Power of the signal over the noise's that a reference is given at least."""

_SIZES = 0.3, 4.0
"""Side of the reference's box over that of the particles', within which both may be of one particle."""


def read_reference(plan: Plan) -> Tensor:
    """Read the reference and bring it onto the particles' grid, low-passed.

    Parameters
    ----------
    plan : Plan
        The refinement.

    Returns
    -------
    Tensor (box, box, box)
        On the reference's own grey scale.

    Raises
    ------
    FileFormatError, ShapeError, ParameterError
        If it is no cube, not finite, empty, of no pixel size or far from the particles' size; or if the mask
        is no mask.
    """
    path = plan.source.project / plan.step.reference
    found = read_volume(path, cubic=True)
    side = len(found.array) * found.pixel_size
    if not _SIZES[0] < side / plan.side < _SIZES[1]:
        message = f"the reference is {side:.0f} Å wide, the particles' boxes {plan.side:.0f} Å"
        raise ParameterError(f"{path}: {message}", hint="is its pixel size right?")
    if plan.mask is not None:
        _ = given_mask(plan.mask, plan.side)
    grown = max(2, 2 * round(side / plan.pixel_size / 2))
    volume = resample(torch.from_numpy(found.array), new_shape=(grown,) * 3)
    volume = _framed(volume - _around(volume), plan.box)
    # Nothing is left from the ring of the resolution on.
    finest = plan.side / max(1, plan.ring(plan.step.initial_lowpass) - 1)
    passed = low_pass(tuple(volume.shape), pixel_size=plan.pixel_size, resolution=finest)
    return irfft3(rfft3(volume) * passed, shape=volume.shape) * plan.sphere(plan.box).cpu()


def first_model(plan: Plan, reference: Tensor) -> Model:
    """Estimate the noise around the particles and the grey scale of the reference.

    Parameters
    ----------
    plan : Plan
        The refinement.
    reference : Tensor (box, box, box)
        From `read_reference`.

    Returns
    -------
    Model
    """
    disc = plan.whole_disc()
    noise, whole = _spectra(plan, disc)
    limit = plan.ring(plan.step.initial_lowpass)
    factor = _grey_scale(plan, reference, noise, whole, limit)
    # Signal that the reference does not have yet is noise to the comparison.
    everything = whole.fit()
    beyond = torch.arange(disc.radius + 1) >= limit
    powers = torch.stack(
        [
            torch.where(beyond, everything.detector, noise.detector),
            torch.where(beyond, everything.specimen, noise.specimen),
        ]
    ).to(plan.device)
    radius = min(limit + 2, plan.nyquist)
    first = plan.disc(radius)
    shape, new = (plan.box,) * 3, (first.box,) * 3
    spectrum = resize_spectrum(fft_centred(reference, ndim=3), shape=shape, new_shape=new)
    small = ifft_centred(spectrum * (factor * (plan.box / first.box) ** 3), shape=new).to(plan.device)
    micrographs = int(plan.micrographs.max()) + 1
    return Model(
        iteration=0,
        stage="everywhere",
        radius=radius,
        references=small.expand(2, PARTS, -1, -1, -1).clone(),
        noise=powers.expand(2, -1, -1, -1).clone(),
        scale=torch.ones(2, micrographs, device=plan.device),
        deviation_A=torch.full((2,), plan.shift_range / 2, dtype=torch.float64),
        curves=torch.zeros(4, plan.box // 2 + 1),
        from_shell=plan.box // 2 + 1,
        finest=0,
        stale=0,
        turned=180.0,
        jumped=1.0,
    )


def _spectra(plan: Plan, disc: FourierDisc) -> tuple[LensNoise, NoiseSums]:
    """Noise by what is around the particles, and sums of the whole images."""
    images, margin = plan.source.images, _margin(plan)
    part = float(margin.square().mean())
    around, whole = (NoiseSums.empty(plan.n_groups, disc.radius + 1) for _ in range(2))
    rows = np.random.default_rng(plan.step.seed).permutation(len(plan.groups))[:_SAMPLED]
    rows = np.concatenate(
        [rows, *(np.flatnonzero(plan.groups == group)[:_BATCH] for group in range(plan.n_groups))]
    )
    for some in images.batches(np.unique(rows), _BATCH):
        parameters, group = plan.source.ctf[torch.from_numpy(some)], torch.from_numpy(plan.groups[some])
        ready = prepare(images.get(some).to(plan.device), margin, parameters, disc, plan.pixel_size)
        transfer = ring_means(disc, ready.ctf.square())
        around.add(ring_means(disc, ready.masked.abs().square()) / part, transfer, group)
        whole.add(ring_means(disc, ready.whole.abs().square()), transfer, group)
    return around.fit(), whole


def _grey_scale(plan: Plan, reference: Tensor, noise: LensNoise, whole: NoiseSums, limit: int) -> float:
    """Factor of the reference that gives its projections the power that images have above their noise."""
    disc = FourierDisc(plan.box, limit)
    generator = torch.Generator().manual_seed(plan.step.seed)
    rotations = random_rotations(_DIRECTIONS, generator=generator)
    slices = sample_slices(SplineVolume.of(reference, radius_px=limit), rotations, disc.points)
    part = slice(min(_FIRST_RING, limit), limit + 1)
    count, transfer, _, power, _ = whole.moments[:, :, part]
    level = (count * noise.detector[:, part] + transfer * noise.specimen[:, part]).sum(0) / count.sum(0)
    excess = power.sum(0) / count.sum(0) - level
    signal = ring_means(disc, slices.abs().square()).mean(0)[part] * transfer.sum(0) / count.sum(0)
    ring = torch.arange(limit + 1)[part].double()
    weight = ring / (level + excess.clamp_min(0)).square()
    square = float((weight * excess * signal).sum() / (weight * signal.square()).sum())
    least = _FAINT * float(level.mean() / signal.mean())
    if square < least:
        log.warning("the images hold hardly more power than their noise: are there particles in them?")
    return math.sqrt(max(square, least))


def _around(volume: Tensor) -> float:
    """Mean of what is at the borders of a box."""
    faces = torch.ones(volume.shape, dtype=torch.bool)
    faces[1:-1, 1:-1, 1:-1] = False
    return float(volume[faces].mean())


def _framed(volume: Tensor, box: int) -> Tensor:
    """Volume about the same origin in another box, cut or with nothing added."""
    result = volume.new_zeros(box, box, box)
    low, n = volume.shape[0] // 2, min(box, len(volume))
    own = slice(low - n // 2, low - n // 2 + n)
    into = slice(box // 2 - n // 2, box // 2 - n // 2 + n)
    result[into, into, into] = volume[own, own, own]
    return result


def _margin(plan: Plan) -> Tensor:
    """Soft mask (box, box) of what is around the particles, or of the corners where that is hardly any."""
    shape = (plan.box, plan.box)
    edge = 4.0
    inner = soft_circle(shape, radius=min(plan.diameter / plan.pixel_size / 2, 0.46 * plan.box), edge=edge)
    return (1 - inner).to(plan.device)
