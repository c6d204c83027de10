"""Particle images: broken ones refused before work, the same whether kept or read, read ahead in order."""

from __future__ import annotations

import logging
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from halfmap.data import ParticleSet
from halfmap.errors import ParameterError, TableError
from halfmap.io.mrc import write_mrc
from halfmap.ops.fourier import rfft2
from halfmap.search.particles import ParticleImages, prefetched

BOX = 16
STACKS, PER_STACK = 3, 8
N = STACKS * PER_STACK
ALL = 2**20
"""Bytes in which all images of the tests fit."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Three stacks of eight images of noise."""
    for stack in range(STACKS):
        write(tmp_path, stack, noise(stack))
    return tmp_path


def noise(seed: int, box: int = BOX, n: int = PER_STACK) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, box, box)).astype(np.float32)


def write(project: Path, stack: int, images: np.ndarray, pixel_size: float = 1.5) -> None:
    write_mrc(project / f"{stack}.mrcs", images, pixel_size=pixel_size)


def pixels(project: Path) -> Tensor:
    """Images in the order of the table of `particles`."""
    stacks = torch.from_numpy(np.stack([noise(stack) for stack in range(STACKS)], axis=1))
    return stacks.flatten(0, 1)


def particles(project: Path, **columns: list) -> ParticleSet:
    """Table that goes round the stacks: the first images of all, then the second."""
    names = [f"{number + 1:06d}@{stack}.mrcs" for number in range(PER_STACK) for stack in range(STACKS)]
    rows = {
        "rlnImageName": names,
        "rlnDefocusU": [1.5e4] * N,
        "rlnDefocusV": [1.4e4] * N,
        "rlnDefocusAngle": [30.0] * N,
        "rlnOpticsGroup": [1 + row % 2 for row in range(N)],
    }
    optics = {
        "rlnOpticsGroup": [1, 2],
        "rlnImagePixelSize": [1.5, 1.5],
        "rlnImageSize": [BOX, BOX],
        "rlnVoltage": [300.0, 300.0],
        "rlnSphericalAberration": [2.7, 2.7],
        "rlnAmplitudeContrast": [0.1, 0.1],
    }
    optics |= {label: columns.pop(label) for label in list(columns) if label in optics}
    table = pl.DataFrame(rows | columns)
    return ParticleSet(pl.DataFrame(optics), table, project / "particles.star")


def without(table: ParticleSet, label: str) -> ParticleSet:
    rows, optics = (frame.drop(label, strict=False) for frame in (table.rows, table.optics))
    return ParticleSet(optics, rows, table.path)


def spectrum(images: Tensor) -> Tensor:
    """A transform to complex tensors: a corner of the Fourier transform."""
    return rfft2(images)[:, :5, :5].contiguous()


def kept(images: ParticleImages) -> int:
    return int((images._kept.find(np.arange(len(images))) >= 0).sum())


def test_images_are_those_of_the_files(project: Path) -> None:
    images = ParticleImages(particles(project), project, memory=ALL)
    assert (len(images), images.box, images.pixel_size) == (N, BOX, 1.5)
    index = np.random.default_rng(0).permutation(N)
    assert images.read(index).dtype == torch.float32
    assert torch.equal(images.read(index), pixels(project)[index])


@pytest.mark.parametrize("dtype", [np.float16, np.int16, np.int8])
def test_stacks_of_other_types(project: Path, dtype: type) -> None:
    stacks = [(20 * noise(stack)).round().astype(dtype) for stack in range(STACKS)]
    for stack, stored in enumerate(stacks):
        write_mrc(project / f"{stack}.mrcs", stored, pixel_size=1.5, dtype=dtype)
    images = ParticleImages(particles(project), project, memory=ALL)
    expected = np.stack(stacks, axis=1).reshape(N, BOX, BOX).astype(np.float32)
    assert torch.equal(images.read(np.arange(N)), torch.from_numpy(expected))
    # Whole numbers of this size survive half precision.
    assert torch.equal(images.get(np.arange(N)), torch.from_numpy(expected))


@pytest.mark.parametrize("transform", [None, spectrum])
def test_nothing_depends_on_what_is_kept_or_on_order(project: Path, transform) -> None:
    rng = np.random.default_rng(1)
    each = 2 * BOX**2 + 4 if transform is None else 2 * 50 + 4
    places = 4 * N
    never = ParticleImages(particles(project), project, memory=0, transform=transform)
    expected = never.get(np.arange(N))
    for memory, most in ((0, 0), (places + 7 * each, 7), (ALL, N)):
        images = ParticleImages(particles(project), project, memory=memory, transform=transform)
        for size in (5, 1, 9, N, N):
            index = rng.choice(N, size)  # some twice
            assert torch.equal(images.get(index), expected[index])
        images.get(np.arange(N))
        assert kept(images) == most
    truth = pixels(project) if transform is None else transform(pixels(project))
    largest = truth.abs().amax(dim=(1, 2), keepdim=True)
    # Eleven bits of each number, real and imaginary, down to denormal ones 2**-29 below the largest.
    assert ((expected - truth).abs() <= 2**-11 * truth.abs() + 2**-38 * largest).all()
    assert (expected != truth).any()


def test_images_of_any_scale_keep_their_precision(project: Path) -> None:
    scale = torch.logspace(-28, 28, N)[:, None, None]
    images = ParticleImages(particles(project), project, memory=ALL, transform=lambda x: x * 0 + x)
    plain = images.get(np.arange(N))

    def scaled(read: Tensor) -> Tensor:
        return read * scale[: len(read)]

    wild = images.transformed_by(scaled)
    for _ in range(2):
        got, truth = wild.get(np.arange(N)), scaled(pixels(project))
        assert got.isfinite().all()
        assert ((got - truth).abs() <= 2**-11 * truth.abs() + 2**-37 * truth.abs().amax()).all()
        relative = (got / scale - plain).abs().amax(dim=(1, 2)) / plain.abs().amax(dim=(1, 2))
        assert (relative < 2**-9).all()


def test_numbers_too_large_are_named(project: Path) -> None:
    write(project, 1, noise(1) * np.float32(1e37))
    images = ParticleImages(particles(project), project, memory=ALL, transform=lambda x: x * 100)
    with pytest.raises(
        TableError, match=r"particles.star, row 2: image 1 of .*1\.mrcs holds numbers too large"
    ):
        images.get(np.arange(N))


def test_another_transform_takes_over_the_memory(project: Path) -> None:
    images = ParticleImages(particles(project), project, memory=ALL, transform=spectrum)
    images.get(np.arange(N))
    wider = images.transformed_by(lambda read: rfft2(read)[:, :8, :8].contiguous())
    assert wider.get(np.arange(N)).shape == (N, 8, 8)
    assert (kept(images), kept(wider)) == (0, N)
    assert images.get(np.arange(3)).shape == (3, 5, 5)
    assert kept(images) == 0


def test_batches_go_through_the_files_in_order(project: Path) -> None:
    images = ParticleImages(particles(project), project, memory=0)
    index = np.random.default_rng(2).permutation(N)[:20]
    batches = list(images.batches(index, 6))
    assert [len(batch) for batch in batches] == [6, 6, 6, 2]
    places = [(row % STACKS, row // STACKS) for row in np.concatenate(batches)]
    assert places == sorted((row % STACKS, row // STACKS) for row in index)
    streamed = list(images.stream(index, 6))
    assert all(np.array_equal(a, b) for (a, _), b in zip(streamed, batches, strict=True))
    assert all(torch.equal(got, images.get(batch)) for batch, got in streamed)


def test_a_copy_in_another_process_keeps_nothing_yet(project: Path) -> None:
    images = ParticleImages(particles(project), project, memory=ALL, transform=spectrum)
    expected = images.get(np.arange(N))
    data = pickle.dumps(images)
    copy = pickle.loads(data)
    assert kept(copy) == 0
    assert torch.equal(copy.get(np.arange(N)), expected)
    assert kept(copy) == N


def test_threads_that_read_at_once_get_their_own(project: Path) -> None:
    expected = ParticleImages(particles(project), project, memory=0).get(np.arange(N))
    images = ParticleImages(particles(project), project, memory=4 * N + 10 * (2 * BOX**2 + 4))
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            index = rng.choice(N, 7)
            if not torch.equal(images.get(index), expected[index]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert kept(images) == 10


# What is refused before any work


def test_check_passes_sound_images_and_keeps_them(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = ParticleImages(particles(project), project, memory=ALL, transform=spectrum)
    expected = ParticleImages(particles(project), project, memory=0, transform=spectrum).get(np.arange(N))
    with caplog.at_level(logging.WARNING):
        images.check()
    assert not caplog.records
    for stack in range(STACKS):
        (project / f"{stack}.mrcs").unlink()
    assert torch.equal(images.get(np.arange(N)), expected)


@pytest.mark.parametrize(
    ("value", "said"),
    [(np.nan, "holds NaN or infinity"), (-np.inf, "holds NaN or infinity"), (None, "is blank")],
)
def test_broken_images_are_named_before_work(project: Path, value: float | None, said: str) -> None:
    stack = noise(1)
    if value is None:
        stack[4] = 0.25
    else:
        stack[4, 3, 5] = value
    write(project, 1, stack)
    images = ParticleImages(particles(project), project, memory=ALL)
    sentence = (
        rf"particles.star, row 14: image 5 of .*1\.mrcs {said}.*; extract it again, or leave the row out"
    )
    for act in (images.check, lambda: images.read(np.arange(N)), lambda: images.get(np.array([13]))):
        with pytest.raises(TableError, match=sentence):
            act()


def test_all_broken_images_are_listed(project: Path) -> None:
    stack = noise(0)
    stack[:5, 0, 0] = np.nan
    write(project, 0, stack)
    stack = noise(2)
    stack[:] = 1
    write(project, 2, stack)
    images = ParticleImages(particles(project), project, memory=ALL)
    rows = "3, 4, 6, 7, 9, 10, 12, 13, 15, 18 and 2 more"
    with pytest.raises(
        TableError, match=rf"row 1: image 1 of .*0\.mrcs holds NaN .*, and rows {rows} are bad"
    ):
        images.check()


def test_backgrounds_that_are_not_normalised_are_told(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(project, 1, noise(1) * 4 + 3)
    with caplog.at_level(logging.WARNING):
        ParticleImages(particles(project), project, memory=0).check()
    [record] = caplog.records
    message = record.getMessage()
    assert message.startswith("the background of 8 of 24 particles is not normalised")
    assert "row 2 has" in message


def test_images_that_would_be_all_of_an_average_are_refused(project: Path) -> None:
    """One of an image's pixels, all of them, or their contrast, is far beyond what the others have."""
    hot, bright, lifted = noise(1), noise(1), noise(1)
    lifted[2] += 40
    hot[2, BOX // 2, BOX // 2] = 1e4
    bright[[2, 5]] *= 1000
    for images, more in ((hot, ""), (lifted, ""), (bright, ", and 1 more are too strong")):
        write(project, 1, images)
        with pytest.raises(TableError, match=rf"row 8: image 3 of .*1\.mrcs is \d+ times as strong.*{more}"):
            ParticleImages(particles(project), project, memory=0).check()
    write(project, 1, 5 * noise(1))
    ParticleImages(particles(project), project, memory=0).check()


@pytest.mark.parametrize("label", ["rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"])
def test_ctf_columns_are_asked_for(project: Path, label: str) -> None:
    with pytest.raises(TableError, match=rf"particles.star: no _{label} for the particles; estimate the CTF"):
        ParticleImages(without(particles(project), label), project, memory=0)
    values = [1e4] * 9 + [float("nan")] + [1e4] * (N - 10)
    with pytest.raises(TableError, match=rf"particles.star, row 10: _{label} is nan; leave out"):
        ParticleImages(particles(project, **{label: values}), project, memory=0)


@pytest.mark.parametrize("label", ["rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast"])
def test_optics_columns_are_asked_for(project: Path, label: str) -> None:
    with pytest.raises(TableError, match=rf"particles.star: no _{label} for the particles; add _{label} to"):
        ParticleImages(without(particles(project), label), project, memory=0)
    if label != "rlnVoltage":  # refused when the table is made
        with pytest.raises(TableError, match=rf"particles.star, row 2: _{label} is nan"):
            ParticleImages(particles(project, **{label: [1.0, float("nan")]}), project, memory=0)


@pytest.mark.parametrize(("label", "values"), [("rlnImagePixelSize", [1.5, 1.4]), ("rlnImageSize", [16, 24])])
def test_optics_groups_of_several_sizes_are_refused(project: Path, label: str, values: list) -> None:
    with pytest.raises(
        TableError, match=rf"particles.star: _{label} differs between optics groups: .*; split"
    ):
        ParticleImages(particles(project, **{label: values}), project, memory=0)


def test_stacks_of_several_boxes_are_refused(project: Path) -> None:
    write(project, 2, noise(2, box=24))
    sentence = (
        r"row 3: its image stack .*2\.mrcs holds images of 24 x 24 px, .*0\.mrcs of 16 x 16 px; extract all"
    )
    with pytest.raises(TableError, match=sentence):
        ParticleImages(particles(project), project, memory=0)


def test_stacks_of_another_box_than_stated_are_refused(project: Path) -> None:
    with pytest.raises(
        TableError, match=r"states a box of 24 px, but the stacks have 16 px; is it the table"
    ):
        ParticleImages(particles(project, rlnImageSize=[24, 24]), project, memory=0)
    images = ParticleImages(without(particles(project), "rlnImageSize"), project, memory=0)
    assert images.box == BOX


@pytest.mark.parametrize(
    ("shape", "said"),
    [((17, 17), "17 px is odd"), ((14, 14), "14 px is too small"), ((16, 18), "18 x 16 px, not square")],
)
def test_odd_small_and_oblong_boxes_are_refused(project: Path, shape: tuple[int, int], said: str) -> None:
    for stack in range(STACKS):
        write(project, stack, np.random.default_rng(0).normal(size=(PER_STACK, *shape)).astype(np.float32))
    table = without(particles(project), "rlnImageSize")
    with pytest.raises(TableError, match=rf"particles.star: .*{said}; extract the particles again"):
        ParticleImages(table, project, memory=0)


def test_missing_and_short_and_broken_stacks_are_refused(project: Path) -> None:
    table = particles(project)
    write(project, 1, noise(1)[:6])
    with pytest.raises(
        TableError, match=r"particles.star, row 20: asks for image 7 of .*1\.mrcs, which holds 6;"
    ):
        ParticleImages(table, project, memory=0)
    data = (project / "2.mrcs").read_bytes()
    (project / "2.mrcs").write_bytes(data[:-100])
    with pytest.raises(TableError, match=r"row 3: its image stack .*2\.mrcs is truncated: .*; copy"):
        ParticleImages(table, project, memory=0)
    (project / "1.mrcs").unlink()
    with pytest.raises(TableError, match=r"row 2: its image stack .*1\.mrcs is not there; extract"):
        ParticleImages(table, project, memory=0)


def test_picked_particles_have_no_images(project: Path) -> None:
    ones = [1.0] * N
    table = particles(project, rlnMicrographName=["a.mrc"] * N, rlnCoordinateX=ones, rlnCoordinateY=ones)
    table = without(table, "rlnImageName")
    with pytest.raises(
        TableError, match=r"the particles have no images \(_rlnImageName\); extract them first"
    ):
        ParticleImages(table, project, memory=0)


def test_memory_is_not_negative(project: Path) -> None:
    with pytest.raises(ParameterError, match="-1 bytes of memory"):
        ParticleImages(particles(project), project, memory=-1)


def test_another_pixel_size_in_a_header_is_told(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(project, 1, noise(1), pixel_size=1.52)
    images = ParticleImages(particles(project), project, memory=0)
    with caplog.at_level(logging.WARNING):
        images.check()
    [record] = caplog.records
    assert "1.mrcs: its header states 1.52 Å/px, the table 1.5, which is used (1 of 3" in record.getMessage()
    assert images.pixel_size == 1.5


# Reading ahead


def test_items_come_in_order_and_few_are_made_ahead() -> None:
    made: list[int] = []

    def items():
        for item in range(20):
            made.append(item)
            yield item

    for seen, item in enumerate(prefetched(items())):
        assert item == seen
        time.sleep(0.002)
        assert len(made) <= seen + 3  # this one and two more
    assert made == list(range(20))


def test_items_are_made_in_the_background() -> None:
    waiting, used = threading.Event(), threading.Event()

    def items():
        yield 0
        waiting.set()
        assert used.wait(10)
        yield 1

    ahead = prefetched(items())
    assert next(ahead) == 0
    # The second item is under way although nobody asked for it.
    assert waiting.wait(10)
    used.set()
    assert list(ahead) == [1]


def test_an_error_comes_in_its_place() -> None:
    def items():
        yield 1
        yield 2
        raise TableError("the third is broken")

    got = []
    with pytest.raises(TableError, match="the third is broken"):
        for item in prefetched(items()):
            got.append(item)
    assert got == [1, 2]


def test_the_thread_ends_when_the_loop_is_left() -> None:
    before = threading.active_count()
    made: list[int] = []

    def items():
        for item in range(1000):
            made.append(item)
            yield item

    ahead = prefetched(items())
    assert [next(ahead), next(ahead)] == [0, 1]
    assert threading.active_count() == before + 1
    ahead.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert len(made) <= 4
