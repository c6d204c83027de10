"""Sharpening of a map: detector, weights, B-factor, filter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.errors import ParameterError, TableError
from halfmap.io.half_maps import HalfMaps
from halfmap.io.star import read_star
from halfmap.log import log
from halfmap.ops.filters import b_factor, low_pass, radial_average
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.grids import ring_index
from halfmap.steps.postprocess.correlate import Curves

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.postprocess.step import Sharpening

_FEWEST = 5
"""Shells that a straight line is fitted through at least."""

_LEAST_MTF = 1e-3


@dataclass(frozen=True)
class Guinier:
    """Logarithms of mean amplitudes of shells, and the line through them.

    Attributes
    ----------
    squared : array (shells,)
        Squared frequencies, 1/Å².
    original, detected, weighted, sharpened : array (shells,)
        Of the mean of the half maps, divided by the MTF, weighted, and with the B-factor; not a number where
        a shell has no amplitude.
    b_factor, error : float
        That was taken, Å², and its standard deviation if it was fitted, else not a number.
    intercept, correlation : float
        Of the line; not a number if none was fitted.
    """

    squared: NDArray[np.float64]
    original: NDArray[np.float64]
    detected: NDArray[np.float64]
    weighted: NDArray[np.float64]
    sharpened: NDArray[np.float64]
    b_factor: float
    error: float
    intercept: float
    correlation: float


@dataclass(frozen=True, eq=False)
class Sharpened:
    """Sharpened map.

    Attributes
    ----------
    volume : Tensor (n, n, n)
    guinier : Guinier
    transfer : Tensor (shells,)
        Factors of MTF and B-factor.
    lowpass : float
        Detail that it was filtered to, Å.
    """

    volume: Tensor
    guinier: Guinier
    transfer: Tensor
    lowpass: float


def sharpen(step: Sharpening, ctx: Context, halves: HalfMaps, curves: Curves) -> Sharpened:
    """Divide the mean of half maps by the MTF, weight it, sharpen it and filter it.

    Raises
    ------
    ParameterError
        If the B-factor cannot be fitted where it was asked for.
    TableError
        If the MTF cannot be read.
    """
    shape, pixel_size = tuple(halves.first.shape), halves.pixel_size
    shells = ring_index(shape)
    spectrum = rfft3(halves.mean)
    squared = (np.arange(halves.box // 2 + 1) / (halves.box * pixel_size)) ** 2
    original = _amplitudes(spectrum, shape)
    transfer = torch.ones(len(squared), dtype=torch.float64)
    if step.mtf is not None:
        transfer /= read_mtf(ctx.resolve(step.mtf), squared**0.5, step, pixel_size)
        spectrum *= _by_shell(transfer, shells)
    detected = _amplitudes(spectrum, shape)
    if step.weighting:
        spectrum *= _by_shell(signal_weight(curves.fsc.corrected), shells)
    weighted = _amplitudes(spectrum, shape)
    shells_seen = _shells_between(squared, step.guinier_from, curves.resolution)
    if step.b_factor is None and step.guinier_to is None and shells_seen < _FEWEST:
        log.warning(
            "too few shells lie between %.3g and %.3g Å for a B-factor: the map is not sharpened; give a "
            "--b-factor, or a coarser --guinier-from",
            *(step.guinier_from, curves.resolution),
        )
        line = (0.0, math.nan, math.nan, math.nan)
    elif step.b_factor is None:
        line = fit(squared, weighted, step.guinier_from, step.guinier_to or curves.resolution)
        log.info("B-factor %.0f ± %.0f Å²", *line[:2])
    else:
        line = (step.b_factor, math.nan, math.nan, math.nan)
    spectrum *= b_factor(shape, pixel_size=pixel_size, b_factor=line[0])
    transfer *= torch.exp(-line[0] / 4 * torch.from_numpy(squared))
    sharpened = _amplitudes(spectrum, shape)
    detail = step.lowpass or curves.resolution
    if math.isfinite(detail):
        spectrum *= low_pass(shape, pixel_size=pixel_size, resolution=detail)
    guinier = Guinier(squared, original, detected, weighted, sharpened, *line)
    return Sharpened(irfft3(spectrum, shape=shape), guinier, transfer, detail)


def signal_weight(correlation: Tensor) -> Tensor:
    """Correlation that the mean of the half maps has with what is there, of each shell.

    References
    ----------
    .. [1] Rosenthal & Henderson 2003, J. Mol. Biol. 333, 721-745, DOI 10.1016/j.jmb.2003.07.013
    """
    f = correlation.double().nan_to_num(0.0).clamp(0, 1)
    f[0] = 1
    return (2 * f / (1 + f)).sqrt()


def fit(
    squared: NDArray[np.float64], logarithms: NDArray[np.float64], coarse: float, fine: float
) -> tuple[float, float, float, float]:
    """Fit a straight line to a Guinier plot.

    Parameters
    ----------
    squared, logarithms : array (shells,)
        Squared frequencies in 1/Å², and logarithms of amplitudes.
    coarse, fine : float
        Detail between which the line is fitted, Å.

    Returns
    -------
    b_factor, error, intercept, correlation : float
        Four times the slope in Å², as it is to be applied, and its standard deviation; the logarithm at
        zero frequency; and the coefficient of correlation.

    Raises
    ------
    ParameterError
        If hardly any shells are between these.
    """
    used = (squared >= 1 / coarse**2) & (squared <= 1 / fine**2) & np.isfinite(logarithms)
    if int(used.sum()) < _FEWEST:
        raise ParameterError(
            f"a B-factor cannot be fitted from {coarse:.3g} to {fine:.3g} Å: {int(used.sum())} shells",
            hint="give a --b-factor (0 sharpens nothing), or a coarser --guinier-from",
        )
    x, y = squared[used], logarithms[used]
    (slope, intercept), residual = np.polyfit(x, y, 1), 0.0
    residual = y - slope * x - intercept
    error = math.sqrt(float((residual**2).sum()) / max(len(x) - 2, 1) / float(((x - x.mean()) ** 2).sum()))
    return 4 * float(slope), 4 * error, float(intercept), float(np.corrcoef(x, y)[0, 1])


def _shells_between(squared: NDArray[np.float64], coarse: float, fine: float) -> int:
    return int(np.count_nonzero((squared >= 1 / coarse**2) & (squared <= 1 / fine**2)))


def read_mtf(path: Path, frequency: NDArray[np.float64], step: Sharpening, pixel_size: float) -> Tensor:
    """MTF of a detector at frequencies in 1/Å, from RELION's table of it.

    Raises
    ------
    TableError
        If the file holds no such table.
    """
    for block in read_star(path).values():
        if isinstance(block, pl.DataFrame) and {"rlnResolutionInversePixel", "rlnMtfValue"} <= set(
            block.columns
        ):
            place = block["rlnResolutionInversePixel"].to_numpy().astype(float)
            value = block["rlnMtfValue"].to_numpy().astype(float)
            break
    else:
        raise TableError("holds no MTF", path=path, hint="columns rlnResolutionInversePixel and rlnMtfValue")
    found = np.interp(frequency * (step.mtf_pixel_size or pixel_size), place, value)
    if not (np.isfinite(found).all() and found.min() > _LEAST_MTF):
        raise TableError(f"the MTF falls to {found.min():.2g}", path=path, hint="values must be above 0")
    return torch.from_numpy(found)


def _by_shell(values: Tensor, shells: Tensor) -> Tensor:
    return values.float()[shells.clamp_max(len(values) - 1)]


def _amplitudes(spectrum: Tensor, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Logarithms of the mean amplitudes of shells."""
    mean = radial_average(spectrum.abs(), shape=shape).double().numpy()
    with np.errstate(divide="ignore"):
        return np.where(mean > 0, np.log(np.maximum(mean, 1e-300)), np.nan)
