"""What denoising does to a data set: signal, noise and bias ring by ring, defocus, picks."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from torch import Tensor

from halfmap.data import MicrographSet
from halfmap.errors import TableError
from halfmap.io.denoised import read_powers
from halfmap.io.star import read_star, write_star
from halfmap.io.tables import read_micrographs, write_micrographs
from halfmap.log import log
from halfmap.ops.signal_bias import HalfPowers
from halfmap.steps.denoise.apply import DENOISED, FIGURES, MEASURED, figures

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.denoise.step import DenoiseMeasure

NAME = "rlnMicrographName"

ALIKE_A = 200.0
"""Difference of defoci up to which they agree."""

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
    _write(ctx, names, rows, each, defoci)
    _say(names, rows, defoci, picks)
    pictures.draw_summary(ctx.folder / "measured.png", each)
    if defoci is not None:
        pictures.draw_defocus(ctx.folder / "defocus.png", defoci.raw, defoci.denoised, ALIKE_A)


def ring_table(powers: HalfPowers, pixel_size: float) -> pl.DataFrame:
    """Signal, noise, bias and ratios of each ring but that of the mean, with standard errors."""
    side = 2 * (len(powers.counts) - 1)
    columns: dict[str, Any] = {"rlnAngstromResolution": side * pixel_size / np.arange(1, side // 2 + 1)}
    for label, value in _RINGS.items():
        found, error = powers.with_error(value)
        columns |= {label: found[1:].numpy(), f"{label}Error": error[1:].numpy()}
    for label, frc in (("hmSsnrRaw", powers.frc_before), ("hmSsnrDenoised", powers.frc_after)):
        columns[label] = (frc / (1 - frc).clamp(min=1e-9))[1:].numpy()
    return pl.DataFrame(columns)


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
    each: Sequence[tuple[HalfPowers, float]],
    defoci: Defoci | None,
) -> None:
    columns: dict[str, Any] = {NAME: names}
    columns |= {label: [row[name] for row in rows] for name, label in FIGURES.items() if name in rows[0]}
    if defoci is not None:
        found = dict(zip(defoci.names, defoci.difference.tolist(), strict=True))
        columns["hmDefocusDifference"] = [found.get(name, float("nan")) for name in names]
    whole, pixel_size = together(each)
    blocks = {"micrographs": pl.DataFrame(columns), "rings": ring_table(whole, pixel_size)}
    write_star(ctx.folder / "measured.star", blocks)


def together(each: Sequence[tuple[HalfPowers, float]]) -> tuple[HalfPowers, float]:
    """Powers of all micrographs whose windows are of the commonest size and pixels, each as one window."""
    kinds = [(len(powers.counts), round(pixel_size, 4)) for powers, pixel_size in each]
    kind = max(set(kinds), key=kinds.count)
    alike = [powers for (powers, _), other in zip(each, kinds, strict=True) if other == kind]
    # Errors are those of means of micrographs, which differ by more than their windows do.
    whole = alike[0] if len(alike) == 1 else functools.reduce(operator.add, [p.pooled() for p in alike])
    return whole, each[kinds.index(kind)][1]


def _defoci(ctx: Context, table: MicrographSet) -> Defoci:
    """Defoci of the denoised micrographs, and those of the raw ones, estimated where they are not known."""
    denoised = _estimated(ctx, table, DENOISED)
    known = {"rlnDefocusU", "rlnDefocusV"} <= set(table.rows.columns)
    raw = _mean_defocus(table) if known else _estimated(ctx, table, NAME)
    names = [name for name in table.rows[NAME] if name in raw and name in denoised]
    return Defoci(names, *(np.array([values[name] for name in names]) for values in (raw, denoised)))


def _estimated(ctx: Context, table: MicrographSet, label: str) -> dict[str, float]:
    """Mean defocus of each micrograph, by its raw name, estimated from the images that a column names."""
    folder = "ctf_of_denoised" if label == DENOISED else "ctf_of_raw"
    dropped = [name for name in table.rows.columns if name.startswith(("rlnDefocus", "rlnCtf"))]
    dropped += [name for name in ("rlnMicrographNameNoDW", "hmMicrographMask") if name in table.rows.columns]
    rows = table.rows.drop(dropped).with_columns(pl.col(label).alias(NAME))
    path = ctx.folder / f"{folder}.star"
    write_micrographs(path, MicrographSet(table.optics, rows))
    inner = ctx.run_within("ctf", folder, micrographs=ctx.relative(path))
    raw_of = dict(zip(table.rows[label], table.rows[NAME], strict=True))
    found = _mean_defocus(read_micrographs(inner / "micrographs_ctf.star"))
    return {raw_of[name]: value for name, value in found.items()}


def _mean_defocus(table: MicrographSet) -> dict[str, float]:
    rows = table.rows
    mean = (rows["rlnDefocusU"] + rows["rlnDefocusV"]) / 2
    return dict(zip(rows[NAME].to_list(), mean.to_list(), strict=True))


def _picks(ctx: Context, step: DenoiseMeasure, table: MicrographSet) -> dict[str, int]:
    """Number of picks without references in raw and in denoised micrographs."""
    found = {}
    for images in ("raw", "denoised"):
        values = {"diameter": step.diameter} if step.diameter else {}
        inner = ctx.run_within(
            "pick blob",
            f"picks_in_{images}",
            micrographs=step.micrographs,
            images=images,
            pictures=False,
            **values,
        )
        rows = read_star(inner / "autopick.star")["coordinate_files"]
        found[images] = int(rows["hmPicks"].sum()) if isinstance(rows, pl.DataFrame) else 0
    return found


def _say(
    names: Sequence[str],
    rows: Sequence[dict[str, float]],
    defoci: Defoci | None,
    picks: dict[str, int] | None,
) -> None:
    values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    middle = {name: float(np.median(value)) for name, value in values.items()}
    log.info(
        "signal over noise %.3g before, %.3g after, over noise and bias %.3g (medians of %d micrographs)",
        *(middle["snr_before"], middle["snr_after"], middle["snbr"], len(rows)),
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
