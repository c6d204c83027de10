"""Poses found in denoised images: as sure as was measured, and maps of raw images alone."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from refine_simulation import BOX, PIXEL, errors, run, write_project

from halfmap.data import Poses
from halfmap.errors import HalfmapError, ParameterError, TableError
from halfmap.io.denoised import write_powers
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.fourier import irfft2, rfft2
from halfmap.ops.signal_bias import HalfPowers
from halfmap.search.noise import ResidualSums
from halfmap.steps.refine.model import Model, _with_searched
from halfmap.steps.refine.searched import SearchedSums

WEAK = 0.5
SPREAD = 0.3
"""Of the denoised images' background, whose pixels were divided by it."""

QUIET = 0.35
"""Noise left over that of raw images."""


def transfer(size: int, pixel_size: float) -> torch.Tensor:
    """Amplitude of the signal in denoised images on rings of a box."""
    frequency = torch.arange(size // 2 + 1) / (size * pixel_size)
    return 1 - 0.5 * frequency * 2 * PIXEL


def powers(path: Path, *, error: float) -> None:
    """What is told of a micrograph, in which a part of the power of denoised images is noise."""
    rings = 65
    counts = torch.full((rings,), 100.0, dtype=torch.float64)
    amplitude = transfer(2 * (rings - 1), PIXEL).double()
    signal = torch.full((rings,), 0.2, dtype=torch.float64)
    common = amplitude.square() * signal
    # The mean of two halves has half the noise of each.
    noise = 2 * common * error / max(1 - error, 1e-6)
    rows = [signal + 2.0, signal, common + noise, common, amplitude * signal]
    write_powers(path, HalfPowers((torch.stack(rows) * counts)[None], counts), PIXEL)


def write_searched(folder: Path, *, error: float = 0.3, name: str = "searched.star") -> None:
    """Images with less noise and less of what is fine, of the same particles in another order."""
    strong = folder.parent / f"{folder.name}_strong"
    if not strong.exists():
        write_project(strong, signal=WEAK + 1)
    raw, more = (torch.from_numpy(read_mrc(each / "Stacks/a.mrcs").copy()) for each in (folder, strong))
    clean = WEAK * (more - raw)
    noise = raw - clean
    rings = transfer(BOX, PIXEL)
    fy, fx = torch.fft.fftfreq(BOX), torch.fft.rfftfreq(BOX)
    ring = ((fy[:, None].square() + fx.square()).sqrt() * BOX).round().long().clamp(max=BOX // 2)
    quiet = QUIET * noise
    images = irfft2(rfft2(clean) * rings[ring], shape=(BOX, BOX)) + quiet
    order = torch.arange(len(images)).flip(0)
    stem = Path(name).stem
    write_mrc(folder / f"Stacks/{stem}.mrcs", (images / SPREAD)[order].numpy(), pixel_size=PIXEL, stack=True)
    powers(folder / f"{stem}.npz", error=error)
    table = read_particles(folder / "particles.star")
    rows = table.rows[order.numpy()].with_columns(
        pl.Series("rlnImageName", [f"{i + 1:06d}@Stacks/{stem}.mrcs" for i in range(len(order))]),
        pl.lit(f"{stem}.npz").alias("hmDenoisingPowers"),
        pl.lit(SPREAD).alias("hmBackgroundStd"),
    )
    optics = table.optics.with_columns(pl.lit("denoised").alias("hmImageKind"))
    write_particles(folder / name, type(table)(optics, rows))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Poses]:
    folder = tmp_path_factory.mktemp("searched") / "project"
    poses = write_project(folder, signal=WEAK)
    table = read_particles(folder / "particles.star")
    n = len(table)
    rows = table.rows.with_columns(
        pl.lit(1.0).alias("hmBackgroundStd"),
        pl.Series("rlnCoordinateX", 10.0 * np.arange(n)),
        pl.Series("rlnCoordinateY", 7.0 * np.arange(n)),
    )
    write_particles(folder / "particles.star", type(table)(table.optics, rows))
    write_searched(folder)
    return folder, poses


@pytest.fixture(scope="module")
def job(project: tuple[Path, Poses]) -> Path:
    return run(project[0], searched=Path("searched.star"))


def test_poses_are_nearer_the_truth_and_their_errors_are_as_stated(project, job):
    folder, poses = project
    raw = errors(run(folder), poses)
    found = errors(job, poses)
    assert float(found.median()) < 0.6 * float(raw.median())
    stated = torch.from_numpy(read_particles(job / "particles.star").rows["hmPoseUncertainty"].to_numpy())
    right = found < 4 * stated
    assert float(right.double().mean()) > 0.8


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
    images = torch.from_numpy(read_mrc(folder / "Stacks/searched.mrcs").copy())
    # Bright images have particles of positive density.
    write_mrc(folder / "Stacks/drawn.mrcs", (images + ball / SPREAD).numpy(), pixel_size=PIXEL, stack=True)
    table = read_particles(folder / "searched.star")
    names = table.rows["rlnImageName"].str.replace("searched.mrcs", "drawn.mrcs", literal=True)
    write_particles(folder / "drawn.star", type(table)(table.optics, table.rows.with_columns(names)))
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
    sums.add(left, transfer, error, scale=torch.ones(4), group=torch.zeros(4, dtype=torch.long))
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
    powers(folder / "poor.npz", error=0.6)
    is_first = pl.col("rlnMicrographName") == "Motion/8000.mrc"
    rows = table.rows.with_columns(
        pl.when(is_first).then(pl.lit("poor.npz")).otherwise("hmDenoisingPowers").alias("hmDenoisingPowers")
    )
    write_particles(folder / "one_poor.star", type(table)(table.optics, rows))
    found = {}
    for name in ("searched.star", "one_poor.star"):
        job = run(folder, searched=Path(name), most_iterations=1)
        rows = read_particles(job / "particles.star").rows
        error = rows["hmPoseUncertainty"].to_numpy()
        first = (rows["rlnMicrographName"] == "Motion/8000.mrc").to_numpy()
        found[name] = float(np.median(error[first]) / np.median(error[~first]))
    assert found["one_poor.star"] > 1.3 * found["searched.star"]


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
    ],
)
def test_images_that_do_not_belong_to_the_particles_are_refused(project, change, said):
    folder, _ = project
    write_particles(folder / "other.star", change(read_particles(folder / "searched.star")))
    with pytest.raises((TableError, HalfmapError), match=said):
        run(folder, searched=Path("other.star"))
