"""Read map, half maps and model, and put the model where it belongs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.io.half_maps import HalfMaps, read_half_maps
from halfmap.io.model_files import ModelFile, model_origin, read_model_file
from halfmap.io.models import AtomicModel
from halfmap.io.volumes import read_volume
from halfmap.log import log
from halfmap.ops.fsc import fsc, resolution
from halfmap.ops.interpolation import sample_volume
from halfmap.ops.rotations import angular_distance
from halfmap.search.rigid_fit import FINEST_A, Place, find_places

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.fit.step import FitStep

_SAME = 1e-3
"""Relative difference of voxel sizes that rounding explains."""

_DENSE = 0.5
"""Mean density at the atoms, in standard deviations of the map, below which a model is out of place."""

_CLOSE = 0.9
"""Correlation of the second best place, over the best one's, from which on the best is not sure."""


@dataclass(frozen=True, eq=False)
class Given:
    """What a fit begins with.

    Attributes
    ----------
    path : Path
        Of the map.
    volume : Tensor (d, h, w)
    pixel_size : float
        Å.
    origin : tuple of 3 float
        (x, y, z) of the map's first voxel in the model's coordinates, Å.
    file : ModelFile
    halves : HalfMaps or None
    resolution : float or None
        Of the map, Å.
    source : str
        How that is known.
    """

    path: Path
    volume: Tensor
    pixel_size: float
    origin: tuple[float, float, float]
    file: ModelFile
    halves: HalfMaps | None
    resolution: float | None
    source: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(d, h, w)."""
        return tuple(self.volume.shape)

    def voxels(self, positions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Positions (n, 3) in Å as voxels (x, y, z) from the first."""
        return (positions - np.array(self.origin)) / self.pixel_size


@dataclass(frozen=True, eq=False)
class Placed:
    """A model in its place.

    Attributes
    ----------
    model : AtomicModel
    rotation, shift : arrays (3, 3) and (3,)
        Of the model as given: x comes to rotation @ x + shift, Å.
    moved : float
        Root mean square of the atoms' ways, Å.
    places : list of Place
        That were found, best first; none if none were looked for.
    """

    model: AtomicModel
    rotation: NDArray[np.float64]
    shift: NDArray[np.float64]
    moved: float
    places: list[Place]


def read(step: FitStep, ctx: Context) -> Given:
    """Read what is given, and find out the map's resolution.

    Raises
    ------
    FileFormatError, ShapeError
        If a file cannot be used, or half maps have another box than the map.
    """
    path = ctx.resolve(step.map)
    volume = read_volume(path, pixel_size=step.pixel_size)
    file = read_model_file(ctx.resolve(step.model))
    halves = None
    if step.half1 is not None:
        second = None if step.half2 is None else ctx.resolve(step.half2)
        halves = read_half_maps(ctx.resolve(step.half1), second, pixel_size=step.pixel_size)
        same = abs(halves.pixel_size - volume.pixel_size) <= _SAME * volume.pixel_size
        if tuple(halves.first.shape) != volume.array.shape or not same:
            its = " × ".join(str(n) for n in volume.array.shape[::-1])
            raise ShapeError(
                f"has {halves.box}³ voxels of {halves.pixel_size:g} Å, but {path} {its} of "
                f"{volume.pixel_size:g} Å",
                path=halves.paths[0],
                hint="give the half maps of this map",
            )
    found, source = _resolution(step, file, halves)
    if found is not None:
        log.info("resolution of the map: %.2f Å, %s", found, source)
    return Given(
        path,
        torch.from_numpy(volume.array),
        volume.pixel_size,
        model_origin(volume),
        file,
        halves,
        found,
        source,
    )


def _resolution(step: FitStep, file: ModelFile, halves: HalfMaps | None) -> tuple[float | None, str]:
    if step.resolution is not None:
        return step.resolution, "as given"
    if halves is not None:
        curve = fsc(halves.first, halves.second)
        curve = torch.where(torch.arange(len(curve)) <= halves.last_shell, curve, 0.0)
        found = resolution(curve, pixel_size=halves.pixel_size, box=halves.box)
        if np.isfinite(found):
            return found, "where the half maps, without a mask, correlate by 0.143"
    if file.resolution is not None:
        return file.resolution, "as the model's file says"
    return None, "not known"


def place(step: FitStep, given: Given) -> Placed:
    """Put the model where it fits best, as far as it may move.

    Raises
    ------
    ParameterError
        If it lies outside the map and may not move there.
    """
    model = given.file.model
    if step.search != "global":
        _refuse_outside(given, model)
    if step.search == "none":
        _warn_outside(given, model)
        _warn_out_of_place(given, model)
        return Placed(model, np.eye(3), np.zeros(3), 0.0, [])
    limits = {"angle": 180.0, "shift": float("inf")}
    if step.search == "local":
        limits = {"angle": step.max_angle, "shift": step.max_shift}
    known = given.resolution or 0.0
    places = find_places(
        given.volume,
        model,
        pixel_size=given.pixel_size,
        origin=given.origin,
        coarse=max(step.detail, known),
        fine=max(FINEST_A, known),
        **limits,
    )
    placed = _moved(model, places)
    _refuse_outside(given, placed.model)
    _warn_outside(given, placed.model)
    _tell(placed)
    return placed


def _moved(model: AtomicModel, places: list[Place]) -> Placed:
    rotation = places[0].rotation.numpy()
    shift = places[0].centre.numpy() - rotation @ model.positions.mean(0)
    positions = model.positions @ rotation.T + shift
    moved = float(np.sqrt(np.square(positions - model.positions).sum(1).mean()))
    return Placed(replace(model, positions=positions), rotation, shift, moved, places)


def _tell(placed: Placed) -> None:
    best = placed.places[0]
    log.info(
        "the model fits best %.2f Å (root mean square) from where it was, turned by %.1f°: its density "
        "correlates with the map's by %.3f",
        placed.moved,
        float(angular_distance(best.rotation, torch.eye(3, dtype=torch.float64))),
        best.correlation,
    )
    if len(placed.places) > 1:
        second = placed.places[1].correlation
        log.info("the next best place correlates by %.3f", second)
        if second > _CLOSE * best.correlation:
            log.warning(
                "another place fits nearly as well: the map has equal parts, or shows too little detail to "
                "tell; see the places in fit.star",
            )


def _atoms_outside(given: Given, model: AtomicModel) -> int:
    voxels, limits = given.voxels(model.positions), np.array(given.shape[::-1]) - 1
    return int(((voxels < 0) | (voxels > limits)).any(axis=1).sum())


def _refuse_outside(given: Given, model: AtomicModel) -> None:
    if _atoms_outside(given, model) < len(model):
        return
    ends = np.array(given.origin) + (np.array(given.shape[::-1]) - 1) * given.pixel_size
    low, high, middle = (
        ", ".join(f"{value:.1f}" for value in each) for each in (given.origin, ends, model.positions.mean(0))
    )
    raise ParameterError(
        f"the model, about ({middle}) Å, lies outside the map, which goes from ({low}) to ({high}) Å",
        path=given.file.path,
        hint="let it be looked for with --search global, or give the map that it was built in",
    )


def _warn_outside(given: Given, model: AtomicModel) -> None:
    outside = _atoms_outside(given, model)
    if outside:
        log.warning("%d of %d atoms lie outside the map and are not scored", outside, len(model))


def _warn_out_of_place(given: Given, model: AtomicModel) -> None:
    where = torch.from_numpy(given.voxels(model.positions)).float()
    density = float(sample_volume(given.volume, where).mean())
    sigmas = (density - float(given.volume.mean())) / float(given.volume.std())
    log.info("mean density at the atoms: %.1f standard deviations above the map's mean", sigmas)
    if sigmas < _DENSE:
        log.warning("the map has little density at the model's atoms: --search local or global moves it")
