"""Where the particle images of a job come from, and what their table says of all of them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfmap.data import ParticleSet
from halfmap.data.ctf import CTFParameters
from halfmap.data.optics import GROUP
from halfmap.engine.memory import processes_of, require_memory_of_each
from halfmap.engine.options import RunOptions
from halfmap.errors import ParameterError, TableError
from halfmap.io.tables import read_particles
from halfmap.ops.fourier import resample
from halfmap.search.particles import ParticleImages

DIAMETER, MICROGRAPH = "hmParticleDiameter", "rlnMicrographName"
KIND = "hmImageKind"
_FLIPPED, _MULTIPLIED = "rlnCtfDataArePhaseFlipped", "rlnCtfDataAreCtfPremultiplied"

_MASK = 1.15
"""Diameter of the mask over the particle's."""

_PROCESS_BYTES = 5e8
"""What a process takes beside its images and maps."""

_LESS = "give a smaller --memory or fewer --workers"


@dataclass(frozen=True)
class Source:
    """A table of particles, the memory in which a process may keep their images, and in how many pixels."""

    table: Path
    stamp: int
    """When the table was last written, so that a new one is not taken for it."""
    project: Path
    memory: int
    box: int | None = None
    """Side of the images as they are searched; as they are stored where it is None."""

    @classmethod
    def of(cls, table: Path, project: Path, memory: int = 0, box: int | None = None) -> Source:
        """Of a table as it is now."""
        return cls(table, table.stat().st_mtime_ns, project, memory, box)

    @property
    def images(self) -> ParticleImages:
        """The images as they are searched, the same object for all of a process."""
        return _images(self)

    @property
    def ctf(self) -> CTFParameters:
        """Of all particles, made once in a process."""
        return _ctf(self)


@functools.lru_cache(maxsize=1)
def _images(source: Source) -> ParticleImages:
    pixels = None if source.box is None else functools.partial(resample, new_shape=(source.box, source.box))
    particles = read_particles(source.table)
    return ParticleImages(particles, source.project, memory=source.memory, transform=pixels)


@functools.lru_cache(maxsize=1)
def _ctf(source: Source) -> CTFParameters:
    return read_particles(source.table).ctf


def refuse_denoised(particles: ParticleSet) -> None:
    """Refuse to make maps of what a network has touched.

    Raises
    ------
    ParameterError
        If images were cut from denoised or merged micrographs.
    """
    kinds = particles.optics[KIND].to_list() if KIND in particles.optics.columns else []
    touched = next((kind for kind in kinds if kind in ("denoised", "merged")), None)
    if touched is not None:
        raise ParameterError(
            f"holds particles of {touched} micrographs: no map, and no resolution, is made of what a network "
            "has touched",
            path=particles.path,
            hint="give the raw particles; refine searches poses in these by --searched",
        )


def phase_flipped(particles: ParticleSet) -> NDArray[np.bool_]:
    """Which images were multiplied by the sign of their CTF, by the table (n,).

    Raises
    ------
    TableError
        If images were multiplied by the CTF itself.
    """
    rows, optics = particles.rows[GROUP].to_numpy(), particles.optics
    flipped, multiplied = (
        np.isin(rows, optics[GROUP].filter(optics[name].cast(bool)) if name in optics.columns else [])
        for name in (_FLIPPED, _MULTIPLIED)
    )
    if multiplied.any():
        raise TableError(
            "the images have been multiplied by their CTF",
            path=particles.path,
            row=int(multiplied.argmax()) + 1,
            hint="extract them without",
        )
    return flipped


def numbered(
    particles: ParticleSet, label: str, instead: str = GROUP
) -> tuple[tuple[str, ...], NDArray[np.intp]]:
    """Distinct values of a column, or of another where there is none, and which of them each row (n,) has."""
    column = particles.rows[label if label in particles.rows.columns else instead]
    names, number = np.unique(column.to_numpy(), return_inverse=True)
    return tuple(names.astype(str)), number


def mask_diameter(particles: ParticleSet, given: float | None, side: float) -> float:
    """Diameter in Å of what is kept of a map: the one given, or 1.15 times that of the particles.

    Raises
    ------
    ParameterError
        If it is neither given nor in the table, or does not fit the box of `side` Å.
    """
    diameter = given
    if diameter is None:
        if DIAMETER in particles.rows.columns:
            diameter = _MASK * float(np.nanmedian(particles.rows[DIAMETER].to_numpy()))
        if diameter is None or not math.isfinite(diameter):
            raise ParameterError(
                f"does not say how large the particles are (_{DIAMETER})",
                path=particles.path or "the table",
                hint="give --diameter in Å",
            )
        diameter = min(diameter, 0.95 * side)
    if diameter > side:
        raise ParameterError(
            f"a diameter of {diameter:.0f} Å does not fit boxes of {side:.0f} Å",
            hint="give a smaller --diameter",
        )
    return diameter


def farthest_shift(given: float | None, usual: float, side: float) -> float:
    """Range of shifts in Å: the one given or else the usual one.

    Raises
    ------
    ParameterError
        If it goes beyond the box of `side` Å.
    """
    shift_range = usual if given is None else given
    if shift_range > side / 2:
        raise ParameterError(
            f"shifts to {shift_range:.0f} Å go beyond boxes of {side:.0f} Å",
            hint="give a smaller --shift-range",
        )
    return shift_range


def image_memory(asked: float, options: RunOptions, *, each: float, purpose: str, hint: str = _LESS) -> int:
    """Bytes in which each process may keep images.

    Parameters
    ----------
    asked : float
        Bytes for the images in all processes together.
    options : RunOptions
        How many processes work; this one has some of the memory as well.
    each : float
        Bytes that a process takes beside them, for maps and sums.
    purpose : str
        Of the memory, for the error.
    hint : str
        What to do where there is less.

    Raises
    ------
    ResourceError
        If there is less memory than all this.
    """
    share = asked / processes_of(options)
    require_memory_of_each(share + _PROCESS_BYTES + each, options, purpose=purpose, hint=hint)
    return int(share)
