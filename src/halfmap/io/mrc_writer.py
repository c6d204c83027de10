"""Write MRC images, stacks and volumes, whole or image by image in bounded memory."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
from mrcfile.dtypes import HEADER_DTYPE
from numpy.typing import ArrayLike, DTypeLike, NDArray

from halfmap.errors import ParameterError, ShapeError
from halfmap.io.atomic import atomic_path
from halfmap.io.mrc_header import HEADER_BYTES, MODES

_MODE_OF = {np.dtype(code): mode for mode, code in MODES.items() if mode != 101}
_LABEL = 80
"""Letters of a label."""

_BATCH_BYTES = 1 << 22
"""Of images that are converted and written at a time, as large as a cache."""


def write_mrc(
    path: str | Path,
    array: ArrayLike,
    *,
    pixel_size: float,
    stack: bool | None = None,
    dtype: DTypeLike | None = None,
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
    label: str = "",
) -> None:
    """Write an image, a stack of images or a volume as MRC, whole or not at all.

    Parameters
    ----------
    path : path
        File to write.
    array : array (h, w) or (n, h, w) or (z, y, x)
        Image, stack or volume.
    pixel_size : float
        Å per pixel or voxel, the same along all axes.
    stack : bool, optional
        Whether three axes are a stack of images, not a volume; as the name ends in `.mrcs` if not given.
    dtype : dtype, optional
        float32, float16, int8, int16 or uint16. If not given, the array's own where MRC has it, else float32
        for floating point, int8 for bool and uint16 for uint8 (which MRC has not).
    origin : tuple of 3 float
        (x, y, z) of the first voxel, Å.
    label : str
        ASCII, of 80 letters at most, that the header is to hold beside Halfmap's name.

    Raises
    ------
    ShapeError
        If the array is empty or has not two or three axes.
    ParameterError
        If the pixel size is not a positive number, the type is not one of MRC's, or a value does not fit it.
    """
    array = np.asarray(array)
    if array.ndim not in (2, 3) or array.size == 0:
        raise ShapeError(
            f"an array of shape {array.shape} cannot be an MRC file", path=path, hint="give 2 or 3 axes"
        )
    if stack is None:
        stack = array.ndim == 2 or Path(path).suffix == ".mrcs"
    images = array.reshape(-1, *array.shape[-2:])
    writer = MrcStackWriter(
        path,
        shape=(images.shape[1], images.shape[2]),
        pixel_size=pixel_size,
        dtype=_default_dtype(array.dtype) if dtype is None else dtype,
        n_images=len(images),
        stack=stack,
        origin=origin,
        label=label,
    )
    with writer:
        writer.append(images)


def _default_dtype(dtype: np.dtype) -> np.dtype:
    native = dtype.newbyteorder("=")
    if native in _MODE_OF:
        return native
    substitutes = {np.dtype(bool): np.dtype("i1"), np.dtype("u1"): np.dtype("u2")}
    if native in substitutes:
        return substitutes[native]
    if native.kind == "f":
        return np.dtype("f4")
    raise ParameterError(f"MRC cannot hold {dtype} values", hint="say which of its types to convert them to")


class MrcStackWriter:
    """Write an MRC file image by image in bounded memory; it appears under its name when the block ends well.

    Parameters
    ----------
    path : path
        File to write.
    shape : tuple of 2 int
        (h, w) of every image.
    pixel_size : float
        Å per pixel.
    dtype : dtype
        float32, float16, int8, int16 or uint16.
    n_images : int, optional
        Number of images if it is known; the block then fails if another number was written.
    stack : bool
        False writes the images as the sections of one volume.
    origin : tuple of 3 float
        (x, y, z) of the first voxel, Å.
    label : str
        As for `write_mrc`.

    Raises
    ------
    ParameterError
        If the pixel size or the type is not possible, or a value does not fit the type.
    ShapeError
        If an image has another shape, or images are missing at the end.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from halfmap.io.mrc import MrcStackWriter, read_header
    >>> path = tempfile.mkdtemp() + "/particles.mrcs"
    >>> with MrcStackWriter(path, shape=(8, 8), pixel_size=1.2) as stack:
    ...     for image in np.random.default_rng(1).normal(size=(3, 8, 8)):
    ...         stack.append(image)
    >>> read_header(path).shape
    (3, 8, 8)
    """

    def __init__(
        self,
        path: str | Path,
        *,
        shape: tuple[int, int],
        pixel_size: float,
        dtype: DTypeLike = np.float32,
        n_images: int | None = None,
        stack: bool = True,
        origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
        label: str = "",
    ) -> None:
        if not (math.isfinite(pixel_size) and pixel_size > 0):
            raise ParameterError(f"the pixel size {pixel_size} is not a positive number of Å", path=path)
        if np.dtype(dtype) not in _MODE_OF:
            names = ", ".join(str(known) for known in _MODE_OF)
            raise ParameterError(
                f"MRC cannot hold {np.dtype(dtype)} values", path=path, hint=f"choose of {names}"
            )
        self.path = Path(path)
        self.shape = (int(shape[0]), int(shape[1]))
        self.pixel_size = float(pixel_size)
        self.dtype = np.dtype(dtype)
        self.n_images = n_images
        self.stack = stack
        self.origin = origin
        if not label.isascii() or len(label) > _LABEL:
            raise ParameterError(f"an MRC header cannot hold the label {label!r}", path=path)
        self.labels = [b"Halfmap", *([label.encode("ascii")] if label else [])]
        self._exit = ExitStack()
        self._stream: BinaryIO | None = None
        self._length = 0
        # A row per image: minimum, maximum, mean, mean square deviation.
        self._moments = np.zeros((max(n_images or 0, 16), 4))
        self._written = np.zeros(len(self._moments), bool)

    def __enter__(self) -> MrcStackWriter:
        temporary = self._exit.enter_context(atomic_path(self.path))
        self._stream = self._exit.enter_context(temporary.open("wb"))
        self._stream.write(bytes(HEADER_BYTES))
        return self

    def __exit__(self, kind, value, trace) -> bool | None:
        if kind is not None:
            return self._exit.__exit__(kind, value, trace)
        with self._exit:
            self._finish()
        return None

    def __len__(self) -> int:
        """Images so far: one more than the highest number written."""
        return self._length

    def append(self, images: ArrayLike) -> None:
        """Write an image (h, w) or several (n, h, w) after the last one."""
        images = np.asarray(images)
        if images.ndim == 2:
            images = images[None]
        step = max(1, _BATCH_BYTES // max(1, images[:1].nbytes))
        for first in range(0, len(images), step):
            self._write(self._length, images[first : first + step])

    def __setitem__(self, index: int, image: ArrayLike) -> None:
        """Write image number `index`, counted from 0, in any order."""
        self._write(index, np.asarray(image)[None])

    def _write(self, first: int, images: NDArray) -> None:
        """Write neighbouring images (n, h, w)."""
        if self._stream is None:
            raise ParameterError("the stack is not open", path=self.path, hint="use it in a `with` block")
        if images.shape[1:] != self.shape:
            raise ShapeError(
                f"an image of shape {images.shape[1:]} does not fit the stack's {self.shape}", path=self.path
            )
        last = first + len(images)
        if first < 0 or (self.n_images is not None and last > self.n_images):
            number = first if first < 0 else max(first, self.n_images or 0)
            raise ShapeError(f"image {number} is outside the stack of {self.n_images} images", path=self.path)
        stored = _convert(images, self.dtype, self.path)
        moments = _moments(stored)
        if self.dtype == np.float16 and np.isinf(moments[:, :2]).any() and np.isfinite(images).all():
            message = f"a value of {np.abs(images).max():g} does not fit float16"
            raise ParameterError(message, path=self.path, hint="write float32")
        start = HEADER_BYTES + first * stored[0].nbytes
        if self._stream.tell() != start:
            self._stream.seek(start)
        self._stream.write(stored.data)
        while last > len(self._moments):
            self._moments = np.concatenate([self._moments, np.zeros_like(self._moments)])
            self._written = np.concatenate([self._written, np.zeros_like(self._written)])
        self._moments[first:last] = moments
        self._written[first:last] = True
        self._length = max(self._length, last)

    def _finish(self) -> None:
        expected = self._length if self.n_images is None else self.n_images
        if (count := int(self._written.sum())) != expected:
            raise ShapeError(f"only {count} of {expected} images were written", path=self.path)
        if self._length == 0:
            raise ShapeError("no images were written", path=self.path, hint="a stack holds at least one")
        assert self._stream is not None
        self._stream.seek(0)
        self._stream.write(self._header(self._moments[: self._length]).tobytes())

    def _header(self, moments: NDArray) -> NDArray:
        header = np.zeros((), HEADER_DTYPE.newbyteorder("<"))
        nz, (ny, nx), depth = self._length, self.shape, 1 if self.stack else self._length
        header["nx"], header["ny"], header["nz"] = nx, ny, nz
        header["mx"], header["my"], header["mz"] = nx, ny, depth
        header["mode"] = _MODE_OF[self.dtype]
        header["cella"] = tuple(n * self.pixel_size for n in (nx, ny, depth))
        header["cellb"] = (90.0, 90.0, 90.0)
        header["mapc"], header["mapr"], header["maps"] = 1, 2, 3
        header["ispg"] = 0 if self.stack else 1
        header["nversion"] = 20140
        header["origin"] = self.origin
        header["map"] = b"MAP "
        header["machst"] = (0x44, 0x44, 0, 0)
        minimum, maximum, mean, square = moments.T
        with np.errstate(invalid="ignore", over="ignore"):
            header["dmin"], header["dmax"], header["dmean"] = minimum.min(), maximum.max(), mean.mean()
            header["rms"] = np.sqrt((square + (mean - mean.mean()) ** 2).mean())
        header["nlabl"] = len(self.labels)
        header["label"][: len(self.labels)] = self.labels
        return header


def _convert(images: NDArray, dtype: np.dtype, path: Path) -> NDArray:
    """Cast images to a stored type, refusing values that the type cannot hold."""
    if dtype.kind in "iu" and images.size:
        if images.dtype.kind == "f":
            images = np.rint(images)
        limits = np.iinfo(dtype)
        # NaN fails both comparisons and must be refused too.
        if not (images.min() >= limits.min and images.max() <= limits.max):
            raise ParameterError(
                f"values from {images.min()} to {images.max()} do not fit {dtype}",
                path=path,
                hint="write float32",
            )
    if dtype == np.float16 and images.dtype == np.float32:
        import torch

        # In a quarter of NumPy's time, with the same rounding.
        return torch.from_numpy(np.ascontiguousarray(images)).half().numpy()
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(images, dtype=dtype.newbyteorder("<"))


def _moments(images: NDArray) -> NDArray[np.float64]:
    """Minimum, maximum, mean and mean square deviation of every image, (n, 4)."""
    from halfmap.io.mrc_kernel import mean_and_square

    if images.dtype == np.float16:
        import torch

        images = torch.from_numpy(images).float().numpy()
    flat = images.reshape(len(images), -1)
    found = np.empty((len(flat), 4))
    found[:, 0], found[:, 1] = flat.min(axis=1), flat.max(axis=1)
    mean_and_square(flat, found[:, 2:])
    return found
