"""Two conformations with truth: who is put into which class, beside RELION's 3D classification.

RNA polymerase II, 70 %, and the same with its stalk (chains D and G, a twelfth of its mass) moved outwards
by 12 Å, 30 %; 6,000 particles of 64 px of 4 Å at a ratio of signal to noise of 0.1, with the ice's noise,
CTFs and shifts. Poses are the true ones (`kept`), those that a refinement of all particles finds (`refined`),
or none (`searched`). The reference is the mean of both maps, of which nothing finer than 40 Å is used.

CPU seconds, user and system of all processes, hold on a machine that others use as well; wall times do not.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from class2d import last_job, rounded, timed
from class2d_data import halfmap
from halfmap.data import ParticleSet
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_particles, write_particles

MODEL, STALK, MOVED_A, SHARES = "1wcm.pdb.gz", ("D", "G"), 12.0, (0.7, 0.3)
DIAMETER_A, SEED = 190.0, 21
POSES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst")
RELION = (
    "relion_refine --i {table} --ref reference.mrc --o {out}/run --ini_high 40 --ctf --K 2 --iter 25"
    " --tau2_fudge 4 --particle_diameter {diameter:.0f} --flatten_solvent --zero_mask --oversampling 1"
    " --healpix_order 2 --offset_range 5 --offset_step 2 --sym C1 --norm --scale --pad 2"
    " --dont_combine_weights_via_disc --pool 30 --j {threads} --random_seed 1"
)


def moved_model(source: Path, path: Path) -> None:
    """Write the atoms with those of the stalk moved away from the middle."""
    structure = gemmi.read_structure(str(source))
    stalk = [chain for chain in structure[0] if chain.name in STALK]
    atoms = [atom for chain in stalk for residue in chain for atom in residue]
    middle = structure[0].calculate_center_of_mass()
    away = np.mean([atom.pos.tolist() for atom in atoms], axis=0) - np.array(middle.tolist())
    step = gemmi.Position(*(MOVED_A * away / np.linalg.norm(away)))
    for atom in atoms:
        atom.pos += step
    structure.make_mmcif_document().write_file(str(path))


def make(folder: Path, models: Path, n: int) -> None:
    """Simulate particles; write them with their poses and without, and the reference; made once."""
    if (folder / "searched.star").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    moved_model(models / MODEL, folder / "moved.cif")
    shares = " ".join(map(str, SHARES))
    words = f"simulate particles {models / MODEL} moved.cif --fractions {shares} --atom-b-factor 60"
    halfmap(
        f"{words} --box-size 64 --pixel-size 4 --n-particles {n} --seed {SEED} --snr 0.1 --shift 5", folder
    )
    job = folder / "Simulate/job001"
    particles = read_particles(job / "particles.star")
    scale = float(particles.optics["hmSignalScale"][0])
    maps = [read_mrc(job / name) for name in ("truth_map.mrc", "truth_map_class002.mrc")]
    mean = sum(scale * share * each for share, each in zip(SHARES, maps, strict=True))
    pixel_size = read_header(job / "truth_map.mrc").pixel_size
    assert pixel_size is not None
    write_mrc(folder / "reference.mrc", np.asarray(mean, np.float32), pixel_size=pixel_size)
    rows = particles.rows.drop("rlnClassNumber")
    write_particles(folder / "kept.star", ParticleSet(particles.optics, rows))
    write_particles(folder / "searched.star", ParticleSet(particles.optics, rows.drop(*POSES)))


def refined(folder: Path, workers: int) -> None:
    """Refine all particles as one map, for poses that know nothing of conformations; made once."""
    if (folder / "refined.star").exists():
        return
    words = f"refine searched.star --reference reference.mrc --diameter {DIAMETER_A} --workers {workers}"
    halfmap(words, folder)
    found = read_particles(last_job(folder, "Refine") / "particles.star")
    write_particles(folder / "refined.star", found)


def scores(folder: Path, table: Path) -> dict[str, float]:
    """Share of the particles in the class of their conformation, and the probability stated of it."""
    truth = read_particles(folder / "Simulate/job001/particles.star").rows
    found = read_particles(table).rows.join(
        truth.select("rlnImageName", pl.col("rlnClassNumber").alias("true")), on="rlnImageName"
    )
    right = matched(found["rlnClassNumber"].to_numpy(), found["true"].to_numpy())
    row = {"right": float(right.mean())}
    for number in (1, 2):
        row[f"right of {number}"] = float(right[found["true"].to_numpy() == number].mean())
    if "hmClassProbability" in found.columns:
        row["stated"] = float(found["hmClassProbability"].to_numpy().mean())
    return row


def matched(classes: NDArray[np.int64], true: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which particles (n,) are in the class that belongs to their conformation."""
    counts = np.zeros((classes.max(), true.max()), int)
    np.add.at(counts, (classes - 1, true - 1), 1)
    rows, columns = linear_sum_assignment(-counts)
    of_class = np.full(classes.max(), -1)
    of_class[rows] = columns
    return of_class[classes - 1] == true - 1


def ours(folder: Path, data: str, seed: int, workers: int) -> dict[str, Any]:
    """Classify, and compare with the truth."""
    words = f"class3d {data}.star --reference reference.mrc --classes 2 --diameter {DIAMETER_A} --seed {seed}"
    words += "" if data == "searched" else " --no-alignment"
    command = [sys.executable, "-m", "halfmap", *words.split(), "--workers", str(workers), "--project", "."]
    seconds = timed(command, folder, folder / "class3d.log")
    job = last_job(folder, "Class3D")
    iterations = read_star(job / "model.star")["model_general"]["rlnCurrentIteration"]
    row = {"program": "Halfmap", "data": data, "seed": seed, "iterations": iterations}
    return row | seconds | scores(folder, job / "particles.star")


def relion(folder: Path, data: str, threads: int) -> dict[str, Any]:
    """RELION's classification of the same, or what is kept of it."""
    out = folder / f"relion_{data}"
    record = out / "seconds.json"
    if not record.exists():
        out.mkdir(exist_ok=True)
        words = RELION.format(table=f"{data}.star", out=out.name, diameter=DIAMETER_A, threads=threads)
        words += "" if data == "searched" else " --skip_align"
        record.write_text(json.dumps(timed(shlex.split(words), folder, out / "run.log")) + "\n")
    row = {"program": "RELION", "data": data, "seed": 1, "iterations": 25}
    return row | json.loads(record.read_text()) | scores(folder, out / "run_it025_data.star")


def main() -> None:
    """Run what is asked, print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/class3d"))
    parser.add_argument("--models", type=Path, default=Path("../shared/data/models"))
    parser.add_argument("--particles", type=int, default=6000)
    parser.add_argument("--data", nargs="+", default=["kept"], choices=("kept", "refined", "searched"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--relion", action="store_true", help="also RELION, or what is kept of its run")
    parser.add_argument("--record", type=Path, help="JSON file to write")
    given = parser.parse_args()
    folder = given.scratch / f"{given.particles}"
    make(folder, given.models.resolve(), given.particles)
    rows = []
    for data in given.data:
        if data == "refined":
            refined(folder, given.workers)
        for seed in given.seeds:
            rows.append(ours(folder, data, seed, given.workers))
            print(json.dumps(rounded(rows[-1])), flush=True)
        if given.relion:
            rows.append(relion(folder, data, given.workers))
            print(json.dumps(rounded(rows[-1])), flush=True)
    if given.record:
        machine = platform.processor() or platform.machine()
        record = {"machine": machine, "particles": given.particles, "rows": rows}
        given.record.write_text(json.dumps(rounded(record), indent=1) + "\n")


if __name__ == "__main__":
    main()
