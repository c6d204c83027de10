"""Refinement against truth: where particles were seen from, what they look like, and what stops it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from pose_simulation import Particle

from halfmap.data import ParticleSet, Poses
from halfmap.engine import RunOptions
from halfmap.errors import FileFormatError, HalfmapError, ParameterError, ShapeError, TableError
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
from halfmap.steps.refine import iterate, start
from halfmap.steps.refine.plan import half_sets
from halfmap.steps.refine.step import RefineStep

BOX, PIXEL, DIAMETER, N, SHIFT_A = 36, 4.0, 100.0, 240, 4.0
OPTICS = {
    "rlnOpticsGroup": [1],
    "rlnOpticsGroupName": ["one"],
    "rlnVoltage": [300.0],
    "rlnSphericalAberration": [2.7],
    "rlnAmplitudeContrast": [0.1],
    "rlnImagePixelSize": [PIXEL],
    "rlnImageSize": [BOX],
}


def write_project(
    folder: Path, *, group: str = "C1", signal: float = 1.0, n: int = N, seed: int = 3
) -> Poses:
    """A table, a stack and a reference at another scale, box and pixel size; the true poses."""
    generator = torch.Generator().manual_seed(seed)
    particle = Particle.random(BOX, count=60, radius_px=11.0)
    atoms = torch.cat([particle.atoms @ operator.T for operator in operators(group)])
    particle = Particle(atoms, BOX)
    rotations = random_rotations(n, generator=generator, dtype=torch.float64)
    shifts = torch.randn(n, 2, generator=generator, dtype=torch.float64) * (SHIFT_A / PIXEL)
    defocus = np.repeat(np.linspace(8000, 16000, 4), -(-n // 4))[:n]
    transfer = torch.stack(
        [
            ctf(
                (BOX, BOX),
                pixel_size=PIXEL,
                defocus_u=float(z),
                defocus_v=float(z),
                defocus_angle=0.0,
                voltage_kV=300.0,
                cs_mm=2.7,
                amplitude_contrast=0.1,
            )
            for z in defocus
        ]
    )
    clean = irfft2(rfft2(particle.images(rotations)) * transfer, shape=(BOX, BOX))
    clean = shift_image(clean, shift_px=-shifts)
    noise = torch.randn(n, BOX, BOX, generator=generator)
    # A fifth of the noise's variance within the particle's circle.
    scale = signal * math.sqrt(0.2 / float(clean[:, 6:-6, 6:-6].var()))
    (folder / "Stacks").mkdir(parents=True)
    write_mrc(folder / "Stacks/a.mrcs", (scale * clean + noise).numpy(), pixel_size=PIXEL, stack=True)
    rows = pl.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@Stacks/a.mrcs" for i in range(n)],
            "rlnMicrographName": [f"Motion/{int(z)}.mrc" for z in defocus],
            "rlnOpticsGroup": np.ones(n, np.int64),
            "rlnDefocusU": defocus,
            "rlnDefocusV": defocus,
            "rlnDefocusAngle": np.zeros(n),
            "someOtherColumn": np.arange(n),
        }
    )
    write_particles(folder / "particles.star", ParticleSet(pl.DataFrame(OPTICS), rows))
    truth = particle.volume()
    write_mrc(folder / "truth.mrc", truth.numpy(), pixel_size=PIXEL)
    smaller = 32
    coarse = 700.0 * resample(truth, new_shape=(smaller,) * 3).numpy()
    write_mrc(folder / "reference.mrc", coarse, pixel_size=PIXEL * BOX / smaller)
    return Poses(rotations, shifts * PIXEL)


def run(folder: Path, *, workers: int = 1, **parameters) -> Path:
    settings = {
        "particles": Path("particles.star"),
        "reference": Path("reference.mrc"),
        "diameter": DIAMETER,
        "initial_lowpass": 25.0,
        "most_iterations": 7,
    }
    options = RunOptions(workers=workers, device="cpu")
    return Project.at(folder).run(RefineStep(**(settings | parameters)), options).folder


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> tuple[Path, Poses]:
    folder = tmp_path_factory.mktemp("refine")
    return folder, write_project(folder)


@pytest.fixture(scope="module")
def job(truth) -> Path:
    return run(truth[0])


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns(RefineStep.folder, "default_pipeline.star"))
    return to


def compared(folder: Path, path: Path) -> float:
    """Resolution in Å to which a map agrees with the truth within the particle's sphere, at 0.5."""
    mask = soft_sphere((BOX,) * 3, radius=DIAMETER / 2, edge=8.0, pixel_size=PIXEL)
    maps = [torch.from_numpy(np.array(read_mrc(each), np.float32)) for each in (path, folder / "truth.mrc")]
    curve = fsc(maps[0] * mask, maps[1] * mask)
    return resolution(curve, pixel_size=PIXEL, box=BOX, threshold=0.5)


def errors(job: Path, poses: Poses, group: str = "C1") -> torch.Tensor:
    found = read_particles(job / "particles.star").poses
    return symmetric_distance(found.rotations.double(), poses.rotations, group)


def test_map_and_poses_are_those_of_the_truth(truth, job):
    folder, poses = truth
    # The reference holds no detail beyond 25 Å.
    assert compared(folder, job / "map.mrc") < 14.0
    found = read_particles(job / "particles.star")
    angle = errors(job, poses)
    stated = torch.from_numpy(found.rows["hmPoseUncertainty"].to_numpy())
    right = angle < 4 * stated
    assert float(right.double().mean()) > 0.9
    shifts = (found.poses.shifts_A.double() - poses.shifts_A).norm(dim=1)
    assert float(shifts[right].median()) < 2.5
    assert found.rows["someOtherColumn"].to_list() == list(range(N))


def test_errors_are_as_stated(truth, job):
    """Of three normal components the norm is within the root of their variances' sum for about 61 %."""
    found = read_particles(job / "particles.star").rows
    stated = torch.from_numpy(found["hmPoseUncertainty"].to_numpy())
    share = float((errors(job, truth[1]) < stated).double().mean())
    # Four standard deviations of a binomial of 240.
    assert abs(share - 0.61) < 4 * math.sqrt(0.61 * 0.39 / N)


def test_half_maps_are_unfiltered_and_the_table_says_how_they_agree(job):
    halves = [read_mrc(job / f"run_half{i}_class001_unfil.mrc") for i in (1, 2)]
    assert read_header(job / "run_half1_class001_unfil.mrc").pixel_size == pytest.approx(PIXEL)
    curve = fsc(*(torch.from_numpy(np.array(half, np.float32)) for half in halves))
    blocks = read_star(job / "model.star")
    stated = blocks["model_class_1"]["rlnFourierShellCorrelationUnmaskedMaps"].to_numpy()
    assert np.abs(stated - curve.numpy())[1:-2].max() < 1e-3
    power = np.abs(np.fft.rfftn(halves[0])) ** 2
    assert power[BOX // 2 - 2, 0, 0] > 1e-4 * power[3, 0, 0]
    assert set(read_particles(job / "particles.star").rows["rlnRandomSubset"]) == {1, 2}
    assert sorted(path.name for path in job.glob("*.png")) == [
        "angular_distribution.png",
        "fsc.png",
        "progress.png",
        "slices.png",
    ]


def test_half_sets_do_not_meet(truth, job, tmp_path, monkeypatch):
    """With images of the second half set exchanged, the sums of the first are the same, theirs are not."""
    folder = copy(truth[0], tmp_path / "project")
    subset = read_particles(job / "particles.star").rows["rlnRandomSubset"]
    given = read_particles(folder / "particles.star").with_columns(subset)
    names = given.rows["rlnImageName"].to_list()
    second = np.flatnonzero(subset.to_numpy() == 2)
    for a, b in zip(second[::2], second[1::2], strict=False):
        names[a], names[b] = names[b], names[a]
    found, first = [], []

    def same_start(plan, reference):
        first.append(start_model(plan, reference))
        return first[0]

    def stop(plan, model, halves, *rest):
        found.append([half.sums.data.clone() for half in halves])
        raise KeyboardInterrupt

    # Noise and grey scale of the reference are estimated on all images.
    start_model = start.first_model
    monkeypatch.setattr(start, "first_model", same_start)
    monkeypatch.setattr(iterate, "maximise", stop)
    for table in (given, given.with_columns(pl.Series("rlnImageName", names))):
        write_particles(folder / "particles.star", table)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    (own, other), (own_again, exchanged) = found
    largest = float(own.abs().max())
    assert float((own - own_again).abs().max()) < 1e-5 * largest
    assert float((other - exchanged).abs().max()) > 1e-2 * largest


def test_symmetry(tmp_path):
    poses = write_project(tmp_path, group="D2", n=160)
    job = run(tmp_path, symmetry="D2", most_iterations=5)
    assert compared(tmp_path, job / "map.mrc") < 14.0
    volume = torch.from_numpy(np.array(read_mrc(job / "map.mrc"), np.float32))[1:, 1:, 1:]
    assert float((volume - volume.flip(0, 1)).abs().max()) < 1e-3 * float(volume.max())
    assert float((errors(job, poses, "D2") < 8).double().mean()) > 0.9


def test_stopped_and_resumed(truth, job, tmp_path, monkeypatch):
    folder = copy(truth[0], tmp_path / "project")
    real = iterate.maximise

    def stopped(plan, model, *rest):
        if model.iteration == 1:
            raise KeyboardInterrupt
        return real(plan, model, *rest)

    monkeypatch.setattr(iterate, "maximise", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    monkeypatch.setattr(iterate, "maximise", real)
    other = Project.at(folder).resume(f"{RefineStep.folder}/job001").folder
    for name in ("run_half1_class001_unfil.mrc", "map.mrc"):
        assert np.array_equal(read_mrc(job / name), read_mrc(other / name))
    assert (job / "particles.star").read_text() == (other / "particles.star").read_text()


def test_workers_change_nothing(truth, job, tmp_path):
    folder = copy(truth[0], tmp_path / "project")
    other = run(folder, workers=2)
    one, two = (read_mrc(each / "run_half1_class001_unfil.mrc") for each in (job, other))
    assert np.abs(one - two).max() < 1e-4 * np.abs(one).max()


def test_noise_has_no_resolution(tmp_path):
    """Particles of noise follow the reference as far as that goes, to 25 Å, and the smearing of the mask."""
    write_project(tmp_path, signal=0.0)
    job = run(tmp_path, most_iterations=4)
    smeared = 1 / (1 / 25.0 + 1 / DIAMETER)
    assert read_star(job / "model.star")["model_general"]["rlnCurrentResolution"] > smeared


def _spoil(folder: Path, **columns) -> None:
    table = read_particles(folder / "particles.star")
    write_particles(
        folder / "particles.star", table.with_columns(*(pl.Series(k, v) for k, v in columns.items()))
    )


@pytest.mark.parametrize(
    ("parameters", "error", "says"),
    [
        ({"symmetry": "Q3"}, ParameterError, "no point group"),
        ({"reference": Path("flat.mrc")}, FileFormatError, "same everywhere"),
        ({"reference": Path("nan.mrc")}, FileFormatError, "NaN"),
        ({"reference": Path("brick.mrc")}, ShapeError, "cubic"),
        ({"reference": Path("tiny.mrc")}, ParameterError, "pixel size right"),
        ({"mask": Path("other.mrc")}, ShapeError, "Å wide"),
        ({"mask": Path("truth.mrc")}, ParameterError, "between 0 and 1"),
        ({"diameter": 500.0}, ParameterError, "does not fit"),
        ({"diameter": None}, ParameterError, "give --diameter"),
        ({"initial_lowpass": 5.0}, ParameterError, "hold no detail"),
    ],
)
def test_bad_parameters(truth, tmp_path, parameters, error, says):
    folder = copy(truth[0], tmp_path / "project")
    cube = np.array(read_mrc(folder / "truth.mrc"), np.float32)
    write_mrc(folder / "flat.mrc", np.ones_like(cube), pixel_size=PIXEL)
    write_mrc(folder / "nan.mrc", np.where(cube > cube.mean(), np.nan, cube), pixel_size=PIXEL)
    write_mrc(folder / "brick.mrc", cube[:20], pixel_size=PIXEL)
    write_mrc(folder / "tiny.mrc", cube, pixel_size=PIXEL / 10)
    write_mrc(folder / "other.mrc", (cube > 0).astype(np.float32), pixel_size=PIXEL / 2)
    write_mrc(folder / "truth.mrc", 5 * cube / cube.max(), pixel_size=PIXEL)
    with pytest.raises(error, match=says):
        run(folder, **parameters)
    assert not any(folder.glob(f"{RefineStep.folder}/*"))


def test_bad_tables(truth, tmp_path):
    folder = copy(truth[0], tmp_path / "project")
    good = read_particles(folder / "particles.star")
    _spoil(folder, rlnRandomSubset=np.ones(N, np.int64))
    with pytest.raises(TableError, match="half set 2"):
        run(folder)
    _spoil(folder, rlnRandomSubset=np.arange(N) % 3)
    with pytest.raises(TableError, match="not 1 or 2"):
        run(folder)
    write_particles(folder / "particles.star", good.with_rows(good.rows.drop("rlnDefocusU")))
    with pytest.raises(HalfmapError, match="rlnDefocusU"):
        run(folder)


def test_half_sets_are_kept_or_drawn_by_the_seed(truth):
    particles = read_particles(truth[0] / "particles.star")
    drawn = half_sets(particles, 1)
    assert abs(int(drawn.sum()) - N // 2) <= 1
    assert np.array_equal(drawn, half_sets(particles, 1))
    assert not np.array_equal(drawn, half_sets(particles, 2))
    kept = particles.with_columns(pl.Series("rlnRandomSubset", 2 - drawn))
    assert np.array_equal(half_sets(kept, 1), 1 - drawn)
