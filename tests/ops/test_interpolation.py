"""Interpolation against plain sums over neighbours, polynomials it must reproduce, and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops import interpolation
from halfmap.ops.rotations import from_rotation_vector, random_rotations

F64 = torch.float64


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(sum(shape)))


def positions(shape: tuple[int, ...], n: int, margin: float) -> torch.Tensor:
    """Random positions (x, y[, z]), beyond the edges by `margin`."""
    sizes = torch.tensor(shape[::-1], dtype=F64)
    uniform = torch.rand(n, len(shape), dtype=F64, generator=torch.Generator().manual_seed(n))
    return uniform * (sizes - 1 + 2 * margin) - margin


@pytest.mark.parametrize("shape", [(7, 9), (5, 6, 8)])
@pytest.mark.parametrize("outside, mode", [("zero", "grid-constant"), ("nearest", "nearest")])
def test_linear_is_scipys(shape, outside, mode):
    array, points = noise(2, *shape), positions(shape, 200, 2.5)
    sample = interpolation.sample_image if len(shape) == 2 else interpolation.sample_volume
    found = sample(array, points, outside=outside)
    assert found.shape == (2, 200)
    for channel, values in zip(array.numpy(), found.numpy(), strict=True):
        expected = scipy.ndimage.map_coordinates(channel, points.numpy().T[::-1], order=1, mode=mode)
        np.testing.assert_allclose(values, expected, atol=1e-12)


def keys(t: float) -> float:
    t = abs(t)
    if t < 1:
        return 1.5 * t**3 - 2.5 * t**2 + 1
    return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0


@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 6)])
@pytest.mark.parametrize("outside", ["zero", "nearest"])
def test_cubic_is_the_sum_over_all_pixels(shape, outside):
    array, points = noise(*shape), positions(shape, 30, 1.5)
    sample = interpolation.sample_image if len(shape) == 2 else interpolation.sample_volume
    found = sample(array, points, method="cubic", outside=outside).numpy()
    padded = np.pad(array.numpy(), 4, mode="constant" if outside == "zero" else "edge")
    for point, value in zip(points.numpy(), found, strict=True):
        expected = padded
        for coordinate in point:
            weights = [keys(coordinate + 4 - i) for i in range(expected.shape[-1])]
            # Contracts x, then y, then z, which move to the end as axes vanish.
            expected = expected @ np.array(weights)
        assert value == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("method, degree", [("linear", 1), ("cubic", 2)])
def test_polynomials_are_reproduced(method, degree):
    y, x = np.mgrid[:9, :12].astype(float)
    points = positions((9, 12), 100, -2.0)
    image = torch.from_numpy((0.3 * x - y) ** degree)
    found = interpolation.sample_image(image, points, method=method)
    expected = (0.3 * points[:, 0] - points[:, 1]) ** degree
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-12)


def test_shapes_and_types_follow_the_input():
    found = interpolation.sample_image(noise(2, 3, 6, 7).float(), torch.zeros(4, 5, 2))
    assert found.shape == (2, 3, 4, 5) and found.dtype == torch.float32
    assert interpolation.sample_volume(noise(4, 4, 4), torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize("method", ["linear", "cubic"])
def test_gradients(method):
    image = noise(6, 7).requires_grad_()
    points = positions((6, 7), 8, 0.5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, p: interpolation.sample_image(a, p, method=method), (image, points), atol=1e-6
    )


@pytest.mark.parametrize("method, tolerance", [("linear", 0.05), ("cubic", 0.01)])
def test_rotation_moves_a_blob_to_r_times_its_place(method, tolerance):
    axis = torch.arange(25, dtype=F64) - 12
    place = torch.tensor([5.0, -3.0, 2.0], dtype=F64)

    def blob(at: torch.Tensor) -> torch.Tensor:
        x, y, z = (torch.exp(-((axis - c) ** 2) / (2 * 2.0**2)) for c in at)
        return z[:, None, None] * y[:, None] * x

    rotation = random_rotations(1, generator=torch.Generator().manual_seed(4), dtype=F64)[0]
    rotated = interpolation.rotate_volume(blob(place), rotation, method=method)
    # Errors of interpolating a Gaussian of width 2: h²/8 f'' and, cubic, of the order h³: 3 % and below 1 %.
    assert (rotated - blob(rotation @ place)).norm() < tolerance * rotated.norm()


@pytest.mark.parametrize("shape", [(8, 8, 8), (7, 7, 7), (5, 6, 8)])
def test_half_turn_about_the_origin_voxel(shape):
    volume = noise(*shape)
    turned = interpolation.rotate_volume(
        volume, from_rotation_vector(torch.tensor([0.0, 0.0, 180.0], dtype=F64))
    )
    for y in range(shape[1]):
        for x in range(shape[2]):
            there = 2 * (shape[1] // 2) - y, 2 * (shape[2] // 2) - x
            inside = there[0] < shape[1] and there[1] < shape[2]
            expected = volume[:, there[0], there[1]] if inside else torch.zeros(shape[0], dtype=F64)
            np.testing.assert_allclose(turned[:, y, x].numpy(), expected.numpy(), atol=1e-12)


def test_identity_changes_nothing():
    volume = noise(2, 6, 5, 4)
    for method in ("linear", "cubic"):
        same = interpolation.rotate_volume(volume, torch.eye(3), method=method)
        np.testing.assert_allclose(same.numpy(), volume.numpy(), atol=1e-13)


def test_refuses_what_does_not_fit():
    with pytest.raises(ShapeError, match="2 coordinates"):
        interpolation.sample_image(torch.zeros(4, 4), torch.zeros(1, 3))
    with pytest.raises(ShapeError, match="real"):
        interpolation.sample_image(torch.zeros(4, 4, dtype=torch.complex64), torch.zeros(1, 2))
    with pytest.raises(ParameterError, match="spline"):
        interpolation.sample_image(torch.zeros(4, 4), torch.zeros(1, 2), method="spline")  # pyright: ignore
    with pytest.raises(ShapeError, match="3 x 3"):
        interpolation.rotate_volume(torch.zeros(4, 4, 4), torch.eye(3)[None])
