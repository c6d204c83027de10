"""A reference on the grid and the grey scale of particles, and the noise around these."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
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
from halfmap.search.source import Source

_SAMPLED, _BATCH = 1000, 50
"""Images that spectra are estimated from, and how many at a time."""

_DIRECTIONS = 200
"""Projections that the power of a reference is measured on."""

_FIRST_RING = 2
"""The rings within hold what normalisation has left of the background."""

_FAINT = 1e-4
"""Power of the signal over the noise's that a reference is given at least."""

_SIZES = 0.3, 4.0
"""Side of the reference's box over that of the particles', within which both may be of one particle."""

_SIDES = 5e-3
"""Relative difference of the sides of two boxes that rounding of pixel sizes explains."""


def read_reference(path: Path, *, box: int, pixel_size: float, resolution: float) -> Tensor:
    """Read a reference and bring it onto the particles' grid, low-passed.

    Parameters
    ----------
    path : Path
    box, pixel_size : int, float
        Of the particles, px and Å.
    resolution : float
        In Å, beyond which nothing is left.

    Returns
    -------
    Tensor (box, box, box)
        On the reference's own grey scale.

    Raises
    ------
    FileFormatError, ShapeError, ParameterError
        If it is no cube, not finite, empty, of no pixel size or far from the particles' size.
    """
    found = read_volume(path, cubic=True)
    side, own = box * pixel_size, len(found.array) * found.pixel_size
    if not _SIZES[0] < own / side < _SIZES[1]:
        message = f"the reference is {own:.0f} Å wide, the particles' boxes {side:.0f} Å"
        raise ParameterError(f"{path}: {message}", hint="is its pixel size right?")
    grown = max(2, 2 * round(own / pixel_size / 2))
    volume = resample(torch.from_numpy(found.array), new_shape=(grown,) * 3)
    volume = _framed(volume - _around(volume), box)
    passed = low_pass(tuple(volume.shape), pixel_size=pixel_size, resolution=resolution)
    return irfft3(rfft3(volume) * passed, shape=volume.shape)


def read_mask(path: Path, side: float) -> Tensor:
    """Read a mask (n, n, n) of a box of `side` Å.

    Raises
    ------
    FileFormatError
        If it is no volume that can be used.
    ShapeError
        If its box is another.
    ParameterError
        If it is not a mask.
    """
    return _read_mask(path, path.stat().st_mtime_ns, side)


@functools.lru_cache(maxsize=2)
def _read_mask(path: Path, stamp: int, side: float) -> Tensor:
    found, hint = read_volume(path, cubic=True), "make one in the particles' box: halfmap mask"
    values = torch.from_numpy(found.array)
    if float(values.min()) < -0.01 or float(values.max()) > 1.01:
        raise ParameterError(f"{path}: the mask holds values that are not between 0 and 1", hint=hint)
    if not float(values.max()) > 0.5:
        raise ParameterError(f"{path}: the mask is empty", hint=hint)
    own = len(values) * found.pixel_size
    if not math.isclose(own, side, rel_tol=_SIDES):
        raise ShapeError(
            f"the mask's box is {own:.0f} Å wide, the particles' {side:.0f} Å", path=path, hint=hint
        )
    return values


def noise_around(
    source: Source,
    groups: NDArray[np.intp],
    disc: FourierDisc,
    *,
    pixel_size: float,
    diameter: float,
    seed: int,
) -> tuple[LensNoise, NoiseSums]:
    """Estimate the noise by what is around some of the particles.

    Parameters
    ----------
    source : Source
        Of the images.
    groups : array (n,)
        Optics group of each.
    disc : FourierDisc
        Of the images' box.
    pixel_size, diameter : float
        Of the images and of the particles, Å.
    seed : int
        Of the choice of images.

    Returns
    -------
    noise : LensNoise
    whole : NoiseSums
        Of the whole images, particles and all.
    """
    images = source.images
    margin = _margin(disc.box, diameter / pixel_size).to(disc.device)
    part = float(margin.square().mean())
    n_groups = int(groups.max()) + 1
    around, whole = (NoiseSums.empty(n_groups, disc.radius + 1) for _ in range(2))
    rows = np.random.default_rng(seed).permutation(len(groups))[:_SAMPLED]
    rows = np.concatenate([rows, *(np.flatnonzero(groups == group)[:_BATCH] for group in range(n_groups))])
    for some in images.batches(np.unique(rows), _BATCH):
        parameters, group = source.ctf[torch.from_numpy(some)], torch.from_numpy(groups[some])
        ready = prepare(images.get(some).to(disc.device), margin, parameters, disc, pixel_size)
        transfer = ring_means(disc, ready.ctf.square())
        around.add(ring_means(disc, ready.masked.abs().square()) / part, transfer, group)
        whole.add(ring_means(disc, ready.whole.abs().square()), transfer, group)
    return around.fit(), whole


def grey_scale(reference: Tensor, noise: LensNoise, whole: NoiseSums, *, limit: int, seed: int) -> float:
    """Factor of a reference that gives its projections the power that images have above their noise.

    Parameters
    ----------
    reference : Tensor (box, box, box)
    noise, whole
        From `noise_around`.
    limit : int
        Ring to which the reference has detail.
    seed : int
        Of the directions of the projections.
    """
    disc = FourierDisc(len(reference), limit)
    generator = torch.Generator().manual_seed(seed)
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


def in_box(volume: Tensor, box: int) -> Tensor:
    """The same map in a box of other pixels, its projections' coefficients as before."""
    shape, new = tuple(volume.shape), (box,) * 3
    spectrum = resize_spectrum(fft_centred(volume, ndim=3), shape=shape, new_shape=new)
    return ifft_centred(spectrum * (len(volume) / box) ** 3, shape=new)


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


def _margin(box: int, diameter_px: float) -> Tensor:
    """Soft mask (box, box) of what is around the particles, or of the corners where that is hardly any."""
    return 1 - soft_circle((box, box), radius=min(diameter_px / 2, 0.46 * box), edge=4.0)
