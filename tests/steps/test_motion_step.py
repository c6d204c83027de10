"""The step `motion`: everything it writes, its options, movies that are bad, and whatever interrupts it."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from eer_writer import encode, random_events, write_eer

from halfmap.data import MotionTracks, MovieSet
from halfmap.engine import Context, RunOptions
from halfmap.engine.step import parse_step
from halfmap.errors import ItemsFailedError, ParameterError, TableError
from halfmap.io.motion import read_tracks
from halfmap.io.movies import open_movie
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_micrographs, read_movies, write_movies
from halfmap.io.tiff import write_tiff_movie
from halfmap.project import Project
from halfmap.steps.motion import movie as module
from halfmap.steps.motion.step import MotionStep
from halfmap.steps.simulate.motion import read_motion
from halfmap.steps.simulate.step import SimulateMovies

PIXEL, N, SIDE = 3.0, 8, 320
SIMULATION = {
    "assembly": "none",
    "pixel_size": PIXEL,
    "width": SIDE,
    "height": SIDE,
    # A phase plate, high doses and many particles make up for the small field.
    "particles": 30,
    "phase_shift": 90.0,
    "dose_per_frame": 4.0,
    "pre_exposure": 6.0,
    "overlapping": 0.0,
    "broken": 0.0,
    "contaminants": 0.0,
    "carbon": 0.0,
    "n_movies": 3,
    "n_frames": N,
    "drift": 50.0,
    "local_motion": 10.0,
    "seed": 5,
}
SETTINGS = {"movies": Path("sim/movies.star"), "patch_size": 200.0, "pictures": False}
NAMES = ("000001", "000002", "000003")
SUMS = ("", "_noDW", "_EVN", "_ODD")


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    """A folder with simulated movies in `sim`."""
    folder = tmp_path_factory.mktemp("motion") / "project"
    (folder / "sim").mkdir(parents=True)
    SimulateMovies(**SIMULATION).run(Context(folder=folder / "sim", project=folder))
    return folder


def run(project: Path, name: str, options: RunOptions | None = None, **changes) -> tuple[Path, Context]:
    """Run the step in a folder of the project."""
    folder = project / name
    folder.mkdir(exist_ok=True)
    ctx = Context(folder=folder, project=project, options=options or RunOptions())
    MotionStep(**{**SETTINGS, **changes}).run(ctx)
    return folder, ctx


def one_movie(project: Path, name: str = "one") -> Path:
    """Table of the first movie alone, relative to the project."""
    movies = read_movies(project / "sim/movies.star")
    path = project / f"{name}.star"
    if not path.exists():
        write_movies(path, MovieSet(movies.optics, movies.rows.head(1)))
    return Path(path.name)


@pytest.fixture(scope="module")
def job(simulated) -> Path:
    return run(simulated, "job", pictures=True)[0]


def images(job: Path, name: str = "000001") -> dict[str, np.ndarray]:
    return {suffix: read_mrc(job / f"Micrographs/{name}{suffix}.mrc", 0) for suffix in SUMS}


def track_error(tracks: MotionTracks, project: Path, name: str) -> np.ndarray:
    """Estimated minus true displacement (n, points, 2) in Å, less what all frames share."""
    truth = read_motion(project / f"sim/Truth/{name}_motion.star")
    x, y = (axis.ravel() for axis in np.meshgrid(*[np.linspace(30, SIDE - 30, 6)] * 2))
    frames = np.arange(tracks.n_used)[:, None]
    seen = -tracks.shift_at(x, y, frames) * tracks.pixel_size
    error = seen - truth.trajectory(x * PIXEL, y * PIXEL, frames + tracks.first_frame - 1)
    return error - error.mean(axis=0)


def rms(error: np.ndarray) -> float:
    return float(np.sqrt((error**2).sum(axis=-1).mean()))


def contents(folder: Path, pattern: str = "**/*.mrc") -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob(pattern))}


def test_all_outputs_are_there_and_finite(job):
    for name in NAMES:
        found = images(job, name)
        for image in found.values():
            assert image.shape == (SIDE, SIDE)
            assert np.isfinite(image).all()
            assert image.std() > 0
        header = read_header(job / f"Micrographs/{name}_noDW.mrc")
        assert header.pixel_size == pytest.approx(PIXEL)
        power = read_mrc(job / f"Micrographs/{name}_PS.mrc", 0)
        assert power.shape == (512, 512)
        assert np.isfinite(power).all()
        assert (job / f"Micrographs/{name}.png").stat().st_size > 5000
    assert (job / "summary.png").stat().st_size > 5000


def test_even_and_odd_add_up_to_the_sum(job):
    for name in NAMES:
        found = images(job, name)
        whole = found["_EVN"].astype(np.float64) + found["_ODD"]
        assert np.abs(found["_noDW"] - whole).max() < 1e-6 * np.abs(whole).max()


def test_the_sum_has_the_counts_of_the_frames(job, simulated):
    movie = open_movie(simulated / "sim/Movies/000001.tiff")
    gain = read_mrc(simulated / "sim/gain.mrc", 0)
    mean = (movie.read(0, N) * gain)[:, gain > 0].mean()
    found = images(job)
    assert found["_noDW"].mean() == pytest.approx(N * mean, rel=0.01)
    assert found["_EVN"].mean() == pytest.approx(found["_ODD"].mean(), rel=0.01)
    # Noise stays white and as strong, apart from what is lost by interpolation.
    assert found[""].mean() == pytest.approx(np.sqrt(N) * mean, rel=0.01)


def test_table_of_micrographs(job, simulated):
    table = read_micrographs(job / "corrected_micrographs.star")
    optics = table.optics.to_dicts()[0]
    assert optics["rlnMicrographPixelSize"] == PIXEL
    assert optics["rlnMicrographOriginalPixelSize"] == PIXEL
    assert optics["rlnVoltage"] == 300
    assert table.rows["rlnMicrographMovieName"].to_list() == [f"sim/Movies/{name}.tiff" for name in NAMES]
    files = {
        "rlnMicrographName": "{}.mrc",
        "rlnMicrographNameNoDW": "{}_noDW.mrc",
        "rlnMicrographNameEven": "{}_EVN.mrc",
        "rlnMicrographNameOdd": "{}_ODD.mrc",
        "rlnCtfPowerSpectrum": "{}_PS.mrc",
        "rlnMicrographMetadata": "{}.star",
    }
    for label, form in files.items():
        expected = [f"job/Micrographs/{form.format(name)}" for name in NAMES]
        assert table.rows[label].to_list() == expected
        assert all((simulated / name).exists() for name in expected)
    rows = table.rows
    total = rows["rlnAccumMotionEarly"] + rows["rlnAccumMotionLate"]
    assert np.allclose(total, rows["rlnAccumMotionTotal"])
    assert (rows["rlnAccumMotionTotal"] > 1).all()
    for label in ("hmLocalMotion", "hmMotionUncertainty", "hmMotionMisfit", "hmFrameCorrelation"):
        assert rows[label].is_finite().all()
        assert (rows[label] > 0).all()
    # 20 hot pixels were simulated, at high doses not all stand out; the dead ones are known from the gain.
    assert rows["hmBadPixels"].is_between(3, 30).all()
    assert "rlnImageSizeX" not in rows.columns


def test_motion_is_written_and_right(job, simulated):
    for name in NAMES:
        tracks = read_tracks(job / f"Micrographs/{name}.star")
        assert tracks.movie == f"sim/Movies/{name}.tiff"
        assert (tracks.first_frame, tracks.last_frame, tracks.n_frames) == (1, N, N)
        assert (tracks.dose_per_frame, tracks.pre_exposure) == (4.0, 6.0)
        assert np.all(tracks.global_shift[0] == 0)
        assert tracks.local_grid is not None
        assert np.all(tracks.local_grid[0] == 0)
        assert np.all(tracks.global_error[1:] > 0)
        assert len(tracks.patch_centres) >= 9
        left = rms(track_error(tracks, simulated, name))
        still = replace(tracks, global_shift=np.zeros((N, 2)), local_grid=None, local_coefficients=None)
        assert left < 1.2
        assert left < 0.6 * rms(track_error(still, simulated, name))


def test_relions_polynomial_is_near_the_grid(job):
    for name in NAMES:
        tracks = read_tracks(job / f"Micrographs/{name}.star")
        x, y = (axis.ravel() for axis in np.meshgrid(*[np.linspace(20, SIDE - 20, 5)] * 2))
        frames = np.arange(N)[:, None]
        difference = tracks.polynomial_shift_at(x, y, frames) - tracks.shift_at(x, y, frames)
        local = tracks.shift_at(x, y, frames) - tracks.global_shift[:, None]
        assert rms(difference) < max(0.3 * rms(local), 0.05)


def test_alignment_brings_out_detail(job, simulated):
    """Even and odd frames agree in finer detail than they do unmoved."""
    movie, gain = open_movie(simulated / "sim/Movies/000001.tiff"), read_mrc(simulated / "sim/gain.mrc", 0)
    frames = movie.read(0, N) * gain
    # Bad pixels agree with themselves.
    total = frames.sum(axis=0)
    frames[:, np.abs(total / np.median(total) - 1) > 0.5] = np.median(frames)

    def agreement(even: np.ndarray, odd: np.ndarray) -> float:
        a, b = (np.fft.rfft2(image[16:-16, 16:-16]) for image in (even, odd))
        k = np.hypot(np.fft.fftfreq(288, PIXEL)[:, None], np.fft.rfftfreq(288, PIXEL))
        band = (k > 1 / 40) & (k < 1 / 12)
        return float(
            (a * b.conj()).real[band].sum() / np.sqrt((abs(a) ** 2)[band].sum() * (abs(b) ** 2)[band].sum())
        )

    found = images(job)
    assert agreement(found["_EVN"], found["_ODD"]) > 1.1 * agreement(frames[::2].sum(0), frames[1::2].sum(0))


def test_two_runs_and_any_workers_write_the_same_bytes(job, simulated):
    again, _ = run(simulated, "again", RunOptions(executor="processes", workers=2))
    ours, others = contents(job), contents(again)
    assert [name for name in ours if others[name] != ours[name]] == []
    for name in NAMES:
        ours, others = (folder / f"Micrographs/{name}.star" for folder in (job, again))
        assert ours.read_bytes() == others.read_bytes()
    a, b = (read_micrographs(folder / "corrected_micrographs.star").rows for folder in (job, again))
    assert a.with_columns(pl.col(pl.String).str.replace("^job/", "")).equals(
        b.with_columns(pl.col(pl.String).str.replace("^again/", ""))
    )


def test_an_interrupted_run_is_taken_up_again(job, simulated):
    """The ledger holds what was done, wherever the project lies; a line cut by a kill is done again."""
    folder = simulated / "resumed"
    shutil.copytree(job, folder)
    ledger = folder / "items.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    assert str(simulated).encode() not in b"".join(lines)
    ledger.write_bytes(lines[0] + lines[1][:-9])
    (folder / "corrected_micrographs.star").unlink()
    for name in NAMES[1:]:
        for path in folder.glob(f"Micrographs/{name}*"):
            path.unlink()
    run(simulated, "resumed", pictures=True)
    assert [json.loads(line)["key"] for line in ledger.read_text().splitlines()] == [
        f"sim/Movies/{name}.tiff" for name in NAMES
    ]
    assert contents(folder) == contents(job)
    assert (folder / "corrected_micrographs.star").read_text().replace("resumed/", "job/") == (
        job / "corrected_micrographs.star"
    ).read_text()


# Options


def test_without_dose_weighting_there_is_one_sum(job, simulated):
    folder, _ = run(simulated, "unweighted", movies=one_movie(simulated), dose_weighting=False)
    assert np.array_equal(read_mrc(folder / "Micrographs/000001.mrc", 0), images(job)["_noDW"])
    assert not (folder / "Micrographs/000001_noDW.mrc").exists()
    row = read_micrographs(folder / "corrected_micrographs.star").rows
    assert "rlnMicrographNameNoDW" not in row.columns
    assert "rlnMicrographNameEven" in row.columns


def test_sums_that_are_not_wanted_are_not_written(job, simulated):
    folder, _ = run(simulated, "few", movies=one_movie(simulated), unweighted=False, even_odd=False)
    names = sorted(path.name for path in (folder / "Micrographs").iterdir())
    assert names == ["000001.mrc", "000001.star", "000001_PS.mrc"]
    assert np.array_equal(read_mrc(folder / "Micrographs/000001.mrc", 0), images(job)[""])
    columns = read_micrographs(folder / "corrected_micrographs.star").rows.columns
    assert not {"rlnMicrographNameNoDW", "rlnMicrographNameEven", "rlnMicrographNameOdd"} & set(columns)


def test_a_field_that_may_not_deform(job, simulated):
    folder, _ = run(simulated, "stiff", movies=one_movie(simulated), local=False)
    tracks = read_tracks(folder / "Micrographs/000001.star")
    assert tracks.local_grid is None
    assert tracks.local_coefficients is None
    free = read_tracks(job / "Micrographs/000001.star")
    assert np.abs(tracks.global_shift - free.global_shift).max() * PIXEL < 3
    assert rms(track_error(free, simulated, "000001")) < rms(track_error(tracks, simulated, "000001"))
    assert "hmLocalMotion" not in read_micrographs(folder / "corrected_micrographs.star").rows.columns


def test_half_precision(job, simulated):
    folder, _ = run(simulated, "half", movies=one_movie(simulated), float16=True)
    for suffix, image in images(job).items():
        path = folder / f"Micrographs/000001{suffix}.mrc"
        assert read_header(path).mode == 12
        assert np.allclose(read_mrc(path, 0), image, rtol=1e-3, atol=1e-3)
    assert read_header(folder / "Micrographs/000001_PS.mrc").mode == 2


@pytest.mark.parametrize("binning", [2.0, 1.5])
def test_binning(job, simulated, binning):
    folder, _ = run(simulated, f"binned{binning}", movies=one_movie(simulated), binning=binning)
    side = round(SIDE / binning / 2) * 2
    pixel = PIXEL * SIDE / side
    for suffix, image in images(job).items():
        path = folder / f"Micrographs/000001{suffix}.mrc"
        small = read_mrc(path, 0)
        assert small.shape == (side, side)
        assert read_header(path).pixel_size == pytest.approx(pixel, rel=1e-6)
        assert small.mean() == pytest.approx(image.mean(), rel=1e-4)
        # The same waves, as far as they fit in.
        a, b = (np.fft.rfft2(each - each.mean(dtype=np.float64))[:40, :40] for each in (small, image))
        assert np.abs(a - b * (side / SIDE) ** 2).max() < 1e-4 * np.abs(a).max()
    table = read_micrographs(folder / "corrected_micrographs.star")
    assert table.pixel_size == pytest.approx(pixel)
    tracks = read_tracks(folder / "Micrographs/000001.star")
    assert tracks.binning == pytest.approx(SIDE / side)
    assert np.array_equal(tracks.global_shift, read_tracks(job / "Micrographs/000001.star").global_shift)


def test_a_range_of_frames(job, simulated):
    folder, _ = run(simulated, "range", movies=one_movie(simulated), first_frame=2, last_frame=7)
    tracks = read_tracks(folder / "Micrographs/000001.star")
    assert (tracks.first_frame, tracks.last_frame, tracks.n_frames) == (2, 7, N)
    assert rms(track_error(tracks, simulated, "000001")) < 1.6
    found = images(folder)
    assert found["_noDW"].mean() == pytest.approx(images(job)["_noDW"].mean() * 6 / N, rel=0.02)
    # The first used frame is an even one.
    assert found["_EVN"].mean() == pytest.approx(found["_ODD"].mean(), rel=0.02)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("local", [True, False])
def test_frames_aligned_in_groups(job, simulated, size, local):
    folder, _ = run(
        simulated, f"groups{size}{local}", movies=one_movie(simulated), grouping=size, local=local
    )
    tracks = read_tracks(folder / "Micrographs/000001.star")
    assert tracks.n_used == N
    assert np.all(tracks.global_shift[0] == 0)
    assert np.all(tracks.global_error >= 0)
    assert (tracks.local_grid is not None) == local
    if local:
        assert tracks.local_grid is not None
        assert tracks.local_error is not None
        assert tracks.local_error.min() >= 0
        assert np.all(tracks.local_grid[0] == 0)
        assert rms(track_error(tracks, simulated, "000001")) < 2.5
    single = read_tracks(job / "Micrographs/000001.star")
    assert np.abs(tracks.global_shift - single.global_shift).max() > 0.01
    assert all(np.isfinite(image).all() for image in images(folder).values())


def test_low_doses_are_grouped_by_themselves(simulated):
    """0.2 e/Å² a frame: three frames are aligned as one, as by --grouping 3 (two groups would be too few)."""
    table = one_movie(simulated)
    automatic, _ = run(simulated, "automatic", movies=table, dose_per_frame=0.25)
    wanted, _ = run(simulated, "wanted", movies=table, dose_per_frame=0.25, grouping=2)
    single, _ = run(simulated, "single", movies=table, dose_per_frame=0.25, grouping=1)
    a, b, c = (
        read_tracks(folder / "Micrographs/000001.star").global_shift for folder in (automatic, wanted, single)
    )
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    optics = read_micrographs(automatic / "corrected_micrographs.star").optics
    assert optics["rlnMicrographDoseRate"].to_list() == [0.25]


def test_dose_changes_the_weights_alone_not_the_sum_of_frames_that_lie_still(job, simulated):
    folder, _ = run(simulated, "dose", movies=one_movie(simulated), dose_per_frame=8.0)
    assert read_tracks(folder / "Micrographs/000001.star").dose_per_frame == 8.0
    k = np.hypot(np.fft.fftfreq(SIDE, PIXEL)[:, None], np.fft.rfftfreq(SIDE, PIXEL))
    fine = (k > 0.1) & (k < 0.16)
    power = [
        (np.abs(np.fft.rfft2(image)) ** 2)[fine].mean() for image in (images(folder)[""], images(job)[""])
    ]
    # The noise of the sum keeps its power whatever the weights.
    assert power[0] == pytest.approx(power[1], rel=0.15)
    assert not np.allclose(images(folder)[""], images(job)[""], rtol=1e-3)


# What may be wrong


@pytest.fixture
def project(simulated, tmp_path) -> Path:
    """A project of its own, whose movies may be damaged."""
    folder = tmp_path / "project"
    (folder / "sim").mkdir(parents=True)
    shutil.copytree(simulated / "sim/Movies", folder / "sim/Movies")
    for name in ("gain.mrc", "defects.txt", "movies.star", "mtf.star"):
        shutil.copy(simulated / "sim" / name, folder / "sim" / name)
    return folder


def damage(path: Path, kind: str) -> None:
    frames = open_movie(path).read(0, N)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-20_000])
    elif kind == "short":
        write_tiff_movie(path, frames[:-2])
    elif kind == "empty":
        frames[3] = 0
        write_tiff_movie(path, frames)
    elif kind == "size":
        write_tiff_movie(path, np.ascontiguousarray(frames[:, :, :300]))
    elif kind == "missing":
        path.unlink()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", ("000002.tiff",)),
        ("short", ("000002.tiff", "holds 6 frames, its table says 8")),
        ("empty", ("000002.tiff", "frame 4 is zero all over")),
        ("size", ("000002.tiff", "320 x 300", "320 x 320")),
        ("missing", ("000002.tiff",)),
    ],
)
def test_a_bad_movie_fails_alone(project, kind, words):
    damage(project / "sim/Movies/000002.tiff", kind)
    job = Project.open(project).run(MotionStep(**SETTINGS))
    assert job.status == "Succeeded"
    rows = read_micrographs(job.folder / "corrected_micrographs.star").rows
    assert rows["rlnMicrographMovieName"].to_list() == ["sim/Movies/000001.tiff", "sim/Movies/000003.tiff"]
    failures = pl.DataFrame(read_star(job.folder / "failures.star")["failures"])
    assert list(failures["hmItem"]) == ["sim/Movies/000002.tiff"]
    told = (job.folder / "run.err").read_text()
    for word in words:
        assert word in told
    assert "Traceback" not in told
    assert not list((job.folder / "Micrographs").glob("000002*"))


def test_a_gain_of_another_size_is_one_clear_error(project):
    write_mrc(project / "sim/gain.mrc", np.ones((300, 320), np.float32), pixel_size=PIXEL)
    with pytest.raises(ItemsFailedError, match="every movie failed") as caught:
        run(project, "job")
    assert "gain.mrc" in str(caught.value)
    assert "000001.tiff" in str(caught.value)
    assert "300" in str(caught.value)


def change_table(project: Path, *, drop: tuple[str, ...] = (), optics: dict | None = None) -> None:
    path = project / "sim/movies.star"
    movies = read_movies(path)
    rows = movies.rows.drop([label for label in drop if label in movies.rows.columns])
    changed = movies.optics.drop([label for label in drop if label in movies.optics.columns])
    changed = changed.with_columns([pl.lit(value).alias(label) for label, value in (optics or {}).items()])
    write_movies(path, MovieSet(changed, rows))


def test_a_missing_dose_is_asked_for(project):
    change_table(project, drop=("rlnMicrographDoseRate",))
    with pytest.raises(TableError, match="--dose-per-frame") as caught:
        run(project, "job")
    assert "movies.star" in str(caught.value)
    folder, ctx = run(project, "given", movies=one_movie(project), dose_per_frame=4.0)
    assert not ctx.failures
    assert read_tracks(folder / "Micrographs/000001.star").dose_per_frame == 4.0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_movie_with_nothing_to_align_fails_alone(project):
    path = project / "sim/Movies/000002.tiff"
    write_tiff_movie(path, np.ones((N, SIDE, SIDE), np.uint8))
    write_mrc(project / "sim/gain.mrc", np.ones((SIDE, SIDE), np.float32), pixel_size=PIXEL)
    folder, ctx = run(project, "job", detect_bad_pixels=False)
    assert [failure.key for failure in ctx.failures] == ["sim/Movies/000002.tiff"]
    assert "000002.tiff" in ctx.failures[0].reason
    assert "hold nothing to align" in ctx.failures[0].reason
    assert read_micrographs(folder / "corrected_micrographs.star").rows.height == 2


@pytest.mark.parametrize("wrong", ["track", "track_error", "grid", "grid_error"])
def test_an_estimate_that_is_not_finite_is_refused(simulated, monkeypatch, wrong):
    estimate_motion = module.estimate_motion

    def spoilt(*arguments, **settings):
        found = estimate_motion(*arguments, **settings)
        values = getattr(found, wrong).copy()
        values[-1] = np.nan
        return replace(found, **{wrong: values})

    monkeypatch.setattr(module, "estimate_motion", spoilt)
    with pytest.raises(ItemsFailedError, match=r"000001\.tiff.*hold nothing to align"):
        run(simulated, f"spoilt_{wrong}", movies=one_movie(simulated))
    assert not list((simulated / f"spoilt_{wrong}/Micrographs").iterdir())


@pytest.mark.parametrize("stated", [{}, {"rlnEERGrouping": 4, "rlnEERUpsampling": 2}], ids=str)
def test_how_eer_movies_were_read_is_recorded(project, stated):
    """Fractions of 32 frames and whole pixels are taken where the table says nothing, as RELION does."""
    rng, shape = np.random.default_rng(1), (128, 128)
    frames = [encode(random_events(rng, shape, 400), shape, 7, 2) for _ in range(3 * 32)]
    write_eer(project / "000001.EER", frames, shape)
    movies = read_movies(project / "sim/movies.star")
    sizes = [f"rlnImageSize{axis}" for axis in "XYZ"]
    rows = movies.rows.head(1).drop([label for label in sizes if label in movies.rows.columns])
    rows = rows.with_columns(pl.Series("rlnMicrographMovieName", ["000001.EER"]))
    other = ("rlnMicrographGainName", "rlnMicrographDefectFile", *sizes)
    optics = movies.optics.drop([label for label in other if label in movies.optics.columns])
    optics = optics.with_columns([pl.lit(value).alias(label) for label, value in stated.items()])
    write_movies(project / "one.star", MovieSet(optics, rows))
    folder, ctx = run(project, "job", movies=Path("one.star"), local=False)
    assert not ctx.failures
    tracks = read_tracks(folder / "Micrographs/000001.star")
    expected = (4, 2, 24, 256) if stated else (32, 1, 3, 128)
    found = (tracks.eer_grouping, tracks.eer_upsampling, tracks.n_frames, tracks.shape[0])
    assert found == expected


def test_movies_of_other_formats_have_no_eer_settings(project):
    change_table(project, optics={"rlnEERGrouping": 7, "rlnEERUpsampling": 2})
    folder, _ = run(project, "job", movies=one_movie(project))
    tracks = read_tracks(folder / "Micrographs/000001.star")
    assert (tracks.eer_grouping, tracks.eer_upsampling) == (None, None)


def test_pixels_that_are_not_square_are_told_once(project, caplog):
    for name in NAMES:
        path = project / f"sim/Movies/{name}.tiff"
        write_tiff_movie(path, np.ascontiguousarray(open_movie(path).read(0, N)[:, :217]))
    change_table(project, drop=("rlnImageSizeX", "rlnImageSizeY", "rlnMicrographGainName"))
    change_table(project, drop=("rlnImageSizeZ", "rlnMicrographDefectFile"))
    with caplog.at_level(logging.WARNING, "halfmap"):
        run(project, "job", binning=3.0)
    told = [record.getMessage() for record in caplog.records if "square" in record.getMessage()]
    assert len(told) == 1
    assert "longer along y" in told[0] or "shorter along y" in told[0]


@pytest.mark.parametrize("dose", [0.0, -1.0])
def test_a_dose_that_cannot_be_is_told(project, dose):
    change_table(project, optics={"rlnMicrographDoseRate": dose})
    with pytest.raises(TableError, match="dose per frame"):
        run(project, "job", movies=one_movie(project))


@pytest.mark.parametrize("label", ["rlnVoltage", "rlnMicrographOriginalPixelSize"])
def test_a_missing_setting_is_named(project, label):
    change_table(project, drop=(label,))
    with pytest.raises(TableError, match=label):
        run(project, "job")


@pytest.mark.parametrize("frames", [(7, None), (1, 9), (1, 2), (20, None)], ids=str)
def test_frames_that_no_movie_has_are_told_once(simulated, frames):
    first, last = frames
    said = f"--first-frame {first}{f' --last-frame {last}' if last else ''} leaves no movie 3 frames.*have 8"
    with pytest.raises(ParameterError, match=rf"one\.star: {said}"):
        run(simulated, f"frames{first}", movies=one_movie(simulated), first_frame=first, last_frame=last)


def test_a_movie_of_fewer_frames_is_corrected_or_fails_by_itself(project):
    """Acquisitions that broke off are in one table with whole ones."""
    whole = open_movie(project / "sim/Movies/000001.tiff").read()
    for name, frames in (("000002", 5), ("000003", 2)):
        write_tiff_movie(project / f"sim/Movies/{name}.tiff", whole[:frames], pixel_size=PIXEL)
    movies = read_movies(project / "sim/movies.star")
    rows = movies.rows.with_columns(pl.Series("rlnImageSizeZ", [N, 5, 2]))
    write_movies(project / "sim/movies.star", MovieSet(movies.optics, rows))
    folder, ctx = run(project, "job")
    assert [
        (Path(failure.key).stem, "has 2 frames, of which fewer than 3" in failure.reason)
        for failure in ctx.failures
    ] == [("000003", True)]
    for name, frames in (("000001", N), ("000002", 5)):
        assert read_tracks(folder / f"Micrographs/{name}.star").n_frames == frames
    assert len(read_micrographs(folder / "corrected_micrographs.star")) == 2


def test_a_gain_reference_that_is_gone_is_told_once(project):
    (project / "sim/gain.mrc").unlink()
    with pytest.raises(
        TableError, match=r"movies\.star: names .*gain\.mrc as gain reference or defects, and"
    ):
        run(project, "job")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"movies": Path("a.star"), "first_frame": 5, "last_frame": 4}, "comes before the first"),
        ({"movies": Path("Movies/a.tiff")}, "halfmap import movies"),
    ],
    ids=["frames", "movie"],
)
def test_what_cannot_be_is_told_before_a_job_is_made(values, message):
    with pytest.raises(ParameterError, match=message):
        parse_step(MotionStep, values)


@pytest.mark.parametrize("binning", [1.0, 1.7])
def test_tables_as_relion_writes_them_need_no_sizes(job, project, binning):
    change_table(project, drop=("rlnImageSizeX", "rlnImageSizeY", "rlnImageSizeZ"))
    folder, ctx = run(project, "job", movies=one_movie(project), binning=binning)
    assert not ctx.failures
    if binning == 1:
        for suffix, image in images(job).items():
            assert np.array_equal(read_mrc(folder / f"Micrographs/000001{suffix}.mrc", 0), image)
    header = read_header(folder / "Micrographs/000001.mrc")
    table = read_micrographs(folder / "corrected_micrographs.star")
    assert table.pixel_size == pytest.approx(header.pixel_size, rel=1e-5)


@pytest.mark.parametrize(
    "names",
    [
        ("a/x.tiff", "b/x.tiff", "b/y.tiff"),
        ("a/x.tiff", "a/x.mrc", "b/y.tiff"),
        ("a/b_x.tiff", "b/x.tiff", "d/x.tiff"),
    ],
    ids=str,
)
def test_movies_of_one_name_get_micrographs_of_their_own(project, names):
    movies = read_movies(project / "sim/movies.star")
    for number, name in enumerate(names, start=1):
        (project / name).parent.mkdir(exist_ok=True)
        source = project / f"sim/Movies/{number:06d}.tiff"
        if name.endswith(".mrc"):
            write_mrc(project / name, open_movie(source).read(0, N), pixel_size=PIXEL)
        else:
            source.rename(project / name)
    rows = movies.rows.with_columns(pl.Series("rlnMicrographMovieName", names))
    write_movies(project / "sim/movies.star", MovieSet(movies.optics, rows))
    folder, _ = run(project, "job")
    table = read_micrographs(folder / "corrected_micrographs.star").rows
    for label in (
        "rlnMicrographName",
        "rlnMicrographNameNoDW",
        "rlnMicrographMetadata",
        "rlnCtfPowerSpectrum",
    ):
        assert table[label].n_unique() == 3
    for movie, tracks in table.select("rlnMicrographMovieName", "rlnMicrographMetadata").iter_rows():
        assert read_tracks(project / tracks).movie == movie


@pytest.mark.parametrize("dtype", ["u2", "i2"])
def test_counts_of_every_type_give_the_same(job, project, dtype):
    """uint8 in TIFF as it was simulated, and the same as 16 bits in MRC."""
    counts = open_movie(project / "sim/Movies/000001.tiff").read(0, N)
    # What bad pixels are replaced by is drawn by the name of the movie.
    write_mrc(project / "000001.mrc", counts.astype(dtype), pixel_size=PIXEL)
    movies = read_movies(project / "sim/movies.star")
    rows = movies.rows.head(1).with_columns(pl.Series("rlnMicrographMovieName", ["000001.mrc"]))
    write_movies(project / "one.star", MovieSet(movies.optics, rows))
    folder, _ = run(project, "job", movies=Path("one.star"))
    for suffix, image in images(job).items():
        assert np.array_equal(read_mrc(folder / f"Micrographs/000001{suffix}.mrc", 0), image)
