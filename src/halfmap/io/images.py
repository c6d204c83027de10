"""Particle images by their RELION names: any subset of a million, lazily and in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, DTypeLike, NDArray

from halfmap.errors import FileFormatError, ParameterError, ShapeError, TableError
from halfmap.io.mrc import MrcHeader, read_header, read_mrc, read_sections
from halfmap.io.tiff import read_tiff, tiff_info

_PIECE_BYTES = 1 << 26
_BAD_SHARE = 1e-3
_SATURATED_SHARE = 0.2
TIFF_SUFFIXES = (".tif", ".tiff", ".gain")


def read_image(path: str | Path) -> NDArray:
    """Read the one image of an MRC or TIFF file, rows in MRC order.

    Returns
    -------
    ndarray (y, x)
        In the file's own type.

    Raises
    ------
    FileFormatError
        As `read_mrc` and `read_tiff`, and if the file holds several images.
    """
    is_tiff = Path(path).suffix.lower() in TIFF_SUFFIXES
    n_images = tiff_info(path).shape[0] if is_tiff else read_header(path).shape[0]
    if n_images != 1:
        message = f"holds {n_images} images where one belongs"
        raise FileFormatError(message, path=path, hint="give a single image")
    return read_tiff(path, 0) if is_tiff else read_mrc(path, 0)


def checked_micrograph(image: NDArray, name: str) -> tuple[NDArray[np.float32], float, float]:
    """Give a micrograph as float32 without what is no number, or say why it cannot be used.

    Parameters
    ----------
    image : array (h, w)
        As read.
    name : str
        File, for the error.

    Returns
    -------
    image : ndarray (h, w), float32
        NaN and infinite pixels have the median; the array given, where it is float32 and has none.
    median, deviation : float
        Of the pixels; the deviation is half of the range that holds 68 % of them.

    Raises
    ------
    FileFormatError
        If the image is constant or saturated, or more than one pixel of a thousand is no number.
    """
    image = np.asarray(image, np.float32)
    sample = image[::7, ::5]
    finite = np.isfinite(image)
    if not finite.all():
        share = 1 - float(finite.mean())
        if share > _BAD_SHARE:
            message = f"{max(100 * share, 1):.0f} % of the pixels are not numbers"
            raise FileFormatError(message, path=name, hint="leave it out or make it anew")
        sample = sample[finite[::7, ::5]]
        image = np.where(finite, image, np.median(sample))
    low, median, high = (float(value) for value in np.percentile(sample, (16, 50, 84)))
    top = sample.max()
    if top == sample.min():
        raise FileFormatError("is blank: all pixels are alike", path=name, hint="leave it out")
    if float((sample == top).mean()) > _SATURATED_SHARE or not high > low:
        message = "is saturated or blank: many pixels have one and the same value"
        raise FileFormatError(message, path=name, hint="leave it out")
    return image, median, (high - low) / 2


class ImageStack:
    """Images named as `000001@folder/stack.mrcs`, read when they are asked for.

    Parameters
    ----------
    names : Series or sequence of str
        A name per image: number from 1, `@`, file. A file alone means its first image.
    root : path
        Folder that file names are relative to: the project's.
    dtype : dtype
        float32, or float16 to halve the memory of what is read.
    check_finite : bool
        Whether to look for NaN and infinity in everything that is read.
    table : path, optional
        File the names come from, for messages.

    Attributes
    ----------
    shape : tuple of 2 int
        (y, x) of every image.
    pixel_size : float or None
        Å per pixel in the header of the first file.

    Raises
    ------
    TableError
        If a name is not one, or a stack has fewer images than a row asks for; names the row.
    FileFormatError
        If a file is missing or is no sound MRC stack, or holds images of another shape.

    Notes
    -----
    Names are taken apart by polars at once and kept as two integers a row. Every file's header is read when
    the stack is made, so that a missing or short file shows before hours of work.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from halfmap.io.images import ImageStack
    >>> from halfmap.io.mrc import write_mrc
    >>> folder = tempfile.mkdtemp()
    >>> write_mrc(folder + "/a.mrcs", np.arange(12.0).reshape(3, 2, 2), pixel_size=1.1)
    >>> stack = ImageStack(["000003@a.mrcs", "000001@a.mrcs"], root=folder)
    >>> stack.read([0]).tolist()
    [[[8.0, 9.0], [10.0, 11.0]]]
    """

    def __init__(
        self,
        names: pl.Series | Sequence[str],
        *,
        root: str | Path = ".",
        dtype: DTypeLike = np.float32,
        check_finite: bool = False,
        table: str | Path | None = None,
    ) -> None:
        if np.dtype(dtype) not in (np.dtype(np.float32), np.dtype(np.float16)):
            raise ParameterError(f"images cannot be held as {np.dtype(dtype)}", hint="use float32 or float16")
        self.dtype = np.dtype(dtype)
        self.check_finite = check_finite
        self.table = table
        self._numbers, self._files, files = _parse(pl.Series(names, dtype=pl.String), table)
        self._headers = [read_header(Path(root) / file) for file in files]
        self.shape, self.pixel_size = self._check()

    def __len__(self) -> int:
        """Count the images."""
        return len(self._numbers)

    @property
    def files(self) -> list[Path]:
        """Files in the order they are first named."""
        return [header.path for header in self._headers]

    def _check(self) -> tuple[tuple[int, int], float | None]:
        if not self._headers:
            raise TableError("names no images", path=self.table, hint="is it the right table?")
        first = self._headers[0]
        shape = first.shape[1:]
        for header in self._headers:
            if header.shape[1:] != shape:
                message = f"holds images of {_size(header)} px, {first.path} of {_size(first)} px"
                raise ShapeError(message, path=header.path, hint="extract all particles with one box size")
        counts = np.array([header.shape[0] for header in self._headers])
        wrong = np.flatnonzero(self._numbers >= counts[self._files])
        if len(wrong):
            row = int(wrong[0])
            header = self._headers[self._files[row]]
            message = f"asks for image {int(self._numbers[row]) + 1} of {header.path}"
            message += f", which holds {header.shape[0]}"
            hint = "the stack was cut short or belongs to another table"
            raise TableError(message, path=self.table, row=row + 1, hint=hint)
        return shape, first.pixel_size

    def read(self, indices: ArrayLike) -> NDArray:
        """Read images in the order asked, each file opened once and read from front to back.

        Parameters
        ----------
        indices : array (n,) of int
            Rows, counted from 0.

        Returns
        -------
        ndarray (n, y, x)
            In the stack's dtype.

        Raises
        ------
        ShapeError
            If there is no such row.
        FileFormatError
            If a file has become shorter, or an image is not finite and `check_finite` is set.
        """
        rows = np.atleast_1d(np.asarray(indices, dtype=np.int64)).ravel()
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            wrong = rows[(rows < 0) | (rows >= len(self))][0]
            raise ShapeError(f"there are {len(self)} images, row {wrong} (from 0) was asked", path=self.table)
        out = np.empty((len(rows), *self.shape), self.dtype)
        order = np.argsort(self._files[rows], kind="stable")
        files = self._files[rows[order]]
        breaks = np.flatnonzero(np.diff(files)) + 1
        for part in np.split(order, breaks) if len(rows) else ():
            # Pieces keep what is held besides the result small, however large the request.
            for where in np.array_split(part, max(1, len(part) * out[0].nbytes // _PIECE_BYTES)):
                out[where] = self._read_file(rows[where])
        return out

    def _read_file(self, rows: NDArray[np.int64]) -> NDArray:
        """Images of rows that are all in one file."""
        header = self._headers[self._files[rows[0]]]
        images = read_sections(header, self._numbers[rows])
        try:
            with np.errstate(over="raise"):
                images = images.astype(self.dtype, copy=False)
        except FloatingPointError as error:
            message = "holds values that do not fit float16"
            raise FileFormatError(message, path=header.path, hint="read it as float32") from error
        if self.check_finite:
            self._refuse_non_finite(images, rows)
        return images

    def _refuse_non_finite(self, images: NDArray, rows: NDArray) -> None:
        bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2)))
        if len(bad):
            row = int(rows[bad[0]])
            header = self._headers[self._files[row]]
            message = f"image {self._numbers[row] + 1} (row {row + 1} of the table) is not finite everywhere"
            raise FileFormatError(message, path=header.path, hint="extract it again or drop the row")

    def chunks(self, size: int, indices: ArrayLike | None = None) -> Iterator[tuple[NDArray, NDArray]]:
        """Read all images, or those of `indices`, in the order of the files, `size` at a time.

        Parameters
        ----------
        size : int
            Images a chunk; the memory needed is that of one chunk.
        indices : array (n,) of int, optional
            Rows to read; all if not given.

        Yields
        ------
        rows : ndarray (m,) int64
            Rows that the chunk holds, by file and place in it.
        images : ndarray (m, y, x)
            Their images.
        """
        if size < 1:
            raise ParameterError(f"a chunk of {size} images cannot be", hint="give 1 or more")
        rows = np.arange(len(self)) if indices is None else np.asarray(indices, dtype=np.int64).ravel()
        rows = rows[np.lexsort((self._numbers[rows], self._files[rows]))]
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            yield chunk, self.read(chunk)


def _size(header: MrcHeader) -> str:
    return f"{header.shape[1]} x {header.shape[2]}"


def _parse(
    names: pl.Series, table: str | Path | None
) -> tuple[NDArray[np.int32], NDArray[np.int32], list[str]]:
    """Numbers from 0, file of each row, and the files, in the order of their first rows."""
    split = pl.col("name").str.splitn("@", 2).struct.rename_fields(["first", "second"])
    # Without an @ all of the name is the file.
    number = pl.col("first").str.strip_chars().cast(pl.Int64, strict=False)
    parts = (
        pl.DataFrame({"name": names})
        .select(split.alias("parts"))
        .unnest("parts")
        .select(
            number=pl.when(pl.col("second").is_null()).then(1).otherwise(number),
            file=pl.coalesce("second", "first"),
        )
    )
    sound = (pl.col("number") >= 1) & (pl.col("file") != "")
    bad = parts.select((~sound.fill_null(False)).arg_true()).to_series()
    if len(bad):
        row = bad[0]
        message = f"{names[row]!r} is no image name"
        raise TableError(message, path=table, row=row + 1, hint="image names are like 000001@stack.mrcs")
    files = parts["file"].unique(maintain_order=True)
    codes = parts.join(
        pl.DataFrame({"file": files, "code": np.arange(len(files), dtype=np.int32)}),
        on="file",
        how="left",
        maintain_order="left",
    )["code"]
    numbers = parts["number"].to_numpy() - 1
    # Larger than any stack, and still an error when compared with its length.
    numbers = np.minimum(numbers, np.iinfo(np.int32).max).astype(np.int32)
    return numbers, codes.to_numpy(), files.to_list()
