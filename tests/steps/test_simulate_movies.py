"""Simulated movies: what is in the files, whether the truth is true, whether seeds decide everything."""

from __future__ import annotations

from pathlib import Path

import numba
import numpy as np
import polars as pl
import pytest
import torch
from numpy.random import SeedSequence

from halfmap.engine import Context
from halfmap.io.movies import open_movie
from halfmap.io.mrc import read_header, read_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_micrographs, read_movies, read_particles
from halfmap.ops import grids
from halfmap.steps.simulate import exposure as exposures
from halfmap.steps.simulate import movie as movies
from halfmap.steps.simulate import preparation
from halfmap.steps.simulate.damage import attenuation
from halfmap.steps.simulate.motion import random_motion, read_motion
from halfmap.steps.simulate.step import SimulateMovies

SETTINGS = {
    "assembly": "none",
    "pixel_size": 2.0,
    "width": 288,
    "height": 256,
    "particles": 6,
    "overlapping": 0.0,
    "broken": 0.0,
    "contaminants": 0.0,
    "carbon": 0.0,
    "n_movies": 2,
    "n_frames": 6,
    "drift": 20.0,
    "seed": 5,
}


def context(folder: Path) -> Context:
    folder.mkdir(parents=True, exist_ok=True)
    return Context(folder=folder, project=folder.parent)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project") / "job001"
    SimulateMovies(**SETTINGS, write_clean=True).run(context(folder))
    return folder


@pytest.fixture(scope="module")
def specimen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project") / "specimen"
    return preparation.prepare(SimulateMovies(**SETTINGS), context(folder))


def set_up(step: SimulateMovies, specimen, index: int = 0):
    """Motion and exposure of a movie as `simulate` makes them."""
    seeds = exposures.seeds(step, index, 5)
    camera = movies.camera_of(step)
    motion = random_motion(
        np.random.default_rng(seeds[2]),
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
        largest_motion=movies.largest_displacement(motion, step),
        seeds=(seeds[0], seeds[1]),
    )
    return motion, exposure


def frames_without_noise(step: SimulateMovies, specimen, index: int = 0):
    motion, exposure = set_up(step, specimen, index)
    frames = movies.expected_frames(
        exposure, motion, step=step, pixel_size=step.pixel_size, ice_seed=SeedSequence(0)
    )
    return motion, exposure, np.stack(list(frames))


def displacement(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Shift (x, y) in pixels from image a to image b: the peak of their correlation, interpolated."""
    cross = np.fft.fft2(b - b.mean()) * np.fft.fft2(a - a.mean()).conj()
    ky, kx = np.meshgrid(*(np.fft.fftfreq(n) for n in a.shape), indexing="ij")
    surface = np.fft.ifft2(cross).real
    y, x = np.unravel_index(surface.argmax(), a.shape)
    shift = np.array([x, y], float)
    for width in (0.5, 0.1, 0.02):
        steps = np.arange(-5, 6) * width
        values = [
            [
                (cross * np.exp(2j * np.pi * (kx * (shift[0] + i) + ky * (shift[1] + j)))).real.sum()
                for i in steps
            ]
            for j in steps
        ]
        j, i = np.unravel_index(np.argmax(values), (11, 11))
        shift += [steps[i], steps[j]]
    return (shift + np.array(a.shape[::-1]) / 2) % a.shape[::-1] - np.array(a.shape[::-1]) / 2


def test_all_files_are_there_and_agree(job):
    table = read_movies(job / "movies.star")
    assert len(table) == 2
    optics = table.optics.to_dicts()[0]
    assert optics["rlnMicrographDoseRate"] == 1.5
    assert table.pixel_size == 2.0
    for name in table.rows["rlnMicrographMovieName"]:
        movie = open_movie(job.parent / name)
        assert (movie.n_frames, *movie.shape) == (6, 256, 288)
        assert movie.read(0, 1).dtype == np.uint8
    for label in ("rlnMicrographGainName", "rlnMicrographDefectFile", "rlnMtfFileName"):
        assert (job.parent / optics[label]).exists()
    assert len((job / "defects.txt").read_text().splitlines()) == 20
    mtf = next(iter(read_star(job.parent / optics["rlnMtfFileName"]).values()))
    assert mtf["rlnMtfValue"][0] == 1
    assert (job / "overview.png").stat().st_size > 10_000
    assert read_header(job / "truth_map.mrc").pixel_size == pytest.approx(2.0)
    assert not (job / "Specimen").exists()


def test_truth_tables_are_complete(job):
    views = read_micrographs(job / "truth_movies.star")
    particles = read_particles(job / "truth_particles.star")
    assert len(particles) == 12
    assert set(particles.rows["rlnMicrographName"]) == set(views.rows["rlnMicrographName"])
    assert len(particles.poses) == len(particles.ctf) == 12
    assert set(particles.rows["hmParticleKind"]) == {"real"}
    middle = views.ctf.defocus_u.mean() + 0 * particles.ctf.defocus_u
    assert (particles.ctf.defocus_u - middle).abs().max() < 12_000
    for name, defocus in zip(views.rows["rlnMicrographName"], views.rows["rlnDefocusU"], strict=True):
        own = particles.rows.filter(pl.col("rlnMicrographName") == name)
        assert np.allclose(own["rlnDefocusU"] - defocus, own["hmDepth"])
    for name in views.rows["hmMotionFile"]:
        assert read_motion(job.parent / name).n_frames == 6


def test_counts_have_the_mean_that_dose_and_ice_give(job):
    views = read_micrographs(job / "truth_movies.star").rows
    gain = read_mrc(job / "gain.mrc", 0)
    alive = gain > 0
    for name, thickness in zip(views["rlnMicrographName"], views["rlnMicrographIceThickness"], strict=True):
        movie = open_movie(job.parent / name)
        mean = (movie.read(0, 6).mean(axis=0) * gain)[alive]
        expected = 1.5 * 4.0 * 0.9 * np.exp(-thickness / 4000)
        # Hot pixels and particles move the median by less than a per cent.
        assert np.median(mean) == pytest.approx(expected, rel=0.02)


def test_the_gain_fits_the_frames_as_they_are_read(job):
    gain = read_mrc(job / "gain.mrc", 0)
    names = read_movies(job / "movies.star").rows["rlnMicrographMovieName"]
    total = sum(open_movie(job.parent / name).read(0, 6).sum(axis=0, dtype=float) for name in names)
    inside = (gain > 0) & (total < 2 * np.median(total))
    sensitivity = np.where(gain > 0, 1 / np.where(gain > 0, gain, 1), 1)

    def correlation(reference: np.ndarray) -> float:
        return np.corrcoef(total[inside], reference[inside])[0, 1]

    # 12 frames of 5 counts have an error of 13 %, gains vary by 6 %.
    assert correlation(sensitivity) > 0.3
    assert abs(correlation(sensitivity[::-1])) < 0.15
    assert abs(correlation(sensitivity[:, ::-1])) < 0.15


def test_a_movie_does_not_depend_on_threads_or_on_its_neighbours(job, specimen, tmp_path):
    step = SimulateMovies(**SETTINGS, write_clean=True)
    before = torch.get_num_threads(), numba.get_num_threads()
    try:
        torch.set_num_threads(2)
        numba.set_num_threads(1)
        movies.simulate(1, step=step, specimen=specimen, folder=tmp_path)
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(written) == 4
    for name in written:
        assert (tmp_path / name).read_bytes() == (job / name).read_bytes(), name


def test_formats_hold_the_same_frames(job, specimen, tmp_path):
    frames = open_movie(job / "Movies/000001.tiff").read(0, 6)
    for form, suffix in (("tiff-deflate", ".tiff"), ("mrc", ".mrc")):
        step = SimulateMovies(**SETTINGS, movie_format=form)
        movies.simulate(0, step=step, specimen=specimen, folder=tmp_path)
        movie = open_movie(tmp_path / f"Movies/000001{suffix}")
        assert np.array_equal(movie.read(0, 6), frames)
        assert movie.pixel_size == pytest.approx(2.0)


def test_another_seed_gives_another_movie(job, specimen, tmp_path):
    step = SimulateMovies(**{**SETTINGS, "seed": 6})
    movies.simulate(0, step=step, specimen=specimen, folder=tmp_path)
    other = open_movie(tmp_path / "Movies/000001.tiff").read(0, 1)
    assert np.mean(other == open_movie(job / "Movies/000001.tiff").read(0, 1)) < 0.4


def test_particles_are_where_the_trajectories_say(specimen):
    """A particle in smooth ice, noise-free, is found by correlation of frames to a twentieth of a pixel."""
    step = SimulateMovies(
        **{
            **SETTINGS,
            "particles": 1,
            "ice_noise": 0.0,
            "ice_variation": 0.0,
            "dose_per_frame": 0.3,
            "local_motion": 12.0,
        }
    )
    found = 0
    for index in range(12):
        motion, exposure, frames = frames_without_noise(step, specimen, index)
        x, y = exposure.scene.molecules.position[0]
        if not (160 < x < 416 and 160 < y < 352):
            continue
        found += 1
        assert np.abs(motion.local_field(np.array([x]), np.array([y]), 5)).max() > 0.5
        for frame in (1, 5):
            truth = motion.trajectory(x, y, frame) / 2
            first, later = (image - np.median(image) for image in frames[[0, frame]])
            assert np.abs(displacement(first, later) - truth).max() < 0.05
    assert found >= 2


def test_drift_is_found_again_in_frames_without_noise(specimen):
    step = SimulateMovies(
        **{**SETTINGS, "ice_noise": 0.0, "local_motion": 0.0, "dose_per_frame": 0.3, "drift": 12}
    )
    motion, exposure, _ = frames_without_noise(step, specimen)
    images, shape = exposure.images, (256, 288)
    still = np.zeros_like(images.centre_px)
    first, last = (
        images.layer(
            shape,
            moved_px=motion.trajectory(*exposure.scene.molecules.position.T, frame) / 2,
            smear_px=still,
            damage=np.ones(images.spectra.shape[1:], np.float32),
        )
        for frame in (0, 5)
    )
    inside = (slice(20, -20), slice(20, -20))
    taper = np.hanning(216)[:, None] * np.hanning(248)
    assert np.linalg.norm(motion.common(5)) > 3
    assert (
        np.abs(displacement(first[inside] * taper, last[inside] * taper) - motion.common(5) / 2).max() < 0.2
    )
    # Without an edge to cross, and whatever the whole shift is.
    single = exposure.images.__class__(images.spectra[:1], np.array([[144.3, 127.8]]))
    for moved in ([0.5, -0.25], [3.37, 7.81]):
        a, b = (
            single.layer(
                shape,
                moved_px=np.array([shift]),
                smear_px=still[:1],
                damage=np.ones(images.spectra.shape[1:], np.float32),
            )
            for shift in ([0.0, 0.0], moved)
        )
        assert np.abs(displacement(a, b) - moved).max() < 0.02


def test_ice_moves_with_the_specimen(specimen):
    """Two frames of ice without flow are related by the motion, not by a copy in place."""
    step = SimulateMovies(
        **{
            **SETTINGS,
            "particles": 0,
            "dose_per_frame": 0.01,
            "local_motion": 0.0,
            "jitter": 0.0,
            "ice_variation": 0.0,
        }
    )
    motion, _, frames = frames_without_noise(step, specimen)
    truth = motion.common(5) / 2
    dx, dy = np.rint(truth).astype(int)
    taper = np.hanning(196)[:, None] * np.hanning(228)
    first = frames[0][30:226, 30:258]
    later = frames[5][30 + dy : 226 + dy, 30 + dx : 258 + dx]
    assert np.linalg.norm(truth) > 3
    residue = displacement((first - first.mean()) * taper, (later - later.mean()) * taper)
    assert np.abs(np.array([dx, dy]) + residue - truth).max() < 0.05


def test_source_nodes_undo_the_motion(specimen):
    """What is seen at a node lies, moved by its trajectory, at that node."""
    step = SimulateMovies(**{**SETTINGS, "local_motion": 12.0})
    motion, _ = set_up(step, specimen)
    nodes = movies.source_nodes(motion, 5, (256, 288), 2.0) * 2.0
    seen = nodes + motion.trajectory(nodes[..., 0], nodes[..., 1], 5)
    y, x = np.meshgrid(np.arange(nodes.shape[0]) * 32.0, np.arange(nodes.shape[1]) * 32.0, indexing="ij")
    # First order in the change of a displacement of 12 Å over a view of 500 Å.
    assert np.abs(seen - np.stack([x, y], axis=-1)).max() < 0.25


def test_damage_fades_the_frames_as_measured(specimen):
    step = SimulateMovies(**{**SETTINGS, "pre_exposure": 3.0})
    _, exposure = set_up(step, specimen)
    patch = exposure.images.patch
    k = grids.frequency_radius((patch, patch), 2.0)
    first, last = (
        exposures.damage(exposure, start=3 + 1.5 * i, end=4.5 + 1.5 * i, pixel_size=2.0, voltage_kV=300.0)
        for i in (0, 5)
    )
    assert np.allclose(first, attenuation(k, start=3.0, end=4.5, voltage_kV=300.0))
    ring = (k > 0.15) & (k < 0.2)
    # exp(-7.5 / (2 N_c)) with N_c of 8.6 to 6.4 e/Å².
    assert 0.55 < float((last / first)[ring].mean()) < 0.65


def test_super_resolution_keeps_the_electrons(tmp_path):
    settings = {
        **SETTINGS,
        "n_movies": 1,
        "width": 128,
        "height": 128,
        "particles": 2,
        "dead_pixels": 0,
        "hot_pixels": 0,
    }
    totals = []
    for fine in (False, True):
        folder = tmp_path / str(fine)
        SimulateMovies(**settings, super_resolution=fine).run(context(folder))
        movie = open_movie(folder / "Movies/000001.tiff")
        factor = 2 if fine else 1
        assert movie.shape == (128 * factor, 128 * factor)
        assert movie.pixel_size == pytest.approx(2.0 / factor)
        assert read_header(folder / "truth_map.mrc").pixel_size == pytest.approx(2.0)
        gain = read_mrc(folder / "gain.mrc", 0)
        totals.append((movie.read(0, 6) * gain).sum())
        coordinates = read_particles(folder / "truth_particles.star").rows["rlnCoordinateX"]
        assert coordinates.max() < 128 * factor
    # 600,000 electrons in either: an error of 0.0018 of their ratio.
    assert totals[1] / totals[0] == pytest.approx(1, abs=0.008)


def test_the_clean_image_is_the_particles_alone(job):
    clean = read_mrc(job / "Truth/000001_clean.mrc", 0)
    particles = read_star(job / "Truth/000001.star")["particles"]
    x, y = (np.rint(np.array(particles[label])).astype(int) for label in ("rlnCoordinateX", "rlnCoordinateY"))
    near = np.zeros(clean.shape, bool)
    for column, row in zip(x, y, strict=True):
        near[max(0, row - 60) : row + 60, max(0, column - 60) : column + 60] = True
    inside = (x > 15) & (x < 273) & (y > 15) & (y < 241)
    centres = np.array(
        [clean[r - 6 : r + 7, c - 6 : c + 7].mean() for c, r in zip(x[inside], y[inside], strict=True)]
    )
    background = np.median(clean)
    assert np.all(centres < background)
    # The ice's thickness varies smoothly; nothing else is left beside the particles.
    away = ~(near[:, 1:] | near[:, :-1])
    assert away.sum() > 1000
    assert np.abs(np.diff(clean, axis=1)[away]).max() < 0.02 * (background - centres.min())
