"""The steps of picking from table to table."""

from __future__ import annotations

import math
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import polars as pl
import pytest

from halfmap.data import MicrographSet
from halfmap.data.columns import COLUMNS
from halfmap.errors import HalfmapError, ItemsFailedError, ParameterError, TableError
from halfmap.io.coordinates import read_coordinates, write_coordinates
from halfmap.io.micrographs import Image, MicrographItem, list_micrographs
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.star import read_star, write_star
from halfmap.io.tables import write_micrographs
from halfmap.project import Project
from halfmap.steps.extract.step import ExtractStep
from halfmap.steps.pick import references
from halfmap.steps.pick.blob import learn
from halfmap.steps.pick.pictures import draw_picks
from halfmap.steps.pick.step import PickBlob, PickConsensus, PickExport, PickLearned, PickTemplate

SIZE, PIXEL_A, DIAMETER_A = 640, 3.0, 130.0


def _ball(size, x, y, radius):
    py, px = np.mgrid[:size, :size]
    return 2 * np.sqrt(np.maximum(radius**2 - (px - x) ** 2 - (py - y) ** 2, 0)) / radius / 2


def _field(rng, n=45):
    """Balls apart from each other, and their centres."""
    image, places = np.zeros((SIZE, SIZE)), []
    while len(places) < n:
        x, y = rng.uniform(0, SIZE - 1, 2)
        if all(np.hypot(x - a, y - b) * PIXEL_A > DIAMETER_A for a, b in places):
            places.append((x, y))
            image += _ball(SIZE, x, y, DIAMETER_A / 2 / PIXEL_A)
    return image, np.array(places)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pick")
    (folder / "Images").mkdir()
    rng = np.random.default_rng(1)
    truth = {}
    for name in "ab":
        signal, truth[name] = _field(rng)
        image = 100 - 1.2 * signal + rng.normal(0, 1.5, signal.shape)
        write_mrc(folder / "Images" / f"{name}.mrc", image.astype(np.float32), pixel_size=PIXEL_A)
    write_mrc(folder / "Images" / "blank.mrc", np.ones((SIZE, SIZE), np.float32), pixel_size=PIXEL_A)
    noise = rng.normal(100, 1.5, (SIZE, SIZE)).astype(np.float32)
    write_mrc(folder / "Images" / "noise.mrc", noise, pixel_size=PIXEL_A)
    _table(folder, "micrographs.star", ["a", "b", "blank"])
    _table(folder, "noise.star", ["noise"])
    reference = _ball(64, 32, 32, DIAMETER_A / 2 / PIXEL_A)[None].astype(np.float32)
    write_mrc(folder / "classes.mrcs", np.repeat(reference, 2, axis=0), pixel_size=PIXEL_A)
    return folder, truth


def _table(folder, file, names):
    optics = pl.DataFrame(
        {"rlnOpticsGroup": [1], "rlnOpticsGroupName": ["one"], "rlnMicrographPixelSize": [PIXEL_A]}
    )
    rows = pl.DataFrame(
        {"rlnMicrographName": [f"Images/{name}.mrc" for name in names], "rlnOpticsGroup": [1] * len(names)}
    )
    write_micrographs(folder / file, MicrographSet(optics, rows))


def _run(folder, step):
    return Project.open(folder).run(step).folder


def _scores(folder, job, truth):
    """Precision and recall of a job's picks, within a third of the diameter."""
    table = read_star(job / "autopick.star")["coordinate_files"]
    hits = picked = total = 0
    for row in table.to_dicts():
        places = truth[row["rlnMicrographName"].split("/")[-1][:-4]]
        picks = read_coordinates(folder / row["rlnMicrographCoordinates"])
        gaps = np.hypot(
            picks["rlnCoordinateX"].to_numpy()[:, None] - places[:, 0],
            picks["rlnCoordinateY"].to_numpy()[:, None] - places[:, 1],
        )
        hits += int((gaps.min(axis=0) < DIAMETER_A / 3 / PIXEL_A).sum())
        picked, total = picked + len(picks), total + len(places)
    return hits / picked, hits / total


@pytest.fixture(scope="module")
def blob(project):
    return _run(project[0], PickBlob(micrographs="micrographs.star", smallest=70, largest=300))


@pytest.fixture(scope="module")
def template(project):
    step = PickTemplate(micrographs="micrographs.star", references="classes.mrcs", pictures=False)
    return _run(project[0], step)


def test_blob_finds_the_particles_and_their_size(project, blob):
    folder, truth = project
    precision, recall = _scores(folder, blob, truth)
    # Two fields of 45 balls; one in ten may lie over the edge by more than half.
    assert precision > 0.9
    assert recall > 0.85
    picks = read_coordinates(blob / "coordinates" / "a.star")
    assert picks["hmParticleDiameter"][0] == pytest.approx(DIAMETER_A, rel=0.1)
    assert picks["hmPickProbability"].is_between(0.5, 1).all()
    assert picks["rlnAutopickFigureOfMerit"].is_sorted(descending=True)
    assert set(picks.columns) <= set(COLUMNS)
    assert (blob / "Micrographs" / "a.png").stat().st_size > 20_000
    assert (blob / "summary.png").exists()
    assert "blank.mrc" in str(read_star(blob / "failures.star"))


def test_template_finds_them_too(project, template):
    precision, recall = _scores(project[0], template, project[1])
    assert precision > 0.9
    assert recall > 0.85


def test_blank_classes_are_left_out_and_the_others_keep_their_numbers(project, tmp_path):
    folder, _ = project
    classes = read_mrc(folder / "classes.mrcs")
    stack = np.concatenate([np.zeros_like(classes[:1]), classes[:1], 1e-5 * classes[:1], classes[:1]])
    write_mrc(tmp_path / "some.mrcs", stack, pixel_size=PIXEL_A)
    ctx = SimpleNamespace(resolve=lambda name: tmp_path / name, device="cpu")
    found = references.prepare(PickTemplate(micrographs="m.star", references="some.mrcs"), ctx)
    assert found.numbers.tolist() == [2, 4]
    assert len(found.images) == 2
    alone = references.prepare(
        PickTemplate(micrographs="m.star", references=str(folder / "classes.mrcs")), ctx
    )
    assert found.scatter == pytest.approx(alone.scatter)
    flat = np.ones((2, 64, 64), np.float32) * np.array([0, 1], np.float32)[:, None, None]
    write_mrc(tmp_path / "some.mrcs", flat, pixel_size=PIXEL_A)
    with pytest.raises(HalfmapError, match="holds nothing"):
        references.prepare(PickTemplate(micrographs="m.star", references="some.mrcs", diameter=50.0), ctx)


def test_a_cube_of_class_averages_is_no_map(tmp_path):
    # As many classes as pixels, of which every other one is negative: their sum is nothing.
    ball = _ball(64, 32, 32, DIAMETER_A / 2 / PIXEL_A).astype(np.float32)
    stack = np.where(np.arange(64)[:, None, None] % 2, -1, 1) * ball
    write_mrc(tmp_path / "some.mrcs", stack.astype(np.float32), pixel_size=PIXEL_A)
    ctx = SimpleNamespace(resolve=lambda name: tmp_path / name, device="cpu")
    found = references.prepare(
        PickTemplate(micrographs="m.star", references="some.mrcs", angle_step=90.0), ctx
    )
    assert found.diameter == pytest.approx(DIAMETER_A, rel=0.05)


def test_consensus_keeps_what_both_have(project, blob, template):
    folder, truth = project
    tables = tuple(f"{job.relative_to(folder)}/autopick.star" for job in (blob, template))
    job = _run(folder, PickConsensus(coordinates=tables, micrographs="micrographs.star", precision=0.97))
    precision, recall = _scores(folder, job, truth)
    assert precision >= 0.95
    assert recall > 0.8
    picks = read_coordinates(job / "coordinates" / "b.star")
    assert picks["hmPickAgreement"].is_in([1, 2]).all()
    assert (picks["hmPickAgreement"] == 2).mean() > 0.8


def test_noise_gives_no_picks_or_says_so(project):
    try:
        job = _run(project[0], PickBlob(micrographs="noise.star", diameter=130, pictures=False))
    except HalfmapError as error:
        assert "stand out of the noise" in str(error)
    else:
        table = read_star(job / "autopick.star")["coordinate_files"]
        assert table["hmPicks"][0] <= 3


def test_ice_without_particles_ends_with_a_sentence_and_keeps_what_it_wrote(project):
    folder, _ = project
    step = PickTemplate(
        micrographs="noise.star", references="classes.mrcs", probability=0.999, pictures=False
    )
    with pytest.raises(ItemsFailedError, match=r"no pick in the micrograph; look at summary\.png"):
        _run(folder, step)
    job = max((folder / "Pick").glob("job*"))
    assert read_star(job / "autopick.star")["coordinate_files"]["hmPicks"].to_list() == [0]
    assert (job / "summary.png").exists()
    table = str((job / "autopick.star").relative_to(folder))
    with pytest.raises(TableError, match="there are no particles in any of its files; pick particles"):
        _run(folder, ExtractStep(micrographs="noise.star", coordinates=table, diameter=130))


def test_nothing_found_in_the_survey_says_what_else_to_try():
    values = np.random.default_rng(3).normal(size=(120, 120)).astype(np.float32)
    noise = [Image(values, 12.0, np.ones(values.shape, bool), None, (1.0, 1.0))]
    with pytest.raises(ItemsFailedError, match=r"of 130 Å stand out.*try without --diameter"):
        learn(noise, smallest=50, largest=500, diameter=130.0)
    with pytest.raises(ItemsFailedError, match=r"no particles stand out.*give --diameter"):
        learn(noise, smallest=120, largest=140)


def test_picks_are_the_same_for_any_number_of_workers(project):
    from halfmap.engine.executor import RunOptions

    folder, _ = project
    step = PickBlob(micrographs="micrographs.star", diameter=130, pictures=False)
    one = _run(folder, step)
    two = Project.open(folder).run(step, options=RunOptions(executor="processes", workers=2)).folder
    for name in "ab":
        file = f"coordinates/{name}.star"
        assert (one / file).read_bytes() == (two / file).read_bytes()


@pytest.mark.parametrize("format_", ["box", "txt", "csv", "star"])
def test_exported_picks_are_read_back(project, blob, format_):
    folder, _ = project
    table = f"{blob.relative_to(folder)}/autopick.star"
    job = _run(folder, PickExport(coordinates=table, format=format_, box=50, scale=0.5))
    before = read_coordinates(blob / "coordinates" / "a.star")
    after = read_coordinates(job / format_ / f"a.{format_}", scale=2.0)
    for label in ("rlnCoordinateX", "rlnCoordinateY"):
        np.testing.assert_allclose(after[label], before[label], atol=0.02)


def test_micrographs_of_the_same_file_name_are_exported_apart(tmp_path):
    names, files = ["A/x.mrc", "B/x.mrc"], ["Picks/A/x.star", "Picks/B/x.star"]
    for i, file in enumerate(files):
        write_coordinates(
            tmp_path / file, pl.DataFrame({"rlnCoordinateX": [10.0 + i], "rlnCoordinateY": [5.0]})
        )
    listed = pl.DataFrame({"rlnMicrographName": names, "rlnMicrographCoordinates": files})
    write_star(tmp_path / "autopick.star", {"coordinate_files": listed})
    job = _run(tmp_path, PickExport(coordinates="autopick.star", format="csv"))
    exported = read_star(job / "exported.star")["coordinate_files"]["rlnMicrographCoordinates"]
    assert [read_coordinates(tmp_path / file)["rlnCoordinateX"].to_list() for file in exported] == [
        [10],
        [11],
    ]


@pytest.mark.parametrize("size", [math.nan, 0.0, -1.0])
def test_pixel_sizes_that_are_none_are_named(tmp_path, size):
    optics = {"rlnOpticsGroup": [1], "rlnOpticsGroupName": ["one"], "rlnMicrographPixelSize": [PIXEL_A]}
    rows = {"rlnMicrographName": ["a.mrc", "b.mrc"], "rlnOpticsGroup": [1, 1]}
    rows |= {"rlnMicrographPixelSize": [PIXEL_A, size]}
    table = MicrographSet(pl.DataFrame(optics), pl.DataFrame(rows), tmp_path / "m.star")
    ctx = SimpleNamespace(resolve=lambda name: tmp_path / name)
    with pytest.raises(TableError, match=r"m\.star, row 2: .*rlnMicrographPixelSize"):
        list_micrographs(table, ctx.resolve)


CTF = {
    "rlnDefocusU": 12_000.0,
    "rlnDefocusV": 11_800.0,
    "rlnDefocusAngle": 20.0,
    "rlnVoltage": 300.0,
    "rlnSphericalAberration": 2.7,
    "rlnAmplitudeContrast": 0.1,
}


@pytest.mark.parametrize("missing", ["rlnVoltage", "rlnDefocusV"])
def test_a_ctf_that_lacks_a_column_is_refused(tmp_path, missing):
    optics = {"rlnOpticsGroup": [1], "rlnOpticsGroupName": ["one"], "rlnMicrographPixelSize": [PIXEL_A]}
    rows = {"rlnMicrographName": ["a.mrc"], "rlnOpticsGroup": [1]}
    rows |= {name: [value] for name, value in CTF.items() if name != missing}
    table = MicrographSet(pl.DataFrame(optics), pl.DataFrame(rows), tmp_path / "m.star")
    ctx = SimpleNamespace(resolve=lambda name: tmp_path / name)
    with pytest.raises(TableError, match=rf"m\.star: has a defocus but no {missing}; .*--no-use-ctf"):
        list_micrographs(table, ctx.resolve)
    assert list_micrographs(table, ctx.resolve, use_ctf=False)[0].optics is None
    # The microscope's settings without any defocus are those of micrographs whose CTF is not known yet.
    table = MicrographSet(table.optics, table.rows.drop("rlnDefocusU", "rlnDefocusV", strict=False))
    assert list_micrographs(table, ctx.resolve)[0].optics is None


def test_what_is_not_searched_is_tinted(project, tmp_path):
    item = MicrographItem("deep/in/a.mrc", "a", project[0] / "Images" / "a.mrc", PIXEL_A)
    searched = np.ones((40, 40), bool)
    searched[:, :20] = False
    shown = []
    for part in (np.ones_like(searched), searched):
        draw_picks(tmp_path / "a.png", item, pl.DataFrame(), DIAMETER_A, part)
        shown.append(matplotlib.image.imread(tmp_path / "a.png")[..., :3])
    changed = np.abs(shown[1] - shown[0]).max(axis=-1) > 0.02
    # Of the 1000 px beside the head.
    assert changed[100:1000, :490].mean() > 0.95
    assert not changed[100:1000, 510:1000].any()


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (PickLearned(micrographs="micrographs.star", diameter=1260), "1260 Å .* are too large"),
        (PickBlob(micrographs="micrographs.star", diameter=1260), "1260 Å .* are too large"),
        (PickTemplate(micrographs="micrographs.star", references="Images/a.mrc"), "is a micrograph"),
        (
            PickTemplate(micrographs="micrographs.star", references="classes.mrcs", diameter=1260),
            "1260 Å .* are too large",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(project, step, reason):
    folder, _ = project
    before = set(folder.glob("Pick/*"))
    with pytest.raises(ParameterError, match=reason):
        _run(folder, step)
    assert set(folder.glob("Pick/*")) == before


def test_wrong_input_is_named(project, blob):
    folder, _ = project
    table = f"{blob.relative_to(folder)}/autopick.star"
    with pytest.raises(HalfmapError, match="two pickers"):
        _run(folder, PickConsensus(coordinates=(table,), micrographs="micrographs.star"))
    for again in (table, str(folder / table)):
        with pytest.raises(HalfmapError, match="given twice"):
            _run(folder, PickConsensus(coordinates=(table, again), micrographs="micrographs.star"))
    with pytest.raises(HalfmapError, match="--box"):
        _run(folder, PickExport(coordinates=table))
    with pytest.raises(HalfmapError, match="--smallest"):
        _run(folder, PickBlob(micrographs="micrographs.star", smallest=300, largest=200))
    with pytest.raises(TableError, match="names no coordinates"):
        _run(folder, PickExport(coordinates="micrographs.star", box=3))
    with pytest.raises(HalfmapError, match="hold no detail"):
        _run(folder, PickTemplate(micrographs="noise.star", references="classes.mrcs", resolution=5))
    with pytest.raises(HalfmapError, match=r"too small|micrograph"):
        _run(folder, PickBlob(micrographs="noise.star", diameter=2000))
