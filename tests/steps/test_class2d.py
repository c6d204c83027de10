"""Classification in two dimensions against truth: which figure, turned how, moved where."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from figure_simulation import BOX, OPTICS, PIXEL, N, figure, planned_job, run, write_project

from halfmap.data import ParticleSet
from halfmap.engine import Context
from halfmap.errors import TableError
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.ctf import ctf
from halfmap.ops.masks import soft_circle
from halfmap.project import Project
from halfmap.search.inplane import InPlaneSearch
from halfmap.search.polar import PolarGrid, hartley
from halfmap.search.ring_products import harmonics_of
from halfmap.search.sums import Sums
from halfmap.steps.class2d import iterate, pictures, plan, tables
from halfmap.steps.class2d.expectation import BEST, _best, expect
from halfmap.steps.class2d.model import Model, agreed_signal, last_ring
from halfmap.steps.class2d.progress import detail


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """A project with particles of three figures, and what was put in."""
    folder = tmp_path_factory.mktemp("class2d")
    return folder, *write_project(folder)


@pytest.fixture(scope="module", autouse=True)
def parts():
    """Parts of 80 particles, the second of three with those of both optics groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_SHARD", 100)
        yield


@pytest.fixture(scope="module")
def job(truth):
    return run(truth[0])


def test_classes_hold_one_figure_each(truth, job):
    _, kinds, *_ = truth
    particles = read_particles(job / "particles.star")
    classes = particles.rows["rlnClassNumber"].to_numpy()
    assert particles.rows["someOtherColumn"].to_list() == list(range(N))
    right = sum(np.bincount(kinds[classes == k]).max() for k in np.unique(classes))
    assert right >= 0.95 * N
    for kind in range(3):
        main = np.bincount(classes[kinds == kind]).argmax()
        assert (kinds[classes == main] == kind).mean() > 0.9


def test_angles_and_shifts_bring_particles_onto_each_other(truth, job):
    """Within a class all particles differ from the truth by one turn and one move of the average."""
    _, kinds, turns, shifts = truth
    rows = read_particles(job / "particles.star").rows
    classes = rows["rlnClassNumber"].to_numpy()
    # RELION's psi turns from y to x; turns here are from x to y.
    found = -np.deg2rad(rows["rlnAnglePsi"].to_numpy())
    origins = rows.select("rlnOriginXAngst", "rlnOriginYAngst").to_numpy() / PIXEL
    errors, misses = [], []
    for k in np.unique(classes):
        members = (classes == k) & (kinds == np.bincount(kinds[classes == k]).argmax())
        if members.sum() < 10:
            continue
        difference = np.exp(1j * (found[members] - turns[members]))
        middle = difference.mean() / abs(difference.mean())
        errors += np.rad2deg(np.abs(np.angle(difference / middle))).tolist()
        # The origin undoes the shift, but for where the average's own centre lies, turned with the particle.
        rest = (origins[members] + shifts[members]) @ np.array([1, 1j])
        centre = np.median((rest * np.exp(-1j * found[members])).real) + 1j * np.median(
            (rest * np.exp(-1j * found[members])).imag
        )
        misses += np.abs(rest - centre * np.exp(1j * found[members])).tolist()
    assert np.median(errors) < 4.0
    assert np.median(misses) < 0.5


def test_averages_look_like_their_figures(truth, job):
    _, kinds, *_ = truth
    averages = np.asarray(read_mrc(job / "class_averages.mrcs"))
    assert averages.shape == (6, BOX, BOX)
    classes = read_particles(job / "particles.star").rows["rlnClassNumber"].to_numpy() - 1
    for kind in range(3):
        main = np.bincount(classes[kinds == kind], minlength=6).argmax()
        best = max(
            np.corrcoef(figure(kind, turn, (dx, dy)).ravel(), averages[main].ravel())[0, 1]
            for turn in np.linspace(0, 2 * math.pi, 72, endpoint=False)
            for dx in (-1, 0, 1)
            for dy in (-1, 0, 1)
        )
        assert best > 0.85


def test_averages_are_centred(truth, tmp_path):
    """All particles lie to one side of their boxes; a figure's mass is at its middle."""
    folder = tmp_path / "project"
    shutil.copytree(truth[0], folder, ignore=shutil.ignore_patterns("Class2D", "default_pipeline.star"))
    for name in ("a", "b"):
        path = folder / f"Stacks/{name}.mrcs"
        moved = np.roll(read_mrc(path), (4, -5), axis=(1, 2))
        write_mrc(path, moved, pixel_size=PIXEL, stack=True)
    job = run(folder, shift_range=24.0)
    # A class of few may still be a mixture.
    classes = read_particles(job / "particles.star").rows["rlnClassNumber"].to_numpy() - 1
    averages = np.asarray(read_mrc(job / "class_averages.mrcs"))[np.bincount(classes, minlength=6) > 30]
    assert len(averages) >= 3
    y, x = np.mgrid[:BOX, :BOX] - BOX // 2
    dense = np.maximum(averages - 0.3 * averages.max((1, 2), keepdims=True), 0)
    centres = np.stack([(dense * x).sum((1, 2)), (dense * y).sum((1, 2))]) / dense.sum((1, 2))
    assert np.abs(centres).max() < 1.0


def test_tables_and_pictures(truth, job):
    folder, *_ = truth
    model = read_star(job / "model.star")
    classes = model["model_classes"]
    assert classes["rlnReferenceImage"][0] == f"000001@{(job / 'class_averages.mrcs').relative_to(folder)}"
    assert classes["rlnClassDistribution"].sum() == pytest.approx(1.0)
    rows = read_particles(job / "particles.star").rows
    assert rows["rlnMaxValueProbDistribution"].is_between(0, 1).all()
    assert (rows["hmClassProbability"] >= rows["rlnMaxValueProbDistribution"] - 1e-6).all()
    assert (rows["hmAnglePsiError"] > 0).all()
    for name in ("classes.png", "progress.png"):
        assert (job / name).stat().st_size > 5000


def test_scale_of_micrographs(job):
    groups = read_star(job / "model.star")["model_groups"]
    assert groups["rlnGroupName"].to_list() == ["Motion/thick.mrc", "Motion/thin.mrc"]
    assert groups["rlnGroupNrParticles"].to_list() == [160, 80]
    thick, thin = groups["rlnGroupScaleCorrection"]
    # 1.6, but for the prior of scales, which draws them to 1.
    assert 1.45 < thin / thick < 1.65


def test_noise_is_what_relion_calls_it(job):
    """Variance of real and imaginary part each, of transforms divided by the number of pixels."""
    blocks = read_star(job / "model.star")
    for group in (1, 2):
        assert blocks[f"model_optics_group_{group}"]["rlnSigma2Noise"][5:12].mean() == pytest.approx(
            1 / (2 * BOX**2), rel=0.1
        )


def test_errors_of_shifts_are_at_least_those_of_the_grid(job):
    rows = read_particles(job / "particles.star").rows
    assert rows["hmOriginError"].min() > 0.05 * PIXEL


@pytest.mark.parametrize("told", ["by the table", "by the user"])
def test_flipped_phases(truth, job, tmp_path, told):
    """Images multiplied by the sign of their CTF are sorted, and explained, as well as they were before."""
    folder = tmp_path / "project"
    shutil.copytree(truth[0], folder, ignore=shutil.ignore_patterns("Class2D", "default_pipeline.star"))
    particles = read_particles(folder / "particles.star")
    signs = torch.sign(ctf((BOX, BOX), **particles.ctf.for_ctf()))
    for i, name in enumerate("ab"):
        path, part = folder / f"Stacks/{name}.mrcs", slice(i * N // 2, (i + 1) * N // 2)
        spectrum = torch.fft.rfft2(torch.from_numpy(np.array(read_mrc(path)))) * signs[part]
        flipped = torch.fft.irfft2(spectrum, s=(BOX, BOX)).numpy()
        write_mrc(path, flipped, pixel_size=PIXEL, stack=True)
    if told == "by the table":
        optics = particles.optics.with_columns(pl.lit(True).alias("rlnCtfDataArePhaseFlipped"))
        write_particles(folder / "particles.star", ParticleSet(optics, particles.rows))
    rows = read_particles(run(folder, phase_flipped=told == "by the user") / "particles.star").rows
    classes = rows["rlnClassNumber"].to_numpy()
    right = sum(np.bincount(truth[1][classes == k]).max() for k in np.unique(classes))
    assert right >= 0.95 * N
    before = read_particles(job / "particles.star").rows["rlnLogLikeliContribution"].mean()
    assert rows["rlnLogLikeliContribution"].mean() == pytest.approx(before, rel=0.05)


def test_images_multiplied_by_their_ctf_are_refused(truth, tmp_path):
    folder = tmp_path / "project"
    shutil.copytree(truth[0], folder, ignore=shutil.ignore_patterns("Class2D", "default_pipeline.star"))
    particles = read_particles(folder / "particles.star")
    optics = particles.optics.with_columns(pl.Series("rlnCtfDataAreCtfPremultiplied", [False, True]))
    write_particles(folder / "particles.star", ParticleSet(optics, particles.rows))
    with pytest.raises(TableError, match=r"row 2: .*multiplied by their CTF"):
        run(folder)


def test_same_result_with_two_workers(truth, job, tmp_path):
    folder = tmp_path / "project"
    shutil.copytree(truth[0], folder, ignore=shutil.ignore_patterns("Class2D", "default_pipeline.star"))
    other = run(folder, workers=2)
    assert (other / "class_averages.mrcs").read_bytes() == (job / "class_averages.mrcs").read_bytes()
    assert read_particles(other / "particles.star").rows.equals(read_particles(job / "particles.star").rows)


def test_stopped_between_parts_and_resumed(truth, job, tmp_path, monkeypatch):
    """Stopped in the third iteration, after one of its parts was done: the same files in the end."""
    folder = tmp_path / "project"
    shutil.copytree(truth[0], folder, ignore=shutil.ignore_patterns("Class2D", "default_pipeline.star"))

    def stop(shard, **parameters):
        if shard.name == "it003_0002":
            raise KeyboardInterrupt
        return expect(shard, **parameters)

    with monkeypatch.context() as patch:
        patch.setattr(iterate, "expect", stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    left = sorted(file.name for file in (folder / "Class2D/job001/Iterations").iterdir())
    assert "it003_0001.npz" in left
    assert "it003_model.npz" not in left
    other = Project.at(folder).resume("Class2D/job001").folder
    assert (other / "class_averages.mrcs").read_bytes() == (job / "class_averages.mrcs").read_bytes()
    assert read_particles(other / "particles.star").rows.equals(read_particles(job / "particles.star").rows)


def test_noise_gives_no_resolution(tmp_path):
    """Classes of pure noise: no average may claim detail."""
    random = np.random.default_rng(1)
    (tmp_path / "Stacks").mkdir()
    stack = random.normal(0, 1, (200, BOX, BOX)).astype(np.float32)
    write_mrc(tmp_path / "Stacks/a.mrcs", stack, pixel_size=PIXEL, stack=True)
    rows = pl.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@Stacks/a.mrcs" for i in range(200)],
            "rlnOpticsGroup": np.ones(200, np.int64),
            "rlnDefocusU": np.full(200, 12000.0),
            "rlnDefocusV": np.full(200, 12000.0),
            "rlnDefocusAngle": np.zeros(200),
        }
    )
    optics = pl.DataFrame({key: values[:1] for key, values in OPTICS.items()})
    write_particles(tmp_path / "particles.star", ParticleSet(optics, rows))
    folder = run(tmp_path, classes=4)
    assert read_star(folder / "model.star")["model_classes"]["rlnEstimatedResolution"].min() > 40


def test_its_progress_is_told_in_iterations(job):
    events = [json.loads(line) for line in (job / "events.jsonl").read_text().splitlines()]
    rounds = [event for event in events if event["event"] == "round"]
    assert [(one["unit"], one["done"], one["total"]) for one in rounds] == [
        ("iteration", i, 8) for i in range(1, 9)
    ]
    assert events[-1] == rounds[-1]
    general = read_star(job / "model.star")["model_general"]
    best = general["rlnCurrentResolution"]  # type: ignore[index]
    assert rounds[-1]["said"].startswith(f"{N} particles, averages to {best:.1f} Å (median ")


def test_the_time_left_is_told_by_particles_and_rings(job):
    events = [json.loads(line) for line in (job / "events.jsonl").read_text().splitlines()]
    rounds = [event for event in events if event["event"] == "round"]
    assert ["left_s" in one for one in rounds] == [True] * 7 + [False]
    schedule = [
        plan.Iteration(i, radius, size, 0, last=False) for i, radius, size in ((1, 5, 10), (2, 8, 20))
    ]
    planned = SimpleNamespace(iterations=schedule)
    assert [plan.Plan.rest(planned, one) for one in schedule] == [3.2, 0]  # type: ignore[arg-type]


@pytest.mark.parametrize(("age", "numbers"), [(-1.0, [1, 2, 3]), (60.0, [1, 3])])
def test_pictures_are_drawn_while_it_runs(truth, monkeypatch, age, numbers):
    drawn = []

    def draw(path, planned, model, best):
        drawn.append(model.iteration)
        path.touch()

    monkeypatch.setattr(pictures, "draw_classes", draw)
    monkeypatch.setattr(pictures, "_EVERY_s", age)
    run(truth[0], iterations=3, full_iterations=1, classes=3)
    assert sorted(set(drawn)) == numbers


def test_no_error_of_an_angle_is_beyond_that_of_none(truth, job, tmp_path):
    """About one of two opposite peaks it is 127°."""
    particles = read_particles(truth[0] / "particles.star")
    planned = planned_job(truth[0], iterations=8, full_iterations=2)[1]
    model = Model.load(job / "Iterations/it008_model.npz", "cpu")
    best = np.load(job / "Iterations/it008_best.npy")
    best = best[np.argsort(best[:, 0])]
    best[:3, BEST.index("psi_error")] = 127.0, 104.5, 50.0
    tables.write(Context(folder=tmp_path, project=truth[0]), planned, particles, model, best)
    none = 360 / math.sqrt(12)
    written = read_particles(tmp_path / "particles.star").rows["hmAnglePsiError"]
    assert written[:3].to_list() == pytest.approx([none, none, 50.0], abs=1e-3)


def test_class_is_the_most_probable_over_all_poses():
    """One class holds the single most probable pose, another more of the probability."""
    grid = PolarGrid(32, 6, 12.0)
    images = torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(1))
    references = torch.stack([images[0], torch.zeros(32, 32)])
    search = InPlaneSearch(
        [grid], grid.sample(references), torch.full((2,), -math.log(2)), range_px=1.0, deviation_px=1.0
    )
    samples = grid.sample(images)
    posterior = search(samples, torch.ones(samples.shape), torch.full((1, grid.rings), 2e4))
    match = Sums.of(posterior, grid.sample(references), grid)[1]
    best = _best(posterior, match, np.arange(4), search, 1.0)
    by_class = posterior.mass.sum(1).numpy()
    single = posterior.probability.amax((0, 2)).argmax(1).numpy()
    assert (single != by_class.argmax(1)).any()
    np.testing.assert_array_equal(best[:, 1], by_class.argmax(1))
    np.testing.assert_allclose(best[:, 6], by_class.max(1), rtol=1e-5)


def test_resolution_is_not_fooled_by_empty_low_rings():
    """No contrast on the lowest rings, a node of a hollow particle, signal to ring 9; and noise alone."""
    hollow = torch.tensor([0.0, 0.1, 0.3, 5.0, 20.0, 4.0, 0.4, 6.0, 5.0, 3.0, 0.2, 0.1, 0.1, 0.0, 0.0, 0.0])
    noise = torch.full((16,), 0.3)
    noise[4] = 1.5
    found = last_ring(torch.stack([hollow, noise]))
    assert 9 <= int(found[0]) <= 11
    assert int(found[1]) == 0


def test_halves_agree_in_signal_alone():
    """Four folds of known signal in noise: its power on rings where there is some, nothing elsewhere."""
    grid = PolarGrid(64, 24, 20.0)
    mask = soft_circle((64, 64), radius=16.0, edge=3.0)
    random = torch.Generator().manual_seed(2)
    share = (64 * 64 * float(mask.square().mean())) ** 0.5

    def white(n: int) -> torch.Tensor:
        """Samples of unit power."""
        return grid.sample(torch.randn(n, 64, 64, generator=random) * mask) / share

    rings = torch.arange(grid.rings)
    signal = white(20) * torch.where(rings < 12, 0.5, 0.0)[:, None]
    weight = 4.0
    weights = torch.full((20, grid.rings, grid.angles // 2), weight) * grid.weights
    squared = harmonics_of(weights.permute(2, 0, 1).contiguous())
    folds = []
    # Each fold was compared with other averages, which its noise has been aligned to.
    references = torch.randn(plan.FOLDS, 20, 64, 64, generator=random) * mask * 0.02
    for fold in range(plan.FOLDS):
        linear = weight * (signal + grid.sample(references[fold])) + weight**0.5 * white(20)
        linear = harmonics_of(hartley(linear * grid.weights).permute(2, 0, 1).contiguous())
        folds.append(Sums(linear.to(torch.complex128), squared.to(torch.complex128), 0 * linear))
    planned: Any = SimpleNamespace(mask=lambda: mask)
    model: Any = SimpleNamespace(without=lambda fold: references[fold])
    agreed = agreed_signal(planned, model, folds, grid)
    power = signal.abs().square().mean((0, 2)).double()
    torch.testing.assert_close(agreed[:, 4:9].mean(0), power[4:9], rtol=0.1, atol=0)
    assert (agreed[:, 16:] == 0).double().mean() > 0.97


def test_averages_without_detail_are_said_to_have_none():
    figures = {"best_resolution_A": 12.0, "median_resolution_A": 270.0, "side_A": 270.0}
    assert detail(figures) == "averages to 12.0 Å (median none)"
    assert detail(figures | {"best_resolution_A": 270.0}) == "averages without detail"
