"""Plans of classifications in two dimensions, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from figure_simulation import BOX, DIAMETER, PIXEL, planned_job, run, write_project

from halfmap.errors import HalfmapError, ParameterError, ResourceError, TableError
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.tables import read_particles, write_particles
from halfmap.steps.class2d import iterate, plan, reach
from halfmap.steps.class2d.expectation import in_halves
from halfmap.steps.class2d.step import Class2DStep


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("class2d")
    write_project(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "words", "error"),
    [
        ({"diameter": 500.0}, "does not fit", ParameterError),
        ({"diameter": None}, "how large", ParameterError),
        ({"classes": 300}, "240 particles cannot be sorted into 300 classes", ParameterError),
        ({"resolution": 100.0}, "too few .*; give a --resolution of 48 Å or finer", ParameterError),
    ],
)
def test_parameters_that_cannot_be(project, change, words, error):
    with pytest.raises(error, match=words):
        run(project, **change)


@pytest.mark.parametrize("resolution", [30.0, 48.0])
def test_a_resolution_coarser_than_the_first_is_where_it_starts_and_stays(project, resolution):
    job = run(project, resolution=resolution, iterations=3, full_iterations=1)
    figures = [json.loads(path.read_text()) for path in sorted((job / iterate.FOLDER).glob("it*.json"))]
    rings = round(BOX * PIXEL / resolution)
    assert [one["searched_A"] for one in figures] == [BOX * PIXEL / rings] * 3


@pytest.mark.parametrize(("iterations", "full"), [(2, 1), (3, 1), (7, 3), (8, 4), (25, 4)])
def test_few_iterations_have_fewer_with_all_particles(iterations, full):
    step = Class2DStep(particles=Path("particles.star"), classes=5, iterations=iterations)
    sizes = [one.size for one in plan._schedule(step, 20_000, 10, 20)]
    assert sizes.count(20_000) == full


@pytest.mark.parametrize(("diameter", "warned"), [(40.0, True), (80.0, False), (DIAMETER, False)])
def test_a_diameter_far_below_the_particles_is_warned_of(project, caplog, diameter, warned):
    """Figures of spots to 14 px from the middle: 85 Å across, and some Å more for the spots' own size."""
    images, planned = planned_job(project, diameter=diameter)
    reach.check_diameter(planned, images)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == warned
    if warned:
        across = float(said[0].partition("still ")[2].split()[0])
        assert 60 < across < 100


def test_noise_reaches_nowhere(project, caplog, monkeypatch):
    images, planned = planned_job(project, diameter=20.0)
    generator = torch.Generator().manual_seed(1)
    monkeypatch.setattr(
        images, "get", lambda rows: torch.randn(len(rows), planned.box, planned.box, generator=generator)
    )
    for _ in range(20):
        reach.check_diameter(planned, images)
    assert not any("contrast" in text for text in caplog.messages)


def test_classes_of_few_particles_are_warned_of(project, caplog):
    planned_job(project, classes=8)
    assert not any("too few" in text for text in caplog.messages)
    planned_job(project, classes=12)
    said = "240 particles are 20 a class, too few to show much: fewer --classes may show more"
    assert said in caplog.messages


def test_batches_are_halved_where_memory_does_not_suffice():
    seen = []

    def search(rows, pictures):
        if len(rows) > 3:
            raise torch.OutOfMemoryError("out of memory")
        seen.append(rows.tolist())
        return float(pictures.sum())

    found = in_halves(search, np.arange(10), torch.arange(10.0))
    assert np.concatenate(seen).tolist() == list(range(10))
    assert sum(found) == 45.0
    with pytest.raises(ResourceError, match="one image"):
        in_halves(lambda rows, pictures: torch.empty(1 << 50), np.arange(2), torch.zeros(2))
    with pytest.raises(RuntimeError, match="shapes"):
        in_halves(lambda rows, pictures: torch.zeros(2) @ torch.zeros(3, 3), np.arange(2), torch.zeros(2))


def test_tables_that_cannot_be(project, tmp_path):
    folder = tmp_path / "project"
    shutil.copytree(project, folder, ignore=shutil.ignore_patterns("Class2D", "default_pipeline.star"))
    particles = read_particles(folder / "particles.star")
    cases = {
        "rlnDefocusU": particles.with_rows(particles.rows.drop("rlnDefocusU")),
        r"Stacks/a\.mrcs": particles.with_rows(
            particles.rows.with_columns(
                pl.when(pl.int_range(pl.len()) == 7)
                .then(pl.lit("000999@Stacks/a.mrcs"))
                .otherwise(pl.col("rlnImageName"))
                .alias("rlnImageName")
            )
        ),
    }
    for words, table in cases.items():
        write_particles(folder / "particles.star", table)
        with pytest.raises(TableError, match=words):
            run(folder)
    write_particles(folder / "particles.star", particles)
    stack = np.array(read_mrc(folder / "Stacks/a.mrcs"))
    stack[3, 5, 5] = np.nan
    write_mrc(folder / "Stacks/a.mrcs", stack, pixel_size=PIXEL, stack=True)
    with pytest.raises(HalfmapError, match=r"000004@Stacks/a\.mrcs|row 4"):
        run(folder)
