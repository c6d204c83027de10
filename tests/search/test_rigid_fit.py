"""Rigid fits of a small model into maps that were made of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.support.fit_model import write_model

from halfmap.io.models import AtomicModel, read_model
from halfmap.ops.rotations import angular_distance, from_rotation_vector
from halfmap.search.fit_places import Place, Range, distinct
from halfmap.search.model_density import model_map
from halfmap.search.rigid_fit import (
    Grid,
    Shape,
    _correlation,
    _left_jacobian,
    correlation,
    find_places,
    sampled,
    shape_of,
)

SHAPE, PIXEL, ORIGIN = (28, 32, 36), 2.0, (-30.0, 5.0, 100.0)
CENTRE = (8.0, 35.0, 125.0)
EYE = torch.eye(3, dtype=torch.float64)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> AtomicModel:
    path = tmp_path_factory.mktemp("model") / "a.pdb"
    write_model(path, centre=CENTRE)
    return read_model(path, assembly=None)


def moved(model: AtomicModel, rotation: torch.Tensor, centre: torch.Tensor) -> AtomicModel:
    own = model.positions.mean(0)
    return replace(model, positions=(model.positions - own) @ rotation.numpy().T + centre.numpy())


def turned(vector: tuple[float, float, float]) -> torch.Tensor:
    return from_rotation_vector(torch.tensor(vector, dtype=torch.float64))


def made(model: AtomicModel, noise: float = 0.0) -> torch.Tensor:
    volume = model_map(model, shape=SHAPE, pixel_size=PIXEL, origin=ORIGIN, blur=150.0)
    random = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    return volume + noise * volume.std() * random


def apart(one: AtomicModel, other: AtomicModel) -> float:
    return float(np.sqrt(np.square(one.positions - other.positions).sum(1).mean()))


def put(given: AtomicModel, place: Place) -> AtomicModel:
    return moved(given, place.rotation, place.centre)


@pytest.mark.parametrize(
    ("vector", "shift"), [((40.0, 20.0, -30.0), (9.0, -7.0, 12.0)), ((0.0, -58.0, 0.0), (-11.0, 0.0, 0.0))]
)
def test_a_displaced_model_comes_back(model, vector, shift):
    given = moved(model, turned(vector), torch.tensor(CENTRE).double() + torch.tensor(shift))
    how = {"pixel_size": PIXEL, "origin": ORIGIN, "angle": 60.0, "shift": 20.0}
    places = find_places(made(model, noise=0.5), given, **how)
    assert apart(put(given, places[0]), model) < 0.3
    values = [place.correlation for place in places]
    assert values == sorted(values, reverse=True)
    again = find_places(made(model, noise=0.5), given, **how)
    assert torch.equal(places[0].rotation, again[0].rotation)


def test_a_model_from_far_away_is_found_by_a_global_search(model):
    given = moved(model, turned((100.0, 90.0, -70.0)), torch.tensor([500.0, -300.0, 0.0]).double())
    # Coarser than the default, for the time of the test.
    places = find_places(made(model), given, pixel_size=PIXEL, origin=ORIGIN, coarse=16.0)
    assert apart(put(given, places[0]), model) < 0.3


def test_ascents_alone_stay_near(model):
    """Of two copies the nearer one is found, though the other fits better."""
    below = torch.tensor(CENTRE).double() - torch.tensor([0.0, 0.0, 14.0])
    far = moved(model, turned((0.0, 0.0, 170.0)), below)
    volume = 0.7 * made(model) + made(far)
    given = moved(model, turned((5.0, 0.0, -5.0)), torch.tensor(CENTRE).double() + 0.8)
    places = find_places(volume, given, pixel_size=PIXEL, origin=ORIGIN, angle=0.0, shift=0.0)
    assert apart(put(given, places[0]), model) < 1.0
    assert len(places) == 1


def test_no_place_is_outside_the_range(model):
    """The model belongs 6 Å and 25° away, which ascents from within 4 Å and 10° would reach."""
    given = moved(
        model, turned((0.0, 25.0, 0.0)), torch.tensor(CENTRE).double() + torch.tensor([0.0, 6.0, 0.0])
    )
    start = torch.from_numpy(given.positions.mean(0))
    how = {"pixel_size": PIXEL, "origin": ORIGIN, "coarse": 16.0}
    places = find_places(made(model), given, angle=10.0, shift=4.0, **how)
    for place in places:
        assert float((place.centre - start).norm()) <= 4.0 + 1e-6
        assert float(angular_distance(place.rotation, EYE)) <= 10.0 + 1e-4
        assert place.correlation > 0
    assert apart(put(given, places[0]), model) < 0.8 * apart(given, model)
    unbounded = find_places(made(model), given, angle=0.0, shift=0.0, **how)
    assert apart(put(given, unbounded[0]), model) < 0.3


def test_a_place_outside_comes_back_to_the_border():
    start = Place(turned((10.0, -20.0, 30.0)), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    way = torch.tensor([3.0, 0.0, -4.0], dtype=torch.float64)
    place = Place(turned((0.0, 0.0, 40.0)) @ start.rotation, start.centre + way, 0.7)
    assert Range(start, 41.0, 5.1).nearest(place) is place
    assert Range(start).nearest(place) is place
    back = Range(start, 30.0, 2.5).nearest(place)
    torch.testing.assert_close(back.rotation, turned((0.0, 0.0, 30.0)) @ start.rotation)
    torch.testing.assert_close(back.centre, start.centre + way / 2)


def test_the_correlation_is_one_in_the_models_own_map(model):
    grid = sampled(made(model), pixel_size=PIXEL, detail=8.0, voxels=3.5)
    own = replace(model, positions=model.positions - np.array(ORIGIN), b_factors=model.b_factors + 150.0)
    shape = shape_of(own, detail=8.0, pixel_size=2.0)
    place = Place(EYE, torch.from_numpy(own.positions.mean(0)))
    assert correlation(grid, shape, place) > 0.99
    beside = Place(EYE, place.centre + torch.tensor([6.0, 0.0, 0.0]))
    assert correlation(grid, shape, beside) < 0.8


def test_slopes_are_those_of_the_correlation():
    generator = torch.Generator().manual_seed(0)
    random = torch.nn.functional.avg_pool3d(torch.randn(1, 20, 22, 24, generator=generator), 3, 1, 1)[0]
    grid = Grid(random, torch.tensor([2.0, 2.1, 1.9], dtype=torch.float64))
    points = 6 * torch.randn(500, 3, generator=generator, dtype=torch.float64)
    values = torch.randn(500, generator=generator, dtype=torch.float64)
    values -= values.mean()
    shape = Shape(random, random, 2.0, points, values / values.norm())
    start, centre = turned((30.0, 40.0, 50.0)).numpy(), np.array([22.0, 21.0, 19.0])

    def at(vector: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        turn = from_rotation_vector(torch.rad2deg(torch.from_numpy(vector[:3]))).numpy()
        return _correlation(grid, shape, turn @ start, centre + vector[3:])

    vector = np.array([0.3, -0.4, 0.2, 0.5, 0.1, -0.3])
    _, force, torque = at(vector)
    numeric = [(at(vector + step)[0] - at(vector - step)[0]) / 2e-6 for step in 1e-6 * np.eye(6)]
    slopes = np.concatenate([_left_jacobian(vector[:3]).T @ torque, force])
    np.testing.assert_allclose(slopes, numeric, atol=1e-6)


def test_places_that_are_the_same_count_once():
    centre = torch.zeros(3, dtype=torch.float64)
    places = [
        Place(EYE, centre, 0.5),
        Place(turned((0.0, 0.0, 4.0)), centre + 0.5, 0.6),
        Place(turned((0.0, 0.0, 40.0)), centre, 0.4),
        Place(EYE, centre + 10.0, 0.3),
    ]
    kept = distinct(places, 5)
    assert [place.correlation for place in kept] == [0.6, 0.4, 0.3]
    assert float(angular_distance(kept[0].rotation, EYE)) == pytest.approx(4.0)
    assert len(distinct(places, 2)) == 2
