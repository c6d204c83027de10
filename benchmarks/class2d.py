"""2D classification of simulated particles with truth, beside RELION's.

10,000 particles of three structures and junk (`class2d_data.py`) in 50 classes, with automatic selection; the
first 3,000 in 20 classes and RELION's 15 iterations beside them. What is measured says `class2d_metrics.py`.
And the time of RELION's pose search in three dimensions, for 1,000 particles of 96 px. RELION runs once, its
results are kept in `--scratch`; `--relion` runs it again. CPU seconds, user and system, hold on a machine
that others use as well; wall times do not.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

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

RELION_2D = (
    f"relion_refine --i particles_3000.star --o relion2d/run --ctf --K 20 --iter 15 --tau2_fudge 2"
    f" --particle_diameter {MASK_A} --flatten_solvent --zero_mask --oversampling 1 --psi_step 12"
    " --offset_range 5 --offset_step 2 --norm --scale --dont_combine_weights_via_disc --pool 3 --j 2"
    " --random_seed 1"
)
RELION_3D = (
    "relion_refine --i Simulate/job001/particles.star --ref reference.mrc --o relion3d/run --ctf --K 1"
    f" --iter 3 --ini_high 30 --ctf_corrected_ref --tau2_fudge 4 --particle_diameter {MASK_A}"
    " --flatten_solvent --zero_mask --oversampling 1 --healpix_order 2 --offset_range 5 --offset_step 2"
    " --sym C1 --norm --scale --pad 2 --dont_combine_weights_via_disc --pool 3 --j 2 --random_seed 1"
)
N_3D, ITERATIONS_3D = 1000, 3
OURS = {"10,000": ("particles.star", 50), "3,000": ("particles_3000.star", 20)}
"""Table and number of classes of our runs."""

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
    "CPU s": "CPU s",
    "wall s": "wall s",
}


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


def relion(words: str, folder: Path, name: str, *, again: bool) -> dict[str, float]:
    """Seconds of a run of RELION; that of an earlier time unless asked to run again."""
    record = folder / name / "seconds.json"
    if again or not record.exists():
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
        record.write_text(json.dumps(timed(words.split(), folder, folder / name / "run.log")) + "\n")
    return json.loads(record.read_text())


def last_job(folder: Path, kind: str) -> Path:
    """Folder of a project's newest job of a kind."""
    return max((folder / kind).glob("job*"))


def ours(data: str, folder: Path) -> tuple[Path, dict[str, float]]:
    """Classify, and select automatically: folder of the classes, and the seconds of both steps."""
    table, k = OURS[data]
    start = [sys.executable, "-m", "halfmap"]
    words = f"class2d {table} --classes {k} --diameter {MASK_A} --seed 1 --project ."
    seconds = timed([*start, *words.split()], folder, folder / "class2d.log")
    job = last_job(folder, "Class2D")
    words = f"select {(job / 'model.star').relative_to(folder)} --project ."
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


def on_relion(folder: Path, truth: Truth, *, again: bool) -> dict[str, Any]:
    """Row of RELION's run on 3,000 particles."""
    seconds = relion(RELION_2D, folder, "relion2d", again=again)
    out = folder / "relion2d"
    classes = read_classes(out / "run_it015_data.star", out / "run_it015_classes.mrcs", truth)
    row, rows = measured(classes, truth)
    return {"data": "3,000", "program": "RELION"} | row | seconds | {"classes": rows}


def on_poses(folder: Path, models: Path, *, again: bool) -> dict[str, Any]:
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
    seconds = relion(RELION_3D, folder, "relion3d", again=again)
    each = {
        f"ms {name}": round(1000 * seconds[f"{name} s"] / N_3D / ITERATIONS_3D, 1) for name in ("CPU", "wall")
    }
    return {"program": "RELION", "particles": N_3D, "iterations": ITERATIONS_3D} | seconds | each


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table, and where both programs have a row their ratios."""
    print(f"{'data':8s} {'program':8s} " + " ".join(f"{name:>8s}" for name in COLUMNS.values()))
    by_program = {row["program"]: row for row in rows if row["data"] == "3,000"}
    both = by_program.get("Halfmap", {}), by_program.get("RELION", {})
    shared = [key for key in COLUMNS if key in both[0] and both[1].get(key)]
    ratio = {"data": "3,000", "program": "ratio"} | {key: both[0][key] / both[1][key] for key in shared}
    for row in [*rows, ratio] if shared else rows:
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
    parser.add_argument("--runs", nargs="*", default=["10,000", "3,000", "RELION", "poses"])
    parser.add_argument("--relion", action="store_true", help="run RELION even where its results are kept")
    options = parser.parse_args()
    scratch, models = options.scratch.resolve(), options.models.resolve()
    folder = make(scratch / "main", models)
    truth = read_truth(folder, tuple(STRUCTURES), truth_maps(folder), PIXEL_A)
    rows = [on_ours(data, folder, truth) for data in OURS if data in options.runs]
    if "RELION" in options.runs:
        rows.append(on_relion(folder, truth, again=options.relion))
    report(rows)
    text: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "box": BOX}
    text |= {"particles": json.loads((folder / "about.json").read_text()), "rows": rows}
    if "poses" in options.runs:
        text["poses"] = on_poses(scratch / "poses", models, again=options.relion)
        print("poses:", text["poses"])
    path = Path(__file__).parent / "results" / "class2d.json"
    path.write_text(json.dumps(rounded(text), indent=1) + "\n")


if __name__ == "__main__":
    main()
