"""A sample of the particles with its half sets, and the half maps that it gives at the poses of the table."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.data import ParticleSet
from halfmap.data.optics import GROUP
from halfmap.errors import ItemsFailedError
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops import symmetry
from halfmap.ops.fsc import corrected_fsc
from halfmap.search.backprojector import Backprojection
from halfmap.search.checkpoint import load_arrays, save_arrays
from halfmap.search.disc import FourierDisc
from halfmap.search.folds import SUBSET, half_sets
from halfmap.search.halfmaps import HalfSums
from halfmap.search.lens_noise import LensNoise, ring_means
from halfmap.search.padding import affordable_padding, map_bytes
from halfmap.search.particles import ParticleImages
from halfmap.search.prepared import prepare, refuse_stretched
from halfmap.search.reference import noise_around
from halfmap.search.shared_map import added
from halfmap.search.source import MICROGRAPH, Source, image_memory, numbered, phase_flipped
from halfmap.search.stored_sums import StoredSums, store

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.validate.finding import Given

FOLDER, TABLE = "Sample", "particles.star"
_GROWTH = "growth.npz"

PARTS = 1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2
"""Of each half set, put back one after the other: the map grows by twice as many particles each time."""

_FEWEST = 20
"""Particles of a half set without which no map is made."""

_BATCH = 32

_SAME = 0.01
"""Relative difference of sizes that calibration explains."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Some of the particles, or all.

    Attributes
    ----------
    table : path
        Of these, with their half sets.
    particles : ParticleSet
    source : Source
        Of their images.
    box, pixel_size : int, float
        Of the images, px and Å.
    halves, groups : array (n,)
        Half set, 0 or 1, and optics group of each.
    noise : LensNoise
        Around them.
    padding : float
        Of transforms, over the box.
    device : str
    """

    table: Path
    particles: ParticleSet
    source: Source
    box: int
    pixel_size: float
    halves: NDArray[np.intp]
    groups: NDArray[np.intp]
    noise: LensNoise
    padding: float
    device: str

    def disc(self) -> FourierDisc:
        """All coefficients of an image."""
        return FourierDisc(self.box, self.box // 2 - 1, self.device)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some particles of one half set."""

    name: str
    rows: NDArray[np.intp]


def draw_sample(ctx: Context, given: Given) -> Sample | None:
    """Draw particles, and half sets where they have none; nothing if the images are not the map's.

    Raises
    ------
    TableError
        If images or half sets cannot be used.
    """
    particles, step = given.particles, given.step
    assert particles is not None
    refuse_stretched(particles.ctf, particles.path)
    images = ParticleImages(particles, ctx.project, memory=0)
    apart = abs(images.pixel_size / given.halves.pixel_size - 1)
    if images.box != given.halves.box or apart > _SAME:
        return None
    halves = half_sets(particles, numbered(particles, MICROGRAPH)[1], seed=step.seed, fewest=_FEWEST)
    rng = np.random.default_rng(step.seed)
    drawn = np.sort(rng.permutation(len(particles))[: step.sample])
    some = particles.select(np.isin(np.arange(len(particles)), drawn))
    some = some.with_columns(pl.Series(SUBSET, halves[drawn] + 1))
    folder = ctx.folder / FOLDER
    folder.mkdir(exist_ok=True)
    table = folder / TABLE
    if not table.exists():
        write_particles(table, some)
    padding = affordable_padding(images.box, step.memory * 1e9, ctx.options)
    each = map_bytes(images.box, padding)
    memory = image_memory(step.memory * 1e9, ctx.options, each=each, purpose="controls")
    source = Source.of(table, ctx.project, memory)
    groups = numbered(some, GROUP)[1]
    disc = FourierDisc(images.box, images.box // 2 - 1, ctx.device)
    diameter = min(given.diameter, 0.95 * given.side)
    noise, _ = noise_around(
        source, groups, disc, pixel_size=images.pixel_size, diameter=diameter, seed=step.seed
    )
    return Sample(
        table=table,
        particles=read_particles(table),
        source=source,
        box=images.box,
        pixel_size=images.pixel_size,
        halves=halves[drawn],
        groups=groups,
        noise=noise,
        padding=padding,
        device=ctx.device,
    )


@dataclass(frozen=True, eq=False)
class Growth:
    """Half maps of more and more particles.

    Attributes
    ----------
    particles : array (k,) of int
        In both half sets together.
    curves : Tensor (k, shells)
        Corrected correlation within the mask.
    """

    particles: NDArray[np.intp]
    curves: Tensor


def grow(ctx: Context, given: Given, sample: Sample) -> Growth:
    """Make half maps of a sixteenth of the particles of each half set, an eighth, and so on to all."""
    folder = ctx.folder / FOLDER
    kept = folder / _GROWTH
    if kept.exists():
        found = load_arrays(kept)
        _tidy(folder)
        return Growth(found["particles"], torch.from_numpy(found["curves"]))
    rng = np.random.default_rng(given.step.seed)
    chunks = []
    for half in (0, 1):
        own = rng.permutation(np.flatnonzero(sample.halves == half))
        ends = np.round(np.cumsum(PARTS) * len(own)).astype(np.intp)
        pieces = np.split(own, ends[:-1])
        chunks += [Chunk(f"half{half + 1}_{i + 1}", rows) for i, rows in enumerate(pieces)]
    work = functools.partial(put_back, sample=sample, group=given.step.symmetry, folder=folder)
    sizes = ctx.map(work, chunks, unit="chunk")
    if len(sizes) < len(chunks):
        raise ItemsFailedError("a part of the particles failed", hint="see the errors above; then resume")
    stored = [
        StoredSums.open([folder / f"{chunk.name}.npy"], size)
        for chunk, size in zip(chunks, sizes, strict=True)
    ]
    n, generator = len(PARTS), torch.Generator().manual_seed(given.step.seed)
    curves, counts = [], []
    for last in range(1, n + 1):
        halves = added(stored[:last]), added(stored[n : n + last])
        first, second = HalfSums.of(halves).unfiltered()
        curves.append(corrected_fsc(first, second, mask=given.mask, generator=generator).corrected)
        counts.append(sum(len(chunk.rows) for chunk in (*chunks[:last], *chunks[n : n + last])))
    grown = Growth(np.array(counts), torch.stack(curves))
    save_arrays(kept, particles=grown.particles, curves=grown.curves.numpy())
    _tidy(folder)
    return grown


def _tidy(folder: Path) -> None:
    """Remove what the chunks left."""
    for path in folder.glob("half?_*.npy"):
        path.unlink()


def put_back(chunk: Chunk, *, sample: Sample, group: str, folder: Path) -> Sequence[int]:
    """Add the images of a chunk up at their poses, and write the sums."""
    disc = sample.disc()
    sums = Backprojection.empty(
        disc.box, disc.radius, group=group, padding=sample.padding, device=sample.device
    )
    flipped = phase_flipped(sample.particles)
    poses = sample.particles.poses
    for rows, images in sample.source.images.stream(chunk.rows, _BATCH):
        index = torch.from_numpy(rows)
        ready = prepare(
            images.to(sample.device),
            torch.ones(disc.box, disc.box, device=sample.device),
            sample.source.ctf[index],
            disc,
            sample.pixel_size,
            phase_flipped=torch.from_numpy(flipped[rows]),
        )
        transfer = ring_means(disc, ready.ctf.square())
        noise = sample.noise.of_images(torch.from_numpy(sample.groups[rows]).to(transfer.device), transfer)
        weighted = ready.weighted(ready.whole, torch.ones(len(rows), device=sample.device), noise)
        own = poses[index]
        sums.add(
            weighted, own.rotations.to(sample.device), (own.shifts_A / sample.pixel_size).to(sample.device)
        )
    whole = sums if symmetry.order(group) == 1 else sums.symmetrised()
    return store(folder / f"{chunk.name}.npy", whole)
