from __future__ import annotations

import pytest

from halfmap.engine import RunOptions
from halfmap.engine import memory as engine_memory
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
        monkeypatch.setattr(engine_memory, "available_memory", lambda free=free: int(free))
        assert affordable_padding(512, 5e9, RunOptions(workers=workers)) == padding


def test_workers_of_a_cluster_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch):
    """Ten workers with what one process takes, beside an eleventh of the images."""
    need = (map_bytes(512, 2.0) + 11e9 / 11) / 1e9
    monkeypatch.setattr(engine_memory, "available_memory", lambda: int(need * 1e9) + 1)
    for given, padding in ((need + 0.1, 2.0), (need - 0.1, 1.5)):
        options = RunOptions(cluster="slurm", workers=10, memory_per_worker=given)
        assert affordable_padding(512, 11e9, options) == padding
    assert affordable_padding(512, 11e9, RunOptions(workers=10)) == 1.25
