"""Each fold of the particles is compared with averages that have nothing of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.steps.test_class2d import DIAMETER, PIXEL, N, parts, truth

from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.tables import read_particles
from halfmap.steps.class2d import iterate, model, plan
from halfmap.steps.class2d.expectation import Shard, expect
from halfmap.steps.class2d.start import aligned_averages, first_model
from halfmap.steps.class2d.step import Class2DStep

__all__ = ["parts", "truth"]

RADIUS = 12


@pytest.fixture(scope="module")
def project(truth, tmp_path_factory):
    """A copy of the project with particles, to be altered."""
    folder = tmp_path_factory.mktemp("folds") / "project"
    shutil.copytree(truth[0], folder, ignore=shutil.ignore_patterns("Class2D", "default_pipeline.star"))
    return folder


def planned(folder: Path):
    step = Class2DStep(particles=Path("particles.star"), classes=3, diameter=DIAMETER, resolution=9.0)
    ctx: Any = SimpleNamespace(
        resolve=lambda path: folder / path, project=folder, options=SimpleNamespace(workers=1), device="cpu"
    )
    return plan.make_plan(step, ctx, read_particles(folder / "particles.star"))


def one_iteration(folder: Path, into: Path, start: model.Model | None) -> tuple[plan.Plan, model.Model, Any]:
    """Plan, the model an iteration begins with, and the one that it gives."""
    into.mkdir()
    images, made = planned(folder)
    start = start or first_model(made, images)
    start.save(into / "model.npz")
    last = made.iterations[-1]
    how = {"plan": made, "model_file": into / "model.npz", "radius": RADIUS, "folder": into}
    done = [expect(Shard(f"p{i}", rows), **how) for i, rows in enumerate(made.shards(last))]
    folds, statistics, best = iterate._add_up(made, into, done)
    return made, start, model.maximise(made, start, last, made.grids(RADIUS)[-1], folds, statistics, best)


def test_every_part_has_particles_of_one_fold_and_all_take_part(project):
    _, made = planned(project)
    last = made.iterations[-1]
    shards = made.shards(last)
    assert all(len(np.unique(made.folds[rows])) == 1 for rows in shards)
    assert sorted(np.concatenate(shards)) == list(range(N))
    assert np.ptp(np.bincount(made.folds)) <= 1
    # Any iteration has as many of each.
    some = made.members(plan.Iteration(1, 6, 50, 33, early=True, last=False))
    assert np.ptp(np.bincount(made.folds[some])) <= 1


def test_averages_of_a_fold_have_nothing_of_it(project, tmp_path):
    made, start, one = one_iteration(project, tmp_path / "one", None)
    fold = 2
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
    _, _, other = one_iteration(altered, tmp_path / "other", start)
    torch.testing.assert_close(other.without(fold), one.without(fold), rtol=0, atol=1e-5)
    spread = float(one.averages.std())
    for untouched in {0, 1, 3}:
        assert float((other.without(untouched) - one.without(untouched)).std()) > 0.05 * spread
    assert float((other.averages - one.averages).std()) > 0.05 * spread


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
