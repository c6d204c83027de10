"""What else the beam must pass: ice of uneven thickness, the carbon film's edge, ice crystals."""

from __future__ import annotations

import numpy as np
import torch
from numpy.random import Generator, SeedSequence
from numpy.typing import NDArray
from torch import Tensor

from halfmap.io.models import scattering_coefficients
from halfmap.ops import fourier, grids
from halfmap.ops.potential import POTENTIAL_V_A2, scattering_factor
from halfmap.steps.simulate.ice import tabulated
from halfmap.steps.simulate.optics import Microscope
from halfmap.steps.simulate.scene import Crystal, Scene
from halfmap.steps.simulate.solvent import ICE_POTENTIAL_V

_CARBON_A = 120.0
_CARBON_V = 9.0
"""Mean inner potential of amorphous carbon (Harscher & Lichte 1998)."""

_CARBON_ATOMS_PER_A3 = 0.1
_CARBON_MEAN_FREE_PATH_A = 1900.0
"""Inelastic, at 300 kV."""

_LATTICE_A = (3.67, 3.90, 3.44)
"""Strongest reflections of hexagonal ice."""


def transmission(
    scene: Scene,
    *,
    shape: tuple[int, int],
    margin: int,
    pixel_size: float,
    microscope: Microscope,
    mean_free_path: float,
    seed: SeedSequence,
) -> Tensor:
    """Part of the electrons that arrives, without particles and the ice's noise.

    Inelastic scattering removes exp(-thickness / mean free path) of them, as an energy filter does. Carbon
    and crystals are phase objects with absorption, imaged by the lens, so that their edges have Fresnel
    fringes and carbon has Thon rings.

    Parameters
    ----------
    scene : Scene
        Field of view.
    shape : tuple of 2 int
        Of the result, which extends beyond the view by `margin` pixels on the low sides.
    margin : int
        Pixels.
    pixel_size : float
        In Å.
    microscope : Microscope
        Optics.
    mean_free_path : float
        Of inelastic scattering in ice, Å.
    seed : SeedSequence
        Decides the carbon's structure.

    Returns
    -------
    Tensor (h, w), float32
        Intensity over that of the beam.

    References
    ----------
    .. [1] Rice et al. 2018, J. Struct. Biol. 204, 38-44, DOI 10.1016/j.jsb.2018.06.007 (mean free path)
    """
    y, x = ((np.arange(n) - margin) * pixel_size for n in shape)
    slant = 1 / np.cos(np.radians(scene.tilt))
    thickness = scene.thickness * slant * scene.relative_thickness(x, y)
    ice = torch.from_numpy(np.exp(-thickness / mean_free_path).astype(np.float32))
    if scene.hole is None and not scene.crystals:
        return ice
    rng = np.random.default_rng(seed)
    potential = np.zeros(shape, np.float32)
    losses = np.zeros(shape, np.float32)
    for crystal in scene.crystals:
        _add_crystal(potential, losses, crystal, x, y, pixel_size, mean_free_path)
    if scene.hole is not None:
        _add_carbon(potential, losses, scene.hole, x, y, pixel_size, rng)
    phase = microscope.phase_per_V_A * torch.from_numpy(potential)
    damping = torch.exp(-microscope.absorption * phase - torch.from_numpy(losses) / 2)
    real, imaginary = microscope.propagate(
        damping * torch.cos(phase) - 1, damping * torch.sin(phase), pixel_size, scene.defocus
    )
    change = 2 * real + real.square() + imaginary.square()
    envelope = microscope.envelope(shape, pixel_size, scene.defocus.mean)
    change = fourier.irfft2(fourier.rfft2(change) * envelope, shape=shape)
    return ice * (1 + change).clamp_(min=0)


def _add_crystal(
    potential: NDArray,
    losses: NDArray,
    crystal: Crystal,
    x: NDArray,
    y: NDArray,
    pixel_size: float,
    mean_free_path: float,
) -> None:
    """A lump with an irregular outline, domed, with one set of lattice planes in Bragg position."""
    rng = np.random.default_rng(crystal.seed)
    columns = np.flatnonzero(np.abs(x - crystal.x) < 1.6 * crystal.radius)
    rows = np.flatnonzero(np.abs(y - crystal.y) < 1.6 * crystal.radius)
    if not (columns.size and rows.size):
        return
    window = np.ix_(rows, columns)
    dx, dy = np.meshgrid(x[columns] - crystal.x, y[rows] - crystal.y)
    angle = np.arctan2(dy, dx)
    outline = np.ones_like(angle)
    for order in range(2, 7):
        outline += rng.normal(0, 0.22 / order) * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    inside = np.clip(1 - (np.hypot(dx, dy) / (crystal.radius * np.clip(outline, 0.5, 1.5))) ** 2, 0, None)
    depth = crystal.radius * rng.uniform(0.8, 1.5) * np.sqrt(inside)
    spacing, direction = rng.choice(_LATTICE_A), rng.uniform(0, np.pi)
    planes = 0.0
    if spacing > 2 * pixel_size:
        wave = 2 * np.pi / spacing * (dx * np.cos(direction) + dy * np.sin(direction))
        planes = 0.15 * np.cos(wave)
    potential[window] += (ICE_POTENTIAL_V * depth * (1 + planes)).astype(np.float32)
    losses[window] += (depth / mean_free_path).astype(np.float32)


def _add_carbon(
    potential: NDArray,
    losses: NDArray,
    hole: tuple[float, float, float],
    x: NDArray,
    y: NDArray,
    pixel_size: float,
    rng: Generator,
) -> None:
    """The film outside the hole: a step with a rough edge, and the noise of its atoms."""
    shape = potential.shape
    dx, dy = x - hole[0], (y - hole[1])[:, None]
    bearing = np.arctan2(dy, dx)
    roughness = sum(
        rng.normal(0, 12) * np.cos(order * bearing + rng.uniform(0, 2 * np.pi))
        for order in (23, 61, 130, 290)
    )
    film = 1 / (1 + np.exp(-np.clip((np.hypot(dx, dy) - hole[2] - roughness) / 8, -30, 30)))
    amplitude = tabulated(_carbon_amplitude, grids.frequency_radius(shape, pixel_size)) / pixel_size
    white = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    noise = fourier.irfft2(fourier.rfft2(white) * amplitude, shape=shape).numpy()
    potential += (film * (_CARBON_A * _CARBON_V + noise)).astype(np.float32)
    losses += (film * _CARBON_A / _CARBON_MEAN_FREE_PATH_A).astype(np.float32)


def _carbon_amplitude(frequency: Tensor) -> Tensor:
    """Root of the power per area of the film's projected potential, V Å²."""
    carbon = torch.tensor(np.stack(scattering_coefficients("C"), -1))
    # Neighbours scatter against each other at low frequency, independently beyond the first ring near 2 Å.
    structure = 0.1 + 0.9 * (1 - torch.exp(-((frequency / 0.4) ** 4)))
    single = POTENTIAL_V_A2 * scattering_factor(carbon, frequency)
    return single * (structure * _CARBON_A * _CARBON_ATOMS_PER_A3).sqrt()
