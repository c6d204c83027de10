"""Stacks of particle images: projections with CTF, shift and coloured noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from halfmap.io.mrc import MrcStackWriter
from halfmap.ops import fourier, grids
from halfmap.ops.threads import one_torch_thread
from halfmap.steps.simulate import exposure as exposures
from halfmap.steps.simulate import scene as scenes
from halfmap.steps.simulate.ice import fading, noise_amplitude, tabulated
from halfmap.steps.simulate.molecules import project_to_pixels
from halfmap.steps.simulate.optics import Defocus

if TYPE_CHECKING:
    from halfmap.steps.simulate.specimen import Specimen
    from halfmap.steps.simulate.step import SimulateParticles

STACKS = "Particles"
_SAMPLE = 100
"""Particles that the mean variance of the signal is measured on."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Particles of one micrograph: where they look, where they sit, what they are."""

    group: int
    beam_tilt_mrad: tuple[float, float]
    middle: Defocus
    defocus: list[Defocus]
    rotation: NDArray
    origin: NDArray
    state: NDArray


def count_stacks(step: SimulateParticles) -> int:
    """Number of micrographs, each a stack of its own."""
    return math.ceil(step.n_particles / step.per_micrograph)


def stack_file(folder: Path, index: int) -> Path:
    """Where stack `index` lies."""
    return folder / STACKS / f"{exposures.name(index)}.mrcs"


def draw_batch(index: int, *, step: SimulateParticles, specimen: Specimen, rng: Generator) -> Batch:
    """Draw the particles of micrograph `index`."""
    n = min(step.per_micrograph, step.n_particles - index * step.per_micrograph)
    group = index % step.optics_groups
    middle = scenes.random_defocus(step, rng)
    depths = rng.uniform(-0.5, 0.5, n) * step.ice_thickness
    return Batch(
        group=group,
        beam_tilt_mrad=scenes.optics_groups(step)[group],
        middle=middle,
        defocus=[middle.further(depth) for depth in depths.tolist()],
        rotation=scenes.random_rotations(n, step, rng),
        origin=rng.normal(0, step.shift, (n, 2)) if step.shift else np.zeros((n, 2)),
        state=scenes.random_states(n, specimen, rng),
    )


def signal(batch: Batch, *, step: SimulateParticles, specimen: Specimen) -> Tensor:
    """Noise-free images (n, box, box): projections of the truth map (V times voxels) with CTF and shift."""
    optics = exposures.microscope(step)
    unit = -2 * optics.phase_per_V_A / math.sqrt(1 - step.amplitude_contrast**2) * specimen.pixel_size
    shape = (specimen.box, specimen.box)
    images = torch.empty((len(batch.state), *shape))
    for state in np.unique(batch.state):
        transform = specimen.transform(int(state))
        for i in np.flatnonzero(batch.state == state):
            projection = project_to_pixels(transform, batch.rotation[i : i + 1], specimen)[0]
            contrast = optics.contrast(
                projection,
                pixel_size=specimen.pixel_size,
                defocus=batch.defocus[i],
                beam_tilt_mrad=batch.beam_tilt_mrad,
            )
            moved = torch.from_numpy(-batch.origin[i] / specimen.pixel_size)
            spectrum = fourier.phase_shift(contrast / unit, shape=shape, shift_px=moved)
            images[i] = fourier.ifft_centred(spectrum, shape=shape)
    return images


def noise(batch: Batch, *, step: SimulateParticles, specimen: Specimen, rng: Generator) -> Tensor:
    """Noise of variance 1 (n, box, box), partly white as counting makes it, partly coloured as ice is."""
    shape = (specimen.box, specimen.box)
    white = torch.from_numpy(rng.standard_normal((2, len(batch.state), *shape), dtype=np.float32))
    colour = noise_amplitude(
        shape,
        pixel_size=specimen.pixel_size,
        microscope=exposures.microscope(step),
        defocus=batch.middle,
        thickness=max(step.ice_thickness, 1.0),
    )
    frequency = grids.frequency_radius(shape, specimen.pixel_size)
    colour *= tabulated(lambda k: fading(k, step.exposure), frequency)
    # Both columns that are their own mirror images count once in the variance, the others twice.
    weight = torch.full_like(colour, 2.0)
    weight[:, 0] = weight[:, -1] = 1.0
    colour /= ((colour.square() * weight).sum() / specimen.box**2).sqrt()
    structured = fourier.irfft2(fourier.rfft2(white[1]) * colour, shape=shape)
    return math.sqrt(1 - step.noise_colour) * white[0] + math.sqrt(step.noise_colour) * structured


@one_torch_thread()
def measure_scale(step: SimulateParticles, specimen: Specimen) -> float:
    """Factor on the signal that gives the ratio asked with noise of variance 1; 1 without noise.

    The signal's variance is that of noise-free images inside the circle around the molecule, averaged.
    """
    if step.snr == 0:
        return 1.0
    # One particle a micrograph: the variance depends on the defocus more than on anything else.
    sample = step.model_copy(update={"per_micrograph": 1, "n_particles": _SAMPLE, "shift": 0.0})
    rng = np.random.default_rng([step.seed, 4])
    inside = grids.radius((specimen.box, specimen.box), specimen.pixel_size) < specimen.diameter / 2
    variances = []
    for index in range(_SAMPLE):
        batch = draw_batch(index, step=sample, specimen=specimen, rng=rng)
        image = signal(batch, step=sample, specimen=specimen)[0]
        variances.append(float(image[inside].var(correction=0)))
    return math.sqrt(step.snr / float(np.mean(variances)))


@one_torch_thread()
def simulate(
    index: int, *, step: SimulateParticles, specimen: Specimen, folder: Path, scale: float
) -> dict[str, Any]:
    """Image the particles of one micrograph and write their stack.

    Returns
    -------
    dict
        ``index``, ``group``, and the rows' columns as lists.
    """
    draw_seed, noise_seed = exposures.seeds(step, index, 2)
    batch = draw_batch(index, step=step, specimen=specimen, rng=np.random.default_rng(draw_seed))
    images = scale * signal(batch, step=step, specimen=specimen)
    if step.snr > 0:
        images += noise(batch, step=step, specimen=specimen, rng=np.random.default_rng(noise_seed))
    with MrcStackWriter(
        stack_file(folder, index),
        shape=(specimen.box, specimen.box),
        pixel_size=specimen.pixel_size,
        dtype="float16" if step.float16 else "float32",
        n_images=len(images),
    ) as writer:
        writer.append(images.numpy())
    return {
        "index": index,
        "group": batch.group + 1,
        "rotation": batch.rotation.tolist(),
        "origin": batch.origin.tolist(),
        "defocus": [[value.u, value.v, value.angle] for value in batch.defocus],
        "class": (batch.state + 1).tolist(),
    }
