"""Where in a map the particle is: solvent, noise, a threshold from the data, and the region above it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops import filters, fourier

LEVEL = 0.5
"""Of the way from the solvent to the particle's mean density at which its blurred surface is."""

NOISE_LIMIT = 3.0
"""Standard deviations of the noise that the threshold is at least above the solvent."""

LEAST_CONTRAST = 4.0
"""Of a particle. What is above three standard deviations in mere noise is 3.28 of them high on average."""

RESOLUTIONS_A = 15.0, 20.0, 28.0, 40.0
"""Of the low-pass filter, the first at which the particle stands out of the noise."""

_SAMPLES = 4_000_000
"""Voxels that levels are estimated from, at most."""


@dataclass(frozen=True)
class Levels:
    """Densities that tell a particle from the solvent around it.

    Attributes
    ----------
    solvent, noise : float
        Mean density of the solvent and standard deviation of the noise in it.
    particle : float
        Mean density above the threshold.
    threshold : float
        Density at the surface.
    limited_by_noise : bool
        Whether the threshold is above the surface because the noise reaches so high.
    """

    solvent: float
    noise: float
    particle: float
    threshold: float
    limited_by_noise: bool

    @property
    def contrast(self) -> float:
        """Mean density of the particle above the solvent, in standard deviations of the noise."""
        height = self.particle - self.solvent
        return height / self.noise if self.noise > 0 else math.inf


@dataclass(frozen=True, eq=False)
class Region:
    """Voxels of a particle and how they were found.

    Attributes
    ----------
    region : Tensor (d, h, w) of bool
        Large pieces above the threshold, small holes filled.
    blurred : Tensor (d, h, w)
        Map that was compared with the threshold.
    levels : Levels
        Densities found in it.
    resolution : float
        That it was blurred to, Å.
    """

    region: Tensor
    blurred: Tensor
    levels: Levels
    resolution: float


def blur(volume: Tensor, *, pixel_size: float, resolution: float) -> Tensor:
    """Low-pass filter volumes (..., d, h, w) by a Gaussian that is one half at 1 / resolution.

    It does not ring, as filters with an edge do, whose waves a threshold would take for particle.
    """
    if not resolution > 0:
        raise ParameterError(f"there is no low-pass filter at {resolution:g} Å")
    shape = tuple(volume.shape[-3:])
    b_factor = 4 * math.log(2) * resolution**2
    gaussian = filters.b_factor(shape, pixel_size=pixel_size, b_factor=b_factor, device=volume.device)
    return fourier.irfft3(fourier.rfft3(volume) * gaussian, shape=shape)


def density_levels(blurred: Tensor, *, blank: Tensor | None = None, level: float = LEVEL) -> Levels:
    """Estimate the densities of solvent and particle, and the threshold between them.

    Parameters
    ----------
    blurred : Tensor (d, h, w)
        Low-pass filtered map, bright particle, of any scale and offset.
    blank : Tensor (d, h, w) of bool, optional
        Voxels that hold nothing, as outside a mask that the map was multiplied with; they tell nothing of
        the noise.
    level : float
        Where the surface is between solvent and particle. One half is the height of a blurred step; less
        takes in parts that are not in all particles.

    Returns
    -------
    Levels
        The solvent is the mode of the density, the noise what scatters below it. The surface lies `level` of
        the way from the solvent to the mean of what is above the surface, which repeats until nothing
        changes, and at least `NOISE_LIMIT` standard deviations of the noise above the solvent.

    Raises
    ------
    ParameterError
        If the map is the same everywhere.

    Notes
    -----
    Iterated means as of Ridler and Calvard [1]_, with the solvent known: there is so much more of it than of
    the particle that its own mean would hold the threshold down.

    References
    ----------
    .. [1] Ridler & Calvard 1978, IEEE Trans. Syst. Man Cybern. 8, 630-632, DOI 10.1109/TSMC.1978.4310039
    """
    values = _sample(blurred if blank is None else blurred[~blank])
    empty = None if blank is None or not blank.any() else float(blurred[blank].median())
    if not len(values) or values[0] == values[-1]:
        raise ParameterError("the map is the same everywhere", hint="give a map with density")
    solvent = _mode(values)
    if empty is not None and blank is not None and empty < solvent and blank.float().mean() > 0.5:
        # Little but the particle was left by a tight mask.
        solvent = empty
    noise = _noise_below(values, solvent)
    least = solvent + NOISE_LIMIT * noise
    sums = np.append(np.cumsum(values[::-1])[::-1], 0.0)
    surface = solvent + level * (float(values[-1]) - solvent)
    particle = surface
    for _ in range(200):
        first = int(np.searchsorted(values, max(surface, least)))
        particle = float(sums[first] / (len(values) - first)) if first < len(values) else float(values[-1])
        before, surface = surface, solvent + level * (particle - solvent)
        if abs(surface - before) <= 1e-6 * (particle - solvent):
            break
    return Levels(solvent, noise, particle, max(surface, least), surface < least)


def blank_voxels(volume: Tensor) -> Tensor:
    """Find voxels outside a mask that the map was multiplied with: one and the same value, at the corners."""
    corners = volume[:: volume.shape[0] - 1, :: volume.shape[1] - 1, :: volume.shape[2] - 1]
    value = corners.flatten().mode().values
    blank = volume == value
    # A value that is there by chance, or in integer maps, is no mask.
    share = float(blank.float().mean())
    solid = torch.from_numpy(ndimage.binary_opening(blank.cpu().numpy())) if share > 0.02 else None
    if solid is None or float(solid.float().mean()) < 0.5 * share:
        return torch.zeros_like(blank)
    return blank


def find_region(
    volume: Tensor,
    *,
    pixel_size: float,
    resolution: float | None = None,
    level: float = LEVEL,
    least_piece: float = 0.1,
    largest_hole: float = 0.1,
    blank: Tensor | None = None,
) -> Region:
    """Find the voxels of the particle in a map.

    Parameters
    ----------
    volume : Tensor (d, h, w)
        Map with a bright particle.
    pixel_size : float
        In Å.
    resolution : float, optional
        Of the low-pass filter in Å; default: the first of `RESOLUTIONS_A` at which the particle's surface is
        above the noise.
    level : float
        As of `density_levels`.
    least_piece, largest_hole : float
        As of `particle_region`.
    blank : Tensor (d, h, w) of bool, optional
        Voxels that hold nothing; default: those of `blank_voxels`.

    Returns
    -------
    Region
        Particle, threshold and filter.

    Raises
    ------
    ParameterError
        If nothing stands out of the noise.
    """
    blank = blank_voxels(volume) if blank is None else blank
    tried = [max(resolution or RESOLUTIONS_A[0], 2 * pixel_size)]
    if resolution is None:
        tried += [coarser for coarser in RESOLUTIONS_A if coarser > tried[0]]
    while True:
        used = tried.pop(0)
        blurred = blur(volume, pixel_size=pixel_size, resolution=used)
        levels = density_levels(blurred, blank=blank, level=level)
        if not (levels.limited_by_noise and tried):
            break
    if levels.limited_by_noise and levels.contrast < LEAST_CONTRAST:
        raise ParameterError(
            "no particle stands out of the noise of the map",
            hint="give --threshold, or make a mask of another kind (mask sphere, mask cylinder)",
        )
    inside = particle_region(
        torch.gt(blurred, levels.threshold), least_piece=least_piece, largest_hole=largest_hole
    )
    return Region(inside, blurred, levels, used)


def particle_region(inside: Tensor, *, least_piece: float = 0.1, largest_hole: float = 0.1) -> Tensor:
    """Keep the large pieces of a binary mask and fill its small holes.

    Parameters
    ----------
    inside : Tensor (d, h, w) of bool
        Voxels above a threshold.
    least_piece : float
        Volume of pieces that are kept, in parts of the largest piece; 1 keeps this one only.
    largest_hole : float
        Volume of holes that are filled, in parts of what is kept; infinite fills all.

    Returns
    -------
    Tensor (d, h, w) of bool
        Pieces hang together by faces of voxels; holes have no way out by faces of voxels.
    """
    if inside.ndim != 3:
        raise ShapeError(f"a mask is one volume, not of shape {tuple(inside.shape)}")
    array = inside.cpu().numpy()
    kept = _pieces(array, lambda sizes: sizes >= least_piece * sizes.max(initial=0))
    volume = int(kept.sum())
    cavities = np.asarray(ndimage.binary_fill_holes(kept), np.bool_) & ~kept
    holes = _pieces(cavities, lambda sizes: sizes <= largest_hole * volume)
    return torch.from_numpy(kept | holes).to(inside.device)


def _pieces(
    array: NDArray[np.bool_], choose: Callable[[NDArray[np.int64]], NDArray[np.bool_]]
) -> NDArray[np.bool_]:
    """Connected pieces whose sizes are chosen."""
    labels = np.zeros(array.shape, np.int32)
    ndimage.label(array, output=labels)
    count = int(labels.max())
    if count == 0:
        return np.zeros_like(array)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    keep = np.append(False, choose(sizes[1:]))
    return keep[labels]


def _sample(values: Tensor) -> NDArray[np.float64]:
    """Sorted values, of large maps every n-th."""
    flat = values.flatten()
    return np.sort(flat[:: max(1, len(flat) // _SAMPLES)].double().cpu().numpy())


def _mode(values: NDArray[np.float64]) -> float:
    """Densest place of sorted values: half-sample mode, then means of what scatters about it."""
    part = values
    while len(part) > 64:
        half = (len(part) + 1) // 2
        first = int((part[half - 1 :] - part[: len(part) - half + 1]).argmin())
        part = part[first : first + half]
    mode = float(part.mean())
    # The half-sample mode itself scatters by a tenth of the noise.
    for _ in range(5):
        width = 1.5 * _noise_below(values, mode)
        first, last = np.searchsorted(values, [mode - width, mode + width])
        if last - first < 64:
            break
        mode = float(values[first:last].mean())
    return mode


def _noise_below(values: NDArray[np.float64], mode: float) -> float:
    """Standard deviation of noise about a mode: half of the values below lie within 0.6745 of it."""
    below = mode - values[: np.searchsorted(values, mode)]
    return float(np.median(below)) / 0.6745 if len(below) else 0.0
