"""How sure a resolution is: how the correlation of masked noise scatters, and the interval that leaves."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops.fourier import rfft3
from halfmap.ops.fsc import resolution, shell_correlation
from halfmap.ops.grids import ring_sums

_SURE = 0.9999
"""Correlation that is believed at most: Fisher's z of one has no end."""

_FEWEST = 4.0
"""Independent coefficients of a shell at least: Fisher's z has the variance 1 / (n - 3)."""

_FIRST_SHELL = 3
"""From which on the scatter is measured: those before hold hardly any coefficients."""

_LAGS = 8


class Scatter(NamedTuple):
    """How the correlation of two masked volumes of noise scatters.

    Attributes
    ----------
    deviation : Tensor (shells,), float64
        Standard deviation of Fisher's z of each shell.
    neighbours : Tensor (lags,), float64
        Correlation of z between shells 0, 1, 2, … apart.
    share : float
        Independent coefficients over all that there are.
    """

    deviation: Tensor
    neighbours: Tensor
    share: float


class Interval(NamedTuple):
    """Resolutions in Å between which the true one lies, the finer first."""

    fine: float
    coarse: float


def noise_scatter(mask: Tensor, *, volumes: int = 6, generator: torch.Generator | None = None) -> Scatter:
    """Measure how far the correlation of noise within a mask is from zero, and how far neighbours share that.

    Volumes of white noise are masked, and each correlated with each other. A mask makes neighbouring
    coefficients alike, so that a shell holds fewer that are independent than it has; one share holds for all
    shells, as the mask's transform is the same about each coefficient.

    Parameters
    ----------
    mask : Tensor (d, h, w)
        0 to 1.
    volumes : int
        Of noise, at least 2.
    generator : torch.Generator, optional
        Of the noise, on the mask's device.

    Returns
    -------
    Scatter

    Raises
    ------
    ParameterError
        If the mask is empty, or there are fewer than two volumes.
    """
    if volumes < 2 or not bool(mask.any()):
        raise ParameterError("nothing can be correlated within an empty mask, or of one volume alone")
    shape = mask.shape
    spectra = [
        rfft3(torch.randn(shape, generator=generator, device=mask.device, dtype=mask.dtype) * mask)
        for _ in range(volumes)
    ]
    curves = [shell_correlation(a, b, shape=shape) for a, b in itertools.combinations(spectra, 2)]
    z = torch.stack(curves).double().cpu().clamp(-_SURE, _SURE).atanh()
    # Each pair of Friedel mates is two real numbers, so that all coefficients of the full spectrum count.
    counts = ring_sums(torch.ones(spectra[0].shape, device=mask.device), shape=shape).cpu()
    unit = (z * counts.sqrt())[:, _FIRST_SHELL:]
    scatter = float(unit.square().mean())
    share = min(1.0, 1 / scatter)
    lags = range(min(_LAGS, unit.shape[1]))
    near = torch.tensor([float((unit[:, lag:] * unit[:, : unit.shape[1] - lag]).mean()) for lag in lags])
    deviation = (counts * share - 3).clamp_min(_FEWEST - 3).rsqrt()
    return Scatter(deviation, (near / scatter).double(), share)


def resolution_interval(
    curve: Tensor,
    scatter: Scatter,
    *,
    pixel_size: float,
    box: int,
    threshold: float = 0.143,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 1,
) -> Interval:
    """Interval of the resolution at which the correlation of two maps truly falls below a threshold.

    Fisher's z of the curve is smoothed as far as it takes for it to fall from shell to shell. Noise of z, as
    it is within the mask, is added many times, and each smoothed alike; the interval holds the middle of the
    resolutions that these have.

    Parameters
    ----------
    curve : Tensor (shells,)
        Correlation of the shells from 0.
    scatter : Scatter
        From `noise_scatter`.
    pixel_size, box : float, int
        Å and pixels, as of `fsc.resolution`.
    threshold : float
    level : float
        Probability of the interval.
    draws : int
    seed : int

    Returns
    -------
    Interval

    Raises
    ------
    ShapeError
        If curve and scatter have not as many shells.

    References
    ----------
    .. [1] Penczek 2010, Methods Enzymol. 482, 73-100, DOI 10.1016/S0076-6879(10)82003-8
    .. [2] Efron 1981, Can. J. Stat. 9, 139-172, DOI 10.2307/3314608
    """
    if len(curve) != len(scatter.deviation):
        raise ShapeError(f"{len(curve)} shells of the curve, {len(scatter.deviation)} of its scatter")
    deviation = scatter.deviation.numpy()[1:]
    z = np.arctanh(curve.double().cpu().nan_to_num(0.0).clamp(-_SURE, _SURE).numpy()[1:])
    smooth = _falling(z, deviation)
    noise = np.random.default_rng(seed).standard_normal((draws, len(z))) @ _root(scatter, len(z)).T

    most = len(z)

    def shell(values: NDArray[np.float64]) -> float:
        values = np.concatenate([[1.0], np.tanh(_falling(values, deviation))])
        found = resolution(torch.from_numpy(values), pixel_size=1.0, box=box, threshold=threshold)
        return min(max(box / found, 1.0), most)

    first, last = np.quantile(
        [shell(smooth + each * deviation) for each in noise], (0.5 - level / 2, 0.5 + level / 2)
    )
    # A curve that rises again is smoothed across its fall: what is read off it belongs to the interval too.
    read = resolution(curve, pixel_size=pixel_size, box=box, threshold=threshold)
    read = min(max(read, box * pixel_size / most), box * pixel_size)
    fine, coarse = float(box * pixel_size / last), float(box * pixel_size / first)
    return Interval(min(fine, read), max(coarse, read))


def _falling(z: NDArray[np.float64], deviation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nearest values that nowhere rise."""
    return isotonic_regression(z, weights=1 / deviation**2, increasing=False).x


def _root(scatter: Scatter, n: int) -> NDArray[np.float64]:
    """Square root (n, n) of the correlation of z between shells."""
    lags = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    near = scatter.neighbours.numpy()
    matrix = np.where(lags < len(near), near[np.minimum(lags, len(near) - 1)], 0.0)
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values.clip(0))
