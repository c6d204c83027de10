"""Findings on maps and particles whose truth is known."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from refine_simulation import BOX as IMAGE_BOX
from refine_simulation import DIAMETER, PIXEL, write_project

from halfmap.cli import main
from halfmap.data import Poses
from halfmap.engine import Context
from halfmap.errors import ParameterError, ResourceError, TableError
from halfmap.io.mrc import write_mrc
from halfmap.io.star import write_star
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.fourier import irfft3, rfft2, rfft3
from halfmap.ops.fsc import corrected_fsc, fsc, resolution
from halfmap.ops.fsc_interval import Interval
from halfmap.ops.grids import ring_index
from halfmap.ops.interpolation import rotate_volume
from halfmap.ops.masks import soft_sphere
from halfmap.ops.rotations import from_euler, random_rotations, to_rotation_vector, view_direction
from halfmap.search.prepared import prepare
from halfmap.search.projector import SplineVolume, sample_slices
from halfmap.steps.validate import checks, controls, examine, overfitting, restart
from halfmap.steps.validate.agreement import check_agreement
from halfmap.steps.validate.controls import Control, random_phases
from halfmap.steps.validate.directions import check_directions
from halfmap.steps.validate.finding import Finding
from halfmap.steps.validate.growing import check_growth, line
from halfmap.steps.validate.held_out import check_held_out, judge
from halfmap.steps.validate.known import Scene, check_known_map, exchanged, moved
from halfmap.steps.validate.overfitting import details
from halfmap.steps.validate.report import page
from halfmap.steps.validate.sample import Growth, draw_sample, grow
from halfmap.steps.validate.step import ValidateStep
from halfmap.steps.validate.views import check_views

SHAPE = (IMAGE_BOX,) * 3
SIDE = IMAGE_BOX * PIXEL


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def blob(seed: int = 1) -> torch.Tensor:
    """A particle of no symmetry: noise of a steep spectrum in a ball."""
    spectrum = rfft3(random(seed) * soft_sphere(SHAPE, radius=40.0, edge=8.0, pixel_size=PIXEL))
    fall = torch.exp(-0.02 * ring_index(SHAPE).float().square())
    volume = irfft3(spectrum * fall, shape=SHAPE)
    return volume / volume.std()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_maps(first: torch.Tensor, second: torch.Tensor) -> None:
    mask = soft_sphere(SHAPE, radius=50.0, edge=12.0, pixel_size=PIXEL)
    for name, volume in (("half1", first), ("half2", second), ("mask", mask)):
        write_mrc(f"{name}.mrc", volume.numpy().astype(np.float32), pixel_size=PIXEL, stack=False)


def read(folder: Path, **what: Any):
    step = ValidateStep(**{"half1": Path("half1.mrc"), "mask": Path("mask.mrc"), "sample": 200} | what)
    ctx = Context(folder, folder)
    return ctx, examine.read(step, ctx)


def of_maps(folder: Path, signal: torch.Tensor, noise: float = 0.5, **what: Any):
    write_maps(signal + noise * random(11), signal + noise * random(12))
    return read(folder, **what)


@pytest.fixture
def particles(folder) -> Poses:
    """Particles at their true poses, and the half maps of these."""
    poses = write_project(folder, signal=1.5, n=200)
    halves = pl.Series("rlnRandomSubset", np.arange(200) % 2 + 1)
    table = read_particles("particles.star").with_poses(poses).with_columns(halves)
    write_particles("posed.star", table)
    write_maps(random(1), random(2))
    ctx, given = read(folder, particles=Path("posed.star"), diameter=DIAMETER)
    sample = draw_sample(ctx, given)
    assert sample is not None
    first, second = maps_of(folder, ctx, given, sample)
    write_maps(first, second)
    return poses


def maps_of(folder: Path, ctx: Context, given: Any, sample: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from halfmap.search.halfmaps import HalfSums
    from halfmap.search.stored_sums import StoredSums
    from halfmap.steps.validate.sample import Chunk, put_back

    sums = []
    for half in (0, 1):
        chunk = Chunk(f"half{half}", np.flatnonzero(sample.halves == half))
        sizes = put_back(chunk, sample=sample, group="C1", folder=folder)
        sums.append(StoredSums.open([folder / f"half{half}.npy"], sizes))
    return HalfSums.of((sums[0], sums[1])).unfiltered()


def test_half_maps_alone_make_a_report_that_holds_its_pictures(folder, capsys):
    of_maps(folder, blob())
    assert main(["validate", "half1.mrc", "--mask", "mask.mrc", "--project", "."]) == 0
    job = next((folder / "Validate").iterdir())
    found = {one["name"]: one for one in json.loads((job / "findings.json").read_text())["findings"]}
    assert found["Agreement of the half maps"]["light"] == "green"
    assert found["Directions"]["light"] == "green"
    assert any(one["light"] == "grey" and "--particles" in one["sentence"] for one in found.values())
    report = (job / "report.html").read_text()
    assert report.count("data:image/png;base64,") == sum(len(one["pictures"]) for one in found.values())
    assert "http" not in report.replace("https://doi", "")


def test_what_needs_particles_is_refused_without_them(folder):
    of_maps(folder, blob())
    (folder / "other.star").write_text("")
    with pytest.raises(ParameterError, match="--other is compared with --particles"):
        read(folder, other=Path("other.star"))
    with pytest.raises(ParameterError, match="--tilted has no untilted partner"):
        read(folder, tilted=Path("other.star"))


def test_particles_without_poses_are_refused(folder):
    write_project(folder, n=60)
    of_maps(folder, blob())
    with pytest.raises(TableError, match="no poses"):
        read(folder, particles=Path("particles.star"))


def test_noise_that_halves_share_is_told(folder):
    """Half maps that share half of their noise never stop to agree."""
    common = random(5)
    write_maps(blob() + 0.3 * (common + random(11)), blob() + 0.3 * (common + random(12)))
    _, given = read(folder)
    found = check_agreement(given, folder)
    assert found.light == "amber"
    assert "never falls" in found.sentence


def test_a_missing_cone_is_flagged_and_even_noise_is_not(folder):
    """Slices within 50° of the axis hold no signal beyond the first shells."""
    whole = torch.fft.fftfreq(IMAGE_BOX)
    z, y, x = torch.meshgrid(whole, whole, torch.fft.rfftfreq(IMAGE_BOX), indexing="ij")
    radius = (x.square() + y.square() + z.square()).sqrt().clamp_min(1e-9)
    kept = ((z.abs() / radius) < math.cos(math.radians(50))) | (ring_index(SHAPE) < 3)
    volume = irfft3(rfft3(blob()) * kept, shape=SHAPE)
    _, given = of_maps(folder, volume, 0.2)
    found = check_directions(given, folder)
    assert found.light == "red"
    worst = np.array(found.values["worst_direction_xyz"])
    assert abs(worst[2]) > math.cos(math.radians(50))
    _, given = of_maps(folder, blob(), 0.2)
    assert check_directions(given, folder).light == "green"


def test_views_from_all_sides_are_green_and_from_one_side_red(particles, folder):
    _, given = read(folder, particles=Path("posed.star"))
    assert check_views(given, folder).light == "green"
    table = given.particles
    assert table is not None
    n = len(table)
    spread = torch.rand(n, 3, generator=torch.Generator().manual_seed(3)) * torch.tensor([360.0, 20.0, 360.0])
    write_particles("top.star", table.with_poses(Poses(from_euler(spread), table.poses.shifts_A)))
    _, given = read(folder, particles=Path("top.star"))
    found = check_views(given, folder)
    assert found.light == "red"
    assert found.values["unsampled_part"] > 0.3
    assert "tilt the stage" in found.sentence and "look with `halfmap symmetry`" in found.sentence
    # Who has made the map with a symmetry needs no word of it.
    _, given = read(folder, particles=Path("top.star"), symmetry="C4")
    assert "halfmap symmetry" not in check_views(given, folder).sentence


def test_the_slope_of_growth_is_that_of_the_b_factor():
    """Resolutions of maps that follow one B-factor give it back; what the box or pixels say is left out."""
    b_factor, n = 150.0, np.array([50, 100, 200, 400, 800])
    squared = 0.01 + 2 / b_factor * np.log(n)
    found = 1 / np.sqrt(squared)
    found[0], found[-1] = 60.0, 2.0
    intervals = [Interval(0.98 * each, 1.02 * each) for each in found]
    assert 2 / line(n, found, intervals, coarsest=50, finest=2.2) == pytest.approx(b_factor, rel=1e-6)
    assert line(n[:2], found[:2], intervals[:2], coarsest=50, finest=2.2) == 0


def test_more_particles_give_finer_maps_and_other_half_maps_are_told(particles, folder):
    ctx, given = read(folder, particles=Path("posed.star"), diameter=DIAMETER)
    sample = draw_sample(ctx, given)
    assert sample is not None
    growth = grow(ctx, given, sample)
    assert growth.particles[-1] == 200
    found = check_growth(given, growth, folder)
    assert found.light in ("green", "amber")
    resolutions = [each for each in found.values["resolution_A"] if each]
    assert resolutions[-1] == pytest.approx(given.resolution, rel=0.05)
    assert resolutions[0] > resolutions[-1]
    # What was made is read back.
    assert torch.equal(grow(ctx, given, sample).curves, growth.curves)
    poor = Growth(growth.particles, growth.curves[:1].expand(5, -1))
    assert check_growth(given, poor, folder).light == "red"


def test_images_of_another_box_are_not_looked_at(particles, folder):
    ctx, given = read(folder, particles=Path("posed.star"))
    object.__setattr__(given.halves, "pixel_size", 3.0)
    assert draw_sample(ctx, given) is None


def test_random_phases_keep_amplitudes_and_what_is_coarser():
    images = random(1, 3, 32, 32)
    random_ones = random_phases(images, 6, torch.Generator().manual_seed(5))
    before, after, ring = rfft2(images), rfft2(random_ones), ring_index((32, 32))
    torch.testing.assert_close(after.abs(), before.abs(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after[:, ring < 6], before[:, ring < 6], rtol=1e-4, atol=1e-4)
    alike = (after * before.conj()).real[:, ring >= 6].sum() / before[:, ring >= 6].abs().square().sum()
    assert abs(float(alike)) < 0.1


def test_a_known_map_takes_the_place_of_the_one_in_the_images(particles, folder):
    """What is left has nothing of the map where it was, and it is where it is said to be."""
    ctx, given = read(folder, particles=Path("posed.star"), diameter=DIAMETER)
    sample = draw_sample(ctx, given)
    assert sample is not None
    scene = Scene.of(given, sample)
    assert scene.strength == pytest.approx(1, abs=0.15)
    rows = np.arange(len(sample.particles))
    images = sample.source.images.get(rows)
    poses = exchanged(sample.particles.poses, 1)
    new = scene.exchange(rows, images, sample.particles.poses, poses)

    shown = {each: scene.projected(each) for each in (scene.map, scene.truth)}

    def strength(images: torch.Tensor, poses: Poses, volume: torch.Tensor) -> float:
        ready = scene.prepared(rows, images)
        expected = scene.expected(shown[volume], ready, rows, poses)
        return float((ready.whole.conj() * expected).real.sum() / expected.abs().square().sum())

    own = sample.particles.poses
    assert strength(images, poses, scene.truth) < 0.35 < 0.7 < strength(images, own, scene.map)
    assert strength(new, own, scene.map) < 0.35 < 0.7 < strength(new, poses, scene.truth)
    # The truth is the map to where its phases are its own, and then is not.
    shell = controls.substituted_from(given)
    alike = fsc(scene.map, scene.truth)
    assert float(alike[1 : shell - 2].min()) > 0.9
    assert float(alike[shell + 2 :].abs().max()) < 0.7


def test_exchanged_poses_keep_how_often_a_view_is_seen_and_the_shifts():
    generator = torch.Generator().manual_seed(3)
    poses = Poses(random_rotations(50, generator=generator), random(4, 50, 2))
    new = exchanged(poses, 1)
    torch.testing.assert_close(new.shifts_A.float(), poses.shifts_A)
    before, after = (view_direction(each.rotations.double()) for each in (poses, new))
    nearest = (after @ before.T).max(1)
    torch.testing.assert_close(nearest.values, torch.ones(50, dtype=torch.float64), atol=1e-5, rtol=0)
    assert len(set(nearest.indices.tolist())) == 50
    assert float((nearest.indices == torch.arange(50)).double().mean()) < 0.2


def test_poses_are_moved_by_a_detail_at_the_rim():
    generator = torch.Generator().manual_seed(3)
    poses = Poses(random_rotations(2000, generator=generator), random(4, 2000, 2))
    new = moved(poses, 5.0, 100.0, 1)
    vectors = to_rotation_vector(new.rotations.double() @ poses.rotations.double().transpose(1, 2))
    assert float(vectors.std()) == pytest.approx(0.05, rel=0.05)
    assert float((new.shifts_A - poses.shifts_A).std()) == pytest.approx(1.25, rel=0.05)


@pytest.mark.parametrize(
    ("resolution", "details_A"), [(2.4, [3, 5, 8]), (2.6, [5, 8]), (6.0, [8]), (7.0, [10.5]), (20.0, [30])]
)
def test_images_are_passed_at_what_is_coarser_than_the_resolution(resolution, details_A):
    assert details(resolution) == details_A


def test_held_out_particles_are_predicted_by_their_map_and_not_by_noise(particles, folder):
    ctx, given = read(folder, particles=Path("posed.star"), diameter=DIAMETER)
    sample = draw_sample(ctx, given)
    assert sample is not None
    halves = given.halves.first, given.halves.second
    right = Control(folder, halves, sample.particles, given.fsc.corrected, given.resolution)
    found = check_held_out(given, sample, right, folder)
    assert found.light == "green"
    assert found.values["log_likelihood_gain"] > 0.3
    wrong = random_rotations(200, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    turned = sample.particles.with_poses(Poses(wrong, sample.particles.poses.shifts_A))
    lost = Control(folder, halves, turned, given.fsc.corrected, given.resolution)
    assert check_held_out(given, sample, lost, folder).light == "red"


@pytest.mark.parametrize(
    ("reached", "light", "words"),
    [
        (5.9, "green", "correlate by 0.06; at 0.143, by which resolution is counted, they agree to 7.05 Å"),
        (7.1, "green", "as far as half maps agree, 7.05 Å"),
        (12.0, "amber", "less far than half maps agree, 7.05 Å"),
    ],
)
def test_what_is_predicted_is_set_beside_the_resolution(reached: float, light: str, words: str):
    found = judge(reached, 7.05, 0.06)
    assert found[0] == light
    assert words in found[1]


def test_noise_that_was_aligned_to_a_reference_predicts_nothing_new(folder):
    """Both halves of it show the reference, and so does each image; beyond its detail there is nothing."""
    n = 200
    write_project(folder, signal=0.0, n=n)
    halves = pl.Series("rlnRandomSubset", np.arange(n) % 2 + 1)
    views = random_rotations(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    poses = Poses(views, torch.zeros(n, 2, dtype=torch.float64))
    table = read_particles("particles.star").with_poses(poses).with_columns(halves)
    write_particles("posed.star", table)
    write_maps(random(1), random(2))
    ctx, given = read(folder, particles=Path("posed.star"), diameter=DIAMETER)
    sample = draw_sample(ctx, given)
    assert sample is not None
    begun_with = 20.0
    aligned = dataclasses.replace(sample, particles=nearest_views(sample, blob(5), begun_with))
    maps = maps_of(folder, ctx, given, aligned)
    curve = corrected_fsc(*maps, mask=given.mask).corrected
    reached = resolution(curve, pixel_size=PIXEL, box=IMAGE_BOX)
    assert reached < 30.0  # Einstein from noise
    object.__setattr__(given, "resolution", begun_with / 2)
    found = check_held_out(given, aligned, Control(folder, maps, aligned.particles, curve, reached), folder)
    assert found.light == "red"


def nearest_views(sample: Any, reference: torch.Tensor, resolution_A: float) -> Any:
    """Particles at the views, of some at random, that each is most like by detail to a resolution."""
    disc, n = sample.disc(), len(sample.particles)
    volume = SplineVolume.of(reference, radius_px=disc.radius)
    views = random_rotations(500, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slices = sample_slices(volume, views, disc.points)
    images = sample.source.images.get(np.arange(n))
    ready = prepare(images, torch.ones(IMAGE_BOX, IMAGE_BOX), sample.source.ctf, disc, PIXEL)
    weight = disc.multiplicity * (disc.rings <= round(SIDE / resolution_A))
    products = ((ready.whole * ready.ctf * weight).conj() @ slices.T).real
    best = (products / (slices.abs().square() * weight).sum(1).sqrt()).argmax(1)
    return sample.particles.with_poses(Poses(views[best], torch.zeros(n, 2, dtype=torch.float64)))


def test_half_maps_of_noise_do_not_agree(folder, capsys):
    for seed in range(4):
        write_maps(random(20 + seed), random(30 + seed))
        _, given = read(folder)
        assert check_agreement(given, folder).light == "red"
    assert main(["validate", "half1.mrc", "--mask", "mask.mrc", "--project", "."]) == 0
    job = next((folder / "Validate").iterdir())
    content = json.loads((job / "findings.json").read_text(), parse_constant=lambda _: pytest.fail())
    assert [one["light"] for one in content["findings"]] == ["red", "grey"]


def test_a_check_that_cannot_be_made_is_grey_and_a_full_disk_stops(folder):
    found = checks.Findings(Context(folder, folder))

    def fails(error: Exception):
        raise error

    found.make("A", lambda: fails(TableError("is empty", path=folder / "a.star", hint="give another")))
    assert found[0].light == "grey"
    assert "is empty" in found[0].sentence
    with pytest.raises(ResourceError):
        found.make("B", lambda: fails(ResourceError("the disk is full")))


@pytest.mark.parametrize(("control", "light"), [(14.0, "red"), (10.6, "amber"), (9.2, "green")])
def test_over_fitting_is_judged_by_what_independent_halves_resolve(folder, monkeypatch, control, light):
    ctx, given = of_maps(folder, blob(), particles=None)

    def falling(resolution: float) -> torch.Tensor:
        shells = torch.arange(IMAGE_BOX // 2 + 1)
        return torch.sigmoid((SIDE / resolution - shells) * 4)

    growth = Growth(np.array([100, 200]), torch.stack([falling(20.0), falling(9.0)]))
    curve = falling(control)
    again = Control(folder, (random(1), random(2)), SimpleNamespace(), curve, control)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(controls, "begin", lambda *_: None)
    monkeypatch.setattr(controls, "refine", lambda *_: again)
    sample: Any = SimpleNamespace(table=None, particles=range(200))
    found, _ = overfitting.check_halves(ctx, given, sample, growth)
    assert found.light == light
    # Maps of more particles than the control has may be better without any noise in them.
    more = dataclasses.replace(given, particles=range(400))  # pyright: ignore[reportArgumentType]
    assert overfitting.check_halves(ctx, more, sample, growth)[0].light == light.replace("red", "amber")
    assert f"{control:.2f} Å" in found.sentence


@pytest.mark.parametrize(("invented", "light"), [(0.0, "green"), (1.0, "red")])
def test_what_is_invented_is_found_by_a_known_map(particles, folder, monkeypatch, invented, light):
    """Half maps of the truth, noise of their own, and fine detail of both that is not in the truth."""
    ctx, given = read(folder, particles=Path("posed.star"), diameter=DIAMETER)
    sample = draw_sample(ctx, given)
    assert sample is not None
    truth = Scene.of(given, sample).truth
    fine = irfft3(rfft3(random(77, *SHAPE)) * (ring_index(SHAPE) > 9), shape=SHAPE)
    common = truth + invented * truth.std() * fine

    def refined(*_: object) -> Control:
        first, second = (common + 0.8 * truth.std() * random(i, *SHAPE) for i in (78, 79))
        generator = torch.Generator().manual_seed(1)
        curve = corrected_fsc(first, second, mask=given.mask, generator=generator).corrected
        return Control(folder, (first, second), SimpleNamespace(), curve, 10.0)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(controls, "refine", refined)
    assert check_known_map(ctx, given, sample).light == light


@pytest.mark.parametrize(("ends_at", "light"), [(12, "green"), (15, "amber"), (17, "red")])
def test_what_images_without_fine_detail_give_beyond_is_told(folder, monkeypatch, ends_at, light):
    ctx, given = of_maps(folder, blob(), particles=None)
    [detail] = details(given.resolution)
    limit = round(SIDE / detail) + controls.SMEARED
    curve = (torch.arange(IMAGE_BOX // 2 + 1) <= ends_at).float()
    run = Control(folder, (random(1), random(2)), SimpleNamespace(), curve, SIDE / ends_at)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(controls, "refine", lambda *_: run)
    monkeypatch.setattr(controls, "changed", lambda *_: None)
    monkeypatch.setattr(controls, "passed_low", lambda *_: None)
    sample: Any = SimpleNamespace(table=None, particles=range(200))
    assert limit == 13
    assert overfitting.check_passed_low(ctx, given, sample, run).light == light


@pytest.mark.parametrize(("same", "light"), [(True, "green"), (False, "red")])
def test_a_map_begun_anew_is_the_same_turned_or_another(folder, monkeypatch, same, light):
    ctx, given = of_maps(folder, blob(), 0.05, diameter=DIAMETER)
    (folder / "anew").mkdir()
    turn = random_rotations(1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)[0]
    volume = rotate_volume(blob(1 if same else 7), turn, method="cubic")
    write_mrc(folder / "anew/class001.mrc", volume.numpy(), pixel_size=PIXEL, stack=False)
    table = pl.DataFrame({"rlnReferenceImage": ["a"], "hmRunAgreement": [14.0]})
    write_star(folder / "anew/model.star", {"model_classes": table})
    monkeypatch.setattr(Context, "run_within", lambda *_, **__: folder / "anew")
    sample: Any = SimpleNamespace(table=folder / "x.star")
    found = restart.check_restart(ctx, given, sample)
    assert found.light == light, found.values


def test_a_report_shows_any_text_as_it_is(folder):
    write_mrc("a.mrc", random(1).numpy(), pixel_size=PIXEL, stack=False)
    (folder / "p.png").write_bytes(b"png")
    text = page(
        folder, {"half_maps": ["<a>"]}, [Finding("x < y", "red", "5 & 6", {"a_A": [1.0, 2.0]}, ("p.png",))]
    )
    assert "x &lt; y" in text
    assert "5 &amp; 6" in text
    assert "&lt;a&gt;" in text
    assert "data:image/png;base64,cG5n" in text


def test_controls_from_the_images(particles, folder, monkeypatch):
    """All that are refinements, as a user has them."""
    grey = Finding("Begun anew without a reference", "grey", "Takes too long here.")
    monkeypatch.setattr("halfmap.steps.validate.checks.check_restart", lambda *_: grey)
    words = "validate half1.mrc --mask mask.mrc --particles posed.star --sample 200 --shift-range 10"
    assert main([*words.split(), "--diameter", str(DIAMETER), "--project", "."]) == 0
    job = next((folder / "Validate").iterdir())
    found = {one["name"]: one["light"] for one in json.loads((job / "findings.json").read_text())["findings"]}
    for name in (
        "independent half sets",
        "noise in place of fine detail",
        "images without fine detail",
        "nothing but noise",
    ):
        assert found[f"Over-fitting: {name}"] == "green"
    assert found["A known map in real noise"] == "green"
    assert found["Prediction of held-out particles"] == "green"
    assert not list((job / "Sample").glob("*.mrcs"))
