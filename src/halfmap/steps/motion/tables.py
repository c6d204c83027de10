"""From the table of movies to that of micrographs."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from statistics import median
from typing import TYPE_CHECKING, Any

import polars as pl

from halfmap.data import MicrographSet, MovieSet
from halfmap.errors import ParameterError, TableError
from halfmap.io.names import unique_stems
from halfmap.log import log
from halfmap.steps.motion import sums
from halfmap.steps.motion.frames import EER_GROUPING, EER_UPSAMPLING
from halfmap.steps.motion.movie import FEWEST_FRAMES, NO_SIGNAL, MovieItem

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
_SUFFIXES = ("_EVN", "_ODD", "_noDW", "_PS")
"""A movie whose name ends so would write over another one's sums."""

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
    keys = unique_keys([row["rlnMicrographMovieName"] for row in rows], path=movies.path)
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
        grouping, upsampling = _eer_settings(name, settings)
        items.append(
            MovieItem(
                name=name,
                key=keys[number - 1],
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
                eer_grouping=grouping,
                eer_upsampling=upsampling,
            )
        )
    _check_for_all(step, items, movies.path)
    return items


def _check_for_all(step: MotionStep, items: list[MovieItem], table: Path | None) -> None:
    """Refuse at once what would fail every movie, one by one.

    Raises
    ------
    TableError
        If a gain reference or defect file is missing.
    ParameterError
        If no movie has the frames that are asked for.
    """
    for path in sorted({path for item in items for path in (item.gain_path, item.defect_path) if path}):
        if not path.exists():
            message = f"names {path} as gain reference or defects, and there is no such file"
            raise TableError(message, path=table, hint="put it there, or import the movies anew")
    if not all(item.size for item in items):
        return  # each movie will say what it has
    longest = max(item.n_frames for item in items)
    last = step.last_frame or longest
    if last > longest or last - step.first_frame + 1 < FEWEST_FRAMES:
        end = f" --last-frame {last}" if step.last_frame else ""
        raise ParameterError(
            f"--first-frame {step.first_frame}{end} leaves no movie {FEWEST_FRAMES} frames to align",
            path=table,
            hint=f"they have {longest}",
        )


def tabulate(step: MotionStep, ctx: Context, movies: MovieSet, done: list[dict[str, Any]]) -> MicrographSet:
    """Make the table of micrographs: optics with the new pixel size, a row for each movie corrected."""
    by_name = {row["name"]: row for row in done}
    kept = movies.rows.filter(pl.col("rlnMicrographMovieName").is_in(list(by_name)))
    rows = [by_name[name] for name in kept["rlnMicrographMovieName"]]
    groups = kept["rlnOpticsGroup"].to_list()
    stretch = max((row["stretch"] for row in rows), key=abs)
    if abs(stretch) > sums.ALIKE:
        log.warning(
            "at binning %g no micrograph of this size has square pixels; they are %.2f %% %s along y than x",
            step.binning,
            100 * abs(stretch),
            "longer" if stretch > 0 else "shorter",
        )
    # Frames of one group are of one size, and so binned alike.
    binning = {group: row["binning"] for group, row in zip(groups, rows, strict=True)}
    optics = movies.optics.with_columns(
        pl.Series(
            "rlnMicrographPixelSize",
            [
                row["rlnMicrographOriginalPixelSize"] * binning.get(row["rlnOpticsGroup"], step.binning)
                for row in movies.optics.to_dicts()
            ],
        )
    )
    if step.dose_per_frame is not None:
        optics = optics.with_columns(pl.lit(step.dose_per_frame).alias("rlnMicrographDoseRate"))
    columns: dict[str, list[Any]] = {}
    for key, label in _FILES.items():
        if key in rows[0]:
            columns[label] = [ctx.relative(ctx.folder / row[key]) for row in rows]
    for key, label in _FIGURES.items():
        if all(row[key] is not None for row in rows):
            columns[label] = [row[key] for row in rows]
    table = pl.DataFrame(columns)
    # Sizes are those of the movies.
    sizes = ("rlnImageSizeX", "rlnImageSizeY", "rlnImageSizeZ")
    carried = kept.drop([label for label in (*columns, *sizes) if label in kept.columns])
    return MicrographSet(optics, pl.concat([table, carried], how="horizontal"))


def _eer_settings(name: str, settings: dict[str, Any]) -> tuple[int | None, int | None]:
    """How an EER movie is to be read; None for other movies, whatever their optics group says."""
    if PurePosixPath(name).suffix.lower() != ".eer":
        return None, None
    grouping, upsampling = settings.get("rlnEERGrouping"), settings.get("rlnEERUpsampling")
    return (
        EER_GROUPING if grouping is None else int(grouping),
        EER_UPSAMPLING if upsampling is None else int(upsampling),
    )


def report(done: list[dict[str, Any]]) -> None:
    """Say how the movies moved, and which of them hardly correlate."""
    middle = {key: median(row[key] for row in done) for key in ("total", "early", "error")}
    log.info(
        "%d movies moved along %.1f Å (%.1f early), standard error %.2f Å (medians)",
        len(done),
        *middle.values(),
    )
    guesses = [row["name"] for row in done if row["peak_height"] < NO_SIGNAL]
    if guesses:
        log.warning(
            "%d of %d movies hardly correlate and their motion is a guess: hmFrameCorrelation below %g, %s",
            len(guesses),
            len(done),
            NO_SIGNAL,
            ", ".join(guesses[:5]) + (", …" if len(guesses) > 5 else ""),
        )


def _size(settings: dict[str, Any]) -> tuple[int, int, int] | None:
    """(frames, y, x) as the table states it; RELION's own tables of movies do not."""
    sizes = [settings.get(f"rlnImageSize{axis}") for axis in "ZYX"]
    return None if None in sizes else (int(sizes[0]), int(sizes[1]), int(sizes[2]))  # pyright: ignore[reportArgumentType]


def unique_keys(names: list[str], *, path: Path | None = None) -> list[str]:
    """Names of micrographs: those of the movies, with folder or ending where two would be the same.

    Raises
    ------
    TableError
        If a movie is listed twice.
    """
    keys = unique_stems(names, table=path)
    return [
        f"{number:06d}_{key}" if key.endswith(_SUFFIXES) else key for number, key in enumerate(keys, start=1)
    ]
