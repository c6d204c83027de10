"""The monogenic signal against plain formulae: its amplitude is that of a wave, whatever the phase."""

import math

import pytest
import torch

from halfmap.ops.fourier import rfft3
from halfmap.ops.grids import coordinates
from halfmap.ops.monogenic import monogenic_power

BOX = 24


def _wave(k: tuple[int, int, int], phase: float) -> torch.Tensor:
    place = coordinates((BOX,) * 3).double()
    return torch.cos(2 * math.pi * (place @ torch.tensor(k).double()) / BOX + phase)


def test_a_plane_wave_is_as_strong_everywhere():
    """Cosine and its Riesz transform, the sine along the wave: their squares add up to one."""
    for k, phase in (((3, 0, 0), 0.0), ((2, -4, 1), 0.7), ((0, 0, 5), 1.3), ((-3, 3, 3), 2.0)):
        power = monogenic_power(rfft3(2.5 * _wave(k, phase)), box=BOX)
        torch.testing.assert_close(power, torch.full_like(power, 2.5**2), rtol=1e-4, atol=1e-4)


def test_the_envelope_of_a_wave_is_followed():
    place = coordinates((BOX,) * 3).double()
    envelope = 1 + 0.5 * torch.cos(2 * math.pi * place[..., 1] / BOX)
    power = monogenic_power(rfft3(envelope * _wave((7, 0, 0), 0.4)), box=BOX)
    assert float((power.sqrt() - envelope).abs().max()) < 0.03


def test_noise_has_twice_its_square():
    """The Riesz transforms together hold as much as the volume itself."""
    noise = torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(1))
    noise -= noise.mean()
    power = monogenic_power(rfft3(noise), box=BOX)
    assert float(power.mean() / noise.square().mean()) == pytest.approx(2.0, abs=0.1)
