"""The steps that import movies, and in time everything else, into a project."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

from halfmap.engine import Context, Input, Out, Param, Step

OPTICS = "Optics"


class ImportImages(Step):
    """What the microscope was set to, shared by all imports of images."""

    pixel_size: float | None = Param(
        None, "pixel size of the files; default: read from their headers", unit="Å/px", section=OPTICS, gt=0
    )
    voltage: float = Param(300.0, "acceleration voltage", unit="kV", section=OPTICS, gt=0)
    spherical_aberration: float = Param(2.7, "spherical aberration Cs", unit="mm", section=OPTICS, ge=0)
    amplitude_contrast: float = Param(0.1, "fraction of amplitude contrast", unit="none", section=OPTICS, ge=0, le=1)
    optics_group: str = Param("opticsGroup1", "name of the optics group", unit="none", section=OPTICS, min_length=1)


class ImportMovies(ImportImages, name="import movies", label="relion.import.movies"):
    """Import movies: list them with the microscope's settings, and check every header and the gain.

    Every movie's header is read; movies that cannot be opened, or whose size differs from the others', are
    left out and named. The gain reference is turned as asked and compared with the mean frame in all eight
    orientations: a reference that fits better in another one stops the import, because a wrong gain ruins
    motion correction silently.
    """

    outputs = {
        "movies": Out("movies.star", "MicrographMovieGroupMetadata.star.relion"),
        "gain": Out("gain.mrc", "Image2D.mrc.halfmap.gain", optional=True),
        "picture": Out("movies.png", "Image2D.png.halfmap.overview"),
    }

    movies: tuple[Path, ...] = Input("movies (TIFF, MRC or EER), as names or quoted patterns", min_length=1)
    gain: Path | None = Input("gain reference, multiplied with each frame", default=None)
    defects: Path | None = Input("defects: lines 'x y width height', or a mask image", default=None)
    mtf: Path | None = Input("STAR file with the detector's MTF", default=None)
    dose_per_frame: float = Param(..., "exposure of each stored frame", unit="e/Å²", section="Exposure", gt=0)
    pre_exposure: float = Param(0.0, "exposure before the first frame", unit="e/Å²", section="Exposure", ge=0)
    eer_grouping: int = Param(
        32, "EER: number of hardware frames in a fraction", unit="none", section="Exposure", ge=1
    )
    eer_upsampling: Literal[1, 2] = Param(
        1, "EER: 1 for physical pixels, 2 for super-resolution", unit="none", section="Exposure"
    )
    gain_rotation: Literal[0, 1, 2, 3] = Param(
        0, "turn the gain reference by this many times 90°, as RELION does", unit="none", section="Gain"
    )
    gain_flip: Literal[0, 1, 2] = Param(
        0, "then flip it: 1 upside down, 2 left to right, as RELION does", unit="none", section="Gain"
    )
    check_gain: bool = Param(
        True, "stop if the gain reference fits better in another orientation", unit="none", section="Gain"
    )

    def run(self, ctx: Context) -> None:
        """Examine every movie, orient and check the gain, write the table and the overview picture."""
        from halfmap.io.tables import write_movies
        from halfmap.steps.import_ import gain, microscope, movies, pictures

        files = microscope.expand(self.movies, ctx.project)
        examine = functools.partial(movies.examine, step=self)
        headers = ctx.map(examine, files, unit="movie")
        headers = microscope.keep_common_size(ctx, headers, unit="movie")
        reference = gain.orient(self, ctx, headers)
        table = movies.tabulate(self, ctx, headers, gain=reference)
        write_movies(ctx.folder / "movies.star", table)
        pictures.draw_movies(ctx.folder / "movies.png", ctx, table)
