"""The search for poses in three dimensions: rate of its products, and time per particle, step by step.

Needs the 3D data of ``class2d.py`` (``--runs poses``): simulated particles of box 96 and RELION's
time on them. Times are CPU times of one thread, the shortest of several calls: other
work on the machine moves them less.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfmap.io.mrc import read_mrc
from halfmap.io.tables import read_particles
from halfmap.ops.ctf import ctf
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.masks import soft_circle
from halfmap.ops.symmetry import symmetric_distance
from halfmap.search.backprojector import Backprojection
from halfmap.search.disc import DiscImages, FourierDisc
from halfmap.search.inplane import Images, _product, _rfft
from halfmap.search.local import refine_poses
from halfmap.search.particles import ParticleImages
from halfmap.search.polar import PolarGrid
from halfmap.search.projector import SplineVolume
from halfmap.search.sampling import DirectionSearch, subdivided

BAR_RATE, BAR_RELION = 0.6, 0.1
ORDER, RANGE_PX, STEP_PX, DEVIATION_PX = 2, 5.0, 2.0, 4.0
SUPPORT_A, START_A = 100.0, 30.0


def seconds(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Shortest CPU times of functions that take turns."""
    best = [float("inf")] * len(functions)
    for _ in range(repeats + 1):  # the first call compiles and warms up
        for i, function in enumerate(functions):
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


def rate(data: Data, radius: int, repeats: int) -> dict[str, float]:
    """Rate of the exhaustive pass' products, and its time, beside the plain product of large matrices."""
    disc, grid = FourierDisc(data.box, radius), PolarGrid(data.box, radius, SUPPORT_A / data.pixel_size)
    volume = SplineVolume.of(data.volume)
    noise = data.noise(disc, 500)
    search = DirectionSearch(
        grid, volume, order=ORDER, range_px=RANGE_PX, step_px=STEP_PX, deviation_px=DEVIATION_PX
    )
    batch = search.batch
    samples = grid.sample(data.get(batch))
    transfer = data.ctf(grid.frequencies, batch).reshape(samples.shape)
    images = Images.of(samples, transfer, noise, grid)
    shifts = search.shifts_px.expand(batch, -1, 2)
    shifted, powers = images.shifted(shifts, grid), _rfft(images.squared)
    plain = torch.randn(2048, 2048)
    mine = [
        lambda: plain @ plain,
        lambda: (
            _product(shifted, search.references.linear),
            _product(powers, search.references.squared),
        ),
        lambda: search(samples, transfer, noise),
    ]
    sgemm, products, whole = seconds(mine, repeats)
    k, rings = len(search.rows), grid.rings
    count = 2 * 2 * rings * 2 * k * (shifted.shape[0] * shifted.shape[1] + powers.shape[0] * batch)
    gemm_rate, product_rate = 2 * 2048**3 / sgemm / 1e9, count / products / 1e9
    return {
        "radius": radius,
        "angles": grid.angles,
        "directions": k,
        "shifts": len(search.shifts_px),
        "particles": batch,
        "MFLOP a particle": count / batch / 1e6,
        "sgemm GFLOP/s": gemm_rate,
        "products GFLOP/s": product_rate,
        "of sgemm": product_rate / gemm_rate,
        "products ms": 1e3 * products / batch,
        "whole pass ms": 1e3 * whole / batch,
        "whole pass GFLOP/s": count / whole / 1e9,
    }


def iteration(data: Data, radius: int, local_radius: int, count: int, repeats: int) -> dict[str, Any]:
    """CPU milliseconds a particle of each step of an iteration, and how near the poses are."""
    disc = FourierDisc(data.box, local_radius)
    grid = PolarGrid(data.box, radius, SUPPORT_A / data.pixel_size)
    noise = data.noise(disc, 500)
    prior = {"deviation_px": DEVIATION_PX}
    volume = SplineVolume.of(data.volume, radius_px=local_radius)
    steps = {"range_px": RANGE_PX, "step_px": STEP_PX, "most": 12}
    search = DirectionSearch(grid, volume, order=ORDER, **steps, **prior)
    images = data.get(count)
    samples = grid.sample(images)
    transfer = data.ctf(grid.frequencies, count).reshape(samples.shape)
    weighted = DiscImages.of(disc, disc.transform(images), data.ctf(disc.points, count), noise)
    sums = Backprojection.empty(data.box, local_radius)
    coarse = search(samples, transfer, noise[:, : radius + 1])
    fine = subdivided(coarse, volume, weighted, **prior, most=6)
    best = fine.best()
    local = refine_poses(volume, weighted, fine.rotations[best], fine.shifts_px[best], **prior)
    names = ("prepare", "exhaustive", "subdivide", "polish", "insert")
    times = seconds(
        [
            lambda: (grid.sample(images), disc.transform(images), data.ctf(disc.points, count)),
            lambda: search(samples, transfer, noise[:, : radius + 1]),
            lambda: subdivided(coarse, volume, weighted, **prior, most=6),
            lambda: refine_poses(volume, weighted, fine.rotations[best], fine.shifts_px[best], **prior),
            lambda: sums.add(weighted, local.rotations, local.shifts_px),
        ],
        repeats,
    )
    each = {f"{name} ms": 1e3 * value / count for name, value in zip(names, times, strict=True)}
    truth = data.truth.rotations[:count].double()
    errors = {
        f"median error {name}°": float(symmetric_distance(rotations, truth, "D2").median())
        for name, rotations in (
            ("exhaustive", coarse.rotations[coarse.best()]),
            ("subdivided", fine.rotations[best]),
            ("polished", local.rotations),
        )
    }
    kept = {"candidates": len(coarse.owner) / count, "stated sd°": float(local.deviations[:, :3].median())}
    total = {"radius": radius, "local radius": local_radius, "CPU ms": sum(each.values())}
    return total | each | kept | errors


def show(row: dict[str, Any]) -> None:
    """Print one row of a table."""
    print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)


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
    record: dict[str, Any] = {"machine": platform.machine(), "rates": rates, "iterations": times}
    peer = options.poses / "relion3d/seconds.json"
    if peer.exists():
        record["RELION"] = json.loads(peer.read_text())
        show(record["RELION"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    if min(row["of sgemm"] for row in rates) < BAR_RATE:
        raise SystemExit(f"products run at less than {BAR_RATE:.0%} of the plain product's rate")


if __name__ == "__main__":
    main()
