"""Refinement against truth: where particles were seen from, what they look like, and what stops it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from refine_simulation import BOX, DIAMETER, PIXEL, SCALES, N, errors, run, write_project

from halfmap.data import ParticleSet, Poses
from halfmap.errors import FileFormatError, HalfmapError, ParameterError, ShapeError, TableError
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.fourier import rfft3
from halfmap.ops.fsc import fsc, resolution
from halfmap.ops.grids import ring_index
from halfmap.ops.masks import soft_sphere
from halfmap.project import Project
from halfmap.search.pose_information import nothing_but_signal
from halfmap.steps.refine import iterate, model, start
from halfmap.steps.refine.step import RefineStep


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> tuple[Path, Poses]:
    folder = tmp_path_factory.mktemp("refine")
    return folder, write_project(folder)


@pytest.fixture(scope="module")
def job(truth) -> Path:
    return run(truth[0])


@pytest.fixture(scope="module")
def short(truth) -> Path:
    """The first three iterations."""
    return run(truth[0], most_iterations=3)


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns(RefineStep.folder, "default_pipeline.star"))
    return to


def compared(folder: Path, path: Path) -> float:
    """Resolution in Å to which a map agrees with the truth within the particle's sphere, at 0.5."""
    mask = soft_sphere((BOX,) * 3, radius=DIAMETER / 2, edge=8.0, pixel_size=PIXEL)
    maps = [torch.from_numpy(np.array(read_mrc(each), np.float32)) for each in (path, folder / "truth.mrc")]
    curve = fsc(maps[0] * mask, maps[1] * mask)
    return resolution(curve, pixel_size=PIXEL, box=BOX, threshold=0.5)


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


def test_scales_of_micrographs(job):
    found = read_star(job / "model.star")["model_groups"].sort("rlnGroupName")
    scale = dict(zip(found["rlnGroupName"], found["rlnGroupScaleCorrection"], strict=True))
    first, last = (scale[f"Motion/{defocus}.mrc"] for defocus in (8000, 16000))
    # Each is estimated from 60 particles, under a prior that pulls it towards 1.
    assert last / first == pytest.approx(SCALES[1] / SCALES[0], abs=0.2)


def test_map_is_of_all_particles_and_has_the_least_error(job):
    """Amplitudes against those of the unfiltered map of all particles: Wiener's filter, 2 f / (1 + f)."""
    names = ("map", "run_class001_unfil", "mask", *(f"run_half{i}_class001_unfil" for i in (1, 2)))
    maps = [torch.from_numpy(np.array(read_mrc(job / f"{name}.mrc"), np.float32)) for name in names]
    filtered, whole, mask = rfft3(maps[0]), rfft3(maps[1] * maps[2]), maps[2]
    correlation = read_star(job / "model.star")["model_class_1"]["rlnGoldStandardFsc"].to_numpy()
    index, seen = ring_index((BOX,) * 3), 0
    for shell in np.flatnonzero((correlation > 0.3) & (correlation < 0.9)):
        own = index == int(shell)
        gain = float((filtered[own] * whole[own].conj()).real.sum() / whole[own].abs().square().sum())
        expected = 2 * correlation[shell] / (1 + correlation[shell])
        # The correlation itself is 0.1 to 0.2 less.
        assert gain == pytest.approx(expected, abs=0.1)
        seen += 1
    assert seen
    halves = fsc((maps[3] + maps[4]) * mask, maps[1] * mask)
    assert float(halves[2:8].min()) > 0.95


def test_every_particle_has_poses_that_matter(job):
    found = read_particles(job / "particles.star").rows["rlnNrOfSignificantSamples"]
    assert found.min() == 1


def test_half_sets_do_not_meet(truth, job, tmp_path, monkeypatch):
    """With images of the second half set exchanged, the sums of the first are the same, theirs are not.

    What both share is held fixed: where they begin, the mask, the correlation, the frame between them, and
    what noise of the maps makes poses seem; nothing is joined.
    """
    folder = copy(truth[0], tmp_path / "project")
    # What is compared is equal or not, however few images there are.
    subset = read_particles(job / "particles.star").rows["rlnRandomSubset"][::2]
    given = read_particles(folder / "particles.star")
    given = given.with_rows(given.rows[::2].with_columns(subset))
    names = given.rows["rlnImageName"].to_list()
    second = np.flatnonzero(subset.to_numpy() == 2)
    # Each for one of another micrograph, whose CTF differs.
    for a, b in zip(second, second[len(second) // 2 :], strict=False):
        names[a], names[b] = names[b], names[a]
    found, first = [], []

    def same_start(plan, reference):
        first.append(start_model(plan, reference))
        return first[0]

    def same_correlation(*maps, **how):
        number = len(found) - 1
        if number < 3:
            curves.append(correlate(*maps, **how))
        return curves[number % 3]

    def stop(plan, before, parts, *rest):
        found.append([sum(np.array(file) for part in own for file in part.files) for own in parts])
        if before.iteration == 2:
            raise KeyboardInterrupt
        return maximise(plan, before, parts, *rest)

    write_mrc(
        folder / "mask.mrc",
        soft_sphere((BOX,) * 3, radius=DIAMETER / 2, edge=8.0, pixel_size=PIXEL).numpy(),
        pixel_size=PIXEL,
    )
    curves, correlate, maximise = [], model.corrected_fsc, iterate.maximise
    monkeypatch.setattr(model, "corrected_fsc", same_correlation)
    monkeypatch.setattr(model, "_JOIN_A", math.inf)
    monkeypatch.setattr(model, "_apart", lambda *maps: torch.zeros(2, 3, dtype=torch.float64))
    monkeypatch.setattr(model, "pose_information", lambda *maps, **how: nothing_but_signal())
    # Noise and grey scale of the reference are estimated on all images.
    start_model = start.first_model
    monkeypatch.setattr(start, "first_model", same_start)
    monkeypatch.setattr(iterate, "maximise", stop)
    for table in (given, given.with_columns(pl.Series("rlnImageName", names))):
        write_particles(folder / "particles.star", table)
        with pytest.raises(KeyboardInterrupt):
            run(folder, mask=Path("mask.mrc"))
    for (own, other), (own_again, exchanged) in zip(found[:3], found[3:], strict=True):
        largest = np.abs(own).max()
        assert np.abs(own - own_again).max() < 1e-5 * largest
        assert np.abs(other - exchanged).max() > 1e-2 * largest


def test_symmetry(tmp_path, monkeypatch):
    """Where memory suffices for transforms of little padding alone."""
    padding = 1.25
    monkeypatch.setattr("halfmap.search.padding._PADDINGS", (padding,))
    poses = write_project(tmp_path, group="D2", n=160)
    job = run(tmp_path, symmetry="D2", most_iterations=5)
    with np.load(next((job / iterate.FOLDER).glob("it*_model.npz"))) as file:
        assert float(file["padding"]) == padding
    assert compared(tmp_path, job / "map.mrc") < 14.0
    volume = torch.from_numpy(np.array(read_mrc(job / "map.mrc"), np.float32))[1:, 1:, 1:]
    assert float((volume - volume.flip(0, 1)).abs().max()) < 1e-3 * float(volume.max())
    assert float((errors(job, poses, "D2") < 8).double().mean()) > 0.9


def test_stopped_and_resumed(truth, short, tmp_path, monkeypatch):
    folder = copy(truth[0], tmp_path / "project")
    real = iterate.maximise

    def stopped(plan, model, *rest):
        if model.iteration == 1:
            raise KeyboardInterrupt
        return real(plan, model, *rest)

    monkeypatch.setattr(iterate, "maximise", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(folder, most_iterations=3)
    monkeypatch.setattr(iterate, "maximise", real)
    other = Project.at(folder).resume(f"{RefineStep.folder}/job001").folder
    for name in ("run_half1_class001_unfil.mrc", "map.mrc"):
        assert np.array_equal(read_mrc(short / name), read_mrc(other / name))
    assert (short / "particles.star").read_text() == (other / "particles.star").read_text()


def test_workers_change_nothing(truth, short, tmp_path):
    folder = copy(truth[0], tmp_path / "project")
    other = run(folder, workers=2, most_iterations=3)
    one, two = (read_mrc(each / "run_half1_class001_unfil.mrc") for each in (short, other))
    assert np.abs(one - two).max() < 1e-4 * np.abs(one).max()


def test_a_sample_is_the_same_particles_each_time(truth, tmp_path):
    copied = copy(truth[0], tmp_path / "other")
    tables = [
        read_particles(run(copied, most_iterations=1, sample=60) / "particles.star").rows for _ in range(2)
    ]
    assert tables[0].equals(tables[1])
    rows = tables[0]["someOtherColumn"].to_list()
    assert len(rows) == 60
    assert rows == sorted(rows)
    assert max(rows) - min(rows) > N / 2


def test_noise_has_no_resolution(tmp_path):
    """Particles of noise follow the reference as far as that goes, to 25 Å, and the smearing of the mask.

    In the shell after that a correlation of 0.143 is one standard deviation, of 54 coefficients, and chance.
    """
    write_project(tmp_path, signal=0.0)
    job = run(tmp_path, most_iterations=4)
    blocks, side = read_star(job / "model.star"), BOX * PIXEL
    smeared = side / 25.0 + side / DIAMETER + 1
    assert blocks["model_general"]["rlnCurrentResolution"] > side / smeared
    beyond = blocks["model_class_1"]["rlnGoldStandardFsc"].to_numpy()[math.ceil(smeared) : BOX // 2]
    # Coefficients of the full spectrum in these shells, within the mask; and three standard deviations.
    count = 2 / 3 * math.pi * ((BOX / 2) ** 3 - smeared**3) * math.pi / 6 * (DIAMETER / side) ** 3
    assert abs(beyond.mean()) < 3 / math.sqrt(count)


def test_nothing_is_reported_beyond_what_images_hold(tmp_path):
    """Particles without anything finer than 15 Å, where they have signal otherwise."""
    poses = write_project(tmp_path, group="D2", n=160, signal=2.0, finest=15.0)
    job = run(tmp_path, symmetry="D2", most_iterations=6)
    general = read_star(job / "model.star")["model_general"]
    # The filter ends half of its edge, one ring, beyond; from the next ring on there is nothing at all.
    empty = math.ceil(BOX * PIXEL / 15.0 + 1)
    assert BOX * PIXEL / empty < general["rlnCurrentResolution"] < 15.0
    angle, found = errors(job, poses, "D2"), read_particles(job / "particles.star").rows
    stated = torch.from_numpy(found["hmPoseUncertainty"].to_numpy())
    assert abs(float((angle < stated).double().mean()) - 0.61) < 4 * math.sqrt(0.61 * 0.39 / 160)


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
    stretched = {"rlnMagMat00": 1.01, "rlnMagMat01": 0.0, "rlnMagMat10": 0.0, "rlnMagMat11": 1.0}
    optics = good.optics.with_columns(pl.lit(value).alias(name) for name, value in stretched.items())
    write_particles(folder / "particles.star", ParticleSet(optics, good.rows))
    with pytest.raises(TableError, match="magnification"):
        run(folder)
    write_particles(folder / "particles.star", good.with_rows(good.rows.drop("rlnDefocusU")))
    with pytest.raises(HalfmapError, match="rlnDefocusU"):
        run(folder)
