"""From the table of micrographs to tables of coordinates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from halfmap.errors import TableError
from halfmap.io.coordinates import write_coordinates
from halfmap.io.names import unique_stems
from halfmap.io.star import write_star
from halfmap.log import log
from halfmap.steps.pick.calibrate import Calibration
from halfmap.steps.pick.candidates import Candidates, read_candidates
from halfmap.steps.pick.image import MicrographItem

if TYPE_CHECKING:
    from halfmap.data import MicrographSet
    from halfmap.engine import Context

FOLDER, CANDIDATES = "coordinates", "candidates"
MICROGRAPH, COORDINATES = "rlnMicrographName", "rlnMicrographCoordinates"
X, Y, SCORE = "rlnCoordinateX", "rlnCoordinateY", "rlnAutopickFigureOfMerit"
PROBABILITY, DIAMETER, AGREEMENT = "hmPickProbability", "hmParticleDiameter", "hmPickAgreement"
_CTF = {
    "defocus_u": "rlnDefocusU",
    "defocus_v": "rlnDefocusV",
    "defocus_angle": "rlnDefocusAngle",
    "voltage_kV": "rlnVoltage",
    "cs_mm": "rlnSphericalAberration",
    "amplitude_contrast": "rlnAmplitudeContrast",
}
_SUSPECT = "no Thon rings"


def list_micrographs(
    ctx: Context, micrographs: MicrographSet, *, use_ctf: bool = True
) -> list[MicrographItem]:
    """Every micrograph with its mask and its CTF, where the table has them.

    Raises
    ------
    TableError
        If a micrograph has no positive pixel size, or is listed twice, or a column of the CTF is missing.
    """
    if use_ctf:
        _refuse_half_a_ctf(micrographs)
    optics = {row["rlnOpticsGroup"]: row for row in micrographs.optics.to_dicts()}
    rows = micrographs.rows.to_dicts()
    keys = unique_stems([row[MICROGRAPH] for row in rows], table=micrographs.path)
    items = []
    for number, row in enumerate(rows, start=1):
        settings = optics[row["rlnOpticsGroup"]] | {k: v for k, v in row.items() if v is not None}
        size = settings.get("rlnMicrographPixelSize") or settings.get("rlnMicrographOriginalPixelSize")
        if size is None or not (math.isfinite(size) and size > 0):
            hint = "import the micrographs with the microscope's settings"
            message = "has no rlnMicrographPixelSize that is a positive number"
            raise TableError(message, path=micrographs.path, row=number, hint=hint)
        name = row[MICROGRAPH]
        mask = row.get("hmMicrographMask")
        items.append(
            MicrographItem(
                name=name,
                key=keys[number - 1],
                path=ctx.resolve(name),
                pixel_size=float(size),
                mask=None if mask in (None, "", "None") else ctx.resolve(str(mask)),
                optics=_optics(settings) if use_ctf else None,
            )
        )
    without = sum(item.optics is None for item in items)
    if use_ctf and without:
        log.warning("%d of %d micrographs have no CTF and are picked without it", without, len(items))
    return items


def _refuse_half_a_ctf(micrographs: MicrographSet) -> None:
    """Refuse a table with a defocus but without all else that a CTF needs."""
    missing = [
        name for name in _CTF.values() if name not in {*micrographs.rows.columns, *micrographs.optics.columns}
    ]
    if missing and not {"rlnDefocusU", "rlnDefocusV"} <= set(missing):
        hint = "estimate the CTF again, or pick with --no-use-ctf"
        raise TableError(f"has a defocus but no {', '.join(missing)}", path=micrographs.path, hint=hint)


def _optics(settings: dict[str, Any]) -> dict[str, Any] | None:
    values = {name: settings.get(label) for name, label in _CTF.items()}
    if any(value is None or not math.isfinite(value) for value in values.values()):
        return None
    if _SUSPECT in str(settings.get("hmCtfProblem", "")):
        return None
    values["phase_shift"] = settings.get("rlnPhaseShift") or 0.0
    return {name: float(value) for name, value in values.items() if value is not None}


def gather(ctx: Context, done: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of all candidates of a job, the number of each one's micrograph from 0, and scores of noise."""
    scores, null = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    for row in done:
        candidates, noise = read_candidates(ctx.folder / CANDIDATES / f"{row['key']}.npz")
        scores.append(candidates.score)
        null.append(noise)
    number = np.repeat(np.arange(len(done)), [len(part) for part in scores[1:]])
    return np.concatenate(scores), number, np.concatenate(null)


def picks_of(candidates: Candidates, calibration: Calibration, diameter: float) -> pl.DataFrame:
    """Table of the candidates above the threshold, with their probabilities."""
    chosen = candidates.select(calibration.picks(candidates.score))
    columns: dict[str, Any] = {
        X: chosen.x.astype(np.float64).round(2),
        Y: chosen.y.astype(np.float64).round(2),
        SCORE: chosen.score.astype(np.float64).round(4),
        PROBABILITY: calibration.of(chosen.score).round(4),
        DIAMETER: np.full(len(chosen), round(diameter, 1))
        if chosen.diameter is None
        else chosen.diameter.astype(np.float64).round(1),
    }
    if chosen.angle is not None:
        columns["rlnAnglePsi"] = chosen.angle.astype(np.float64).round(2)
    if chosen.reference is not None:
        columns["rlnClassNumber"] = chosen.reference.astype(np.int64)
    return pl.DataFrame(columns)


def write_picks(ctx: Context, picks: dict[str, tuple[str, pl.DataFrame]]) -> pl.DataFrame:
    """Write a table of coordinates per micrograph, and the one that names them.

    Parameters
    ----------
    ctx : Context
        Of the job.
    picks : dict
        Key of each micrograph's files and its picks, by name.

    Returns
    -------
    DataFrame
        Names of micrographs and tables, picks, and how many of them are false on average.
    """
    (ctx.folder / FOLDER).mkdir(exist_ok=True)
    rows = []
    for name, (key, table) in picks.items():
        path = ctx.folder / FOLDER / f"{key}.star"
        write_coordinates(path, table, durable=False)
        false = float((1 - table[PROBABILITY]).sum()) if len(table) else 0.0
        rows.append((name, ctx.relative(path), len(table), round(false, 2)))
    labels = [MICROGRAPH, COORDINATES, "hmPicks", "hmPicksFalse"]
    types = [pl.String, pl.String, pl.Int64, pl.Float64]
    table = pl.DataFrame(rows, schema=dict(zip(labels, types, strict=True)), orient="row")
    write_star(ctx.folder / "autopick.star", {"coordinate_files": table})
    return table
