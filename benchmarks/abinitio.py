"""Maps of simulated particles without a reference, from several seeds, against truth and beside RELION's.

The particles are those of `refine.py`, RNA polymerase II (C1) and β-galactosidase (D2), and a cellulose
synthase of 145 kDa (C1). Each seed is a job of its own, with its restarts and their consensus. Maps are
turned and moved onto the truth, in both hands, and compared with it within one soft sphere. CPU seconds are
user and system of all processes.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from class2d import last_job, rounded, timed
from halfmap.io.mrc import read_header, read_mrc
from halfmap.io.star import read_star
from halfmap.ops.fourier import resample
from halfmap.ops.fsc import fsc, resolution
from halfmap.ops.masks import soft_sphere
from halfmap.search.volume_alignment import align_volume
from halfmap.steps.abinitio.step import AbInitioStep
from refine import CASES as REFINED
from refine import Case, make, show

FINEST, PIXEL = 15.0, 5.0
"""Å: detail that is searched, and about the voxels in which maps are aligned."""

CASES = REFINED | {
    "synthase": Case(
        "4hg6.pdb.gz --atom-b-factor 60 --box-size 128 --pixel-size 1.7 --n-particles 2000 --seed 14",
        "C1",
        180.0,
    )
}

RELION = (
    "relion_refine --i input.star --o initialmodel/run --sgd --denovo_3dref --ctf --K 1 --sym {group}"
    " --particle_diameter {diameter:.0f} --flatten_solvent --zero_mask --oversampling 1 --healpix_order 1"
    " --offset_range 6 --offset_step 2 --sgd_ini_iter 50 --sgd_inbetween_iter 200 --sgd_fin_iter 50"
    " --sgd_ini_resol 35 --sgd_fin_resol 15 --sgd_ini_subset 100 --sgd_fin_subset 500 --sgd_write_iter 50"
    " --dont_combine_weights_via_disc --pool 3 --pad 1 --j 2 --random_seed {seed}"
)
"""RELION's own settings of an initial model, with 300 iterations."""


def against_truth(folder: Path, case: Case, path: Path) -> dict[str, float]:
    """Resolution in Å to which a map agrees with the truth, the better hand of the two."""
    truth, pixel_size = _read(folder / "truth.mrc")
    found, own = _read(path)
    side = len(truth) * pixel_size
    box = 2 * round(side / PIXEL / 2)
    assert abs(len(found) * own - side) < 1e-3 * side
    small = [resample(volume, new_shape=(box,) * 3) for volume in (found, truth)]
    pixel_size = side / box
    mask = soft_sphere((box,) * 3, radius=case.diameter / 2, edge=3 * pixel_size, pixel_size=pixel_size)
    alignment = align_volume(
        *small, mask=mask, radius_px=case.diameter / 2 / pixel_size, frequency=round(side / FINEST)
    )
    curve = fsc(alignment.apply(small[0]) * mask, small[1] * mask)
    found_at = resolution(curve, pixel_size=pixel_size, box=box, threshold=0.5)
    return {"truth 0.5 Å": max(found_at, FINEST), "correlation": alignment.correlation}


def _read(path: Path) -> tuple[Tensor, float]:
    pixel_size = read_header(path).pixel_size
    assert pixel_size is not None
    return torch.from_numpy(read_mrc(path).astype(np.float32)), pixel_size


def ours(folder: Path, case: Case, seed: int, workers: int) -> dict[str, Any]:
    """One job, and its map against the truth."""
    words = f"abinitio input.star --symmetry {case.group} --diameter {case.diameter} --seed {seed}"
    command = [sys.executable, "-m", "halfmap", *words.split(), "--workers", str(workers), "--project", "."]
    seconds = timed(command, folder, folder / f"abinitio{seed}.log")
    job = last_job(folder, AbInitioStep.folder)
    blocks = read_star(job / "model.star")
    runs, classes = blocks["model_runs"], blocks["model_classes"]
    assert isinstance(runs, pl.DataFrame)
    assert isinstance(classes, pl.DataFrame)
    row = {"program": "Halfmap", "seed": seed, "runs kept": int(runs["hmRunKept"].sum())}
    row["runs agree Å"] = float(classes["hmRunAgreement"][0])
    return row | seconds | against_truth(folder, case, job / "class001.mrc")


def relion(folder: Path, case: Case, seed: int) -> dict[str, Any]:
    """RELION's initial model of the same particles."""
    (folder / "initialmodel").mkdir(exist_ok=True)
    command = shlex.split(RELION.format(diameter=case.diameter, group=case.group, seed=seed))
    seconds = timed(command, folder, folder / "initialmodel/run.log")
    path = sorted((folder / "initialmodel").glob("run_it*_class001.mrc"))[-1]
    return {"program": "RELION", "seed": seed} | seconds | against_truth(folder, case, path)


def main() -> None:
    """Make the data where they are not yet, measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("../shared/data/models"))
    parser.add_argument(
        "--scratch", type=Path, required=True, help="folder of projects; kept for the next run"
    )
    parser.add_argument(
        "--cases", nargs="*", choices=CASES, default=["polymerase", "galactosidase", "synthase"]
    )
    parser.add_argument("--programs", nargs="*", choices=("Halfmap", "RELION"), default=["Halfmap", "RELION"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    rows = []
    for name in options.cases:
        case, folder = CASES[name], (options.scratch / name).resolve()
        make(folder, options.models.resolve(), case)
        for seed in options.seeds if "Halfmap" in options.programs else []:
            rows.append({"data": name} | ours(folder, case, seed, options.workers))
            show(rows[-1])
        if "RELION" in options.programs:
            rows.append({"data": name} | relion(folder, case, options.seeds[0]))
            show(rows[-1])
    path = Path(__file__).parent / "results" / "abinitio.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {(row["data"], row["program"], row["seed"]) for row in rows}
    rows += [row for row in kept if (row["data"], row["program"], row["seed"]) not in done]
    machine = platform.processor() or platform.machine()
    path.write_text(json.dumps(rounded({"machine": machine, "rows": rows}), indent=1) + "\n")


if __name__ == "__main__":
    main()
