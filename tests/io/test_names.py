"""Names of files: unique ones for what is made of each."""

from __future__ import annotations

import pytest

from halfmap.errors import TableError
from halfmap.io.names import unique_stems


def test_what_two_micrographs_share_is_told_apart_by_folders_then_endings_then_rows():
    names = [
        "A/x.mrc",
        "B/x.mrc",
        "A/y.mrc",
        "A/z.mrc",
        "A/z.tif",
        "/B/../C/x.mrc",
        "k.1.mrc",
        "A_z.v/q",
        "A/q/v.a",
    ]
    stems = ["A_x", "B_x", "y", "A_z_mrc", "A_z_tif", "B_C_x", "k.1", "q", "v"]
    assert unique_stems(names) == stems
    order = [5, 2, 8, 0, 7, 1, 4, 6, 3]
    assert unique_stems([names[i] for i in order]) == [stems[i] for i in order]
    assert unique_stems(["a/b_c.mrc", "a_b/c.mrc", "d/c.mrc", "d/b_c.mrc"]) == [
        *("000001_a_b_c_mrc", "000002_a_b_c_mrc", "d_c", "d_b_c"),
    ]


def test_a_micrograph_listed_twice_is_named_with_its_row():
    with pytest.raises(TableError, match=r"m\.star, row 3: lists A/x\.mrc again"):
        unique_stems(["A/x.mrc", "B/x.mrc", "A/x.mrc"], table="m.star")
