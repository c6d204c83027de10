"""TIFF movies: row order, compressions, subsets, and every kind of damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfmap.errors import FileFormatError, HalfmapError, ParameterError, ShapeError
from halfmap.io.tiff import read_tiff, tiff_info, write_tiff_movie


def movie(dtype: str = "u1", shape: tuple[int, int, int] = (6, 40, 50)) -> np.ndarray:
    return np.random.default_rng(5).poisson(2, shape).astype(dtype)


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "f4"])
def test_what_is_written_is_read(tmp_path: Path, dtype: str, compression: str | None) -> None:
    frames = movie(dtype)
    write_tiff_movie(tmp_path / "a.tif", frames, pixel_size=0.83, compression=compression)
    back = read_tiff(tmp_path / "a.tif")
    assert back.dtype == dtype
    assert np.array_equal(back, frames)
    info = tiff_info(tmp_path / "a.tif")
    assert (info.shape, info.dtype, info.compression) == ((6, 40, 50), np.dtype(dtype), compression or "none")
    assert info.pixel_size == pytest.approx(0.83, rel=1e-6)


def test_rows_are_flipped_on_the_way_out_and_in(tmp_path: Path) -> None:
    frames = movie()
    write_tiff_movie(tmp_path / "a.tif", frames)
    as_stored = tifffile.imread(tmp_path / "a.tif")
    assert np.array_equal(as_stored, frames[:, ::-1])
    tifffile.imwrite(tmp_path / "b.tif", frames, photometric="minisblack")
    assert np.array_equal(read_tiff(tmp_path / "b.tif"), frames[:, ::-1])


@pytest.mark.parametrize("frames", [0, -1, slice(2, 5), slice(None, None, -2), [5, 0, 0], np.array([3])])
@pytest.mark.parametrize("workers", [1, 3])
def test_frames_come_as_asked(tmp_path: Path, frames, workers: int) -> None:
    write_tiff_movie(tmp_path / "a.tif", movie())
    assert np.array_equal(read_tiff(tmp_path / "a.tif", frames, workers=workers), movie()[frames])


@pytest.mark.parametrize(
    "options",
    [
        {"byteorder": ">"},
        {"bigtiff": True},
        {"tile": (16, 32), "compression": "lzw"},
        {"rowsperstrip": 7, "compression": "adobe_deflate", "predictor": True},
        {"rowsperstrip": 1, "compression": "zstd"},
        {"compression": "packbits"},
    ],
)
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_layouts_of_other_writers(tmp_path: Path, options: dict, dtype: str) -> None:
    frames = movie(dtype)
    with tifffile.TiffWriter(
        tmp_path / "a.tif", byteorder=options.pop("byteorder", "<"), bigtiff=options.pop("bigtiff", False)
    ) as writer:
        for frame in frames:
            writer.write(frame, photometric="minisblack", contiguous=False, **options)
    assert np.array_equal(read_tiff(tmp_path / "a.tif"), frames[:, ::-1])


def test_four_bit_frames_are_known_by_their_size(tmp_path: Path) -> None:
    packed = np.random.default_rng(1).integers(0, 256, (1, 7676, 3710), np.uint8)
    write_tiff_movie(tmp_path / "a.tif", packed, compression=None)
    frame = read_tiff(tmp_path / "a.tif", 0)
    assert tiff_info(tmp_path / "a.tif").shape == frame[None].shape == (1, 7676, 7420)
    assert np.array_equal(frame[:, 0::2] + 16 * frame[:, 1::2], packed[0])


def test_an_iterable_is_written_frame_by_frame(tmp_path: Path) -> None:
    write_tiff_movie(tmp_path / "a.tif", (frame for frame in movie("u2")))
    assert np.array_equal(read_tiff(tmp_path / "a.tif"), movie("u2"))


@pytest.mark.parametrize(
    ("tags", "pixel_size"),
    [
        ({}, None),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),
        ({"resolution": (2e8, 2e8), "resolutionunit": "INCH"}, 1.27),
        ({"resolution": (2e8, 2e8), "resolutionunit": "NONE"}, None),
    ],
)
def test_pixel_sizes_that_say_nothing(tmp_path: Path, tags: dict, pixel_size: float | None) -> None:
    tifffile.imwrite(tmp_path / "a.tif", movie()[0], photometric="minisblack", **tags)
    assert tiff_info(tmp_path / "a.tif").pixel_size == (pixel_size and pytest.approx(pixel_size))


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd"])
def test_cut_anywhere_is_an_error_with_the_path(tmp_path: Path, compression: str | None) -> None:
    write_tiff_movie(tmp_path / "a.tif", movie(), compression=compression)
    raw = (tmp_path / "a.tif").read_bytes()
    for size in np.linspace(0, len(raw) - 1, 60).astype(int):
        (tmp_path / "b.tif").write_bytes(raw[:size])
        with pytest.raises(FileFormatError) as caught:
            read_tiff(tmp_path / "b.tif")
        assert "b.tif" in str(caught.value) and caught.value.hint
    (tmp_path / "b.tif").write_bytes(raw[:-200])
    with pytest.raises(FileFormatError, match=r"is truncated: the (directory|data) of frame 6"):
        read_tiff(tmp_path / "b.tif")


@pytest.mark.parametrize("compression", ["lzw", "deflate", "zstd"])
def test_a_corrupt_frame_is_named_and_others_are_read(tmp_path: Path, compression: str) -> None:
    write_tiff_movie(tmp_path / "a.tif", movie(), compression=compression)
    raw = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        start, count = tiff.pages[3].dataoffsets[0], tiff.pages[3].databytecounts[0]
    raw[start + 2 : start + count] = bytes(count - 2)
    (tmp_path / "a.tif").write_bytes(raw)
    with pytest.raises(FileFormatError, match="frame 4 "):
        read_tiff(tmp_path / "a.tif")
    assert np.array_equal(read_tiff(tmp_path / "a.tif", [2, 4]), movie()[[2, 4]])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
    tags_only=st.booleans(),
)
def test_changed_bytes_never_do_harm(tmp_path: Path, changes, tags_only: bool) -> None:
    path = tmp_path / "a.tif"
    write_tiff_movie(path, movie(shape=(2, 8, 8)), compression="lzw", pixel_size=1)
    raw = bytearray(path.read_bytes())
    for place, value in changes:
        raw[int(place * (300 if tags_only else len(raw) - 1))] = value
    path.write_bytes(raw)
    try:
        array = read_tiff(path)
        assert array.shape == tiff_info(path).shape
    except HalfmapError as error:
        assert str(path) in str(error)


def test_what_is_no_movie(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(b"PNG" * 100)
    with pytest.raises(FileFormatError, match="is not a TIFF"):
        tiff_info(path)
    tifffile.imwrite(path, np.zeros((8, 8, 3), np.uint8), photometric="rgb")
    with pytest.raises(FileFormatError, match="holds 3 x uint8 a pixel"):
        tiff_info(path)
    tifffile.imwrite(path, np.zeros((8, 8), np.float64), photometric="minisblack")
    with pytest.raises(FileFormatError, match="float64"):
        tiff_info(path)
    with tifffile.TiffWriter(path) as writer:
        writer.write(np.zeros((8, 8), np.uint8), contiguous=False, photometric="minisblack")
        writer.write(np.zeros((8, 9), np.uint8), contiguous=False, photometric="minisblack")
    with pytest.raises(FileFormatError, match="frame 2 is 8 x 9 uint8, the first is 8 x 8"):
        read_tiff(path)
    with pytest.raises(FileFormatError, match="holds 2 frames, number 2 "):
        read_tiff(path, 2)
    with pytest.raises(FileFormatError, match="no such file"):
        read_tiff(tmp_path / "b.tif")


@pytest.mark.parametrize(
    ("frames", "options", "error"),
    [
        (np.zeros((2, 4, 4), np.int64), {}, ParameterError),
        (np.zeros((2, 4, 4), np.uint8), {"compression": "jpeg"}, ParameterError),
        (np.zeros((2, 4, 4), np.uint8), {"pixel_size": 0}, ParameterError),
        (np.zeros((0, 4, 4), np.uint8), {}, ShapeError),
        ([np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8)], {}, ShapeError),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, frames, options: dict, error: type) -> None:
    with pytest.raises(error):
        write_tiff_movie(tmp_path / "a.tif", frames, **options)
    assert list(tmp_path.iterdir()) == []
