"""Radiation damage as a filter: critical exposure and the weights of a movie's frames."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from halfmap.errors import ParameterError

_SCALE_BY_VOLTAGE = ((100.0, 0.64), (200.0, 0.8), (300.0, 1.0))
"""Critical exposure relative to that at 300 kV: 0.8 at 200 kV [1], and RELION's 0.8² at 100 kV."""

_OPTIMAL = 2.51284
"""Exposure of the best signal-to-noise ratio over the critical one: the root of x = 2 (exp(x / 2) - 1)."""


def critical_dose(frequency: Tensor, *, voltage_kV: float = 300.0) -> Tensor:
    """Exposure that brings the signal at a frequency down to exp(-1/2) of its amplitude.

    Parameters
    ----------
    frequency : Tensor, any shape
        Spatial frequency in 1/Å.
    voltage_kV : float
        100 to 300 kV.

    Returns
    -------
    Tensor, as `frequency`
        Critical exposure in e/Å², infinite at frequency 0.

    Raises
    ------
    ParameterError
        If the voltage is outside of what has been measured or agreed on.

    Notes
    -----
    N_c = 0.245 k^-1.665 + 2.81 at 300 kV, measured on rotavirus [1]_; 0.8 of it at 200 kV [1]_. At 100 kV
    RELION takes 0.64 of it and so does this; between the three voltages the factor is interpolated.

    References
    ----------
    .. [1] Grant T, Grigorieff N. Measuring the optimal exposure for single particle cryo-EM using a 2.6 Å
       reconstruction of rotavirus VP6. eLife 4, e06980 (2015). DOI 10.7554/eLife.06980

    Examples
    --------
    >>> round(critical_dose(torch.tensor(0.25)).item(), 3)
    5.274
    """
    return (0.245 * frequency.pow(-1.665) + 2.81) * _voltage_scale(voltage_kV)


def dose_weights(
    frequency: Tensor,
    *,
    dose_per_frame: float,
    n_frames: int,
    pre_exposure: float = 0.0,
    voltage_kV: float = 300.0,
    normalise: bool = True,
    cut_at_optimum: bool = False,
) -> Tensor:
    """Weight of every frame of a movie at given frequencies for the sum with the best signal-to-noise ratio.

    Parameters
    ----------
    frequency : Tensor, any shape
        Spatial frequency in 1/Å: a half-spectrum grid, part of one, or a radial axis.
    dose_per_frame, pre_exposure : float
        In e/Å²; the weight of a frame is that of the exposure at its end.
    n_frames : int
        Number of frames.
    voltage_kV : float
        100 to 300 kV; see `critical_dose`.
    normalise : bool
        Divide by the root of the sum of squared weights, so that the noise of the sum stays white.
    cut_at_optimum : bool
        Leave out frames whose exposure passes the optimal one, 2.51284 times the critical exposure; RELION
        does not.

    Returns
    -------
    Tensor (n_frames, *frequency.shape)
        Weights exp(-N / (2 N_c)). For one frame i after another, without the memory of all: `n_frames` 1,
        `pre_exposure` i * dose_per_frame, `normalise` off, and the squares summed by the caller.

    Raises
    ------
    ParameterError
        If a dose is negative, there are no frames, or the voltage is unknown.

    References
    ----------
    .. [1] Grant T, Grigorieff N. eLife 4, e06980 (2015). DOI 10.7554/eLife.06980

    Examples
    --------
    >>> weights = dose_weights(torch.tensor([0.0, 0.3]), dose_per_frame=1.0, n_frames=4)
    >>> weights.square().sum(0).allclose(torch.ones(2))
    True
    """
    if dose_per_frame < 0 or pre_exposure < 0 or n_frames < 1:
        raise ParameterError(
            f"{n_frames} frames of {dose_per_frame} e/Å² after {pre_exposure} e/Å² cannot be weighted",
            hint="doses must be 0 or more, and frames 1 or more",
        )
    frames = torch.arange(1, n_frames + 1, device=frequency.device, dtype=frequency.dtype)
    dose = (pre_exposure + dose_per_frame * frames).reshape(-1, *[1] * frequency.ndim)
    critical = critical_dose(frequency, voltage_kV=voltage_kV)
    weights = torch.exp(dose / (-2 * critical))
    if cut_at_optimum:
        weights = weights.where(dose <= _OPTIMAL * critical, 0.0)
    if normalise:
        weights = weights / weights.square().sum(0).sqrt().clamp_(min=torch.finfo(weights.dtype).tiny)
    return weights


def _voltage_scale(voltage_kV: float) -> float:
    for (low, at_low), (high, at_high) in pairwise(_SCALE_BY_VOLTAGE):
        if low <= voltage_kV <= high:
            return at_low + (at_high - at_low) * (voltage_kV - low) / (high - low)
    raise ParameterError(f"radiation damage at {voltage_kV} kV is not known", hint="known from 100 to 300 kV")
