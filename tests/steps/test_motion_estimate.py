"""Tracks of pairs, the prior of local motion, and both together on movies whose motion is known."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from halfmap.errors import ShapeError
from halfmap.steps.motion import prior
from halfmap.steps.motion.estimate import NODES, Estimate, estimate_motion
from halfmap.steps.motion.likelihood import damage_of
from halfmap.steps.motion.pairs import pair_tracks
from halfmap.steps.motion.prior import space_modes, time_modes

COARSE_A = 12.0
PIXEL_A = 4.2
SHAPE, N = (256, 320), 10
DOSE = 1.5 * (np.arange(N) + 0.5)


def texture(shape: tuple[int, int], *, seed: int = 1, cut: float = 0.25, start: float = 0.01) -> np.ndarray:
    """Half-spectrum of a periodic random image of unit variance, waves of `start` to `cut` cycles/px."""
    rng = np.random.default_rng(seed)
    k = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1]))
    spectrum = np.fft.rfft2(rng.normal(size=shape)) * ((k > start) & (k < cut)) * np.exp(-4 * k)
    return spectrum / np.fft.irfft2(spectrum, s=shape).std()


def moved(spectrum: np.ndarray, shape: tuple[int, int], shift_px: np.ndarray) -> np.ndarray:
    """Image moved by (x, y), periodic and exact."""
    ky, kx = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])
    return np.fft.irfft2(spectrum * np.exp(-2j * np.pi * (kx * shift_px[0] + ky * shift_px[1])), s=shape)


def rigid_frames(
    track_A: np.ndarray, *, noise: float = 0.0, pixel: float = COARSE_A, size: tuple[int, int] = (90, 110)
) -> np.ndarray:
    """Part of a field that is larger than what is seen, moving as one."""
    whole = (size[0] + 60, size[1] + 60)
    # Detail of every size: whitening would bring up the edges where there is none.
    spectrum = texture(whole, cut=0.5)
    frames = np.stack([moved(spectrum, whole, step / pixel) for step in track_A])[:, 30:-30, 30:-30]
    return (frames + np.random.default_rng(4).normal(0, noise, frames.shape)).astype(np.float32)


def curved_track(n: int, length: float = 60.0) -> np.ndarray:
    t = np.arange(n) / max(n - 1, 1)
    return length * np.stack([1 - np.exp(-3 * t), -0.4 * t + 0.3 * np.sin(4 * t)], axis=-1)


# Tracks of pairs


@pytest.mark.parametrize("n", [3, 8])
def test_tracks_of_pairs_are_right_to_a_part_of_a_pixel(n):
    track = curved_track(n)
    found, height = pair_tracks(rigid_frames(track), pixel_size=COARSE_A, largest=150.0)
    assert found.shape == (n, 2)
    assert np.all(found[0] == 0)
    assert np.abs(found - track).max() < 0.1 * COARSE_A
    assert height > 15


def test_signs_and_axes_of_tracks():
    found, _ = pair_tracks(
        rigid_frames(np.array([[0.0, 0], [36, 0], [0, 24]])), pixel_size=COARSE_A, largest=100.0
    )
    assert np.allclose(found, [[0, 0], [36, 0], [0, 24]], atol=1.0)


@pytest.mark.parametrize("bad", [0, 4, 7])
def test_a_frame_without_specimen_does_not_move_the_others(bad):
    track = curved_track(8)
    frames = rigid_frames(track, noise=0.5)
    alone, _ = pair_tracks(frames, pixel_size=COARSE_A, largest=150.0)
    frames[bad] = np.random.default_rng(9).normal(0, 1, frames.shape[1:])
    found, _ = pair_tracks(frames, pixel_size=COARSE_A, largest=150.0)
    others = np.delete(np.arange(8), bad)
    difference = found[others] - track[others]
    difference -= difference.mean(axis=0)
    assert np.abs(difference).max() < 0.15 * COARSE_A
    assert np.abs((found - alone)[others] - (found - alone)[others[0]]).max() < 0.15 * COARSE_A


def test_no_pair_moves_further_than_allowed():
    track = np.array([[0.0, 0.0], [10.0, 0.0], [100.0, 0.0]])
    free, height = pair_tracks(rigid_frames(track), pixel_size=COARSE_A, largest=150.0)
    assert free[2, 0] == pytest.approx(100, abs=2)
    held, lower = pair_tracks(rigid_frames(track), pixel_size=COARSE_A, largest=36.0)
    assert np.abs(held).max() <= 36 + COARSE_A
    assert lower < height


def test_noise_has_low_peaks():
    frames = np.random.default_rng(3).normal(size=(6, 90, 110)).astype(np.float32)
    _, height = pair_tracks(frames, pixel_size=COARSE_A, largest=150.0)
    assert 2.5 < height < 4.5
    # What stays in place in every frame would be seen, but not the mean.
    frames += 1000
    assert pair_tracks(frames, pixel_size=COARSE_A, largest=150.0)[1] == pytest.approx(height, rel=0.01)


# The prior


def matern(distance: np.ndarray, length: float, order: int) -> np.ndarray:
    s = np.sqrt(2 * order + 1) * distance / length
    return (1 + s if order == 1 else 1 + s + s * s / 3) * np.exp(-s)


@pytest.mark.parametrize("length", [2000.0, 4000.0])
@pytest.mark.parametrize("size", [(4000.0, 4000.0), (2500.0, 3600.0)], ids=str)
def test_modes_of_the_field_have_the_covariance_wanted(size, length):
    modes = space_modes(size, length=length)
    rng = np.random.default_rng(2)
    places = rng.uniform(0, 1, (60, 2)) * size[::-1]
    values = modes(places)
    assert values.shape[-1] == modes.weights.shape[1] <= prior._MOST_MODES
    expected = matern(np.linalg.norm(places[:, None] - places, axis=-1), length, 1)
    error = values @ values.T - expected
    # Modes leave out a part of the variance, at the corners more than on average.
    left_out = -np.diag(error)
    kept = modes.weights.shape[1] < prior._MOST_MODES
    assert left_out.mean() < (0.006 if kept else 0.02)
    assert np.abs(error).max() < 0.08
    assert left_out.min() > -1e-9


def test_modes_of_the_field_may_be_asked_anywhere():
    modes = space_modes((3000.0, 4000.0), length=4000.0)
    grid = modes(np.zeros((3, 5, 2)))
    assert grid.shape[:2] == (3, 5)
    assert np.allclose(grid, modes(np.zeros(2)))
    # x comes first.
    assert not np.allclose(modes(np.array([4000.0, 0.0])), modes(np.array([0.0, 3000.0])))
    assert np.abs(modes(np.array([4000.0, 3000.0])) ** 2).sum() == pytest.approx(1, abs=0.05)


def test_modes_of_time_start_at_zero_and_slow_down():
    dose = 0.8 + 1.5 * np.arange(30)
    modes = time_modes(dose)
    assert np.all(modes[0] == 0)
    time = np.log1p(dose / 3)
    free = matern(np.abs(time[:, None] - time), 1.0, 2)
    conditioned = free - np.outer(free[:, 0], free[0])
    assert np.abs(modes @ modes.T - conditioned).max() < 0.03
    assert modes.shape[1] < 10
    steps = np.sqrt((np.diff(modes, axis=0) ** 2).sum(axis=1))
    assert steps[0] > 3 * steps[-1]


def test_a_movie_that_was_exposed_before_moves_less():
    dose = 1.5 * np.arange(20)
    early, late = ((time_modes(dose + before)[5] ** 2).sum() for before in (0.75, 30.0))
    assert late < 0.3 * early


def test_modes_are_cut_to_the_strongest(monkeypatch):
    monkeypatch.setattr(prior, "_LEFT_OUT", 0.3)
    few = space_modes((4000.0, 4000.0), length=4000.0).weights.shape[1]
    monkeypatch.setattr(prior, "_LEFT_OUT", 1e-4)
    assert few < space_modes((4000.0, 4000.0), length=4000.0).weights.shape[1]


# Both together


def true_track() -> np.ndarray:
    rng = np.random.default_rng(11)
    track = curved_track(N, 40.0) + rng.normal(0, 0.7, (N, 2))
    return track - track[0]


def true_local(x: np.ndarray, y: np.ndarray, frame: int) -> np.ndarray:
    """Displacement (..., 2) in Å against the track, of what is at (x, y) Å in the first frame."""
    height, width = (side * PIXEL_A for side in SHAPE)
    u, v = x / width - 0.5, y / height - 0.5
    growth = 1 - np.exp(-(DOSE[frame] - DOSE[0]) / 6)
    field = np.stack([9 * u + 5 * u * v - 3 * v * v + 1, -8 * v + 6 * u * u + 4 * u], axis=-1)
    return growth * field


@cache
def synthetic(local: bool = True, noise: float = 2.5, seed: int = 5) -> np.ndarray:
    """Frames of a fading specimen that drifts and deforms, in white noise."""
    fine = (2 * SHAPE[0], 2 * SHAPE[1])
    # Twice the field, so that nothing comes round the edges.
    spectrum = texture(fine, seed=seed, start=0.005, cut=0.35)
    k = np.hypot(np.fft.fftfreq(fine[0])[:, None], np.fft.rfftfreq(fine[1])) / PIXEL_A
    damage = damage_of(np.maximum(k, 1e-6).ravel(), DOSE, voltage_kV=300.0).reshape(N, *k.shape)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(np.float64)
    track, rng = true_track(), np.random.default_rng(seed)
    frames = []
    for f in range(N):
        seen = np.stack([x + 0.5, y + 0.5], axis=-1) * PIXEL_A
        first = seen
        for _ in range(4):
            far = true_local(first[..., 0], first[..., 1], f) if local else 0
            first = seen - track[f] - far
        at = first / PIXEL_A - 0.5
        image = np.fft.irfft2(spectrum * damage[f], s=fine)
        places = [at[..., 1] + SHAPE[0] // 2, at[..., 0] + SHAPE[1] // 2]
        frames.append(map_coordinates(image, places, order=5, mode="grid-wrap"))
    noisy = np.stack(frames) + rng.normal(0, noise, (N, *SHAPE))
    return (noisy + 40).astype(np.float32)


def estimate(frames: np.ndarray, **changes) -> Estimate:
    settings = {
        "pixel_size": PIXEL_A,
        "dose": DOSE,
        "voltage_kV": 300.0,
        "patch_size": 250.0,
        "resolution": 10.0,
        "correlation_length": 3000.0,
        "largest": 150.0,
    }
    return estimate_motion(frames, **{**settings, **changes})


@pytest.fixture(scope="module")
def found() -> Estimate:
    return estimate(synthetic())


def node_errors(found: Estimate) -> np.ndarray:
    """Estimated minus true displacement (n, NODES, NODES, 2) in Å at the nodes."""
    assert found.grid is not None
    y, x = np.meshgrid(*(np.linspace(0, side * PIXEL_A, NODES) for side in SHAPE), indexing="ij")
    truth = np.stack([true_track()[f] + true_local(x, y, f) for f in range(N)])
    return found.track[:, None, None] + found.grid - truth


def test_drift_and_deformation_are_found_within_their_errors(found):
    error = node_errors(found)
    assert np.all(error[0] == 0)
    # Without a model of the deformation, 2 Å and more are left.
    assert np.sqrt((error[1:] ** 2).mean()) < 0.5
    assert found.grid_error is not None
    z = error[1:] / found.grid_error[1:, ..., None]
    assert 0.5 < np.sqrt((z**2).mean()) < 2
    assert np.abs(z).max() < 6
    assert found.misfit < 1.3
    assert found.peak_height > 8
    assert 1 <= found.rounds < 15
    assert 1 < found.spread < 15


def test_track_is_the_mean_of_the_field(found):
    assert found.grid.shape == (N, NODES, NODES, 2)
    assert np.abs(found.grid.mean(axis=(1, 2))).max() < 1e-9
    error = node_errors(found).mean(axis=(1, 2))[1:]
    z = error / found.track_error[1:, None]
    assert 0.4 < np.sqrt((z**2).mean()) < 2
    assert found.track_error[0] == 0
    assert np.all(found.grid_error[0] == 0)
    assert np.all(found.grid_error[1:] > 0)


def test_errors_shrink_with_the_noise(found):
    clear = estimate(synthetic(noise=1.2))
    assert clear.grid_error is not None
    assert clear.grid_error[1:].mean() < 0.7 * found.grid_error[1:].mean()
    assert np.sqrt((node_errors(clear) ** 2).mean()) < np.sqrt((node_errors(found) ** 2).mean())


def test_patches_follow_the_deformation_by_themselves(found):
    p = len(found.centres)
    assert found.patches.shape == (p, N, 2)
    assert found.patch_error.shape == (p, N)
    assert p >= 9
    x, y = found.centres.T
    truth = np.stack([true_track()[f] + true_local(x, y, f) for f in range(N)], axis=1)
    error = (found.track + found.patches - truth)[:, 1:]
    z = error / found.patch_error[:, 1:, None]
    assert 0.4 < np.sqrt((z**2).mean()) < 2
    assert found.patch_error[:, 1:].mean() > found.grid_error[1:].mean()


def test_a_stiff_field_has_a_track_alone():
    frames = synthetic(local=False)
    stiff = estimate(frames, local=False)
    assert stiff.grid is None
    assert stiff.grid_error is None
    assert stiff.spread == 0
    error = (stiff.track - true_track())[1:]
    assert np.sqrt((error**2).mean()) < 0.3
    z = error / stiff.track_error[1:, None]
    assert 0.4 < np.sqrt((z**2).mean()) < 2
    # Allowed to deform, it hardly does.
    free = estimate(frames)
    assert free.spread < 0.6
    assert free.grid is not None
    assert np.abs(free.grid).max() < 0.5


def test_deformation_that_may_not_be_is_seen_as_misfit(found):
    stiff = estimate(synthetic(), local=False)
    assert stiff.misfit > found.misfit + 0.2


def test_uneven_noise_does_not_spoil_the_quiet_half():
    frames = synthetic().copy()
    rng, half = np.random.default_rng(4), SHAPE[1] // 2
    frames[:, :, :half] += rng.normal(0, 7, frames[:, :, :half].shape).astype(np.float32)
    found = estimate(frames)
    assert found.grid_error is not None
    loud, quiet = found.grid_error[1:, 2:7, 1:3], found.grid_error[1:, 2:7, 6:8]
    assert loud.mean() > 1.2 * quiet.mean()
    error = node_errors(found)[1:]
    assert np.sqrt(np.square(error[:, 2:7, 6:8]).mean()) < 0.35


def test_the_edge_of_a_shadow_does_not_hold_the_track():
    """A beam edge stands still, brighter than anything that moves."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    lit = np.hypot(x - 0.6 * SHAPE[1], y - 0.5 * SHAPE[0]) < 0.55 * SHAPE[1]
    assert 0.05 < 1 - lit.mean() < 0.3
    found = estimate((synthetic() * lit).astype(np.float32))
    error = found.track - estimate(synthetic()).track
    assert np.sqrt(np.square(error).mean()) < 0.5


def test_movies_without_brightness_are_left_as_they_are():
    level = synthetic() - 40
    assert np.allclose(estimate(level).track, estimate(synthetic()).track, atol=0.02)


def test_groups_of_unequal_length_are_weighed_by_it():
    frames = synthetic()
    groups = [range(1), range(1, 2), range(2, 3), range(3, 5), range(5, 8), range(8, N)]
    sums = np.stack([frames[group].sum(axis=0) for group in groups])
    lengths = np.array([len(group) for group in groups])
    dose = np.array([DOSE[group].mean() for group in groups])
    found = estimate(sums, dose=dose, lengths=lengths)
    truth = np.stack([true_track()[group].mean(axis=0) for group in groups])
    error = (found.track - truth)[1:]
    assert np.sqrt(np.square(error).mean()) < 0.6


def test_a_field_too_small_is_refused():
    with pytest.raises(ShapeError, match="too small"):
        estimate(synthetic()[:, :20, :20])


def test_few_patches_allow_no_deformation():
    assert estimate(synthetic(), patch_size=600.0).grid is None


def test_hot_streaks_are_not_followed(found):
    """Rays that hit single frames move nothing."""
    frames = synthetic().copy()
    rng = np.random.default_rng(2)
    for frame in frames:
        frame[rng.integers(0, SHAPE[0], 20), rng.integers(0, SHAPE[1], 20)] += 500
    hit = estimate(frames)
    assert np.sqrt((node_errors(hit) ** 2).mean()) < 1.5 * np.sqrt((node_errors(found) ** 2).mean())


def test_threads_and_repetition_change_nothing(found):
    before = torch.get_num_threads()
    again = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            again.append(estimate(synthetic()))
    finally:
        torch.set_num_threads(before)
    for other in again:
        for name in ("track", "track_error", "grid", "grid_error", "patches", "patch_error"):
            assert getattr(other, name).tobytes() == getattr(found, name).tobytes(), name


def test_frames_are_not_changed():
    frames = synthetic().copy()
    estimate(frames)
    assert np.array_equal(frames, synthetic())


def test_three_frames_of_odd_size_are_enough():
    frames = synthetic()[:3, :231, :301].copy()
    few = estimate(frames, dose=DOSE[:3])
    assert few.track.shape == (3, 2)
    assert np.abs(few.track - true_track()[:3]).max() < 3
