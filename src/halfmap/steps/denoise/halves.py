"""The two halves of a micrograph as networks see them, and back again."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.errors import FileFormatError, ShapeError, TableError
from halfmap.io.images import read_image
from halfmap.io.micrographs import MicrographItem, SMALLEST_px, list_micrographs, local_mean, mended
from halfmap.ops.ctf import ctf
from halfmap.ops.filters import radial_average
from halfmap.ops.fourier import irfft2, resize_spectrum, rfft2
from halfmap.ops.grids import frequency_radius

if TYPE_CHECKING:
    from halfmap.data import MicrographSet

EVEN, ODD = "rlnMicrographNameEven", "rlnMicrographNameOdd"

PATCH_px = 192
"""Side of the patches that networks are trained on."""

_SPREAD_px = PATCH_px / math.sqrt(12)
"""Standard deviation of the Gaussian average that has a patch's width."""

PIXELS = "rlnMicrographPixelSize", "rlnMicrographOriginalPixelSize"

COARSER = 1.1
"""Pixels of a micrograph over those that a network is trained for, at the most."""

SOFT = 0.9
"""Part of the coarse images' Nyquist frequency from which on they fade out when they are made finer."""

_SCATTER = 0.03
"""Deviation of the variance of counts over their mean from 1, at the most."""

_BLOCK_px, _WHOLE = 64, 1e-3
"""Blocks in which that is looked at, and how far a whole number may be from one."""

_DIFFERENCES = 3
"""How often neighbours are subtracted along each axis: what is left is of the highest frequencies, where ice
and particles have next to nothing, and noise of a camera that counts nearly all."""

_LOOKED_AT_px, _STRANGE = 1024, 0.1
"""Part of a micrograph that its halves are compared with, and how they correlate with it at least."""

_BANDS = 0.5, 0.6, 0.7, 0.8, 0.9, 1.0
"""Parts of the Nyquist frequency between which halves that are independent have next to nothing in common."""

_EMPTY = 1e-4
"""Power of such a band over that of the strongest, below which it holds nothing that could be compared."""


@dataclass(frozen=True, kw_only=True)
class HalvesItem(MicrographItem):
    """A micrograph with its halves; plain data for a worker.

    Attributes
    ----------
    even, odd : path
        Sums of its even and odd frames. The micrograph itself where its counts are to be thinned.
    seed : int or None
        Of the thinning of a counted image into halves; None where there are two files.
    electron : float
        Value that one electron has in a counted image.
    """

    even: Path
    odd: Path
    seed: int | None = None
    electron: float = 1.0


@dataclass(frozen=True, eq=False)
class Halves:
    """Two halves in coarse pixels, normalised around each pixel as patches are one by one.

    Attributes
    ----------
    values : Tensor (2, h, w)
        Even and odd, mean 0 and standard deviation 1 about every place.
    background : Tensor (2, h, w)
        What was subtracted from each half.
    deviation : Tensor (h, w)
        What both were divided by.
    pixel_size : float
        In Å.
    shape : tuple of 2 int
        Of the micrograph.
    flips : Tensor (h, w // 2 + 1) or None
        Signs of the CTF that phases were flipped by.
    correlation : float
        Of the halves at high frequencies of the micrograph; see `highest_correlation`.
    whole : Tensor (H, W)
        Mean of the halves in the micrograph's pixels.
    """

    values: Tensor
    background: Tensor
    deviation: Tensor
    pixel_size: float
    shape: tuple[int, int]
    flips: Tensor | None
    correlation: float
    whole: Tensor

    def restored(self, values: Tensor) -> Tensor:
        """Normalised halves (..., h, w) on the scale and in the pixels of the micrograph.

        Frequencies beyond the coarse pixels' are zero, and those shortly before fade out.
        """
        # Each half has a background of its own; of their mean it is the mean.
        return self.finer(values * self.deviation + self.background.mean(0))

    def finer(self, image: Tensor) -> Tensor:
        """A coarse image (h, w) in the pixels of the micrograph, its phases flipped back."""
        coarse = tuple(image.shape)
        spectrum = rfft2(image)
        if self.flips is not None:
            spectrum = spectrum * self.flips
        if coarse == self.shape:
            return irfft2(spectrum, shape=coarse)
        share = frequency_radius(coarse) / 0.5
        fade = 0.5 + 0.5 * torch.cos(math.pi * ((share - SOFT) / (1 - SOFT)).clamp(0, 1))
        spectrum = resize_spectrum(spectrum * fade, shape=coarse, new_shape=self.shape)
        return irfft2(spectrum, shape=self.shape)


def list_halves(
    micrographs: MicrographSet,
    resolve: Callable[[str], Path],
    *,
    use_ctf: bool,
    thin: bool = False,
    seed: int = 1,
    electron: float = 1.0,
) -> list[HalvesItem]:
    """Every micrograph with its even and odd sums.

    Parameters
    ----------
    micrographs : MicrographSet
        The table.
    resolve : callable
        Where a file named in it lies.
    use_ctf : bool
        Whether the CTF is wanted.
    thin : bool
        Take the micrographs themselves, whose counts are to be parted at random.
    seed : int
        Of that.
    electron : float
        Value that one electron has in them.

    Raises
    ------
    TableError
        If a row names no even and odd sums, or the same file as both.
    """
    rows = micrographs.rows.to_dicts()
    items = []
    for number, (row, item) in enumerate(
        zip(rows, list_micrographs(micrographs, resolve, use_ctf=use_ctf), strict=True), start=1
    ):
        if thin:
            parted = {"even": item.path, "odd": item.path, "seed": seed, "electron": electron}
            items.append(HalvesItem(**vars(item), **parted))
            continue
        even, odd = row.get(EVEN), row.get(ODD)
        if not even or not odd:
            raise TableError(
                "names no sums of even and odd frames",
                path=micrographs.path,
                row=number,
                hint="let motion write them (--even-odd), or part the counts of a counted image with --thin",
            )
        if even == odd:
            raise TableError(
                "names one file as even and as odd sum",
                path=micrographs.path,
                row=number,
                hint="let motion write both (--even-odd)",
            )
        items.append(HalvesItem(**vars(item), even=resolve(even), odd=resolve(odd)))
    return items


def load_halves(item: HalvesItem, pixel_size: float, *, flip: bool = False) -> Halves:
    """Read the halves of a micrograph as a network sees them.

    Parameters
    ----------
    item : HalvesItem
        What to read.
    pixel_size : float
        Wanted in Å; the micrograph's own where that is coarser.
    flip : bool
        Flip phases by the sign of the CTF.

    Raises
    ------
    FileFormatError
        If a half cannot be read, is blank or too small; of counts to be thinned, if they are none.
    ShapeError
        If the halves are not of one size.
    """
    even, odd = raw = raw_halves(item)
    _refuse_strangers(item, raw)
    if even.shape != odd.shape:
        message = f"is {_size(odd)} px, but the even sum {_size(even)}"
        raise ShapeError(message, path=item.odd, hint="run motion on this movie again")
    h, w = shape = int(even.shape[0]), int(even.shape[1])
    spectra = [rfft2(torch.from_numpy(half)) for half in raw]
    correlation = highest_correlation(spectra[0], spectra[1], shape=shape)
    ratio = max(1.0, pixel_size / item.pixel_size)
    coarse = shape if ratio == 1.0 else (_even(h / ratio), _even(w / ratio))
    if min(coarse) < SMALLEST_px:
        raise FileFormatError(
            f"is only {coarse[1]} × {coarse[0]} px of {pixel_size:g} Å", path=item.name, hint="leave it out"
        )
    size = item.pixel_size * math.sqrt(h * w / (coarse[0] * coarse[1]))
    flips = None
    if flip:
        if item.optics is None:
            raise FileFormatError("has no CTF to flip phases by", path=item.name, hint="run ctf first")
        flips = torch.where(ctf(coarse, pixel_size=size, **item.optics) < 0, -1.0, 1.0)
    images = []
    for spectrum in spectra:
        if coarse != shape:
            spectrum = resize_spectrum(spectrum, shape=shape, new_shape=coarse)
        images.append(irfft2(spectrum if flips is None else spectrum * flips, shape=coarse).numpy())
    background = np.stack([local_mean(image, _SPREAD_px) for image in images])
    flat = np.stack(images) - background
    deviation = np.sqrt(local_mean(np.square(flat).mean(0), _SPREAD_px))
    deviation = np.maximum(deviation, 1e-3 * float(np.median(deviation)) + 1e-12).astype(np.float32)
    values, below, spread = (torch.from_numpy(array) for array in (flat / deviation, background, deviation))
    whole = torch.from_numpy((even + odd) / 2)
    return Halves(values, below, spread, size, shape, flips, correlation, whole)


def highest_correlation(even: Tensor, odd: Tensor, *, shape: tuple[int, int], of_one: bool = True) -> float:
    """Correlation of two images beyond half of the Nyquist frequency, from their spectra.

    Of halves `of_one` micrograph it is that of the band in which it is least: noise that they share is in all
    of these bands, what else there may be, as a ring of ice, only in some. Bands that a filter has emptied do
    not count; NaN if there is no other.
    """
    rows = (even * odd.conj()).real, even.abs().square(), odd.abs().square()
    rings = torch.stack([radial_average(row, shape=shape).double() for row in rows])
    # Rings hold as many coefficients as they are long.
    rings = rings * torch.arange(rings.shape[1])
    edges = [round(part * (max(shape) // 2)) for part in _BANDS]
    found = torch.stack([rings[:, low:high].sum(1) for low, high in pairwise(edges)], dim=1)
    power = (found[1] * found[2]).clamp(min=0).sqrt()
    held = power > _EMPTY * float(power.max())
    if not bool(held.any()):
        return math.nan
    each = found[0, held] / power[held]
    if of_one:
        return float(each[each.abs().argmin()])
    return float((each * power[held]).sum() / power[held].sum())


def raw_halves(item: HalvesItem) -> list[NDArray[np.float32]]:
    """Even and odd sum in the micrograph's own pixels, hot ones mended."""
    if item.seed is not None:
        return _counts_parted(item, item.seed)
    return [mended(np.asarray(read_image(path), np.float32), str(path)) for path in (item.even, item.odd)]


def _refuse_strangers(item: HalvesItem, halves: list[NDArray[np.float32]]) -> None:
    """Refuse sums that are of another micrograph: whatever its frames' weights, it has the noise of both."""
    if item.seed is not None or not item.path.exists():
        return
    whole = np.asarray(read_image(item.path), np.float32)
    for path, half in zip((item.even, item.odd), halves, strict=True):
        if half.shape != whole.shape:
            continue
        one, other = (
            np.diff(np.nan_to_num(each[:_LOOKED_AT_px, :_LOOKED_AT_px]), axis=1).ravel()
            for each in (whole, half)
        )
        found = float(np.corrcoef(one, other)[0, 1]) if one.std() > 0 and other.std() > 0 else 1.0
        if found < _STRANGE:
            message = f"is no sum of frames of {item.name}: from pixel to pixel they correlate by {found:.2f}"
            raise FileFormatError(message, path=path, hint="give each micrograph its own sums, or run motion")


def _counts_parted(item: HalvesItem, seed: int) -> list[NDArray[np.float32]]:
    """Each electron of a counted image into one of two halves, whose noise is then independent.

    Notes
    -----
    Of a number that is Poisson distributed, those that a coin chooses and the others are so too, and
    independent of each other. Values that are not whole, as those of counts that were shifted by parts of a
    pixel, are halved, and noise of a quarter of their variance is added to one half and taken from the other:
    what the halves' noise has in common is a quarter of the variance less a quarter of the mean, nothing.
    """
    counts = np.asarray(read_image(item.even), np.float64) / item.electron
    bad = ~np.isfinite(counts)
    counts[bad] = 0.0 if bad.all() else float(np.median(counts[~bad]))
    ratio = _scatter_over_mean(counts)
    if not (ratio > 0 and counts.min() >= 0):
        message = "does not hold counts: numbers of electrons, 0 and above, before any filter"
        raise FileFormatError(message, path=item.name, hint="denoise from the movie's even and odd sums")
    if abs(ratio - 1) > _SCATTER:
        message = f"scatters {ratio:.3g} times as much as counts of one electron do"
        hint = (
            f"--electron {item.electron * ratio:.4g} if it was multiplied; an image that was filtered cannot "
            "be parted"
        )
        raise FileFormatError(message, path=item.name, hint=hint)
    # By the file, not its place in a table: no two share their coins, and a part of a table gives the same.
    rng = np.random.default_rng([seed, zlib.crc32(str(item.even).encode())])
    if float((np.abs(counts - np.round(counts)) < _WHOLE).mean()) > 0.99:
        even = rng.binomial(np.round(counts).astype(np.int64), 0.5).astype(np.float64)
    else:
        even = counts / 2 + rng.standard_normal(counts.shape) * np.sqrt(counts) / 2
    parted = np.stack([even, counts - even]) * item.electron
    parted[:, bad] = np.nan
    return [mended(half.astype(np.float32), item.name) for half in parted]


def _scatter_over_mean(counts: NDArray[np.float64]) -> float:
    """Variance from pixel to pixel over the mean, in most places: 1 for counts, whatever is slow or hot."""
    n = _DIFFERENCES
    apart = np.diff(np.diff(counts, n, axis=0), n, axis=1)
    side = min(_BLOCK_px, *apart.shape)
    h, w = (length // side * side for length in apart.shape)

    def means(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values[:h, :w].reshape(h // side, side, w // side, side).mean((1, 3))

    scatter, mean = means(np.square(apart)) / math.comb(2 * n, n) ** 2, means(counts)
    return float(np.median(scatter[mean > 0] / mean[mean > 0])) if (mean > 0).any() else 0.0


def _even(length: float) -> int:
    return max(2, 2 * round(length / 2))


def _size(image: NDArray) -> str:
    return f"{image.shape[1]} × {image.shape[0]}"
