"""Rotations against scipy, formulas written out, healpy, and RELION's own projections in test_slices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops import rotations as rot

F64 = torch.float64


def seeded(n: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return rot.random_rotations(n, generator=torch.Generator().manual_seed(n), dtype=dtype)


def test_euler_is_the_product_of_three_turned_frames():
    angles = torch.tensor([[10.0, 20.0, 30.0], [-170.0, 95.0, 5.0], [300.0, 179.0, -80.0]], dtype=F64)
    for row, matrix in zip(angles.tolist(), rot.from_euler(angles), strict=True):
        # A frame turned by an angle is a vector turned by its opposite.
        expected = Rotation.from_euler("zyz", [-row[0], -row[1], -row[2]], degrees=True).as_matrix()
        np.testing.assert_allclose(matrix.numpy(), expected, atol=1e-14)


def test_euler_entries_by_hand():
    tilted = rot.from_euler(torch.tensor([0.0, 90.0, 0.0], dtype=F64))
    np.testing.assert_allclose(tilted.numpy(), [[0, 0, -1], [0, 1, 0], [1, 0, 0]], atol=1e-15)
    view = rot.view_direction(rot.from_euler(torch.tensor([40.0, 60.0, 77.0], dtype=F64)))
    a, b = math.radians(40), math.radians(60)
    np.testing.assert_allclose(
        view.numpy(), [math.sin(b) * math.cos(a), math.sin(b) * math.sin(a), math.cos(b)]
    )


@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-14), (torch.float32, 2e-6)])
def test_round_trips(dtype, tolerance):
    matrices = seeded(500, dtype)
    for there, back in (
        (rot.to_euler, rot.from_euler),
        (rot.to_quaternion, rot.from_quaternion),
        (rot.to_rotation_vector, rot.from_rotation_vector),
    ):
        assert (back(there(matrices)) - matrices).abs().max() < tolerance
        assert there(matrices).dtype == dtype


def test_euler_angles_come_back_in_their_ranges():
    angles = rot.to_euler(seeded(500))
    assert (angles[:, 1] >= 0).all() and (angles[:, 1] <= 180).all()
    assert (angles.abs() <= 180).all()
    given = torch.tensor([[-120.0, 35.0, 170.0]], dtype=F64)
    np.testing.assert_allclose(rot.to_euler(rot.from_euler(given)).numpy(), given.numpy(), atol=1e-12)


@pytest.mark.parametrize("tilt", [0.0, 180.0, 1e-7, 1e-4, 180.0 - 1e-5])
@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-14), (torch.float32, 5e-7)])
def test_euler_round_trip_at_the_poles(tilt, dtype, tolerance):
    matrix = rot.from_euler(torch.tensor([33.0, tilt, -71.0], dtype=F64)).to(dtype)
    assert (rot.from_euler(rot.to_euler(matrix)) - matrix).abs().max() < tolerance
    if tilt in (0.0, 180.0) and dtype == F64:
        assert rot.to_euler(matrix)[0] == 0


def test_quaternions_and_vectors_as_scipy_has_them():
    matrices = seeded(300)
    reference = Rotation.from_matrix(matrices.numpy())
    quaternions = rot.to_quaternion(matrices).numpy()
    assert (quaternions[:, 0] >= 0).all()
    expected = np.roll(reference.as_quat(canonical=True), 1, axis=1)
    np.testing.assert_allclose(quaternions, expected, atol=1e-13)
    vectors = rot.to_rotation_vector(matrices).numpy()
    np.testing.assert_allclose(vectors, reference.as_rotvec(degrees=True), atol=1e-10)


def test_quaternion_length_does_not_matter():
    quaternion = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=F64)
    assert torch.allclose(rot.from_quaternion(quaternion), rot.from_quaternion(-7 * quaternion))


@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-12), (torch.float32, 2e-5)])
def test_half_turns_keep_their_axis(dtype, tolerance):
    axes = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [-1, 2, 3]], dtype=dtype), dim=1
    )
    back = rot.to_rotation_vector(rot.from_rotation_vector(180 * axes))
    assert ((back.norm(dim=1) - 180).abs() < 180 * tolerance).all()
    assert ((back / 180 * axes).sum(dim=1).abs() > 1 - tolerance).all()


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-6, 1e-3])
def test_small_rotation_vectors(angle):
    vector = torch.tensor([0.6, 0.0, 0.8], dtype=F64) * angle
    # The matrix itself holds the vector to 1e-16 radian, 6e-15 degrees.
    np.testing.assert_allclose(
        rot.to_rotation_vector(rot.from_rotation_vector(vector)).numpy(), vector, atol=3e-14
    )


def test_rotation_vector_has_a_gradient_everywhere():
    for scale in (0.0, 1e-9, 1e-3, 100.0):
        vector = (torch.tensor([0.6, 0.0, 0.8], dtype=F64) * scale).requires_grad_()
        # In radians the derivative is of order one, as gradcheck's steps expect.
        assert torch.autograd.gradcheck(
            lambda v: rot.from_rotation_vector(torch.rad2deg(v)), vector, eps=1e-6, atol=1e-6
        )


def test_rotation_vector_turns_by_the_right_hand():
    matrix = rot.from_rotation_vector(torch.tensor([0.0, 0.0, 90.0], dtype=F64))
    np.testing.assert_allclose((matrix @ torch.tensor([1.0, 0, 0], dtype=F64)).numpy(), [0, 1, 0], atol=1e-15)


def test_compose_applies_the_last_first():
    a, b, c = seeded(3)
    point = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    np.testing.assert_allclose(
        (rot.compose(a, b, c) @ point).numpy(), (a @ (b @ (c @ point))).numpy(), atol=1e-14
    )


@pytest.mark.parametrize("angle", [0.0, 1e-4, 0.5, 90.0, 179.9, 180.0])
def test_distance_is_the_angle_turned(angle):
    start = seeded(20)
    axis = torch.nn.functional.normalize(torch.tensor([1.0, -2.0, 0.5], dtype=F64), dim=0)
    moved = start @ rot.from_rotation_vector(axis * angle)
    np.testing.assert_allclose(rot.angular_distance(start, moved).numpy(), angle, atol=1e-12)
    single = rot.angular_distance(start.float(), moved.float())
    np.testing.assert_allclose(single.numpy(), angle, atol=5e-5)


def test_mean_of_rotations_about_one_axis():
    axis = torch.tensor([0.0, 0.6, 0.8], dtype=F64)
    centre = seeded(1)[0]
    spread = centre @ rot.from_rotation_vector(axis * torch.tensor([[-20.0], [5.0], [15.0]], dtype=F64))
    assert rot.angular_distance(rot.mean_rotation(spread[[0, 0]]), spread[0]) < 1e-10
    weights = torch.tensor([1.0, 0.0, 1.0], dtype=F64)
    between = centre @ rot.from_rotation_vector(axis * -2.5)
    assert rot.angular_distance(rot.mean_rotation(spread, weights=weights), between) < 1e-10
    # Opposite turns of nearly 180 degrees average to a rotation, not to a mirror.
    wide = rot.from_rotation_vector(torch.tensor([[170.0, 0, 0], [0, 170.0, 0], [0, 0, 170.0]], dtype=F64))
    assert torch.linalg.det(rot.mean_rotation(wide)) == pytest.approx(1)


def test_random_rotations_are_uniform_and_reproducible():
    matrices = seeded(20_000)
    assert torch.allclose(matrices @ matrices.transpose(1, 2), torch.eye(3, dtype=F64), atol=1e-13)
    # Entries of uniform rotations have mean 0 and variance 1/3; five standard errors of the mean.
    assert matrices.mean(dim=0).abs().max() < 5 * math.sqrt(1 / 3 / 20_000)
    # The angle's density is (1 - cos a) / 180: its mean is 90 + 360 / pi^2, its deviation below 40.
    angles = rot.angular_distance(matrices, torch.eye(3, dtype=F64))
    assert angles.mean().item() == pytest.approx(90 + 360 / math.pi**2, abs=5 * 40 / math.sqrt(20_000))
    again = rot.random_rotations(20_000, generator=torch.Generator().manual_seed(20_000))
    assert torch.equal(again, matrices.float())


@pytest.mark.parametrize("order", [0, 1, 2, 5])
def test_directions_are_healpix_centres(order):
    healpy = pytest.importorskip("healpy")
    count = 12 * 4**order
    theta, phi = healpy.pix2ang(2**order, np.arange(count), nest=True)
    n_psi = rot.psi_count(order)
    angles = rot.to_euler(rot.grid_rotations(torch.arange(count) * n_psi, order=order)).numpy()
    np.testing.assert_allclose(angles[:, 1], np.degrees(theta), atol=1e-10)
    np.testing.assert_allclose((angles[:, 0] - np.degrees(phi) + 180) % 360, 180, atol=1e-10)


def test_first_pixels_from_the_paper():
    # Order 0: four pixels at z = 2/3, four on the equator and four at z = -2/3, counted so.
    rows = rot.view_direction(rot.grid_rotations(torch.arange(12) * 6, order=0))
    np.testing.assert_allclose(rows[:, 2].numpy(), np.repeat([2 / 3, 0, -2 / 3], 4), atol=1e-15)
    np.testing.assert_allclose(rows[4].numpy(), [1, 0, 0], atol=1e-15)


@pytest.mark.parametrize("order", [0, 1])
def test_grid_covers_rotations_evenly(order):
    grid = rot.healpix_grid(order, dtype=F64)
    assert len(grid) == 72 * 8**order
    samples = seeded(400)
    nearest = rot.angular_distance(samples[:, None], grid).amin(dim=1)
    # The spacing is near 60 degrees over 2^order; its half diagonal in three dimensions bounds the holes.
    assert nearest.max() < 0.5 * 60 / 2**order * math.sqrt(3)
    assert nearest.max() > 0.3 * 60 / 2**order


@pytest.mark.parametrize("psi_step", [None, 45.0, 50.0])
def test_subdivision_is_the_finer_grid(psi_step):
    order = 1
    n_psi = rot.psi_count(order, psi_step)
    parents = torch.arange(12 * 4**order * n_psi)
    children = rot.subdivide(parents, order=order, psi_step=psi_step)
    finer = 180.0 / n_psi
    count = 12 * 4 ** (order + 1) * rot.psi_count(order + 1, finer)
    assert torch.equal(children.flatten().sort()[0], torch.arange(count))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_children_stay_near_their_parents(order):
    parents = torch.arange(12 * 4**order * rot.psi_count(order))
    a = rot.grid_rotations(parents, order=order)
    b = rot.grid_rotations(rot.subdivide(parents, order=order), order=order + 1)
    # With in-plane angles counted from psi = 0 the largest is 0.98 steps at order 1, next to the poles.
    assert rot.angular_distance(a[:, None], b).max() < 0.7 * 60 / 2**order


def test_default_steps():
    assert rot.psi_count(2) == 24
    assert rot.psi_count(0, 7.5) == 48
    assert rot.psi_count(0, 7.0) == 52
    assert rot.healpix_grid(0, psi_step=90.0).shape == (48, 3, 3)


def test_refuses_what_is_no_rotation():
    with pytest.raises(ShapeError, match="3, 3"):
        rot.to_euler(torch.eye(4))
    with pytest.raises(ShapeError, match="Euler"):
        rot.from_euler(torch.zeros(2))
    with pytest.raises(ParameterError, match="order"):
        rot.healpix_grid(-1)
    with pytest.raises(ParameterError, match="step"):
        rot.psi_count(1, 0.0)
    with pytest.raises(ParameterError, match="pixel numbers"):
        rot.grid_rotations(torch.tensor([72]), order=0)
    with pytest.raises(ParameterError, match="compose"):
        rot.compose()
