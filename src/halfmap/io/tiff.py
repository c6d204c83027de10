"""Read and write TIFF movies and images: frames decoded in parallel, rows in MRC order.

A TIFF's first row is the top of the picture, an MRC's first row its bottom. RELION, IMOD, SerialEM and
MotionCor2 therefore flip y whenever they read or write a TIFF, and so does this module: arrays are in MRC
order, `array[..., 0, :]` is the last row of the TIFF, and a gain reference in MRC fits frames in TIFF.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from halfmap.errors import FileFormatError, ParameterError, ShapeError
from halfmap.io.atomic import atomic_path
from halfmap.io.binary import decoding_threads, file_size, opened, reading

# What tifffile logs about a bad file is raised here as an error that names the frame.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

EER_COMPRESSIONS = (65000, 65001, 65002)
_DTYPES = tuple(np.dtype(code) for code in ("u1", "i1", "u2", "i2", "f4"))
_COMPRESSIONS = {None: None, "lzw": "lzw", "deflate": "adobe_deflate", "zstd": "zstd"}
# IMOD packs two 4-bit values a byte without a mark: only sizes that no such camera has tell (height, width).
_PACKED_SHAPES = {(8184, 5760), (5760, 8184), (11520, 4092), (4092, 11520)} | {
    (7676, 3710),
    (3710, 7676),
    (7420, 3838),
    (3838, 7420),
}
# Zstandard shrinks a block of equal bytes most, 128 KiB to 4 bytes; more than that is a corrupt size.
_LARGEST_RATIO = 1 << 16
_TRUNCATED = "copy or transfer the file again"
_OTHER_TIFF = "convert it to a grey TIFF of 8 or 16 bits or float32"


@dataclass(frozen=True)
class TiffInfo:
    """What a TIFF movie holds, without decoding a frame.

    Attributes
    ----------
    path : Path
        File it was read from.
    shape : tuple of 3 int
        (frames, y, x).
    dtype : numpy dtype
        Type of arrays as `read_tiff` gives them.
    compression : str
        Name of the compression in lower case, "none" for none.
    pixel_size : float or None
        Å per pixel from the resolution tags, None where they say nothing an image could have.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: np.dtype
    compression: str
    pixel_size: float | None
    packed: bool


def frame_offsets(path: str | Path) -> list[int]:
    """Byte offsets of a TIFF's frames, from its chain of directories.

    Raises
    ------
    FileFormatError
        If the file is not a TIFF, holds no frame, or the chain leaves the file or bites its own tail.
    """
    size = file_size(path)
    with opened(path) as stream:
        start = stream.read(16)
        order = {b"II": "<", b"MM": ">"}.get(start[:2])
        version = struct.unpack(order + "H", start[2:4])[0] if order and len(start) >= 8 else None
        if order is None or version not in (42, 43) or (version == 43 and len(start) < 16):
            raise FileFormatError("is not a TIFF file", path=path, hint="give a TIFF file")
        count, pointer, entry = ("H", "I", 12) if version == 42 else ("Q", "Q", 20)
        offset = struct.unpack_from(order + pointer, start, 4 if version == 42 else 8)[0]
        offsets: dict[int, None] = {}
        while offset:
            where = f"the directory of frame {len(offsets) + 1}"
            if offset in offsets:
                raise FileFormatError(f"{where} is that of an earlier frame", path=path, hint=_TRUNCATED)
            stream.seek(offset)
            head = stream.read(struct.calcsize(order + count))
            tags = struct.unpack(order + count, head)[0] if len(head) == struct.calcsize(order + count) else 0
            following = offset + len(head) + tags * entry
            if tags == 0 or following + struct.calcsize(order + pointer) > size:
                message = f"is truncated: {where} lies beyond its end ({size} bytes)"
                raise FileFormatError(message, path=path, hint=_TRUNCATED)
            offsets[offset] = None
            stream.seek(following)
            offset = struct.unpack(order + pointer, stream.read(struct.calcsize(order + pointer)))[0]
    if not offsets:
        raise FileFormatError("holds no frames", path=path, hint=_TRUNCATED)
    return list(offsets)


@contextmanager
def open_pages(path: str | Path) -> Iterator[tuple[tifffile.TiffFile, int]]:
    """Open a TIFF with tifffile, its chain of frames checked: the file and its number of frames."""
    n_frames = len(frame_offsets(path))
    with reading(path):
        try:
            tiff = tifffile.TiffFile(path)
        except Exception as error:  # a corrupt tag can make tifffile raise anything
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise FileFormatError(f"is not a sound TIFF ({error})", path=path, hint=_TRUNCATED) from error
    with tiff:
        yield tiff, n_frames


def frame_page(tiff: tifffile.TiffFile, path: str | Path, frame: int) -> tifffile.TiffPage:
    """Tags of one frame, counted from 0; FileFormatError where they are corrupt."""
    try:
        page = tiff.pages.get(frame, aspage=True)
        if not isinstance(page, tifffile.TiffPage):
            raise TypeError("tags are missing")
        numbers = [page.compression, page.imagelength, page.imagewidth, page.samplesperpixel]
        for number in [*numbers, *page.dataoffsets, *page.databytecounts]:
            if not isinstance(number, Integral):
                raise TypeError(f"{number!r} where a number belongs")
    except Exception as error:  # as above
        message = f"the directory of frame {frame + 1} is corrupt ({error})"
        raise FileFormatError(message, path=path, hint=_TRUNCATED) from error
    return page


def frame_pieces(path: str | Path, frame: int, page: tifffile.TiffPage) -> list[tuple[int, int]]:
    """Offset and length of each piece of a frame's data; FileFormatError where they are not in the file."""
    size = file_size(path)
    pieces = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    if not pieces or any(offset < 0 or count <= 0 or offset + count > size for offset, count in pieces):
        message = f"is truncated: the data of frame {frame + 1} end beyond the file's {size} bytes"
        raise FileFormatError(message, path=path, hint=_TRUNCATED)
    return pieces


def tiff_info(path: str | Path) -> TiffInfo:
    """Read what a TIFF movie holds without decoding a frame.

    Raises
    ------
    FileFormatError
        If the file is missing, truncated, not a TIFF, an EER movie, or not grey 8 or 16 bit or float32.
    """
    with open_pages(path) as (tiff, n_frames):
        return _info(frame_page(tiff, path, 0), Path(path), n_frames)


def _info(page: tifffile.TiffPage, path: Path, n_frames: int) -> TiffInfo:
    if int(page.compression) in EER_COMPRESSIONS:
        raise FileFormatError("is an EER movie", path=path, hint="name it .eer")
    dtype = np.dtype(page.dtype) if page.dtype is not None else None
    if page.samplesperpixel != 1 or dtype not in _DTYPES or page.imagedepth != 1:
        kind = f"{page.samplesperpixel} x {dtype} a pixel"
        raise FileFormatError(f"holds {kind}, which is not a camera's frame", path=path, hint=_OTHER_TIFF)
    assert dtype is not None
    height, width = page.imagelength, page.imagewidth
    if height == 0 or width == 0:
        raise FileFormatError(f"has the impossible shape {height} x {width}", path=path, hint=_TRUNCATED)
    packed = dtype == np.uint8 and (height, width) in _PACKED_SHAPES
    try:
        name = tifffile.COMPRESSION(page.compression).name.lower().removeprefix("adobe_")
    except ValueError as error:
        message = f"has the unknown compression {page.compression}"
        raise FileFormatError(message, path=path, hint=_OTHER_TIFF) from error
    shape = (n_frames, height, 2 * width if packed else width)
    return TiffInfo(path, shape, dtype, name, _pixel_size(page), packed)


def _pixel_size(page: tifffile.TiffPage) -> float | None:
    try:
        numerator, denominator = (float(number) for number in page.tags.valueof(282))
        per_unit = {2: 2.54e8, 3: 1e8}[int(page.tags.valueof(296, default=2))]  # inch, centimetre in Å
        pixel_size = per_unit * denominator / numerator
    except (TypeError, ValueError, KeyError, ZeroDivisionError, OverflowError):
        return None  # no resolution, no unit, or tags that are damaged
    # Most writers put 72 dpi or 1, which are no pixel sizes of an electron microscope.
    return pixel_size if 0.01 <= pixel_size <= 1000 else None


def read_tiff(
    path: str | Path,
    frames: int | slice | Sequence[int] | NDArray | None = None,
    *,
    workers: int | None = None,
) -> NDArray:
    """Read frames of a TIFF movie, and no others, in MRC row order.

    Parameters
    ----------
    path : path
        TIFF or BigTIFF: grey, uint8, int8, uint16, int16 or float32; plain, LZW, deflate or Zstandard.
    frames : int, slice, sequence of int or None
        Frames counted from 0, in the order they are to come; None for all.
    workers : int, optional
        Threads, each decoding a frame; as many as there are processors, at most 8, if not given.

    Returns
    -------
    ndarray (n, y, x), or (y, x) for one frame
        In the file's own type, rows in MRC order (see the module's docstring).

    Raises
    ------
    FileFormatError
        As `tiff_info`; if a frame that was asked is corrupt, of another shape than the first, or not there.
    """
    path = Path(path)
    with open_pages(path) as (tiff, n_frames):
        info = _info(frame_page(tiff, path, 0), path, n_frames)
        chosen = frame_numbers(path, n_frames, frames)
        pages = [frame_page(tiff, path, frame) for frame in chosen]
        stored = _check_pages(info, chosen, pages)
        out = np.empty((len(chosen), *stored), info.dtype)
        with opened(path) as stream:
            tasks = [(info, stream.fileno(), *task) for task in zip(chosen, pages, out, strict=True)]
            with ThreadPoolExecutor(workers or decoding_threads()) as pool:
                list(pool.map(lambda task: _decode(*task), tasks))
    if info.packed:
        out = np.stack([out & 15, out >> 4], axis=-1).reshape(len(out), *info.shape[1:])
    return out[0] if isinstance(frames, int | np.integer) else out


def frame_numbers(
    path: str | Path, n_frames: int, frames: int | slice | Sequence[int] | NDArray | None
) -> list[int]:
    """Frames asked, as numbers from 0; FileFormatError where one is not in a movie of `n_frames`."""
    if frames is None or isinstance(frames, slice):
        return list(range(n_frames)[frames if frames is not None else slice(None)])
    chosen = [int(frame) for frame in np.atleast_1d(np.asarray(frames))]
    for frame in chosen:
        if not -n_frames <= frame < n_frames:
            message = f"holds {n_frames} frames, number {frame} (from 0) was asked"
            raise FileFormatError(message, path=path, hint="check the frame range")
    return [frame % n_frames for frame in chosen]


def _check_pages(info: TiffInfo, frames: list[int], pages: list[tifffile.TiffPage]) -> tuple[int, int]:
    """Refuse frames of another kind or outside the file before anything is allocated; stored shape."""
    stored = (info.shape[1], info.shape[2] // 2 if info.packed else info.shape[2])
    for frame, page in zip(frames, pages, strict=True):
        if (page.imagelength, page.imagewidth) != stored or np.dtype(page.dtype) != info.dtype:
            message = f"frame {frame + 1} is {page.imagelength} x {page.imagewidth} {page.dtype}"
            message += f", the first is {stored[0]} x {stored[1]} {info.dtype}"
            raise FileFormatError(message, path=info.path, hint="write all frames alike")
        pieces = frame_pieces(info.path, frame, page)
        raw_bytes = stored[0] * stored[1] * info.dtype.itemsize
        if raw_bytes > _LARGEST_RATIO * sum(count for _, count in pieces):
            message = f"frame {frame + 1} says {stored[0]} x {stored[1]} pixels, more than its data can hold"
            raise FileFormatError(message, path=info.path, hint=_TRUNCATED)
    return stored


def _decode(info: TiffInfo, descriptor: int, frame: int, page: tifffile.TiffPage, out: NDArray) -> None:
    """Decode one frame into `out`, its rows flipped to MRC order."""
    height, width = out.shape
    flipped = out[::-1]
    filled = 0
    try:
        pieces = zip(page.dataoffsets, page.databytecounts, strict=True)
        for number, (offset, count) in enumerate(pieces):
            segment, (_, _, row, column, _), _ = page.decode(os.pread(descriptor, count, offset), number)
            piece = np.asarray(segment)[0, : height - row, : width - column, 0]
            flipped[row : row + piece.shape[0], column : column + piece.shape[1]] = piece
            filled += piece.size
    except Exception as error:  # codecs raise errors of their own, without a common root
        message = f"frame {frame + 1} is corrupt ({error})"
        raise FileFormatError(message, path=info.path, hint=_TRUNCATED) from error
    if filled != out.size:
        raise FileFormatError(f"frame {frame + 1} lacks rows", path=info.path, hint=_TRUNCATED)


def write_tiff_movie(
    path: str | Path,
    frames: NDArray | Iterable[NDArray],
    *,
    pixel_size: float | None = None,
    compression: str | None = "lzw",
) -> None:
    """Write frames as a multi-page TIFF, whole or not at all, rows flipped to TIFF order.

    Parameters
    ----------
    path : path
        File to write.
    frames : array (n, h, w), or iterable of arrays (h, w)
        uint8, int8, uint16, int16 or float32, rows in MRC order; an iterable is written frame by frame.
    pixel_size : float, optional
        Å per pixel, stored in the resolution tags.
    compression : {"lzw", "deflate", "zstd", None}
        All but Zstandard are read by every program of the field.

    Raises
    ------
    ParameterError
        If the compression, the pixel size or the type of the frames is not possible.
    ShapeError
        If there is no frame, or frames differ in shape.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from halfmap.io.tiff import read_tiff, write_tiff_movie
    >>> path = tempfile.mkdtemp() + "/movie.tif"
    >>> write_tiff_movie(path, np.ones((3, 8, 6), np.uint8), pixel_size=0.8)
    >>> read_tiff(path, slice(1, 3)).shape
    (2, 8, 6)
    """
    if compression not in _COMPRESSIONS:
        names = ", ".join(str(name) for name in _COMPRESSIONS)
        raise ParameterError(f"no TIFF compression {compression!r}", path=path, hint=f"choose of {names}")
    if pixel_size is not None and not (np.isfinite(pixel_size) and pixel_size > 0):
        raise ParameterError(f"the pixel size {pixel_size} is not a positive number of Å", path=path)
    tags: dict = {"compression": _COMPRESSIONS[compression], "photometric": "minisblack", "metadata": None}
    if pixel_size is not None:
        tags |= {"resolution": (1e8 / pixel_size, 1e8 / pixel_size), "resolutionunit": "CENTIMETER"}
    known = frames.nbytes if isinstance(frames, np.ndarray) else None
    shape: tuple[int, ...] | None = None
    # A classic TIFF ends at 4 GiB; where the length is not known, the large form is the safe one.
    large = known is None or known > 3.9e9
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=large) as writer:
        for number, frame in enumerate(frames):
            frame = np.asarray(frame)
            if frame.dtype not in _DTYPES:
                names = ", ".join(str(dtype) for dtype in _DTYPES)
                raise ParameterError(
                    f"frames are {frame.dtype}", path=path, hint=f"convert to one of {names}"
                )
            if frame.ndim != 2 or frame.size == 0 or (shape is not None and frame.shape != shape):
                message = f"frame {number + 1} has shape {frame.shape}, a movie's frames are alike and 2D"
                raise ShapeError(message, path=path)
            shape = frame.shape
            writer.write(np.ascontiguousarray(frame[::-1]), software="Halfmap", contiguous=False, **tags)
        if shape is None:
            raise ShapeError("no frames were given", path=path, hint="a movie holds at least one")
