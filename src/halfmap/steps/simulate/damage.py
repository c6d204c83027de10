"""Radiation damage: what an exposure leaves of the signal."""

from __future__ import annotations

import torch
from torch import Tensor

from halfmap.ops.dose import critical_dose


def attenuation(frequency: Tensor, *, start: float, end: float, voltage_kV: float) -> Tensor:
    """Mean of exp(-e / (2 N_c)) over the exposures e from `start` to `end`, at frequencies in 1/Å.

    Amplitudes of the molecules' image, as Grant and Grigorieff measured them; the image recorded during an
    exposure is the average of what was left at every moment of it.

    References
    ----------
    .. [1] Grant & Grigorieff 2015, eLife 4, e06980, DOI 10.7554/eLife.06980
    """
    rate = 1 / (2 * critical_dose(frequency, voltage_kV=voltage_kV))
    spent = (rate * (end - start)).clamp(min=1e-9)
    return torch.exp(-rate * start) * (-torch.expm1(-spent) / spent)
