"""The step `select`: by hand and by scores, from a classification to its tables."""

from __future__ import annotations

import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import polars as pl
import pytest

from halfmap.data import ParticleSet
from halfmap.data.columns import COLUMNS
from halfmap.engine import RunOptions
from halfmap.errors import HalfmapError, ItemsFailedError, ParameterError, TableError
from halfmap.io.mrc import write_mrc
from halfmap.io.star import read_star, write_star
from halfmap.io.tables import read_particles, write_particles
from halfmap.project import Project
from halfmap.steps.select.step import SelectStep

BOX, PIXEL, DIAMETER, EACH = 48, 4.0, 130.0, 40
GOOD, CARBON, EMPTY = (0, 1), 2, 3
"""Classes of a molecule in two views, of a film's edge, and one without members."""


def _averages() -> np.ndarray:
    y, x = (np.mgrid[:BOX, :BOX] - BOX // 2) * PIXEL
    mask = 1 / (1 + np.exp((np.hypot(x, y) - DIAMETER / 2) / 3))
    lobes = [np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * 12**2)) for a, b in ((-20, 0), (16, 14), (12, -22))]
    edge = 3 / (1 + np.exp(-(x + 10) / 6))
    views = [lobes[0] + lobes[1] + 0.8 * lobes[2], lobes[0] + 1.1 * lobes[1], edge - 1.5, 0 * x]
    return np.stack([view * mask for view in views]).astype(np.float32)


def _particles(rng: np.random.Generator, averages: np.ndarray) -> ParticleSet:
    number = np.repeat([1, 2, 3], EACH)
    images = averages[number - 1] * 3 + rng.normal(0, 1, (len(number), BOX, BOX))
    images[number == CARBON + 1] += 6 * (np.arange(BOX) > 20)
    write_mrc("Images/all.mrcs", images.astype(np.float32), pixel_size=PIXEL, stack=True)
    optics = {"rlnOpticsGroup": [1], "rlnOpticsGroupName": ["one"], "rlnVoltage": [300.0]}
    optics |= {"rlnSphericalAberration": [2.7], "rlnAmplitudeContrast": [0.1]}
    optics |= {"rlnImagePixelSize": [PIXEL], "rlnImageSize": [BOX], "rlnImageDimensionality": [2]}
    good = number <= 2
    n = len(number)
    rows = {
        "rlnImageName": [f"{i + 1:06d}@Images/all.mrcs" for i in range(n)],
        "rlnOpticsGroup": [1] * n,
        "rlnClassNumber": number,
        "rlnAnglePsi": rng.uniform(-180, 180, n),
        "rlnOriginXAngst": rng.normal(0, np.where(good, 4.0, 15.0)),
        "rlnOriginYAngst": rng.normal(0, np.where(good, 4.0, 15.0)),
        "rlnMaxValueProbDistribution": np.where(good, 0.2, 0.8) + rng.normal(0, 0.03, n),
        "hmClassProbability": np.full(n, 0.95),
        "hmPosteriorEntropy": rng.normal(3, 0.4, n),
        "hmAnglePsiError": rng.uniform(2, 4, n),
        "hmOriginError": rng.uniform(1, 2, n),
        "rlnLogLikeliContribution": rng.normal(60, 10, n) + np.where(good, 0, 500),
        "someOtherColumn": np.arange(n),
    }
    return ParticleSet(pl.DataFrame(optics), pl.DataFrame(rows))


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A classification of two classes of a molecule, one of carbon and an empty one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Images").mkdir()
    averages = _averages()
    write_particles(tmp_path / "particles.star", _particles(np.random.default_rng(1), averages))
    write_mrc(tmp_path / "class_averages.mrcs", averages, pixel_size=PIXEL, stack=True)
    ring = np.arange(BOX // 2)
    general = {"rlnPixelSize": PIXEL, "rlnOriginalImageSize": BOX, "rlnParticleDiameter": DIAMETER}
    classes = pl.DataFrame(
        {
            "rlnReferenceImage": [f"{i + 1:06d}@class_averages.mrcs" for i in range(4)],
            "rlnClassDistribution": [1 / 3, 1 / 3, 1 / 3, 0.0],
            "rlnEstimatedResolution": [9.0, 10.0, 40.0, 999.0],
        }
    )
    spectra = {
        f"model_class_{i + 1}": pl.DataFrame(
            {"rlnSpectralIndex": ring, "rlnSsnrMap": 300 * np.exp(-ring / scale)}
        )
        for i, scale in enumerate((4, 4, 1.0, 1.0))
    }
    write_star(tmp_path / "model.star", {"model_general": general, "model_classes": classes, **spectra})
    return tmp_path


def _run(folder: Path, **values: object) -> Path:
    step = SelectStep.model_validate({"model": "model.star"} | values)
    return Project.at(folder).run(step, RunOptions()).folder


def _classes(path: Path) -> list[int]:
    return sorted(set(read_particles(path).rows["rlnClassNumber"].to_list()))


@pytest.mark.parametrize("values", [{"classes": (1, 2)}, {"exclude": (3, 4)}, {"averages": "chosen.star"}])
def test_classes_named_are_kept_whole(project, values):
    rows = pl.DataFrame({"rlnReferenceImage": ["000002@class_averages.mrcs", "000001@class_averages.mrcs"]})
    write_star(project / "chosen.star", {"": rows})
    folder = _run(project, **values)
    kept, rejected = read_particles(folder / "particles.star"), read_particles(folder / "rejected.star")
    assert len(kept) == 2 * EACH and _classes(folder / "particles.star") == [1, 2]
    assert kept.rows["someOtherColumn"].to_list() == list(range(2 * EACH))
    assert set(rejected.rows["hmReason"]) == {"class 3"}
    assert len(rejected) == EACH
    assert set(kept.rows.columns) <= {*COLUMNS, "someOtherColumn"}


def test_the_table_of_averages_chooses_again_what_was_chosen(project):
    folder = _run(project, classes=(2,))
    again = _run(project, averages=folder / "class_averages.star")
    assert _classes(again / "particles.star") == [2]


def test_a_classification_with_scores_can_be_selected_from_again(project):
    folder = _run(project, classes=(1, 2))
    model = read_star(folder / "model.star")
    scores = model["model_classes"]["rlnClassScore"].to_list()  # type: ignore[index]
    assert len(scores) == 4 and "model_class_3" in model
    again = _run(project, model=folder / "model.star", particles="particles.star", classes=(1, 2))
    assert read_star(again / "model.star")["model_classes"]["rlnClassScore"].to_list() == scores  # type: ignore[index]


def test_scores_keep_molecules_and_reject_carbon(project):
    folder = _run(project)
    assert _classes(folder / "particles.star") == [1, 2]
    averages = read_star(folder / "class_averages.star")[""]
    assert isinstance(averages, pl.DataFrame)
    assert averages["rlnReferenceImage"].to_list() == [f"{i + 1:06d}@class_averages.mrcs" for i in GOOD]
    score = read_star(folder / "model.star")["model_classes"]["rlnClassScore"].to_numpy()  # type: ignore[index]
    assert score[list(GOOD)].min() > 0.5 > score[CARBON] and score[EMPTY] == 0
    assert averages["rlnClassScore"].to_list() == score[list(GOOD)].tolist()
    kept = read_particles(folder / "particles.star").rows
    assert set(kept["rlnClassScore"]) == set(score[list(GOOD)])
    assert len(kept) >= 0.9 * 2 * EACH


def test_what_is_expected_to_be_lost_is_the_share_of_the_scores_rejected(project):
    every = _run(project, min_particle_score=0.0, min_score=0.0)
    least = float(read_particles(every / "particles.star").rows["hmParticleScore"].median())  # type: ignore[arg-type]
    folder = _run(project, min_particle_score=least, min_score=0.0)
    kept = read_particles(folder / "particles.star").rows["hmParticleScore"].to_numpy()
    lost = read_particles(folder / "rejected.star").rows["hmParticleScore"].to_numpy()
    assert len(kept) + len(lost) == 3 * EACH and kept.min() >= least > lost.max()
    general = read_star(folder / "model.star")["model_general"]
    assert general["hmGoodLost"] == pytest.approx(lost.sum() / (lost.sum() + kept.sum()))  # type: ignore[index]


def test_small_classes_are_rejected_on_demand(project):
    table = read_particles("particles.star")
    write_particles("particles.star", table.select(np.arange(len(table)) < EACH + 10))
    blocks = read_star("model.star")
    shares = pl.Series("rlnClassDistribution", [0.8, 0.2, 0.0, 0.0])
    write_star("model.star", blocks | {"model_classes": blocks["model_classes"].with_columns(shares)})  # type: ignore[operator, union-attr]
    assert _classes(_run(project, min_particles=11, min_score=0.0) / "particles.star") == [1]


def test_workers_change_nothing(project, monkeypatch):
    monkeypatch.setattr("halfmap.steps.select.images._PART", 25)
    whole = read_particles(_run(project) / "particles.star").rows
    step = SelectStep(model=Path("model.star"))
    split = Project.at(project).run(step, RunOptions(executor="processes", workers=2)).folder
    assert read_particles(split / "particles.star").rows.equals(whole)


def test_relion_s_names_and_columns_will_do(project):
    shutil.move("particles.star", "run_it025_data.star")
    shutil.move("model.star", "run_it025_model.star")
    table = read_particles("run_it025_data.star")
    own = [name for name in table.rows.columns if name.startswith("hm")]
    write_particles("run_it025_data.star", ParticleSet(table.optics, table.rows.drop(own)))
    blocks = read_star("run_it025_model.star")
    general = {key: value for key, value in blocks["model_general"].items() if key != "rlnParticleDiameter"}  # type: ignore[union-attr]
    write_star("run_it025_model.star", blocks | {"model_general": general})
    names = {"rlnModelStarFile": "run_it025_model.star", "rlnExperimentalDataStarFile": "run_it025_data.star"}
    write_star("run_it025_optimiser.star", {"optimiser_general": names})
    for name in ("model", "optimiser"):
        folder = _run(project, model=f"run_it025_{name}.star")
        assert _classes(folder / "particles.star") == [1, 2]


def test_the_picture_has_a_frame_for_every_class(project):
    folder = _run(project, classes=(1,))
    picture = (255 * matplotlib.image.imread(folder / "classes.png")[..., :3]).round().astype(int)
    frames = [
        (np.abs(picture - colour).sum(-1) < 12).sum() for colour in ((0x1F, 0x77, 0xD0), (0xE0, 0x31, 0x2F))
    ]
    # Each is some 2 px wide about 120 px; two classes with members are left out.
    assert frames[0] > 4 * 120 and frames[1] == pytest.approx(2 * frames[0], rel=0.05)


def _rename_column(old: str, new: str) -> None:
    table = read_particles("particles.star")
    write_particles("particles.star", ParticleSet(table.optics, table.rows.rename({old: new})))


def _change_class(number: int) -> None:
    table = read_particles("particles.star")
    numbers = pl.Series("rlnClassNumber", [number, *table.rows["rlnClassNumber"].to_list()[1:]])
    write_particles("particles.star", table.with_columns(numbers))


def _all_in(number: int) -> None:
    write_particles(
        "particles.star",
        read_particles("particles.star").with_columns(pl.lit(number).alias("rlnClassNumber")),
    )


def _other_box() -> None:
    table = read_particles("particles.star")
    optics = table.optics.with_columns(pl.lit(64).alias("rlnImageSize"))
    write_particles("particles.star", ParticleSet(optics, table.rows))


@pytest.mark.parametrize(
    ("spoil", "values", "error", "match"),
    [
        (None, {"classes": (1, 5)}, ParameterError, "--classes: there is no class 5; classes are 1 to 4"),
        (None, {"classes": range(1, 40)}, ParameterError, "there is no class 5, 6, 7, 8, 9 …; classes are"),
        (None, {"exclude": (0,)}, ParameterError, "--exclude: there is no class 0"),
        (None, {"classes": (1,), "exclude": (2,)}, ParameterError, "--classes and --exclude, not both"),
        (None, {"classes": (1,), "min_score": 0.3}, ParameterError, "--min-score has nothing to choose"),
        (None, {"classes": (4,)}, ParameterError, "classes kept .* have no particles"),
        (None, {"min_score": 1.0}, ItemsFailedError, "the best class, [12], has a score"),
        (None, {"averages": "particles.star"}, TableError, "names no class averages"),
        (None, {"model": "particles.star", "particles": "particles.star"}, TableError, "no class averages"),
        (None, {"model": "class_averages.mrcs"}, HalfmapError, "is no table; give the model.star"),
        (lambda: Path("particles.star").unlink(), {}, HalfmapError, "name them with --particles"),
        (lambda: _rename_column("rlnClassNumber", "x"), {}, TableError, "have no classes"),
        (lambda: _change_class(7), {}, TableError, "row 1: class 7, where the model has 4"),
        (lambda: _all_in(3), {}, TableError, "hold other shares"),
        (_other_box, {}, TableError, "averages of 48 px, but particles of 64 px"),
        (lambda: shutil.rmtree("Images"), {}, HalfmapError, "all.mrcs"),
        (lambda: Path("class_averages.mrcs").unlink(), {}, HalfmapError, "class_averages.mrcs"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(project, spoil, values, error, match):
    if spoil:
        spoil()
    with pytest.raises(error, match=match):
        _run(project, **values)


def _sort_by_maps(folder: Path) -> None:
    """Turn the classification into one of four maps, each without a detail of its own."""
    names = [f"class{i + 1:03d}.mrc" for i in range(4)]
    for name, average in zip(names, _averages(), strict=True):
        volume = np.repeat(average[None], BOX, axis=0) / BOX
        write_mrc(folder / name, volume.astype(np.float32), pixel_size=PIXEL)
    model = read_star(folder / "model.star")
    assert isinstance(model["model_general"], dict) and isinstance(model["model_classes"], pl.DataFrame)
    general = model["model_general"] | {"rlnReferenceDimensionality": 3}
    classes = model["model_classes"].with_columns(pl.Series("rlnReferenceImage", names))
    write_star(folder / "model.star", {"model_general": general, "model_classes": classes})


def test_maps_are_chosen_by_hand(project):
    _sort_by_maps(project)
    folder = _run(project, classes=(1,))
    assert _classes(folder / "particles.star") == [1]
    kept = read_star(folder / "class_averages.star")[""]
    assert isinstance(kept, pl.DataFrame) and kept["rlnReferenceImage"].to_list() == ["class001.mrc"]
    assert "rlnClassScore" not in kept.columns
    # Seen from z they are the averages again.
    assert len(np.unique(matplotlib.image.imread(folder / "classes.png")[..., :3])) > 50


def test_maps_are_not_chosen_by_scores(project):
    _sort_by_maps(project)
    with pytest.raises(ParameterError, match=r"not of maps.*--classes"):
        _run(project)
