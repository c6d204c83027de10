"""Refinement of simulated particles with truth, beside RELION's.

RNA polymerase II (C1, 2,000 particles of 128 px), β-galactosidase (D2, 1,500 of 160 px) and a cellulose
synthase of 145 kDa (C1, 2,000 of 128 px) at a ratio of signal to noise of 0.05, with the ice's noise, CTFs
and shifts. Both programs get the same table without poses, the same half sets, and the truth low-passed at
40 Å as reference; RELION gets it on the images' grey scale, which it needs, and searches near its poses from
steps of 3.75° on, which spares it most of its time. Maps are compared with the truth within one soft sphere,
and poses with the true ones. RELION reconstructs from our table and post-processes our half maps. It weights
the samples by ten iterations of gridding where we divide by the sum of weights, as it does with
`--skip_gridding`: maps of one table differ by that, and neither is nearer the truth.

Two cases say what is reported where there is nothing: `noise` has images of white noise instead of those of
the polymerase, and the truth low-passed at 30 Å as reference; `passed` has those of the galactosidase,
low-passed at 8 Å.

RELION takes hours; its results are kept in `--scratch`. CPU seconds, user and system of all processes, hold
on a machine that others use as well; wall times do not.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor

from class2d import last_job, rounded, timed
from class2d_data import halfmap
from halfmap.data import ParticleSet, Poses
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft2, irfft3, rfft2, rfft3
from halfmap.ops.fsc import fsc, resolution
from halfmap.ops.masks import soft_sphere
from halfmap.ops.rotations import to_rotation_vector
from halfmap.ops.symmetry import operators

START_A, PASSED_A, SEED = 40.0, 8.0, 5
WHOLE = "run_class001_unfil.mrc"
POSES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst", "rlnClassNumber")
RELION = (
    "mpirun --allow-run-as-root --oversubscribe -n 3 relion_refine_mpi --auto_refine --split_random_halves"
    " --i input.star --ref reference.mrc --o relion/run --ini_high 40 --ctf --ctf_corrected_ref"
    " --particle_diameter {diameter:.0f} --flatten_solvent --zero_mask --oversampling 1 --healpix_order 2"
    " --auto_local_healpix_order 3 --offset_range 5 --offset_step 2 --sym {group} --low_resol_join_halves 40"
    " --norm --scale --pad 2 --dont_combine_weights_via_disc --pool 3 --j 1 --random_seed 1"
)


@dataclass(frozen=True)
class Case:
    """Particles to be refined: how they are made, their point group and the sphere around them in Å."""

    words: str
    group: str
    diameter: float
    start_A: float = START_A
    images: Literal["as simulated", "noise", "passed"] = "as simulated"


_POLYMERASE = "1wcm.pdb.gz --atom-b-factor 60 --box-size 128 --pixel-size 2 --n-particles {n} --seed 13"
_GALACTOSIDASE = "5a1a.cif.gz --box-size 160 --pixel-size 1.7 --n-particles 1500 --seed 12"

CASES = {
    "polymerase": Case(_POLYMERASE.format(n=2000), "C1", 190.0),
    "polymerase20000": Case(_POLYMERASE.format(n=20000), "C1", 190.0),
    "galactosidase": Case(_GALACTOSIDASE, "D2", 205.0),
    "synthase": Case(
        "4hg6.pdb.gz --atom-b-factor 60 --box-size 128 --pixel-size 1.7 --n-particles 2000 --seed 14",
        "C1",
        180.0,
    ),
    "noise": Case(_POLYMERASE.format(n=2000), "C1", 190.0, start_A=30.0, images="noise"),
    "passed": Case(_GALACTOSIDASE, "D2", 205.0, images="passed"),
    "small": Case(
        "1wcm.pdb.gz --atom-b-factor 60 --box-size 64 --pixel-size 4 --n-particles 500 --seed 11", "C1", 190.0
    ),
}


def make(folder: Path, models: Path, case: Case) -> None:
    """Simulate particles, and write them without poses, with half sets, and the references; made once."""
    if (folder / "input.star").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    halfmap(f"simulate particles {models}/{case.words} --snr 0.05 --shift 5", folder)
    job = folder / "Simulate/job001"
    particles = read_particles(job / "particles.star")
    n = len(particles)
    halves = np.random.default_rng(SEED).permutation(np.arange(n) % 2) + 1
    rows = particles.rows.drop(*POSES).with_columns(pl.Series("rlnRandomSubset", halves))
    scale = float(particles.optics["hmSignalScale"][0])
    volume = scale * torch.from_numpy(read_mrc(job / "truth_map.mrc").astype(np.float32))
    pixel_size = read_header(job / "truth_map.mrc").pixel_size
    assert pixel_size is not None
    passed = low_pass(tuple(volume.shape), pixel_size=pixel_size, resolution=case.start_A)
    reference = irfft3(rfft3(volume) * passed, shape=tuple(volume.shape))
    write_mrc(folder / "truth.mrc", volume.numpy(), pixel_size=pixel_size)
    write_mrc(folder / "reference.mrc", reference.numpy(), pixel_size=pixel_size)
    if case.images != "as simulated":
        for path in sorted((job / "Particles").glob("*.mrcs")):
            spoil(path, case.images, pixel_size)
    write_particles(folder / "input.star", ParticleSet(particles.optics, rows))


def spoil(stack: Path, images: str, pixel_size: float) -> None:
    """Write white noise over a stack of particles, or pass them low."""
    old = torch.from_numpy(np.array(read_mrc(stack), np.float32))
    if images == "noise":
        new = torch.randn(old.shape, generator=torch.Generator().manual_seed(int(stack.stem)))
    else:
        shape = tuple(old.shape[1:])
        passed = low_pass(shape, pixel_size=pixel_size, resolution=PASSED_A)
        new = irfft2(rfft2(old) * passed, shape=shape)
    write_mrc(stack, new.numpy(), pixel_size=pixel_size, stack=True)


def against_truth(folder: Path, case: Case, halves: list[Path], table: Path) -> dict[str, float]:
    """Resolution of the mean of the half maps, in Å, and errors of the poses, in ° and Å."""
    maps = [torch.from_numpy(read_mrc(path).astype(np.float32)) for path in (*halves, folder / "truth.mrc")]
    pixel_size = read_header(folder / "truth.mrc").pixel_size
    assert pixel_size is not None
    mask = soft_sphere(maps[0].shape, radius=case.diameter / 2, edge=8.0, pixel_size=pixel_size)
    curve = fsc((maps[0] + maps[1]) * mask, maps[2] * mask)
    truth = read_particles(folder / "Simulate/job001/particles.star")
    found = read_particles(table)
    order = np.argsort(found.rows["rlnImageName"].to_numpy())
    same = np.argsort(truth.rows["rlnImageName"].to_numpy())
    mine, right = found.poses[torch.from_numpy(order)], truth.poses[torch.from_numpy(same)]
    turn, move = differences(mine, right, case.group)
    angle, shift = turn.norm(dim=1), move.norm(dim=1)
    scores = {
        "truth 0.5 Å": resolution(curve, pixel_size=pixel_size, box=len(mask), threshold=0.5),
        "median angle °": float(angle.median()),
        "beyond 10°": float((angle > 10).double().mean()),
        "median shift Å": float(shift.median()),
    }
    if "hmPoseUncertainty" in found.rows.columns:
        names = ("hmAngleViewError", "hmAngleViewError", "hmAnglePsiError", "hmOriginError", "hmOriginError")
        stated = torch.stack([torch.from_numpy(found.rows[name].to_numpy()[order]) for name in names], dim=1)
        within = torch.cat([turn, move], dim=1).abs() < stated
        scores["views within stated"] = float(within[:, :2].double().mean())
        scores["psi within stated"] = float(within[:, 2].double().mean())
        scores["origin within stated"] = float(within[:, 3:].double().mean())
    return scores


def differences(mine: Poses, right: Poses, group: str) -> tuple[Tensor, Tensor]:
    """Turns (n, 3) in degrees and moves (n, 2) in Å of poses against the true ones, in the images' frames.

    Less those of the map as a whole, which nothing fixes but the symmetry.
    """
    own = mine.rotations.double()
    turns = to_rotation_vector(
        right.rotations.double()[:, None] @ operators(group).double() @ own[:, None].transpose(-1, -2)
    )
    turn = turns[torch.arange(len(turns)), turns.norm(dim=-1).argmin(1)]
    move = (mine.shifts_A - right.shifts_A).double()
    of_map = (own.transpose(1, 2) @ turn[..., None]).median(0).values
    near = turn.norm(dim=1) < 10
    views = own[:, :2]
    shift = torch.linalg.lstsq(views[near].flatten(0, 1), move[near].flatten()[:, None]).solution
    return turn - (own @ of_map)[..., 0], move - (views @ shift)[..., 0]


def reconstructed(folder: Path, case: Case, job: Path, words: str = "") -> float:
    """Resolution in Å to which the unfiltered map of all particles is what RELION makes of their table.

    At a correlation of 0.99 within the mask that half maps are compared in.
    """
    out = job / "relion_reconstruct.mrc"
    command = f"relion_reconstruct --i {job / 'particles.star'} --o {out} --ctf --sym {case.group} {words}"
    subprocess.run(shlex.split(command), cwd=folder, check=True, capture_output=True)
    maps = [torch.from_numpy(read_mrc(path).astype(np.float32)) for path in (out, job / WHOLE)]
    pixel_size = read_header(folder / "truth.mrc").pixel_size
    assert pixel_size is not None
    mask = torch.from_numpy(read_mrc(job / "mask.mrc").astype(np.float32))
    curve = fsc(maps[0] * mask, maps[1] * mask)
    return resolution(curve, pixel_size=pixel_size, box=len(mask), threshold=0.99)


def postprocessed(folder: Path, job: Path) -> float:
    """Resolution in Å that RELION reports of the half maps in the mask of the refinement."""
    command = f"relion_postprocess --i {job}/run_half1_class001_unfil.mrc --mask {job}/mask.mrc"
    command += f" --o {job}/relion_postprocess --autob_lowres 15"
    subprocess.run(shlex.split(command), cwd=folder, check=True, capture_output=True)
    found = read_star(job / "relion_postprocess.star")["general"]["rlnFinalResolution"]
    assert isinstance(found, float)
    return found


def ours(folder: Path, case: Case, workers: int) -> dict[str, Any]:
    """Refine, and compare with the truth."""
    words = f"refine input.star --reference reference.mrc --symmetry {case.group} --diameter {case.diameter}"
    words += f" --initial-lowpass {case.start_A} --workers {workers} --project ."
    command = [sys.executable, "-m", "halfmap", *words.split()]
    seconds = timed(command, folder, folder / "refine.log")
    job = last_job(folder, "Refine")
    general = read_star(job / "model.star")["model_general"]
    halves = [job / f"run_half{i}_class001_unfil.mrc" for i in (1, 2)]
    row = {"program": "Halfmap", "iterations": general["rlnCurrentIteration"]}
    row["half maps Å"] = general["rlnCurrentResolution"]
    if case.images != "noise":
        row["relion_reconstruct 0.99 Å"] = reconstructed(folder, case, job)
        row["without gridding 0.99 Å"] = reconstructed(folder, case, job, "--skip_gridding")
        row["relion_postprocess Å"] = postprocessed(folder, job)
    return row | seconds | against_truth(folder, case, halves, job / "particles.star")


def relion(folder: Path, case: Case, mode: str) -> dict[str, Any]:
    """RELION's refinement of the same, or what is kept of it."""
    out = folder / "relion"
    record = out / "seconds.json"
    if mode == "anew" or (mode == "continued" and not record.exists()):
        out.mkdir(exist_ok=True)
        command = shlex.split(RELION.format(diameter=case.diameter, group=case.group))
        record.write_text(json.dumps(timed(command, folder, out / "run.log")) + "\n")
    if not record.exists():
        raise SystemExit(f"{out}: RELION has not finished")
    general = read_star(out / "run_model.star")["model_general"]
    last = max(int(path.name[6:9]) for path in out.glob("run_it???_half1_model.star"))
    row = {"program": "RELION", "iterations": last, "half maps Å": general["rlnCurrentResolution"]}
    halves = [out / f"run_half{i}_class001_unfil.mrc" for i in (1, 2)]
    return row | json.loads(record.read_text()) | against_truth(folder, case, halves, out / "run_data.star")


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
    print("  ".join(f"{name} {cell}" for name, cell in zip(row, cells, strict=True)), flush=True)


def main() -> None:
    """Make the data where they are not yet, measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("../shared/data/models"))
    parser.add_argument(
        "--scratch", type=Path, required=True, help="folder of projects; kept for the next run"
    )
    parser.add_argument("--cases", nargs="*", choices=CASES, default=["galactosidase", "polymerase"])
    parser.add_argument("--programs", nargs="*", choices=("Halfmap", "RELION"), default=["Halfmap", "RELION"])
    parser.add_argument("--relion", choices=("continued", "kept", "anew"), default="continued")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    rows = []
    for name in options.cases:
        case, folder = CASES[name], (options.scratch / name).resolve()
        make(folder, options.models.resolve(), case)
        if "Halfmap" in options.programs:
            rows.append({"data": name} | ours(folder, case, options.workers))
            show(rows[-1])
        if "RELION" in options.programs:
            rows.append({"data": name} | relion(folder, case, options.relion))
            show(rows[-1])
    path = Path(__file__).parent / "results" / "refine.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {(row["data"], row["program"]) for row in rows}
    rows += [row for row in kept if (row["data"], row["program"]) not in done]
    machine = platform.processor() or platform.machine()
    path.write_text(json.dumps(rounded({"machine": machine, "rows": rows}), indent=1) + "\n")


if __name__ == "__main__":
    main()
