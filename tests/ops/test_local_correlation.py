"""Local correlation of half maps, band by band, against sums over windows written out."""

import math

import pytest
import torch

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.grids import coordinates, ring_index
from halfmap.ops.local_correlation import bands, in_bands, put_back, shells, upsampled, within_band
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


def test_shells_are_compared_with_their_factors():
    """A band of maps whose finer shells are raised correlates by these; the band itself is as it was."""
    first = irfft3(rfft3(_random(1)) * low_pass((BOX,) * 3, pixel_size=1.0, resolution=4.0), shape=(BOX,) * 3)
    second = first + 0.5 * _random(2)
    transfer = torch.exp(40 * (torch.arange(BOX // 2 + 1) / BOX).double())
    found = bands(first, second, mask=ONES, middles=shells(BOX, 4.0), transfer=transfer)
    plain = bands(first, second, mask=ONES, middles=shells(BOX, 4.0))
    falls = []
    for band, before in zip(found, plain, strict=True):
        torch.testing.assert_close(band.mean, before.mean)
        factors = within_band(transfer, len(band.mean), band.outer)
        raised = (rfft3(each) * factors for each in (band.mean + band.apart, band.mean - band.apart))
        one, two = (irfft3(each, shape=band.mean.shape) for each in raised)
        expected = 2 * (one * two).mean() / (one.square() + two.square()).mean()
        signal, noise = (each.mean() for each in (band.signal, band.noise))
        assert float(signal / (signal + noise)) == pytest.approx(float(expected), abs=1e-3)
        falls.append(float((before.correlation - band.correlation).mean()))
    assert max(falls) > 0.1


def test_steep_factors_do_not_exceed_single_precision():
    steep = torch.exp(2.5 * torch.arange(BOX // 2 + 1).double())
    for band in bands(_random(1), _random(2), mask=ONES, middles=shells(BOX, 4.0), transfer=steep):
        assert bool(band.correlation.isfinite().all())
        assert float(band.correlation.abs().mean()) < 0.5


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


def test_bands_are_multiplied_by_weights_of_their_own():
    """Against each band of the whole map times its weights, added up."""
    volume = _random(3)
    middles = shells(BOX, 4.0)
    z = torch.arange(BOX) / BOX

    def local(number: int, m: int) -> torch.Tensor | float:
        if number < 2:
            return float(number)
        place = torch.arange(m) / m
        return (0.5 + 0.4 * torch.cos(2 * math.pi * place + number))[:, None, None].expand(m, m, m)

    found = in_bands(volume, middles=middles, weight=local)
    expected = torch.zeros_like(volume)
    for number, band in enumerate(bands(volume, volume, mask=ONES, middles=middles)):
        whole = torch.zeros(BOX, BOX, BOX // 2 + 1, dtype=torch.complex64)
        put_back(whole, band.mean, BOX)
        part = irfft3(whole, shape=volume.shape)
        weight = number if number < 2 else (0.5 + 0.4 * torch.cos(2 * math.pi * z + number))[:, None, None]
        expected += part * weight
    within = (ring_index((BOX,) * 3) < BOX // 2 - 3).float()
    compared = [irfft3(rfft3(each) * within, shape=volume.shape) for each in (found, expected)]
    assert float((compared[0] - compared[1]).norm()) < 0.03 * float(compared[1].norm())
    whole = in_bands(volume, middles=middles, weight=lambda number, m: 1.0)
    torch.testing.assert_close(
        rfft3(whole) * within, rfft3(volume) * within, rtol=1e-3, atol=1e-3 * float(rfft3(volume).abs().max())
    )
