"""Denoise micrographs half by half, measure them, and join them with the raw ones."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from halfmap.data import MicrographSet
from halfmap.errors import FileFormatError
from halfmap.io.denoised import read_powers, write_powers
from halfmap.io.mrc import write_mrc
from halfmap.io.tables import read_micrographs, write_micrographs
from halfmap.log import log
from halfmap.nets.denoiser import KIND, Denoiser, denoise, load_denoiser
from halfmap.nets.training import bfloat16_pays
from halfmap.nets.weights import shipped
from halfmap.ops.filters import radial_profile_to_grid
from halfmap.ops.fourier import irfft2, rfft2
from halfmap.ops.signal_bias import HalfPowers, half_powers, joined_at
from halfmap.steps.denoise.halves import COARSER, PIXELS, Halves, HalvesItem, list_halves, load_halves
from halfmap.steps.denoise.independence import ALIKE, warn_of_dependent

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.denoise.step import DenoiseApply

IMAGES, POWERS, PICTURES = "Micrographs", "powers", "pictures"
DENOISED, MERGED = "hmMicrographNameDenoised", "hmMicrographNameMerged"
MEASURED = "hmDenoisingPowers"

WINDOW_px = 256
"""Side of the windows that powers are means of, at the most."""

_JOIN = 4
"""Rings of such a window, to each side, over which a merged micrograph changes over."""

_NOWHERE = 999.0

FIGURES = {
    "snr_before": "hmSnrRaw",
    "snr_after": "hmSnrDenoised",
    "noise_fell": "hmNoiseReduction",
    "snbr": "hmSignalToNoiseAndBias",
    "transfer": "hmSignalTransfer",
    "joined_A": "hmMergedResolution",
    "correlation": "hmHalvesCorrelation",
}
"""What is told of each micrograph, and its column."""


def run(step: DenoiseApply, ctx: Context) -> None:
    """Denoise every micrograph half by half, measure, write the table, and draw."""
    from halfmap.steps.denoise import pictures

    model = shipped(KIND) if step.model is None else ctx.resolve(step.model)
    _, record = load_denoiser(model)
    table = read_micrographs(ctx.resolve(step.micrographs))
    flip = bool(record["phase_flipped"])
    _warn_of_coarse(table, float(record["pixel_size"]))
    items = list_halves(
        table, ctx.resolve, use_ctf=flip, thin=step.thin, seed=step.seed, electron=step.electron
    )
    for folder in (IMAGES, POWERS, PICTURES):
        (ctx.folder / folder).mkdir(exist_ok=True)
    work = functools.partial(
        denoise_micrograph,
        model=model,
        folder=ctx.folder,
        device=ctx.device,
        merge=step.merge,
        picture=step.pictures,
    )
    done = ctx.map(work, items, key=lambda item: item.name, unit="micrograph")
    write_micrographs(ctx.folder / "micrographs.star", _table(ctx, table, done, merge=step.merge))
    warn_of_dependent([row["name"] for row in done], [row["correlation"] for row in done])
    median = {name: float(np.nanmedian([row[name] for row in done])) for name in FIGURES if name in done[0]}
    log.info(
        "%d micrographs: noise %.0f times fainter; signal-to-noise ratio %.3g before, %.3g after, "
        "with bias %.3g; medians",
        *(len(done), median["noise_fell"], median["snr_before"], median["snr_after"], median["snbr"]),
    )
    ctx.picture(
        "summary.png",
        [row["name"] for row in done],
        lambda path: pictures.draw_summary(
            path, [read_powers(ctx.folder / POWERS / f"{row['key']}.npz") for row in done]
        ),
    )


def denoise_micrograph(
    item: HalvesItem, *, model: Path, folder: Path, device: str, merge: bool, picture: bool
) -> dict[str, Any]:
    """Denoise one micrograph, write what comes of it, and tell its figures."""
    network, pixel_size, flip = _loaded(model, device)
    halves = load_halves(item, pixel_size, flip=flip)
    if halves.correlation > ALIKE:
        message = f"even and odd sum are one image: they correlate by {halves.correlation:.2f}"
        raise FileFormatError(message, path=item.name, hint="give sums of different frames, as motion writes")
    half = bfloat16_pays(device)
    found = torch.stack([denoise(network, one, half=half) for one in halves.values])
    size = min(WINDOW_px, *(length // 2 * 2 for length in found.shape[1:]))
    powers = half_powers((halves.values[0], halves.values[1]), (found[0], found[1]), size=size)
    write_powers(folder / POWERS / f"{item.key}.npz", powers, halves.pixel_size)
    # The micrograph is the sum of its halves.
    image = 2 * halves.restored(found.mean(0))
    write_mrc(folder / IMAGES / f"{item.key}_denoised.mrc", image.numpy(), pixel_size=item.pixel_size)
    row = {"name": item.name, "key": item.key, "correlation": halves.correlation, **figures(powers)}
    if merge:
        joined, at_A = merged(halves, found.mean(0), powers)
        write_mrc(
            folder / IMAGES / f"{item.key}_merged.mrc",
            joined.numpy(),
            pixel_size=item.pixel_size,
        )
        row["joined_A"] = at_A
    if picture:
        from halfmap.steps.denoise import pictures

        path = folder / PICTURES / f"{item.key}.png"
        pictures.draw_micrograph(path, item.name, halves, found, powers)
    return row


def figures(powers: HalfPowers) -> dict[str, float]:
    """Signal over noise in the sum of the halves before and after, and over noise and bias, of all rings."""
    whole = powers.total()
    signal, before, after = (float(value) for value in (whole.signal, whole.noise_before, whole.noise_after))
    return {
        "snr_before": 2 * signal / max(before, 1e-12),
        # Fainter images have less noise, and less signal too.
        "snr_after": 2 * max(float(whole.transfer), 0.0) ** 2 * signal / max(after, 1e-12),
        "noise_fell": before / max(after, 1e-12),
        "snbr": signal / max(after / 2 + float(whole.bias), 1e-12),
        "transfer": float(whole.transfer),
    }


def merged(halves: Halves, denoised: Tensor, powers: HalfPowers) -> tuple[Tensor, float]:
    """Low frequencies of the denoised micrograph at the signal's amplitude, and the others of the raw one.

    Parameters
    ----------
    halves : Halves
        The raw halves.
    denoised : Tensor (h, w)
        Mean of the denoised ones, normalised as they are.
    powers : HalfPowers
        Of both.

    Returns
    -------
    image : Tensor
        In the micrograph's pixels.
    resolution : float
        Where one goes over into the other, Å; 999 if all is raw.
    """
    ring, gain = joined_at(powers)
    if ring <= 0:
        return 2 * halves.whole, _NOWHERE
    shape, window = tuple(denoised.shape), 2 * (len(powers.counts) - 1)
    # Rings of windows, at the frequencies of the whole image.
    rings = torch.arange(max(shape) // 2 + 1, dtype=torch.float64) * window / max(shape)
    low = (0.5 + 0.5 * (ring - rings) / _JOIN).clamp(0, 1)
    at_rings = torch.from_numpy(np.interp(rings.numpy(), np.arange(len(gain)), gain.numpy()))
    raw = halves.values.mean(0)
    change = rfft2(denoised) * radial_profile_to_grid((at_rings * low).float(), shape=shape)
    change = change - rfft2(raw) * radial_profile_to_grid(low.float(), shape=shape)
    # What the raw image has beyond the coarse pixels stays: only the difference is brought to it.
    difference = irfft2(change, shape=shape) * halves.deviation
    whole = 2 * (halves.whole + halves.finer(difference))
    return whole, window * halves.pixel_size / ring


def _warn_of_coarse(table: MicrographSet, trained_at: float) -> None:
    """Tell of pixels that are coarser than those that the network knows."""
    known = [name for name in PIXELS if name in table.optics.columns]
    sizes = table.optics.select(pl.coalesce(known)).to_series().drop_nulls() if known else pl.Series([])
    coarse = [size for size in sizes.to_list() if size > COARSER * trained_at]
    if coarse:
        log.warning(
            "pixels of %.3g Å are coarser than those of %.3g Å that the model was trained for: look at the "
            "pictures, or train at this --pixel-size",
            *(max(coarse), trained_at),
        )


@functools.lru_cache(maxsize=1)
def _loaded(model: Path, device: str) -> tuple[Denoiser, float, bool]:
    network, record = load_denoiser(model)
    return network.to(device), float(record["pixel_size"]), bool(record["phase_flipped"])


def _table(ctx: Context, table: MicrographSet, done: list[dict[str, Any]], *, merge: bool) -> MicrographSet:
    """The micrographs that were done, with their new images and figures."""
    by_name = {row["name"]: row for row in done}
    own = {DENOISED, MERGED, MEASURED, *FIGURES.values()} & set(table.rows.columns)
    rows = table.rows.drop(own).filter(pl.col("rlnMicrographName").is_in(list(by_name)))
    each = [by_name[name] for name in rows["rlnMicrographName"]]

    def names(kind: str) -> list[str]:
        return [ctx.relative(ctx.folder / IMAGES / f"{row['key']}_{kind}.mrc") for row in each]

    powers = [ctx.relative(ctx.folder / POWERS / f"{row['key']}.npz") for row in each]
    columns = [pl.Series(DENOISED, names("denoised")), pl.Series(MEASURED, powers)]
    if merge:
        columns.append(pl.Series(MERGED, names("merged")))
    columns += [
        pl.Series(label, [float(row[name]) for row in each])
        for name, label in FIGURES.items()
        if name in each[0]
    ]
    return MicrographSet(table.optics, rows.with_columns(*columns))
