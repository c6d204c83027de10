"""From columns to tensors and back: poses and CTF parameters of a table."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import polars as pl

from halfmap.data.columns import format_vector, parse_vector
from halfmap.data.optics import GROUP
from halfmap.errors import ShapeError, TableError

if TYPE_CHECKING:
    from torch import Tensor

    from halfmap.data import TableSet
    from halfmap.data.ctf import CTFParameters
    from halfmap.data.poses import Poses

    Set = TypeVar("Set", bound=TableSet)

_ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
_ORIGINS = ("rlnOriginXAngst", "rlnOriginYAngst")
_PIXEL_ORIGINS = ("rlnOriginX", "rlnOriginY")

OF_POSES = (
    "hmPoseUncertainty",
    "hmAngleViewError",
    "hmAnglePsiError",
    "hmOriginError",
    "hmShiftUncertainty",
    "rlnMaxValueProbDistribution",
    "rlnNrOfSignificantSamples",
    "rlnLogLikeliContribution",
)
"""What is said of poses, and no longer holds when others take their place."""

_ROW_CTF = {
    "defocus_u": "rlnDefocusU",
    "defocus_v": "rlnDefocusV",
    "defocus_angle": "rlnDefocusAngle",
    "phase_shift": "rlnPhaseShift",
    "b_factor": "rlnCtfBfactor",
    "scale": "rlnCtfScalefactor",
}
_OPTICS_CTF = {
    "voltage_kV": "rlnVoltage",
    "cs_mm": "rlnSphericalAberration",
    "amplitude_contrast": "rlnAmplitudeContrast",
}
_DEFAULTS = {"rlnPhaseShift": 0.0, "rlnCtfBfactor": 0.0, "rlnCtfScalefactor": 1.0}
_BEAM_TILT = ("rlnBeamTiltX", "rlnBeamTiltY")
_ZERNIKE = {"odd_zernike": "rlnOddZernike", "even_zernike": "rlnEvenZernike"}
_MAGNIFICATION = {"rlnMagMat00": 1.0, "rlnMagMat01": 0.0, "rlnMagMat10": 0.0, "rlnMagMat11": 1.0}

_DECIMALS_OF_FLOAT32 = 6  # of an angle in degrees: 1e-6 is 2e-8 rad


def poses(table: TableSet) -> Poses:
    """Poses of particles; see `ParticleSet.poses`."""
    import torch

    from halfmap.data.poses import Poses
    from halfmap.ops.rotations import from_euler

    # A table from 2D classification may hold psi alone.
    psi_only = "rlnAngleRot" not in table.rows.columns and "rlnAnglePsi" in table.rows.columns
    default = 0.0 if psi_only else None
    angles = np.stack([numbers(table, label, default) for label in _ANGLES], axis=1)
    if set(_PIXEL_ORIGINS) & set(table.rows.columns) and not set(_ORIGINS) & set(table.rows.columns):
        pixel_size = numbers(table, table.pixel_column)
        shifts = np.stack([numbers(table, label) * pixel_size for label in _PIXEL_ORIGINS], axis=1)
    else:
        shifts = np.stack([numbers(table, label, 0.0) for label in _ORIGINS], axis=1)
    return Poses(from_euler(torch.from_numpy(angles)).float(), torch.from_numpy(shifts).float())


def with_poses(table: Set, poses: Poses) -> Set:
    """Table with other poses; see `ParticleSet.with_poses`."""
    import torch

    from halfmap.ops.rotations import to_euler

    _check_length(table, len(poses), "poses")
    angles = to_euler(poses.rotations.double()).detach().cpu().numpy()
    if poses.rotations.dtype == torch.float32:
        angles = angles.round(_DECIMALS_OF_FLOAT32)
    shifts = _array(poses.shifts_A)
    columns = [pl.Series(label, angles[:, i]) for i, label in enumerate(_ANGLES)]
    columns += [pl.Series(label, shifts[:, i]) for i, label in enumerate(_ORIGINS)]
    rows = table.rows.with_columns(columns).drop(*_PIXEL_ORIGINS, *OF_POSES, strict=False)
    return replace(table, rows=rows)


def ctf(table: TableSet) -> CTFParameters:
    """CTF parameters of every row; see `ParticleSet.ctf`."""
    import torch

    from halfmap.data.ctf import CTFParameters

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.float32))

    names = _OPTICS_CTF | _ROW_CTF | {"pixel_size": table.pixel_column}
    values = {name: numbers(table, label, _DEFAULTS.get(label)) for name, label in names.items()}
    values |= _ordered_defocus(values["defocus_u"], values["defocus_v"], values["defocus_angle"])
    values["beam_tilt_mrad"] = np.stack([numbers(table, label, 0.0) for label in _BEAM_TILT], axis=1)
    values |= {name: vectors(table, label) for name, label in _ZERNIKE.items()}
    matrix = [numbers(table, label, default) for label, default in _MAGNIFICATION.items()]
    values["magnification"] = np.stack(matrix, axis=1).reshape(-1, 2, 2)
    return CTFParameters(**{name: tensor(array) for name, array in values.items()})


def with_ctf(table: Set, ctf: CTFParameters) -> Set:
    """Table with other CTF parameters; see `ParticleSet.with_ctf`."""
    _check_length(table, len(ctf), "CTFs")
    rows = table.rows.with_columns(
        pl.Series(label, _kept(table, label, getattr(ctf, name))) for name, label in _ROW_CTF.items()
    )
    tensors = {label: getattr(ctf, name) for name, label in (_OPTICS_CTF | _ZERNIKE).items()}
    tensors[table.pixel_column] = ctf.pixel_size
    tensors |= {label: ctf.beam_tilt_mrad[:, i] for i, label in enumerate(_BEAM_TILT)}
    tensors |= {label: ctf.magnification.flatten(1)[:, i] for i, label in enumerate(_MAGNIFICATION)}
    optics = table.optics
    for label, tensor in tensors.items():
        optics = _update_group(table, optics, label, _kept(table, label, tensor))
    return replace(table, rows=rows.drop(tensors, strict=False), optics=optics)


def _update_group(table: TableSet, optics: pl.DataFrame, label: str, values: np.ndarray) -> pl.DataFrame:
    """Optics with one column replaced by what its rows agree on; columns of defaults are not added."""
    default = _MAGNIFICATION.get(label, 0.0 if label in _BEAM_TILT else None)
    unwritten = values.size == 0 or (default is not None and bool(np.all(values == default)))
    if label not in optics.columns and unwritten:
        return optics
    groups = table.rows[GROUP].to_numpy()
    column: list[float | str | None] = (
        optics[label].to_list() if label in optics.columns else [None] * optics.height
    )
    for index, group in enumerate(optics[GROUP]):
        inside = values[groups == group]
        if not len(inside):
            continue
        if np.any(inside != inside[0]):
            raise TableError(
                f"_{label} differs within optics group {group}",
                path=table.path,
                hint="give particles of different optics groups of their own",
            )
        column[index] = _vector_text(column[index], inside[0]) if inside.ndim == 2 else inside[0].item()
    fill = "[]" if values.ndim == 2 else default
    return optics.with_columns(pl.Series(label, [fill if value is None else value for value in column]))


def _vector_text(old: float | str | None, values: np.ndarray) -> str:
    """Text of a vector; the old one if it says the same without the zeros that fill it up."""
    if isinstance(old, str):
        parsed = parse_vector(old)
        if parsed == values[: len(parsed)].tolist() and not values[len(parsed) :].any():
            return old
    return format_vector(values)


def _kept(table: TableSet, label: str, tensor: Tensor) -> np.ndarray:
    """Tensor as float64, with the table's own digits where it is that value in the tensor's precision."""
    array = _array(tensor)
    if label not in table.rows.columns and label not in table.optics.columns:
        return array
    old = vectors(table, label) if array.ndim == 2 else numbers(table, label)
    if old.shape != array.shape:
        return array
    return np.where(old.astype(np.float32) == array.astype(np.float32), old, array)


def _check_length(table: TableSet, n: int, what: str) -> None:
    if n != len(table):
        raise ShapeError(f"{n} {what} for {len(table)} {table.items}")


def numbers(table: TableSet, label: str, default: float | None = None) -> np.ndarray:
    """Column (n,) as float64, refused where a value is not finite."""
    series = table.column(label, default=default).cast(pl.Float64)
    finite = series.is_finite().fill_null(False)
    if not finite.all():
        row = finite.arg_min() or 0
        raise TableError(
            f"_{label} is {series[row]}",
            path=table.path,
            row=row + 1,
            hint=f"leave out {table.items} without a value",
        )
    return series.to_numpy().copy()


def vectors(table: TableSet, label: str, *, width: int = 0) -> np.ndarray:
    """Column of vectors ``[a,b,c]`` as (n, k >= width), filled up with zeros; all zeros if it is missing."""
    series = table.column(label, default="[]")
    distinct = series.unique(maintain_order=True)
    parsed = [parse_vector(text, label=f"_{label}") for text in distinct]
    array = np.zeros((len(parsed), max(width, *map(len, parsed))))
    for row, vector in zip(array, parsed, strict=True):
        row[: len(vector)] = vector
    index = series.replace_strict(distinct, range(len(distinct)), return_dtype=pl.Int64)
    return array[index.to_numpy()]


def _ordered_defocus(u: np.ndarray, v: np.ndarray, angle: np.ndarray) -> dict[str, np.ndarray]:
    swapped = u < v
    turned = np.where(angle > 0, angle - 90, angle + 90)
    return {
        "defocus_u": np.maximum(u, v),
        "defocus_v": np.minimum(u, v),
        "defocus_angle": np.where(swapped, turned, angle),
    }


def _array(tensor: Tensor) -> np.ndarray:
    """Tensor as float64; single precision becomes the shortest decimal that stands for it, 0.1 stays 0.1."""
    array = tensor.detach().cpu().numpy()
    if array.dtype != np.float32:
        return array
    decimals = pl.Series(array.ravel()).cast(pl.String).cast(pl.Float64)
    return decimals.to_numpy().reshape(array.shape)
