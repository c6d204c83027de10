"""Learn the particle of a data set from some of its micrographs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from halfmap.errors import HalfmapError, ItemsFailedError, ParameterError
from halfmap.io.atomic import write_text
from halfmap.log import log
from halfmap.steps.pick.blob import Blob, learn
from halfmap.steps.pick.image import Image, MicrographItem, coarser, load
from halfmap.steps.pick.obstacles import mask_obstacles

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.pick.step import PickBlob

FILE = "particle.json"
_PIXELS = 10
"""Pixels across the smallest particle that is looked for."""

_MUCH = 0.05
"""Share of micrographs that is worth a warning if it is taken for carbon and contaminants."""


def blob(step: PickBlob, ctx: Context, items: list[MicrographItem]) -> Blob:
    """Find the particle's size and profile, or read what an interrupted run of the job found.

    Raises
    ------
    ParameterError
        If the smallest diameter is not below the largest.
    ItemsFailedError
        If no micrograph can be used, or nothing stands out of their noise.
    """
    if step.smallest >= step.largest:
        raise ParameterError("--smallest is not below --largest")
    path = ctx.folder / FILE
    if path.exists():
        found = json.loads(path.read_text())
        return Blob(
            found["diameter"],
            np.array(found["frequency"]),
            np.array(found["transform"]),
            found["count"],
            found["hollow"],
        )
    least = step.diameter or step.smallest
    images, reason = [], ""
    count = min(step.survey, len(items))
    for i in np.unique(np.linspace(0, len(items) - 1, count).round().astype(int)):
        try:
            images.append(load(items[i], least / _PIXELS))
        except HalfmapError as error:
            reason = str(error)
            log.warning("%s; the survey goes on without it", error)
    if not images:
        raise ItemsFailedError("no micrograph of the survey can be used", hint=f"the last one: {reason}")
    sign = 1 if step.contrast == "dark" else -1
    particle = learn(images, smallest=step.smallest, largest=step.largest, diameter=step.diameter, sign=sign)
    if (share := masked_share(images, particle.diameter)) > _MUCH:
        message = "%.0f %% of %d micrographs look like carbon or contaminants and are not searched; see the"
        log.warning(
            message + " pictures, and give --diameter if these are particles", 100 * share, len(images)
        )
    text = {
        "diameter": round(particle.diameter, 2),
        "hollow": particle.hollow,
        "count": particle.count,
        "frequency": particle.frequency.tolist(),
        "transform": particle.transform.tolist(),
    }
    write_text(path, json.dumps(text))
    return Blob(text["diameter"], particle.frequency, particle.transform, particle.count, particle.hollow)


def masked_share(images: list[Image], diameter: float) -> float:
    """Share of the usable part of micrographs that is masked as obstacles to particles of a diameter in Å."""
    before = after = 0
    for image in images:
        coarse = coarser(image, diameter / _PIXELS)
        before += int(coarse.mask.sum())
        after += int(mask_obstacles(coarse, diameter).mask.sum())
    return 1 - after / max(before, 1)
