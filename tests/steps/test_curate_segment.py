"""Segmentation of micrographs: carbon, contaminants, thick ice and empty places against drawn truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from halfmap.steps.curate.edge import find_edge
from halfmap.steps.curate.features import Features, block_means, reduce_image
from halfmap.steps.curate.micrograph import stretched
from halfmap.steps.curate.objects import background
from halfmap.steps.curate.segment import segment

PIXEL_A = 2.5
SIZE = 1024
DOSE = 40.0


def _places() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:SIZE, :SIZE] * PIXEL_A
    return y, x


def _disc(x: float, y: float, diameter: float) -> np.ndarray:
    """1 inside, a soft edge of some 15 Å."""
    result = np.zeros((SIZE, SIZE))
    _add_disc(result, x, y, diameter, 1)
    return result


def _add_disc(image: np.ndarray, x: float, y: float, diameter: float, depth: float) -> None:
    reach = diameter / 2 + 80
    rows, columns = (slice(max(0, int((at - reach) / PIXEL_A)), int((at + reach) / PIXEL_A)) for at in (y, x))
    part = image[rows, columns]
    dy = (np.arange(SIZE)[rows] * PIXEL_A - y)[:, None]
    dx = np.arange(SIZE)[columns] * PIXEL_A - x
    part += depth / (1 + np.exp((np.hypot(dx, dy) - diameter / 2) / 8))


def _image(darkness: np.ndarray | float, rng: np.random.Generator) -> np.ndarray:
    expected = DOSE * PIXEL_A**2 * (1 - darkness) * np.ones((SIZE, SIZE))
    return rng.poisson(expected).astype(np.float32)


def _grid(truth: np.ndarray, features: Features) -> np.ndarray:
    return block_means(truth.astype(np.float32), features.block) > 0.5


def _overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


def _crowd(rng: np.random.Generator, diameter: float, depth: float, spacing: float) -> np.ndarray:
    """Particles on a jittered lattice."""
    darkness = np.zeros((SIZE, SIZE))
    field = SIZE * PIXEL_A
    for y in np.arange(spacing / 2, field, spacing):
        for x in np.arange(spacing / 2, field, spacing):
            dx, dy = rng.uniform(-0.15, 0.15, 2) * spacing
            _add_disc(darkness, x + dx, y + dy, diameter, depth)
    return darkness


def test_blocks_are_means_also_of_those_cut_off():
    image = np.random.default_rng(0).normal(size=(23, 31)).astype(np.float32)
    means = block_means(image, 4)
    assert means.shape == (6, 8)
    for i in range(6):
        for j in range(8):
            part = image[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            assert means[i, j] == pytest.approx(part.mean(), abs=1e-6)


def test_darkness_is_a_fraction_of_the_beam_whatever_was_done_to_the_counts():
    rng = np.random.default_rng(1)
    contaminant = _disc(1200, 1200, 900)
    image = _image(0.2 * contaminant, rng)
    for picture, tolerance in ((image, 0.01), (image * 0.01 + 700, 0.02), ((image - 250) / 16, 0.02)):
        features = reduce_image(picture.astype(np.float32), PIXEL_A)
        inside = _grid(contaminant > 0.99, features)
        outside = _grid(contaminant < 0.01, features)
        darkness = features.level[outside].mean() - features.level[inside].mean()
        assert darkness == pytest.approx(0.2, abs=tolerance)


def test_the_background_follows_a_gradient_and_passes_over_an_object():
    y, x = np.mgrid[-1:1:100j, -1:1:120j]
    slow = 1 + 0.1 * x - 0.05 * y + 0.04 * x * y - 0.03 * y**2
    object_ = np.hypot(x - 0.4, y + 0.3) < 0.45
    noise = np.random.default_rng(2).normal(0, 0.002, x.shape)
    found = background(slow + noise - 0.3 * object_)
    np.testing.assert_allclose(found, slow, atol=0.004)


@pytest.mark.parametrize(("diameter", "depth", "spacing"), [(120, 0.04, 160), (280, 0.07, 430), (0, 0, 1e4)])
def test_particles_alone_leave_the_micrograph_whole(diameter, depth, spacing):
    rng = np.random.default_rng(3)
    darkness = _crowd(rng, diameter, depth, spacing) if depth else 0.0
    y, x = _places()
    ramp = 0.1 * x / x.max() - 0.06 * (y / y.max()) ** 2
    found = segment(reduce_image(_image(darkness + ramp, rng), PIXEL_A))
    assert not found.mask.any()
    assert found.edge is None


def test_a_few_large_particles_and_a_filament_are_no_contaminants():
    rng = np.random.default_rng(4)
    y, x = _places()
    across = (x - 0.7 * y - 300) / math.hypot(1, 0.7)
    darkness = 0.05 * (np.abs(across) < 120)
    for place in ((400, 1900), (900, 2200), (2100, 700)):
        darkness = darkness + 0.07 * _disc(*place, 270)
    assert not segment(reduce_image(_image(darkness, rng), PIXEL_A)).mask.any()


def test_contaminants_are_found_among_particles():
    rng = np.random.default_rng(5)
    large = np.maximum(_disc(700, 800, 800), _disc(2450, 2400, 700))
    dark = _disc(1900, 700, 300)
    darkness = np.maximum(_crowd(rng, 120, 0.04, 180), np.maximum(0.12 * large, 0.3 * dark))
    features = reduce_image(_image(darkness, rng), PIXEL_A)
    found = segment(features)
    truth = _grid(np.maximum(large, dark) > 0.5, features)
    assert (found.mask & truth).sum() > 0.99 * truth.sum()
    # The margin of 50 Å around the three.
    assert _overlap(found.mask, truth) > 0.7
    assert not found.parts["carbon"].any()


def test_the_diameter_says_what_is_a_particle():
    rng = np.random.default_rng(6)
    darkness = 0.1 * _disc(1200, 1300, 600)
    features = reduce_image(_image(darkness, rng), PIXEL_A)
    assert segment(features).mask.any()
    assert not segment(features, diameter=650).mask.any()
    small = reduce_image(_image(0.08 * _disc(1200, 1300, 200), rng), PIXEL_A)
    assert not segment(small).mask.any()
    assert segment(small, diameter=100).mask.any()


@pytest.mark.parametrize("radius", [5000.0, 12000.0, math.inf])
def test_the_carbon_beyond_an_edge_is_found(radius):
    rng = np.random.default_rng(7)
    y, x = _places()
    if math.isinf(radius):
        carbon = 0.8 * x + 0.6 * y > 2100
    else:
        carbon = np.hypot(x - 1900 + radius * 0.8, y - 1500 + radius * 0.6) > radius
    darkness = np.where(carbon, 0.12, _crowd(rng, 120, 0.04, 180)) + 0.05 * x / x.max()
    features = reduce_image(_image(darkness, rng), PIXEL_A)
    edge, found = find_edge(features)
    truth = _grid(carbon, features)
    assert edge is not None
    assert _overlap(found, truth) > 0.95
    assert (segment(features).mask & truth).sum() > 0.99 * truth.sum()


def test_carbon_as_bright_as_ice_is_told_by_its_texture():
    rng = np.random.default_rng(8)
    y, x = _places()
    carbon = 0.6 * x - 0.8 * y > 300
    noise = np.fft.rfft2(rng.normal(size=(SIZE, SIZE)))
    k = np.hypot(np.fft.fftfreq(SIZE, PIXEL_A)[:, None], np.fft.rfftfreq(SIZE, PIXEL_A))
    grain = np.fft.irfft2(noise * ((k > 1 / 60) & (k < 1 / 12)), s=(SIZE, SIZE))
    features = reduce_image(_image(0.1 * carbon * grain / grain.std(), rng), PIXEL_A)
    _, found = find_edge(features)
    assert _overlap(found, _grid(carbon, features)) > 0.95


def test_neither_a_gradient_nor_a_round_contaminant_is_an_edge():
    rng = np.random.default_rng(9)
    _, x = _places()
    slope = 0.3 / (1 + np.exp(-(x - 1200) / 400))
    assert find_edge(reduce_image(_image(slope, rng), PIXEL_A))[0] is None
    round_ = 0.4 * _disc(1500, 300, 1500)
    assert find_edge(reduce_image(_image(round_, rng), PIXEL_A))[0] is None


def test_a_hole_in_the_ice_is_empty_and_what_the_beam_does_not_pass_is_thick():
    rng = np.random.default_rng(10)
    y, x = _places()
    hole = np.hypot(x - 700, (y - 800) * 1.2) < 550
    grain = np.fft.rfft2(rng.normal(size=(SIZE, SIZE)))
    k = np.hypot(np.fft.fftfreq(SIZE, PIXEL_A)[:, None], np.fft.rfftfreq(SIZE, PIXEL_A))
    ice = np.fft.irfft2(grain * ((k > 1 / 60) & (k < 1 / 12)), s=(SIZE, SIZE))
    darkness = np.where(hole, -0.12, 0.08 * ice / ice.std())
    features = reduce_image(_image(darkness, rng), PIXEL_A)
    assert _overlap(segment(features).parts["empty"], _grid(hole, features)) > 0.8
    dark = 1 / (1 + np.exp(-(x + y - 3700) / 400))
    features = reduce_image(_image(0.6 * dark, rng), PIXEL_A)
    thick = segment(features).parts["thick ice"]
    assert thick[_grid(dark > 0.8, features)].mean() > 0.95
    assert not thick[_grid(dark < 0.2, features)].any()


def test_a_stretched_mask_divides_the_micrograph_evenly():
    usable = np.arange(12)[:, None] * 100 + np.arange(11) < 505
    shape = 12 * 8 - 5, 11 * 8 - 2
    small = stretched(usable, shape, 8)
    rows = ((np.arange(shape[0]) + 0.5) * small.shape[0] / shape[0]).astype(int)
    columns = ((np.arange(shape[1]) + 0.5) * small.shape[1] / shape[1]).astype(int)
    exact = usable[np.ix_(np.arange(shape[0]) // 8, np.arange(shape[1]) // 8)]
    # A pixel of the mask is nowhere farther off than itself.
    assert (small[np.ix_(rows, columns)] != exact).mean() < 8 * 2 / shape[0]
