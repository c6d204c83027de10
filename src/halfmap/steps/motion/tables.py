"""From the table of movies to that of micrographs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from halfmap.data import MicrographSet, MovieSet
from halfmap.errors import TableError
from halfmap.steps.motion.movie import MovieItem, binned_shape

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.motion.step import MotionStep

_FILES = {
    "PS": "rlnCtfPowerSpectrum",
    "noDW": "rlnMicrographNameNoDW",
    "EVN": "rlnMicrographNameEven",
    "ODD": "rlnMicrographNameOdd",
    "micrograph": "rlnMicrographName",
    "tracks": "rlnMicrographMetadata",
}
_FIGURES = {
    "total": "rlnAccumMotionTotal",
    "early": "rlnAccumMotionEarly",
    "late": "rlnAccumMotionLate",
    "spread": "hmLocalMotion",
    "error": "hmMotionUncertainty",
    "misfit": "hmMotionMisfit",
    "peak_height": "hmFrameCorrelation",
    "bad_pixels": "hmBadPixels",
}
_NEEDED = ("rlnMicrographOriginalPixelSize", "rlnVoltage")


def list_movies(step: MotionStep, ctx: Context, movies: MovieSet) -> list[MovieItem]:
    """Every movie with the settings of its optics group.

    Raises
    ------
    TableError
        If the table lacks a setting, or a size.
    """
    optics = {row["rlnOpticsGroup"]: row for row in movies.optics.to_dicts()}
    rows = movies.rows.to_dicts()
    stems = Counter(_stem(row["rlnMicrographMovieName"]) for row in rows)
    items = []
    for number, row in enumerate(rows, start=1):
        group = optics[row["rlnOpticsGroup"]]
        settings = group | {key: value for key, value in row.items() if value is not None}
        name = row["rlnMicrographMovieName"]
        gain, defects = settings.get("rlnMicrographGainName"), settings.get("rlnMicrographDefectFile")
        dose = step.dose_per_frame or settings.get("rlnMicrographDoseRate")
        if dose is None or not dose > 0:
            raise TableError(
                "does not state the dose per frame",
                path=movies.path,
                row=number,
                hint="give --dose-per-frame",
            )
        for label in _NEEDED:
            if settings.get(label) is None:
                raise TableError(
                    f"has no {label}", path=movies.path, row=number, hint="import the movies anew"
                )
        items.append(
            MovieItem(
                name=name,
                key=_key(name, unique=stems[_stem(name)] == 1),
                path=ctx.resolve(name),
                size=_size(settings),
                pixel_size=float(settings["rlnMicrographOriginalPixelSize"]),
                dose_per_frame=float(dose),
                pre_exposure=float(settings.get("rlnMicrographPreExposure") or 0.0),
                voltage_kV=float(settings["rlnVoltage"]),
                gain=gain,
                gain_path=ctx.resolve(gain) if gain else None,
                defects=defects,
                defect_path=ctx.resolve(defects) if defects else None,
                eer_grouping=settings.get("rlnEERGrouping"),
                eer_upsampling=settings.get("rlnEERUpsampling"),
            )
        )
    return items


def tabulate(
    step: MotionStep, ctx: Context, movies: MovieSet, done: list[dict[str, Any]], items: list[MovieItem]
) -> MicrographSet:
    """Make the table of micrographs: optics with the new pixel size, a row for each movie corrected."""
    shapes = {item.name: item.size for item in items}
    binning = step.binning
    first = next((shapes[row["name"]] for row in done if shapes[row["name"]]), None)
    if first is not None:
        binning = binned_shape((first[1], first[2]), step.binning)[1]
    optics = movies.optics.with_columns(
        (pl.col("rlnMicrographOriginalPixelSize") * binning).alias("rlnMicrographPixelSize")
    )
    if step.dose_per_frame is not None:
        optics = optics.with_columns(pl.lit(step.dose_per_frame).alias("rlnMicrographDoseRate"))
    by_name = {row["name"]: row for row in done}
    kept = movies.rows.filter(pl.col("rlnMicrographMovieName").is_in(list(by_name)))
    rows = [by_name[name] for name in kept["rlnMicrographMovieName"]]
    columns: dict[str, list[Any]] = {}
    for key, label in _FILES.items():
        if key in rows[0]:
            columns[label] = [ctx.relative(row[key]) for row in rows]
    for key, label in _FIGURES.items():
        columns[label] = [row[key] for row in rows]
    table = pl.DataFrame(columns)
    # Sizes are those of the movies.
    sizes = ("rlnImageSizeX", "rlnImageSizeY", "rlnImageSizeZ")
    carried = kept.drop([label for label in (*columns, *sizes) if label in kept.columns])
    return MicrographSet(optics, pl.concat([table, carried], how="horizontal"))


def _size(settings: dict[str, Any]) -> tuple[int, int, int] | None:
    """(frames, y, x) as the table states it; RELION's own tables of movies do not."""
    sizes = [settings.get(f"rlnImageSize{axis}") for axis in "ZYX"]
    return None if None in sizes else (int(sizes[0]), int(sizes[1]), int(sizes[2]))  # pyright: ignore[reportArgumentType]


def _stem(name: str) -> str:
    return Path(name).stem


def _key(name: str, *, unique: bool) -> str:
    """Name of a micrograph: that of the movie, with its folders where two movies would get the same."""
    path = Path(name).with_suffix("")
    return path.name if unique else "_".join(part for part in path.parts if part not in ("/", ".."))
