from __future__ import annotations

import pytest

from halfmap.search import padding as padding_module
from halfmap.search.padding import affordable_padding, map_bytes


def test_paddings_that_fit(monkeypatch: pytest.MonkeyPatch):
    """By what a process takes for 512 px, beside 5 GB of images; with two workers there are three."""
    needs = [map_bytes(512, padding) for padding in (2.0, 1.5, 1.25)]
    for free, workers, padding in (
        (needs[0] + 6e9, 1, 2.0),
        (3 * needs[1] + 6e9, 2, 1.5),
        (needs[0] + 4e9, 1, 1.5),
        (needs[1] + 4e9, 1, 1.25),
        (1e9, 1, 1.25),
    ):
        monkeypatch.setattr(padding_module, "available_memory", lambda free=free: int(free))
        assert affordable_padding(512, 5e9, workers) == padding
