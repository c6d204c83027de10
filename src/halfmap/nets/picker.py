"""A small fully convolutional network that tells where particles have their centres."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from halfmap.nets.layout import channels_side_by_side

STRIDE = 2
"""Pixels of the image per pixel of the scores, whose pixel i lies on the image's pixel 2 i."""

REACH = 96
"""Pixels of the image around a score that may have a part in it, rounded up to a multiple of `DEPTH`."""

DEPTH = 8
"""Pixels of the image per pixel of the coarsest features: both sides of an image are multiples of it."""


class Picker(nn.Module):
    """Log-odds of a particle's centre at every second pixel.

    Features at a half, a quarter and an eighth of the resolution, each from two residual blocks, the coarse
    ones brought back and added to the finer ones: a U-Net [1]_ with sums instead of concatenations.

    Parameters
    ----------
    widths : tuple of 3 int
        Channels at the three resolutions.

    References
    ----------
    .. [1] Ronneberger, Fischer & Brox 2015, DOI 10.1007/978-3-319-24574-4_28
    """

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 48)) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.widths = widths
        self.enter = nn.Sequential(_conv(1, fine, size=5, stride=2), nn.ReLU())
        self.fine = nn.Sequential(_Residual(fine), _Residual(fine))
        self.to_middle = nn.Sequential(_conv(fine, middle, stride=2), nn.ReLU())
        self.middle = nn.Sequential(_Residual(middle), _Residual(middle))
        self.to_coarse = nn.Sequential(_conv(middle, coarse, stride=2), nn.ReLU())
        self.coarse = nn.Sequential(_Residual(coarse), _Residual(coarse))
        self.from_coarse = _conv(coarse, middle, size=1)
        self.joined_middle = _Residual(middle)
        self.from_middle = _conv(middle, fine, size=1)
        self.joined_fine = _Residual(fine)
        self.leave = nn.Conv2d(fine, 1, 1)
        self.temperature: Tensor
        self.offset: Tensor
        self.register_buffer("temperature", torch.ones(1))
        self.register_buffer("offset", torch.zeros(1))
        channels_side_by_side(self)

    def forward(self, image: Tensor) -> Tensor:
        """Scores of images.

        Parameters
        ----------
        image : Tensor (n, 1, h, w)
            Normalised images, h and w multiples of `DEPTH`.

        Returns
        -------
        Tensor (n, 1, h // 2, w // 2)
            Log-odds, calibrated by `temperature` and `offset`.
        """
        fine = self.fine(self.enter(image.to(memory_format=torch.channels_last)))
        middle = self.middle(self.to_middle(fine))
        coarse = self.coarse(self.to_coarse(middle))
        middle = self.joined_middle(middle + _doubled(self.from_coarse(coarse)))
        fine = self.joined_fine(fine + _doubled(self.from_middle(middle)))
        return self.leave(fine) / self.temperature + self.offset


class _Residual(nn.Module):
    """Two convolutions, whose result is added to what goes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _conv(width, width), _conv(width, width)

    def forward(self, features: Tensor) -> Tensor:
        change = self.second(torch.relu(self.first(features)))
        return torch.relu(features + change)


def _conv(before: int, after: int, *, size: int = 3, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(before, after, size, stride=stride, padding=size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(after))


def _doubled(features: Tensor) -> Tensor:
    return nn.functional.interpolate(features, scale_factor=2, mode="nearest")


def score_image(network: Picker, image: Tensor, *, tile: int = 1024) -> Tensor:
    """Scores of an image of any size, in tiles that overlap by what the network sees.

    Parameters
    ----------
    network : Picker
        On the device that is to compute, in evaluation mode.
    image : Tensor (h, w)
        Normalised image on any device.
    tile : int
        Side of the tiles in pixels, a multiple of `DEPTH`: bounds the memory.

    Returns
    -------
    Tensor (ceil(h / 2), ceil(w / 2))
        Log-odds on the CPU, the same whatever the tiles up to rounding.
    """
    device = next(network.parameters()).device
    h, w = image.shape
    result = torch.empty((h + 1) // STRIDE, (w + 1) // STRIDE)
    for top in range(0, h, tile):
        for left in range(0, w, tile):
            y0, x0 = max(0, top - REACH), max(0, left - REACH)
            part = image[y0 : top + tile + REACH, x0 : left + tile + REACH]
            below, right = -part.shape[0] % DEPTH, -part.shape[1] % DEPTH
            padded = nn.functional.pad(part[None, None], (0, right, 0, below))
            with torch.inference_mode():
                score = network(padded.to(device))[0, 0].cpu()
            score = score[(top - y0) // STRIDE :, (left - x0) // STRIDE :]
            place = result[top // STRIDE : (top + tile) // STRIDE, left // STRIDE : (left + tile) // STRIDE]
            place.copy_(score[: place.shape[0], : place.shape[1]])
    return result
