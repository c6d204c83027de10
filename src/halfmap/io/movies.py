"""Open movies of any format as one kind of object, frames read lazily in MRC row order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfmap.errors import FileFormatError, ParameterError
from halfmap.io.eer import eer_info, read_eer
from halfmap.io.mrc import read_header, read_mrc, read_sections
from halfmap.io.tiff import read_tiff, tiff_info

MOVIE_SUFFIXES = (".mrc", ".mrcs", ".tif", ".tiff", ".eer")
_COMPRESSED = (".gz", ".bz2")


@dataclass(frozen=True)
class Movie:
    """A movie: what its frames are, and how to read them.

    Attributes
    ----------
    path : Path
        File.
    n_frames : int
        Frames; of EER the fractions.
    shape : tuple of 2 int
        (y, x) of a frame.
    pixel_size : float or None
        Å per pixel as the file states it, None where it states none (always for EER).
    dtype : numpy dtype
        Type of frames as they are read.
    """

    path: Path
    n_frames: int
    shape: tuple[int, int]
    pixel_size: float | None
    dtype: np.dtype
    _read: Callable[[slice], NDArray] = field(repr=False, compare=False)

    def read(self, first: int = 0, last: int | None = None) -> NDArray:
        """Read frames first, ..., last - 1, counted from 0; all to the end if `last` is not given.

        Returns
        -------
        ndarray (n, y, x)
            In the file's own type, rows in MRC order.

        Raises
        ------
        FileFormatError
            If a frame is corrupt or the range is not in the movie.
        """
        last = self.n_frames if last is None else last
        if not 0 <= first < last <= self.n_frames:
            message = f"holds {self.n_frames} frames, {first} to {last - 1} (from 0) were asked"
            raise FileFormatError(message, path=self.path, hint="check the frame range")
        return self._read(slice(first, last))


def open_movie(path: str | Path, *, eer_grouping: int = 32, eer_upsampling: int = 1) -> Movie:
    """Open a movie; frames are read when they are asked for.

    Parameters
    ----------
    path : path
        `.mrc`, `.mrcs` (both also `.gz` or `.bz2`, then read whole at the first frame), `.tif`, `.tiff` or
        `.eer`.
    eer_grouping : int
        Frames of an EER movie summed to one.
    eer_upsampling : int
        1 for the pixels of an EER camera, 2 for half pixels.

    Raises
    ------
    FileFormatError
        If the suffix is not a movie's, or as the readers of the formats.
    ParameterError
        If an EER setting is not possible.
    """
    path = Path(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in _COMPRESSED
    kind = suffixes[-2] if compressed and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    if kind in (".mrc", ".mrcs"):
        return _open_mrc(path)
    if kind in (".tif", ".tiff") and not compressed:
        info = tiff_info(path)
        read = partial(read_tiff, path)
        return Movie(path, info.shape[0], info.shape[1:], info.pixel_size, info.dtype, read)
    if kind == ".eer" and not compressed:
        return _open_eer(path, eer_grouping, eer_upsampling)
    known = ", ".join(MOVIE_SUFFIXES)
    raise FileFormatError("is not a movie by its name", path=path, hint=f"movies end in {known}")


class _Unpacked:
    """A compressed movie, unpacked once: frame after frame it would be unpacked from its start each time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def frames(self) -> NDArray:
        return read_mrc(self.path)

    def __call__(self, frames: slice) -> NDArray:
        return self.frames[frames]


def _open_mrc(path: Path) -> Movie:
    header = read_header(path)
    read = partial(read_sections, header) if header.compression is None else _Unpacked(path)
    return Movie(path, header.shape[0], header.shape[1:], header.pixel_size, header.dtype, read)


def _open_eer(path: Path, grouping: int, upsampling: int) -> Movie:
    if grouping < 1 or upsampling not in (1, 2):
        message = f"EER cannot be read in fractions of {grouping} frames at upsampling {upsampling}"
        raise ParameterError(message, path=path, hint="give a grouping of 1 or more, upsampling 1 or 2")
    info = eer_info(path)
    n_fractions = info.n_fractions(grouping)
    if n_fractions == 0:
        message = f"has {info.n_frames} frames, fewer than one fraction of {grouping}"
        raise FileFormatError(message, path=path, hint="sum fewer frames to a fraction")
    return Movie(
        path,
        n_fractions,
        (upsampling * info.shape[0], upsampling * info.shape[1]),
        None,
        np.dtype(np.uint8 if grouping <= 255 else np.uint16),
        partial(read_eer, path, grouping=grouping, upsampling=upsampling),
    )
