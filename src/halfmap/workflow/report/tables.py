"""What a report takes from the tables of a job; a table that cannot be read is as one that is not there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from halfmap.data.columns import COLUMNS
from halfmap.errors import HalfmapError
from halfmap.io.star import read_star
from halfmap.io.tables import read_micrographs, read_movies, read_particles
from halfmap.log import log

if TYPE_CHECKING:
    import polars as pl

BOUND = "\N{NO-BREAK SPACE}"
"""Between a number and its unit."""

_OF_PARTICLES = {"rlnMicrographName", "hmParticleDiameter", "rlnRandomSubset", "hmReason"}

_READERS = {"particles": read_particles, "micrographs": read_micrographs, "movies": read_movies}


class Listed(NamedTuple):
    """The optics groups and the rows of a table; of particles only the columns that a report needs."""

    optics: pl.DataFrame
    rows: pl.DataFrame


def read_set(path: Path, unit: str) -> Listed | None:
    """The movies, micrographs or particles of a table."""
    if not path.is_file():
        return None
    return _read_set(path, unit, path.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _read_set(path: Path, unit: str, _changed: int) -> Listed | None:
    # Tables of many particles take seconds to read, and are asked for again and again.
    try:
        found = _READERS[unit](path)
    except (HalfmapError, OSError) as error:
        log.warning("left out of the report: %s", error)
        return None
    rows = found.rows
    if unit == "particles":
        rows = rows.select({rows.columns[0]} | _OF_PARTICLES.intersection(rows.columns))
    return Listed(found.optics, rows)


def read_block(path: Path, block: str) -> pl.DataFrame | None:
    """A table of a STAR file."""
    import polars as pl

    found = _blocks(path).get(block)
    return found if isinstance(found, pl.DataFrame) else None


def read_pairs(path: Path, block: str) -> dict[str, Any]:
    """The single values of a STAR file's block."""
    found = _blocks(path).get(block)
    return found if isinstance(found, dict) else {}


def _blocks(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_star(path)
    except (HalfmapError, OSError) as error:
        log.warning("left out of the report: %s", error)
        return {}


def model_file(folder: Path) -> Path:
    """The model of a classification or refinement: Halfmap's, or RELION's, of its last iteration."""
    iterations = sorted(folder.glob("run_it[0-9][0-9][0-9]_model.star"))
    known = [folder / "model.star", folder / "run_model.star", *iterations[-1:]]
    return next((path for path in known if path.is_file()), known[0])


def numbers(rows: pl.DataFrame, label: str) -> pl.Series | None:
    """The finite numbers of a column; None if there are none."""
    import polars as pl

    if label not in rows.columns:
        return None
    values = rows[label].cast(pl.Float64, strict=False).drop_nulls()
    values = values.filter(values.is_finite())
    return values if len(values) else None


def middle(rows: pl.DataFrame, label: str, scale: float = 1.0) -> float | None:
    """Median of a column."""
    values = numbers(rows, label)
    found = None if values is None else values.median()
    return None if found is None else scale * float(found)  # pyright: ignore[reportArgumentType]


def spread(rows: pl.DataFrame, label: str, unit: str, scale: float = 1.0) -> str | None:
    """Median of a column, and from where to where it goes."""
    values = numbers(rows, label)
    if values is None:
        return None
    low, mid, high = (short(scale * float(values.quantile(q, "linear") or 0.0)) for q in (0, 0.5, 1))
    if low == high:
        return f"{mid}{BOUND}{unit}".strip()
    return f"median {mid}, {low} to {high}{BOUND}{unit}".strip()


def spread_with_error(rows: pl.DataFrame, label: str, error: str, unit: str) -> str | None:
    """The same with the median standard error, of the column `error`, or that it is not known."""
    found = spread(rows, label, unit)
    if found is None:
        return None
    known = middle(rows, error)
    said = "not known" if known is None else f"{short(known)}{BOUND}{unit}".strip()
    return f"{found}; standard error {said}"


def described(pairs: dict[str, Any], labels: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """Single values of a table with the meanings of their columns.

    Parameters
    ----------
    pairs : dict
        Values by label.
    labels : sequence of str, optional
        Those wanted; default: all that are known.
    """
    rows = []
    for label in labels or pairs:
        column, value = COLUMNS.get(label), pairs.get(label)
        if column is None or value is None or value != value:
            continue
        unit = "" if column.unit == "none" else f" {column.unit}"
        shown = short(value) if isinstance(value, float) else str(value)
        rows.append((column.meaning, shown + unit))
    return rows


def short(value: float) -> str:
    """A number to three or four digits, with its thousands told apart."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"


def resolution(value: float) -> str:
    """A resolution in Å."""
    return f"{value:.2f}{BOUND}Å" if value < 10 else f"{value:.1f}{BOUND}Å"
