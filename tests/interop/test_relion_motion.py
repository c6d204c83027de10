"""RELION takes the movies that Halfmap corrects, and goes on with the micrographs and motion it writes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from halfmap.data import MotionTracks
from halfmap.engine import Context
from halfmap.io.motion import read_tracks
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.star import read_star, write_star
from halfmap.io.tables import read_micrographs, read_particles
from halfmap.steps.motion.step import MotionStep
from halfmap.steps.simulate.motion import read_motion
from halfmap.steps.simulate.step import SimulateMovies

pytestmark = pytest.mark.relion

PIXEL, N, SIDE = 3.0, 8, 320
NAMES = ("000001", "000002")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Two simulated movies in `sim`, corrected in `motion`."""
    if not shutil.which("relion_refine"):
        pytest.skip("Debian's relion package is not installed")
    folder = tmp_path_factory.mktemp("relion") / "project"
    for name in ("sim", "motion"):
        (folder / name).mkdir(parents=True)
    simulation = {
        "assembly": "none",
        "pixel_size": PIXEL,
        "width": SIDE,
        "height": SIDE,
        "particles": 30,
        "phase_shift": 90.0,
        "dose_per_frame": 4.0,
        "pre_exposure": 6.0,
        "overlapping": 0.0,
        "broken": 0.0,
        "contaminants": 0.0,
        "carbon": 0.0,
        "n_movies": 2,
        "n_frames": N,
        "drift": 50.0,
        "seed": 5,
    }
    SimulateMovies(**simulation).run(Context(folder=folder / "sim", project=folder))
    step = MotionStep(movies=Path("sim/movies.star"), patch_size=200.0, pictures=False)
    step.run(Context(folder=folder / "motion", project=folder))
    return folder


def relion(folder: Path, program: str, *arguments: object) -> str:
    command = [f"relion_{program}", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def error_of(tracks: MotionTracks, project: Path, name: str) -> float:
    """Root mean square error in Å of the motion over field and frames, less what all frames share."""
    truth = read_motion(project / f"sim/Truth/{name}_motion.star")
    x, y = (axis.ravel() for axis in np.meshgrid(*[np.linspace(40, SIDE - 40, 5)] * 2))
    frames = np.arange(N)[:, None]
    error = -tracks.shift_at(x, y, frames) * PIXEL - truth.trajectory(x * PIXEL, y * PIXEL, frames)
    return float(np.sqrt(((error - error.mean(axis=0)) ** 2).sum(axis=-1).mean()))


@pytest.mark.parametrize("suffix", ["", "_noDW", "_EVN", "_ODD", "_PS"])
def test_relion_sees_the_images(project, suffix):
    path = f"motion/Micrographs/000001{suffix}.mrc"
    said = relion(project, "image_handler", "--i", path, "--stats")
    values = {key: float(value) for key, value in re.findall(r"(avg|stddev|angpix) *= *(\S+?);?\s", said)}
    image = read_mrc(project / path)
    assert values["avg"] == pytest.approx(image.mean(), rel=1e-4)
    assert values["stddev"] == pytest.approx(image.std(), rel=1e-4)
    side = 512 if suffix == "_PS" else SIDE
    assert values["angpix"] == pytest.approx(PIXEL)
    assert f"(x,y,z,n)= {side} x {side} x 1 x 1" in said


def test_both_programs_correct_the_same_table(project):
    """RELION's own correction reads our table of movies and gain, and finds the same motion."""
    relion(
        project,
        "run_motioncorr",
        *("--i", "sim/movies.star", "--o", "theirs/", "--use_own", "--j", 2),
        *("--patch_x", 1, "--patch_y", 1, "--bfactor", 500, "--dose_per_frame", 4, "--preexposure", 6),
        *("--gainref", "sim/gain.mrc", "--dose_weighting", "--save_noDW"),
    )
    table = read_micrographs(project / "theirs/corrected_micrographs.star")
    assert len(table) == 2
    for name in NAMES:
        theirs = read_tracks(project / f"theirs/sim/Movies/{name}.star")
        ours = read_tracks(project / f"motion/Micrographs/{name}.star")
        assert theirs.shape == ours.shape
        assert error_of(ours, project, name) < error_of(theirs, project, name)
        a, b = (
            read_mrc(project / path, 0)
            for path in (f"theirs/sim/Movies/{name}_noDW.mrc", f"motion/Micrographs/{name}_noDW.mrc")
        )
        # The same sum of counts, the same way up, within a few pixels.
        assert b.mean() == pytest.approx(a.mean(), rel=0.02)
        spectra = [np.fft.rfft2(image - image.mean())[:40, :40] for image in (a, b)]
        together = np.fft.irfft2(spectra[0] * spectra[1].conj())
        assert together.max() > 8 * together.std()


def test_relion_reads_our_motion_of_movies_that_are_done(project, tmp_path):
    """It passes over movies whose micrograph and motion are there, and sums up the motion as we do."""
    shutil.copytree(project / "sim", tmp_path / "sim")
    for name in NAMES:
        for suffix in (".mrc", ".star", "_noDW.mrc"):
            target = tmp_path / f"done/sim/Movies/{name}{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(project / f"motion/Micrographs/{name}{suffix}", target)
    relion(
        tmp_path,
        "run_motioncorr",
        *("--i", "sim/movies.star", "--o", "done/", "--use_own", "--only_do_unfinished"),
        *("--dose_per_frame", 4, "--preexposure", 6, "--dose_weighting", "--save_noDW"),
    )
    theirs = read_micrographs(tmp_path / "done/corrected_micrographs.star").rows
    ours = read_micrographs(project / "motion/corrected_micrographs.star").rows
    for label in ("rlnAccumMotionTotal", "rlnAccumMotionEarly", "rlnAccumMotionLate"):
        # RELION's are in pixels.
        assert np.allclose(theirs[label].to_numpy() * PIXEL, ours[label].to_numpy(), rtol=1e-3, atol=1e-3)


def test_relion_handles_the_table_of_micrographs(project, tmp_path):
    relion(
        project,
        "star_handler",
        *("--i", "motion/corrected_micrographs.star", "--o", tmp_path / "some.star"),
        *("--select", "rlnAccumMotionTotal", "--minval", 0, "--maxval", 1e6),
    )
    ours = read_micrographs(project / "motion/corrected_micrographs.star")
    theirs = read_micrographs(tmp_path / "some.star")
    label = "rlnMicrographName"
    assert theirs.rows[label].to_list() == ours.rows[label].to_list()
    assert theirs.pixel_size == ours.pixel_size


def particles_of(project: Path, box: int) -> pl.DataFrame:
    """The true particles away from the edges, on our micrographs."""
    rows = read_particles(project / "sim/truth_particles.star").rows
    inside = [
        (pl.col(f"rlnCoordinate{axis}") > box) & (pl.col(f"rlnCoordinate{axis}") < SIDE - box)
        for axis in "XY"
    ]
    name = pl.col("rlnMicrographName").str.replace("sim/Movies", "motion/Micrographs")
    return rows.filter(*inside).with_columns(name.str.replace(".tiff", ".mrc", literal=True))


def test_relion_extracts_particles(project, tmp_path):
    box = 32
    rows = particles_of(project, box)
    for name in NAMES:
        own = rows.filter(pl.col("rlnMicrographName").str.contains(name))
        picks = tmp_path / f"motion/Micrographs/{name}_pick.star"
        picks.parent.mkdir(parents=True, exist_ok=True)
        write_star(picks, {"": own.select("rlnCoordinateX", "rlnCoordinateY")})
    relion(
        project,
        "preprocess",
        *(
            "--i",
            "motion/corrected_micrographs.star",
            "--coord_dir",
            f"{tmp_path}/",
            "--coord_suffix",
            "_pick.star",
        ),
        *("--part_star", tmp_path / "particles.star", "--part_dir", f"{tmp_path}/Extract/"),
        *("--extract", "--extract_size", box),
    )
    particles = read_particles(tmp_path / "particles.star")
    assert len(particles) == len(rows)
    assert particles.pixel_size == PIXEL
    image = read_mrc(project / "motion/Micrographs/000001.mrc", 0)
    stack = read_mrc(next((tmp_path / "Extract").rglob("000001.mrcs")))
    # RELION cuts off what is behind the point.
    x, y = (int(rows[f"rlnCoordinate{axis}"][0]) for axis in "XY")
    assert np.allclose(stack[0], image[y - box // 2 : y + box // 2, x - box // 2 : x + box // 2], atol=1e-4)


def test_relion_polishes_along_our_tracks(project, tmp_path):
    """Bayesian polishing reads micrographs, motion, gain and movies, and its tracks begin with ours."""
    box = 64
    rows = particles_of(project, box // 2).with_columns(
        pl.Series(
            "rlnImageName", [f"{i + 1:06d}@none.mrcs" for i in range(len(particles_of(project, box // 2)))]
        ),
        (pl.int_range(pl.len()) % 2 + 1).alias("rlnRandomSubset"),
    )
    optics = read_particles(project / "sim/truth_particles.star").optics.with_columns(
        pl.lit(box).alias("rlnImageSize"), pl.lit(2).alias("rlnImageDimensionality")
    )
    write_star(project / "particles.star", {"optics": optics, "particles": rows})
    truth = read_mrc(project / "sim/truth_map.mrc")
    side = len(truth)
    volume = np.zeros((box,) * 3, np.float32)
    cut = min(side, box)
    ours, theirs = (slice(n // 2 - cut // 2, n // 2 - cut // 2 + cut) for n in (box, side))
    volume[ours, ours, ours] = truth[theirs, theirs, theirs]
    write_mrc(project / "map.mrc", volume, pixel_size=PIXEL)
    write_mrc(project / "mask.mrc", np.ones_like(volume), pixel_size=PIXEL)
    shells = np.arange(box // 2 + 1)
    fsc = pl.DataFrame(
        {
            "rlnSpectralIndex": shells,
            "rlnResolution": shells / (box * PIXEL),
            "rlnAngstromResolution": [999.0, *(box * PIXEL / shells[1:])],
            "rlnFourierShellCorrelationCorrected": np.where(shells < 24, 0.9, 0.01),
        }
    )
    general = {
        "rlnFinalResolution": box * PIXEL / 24,
        "rlnUnfilteredMapHalf1": "map.mrc",
        "rlnUnfilteredMapHalf2": "map.mrc",
        "rlnMaskName": "mask.mrc",
    }
    write_star(project / "post.star", {"general": general, "fsc": fsc})
    relion(
        project,
        "motion_refine",
        *("--i", "particles.star", "--f", "post.star", "--m1", "map.mrc", "--m2", "map.mrc"),
        *("--mask", "mask.mrc", "--angpix_ref", PIXEL, "--o", f"{tmp_path}/polish/"),
        *("--corr_mic", "motion/corrected_micrographs.star", "--fdose", 4, "--max_iters", 0, "--j", 2),
    )
    for name in NAMES:
        found = read_star(next((tmp_path / "polish").rglob(f"{name}_tracks.star")))
        tracks = read_tracks(project / f"motion/Micrographs/{name}.star")
        of_micrograph = rows.filter(pl.col("rlnMicrographName").str.contains(name))
        tables = [pl.DataFrame(found[str(i)]) for i in range(len(of_micrograph))]
        for place, table in zip(of_micrograph.to_dicts(), tables, strict=True):
            x, y = place["rlnCoordinateX"], place["rlnCoordinateY"]
            expected = -tracks.polynomial_shift_at(x, y, np.arange(N))
            shift = table.select("rlnOriginXAngst", "rlnOriginYAngst").to_numpy() / PIXEL
            assert np.abs(shift - shift[0] - expected).max() < 0.1
