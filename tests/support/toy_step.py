"""A step over items that tests can watch, slow down, break and kill."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path

import numpy as np

from halfmap.engine import Context, Out, Param, Step
from halfmap.errors import FileFormatError
from halfmap.io.atomic import write_text
from halfmap.log import log

SECTION = "Toy"


class Toy(Step, name="toy"):
    """Square numbers into files."""

    outputs = {"table": Out("squares.txt", "LogFile.pdf.toy")}
    n: int = Param(5, "how many numbers", unit="none", section=SECTION, ge=0)
    bad: tuple[int, ...] = Param((), "numbers that fail", unit="none", section=SECTION)
    deadly: tuple[int, ...] = Param((), "numbers that kill their process", unit="none", section=SECTION)
    once_deadly: tuple[int, ...] = Param(
        (), "numbers that kill their process the first time", unit="none", section=SECTION
    )
    seconds: float = Param(0.0, "pause before each", unit="s", section=SECTION)
    slow: tuple[int, ...] = Param((), "numbers that take ten minutes", unit="none", section=SECTION)
    unwanted: tuple[str, ...] = Param((), "items left out beforehand", unit="none", section=SECTION)

    def run(self, ctx: Context) -> None:
        work = functools.partial(square, folder=ctx.folder, step=self)
        for name in self.unwanted:
            ctx.fail("thing", name, "is unwanted")
        rows = ctx.map(work, range(self.n), unit="number")
        write_text(ctx.folder / "squares.txt", "".join(f"{row['number']} {row['square']}\n" for row in rows))


def square(number: int, *, folder: Path, step: Toy) -> dict:
    with (folder / "begun.txt").open("a") as file:
        file.write(f"{number}\n")
    log.warning("number %d is looked at", number)
    log.debug("and closely: %d", number)
    time.sleep(step.seconds)
    if number in step.slow:
        (folder / f"{number}.begun").touch()
        time.sleep(600)
    if number in step.deadly or (number in step.once_deadly and _is_first(number, folder)):
        os.kill(os.getpid(), signal.SIGKILL)
    if number in step.bad:
        raise FileFormatError("is a bad number", path=f"{number}.mrc", hint="leave it out")
    with (folder / "calls.txt").open("a") as file:
        file.write(f"{number}\n")
    write_text(folder / f"{number}.txt", str(number**2))
    return {"number": number, "square": number**2}


def _is_first(number: int, folder: Path) -> bool:
    return (folder / "begun.txt").read_text().split().count(str(number)) == 1


def process_number(_: object) -> int:
    return os.getpid()


def leave_number_and_sleep(path: Path) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(600)


def sum_of(part: np.ndarray, *, shared: np.ndarray) -> int:
    return int(part.sum() + shared.sum())


def variable(name: str, _: object) -> str | None:
    time.sleep(0.2)
    return os.environ.get(name)


def live_or_die(fate: tuple[int, float, int], *, folder: Path) -> int:
    """Take some seconds, then kill the process, as often as fate says."""
    number, seconds, deaths = fate
    time.sleep(seconds)
    with (folder / "ended.txt").open("a") as file:
        file.write(f"{number}\n")
    if (folder / "ended.txt").read_text().split().count(str(number)) <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return number
