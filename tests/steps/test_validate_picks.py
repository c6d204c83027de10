"""Verdicts on particles, on noise, and on noise that looks like its template by selection."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from refine_simulation import BOX, DIAMETER, PIXEL, write_project
from validate_given import given

from halfmap.errors import FileFormatError, ParameterError, TableError
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.tables import read_particles
from halfmap.search.picked_noise import compare
from halfmap.search.template_bias import least_share
from halfmap.steps.validate.picks import check_picks
from halfmap.steps.validate.step import ValidateStep


def project(tmp_path, monkeypatch, **how):
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, **{"n": 240, "group": "O", "signal": 1.5} | how)
    return read_particles("particles.star")


def check(tmp_path, particles, template="reference.mrc", **how):
    step = ValidateStep(half1=Path("half1.mrc"), symmetry="O")
    what = given(particles=particles, diameter=DIAMETER, step=step)
    return check_picks(what, tmp_path / template, tmp_path, **{"detail": 30.0} | how)


@pytest.mark.parametrize("seed", [3, 4])
def test_particles_are_particles(tmp_path, monkeypatch, seed):
    found = check(tmp_path, project(tmp_path, monkeypatch, seed=seed))
    assert found.light == "green"
    assert found.values["sigmas_beyond"] > 5
    assert found.values["fit_better_at_least_percent"] > 50
    assert abs(found.values["sigmas_beyond_of_noise"]) < 4
    assert (tmp_path / found.pictures[0]).stat().st_size > 10000


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_noise_is_not(tmp_path, monkeypatch, seed):
    """It still averages to the template, as noise that is noise by construction."""
    found = check(tmp_path, project(tmp_path, monkeypatch, signal=0.0, seed=seed))
    assert found.light == "red"
    assert found.values["fit_better_at_least_percent"] == 0
    assert abs(found.values["sigmas_beyond"]) < 4
    assert found.values["average_like_template"] > 0.3
    assert "as noise alone would" in found.sentence


def test_noise_that_a_template_has_picked_is_not_either(tmp_path, monkeypatch):
    """Those of 1000 images of noise that look most like the template: they fit it, and share no more."""
    everything = project(tmp_path, monkeypatch, signal=0.0, n=1300)
    how = {"project": tmp_path, "diameter": DIAMETER, "detail": 30.0, "group": "O", "most": 1300}
    matches = compare(everything, tmp_path / "reference.mrc", **how).particles.matches
    best = matches.correlation.argsort(descending=True)[:600]
    found = check(tmp_path, everything.with_rows(everything.rows[best.numpy()]))
    assert found.values["above_95_percent_of_noise_percent"] > 10
    assert found.values["fit_better_at_least_percent"] > 10
    assert found.light == "red"
    assert "as noise that a template has picked" in found.sentence


def test_too_few_are_not_judged_by_what_they_cannot_show(tmp_path, monkeypatch):
    particles = project(tmp_path, monkeypatch, n=30, signal=0.5)
    found = check(tmp_path, particles)
    assert found.light == "amber"


def test_images_will_do_as_a_template(tmp_path, monkeypatch):
    particles = project(tmp_path, monkeypatch)
    volume = torch.from_numpy(read_mrc(tmp_path / "truth.mrc").astype(np.float32))
    views = torch.stack([volume.sum(axis) for axis in range(3)])
    write_mrc("views.mrcs", views.numpy(), pixel_size=PIXEL, stack=True)
    found = check(tmp_path, particles, "views.mrcs")
    assert found.values["templates"] == 6
    assert found.light == "green"


def test_the_share_is_a_lower_bound():
    random = np.random.default_rng(1)
    noise = random.normal(0, 1, 1000)
    for share, shift in ((0.0, 0.0), (0.3, 6.0), (0.3, 1.0)):
        values = random.normal(0, 1, 1000) + shift * (random.random(1000) < share)
        assert least_share(values, noise) <= share + 1e-9
    assert least_share(random.normal(6, 1, 1000), noise) > 0.9


def test_what_cannot_be_compared_says_so(tmp_path, monkeypatch):
    particles = project(tmp_path, monkeypatch, n=20)
    write_mrc("flat.mrcs", np.ones((2, BOX, BOX - 2), np.float32), pixel_size=PIXEL, stack=True)
    with pytest.raises(FileFormatError, match="neither a map nor square images"):
        check(tmp_path, particles, "flat.mrcs")
    with pytest.raises(ParameterError, match="hold no detail finer than 100 Å"):
        check(tmp_path, particles, detail=100.0)
    moved = particles.with_columns(pl.col("rlnImageName").str.replace("a.mrcs", "b.mrcs"))
    with pytest.raises(TableError, match="is not there"):
        check(tmp_path, moved)
