"""A network that tells what a noisy map is of, and how sure it is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfmap.errors import FileFormatError
from halfmap.nets.weights import load_weights, read_record, save_weights

KIND = "map prior"

_INPUTS, _OUTPUTS = 2, 2
_LEAST, _MOST = -4.0, 1.5
"""Range of the logarithm of standard deviations."""


@dataclass(frozen=True)
class Shape:
    """How a network is laid out.

    Attributes
    ----------
    filters : int
        Channels at half of the map's sampling, where the finest convolutions are; twice as many on each
        level down.
    levels : int
        Samplings, each half of the one before.
    blocks : int
        Residual blocks on each level down, and on each up.
    """

    filters: int = 16
    levels: int = 3
    blocks: int = 1

    @property
    def multiple(self) -> int:
        """Sides of maps are multiples of it."""
        return 2**self.levels


SMALL, FULL = Shape(), Shape(filters=32, levels=4, blocks=2)
"""For two cores, and for a GPU."""


class MapPrior(nn.Module):
    """Mean and standard deviation of a map's signal, voxel by voxel, given the map with its noise.

    A U-net with residual blocks [1]_. Voxels go in and come out in cubes of two as channels, so that no
    convolution works at the map's full sampling. The mean is what goes in and a correction.

    References
    ----------
    .. [1] Ronneberger, Fischer & Brox 2015, DOI 10.1007/978-3-319-24574-4_28
    """

    def __init__(self, shape: Shape = SMALL) -> None:
        super().__init__()
        self.shape = shape
        f = shape.filters
        self.enter = nn.Conv3d(8 * _INPUTS, f, 3, padding=1)
        self.body = _Level(f, shape.levels - 1, shape.blocks)
        self.leave = nn.Conv3d(f, 8 * _OUTPUTS, 3, padding=1)
        with torch.no_grad():
            for each in self.leave.parameters():
                each.zero_()

    def forward(self, maps: Tensor) -> Tensor:
        """Means and logarithms of standard deviations.

        Parameters
        ----------
        maps : Tensor (n, 2, d, h, w)
            As `search.regularise.learned` makes them of a map; sides are multiples of `Shape.multiple`.

        Returns
        -------
        Tensor (n, 2, d, h, w)
        """
        found = _voxels(self.leave(self.body(self.enter(_cubes(maps)))))
        return torch.cat([maps[:, :1] + found[:, :1], found[:, 1:].clamp(_LEAST, _MOST)], dim=1)


class _Level(nn.Module):
    """Blocks, what the coarser levels add, and blocks again; blocks alone on the coarsest level."""

    def __init__(self, filters: int, below: int, blocks: int) -> None:
        super().__init__()
        self.down = nn.Sequential(*(_Block(filters) for _ in range(blocks)))
        self.coarser = self.up = None
        if below:
            self.coarser = nn.Sequential(
                nn.Conv3d(filters, 2 * filters, 2, stride=2),
                _Level(2 * filters, below - 1, blocks),
                nn.ConvTranspose3d(2 * filters, filters, 2, stride=2),
            )
            self.up = nn.Sequential(*(_Block(filters) for _ in range(blocks)))

    def forward(self, features: Tensor) -> Tensor:
        features = self.down(features)
        if self.coarser is None or self.up is None:
            return features
        return self.up(features + self.coarser(features))


class _Block(nn.Module):
    """Two convolutions, whose result is added to what goes in."""

    def __init__(self, filters: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(filters, filters, 3, padding=1)
        self.second = nn.Conv3d(filters, filters, 3, padding=1)
        with torch.no_grad():
            self.second.weight.mul_(0.1)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.second(torch.relu(self.first(torch.relu(features))))


def _cubes(maps: Tensor) -> Tensor:
    """Cubes of two voxels as channels (n, 8 c, d / 2, h / 2, w / 2)."""
    n, c, d, h, w = maps.shape
    parted = maps.reshape(n, c, d // 2, 2, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return parted.reshape(n, 8 * c, d // 2, h // 2, w // 2)


def _voxels(cubes: Tensor) -> Tensor:
    """The reverse of `_cubes`."""
    n, c, d, h, w = cubes.shape
    parted = cubes.reshape(n, c // 8, 2, 2, 2, d, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return parted.reshape(n, c // 8, 2 * d, 2 * h, 2 * w)


def loss(found: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Squared error of the mean, and unlikelihood of that error under the standard deviation.

    Parameters
    ----------
    found : Tensor (n, 2, d, h, w)
        Of the network.
    truth, weight : Tensor (n, 1, d, h, w)
        What it should be, and how much each voxel counts.

    Notes
    -----
    The mean is taught by its error alone: under both, voxels that are hard would be given up as unsure.
    """
    mean, spread = found[:, :1], found[:, 1:]
    squared = (mean - truth).square()
    unlikely = 0.5 * squared.detach() * torch.exp(-2 * spread) + spread
    return ((squared + unlikely) * weight).sum() / weight.sum().clamp_min(1)


def save_map_prior(path: str | Path, network: MapPrior, record: dict[str, Any]) -> None:
    """Write a network's weights, and beside them its layout and how they were made."""
    save_weights(path, network, {"kind": KIND, "shape": asdict(network.shape), **record})


def load_map_prior(path: str | Path) -> tuple[MapPrior, dict[str, Any]]:
    """Read a network, in evaluation mode, and its record.

    Raises
    ------
    FileFormatError
        If the file, or its record, holds none.
    """
    hint = "give weights of benchmarks/train_prior.py"
    plain = read_record(path)
    error = plain.get("error", {})
    try:
        network = MapPrior(Shape(**plain["shape"]))
        rows = [[float(each) for each in error[name]] for name in ("correlation", "share", "power")]
        known = len(rows[0]) >= 2 and len(set(map(len, rows))) == 1
        known = known and all(0 < each < math.inf for row in rows[1:] for each in row)
    except (KeyError, TypeError, ValueError) as problem:
        raise FileFormatError("its record says nothing of a map prior", path=path, hint=hint) from problem
    if not known:
        raise FileFormatError("its record does not say how far it errs", path=path, hint=hint)
    return network.eval(), load_weights(path, network, kind=KIND)
