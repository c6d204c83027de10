"""What denoising does to a data set: signal, noise and bias ring by ring, defocus, picks."""

from __future__ import annotations

import functools
import operator
import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from torch import Tensor

from halfmap.data import MicrographSet
from halfmap.errors import HalfmapError, ItemsFailedError, TableError, TooManyFailedError
from halfmap.io.denoised import read_powers
from halfmap.io.star import read_star, write_star
from halfmap.io.tables import read_micrographs
from halfmap.log import log
from halfmap.ops.signal_bias import HalfPowers
from halfmap.steps.denoise.apply import DENOISED, FIGURES, MEASURED, figures
from halfmap.steps.denoise.defocus import ALIKE_A, EVENED, Defoci, compare_defoci

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.denoise.step import DenoiseMeasure

NAME = "rlnMicrographName"

_BEYOND_CHANCE = 1.96
"""Standard errors of a change: of rings that did not change, one in forty falls by more."""

_FINEST_A = 4.0
"""Detail to which rings are judged."""

_ENOUGH = 10
"""Micrographs from which on errors are those of their mean, not of the mean of all windows."""

_ALIKE = 0.01
"""Logarithm of the ratio of pixel sizes that are the same."""

_OUTLIER = 4.0
"""Robust standard deviations from the median at which a micrograph is named."""

_RINGS: dict[str, Callable[[HalfPowers], Tensor]] = {
    "hmSignalPower": lambda powers: powers.signal,
    "hmNoisePowerRaw": lambda powers: powers.noise_before / 2,
    "hmNoisePowerDenoised": lambda powers: powers.noise_after / 2,
    "hmBiasPower": lambda powers: powers.bias,
    "hmSignalTransfer": lambda powers: powers.transfer,
}
"""What is told of each ring, with its error."""


def run(step: DenoiseMeasure, ctx: Context) -> None:
    """Gather powers, compare defoci and picks, write the table, name outliers, and draw."""
    from halfmap.steps.denoise import pictures

    table = read_micrographs(ctx.resolve(step.micrographs))
    _refuse_without(table, DENOISED, MEASURED)
    each = [read_powers(ctx.resolve(name)) for name in table.rows[MEASURED]]
    names = table.rows[NAME].to_list()
    rows = [figures(powers) for powers, _ in each]
    defoci = _defoci(ctx, table) if step.defocus else None
    picks = _picks(ctx, step, table) if step.picking else None
    rings = ring_table(*together(each))
    _write(ctx, names, rows, rings, defoci)
    _say(names, rows, rings, defoci, picks)
    pictures.draw_summary(ctx.folder / "measured.png", each)
    if defoci is not None:
        pictures.draw_defocus(ctx.folder / "defocus.png", defoci.raw, defoci.denoised, ALIKE_A)
    shutil.rmtree(ctx.folder / EVENED, ignore_errors=True)


def _defoci(ctx: Context, table: MicrographSet) -> Defoci | None:
    """Defoci, or none where they cannot be had: powers are worth having without them."""
    try:
        return compare_defoci(ctx, table)
    except HalfmapError as error:
        log.warning("defoci are not compared: %s", error)
        return None


def ring_table(powers: HalfPowers, pixel_size: float) -> pl.DataFrame:
    """Signal, noise, bias and ratios of each ring but that of the mean, with standard errors."""
    side = 2 * (len(powers.counts) - 1)
    columns: dict[str, Any] = {"rlnAngstromResolution": side * pixel_size / np.arange(1, side // 2 + 1)}
    for label, value in _RINGS.items():
        found, error = powers.with_error(value)
        columns |= {label: found[1:].numpy(), f"{label}Error": error[1:].numpy()}
    change, error = powers.with_error(lambda powers: _ssnr(powers.frc_after) - _ssnr(powers.frc_before))
    for label, value in (
        ("hmSsnrRaw", _ssnr(powers.frc_before)),
        ("hmSsnrDenoised", _ssnr(powers.frc_after)),
        # Both are of the same images: errors of their difference are far less than of either.
        ("hmSsnrChange", change),
        ("hmSsnrChangeError", error),
    ):
        columns[label] = value[1:].numpy()
    return pl.DataFrame(columns)


def rings_that_lost(rings: pl.DataFrame, finest_A: float) -> float:
    """Part of the rings to a detail whose spectral signal-to-noise ratio has fallen, beyond chance."""
    known = pl.col("hmSsnrChangeError").is_finite() & (pl.col("rlnAngstromResolution") >= finest_A)
    rings = rings.filter(known)
    fell = rings["hmSsnrChange"] < -_BEYOND_CHANCE * rings["hmSsnrChangeError"]
    return float(fell.mean() or 0.0)  # pyright: ignore[reportArgumentType]


def _ssnr(frc: Tensor) -> Tensor:
    return frc / (1 - frc).clamp(min=1e-9)


def _refuse_without(table: MicrographSet, *labels: str) -> None:
    missing = [label for label in labels if label not in table.rows.columns]
    if missing:
        raise TableError(
            f"has no {', '.join(missing)}",
            path=table.path,
            hint="give the table that halfmap denoise apply wrote",
        )


def _write(
    ctx: Context,
    names: Sequence[str],
    rows: Sequence[dict[str, float]],
    rings: pl.DataFrame,
    defoci: Defoci | None,
) -> None:
    columns: dict[str, Any] = {NAME: names}
    columns |= {label: [row[name] for row in rows] for name, label in FIGURES.items() if name in rows[0]}
    if defoci is not None:
        found = dict(zip(defoci.names, defoci.difference.tolist(), strict=True))
        columns["hmDefocusDifference"] = [found.get(name, float("nan")) for name in names]
    blocks = {"micrographs": pl.DataFrame(columns), "rings": rings}
    write_star(ctx.folder / "measured.star", blocks)


def together(each: Sequence[tuple[HalfPowers, float]]) -> tuple[HalfPowers, float]:
    """Powers of all micrographs whose windows are of the commonest size and whose pixels are, to a hundredth.

    Each micrograph is one window, as micrographs differ by more than their windows do, where there are enough
    to tell by how much.
    """
    rings = np.array([len(powers.counts) for powers, _ in each])
    sizes = np.log([pixel_size for _, pixel_size in each])
    alike = max(
        ((rings == n) & (np.abs(sizes - size) < _ALIKE) for n, size in {*zip(rings, sizes, strict=True)}),
        key=np.count_nonzero,
    )
    if not alike.all():
        log.info("rings are of %d of %d micrographs: the others have other pixels", alike.sum(), len(alike))
    kept = [powers for (powers, _), one in zip(each, alike, strict=True) if one]
    if len(kept) >= _ENOUGH:
        kept = [powers.pooled() for powers in kept]
    return functools.reduce(operator.add, kept), float(np.exp(sizes[alike].mean()))


def _picks(ctx: Context, step: DenoiseMeasure, table: MicrographSet) -> dict[str, int]:
    """Number of picks without references in raw and in denoised micrographs."""
    found = {}
    for images in ("raw", "denoised"):
        values: dict[str, Any] = {"diameter": step.diameter} if step.diameter else {}
        values |= {"micrographs": step.micrographs, "images": images, "pictures": False}
        try:
            inner = ctx.run_within("pick blob", f"picks_in_{images}", **values)
        except TooManyFailedError:
            raise
        except ItemsFailedError as error:
            log.info("no picks in %s micrographs: %s", images, error)
            found[images] = 0
            continue
        rows = read_star(inner / "autopick.star")["coordinate_files"]
        found[images] = int(rows["hmPicks"].sum()) if isinstance(rows, pl.DataFrame) else 0
    return found


def _say(
    names: Sequence[str],
    rows: Sequence[dict[str, float]],
    rings: pl.DataFrame,
    defoci: Defoci | None,
    picks: dict[str, int] | None,
) -> None:
    values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    middle = {name: float(np.median(value)) for name, value in values.items()}
    log.info(
        "signal over noise %.3g before, %.3g after, over noise and bias %.3g (medians of %d micrographs)",
        *(middle["snr_before"], middle["snr_after"], middle["snbr"], len(rows)),
    )
    lost = rings_that_lost(rings, _FINEST_A)
    if lost > 0:
        log.info(
            "FRC / (1 - FRC) is less than before, by more than %.2f standard errors, in %.0f %% of the rings "
            "to %g Å",
            *(_BEYOND_CHANCE, 100 * lost, _FINEST_A),
        )
    for name, value in values.items():
        spread = 1.4826 * float(np.median(np.abs(value - middle[name])))
        odd = np.abs(value - middle[name]) > _OUTLIER * spread if spread > 0 else np.zeros(len(value), bool)
        for i in map(int, np.flatnonzero(odd)):
            said = "%s is unlike the others: %s %.3g, median %.3g"
            log.info(said, names[i], FIGURES[name], value[i], middle[name])
    if defoci is not None:
        agree = defoci.agree
        log.info(
            "defocus of the denoised within %.0f Å of that of the raw one in %d of %d micrographs",
            *(ALIKE_A, int(agree.sum()), len(agree)),
        )
        for i in map(int, np.flatnonzero(~agree)):
            log.info("%s: defocus differs by %.0f Å", defoci.names[i], defoci.difference[i])
    if picks is not None:
        log.info("%d picks in raw micrographs, %d in denoised ones", picks["raw"], picks["denoised"])
