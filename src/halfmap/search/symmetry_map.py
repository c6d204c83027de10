"""Maps made ready for a search of their symmetry: a sphere about the particle, shells by their signal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfmap.ops import filters, fourier, grids, masks
from halfmap.ops.envelope import blank_voxels, find_region
from halfmap.ops.fsc import fsc

RIM = 1.15
"""Radius at which the soft edge of the sphere ends, over the particle's."""

VOXELS = 4.0
"""Voxels per resolution of maps that are turned: linear interpolation then loses little."""


@dataclass(frozen=True, eq=False)
class Band:
    """A map in a sphere about its centre, all shells of the band weighed by their signal.

    Attributes
    ----------
    array : Tensor (m, m, m)
        The map without its spherical average, whitened.
    voxel, radius, resolution : float
        Edge of a voxel, radius of the sphere, and finest detail, Å.
    signal : float
        Correlation that noise leaves between equal parts.
    frequency, signal_of_shell : Tensor (s,)
        Shells in 1/Å, and the same of each.
    """

    array: Tensor
    voxel: float
    radius: float
    resolution: float
    signal: float
    frequency: Tensor
    signal_of_shell: Tensor

    @property
    def radius_px(self) -> float:
        """Radius in voxels of the array."""
        return self.radius / self.voxel


def coarser(volume: Tensor, *, pixel_size: float, resolution: float) -> tuple[Tensor, float, Tensor]:
    """A map with three voxels per resolution, their size, and which of them hold nothing."""
    n = volume.shape[0]
    blank = blank_voxels(volume)
    new = 2 * math.ceil(1.5 * n * pixel_size / resolution)
    if new >= n:
        return volume, pixel_size, blank
    # The nearest voxels: after the resampling what held nothing holds ripples.
    nearest = ((torch.arange(new) - new // 2) * (n / new) + n // 2).round().long().clamp(0, n - 1)
    blank = blank[nearest][:, nearest][:, :, nearest]
    return fourier.resample(volume, new_shape=(new,) * 3), pixel_size * n / new, blank


def extent(volume: Tensor, pixel_size: float, diameter: float | None, blank: Tensor) -> tuple[Tensor, float]:
    """Centre (x, y, z) from voxel n // 2 in voxels, and radius in Å, of the particle in the map."""
    found = find_region(volume, pixel_size=pixel_size, blank=blank)
    places = found.region.nonzero().float()
    middle = places.mean(dim=0)
    centre = (middle - volume.shape[0] // 2).flip(0)
    if diameter is None:
        # Half of the blur reaches beyond the particle.
        reach = float((places - middle).norm(dim=1).max()) * pixel_size - found.resolution / 4
    else:
        reach = diameter / 2
    return centre, max(reach, 4 * pixel_size)


class Sphere:
    """The sphere of a map that is compared, and the spectrum of the noise in it.

    Parameters
    ----------
    volume : Tensor (n, n, n)
        The map.
    pixel_size, radius : float
        In Å.
    centre : Tensor (3,)
        Of the particle, (x, y, z) from voxel ``n // 2``.
    halves : pair of Tensor (n, n, n) or None
        Half maps of any scale and filter, whose correlation tells the signal; None takes what is outside the
        sphere for noise.
    blank : Tensor (n, n, n) of bool
        Voxels that hold nothing.
    """

    def __init__(
        self,
        volume: Tensor,
        *,
        pixel_size: float,
        centre: Tensor,
        radius: float,
        halves: tuple[Tensor, Tensor] | None,
        blank: Tensor,
    ) -> None:
        self.pixel_size, self.centre, self.radius = pixel_size, centre, radius
        self.shape = tuple(volume.shape)
        self.mask = masks.soft_sphere(
            self.shape, radius=radius, edge=(RIM - 1) * radius, pixel_size=pixel_size
        )
        self.noise = self._noise_around(volume, blank) if halves is None else None
        self.signal = None if halves is None else self._signal_of(*halves)

    def _signal_of(self, half1: Tensor, half2: Tensor) -> Tensor:
        """Signal's part of each shell's power in the mean of both half maps."""
        common = fsc(self.cut(half1), self.cut(half2)).clamp(0, 1)
        return 2 * common / (1 + common)

    def _noise_around(self, volume: Tensor, blank: Tensor) -> Tensor | None:
        """Power of each shell that noise has in the sphere; None where nothing is left outside."""
        wider = masks.soft_sphere(
            self.shape, radius=RIM * self.radius, edge=0.1 * self.radius, pixel_size=self.pixel_size
        )
        shifted = self._shift(wider, self.centre)
        outside = (1 - shifted).clamp_(0, 1) * ~blank
        weight = float(outside.square().sum())
        if weight < 0.1 * outside.numel():
            return None
        mean = float((volume * outside).sum() / outside.sum())
        return self._power((volume - mean) * outside) * (float(self.mask.square().sum()) / weight)

    def _power(self, volume: Tensor) -> Tensor:
        return filters.radial_average(fourier.rfft3(volume).abs().square(), shape=self.shape)

    def _shift(self, volume: Tensor, by: Tensor) -> Tensor:
        spectrum = fourier.phase_shift(fourier.rfft3(volume), shape=self.shape, shift_px=by)
        return fourier.irfft3(spectrum, shape=self.shape)

    def cut(self, volume: Tensor) -> Tensor:
        """The map about its centre, less its spherical average, nothing left outside the sphere."""
        moved = self._shift(volume, -self.centre)
        return (moved - spherical_average(moved)) * self.mask

    def band(self, volume: Tensor, resolution: float) -> Band:
        """Weigh the shells and cut the box to the sphere."""
        return self._weigh(self.cut(volume), resolution)

    def random(self, volume: Tensor, resolution: float, generator: torch.Generator) -> Band:
        """Band of a map with the same spectrum, random phases and the same sphere."""
        power = self._power(self.cut(volume))
        spectrum = fourier.rfft3(torch.randn(self.shape, generator=generator))
        spectrum = spectrum * filters.radial_profile_to_grid(power.sqrt(), shape=self.shape)
        return self._weigh(fourier.irfft3(spectrum, shape=self.shape) * self.mask, resolution)

    def _weigh(self, cut: Tensor, resolution: float) -> Band:
        spectrum = fourier.fft_centred(cut, ndim=3)
        power = filters.radial_average(spectrum.abs().square(), shape=self.shape)
        # Shells that a filter has emptied hold rounding errors and what leaks from others.
        floor = 1e-5 * power.max()
        signal = (power > floor).to(power)
        if self.signal is not None:
            signal = signal * self.signal
        if self.noise is not None:
            signal = signal * (1 - self.noise / power.clamp(min=floor)).clamp(0, 1)
        weight = signal / power.clamp(min=floor).sqrt()
        band = filters.band_pass(
            self.shape,
            pixel_size=self.pixel_size,
            low_resolution=max(4 * self.radius, 2 * resolution),
            high_resolution=resolution,
        )
        spectrum *= band * filters.radial_profile_to_grid(weight, shape=self.shape)
        taken = filters.radial_average(band, shape=self.shape)
        # Power of each shell: its coefficients times their weights.
        strength = torch.arange(len(power)).square() * (taken * signal).square()
        share = float((strength * signal).sum() / strength.sum().clamp(min=1e-30))
        box = fourier.ifft_centred(spectrum, shape=self.shape)
        array, voxel = self._cut_box(box, resolution)
        frequency = torch.arange(len(power)) / (self.shape[0] * self.pixel_size)
        within = (taken > 0.5) & (signal > 0)
        return Band(array, voxel, self.radius, resolution, share, frequency[within], signal[within])

    def _cut_box(self, box: Tensor, resolution: float) -> tuple[Tensor, float]:
        """The cube around the sphere, with as many voxels as the resolution needs."""
        n = self.shape[0]
        half = min(n // 2, math.ceil(RIM * self.radius / self.pixel_size) + 2)
        inner = slice(n // 2 - half, n // 2 + half)
        new = max(16, 2 * math.ceil(VOXELS * half * self.pixel_size / resolution))
        array = fourier.resample(box[inner, inner, inner].contiguous(), new_shape=(new,) * 3)
        return array / array.square().mean().sqrt(), 2 * half * self.pixel_size / new


def spherical_average(volume: Tensor) -> Tensor:
    """Mean over each sphere about the origin, linear between radii a voxel apart."""
    device = volume.device
    radius = grids.radius(volume.shape, device=device)
    lower = radius.long()
    upper_part = radius - lower
    count = math.isqrt(sum((n // 2) ** 2 for n in volume.shape)) + 2
    sums, weights = torch.zeros(2, count, dtype=torch.float64, device=device)
    for index, part in ((lower, 1 - upper_part), (lower + 1, upper_part)):
        sums.index_add_(0, index.flatten(), (volume * part).flatten().double())
        weights.index_add_(0, index.flatten(), part.flatten().double())
    mean = (sums / weights.clamp(min=1e-9)).to(volume)
    return (1 - upper_part) * mean.take(lower) + upper_part * mean.take(lower + 1)
