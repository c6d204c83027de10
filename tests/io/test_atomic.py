from __future__ import annotations

import errno

import pytest

from halfmap.errors import ResourceError
from halfmap.io.atomic import atomic_path, is_out_of_resources, remove_temporaries


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
