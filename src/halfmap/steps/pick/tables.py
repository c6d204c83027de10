"""From the table of micrographs to tables of coordinates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from halfmap.engine.decisions import digest
from halfmap.errors import ItemsFailedError
from halfmap.io.atomic import write_text
from halfmap.io.coordinates import write_coordinates
from halfmap.io.star import read_star, write_star
from halfmap.log import log
from halfmap.steps.pick.calibrate import Calibration
from halfmap.steps.pick.candidates import Candidates, read_candidates

if TYPE_CHECKING:
    from halfmap.engine import Context

FOLDER, CANDIDATES, LIST = "coordinates", "candidates", "autopick.star"
MICROGRAPH, COORDINATES = "rlnMicrographName", "rlnMicrographCoordinates"
X, Y, SCORE = "rlnCoordinateX", "rlnCoordinateY", "rlnAutopickFigureOfMerit"
PROBABILITY, DIAMETER, AGREEMENT = "hmPickProbability", "hmParticleDiameter", "hmPickAgreement"
_PICKED = "picked.json"

_BESIDE = 100
"""Micrographs with picks that are looked at again to find the threshold of new ones."""


def picked_before(ctx: Context, searched: Mapping[str, str]) -> dict[str, tuple[str, str, int, float]]:
    """Rows of the table of an earlier run, by name, of micrographs that were not searched anew since.

    What was noted of them is taken away: who is killed before `note_picked` picks all anew.

    Parameters
    ----------
    ctx : Context
        Of the job.
    searched : mapping
        By name, as what each micrograph has been searched.
    """
    path, noted = ctx.folder / LIST, ctx.folder / _PICKED
    if not (path.exists() and noted.exists()):
        return {}
    table = read_star(path)["coordinate_files"]
    picked = json.loads(noted.read_text(encoding="utf-8"))
    noted.unlink()
    rows = table.iter_rows() if isinstance(table, pl.DataFrame) else ()
    return {row[0]: row for row in rows if row[0] in searched and picked.get(row[0]) == searched[row[0]]}


def note_picked(ctx: Context, searched: Mapping[str, str]) -> None:
    """Note from which search of each micrograph, by name, the picks are, when all of them are written."""
    write_text(ctx.folder / _PICKED, json.dumps(dict(searched)))


def calibrated_by(done: list[dict[str, Any]], before: Mapping[str, object]) -> list[dict[str, Any]]:
    """Micrographs whose scores the threshold of those without picks is found by: with them, some others."""
    others = [i for i, row in enumerate(done) if row["name"] in before]
    places = np.linspace(0, len(others) - 1, min(_BESIDE, len(others))).round().astype(int)
    chosen = {others[i] for i in places.tolist()}
    return [row for i, row in enumerate(done) if i in chosen or row["name"] not in before]


def gather(ctx: Context, done: list[dict[str, Any]]) -> tuple[list[Candidates], np.ndarray, np.ndarray]:
    """Candidates of each micrograph, the number of each candidate's from 0, and scores of noise."""
    pairs = [read_candidates(ctx.folder / CANDIDATES / f"{row['key']}.npz") for row in done]
    candidates = [found for found, _ in pairs]
    number = np.repeat(np.arange(len(done)), [len(found) for found in candidates])
    return candidates, number, np.concatenate([noise for _, noise in pairs])


def say_picks(calibration: Calibration) -> None:
    """Say how many picks there are, how many are false, and how many particles are missed."""
    log.info(
        "%d picks, %.1f of them false on average; about %.0f particles below the threshold",
        calibration.picked,
        calibration.expected_false,
        calibration.missed,
    )


def version_of_picks(table: pl.DataFrame) -> str:
    """By what the picks of a micrograph are known again."""
    return digest([table.write_csv()])


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


def write_picks(
    ctx: Context,
    picks: dict[str, tuple[str, pl.DataFrame]],
    names: Sequence[str] | None = None,
    before: Mapping[str, tuple[str, str, int, float]] | None = None,
) -> pl.DataFrame:
    """Write a table of coordinates per micrograph, and the one that names them.

    Parameters
    ----------
    ctx : Context
        Of the job.
    picks : dict
        Key of each micrograph's files and its picks, by name.
    names : sequence of str, optional
        All micrographs in the order of the table; default: those of `picks`.
    before : mapping, optional
        Rows of those that have their picks already, by name.

    Returns
    -------
    DataFrame
        Names of micrographs and tables, picks, and how many of them are false on average.
    """
    (ctx.folder / FOLDER).mkdir(exist_ok=True)
    made = dict(before or {})
    for name, (key, table) in picks.items():
        path = ctx.folder / FOLDER / f"{key}.star"
        write_coordinates(path, table, durable=False)
        false = float((1 - table[PROBABILITY]).sum()) if len(table) else 0.0
        made[name] = (name, ctx.relative(path), len(table), round(false, 2))
    rows = [made[name] for name in names or picks]
    labels = [MICROGRAPH, COORDINATES, "hmPicks", "hmPicksFalse"]
    types = [pl.String, pl.String, pl.Int64, pl.Float64]
    table = pl.DataFrame(rows, schema=dict(zip(labels, types, strict=True)), orient="row")
    write_star(ctx.folder / LIST, {"coordinate_files": table})
    return table


def refuse_nothing(table: pl.DataFrame) -> None:
    """End a job that has found nothing, when all is written that shows why.

    Raises
    ------
    ItemsFailedError
        If no micrograph of the table that `write_picks` gave has a pick.
    """
    if table["hmPicks"].sum() == 0:
        micrographs = "the micrograph" if len(table) == 1 else f"any of the {len(table)} micrographs"
        raise ItemsFailedError(
            f"there is no pick in {micrographs}",
            hint="look at summary.png and at the micrographs: if there are particles, pick with another "
            "--diameter, a lower --probability, or with templates; if there are none, this ice is empty",
        )
