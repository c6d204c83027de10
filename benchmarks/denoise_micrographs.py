"""What `halfmap denoise` keeps of micrographs: their Thon rings, and ice without particles.

Fifteen micrographs each of four structures that the general network has not seen, with other pixels, doses,
defoci and ice, are denoised by it. The defocus is estimated in the raw and in the denoised ones, and compared
with one another and with the truth. Ten micrographs of nothing but ice are searched for particles together
with fifteen that have some, raw, denoised and merged: a network that draws particles would have some found.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from class2d import last_job, rounded
from class2d_data import halfmap
from halfmap.data import MicrographSet
from halfmap.io.star import read_star
from halfmap.io.tables import read_micrographs, write_micrographs

CONDITIONS = {
    "6z6u.pdb.gz": "--pixel-size 0.85 --dose 50 --defocus-min 6000 --defocus-max 20000 --ice-thickness 300",
    "4hhb.cif.gz": "--pixel-size 1.0 --dose 40 --defocus-min 8000 --defocus-max 25000 --ice-thickness 200",
    "6vxx.pdb.gz": "--pixel-size 1.2 --dose 60 --defocus-min 8000 --defocus-max 22000 --ice-thickness 400",
    "3sn6.cif.gz": "--pixel-size 1.4 --dose 30 --defocus-min 10000 --defocus-max 30000 --ice-thickness 300",
}
"""Of each structure: apoferritin, haemoglobin, a spike, a receptor with its G protein."""

EMPTY = "4hhb.cif.gz"
"""Whose micrographs are searched beside others, of the same conditions, without particles."""

DIAMETER_A, NUMBER = 65, 10


def simulate(folder: Path, models: Path, words: str, number: int, side: int, seed: int) -> MicrographSet:
    """Micrographs with their halves, made once, and the truth about them."""
    if not (folder / "Simulate/job001/RELION_JOB_EXIT_SUCCESS").exists():
        folder.mkdir(parents=True, exist_ok=True)
        halfmap(
            f"simulate micrographs {models}/{words} --n-micrographs {number} --width {side} --height {side}"
            f" --write-halves --seed {seed} --workers 2",
            folder,
        )
    return read_micrographs(folder / "Simulate/job001/micrographs.star")


def defoci(folder: Path, table: MicrographSet) -> list[dict[str, float]]:
    """Mean defoci of each micrograph: true, found in the raw one, found in the denoised one, Å."""
    write_micrographs(folder / "all.star", table)
    halfmap("denoise apply all.star --no-merge --no-pictures", folder)
    applied = last_job(folder, "Denoise")
    halfmap("ctf all.star", folder)
    raw = read_micrographs(last_job(folder, "Ctf") / "micrographs_ctf.star")
    done = read_micrographs(applied / "micrographs.star")
    known = raw.rows.select("rlnMicrographName", "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")
    rows = done.rows.join(known, on="rlnMicrographName")
    write_micrographs(folder / "known.star", MicrographSet(done.optics, rows))
    halfmap("denoise measure known.star", folder)
    measured = read_star(last_job(folder, "Denoise") / "measured.star")["micrographs"]
    assert isinstance(measured, pl.DataFrame)
    found = mean_defocus(raw.rows)
    truth = read_star(folder / "Simulate/job001/truth_micrographs.star")["micrographs"]
    assert isinstance(truth, pl.DataFrame)
    change = dict(zip(measured["rlnMicrographName"], measured["hmDefocusDifference"], strict=True))
    return [
        {"true": true, "raw": found[name], "denoised": found[name] + float(change[name])}
        for name, true in mean_defocus(truth).items()
        if name in found
    ]


def mean_defocus(rows: pl.DataFrame) -> dict[str, float]:
    """Of each micrograph, Å."""
    mean = (rows["rlnDefocusU"] + rows["rlnDefocusV"]) / 2
    return dict(zip(rows["rlnMicrographName"], mean, strict=True))


def beside(folder: Path, full: MicrographSet, empty: MicrographSet, others: Path) -> None:
    """Write one table of micrographs with particles, and of those of another project, without."""
    files = [name for name in empty.rows.columns if name.startswith("rlnMicrographName")]
    rows = empty.rows.with_columns((pl.lit(f"{others}/") + pl.col(name)).alias(name) for name in files)
    write_micrographs(folder / "beside.star", full.with_rows(pl.concat([full.rows, rows])))


def picks_in_ice(folder: Path, number: int) -> dict[str, int]:
    """Picks in all micrographs of a table, and in the last ones, which have no particles."""
    halfmap("denoise apply beside.star --no-pictures", folder)
    denoised = last_job(folder, "Denoise") / "micrographs.star"
    row = {}
    for picker in ("blob", "learned"):
        for images in ("raw", "denoised", "merged"):
            words = f"pick {picker} {denoised} --images {images} --diameter {DIAMETER_A} --no-pictures"
            halfmap(words, folder)
            files = read_star(last_job(folder, "Pick") / "autopick.star")["coordinate_files"]
            assert isinstance(files, pl.DataFrame)
            picks = files["hmPicks"].to_list()
            row[f"{picker}, {images}"] = f"{sum(picks[:-number])} and {sum(picks[-number:])}"
    return row


def main() -> None:
    """Simulate, denoise, compare, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("../shared/data/models"))
    parser.add_argument("--scratch", type=Path, required=True, help="folder of projects, kept")
    parser.add_argument("--micrographs", type=int, default=15, help="of each structure")
    parser.add_argument("--side", type=int, default=2048)
    options = parser.parse_args()
    models = options.models.resolve()
    rows: list[dict[str, Any]] = []
    for seed, (model, words) in enumerate(CONDITIONS.items(), start=31):
        folder = (options.scratch / model.partition(".")[0]).resolve()
        table = simulate(folder, models, f"{model} {words}", options.micrographs, options.side, seed)
        found = defoci(folder, table)
        true, raw, denoised = (np.array([each[name] for each in found]) for name in found[0])
        rows.append(
            {
                "data": model.partition(".")[0],
                "micrographs": len(found),
                "within 200 Å of the raw one's": int((np.abs(denoised - raw) <= 200).sum()),
                "raw, within 200 Å of the truth": int((np.abs(raw - true) <= 200).sum()),
                "denoised, within 200 Å of the truth": int((np.abs(denoised - true) <= 200).sum()),
                "median error of raw Å": float(np.median(np.abs(raw - true))),
                "median error of denoised Å": float(np.median(np.abs(denoised - true))),
            }
        )
        print(rows[-1], flush=True)
    folder, others = ((options.scratch / name).resolve() for name in (EMPTY.partition(".")[0], "empty"))
    words = f"{EMPTY} {CONDITIONS[EMPTY]} --particles 0 --contaminants 0 --carbon 0"
    empty = simulate(others, models, words, NUMBER, options.side, 30)
    beside(folder, read_micrographs(folder / "Simulate/job001/micrographs.star"), empty, others)
    rows.append({"data": "particles, and ice alone"} | picks_in_ice(folder, NUMBER))
    print(rows[-1], flush=True)
    path = Path(__file__).parent / "results" / "denoise_micrographs.json"
    machine = platform.processor() or platform.machine()
    path.write_text(json.dumps(rounded({"machine": machine, "rows": rows}), indent=1) + "\n")


if __name__ == "__main__":
    main()
