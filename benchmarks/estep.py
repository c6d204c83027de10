"""The search for poses in three dimensions: rate of its products, time per particle, effect of precision.

Needs the 3D data of ``class2d.py`` (``--runs poses``): simulated particles of box 96 and RELION's
time on them. Times are CPU times of one thread, the shortest of several calls: other
work on the machine moves them less.

Rates are given in two ways, both beside that of the plain product of large matrices, sgemm. That of the
products is of the operations they do. The equivalent rate is of the operations that one product of matrices
would need for the same scores (packed real Fourier vectors in the disc, times every angle, shift and
reference), over the time of the whole pass: what the pass saves shows there, and what it does besides.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from class2d import N_3D, RELION_3D, relion
from halfmap.io.mrc import read_mrc
from halfmap.io.tables import read_particles
from halfmap.ops.ctf import ctf
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.masks import soft_circle
from halfmap.ops.symmetry import symmetric_distance
from halfmap.ops.threads import one_blas_thread
from halfmap.search.backprojector import Backprojection
from halfmap.search.disc import DiscImages, FourierDisc
from halfmap.search.inplane import Images
from halfmap.search.local import LocalPoses, refine_poses
from halfmap.search.particles import ParticleImages
from halfmap.search.polar import PolarGrid
from halfmap.search.projector import SplineVolume
from halfmap.search.ring_products import Precision
from halfmap.search.sampling import Candidates, DirectionSearch, subdivided

BAR_RATE, BAR_RELION = 0.6, 0.1
ORDER, RANGE_PX, STEP_PX, DEVIATION_PX = 2, 5.0, 2.0, 4.0
SUPPORT_A, START_A = 100.0, 30.0


def seconds(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Shortest CPU times of functions that take turns."""
    best = [float("inf")] * len(functions)
    for _ in range(repeats + 1):  # the first call compiles and warms up
        for i, function in enumerate(functions):
            with one_blas_thread():
                start = time.process_time()
                function()
                best[i] = min(best[i], time.process_time() - start)
    return best


class Data:
    """Particles, their noise, and a filtered reference."""

    def __init__(self, folder: Path, count: int) -> None:
        particles = read_particles(folder / "Simulate/job001/particles.star")
        self.particles = replace(particles, rows=particles.rows[:count])
        self.images = ParticleImages(self.particles, folder, memory=1 << 30)
        self.box, self.pixel_size = self.images.box, self.images.pixel_size
        volume = torch.from_numpy(np.ascontiguousarray(read_mrc(folder / "reference.mrc"))).float()
        shape = tuple(volume.shape)
        filtered = rfft3(volume) * low_pass(shape, pixel_size=self.pixel_size, resolution=START_A)
        self.volume = irfft3(filtered, shape=shape)
        self.truth = self.particles.poses
        self.mask = soft_circle((self.box, self.box), radius=SUPPORT_A / self.pixel_size - 4, edge=4)

    def get(self, count: int) -> torch.Tensor:
        """Masked images."""
        return self.images.get(np.arange(count)) * self.mask

    def ctf(self, frequencies: torch.Tensor, count: int) -> torch.Tensor:
        """CTFs at frequencies (..., 2) in Fourier pixels, in a row."""
        one = {name: value[:count] for name, value in self.particles.ctf.for_ctf().items()}
        return ctf(frequencies.reshape(-1, 2).float() / self.box, **one).float()

    def noise(self, disc: FourierDisc, count: int) -> torch.Tensor:
        """Power of the images, which at this SNR is that of the noise but for a few per cent."""
        power = disc.transform(self.get(count)).abs().square().double().mean(0)
        sums = torch.zeros(2, disc.radius + 1, dtype=torch.float64)
        sums.index_add_(1, disc.rings, torch.stack([power, torch.ones_like(power)]))
        return (sums[0] / sums[1]).float()[None]


def exhaustive(
    grid: PolarGrid, volume: SplineVolume, *, most: int = 64, precision: Precision = "float32"
) -> DirectionSearch:
    """Make the search of all directions."""
    return DirectionSearch(
        grid,
        volume,
        order=ORDER,
        range_px=RANGE_PX,
        step_px=STEP_PX,
        deviation_px=DEVIATION_PX,
        most=most,
        precision=precision,
    )


def rate(data: Data, radius: int, repeats: int) -> dict[str, float]:
    """Rate of the exhaustive pass' products, and its time, beside the plain product of large matrices."""
    disc, grid = FourierDisc(data.box, radius), PolarGrid(data.box, radius, SUPPORT_A / data.pixel_size)
    volume = SplineVolume.of(data.volume)
    noise = data.noise(disc, 500)
    search = exhaustive(grid, volume)
    batch = search.batch
    samples = grid.sample(data.get(batch))
    transfer = data.ctf(grid.frequencies, batch).reshape(samples.shape)
    images = Images.of(samples, transfer, noise, grid)
    rows = images.shifted(search.shifts_px.expand(batch, -1, 2), grid)
    references = search.references
    plain = torch.randn(2048, 2048)
    mine = [
        lambda: plain @ plain,
        lambda: (references.linear(rows), references.norms(images)),
        lambda: search(samples, transfer, noise),
    ]
    sgemm, products, whole = seconds(mine, repeats)
    shifts, poses, points = len(search.shifts_px), len(search.rows) * grid.angles, disc.count(radius)
    count = shifts * references.linear.operations + references.squared.operations
    # Products of 2 numbers a coefficient for the image, and of 1 for the norm.
    direct = 2 * 2 * points * shifts * poses + 2 * points * poses
    gemm_rate, product_rate = 2 * 2048**3 / sgemm / 1e9, batch * count / products / 1e9
    equivalent_rate = batch * direct / whole / 1e9
    return {
        "radius": radius,
        "angles": grid.angles,
        "directions": len(search.rows),
        "shifts": shifts,
        "particles": batch,
        "products MFLOP a particle": count / 1e6,
        "direct MFLOP a particle": direct / 1e6,
        "sgemm GFLOP/s": gemm_rate,
        "products GFLOP/s": product_rate,
        "of sgemm": product_rate / gemm_rate,
        "products ms": 1e3 * products / batch,
        "whole pass ms": 1e3 * whole / batch,
        "equivalent GFLOP/s": equivalent_rate,
        "equivalent of sgemm": equivalent_rate / gemm_rate,
    }


class Chain:
    """One iteration's search of some particles: exhaustive, then finer, then continuous."""

    def __init__(self, data: Data, radius: int, local_radius: int, count: int) -> None:
        self.disc = FourierDisc(data.box, local_radius)
        self.grid = PolarGrid(data.box, radius, SUPPORT_A / data.pixel_size)
        self.volume = SplineVolume.of(data.volume, radius_px=local_radius)
        noise = data.noise(self.disc, 500)
        self.images = data.get(count)
        samples, transfer, on_disc = self.prepare(data, count)
        self.weighted = DiscImages.of(self.disc, on_disc, data.ctf(self.disc.points, count), noise)
        self.exhaustive_input = samples, transfer.reshape(samples.shape), noise[:, : radius + 1]

    def prepare(self, data: Data, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Samples and CTFs on rings, and coefficients in the disc."""
        on_rings = self.grid.sample(self.images), data.ctf(self.grid.frequencies, count)
        return *on_rings, self.disc.transform(self.images)

    def search(self, precision: Precision = "float32") -> DirectionSearch:
        """Make the exhaustive search."""
        return exhaustive(self.grid, self.volume, most=12, precision=precision)

    def subdivide(self, coarse: Candidates) -> Candidates:
        """Divide the likely cells."""
        return subdivided(coarse, self.volume, self.weighted, deviation_px=DEVIATION_PX, most=6)

    def polish(self, fine: Candidates) -> LocalPoses:
        """Refine the best pose of each."""
        best = fine.best()
        poses = fine.rotations[best], fine.shifts_px[best]
        return refine_poses(self.volume, self.weighted, *poses, deviation_px=DEVIATION_PX)


def iteration(data: Data, radius: int, local_radius: int, count: int, repeats: int) -> dict[str, Any]:
    """CPU milliseconds a particle of each step of an iteration, and how near the poses are."""
    chain = Chain(data, radius, local_radius, count)
    search, sums = chain.search(), Backprojection.empty(data.box, local_radius)
    coarse = search(*chain.exhaustive_input)
    fine = chain.subdivide(coarse)
    local = chain.polish(fine)
    names = ("prepare", "exhaustive", "subdivide", "polish", "insert")
    times = seconds(
        [
            lambda: (chain.prepare(data, count), data.ctf(chain.disc.points, count)),
            lambda: search(*chain.exhaustive_input),
            lambda: chain.subdivide(coarse),
            lambda: chain.polish(fine),
            lambda: sums.add(chain.weighted, local.rotations, local.shifts_px),
        ],
        repeats,
    )
    each = {f"{name} ms": 1e3 * value / count for name, value in zip(names, times, strict=True)}
    truth = data.truth.rotations[:count].double()
    errors = {
        f"median error {name}°": float(symmetric_distance(rotations, truth, "D2").median())
        for name, rotations in (
            ("exhaustive", coarse.rotations[coarse.best()]),
            ("subdivided", fine.rotations[fine.best()]),
            ("polished", local.rotations),
        )
    }
    kept = {"candidates": len(coarse.owner) / count, "stated sd°": float(local.deviations[:, :3].median())}
    total = {"radius": radius, "local radius": local_radius, "CPU ms": sum(each.values())}
    return total | each | kept | errors


def precisions(data: Data, radius: int, local_radius: int, count: int) -> list[dict[str, Any]]:
    """What the precision of the exhaustive pass' factors changes, in it and in the poses at the end.

    Angles are between poses of the same particle, equivalent ones taken for the same; ``changed`` is the
    share of particles with another best cell in the pass, or another end by more than a degree.
    """
    chain = Chain(data, radius, local_radius, count)
    truth = data.truth.rotations[:count].double()
    rows, exact = [], None
    for precision in get_args(Precision):
        coarse = chain.search(precision)(*chain.exhaustive_input)
        local = chain.polish(chain.subdivide(coarse))
        best = coarse.best()
        stages = {
            "exhaustive": (coarse.rotations[best], coarse.shifts_px[best], coarse.log_evidence),
            "polished": (local.rotations, local.shifts_px, local.log_likelihood),
        }
        exact = exact or stages
        row: dict[str, Any] = {"precision": precision, "radius": radius, "particles": count}
        for name, (rotations, shifts, logs) in stages.items():
            angle = symmetric_distance(rotations, exact[name][0], "D2")
            moved = (shifts - exact[name][1]).norm(dim=1)
            other = (angle > 1e-3) | (moved > 1e-3) if name == "exhaustive" else angle > 1
            row |= {
                f"{name} changed": float(other.double().mean()),
                f"{name} angle° median": float(angle.median()),
                f"{name} angle° mean": float(angle.mean()),
                f"{name} shift px median": float(moved.median()),
                f"{name} shift px mean": float(moved.mean()),
                f"{name} log-likelihood median": float((logs - exact[name][2]).abs().median()),
                f"{name} error° median": float(symmetric_distance(rotations, truth, "D2").median()),
            }
        rows.append(row)
    return rows


def peer(folder: Path, times: list[dict[str, Any]]) -> dict[str, Any]:
    """RELION's CPU time a particle and iteration, and ours over it."""
    spent = relion(RELION_3D, folder, "relion3d", "kept")
    each = 1e3 * spent["CPU s"] / (N_3D * spent["iterations"])
    ours = {f"ours to {row['local radius']} of it": row["CPU ms"] / each for row in times}
    return {"RELION's iterations": spent["iterations"], "CPU ms": each, **ours}


def show(row: dict[str, Any]) -> None:
    """Print one row of a table."""
    values = (value if isinstance(value, str) else f"{value:.4g}" for value in row.values())
    print("  ".join(f"{name} {value}" for name, value in zip(row, values, strict=True)), flush=True)


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--poses", type=Path, required=True, help="folder of the 3D data of class2d.py")
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/estep.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Data(options.poses, 500)
    rates = [rate(data, radius, options.repeats) for radius in (16, 32)]
    for row in rates:
        show(row)
    times = [iteration(data, *radii, options.particles, options.repeats) for radii in ((16, 18), (16, 32))]
    for row in times:
        show(row)
    effects = [row for radius in (16, 32) for row in precisions(data, radius, 32, 500)]
    for row in effects:
        show(row)
    record: dict[str, Any] = {
        "machine": platform.machine(),
        "rates": rates,
        "iterations": times,
        "precision": effects,
    }
    if (options.poses / "relion3d/seconds.json").exists():
        record["RELION"] = peer(options.poses, times)
        show(record["RELION"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    if min(row["of sgemm"] for row in rates) < BAR_RATE:
        raise SystemExit(f"products run at less than {BAR_RATE:.0%} of the plain product's rate")
    if (
        "RELION" in record
        and max(record["RELION"][f"ours to {r['local radius']} of it"] for r in times) > BAR_RELION
    ):
        raise SystemExit(f"an iteration takes more than {BAR_RELION:.0%} of RELION's time")


if __name__ == "__main__":
    main()
