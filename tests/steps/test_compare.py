"""Two maps whose differences, orientation and amplitudes are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfmap.errors import FileFormatError, ParameterError, ShapeError
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.ops.filters import b_factor
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.grids import coordinates
from halfmap.ops.interpolation import rotate_volume
from halfmap.ops.masks import soft_sphere
from halfmap.ops.regrid import regrid
from halfmap.ops.rotations import angular_distance, from_euler
from halfmap.project import Project
from halfmap.search.volume_alignment import inverted
from halfmap.steps.compare.step import CompareStep

BOX, PIXEL = 48, 3.0
SHAPE = (BOX,) * 3
ORIGIN = (-72.0, -72.0, 10.0)
EXTRA = (15.0, -12.0, 6.0)
MASK = soft_sphere(SHAPE, radius=48.0, edge=9.0, pixel_size=PIXEL)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    monkeypatch.chdir(tmp_path)
    return Project.open(tmp_path)


def noise(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def blob(centre: tuple[float, float, float], width: float) -> torch.Tensor:
    where = coordinates(SHAPE, PIXEL)
    return torch.exp(-(where - torch.tensor(centre)).square().sum(-1) / (2 * width**2))


def particle(seed: int = 1) -> torch.Tensor:
    """Sixty blobs of one hand within 40 Å."""
    generator = torch.Generator().manual_seed(seed)
    places = 24 * torch.randn(60, 3, generator=generator)
    places = places * (40 / places.norm(dim=1, keepdim=True)).clamp_max(1)
    x, y, z = places[:, 0].tolist(), places[:, 1].tolist(), places[:, 2].tolist()
    return sum((blob(place, 5.0) for place in zip(x, y, z, strict=True)), torch.zeros(SHAPE))


def write(name: str, volume: torch.Tensor, **how) -> str:
    write_mrc(name, volume.numpy(), **({"pixel_size": PIXEL, "origin": ORIGIN, "stack": False} | how))
    return name


def run(project: Project, a: torch.Tensor, b: torch.Tensor, **how):
    maps = (write("a.mrc", a), write("b.mrc", b))
    job = project.run(CompareStep(maps=maps, **({"mask": write("given.mrc", MASK)} | how)))
    return job, read_star(job.outputs["table"])


def test_what_only_one_map_has_is_found_where_it_is(project):
    truth = particle()
    a = truth + 0.8 * blob(EXTRA, 5.0) + 0.05 * noise(2)
    b = truth + 0.05 * noise(3)
    job, star = run(project, a, b, resolution=10.0)
    regions = star["regions"]
    assert regions.height == 1
    row = regions.row(0, named=True)
    assert row["hmRegionMean"] > 4
    expected = [e + BOX // 2 * PIXEL + o for e, o in zip(EXTRA, ORIGIN, strict=True)]
    found = [row[f"hmRegion{axis}"] for axis in "XYZ"]
    np.testing.assert_allclose(found, expected, atol=1.5 * PIXEL)
    assert star["general"]["hmDifferenceNoise"] == "outside"
    other, turned = run(project, b, a, resolution=10.0)
    assert turned["regions"].row(0, named=True)["hmRegionMean"] < -4
    for name in ("map", "scaled", "difference", "correlation", "mask"):
        assert read_header(job.outputs[name]).pixel_size == pytest.approx(PIXEL)
        assert read_mrc(other.outputs[name]).shape == SHAPE
    for name in ("fsc", "slices"):
        assert job.outputs[name].stat().st_size > 5000
    difference, correlation = (read_mrc(job.outputs[name]) for name in ("difference", "correlation"))
    place = tuple(round(e / PIXEL) + BOX // 2 for e in EXTRA[::-1])
    assert difference[place] > 4
    inside = (MASK > 0.5).numpy()
    assert correlation[place] < np.median(correlation[inside]) - 0.05
    assert (correlation[(MASK == 0).numpy()] == 0).all()


@pytest.mark.parametrize("seed", [10, 20, 30])
def test_noise_is_no_difference(project, seed):
    truth = particle(seed)
    _, star = run(project, truth + 0.1 * noise(seed + 1), truth + 0.1 * noise(seed + 2))
    assert "regions" not in star


def test_half_maps_tell_how_strong_noise_is_where(project):
    """Of equal maps as many voxels are off by three deviations as chance makes, wherever they are."""
    truth, uneven = particle(), 0.04 * (1 + 3 * blob((-40.0, 0.0, 0.0), 40.0))
    halves = {name: truth + uneven * noise(seed) for seed, name in enumerate(("a1", "a2", "b1", "b2"), 2)}
    files = {f"half_{name[0]}": write(f"{name[0]}_half1.mrc", halves[name]) for name in ("a1", "b1")}
    for name in ("a2", "b2"):
        write(f"{name[0]}_half2.mrc", halves[name])
    a, b = (halves[f"{name}1"] + halves[f"{name}2"] for name in "ab")
    # A map that was filtered, scaled and masked is of its half maps all the same.
    b = MASK * irfft3(rfft3(3 * b) * b_factor(SHAPE, pixel_size=PIXEL, b_factor=100.0), shape=SHAPE)
    job, star = run(project, a / 2, b, resolution=9.0, **files)
    assert star["general"]["hmDifferenceNoise"] == "halves"
    sigmas, inside = torch.from_numpy(read_mrc(job.outputs["difference"])), MASK > 0.99
    for part in (inside & (uneven > 0.1), inside & (uneven < 0.06)):
        # A hundred independent numbers and more.
        assert float(sigmas[part].square().mean().sqrt()) == pytest.approx(1, abs=0.15)
    assert float((sigmas[inside].abs() > 3).float().mean()) < 2 * 0.0027
    blind, _ = run(project, a / 2, b, resolution=9.0)
    spread = torch.from_numpy(read_mrc(blind.outputs["difference"]))
    assert float((spread[inside].abs() > 3).float().mean()) > 4 * 0.0027
    with pytest.raises(ParameterError, match="give --half-a and --half-b, or none"):
        CompareStep(maps=("a.mrc", "b.mrc"), half_a="a_half1.mrc")
    small = {**files, "half_a": write("small_half1.mrc", halves["a1"][:24, :24, :24].clone())}
    write("small_half2.mrc", halves["a2"][:24, :24, :24].clone())
    with pytest.raises(ShapeError, match="give a half map of this map"):
        run(project, a / 2, b, **small)


def test_amplitudes_are_matched(project):
    truth = particle()
    a = truth + 0.02 * noise(2)
    blurred = 3 * irfft3(rfft3(a) * b_factor(SHAPE, pixel_size=PIXEL, b_factor=150.0), shape=SHAPE) + 7
    _, star = run(project, a, blurred + 0.01 * noise(3), resolution=12.0)
    fsc = star["fsc"]
    shells = fsc["rlnResolution"].to_numpy()
    expected = np.exp(150 / 4 * shells**2) / 3
    used = (shells > 0.02) & (shells < 1 / 14)
    np.testing.assert_allclose(fsc["hmAmplitudeFactor"].to_numpy()[used], expected[used], rtol=0.05)
    assert star["general"]["hmMapCorrelation"] > 0.99
    assert star["general"]["rlnFinalResolution"] < 10
    _, one = run(project, a, 3 * a + 0.01 * noise(3), match_amplitudes=False)
    assert one["general"]["hmAmplitudeFactor"] == pytest.approx(1 / 3, rel=0.01)


def test_another_box_and_voxel_size_is_the_same_map(project):
    truth = particle()
    other = regrid(truth, pixel_size=PIXEL, box=70, new_pixel_size=2.1)
    maps = (write("a.mrc", truth + 0.02 * noise(2)), write("b.mrc", other, pixel_size=2.1))
    job = project.run(CompareStep(maps=maps, mask=write("given.mrc", MASK)))
    on_a = torch.from_numpy(read_mrc(job.outputs["map"]))
    inside = MASK > 0.5
    torch.testing.assert_close(on_a[inside], truth[inside], atol=0.01, rtol=0)
    assert read_star(job.outputs["table"])["general"]["hmMapCorrelation"] > 0.995


def test_curves_end_where_the_coarser_map_does(project):
    truth = particle()
    coarse = regrid(truth + 0.05 * noise(4), pixel_size=PIXEL, box=30, new_pixel_size=4.8)
    maps = (write("a.mrc", truth + 0.05 * noise(2)), write("b.mrc", coarse, pixel_size=4.8))
    job = project.run(CompareStep(maps=maps, mask=write("given.mrc", MASK)))
    star = read_star(job.outputs["table"])
    assert star["fsc"]["rlnSpectralIndex"].max() == 15
    assert star["general"]["hmComparedResolution"] >= 9.6 - 1e-6


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_turned_map_is_brought_back(project, mirrored):
    truth = particle()
    turn = from_euler(torch.tensor([30.0, 50.0, -20.0], dtype=torch.float64))
    moved = torch.roll(truth, (2, -1, 3), dims=(0, 1, 2))
    b = rotate_volume(inverted(moved) if mirrored else moved, turn, method="cubic") + 0.02 * noise(3)
    _, star = run(project, truth + 0.02 * noise(2), b, align=True)
    general = star["general"]
    assert general["hmMirrored"] == int(mirrored)
    found = from_euler(torch.tensor([general[f"rlnAngle{each}"] for each in ("Rot", "Tilt", "Psi")]).double())
    assert float(angular_distance(found @ turn, torch.eye(3).double())) < 1.5
    assert general["hmAlignedCorrelation"] > general["hmOtherHandCorrelation"] + 0.2
    assert general["hmMapCorrelation"] > 0.97
    assert general["hmResolutionHalf"] < 12


def test_without_noise_around_differences_are_over_their_spread(project, caplog):
    truth = particle()
    a, b = (MASK * (truth + 0.05 * noise(seed)) for seed in (2, 3))
    _, star = run(project, a, b)
    assert star["general"]["hmDifferenceNoise"] == "inside"
    assert "there is no noise around the particle" in caplog.text


def test_without_a_mask_one_is_made(project):
    truth = particle()
    _, star = run(project, truth + 0.05 * noise(2), truth + 0.05 * noise(3), mask=None)
    assert star["general"]["rlnFinalResolution"] < 12
    assert "rlnMaskName" not in star["general"]


def test_what_cannot_be_compared_says_so(project):
    truth = particle() + 0.02 * noise(2)
    with pytest.raises(FileFormatError, match=r"is the same map as a\.mrc: there is nothing to compare"):
        run(project, truth, truth)
    with pytest.raises(FileFormatError, match="but for a factor of 2: there is nothing"):
        run(project, truth, 2 * truth + 1)
    broken = truth.clone()
    broken[3, 4, 5] = torch.nan
    with pytest.raises(FileFormatError, match="1 voxels that are NaN"):
        run(project, truth, broken)
    with pytest.raises(ParameterError, match="the maps correlate at no resolution"):
        run(project, noise(5), noise(6))
    maps = (write("a.mrc", truth), write("b.mrc", truth[:24, :24, :24].clone(), pixel_size=0.5))
    with pytest.raises(ParameterError, match="is 12 Å wide"):
        project.run(CompareStep(maps=maps))
    with pytest.raises(ShapeError, match="the mask has 24³ voxels"):
        run(project, truth, truth + noise(3), mask=write("small.mrc", MASK[:24, :24, :24].clone()))
    with pytest.raises(ParameterError, match="is no mask"):
        run(project, truth, truth + noise(3), mask=write("none.mrc", 3 * MASK))
    with pytest.raises(ParameterError, match="two maps are compared, not 3"):
        project.run(CompareStep(maps=("a.mrc", "b.mrc", "given.mrc")))
    with pytest.raises(FileFormatError, match="is the same map as a"):
        project.run(CompareStep(maps=("a.mrc", "a.mrc")))
