"""cryoSPARC's ``.cs`` files: structured arrays joined by uid, read as our tables and written from them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import polars as pl

from halfmap.data import MicrographSet, ParticleSet
from halfmap.data.optics import NAME, add_optics
from halfmap.errors import FileFormatError, TableError
from halfmap.io.atomic import atomic_path
from halfmap.io.cryosparc_fields import (
    FIELD_WIDTHS,
    Fields,
    micrograph_columns,
    particle_columns,
    particle_fields,
)
from halfmap.log import log

_CTF_NEEDED = (
    "ctf/accel_kv",
    "ctf/cs_mm",
    "ctf/amp_contrast",
    "ctf/df1_A",
    "ctf/df2_A",
    "ctf/df_angle_rad",
)
_BLOB_NEEDED = ("blob/path", "blob/idx", "blob/shape", "blob/psize_A")
_LOCATION_NEEDED = (
    "location/micrograph_path",
    "location/micrograph_shape",
    "location/center_x_frac",
    "location/center_y_frac",
)
_MICROGRAPH_NEEDED = ("micrograph_blob/path", "micrograph_blob/psize_A")

_STREAM_MAGIC = b"\x94CSDAT"


def read_cs(
    path: str | Path, *, passthrough: Sequence[str | Path] = (), flip_y: bool = False
) -> ParticleSet | MicrographSet:
    r"""Read particles or micrographs of a cryoSPARC job.

    A job writes what it changed into one file and what it merely passed on into another,
    ``*_passthrough_*.cs``; both are joined by uid. Without `passthrough`, files of that name, of the same job
    and folder, that hold all items are joined.

    Parameters
    ----------
    path : path
        The job's ``.cs`` file.
    passthrough : sequence of path
        Files with the fields that it lacks.
    flip_y : bool
        Describe images that are mirrored in y relative to cryoSPARC's: it reads the rows of TIFF and EER
        movies top first, RELION and Halfmap bottom first. Set it if the particles are to be extracted again
        from micrographs that RELION or Halfmap made from such movies. Coordinates, poses, shifts, defocus
        angles, beam tilts and magnification are mirrored (the hand of the map is unchanged), and the names
        of the images, which are not, move to ``rlnImageOriginalName``. ``hmFlippedY`` records it.

    Returns
    -------
    ParticleSet or MicrographSet
        Whichever the file holds. Exposure groups become optics groups, divided where their members differ.

    Raises
    ------
    FileFormatError
        If the file is not a ``.cs`` file.
    TableError
        If fields are missing that a passthrough file would have, or the files do not belong together.

    Notes
    -----
    ``alignments3D/pose`` is the rotation vector (radians) whose matrix, transposed, is RELION's; shifts are
    in pixels of ``alignments3D/psize_A`` and of RELION's sign. ``ctf/tilt_A`` is the spherical aberration
    times the beam tilt. ``ctf/anisomag`` is the magnification matrix less the identity, on Fourier
    coordinates. Trefoil and tetrafoil have no published scale against RELION's Zernike coefficients: they
    are kept as they are (``hmTrefoil``, ``hmTetrafoil``), not applied, and a warning says so. The numeric
    uid in front of micrograph names is kept, since the files have it too. Coordinates are fractions of the
    micrograph times its size; without `flip_y` they fit the micrograph that the table names.
    """
    path = Path(path)
    fields = _load(path)
    given = [Path(other) for other in passthrough]
    others = {other: _load(other) for other in given or _find_passthrough(path)}
    for other, found in others.items():
        if given or _covers(found, fields):
            fields = _join(fields, found, other)
            log.info("%s: joined with %s", path.name, other.name)
    is_micrographs = "micrograph_blob/path" in fields and not {"blob/path", *_LOCATION_NEEDED} & set(fields)
    if is_micrographs:
        _require(fields, _MICROGRAPH_NEEDED, path)
        columns = micrograph_columns(fields)
        return MicrographSet(*_split(columns, MicrographSet.pixel_column, path), path)
    if "movie_blob/path" in fields and "blob/path" not in fields:
        raise TableError("the file holds movies without micrographs", path=path, hint="import the movies")
    images = _BLOB_NEEDED if "blob/path" in fields or "location/micrograph_path" not in fields else ()
    places = _LOCATION_NEEDED if not images else ()
    _require(fields, (*images, *places, *_CTF_NEEDED), path)
    _require_location(fields, path, needed=flip_y)
    for slot in ("alignments3D", "alignments2D"):
        if f"{slot}/pose" in fields:
            _require(fields, (f"{slot}/shift", f"{slot}/psize_A"), path)
    _warn_of_aberrations(fields, path)
    columns = particle_columns(fields, flip_y=flip_y)
    return ParticleSet(*_split(columns, ParticleSet.pixel_column, path), path)


def write_cs(path: str | Path, particles: ParticleSet) -> None:
    """Write image names, CTFs and, where there are any, poses of particles as a ``.cs`` file.

    Uids are those the particles were read with (``hmCryosparcUid``), or else made from the row number.

    Raises
    ------
    TableError
        If image names, box size, pixel size or CTF are missing, or a name is not ``index@stack``.
    """
    path = Path(path)
    lost = [label for label in ("rlnOddZernike", "rlnEvenZernike") if label in particles.optics.columns]
    if lost:
        log.warning("%s: cryoSPARC's format has no place for %s", path.name, " and ".join(lost))
    fields = particle_fields(particles)
    dtype = [(name, array.dtype.str, array.shape[1:]) for name, array in fields.items()]
    records = np.empty(len(particles), dtype=dtype)
    for name, array in fields.items():
        records[name] = array
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, records, allow_pickle=False)


def _load(path: Path) -> Fields:
    """Fields of a ``.cs`` file by name."""
    try:
        with path.open("rb") as file:
            if file.read(len(_STREAM_MAGIC)) == _STREAM_MAGIC:
                raise FileFormatError(
                    "is in cryoSPARC's compressed stream format",
                    path=path,
                    hint="save it in the NumPy format: cryosparc.dataset.Dataset.load(a).save(b, format=1)",
                )
            file.seek(0)
            records = _load_numpy(file, path)
    except OSError as error:
        raise FileFormatError(
            f"cannot be read ({error.strerror or error})", path=path, hint="check the path"
        ) from error
    if not isinstance(records, np.ndarray) or records.dtype.names is None or records.ndim != 1:
        raise FileFormatError("is an array without named fields", path=path, hint="is it a cryoSPARC file?")
    if "uid" not in records.dtype.names:
        raise TableError("no field uid", path=path, hint="is it a cryoSPARC file?")
    if not len(records):
        raise TableError("no items", path=path, hint="the job's output is empty")
    fields = {name: records[name] for name in records.dtype.names}
    _check_types(fields, path)
    return fields


def _load_numpy(file: IO[bytes], path: Path) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            # Files of cryoSPARC's Python 2 days have headers that NumPy warns of.
            warnings.simplefilter("ignore")
            return np.load(file, allow_pickle=False, max_header_size=10_000_000)
    except OSError:
        raise
    except Exception as error:
        # NumPy evaluates the header as Python: a broken one raises anything from TokenError to MemoryError.
        raise FileFormatError("is truncated or not a cryoSPARC file", path=path) from error


def _check_types(fields: Fields, path: Path) -> None:
    """Refuse fields that are not of the type and width cryoSPARC gives them."""
    for name, array in fields.items():
        if name.endswith("path"):
            text = array.tobytes()
            good = array.dtype.kind == "S" and array.ndim == 1 and (text.isascii() or _is_utf8(text))
        elif name in FIELD_WIDTHS:
            good = array.dtype.kind in "fiu" and array.shape[1:] == FIELD_WIDTHS[name]
        else:
            continue
        if not good:
            raise FileFormatError(f"field {name} is of type {array.dtype} {array.shape[1:]}", path=path)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _find_passthrough(path: Path) -> Iterable[Path]:
    """Passthrough files in the same folder, of the same job where the name has one."""
    if "passthrough" in path.name:
        return []
    jobs = re.findall(r"J\d+", path.name)
    candidates = sorted(path.parent.glob("*passthrough*.cs"))
    return [other for other in candidates if re.findall(r"J\d+", other.name) == jobs]


def _covers(other: Fields, fields: Fields) -> bool:
    return bool(np.isin(fields["uid"], other["uid"]).all())


def _join(fields: Fields, other: Fields, path: Path) -> Fields:
    """Fields with those of another file that they lack, in their order."""
    uids = other["uid"]
    order = np.argsort(uids, kind="stable")
    position = np.searchsorted(uids, fields["uid"], sorter=order).clip(max=len(uids) - 1)
    index = order[position]
    missing = int((uids[index] != fields["uid"]).sum())
    if missing:
        raise TableError(
            f"{missing} of {len(index)} items are missing",
            path=path,
            hint="give the passthrough file of the same job and output group",
        )
    return fields | {name: array[index] for name, array in other.items() if name not in fields}


def _require(fields: Fields, names: Iterable[str], path: Path) -> None:
    missing = [name for name in names if name not in fields]
    if missing:
        kind = "exposures" if missing[0].startswith("micrograph") else "particles"
        raise TableError(
            f"no {', '.join(missing)}",
            path=path,
            hint=f"give the job's *_passthrough_{kind}.cs as well, or put it in the same folder",
        )


def _require_location(fields: Fields, path: Path, *, needed: bool) -> None:
    """Coordinates come whole or not at all; mirroring them takes the micrograph's height."""
    if needed or any(name in fields for name in _LOCATION_NEEDED[2:]):
        _require(fields, _LOCATION_NEEDED, path)


def _warn_of_aberrations(fields: Fields, path: Path) -> None:
    kept = [name for name in ("ctf/trefoil_A", "ctf/tetra_A") if name in fields and fields[name].any()]
    if kept:
        log.warning(
            "%s: %s are kept but not applied; fit higher-order aberrations again",
            path.name,
            " and ".join(kept),
        )


def _split(columns: dict[str, pl.Series], pixel_column: str, path: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Optics and rows, optics group names made unique where an exposure group had to be divided."""
    optics, rows = add_optics(pl.DataFrame(columns), pixel_column=pixel_column)
    if optics[NAME].is_duplicated().any():
        log.info("%s: exposure groups are divided, since their members differ in their optics", path.name)
        part = pl.int_range(1, pl.len() + 1).over(NAME).cast(pl.String)
        name = pl.when(pl.len().over(NAME) > 1).then(pl.col(NAME) + "_" + part).otherwise(NAME)
        optics = optics.with_columns(name.alias(NAME))
    return optics, rows
