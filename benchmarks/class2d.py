"""2D classification of simulated particles with truth, beside RELION's.

10,000 particles of three structures and junk (`class2d_data.py`) in 50 classes, with automatic selection; the
first 1,000 in 10 classes, or 3,000 in 20, with RELION's run on the same particles, classes and iterations
beside them. What is measured says `class2d_metrics.py`. And the time of RELION's pose search in three
dimensions, for 1,000 particles of 96 px.

RELION takes hours. Its results are kept in `--scratch`, with its seconds at the end of each iteration in
`seconds.json`; a run that was stopped is continued from its last iteration. `--relion kept` runs nothing and
compares with the last iteration there is, `--relion anew` begins again. CPU seconds, user and system, hold on
a machine that others use as well; wall times do not. Of the results that are kept, the rows that
are run replace theirs.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from class2d_data import BOX, MASK_A, PIXEL_A, STRUCTURES, halfmap, make, truth_maps
from class2d_metrics import (
    Classes,
    Truth,
    average_scores,
    occupancy,
    read_classes,
    read_truth,
    selection_scores,
    structure_scores,
)
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.tables import read_particles

ITERATIONS_2D, N_3D, ITERATIONS_3D = 15, 1000, 3
RELION_2D = (
    f"relion_refine --i {{table}} --o {{name}}/run --ctf --K {{k}} --iter {ITERATIONS_2D} --tau2_fudge 2"
    f" --particle_diameter {MASK_A} --flatten_solvent --zero_mask --oversampling 1 --psi_step 12"
    " --offset_range 5 --offset_step 2 --norm --scale --dont_combine_weights_via_disc --pool 3 --j 2"
    " --random_seed 1"
)
RELION_3D = (
    "relion_refine --i Simulate/job001/particles.star --ref reference.mrc --o relion3d/run --ctf --K 1"
    f" --iter {ITERATIONS_3D} --ini_high 30 --ctf_corrected_ref --tau2_fudge 4 --particle_diameter {MASK_A}"
    " --flatten_solvent --zero_mask --oversampling 1 --healpix_order 2 --offset_range 5 --offset_step 2"
    " --sym C1 --norm --scale --pad 2 --dont_combine_weights_via_disc --pool 3 --j 2 --random_seed 1"
)
DATA = {
    "10,000": ("particles.star", 50, 25),
    "3,000": ("particles_3000.star", 20, ITERATIONS_2D),
    "1,000": ("particles_1000.star", 10, ITERATIONS_2D),
}
"""Table, number of classes and of iterations."""

RELION_FOLDERS = {"RELION 3,000": "relion2d", "RELION 1,000": "relion2d_1000"}
RUNS = ("10,000", "3,000", "1,000", *RELION_FOLDERS, "poses")

COLUMNS = {
    "ARI": "ARI",
    "ARI with junk": "ARI+junk",
    "rarest recalled": "rare rec",
    "rarest precision": "rare pre",
    "junk in junk classes": "junk out",
    "good in junk classes": "good out",
    "junk rejected": "sel junk",
    "good lost": "sel good",
    "FRC own": "FRC own",
    "A own": "A own",
    "FRC view": "FRC view",
    "A view": "A view",
    "attraction": "attract",
    "empty classes": "empty",
    "effective classes": "eff K",
    "iterations": "iter",
    "CPU s": "CPU s",
    "CPU s an iteration": "CPU s/it",
    "wall s": "wall s",
}
_TIMES = ("iterations", "CPU s", "wall s")
"""Have no ratio where the numbers of iterations differ."""


def timed(command: list[str], folder: Path, log: Path) -> dict[str, float]:
    """Run a command to its end: wall and CPU seconds, those of its own children included."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with log.open("w") as out:
        done = subprocess.run(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, check=False)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall s": round(wall, 1), "CPU s": round(cpu, 1)}


def finished(folder: Path) -> int:
    """Last iteration of which a run of RELION has written all files, 0 if none."""
    whole = [
        int(path.name[6:9])
        for path in folder.glob("run_it???_optimiser.star")
        if all((folder / path.name.replace("optimiser", kind)).exists() for kind in ("data", "model"))
    ]
    return max(whole, default=0)


def relion(words: str, folder: Path, name: str, mode: str) -> dict[str, float]:
    """Run RELION, or go on with a run that was stopped: its last iteration, and the seconds up to it."""
    out = folder / name
    record, asked = out / "seconds.json", re.search(r"--iter (\d+)", words)
    assert asked is not None
    last = finished(out)
    if mode == "anew" or (mode == "continued" and not last):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        last = 0
    parts: list[dict[str, list[float]]] = json.loads(record.read_text()) if record.exists() else []
    if mode != "kept" and last < int(asked[1]):
        if last:
            said = re.search(r"--j \d+", words)
            words = f"relion_refine --continue {name}/run_it{last:03d}_optimiser.star --o {name}/run"
            words += f" --iter {asked[1]} --pool 3 --dont_combine_weights_via_disc {said[0] if said else ''}"
        watch_relion(words.split(), folder, out, parts)
        last = finished(out)
    # A part was continued from the last iteration that it finished; what it did after that is lost.
    cpu, wall = (sum(max(part.values())[i] for part in parts) for i in (0, 1))
    return {"iterations": last, "CPU s": round(cpu, 1), "wall s": round(wall, 1)}


def watch_relion(command: list[str], folder: Path, out: Path, parts: list[dict[str, list[float]]]) -> None:
    """Run RELION to its end and note CPU and wall seconds whenever it has finished an iteration."""
    part: dict[str, list[float]] = {}
    before, start, used = finished(out), time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with (out / "run.log").open("a") as log:
        process = psutil.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(1)
            if (last := finished(out)) > before and str(last) not in part:
                times = process.cpu_times()
                part[str(last)] = [times.user + times.system, time.monotonic() - start]
                (out / "seconds.json").write_text(json.dumps([*parts, part]) + "\n")
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{(out / 'run.log').read_text()[-2000:]}")
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = end.ru_utime + end.ru_stime - used.ru_utime - used.ru_stime
    parts.append(part | {str(finished(out)): [cpu, time.monotonic() - start]})
    (out / "seconds.json").write_text(json.dumps(parts) + "\n")


def last_job(folder: Path, kind: str) -> Path:
    """Folder of a project's newest job of a kind."""
    return max((folder / kind).glob("job*"))


def ours(data: str, folder: Path) -> tuple[Path, dict[str, float]]:
    """Classify, and select automatically: folder of the classes, and the seconds of both steps."""
    table, k, iterations = DATA[data]
    start = [sys.executable, "-m", "halfmap"]
    words = (
        f"class2d {table} --classes {k} --iterations {iterations} --diameter {MASK_A} --seed 1 --project ."
    )
    seconds = timed([*start, *words.split()], folder, folder / "class2d.log")
    job = last_job(folder, "Class2D")
    words = f"select {(job / 'model.star').relative_to(folder)} --project ."
    seconds["iterations"] = iterations
    seconds["select s"] = timed([*start, *words.split()], folder, folder / "select.log")["wall s"]
    return job, seconds


def measured(classes: Classes, truth: Truth) -> tuple[dict[str, float], list[dict]]:
    """All that is measured of a classification, and a row for each of its classes."""
    scores, rows = average_scores(classes, truth, MASK_A)
    return structure_scores(classes, truth) | scores | occupancy(classes), rows


def on_ours(data: str, folder: Path, truth: Truth) -> dict[str, Any]:
    """Row of one of our runs, with that of the selection."""
    job, seconds = ours(data, folder)
    classes = read_classes(job / "particles.star", job / "class_averages.mrcs", truth)
    row, rows = measured(classes, truth)
    kept = read_particles(last_job(folder, "Select") / "particles.star").rows["rlnImageName"]
    row |= selection_scores(np.isin(truth.images[: len(classes.number)], kept.to_numpy().astype(str)), truth)
    return {"data": data, "program": "Halfmap"} | row | seconds | {"classes": rows}


def on_relion(run: str, folder: Path, truth: Truth, mode: str) -> dict[str, Any]:
    """Row of RELION's run, as far as it got."""
    data, name = run.removeprefix("RELION "), RELION_FOLDERS[run]
    table, k, _ = DATA[data]
    seconds = relion(RELION_2D.format(table=table, k=k, name=name), folder, name, mode)
    if not seconds["iterations"]:
        raise SystemExit(f"{folder / name}: RELION has finished no iteration yet")
    last = folder / name / f"run_it{seconds['iterations']:03d}"
    classes = read_classes(Path(f"{last}_data.star"), Path(f"{last}_classes.mrcs"), truth)
    row, rows = measured(classes, truth)
    return {"data": data, "program": "RELION"} | row | seconds | {"classes": rows}


def on_poses(folder: Path, models: Path, mode: str) -> dict[str, Any]:
    """Time of RELION's search of poses in three dimensions, per particle and iteration."""
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / "Simulate/job001"
    if not (job / "RELION_JOB_EXIT_SUCCESS").exists():
        model = models / STRUCTURES["galactosidase"]
        words = f"simulate particles {model} --box-size 96 --pixel-size 2.6 --n-particles {N_3D} --snr 0.05"
        halfmap(f"{words} --shift 5 --seed 7", folder)
    # The truth, on the scale of the images; RELION filters it to 30 Å.
    scale = float(read_particles(job / "particles.star").optics["hmSignalScale"][0])
    pixel_size = read_header(job / "truth_map.mrc").pixel_size
    assert pixel_size is not None
    write_mrc(folder / "reference.mrc", scale * read_mrc(job / "truth_map.mrc"), pixel_size=pixel_size)
    seconds = relion(RELION_3D, folder, "relion3d", mode)
    visits = N_3D * max(1, seconds["iterations"])
    each = {f"ms {name}": round(1000 * seconds[f"{name} s"] / visits, 1) for name in ("CPU", "wall")}
    return {"program": "RELION", "particles": N_3D} | seconds | each


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our figures over RELION's on the same data."""
    result = []
    for data in DATA:
        of = {row["program"]: row for row in rows if row["data"] == data}
        if len(of) == 2:
            own, other = of["Halfmap"], of["RELION"]
            left_out = _TIMES if own["iterations"] != other["iterations"] else ()
            keys = [key for key in COLUMNS if key in own and other.get(key) and key not in left_out]
            result.append({"data": data, "program": "ratio"} | {key: own[key] / other[key] for key in keys})
    return result


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table, and where both programs have a row their ratios."""
    print(f"{'data':8s} {'program':8s} " + " ".join(f"{name:>8s}" for name in COLUMNS.values()))
    for row in [*rows, *ratios(rows)]:
        cells = " ".join(
            f"{row[key]:8.3f}" if key in row and row[key] < 100 else f"{row.get(key, ''):>8}"
            for key in COLUMNS
        )
        print(f"{row['data']:8s} {row['program']:8s} {cells}", flush=True)


def rounded(value: Any) -> Any:
    """The same with four decimals, for the record."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    """Make the data where they are not yet, measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("../shared/data/models"))
    parser.add_argument(
        "--scratch", type=Path, required=True, help="folder of projects; kept for the next run"
    )
    parser.add_argument(
        "--runs", nargs="*", choices=RUNS, default=["10,000", "1,000", "RELION 1,000", "poses"]
    )
    parser.add_argument("--relion", choices=("continued", "kept", "anew"), default="continued")
    options = parser.parse_args()
    scratch, models = options.scratch.resolve(), options.models.resolve()
    folder = make(scratch / "main", models)
    truth = read_truth(folder, tuple(STRUCTURES), truth_maps(folder), PIXEL_A)
    rows = [on_ours(data, folder, truth) for data in DATA if data in options.runs]
    rows += [on_relion(run, folder, truth, options.relion) for run in RELION_FOLDERS if run in options.runs]
    for row in rows:
        row["CPU s an iteration"] = row["CPU s"] / row["iterations"]
    report(rows)
    path = Path(__file__).parent / "results" / "class2d.json"
    text: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    run = {(row["data"], row["program"]) for row in rows}
    rows += [row for row in text["rows"] if (row["data"], row["program"]) not in run]
    text |= {"machine": platform.processor() or platform.machine(), "box": BOX}
    text |= {"particles": json.loads((folder / "about.json").read_text()), "rows": rows}
    if "poses" in options.runs:
        text["poses"] = on_poses(scratch / "poses", models, options.relion)
        print("poses:", text["poses"])
    path.write_text(json.dumps(rounded(text), indent=1) + "\n")


if __name__ == "__main__":
    main()
