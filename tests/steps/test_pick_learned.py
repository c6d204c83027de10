"""The learned picker: its examples, its losses, and what the shipped model finds."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.spatial import KDTree

from halfmap.data import MicrographSet
from halfmap.errors import HalfmapError
from halfmap.io.coordinates import read_coordinates, write_coordinates
from halfmap.io.micrographs import Image, MicrographItem, flattened, load
from halfmap.io.mrc import write_mrc
from halfmap.io.star import write_star
from halfmap.io.tables import write_micrographs
from halfmap.nets.picker import STRIDE
from halfmap.project import Project
from halfmap.steps.pick.candidates import find_peaks
from halfmap.steps.pick.learned import (
    PIXELS,
    Learned,
    by_looks,
    judged,
    load_network,
    normalised,
    resized,
    score_micrograph,
)
from halfmap.steps.pick.learned_calibration import calibrate_log_odds, calibrated_share, fewer_particles
from halfmap.steps.pick.learned_examples import (
    CROP,
    DISC_AREA,
    Example,
    batches,
    outside_discs,
    random_crops,
    soft_discs,
)
from halfmap.steps.pick.learned_training import class_prior, fine_tune, prepare, pu_loss
from halfmap.steps.pick.step import PickLearned, PickTrain

NOTHING = np.zeros((0, 3))


@pytest.fixture(scope="module")
def network():
    return load_network()[0]


def rings(shape, pixel_size, diameter, n, seed, *, noise=1.0):
    """Dark shells in noise, a diameter apart, and their centres (n, 2) in pixels."""
    rng = np.random.default_rng(seed)
    centres: list[np.ndarray] = []
    while len(centres) < n:
        place = rng.uniform((0, 0), (shape[1], shape[0]))
        if all(np.hypot(*(place - other)) * pixel_size > 1.05 * diameter for other in centres):
            centres.append(place)
    y, x = np.mgrid[: shape[0], : shape[1]]
    image = rng.normal(size=shape)
    # The same power per Å² whatever the pixels.
    image = noise * image * 5.0 / pixel_size
    for cx, cy in centres:
        r = np.hypot(x - cx, y - cy) * 2 * pixel_size / diameter
        thickness = 2 * (np.sqrt(np.clip(1 - r**2, 0, None)) - np.sqrt(np.clip(0.4 - r**2, 0, None)))
        image -= thickness
    return image.astype(np.float32), np.array(centres)


def frame(values, pixel_size):
    return Image(values, pixel_size, np.ones(values.shape, bool), None, (1.0, 1.0))


def f1(score, score_pixel, centres_A, diameter, threshold=0.0):
    peaks = find_peaks(score, pixel_size=score_pixel, distance=0.6 * diameter)
    taken = peaks.select(peaks.score > threshold)
    places = np.stack([taken.x, taken.y], -1) * score_pixel
    near, which = KDTree(centres_A).query(places)
    found = len(set(which[near < 0.2 * diameter]))
    return 2 * found / (len(places) + len(centres_A))


def test_targets_are_cones_without_tips():
    """Against distances of every pixel to every centre."""
    rng = np.random.default_rng(1)
    centres = rng.uniform(-5, CROP + 5, (40, 2))
    shape = (CROP // STRIDE, CROP // STRIDE)
    y, x = np.mgrid[: shape[0], : shape[1]] * STRIDE
    distance = np.hypot(x[..., None] - centres[:, 0], y[..., None] - centres[:, 1]).min(-1)
    expected = np.clip((0.25 * PIXELS - distance) / (0.15 * PIXELS), 0, 1)
    np.testing.assert_allclose(soft_discs(centres, shape), expected, atol=1e-6)


def test_the_area_of_a_disc_is_what_its_target_adds_up_to():
    rng = np.random.default_rng(2)
    sums = [soft_discs(rng.uniform(60, 68, (1, 2)), (64, 64)).sum() * STRIDE**2 for _ in range(400)]
    # The mean over places within a pixel is the integral, here to the error of a mean of 400.
    assert np.mean(sums) == pytest.approx(DISC_AREA, abs=4 * float(np.std(sums)) / 20)


def test_nothing_is_learned_inside_ignored_discs():
    weight = outside_discs(np.array([[40.0, 60.0, 12.0]]), (64, 64))
    y, x = np.mgrid[:64, :64] * STRIDE
    assert np.array_equal(weight == 0, np.hypot(x - 40, y - 60) < 12)


def test_crops_turn_images_and_centres_together():
    """Bright dots at integer centres stay under the targets in every orientation."""
    rng = np.random.default_rng(3)
    image = np.zeros((300, 260), np.float32)
    centres = rng.integers(0, (260, 300), (60, 2))
    image[centres[:, 1], centres[:, 0]] = 1
    example = Example(image, centres.astype(float), NOTHING)
    seen = 0
    for crop, target, _ in random_crops(example, 40, rng):
        y, x = np.nonzero(crop)
        expected = soft_discs(np.stack([x, y], -1).astype(float), target.shape)
        # Centres outside the crop may reach into it.
        assert np.all(target >= expected)
        inner = slice(4, -4)
        np.testing.assert_allclose(target[inner, inner], expected[inner, inner], atol=1e-6)
        seen += len(x)
    assert seen > 200


def test_small_images_are_padded():
    example = Example(np.ones((50, 90), np.float32), np.array([[20.0, 30.0]]), NOTHING)
    (crop, target, weight), *_ = random_crops(example, 1, np.random.default_rng(1))
    assert crop.shape == (CROP, CROP)
    assert crop.sum() == 50 * 90
    assert target.shape == weight.shape == (CROP // 2, CROP // 2)
    assert target.max() > 0.5


def test_batches_depend_on_the_seed_alone():
    def first(seed):
        rng = np.random.default_rng(seed)
        image = np.random.default_rng(9).normal(size=(200, 200)).astype(np.float32)
        examples = (Example(image, np.array([[50.0, 60.0]]), NOTHING) for _ in range(20))
        return [batch[0] for batch in islice(batches(examples, size=4, per_example=3, pool=6, rng=rng), 5)]

    one, again, other = first(1), first(1), first(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])


def test_risk_of_fully_labelled_pixels_is_the_cross_entropy():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 1, 32, 32, generator=generator)
    target = (torch.rand(3, 1, 32, 32, generator=generator) < 0.1).float()
    weight = torch.ones_like(target)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
    assert pu_loss(float(target.mean()))(logits, target, weight) == pytest.approx(float(expected), rel=1e-5)


def test_risk_does_not_depend_on_how_many_are_labelled():
    """A tenth of the positives labelled, the prior right: the same risk, within its sampling error."""
    generator = torch.Generator().manual_seed(2)
    shape = (40, 1, 64, 64)
    truth = (torch.rand(shape, generator=generator) < 0.1).float()
    logits = torch.randn(shape, generator=generator) + 3 * truth - 2
    weight = torch.ones(shape)
    loss = pu_loss(float(truth.mean()))
    full = float(loss(logits, truth, weight))
    partly = [
        float(loss(logits, truth * (torch.rand(shape, generator=generator) < 0.1), weight)) for _ in range(8)
    ]
    error = np.std(partly) / np.sqrt(len(partly))
    assert np.mean(partly) == pytest.approx(full, abs=4 * error)
    # As plain negatives, the unlabelled positives would cost much more.
    naive = torch.nn.functional.binary_cross_entropy_with_logits(logits, 0.1 * truth)
    assert abs(float(naive) - full) > 20 * error


def test_a_negative_risk_turns_the_gradient():
    logits = torch.full((1, 1, 8, 8), -4.0, requires_grad=True)
    target = torch.zeros(1, 1, 8, 8)
    target[0, 0, 0, 0] = 1
    with torch.no_grad():
        logits[0, 0, 0, 0] = 6.0
    pu_loss(0.4)(logits, target, torch.ones_like(target)).backward()
    assert logits.grad is not None
    # Descent raises the scores of the unlabelled ones, which were learned too well.
    assert float(logits.grad[0, 0, 4, 4]) < 0


def test_normalisation_forgets_scale_offset_and_slope():
    rng = np.random.default_rng(4)
    image = gaussian_filter(rng.normal(size=(240, 300)), 1.5).astype(np.float32)
    image /= image.std()
    slope = np.linspace(0, 3, 300, dtype=np.float32)
    plain, changed = normalised(image), normalised(4000 + 37 * (image + slope))
    inside = slice(PIXELS, -PIXELS)
    difference = (plain - changed)[inside, inside]
    assert np.abs(difference).max() < 0.15
    assert np.median(np.abs(plain)) == pytest.approx(0.6745, abs=0.05)


def test_resampling_keeps_the_first_pixel():
    y, x = np.mgrid[:120, :160].astype(np.float32)
    wave = torch.from_numpy(np.cos(2 * np.pi * (3 * x / 160 + 2 * y / 120)).astype(np.float32))
    small = resized(wave, (60, 100))
    y, x = np.mgrid[:60, :100]
    expected = np.cos(2 * np.pi * (3 * x / 100 + 2 * y / 60))
    np.testing.assert_allclose(small.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("pixel_size", [5.0, 2.5])
def test_the_general_model_finds_shells(network, pixel_size):
    """Particles of another kind than it was trained on, whatever the pixels they come in."""
    shape = (int(2400 / pixel_size), int(2000 / pixel_size))
    image, centres = rings(shape, pixel_size, 120.0, 120, seed=5)
    score, size = score_micrograph(frame(image, pixel_size), 120.0, network)
    assert size == pytest.approx(10.0, rel=0.01)
    assert f1(score, size, centres * pixel_size, 120.0) > 0.95


def picked(image, seed=1):
    """Picks of the general model for a diameter of 120 Å, and how many places were judged."""
    found, _ = Learned(120.0).search(image, np.random.default_rng(seed))
    return found.select(found.score >= calibrate_log_odds(found.score).threshold), len(found)


def grains(width, seed):
    """Noise without particles in pixels of 5 Å, whose grains have a Gaussian deviation in pixels."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(480, 480)), width).astype(np.float32)
    return frame(noise / noise.std(), 5.0)


def test_a_large_mask_hides_no_particles():
    """Forty rings, and beside them 65 % of the micrograph masked."""
    image, centres = rings((480, 480), 5.0, 120.0, 40, seed=4)
    mask = np.pad(np.ones(image.shape, bool), ((0, 0), (890, 0)))
    wide = flattened(np.pad(image, ((0, 0), (890, 0))), mask, 200)
    picks, _ = picked(Image(wide, 5.0, mask, None, (1.0, 1.0)))
    near, which = KDTree(centres + np.array([890, 0])).query(np.stack([picks.x, picks.y], -1))
    assert set(which[near < 5]) == set(range(40))
    assert (near >= 5).sum() <= 2


def test_masked_pixels_count_for_nothing():
    rng = np.random.default_rng(17)
    image = rng.normal(size=(240, 300)).astype(np.float32)
    mask = np.ones(image.shape, bool)
    mask[:, :200] = False
    full, part = normalised(image), normalised(np.where(mask, image, 50), mask)
    assert not part[~mask].any()
    inside = slice(200 + 3 * PIXELS, None)
    assert np.abs((full - part)[:, inside]).max() < 0.15
    assert np.median(np.abs(part[mask])) == pytest.approx(0.6745, abs=0.05)
    lone = np.zeros_like(mask)
    lone[1, 1] = True
    for tiny in (lone, np.zeros_like(mask)):
        assert np.isfinite(normalised(image, tiny)).all()


def test_a_slope_is_taken_out_up_to_the_edge_of_the_mask():
    """A one-sided average lags by 0.8 of its width, which is 0.6 here; half of the level would be 1.5."""
    image = np.random.default_rng(23).normal(size=(240, 300)).astype(np.float32)
    image += np.linspace(-6, 3, 300, dtype=np.float32)
    mask = np.ones(image.shape, bool)
    mask[:, :100] = False
    assert abs(normalised(np.where(mask, image, 0), mask)[:, 100:106].mean()) < 0.9


def test_training_sees_masked_micrographs_as_picking_does(tmp_path):
    image, _ = rings((300, 480), 5.0, 120.0, 30, seed=18)
    mask = np.ones(image.shape, np.float32)
    mask[:, :320] = 0
    write_mrc(tmp_path / "a.mrc", image, pixel_size=5.0)
    write_mrc(tmp_path / "mask.mrc", mask, pixel_size=5.0)
    item = MicrographItem("a", "a", tmp_path / "a.mrc", 5.0, mask=tmp_path / "mask.mrc")
    seen = prepare(item, np.zeros((0, 2)), 120.0).image
    assert not seen[:, :319].any()
    assert np.median(np.abs(seen[:, 321:])) == pytest.approx(0.6745, abs=0.05)


def test_fragments_lose_odds(network):
    """Every ninth ring has half the strength of the others, and looks the same."""
    image, centres = rings((480, 480), 5.0, 120.0, 90, seed=19, noise=0.5)
    whole, _ = rings((480, 480), 5.0, 120.0, 90, seed=19, noise=0.0)
    y, x = np.mgrid[:480, :480]
    for cx, cy in centres[::9]:
        image -= np.where(np.hypot(x - cx, y - cy) < 12.2, whole / 2, 0)
    image = frame(image / image.std(), 5.0)
    change = {}
    looks = by_looks(image, 120.0, network)
    found = judged(image, 120.0, network, np.random.default_rng(1))
    for name, part in (("broken", centres[::9]), ("whole", np.delete(centres, np.s_[::9], axis=0))):
        scores = []
        for each in (looks, found):
            near, which = KDTree(np.stack([each.x, each.y], -1)).query(part)
            scores.append(np.where(near < 4, each.score[which], np.nan))
        change[name] = np.nanmedian(scores[1] - scores[0])
    assert change["broken"] < -1
    assert change["whole"] > -0.5


def test_the_share_of_the_calibration_can_be_another():
    score = np.random.default_rng(20).normal(-3, 2, 2000)
    assert fewer_particles(score, 0.5) < fewer_particles(score, 0.3) < fewer_particles(score, 0.01)
    assert fewer_particles(score) == fewer_particles(score, calibrated_share())


def test_log_odds_follow_a_share_of_particles_that_falls():
    """Scores of known log-odds under the usual share; then half and a tenth of the particles are left."""
    rng = np.random.default_rng(11)
    n, share = 40_000, 0.206
    # Normal scores, both of variance 4 and 4 apart, have log-odds with a slope of 1 in the score.
    usual = math.log(share / (1 - share))
    for kept in (1.0, 0.5, 0.1):
        particle = rng.random(n) < kept * share / (1 - share + kept * share)
        score = rng.normal(np.where(particle, 2.0, -2.0), 2.0) + usual
        found = calibrate_log_odds(score + fewer_particles(score))
        error = 4 / math.sqrt(particle.sum())
        assert fewer_particles(score) == pytest.approx(math.log(kept), abs=error + 0.01)
        right = particle & (score + fewer_particles(score) >= found.threshold)
        true_rate = 1 - right.sum() / found.picked
        assert found.false_discovery_rate == pytest.approx(true_rate, abs=4 / math.sqrt(found.picked))


def test_log_odds_are_not_raised_by_many_particles():
    rng = np.random.default_rng(12)
    particle = rng.random(5000) < 0.8
    assert fewer_particles(rng.normal(np.where(particle, 2.0, -2.0), 2.0)) == 0.0


def test_no_candidates_are_no_picks():
    assert calibrate_log_odds(np.zeros(0)).kind == "none"


def test_scores_do_not_depend_on_the_number_of_threads(network):
    image, _ = rings((300, 420), 5.0, 120.0, 30, seed=13)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = score_micrograph(frame(image, 5.0), 120.0, network)[0]
        torch.set_num_threads(3)
        three = score_micrograph(frame(image, 5.0), 120.0, network)[0]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(one, three)


def test_expected_particles_are_those_there_are(network):
    image, centres = rings((480, 480), 5.0, 120.0, 110, seed=7)
    picked = Example(normalised(image), centres[:20], NOTHING)
    prior = class_prior(network, [picked])
    assert prior == pytest.approx(110 * DISC_AREA / 480**2, rel=0.1)


@pytest.mark.parametrize("width", [0.0, 1.0])
def test_no_particles_are_expected_in_noise(network, width):
    """By looks under the usual share there would be 29 and 17."""
    prior = class_prior(network, [Example(normalised(grains(width, 6).values), np.zeros((0, 2)), NOTHING)])
    assert prior < DISC_AREA / 480**2


def test_fine_tuning_learns_what_few_picks_show(network):
    """Of rings and solid discs only the rings were picked, and only some of these."""
    both, rings_at, discs_at = _mixture(8)
    taught, _ = load_network()
    example = Example(normalised(both), rings_at[:25], NOTHING)
    fine_tune(taught, [example], rng=np.random.default_rng(1), steps=20)
    both, rings_at, discs_at = _mixture(9)
    apart = {}
    for name, model in (("general", network), ("taught", taught)):
        score, size = score_micrograph(frame(both, 5.0), 120.0, model)
        at = [
            score[
                tuple(np.clip(np.rint(xy[:, ::-1] * 5.0 / size).astype(int), 0, np.array(score.shape) - 1).T)
            ]
            for xy in (rings_at, discs_at)
        ]
        # The chance that a ring scores higher than a disc.
        apart[name] = np.mean(at[0][:, None] > at[1])
    assert apart["taught"] > max(apart["general"], 0.9)


def _mixture(seed):
    """Rings and as large solid discs of the same mass, in noise."""
    image, centres = rings((480, 480), 5.0, 120.0, 90, seed=seed, noise=0.8)
    y, x = np.mgrid[:480, :480]
    for cx, cy in centres[45:]:
        r = np.hypot(x - cx, y - cy) * 10.0 / 120.0
        shell = 2 * (np.sqrt(np.clip(1 - r**2, 0, None)) - np.sqrt(np.clip(0.4 - r**2, 0, None)))
        image += shell.astype(np.float32)
        image -= (2.2 * (r < 0.75)).astype(np.float32)
    return image, centres[:45], centres[45:]


DIAMETER = 120.0


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Two micrographs with shells, their table, and the picks of a part of the first one's."""
    folder = tmp_path_factory.mktemp("learned")
    names, truth = [], {}
    for i, name in enumerate(("a", "b")):
        image, centres = rings((400, 480), 5.0, DIAMETER, 60, seed=20 + i)
        write_mrc(folder / "Images" / f"{name}.mrc", 3000 + 100 * image, pixel_size=5.0)
        names.append(f"Images/{name}.mrc")
        truth[names[-1]] = centres
    optics = pl.DataFrame(
        {"rlnOpticsGroup": [1], "rlnOpticsGroupName": ["one"], "rlnMicrographPixelSize": [5.0]}
    )
    rows = pl.DataFrame({"rlnMicrographName": names, "rlnOpticsGroup": [1, 1]})
    write_micrographs(folder / "micrographs.star", MicrographSet(optics, rows))
    picks = pl.DataFrame(truth[names[0]][:40], schema=["rlnCoordinateX", "rlnCoordinateY"], orient="row")
    write_coordinates(folder / "a_picks.star", picks)
    listed = pl.DataFrame({"rlnMicrographName": names[:1], "rlnMicrographCoordinates": ["a_picks.star"]})
    write_star(folder / "picks.star", {"coordinate_files": listed})
    return folder, truth


def found_in(folder, job, truth):
    """F1 of a job's picks over all micrographs."""
    right = total = 0
    for name, centres in truth.items():
        picks = read_coordinates(job.folder / "coordinates" / f"{Path(name).stem}.star")
        places = picks.select("rlnCoordinateX", "rlnCoordinateY").to_numpy()
        near, which = KDTree(centres).query(places)
        right += len(set(which[near * 5.0 < 0.2 * DIAMETER]))
        total += len(places) + len(centres)
    return 2 * right / total


def test_the_step_picks_by_itself(project):
    folder, truth = project
    step = PickLearned(micrographs="micrographs.star", diameter=DIAMETER, pictures=False)
    job = Project.open(folder).run(step)
    assert found_in(folder, job, truth) > 0.9


def test_a_model_is_trained_and_picks_with_its_own_diameter(project):
    folder, truth = project
    train = PickTrain(micrographs="micrographs.star", coordinates="picks.star", diameter=DIAMETER, steps=10)
    job = Project.open(folder).run(train)
    record = json.loads((job.folder / "model.json").read_text())
    assert record["training"]["picks"] == 40
    assert record["training"]["micrographs"] == ["Images/a.mrc"]
    assert record["diameter"] == DIAMETER
    assert (job.folder / "training.png").stat().st_size > 1000
    model = Path(job.folder.relative_to(folder)) / "model.npz"
    picked = Project.open(folder).run(
        PickLearned(micrographs="micrographs.star", model=model, pictures=False)
    )
    assert found_in(folder, picked, truth) > 0.9
    again = Project.open(folder).run(train)
    assert (again.folder / "model.npz").read_bytes() == (job.folder / "model.npz").read_bytes()


def test_picks_without_a_diameter_ask_for_one(project):
    folder, _ = project
    with pytest.raises(HalfmapError, match="--diameter"):
        Project.open(folder).run(PickTrain(micrographs="micrographs.star", coordinates="picks.star"))


def test_picks_of_other_micrographs_are_refused(project):
    folder, _ = project
    listed = pl.DataFrame(
        {"rlnMicrographName": ["Images/z.mrc"], "rlnMicrographCoordinates": ["a_picks.star"]}
    )
    write_star(folder / "others.star", {"coordinate_files": listed})
    with pytest.raises(HalfmapError, match="no picks of any of the micrographs"):
        Project.open(folder).run(
            PickTrain(micrographs="micrographs.star", coordinates="others.star", diameter=DIAMETER)
        )


APOFERRITIN = Path(__file__).parents[3] / "shared/data/micrographs/apoferritin_empiar10146"


@pytest.mark.skipif(not APOFERRITIN.exists(), reason="needs the shared data")
def test_real_apoferritin_is_found():
    """One micrograph, its manual picks unseen, 25 px around: F1 above 0.90."""
    item = MicrographItem("apo", "apo", APOFERRITIN / "apo_055351.mrc", 1.5)
    image = load(item, Learned(120.0).pixel_size)
    picks = picked(image)[0].scaled(*image.scale)
    manual = np.loadtxt(APOFERRITIN / "apo_055351_manual.csv", delimiter=",")
    near, which = KDTree(manual).query(np.stack([picks.x, picks.y], -1))
    right = len(set(which[near < 25]))
    assert 2 * right / (len(picks) + len(manual)) > 0.90
