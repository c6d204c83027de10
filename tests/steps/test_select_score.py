"""What classes and particles are scored by: shapes, images, trends with the defocus, the regression."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from halfmap.data import ParticleSet
from halfmap.ops.fourier import resample
from halfmap.steps.select.classification import Classification, _mask_diameter
from halfmap.steps.select.features import _trend, class_features, particle_features
from halfmap.steps.select.images import NAMES, measure_images
from halfmap.steps.select.score import FARTHEST, WEIGHTS, Logistic, logit, shipped
from halfmap.steps.select.shape import _otsu, describe

BOX, RADIUS = 96, 40.0
Y, X = np.mgrid[:BOX, :BOX] - BOX // 2
DISTANCE = np.hypot(Y, X)
MASK = 1 / (1 + np.exp((DISTANCE - RADIUS) / 1.5))


def _lobe(x: float, y: float, width: float) -> np.ndarray:
    return np.exp(-((X - x) ** 2 + (Y - y) ** 2) / (2 * width**2))


def _shape(*images: np.ndarray) -> dict[str, np.ndarray]:
    stack = np.stack([image * MASK for image in images]).astype(np.float32)
    return describe(stack, 2 * RADIUS, np.full(len(stack), 10))


def test_a_ramp_a_ball_and_a_molecule_are_told_apart():
    molecule = _lobe(-8, 2, 5) + _lobe(9, 5, 6) + _lobe(2, -11, 4)
    shape = _shape(X / RADIUS, _lobe(0, 0, 12), molecule)
    # A plane explains the ramp but for the soft edge; rings explain the ball.
    assert shape["slope"][0] > 0.9 and shape["slope"][1:].max() < 0.1
    assert shape["radial"][1] > 0.98 and shape["radial"][0] < 0.05 and shape["radial"][2] < 0.9
    assert shape["edge"][0] > 0 > shape["edge"][2]
    assert shape["detail"][2] > shape["detail"][1]


def test_the_outline_says_where_how_large_and_how_long():
    disc = 1.0 * (np.hypot(X - 10, Y) < 12)
    bar = 1.0 * ((np.abs(X) < 4) & (np.abs(Y) < 24))
    shape = _shape(disc, bar)
    np.testing.assert_allclose(shape["offset"], [10 / RADIUS, 0], atol=0.03)
    assert shape["area_off"].max() == pytest.approx(np.log(12**2 * np.pi / (8 * 48)) / 2, abs=0.1)
    assert shape["elongation"][0] == pytest.approx(0, abs=0.05)
    assert shape["elongation"][1] == pytest.approx(np.log(6), abs=0.2)
    assert shape["solidity"].min() > 0.9
    ring = 1.0 * (np.abs(DISTANCE - 20) < 4)
    assert _shape(ring)["solidity"][0] < 0.75


def test_shapes_do_not_depend_on_pixels_and_contrast():
    molecule = _lobe(-8, 2, 5) + _lobe(9, 5, 6) + _lobe(2, -11, 4)
    stack = (molecule * MASK)[None].astype(np.float32)
    finer = resample(torch.from_numpy(stack), new_shape=(160, 160)).numpy() * 7
    one, other = (
        describe(stack, 2 * RADIUS, np.array([5])),
        describe(finer, 2 * RADIUS * 160 / BOX, np.array([5])),
    )
    for name in one:
        assert other[name][0] == pytest.approx(one[name][0], abs=0.03), name


def test_averages_without_members_or_contrast_have_no_shape():
    stack = np.stack([_lobe(0, 0, 5), _lobe(0, 0, 5), np.zeros((BOX, BOX))]).astype(np.float32)
    for values in describe(stack, 2 * RADIUS, np.array([3, 0, 3])).values():
        assert np.isfinite(values).tolist() == [True, False, False]


def test_otsu_parts_where_the_variance_within_is_least():
    values = np.concatenate([np.random.default_rng(0).normal(m, 1, 60) for m in (0, 6)])
    level = _otsu(values)

    def within(cut: float) -> float:
        low, high = values[values <= cut], values[values > cut]
        return low.var() * len(low) + high.var() * len(high)

    assert within(level) == pytest.approx(min(within(cut) for cut in np.sort(values)[:-1]))


def test_the_mask_is_found_where_the_averages_end():
    averages = (np.random.default_rng(1).normal(size=(3, BOX, BOX)) * (DISTANCE < 30)).astype(np.float32)
    assert _mask_diameter(averages) == pytest.approx(60, abs=2)


def test_levels_of_rings_are_means_of_what_is_coarse():
    diameter = 60.0
    disc = torch.from_numpy((4 / (1 + np.exp((DISTANCE - 0.35 * diameter) / 4))).astype(np.float32))
    noise = torch.from_numpy(np.random.default_rng(2).normal(size=(BOX, BOX)).astype(np.float32))
    plain, noisy = measure_images(torch.stack([disc + 1, disc + 1 + 0.2 * noise]), diameter).numpy()
    measured = dict(zip(NAMES, plain, strict=True))
    # The middle is 4 above the background of 1; waves up to 2.5 across the diameter ring by a tenth.
    assert measured["level_1"] == pytest.approx(5, abs=0.5)
    assert measured["level_5"] == pytest.approx(1, abs=0.4)
    assert measured["coarse_3"] > measured["coarse_5"] > measured["middle_5"]
    np.testing.assert_allclose(noisy[:5], plain[:5], atol=0.05)


def test_what_changes_with_the_defocus_is_taken_off():
    rng = np.random.default_rng(3)
    defocus = rng.uniform(0.5, 3, 400)
    rest = rng.normal(0, 0.1, 400)
    rest[::10] += 5
    found = 2 + 3 * defocus - defocus**2 + rest
    left = found - _trend(defocus, found)
    assert left[::10].mean() == pytest.approx(5, abs=0.1)
    usual = np.delete(left - rest, np.s_[::10])
    assert np.abs(usual).max() < 0.1


def _classification() -> Classification:
    number = np.repeat([0, 1, -1], [20, 9, 1])
    rng = np.random.default_rng(4)
    rows = pl.DataFrame(
        {
            "rlnImageName": [f"{i + 1}@s.mrcs" for i in range(30)],
            "rlnOpticsGroup": [1] * 30,
            "hmPosteriorEntropy": rng.normal(3, 1, 30),
            "rlnLogLikeliContribution": np.where(number == 0, 100.0, 10.0) + rng.normal(0, 1, 30),
        }
    )
    averages = np.stack([_lobe(0, 0, 8) * MASK] * 3).astype(np.float32)
    classes = pl.DataFrame({"rlnEstimatedResolution": [10.0, 20.0, 999.0]})
    particles = ParticleSet(pl.DataFrame({"rlnOpticsGroup": [1]}), rows)
    blocks = {"model_classes": classes, "model_general": {"rlnParticleDiameter": 160.0}}
    return Classification(Path("model.star"), blocks, particles, number, averages, 2.0, None)


def test_features_compare_classes_and_their_members():
    found = _classification()
    classes = class_features(found)
    assert classes["resolution"][:2] == pytest.approx(np.log([16, 8]))
    assert classes["resolution_beside"][:2] == pytest.approx([0, -np.log(2)])
    assert classes["evidence"][0] > classes["evidence"][1]
    assert np.isnan(classes["occupancy"][2]) and np.isnan(classes["resolution"][2])
    particles = particle_features(found, np.ones((30, len(NAMES))))
    assert abs(np.median(particles["evidence_own"][:20])) < 1e-9
    assert particles["evidence_off"].min() >= 0
    assert not any("greatest" in name for name in [*classes, *particles])


def test_features_do_not_depend_on_the_order_of_the_particles():
    found = _classification()
    order = np.random.default_rng(5).permutation(30)
    rows = found.particles.rows[order]
    other = replace(found, number=found.number[order], particles=ParticleSet(found.particles.optics, rows))
    for name, values in particle_features(found).items():
        np.testing.assert_allclose(particle_features(other)[name], values[order])
    for name, values in class_features(found).items():
        np.testing.assert_allclose(class_features(other)[name], values)


def test_the_regression_is_the_logistic_of_a_weighted_sum():
    model = Logistic(("a", "b"), np.array([1.0, -2.0]), np.array([2.0, 0.5]), np.array([0.7, -0.4]), 0.3)
    again = Logistic.from_record(json.loads(json.dumps(model.record())))
    score = again({"b": np.array([-1.5, np.nan, 1e9]), "a": np.array([4.0, 1.0, 1.0]), "c": np.zeros(3)})
    expected = [0.7 * 1.5 - 0.4 * 1.0 + 0.3, 0.3, -0.4 * FARTHEST + 0.3]
    np.testing.assert_allclose(logit(score), expected, atol=1e-9)
    np.testing.assert_allclose(logit(model({"c": np.zeros(2)})), [0.3, 0.3])


def test_the_weights_that_come_along_have_a_record():
    assert WEIGHTS.stat().st_size < 50_000
    record, scorer = json.loads(WEIGHTS.read_text()), shipped()
    assert record["left out"][-1]["good lost"] <= 0.05
    for model in (scorer.particles, scorer.particles_unseen):
        assert 0 < model.least < 1
    names = set(class_features(_classification()))
    assert names <= {*scorer.classes.names}
    assert {"level_1", "coarse_3_own", "class"} <= {*scorer.particles.logistic.names}
    assert not any(name.startswith(NAMES) for name in scorer.particles_unseen.logistic.names)
