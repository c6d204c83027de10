"""Signal, noise and bias of images that were denoised half by half, ring by ring."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from halfmap.errors import ShapeError
from halfmap.ops.fourier import rfft2
from halfmap.ops.grids import ring_sums

RINGS = 4
"""Rings that are looked at together where images are compared."""

_SEEN = 0.05
"""Amplitude after denoising over that before, below which nothing counts as left."""

_RAW, _RAW_COMMON, _DENOISED, _DENOISED_COMMON, _ACROSS = range(5)
"""Rows of `HalfPowers.sums`."""


@dataclass(frozen=True, eq=False)
class HalfPowers:
    """What two halves of an image have in common before and after each was denoised by itself.

    All properties are powers of one half per ring, means over its coefficients; `halves` says what is left
    in the mean of both. The noise of the halves must be independent, and what denoises may not know the
    other half.

    Attributes
    ----------
    sums : Tensor (n, 5, r), float64
        Of each window and ring over its coefficients: power of the raw halves (mean of both), what these
        have in common, the same two of the denoised halves, and what the denoised ones have in common with
        the other's raw one.
    counts : Tensor (r,), float64
        Coefficients of each ring in a window.

    References
    ----------
    .. [1] Palovcak, Asarnow, Campbell, Yu & Cheng 2020, IUCrJ 7, 1142-1150, DOI 10.1107/S2052252520013184
    """

    sums: Tensor
    counts: Tensor

    @property
    def signal(self) -> Tensor:
        """Power of the signal: what the raw halves have in common."""
        return self._mean(_RAW_COMMON)

    @property
    def noise_before(self) -> Tensor:
        """Power of the noise of a raw half."""
        return self._mean(_RAW) - self._mean(_RAW_COMMON)

    @property
    def noise_after(self) -> Tensor:
        """Power of what the denoised halves do not have in common."""
        return self._mean(_DENOISED) - self._mean(_DENOISED_COMMON)

    @property
    def common_after(self) -> Tensor:
        """Power of what the denoised halves have in common: signal and bias."""
        return self._mean(_DENOISED_COMMON)

    @property
    def bias(self) -> Tensor:
        """Mean squared difference of the signal and of what the denoised halves have in common.

        Fainter signal counts as bias.
        """
        return self._mean(_DENOISED_COMMON) + self._mean(_RAW_COMMON) - 2 * self._mean(_ACROSS)

    @property
    def transfer(self) -> Tensor:
        """Amplitude of the signal after denoising over that before."""
        return self._mean(_ACROSS) / self._mean(_RAW_COMMON)

    @property
    def bias_beside(self) -> Tensor:
        """Power of the bias that is not related to the signal in its ring, fainter or stronger as it is."""
        return self._mean(_DENOISED_COMMON) - self._mean(_ACROSS).square() / self._mean(_RAW_COMMON)

    @property
    def frc_before(self) -> Tensor:
        """Fourier ring correlation of the raw halves."""
        return self._mean(_RAW_COMMON) / self._mean(_RAW)

    @property
    def frc_after(self) -> Tensor:
        """Fourier ring correlation of the denoised halves, which bias raises too."""
        return self._mean(_DENOISED_COMMON) / self._mean(_DENOISED)

    @property
    def frc_across(self) -> Tensor:
        """Correlation of a denoised half with the signal, which bias does not raise."""
        power = (self._mean(_DENOISED) * self._mean(_RAW_COMMON)).clamp(min=0).sqrt()
        return self._mean(_ACROSS) / power

    def pooled(self) -> HalfPowers:
        """All windows as one, their mean."""
        return HalfPowers(self.sums.mean(0, keepdim=True), self.counts)

    def total(self) -> HalfPowers:
        """All rings but that of the mean as one."""
        sums, counts = self.sums[..., 1:].sum(-1, keepdim=True), self.counts[1:].sum()[None]
        return HalfPowers(sums, counts)

    def coarser(self, width: int) -> HalfPowers:
        """Rings in groups of `width`, which begin after that of the mean; the last may hold fewer."""
        pad = -(len(self.counts) - 1) % width
        sums = torch.nn.functional.pad(self.sums[..., 1:], (0, pad)).unflatten(-1, (-1, width)).sum(-1)
        counts = torch.nn.functional.pad(self.counts[1:], (0, pad)).unflatten(-1, (-1, width)).sum(-1)
        return HalfPowers(sums, counts)

    def with_error(self, value: Callable[[HalfPowers], Tensor]) -> tuple[Tensor, Tensor]:
        """A value and its standard error, by leaving out one window after the other.

        Parameters
        ----------
        value : callable
            Of `HalfPowers`, for example ``lambda powers: powers.bias``.

        Returns
        -------
        value, error : Tensor
            The error is NaN if there is one window only.
        """
        whole, n = value(self), len(self.sums)
        if n < 2:
            return whole, torch.full_like(whole, math.nan)
        all_sums = self.sums.sum(0)
        # Sums of the others as one window, for each that is left out.
        others = value(HalfPowers((all_sums - self.sums)[None], self.counts * (n - 1)))
        error = ((n - 1) / n * (others - others.mean(0)).square().sum(0)).sqrt()
        return whole, error

    def __add__(self, other: HalfPowers) -> HalfPowers:
        """Of the windows of both."""
        if not torch.equal(self.counts, other.counts):
            raise ShapeError("powers of windows of different sizes", hint="cut all images alike")
        return HalfPowers(torch.cat([self.sums, other.sums]), self.counts)

    def _mean(self, row: int) -> Tensor:
        return self.sums[..., row, :].sum(0) / (len(self.sums) * self.counts)


def half_powers(
    raw: tuple[Tensor, Tensor], denoised: tuple[Tensor, Tensor], *, size: int, usable: Tensor | None = None
) -> HalfPowers:
    """Powers of an image's halves before and after denoising, in windows that overlap by half.

    Parameters
    ----------
    raw, denoised : pair of Tensor (h, w)
        The halves, of one scale.
    size : int
        Side of the windows in pixels, even. Each is faded out towards its border (Hann), without its mean.
    usable : Tensor (h, w) of bool, optional
        Windows count of which nine tenths are so, at the least.

    Returns
    -------
    HalfPowers
        Of all windows. Powers are per pixel, so that white noise of variance 1 has 1 in each ring.

    Raises
    ------
    ShapeError
        If the images differ in shape, or hold no window.
    """
    images = (*raw, *denoised)
    if len({image.shape for image in images}) != 1:
        raise ShapeError("halves before and after denoising have different shapes")
    places = _places(tuple(raw[0].shape), size, usable)
    if not places:
        h, w = raw[0].shape
        raise ShapeError(f"no window of {size} px lies in the usable part of {h} × {w} px")
    taper = torch.hann_window(size, dtype=torch.float64)
    taper = taper[:, None] * taper
    norm = float(taper.square().sum())
    found = []
    for y, x in places:
        windows = torch.stack([image[y : y + size, x : x + size].double() for image in images])
        windows = windows - (windows * taper).sum((-2, -1), keepdim=True) / taper.sum()
        found.append(_sums(rfft2(windows * taper), size) / norm)
    counts = ring_sums(torch.ones(size, size // 2 + 1, dtype=torch.float64), shape=(size, size))
    return HalfPowers(torch.stack(found), counts)


def joined_at(powers: HalfPowers) -> tuple[float, Tensor]:
    """Ring at which a merged image has the least error, and what brings the denoised one to the signal.

    Both errors are of the mean of the halves: noise of the raw one; noise and bias of the denoised one, at
    the amplitude of the signal. The denoised one is taken to the ring at which those of all frequencies add
    up to the least: what is known of a few rings alone scatters. Where too little signal is seen to tell, the
    denoised one is taken to err by twice as much as the raw one.

    Returns
    -------
    ring : float
        Of a window; 0 if it is the nearer everywhere.
    gain : Tensor (r,)
        Of each ring, the inverse of the transfer.
    """
    coarse = powers.coarser(RINGS)
    transfer = coarse.transfer.clamp(min=1e-3)
    raw = coarse.noise_before / 2
    other = (coarse.noise_after / 2 + coarse.bias_beside.clamp(min=0)) / transfer.square()
    seen = (coarse.signal > 0) & (coarse.transfer >= _SEEN)
    other = torch.where(seen, torch.minimum(other, 2 * raw), 2 * raw)
    gained = ((raw - other) * coarse.counts).cumsum(0)
    first = int(gained.argmax()) + 1 if float(gained.max()) > 0 else 0
    places = 1 + RINGS * torch.arange(len(raw), dtype=torch.float64) + (RINGS - 1) / 2
    rings = torch.arange(len(powers.counts), dtype=torch.float64)
    # Beyond, the transfer is that of nothing.
    known = seen & (torch.arange(len(raw)) < max(first, 1))
    if not bool(known.any()):
        return 0.0, torch.ones_like(rings)
    gain = np.interp(rings.numpy(), places[known].numpy(), (1 / transfer[known]).numpy())
    return float(RINGS * first), torch.from_numpy(gain)


def error_power(powers: HalfPowers, kind: Literal["denoised", "merged"]) -> tuple[Tensor, Tensor, Tensor]:
    """Power of noise and bias in the mean of both halves, in groups of rings, and amplitude of the signal.

    Parameters
    ----------
    powers : HalfPowers
        Of the halves.
    kind : str
        Denoised, or merged as `joined_at` says: at the amplitude of the signal, and raw beyond a ring.

    Returns
    -------
    places : Tensor (g,)
        Ring in the middle of each group.
    power : Tensor (g,)
        Of noise, and of the bias beside the signal. NaN where too little signal is seen to tell.
    amplitude : Tensor (g,)
        Of the signal over that of the raw image; NaN there, too.
    """
    coarse = powers.coarser(RINGS)
    places = 1 + RINGS * torch.arange(len(coarse.counts), dtype=torch.float64) + (RINGS - 1) / 2
    error = coarse.noise_after / 2 + coarse.bias_beside.clamp(min=0)
    signal, noise = coarse.with_error(lambda each: each.signal)
    seen = (signal > 2 * noise.nan_to_num(0.0)) & (coarse.transfer > _SEEN)
    amplitude = torch.where(seen, coarse.transfer, math.nan)
    error = torch.where(seen, error, math.nan)
    if kind == "merged":
        beyond = places >= joined_at(powers)[0]
        error = torch.where(beyond, coarse.noise_before / 2, error / amplitude.square())
        amplitude = torch.where(beyond, 1.0, amplitude / amplitude)
    return places, error, amplitude


def _sums(spectra: Tensor, size: int) -> Tensor:
    raw1, raw2, denoised1, denoised2 = spectra

    def common(a: Tensor, b: Tensor) -> Tensor:
        return a.real * b.real + a.imag * b.imag

    rows = [
        (common(raw1, raw1) + common(raw2, raw2)) / 2,
        common(raw1, raw2),
        (common(denoised1, denoised1) + common(denoised2, denoised2)) / 2,
        common(denoised1, denoised2),
        (common(denoised1, raw2) + common(denoised2, raw1)) / 2,
    ]
    return ring_sums(torch.stack(rows), shape=(size, size)).double()


def _places(shape: tuple[int, ...], size: int, usable: Tensor | None) -> list[tuple[int, int]]:
    """Corners of windows that overlap by half and lie within the image."""
    tops, lefts = (range(0, length - size + 1, size // 2) for length in shape)
    return [
        (y, x)
        for y in tops
        for x in lefts
        if usable is None or float(usable[y : y + size, x : x + size].float().mean()) >= 0.9
    ]
