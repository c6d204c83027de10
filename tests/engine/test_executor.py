"""Local workers: who is blamed for their death, how many threads they have, what needs none."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import toy_step as toy

from halfmap.engine import Context, RunOptions
from halfmap.engine.executor import run_items, threads_of
from halfmap.io.binary import decoding_threads


def test_an_item_beside_which_another_kills_its_worker_is_not_blamed(tmp_path):
    ctx = Context(tmp_path, tmp_path, RunOptions(executor="processes", workers=2))
    # The first death puts four under suspicion. They run one by one, and nothing new beside the last of them.
    fates = [(0, 0.4, 1), *((number, 0.8, 0) for number in (1, 2, 3)), (4, 0.1, 9), (5, 0.0, 0)]
    work = functools.partial(toy.live_or_die, folder=tmp_path)
    assert ctx.map(work, fates, key=lambda fate: str(fate[0])) == [0, 1, 2, 3, 5]
    assert sorted(failure.key for failure in ctx.failures) == ["4"]


def test_threads_are_those_of_the_processors_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5, 7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert threads_of(RunOptions(workers=2)) == 2
    assert threads_of(RunOptions(workers=9)) == 1
    assert decoding_threads() == 4


def test_items_of_milliseconds_ask_for_no_workers(tmp_path):
    options = RunOptions(cluster="slurm", workers=2)
    outcomes = run_items(toy.process_number, [1, 2], options, folder=tmp_path, light=True)
    assert [outcome.result for _, outcome in outcomes] == [os.getpid()] * 2


_SLEEPERS = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import toy_step as toy
from halfmap.engine import RunOptions
from halfmap.engine.executor import run_items
if __name__ == "__main__":
    folder = Path(sys.argv[2])
    items = [folder / "1", folder / "2"]
    for _ in run_items(toy.leave_number_and_sleep, items, RunOptions(workers=2), folder=folder):
        pass
"""


def test_nothing_is_left_of_a_run_that_is_killed(tmp_path: Path):
    script = tmp_path / "sleepers.py"
    script.write_text(_SLEEPERS)
    words = [sys.executable, str(script), str(Path(toy.__file__).parent), str(tmp_path)]
    main = subprocess.Popen(words, start_new_session=True)
    numbers = tmp_path / "1", tmp_path / "2"
    deadline = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in numbers):
        assert main.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    main.kill()
    main.wait()
    try:
        assert _gone(main.pid, 15.0)
    finally:
        if not _gone(main.pid, 0.0):
            os.killpg(main.pid, signal.SIGKILL)


def _gone(group: int, within_s: float) -> bool:
    """Whether no process of a group is left, but for those that wait to be taken note of."""
    deadline = time.monotonic() + within_s
    while True:
        states = subprocess.run(
            ["ps", "-e", "-o", "pgid=,stat="], capture_output=True, text=True, check=True
        ).stdout.split("\n")
        if not any(line.split()[0] == str(group) and "Z" not in line for line in states if line.strip()):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
