"""How surely images say how they lie, against a map with noise of its own."""

import math

import pytest
import torch
from pose_simulation import Particle, simulate

from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.fsc import fsc
from halfmap.ops.grids import ring_index
from halfmap.ops.masks import soft_sphere
from halfmap.ops.rotations import random_rotations, to_rotation_vector
from halfmap.search.disc import FourierDisc
from halfmap.search.local import refine_poses, slice_tangents
from halfmap.search.pose_information import nothing_but_signal, pose_information, without_noise
from halfmap.search.projector import SplineVolume

BOX, RADIUS = 32, 10
THIN = Particle(Particle.random(BOX, count=60, radius_px=9.0).atoms * torch.tensor([0.25, 0.25, 1.0]), BOX)
"""A rod along z, in a mask that is much wider."""

NOISE, SHARE = torch.ones(RADIUS + 1), 0.75
SHELLS = ring_index((BOX,) * 3).clamp_max(BOX // 2)
MASK = soft_sphere((BOX,) * 3, radius=11.0, edge=2.0)
DEVIATION = 0.2


def _noisy(seed: int, deviation: float) -> torch.Tensor:
    """The map within its mask, with white noise over the map's standard deviation."""
    volume = THIN.volume()
    noise = torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(seed))
    return (volume + noise * volume.std() * deviation) * MASK


def _filtered(volume: torch.Tensor, correlation: torch.Tensor) -> torch.Tensor:
    return irfft3(rfft3(volume) * correlation[SHELLS], shape=volume.shape)


def _halves(deviation: float = DEVIATION, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Half maps and their correlation."""
    maps = _noisy(seed, deviation), _noisy(seed + 1, deviation)
    curve = fsc(*maps)
    return *maps, torch.where(torch.arange(len(curve)) <= RADIUS, curve, 0).clamp_min(0)


def _reference(seed: int, correlation: torch.Tensor, deviation: float = DEVIATION) -> torch.Tensor:
    """As of three quarters of the images of a half map."""
    f = correlation / (correlation + (1 - correlation) / SHARE)
    return _filtered(_noisy(seed, deviation / math.sqrt(SHARE)), f)


def _parts(shown: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigvals(torch.linalg.solve(shown, held)).real.sort().values


def test_maps_without_noise_hold_what_they_show():
    volume = THIN.volume()
    ones = (torch.arange(BOX // 2 + 1) <= RADIUS).float()
    shown, held = pose_information(volume, volume, correlation=ones, noise=NOISE, share=SHARE)
    torch.testing.assert_close(shown, held)
    # Turns about the rod change less.
    assert float(shown[2, 2]) < 0.3 * float(shown[0, 0])


@pytest.mark.parametrize(("deviation", "off"), [(DEVIATION, 0.01), (0.6, 0.02)])
def test_what_is_held_is_what_references_and_the_particle_change_by_together(deviation, off):
    """Of slices of references that are filtered as they are to be."""
    f = torch.stack([_halves(deviation, 2 * seed)[2] for seed in range(20)]).mean(0)
    found = [
        pose_information(*_halves(deviation, 2 * seed)[:2], correlation=f, noise=NOISE, share=SHARE)
        for seed in range(20)
    ]
    shown, held = torch.stack(found).mean(0)
    generator = torch.Generator().manual_seed(1)
    points = FourierDisc(BOX, RADIUS).points
    rotations = random_rotations(200, generator=generator, dtype=torch.float64)
    sums = torch.zeros(2, 3, 3).double()
    for seed in range(8):
        own, other = (
            slice_tangents(SplineVolume.of(each, radius_px=RADIUS + 1), rotations, points)[1][:, :3]
            for each in (_reference(50 + seed, f, deviation), THIN.volume())
        )
        for i, each in enumerate((own, other)):
            products = (own[:, :, None] * each[:, None].conj()).real.double().sum(-1)
            sums[i] += (rotations.transpose(1, 2) @ products @ rotations).sum(0)
    expected = _parts(*sums)
    assert float(expected[0]) < 0.8
    torch.testing.assert_close(_parts(shown[:3, :3], held[:3, :3]), expected, rtol=0, atol=off)
    torch.testing.assert_close(_parts(shown[3:, 3:], held[3:, 3:]), torch.ones(3).double(), rtol=0, atol=0.05)


def test_errors_are_as_stated():
    """Of turns about the rod, found against a noisy map: larger than by Gauss and Newton's matrix."""
    *halves, f = _halves()
    volume = SplineVolume.of(_reference(9, f), radius_px=RADIUS + 1)
    drawn = simulate(THIN, FourierDisc(BOX, RADIUS), 300, snr=3.0, seed=3)
    found = refine_poses(volume, drawn.images, drawn.rotations, drawn.shifts_px)
    off = torch.deg2rad(to_rotation_vector(found.rotations @ drawn.rotations.transpose(1, 2)))
    rod = drawn.rotations[:, :, 2]
    turned = (off * rod).sum(1).abs()
    information = pose_information(*halves, correlation=f, noise=NOISE, share=SHARE)
    known = without_noise(found.precision, found.rotations, information)
    before, after = (
        float((turned / torch.einsum("ni,nij,nj->n", rod, each[:, :3, :3], rod).sqrt()).median()) / 0.6745
        for each in (torch.linalg.inv(found.precision), torch.linalg.inv(known))
    )
    assert before > 1.3
    assert after == pytest.approx(1.0, abs=0.15)


def test_nothing_is_changed_where_there_is_nothing():
    drawn = random_rotations(3, dtype=torch.float64)
    precision = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0, 5.0]).double()).repeat(3, 1, 1)
    precision[2] = 0
    assert torch.equal(without_noise(precision, drawn, torch.zeros(2, 6, 6).double()), precision)
    torch.testing.assert_close(without_noise(precision, drawn, nothing_but_signal()), precision)
    none = torch.zeros(BOX // 2 + 1)
    assert not pose_information(*_halves()[:2], correlation=none, noise=NOISE, share=SHARE).any()
