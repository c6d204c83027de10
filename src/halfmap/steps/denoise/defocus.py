"""Defoci of denoised micrographs beside those of the raw ones."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from halfmap.data import MicrographSet
from halfmap.io.denoised import read_powers
from halfmap.io.images import read_image
from halfmap.io.micrographs import MicrographItem, cropped, list_micrographs, local_mean
from halfmap.io.mrc import write_mrc
from halfmap.io.tables import read_micrographs, write_micrographs
from halfmap.log import log
from halfmap.ops.filters import radial_average, radial_profile_to_grid
from halfmap.ops.fourier import irfft2, rfft2
from halfmap.ops.grids import frequency_radius
from halfmap.steps.denoise.apply import MEASURED
from halfmap.steps.denoise.halves import SOFT

if TYPE_CHECKING:
    from halfmap.engine import Context

ALIKE_A = 200.0
"""Difference of defoci up to which they agree."""

EVENED = "evened"

_NAME = "rlnMicrographName"

_SLOW_A, _AROUND_A = 50.0, 150.0
"""Gaussian averages (standard deviation) that are subtracted, and that the contrast is evened over."""

_SMOOTH_per_A = 0.01
"""Standard deviation of the average of the power's logarithm over frequencies: Thon rings are narrower."""

_EDGE_px = 128

_BEYOND = 1.1
"""Rings are fitted to this times the finest detail of the denoised images."""

_COARSEST_FIT_A, _FINEST_FIT_A = 10.0, 3.0

_TOO_COARSE_A = 8.0
"""Finest detail of denoised images beyond which rings in them tell no defocus."""


@dataclass(frozen=True)
class Defoci:
    """Mean defoci of micrographs, raw and denoised, Å.

    Attributes
    ----------
    names : list of str
        Of the micrographs.
    raw, denoised : array (n,)
        Defoci.
    """

    names: list[str]
    raw: NDArray[np.float64]
    denoised: NDArray[np.float64]

    @property
    def difference(self) -> NDArray[np.float64]:
        """Of the denoised ones from the raw ones."""
        return self.denoised - self.raw

    @property
    def agree(self) -> NDArray[np.bool_]:
        """Which are alike."""
        return np.abs(self.difference) <= ALIKE_A


def compare_defoci(ctx: Context, table: MicrographSet) -> Defoci | None:
    """Defoci of denoised micrographs, and those of the raw ones, estimated where the table has none.

    None if they cannot be found in such coarse images.

    Notes
    -----
    A network passes low frequencies as they are and next to nothing of high ones, so that the power of what
    it makes falls by three orders of magnitude and leaks. Thon rings are there as before: the defocus is
    estimated in images whose power was evened, and whose pixels hold what the network gave and no more.
    """
    finest = max(2 * read_powers(ctx.resolve(name))[1] / SOFT for name in table.rows[MEASURED])
    if finest > _TOO_COARSE_A:
        log.info("defoci are not compared: denoised micrographs end at %.1f Å, before Thon rings do", finest)
        return None
    denoised = _of_denoised(ctx, table, finest)
    known = {"rlnDefocusU", "rlnDefocusV"} <= set(table.rows.columns)
    raw = _mean_defocus(table if known else _estimated(ctx, _bare(table), "ctf_of_raw"))
    names = [name for name in table.rows[_NAME] if name in raw and name in denoised]
    if not names:
        log.info("defoci are not compared: there is no micrograph that both could be found in")
        return None
    return Defoci(names, *(np.array([values[name] for name in names]) for values in (raw, denoised)))


def even_micrograph(item: MicrographItem, *, folder: Path, finest: float) -> dict[str, Any]:
    """Write a denoised micrograph with even contrast and power, in pixels that just hold what it has."""
    raw = np.asarray(read_image(item.path), np.float32)
    values = cropped(raw, item.pixel_size, SOFT * finest / 2)
    size = item.pixel_size * math.sqrt(raw.size / values.size)
    write_mrc(folder / f"{item.key}.mrc", evened(values, size, finest), pixel_size=size)
    return {"name": item.name, "pixel_size": size}


def evened(image: NDArray[np.float32], pixel_size: float, finest: float) -> NDArray[np.float32]:
    """An image with the same contrast everywhere and, but for Thon rings, the same power in all rings.

    Parameters
    ----------
    image : array (h, w)
        Of any scale.
    pixel_size : float
        In Å.
    finest : float
        Detail beyond which there is nothing, Å.

    Returns
    -------
    array (h, w)
        Of standard deviation 1.
    """
    flat = image - local_mean(image, _SLOW_A / pixel_size)
    deviation = np.sqrt(local_mean(np.square(flat), _AROUND_A / pixel_size))
    flat = flat / np.maximum(deviation, 1e-3 * float(np.median(deviation)) + 1e-12)
    # What does not meet at the borders would be in all rings.
    edge = min(_EDGE_px, min(image.shape) - 1)
    padded = torch.from_numpy(np.pad(flat, edge, mode="reflect").astype(np.float32))
    shape = (padded.shape[0], padded.shape[1])
    taper = torch.hann_window(shape[0])[:, None] * torch.hann_window(shape[1])
    power = radial_average(rfft2(padded * taper).abs().square(), shape=shape).double().clamp(min=1e-20)
    gain = torch.exp(-_smooth(power.log(), _SMOOTH_per_A * max(shape) * pixel_size) / 2).float()
    keeps = frequency_radius(shape) / pixel_size <= 1 / finest
    even = irfft2(rfft2(padded) * radial_profile_to_grid(gain, shape=shape) * keeps, shape=shape)
    even = even[edge:-edge, edge:-edge]
    return (even / even.std().clamp(min=1e-20)).numpy()


def _smooth(values: torch.Tensor, sigma: float) -> torch.Tensor:
    from scipy.ndimage import gaussian_filter1d

    return torch.from_numpy(gaussian_filter1d(values.numpy(), sigma, mode="nearest"))


def _of_denoised(ctx: Context, table: MicrographSet, finest: float) -> dict[str, float]:
    """Mean defocus of each denoised micrograph, by the name of the raw one."""
    items = list_micrographs(table, ctx.resolve, use_ctf=False, images="denoised")
    folder = ctx.folder / EVENED
    folder.mkdir(exist_ok=True)
    work = functools.partial(even_micrograph, folder=folder, finest=finest)
    done = {row["name"]: row["pixel_size"] for row in ctx.map(work, items, unit="denoised micrograph")}
    names = {item.name: ctx.relative(folder / f"{item.key}.mrc") for item in items if item.name in done}
    bare, name = _bare(table), pl.col(_NAME)
    rows = bare.rows.filter(name.is_in(list(names)))
    sizes = rows.select("rlnOpticsGroup", size=name.replace_strict(done)).group_by("rlnOpticsGroup").mean()
    optics = bare.optics.join(sizes, on="rlnOpticsGroup", how="left", maintain_order="left")
    optics = optics.with_columns(rlnMicrographPixelSize=pl.col("size").fill_null(finest)).drop("size")
    evened_rows = rows.with_columns(name.replace_strict(names)).drop("rlnMicrographPixelSize", strict=False)
    limit = min(max(_BEYOND * finest, _FINEST_FIT_A), _COARSEST_FIT_A)
    made = _estimated(ctx, MicrographSet(optics, evened_rows), "ctf_of_denoised", resolution_max=limit)
    raw_of = {made_name: name for name, made_name in names.items()}
    return {raw_of[name]: value for name, value in _mean_defocus(made).items()}


def _estimated(ctx: Context, table: MicrographSet, folder: str, **values: Any) -> MicrographSet:
    """Micrographs of a table with the CTF that is found in them."""
    path = ctx.folder / f"{folder}.star"
    write_micrographs(path, table)
    inner = ctx.run_within("ctf", folder, micrographs=ctx.relative(path), **values)
    return read_micrographs(inner / "micrographs_ctf.star")


def _bare(table: MicrographSet) -> MicrographSet:
    """The same micrographs, of whose CTF nothing is known, and no other images of them."""
    told = [name for name in table.rows.columns if name.startswith(("rlnDefocus", "rlnCtf"))]
    others = ("rlnMicrographNameNoDW", "hmMicrographMask")
    told += [name for name in others if name in table.rows.columns]
    return table.with_rows(table.rows.drop(told))


def _mean_defocus(table: MicrographSet) -> dict[str, float]:
    mean = table.rows.select(_NAME, mean=(pl.col("rlnDefocusU") + pl.col("rlnDefocusV")) / 2)
    return dict(mean.filter(pl.col("mean").is_finite()).iter_rows())
