"""A finished classification as it is read: its averages, their spectra, and the particles in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from halfmap.data import ParticleSet
from halfmap.errors import FileFormatError, TableError
from halfmap.io.mrc import read_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_particles

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.select.step import SelectStep

_DATA = {"model.star": "particles.star", "_model.star": "_data.star"}
"""Ends of the names of a model and of the particles beside it: ours, and RELION's."""

_ALIKE = 0.5
"""Part of the particles that may be in other classes than the model says, as it counts them by halves."""

_NOTHING = 1e-3
"""Power outside of the mask of averages over the greatest inside."""


@dataclass(frozen=True, eq=False)
class Classification:
    """Class averages and their particles.

    Attributes
    ----------
    path : path
        The model.
    blocks : dict
        All tables of the model.
    particles : ParticleSet
        All particles.
    number : array (n,)
        Class of each from 0; -1 for none.
    averages : array (k, box, box)
    pixel_size : float
        Of the averages, Å.
    ratio : array (k, rings) or None
        Signal-to-noise ratio of each average by ring, if the model tells.
    """

    path: Path
    blocks: dict[str, Any]
    particles: ParticleSet
    number: NDArray[np.int64]
    averages: NDArray[np.float32]
    pixel_size: float
    ratio: NDArray[np.float64] | None

    @property
    def of_maps(self) -> bool:
        """Whether the classes are maps, of which projections stand for averages."""
        general = self.blocks.get("model_general")
        return isinstance(general, dict) and int(general.get("rlnReferenceDimensionality", 2)) == 3

    @property
    def classes(self) -> pl.DataFrame:
        """Rows of the classes in the model."""
        return self.blocks["model_classes"]

    @property
    def members(self) -> NDArray[np.int64]:
        """Particles (k,) in each class."""
        return np.bincount(self.number[self.number >= 0], minlength=len(self.averages))

    @property
    def diameter(self) -> float:
        """Diameter in Å of the circle that the averages are kept in."""
        general = self.blocks.get("model_general", {})
        if "rlnParticleDiameter" in general:
            return float(general["rlnParticleDiameter"])
        return self.pixel_size * _mask_diameter(self.averages)

    @property
    def resolutions(self) -> NDArray[np.float64]:
        """Resolution (k,) of each average in Å; NaN where there is none."""
        if "rlnEstimatedResolution" not in self.classes.columns:
            return np.full(len(self.averages), np.nan)
        values = self.classes["rlnEstimatedResolution"].to_numpy().astype(float)
        return np.where((self.members > 0) & (values > 0) & (values < 999), values, np.nan)

    def column(self, label: str) -> NDArray[np.float64] | None:
        """Column (n,) of the particles, if they have it."""
        rows = self.particles.rows
        return rows[label].to_numpy().astype(np.float64) if label in rows.columns else None


def read(step: SelectStep, ctx: Context) -> Classification:
    """Read model, particles and averages, and see that they belong together.

    Raises
    ------
    FileFormatError, TableError
        If a file is missing or not what it should be, or one is of another classification.
    """
    model, particles = _find(step, ctx)
    blocks: dict[str, Any] = read_star(model)
    classes = blocks["model_classes"]
    table = read_particles(particles)
    number = _class_numbers(table, len(classes))
    averages, pixel_size = _read_averages(ctx, model, blocks)
    found = Classification(model, blocks, table, number, averages, pixel_size, _ratio(blocks, len(classes)))
    _check(found)
    return found


def _find(step: SelectStep, ctx: Context) -> tuple[Path, Path]:
    """Files of the model and of the particles."""
    model = ctx.resolve(step.model)
    if model.suffix != ".star":
        raise FileFormatError("is no table", path=model, hint="give the model.star of a classification")
    particles = None
    if model.name.endswith("optimiser.star"):
        general = read_star(model).get("optimiser_general", {})
        if not isinstance(general, dict) or "rlnModelStarFile" not in general:
            raise TableError("names no model", path=model, hint="give the model.star itself")
        model, particles = (
            ctx.resolve(str(general[label])) for label in ("rlnModelStarFile", "rlnExperimentalDataStarFile")
        )
    classes = read_star(model).get("model_classes")
    if not isinstance(classes, pl.DataFrame) or "rlnReferenceImage" not in classes.columns:
        hint = "give the model.star of a classification"
        raise TableError("holds no class averages", path=model, hint=hint)
    if step.particles is not None:
        return model, ctx.resolve(step.particles)
    for end, other in _DATA.items() if particles is None else ():
        if model.name.endswith(end) and (end[0] == "_" or model.name == end):
            particles = model.with_name(model.name.removesuffix(end) + other)
    if particles is None or not particles.exists():
        raise FileFormatError("no particles lie beside it", path=model, hint="name them with --particles")
    return model, particles


def _class_numbers(particles: ParticleSet, classes: int) -> NDArray[np.int64]:
    path = particles.path
    if "rlnClassNumber" not in particles.rows.columns:
        hint = "classify them first, with `halfmap class2d`"
        raise TableError("the particles have no classes (_rlnClassNumber)", path=path, hint=hint)
    number = particles.rows["rlnClassNumber"].to_numpy().astype(np.int64)
    if number.max() > classes:
        row = int(number.argmax())
        raise TableError(
            f"class {number[row]}, where the model has {classes}",
            path=path,
            row=row + 1,
            hint="give model and particles of one classification",
        )
    return np.maximum(number, 0) - 1


def _read_averages(ctx: Context, model: Path, blocks: dict[str, Any]) -> tuple[NDArray[np.float32], float]:
    names = blocks["model_classes"]["rlnReferenceImage"].to_list()
    files: dict[str, NDArray] = {}
    images = []
    for row, name in enumerate(names, start=1):
        index, _, file = name.rpartition("@")
        if file not in files:
            stored = read_mrc(ctx.resolve(file)).astype(np.float32)
            is_map = not index and stored.ndim == 3 and len(set(stored.shape)) == 1
            files[file] = stored.sum(0, keepdims=True) if is_map else stored
        stack = files[file]
        place = int(index) - 1 if index.isdecimal() else 0
        if not 0 <= place < len(stack):
            message = f"{name} is not among the {len(stack)} images of that file"
            raise TableError(message, path=model, row=row, hint="was the stack made anew?")
        images.append(stack[place])
    general = blocks.get("model_general", {})
    size = general.get("rlnPixelSize") if isinstance(general, dict) else None
    if size is None or not np.isfinite(size) or size <= 0:
        raise TableError("has no rlnPixelSize", path=model, hint="give a model.star of RELION 3 or later")
    return np.stack(images), float(size)


def _ratio(blocks: dict[str, Any], classes: int) -> NDArray[np.float64] | None:
    tables = [blocks.get(f"model_class_{i + 1}") for i in range(classes)]
    if not all(isinstance(table, pl.DataFrame) and "rlnSsnrMap" in table.columns for table in tables):
        return None
    return np.stack([table["rlnSsnrMap"].to_numpy().astype(float) for table in tables])  # pyright: ignore


def _check(found: Classification) -> None:
    """Refuse particles of another classification."""
    hint = "give model and particles of one classification"
    if "rlnImageSize" in found.particles.optics.columns:
        sizes, box = found.particles.optics["rlnImageSize"].to_list(), found.averages.shape[-1]
        if box not in sizes:
            message = f"averages of {box} px, but particles of {sizes[0]} px in {found.particles.path}"
            raise TableError(message, path=found.path, hint=hint)
    if "rlnClassDistribution" in found.classes.columns:
        shares = found.classes["rlnClassDistribution"].to_numpy().astype(float)
        own = found.members / max(found.members.sum(), 1)
        if 0.5 * np.abs(shares / max(shares.sum(), 1e-9) - own).sum() > _ALIKE:
            message = f"the classes hold other shares than those of {found.particles.path}"
            raise TableError(message, path=found.path, hint=hint)


def _mask_diameter(averages: NDArray[np.float32]) -> float:
    """Diameter in pixels beyond which the averages hold nothing."""
    box = averages.shape[-1]
    y, x = np.indices((box, box)) - box // 2
    radius = np.hypot(y, x).astype(int)
    spread = averages.astype(np.float64) - np.median(averages, axis=(1, 2), keepdims=True)
    power = np.bincount(radius.ravel(), (spread**2).mean(0).ravel()) / np.bincount(radius.ravel())
    inside = np.flatnonzero(power[: box // 2] > _NOTHING * power.max())
    return 2.0 * (inside[-1] + 1) if len(inside) else float(box)
