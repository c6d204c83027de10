"""Motion of a movie: RELION's polynomial, natural splines between nodes, lengths of tracks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.interpolate import CubicSpline

from halfmap.data import MotionTracks
from halfmap.data.motion import accumulated_motion, polynomial_terms, spline_weights
from halfmap.errors import ShapeError

SHAPE = (300, 400)


def tracks(n: int = 5, **changes) -> MotionTracks:
    rng = np.random.default_rng(3)
    shift = rng.normal(size=(n, 2))
    shift[0] = 0
    settings = {
        "movie": "Movies/a.tif",
        "shape": SHAPE,
        "n_frames": n,
        "first_frame": 1,
        "last_frame": n,
        "pixel_size": 0.5,
        "dose_per_frame": 1.0,
        "pre_exposure": 0.0,
        "voltage_kV": 300.0,
        "global_shift": shift,
        "global_error": np.full(n, 0.1),
    }
    return MotionTracks(**{**settings, **changes})


@pytest.mark.parametrize("n_nodes", [2, 3, 4, 7])
def test_splines_are_natural_and_run_through_the_nodes(n_nodes):
    nodes = np.linspace(0, 1, n_nodes)
    values = np.random.default_rng(n_nodes).normal(size=n_nodes)
    places = np.linspace(0, 1, 53).reshape(1, 53)
    weights = spline_weights(n_nodes, places)
    assert weights.shape == (1, 53, n_nodes)
    assert np.allclose(weights @ values, CubicSpline(nodes, values, bc_type="natural")(places), atol=1e-12)
    assert np.allclose(spline_weights(n_nodes, nodes), np.eye(n_nodes), atol=1e-12)


def test_splines_of_one_node_and_beyond_the_field():
    assert np.array_equal(spline_weights(1, [0.0, 0.3, 2.0]), np.ones((3, 1)))
    assert np.allclose(spline_weights(4, [-0.5, 1.5]), [[1, 0, 0, 0], [0, 0, 0, 1]])


def test_polynomial_has_relions_order_of_terms():
    x, y, z = 0.25 * SHAPE[1], 0.9 * SHAPE[0], 3.0
    fx, fy = -0.25, 0.4
    space = [1, fx, fx**2, fy, fy**2, fx * fy]
    expected = [s * t for s in space for t in (z, z**2, z**3)]
    assert polynomial_terms(x, y, z, SHAPE) == pytest.approx(expected)
    assert polynomial_terms(np.zeros((4, 1)), np.zeros(3), 2, SHAPE).shape == (4, 3, 18)


def test_shift_is_global_and_local():
    grid = np.random.default_rng(5).normal(size=(5, 4, 6, 2))
    coefficients = np.random.default_rng(6).normal(size=(2, 18)) * 1e-2
    both = tracks(local_grid=grid, local_error=np.ones((5, 4, 6)), local_coefficients=coefficients)
    # At the nodes, which reach from the first pixel to the last: (x, y) is node (2, 3) here.
    x, y = (SHAPE[1] - 1) * 2 / 5, SHAPE[0] - 1
    frames = np.array([4, 0, 4, 2])
    assert both.shift_at(x, y, frames) == pytest.approx(both.global_shift[frames] + grid[frames, 3, 2])
    assert both.shift_at(0, 0, 1).shape == (2,)
    # Frames before the polynomial's first have none of it.
    assert both.polynomial_shift_at(70, 20, 0) == pytest.approx(both.global_shift[0])
    terms = polynomial_terms(70, 20, 3, SHAPE)
    expected = both.global_shift[3] + [terms @ coefficients[0], terms @ coefficients[1]]
    assert both.polynomial_shift_at(70, 20, 3) == pytest.approx(expected)
    alone = tracks(local_coefficients=coefficients)
    assert alone.shift_at(70, 20, 3) == pytest.approx(expected)
    assert tracks().shift_at([[1, 2]], 3, frames[:, None]).shape == (4, 2, 2)


@pytest.mark.parametrize("model", ["grid", "polynomial", "none"])
def test_field_agrees_with_scattered_points(model):
    rng = np.random.default_rng(8)
    settings = {}
    if model == "grid":
        settings = {"local_grid": rng.normal(size=(5, 3, 4, 2)), "local_error": np.ones((5, 3, 4))}
    if model == "polynomial":
        settings = {"local_coefficients": rng.normal(size=(2, 18))}
    motion = tracks(**settings)
    x, y = np.linspace(0, 399, 7), np.linspace(0, 299, 5)
    field = motion.local_field(x, y, 3)
    assert field.shape == (5, 7, 2)
    points = motion.shift_at(x, y[:, None], 3) - motion.global_shift[3]
    assert np.allclose(field, points, atol=1e-12)


def test_lengths_of_the_track_in_angstrom():
    shift = np.array([[0, 0], [3, 4], [3, 5], [3, 7], [6, 11.0]])
    # Doses at the end of frames 1 to 5: 1.5, 2.5, 3.5, 4.5, 5.5.
    total, early, late = accumulated_motion(tracks(global_shift=shift, pre_exposure=0.5))
    assert (total, early, late) == pytest.approx((6.5, 3.0, 3.5))
    # Frames left out at the beginning count for the dose.
    part = tracks(4, n_frames=9, first_frame=3, last_frame=6, global_shift=shift[:4])
    assert accumulated_motion(part) == pytest.approx((4.0, 2.5, 1.5))
    assert accumulated_motion(tracks(1)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"global_shift": np.zeros((4, 2))}, r"global_shift of motion tracks has the shape \(4, 2\)"),
        ({"global_error": np.zeros((5, 2))}, "global_error"),
        ({"local_coefficients": np.zeros((2, 9))}, "local_coefficients"),
        ({"local_grid": np.zeros((5, 3, 3, 2))}, "local_error"),
        ({"patch_centres": np.zeros((2, 2))}, "patch_shifts"),
        ({"last_frame": 6}, "frames 1 to 6 are not in a movie of 5"),
    ],
)
def test_arrays_that_do_not_belong_together(changes, words):
    with pytest.raises(ShapeError, match=words):
        tracks(**changes)
