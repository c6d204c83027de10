"""What images have in common with templates, and with each other beyond what a template can have given them.

Images of nothing but noise, each turned and moved to where it looks most like a template, average to that
template. They do so at the frequencies that they were compared by, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.ops.fourier import irfft2, rfft2
from halfmap.search.inplane import CELLS, Images, References, shift_grid
from halfmap.search.polar import PolarGrid
from halfmap.search.ring_products import from_harmonics

_STEPS_A_RING = 4.0
"""Steps of the grid of shifts in which the phase of the outer ring turns once."""

_CONFIDENCE = 0.01

_SIGNS = 200
"""Times that images are given random signs."""


@dataclass(frozen=True, eq=False)
class Matches:
    """Best match of each of n images.

    Attributes
    ----------
    correlation : Tensor (n,)
        Normalised, -1 to 1.
    template : Tensor (n,) int64
    angle : Tensor (n,) int64
        Of the grid: the template turned by it, from x towards y, is the image.
    shift_px : Tensor (n, 2)
        That centres the image.
    """

    correlation: Tensor
    template: Tensor
    angle: Tensor
    shift_px: Tensor

    @classmethod
    def joined(cls, parts: list[Matches]) -> Matches:
        """Matches of batches, one after the other."""
        return cls(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("correlation", "template", "angle", "shift_px")
            )
        )


def random_phases(images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Images (..., h, w) with the amplitudes of these and phases of white noise; their mean is 0."""
    shape = images.shape[-2:]
    noise = rfft2(torch.randn(images.shape, generator=generator, dtype=images.dtype))
    spectrum = noise * (rfft2(images).abs() / noise.abs().clamp_min(torch.finfo(images.dtype).tiny))
    spectrum[..., 0, 0] = 0
    return irfft2(spectrum, shape=shape)


def best_matches(
    samples: Tensor,
    ctf: Tensor,
    noise: Tensor,
    templates: Tensor,
    grid: PolarGrid,
    *,
    radius: int,
    range_px: float,
) -> Matches:
    """Find the template, the angle in the plane and the shift at which each image correlates best.

    Parameters
    ----------
    samples, ctf : Tensor (n, rings, angles / 2)
        Images and their CTFs on a grid.
    noise : Tensor (rings,)
        Power that rings are divided by.
    templates : Tensor (k, rings, angles / 2)
        On the same grid, without a CTF.
    grid : PolarGrid
    radius : int
        Outermost ring that is compared.
    range_px : float
        Largest shift.

    Returns
    -------
    Matches

    Notes
    -----
    The correlation is that of an image with the template under the image's CTF, both divided by the noise.
    """
    inner = PolarGrid(grid.box, radius, grid.support_px, grid.angles)
    references = References.of(_without_centre(templates, inner))
    shifts = shift_grid(range_px, grid.box / (_STEPS_A_RING * radius))
    size = max(1, CELLS // (grid.angles * len(shifts) * len(templates)))
    found = []
    for part in (slice(start, start + size) for start in range(0, len(samples), size)):
        images = Images.of(
            _without_centre(samples[part], inner), ctf[part, : inner.rings], noise[: inner.rings][None], inner
        )
        found.append(_best(images, references, shifts, inner))
    return Matches.joined(found)


def aligned(samples: Tensor, matches: Matches, grid: PolarGrid) -> Tensor:
    """Images (n, rings, angles / 2), centred and turned back as their templates are."""
    moved = torch.stack(
        [one * grid.shifts(shift[None])[0] for one, shift in zip(samples, matches.shift_px, strict=True)]
    )
    return turned_back(moved, matches.angle)


def turned_back(samples: Tensor, angle: Tensor) -> Tensor:
    """Turn images (n, rings, angles / 2) by minus an angle (n,) of their grid, from x towards y."""
    circle = torch.cat([samples, samples.conj() if samples.is_complex() else samples], dim=-1)
    places = torch.arange(samples.shape[-1]) + angle[:, None]
    places = (places % circle.shape[-1])[:, None].expand(-1, samples.shape[1], -1)
    return circle.gather(-1, places)


@dataclass(frozen=True, eq=False)
class Common:
    """What aligned images have in common, by rings.

    Attributes
    ----------
    frc : Tensor (rings,)
        Fourier ring correlation of the averages of two halves of the images, over all templates together.
    sigmas : float
        By how many standard deviations images agree with each other in the rings asked for, more than they do
        with random signs.
    expected_sigmas : float
        What `sigmas` would be if each image's signal had 1 % of its power there.
    """

    frc: Tensor
    sigmas: float
    expected_sigmas: float


def common_signal(
    images: Tensor,
    template: Tensor,
    grid: PolarGrid,
    *,
    first: int,
    last: int,
    generator: torch.Generator | None = None,
) -> Common:
    """Look for a signal that aligned images of the same template share.

    Products of all pairs of images are summed over the rings. Signs drawn at random show how such a sum
    scatters if images share nothing; they change nothing else.

    Parameters
    ----------
    images : Tensor (n, rings, angles / 2), complex
        Aligned, and divided by the noise so that rings count alike.
    template : Tensor (n,) int64
        Of each.
    grid : PolarGrid
    first, last : int
        Rings that are summed over.
    generator : torch.Generator, optional
        Of the signs.
    """
    weights = grid.weights
    rings = slice(first, last + 1)
    cross, powers = torch.zeros(grid.rings), torch.zeros(2, grid.rings)
    sums, pairs = torch.zeros(_SIGNS + 1, dtype=torch.float64), 0
    total = 0.0
    for members in _members(template):
        group = images[members]
        halves = group[::2].sum(0), group[1::2].sum(0)
        cross += (halves[0] * halves[1].conj()).real.sum(-1)
        powers += torch.stack([half.abs().square().sum(-1) for half in halves])
        part = (group[:, rings] * weights[rings].sqrt()).flatten(1)
        signs = torch.randint(0, 2, (_SIGNS + 1, len(group)), generator=generator) * 2.0 - 1
        signs[0] = 1
        own = float(part.abs().square().sum())
        sums += (signs.to(part.dtype) @ part).abs().square().sum(1).double() - own
        pairs += len(group) * (len(group) - 1)
        total += own
    scatter = float(sums[1:].std()) or 1.0
    power = total / len(images)
    return Common(
        cross / powers.prod(0).sqrt().clamp_min(1e-30),
        float(sums[0] - sums[1:].mean()) / scatter,
        0.01 * pairs * power / scatter,
    )


def averages(images: Tensor, template: Tensor, number: int) -> Tensor:
    """Means (number, rings, angles / 2) of the images of each template; zero where there are none."""
    total = images.new_zeros(number, *images.shape[1:]).index_add_(0, template, images)
    count = torch.bincount(template, minlength=number).clamp_min(1)
    return total / count[:, None, None]


def correlation(a: Tensor, b: Tensor, grid: PolarGrid, *, radius: int) -> float:
    """Correlation of samples (k, rings, angles / 2) on the rings from 1 to a radius, of all k together."""
    weights, rings = grid.weights[1 : radius + 1], slice(1, radius + 1)
    cross, one, two = (
        float(((x[:, rings] * y[:, rings].conj()).real * weights).sum()) for x, y in ((a, b), (a, a), (b, b))
    )
    return cross / max(math.sqrt(one * two), 1e-30)


def least_share(values: NDArray[np.float64], noise: NDArray[np.float64]) -> float:
    """Part of some values that cannot be distributed as noise is, at least, with 99 % confidence.

    If the part p is not of noise, the distribution functions differ by p at most; their largest difference is
    less than what chance makes of it in one case of 100 (Smirnov's one-sided limit).
    """
    places = np.sort(np.concatenate([values, noise]))
    below = [np.searchsorted(np.sort(each), places, side="right") / len(each) for each in (noise, values)]
    chance = math.sqrt(-math.log(_CONFIDENCE) / 2 * (1 / len(values) + 1 / len(noise)))
    return max(0.0, float((below[0] - below[1]).max()) - chance)


def _best(images: Images, references: References, shifts: Tensor, grid: PolarGrid) -> Matches:
    n = len(images.power)
    shifted = images.shifted(shifts.expand(n, -1, 2), grid)
    products = from_harmonics(references.linear(shifted), grid.angles)
    norms = references.norms(images)
    everywhere = norms.new_zeros(grid.angles // 2 + 1, *norms.shape[1:])
    everywhere[::2] = norms
    # Norms and powers are halves of themselves.
    scale = 2 * (from_harmonics(everywhere, grid.angles).clamp_min(1e-30) * images.power[:, None]).sqrt()
    products /= scale[:, :, None]
    values, place = products.permute(1, 0, 2, 3).flatten(1).max(1)
    k, t = products.shape[3], products.shape[2]
    return Matches(values, place % k, place // (k * t), shifts[place // k % t])


def _without_centre(samples: Tensor, grid: PolarGrid) -> Tensor:
    """Samples on the rings of a smaller grid, of images whose mean is 0."""
    inner = samples[:, : grid.rings].clone()
    inner[:, 0] = 0
    return inner


def _members(template: Tensor) -> Iterator[Tensor]:
    for number in template.unique():
        yield (template == number).nonzero().squeeze(1)
