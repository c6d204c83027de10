"""What is no specimen: carbon, ice crystals and dirt, found where curation did not mask them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from halfmap.io.micrographs import Image, flattened, local_mean
from halfmap.steps.pick.candidates import Candidates, find_peaks

Map = NDArray[np.float32]

_GATHERED = 1 / 6
_DENSE = 1 / 20
"""Share of a micrograph that ice fills at the least, and how dense its levels are over the densest."""

_ROUNDS = 8
_REACH = 5.0
"""Standard deviations from the ice's level that still are ice."""

_FAINT, _STRONG = 3.0, 6.0
"""Standard deviations of the average over a particle: where something begins, and what is no particle."""

_MANY, _FEW, _TWICE = 8, 3, 2.0
"""Dark spots of which most are particles, as many as do if all are small, and how much darker others are."""

_AROUND = 0.8
"""Diameters from a particle's centre where it is bright again."""

_LARGE = 3.0
"""Areas of particles that something must be larger than to be masked."""

_WIDE = 1.4
"""Diameters of particles that something must be wide at half its depth, however dark it is."""


def mask_obstacles(image: Image, diameter: float, *, largest: float = 0.0, usual: float = 0.0) -> Image:
    """Mask what is much darker or brighter than the ice, and larger than particles, and flatten the rest.

    Parameters
    ----------
    image : Image
        Micrograph.
    diameter : float
        Of a particle in Å.
    largest : float
        Diameter in Å of particles that there may be as well.
    usual : float
        Darkness of most particles of the data set, of `usual_darkness`; 0 where it is not known.

    Notes
    -----
    Averages over a particle that differ from the ice's level by six standard deviations, with all around them
    that differ by three. Ice is the brightest level at which much of the micrograph is; its deviation is that
    to the bright side, where no particles are. Where there are some dark spots, most are particles, and what
    is to be masked must be twice as dark: groups of particles are not. A micrograph's particles may be twice
    as dark or as faint as most of the data set, and a few are taken to be like most. A disc of 1.4 diameters
    must fit into it at half its depth: what begins three deviations from the ice is the wider, the stronger a
    particle is.
    """
    pixel = image.pixel_size
    level = image.values if image.level is None else image.level
    darkness = _darkness(image, diameter)
    own = _usual(*_spots(darkness, image.mask, diameter / pixel))
    if usual > 0:
        own = float(np.clip(own, usual / _TWICE, usual * _TWICE)) if own > 0 else usual
    away = np.where(darkness > 0, darkness / max(_TWICE * own / _STRONG, 1.0), -darkness)
    labelled: Any = scipy.ndimage.label((away > _FAINT) & image.mask)
    parts, count = labelled
    if count == 0:
        return image
    index = np.arange(1, count + 1)
    area = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    peak = scipy.ndimage.maximum(away, parts, index)
    least = np.pi / 4 * max(_LARGE * diameter**2, largest**2) / pixel**2
    wide = np.bincount(parts[_wide(away, image.mask, diameter / pixel)], minlength=count + 1)[1:] > 0
    odd = np.concatenate([[False], (np.asarray(peak) > _STRONG) & (area > least) & wide])
    if not odd.any():
        return image
    near: Any = scipy.ndimage.distance_transform_edt(~odd[parts])
    mask = image.mask & (near > diameter / 3 / pixel)
    if not mask.any():
        return image
    return replace(image, mask=mask, values=flattened(level, mask, image.background / pixel))


def usual_darkness(images: Sequence[Image], diameter: float) -> float:
    """Darkness of most particles in some micrographs, in deviations of their ice; 0 where there are few.

    Parameters
    ----------
    images : sequence of Image
        Micrographs.
    diameter : float
        Of a particle in Å.
    """
    spots = [_spots(_darkness(image, diameter), image.mask, diameter / image.pixel_size) for image in images]
    score, small = (np.concatenate(parts) for parts in zip(*spots, strict=True))
    return _usual(score, small)


def _spots(darkness: Map, mask: NDArray[np.bool_], diameter: float) -> tuple[Map, NDArray[np.bool_]]:
    """Darkness of dark spots that stand alone, and which of them are no larger than particles."""
    spots = find_peaks(darkness, pixel_size=1.0, distance=diameter, mask=mask)
    turn = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    around = Candidates(
        (spots.x[:, None] + _AROUND * diameter * np.cos(turn)).astype(np.float32),
        (spots.y[:, None] + _AROUND * diameter * np.sin(turn)).astype(np.float32),
        spots.score,
    )
    # On carbon there are spots as well, but as dark on one side at least.
    beside = np.percentile(darkness[around.pixels(darkness.shape)], 75, axis=1)
    alone = spots.score - beside > _FAINT
    return spots.score[alone], (beside < spots.score / 2)[alone]


def _usual(score: Map, small: NDArray[np.bool_]) -> float:
    """Median darkness of dark spots, of all or of the small ones; 0 where there are few."""
    if len(score) >= _MANY:
        return float(np.median(score))
    return float(np.median(score[small])) if small.sum() >= _FEW else 0.0


def _wide(away: Map, mask: NDArray[np.bool_], diameter: float) -> NDArray[np.bool_]:
    """Where something of half the depth around is wider than a particle; beyond edges it may go on."""
    top = scipy.ndimage.maximum_filter(away, size=max(3, round(diameter)), mode="nearest")
    body = (away > np.maximum(top / 2, _FAINT)) | ~mask
    if body.all():
        return mask
    reach: Any = scipy.ndimage.distance_transform_edt(body)
    return (reach > _WIDE * diameter / 2) & mask


def _mean(level: Map, mask: NDArray[np.bool_], sigma: float) -> Map:
    """Gaussian average of the usable part."""
    middle = np.float32(np.median(level[mask]))
    weight = scipy.ndimage.gaussian_filter(mask.astype(np.float32), sigma)
    mean = scipy.ndimage.gaussian_filter(np.where(mask, level - middle, 0), sigma)
    return np.asarray(mean / np.maximum(weight, 1e-3) + middle, np.float32)


def _darkness(image: Image, diameter: float) -> Map:
    """How much darker than the ice around it a place is, in standard deviations of bright ice."""
    level = image.values if image.level is None else image.level
    mask, background = image.mask, image.background / image.pixel_size
    mean = _mean(level, mask, diameter / 3 / image.pixel_size)
    values = mean[mask]
    surface = np.full_like(mean, ice_level(values))
    spread = _spread(values - surface[mask])
    for _ in range(_ROUNDS):
        # Ice may be thicker elsewhere: what is near its level is, and moves the level.
        ice = mask & (np.abs(mean - surface) < _REACH * spread)
        weight = local_mean(ice.astype(np.float32), background / 2)
        middle = np.float32(surface[ice].mean())
        near = local_mean(np.where(ice, mean - middle, 0), background / 2)
        surface = np.asarray((near + 1e-3 * (surface - middle)) / (weight + 1e-3) + middle, np.float32)
        before, spread = spread, _spread((mean - surface)[ice])
        if abs(spread / before - 1) < 0.01:
            break
    return np.asarray((surface - mean) / max(spread, 1e-9), np.float32)


def ice_level(values: NDArray) -> float:
    """The brightest level around which a good part of some values gather."""
    levels = np.quantile(values, np.linspace(0, 1, 201))
    window = math.ceil(_GATHERED * 200)
    width = np.maximum(levels[window:] - levels[:-window], 1e-9)
    narrowest = scipy.ndimage.minimum_filter1d(width, window, mode="constant", cval=0.0)
    tops = np.flatnonzero((width == narrowest) & (width < width.min() / _DENSE))
    at = int(tops[-1]) if len(tops) else int(np.argmin(width))
    return float(levels[at : at + window + 1].mean())


def _spread(residual: NDArray) -> float:
    """Standard deviation to the bright side."""
    bright = residual[residual > 0]
    return max(float(np.percentile(bright, 68.27)), 1e-9) if len(bright) else 1e-9
