"""Motion-corrected micrographs: one exposure of a specimen that lies still."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.random import SeedSequence

from halfmap.io.mrc import write_mrc
from halfmap.ops import grids
from halfmap.ops.threads import one_torch_thread
from halfmap.steps.simulate import exposure as exposures
from halfmap.steps.simulate import truth
from halfmap.steps.simulate.detector import Camera, build_camera
from halfmap.steps.simulate.ice import fading, tabulated, white_noise

if TYPE_CHECKING:
    from halfmap.steps.simulate.specimen import Specimen
    from halfmap.steps.simulate.step import SimulateMicrographs

MICROGRAPHS = "Micrographs"


def camera_of(step: SimulateMicrographs) -> Camera:
    """A camera whose flaws have been corrected: every pixel counts alike."""
    return build_camera(
        SeedSequence(step.seed, spawn_key=(3,)),
        shape=(step.height, step.width),
        upsampling=1,
        efficiency=step.efficiency,
        mislocation_px=step.mislocation,
        gain_spread=0.0,
        n_dead=0,
        n_hot=0,
    )


def write_camera(step: SimulateMicrographs, folder: Path) -> None:
    """Write the camera's MTF."""
    truth.write_mtf(folder / "mtf.star", camera_of(step))


def micrograph_file(folder: Path, index: int) -> Path:
    """Where micrograph `index` lies."""
    return folder / MICROGRAPHS / f"{exposures.name(index)}.mrc"


def half_file(folder: Path, index: int, half: str) -> Path:
    """Where its sum of even or odd frames lies."""
    return folder / MICROGRAPHS / f"{exposures.name(index)}_{half}.mrc"


@one_torch_thread()
def simulate(index: int, *, step: SimulateMicrographs, specimen: Specimen, folder: Path) -> dict[str, Any]:
    """Expose one micrograph and write it with its truth.

    Returns
    -------
    dict
        The micrograph's row of truth; see `truth.exposure_row`.
    """
    scene_seed, carbon_seed, ice_seed, even_seed, odd_seed = exposures.seeds(step, index, 5)
    camera = camera_of(step)
    pixel, shape = step.pixel_size, (step.height, step.width)
    exposure = exposures.set_up(
        index,
        step=step,
        specimen=specimen,
        camera=camera,
        largest_motion=0.0,
        seeds=(scene_seed, carbon_seed),
    )
    damage = exposures.damage(exposure, start=0.0, end=step.dose, pixel_size=pixel, voltage_kV=step.voltage)
    still = np.zeros_like(exposure.images.centre_px)
    particles = exposure.images.layer(shape, moved_px=still, smear_px=still, damage=damage)
    noise = torch.from_numpy(white_noise(exposure.canvas, np.random.Generator(np.random.SFC64(ice_seed))))
    k = grids.frequency_radius(exposure.canvas, pixel)
    noise *= tabulated(lambda frequency: fading(frequency, step.dose), k)
    per_pixel = np.float32(step.dose * pixel**2)
    expected = exposures.still_image(exposure, particles, noise) * per_pixel
    even, odd = (
        camera.expose(expected * np.float32(0.5), seed, bits=16).astype(np.float32)
        for seed in (even_seed, odd_seed)
    )
    write_mrc(micrograph_file(folder, index), even + odd, pixel_size=pixel)
    if step.write_halves:
        write_mrc(half_file(folder, index, "even"), even, pixel_size=pixel)
        write_mrc(half_file(folder, index, "odd"), odd, pixel_size=pixel)
    name, truth_folder = exposures.name(index), folder / truth.FOLDER
    if step.write_clean:
        clean = exposures.still_image(exposure, particles) * (per_pixel * np.float32(step.efficiency))
        write_mrc(truth_folder / f"{name}_clean.mrc", clean, pixel_size=pixel)
    truth.write_scene(truth_folder / f"{name}.star", exposure.scene, pixel, len(specimen.fractions))
    return truth.exposure_row(index, exposure.scene, shape, 1)
