"""The steps that bring movies, micrographs, particles, coordinates and maps into a project."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Literal

from pydantic import ValidationInfo, field_validator, model_validator

from halfmap.engine import Context, Input, Out, Param, Step

OPTICS, EXPOSURE, GAIN, NAMES = "Optics", "Exposure", "Gain", "Names"
OTHER = "relion.import.other"
"""RELION's job type for all that is neither movies nor micrographs."""

_UNITS = {
    "pixel_size": ("Å", 0.15, 50.0, {"nm": 10.0, "pm": 0.01}),
    "voltage": ("kV", 30.0, 1000.0, {"MV": 1000.0, "V": 0.001}),
    "spherical_aberration": ("mm", 0.0, 20.0, {"µm": 0.001, "nm": 1e-6}),
}
"""Unit, least and greatest value of what a microscope was set to, factors from units it is mistaken for."""


class ImportImages(Step):
    """What the microscope was set to, shared by all imports of images."""

    pixel_size: float | None = Param(
        None,
        "pixel size of the files; default: read from their headers",
        unit="Å/px",
        section=OPTICS,
        aliases=("angpix",),
        ge=0.15,
        le=50,
    )
    voltage: float = Param(
        300.0, "acceleration voltage", unit="kV", section=OPTICS, aliases=("kV",), ge=30, le=1000
    )
    spherical_aberration: float = Param(
        2.7, "spherical aberration Cs", unit="mm", section=OPTICS, aliases=("Cs",), ge=0, le=20
    )
    amplitude_contrast: float = Param(
        0.1, "fraction of amplitude contrast", unit="none", section=OPTICS, aliases=("Q0",), ge=0, le=1
    )
    optics_group: str = Param(
        "opticsGroup1",
        "name of the optics group",
        unit="none",
        section=OPTICS,
        aliases=("optics_group_name",),
        min_length=1,
    )

    @field_validator("pixel_size", "voltage", "spherical_aberration", mode="before")
    @classmethod
    def _is_in_our_unit(cls, value: object, info: ValidationInfo) -> object:
        """Name the unit in which a value that cannot be would be a usual one."""
        unit, low, high, others = _UNITS[info.field_name or ""]
        if isinstance(value, int | float) and math.isfinite(value) and not low <= value <= high:
            for other, factor in others.items():
                if low <= value * factor <= high:
                    raise ValueError(f"is in {unit}: for {value:g} {other} give {value * factor:g}")
        return value


class ImportMovies(ImportImages, name="import movies", label="relion.import.movies"):
    """Import movies: list them with the microscope's settings, and check every file and the gain.

    Every movie's header and last frame are read; movies that cannot be opened, are cut short, or whose size
    differs from the others', are left out and named. The gain reference is turned as asked and compared with
    the mean frame in all eight orientations: a reference that fits better in another one stops the import,
    because a wrong gain ruins motion correction silently. One of half or double the movies' pixels is taken
    with a warning if the movies show its pattern. When more movies have been recorded, `halfmap resume` of
    this job adds them.
    """

    outputs = {
        "movies": Out("movies.star", "MicrographMovieGroupMetadata.star.relion"),
        "gain": Out("gain.mrc", "Image2D.mrc.halfmap.gain", optional=True),
        "picture": Out("movies.png", "Image2D.png.halfmap.overview"),
    }

    movies: tuple[Path, ...] = Input("movies (TIFF, MRC or EER), as names or quoted patterns", min_length=1)
    gain: Path | None = Input(
        "gain reference, multiplied with each frame", default=None, aliases=("gainref",)
    )
    defects: Path | None = Input(
        "defects: lines 'x y width height', or a mask image", default=None, aliases=("defect_file",)
    )
    mtf: Path | None = Input("STAR file with the detector's MTF", default=None)
    dose_per_frame: float = Param(
        ..., "exposure of each stored frame", unit="e/Å²", section=EXPOSURE, gt=0, le=100
    )
    pre_exposure: float = Param(
        0.0,
        "exposure before the first frame",
        unit="e/Å²",
        section=EXPOSURE,
        aliases=("preexposure",),
        ge=0,
    )
    eer_grouping: int = Param(
        32, "EER: number of hardware frames in a fraction", unit="none", section=EXPOSURE, ge=1
    )
    eer_upsampling: Literal[1, 2] = Param(
        1, "EER: 1 for physical pixels, 2 for super-resolution", unit="none", section=EXPOSURE
    )
    gain_rotation: Literal[0, 1, 2, 3] = Param(
        0,
        "turn the gain reference by this many times 90°, as RELION does",
        unit="none",
        section=GAIN,
        aliases=("gain_rot",),
    )
    gain_flip: Literal[0, 1, 2] = Param(
        0, "then flip it: 1 upside down, 2 left to right, as RELION does", unit="none", section=GAIN
    )
    gain_inverse: bool = Param(
        False,
        "take the gain reference's reciprocal: for one to divide frames by (EER: to multiply, as none but "
        ".gain files are)",
        unit="none",
        section=GAIN,
    )
    check_gain: bool = Param(
        True,
        "stop if the gain reference fits better in another orientation or as its reciprocal",
        unit="none",
        section=GAIN,
    )

    def run(self, ctx: Context) -> None:
        """Examine every movie, orient and check the gain, write the table and the overview picture."""
        from halfmap.io.tables import write_movies
        from halfmap.steps.import_ import gain, microscope, movies, pictures

        files = microscope.expand(self.movies, ctx.project)
        gain.look_first(self, ctx, files)
        examine = functools.partial(movies.examine, step=self)
        headers = microscope.examine_all(ctx, examine, files, unit="movie")
        movies.warn_of_exposure(self, headers)
        movies.check_camera_files(self, ctx, headers)
        settings = microscope.optics_row(self, headers)
        reference = gain.orient(self, ctx, headers, pixel_size=settings["rlnMicrographOriginalPixelSize"])
        table = movies.tabulate(self, ctx, headers, settings, gain=reference)
        write_movies(ctx.folder / "movies.star", table)
        names = table.rows["rlnMicrographMovieName"].to_list()
        ctx.picture("movies.png", names, lambda path: pictures.draw_movies(path, ctx, table))


class ImportMicrographs(ImportImages, name="import micrographs", label="relion.import.movies"):
    """Import micrographs: list sums of movies that were made elsewhere, with the microscope's settings.

    Every file's header is read; files that cannot be opened, hold several images, or whose size differs from
    the others', are left out and named.
    """

    outputs = {
        "micrographs": Out("micrographs.star", "MicrographGroupMetadata.star.relion"),
        "picture": Out("micrographs.png", "Image2D.png.halfmap.overview"),
    }

    micrographs: tuple[Path, ...] = Input(
        "motion-corrected micrographs (MRC or TIFF), as names or quoted patterns", min_length=1
    )

    def run(self, ctx: Context) -> None:
        """Examine every micrograph, write the table and the overview picture."""
        from halfmap.io.tables import write_micrographs
        from halfmap.steps.import_ import micrographs, microscope, pictures

        files = microscope.expand(self.micrographs, ctx.project)
        headers = microscope.examine_all(ctx, micrographs.examine, files, unit="micrograph")
        table = micrographs.tabulate(ctx, headers, microscope.optics_row(self, headers))
        write_micrographs(ctx.folder / "micrographs.star", table)
        names = table.rows["rlnMicrographName"].to_list()
        ctx.picture("micrographs.png", names, lambda path: pictures.draw_micrographs(path, ctx, table))


class ImportParticles(Step, name="import particles", label=OTHER):
    """Import particles of RELION 3.0 to 5 (STAR) or cryoSPARC (.cs), with poses and CTFs if they have them.

    Names of image stacks are looked for in the project, beside the table and in the folders above it, and
    rewritten relative to the project. Every stack must be there and hold as many images as the table asks
    for, all of one size. All other columns are kept; tables of RELION 3.0 get an optics table. cryoSPARC's
    passthrough files of the same job are joined by themselves where they lie in the same folder.
    """

    outputs = {
        "particles": Out("particles.star", "ParticleGroupMetadata.star.relion"),
        "picture": Out("particles.png", "Image2D.png.halfmap.overview"),
    }

    particles: Path = Input("table of particles (.star or .cs)")
    passthrough: tuple[Path, ...] = Input("cryoSPARC's passthrough files (.cs)", default=())
    images: Path | None = Input(
        "folder that names of stacks are relative to; default: found by itself",
        default=None,
        section=NAMES,
        folder=True,
    )
    pixel_size: float | None = Param(
        None,
        "pixel size of the particles, where the table states none; default: the stacks'",
        unit="Å/px",
        section=OPTICS,
        gt=0,
    )

    def run(self, ctx: Context) -> None:
        """Read the table, find the stacks and check them, write the table and a picture of 40 particles."""
        from halfmap.io.tables import write_particles
        from halfmap.steps.import_ import particles, pictures

        table = particles.read(self, ctx)
        table = particles.locate(self, ctx, table)
        table, stack = particles.check(self, ctx, table)
        write_particles(ctx.folder / "particles.star", table)
        particles.say_counts(table, stack)
        pictures.draw_particles(ctx.folder / "particles.png", table, stack)


class ImportCoordinates(Step, name="import coordinates", label=OTHER):
    """Import particle coordinates of any picker and match them with the project's micrographs.

    STAR, EMAN's .box, Topaz's .txt and .csv are read. Coordinates belong to the micrograph that their table
    names; a table without names belongs to the micrograph whose name its own begins with. Coordinates
    outside their micrograph are left out, and tables that match none are named.
    """

    outputs = {
        "coordinates": Out("coordinates.star", "MicrographCoordsGroup.star.relion"),
        "picture": Out("coordinates.png", "Image2D.png.halfmap.overview"),
    }

    coordinates: tuple[Path, ...] = Input(
        "coordinates (.star, .box, .txt, .csv), as names or quoted patterns", min_length=1
    )
    micrographs: Path = Input(
        "table of the micrographs they were picked in", node="MicrographGroupMetadata.star.relion"
    )
    scale: float = Param(
        1.0,
        "multiply coordinates by this: by how much micrographs were shrunk for picking",
        unit="none",
        section=NAMES,
        gt=0,
    )
    min_score: float | None = Param(
        None,
        "leave out coordinates whose score (figure of merit) is below this; default: keep all",
        unit="none",
        section="Selection",
    )
    diameter: float | None = Param(
        None,
        "particle diameter, for extraction and the circles in the picture",
        unit="Å",
        section="Particle",
        ge=20,
    )

    def run(self, ctx: Context) -> None:
        """Read all tables, give every micrograph its coordinates, write them and a picture."""
        from halfmap.io.tables import read_micrographs
        from halfmap.steps.import_ import coordinates, microscope, pictures

        micrographs = read_micrographs(ctx.resolve(self.micrographs))
        files = microscope.expand(self.coordinates, ctx.project)
        picks = coordinates.gather(self, ctx, files, micrographs)
        table = coordinates.write(ctx, picks, micrographs)
        size = None if self.diameter is None else self.diameter / micrographs.pixel_size
        pictures.draw_coordinates(ctx.folder / "coordinates.png", ctx, table, picks, diameter_px=size)


class ImportMap(Step, name="import map", label=OTHER):
    """Import a map, its half maps and a mask: any of them, checked and written as float32 MRC.

    Boxes must be cubic, voxel sizes stated, values finite, and all volumes given together must have the same
    box and voxel size. A mask must lie between 0 and 1, and half maps must differ.
    """

    outputs = {
        "map": Out("map.mrc", "DensityMap.mrc", optional=True),
        "half1": Out("half1_unfil.mrc", "DensityMap.mrc.halfmap", optional=True),
        "half2": Out("half2_unfil.mrc", "DensityMap.mrc.halfmap", optional=True),
        "mask": Out("mask.mrc", "Mask3D.mrc", optional=True),
        "picture": Out("maps.png", "Image2D.png.halfmap.overview"),
    }

    map: Path | None = Input("map (MRC, also .gz)", default=None)
    half1: Path | None = Input("first unfiltered half map", default=None)
    half2: Path | None = Input("second unfiltered half map", default=None)
    mask: Path | None = Input("mask, 0 to 1", default=None)
    pixel_size: float | None = Param(
        None, "voxel size; default: read from the headers", unit="Å/px", section="Volume", gt=0
    )

    @model_validator(mode="after")
    def _something_is_given(self) -> ImportMap:
        if not self.inputs():
            raise ValueError("nothing to import: give --map, --mask, or --half1 and --half2")
        if (self.half1 is None) != (self.half2 is None):
            raise ValueError("half maps come in pairs: give both --half1 and --half2")
        return self

    def run(self, ctx: Context) -> None:
        """Check the volumes, copy them into the job, draw central slices."""
        from halfmap.steps.import_ import maps, pictures

        volumes = maps.check(self, ctx)
        maps.write(ctx, volumes, type(self).outputs)
        pictures.draw_volumes(ctx.folder / "maps.png", volumes)
