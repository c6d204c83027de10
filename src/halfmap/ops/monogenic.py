"""The monogenic signal of volumes: how strong they are at each voxel, whatever their phase is there."""

from __future__ import annotations

import torch
from torch import Tensor

from halfmap.ops.fourier import irfft3
from halfmap.ops.grids import frequencies


def monogenic_power(spectrum: Tensor, *, box: int) -> Tensor:
    """Squared amplitude of the monogenic signal: a volume's square, and those of its Riesz transforms.

    Parameters
    ----------
    spectrum : Tensor (box, box, box // 2 + 1), complex
        Half-spectrum of a band of frequencies.
    box : int

    Returns
    -------
    Tensor (box, box, box)
        The square of the envelope of the waves, without the waves themselves.

    References
    ----------
    .. [1] Felsberg & Sommer 2001, IEEE Trans. Signal Process. 49, 3136-3144, DOI 10.1109/78.969520
    .. [2] Vilas et al. 2018, Structure 26, 337-344, DOI 10.1016/j.str.2017.12.018
    """
    shape = (box,) * 3
    k = frequencies(shape)
    length = k.square().sum(-1).sqrt().clamp_min(torch.finfo(k.dtype).tiny)
    power = irfft3(spectrum, shape=shape).square()
    for axis in range(3):
        power += irfft3(-1j * spectrum * (k[..., axis] / length), shape=shape).square()
    return power
