"""Networks that predict one noisy half of a micrograph from the other, and so take noise away."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from halfmap.errors import FileFormatError
from halfmap.nets.layout import channels_side_by_side
from halfmap.nets.weights import load_weights, save_weights

KIND = "denoiser"

_QUIET = 0.1
"""Length of the last convolution's kernels of a block when training begins: it then changes little."""


@dataclass(frozen=True)
class Shape:
    """How a network is laid out.

    Attributes
    ----------
    kind : str
        ``wide``: residual blocks that are wide where they are rectified, strided convolutions down and
        depth-to-space up, skips that are added, kernels parted into direction and length [1]_, [2]_.
        ``plain``: a U-Net [3]_: pairs of convolutions, twice the channels on each level down, the largest of
        four pixels down and the nearest one up, skips that are appended.
    levels : int
        Resolutions, each half of the one before.
    blocks : int
        On each level down and on each up; plain: convolutions.
    filters : int
        Channels; plain: of the finest level.
    expansion : int
        Channels that are rectified in a wide block, over those that go in.

    References
    ----------
    .. [1] Yu et al. 2018, arXiv 1808.08718
    .. [2] Salimans & Kingma 2016, arXiv 1602.07868
    .. [3] Ronneberger, Fischer & Brox 2015, DOI 10.1007/978-3-319-24574-4_28
    """

    kind: Literal["wide", "plain"] = "wide"
    levels: int = 3
    blocks: int = 4
    filters: int = 32
    expansion: int = 4

    @property
    def multiple(self) -> int:
        """Both sides of an image are multiples of it."""
        return 2 ** (self.levels - 1)

    @property
    def reach(self) -> int:
        """Pixels around a pixel that may have a part in its result, a multiple of `multiple`."""
        each = 2 * self.blocks if self.kind == "wide" else self.blocks
        # On the way down and on the way up, but once on the coarsest level.
        inside = sum(2 * each * 2**level for level in range(self.levels - 1)) + each * self.multiple
        between = sum(4 * 2**level for level in range(self.levels - 1))
        enters_and_leaves = 2
        return math.ceil((inside + between + enters_and_leaves) / self.multiple) * self.multiple


FULL = Shape()
"""As published."""

SMALL = Shape(blocks=2, filters=16, expansion=2)
"""For processors, which are quickest with multiples of 16 channels: a thirteenth of the weights."""


class Denoiser(nn.Module):
    """The mean that an image's other half would have on average, given one half.

    Trained to predict one noisy half from the other, a network can but learn what both have in common [1]_.

    Parameters
    ----------
    shape : Shape
        Its layout.

    References
    ----------
    .. [1] Lehtinen et al. 2018, ICML 35, arXiv 1803.04189
    .. [2] Palovcak et al. 2020, IUCrJ 7, 1142-1150, DOI 10.1107/S2052252520013184
    """

    def __init__(self, shape: Shape = FULL) -> None:
        super().__init__()
        self.shape = shape
        self.body = _WideLevel(shape, shape.levels) if shape.kind == "wide" else _PlainLevel(shape, 0)
        first = shape.filters
        self.enter = _conv(1, first, shape)
        self.leave = _conv(first, 1, shape)
        channels_side_by_side(self)

    def forward(self, image: Tensor) -> Tensor:
        """Denoise images (n, 1, h, w), h and w multiples of `Shape.multiple`."""
        image = image.to(memory_format=torch.channels_last)
        return self.leave(self.body(self.enter(image)))


class _WideLevel(nn.Module):
    """Blocks, what the coarser levels add, and blocks again; blocks alone on the coarsest level."""

    def __init__(self, shape: Shape, levels: int) -> None:
        super().__init__()
        f = shape.filters
        self.down = nn.Sequential(*(_WideBlock(shape) for _ in range(shape.blocks)))
        self.coarser = self.up = None
        if levels > 1:
            self.coarser = nn.Sequential(
                weight_norm(nn.Conv2d(f, f, 3, stride=2, padding=1)),
                _WideLevel(shape, levels - 1),
                weight_norm(nn.Conv2d(f, 4 * f, 3, padding=1)),
                nn.PixelShuffle(2),
            )
            self.up = nn.Sequential(*(_WideBlock(shape) for _ in range(shape.blocks)))

    def forward(self, features: Tensor) -> Tensor:
        features = self.down(features)
        if self.coarser is None or self.up is None:
            return features
        return self.up(features + self.coarser(features))


class _WideBlock(nn.Module):
    """Many channels between two convolutions, whose result is added to what goes in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        f = shape.filters
        self.first = weight_norm(nn.Conv2d(f, shape.expansion * f, 3, padding=1))
        self.second = weight_norm(nn.Conv2d(shape.expansion * f, f, 3, padding=1))
        with torch.no_grad():
            self.second.parametrizations.weight.original0.mul_(_QUIET)  # type: ignore[union-attr]

    def forward(self, features: Tensor) -> Tensor:
        return features + self.second(torch.relu(self.first(features)))


class _PlainLevel(nn.Module):
    """Convolutions, the coarser levels' result appended, and convolutions again."""

    def __init__(self, shape: Shape, level: int) -> None:
        super().__init__()
        before, f = shape.filters * 2 ** max(level - 1, 0), shape.filters * 2**level
        self.down = _rectified(before, f, shape.blocks)
        self.coarser = self.up = None
        if level < shape.levels - 1:
            self.coarser = nn.Sequential(
                nn.MaxPool2d(2), _PlainLevel(shape, level + 1), nn.Upsample(scale_factor=2, mode="nearest")
            )
            self.up = _rectified(3 * f, f, shape.blocks)

    def forward(self, features: Tensor) -> Tensor:
        features = self.down(features)
        if self.coarser is None or self.up is None:
            return features
        return self.up(torch.cat([features, self.coarser(features)], dim=1))


def _rectified(before: int, after: int, count: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number in range(count):
        layers += [nn.Conv2d(before if number == 0 else after, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def _conv(before: int, after: int, shape: Shape) -> nn.Module:
    layer = nn.Conv2d(before, after, 3, padding=1)
    return weight_norm(layer) if shape.kind == "wide" else layer


def denoise(network: Denoiser, image: Tensor, *, tile: int = 768, half: bool = False) -> Tensor:
    """Denoise an image of any size, in tiles that overlap by what the network sees.

    Parameters
    ----------
    network : Denoiser
        On the device that is to compute, in evaluation mode.
    image : Tensor (h, w)
        Normalised image on any device; beyond its borders it is taken to go on as in a mirror.
    tile : int
        Side of the tiles in pixels at the most, which bounds the memory.
    half : bool
        Compute convolutions in bfloat16.

    Returns
    -------
    Tensor (h, w)
        On the CPU, the same whatever the tiles up to rounding: there are no seams.
    """
    device = next(network.parameters()).device
    reach, multiple = network.shape.reach, network.shape.multiple
    h, w = image.shape
    below, right = -h % multiple, -w % multiple
    # Of equal size, as borders are computed twice.
    tile = math.ceil(max(h, w) / math.ceil(max(h, w) / tile) / multiple) * multiple
    whole = _mirrored(image, reach, below, right)
    result = torch.empty(h + below, w + right)
    for top in range(0, h + below, tile):
        for left in range(0, w + right, tile):
            height, width = min(tile, h + below - top), min(tile, w + right - left)
            part = whole[top : top + height + 2 * reach, left : left + width + 2 * reach]
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
                found = network(part[None, None].to(device))[0, 0]
            inner = found[reach : reach + height, reach : reach + width]
            result[top : top + height, left : left + width] = inner.float().cpu()
    return result[:h, :w]


def _mirrored(image: Tensor, reach: int, below: int, right: int) -> Tensor:
    """An image with a border on all sides, as often mirrored as the border is wider than the image."""
    rows, columns = (
        _mirror(torch.arange(-reach, length + more + reach, device=image.device), length)
        for length, more in zip(image.shape, (below, right), strict=True)
    )
    return image[rows][:, columns]


def _mirror(places: Tensor, length: int) -> Tensor:
    period = max(2 * (length - 1), 1)
    places = places.remainder(period)
    return torch.minimum(places, period - places).clamp(max=length - 1)


def save_denoiser(path: str | Path, network: Denoiser, record: dict[str, Any]) -> None:
    """Write a network's weights, and beside them its layout and how they were made."""
    save_weights(path, network, {"kind": KIND, "shape": asdict(network.shape), **record})


def load_denoiser(path: str | Path) -> tuple[Denoiser, dict[str, Any]]:
    """Read a network, in evaluation mode, and its record.

    Raises
    ------
    FileFormatError
        If the file, or its record, holds no denoiser.
    """
    from halfmap.nets.weights import read_record

    plain = read_record(path).get("shape")
    try:
        shape = Shape(**plain)  # pyright: ignore[reportCallIssue]
    except TypeError as error:
        raise FileFormatError(
            "its record says nothing of a denoiser's layout", path=path, hint="give a model of denoise train"
        ) from error
    network = Denoiser(shape)
    record = load_weights(path, network, kind=KIND)
    return network.eval(), record
