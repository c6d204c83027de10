"""Examples for the network: crops of normalised images with soft discs where particles are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from halfmap.nets.picker import STRIDE
from halfmap.steps.pick.learned import PIXELS

CROP = 128
"""Side of the crops in pixels of the network's images."""

_CORE, _RIM = 0.1 * PIXELS, 0.25 * PIXELS
"""Distances from a centre up to which the target is 1, and from which on it is 0."""

DISC_AREA = np.pi / 3 * (_CORE**2 + _CORE * _RIM + _RIM**2)
"""Sum of a disc's target over the pixels of the image: the volume of a frustum."""


@dataclass(frozen=True, eq=False)
class Example:
    """A normalised image and what is known of it.

    Attributes
    ----------
    image : array (h, w), float32
        As `learned.normalised` gives it.
    centres : array (n, 2)
        (x, y) of particles in its pixels.
    ignored : array (m, 3)
        (x, y, radius) of discs in which nothing is learned.
    """

    image: NDArray[np.float32]
    centres: NDArray
    ignored: NDArray


def soft_discs(centres: NDArray, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Target on the network's output: 1 at centres, falling linearly to 0 a quarter of a diameter away.

    Parameters
    ----------
    centres : array (n, 2)
        (x, y) in pixels of the image.
    shape : tuple of 2 int
        Of the output, every `STRIDE`-th pixel of the image.
    """
    target = np.zeros(shape, np.float32)
    for distance, window in _around(centres, np.full(len(centres), _RIM), shape):
        value = np.clip((_RIM - distance) / (_RIM - _CORE), 0, 1)
        np.maximum(target[window], value, out=target[window])
    return target


def outside_discs(discs: NDArray, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Weight on the network's output: 0 inside discs (x, y, radius), 1 elsewhere."""
    weight = np.ones(shape, np.float32)
    for (distance, window), radius in zip(
        _around(discs[:, :2], discs[:, 2], shape), discs[:, 2], strict=True
    ):
        weight[window][distance < radius] = 0
    return weight


def _around(
    centres: NDArray, reach: NDArray, shape: tuple[int, int]
) -> Iterator[tuple[NDArray, tuple[slice, slice]]]:
    """Distances in pixels of the image from each centre, in a window of the output that holds its reach."""
    for (x, y), far in zip(centres, reach, strict=True):
        rows, columns = (
            slice(max(0, int(np.ceil((at - far) / STRIDE))), max(0, int((at + far) // STRIDE) + 1))
            for at in (y, x)
        )
        i = np.arange(rows.start, min(rows.stop, shape[0]))[:, None] * STRIDE - y
        j = np.arange(columns.start, min(columns.stop, shape[1])) * STRIDE - x
        yield np.hypot(i, j), (rows, columns)


def random_crops(example: Example, count: int, rng: Generator) -> Iterator[tuple[NDArray, NDArray, NDArray]]:
    """Crops (image, target, weight) at random places, turned and mirrored at random."""
    h, w = example.image.shape
    for _ in range(count):
        top, left = (int(rng.integers(0, max(1, n - CROP + 1))) for n in (h, w))
        image = example.image[top : top + CROP, left : left + CROP]
        below, right = CROP - image.shape[0], CROP - image.shape[1]
        image = np.pad(image, ((0, below), (0, right)))
        turn, mirror = int(rng.integers(4)), bool(rng.integers(2))
        image = np.rot90(image[:, ::-1] if mirror else image, turn)
        centres = _turned(example.centres - [left, top], turn, mirror)
        ignored = example.ignored.copy()
        ignored[:, :2] = _turned(ignored[:, :2] - [left, top], turn, mirror)
        shape = CROP // STRIDE, CROP // STRIDE
        near = _within(centres)
        yield (
            np.ascontiguousarray(image, np.float32),
            soft_discs(centres[near], shape),
            outside_discs(ignored, shape),
        )


def _within(centres: NDArray) -> NDArray[np.bool_]:
    return np.all((centres > -_RIM) & (centres < CROP + _RIM), axis=1)


def _turned(xy: NDArray, turn: int, mirror: bool) -> NDArray:
    """Where places of a crop are after mirroring it left to right and quarter turns as of `numpy.rot90`."""
    x, y = np.asarray(xy, float).T
    if mirror:
        x = CROP - 1 - x
    for _ in range(turn):
        x, y = y, CROP - 1 - x
    return np.stack([x, y], axis=-1)


def batches(
    examples: Iterable[Example], *, size: int, per_example: int, pool: int, rng: Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Gather crops of many examples in a pool, and draw batches of it.

    Parameters
    ----------
    examples : iterable of Example
        Endless, or as many as wanted.
    size : int
        Crops of a batch.
    per_example : int
        Crops taken of an example at a time.
    pool : int
        Crops to draw from; more mix the examples better.
    rng : Generator
        Decides all.

    Yields
    ------
    image : Tensor (size, 1, CROP, CROP)
    target, weight : Tensor (size, 1, CROP // 2, CROP // 2)
    """
    held: list[tuple[NDArray, NDArray, NDArray]] = []
    for example in examples:
        held.extend(random_crops(example, per_example, rng))
        while len(held) >= pool + size:
            chosen = [held.pop(int(rng.integers(len(held)))) for _ in range(size)]
            image, target, weight = (
                torch.from_numpy(np.stack(part))[:, None] for part in zip(*chosen, strict=True)
            )
            yield image, target, weight
