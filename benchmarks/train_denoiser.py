"""Train the general network of `halfmap denoise apply` on simulated micrographs of many structures.

Every structure is simulated under conditions drawn at random: pixel size, dose, defocus, thickness and noise
of the ice, number of particles. `halfmap denoise train` then learns from the even and odd sums of all.
Structures that `benchmarks/denoise.py` measures on, and their homologues, are left out, and so are real data.
See docs/denoise.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import polars as pl

from class2d import timed
from class2d_data import halfmap
from halfmap.io.tables import read_micrographs, write_micrographs

MODELS = Path(__file__).parents[2] / "shared" / "data" / "models"

TRAINED = "1kx5 6mhs 5a1a 1bgx 1igt 1exb 1k4c 1n2c 2bg9 2hmi 2j8s 2zxe 3csl 3j5p 4hg6"
"""Soluble and of membranes, with nucleic acids, thin and round. Capsids take minutes to lay out."""


def conditions(rng: np.random.Generator) -> dict[str, float]:
    """Of a microscope and its ice."""
    defocus = float(rng.uniform(6e3, 15e3))
    return {
        "pixel-size": round(float(rng.uniform(0.8, 1.5)), 3),
        "dose": round(float(rng.uniform(25, 60)), 1),
        "voltage": float(rng.choice([200.0, 300.0])),
        "defocus-min": round(defocus),
        "defocus-max": round(defocus + float(rng.uniform(5e3, 15e3))),
        "ice-thickness": round(float(rng.uniform(200, 500))),
        "ice-noise": round(float(rng.uniform(0.7, 1.4)), 2),
        "particles": int(rng.integers(30, 200)),
    }


def simulate(folder: Path, models: Path, name: str, side: int, number: int) -> Path | None:
    """Table of a structure's micrographs; made once."""
    found = sorted(models.glob(f"{name}.*"))
    if not found:
        return None
    place = folder / name
    table = place / "Simulate/job001/micrographs.star"
    if not (table.parent / "RELION_JOB_EXIT_SUCCESS").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        drawn = conditions(np.random.default_rng([number, 7]))
        words = " ".join(f"--{key} {value}" for key, value in drawn.items())
        halfmap(
            f"simulate micrographs {found[0]} --n-micrographs 2 --width {side} --height {side} {words}"
            f" --write-halves --seed {number + 1} --workers 2",
            place,
        )
    return listed(folder, name, table)


def listed(folder: Path, name: str, table: Path) -> Path:
    """The same table with files named from the folder of all structures."""
    read = read_micrographs(table)
    files = [label for label in read.rows.columns if label.startswith("rlnMicrographName")]
    rows = read.rows.with_columns((pl.lit(f"{name}/") + pl.col(label)).alias(label) for label in files)
    path = folder / f"{name}.star"
    write_micrographs(path, read.with_rows(rows))
    return path


def main() -> None:
    """Simulate, train, and put the weights with their record where they are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of simulations, kept")
    parser.add_argument("--weights", type=Path, required=True, help="file to write, with .json beside it")
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--side", type=int, default=1536)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    work = options.work.resolve()
    made = [
        simulate(work, options.models.resolve(), name, options.side, number)
        for number, name in enumerate(TRAINED.split())
    ]
    tables = [str(table.relative_to(work)) for table in made if table is not None]
    how = f"--size small --steps {options.steps} --most {2 * len(tables)} --held-out 0.1"
    words = [sys.executable, "-m", "halfmap", "denoise", "train", *tables, *how.split(), "--project", "."]
    seconds = timed(words, work, work / "train.txt")
    (job,) = sorted(work.glob("Denoise/job*"))[-1:]
    for suffix in (".npz", ".json"):
        shutil.copyfile((job / "model.npz").with_suffix(suffix), options.weights.with_suffix(suffix))
    print(f"{len(tables)} structures", *(f"{name} {value:.0f}" for name, value in seconds.items()), sep="  ")


if __name__ == "__main__":
    main()
