"""cryoSPARC's fields and our columns: names, units, signs and conventions, one way and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from halfmap.data import ParticleSet
from halfmap.data.columns import format_vector
from halfmap.data.optics import GROUP, NAME
from halfmap.data.views import vectors
from halfmap.errors import TableError

if TYPE_CHECKING:
    from torch import Tensor

Fields = dict[str, np.ndarray]
"""Fields of a ``.cs`` file by name; the first axis counts items."""

Columns = dict[str, pl.Series]

_ANGSTROM_PER_MM = 1e7
_MIRROR = np.array([1.0, -1.0, -1.0])
"""Half a turn about x: what it does to an image, seen along z, is to mirror it in y."""

_NUMBERS = {
    (): (
        "uid blob/idx blob/psize_A blob/sign ctf/exp_group_id ctf/accel_kv ctf/cs_mm ctf/amp_contrast "
        "ctf/df1_A ctf/df2_A ctf/df_angle_rad ctf/phase_shift_rad ctf/scale ctf/bfactor "
        "ctf/cross_corr_ctffind4 ctf/ctf_fit_to_A "
        "alignments2D/pose alignments2D/psize_A alignments2D/split alignments2D/class "
        "alignments3D/psize_A alignments3D/split alignments3D/class location/center_x_frac "
        "location/center_y_frac location/micrograph_psize_A micrograph_blob/psize_A movie_blob/psize_A "
        "mscope_params/accel_kv mscope_params/cs_mm"
    ),
    (2,): (
        "blob/shape ctf/shift_A ctf/tilt_A ctf/trefoil_A alignments2D/shift alignments3D/shift "
        "location/micrograph_shape"
    ),
    (3,): "alignments3D/pose",
    (4,): "ctf/tetra_A ctf/anisomag",
}
FIELD_WIDTHS = {name: width for width, names in _NUMBERS.items() for name in names.split()}
"""Shape of every numeric field read, beyond the first axis."""

_KEPT = {"hmTrefoil": "ctf/trefoil_A", "hmTetrafoil": "ctf/tetra_A", "hmPhaseRamp": "ctf/shift_A"}
_EXPOSURE_GROUP = r"^exposureGroup([0-9]+)(?:_[0-9]+)?$"
_UID_STEP = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiples are distinct modulo 2^64


def particle_columns(fields: Fields, *, flip_y: bool) -> Columns:
    """Columns of particles, optics columns among them."""
    columns: Columns = {"hmCryosparcUid": pl.Series(fields["uid"]).cast(pl.String)}
    if "blob/path" in fields:
        number = pl.Series(fields["blob/idx"].astype(np.int64) + 1).cast(pl.String).str.zfill(6)
        name = number + "@" + _paths(fields["blob/path"])
        columns["rlnImageOriginalName" if flip_y else "rlnImageName"] = name
    if "location/micrograph_path" in fields:
        columns["rlnMicrographName"] = _paths(fields["location/micrograph_path"])
    if "location/center_x_frac" in fields:
        columns |= _coordinates(fields, flip_y)
    columns |= _defocus(fields, flip_y) | _poses(fields, flip_y) | _particle_optics(fields, flip_y)
    return columns


def micrograph_columns(fields: Fields) -> Columns:
    """Columns of micrographs, optics columns among them."""
    columns: Columns = {
        "hmCryosparcUid": pl.Series(fields["uid"]).cast(pl.String),
        "rlnMicrographName": _paths(fields["micrograph_blob/path"]),
        "rlnMicrographPixelSize": _decimals(fields["micrograph_blob/psize_A"]),
    }
    names = {"movie_blob/path": "rlnMicrographMovieName", "gain_ref_blob/path": "rlnMicrographGainName"}
    columns |= {label: _paths(fields[name]) for name, label in names.items() if name in fields}
    if "movie_blob/psize_A" in fields:
        columns["rlnMicrographOriginalPixelSize"] = _decimals(fields["movie_blob/psize_A"])
    if "ctf/df1_A" in fields:
        columns |= _defocus(fields, flip_y=False)
    return columns | _microscope(fields)


def _coordinates(fields: Fields, flip_y: bool) -> Columns:
    height, width = fields["location/micrograph_shape"].astype(np.float64).T
    x = fields["location/center_x_frac"].astype(np.float64) * width
    y = fields["location/center_y_frac"].astype(np.float64) * height
    if flip_y:
        y = height - 1 - y
    return {
        "rlnCoordinateX": pl.Series(x.round(2)),
        "rlnCoordinateY": pl.Series(y.round(2)),
        "hmMicrographHeight": pl.Series(height.astype(np.int64)),
        "hmMicrographWidth": pl.Series(width.astype(np.int64)),
    }


def _defocus(fields: Fields, flip_y: bool) -> Columns:
    angle = np.rad2deg(fields["ctf/df_angle_rad"].astype(np.float64)).round(6)
    columns = {
        "rlnDefocusU": _decimals(fields["ctf/df1_A"]),
        "rlnDefocusV": _decimals(fields["ctf/df2_A"]),
        "rlnDefocusAngle": pl.Series(-angle if flip_y else angle),
    }
    if "ctf/phase_shift_rad" in fields:
        phase_shift = np.rad2deg(fields["ctf/phase_shift_rad"].astype(np.float64)).round(6)
        columns["rlnPhaseShift"] = pl.Series(phase_shift)
    plain = {
        "ctf/cross_corr_ctffind4": "rlnCtfFigureOfMerit",
        "ctf/ctf_fit_to_A": "rlnCtfMaxResolution",
        "ctf/bfactor": "rlnCtfBfactor",
        "ctf/scale": "rlnCtfScalefactor",
    }
    return columns | {label: _decimals(fields[name]) for name, label in plain.items() if name in fields}


def _poses(fields: Fields, flip_y: bool) -> Columns:
    """Poses of a 3D refinement, or else of a 2D classification; none where there is neither."""
    slot = "alignments3D" if "alignments3D/pose" in fields else "alignments2D"
    if f"{slot}/pose" not in fields:
        return {}
    rotations = _rotations(fields[f"{slot}/pose"])
    shifts = fields[f"{slot}/shift"].astype(np.float64) * fields[f"{slot}/psize_A"][:, None].astype(
        np.float64
    )
    if flip_y:
        rotations = _MIRROR[:, None] * rotations
        shifts = shifts * _MIRROR[:2]
    angles = _euler(rotations).round(6)
    columns = {
        "rlnAngleRot": pl.Series(angles[:, 0]),
        "rlnAngleTilt": pl.Series(angles[:, 1]),
        "rlnAnglePsi": pl.Series(angles[:, 2]),
        "rlnOriginXAngst": pl.Series(shifts[:, 0].round(6)),
        "rlnOriginYAngst": pl.Series(shifts[:, 1].round(6)),
    }
    if f"{slot}/class" in fields:
        columns["rlnClassNumber"] = pl.Series(fields[f"{slot}/class"].astype(np.int64) + 1)
    split = fields.get(f"{slot}/split")
    # All zeros is what particles have that were never split.
    if split is not None and set(np.unique(split)) == {0, 1}:
        columns["rlnRandomSubset"] = pl.Series(split.astype(np.int64) + 1)
    return columns


def _particle_optics(fields: Fields, flip_y: bool) -> Columns:
    n = len(fields["uid"])
    columns = _microscope(fields)
    if "blob/psize_A" in fields:
        columns["rlnImagePixelSize"] = _decimals(fields["blob/psize_A"])
        columns["rlnImageSize"] = pl.Series(fields["blob/shape"][:, -1].astype(np.int64))
        columns["rlnImageDimensionality"] = pl.Series(np.full(n, 2))
    if "location/micrograph_psize_A" in fields:
        columns["rlnMicrographPixelSize"] = _decimals(fields["location/micrograph_psize_A"])
    if "blob/sign" in fields:
        columns["hmContrastSign"] = pl.Series(np.where(fields["blob/sign"] < 0, -1, 1))
    y_sign = -1 if flip_y else 1
    if "ctf/tilt_A" in fields and fields["ctf/tilt_A"].any() and (fields["ctf/cs_mm"] > 0).all():
        tilt = fields["ctf/tilt_A"].astype(np.float64)
        tilt = (1e3 * tilt / (fields["ctf/cs_mm"][:, None] * _ANGSTROM_PER_MM)).round(8)
        columns |= {"rlnBeamTiltX": pl.Series(tilt[:, 0]), "rlnBeamTiltY": pl.Series(y_sign * tilt[:, 1])}
    if "ctf/anisomag" in fields and fields["ctf/anisomag"].any():
        matrix = fields["ctf/anisomag"].astype(np.float64).round(9) + np.eye(2).ravel()
        matrix *= (1, y_sign, y_sign, 1)
        columns |= {f"rlnMagMat{i}{j}": pl.Series(matrix[:, 2 * i + j]) for i in (0, 1) for j in (0, 1)}
    for label, name in _KEPT.items():
        if name in fields and fields[name].any():
            columns[label] = _vectors(fields[name])
    columns["hmFlippedY"] = pl.Series(np.full(n, flip_y))
    return columns


def _microscope(fields: Fields) -> Columns:
    columns: Columns = {}
    if "ctf/exp_group_id" in fields:
        columns[NAME] = "exposureGroup" + pl.Series(fields["ctf/exp_group_id"]).cast(pl.String)
    sources = {
        "rlnVoltage": ("ctf/accel_kv", "mscope_params/accel_kv"),
        "rlnSphericalAberration": ("ctf/cs_mm", "mscope_params/cs_mm"),
        "rlnAmplitudeContrast": ("ctf/amp_contrast",),
    }
    for label, names in sources.items():
        found = [fields[name] for name in names if name in fields]
        if found:
            columns[label] = _decimals(found[0])
    return columns


def particle_fields(particles: ParticleSet) -> Fields:
    """Fields of particles, in cryoSPARC's names, units and types."""
    n = len(particles)
    ctf = particles.ctf
    fields: Fields = {"uid": _uids(particles)} | _blob_fields(particles)

    def single(tensor: Tensor) -> np.ndarray:
        return tensor.numpy().astype(np.float32)

    tilt = ctf.beam_tilt_mrad * 1e-3 * ctf.cs_mm[:, None] * _ANGSTROM_PER_MM
    fields |= {
        "ctf/type": np.full(n, b"imported"),
        "ctf/exp_group_id": _exposure_groups(particles),
        "ctf/accel_kv": single(ctf.voltage_kV),
        "ctf/cs_mm": single(ctf.cs_mm),
        "ctf/amp_contrast": single(ctf.amplitude_contrast),
        "ctf/df1_A": single(ctf.defocus_u),
        "ctf/df2_A": single(ctf.defocus_v),
        "ctf/df_angle_rad": single(ctf.defocus_angle.deg2rad()),
        "ctf/phase_shift_rad": single(ctf.phase_shift.deg2rad()),
        "ctf/scale": single(ctf.scale),
        "ctf/scale_const": np.zeros(n, np.float32),
        "ctf/tilt_A": single(tilt),
        "ctf/anisomag": single(ctf.magnification.flatten(1)) - np.eye(2, dtype=np.float32).ravel(),
        "ctf/bfactor": single(ctf.b_factor),
    }
    for label, name in _KEPT.items():
        (width,) = FIELD_WIDTHS[name]
        fields[name] = vectors(particles, label, width=width)[:, :width].astype(np.float32)
    if "rlnAnglePsi" in particles.rows.columns:
        fields |= _pose_fields(particles)
    return fields


def _exposure_groups(particles: ParticleSet) -> np.ndarray:
    """Exposure groups that the particles were read with, or else their optics groups."""
    groups = particles.column(NAME, default="").str.extract(_EXPOSURE_GROUP, 1).cast(pl.UInt32, strict=False)
    if groups.null_count():
        groups = particles.rows[GROUP]
    return groups.to_numpy().astype(np.uint32)


def _blob_fields(particles: ParticleSet) -> Fields:
    names = particles.column("rlnImageName")
    parts = names.str.splitn("@", 2).struct.unnest()
    index = parts.to_series(0).cast(pl.Int64, strict=False)
    bad = (index.is_null() | parts.to_series(1).is_null() | (index < 1)).fill_null(True)
    if bad.any():
        row = bad.arg_max() or 0
        raise TableError(
            f"_rlnImageName is {names[row]!r}, not index@stack", path=particles.path, row=row + 1
        )
    size = particles.column("rlnImageSize").to_numpy().astype(np.uint32)
    return {
        "blob/path": np.array([text.encode() for text in parts.to_series(1)]),
        "blob/idx": (index.to_numpy() - 1).astype(np.uint32),
        "blob/shape": np.stack([size, size], axis=1),
        "blob/psize_A": particles.column("rlnImagePixelSize").to_numpy().astype(np.float32),
        "blob/sign": particles.column("hmContrastSign", default=1).to_numpy().astype(np.float32),
        "blob/import_sig": np.zeros(len(names), np.uint64),
    }


def _pose_fields(particles: ParticleSet) -> Fields:
    from halfmap.ops.rotations import to_rotation_vector

    n = len(particles)
    poses = particles.poses
    pixel_size = particles.column("rlnImagePixelSize").to_numpy()
    split = particles.column("rlnRandomSubset", default=1).to_numpy() - 1
    fields: Fields = {
        "split": split.astype(np.uint32),
        "shift": (poses.shifts_A.numpy() / pixel_size[:, None]).astype(np.float32),
        "pose": -to_rotation_vector(poses.rotations.double()).deg2rad().numpy().astype(np.float32),
        "psize_A": pixel_size.astype(np.float32),
        "class": (particles.column("rlnClassNumber", default=1).to_numpy() - 1).clip(0).astype(np.uint32),
    }
    zeros = ("error", "error_min", "resid_pow", "slice_pow", "image_pow", "cross_cor", "weight")
    fields |= {name: np.zeros(n, np.float32) for name in (*zeros, "pose_ess", "shift_ess")}
    fields |= {name: np.ones(n, np.float32) for name in ("alpha", "class_posterior", "class_ess")}
    return {f"alignments3D/{name}": array for name, array in fields.items()}


def _uids(particles: ParticleSet) -> np.ndarray:
    if "hmCryosparcUid" in particles.rows.columns:
        uids = particles.rows["hmCryosparcUid"].cast(pl.UInt64, strict=False)
        if not uids.null_count() and not uids.is_duplicated().any():
            return uids.to_numpy()
    return np.arange(1, len(particles) + 1, dtype=np.uint64) * _UID_STEP


def _paths(texts: np.ndarray) -> pl.Series:
    """Text of a field; exported jobs mark paths relative to the export with a >."""
    return pl.Series(texts.tolist(), dtype=pl.Binary).cast(pl.String).str.strip_prefix(">")


def _decimals(values: np.ndarray) -> pl.Series:
    """Single precision as the shortest decimal that stands for it: 1.345, not 1.34500003."""
    return pl.Series(values.astype(np.float32)).cast(pl.String).cast(pl.Float64)


def _vectors(values: np.ndarray) -> pl.Series:
    distinct, index = np.unique(values, axis=0, return_inverse=True)
    texts = pl.Series([format_vector(float(str(value)) for value in vector) for vector in distinct])
    return texts[index.ravel()]


def _rotations(pose: np.ndarray) -> np.ndarray:
    """RELION's matrices of rotation vectors (n, 3), or of angles in the plane (n,), in radians."""
    import torch

    from halfmap.ops.rotations import from_rotation_vector

    vectors = np.zeros((len(pose), 3))
    vectors[:, 2 if pose.ndim == 1 else slice(None)] = pose
    # RELION turns the axes where cryoSPARC turns the vector: the transpose.
    return from_rotation_vector(torch.from_numpy(-np.rad2deg(vectors))).numpy()


def _euler(rotations: np.ndarray) -> np.ndarray:
    import torch

    from halfmap.ops.rotations import to_euler

    return to_euler(torch.from_numpy(rotations)).numpy()
