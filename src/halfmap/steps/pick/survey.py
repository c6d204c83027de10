"""Learn the particle of a data set from some of its micrographs, and what there is beside particles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from halfmap.errors import HalfmapError, ItemsFailedError, ParameterError
from halfmap.io.atomic import write_text
from halfmap.io.micrographs import Image, MicrographItem, SMALLEST_px, coarser, load
from halfmap.io.movies import open_movie
from halfmap.log import log
from halfmap.steps.pick.blob import PIXELS, Blob, learn
from halfmap.steps.pick.obstacles import mask_obstacles, usual_darkness
from halfmap.steps.pick.template import Template

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.pick.step import PickBlob

FILE = "particle.json"
MICROGRAPHS = 8
"""That are surveyed, where the user does not say how many."""

_PIXELS = 10
"""Pixels across the smallest particle that is looked for."""

_MUCH = 0.05
"""Share of micrographs that is worth a warning if it is taken for carbon and contaminants."""

_FEW_ACROSS = 6
"""Particles in a row across a micrograph below which their diameter is worth a warning."""

_Searching = TypeVar("_Searching", Blob, Template)


def blob(step: PickBlob, ctx: Context, items: Sequence[MicrographItem]) -> Blob:
    """Find the particle's size and profile, or read what an earlier run of the job found, if it holds.

    Raises
    ------
    ItemsFailedError
        If no micrograph can be used, or nothing stands out of their noise.
    """
    path = ctx.folder / FILE
    names = [f"{item.name} {item.optics}" for item in items]
    if ctx.decisions.hold("particle", names) and path.exists():
        found = json.loads(path.read_text())
        return Blob(**found | {name: np.array(found[name]) for name in ("frequency", "transform")})
    images = surveyed(items, (step.diameter or step.smallest) / _PIXELS, step.survey)
    log.info("survey of %d micrograph%s", len(images), "" if len(images) == 1 else "s")
    sign = 1 if step.contrast == "dark" else -1
    particle = learn(images, smallest=step.smallest, largest=step.largest, diameter=step.diameter, sign=sign)
    particle = replace(particle, diameter=round(particle.diameter, 2))
    particle = with_usual(particle, [coarser(image, particle.pixel_size) for image in images])
    values = asdict(particle)
    values |= {name: values[name].tolist() for name in ("frequency", "transform")}
    write_text(path, json.dumps(values))
    ctx.decisions.note("particle", names)
    return particle


def with_usual(method: _Searching, images: Sequence[Image]) -> _Searching:
    """Tell a method how dark particles are in most micrographs, and warn if much looks like no specimen."""
    method = replace(method, usual=usual_darkness(images, method.diameter))
    if (share := masked_share(images, method.diameter, method.usual)) > _MUCH:
        message = (
            "%.0f %% of %d micrographs look like carbon or contaminants and are left out; see the pictures,"
        )
        log.warning(message + " and give --diameter if these are particles", 100 * share, len(images))
    return method


def surveyed(items: Sequence[MicrographItem], pixel_size: float, count: int = MICROGRAPHS) -> list[Image]:
    """Some micrographs, evenly chosen, in pixels of a size in Å; those that cannot be used are left out.

    Raises
    ------
    ItemsFailedError
        If none can be used.
    """
    images, reason = [], ""
    for item in _some(items, count):
        try:
            images.append(load(item, pixel_size))
        except HalfmapError as error:
            reason = str(error)
            log.warning("%s; the survey goes on without it", error)
    if not images:
        raise ItemsFailedError("no micrograph of the survey can be used", hint=f"the last one: {reason}")
    return images


def check_room(items: Sequence[MicrographItem], diameter: float) -> None:
    """Refuse particles that no micrograph has room for, and warn of such as few have room for.

    Parameters
    ----------
    items : sequence of MicrographItem
        Of which some are looked at.
    diameter : float
        Of the particles in Å.

    Raises
    ------
    ParameterError
        If micrographs are narrower than what can be searched.
    """
    widths = []
    for item in _some(items, MICROGRAPHS):
        try:
            widths.append(min(open_movie(item.path).shape) * item.pixel_size)
        except HalfmapError:
            continue  # its own failure, when it is searched
    if not widths:
        return
    text = f"particles of {diameter:.0f} Å in micrographs that are {max(widths):.0f} Å wide"
    if max(widths) < SMALLEST_px / PIXELS * diameter:
        raise ParameterError(f"{text} are too large", hint="give a smaller --diameter, in Å")
    if max(widths) < _FEW_ACROSS * diameter:
        log.warning("%s are large; are diameter and pixel size right?", text)


def _some(items: Sequence[MicrographItem], count: int) -> list[MicrographItem]:
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in np.unique(places)]


def masked_share(images: Sequence[Image], diameter: float, usual: float = 0.0) -> float:
    """Share of the usable part of micrographs that is masked as no specimen.

    Parameters
    ----------
    images : sequence of Image
        In pixels of a tenth of a particle or so.
    diameter : float
        Of the particles in Å.
    usual : float
        How dark most of them are, as for `mask_obstacles`.
    """
    before = sum(int(image.mask.sum()) for image in images)
    after = sum(int(mask_obstacles(image, diameter, usual=usual).mask.sum()) for image in images)
    return 1 - after / max(before, 1)
