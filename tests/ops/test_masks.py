"""Masks voxel by voxel against their definition."""

from __future__ import annotations

import math

import pytest
import torch

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops import masks
from halfmap.ops.filters import b_factor
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.fsc import corrected_fsc


def fall(distance: float, width: float) -> float:
    return (
        1.0
        if distance <= 0
        else 0.0
        if distance >= width
        else 0.5 + 0.5 * math.cos(math.pi * distance / width)
    )


@pytest.mark.parametrize("shape", [(12, 13, 14), (9, 9, 9)])
def test_sphere(shape):
    mask = masks.soft_sphere(shape, radius=5.0, edge=3.0, pixel_size=1.5)
    middle = [n // 2 for n in shape]
    for voxel in [
        (0, 0, 0),
        tuple(middle),
        (middle[0], middle[1], middle[2] + 4),
        (3, 4, 5),
        (6, 2, 5),
        (8, 8, 8),
    ]:
        r = 1.5 * math.dist(voxel, middle)
        assert mask[voxel].item() == pytest.approx(fall(r - 5.0, 3.0), abs=1e-6)
    assert ((mask > 0) & (mask < 1)).any()


def test_circle_with_a_sharp_edge_has_the_area_of_its_pixels():
    mask = masks.soft_circle((65, 65), radius=20.0, edge=0.0)
    inside = sum(1 for y in range(-32, 33) for x in range(-32, 33) if x * x + y * y <= 400)
    assert mask.sum() == inside
    assert mask[32, 52] == 1
    assert mask[32, 53] == 0


def test_cylinder_is_round_across_and_ends_along_z():
    mask = masks.soft_cylinder((30, 24, 24), radius=6.0, length=16.0, edge=4.0)
    for z, y, x in [
        (0, 0, 0),
        (0, 6, 0),
        (8, 6, 0),
        (10, 0, 0),
        (12, 0, 0),
        (9, 5, 6),
        (10, 0, 8),
        (-10, -8, 0),
    ]:
        across, along = max(math.hypot(x, y) - 6.0, 0.0), max(abs(z) - 8.0, 0.0)
        expected = fall(math.hypot(across, along), 4.0)
        assert mask[15 + z, 12 + y, 12 + x].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", [(20, 22), (9, 10, 11)])
def test_soft_edge_is_the_cosine_of_the_distance_to_the_nearest_voxel_inside(shape):
    binary = torch.zeros(shape, dtype=torch.bool)
    seeds = [tuple(n // 3 for n in shape), tuple(2 * n // 3 for n in shape)]
    for seed in seeds:
        binary[seed] = True
    soft = masks.soft_edge(binary, width=6.0, pixel_size=1.5)
    for voxel in torch.cartesian_prod(*[torch.arange(n) for n in shape]).tolist():
        distance = 1.5 * min(math.dist(voxel, seed) for seed in seeds)
        assert soft[tuple(voxel)].item() == pytest.approx(fall(distance, 6.0), abs=1e-6)
    assert binary.sum() == 2


def test_empty_and_full_masks_stay_so():
    assert masks.soft_edge(torch.zeros(6, 6), width=3.0).sum() == 0
    assert (masks.soft_edge(torch.ones(6, 6), width=3.0) == 1).all()


def test_a_soft_edge_of_a_sharp_sphere_is_near_the_soft_sphere():
    shape = (40, 40, 40)
    sharp = masks.soft_sphere(shape, radius=10.0, edge=0.0)
    soft = masks.soft_edge(sharp, width=5.0)
    # The nearest voxel inside lies within half a diagonal of the sphere; the slope is pi / (2 width).
    bound = math.sqrt(3) / 2 * math.pi / (2 * 5.0)
    assert (soft - masks.soft_sphere(shape, radius=10.0, edge=5.0)).abs().max() <= bound


def test_masks_that_cannot_be_are_refused():
    with pytest.raises(ShapeError, match="3D mask"):
        masks.soft_sphere((8, 8), radius=2.0, edge=1.0)
    with pytest.raises(ParameterError, match="radius"):
        masks.soft_circle((8, 8), radius=0.0, edge=1.0)
    with pytest.raises(ParameterError, match="edge"):
        masks.soft_circle((8, 8), radius=2.0, edge=-1.0)
    with pytest.raises(ShapeError, match="one image or volume"):
        masks.soft_edge(torch.zeros(2, 4, 4, 4), width=1.0)


def test_sphere_and_cylinder_off_the_origin():
    centre = (4.5, -3.0, 6.0)
    ball = masks.soft_sphere((20, 22, 24), radius=6.0, edge=3.0, pixel_size=1.5, centre=centre)
    rod = masks.soft_cylinder((20, 22, 24), radius=6.0, length=9.0, edge=3.0, pixel_size=1.5, centre=centre)
    for z, y, x in [(14, 9, 15), (10, 11, 12), (14, 9, 20), (18, 9, 15), (16, 6, 15)]:
        at = [1.5 * (i - n // 2) - c for i, n, c in zip((x, y, z), (24, 22, 20), centre, strict=True)]
        assert ball[z, y, x].item() == pytest.approx(fall(math.hypot(*at) - 6.0, 3.0), abs=1e-6)
        outside = math.hypot(max(math.hypot(*at[:2]) - 6.0, 0), max(abs(at[2]) - 4.5, 0))
        assert rod[z, y, x].item() == pytest.approx(fall(outside, 3.0), abs=1e-6)


def test_extended_mask_has_its_edge_farther_out():
    inside = torch.zeros(1, 1, 30, dtype=torch.bool)
    inside[0, 0, 10] = True
    soft = masks.soft_edge(inside, width=4.0, extend=3.0, pixel_size=1.5)[0, 0]
    expected = [fall(1.5 * abs(x - 10) - 3.0, 4.0) for x in range(30)]
    assert soft.tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ParameterError, match="extended"):
        masks.soft_edge(inside, width=4.0, extend=-1.0)


def test_voxels_around_points_are_those_within_the_distance():
    generator = torch.Generator().manual_seed(1)
    points = (torch.rand(12, 3, generator=generator, dtype=torch.float64) * 20 - 4).numpy()
    found = masks.around_points((10, 12, 14), points, radius_px=2.3)
    z, y, x = torch.meshgrid(*map(torch.arange, (10, 12, 14)), indexing="ij")
    voxels = torch.stack([x, y, z], dim=-1).double()
    distance = torch.cdist(voxels.reshape(-1, 3), torch.from_numpy(points)).amin(dim=1)
    assert (torch.from_numpy(found).flatten() == (distance <= 2.3)).all()
    alone = masks.around_points((5, 5, 5), points[:1] * 0 + 2.4, radius_px=0.1)
    assert alone.sum() == 1 and alone[2, 2, 2]


@pytest.mark.parametrize(
    ("resolution", "box", "pixel_size", "extend", "width"),
    [
        (6.0, 64, 2.5, 3.0, 15.0),
        # Least and most; of large voxels no less than three, in a small box an eighth of it.
        (2.0, 64, 1.5, 3.0, 10.0),
        (math.inf, 64, 3.0, 5.0, 24.0),
        (2.0, 32, 6.0, 3.0, 18.0),
        (math.inf, 64, 1.5, 5.0, 12.0),
    ],
)
def test_mask_of_a_particle_is_as_soft_as_its_map_needs(resolution, box, pixel_size, extend, width):
    region = masks.soft_sphere((box,) * 3, radius=8.0, edge=0.0) > 0.5
    found = masks.around_region(region, resolution=resolution, pixel_size=pixel_size)
    wanted = masks.soft_edge(region, extend=extend, width=width, pixel_size=pixel_size)
    torch.testing.assert_close(found, wanted)


def test_half_maps_of_little_fine_detail_do_not_correlate_by_their_mask():
    """Random phases within the mask, against those within one of a harder edge and the same volume."""
    shape, pixel_size = (64,) * 3, 2.25
    generator = torch.Generator().manual_seed(1)
    ball = masks.soft_sphere(shape, radius=35.0, edge=5.0, pixel_size=pixel_size)

    def detail(b: float) -> torch.Tensor:
        passed = b_factor(shape, pixel_size=pixel_size, b_factor=b)
        volume = irfft3(rfft3(torch.randn(shape, generator=generator) * ball) * passed, shape=shape)
        return volume / volume.std()

    signal = 30 * detail(4000.0) + detail(600.0)
    halves = [signal + 0.5 * torch.randn(shape, generator=generator) for _ in range(2)]
    region = masks.soft_sphere(shape, radius=38.0, edge=0.0, pixel_size=pixel_size) > 0.5
    soft = masks.around_region(region, resolution=9.0, pixel_size=pixel_size)
    hard = masks.soft_edge(region, extend=8.0, width=8.0, pixel_size=pixel_size)
    assert float(hard.square().mean()) == pytest.approx(float(soft.square().mean()), rel=0.1)
    curves = [corrected_fsc(*halves, mask=each, draws=3, generator=generator) for each in (soft, hard)]
    first = curves[0].from_shell + 2
    by_mask = [float(curve.randomised[first : first + 4].mean()) for curve in curves]
    assert by_mask[0] < 0.15 < 0.3 < by_mask[1]
