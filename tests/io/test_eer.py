"""EER movies: every electron counted in its place, whatever the code, and damage noticed."""

from __future__ import annotations

from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from eer_writer import counts, encode, random_events, write_eer

from halfmap.errors import FileFormatError, ParameterError
from halfmap.io.eer import eer_info, read_eer

SHAPE = (48, 64)
KINDS = {
    "8 bit": (65000, None, 8, 2, False),
    "8 bit prototype": (65000, None, 8, 2, True),
    "7 bit": (65001, None, 7, 2, False),
    "detailed": (65002, {65007: 7, 65008: 2, 65009: 2}, 7, 2, False),
    "detailed, half pixels": (65002, {65007: 7, 65008: 1, 65009: 1}, 7, 1, False),
    "detailed, no vertical tag": (65002, {65007: 6, 65008: 1}, 6, 1, False),
}


def make(path: Path, kind: str = "7 bit", *, n_frames: int = 11, **options):
    """A movie with empty and sparse frames, so that long skips occur, and its events."""
    compression, tags, skip_bits, sub_bits, wasteful = KINDS[kind]
    rng = np.random.default_rng(4)
    numbers = [0, 1, 5, 200, 1000, *rng.integers(0, 60, n_frames - 5)]
    frames = [random_events(rng, SHAPE, n, 1 << sub_bits) for n in numbers]
    data = [encode(frame, SHAPE, skip_bits, sub_bits, wasteful=wasteful) for frame in frames]
    write_eer(path, data, SHAPE, compression=compression, code_tags=tags, **options)
    return frames


@pytest.mark.parametrize("upsampling", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_electron_is_counted_in_its_place(tmp_path: Path, kind: str, upsampling: int) -> None:
    frames = make(tmp_path / "a.eer", kind)
    fractions = read_eer(tmp_path / "a.eer", grouping=3, upsampling=upsampling)
    assert fractions.dtype == np.uint8
    sub_pixels = 1 << KINDS[kind][3]
    # Eleven frames are three fractions; two frames are left over.
    expected = [counts(frames[i : i + 3], SHAPE, upsampling, sub_pixels) for i in (0, 3, 6)]
    assert np.array_equal(fractions, expected)


def test_a_peer_decodes_the_same(tmp_path: Path) -> None:
    frames = make(tmp_path / "a.eer")
    for frame, image in zip(frames, read_eer(tmp_path / "a.eer", grouping=1), strict=True):
        data = encode(frame, SHAPE, 7, 2)
        # The peer refuses streams of odd length.
        peer = imagecodecs.eer_decode(data + bytes(len(data) % 2), SHAPE, 7, 2, 2)
        assert np.array_equal(image, peer)


def test_an_electron_in_the_last_pixel(tmp_path: Path) -> None:
    events = random_events(np.random.default_rng(0), SHAPE, 1)
    events.x[:], events.y[:] = SHAPE[1] - 1, SHAPE[0] - 1
    write_eer(tmp_path / "a.eer", [encode(events, SHAPE, 7, 2)], SHAPE)
    assert read_eer(tmp_path / "a.eer", 0, grouping=1)[-1, -1] == 1


@pytest.mark.parametrize("fractions", [0, -1, slice(1, 3), [2, 0]])
def test_fractions_come_as_asked(tmp_path: Path, fractions) -> None:
    make(tmp_path / "a.eer")
    everything = read_eer(tmp_path / "a.eer", grouping=3)
    assert np.array_equal(
        read_eer(tmp_path / "a.eer", fractions, grouping=3, workers=1), everything[fractions]
    )


def test_counts_of_many_frames_do_not_wrap(tmp_path: Path) -> None:
    events = random_events(np.random.default_rng(0), SHAPE, 1)
    write_eer(tmp_path / "a.eer", [encode(events, SHAPE, 7, 2)] * 300, SHAPE)
    assert read_eer(tmp_path / "a.eer", grouping=300).max() == 300


def test_what_it_holds(tmp_path: Path) -> None:
    make(tmp_path / "a.eer")
    info = eer_info(tmp_path / "a.eer")
    assert (info.n_frames, info.shape, info.n_fractions(4)) == (11, SHAPE, 2)
    assert info.metadata == {"exposureTime": "4.5 s", "camera": "Falcon"}


def test_a_sum_before_the_frames_is_not_a_frame(tmp_path: Path) -> None:
    frames = make(tmp_path / "a.eer", summed_first=True)
    assert eer_info(tmp_path / "a.eer").n_frames == 11
    assert np.array_equal(read_eer(tmp_path / "a.eer", 3, grouping=1), counts(frames[3:4], SHAPE))


def test_a_truncated_movie_is_an_error(tmp_path: Path) -> None:
    make(tmp_path / "a.eer")
    raw = (tmp_path / "a.eer").read_bytes()
    for size in np.linspace(1, len(raw) - 1, 40).astype(int):
        (tmp_path / "b.eer").write_bytes(raw[:size])
        with pytest.raises(FileFormatError, match=r"b\.eer"):
            read_eer(tmp_path / "b.eer", grouping=1)


@pytest.mark.parametrize("kind", ["8 bit", "7 bit"])
def test_a_frame_that_does_not_add_up_is_named(tmp_path: Path, kind: str) -> None:
    compression, _, skip_bits, sub_bits, _ = KINDS[kind]
    frames = [random_events(np.random.default_rng(i), SHAPE, 50) for i in range(4)]
    data = [encode(frame, SHAPE, skip_bits, sub_bits) for frame in frames]
    data[2] = data[2][: len(data[2]) // 2]
    write_eer(tmp_path / "a.eer", data, SHAPE, compression=compression)
    with pytest.raises(FileFormatError, match="frame 3 is corrupt"):
        read_eer(tmp_path / "a.eer", grouping=4)
    assert read_eer(tmp_path / "a.eer", [0, 1, 3], grouping=1).sum() == 150


def test_what_is_no_eer(tmp_path: Path) -> None:
    path = tmp_path / "a.eer"
    write_eer(path, [b"\1" * 12], (3, 4), compression=1)
    with pytest.raises(FileFormatError, match="TIFF without electron events"):
        eer_info(path)
    write_eer(path, [b"\1"], (3, 4), compression=65002, code_tags={65007: 7, 65008: 2, 65009: 1})
    with pytest.raises(FileFormatError, match=r"events of 7 \+ 2 \+ 1 bits"):
        eer_info(path)
    path.write_bytes(bytes(100) + b"ThermoFisherECComprOK000")
    with pytest.raises(FileFormatError, match="without a TIFF around its frames"):
        eer_info(path)
    path.write_bytes(b"")
    with pytest.raises(FileFormatError, match="is not a TIFF"):
        eer_info(path)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"grouping": 0}, ParameterError),
        ({"upsampling": 3}, ParameterError),
        ({"grouping": 12}, FileFormatError),
        ({"grouping": 3, "fractions": 3}, FileFormatError),
    ],
)
def test_what_cannot_be_asked(tmp_path: Path, options: dict, error: type) -> None:
    make(tmp_path / "a.eer")
    with pytest.raises(error):
        read_eer(tmp_path / "a.eer", **options)
