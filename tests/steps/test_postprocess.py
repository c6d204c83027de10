"""Post-processing: resolution, B-factor and local maps of half maps whose truth is known."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
import torch

from halfmap.cli import main
from halfmap.errors import ParameterError, TableError
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.star import read_star, write_star
from halfmap.io.volumes import VIEWING
from halfmap.nets.map_prior import MapPrior, Shape, save_map_prior
from halfmap.ops.filters import b_factor, low_pass
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.fsc import fsc
from halfmap.ops.masks import soft_sphere
from halfmap.project import Project
from halfmap.steps.postprocess.sharpen import fit
from halfmap.steps.postprocess.step import PostprocessStep, SharpenStep

BOX, PIXEL, B = 48, 1.5, 80.0
SHAPE = (BOX,) * 3
MASK = soft_sphere(SHAPE, radius=24.0, edge=8.0, pixel_size=PIXEL)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    monkeypatch.chdir(tmp_path)
    return Project.open(tmp_path)


def random(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def particle() -> torch.Tensor:
    """White within a ball, with one B-factor."""
    ball = soft_sphere(SHAPE, radius=20.0, edge=4.0, pixel_size=PIXEL)
    spectrum = rfft3(random(1) * ball) * b_factor(SHAPE, pixel_size=PIXEL, b_factor=B)
    volume = irfft3(spectrum, shape=SHAPE)
    return volume / volume.std()


def write(name: str, volume: torch.Tensor) -> str:
    write_mrc(name, volume.numpy(), pixel_size=PIXEL, stack=False)
    return name


@pytest.fixture
def halves(project) -> list[str]:
    return [write(f"half{i}.mrc", particle() + 0.25 * random(1 + i)) for i in (1, 2)]


def untrained(project: Project) -> Path:
    """Weights of a network that says what Wiener's filter does, and is said to err by little."""
    network = MapPrior(Shape(filters=8, levels=2, blocks=1))
    error = {"correlation": [0.0, 1.0], "share": [0.01, 0.01], "power": [1.0, 1.0]}
    save_map_prior(project.root / "weights.npz", network, {"error": error})
    return Path("weights.npz")


def run(project: Project, halves: list[str], **how):
    how = {"mask": write("given.mrc", MASK)} | how
    return project.run(PostprocessStep(half1=halves[0], **how))


def test_resolution_b_factor_and_files(project, halves):
    job = run(project, halves)
    star = read_star(job.outputs["curves"])
    general, curves, guinier = (star[name] for name in ("general", "fsc", "guinier"))
    assert general["hmResolutionFine"] <= general["rlnFinalResolution"] <= general["hmResolutionCoarse"]
    assert 3.0 <= general["rlnFinalResolution"] < 4.5
    assert general["rlnBfactorUsedForSharpening"] == pytest.approx(-B, abs=3 * general["hmBfactorError"] + 8)
    assert general["rlnFittedSlopeGuinierPlot"] == pytest.approx(
        general["rlnBfactorUsedForSharpening"] / 4, rel=1e-4
    )
    assert len(curves) == len(guinier) == BOX // 2 + 1
    masked = [torch.from_numpy(read_mrc(name)) * MASK for name in halves]
    np.testing.assert_allclose(
        curves["rlnFourierShellCorrelationMaskedMaps"].to_numpy(), fsc(*masked).numpy(), atol=1e-4
    )
    points = ElementTree.parse(job.outputs["xml"]).getroot().findall("coordinate")
    assert len(points) == BOX // 2 + 1
    assert float(points[5].find("x").text) == pytest.approx(5 / (BOX * PIXEL), abs=1e-6)
    corrected = curves["rlnFourierShellCorrelationCorrected"][5]
    assert float(points[5].find("y").text) == pytest.approx(corrected, abs=1e-4)
    for name in ("fsc", "guinier", "slices"):
        assert job.outputs[name].stat().st_size > 5000


def test_the_map_is_sharpened_and_filtered_as_asked(project, halves):
    job = run(project, halves, b_factor=-60.0, lowpass=5.0, weighting=False, local=False)
    mean = sum(torch.from_numpy(read_mrc(name)) for name in halves) / 2
    passed = low_pass(SHAPE, pixel_size=PIXEL, resolution=5.0)
    expected = rfft3(mean) * b_factor(SHAPE, pixel_size=PIXEL, b_factor=-60.0) * passed
    found = torch.from_numpy(read_mrc(job.outputs["map"]))
    torch.testing.assert_close(found, irfft3(expected, shape=SHAPE), rtol=0, atol=1e-4)
    masked = torch.from_numpy(read_mrc(job.outputs["masked"]))
    torch.testing.assert_close(masked, found * MASK, rtol=0, atol=1e-5)
    assert not (job.folder / "denoised.mrc").exists()


def test_the_detectors_mtf_is_taken_off(project, halves):
    """A map that was multiplied by an MTF comes out as without it."""
    place = np.linspace(0, 0.5, 26)
    table = pl.DataFrame({"rlnResolutionInversePixel": place, "rlnMtfValue": np.exp(-1.5 * place)})
    write_star("mtf.star", {"": table})
    k = torch.fft.fftfreq(BOX)
    radius = (k[:, None, None] ** 2 + k[None, :, None] ** 2 + torch.fft.rfftfreq(BOX) ** 2).sqrt()
    blurred = []
    for i, name in enumerate(halves):
        spectrum = rfft3(torch.from_numpy(read_mrc(name))) * torch.exp(-1.5 * radius)
        blurred.append(write(f"mtf_half{i + 1}.mrc", irfft3(spectrum, shape=SHAPE)))
    how = {"b_factor": 0.0, "weighting": False, "lowpass": 4.0, "local": False}
    plain, detected = run(project, halves, **how), run(project, blurred, mtf="mtf.star", **how)
    one, two = (torch.from_numpy(read_mrc(job.outputs["map"])) for job in (plain, detected))
    assert float((one - two).std()) < 0.02 * float(one.std())


def test_local_maps_are_nearer_to_the_truth(project):
    """Where one side is known to less detail than the other, filtering each to its own is better than one."""
    sharp = particle()
    left = (torch.arange(BOX) < BOX // 2).expand(SHAPE)
    noise = torch.where(left, 0.1, 1.0)
    names = [write(f"half{i}.mrc", sharp + noise * random(5 + i)) for i in (1, 2)]
    job = run(project, names, b_factor=0.0)
    distance = {}
    for name in ("map", "filtered", "denoised"):
        found = torch.from_numpy(read_mrc(job.outputs[name])) * MASK
        distance[name] = float((found - sharp * MASK).square().mean())
    assert distance["filtered"] < 0.8 * distance["map"]
    assert distance["denoised"] < 0.8 * distance["map"]


def test_local_scaling_makes_weak_parts_as_strong(project):
    left = (torch.arange(BOX) < BOX // 2).expand(SHAPE)
    weak = particle() * torch.where(left, 1.0, 0.4)
    names = [write(f"half{i}.mrc", weak + 0.05 * random(5 + i)) for i in (1, 2)]
    job = run(project, names, b_factor=0.0)
    ratio = {}
    for name in ("filtered", "scaled"):
        found = torch.from_numpy(read_mrc(job.outputs[name]))
        ratio[name] = float(found[14:34, 14:34, 28:32].std() / found[14:34, 14:34, 16:20].std())
    assert ratio["filtered"] < 0.6
    assert ratio["scaled"] > 1.3 * ratio["filtered"]


def share_beyond(volume: torch.Tensor, detail: float) -> float:
    """Share of a map's power at what is finer."""
    passed = low_pass(SHAPE, pixel_size=PIXEL, resolution=detail, edge_px=0.0)
    coarse = irfft3(rfft3(volume) * passed, shape=SHAPE)
    return float((volume - coarse).square().sum() / volume.square().sum())


@pytest.mark.parametrize("given", [True, False])
def test_a_steep_b_factor_raises_nothing_beyond_the_resolution(project, given):
    """Neither what weights smear over frequencies, nor noise at the fine side of a band that agrees."""
    blurred = irfft3(rfft3(particle()) * b_factor(SHAPE, pixel_size=PIXEL, b_factor=300.0), shape=SHAPE)
    names = [write(f"half{i}.mrc", blurred / blurred.std() + random(5 + i)) for i in (1, 2)]
    job = run(project, names, b_factor=-B - 300.0, **({} if given else {"mask": None}))
    found = read_star(job.outputs["curves"])["general"]["rlnFinalResolution"]
    assert found > 4.0
    for name in ("filtered", "denoised", "scaled"):
        volume = torch.from_numpy(read_mrc(job.outputs[name]))
        assert share_beyond(volume, found / 1.25) < 0.015, name
        assert share_beyond(volume, found / 1.5) < 0.005, name


def test_a_blurred_part_holds_nothing_finer_than_it_is_known_to(project):
    sharp, blur = particle(), b_factor(SHAPE, pixel_size=PIXEL, b_factor=400.0)
    blurred = irfft3(rfft3(sharp) * blur, shape=SHAPE)
    right = torch.arange(BOX) - BOX // 2
    truth = torch.where((right < 0).expand(SHAPE), sharp, blurred / blurred.std())
    names = [write(f"half{i}.mrc", truth + 0.6 * random(5 + i)) for i in (1, 2)]
    job = run(project, names, b_factor=-2 * B)
    # About two wavelengths from the better part on, with an edge too soft to smear what is coarser.
    dull = (0.5 - 0.5 * torch.cos(math.pi * ((right - 8) / 6).clamp(0, 1))).expand(SHAPE)
    for name in ("filtered", "scaled"):
        volume = torch.from_numpy(read_mrc(job.outputs[name]))
        assert share_beyond(volume * dull, 4.0) < 0.03, name
        assert share_beyond(volume * dull.flip(-1), 4.0) > 0.5, name


def test_the_same_seed_gives_the_same(project, halves):
    one, two = (run(project, halves) for _ in range(2))
    for name in ("map", "scaled"):
        np.testing.assert_array_equal(read_mrc(one.outputs[name]), read_mrc(two.outputs[name]))
    first, second = (read_star(job.outputs["curves"])["general"] for job in (one, two))
    assert first["hmResolutionFine"] == second["hmResolutionFine"]


def test_a_line_is_fitted_with_its_error():
    squared = np.linspace(0, 0.1, 200)
    generator = np.random.default_rng(1)
    found = []
    for _ in range(200):
        noisy = 3 - B / 4 * squared + 0.05 * generator.standard_normal(200)
        found.append(fit(squared, noisy, 10.0, 3.5))
    values = np.array(found)
    assert values[:, 0].mean() == pytest.approx(-B, abs=1.0)
    assert values[:, 1].mean() == pytest.approx(values[:, 0].std(), rel=0.2)
    assert values[:, 2].mean() == pytest.approx(3.0, abs=0.01)


def test_a_map_too_coarse_for_a_b_factor_is_not_sharpened(project, halves):
    found = read_star(run(project, halves).folder / "postprocess.star")["general"]["rlnFinalResolution"]
    job = run(project, halves, guinier_from=1.02 * found)
    star = read_star(job.folder / "postprocess.star")
    assert star["general"]["rlnBfactorUsedForSharpening"] == 0
    assert "the map is not sharpened" in (job.folder / "run.err").read_text()


def test_what_cannot_be_done_says_so(project, halves):
    with pytest.raises(ParameterError, match="cannot be fitted from 10 to 9"):
        run(project, halves, guinier_to=9.0)
    write_star("bad.star", {"": pl.DataFrame({"rlnResolution": [0.1, 0.2]})})
    with pytest.raises(TableError, match="holds no MTF"):
        run(project, halves, mtf="bad.star")
    low = {"rlnResolutionInversePixel": [0.0, 0.5], "rlnMtfValue": [1.0, 0.0]}
    write_star("low.star", {"": pl.DataFrame(low)})
    with pytest.raises(TableError, match="falls to"):
        run(project, halves, mtf="low.star")
    assert main(["postprocess", halves[0], "--half2", halves[0]]) == 2
    assert main(["postprocess", halves[0], "--mtf-pixel-size", "1"]) == 2


def test_what_was_filtered_before_has_no_finer_resolution(project):
    """Nothing but what masks smear is left beyond, and half maps agree in that."""
    passed = low_pass(SHAPE, pixel_size=PIXEL, resolution=7.0)
    names = []
    for i in (1, 2):
        spectrum = rfft3(particle() + 0.25 * random(1 + i)) * passed
        names.append(write(f"half{i}.mrc", irfft3(spectrum, shape=SHAPE) * MASK))
    general = read_star(run(project, names, b_factor=0.0, local=False).outputs["curves"])["general"]
    assert 6.3 < general["rlnFinalResolution"] < 8.0


def test_noise_alone_has_no_resolution(project):
    names = [write(f"half{i}.mrc", random(20 + i)) for i in (1, 2)]
    job = run(project, names, b_factor=0.0)
    general = read_star(job.outputs["curves"])["general"]
    assert general["rlnFinalResolution"] > 12 or math.isinf(general["rlnFinalResolution"])


def test_sharpening_alone_gives_the_map_of_post_processing(project, halves):
    how = {"half1": halves[0], "mask": write("given.mrc", MASK), "b_factor": -50.0}
    job, alone = project.run(PostprocessStep(**how, local=False)), project.run(SharpenStep(**how))
    assert np.array_equal(read_mrc(job.outputs["map"]), read_mrc(alone.outputs["map"]))
    assert np.array_equal(read_mrc(job.outputs["masked"]), read_mrc(alone.outputs["masked"]))
    assert not (alone.folder / "learned.mrc").exists()


@pytest.mark.parametrize("noise", [0.25, 4.0])
def test_a_map_with_a_networks_word_is_marked_and_no_half_map(project, noise, capsys):
    """The untrained network filters as Wiener does, which the sharpened map has too but for amplitudes."""
    halves = [write(f"half{i}.mrc", particle() + noise * random(1 + i)) for i in (1, 2)]
    job = project.run(
        SharpenStep(half1=halves[0], mask=write("given.mrc", MASK), learned=True, weights=untrained(project))
    )
    learned, sharpened = (torch.from_numpy(read_mrc(job.outputs[name])) for name in ("learned", "masked"))
    assert read_header(job.outputs["learned"]).labels == ("Halfmap", VIEWING)
    assert read_header(job.outputs["map"]).labels == ("Halfmap",)
    last = 14 if noise < 1 else 6
    assert float(fsc(learned, sharpened)[2:last].min()) > 0.95
    assert float(fsc(learned, particle() * MASK)[2:last].min()) > 0.9
    path = str(job.outputs["learned"])
    for words in (
        ["postprocess", path, "--half2", path],
        ["compare", path, str(job.outputs["map"])],
        ["import", "map", path],
        ["mask", path],
    ):
        assert main([*words, "--project", "."]) == 2
        assert "is for viewing only: a network had a part in it" in capsys.readouterr().err


def test_weights_without_learned_are_refused(project, halves):
    with pytest.raises(ParameterError, match="--weights are of the network of --learned"):
        SharpenStep(half1=halves[0], weights=Path("weights.npz"))


def test_of_half_maps_that_do_not_agree_a_network_says_nothing(project):
    halves = [write(f"half{i}.mrc", random(1 + i)) for i in (1, 2)]
    job = project.run(
        SharpenStep(half1=halves[0], mask=write("given.mrc", MASK), learned=True, weights=untrained(project))
    )
    assert float(np.abs(read_mrc(job.outputs["learned"])).max()) < 1e-3
