"""What a job says of itself."""

from __future__ import annotations

from pathlib import Path

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
            ctx.round_done(i, self.rounds if self.known else None, f"squares to {(10 * i + 1) ** 2}")


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


def test_a_job_amid_a_round_shows_what_is_done_of_it(project):
    with pytest.raises(ItemsFailedError):
        project.run(Rounds(stops=True, known=False))
    shown = _lines(project)
    assert "done iteration 2: squares to 441" in shown
    assert "since then 2 of 3 numbers, 1 failed" in shown


def test_a_job_without_rounds_shows_its_items(project):
    project.run(toy.Toy(n=3))
    assert "done 3 of 3 numbers" in _lines(project)
