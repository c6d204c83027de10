"""What a job says of itself."""

from __future__ import annotations

import fcntl
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy_step as toy
from rich.console import Console

from halfmap.engine import Context, Param, Step
from halfmap.errors import ItemsFailedError
from halfmap.project import Project
from halfmap.project.overview import describe_job


class Rounds(Step, name="rounds"):
    """Square numbers again and again."""

    rounds: int = Param(3, "how often", unit="none", section="Toy")
    known: bool = Param(True, "whether that is known beforehand", unit="none", section="Toy")
    stops: bool = Param(False, "end amid the last round", unit="none", section="Toy")

    def run(self, ctx: Context) -> None:
        for i in range(1, self.rounds + 1):
            last = self.stops and i == self.rounds
            numbers = [10 * i, 10 * i + 1]
            ctx.map(_square, [*numbers, -1] if last else numbers, unit="number")
            if last:
                raise ItemsFailedError("is stopped")
            rest = None if not self.known else self.rounds - i
            ctx.round_done(
                i, self.rounds if self.known else None, f"squares to {(10 * i + 1) ** 2}", rest=rest
            )


def _square(number: int) -> int:
    if number < 0:
        raise ValueError("is negative")
    return number**2


def _lines(project: Project) -> list[str]:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(describe_job(project.job(1)))
    return [" ".join(line.split()) for line in captured.get().splitlines()]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project.at(tmp_path)


def test_a_job_in_rounds_shows_the_last_of_them(project):
    project.run(Rounds())
    shown = _lines(project)
    assert "done iteration 3 of 3: squares to 961" in shown
    assert not any("numbers" in line for line in shown)


def test_a_running_job_shows_the_time_left_by_the_work_to_come(project, monkeypatch, caplog):
    """Rounds of 60 s by the clock, looked at 25 s after the second of three."""
    clock = itertools.count(0, 60)
    monkeypatch.setattr("halfmap.engine.context.time", SimpleNamespace(monotonic=lambda: next(clock)))
    job = project.run(Rounds())
    assert [line for line in caplog.messages if "about" in line] == ["about 2 min left", "about 60 s left"]
    lines = (job.folder / "events.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in lines if '"round"' in line]
    assert [one.get("left_s") for one in rounds] == [120, 60, None]
    (job.folder / "events.jsonl").write_text("".join(line + "\n" for line in lines[:-3]))
    now = SimpleNamespace(time=lambda: rounds[1]["time"] + 25)
    monkeypatch.setattr("halfmap.project.overview.time", now)
    assert not any(line.startswith("left") for line in _lines(project))
    with (job.folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (job.folder / "RELION_JOB_EXIT_SUCCESS").unlink()
        assert "left about 35 s" in _lines(project)


def test_a_job_amid_a_round_shows_what_is_done_of_it(project):
    with pytest.raises(ItemsFailedError):
        project.run(Rounds(stops=True, known=False))
    shown = _lines(project)
    assert "done iteration 2: squares to 441" in shown
    assert "since then 2 of 3 numbers, 1 failed" in shown


def test_a_job_without_rounds_shows_its_items(project):
    project.run(toy.Toy(n=3))
    assert "done 3 of 3 numbers" in _lines(project)
