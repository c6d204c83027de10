"""What particles differ in, against a volume that they are known to differ in, and against noise alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from halfmap.ops.rotations import random_rotations
from halfmap.search.disc import DiscImages, FourierDisc
from halfmap.search.projector import SplineVolume, sample_slices
from halfmap.steps.class3d.variation import _grouped, _orthonormal, _Seen

BOX, RING, N, WEIGHT, SPREAD = 16, 5, 2000, 2.0, 3.0


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
    return _Seen(DiscImages(disc, linear, squared), rotations, mask, "C1"), places


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
