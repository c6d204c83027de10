"""MRC files: written and read back, read of other writers, and every kind of damage."""

from __future__ import annotations

import bz2
import gzip
import tracemalloc
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mrcfile.dtypes import HEADER_DTYPE

from halfmap.errors import FileFormatError, HalfmapError, ParameterError, ShapeError
from halfmap.io.mrc import MrcStackWriter, open_mrc, read_header, read_mrc, write_mrc

WRITABLE = ("f4", "f2", "i1", "i2", "u2")


def some(shape: tuple[int, ...], dtype: str = "f4") -> np.ndarray:
    values = np.random.default_rng(7).normal(0, 20, shape)
    return (np.abs(values) if dtype == "u2" else values).clip(-100, 100).round(2).astype(dtype)


def stored(shape: tuple[int, int, int], mode: int, data: bytes, *, order: str = "<", **fields) -> bytes:
    """Bytes of an MRC file made without any of the code under test."""
    header = np.zeros((), HEADER_DTYPE.newbyteorder(order))
    header["nz"], header["ny"], header["nx"] = shape
    header["mz"], header["my"], header["mx"] = shape
    header["mode"] = mode
    header["cella"] = tuple(2.0 * n for n in shape[::-1])
    header["map"], header["machst"] = b"MAP ", (0x44, 0x44, 0, 0) if order == "<" else (0x11, 0x11, 0, 0)
    header["ispg"] = 1
    for name, value in fields.items():
        header[name] = value
    return header.tobytes() + bytes(int(header["nsymbt"])) + data


@pytest.mark.parametrize("dtype", WRITABLE)
@pytest.mark.parametrize("shape", [(9, 12), (1, 9, 12), (5, 9, 12)])
def test_what_is_written_is_read(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = some(shape, dtype)
    write_mrc(tmp_path / "a.mrc", array, pixel_size=1.25)
    back = read_mrc(tmp_path / "a.mrc")
    assert back.dtype == dtype
    assert np.array_equal(back, array.reshape(-1, 9, 12))
    assert read_header(tmp_path / "a.mrc").require_pixel_size() == pytest.approx(1.25)


@pytest.mark.parametrize("dtype", ["f4", "i1", "i2", "u2"])
@pytest.mark.parametrize(
    ("name", "shape"), [("a.mrc", (9, 12)), ("a.mrc", (5, 9, 12)), ("a.mrcs", (5, 9, 12))]
)
def test_files_are_valid_to_mrcfile(tmp_path: Path, name: str, shape: tuple[int, ...], dtype: str) -> None:
    array = some(shape, dtype)
    write_mrc(tmp_path / name, array, pixel_size=1.25, origin=(1.0, 2.0, 3.0))
    report = tmp_path / "report"
    with report.open("w") as stream:
        assert mrcfile.validate(tmp_path / name, print_file=stream), report.read_text()
    with mrcfile.open(tmp_path / name) as mrc:
        assert mrc.is_image_stack() == name.endswith("s")
        assert mrc.is_volume() == (len(shape) == 3 and name == "a.mrc")
        assert np.array_equal(mrc.data, array)
        assert mrc.voxel_size.x == pytest.approx(1.25)
        assert mrc.header.origin.item() == (1.0, 2.0, 3.0)
        assert mrc.header.dmin == array.min() and mrc.header.dmax == array.max()
        assert mrc.header.rms == pytest.approx(array.std(dtype=np.float64), rel=1e-6)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("mode", "dtype"), [(0, "i1"), (1, "i2"), (2, "f4"), (6, "u2"), (12, "f2")])
def test_both_byte_orders_and_extended_headers(tmp_path: Path, order: str, mode: int, dtype: str) -> None:
    array = some((3, 4, 6), dtype)
    raw = stored(
        (3, 4, 6), mode, array.astype(order + dtype).tobytes(), order=order, nsymbt=768, exttyp=b"FEI1"
    )
    (tmp_path / "a.mrc").write_bytes(raw)
    header = read_header(tmp_path / "a.mrc")
    assert (header.extended_type, header.data_offset, header.pixel_size) == ("FEI1", 1024 + 768, 2.0)
    assert np.array_equal(read_mrc(tmp_path / "a.mrc"), array)
    assert read_mrc(tmp_path / "a.mrc").dtype.isnative
    assert np.array_equal(open_mrc(tmp_path / "a.mrc"), array)


def test_a_wrong_machine_stamp_is_seen_through(tmp_path: Path) -> None:
    array = some((3, 4, 6))
    raw = stored((3, 4, 6), 2, array.astype(">f4").tobytes(), order=">", machst=(0x44, 0x44, 0, 0))
    (tmp_path / "a.mrc").write_bytes(raw)
    assert np.array_equal(read_mrc(tmp_path / "a.mrc"), array)


@pytest.mark.parametrize(("flags", "value"), [(None, -2), (1, -2), (0, 254)])
def test_bytes_are_signed_unless_imod_says_otherwise(tmp_path: Path, flags: int | None, value: int) -> None:
    extra = bytearray(84)
    if flags is not None:
        # The stamp is the header's 39th word, 108 bytes into it are `extra2`.
        extra[152 - 112 : 160 - 112] = np.array([1146047817, flags], "<i4").tobytes()
    raw = stored((1, 1, 1), 0, b"\xfe", extra2=bytes(extra))
    (tmp_path / "a.mrc").write_bytes(raw)
    assert read_mrc(tmp_path / "a.mrc").item() == value


def test_four_bit_data_low_nibble_first_rows_padded(tmp_path: Path) -> None:
    rows = np.array([[0x21, 0x43, 0x05], [0x76, 0x98, 0x0A]], np.uint8)
    (tmp_path / "a.mrc").write_bytes(stored((1, 2, 5), 101, rows.tobytes()))
    assert read_mrc(tmp_path / "a.mrc").tolist() == [[[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]]
    assert open_mrc(tmp_path / "a.mrc").shape == (1, 2, 5)


def test_axes_in_another_order_are_turned(tmp_path: Path) -> None:
    volume = some((3, 4, 6))
    raw = stored((4, 6, 3), 2, volume.transpose(1, 2, 0).tobytes(), mapc=3, mapr=1, maps=2)
    (tmp_path / "a.map").write_bytes(raw)
    assert read_header(tmp_path / "a.map").shape == (3, 4, 6)
    assert np.array_equal(read_mrc(tmp_path / "a.map"), volume)
    assert np.array_equal(read_mrc(tmp_path / "a.map", [2, 0]), volume[[2, 0]])


@pytest.mark.parametrize("suffix", [".gz", ".bz2"])
@pytest.mark.parametrize("index", [None, 0, 4, slice(1, 4), [3, 1]])
def test_compressed(tmp_path: Path, suffix: str, index) -> None:
    stack = some((5, 4, 6))
    write_mrc(tmp_path / "a.mrcs", stack, pixel_size=1)
    pack = gzip.compress if suffix == ".gz" else bz2.compress
    (tmp_path / f"a.mrcs{suffix}").write_bytes(pack((tmp_path / "a.mrcs").read_bytes()))
    assert read_header(tmp_path / f"a.mrcs{suffix}").is_stack
    wanted = stack if index is None else stack[index]
    assert np.array_equal(read_mrc(tmp_path / f"a.mrcs{suffix}", index), wanted)


@pytest.mark.parametrize(
    "index", [2, -1, slice(None), slice(4, 1, -2), slice(2, 2), [4], [0, 1, 4, 3, 3], [-1, 0]]
)
def test_sections_come_as_asked(tmp_path: Path, index) -> None:
    stack = some((5, 4, 6))
    write_mrc(tmp_path / "a.mrcs", stack, pixel_size=1)
    assert np.array_equal(read_mrc(tmp_path / "a.mrcs", index), stack[index])


def test_only_what_is_asked_is_read(tmp_path: Path) -> None:
    # A sparse file of 32 GB: reading all of it would show.
    with (tmp_path / "a.mrcs").open("wb") as stream:
        stream.write(stored((8000, 1024, 1024), 2, b""))
        stream.truncate(1024 + 8000 * 4 * 1024**2)
    tracemalloc.start()
    assert read_mrc(tmp_path / "a.mrcs", [7999, 0]).shape == (2, 1024, 1024)
    assert open_mrc(tmp_path / "a.mrcs")[4000, 5, 5] == 0
    assert tracemalloc.get_traced_memory()[1] < 10 * 1024**2
    tracemalloc.stop()


@pytest.mark.parametrize("cell", [(0.0, 0.0, 0.0), (np.nan, 2.0, 2.0), (-6.0, -6.0, 3.0), (6.0, 8.0, 3.0)])
def test_a_pixel_size_that_cannot_be(tmp_path: Path, cell: tuple[float, float, float]) -> None:
    (tmp_path / "a.mrc").write_bytes(stored((1, 4, 4), 2, bytes(64), cella=cell))
    header = read_header(tmp_path / "a.mrc")
    assert header.pixel_size is None
    with pytest.raises(
        FileFormatError, match=r"a\.mrc: the header's pixel size.*state the pixel size yourself"
    ):
        header.require_pixel_size()


def test_a_grid_of_zero_has_no_pixel_size(tmp_path: Path) -> None:
    (tmp_path / "a.mrc").write_bytes(stored((1, 4, 4), 2, bytes(64), mx=0))
    assert read_header(tmp_path / "a.mrc").pixel_size is None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is 0 bytes long"),
        (b"data_particles\n\nloop_\n" * 100, "is not an MRC file"),
        (bytes(100), "is 100 bytes long"),
        (stored((2, 4, 4), 2, bytes(100)), "is truncated: the header says 1152 bytes, the file has 1124"),
        (stored((0, 4, 4), 2, b""), "is an empty stack"),
        (stored((1, 0, 4), 2, b""), "impossible shape 4 x 0 x 1"),
        (stored((-1, 4, 4), 2, b""), "impossible shape"),
        (stored((1, 4, 4), 4, bytes(64)), "holds a Fourier transform"),
        (stored((1, 4, 4), 7, bytes(64)), "is not an MRC file .mode 7."),
        (stored((2**31 - 1, 2**31 - 1, 2**31 - 1), 2, b""), "is truncated"),
        (gzip.compress(stored((2, 4, 4), 2, bytes(100)), mtime=0), "is truncated"),
        (
            gzip.compress(stored((2, 4, 4), 2, some((2, 4, 4)).tobytes()), mtime=0)[:-60],
            "truncated or corrupt gzip",
        ),
        (bz2.compress(stored((2, 4, 4), 2, bytes(128)))[:-10], "truncated or corrupt bzip2"),
        (gzip.compress(stored((2**31 - 1, 1, 1), 2, bytes(100)), mtime=0), "is truncated"),
    ],
)
def test_damage_is_one_clear_error(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "a.mrc").write_bytes(raw)
    with pytest.raises(FileFormatError, match=message) as caught:
        read_mrc(tmp_path / "a.mrc")
    assert str(tmp_path / "a.mrc") in str(caught.value)
    assert caught.value.hint


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no such file"):
        read_mrc(tmp_path / "a.mrc")
    with pytest.raises(FileFormatError, match="is a folder"):
        read_mrc(tmp_path)


@pytest.mark.parametrize("index", [5, -6, [0, 9]])
def test_sections_that_are_not_there(tmp_path: Path, index) -> None:
    write_mrc(tmp_path / "a.mrcs", some((5, 4, 6)), pixel_size=1)
    with pytest.raises(FileFormatError, match=r"holds 5 sections, number -?[569] "):
        read_mrc(tmp_path / "a.mrcs", index)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefix=st.sampled_from([b"", b"\x1f\x8b", b"BZh9", bytes(12)]),
    raw=st.binary(max_size=3000),
)
def test_random_bytes_never_do_harm(tmp_path: Path, prefix: bytes, raw: bytes) -> None:
    (tmp_path / "a.mrc").write_bytes(prefix + raw)
    _read_or_refuse(tmp_path / "a.mrc")


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, 63),
            st.one_of(
                st.integers(-(2**31), 2**31 - 1), st.integers(-3, 300), st.sampled_from([2**24, 2**25, 101])
            ),
        ),
        min_size=1,
        max_size=4,
    ),
    cut=st.one_of(st.none(), st.integers(0, 1400)),
    pack=st.sampled_from([bytes, gzip.compress, bz2.compress]),
    order=st.sampled_from("<>"),
)
def test_changed_headers_never_do_harm(tmp_path: Path, changes, cut, pack, order) -> None:
    raw = bytearray(stored((4, 4, 6), 2, some((4, 4, 6)).astype(order + "f4").tobytes(), order=order))
    for word, value in changes:
        raw[4 * word : 4 * word + 4] = np.array(value, order + "i4").tobytes()
    packed = pack(bytes(raw))
    (tmp_path / "a.mrc").write_bytes(packed if cut is None else packed[:cut])
    _read_or_refuse(tmp_path / "a.mrc")


def _read_or_refuse(path: Path) -> None:
    """Arrays or a HalfmapError, and no memory beyond what a file of some kB can fill."""
    tracemalloc.start()
    try:
        header = read_header(path)
        array = read_mrc(path)
        assert array.shape == header.shape and array.dtype == header.dtype
        assert open_mrc(path).shape == header.shape
        read_mrc(path, -1)
        _ = header.pixel_size, header.is_stack, repr(header)
    except HalfmapError as error:
        assert str(path) in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 * 1024**2


def test_a_stack_grows_image_by_image(tmp_path: Path) -> None:
    images = some((40, 4, 6))
    with MrcStackWriter(tmp_path / "a.mrcs", shape=(4, 6), pixel_size=1.5) as stack:
        stack.append(images[0])
        stack.append(images[1:])
        assert len(stack) == 40
        assert not (tmp_path / "a.mrcs").exists()
    assert np.array_equal(read_mrc(tmp_path / "a.mrcs"), images)
    minimum, maximum, mean, rms = read_header(tmp_path / "a.mrcs").statistics
    assert (minimum, maximum) == (images.min(), images.max())
    assert mean == pytest.approx(images.mean(dtype=np.float64), rel=1e-6)
    assert rms == pytest.approx(images.std(dtype=np.float64), rel=1e-6)


def test_images_are_written_in_any_order(tmp_path: Path) -> None:
    images = some((5, 4, 6))
    with MrcStackWriter(
        tmp_path / "a.mrcs", shape=(4, 6), pixel_size=1.5, n_images=5, dtype=np.float16
    ) as stack:
        for i in (3, 0, 4, 1, 2):
            stack[i] = images[i]
    assert np.array_equal(read_mrc(tmp_path / "a.mrcs"), images.astype(np.float16))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda stack: stack.append(np.zeros((4, 5))), "shape .4, 5. does not fit"),
        (lambda stack: stack.append(np.zeros((2, 4, 6))), "only 2 of 3 images"),
        (lambda stack: stack.append(np.zeros((4, 4, 6))), "outside the stack of 3"),
        (lambda stack: None, "only 0 of 3 images"),
    ],
)
def test_a_stack_that_fails_leaves_nothing(tmp_path: Path, write, message: str) -> None:
    with (
        pytest.raises(ShapeError, match=message),
        MrcStackWriter(tmp_path / "a.mrcs", shape=(4, 6), pixel_size=1.5, n_images=3) as stack,
    ):
        write(stack)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("array", "dtype", "message"),
    [
        (np.full((4, 4), 300.0), np.int8, "300.0 do not fit int8"),
        (np.full((4, 4), np.nan), np.int16, "do not fit int16"),
        (np.full((4, 4), -1), np.uint16, "do not fit uint16"),
        (np.full((4, 4), 1e6), np.float16, "1e\\+06 does not fit float16"),
        (np.zeros((4, 4), np.int64), None, "cannot hold int64"),
        (np.zeros((4, 4), np.complex64), None, "cannot hold complex64"),
        (np.zeros((4, 4)), np.float64, "cannot hold float64"),
    ],
)
def test_values_that_do_not_fit_are_refused(tmp_path: Path, array, dtype, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        write_mrc(tmp_path / "a.mrc", array, pixel_size=1, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "kept"), [("f8", "f4"), ("u1", "u2"), ("?", "i1"), (">f4", "f4")])
def test_types_mrc_has_not_become_the_nearest(tmp_path: Path, given: str, kept: str) -> None:
    array = (some((3, 4)) > 0).astype(given)
    write_mrc(tmp_path / "a.mrc", array, pixel_size=1)
    assert read_mrc(tmp_path / "a.mrc", 0).dtype == kept
    assert np.array_equal(read_mrc(tmp_path / "a.mrc", 0), array)


@pytest.mark.parametrize("pixel_size", [0, -1, np.nan, np.inf])
def test_a_pixel_size_is_always_written(tmp_path: Path, pixel_size: float) -> None:
    with pytest.raises(ParameterError, match="not a positive number"):
        write_mrc(tmp_path / "a.mrc", some((4, 4)), pixel_size=pixel_size)


@pytest.mark.parametrize("shape", [(4,), (0, 4, 4), (2, 2, 4, 4)])
def test_shapes_mrc_has_not(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError):
        write_mrc(tmp_path / "a.mrc", np.zeros(shape), pixel_size=1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # mrcfile complains of old headers
def test_real_files_are_read_as_mrcfile_reads_them(shared_data: Path) -> None:
    files = [*shared_data.glob("maps/*/*.m*"), *shared_data.glob("particles/*/*.mrc*")]
    files = [file for file in files if file.suffix in (".mrc", ".mrcs", ".map")]
    assert len(files) > 5
    for file in files:
        with mrcfile.mmap(file, permissive=True, mode="r") as mrc:
            assert np.array_equal(np.atleast_3d(mrc.data), np.atleast_3d(open_mrc(file)))
    micrograph = read_header(next(shared_data.glob("micrographs/krios*/*.mrc")))
    assert (micrograph.extended_type, micrograph.shape) == ("FEI1", (1, 3838, 3710))
    assert micrograph.pixel_size == pytest.approx(0.8538, abs=1e-4)
