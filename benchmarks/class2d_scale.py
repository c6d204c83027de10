"""A million particles of 64 px through `halfmap class2d`: memory of all its processes, CPU time.

10,000 particles are simulated in 100 stacks of half precision; each stack has 100 names (hard links), so that
the table has a million rows of distinct names in 10,000 stacks, as many micrographs would give. The system
keeps what is read in its own cache, so times are those of a fast disk. Memory is the proportional set size of
the process and all that it started, added up twice a second; pages that two of them share count once.

- epoch: three mini-batches that together take every particle once, 5 classes;
- whole, workers: to the end, an iteration with all particles, 2 classes, in one process and in two;
- classes: 50 classes to 9 Å, stopped after its first mini-batch of 20,000.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
import psutil

from class2d_data import STRUCTURES, halfmap
from halfmap.data import ParticleSet
from halfmap.io.tables import read_particles, write_particles

BOX, PIXEL_A, SIMULATED = 64, 4.0, 10_000
LIMIT_GB = 4.0
EVERY_s = 0.5
COMMON = "--diameter 200 --seed 1 --project ."
QUICK = (
    "--classes 2 --resolution 16 --first-resolution 60 --shift-range 8 --iterations 2 --full-iterations 1"
    " --first-batch 2000"
)
RUNS = {
    "epoch": "--classes 5 --resolution 16 --first-resolution 30 --shift-range 8 --iterations 4"
    " --full-iterations 1 --first-batch 160000",
    "whole": QUICK,
    "workers": f"{QUICK} --workers 2",
    "classes": "--classes 50 --resolution 9 --first-batch 20000",
}
STOPPED_AFTER = {"epoch": 3, "classes": 1}
"""Iterations after which a run is ended."""


@dataclass
class Watch:
    """What was seen of a process and all that it started.

    Attributes
    ----------
    samples : list of (time, CPU seconds, bytes, largest process, processes)
    lines : list of (time, text)
        What it wrote to standard error.
    """

    samples: list[tuple[float, float, int, int, int]] = field(default_factory=list)
    lines: list[tuple[float, str]] = field(default_factory=list)

    def sample(self, process: psutil.Process) -> None:
        """Add up memory and CPU time of the processes there are now."""
        memory, cpu = [], 0.0
        try:
            family = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for one in family:
            try:
                times = one.cpu_times()
                memory.append(one.memory_full_info().pss)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
            # Those that ended count with the process that waited for them.
            cpu += times.user + times.system + times.children_user + times.children_system
        if memory:
            self.samples.append((time.monotonic(), cpu, sum(memory), max(memory), len(memory)))

    def read(self, stream: IO[str]) -> None:
        """Keep all lines with their times."""
        for line in stream:
            self.lines.append((time.monotonic(), line.rstrip()))

    def cpu_at(self, moment: float) -> float:
        """CPU seconds at a time."""
        times, cpu = np.array(self.samples).T[:2]
        return float(np.interp(moment, times, cpu))

    def peak_until(self, first: float, last: float) -> int:
        """Most bytes between two times."""
        return max((bytes_ for t, _, bytes_, *_ in self.samples if first <= t <= last), default=0)


def table_of_a_million(folder: Path, models: Path, rows: int) -> Path:
    """Simulate the images, give their stacks many names, write the table; once."""
    path = folder / "particles.star"
    if path.exists() and len(read_particles(path)) == rows:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / "Simulate/job001"
    if not (job / "RELION_JOB_EXIT_SUCCESS").exists():
        shutil.rmtree(folder)
        folder.mkdir()
        words = f"simulate particles {models / STRUCTURES['galactosidase']} --box-size {BOX} --snr 0.05"
        words += f" --pixel-size {PIXEL_A} --n-particles {SIMULATED} --shift 8 --float16 --seed 3"
        halfmap(words, folder)
    table = read_particles(job / "particles.star")
    known = ["rlnOpticsGroup", "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnPhaseShift"]
    stacks = sorted((job / "Particles").glob("*.mrcs"))
    parts: list[pl.DataFrame] = []
    for copy in range(-(-rows // SIMULATED)):
        there = folder / "Particles" / f"{copy + 1:03d}"
        there.mkdir(parents=True, exist_ok=True)
        for stack in stacks:
            if not (there / stack.name).exists():
                os.link(stack, there / stack.name)
        name = pl.col("rlnImageName").str.replace("Simulate/job001/Particles", f"Particles/{copy + 1:03d}")
        micrograph = name.str.split("@").list.last().str.replace("Particles", "Micrographs")
        parts.append(table.rows.select(name, micrograph.alias("rlnMicrographName"), *known))
    optics = table.optics.drop("hmSignalScale")
    write_particles(path, ParticleSet(optics, pl.concat(parts).head(rows)))
    return path


def run(words: str, folder: Path, stop_after: int | None) -> tuple[Path, Watch, float]:
    """Run a classification, or its first iterations, and watch it: its job, what was seen, the start."""
    command = [sys.executable, "-m", "halfmap", *f"class2d particles.star {words} {COMMON}".split()]
    watch, start = Watch(), time.monotonic()
    process = subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    reader = threading.Thread(target=watch.read, args=(process.stderr,))
    reader.start()
    seen, last = psutil.Process(process.pid), f"iteration {stop_after} of "
    while process.poll() is None:
        watch.sample(seen)
        if stop_after and any(last in line for _, line in watch.lines):
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(EVERY_s)
    process.wait()
    reader.join()
    if process.returncode and not stop_after:
        raise SystemExit("\n".join(line for _, line in watch.lines[-20:]))
    return max((folder / "Class2D").glob("job*")), watch, start


def measured(job: Path, watch: Watch, start: float) -> dict[str, Any]:
    """Figures of a run: memory, time to begin, and a row an iteration."""
    offset = time.time() - time.monotonic()
    events = [json.loads(line) for line in (job / "events.jsonl").read_text().splitlines()]
    first = min(e["time"] - e["seconds"] for e in events if e.get("unit") == "part") - offset
    planned = next(t for t, line in watch.lines if " particles, box " in line)
    ends = [(t, re.search(r"iteration (\d+) of \d+: (\d+) particles at ([\d.]+)", s)) for t, s in watch.lines]
    iterations, before = [], first
    for moment, found in ends:
        if not found:
            continue
        cpu = watch.cpu_at(moment) - watch.cpu_at(before)
        iterations.append(
            {
                "iteration": int(found[1]),
                "particles": int(found[2]),
                "searched A": float(found[3]),
                "CPU s": cpu,
                "ms a particle": 1000 * cpu / int(found[2]),
                "GB": watch.peak_until(before, moment) / 1e9,
            }
        )
        before = moment
    end = watch.samples[-1][0]
    _, _, peak, largest, processes = max(watch.samples, key=lambda sample: sample[2])
    return {
        "GB": peak / 1e9,
        "largest process GB": largest / 1e9,
        "processes": processes,
        "GB before": watch.peak_until(start, first) / 1e9,
        "GB at the end": watch.peak_until(before, end) / 1e9,
        "table read, CPU s": watch.cpu_at(planned),
        "table read, wall s": planned - start,
        "before iterations, CPU s": watch.cpu_at(first),
        "before iterations, wall s": first - start,
        "after iterations, CPU s": watch.cpu_at(end) - watch.cpu_at(before),
        "CPU s": watch.cpu_at(end),
        "wall s": end - start,
        "iterations": iterations,
    }


def rounded(value: Any) -> Any:
    """The same with three decimals, for the record."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 3) if isinstance(value, float) else value


def main() -> int:
    """Print figures of each run and keep them; exit code 1 if any needs more than 4 GB."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("../shared/data/models"))
    parser.add_argument(
        "--scratch", type=Path, required=True, help="folder of the project; kept for the next run"
    )
    parser.add_argument("--particles", type=int, default=1_000_000)
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    folder = options.scratch.resolve()
    table_of_a_million(folder, options.models.resolve(), options.particles)
    path = Path(__file__).parent / "results" / "class2d_scale.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    record |= {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "box": BOX}
    too_much = False
    for name in options.runs:
        figures = rounded(measured(*run(RUNS[name], folder, STOPPED_AFTER.get(name))))
        print(f"{name}: {RUNS[name]}")
        for key, value in figures.items():
            if key != "iterations":
                print(f"  {key:26s} {value:10.2f}")
        for row in figures["iterations"]:
            print("  " + "  ".join(f"{key} {value:g}" for key, value in row.items()), flush=True)
        record["runs"][name] = {"options": RUNS[name], "rows": options.particles} | figures
        path.write_text(json.dumps(record, indent=1) + "\n")
        too_much |= figures["GB"] > LIMIT_GB
    return int(too_much)


if __name__ == "__main__":
    sys.exit(main())
