import math

import numpy as np
import pytest
import torch
from pose_simulation import Particle, simulate, simulated_ctf

from halfmap.ops import symmetry
from halfmap.ops.fourier import ifft_centred
from halfmap.ops.rotations import angular_distance, grid_rotations, subdivide, view_direction
from halfmap.search import _pose_kernels as kernels
from halfmap.search import sampling
from halfmap.search.disc import FourierDisc
from halfmap.search.local import refine_poses
from halfmap.search.polar import PolarGrid
from halfmap.search.projector import SplineVolume, polar_references, sample_slices
from halfmap.search.sampling import (
    MASS,
    Candidates,
    DirectionSearch,
    _score_torch,
    _select_torch,
    _unit_rows,
    score_poses,
    subdivided,
)

BOX = 32
PARTICLE = Particle.random(BOX, count=40, radius_px=9.0)
VOLUME = SplineVolume.of(PARTICLE.volume())
DISC = FourierDisc(BOX, 12)
TRUTH = simulate(PARTICLE, DISC, 3, snr=0.5, shift_px=1.0)


def _search(grid: PolarGrid, **more: object) -> DirectionSearch:
    return DirectionSearch(grid, VOLUME, **({"order": 0, "range_px": 2.0, "step_px": 2.0} | more))  # type: ignore[arg-type]


def test_scores_against_a_double_loop():
    images, shifts = TRUTH.images, torch.tensor([[0.0, 0.0], [1.5, -0.3], [0.0, 0.0], [2.0, 1.0]])
    owner, first = torch.tensor([1, 0]), torch.tensor([0, 2, 4])
    rotations = TRUTH.rotations[:2]
    found = score_poses(VOLUME, images, rotations, shifts, owner=owner, first=first, radius=9)
    other = _score_torch(
        VOLUME, images, rotations, shifts.double(), owner, first, DISC.points[: DISC.count(9)].float()
    )
    torch.testing.assert_close(other, found, rtol=1e-5, atol=1e-4)
    slices = sample_slices(VOLUME, rotations, DISC.points).numpy()
    for n in range(2):
        for s in range(int(first[n]), int(first[n + 1])):
            total = 0.0
            for p, (kx, ky) in enumerate(DISC.points[: DISC.count(9)].tolist()):
                wave = np.exp(-2j * math.pi / BOX * (kx * float(shifts[s, 0]) + ky * float(shifts[s, 1])))
                ctf, noise = float(TRUTH.ctf[owner[n], p]), float(TRUTH.noise[0, DISC.rings[p]])
                image = complex(TRUTH.coefficients[owner[n], p]) * wave
                model = ctf * complex(slices[n, p])
                total += float(DISC.multiplicity[p]) * (
                    (image.conjugate() * model).real / noise - abs(model) ** 2 / (2 * noise)
                )
            assert math.isclose(total, float(found[s]), rel_tol=1e-4, abs_tol=1e-3)


def test_exhaustive_posterior_against_all_poses_one_by_one():
    grid = PolarGrid(BOX, 8, 12.0)
    search = _search(grid, most=10_000, deviation_px=1.5)
    samples = grid.sample(PARTICLE.images(TRUTH.rotations))
    ctf = simulated_ctf(torch.arange(grid.rings), BOX, 3)[:, :, None].expand(samples.shape)
    noise = torch.linspace(3, 1, grid.rings)[None] * 40
    samples = samples * ctf + torch.randn(samples.shape, dtype=torch.complex64) * noise[..., None].sqrt()
    found = search(samples, ctf, noise)

    rows = torch.arange(12 * grid.angles)
    rotations = grid_rotations(rows, order=0, psi_step=360 / grid.angles)
    models = polar_references(VOLUME, rotations, grid)[:, None] * ctf
    moved = samples[:, None] * grid.shifts(search.shifts_px)
    weight = 2 * grid.weights / noise[..., None]
    logs = torch.einsum("btra,nbra->bnt", moved * weight, models.conj()).real
    logs = logs - (models.abs().square() * weight).sum((2, 3)).T[..., None] / 2
    logs = (logs - search.shifts_px.square().sum(1) / (2 * 1.5**2)).double()
    evidence = logs.logsumexp((1, 2))
    torch.testing.assert_close(found.log_evidence, evidence, rtol=1e-4, atol=2e-3)
    shift = (found.shifts_px[:, None] - search.shifts_px).abs().sum(-1).argmin(1)
    expected = logs[found.owner, found.row, shift] - evidence[found.owner]
    torch.testing.assert_close(found.log_probability, expected, rtol=0, atol=5e-3)
    held = torch.zeros(3, dtype=torch.float64).index_add_(0, found.owner, expected.exp())
    assert bool((held > MASS - 1e-4).all())
    for i in range(3):
        mine = expected[found.owner == i]
        assert bool((mine.diff() < 1e-3).all())
        ordered = logs[i].flatten().sub(evidence[i]).exp().sort(descending=True).values
        needed = int((ordered.cumsum(0) < MASS).sum()) + 1
        assert abs(len(mine) - needed) <= 0.02 * needed + 1


def test_poses_of_the_grid_are_found():
    grid = PolarGrid(BOX, 10, 12.0)
    search = _search(grid, order=1)
    row = torch.tensor([3, 17 * grid.angles + 5, 47 * grid.angles + 30])
    rotations = grid_rotations(row, order=1, psi_step=search.psi_step)
    shifts = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, -2.0]])
    samples = polar_references(VOLUME, rotations, grid) * grid.shifts(-shifts)
    noise = torch.full((1, grid.rings), 5.0)
    found = search(samples, torch.ones_like(samples.real), noise)
    best = found.best()
    assert torch.equal(found.row[best], row)
    assert torch.equal(found.shifts_px[best], shifts.double())


def test_parts_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch):
    grid = PolarGrid(BOX, 8, 12.0)
    samples = grid.sample(PARTICLE.images(simulate(PARTICLE, DISC, 7, snr=1.0).rotations))
    noise, ones = torch.full((1, grid.rings), 30.0), torch.ones_like(samples.real)
    truth = simulate(PARTICLE, DISC, 7, snr=0.5)

    def run() -> tuple[torch.Tensor, ...]:
        coarse = _search(grid, most=8)(samples, ones, noise)
        fine = subdivided(coarse, VOLUME, truth.images, most=4)
        local = refine_poses(VOLUME, truth.images, fine.rotations, fine.shifts_px, owner=fine.owner)
        return coarse.row, coarse.log_probability, fine.row, fine.log_probability, local.rotations

    whole = run()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        again = run()
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(sampling, "_CELLS", 2 * grid.angles * 5 * 12)
    in_parts = run()
    for other in (again, in_parts):
        assert torch.equal(other[0], whole[0])
        for a, b in zip(other[1:], whole[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(again[2:], whole[2:], strict=True))


def test_selection_against_sorting():
    generator = np.random.default_rng(0)
    for spread, most in ((0.3, 50), (3.0, 50), (3.0, 4000), (30.0, 50)):
        likely = (spread * generator.standard_normal((12, 5, 40))).astype(np.float32)
        places, logs = np.empty(most, np.int64), np.empty(most)
        count, total = kernels.select(likely, MASS, most, places, logs)
        ordered = np.sort(likely.ravel())[::-1].astype(float)
        exact = float(torch.from_numpy(ordered).logsumexp(0))
        assert abs(total - exact) < 1e-3
        np.testing.assert_allclose(likely.ravel()[places[:count]], ordered[:count])
        np.testing.assert_allclose(logs[:count], ordered[:count] - exact, atol=1e-3)
        needed = int((np.exp(ordered - exact).cumsum() < MASS).sum()) + 1
        assert abs(count - min(most, needed)) <= 0.01 * needed
        other = _select_torch(torch.from_numpy(likely)[:, None], most)
        n = min(count, int(other[2]))
        assert abs(count - int(other[2])) <= 0.01 * needed
        assert np.array_equal(other[0][0, :n].numpy(), places[:n])
        np.testing.assert_allclose(other[1][0, :n].numpy(), logs[:n], atol=1e-3)


def test_cells_are_divided_and_compared_anew():
    images, step = TRUTH.images, 15.0
    rows = torch.tensor([40, 41, 900])
    owner, shifts = torch.tensor([0, 0, 2]), torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    parents = Candidates(
        1, step, 2.0, owner, rows, shifts.double(), torch.zeros(3).double(), torch.zeros(3).double()
    )
    found = subdivided(parents, VOLUME, images, most=1000, deviation_px=2.0)
    assert (found.order, found.psi_step, found.step_px) == (2, step / 2, 1.0)
    children = subdivide(rows, order=1, psi_step=step)
    logs = {}
    for parent in range(3):
        for row in children[parent].tolist():
            for dx, dy in ((-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)):
                shift = shifts[parent] + torch.tensor([dx, dy])
                rotation = grid_rotations(torch.tensor([row]), order=2, psi_step=step / 2)
                one = torch.tensor([int(owner[parent])])
                score = score_poses(
                    VOLUME, images, rotation, shift[None], owner=one, first=torch.tensor([0, 1])
                )
                key = int(owner[parent]), row, *shift.tolist()
                logs[key] = float(score) - float(shift.square().sum()) / 8
    for image in (0, 2):
        mine = {key: value for key, value in logs.items() if key[0] == image}
        total = float(torch.tensor(list(mine.values()), dtype=torch.float64).logsumexp(0))
        assert math.isclose(float(found.log_evidence[image]), total, rel_tol=1e-5)
        held = 0.0
        for i in (found.owner == image).nonzero().squeeze(1).tolist():
            expected = mine[(image, int(found.row[i]), *found.shifts_px[i].tolist())] - total
            assert math.isclose(float(found.log_probability[i]), expected, abs_tol=1e-3)
            held += math.exp(expected)
        assert held > MASS - 1e-4
    assert bool(((found.probability.sum() - 2).abs() < 1e-9).all())


def test_three_passes_find_the_pose():
    """Coarse grid, finer grid, maximum: each nearer to the truth."""
    truth = simulate(PARTICLE, DISC, 40, snr=0.5, shift_px=1.0)
    grid = PolarGrid(BOX, 9, 14.0)
    ctf = simulated_ctf(torch.arange(grid.rings), BOX, 40)[:, :, None].expand(-1, -1, grid.angles // 2)
    samples = grid.sample(_real_images(truth.coefficients))
    search = _search(grid, order=2, range_px=4.0, deviation_px=1.0, most=16)
    coarse = search(samples, ctf, truth.noise[:, : grid.rings])
    fine = subdivided(coarse, VOLUME, truth.images, deviation_px=1.0, most=8)
    best = fine.best()
    last = refine_poses(VOLUME, truth.images, fine.rotations[best], fine.shifts_px[best], deviation_px=1.0)
    at_truth = refine_poses(VOLUME, truth.images, truth.rotations, truth.shifts_px, deviation_px=1.0)
    errors = [
        angular_distance(rotations, truth.rotations).median()
        for rotations in (coarse.rotations[coarse.best()], fine.rotations[best], last.rotations)
    ]
    assert errors[0] > errors[1] > errors[2]
    missed = last.log_likelihood < at_truth.log_likelihood - 0.1
    assert float(missed.double().mean()) < 0.1


def _real_images(coefficients: torch.Tensor) -> torch.Tensor:
    """Images that have these coefficients, and none beyond."""
    spectra = torch.zeros(len(coefficients), BOX, BOX // 2 + 1, dtype=torch.complex64)
    x, y = DISC.points.long().unbind(1)
    spectra[:, y % BOX, x] = coefficients
    on_axis = (x == 0) & (y > 0)
    spectra[:, -y[on_axis], 0] = coefficients[:, on_axis].conj()
    return ifft_centred(spectra, shape=(BOX, BOX))


@pytest.mark.parametrize("group", ["C1", "C3", "D2", "O", "I2"])
def test_directions_of_one_asymmetric_unit(group: str):
    rows = _unit_rows(2, 15.0, group)
    assert len(rows) <= 192 / symmetry.order(group) * 1.6 + 3
    # Every direction of the sphere has an equivalent no farther from one kept than from any.
    everywhere = view_direction(grid_rotations(_unit_rows(2, 15.0, "C1"), order=2, psi_step=15.0))
    kept = view_direction(grid_rotations(rows, order=2, psi_step=15.0))
    equivalent = torch.einsum("sji,nj->nsi", symmetry.operators(group), everywhere)
    nearest = (equivalent @ kept.T).amax((1, 2))
    assert float(torch.rad2deg(nearest.clamp(max=1).arccos()).max()) < 15
