"""The chain: what is kept, gone on with, and run again."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfmap.engine import Context, Input, Out, Param, RunOptions, Step
from halfmap.errors import FileFormatError, ParameterError, ProjectError, TableError
from halfmap.log import log
from halfmap.project import Job, Project
from halfmap.project.locks import chain_locked
from halfmap.workflow import chain as chains
from halfmap.workflow import run as workflow
from halfmap.workflow.chain import Chain, Plan, Skip
from halfmap.workflow.record import RECORD_FILE, Decision, read_record
from halfmap.workflow.run import run_chain
from halfmap.workflow.settings import RunSettings, merged
from halfmap.workflow.status import _advice, states


class Gathering(Step, name="gathering"):
    """Join files."""

    outputs = {"text": Out("text.txt", "LogFile.txt.toy")}
    files: tuple[Path, ...] = Input("files", node="LogFile.txt.toy")
    end: str = Param("", "written at the end", unit="none", section="Toy")
    often: int = Param(1, "how often", unit="none", section="Toy", ge=1)
    fails: Path | None = Input("fails while this file says so", default=None)

    def run(self, ctx: Context) -> None:
        if self.fails is not None and ctx.resolve(self.fails).read_text() == "fail":
            (ctx.folder / "begun").touch()
            log.warning("was told --often 2")
            raise TableError("was told to fail", hint="leave it with --often 3")
        parts = [path.read_text() for name in self.files for path in sorted(ctx.project.glob(str(name)))]
        (ctx.folder / "text.txt").write_text("".join(parts) + self.end)


def stages(root: Path, *, fails: str | None = None):
    def first(chain: Chain) -> Plan:
        return Plan({"files": (root / "raw*.txt",)}, (Decision("raw files", "they are there"),))

    def skipped(chain: Chain) -> Skip:
        return Skip((Decision("nothing", "nothing to do"),))

    def absent(chain: Chain) -> None:
        return None

    def second(chain: Chain) -> Plan:
        assert not chain.has("skipped")
        values = {"files": (chain.output("first", "text"),), "end": "b", "fails": fails and root / fails}
        return Plan(values)

    def third(chain: Chain) -> Plan:
        return Plan({"files": (chain.output("second", "text"),), "end": "c"})

    pairs = {"first": first, "skipped": skipped, "absent": absent, "second": second, "third": third}
    return tuple((name, "gathering", plan) for name, plan in pairs.items())


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "raw1.txt").write_text("a")
    return Project.open(tmp_path)


def run(project: Project, *, fails: str | None = None, **settings) -> Chain:
    chain = Chain(
        project,
        RunSettings(micrographs=(Path("m.mrc"),), **settings),
        RunOptions(),
        read_record(project.root),
    )
    chain.run(stages(project.root, fails=fails))
    return chain


def jobs(chain: Chain) -> dict[str, str]:
    return {name: stage.job for name, stage in chain.done.items()}


def test_a_chain_runs_in_order_and_is_recorded(project: Project):
    chain = run(project)
    assert chain.output("third", "text").read_text() == "abc"
    record = read_record(project.root)
    assert [stage.name for stage in record.stages] == ["first", "skipped", "second", "third"]
    assert record.stages[1].job == "" and record.stages[1].decisions[0].chosen == "nothing"
    assert record.decisions(chain.done["first"].job)[0].why == "they are there"


def test_what_is_done_is_kept(project: Project):
    before = jobs(run(project))
    assert jobs(run(project)) == before
    assert len(project.pipeline.processes) == 3


def test_a_parameter_set_by_hand_runs_what_depends_on_it_and_nothing_else(project: Project):
    before = jobs(run(project))
    after = run(project, set=("second.end=x",))
    assert after.output("third", "text").read_text() == "axc"
    assert jobs(after)["first"] == before["first"]
    assert {name for name in before if jobs(after)[name] != before[name]} == {"second", "third"}
    assert after.done["second"].replaced == (before["second"],)
    stale = {state.job: state.stale for state in states(project)}
    assert f"replaced by {jobs(after)['second'].rstrip('/')} in the chain" in stale[before["second"]][0]
    assert stale[jobs(after)["third"]] == ()
    assert _advice(states(project)) == "", "what was replaced is not to be gone on with"


def test_a_changed_file_is_stale_and_run_again(project: Project):
    before = jobs(run(project))
    (project.root / "raw1.txt").write_text("A")
    found = {state.stage: state.stale for state in states(project)}
    assert "raw1.txt" in found["first"][0]
    assert found["third"] == (f"stands on {before['second']}, which is stale",)
    after = run(project)
    assert after.output("third", "text").read_text() == "Abc"
    assert all(not state.stale for state in states(project) if state.stage)


def test_the_same_contents_after_a_rerun_leave_what_follows_alone(project: Project):
    before = run(project)
    (project.root / "raw2.txt").write_text("")
    after = run(project)
    # Files that have come are a step's own to take in; this one is gone on with, and gives what it gave.
    assert jobs(after) == jobs(before)


def test_anew_runs_a_stage_and_all_that_follow(project: Project):
    before = jobs(run(project))
    after = jobs(run(project, anew="second"))
    assert {name for name in before if after[name] != before[name]} == {"second", "third"}


def test_until_stops_and_is_forgotten(project: Project):
    assert set(jobs(run(project, until="second"))) == {"first", "skipped", "second"}
    assert "third" in jobs(run(project))


def test_a_stage_that_failed_is_gone_on_with(project: Project):
    (project.root / "mood").write_text("fail")
    with pytest.raises(TableError):
        run(project, fails="mood")
    assert [state.status for state in states(project)] == ["Succeeded", "Failed"]
    kept = read_record(project.root)
    (project.root / "mood").write_text("well")
    # The file that it read has changed, so that it is not what it was.
    after = run(project, fails="mood")
    assert after.output("third", "text").read_text() == "abc"
    assert jobs(after)["first"] == kept.stages[0].job


def test_growing_steps_take_new_files_in(project: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chains, "GROWING", {"gathering"})
    before = jobs(run(project))
    (project.root / "raw2.txt").write_text("z")
    after = run(project)
    assert after.output("third", "text").read_text() == "azbc"
    assert jobs(after) == before


def test_a_job_that_was_deleted_is_made_again(project: Project):
    import shutil

    before = run(project)
    shutil.rmtree(before.job("second").folder)
    after = run(project)
    assert jobs(after)["first"] == jobs(before)["first"]
    assert after.output("third", "text").read_text() == "abc"


def locked_when(monkeypatch: pytest.MonkeyPatch, job: str, status: str) -> pytest.MonkeyPatch:
    """Have the graph locked by another program when a job gets a status."""
    real = Project._set_status

    def set_status(self: Project, one: Job, now: str) -> None:
        if (one.name, now) == (job, status):
            raise ProjectError("the project is locked by another program")
        real(self, one, now)

    monkeypatch.setattr(Project, "_set_status", set_status)
    return monkeypatch


def interrupted(step: Gathering, ctx: Context) -> None:
    raise KeyboardInterrupt


def test_files_that_came_are_taken_though_the_round_that_saw_them_first_was_stopped(project: Project):
    before = run(project)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "GROWING", {"gathering"})
        (project.root / "raw2.txt").write_text("z")
        locked_when(patch, before.done["first"].job, "Running")
        with pytest.raises(ProjectError, match="locked"):
            run(project)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "GROWING", {"gathering"})
        patch.setattr(Gathering, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(project)
    after = run(project)
    assert after.output("third", "text").read_text() == "azbc"


def test_a_job_that_was_killed_before_its_entry_in_the_graph_is_entered(project: Project):
    with pytest.MonkeyPatch.context() as patch:
        locked_when(patch, "Gathering/job001/", "Succeeded")
        with pytest.raises(ProjectError, match="locked"):
            run(project)
    run(project)
    found = {state.stage: state for state in states(project)}
    assert (found["first"].status, found["second"].parents) == ("Succeeded", ("Gathering/job001/",))
    with pytest.raises(ProjectError, match="reads from it"):
        project.remove("Gathering/job001/")


def test_what_a_killed_job_made_and_another_reads_is_connected(project: Project):
    with pytest.MonkeyPatch.context() as patch:
        locked_when(patch, "Gathering/job001/", "Succeeded")
        with pytest.raises(ProjectError, match="locked"):
            run(project)
    two = project.run(Gathering(files=(project.root / "Gathering/job001/text.txt",)))
    assert ("Gathering/job001/text.txt", two.name) in project.pipeline.inputs


def test_only_one_chain_works_in_a_project(tmp_path: Path):
    root = tmp_path / "P"
    with chain_locked(root), pytest.raises(ProjectError, match="another `halfmap run`"):
        run_chain(Project.at(root), {"particles": tmp_path / "p.star"}, RunOptions())
    assert not root.exists(), "nothing was done in it"
    with chain_locked(root):
        (root / "done").touch()
    with chain_locked(root):
        pass
    assert (root / "done").exists()


def test_an_input_that_is_gone_for_a_while_has_not_changed(project: Project, caplog):
    (project.root / "mood").write_text("well")
    before = jobs(run(project, fails="mood"))
    (project.root / "mood").rename(project.root / "archived")
    assert jobs(run(project, fails="mood")) == before
    assert not any(state.stale for state in states(project))
    (project.root / "mood").write_text("WELL")
    assert jobs(run(project, fails="mood"))["second"] != before["second"]


def test_how_a_chain_ran_is_kept(project: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workflow, "STAGES", stages(project.root))
    monkeypatch.setattr(workflow, "write_report", lambda *_: None)
    run_chain(project, {"micrographs": (Path("m.mrc"),), "seed": 5}, RunOptions(max_failures=7))
    chain = run_chain(project, {"seed": 1}, RunOptions())
    assert (chain.options.max_failures, chain.settings.seed) == (7, 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"until": "fourth"}, "no stage 'fourth'; stages: first, skipped"),
        ({"anew": "fourth"}, "no stage 'fourth'"),
        ({"set": ("fourth.end=x",)}, "no stage 'fourth'"),
        ({"set": ("secnd.end=x",)}, "no stage 'secnd'; did you mean 'second'"),
        ({"set": ("second.begin=x",)}, "second has no parameter 'begin'"),
        ({"set": ("third.oftn=2",)}, "third has no parameter 'oftn'; did you mean third.often"),
        ({"set": ("third.often=many",)}, "--set third.often=... takes a whole number, not 'many'"),
        ({"set": ("third.often=0",)}, "--set third.often=... must be greater than or equal to 1, not '0'"),
        ({"set": ("second",)}, "STAGE.PARAMETER=VALUE"),
    ],
)
def test_wrong_names_are_refused(project: Project, settings, said: str):
    with pytest.raises(ParameterError, match=said.replace(".", r"\.")):
        run(project, **settings)
    assert project.pipeline.processes == [] and not (project.root / RECORD_FILE).exists()


def test_a_chain_that_is_refused_makes_no_project(tmp_path: Path):
    root = tmp_path / "P"
    for given, said in (
        ({"until": "fourth"}, "no stage 'fourth'"),
        ({"set": ("import.pixel-size=-1",)}, "--pixel-size must be"),
        ({}, "input file does not exist"),
    ):
        with pytest.raises(ParameterError, match=said):
            run_chain(Project.at(root), {"micrographs": (tmp_path / "no*.mrc",), **given}, RunOptions())
        assert not root.exists()


def test_what_was_set_by_hand_is_not_called_decided_from_the_data(project: Project):
    def plan(chain: Chain) -> Plan:
        made = Decision("twice", "there are two files", "--set first.often=N")
        return Plan({"files": (project.root / "raw*.txt",), "often": 2}, (made,))

    for words, said in (
        ((), "twice: there are two files (else --set first.often=N)"),
        (("first.often=5",), "often 5: as asked (else --set first.often=)"),
        (("first.end=x",), "twice: there are two files (else --set first.often=N)"),
    ):
        chain = Chain(project, RunSettings(micrographs=(Path("m.mrc"),), set=words), RunOptions())
        chain.run([("first", "gathering", plan)])
        assert [str(each) for each in chain.done["first"].decisions] == [said]


def test_what_stopped_a_stage_is_said_in_the_words_of_the_chain(project: Project, caplog):
    (project.root / "mood").write_text("fail")
    with (
        pytest.raises(TableError, match=r"fail; leave it with --set second\.often=3") as raised,
        caplog.at_level("INFO", "halfmap"),
    ):
        run(project, fails="mood", set=("second.end=x",))
    assert "--often" not in str(raised.value)
    assert "was told --set second.often=2" in caplog.text
    assert "kept until it is taken back: second.end (--set second.end=)" in caplog.text


def test_options_are_kept_and_added_to():
    before = {"movies": ["m*.tif"], "dose_per_frame": 1.0, "set": ["ctf.defocus-max=1", "motion.local=no"]}
    after = merged({"diameter": 120.0, "set": ("ctf.defocus_max=2", "motion.local=")}, before)
    assert after == {
        "movies": ["m*.tif"],
        "dose_per_frame": 1.0,
        "diameter": 120.0,
        "set": ("ctf.defocus_max=2",),
    }
    other = merged({"particles": "p.star"}, before)
    assert "movies" not in other and other["particles"] == "p.star"
    with pytest.raises(ParameterError, match="nothing to begin with"):
        merged({"diameter": 120.0}, {})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"movies": ("a",), "micrographs": ("b",), "dose_per_frame": 1.0},
            "give one of --movies, --micrographs",
        ),
        ({"movies": ("a",)}, "--dose-per-frame"),
    ],
)
def test_settings_that_cannot_be(values, said: str):
    with pytest.raises(ParameterError, match=said):
        RunSettings(**values)


def test_a_broken_record_is_named(project: Project):
    (project.root / RECORD_FILE).write_text("{}")
    with pytest.raises(FileFormatError, match="remove it"):
        read_record(project.root)
