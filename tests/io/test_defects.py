"""Defects of the camera: rectangles and maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from halfmap.errors import FileFormatError, ShapeError, TableError
from halfmap.io.defects import read_defects
from halfmap.io.mrc import write_mrc
from halfmap.io.tiff import write_tiff_movie

SHAPE = (6, 9)


def test_rectangles_are_x_y_width_height_cut_at_the_edges(tmp_path: Path) -> None:
    (tmp_path / "defects.txt").write_text("# hot column\n2 0 1 6\n\n7 4 5 9\n-2, 1, 3, 1\n")
    expected = np.zeros(SHAPE, bool)
    expected[:, 2] = True
    expected[4:, 7:] = True
    expected[1, 0] = True
    assert np.array_equal(read_defects(tmp_path / "defects.txt", shape=SHAPE), expected)


@pytest.mark.parametrize("suffix", [".mrc", ".tif"])
def test_maps_are_true_where_not_zero_rows_in_mrc_order(tmp_path: Path, suffix: str) -> None:
    mask = np.zeros(SHAPE, np.uint8)
    mask[1, 7] = 1
    if suffix == ".mrc":
        write_mrc(tmp_path / "map.mrc", mask, pixel_size=1)
    else:
        write_tiff_movie(tmp_path / "map.tif", mask[None])
    defects = read_defects(tmp_path / f"map{suffix}", shape=SHAPE)
    assert defects.dtype == bool
    assert np.argwhere(defects).tolist() == [[1, 7]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 1 1 1\n1 1 1\n", "row 2: is not four whole numbers"),
        ("1 1 1 1.5\n", "row 1: is not four whole numbers"),
        ("0 0 2 2\n\n9 0 1 1\n", "row 3: the rectangle 9 0 1 1 covers nothing of 6 x 9"),
        ("0 0 0 2\n", "row 1: the rectangle"),
    ],
)
def test_lines_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "defects.txt").write_text(text)
    with pytest.raises(TableError, match=message):
        read_defects(tmp_path / "defects.txt", shape=SHAPE)


def test_files_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "defects.txt").write_text("CameraSizeX 5760\nBadColumns 5\n")
    with pytest.raises(FileFormatError, match="SerialEM"):
        read_defects(tmp_path / "defects.txt", shape=SHAPE)
    write_mrc(tmp_path / "map.mrc", np.zeros((5, 5), np.float32), pixel_size=1)
    with pytest.raises(ShapeError, match=r"5 x 5 px .*movie 6 x 9 px"):
        read_defects(tmp_path / "map.mrc", shape=SHAPE)
    write_mrc(tmp_path / "map.mrc", np.full(SHAPE, np.nan, np.float32), pixel_size=1)
    with pytest.raises(FileFormatError, match="NaN"):
        read_defects(tmp_path / "map.mrc", shape=SHAPE)
    with pytest.raises(FileFormatError, match="no such file"):
        read_defects(tmp_path / "none.txt", shape=SHAPE)
