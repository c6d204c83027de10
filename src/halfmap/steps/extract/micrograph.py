"""Cut the particles of one micrograph."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from scipy.spatial import KDTree
from torch import Tensor

from halfmap.data import ParticleSet
from halfmap.errors import FileFormatError, ShapeError
from halfmap.io.images import read_image
from halfmap.io.mrc import MrcStackWriter
from halfmap.ops.ctf import ctf
from halfmap.steps.extract._kernels import N_STATISTICS
from halfmap.steps.extract.images import PhaseFlip, Recipe, cut_particles
from halfmap.steps.extract.reading import Arriving, arriving

if TYPE_CHECKING:
    from halfmap.steps.extract.step import ExtractStep

FOLDER = "Particles"

REASONS = ("defocus", "outside", "edge", "masked", "duplicate", "blank", "broken", "overflow")
"""Why particles are left out, in the order in which they are looked at."""

_BLANK = 1e-6
"""Spread of a background over its level that is nothing but the rounding of transforms."""

_USABLE = 0.5
_FLIP_ROOM = 2


@dataclass(frozen=True, eq=False)
class MicrographItem:
    """A micrograph with its particles; plain data for a worker.

    Attributes
    ----------
    name, key : str
        Its name in the table, and that of its stack.
    seed : int
        Of what is random.
    path, mask : path
        Files; the mask is 1 where the specimen is good.
    cut : array (n, 2)
        Pixels (x, y) that become the middles of boxes.
    place : array (n, 2)
        Where the particles are, px.
    score : array (n,), optional
        The larger the better.
    has_defocus : array (n,)
        Whether their defocus is known.
    pixel_size : float
        Of the images, Å.
    recipe : Recipe
        What is done to the images.
    margin_px : float
        What must be inside of the micrograph to all sides of a particle.
    min_distance_px : float
        Of particles that are closer the best is kept.
    ctf : ParticleSet, optional
        CTFs to flip phases by, with the micrograph's pixel size.
    """

    name: str
    key: str
    seed: int
    path: Path
    mask: Path | None
    cut: NDArray[np.int64]
    place: NDArray[np.float64]
    score: NDArray[np.float64] | None
    has_defocus: NDArray[np.bool_]
    pixel_size: float
    recipe: Recipe
    margin_px: float
    min_distance_px: float
    ctf: ParticleSet | None


def extract_micrograph(item: MicrographItem, *, step: ExtractStep, folder: Path) -> dict[str, Any]:
    """Cut a micrograph's particles, write their stack and say which they are.

    Raises
    ------
    FileFormatError
        If the micrograph cannot be read, or is blank or no number in all boxes.
    ShapeError
        If it is smaller than the box.
    """
    with arriving(item.path) as micrograph:
        shape = micrograph.image.shape
        if item.recipe.box > min(shape):
            message = f"a box of {item.recipe.box} px does not fit into {shape[1]} × {shape[0]} px"
            raise ShapeError(message, path=item.name, hint="give a smaller --box")
        kept, left_out = choose(item, shape)
        statistics = np.empty((0, N_STATISTICS))
        if len(kept):
            dtype = np.float16 if step.float16 else np.float32
            statistics, fits = _write(item, micrograph, kept, folder, dtype)
            good = _is_sound(statistics)
            left_out["broken"] = int((~np.isfinite(statistics).all(axis=1)).sum())
            left_out["blank"] = int((~good).sum()) - left_out["broken"]
            left_out["overflow"] = int((good & ~fits).sum())
            good &= fits
            kept, statistics = kept[good], statistics[good]
            if not good.all():
                # Images have places in the stack before it is known which ones are no good.
                statistics, _ = _write(item, micrograph, kept, folder, dtype)
    return {
        "name": item.name,
        "kept": packed(kept, np.int32),
        "statistics": packed(statistics, np.float32),
        "left_out": {reason: int(count) for reason, count in left_out.items() if count},
    }


def packed(values: NDArray, dtype: DTypeLike) -> str:
    """Numbers of a million particles as text that is not much longer than they are."""
    return base64.b64encode(values.astype(np.dtype(dtype).newbyteorder("<")).tobytes()).decode()


def unpacked(text: str, dtype: DTypeLike) -> NDArray:
    """Numbers (n,) that were `packed`."""
    return np.frombuffer(base64.b64decode(text), np.dtype(dtype).newbyteorder("<"))


def choose(item: MicrographItem, shape: tuple[int, ...]) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Choose particles that can be cut and are to be.

    Parameters
    ----------
    item : MicrographItem
        Particles of a micrograph.
    shape : tuple of 2 int
        (y, x) of it.

    Returns
    -------
    array (k,)
        Those that stay, in order.
    dict
        How many do not, by the first of `REASONS`.
    """
    size = np.array(shape[::-1])
    margin = item.margin_px
    reasons = {"defocus": ~item.has_defocus}
    reasons["outside"] = np.asarray(((item.cut < 0) | (item.cut >= size)).any(axis=1))
    reasons["edge"] = np.asarray(((item.cut < margin) | (item.cut + margin > size)).any(axis=1))
    stays = ~np.logical_or.reduce(list(reasons.values()))
    if item.mask is not None:
        mask = read_image(item.mask)
        # A mask may be coarser than its micrograph.
        x, y = (
            ((item.cut + 0.5) * mask.shape[::-1] / size).astype(int).clip(0, np.array(mask.shape[::-1]) - 1).T
        )
        reasons["masked"] = mask[y, x] < _USABLE
        stays &= ~reasons["masked"]
    if item.min_distance_px > 0:
        reasons["duplicate"] = duplicates(item.place, item.score, stays, item.min_distance_px)
        stays &= ~reasons["duplicate"]
    counts, before = {}, np.zeros(len(item.cut), bool)
    for reason, applies in reasons.items():
        counts[reason] = int((applies & ~before).sum())
        before |= applies
    return np.flatnonzero(stays), counts


def duplicates(
    place: NDArray[np.float64], score: NDArray[np.float64] | None, among: NDArray[np.bool_], distance: float
) -> NDArray[np.bool_]:
    """Particles that are closer than `distance` to a better one that stays; to an earlier one without scores.

    Parameters
    ----------
    place : array (n, 2)
        Places.
    score : array (n,), optional
        The larger the better; NaN is worst.
    among : array (n,)
        Which of them are looked at.
    distance : float
        In the units of `place`.
    """
    found = np.zeros(len(place), bool)
    rows = np.flatnonzero(among)
    if score is not None:
        rows = rows[np.argsort(-np.nan_to_num(score[rows], nan=-np.inf), kind="stable")]
    pairs = (
        KDTree(place[rows]).query_pairs(distance, output_type="ndarray") if len(rows) else np.empty((0, 2))
    )
    # In the order of the better one: whether that one stays is known by then.
    for better, worse in pairs[np.lexsort(pairs.T[::-1])]:
        if not found[rows[better]]:
            found[rows[worse]] = True
    return found


def _write(
    item: MicrographItem, micrograph: Arriving, kept: NDArray[np.int64], folder: Path, dtype: DTypeLike
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Write the stack, in the order of the table; its images' statistics, and which the type holds."""
    rng = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(item.seed,)))
    # From top to bottom, as the rows arrive.
    order = np.argsort(item.cut[kept, 1], kind="stable")
    rows, shape = kept[order], micrograph.image.shape
    flip = None
    if item.ctf is not None:
        box = min(_FLIP_ROOM * item.recipe.box, *(length // 2 * 2 for length in shape))
        flip = PhaseFlip(box, partial(_signs, item.ctf.with_rows(item.ctf.rows[rows]), box))
    side, found = item.recipe.scaled_box, np.empty((len(kept), N_STATISTICS))
    fits, most = np.ones(len(kept), bool), np.finfo(dtype).max
    path = folder / FOLDER / f"{item.key}.mrcs"
    with MrcStackWriter(path, shape=(side, side), pixel_size=item.pixel_size, dtype=dtype) as stack:
        x, y = item.cut[rows].T
        parts = cut_particles(micrograph.image, x, y, item.recipe, ready=micrograph.wait, flip=flip, rng=rng)
        places = iter(order.tolist())
        for images, statistics in parts:
            for image, numbers in zip(images, statistics, strict=True):
                place = next(places)
                if dtype == np.float16:
                    # NaN is counted elsewhere.
                    fits[place] = not (image.max() > most or image.min() < -most)
                stack[place], found[place] = image if fits[place] else np.zeros_like(image), numbers
        if not (_is_sound(found) & fits).any():
            hint = "leave it out, or make it anew" if fits.all() else "write single precision"
            raise FileFormatError(f"all {len(kept)} boxes are blank or broken", path=item.name, hint=hint)
    return found, fits


def _is_sound(statistics: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether images are numbers throughout, and not all the same one."""
    return np.isfinite(statistics).all(axis=1) & (statistics[:, 1] > _BLANK * np.abs(statistics[:, 0]))


def _signs(particles: ParticleSet, box: int, chosen: slice) -> Tensor:
    """Signs (k, box, box // 2 + 1) of the CTFs of some of the particles."""
    some = particles.with_rows(particles.rows[chosen])
    values = ctf((box, box), **some.ctf.for_ctf())
    return torch.where(values < 0, -1.0, 1.0)
