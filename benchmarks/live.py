"""How well `halfmap live` keeps up: movies come at a given rate; their latency, and the backlog.

The movies are a few that are simulated once, under new names. Latency is from the moment at which a movie is
there to that at which its motion is corrected, its CTF estimated, and its micrograph searched.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HALFMAP = [sys.executable, "-m", "halfmap"]
DISTINCT = 3
_UNITS = {"motion": ("Motion", "movie"), "ctf": ("Ctf", "micrograph"), "pick": ("Pick", "micrograph")}


def simulate(folder: Path, side: int, frames: int) -> tuple[list[Path], Path]:
    """A few movies and their gain reference."""
    words = ["simulate", "movies", "--n-movies", str(DISTINCT), "--n-frames", str(frames)]
    words += ["--width", str(side), "--height", str(side), "--project", str(folder)]
    subprocess.run([*HALFMAP, *words], check=True, stderr=subprocess.DEVNULL)
    job = folder / "Simulate/job001"
    return sorted((job / "Movies").glob("*.tiff")), job / "gain.mrc"


def feed(movies: list[Path], folder: Path, count: int, seconds: float) -> dict[str, float]:
    """Link movies under new names, one after so many seconds; when each came, by its name."""
    came = {}
    for number in range(count):
        name = f"m{number:05d}"
        (folder / f"{name}.tiff").hardlink_to(movies[number % len(movies)])
        came[name] = time.time()
        time.sleep(seconds)
    return came


def finished(project: Path) -> dict[str, dict[str, float]]:
    """When each movie was through a step for the first time, by step and name."""
    times: dict[str, dict[str, float]] = {}
    for step, (folder, unit) in _UNITS.items():
        own = times.setdefault(step, {})
        for path in project.glob(f"{folder}/job*/events.jsonl"):
            for line in path.read_text().splitlines():
                event = json.loads(line)
                if event["event"] == "item" and event["unit"] == unit:
                    own.setdefault(Path(event["key"]).stem, event["time"])
    return times


def latency(came: dict[str, float], done: dict[str, float]) -> dict[str, float]:
    """Times from the coming of movies to their end in a step, in s, and the most that waited at a time."""
    late = sorted(done[name] - came[name] for name in done)
    ends = sorted(done.values())
    waiting = [sum(come <= end for come in came.values()) - number for number, end in enumerate(ends)]
    return {
        "done": len(late),
        "median_s": statistics.median(late),
        "most_s": late[-1],
        "most_waiting": max(waiting),
    }


def main() -> None:
    """Feed movies to a session, and print the latencies and the session's lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--movies", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=10.0, help="between two movies")
    parser.add_argument("--side", type=int, default=4096, help="of a movie, px")
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/live.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        movies, gain = simulate(Path(scratch) / "simulated", options.side, options.frames)
        folder, project = Path(scratch) / "in", Path(scratch) / "P"
        folder.mkdir()
        words = ["live", str(folder), "--project", str(project), "--gain", str(gain)]
        words += ["--pixel-size", "1.4", "--dose-per-frame", "1.5", "--settle", "2"]
        words += ["--workers", str(options.workers)]
        session = subprocess.Popen([*HALFMAP, *words], stderr=subprocess.PIPE, text=True)
        came = feed(movies, folder, options.movies, options.seconds)
        end = time.time() + 600
        while len(finished(project).get("pick", {})) < options.movies and time.time() < end:
            time.sleep(2)
        session.send_signal(signal.SIGINT)
        said = session.communicate()[1]
        times = finished(project)
    print(said)
    figures = {step: latency(came, own) for step, own in times.items() if own}
    for step, found in figures.items():
        print(f"{step:>8}: " + "  ".join(f"{name} {value:.0f}" for name, value in found.items()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {name: value for name, value in vars(options).items() if name != "out"}
    options.out.write_text(json.dumps({"options": record, "latency": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
