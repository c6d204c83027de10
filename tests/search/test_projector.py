import math

import pytest
import torch
from pose_simulation import Particle

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops.rotations import random_rotations
from halfmap.search.disc import FourierDisc
from halfmap.search.polar import PolarGrid
from halfmap.search.projector import (
    SplineVolume,
    _sample_torch,
    polar_references,
    sample_gradients,
    sample_slices,
)

BOX, RADIUS_PX = 48, 14.0
PARTICLE = Particle.random(BOX, radius_px=RADIUS_PX)
DISC = FourierDisc(BOX, 20)


def _rotations(n: int = 5) -> torch.Tensor:
    return random_rotations(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _alias(padding: float) -> float:
    """Relative amplitude that an atom at the particle's edge gets from the neighbouring copy of the box."""
    x = RADIUS_PX / (padding * BOX)
    return (math.sin(math.pi * (1 - x)) / (1 - x) / (math.sin(math.pi * x) / x)) ** 4


@pytest.mark.parametrize("padding", [1.5, 2.0])
def test_slices_agree_with_the_formula_to_the_splines_aliases(padding: float):
    volume = SplineVolume.of(PARTICLE.volume(), padding=padding)
    truth = PARTICLE.slices(_rotations(), DISC.points)
    error = (sample_slices(volume, _rotations(), DISC.points) - truth).norm() / truth.norm()
    assert float(error) < _alias(padding)


def test_gradients_agree_with_the_formula():
    volume = SplineVolume.of(PARTICLE.volume().double())
    _, gradients = sample_gradients(volume, _rotations(), DISC.points)
    position = (DISC.points @ _rotations()[:, :2]).requires_grad_()
    for part in ("real", "imag"):
        found = getattr(PARTICLE.transform(position), part).sum()
        (truth,) = torch.autograd.grad(found, position)
        error = (getattr(gradients, part) - truth).norm() / truth.norm()
        # A derivative multiplies the alias by its distance from the origin, over the atom's.
        x = RADIUS_PX / (2 * BOX)
        assert float(error) < _alias(2.0) * (1 - x) / x


def test_gradients_are_those_of_the_interpolation():
    volume = SplineVolume.of(PARTICLE.volume().double())
    step, points = 1e-5, torch.tensor([[3.3, -7.1], [0.2, 0.4]], dtype=torch.float64)
    rotation = _rotations(1)
    for axis in range(3):
        # A matrix that is no rotation moves points anywhere.
        moved = [rotation.clone(), rotation.clone()]
        for sign, matrix in zip((1, -1), moved, strict=True):
            matrix[:, 0, axis] += sign * step
        difference = (sample_slices(volume, moved[0], points) - sample_slices(volume, moved[1], points))[0]
        _, gradients = sample_gradients(volume, rotation, points)
        expected = gradients[0, :, axis] * points[:, 0]
        torch.testing.assert_close(difference / (2 * step), expected, rtol=1e-6, atol=1e-6)


def test_torch_body_agrees_with_the_kernels():
    volume = SplineVolume.of(PARTICLE.volume())
    values, slopes = sample_gradients(volume, _rotations(), DISC.points)
    found = _sample_torch(volume, volume.turns(_rotations()), volume.check(DISC.points), gradients=True)
    other_values, other_slopes = (torch.cat(parts) for parts in zip(*found, strict=True))
    assert float((values - other_values).abs().max() / values.abs().max()) < 1e-5
    assert float((slopes - other_slopes).abs().max() / slopes.abs().max()) < 1e-5
    assert float((sample_slices(volume, _rotations(), DISC.points) - values).abs().max()) < 1e-3


def test_references_agree_with_projections_in_real_space():
    grid, volume = PolarGrid(BOX, 16, 20.0), SplineVolume.of(PARTICLE.volume())
    projections = grid.sample(PARTICLE.images(_rotations()))
    found = polar_references(volume, _rotations(), grid)
    assert float((found - projections).norm() / projections.norm()) < _alias(2.0)


def test_a_volume_of_few_frequencies_gives_the_same_slices():
    whole, few = (SplineVolume.of(PARTICLE.volume(), radius_px=radius) for radius in (None, 9.5))
    points = DISC.points[: DISC.count(9)]
    assert torch.equal(sample_slices(whole, _rotations(), points), sample_slices(few, _rotations(), points))


def test_refusals():
    volume = SplineVolume.of(PARTICLE.volume(), radius_px=10)
    with pytest.raises(ParameterError, match="beyond"):
        sample_slices(volume, _rotations(), DISC.points)
    with pytest.raises(ParameterError, match="finite"):
        sample_slices(volume, _rotations() * math.nan, DISC.points[:5])
    with pytest.raises(ShapeError, match="cube"):
        SplineVolume.of(torch.zeros(4, 4, 6))
    with pytest.raises(ParameterError, match="padding"):
        SplineVolume.of(torch.zeros(4, 4, 4), padding=0.5)
