"""Solvent, noise, threshold and region against balls of known volume in noise of known strength."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from halfmap.errors import ParameterError
from halfmap.ops import envelope, grids

PIXEL, RADIUS = 3.0, 36.0


def ball(noise: float = 0.0, *, box: int = 48, seed: int = 0) -> torch.Tensor:
    volume = (grids.radius((box,) * 3, PIXEL) <= RADIUS).float()
    return volume + noise * torch.randn(volume.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.8])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.003, -7.0), (250.0, 1e4)])
def test_the_region_has_the_volume_of_the_ball_at_any_grey_scale(noise, scale, offset):
    found = envelope.find_region(ball(noise) * scale + offset, pixel_size=PIXEL)
    volume = float(found.region.sum()) * PIXEL**3
    # Half of the mean of a blurred ball, whose rim is lower, lies within half a voxel of its surface.
    assert abs((volume / (4 / 3 * math.pi)) ** (1 / 3) - RADIUS) < PIXEL / 2
    assert found.resolution == 15.0
    assert not found.levels.limited_by_noise


def test_levels_are_those_of_solvent_noise_and_particle():
    blurred = envelope.blur(ball(0.7), pixel_size=PIXEL, resolution=15.0)
    levels = envelope.density_levels(blurred)
    outside = blurred[grids.radius(blurred.shape, PIXEL) > RADIUS + 20]
    inside = blurred[grids.radius(blurred.shape, PIXEL) < RADIUS - 10]
    assert levels.solvent == pytest.approx(float(outside.mean()), abs=0.1 * float(outside.std()))
    assert levels.noise == pytest.approx(float(outside.std()), rel=0.1)
    assert 0.85 < levels.particle / float(inside.mean()) < 1.0
    assert levels.threshold == pytest.approx(levels.solvent + (levels.particle - levels.solvent) / 2)


def test_more_noise_takes_a_stronger_blur():
    strong = envelope.find_region(ball(2.0), pixel_size=PIXEL)
    assert strong.resolution > 15.0
    overlap = strong.region & (ball() > 0)
    assert overlap.sum() > 0.75 * (strong.region | (ball() > 0)).sum()


@pytest.mark.parametrize("seed", range(3))
def test_mere_noise_holds_no_particle(seed):
    noise = torch.randn((40,) * 3, generator=torch.Generator().manual_seed(seed))
    with pytest.raises(ParameterError, match="no particle stands out of the noise"):
        envelope.find_region(noise, pixel_size=PIXEL)


def test_a_constant_map_is_refused():
    with pytest.raises(ParameterError, match="the same everywhere"):
        envelope.density_levels(torch.ones(8, 8, 8))


def test_what_a_mask_has_blanked_is_found_and_tells_nothing_of_the_noise():
    noisy = ball(1.0)
    kept = grids.radius(noisy.shape, PIXEL) < 60
    masked = torch.where(kept, noisy, 0.0)
    assert torch.equal(envelope.blank_voxels(masked), ~kept)
    assert not envelope.blank_voxels(noisy).any()
    whole, cut = (envelope.find_region(each, pixel_size=PIXEL) for each in (noisy, masked))
    assert cut.levels.noise == pytest.approx(whole.levels.noise, rel=0.15)
    assert (whole.region ^ cut.region).sum() < 0.02 * whole.region.sum()


def test_a_tight_mask_leaves_the_particle():
    masked = torch.where(grids.radius((48,) * 3, PIXEL) < RADIUS + 6, ball(0.3), 0.0)
    found = envelope.find_region(masked, pixel_size=PIXEL)
    assert (found.region ^ (ball() > 0)).sum() < 0.15 * (ball() > 0).sum()


def test_pieces_and_holes():
    inside = torch.zeros(20, 20, 20, dtype=torch.bool)
    inside[2:12, 2:12, 2:12] = True
    inside[5, 5, 5] = False  # a hole of 1 in 1,000
    inside[8:11, 8:11, 8:11] = False  # a cavity of 27
    inside[15:18, 15:18, 15:18] = True  # a piece of 27
    kept = envelope.particle_region(inside, least_piece=0.02, largest_hole=0.01)
    assert int(kept.sum()) == 1000 - 27 + 27
    assert kept[5, 5, 5] and not kept[9, 9, 9] and kept[16, 16, 16]
    kept = envelope.particle_region(inside, least_piece=0.1, largest_hole=np.inf)
    assert int(kept.sum()) == 1000
    assert not envelope.particle_region(torch.zeros(4, 4, 4, dtype=torch.bool)).any()
