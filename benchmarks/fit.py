"""Q-scores beside stored ones, and rigid fits of models that were displaced, in experimental maps.

Of a folder with EMD-30342 (a crop, with a model and its Q-scores), EMD-5168 and EMD-5170 (F-actin) and a crop
of EMD-2566 about a chain of the mitoribosome, each with its model. Displacements are drawn from all turns up
to 60° and all shifts up to 20 Å, evenly. Fits are local, within those limits, and by `halfmap fit` as a
user runs it; `--global-fits` of them are global too. A filament has a place for each subunit: of a global fit
there the turn and the rise from the model's own subunit are given as well.

The model that comes with EMD-5170 does not fit where it is: its fits are compared with the one of the model
that was not displaced.

CPU seconds, user and system of all processes, hold on a machine that others use as well; wall times do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from class2d import last_job, rounded, timed
from halfmap.io.model_files import model_origin, read_model_file
from halfmap.io.star import read_star
from halfmap.io.volumes import read_volume
from halfmap.ops.q_score import q_scores
from halfmap.ops.rotations import from_rotation_vector, to_rotation_vector

ANGLE_deg, SHIFT_A, WITHIN_A = 60.0, 20.0, 1.0
RESULTS = Path(__file__).parent / "results/fit.json"
Q_MAP = "emd-30342-mapq-crop/mapq_390_emd_30342_A_z4.mrc"
Q_MODEL = "emd-30342-mapq-crop/390_7cec_A__Q__390_emd_30342_A_z4.cif"


@dataclass(frozen=True)
class Case:
    """A map and a model; whether the model fits where its file has it, and the map's resolution in Å."""

    map: str
    model: str
    fits: bool = True
    resolution: float | None = None


CASES = {
    "actin, EMD-5168": Case("emd-5168-5170-actin/emd_5168.map", "emd-5168-5170-actin/3MFP.pdb"),
    "mitoribosome chain, EMD-2566": Case(
        "emd-2566-mitoribo-chain/daq_2566_3J6B_9.mrc", "emd-2566-mitoribo-chain/3J6B_9.pdb"
    ),
    "actin, EMD-5170": Case("emd-5168-5170-actin/emd_5170.map", "emd-5168-5170-actin/1J6Z.pdb", False, 15.0),
}


def stored_scores(data: Path) -> dict[str, float]:
    """Our Q-scores beside those stored, in the map and in one sampled anew where those were calculated."""
    volume, file = read_volume(data / Q_MAP), read_model_file(data / Q_MODEL)
    block = file.document.sole_block()
    stored = np.array(list(block.find_values("_atom_site.Q_score")), float)[file.rows]
    origin, pixel = np.array(model_origin(volume)), volume.pixel_size
    found = _scores(volume.array, file.model.positions - origin, pixel)
    # Calculated in parts, maps were sampled anew on voxels whose places are multiples of their size.
    moved = np.round(origin / pixel) * pixel
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in volume.array.shape], indexing="ij")).astype(float)
    grid += ((moved - origin) / pixel)[::-1, None, None, None]
    again = map_coordinates(volume.array, grid, order=1, mode="constant")
    same = _scores(again, file.model.positions - moved, pixel)
    return {
        "atoms": len(found),
        "correlation": float(np.corrcoef(found, stored)[0, 1]),
        "mean": float(found.mean()),
        "stored mean": float(stored.mean()),
        "largest difference in the map sampled anew": float(np.abs(same - stored).max()),
    }


def _scores(array: NDArray[np.float32], places: NDArray[np.float64], pixel: float) -> NDArray[np.float64]:
    return q_scores(torch.from_numpy(array), torch.from_numpy(places), pixel_size=pixel).numpy()


def displacement(seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Rotation, shift in Å, and angle."""
    generator = torch.Generator().manual_seed(seed)
    vectors = []
    for most in (ANGLE_deg, SHIFT_A):
        direction = torch.randn(3, generator=generator, dtype=torch.float64)
        length = most * float(torch.rand(1, generator=generator)) ** (1 / 3)
        vectors.append(direction / direction.norm() * length)
    return from_rotation_vector(vectors[0]).numpy(), vectors[1].numpy(), float(vectors[0].norm())


def fitted(
    folder: Path, data: Path, case: Case, seed: int | None, how: str
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """Displace a model, fit it: positions then, and what is known of the fit."""
    folder.mkdir(parents=True, exist_ok=True)
    file = read_model_file(data / case.model)
    rotation, shift, angle = (np.eye(3), np.zeros(3), 0.0) if seed is None else displacement(seed)
    centre = file.model.positions.mean(0)
    file.write(
        folder / "displaced.cif", rotation=rotation, shift=centre + shift - rotation @ centre, columns={}
    )
    words = f"fit {data / case.map} --model displaced.cif --search {how} --project ."
    if case.resolution is not None:
        words += f" --resolution {case.resolution:g}"
    seconds = timed([sys.executable, "-m", "halfmap", *words.split()], folder, folder / "fit.log")
    job = last_job(folder, "Fit")
    places = read_star(job / "fit.star")["places"]["hmPlaceCorrelation"]
    found = {
        "displaced deg": angle,
        "displaced A": float(np.linalg.norm(shift)),
        "correlation": float(places[0]),
        "next": float(places[1]) if len(places) > 1 else None,
    }
    return read_model_file(job / "fitted.cif").model.positions, found | seconds


def rmsd(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Root mean square distance of atoms in Å."""
    return float(np.sqrt(np.square(one - other).sum(1).mean()))


def screw(start: NDArray[np.float64], end: NDArray[np.float64]) -> dict[str, float]:
    """Turn in degrees, and rise along its axis in Å, from one place of a model to another."""
    a, b = start - start.mean(0), end - end.mean(0)
    u, _, vh = np.linalg.svd(b.T @ a)
    rotation = u @ np.diag([1, 1, np.sign(np.linalg.det(u @ vh))]) @ vh
    vector = to_rotation_vector(torch.from_numpy(rotation)).numpy()
    angle = float(np.linalg.norm(vector))
    axis = vector / max(angle, 1e-9)
    shift = end.mean(0) - rotation @ start.mean(0)
    return {"turn deg": angle, "rise A": abs(float(shift @ axis))}


def fits(scratch: Path, data: Path, name: str, tries: int, how: str) -> list[dict[str, Any]]:
    """Fit one model from many displacements."""
    case = CASES[name]
    truth = read_model_file(data / case.model).model.positions
    folder = scratch / name.replace(" ", "_")
    if not case.fits:
        own, _ = fitted(folder / "own", data, case, None, "local")
        print(f"{name}: the model, not displaced, moves by {rmsd(own, truth):.1f} A", flush=True)
        truth = own
    rows = []
    for seed in range(1, tries + 1):
        found, row = fitted(folder / f"{how}{seed}", data, case, seed, how)
        row = {"case": name, "search": how, "seed": seed, "RMSD A": rmsd(found, truth)} | row
        if how == "global":
            row |= screw(truth, found)
        rows.append(row)
        show(row)
    return rows


def show(row: dict[str, Any]) -> None:
    """Print the figures of a fit."""
    elsewhere = f", turn {row['turn deg']:.1f} deg, rise {row['rise A']:.1f} A" if "turn deg" in row else ""
    print(
        f"{row['case']}, {row['search']}, from {row['displaced deg']:.0f} deg and "
        f"{row['displaced A']:.0f} A: RMSD {row['RMSD A']:.2f} A{elsewhere}, "
        f"correlation {row['correlation']:.3f}, "
        f"{row['CPU s']:.0f} s of CPU",
        flush=True,
    )


def main() -> None:
    """Run what is asked, print the figures and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the maps")
    parser.add_argument("--scratch", type=Path, required=True, help="folder of projects, kept")
    parser.add_argument("--fits", type=int, default=10, help="local fits of each model")
    parser.add_argument("--global-fits", type=int, default=2, help="global fits of each model that fits")
    parser.add_argument("--record", type=Path, default=RESULTS, help="JSON file to write")
    given = parser.parse_args()
    data = given.data.resolve()
    scores = stored_scores(data)
    print("Q-scores: " + ", ".join(f"{key} {value:.6g}" for key, value in scores.items()), flush=True)
    rows = []
    for name in CASES:
        rows += fits(given.scratch, data, name, given.fits, "local")
        back = sum(row["RMSD A"] <= WITHIN_A for row in rows[-given.fits :]) if given.fits else 0
        print(f"{name}: {back} of {given.fits} within {WITHIN_A:g} A", flush=True)
        record(given.record, scores, rows)
    for name, case in CASES.items():
        if case.fits:
            rows += fits(given.scratch, data, name, given.global_fits, "global")
            record(given.record, scores, rows)


def record(path: Path, scores: dict[str, float], rows: list[dict[str, Any]]) -> None:
    """Write what is known so far."""
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    found = {"machine": machine, "Q-scores": scores, "fits": rounded(rows)}
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
