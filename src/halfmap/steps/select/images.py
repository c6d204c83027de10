"""What single images look like: coarse detail within the particle and around it."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.io.atomic import atomic_path
from halfmap.io.images import ImageStack
from halfmap.ops import fourier, grids
from halfmap.ops.threads import one_torch_thread
from halfmap.steps.select.classification import Classification

if TYPE_CHECKING:
    from halfmap.engine import Context

_RINGS = (0.0, 0.2, 0.35, 0.5, 0.6, 0.75)
"""Bounds of rings about the centre over the diameter: the last is around the particle, without neighbours
farther away."""

_LEVEL = 2.5
_BANDS = {"coarse": (0.0, 1.6), "middle": (1.5, 4.0)}
"""Waves across the diameter of what means are taken of, at most, and of what deviations are."""

NAMES = tuple(f"{name}_{i + 1}" for name in ("level", *_BANDS) for i in range(len(_RINGS) - 1))
"""Mean of each ring, and logarithms of its variance in two bands."""

FOLDER = "Images"
_PART = 2000
_BATCH_BYTES = 2**25


@dataclass(frozen=True)
class Part:
    """Some of the particles."""

    name: str
    images: tuple[str, ...]


def measure(ctx: Context, found: Classification) -> NDArray[np.float64]:
    """Measure the images of all particles.

    Returns
    -------
    ndarray (n, 15)
        `NAMES`.

    Raises
    ------
    TableError, FileFormatError
        If images are missing.
    """
    names = found.particles.rows["rlnImageName"].to_list()
    ImageStack(names, root=ctx.project, table=found.particles.path)
    parts = [
        Part(f"part{i // _PART + 1:05d}", tuple(names[i : i + _PART])) for i in range(0, len(names), _PART)
    ]
    folder = ctx.folder / FOLDER
    folder.mkdir(exist_ok=True)
    diameter_px = found.diameter / found.pixel_size
    work = functools.partial(measure_part, project=ctx.project, diameter_px=diameter_px, folder=folder)
    done = ctx.map(work, parts, unit="part")
    measured = {Path(name).stem: np.load(folder / name) for name in done}
    missing = [np.full((len(part.images), len(NAMES)), np.nan) for part in parts]
    return np.concatenate([measured.get(part.name, gap) for part, gap in zip(parts, missing, strict=True)])


@one_torch_thread()
def measure_part(part: Part, *, project: Path, diameter_px: float, folder: Path) -> str:
    """Measure some images and write the numbers as a file."""
    stack = ImageStack(part.images, root=project)
    size = max(1, _BATCH_BYTES // (4 * stack.shape[0] * stack.shape[1]))
    rows = np.arange(len(part.images))
    batches = (rows[i : i + size] for i in range(0, len(rows), size))
    table = [measure_images(torch.from_numpy(stack.read(batch)).float(), diameter_px) for batch in batches]
    path = folder / f"{part.name}.npy"
    with atomic_path(path, durable=False) as temporary, temporary.open("wb") as file:
        np.save(file, torch.cat(table).double().numpy())
    return path.name


def measure_images(images: Tensor, diameter_px: float) -> Tensor:
    """Measure images (n, box, box) of particles of a diameter in pixels: (n, 15), `NAMES`."""
    shape = images.shape[-2:]
    radius = grids.radius(shape) / diameter_px
    waves = grids.frequency_radius(shape) * diameter_px
    spectrum = fourier.rfft2(images)
    rings = [(radius >= low) & (radius < high) for low, high in itertools.pairwise(_RINGS)]
    level = fourier.irfft2(spectrum * (waves < _LEVEL), shape=shape)
    columns = [_mean(level, ring) for ring in rings]
    for low, high in _BANDS.values():
        band = fourier.irfft2(spectrum * ((waves >= low) & (waves < high)), shape=shape)
        columns += [(_mean(band**2, ring) - _mean(band, ring) ** 2).clamp(min=1e-12).log() for ring in rings]
    return torch.stack(columns, dim=1)


def _mean(images: Tensor, ring: Tensor) -> Tensor:
    """Mean (n,) of images within a ring; NaN if the box has nothing there."""
    return images[:, ring].mean(1)
