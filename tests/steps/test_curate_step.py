"""The step `curate`: verdicts on micrographs, and from table to tables."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

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


def _limits(step: CurateStep = STEP, **columns: object) -> dict[str, tuple[float, float]]:
    return {j.criterion.name: j.limits[1] for j in criteria.judge(_table(**columns), step)}


def test_automatic_limits_are_of_this_world():
    rng = np.random.default_rng(4)
    half_bad = np.where(np.arange(60) % 2, rng.normal(2, 0.3, 60), rng.normal(30, 3, 60))
    limits = _limits(
        rlnMicrographTiltAngle=rng.uniform(10, 45, 60),
        rlnPhaseShift=rng.uniform(20, 170, 60),
        hmMicrographStd=half_bad,
        hmMicrographMean=half_bad,
        rlnCtfMaxResolution=half_bad,
        rlnDefocusU=rng.uniform(1e3, 9e4, 60),
        rlnDefocusV=[1e3] * 60,
    )
    assert limits["tilt"] == (-np.inf, 70)
    assert limits["phase_shift"] == (-np.inf, np.inf)
    assert limits["std"][0] == limits["mean"][0] == -np.inf
    assert limits["ctf_resolution"] == (-np.inf, 20)
    assert limits["defocus"][0] == 200
    assert 4.5e4 < limits["defocus"][1] < 1e5
    for judgement in criteria.judge(_table(rlnPhaseShift=rng.uniform(20, 170, 60)), STEP):
        assert judgement.kept() == "no limit"


def test_a_mean_near_zero_is_measured_by_the_standard_deviation():
    mean = [1e-7, -1e-7] * 10 + [0.2, 3.0]
    found = _reasons(_table(hmMicrographMean=mean, hmMicrographStd=[1.0] * 22))
    assert [row for row, own in enumerate(found) if own] == [21]


def test_infinite_values_are_beyond_every_limit_and_unknown_ones_within():
    resolution = [3.0 + 0.01 * row for row in range(20)] + [np.inf, np.nan]
    for step in (STEP, _step(ctf_resolution_max=6), _step(ctf_resolution_max=6, automatic=False)):
        found = _reasons(_table(rlnCtfMaxResolution=resolution), step)
        assert [row for row, own in enumerate(found) if own] == [20]
        assert found[20][0].startswith("finest Thon rings inf above ")
    assert _reasons(_table(rlnCtfMaxResolution=[None, 3.0, 25.0]))[0] == []


def test_a_quarter_of_bad_micrographs_does_not_hide_itself():
    rng = np.random.default_rng(5)
    resolution = np.concatenate([rng.normal(4, 0.2, 76), rng.uniform(8, 18, 24)])
    found = _reasons(_table(rlnCtfMaxResolution=resolution))
    assert [bool(own) for own in found] == [False] * 76 + [True] * 24


@pytest.mark.parametrize(
    ("bad", "loose"), [(0, False), (10, False), (45, True), (60, True), (100, True)], ids=str
)
def test_limits_that_too_many_bad_micrographs_have_loosened_are_known_as_such(bad, loose):
    rng = np.random.default_rng(6)
    resolution = np.concatenate([rng.normal(4, 0.2, 100 - bad), rng.uniform(8, 18, bad)])
    (judgement,) = criteria.judge(_table(rlnCtfMaxResolution=resolution), STEP)
    assert judgement.is_loose() == loose
    # Coarse pixels make all alike.
    (judgement,) = criteria.judge(_table(rlnCtfMaxResolution=rng.normal(8, 0.3, 100)), STEP)
    assert not judgement.is_loose()


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
    # A whole number of the micrograph's pixels; the field is the same to half of one of the mask's.
    assert header.pixel_size == pytest.approx(24, rel=1e-6)
    assert (np.abs(24 * np.array(mask.shape) - [1260, 1500]) <= 12).all()
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
    job = Project.open(project).job(1)
    assert job.status == "Failed"
    rejected = read_micrographs(job.folder / "micrographs_rejected.star")
    assert all("standard deviation" in reason for reason in rejected.rows["hmReason"])


@pytest.mark.parametrize(
    ("limits", "label"),
    [
        ({"ctf_resolution_max": 6}, "rlnCtfMaxResolution"),
        ({"defocus_min": 5e3, "defocus_max": 2e4}, "rlnDefocusV"),
        ({"motion_total_max": 9, "automatic": False}, "rlnAccumMotionTotal"),
    ],
    ids=str,
)
def test_a_limit_of_what_the_table_does_not_know_is_refused_before_any_work(project, limits, label):
    table = read_micrographs(project / "m.star")
    columns = {"rlnDefocusU": 1e4, "rlnAccumMotionTotal": np.nan}
    rows = table.rows.with_columns(**{name: pl.lit(value) for name, value in columns.items()})
    write_micrographs(project / "n.star", MicrographSet(table.optics, rows))
    option = "--" + next(iter(limits)).replace("_", "-")
    with pytest.raises(
        ParameterError, match=rf"n\.star: {option} has nothing .* no values of {label}; leave"
    ):
        Project.open(project).run(_step("n.star", **limits))
    assert not (project / "Curate").exists()


def test_limits_of_what_is_measured_here_need_no_column(project):
    job = Project.open(project).run(_step(masked_max=0.5, std_max=1e3, mean_max=1e4, coarse_contrast_max=1))
    assert len(read_micrographs(job.folder / "micrographs.star")) == 2


def test_micrographs_without_a_value_that_is_limited_are_counted(project, caplog):
    table = read_micrographs(project / "m.star")
    rows = table.rows.with_columns(rlnCtfMaxResolution=pl.Series([4.0, np.nan, 4.0, 4.0]))
    write_micrographs(project / "n.star", MicrographSet(table.optics, rows))
    Project.open(project).run(_step("n.star", ctf_resolution_max=6))
    assert "1 of 3 have no finest Thon rings and are kept whatever --ctf-resolution-max" in caplog.text


def test_one_micrograph_is_judged_by_itself(project, caplog):
    table = read_micrographs(project / "m.star")
    write_micrographs(project / "one.star", MicrographSet(table.optics, table.rows[:1]))
    caplog.set_level("INFO", logger="halfmap")
    job = Project.open(project).run(_step("one.star"))
    assert len(read_micrographs(job.folder / "micrographs.star")) == 1
    assert "fewer than 8 micrographs are not compared" in caplog.text
    assert "not judged, as the table lacks their columns: finest Thon rings, mean defocus" in caplog.text


def test_a_table_of_no_micrographs_is_refused(project):
    lines = (project / "m.star").read_text().splitlines()
    (project / "none.star").write_text("\n".join(line for line in lines if "M/" not in line) + "\n")
    with pytest.raises(TableError, match=r"none\.star: no micrographs; the table or the selection is empty"):
        Project.open(project).run(_step("none.star"))
    assert not (project / "Curate").exists()


KILLED = """
import os, signal
from halfmap.engine.ledger import Ledger
from halfmap.project import Project
from halfmap.steps.curate.step import CurateStep

append, done = Ledger.append, []
def kill(*args):
    done.append(append(*args))
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return done[-1]
Ledger.append = kill
Project.open({root!r}).run(CurateStep(micrographs="m.star"))
"""


def test_a_killed_curation_resumes_to_the_same_files_even_elsewhere(project):
    whole = Project.open(project).run(STEP)
    expected = _files(whole.folder)
    shutil.rmtree(whole.folder)
    (project / "default_pipeline.star").unlink()
    process = subprocess.run(
        [sys.executable, "-c", KILLED.format(root=str(project))], stderr=subprocess.DEVNULL
    )
    assert process.returncode == -signal.SIGKILL
    done = (whole.folder / "items.jsonl").read_text().splitlines()
    assert len(done) == 2
    job = Project.open(project.rename(project.with_name("moved"))).resume(1)
    assert (job.folder / "items.jsonl").read_text().splitlines()[:2] == done
    assert _files(job.folder) == expected


def _files(folder: Path) -> dict[str, bytes]:
    """What a job has made, without its records."""
    files = [path for path in folder.rglob("*") if path.suffix in (".star", ".png", ".mrc")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_what_cannot_be_read_is_said(project):
    rows = read_micrographs(project / "m.star").rows
    write_micrographs(project / "twice.star", MicrographSet(_optics(), pl.concat([rows, rows])))
    with pytest.raises(TableError, match=r"row 5: lists M/a\.mrc again"):
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
