"""By what a row of a table is known again, when the table has changed."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from halfmap.data.optics import GROUP
from halfmap.data.sets import TableSet

_OF_ALL = {"hmIceThicknessRelative"}
"""Columns that tell how a row stands among the others, and so change with them."""


def row_versions(table: TableSet, label: str) -> dict[str, str]:
    """Short sums of what a table says of each of its rows, with their optics groups.

    A step that is resumed does those items again whose sum has changed: their files are others, or what is
    known of them is.

    Parameters
    ----------
    table : TableSet
        Movies or micrographs.
    label : str
        Column of their names.

    Returns
    -------
    dict
        The sums by name. They do not depend on the other rows, nor on columns in which a row says nothing.
    """
    groups = {row[GROUP]: _text(row) for row in table.optics.to_dicts()}
    found = {}
    for row in table.rows.to_dicts():
        text = f"{_text(row)} {groups[row[GROUP]]}"
        found[row[label]] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return found


def _text(row: dict[str, Any]) -> str:
    return " ".join(
        f"{label}={_value(row[label])}"
        for label in sorted(row)
        if label not in _OF_ALL and row[label] not in (None, "") and row[label] == row[label]
    )


def _value(value: Any) -> str:
    # A column of whole numbers becomes one of others with a later row.
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.9g}" if is_number else str(value)
