"""The step `curate`: verdicts on micrographs, and from table to tables."""

from __future__ import annotations

import matplotlib.image
import numpy as np
import polars as pl
import pytest

from halfmap.data import MicrographSet
from halfmap.data.columns import COLUMNS
from halfmap.errors import HalfmapError, ParameterError, TableError
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_micrographs, write_micrographs
from halfmap.project import Project
from halfmap.steps.curate import criteria
from halfmap.steps.curate.step import CurateStep


def _step(table: str = "m.star", **limits: object) -> CurateStep:
    return CurateStep.model_validate({"micrographs": table} | limits)


STEP = _step()


def _optics(groups: int = 1) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "rlnOpticsGroup": list(range(1, groups + 1)),
            "rlnOpticsGroupName": [f"group{g}" for g in range(1, groups + 1)],
            "rlnVoltage": [300.0] * groups,
            "rlnSphericalAberration": [2.7] * groups,
            "rlnAmplitudeContrast": [0.1] * groups,
            "rlnMicrographPixelSize": [3.0] * groups,
        }
    )


def _table(groups: int = 1, **columns: object) -> MicrographSet:
    n = len(next(iter(columns.values())))  # type: ignore[arg-type]
    rows = {"rlnMicrographName": [f"M/{i}.mrc" for i in range(n)]}
    rows |= {"rlnOpticsGroup": [1] * n} | columns  # type: ignore[operator]
    return MicrographSet(_optics(groups), pl.DataFrame(rows))


def _reasons(table: MicrographSet, step: CurateStep = STEP) -> list[list[str]]:
    return criteria.reasons(criteria.judge(table, step), table, automatic=step.automatic)


def test_micrographs_that_are_alike_are_all_kept():
    rng = np.random.default_rng(0)
    table = _table(
        rlnCtfMaxResolution=rng.normal(7.0, 0.05, 200),
        rlnDefocusU=rng.uniform(9_000, 20_000, 200),
        rlnDefocusV=rng.uniform(8_900, 9_000, 200),
        rlnCtfAstigmatism=rng.gamma(4, 300, 200),
        rlnAccumMotionTotal=[55.0] * 200,
        hmMicrographMean=rng.normal(40, 0.01, 200),
        hmCoarseContrast=rng.normal(0.02, 1e-4, 200),
    )
    assert _reasons(table) == [[]] * 200


def test_what_is_fine_is_kept_however_much_better_the_others_are():
    values = [2.8] * 40 + [4.9, 5.6]
    assert [bool(own) for own in _reasons(_table(rlnCtfMaxResolution=values))] == [False] * 41 + [True]


def test_each_rejection_says_why():
    rng = np.random.default_rng(1)
    resolution, motion, mean = rng.normal(4, 0.2, 50), rng.normal(30, 3, 50), rng.normal(40, 1, 50)
    resolution[3] = 9.25
    motion[4] = 180
    motion[5] = np.nan
    mean[6] = 20
    problems = ["none"] * 50
    problems[7] = "no Thon rings; strong ice ring"
    problems[8] = "defocus varies within the field"
    table = _table(
        rlnCtfMaxResolution=resolution,
        rlnAccumMotionTotal=motion,
        hmMicrographMean=mean,
        hmCtfProblem=problems,
    )
    found = _reasons(table)
    assert {row for row, own in enumerate(found) if own} == {3, 4, 6, 7}
    assert found[3][0].startswith("finest Thon rings 9.25 above ")
    assert found[3][0].endswith(f" Å (median {np.median(resolution):.3g})")
    assert found[4][0].startswith("motion 180 above ")
    assert found[6][0].startswith("mean 20 below ")
    assert found[7] == ["no Thon rings"]


def test_limits_of_the_user_stand_by_themselves():
    table = _table(
        rlnCtfMaxResolution=[3.0, 3.4, 3.6, 30.0], rlnDefocusU=[5e3, 2e4] * 2, rlnDefocusV=[5e3] * 4
    )
    step = _step(ctf_resolution_max=3.5, automatic=False)
    assert [bool(own) for own in _reasons(table, step)] == [False, False, True, True]
    step = _step(ctf_resolution_max=50, defocus_min=6_000)
    assert [bool(own) for own in _reasons(table, step)] == [True, False, True, False]
    with pytest.raises(ParameterError, match="defocus-min"):
        _step(defocus_min=2e4, defocus_max=1e4)


def test_optics_groups_are_compared_each_with_itself():
    n = 30
    groups = [1] * n + [2] * n
    rng = np.random.default_rng(2)
    resolution = np.concatenate([rng.normal(3, 0.1, n), rng.normal(8, 0.2, n)])
    resolution[0] = 8.0
    found = _reasons(_table(2, rlnOpticsGroup=groups, rlnCtfMaxResolution=resolution))
    assert [row for row, own in enumerate(found) if own] == [0]


def test_a_few_micrographs_are_not_compared_and_useless_ones_are_rejected():
    found = _reasons(_table(rlnCtfMaxResolution=[3.0, 3.1, 3.0, 9.0, 25.0]))
    assert [bool(own) for own in found] == [False] * 4 + [True]


def test_severity_is_one_at_the_limit():
    step = _step(ctf_resolution_max=6, automatic=False)
    judgement = criteria.judge(_table(rlnCtfMaxResolution=[4.0, 4.0, 5.0, 6.0, 7.0, 4.0, 4.0]), step)[0]
    np.testing.assert_allclose(judgement.severity, [0, 0, 0.5, 1, 1.5, 0, 0])


@pytest.fixture
def project(tmp_path):
    rng = np.random.default_rng(3)
    (tmp_path / "M").mkdir()
    shape = 420, 500
    y, x = np.mgrid[: shape[0], : shape[1]] * 3.0
    ball = np.hypot(x - 500, y - 400) < 350
    for name, darkness in (("a", 0 * x), ("b", 0.2 * ball), ("c", 0 * x), ("d", 0.9 * (x > 300))):
        image = rng.poisson(360 * (1 - darkness)).astype(np.float32)
        if name == "c":
            image[:100] = np.nan
        write_mrc(tmp_path / "M" / f"{name}.mrc", image, pixel_size=3.0)
    rows = pl.DataFrame(
        {
            "rlnMicrographName": [f"M/{name}.mrc" for name in "abcd"],
            "rlnOpticsGroup": [1] * 4,
            "someOtherColumn": [7, 8, 9, 10],
        }
    )
    write_micrographs(tmp_path / "m.star", MicrographSet(_optics(), rows))
    return tmp_path


def test_a_table_without_ctf_is_curated(project):
    job = Project.open(project).run(STEP)
    kept = read_micrographs(job.folder / "micrographs.star").rows
    lost = read_micrographs(job.folder / "micrographs_rejected.star").rows
    assert kept["rlnMicrographName"].to_list() == ["M/a.mrc", "M/b.mrc"]
    assert kept["someOtherColumn"].to_list() == [7, 8]
    assert lost["rlnMicrographName"].to_list() == ["M/d.mrc"]
    assert lost["hmReason"][0].startswith("masked ")
    assert "M/c.mrc" in str(read_star(job.folder / "failures.star"))
    assert kept["hmMicrographMaskedFraction"][0] == 0
    assert kept["hmMaskedBy"][0] == "nothing"
    assert kept["hmMaskedBy"][1].startswith("contaminant ")
    assert all(label in COLUMNS for label in [*kept.columns, *lost.columns] if label.startswith("hm"))


def test_masks_are_one_where_the_specimen_is_good(project):
    job = Project.open(project).run(STEP)
    row = read_micrographs(job.folder / "micrographs.star").rows.row(1, named=True)
    path = project / row["hmMicrographMask"]
    mask, header = read_mrc(path, 0), read_header(path)
    assert header.pixel_size == pytest.approx(3.0 * 500 / mask.shape[1])
    assert 15 < 3.0 * 500 / mask.shape[1] < 30
    assert set(np.unique(mask)) == {0, 1}
    height, width = (np.arange(n) + 0.5 for n in mask.shape)
    x, y = width * 1500 / mask.shape[1], height[:, None] * 1260 / mask.shape[0]
    distance = np.hypot(x - 500, y - 400)
    assert not mask[distance < 340].any()
    assert mask[distance > 350 + 50 + 60].all()
    assert row["hmMicrographMaskedFraction"] == pytest.approx(1 - mask.mean(), abs=0.02)


def test_pictures_show_all_micrographs(project):
    job = Project.open(project).run(STEP)
    accepted = matplotlib.image.imread(job.folder / "accepted.png")
    rejected = matplotlib.image.imread(job.folder / "rejected.png")
    assert accepted.shape[1] == rejected.shape[1]
    thumbnail = matplotlib.image.imread(job.folder / "Micrographs" / "b.png")[..., :3]
    coloured = np.ptp(thumbnail, axis=-1) > 0.3
    # The outline of the ball, which lies 400 Å above the lower edge.
    rows, columns = np.nonzero(coloured)
    assert 1 - rows.mean() / len(thumbnail) == pytest.approx(400 / 1260, abs=0.03)
    assert columns.mean() / thumbnail.shape[1] == pytest.approx(500 / 1500, abs=0.03)
    assert (job.folder / "summary.png").stat().st_size > 5_000


def test_when_all_are_rejected_the_table_says_why(project):
    with pytest.raises(HalfmapError, match="all 3 micrographs are rejected"):
        Project.open(project).run(_step(std_max=0.1))
    rejected = read_micrographs(project / "Curate" / "job001" / "micrographs_rejected.star")
    assert all("standard deviation" in reason for reason in rejected.rows["hmReason"])


def test_what_cannot_be_read_is_said(project):
    rows = read_micrographs(project / "m.star").rows
    write_micrographs(project / "twice.star", MicrographSet(_optics(), pl.concat([rows, rows])))
    with pytest.raises(TableError, match="twice"):
        Project.open(project).run(_step("twice.star"))
    without = _optics().drop("rlnMicrographPixelSize")
    write_micrographs(project / "without.star", MicrographSet(without, rows))
    with pytest.raises(TableError, match="rlnMicrographPixelSize"):
        Project.open(project).run(_step("without.star"))
    with pytest.raises(HalfmapError):
        Project.open(project).run(_step("missing.star"))
    gone = rows.with_columns(pl.lit("M/gone.mrc").alias("rlnMicrographName"))[:1]
    write_micrographs(project / "gone.star", MicrographSet(_optics(), gone))
    with pytest.raises(HalfmapError, match="every micrograph failed"):
        Project.open(project).run(_step("gone.star"))
