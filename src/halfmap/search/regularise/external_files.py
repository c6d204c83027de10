"""RELION's files of a reconstruction that another program does: sums of slices, and the signal's power."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.errors import FileFormatError, ParameterError, TableError
from halfmap.io.mrc import read_header, read_mrc
from halfmap.io.mrc_writer import write_mrc
from halfmap.io.star import Value, read_star, write_star
from halfmap.ops.slices import SliceAccumulator
from halfmap.search.backprojector import Backprojection
from halfmap.search.halfmaps import Sums, _planes, _sizes
from halfmap.search.stored_sums import slabs

SUFFIX = "_external_reconstruct"
"""At the end of the names of RELION's files, before what each holds."""

_GENERAL, _SIGNAL = "external_reconstruct_general", "external_reconstruct_tau2"
_FILES = {
    "real": "rlnExtReconsDataReal",
    "imaginary": "rlnExtReconsDataImag",
    "weight": "rlnExtReconsWeight",
    "result": "rlnExtReconsResult",
}


@dataclass(frozen=True, eq=False)
class Request:
    """A map that is to be made of the sums in some files.

    Attributes
    ----------
    star : path
        The file that says all this.
    real, imaginary, weight : path
        Sums over images, each an MRC file (n, n, n // 2 + 1), unshifted, of a transform about the centre.
    result : path
        The map (box, box, box) to be written.
    box, current : int
        Of the map, and twice the Fourier pixels that the sums reach.
    padding : float
        n over box.
    signal : array (shells,), float64
        Power of the signal in voxels of the unpadded transform, as RELION counts it; times its `fudge`.
    correlation : array (shells,), float64
        Of the half maps.
    pixel_size, diameter : float or None
        Å; RELION 3.1 does not say them.
    """

    star: Path
    real: Path
    imaginary: Path
    weight: Path
    result: Path
    box: int
    current: int
    padding: float
    signal: NDArray[np.float64]
    correlation: NDArray[np.float64]
    pixel_size: float | None = None
    diameter: float | None = None

    @property
    def padded_box(self) -> int:
        """Side of the transform."""
        return math.floor(self.padding * self.box + 0.5)

    @property
    def prior(self) -> Tensor:
        """Reciprocals (shells,) of the signal's power, for `solved`; none where RELION says no power."""
        power = self.padding**3 * self.signal
        return torch.from_numpy(np.divide(1, power, where=power > 0, out=np.zeros_like(power)))

    def sums(self) -> Backprojection:
        """Sums that the files hold.

        Raises
        ------
        FileFormatError
            If a file is missing, of another size, or holds values that are not numbers.

        Notes
        -----
        RELION has Fourier's coefficients of images and maps divided by the number of their pixels: a map that
        is made of these sums is to be multiplied by the square of the box.
        """
        n = self.padded_box
        limit = min(n // 2, math.floor(self.padding * (self.current // 2) + 0.5))
        data = torch.zeros(2 * limit + 3, 2 * limit + 3, limit + 2, 4)
        inside, rows = slice(1, -1), np.arange(-limit, limit + 1) % n
        for place, path in enumerate((self.real, self.imaginary, self.weight)):
            values = _transform(path, n)[rows][:, rows][..., : limit + 1]
            data[inside, inside, :-1, place] = torch.from_numpy(values)
        # Each of a pair of mates in this plane has the whole, and the sums' users add both.
        data[:, :, 0] /= 2
        return Backprojection(SliceAccumulator(data, self.box, n))


def read(star: Path) -> Request:
    """Read what RELION or `write` asks for; names in the file are relative to where RELION was started.

    Raises
    ------
    FileFormatError
        If it is no such file, or not of a volume.
    TableError
        If it lacks a value.
    """
    blocks = read_star(star)
    general, signal = blocks.get(_GENERAL), blocks.get(_SIGNAL)
    if not isinstance(general, Mapping) or not isinstance(signal, pl.DataFrame):
        raise FileFormatError(
            "is no file of RELION's that asks for a reconstruction",
            path=star,
            hint=f"it has no blocks {_GENERAL} and {_SIGNAL}",
        )
    if _number(general, "rlnReferenceDimensionality", star, 3) != 3:
        raise FileFormatError("asks for images, and only maps can be made", path=star)
    box, current, padding, fudge = (
        _number(general, label, star)
        for label in ("rlnOriginalImageSize", "rlnCurrentImageSize", "rlnPaddingFactor", "rlnTau2FudgeFactor")
    )
    if not (box >= 4 and box == int(box) and 2 <= current <= box and padding >= 1 and fudge > 0):
        raise TableError(
            f"states sizes that cannot be: box {box:g}, {current:g} of it used, padded by {padding:g}, "
            f"tau2_fudge {fudge:g}",
            path=star,
        )
    pixel_size, diameter = (
        _number(general, label, star) if label in general else None
        for label in ("rlnPixelSize", "rlnParticleDiameter")
    )
    return Request(
        star,
        **{name: Path(_text(general, label, star)) for name, label in _FILES.items()},
        box=int(box),
        current=int(current),
        padding=padding,
        signal=fudge * _column(signal, "rlnReferenceTau2", int(box), star).clip(0),
        correlation=_column(signal, "rlnGoldStandardFsc", int(box), star),
        pixel_size=pixel_size,
        diameter=diameter,
    )


def write(
    stem: Path,
    sums: Sums,
    *,
    box: int,
    prior: Tensor,
    correlation: Tensor,
    pixel_size: float,
    diameter: float | None,
) -> Request:
    """Write sums as RELION writes its own, and say where the map is to be.

    Parameters
    ----------
    stem : path
        Names of the files without what each holds.
    sums : Backprojection or StoredSums
        With all symmetry applied.
    box : int
        Of the map, px. That of the sums may be smaller, with as much larger voxels.
    prior : Tensor (shells,)
        Reciprocal of the signal's power, as `solved` takes it.
    correlation : Tensor (shells,)
        Of the half maps.
    pixel_size, diameter : float
        Of the map's voxels, and of the particle, Å.

    Raises
    ------
    ParameterError
        If the padding of the sums makes no whole, even transform of this box.

    Notes
    -----
    All voxels that the sums have are written, also those beyond the sphere that RELION would use.
    """
    limit, own, own_padded = _sizes(sums)
    padding = own_padded / own
    n = round(padding * box)
    if n % 2 or abs(padding * box - n) > 1e-6:
        raise ParameterError(
            f"a transform of {box} px padded by {padding:.4g} cannot be given to other programs",
            hint="give more memory, so that it is padded by 2",
        )
    shells = box // 2 + 1
    known = math.floor((limit + 1) / padding + 0.5) + 1
    power = 1 / (padding**3 * float(box) ** 4 * prior.cpu().double().numpy())
    signal, agreed = (
        _cut(each, known, shells) for each in (power[: len(prior)], correlation.cpu().double().numpy())
    )
    names = {name: stem.with_name(stem.name + end) for name, end in _ENDS.items()}
    for place, name in enumerate(("real", "imaginary", "weight")):
        factor = float(box) ** (4 if name == "weight" else 2)
        write_mrc(names[name], factor * _whole(sums, n, place), pixel_size=pixel_size, stack=False)
    request = Request(
        stem.with_name(f"{stem.name}.star"),
        **names,
        box=box,
        current=min(box, 2 * math.ceil(limit / padding)),
        padding=padding,
        signal=signal,
        correlation=agreed,
        pixel_size=pixel_size,
        diameter=diameter,
    )
    # Last, as RELION does: who waits for it finds all others.
    _write_star(request, stem)
    return request


_ENDS = {"real": "_data_real.mrc", "imaginary": "_data_imag.mrc", "weight": "_weight.mrc", "result": ".mrc"}


def _write_star(request: Request, stem: Path) -> None:
    general: dict[str, Value] = {
        **{label: str(getattr(request, name)) for name, label in _FILES.items()},
        "rlnExtReconsResultStarfile": f"{stem}_out.star",
        "rlnTau2FudgeFactor": 1.0,
        "rlnPaddingFactor": request.padding,
        "rlnReferenceDimensionality": 3,
        "rlnOriginalImageSize": request.box,
        "rlnCurrentImageSize": request.current,
        "rlnPixelSize": request.pixel_size or 1.0,
    }
    if request.diameter is not None:
        general["rlnParticleDiameter"] = request.diameter
    signal = pl.DataFrame(
        {
            "rlnSpectralIndex": np.arange(len(request.signal)),
            "rlnReferenceTau2": request.signal,
            "rlnGoldStandardFsc": request.correlation,
        }
    )
    write_star(request.star, {_GENERAL: general, _SIGNAL: signal}, durable=False)


def _whole(sums: Sums, n: int, place: int) -> NDArray[np.float32]:
    """One part of the sums as (n, n, n // 2 + 1), unshifted, without its Nyquist frequency."""
    limit, _, _ = _sizes(sums)
    reach = min(limit, (n - 1) // 2)
    out = np.zeros((n, n, n // 2 + 1), np.float32)
    near = np.arange(-reach, reach + 1)
    for z in slabs(limit, reach):
        planes = _planes(sums, z)[..., place].cpu().numpy()
        out[np.ix_(np.arange(z.start, z.stop) % n, near % n, np.arange(reach + 1))] = planes[
            :, limit - reach : limit + reach + 1, : reach + 1
        ]
    return out


def _cut(values: NDArray[np.float64], known: int, shells: int) -> NDArray[np.float64]:
    """Values of the known shells, the last one of them going on, and 0 beyond."""
    out = np.zeros(shells)
    own = values[: min(known, shells)]
    out[: len(own)] = own
    out[len(own) : known] = own[-1]
    return out


def _transform(path: Path, n: int) -> NDArray[np.float32]:
    shape = read_header(path).shape
    if tuple(shape) != (n, n, n // 2 + 1):
        raise FileFormatError(
            f"holds {' × '.join(map(str, shape))} values, not {n} × {n} × {n // 2 + 1}", path=path
        )
    values = read_mrc(path)
    if not np.isfinite(values).all():
        raise FileFormatError("holds values that are not numbers", path=path)
    return values


def _number(block: Mapping[str, Value], label: str, star: Path, default: float | None = None) -> float:
    value = block.get(label, default)
    try:
        number = float(value) if value is not None else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise TableError(f"lacks a number _{label}", path=star)
    return number


def _text(block: Mapping[str, Value], label: str, star: Path) -> str:
    if label not in block:
        raise TableError(f"lacks _{label}", path=star)
    return str(block[label])


def _column(table: pl.DataFrame, label: str, box: int, star: Path) -> NDArray[np.float64]:
    """Column of the shells to the box's Nyquist frequency; what is no number counts as nothing."""
    if label not in table.columns or len(table) < box // 2 + 1:
        raise TableError(f"lacks _{label} of {box // 2 + 1} shells", path=star)
    values = table[label].cast(pl.Float64, strict=False).to_numpy()
    return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
