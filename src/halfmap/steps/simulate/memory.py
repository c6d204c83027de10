"""How much memory a simulation will take, known before it begins."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from halfmap.engine import Context
from halfmap.engine.memory import require_memory, require_memory_of_each
from halfmap.log import log
from halfmap.steps.simulate.solvent import solvent_size

if TYPE_CHECKING:
    from halfmap.steps.simulate.specimen import Specimen
    from halfmap.steps.simulate.step import Simulate

# Bytes, measured: they hold within a tenth of the peak for molecules of 0.4 to 10 MDa.
_PROCESS = 0.30e9
_PER_BLOCK_VOXEL, _BLOCKS = 20.0, 0.30e9
_PER_ATOM_LAID, _PER_ATOM = 900.0, 270.0
_PER_STACK_PIXEL, _PER_MICROGRAPH_PIXEL, _PER_MOVIE_PIXEL = 28.0, 52.0, 52.0
_WORTH_SAYING = 2e9


def check(
    step: Simulate, ctx: Context, specimen: Specimen, *, n_atoms: int, map_voxels: int, n_states: int
) -> None:
    """Stop before the work where memory will not suffice, and say what large boxes will take.

    Parameters
    ----------
    step, ctx, specimen
        What is to be simulated, how, and the boxes chosen.
    n_atoms, map_voxels : int
        Atoms of the largest model; longest edge of the largest map.
    n_states : int
        Conformations, as many of which as there are workers are prepared at a time.

    Raises
    ------
    ResourceError
        If it will not.
    """
    preparing = preparing_bytes(specimen, n_atoms=n_atoms, map_voxels=map_voxels)
    imaging = imaging_bytes(step, specimen)
    workers = 1 if ctx.options.is_remote else ctx.options.workers
    # A single conformation is prepared in this process, whatever the workers.
    need = max(_in_processes(min(workers, n_states), preparing), _in_processes(workers, imaging))
    n = specimen.fine_box
    if need > _WORTH_SAYING:
        log.info("a volume of %d x %d x %d: about %.1f GB of memory will be needed", n, n, n, need / 1e9)
    remedy = "give a coarser --pixel-size, or take a machine with more memory"
    if need > max(preparing, imaging) + _PROCESS:
        remedy = f"use fewer --workers, {remedy}"
    purpose = f"a simulation with a volume of {n} x {n} x {n} voxels"
    if ctx.options.is_remote:
        return require_memory_of_each(need, ctx.options, purpose=purpose, hint=remedy)
    return require_memory(need, purpose=purpose, hint=remedy)


def _in_processes(workers: int, each: float) -> float:
    """Bytes of the process and as many workers as there are; one works in the process itself."""
    return _PROCESS + each if workers == 1 else _PROCESS + workers * (_PROCESS + each)


def preparing_bytes(specimen: Specimen, *, n_atoms: int, map_voxels: int = 0) -> float:
    """Peak of preparing one conformation, besides the process itself.

    The potential's spectrum, from 1.5 times finer planes, comes first. Then the potential stays while the
    spectrum of the water is made from planes of 0.9 Å. Padded transforms go to the disk in parts.
    """
    n = specimen.fine_box
    if not n_atoms:
        return 12.0 * max(n, map_voxels) ** 3
    planes = max(n, solvent_size(n, specimen.fine_pixel))
    laying = 6.0 * n**3 + _PER_ATOM_LAID * n_atoms
    watering = 4.0 * n**3 + 4.0 * n**2 * planes + _PER_ATOM * n_atoms
    return min(_BLOCKS, _PER_BLOCK_VOXEL * n**3) + max(laying, watering)


def imaging_bytes(step: Simulate, specimen: Specimen) -> float:
    """Peak of simulating one stack, micrograph or movie, besides the process itself."""
    from halfmap.steps.simulate import exposure, molecules
    from halfmap.steps.simulate.optics import Defocus
    from halfmap.steps.simulate.step import SimulateExposures, SimulateMovies, SimulateParticles

    pixel = specimen.pixel_size
    if isinstance(step, SimulateParticles):
        return _PER_STACK_PIXEL * min(step.per_micrograph, step.n_particles) * specimen.box**2
    if not isinstance(step, SimulateExposures):
        return 0.0
    optics = exposure.microscope(step)
    farthest = Defocus(step.defocus_max, step.defocus_max, 0.0)
    patch = molecules.patch_size(specimen, optics, farthest, pixel)
    moved = 1.5 * (step.drift + step.local_motion) if isinstance(step, SimulateMovies) else 0.0
    obstacles = step.carbon > 0 or step.contaminants > 0
    fringe = molecules.reach(optics, step.defocus_max, pixel) if obstacles else 0.0
    size = step.height * step.pixel_size, step.width * step.pixel_size
    canvas = math.prod(length / pixel + 2 * (moved + fringe) / pixel for length in size)
    # Filters of all planes of noise in tilted ice are kept from frame to frame.
    range_A = math.hypot(*size) * math.tan(math.radians(step.tilt))
    filters = 2.0 * math.ceil(range_A / exposure.PLANE_SPACING_A) if isinstance(step, SimulateMovies) else 0.0
    per_pixel = _PER_MOVIE_PIXEL if isinstance(step, SimulateMovies) else _PER_MICROGRAPH_PIXEL
    return (per_pixel + filters) * canvas + (4.0 * step.particles + 16 * 20) * patch**2
