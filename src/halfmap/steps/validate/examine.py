"""Read what is to be examined."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfmap.errors import ParameterError
from halfmap.io.mrc import read_header
from halfmap.ops import symmetry
from halfmap.ops.fsc import resolution
from halfmap.ops.fsc_interval import noise_scatter, resolution_interval
from halfmap.search.half_map_step import refined_particles
from halfmap.search.regularise.named import Settings, find
from halfmap.steps.validate.consensus import match
from halfmap.steps.validate.finding import Given

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.validate.step import ValidateStep

_ALONE = ("other", "template")
"""What is compared with the particles, and says nothing without them."""


def read(step: ValidateStep, ctx: Context) -> Given:
    """Read half maps, mask and particles, and correlate the half maps.

    Raises
    ------
    FileFormatError, ShapeError, TableError, ParameterError
        If one of them cannot be used, or an input needs another one that is not given.
    """
    _ = symmetry.order(step.symmetry)
    for name in _ALONE:
        if getattr(step, name) is not None and step.particles is None:
            raise ParameterError(f"--{name} is compared with --particles", hint="give these too")
    if step.tilted is not None and step.untilted is None and step.particles is None:
        raise ParameterError("--tilted has no untilted partner", hint="give --untilted or --particles")
    particles, other, tilted, untilted = (
        None if path is None else refined_particles(ctx.resolve(path))
        for path in (step.particles, step.other, step.tilted, step.untilted)
    )
    if particles is not None and other is not None:
        # Told now, and not after hours of controls.
        _ = match(particles, other)
    if step.template is not None:
        _ = read_header(ctx.resolve(step.template))
    weights = None if step.weights is None else ctx.resolve(step.weights)
    find(step.regulariser, Settings(external_program=step.external_program, weights=weights))
    halves, mask = step.read(ctx)
    generator = torch.Generator().manual_seed(step.seed)
    fsc = halves.corrected_fsc(mask, generator=generator)
    scatter = noise_scatter(mask, generator=generator)
    where = {"pixel_size": halves.pixel_size, "box": halves.box}
    return Given(
        step=step,
        halves=halves,
        mask=mask,
        fsc=fsc,
        resolution=resolution(fsc.corrected, **where),
        interval=resolution_interval(fsc.corrected, scatter, **where, seed=step.seed),
        scatter=scatter,
        particles=particles,
        diameter=step.diameter or _diameter(mask, halves.pixel_size),
        other=other,
        untilted=particles if untilted is None else untilted,
        tilted=tilted,
    )


def _diameter(mask: Tensor, pixel_size: float) -> float:
    """Of the smallest sphere about the box's centre that holds a mask, Å."""
    inside = (mask > 0.5).nonzero() - len(mask) // 2
    farthest = float(inside.double().norm(dim=1).max()) if len(inside) else len(mask) / 2
    return 2 * min(farthest + 1, len(mask) / 2) * pixel_size
