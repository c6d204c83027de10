"""Where a class attracts particles, the likelihood is raised to a power: which, and what it leaves."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.steps.test_class2d import DIAMETER, N, parts, run, truth

from halfmap.io.tables import read_particles
from halfmap.search.inplane import InPlaneSearch
from halfmap.search.polar import PolarGrid
from halfmap.search.sums import Sums
from halfmap.steps.class2d import attraction, iterate, plan
from halfmap.steps.class2d.expectation import BEST, EVIDENCE, NORM, Shard, expect
from halfmap.steps.class2d.model import explained
from halfmap.steps.class2d.start import first_model
from halfmap.steps.class2d.step import Class2DStep

__all__ = ["parts", "truth"]

GREATEST = BEST.index("greatest")


def test_likelihood_is_sharper_where_a_class_attracts():
    """As it is up to twice an equal share, never beyond its fourth power, and half the way at a time."""
    powers = [attraction.sharpness_for(share) for share in (1.0, 2.0, 3.0, 4.0, 12.0)]
    assert powers == [1.0, 1.0, 2.25, 4.0, 4.0]
    even, uneven = np.arange(3000) % 10, np.minimum(np.arange(3000) // 280, 1)
    assert attraction.next_sharpness(1.0, even, 10) == 1.0
    assert attraction.next_sharpness(1.0, uneven, 10) == pytest.approx(2.0)
    assert attraction.next_sharpness(4.0, even, 10) == pytest.approx(2.0)
    # Two of twenty particles in one of twenty classes are chance.
    assert attraction.next_sharpness(1.0, np.r_[np.arange(19), 0], 20) == 1.0


def test_the_last_iteration_has_the_likelihood_as_it_is(truth, tmp_path, monkeypatch):
    folder = tmp_path / "project"
    shutil.copytree(truth[0], folder, ignore=shutil.ignore_patterns("Class2D", "default_pipeline.star"))
    powers = {}

    def look(shard, *, sharpness, **parameters):
        powers[shard.name[:5]] = sharpness
        return expect(shard, sharpness=sharpness, **parameters)

    monkeypatch.setattr(iterate, "expect", look)
    monkeypatch.setattr(attraction, "sharpness_for", lambda share: 4.0)
    job = run(folder, iterations=4, full_iterations=1)
    assert list(powers.values()) == pytest.approx([1.0, 2.0, 8**0.5, 1.0])
    assert "likelihood to the power 2.8" in (job / "run.out").read_text()


@pytest.fixture(scope="module")
def powers(truth, tmp_path_factory):
    """What the particles give with one average of the first figure, by powers of the likelihood."""
    folder = truth[0]
    step = Class2DStep(particles=Path("particles.star"), classes=1, diameter=DIAMETER, resolution=9.0)
    ctx: Any = SimpleNamespace(
        resolve=lambda path: folder / path,
        project=folder,
        options=SimpleNamespace(workers=1),
        device="cpu",
    )
    images, planned = plan.make_plan(step, ctx, read_particles(folder / "particles.star"))
    model = first_model(planned, images)
    into = tmp_path_factory.mktemp("powers")
    model.save(into / "model.npz")
    found = {}
    for sharpness in (1.0, 4.0):
        how = {"plan": planned, "model_file": into / "model.npz", "radius": 12, "sharpness": sharpness}
        name = expect(Shard(f"p{sharpness}", np.arange(N)), **how, folder=into)["file"]
        with np.load(into / name) as file:
            found[sharpness] = {key: file[key] for key in file.files}
    return found


def test_power_of_the_likelihood_is_taken_back(powers):
    """Weights of the only average, and norms, depend on no posterior; the evidence only rises to the best."""
    one, four = powers[1.0], powers[4.0]
    np.testing.assert_allclose(four["squared"][:, 0].real, one["squared"][:, 0].real, rtol=1e-6)
    np.testing.assert_allclose(four["best"][:, NORM], one["best"][:, NORM], rtol=0.15, atol=0.05)
    rise = four["best"][:, EVIDENCE] - one["best"][:, EVIDENCE]
    assert rise.min() > -1e-3
    assert four["best"][:, EVIDENCE].mean() < 2 * max(one["best"][:, EVIDENCE].mean(), 5.0)
    # Sharper, it is.
    assert four["best"][:, GREATEST].mean() > 1.5 * one["best"][:, GREATEST].mean()


def test_noise_under_a_power_is_no_signal():
    """Pure noise: averages explain no more than their own power, whatever that of the likelihood."""
    grid = PolarGrid(32, 8, 12.0)
    random = torch.Generator().manual_seed(2)
    y, x = np.mgrid[:32, :32] - 16
    images = torch.randn(200, 32, 32, generator=random) * torch.from_numpy(np.hypot(x, y) < 11)
    average = 0.1 * torch.randn(1, 32, 32, generator=random) * torch.from_numpy(np.hypot(x, y) < 8)
    references, noise = grid.sample(average), torch.full((1, grid.rings), 32.0**2)
    search = InPlaneSearch([grid], references, torch.zeros(1), range_px=1.0, deviation_px=1.0)
    samples = grid.sample(images)
    posterior = search(samples, torch.ones(samples.shape), noise / 4)
    sums = Sums.of(posterior, references, grid)[0].scaled(0.25)
    squares = 200 * references.abs().square().mean(-1).sum()
    plain, mended = (float(explained(sums, references, noise[0], grid, power).sum()) for power in (1.0, 4.0))
    assert plain > 3 * squares
    assert -squares < mended < 1.3 * squares
