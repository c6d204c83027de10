"""Gain references: RELION's turns and flips, sizes, dead pixels, and the orientation that fits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from halfmap.errors import FileFormatError, ParameterError, ShapeError
from halfmap.io import gain as module
from halfmap.io.gain import is_divided, match_gain, orient_gain, rank_orientations, read_gain
from halfmap.io.mrc import write_mrc
from halfmap.io.tiff import write_tiff_movie


def some(shape: tuple[int, int] = (6, 8), spread: float = 0.1) -> np.ndarray:
    return np.random.default_rng(3).normal(1, spread, shape).astype(np.float32)


def turned_plainly(gain: np.ndarray, rotation: int, flip: int) -> np.ndarray:
    """Pixel by pixel: a quarter turn takes (y, x) to (x, last - y)."""
    for _ in range(rotation):
        h, w = gain.shape
        out = np.empty((w, h), gain.dtype)
        for y in range(h):
            for x in range(w):
                out[x, h - 1 - y] = gain[y, x]
        gain = out
    h, w = gain.shape
    out = np.empty_like(gain)
    for y in range(h):
        for x in range(w):
            out[h - 1 - y if flip == 1 else y, w - 1 - x if flip == 2 else x] = gain[y, x]
    return out


@pytest.mark.parametrize("flip", [0, 1, 2])
@pytest.mark.parametrize("rotation", [0, 1, 2, 3])
def test_turned_first_then_flipped(tmp_path: Path, rotation: int, flip: int) -> None:
    write_mrc(tmp_path / "gain.mrc", some(), pixel_size=1)
    gain = read_gain(tmp_path / "gain.mrc", rotation=rotation, flip=flip)
    assert gain.dtype == np.float32
    assert np.array_equal(gain, turned_plainly(some(), rotation, flip))


def test_tiff_is_in_mrc_order_and_the_eer_cameras_own_file_is_not(tmp_path: Path) -> None:
    write_tiff_movie(tmp_path / "gain.tif", some()[None])
    assert np.array_equal(read_gain(tmp_path / "gain.tif"), some())
    tifffile.imwrite(tmp_path / "camera.gain", some(), photometric="minisblack")
    assert np.array_equal(read_gain(tmp_path / "camera.gain"), some())


@pytest.mark.parametrize(
    ("gain", "movie", "divided"),
    [
        ("a.gain", "a.eer", False),
        ("a.mrc", "a.eer", True),
        ("a.tif", "b.EER", True),
        ("a.mrc", "a.tif", False),
    ],
)
def test_which_references_are_divided(gain: str, movie: str, divided: bool) -> None:
    assert is_divided(gain, movie) is divided


def test_a_divided_reference_is_inverted_and_dead_pixels_stay_dead(tmp_path: Path) -> None:
    counts = np.array([[2.0, 4.0], [0.0, 6.0]], np.float32)
    write_mrc(tmp_path / "gain.mrc", counts, pixel_size=1)
    assert read_gain(tmp_path / "gain.mrc", divided=True).tolist() == [
        [2.0, 1.0],
        [0.0, pytest.approx(2 / 3)],
    ]


def test_super_resolution_frames_take_the_physical_pixels_value() -> None:
    gain = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    expected = [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert match_gain(gain, (4, 4)).tolist() == expected


def test_physical_frames_take_the_mean_of_four_and_are_dead_where_one_is() -> None:
    gain = np.array([[1.0, 2.0, 0.0, 1.0], [3.0, 4.0, 1.0, 1.0]], np.float32)
    assert match_gain(gain, (1, 2)).tolist() == [[2.5, 0.0]]


def test_a_reference_of_another_shape_says_whether_a_turn_helps(tmp_path: Path) -> None:
    write_mrc(tmp_path / "gain.mrc", some(), pixel_size=1)
    with pytest.raises(
        ShapeError, match=r"gain\.mrc.* 6 x 8 px .*movie 8 x 6 px; turned by a quarter it fits"
    ):
        read_gain(tmp_path / "gain.mrc", shape=(8, 6))
    with pytest.raises(ShapeError, match=r"6 x 8 px .*movie 9 x 8 px; it belongs to another camera"):
        read_gain(tmp_path / "gain.mrc", shape=(9, 8))
    assert read_gain(tmp_path / "gain.mrc", shape=(8, 6), rotation=1).shape == (8, 6)
    assert read_gain(tmp_path / "gain.mrc", shape=(16, 12), rotation=3).shape == (16, 12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0, np.nan]], "holds 1 NaN or infinite"),
        ([[np.inf, np.inf]], "holds 2 NaN or infinite"),
        ([[0.0, -1.0]], "no value above 0"),
    ],
)
def test_references_that_cannot_be(tmp_path: Path, values: list, message: str) -> None:
    write_mrc(tmp_path / "gain.mrc", np.array(values, np.float32), pixel_size=1)
    with pytest.raises(FileFormatError, match=message):
        read_gain(tmp_path / "gain.mrc")


def test_files_that_are_no_reference(tmp_path: Path) -> None:
    write_mrc(tmp_path / "movie.mrcs", np.ones((3, 4, 4), np.float32), pixel_size=1)
    with pytest.raises(FileFormatError, match="holds 3 images where one belongs"):
        read_gain(tmp_path / "movie.mrcs")
    with pytest.raises(FileFormatError, match="Digital Micrograph"):
        read_gain(tmp_path / "gain.dm4")
    with pytest.raises(ParameterError, match="gain rotation of 4 quarter turns"):
        orient_gain(some(), rotation=4)
    with pytest.raises(ParameterError, match="no gain flip 3"):
        orient_gain(some(), flip=3)


@pytest.mark.parametrize("shape", [(192, 192), (160, 224)])
@pytest.mark.parametrize("rotation", [0, 1, 2, 3])
@pytest.mark.parametrize("flip", [0, 1])
def test_the_orientation_that_fits_comes_first(shape: tuple[int, int], rotation: int, flip: int) -> None:
    # 100 electrons a pixel in all, a gain of 5 % spread, illumination, 1 % dead and some hot pixels.
    rng = np.random.default_rng(rotation + 4 * flip)
    gain = some(shape, 0.05)
    gain[rng.random(shape) < 0.01] = 0
    right = orient_gain(gain, rotation=rotation, flip=flip)
    dose = 100 * np.linspace(0.5, 1.5, right.shape[1])
    frame = rng.poisson(np.divide(dose, right, out=np.zeros_like(right), where=right > 0)).astype(np.float32)
    frame[rng.random(frame.shape) < 1e-4] = 1e5
    ranked = rank_orientations(gain, frame)
    # Half a turn and a flip in y are a flip in x, which is the plainer name.
    plainest = (0, 2) if (rotation, flip) == (2, 1) else (rotation, flip)
    assert (ranked[0].rotation, ranked[0].flip) == plainest
    # Signal 5 %, noise 10 %: the correlation is 0.05 / hypot(0.05, 0.1) = 0.45; wrong ones scatter by 1 / n.
    assert ranked[0].correlation == pytest.approx(0.45, abs=0.08)
    others = [fit for fit in ranked if fit.correlation < ranked[0].correlation - 1e-4]
    assert max(abs(fit.correlation) for fit in others) < 5 / np.sqrt(gain.size)
    assert len(ranked) == (12 if shape[0] == shape[1] else 6)


def test_ranking_knows_super_resolution_and_files(tmp_path: Path) -> None:
    gain = some((96, 128), 0.05)
    write_mrc(tmp_path / "gain.mrc", gain, pixel_size=1)
    right = match_gain(np.ascontiguousarray(orient_gain(gain, rotation=3, flip=2)), (256, 192))
    frame = np.random.default_rng(0).poisson(50 / right)
    best = rank_orientations(tmp_path / "gain.mrc", frame)[0]
    # A turn by three quarters and a flip in x is a turn by one and a flip in y.
    assert (best.rotation, best.flip) == (1, 1)
    with pytest.raises(ShapeError, match="96 x 128 px"):
        rank_orientations(tmp_path / "gain.mrc", np.ones((100, 100)))


def frame_of(gain: np.ndarray, dose: float, seed: int = 0) -> np.ndarray:
    """Sum of raw frames of so many electrons a pixel."""
    rate = np.divide(dose, gain, out=np.zeros_like(gain), where=gain > 0)
    return np.random.default_rng(seed).poisson(rate).astype(np.float32)


def striped(shape: tuple[int, int], spread: float = 0.05) -> np.ndarray:
    """Columns that differ three times as much as pixels do."""
    columns = np.random.default_rng(4).normal(0, 3 * spread, shape[1])
    return (some(shape, spread) + columns).clip(0.3, 3).astype(np.float32)


@pytest.mark.parametrize("dose", [100, 0.5])
def test_the_share_is_1_of_raw_frames_0_of_corrected_ones_and_negative_of_the_reciprocal(dose: float) -> None:
    gain = some((320, 320))
    raw = rank_orientations(gain, frame_of(gain, dose))[0]
    assert (raw.rotation, raw.flip) == (0, 0)
    # Counts that are rare are taken for outliers, which takes a part of the pattern with them.
    assert raw.share == pytest.approx(1, abs=0.1 if dose > 1 else 0.35)
    corrected = rank_orientations(gain, frame_of(np.ones_like(gain), dose))[0]
    assert abs(corrected.share) < 5 * corrected.error
    reciprocal = rank_orientations(1 / gain, frame_of(gain, dose))[0]
    assert reciprocal.share == pytest.approx(-raw.share, abs=0.1)
    assert (reciprocal.rotation, reciprocal.flip) == (0, 0)


@pytest.mark.parametrize("make", [some, striped])
def test_the_error_is_what_chance_gives(make) -> None:
    shape = (128, 160)
    gain = make(shape)
    shares, errors = [], []
    for seed in range(40):
        # Another camera's pattern of the same kind, so that its stripes lie elsewhere.
        other = np.roll(gain, (17 + 3 * seed, 5 + 3 * seed), axis=(0, 1))
        fit = next(
            fit for fit in rank_orientations(gain, frame_of(other, 20, seed)) if fit.rotation == fit.flip == 0
        )
        shares.append(fit.share)
        errors.append(fit.error)
    # A standard deviation of 40 numbers is known to a ninth.
    assert 0.6 < np.std(shares) / np.mean(errors) < 1.4


def test_only_the_middle_of_large_frames_is_compared_whichever_way_they_are_turned(monkeypatch) -> None:
    monkeypatch.setattr(module, "WINDOW_px", 128)
    gain = some((201, 160), 0.1)
    for rotation, flip in ((0, 0), (1, 0), (2, 0), (1, 1), (0, 2)):
        right = np.ascontiguousarray(orient_gain(gain, rotation=rotation, flip=flip))
        frame = frame_of(right, 50)
        # Beyond the middle there is nothing that fits.
        frame[:10], frame[-10:] = frame[-10:].copy(), frame[:10].copy()
        best = rank_orientations(gain, frame)[0]
        assert np.array_equal(orient_gain(gain, rotation=best.rotation, flip=best.flip), right)
        assert best.share > 0.9


def test_a_flat_reference_and_flat_frames_tell_nothing() -> None:
    shape = (64, 64)
    for gain, frame in ((np.ones(shape), frame_of(some(shape), 9)), (some(shape), np.zeros(shape))):
        assert {(fit.share, fit.error) for fit in rank_orientations(gain, frame)} == {(0.0, np.inf)}
