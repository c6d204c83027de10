"""The chain where stages have no place any more, are refused, or are one of several ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfmap.engine import Context, Out, Param, RunOptions, Step
from halfmap.errors import ParameterError, TableError
from halfmap.project import Project
from halfmap.workflow.chain import Chain, Plan
from halfmap.workflow.record import read_record
from halfmap.workflow.settings import RunSettings, merged


class Numbering(Step, name="numbering"):
    """Write numbers."""

    outputs = {"text": Out("text.txt", "LogFile.txt.toy")}
    numbers: tuple[int, ...] = Param((), "what is written", unit="none", section="Toy")
    way: str = Param("", "how it ends", unit="none", section="Toy")

    def run(self, ctx: Context) -> None:
        if self.way == "refused":
            raise ParameterError("cannot be")
        if self.way == "fails":
            (ctx.folder / "begun").touch()
            raise TableError("has no rows")
        (ctx.folder / "text.txt").write_text(" ".join(map(str, self.numbers)))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project.open(tmp_path)


def run(project: Project, *words: str, way: str = "", has_second: bool = True, until: str | None = None):
    """A chain of three stages, the second one of several ways."""
    settings = RunSettings(micrographs=(Path("m.mrc"),), set=words, until=until)
    chain = Chain(project, settings, RunOptions(), read_record(project.root))

    def second(chain: Chain) -> Plan | None:
        return Plan({"way": way}, is_optional=True) if has_second else None

    chain.run(
        [
            ("first", "numbering", lambda chain: Plan({"numbers": (1,)})),
            ("second", "numbering", second),
            ("third", "numbering", lambda chain: Plan({"numbers": (3,)})),
        ]
    )
    return chain


@pytest.mark.parametrize(("way", "why"), [("refused", "cannot be"), ("fails", "has no rows")])
def test_the_chain_goes_on_without_a_way_that_cannot_be_gone(project: Project, way: str, why: str):
    chain = run(project, way=way)
    assert not chain.has("second")
    assert why in chain.done["second"].decisions[0].why
    assert chain.has("third")


def test_a_stage_that_has_no_place_any_more_has_no_job(project: Project):
    before = run(project).done["second"].job
    run(project, has_second=False)
    stage = next(each for each in read_record(project.root).stages if each.name == "second")
    assert (stage.job, stage.replaced) == ("", (before,))


def test_the_chain_stops_at_a_stage_that_has_no_place(project: Project):
    chain = run(project, has_second=False, until="second")
    assert not chain.has("third")


def test_a_refused_job_leaves_the_record_as_it_was(project: Project):
    before = run(project, until="first").done["first"].job
    with pytest.raises(ParameterError, match="cannot be"):
        run(project, "first.way=refused")
    stage = read_record(project.root).stages[0]
    assert (stage.name, stage.job, stage.replaced) == ("first", before, ())
    chain = run(project)
    assert chain.done["first"].job == before
    assert all(stage.replaced == () for stage in chain.done.values())


def test_ranges_are_set_as_on_the_command_line(project: Project):
    chain = run(project, "first.numbers=1-3,8")
    assert chain.output("first", "text").read_text() == "1 2 3 8"
    with pytest.raises(ParameterError, match=r"--set first\.numbers=\.\.\. takes whole numbers, or ranges"):
        run(project, "first.numbers=one")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"micrographs": (Path("m.mrc"),), "symmetry": "Q9"}, "Q9"),
        ({"micrographs": (Path("m.mrc"),), "gain": Path("g.mrc")}, "--gain says nothing of micrographs"),
        ({"particles": Path("p.star"), "voltage": 200.0}, "--voltage says nothing of particles"),
        ({"movies": (Path("m.tif"),)}, "movies need the exposure"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(settings, said: str):
    with pytest.raises(ParameterError, match=said):
        RunSettings(**settings)


def test_another_source_drops_what_said_nothing_of_it():
    before = {"movies": ["m.tif"], "gain": "g.mrc", "dose_per_frame": 1.0, "voltage": 200.0, "diameter": 90.0}
    assert merged({"particles": Path("p.star")}, before) == {
        "particles": Path("p.star"),
        "diameter": 90.0,
        "set": (),
    }
