"""STAR files: the grammar, the types, the errors, and that nothing is lost."""

from __future__ import annotations

import math
import random
import tempfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfmap.errors import FileFormatError, HalfmapError, TableError
from halfmap.io import star_rows
from halfmap.io.star import read_star, write_star

PARTICLES = """
# version 50001

data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnVoltage #3
           1 opticsGroup1   300.000000

# version 50001

data_particles

loop_
_rlnImageName #1
_rlnCoordinateX #2
_rlnOpticsGroup #3
000001@a.mrcs  1.5  1
000002@a.mrcs  2.5  1
"""


def read_text(folder: Path, text: str | bytes) -> dict:
    path = folder / "table.star"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_star(path)


def loop(labels: str, *rows: str, name: str = "x") -> str:
    head = "".join(f"_{label} #{i}\n" for i, label in enumerate(labels.split(), start=1))
    return f"data_{name}\n\nloop_\n{head}" + "\n".join(rows) + "\n"


def assert_blocks_equal(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, block in expected.items():
        if isinstance(block, pl.DataFrame):
            assert found[name].schema == block.schema
            assert found[name].equals(block, null_equal=True)
        else:
            assert found[name] == block


class TestGrammar:
    def test_optics_and_particles(self, tmp_path):
        blocks = read_text(tmp_path, PARTICLES)
        assert list(blocks) == ["optics", "particles"]
        assert blocks["optics"].to_dicts() == [
            {"rlnOpticsGroup": 1, "rlnOpticsGroupName": "opticsGroup1", "rlnVoltage": 300.0}
        ]
        assert blocks["particles"]["rlnCoordinateX"].to_list() == [1.5, 2.5]

    @pytest.mark.parametrize(
        "change",
        [
            lambda text: text.replace("\n", "\r\n"),
            lambda text: text.replace("\n", "\r"),
            lambda text: text.replace("  ", "\t"),
            lambda text: text.rstrip("\n"),
            lambda text: text.replace("\n0", "\n\n  \n0"),
            lambda text: text.replace("\n0", "\n# a comment\n   0"),
            lambda text: text.replace(" #1", "").replace(" #2", " # [a note] #2"),
            lambda text: text.replace("  1\n", "  1   # why\n"),
            lambda text: text.replace("data_", "  data_").replace("loop_", "\tloop_ "),
            lambda text: text.replace("000001@a.mrcs", "'000001@a.mrcs'").replace("1.5", '"1.5"'),
            lambda text: "\ufeff" + text,
        ],
    )
    def test_layouts_of_one_table(self, tmp_path, change):
        expected = read_text(tmp_path, PARTICLES)
        changed = change(PARTICLES)
        assert changed != PARTICLES
        assert_blocks_equal(read_text(tmp_path, changed), expected)

    def test_key_value_block(self, tmp_path):
        keys = [
            "_rlnJobTypeLabel   relion.import  # type",
            "_rlnJobIsContinue 0",
            "_n 3",
            '_s "a"',
            '_e ""',
        ]
        assert read_text(tmp_path, "\n".join(["data_job", "", *keys]))["job"] == {
            "rlnJobTypeLabel": "relion.import",
            "rlnJobIsContinue": False,
            "n": 3,
            "s": "a",
            "e": "",
        }

    def test_quotes(self, tmp_path):
        rows = ['"a b" \'c "d" e\'', "it's 5'", "'don't stop' \"\"", '"say \a" this" x#y']
        assert read_text(tmp_path, loop("p q", *rows))["x"].rows() == [
            ("a b", 'c "d" e'),
            ("it's", "5'"),
            ("don't stop", ""),
            ('say " this', "x#y"),
        ]

    def test_missing_second_value_of_two_is_empty(self, tmp_path):
        table = read_text(tmp_path, loop("rlnJobOptionVariable rlnJobOptionValue", "fn_mtf", "a b"))["x"]
        assert table.rows() == [("fn_mtf", ""), ("a", "b")]

    def test_row_that_begins_with_data(self, tmp_path):
        table = read_text(tmp_path, loop("a b", "data_1.mrc 1", "in/data_2.mrc 2"))["x"]
        assert table.rows() == [("data_1.mrc", 1), ("in/data_2.mrc", 2)]

    def test_one_column_of_empty_strings(self, tmp_path):
        assert read_text(tmp_path, loop("a", '""', "b", '""'))["x"].rows() == [("",), ("b",), ("",)]

    def test_empty_blocks(self, tmp_path):
        blocks = read_text(tmp_path, "data_\n\ndata_a\nloop_\n\ndata_b\nloop_\n_rlnVoltage #1\n_other #2\n")
        assert blocks[""] == {}
        assert blocks["a"].shape == (0, 0)
        assert blocks["b"].schema == {"rlnVoltage": pl.Float64, "other": pl.String}

    def test_long_lines(self, tmp_path):
        name = "x" * 200_000
        labels = [f"c{i}" for i in range(3_000)]
        table = read_text(tmp_path, loop(" ".join(labels), " ".join(["1"] * 2_999 + [name])))["x"]
        assert table.shape == (1, 3_000)
        assert table["c2999"].item() == name


class TestTypes:
    def test_names_in_text_columns_stay(self, tmp_path):
        names = ["01", "1e5", "nan", "+3", "7", "1.50", "inf"]
        table = read_text(tmp_path, loop("rlnMicrographName rlnOpticsGroup", *(f"{n} 1" for n in names)))["x"]
        assert table["rlnMicrographName"].to_list() == names

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ("1 -2 0", [1, -2, 0]),
            ("1.50 2 -3.0e5 nan -inf", [1.5, 2.0, -3.0e5, math.nan, -math.inf]),
            ("9223372036854775807", [2**63 - 1]),
            ("9223372036854775808", None),
            ("15494748553812943456", None),
            ("01 2", None),
            ("+1 2", None),
            ("-0", None),
            ("1e5 2e5", None),
            ("nan nan", None),
            ("1. 2.5", None),
            (".5 2.5", None),
            ("1.5 x", None),
            ('1.5 ""', None),
            ("1.0e999", None),
            ("0.123456789012345678901", None),
            ("9007199254740993 0.5", None),
            ("0x10 1_0", None),
        ],
    )
    def test_unknown_columns_are_numbers_only_where_nothing_is_lost(self, tmp_path, values, expected):
        column = read_text(tmp_path, loop("mine rlnOpticsGroup", *(f"{v} 1" for v in values.split())))["x"][
            "mine"
        ]
        if expected is None:
            assert column.to_list() == [v.strip('"') for v in values.split()]
        else:
            assert column.equals(pl.Series("mine", expected), null_equal=True)
            assert column.dtype == (pl.Int64 if isinstance(expected[0], int) else pl.Float64)

    def test_counts_written_as_floats(self, tmp_path):
        table = read_text(tmp_path, loop("rlnGroupNumber rlnVoltage", "3.000000 300", "4 200"))["x"]
        assert table["rlnGroupNumber"].to_list() == [3, 4]
        assert table["rlnVoltage"].to_list() == [300.0, 200.0]

    def test_nan_and_infinity(self, tmp_path):
        values = ["nan", "NaN", "-nan", "inf", "-inf"]
        column = read_text(tmp_path, loop("rlnDefocusU a", *(f"{v} 1" for v in values)))["x"]["rlnDefocusU"]
        assert [math.isnan(v) for v in column[:3]] == [True] * 3
        assert column[3:].to_list() == [math.inf, -math.inf]

    def test_flags(self, tmp_path):
        table = read_text(tmp_path, loop("rlnCtfDataArePhaseFlipped a", "0 1", "1 1"))["x"]
        assert table["rlnCtfDataArePhaseFlipped"].to_list() == [False, True]


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "kind", "row", "words"),
        [
            (loop("a b c", "1 2 3", "1 2"), TableError, 2, "2 values for the 3 columns"),
            (loop("a b c", "1 2 3", "", "# no row", "1 2 3 4"), TableError, 2, "4 values"),
            (loop("a b", "1 2", '"a b'), TableError, 2, "quote"),
            (loop("a a", "1 2"), TableError, None, "comes twice"),
            (loop("a", "1") + loop("b", "1"), TableError, None, "comes twice"),
            ("data_x\n_a 1\n_a 2\n", TableError, None, "comes twice"),
            ("data_x\n_a\n", TableError, 1, "0 values"),
            ("data_x\n_b 1\n_a 1 2\n", TableError, 2, "2 values"),
            ("data_x\n_a 1\nloop_\n_b\n2\n", FileFormatError, None, "both keys and a loop"),
            ("data_x\nloop_\n1 2\n", TableError, None, "rows without labels"),
            ("data_x\nhello\n", FileFormatError, None, "line 2"),
            ("hello\ndata_x\n", FileFormatError, None, "before the first"),
            ("", FileFormatError, None, "no data_ block"),
            ("<html>", FileFormatError, None, "no data_ block"),
            (loop("rlnVoltage b", "300 1", "30O 1"), TableError, 2, "'30O', not a number"),
            (loop("rlnVoltage b", "300 1", '"" 1'), TableError, 2, "is empty"),
            (loop("rlnVoltage", "300", "x"), TableError, 2, "not a number"),
            (loop("rlnOpticsGroup b", "1 1", "1 1", "1.5 1"), TableError, 3, "not a whole number"),
            (loop("rlnOpticsGroup b", "nan 1"), TableError, 1, "not a whole number"),
            (loop("rlnAnglePsiFlip b", "2 1"), TableError, 1, "neither 0 nor 1"),
            ("data_x\n_rlnVoltage high\n", TableError, 1, "not a number"),
            ("data_x\nloop_\n_a text\n1\n", TableError, None, "text after label"),
            ("data_x\nloop_\n_ #1\n1\n", TableError, None, "label"),
            (loop("a b", "1 \x00"), FileFormatError, None, "control"),
            ("data_x\n_a b\x1fc\n", TableError, 1, "control"),
        ],
    )
    def test_message_names_file_and_row(self, tmp_path, text, kind, row, words):
        with pytest.raises(kind, match=words) as caught:
            read_text(tmp_path, text)
        assert caught.value.row == row
        assert caught.value.path == tmp_path / "table.star"

    def test_bytes_that_are_not_text(self, tmp_path):
        with pytest.raises(FileFormatError, match="line 2 is not UTF-8"):
            read_text(tmp_path, b"data_x\n_a \xff\n")

    def test_missing_file_and_folder(self, tmp_path):
        with pytest.raises(FileFormatError, match="No such file"):
            read_star(tmp_path / "none.star")
        with pytest.raises(FileFormatError, match="directory"):
            read_star(tmp_path)

    @pytest.mark.parametrize(
        ("blocks", "row", "words"),
        [
            ({"x": pl.DataFrame({"a": [1, None]})}, 2, "no value"),
            ({"x": pl.DataFrame({"a": ["b", "c\nd"]})}, 2, "line end"),
            ({"x": pl.DataFrame({"a": [[1]]})}, None, "List"),
            ({"x": pl.DataFrame({"a b": [1]})}, None, "label"),
            ({"x": pl.DataFrame({"_a": [1]})}, None, "label"),
            ({"a b": {}}, None, "block name"),
            ({"x": {"a": 2**200}}, None, "cannot hold"),
            ({"x": {"a": object()}}, None, "cannot hold"),
        ],
    )
    def test_what_cannot_be_written(self, tmp_path, blocks, row, words):
        path = tmp_path / "out.star"
        with pytest.raises(TableError, match=words) as caught:
            write_star(path, blocks)
        assert caught.value.row == row
        assert list(tmp_path.iterdir()) == []


class TestRoundTrip:
    def test_real_files(self, shared_data, tmp_path):
        paths = [*shared_data.glob("metadata/*/*.star"), *shared_data.glob("particles/*/*.star")]
        assert len(paths) >= 10
        for path in paths:
            blocks = read_star(path)
            write_star(tmp_path / "copy.star", blocks)
            assert_blocks_equal(read_star(tmp_path / "copy.star"), blocks)

    def test_real_file_against_plain_split(self, shared_data):
        """Every value of a table equals what splitting its lines gives."""
        path = shared_data / "metadata/cryodrgn-cs-star/relion31.6opticsgroups.star"
        lines = [line.split() for line in path.read_text().split("data_particles")[1].splitlines()]
        labels = [line[0][1:] for line in lines if line and line[0].startswith("_")]
        rows = [line for line in lines if len(line) == len(labels)]
        table = read_star(path)["particles"]
        assert table.columns == labels
        assert table.height == len(rows) == 139
        for index, label in enumerate(labels):
            texts = [row[index] for row in rows]
            column = table[label]
            if column.dtype == pl.String:
                assert column.to_list() == texts
            else:
                assert column.to_list() == [float(text) for text in texts]

    def test_everything_awkward(self, tmp_path):
        strings = [
            "",
            " ",
            "a b",
            "it's",
            '"',
            "'",
            'a" b" "',
            "#a",
            "_a",
            "data_x",
            "loop_",
            "é 粒",
            ";",
            "nan",
        ]
        floats = [0.1 + 0.2, 1e16, -1e22, 5e-324, 1.7976931348623157e308, -0.0, 1e-7, math.nan, math.inf]
        n = len(strings)
        blocks = {
            "": pl.DataFrame({"s": strings, "f": (floats * 2)[:n], "i": range(n), "last": strings[::-1]}),
            "keys": {"a": 'b "c" d', "f": 1e300, "i": -5, "empty": "", "rlnVoltage": 300.0},
            "none": {},
            "flags": pl.DataFrame({"rlnAnglePsiFlip": [True, False]}),
            "one": pl.DataFrame({"s": ["", "", "x"]}),
        }
        write_star(tmp_path / "a.star", blocks, comment="first\nsecond")
        assert_blocks_equal(read_star(tmp_path / "a.star"), blocks)
        assert (tmp_path / "a.star").read_text().splitlines()[1:3] == ["# first", "# second"]

    def test_signed_zero_survives(self, tmp_path):
        write_star(tmp_path / "a.star", {"x": pl.DataFrame({"rlnVoltage": [-0.0]})})
        assert math.copysign(1, read_star(tmp_path / "a.star")["x"]["rlnVoltage"].item()) == -1

    def test_single_precision_keeps_its_short_form(self, tmp_path):
        write_star(tmp_path / "a.star", {"x": pl.DataFrame({"f": pl.Series([1.345], dtype=pl.Float32)})})
        assert read_star(tmp_path / "a.star")["x"]["f"].item() == 1.345

    def test_missing_values(self, tmp_path):
        write_star(tmp_path / "a.star", {"x": pl.DataFrame({"rlnVoltage": [None, 1.0], "s": [None, "a"]})})
        table = read_star(tmp_path / "a.star")["x"]
        assert math.isnan(table["rlnVoltage"][0])
        assert table["s"].to_list() == ["", "a"]


class TestCompiledRows:
    """The compiled loop and the plain one agree, and errors keep their rows across chunks."""

    LINES = (
        "a 1 2.5",
        "  'b c'\t1 \"\"",
        "",
        "# comment",
        'x "say \a" it" 3 # why',
        "it's 5 6 \t ",
        "é 粒 z",
        "'' '' ''",
    )

    def test_agree_on_good_rows(self):
        generator = random.Random(1)
        for n_columns in (2, 3):
            lines = [generator.choice(self.LINES) for _ in range(500)]
            if n_columns == 2:
                lines = [generator.choice(("a", "a b", "'c d' e", "", "# f")) for _ in range(500)]
            for end in ("", "\n", " \n"):
                body = ("\n".join(lines) + end).encode()
                plain = star_rows._split_python(body, n_columns)
                assert plain[2] == 0
                assert star_rows._split_compiled(body, 0, len(body), n_columns)[0] == plain

    @given(st.text(alphabet="ab\"'# \t\n\a\x00", max_size=30))
    @settings(max_examples=300, deadline=None)
    def test_agree_on_anything(self, text):
        body = text.encode()
        plain = star_rows._split_python(body, 3)
        compiled, _ = star_rows._split_compiled(body, 0, len(body), 3)
        if b"\0" in body:
            assert plain[2] != 0
            assert compiled[2] != 0
        else:
            assert compiled == plain

    def test_chunks(self, tmp_path, monkeypatch):
        rows = [f"{i:06d}@a.mrcs {i}.25 {i}" for i in range(1, 3_001)]
        text = loop("rlnImageName rlnCoordinateX mine", *rows)
        whole = read_text(tmp_path, text)["x"]
        monkeypatch.setattr(star_rows, "CHUNK_BYTES", 1_000)
        assert read_text(tmp_path, text)["x"].equals(whole)
        assert whole["mine"].to_list() == list(range(1, 3_001))
        with pytest.raises(TableError) as caught:
            read_text(tmp_path, text.replace("2500.25", "25OO.25"))
        assert caught.value.row == 2_500
        with pytest.raises(TableError) as caught:
            read_text(tmp_path, text.replace("2500.25", "2500 25"))
        assert caught.value.row == 2_500
        monkeypatch.setattr(star_rows, "CHUNK_BYTES", 5)
        assert read_text(tmp_path, text)["x"].equals(whole)

    @pytest.mark.parametrize("size", [1, 7, 20, 60, 150, 400])
    def test_blocks_and_chunks(self, tmp_path, monkeypatch, size):
        """Wherever a chunk ends: before, within or behind the header of the next block."""
        blocks = [
            loop("a b c", *(f"data_{i} {i} 'x y'" for i in range(9)), name="three"),
            "  data_keys  # a comment\n_k data_v\n",
            loop("a b", *(f"x{i} {i}" for i in range(9)), "data_ 3", name="two"),
            loop("a", *(f"x{i}" for i in range(9)), name="one"),
            loop("a b c", name="none"),
            loop("a b c d", *(f"a/data_ data_{i} {i} x" for i in range(3)), "1 2 3 4", name=""),
        ]
        text = "\n".join(blocks)
        whole = read_text(tmp_path, text)
        assert [len(block) for block in whole.values()] == [9, 1, 10, 9, 0, 4]
        monkeypatch.setattr(star_rows, "CHUNK_BYTES", size)
        assert_blocks_equal(read_text(tmp_path, text), whole)


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8)
LABEL = st.sampled_from(["a", "mine", "rlnUnheardOf", "hmOther", "Z-1"])


@st.composite
def tables(draw: st.DrawFn) -> pl.DataFrame:
    labels = draw(st.lists(LABEL, unique=True, min_size=1, max_size=4))
    n_rows = draw(st.integers(1, 5))
    columns = {}
    for label in labels:
        kind = draw(st.sampled_from(["text", "float", "int"]))
        values = {"text": TEXT, "float": st.floats(allow_nan=False), "int": st.integers(-(2**63), 2**63 - 1)}
        columns[label] = draw(st.lists(values[kind], min_size=n_rows, max_size=n_rows))
    columns["rlnMicrographName"] = draw(st.lists(TEXT, min_size=n_rows, max_size=n_rows))
    columns["rlnDefocusU"] = draw(st.lists(st.floats(), min_size=n_rows, max_size=n_rows))
    return pl.DataFrame(columns, schema_overrides={"rlnDefocusU": pl.Float64})


def same_values(found: pl.Series, expected: pl.Series) -> bool:
    """Equal; a column of text that looks like numbers may have become numbers of the same text."""
    if found.dtype == expected.dtype:
        return found.equals(expected, null_equal=True)
    if expected.dtype == pl.String:
        return all(float(a) == b or math.isnan(b) for a, b in zip(expected, found, strict=True))
    # Infinities alone are no proof of numbers.
    return found.to_list() == [str(value) for value in expected]


@pytest.fixture(scope="module")
def path():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "fuzz.star"


class TestFuzz:
    """Whatever the bytes: a clean parse or one of our errors, nothing else."""

    @given(tables(), st.dictionaries(LABEL, st.one_of(TEXT, st.integers(-9, 9), st.floats(allow_nan=False))))
    @settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_random_tables_come_back(self, path, table, pairs):
        write_star(path, {"table": table, "pairs": pairs})
        blocks = read_star(path)
        found = blocks["table"]
        assert found.columns == table.columns
        for label in table.columns:
            assert same_values(found[label], table[label]), label
        for label, value in pairs.items():
            assert same_values(pl.Series([blocks["pairs"][label]]), pl.Series([value])), label

    @given(st.binary(max_size=200))
    @settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_random_bytes(self, path, data):
        for content in (data, b"data_x\nloop_\n_a\n_rlnVoltage\n" + data, b"data_x\n_a " + data):
            path.write_bytes(content)
            try:
                blocks = read_star(path)
            except HalfmapError:
                continue
            assert all(isinstance(name, str) for name in blocks)

    @given(
        st.lists(
            st.tuples(
                st.integers(0, len(PARTICLES)),
                st.integers(0, 12),
                st.sampled_from(
                    ["", "\n", " ", "\t", "'", '"', "#", "_", "data_", "loop_", "\x1f", "é", "nan", "9" * 30]
                ),
            ),
            max_size=6,
        )
    )
    @settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_mutated_file(self, path, edits):
        text = PARTICLES
        for position, length, insert in edits:
            text = text[:position] + insert + text[position + length :]
        path.write_bytes(text.encode())
        try:
            blocks = read_star(path)
            write_star(path, blocks)
        except HalfmapError:
            return
        assert_blocks_equal(read_star(path), blocks)
