"""Examine micrographs and list them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfmap.engine import Context
from halfmap.errors import FileFormatError
from halfmap.steps.import_.microscope import contents

if TYPE_CHECKING:
    from halfmap.data import MicrographSet


def examine(path: Path) -> dict[str, Any]:
    """Read a micrograph's header; what the table needs of it as plain values.

    Raises
    ------
    FileFormatError
        If it cannot be opened, is cut short, or holds several images.
    """
    from halfmap.io.movies import open_movie

    image = open_movie(path)
    if image.n_frames != 1:
        message = f"holds {image.n_frames} images where one belongs"
        raise FileFormatError(message, path=path, hint="if it is a movie, use: halfmap import movies")
    if path.suffix.lower() in (".tif", ".tiff"):
        image.read()  # a TIFF's header does not tell whether the file is whole
    height, width = image.shape
    return {"width": width, "height": height, "pixel_size": image.pixel_size}


def tabulate(ctx: Context, headers: list[dict[str, Any]], settings: dict[str, Any]) -> MicrographSet:
    """Make the table of micrographs: the session's settings as an optics group, a row per micrograph."""
    import polars as pl

    from halfmap.data import MicrographSet

    optics = settings | {"rlnMicrographPixelSize": settings["rlnMicrographOriginalPixelSize"]}
    rows = pl.DataFrame(
        {
            "rlnMicrographName": [ctx.relative(header["file"]) for header in headers],
            "rlnOpticsGroup": [1] * len(headers),
            "rlnImageSizeX": [header["width"] for header in headers],
            "rlnImageSizeY": [header["height"] for header in headers],
            **contents(headers),
        }
    )
    return MicrographSet(optics=pl.DataFrame([optics]), rows=rows)
