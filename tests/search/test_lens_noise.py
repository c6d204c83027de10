"""Both parts of the noise, from images whose CTFs differ."""

import torch

from halfmap.ops.fourier import irfft2, rfft2
from halfmap.ops.grids import ring_index, ring_sums
from halfmap.ops.masks import soft_circle
from halfmap.search.disc import FourierDisc
from halfmap.search.lens_noise import LensNoise, NoiseSums, leakage, ring_means

RINGS, N = 12, 4000


def _draw(groups: int = 2) -> tuple[LensNoise, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    ring = torch.arange(RINGS, dtype=torch.float64)
    detector = torch.stack([1 + 0.1 * ring, 2 + 0 * ring])[:groups]
    specimen = torch.stack([3 * torch.exp(-ring / 5), torch.exp(-ring / 3)])[:groups]
    group = torch.arange(N) % groups
    transfer = torch.rand(N, RINGS, generator=generator, dtype=torch.float64)
    mean = detector[group] + specimen[group] * transfer
    # Power of 20 coefficients of each ring.
    drawn = torch.randn(N, RINGS, 20, generator=generator, dtype=torch.float64)
    return LensNoise(detector, specimen), group, transfer, mean * drawn.square().mean(-1)


def test_both_parts_are_found():
    truth, group, transfer, power = _draw()
    sums = NoiseSums.empty(2, RINGS)
    for part in (slice(0, 1500), slice(1500, None)):
        sums.add(power[part], transfer[part], group[part])
    found = sums.fit()
    # Errors of a line through 2,000 points that scatter by sqrt(2 / 20) of their height of 4 at most.
    error = 4 * (0.1**0.5) * 12**0.5 / 2000**0.5
    assert float((found.specimen - truth.specimen).abs().max()) < 4 * error
    assert float((found.detector - truth.detector).abs().max()) < 3 * error
    likely = found.of_images(group, transfer)
    assert abs(float((power / likely).mean()) - 1) < 0.01


def test_images_of_one_defocus_give_their_mean_power():
    sums = NoiseSums.empty(2, RINGS)
    power, transfer = torch.rand(50, RINGS) + 1, torch.full((50, RINGS), 0.4)
    sums.add(power, transfer, torch.zeros(50, dtype=torch.int64))
    found = sums.fit()
    at = found.of_images(torch.tensor([0, 1]), transfer[:2])
    # The group without images has the noise of the other.
    assert torch.allclose(at, power.mean(0).expand(2, -1), rtol=1e-5)


def test_no_part_is_negative():
    """Noise that falls where the CTF rises is no noise of the specimen."""
    sums = NoiseSums.empty(1, RINGS)
    transfer = torch.linspace(0, 1, 40)[:, None].expand(-1, RINGS)
    sums.add(2 - transfer, transfer, torch.zeros(40, dtype=torch.int64))
    found = sums.fit()
    assert float(found.specimen.abs().max()) == 0
    sums = NoiseSums.empty(1, RINGS)
    sums.add(transfer**2, transfer, torch.zeros(40, dtype=torch.int64))
    assert float(sums.fit().detector.min()) > 0


def test_power_leaks_through_masks_as_foretold():
    """Noise that ends at a ring, masked: power beyond it, against images drawn."""
    box, end = 48, 14
    mask = soft_circle((box, box), radius=16.0, edge=3.0).double()
    index = ring_index((box, box))
    noise = torch.randn(600, box, box, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = irfft2(rfft2(noise) * torch.where(index < end, 1.0, 1e-3), shape=(box, box))
    count = ring_sums(torch.ones(index.shape, dtype=torch.float64), shape=(box, box))
    whole_power, masked_power = (
        (ring_sums(rfft2(each).abs().square(), shape=(box, box)).mean(0) / count)[: box // 2]
        for each in (whole, whole * mask)
    )
    expected = leakage(mask) @ whole_power
    found = masked_power / mask.square().mean()
    assert float(found[end + 1] / whole_power[end + 1]) > 1e3
    # Outermost rings also have power from the corners.
    assert float((found / expected - 1).abs()[1 : box // 2 - 4].max()) < 0.1
    flat = leakage(mask) @ torch.ones(box // 2, dtype=torch.float64)
    assert torch.allclose(flat, torch.ones_like(flat))


def test_ring_means():
    disc = FourierDisc(20, 6)
    assert torch.allclose(ring_means(disc, disc.rings[None].float()), torch.arange(7.0)[None])
