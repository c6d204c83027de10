"""Noise that depends on the direction is taken out of spectra, and rings are left as they are."""

import numpy as np
import pytest
from numpy.typing import NDArray

from halfmap.ops.ctf import ctf
from halfmap.steps.ctf.directions import level_directions
from halfmap.steps.ctf.tiles import Bins, polar_bins

BOX, PIXEL = 512, 1.4


@pytest.fixture(scope="module")
def bins() -> Bins:
    return polar_bins(BOX, BOX * PIXEL, 1 / 30, 1 / 3)


def _mean(values: NDArray, bins: Bins) -> NDArray:
    inside = bins.index >= 0
    sums = np.bincount(bins.index[inside], values[inside], bins.count.size)
    return (sums / np.maximum(bins.count.ravel(), 1)).reshape(1, *bins.count.shape)


def _noise(seed: int) -> NDArray:
    """Power of 40 tiles of white noise, averaged."""
    return np.random.default_rng(seed).gamma(40, 1 / 40, (BOX, BOX // 2 + 1))


def _interpolation() -> NDArray:
    """What is left of noise that was moved by linear interpolation by random parts of a pixel."""
    ky, kx = np.fft.fftfreq(BOX)[:, None], np.fft.rfftfreq(BOX)
    return np.prod([(2 + np.cos(2 * np.pi * k)) / 3 for k in np.broadcast_arrays(ky, kx)], axis=0)


def _spread(power: NDArray, bins: Bins) -> float:
    """Largest deviation of the outermost tenth of rings, averaged, from their mean."""
    outer = power[0, -len(power[0]) // 10 :]
    sectors = np.average(outer, axis=0, weights=bins.count[-len(power[0]) // 10 :])
    return float(np.abs(sectors / sectors.mean() - 1).max())


def test_what_interpolation_leaves_is_level_in_all_directions(bins):
    power = _mean(_noise(1) * _interpolation(), bins)
    level = level_directions(power, bins.count, bins.frequency, 0.5 / PIXEL)
    assert _spread(power, bins) > 0.1
    assert _spread(level, bins) < 0.02


@pytest.mark.parametrize(("defocus", "astigmatism"), [(3_000.0, 1_000.0), (12_000.0, 600.0), (30_000.0, 0.0)])
def test_rings_are_left_as_they_are(bins, defocus, astigmatism):
    waves = ctf(
        (BOX, BOX),
        pixel_size=PIXEL,
        defocus_u=defocus + astigmatism / 2,
        defocus_v=defocus - astigmatism / 2,
        defocus_angle=20.0,
        voltage_kV=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.1,
        b_factor=40.0,
    )
    power = _mean(0.6 + 0.8 * np.square(np.asarray(waves)), bins)
    level = level_directions(power, bins.count, bins.frequency, 0.5 / PIXEL)
    assert np.abs(level / power - 1).max() < 0.05
    assert np.sqrt(np.mean(np.square(level / power - 1))) < 0.02
