"""Motion of the specimen: exact record, zero at the start, of the size and smoothness asked."""

from __future__ import annotations

import numpy as np
import pytest

from halfmap.errors import FileFormatError
from halfmap.io.star import write_star
from halfmap.steps.simulate.motion import random_motion, read_motion

SETTINGS = {
    "n_frames": 20,
    "dose_per_frame": 1.5,
    "pre_exposure": 0.0,
    "size_A": (2000.0, 3000.0),
    "drift": 25.0,
    "jitter": 0.4,
    "deformation": 6.0,
    "correlation_length": 4000.0,
}


@pytest.fixture
def motion():
    return random_motion(np.random.default_rng(5), **SETTINGS)


def test_nothing_has_moved_in_the_first_frame(motion):
    x, y = np.random.default_rng(0).uniform(0, 3000, (2, 50))
    assert np.abs(motion.trajectory(x, y, 0)).max() == 0


def test_the_file_gives_the_same_trajectories_to_the_last_digit(motion, tmp_path):
    motion.write(tmp_path / "motion.star")
    again = read_motion(tmp_path / "motion.star")
    x, y, frame = np.random.default_rng(1).uniform(0, (3000, 2000, 19), (200, 3)).T
    assert np.array_equal(again.trajectory(x, y, frame), motion.trajectory(x, y, frame))


def test_local_field_and_common_motion_add_up_to_the_trajectory(motion):
    x, y = np.linspace(0, 3000, 7), np.linspace(0, 2000, 5)
    whole = motion.trajectory(x, y[:, None], 13)
    assert np.allclose(motion.local_field(x, y, 13) + motion.common(13), whole, atol=1e-10)


def test_the_deformation_has_the_size_asked_and_no_drift_of_its_own():
    squares, means = [], []
    for seed in range(30):
        motion = random_motion(np.random.default_rng(seed), **SETTINGS)
        field = motion.local_field(np.linspace(0, 3000, 30), np.linspace(0, 2000, 20), 19)
        squares.append(np.square(field).sum(-1).mean())
        means.append(np.linalg.norm(field.mean(axis=(0, 1))))
    # Two independent modes of 0.75 and 0.66 of 6 Å over the exposure, of which 0.83 and 0.94 fall between the
    # middles of the first and the last frame; 30 movies leave an error of about a tenth.
    expected = 6.0 * np.hypot(0.75 * 0.83, 0.66 * 0.94)
    assert np.sqrt(np.mean(squares)) == pytest.approx(expected, rel=0.15)
    assert np.max(means) < 0.3


def test_no_low_order_polynomial_is_the_deformation(motion):
    """A polynomial of third order leaves residues that an alignment could see, well above rounding."""
    x, y = np.meshgrid(np.linspace(-1, 1, 30), np.linspace(-1, 1, 20))
    field = motion.local_field(np.linspace(0, 3000, 30), np.linspace(0, 2000, 20), 19)
    terms = [x**i * y**j for i in range(4) for j in range(4 - i)]
    design = np.stack(terms, axis=-1).reshape(-1, len(terms))
    residue = field.reshape(-1, 2) - design @ np.linalg.lstsq(design, field.reshape(-1, 2), rcond=None)[0]
    assert 0.02 < np.sqrt(np.square(residue).sum(-1).mean()) < 1.5


def test_most_of_the_motion_is_early(motion):
    x, y = np.array([[500.0], [1000.0]]), np.array([[500.0], [1500.0]])
    track = motion.trajectory(x, y, np.arange(20)) - motion.jitter
    steps = np.linalg.norm(np.diff(track, axis=-2), axis=-1).mean(axis=0)
    assert steps[:4].sum() > 3 * steps[-4:].sum()


def test_smear_is_the_way_during_a_frame(motion):
    from_ends = motion.trajectory(700.0, 800.0, 3.4999) - motion.trajectory(700.0, 800.0, 2.5001)
    assert np.allclose(motion.smear(700.0, 800.0, 3), from_ends, atol=2e-3)


def test_a_still_specimen_stays_still():
    still = random_motion(np.random.default_rng(0), **{**SETTINGS, "drift": 0, "jitter": 0, "deformation": 0})
    assert np.abs(still.trajectory(100.0, 200.0, np.arange(20))).max() == 0


def test_another_file_is_refused(tmp_path):
    write_star(tmp_path / "other.star", {"general": {"rlnImageSizeZ": 3}})
    with pytest.raises(FileFormatError, match="holds no motion"):
        read_motion(tmp_path / "other.star")


def test_cutting_the_exposure_into_other_frames_moves_nothing_else():
    settings = {**SETTINGS, "jitter": 0}
    fine = random_motion(np.random.default_rng(3), **settings)
    coarse = random_motion(np.random.default_rng(3), **{**settings, "n_frames": 5, "dose_per_frame": 6.0})
    # From 6 to 24 e/Å²: the beginning of frame 4 to the end of frame 15, of frame 1 to that of 3.
    moved_fine = fine.trajectory(400.0, 900.0, 15.5) - fine.trajectory(400.0, 900.0, 3.5)
    moved_coarse = coarse.trajectory(400.0, 900.0, 3.5) - coarse.trajectory(400.0, 900.0, 0.5)
    assert np.allclose(moved_fine, moved_coarse, rtol=1e-9)


def test_what_moves_before_the_first_frame_is_not_seen_in_it():
    settings = {**SETTINGS, "jitter": 0}
    whole = random_motion(np.random.default_rng(3), **settings)
    late = random_motion(np.random.default_rng(3), **{**settings, "n_frames": 16, "pre_exposure": 6.0})
    expected = whole.trajectory(400.0, 900.0, np.arange(4, 20)) - whole.trajectory(400.0, 900.0, 4)
    assert np.allclose(late.trajectory(400.0, 900.0, np.arange(16)), expected, rtol=1e-9)


def test_no_movie_drifts_more_than_its_length_within_its_first_frame():
    for dose in (0.5, 2.5, 10.0):
        settings = {**SETTINGS, "n_frames": round(40 / dose), "dose_per_frame": dose, "jitter": 0}
        motion = random_motion(np.random.default_rng(8), **settings)
        assert np.linalg.norm(motion.smear(1500.0, 1000.0, 0)) < 1.5 * (25 + 3 * 6)
