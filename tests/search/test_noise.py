import torch
from pose_simulation import Particle, simulate

from halfmap.search.disc import FourierDisc
from halfmap.search.noise import ResidualSums, residuals
from halfmap.search.projector import SplineVolume

DISC = FourierDisc(32, 12)
PARTICLE = Particle.random(32, count=40, radius_px=9.0)
VOLUME = SplineVolume.of(PARTICLE.volume())


def _sums(part: slice, scales: torch.Tensor, assumed: torch.Tensor) -> tuple[ResidualSums, torch.Tensor]:
    """Group 0 as simulated, group 1 three times as bright."""
    truth = simulate(PARTICLE, DISC, 300, snr=0.3)
    group = (torch.arange(300) >= 150).long()
    coefficients = truth.coefficients * scales[group, None]
    poses = truth.rotations[part], truth.shifts_px[part]
    images = coefficients[part], truth.ctf[part], group[part]
    return residuals(DISC, VOLUME, *images, *poses, scale=assumed), truth.noise[0]


def test_noise_and_scale_of_each_group_are_found():
    scales = torch.tensor([1.0, 3.0])
    sums, noise = _sums(slice(None), scales, scales)
    expected = noise * scales[:, None].square()
    # A mean of n exponential numbers has a relative deviation of 1 / sqrt(n).
    deviation = (sums.count / 2).rsqrt()
    assert bool(((sums.noise() / expected - 1).abs() < 4.5 * deviation).all())
    found = sums.scale(expected.double())
    assert abs(float(found[1] / found[0]) - 3) < 0.1
    assert abs(float(found.mean()) - 1) < 1e-6


def test_sums_of_parts_are_the_sums_of_all():
    scales = torch.ones(2)
    whole, _ = _sums(slice(None), scales, scales)
    parts = _sums(slice(0, 100), scales, scales)[0] + _sums(slice(100, 300), scales, scales)[0]
    for name in ("power", "count", "cross", "model"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-10, atol=1e-6)


def test_groups_without_images_have_the_noise_of_the_others():
    sums, _ = _sums(slice(0, 100), torch.ones(2), torch.ones(2))
    assert torch.equal(sums.noise()[1], sums.noise()[0])
    assert torch.equal(sums.scale(sums.noise()), torch.ones(2, dtype=torch.float64))
