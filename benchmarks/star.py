"""Time to read and write a table of particles as STAR, against starfile, on a file as RELION writes it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

BAR = 0.3
"""Largest share of starfile's time that reading and writing may take."""


def particle_table(n: int) -> pl.DataFrame:
    """A table of `n` particles and 14 columns, values with the digits that RELION writes."""
    rng = np.random.default_rng(0)
    movie = rng.integers(1, 2_000, n)
    stem = [f"20170629_{number:05d}_frameImage" for number in movie]

    def uniform(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, n).round(6)

    return pl.DataFrame(
        {
            "rlnCoordinateX": uniform(0, 4_000),
            "rlnCoordinateY": uniform(0, 4_000),
            "rlnImageName": [f"{i % 200 + 1:06d}@Extract/job012/Movies/{s}.mrcs" for i, s in enumerate(stem)],
            "rlnMicrographName": [f"MotionCorr/job002/Movies/{s}.mrc" for s in stem],
            "rlnOpticsGroup": np.ones(n, dtype=np.int64),
            "rlnDefocusU": uniform(8_000, 30_000),
            "rlnDefocusV": uniform(8_000, 30_000),
            "rlnDefocusAngle": uniform(-90, 90),
            "rlnAngleRot": uniform(-180, 180),
            "rlnAngleTilt": uniform(0, 180),
            "rlnAnglePsi": uniform(-180, 180),
            "rlnOriginXAngst": uniform(-10, 10),
            "rlnOriginYAngst": uniform(-10, 10),
            "rlnClassNumber": rng.integers(1, 5, n),
        }
    )


def write_as_relion(path: Path, table: pl.DataFrame) -> None:
    """Write the table in RELION's layout: columns of twelve characters, right-justified."""
    padded = table.select(
        pl.col(label) if dtype == pl.String else pl.col(label).cast(pl.String).str.pad_start(12)
        for label, dtype in table.schema.items()
    )
    labels = "".join(f"_{label} #{i} \n" for i, label in enumerate(table.columns, start=1))
    with path.open("wb") as file:
        file.write(f"\n# version 30001\n\ndata_particles\n\nloop_ \n{labels}".encode())
        file.flush()
        padded.write_csv(
            file, include_header=False, separator=" ", quote_style="never", line_terminator=" \n"
        )
        file.write(b" \n")


def best(*functions: Callable[[], object], repeats: int) -> list[float]:
    """Shortest of several times of each function in seconds; in turns, so that other load hits all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, its_times in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            its_times.append(time.perf_counter() - start)
    return [min(its_times) for its_times in times]


def peak_memory(path: Path) -> float:
    """Memory in MB that reading the file adds at its peak, in a process of its own; NaN but on Linux."""
    if not Path("/proc/self/status").exists():
        return float("nan")
    code = (
        "import re, sys; from halfmap.io.star import read_star; import halfmap.io.star_kernel\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak(); read_star(sys.argv[1]); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def measure(n: int, repeats: int, folder: Path) -> dict[str, float]:
    """Times of both readers and writers, after checking that they give equal values."""
    import starfile

    from halfmap.io.star import read_star, write_star

    table = particle_table(n)
    relion, ours, theirs = folder / "relion.star", folder / "ours.star", folder / "theirs.star"
    write_as_relion(relion, table)
    [first] = best(lambda: read_star(relion), repeats=1)
    frame = starfile.read(relion)
    write_star(ours, {"particles": table})
    starfile.write(frame, theirs, overwrite=True)
    for path in (relion, ours, theirs):
        if not read_star(path)["particles"].equals(table):
            raise SystemExit(f"values of {path.name} are not those written")
    if not pl.from_dict({label: frame[label].to_numpy() for label in frame}).equals(table):
        raise SystemExit("starfile reads other values")
    tasks = {
        "read": (lambda: read_star(relion), lambda: starfile.read(relion)),
        "read_own_layout": (lambda: read_star(ours), lambda: starfile.read(theirs)),
        "write": (
            lambda: write_star(ours, {"particles": table}),
            lambda: starfile.write(frame, theirs, overwrite=True),
        ),
    }
    result = {
        "rows": n,
        "columns": table.width,
        "file_MB": relion.stat().st_size / 1024**2,
        "first_read_s": first,
        "memory_of_reading_MB": peak_memory(relion),
    }
    for name, functions in tasks.items():
        result[f"{name}_s"], result[f"starfile_{name}_s"] = best(*functions, repeats=repeats)
    return result


def main() -> None:
    """Measure, print a table, write JSON and fail if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/star.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.rows, arguments.repeats, Path(folder))
    size = f"{arguments.rows:,} particles x {result['columns']} columns, {result['file_MB']:.0f} MB"
    print(f"{size}, {os.cpu_count()} cores")
    print(f"{'':32}{'halfmap':>10}{'starfile':>10}{'share':>8}")
    shares = {}
    for name, title in (
        ("read", "read, RELION's layout"),
        ("read_own_layout", "read, each its own layout"),
        ("write", "write"),
    ):
        mine, other = result[f"{name}_s"], result[f"starfile_{name}_s"]
        shares[name] = mine / other
        print(f"{title:32}{mine:9.2f}s{other:9.2f}s{shares[name]:8.2f}")
    print(f"{'first read in a process':32}{result['first_read_s']:9.2f}s")
    memory = result["memory_of_reading_MB"]
    print(f"{'memory of reading':32}{memory:8.0f}MB ({memory / result['file_MB']:.1f} x the file)")
    machine = {"python": platform.python_version(), "polars": pl.__version__, "cores": os.cpu_count()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "bar": BAR, "shares": shares, **result}
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    if max(shares.values()) > BAR:
        raise SystemExit(f"slower than {BAR} x starfile")


if __name__ == "__main__":
    main()
