"""Tables of what is known to be true: particles, motion, ice, contaminants, optics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch

from halfmap.data import MicrographSet, MovieSet, ParticleSet
from halfmap.io.star import Block, read_star, write_star
from halfmap.io.tables import write_micrographs, write_movies, write_particles
from halfmap.ops.rotations import to_euler
from halfmap.steps.simulate import scene as scenes
from halfmap.steps.simulate.scene import Scene

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.simulate.detector import Camera
    from halfmap.steps.simulate.specimen import Specimen
    from halfmap.steps.simulate.step import Simulate, SimulateMicrographs, SimulateMovies, SimulateParticles

FOLDER = "Truth"
_MTF_ENTRIES = 128


def write_mtf(path: Path, camera: Camera) -> None:
    """Write the camera's MTF along an axis as RELION reads it."""
    frequency = np.linspace(0, 0.5, _MTF_ENTRIES)
    values = camera.mtf(frequency)
    write_star(path, {"": pl.DataFrame({"rlnResolutionInversePixel": frequency, "rlnMtfValue": values})})


def write_scene(path: Path, scene: Scene, pixel_size: float, n_states: int) -> None:
    """Write the particles and contaminants of one field of view, coordinates in pixels of its images.

    Parameters
    ----------
    path : Path
        STAR file with the blocks ``particles`` and ``contaminants``.
    scene : Scene
        Field of view.
    pixel_size : float
        Of the images in Å.
    n_states : int
        Whole conformations; fragments are of class 0.
    """
    blocks: dict[str, Block] = {"view": {"rlnOpticsGroup": scene.group + 1}}
    if len(scene.molecules.state):
        blocks["particles"] = _particles(scene, pixel_size, n_states)
    obstacles = [("ice crystal", crystal.x, crystal.y, crystal.radius) for crystal in scene.crystals]
    if scene.hole is not None:
        obstacles.append(("carbon outside", *scene.hole))
    if obstacles:
        kind, x, y, radius = zip(*obstacles, strict=True)
        blocks["contaminants"] = pl.DataFrame(
            {
                "rlnCoordinateX": np.array(x) / pixel_size,
                "rlnCoordinateY": np.array(y) / pixel_size,
                "hmRadius": radius,
                "hmContaminant": kind,
            }
        )
    write_star(path, blocks)


def _particles(scene: Scene, pixel_size: float, n_states: int) -> pl.DataFrame:
    molecules = scene.molecules
    euler = to_euler(torch.from_numpy(molecules.rotation)).numpy()
    defocus = [
        scene.defocus_at(x, y, depth)
        for (x, y), depth in zip(molecules.position, molecules.depth, strict=True)
    ]
    local = [
        scene.thickness * scene.relative_thickness(np.array([x]), np.array([y]))[0, 0]
        for x, y in molecules.position
    ]
    n = len(molecules.state)
    return pl.DataFrame(
        {
            "rlnCoordinateX": molecules.position[:, 0] / pixel_size,
            "rlnCoordinateY": molecules.position[:, 1] / pixel_size,
            "rlnAngleRot": euler[:, 0],
            "rlnAngleTilt": euler[:, 1],
            "rlnAnglePsi": euler[:, 2],
            "rlnOriginXAngst": np.zeros(n),
            "rlnOriginYAngst": np.zeros(n),
            "rlnDefocusU": [value.u for value in defocus],
            "rlnDefocusV": [value.v for value in defocus],
            "rlnDefocusAngle": [value.angle for value in defocus],
            "rlnClassNumber": np.where(molecules.state < n_states, molecules.state + 1, 0),
            "hmParticleKind": molecules.kind,
            "hmDepth": molecules.depth,
            "hmIceThickness": local,
        }
    )


def exposure_row(index: int, scene: Scene, shape: tuple[int, int], n_frames: int) -> dict[str, Any]:
    """What is true of a whole movie or micrograph, as plain data."""
    return {
        "index": index,
        "group": scene.group + 1,
        "width": shape[1],
        "height": shape[0],
        "frames": n_frames,
        "defocus_u": scene.defocus.u,
        "defocus_v": scene.defocus.v,
        "defocus_angle": scene.defocus.angle,
        "thickness": scene.thickness,
        "tilt": scene.tilt,
        "tilt_axis": scene.tilt_axis,
        "particles": len(scene.molecules.state),
    }


def optics(step: Simulate, *, with_beam_tilt: bool, **more: float | str | int) -> pl.DataFrame:
    """Optics groups of a step, with further columns that all of them share."""
    rows = []
    for number, (tilt_x, tilt_y) in enumerate(scenes.optics_groups(step), start=1):
        row = {
            "rlnOpticsGroupName": f"opticsGroup{number}",
            "rlnOpticsGroup": number,
            "rlnVoltage": step.voltage,
            "rlnSphericalAberration": step.spherical_aberration,
            "rlnAmplitudeContrast": step.amplitude_contrast,
            **more,
        }
        if with_beam_tilt and step.beam_tilt:
            row |= {"rlnBeamTiltX": tilt_x, "rlnBeamTiltY": tilt_y}
        rows.append(row)
    return pl.DataFrame(rows)


def write_movie_tables(step: SimulateMovies, ctx: Context, rows: list[dict[str, Any]]) -> None:
    """Write what a microscope would tell (``movies.star``) and what only a simulation knows."""
    from halfmap.steps.simulate.movie import movie_file

    names = [ctx.relative(movie_file(step, ctx.folder, row["index"])) for row in rows]
    pixel = step.pixel_size / (2 if step.super_resolution else 1)
    told = optics(
        step,
        with_beam_tilt=False,
        rlnMicrographOriginalPixelSize=pixel,
        rlnMicrographDoseRate=step.dose_per_frame,
        rlnMicrographPreExposure=step.pre_exposure,
        rlnMicrographGainName=ctx.relative(ctx.folder / "gain.mrc"),
        rlnMicrographDefectFile=ctx.relative(ctx.folder / "defects.txt"),
        rlnMtfFileName=ctx.relative(ctx.folder / "mtf.star"),
    )
    movies = pl.DataFrame(
        {
            "rlnMicrographMovieName": names,
            "rlnOpticsGroup": [row["group"] for row in rows],
            "rlnImageSizeX": [row["width"] for row in rows],
            "rlnImageSizeY": [row["height"] for row in rows],
            "rlnImageSizeZ": [row["frames"] for row in rows],
        }
    )
    write_movies(ctx.folder / "movies.star", MovieSet(told, movies))
    known = optics(step, with_beam_tilt=True, rlnMicrographPixelSize=pixel, rlnImagePixelSize=pixel)
    motion = [ctx.relative(ctx.folder / FOLDER / f"{row['index'] + 1:06d}_motion.star") for row in rows]
    views = _views(step, names, rows).with_columns(pl.Series("hmMotionFile", motion))
    write_micrographs(ctx.folder / "truth_movies.star", MicrographSet(known, views))
    _write_scenes(ctx, names, rows, known)


def write_micrograph_tables(step: SimulateMicrographs, ctx: Context, rows: list[dict[str, Any]]) -> None:
    """Write what motion correction would tell (``micrographs.star``) and what only a simulation knows."""
    from halfmap.steps.simulate.micrograph import half_file, micrograph_file

    names = [ctx.relative(micrograph_file(ctx.folder, row["index"])) for row in rows]
    told = optics(
        step,
        with_beam_tilt=False,
        rlnMicrographOriginalPixelSize=step.pixel_size,
        rlnMicrographPixelSize=step.pixel_size,
        rlnMtfFileName=ctx.relative(ctx.folder / "mtf.star"),
    )
    columns = {"rlnMicrographName": names, "rlnOpticsGroup": [row["group"] for row in rows]}
    if step.write_halves:
        for label, half in (("rlnMicrographNameEven", "even"), ("rlnMicrographNameOdd", "odd")):
            columns[label] = [ctx.relative(half_file(ctx.folder, row["index"], half)) for row in rows]
    micrographs = MicrographSet(told, pl.DataFrame(columns))
    write_micrographs(ctx.folder / "micrographs.star", micrographs)
    known = optics(
        step,
        with_beam_tilt=True,
        rlnMicrographPixelSize=step.pixel_size,
        rlnImagePixelSize=step.pixel_size,
    )
    write_micrographs(ctx.folder / "truth_micrographs.star", MicrographSet(known, _views(step, names, rows)))
    _write_scenes(ctx, names, rows, known)


def _views(step: Simulate, names: list[str], rows: list[dict[str, Any]]) -> pl.DataFrame:
    def column(key: str) -> list[Any]:
        return [row[key] for row in rows]

    return pl.DataFrame(
        {
            "rlnMicrographName": names,
            "rlnOpticsGroup": column("group"),
            "rlnDefocusU": column("defocus_u"),
            "rlnDefocusV": column("defocus_v"),
            "rlnDefocusAngle": column("defocus_angle"),
            "rlnPhaseShift": [step.phase_shift] * len(rows),
            "rlnMicrographIceThickness": column("thickness"),
            "rlnMicrographTiltAngle": column("tilt"),
            "rlnMicrographTiltAxisDirection": column("tilt_axis"),
        }
    )


def _write_scenes(ctx: Context, names: list[str], rows: list[dict[str, Any]], known: pl.DataFrame) -> None:
    """Gather particles and contaminants of all fields of view in two tables."""
    gathered: dict[str, list[pl.DataFrame]] = {"particles": [], "contaminants": []}
    for name, row in zip(names, rows, strict=True):
        blocks = read_star(ctx.folder / FOLDER / f"{row['index'] + 1:06d}.star")
        for block, tables in gathered.items():
            table = blocks.get(block)
            if isinstance(table, pl.DataFrame):
                labels = [
                    pl.lit(name).alias("rlnMicrographName"),
                    pl.lit(row["group"]).alias("rlnOpticsGroup"),
                ]
                tables.append(table.select(*labels, pl.all()))
    if gathered["particles"]:
        particles = ParticleSet(known, pl.concat(gathered["particles"]))
        write_particles(ctx.folder / "truth_particles.star", particles)
    if gathered["contaminants"]:
        contaminants = pl.concat(gathered["contaminants"])
        write_star(ctx.folder / "truth_contaminants.star", {"contaminants": contaminants})


def write_particle_table(
    step: SimulateParticles, ctx: Context, stacks: list[dict[str, Any]], *, specimen: Specimen, scale: float
) -> None:
    """Write ``particles.star``: images with their true poses, shifts, CTFs, conformations and size."""
    from halfmap.steps.simulate.particles import stack_file

    known = optics(
        step,
        with_beam_tilt=True,
        rlnImagePixelSize=step.pixel_size,
        rlnImageSize=specimen.box,
        rlnImageDimensionality=2,
        hmSignalScale=scale,
    )
    tables = []
    for stack in stacks:
        name = ctx.relative(stack_file(ctx.folder, stack["index"]))
        euler = to_euler(torch.tensor(stack["rotation"], dtype=torch.float64)).numpy()
        origin, defocus = np.array(stack["origin"]), np.array(stack["defocus"])
        n = len(origin)
        tables.append(
            pl.DataFrame(
                {
                    "rlnImageName": [f"{i:06d}@{name}" for i in range(1, n + 1)],
                    "rlnMicrographName": [Path(name).with_suffix(".mrc").as_posix()] * n,
                    "rlnOpticsGroup": [stack["group"]] * n,
                    "rlnAngleRot": euler[:, 0],
                    "rlnAngleTilt": euler[:, 1],
                    "rlnAnglePsi": euler[:, 2],
                    "rlnOriginXAngst": origin[:, 0],
                    "rlnOriginYAngst": origin[:, 1],
                    "rlnDefocusU": defocus[:, 0],
                    "rlnDefocusV": defocus[:, 1],
                    "rlnDefocusAngle": defocus[:, 2],
                    "rlnPhaseShift": np.full(n, step.phase_shift),
                    "rlnClassNumber": stack["class"],
                    "hmParticleDiameter": np.full(n, round(specimen.sphere, 1)),
                }
            )
        )
    write_particles(ctx.folder / "particles.star", ParticleSet(known, pl.concat(tables)))
