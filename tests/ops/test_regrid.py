"""Maps on other grids against the same densities sampled there."""

from __future__ import annotations

import pytest
import torch

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops.fourier import rfft3
from halfmap.ops.grids import coordinates, frequency_radius
from halfmap.ops.regrid import regrid


def blobs(box: int, pixel_size: float) -> torch.Tensor:
    """Gaussians of 4 Å at three places, sampled at the voxels of a grid."""
    where = coordinates((box,) * 3, pixel_size, dtype=torch.float64)
    total = torch.zeros(box, box, box, dtype=torch.float64)
    for height, centre in ((1.0, (3.0, -5.0, 8.0)), (0.7, (-9.0, 2.0, 1.0)), (-0.4, (0.0, 6.0, -7.0))):
        total += height * torch.exp(-(where - torch.tensor(centre)).square().sum(-1) / 32)
    return total


@pytest.mark.parametrize(
    ("old", "new"), [((40, 1.7), (48, 1.42)), ((41, 1.7), (30, 2.3)), ((48, 1.5), (45, 2.0))]
)
def test_densities_are_those_of_the_other_grid(old, new):
    found = regrid(blobs(*old), pixel_size=old[1], box=new[0], new_pixel_size=new[1])
    expected = blobs(*new)
    inside = coordinates((new[0],) * 3, new[1]).abs().amax(-1) <= 0.47 * old[0] * old[1]
    torch.testing.assert_close(found[inside], expected[inside], atol=2e-4, rtol=0)


def test_there_and_back_is_the_same():
    volume = blobs(32, 2.0)
    there = regrid(volume, pixel_size=2.0, box=60, new_pixel_size=1.1)
    back = regrid(there, pixel_size=1.1, box=32, new_pixel_size=2.0)
    torch.testing.assert_close(back, volume, atol=5e-4, rtol=0)


def test_what_the_new_grid_cannot_hold_is_left_out():
    volume = torch.randn(48, 48, 48, generator=torch.Generator().manual_seed(1))
    found = regrid(volume, pixel_size=1.0, box=48, new_pixel_size=0.7)
    finer = frequency_radius((48,) * 3, 0.7) > 0.95
    power = rfft3(found).abs().square()
    assert float(power[finer].sum()) < 0.01 * float(power.sum())
    coarse = regrid(volume, pixel_size=1.0, box=24, new_pixel_size=2.0)
    # Of white noise, an eighth of the power is left.
    assert float(coarse.square().mean()) == pytest.approx(1 / 8, rel=0.15)


def test_the_same_grid_is_a_copy_and_outside_is_nothing():
    volume = blobs(20, 2.0).float()
    same = regrid(volume, pixel_size=2.0, box=20, new_pixel_size=2.0)
    assert torch.equal(same, volume)
    assert same.data_ptr() != volume.data_ptr()
    wide = regrid(torch.ones(20, 20, 20), pixel_size=2.0, box=40, new_pixel_size=2.0)
    torch.testing.assert_close(wide[10:30, 10:30, 10:30], torch.ones(20, 20, 20))
    assert float(wide[:9].abs().max()) == 0


def test_what_is_no_grid_says_so():
    with pytest.raises(ShapeError, match="no cube"):
        regrid(torch.zeros(4, 5, 4), pixel_size=1.0, box=4, new_pixel_size=1.0)
    with pytest.raises(ParameterError, match="without size"):
        regrid(torch.zeros(4, 4, 4), pixel_size=0.0, box=4, new_pixel_size=1.0)
