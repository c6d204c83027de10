"""Local resolution of three slabs whose detail is known, by both of our methods, beside RELION's.

White noise within a ball is filtered to 3, 5 and 8 Å in three slabs across x; each half map has white noise
of its own. Within each slab, 10 Å and more from where slabs meet, the medians, the middle 80 % and the errors
against the truth are measured. RELION correlates every `--sampling` Å, 25 Å by default.

CPU seconds, user and system of all processes, hold on a machine that others use as well; wall times do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from class2d import last_job, rounded, timed
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.masks import soft_sphere

RESOLUTIONS_A, PIXEL_A, SEED = (3.0, 5.0, 8.0), 1.0, 1
RADIUS, EDGE_A, APART_A = 0.42, 6.0, 10.0
RESULTS = Path(__file__).parent / "results/localres.json"
RELION = (
    "relion_postprocess --i half1.mrc --i2 half2.mrc --mask mask.mrc --o RELION/run --angpix {pixel}"
    " --locres --locres_sampling {sampling} --locres_minres 40 --adhoc_bfac 0"
)


def slabs(box: int) -> list[slice]:
    """Where along x the slabs are."""
    edges = [round(i * box / len(RESOLUTIONS_A)) for i in range(len(RESOLUTIONS_A) + 1)]
    return [slice(low, high) for low, high in pairwise(edges)]


def make(folder: Path, box: int, noise: float) -> None:
    """Write half maps and mask."""
    folder.mkdir(parents=True, exist_ok=True)
    shape, generator = (box,) * 3, torch.Generator().manual_seed(SEED)
    white = rfft3(torch.randn(shape, generator=generator))
    truth = torch.zeros(shape)
    for slab, resolution in zip(slabs(box), RESOLUTIONS_A, strict=True):
        passed = low_pass(shape, pixel_size=PIXEL_A, resolution=resolution)
        truth[..., slab] = irfft3(white * passed, shape=shape)[..., slab]
    mask = soft_sphere(shape, radius=RADIUS * box * PIXEL_A, edge=EDGE_A, pixel_size=PIXEL_A)
    volumes = {"mask": mask}
    for number in (1, 2):
        volumes[f"half{number}"] = truth * mask + noise * torch.randn(shape, generator=generator)
    for name, volume in volumes.items():
        write_mrc(folder / f"{name}.mrc", volume.numpy(), pixel_size=PIXEL_A, stack=False)


def measured(volume: NDArray[np.float32], mask: NDArray[np.float32]) -> list[dict[str, float]]:
    """Figures of each slab."""
    rows = []
    for slab, truth in zip(slabs(len(mask)), RESOLUTIONS_A, strict=True):
        margin = round(APART_A / PIXEL_A)
        part = slice(slab.start + margin, slab.stop - margin)
        inside = mask[..., part] > 0.99
        values = volume[..., part][inside].astype(float)
        values = values[values > 0]
        low, median, high = np.quantile(values, (0.1, 0.5, 0.9))
        error = np.abs(values / truth - 1)
        rows.append(
            {
                "truth A": truth,
                "median A": median,
                "10 % A": low,
                "90 % A": high,
                "error of the median %": 100 * (median / truth - 1),
                "median error %": 100 * float(np.median(error)),
            }
        )
    return rows


def ours(folder: Path, directions: bool) -> list[dict[str, Any]]:
    """Run both of our methods, which share a run and its time."""
    words = "localres half1.mrc --mask mask.mrc" + ("" if directions else " --no-directions")
    command = [sys.executable, "-m", "halfmap", *words.split(), "--project", "."]
    seconds = timed(command, folder, folder / "localres.log")
    job, mask = last_job(folder, "LocalRes"), read_mrc(folder / "mask.mrc")
    name = "Halfmap with directions" if directions else "Halfmap"
    methods = {"correlation": "local_resolution.mrc", "signal over noise": "local_resolution_monogenic.mrc"}
    return [
        {"program": name, "method": method} | seconds | {"slabs": measured(read_mrc(job / file), mask)}
        for method, file in methods.items()
    ]


def relion(folder: Path, sampling: float) -> list[dict[str, Any]]:
    """RELION's local resolution of the same."""
    (folder / "RELION").mkdir(exist_ok=True)
    words = RELION.format(pixel=PIXEL_A, sampling=sampling)
    seconds = timed(shlex.split(words), folder, folder / "relion.log")
    volume = read_mrc(folder / "RELION/run_locres.mrc")
    figures = measured(volume, read_mrc(folder / "mask.mrc"))
    return [
        {"program": f"RELION every {sampling:g} A", "method": "correlation"} | seconds | {"slabs": figures}
    ]


def show(row: dict[str, Any]) -> None:
    """Print the figures of a method."""
    print(f"{row['program']}, {row['method']}: {row['wall s']} s, {row['CPU s']} s of CPU", flush=True)
    for slab in row["slabs"]:
        off, middle = slab["error of the median %"], f"{slab['10 % A']:.2f} to {slab['90 % A']:.2f}"
        print(
            f"  {slab['truth A']:g} A: median {slab['median A']:.2f} A ({off:+.1f} %), 80 % within {middle}"
        )


def main() -> None:
    """Run what is asked, print the figures and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/localres"))
    parser.add_argument("--box", type=int, default=256)
    parser.add_argument("--noise", type=float, default=0.5, help="over the white signal, of each half map")
    parser.add_argument(
        "--sampling", type=float, nargs="*", default=[25.0], help="of RELION, A; none: no run"
    )
    parser.add_argument("--directions", action="store_true", help="also with our cones")
    parser.add_argument("--record", type=Path, default=RESULTS, help="JSON file to write")
    given = parser.parse_args()
    folder = given.scratch / f"{given.box}"
    make(folder, given.box, given.noise)
    rows = []
    for found in (
        ours(folder, False),
        ours(folder, True) if given.directions else [],
        *(relion(folder, sampling) for sampling in given.sampling),
    ):
        rows += found
        for row in found:
            show(row)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    record = {"machine": machine, "box": given.box, "noise": given.noise, "rows": rounded(rows)}
    given.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
