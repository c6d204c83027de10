"""Maps of half sets: filtered by their correlation, without a part, joined at low frequencies."""

from pathlib import Path

import pytest
import torch
from pose_simulation import Particle, simulate

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops.fourier import rfft3
from halfmap.ops.fsc import fsc
from halfmap.ops.grids import frequency_radius, ring_index
from halfmap.search.backprojector import Backprojection
from halfmap.search.disc import DiscImages, FourierDisc
from halfmap.search.halfmaps import HalfSums, believed, joined, radius_at, without

BOX, RADIUS = 32, 12
PARTICLE = Particle.random(BOX, count=40, radius_px=9.0)
DISC = FourierDisc(BOX, RADIUS)


def _sums(n: int, seed: int, snr: float = 0.2, part: slice = slice(None)) -> Backprojection:
    truth = simulate(PARTICLE, DISC, n, snr=snr, seed=seed)
    images = DiscImages(DISC, truth.images.linear[part], truth.images.squared[part])
    sums = Backprojection.empty(BOX, RADIUS)
    sums.add(images, truth.rotations[part], truth.shifts_px[part])
    return sums


@pytest.fixture(scope="module")
def halves() -> HalfSums:
    return HalfSums.of((_sums(300, 0), _sums(300, 1)))


def test_filter_leaves_the_part_that_the_halves_agree_in(halves: HalfSums):
    """Wiener's filter of one half map is the correlation: amplitudes shrink by it, shell by shell."""
    correlation = torch.linspace(1, 0.1, RADIUS + 1)
    raw, shrunk = halves.unfiltered()[0], halves.halves[0].solve(halves.prior(correlation))
    index = ring_index((BOX,) * 3)
    a, b = rfft3(raw), rfft3(shrunk)
    for shell in range(3, RADIUS - 1):
        own = index == shell
        ratio = float((a[own].conj() * b[own]).real.sum() / a[own].abs().square().sum())
        # Weights scatter within a shell, those with more being filtered less.
        assert ratio == pytest.approx(float(correlation[shell]), abs=0.12)


def test_filtered_map_is_nearer_to_the_truth(halves: HalfSums):
    raw = halves.unfiltered()
    filtered = halves.halves[0].solve(halves.prior(believed(fsc(*raw))[: RADIUS + 2]))
    truth = PARTICLE.volume()
    low = frequency_radius((BOX,) * 3) * BOX <= RADIUS
    error = [float((rfft3(v) - rfft3(truth))[low].abs().square().sum()) for v in (raw[0], filtered)]
    assert error[1] < 0.7 * error[0]
    with pytest.raises(ParameterError, match="shells"):
        halves.prior(torch.ones(3))


def test_without_a_part_is_as_if_it_had_never_been():
    whole, part, rest = _sums(30, 2), _sums(30, 2, part=slice(0, 10)), _sums(30, 2, part=slice(10, None))
    left = without(whole, part)
    assert float((left.sums.data - rest.sums.data).abs().max()) < 1e-5 * float(whole.sums.data.abs().max())
    assert float(left.sums.weights.min()) >= 0
    with pytest.raises(ShapeError):
        without(whole, Backprojection.empty(BOX, RADIUS - 4))


def test_joined_maps_share_what_is_coarse_only():
    a, b = torch.randn(2, BOX, BOX, BOX, generator=torch.Generator().manual_seed(1))
    first, second = joined(a, b, radius=5.0), joined(b, a, radius=5.0)
    low = frequency_radius((BOX,) * 3) * BOX < 5.0
    assert torch.allclose(rfft3(first)[low], rfft3(second)[low], atol=1e-3)
    assert torch.allclose(rfft3(first)[~low], rfft3(a)[~low], atol=1e-2)


def test_correlation_is_believed_until_it_is_gone():
    curve = torch.tensor([0.2, 0.9, 0.5, 0.01, 0.4])
    assert believed(curve).tolist() == pytest.approx([0.2, 0.9, 0.5, 0.0, 0.0])
    assert radius_at(curve, 0.143) == 2
    assert radius_at(torch.zeros(4), 0.143) == 0


def test_sums_survive_files(tmp_path: Path):
    sums = _sums(10, 3)
    sums.save(tmp_path / "a.npz")
    assert torch.equal(Backprojection.load(tmp_path / "a.npz").sums.data[..., :3], sums.sums.data[..., :3])
