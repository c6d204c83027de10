"""Frames moved and summed: kernels against plain sums, dose weights, binning, spectra for the CTF."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline, PchipInterpolator

from halfmap.data.motion import MotionTracks, polynomial_terms
from halfmap.ops.dose import dose_weights
from halfmap.steps.motion import correct, spectrum
from halfmap.steps.motion.frames import Frames
from halfmap.steps.motion.movie import _between_groups, fit_polynomial, group_frames
from halfmap.steps.motion.step import MotionStep
from halfmap.steps.motion.sums import _parts, binned_shape, block_displacements, sum_frames

SHAPE, N = (75, 101), 4
DTYPES = ["u1", "u2", "i2", "f4"]


def counts(dtype: str = "u1", shape: tuple[int, int] = SHAPE, n: int = N, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).poisson(6, (n, *shape)).astype(dtype)


def gain(shape: tuple[int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(2).normal(1, 0.1, shape).astype(np.float32)


def no_motion(shape: tuple[int, int] = SHAPE, n: int = N) -> np.ndarray:
    y, x = correct.block_centres(shape)
    return np.zeros((n, len(y), len(x), 2))


def random_motion(shape: tuple[int, int] = SHAPE, n: int = N, size: float = 5.0) -> np.ndarray:
    return np.random.default_rng(3).normal(0, size, no_motion(shape, n).shape)


def everything(n: int = N) -> correct.Recipe:
    """One sum of all frames, one of every other, and one weighted."""
    parity = np.arange(n) % 2 == 0
    return correct.make_recipe(np.stack([np.ones(n), parity, np.linspace(0.2, 1.4, n)]))


def plain(
    frames: np.ndarray, factor: np.ndarray, displacement: np.ndarray, fill: float | np.ndarray
) -> np.ndarray:
    """Every frame moved, pixel by pixel: the windowed sinc at where the pixel's content is."""
    n, (h, w) = len(frames), frames.shape[1:]
    moved = np.full((n, h, w), np.nan)
    taps = np.arange(-3, 5)

    def weights(part: float) -> np.ndarray:
        offset = taps - part
        window = np.i0(3.5 * np.sqrt(np.maximum(1 - (offset / 4) ** 2, 0)))
        values = np.sinc(offset) * window
        return values / values.sum()

    for f in range(n):
        beyond = np.broadcast_to(fill, (n, *displacement.shape[1:3]))[f]
        image = frames[f] * factor.astype(np.float64)
        # Corners and edges of blocks and of the field among them.
        for y in (0, 1, 5, 31, 32, 50, 63, 64, h - 1):
            for x in (0, 2, 31, 32, 47, 63, 64, 95, 96, w - 1):
                by, bx = y // 32, x // 32
                # Displacements are counted in steps of 1/512.
                dx, dy = np.rint(displacement[f, by, bx] * 512) / 512
                x0, y0 = int(np.floor(dx)), int(np.floor(dy))
                rows, columns = y + y0 + taps, x + x0 + taps
                inside = ((rows >= 0) & (rows < h))[:, None] & ((columns >= 0) & (columns < w))
                near = image[np.clip(rows, 0, h - 1)][:, np.clip(columns, 0, w - 1)]
                near = np.where(inside, near, beyond[by, bx])
                moved[f, y, x] = weights(dy - y0) @ near @ weights(dx - x0)
    return moved


def test_moved_frames_are_those_of_a_plain_sum():
    frames, factor, motion = counts(n=2), gain(), random_motion(n=2)
    fill = correct.background(frames, factor)
    expected = plain(frames, factor, motion, fill)
    found = correct.move_and_add(frames, factor, motion, correct.make_recipe(np.eye(2)))
    assert found.dtype == np.float32
    known = np.isfinite(expected)
    assert known.sum() == 2 * 90
    assert np.abs(found - expected)[known].max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_frames_that_do_not_move_stay_as_they_are(dtype):
    frames, factor = counts(dtype), gain()
    found = correct.move_and_add(frames, factor, no_motion(), correct.make_recipe(np.eye(N)))
    assert np.array_equal(found, frames.astype(np.float32) * factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [(3, 0), (0, -5), (-40, 7)], ids=str)
def test_whole_pixels_are_moved_exactly(dtype, shift):
    dx, dy = shift
    frames, factor = counts(dtype), gain()
    found = correct.move_and_add(
        frames, factor, no_motion() + np.array(shift), correct.make_recipe(np.eye(N))
    )
    expected = np.roll(frames.astype(np.float32) * factor, (-dy, -dx), axis=(1, 2))
    inside = (
        slice(None),
        slice(max(0, -dy), SHAPE[0] - max(0, dy)),
        slice(max(0, -dx), SHAPE[1] - max(0, dx)),
    )
    assert np.array_equal(found[inside], expected[inside])


def test_a_wave_is_moved_by_parts_of_a_pixel():
    """Sign and size; the heights of waves stay, within a few per cent up to three quarters of Nyquist."""
    y, x = np.mgrid[:128, :128].astype(np.float64)
    for part in (0.05, 0.25, 0.375):
        shift = np.array([2.5, -1.3])

        def wave(moved: np.ndarray, part: float = part) -> np.ndarray:
            return 10 + np.cos(2 * np.pi * (part * (x - moved[0]) + 0.06 * (y - moved[1])))

        frames = np.stack([wave(np.zeros(2)), wave(shift)]).astype(np.float32)
        motion = no_motion((128, 128), 2)
        motion[1] = shift
        found = correct.move_and_add(frames, np.ones((128, 128), np.float32), motion, everything(2))
        middle = (slice(8, -8), slice(8, -8))
        error = (found[0] - 2 * wave(np.zeros(2)))[middle]
        assert np.abs(error).max() < (0.02 if part < 0.3 else 0.06)


def test_sums_have_the_weights_of_their_recipe():
    frames, factor, motion = counts(), gain(), random_motion()
    each = correct.move_and_add(frames, factor, motion, correct.make_recipe(np.eye(N)))
    together = correct.move_and_add(frames, factor, motion, everything())
    weights = np.linspace(0.2, 1.4, N)[:, None, None]
    assert np.allclose(together[0], each.sum(axis=0), rtol=1e-5)
    assert np.allclose(together[1], each[::2].sum(axis=0), rtol=1e-5)
    assert np.allclose(together[2], (weights * each).sum(axis=0), rtol=1e-5)


def test_recipes_leave_out_zeros():
    recipe = correct.make_recipe(np.array([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]]))
    assert recipe.n_sums == 2
    assert recipe.first.tolist() == [0, 1, 1, 3]
    assert recipe.target.tolist() == [0, 0, 1]
    assert recipe.weight.tolist() == [1, 2, 3]


@pytest.mark.parametrize("device", ["cpu", "torch"])
@pytest.mark.parametrize("rows", [(0, 32), (32, 75), (64, 75), (0, 75)], ids=str)
def test_strips_are_parts_of_the_whole(rows, device):
    frames, factor, motion = counts(), gain(), random_motion(size=20)
    whole = correct.move_and_add(frames, factor, motion, everything())
    if device == "cpu":
        part = correct.move_and_add(frames, factor, motion, everything(), rows=rows)
        assert np.array_equal(part, whole[:, rows[0] : rows[1]])
    else:
        part = on_device(frames, factor, motion, rows)
        assert np.allclose(part, whole[:, rows[0] : rows[1]], atol=1e-3)


def on_device(
    frames: np.ndarray, factor: np.ndarray, motion: np.ndarray, rows: tuple[int, int]
) -> np.ndarray:
    """What `move_and_add` does for a GPU, by torch on the CPU."""
    steps = np.rint(motion * 512).astype(np.int64)
    fill = correct.background(frames, factor)
    arguments = (frames, factor, fill, steps // 512, steps % 512, everything(len(frames)))
    return correct._move_on_device(*arguments, (rows, (0, frames.shape[2])), "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_bodies_move_alike(dtype):
    frames, factor = counts(dtype), gain()
    for size in (0.4, 60.0):
        motion = random_motion(size=size)
        compiled = correct.move_and_add(frames, factor, motion, everything())
        torchs = on_device(frames, factor, motion, (0, SHAPE[0]))
        assert np.abs(torchs - compiled).max() < 1e-5 * compiled.max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_moves_as_a_cpu():
    frames, factor, motion = counts(), gain(), random_motion(size=10)
    compiled = correct.move_and_add(frames, factor, motion, everything())
    fast = correct.move_and_add(frames, factor, motion, everything(), device="cuda")
    assert np.abs(fast - compiled).max() < 1e-5 * compiled.max()


def test_beyond_an_edge_stands_the_mean_of_what_is_near():
    """A field that gets brighter from left to right: what is uncovered at the left stays dark."""
    shape = (256, 320)
    expected = np.linspace(4, 20, shape[1])[None] * np.ones((shape[0], 1))
    frames = np.random.default_rng(1).poisson(expected, (3, *shape)).astype(np.uint8)
    motion = no_motion(shape, 3) + np.array([-20.0, 9.0])
    found = correct.move_and_add(frames, np.ones(shape, np.float32), motion, everything(3))[0] / 3
    assert np.isfinite(found).all()
    assert found[:240, :16].mean() == pytest.approx(expected[0, :32].mean(), rel=0.03)
    assert found[:240, :16].std() < 0.2
    # At the lower edge each block is filled with its own surroundings' mean.
    below = found[-5:].mean(axis=0)
    assert np.abs(below[40:] - expected[0, 20:-20]).max() < 2.5


@pytest.mark.parametrize("shape", [(40, 40), (417, 300), (449, 449), (450, 460), (130, 700)], ids=str)
def test_every_size_has_a_background(shape):
    frames = counts(shape=shape, n=2)
    found = correct.background(frames, np.full(shape, 2, np.float32))
    y, x = correct.block_centres(shape)
    assert found.shape == (2, len(y), len(x))
    assert found.dtype == np.float32
    assert np.abs(found - 12).max() < 3.5
    moved = correct.move_and_add(frames, gain(shape), random_motion(shape, 2), everything(2))
    assert np.isfinite(moved).all()


def test_threads_change_nothing():
    shape = (300, 200)
    frames, factor, motion = counts(shape=shape), gain(shape), random_motion(shape)
    before, results = torch.get_num_threads(), []
    dose = correct.factor_dose_weights(
        N, pixel_size=1.5, dose_per_frame=2.0, pre_exposure=0.0, voltage_kV=300.0
    )
    recipe = correct.make_recipe(dose.by_frame)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums = correct.move_and_add(frames, factor, motion, recipe)
            image = correct.weigh_by_dose(sums, dose, pixel_size=1.5, new_shape=(150, 100))
            shrunk = correct.shrink_frames(frames, factor, 2, group_frames(N, 1))
            results.append((sums.tobytes(), image.tobytes(), shrunk.tobytes()))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


def test_centres_of_blocks_are_those_of_their_pixels():
    y, x = correct.block_centres((75, 96))
    assert y.tolist() == [15.5, 47.5, 69.0]
    assert x.tolist() == [15.5, 47.5, 79.5]


# Dose


@pytest.mark.parametrize(
    ("n", "dose", "before", "voltage"),
    [(50, 1.0, 0.0, 300.0), (24, 1.5, 10.0, 200.0), (8, 10.0, 0.0, 300.0), (3, 0.05, 0.0, 100.0)],
)
def test_factors_give_the_dose_weights(n, dose, before, voltage):
    settings = {"dose_per_frame": dose, "pre_exposure": before, "voltage_kV": voltage}
    found = correct.factor_dose_weights(n, pixel_size=0.8, **settings)
    assert found.by_frame.shape[1] == n
    assert len(found.by_frame) <= 8
    # Also between the entries of the table, up to the corner of the spectrum.
    k = torch.linspace(0.002, np.sqrt(0.5) / 0.8, 1999, dtype=torch.float64)
    weights = dose_weights(k, n_frames=n, **settings).numpy()
    entries = np.arange(found.by_frequency.shape[1]) * found.step
    between = np.stack([np.interp(k, entries, factor) for factor in found.by_frequency])
    assert np.abs(found.by_frame.T @ between - weights).max() < 2e-3 * weights.max()


@pytest.mark.parametrize("shape", [(64, 80), (63, 81)], ids=str)
def test_weighing_by_dose_is_the_sum_of_filtered_frames(shape):
    n, pixel = 12, 1.3
    settings = {"dose_per_frame": 3.0, "pre_exposure": 2.0, "voltage_kV": 300.0}
    frames = counts("f4", shape, n)
    dose = correct.factor_dose_weights(n, pixel_size=pixel, **settings)
    sums = np.einsum("rn,nyx->ryx", dose.by_frame, frames).astype(np.float32)
    found = correct.weigh_by_dose(sums, dose, pixel_size=pixel, new_shape=shape)
    k = np.hypot(np.fft.fftfreq(shape[0], pixel)[:, None], np.fft.rfftfreq(shape[1], pixel))
    k[0, 0] = 1e-9
    weights = dose_weights(
        torch.from_numpy(k), n_frames=n, dose_per_frame=3.0, pre_exposure=2.0, voltage_kV=300.0
    ).numpy()
    expected = np.fft.irfft2((weights * np.fft.rfft2(frames)).sum(axis=0), s=shape)
    assert np.abs(found - expected).max() < 0.01 * expected.std()
    # The mean is that of frames of equal weight, divided by their root.
    assert found.mean() == pytest.approx(frames.mean() * np.sqrt(n), rel=2e-3)


def test_noise_stays_white_after_weighing():
    n, shape = 10, (128, 128)
    noise = np.random.default_rng(5).normal(0, 1, (n, *shape)).astype(np.float32)
    dose = correct.factor_dose_weights(
        n, pixel_size=1.0, dose_per_frame=4.0, pre_exposure=0.0, voltage_kV=300.0
    )
    sums = np.einsum("rn,nyx->ryx", dose.by_frame, noise).astype(np.float32)
    power = np.abs(np.fft.rfft2(correct.weigh_by_dose(sums, dose, pixel_size=1.0, new_shape=shape))) ** 2
    k = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.rfftfreq(128))
    for low, high in [(0.05, 0.2), (0.2, 0.35), (0.35, 0.5)]:
        assert power[(k > low) & (k < high)].mean() / 128**2 == pytest.approx(1, abs=0.06)


# Sizes


@pytest.mark.parametrize(("shape", "new"), [((64, 80), (32, 40)), ((75, 100), (50, 66))], ids=str)
def test_binning_keeps_mean_waves_and_first_pixel(shape, new):
    y, x = np.mgrid[: shape[0], : shape[1]]
    image = (7 + np.cos(2 * np.pi * (3 * x / shape[1] + 2 * y / shape[0]) + 0.4)).astype(np.float32)
    found = correct.bin_image(image, new)
    y, x = np.mgrid[: new[0], : new[1]]
    assert found.shape == new
    assert np.allclose(found, 7 + np.cos(2 * np.pi * (3 * x / new[1] + 2 * y / new[0]) + 0.4), atol=1e-4)
    noise = np.random.default_rng(1).normal(3, 1, shape).astype(np.float32)
    assert correct.bin_image(noise, new).mean() == pytest.approx(noise.mean(), rel=1e-5)
    assert correct.bin_image(image, shape) is image


def test_binned_shapes_are_even():
    assert binned_shape((101, 75), 1.0) == ((101, 75), 1.0)
    assert binned_shape((4092, 5760), 2.0) == ((2046, 2880), 2.0)
    shape, factor = binned_shape((321, 333), 1.5)
    assert shape == (214, 222)
    assert factor == 333 / 222


@pytest.mark.parametrize("shape", [(4092, 5760), (5760, 4092), (8184, 11520), (4096, 4096)], ids=str)
def test_binned_pixels_are_square(shape):
    """Rounded each by itself, the sides of pixels of 4092 x 5760 at 1.3 differ by 0.02 %."""
    for binning in (1.1, 1.3, 1.37, 1.5, 2.6, 3.3):
        new, factor = binned_shape(shape, binning)
        assert new[0] % 2 == new[1] % 2 == 0
        assert factor == shape[1] / new[1] == pytest.approx(binning, rel=0.01)
        assert shape[0] / new[0] == pytest.approx(factor, rel=1e-4)


def test_a_field_that_cannot_have_square_pixels_is_rounded():
    assert binned_shape((161, 203), 1.7)[0] == (94, 120)
    assert binned_shape((10, 30), 1.01)[0] == (10, 30)
    assert binned_shape((20, 21), 16)[0] == (2, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_shrunk_frames_are_sums_of_blocks(dtype, factor):
    frames, multiplier = counts(dtype), gain()
    groups = [range(1), range(1, 4)]
    found = correct.shrink_frames(frames, multiplier, factor, groups)
    h, w = (side // factor for side in SHAPE)
    corrected = (frames.astype(np.float64) * multiplier)[:, : h * factor, : w * factor]
    each = corrected.reshape(N, h, factor, w, factor).sum(axis=(2, 4))
    expected = np.stack([each[0], each[1:].sum(axis=0)])
    assert found.dtype == np.float32
    assert np.allclose(found, expected, rtol=1e-5)


def test_groups_of_frames():
    assert group_frames(5, 1) == [range(i, i + 1) for i in range(5)]
    assert group_frames(8, 3) == [range(2), range(2, 5), range(5, 8)]
    assert [len(group) for group in group_frames(11, 2)] == [2, 2, 2, 2, 3]
    # Never fewer than three, and each frame in one.
    for n in range(3, 40):
        for size in (1, 2, 5, 100):
            groups = group_frames(n, size)
            assert len(groups) >= 3
            assert [frame for group in groups for frame in group] == list(range(n))
            lengths = [len(group) for group in groups]
            assert lengths == sorted(lengths)
            assert lengths[-1] - lengths[0] <= 1


@pytest.mark.parametrize(("n", "size"), [(40, 5), (60, 10), (24, 4), (50, 2)])
@pytest.mark.parametrize("decay", [3, 5, 8, 12, 20, 30])
def test_a_drift_that_dies_away_is_followed_between_groups(n, size, decay):
    """A third and more better, at the first frame and overall, than by a natural or a monotone curve."""
    groups = group_frames(n, size)
    middles = np.array([(group.start + group.stop - 1) / 2 for group in groups])
    truth = 30 * (1 - np.exp(-np.arange(n) / decay))
    seen = np.array([truth[group].mean() for group in groups])
    error = _between_groups(seen[:, None], groups, n)[:, 0] - truth
    inside = np.clip(np.arange(n), middles[0], middles[-1])
    for curve in (CubicSpline(middles, seen, bc_type="natural"), PchipInterpolator(middles, seen)):
        other = curve(inside) + (np.arange(n) - inside) * curve.derivative()(inside) - truth
        assert abs(error[0]) < 0.9 * abs(other[0])
        assert np.sqrt(np.mean(error**2)) < np.sqrt(np.mean(other**2))
    if (size, decay) == (5, 8):
        assert abs(error[0]) < 0.5


def test_three_groups_are_enough_for_a_curve():
    groups = group_frames(15, 5)
    parabola = np.square(np.array([2.0, 7.0, 12.0]) - 5)
    found = _between_groups(parabola, groups, 15)
    assert np.allclose(found[2:13], np.square(np.arange(2, 13) - 5.0))


def test_values_between_groups_follow_a_line_and_errors_stay_positive():
    groups = group_frames(11, 2)
    middles = np.array([(group.start + group.stop - 1) / 2 for group in groups])
    line = middles[:, None] * [2.0, -1.0]
    assert np.allclose(_between_groups(line, groups, 11), np.arange(11)[:, None] * [2.0, -1.0])
    unknown = _between_groups(np.full((5, 2), np.nan), groups, 11)
    assert unknown.shape == (11, 2)
    assert np.isnan(unknown).all()


# Motion


def make_tracks(**changes) -> MotionTracks:
    settings = {
        "movie": "a.tiff",
        "shape": (200, 300),
        "n_frames": 3,
        "first_frame": 1,
        "last_frame": 3,
        "pixel_size": 1.0,
        "dose_per_frame": 1.0,
        "pre_exposure": 0.0,
        "voltage_kV": 300.0,
        "global_shift": np.array([[0, 0], [3.0, 1], [4, -2]]),
        "global_error": np.zeros(3),
    }
    return MotionTracks(**{**settings, **changes})


def test_blocks_move_as_the_tracks_say():
    rigid = block_displacements(make_tracks())
    assert rigid.shape == (3, 7, 10, 2)
    assert np.allclose(rigid[1], [-3, -1])
    grid = np.random.default_rng(1).normal(size=(3, 9, 9, 2))
    tracks = make_tracks(local_grid=grid, local_error=np.ones((3, 9, 9)))
    y, x = correct.block_centres((200, 300))
    found = block_displacements(tracks)
    for frame in range(3):
        expected = -tracks.shift_at(*np.meshgrid(x, y), frame)
        assert np.allclose(found[frame], expected)


def test_a_polynomial_is_found_exactly():
    shape, n = (200, 300), 7
    truth = np.random.default_rng(1).normal(size=(2, 18)) / np.tile([1.0, 10.0, 100.0], 6)
    y, x = np.linspace(0, shape[0] - 1, 9), np.linspace(0, shape[1] - 1, 9)
    terms = polynomial_terms(x, y[:, None], np.arange(n)[:, None, None], shape)
    assert np.allclose(fit_polynomial(terms @ truth.T, shape), truth, atol=1e-8)


def test_a_polynomial_of_few_frames_fits_them():
    """Three frames cannot tell three powers of time apart, but are described all the same."""
    shape, rng = (200, 300), np.random.default_rng(1)
    y, x = np.linspace(0, shape[0] - 1, 9), np.linspace(0, shape[1] - 1, 9)
    terms = polynomial_terms(x, y[:, None], np.arange(3)[:, None, None], shape)
    shift = terms @ (rng.normal(size=(2, 18)) / 10).T
    found = fit_polynomial(shift, shape)
    assert np.isfinite(found).all()
    assert np.allclose(terms @ found.T, shift, atol=1e-8)


# Spectrum for the CTF


def spectrum_of(image: np.ndarray, pixel_size: float, groups: int = 1) -> tuple[np.ndarray, float]:
    side = spectrum.tile_side(pixel_size, image.shape)
    total = np.zeros((side, side // 2 + 1))
    spectrum.add_spectra(total, np.repeat(image[None].astype(np.float32), groups, axis=0))
    return spectrum.amplitude_spectrum(total, pixel_size)


@pytest.mark.parametrize(
    ("pixel_size", "shape"),
    [
        (0.7, (1100, 1100)),
        (1.06, (700, 760)),
        (1.4, (512, 600)),
        (2.0, (520, 520)),
        (2.0, (256, 320)),
        (1.0, (301, 333)),
        (3.1, (161, 203)),
    ],
    ids=str,
)
@pytest.mark.parametrize("wave", [(0.1, 0.0), (0.0, 0.08), (0.06, -0.09), (-0.12, -0.03)], ids=str)
def test_a_wave_has_its_peaks_where_its_frequency_says(pixel_size, shape, wave):
    y, x = np.mgrid[: shape[0], : shape[1]] * pixel_size
    image = 100 + np.cos(2 * np.pi * (wave[0] * x + wave[1] * y) + 1)
    found, pixel = spectrum_of(image, pixel_size)
    assert found.shape == (spectrum.BOX, spectrum.BOX)
    assert found.dtype == np.float32
    if pixel_size < 1.4:
        assert pixel == pytest.approx(1.4, rel=0.01)
    else:
        assert pixel == pixel_size
    step = 1 / (spectrum.BOX * pixel)
    strongest = np.argsort(found.ravel())[-60:]
    rows, columns = np.unravel_index(strongest, found.shape)
    height = found.ravel()[strongest]
    for sign in (1, -1):
        near = sign * ((columns - 256) * wave[0] + (rows - 256) * wave[1]) > 0
        fx = ((columns - 256) * height)[near].sum() / height[near].sum() * step
        fy = ((rows - 256) * height)[near].sum() / height[near].sum() * step
        # To half a step of the smallest tiles.
        tolerance = 0.5 / (spectrum.tile_side(pixel_size, shape) * pixel_size)
        assert [fx, fy] == pytest.approx([sign * wave[0], sign * wave[1]], abs=tolerance)


@pytest.mark.parametrize(
    ("pixel_size", "shape"), [(1.4, (1100, 1030)), (0.7, (1100, 1030)), (2.0, (301, 333))]
)
def test_the_spectrum_is_symmetric(pixel_size, shape):
    found, _ = spectrum_of(np.random.default_rng(1).normal(size=shape), pixel_size)
    assert np.isfinite(found).all()
    if pixel_size == 1.4:
        assert np.allclose(found[1:, 1:], found[1:, 1:][::-1, ::-1], rtol=1e-4)
        return
    # Where it was resampled, what is beyond the edges comes round: the frequencies used lie well inside.
    found = found[40:-39, 40:-39]
    assert np.abs(found - found[::-1, ::-1]).max() < 0.1 * found.mean()


def test_the_whole_spectrum_is_the_shifted_transform():
    side = 512
    tile = np.random.default_rng(1).normal(size=(side, side))
    total = np.abs(np.fft.rfft2(tile)) ** 2
    found, pixel = spectrum.amplitude_spectrum(total, 1.5)
    assert pixel == 1.5
    assert np.allclose(found, np.abs(np.fft.fftshift(np.fft.fft2(tile))), rtol=1e-4)


def test_groups_are_added_and_the_tile_is_in_the_middle():
    image = np.random.default_rng(1).normal(size=(512, 1100))
    middle, _ = spectrum_of(image[:, 294:806], 1.4)
    again, _ = spectrum_of(image[:, 294:806], 1.4, groups=4)
    assert np.allclose(again, 2 * middle, rtol=1e-4)
    whole, _ = spectrum_of(image, 1.4)
    assert np.allclose(whole, middle, rtol=1e-5)


@pytest.mark.parametrize("length", [320, 676, 1408, 1409, 4092, 4096, 11520])
def test_parts_cover_an_axis_and_hold_a_tile(length):
    for least in (64, 512, 676):
        parts = _parts(length, 32, min(least, length))
        assert parts[0][0] == 0 and parts[-1][1] == length
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(parts))
        assert all(start % 32 == 0 and end - start >= min(least, length) for start, end in parts)


def test_a_field_of_little_more_than_two_tiles_is_summed():
    """Tiles of 676 px at 1.06 Å, which whole blocks do not divide: no part of 1408 rows is lower than one."""
    shape, n = (1408, 680), 3
    frames = Frames(counts(shape=shape, n=n), np.ones(shape, np.float32), np.zeros((0, 2), np.int32), 0)
    tracks = make_tracks(shape=shape, pixel_size=1.06, global_shift=np.zeros((n, 2)))
    assert spectrum.tile_side(1.06, shape) == 676
    found = sum_frames(frames, tracks, MotionStep(movies=Path("movies.star")), "cpu")
    assert np.array_equal(found.even, frames.counts[0].astype(np.float32) + frames.counts[2])
    assert np.array_equal(found.odd, frames.counts[1].astype(np.float32))
    assert found.weighted is not None
    assert np.isfinite(found.weighted).all()
    assert found.spectrum.shape == (512, 512)
    assert np.isfinite(found.spectrum).all()
