"""Poses found in denoised images: as sure as was measured, and maps of raw images alone."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from refine_simulation import BOX, PIXEL, N, errors, run, write_project

from halfmap.data import Poses
from halfmap.errors import ParameterError, TableError
from halfmap.io.denoised import write_powers
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.fourier import irfft2, rfft2
from halfmap.ops.signal_bias import HalfPowers
from halfmap.search.noise import ResidualSums
from halfmap.steps.refine.model import Model, _with_searched
from halfmap.steps.refine.searched import SearchedSums, _over_mean

SPREAD = 0.3
"""Of the denoised images' background, whose pixels were divided by it."""


def passed(size: int, pixel_size: float) -> torch.Tensor:
    """Amplitude of a signal that is filtered as its ratio to the noise asks for, on rings of a box."""
    frequency = torch.arange(size // 2 + 1) / (size * pixel_size)
    return 1 - 0.6 * frequency * 2 * PIXEL


def write_powers_of(path: Path, *, noise: float = 2.0) -> None:
    """What is measured of a micrograph whose halves of some noise are filtered."""
    ones = torch.ones(65, dtype=torch.float64)
    amplitude, signal = passed(128, PIXEL).double(), 0.4 * ones
    squared = amplitude.square()
    rows = [signal + noise, signal, squared * (signal + noise), squared * signal, amplitude * signal]
    counts = 100 * ones
    write_powers(path, HalfPowers((torch.stack(rows) * counts)[None], counts), PIXEL)


def filtered(images: torch.Tensor) -> torch.Tensor:
    """What is least wrong of images that may only be filtered: no network can say more of poses."""
    fy, fx = torch.fft.fftfreq(BOX), torch.fft.rfftfreq(BOX)
    ring = ((fy[:, None].square() + fx.square()).sqrt() * BOX).round().long().clamp(max=BOX // 2)
    return irfft2(rfft2(images) * passed(BOX, PIXEL)[ring], shape=(BOX, BOX))


def write_searched(folder: Path, images: torch.Tensor, name: str = "searched.star") -> None:
    """Denoised images of the particles, in another order."""
    order, stem = torch.arange(len(images)).flip(0), Path(name).stem
    stack = folder / f"Stacks/{stem}.mrcs"
    write_mrc(stack, (images / SPREAD)[order].numpy(), pixel_size=PIXEL, stack=True)
    write_powers_of(folder / f"{stem}.npz")
    table = read_particles(folder / "particles.star")
    rows = table.rows[order.numpy()].with_columns(
        pl.Series("rlnImageName", [f"{i + 1:06d}@Stacks/{stem}.mrcs" for i in range(len(order))]),
        pl.lit(f"{stem}.npz").alias("hmDenoisingPowers"),
        pl.lit(SPREAD).alias("hmBackgroundStd"),
    )
    optics = table.optics.with_columns(pl.lit("denoised").alias("hmImageKind"))
    write_particles(folder / name, type(table)(optics, rows))


def read_stack(folder: Path) -> torch.Tensor:
    return torch.from_numpy(read_mrc(folder / "Stacks/a.mrcs").copy())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Poses]:
    folder = tmp_path_factory.mktemp("searched") / "project"
    poses = write_project(folder)
    table = read_particles(folder / "particles.star")
    rows = table.rows.with_columns(
        pl.lit(1.0).alias("hmBackgroundStd"),
        pl.Series("rlnCoordinateX", 10.0 * np.arange(N)),
        pl.Series("rlnCoordinateY", 7.0 * np.arange(N)),
    )
    write_particles(folder / "particles.star", type(table)(table.optics, rows))
    write_searched(folder, filtered(read_stack(folder)))
    return folder, poses


@pytest.fixture(scope="module")
def job(project: tuple[Path, Poses]) -> Path:
    return run(project[0], searched=Path("searched.star"))


def test_a_filter_takes_nothing_from_poses_and_makes_none_of_them_surer(project, job):
    folder, poses = project
    found, raw = errors(job, poses), errors(run(folder), poses)
    assert float(found.median()) == pytest.approx(float(raw.median()), rel=0.15)
    stated = torch.from_numpy(read_particles(job / "particles.star").rows["hmPoseUncertainty"].to_numpy())
    share = float((found < stated).double().mean())
    # Of three normal components the norm is within the root of their variances' sum for about 61 %.
    assert abs(share - 0.61) < 4 * math.sqrt(0.61 * 0.39 / N)


def test_amplitudes_are_what_the_filter_left(job):
    model = Model.last(job / "Iterations", "cpu")
    assert model is not None
    # Two rings are compared beyond those with signal.
    seen = slice(2, model.radius - 1)
    for half in model.transfer[:, 0]:
        torch.testing.assert_close(half[seen], passed(BOX, PIXEL)[seen], atol=0.03, rtol=0)


def test_what_a_network_invents_is_in_no_map(project):
    """Raw images of nothing but noise, in which a network sees the particle: half maps are unrelated."""
    folder, _ = project
    noise = torch.randn(N, BOX, BOX, generator=torch.Generator().manual_seed(7))
    write_mrc(folder / "Stacks/noise.mrcs", noise.numpy(), pixel_size=PIXEL, stack=True)
    table = read_particles(folder / "particles.star")
    names = table.rows["rlnImageName"].str.replace("a.mrcs", "noise.mrcs", literal=True)
    write_particles(folder / "noise.star", type(table)(table.optics, table.rows.with_columns(names)))
    found = run(folder, particles=Path("noise.star"), searched=Path("searched.star"), most_iterations=3)
    general = read_star(found / "model.star")["model_general"]
    # The reference has detail of 25 Å.
    assert float(general["rlnCurrentResolution"]) > 25.0  # pyright: ignore[reportArgumentType, reportCallIssue]


def middle(job: Path) -> float:
    """Density in the middle of both half maps, in standard deviations of the map."""
    names = "run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc"
    volume = np.mean([read_mrc(job / name) for name in names], axis=0)
    around = slice(BOX // 2 - 1, BOX // 2 + 2)
    return float(volume[around, around, around].mean() / volume.std())


def test_what_a_network_draws_into_images_is_not_in_the_maps(project, job):
    """A ball in the middle of all denoised images would be the brightest part of a map made of them."""
    folder, _ = project
    place = torch.arange(BOX) - BOX // 2
    ball = 0.8 * torch.exp(-(place[:, None].square() + place.square()) / 4.0)
    write_searched(folder, filtered(read_stack(folder)) + ball, "drawn.star")
    assert abs(middle(run(folder, searched=Path("drawn.star"))) - middle(job)) < 1.0


def test_amplitudes_and_noise_of_the_searched_images_are_found():
    """From what many images add up to, at once; from nothing, amplitudes are as those of coarser rings."""
    rings, known = 20, 12
    made = torch.linspace(1.0, 0.4, rings).double()
    model = Model(
        **{field.name: None for field in fields(Model) if field.default is MISSING},  # pyright: ignore[reportArgumentType]
    )
    model = replace(
        model,
        radius=rings - 2,
        searched=torch.ones(2, 2, 1, rings),
        transfer=0.8 * torch.ones(2, 1, rings),
    )
    norm = torch.where(torch.arange(rings) < known, 1e6, 0.0).double()
    sums = SearchedSums.empty(1, rings - 1)
    sums.match[:] = torch.stack([made * 0.8 * norm, 0.64 * norm])[:, None, : rings - 1]
    left = ResidualSums(*(torch.full((4, rings - 1), value).double() for value in (6.0, 2.0, 0.0, 0.0)))
    error, transfer = torch.tensor([[0.5], [1.5], [1.0], [1.0]]), torch.rand(4, rings - 1)
    sums.add(
        left,
        left,
        amplitude=torch.ones(4, rings - 1),
        transfer=transfer,
        error=error,
        scale=torch.ones(4),
        group=torch.zeros(4, dtype=torch.long),
    )
    found = _with_searched(model, (sums, sums))
    torch.testing.assert_close(found.transfer[0, 0, 2:known].double(), made[2:known], atol=0.01, rtol=0)
    torch.testing.assert_close(
        found.transfer[1, 0, known:].double(), made[known - 1].expand(rings - known), atol=0.01, rtol=0
    )
    # Twice, two thirds and once of 3, the mean of which the detector has where no CTF explains it.
    power = found.searched[0, 0, 0, :-1] + found.searched[0, 1, 0, :-1] * transfer.mean(0)
    torch.testing.assert_close(power, torch.full((rings - 1,), (6.0 + 2.0 + 3.0 + 3.0) / 4))


def test_micrographs_that_are_noisier_or_more_biased_count_less(project):
    folder, _ = project
    table = read_particles(folder / "searched.star")
    write_powers_of(folder / "poor.npz", noise=8.0)
    is_first = pl.col("rlnMicrographName") == "Motion/8000.mrc"
    rows = table.rows.with_columns(
        pl.when(is_first).then(pl.lit("poor.npz")).otherwise("hmDenoisingPowers").alias("hmDenoisingPowers")
    )
    write_particles(folder / "one_poor.star", type(table)(table.optics, rows))
    found = {}
    for name in ("searched.star", "one_poor.star"):
        job = run(folder, searched=Path(name), most_iterations=3)
        rows = read_particles(job / "particles.star").rows
        error = rows["hmPoseUncertainty"].to_numpy()
        first = (rows["rlnMicrographName"] == "Motion/8000.mrc").to_numpy()
        found[name] = float(np.median(error[first]) / np.median(error[~first]))
    assert found["one_poor.star"] > 1.3 * found["searched.star"]


def test_what_was_measured_is_relative_and_unknown_values_change_nothing():
    """One micrograph of two particles, one of one, and one of which nothing is known on the second ring."""
    values = np.array([[1.0, 2.0], [8.0, 4.0], [1.0, math.nan]])
    found = _over_mean(values, np.array([0, 0, 1, 2]), (0.25, 4.0))
    mean = math.exp((2 * math.log(1) + math.log(8) + math.log(1)) / 4)
    np.testing.assert_allclose(found[:, 0], np.clip(np.array([1, 8, 1]) / mean, 0.25, 4.0), rtol=1e-6)
    mean = math.exp((2 * math.log(2) + math.log(4)) / 3)
    np.testing.assert_allclose(found[:, 1], [2 / mean, 4 / mean, 1.0], rtol=1e-6)


def test_no_map_is_made_of_denoised_particles(project):
    with pytest.raises(ParameterError, match="no map, and no resolution, is made of what a network has"):
        run(project[0], particles=Path("searched.star"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.select(np.arange(len(table)) < 100), "has no image of the particle in row"),
        (
            lambda table: type(table)(table.optics.drop("hmImageKind"), table.rows),
            "holds no particles of denoised or merged",
        ),
        (
            lambda table: type(table)(table.optics, table.rows.drop("hmDenoisingPowers")),
            "has no _hmDenoisingPowers",
        ),
        (
            lambda table: type(table)(
                table.optics, table.rows.with_columns(pl.lit("gone.npz").alias("hmDenoisingPowers"))
            ),
            "nothing was measured of Motion/.*: there is no file gone.npz",
        ),
        (
            lambda table: type(table)(
                table.optics, table.rows.with_columns(pl.lit(0.0).alias("hmBackgroundStd"))
            ),
            "row 1: _hmBackgroundStd of 0 is no standard deviation",
        ),
    ],
)
def test_images_that_do_not_belong_to_the_particles_are_refused(project, change, said):
    folder, _ = project
    write_particles(folder / "other.star", change(read_particles(folder / "searched.star")))
    with pytest.raises(TableError, match=said):
        run(folder, searched=Path("other.star"))
