"""Other images of the same particles, denoised or merged, that poses are searched in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.data import ParticleSet
from halfmap.errors import ParameterError, TableError
from halfmap.io.denoised import read_powers
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.signal_bias import error_power
from halfmap.search.lens_noise import NoiseSums
from halfmap.search.noise import ResidualSums
from halfmap.search.particles import ParticleImages
from halfmap.search.source import MICROGRAPH, Source, phase_flipped

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.refine.step import RefineStep

KIND = "hmImageKind"
POWERS = "hmDenoisingPowers"
_PLACE = MICROGRAPH, "rlnCoordinateX", "rlnCoordinateY"
_SPREAD = "hmBackgroundStd"
_TABLE = "searched.star"
_RANGE = 0.25, 4.0
"""Of the power of noise and bias in a micrograph over that of all, which is believed."""

_EXTRACT = "cut both with halfmap extract from the same coordinates: raw, and with --images"


@dataclass(frozen=True, eq=False)
class Searched:
    """Images that poses are searched in, in the order of the particles that maps are made of.

    Attributes
    ----------
    source : Source
        Of the images.
    factor : Tensor (n,)
        Brings each on the grey scale of the raw one.
    flipped : array (n,) of bool
        Which were multiplied by the sign of their CTF.
    error : Tensor (micrographs, rings)
        Power of noise and bias that was measured in each micrograph, over its mean of all particles.
    """

    source: Source
    factor: Tensor
    flipped: NDArray[np.bool_]
    error: Tensor

    def pictures(self, rows: NDArray[np.intp]) -> Tensor:
        """Images (b, n, n) of some of the particles, on the grey scale of the raw ones."""
        return self.source.images.get(rows) * self.factor[torch.from_numpy(rows), None, None]


@dataclass(frozen=True, eq=False)
class SearchedSums:
    """What images that poses are searched in add up to.

    Attributes
    ----------
    noise : NoiseSums
        Of what the map leaves of them.
    match : Tensor (2, groups, rings), float64
        Of images times their models, and of squared models.
    """

    noise: NoiseSums
    match: Tensor

    @classmethod
    def empty(cls, groups: int, rings: int) -> SearchedSums:
        """Sums of nothing."""
        return cls(NoiseSums.empty(groups, rings), torch.zeros(2, groups, rings, dtype=torch.float64))

    def add(
        self, left: ResidualSums, transfer: Tensor, error: Tensor, *, scale: Tensor, group: Tensor
    ) -> None:
        """Add what the map left of images, in place.

        Parameters
        ----------
        left : ResidualSums
            Of each image (b, rings).
        transfer, error : Tensor (b, rings)
            Their mean squared CTF, and what their noise is multiplied by.
        scale, group : Tensor (b,)
            Of the signal in their micrographs; their optics groups.
        """
        self.noise.add(left.power / left.count / error.cpu(), transfer, group)
        scale = scale.double().cpu()[:, None]
        self.match.index_add_(1, group, torch.stack([left.cross.cpu() * scale, left.model.cpu() * scale**2]))


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
            hint="give the raw particles, and these by --searched",
        )


def make_searched(
    step: RefineStep, ctx: Context, particles: ParticleSet, micrographs: NDArray[np.intp], memory: int
) -> Searched | None:
    """Find the image of each particle that its pose is searched in, if others than the raw ones are given.

    Parameters
    ----------
    step, ctx
        The refinement.
    particles : ParticleSet
        That maps are made of.
    micrographs : array (n,)
        Micrograph of each.
    memory : int
        Bytes in which a process may keep images.

    Raises
    ------
    TableError
        If a particle has no such image, or it is of another size, or nothing was measured of its micrograph.
    """
    if step.searched is None:
        return None
    found = _in_order(particles, read_particles(ctx.resolve(step.searched)))
    path = ctx.folder / _TABLE
    write_particles(path, found)
    found = read_particles(path)
    raw, other = (ParticleImages(each, ctx.project, memory=0) for each in (particles, found))
    if (raw.box, round(raw.pixel_size, 3)) != (other.box, round(other.pixel_size, 3)):
        raise TableError(
            f"has images of {other.box} px of {other.pixel_size:.3g} Å, the raw ones are {raw.box} px of "
            f"{raw.pixel_size:.3g} Å",
            path=step.searched,
            hint=_EXTRACT,
        )
    first = np.unique(micrographs, return_index=True)[1]
    kinds = dict(zip(found.optics["rlnOpticsGroup"], found.optics[KIND], strict=True))
    rows = found.rows[first]
    frequencies = np.arange(raw.box // 2) / (raw.box * raw.pixel_size)
    error = [
        _error(ctx.resolve(name), kinds[group], frequencies)
        for name, group in zip(rows[POWERS], rows["rlnOpticsGroup"], strict=True)
    ]
    factor = (found.rows[_SPREAD] / particles.rows[_SPREAD]).to_numpy()
    return Searched(
        Source.of(path, ctx.project, memory),
        torch.from_numpy(factor.astype(np.float32)),
        phase_flipped(found),
        torch.from_numpy(_over_mean(np.stack(error), micrographs)),
    )


def _error(
    path: Path, kind: Literal["denoised", "merged"], frequencies: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Power of noise and bias in a micrograph's image, at frequencies (rings,) in 1/Å."""
    powers, pixel_size = read_powers(path)
    places, power = error_power(powers, kind)
    side = 2 * (len(powers.counts) - 1) * pixel_size
    return np.interp(frequencies, (places / side).numpy(), power.numpy())


def _over_mean(error: NDArray[np.float64], micrographs: NDArray[np.intp]) -> NDArray[np.float32]:
    """Power (micrographs, rings) over its mean of all particles, where it is believed."""
    mean = np.bincount(micrographs, minlength=len(error)) @ error / len(micrographs)
    return np.clip(error / np.maximum(mean, np.finfo(float).tiny), *_RANGE).astype(np.float32)


def _in_order(particles: ParticleSet, others: ParticleSet) -> ParticleSet:
    """The images of others that are of the same particles, in their order."""
    for table, needed in ((particles, (*_PLACE, _SPREAD)), (others, (*_PLACE, _SPREAD, POWERS))):
        missing = [label for label in needed if label not in table.rows.columns]
        if missing:
            raise TableError(f"has no _{', _'.join(missing)}", path=table.path, hint=_EXTRACT)
    if KIND not in others.optics.columns or not set(others.optics[KIND]) <= {"denoised", "merged"}:
        raise TableError(
            "holds no particles of denoised or merged micrographs", path=others.path, hint=_EXTRACT
        )
    places = others.rows.select(_PLACE).with_row_index("place").unique(_PLACE, keep="first")
    joined = particles.rows.select(_PLACE).join(places, on=_PLACE, how="left", maintain_order="left")
    if joined["place"].null_count():
        row = int(joined["place"].is_null().arg_max() or 0)
        raise TableError(
            f"has no image of the particle in row {row + 1} of {particles.path}, nor of others: "
            f"{joined['place'].null_count()} are missing",
            path=others.path,
            hint=_EXTRACT,
        )
    return others.with_rows(others.rows[joined["place"]])
