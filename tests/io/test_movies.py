"""Movies of every format as one kind of object."""

from __future__ import annotations

import bz2
import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
from eer_writer import counts, encode, random_events, write_eer

from halfmap.errors import FileFormatError, ParameterError
from halfmap.io.movies import open_movie
from halfmap.io.mrc import write_mrc
from halfmap.io.tiff import write_tiff_movie

FRAMES = np.random.default_rng(8).poisson(3, (7, 20, 30)).astype(np.int16)


def make(folder: Path, name: str) -> Path:
    path = folder / name
    if ".tif" in name:
        write_tiff_movie(path, FRAMES, pixel_size=0.9)
        return path
    plain = folder / name.removesuffix(".gz").removesuffix(".bz2")
    write_mrc(plain, FRAMES, pixel_size=0.9)
    if name.endswith((".gz", ".bz2")):
        path.write_bytes((gzip if name.endswith(".gz") else bz2).compress(plain.read_bytes()))
    return path


@pytest.mark.parametrize("name", ["a.mrc", "a.mrcs", "a.tif", "a.TIFF", "a.mrc.gz", "a.v2.mrcs.bz2"])
def test_all_formats_alike(tmp_path: Path, name: str) -> None:
    movie = open_movie(make(tmp_path, name.replace("TIFF", "tiff")))
    assert (movie.n_frames, movie.shape, movie.dtype) == (7, (20, 30), np.int16)
    assert movie.pixel_size == pytest.approx(0.9, rel=1e-6)
    assert np.array_equal(movie.read(), FRAMES)
    assert np.array_equal(movie.read(2, 5), FRAMES[2:5])
    assert np.array_equal(movie.read(6), FRAMES[6:])
    # Steps hand movies to other processes.
    assert np.array_equal(pickle.loads(pickle.dumps(movie)).read(0, 1), FRAMES[:1])


@pytest.mark.parametrize("upsampling", [1, 2])
def test_fractions_of_eer_are_frames(tmp_path: Path, upsampling: int) -> None:
    rng, shape = np.random.default_rng(1), (32, 32)
    events = [random_events(rng, shape, 40) for _ in range(9)]
    write_eer(tmp_path / "a.eer", [encode(frame, shape, 7, 2) for frame in events], shape)
    movie = open_movie(tmp_path / "a.eer", eer_grouping=4, eer_upsampling=upsampling)
    assert (movie.n_frames, movie.shape, movie.pixel_size) == (2, (32 * upsampling, 32 * upsampling), None)
    second = movie.read(1, 2)
    assert second.dtype == movie.dtype == np.uint8
    assert np.array_equal(second[0], counts(events[4:8], shape, upsampling))


@pytest.mark.parametrize(("first", "last"), [(0, 8), (-1, 2), (3, 3), (5, 2), (7, None)])
def test_ranges_that_are_not_there(tmp_path: Path, first: int, last: int | None) -> None:
    movie = open_movie(make(tmp_path, "a.tif"))
    with pytest.raises(FileFormatError, match="holds 7 frames"):
        movie.read(first, last)


@pytest.mark.parametrize("name", ["a.png", "a", "a.tif.gz", "a.gz", "a.eer.bz2"])
def test_names_that_are_no_movies(name: str) -> None:
    with pytest.raises(FileFormatError, match="is not a movie by its name"):
        open_movie(name)


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    events = random_events(np.random.default_rng(1), (16, 16), 5)
    write_eer(tmp_path / "a.eer", [encode(events, (16, 16), 7, 2)] * 3, (16, 16))
    with pytest.raises(ParameterError, match="fractions of 0 frames"):
        open_movie(tmp_path / "a.eer", eer_grouping=0)
    with pytest.raises(ParameterError, match="upsampling 4"):
        open_movie(tmp_path / "a.eer", eer_upsampling=4)
    with pytest.raises(FileFormatError, match="has 3 frames, fewer than one fraction of 32"):
        open_movie(tmp_path / "a.eer")
