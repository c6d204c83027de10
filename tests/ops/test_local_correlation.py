"""Local correlation of half maps, band by band, against sums over windows written out."""

import math

import pytest
import torch

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.grids import coordinates, ring_index
from halfmap.ops.local_correlation import bands, put_back, shells, upsampled
from halfmap.ops.masks import soft_sphere

BOX = 48
ONES = torch.ones(BOX, BOX, BOX)


def _random(seed: int) -> torch.Tensor:
    return torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(seed))


def test_bands_add_up_to_the_map():
    first, second = _random(1), _random(2)
    whole = torch.zeros(BOX, BOX, BOX // 2 + 1, dtype=torch.complex64)
    for band in bands(first, second, mask=ONES, middles=shells(BOX, 4.0)):
        put_back(whole, band.mean, BOX)
    expected = rfft3((first + second) / 2)
    within = ring_index((BOX,) * 3) < BOX // 2 - 1
    torch.testing.assert_close(whole[within], expected[within], rtol=1e-3, atol=1e-2)


def test_correlation_is_that_of_a_gaussian_window():
    """Against products and squares of the filtered half maps, weighted by distance and summed."""
    first = _random(1)
    second = first + 0.7 * _random(2)
    mask = soft_sphere((BOX,) * 3, radius=17.0, edge=4.0)
    band = list(bands(first, second, mask=mask, middles=shells(BOX, 4.0)))[-2]
    assert len(band.mean) == BOX
    one, two = band.mean + band.apart, band.mean - band.apart
    place = (26, 20, 24)
    offset = coordinates((BOX,) * 3).flip(-1) - (torch.tensor(place) - BOX // 2)
    window = torch.exp(-offset.square().sum(-1) / (2 * band.width**2)) * mask
    expected = 2 * (window * one * two).sum() / (window * (one.square() + two.square())).sum()
    assert float(band.correlation[place]) == pytest.approx(float(expected), abs=0.01)


def test_noise_scatters_as_stated():
    found = list(bands(_random(3), _random(4), mask=ONES, middles=shells(BOX, 4.0)))[3:-1]
    for band in found:
        assert float(band.correlation.square().mean().sqrt()) == pytest.approx(band.deviation, rel=0.35)
    ratio = [float(band.correlation.square().mean().sqrt()) / band.deviation for band in found]
    assert sum(ratio) / len(ratio) == pytest.approx(1.0, abs=0.1)


def test_each_part_correlates_to_its_own_detail():
    signal = _random(5)
    sharp = irfft3(rfft3(signal) * low_pass((BOX,) * 3, pixel_size=1.0, resolution=2.6), shape=(BOX,) * 3)
    blurred = irfft3(rfft3(signal) * low_pass((BOX,) * 3, pixel_size=1.0, resolution=6.0), shape=(BOX,) * 3)
    left = (torch.arange(BOX) < BOX // 2).expand(BOX, BOX, BOX)
    truth = torch.where(left, sharp, blurred)
    halves = [truth + 0.5 * _random(seed) for seed in (6, 7)]
    for band in bands(*halves, mask=ONES, middles=shells(BOX, 4.0)):
        f = upsampled(band.correlation, BOX)
        detail = BOX / band.shell
        good, bad = float(f[16:32, 16:32, 10:14].mean()), float(f[16:32, 16:32, 34:38].mean())
        if detail > 7.5:
            assert good > 0.7 and bad > 0.7
        elif 3.0 < detail < 4.2:
            assert good > 0.7 and bad < 0.3


def test_smooth_values_on_finer_voxels():
    m = 16
    wave = torch.cos(2 * math.pi * torch.arange(m) / m).expand(m, m, m)
    fine = upsampled(wave, 48)
    expected = torch.cos(2 * math.pi * torch.arange(48) / 48).expand(48, 48, 48)
    assert float((fine - expected).abs().max()) < 0.03


def test_what_is_refused():
    with pytest.raises(ShapeError, match="mask"):
        next(bands(ONES, ONES, mask=torch.ones(4, 4, 4), middles=[3.0, 5.0]))
    with pytest.raises(ParameterError, match="bands"):
        next(bands(ONES, ONES, mask=ONES, middles=[3.0]))
