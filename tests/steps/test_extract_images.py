"""Cutting, scaling and normalising particle images against plain references."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch

from halfmap.errors import ParameterError
from halfmap.ops.ctf import ctf
from halfmap.ops.fourier import irfft2, resample, rfft2
from halfmap.steps.extract._kernels import cut
from halfmap.steps.extract.box import background_diameter, choose_box, needed_extent
from halfmap.steps.extract.images import PhaseFlip, Recipe, circle_of, cut_particles

PLAIN = {"circle": 0.7, "background": "none", "invert": False, "mirror": True}


def _recipe(box: int, scaled: int | None = None, **options) -> Recipe:
    return Recipe(box=box, scaled_box=scaled or box, **(PLAIN | options))


def _images(image, x, y, recipe, **options):
    parts = list(cut_particles(image, np.array(x), np.array(y), recipe, **options))
    return np.concatenate([images for images, _ in parts]), np.concatenate([found for _, found in parts])


@pytest.fixture
def image():
    return np.random.default_rng(0).normal(30, 5, (90, 120)).astype(np.float32)


@pytest.mark.parametrize("mode", ["reflect", "edge"])
def test_boxes_are_those_of_a_padded_micrograph(image, mode):
    x, y = np.array([40, 0, 119, 60, 3]), np.array([30, 0, 89, 88, 45])
    # What is mirrored begins four pixels inside.
    inside = 4 if mode == "reflect" else 0
    padded = np.pad(image[inside : 90 - inside, inside : 120 - inside], 20 + inside, mode=mode)
    boxes, _ = _images(image, x, y, _recipe(40, mirror=mode == "reflect"))
    for box, left, top in zip(boxes, x, y, strict=True):
        np.testing.assert_array_equal(box, padded[top : top + 40, left : left + 40])


def test_threads_change_nothing(image):
    rng = np.random.default_rng(1)
    x, y = rng.integers(20, 70, (2, 50))
    recipe = _recipe(32, 24, background="ramp", invert=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(_images(image, x, y, recipe))
    finally:
        torch.set_num_threads(before)
    for images, statistics in found[1:]:
        np.testing.assert_array_equal(images, found[0][0])
        np.testing.assert_array_equal(statistics, found[0][1])


@pytest.mark.parametrize("mirror", [True, False])
def test_boxes_need_only_the_rows_that_were_asked_for(image, monkeypatch, mirror):
    x, y = np.random.default_rng(2).integers(0, 90, (2, 60))
    y = np.sort(np.append(y[:-2], [0, 89]))
    recipe = _recipe(40, mirror=mirror)
    expected, _ = _images(image, x, y, recipe)
    monkeypatch.setattr("halfmap.steps.extract.images._BATCH_BYTES", 1)
    arrived, asked = np.full_like(image, np.nan), []

    def ready(rows: int) -> None:
        asked.append(rows)
        arrived[:rows] = image[:rows]

    np.testing.assert_array_equal(_images(arrived, x, y, recipe, ready=ready)[0], expected)
    assert asked[0] < 40


@pytest.mark.parametrize("background", ["ramp", "mean"])
def test_normalised_images_are_those_of_least_squares(image, background):
    yy, xx = np.mgrid[:90, :120]
    image = (image + 0.3 * xx - 0.2 * yy).astype(np.float32)
    images, statistics = _images(image, [50, 70], [40, 45], _recipe(40, background=background, invert=True))
    raw, _ = _images(image, [50, 70], [40, 45], _recipe(40))
    grid = np.arange(40) - 20
    inside = grid[:, None] ** 2 + grid**2 <= 14**2
    y, x = np.nonzero(~inside)
    terms = np.stack([np.ones(len(x)), x, y] if background == "ramp" else [np.ones(len(x))], axis=1)
    all_y, all_x = np.mgrid[:40, :40]
    for number in range(2):
        box = raw[number].astype(np.float64)
        factors, *_ = np.linalg.lstsq(terms, box[~inside], rcond=None)
        plane = factors[0] + (factors[1] * all_x + factors[2] * all_y if background == "ramp" else 0)
        spread = np.sqrt(np.mean((box - plane)[~inside] ** 2))
        expected = -(box - plane) / spread
        np.testing.assert_allclose(images[number], expected, atol=2e-5)
        values = expected[inside]
        skewness = np.mean((values - values.mean()) ** 3) / values.std() ** 3
        found = [box[~inside].mean(), spread, values.mean(), values.std(), skewness]
        np.testing.assert_allclose(statistics[number], found, rtol=1e-4, atol=1e-5)


def test_images_are_only_turned_without_normalisation(image):
    plain, before = _images(image, [50], [40], _recipe(40))
    turned, after = _images(image, [50], [40], _recipe(40, invert=True))
    np.testing.assert_array_equal(turned, -plain)
    inside = circle_of(40, 28.0)
    values = np.concatenate([plain[0, y, inside.starts[y] : inside.stops[y]] for y in range(40)])
    np.testing.assert_allclose(before[0, 2:4], [values.mean(), values.std()], rtol=1e-5)
    np.testing.assert_allclose(after[0, 2:], before[0, 2:] * (-1, 1, -1), rtol=1e-4)


def test_a_blank_image_stays_as_it_is():
    images, statistics = _images(np.full((50, 50), 7, np.float32), [25], [25], _recipe(20, background="ramp"))
    assert statistics[0, 1] == 0
    assert np.isfinite(images).all()


@pytest.mark.parametrize("scaled", [40, 36, 16])
def test_scaling_crops_the_transform(image, scaled):
    images, _ = _images(image, [50, 61], [40, 44], _recipe(48, scaled))
    boxes, _ = _images(image, [50, 61], [40, 44], _recipe(48))
    expected = resample(torch.from_numpy(boxes), new_shape=(scaled, scaled)).numpy()
    difference = rfft2(torch.from_numpy(images - expected))
    # Where two waves become one their mean is kept, not their sum.
    difference[:, scaled // 2] = 0
    difference[..., -1] = 0
    assert difference.abs().max() < 1e-2
    np.testing.assert_allclose(images.mean(axis=(1, 2)), boxes.mean(axis=(1, 2)), rtol=1e-5)


def test_scaled_noise_has_no_excess_at_its_highest_frequency():
    noise = np.random.default_rng(4).normal(size=(400, 400)).astype(np.float32)
    x, y = np.random.default_rng(5).integers(32, 368, (2, 400))
    images, _ = _images(noise, x, y, _recipe(64, 32))
    power = np.mean(np.abs(np.fft.rfft2(images)) ** 2, axis=0)
    assert 0.3 < power[16, 4:12].mean() / power[4:12, 4:12].mean() < 1.1


def test_a_scaled_particle_stays_in_the_middle():
    yy, xx = np.mgrid[:200, :200]
    spot = np.exp(-((xx - 90) ** 2 + (yy - 110) ** 2) / 200).astype(np.float32)
    images, _ = _images(spot, [90], [110], _recipe(96, 32))
    y, x = np.mgrid[:32, :32]
    weight = images[0] / images[0].sum()
    np.testing.assert_allclose([(weight * x).sum(), (weight * y).sum()], 16, atol=1e-3)


def test_dust_becomes_noise_and_nothing_else_changes(image):
    dusty = image.copy()
    dusty[40, 55], dusty[35, 45] = 300, -300
    recipe = _recipe(40, background="ramp", white_dust=6.0, black_dust=6.0)
    cleaned, statistics = _images(dusty, [50], [40], recipe)
    clean, expected = _images(image, [50], [40], _recipe(40, background="ramp"))
    changed = np.abs(cleaned - clean)[0] > 0.2
    assert sorted(zip(*np.nonzero(changed), strict=True)) == [(15, 15), (20, 25)]
    assert np.abs(cleaned).max() < 6
    np.testing.assert_allclose(statistics[0, :2], expected[0, :2], rtol=0.02)
    kept, _ = _images(dusty, [50], [40], _recipe(40, background="ramp", white_dust=6.0))
    assert kept.min() < -6 < 6 > kept.max()


def test_phases_are_flipped_as_in_the_whole_micrograph():
    n, box = 512, 64
    rng = np.random.default_rng(2)
    optics = {"voltage_kV": 300.0, "cs_mm": 2.7, "amplitude_contrast": 0.1, "pixel_size": 2.0}
    defocus = {"defocus_u": 9_500.0, "defocus_v": 9_000.0, "defocus_angle": 20.0}
    image = rng.normal(size=(n, n)).astype(np.float32)
    whole = ctf((n, n), **optics, **defocus)
    flipped = irfft2(rfft2(torch.from_numpy(image)) * torch.where(whole < 0, -1.0, 1.0), shape=(n, n)).numpy()
    x, y = np.array([200, 256, 300]), np.array([256, 190, 310])
    correlation = {}
    for larger in (box, 4 * box):
        values = ctf((larger, larger), **optics, **defocus)
        flip = PhaseFlip(larger, lambda chosen, v=values: torch.where(v < 0, -1.0, 1.0))
        ours, _ = _images(image, x, y, _recipe(box), flip=flip)
        theirs, _ = _images(flipped, x, y, _recipe(box))
        correlation[larger] = min(
            np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(ours, theirs, strict=True)
        )
    # What comes from beyond even the larger box is lost.
    assert correlation[4 * box] > 0.95 > 0.7 > correlation[box]


def test_the_circle_is_round_and_in_the_middle():
    circle = circle_of(32, 20.0)
    grid = np.arange(32) - 16
    inside = grid[:, None] ** 2 + grid**2 <= 100
    x = np.arange(32)
    np.testing.assert_array_equal((x >= circle.starts[:, None]) & (x < circle.stops[:, None]), inside)


CHOICE = {
    "micrograph_pixel_size": 1.0,
    "diameter": 150.0,
    "box": None,
    "scaled_box": None,
    "pixel_size": None,
    "resolution": None,
    "defocus": 15_000.0,
    "voltage_kV": 300.0,
}


def _choose(**options):
    return choose_box(**(CHOICE | options))


def test_the_box_holds_the_particle_and_what_defocus_moves():
    # Wavelength 0.0197 Å times 15,000 Å over 3 Å to both sides.
    assert needed_extent(150, defocus=15e3, voltage_kV=300, resolution=3) == pytest.approx(346.9, abs=0.1)
    assert needed_extent(150, defocus=100, voltage_kV=300, resolution=3) == 225
    box = _choose()
    assert box.size == box.scaled == 360
    assert "1.50 µm" in box.reason
    assert _choose(resolution=8).size == 240
    assert _choose(defocus=100.0).reason.startswith("1.5 times")


def test_pixels_are_those_wanted_and_sizes_quick_to_transform():
    for wanted in (1.3, 2.0, 2.7, 4.0):
        box = _choose(pixel_size=wanted)
        assert abs(box.pixel_size / wanted - 1) < 0.005
        assert box.pixel_size == pytest.approx(box.size / box.scaled)
        finest = max(3.0, 2 * wanted)
        assert box.size >= needed_extent(150, defocus=15e3, voltage_kV=300, resolution=finest)
        assert box.size % 2 == 0 == box.scaled % 2
        assert box.scaled == 2 * scipy.fft.next_fast_len(box.scaled // 2, real=True)
    rng = np.random.default_rng(0)
    for _ in range(200):
        diameter, wanted, defocus = rng.uniform(60, 400), rng.uniform(1.3, 5), rng.uniform(5e3, 3e4)
        box = _choose(diameter=diameter, pixel_size=wanted, defocus=defocus)
        finest = max(3.0, 2 * wanted)
        needed = needed_extent(diameter, defocus=defocus, voltage_kV=300, resolution=finest)
        assert box.size * CHOICE["micrograph_pixel_size"] >= needed - 1e-6
    given = _choose(box=200, pixel_size=3.0)
    assert (given.size, given.scaled) == (200, 66)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"diameter": None}, "--diameter"),
        ({"box": 201}, "odd"),
        ({"box": 200, "scaled_box": 210}, "larger than the box"),
        ({"pixel_size": 0.5}, "finer"),
        ({"pixel_size": 2.0, "scaled_box": 100}, "twice"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ParameterError, match=message):
        _choose(**options)


def test_the_circle_leaves_background():
    box = _choose(box=200)
    assert background_diameter(box, 150, None) == 187.5
    assert background_diameter(box, 190, None) == 200
    assert background_diameter(box, None, None) == 150
    with pytest.raises(ParameterError, match="no background"):
        background_diameter(box, 150, 201)


def test_the_kernel_takes_boxes_of_the_micrographs_own_size():
    image = np.arange(36, dtype=np.float32).reshape(6, 6)
    boxes = np.empty((1, 6, 6), np.float32)
    cut(image, False, np.array([0]), np.array([0]), boxes)
    np.testing.assert_array_equal(boxes[0], image)
