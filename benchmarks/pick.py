"""Picking against manual picks of real micrographs and the truth of simulated ones, beside other pickers.

Real ones are those of `--real`, the folder of EMPIAR-10146's apoferritin; picks within 25 px of a manual one
are true. The methods were developed on every fourth of them, so that these and the others are reported apart.
Simulated ones hold contaminants, carbon and broken particles; a pick is true within a third of the particle's
diameter of a whole particle. LoG of RELION is given the diameter to a tenth and its default threshold. F1 of
our methods is that at the threshold they choose; Topaz's picks have scores alone, and theirs is the best of
all thresholds. Its general model runs where `--topaz` names the program, on micrographs scaled so that the
particle's radius is 10 px; of the real ones its recorded picks are shown if not. Blind sets are of structures
that nothing was developed or trained on. The network is fine-tuned on the manual picks of two real
micrographs and measured on the others, beside the general one on the same. `time` measures a micrograph of
4096 × 4096 px. Of the results that are kept, the sets that are run replace theirs.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from halfmap.data import MicrographSet
from halfmap.io.coordinates import read_coordinates, write_coordinates
from halfmap.io.mrc import write_mrc
from halfmap.io.star import read_star, write_star
from halfmap.io.tables import read_micrographs, write_micrographs

X, Y, SCORE, PROBABILITY = "rlnCoordinateX", "rlnCoordinateY", "rlnAutopickFigureOfMerit", "hmPickProbability"
TOLERANCE_px, REAL_PIXEL_A, REAL_DIAMETER_A = 25.0, 1.5, 124.0
TOPAZ_RADIUS_px = 10
TUNED_ON = ("apo_030502", "apo_053100")
TARGETS = {
    "65 kDa": ("4hhb.cif.gz", 65.0, "C2", "--pixel-size 1.06 --particles 200 --ice-thickness 200 --seed 21"),
    "435 kDa": ("5a1a.cif.gz", 140.0, "D2", "--pixel-size 1.06 --particles 100 --seed 22"),
    "2.1 MDa": ("4v5d.cif.gz", 250.0, "C1", "--pixel-size 1.4 --particles 50 --seed 23"),
    "97 kDa, blind": (
        "1qba.pdb.gz",
        70.0,
        "C1",
        "--pixel-size 1.06 --particles 150 --ice-thickness 250 --seed 31",
    ),
    "264 kDa, blind": ("1n2c.pdb.gz", 110.0, "C1", "--pixel-size 1.06 --particles 90 --seed 32"),
}
"""Model, mean diameter in Å, symmetry and options of each simulated set."""

DECOYS = "--contaminants 1 --carbon 0.25 --width 2048 --height 2048 --n-micrographs 5"
Truth = dict[str, NDArray[np.float64]]
Picks = dict[str, pl.DataFrame]


def halfmap(words: str, folder: Path) -> None:
    """Run a step in a project's folder to its end."""
    command = [sys.executable, "-m", "halfmap", *words.split(), "--project", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"halfmap {words} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def last_job(folder: Path) -> Path:
    """Folder of the newest picking job."""
    return max((folder / "Pick").iterdir())


def hits(picks: pl.DataFrame, truth: NDArray, tolerance: float) -> NDArray[np.bool_]:
    """Which picks are true: each particle counts once, for the nearest pick of the best that are near."""
    found = np.zeros(len(picks), bool)
    if len(picks) == 0 or len(truth) == 0:
        return found
    place = picks.select(X, Y).to_numpy()
    order = (
        np.argsort(-picks[SCORE].to_numpy(), kind="stable")
        if SCORE in picks.columns
        else np.arange(len(picks))
    )
    gaps = np.hypot(*(place[:, None] - truth[None]).transpose(2, 0, 1))
    free = np.ones(len(truth), bool)
    for i in order:
        near = np.where(free, gaps[i], np.inf)
        if near.min() <= tolerance:
            found[i] = True
            free[near.argmin()] = False
    return found


def measure(picks: Picks, truth: Truth, tolerance: float, *, best: bool = False) -> dict[str, float]:
    """Precision, recall, F1, average precision and false discoveries, estimated and true."""
    true = [hits(picks[name], truth[name], tolerance) for name in truth if name in picks]
    table = pl.concat([picks[name] for name in truth if name in picks], how="diagonal_relaxed")
    hit = np.concatenate(true) if true else np.zeros(0, bool)
    total = sum(map(len, truth.values()))
    score = table[SCORE].to_numpy() if SCORE in table.columns else np.zeros(len(table))
    order = np.argsort(-score, kind="stable")
    precision = np.cumsum(hit[order]) / np.arange(1, len(hit) + 1)
    recall = np.cumsum(hit[order]) / total
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    at = int(f1.argmax()) if best and len(f1) else len(f1) - 1
    row = {"precision": 0.0, "recall": 0.0, "F1": 0.0, "AP": 0.0, "picks": float(len(hit))}
    if len(hit):
        row |= {"precision": precision[at], "recall": recall[at], "F1": f1[at]}
        row |= {"AP": float(np.sum(np.diff(recall, prepend=0.0) * precision)), "FDR": 1 - precision[at]}
    if PROBABILITY in table.columns and len(table):
        row["FDR estimated"] = float(1 - table[PROBABILITY].to_numpy().mean())
    return {key: round(float(value), 4) for key, value in row.items()}


def picks_of(job: Path, project: Path) -> Picks:
    """Picks of a job by the stems of the micrographs."""
    table = read_star(job / "autopick.star")["coordinate_files"]
    assert isinstance(table, pl.DataFrame)
    return {
        Path(row["rlnMicrographName"]).stem: read_coordinates(project / row["rlnMicrographCoordinates"])
        for row in table.to_dicts()
    }


def stated_diameter(picks: Picks) -> dict[str, float]:
    """Diameter in Å that a job's picks state, if there are any."""
    first = next((table for table in picks.values() if len(table)), None)
    return {} if first is None else {"diameter": first["hmParticleDiameter"][0]}


def real_project(source: Path, folder: Path) -> Truth:
    """Table of the real micrographs with their CTFs; manual picks."""
    (folder / "mics").mkdir(parents=True, exist_ok=True)
    with (source / "ctffind4.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        link = folder / "mics" / row["micrograph"]
        if not link.exists():
            link.symlink_to(source / row["micrograph"])
    optics = {"rlnOpticsGroup": [1], "rlnOpticsGroupName": ["one"], "rlnVoltage": [300.0]}
    optics |= {"rlnSphericalAberration": [2.7], "rlnAmplitudeContrast": [0.07]}
    optics |= {"rlnMicrographPixelSize": [REAL_PIXEL_A]}
    columns: dict[str, list[Any]] = {"rlnMicrographName": [f"mics/{row['micrograph']}" for row in rows]}
    columns |= {"rlnOpticsGroup": [1] * len(rows)}
    for label in ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"):
        columns[label] = [float(row[label]) for row in rows]
    write_micrographs(folder / "micrographs.star", MicrographSet(pl.DataFrame(optics), pl.DataFrame(columns)))
    stems = [Path(row["micrograph"]).stem for row in rows]
    return {stem: np.loadtxt(source / f"{stem}_manual.csv", delimiter=",") for stem in stems}


def peer(path: Path) -> Picks:
    """Recorded picks of another program."""
    table = pl.read_csv(path).rename({"x_px": X, "y_px": Y, "score": SCORE})
    return {str(name): part for (name,), part in table.group_by("micrograph")}


def simulate(name: str, folder: Path, models: Path) -> tuple[Truth, float]:
    """Simulated micrographs with their true CTFs; whole particles and the pixel size."""
    model, _, _, options = TARGETS[name]
    if not (folder / "Simulate").exists():
        folder.mkdir(parents=True, exist_ok=True)
        halfmap(f"simulate micrographs {models / model} {options} {DECOYS}", folder)
    job = folder / "Simulate/job001"
    table = read_micrographs(job / "truth_micrographs.star")
    write_micrographs(folder / "micrographs.star", table)
    particles = read_star(job / "truth_particles.star")["particles"]
    assert isinstance(particles, pl.DataFrame)
    whole = particles.filter(pl.col("hmParticleKind") != "broken")
    truth = {
        Path(micrograph).stem: whole.filter(pl.col("rlnMicrographName") == micrograph).select(X, Y).to_numpy()
        for micrograph in table.rows["rlnMicrographName"]
    }
    return truth, float(table.pixel_size)


def relion_log(folder: Path, diameter: float, pixel_size: float) -> Picks:
    """Picks of RELION's LoG, given the diameter to a tenth."""
    out = folder / "LoG"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    words = "relion_autopick --i micrographs.star --odir LoG/ --pickname log --LoG"
    words += f" --LoG_diam_min {0.9 * diameter} --LoG_diam_max {1.1 * diameter}"
    words += f" --angpix {pixel_size} --shrink 0 --lowpass 20"
    subprocess.run(words.split(), cwd=folder, capture_output=True, check=True)
    return {path.name.removesuffix("_log.star"): read_coordinates(path) for path in out.rglob("*_log.star")}


def topaz(program: Path, folder: Path, diameter: float, pixel_size: float) -> Picks:
    """Picks of Topaz's general model down to its least score; what an earlier run found is kept."""
    scale = max(1, round(diameter / (2 * TOPAZ_RADIUS_px * pixel_size)))
    work = folder / f"Topaz{scale}"
    picks = work / "picks.txt"
    if not picks.exists():
        work.mkdir(exist_ok=True)
        names = read_micrographs(folder / "micrographs.star").rows["rlnMicrographName"]
        paths = [str(folder / name) for name in names]
        subprocess.run(
            [program, "preprocess", "-d", "-1", "-s", str(scale), "-o", work, *paths],
            check=True,
            capture_output=True,
        )
        words = f"extract -m resnet16_u64 -d -1 -r {TOPAZ_RADIUS_px} -x {scale} -o {work / 'partial.txt'}"
        scaled = [str(path) for path in sorted(work.glob("*.mrc"))]
        subprocess.run([program, *words.split(), *scaled], check=True, capture_output=True)
        (work / "partial.txt").rename(picks)
    table = pl.read_csv(picks, separator="\t", schema_overrides={"image_name": pl.String})
    table = table.rename({"x_coord": X, "y_coord": Y, "score": SCORE})
    return {str(name): part for (name,), part in table.group_by("image_name")}


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    columns = ("precision", "recall", "F1", "AP", "FDR", "FDR estimated", "diameter")
    print(f"{'data':14s} {'method':22s} " + " ".join(f"{name:>13s}" for name in columns))
    for row in rows:
        values = " ".join(f"{row[key]:13.3f}" if key in row else f"{'':13s}" for key in columns)
        print(f"{row['data']:14s} {row['method']:22s} {values}", flush=True)


def parts(truth: Truth) -> Iterable[tuple[str, Truth]]:
    """Real micrographs that methods were developed on, and the others."""
    names = list(truth)
    yield "real, 4 seen", {name: truth[name] for name in names[::4]}
    yield "real, 10", {name: truth[name] for i, name in enumerate(names) if i % 4}


def on_real(source: Path, folder: Path, rows: list[dict[str, Any]], program: Path | None) -> None:
    """Measure all methods on the real micrographs."""
    truth = real_project(source, folder)
    tolerance = TOLERANCE_px
    reference = folder / "reference.mrc"
    if not reference.exists():
        halfmap(
            "simulate micrographs --pixel-size 1.5 --width 512 --height 512 --particles 1 --n-micrographs 1",
            folder,
        )
        shutil.copy(folder / "Simulate/job001/truth_map.mrc", reference)
    jobs: dict[str, Path] = {}
    for method, words in {
        "blob": "pick blob micrographs.star --no-pictures",
        "blob, diameter": f"pick blob micrographs.star --no-pictures --diameter {REAL_DIAMETER_A}",
        "template, model": "pick template micrographs.star --no-pictures"
        " --references reference.mrc --symmetry O",
        "learned": f"pick learned micrographs.star --no-pictures --diameter {REAL_DIAMETER_A}",
        "consensus of 3": "",
    }.items():
        if method.startswith("consensus"):
            used = [f"{jobs[name].relative_to(folder)}/autopick.star" for name in list(jobs)[-3:]]
            words = (
                f"pick consensus --coordinates {' '.join(used)} --micrographs micrographs.star --no-pictures"
            )
            words += " --precision 0.98"
        halfmap(words, folder)
        jobs[method] = last_job(folder)
        picks = picks_of(jobs[method], folder)
        for data, part in parts(truth):
            found = measure(picks, part, tolerance) | stated_diameter(picks)
            rows.append({"data": data, "method": method} | found)
    on_fine_tuned(truth, folder, picks_of(jobs["learned"], folder), rows)
    recorded = peer(source / "peer_topaz_resnet16_u64.csv")
    others = {"Topaz": topaz(program, folder, REAL_DIAMETER_A, REAL_PIXEL_A) if program else recorded}
    others["RELION LoG"] = peer(source / "peer_relion_log.csv")
    for name, picks in others.items():
        for data, part in parts(truth):
            found = measure(picks, part, tolerance, best=name == "Topaz")
            rows.append({"data": data, "method": name} | found)


def on_fine_tuned(truth: Truth, folder: Path, general: Picks, rows: list[dict[str, Any]]) -> None:
    """Fine-tune the network on manual picks of two real micrographs; measure both on the others."""
    listed: dict[str, list[str]] = {"rlnMicrographName": [], "rlnMicrographCoordinates": []}
    for stem in TUNED_ON:
        write_coordinates(folder / f"{stem}_manual.star", pl.DataFrame(truth[stem], schema=[X, Y]))
        listed["rlnMicrographName"].append(f"mics/{stem}.mrc")
        listed["rlnMicrographCoordinates"].append(f"{stem}_manual.star")
    write_star(folder / "manual.star", {"coordinate_files": pl.DataFrame(listed)})
    words = f"micrographs.star --diameter {REAL_DIAMETER_A}"
    halfmap(f"pick train {words} --coordinates manual.star", folder)
    model = last_job(folder).relative_to(folder) / "model.npz"
    halfmap(f"pick learned {words} --no-pictures --model {model}", folder)
    others = {stem: places for stem, places in truth.items() if stem not in TUNED_ON}
    for method, picks in {
        "learned": general,
        "learned, tuned on 2": picks_of(last_job(folder), folder),
    }.items():
        rows.append({"data": "real, other 12", "method": method} | measure(picks, others, TOLERANCE_px))


def on_simulated(
    name: str, folder: Path, models: Path, rows: list[dict[str, Any]], program: Path | None
) -> None:
    """Measure all methods on one set of simulated micrographs."""
    truth, pixel_size = simulate(name, folder, models)
    _, diameter, symmetry, _ = TARGETS[name]
    tolerance = diameter / 3 / pixel_size
    jobs: dict[str, Path] = {}
    for method, words in {
        "blob": "pick blob micrographs.star --no-pictures",
        "blob, diameter": f"pick blob micrographs.star --no-pictures --diameter {diameter}",
        "template, true map": "pick template micrographs.star --no-pictures"
        f" --references Simulate/job001/truth_map.mrc --symmetry {symmetry}",
        "learned": f"pick learned micrographs.star --no-pictures --diameter {diameter}",
        "consensus of 3": "",
    }.items():
        if method.startswith("consensus"):
            used = [f"{jobs[key].relative_to(folder)}/autopick.star" for key in list(jobs)[-3:]]
            words = (
                f"pick consensus --coordinates {' '.join(used)} --micrographs micrographs.star --no-pictures"
            )
        halfmap(words, folder)
        jobs[method] = last_job(folder)
        picks = picks_of(jobs[method], folder)
        found = measure(picks, truth, tolerance) | stated_diameter(picks)
        rows.append({"data": name, "method": method} | found)
    if shutil.which("relion_autopick"):
        found = measure(relion_log(folder, diameter, pixel_size), truth, tolerance)
        rows.append({"data": name, "method": "RELION LoG"} | found)
    if program:
        found = measure(topaz(program, folder, diameter, pixel_size), truth, tolerance, best=True)
        rows.append({"data": name, "method": "Topaz"} | found)


def time_4k(folder: Path) -> dict[str, dict[str, float]]:
    """CPU and wall seconds of a micrograph of 4096 × 4096 px, by method, with reading, on two threads."""
    from halfmap.io.micrographs import MicrographItem, load
    from halfmap.steps.pick.blob import Blob
    from halfmap.steps.pick.learned import Learned
    from halfmap.steps.pick.micrograph import Method
    from halfmap.steps.pick.profiles import Shell
    from halfmap.steps.pick.references import turned
    from halfmap.steps.pick.template import Template

    torch.set_num_threads(2)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    path = folder / "4k.mrc"
    write_mrc(path, rng.normal(100, 10, (4096, 4096)).astype(np.float32), pixel_size=1.0)
    optics = {"defocus_u": 15_000.0, "defocus_v": 14_800.0, "defocus_angle": 20.0}
    optics |= {"voltage_kV": 300.0, "cs_mm": 2.7, "amplitude_contrast": 0.1}
    item = MicrographItem("4k.mrc", "4k", path, 1.0, None, optics)
    k = np.arange(0, 0.05, 0.0005)
    references = rng.normal(size=(20, 24, 24)).astype(np.float32)
    angles = np.arange(18, dtype=np.float64) * 20.0
    methods: dict[str, Method] = {
        "blob": Blob(120.0, k, Shell(120.0).transform(k)),
        "template of 20": Template(120.0, 8.0, turned(references, angles), angles),
        "learned": Learned(120.0),
    }
    result = {}
    for name, method in methods.items():
        method.search(method.specimen(load(item, method.pixel_size)), rng)
        cpu, wall = time.process_time(), time.monotonic()
        method.search(method.specimen(load(item, method.pixel_size)), rng)
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        result[name] = {"cpu": round(cpu, 2), "wall": round(wall, 2)}
    return result


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--real", type=Path, default=Path("../shared/data/micrographs/apoferritin_empiar10146")
    )
    parser.add_argument("--models", type=Path, default=Path("../shared/data/models"))
    parser.add_argument(
        "--scratch", type=Path, required=True, help="folder of projects; kept for the next run"
    )
    parser.add_argument("--sets", nargs="*", default=["real", *TARGETS, "time"])
    parser.add_argument("--topaz", type=Path, help="program of Topaz 0.3.20, to run it as well")
    options = parser.parse_args()
    program = options.topaz and options.topaz.absolute()
    path = Path(__file__).parent / "results" / "pick.json"
    kept = json.loads(path.read_text()) if path.exists() else {"rows": []}
    kept["machine"] = platform.processor() or platform.machine()
    rows: list[dict[str, Any]] = []
    for name in options.sets:
        folder = options.scratch.resolve() / name.replace(" ", "_")
        if name == "real":
            on_real(options.real.resolve(), folder, rows, program)
        elif name == "time":
            kept["seconds_4k"] = time_4k(folder)
            print("Seconds of a micrograph of 4096 × 4096 px, two threads:", kept["seconds_4k"])
        else:
            on_simulated(name, folder, options.models.resolve(), rows, program)
    report(rows)
    run = {row["data"] for row in rows}
    kept["rows"] = [row for row in kept["rows"] if row["data"] not in run] + rows
    path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
