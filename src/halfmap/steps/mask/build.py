"""Build masks as voxels, check that they make sense, and write them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.errors import ParameterError
from halfmap.io.model_files import model_origin
from halfmap.io.models import AtomicModel, read_model
from halfmap.io.mrc import write_mrc
from halfmap.io.volumes import MapFile
from halfmap.log import log
from halfmap.ops import masks
from halfmap.ops.envelope import Levels, blur, density_levels, find_region, particle_region
from halfmap.ops.interpolation import sample_volume

if TYPE_CHECKING:
    from halfmap.steps.mask.step import MaskCylinder, MaskMap, MaskModel, MaskSphere

EDGE_px, EXTEND_px = 6.0, 3.0
ATOM_RADIUS_A = 3.0
"""About each atom's centre that counts as model: its own size and that of the gaps between neighbours."""

_FIT_SIGMAS = 0.5
"""Mean density at a model's atoms, in standard deviations of the map, below which it does not fit."""


@dataclass(frozen=True, eq=False)
class Mask:
    """A soft mask and where it comes from.

    Attributes
    ----------
    array : Tensor (d, h, w)
        0 to 1.
    region : Tensor (d, h, w) of bool or None
        Voxels that it was extended from.
    text : str
        What it is, in a line.
    blurred : Tensor (d, h, w) or None
        Map in which the threshold was found.
    levels : Levels or None
        Densities that were found in it.
    threshold : float
        That was taken.
    """

    array: Tensor
    text: str
    region: Tensor | None = None
    blurred: Tensor | None = None
    levels: Levels | None = None
    threshold: float = 0.0


def around_particle(step: MaskMap, volume: MapFile) -> Mask:
    """Mask around what is above a threshold of the blurred map.

    Raises
    ------
    ParameterError
        If nothing stands out of the noise, or the threshold leaves nothing or everything.
    """
    array = torch.from_numpy(volume.array)
    pixel = volume.pixel_size
    least, largest = step.least_piece / 100, step.largest_hole / 100
    lowpass = None if step.lowpass is None else max(step.lowpass, 2 * pixel)
    if step.threshold is None:
        try:
            found = find_region(
                array,
                pixel_size=pixel,
                resolution=lowpass,
                level=step.level,
                least_piece=least,
                largest_hole=largest,
            )
        except ParameterError as error:
            raise ParameterError(error.message, path=volume.path, hint=error.hint) from None
        region, blurred, levels, resolution = found.region, found.blurred, found.levels, found.resolution
    else:
        resolution = lowpass or max(15.0, 2 * pixel)
        blurred = blur(array, pixel_size=pixel, resolution=resolution)
        levels = density_levels(blurred)
        region = particle_region(blurred > step.threshold, least_piece=least, largest_hole=largest)
        if not region.any() or region.all():
            low, high = float(blurred.min()), float(blurred.max())
            message = f"{'all' if region.any() else 'nothing'} of the map at {resolution:g} Å is above "
            message += f"the threshold {step.threshold:.4g}; its densities go from {low:.4g} to {high:.4g}"
            raise ParameterError(message, path=volume.path, hint="leave out --threshold to find one")
    threshold = levels.threshold if step.threshold is None else step.threshold
    if step.threshold is None and levels.limited_by_noise:
        log.warning(
            "the threshold lies above the particle's surface, to be above the noise: give a larger --lowpass"
        )
    text = f"density above {threshold:.4g} at {resolution:.3g} Å, {float(region.sum()) * pixel**3:,.0f} Å³"
    log.info("%s; particle over noise: %.1f standard deviations", text, levels.contrast)
    return Mask(_soften(step, region, pixel, step.extend), text, region, blurred, levels, threshold)


def sphere(step: MaskSphere, volume: MapFile) -> Mask:
    """Sphere about a centre.

    Raises
    ------
    ParameterError
        If it holds the whole box.
    """
    array = masks.soft_sphere(
        volume.array.shape,
        radius=step.diameter / 2,
        edge=_edge(step.soft_edge, volume),
        pixel_size=volume.pixel_size,
        centre=step.centre,
    )
    text = f"sphere, {step.diameter:g} Å in diameter"
    _refuse_the_whole_box(array, volume, text)
    return Mask(array, text)


def cylinder(step: MaskCylinder, volume: MapFile) -> Mask:
    """Cylinder along z.

    Raises
    ------
    ParameterError
        If it holds the whole box.
    """
    whole = 2 * volume.array.shape[0] * volume.pixel_size
    array = masks.soft_cylinder(
        volume.array.shape,
        radius=step.diameter / 2,
        length=step.length or whole,
        edge=_edge(step.soft_edge, volume),
        pixel_size=volume.pixel_size,
        centre=step.centre,
    )
    length = "the box" if step.length is None else f"{step.length:g} Å"
    text = f"cylinder, {step.diameter:g} Å in diameter, {length} long"
    _refuse_the_whole_box(array, volume, text)
    return Mask(array, text)


def _refuse_the_whole_box(array: Tensor, volume: MapFile, text: str) -> None:
    """Of a shape that leaves nothing outside, its edge aside."""
    if float(array.min()) > 0.5:
        sides = [f"{n * volume.pixel_size:.4g}" for n in volume.array.shape[::-1]]
        box = sides[0] if len(set(sides)) == 1 else " × ".join(sides)
        raise ParameterError(
            f"the mask ({text}) holds the whole box of {box} Å", hint="give a smaller --diameter, in Å"
        )


def around_model(step: MaskModel, path: Path, volume: MapFile) -> Mask:
    """Mask around a model's atoms.

    Raises
    ------
    ParameterError
        If there is no such chain, or no atom lies in the box.
    """
    whole = read_model(path, assembly=None if step.assembly == "none" else step.assembly)
    places = _place(step, whole, volume, path)
    model, chosen = _chains(step, whole, path)
    inside = masks.around_points(
        volume.array.shape, places[chosen], radius_px=ATOM_RADIUS_A / volume.pixel_size
    )
    region = particle_region(torch.from_numpy(inside), least_piece=0.0)
    if not region.any():
        raise ParameterError(
            "no atom of the model lies in the box of the map",
            path=path,
            hint="say with --origin where its coordinates begin, or give the map it was fitted to",
        )
    what = f"chains {', '.join(step.chains)}" if step.chains else "all chains"
    text = f"{what} of {model.name}, {model.mass_kDa:,.0f} kDa"
    return Mask(_soften(step, region, volume.pixel_size, step.extend), text, region)


def _chains(step: MaskModel, model: AtomicModel, path: Path) -> tuple[AtomicModel, NDArray[np.bool_]]:
    if not step.chains:
        return model, np.ones(len(model), np.bool_)
    known = np.unique(model.chains).tolist()
    for chain in step.chains:
        if chain not in known:
            names = ", ".join(known[:20]) + (" and others" if len(known) > 20 else "")
            raise ParameterError(f"has no chain {chain!r}", path=path, hint=f"it has {names}")
    chosen = np.isin(model.chains, step.chains)
    return model.select(chosen), chosen


def _place(step: MaskModel, model: AtomicModel, volume: MapFile, path: Path) -> NDArray[np.float64]:
    """Atoms in voxels from the first one, (x, y, z)."""
    middle = np.array([n // 2 for n in volume.array.shape[::-1]])
    scaled = model.positions / volume.pixel_size
    places = {
        "header": scaled - np.array(model_origin(volume)) / volume.pixel_size,
        "box": scaled + middle,
        "mass": scaled - model.centre / volume.pixel_size + middle,
    }
    if step.origin != "auto":  # the map is there for its box, and may be blank
        return places[step.origin]
    array = torch.from_numpy(volume.array)
    mean, deviation = float(array.mean()), float(array.std())
    fit = {
        name: (float(sample_volume(array, torch.from_numpy(places[name])).mean()) - mean) / deviation
        for name in places
    }
    # Of equal ones the first: a model may begin at the header's origin and the box's centre at once.
    origin = max(fit, key=lambda name: fit[name])
    log.info(
        "the model begins at %s: %.1f standard deviations of density at its atoms",
        {"header": "the header's origin", "box": "the box's centre", "mass": "its centre of mass"}[origin],
        fit[origin],
    )
    if fit[origin] < _FIT_SIGMAS:
        log.warning("%s: the map has little density at the model's atoms: see mask.png", path)
    return places[origin]


def write(path: Path, volume: MapFile, mask: Mask, *, invert: bool) -> None:
    """Write a mask that lies where the map does, with its voxel size, and say what it encloses.

    Raises
    ------
    ParameterError
        If the mask is empty.
    """
    array = mask.array.numpy()
    if not array.any():
        raise ParameterError("the mask is empty", hint="its centre lies outside the box, or it is too small")
    share = float((array > 0.5).mean())
    log.info(
        "%s Å³ inside, %.1f %% of the box", f"{share * array.size * volume.pixel_size**3:,.0f}", 100 * share
    )
    faces = [array.take(end, axis) for axis in range(3) for end in (0, -1)]
    if max(float(face.max()) for face in faces) > 0.01:
        log.warning("the mask reaches the edge of the box: a larger box, or a smaller mask, would be better")
    values = 1 - array if invert else array
    write_mrc(path, values, pixel_size=volume.pixel_size, origin=model_origin(volume), stack=False)


def _edge(width: float | None, volume: MapFile) -> float:
    return EDGE_px * volume.pixel_size if width is None else width


def _soften(step: MaskMap | MaskModel, region: Tensor, pixel: float, extend: float | None) -> Tensor:
    return masks.soft_edge(
        region,
        width=EDGE_px * pixel if step.soft_edge is None else step.soft_edge,
        extend=EXTEND_px * pixel if extend is None else extend,
        pixel_size=pixel,
    )
