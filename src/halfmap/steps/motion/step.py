"""The step that aligns the frames of movies and sums them."""

from __future__ import annotations

import functools
from pathlib import Path

from pydantic import model_validator

from halfmap.engine import Context, Input, Out, Param, Step

FRAMES, EXPOSURE, MOTION, OUTPUT = "Frames", "Exposure", "Motion", "Output"


class MotionStep(Step, name="motion", label="relion.motioncorr.own"):
    """Correct movies for motion, weigh them by dose and sum them to micrographs.

    All pairs of frames give the track of the whole field. Then track and local motion are refined together:
    the likelihood of all shifts, given the spectra of specimen and noise measured in the movie itself, times
    the prior that local motion is smooth over the field and slows down with dose. Each shift has a standard
    error. Every pixel is interpolated once, by a windowed sinc. Bad pixels are found and replaced. Beside the
    dose-weighted and the plain sum, those of even and odd frames are written, for denoising, the spectrum
    that the CTF is fitted to, and the motion as RELION's polishing reads it. A movie that cannot be read is
    named and left out.

    References
    ----------
    .. [1] Zheng et al. 2017, Nat. Methods 14, 331-332, DOI 10.1038/nmeth.4193
    .. [2] Zivanov, Nakane & Scheres 2019, IUCrJ 6, 5-17, DOI 10.1107/S205225251801463X
    .. [3] Grant & Grigorieff 2015, eLife 4, e06980, DOI 10.7554/eLife.06980
    """

    outputs = {
        "micrographs": Out("corrected_micrographs.star", "MicrographGroupMetadata.star.relion.motioncorr"),
        "picture": Out("summary.png", "Image2D.png.halfmap.overview"),
    }

    movies: Path = Input("table of movies", node="MicrographMovieGroupMetadata.star.relion")
    first_frame: int = Param(
        1, "first frame to use", unit="none", section=FRAMES, ge=1, aliases=("first_frame_sum",)
    )
    last_frame: int | None = Param(
        None, "last frame to use; default: the last there is", unit="none", section=FRAMES, ge=1
    )
    grouping: int | None = Param(
        None,
        "frames aligned as one; default: as many as have 0.5 e/Å² together",
        unit="none",
        section=FRAMES,
        ge=1,
        aliases=("group_frames",),
    )
    detect_bad_pixels: bool = Param(
        True,
        "look for hot and dead pixels beside those of the gain reference and the defect file",
        unit="none",
        section=FRAMES,
    )
    dose_per_frame: float | None = Param(
        None,
        "exposure of each frame (for EER of each fraction); default: as the table of movies says",
        unit="e/Å²",
        section=EXPOSURE,
        gt=0,
        le=100,
    )
    dose_weighting: bool = Param(
        True, "weigh frames by radiation damage in the main sum", unit="none", section=EXPOSURE
    )
    local: bool = Param(
        True, "let the field deform; off: one track for all of it", unit="none", section=MOTION
    )
    largest_motion: float = Param(
        150.0, "largest displacement between two frames", unit="Å", section=MOTION, gt=0, le=2000
    )
    patch_size: float = Param(
        360.0, "side of the patches that local motion is seen in", unit="Å", section=MOTION, ge=100
    )
    correlation_length: float = Param(
        4000.0,
        "distance over which local motion is alike",
        unit="Å",
        section=MOTION,
        advanced=True,
        ge=1500,
    )
    alignment_resolution: float = Param(
        8.0, "finest detail that frames are aligned by", unit="Å", section=MOTION, advanced=True, ge=3, le=50
    )
    binning: float = Param(
        1.0,
        "pixel size of the micrographs over that of the movies; 2 for super-resolution",
        unit="none",
        section=OUTPUT,
        ge=1,
        le=16,
        aliases=("bin_factor",),
    )
    unweighted: bool = Param(
        True, "write the sum without dose weighting as well", unit="none", section=OUTPUT
    )
    even_odd: bool = Param(True, "write the sums of even and odd frames", unit="none", section=OUTPUT)
    float16: bool = Param(
        False,
        "write micrographs in half precision, which RELION 4 or newer reads; even and odd sums then add up "
        "to the plain one within rounding",
        unit="none",
        section=OUTPUT,
    )
    spectrum_dose: float = Param(
        4.0,
        "exposure of the groups of frames whose power spectra are averaged, for RELION's CTF step",
        unit="e/Å²",
        section=OUTPUT,
        gt=0,
    )
    pictures: bool = Param(True, "draw a picture of each movie", unit="none", section=OUTPUT)

    @model_validator(mode="after")
    def _movies_are_listed(self) -> MotionStep:
        if self.movies.suffix != ".star":
            raise ValueError(
                f"{self.movies} is no table of movies: `halfmap import movies` makes one, movies.star"
            )
        if self.last_frame is not None and self.last_frame < self.first_frame:
            raise ValueError(
                f"the last frame ({self.last_frame}) comes before the first ({self.first_frame})"
            )
        return self

    def run(self, ctx: Context) -> None:
        """Correct movie after movie, tabulate the micrographs, draw the summary."""
        from halfmap.data.versions import row_versions
        from halfmap.io.tables import read_movies, write_micrographs
        from halfmap.steps.motion import movie, pictures, tables

        movies = read_movies(ctx.resolve(self.movies))
        items = tables.list_movies(self, ctx, movies)
        (ctx.folder / movie.FOLDER).mkdir(exist_ok=True)
        correct = functools.partial(movie.correct_movie, step=self, folder=ctx.folder, device=ctx.device)
        versions = row_versions(movies, "rlnMicrographMovieName")
        done = ctx.map(
            correct,
            items,
            unit="movie",
            version=lambda item: versions[item.name],
            files=lambda item: item.key,
        )
        write_micrographs(ctx.folder / "corrected_micrographs.star", tables.tabulate(self, ctx, movies, done))
        names = [row["name"] for row in done]
        ctx.picture("summary.png", names, lambda path: pictures.draw_summary(path, done))
        tables.report(done)
