from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from halfmap.errors import ResourceError
from halfmap.io.atomic import atomic_path, is_out_of_resources, remove_temporaries, write_text


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("No space left on device (os error 28)"),  # polars
        OSError("1000000 requested and 116272 written"),  # NumPy, and tifffile through it
    ],
    ids=str,
)
def test_a_full_disk_is_said_whoever_met_it_and_nothing_is_left(tmp_path, error):
    with (
        pytest.raises(ResourceError, match="no space left on the disk; free some"),
        atomic_path(tmp_path / "a.star") as temporary,
    ):
        temporary.write_text("half")
        raise error
    assert not list(tmp_path.iterdir())
    assert is_out_of_resources(error)


def test_other_errors_are_passed_on(tmp_path):
    with pytest.raises(OSError, match="odd"), atomic_path(tmp_path / "a.star"):
        raise OSError("odd")


def test_only_temporaries_are_removed(tmp_path):
    kept = [tmp_path / name for name in (".hidden", ".12", "a~b", ".x~y", "12~a")]
    for path in (*kept, tmp_path / ".12~a.mrc"):
        path.touch()
    remove_temporaries(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


@pytest.fixture
def flushed(monkeypatch) -> list[tuple[str, bool]]:
    """Names of what was waited for on the disk, and whether `a.star` had its name by then."""
    calls = []
    real = os.fsync

    def record(number: int) -> None:
        path = Path(f"/proc/self/fd/{number}").readlink()
        calls.append((path.name, (path if path.is_dir() else path.parent).joinpath("a.star").exists()))
        real(number)

    monkeypatch.setattr(os, "fsync", record)
    return calls


def test_content_is_on_the_disk_before_the_name_and_then_the_name(tmp_path, flushed):
    write_text(tmp_path / "a.star", "data_")
    (temporary, is_folder), then = flushed
    assert re.fullmatch(rf"\.{os.getpid()}-[0-9a-f]{{8}}~a\.star", temporary) and not is_folder
    assert then == (tmp_path.name, True)


def test_what_need_not_be_durable_waits_for_nothing(tmp_path, flushed):
    write_text(tmp_path / "a.star", "data_", durable=False)
    assert flushed == []
    assert (tmp_path / "a.star").read_text() == "data_"


def test_a_folder_that_cannot_be_flushed_is_no_error_but_a_file_is(tmp_path, monkeypatch):
    def refuse(number: int) -> None:
        if Path(f"/proc/self/fd/{number}").readlink().is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    write_text(tmp_path / "a.star", "data_")
    assert (tmp_path / "a.star").exists()

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="no space left on the disk"):
        write_text(tmp_path / "b.star", "data_")
    assert [path.name for path in tmp_path.iterdir()] == ["a.star"]
