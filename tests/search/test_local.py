import math

import pytest
import torch
from pose_simulation import Particle, simulate

from halfmap.ops.rotations import angular_distance, from_rotation_vector, to_rotation_vector
from halfmap.search import _pose_kernels as kernels
from halfmap.search.disc import DiscImages, FourierDisc
from halfmap.search.local import PosePrior, _climb_torch, likelihood_derivatives, refine_poses
from halfmap.search.projector import SplineVolume, sample_slices

BOX = 48
PARTICLE = Particle.random(BOX, radius_px=13.0)
DISC = FourierDisc(BOX, 20)
VOLUME = SplineVolume.of(PARTICLE.volume())
DOUBLE = SplineVolume.of(PARTICLE.volume().double())


def _log_likelihood(images: DiscImages, rotations: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    slices = sample_slices(DOUBLE, rotations, images.disc.points)
    phase = shifts @ images.disc.points.T * (-2 * math.pi / BOX)
    moved = images.linear.to(torch.complex128) * torch.polar(torch.ones_like(phase), phase)
    return (moved.conj() * slices).real.sum(1) - (images.squared * slices.abs().square()).sum(1) / 2


def _start(rotations: torch.Tensor, step: float) -> torch.Tensor:
    """Rotations as far away as a cell of a grid of this step in degrees reaches."""
    generator = torch.Generator().manual_seed(4)
    vectors = (torch.rand(len(rotations), 3, generator=generator, dtype=torch.float64) - 0.5) * step
    return from_rotation_vector(vectors) @ rotations


def test_gradient_against_finite_differences():
    truth = simulate(PARTICLE, DISC, 4, snr=0.1)
    images, start = truth.images, _start(truth.rotations, 7.5)
    value, gradient, _ = likelihood_derivatives(DOUBLE, images, start, truth.shifts_px, DISC.points)
    torch.testing.assert_close(value, _log_likelihood(images, start, truth.shifts_px), rtol=1e-6, atol=1e-6)
    step = 1e-4
    for i in range(5):
        change = torch.zeros(5, dtype=torch.float64)
        change[i] = step
        sides = []
        for sign in (1, -1):
            turned = from_rotation_vector(torch.rad2deg(sign * change[:3])) @ start
            sides.append(_log_likelihood(images, turned, truth.shifts_px + sign * change[3:]))
        difference = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close(gradient[:, i], difference, rtol=1e-5, atol=1e-5)


def test_matrix_is_the_mean_curvature():
    """Without noise, and at the truth, nothing is lacked: Gauss-Newton's matrix is that of Newton."""
    truth = simulate(PARTICLE, DISC, 2, snr=1.0)
    clean = sample_slices(DOUBLE, truth.rotations, DISC.points) * truth.ctf * DISC.shifts(-truth.shifts_px)
    images = DiscImages.of(DISC, clean.to(torch.complex64), truth.ctf, truth.noise)
    _, gradient, matrix = likelihood_derivatives(
        DOUBLE, images, truth.rotations, truth.shifts_px, DISC.points
    )
    assert float(gradient.abs().max()) < 1e-3
    step = 1e-4
    for i in range(3):
        change = torch.zeros(3, dtype=torch.float64)
        change[i] = math.degrees(step)
        turned = from_rotation_vector(change) @ truth.rotations
        _, moved, _ = likelihood_derivatives(DOUBLE, images, turned, truth.shifts_px, DISC.points)
        torch.testing.assert_close(-moved / step, matrix[:, i], rtol=2e-2, atol=float(matrix.max()) * 1e-3)


def test_kernel_agrees_with_torch():
    truth = simulate(PARTICLE, DISC, 1, snr=0.1)
    images, shift = truth.images, truth.shifts_px
    value, gradient, matrix = likelihood_derivatives(VOLUME, images, truth.rotations, shift, DISC.points)
    sums = torch.empty(21, dtype=torch.float64)
    linear = torch.view_as_real(images.linear).flatten(1).numpy()[0]
    volume = VOLUME.flat(), VOLUME.origin, VOLUME.scale
    pose, shape = (truth.rotations[0].numpy(), shift[0].numpy()), (BOX, DISC.radius)
    kernels.evaluate(
        *volume, *pose, *shape, DISC.points.float().numpy(), linear, images.squared[0].numpy(), sums.numpy()
    )
    row, column = torch.tril_indices(5, 5)
    expected = torch.cat([value, gradient[0], matrix[0, row, column]])
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4)


def test_both_bodies_climb_to_the_same_maximum():
    truth = simulate(PARTICLE, DISC, 20, snr=0.3)
    start = _start(truth.rotations, 7.5)
    a = refine_poses(VOLUME, truth.images, start, truth.shifts_px + 0.5, deviation_px=2.0)
    pose = start, truth.shifts_px + 0.5, torch.arange(20)
    b = _climb_torch(VOLUME, truth.images, *pose, DISC.points.float(), PosePrior.of_shifts(start, 2.0))
    # Each ends when a step promises 0.002 of the log-likelihood.
    assert float((a.log_likelihood - b.log_likelihood).abs().max()) < 5e-3
    assert float(angular_distance(a.rotations, b.rotations).max()) < 0.3


def test_prior_about_a_pose():
    """It pulls poses of blank images to its middle; both bodies agree where there is something to see."""
    truth = simulate(PARTICLE, DISC, 20, snr=0.3)
    owner, start = torch.arange(20), _start(truth.rotations, 7.5)
    how = {"turn_deg": 2.0, "shift_px": 0.5, "fulcrum_px": torch.tensor([4.0, -7.0, 9.0])}
    prior = PosePrior.about(truth.rotations, truth.shifts_px, **how)
    nothing = DiscImages(DISC, 0 * truth.images.linear, 0 * truth.images.squared)
    pulled = refine_poses(VOLUME, nothing, start, truth.shifts_px + 0.5, prior=prior)
    assert float(angular_distance(pulled.rotations, truth.rotations).max()) < 0.2
    assert float((pulled.shifts_px - truth.shifts_px).abs().max()) < 0.05
    torch.testing.assert_close(pulled.precision, prior.precision)
    free = refine_poses(VOLUME, truth.images, start, truth.shifts_px + 0.5)
    held = refine_poses(VOLUME, truth.images, start, truth.shifts_px + 0.5, prior=prior)
    errors = [angular_distance(each.rotations, truth.rotations).mean() for each in (free, held)]
    assert float(errors[1]) < 0.9 * float(errors[0])
    other = _climb_torch(
        VOLUME, truth.images, start, truth.shifts_px + 0.5, owner, DISC.points.float(), prior
    )
    assert float((held.log_likelihood - other.log_likelihood).abs().max()) < 5e-3
    assert float(angular_distance(held.rotations, other.rotations).max()) < 0.3


def test_turns_about_the_fulcrum_cost_their_angle_alone():
    """The image of the fulcrum stays where it is when shifts follow it."""
    rotations = simulate(PARTICLE, DISC, 10, snr=0.3).rotations
    fulcrum = torch.tensor([4.0, -7.0, 9.0], dtype=torch.float64)
    shifts = torch.ones(10, 2, dtype=torch.float64)
    prior = PosePrior.about(rotations, shifts, turn_deg=5.0, shift_px=0.2, fulcrum_px=fulcrum)
    turned = from_rotation_vector(torch.tensor([[0.3, -0.5, 0.2]], dtype=torch.float64)) @ rotations
    moved = shifts + ((turned - rotations) @ fulcrum)[:, :2]
    for shift, expected in ((moved, 0.38 / 25), (moved + 0.1, 0.38 / 25 + 0.5)):
        apart = prior.apart(turned, shift)
        cost = torch.einsum("ni,nij,nj->n", apart, prior.precision, apart)
        torch.testing.assert_close(cost, torch.full_like(cost, expected), atol=5e-3, rtol=0)


def test_likelihood_grows():
    truth = simulate(PARTICLE, DISC, 20, snr=0.3)
    start = _start(truth.rotations, 7.5)
    before, _, _ = likelihood_derivatives(VOLUME, truth.images, start, truth.shifts_px, DISC.points)
    found = refine_poses(VOLUME, truth.images, start, truth.shifts_px)
    assert bool((found.log_likelihood >= before - 1e-3).all())


def test_several_poses_of_one_image_and_a_smaller_radius():
    truth = simulate(PARTICLE, DISC, 3, snr=0.3)
    owner = torch.tensor([2, 2, 0])
    rotations, shifts = truth.rotations[owner], truth.shifts_px[owner]
    few = refine_poses(VOLUME, truth.images, rotations, shifts, owner=owner, radius=10)
    count = DISC.count(10)
    linear, squared = truth.images.linear.clone(), truth.images.squared.clone()
    linear[:, count:], squared[:, count:] = 0, 0
    blanked = DiscImages(DISC, linear[owner], squared[owner])
    expected = refine_poses(VOLUME, blanked, rotations, shifts)
    torch.testing.assert_close(few.log_likelihood, expected.log_likelihood, rtol=1e-4, atol=1e-3)
    assert torch.equal(few.rotations[0], few.rotations[1])


def test_uncertainties_are_calibrated():
    for snr in (0.05, 0.1):
        truth = simulate(PARTICLE, DISC, 600, snr=snr)
        start = _start(truth.rotations, 7.5)
        generator = torch.Generator().manual_seed(6)
        shifts = truth.shifts_px + torch.rand(600, 2, generator=generator, dtype=torch.float64) - 0.5
        found = refine_poses(VOLUME, truth.images, start, shifts)
        turned = to_rotation_vector(found.rotations @ truth.rotations.transpose(1, 2))
        error = torch.cat([turned, found.shifts_px - truth.shifts_px], dim=1)
        within = (error.abs() < found.deviations).double().mean(dim=0)
        assert bool(((within > 0.60) & (within < 0.76)).all()), (snr, within)


def test_shares_of_several_maxima():
    truth = simulate(PARTICLE, DISC, 2, snr=0.5)
    away = from_rotation_vector(torch.tensor([[0.0, 90.0, 30.0]], dtype=torch.float64)) @ truth.rotations[:1]
    owner = torch.tensor([0, 1, 0, 0])
    rotations = torch.cat([away, truth.rotations[1:], _start(truth.rotations[:1], 5), truth.rotations[:1]])
    found = refine_poses(VOLUME, truth.images, rotations, truth.shifts_px[owner], owner=owner)
    shares = found.shares(owner)
    assert float(shares[1]) == 1
    # Two starts have climbed the same maximum, and the third a far worse one.
    assert sorted(shares[[0, 2, 3]].gt(0.5).tolist()) == [False, False, True]
    assert float(shares[[0, 2, 3]].sum()) == pytest.approx(1)
    equal = refine_poses(
        VOLUME, truth.images, rotations[[0, 0]], truth.shifts_px[[0, 0]], owner=owner[[0, 0]]
    )
    assert equal.shares(owner[[0, 0]]).tolist() == [1, 0]
    logs = found.log_likelihood[[0, 3]] - found.precision[[0, 3]].logdet() / 2
    expected = (logs[0] - logs.logsumexp(0)).exp()
    assert float(shares[0]) == pytest.approx(float(expected), abs=1e-2)


def test_undetermined_poses_have_infinite_uncertainty():
    truth = simulate(PARTICLE, DISC, 2, snr=0.1)
    blank = SplineVolume.of(torch.zeros(BOX, BOX, BOX))
    found = refine_poses(blank, truth.images, truth.rotations, truth.shifts_px)
    assert bool(found.deviations.isinf().all())
    assert torch.equal(found.rotations, truth.rotations)
    assert found.shares(torch.tensor([0, 0])).sum() == 1
