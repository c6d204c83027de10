"""What a live session rests on: decisions kept for a while, items done again, rounds that wait."""

from __future__ import annotations

import functools
import os
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from matplotlib.dates import date2num
from matplotlib.figure import Figure

from halfmap.data import MicrographSet
from halfmap.data.versions import row_versions
from halfmap.engine import Context, Input, Out, RunOptions, Step
from halfmap.engine.decisions import Decisions
from halfmap.errors import FileFormatError, ItemsFailedError, ParameterError, ProjectError, TooManyFailedError
from halfmap.io.coordinates import read_coordinates
from halfmap.io.mrc import write_mrc
from halfmap.project import Project
from halfmap.workflow import chain as chains
from halfmap.workflow import live, live_page
from halfmap.workflow import run as workflow
from halfmap.workflow.arrivals import Arrivals, Watch
from halfmap.workflow.chain import Chain, Plan
from halfmap.workflow.live import Session, run_live
from halfmap.workflow.live_page import Standing
from halfmap.workflow.record import Record, Stage, read_record, write_record
from halfmap.workflow.run import run_chain
from halfmap.workflow.settings import RunSettings


class Mean(Step, name="toy mean"):
    """Write how many files there are, and the number of them that was decided from."""

    outputs = {"text": Out("text.txt", "LogFile.txt.toy")}
    files: tuple[Path, ...] = Input("files")

    def run(self, ctx: Context) -> None:
        names = [path.name for name in self.files for path in sorted(ctx.project.glob(str(name)))]
        decided = ctx.folder / "decided.txt"
        if not ctx.decisions.hold("number", names):
            decided.write_text(str(len(names)))
            ctx.decisions.note("number", names)
        (ctx.folder / "text.txt").write_text(f"{len(names)} {decided.read_text()}")


def double(item: str) -> str:
    return 2 * item


def try_it(item: str, *, tried: Path, path: Path | None = None) -> str:
    if item == "bad":
        with tried.open("a") as file:
            file.write("x")
        raise FileFormatError("cannot be read", path=path)
    return item


@pytest.mark.parametrize("growing", [False, True])
def test_a_decision_holds_for_the_same_items_and_until_they_are_half_as_many_more(
    tmp_path: Path, growing: bool
):
    decisions, ten = Decisions(tmp_path, growing), [str(i) for i in range(10)]
    assert not decisions.hold("size", ten)
    decisions.note("size", ten)
    assert decisions.hold("size", ten) and decisions.provisional() == []
    assert decisions.hold("size", [*ten, "10"]) is growing
    assert decisions.hold("size", [*ten[:-1], "x"]) is growing
    assert decisions.provisional() == ([("size", 10, 10)] if growing else [])
    assert not decisions.hold("size", [*ten, *"abcde"])
    # Who is killed before what follows from the new one is written makes it once more.
    assert not decisions.hold("size", ten) and decisions.provisional() == []
    decisions.note("size", [*ten, *"abcde"])
    assert decisions.provisional() == []


def test_items_of_another_version_are_done_again(tmp_path: Path):
    def run(versions: dict[str, str | None]) -> int:
        ctx = Context(folder=tmp_path, project=tmp_path)
        before = len(events.read_text().splitlines()) if events.exists() else 0
        assert ctx.map(double, ["a", "b"], version=versions.__getitem__) == ["aa", "bb"]
        return len(events.read_text().splitlines()) - before if events.exists() else 0

    events = tmp_path / "events.jsonl"
    assert run({"a": "1", "b": "1"}) == 2
    assert run({"a": "1", "b": "1"}) == 0
    assert run({"a": "1", "b": "2"}) == 1
    # Its files are those of version 2.
    assert run({"a": "1", "b": "1"}) == 1
    assert run({"a": None, "b": None}) == 0


def test_an_item_is_done_again_where_another_has_written_over_its_files(tmp_path: Path):
    def run(stems: dict[str, str]) -> int:
        before = len(events.read_text().splitlines()) if events.exists() else 0
        Context(folder=tmp_path, project=tmp_path).map(
            double, list(stems), version=lambda item: "1", files=stems.__getitem__
        )
        return len(events.read_text().splitlines()) - before

    events = tmp_path / "events.jsonl"
    assert run({"A/m": "m"}) == 1
    assert run({"A/m": "m"}) == 0
    assert run({"B/m": "m"}) == 1
    assert run({"A/m": "m"}) == 1
    assert run({"A/m": "A_m", "B/m": "B_m"}) == 2
    assert run({"B/m": "B_m"}) == 0


def test_while_more_are_to_come_a_failed_item_is_tried_again_when_it_has_changed(tmp_path: Path):
    def run(version: str | None, *, growing: bool = True) -> int:
        ctx = Context(folder=tmp_path, project=tmp_path, growing=growing)
        before = len(tried.read_text()) if tried.exists() else 0
        work = functools.partial(try_it, tried=tried)
        assert ctx.map(work, ["bad", "good"], version=lambda item: version) == ["good"]
        assert [(one.key, one.reason) for one in ctx.failures] == [("bad", "cannot be read")]
        return len(tried.read_text()) - before

    tried = tmp_path / "tried"
    assert [run("1"), run("1"), run("2"), run("2"), run(None)] == [1, 0, 1, 0, 1]
    assert run("2", growing=False) == 1


def test_a_failure_for_want_of_a_file_that_is_gone_is_not_remembered(tmp_path: Path):
    def run() -> int:
        ctx = Context(folder=tmp_path, project=tmp_path, growing=True)
        work = functools.partial(try_it, tried=tmp_path / "tried", path=tmp_path / "movie")
        ctx.map(work, ["bad", "good"], version=lambda item: "1")
        return len((tmp_path / "tried").read_text())

    assert [run(), run()] == [1, 2]
    (tmp_path / "movie").touch()
    assert [run(), run()] == [3, 3]


def test_the_version_of_a_row_is_its_own():
    def versions(**columns) -> dict[str, str]:
        rows = pl.DataFrame({"rlnMicrographName": ["a", "b"], "rlnOpticsGroup": [1, 1]} | columns)
        optics = pl.DataFrame({"rlnOpticsGroup": [1], "rlnMicrographPixelSize": [1.0]})
        return row_versions(MicrographSet(optics, rows), "rlnMicrographName")

    plain = versions(rlnDefocusU=[1.0, 2.0])
    assert plain["a"] != plain["b"]
    # Neither the other rows, nor a column that says nothing here, nor how it stands among the others.
    assert versions(rlnDefocusU=[1.0, 3.0])["a"] == plain["a"]
    assert versions(rlnDefocusU=[1, 2])["a"] == plain["a"]
    assert versions(rlnDefocusU=[1.0, 2.0], rlnPhaseShift=[float("nan"), 1.0])["a"] == plain["a"]
    assert versions(rlnDefocusU=[1.0, 2.0], hmIceThicknessRelative=[0.1, 0.2]) == plain
    assert versions(rlnDefocusU=[1.5, 2.0])["a"] != plain["a"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setattr(chains, "GROWING", {"toy mean"})
    (tmp_path / "raw").mkdir()
    return Project.open(tmp_path)


def add(project: Project, count: int) -> None:
    for _ in range(count):
        (project.root / "raw" / f"{len(list((project.root / 'raw').iterdir())):03d}").touch()


def first(chain: Chain) -> Plan:
    return Plan({"files": (chain.project.root / "raw/*",)})


def second(chain: Chain) -> Plan:
    # Another pattern each time: the stage is run anew.
    number = chain.output("first", "text").read_text().split()[0]
    return Plan({"files": (chain.output("first", "text"), Path(f"raw/*{int(number) - 1}"))})


def run(project: Project, *, growing: bool) -> Chain:
    settings = RunSettings(micrographs=(Path("m.mrc"),))
    chain = Chain(project, settings, RunOptions(), read_record(project.root), growing)
    chain.run((("first", "toy mean", first),))
    return chain


def test_a_job_that_grows_keeps_its_decision_and_ends_with_that_of_all(project: Project):
    add(project, 10)
    texts = []
    for more, growing in ((0, True), (2, True), (2, True), (1, True), (1, True), (0, False), (0, False)):
        add(project, more)
        chain = run(project, growing=growing)
        texts.append(chain.output("first", "text").read_text())
    assert texts == ["10 10", "12 10", "14 10", "15 15", "16 15", "16 16", "16 16"]
    assert len(project.pipeline.processes) == 1
    assert chain.job("first").provisional() == []


def test_a_job_is_removed_unless_another_one_reads_from_it(project: Project):
    add(project, 1)
    one = project.run(Mean(files=(project.root / "raw/*",)))
    two = project.run(Mean(files=(one.outputs["text"],)))
    with pytest.raises(ProjectError, match="job002/ reads from it"):
        project.remove(one.name)
    project.remove(two.name)
    project.remove(one.name)
    assert not one.folder.exists() and not two.folder.exists()
    left = project.pipeline
    assert (left.processes, left.nodes, left.inputs, left.outputs) == ([], {}, [], [])
    assert project.run(Mean(files=(project.root / "raw/*",))).name.endswith("job003/")


def session(project: Project, monkeypatch: pytest.MonkeyPatch, stages, **watch) -> Session:
    monkeypatch.setattr(live, "STAGES", stages)
    monkeypatch.setattr(live, "LAST_OF_ROUND", "first")
    monkeypatch.setattr(live, "LAST_STAGE", "second")
    folder = project.root / "in"
    folder.mkdir(exist_ok=True)
    settings = RunSettings(micrographs=(Path("m.mrc"),))
    arrivals = Arrivals(folder, project.root, settle_s=0)
    return Session(project, settings, RunOptions(), Watch(folder=folder, **watch), arrivals)


def test_jobs_that_were_replaced_are_removed(project: Project, monkeypatch: pytest.MonkeyPatch):
    one = session(project, monkeypatch, (("first", "toy mean", first), ("second", "toy mean", second)))
    add(project, 2)
    one._bring_up_to_date("second", growing=True)
    add(project, 1)
    one._bring_up_to_date("second", growing=True)
    stages = {stage.name: stage for stage in read_record(project.root).stages}
    assert stages["second"].replaced == ("Toy/job002/",)
    assert not (project.root / "Toy/job002").exists()
    assert [process.name for process in project.pipeline.processes] == ["Toy/job001/", "Toy/job003/"]


@pytest.mark.parametrize(
    ("particles", "classed", "minutes_ago", "due"),
    [
        (live_page.FEWEST - 1, None, 0, False),
        (live_page.FEWEST, None, 0, True),
        (1490, 1000, 5, False),
        (1500, 1000, 5, True),
        (1001, 1000, 61, True),
        (1000, 1000, 61, False),
    ],
)
def test_classes_are_due_with_half_as_many_more_or_after_an_hour(
    project: Project, monkeypatch, particles: int, classed: int | None, minutes_ago: float, due: bool
):
    one, now = session(project, monkeypatch, ()), [1000.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    counts = {"Class2D": classed, "Extract": particles}
    monkeypatch.setattr(
        live, "read_particle_facts", lambda path: SimpleNamespace(number=counts[path.parts[-3]])
    )
    table = project.root / "Extract/job008/particles.star"
    extracted = SimpleNamespace(outputs={"particles": table})
    monkeypatch.setattr(Project, "job", lambda self, name: extracted)
    stages = [Stage("first", "Extract/job008/")]
    if classed is not None:
        table = project.root / "Class2D/job009/particles.star"
        table.parent.mkdir(parents=True)
        # Of a file server whose clock is a day behind, or ahead.
        table.touch()
        os.utime(table, (time.time() + 86_400 * (-1) ** particles,) * 2)
        stages.append(Stage("second", "Class2D/job009/"))
    write_record(project.root, Record({}, tuple(stages)))
    if classed is not None:
        counts["Extract"] = classed
        assert not one._classes_are_due()
        counts["Extract"] = particles
    now[0] += 60 * minutes_ago
    assert one._classes_are_due() is due


def test_a_round_waits_for_what_may_pass_and_says_why_once(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "halfmap")

    def fails(chain: Chain) -> Plan:
        raise errors.pop(0)

    errors: list[Exception] = [ItemsFailedError("no particles yet"), ItemsFailedError("no particles yet")]
    one = session(project, monkeypatch, (("first", "toy mean", fails), ("second", "toy mean", second)))
    assert not one._round() and not one._round()
    assert caplog.text.count("waiting: no particles yet") == 1
    errors += [ParameterError("the gain does not fit"), TooManyFailedError("more than the 3 allowed")]
    with pytest.raises(ParameterError, match="gain does not fit"):
        one._round()
    with pytest.raises(TooManyFailedError):
        one._round()


def test_a_session_ends_when_its_time_is_over_or_it_was_quiet(project: Project, monkeypatch):
    for watch in ({"hours": 1e-7}, {"quiet_minutes": 1e-4}):
        start = time.monotonic()
        session(project, monkeypatch, (), **watch).run()
        assert time.monotonic() - start < 5


def test_while_more_are_to_come_micrographs_keep_their_picks(tmp_path: Path):
    from halfmap.steps.pick import tables

    ctx = Context(folder=tmp_path, project=tmp_path)
    done = [{"name": f"{key}.mrc", "key": key} for key in "abcd"]
    searched = {row["name"]: "1" for row in done}
    columns = {tables.X: [1.0], tables.Y: [2.0], tables.PROBABILITY: [0.5]}
    tables.write_picks(ctx, {f"{key}.mrc": (key, pl.DataFrame(columns)) for key in "acd"})
    assert tables.picked_before(ctx, searched) == {}
    tables.note_picked(ctx, {name: "1" for name in searched if name != "b.mrc"})
    # d was searched again since, and b is new.
    before = tables.picked_before(ctx, searched | {"d.mrc": "2"})
    assert tables.picked_before(ctx, searched) == {}, "nobody knows whose they are until they are noted"
    assert sorted(before) == ["a.mrc", "c.mrc"]
    new = {f"{key}.mrc": (key, pl.DataFrame(columns | {tables.X: [9.0]})) for key in "bd"}
    table = tables.write_picks(ctx, new, [row["name"] for row in done], before)
    assert table[tables.MICROGRAPH].to_list() == ["a.mrc", "b.mrc", "c.mrc", "d.mrc"]
    first = [read_coordinates(tmp_path / path)[tables.X][0] for path in table[tables.COORDINATES]]
    assert first == [1.0, 9.0, 1.0, 9.0]
    many = [{"name": str(i), "key": str(i)} for i in range(1000)]
    among = tables.calibrated_by(many, dict.fromkeys(str(i) for i in range(990)))
    assert [row["name"] for row in among[-10:]] == [str(i) for i in range(990, 1000)]
    assert len(among) == 10 + tables._BESIDE


def test_what_had_been_replaced_before_a_session_is_left_unless_one_made_it(
    project: Project, monkeypatch: pytest.MonkeyPatch
):
    stages = (("first", "toy mean", first), ("second", "toy mean", second))
    add(project, 2)
    for growing in (False, True, True):
        settings = RunSettings(micrographs=(Path("m.mrc"),))
        Chain(project, settings, RunOptions(), read_record(project.root), growing).run(stages)
        add(project, 1)
    one = session(project, monkeypatch, stages, hours=1e-7)
    one.run()
    one._bring_up_to_date("second", growing=True)
    replaced = {stage.name: stage.replaced for stage in read_record(project.root).stages}["second"]
    assert replaced == ("Toy/job002/", "Toy/job003/", "Toy/job004/")
    assert [(project.root / name).exists() for name in replaced] == [True, False, False]


def test_a_session_waits_while_a_file_is_out_of_reach(project: Project, monkeypatch: pytest.MonkeyPatch):
    def fails(chain: Chain) -> Plan:
        raise ParameterError("input file does not exist")

    one = session(project, monkeypatch, (("first", "toy mean", fails),))
    gain = project.root / "gain.mrc"
    gain.touch()
    one.arrivals.left_out = (gain,)
    monkeypatch.setattr(one, "_go_round", lambda: None)
    one.run()
    gain.unlink()
    assert not one._round()
    gain.touch()
    with pytest.raises(ParameterError):
        one._round()


def test_what_was_given_once_holds_for_the_next_session(project: Project, monkeypatch: pytest.MonkeyPatch):
    seen = []

    def run(self: Session) -> None:
        seen.append(self)
        self._bring_up_to_date("first", growing=True)

    monkeypatch.setattr(live, "STAGES", (("first", "toy mean", first),))
    monkeypatch.setattr(Session, "run", run)
    add(project, 1)
    (project.root / "in").mkdir()
    given = {"folder": project.root / "in", "dose_per_frame": 1.0, "gain_flip": 1}
    run_live(project, given | {"pattern": "*.eer", "settle": 3.0, "hours": 2.0}, RunOptions(max_failures=3))
    run_live(project, {"folder": project.root / "in", "settle": 10.0, "gain_flip": 0}, RunOptions())
    one, two = seen
    assert (two.watch.pattern, two.watch.settle, two.watch.hours) == ("*.eer", 10.0, None)
    assert two.options.max_failures == 3
    assert (one.settings.gain_flip, two.settings.gain_flip, two.settings.dose_per_frame) == (1, 0, 1.0)


def test_a_chain_takes_what_has_come_since_the_session_ended(project: Project, monkeypatch, caplog):
    folder = project.root / "in"
    folder.mkdir()
    monkeypatch.setattr(live, "STAGES", (("first", "toy mean", first),))
    monkeypatch.setattr(live, "LAST_OF_ROUND", "first")
    monkeypatch.setattr(Session, "run", lambda self: self._bring_up_to_date("first", growing=True))
    monkeypatch.setattr(workflow, "STAGES", (("first", "toy mean", first),))
    monkeypatch.setattr(workflow, "write_report", lambda *_: None)
    add(project, 1)
    run_live(project, {"folder": folder, "dose_per_frame": 1.0, "settle": 0.0}, RunOptions())
    write_mrc(folder / "late.mrc", np.ones((3, 8, 8), np.float32), pixel_size=1.0)
    with caplog.at_level("INFO", "halfmap"):
        run_chain(project, {}, RunOptions())
    assert (project.root / "Arrived/late.mrc").exists()
    assert "1 movie taken that came into" in caplog.text
    whole = (folder / "late.mrc").read_bytes()
    (folder / "stalled.mrc").write_bytes(whole[:-50])
    with caplog.at_level("INFO", "halfmap"):
        run_chain(project, {}, RunOptions())
    assert not (project.root / "Arrived/stalled.mrc").is_symlink()
    assert "1 file still written: left out" in caplog.text
    folder.rename(project.root / "unmounted")
    run_chain(project, {}, RunOptions())
    assert "out of reach" in caplog.text


@pytest.mark.parametrize(("times", "drawn"), [((None, 1e9), True), ((None, None), False)])
def test_movies_that_were_gone_before_their_time_was_noted_are_not_drawn_in_1970(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: tuple[float | None, ...], drawn: bool
):
    columns = {"time": times, "rlnDefocusU": [1e4, 2e4], "rlnCtfMaxResolution": [4.0, 5.0]}
    rows = pl.DataFrame(columns | {"kept": [True, True]}, schema_overrides={"time": pl.Float64})
    seen = []
    monkeypatch.setattr(live_page, "_drawn", lambda rows: seen.extend(rows["time"]) or "picture")
    live_page.write_page(tmp_path / "live.html", Standing(2, 0, [], rows, 0, None), tmp_path)
    assert seen == ([1e9] if drawn else [])
    assert ("Over time" in (tmp_path / "live.html").read_text()) is drawn


@pytest.mark.parametrize("minutes", [0, 90])
def test_no_point_of_the_page_lies_on_an_axis(minutes: float):
    times = [1e9, 1e9 + 60 * minutes]
    rows = pl.DataFrame({"time": times, "rlnDefocusU": [1e4, 2e4], "kept": [True, False]})
    axes = Figure().add_subplot()
    live_page._draw_series(axes, rows, "rlnDefocusU", "defocus", 1e-4)
    for line in axes.lines:
        for (low, high), values in ((axes.get_xlim(), line.get_xdata()), (axes.get_ylim(), line.get_ydata())):
            values = date2num(values) if isinstance(values[0], datetime) else np.asarray(values)
            room = 0.01 * (high - low)
            assert low + room < values.min() and values.max() < high - room


@pytest.mark.parametrize(
    ("particles", "why"),
    [
        (0, "once there are 200 particles; so far there are none."),
        (120, "once there are 200 particles; so far there are 120 particles."),
        (300, "come next: there are 300 particles, and 200 are enough."),
    ],
)
def test_the_page_says_why_there_are_no_classes(tmp_path: Path, particles: int, why: str):
    live_page.write_page(tmp_path / "live.html", Standing(2, 0, [], None, 0, None, particles), tmp_path)
    assert why in (tmp_path / "live.html").read_text()


def test_movies_that_failed_are_named_as_in_the_watched_folder(tmp_path: Path):
    project, folder = tmp_path / "my lp", Path("/data/Arrived/one")
    project.mkdir()
    names = ("Arrived/a/b.mrc", "my lp/Arrived/a/b.mrc", "../x/my lp/Arrived/a/b.mrc")
    names = (*names, f"{project}/Arrived/a/b.mrc")
    failures = [("Import", name, f"{name}: is cut short; give it anew") for name in names]
    other = ("Ctf", "Motion/job002/Arrived/m.mrc", "is blank")
    seen = Standing(2, 0, [*failures, other], None, 0, None)
    live_page.write_page(project / "live.html", seen, folder)
    html = (project / "live.html").read_text()
    assert html.count("<td>/data/Arrived/one/a/b.mrc</td>") == 4
    assert html.count("<td>/data/Arrived/one/a/b.mrc: is cut short; give it anew</td>") == 4
    assert "<td>Motion/job002/Arrived/m.mrc</td>" in html


def test_settings_that_movies_need_are_asked_for(tmp_path: Path):
    (tmp_path / "in").mkdir()
    with pytest.raises(ParameterError, match="--dose-per-frame"):
        run_live(Project.at(tmp_path / "P"), {"folder": tmp_path / "in"}, RunOptions())
    with pytest.raises(ParameterError, match="no such folder"):
        run_live(
            Project.at(tmp_path / "P"), {"folder": tmp_path / "out", "dose_per_frame": 1.0}, RunOptions()
        )
