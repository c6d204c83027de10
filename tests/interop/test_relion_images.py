"""RELION reads the images that Halfmap writes, Halfmap those of RELION, and both see the same pixels."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from eer_writer import encode, random_events, write_eer

from halfmap.io.eer import read_eer
from halfmap.io.gain import read_gain
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.tiff import read_tiff, tiff_info, write_tiff_movie

pytestmark = pytest.mark.relion


def relion(folder: Path, program: str, *arguments: object) -> str:
    command = [f"relion_{program}", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def frames(dtype: str = "f4") -> np.ndarray:
    return np.random.default_rng(2).poisson(3, (4, 50, 70)).astype(dtype)


@pytest.mark.parametrize("dtype", ["f4", "i1", "i2", "u2"])
def test_relion_reads_our_stacks_and_we_what_it_writes(tmp_path: Path, dtype: str) -> None:
    write_mrc(tmp_path / "a.mrcs", frames(dtype), pixel_size=0.83)
    relion(tmp_path, "image_handler", "--i", "a.mrcs", "--o", "b.mrcs")
    assert np.array_equal(read_mrc(tmp_path / "b.mrcs"), frames())
    assert read_header(tmp_path / "b.mrcs").require_pixel_size() == pytest.approx(0.83, rel=1e-6)


def test_relion_sees_our_statistics_and_pixel_size(tmp_path: Path) -> None:
    volume = np.random.default_rng(2).normal(size=(20, 20, 20)).astype(np.float32)
    write_mrc(tmp_path / "a.mrc", volume, pixel_size=1.37)
    said = relion(tmp_path, "image_handler", "--i", "a.mrc", "--stats")
    # RELION prints six digits.
    values = {
        key: float(value)
        for key, value in re.findall(r"(avg|stddev|minval|maxval|angpix) *= *(\S+?);?\s", said)
    }
    expected = [volume.mean(), volume.std(), volume.min(), volume.max(), 1.37]
    assert [values[key] for key in ("avg", "stddev", "minval", "maxval", "angpix")] == pytest.approx(
        expected, rel=1e-5, abs=1e-6
    )
    assert "(x,y,z,n)= 20 x 20 x 20 x 1" in said


def test_volumes_keep_their_axes(tmp_path: Path) -> None:
    volume = np.zeros((24, 24, 24), np.float32)
    volume[3, 7, 12] = 1
    write_mrc(tmp_path / "a.mrc", volume, pixel_size=1)
    relion(
        tmp_path,
        "image_handler",
        "--i",
        "a.mrc",
        "--o",
        "b.mrc",
        "--shift_x",
        2,
        "--shift_y",
        -1,
        "--shift_z",
        5,
    )
    assert np.unravel_index(read_mrc(tmp_path / "b.mrc").argmax(), volume.shape) == (8, 6, 14)


@pytest.mark.parametrize("compression", [None, "lzw", "deflate"])
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_relion_reads_our_tiff_as_our_mrc(tmp_path: Path, dtype: str, compression: str | None) -> None:
    write_tiff_movie(tmp_path / "a.tif", frames(dtype), pixel_size=0.83, compression=compression)
    relion(tmp_path, "image_handler", "--i", "a.tif", "--o", "b.mrcs")
    assert np.array_equal(read_mrc(tmp_path / "b.mrcs"), frames())
    assert read_header(tmp_path / "b.mrcs").require_pixel_size() == pytest.approx(0.83, rel=1e-6)


def test_we_read_relions_tiff_as_its_mrc(tmp_path: Path) -> None:
    write_mrc(tmp_path / "a.mrcs", frames("i2"), pixel_size=0.83)
    relion(tmp_path, "convert_to_tiff", "--i", "a.mrcs", "--o", "out/")
    assert np.array_equal(read_tiff(tmp_path / "out/a.tif"), frames())
    assert tiff_info(tmp_path / "out/a.tif").pixel_size == pytest.approx(0.83, rel=1e-6)


@pytest.mark.parametrize("compression", [65000, 65001])
@pytest.mark.parametrize("upsampling", [1, 2])
def test_events_fall_where_relion_renders_them(tmp_path: Path, upsampling: int, compression: int) -> None:
    shape, skip_bits = (4096, 4096), {65000: 8, 65001: 7}[compression]
    rng = np.random.default_rng(9)
    data = []
    for _ in range(5):
        events = random_events(rng, shape, 3000)
        # RELION reads the eight-bit code as its first writers made it.
        data.append(encode(events, shape, skip_bits, 2, wasteful=skip_bits == 8))
    write_eer(tmp_path / "a.eer", data, shape, compression=compression)
    options = ["--eer_grouping", 2, "--eer_upsampling", upsampling, "--compression", "lzw"]
    relion(tmp_path, "convert_to_tiff", "--i", "a.eer", "--o", "out/", *options)
    # Its TIFF is flipped on the way out, and read_tiff flips it back.
    ours = read_eer(tmp_path / "a.eer", grouping=2, upsampling=upsampling)
    assert ours.sum() == 4 * 3000
    assert np.array_equal(ours, read_tiff(tmp_path / "out/a.tif"))


@pytest.mark.parametrize(("rotation", "flip"), [(1, 0), (2, 1), (3, 2), (0, 1)])
def test_gains_are_turned_as_relion_turns_them(tmp_path: Path, rotation: int, flip: int) -> None:
    gain = np.random.default_rng(5).normal(1, 0.1, (48, 64)).astype(np.float32)
    write_mrc(tmp_path / "gain.mrc", gain, pixel_size=1)
    movie = np.ones((2, *np.rot90(gain, rotation).shape), np.float32)
    write_mrc(tmp_path / "movie.mrcs", movie, pixel_size=1)
    (tmp_path / "movies.star").write_text(
        "data_optics\n\nloop_\n_rlnOpticsGroupName\n_rlnOpticsGroup\n_rlnMicrographOriginalPixelSize\n"
        "_rlnVoltage\n_rlnSphericalAberration\n_rlnAmplitudeContrast\ng 1 1.0 300 2.7 0.1\n\n"
        "data_movies\n\nloop_\n_rlnMicrographMovieName\n_rlnOpticsGroup\nmovie.mrcs 1\n"
    )
    # The turned gain is written first; what motion correction makes of two flat frames does not matter.
    command = ["relion_run_motioncorr", "--i", "movies.star", "--o", "out/", "--use_own", "--j", "1"]
    command += ["--gainref", "gain.mrc", "--gain_rot", str(rotation), "--gain_flip", str(flip)]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, check=False)
    ours = read_gain(tmp_path / "gain.mrc", rotation=rotation, flip=flip, shape=movie.shape[1:])
    assert np.array_equal(ours, read_mrc(tmp_path / "out/gain.mrc", 0))
