"""How weights lie in memory."""

from __future__ import annotations

import torch
from torch import nn


def channels_side_by_side(network: nn.Module) -> None:
    """Lay kernels out so that a pixel's channels are neighbours: convolutions take down to half the time.

    Images are to be laid out likewise (``torch.channels_last``); results are the same up to rounding.
    """
    for weight in network.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
