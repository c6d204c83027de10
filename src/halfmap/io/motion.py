"""Read and write a movie's estimated motion as STAR, as RELION's polishing reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from halfmap.data.motion import N_COEFFICIENTS, MotionTracks
from halfmap.errors import FileFormatError, TableError
from halfmap.io.star import Block, read_star, write_star

_NOT_USED = -9999.0
"""RELION's shift of a frame that was left out."""

_FRAME = "rlnMicrographFrameNumber"
_PLACE = ("rlnCoordinateX", "rlnCoordinateY")
_SHIFT = ("rlnMicrographShiftX", "rlnMicrographShiftY")
_ERROR = "hmShiftError"
_COEFFICIENT = ("rlnMotionModelCoeffsIdx", "rlnMotionModelCoeff")
_SIZE = ("rlnImageSizeY", "rlnImageSizeX", "rlnImageSizeZ")


def write_tracks(path: str | Path, tracks: MotionTracks) -> None:
    """Write a movie's motion as STAR, for rlnMicrographMetadata of its micrograph.

    RELION reads the blocks `general`, `global_shift`, `local_motion_model` and `hot_pixels`; what is
    Halfmap's own stands in blocks that it passes over: the errors of the global shifts, the grid of the local
    model, and in `local_shift` the shifts of the patches.

    Raises
    ------
    TableError
        If a value cannot be written.
    """
    height, width = tracks.shape
    general: dict[str, str | int | float] = {
        "rlnImageSizeX": width,
        "rlnImageSizeY": height,
        "rlnImageSizeZ": tracks.n_frames,
        "rlnMicrographMovieName": tracks.movie,
    }
    if tracks.gain is not None:
        general["rlnMicrographGainName"] = tracks.gain
    if tracks.defects is not None:
        general["rlnMicrographDefectFile"] = tracks.defects
    general |= {
        "rlnMicrographBinning": float(tracks.binning),
        "rlnMicrographOriginalPixelSize": float(tracks.pixel_size),
        "rlnMicrographDoseRate": float(tracks.dose_per_frame),
        "rlnMicrographPreExposure": float(tracks.pre_exposure),
        "rlnVoltage": float(tracks.voltage_kV),
        "rlnMicrographStartFrame": tracks.first_frame,
        "rlnMicrographEndFrame": tracks.last_frame,
    }
    if tracks.eer_upsampling is not None:
        general["rlnEERUpsampling"] = tracks.eer_upsampling
    if tracks.eer_grouping is not None:
        general["rlnEERGrouping"] = tracks.eer_grouping
    general["rlnMotionModelVersion"] = 0 if tracks.local_coefficients is None else 1
    blocks: dict[str, Block] = {"general": general, "global_shift": _global_table(tracks)}
    if tracks.local_coefficients is not None:
        values = np.asarray(tracks.local_coefficients, np.float64).ravel()
        indices = np.arange(2 * N_COEFFICIENTS)
        blocks["local_motion_model"] = pl.DataFrame(dict(zip(_COEFFICIENT, (indices, values), strict=True)))
    tables = {
        "hot_pixels": _columns(_PLACE, np.asarray(tracks.hot_pixels, np.float64)),
        "local_shift": _patch_table(tracks),
        "halfmap_global_error": pl.DataFrame(
            {_FRAME: _frames(tracks), _ERROR: np.asarray(tracks.global_error, np.float64)}
        ),
        "halfmap_local_grid": _grid_table(tracks),
    }
    # RELION takes the rows of the next block for those of an empty one.
    blocks |= {name: table for name, table in tables.items() if table.height}
    write_star(path, blocks)


def read_tracks(path: str | Path) -> MotionTracks:
    """Read a movie's motion: Halfmap's own files, and RELION's.

    Raises
    ------
    FileFormatError
        If the file cannot be read or does not hold a motion.
    TableError
        If a block or a column is missing, or frames and shifts do not belong together.
    """
    path = Path(path)
    blocks = read_star(path)
    general = blocks.get("general")
    if not isinstance(general, dict) or "global_shift" not in blocks:
        hint = "give a file of rlnMicrographMetadata"
        raise FileFormatError("holds no motion of a movie", path=path, hint=hint)
    needed = (*_SIZE, "rlnMicrographMovieName", "rlnMicrographOriginalPixelSize")
    missing = [label for label in needed if label not in general]
    if missing:
        raise TableError(f"has no _{missing[0]} in block data_general", path=path)
    height, width, n_frames = (int(general[label]) for label in _SIZE)
    first, shifts = _read_global(path, blocks, general, n_frames)
    used = range(first, first + len(shifts))
    grid, grid_error = _read_grid(path, blocks, used)
    centres, patch_shifts, patch_errors = _read_patches(path, blocks, used)
    error = np.full(len(used), np.nan)
    if "halfmap_global_error" in blocks:
        numbers, values = _arrays(path, blocks, "halfmap_global_error", [_FRAME], [_ERROR])
        error[_places(path, "halfmap_global_error", numbers[:, 0], used)] = values[:, 0]
    hot = np.zeros((0, 2), np.int32)
    if "hot_pixels" in blocks:
        hot = _arrays(path, blocks, "hot_pixels", [], _PLACE)[1].astype(np.int32)
    return MotionTracks(
        movie=str(general["rlnMicrographMovieName"]),
        shape=(height, width),
        n_frames=n_frames,
        first_frame=first,
        last_frame=used[-1],
        pixel_size=float(general["rlnMicrographOriginalPixelSize"]),
        dose_per_frame=float(general.get("rlnMicrographDoseRate", np.nan)),
        pre_exposure=float(general.get("rlnMicrographPreExposure", 0)),
        voltage_kV=float(general.get("rlnVoltage", np.nan)),
        binning=float(general.get("rlnMicrographBinning", 1)),
        gain=_optional(general, "rlnMicrographGainName", str),
        defects=_optional(general, "rlnMicrographDefectFile", str),
        eer_grouping=_optional(general, "rlnEERGrouping", int),
        eer_upsampling=_optional(general, "rlnEERUpsampling", int),
        global_shift=shifts,
        global_error=error,
        local_coefficients=_read_coefficients(path, blocks, general),
        local_grid=grid,
        local_error=grid_error,
        patch_centres=centres,
        patch_shifts=patch_shifts,
        patch_errors=patch_errors,
        hot_pixels=hot,
    )


def _frames(tracks: MotionTracks) -> NDArray:
    return np.arange(tracks.first_frame, tracks.last_frame + 1)


def _columns(names: tuple[str, ...], values: NDArray) -> pl.DataFrame:
    return pl.DataFrame({name: np.ascontiguousarray(values[:, i]) for i, name in enumerate(names)})


def _global_table(tracks: MotionTracks) -> pl.DataFrame:
    shifts = np.full((tracks.n_frames, 2), _NOT_USED)
    shifts[tracks.first_frame - 1 : tracks.last_frame] = tracks.global_shift
    numbers = pl.Series(_FRAME, np.arange(1, tracks.n_frames + 1))
    return _columns(_SHIFT, shifts).insert_column(0, numbers)


def _patch_table(tracks: MotionTracks) -> pl.DataFrame:
    n = tracks.n_used
    shifts = tracks.patch_shifts.reshape(-1, 2)
    observed = np.isfinite(shifts).all(axis=1)
    values = np.column_stack(
        [np.repeat(tracks.patch_centres, n, axis=0), shifts, tracks.patch_errors.reshape(-1)]
    )
    numbers = np.tile(_frames(tracks), len(tracks.patch_centres))
    table = _columns((*_PLACE, *_SHIFT, _ERROR), values[observed].astype(np.float64))
    return table.insert_column(0, pl.Series(_FRAME, numbers[observed]))


def _grid_table(tracks: MotionTracks) -> pl.DataFrame:
    if tracks.local_grid is None or tracks.local_error is None:
        return pl.DataFrame()
    gy, gx = tracks.local_grid.shape[1:3]
    height, width = tracks.shape
    nodes = np.meshgrid(
        _frames(tracks), np.linspace(0, height - 1, gy), np.linspace(0, width - 1, gx), indexing="ij"
    )
    numbers, y, x = (values.reshape(-1) for values in nodes)
    values = [x, y, *tracks.local_grid.reshape(-1, 2).T, tracks.local_error.reshape(-1)]
    table = _columns((*_PLACE, *_SHIFT, _ERROR), np.column_stack(values).astype(np.float64))
    return table.insert_column(0, pl.Series(_FRAME, numbers))


def _optional(general: dict[str, Any], label: str, kind: type) -> Any:
    value = general.get(label)
    return None if value is None or value == "" else kind(value)


def _arrays(
    path: Path, blocks: dict[str, Any], name: str, whole: Sequence[str], real: Sequence[str]
) -> tuple[NDArray, NDArray]:
    """Columns of whole numbers (rows, n), and of real ones (rows, n), of one block."""
    table = blocks[name]
    labels = set(table.columns) if isinstance(table, pl.DataFrame) else set()
    missing = [label for label in (*whole, *real) if label not in labels]
    if missing:
        raise TableError(f"has no column _{missing[0]} in block data_{name}", path=path)
    return table.select(whole).to_numpy().astype(np.int64), table.select(real).to_numpy().astype(np.float64)


def _places(path: Path, name: str, numbers: NDArray, used: range) -> NDArray:
    """Index of each frame number among the used frames."""
    wrong = (numbers < used.start) | (numbers >= used.stop)
    if wrong.any():
        row = int(np.argmax(wrong))
        message = (
            f"frame {numbers[row]} of block data_{name} is not one of the frames {used[0]} to {used[-1]}"
        )
        raise TableError(message, path=path, row=row + 1)
    return numbers - used.start


def _read_global(
    path: Path, blocks: dict[str, Any], general: dict[str, Any], n_frames: int
) -> tuple[int, NDArray]:
    """First used frame, from 1, and the shifts of it and all after it."""
    numbers, values = _arrays(path, blocks, "global_shift", [_FRAME], _SHIFT)
    shifts = np.full((n_frames, 2), _NOT_USED)
    shifts[_places(path, "global_shift", numbers[:, 0], range(1, n_frames + 1))] = values
    used = np.flatnonzero((shifts != _NOT_USED).all(axis=1))
    if used.size == 0:
        raise TableError("has no shift of any frame in block data_global_shift", path=path)
    # The polynomial counts from the first frame that is stated.
    first = int(general.get("rlnMicrographStartFrame", used[0] + 1))
    chosen = shifts[first - 1 : used[-1] + 1]
    lacking = np.flatnonzero((chosen == _NOT_USED).any(axis=1))
    if not 1 <= first <= used[-1] + 1 or lacking.size:
        number = first + int(lacking[0]) if lacking.size else first
        raise TableError(f"has no shift of frame {number} in block data_global_shift", path=path)
    return first, chosen


def _read_coefficients(path: Path, blocks: dict[str, Any], general: dict[str, Any]) -> NDArray | None:
    version = int(general.get("rlnMotionModelVersion", 0))
    if version == 0:
        return None
    if version != 1:
        raise FileFormatError(f"has a motion model of the unknown version {version}", path=path)
    if "local_motion_model" not in blocks:
        raise TableError("has no block data_local_motion_model", path=path)
    index, value = _arrays(path, blocks, "local_motion_model", _COEFFICIENT[:1], _COEFFICIENT[1:])
    if sorted(index[:, 0]) != list(range(2 * N_COEFFICIENTS)):
        message = (
            f"block data_local_motion_model does not hold the coefficients 0 to {2 * N_COEFFICIENTS - 1}"
        )
        raise TableError(message, path=path)
    return value[np.argsort(index[:, 0]), 0].reshape(2, N_COEFFICIENTS)


def _read_grid(path: Path, blocks: dict[str, Any], used: range) -> tuple[NDArray | None, NDArray | None]:
    """Shifts at the nodes of every frame, and their errors."""
    name = "halfmap_local_grid"
    if name not in blocks:
        return None, None
    numbers, values = _arrays(path, blocks, name, [_FRAME], (*_PLACE, *_SHIFT, _ERROR))
    place = _places(path, name, numbers[:, 0], used)
    x, y = values[:, 0], values[:, 1]
    nodes = (len(used), len(np.unique(y)), len(np.unique(x)))
    order = np.lexsort([x, y, place])
    if len(values) != np.prod(nodes) or len(np.unique(np.column_stack([place, y, x]), axis=0)) != len(values):
        raise TableError(f"block data_{name} is not a whole grid for every frame", path=path)
    values = values[order]
    return values[:, 2:4].reshape(*nodes, 2), values[:, 4].reshape(nodes)


def _read_patches(path: Path, blocks: dict[str, Any], used: range) -> tuple[NDArray, NDArray, NDArray]:
    """Centres, shifts and errors of the patches; NaN where a frame has none."""
    name = "local_shift"
    if name not in blocks or not blocks[name].height:
        return np.zeros((0, 2)), np.zeros((0, len(used), 2)), np.zeros((0, len(used)))
    numbers, values = _arrays(path, blocks, name, [_FRAME], (*_PLACE, *_SHIFT))
    place = _places(path, name, numbers[:, 0], used)
    centres, first, patch = np.unique(values[:, :2], axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), int)
    rank[order] = np.arange(len(order))
    patch = rank[patch.reshape(-1)]
    shifts = np.full((len(centres), len(used), 2), np.nan)
    errors = np.full((len(centres), len(used)), np.nan)
    shifts[patch, place] = values[:, 2:]
    if _ERROR in blocks[name].columns:
        errors[patch, place] = blocks[name][_ERROR].to_numpy()
    return centres[order], shifts, errors
