"""How far two maps agree, shell by shell and about each voxel, and what is left between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from halfmap.errors import ParameterError
from halfmap.log import log
from halfmap.ops.envelope import blank_voxels
from halfmap.ops.filters import low_pass, radial_average, radial_profile_to_grid
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.fsc import CorrectedFSC, corrected_fsc, resolution
from halfmap.ops.local_correlation import smoothed
from halfmap.steps.compare.noise import deviation
from halfmap.steps.compare.pair import Pair

if TYPE_CHECKING:
    from halfmap.steps.compare.step import CompareStep

THRESHOLD, HALF = 0.143, 0.5

_DRAWS, _SEED = 3, 1
"""Times that phases are drawn, and their seed."""

_OUTSIDE, _FEWEST = 0.01, 1000
"""Of the mask, below which a voxel is outside, and voxels there that are enough."""

_FLAT = 0.05
"""Deviation outside the mask over that inside, below which there is no noise there but a flat solvent."""

_WINDOW = 0.7
"""Standard deviation of the window over the finest detail: it then holds some hundred independent numbers."""

_NOISE_WINDOW = 1.0
"""The same of the window that the noise of half maps is measured in: some four hundred numbers of both."""

_SHELLS = 3
"""That two maps agree in at least: masks make the first ones alike, whatever is in them."""

_ROUNDS, _LEFT_OUT = 2, 0.1
"""Times that scales are taken again, and part of the mask, where maps differ, that is left out at most."""

_NORMAL = 1.4826
"""Standard deviation of normal values over the median of their distances from the median."""

_LISTED, _SMALLEST = 30, 0.5
"""Regions that are listed at most, and the least volume in cubes of the resolution."""


@dataclass(frozen=True, eq=False)
class Difference:
    """What two maps have in common, and what not.

    Attributes
    ----------
    fsc : CorrectedFSC
    resolution, resolution_half : float
        Å, at which the corrected curve falls below 0.143 and 0.5.
    finest : float
        Å, of what was subtracted.
    scaled : Tensor (n, n, n)
        Second map with the amplitudes of the first, filtered.
    first : Tensor (n, n, n)
        First map, filtered.
    factor : Tensor (shells,)
        What the second map's amplitudes were multiplied by.
    sigmas : Tensor (n, n, n)
        First less second map, in standard deviations.
    sigma : float
        One of these, on the grey scale of the first map; by half maps, the median within the mask.
    noise_from : str
        ``outside`` or ``inside`` the mask, or ``halves``.
    local : Tensor (n, n, n)
        Correlation in a window about each voxel, -1 to 1.
    window : float
        Standard deviation of the window, Å.
    correlation : float
        Of the filtered maps within the mask.
    regions : list of dict
        Where they differ most.
    """

    fsc: CorrectedFSC
    resolution: float
    resolution_half: float
    finest: float
    scaled: Tensor
    first: Tensor
    factor: Tensor
    sigmas: Tensor
    sigma: float
    noise_from: str
    local: Tensor
    window: float
    correlation: float
    regions: list[dict[str, float | int]]


def compare(step: CompareStep, pair: Pair) -> Difference:
    """Correlate both maps, bring the second to the amplitudes of the first, and subtract it.

    Raises
    ------
    ParameterError
        If the maps have nothing in common to be scaled by, or the mask holds nothing.
    """
    if not bool(pair.inside.any()):
        raise ParameterError("the mask is nowhere above 0.5", hint="give one that is 1 inside")
    curves = _correlated(pair)
    at = {"pixel_size": pair.pixel_size, "box": pair.box}
    agree, half = (resolution(curves.corrected, threshold=level, **at) for level in (THRESHOLD, HALF))
    finest = step.resolution or agree
    if pair.side / finest < _SHELLS:
        raise ParameterError(
            "the maps correlate at no resolution: there is nothing to scale and subtract them by",
            hint="are they on each other? Try --align, or give a --resolution",
        )
    finest = max(finest, pair.side / pair.last_shell)
    passed = low_pass(pair.a.shape, pixel_size=pair.pixel_size, resolution=finest)
    maps = _Maps(
        *(irfft3(rfft3(each) * passed, shape=each.shape) for each in (pair.a, pair.b, *_noise(pair)))
    )
    first = maps.first
    left = _subtract(step, pair, maps, finest, pair.mask)
    for _ in range(_ROUNDS):
        alike = _alike(left.apart / left.sigma, pair, step.sigma, finest)
        left = _subtract(step, pair, maps, finest, pair.mask * alike)
    if left.noise_from == "inside":
        log.warning(
            "there is no noise around the particle, maps were masked: differences are given over their own "
            "spread within the mask, and most of them may be due to noise"
        )
    window = step.window or _WINDOW * finest
    sigmas = left.apart / left.sigma
    found = Difference(
        curves,
        agree,
        half,
        finest,
        left.scaled,
        first,
        left.factor,
        sigmas,
        float(left.sigma[pair.inside].median()),
        left.noise_from,
        local_correlation(first, left.scaled, mask=pair.mask, width=window / pair.pixel_size),
        window,
        _correlation(first, left.scaled, pair.inside),
        _regions(sigmas, pair, step.sigma, finest),
    )
    _tell(found, step.sigma)
    return found


def local_correlation(a: Tensor, b: Tensor, *, mask: Tensor, width: float) -> Tensor:
    """Correlation (n, n, n) of two maps in a Gaussian window of a standard deviation in voxels."""
    means = [smoothed(each, width=width, over=mask) for each in (a, b, a * b, a.square(), b.square())]
    mean_a, mean_b, product, square_a, square_b = means
    spread = ((square_a - mean_a.square()).clamp_min(0) * (square_b - mean_b.square()).clamp_min(0)).sqrt()
    covariance = product - mean_a * mean_b
    return torch.where(spread > 0, covariance / spread.where(spread > 0, 1.0), 0.0).clamp(-1, 1)


def _correlated(pair: Pair) -> CorrectedFSC:
    """Correlation of both maps to the last shell that both have."""
    generator = torch.Generator().manual_seed(_SEED)
    whole = corrected_fsc(pair.a, pair.b, mask=pair.mask, draws=_DRAWS, generator=generator)
    shown = [curve[: pair.last_shell + 1] for curve in whole[:4]]
    return CorrectedFSC(shown[0], shown[1], shown[2], shown[3], whole.from_shell)


class _Maps(NamedTuple):
    """Both maps, and what their noise is like where half maps tell it, filtered alike."""

    first: Tensor
    second: Tensor
    noise: Tensor | None = None
    noise_of_second: Tensor | None = None


class _Left(NamedTuple):
    """Second map after scaling, by which factors, and what it leaves of the first, with its deviation."""

    scaled: Tensor
    factor: Tensor
    apart: Tensor
    sigma: Tensor
    noise_from: str


def _noise(pair: Pair) -> list[Tensor]:
    """What the noise of both maps is like, or nothing without half maps."""
    maps = (pair.a, pair.b)
    return [half.noise_in(each, pair.mask) for half, each in zip(pair.halves or (), maps, strict=False)]


def _subtract(step: CompareStep, pair: Pair, maps: _Maps, finest: float, weight: Tensor) -> _Left:
    """Scale the second map by what weighted voxels of both hold, and subtract it from the first."""
    shape = weight.shape
    factor = _factors(step, pair, maps.first * weight, maps.second * weight, finest)
    gain = radial_profile_to_grid(factor, shape=shape)
    scaled = irfft3(rfft3(maps.second) * gain, shape=shape)
    # Densities of maps have no common zero.
    apart = maps.first - scaled
    apart = apart - (apart * weight).sum() / weight.sum()
    if maps.noise is None or maps.noise_of_second is None:
        sigma, noise_from = _sigma(apart, pair)
        return _Left(scaled, factor, apart, torch.full_like(apart, sigma), noise_from)
    other = irfft3(rfft3(maps.noise_of_second) * gain, shape=shape)
    sigma = deviation(maps.noise, other, width=_NOISE_WINDOW * finest / pair.pixel_size)
    return _Left(scaled, factor, apart, sigma, "halves")


def _alike(sigmas: Tensor, pair: Pair, least: float, finest: float) -> Tensor:
    """Weights (n, n, n) of voxels that scales are taken from: 0 where the maps differ, at most in a tenth."""
    far = sigmas.abs()
    limit = max(least, float(np.quantile(far[pair.inside].numpy(), 1 - _LEFT_OUT)))
    strong = ((far > limit) & pair.inside).float()
    blurred = smoothed(strong, width=finest / pair.pixel_size / 2, over=torch.ones_like(strong))
    return (1 - 2 * blurred).clamp_(0, 1)


def _factors(step: CompareStep, pair: Pair, first: Tensor, second: Tensor, finest: float) -> Tensor:
    """What brings the amplitudes of the second of two masked maps to those of the first, (shells,)."""
    spectra = (rfft3(each) for each in (first, second))
    one, two = (radial_average(each.abs().square(), shape=first.shape).double() for each in spectra)
    last = math.ceil(pair.side / finest)
    if not step.match_amplitudes:
        counted = slice(1, last + 1)
        numbers = torch.arange(len(one), dtype=torch.float64).square()
        ratio = (one * numbers)[counted].sum() / (two * numbers)[counted].sum().clamp_min(1e-300)
        return torch.full_like(one, float(ratio.sqrt())).to(first)
    factor = (one / two.clamp_min(1e-300)).sqrt()
    # Beyond there is nothing left but the filter's edge.
    factor[last + 1 :] = factor[min(last, len(factor) - 1)]
    return factor.to(first)


def _sigma(apart: Tensor, pair: Pair) -> tuple[float, str]:
    """Standard deviation of differences without a cause, and where it was measured."""
    outside = (pair.mask < _OUTSIDE) & ~(blank_voxels(pair.a) | blank_voxels(pair.b))
    middle = pair.box // 2
    steps = (torch.arange(pair.box) - middle).square()
    outside &= (steps[:, None, None] + steps[:, None] + steps) < middle**2
    within = apart[pair.inside]
    spread = _NORMAL * float((within - within.median()).abs().median())
    around = float(apart[outside].std()) if int(outside.sum()) >= _FEWEST else 0.0
    if around > _FLAT * spread:
        return around, "outside"
    return max(spread, torch.finfo(torch.float32).tiny), "inside"


def _correlation(a: Tensor, b: Tensor, inside: Tensor) -> float:
    one, two = (each[inside].double() - each[inside].double().mean() for each in (a, b))
    return float((one * two).sum() / (one.norm() * two.norm()).clamp_min(1e-30))


def _regions(sigmas: Tensor, pair: Pair, least: float, finest: float) -> list[dict[str, float | int]]:
    """Connected voxels within the mask that differ by more than some standard deviations, largest first."""
    rows = []
    for sign in (1, -1):
        values = (sign * sigmas).numpy()
        strong = (values > least) & pair.inside.numpy()
        labels = np.zeros(strong.shape, np.int32)
        ndimage.label(strong, structure=np.ones((3, 3, 3)), output=labels)
        for label, part in enumerate(ndimage.find_objects(labels), 1):
            rows.append(_region(values, labels, label, part, sign, pair))
    least_volume = _SMALLEST * finest**3
    kept = [row for row in rows if row["hmRegionVolume"] >= least_volume]
    return sorted(kept, key=lambda row: -row["hmRegionVolume"] * abs(row["hmRegionMean"]))[:_LISTED]


def _region(
    values: NDArray[np.float32],
    labels: NDArray[np.int32],
    label: int,
    part: tuple[slice, ...],
    sign: int,
    pair: Pair,
) -> dict[str, float | int]:
    own = labels[part] == label
    heights = values[part][own].astype(float)
    places = np.argwhere(own) + [each.start for each in part]
    middle = np.average(places, axis=0, weights=heights)[::-1] * pair.pixel_size + np.array(pair.origin)
    return {
        "hmRegionX": float(middle[0]),
        "hmRegionY": float(middle[1]),
        "hmRegionZ": float(middle[2]),
        "hmRegionVolume": len(places) * pair.pixel_size**3,
        "hmRegionMean": sign * float(heights.mean()),
        "hmRegionPeak": sign * float(heights.max()),
    }


def _tell(found: Difference, least: float) -> None:
    log.info(
        "the maps agree to %.2f Å (0.143), %.2f Å (0.5), by a correlation of %.3f to %.2f Å",
        *(found.resolution, found.resolution_half, found.correlation, found.finest),
    )
    more = sum(row["hmRegionMean"] > 0 for row in found.regions)
    log.info(
        "%d regions differ by more than %g standard deviations: %d where the first map is denser, %d where "
        "the second is",
        *(len(found.regions), least, more, len(found.regions) - more),
    )
