"""Coordinates of particles in the words of several programs."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from halfmap.errors import FileFormatError, ParameterError, TableError
from halfmap.io.coordinates import FOM, MICROGRAPH, X, Y, read_coordinates, write_coordinates

TABLE = pl.DataFrame({MICROGRAPH: ["a", "b"], X: [10.5, 20.0], Y: [30.25, 0.0], FOM: [0.5, -1.25]})


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_star_keeps_its_other_columns(tmp_path: Path) -> None:
    labels = "_rlnCoordinateX\n_rlnCoordinateY\n_rlnAnglePsi\n_rlnClassNumber\n"
    text = f"data_\n\nloop_\n{labels}1 2.5 90 3\n4 5 0 1\n"
    table = read_coordinates(write(tmp_path, "a.star", text), scale=2)
    assert table.select(X, Y).rows() == [(2.0, 5.0), (8.0, 10.0)]
    assert table["rlnClassNumber"].to_list() == [3, 1]
    assert table["rlnAnglePsi"].to_list() == [90, 0]


def test_a_box_is_its_centre(tmp_path: Path) -> None:
    path = write(tmp_path, "a.box", "10\t20\t64\t64\n-5 7.5 10 20 -3\n\n")
    assert read_coordinates(path).rows() == [(42.0, 52.0), (0.0, 17.5)]
    assert read_coordinates(path).columns == [X, Y]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "image_name\tx_coord\ty_coord\tscore\na\t10.5\t30.25\t0.5\nb\t20\t0\t-1.25\n"),
        ("a.csv", "micrograph,x_px,y_px,score\na,10.5,30.25,0.5\nb,20,0,-1.25\n"),
        ("a.csv", "\ufeffScore, Y, X, Filename\r\n0.5,30.25,10.5,a\r\n-1.25,0,20,b\r\n"),
        ("a.csv", "a,10.5,30.25,0.5\nb,20,0,-1.25\n"),
        ("a.txt", "# picks\na 10.5 30.25 0.5\nb 20 0 -1.25\n"),
    ],
)
def test_tables_of_pickers(tmp_path: Path, name: str, text: str) -> None:
    assert read_coordinates(write(tmp_path, name, text)).select(TABLE.columns).equals(TABLE)


def test_two_columns_without_a_header(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "1.5,2\n3,4e1\n")
    assert read_coordinates(path, scale=8).rows() == [(12.0, 16.0), (24.0, 320.0)]


@pytest.mark.parametrize("text", ["", "\n", "x,y\n"])
def test_a_micrograph_without_particles(tmp_path: Path, text: str) -> None:
    table = read_coordinates(write(tmp_path, "a.csv", text))
    assert table.height == 0 and table.columns == [X, Y]


@pytest.mark.parametrize("name", ["a.star", "a.txt", "a.csv"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    write_coordinates(tmp_path / name, TABLE, scale=0.25)
    assert read_coordinates(tmp_path / name, scale=4).select(TABLE.columns).equals(TABLE)


def test_a_box_file_is_corners(tmp_path: Path) -> None:
    write_coordinates(tmp_path / "a.box", TABLE, box_size=64)
    assert (tmp_path / "a.box").read_text().splitlines()[0] == "-21.50\t-1.75\t64\t64"
    assert read_coordinates(tmp_path / "a.box").equals(TABLE.select(X, Y))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.star", "data_\n\nloop_\n_rlnDefocusU\n1\n", "has no columns rlnCoordinateX"),
        ("a.box", "1 2 3 4\n1 2 3\n", "row 2: is not x, y and two sizes"),
        ("a.box", "1 2 x 4\n", "row 1: is not x, y"),
        ("a.csv", "micrograph,defocus\na,1\n", "has no columns x and y; its columns are micrograph, defocus"),
        ("a.csv", "x,y\n1,2\n3,u\n", "row 2: y is 'u', not a number; mend or drop"),
        ("a.csv", "x,y\n1,2\nnan,4\n", "row 2: x is 'nan', not a number; mend or drop"),
        (
            "a.star",
            "data_\n\nloop_\n_rlnCoordinateX\n_rlnCoordinateY\n1 u\n",
            "row 1: _rlnCoordinateY is 'u', not a number; mend or drop",
        ),
        (
            "a.star",
            "data_\n\nloop_\n_rlnCoordinateX\n_rlnCoordinateY\n1 nan\n",
            "row 1: _rlnCoordinateY is nan, not a number; mend or drop",
        ),
        ("a.csv", "x,y\n1,2\n3,4,5\n", "row 2: has 3 columns, the others 2"),
        ("a.csv", "1\n2\n", "has 1 columns without a header"),
        ("a.csv", "1,2,3,4,5\n", "has 5 columns without a header"),
    ],
)
def test_tables_that_cannot_be(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(TableError, match=message) as caught:
        read_coordinates(write(tmp_path, name, text))
    assert name in str(caught.value)


def test_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"no coordinate file by its name; they end in \.star, \.box"):
        read_coordinates(tmp_path / "a.json")
    with pytest.raises(FileFormatError, match="no such file"):
        read_coordinates(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(FileFormatError, match="is not text"):
        read_coordinates(tmp_path / "b.csv")
    with pytest.raises(ParameterError, match="scale"):
        read_coordinates(tmp_path / "a.csv", scale=0)


@pytest.mark.parametrize(
    ("name", "table", "options", "error"),
    [
        ("a.star", TABLE.drop(X), {}, TableError),
        ("a.txt", TABLE.drop(MICROGRAPH), {}, TableError),
        ("a.box", TABLE, {}, ParameterError),
        ("a.csv", TABLE, {"scale": -1}, ParameterError),
        ("a.json", TABLE, {}, FileFormatError),
    ],
)
def test_what_cannot_be_written(
    tmp_path: Path, name: str, table: pl.DataFrame, options: dict, error: type
) -> None:
    with pytest.raises(error):
        write_coordinates(tmp_path / name, table, **options)
    assert list(tmp_path.iterdir()) == []


def test_real_picks(shared_data: Path) -> None:
    topaz = read_coordinates(shared_data / "metadata/topaz-empiar10025-star/particles.txt")
    assert topaz.height == 1500
    assert topaz.row(0) == ("14sep05c_c_00003gr_00014sq_00004hl_00004es_c", 6924.0, 2481.0)
    star = read_coordinates(shared_data / "metadata/topaz-empiar10025-star/particles.star")
    assert star.height == 1500 and MICROGRAPH in star.columns
    picks = read_coordinates(shared_data / "micrographs/contaminated_ucsf/Ucsf_stack_1142_DW_autopick.star")
    assert picks.select(X, Y, FOM).row(0) == (839.125024, 19.979167, 0.624705)
    tables = list(shared_data.glob("micrographs/apoferritin*/*.csv"))
    assert len(tables) == 17
    for path in tables:
        if path.name == "ctffind4.csv":
            continue
        table = read_coordinates(path)
        # All picks lie in the micrographs of 1240 x 1200 px.
        assert table.height > 100
        assert table.select(pl.col(X).is_between(0, 1240).all() & pl.col(Y).is_between(0, 1200).all()).item()
