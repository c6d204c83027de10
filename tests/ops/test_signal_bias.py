"""Signal, noise and bias of denoised halves, against images in which each is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfmap.errors import ShapeError
from halfmap.ops.filters import radial_profile_to_grid
from halfmap.ops.fourier import irfft2, rfft2
from halfmap.ops.signal_bias import HalfPowers, error_power, half_powers, joined_at

SHAPE, SIZE = (768, 1024), 128


def coloured(seed: int, power: Tensor) -> Tensor:
    """White noise with a power by frequency, given from 0 to Nyquist."""
    white = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    rings = max(SHAPE) // 2 + 1
    profile = torch.nn.functional.interpolate(power[None, None], rings, mode="linear", align_corners=True)
    return irfft2(rfft2(white) * radial_profile_to_grid(profile[0, 0].sqrt(), shape=SHAPE), shape=SHAPE)


FREQUENCY = torch.linspace(0, 1, 65)
SIGNAL = 0.5 * torch.exp(-3 * FREQUENCY)
BIAS = 0.1 * torch.exp(-2 * FREQUENCY)
PASSED = 0.3 * torch.exp(-2 * FREQUENCY)
"""Power of the noise after denoising, which is part of the noise before it."""
FAINTER = 0.8


def images(*, bias: bool = True) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    signal = coloured(1, SIGNAL)
    beside = coloured(2, BIAS) if bias else torch.zeros(SHAPE)
    noise = [coloured(seed, torch.ones(65)) for seed in (3, 4)]
    kept = [coloured(seed, PASSED) for seed in (3, 4)]  # the same noise, filtered
    raw = signal + noise[0], signal + noise[1]
    return raw, (FAINTER * signal + beside + kept[0], FAINTER * signal + beside + kept[1])


def rings(profile: Tensor) -> Tensor:
    """A profile at the rings of a window."""
    return torch.nn.functional.interpolate(
        profile[None, None], SIZE // 2 + 1, mode="linear", align_corners=True
    )[0, 0].double()


@pytest.fixture(scope="module")
def powers() -> HalfPowers:
    return half_powers(*images(), size=SIZE)


@pytest.mark.parametrize(
    ("name", "truth"),
    [
        ("signal", SIGNAL),
        ("noise_before", torch.ones(65)),
        ("noise_after", PASSED),
        ("bias", BIAS + (1 - FAINTER) ** 2 * SIGNAL),
        ("bias_beside", BIAS),
        ("common_after", BIAS + FAINTER**2 * SIGNAL),
    ],
)
def test_powers_are_those_that_were_put_in(powers: HalfPowers, name: str, truth: Tensor):
    """In total within five percent, as asked of estimators; in each ring within four standard errors."""
    wanted = rings(truth)
    total = getattr(powers.total(), name)
    assert float(total) == pytest.approx(
        float((wanted * powers.counts)[1:].sum() / powers.counts[1:].sum()), rel=0.05
    )
    found, error = powers.with_error(lambda each: getattr(each, name))
    inner = slice(4, SIZE // 2 - 2)
    off = ((found - wanted) / error)[inner]
    assert float(off.abs().max()) < 5
    assert float(off.square().mean()) < 2


def test_transfer_and_correlations(powers: HalfPowers):
    whole = powers.total()
    assert float(whole.transfer) == pytest.approx(FAINTER, rel=0.03)
    signal, noise = float(whole.signal), float(whole.noise_before)
    assert float(whole.frc_before) == pytest.approx(signal / (signal + noise))
    beside, left = float(whole.bias_beside), float(whole.noise_after)
    truth = FAINTER * signal / (signal * (FAINTER**2 * signal + beside + left)) ** 0.5
    assert float(whole.frc_across) == pytest.approx(truth, rel=0.03)
    assert float(whole.frc_after) > float(whole.frc_across) ** 2, "bias is common to both halves"


def test_without_bias_none_is_found():
    whole = half_powers(*images(bias=False), size=SIZE)
    found, error = whole.total().with_error(lambda each: each.bias_beside)
    assert abs(float(found)) < 4 * float(error)
    assert float(found) < 0.05 * float(whole.total().signal)


def test_errors_are_how_much_values_scatter():
    values, errors = [], []
    for seed in range(12):
        white = [
            torch.randn(512, 512, generator=torch.Generator().manual_seed(10 * seed + i)) for i in range(2)
        ]
        powers = half_powers((white[0], white[1]), (white[0], white[1]), size=64)
        value, error = powers.with_error(lambda each: each.coarser(8).signal)
        values.append(value)
        errors.append(error)
    scatter = torch.stack(values).std(0).mean()
    # Windows overlap by half, and are not quite independent.
    assert float(torch.stack(errors).mean() / scatter) == pytest.approx(1.0, abs=0.3)


def test_windows_lie_in_what_is_usable():
    raw, denoised = images()
    usable = torch.zeros(SHAPE, dtype=torch.bool)
    usable[:, : SHAPE[1] // 2] = True
    assert len(half_powers(raw, denoised, size=SIZE, usable=usable).sums) == 11 * 7
    with pytest.raises(ShapeError, match="no window of 128 px"):
        half_powers(raw, denoised, size=SIZE, usable=torch.zeros(SHAPE, dtype=torch.bool))
    with pytest.raises(ShapeError, match="different shapes"):
        half_powers(raw, (denoised[0], denoised[1][1:]), size=SIZE)


def test_windows_of_two_images_add_up(powers: HalfPowers):
    double = powers + powers
    torch.testing.assert_close(double.signal, powers.signal)
    assert len(double.sums) == 2 * len(powers.sums)
    with pytest.raises(ShapeError, match="different sizes"):
        powers + half_powers(*images(), size=64)


def test_errors_are_noise_and_bias_of_the_denoised_part_and_noise_of_the_raw_one():
    """Signal 1, noise 4; of amplitude a half, noise 0.2 and bias 0.25 after, and bias 8 from ring 40 on."""
    ones = torch.ones(65, dtype=torch.float64)
    bias = torch.where(torch.arange(65) >= 40, 8.0, 0.25).double()
    common = 0.25 + bias
    found = HalfPowers(torch.stack([5 * ones, ones, common + 0.2, common, 0.5 * ones])[None], ones)
    places, denoised, amplitude = error_power(found, "denoised")
    clear = places < 36
    torch.testing.assert_close(denoised[clear], torch.full((int(clear.sum()),), 0.35).double())
    assert float(denoised[-1]) == pytest.approx(8.1)
    torch.testing.assert_close(amplitude[clear], torch.full((int(clear.sum()),), 0.5).double())
    _, merged, amplitude = error_power(found, "merged")
    assert bool((amplitude == 1).all())
    torch.testing.assert_close(merged[clear], denoised[clear] / 0.25)
    beyond = places >= joined_at(found)[0]
    torch.testing.assert_close(merged[beyond], torch.full((int(beyond.sum()),), 2.0).double())
