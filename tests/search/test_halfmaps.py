"""Maps of half sets: filtered by their correlation, without a part, joined at low frequencies."""

import math
from pathlib import Path

import pytest
import torch
from pose_simulation import Particle, simulate

from halfmap.errors import FileFormatError, ParameterError, ShapeError
from halfmap.ops.fourier import rfft3
from halfmap.ops.fsc import fsc
from halfmap.ops.grids import frequency_radius, ring_index
from halfmap.ops.masks import soft_sphere
from halfmap.ops.rotations import random_rotations
from halfmap.search.backprojector import Backprojection
from halfmap.search.disc import DiscImages, FourierDisc
from halfmap.search.halfmaps import (
    HalfSums,
    believed,
    joined,
    load_sums,
    radius_at,
    save_sums,
    solved,
)
from halfmap.search.projector import SplineVolume, sample_slices

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


@pytest.mark.parametrize("n", [300, 25])
def test_filter_leaves_the_part_that_the_halves_agree_in(n: int):
    """Wiener's filter of one half map is the correlation: amplitudes shrink by it, shell by shell."""
    halves = HalfSums.of((_sums(n, 0), _sums(n, 1)))
    correlation = torch.linspace(1, 0.1, RADIUS + 1)
    raw, shrunk = halves.unfiltered()[0], solved(halves.halves[0], halves.prior(correlation)[0])
    index = ring_index((BOX,) * 3)
    a, b = rfft3(raw), rfft3(shrunk)
    for shell in range(3, RADIUS - 1):
        own = index == shell
        ratio = float((a[own].conj() * b[own]).real.sum() / a[own].abs().square().sum())
        # Weights scatter within a shell, those with more being filtered less.
        assert ratio == pytest.approx(float(correlation[shell]), abs=0.12)


def test_filtered_map_is_nearer_to_the_truth(halves: HalfSums):
    raw = halves.unfiltered()
    filtered = solved(halves.halves[0], halves.prior(believed(fsc(*raw))[: RADIUS + 2])[0])
    truth = PARTICLE.volume()
    low = frequency_radius((BOX,) * 3) * BOX <= RADIUS
    error = [float((rfft3(v) - rfft3(truth))[low].abs().square().sum()) for v in (raw[0], filtered)]
    assert error[1] < 0.7 * error[0]
    with pytest.raises(ParameterError, match="shells"):
        halves.prior(torch.ones(3))


def test_without_a_part_is_as_if_it_had_never_been():
    whole, part, rest = _sums(30, 2), _sums(30, 2, part=slice(0, 10)), _sums(30, 2, part=slice(10, None))
    prior = torch.full((RADIUS + 1,), float(whole.sums.weights.mean()))
    left, alone = solved(whole, prior, without=part), solved(rest, prior)
    assert float((left - alone).abs().max()) < 1e-5 * float(alone.abs().max())
    assert float((solved(whole, prior) - alone).abs().max()) > 0.1 * float(alone.abs().max())
    with pytest.raises(ShapeError):
        solved(whole, prior, without=Backprojection.empty(BOX, RADIUS - 4))


def test_many_views_without_noise_give_the_particle_itself():
    """Size and place of all densities are those of the truth."""
    index = ring_index((BOX,) * 3)
    low = (index >= 3) & (index <= RADIUS - 2)
    sums = _sums(400, 5, snr=1e4)
    prior = torch.full((RADIUS + 1,), 1e-3 * float(sums.sums.weights.mean()))
    found, exact = rfft3(solved(sums, prior))[low], rfft3(PARTICLE.volume())[low]
    assert float((found - exact).abs().square().sum() / exact.abs().square().sum()) < 0.01
    assert float((found.conj() * exact).real.sum() / exact.abs().square().sum()) == pytest.approx(1, abs=0.02)


def test_voxels_of_little_weight_count_for_little():
    """With few views a quotient voxel by voxel is as noisy as its poorest voxels."""
    truth = PARTICLE.volume()
    mask = soft_sphere((BOX,) * 3, radius=10.0, edge=3.0)
    outer = slice(RADIUS - 5, RADIUS - 1)
    better = []
    for seed in range(4):
        sums = HalfSums.of((_sums(25, 2 * seed, snr=1.0), _sums(25, 2 * seed + 1, snr=1.0)))
        floored = sums.unfiltered()[0]
        tiny = 1e-3 * sums.halves[0].sums.weights.mean()
        alone = sums.halves[0].solve(tiny.expand(sums.halves[0].sums.weights.shape))
        curves = [fsc(each * mask, truth * mask)[outer].mean() for each in (floored, alone)]
        better.append(float(curves[0] - curves[1]))
    assert min(better) > 0.02


def test_sums_that_are_not_halfmap_s_are_refused(tmp_path: Path):
    (tmp_path / "a.npy").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match="no sums"):
        load_sums(tmp_path / "a.npy", BOX, 2 * BOX)


def test_sums_mapped_into_memory_are_those_saved(tmp_path: Path):
    sums = _sums(5, 0)
    save_sums(tmp_path / "a.npy", sums)
    assert torch.equal(load_sums(tmp_path / "a.npy", BOX, 2 * BOX).sums.data, sums.sums.data)


@pytest.mark.parametrize("padding", [2.0, 1.5])
def test_map_is_that_of_the_transform_as_a_whole(padding: float):
    """Against a division of all voxels at once and one inverse transform of the padded box."""
    images = simulate(PARTICLE, DISC, 30, snr=0.5, seed=1)
    sums = Backprojection.empty(BOX, RADIUS, padding=padding)
    sums.add(images.images, images.rotations, images.shifts_px)
    prior = float(sums.sums.weights.mean())
    whole = sums.solve(torch.tensor(prior))
    found = solved(sums, torch.full((RADIUS + 1,), prior))
    assert float((found - whole).abs().max()) < 1e-5 * float(whole.abs().max())


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


def test_views_that_are_missing_cost_correlation_with_the_truth():
    """Half maps of views near one axis agree as well as others, but less of what they agree in is there."""
    generator = torch.Generator().manual_seed(4)
    disc = FourierDisc(BOX, RADIUS)
    every = random_rotations(4000, generator=generator, dtype=torch.float64)
    near = every[every[:, 2, 2].abs() > math.cos(math.radians(40.0))]
    found = {}
    for name, rotations in (("all", every[: len(near)]), ("near", near)):
        slices = sample_slices(
            SplineVolume.of(PARTICLE.volume(), radius_px=RADIUS + 1), rotations, disc.points
        )
        sums = []
        for _ in range(2):
            noise = torch.randn(*slices.shape, 2, generator=generator) * float(
                slices.abs().square().mean().sqrt()
            )
            images = DiscImages(disc, slices + torch.view_as_complex(noise), torch.ones(slices.shape))
            sums.append(Backprojection.empty(BOX, RADIUS))
            sums[-1].add(images, rotations, torch.zeros(len(rotations), 2))
        halves = HalfSums.of((sums[0], sums[1]))
        first, second = halves.unfiltered()
        agreed, true = fsc(first, second), fsc((first + second) / 2, PARTICLE.volume())
        inner = slice(3, RADIUS - 1)
        stated = (2 * agreed / (1 + agreed))[inner]
        found[name] = (float((true[inner].square() / stated).mean()), float(halves.evenness[:, inner].mean()))
    assert found["all"][0] == pytest.approx(1.0, abs=0.06)
    assert found["all"][1] > 0.93
    assert found["near"][0] < 0.85
    assert found["near"][1] == pytest.approx(found["near"][0], abs=0.12)
