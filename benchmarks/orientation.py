"""Measures of views and of directional resolution against what is known, and how often they alarm falsely.

Views from everywhere, from all sides of an axis, within a cone of 40° and along one axis: sampling
compensation factor, part of Fourier space without slices and efficiency, beside their analytic values.
Attraction with and without a direction that attracts. FSC in cones of half maps that are isotropic, and of
reconstructions from noisy projections of each distribution. Time and memory of the latter measure for larger
boxes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from class2d import rounded
from halfmap.ops import directional_fsc, orientation
from halfmap.ops.fourier import fft_centred, irfft3, rfft3
from halfmap.ops.grids import frequency_radius
from halfmap.ops.masks import soft_sphere
from halfmap.ops.slices import project_volume, reconstruct

# The tests have the same distributions of views.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests/support"))
from known_views import CONE, axial_efficiency, density, distribution, lost

VIEWS = 20_000
BOX, PARTICLES, NOISE = 64, 3000, 12.0
NAMES = ("uniform", "side", "cone", "top")
RESULTS = Path(__file__).parent / "results/orientation.json"


def analytic(name: str) -> dict[str, float]:
    """What an endless number of views gives."""
    if name == "top":
        return {"SCF": 0.0, "unsampled %": 100.0, "E_od": 0.0}
    z, weight = np.polynomial.legendre.leggauss(600)
    sampled = density(name, z)
    gaps = 1 - math.sin(CONE) if name == "cone" else 0.0
    factor = 0.0 if gaps else 2 / (weight / sampled).sum()
    return {"SCF": factor, "unsampled %": 100 * gaps, "E_od": axial_efficiency(name)}


def sampling_rows() -> list[dict[str, Any]]:
    """Each distribution's measures beside its analytic values."""
    rows = []
    for name in NAMES:
        started = time.perf_counter()
        found = orientation.sample_fourier(distribution(name, VIEWS, 1))
        efficiency = orientation.efficiency(found)
        row = {
            "views": name,
            "SCF": found.scf,
            "SCF*": found.scf_star,
            "unsampled %": 100 * found.unsampled,
            "E_od": efficiency,
            "analytic": analytic(name),
            "s": time.perf_counter() - started,
        }
        rows.append(row)
        known = row["analytic"]
        print(
            f"{name}: SCF {found.scf:.3f} ({known['SCF']:.3f}), SCF* {found.scf_star:.4f}, unsampled"
            f" {row['unsampled %']:.1f} % ({known['unsampled %']:.1f}), E_od {efficiency:.3f}"
            f" ({known['E_od']:.3f}), {row['s']:.1f} s",
            flush=True,
        )
    return rows


def attraction_rows(seeds: int) -> list[dict[str, Any]]:
    """How often attraction is reported, by the part of the wrong poses that one direction attracts."""
    rows = []
    for attracted in (0.0, 0.02, 0.05, 0.15):
        found = [orientation.attraction(*lost(0.3, attracted, seed), draws=300) for seed in range(seeds)]
        chances = np.array([each.probability for each in found])
        row = {
            "attracted % of wrong poses": 100 * attracted,
            "seeds": seeds,
            "reported at 0.05 %": 100 * (chances <= 0.05).mean(),
            "reported at 0.01 %": 100 * (chances <= 0.01).mean(),
            "index over chance": float(np.mean([each.index - each.expected for each in found])),
        }
        rows.append(row)
        print(", ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)
    return rows


def figures(found: directional_fsc.DirectionalFSC) -> dict[str, float]:
    """All that is told of a directional FSC."""
    occupied = directional_fsc.occupancy(found)
    resolutions = found.resolutions(float(BOX))
    middle = int((occupied.part - 0.5).abs().argmin())
    worst = found.directions[found.last_shells().argmin()]
    return {
        "cFAR": directional_fsc.area_ratio(found),
        "sphericity": directional_fsc.sphericity(found),
        "FSO 0.1 over 0.9": occupied.fall,
        "Bingham at FSO 0.5": float(occupied.bingham[middle]),
        "best px": float(resolutions.min()),
        "median px": float(resolutions.median()),
        "worst px": float(resolutions.max()),
        "worst direction to the axis, degrees": math.degrees(math.acos(min(1.0, float(worst[2].abs())))),
    }


def isotropic_row(seeds: int) -> dict[str, Any]:
    """Measures of isotropic half maps: their ranges, and how often limits are passed."""
    shape = (BOX,) * 3
    weight = 10 * torch.exp(-math.log(10 * math.sqrt(6)) * (frequency_radius(shape) / 0.25) ** 2)
    mask = soft_sphere(shape, radius=0.35 * BOX, edge=4.0)
    rows = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        truth = irfft3(rfft3(torch.randn(shape, generator=generator)) * weight, shape=shape)
        halves = [truth + torch.randn(shape, generator=generator) for _ in range(2)]
        rows.append(figures(directional_fsc.directional_fsc(*halves, mask=mask)))
    limit = 11.07
    row = {
        "seeds": seeds,
        "cFAR below 0.5 %": 100 * float(np.mean([each["cFAR"] < 0.5 for each in rows])),
        "Bingham over its limit %": 100
        * float(np.mean([each["Bingham at FSO 0.5"] > limit for each in rows])),
        "least cFAR": min(each["cFAR"] for each in rows),
        "median cFAR": float(np.median([each["cFAR"] for each in rows])),
        "least sphericity": min(each["sphericity"] for each in rows),
        "greatest FSO 0.1 over 0.9": max(each["FSO 0.1 over 0.9"] for each in rows),
    }
    print("isotropic: " + ", ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)
    return row


def particle() -> Tensor:
    """A volume of blobs whose detail falls off, within a ball."""
    shape = (BOX,) * 3
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    weight = torch.exp(-30 * frequency_radius(shape) ** 2)
    return irfft3(rfft3(noise) * weight, shape=shape) * soft_sphere(shape, radius=0.3 * BOX, edge=3.0)


def reconstruction_rows() -> list[dict[str, Any]]:
    """Directional FSC of reconstructions from noisy projections."""
    truth, mask = particle(), soft_sphere((BOX,) * 3, radius=0.34 * BOX, edge=4.0)
    rows = []
    for name in NAMES:
        halves = []
        for half in (1, 2):
            rotations = distribution(name, PARTICLES, half).float()
            images = torch.cat([project_volume(truth, part) for part in rotations.split(500)])
            generator = torch.Generator().manual_seed(half)
            images = images + NOISE * float(images.std()) * torch.randn(images.shape, generator=generator)
            halves.append(reconstruct(fft_centred(images, ndim=2), rotations, regularisation=1e-2))
        for how, within in (("masked", mask), ("without a mask", None)):
            row = figures(directional_fsc.directional_fsc(*halves, mask=within))
            rows.append({"views": name, "maps": how} | row)
            told = ", ".join(f"{key} {value:.3g}" for key, value in row.items())
            print(f"reconstruction, {name}, {how}: {told}", flush=True)
    return rows


def time_rows(boxes: list[int]) -> list[dict[str, Any]]:
    """Seconds and gigabytes of 300 directions in larger boxes."""
    rows = []
    for box in sorted(boxes):
        halves = [torch.randn(box, box, box) for _ in range(2)]
        started = time.process_time()
        directional_fsc.directional_fsc(*halves)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
        rows.append({"box": box, "CPU s": time.process_time() - started, "peak GB": peak})
        print(f"box {box}: {rows[-1]['CPU s']:.1f} s of CPU, {peak:.1f} GB", flush=True)
    return rows


def main() -> None:
    """Run everything, print the figures and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=100, help="data sets for the rates of false alarms")
    parser.add_argument("--boxes", type=int, nargs="*", default=[128, 256])
    parser.add_argument("--record", type=Path, default=RESULTS, help="JSON file to write")
    given = parser.parse_args()
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    record: dict[str, Any] = {"machine": machine, "views": VIEWS, "sampling": sampling_rows()}
    record |= {"attraction": attraction_rows(given.seeds), "isotropic": isotropic_row(given.seeds)}
    record |= {"reconstructions": reconstruction_rows(), "time": time_rows(given.boxes)}
    given.record.write_text(json.dumps(rounded(record), indent=1) + "\n")


if __name__ == "__main__":
    main()
