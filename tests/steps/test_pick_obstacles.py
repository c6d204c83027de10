"""What is masked before picking, and what is not."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage

from halfmap.io.micrographs import Image, flattened
from halfmap.steps.pick.obstacles import ice_level, mask_obstacles, usual_darkness
from halfmap.steps.pick.survey import masked_share

PIXEL_A, DIAMETER_A = 6.0, 72.0
SIZE = 320


def _image(level):
    """Micrograph of some level, flattened as `load` does it."""
    mask = np.ones(level.shape, bool)
    level = level.astype(np.float32)
    return Image(flattened(level, mask, 1000 / PIXEL_A), PIXEL_A, mask, None, (1, 1), level)


def _ice(rng, n=120):
    """Ice with discs of a particle's size, less dense than a tenth of the carbon."""
    places = rng.uniform(0, SIZE, (n, 2))
    y, x = np.mgrid[:SIZE, :SIZE]
    level = 100 + rng.normal(0, 3, (SIZE, SIZE)) + 1e-3 * x
    for px, py in places:
        level -= 2.5 * ((x - px) ** 2 + (y - py) ** 2 < (DIAMETER_A / 2 / PIXEL_A) ** 2)
    return level


@pytest.mark.parametrize("share", [0.15, 0.4])
def test_carbon_is_masked_up_to_its_edge_and_ice_is_not(share):
    rng = np.random.default_rng(1)
    level = _ice(rng)
    y, x = np.mgrid[:SIZE, :SIZE]
    border = share * SIZE + 8 * np.sin(y / 25)
    carbon = x < border
    found = mask_obstacles(_image(np.where(carbon, level - 30, level)), DIAMETER_A)
    assert not found.mask[carbon].any()
    # A third of a particle, and the blur over which the edge is seen, beside it.
    far = x > border + 1.5 * DIAMETER_A / PIXEL_A
    assert found.mask[far].mean() > 0.99
    # Beside carbon ice must be flat, or it would look like one large bright thing.
    near = far & (x < border + 4 * DIAMETER_A / PIXEL_A)
    blurred = scipy.ndimage.gaussian_filter(np.where(found.mask, found.values, 0), 8)
    assert abs(blurred[near].mean() - blurred[far & ~near].mean()) < 0.15


def test_the_share_that_is_masked_is_known():
    level = _ice(np.random.default_rng(1))
    carbon = np.arange(SIZE) < 0.25 * SIZE
    images = [_image(level), _image(np.where(carbon, level - 30, level))]
    # A quarter of the second one, and a third of a particle beside it.
    assert masked_share(images, DIAMETER_A) == pytest.approx(0.125 + 6 / SIZE / 2, abs=0.02)
    assert masked_share(images[:1], DIAMETER_A) == 0


def test_thicker_ice_at_one_side_is_not_masked():
    level = _ice(np.random.default_rng(2))
    slope = np.linspace(0, 12, SIZE)
    assert mask_obstacles(_image(level - slope), DIAMETER_A).mask.mean() > 0.98


def test_crowds_of_particles_are_not_masked():
    level = _ice(np.random.default_rng(3), n=700)
    assert mask_obstacles(_image(level), DIAMETER_A).mask.mean() > 0.98


def test_ice_is_the_brightest_level_of_many_pixels():
    rng = np.random.default_rng(4)
    carbon, ice, dirt = rng.normal(60, 0.2, 4000), rng.normal(100, 1, 3500), rng.uniform(30, 100, 500)
    assert ice_level(np.concatenate([carbon, ice, dirt])) == pytest.approx(100, abs=1)
    few = rng.normal(130, 1, 200)
    assert ice_level(np.concatenate([carbon, ice, few])) == pytest.approx(100, abs=1)


def _with_spots(places, depth, diameter_px, seed=5):
    """Noise with balls of a depth in it."""
    level = 100 + np.random.default_rng(seed).normal(0, 1, (SIZE, SIZE))
    y, x = np.mgrid[:SIZE, :SIZE]
    for px, py in places:
        square = (diameter_px / 2) ** 2 - (x - px) ** 2 - (y - py) ** 2
        level -= depth * np.sqrt(np.maximum(square, 0)) / (diameter_px / 2)
    return level


@pytest.mark.parametrize(
    "places", [[(60, 70)], [(60, 70), (73, 70)], [(60, 70), (250, 90), (2, 200), (110, 240), (200, 200)]]
)
@pytest.mark.parametrize("depth", [3.5, 7.0, 20.0])
def test_few_strong_particles_are_not_masked(places, depth):
    # Their outlines three deviations from the ice hold more than three particles' areas.
    assert mask_obstacles(_image(_with_spots(places, depth, 12)), DIAMETER_A).mask.all()


@pytest.mark.parametrize("n", [0, 1, 4])
def test_what_is_wider_than_particles_is_masked_beside_few_of_them(n):
    places = [(60, 70), (250, 90), (110, 240), (200, 200)][:n]
    # A ball three times as wide is three times as deep.
    level = _with_spots(places, 7.0, 12) - (100 - _with_spots([(180, 60)], 21.0, 36, seed=6))
    found = mask_obstacles(_image(level), DIAMETER_A).mask
    assert not found[52:68, 172:188].any()
    assert all(found[y, x] for x, y in places)


def test_groups_of_few_strong_particles_are_not_masked_where_others_are_as_strong():
    group = [(60 + 11 * i, 70 + 11 * j) for i in range(4) for j in range(4)]
    alone = [(40 + 60 * i, 40 + 60 * j) for i in range(5) for j in range(5)]
    usual = usual_darkness([_image(_with_spots(alone, 7.0, 12, seed=7))], DIAMETER_A)
    image = _image(_with_spots(group, 7.0, 12))
    assert not mask_obstacles(image, DIAMETER_A).mask[70:100, 60:90].all()
    assert mask_obstacles(image, DIAMETER_A, usual=usual).mask.all()


def test_many_contaminants_of_one_micrograph_are_no_particles():
    # Ten balls thrice as wide and six times as dark as the particles of the other micrographs.
    alone = [(40 + 60 * i, 40 + 60 * j) for i in range(5) for j in range(5)]
    usual = usual_darkness([_image(_with_spots(alone, 4.0, 12, seed=7))], DIAMETER_A)
    dirt = [(50 + 100 * i, 40 + 75 * j) for i in range(3) for j in range(4)]
    found = mask_obstacles(_image(_with_spots(dirt, 24.0, 36)), DIAMETER_A, usual=usual).mask
    assert not any(found[y, x] for x, y in dirt)
