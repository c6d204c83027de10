"""The search in the plane against a direct loop over references, angles and shifts."""

import math

import pytest
import torch
from tests.search.test_polar import direct

from halfmap.ops.masks import soft_circle
from halfmap.search.inplane import (
    Images,
    InPlaneSearch,
    Posterior,
    References,
    log_likelihood,
    shift_grid,
)
from halfmap.search.polar import PolarGrid, hartley
from halfmap.search.ring_products import Precision, RingMatrices
from halfmap.search.sums import Sums

BOX, RADIUS, SUPPORT = 32, 10, 14.0
BATCH, SHIFTS, CLASSES = 2, 2, 3


@pytest.fixture(scope="module")
def case():
    generator = torch.Generator().manual_seed(0)
    grid = PolarGrid(BOX, RADIUS, SUPPORT)
    mask = soft_circle((BOX, BOX), radius=SUPPORT - 4, edge=3)
    references = torch.randn(CLASSES, BOX, BOX, generator=generator) * mask
    images = torch.randn(BATCH, BOX, BOX, generator=generator) * mask
    half = (grid.rings, grid.angles // 2)
    ctf = torch.rand(BATCH, *half, generator=generator) - 0.3
    noise = 50 * (torch.rand(1, grid.rings, generator=generator) + 0.5)
    shifts = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    return grid, references, images, ctf, noise, shifts


def scores(case):
    grid, references, images, ctf, noise, shifts = case
    prepared = Images.of(grid.sample(images), ctf, noise, grid)
    shifted = prepared.shifted(shifts.expand(BATCH, -1, 2), grid)
    found = log_likelihood(prepared, shifted, References.of(grid.sample(references)))
    return prepared, shifted, found


def test_log_likelihood_is_that_of_a_direct_loop(case):
    grid, references, images, ctf, noise, shifts = case
    _, _, found = scores(case)
    assert found.shape == (grid.angles, BATCH, SHIFTS, CLASSES)
    frequencies = grid.frequencies.reshape(-1, 2)
    weight = (2 * grid.weights / noise[0, :, None]).expand(-1, grid.angles // 2).flatten().double()
    for angle in (0, 5, grid.angles // 2 + 3):
        turn = 2 * math.pi * angle / grid.angles
        # The reference turned from x towards y has at k what it had at k turned back.
        back = torch.tensor([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]).double()
        turned = direct(references, frequencies @ back.T)
        for b in range(BATCH):
            for t in range(SHIFTS):
                phase = torch.exp(-2j * math.pi / BOX * (frequencies @ shifts[t].double()))
                image = direct(images[b : b + 1], frequencies)[0] * phase
                transfer = ctf[b].flatten().double()
                for k in range(CLASSES):
                    cross = (image.conj() * transfer * turned[k]).real
                    square = transfer.square() * turned[k].abs().square()
                    expected = (weight * (cross - square / 2)).sum()
                    assert float(found[angle, b, t, k]) == pytest.approx(float(expected), rel=1e-4, abs=1e-3)


def test_sums_are_adjoint_to_scores(case):
    """Σ P · cross-term = <sums, references>, and likewise for the squares: a transpose, not a copy."""
    grid, references, *_, shifts = case
    prepared, shifted, found = scores(case)
    weights = torch.rand(found.shape, generator=torch.Generator().manual_seed(3))
    each = shifts.expand(BATCH, -1, 2)
    posterior = Posterior(weights, weights.sum(0), torch.zeros(BATCH), each, prepared, shifted)
    samples = grid.sample(references)
    linear, squared = Sums.of(posterior, samples, grid)[0].samples()
    cross = (hartley(linear) * hartley(samples)).double().sum()
    square = (2 * squared * samples.abs().square()).double().sum()
    assert float(cross - square / 2) == pytest.approx(float((weights * found).double().sum()), rel=1e-5)


def search(case, *, passes):
    references = case[1]
    grids = [PolarGrid(BOX, RADIUS >> (passes - 1), SUPPORT)]
    for i in range(1, passes):
        grids.append(grids[-1].finer(2, RADIUS >> (passes - 1 - i)))
    weights = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    samples = grids[-1].sample(references)
    return grids[-1], InPlaneSearch(grids, samples, weights, range_px=4.0, deviation_px=2.0)


def test_posterior_is_normalised_and_has_the_priors(case):
    _, references, images, _, noise, _ = case
    fine, finder = search(case, passes=1)
    ctf = torch.ones(BATCH, fine.rings, fine.angles // 2)
    posterior = finder(fine.sample(images), ctf, noise)
    assert torch.allclose(posterior.probability.sum((0, 2, 3)), torch.ones(BATCH), atol=1e-5)
    shifts = posterior.shifts_px
    shifted = posterior.images.shifted(shifts, fine)
    likely = log_likelihood(posterior.images, shifted, References.of(fine.sample(references))).double()
    prior = -shifts[0].square().sum(1) / (2 * 2.0**2)
    likely = likely + torch.log(torch.tensor([0.5, 0.3, 0.2])) + prior[:, None]
    expected = torch.softmax(likely.permute(1, 0, 2, 3).flatten(1), dim=1)
    found = posterior.probability.permute(1, 0, 2, 3).flatten(1)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    # In the mean over the prior, whose weights of the references sum to 1.
    evidence = torch.logsumexp(likely.permute(1, 0, 2, 3).flatten(1), dim=1)
    evidence -= math.log(fine.angles) + float(prior.logsumexp(0))
    assert torch.allclose(posterior.log_evidence.double(), evidence, rtol=1e-5)


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_search_finds_reference_angle_and_shift(case, passes):
    references = case[1]
    fine, finder = search(case, passes=passes)
    noise = torch.full((1, fine.rings), 200.0)
    angle, kind = 2 * math.pi * 7 / fine.angles, 1
    frequencies = fine.frequencies.reshape(-1, 2)
    back = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]).double()
    turned = direct(references[kind : kind + 1], frequencies @ back.T).to(torch.complex64)
    image = turned.reshape(1, fine.rings, -1) * fine.shifts(torch.tensor([[1.3, -2.1]]))
    posterior = finder(image, torch.ones(1, fine.rings, fine.angles // 2), noise)
    place = int(posterior.probability.flatten().argmax())
    shifts = posterior.probability.shape[2]
    found_angle, found_shift, found_kind = (
        place // (shifts * CLASSES),
        place // CLASSES % shifts,
        place % CLASSES,
    )
    assert (found_angle, found_kind) == (7, kind)
    spacing = BOX / (4 * RADIUS)
    assert (
        float((posterior.shifts_px[0, found_shift] + torch.tensor([1.3, -2.1])).abs().max()) <= 0.51 * spacing
    )


def test_flat_posteriors_keep_no_more_cells_than_allowed(case):
    images = case[2]
    fine, finder = search(case, passes=2)
    noise = torch.full((1, fine.rings), 3e5)  # nearly flat
    posterior = finder(fine.sample(images), torch.ones(BATCH, fine.rings, fine.angles // 2), noise)
    assert posterior.probability.sum() == pytest.approx(BATCH, rel=1e-5)
    assert posterior.shifts_px.shape[1] == 8 * 4


def test_shift_grids():
    assert shift_grid(2.0, 1.0).shape == (13, 2)
    parts = shift_grid(3.0, 1.0, square=True)
    assert parts.shape == (9, 2)
    assert parts.abs().max() == 1.0


def test_rings_without_a_harmonic_are_left_out():
    grid = PolarGrid(64, 30, 12.0)
    mask = soft_circle((64, 64), radius=8, edge=3)
    images = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(5)) * mask
    harmonics = torch.fft.rfft(hartley(grid.sample(images)), dim=-1).permute(2, 1, 0)
    matrices = RingMatrices.of(harmonics)
    rows = torch.randn(len(harmonics), 4, grid.rings, dtype=torch.complex64)
    exact = rows.to(torch.complex128) @ harmonics.to(torch.complex128)
    # Cauchy and Schwarz: what is left out has at most 1e-10 of the power, whose weight is a ring's area.
    areas = torch.arange(grid.rings).clamp(min=1 / 12).double()
    power = (harmonics.abs().double().square() * areas[:, None]).sum()
    bound = (1e-10 * power).sqrt() * (rows.abs().double().square() / areas).sum(2).amax().sqrt()
    rounding = 2 * grid.rings * 2.0**-24 * (rows.abs() @ harmonics.abs()).amax()
    assert float((matrices(rows) - exact).abs().max()) < float(bound + rounding)
    assert matrices.operations < 0.75 * 8 * harmonics.numel()


def bound_of_rounding(case, significant_bits):
    """Largest change of a score when every factor is rounded: two halves of a last place of each product."""
    grid, references, images, ctf, noise, shifts = case
    prepared = Images.of(grid.sample(images), ctf, noise, grid)
    moved = prepared.shifted(shifts.expand(BATCH, -1, 2), grid).flatten(1, 2)
    exact = References.of(grid.sample(references))
    total = 0.0
    for rows, matrices, times in ((moved, exact.linear, 1), (prepared.squared, exact.squared, 2)):
        for harmonics, first, matrix in matrices.blocks:
            size = torch.view_as_real(rows[harmonics, :, first:]).flatten(2).abs() @ matrix.abs()
            # Each harmonic counts twice in a real function, but the first and the last.
            total += times * 2 * size.unflatten(-1, (-1, 2)).sum(-1).amax((1, 2)).sum() / grid.angles
    unit = 2.0**-significant_bits
    return float(total) * (2 * unit + unit**2)


def test_precision_changes_scores_as_much_as_rounding_does(case):
    grid, references, *_ = case
    prepared, shifted, exact = scores(case)
    errors = {}
    bits: dict[Precision, int] = {"tf32": 11, "bf16": 8}
    for precision in bits:
        rounded = References.of(grid.sample(references), precision)
        error = log_likelihood(prepared, shifted, rounded) - exact
        assert float(error.abs().max()) < bound_of_rounding(case, bits[precision])
        errors[precision] = float(error.square().mean().sqrt())
    # Three bits less, give or take one: the errors of a few large factors stand out.
    assert 2**2 < errors["bf16"] / errors["tf32"] < 2**4


def test_sums_are_not_rounded(case):
    references = case[1]
    fine, _ = search(case, passes=1)
    weights = torch.zeros(CLASSES)
    finder = InPlaneSearch(
        [fine], fine.sample(references), weights, range_px=4.0, deviation_px=2.0, precision="bf16"
    )
    ones = torch.ones(BATCH, fine.rings, fine.angles // 2)
    posterior = finder(fine.sample(case[2]), ones, case[4])
    mass = posterior.probability.sum(0)
    torch.testing.assert_close(posterior.mass, mass, rtol=1e-5, atol=1e-7)
    weights = posterior.probability.double().permute(1, 2, 3, 0)
    turned = torch.fft.rfft(weights, dim=-1)  # (b, t, k, m)
    moved = posterior.shifted.to(torch.complex128)
    expected = torch.einsum("btkm,mbtr->mkr", turned.conj(), moved)
    found = Sums.of(posterior, fine.sample(references), fine)[0].linear
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("passes", [1, 2])
def test_evidence_of_nothing_is_that_of_noise(case, passes):
    """References of zero explain as much as noise alone does, however many there are."""
    _, references, images, _, noise, _ = case
    grids = [PolarGrid(BOX, RADIUS >> (passes - 1), SUPPORT)]
    grids += [grids[0].finer(2, RADIUS)] if passes == 2 else []
    nothing = grids[-1].sample(torch.zeros_like(references))
    weights = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    finder = InPlaneSearch(grids, nothing, weights, range_px=2.0, deviation_px=2.0)
    posterior = finder(grids[-1].sample(images), torch.ones(BATCH, *nothing.shape[1:]), noise)
    assert posterior.log_evidence.tolist() == pytest.approx([0.0] * BATCH, abs=0.01)


def test_what_is_found_of_an_image_does_not_depend_on_others(case):
    """One image is certain and keeps few shifts, the other is nothing but noise and keeps many."""
    _, references, images, _, noise, _ = case
    fine, finder = search(case, passes=2)
    both = fine.sample(torch.stack([3 * references[0], 0.02 * images[0]]))
    ctf = torch.ones(both.shape)
    together = finder(both, ctf, noise)
    for i in range(2):
        alone = finder(both[i : i + 1], ctf[:1], noise)
        assert float(alone.log_evidence[0]) == pytest.approx(float(together.log_evidence[i]), abs=1e-3)
        assert float(alone.probability.max()) == pytest.approx(
            float(together.probability[:, i].max()), abs=1e-4
        )
