"""Maxima of posteriors, and the evidence of a volume, against sums over all poses."""

import math

import pytest
import torch
from pose_simulation import Particle, simulate
from torch._subclasses.fake_tensor import FakeTensorMode

from halfmap.ops.rotations import angular_distance, from_rotation_vector
from halfmap.ops.symmetry import operators
from halfmap.search import maxima
from halfmap.search.disc import DiscImages, FourierDisc
from halfmap.search.local import PosePrior
from halfmap.search.maxima import climb, search_everywhere
from halfmap.search.polar import PolarGrid
from halfmap.search.projector import SplineVolume
from halfmap.search.sampling import DirectionSearch, score_poses

BOX, RADIUS, DEVIATION = 32, 10, 2.0
PARTICLE = Particle.random(BOX, count=40, radius_px=9.0)
DISC = FourierDisc(BOX, RADIUS)
VOLUME = SplineVolume.of(PARTICLE.volume(), radius_px=RADIUS + 1)


def _turned(rotations: torch.Tensor, degrees: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(len(rotations), 3, generator=generator, dtype=torch.float64)
    return from_rotation_vector(axes / axes.norm(dim=1, keepdim=True) * degrees) @ rotations


def test_ascents_end_at_the_pose_from_near_it():
    """From 45° off, more get there that begin with the coarse frequencies alone; from 20° nearly all do."""
    truth = simulate(PARTICLE, DISC, 40, snr=0.6)
    owner = torch.arange(40)
    shares = []
    for radii, off in (((RADIUS,), 45.0), ((4, 6, RADIUS), 45.0), ((4, 6, RADIUS), 20.0)):
        start = _turned(truth.rotations, off, 1)
        found = climb(
            VOLUME, truth.images, start, truth.shifts_px, owner, radii=radii, deviation_px=DEVIATION
        )
        shares.append(float((angular_distance(found.poses.rotations, truth.rotations) < 8).double().mean()))
    # Two standard deviations of the difference of two binomials of 40.
    assert shares[1] > shares[0] + 2 * (2 * 0.25 / 40) ** 0.5
    assert shares[2] > 0.9


def test_maxima_are_one_each_and_the_best_comes_first():
    truth = simulate(PARTICLE, DISC, 12, snr=0.5, seed=2)
    # Two poses near the truth end at the same maximum, one far away at another or nowhere good.
    owner = torch.arange(12).repeat_interleave(3)
    start = torch.stack(
        [_turned(truth.rotations, angle, seed) for angle, seed in ((4.0, 1), (5.0, 2), (90.0, 3))], dim=1
    ).flatten(0, 1)
    shifts = truth.shifts_px.repeat_interleave(3, 0)
    found = climb(VOLUME, truth.images, start, shifts, owner, radii=(6, RADIUS), deviation_px=DEVIATION)
    near = angular_distance(found.poses.rotations, truth.rotations[found.owner]) < 8
    assert torch.equal(found.owner, found.owner.sort().values)
    assert torch.equal(found.owner[found.best], torch.arange(12))
    assert bool((torch.bincount(found.owner[near], minlength=12) <= 1).all())
    total = torch.zeros(12, dtype=torch.float64).index_add_(0, found.owner, found.shares)
    assert float((total - 1).abs().max()) < 1e-12
    for image in range(12):
        own = found.shares[found.owner == image]
        assert torch.equal(own, own.sort(descending=True).values)


def test_equivalent_poses_are_one():
    """Ascents from both sides of the border of the asymmetric unit end at poses that are the same image."""
    operator = operators("D2")[2]
    atoms = torch.cat([PARTICLE.atoms @ each.T for each in operators("D2")])
    particle = Particle(atoms, BOX)
    volume = SplineVolume.of(particle.volume(), radius_px=RADIUS + 1)
    truth = simulate(particle, DISC, 8, snr=0.5, seed=4)
    mates = torch.stack(
        [_turned(truth.rotations, 3.0, 1), _turned(truth.rotations @ operator, 3.0, 2)], dim=1
    )
    start = mates.flatten(0, 1), truth.shifts_px.repeat_interleave(2, 0), torch.arange(8).repeat_interleave(2)
    how = {"radii": (RADIUS,), "deviation_px": DEVIATION}
    found = climb(volume, truth.images, *start, **how, group="D2")
    assert found.owner.tolist() == list(range(8))
    assert float((found.shares - 1).abs().max()) < 1e-12
    apart = climb(volume, truth.images, *start, **how)
    assert float((apart.shares - 0.5).abs().median()) < 0.05
    # Over the asymmetric unit alone each has the same likelihood, and the prior is four times as dense.
    one = climb(volume, truth.images, *(each[::2] for each in start), **how, group="D2")
    assert torch.allclose(found.log_evidence, one.log_evidence, atol=0.05)


def test_evidence_of_nothing_is_none_whatever_the_prior():
    """Blank images have a likelihood of one at all poses: its mean over normal priors about three is one."""
    truth = simulate(PARTICLE, DISC, 4, snr=0.5, seed=6)
    blank = DiscImages(DISC, 0 * truth.images.linear, 0 * truth.images.squared)
    owner = torch.arange(4).repeat_interleave(3)
    middles = torch.stack([_turned(truth.rotations, 120.0, seed) for seed in (1, 2, 3)], dim=1).flatten(0, 1)
    shifts = truth.shifts_px.repeat_interleave(3, 0)
    how = {"turn_deg": 4.0, "shift_px": 0.7, "fulcrum_px": torch.tensor([3.0, 0.0, -2.0])}
    prior = PosePrior.about(middles, shifts, **how)
    start = _turned(middles, 2.0, 4), shifts
    how = {"radii": (6, RADIUS), "deviation_px": math.inf, "priors": 3}
    found = climb(VOLUME, blank, *start, owner, prior=prior, **how)
    assert found.owner.bincount().tolist() == [3] * 4
    assert float((found.shares - 1 / 3).abs().max()) < 1e-2
    assert float(found.log_evidence.abs().max()) < 1e-2


def test_evidence_does_not_depend_on_how_many_maxima_are_left():
    """Of three priors, those far from the truth hold nothing, whether ascents begin there or not."""
    truth = simulate(PARTICLE, DISC, 4, snr=0.8, seed=6)
    mates = torch.stack([truth.rotations, *(_turned(truth.rotations, 120.0, seed) for seed in (1, 2))], dim=1)
    found = []
    for many in (3, 1):
        start = mates[:, :many].flatten(0, 1), truth.shifts_px.repeat_interleave(many, 0)
        prior = PosePrior.about(*start, turn_deg=4.0, shift_px=0.7, fulcrum_px=torch.zeros(3))
        owner = torch.arange(4).repeat_interleave(many)
        how = {"radii": (RADIUS,), "deviation_px": math.inf, "priors": 3}
        found.append(climb(VOLUME, truth.images, *start, owner, prior=prior, **how))
    assert found[0].owner.tolist() == list(range(4))
    torch.testing.assert_close(found[0].log_evidence, found[1].log_evidence, rtol=0, atol=1e-2)


def test_priors_are_where_the_images_are(monkeypatch: pytest.MonkeyPatch):
    """With images on a GPU, whose devices can be followed without there being one."""
    seen = []

    def refine(*where: object, prior: PosePrior, **how: object) -> None:
        seen.extend(each.device.type for each in vars(prior).values())
        raise KeyboardInterrupt

    monkeypatch.setattr(maxima, "refine_poses", refine)
    with FakeTensorMode():
        poses = torch.zeros(3, 3, 3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
        prior = PosePrior(*poses, torch.zeros(3, 5, 5, dtype=torch.float64))
        owner: torch.Tensor = torch.zeros(3, dtype=torch.int64, device="cuda")
        with pytest.raises(KeyboardInterrupt):
            climb(VOLUME, DiscImages(DISC, *poses), *poses, owner, radii=(4,), deviation_px=1.0, prior=prior)
    assert seen == ["cuda"] * 3


def test_evidence_is_the_mean_likelihood_over_all_poses():
    """Against a sum over random turns and moves about the maximum, weighted as importance sampling has it."""
    truth = simulate(PARTICLE, DISC, 4, snr=0.8, seed=5)
    found = climb(
        VOLUME,
        truth.images,
        truth.rotations,
        truth.shifts_px,
        torch.arange(4),
        radii=(RADIUS,),
        deviation_px=DEVIATION,
    )
    count = 4000
    generator = torch.Generator().manual_seed(1)
    for image in range(4):
        # A normal distribution half as wide again as the posterior covers its tails.
        factor = 1.5 * torch.linalg.cholesky(found.poses.covariance[image])
        unit = torch.randn(count, 5, generator=generator, dtype=torch.float64)
        step = unit @ factor.T
        rotations = from_rotation_vector(torch.rad2deg(step[:, :3])) @ found.poses.rotations[image]
        shifts = found.poses.shifts_px[image] + step[:, 3:]
        logs = score_poses(
            VOLUME,
            truth.images,
            rotations,
            shifts,
            owner=torch.full((count,), image),
            first=torch.arange(count + 1),
        )
        logs = logs - shifts.square().sum(1) / (2 * DEVIATION**2) - math.log(2 * math.pi * DEVIATION**2)
        drawn = (
            -unit.square().sum(1) / 2 - torch.linalg.slogdet(factor).logabsdet - 2.5 * math.log(2 * math.pi)
        )
        expected = torch.logsumexp(logs - math.log(8 * math.pi**2) - drawn, 0) - math.log(count)
        # The posterior is not quite normal, and the sum is over few.
        assert float(found.log_evidence[image]) == pytest.approx(float(expected), abs=0.3)


def test_search_finds_poses_about_given_shifts():
    truth = simulate(PARTICLE, DISC, 24, snr=0.6, seed=3, shift_px=3.0)
    grid = PolarGrid(BOX, 6, 15.0)
    search = DirectionSearch(grid, VOLUME, order=2, range_px=2.0, step_px=1.0)
    wave = grid.shifts(-truth.shifts_px)
    samples = (
        torch.stack([PARTICLE.slices(r[None], grid.frequencies.flatten(0, 1))[0] for r in truth.rotations])
        .unflatten(1, (grid.rings, -1))
        .to(torch.complex64)
        * wave
    )
    ones, noise = torch.ones(samples.shape), truth.noise[:, : grid.rings].expand(24, -1)
    near = truth.shifts_px + 0.6
    found, significant = search_everywhere(
        search,
        VOLUME,
        truth.images,
        samples,
        ones,
        noise,
        radii=(6, RADIUS),
        deviation_px=5.0,
        centres_px=near,
    )
    best = found.best
    assert float((angular_distance(found.poses.rotations[best], truth.rotations) < 10).double().mean()) > 0.9
    assert float((found.poses.shifts_px[best] - truth.shifts_px).norm(dim=1).median()) < 0.7
    assert bool((significant >= 1).all())
