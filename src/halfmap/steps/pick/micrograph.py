"""Search one micrograph, and draw what was picked in it."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from halfmap.data import MicrographSet
from halfmap.data.versions import row_versions
from halfmap.engine.decisions import digest
from halfmap.io.coordinates import read_coordinates
from halfmap.io.micrographs import Image, MicrographItem, load
from halfmap.steps.pick.candidates import Candidates, read_searched, write_candidates
from halfmap.steps.pick.tables import CANDIDATES, FOLDER

PICTURES = "Micrographs"

_PICTURE_px = 900
"""Pixels of a picture's longer side, at the least."""


class Method(Protocol):
    """What finds particles in a micrograph."""

    @property
    def pixel_size(self) -> float:
        """Pixel size in Å that micrographs are searched at."""
        ...

    @property
    def diameter(self) -> float:
        """Of the particle in Å."""
        ...

    def specimen(self, image: Image) -> Image:
        """The micrograph without what is not to be searched."""
        ...

    def search(self, image: Image, rng: np.random.Generator) -> tuple[Candidates, NDArray[np.float32]]:
        """Candidates in pixels of the specimen, and scores where there is noise alone (may be none)."""
        ...


def versions(micrographs: MicrographSet, method: Method) -> dict[str, str]:
    """By what the candidates of each micrograph are known again: itself, and what searches it."""
    searching = digest(f"{name} {_content(value)}" for name, value in sorted(vars(method).items()))
    return {
        name: digest([row, searching]) for name, row in row_versions(micrographs, "rlnMicrographName").items()
    }


def _content(value: Any) -> str:
    if isinstance(value, np.ndarray):
        # A record of it has lost the type.
        return hashlib.blake2b(value.astype(np.float64).tobytes(), digest_size=12).hexdigest()
    return "" if isinstance(value, Path | str) else repr(value)


def search_micrograph(item: MicrographItem, *, method: Method, folder: Path, seed: int) -> dict[str, Any]:
    """Write a micrograph's candidates and return how many there are.

    Raises
    ------
    FileFormatError
        If the micrograph cannot be used.
    """
    image = method.specimen(load(item, method.pixel_size))
    # By the name, not the place in the list: a part of the data gives the same.
    rng = np.random.default_rng([seed, zlib.crc32(item.name.encode())])
    found, null = method.search(image, rng)
    found = found.scaled(*image.scale)
    width, height = (
        length * factor for length, factor in zip(image.values.shape[::-1], image.scale, strict=True)
    )
    found = replace(found, x=np.clip(found.x, 0, width - 1), y=np.clip(found.y, 0, height - 1))
    write_candidates(folder / CANDIDATES / f"{item.key}.npz", found, null, image.mask)
    return {"name": item.name, "key": item.key, "count": len(found), "ctf": item.optics is not None}


def draw_micrograph(item: MicrographItem, *, diameter: float, folder: Path) -> dict[str, Any]:
    """Draw the picks of a micrograph over its low frequencies."""
    from halfmap.steps.pick import pictures

    picks = read_coordinates(folder / FOLDER / f"{item.key}.star")
    found = folder / CANDIDATES / f"{item.key}.npz"
    searched = read_searched(found) if found.exists() else None
    pictures.draw_picks(folder / PICTURES / f"{item.key}.png", item, picks, diameter, searched)
    return {"key": item.key}
