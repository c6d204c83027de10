"""The molecules of a run, prepared once and stored in the job folder for all workers."""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from halfmap.engine import Context
from halfmap.errors import ParameterError
from halfmap.log import log
from halfmap.steps.simulate import memory
from halfmap.steps.simulate import specimen as molecules
from halfmap.steps.simulate.specimen import Specimen

if TYPE_CHECKING:
    from halfmap.steps.simulate.step import Simulate

SHIPPED_MODEL = "apoferritin.cif.gz"
"""Model taken when none is given; it lies beside this file."""


def model_files(step: Simulate, ctx: Context) -> list[Path]:
    """Models or maps of a run."""
    if step.models:
        return [ctx.resolve(path) for path in step.models]
    return [Path(__file__).with_name(SHIPPED_MODEL)]


def prepare(step: Simulate, ctx: Context, *, upsampling: int = 1, fragments: bool = False) -> Specimen:
    """Compute the potential of every conformation, and of fragments where they are needed.

    Parameters
    ----------
    step : Simulate
        Parameters.
    ctx : Context
        The loop over conformations is its own, so that a killed job does not compute one again.
    upsampling : int
        Pixels of the images per pixel of the detector, along an edge.
    fragments : bool
        Whether broken molecules are needed.

    Raises
    ------
    ParameterError
        If the box is too small, or models to morph between differ in their atoms.
    ResourceError
        If the memory will not suffice.
    """
    sources = model_files(step, ctx)
    assembly = None if step.assembly.lower() == "none" else step.assembly
    extents = [molecules.measure(source, assembly=assembly) for source in sources]
    diameter = max(extent.diameter for extent in extents)
    box = step.box_size or molecules.choose_box(diameter, step.pixel_size)
    states = molecules.plan_states(sources, morph_states=step.morph_states)
    shares = step.fractions or (1.0,) * len(states)
    specimen = Specimen(
        folder=ctx.folder / "Specimen",
        box=box * upsampling,
        pixel_size=step.pixel_size / upsampling,
        fractions=tuple(share / sum(shares) for share in shares),
        n_broken=molecules.BROKEN_VARIANTS if fragments else 0,
        diameter=diameter,
        sphere=max(extent.sphere for extent in extents),
    )
    memory.check(
        step,
        ctx,
        specimen,
        n_atoms=max(extent.n_atoms for extent in extents),
        map_voxels=max(extent.map_voxels for extent in extents),
        n_states=len(states),
    )
    work = functools.partial(
        molecules.prepare_state,
        specimen=specimen,
        truth_folder=ctx.folder,
        truth_box=box,
        assembly=assembly,
        b_factor=step.atom_b_factor,
        seed=step.seed,
    )
    # A single one gains nothing from a worker of its own, where none of its progress would be seen.
    serial = ctx.options.model_copy(update={"executor": "serial"})
    around = ctx if len(states) > 1 else replace(ctx, options=serial)
    results = around.map(work, states, key=lambda state: f"{state.number + 1:03d}", unit="conformation")
    if len(results) < len(states):
        raise ParameterError("not every conformation could be prepared", hint=ctx.failures[-1].reason)
    for row in results:
        mass = f"{row['mass_kDa']:.0f} kDa with its hydrogens, " if row["mass_kDa"] else ""
        log.info("conformation %d: %smean %.2f V above ice", row["state"] + 1, mass, row["contrast_V"])
    return specimen


def discard(specimen: Specimen, ctx: Context) -> None:
    """Remove the transforms once all images are made of them; the truth maps stay."""
    if not ctx.failures:
        shutil.rmtree(specimen.folder, ignore_errors=True)
