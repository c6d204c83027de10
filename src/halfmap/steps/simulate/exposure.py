"""What movies and micrographs have in common: the scene in front of the lens, ready to be recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.random import SeedSequence
from numpy.typing import NDArray
from torch import Tensor

from halfmap.ops import fourier, grids
from halfmap.steps.simulate import molecules
from halfmap.steps.simulate.damage import attenuation
from halfmap.steps.simulate.ice import noise_amplitude
from halfmap.steps.simulate.molecules import ParticleImages
from halfmap.steps.simulate.obstacles import transmission
from halfmap.steps.simulate.optics import Microscope
from halfmap.steps.simulate.scene import Scene, draw_scene

if TYPE_CHECKING:
    from halfmap.steps.simulate.detector import Camera
    from halfmap.steps.simulate.specimen import Specimen
    from halfmap.steps.simulate.step import Simulate, SimulateExposures

PLANE_SPACING_A = 200.0
"""Defocus between planes of noise in tilted ice. Halfway between two, Thon rings keep 0.91 of their contrast
at 6 to 4.5 Å and 0.75 at 4.5 to 3.6 Å; a spacing of 400 Å would keep 0.64 and 0.24 and shift them."""

_NAME_DIGITS = 6


def name(index: int) -> str:
    """Name of a movie, micrograph or stack without folder and suffix; counted from 0, named from 1."""
    return f"{index + 1:0{_NAME_DIGITS}d}"


def seeds(step: Simulate, index: int, n: int) -> list[SeedSequence]:
    """Independent seeds for one movie, micrograph or stack, whatever worker it runs on."""
    return SeedSequence(step.seed, spawn_key=(2, index)).spawn(n)


def microscope(step: Simulate) -> Microscope:
    """The optics that a step's parameters describe."""
    return Microscope(
        voltage_kV=step.voltage,
        cs_mm=step.spherical_aberration,
        amplitude_contrast=step.amplitude_contrast,
        phase_shift=step.phase_shift,
        focal_spread=step.focal_spread,
        convergence_mrad=step.convergence,
        b_factor=step.envelope_b_factor,
        image_model=step.image_model,
    )


@dataclass(frozen=True, eq=False)
class Exposure:
    """A scene with everything that is the same in all its frames.

    Parameters
    ----------
    scene : Scene
        What there is.
    images : ParticleImages
        Its particles.
    canvas : tuple of 2 int
        Shape of what moves with the specimen: the frame and some pixels more on every side.
    margin : int
        Those on the low sides.
    passing : Tensor
        Part of the electrons that arrives, on the canvas.
    n_planes : int
        Planes of rising defocus in which the ice's noise is made.
    noise_filter : callable
        From white noise to the ice's image on the canvas, by the plane's number; computed at each call.
    plane : array (3,), float32
        Plane of noise at the frame's first pixel, and its change per pixel along x and y.
    """

    scene: Scene
    images: ParticleImages
    canvas: tuple[int, int]
    margin: int
    passing: Tensor
    n_planes: int
    noise_filter: Callable[[int], Tensor]
    plane: NDArray[np.float32]


def set_up(
    index: int,
    *,
    step: SimulateExposures,
    specimen: Specimen,
    camera: Camera,
    largest_motion: float,
    seeds: tuple[SeedSequence, SeedSequence],
) -> Exposure:
    """Draw a scene and image what does not change from frame to frame.

    Parameters
    ----------
    index : int
        Number of the movie or micrograph from 0.
    step, specimen, camera
        Parameters, molecules, detector.
    largest_motion : float
        Of the specimen in Å, which the canvas extends beyond the frame for.
    seeds : tuple of 2 SeedSequence
        Of the scene, and of the carbon's structure.
    """
    optics = microscope(step)
    pixel = specimen.pixel_size
    scene = draw_scene(index, step=step, specimen=specimen, rng=np.random.default_rng(seeds[0]))
    frame = round(scene.size[0] / pixel), round(scene.size[1] / pixel)
    patch = molecules.patch_size(specimen, optics, scene.defocus, pixel)
    images = molecules.image_particles(
        scene,
        specimen=specimen,
        microscope=optics,
        pixel_size=pixel,
        mtf_of_patch=camera.transfer((patch, patch)),
    )
    obstructed = scene.hole is not None or bool(scene.crystals)
    # What the lens spreads around the canvas' edge, where carbon ends on one side and begins on the other.
    fringe = molecules.reach(optics, scene.defocus.u, pixel) if obstructed else 0.0
    margin = int((largest_motion + fringe) / pixel) + 8
    height, width = (molecules.fast_even(n + 2 * margin) for n in frame)
    canvas = height, width
    passing = transmission(
        scene,
        shape=canvas,
        margin=margin,
        pixel_size=pixel,
        microscope=optics,
        mean_free_path=step.mean_free_path,
        seed=seeds[1],
    )
    mtf = camera.transfer(canvas)
    if obstructed:
        passing = fourier.irfft2(fourier.rfft2(passing) * mtf, shape=canvas)
    heights, plane = _noise_planes(scene, pixel)

    def noise_filter(number: int) -> Tensor:
        amplitude = noise_amplitude(
            canvas,
            pixel_size=pixel,
            microscope=optics,
            defocus=scene.defocus.further(heights[number]),
            thickness=scene.thickness / np.cos(np.radians(scene.tilt)),
        )
        return step.ice_noise * mtf * amplitude

    return Exposure(scene, images, canvas, margin, passing, len(heights), noise_filter, plane)


def _noise_planes(scene: Scene, pixel_size: float) -> tuple[NDArray, NDArray[np.float32]]:
    """Defoci against the middle's at which noise is made, and where between them each pixel lies."""
    along_x, along_y = scene.height_gradient()
    half = abs(along_x) * scene.size[1] / 2 + abs(along_y) * scene.size[0] / 2
    count = 1 + int(np.ceil(2 * half / PLANE_SPACING_A))
    if half < 1 or count < 2:
        return np.zeros(1), np.zeros(3, np.float32)
    spacing = 2 * half / (count - 1)
    first = half - along_x * scene.size[1] / 2 - along_y * scene.size[0] / 2
    plane = np.array([first, along_x * pixel_size, along_y * pixel_size]) / spacing
    return np.linspace(-half, half, count), plane.astype(np.float32)


def damage(
    exposure: Exposure, *, start: float, end: float, pixel_size: float, voltage_kV: float
) -> NDArray[np.float32]:
    """Filter that radiation leaves of the particles, averaged from exposure `start` to `end` in e/Å²."""
    patch = exposure.images.patch
    k = grids.frequency_radius((patch, patch), pixel_size)
    return attenuation(k, start=start, end=end, voltage_kV=voltage_kV).numpy()


def still_image(exposure: Exposure, particles: NDArray, noise: Tensor | None = None) -> NDArray[np.float32]:
    """Intensity over that of the beam of a specimen that does not move.

    Parameters
    ----------
    exposure : Exposure
        What lies there.
    particles : array (h, w)
        Relative change of intensity by the particles.
    noise : Tensor (H, W // 2 + 1), optional
        Half-spectrum of white noise on the canvas that becomes the ice's; none if not given.
    """
    h, w = particles.shape
    inside = (slice(exposure.margin, exposure.margin + h), slice(exposure.margin, exposure.margin + w))
    relative = 1 + torch.from_numpy(particles)
    if noise is not None:
        first, along_x, along_y = exposure.plane
        place = first + along_x * torch.arange(w) + along_y * torch.arange(h)[:, None]
        for number in range(exposure.n_planes):
            image = fourier.irfft2(noise * exposure.noise_filter(number), shape=exposure.canvas)[inside]
            relative += image * (1 - (place - number).abs()).clamp_(min=0)
    return (exposure.passing[inside] * relative).numpy()
