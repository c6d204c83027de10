"""References for picking: class averages, or projections of a map, in all in-plane angles."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import scipy.ndimage
import torch
from numpy.typing import NDArray

from halfmap.errors import FileFormatError, ParameterError, ShapeError
from halfmap.io.mrc import read_mrc
from halfmap.io.mrc_header import read_header
from halfmap.io.star import read_star
from halfmap.log import log
from halfmap.ops._healpix import pixel_centres, pixel_count
from halfmap.ops.fourier import resample
from halfmap.ops.masks import soft_circle
from halfmap.ops.rotations import from_euler, view_direction
from halfmap.ops.slices import project_volume
from halfmap.ops.symmetry import in_asymmetric_unit
from halfmap.steps.pick.template import Template, components

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from halfmap.engine import Context
    from halfmap.io.micrographs import MicrographItem
    from halfmap.steps.pick.step import PickTemplate

_ORDER = 1
"""HEALPix order of the directions that a map is projected in: 48, some 29° apart."""

_SAMPLES = 2.5
"""Pixels to the finest detail."""

_RESOLUTION_A = 20.0
_FAINT = 0.08
_STEPS_DEG = (4.0, 30.0)

_BLANK = 0.01
"""Norm of a reference over that of most ones below which nothing is in it: an empty class."""


def prepare(step: PickTemplate, ctx: Context) -> Template:
    """Read the references, or project the map; make them coarse, centre their mean, turn them.

    Raises
    ------
    FileFormatError
        If the file states no pixel size, is blank, or is neither a stack of images nor a map.
    ParameterError
        If the references' pixels are too coarse for the resolution.
    """
    path = ctx.resolve(step.references)
    stored, stated = _read(ctx, path)
    size = step.pixel_size or stated
    if not size:
        raise FileFormatError("states no pixel size", path=path, hint="give --pixel-size")
    d, h, w = stored.shape
    if h != w:
        raise ShapeError(f"references of {w} × {h} px are not square", path=path, hint="cut them to squares")
    if not np.isfinite(stored).all() or float(stored.std()) == 0:
        raise FileFormatError("is blank or holds pixels that are no numbers", path=path)
    is_map = d == w and path.suffix.lower() not in (".mrcs", ".star")
    central = stored.sum(axis=0)[None] if is_map else stored
    diameter = step.diameter or diameter_of(central - _border(central)[:, None, None], size)
    resolution = step.resolution or max(min(_RESOLUTION_A, diameter / 5), 2 * size)
    if 2 * size > resolution * (1 + 1e-6):
        message = f"pixels of {size:.3g} Å hold no detail of {resolution:g} Å"
        raise ParameterError(message, path=path, hint=f"give --resolution {2 * size:.1f} or coarser")
    new = max(2 * round(w * size * _SAMPLES / resolution / 2), 8)
    wanted = w * size / new
    if is_map:
        volume = resample(torch.from_numpy(stored), new_shape=(new, new, new))
        images = project_volume(volume, _directions(step.symmetry)).numpy()
        log.info("%d projections of %s", len(images), step.references)
    else:
        images = resample(torch.from_numpy(stored), new_shape=(new, new)).numpy()
    images = images - _border(images)[:, None, None]
    images = images * soft_circle((new, new), radius=diameter / 2 / wanted + 1, edge=2.0).numpy()
    norm = np.linalg.norm(images, axis=(1, 2))
    filled = norm > _BLANK * np.median(norm[norm > 0]) if norm.any() else np.zeros(len(norm), bool)
    if not filled.any():
        raise FileFormatError("holds nothing where particles are to be", path=path, hint="give --diameter")
    if not filled.all():
        log.info("%d of %d references are blank and are left out", (~filled).sum(), len(images))
    images = images[filled]
    angle = step.angle_step or float(np.clip(math.degrees(2 * resolution / diameter), *_STEPS_DEG))
    turns = max(1, math.ceil(360 / angle - 1e-9))
    angles = np.arange(turns, dtype=np.float64) * (360.0 / turns)
    log.info("%d references of %.0f Å in %d angles, pixels of %.1f Å", len(images), diameter, turns, wanted)
    template = Template(
        diameter, wanted, turned(images, angles), angles, ctx.device, np.flatnonzero(filled) + 1
    )
    kernels = template.images.reshape(len(images) * turns, -1)
    parts, _ = components(kernels)
    held = 100 * np.sum((kernels @ parts.T) ** 2) / np.sum(kernels**2)
    log.info("%d images hold %.1f %% of them all", len(parts), held)
    return template


def _read(ctx: Context, path: Path) -> tuple[NDArray[np.float32], float | None]:
    """Images (n, h, w) of a stack, a map, or a table of class averages, and their pixel size."""
    if path.suffix.lower() != ".star":
        return np.asarray(read_mrc(path), np.float32), read_header(path).pixel_size
    column = "rlnReferenceImage"
    tables = [each for each in read_star(path).values() if isinstance(each, pl.DataFrame)]
    names = next((list(each[column]) for each in tables if column in each.columns), None)
    if not names:
        raise FileFormatError(
            "names no class averages (_rlnReferenceImage)",
            path=path,
            hint="give class_averages.star of `halfmap select`, a stack (.mrcs) or a map (.mrc)",
        )
    places = [str(name).rpartition("@") for name in names]
    stacks = {stack: np.asarray(read_mrc(ctx.resolve(stack)), np.float32) for _, _, stack in places}
    images = np.stack([stacks[stack][int(number or 1) - 1] for number, _, stack in places])
    return images, read_header(ctx.resolve(places[0][2])).pixel_size


def refuse_micrograph(path: Path, items: Sequence[MicrographItem]) -> None:
    """Refuse a file of references that is one of the micrographs.

    Raises
    ------
    ParameterError
        If it is.
    """
    if path.resolve() in {item.path.resolve() for item in items}:
        hint = "give class averages (.mrcs) or a map (.mrc)"
        raise ParameterError("is a micrograph of the table, no reference", path=path, hint=hint)


def _directions(symmetry: str) -> torch.Tensor:
    """Rotations (n, 3, 3) of all views that differ, in one in-plane angle."""
    pixel = torch.arange(pixel_count(_ORDER))
    rot, tilt, _ = pixel_centres(pixel, order=_ORDER).unbind(-1)
    rotations = from_euler(torch.stack([rot, tilt, torch.zeros_like(rot)], dim=-1).double())
    kept = in_asymmetric_unit(view_direction(rotations), symmetry)
    return (rotations[kept] if bool(kept.any()) else rotations[:1]).float()


def _border(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Median of the outermost pixels of each image."""
    rim = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    return np.median(rim, axis=1)


def diameter_of(images: NDArray[np.float32], pixel_size: float) -> float:
    """Diameter in Å of what is in images (n, s, s) whose background is 0: where their rings fade."""
    s = images.shape[-1]
    axis = np.arange(s) - s // 2
    ring = np.rint(np.hypot(axis[:, None], axis)).astype(int)
    strength = np.sqrt(np.mean(images**2, axis=0))
    profile = np.bincount(ring.ravel(), weights=strength.ravel()) / np.bincount(ring.ravel())
    inside = np.flatnonzero(profile[: s // 2] > _FAINT * profile.max())
    return float(2 * (inside[-1] + 0.5) * pixel_size)


def turned(images: NDArray[np.float32], angles: NDArray[np.float64]) -> NDArray[np.float32]:
    """Images (n, s, s) turned by each angle psi in degrees about their origins: (n, angles, s, s).

    A turned image is what the pose of the image with that `rlnAnglePsi` in its place looks like.
    """
    n, s, _ = images.shape
    axis = np.arange(s) - s // 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    result = np.empty((n, len(angles), s, s), np.float32)
    for i, image in enumerate(images):
        smooth = scipy.ndimage.spline_filter(image, order=3)
        for j, angle in enumerate(np.deg2rad(angles)):
            place = (
                np.sin(angle) * x + np.cos(angle) * y + s // 2,
                np.cos(angle) * x - np.sin(angle) * y + s // 2,
            )
            result[i, j] = scipy.ndimage.map_coordinates(smooth, place, order=3, prefilter=False)
    return result
