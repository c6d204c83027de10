"""Kill `halfmap simulate movies` between its movies, resume it, compare all files with an undisturbed run.

A kill comes when so many movies are done as was drawn, and a random part of a movie's time later.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECORDS = {"job.json", "note.txt", "run.out", "run.err", "events.jsonl", "items.jsonl", ".lock"}
"""Files that tell of the run itself (times, dates, messages) and so may differ."""

COMMAND = [sys.executable, "-m", "halfmap"]
N_MOVIES = 6
OPTIONS = [
    "simulate",
    "movies",
    "--n-movies",
    str(N_MOVIES),
    "--width",
    "512",
    "--height",
    "512",
    "--seed",
    "7",
]
JOB = "Simulate/job001"
START_s = 5.0
"""About the time until the first movie begins, in which a kill that waits for no movie comes."""


def fingerprint(folder: Path) -> dict[str, str]:
    """Hash of every result of a job by its name inside the folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in RECORDS)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)
    }


def ledger(project: Path) -> list[dict[str, Any]]:
    """Whole lines of the ledger of finished movies."""
    path = project / JOB / "items.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["unit"] == "movie"]


def halfmap(project: Path, workers: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the project to its end."""
    command = [*COMMAND, *words, "--workers", str(workers), "--project", str(project)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def kill(project: Path, workers: int, done: int, part: float) -> dict[str, Any]:
    """Start the simulation, kill it and its workers `part` of a movie's time after `done` movies are done.

    With none done that is the time since the start; if the job ends before the kill, nothing is killed.
    """
    command = [*COMMAND, *OPTIONS, "--workers", str(workers), "--project", str(project)]
    start = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and len(ledger(project)) < done:
        time.sleep(0.01)
    entries = ledger(project)
    movie_s = sum(entry["seconds"] for entry in entries) / len(entries) if entries else START_s
    moment = time.monotonic() + part * movie_s
    while process.poll() is None and time.monotonic() < moment:
        time.sleep(0.005)
    ended = process.poll() is not None
    if not ended:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return {"after_s": round(time.monotonic() - start, 2), "done": len(ledger(project)), "ended": ended}


def resume(project: Path, workers: int) -> tuple[int, str]:
    """Go on with the killed job; exit code and last line of its messages.

    A kill before the job is on record leaves nothing to go on with, and the simulation is asked for again.
    """
    if (project / JOB / "job.json").exists() and (project / "default_pipeline.star").exists():
        result = halfmap(project, workers, "resume", "job001")
    else:
        shutil.rmtree(project, ignore_errors=True)
        result = halfmap(project, workers, *OPTIONS)
    message = (result.stderr.strip().splitlines() or [""])[-1]
    return result.returncode, message.replace(f"{project}/", "")


def main() -> int:
    """Print a table of the kills for each number of workers; exit code 1 if any file differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5, help="for each number of workers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/kill_resume.json")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        start = time.monotonic()
        if halfmap(Path(scratch) / "whole", 1, *OPTIONS).returncode:
            raise SystemExit("the undisturbed run failed")
        seconds = time.monotonic() - start
        expected = fingerprint(Path(scratch) / "whole" / JOB)
        print(f"undisturbed: {seconds:.1f} s, {len(expected)} files\n")
        print(f"{'workers':>8}{'killed at':>12}{'asked':>8}{'done':>6}{'resume':>8}{'files':>7}{'same':>6}")
        for workers in (1, 2):
            # No number of movies comes again before all others have come.
            waits = [
                n for _ in range(0, options.kills, N_MOVIES) for n in draw.sample(range(N_MOVIES), N_MOVIES)
            ]
            waits = waits[: options.kills]
            for wait in waits:
                project = Path(scratch) / "killed"
                row = {"workers": workers, "asked": wait, **kill(project, workers, wait, draw.random())}
                code, message = resume(project, workers)
                found = fingerprint(project / JOB)
                row |= {"resume": code, "same": code == 0 and found == expected}
                if row["ended"]:
                    # What had ended before the kill has nothing to resume, and must say so.
                    row["same"] = code == 2 and "ended well" in message and found == expected
                if code:
                    row["message"] = message
                rows.append(row)
                print(
                    f"{workers:>8}{row['after_s']:>10.1f} s{wait:>8}{row['done']:>6}{code:>8}"
                    f"{len(found):>7}{'yes' if row['same'] else 'NO':>6}  {message if code else ''}",
                    flush=True,
                )
                shutil.rmtree(project)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"undisturbed_s": seconds, "kills": rows}, indent=2) + "\n")
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
