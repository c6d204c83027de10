"""Arrivals: which files of a folder are whole, waited for, and given up."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from halfmap.errors import ParameterError
from halfmap.io.mrc import write_mrc
from halfmap.workflow import arrivals as module
from halfmap.workflow.arrivals import FOLDER, Arrivals


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def movie(path: Path, frames: int = 3) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mrc(path, np.ones((frames, 8, 8), np.float32), pixel_size=1.0)
    return path.read_bytes()


def watch(tmp_path: Path, **values) -> Arrivals:
    return Arrivals(tmp_path / "in", tmp_path / "project", settle_s=10, patience_s=100, **values)


def linked(tmp_path: Path) -> list[str]:
    place = tmp_path / "project" / FOLDER
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_symlink())


def test_a_movie_is_taken_when_it_has_not_changed_for_a_while(tmp_path: Path, clock: list[float]):
    movie(tmp_path / "in/a.mrc")
    seen = watch(tmp_path)
    assert (seen.take(), seen.waiting) == (0, 1)
    clock[0] += 9
    assert seen.take() == 0
    clock[0] += 1
    assert (seen.take(), seen.waiting, seen.taken) == (1, 0, 1)
    assert (tmp_path / "project" / FOLDER / "a.mrc").read_bytes() == (tmp_path / "in/a.mrc").read_bytes()
    clock[0] += 100
    assert seen.take() == 0


def test_a_half_written_movie_waits_until_it_is_whole(tmp_path: Path, clock: list[float]):
    path = tmp_path / "in/new/below/a.mrc"
    whole = movie(path)
    path.write_bytes(whole[:-50])
    seen = watch(tmp_path)
    for _ in range(5):
        assert (seen.take(), seen.taken) == (0, 0)
        clock[0] += 12
    path.write_bytes(whole)
    assert seen.take() == 0  # it has only just changed
    clock[0] += 12
    assert seen.take() == 1
    assert linked(tmp_path) == ["new/below/a.mrc"]


def test_a_movie_that_stays_broken_is_given_to_the_import_once_and_again_when_it_changes(
    tmp_path: Path, clock: list[float]
):
    path = tmp_path / "in/a.mrc"
    whole = movie(path)
    path.write_bytes(whole[:-50])
    seen = watch(tmp_path)
    seen.take()
    clock[0] += 99
    assert (seen.take(), seen.waiting) == (0, 1)
    clock[0] += 1
    assert (seen.take(), seen.waiting) == (1, 0)
    clock[0] += 1000
    assert seen.take() == 0
    path.write_bytes(whole)
    seen.take()
    clock[0] += 10
    assert seen.take() == 1


def test_what_is_no_movie_is_passed_over(tmp_path: Path, clock: list[float]):
    movie(tmp_path / "in/sum.mrc", frames=1)
    gain = tmp_path / "in/gain.mrc"
    movie(gain)
    movie(tmp_path / "in/.part.mrc")
    (tmp_path / "in/notes.txt").write_text("x")
    movie(tmp_path / "in/a.mrc")
    seen = watch(tmp_path, left_out=(gain,))
    seen.take()
    clock[0] += 1000
    assert (seen.take(), seen.waiting) == (1, 0)
    assert linked(tmp_path) == ["a.mrc"]


def test_the_project_may_lie_in_the_folder_and_a_pattern_names_movies(tmp_path: Path, clock: list[float]):
    for name in ("in/s1/a_Fractions.mrc", "in/s1/a.mrc", "in/project/Motion/b_Fractions.mrc"):
        movie(tmp_path / name)
    seen = Arrivals(tmp_path / "in", tmp_path / "in/project", "*_Fractions.mrc", settle_s=0)
    assert seen.take() == 1
    assert (tmp_path / "in/project" / FOLDER / "s1/a_Fractions.mrc").exists()


def test_who_starts_again_knows_what_was_taken(tmp_path: Path, clock: list[float]):
    movie(tmp_path / "in/a.mrc")
    first = watch(tmp_path)
    first.take()
    clock[0] += 10
    first.take()
    again = watch(tmp_path)
    assert (again.taken, again.take(), again.waiting) == (1, 0, 0)
    # The microscope's disk was emptied: what was taken stays.
    (tmp_path / "in/a.mrc").unlink()
    assert watch(tmp_path).taken == 1


def test_the_last_look_takes_broken_ones_too_but_none_that_may_still_be_written(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
):
    for name in ("old", "stalled"):
        path = tmp_path / f"in/{name}.mrc"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(movie(path)[:-50])
    written = {"old.mrc": time.time() - 3600, "stalled.mrc": time.time()}
    seen = watch(tmp_path)
    monkeypatch.setattr(seen, "_age", lambda name: time.time() - written[name])
    assert seen.take() == 0
    assert (seen.take(last_s=100), seen.waiting) == (0, 2)
    clock[0] += 10
    assert (seen.take(last_s=100), seen.waiting) == (1, 1)
    assert linked(tmp_path) == ["old.mrc"]
    assert seen.left == "1 file still written: left out; the same command takes them"


def test_a_file_is_as_old_as_its_name_is_in_the_folder(tmp_path: Path):
    movie(tmp_path / "in/copied.mrc")
    # As of a copy that keeps the date of what it copies.
    an_hour_ago = time.time() - 3600
    os.utime(tmp_path / "in/copied.mrc", (an_hour_ago, an_hour_ago))
    assert watch(tmp_path)._age("copied.mrc") < 60


def test_a_folder_that_links_lead_to_is_visited_once(tmp_path: Path, clock: list[float]):
    movie(tmp_path / "in/s5/a.mrc")
    movie(tmp_path / "elsewhere/b.mrc")
    (tmp_path / "in/latest").symlink_to("s5")
    (tmp_path / "in/s5/up").symlink_to("..")
    (tmp_path / "in/other").symlink_to(tmp_path / "elsewhere")
    seen = Arrivals(tmp_path / "in", tmp_path / "project", settle_s=0)
    assert seen.take() == 2
    assert linked(tmp_path) == ["other/b.mrc", "s5/a.mrc"]


def test_another_movie_of_the_same_name_is_refused(tmp_path: Path, clock: list[float]):
    for name in ("in", "other"):
        movie(tmp_path / name / "a.mrc")
        seen = Arrivals(tmp_path / name, tmp_path / "project", settle_s=0)
        if name == "other":
            with pytest.raises(ParameterError, match=r"same name .* project of its own"):
                seen.take()
        else:
            assert seen.take() == 1


def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ParameterError, match="no such folder"):
        watch(tmp_path)
