"""Frames in memory: bad pixels found and replaced without a trace, and what is refused."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from eer_writer import encode, random_events, write_eer
from numpy.random import SeedSequence

from halfmap.errors import FileFormatError, ShapeError
from halfmap.io.mrc import write_mrc
from halfmap.io.tiff import write_tiff_movie
from halfmap.steps.motion import _pixels
from halfmap.steps.motion import frames as module
from halfmap.steps.motion.frames import Frames, load_frames

N, SHAPE = 12, (190, 270)
# Places (x, y), also at the edge of the field and side by side.
HOT = [(100, 50), (101, 50), (0, 0), (269, 120), (200, 189)]
DEAD = [(30, 60), (31, 61), (150, 0)]


def uneven_gain() -> np.ndarray:
    return np.random.default_rng(1).normal(1, 0.06, SHAPE).clip(0.7, 1.4).astype(np.float32)


def expose(mean: float | np.ndarray = 2.0, *, seed: int = 2, n: int = N) -> np.ndarray:
    """Counts of an evenly lit camera with an uneven gain and no flaws."""
    rng = np.random.default_rng(seed)
    return rng.poisson(np.broadcast_to(mean / uneven_gain(), (n, *SHAPE))).astype(np.uint8)


def flaw(counts: np.ndarray, *, hot: list = HOT, dead: list = DEAD) -> np.ndarray:
    counts = counts.copy()
    for x, y in hot:
        counts[:, y, x] += 9
    for x, y in dead:
        counts[:, y, x] = 0
    return counts


def load(
    folder: Path, counts: np.ndarray, *, gain: np.ndarray | None = None, name: str = "movie.mrc", **changes
) -> Frames:
    """Write a movie and its gain reference, and load them."""
    gain_path = folder / "gain.mrc" if gain is not None else None
    if gain is not None:
        write_mrc(folder / "gain.mrc", gain, pixel_size=1.0)
    if name.endswith(".mrc"):
        write_mrc(folder / name, counts, pixel_size=1.0)
    else:
        write_tiff_movie(folder / name, counts)
    settings = {
        "first": 0,
        "last": len(counts),
        "n_expected": len(counts),
        "shape_expected": counts.shape[1:],
        "gain_path": gain_path,
        "defect_path": None,
        "seed": SeedSequence(5),
    }
    return load_frames(folder / name, **{**settings, **changes})


def mask_of(places: list) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    for x, y in places:
        mask[y, x] = True
    return mask


@pytest.mark.parametrize("name", ["movie.mrc", "movie.tif"])
def test_hot_and_dead_pixels_are_found_and_no_others(tmp_path, name):
    counts = flaw(expose())
    frames = load(tmp_path, counts, gain=uneven_gain(), name=name)
    assert sorted(map(tuple, frames.hot.tolist())) == sorted(HOT + DEAD)
    assert frames.defective == len(HOT + DEAD)
    # MRC knows no unsigned bytes.
    assert frames.counts.dtype == (np.uint16 if name == "movie.mrc" else np.uint8)
    good = ~mask_of(HOT + DEAD)
    assert np.array_equal(frames.counts[:, good], counts[:, good])
    assert np.array_equal(frames.gain[good], uneven_gain()[good])
    x, y = np.transpose(HOT)
    assert frames.counts[:, y, x].mean() < 4


def test_a_flawless_movie_is_left_as_it_is(tmp_path):
    counts = expose(0.4)
    frames = load(tmp_path, counts)
    assert frames.hot.shape == (0, 2)
    assert frames.defective == 0
    assert np.array_equal(frames.counts, counts)
    assert np.all(frames.gain == 1)


def test_pixels_of_gain_zero_and_of_the_defect_file_are_replaced_but_not_listed(tmp_path):
    gain = uneven_gain()
    gain[60:62, 30:33] = 0
    (tmp_path / "defects.txt").write_text("200 0 1 190\n")
    frames = load(tmp_path, flaw(expose()), gain=gain, defect_path=tmp_path / "defects.txt")
    assert sorted(map(tuple, frames.hot.tolist())) == sorted([*HOT[:4], DEAD[2]])
    assert frames.defective == 6 + 190 + 5
    assert frames.gain.min() > 0.5
    assert frames.counts[:, :, 200].mean() == pytest.approx(2, abs=0.15)


def test_replaced_counts_have_the_statistics_of_the_others_and_no_pattern(tmp_path):
    gain = uneven_gain()
    bad = np.random.default_rng(4).random(SHAPE) < 0.1
    bad[:, 100:112] = True
    counts = expose()
    counts[:, bad] = 77
    frames = load(tmp_path, counts, gain=np.where(bad, 0, gain).astype(np.float32), detect=False)
    electrons = frames.counts * frames.gain
    replaced, others = electrons[:, bad], electrons[:, ~bad]
    n = replaced.shape[1]
    assert replaced.mean() == pytest.approx(2, abs=0.02)
    assert replaced.var() == pytest.approx(others.var(), rel=0.05)
    # What stays in place from frame to frame would add to the variance of the mean over the frames.
    pattern = replaced.mean(axis=0).var() * N / replaced.var()
    assert pattern == pytest.approx(1, abs=5 * np.sqrt(2 / n))
    assert np.corrcoef(replaced[0], replaced[1])[0, 1] == pytest.approx(0, abs=5 / np.sqrt(n))


def test_a_bad_pixel_gets_counts_and_gain_of_its_neighbours(tmp_path):
    # Every pixel counts its own number, so that a count tells where it comes from.
    counts = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(1, *SHAPE).repeat(40, axis=0) + 1
    gain = uneven_gain()
    gain[80, 90] = 0
    frames = load(tmp_path, counts, gain=gain, detect=False)
    source = frames.counts[:, 80, 90].astype(int) - 1
    y, x = np.divmod(source, SHAPE[1])
    assert (abs(y - 80) <= 2).all()
    assert (abs(x - 90) <= 2).all()
    assert len(set(source)) > 12
    around = gain[78:83, 88:93]
    assert frames.gain[80, 90] == pytest.approx(around[around > 0].mean(), rel=1e-5)


def test_no_bad_pixel_gets_the_counts_of_another(tmp_path):
    gain = uneven_gain()
    gain[79:82, 90] = 0
    counts = expose(n=60)
    block = np.s_[:, 80:82, 91:93]
    counts[block] += 100
    frames = load(tmp_path, counts, gain=gain)
    assert sorted(map(tuple, frames.hot.tolist())) == [(91, 80), (91, 81), (92, 80), (92, 81)]
    assert frames.counts.max() < 30
    # The box of (90, 79) without the hot block, which its sources held when the gain reference was read.
    around = gain[77:82, 88:93].copy()
    around[3:, 3:] = 0
    assert frames.gain[79, 90] == pytest.approx(around[around > 0].mean(), rel=1e-5)


def test_deviations_are_from_the_mean_of_a_box():
    rng = np.random.default_rng(3)
    gain = np.where(rng.random(SHAPE) < 0.2, 0, uneven_gain()).astype(np.float32)
    gain[:, 130:180] = 0
    total = rng.uniform(20, 60, SHAPE).astype(np.float32)
    tiles = np.full((3, 5), 40, np.float32), np.full((3, 5), 5, np.float32)
    means = np.ones(SHAPE)
    for y, x in np.ndindex(SHAPE):
        box = np.s_[max(y - 15, 0) : y + 16, max(x - 15, 0) : x + 16]
        good = gain[box] > 0
        if good.any():
            means[y, x] = (total[box] * gain[box])[good].clip(10, 70).mean()
    found = {counted: np.empty(SHAPE, np.float32) for counted in (True, False)}
    for counted, out in found.items():
        for begin, end in ((0, 100), (100, 190)):
            _pixels.deviations(total, gain, *tiles, begin, end, counted, out[begin:end])
    alive = gain > 0
    with np.errstate(divide="ignore"):
        roots = 2 * (np.sqrt(total + 0.375) - np.sqrt(means / gain + 0.375))
    assert np.allclose(found[True], np.where(alive, roots, 0), atol=1e-4)
    assert np.allclose(found[False], np.where(alive, (total * gain - means) / 5, 0), atol=1e-4)


def test_a_large_defect_takes_from_its_nearest_edge(tmp_path):
    counts = np.broadcast_to(np.arange(SHAPE[1], dtype=np.float32) + 1, (3, *SHAPE)).copy()
    gain = np.ones(SHAPE, np.float32)
    gain[:, 100:160] = 0
    frames = load(tmp_path, counts, gain=gain, detect=False)
    columns = frames.counts - 1
    assert (abs(columns[:, :, 110] - 99) <= 3).all()
    assert (abs(columns[:, :, 150] - 160) <= 3).all()


def test_the_seed_decides_and_neither_threads_nor_the_range(tmp_path, monkeypatch):
    counts = flaw(expose())
    settings = {"gain": (~mask_of(HOT + DEAD)).astype(np.float32), "detect": False}
    whole = load(tmp_path, counts, **settings)
    part = load(tmp_path, counts, first=4, last=9, **settings)
    assert np.array_equal(part.counts, whole.counts[4:9])
    other = load(tmp_path, counts, seed=SeedSequence(6), **settings)
    assert not np.array_equal(other.counts, whole.counts)
    monkeypatch.setattr(module, "decoding_threads", lambda: 1)
    monkeypatch.setattr(module, "_STRIP_px", 16)
    found = load(tmp_path, counts, gain=uneven_gain())
    monkeypatch.setattr(module, "decoding_threads", lambda: 5)
    again = load(tmp_path, counts, gain=uneven_gain())
    assert np.array_equal(found.counts, again.counts)
    assert np.array_equal(found.hot, again.hot)


def test_the_gain_is_not_altered_for_the_next_movie(tmp_path):
    first = load(tmp_path, flaw(expose()), gain=uneven_gain())
    first.gain[:] = 0
    second = load(tmp_path, flaw(expose()), gain_path=tmp_path / "gain.mrc")
    assert second.defective == len(HOT + DEAD)
    assert second.gain.min() > 0.5


def test_a_new_gain_reference_of_the_same_name_is_read(tmp_path):
    load(tmp_path, expose(), gain=uneven_gain())
    write_mrc(tmp_path / "gain.mrc", np.full(SHAPE, 2, np.float32), pixel_size=1.0)
    os.utime(tmp_path / "gain.mrc", ns=(1, 1))
    frames = load(tmp_path, expose(), gain_path=tmp_path / "gain.mrc")
    assert np.all(frames.gain == 2)


def test_gold_and_the_edges_of_crystals_are_left_whole(tmp_path):
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    transmission = np.ones(SHAPE)
    for radius, (cx, cy) in zip((3, 5, 9, 20), ((40, 40), (100, 40), (180, 60), (60, 130)), strict=True):
        transmission[(x - cx) ** 2 + (y - cy) ** 2 <= radius**2] = 0.2
    transmission[100:150, 150:230] = 0.5
    frames = load(tmp_path, flaw(expose(6 * transmission), dead=[]), gain=uneven_gain())
    assert sorted(map(tuple, frames.hot.tolist())) == sorted(HOT)


@pytest.mark.parametrize("offset", [0, -4])
def test_movies_corrected_by_other_programs(tmp_path, offset):
    counts = expose(6) * uneven_gain() + np.float32(offset)
    for px, py in HOT:
        counts[:, py, px] += 30
    frames = load(tmp_path, counts)
    assert frames.counts.dtype == np.float32
    assert sorted(map(tuple, frames.hot.tolist())) == sorted(HOT)
    negative = load(tmp_path, np.rint(10 * counts).astype(np.int16))
    assert negative.counts.dtype == np.int16
    assert sorted(map(tuple, negative.hot.tolist())) == sorted(HOT)


@pytest.mark.parametrize("unit", [0.01, 1000.0])
def test_hot_pixels_of_corrected_movies_are_found_whatever_the_unit(tmp_path, unit):
    counts = expose(6) * uneven_gain()
    flawless = load(tmp_path, (counts * np.float32(unit)).astype(np.float32))
    assert flawless.defective == 0
    for px, py in HOT:
        counts[:, py, px] += 30
    frames = load(tmp_path, (counts * np.float32(unit)).astype(np.float32))
    assert sorted(map(tuple, frames.hot.tolist())) == sorted(HOT)


@pytest.mark.parametrize("unit", [0.01, 1.0])
def test_corrected_movies_most_of_whose_pixels_are_equal(tmp_path, unit):
    """Few electrons, and a part that was masked: there the median deviation is 0."""
    counts = expose(0.02).astype(np.float32) * np.float32(unit)
    counts[:, :, 128:] = 0
    frames = load(tmp_path, counts)
    assert frames.defective == 0
    assert np.array_equal(frames.counts, counts)
    counts[:] = unit
    assert load(tmp_path, counts).defective == 0


def test_a_dark_sum_does_not_hide_hot_pixels(tmp_path):
    # 0.24 counts are expected: most pixels are 0, and their median deviation too.
    counts = expose(0.02)
    x, y = np.transpose(HOT)
    counts[:, y, x] = 1
    frames = load(tmp_path, counts, gain=uneven_gain())
    assert sorted(map(tuple, frames.hot.tolist())) == sorted(HOT)


def test_too_many_bad_pixels_are_none(tmp_path, caplog):
    counts = expose()
    counts[:, np.random.default_rng(7).random(SHAPE) < 0.01] = 30
    with caplog.at_level(logging.WARNING, "halfmap"):
        frames = load(tmp_path, counts)
    assert frames.defective == 0
    assert np.array_equal(frames.counts, counts)
    assert "movie.mrc: " in caplog.text
    assert "none of them is replaced" in caplog.text


def test_half_precision_becomes_single(tmp_path):
    frames = load(tmp_path, expose().astype(np.float16))
    assert frames.counts.dtype == np.float32
    assert np.array_equal(frames.counts, expose())


def test_eer_movies_are_divided_by_a_reference_of_another_format(tmp_path):
    rng, shape = np.random.default_rng(1), (64, 64)
    write_eer(
        tmp_path / "a.eer", [encode(random_events(rng, shape, 90), shape, 7, 2) for _ in range(9)], shape
    )
    reference = np.full(shape, 4, np.float32)
    reference[:, 32:] = 2
    write_mrc(tmp_path / "reference.mrc", reference, pixel_size=1.0)
    frames = load_frames(
        tmp_path / "a.eer",
        first=1,
        last=3,
        n_expected=3,
        shape_expected=shape,
        gain_path=tmp_path / "reference.mrc",
        defect_path=None,
        eer_grouping=3,
        seed=SeedSequence(1),
    )
    assert frames.counts.shape == (2, *shape)
    assert frames.gain[0, 40] == pytest.approx(2 * frames.gain[0, 10])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"n_expected": 13}, FileFormatError, r"movie\.mrc: holds 12 frames, its table says 13"),
        ({"first": 8, "last": 13}, FileFormatError, r"movie\.mrc: holds 12 frames, 9 to 13 were asked"),
        ({"first": 3, "last": 3}, FileFormatError, r"movie\.mrc: holds 12 frames"),
        ({"shape_expected": (270, 190)}, ShapeError, r"movie\.mrc: is 190 x 270 px .* says 270 x 190"),
        ({"gain": np.ones((100, 270), np.float32)}, ShapeError, r"movie\.mrc: does not fit .*gain\.mrc"),
    ],
)
def test_movies_that_are_not_what_the_table_says(tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        load(tmp_path, expose(), **changes)


def test_a_defect_map_of_another_camera(tmp_path):
    write_mrc(tmp_path / "defects.mrc", np.ones((10, 10), np.float32), pixel_size=1.0)
    with pytest.raises(ShapeError, match=r"movie\.mrc: does not fit .*defects\.mrc"):
        load(tmp_path, expose(), gain=uneven_gain(), defect_path=tmp_path / "defects.mrc")


def test_a_defect_list_that_covers_the_camera(tmp_path):
    (tmp_path / "defects.txt").write_text("0 0 270 190\n")
    with pytest.raises(ShapeError, match=r"movie\.mrc: does not fit .*defects\.txt: .*no pixel"):
        load(tmp_path, expose(), defect_path=tmp_path / "defects.txt")


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_an_empty_frame_is_named(tmp_path, dtype):
    counts = expose().astype(dtype)
    counts[6] = 0
    with pytest.raises(FileFormatError, match=r"movie\.mrc: frame 7 is zero all over"):
        load(tmp_path, counts)
    with pytest.raises(FileFormatError, match="frame 7 is zero"):
        load(tmp_path, counts, first=5)
    assert load(tmp_path, counts, last=6).counts.shape == (6, *SHAPE)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_frame_with_what_is_no_number_is_named(tmp_path, value):
    counts = expose().astype(np.float32)
    counts[3, 17, 5] = value
    with pytest.raises(FileFormatError, match=r"movie\.mrc: holds NaN or infinite values in frame 4"):
        load(tmp_path, counts)


def test_a_movie_cut_short(tmp_path):
    write_tiff_movie(tmp_path / "cut.tif", expose())
    whole = (tmp_path / "cut.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileFormatError, match=r"cut\.tif: is truncated"):
        load_frames(
            tmp_path / "cut.tif",
            first=0,
            last=N,
            n_expected=N,
            shape_expected=SHAPE,
            gain_path=None,
            defect_path=None,
            seed=SeedSequence(1),
        )
