"""Dose-fractionated movies: a moving, fading specimen recorded frame by frame."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.random import SeedSequence
from numpy.typing import NDArray

from halfmap.io.atomic import write_text
from halfmap.io.mrc import MrcStackWriter, write_mrc
from halfmap.io.tiff import write_tiff_movie
from halfmap.ops import fourier
from halfmap.ops.threads import one_torch_thread
from halfmap.steps.simulate import exposure as exposures
from halfmap.steps.simulate import truth
from halfmap.steps.simulate.detector import Camera, build_camera
from halfmap.steps.simulate.exposure import Exposure
from halfmap.steps.simulate.ice import FlowingIce
from halfmap.steps.simulate.motion import Motion, random_motion
from halfmap.steps.simulate.warp import displace, illuminate, spline_coefficients, spline_response

if TYPE_CHECKING:
    from halfmap.steps.simulate.specimen import Specimen
    from halfmap.steps.simulate.step import SimulateMovies

MOVIES = "Movies"
_NODE_STEP = 16
_BYTE_LIMIT = 50.0
"""Mean counts per pixel up to which 8 bits hold a frame: 255 is 29 standard deviations away."""


def camera_of(step: SimulateMovies) -> Camera:
    """The camera of a data set, the same in every worker."""
    return build_camera(
        SeedSequence(step.seed, spawn_key=(3,)),
        shape=(step.height, step.width),
        upsampling=2 if step.super_resolution else 1,
        efficiency=step.efficiency,
        mislocation_px=step.mislocation,
        gain_spread=step.gain_spread,
        n_dead=step.dead_pixels,
        n_hot=step.hot_pixels,
    )


def write_camera(step: SimulateMovies, folder: Path) -> None:
    """Write what a laboratory knows of its camera (gain, defects, MTF), and where its hot pixels are."""
    camera = camera_of(step)
    truth.write_mtf(folder / "mtf.star", camera)
    pixel = step.pixel_size / (2 if step.super_resolution else 1)
    write_mrc(folder / "gain.mrc", camera.gain, pixel_size=pixel)
    write_text(folder / "defects.txt", "".join(f"{x} {y} 1 1\n" for x, y in camera.dead))
    write_text(folder / "truth_hot_pixels.txt", "".join(f"{x:.0f} {y:.0f} 1 1\n" for x, y, _ in camera.hot))


def movie_file(step: SimulateMovies, folder: Path, index: int) -> Path:
    """Where movie `index` lies."""
    suffix = ".mrc" if step.movie_format == "mrc" else ".tiff"
    return folder / MOVIES / f"{exposures.name(index)}{suffix}"


@one_torch_thread()
def simulate(index: int, *, step: SimulateMovies, specimen: Specimen, folder: Path) -> dict[str, Any]:
    """Expose one movie and write it with its truth.

    Returns
    -------
    dict
        The movie's row of truth; see `truth.exposure_row`.
    """
    scene_seed, carbon_seed, motion_seed, ice_seed, count_seed = exposures.seeds(step, index, 5)
    camera = camera_of(step)
    motion = random_motion(
        np.random.default_rng(motion_seed),
        n_frames=step.n_frames,
        dose_per_frame=step.dose_per_frame,
        pre_exposure=step.pre_exposure,
        size_A=(step.height * step.pixel_size, step.width * step.pixel_size),
        drift=step.drift,
        jitter=step.jitter,
        deformation=step.local_motion,
        correlation_length=step.correlation_length,
    )
    exposure = exposures.set_up(
        index,
        step=step,
        specimen=specimen,
        camera=camera,
        largest_motion=largest_displacement(motion, step),
        seeds=(scene_seed, carbon_seed),
    )
    frames = record(exposure, motion, camera, step=step, specimen=specimen, seeds=(ice_seed, count_seed))
    path = movie_file(step, folder, index)
    if step.movie_format == "mrc":
        shape = camera.gain.shape
        with MrcStackWriter(path, shape=shape, pixel_size=specimen.pixel_size, dtype="uint16") as writer:
            for frame in frames:
                writer.append(frame)
    else:
        compression = step.movie_format.removeprefix("tiff-")
        write_tiff_movie(path, frames, pixel_size=specimen.pixel_size, compression=compression)
    name, truth_folder = exposures.name(index), folder / truth.FOLDER
    motion.write(truth_folder / f"{name}_motion.star")
    if step.write_clean:
        clean = clean_image(exposure, camera, step=step, specimen=specimen)
        write_mrc(truth_folder / f"{name}_clean.mrc", clean, pixel_size=specimen.pixel_size)
    truth.write_scene(
        truth_folder / f"{name}.star", exposure.scene, specimen.pixel_size, len(specimen.fractions)
    )
    return truth.exposure_row(index, exposure.scene, camera.gain.shape, step.n_frames)


def largest_displacement(motion: Motion, step: SimulateMovies) -> float:
    """Of any point of the view in any frame, Å."""
    y, x = (np.linspace(0, n * step.pixel_size, 12) for n in (step.height, step.width))
    frames = np.arange(motion.n_frames)[:, None, None]
    moved = motion.trajectory(x[None, None, :], y[None, :, None], frames)
    return float(np.abs(moved).max()) * 1.1


def record(
    exposure: Exposure,
    motion: Motion,
    camera: Camera,
    *,
    step: SimulateMovies,
    specimen: Specimen,
    seeds: tuple[SeedSequence, SeedSequence],
) -> Iterator[NDArray]:
    """Yield the frames of a movie as counted."""
    pixel = specimen.pixel_size
    per_pixel = step.dose_per_frame * pixel**2
    bits = 8 if per_pixel < _BYTE_LIMIT and step.movie_format != "mrc" else 16
    for expected, seed in zip(
        expected_frames(exposure, motion, step=step, pixel_size=pixel, ice_seed=seeds[0]),
        seeds[1].spawn(step.n_frames),
        strict=True,
    ):
        yield camera.expose(expected * np.float32(per_pixel), seed, bits=bits)


def expected_frames(
    exposure: Exposure, motion: Motion, *, step: SimulateMovies, pixel_size: float, ice_seed: SeedSequence
) -> Iterator[NDArray[np.float32]]:
    """Yield the intensity of each frame over that of the beam, before counting."""
    scene, images = exposure.scene, exposure.images
    shape = round(scene.size[0] / pixel_size), round(scene.size[1] / pixel_size)
    ice = FlowingIce(
        exposure.canvas, pixel_size=pixel_size, dose_per_frame=step.dose_per_frame, seed=ice_seed
    )
    response = spline_response(exposure.canvas)
    filters = [exposure.noise_filter(i).div_(response).numpy() for i in range(exposure.n_planes)]
    del response
    passing = spline_coefficients(exposure.passing)
    x, y = scene.molecules.position.T
    middle = scene.size[1] / 2, scene.size[0] / 2
    for frame in range(step.n_frames):
        dose = step.pre_exposure + step.dose_per_frame * frame
        particles = images.layer(
            shape,
            moved_px=motion.trajectory(x, y, frame) / pixel_size,
            smear_px=motion.smear(x, y, frame) / pixel_size,
            damage=exposures.damage(
                exposure,
                start=dose,
                end=dose + step.dose_per_frame,
                pixel_size=pixel_size,
                voltage_kV=step.voltage,
            ),
        )
        expected = np.empty(shape, np.float32)
        nodes = source_nodes(motion, frame, shape, pixel_size)
        common = motion.common(frame) / pixel_size
        pairs = _neighbouring_planes(
            ice.next(),
            filters,
            shape=exposure.canvas,
            moved_px=common,
            smear_px=motion.smear(*middle, frame) / pixel_size,
        )
        for number, (below, above) in enumerate(pairs):
            illuminate(
                passing,
                below,
                above,
                number,
                len(filters),
                exposure.plane,
                particles,
                nodes,
                _NODE_STEP,
                common.astype(np.float32),
                exposure.margin,
                expected,
            )
        yield expected


def _neighbouring_planes(
    white: NDArray,
    filters: list[NDArray],
    *,
    shape: tuple[int, int],
    moved_px: NDArray,
    smear_px: NDArray,
) -> Iterator[tuple[NDArray, NDArray]]:
    """Yield the ice's noise at each defocus and the next, of dozens in tilted ice; a single one twice."""
    moved = np.empty_like(white)

    def plane(noise_filter: NDArray) -> NDArray:
        displace(white[None], noise_filter, moved_px[None], smear_px[None], moved[None])
        return fourier.irfft2(torch.from_numpy(moved), shape=shape).numpy()

    below = plane(filters[0])
    if len(filters) == 1:
        yield below, below
    for noise_filter in filters[1:]:
        above = plane(noise_filter)
        yield below, above
        below = above


def source_nodes(
    motion: Motion, frame: int, shape: tuple[int, int], pixel_size: float
) -> NDArray[np.float32]:
    """Where what is seen in a frame was in the first one, in pixels (x, y), at every 16th pixel and beyond.

    A point of the specimen at s is seen at s + drift + local(s); solving for s takes the local field at
    s' = seen - drift, and the first order of its change over the local displacement itself.
    """
    x, y = (np.arange(0, n + 2 * _NODE_STEP, _NODE_STEP) * pixel_size for n in shape[::-1])
    common = motion.common(frame)
    local = motion.local_field(x - common[0], y - common[1], frame)
    along_y, along_x = (np.gradient(local, _NODE_STEP * pixel_size, axis=axis) for axis in (0, 1))
    local = local - local[..., :1] * along_x - local[..., 1:] * along_y
    nodes = np.stack(np.meshgrid(x, y), axis=-1) - common - local
    return (nodes / pixel_size).astype(np.float32)


def clean_image(
    exposure: Exposure, camera: Camera, *, step: SimulateMovies, specimen: Specimen
) -> NDArray[np.float32]:
    """Expected counts of the whole exposure by a specimen that lies still, in ice without structure."""
    pixel = specimen.pixel_size
    dose = step.n_frames * step.dose_per_frame
    damage = exposures.damage(
        exposure,
        start=step.pre_exposure,
        end=step.pre_exposure + dose,
        pixel_size=pixel,
        voltage_kV=step.voltage,
    )
    still = np.zeros_like(exposure.images.centre_px)
    h, w = camera.gain.shape
    particles = exposure.images.layer((h, w), moved_px=still, smear_px=still, damage=damage)
    return exposures.still_image(exposure, particles) * np.float32(dose * pixel**2 * camera.efficiency)
