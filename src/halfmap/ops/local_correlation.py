"""How far two half maps agree around each voxel, band by band of frequencies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from scipy.fft import next_fast_len
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops.filters import radial_profile_to_grid
from halfmap.ops.fourier import irfft3, resize_spectrum, rfft3
from halfmap.ops.grids import frequencies, frequency_radius, friedel_weight

STEP = 0.2
"""Distance of bands, and half their width, over their frequency: narrower ones would smear what is in them
over more than five wavelengths."""

_LEAST_STEP = 1.5
"""Shells between bands at least."""

SAMPLES = 80.0
"""Numbers that a window holds, as many as are independent where it is wide: the correlation of noise then
scatters by some 0.07."""

_ROOM = 4
"""Side of the box of a band over its outermost shell: products of maps have twice their frequencies."""

_ROOM_OF_ONE = 2.5
"""The same for one map and weights that vary slowly."""

_CONE = 4
"""Power of the cosine that weights frequencies about an axis."""

_HELD = 1e-4
"""Part of a window that is taken to be within the mask, at least."""

_NARROWEST = 1.0
"""Standard deviation of a window over the wavelength, at least."""


@dataclass(frozen=True, eq=False)
class Band:
    """A band of frequencies of two half maps, in a box that just holds it.

    Attributes
    ----------
    number : int
        From 0.
    box : int
        Side of the whole box.
    shell : float
        Its middle, in shells of the whole box.
    outer : int
        Shell where it ends.
    mean, apart : Tensor (m, m, m)
        Mean and half the difference of the half maps, filtered by the band.
    inside : Tensor (m, m, m)
        The mask.
    signal, noise : Tensor (m, m, m)
        Local means, over the mask, of their squares, without what the difference says is noise in the mean;
        with the factors of `bands`, if there are any, over that of the middle.
    width : float
        Standard deviation of the window, voxels of the whole box.
    deviation : float
        Of the correlation of noise.
    """

    number: int
    box: int
    shell: float
    outer: int
    mean: Tensor
    apart: Tensor
    inside: Tensor
    signal: Tensor
    noise: Tensor
    width: float
    deviation: float

    @property
    def correlation(self) -> Tensor:
        """Local correlation (m, m, m) of the half maps, from -1 to 1; 0 where there is nothing."""
        whole = self.signal + self.noise
        return torch.where(whole > 0, self.signal / whole.where(whole > 0, 1.0), 0.0).clamp(-1, 1)


def shells(box: int, first: float, *, overlap: int = 1) -> list[float]:
    """Middles of bands, in shells, from the first to the end of the box; see `bands` for the overlap."""
    found = [first]
    while found[-1] < box // 2 - 1:
        found.append(found[-1] + max(_LEAST_STEP, STEP * found[-1]) / overlap)
    return found


def bands(
    first: Tensor,
    second: Tensor,
    *,
    mask: Tensor,
    middles: list[float],
    samples: float = SAMPLES,
    overlap: int = 1,
    axis: Tensor | None = None,
    transfer: Tensor | None = None,
) -> Iterator[Band]:
    """Go through two half maps band by band, with their correlation about each voxel.

    Each band is a shell of frequencies with raised-cosine edges; where they do not overlap by more, the bands
    add up to the maps. Within a band, products and squares of the half maps are averaged over the mask by a
    Gaussian window, as wide as it takes to hold enough independent numbers. Windows are wide at low
    frequencies and narrow at high ones, and every correlation is as certain as any other.

    Parameters
    ----------
    first, second : Tensor (n, n, n)
        Unfiltered half maps.
    mask : Tensor (n, n, n)
        0 to 1; only what is within counts.
    middles : list of float
        From `shells`.
    samples : float
        Independent numbers in a window.
    overlap : int
        Number of bands after which the next begins that has nothing in common with one.
    axis : Tensor (3,), optional
        Unit vector (x, y, z), about which a cone of frequencies alone is compared; default: all.
    transfer : Tensor (n // 2 + 1,), optional
        Factors above 0 of shells that half maps are compared with; default: as they are. Where signal falls
        steeply, a band that is to be sharpened is correlated by its coarse side, but shown by its fine one.

    Yields
    ------
    Band
        From low to high frequencies.

    Raises
    ------
    ShapeError
        If maps and mask are no cubes of one size.
    ParameterError
        If there are fewer than two bands.

    References
    ----------
    .. [1] Cardone, Heymann & Steven 2013, J. Struct. Biol. 184, 226-236, DOI 10.1016/j.jsb.2013.08.002
    .. [2] Ramlaul, Palmer & Aylett 2019, J. Struct. Biol. 205, 30-40, DOI 10.1016/j.jsb.2018.11.011
    """
    n = len(first)
    if not (first.shape == second.shape == mask.shape == (n, n, n)):
        raise ShapeError(f"maps {tuple(first.shape)}, {tuple(second.shape)} and mask {tuple(mask.shape)}")
    if len(middles) < 2:
        raise ParameterError("there are no bands of frequencies in so small a box", hint="give larger boxes")
    mean, apart = rfft3((first + second) / 2), rfft3((first - second) / 2)
    inside = rfft3(mask)
    step = middles[-1] - middles[-2]
    edges = [*middles, *(middles[-1] + (i + 1) * step for i in range(overlap))]
    for number, middle in enumerate(middles):
        low, high = edges[number - overlap] if number >= overlap else -1.0, edges[number + overlap]
        outer = min(n // 2, math.ceil(high))
        m = min(n, next_fast_len(_ROOM * outer, real=True) or n)
        m = min(n, m + m % 2)
        shape, small = (n,) * 3, (m,) * 3
        weight = _weight(m, low, middle, high)
        if axis is not None:
            weight *= cone(m, axis)
        cut = [resize_spectrum(each, shape=shape, new_shape=small) for each in (mean, apart)]
        one, two = (irfft3(each * weight, shape=small) for each in cut)
        compared = one, two
        if transfer is not None:
            # Over that of the middle: squares of steep factors would exceed single precision.
            weight *= within_band(transfer / transfer[min(round(middle), n // 2)], m, outer)
            compared = tuple(irfft3(each * weight, shape=small) for each in cut)
        here = irfft3(resize_spectrum(inside, shape=shape, new_shape=small), shape=small).clamp_(0, 1)
        count = _independent(weight, small)
        width = max((samples * n**3 / count) ** (1 / 3) / (2 * math.sqrt(math.pi)), _NARROWEST * n / middle)
        window = _window(m, width * m / n)
        sums = [_smooth(each, window) for each in (*(here * each.square() for each in compared), here)]
        held = sums[2].clamp_min_(_HELD)
        noise = (sums[1] / held).clamp_min_(0)
        deviation = _deviation(weight, window, small)
        signal = sums[0] / held - noise
        yield Band(number, n, middle, outer, one, two, here, signal, 2 * noise, width, deviation)


def upsampled(values: Tensor, box: int) -> Tensor:
    """Smooth values (m, m, m) of a band's box on the voxels of another (box, box, box), linearly."""
    m = len(values)
    if m == box:
        return values
    place = torch.arange(box, dtype=torch.float64) * (m / box)
    low = place.floor().long()
    part = (place - low).to(values)
    for axis in range(3):
        shape = [1, 1, 1]
        shape[axis] = box
        lower, upper = values.index_select(axis, low % m), values.index_select(axis, (low + 1) % m)
        values = lower + (upper - lower) * part.reshape(shape)
    return values


def within_band(transfer: Tensor, m: int, outer: int) -> Tensor:
    """Factors of shells on a band's half-spectrum (m, m, m // 2 + 1), 0 beyond its outermost shell.

    There is nothing but what rounding left beyond, and steep factors would make the most of it.
    """
    held = torch.where(torch.arange(len(transfer)) <= outer, transfer, 0.0).float()
    return radial_profile_to_grid(held, shape=(m,) * 3)


def in_bands(volume: Tensor, *, middles: list[float], weight: Callable[[int, int], Tensor | float]) -> Tensor:
    """Multiply what each band of frequencies holds of a map by weights of its own, voxel by voxel.

    Parameters
    ----------
    volume : Tensor (n, n, n)
    middles : list of float
        Of bands that do not overlap by more than their edges, as of `bands`.
    weight : callable
        Takes the number of a band and the side m of a box that holds it. Gives its weights (m, m, m) over the
        map's box, or one number for all voxels.

    Returns
    -------
    Tensor (n, n, n)

    Notes
    -----
    Weights are taken to vary more slowly than the waves that they multiply, so that the product of both fits
    into a box little larger than the band's.
    """
    n = len(volume)
    shape = (n,) * 3
    whole = rfft3(volume)
    radius = frequency_radius(shape).to(whole.device) * n
    out, common = torch.zeros_like(whole), torch.zeros_like(radius)
    edges = [*middles, 2 * middles[-1] - middles[-2]]
    for number, middle in enumerate(middles):
        low, high = edges[number - 1] if number else -1.0, edges[number + 1]
        outer = min(n // 2, math.ceil(high))
        m = min(n, next_fast_len(math.ceil(_ROOM_OF_ONE * outer), real=True) or n)
        m = min(n, m + m % 2)
        local = weight(number, m)
        if isinstance(local, Tensor):
            small = (m,) * 3
            part = resize_spectrum(whole, shape=shape, new_shape=small) * _weight(m, low, middle, high)
            put_back(out, irfft3(part, shape=small) * local, n)
        elif local:
            common += local * _over(radius, low, middle, high)
    return irfft3(out.addcmul_(whole, common.to(whole)), shape=shape)


def put_back(spectrum: Tensor, part: Tensor, box: int) -> None:
    """Add what is in a band's box (m, m, m) to the half-spectrum of the whole box, in place."""
    m = len(part)
    spectrum += resize_spectrum(rfft3(part), shape=(m,) * 3, new_shape=(box,) * 3)


def cone(m: int, axis: Tensor) -> Tensor:
    """Weights (m, m, m // 2 + 1) of frequencies by their angle with an axis: one half at some 33°."""
    k = frequencies((m,) * 3)
    cosine = (k @ axis.to(k)) / k.norm(dim=-1).clamp_min(1e-9)
    return cosine.abs() ** _CONE


def _weight(m: int, low: float, middle: float, high: float) -> Tensor:
    """Raised-cosine band (m, m, m // 2 + 1); all that is within the middle if there is no lower edge."""
    return _over(frequency_radius((m,) * 3) * m, low, middle, high)


def _over(radius: Tensor, low: float, middle: float, high: float) -> Tensor:
    up = ((radius - low) / (middle - low)).clamp_(0, 1) if low >= 0 else torch.ones_like(radius)
    down = ((high - radius) / (high - middle)).clamp_(0, 1)
    return (0.5 - 0.5 * (math.pi * up).cos_()) * (0.5 - 0.5 * (math.pi * down).cos_())


def _independent(weight: Tensor, shape: tuple[int, ...]) -> float:
    """Coefficients of the full spectrum that a band has, as far as they count alike."""
    pairs = friedel_weight(shape)
    squared = weight.double().square()
    return float((squared * pairs).sum() ** 2 / (squared.square() * pairs).sum())


def _deviation(weight: Tensor, window: Tensor, shape: tuple[int, ...]) -> float:
    """Standard deviation of the correlation of noise, from how far numbers within a window are alike."""
    alike = irfft3((weight.square()).to(torch.complex64), shape=shape)
    alike /= alike.flatten()[0].clone()
    over = irfft3(window.square().to(torch.complex64), shape=shape)
    return float((over * alike.square()).sum().clamp_min(0).sqrt())


def _window(m: int, width: float) -> Tensor:
    """Transfer of a Gaussian window of a standard deviation in voxels."""
    return torch.exp(-2 * (math.pi * width * frequency_radius((m,) * 3)).square())


def smoothed(values: Tensor, *, width: float, over: Tensor) -> Tensor:
    """Means of values (m, m, m) over a mask, by a Gaussian window of a standard deviation in voxels."""
    window = _window(len(values), width)
    return _smooth(over * values, window) / _smooth(over, window).clamp_min_(_HELD)


def _smooth(values: Tensor, window: Tensor) -> Tensor:
    return irfft3(rfft3(values) * window, shape=values.shape)
