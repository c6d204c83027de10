"""Maps from random poses against truth: what they look like, what runs agree in, and what stops them."""

from __future__ import annotations

import functools
import math
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from pose_simulation import Particle

from halfmap.data import ParticleSet, Poses
from halfmap.engine import Context, RunOptions
from halfmap.errors import HalfmapError, ParameterError, TableError
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.ctf import ctf
from halfmap.ops.fourier import irfft2, resample, rfft2, shift_image
from halfmap.ops.fsc import fsc, resolution
from halfmap.ops.masks import soft_sphere
from halfmap.ops.rotations import random_rotations
from halfmap.ops.symmetry import operators, symmetric_distance
from halfmap.project import Project
from halfmap.search.volume_alignment import Alignment, align_volume, centre_of_mass
from halfmap.steps.abinitio import consensus, rounds, run, tables
from halfmap.steps.abinitio.step import AbInitioStep

BOX, PIXEL, DIAMETER, N = 32, 5.0, 110.0, 300
DEFOCI = (9000.0, 12000.0, 15000.0)
LENS = {"pixel_size": PIXEL, "voltage_kV": 300.0, "cs_mm": 2.7, "amplitude_contrast": 0.1}
OPTICS = {
    "rlnOpticsGroup": [1],
    "rlnOpticsGroupName": ["one"],
    "rlnVoltage": [300.0],
    "rlnSphericalAberration": [2.7],
    "rlnAmplitudeContrast": [0.1],
    "rlnImagePixelSize": [PIXEL],
    "rlnImageSize": [BOX],
}
HOW = {
    "mask": soft_sphere((BOX,) * 3, radius=DIAMETER / 2, edge=10.0, pixel_size=PIXEL),
    "radius_px": DIAMETER / 2 / PIXEL,
    "frequency": 11,
}


def made_up(seed: int, group: str = "C1") -> Particle:
    count = 24 // len(operators(group)) + 4
    atoms = Particle.random(BOX, count=count, radius_px=9.0, seed=seed).atoms * 1.4
    return Particle(torch.cat([atoms @ operator.T for operator in operators(group)]), BOX)


def write_project(folder: Path, particles: list[Particle], *, variance: float = 0.5, n: int = N) -> Poses:
    """Equally many images of each particle; the poses. The variance is the signal's over the noise's."""
    generator = torch.Generator().manual_seed(5)
    rotations = random_rotations(n, generator=generator, dtype=torch.float64)
    shifts = torch.randn(n, 2, generator=generator, dtype=torch.float64) * 0.6
    kind = np.arange(n) % len(particles)
    defocus = np.array(DEFOCI)[np.arange(n) // len(particles) % len(DEFOCI)]
    how = {"defocus_angle": 0.0, **LENS}
    transfer = {z: ctf((BOX, BOX), defocus_u=z, defocus_v=z, **how) for z in DEFOCI}
    clean = torch.empty(n, BOX, BOX)
    for number, particle in enumerate(particles):
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
            "someOtherColumn": kind,
        }
    )
    write_particles(folder / "particles.star", ParticleSet(pl.DataFrame(OPTICS), rows))
    return Poses(rotations, shifts * PIXEL)


def start(folder: Path, *, workers: int = 1, **parameters) -> Path:
    settings = {
        "particles": Path("particles.star"),
        "diameter": DIAMETER,
        "symmetry": "D2",
        "iterations": 12,
        "restarts": 4,
        "batch": 100,
    }
    options = RunOptions(workers=workers, device="cpu")
    return Project.at(folder).run(AbInitioStep(**(settings | parameters)), options).folder


def volume_of(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(read_mrc(path), np.float32))


def on_truth(path: Path, particle: Particle) -> tuple[Alignment, float]:
    """How a map comes onto that of a particle, and the resolution in Å to which it agrees then."""
    found, truth = volume_of(path), particle.volume()
    alignment = align_volume(found, truth, **HOW)
    curve = fsc(alignment.apply(found) * HOW["mask"], truth * HOW["mask"])
    return alignment, resolution(curve, pixel_size=PIXEL, box=BOX, threshold=0.5)


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> tuple[Path, Poses]:
    folder = tmp_path_factory.mktemp("abinitio")
    return folder, write_project(folder, [made_up(1, "D2")])


@pytest.fixture(scope="module")
def job(truth) -> Path:
    return start(truth[0])


def copy(folder: Path, to: Path) -> Path:
    ignored = shutil.ignore_patterns(AbInitioStep.folder, "default_pipeline.star")
    shutil.copytree(folder, to, ignore=ignored)
    return to


def test_map_and_poses_are_those_of_the_truth(truth, job):
    alignment, agreed = on_truth(job / "class001.mrc", made_up(1, "D2"))
    assert agreed < 20.0
    assert read_header(job / "class001.mrc").pixel_size == pytest.approx(PIXEL)
    table = read_particles(job / "particles.star")
    # Of the other hand an image is that of the particle seen from behind.
    behind = torch.diag(torch.tensor([-1.0, -1.0, 1.0] if alignment.mirrored else [1.0, 1.0, 1.0])).double()
    found = behind @ table.poses.rotations.double() @ alignment.rotation.T
    turned = symmetric_distance(found, truth[1].rotations, "D2")
    assert float((turned < 15).double().mean()) > 0.8
    assert table.rows["someOtherColumn"].to_list() == [0] * N
    assert set(table.rows["rlnClassNumber"]) == {1}
    assert table.rows["rlnMaxValueProbDistribution"].is_between(0, 1).all()
    names = {"maps.png", "runs.png", "progress.png"}
    assert names == {path.name for path in job.glob("*.png")}


def test_runs_that_agree_are_reported_and_no_more_are_made(job):
    blocks = read_star(job / "model.star")
    assert blocks["model_classes"]["hmRunAgreement"][0] < 20.0
    assert blocks["model_runs"]["hmRunKept"].to_list() == [1, 1]
    assert blocks["model_general"]["rlnNrClasses"] == 1


def test_noise_has_no_map(tmp_path, caplog):
    """Runs on noise lead to maps of their own each: none is claimed to have a resolution."""
    write_project(tmp_path, [made_up(1)], variance=1e-6, n=80)
    job = start(tmp_path, symmetry="C1", iterations=3, batch=40, restarts=3)
    blocks = read_star(job / "model.star")
    assert blocks["model_classes"]["hmRunAgreement"].to_list() == [999.0]
    assert sorted(blocks["model_runs"]["hmRunKept"]) == [0, 0, 1]
    assert "agrees with no other" in caplog.text


@pytest.mark.parametrize("likeliest", [0, 1])
def test_a_run_that_differs_is_left_out(truth, likeliest):
    """It has a map of another particle; of the two that agree, one is moved onto the likelier."""
    planned = _plan(truth[0])
    size = (planned.box,) * 3
    maps = [resample(made_up(seed).volume(), new_shape=size) for seed in (1, 1, 2)]
    rotation = random_rotations(1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[0]
    maps[1] = Alignment(rotation, torch.ones(3), True, 1.0).apply(maps[1])
    runs = torch.stack(maps)[:, None]
    matches = {
        (one, other): [
            consensus.Match.of(planned, told) for told in consensus.matched(planned, runs[one], runs[other])
        ]
        for one, other in ((0, 1), (0, 2), (1, 2))
    }
    evidence = np.full((3, 5), 9.0)
    evidence[likeliest] += 1.0
    found = consensus.compare(planned, runs, evidence, matches)
    assert found.kept.tolist() == [likeliest, 1 - likeliest]
    assert found.rejected.tolist() == [2]
    assert found.resolutions[0, 1] < 17.0 < found.resolutions[0, 2]
    assert found.over_chance[0, 1] > 0.9
    moved = centre_of_mass(maps[likeliest]).double()
    mean = Alignment(torch.eye(3).double(), moved, False, 1.0).apply(found.maps[0]) * planned.sphere()
    assert float(fsc(mean, maps[likeliest] * planned.sphere())[1 : planned.radius].min()) > 0.9


def test_maps_of_two_runs_are_paired_from_either_side():
    """The one of a run that is most like each of another, and how it comes onto it."""
    one, other = (Alignment(random_rotations(1)[0].double(), torch.randn(3).double(), m, 1.0) for m in (0, 1))
    curve = torch.ones(3)
    matches = {(0, 1): [consensus.Match(1, one, curve, 9.0), consensus.Match(0, other, curve, 8.0)]}
    found = consensus._onto(matches, 1, 0)
    assert [(each.number, each.resolution) for each in found] == [(1, 8.0), (0, 9.0)]
    assert torch.equal(found[0].alignment.rotation, other.rotation.T)
    assert consensus._onto(matches, 0, 1) is matches[0, 1]


def test_likelier_runs_win():
    """Not the most that agree, who may be in one trap; nor they, if one alone is surely likelier."""
    noise = np.random.default_rng(1).normal(0.0, 5.0, 100)
    agree = np.zeros((5, 5), bool)
    agree[:3, :3] = agree[3:, 3:] = True
    evidence = noise + np.array([0.0, 0.2, 0.1, 2.0, 2.1])[:, None]
    assert consensus._group(agree, evidence).tolist() == [4, 3]
    assert consensus._group(agree[2:5, 2:5], evidence[2:5]).tolist() == [2, 1]
    assert consensus._group(agree[:4, :4], evidence[:4]).tolist() == [3]
    by_chance = np.random.default_rng(2).normal(0.0, 5.0, (4, 100))
    assert sorted(consensus._group(agree[:4, :4], by_chance)) == [0, 1, 2]


def test_hollow_balls_do_not_agree():
    """Of the same outline, but with other walls: what they share is there at any rotation."""
    generator = torch.Generator().manual_seed(3)
    axis = torch.arange(BOX) - BOX // 2
    distance = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).float().norm(dim=0)
    wall = torch.exp(-(((distance - 8.0) / 2.0) ** 2))
    one, other = (wall * (1 + 0.5 * torch.randn(wall.shape, generator=generator)) for _ in range(2))
    found = align_volume(one, other, **HOW)
    assert found.correlation > 0.3
    assert found.over_chance < 0.2
    assert align_volume(one, one, **HOW).over_chance > 0.9


@pytest.mark.parametrize(("group", "fork"), [("T", 1), ("O", 1), ("I2", 1), ("D7", 0)])
def test_the_likelier_of_two_goes_on(truth, tmp_path, monkeypatch, group, fork):
    """Of two signs, where maps are balls at first, or of two starts."""
    planned = _plan(truth[0], symmetry=group, iterations=8)
    choice = 4 if fork else 3
    assert planned.fork == (fork, choice)

    def advanced(stretch, *, plan, folder):
        (folder / stretch.line.file(stretch.stop)).touch()
        if stretch.line.other and stretch.start == 1:
            assert (folder / run.Line(stretch.line.run, False).file(1)).exists()
        likely = 5.0 + stretch.line.other * (1 if stretch.line.run == 0 else -1)
        steps = range(stretch.start + 1, stretch.stop + 1)
        said = {"run": stretch.line.run + 1, "particles": 9, "searched_A": 9.0, "mean_evidence": likely}
        return {"figures": [{"iteration": i, **said} for i in steps], "evidence": [likely] * 3}

    monkeypatch.setattr(rounds, "advance", advanced)
    (tmp_path / rounds.FOLDER).mkdir()
    ended = rounds._run(Context(folder=tmp_path, project=tmp_path), planned, [0, 1])
    names = ["run01_other_it008.npz", "run02_it008.npz"]
    assert [one.maps.name for one in ended] == names
    assert sorted(path.name for path in (tmp_path / rounds.FOLDER).glob("*.npz")) == names
    figures = rounds.read_figures(tmp_path / rounds.FOLDER)
    likely = {number: [one["mean_evidence"] for one in figures if one["run"] == number] for number in (1, 2)}
    assert likely == {1: [5.0] * fork + [6.0] * (8 - fork), 2: [5.0] * 8}


def test_other_sign_of_what_is_not_spherical(truth):
    planned = _plan(truth[0], symmetry="O")
    axis = torch.arange(planned.box) - planned.box // 2
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    ball = torch.exp(-((x**2 + y**2 + z**2).sqrt() - 6.0).square() / 8)
    # The lowest harmonic of O, which has no mean over a sphere.
    bumps = ball * ((x**4 + y**4 + z**4) / (x**2 + y**2 + z**2).clamp_min(1).square() - 0.6)
    state = run.State((ball + 0.3 * bumps)[None], run.empty_sums(planned))
    turned = run._turned(planned, state).maps[0]
    # What the average over shells of voxels is off by is spherical, too.
    share = float(((turned - ball) * bumps).sum() / bumps.square().sum())
    assert share == pytest.approx(-0.3, rel=0.02)


def _plan(folder: Path, **parameters):
    from halfmap.steps.abinitio.plan import make_plan

    settings = {"particles": Path("particles.star"), "diameter": DIAMETER, "restarts": 3}
    step = AbInitioStep(**(settings | parameters))
    table = read_particles(folder / "particles.star")
    return make_plan(step, Context(folder=folder, project=folder), table)[1]


def test_symmetry_is_that_of_the_standard_setting(job):
    volume = volume_of(job / "class001.mrc")[1:, 1:, 1:]
    for axes in ((0, 1), (0, 2), (1, 2)):
        assert float((volume - volume.flip(*axes)).abs().max()) < 1e-3 * float(volume.max())


def test_two_particles_are_told_apart(tmp_path):
    particles = [made_up(1, "D2"), made_up(2, "D2")]
    write_project(tmp_path, particles, variance=1.0, n=400)
    job = start(tmp_path, classes=2, restarts=1)
    table = read_particles(job / "particles.star").rows
    same = table["rlnClassNumber"].to_numpy() - 1 == table["someOtherColumn"].to_numpy()
    assert max(same.mean(), 1 - same.mean()) > 0.85
    classes = read_star(job / "model.star")["model_classes"]
    assert len(classes) == 2
    assert sum(classes["hmNrParticles"]) == 400


def test_stopped_and_resumed_by_two_workers(truth, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "_ROUND", 2)
    how = {"iterations": 3, "batch": 40, "restarts": 2}
    whole = start(copy(truth[0], tmp_path / "whole"), **how)
    folder = copy(truth[0], tmp_path / "stopped")
    real = run.advance

    def stopped(stretch, **given):
        if stretch.line.run == 1 and stretch.start:
            raise KeyboardInterrupt
        return real(stretch, **given)

    monkeypatch.setattr(rounds, "advance", functools.wraps(real)(stopped))
    with pytest.raises(KeyboardInterrupt):
        start(folder, **how)
    monkeypatch.setattr(rounds, "advance", real)
    options, number = RunOptions(workers=2, device="cpu"), f"{AbInitioStep.folder}/job001"
    with monkeypatch.context() as placed, pytest.raises(KeyboardInterrupt):
        placed.setattr(tables, "write", _stop)
        Project.at(folder).resume(number, options)
    other = Project.at(folder).resume(number, options).folder
    assert not list((other / rounds.FOLDER).glob("part*"))
    one, two = (volume_of(each / "class001.mrc") for each in (whole, other))
    assert float((one - two).abs().max()) < 1e-4 * float(one.abs().max())
    assert (whole / "particles.star").read_text() == (other / "particles.star").read_text()


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("parameters", "error", "says"),
    [
        ({"symmetry": "Q3"}, ParameterError, "no point group"),
        ({"diameter": 500.0}, ParameterError, "does not fit"),
        ({"diameter": None}, ParameterError, "give --diameter"),
        ({"resolution": 5.0}, ParameterError, "hold no detail"),
        ({"resolution": 60.0}, ParameterError, "has no shape"),
        ({"shift_range": 200.0}, ParameterError, "smaller --shift-range"),
    ],
)
def test_bad_parameters(truth, tmp_path, parameters, error, says):
    folder = copy(truth[0], tmp_path / "project")
    with pytest.raises(error, match=says):
        start(folder, **parameters)
    assert not any(folder.glob(f"{AbInitioStep.folder}/*"))


def test_bad_tables(truth, tmp_path):
    folder = copy(truth[0], tmp_path / "project")
    good = read_particles(folder / "particles.star")
    write_particles(folder / "particles.star", good.with_rows(good.rows[:20]))
    with pytest.raises(TableError, match="at least 50"):
        start(folder)
    write_particles(folder / "particles.star", good.with_rows(good.rows.drop("rlnDefocusU")))
    with pytest.raises(HalfmapError, match="rlnDefocusU"):
        start(folder)
    stack = np.array(read_mrc(folder / "Stacks/a.mrcs"))
    stack[7] = np.nan
    write_mrc(folder / "Stacks/a.mrcs", stack, pixel_size=PIXEL, stack=True)
    write_particles(folder / "particles.star", good)
    with pytest.raises(TableError, match="8"):
        start(folder)
