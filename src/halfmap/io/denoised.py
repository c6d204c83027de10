"""What is kept of denoised micrographs: powers of their halves before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from halfmap.io.atomic import atomic_path
from halfmap.ops.signal_bias import HalfPowers


def write_powers(path: Path, powers: HalfPowers, pixel_size: float) -> None:
    """Keep the powers of a micrograph, whole or not at all."""
    with atomic_path(path, durable=False) as temporary, temporary.open("wb") as file:
        sums = powers.sums.numpy().astype(np.float32)
        np.savez(file, sums=sums, counts=powers.counts.numpy(), pixel_size=pixel_size)


def read_powers(path: Path) -> tuple[HalfPowers, float]:
    """Powers of a micrograph, and the pixel size that they are of, Å."""
    with np.load(path, allow_pickle=False) as file:
        sums, counts = torch.from_numpy(file["sums"].astype(np.float64)), torch.from_numpy(file["counts"])
        return HalfPowers(sums, counts), float(file["pixel_size"])
