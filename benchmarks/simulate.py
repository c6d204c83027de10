"""Time and memory of simulating movies: 20 of 2048 x 2048 x 24 frames in 5 minutes and 4 GB on two cores."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

LIMIT_s, LIMIT_GB = 300.0, 4.0


def tree_memory_GB(pid: int) -> float:
    """Memory of a process and its children, pages that they share counted once."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
    except psutil.Error:
        pass
    return total / 1e9


def measure(options: list[str], workers: int) -> dict[str, float]:
    """Run a simulation in a new project and watch it; time, peak memory, size on disk."""
    with tempfile.TemporaryDirectory() as project:
        words = [sys.executable, "-m", "halfmap", "simulate", *options, "--workers", str(workers)]
        start, peak = time.monotonic(), 0.0
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.Popen([*words, "--project", project], stderr=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, tree_memory_GB(process.pid))
            time.sleep(0.25)
        seconds = time.monotonic() - start
        if process.returncode:
            raise SystemExit(f"halfmap simulate {' '.join(options)} failed")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        size = sum(path.stat().st_size for path in Path(project).rglob("*") if path.is_file())
        return {
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "peak_GB": round(peak, 2),
            "disk_GB": round(size / 1e9, 2),
        }


def main() -> int:
    """Print a table and write JSON; exit code 1 if the movies take longer or more than they may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--movies", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--large", action="store_true", help="also micrographs of 4096 x 4096")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/simulate.json")
    arguments = parser.parse_args()
    cases = {f"{arguments.movies} movies 2048 x 2048 x 24": ["movies", "--n-movies", str(arguments.movies)]}
    if arguments.large:
        size = ["--width", "4096", "--height", "4096", "--particles", "300"]
        cases["4 micrographs 4096 x 4096"] = ["micrographs", "--n-micrographs", "4", *size]
        cases["2 movies 4096 x 4096 x 24"] = ["movies", "--n-movies", "2", *size]
        cases["5000 particles"] = ["particles", "--n-particles", "5000"]
    results = {}
    print(f"{'':32s}{'seconds':>10s}{'CPU s':>10s}{'peak GB':>10s}{'disk GB':>10s}")
    for name, options in cases.items():
        results[name] = measure(options, arguments.workers)
        print(f"{name:32s}" + "".join(f"{value:10.2f}" for value in results[name].values()))
    bar = next(iter(results.values()))
    passed = bar["seconds"] <= LIMIT_s * arguments.movies / 20 and bar["peak_GB"] <= LIMIT_GB
    print(f"bar: {LIMIT_s:.0f} s for 20 movies, {LIMIT_GB:.0f} GB: {'met' if passed else 'missed'}")
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    content = {"machine": machine, "workers": arguments.workers, "results": results, "passed": passed}
    arguments.out.write_text(json.dumps(content, indent=2) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
