"""Denoising: halves and back, dependent halves refused, a small training, what is measured of its images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.data import MicrographSet
from halfmap.errors import FileFormatError, HalfmapError, ItemsFailedError, ParameterError, TableError
from halfmap.io.denoised import read_powers
from halfmap.io.micrographs import list_micrographs
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_micrographs, write_micrographs
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft2, rfft2
from halfmap.ops.signal_bias import HalfPowers, half_powers, joined_at
from halfmap.project import Project
from halfmap.steps import load_steps
from halfmap.steps.denoise import apply, halves, measure
from halfmap.steps.denoise.defocus import Defoci
from halfmap.steps.denoise.step import DenoiseApply, DenoiseMeasure, DenoiseTrain

load_steps()

SHAPE, PIXEL, COARSE = (320, 384), 1.0, 2.0


def blobs(seed: int) -> NDArray[np.float32]:
    """Dark discs of 16 px in places by chance: what there is to be learned."""
    rng = np.random.default_rng(seed)
    image = np.zeros(SHAPE)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    for cy, cx in zip(rng.uniform(0, SHAPE[0], 60), rng.uniform(0, SHAPE[1], 60), strict=True):
        image -= 1.0 / (1.0 + np.exp(np.hypot(y - cy, x - cx) - 8.0))
    return image.astype(np.float32)


def noise(seed: int, scale: float = 1.5) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, scale, SHAPE).astype(np.float32)


def write_halves(
    root: Path, number: int, *, pattern: NDArray | None = None, same: bool = False, shared: float = 0.0
) -> dict[str, str]:
    signal = blobs(number) + (0.0 if pattern is None else pattern)
    both = noise(300 + number, abs(shared))
    even = 50.0 + signal + noise(100 + number) + both
    odd = even if same else 50.0 + signal + noise(200 + number) + np.sign(shared) * both
    names = {}
    for label, image, end in (
        ("rlnMicrographName", even + odd, ""),
        ("rlnMicrographNameEven", even, "_EVN"),
        ("rlnMicrographNameOdd", odd, "_ODD"),
    ):
        names[label] = f"m{number}{end}.mrc"
        write_mrc(root / names[label], image, pixel_size=PIXEL)
    return names


def table(root: Path, numbers, **how) -> Path:
    rows = [write_halves(root, number, **how) | {"rlnOpticsGroup": 1} for number in numbers]
    optics = {
        "rlnOpticsGroup": [1],
        "rlnOpticsGroupName": ["one"],
        "rlnMicrographPixelSize": [PIXEL],
        "rlnMicrographOriginalPixelSize": [PIXEL],
        "rlnVoltage": [300.0],
        "rlnSphericalAberration": [2.7],
        "rlnAmplitudeContrast": [0.1],
    }
    write_micrographs(root / "micrographs.star", MicrographSet(pl.DataFrame(optics), pl.DataFrame(rows)))
    return Path("micrographs.star")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    return Project.open(tmp_path)


def loaded(root: Path, pixel_size: float = COARSE) -> halves.Halves:
    path = root / table(root, [1])
    (item,) = halves.list_halves(read_micrographs(path), lambda name: root / name, use_ctf=False)
    return halves.load_halves(item, pixel_size)


def test_halves_are_normalised_about_each_place_and_come_back(project: Project):
    seen = loaded(project.root)
    assert seen.values.shape == (2, SHAPE[0] // 2, SHAPE[1] // 2)
    assert seen.pixel_size == pytest.approx(2.0)
    assert float(seen.values.mean().abs()) < 0.02
    assert float(seen.values.std()) == pytest.approx(1.0, abs=0.05)
    even = torch.from_numpy(read_mrc(project.root / "m1_EVN.mrc").squeeze())
    odd = torch.from_numpy(read_mrc(project.root / "m1_ODD.mrc").squeeze())
    back = seen.restored(seen.values.mean(0))
    keeps = low_pass(SHAPE, pixel_size=PIXEL, resolution=6.0)
    wanted, found = (irfft2(rfft2(image) * keeps, shape=SHAPE) for image in ((even + odd) / 2, back))
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0)
    assert abs(seen.correlation) < 0.03


def test_nothing_is_invented_beyond_the_coarse_pixels(project: Project):
    seen = loaded(project.root)
    spectrum = rfft2(seen.restored(seen.values.mean(0))).abs()
    assert float(spectrum[SHAPE[0] // 4 + 1 : SHAPE[0] // 2].max()) < 1e-2 * float(
        spectrum[1:10, 1:10].mean()
    )


def test_phases_are_flipped_back(project: Project):
    path = project.root / table(project.root, [1])
    (item,) = halves.list_halves(read_micrographs(path), lambda name: project.root / name, use_ctf=False)
    optics = {"defocus_u": 8000.0, "defocus_v": 8000.0, "defocus_angle": 0.0, "voltage_kV": 300.0}
    optics |= {"cs_mm": 2.7, "amplitude_contrast": 0.1}
    flipped = halves.load_halves(replace(item, optics=optics), COARSE, flip=True)
    plain = halves.load_halves(item, COARSE)
    assert not torch.allclose(flipped.values, plain.values, atol=0.5)
    torch.testing.assert_close(
        flipped.restored(flipped.values.mean(0)), plain.restored(plain.values.mean(0)), atol=2e-3, rtol=0
    )
    with pytest.raises(FileFormatError, match="no CTF to flip"):
        halves.load_halves(item, COARSE, flip=True)


def test_sums_of_another_micrograph_are_refused(project: Project):
    """By its noise; where frames count by their dose in the micrograph itself, too."""
    path = project.root / table(project.root, [1, 2])
    first, second = halves.list_halves(
        read_micrographs(path), lambda name: project.root / name, use_ctf=False
    )
    halves.load_halves(first, COARSE)
    with pytest.raises(FileFormatError, match=r"m2_ODD\.mrc: is no sum of frames of m1\.mrc"):
        halves.load_halves(replace(first, odd=second.odd), COARSE)
    even, odd = (read_mrc(each).squeeze() for each in (first.even, first.odd))
    write_mrc(project.root / "m1.mrc", (1.6 * even + 0.4 * odd).astype(np.float32), pixel_size=PIXEL)
    halves.load_halves(first, COARSE)


TINY = {"pixel_size": COARSE, "patch": 64, "batch": 4}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"same": True}, "even and odd sums are one image"),
        ({"shared": 0.7}, "noise of even and odd sums is related"),
        ({"shared": -0.7}, "noise of even and odd sums is related"),
        ({"pattern": noise(7, 1.0)}, "micrographs have a pattern in common"),
        ({"pattern": noise(7, 0.45)}, "micrographs have a pattern in common"),
    ],
)
def test_halves_that_are_not_independent_are_refused(project: Project, how, said: str):
    with pytest.raises(ParameterError, match=said):
        project.run(DenoiseTrain(micrographs=(table(project.root, [1, 2, 3], **how),), steps=1, **TINY))


def test_a_table_without_halves_is_refused(project: Project):
    path = table(project.root, [1, 2])
    kept = read_micrographs(project.root / path)
    write_micrographs(
        project.root / path, MicrographSet(kept.optics, kept.rows.drop("rlnMicrographNameEven", strict=False))
    )
    with pytest.raises(TableError, match="names no sums of even and odd frames"):
        project.run(DenoiseTrain(micrographs=(path,), steps=1, **TINY))


def test_counts_are_parted_into_independent_halves(tmp_path: Path):
    rng = np.random.default_rng(1)
    counts = rng.poisson(20.0 + 4.0 * blobs(1)).astype(np.float32)
    write_mrc(tmp_path / "counts.mrc", counts, pixel_size=PIXEL)
    path = tmp_path / "counts.mrc"
    item = halves.HalvesItem(
        name="counts.mrc", key="counts", path=path, pixel_size=PIXEL, even=path, odd=path, seed=3
    )
    seen = halves.load_halves(item, PIXEL)
    assert abs(seen.correlation) < 0.03
    low = low_pass(SHAPE, pixel_size=PIXEL, resolution=20.0)
    even, odd = (irfft2(rfft2(half) * low, shape=SHAPE).flatten() for half in seen.values)
    assert float(torch.corrcoef(torch.stack([even, odd]))[0, 1]) > 0.6
    write_mrc(tmp_path / "scaled.mrc", counts * 10, pixel_size=PIXEL)
    with pytest.raises(FileFormatError, match=r"scatters (9\.[89]|10)\d* times .*--electron (9\.[89]|10)"):
        halves.load_halves(replace(item, even=tmp_path / "scaled.mrc"), PIXEL)
    scaled = halves.load_halves(replace(item, even=tmp_path / "scaled.mrc", electron=10.0), PIXEL)
    assert abs(scaled.correlation) < 0.03
    same = (2 * scaled.whole - torch.from_numpy(counts * 10)).abs() < 1e-3
    assert float(same.float().mean()) > 0.999, "on the image's own scale, but for mended pixels"
    with pytest.raises(FileFormatError, match="times as much as counts"):
        halves.load_halves(replace(item, even=tmp_path / "scaled.mrc", electron=12.0), PIXEL)


@pytest.mark.parametrize("mean", [0.6, 1.5, 2.8, 40.0])
@pytest.mark.parametrize("factor", [1.0, 3.0, 32.0])
def test_counts_are_told_at_any_dose_and_however_multiplied(tmp_path: Path, mean: float, factor: float):
    rng = np.random.default_rng(4)
    slope = np.linspace(0.8, 1.2, SHAPE[1])
    counts = (factor * rng.poisson(mean * slope, SHAPE)).astype(np.float32)
    counts[5, 7], counts[90, 100] = np.nan, 1e4
    path = tmp_path / "counts.mrc"
    write_mrc(path, counts, pixel_size=PIXEL)
    item = halves.HalvesItem(
        name="counts.mrc", key="counts", path=path, pixel_size=PIXEL, even=path, odd=path, seed=3
    )
    if factor > 1:
        with pytest.raises(FileFormatError, match="--electron"):
            halves.raw_halves(item)
    even, odd = halves.raw_halves(replace(item, electron=factor))
    flat = [half - half.mean(0) for half in (even, odd)]
    assert abs(np.corrcoef(flat[0].ravel(), flat[1].ravel())[0, 1]) < 0.015
    again, _ = halves.raw_halves(replace(item, electron=factor))
    np.testing.assert_array_equal(even, again)
    other = tmp_path / "other.mrc"
    write_mrc(other, counts, pixel_size=PIXEL)
    _, apart = halves.raw_halves(replace(item, even=other, electron=factor))
    assert not np.array_equal(odd, apart), "two files do not share their coins"


def test_signal_is_not_taken_for_scatter(tmp_path: Path):
    """Particles and ice make counts differ from pixel to pixel as well, but hardly at the finest detail."""
    passed = low_pass(SHAPE, pixel_size=PIXEL, resolution=4.0 * PIXEL)
    fine = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    signal = irfft2(rfft2(fine) * passed, shape=SHAPE).numpy()
    expected = 60.0 * (1 + 0.12 * signal / signal.std())
    counts = np.random.default_rng(6).poisson(expected.clip(0)).astype(np.float64)
    assert counts.var() / counts.mean() > 1.6
    assert halves._scatter_over_mean(counts) == pytest.approx(1.0, abs=0.02)


def test_values_between_whole_numbers_are_parted_too(tmp_path: Path):
    """As of counts that were shifted by parts of a pixel in Fourier space, and multiplied."""
    spectrum = np.fft.rfft2(np.random.default_rng(5).poisson(30.0, SHAPE))
    shifted = np.fft.irfft2(spectrum * np.exp(-2j * np.pi * 0.3 * np.fft.rfftfreq(SHAPE[1])), s=SHAPE)
    path = tmp_path / "counts.mrc"
    write_mrc(path, (100 * shifted).astype(np.float32), pixel_size=PIXEL)
    item = halves.HalvesItem(
        name="counts.mrc", key="counts", path=path, pixel_size=PIXEL, even=path, odd=path, seed=3
    )
    even, odd = halves.raw_halves(replace(item, electron=100.0))
    assert abs(np.corrcoef(even.ravel(), odd.ravel())[0, 1]) < 0.015
    np.testing.assert_allclose(even + odd, 100 * shifted, atol=0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Path]:
    root = tmp_path_factory.mktemp("denoise")
    project = Project.open(root)
    table(root, range(1, 7))
    step = DenoiseTrain(micrographs=(root / "micrographs.star",), steps=150, learning_rate=4e-3, **TINY)
    return project, project.run(step).outputs["model"]


def truth_correlation(image: Tensor, number: int) -> float:
    signal = torch.from_numpy(blobs(number))
    return float(torch.corrcoef(torch.stack([image.flatten(), signal.flatten()]))[0, 1])


def test_a_network_finds_what_halves_have_in_common(trained: tuple[Project, Path]):
    project, model = trained
    table(project.root, [11, 12])
    job = project.run(DenoiseApply(micrographs=project.root / "micrographs.star", model=model))
    made = read_micrographs(job.outputs["micrographs"])
    names = made.rows["hmMicrographNameDenoised"].to_list()
    for number, name in zip((11, 12), names, strict=True):
        raw = torch.from_numpy(read_mrc(project.root / f"m{number}.mrc").squeeze().astype(np.float32))
        best = max(
            truth_correlation(
                irfft2(rfft2(raw) * low_pass(SHAPE, pixel_size=PIXEL, resolution=d), shape=SHAPE), number
            )
            for d in (8.0, 12.0, 16.0, 20.0, 28.0)
        )
        denoised = torch.from_numpy(read_mrc(project.root / name).squeeze())
        assert truth_correlation(denoised, number) > best, "better than the best low-pass filter"
    powers, pixel_size = read_powers(job.folder / "powers/m11.npz")
    assert pixel_size == pytest.approx(2.0)
    whole = powers.total()
    assert float(whole.noise_after) < 0.2 * float(whole.noise_before)
    row = made.rows.to_dicts()[0]
    assert row["hmSnrDenoised"] > 5 * row["hmSnrRaw"]
    assert 0 < row["hmSignalToNoiseAndBias"] < row["hmSnrDenoised"]
    assert (job.folder / "pictures/m11.png").exists() and (job.folder / "summary.png").exists()


def test_a_merged_micrograph_is_the_raw_one_beyond_where_they_meet(trained: tuple[Project, Path]):
    project, model = trained
    table(project.root, [11, 12])
    job = project.run(
        DenoiseApply(micrographs=project.root / "micrographs.star", model=model, pictures=False)
    )
    row = read_micrographs(job.outputs["micrographs"]).rows.to_dicts()[0]
    merged = torch.from_numpy(read_mrc(project.root / row["hmMicrographNameMerged"]).squeeze())
    raw = torch.from_numpy(read_mrc(project.root / "m11.mrc").squeeze().astype(np.float32))
    meets = row["hmMergedResolution"]
    assert 2 * COARSE < meets < 60
    difference = rfft2(merged - raw).abs()
    frequency = np.hypot(np.fft.fftfreq(SHAPE[0])[:, None], np.fft.rfftfreq(SHAPE[1]))
    beyond = torch.from_numpy(frequency > 1.3 / meets + 0.03)
    assert float(difference[beyond].square().mean()) < 0.01 * float(rfft2(raw).abs()[beyond].square().mean())
    # What is raw in both would hide it.
    keeps = low_pass(SHAPE, pixel_size=PIXEL, resolution=meets)
    low = [irfft2(rfft2(image) * keeps, shape=SHAPE) for image in (merged, raw)]
    assert truth_correlation(low[0], 11) > truth_correlation(low[1], 11) + 0.05


def test_rings_where_the_network_errs_more_are_raw():
    """Signal 1 everywhere, noise 4; from ring 40 on the network adds bias of its own."""
    counts = torch.ones(65, dtype=torch.float64)
    bias = torch.where(torch.arange(65) >= 40, 8.0, 0.0).double()
    rows = [torch.full((65,), 5.0).double(), torch.ones(65).double()]
    rows += [0.25 + bias + 0.1, 0.25 + bias, torch.full((65,), 0.5).double()]
    powers = HalfPowers(torch.stack(rows)[None], counts)
    ring, gain = joined_at(powers)
    assert 36 <= ring <= 44
    torch.testing.assert_close(gain[:30], torch.full((30,), 2.0).double())


def test_one_poor_ring_does_not_keep_a_merged_micrograph_raw():
    counts = torch.ones(65, dtype=torch.float64)
    beside = torch.where(torch.arange(65) <= 4, 3.0, 0.0).double()
    signal = torch.ones(65).double()
    signal[21:25] = -0.001  # by chance
    rows = [signal + 4.0, signal, 0.25 * signal + beside + 0.1, 0.25 * signal + beside, 0.5 * signal]
    ring, gain = joined_at(HalfPowers(torch.stack(rows)[None], counts))
    assert ring == 64
    torch.testing.assert_close(gain, torch.full((65,), 2.0).double())


def test_what_follows_takes_the_images_that_are_asked_for(project: Project):
    path = project.root / table(project.root, [1, 2])
    kept = read_micrographs(path)
    new = pl.Series("hmMicrographNameDenoised", ["d1.mrc", "d2.mrc"])
    micrographs = MicrographSet(kept.optics, kept.rows.with_columns(new))
    for images, names in (("raw", ["m1.mrc", "m2.mrc"]), ("denoised", ["d1.mrc", "d2.mrc"])):
        items = list_micrographs(micrographs, Path, use_ctf=False, images=images)
        assert [item.path.name for item in items] == names
        assert [item.name for item in items] == ["m1.mrc", "m2.mrc"]
    with pytest.raises(TableError, match="row 1: names no merged micrograph; make them with"):
        list_micrographs(micrographs, Path, use_ctf=False, images="merged")


def test_a_training_goes_on_with_a_model_as_it_was_made(trained: tuple[Project, Path]):
    project, model = trained
    table(project.root, [21, 22])
    path = project.root / "micrographs.star"
    job = project.run(DenoiseTrain(micrographs=(path,), model=model, steps=2, **TINY))
    assert job.outputs["model"].exists()
    with pytest.raises(ParameterError, match="was trained at 2 Å/px"):
        project.run(DenoiseTrain(micrographs=(path,), model=model, steps=2, **TINY | {"pixel_size": 3.0}))


def test_what_cannot_be_measured_costs_nothing_else(trained: tuple[Project, Path]):
    """No voltage for the CTF; images of an earlier job; halves that are one image."""
    project, model = trained
    path = project.root / table(project.root, [11, 12])
    first = project.run(DenoiseApply(micrographs=path, model=model, pictures=False))
    again = project.run(
        DenoiseApply(micrographs=first.outputs["micrographs"], model=model, pictures=False, merge=False)
    )
    made = read_micrographs(again.outputs["micrographs"])
    assert "hmMicrographNameMerged" not in made.rows.columns, "that of the job before"
    write_micrographs(path, MicrographSet(made.optics.drop("rlnVoltage"), made.rows))
    job = project.run(DenoiseMeasure(micrographs=path))
    assert job.outputs["table"].exists() and not (job.folder / "defocus.png").exists()
    assert "defoci are not compared" in (job.folder / "run.err").read_text()
    table(project.root, [13], same=True)
    with pytest.raises(ItemsFailedError, match="even and odd sum are one image"):
        project.run(DenoiseApply(micrographs=path, model=model, pictures=False))
    table(project.root, [13, 14], shared=0.5)
    related = project.run(DenoiseApply(micrographs=path, model=model, pictures=False))
    found = read_micrographs(related.outputs["micrographs"]).rows["hmHalvesCorrelation"].to_numpy()
    assert found == pytest.approx([0.1, 0.1], abs=0.04)
    assert "noise, bias and ratios is wrong" in (related.folder / "run.err").read_text()


def test_pixels_coarser_than_a_network_knows_are_told(trained: tuple[Project, Path]):
    project, model = trained
    path = project.root / table(project.root, [11])
    kept = read_micrographs(path)
    size = pl.lit(3.0)
    optics = kept.optics.with_columns(rlnMicrographPixelSize=size, rlnMicrographOriginalPixelSize=size)
    write_micrographs(path, MicrographSet(optics, kept.rows))
    job = project.run(DenoiseApply(micrographs=path, model=model, pictures=False))
    assert "pixels of 3 Å are coarser than those of 2 Å" in (job.folder / "run.err").read_text()
    with pytest.raises(ParameterError, match="coarser than --pixel-size 2; give --pixel-size 3"):
        project.run(DenoiseTrain(micrographs=(path,), steps=1, **TINY))


def test_one_bad_half_stops_no_other(trained: tuple[Project, Path]):
    project, model = trained
    table(project.root, [11, 12])
    (project.root / "m12_ODD.mrc").write_bytes(b"no image")
    job = project.run(
        DenoiseApply(micrographs=project.root / "micrographs.star", model=model, pictures=False)
    )
    assert len(read_micrographs(job.outputs["micrographs"]).rows) == 1
    (project.root / "m11_EVN.mrc").unlink()
    with pytest.raises((ItemsFailedError, HalfmapError)):
        project.run(DenoiseApply(micrographs=project.root / "micrographs.star", model=model))


def test_what_denoising_did_is_measured(trained: tuple[Project, Path]):
    project, model = trained
    table(project.root, [11, 12])
    done = project.run(
        DenoiseApply(micrographs=project.root / "micrographs.star", model=model, pictures=False)
    )
    job = project.run(DenoiseMeasure(micrographs=done.outputs["micrographs"], defocus=False))
    blocks = read_star(job.outputs["table"])
    each, rings = blocks["micrographs"], blocks["rings"]
    assert isinstance(each, pl.DataFrame) and isinstance(rings, pl.DataFrame)
    assert each["rlnMicrographName"].to_list() == ["m11.mrc", "m12.mrc"]
    assert len(rings) == 80 and rings["rlnAngstromResolution"][-1] == pytest.approx(2 * COARSE)
    low = rings.filter(pl.col("rlnAngstromResolution") > 20)
    assert (low["hmNoisePowerDenoised"] < low["hmNoisePowerRaw"]).all()
    assert low["hmSignalTransfer"].median() == pytest.approx(1.0, abs=0.3)
    assert (low["hmSsnrDenoised"].median() or 0) > (low["hmSsnrRaw"].median() or 0)
    assert (rings["hmBiasPowerError"] > 0).all()
    with pytest.raises(TableError, match="has no hmMicrographNameDenoised"):
        project.run(DenoiseMeasure(micrographs=project.root / "micrographs.star"))


def test_defoci_that_differ_are_counted():
    names = [f"{i}" for i in range(4)]
    found = Defoci(names, np.array([1e4, 1e4, 2e4, 2e4]), np.array([10150.0, 9700.0, 20000.0, 25000.0]))
    assert found.agree.tolist() == [True, False, True, False]


def test_a_micrograph_that_is_denoised_badly_stays_raw(project: Project):
    """No signal is passed on at low frequencies: nothing is joined."""
    seen = loaded(project.root)
    counts = torch.ones(65, dtype=torch.float64)
    ones = torch.ones(65).double()
    powers = HalfPowers(torch.stack([5 * ones, ones, 0.3 * ones, 0.2 * ones, 0 * ones])[None], counts)
    image, resolution = apply.merged(seen, seen.values.mean(0), powers)
    assert resolution == 999.0
    torch.testing.assert_close(image, 2 * seen.whole)


def test_fainter_images_have_no_better_ratio():
    ones = torch.ones(65).double()
    rows = [5 * ones, ones, 0.3 * ones, 0.25 * ones, 0.5 * ones]
    fainter = [rows[0], rows[1], 0.01 * rows[2], 0.01 * rows[3], 0.1 * rows[4]]
    one, other = (apply.figures(HalfPowers(torch.stack(each)[None], ones)) for each in (rows, fainter))
    assert one["snr_after"] == pytest.approx(other["snr_after"])


def test_rings_that_lose_are_told_from_chance():
    """Noise that is added to halves costs their ratio; one and the same filter for both does not."""
    generator = torch.Generator().manual_seed(2)
    signal, *noises = (torch.randn(256, 256, generator=generator) for _ in range(5))
    raw = signal + noises[0], signal + noises[1]
    noisier = raw[0] + noises[2], raw[1] + noises[3]
    smooth = low_pass((256, 256), pixel_size=1.0, resolution=20.0)
    filtered = irfft2(rfft2(torch.stack(raw)) * (0.2 + smooth), shape=(256, 256))

    def lost(denoised: tuple[Tensor, Tensor]) -> float:
        powers = half_powers(raw, denoised, size=64)
        return measure.rings_that_lost(measure.ring_table(powers, 1.0), 4.0)

    assert lost(noisier) > 0.9
    assert lost((filtered[0], filtered[1])) < 0.1
    one = measure.ring_table(half_powers(raw, noisier, size=64).pooled(), 1.0)
    assert measure.rings_that_lost(one, 4.0) == 0.0, "of one window nothing is known"
    # Other noise of the same strength changes rings by chance.
    false = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(10 + seed)
        same, *others = (torch.randn(256, 256, generator=generator) for _ in range(5))
        pairs = (same + others[0], same + others[1]), (same + others[2], same + others[3])
        rings = measure.ring_table(half_powers(*pairs, size=64), 1.0)
        false.append(measure.rings_that_lost(rings, 2.0))
    assert 0.005 < np.mean(false) < 0.08, "a fortieth, and somewhat more as windows overlap"


def test_the_general_model_needs_no_training_and_can_be_gone_on_with(project: Project, trained):
    path = project.root / table(project.root, [31, 32])
    job = project.run(DenoiseApply(micrographs=path, pictures=False, merge=False))
    name = read_micrographs(job.outputs["micrographs"]).rows["hmMicrographNameDenoised"][0]
    raw, denoised = (
        torch.from_numpy(read_mrc(project.root / each).squeeze().astype(np.float32))
        for each in ("m31.mrc", name)
    )
    assert truth_correlation(denoised, 31) > truth_correlation(raw, 31) + 0.2
    how = {"micrographs": (path,), "general": True, "steps": 1, **TINY}
    assert project.run(DenoiseTrain(**how | {"pixel_size": 1.5})).outputs["model"].exists()
    with pytest.raises(ParameterError, match=r"was trained at 1\.5 Å/px"):
        project.run(DenoiseTrain(**how))
    with pytest.raises(ParameterError, match="there are two models to go on with"):
        project.run(DenoiseTrain(**how | {"model": trained[1]}))
    with pytest.raises(ParameterError, match="the general model is a small, wide network"):
        project.run(DenoiseTrain(**how | {"size": "full"}))
