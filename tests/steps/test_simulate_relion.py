"""RELION aligns simulated movies as their truth says: signs, row order and gain are those it reads."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from halfmap.engine import Context
from halfmap.io.star import read_star
from halfmap.steps.simulate.motion import read_motion
from halfmap.steps.simulate.step import SimulateMovies


def align(project: Path, *options: str) -> np.ndarray:
    """Motion (x, y) in Å of every frame that RELION finds, the opposite of its shifts."""
    words = ["relion_run_motioncorr", "--i", "Simulate/job001/movies.star", "--o", "Motion/", "--use_own"]
    words += ["--patch_x", "1", "--patch_y", "1", "--dose_per_frame", "1.5", "--angpix", "2.0", *options]
    subprocess.run(words, cwd=project, check=True, capture_output=True, timeout=120)
    shifts = read_star(project / "Motion/Simulate/job001/Movies/000001.star")["global_shift"]
    return -2.0 * np.stack([shifts["rlnMicrographShiftX"], shifts["rlnMicrographShiftY"]], axis=-1)


@pytest.mark.relion
def test_relion_finds_the_true_drift(tmp_path):
    folder = tmp_path / "Simulate/job001"
    folder.mkdir(parents=True)
    step = SimulateMovies(
        pixel_size=2.0,
        width=640,
        height=512,
        particles=30,
        n_movies=1,
        n_frames=10,
        local_motion=0.0,
        carbon=0.0,
    )
    step.run(Context(folder=folder, project=tmp_path))
    truth = read_motion(folder / "Truth/000001_motion.star").common(np.arange(10))
    found = align(tmp_path, "--gainref", "Simulate/job001/gain.mrc")
    assert np.linalg.norm(truth[-1]) > 8
    difference = found - truth
    # A third of a pixel; with the opposite sign it would be more than the drift itself.
    assert np.sqrt(np.square(difference - difference.mean(axis=0)).sum(axis=-1).mean()) < 0.7
