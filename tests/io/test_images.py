"""Particle images by name: the right ones, in the order asked, in bounded memory."""

from __future__ import annotations

import itertools
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from halfmap.errors import FileFormatError, ParameterError, ShapeError, TableError
from halfmap.io.images import ImageStack, checked_micrograph, read_image
from halfmap.io.mrc import MrcStackWriter, write_mrc
from halfmap.io.star import read_star
from halfmap.io.tiff import write_tiff_movie


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Three stacks whose pixels say file and number: 100 * file + number."""
    (tmp_path / "Extract").mkdir()
    for file in range(3):
        with MrcStackWriter(tmp_path / f"Extract/{file}.mrcs", shape=(4, 6), pixel_size=1.5) as stack:
            stack.append(np.full((20, 4, 6), 100.0 * file) + np.arange(20)[:, None, None])
    return tmp_path


def shuffled(n: int = 60) -> tuple[list[str], np.ndarray]:
    """Names of all images in random order, and what their pixels hold."""
    order = np.random.default_rng(6).permutation(60)[:n]
    return [f"{i % 20 + 1:06d}@Extract/{i // 20}.mrcs" for i in order], 100.0 * (order // 20) + order % 20


def test_images_come_in_the_order_asked(project: Path) -> None:
    names, values = shuffled()
    stack = ImageStack(names, root=project)
    assert (len(stack), stack.shape, stack.pixel_size) == (60, (4, 6), pytest.approx(1.5))
    assert sorted(file.name for file in stack.files) == ["0.mrcs", "1.mrcs", "2.mrcs"]
    for rows in ([5], [59, 0, 0, 31], range(60), []):
        images = stack.read(rows)
        assert images.dtype == np.float32
        assert images.shape == (len(rows), 4, 6)
        assert np.array_equal(images[:, 2, 3], values[list(rows)])
    assert np.array_equal(pickle.loads(pickle.dumps(stack)).read([3]), stack.read([3]))


def test_chunks_go_through_the_files_in_order(project: Path) -> None:
    names, values = shuffled()
    stack = ImageStack(pl.Series(names), root=project, dtype=np.float16)
    seen = []
    for rows, images in stack.chunks(7):
        assert len(rows) <= 7 and images.dtype == np.float16
        assert np.array_equal(images[:, 0, 0], values[rows])
        seen += rows.tolist()
    assert sorted(seen) == list(range(60))
    files = [names[row].split("@")[1] for row in seen]
    assert sum(a != b for a, b in itertools.pairwise(files)) == 2
    numbers = np.array([int(names[row].split("@")[0]) for row in seen])
    assert (np.diff(numbers.reshape(3, 20), axis=1) == 1).all()
    some = np.concatenate([rows for rows, _ in stack.chunks(4, indices=[8, 50, 2])])
    assert sorted(some.tolist()) == [2, 8, 50]


def test_a_name_without_a_number_is_the_first_image(project: Path) -> None:
    write_mrc(project / "single.mrc", np.full((4, 6), 7.0), pixel_size=1)
    stack = ImageStack(["single.mrc", " 3@Extract/1.mrcs", "1@single.mrc"], root=project)
    assert stack.read([0, 1, 2])[:, 0, 0].tolist() == [7, 102, 7]


def test_a_million_names_take_little_time_and_memory(project: Path) -> None:
    names = pl.select(
        (pl.int_range(1_000_000) % 20 + 1).cast(pl.String).str.zfill(6)
        + "@Extract/" + (pl.int_range(1_000_000) % 3).cast(pl.String) + ".mrcs"
    ).to_series()  # fmt: skip
    tracemalloc.start()
    stack = ImageStack(names, root=project)
    for _, images in stack.chunks(1000, indices=range(0, 1_000_000, 100)):
        assert len(images) == 1000
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Two int32 a row are kept; the sorting of rows needs a few int64.
    assert held < 10 * 1024**2
    assert peak < 60 * 1024**2
    assert stack.read([999_999])[0, 0, 0] == 100 * (999_999 % 3) + 999_999 % 20


@pytest.mark.parametrize(
    "name", ["@a.mrcs", "x@a.mrcs", "0@a.mrcs", "-1@a.mrcs", "1@", "", None, "1.5@a.mrcs"]
)
def test_names_that_are_none(project: Path, name: str | None) -> None:
    names = ["1@Extract/0.mrcs", "2@Extract/0.mrcs", name]
    with pytest.raises(TableError, match=r"run_data.star, row 3: .* is no image name"):
        ImageStack(names, root=project, table="run_data.star")


def test_a_stack_shorter_than_the_table_names_the_row(project: Path) -> None:
    names = ["000020@Extract/0.mrcs", "000021@Extract/1.mrcs"]
    with pytest.raises(
        TableError, match=r"run_data.star, row 2: asks for image 21 of .*1\.mrcs, which holds 20"
    ):
        ImageStack(names, root=project, table="run_data.star")
    with pytest.raises(TableError, match="row 1: asks for image"):
        ImageStack(["99999999999@Extract/0.mrcs"], root=project)


def test_files_that_do_not_belong_together(project: Path) -> None:
    write_mrc(project / "other.mrcs", np.zeros((2, 5, 6), np.float32), pixel_size=1)
    with pytest.raises(ShapeError, match=r"other\.mrcs: holds images of 5 x 6 px, .*0\.mrcs of 4 x 6 px"):
        ImageStack(["1@Extract/0.mrcs", "1@other.mrcs"], root=project)
    with pytest.raises(FileFormatError, match=r"none\.mrcs: there is no such file"):
        ImageStack(["1@none.mrcs"], root=project)
    with pytest.raises(TableError, match="names no images"):
        ImageStack([], root=project)


def test_a_file_cut_after_opening_is_noticed(project: Path) -> None:
    stack = ImageStack(["20@Extract/0.mrcs"], root=project)
    with (project / "Extract/0.mrcs").open("r+b") as file:
        file.truncate(1500)
    with pytest.raises(FileFormatError, match="is truncated: the header says 2944 bytes, the file has 1500"):
        stack.read([0])


def test_values_that_are_no_numbers(project: Path) -> None:
    images = np.zeros((3, 4, 6), np.float32)
    images[1, 2, 2] = np.nan
    images[2, 0, 0] = 1e6
    write_mrc(project / "a.mrcs", images, pixel_size=1)
    names = ["3@a.mrcs", "2@a.mrcs", "1@a.mrcs"]
    assert np.isnan(ImageStack(names, root=project).read([1])).sum() == 1
    with pytest.raises(FileFormatError, match=r"a\.mrcs: image 2 \(row 2 of the table\) is not finite"):
        ImageStack(names, root=project, check_finite=True).read([2, 1])
    with pytest.raises(FileFormatError, match="do not fit float16"):
        ImageStack(names, root=project, dtype=np.float16).read([0])


def test_what_cannot_be_asked(project: Path) -> None:
    stack = ImageStack(["1@Extract/0.mrcs"], root=project)
    for row in (1, -1):
        with pytest.raises(ShapeError, match=f"there are 1 images, row {row} "):
            stack.read([0, row])
    with pytest.raises(ParameterError, match="chunk of 0"):
        next(stack.chunks(0))
    with pytest.raises(ParameterError, match="held as int8"):
        ImageStack(["1@Extract/0.mrcs"], root=project, dtype=np.int8)


def test_one_image_of_a_file(tmp_path: Path) -> None:
    image = np.arange(24.0, dtype=np.float32).reshape(4, 6)
    write_mrc(tmp_path / "a.mrc", image, pixel_size=1)
    write_tiff_movie(tmp_path / "a.tif", image[None])
    for name in ("a.mrc", "a.tif"):
        assert np.array_equal(read_image(tmp_path / name), image)
    write_tiff_movie(tmp_path / "b.tif", np.zeros((2, 4, 6), np.uint8))
    with pytest.raises(FileFormatError, match="holds 2 images where one belongs"):
        read_image(tmp_path / "b.tif")


def test_a_micrograph_with_few_bad_pixels_is_mended_and_measured(recwarn: pytest.WarningsRecorder) -> None:
    sound = np.random.default_rng(0).normal(50, 4, (300, 400)).astype(np.float32)
    image = sound.copy()
    image[3, 4], image[5, 6], image[7:9, 10:20] = np.inf, -np.inf, np.nan
    found, median, deviation = checked_micrograph(image, "a.mrc")
    bad = ~np.isfinite(image)
    assert np.array_equal(found[~bad], sound[~bad])
    assert found[bad] == pytest.approx(np.full(bad.sum(), median), abs=0.1)
    assert (median, deviation) == (pytest.approx(50, abs=0.2), pytest.approx(4, rel=0.05))
    assert found.dtype == np.float32 and np.isnan(image[7, 10])
    assert checked_micrograph(sound, "a.mrc")[0] is sound
    assert (
        checked_micrograph(np.arange(4000, dtype=np.uint16).reshape(50, 80), "a.mrc")[0].dtype == np.float32
    )
    assert not recwarn.list


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.where(np.arange(9000).reshape(90, 100) < 90, np.nan, 1.0), "1 % of the pixels are not numbers"),
        (np.full((90, 100), np.inf), "100 % of the pixels are not numbers"),
        (np.full((90, 100), 7, np.uint8), "is blank: all pixels are alike"),
        (np.minimum(np.arange(9000.0).reshape(90, 100), 6000), "is saturated or blank"),
        (np.where(np.arange(9000).reshape(90, 100) % 7, 0.0, 1.0), "is saturated or blank"),
    ],
)
def test_what_is_no_micrograph(image: np.ndarray, message: str, recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(FileFormatError, match=f"a.mrc: {message}.*; leave it out"):
        checked_micrograph(image, "a.mrc")
    assert not recwarn.list


def test_relions_particles(shared_data: Path) -> None:
    folder = shared_data / "particles/cryodrgn-relion31-filament5"
    names = read_star(next(folder.glob("*.star")))["particles"]["rlnImageName"]
    names = names.str.replace(r"@.*", "@relion31.mrcs")
    assert ImageStack(names, root=folder, check_finite=True).read(range(len(names))).shape == (5, 256, 256)
