"""Read the camera's defective pixels: text of rectangles or a mask map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfmap.errors import FileFormatError, ShapeError, TableError
from halfmap.io.binary import opened
from halfmap.io.images import read_image

_SERIALEM_WORDS = ("CameraSize", "RotationAndFlip", "K2Type", "Bad")
_SERIALEM_HINT = "make a map of it with IMOD: clip defect -D defects.txt -f tif movie.tif map.tif"


def read_defects(path: str | Path, *, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Read which pixels of a movie are defective.

    Parameters
    ----------
    path : path
        `.txt` with `x y w h` a line, as MotionCor2 and RELION read it: first column and row (from 0, in the
        movie's own pixels, rows in MRC order) and size of a rectangle. Else an MRC or TIFF map, not 0 where
        a pixel is defective.
    shape : tuple of 2 int
        (y, x) of the movie's frames.

    Returns
    -------
    ndarray (y, x) bool
        True where a pixel is defective. Rectangles are cut at the frame's edges.

    Raises
    ------
    FileFormatError
        If the file cannot be read, is SerialEM's list, or a map holds NaN.
    TableError
        If a line is not four whole numbers, or its rectangle is empty or outside the frame; names the line.
    ShapeError
        If a map has another shape.
    """
    path = Path(path)
    if path.suffix.lower() == ".txt":
        return _read_rectangles(path, shape)
    image = read_image(path)
    if image.shape != tuple(shape):
        message = f"the defect map is {image.shape[0]} x {image.shape[1]} px (y, x), the movie "
        raise ShapeError(message + f"{shape[0]} x {shape[1]} px", path=path, hint="turn or make it anew")
    if np.isnan(image).any():
        raise FileFormatError("the defect map holds NaN", path=path, hint="make it anew")
    return image != 0


def read_rectangles(path: Path) -> list[tuple[int, int, int, int, int]]:
    """Line number, x, y, width and height of every rectangle of a `.txt`, unchecked against a movie.

    Raises
    ------
    FileFormatError
        If the file cannot be read or is SerialEM's list.
    TableError
        If a line is not four whole numbers; names the line.
    """
    with opened(path) as stream:
        text = stream.read().decode("utf-8", "replace")
    if any(word in text for word in _SERIALEM_WORDS):
        raise FileFormatError("is SerialEM's list of defects, not x y w h", path=path, hint=_SERIALEM_HINT)
    rectangles = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        try:
            x, y, w, h = (int(word) for word in words)
        except ValueError as error:
            raise TableError("is not four whole numbers", path=path, row=number, hint="x y w h") from error
        rectangles.append((number, x, y, w, h))
    return rectangles


def _read_rectangles(path: Path, shape: tuple[int, int]) -> NDArray[np.bool_]:
    mask = np.zeros(shape, bool)
    for number, x, y, w, h in read_rectangles(path):
        part = mask[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)]
        if w <= 0 or h <= 0 or part.size == 0:
            message = f"the rectangle {x} {y} {w} {h} covers nothing of {shape[0]} x {shape[1]} px (y, x)"
            raise TableError(message, path=path, row=number, hint="give x y w h in the movie's pixels")
        part[:] = True
    return mask
