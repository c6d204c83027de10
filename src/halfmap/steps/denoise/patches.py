"""Patches of halves that networks are trained on: drawn anew for each batch, the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.io.atomic import atomic_path
from halfmap.steps.denoise.halves import Halves


def keep(path: Path, halves: Halves) -> None:
    """Write normalised halves for the training, in half precision, whole or not at all."""
    with atomic_path(path, durable=False) as temporary, temporary.open("wb") as file:
        np.save(file, halves.values.numpy().astype(np.float16))


def kept(path: Path) -> NDArray[np.float16]:
    """Halves (2, h, w) that `keep` wrote; what is not looked at stays on the disk."""
    return np.load(path, mmap_mode="r")


def endless(
    images: Sequence[NDArray], *, patch: int, batch: int, seed: int
) -> Callable[[int], Iterator[tuple[Tensor, ...]]]:
    """Batches of patches, from any of them on.

    Parameters
    ----------
    images : sequence of array (2, h, w)
        Halves of each micrograph.
    patch, batch : int
        Side of the patches in pixels, and how many a batch holds.
    seed : int
        By it and its number a batch is drawn.

    Returns
    -------
    callable
        Given how many are done, yields ``(one, other)``, each (batch, 1, patch, patch): places, which half is
        which, and turns and mirror images are drawn at random.
    """

    def batches(done: int) -> Iterator[tuple[Tensor, ...]]:
        number = done
        while True:
            yield drawn(images, patch=patch, batch=batch, rng=np.random.default_rng([seed, number]))
            number += 1

    return batches


def drawn(
    images: Sequence[NDArray], *, patch: int, batch: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """One batch of patches and of their other halves."""
    pairs = np.empty((batch, 2, patch, patch), np.float32)
    area = np.array([(image.shape[1] - patch + 1) * (image.shape[2] - patch + 1) for image in images], float)
    for pair, number in zip(pairs, rng.choice(len(images), batch, p=area / area.sum()), strict=True):
        image = images[number]
        y, x = (int(rng.integers(length - patch + 1)) for length in image.shape[1:])
        cut = image[:, y : y + patch, x : x + patch]
        cut = np.rot90(cut if rng.random() < 0.5 else cut[:, :, ::-1], int(rng.integers(4)), (1, 2))
        pair[:] = cut if rng.random() < 0.5 else cut[::-1]
    one, other = torch.from_numpy(pairs).unbind(1)
    return one[:, None], other[:, None]
