from __future__ import annotations

import itertools
import re
import struct
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import tifffile
from eer_writer import Events, encode, write_eer
from matplotlib.axes import Axes

from halfmap.cli import main
from halfmap.errors import (
    FileFormatError,
    ItemsFailedError,
    ParameterError,
    ProjectError,
    ShapeError,
    TableError,
)
from halfmap.io.gain import is_divided, orient_gain, rank_orientations
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_micrographs, read_movies
from halfmap.io.tiff import write_tiff_movie
from halfmap.project import Project
from halfmap.project.inputs import times_of
from halfmap.steps.import_.gain import judge
from halfmap.steps.import_.step import ImportMicrographs, ImportMovies

SHAPE, FRAMES, COUNTS = (64, 96), 12, 4.0


def gain_reference() -> np.ndarray:
    return np.random.default_rng(5).normal(1, 0.1, SHAPE).astype(np.float32)


def write_movie(path: Path, *, seed: int = 0, shape=SHAPE, pixel_size: float | None = 0.9) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    pattern = 1 / gain_reference() if shape == SHAPE else np.ones(shape)
    frames = np.random.default_rng(seed).poisson(COUNTS * pattern, (FRAMES, *shape)).astype(np.uint8)
    write_tiff_movie(path, frames, pixel_size=pixel_size)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    """A project with three movies and their gain reference, in which the process stands."""
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        write_movie(tmp_path / f"Movies/m{number}.tif", seed=number)
    write_mrc(tmp_path / "gain.mrc", gain_reference(), pixel_size=0.9)
    return Project.open(tmp_path)


def movies(**parameters) -> ImportMovies:
    return ImportMovies(**({"movies": ("Movies/*.tif",), "dose_per_frame": 1.25} | parameters))


def written(project: Project) -> set[str]:
    """Outputs in the newest job's folder, if any was kept, and whatever was left half-written."""
    folder = max(project.root.glob("Import/job*"), default=None)
    if folder is None:
        return set()
    own = {"movies.star", "gain.mrc", "movies.png", "micrographs.star", "micrographs.png"}
    return {
        path.name
        for path in folder.iterdir()
        if path.name in own or path.name.startswith(".") != (path.name == ".lock")
    }


def test_movies_are_listed_with_the_settings(project):
    job = project.run(movies(gain="gain.mrc", voltage=200, pre_exposure=0.5, optics_group="day1"))
    table = read_movies(job.outputs["movies"])
    assert table.rows["rlnMicrographMovieName"].to_list() == [f"Movies/m{i}.tif" for i in range(3)]
    assert table.rows.select("rlnImageSizeX", "rlnImageSizeY", "rlnImageSizeZ").unique().rows() == [
        (SHAPE[1], SHAPE[0], FRAMES)
    ]
    assert table.optics.to_dicts() == [
        {
            "rlnOpticsGroupName": "day1",
            "rlnOpticsGroup": 1,
            "rlnMicrographOriginalPixelSize": 0.9,
            "rlnVoltage": 200.0,
            "rlnSphericalAberration": 2.7,
            "rlnAmplitudeContrast": 0.1,
            "rlnMicrographDoseRate": 1.25,
            "rlnMicrographPreExposure": 0.5,
            "rlnMicrographGainName": f"{job.name}gain.mrc",
        }
    ]
    np.testing.assert_array_equal(read_mrc(job.outputs["gain"])[0], gain_reference())
    assert project.pipeline.nodes[f"{job.name}movies.star"] == "MicrographMovieGroupMetadata.star.relion"


def test_truncated_and_odd_movies_are_named_and_the_rest_imported(project):
    whole = Path("Movies/m0.tif").read_bytes()
    Path("Movies/m4.tif").write_bytes(whole[: len(whole) * 3 // 4])
    Path("Movies/m5.tif").write_bytes(b"")
    write_movie(Path("Movies/m6.tif"), shape=(64, 64))
    job = project.run(movies())
    assert len(read_movies(job.outputs["movies"])) == 3
    failures = dict(read_star(job.folder / "failures.star")["failures"].iter_rows())
    assert set(failures) == {f"Movies/m{i}.tif" for i in (4, 5, 6)}
    assert "truncated" in failures["Movies/m4.tif"]
    assert "64 × 64 px, most others are 96 × 64; import those of its size by" in failures["Movies/m6.tif"]


def test_a_movie_that_is_there_twice_counts_once(project):
    """In both half sets its particles would agree by themselves."""
    Path("Movies/done").mkdir()
    Path("Movies/done/m1.tif").write_bytes(Path("Movies/m1.tif").read_bytes())
    Path("Movies/link.tif").symlink_to("m2.tif")
    job = project.run(movies(movies=("Movies/**/*.tif",)))
    failures = dict(read_star(job.folder / "failures.star")["failures"].iter_rows())
    assert failures == {
        "Movies/m1.tif": "is the same movie as Movies/done/m1.tif",
        "Movies/m2.tif": "is the same movie as Movies/link.tif",
    }
    assert len(read_movies(job.outputs["movies"])) == 3


def test_files_with_the_same_ends_are_not_taken_for_copies(project):
    image = np.zeros((512, 64), np.float32)
    for number in range(2):
        image[256, 32] = number
        path = Path(f"Micrographs/a{number}.mrc")
        path.parent.mkdir(exist_ok=True)
        write_mrc(path, image, pixel_size=0.9)
        content = bytearray(path.read_bytes())
        content[76:88] = bytes(12)  # the header's statistics, which many programs leave out
        path.write_bytes(content)
    job = project.run(ImportMicrographs(micrographs=("Micrographs/*.mrc",)))
    assert len(read_micrographs(job.outputs["micrographs"])) == 2


def test_a_movie_that_was_moved_keeps_the_name_that_all_was_made_under(project):
    taken = project.root / "Arrived"
    taken.mkdir()
    for number in range(3):
        (taken / f"m{number}.tif").symlink_to(project.root / f"Movies/m{number}.tif")
    job = project.run(movies(movies=("Arrived/*",)))
    before = job.outputs["movies"].read_bytes()
    Path("Movies/m1.tif").rename("Movies/done.tif")
    (taken / "a.tif").symlink_to(project.root / "Movies/done.tif")
    assert project.resume(1).outputs["movies"].read_bytes() == before
    failures = dict(read_star(job.folder / "failures.star")["failures"].iter_rows())
    assert failures == {"Arrived/a.tif": "is the same movie as Arrived/m1.tif"}


def test_movies_and_gain_that_are_archived_leave_the_import_as_it_is(project, caplog):
    taken = project.root / "Arrived"
    taken.mkdir()
    for number in range(3):
        (taken / f"m{number}.tif").symlink_to(project.root / f"Movies/m{number}.tif")
    job = project.run(movies(movies=("Arrived/*",), gain="gain.mrc"))
    made = {name: path.read_bytes() for name, path in job.outputs.items() if name != "picture"}
    known = times_of(job.folder)
    with pytest.raises(ProjectError, match="nothing to resume"):
        Path("gain.mrc").rename("archived.mrc")
        Path("Movies/m1.tif").unlink()
        project.resume(1)
    # One more has it go on.
    write_movie(taken / "m3.tif", seed=3)
    project.resume(1)
    assert "gain.mrc" in caplog.text and "gone since the job ran before" in caplog.text
    assert job.outputs["gain"].read_bytes() == made["gain"]
    assert len(read_movies(job.outputs["movies"])) == 4
    assert known.items() <= times_of(job.folder).items()
    assert job.provisional() == []
    # Neither is new when it is back; the gain is checked with the movies that are there.
    Path("archived.mrc").rename("gain.mrc")
    with pytest.raises(ProjectError, match="nothing to resume"):
        project.resume(1)
    (taken / "m3.tif").unlink()
    project.resume(1)
    assert {name: path.read_bytes() for name, path in job.outputs.items() if name != "picture"} == made


def test_a_movie_whose_last_frame_is_cut_is_left_out(project):
    """Directories may lie before the frames: a broken transfer then shows only on reading."""
    frames = np.random.default_rng(9).poisson(4, (FRAMES, *SHAPE)).astype(np.uint8)
    data = directories_first(frames)
    Path("Movies/m8.tif").write_bytes(data)
    Path("Movies/m9.tif").write_bytes(data[:-1000])
    job = project.run(movies(pixel_size=0.9))
    assert read_star(job.folder / "failures.star")["failures"]["hmItem"].to_list() == ["Movies/m9.tif"]


def directories_first(frames: np.ndarray) -> bytes:
    """A plain TIFF whose frames come after all of its directories."""
    n, h, w = frames.shape
    size = 2 + 12 * 9 + 4
    out = struct.pack("<2sHI", b"II", 42, 8)
    for number in range(n):
        at, following = 8 + n * size + number * h * w, 8 + (number + 1) * size
        tags = {256: w, 257: h, 258: 8, 259: 1, 262: 1, 273: at, 277: 1, 278: h, 279: h * w}
        out += struct.pack("<H", len(tags))
        out += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        out += struct.pack("<I", following if number < n - 1 else 0)
    return out + frames.tobytes()


@pytest.mark.parametrize("turn", [(1, 0), (2, 0), (0, 1), (0, 2), (3, 1)])
def test_a_turned_gain_is_detected_and_the_right_orientation_named(project, turn, capsys):
    plainest_first = sorted(
        itertools.product(range(4), range(3)), key=lambda names: (names.count(0) < 1, names[1])
    )
    right = next(
        names
        for names in plainest_first
        if np.array_equal(_turn(_turn(gain_reference(), *turn), *names), gain_reference())
    )
    write_mrc("turned.mrc", _turn(gain_reference(), *turn), pixel_size=0.9)
    words = ["import", "movies", "--movies", "Movies/*.tif", "--dose-per-frame", "1", "--gain", "turned.mrc"]
    assert main(words) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"--gain-rotation {right[0]} --gain-flip {right[1]} (correlation" in message
    assert written(project) == set()
    job = project.run(movies(gain="turned.mrc", gain_rotation=right[0], gain_flip=right[1]))
    np.testing.assert_array_equal(read_mrc(job.outputs["gain"])[0], gain_reference())


def _turn(gain: np.ndarray, rotation: int, flip: int) -> np.ndarray:
    return np.ascontiguousarray(orient_gain(gain, rotation=rotation, flip=flip))


def test_the_reciprocal_of_a_gain_is_told_from_the_gain_and_taken_as_such(project, capsys):
    write_mrc("reciprocal.mrc", 1 / gain_reference(), pixel_size=0.9)
    words = ["import", "movies", "Movies/*.tif", "--dose-per-frame", "1", "--gain", "reciprocal.mrc"]
    assert main(words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is the reciprocal of what it should be (correlation -0." in said
    assert "use --gain-inverse, or --no-check-gain" in said
    job = project.run(movies(gain="reciprocal.mrc", gain_inverse=True))
    ratio = read_mrc(job.outputs["gain"])[0] / gain_reference()
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-5)


def test_a_reciprocal_that_is_turned_as_well_names_both_options(project):
    write_mrc("wrong.mrc", _turn(1 / gain_reference(), 0, 1), pixel_size=0.9)
    with pytest.raises(
        ParameterError, match=r"reciprocal.*use --gain-inverse --gain-rotation 0 --gain-flip 1,"
    ):
        project.run(movies(gain="wrong.mrc"))
    job = project.run(movies(gain="wrong.mrc", gain_inverse=True, gain_flip=1))
    ratio = read_mrc(job.outputs["gain"])[0] / gain_reference()
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-5)


def test_a_flip_is_detected_where_stripes_fit_either_way():
    """Amplifiers give columns a gain of their own, which looks the same upside down."""
    rng = np.random.default_rng(6)
    gain = rng.normal(1, 0.05, (320, 320)) + rng.normal(0, 0.06, 320)
    gain = gain.clip(0.3, 3).astype(np.float32)
    ranked = rank_orientations(gain[::-1], rng.poisson(40 / gain))
    given = next(fit for fit in ranked if fit.rotation == fit.flip == 0)
    assert given.correlation > 0.5 * ranked[0].correlation
    with pytest.raises(ParameterError, match="--gain-rotation 0 --gain-flip 1"):
        judge(movies(gain="gain.mrc"), Path("gain.mrc"), ranked)
    judge(movies(gain="gain.mrc", gain_flip=1), Path("gain.mrc"), ranked)


def test_too_few_electrons_say_nothing_of_the_gain(project, caplog):
    caplog.set_level("INFO", logger="halfmap")
    for number in range(3):
        frames = np.random.default_rng(number).poisson(0.05 / gain_reference(), (FRAMES, *SHAPE))
        write_tiff_movie(Path(f"Movies/m{number}.tif"), frames.astype(np.uint8), pixel_size=0.9)
    write_mrc("turned.mrc", _turn(gain_reference(), 2, 0), pixel_size=0.9)
    project.run(movies(gain="turned.mrc"))
    assert "gain reference: not checked, too few electrons" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_movies_that_are_corrected_already_are_told(project, caplog):
    for number in range(3):
        frames = np.random.default_rng(number).poisson(COUNTS, (FRAMES, *SHAPE)).astype(np.uint8)
        write_tiff_movie(Path(f"Movies/m{number}.tif"), frames, pixel_size=0.9)
    project.run(movies(gain="gain.mrc"))
    assert "are they gain corrected already? Then import them without --gain" in caplog.text


def test_a_turned_gain_is_taken_when_the_user_insists(project):
    write_mrc("turned.mrc", _turn(gain_reference(), 2, 0), pixel_size=0.9)
    job = project.run(movies(gain="turned.mrc", check_gain=False))
    np.testing.assert_array_equal(read_mrc(job.outputs["gain"])[0], gain_reference()[::-1, ::-1])


def test_a_gain_that_the_movies_do_not_show_is_a_warning(project, caplog):
    write_mrc("other.mrc", np.random.default_rng(77).normal(1, 0.1, SHAPE).astype(np.float32), pixel_size=0.9)
    # Chance gives a share of 0.02: one of 0.25 is out of the question.
    project.run(movies(gain="other.mrc"))
    assert "no trace of it" in caplog.text


def test_a_gain_of_another_shape_stops_the_import(project):
    write_mrc("small.mrc", np.ones((50, 50), np.float32), pixel_size=0.9)
    with pytest.raises(ShapeError, match=r"small\.mrc: the gain reference is 50 x 50 px"):
        project.run(movies(gain="small.mrc"))
    # Before any movie was examined, of which there may be thousands.
    assert not list(project.root.glob("Import/job*"))
    with pytest.raises(FileFormatError, match=r"m0\.tif: holds 12 images where one belongs"):
        project.run(movies(gain="Movies/m0.tif"))
    assert not list(project.root.glob("Import/job*"))


def test_a_gain_at_half_the_pixels_fits_super_resolution_movies_and_says_so(project, caplog):
    small = np.random.default_rng(8).normal(1, 0.1, (SHAPE[0] // 2, SHAPE[1] // 2)).astype(np.float32)
    large = small.repeat(2, axis=0).repeat(2, axis=1)
    for number in range(3):
        frames = np.random.default_rng(number).poisson(COUNTS / large, (FRAMES, *SHAPE)).astype(np.uint8)
        write_tiff_movie(Path(f"Movies/m{number}.tif"), frames, pixel_size=0.9)
    write_mrc("half.mrc", small, pixel_size=1.8)
    job = project.run(movies(gain="half.mrc"))
    np.testing.assert_array_equal(read_mrc(job.outputs["gain"])[0], large)
    said = "it is 48 × 32 px, the movies are 96 × 64: each of its pixels stands for 2 × 2 of theirs"
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert said in warnings[0]
    # Among the job's last lines, which count it.
    assert warnings[0] in [record.getMessage() for record in caplog.records[-12:]]
    assert caplog.records[-1].getMessage().startswith("1 warning")


def test_a_gain_at_double_the_pixels_is_averaged_and_says_so(project, caplog):
    write_mrc("double.mrc", gain_reference().repeat(2, axis=0).repeat(2, axis=1), pixel_size=0.45)
    job = project.run(movies(gain="double.mrc"))
    np.testing.assert_allclose(read_mrc(job.outputs["gain"])[0], gain_reference(), rtol=1e-6)
    said = (
        "it is 192 × 128 px, the movies are 96 × 64: the mean of 2 × 2 of its pixels stands for one of theirs"
    )
    assert said in caplog.text


@pytest.mark.parametrize("factor", [0.5, 2])
def test_a_gain_of_another_size_that_the_movies_do_not_show_stops_the_import(project, factor):
    shape = (int(SHAPE[0] * factor), int(SHAPE[1] * factor))
    write_mrc("other.mrc", np.random.default_rng(77).normal(1, 0.1, shape).astype(np.float32), pixel_size=1)
    with pytest.raises(ParameterError, match=r"no trace of this gain.*the movies are 96 × 64.*this camera"):
        project.run(movies(gain="other.mrc"))
    assert written(project) == set()
    job = project.run(movies(gain="other.mrc", check_gain=False))
    assert read_mrc(job.outputs["gain"]).shape == (1, *SHAPE)


def test_an_import_goes_on_in_a_project_that_was_moved(project, tmp_path, monkeypatch):
    whole = Path("Movies/m2.tif").read_bytes()
    Path("Movies/m2.tif").write_bytes(whole[:-3000])
    job = project.run(movies(gain="gain.mrc"))
    assert len(read_movies(job.outputs["movies"])) == 2
    moved = tmp_path.with_name(tmp_path.name + "_moved")
    tmp_path.rename(moved)
    monkeypatch.chdir(moved)
    Path("Movies/m2.tif").write_bytes(whole)
    job = Project.open(moved).resume(1)
    table = read_movies(job.outputs["movies"])
    assert table.rows["rlnMicrographMovieName"].to_list() == [f"Movies/m{i}.tif" for i in range(3)]


@pytest.mark.parametrize("step", [ImportMovies, ImportMicrographs])
def test_a_pattern_without_a_file_is_an_error_before_the_job(project, step):
    values = {"movies": ("Nothing/*.tif",), "dose_per_frame": 1} if step is ImportMovies else {}
    with pytest.raises(ParameterError, match=r"Nothing/\*.tif: input file does not exist"):
        project.run(step(**(values or {"micrographs": ("Nothing/*.tif",)})))
    assert not (project.root / "Import").exists()


def test_headers_without_a_pixel_size_need_the_users(project, capsys):
    for number in range(3):
        write_movie(Path(f"Movies/m{number}.tif"), pixel_size=None)
    words = ["import", "movies", "--movies", "Movies/*.tif", "--dose-per-frame", "1"]
    assert main(words) == 2
    assert capsys.readouterr().err.endswith(
        "halfmap: the files' headers state no pixel size; give it with --pixel-size\n"
    )
    assert written(project) == set()
    assert main([*words, "--pixel-size", "1.1"]) == 0
    assert read_movies("Import/job001/movies.star").pixel_size == 1.1


def test_headers_that_disagree_on_the_pixel_size_need_the_users(project):
    write_movie(Path("Movies/m3.tif"), pixel_size=1.8)
    with pytest.raises(ParameterError, match=r"pixel sizes from 0.9 to 1.8 Å; give it with --pixel-size"):
        project.run(movies())


def test_micrographs_are_no_movies_and_movies_no_micrographs(project):
    write_mrc("mic.mrc", np.zeros(SHAPE, np.float32), pixel_size=1)
    with pytest.raises(ItemsFailedError, match="holds a single frame; use: halfmap import micrographs"):
        project.run(movies(movies=("mic.mrc",)))
    with pytest.raises(ItemsFailedError, match="if it is a movie, use: halfmap import movies"):
        project.run(ImportMicrographs(micrographs=("Movies/m0.tif",)))


def test_movies_outside_the_project_keep_absolute_names(project, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("microscope")
    write_movie(elsewhere / "a[1].tif")  # brackets are a pattern's, and names' too
    write_movie(elsewhere / "b.mrc.tif", seed=1)
    job = project.run(movies(movies=(elsewhere / "a[1].tif", elsewhere / "*.mrc.tif")))
    names = read_movies(job.outputs["movies"]).rows["rlnMicrographMovieName"].to_list()
    assert names == [f"{elsewhere}/a[1].tif", f"{elsewhere}/b.mrc.tif"]


def test_micrographs_are_listed_and_broken_ones_named(project):
    for number in range(3):
        image = np.random.default_rng(number).normal(size=SHAPE)
        write_mrc(f"Mics/{number}.mrc", image, pixel_size=1.3)
    Path("Mics/3.mrc").write_bytes(Path("Mics/0.mrc").read_bytes()[:5000])
    write_mrc("Mics/4.mrc", np.zeros((8, 8), np.float32), pixel_size=1.3)
    job = project.run(ImportMicrographs(micrographs=("Mics/*.mrc",), amplitude_contrast=0.07))
    table = read_micrographs(job.outputs["micrographs"])
    assert table.rows["rlnMicrographName"].to_list() == ["Mics/0.mrc", "Mics/1.mrc", "Mics/2.mrc"]
    assert (table.pixel_size, table.optics["rlnAmplitudeContrast"][0]) == (1.3, 0.07)
    failed = read_star(job.folder / "failures.star")["failures"]["hmItem"].to_list()
    assert failed == ["Mics/3.mrc", "Mics/4.mrc"]
    assert job.outputs["picture"].read_bytes().startswith(b"\x89PNG")


def test_the_picture_names_what_is_no_image_and_nothing_warns(project, monkeypatch, recwarn):
    images = {name: np.random.default_rng(1).normal(100, 9, SHAPE).astype(np.float32) for name in "abcde"}
    images["b"][:] = np.nan
    images["c"][:20, :20] = np.nan
    images["d"][3, 4], images["d"][5, 6] = np.inf, -np.inf
    images["e"][:] = 7
    for name, image in images.items():
        write_mrc(f"Mics/{name}.mrc", image, pixel_size=1.3)
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, text, **_: titles.append(text))
    job = project.run(ImportMicrographs(micrographs=("Mics/*.mrc",)))
    flaw = ": holds NaN or infinity"
    assert titles == ["a.mrc", f"b.mrc{flaw}", f"c.mrc{flaw}", f"d.mrc{flaw}", "e.mrc: blank"]
    picture = matplotlib.image.imread(job.outputs["picture"])[..., :3]
    red = (picture[..., 0] > 1.5 * picture[..., 1]).mean(axis=1)
    assert red.max() > 0.2
    assert not recwarn.list


def test_a_movie_of_nan_does_not_hide_the_gain(project, caplog):
    movie = np.full((4, *SHAPE), np.nan, np.float32)
    write_mrc("Movies/a.mrcs", movie, pixel_size=0.9)
    caplog.set_level("INFO", logger="halfmap")
    project.run(movies(movies=("Movies/a.mrcs", "Movies/*.tif"), gain="gain.mrc"))
    assert "the movies show no trace" not in caplog.text
    with pytest.raises(FileFormatError, match=r"every frame of the first movies holds NaN"):
        project.run(movies(movies=("Movies/a.mrcs",), gain="gain.mrc"))


def test_real_micrographs(project, shared_data):
    pattern = shared_data / "micrographs/apoferritin_empiar10146/apo_03*.mrc"
    table = read_micrographs(project.run(ImportMicrographs(micrographs=(pattern,))).outputs["micrographs"])
    assert len(table) == 4
    assert table.pixel_size == 1.5


@pytest.mark.parametrize("name", ["camera.gain", "flat.mrc"])
def test_the_stored_gain_of_eer_movies_means_to_relion_what_was_given(project, name):
    """RELION multiplies EER movies with the camera's .gain and divides them by everything else."""
    rng, shape = np.random.default_rng(2), (32, 32)
    sensitivity = rng.uniform(0.5, 1.5, shape).astype(np.float32)
    places = [
        rng.choice(1024, 300, replace=False, p=(sensitivity / sensitivity.sum()).ravel()) for _ in range(96)
    ]
    frames = []
    for place in places:
        y, x = np.divmod(place, shape[1])
        middle = np.zeros(len(place), int)
        frames.append(encode(Events(x, y, middle, middle), shape, 7, 2))
    write_eer(Path("Movies/a.eer"), frames, shape)
    if name.endswith(".gain"):
        tifffile.imwrite(name, 1 / sensitivity)
    else:
        write_mrc(name, sensitivity, pixel_size=1)
    job = project.run(movies(movies=("Movies/a.eer",), gain=name, pixel_size=1.0))
    stored = job.outputs["gain"]
    assert is_divided(stored, "Movies/a.eer")
    ratio = read_mrc(stored)[0] / sensitivity
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
    optics = read_movies(job.outputs["movies"]).optics
    assert optics.select("rlnEERGrouping", "rlnEERUpsampling").rows() == [(32, 1)]
    assert read_movies(job.outputs["movies"]).rows["rlnImageSizeZ"].to_list() == [3]


def test_an_eer_cameras_gain_is_checked_as_well(project):
    rng, shape = np.random.default_rng(3), (48, 48)
    sensitivity = rng.uniform(0.5, 1.5, shape).astype(np.float32)
    chance = (sensitivity / sensitivity.sum()).ravel()
    frames = []
    for _ in range(64):
        y, x = np.divmod(rng.choice(chance.size, 600, replace=False, p=chance), shape[1])
        middle = np.zeros(len(y), int)
        frames.append(encode(Events(x, y, middle, middle), shape, 7, 2))
    write_eer(Path("Movies/a.eer"), frames, shape)
    given = {"movies": ("Movies/a.eer",), "pixel_size": 1.0}
    tifffile.imwrite("camera.gain", 1 / sensitivity)
    project.run(movies(**given, gain="camera.gain"))
    # RELION divides by all other files, so that an MRC of the camera's factors is taken for their reciprocal.
    write_mrc("factors.mrc", 1 / sensitivity, pixel_size=1)
    with pytest.raises(ParameterError, match=r"reciprocal.*use --gain-inverse, or"):
        project.run(movies(**given, gain="factors.mrc"))
    job = project.run(movies(**given, gain="factors.mrc", gain_inverse=True))
    ratio = read_mrc(job.outputs["gain"])[0] / sensitivity
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-5)
    write_mrc("turned.mrc", _turn(sensitivity, 1, 0), pixel_size=1)
    with pytest.raises(ParameterError, match="--gain-rotation 3 --gain-flip 0"):
        project.run(movies(**given, gain="turned.mrc"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"voltage": 0.3}, "is in kV: for 0.3 MV give 300"),
        ({"voltage": 200_000}, "is in kV: for 200000 V give 200"),
        ({"spherical_aberration": 2700}, "is in mm: for 2700 µm give 2.7"),
        ({"pixel_size": 0.0885}, "is in Å: for 0.0885 nm give 0.885"),
        ({"pixel_size": 88.5}, "is in Å: for 88.5 pm give 0.885"),
    ],
)
def test_values_in_other_units_are_refused_and_turned_into_ours(values, message):
    with pytest.raises(ParameterError, match=message):
        movies(**values)


def warnings_of(caplog) -> list[str]:
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    return [text for text in said if not text.startswith("1 warning")]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (0.9, None),
        (0.92, None),  # a calibrated one
        (1.1, "3 of 3 files say 0.9 Å: which is right?"),
        (1.8, "3 of 3 files say 0.9 Å: is one of them that of super-resolution or binned pixels?"),
        (0.45, "3 of 3 files say 0.9 Å: is one of them that of super-resolution or binned pixels?"),
    ],
)
def test_a_pixel_size_that_headers_contradict_is_taken_and_told(project, caplog, given, said):
    job = project.run(movies(pixel_size=given))
    assert read_movies(job.outputs["movies"]).pixel_size == given
    assert len(warnings_of(caplog)) == (said is not None)
    assert said is None or said in warnings_of(caplog)[0]


def test_headers_that_were_never_set_contradict_nothing(project, caplog):
    for number in range(3):
        write_movie(Path(f"Movies/m{number}.tif"), pixel_size=1.0)
    project.run(movies(pixel_size=0.9))
    assert not warnings_of(caplog)


@pytest.mark.parametrize(
    ("dose", "said"),
    [
        (40, "12 frames of 40 e/Å² are 480 e/Å² in all.* if 40 e/Å² is the whole exposure, give 3.333"),
        (0.05, "12 frames of 0.05 e/Å² are 0.6 e/Å² in all, in which little can be seen"),
        (4, None),
    ],
)
def test_a_whole_exposure_that_can_hardly_be_is_told(project, caplog, dose, said):
    project.run(movies(dose_per_frame=dose))
    assert len(warnings_of(caplog)) == (said is not None)
    assert said is None or re.search(said, warnings_of(caplog)[0])


def test_movies_of_other_lengths_are_kept_and_named(project, caplog):
    for name, n in (("m8", 5), ("m9", 30)):
        frames = np.random.default_rng(n).poisson(4, (n, *SHAPE)).astype(np.uint8)
        write_tiff_movie(Path(f"Movies/{name}.tif"), frames, pixel_size=0.9)
    job = project.run(movies())
    assert read_movies(job.outputs["movies"]).rows["rlnImageSizeZ"].to_list() == [12, 12, 12, 5, 30]
    [said] = warnings_of(caplog)
    assert "2 of 5 movies have another number of frames than the 12 of most (m8.tif 5, m9.tif 30)" in said


def test_defects_and_mtf_are_read_before_anything_is_written(project):
    Path("defects.txt").write_text("200 10 20 1\n")
    with pytest.raises(TableError, match=r"defects.txt.*row 1"):
        project.run(movies(defects="defects.txt"))
    Path("mtf.star").write_text("data_\n\nloop_\n_rlnMtfValue #1\n1.0\n")
    with pytest.raises(TableError, match="no column rlnResolutionInversePixel"):
        project.run(movies(mtf="mtf.star"))
    assert not written(project)
