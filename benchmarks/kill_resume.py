"""Kill `halfmap simulate movies` at random moments, resume it, compare all files with an undisturbed run."""

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

RECORDS = {"job.json", "note.txt", "run.out", "run.err", "events.jsonl", "items.jsonl", ".lock"}
"""Files that tell of the run itself (times, dates, messages) and so may differ."""

COMMAND = [sys.executable, "-m", "halfmap"]
OPTIONS = ["simulate", "movies", "--n-movies", "6", "--width", "512", "--height", "512", "--seed", "7"]


def fingerprint(folder: Path) -> dict[str, str]:
    """Hash of every result of a job by its name inside the folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in RECORDS)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)
    }


def run(project: Path, workers: int) -> float:
    """Run the simulation undisturbed; seconds it took."""
    start = time.monotonic()
    words = [*COMMAND, *OPTIONS, "--workers", str(workers), "--project", str(project)]
    subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - start


def kill_and_resume(project: Path, workers: int, after: float) -> int:
    """Kill the run after so many seconds, resume it; movies that were done at the kill."""
    words = [*COMMAND, *OPTIONS, "--workers", str(workers), "--project", str(project)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(timeout=after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    else:
        # Ended before the kill: another moment, a little earlier.
        shutil.rmtree(project)
        return kill_and_resume(project, workers, 0.8 * after)
    job = project / "Simulate/job001"
    ledger = job / "items.jsonl"
    done = ledger.read_bytes().count(b"\n") if ledger.exists() else 0
    if not (job / "job.json").exists():
        # Killed before there was a job to resume.
        shutil.rmtree(project, ignore_errors=True)
        run(project, workers)
    else:
        words = [*COMMAND, "resume", "job001", "--workers", str(workers), "--project", str(project)]
        subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
    return done


def main() -> int:
    """Print a table of five kills for each number of workers; exit code 1 if any file differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/kill_resume.json")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        seconds = run(whole, 1)
        expected = fingerprint(whole / "Simulate/job001")
        print(f"undisturbed: {seconds:.1f} s, {len(expected)} files\n")
        print(f"{'workers':>8}{'killed at':>12}{'items done':>12}{'files':>8}{'same':>8}")
        for workers in (1, 2):
            for _ in range(options.kills):
                project = Path(scratch) / "killed"
                after = moments.uniform(0.1, 0.95) * seconds
                done = kill_and_resume(project, workers, after)
                found = fingerprint(project / "Simulate/job001")
                rows.append({"workers": workers, "after_s": after, "done": done, "same": found == expected})
                same = "yes" if found == expected else "NO"
                print(f"{workers:>8}{after:>10.1f} s{done:>12}{len(found):>8}{same:>8}")
                shutil.rmtree(project)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"undisturbed_s": seconds, "kills": rows}, indent=2) + "\n")
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
