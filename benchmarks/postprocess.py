"""Post-processing of half maps beside RELION's, and how often the interval holds the true resolution.

Both get the same half maps and mask. RELION draws random phases once; it is run with several seeds, so that
its corrected curve and B-factor can be compared beyond the scatter of one draw. RELION fits the Guinier plot
to the resolution only if it is told. The interval is counted over noise that is drawn again and again around
one map, whose true curve is known from its power.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from class2d import last_job, rounded
from halfmap.io.star import read_star
from halfmap.ops.filters import b_factor
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.fsc import fsc, resolution
from halfmap.ops.fsc_interval import noise_scatter, resolution_interval
from halfmap.ops.grids import ring_sums
from halfmap.ops.masks import soft_sphere
from refine import show

CURVES = {
    "unmasked": "rlnFourierShellCorrelationUnmaskedMaps",
    "masked": "rlnFourierShellCorrelationMaskedMaps",
    "corrected": "rlnFourierShellCorrelationCorrected",
    "of the mask's volume": "rlnFourierShellCorrelationParticleMaskFraction",
}
THRESHOLDS = 0.143, 0.5


def beside_relion(half1: Path, mask: Path, scratch: Path, seeds: int) -> dict[str, Any]:
    """Differences of curves and B-factors."""
    words = f"postprocess {half1} --mask {mask} --no-local --project ."
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "halfmap", *words.split()], cwd=scratch, check=True)
    row: dict[str, Any] = {"half maps": str(half1.name), "wall s": time.monotonic() - start}
    own = read_star(last_job(scratch, "PostProcess") / "postprocess.star")
    general = own["general"]
    (scratch / "relion").mkdir(exist_ok=True)
    theirs, start = [], time.monotonic()
    for seed in range(1, seeds + 1):
        command = (
            f"relion_postprocess --i {half1} --mask {mask} --o relion/{seed} --auto_bfac --autob_lowres 10"
        )
        command += f" --autob_highres {general['rlnFinalResolution']:.4f} --random_seed {seed}"
        subprocess.run(shlex.split(command), cwd=scratch, check=True, capture_output=True)
        theirs.append(read_star(scratch / f"relion/{seed}.star"))
    row["RELION wall s"] = (time.monotonic() - start) / seeds
    for name, column in CURVES.items():
        mine = own["fsc"][column].to_numpy()
        each = np.stack([one["fsc"][column].to_numpy()[: len(mine)] for one in theirs])
        row[f"{name}: largest difference"] = float(np.abs(mine - each.mean(0))[1:].max())
        row[f"{name}: scatter of RELION's"] = float(each.std(0).max())
    found = [float(one["general"]["rlnBfactorUsedForSharpening"]) for one in theirs]
    row["resolution Å"] = general["rlnFinalResolution"]
    row["RELION's"] = float(np.median([one["general"]["rlnFinalResolution"] for one in theirs]))
    row["B-factor Å²"] = general["rlnBfactorUsedForSharpening"]
    row["RELION's B-factor"] = float(np.mean(found))
    row["scatter of RELION's B-factor"] = float(np.std(found))
    return row


def coverage(box: int, realisations: int, noise: float, b: float) -> dict[str, Any]:
    """How often the interval holds the resolution of the true curve."""
    shape, pixel_size = (box,) * 3, 1.5
    mask = soft_sphere(shape, radius=0.3 * box * pixel_size, edge=8.0, pixel_size=pixel_size)
    ball = soft_sphere(shape, radius=0.25 * box * pixel_size, edge=8.0, pixel_size=pixel_size)
    generator = torch.Generator().manual_seed(1)
    fall = b_factor(shape, pixel_size=pixel_size, b_factor=b)
    signal = irfft3(rfft3(torch.randn(shape, generator=generator)) * fall, shape=shape) * ball
    signal /= signal[ball > 0.5].std()
    power = ring_sums(rfft3(signal * mask).abs().square(), shape=shape)
    counts = ring_sums(torch.ones(box, box, box // 2 + 1), shape=shape)
    expected = power / (power + counts * float(mask.square().sum()) * noise**2)
    scatter = noise_scatter(mask, generator=generator)
    held = dict.fromkeys(THRESHOLDS, 0)
    widths: dict[float, list[float]] = {threshold: [] for threshold in THRESHOLDS}
    for _ in range(realisations):
        first, second = (signal + noise * torch.randn(shape, generator=generator) for _ in range(2))
        curve = fsc(first * mask, second * mask)
        for threshold in THRESHOLDS:
            where = {"pixel_size": pixel_size, "box": box, "threshold": threshold}
            fine, coarse = resolution_interval(curve, scatter, **where)
            held[threshold] += fine <= resolution(expected, **where) <= coarse
            widths[threshold].append(coarse - fine)
    row: dict[str, Any] = {"box": box, "realisations": realisations, "noise": noise, "B": b}
    for threshold in THRESHOLDS:
        where = {"pixel_size": pixel_size, "box": box, "threshold": threshold}
        row[f"true at {threshold} Å"] = resolution(expected, **where)
        row[f"held at {threshold}"] = held[threshold] / realisations
        row[f"mean width at {threshold} Å"] = float(np.mean(widths[threshold]))
    return row


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scratch", type=Path, required=True, help="folder of a project; kept")
    parser.add_argument("--jobs", type=Path, nargs="*", default=[], help="folders of refinements")
    parser.add_argument("--seeds", type=int, default=8, help="runs of RELION")
    parser.add_argument("--box", type=int, default=96, help="of the maps that the interval is counted on")
    parser.add_argument("--realisations", type=int, default=50)
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    rows = []
    for job in options.jobs:
        half1 = (job / "run_half1_class001_unfil.mrc").resolve()
        rows.append(beside_relion(half1, (job / "mask.mrc").resolve(), options.scratch, options.seeds))
    intervals = [
        coverage(options.box, options.realisations, noise, b) for noise in (0.3, 1.0) for b in (150.0, 300.0)
    ]
    for row in [*rows, *intervals]:
        show(row)
    path = Path(__file__).parent / "results" / "postprocess.json"
    machine = platform.processor() or platform.machine()
    text = rounded({"machine": machine, "rows": rows, "intervals": intervals})
    path.write_text(json.dumps(text, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
