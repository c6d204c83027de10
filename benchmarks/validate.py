"""Whether `halfmap validate` finds what is wrong, and passes what is right, on particles with truth.

Images of cytochrome c oxidase hold nothing but noise beyond 6 Å. An honest refinement has half sets that
never meet; in the over-fitted one particles are aligned to unfiltered maps of halves that are drawn anew each
time. Five seeds of each; wanted are green and red for the finding on independent half sets, and that no other
finding on over-fitting of an honest one is red.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from class2d import last_job, timed
from class2d_data import halfmap
from halfmap.data import Poses
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.rotations import from_rotation_vector
from halfmap.search.backprojector import Backprojection
from halfmap.search.disc import FourierDisc
from halfmap.search.halfmaps import HalfSums
from halfmap.search.lens_noise import ring_means
from halfmap.search.maxima import climb
from halfmap.search.prepared import prepare
from halfmap.search.projector import SplineVolume
from halfmap.search.reference import noise_around
from halfmap.search.source import Source
from halfmap.steps.validate.controls import random_phases

NOISE_BEYOND_A = 6.0
MODEL = "1m56.pdb.gz --atom-b-factor 60 --box-size 64 --pixel-size 2 --n-particles 2000 --snr 0.1 --shift 4"
DIAMETER = 115.0
ROUNDS = 6
"""Of the alignment of all particles to one map of them."""

BOOST = 5.0
"""Of the weight of frequencies where there is but noise."""

TRIED, TRIED_DEG, TRIED_PX = 3, 4.0, 1.5
"""Poses that each alignment begins at, and how far they are from the last one."""

JUDGED = "Over-fitting: independent half sets"


def make(folder: Path, models: Path, seed: int) -> None:
    """Simulate particles, with noise beyond 6 Å; made once."""
    if (folder / "input.star").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    halfmap(f"simulate particles {models}/{MODEL} --seed {seed}", folder)
    job = folder / "Simulate/job001"
    particles = read_particles(job / "particles.star")
    for path in sorted((job / "Particles").glob("*.mrcs")):
        pixel_size = read_header(path).pixel_size
        assert pixel_size is not None
        images = torch.from_numpy(np.array(read_mrc(path), np.float32))
        shell = round(images.shape[-1] * pixel_size / NOISE_BEYOND_A)
        generator = torch.Generator().manual_seed(1000 * seed + int(path.stem))
        spoilt = random_phases(images, shell, generator)
        write_mrc(path, spoilt.numpy(), pixel_size=pixel_size, stack=True)
    write_particles(folder / "input.star", particles)


def refined(folder: Path) -> Path:
    """Refine as one should; the job's folder."""
    reference = "Simulate/job001/truth_map.mrc"
    command = f"refine input.star --reference {reference} --diameter {DIAMETER}"
    if not (folder / "Refine").exists():
        halfmap(command, folder)
    return last_job(folder, "Refine")


def overfitted(folder: Path, honest: Path) -> Path:
    """Align all particles to one unfiltered map of them, over and over; a folder as of a refinement."""
    out = folder / "Overfitted"
    if (out / "particles.star").exists():
        return out
    out.mkdir(exist_ok=True)
    particles = read_particles(honest / "particles.star")
    source = Source.of(honest / "particles.star", folder, memory=1 << 30)
    images = source.images
    disc = FourierDisc(images.box, images.box // 2 - 1)
    groups = np.zeros(len(particles), np.intp)
    how = {"pixel_size": images.pixel_size, "diameter": DIAMETER, "seed": 1}
    noise, _ = noise_around(source, groups, disc, **how)
    mask = torch.from_numpy(read_mrc(honest / "mask.mrc").astype(np.float32))
    poses, rng = particles.poses, np.random.default_rng(7)
    for _ in range(ROUNDS):
        # Drawn anew each time, halves share all that they align to; a map of all of them would hold each
        # particle where it is by its own noise.
        halves = rng.permutation(len(particles)) % 2
        volumes = maps(source, disc, noise, groups, poses, halves)
        poses = aligned(source, disc, noise, groups, poses, [each * mask for each in volumes], halves, rng)
    halves = rng.permutation(len(particles)) % 2
    for number, volume in enumerate(maps(source, disc, noise, groups, poses, halves), 1):
        write_mrc(out / f"run_half{number}_class001_unfil.mrc", volume.numpy(), pixel_size=images.pixel_size)
    write_mrc(out / "mask.mrc", mask.numpy(), pixel_size=images.pixel_size)
    # As a program that has no half sets writes it: none of the errors that another refinement had stated.
    rows = particles.rows.drop([name for name in particles.rows.columns if name.startswith("hm")])
    told = particles.with_rows(rows).with_poses(poses)
    write_particles(out / "particles.star", told.with_columns(pl.Series("rlnRandomSubset", halves + 1)))
    return out


def batches(source: Source, disc: FourierDisc, noise: Any, groups: np.ndarray) -> Any:
    """Rows and weighted images of all particles, some at a time."""
    images = source.images
    whole = torch.ones(images.box, images.box)
    for rows, pictures in images.stream(np.arange(len(groups)), 32):
        ready = prepare(pictures, whole, source.ctf[torch.from_numpy(rows)], disc, images.pixel_size)
        transfer = ring_means(disc, ready.ctf.square())
        power = noise.of_images(torch.from_numpy(groups[rows]), transfer)
        yield rows, ready.weighted(ready.whole, torch.ones(len(rows)), power)


def maps(
    source: Source, disc: FourierDisc, noise: Any, groups: np.ndarray, poses: Poses, halves: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Unfiltered maps of both half sets."""
    pixel_size = source.images.pixel_size
    sums = [Backprojection.empty(disc.box, disc.radius) for _ in (0, 1)]
    for rows, weighted in batches(source, disc, noise, groups):
        for half in (0, 1):
            own = torch.from_numpy(np.flatnonzero(halves[rows] == half))
            some = poses[torch.from_numpy(rows)[own]]
            part = type(weighted)(disc, weighted.linear[own], weighted.squared[own])
            sums[half].add(part, some.rotations, some.shifts_A / pixel_size)
    return HalfSums.of((sums[0], sums[1])).unfiltered()


def aligned(
    source: Source,
    disc: FourierDisc,
    noise: Any,
    groups: np.ndarray,
    poses: Poses,
    volumes: list[Tensor],
    halves: np.ndarray,
    rng: np.random.Generator,
) -> Poses:
    """Poses nearby at which each image is most like the map of the half that it is not in.

    By all frequencies at once, and those where there is but noise counting the more.
    """
    pixel_size = source.images.pixel_size
    splines = [SplineVolume.of(volume, radius_px=disc.radius) for volume in volumes]
    fine = disc.rings > round(disc.box * pixel_size / NOISE_BEYOND_A)
    boost = torch.where(fine, BOOST, 1.0)
    rotations, shifts = poses.rotations.double().clone(), poses.shifts_A.double().clone()
    for rows, weighted in batches(source, disc, noise, groups):
        index = torch.from_numpy(rows)
        own = poses[index]
        for half in (0, 1):
            part = torch.from_numpy(np.flatnonzero(halves[rows] == half))
            if not len(part):
                continue
            some = type(weighted)(disc, weighted.linear[part] * boost, weighted.squared[part] * boost)
            start = own.rotations[part].double(), own.shifts_A[part].double() / pixel_size
            how = {"radii": (disc.radius,), "deviation_px": 5.0, "most": 1}
            found = climb(splines[1 - half], some, *around(*start, rng), **how)
            rotations[index[part]] = found.poses.rotations[found.best].double()
            shifts[index[part]] = found.poses.shifts_px[found.best].double() * pixel_size
    return Poses(rotations, shifts)


def around(rotations: Tensor, shifts_px: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Each of some poses and others near it, with the numbers of those that they are about."""
    n = len(rotations)
    turns = torch.from_numpy(rng.normal(0, TRIED_DEG, (n, TRIED, 3)))
    moves = torch.from_numpy(rng.normal(0, TRIED_PX, (n, TRIED, 2)))
    turns[:, 0], moves[:, 0] = 0, 0
    near = from_rotation_vector(turns) @ rotations[:, None]
    owner = torch.arange(n).repeat_interleave(TRIED)
    return near.flatten(0, 1), (shifts_px[:, None] + moves).flatten(0, 1), owner


def examined(folder: Path, job: Path, words: str = "") -> dict[str, Any]:
    """Findings of `halfmap validate` on a refinement, and the time it took."""
    command = [sys.executable, "-m", "halfmap", "validate", f"{job}/run_half1_class001_unfil.mrc"]
    command += ["--particles", f"{job}/particles.star", "--mask", f"{job}/mask.mrc", *words.split()]
    seconds = timed([*command, "--project", "."], folder, folder / "validate.log")
    found = json.loads((last_job(folder, "Validate") / "findings.json").read_text())["findings"]
    return seconds | {one["name"]: one for one in found}


def overfitting(scratch: Path, models: Path, seed: int) -> list[dict[str, Any]]:
    """Rows of one seed: honest and over-fitted."""
    folder = (scratch / f"overfitted{seed}").resolve()
    make(folder, models, seed)
    honest = refined(folder)
    rows = []
    for name, job in (("honest", honest), ("over-fitted", overfitted(folder, honest))):
        found = examined(folder, job)
        values = found[JUDGED]["values"]
        row = {"case": name, "seed": seed, "light": found[JUDGED]["light"]}
        row["reported Å"] = found["Agreement of the half maps"]["values"]["resolution_A"]
        row["independent Å"] = values["resolution_independent_A"]
        row["others not green"] = ", ".join(
            f"{key}: {one['light']}"
            for key, one in found.items()
            if isinstance(one, dict) and one["light"] in ("amber", "red") and key != JUDGED
        )
        rows.append(row | {key: found[key] for key in ("wall s", "CPU s")})
        show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    print(
        "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True
    )


def main() -> None:
    """Make the data where they are not yet, examine, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("../shared/data/models"))
    parser.add_argument("--scratch", type=Path, required=True, help="folder of projects, kept")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3, 4, 5])
    options = parser.parse_args()
    rows = [
        row for seed in options.seeds for row in overfitting(options.scratch, options.models.resolve(), seed)
    ]
    path = Path(__file__).parent / "results" / "validate.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {(row["case"], row["seed"]) for row in rows}
    rows += [row for row in kept if (row["case"], row["seed"]) not in done]
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
