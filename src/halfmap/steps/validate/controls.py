"""Refinements that are run to see what a map owes to its images, and what to how it was made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.data import ParticleSet
from halfmap.data.poses import Poses
from halfmap.io.half_maps import read_half_maps
from halfmap.io.mrc import write_mrc
from halfmap.io.mrc_writer import MrcStackWriter
from halfmap.io.tables import read_particles, write_particles
from halfmap.log import log
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft2, rfft2
from halfmap.ops.fsc import resolution
from halfmap.ops.grids import ring_index
from halfmap.steps.validate.sample import FOLDER, Sample

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.validate.finding import Given

RUNS = "Controls"

_COARSER, _LEAST_A = 2.0, 10.0
"""Detail of the map that controls begin with: the resolution times this, or this at least."""

_SUBSTITUTED = 1.5
"""Detail of images that is kept where finer one is made noise, over the resolution."""

SMEARED = 3
"""Shells by which a mask smears what is known into those that are not."""

_BATCH = 256

Change = Callable[[NDArray[np.intp], Tensor], Tensor]
"""Takes rows of the table and their images (b, n, n), and gives images."""


@dataclass(frozen=True, eq=False)
class Control:
    """What a refinement that was run as a control gave.

    Attributes
    ----------
    folder : path
    halves : pair of Tensor (n, n, n)
        Unfiltered half maps.
    particles : ParticleSet
        With the poses that it found.
    curve : Tensor (shells,)
        Corrected correlation within the mask that all share.
    resolution : float
        Å, where it falls below 0.143.
    """

    folder: Path
    halves: tuple[Tensor, Tensor]
    particles: ParticleSet
    curve: Tensor
    resolution: float


def begin(ctx: Context, given: Given) -> None:
    """Write the map and the mask that controls begin with."""
    folder = ctx.folder / FOLDER
    for name, volume in (("reference.mrc", given.halves.mean), ("mask.mrc", given.mask)):
        if not (folder / name).exists():
            write_mrc(folder / name, volume.numpy().astype(np.float32), pixel_size=given.halves.pixel_size)


def first_detail(given: Given) -> float:
    """Detail of the map that controls begin with, Å: what is finer they find anew."""
    return min(max(_COARSER * given.resolution, _LEAST_A), given.side / 4)


def substituted_from(given: Given) -> int:
    """First shell whose phases are made random, coarser than the resolution."""
    return max(2, round(given.side / (_SUBSTITUTED * given.resolution)))


def refine(ctx: Context, given: Given, table: Path, name: str) -> Control:
    """Refine particles near their poses, from a coarse map on, with half sets that never meet.

    Parameters
    ----------
    ctx, given
        Job and what is examined.
    table : path
        Of the particles, with their half sets.
    name : str
        Of the control.
    """
    folder = ctx.folder / FOLDER
    log.info("control: %s", name.replace("_", " "))
    done = ctx.run_within(
        "refine",
        f"{RUNS}/{name}",
        particles=ctx.relative(table),
        reference=ctx.relative(folder / "reference.mrc"),
        mask=ctx.relative(folder / "mask.mrc"),
        symmetry=given.step.symmetry,
        diameter=min(given.diameter, 0.95 * given.side),
        initial_lowpass=first_detail(given),
        regulariser=given.step.regulariser,
        regulariser_everywhere=given.step.regulariser,
        external_program=given.step.external_program,
        weights=None if given.step.weights is None else str(ctx.resolve(given.step.weights)),
        shift_range=given.step.shift_range,
        local=True,
        memory=given.step.memory,
        seed=given.step.seed,
    )
    # Large, and not asked for again.
    table.with_suffix(".mrcs").unlink(missing_ok=True)
    halves = read_half_maps(done / "run_half1_class001_unfil.mrc")
    generator = torch.Generator().manual_seed(given.step.seed)
    curve = halves.corrected_fsc(given.mask, generator=generator).corrected
    found = resolution(curve, pixel_size=halves.pixel_size, box=halves.box)
    particles = read_particles(done / "particles.star")
    return Control(done, (halves.first, halves.second), particles, curve, found)


def changed(ctx: Context, sample: Sample, name: str, change: Change, poses: Poses | None = None) -> Path:
    """Write the images as a control has them, with a table of them, unless they are there.

    Parameters
    ----------
    ctx, sample
        Job, and the particles that are examined.
    name : str
        Of the control.
    change : callable
        Takes rows of the table and their images (b, n, n), and gives images. All are asked for in order.
    poses : Poses, optional
        Of the new images; default: those of the table.

    Returns
    -------
    Path
        Table of the images.
    """
    folder = ctx.folder / FOLDER
    table, stack = folder / f"{name}.star", folder / f"{name}.mrcs"
    if table.exists():
        return table
    box, n = sample.box, len(sample.particles)
    with MrcStackWriter(stack, shape=(box, box), pixel_size=sample.pixel_size) as writer:
        for rows in np.split(np.arange(n), range(_BATCH, n, _BATCH)):
            for image in change(rows, sample.source.images.get(rows)).cpu().numpy():
                writer.append(image)
    names = [f"{i + 1:06d}@{ctx.relative(stack)}" for i in range(n)]
    particles = sample.particles if poses is None else sample.particles.with_poses(poses)
    write_particles(table, particles.with_columns(pl.Series("rlnImageName", names)))
    return table


def substituted(given: Given, from_shell: int) -> Change:
    """Make phases of images random from a shell on.

    Every amplitude stays, so that to a refinement the images are as noisy as they were, and nothing is left
    beyond that shell for it to find.

    References
    ----------
    .. [1] Chen et al. 2013, Ultramicroscopy 135, 24-35, DOI 10.1016/j.ultramic.2013.06.004
    """
    generator = torch.Generator().manual_seed(given.step.seed)
    return lambda _, images: random_phases(images, from_shell, generator)


def passed_low(given: Given, sample: Sample, detail: float) -> Change:
    """Filter images to a detail in Å, and put noise of the same power in the place of what is finer.

    Without it there would be nothing that half maps could agree or disagree in.
    """
    shape = (sample.box, sample.box)
    passed = low_pass(shape, pixel_size=sample.pixel_size, resolution=detail)
    generator = torch.Generator().manual_seed(given.step.seed)

    def change(_: NDArray[np.intp], images: Tensor) -> Tensor:
        noise = random_phases(images, 0, generator)
        kept = rfft2(images) * passed + rfft2(noise) * (1 - passed.square()).sqrt()
        return irfft2(kept, shape=shape)

    return change


def random_phases(images: Tensor, from_shell: int, generator: torch.Generator) -> Tensor:
    """Images (b, n, n) with the phases of white noise from a ring on, and their own amplitudes."""
    shape = tuple(images.shape[-2:])
    spectra = rfft2(images)
    random = rfft2(torch.randn(images.shape, generator=generator))
    random = random * (spectra.abs() / random.abs().clamp_min(torch.finfo(random.real.dtype).tiny))
    return irfft2(torch.where(ring_index(shape) >= from_shell, random, spectra), shape=shape)
