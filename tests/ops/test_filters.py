"""Filters at the frequencies they name, and radial averages against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops import filters, fourier, grids


def test_low_pass_is_one_half_at_its_resolution_with_the_edge_asked_for():
    shape, pixel = (120, 100), 1.5
    values = filters.low_pass(shape, pixel_size=pixel, resolution=9.0, edge_px=4.0)
    assert values.shape == (120, 51)
    radius = grids.frequency_radius(shape, pixel, dtype=torch.float64) * 120 * pixel  # px of the longest side
    limit = 120 * pixel / 9.0
    assert (values[radius <= limit - 2] == 1).all()
    assert (values[radius >= limit + 2] == 0).all()
    inside = (radius - limit).abs() < 2
    expected = 0.5 * (1 - torch.sin(torch.pi * (radius[inside] - limit) / 4))
    torch.testing.assert_close(values[inside], expected.float())


def test_sharp_low_pass_high_pass_and_band_pass():
    shape = (32, 32, 32)
    k = grids.frequency_radius(shape, 2.0, dtype=torch.float64)
    sharp = filters.low_pass(shape, pixel_size=2.0, resolution=8.0, edge_px=0.0)
    torch.testing.assert_close(sharp, (k <= 1 / 8).float())
    low = filters.low_pass(shape, pixel_size=2.0, resolution=6.0)
    coarse = filters.high_pass(shape, pixel_size=2.0, resolution=20.0)
    torch.testing.assert_close(filters.low_pass(shape, pixel_size=2.0, resolution=20.0), 1 - coarse)
    band = filters.band_pass(shape, pixel_size=2.0, low_resolution=20.0, high_resolution=6.0)
    torch.testing.assert_close(band, low * coarse)
    assert band[0, 0, 0] == 0
    assert band.max() == 1


def test_b_factor_is_a_gaussian():
    values = filters.b_factor((16, 16), pixel_size=1.1, b_factor=80.0, dtype=torch.float64)
    k = grids.frequencies((16, 16), 1.1, dtype=torch.float64)
    torch.testing.assert_close(values, torch.exp(-20.0 * (k[..., 0] ** 2 + k[..., 1] ** 2)))


def test_a_passed_wave_keeps_its_amplitude_and_a_stopped_one_vanishes():
    shape, pixel = (64, 64), 1.0
    x = torch.arange(64.0)
    slow, fast = torch.cos(2 * torch.pi * 4 * x / 64), torch.cos(2 * torch.pi * 20 * x / 64)
    image = (slow + fast).expand(64, 64)
    kept = fourier.rfft2(image) * filters.low_pass(shape, pixel_size=pixel, resolution=64 / 12)
    torch.testing.assert_close(fourier.irfft2(kept, shape=shape), slow.expand(64, 64), atol=1e-5, rtol=0)


def test_radial_average_and_back():
    shape = (10, 12)
    values = torch.rand(2, 10, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rings = grids.ring_index(shape)
    averages = filters.radial_average(values, shape=shape)
    assert averages.shape == (2, 7)
    for ring in range(7):
        total = count = 0.0
        for row in range(10):
            for column in range(7):
                if rings[row, column] == ring:
                    weight = 1 if column in (0, 6) else 2
                    total, count = total + weight * values[1, row, column].item(), count + weight
        assert averages[1, ring].item() == pytest.approx(total / count, rel=1e-12)
    grid = filters.radial_profile_to_grid(averages, shape=shape)
    assert grid.shape == values.shape
    for row, column in [(0, 0), (3, 4), (9, 2), (5, 6)]:
        assert grid[0, row, column] == averages[0, min(int(rings[row, column]), 6)]


@pytest.mark.parametrize("shape", [(40, 40), (12, 14, 16)])
def test_whitening_flattens_coloured_noise(shape):
    noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 3
    ndim = len(shape)
    forward = fourier.rfft2 if ndim == 2 else fourier.rfft3
    spectrum = forward(noise) / (1 + 9 * grids.frequency_radius(shape, dtype=torch.float64))
    white = spectrum * filters.whitening(spectrum, shape=shape)
    power = filters.radial_average(white.abs().square(), shape=shape)
    torch.testing.assert_close(power, torch.full_like(power, float(np.prod(shape))))


def test_whitening_leaves_empty_rings_empty():
    spectrum = torch.zeros(8, 5, dtype=torch.complex64)
    spectrum[0, 1] = 3j
    gain = filters.whitening(spectrum, shape=(8, 8))
    assert torch.isfinite(gain).all()
    assert gain[0, 3] == 0


def test_filters_that_cannot_be_are_refused():
    with pytest.raises(ParameterError, match="no low-pass"):
        filters.low_pass((8, 8), pixel_size=1.0, resolution=-3.0)
    with pytest.raises(ParameterError, match="larger number"):
        filters.band_pass((8, 8), pixel_size=1.0, low_resolution=4.0, high_resolution=9.0)
    with pytest.raises(ShapeError, match="not real ones"):
        filters.radial_average(torch.zeros(8, 4), shape=(8, 8))
    with pytest.raises(ShapeError, match="not real ones"):
        filters.radial_average(torch.zeros(8, 5, dtype=torch.complex64), shape=(8, 8))
