"""What particles differ in, against a volume that they are known to differ in, and against noise alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from halfmap.ops.rotations import from_rotation_vector, random_rotations
from halfmap.search.disc import DiscImages, FourierDisc
from halfmap.search.local import slice_tangents
from halfmap.search.projector import SplineVolume, sample_slices
from halfmap.steps.class3d.variation import _grouped, _orthonormal, _Seen, part_along, unknown_ways

BOX, RING, N, WEIGHT, SPREAD = 16, 5, 2000, 2.0, 3.0
DEVIATIONS = torch.tensor([0.005, 0.005, 0.005, 0.02, 0.02])
"""Errors of poses, in radians and pixels."""


def seen(axis: Tensor | None = None) -> tuple[_Seen, Tensor]:
    """Images of noise, or of a volume at normal coordinates as well; and these coordinates."""
    generator = torch.Generator().manual_seed(1)
    disc = FourierDisc(BOX, RING)
    rotations = random_rotations(N, generator=generator, dtype=torch.float64)
    # Noise of power 1, weighted as by a CTF of 1, each coefficient standing for itself and its mate.
    linear = torch.view_as_complex(torch.randn(N, len(disc.points), 2, generator=generator)) * WEIGHT**0.5
    squared = torch.full((N, len(disc.points)), WEIGHT)
    linear[:, 0], squared[:, 0] = 0, 0
    places = torch.randn(N, generator=generator) * SPREAD
    if axis is not None:
        slices = sample_slices(SplineVolume.of(axis, radius_px=RING), rotations, disc.points)
        linear += places[:, None] * squared * slices
    mask = torch.ones(BOX, BOX, BOX)
    known = torch.zeros(N, 0, len(disc.points), dtype=torch.complex64)
    return _Seen(DiscImages(disc, linear, squared), known, rotations, mask, "C1"), places


def random_axis(images: _Seen, seed: int = 2) -> Tensor:
    volume = torch.randn(1, BOX, BOX, BOX, generator=torch.Generator().manual_seed(seed))
    return _orthonormal(images.smooth(volume))[0]


def cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()))


def test_noise_varies_along_nothing():
    images, _ = seen()
    axis = random_axis(images)
    assert abs(cosine(images.applied(axis[None])[0], axis)) < 0.15
    _, variance = images.principal(axis[None])
    # Noise of power 1 in slices of an axis of norm 1: its mean is known, its fluctuation is of this size.
    gram = float(images._products(axis[None])[1].mean())
    assert abs(float(variance[0])) < 5 * (2 / N) ** 0.5 / gram


def test_axis_and_coordinates_are_found():
    axis = random_axis(seen()[0])
    images, places = seen(axis)
    volumes = torch.randn(3, BOX, BOX, BOX, generator=torch.Generator().manual_seed(5))
    for _ in range(8):
        volumes = images.applied(_orthonormal(images.smooth(volumes)))
    axes, variance = images.principal(_orthonormal(volumes))
    assert abs(cosine(axes[0], axis)) > 0.9
    assert float(variance[0]) == pytest.approx(SPREAD**2, rel=0.15)
    assert float(variance[0]) > 2 * float(variance[1])
    found = images.places(axis[None], torch.tensor([SPREAD]))[:, 0]
    gram = images._products(axis[None])[1][:, 0, 0]
    # What is not known of a coordinate is its posterior variance.
    error = (found * SPREAD - places).square().mean()
    assert float(error) == pytest.approx(float((1 / (SPREAD**-2 + gram)).mean()), rel=0.15)


def test_groups_of_places():
    rng = np.random.default_rng(1)
    centres = np.array([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    true = rng.integers(0, 3, 300)
    places = centres[true] + rng.normal(size=(300, 2))
    found, number = _grouped(places, 3, np.random.default_rng(2))
    nearest = np.linalg.norm(found[:, None] - centres, axis=2).argmin(1)
    assert sorted(nearest) == [0, 1, 2]
    assert (nearest[number] == true).mean() > 0.98


def freed_of_pose_errors(images: _Seen, volume: SplineVolume) -> _Seen:
    disc, weights = images.images.disc, images.images.squared
    tangents = slice_tangents(volume, images.rotations, disc.points)[1]
    ways = unknown_ways(tangents, weights, DEVIATIONS.square().reciprocal().expand(N, 5))
    linear = images.images.linear - weights * part_along(ways, images.images.linear)
    return replace(images, images=DiscImages(disc, linear, weights), tangents=ways)


def test_errors_of_poses_are_no_variation():
    noise, _ = seen()
    disc, rotations, weights = noise.images.disc, noise.rotations, noise.images.squared
    axis = random_axis(noise)
    volume = SplineVolume.of(20 * random_axis(noise, seed=6), radius_px=RING)
    errors = torch.randn(N, 5, generator=torch.Generator().manual_seed(7)) * DEVIATIONS
    turned = from_rotation_vector(torch.rad2deg(errors[:, :3]).double()) @ rotations
    moved = sample_slices(volume, turned, disc.points) * disc.shifts(-errors[:, 3:])
    linear = noise.images.linear + weights * (moved - sample_slices(volume, rotations, disc.points))
    images = replace(noise, images=DiscImages(disc, linear, weights))

    def variation(images: _Seen) -> float:
        return float(images.applied(axis[None]).norm())

    assert variation(images) > 3 * variation(noise)
    assert variation(freed_of_pose_errors(images, volume)) < 1.1 * variation(noise)


def test_images_with_errors_of_poses_are_weighted_as_such():
    """The weights are the inverse of a covariance that is small enough to be written down."""
    generator = torch.Generator().manual_seed(3)
    ways = torch.view_as_complex(torch.randn(1, 3, 8, 2, generator=generator))
    weights, precision = 1 + torch.rand(1, 8, generator=generator), torch.tensor([[1.0, 4.0, 0.1]])
    found = unknown_ways(ways, weights, precision)
    real = torch.view_as_real(ways).flatten(2)[0].double()
    both = weights[0].double().repeat_interleave(2)
    wanted = torch.linalg.inv(torch.diag(1 / both) + (real.T / precision[0].double()) @ real)
    image = torch.view_as_complex(torch.randn(1, 8, 2, generator=generator))
    mine = weights * (image - part_along(found, weights * image))
    assert torch.allclose(
        torch.view_as_real(mine).flatten().double(),
        wanted @ torch.view_as_real(image).flatten().double(),
        atol=1e-5,
    )


def test_products_scatter_as_weighted_slices_say():
    """Of images with noise, and with errors of poses that are as large as they are taken to be."""
    noise, _ = seen()
    disc, rotations, weights = noise.images.disc, noise.rotations, noise.images.squared
    volume = SplineVolume.of(3 * random_axis(noise, seed=6), radius_px=RING)
    errors = torch.randn(N, 5, generator=torch.Generator().manual_seed(8)) * DEVIATIONS
    tangents = slice_tangents(volume, rotations, disc.points)[1]
    moved = torch.einsum("nt,ntp->np", errors.to(tangents), tangents)
    images = replace(noise, images=DiscImages(disc, noise.images.linear + weights * moved, weights))
    along, gram = freed_of_pose_errors(images, volume)._products(random_axis(noise)[None])
    assert float(along.square().mean() / gram.mean()) == pytest.approx(1.0, abs=4 * (2 / N) ** 0.5)
