"""Two conformations against truth: who is in which class, what the maps are, and what stops it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from pose_simulation import Particle

from halfmap.data import ParticleSet, Poses
from halfmap.engine import Context, RunOptions
from halfmap.errors import HalfmapError, ParameterError, ShapeError, TableError
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.ctf import ctf
from halfmap.ops.filters import high_pass
from halfmap.ops.fourier import irfft2, irfft3, rfft2, rfft3, shift_image
from halfmap.ops.masks import soft_sphere
from halfmap.ops.rotations import random_rotations
from halfmap.project import Project
from halfmap.search.backprojector import Backprojection
from halfmap.search.disc import DiscImages
from halfmap.search.halfmaps import solved
from halfmap.search.lens_noise import NoiseSums
from halfmap.steps.class3d import iterate
from halfmap.steps.class3d.expectation import BEST
from halfmap.steps.class3d.model import FREE, Model, contrast, maximise
from halfmap.steps.class3d.plan import Plan, make_plan
from halfmap.steps.class3d.reseed import reseed
from halfmap.steps.class3d.start import first_model, keep_poses, read_references
from halfmap.steps.class3d.step import Class3DStep

BOX, PIXEL, DIAMETER, N, SHARE = 32, 5.0, 110.0, 400, 0.7
MOVED_PX = torch.tensor([0.0, 0.0, 4.0], dtype=torch.float64)
LENS = {"pixel_size": PIXEL, "voltage_kV": 300.0, "cs_mm": 2.7, "amplitude_contrast": 0.1}
DEFOCI = (9000.0, 12000.0, 15000.0)
OPTICS = {
    "rlnOpticsGroup": [1],
    "rlnOpticsGroupName": ["one"],
    "rlnVoltage": [300.0],
    "rlnSphericalAberration": [2.7],
    "rlnAmplitudeContrast": [0.1],
    "rlnImagePixelSize": [PIXEL],
    "rlnImageSize": [BOX],
}


def conformations() -> tuple[Particle, Particle]:
    """A particle, and the same with its outermost fourth of atoms on one side moved by 20 Å."""
    one = Particle.random(BOX, count=60, radius_px=8.0)
    far = one.atoms[:, 0] >= one.atoms[:, 0].sort().values[-15]
    return one, Particle(one.atoms + far[:, None] * MOVED_PX, BOX)


def write_project(folder: Path, *, variance: float = 0.25, n: int = N) -> None:
    """Images of both, 70 % of the first; their poses in the table."""
    generator = torch.Generator().manual_seed(5)
    both = conformations()
    rotations = random_rotations(n, generator=generator, dtype=torch.float64)
    shifts = torch.randn(n, 2, generator=generator, dtype=torch.float64) * 0.6
    kind = (np.random.default_rng(3).random(n) > SHARE).astype(int)
    defocus = np.array(DEFOCI)[np.arange(n) % len(DEFOCI)]
    how = {"defocus_angle": 0.0, **LENS}
    transfer = {z: ctf((BOX, BOX), defocus_u=z, defocus_v=z, **how) for z in DEFOCI}
    clean = torch.empty(n, BOX, BOX)
    for number, particle in enumerate(both):
        clean[kind == number] = particle.images(rotations[kind == number])
    spectra = rfft2(clean) * torch.stack([transfer[z] for z in defocus])
    clean = shift_image(irfft2(spectra, shape=(BOX, BOX)), shift_px=-shifts)
    images = clean * math.sqrt(variance / float(clean[:, 6:-6, 6:-6].var()))
    images += torch.randn(n, BOX, BOX, generator=generator)
    (folder / "Stacks").mkdir(parents=True)
    write_mrc(folder / "Stacks/a.mrcs", images.numpy(), pixel_size=PIXEL, stack=True)
    rows = pl.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@Stacks/a.mrcs" for i in range(n)],
            "rlnOpticsGroup": np.ones(n, np.int64),
            "rlnDefocusU": defocus,
            "rlnDefocusV": defocus,
            "rlnDefocusAngle": np.zeros(n),
            "kind": kind,
        }
    )
    table = ParticleSet(pl.DataFrame(OPTICS), rows).with_poses(Poses(rotations, shifts * PIXEL))
    write_particles(folder / "particles.star", table)
    mean = SHARE * both[0].volume() + (1 - SHARE) * both[1].volume()
    write_mrc(folder / "reference.mrc", (500 * mean).numpy(), pixel_size=PIXEL)
    moved = soft_sphere((BOX,) * 3, radius=25.0, edge=10.0, pixel_size=PIXEL)
    write_mrc(folder / "left.mrc", moved.roll(-5, 2).numpy(), pixel_size=PIXEL)
    write_mrc(folder / "right.mrc", moved.roll(5, 2).numpy(), pixel_size=PIXEL)
    for number, particle in enumerate(both):
        write_mrc(folder / f"kind{number}.mrc", (500 * particle.volume()).numpy(), pixel_size=PIXEL)


def run(folder: Path, *, workers: int = 1, **parameters) -> Path:
    settings = {
        "particles": Path("particles.star"),
        "reference": (Path("reference.mrc"),),
        "classes": 2,
        "diameter": DIAMETER,
        "resolution": 14.0,
        "alignment": False,
    }
    options = RunOptions(workers=workers, device="cpu")
    return Project.at(folder).run(Class3DStep(**(settings | parameters)), options).folder


def copy(folder: Path, to: Path) -> Path:
    ignored = shutil.ignore_patterns(Class3DStep.folder, "default_pipeline.star")
    shutil.copytree(folder, to, ignore=ignored)
    return to


def volume_of(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(read_mrc(path), np.float32))


def right(job: Path) -> float:
    """Share of the particles in the class of their conformation."""
    rows = read_particles(job / "particles.star").rows
    same = float((rows["rlnClassNumber"].to_numpy() - 1 == rows["kind"].to_numpy()).mean())
    return max(same, 1 - same)


def agreement(job: Path) -> float:
    """Of what two halves of the particles, each by itself, differ in most."""
    return float(read_star(job / "model.star")["model_general"]["hmVariationAgreement"])


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("class3d")
    write_project(folder)
    return folder


@pytest.fixture(scope="module")
def job(truth) -> Path:
    return run(truth)


def test_conformations_are_told_apart(truth, job):
    rows = read_particles(job / "particles.star").rows
    assert right(job) > 0.9
    assert rows["hmClassProbability"].is_between(0.5, 1).all()
    given = read_particles(truth / "particles.star").rows
    for name in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "kind"):
        assert rows[name].to_list() == given[name].to_list()


def test_maps_are_those_of_the_conformations(truth, job):
    maps = [volume_of(job / f"class00{i + 1}.mrc") for i in (0, 1)]
    assert read_header(job / "class001.mrc").pixel_size == pytest.approx(PIXEL)
    wanted = [particle.volume() for particle in conformations()]
    sphere = soft_sphere((BOX,) * 3, radius=DIAMETER / 2, edge=8.0, pixel_size=PIXEL)
    found, true = ((pair[0] - pair[1]) * sphere for pair in (maps, wanted))
    correlation = float((found * true).sum() / (found.norm() * true.norm()))
    assert abs(correlation) > 0.6
    blocks = read_star(job / "model.star")
    assert blocks["model_general"]["rlnNrClasses"] == 2
    assert agreement(job) > 0.5
    shares = sorted(blocks["model_classes"]["rlnClassDistribution"])
    # Four standard deviations of a binomial.
    assert abs(shares[1] - SHARE) < 4 * math.sqrt(SHARE * (1 - SHARE) / N)
    assert sum(blocks["model_classes"]["hmNrParticles"]) == N
    names = {"classes.png", "fsc.png", "angular_distribution.png", "progress.png"}
    assert names == {path.name for path in job.glob("*.png")}


def test_probabilities_are_as_stated(job):
    """Of those whose class has a probability p, about p are right."""
    rows = read_particles(job / "particles.star").rows
    stated = float(rows["hmClassProbability"].mean())
    assert abs(right(job) - stated) < 4 * math.sqrt(0.1 * 0.9 / N)


def test_stopped_and_resumed_by_two_workers(truth, job, tmp_path, monkeypatch):
    folder = copy(truth, tmp_path / "project")
    real = iterate.maximise

    def stopped(plan, model, *rest):
        if model.iteration == 2:
            raise KeyboardInterrupt
        return real(plan, model, *rest)

    monkeypatch.setattr(iterate, "maximise", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    monkeypatch.setattr(iterate, "maximise", real)
    options = RunOptions(workers=2, device="cpu")
    other = Project.at(folder).resume(f"{Class3DStep.folder}/job001", options).folder
    for name in ("class001.mrc", "class002.mrc"):
        assert np.array_equal(read_mrc(job / name), read_mrc(other / name))
    assert (job / "particles.star").read_text() == (other / "particles.star").read_text()


def test_focus(truth):
    """Where nothing moves nothing is told apart; elsewhere the maps that are compared are all the same."""
    seeing = run(truth, focus_mask=Path("right.mrc"), iterations=5)
    blind = run(truth, focus_mask=Path("left.mrc"), iterations=3)
    assert right(seeing) > 0.85
    assert right(blind) < 0.8
    # Halves that have nothing in common correlate as random volumes of about a hundred numbers do.
    assert agreement(blind) < 0.25 < 0.6 < agreement(seeing)
    with np.load(sorted((seeing / "Iterations").glob("it*_model.npz"))[-1]) as file:
        first, second = file["references"][0]
    outside = volume_of(truth / "right.mrc").numpy() == 0
    assert np.abs(first - second)[outside].max() < 0.02 * np.abs(first - second).max()


def test_alignment(tmp_path):
    write_project(tmp_path / "more", n=2 * N)
    job = run(tmp_path / "more", alignment=True, iterations=7)
    assert right(job) > 0.85
    rows = read_particles(job / "particles.star").rows
    assert {"hmPoseUncertainty", "hmOriginError"} <= set(rows.columns)


def test_noise_has_no_detail_where_poses_are_searched(tmp_path):
    """Halves that noise is aligned to apart agree in what the reference had, and in no more as it goes on."""
    write_project(tmp_path / "noise", variance=1e-8, n=160)
    job = run(tmp_path / "noise", alignment=True, iterations=3)
    files = sorted((job / "Iterations").glob("it*.json"))
    found = [json.loads(file.read_text())["resolution_A"] for file in files]
    assert len(found) == 3
    assert min(found) > 22.0


def test_a_reference_each(truth):
    """Classes are those of their references, in their order."""
    job = run(truth, reference=(Path("kind1.mrc"), Path("kind0.mrc")), classes=None, iterations=3)
    rows = read_particles(job / "particles.star").rows
    assert float((rows["rlnClassNumber"].to_numpy() == 2 - rows["kind"].to_numpy()).mean()) > 0.85


def planned_model(folder: Path, classes: int, *, alignment: bool = False) -> tuple[Plan, Model]:
    """A plan, and the model that it begins with, from as many references."""
    paths = (Path("reference.mrc"),) * classes
    step = Class3DStep(
        particles=Path("particles.star"),
        reference=paths,
        diameter=DIAMETER,
        resolution=14.0,
        alignment=alignment,
    )
    table = read_particles(folder / "particles.star")
    planned = make_plan(step, Context(folder=folder, project=folder), table)[1]
    return planned, first_model(planned, read_references(planned))


@pytest.mark.parametrize("alignment", [False, True])
def test_a_particle_does_not_meet_itself(truth, alignment):
    """Of noise that one fold adds up to, there is nothing in the map which it is compared with.

    Where poses are searched, nor is there of the other half, but for coarse detail.
    """
    planned, model = planned_model(truth, classes=2, alignment=alignment)
    folds, half = range(planned.n_folds), planned.n_folds // 2
    fine = high_pass((planned.box,) * 3, pixel_size=planned.pixel_size, resolution=35.0)
    generator = torch.Generator().manual_seed(1)
    rotations = random_rotations(60, generator=generator, dtype=torch.float64)
    disc = planned.disc
    ones = torch.ones(60, len(disc.points))

    def noise(number: int, fold: int) -> Any:
        own = torch.Generator().manual_seed(10 * number + fold)
        parts = torch.randn(60, len(disc.points), 2, generator=own)
        sums = Backprojection.empty(planned.box, disc.radius)
        sums.add(DiscImages(disc, torch.view_as_complex(parts), ones), rotations, torch.zeros(60, 2))
        return sums

    counted = NoiseSums(torch.ones(5, 1, disc.radius + 1, dtype=torch.float64))
    best = np.zeros((N, len(BEST)))
    new, _ = maximise(planned, model, noise, counted, best, np.ones((len(folds), 2, 2)), None)
    solvent, prior = planned.solvent(), torch.full((disc.radius + 1,), 10.0)
    for number in (0, 1):
        for fold in folds:
            own = solved(noise(number, fold), prior) * solvent
            own = irfft3(rfft3(own) * fine, shape=own.shape)
            met = [abs(float(_correlation(new.references[other, number], own))) > 0.1 for other in folds]
            # A map of six such sums correlates with each by 0.4 at most, as these have other weights less.
            expected = [not alignment or other // half == fold // half for other in folds]
            expected[fold] = False
            assert met == expected


def _correlation(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one * other).sum() / (one.norm() * other.norm())


def test_half_sets_of_the_table_stay_apart(truth, tmp_path):
    folder = copy(truth, tmp_path / "project")
    table = read_particles(folder / "particles.star")
    subset = np.random.default_rng(1).integers(1, 3, N)
    write_particles(
        folder / "particles.star",
        table.with_rows(table.rows.with_columns(pl.Series("rlnRandomSubset", subset))),
    )
    for alignment in (False, True):
        planned = planned_model(folder, classes=2, alignment=alignment)[0]
        assert planned.halves.tolist() == (subset - 1).tolist()
        assert len(np.unique(planned.folds)) == planned.n_folds


def test_contrasts_are_told_from_noise():
    rng = np.random.default_rng(1)
    n, norm, scale = 4000, 30.0, 1.2
    contrasts = rng.normal(1, 0.2, n)

    def found(contrasts: np.ndarray) -> np.ndarray:
        best = np.zeros((n, len(BEST)))
        best[:, BEST.index("norm")] = norm
        best[:, BEST.index("match")] = scale * contrasts * norm + rng.normal(0, norm**0.5, n)
        return contrast(best, np.full(n, scale)).numpy()

    # The best that can be done: a posterior of two normal distributions.
    variance = 1 / (1 / 0.2**2 + scale**2 * norm)
    assert np.square(found(contrasts) - contrasts).mean() == pytest.approx(variance, rel=0.1)
    assert np.abs(found(np.ones(n)) - 1).max() < 0.05


def test_errors_that_are_stated_are_used(truth, tmp_path):
    planned, _ = planned_model(truth, classes=2)
    table = read_particles(truth / "particles.star")
    stated = pl.DataFrame(
        {"hmAngleViewError": [2.0] * N, "hmAnglePsiError": [1.0] * N, "hmOriginError": [3.0] * N}
    )
    given = table.with_rows(table.rows.hstack(stated))
    keep_poses(Context(folder=tmp_path, project=truth), planned, given)
    with np.load(tmp_path / "Iterations/given_poses.npz") as file:
        deviations = file["precision"] ** -0.5
    assert deviations[0] == pytest.approx(
        [*np.radians([2.0, 2.0, 1.0]), 3 / planned.pixel_size, 3 / planned.pixel_size]
    )
    wrong = given.with_rows(given.rows.with_columns(pl.Series("hmOriginError", [3.0] * (N - 1) + [None])))
    with pytest.raises(TableError, match="hmOriginError is None"):
        keep_poses(Context(folder=tmp_path, project=truth), planned, wrong)


def test_references_differ_in_the_focus_alone(truth):
    planned = replace(planned_model(truth, classes=2)[0], focus=truth / "right.mrc")
    kinds = torch.stack([volume_of(truth / f"kind{i}.mrc") for i in (0, 1)])
    first, second = first_model(planned, kinds).references[0]
    outside = volume_of(truth / "right.mrc") == 0
    assert float((first - second).abs().max()) > 0
    assert float((first - second)[outside].abs().max()) < 1e-3 * float((first - second).abs().max())


def test_empty_classes_take_the_worse_half_of_the_largest(truth):
    """Once, in the next iteration only; nobody else is moved."""
    step = Class3DStep(
        particles=Path("particles.star"), reference=(Path("reference.mrc"),), classes=3, diameter=DIAMETER
    )
    planned = make_plan(step, Context(folder=truth, project=truth), read_particles(truth / "particles.star"))[
        1
    ]
    model = first_model(planned, torch.zeros(3, planned.box, planned.box, planned.box) + 1e-3)
    best = np.zeros((N, len(BEST)))
    best[: N // 4, BEST.index("class")] = 2
    best[:, BEST.index("evidence")] = np.random.default_rng(1).normal(size=N)
    new, seeded = reseed(planned, replace(model, iteration=3, shares=torch.ones(3) / 3), best)
    assert seeded == 1
    forced = new.forced.numpy()
    evidence, large = best[:, BEST.index("evidence")], best[:, BEST.index("class")] == 0
    assert (forced[~large] == FREE).all()
    assert (forced == 1).sum() == large.sum() // 2
    assert evidence[forced == 1].max() <= evidence[forced == 0].min()
    assert reseed(planned, replace(model, iteration=24), best)[1] == 0


@pytest.mark.parametrize(
    ("parameters", "error", "says"),
    [
        ({"symmetry": "Q3"}, ParameterError, "no point group"),
        ({"reference": (Path("kind0.mrc"),) * 3}, ParameterError, "3 references for 2 classes"),
        ({"classes": 50}, TableError, "at least 1000"),
        ({"diameter": 500.0}, ParameterError, "does not fit"),
        ({"resolution": 5.0}, ParameterError, "hold no detail"),
        ({"initial_lowpass": 12.0}, ParameterError, "finer than --resolution"),
        ({"focus_mask": Path("reference.mrc")}, ParameterError, "between 0 and 1"),
        ({"mask": Path("other.mrc")}, ShapeError, "Å wide"),
        ({"focus_mask": Path("corner.mrc")}, ParameterError, "outside of the particle"),
    ],
)
def test_bad_parameters(truth, tmp_path, parameters, error, says):
    folder = copy(truth, tmp_path / "project")
    mask = volume_of(folder / "left.mrc").numpy()
    write_mrc(folder / "other.mrc", mask, pixel_size=PIXEL / 2)
    corner = np.zeros_like(mask)
    corner[:3, :3, :3] = 1
    write_mrc(folder / "corner.mrc", corner, pixel_size=PIXEL)
    with pytest.raises(error, match=says):
        run(folder, **parameters)
    assert not any(folder.glob(f"{Class3DStep.folder}/*"))


def test_bad_tables(truth, tmp_path):
    folder = copy(truth, tmp_path / "project")
    good = read_particles(folder / "particles.star")
    write_particles(folder / "particles.star", good.with_rows(good.rows.drop("rlnAngleTilt")))
    with pytest.raises(HalfmapError, match="rlnAngleTilt"):
        run(folder)
    flat = good.with_columns(pl.lit(0.0).alias("rlnAngleRot"), pl.lit(0.0).alias("rlnAngleTilt"))
    write_particles(folder / "particles.star", flat)
    with pytest.raises(TableError, match="one direction"):
        run(folder)
