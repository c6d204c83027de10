"""Each fold of the particles is compared with averages that have nothing of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from figure_simulation import DIAMETER, PIXEL, N
from tests.steps.test_class2d import parts, truth

from halfmap.engine import RunOptions
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.tables import read_particles
from halfmap.steps.class2d import iterate, model, plan
from halfmap.steps.class2d.expectation import BEST, Shard, expect
from halfmap.steps.class2d.reseed import reseed
from halfmap.steps.class2d.start import aligned_averages, first_model
from halfmap.steps.class2d.step import Class2DStep

__all__ = ["parts", "truth"]

RADIUS, FOLD = 12, 2


@pytest.fixture(scope="module")
def project(truth, tmp_path_factory):
    """A copy of the project with particles, to be altered."""
    folder = tmp_path_factory.mktemp("folds") / "project"
    shutil.copytree(truth[0], folder, ignore=shutil.ignore_patterns("Class2D", "default_pipeline.star"))
    return folder


def planned(folder: Path):
    step = Class2DStep(particles=Path("particles.star"), classes=3, diameter=DIAMETER, resolution=9.0)
    ctx: Any = SimpleNamespace(
        resolve=lambda path: folder / path, project=folder, options=RunOptions(), device="cpu"
    )
    return plan.make_plan(step, ctx, read_particles(folder / "particles.star"))


def sums_of(made: plan.Plan, start: model.Model, iteration: plan.Iteration, into: Path):
    """What the particles of an iteration add up to."""
    into.mkdir()
    start.save(into / "model.npz")
    how = {"plan": made, "model_file": into / "model.npz", "radius": RADIUS, "folder": into}
    done = [expect(Shard(f"p{i}", rows), **how) for i, rows in enumerate(made.shards(iteration))]
    return iterate._add_up(made, into, done)


def one_iteration(
    made: plan.Plan, start: model.Model, iteration: plan.Iteration, into: Path
) -> tuple[model.Model, np.ndarray]:
    """Model that an iteration gives, and what it found for each particle."""
    folds, statistics, best = sums_of(made, start, iteration, into)
    new = model.maximise(made, start, iteration, made.grids(RADIUS)[-1], folds, statistics, best)
    return new, best[np.argsort(best[:, 0])]


@pytest.fixture(scope="module")
def unlike(project, tmp_path_factory):
    """Plan, and a model of which no two sets of averages are alike."""
    images, made = planned(project)
    start, _ = one_iteration(
        made, first_model(made, images), made.iterations[-1], tmp_path_factory.mktemp("unlike") / "first"
    )
    return made, scrambled(start, range(1 + plan.FOLDS), 0.5)


def scrambled(start: model.Model, sets, strength: float = 2.0) -> model.Model:
    """Noise added to some sets of averages, and other weights."""
    random = torch.Generator().manual_seed(8)
    new = start.sets.clone(), start.weights.clone()
    for i in sets:
        new[0][i] += strength * float(start.sets.std()) * torch.randn(start.sets[i].shape, generator=random)
        new[1][i] *= 1 + strength
    return replace(start, sets=new[0], weights=new[1])


def test_every_part_has_particles_of_one_fold_and_all_take_part(project):
    _, made = planned(project)
    last = made.iterations[-1]
    shards = made.shards(last)
    assert all(len(np.unique(made.folds[rows])) == 1 for rows in shards)
    assert sorted(np.concatenate(shards)) == list(range(N))
    assert np.ptp(np.bincount(made.folds)) <= 1
    # Any iteration has as many of each.
    some = made.members(plan.Iteration(1, 6, 50, 33, last=False))
    assert np.ptp(np.bincount(made.folds[some])) <= 1


def test_averages_of_a_fold_have_nothing_of_it(project, unlike, tmp_path):
    made, start = unlike
    one, _ = one_iteration(made, start, made.iterations[-1], tmp_path / "one")
    fold = FOLD
    own = made.folds == fold
    random = np.random.default_rng(0)
    table = read_particles(project / "particles.star").rows["rlnImageName"].to_numpy().astype(str)
    altered = tmp_path / "altered"
    shutil.copytree(project, altered)
    for path in sorted((altered / "Stacks").glob("*.mrcs")):
        stack = np.array(read_mrc(path))
        for i, name in enumerate(table):
            if own[i] and name.endswith(path.name):
                place = int(name.split("@")[0]) - 1
                stack[place] = random.normal(0, 1, stack[place].shape)
        write_mrc(path, stack, pixel_size=PIXEL, stack=True)
    _, made = planned(altered)
    other, _ = one_iteration(made, start, made.iterations[-1], tmp_path / "other")
    torch.testing.assert_close(other.without(fold), one.without(fold), rtol=0, atol=1e-5)
    spread = float(one.averages.std())
    for untouched in {0, 1, 3}:
        assert float((other.without(untouched) - one.without(untouched)).std()) > 0.02 * spread
    assert float((other.averages - one.averages).std()) > 0.05 * spread


def test_particles_are_compared_with_averages_without_their_fold_alone(unlike, tmp_path):
    """Whatever the other sets hold, what is found for a particle is of its own fold's set."""
    made, start = unlike
    half = plan.Iteration(2, RADIUS, N // 2, 0, last=True)
    _, found = one_iteration(made, start, half, tmp_path / "one")
    others = [i for i in range(1 + plan.FOLDS) if i != 1 + FOLD]
    _, changed = one_iteration(made, scrambled(start, others), half, tmp_path / "other")
    own = made.folds[found[:, 0].astype(int)] == FOLD
    np.testing.assert_allclose(changed[own], found[own], rtol=1e-6, atol=1e-6)
    assert (np.abs(changed[~own] - found[~own]).max(1) > 1e-3).mean() > 0.9


def test_averages_of_a_fold_remember_what_they_were_themselves(unlike, tmp_path):
    """In an iteration with half the particles: the same sums, but other sets before."""
    made, start = unlike
    half = plan.Iteration(2, RADIUS, N // 2, 0, last=True)
    sums, *_ = sums_of(made, start, half, tmp_path / "sums")
    grid = made.grids(RADIUS)[-1]
    others = [i for i in range(1 + plan.FOLDS) if i != 1 + FOLD]
    one, other, own = (
        model._estimated(begun, 1 + FOLD, grid, sums[0], 0.5).average
        for begun in (start, scrambled(start, others), scrambled(start, [1 + FOLD]))
    )
    torch.testing.assert_close(other, one)
    assert float((own - one).abs().mean()) > 0.1 * float(one.abs().mean())


def test_a_class_that_begins_anew_has_nothing_of_a_fold_in_its_set(project, unlike):
    images, _ = planned(project)
    made, start = unlike
    best = np.zeros((N, len(BEST)))
    best[:, 0], best[:, BEST.index("evidence")] = np.arange(N), np.arange(N)
    iteration = plan.Iteration(1, RADIUS, N, 0, last=False)
    new, seeded = reseed(made, images, start, best, iteration, RADIUS)
    assert seeded == 1  # of two that starve: one is larger than an equal share
    [hungry] = [k for k in (1, 2) if not torch.equal(new.sets[:, k], start.sets[:, k])]
    rows = np.arange(N // 2)
    poses = np.zeros((len(rows), 3))
    plain = aligned_averages(made, images, rows, poses, start.noise, start.signal[0], RADIUS)
    torch.testing.assert_close(new.sets[:, hungry], plain[0])
    torch.testing.assert_close(new.weights[:, hungry], plain[1])


def test_aligned_averages_leave_each_fold_out(project):
    """A class that begins anew: sets as plain averages of the particles that are in them."""
    images, made = planned(project)
    noise, signal = torch.ones(2, made.radius + 1), torch.full((made.radius + 1,), 1e6)
    rows, poses = np.arange(40), np.zeros((40, 3))
    sets, weights = aligned_averages(made, images, rows, poses, noise, signal, RADIUS)
    for fold in range(plan.FOLDS):
        others = rows[made.folds[rows] != fold]
        alone, weight = aligned_averages(made, images, others, poses[: len(others)], noise, signal, RADIUS)
        torch.testing.assert_close(sets[1 + fold], alone[0], rtol=1e-3, atol=1e-4 * float(alone.abs().max()))
        torch.testing.assert_close(weights[1 + fold], weight[0], rtol=1e-4, atol=1e-4)
