"""How well `halfmap denoise` finds the signal of simulated micrographs, beside filters that know the truth.

Micrographs of a particle, with the sums of their even and odd frames and with the image that they would be
without ice and noise. The general network, which has never seen such a particle, denoises the last of them as
it is, and after some batches of the others (tuned). A network of ours is trained on these for a given number
of batches from nothing (wide), and so is a plain U-Net. Correlation with the truth is that of all frequencies
from 1/400 Å to those of pixels of 1.5 Å together, beside that of the best low-pass filter, and of the filter
that multiplies each ring by what is best for it (Wiener's): both chosen with knowledge of the truth. Topaz,
where `--topaz` names the program, denoises with the network that it ships. Signal over noise and bias are
those that our step measures without the truth, as is the part of the rings to 4 Å in which FRC / (1 - FRC) is
lower after denoising than before, and the part in which it is so by more than 1.96 standard errors.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from class2d import rounded, timed
from class2d_data import halfmap
from halfmap.io.denoised import read_powers
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.tables import read_micrographs, write_micrographs
from halfmap.ops.filters import band_pass, low_pass, radial_average, radial_profile_to_grid
from halfmap.ops.fourier import irfft2, rfft2
from halfmap.steps.denoise.apply import MEASURED as POWERS
from halfmap.steps.denoise.measure import ring_table, rings_that_lost

PIXEL_A, COARSE_A = 1.2, 1.5
FINEST_A = 4.0
"""Detail to which rings are looked at."""

HELD_OUT = 2
"""Micrographs at the end that nothing is trained on."""

MEASURED = {
    "SNR before": "hmSnrRaw",
    "SNR after": "hmSnrDenoised",
    "noise before over after": "hmNoiseReduction",
    "SNBR": "hmSignalToNoiseAndBias",
}

NETWORKS = "general", "tuned", "wide", "plain"

CASES = {
    "haemoglobin, 60 kDa": "4hhb.cif.gz",
    "proteasome, 600 kDa": "t20s.pdb.gz",
    "80S ribosome, 3.3 MDa": "4v6x.cif.gz",
}


def make(folder: Path, model: Path, number: int, side: int) -> None:
    """Simulate micrographs; made once."""
    if not (folder / "Simulate/job001/RELION_JOB_EXIT_SUCCESS").exists():
        folder.mkdir(parents=True, exist_ok=True)
        halfmap(
            f"simulate micrographs {model} --n-micrographs {number} --width {side} --height {side}"
            f" --pixel-size {PIXEL_A} --write-halves --write-clean --seed 5 --workers 2",
            folder,
        )
    table = read_micrographs(folder / "Simulate/job001/micrographs.star")
    for name, rows in (("train", slice(None, -HELD_OUT)), ("test", slice(-HELD_OUT, None))):
        write_micrographs(folder / f"{name}.star", table.with_rows(table.rows[rows]))


def band(shape: tuple[int, int]) -> Tensor:
    """What is compared."""
    return band_pass(shape, pixel_size=PIXEL_A, low_resolution=400.0, high_resolution=2 * COARSE_A)


def correlation(image: Tensor, truth: Tensor) -> float:
    """Of two images within the band."""
    kept = band(tuple(truth.shape))
    pair = torch.stack(
        [irfft2(rfft2(each) * kept, shape=tuple(truth.shape)).flatten() for each in (image, truth)]
    )
    return float(torch.corrcoef(pair)[0, 1])


def best_low_pass(raw: Tensor, truth: Tensor) -> float:
    """Correlation after the low-pass filter that is best for it."""
    shape, spectrum = tuple(raw.shape), rfft2(raw)
    return max(
        correlation(
            irfft2(spectrum * low_pass(shape, pixel_size=PIXEL_A, resolution=float(d)), shape=shape), truth
        )
        for d in np.geomspace(5.0, 120.0, 24)
    )


def best_by_rings(raw: Tensor, truth: Tensor) -> float:
    """Correlation after the filter that is best ring by ring."""
    shape, one, other = tuple(raw.shape), rfft2(raw), rfft2(truth)
    power = radial_average(one.abs().square(), shape=shape)
    common = radial_average((one * other.conj()).real, shape=shape)
    gain = radial_profile_to_grid(common / power.clamp(min=1e-20), shape=shape)
    return correlation(irfft2(one * gain, shape=shape), truth)


def image(path: Path) -> Tensor:
    """An image without its mean."""
    values = torch.from_numpy(np.asarray(read_mrc(path), np.float32).squeeze())
    return values - values.mean()


def ours(folder: Path, network: str, steps: int) -> tuple[dict[str, Any], list[Path]]:
    """Train and apply a network: seconds, measured figures, denoised images."""
    row: dict[str, Any] = {}
    model = ""
    if network != "general":
        how = "--general" if network == "tuned" else f"--network {network} --size small"
        train = run(f"denoise train train.star {how} --steps {steps} --pixel-size {COARSE_A}", folder)
        model = f"--model {jobs(folder)[-1] / 'model.npz'}"
        row = {f"train {name}": value for name, value in train.items()}
    apply = run(f"denoise apply test.star {model}", folder)
    table = read_micrographs(jobs(folder)[-1] / "micrographs.star").rows
    row |= {f"apply {name}": value for name, value in apply.items()}
    for name, label in MEASURED.items():
        row[name] = float(np.mean(table[label].to_numpy()))
    powers = [read_powers(folder / name) for name in table[POWERS]]
    rings = ring_table(functools.reduce(operator.add, [each for each, _ in powers]), powers[0][1])
    seen = rings.filter(pl.col("rlnAngstromResolution") >= FINEST_A)
    row["rings worse"] = float((seen["hmSsnrChange"] < 0).mean() or 0.0)  # pyright: ignore[reportArgumentType]
    row["beyond chance"] = rings_that_lost(rings, FINEST_A)
    return row, [folder / name for name in table["hmMicrographNameDenoised"]]


def jobs(folder: Path) -> list[Path]:
    """Jobs of denoising, the last one at the end."""
    return sorted(folder.glob("Denoise/job*"))


def run(words: str, folder: Path) -> dict[str, float]:
    """A command of ours in a project, with its seconds."""
    command = [sys.executable, "-m", "halfmap", *words.split(), "--project", "."]
    return timed(command, folder, folder / "log.txt")


def topaz(program: Path, folder: Path, raws: list[Path]) -> list[Path]:
    """Images that Topaz has denoised."""
    out = folder / "topaz"
    out.mkdir(exist_ok=True)
    for path in raws:
        write_mrc(
            out / f"{path.stem}_in.mrc", np.asarray(read_mrc(path), np.float32).squeeze(), pixel_size=PIXEL_A
        )
        words = [
            str(program),
            "denoise",
            str(out / f"{path.stem}_in.mrc"),
            "-o",
            str(out / "done"),
            "-d",
            "-1",
        ]
        subprocess.run([*words, "--patch-size", "1024"], check=True, capture_output=True)
    return [out / "done" / f"{path.stem}_in.mrc" for path in raws]


def main() -> None:
    """Run the cases, print, and keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("../shared/data/models"))
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--micrographs", type=int, default=20 + HELD_OUT)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=2000, help="from nothing")
    parser.add_argument("--tuning", type=int, default=200, help="batches after the general network")
    parser.add_argument("--topaz", type=Path)
    options = parser.parse_args()
    rows = []
    for case in options.cases:
        folder = (options.scratch / CASES[case].partition(".")[0]).resolve()
        make(folder, (options.models / CASES[case]).resolve(), options.micrographs, options.side)
        test = read_micrographs(folder / "test.star").rows["rlnMicrographName"].to_list()
        raws = [folder / name for name in test]
        truths = [image(folder / "Simulate/job001/Truth" / f"{path.stem}_clean.mrc") for path in raws]

        known = [(image(path), truth) for path, truth in zip(raws, truths, strict=True)]
        base = {"data": case} | {
            name: float(np.mean([measure(raw, truth) for raw, truth in known]))
            for name, measure in (
                ("raw", correlation),
                ("best low-pass", best_low_pass),
                ("best by rings", best_by_rings),
            )
        }
        for network in options.networks:
            steps = options.tuning if network == "tuned" else options.steps
            row, done = ours(folder, network, steps)
            found = {"program": f"Halfmap {network}", "correlation": mean(done, truths)}
            if network != "general":
                found["batches"] = steps
            rows.append(base | found | row)
            show(rows[-1])
        if options.topaz:
            done = topaz(options.topaz.resolve(), folder, raws)
            rows.append(base | {"program": "Topaz", "correlation": mean(done, truths)})
            show(rows[-1])
    path = Path(__file__).parent / "results" / "denoise.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {(row["data"], row["program"]) for row in rows}
    rows += [row for row in kept if (row["data"], row["program"]) not in done]
    machine = platform.processor() or platform.machine()
    path.write_text(json.dumps(rounded({"machine": machine, "rows": rows}), indent=1) + "\n")


def mean(paths: list[Path], truths: list[Tensor]) -> float:
    """Mean correlation of images with their truths."""
    pairs = zip(paths, truths, strict=True)
    return float(np.mean([correlation(image(path), truth) for path, truth in pairs]))


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    cells = (
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
    )
    print("  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
