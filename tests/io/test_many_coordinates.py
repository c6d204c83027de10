"""Many files of coordinates at once: the same rows as one by one, whatever is wrong with some."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from halfmap.io.coordinates import X, Y, read_coordinates, read_many_coordinates, write_coordinates


def test_many_files_give_what_each_gives(tmp_path: Path):
    types = {X: pl.Float64, Y: pl.Float64, "hmPickProbability": pl.Float64}
    tables = [
        pl.DataFrame({X: [1.5, 2.0], Y: [3.0, 4.0], "hmPickProbability": [0.5, 1.0]}),
        pl.DataFrame({X: [7.0], Y: [8.0], "hmPickProbability": [0.25]}),
        pl.DataFrame(schema=types),
        pl.DataFrame({X: [5.0], Y: [6.0]}),
    ]
    paths = [tmp_path / f"{i}.star" for i in range(len(tables))]
    for path, table in zip(paths, tables, strict=True):
        write_coordinates(path, table)
    paths.append(tmp_path / "topaz.txt")
    paths[-1].write_text("image_name\tx_coord\ty_coord\tscore\na\t1\t2\t0.5\n")
    joined, errors = read_many_coordinates(paths)
    assert errors == {}
    assert len(joined) == 3  # by columns: two files together
    found = {
        number: part.rows.filter(part.file == number) for part in joined for number in set(part.file.tolist())
    }
    assert sorted(found) == [0, 1, 3, 4]
    for number, rows in found.items():
        assert rows.equals(read_coordinates(paths[number]))


def test_broken_files_are_named_and_hide_no_other(tmp_path: Path):
    good = pl.DataFrame({X: [1.0, 2.0], Y: [3.0, 4.0]})
    paths = [tmp_path / f"{i}.star" for i in range(4)]
    for path in paths[:3]:
        write_coordinates(path, good)
    paths[1].write_text(paths[1].read_text().rstrip().removesuffix("4.0") + "nan\n")
    paths[2].write_text(paths[2].read_text().rstrip() + " 9\n")
    joined, errors = read_many_coordinates(paths)
    assert [int(number) for part in joined for number in part.file] == [0, 0]
    assert joined[0].rows.equals(good)
    assert sorted(number for number, error in errors.items() if str(paths[number]) in str(error)) == [1, 2, 3]
