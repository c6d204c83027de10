"""Every column states its unit and meaning; vectors in one column come and go without loss."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmap.data.columns import COLUMN_UNITS, COLUMNS, OPTICS_COLUMNS, format_vector, parse_vector
from halfmap.errors import TableError


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_column_states_unit_and_meaning(column):
    assert column.unit in COLUMN_UNITS
    assert len(column.meaning.split()) >= 2
    assert column.dtype in (str, int, float, bool)
    assert column.name.startswith(("rln", "hm"))
    if column.dtype is not float:
        assert column.vector or column.unit in ("none", "px")
    if column.vector:
        assert column.dtype is str


def test_labels_of_the_pipeline_are_known():
    labels = {
        "rlnMicrographMovieName": str,
        "rlnImageName": str,
        "rlnCoordinateX": float,
        "rlnOpticsGroup": int,
        "rlnRandomSubset": int,
        "rlnCtfDataAreCtfPremultiplied": bool,
        "rlnOddZernike": str,
        "rlnOriginXAngst": float,
        "rlnMagMat00": float,
        "rlnGoldStandardFsc": float,
        "rlnPipeLineNodeTypeLabel": str,
        "rlnJobOptionValue": str,
    }
    assert {label: COLUMNS[label].dtype for label in labels} == labels
    assert {"rlnVoltage", "rlnImagePixelSize", "rlnBeamTiltX"} <= set(OPTICS_COLUMNS)
    assert not {"rlnDefocusU", "rlnAngleRot"} & set(OPTICS_COLUMNS)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False)))
def test_vectors_come_back(values):
    assert parse_vector(format_vector(values)) == values


@pytest.mark.parametrize("text", ["", "1,2", "[1,2", "[a]", "[nan]", "[1;2]"])
def test_text_that_is_no_vector(text):
    with pytest.raises(TableError, match=r"_rlnOddZernike is .* not a vector") as caught:
        parse_vector(text, label="_rlnOddZernike", row=3)
    assert caught.value.row == 3
