"""MRC headers: what a file says of itself, checked against the file's size."""

from __future__ import annotations

import bz2
import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from mrcfile.dtypes import HEADER_DTYPE

from halfmap.errors import FileFormatError
from halfmap.io.binary import file_size, opened, reading

ByteOrder = Literal["<", ">"]

HEADER_BYTES = 1024
_ORDERS: tuple[ByteOrder, ByteOrder] = ("<", ">")
MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2", 101: "u1"}
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZ": "bzip2"}
_OPENERS = {"gzip": gzip.open, "bzip2": bz2.open}
_CHUNK_BYTES = 1 << 20
_IMOD_STAMP = 1146047817
_NOT_MRC = "give an MRC, MRCS or MAP file"
_TRUNCATED = "copy or transfer the file again"


@dataclass(frozen=True)
class MrcHeader:
    """What an MRC header says, checked against the size of its file.

    Attributes
    ----------
    path : Path
        File it was read from.
    shape : tuple of 3 int
        (sections, y, x), after turning the axes to (z, y, x).
    mode : int
        MRC mode: 0, 1, 2, 6, 12 or 101 (packed 4-bit).
    dtype : numpy dtype
        Type of arrays as `read_mrc` gives them, in the machine's byte order.
    voxel_size : tuple of 3 float
        (x, y, z) in Å, unchecked: zero or NaN where the writer did not know. z means nothing for a stack.
    origin : tuple of 3 float
        (x, y, z) of the first voxel in Å.
    space_group : int
        0 for images and stacks of images, 1 for a volume, 401 for a stack of volumes.
    statistics : tuple of 4 float
        (minimum, maximum, mean, standard deviation) as the writer left them.
    labels : tuple of str
        What writers say of it.
    """

    path: Path
    shape: tuple[int, int, int]
    mode: int
    dtype: np.dtype
    voxel_size: tuple[float, float, float]
    origin: tuple[float, float, float]
    space_group: int
    statistics: tuple[float, float, float, float]
    cell_sections: int
    extended_type: str
    data_offset: int
    byte_order: ByteOrder
    compression: str | None
    stored_shape: tuple[int, int, int]
    stored_axes: tuple[int, int, int]
    packed: bool
    labels: tuple[str, ...] = ()

    @property
    def is_stack(self) -> bool:
        """Whether the sections are separate images: the name ends in `.mrcs` or the header says so.

        Many volumes have space group 0, which should mean images; the cell's depth of one section tells.
        """
        named = ".mrcs" in self.path.suffixes[-2:]
        return named or (self.space_group == 0 and self.cell_sections == 1)

    @property
    def pixel_size(self) -> float | None:
        """Å per pixel, or None where the header holds none that could be true of square pixels."""
        x, y, _ = self.voxel_size
        sound = math.isfinite(x) and math.isfinite(y) and x > 0 and abs(x - y) <= 0.01 * x
        return x if sound else None

    def require_pixel_size(self) -> float:
        """Å per pixel.

        Raises
        ------
        FileFormatError
            If the header holds zero, NaN, a negative value, or pixels that are not square.
        """
        if self.pixel_size is None:
            x, y, _ = self.voxel_size
            message = f"the header's pixel size, {x:g} x {y:g} Å, is not a positive number or not square"
            raise FileFormatError(message, path=self.path, hint="state the pixel size yourself")
        return self.pixel_size

    @property
    def stored_dtype(self) -> np.dtype:
        """Type of the numbers in the file, in its byte order."""
        return self.dtype.newbyteorder(self.byte_order)

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row."""
        nx = self.stored_shape[2]
        return (nx + 1) // 2 if self.packed else nx * self.dtype.itemsize

    @property
    def section_bytes(self) -> int:
        """Bytes of a stored section."""
        return self.stored_shape[1] * self.row_bytes

    @property
    def end(self) -> int:
        """Bytes that the file must have."""
        return self.data_offset + self.stored_shape[0] * self.section_bytes


def read_header(path: str | Path) -> MrcHeader:
    """Read an MRC header and check it against the file it belongs to.

    Both byte orders, the `.gz` and `.bz2` forms and extended headers of any kind are understood. Mode 0 is
    signed unless IMOD's stamp says otherwise, as MRC2014 has it.

    Raises
    ------
    FileFormatError
        If the file is missing, is not an MRC file, has an empty or impossible shape, or is shorter than its
        header says (of a compressed file that is only known once its data are read).

    References
    ----------
    .. [1] Cheng et al. (2015) J. Struct. Biol. 192, 146. https://doi.org/10.1016/j.jsb.2015.04.002
    """
    path = Path(path)
    with opened(path) as stream:
        raw = stream.read(HEADER_BYTES)
    compression = _COMPRESSIONS.get(raw[:2])
    if compression is not None:
        raw = inflate(path, compression, 0, HEADER_BYTES, exact=False)
    if len(raw) < HEADER_BYTES:
        raise FileFormatError(
            f"is {len(raw)} bytes long, shorter than an MRC header ({HEADER_BYTES})", path=path, hint=_NOT_MRC
        )
    header = _parse(path, bytes(raw), compression)
    if compression is None and (size := file_size(path)) < header.end:
        raise truncated(header, size)
    return header


def truncated(header: MrcHeader, size: int) -> FileFormatError:
    """Error for a file of `size` bytes that is shorter than its header says."""
    message = f"is truncated: the header says {header.end} bytes, the file has {size}"
    return FileFormatError(message, path=header.path, hint=_TRUNCATED)


def _parse(path: Path, raw: bytes, compression: str | None) -> MrcHeader:
    order = _byte_order(raw)
    fields = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order))[0]
    mode = int(fields["mode"])
    if mode in (3, 4):
        raise FileFormatError(
            f"holds a Fourier transform (mode {mode})", path=path, hint="give real-space data"
        )
    if mode not in MODES:
        raise FileFormatError(f"is not an MRC file (mode {mode})", path=path, hint=_NOT_MRC)
    nx, ny, nz = (int(fields[name]) for name in ("nx", "ny", "nz"))
    if nz == 0 and nx >= 0 and ny >= 0:
        raise FileFormatError("is an empty stack: it holds no images", path=path, hint="write it again")
    if min(nx, ny, nz) <= 0:
        raise FileFormatError(f"has the impossible shape {nx} x {ny} x {nz}", path=path, hint=_NOT_MRC)
    extended = int(fields["nsymbt"])
    if extended < 0:
        raise FileFormatError(f"has an extended header of {extended} bytes", path=path, hint=_NOT_MRC)
    signed, nibbles = _imod_bytes(raw, order) if mode == 0 else (True, False)
    packed = mode == 101 or nibbles
    stored = (nz, ny, 2 * nx if nibbles else nx)
    axes = tuple(int(fields[name]) for name in ("maps", "mapr", "mapc"))
    if sorted(axes) != [1, 2, 3]:
        axes = (3, 2, 1)  # files from before the field was used hold zeros
    cell, grid, origin = fields["cella"], (fields["mx"], fields["my"], fields["mz"]), fields["origin"]
    return MrcHeader(
        path=path,
        shape=tuple(stored[axes.index(axis)] for axis in (3, 2, 1)),  # type: ignore[arg-type]
        mode=mode,
        dtype=np.dtype("u1" if packed or not signed else MODES[mode]),
        voxel_size=tuple(  # type: ignore[arg-type]
            cell[axis].item() / int(n) if int(n) else math.nan for axis, n in zip("xyz", grid, strict=True)
        ),
        origin=tuple(origin[axis].item() for axis in "xyz"),  # type: ignore[arg-type]
        space_group=int(fields["ispg"]),
        statistics=tuple(fields[name].item() for name in ("dmin", "dmax", "dmean", "rms")),  # type: ignore[arg-type]
        cell_sections=int(fields["mz"]),
        extended_type=bytes(fields["exttyp"]).decode("ascii", "replace").strip("\0 "),
        data_offset=HEADER_BYTES + extended,
        byte_order=order,
        compression=compression,
        stored_shape=stored,
        stored_axes=axes,  # type: ignore[arg-type]
        packed=packed,
        labels=tuple(
            bytes(each).decode("ascii", "replace").strip("\0 ")
            for each in fields["label"][: min(max(int(fields["nlabl"]), 0), len(fields["label"]))]
        ),
    )


def _byte_order(raw: bytes) -> ByteOrder:
    # The machine stamp is often wrong, the mode never: read the wrong way round it is out of all range,
    # except for mode 0, where the stamp and then the smaller width decide.
    modes = [int(np.frombuffer(raw, order + "i4", 1, 12)[0]) for order in _ORDERS]
    little, big = (mode in MODES or mode in (3, 4) for mode in modes)
    if little != big:
        return "<" if little else ">"
    if raw[212:214] in (b"\x44\x44", b"\x44\x41", b"\x11\x11"):
        return ">" if raw[212] == 0x11 else "<"
    width, swapped = (int(np.frombuffer(raw, order + "u4", 1)[0]) for order in _ORDERS)
    return "<" if width <= swapped else ">"


def _imod_bytes(raw: bytes, order: str) -> tuple[bool, bool]:
    """Whether mode 0 is signed, and whether each byte holds two 4-bit values, from IMOD's stamp and flags."""
    stamp, flags = (int(value) for value in np.frombuffer(raw, order + "i4", 2, 152))
    if stamp != _IMOD_STAMP:
        return True, False
    return bool(flags & 1), bool(flags & 16)


def inflate(path: Path, compression: str, start: int, stop: int, *, exact: bool = True) -> bytearray:
    """Decompressed bytes [start, stop), read in pieces so that memory follows the data, not a header."""
    data = bytearray()
    corrupt = FileFormatError(f"is truncated or corrupt {compression} data", path=path, hint=_TRUNCATED)
    with reading(path):
        try:
            with _OPENERS[compression](path, "rb") as stream:
                stream.seek(start)
                while piece := stream.read(min(_CHUNK_BYTES, stop - start - len(data))):
                    data += piece
        except (EOFError, zlib.error, ValueError) as error:
            raise corrupt from error
        except OSError as error:
            if error.errno is not None:
                raise
            raise corrupt from error
    if exact and len(data) < stop - start:
        message = f"is truncated: the header says {stop} bytes, unpacked it has at most {start + len(data)}"
        raise FileFormatError(message, path=path, hint=_TRUNCATED)
    return data
