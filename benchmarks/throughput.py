"""What the framework adds to the work itself: many small movies from import to particles.

The movies are a dozen small ones under many names. Each of the dozen is processed; what came of it, files and
results, is handed to all others of the same content, so that nearly all of the time is the framework's own:
tables, ledgers, records, calibration, pictures. Time is that of the processor: a busy machine does not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.live_movies import DOSE, PIXEL_A, write_movie

from halfmap.engine import RunOptions, attempt, executor
from halfmap.log import shown_on_terminal
from halfmap.project import Project
from halfmap.steps import load_steps
from halfmap.workflow.chain import Chain, Rule
from halfmap.workflow.record import read_record
from halfmap.workflow.settings import RunSettings
from halfmap.workflow.stages import STAGES

DISTINCT = 12
LABEL = slice(1016, 1024)
"""The end of an MRC header: of its last label."""

LAST = "first-extract"


class Replay:
    """Runs an item for the first movie of a content, and hands its files and result to the others."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], Any] = {}
        self.inside_s = 0.0

    def __call__(self, function: Callable[[Any], Any], item: Any) -> attempt.Outcome:
        """Run an item in the place of `attempt`."""
        start = time.process_time()
        outcome = self._outcome(function, item)
        self.inside_s += time.process_time() - start
        return outcome

    def _outcome(self, function: Callable[[Any], Any], item: Any) -> attempt.Outcome:
        key = getattr(item, "key", None)
        if key is None:
            return attempt.attempt(function, item)
        content, folder = key[:3], function.keywords["folder"]  # type: ignore[attr-defined]
        place = (str(folder), content)
        if place not in self.known or self.known[place][0] == key:  # for the first time, or anew
            outcome = attempt.attempt(function, item)
            files = [path for path in folder.rglob(f"{key}*") if path.is_file()]
            self.known[place] = key, outcome, files
            return outcome
        first, outcome, files = self.known[place]
        for path in files:
            copy = path.with_name(path.name.replace(first, key))
            copy.unlink(missing_ok=True)
            copy.hardlink_to(path)
        result = json.loads(json.dumps(outcome.result).replace(first, key))
        return dataclasses.replace(outcome, result=result)


def feed(folder: Path, first: int, last: int) -> None:
    """Movies of numbers first, ..., last - 1: a dozen of them, each with its number in the header."""
    for number in range(first, last):
        content = number % DISTINCT
        one = folder.parent / "made" / f"{content:02d}.mrc"
        if not one.exists():
            write_movie(one, content)
        folder.mkdir(exist_ok=True)
        # Files that hold the same would be left out as copies.
        data = bytearray(one.read_bytes())
        data[LABEL] = f"{number:08d}".encode()
        (folder / f"c{content:02d}_{number:06d}.mrc").write_bytes(data)


def bring_up_to_date(project: Project, folder: Path, replay: Replay, *, growing: bool) -> dict[str, float]:
    """Run the chain to the particles; the process's time of each stage outside of its items."""
    settings = RunSettings(
        movies=(folder / "*.mrc",),
        pixel_size=PIXEL_A,
        dose_per_frame=DOSE,
        diameter=84.0,
        set=("motion.pictures=no", "ctf.pictures=no", "first-pick.pictures=no"),
        until=LAST,
    )
    chain = Chain(project, settings, RunOptions(executor="serial"), read_record(project.root), growing)
    spent: dict[str, float] = {}
    before = {"time": time.process_time(), "inside": replay.inside_s, "stage": ""}

    def timed(name: str, step: str, plan: Callable[[Chain], Any]) -> Rule:
        def planned(chain: Chain) -> Any:
            note(name)
            return plan(chain)

        return name, step, planned

    def note(name: str) -> None:
        now, inside = time.process_time(), replay.inside_s
        if before["stage"]:
            spent[before["stage"]] = now - before["time"] - (inside - before["inside"])
        before.update(time=now, inside=inside, stage=name)

    chain.run([timed(*stage) for stage in STAGES])
    note("")
    return spent


def command_s(*words: str) -> float:
    """Own time of a command of Halfmap's, in s, its start included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "halfmap", *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the overhead of each stage for the whole set at once, then of rounds as in a session."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--movies", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of ten movies more, after that")
    parser.add_argument("--folder", type=Path, help="keep everything there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/throughput.json")
    options = parser.parse_args()
    load_steps()
    replay = Replay()
    executor.attempt = replay  # type: ignore[assignment]
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder, project = Path(scratch) / "in", Project.open(Path(scratch) / "P")
        counts = [options.movies // 4, options.movies]
        counts += [options.movies + 10 * (i + 1) for i in range(options.rounds)]
        print(f"{'movies':>8}{'new':>6}{'ms each':>9}{'rss GB':>8}  s outside of items, by stage")
        done = 0
        for number in counts:
            feed(folder, done, number)
            growing = number > options.movies
            with shown_on_terminal(level=40):
                spent = bring_up_to_date(project, folder, replay, growing=growing)
            each = 1e3 * sum(spent.values()) / (number - done)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            said = "  ".join(f"{name} {value:.2f}" for name, value in spent.items() if value > 0.05)
            print(f"{number:>8}{number - done:>6}{each:>9.1f}{peak:>8.2f}  {said}", flush=True)
            rows.append(
                {
                    "movies": number,
                    "new": number - done,
                    "growing": growing,
                    "peak_GB": peak,
                    "stages_s": spent,
                }
            )
            done = number
        os.sync()
        commands = {name: command_s(name, str(project.root)) for name in ("status", "info")}
        print("  ".join(f"halfmap {name}: {value:.2f} s" for name, value in commands.items()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"rounds": rows, "commands_s": commands}, indent=2) + "\n")


if __name__ == "__main__":
    main()
