"""Peaks of a map of scores, and micrographs as pickers want them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage

from halfmap.errors import FileFormatError
from halfmap.io.micrographs import MicrographItem, load, mended
from halfmap.io.mrc import write_mrc
from halfmap.steps.pick.candidates import (
    Candidates,
    find_peaks,
    read_candidates,
    read_searched,
    separate,
    write_candidates,
)


def _bumps(shape, places, height=None, width=3.0):
    y, x = np.mgrid[: shape[0], : shape[1]]
    heights = np.ones(len(places)) if height is None else height
    return sum(
        h * np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * width**2))
        for (px, py), h in zip(places, heights, strict=True)
    ).astype(np.float32)


def test_peaks_have_fractions_of_pixels_and_come_best_first():
    places = [(20.3, 30.8), (60.6, 15.2)]
    found = find_peaks(_bumps((80, 90), places, [1.0, 2.0], 6.0), pixel_size=2.0, distance=20.0)
    assert found.score[0] > found.score[1]
    # A parabola through three points of a Gaussian of width 6 errs by a fortieth of a pixel at the most.
    np.testing.assert_allclose(found.x[:2], [60.6, 20.3], atol=0.025)
    np.testing.assert_allclose(found.y[:2], [15.2, 30.8], atol=0.025)


def test_of_two_near_peaks_the_higher_one_is_kept():
    score = _bumps((64, 64), [(20, 32), (30, 32)], [1.0, 1.5])
    near = find_peaks(score, pixel_size=3.0, distance=31.0)
    far = find_peaks(score, pixel_size=3.0, distance=29.0)
    assert near.x[0] == pytest.approx(30, abs=0.1)
    assert not np.any(np.hypot(near.x - 20, near.y - 32) < 2)
    assert np.any(np.hypot(far.x - 20, far.y - 32) < 2)


def test_separation_agrees_with_comparing_all_pairs():
    rng = np.random.default_rng(4)
    x, y = rng.uniform(0, 50, (2, 400))
    kept: list[int] = []
    for i in range(400):
        if all(np.hypot(x[i] - x[j], y[i] - y[j]) >= 3.7 for j in kept):
            kept.append(i)
    assert separate(x, y, 3.7).tolist() == kept


def test_masks_and_edges_hold_no_peaks():
    score = _bumps((60, 60), [(5, 30), (30, 30), (45, 45)])
    mask = np.ones((60, 60), bool)
    mask[25:35, 25:35] = False
    found = find_peaks(score, pixel_size=2.0, distance=10.0, mask=mask, edge=20.0)
    assert found.x[0] == pytest.approx(45, abs=0.1)
    assert found.x.min() >= 9.5
    assert not np.any((found.x > 25.5) & (found.x < 33.5) & (found.y > 25.5) & (found.y < 33.5))


def test_a_slope_up_to_what_is_masked_has_no_peaks():
    score = _bumps((200, 200), [(100, 100), (40, 150)], [8.0, 1.0], 40.0)
    score += _bumps((200, 200), [(40, 40)], [1.0])
    y, x = np.mgrid[:200, :200]
    mask = np.hypot(x - 100, y - 100) > 30
    found = find_peaks(score, pixel_size=1.0, distance=10.0, mask=mask)
    assert len(found) == 1
    assert np.hypot(found.x[0] - 40, found.y[0] - 40) < 1
    # What is no number has no slope.
    found = find_peaks(np.where(mask, score, np.nan), pixel_size=1.0, distance=10.0)
    assert np.hypot(found.x[0] - 100, found.y[0] - 100) == pytest.approx(31, abs=1)


def test_candidates_are_read_back(tmp_path):
    rng = np.random.default_rng(0)
    x, y, score, angle = rng.normal(size=(4, 7)).astype(np.float32)
    searched = rng.random((9, 13)) < 0.5
    write_candidates(tmp_path / "a.npz", Candidates(x, y, score, angle=angle), score[:3], searched)
    again, null = read_candidates(tmp_path / "a.npz")
    np.testing.assert_array_equal(read_searched(tmp_path / "a.npz"), searched)
    np.testing.assert_array_equal(again.angle, angle)
    np.testing.assert_array_equal(null, score[:3])
    assert again.diameter is None


def test_coarse_pixels_keep_their_places(tmp_path):
    image = np.random.default_rng(1).normal(0, 0.05, (400, 444)).astype(np.float32) + _bumps(
        (400, 444), [(300, 120)], [-3], 9
    )
    image[40, 50] = 1e4
    write_mrc(tmp_path / "a.mrc", image, pixel_size=1.5)
    coarse = load(MicrographItem("a.mrc", "a", tmp_path / "a.mrc", 1.5), 6.0)
    y, x = scipy.ndimage.center_of_mass(coarse.values < coarse.values.min() / 2)
    assert coarse.pixel_size == pytest.approx(6.0, rel=0.01)
    assert x * coarse.scale[0] == pytest.approx(300, abs=1)
    assert y * coarse.scale[1] == pytest.approx(120, abs=1)
    # The hot pixel is as its neighbours.
    assert abs(coarse.values[10, 12] - np.median(coarse.values)) < 4


@pytest.mark.parametrize("value", [np.nan, 3.0])
def test_useless_images_are_refused(value):
    with pytest.raises(FileFormatError, match=r"numbers|blank"):
        mended(np.full((64, 64), value, np.float32), "a.mrc")


def test_images_smaller_than_particles_are_refused(tmp_path):
    write_mrc(
        tmp_path / "a.mrc", np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32), pixel_size=1.5
    )
    with pytest.raises(FileFormatError, match="too small"):
        load(MicrographItem("a.mrc", "a", tmp_path / "a.mrc", 1.5), 20.0)


def test_masks_of_any_size_are_used(tmp_path):
    rng = np.random.default_rng(0)
    write_mrc(tmp_path / "a.mrc", rng.normal(size=(240, 300)).astype(np.float32), pixel_size=2.0)
    mask = np.ones((24, 30), np.uint8)
    mask[:, :15] = 0
    write_mrc(tmp_path / "m.mrc", mask, pixel_size=20.0)
    item = MicrographItem("a.mrc", "a", tmp_path / "a.mrc", 2.0, tmp_path / "m.mrc")
    image = load(item, 4.0)
    assert not image.mask[:, :75].any()
    assert image.mask[:, 75:].all()
    assert not image.values[:, :75].any()
    # Every fourth pixel stands for its square: 144 lies in the mask, if some of its square does not.
    fine = np.ones((240, 300), np.uint8)
    fine[:, :146] = 0
    write_mrc(tmp_path / "m.mrc", fine, pixel_size=2.0)
    coarse = load(item, 8.0)
    assert not coarse.mask[:, :37].any()
    assert coarse.mask[:, 37:].all()
