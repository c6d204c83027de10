"""Extraction beside RELION's: the same pixels, and the time against plain reading of the micrographs.

Particles of `relion_preprocess` at the same coordinates are compared one by one, on real micrographs where
`--real` names the folder of `apoferritin_empiar10146`, else on noise. Times are of micrographs of noise, 4096
x 4096 in single precision. Before every run their pages are given up (`posix_fadvise`), so that they come
from the disk, or from caches below it that no program can empty. Plain reading is one process that reads
all files in a row. The rate of ours is that between the first and the last micrograph, without the start of
Python; that of RELION is of its whole run. Stacks are written and flushed to the disk on the way. Seconds
of CPU are those of one micrograph more, in all processes.
"""

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

SIZE, COUNT, FEW, PARTICLES = 4096, 24, 4, 200
BOX, SCALED, DIAMETER = 256, 128, 180.0
TIMES = {
    "scaled to 1/2": ["--scaled-box", str(SCALED)],
    "scaled to 1/4": ["--scaled-box", str(BOX // 4)],
    "not scaled": [],
    "not scaled, float16": ["--float16"],
}
RELION_TIMES = {"scaled to 1/2": SCALED, "scaled to 1/4": BOX // 4, "not scaled": BOX}
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
    table = read_micrographs(folder / "micrographs.star")
    write_micrographs(folder / "few.star", table.with_rows(table.rows[:FEW]))


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
    table: str = "micrographs.star",
) -> Path:
    """Run our step; the folder of its job."""
    command = [sys.executable, "-m", "halfmap", "extract", table]
    command += ["--coordinates", "coordinates.star", "--box", str(box), "--diameter", str(diameter)]
    command += ["--background-diameter", str(diameter), "--min-distance", "0", "--workers", str(workers)]
    ended = subprocess.run([*command, "--project", ".", *words], cwd=folder, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(ended.stderr[-2000:])
    return max((folder / "Extract").iterdir())


def run_relion(
    folder: Path, name: str, box: int, words: list[str], *, table: str = "micrographs.star"
) -> None:
    """Run RELION's program; particles go to the folder `name`."""
    command = ["relion_preprocess", "--i", table, "--coord_dir", "./"]
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
    half = (REAL_BOX if shape[0] < SIZE else BOX) // 2
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


def give_up_pages(folder: Path) -> None:
    """Let the system forget the micrographs."""
    for path in sorted((folder / "Micrographs").glob("*.mrc")):
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def read_plainly(folder: Path) -> float:
    """Bytes a second of reading all micrographs."""
    give_up_pages(folder)
    buffer, total = bytearray(1 << 26), 0
    start = time.perf_counter()
    for path in sorted((folder / "Micrographs").glob("*.mrc")):
        with path.open("rb", buffering=0) as stream:
            while read := stream.readinto(buffer):
                total += read
    return total / (time.perf_counter() - start)


def run_timed(folder: Path, program: str, output: str, few: bool, name: str) -> tuple[float, float, Path]:
    """Run a program on all micrographs or a few: its seconds, those of CPU, and our job's folder."""
    table = "few.star" if few else "micrographs.star"
    give_up_pages(folder)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    job = folder
    if program == "Halfmap":
        job = run_ours(folder, BOX, DIAMETER, TIMES[output], workers=2, table=table)
    else:
        side = RELION_TIMES[output]
        words = ["--norm", "--invert_contrast", "--bg_radius", f"{DIAMETER / 2 * side / BOX:g}"]
        run_relion(folder, name, BOX, [*words, "--scale", str(side)], table=table)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, job


def measure(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Times of ours and RELION, each beside plain reading right before it; medians over repeats."""
    size = 4 * SIZE**2
    rows = []
    print(f"\n{'':40s}{'GB/s':>8s}{'of plain':>10s}{'CPU s each':>12s}")
    pairs = [("Halfmap", output) for output in TIMES] + [("RELION", output) for output in RELION_TIMES]
    for program, output in pairs:
        rates, shares, costs = [], [], []
        for repeat in range(repeats):
            _, started, _ = run_timed(folder, program, output, True, f"few{repeat}{output[-1]}")
            plain = read_plainly(folder)
            seconds, used, job = run_timed(folder, program, output, False, f"all{repeat}{output[-1]}")
            seconds /= COUNT
            if program == "Halfmap":
                events = [json.loads(line) for line in (job / "events.jsonl").open()]
                ends = sorted(event["time"] for event in events if event["event"] == "item")
                # Two at a time: what ends after the first two was done after they had ended.
                seconds = (ends[-1] - ends[1]) / (len(ends) - 2)
            rates.append(size / seconds / 1e9)
            shares.append(size / seconds / plain)
            costs.append((used - started) / (COUNT - FEW))
        found = {"GB_per_s": float(np.median(rates)), "share": float(np.median(shares))}
        found |= {"CPU_s": float(np.median(costs)), "shares": shares}
        rows.append({"program": program, "output": output, **found})
        values = (found["GB_per_s"], found["share"], found["CPU_s"])
        print(f"{program + ', ' + output:40s}{values[0]:8.2f}{values[1]:10.2f}{values[2]:12.3f}", flush=True)
    return rows


def main() -> int:
    """Print tables and write JSON; exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--real", type=Path, help="folder with the folders of real micrographs")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to be measured")
    parser.add_argument("--repeats", type=int, default=3, help="of every time (default 3)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/extract.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as temporary:
        noise, real = Path(temporary) / "noise", Path(temporary) / "real"
        make_noise(noise)
        if arguments.real:
            make_real(real, arguments.real.resolve())
            same = compare(real, REAL_BOX, REAL_SCALED, REAL_DIAMETER, REAL_PIXEL)
        else:
            same = compare(noise, BOX, SCALED, DIAMETER, 1.0)
        run_ours(noise, BOX, DIAMETER, [])  # compiles what is compiled once in an installation
        times = measure(noise, arguments.repeats)
    worst = min(row["minimum"] for row in same)
    share = next(row["share"] for row in times if row["program"] == "Halfmap")
    verdicts = [
        {"name": "least correlation of a particle", "value": worst, "bar": SAME, "met": worst > SAME},
        {
            "name": f"share of plain reading, {next(iter(TIMES))}",
            "value": share,
            "bar": SHARE,
            "met": share >= SHARE,
        },
    ]
    for entry in verdicts:
        verdict = "met" if entry["met"] else "missed"
        print(f"{entry['name']:48s}{entry['value']:9.4f}  bar {entry['bar']}: {verdict}")
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    setting = {"micrographs": COUNT, "side": SIZE, "particles of each": PARTICLES, "box": BOX}
    record = {"machine": machine, "setting": setting, "same": same, "times": times, "verdicts": verdicts}
    passed = all(entry["met"] for entry in verdicts)
    arguments.out.write_text(json.dumps({**record, "passed": passed}, indent=2) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
