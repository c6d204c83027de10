"""Extraction beside RELION's: the same pixels, and the time against plain reading of the micrographs.

Particles of `relion_preprocess` at the same coordinates are compared one by one, on real micrographs where
`--real` names the folder of `apoferritin_empiar10146`, else on noise. Times are of micrographs of noise, 4096
x 4096 in single precision. Before every run from the disk their pages are given up (`posix_fadvise`), so that
they come from the disk, or from caches below it that no program can empty; for a run from memory all of them
are read once before. Plain reading is done by as many processes as extract, which share the files and read
theirs one by one into memory that they keep, in the same state of the cache. "Copying" are as many processes
that read the micrographs in the same way and after each write and flush as many bytes as its stack has,
without a look at them. The rate of ours is that from the first micrographs' end to the last one's, without
the start of Python; that of RELION, which is one process, of its whole run. Stacks are written and flushed to
the disk on the way.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from halfmap.data import MicrographSet
from halfmap.io.coordinates import read_coordinates, write_coordinates
from halfmap.io.images import ImageStack
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.star import write_star
from halfmap.io.tables import read_micrographs, read_particles, write_micrographs

SIZE, COUNT, PARTICLES, WORKERS = 4096, 32, 200, (2, 4)
BOX, SCALED, DIAMETER = 256, 128, 180.0
TIMES = {
    "scaled to 1/2": ["--scaled-box", str(SCALED)],
    "scaled to 1/4": ["--scaled-box", str(BOX // 4)],
    "not scaled": [],
    "not scaled, float16": ["--float16"],
}
SIDES = {"scaled to 1/2": SCALED, "scaled to 1/4": BOX // 4, "not scaled": BOX, "not scaled, float16": BOX}
CONFIGURATIONS: dict[str, tuple[list[str], list[str]]] = {
    "as it is": (["--background", "none", "--no-invert-contrast"], []),
    "ramp, inverted": ([], ["--norm", "--invert_contrast"]),
    "mean, inverted": (["--background", "mean"], ["--norm", "--no_ramp", "--invert_contrast"]),
    "ramp, inverted, dust": (
        ["--white-dust", "5", "--black-dust", "5"],
        ["--norm", "--invert_contrast", "--white_dust", "5", "--black_dust", "5"],
    ),
    "ramp, inverted, scaled": (["--scaled-box"], ["--norm", "--invert_contrast", "--scale"]),
    "scaled": (["--background", "none", "--no-invert-contrast", "--scaled-box"], ["--scale"]),
}
"""Options of ours and of RELION's; the scaled box follows where it ends one."""
REAL_BOX, REAL_SCALED, REAL_DIAMETER, REAL_PIXEL = 180, 90, 120.0, 1.5
SAME, SHARE = 0.99, 0.60


def optics(pixel_size: float) -> pl.DataFrame:
    """One optics group."""
    names = ("rlnOpticsGroup", "rlnOpticsGroupName", "rlnVoltage", "rlnSphericalAberration")
    values = dict(zip(names, (1, "one", 300.0, 2.7), strict=True))
    return pl.DataFrame([values | {"rlnAmplitudeContrast": 0.07, "rlnMicrographPixelSize": pixel_size}])


def write_project(folder: Path, names: list[str], places: list[NDArray], pixel_size: float) -> None:
    """Write tables of micrographs and coordinates for both programs."""
    rows = {"rlnMicrographName": names, "rlnOpticsGroup": 1, "rlnDefocusU": 15e3, "rlnDefocusV": 15e3}
    table = pl.DataFrame(rows | {"rlnDefocusAngle": 0.0})
    write_micrographs(folder / "micrographs.star", MicrographSet(optics(pixel_size), table))
    files = [str(Path(name).with_name(Path(name).stem + "_pick.star")) for name in names]
    for file, place in zip(files, places, strict=True):
        write_coordinates(folder / file, pl.DataFrame(place, schema=["rlnCoordinateX", "rlnCoordinateY"]))
    listed = pl.DataFrame({"rlnMicrographName": names, "rlnMicrographCoordinates": files})
    write_star(folder / "coordinates.star", {"coordinate_files": listed})


def make_noise(folder: Path) -> None:
    """Micrographs of noise with random coordinates."""
    rng = np.random.default_rng(0)
    (folder / "Micrographs").mkdir(parents=True)
    image = rng.normal(40, 6, (SIZE, SIZE)).astype(np.float32)
    names = [f"Micrographs/{number:03d}.mrc" for number in range(COUNT)]
    for number, name in enumerate(names):
        write_mrc(folder / name, np.roll(image, 101 * number, axis=1), pixel_size=1.0)
    places = [rng.uniform(BOX, SIZE - BOX, (PARTICLES, 2)) for _ in names]
    write_project(folder, names, places, 1.0)


def make_real(folder: Path, real: Path) -> None:
    """Real micrographs with their manual picks."""
    (folder / "Micrographs").mkdir(parents=True)
    names, places = [], []
    for path in sorted((real / "apoferritin_empiar10146").glob("apo_*.mrc")):
        # RELION 3.1 takes 16 bits without a sign for such with one.
        image = read_mrc(path).astype(np.float32)
        write_mrc(folder / "Micrographs" / path.name, image, pixel_size=REAL_PIXEL)
        names.append(f"Micrographs/{path.name}")
        table = read_coordinates(path.with_name(f"{path.stem}_manual.csv"))
        places.append(table.select("rlnCoordinateX", "rlnCoordinateY").to_numpy())
    write_project(folder, names, places, REAL_PIXEL)


def run_ours(
    folder: Path,
    box: int,
    diameter: float,
    words: list[str],
    *,
    workers: int = 1,
) -> Path:
    """Run our step; the folder of its job."""
    command = [sys.executable, "-m", "halfmap", "extract", "micrographs.star"]
    command += ["--coordinates", "coordinates.star", "--box", str(box), "--diameter", str(diameter)]
    command += ["--background-diameter", str(diameter), "--min-distance", "0", "--workers", str(workers)]
    ended = subprocess.run([*command, "--project", ".", *words], cwd=folder, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(ended.stderr[-2000:])
    return max((folder / "Extract").iterdir())


def run_relion(folder: Path, name: str, box: int, words: list[str]) -> None:
    """Run RELION's program; particles go to the folder `name`."""
    command = ["relion_preprocess", "--i", "micrographs.star", "--coord_dir", "./"]
    command += [
        "--coord_suffix",
        "_pick.star",
        "--part_dir",
        f"{name}/",
        "--part_star",
        f"{name}.star",
        "--extract",
    ]
    command += ["--extract_size", str(box), *words]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def correlations(folder: Path, job: Path, name: str) -> tuple[NDArray, NDArray]:
    """Of every particle with RELION's at the same place, and whether its whole box is in the micrograph."""
    ours, theirs = read_particles(job / "particles.star"), read_particles(folder / f"{name}.star")
    keys, frames = ["rlnMicrographName", "x", "y"], []
    for label, table in (("ours", ours), ("theirs", theirs)):
        # The fraction of a coordinate stays in RELION's table and goes to the origin in ours.
        x, y = (table.rows[f"rlnCoordinate{axis}"].floor().cast(pl.Int64) for axis in "XY")
        rows = table.rows.select("rlnMicrographName", pl.col("rlnImageName").alias(label), x=x, y=y)
        frames.append(rows.unique(keys, keep="first", maintain_order=True))
    both = frames[0].join(frames[1], on=keys, maintain_order="left")
    if len(both) < 0.99 * len(ours):
        raise SystemExit(f"only {len(both)} of {len(ours)} particles have a counterpart")
    stacks = [ImageStack(both[label], root=folder) for label in ("ours", "theirs")]
    found = []
    for first in range(0, len(both), 256):
        rows = np.arange(first, min(first + 256, len(both)))
        a, b = (stack.read(rows).reshape(len(rows), -1).astype(np.float64) for stack in stacks)
        a, b = (images - images.mean(axis=1, keepdims=True) for images in (a, b))
        found.append((a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1)))
    sizes = read_micrographs(folder / "micrographs.star").rows["rlnMicrographName"]
    shape = ImageStack([sizes[0]], root=folder).shape
    x, y = both["x"].to_numpy(), both["y"].to_numpy()
    # Mirroring begins just inside the edge.
    half = (REAL_BOX if shape[0] < SIZE else BOX) // 2 + 4
    inside = (x >= half) & (y >= half) & (x + half <= shape[1]) & (y + half <= shape[0])
    return np.concatenate(found), inside


def compare(folder: Path, box: int, scaled: int, diameter: float, pixel_size: float) -> list[dict[str, Any]]:
    """Correlate with RELION in all configurations."""
    rows = []
    print(f"{'correlation with RELION':28s}{'edges':>8s}{'n':>7s}{'min':>10s}{'median':>10s}")
    for number, (name, (ours, theirs)) in enumerate(CONFIGURATIONS.items()):
        side = box
        if theirs and theirs[-1] == "--scale":
            ours, theirs, side = [*ours, str(scaled)], [*theirs, str(scaled)], scaled
        if "--norm" in theirs:
            theirs = [*theirs, "--bg_radius", f"{diameter / pixel_size / 2 * side / box:g}"]
        run_relion(folder, f"relion{number}", box, theirs)
        for edges in ("repeat", "mirror"):
            job = run_ours(folder, box, diameter, [*ours, "--edges", edges])
            values, inside = correlations(folder, job, f"relion{number}")
            # RELION repeats the outermost pixels: boxes that stick out are only the same if we do.
            values = values if edges == "repeat" else values[inside]
            found = {"minimum": float(values.min()), "median": float(np.median(values)), "n": len(values)}
            rows.append({"configuration": name, "edges": edges, **found})
            print(f"{name:28s}{edges:>8s}{len(values):7d}{found['minimum']:10.5f}{found['median']:10.5f}")
    return rows


def set_cache(folder: Path, state: str) -> None:
    """Let the system forget the micrographs, or know them all; nothing else is left for it to write."""
    os.sync()
    for path in sorted((folder / "Micrographs").glob("*.mrc")):
        with path.open("rb", buffering=0) as stream:
            if state == "disk":
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                stream.readall()


def copy(paths: list[Path], target: Path | None, size: int) -> None:
    """Read files, and write and flush `size` bytes for each if there is a target."""
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(_ROOM):
                pass
        if target is not None:
            with (target / path.name).open("wb", buffering=0) as stream:
                stream.write(memoryview(_ROOM)[:size])
                os.fsync(stream.fileno())


_ROOM = bytearray(os.urandom(1 << 20) * 65)


def copy_plainly(folder: Path, workers: int, state: str, size: int = 0) -> float:
    """Bytes a second of reading all micrographs, with `size` bytes written for each."""
    paths = sorted((folder / "Micrographs").glob("*.mrc"))
    target = folder / "copied" if size else None
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        # Memory of their own, which a fork has not.
        few = [(paths[number : number + 1], None, 0) for number in range(workers)]
        pool.starmap(copy, few, chunksize=1)
        set_cache(folder, state)
        if target:
            target.mkdir()
        start = time.perf_counter()
        pool.starmap(copy, [(paths[n::workers], target, size) for n in range(workers)], chunksize=1)
        seconds = time.perf_counter() - start
    if target:
        shutil.rmtree(target)
    return 4 * SIZE**2 * len(paths) / seconds


def run_timed(folder: Path, program: str, output: str, workers: int) -> float:
    """Run a program: seconds a micrograph."""
    start = time.perf_counter()
    if program == "Halfmap":
        job = run_ours(folder, BOX, DIAMETER, TIMES[output], workers=workers)
        events = [json.loads(line) for line in (job / "events.jsonl").open()]
        ends = sorted(event["time"] for event in events if event["event"] == "item")
        # What ends after the first of each process was done after those had ended.
        seconds = (ends[-1] - ends[workers - 1]) / (len(ends) - workers)
        shutil.rmtree(job / "Particles")
    else:
        side = SIDES[output]
        words = ["--norm", "--invert_contrast", "--bg_radius", f"{DIAMETER / 2 * side / BOX:g}"]
        run_relion(folder, "timed", BOX, [*words, "--scale", str(side)])
        seconds = (time.perf_counter() - start) / COUNT
        shutil.rmtree(folder / "timed")
    return seconds


def measure(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Times of ours and RELION, each beside plain reading right before it; medians over repeats."""
    rows = []
    print(f"\n{'':52s}{'GB/s':>7s}{'plain':>7s}{'share':>7s}{'copying':>9s}")
    runs = [("Halfmap", output, workers, "disk", repeats) for workers in WORKERS for output in TIMES]
    runs += [("Halfmap", output, WORKERS[0], "memory", 1) for output in TIMES]
    runs += [("RELION", output, 1, "disk", 1) for output in SIDES if "float16" not in output]
    for program, output, workers, state, times in runs:
        size = PARTICLES * SIDES[output] ** 2 * (2 if "float16" in output else 4)
        found = []
        for _ in range(times):
            plain = copy_plainly(folder, workers, state)
            copying = copy_plainly(folder, workers, state, size) if program == "Halfmap" else math.nan
            set_cache(folder, state)
            rate = 4 * SIZE**2 / run_timed(folder, program, output, workers)
            found.append((rate / 1e9, plain / 1e9, rate / plain, copying / plain))
        medians = np.median(found, axis=0).tolist()
        labels = ("GB_per_s", "plain_GB_per_s", "share", "share_of_copying")
        row = {"program": program, "output": output, "processes": workers, "from": state}
        # JSON has no NaN.
        values = {label: value for label, value in zip(labels, medians, strict=True) if value == value}
        rows.append(row | values | {"shares": [each[2] for each in found]})
        name = f"{program}, {output}, from {state}, {workers} process{'es' if workers > 1 else ''}"
        print(f"{name:52s}{medians[0]:7.2f}{medians[1]:7.2f}{medians[2]:7.2f}{medians[3]:9.2f}", flush=True)
    return rows


def verdicts_of(same: list[dict[str, Any]], times: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was asked for, and whether it is so."""
    worst = min(row["minimum"] for row in same)
    found = [{"name": "least correlation of a particle", "value": worst, "bar": SAME, "met": worst > SAME}]
    for row in times:
        if row["program"] == "Halfmap" and row["from"] == "disk":
            name = f"share of plain reading, {row['output']}, {row['processes']} processes"
            met = row["share"] >= SHARE
            found.append({"name": name, "value": row["share"], "bar": SHARE, "met": met})
    return found


def main() -> int:
    """Print tables and write JSON; exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--real", type=Path, help="folder with the folders of real micrographs")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to be measured")
    parser.add_argument("--repeats", type=int, default=3, help="of every time (default 3)")
    parser.add_argument("--part", choices=("same", "times"), help="do this only; the other stays as it was")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/extract.json")
    arguments = parser.parse_args()
    record = json.loads(arguments.out.read_text()) if arguments.part else {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as temporary:
        noise, real = Path(temporary) / "noise", Path(temporary) / "real"
        if arguments.part != "same" or not arguments.real:
            make_noise(noise)
        if arguments.part != "times" and arguments.real:
            make_real(real, arguments.real.resolve())
            record["same"] = compare(real, REAL_BOX, REAL_SCALED, REAL_DIAMETER, REAL_PIXEL)
        elif arguments.part != "times":
            record["same"] = compare(noise, BOX, SCALED, DIAMETER, 1.0)
        if arguments.part != "same":
            run_ours(noise, BOX, DIAMETER, [], workers=WORKERS[0])  # compiles what is compiled once
            record["times"] = measure(noise, arguments.repeats)
    record["machine"] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    record["setting"] = {"micrographs": COUNT, "side": SIZE, "particles of each": PARTICLES, "box": BOX}
    record["verdicts"] = verdicts_of(record["same"], record["times"])
    for entry in record["verdicts"]:
        verdict = "met" if entry["met"] else "missed"
        print(f"{entry['name']:60s}{entry['value']:9.4f}  bar {entry['bar']}: {verdict}")
    record["passed"] = all(entry["met"] for entry in record["verdicts"])
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
