"""Motion of a movie in STAR: our own files come back whole, RELION's are read, and RELION reads ours."""

from __future__ import annotations

import subprocess
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from halfmap.data import MotionTracks
from halfmap.data.motion import accumulated_motion
from halfmap.errors import FileFormatError, TableError
from halfmap.io.motion import read_tracks, write_tracks
from halfmap.io.mrc import write_mrc
from halfmap.io.star import read_star, write_star
from halfmap.io.tiff import write_tiff_movie

N = 6

# As RELION 3.1 writes it, shortened to a movie of four frames of which the middle two are used.
RELION = """
# version 30001

data_general

_rlnImageSizeX                                     2048
_rlnImageSizeY                                     1024
_rlnImageSizeZ                                        4
_rlnMicrographMovieName                    Movies/000001.tiff
_rlnMicrographGainName                     gain.mrc
_rlnMicrographBinning                          1.000000
_rlnMicrographOriginalPixelSize                1.400000
_rlnMicrographDoseRate                         1.200000
_rlnMicrographPreExposure                      0.000000
_rlnVoltage                                  300.000000
_rlnMicrographStartFrame                              2
_rlnMotionModelVersion                                1


# version 30001

data_global_shift

loop_
_rlnMicrographFrameNumber #1
_rlnMicrographShiftX #2
_rlnMicrographShiftY #3
           1  -9999.00000  -9999.00000
           2     0.000000     0.000000
           3     -0.28916     1.199440
           4  -9999.00000  -9999.00000


# version 30001

data_local_motion_model

loop_
_rlnMotionModelCoeffsIdx #1
_rlnMotionModelCoeff #2
{coefficients}


# version 30001

data_hot_pixels

loop_
_rlnCoordinateX #1
_rlnCoordinateY #2
 1725.000000    53.000000


# version 30001

data_local_shift

loop_
_rlnMicrographFrameNumber #1
_rlnCoordinateX #2
_rlnCoordinateY #3
_rlnMicrographShiftX #4
_rlnMicrographShiftY #5
           3   203.000000   203.000000     1.010738     0.061294
           2   103.000000   203.000000     0.000000     0.000000
           3   103.000000   203.000000     3.032214     0.183882

"""


def tracks(**changes) -> MotionTracks:
    rng = np.random.default_rng(0)
    shift = rng.normal(size=(N, 2))
    shift[0] = 0
    settings = {
        "movie": "Movies/a.tif",
        "shape": (100, 140),
        "n_frames": 9,
        "first_frame": 2,
        "last_frame": 7,
        "pixel_size": 1.4,
        "dose_per_frame": 1.2,
        "pre_exposure": 0.3,
        "voltage_kV": 300.0,
        "binning": 2.0,
        "gain": "gain.mrc",
        "defects": "defects.txt",
        "global_shift": shift,
        "global_error": rng.random(N),
        "local_coefficients": rng.normal(size=(2, 18)),
        "local_grid": rng.normal(size=(N, 4, 5, 2)),
        "local_error": rng.random((N, 4, 5)),
        "patch_centres": np.array([[100, 20], [30, 50], [30, 20.5]]),
        "patch_shifts": rng.normal(size=(3, N, 2)),
        "patch_errors": rng.random((3, N)),
        "hot_pixels": np.array([[3, 4], [5, 60]], np.int32),
    }
    return MotionTracks(**{**settings, **changes})


def assert_equal(found: MotionTracks, expected: MotionTracks) -> None:
    for field in fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, np.ndarray):
            assert np.array_equal(a, b, equal_nan=True), field.name
        else:
            assert a == b, field.name
            assert type(a) is type(b), field.name


def relion_file(folder: Path, text: str = RELION) -> Path:
    lines = [f"{index:12d}     {index / 8:.6f}" for index in range(36)]
    path = folder / "relion.star"
    # RELION ends lines with a blank.
    path.write_text(text.format(coefficients="\n".join(lines)).replace("\n", " \n"))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"local_coefficients": None, "hot_pixels": np.zeros((0, 2), np.int32)},
        {"local_grid": None, "local_error": None, "gain": None, "defects": None},
        {"movie": "Movies/a.eer", "eer_grouping": 32, "eer_upsampling": 2},
        {"patch_errors": np.full((3, N), np.nan), "global_error": np.full(N, np.nan)},
        {"local_grid": np.ones((N, 1, 1, 2)), "local_error": np.ones((N, 1, 1))},
        {"movie": "a folder/it's a.tif", "first_frame": 4, "last_frame": 9},
    ],
)
def test_motion_comes_back(tmp_path, changes):
    expected = tracks(**changes)
    write_tracks(tmp_path / "a.star", expected)
    assert_equal(read_tracks(tmp_path / "a.star"), expected)


def test_patches_without_a_shift_in_some_frames_come_back(tmp_path):
    expected = tracks()
    expected.patch_shifts[1, 3] = np.nan
    expected.patch_errors[1, 3] = np.nan
    write_tracks(tmp_path / "a.star", expected)
    assert read_star(tmp_path / "a.star")["local_shift"].height == 3 * N - 1
    assert_equal(read_tracks(tmp_path / "a.star"), expected)


def test_motion_without_patches(tmp_path):
    bare = tracks(
        patch_centres=np.zeros((0, 2)), patch_shifts=np.zeros((0, N, 2)), patch_errors=np.zeros((0, N))
    )
    write_tracks(tmp_path / "a.star", bare)
    assert_equal(read_tracks(tmp_path / "a.star"), bare)
    # Those that the class makes itself, too.
    values = {field.name: getattr(bare, field.name) for field in fields(bare)}
    made = MotionTracks(**{key: value for key, value in values.items() if "patch" not in key})
    write_tracks(tmp_path / "a.star", made)
    assert_equal(read_tracks(tmp_path / "a.star"), bare)


def test_frames_that_are_not_used_have_relions_mark(tmp_path):
    write_tracks(tmp_path / "a.star", tracks())
    table = read_star(tmp_path / "a.star")["global_shift"]
    assert table["rlnMicrographFrameNumber"].to_list() == list(range(1, 10))
    unused = table["rlnMicrographShiftX"] == -9999
    assert unused.to_list() == [True, *[False] * 6, True, True]
    assert table["rlnMicrographShiftY"].filter(unused).unique().to_list() == [-9999]


def test_files_of_relion_are_read(tmp_path):
    motion = read_tracks(relion_file(tmp_path))
    assert (motion.movie, motion.gain, motion.defects) == ("Movies/000001.tiff", "gain.mrc", None)
    assert (motion.shape, motion.n_frames, motion.first_frame, motion.last_frame) == ((1024, 2048), 4, 2, 3)
    assert (motion.pixel_size, motion.dose_per_frame, motion.pre_exposure) == (1.4, 1.2, 0)
    assert motion.global_shift.tolist() == [[0, 0], [-0.28916, 1.19944]]
    assert np.isnan(motion.global_error).all()
    assert motion.hot_pixels.tolist() == [[1725, 53]]
    assert motion.local_coefficients.tolist() == (np.arange(36) / 8).reshape(2, 18).tolist()
    assert motion.patch_centres.tolist() == [[203, 203], [103, 203]]
    assert motion.patch_shifts[1].tolist() == [[0, 0], [3.032214, 0.183882]]
    assert np.isnan(motion.patch_shifts[0, 0]).all()
    assert np.isnan(motion.patch_errors).all()
    # In the middle of the field only the terms without x and y count: coefficients 0 to 2 and 18 to 20.
    shift = motion.shift_at(1024, 512, 1) - motion.global_shift[1]
    assert shift == pytest.approx([(0 + 1 + 2) / 8, (18 + 19 + 20) / 8])


@pytest.mark.parametrize(
    ("old", "new", "error", "words"),
    [
        ("_rlnImageSizeX  ", "_rlnX  ", TableError, "has no _rlnImageSizeX in block data_general"),
        ("_rlnMicrographOriginalPixelSize", "_rlnX ", TableError, "_rlnMicrographOriginalPixelSize"),
        ("data_global_shift", "data_shift", FileFormatError, "holds no motion of a movie"),
        ("data_general", "data_particular", FileFormatError, "holds no motion of a movie"),
        ("data_local_motion_model", "data_model", TableError, "has no block data_local_motion_model"),
        ("ModelVersion                                1", "ModelVersion 7", FileFormatError, "version 7"),
        (
            "           3     -0.28916",
            "           9     -0.28916",
            TableError,
            "frame 9 of block data_global",
        ),
        ("           2     0.000000", "           4     0.000000", TableError, "no shift of frame 2"),
        ("3     -0.28916     1.199440", "3  -9999.00000  -9999.00000", TableError, "local_shift"),
        ("           3   203.000000", "           4   203.000000", TableError, "frame 4 .* frames 2 to 3"),
        ("_rlnMicrographShiftY #5", "_rlnShiftZ #5", TableError, "no column _rlnMicrographShiftY"),
        ("{coefficients}", "0 1.5", TableError, "does not hold the coefficients 0 to 35"),
    ],
)
def test_files_that_are_damaged(tmp_path, old, new, error, words):
    assert old in RELION
    path = relion_file(tmp_path, RELION.replace(old, new))
    with pytest.raises(error, match=words) as caught:
        read_tracks(path)
    assert caught.value.path == path


def test_no_frame_is_used(tmp_path):
    path = relion_file(tmp_path, RELION.replace("0.000000     0.000000\n", "-9999 -9999\n"))
    path.write_text(path.read_text().replace("-0.28916     1.199440", "-9999 -9999"))
    with pytest.raises(TableError, match="has no shift of any frame"):
        read_tracks(path)


def test_a_grid_that_is_not_whole(tmp_path):
    path = tmp_path / "a.star"
    write_tracks(path, tracks())
    blocks = read_star(path)
    grid = blocks["halfmap_local_grid"]
    for table in (grid[:-1], pl.concat([grid[:-1], grid[:1]])):
        write_star(path, {**blocks, "halfmap_local_grid": table})
        with pytest.raises(TableError, match="not a whole grid for every frame"):
            read_tracks(path)
    write_star(path, {**blocks, "halfmap_local_grid": grid.sample(fraction=1, shuffle=True, seed=1)})
    assert_equal(read_tracks(path), tracks())


@pytest.mark.relion
def test_relion_reads_ours_in_silence(tmp_path):
    write_tiff_movie(tmp_path / "Movies/a.tif", np.ones((9, 100, 140), np.uint8))
    # RELION reads the motion of movies that are done, to sum up their tracks, as polishing reads it.
    write_mrc(tmp_path / "out/Movies/a.mrc", np.zeros((100, 140), np.float32), pixel_size=1.4)
    motion = replace(tracks(), gain=None, defects=None, binning=1.0)
    write_tracks(tmp_path / "out/Movies/a.star", motion)
    optics = {
        "rlnOpticsGroupName": ["one"],
        "rlnOpticsGroup": [1],
        "rlnVoltage": [300.0],
        "rlnSphericalAberration": [2.7],
        "rlnAmplitudeContrast": [0.1],
        "rlnMicrographOriginalPixelSize": [1.4],
    }
    movies = {"rlnMicrographMovieName": ["Movies/a.tif"], "rlnOpticsGroup": [1]}
    write_star(tmp_path / "movies.star", {"optics": pl.DataFrame(optics), "movies": pl.DataFrame(movies)})
    command = "relion_run_motioncorr --use_own --i movies.star --o out/ --j 1 --only_do_unfinished"
    done = subprocess.run(
        [*command.split(), "--dose_per_frame", "1.2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "WARNING" not in done.stdout + done.stderr
    row = read_star(tmp_path / "out/corrected_micrographs.star")["micrographs"].row(0, named=True)
    labels = ("rlnAccumMotionTotal", "rlnAccumMotionEarly", "rlnAccumMotionLate")
    # RELION's are in pixels, whatever its label says.
    found = [row[label] * motion.pixel_size for label in labels]
    assert found == pytest.approx(accumulated_motion(motion), abs=1e-5)
    assert min(found) > 0
