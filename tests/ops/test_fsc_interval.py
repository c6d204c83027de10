"""The interval of a resolution: how often it holds the true one, and what masks do to it."""

import math

import numpy as np
import pytest
import torch

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.fsc import fsc, resolution
from halfmap.ops.fsc_interval import Scatter, noise_scatter, resolution_interval
from halfmap.ops.grids import frequency_radius, ring_sums
from halfmap.ops.masks import soft_sphere

BOX, PIXEL = 40, 2.0
MASK = soft_sphere((BOX,) * 3, radius=25.0, edge=8.0, pixel_size=PIXEL)


def _random(seed: int, count: int = 1) -> torch.Tensor:
    return torch.randn(count, BOX, BOX, BOX, generator=torch.Generator().manual_seed(seed))


def test_scatter_is_that_of_noise_in_the_mask():
    scatter = noise_scatter(MASK, generator=torch.Generator().manual_seed(1))
    first, second = _random(2, 60) * MASK, _random(3, 60) * MASK
    z = fsc(first, second).double().atanh()[:, 4:]
    stated = scatter.deviation[4:]
    assert float((z / stated).std()) == pytest.approx(1.0, abs=0.06)
    near = (z[:, 1:] * z[:, :-1]).mean() / z.square().mean()
    assert float(scatter.neighbours[1]) == pytest.approx(float(near), abs=0.1)


def test_a_mask_of_everything_leaves_all_coefficients_independent():
    scatter = noise_scatter(torch.ones(BOX, BOX, BOX), generator=torch.Generator().manual_seed(1))
    assert scatter.share == pytest.approx(1.0, abs=0.1)
    counts = ring_sums(torch.ones(BOX, BOX, BOX // 2 + 1), shape=(BOX,) * 3)
    assert float(scatter.deviation[15]) == pytest.approx(float(counts[15]) ** -0.5, rel=0.1)
    assert float(scatter.neighbours[1:].abs().max()) < 0.2


def test_the_interval_holds_the_true_resolution():
    """About as often as it says, of noise drawn again and again around one map."""
    fall = torch.exp(-120 * frequency_radius((BOX,) * 3, PIXEL).square())
    signal = irfft3(rfft3(_random(5)[0]) * fall, shape=(BOX,) * 3)
    signal = signal * soft_sphere((BOX,) * 3, radius=20.0, edge=8.0, pixel_size=PIXEL)
    signal /= signal.std()
    power = ring_sums(rfft3(signal * MASK).abs().square(), shape=(BOX,) * 3)
    counts = ring_sums(torch.ones(BOX, BOX, BOX // 2 + 1), shape=(BOX,) * 3)
    expected = power / (power + counts * float(MASK.square().sum()))
    where = {"pixel_size": PIXEL, "box": BOX}
    true = resolution(expected, **where)
    scatter = noise_scatter(MASK, generator=torch.Generator().manual_seed(1))
    held, widths = 0, []
    for seed in range(40):
        first, second = signal + _random(100 + seed, 2)
        interval = resolution_interval(fsc(first * MASK, second * MASK), scatter, **where, draws=300)
        held += interval.fine <= true <= interval.coarse
        widths.append(interval.coarse - interval.fine)
    assert held >= 34
    assert float(np.mean(widths)) < 0.1 * true
    # Of half the level, it holds the true one far less often.
    narrow = resolution_interval(fsc(first * MASK, second * MASK), scatter, **where, level=0.4, draws=300)
    assert narrow.coarse - narrow.fine < 0.5 * widths[-1]


def test_a_curve_that_never_falls_ends_at_the_last_shell():
    scatter = Scatter(torch.full((21,), 0.01).double(), torch.tensor([1.0, 0.0]).double(), 1.0)
    interval = resolution_interval(torch.ones(21), scatter, pixel_size=2.0, box=40)
    assert interval.fine == interval.coarse == pytest.approx(4.0)
    none = resolution_interval(torch.zeros(21), scatter, pixel_size=2.0, box=40)
    assert none.coarse == pytest.approx(80.0)
    assert math.isfinite(none.fine)


def test_what_is_refused():
    with pytest.raises(ParameterError, match="empty mask"):
        noise_scatter(torch.zeros(8, 8, 8))
    with pytest.raises(ShapeError, match="shells"):
        scatter = Scatter(torch.ones(5).double(), torch.ones(1).double(), 1.0)
        resolution_interval(torch.ones(6), scatter, pixel_size=1.0, box=10)


def test_the_interval_holds_what_is_read_off_a_curve_that_rises_again():
    scatter = noise_scatter(MASK, generator=torch.Generator().manual_seed(1))
    curve = torch.cat([torch.ones(8), torch.tensor([0.1]), torch.full((6,), 0.7), torch.zeros(6)])
    where = {"pixel_size": PIXEL, "box": BOX}
    found, interval = resolution(curve, **where), resolution_interval(curve, scatter, **where)
    assert interval.fine <= found <= interval.coarse
    assert interval.fine < 0.7 * found
