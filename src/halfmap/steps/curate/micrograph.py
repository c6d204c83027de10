"""Segment one micrograph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from halfmap.errors import FileFormatError
from halfmap.io.images import checked_micrograph, read_image
from halfmap.io.mrc import write_mrc
from halfmap.steps.curate.features import reduce_image
from halfmap.steps.curate.objects import DIAMETER_A
from halfmap.steps.curate.segment import Segmentation, segment

if TYPE_CHECKING:
    from halfmap.steps.curate.step import CurateStep

FOLDER = "Micrographs"
_HOT = 12.0
_SMALLEST_A = 600.0
"""Side of a micrograph in which the rest of the field is not to be told from an obstacle."""


@dataclass(frozen=True)
class MicrographItem:
    """A micrograph of the table; plain data for a worker."""

    name: str
    key: str
    path: Path
    pixel_size: float


def segment_micrograph(item: MicrographItem, *, step: CurateStep, folder: Path) -> dict[str, Any]:
    """Write a micrograph's mask and thumbnail, and return what the table needs.

    Raises
    ------
    FileFormatError
        If the micrograph cannot be read, is blank, is not finite or is too small.
    """
    from halfmap.steps.curate import pictures

    raw = read_image(item.path)
    image = checked(raw, item)
    features = reduce_image(image, item.pixel_size)
    found = segment(features, diameter=step.diameter or DIAMETER_A)
    # As the job's folder has them: the project may move before the job is resumed.
    files = {"mask": f"{FOLDER}/{item.key}_mask.mrc", "picture": f"{FOLDER}/{item.key}.png"}
    usable = stretched(~found.mask, image.shape, features.block)
    write_mrc(folder / files["mask"], usable.astype(np.int8), pixel_size=features.pixel_size)
    pictures.draw_thumbnail(folder / files["picture"], features, found)
    return {
        "name": item.name,
        **files,
        "hmMicrographMaskedFraction": float(found.mask.mean()),
        "hmMaskedBy": in_words(found),
        "hmCoarseContrast": found.coarse_contrast,
        **statistics(image, found.mask, features.block),
    }


def checked(raw: NDArray, item: MicrographItem) -> NDArray[np.float32]:
    """Give a micrograph as float32 without hot pixels, or say why it cannot be used.

    Raises
    ------
    FileFormatError
        If it is too small, and as `halfmap.io.images.checked_micrograph`.
    """
    if min(raw.shape) * item.pixel_size < _SMALLEST_A or min(raw.shape) < 32:
        height, width = (n * item.pixel_size for n in raw.shape)
        message = f"is too small to be judged: {width:.0f} x {height:.0f} Å"
        raise FileFormatError(message, path=item.name, hint="is the pixel size right?")
    image, median, deviation = checked_micrograph(raw, item.name)
    # Dark parts of the field may be far from its level; single pixels above it are hot.
    return np.minimum(image, median + _HOT * deviation)


def statistics(image: NDArray[np.float32], mask: NDArray[np.bool_], block: int) -> dict[str, float]:
    """Mean and standard deviation of the specimen's pixels, from a sixteenth of them."""
    rows, columns = (np.arange(0, n, 4) for n in image.shape)
    sample = image[::4, ::4]
    if not mask.all():
        sample = sample[~mask[np.ix_(rows // block, columns // block)]]
    mean, std = sample.mean(dtype=np.float64), sample.std(dtype=np.float64)
    return {"hmMicrographMean": float(mean), "hmMicrographStd": float(std)}


def stretched(usable: NDArray[np.bool_], shape: tuple[int, ...], block: int) -> NDArray[np.bool_]:
    """Mask whose pixels divide the micrograph's sides evenly, from one in blocks, the last ones cut off."""
    places = []
    for n in shape:
        m = max(1, round(n / block))
        places.append(np.minimum((np.arange(m) + 0.5) * (n / m) // block, -(-n // block) - 1).astype(int))
    return usable[np.ix_(*places)]


def in_words(found: Segmentation) -> str:
    """What is masked, the largest first."""
    shares = {name: 100 * float(part.mean()) for name, part in found.parts.items() if part.any()}
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.2g} %" for name, share in ordered) or "nothing"
