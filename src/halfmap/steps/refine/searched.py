"""Other images of the same particles, denoised or merged, that poses are searched in."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.data import ParticleSet
from halfmap.data.optics import GROUP
from halfmap.errors import TableError
from halfmap.io.denoised import read_powers
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.signal_bias import error_power
from halfmap.search.lens_noise import NoiseSums
from halfmap.search.noise import ResidualSums
from halfmap.search.particles import ParticleImages
from halfmap.search.source import KIND, MICROGRAPH, Source, phase_flipped

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.refine.step import RefineStep

POWERS = "hmDenoisingPowers"
_PLACE = MICROGRAPH, "rlnCoordinateX", "rlnCoordinateY"
_SPREAD = "hmBackgroundStd"
_TABLE = "searched.star"
FAINT = 0.02
"""Amplitude of denoised images over that of raw ones up to which they show nothing."""

_RANGE, _AMPLITUDES = (0.25, 4.0), (0.5, 2.0)
"""Of a micrograph's noise and bias, and of its amplitude, over those of all, which are believed."""

NORMALISED = "hmIsNormalised"
"""Whether images were divided by the standard deviation of their background."""

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
    error, amplitude : Tensor (micrographs, rings)
        Power of noise and bias, and amplitude of the signal, that were measured in each micrograph, over
        their geometric means of all particles.
    """

    source: Source
    factor: Tensor
    flipped: NDArray[np.bool_]
    error: Tensor
    amplitude: Tensor

    def pictures(self, rows: NDArray[np.intp]) -> Tensor:
        """Images (b, n, n) of some of the particles, on the grey scale of the raw ones."""
        return _images(self.source).get(rows) * self.factor[torch.from_numpy(rows), None, None]


@dataclass(frozen=True, eq=False)
class SearchedSums:
    """What images that poses are searched in add up to.

    Attributes
    ----------
    noise : NoiseSums
        Of what the map leaves of them.
    match : Tensor (2, groups, rings), float64
        Of images times their models; and what the same would be if their signal had the amplitude that the
        models have over that of the raw images.
    """

    noise: NoiseSums
    match: Tensor

    @classmethod
    def empty(cls, groups: int, rings: int) -> SearchedSums:
        """Sums of nothing."""
        return cls(NoiseSums.empty(groups, rings), torch.zeros(2, groups, rings, dtype=torch.float64))

    def add(
        self,
        left: ResidualSums,
        raw: ResidualSums,
        *,
        amplitude: Tensor,
        transfer: Tensor,
        error: Tensor,
        scale: Tensor,
        group: Tensor,
    ) -> None:
        """Add what the map left of images, in place.

        Parameters
        ----------
        left, raw : ResidualSums
            Of each image (b, rings), and of the raw one.
        amplitude, transfer, error : Tensor (b, rings)
            Amplitude that the images' models had over those of the raw ones, mean squared CTF, and what the
            noise of their group is multiplied by in them.
        scale, group : Tensor (b,)
            Of the signal in their micrographs; their optics groups.
        """
        self.noise.add(left.power / left.count / error, transfer, group)
        both = torch.stack([left.cross, raw.cross * amplitude.to(raw.cross).square()]).cpu()
        self.match.index_add_(1, group, both * scale.to(both)[:, None])


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
    given = read_particles(ctx.resolve(step.searched))
    found = _in_order(particles, given)
    _ = _deviation(given)
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
    other.check()
    factor = _deviation(found) / _deviation(particles)
    error, amplitude = _measured(ctx, step.searched, found, micrographs, raw)
    return Searched(
        Source.of(path, ctx.project, memory),
        torch.from_numpy(factor.astype(np.float32)),
        phase_flipped(found),
        torch.from_numpy(error),
        torch.from_numpy(amplitude),
    )


@functools.lru_cache(maxsize=1)
def _images(source: Source) -> ParticleImages:
    """Beside the raw ones, which the cache of `source` holds."""
    return ParticleImages(read_particles(source.table), source.project, memory=source.memory)


def _deviation(particles: ParticleSet) -> NDArray[np.float64]:
    """What pixels of each image were divided by when it was cut."""
    values = particles.rows[_SPREAD].cast(pl.Float64).to_numpy()
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        row = int(bad.argmax())
        message = f"_{_SPREAD} of {values[row]:g} is no standard deviation"
        raise TableError(message, path=particles.path, row=row + 1, hint=_EXTRACT)
    if NORMALISED in particles.optics.columns:
        is_so = dict(zip(particles.optics[GROUP], particles.optics[NORMALISED].cast(bool), strict=True))
        values = np.where([is_so[group] for group in particles.rows[GROUP]], values, 1.0)
    return values


def _measured(
    ctx: Context,
    searched: Path,
    found: ParticleSet,
    micrographs: NDArray[np.intp],
    images: ParticleImages,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Noise and bias, and amplitude of the signal, (micrographs, rings) over their means."""
    frequencies = np.arange(images.box // 2) / (images.box * images.pixel_size)
    kinds = dict(zip(found.optics[GROUP], found.optics[KIND], strict=True))
    curves = []
    for row in np.unique(micrographs, return_index=True)[1].tolist():
        name = found.rows[POWERS][row]
        path = None if name is None else ctx.resolve(name)
        if path is None or not path.exists():
            message = f"nothing was measured of {found.rows[MICROGRAPH][row]}: there is no file {name}"
            hint = "denoise apply writes it; cut the particles anew"
            raise TableError(message, path=ctx.resolve(searched), hint=hint)
        curves.append(_curves(path, kinds[found.rows[GROUP][row]], frequencies))
    error, amplitude = np.stack(curves, axis=1)
    return _over_mean(error, micrographs, _RANGE), _over_mean(amplitude, micrographs, _AMPLITUDES)


def _curves(
    path: Path, kind: Literal["denoised", "merged"], frequencies: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Error and amplitude (2, rings) of an image at frequencies in 1/Å; NaN where they are unknown."""
    powers, pixel_size = read_powers(path)
    places, *curves = error_power(powers, kind)
    side = 2 * (len(powers.counts) - 1) * pixel_size
    return np.stack([np.interp(frequencies, (places / side).numpy(), curve.numpy()) for curve in curves])


def _over_mean(
    values: NDArray[np.float64], micrographs: NDArray[np.intp], believed: tuple[float, float]
) -> NDArray[np.float32]:
    """Values (micrographs, rings) over their geometric mean of all particles; 1 where nothing is known."""
    known = np.isfinite(values) & (values > 0)
    logarithm = np.log(np.where(known, values, 1.0))
    weight = np.bincount(micrographs, minlength=len(values))[:, None] * known
    mean = (weight * logarithm).sum(0) / np.maximum(weight.sum(0), 1)
    return np.clip(np.exp(np.where(known, logarithm - mean, 0.0)), *believed).astype(np.float32)


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
