"""Where in a map a rigid model belongs: searched over rotations and shifts, then climbed in finer maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from halfmap.errors import ParameterError
from halfmap.io.models import AtomicModel
from halfmap.log import report
from halfmap.ops.fourier import irfft3, resize_spectrum, rfft3
from halfmap.ops.interpolation import sample_volume
from halfmap.ops.rotations import angular_distance, from_rotation_vector, healpix_grid
from halfmap.ops.threads import one_blas_thread, one_torch_thread
from halfmap.search._fit_kernels import density_and_slopes
from halfmap.search.fit_places import Place, Range, distinct
from halfmap.search.model_density import model_map

FINEST_A, COARSE_A = 5.0, 10.0
"""Detail of the maps that are climbed in last and searched first, if nothing else bounds them."""

_ORDER, _STEP_deg = 2, 15.0
"""HEALPix order of the rotations that are tried, and their distance."""

_SEARCHED, _CLIMBED = 2.5, 3.5
"""Voxels in the detail that maps are filtered to, in the search and in climbing."""

_EDGE = 0.15
"""Of the mean density at its atoms, above which a model's density is compared."""

_LARGEST = 72
"""Voxels along the side of the box that is searched, at most."""

_TURNS = 3.0
"""Radii of gyration over the detail searched at most: what is farther out would miss between rotations."""

_FINER = 1.6
"""Factor by which the detail becomes finer from one round of ascents to the next."""

_TRIED, _FIRST_STEPS, _FIRST_POINTS = 50, 25, 3_000
"""Places that are climbed from at first; steps of these ascents, and points where densities are compared."""

_KEPT, _FEWEST, _STEPS, _POINTS = 10, 4, 60, 30_000
"""Places that are climbed from next, and last; steps and points of these ascents."""

_ENOUGH = 1e-7
"""Relative gain of the correlation in a step below which an ascent ends."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A map, filtered and sampled as coarsely as that allows.

    Attributes
    ----------
    volume : Tensor (d, h, w)
    voxel : Tensor (3,), float64
        Sides (x, y, z) of its voxels in Å.
    """

    volume: Tensor
    voxel: Tensor


@dataclass(frozen=True, eq=False)
class Shape:
    """Density of a model about its centre.

    Attributes
    ----------
    volume : Tensor (d, d, d)
        Its density, less the mean, where that is compared; 0 elsewhere.
    inside : Tensor (d, d, d)
        1 where it is compared.
    pixel_size : float
        Å.
    points, values : Tensor (n, 3), (n,)
        Å, and the density there, of mean 0 and norm 1.
    """

    volume: Tensor
    inside: Tensor
    pixel_size: float
    points: Tensor
    values: Tensor


@one_torch_thread()
@one_blas_thread()
def find_places(
    volume: Tensor,
    model: AtomicModel,
    *,
    pixel_size: float,
    origin: Sequence[float] = (0.0, 0.0, 0.0),
    angle: float = 180.0,
    shift: float = math.inf,
    coarse: float = COARSE_A,
    fine: float = FINEST_A,
) -> list[Place]:
    """Find where in a map a rigid model fits best, and the places that come next.

    Parameters
    ----------
    volume : Tensor (d, h, w)
        Map.
    model : AtomicModel
        Model, of which a part may lie outside.
    pixel_size : float
        In Å.
    origin : sequence of 3 float
        (x, y, z) of the map's first voxel in the model's coordinates, Å.
    angle, shift : float
        Largest turn and shift from where the model is, in degrees and Å. An ascent that leaves the range is
        taken back to its border. 0 both: only the ascents, from where the model is, not bounded.
    coarse, fine : float
        Detail in Å that the search begins at, if the model is small enough, and that the last ascents are at.

    Returns
    -------
    list of Place
        Best first; centres in the model's coordinates. One or more.

    Raises
    ------
    ParameterError
        If nothing of the map is near the model anywhere in the range.

    Notes
    -----
    Map and model are filtered to the coarse detail. For every rotation of a grid 15° apart the correlation
    of the model's density with the map's, both about their means over the model's footprint, follows for all
    shifts from Fourier transforms [1]_. The best shift of each rotation is a candidate; the best candidates
    that differ are climbed by the gradient of the same correlation, at detail that becomes finer, the better
    ones again and again. Nothing is drawn by chance.

    References
    ----------
    .. [1] Roseman 2000, Acta Cryst. D56, 1332-1340, DOI 10.1107/S0907444900010908
    """
    side = max(volume.shape) * pixel_size
    model = replace(model, positions=model.positions - np.array(origin))
    scale = max(gyration(model), 1.0)
    fine = max(fine, _SEARCHED * pixel_size)
    detail = max(coarse, fine)
    start = Place(torch.eye(3, dtype=torch.float64), torch.from_numpy(model.positions.mean(0)))
    places, limits = [start], Range(start)
    if angle > 0 or shift > 0:
        detail = max(detail, scale / _TURNS, _SEARCHED * side / _LARGEST)
        limits = Range(start, angle, shift)
        places = _candidates(volume, model, limits, pixel_size, detail)
        climbed = _climbed(places, volume, model, limits, pixel_size, detail, _FIRST_POINTS, _FIRST_STEPS)
        places = distinct(climbed, _KEPT)
    while True:
        climbed = _climbed(places, volume, model, limits, pixel_size, detail, _POINTS, _STEPS)
        places = distinct(climbed, max(_FEWEST, len(places) // 2))
        if detail <= fine * (1 + 1e-6):
            break
        detail = max(fine, detail / _FINER)
    if places[0].correlation <= 0:
        raise ParameterError(
            "the map holds nothing like the model where it was searched",
            hint="search in all of it, or give the map that the model belongs to",
        )
    return [replace(each, centre=each.centre + torch.tensor(tuple(origin)).double()) for each in places]


def _candidates(
    volume: Tensor, model: AtomicModel, limits: Range, pixel_size: float, detail: float
) -> list[Place]:
    start, angle, shift = limits
    grid = sampled(volume, pixel_size=pixel_size, detail=detail, voxels=_SEARCHED)
    # The model is turned, the map is not: it is sampled finer, so that turning costs no detail.
    shape = shape_of(model, detail=detail, pixel_size=float(grid.voxel.mean()) / 1.5)
    rotations = healpix_grid(_ORDER, psi_step=_STEP_deg, dtype=torch.float64)
    if angle < 180:
        rotations = rotations[angular_distance(rotations, start.rotation) <= angle + _STEP_deg / 2]
    rotations = torch.cat([start.rotation[None], rotations])
    found = scan(grid, shape, rotations, near=start.centre, within=shift + float(grid.voxel.max()))
    return [start, *distinct(found, _TRIED)]


def _climbed(
    places: list[Place],
    volume: Tensor,
    model: AtomicModel,
    limits: Range,
    pixel_size: float,
    detail: float,
    points: int,
    steps: int,
) -> list[Place]:
    grid = sampled(volume, pixel_size=pixel_size, detail=detail, voxels=_CLIMBED)
    shape = shape_of(model, detail=detail, pixel_size=float(grid.voxel.mean()), most=points)
    scale = max(gyration(model), 1.0)
    climbed = []
    for place in places:
        top = climb(grid, shape, place, scale=scale, steps=steps)
        kept = limits.nearest(top)
        climbed.append(top if kept is top else replace(kept, correlation=correlation(grid, shape, kept)))
    return climbed


def gyration(model: AtomicModel) -> float:
    """Radius of gyration of a model in Å."""
    return float(np.sqrt(np.square(model.positions - model.positions.mean(0)).sum(1).mean()))


def sampled(volume: Tensor, *, pixel_size: float, detail: float, voxels: float) -> Grid:
    """Map filtered to a detail by a Gaussian, one half there, with so many voxels in it or those it has."""
    shape = tuple(volume.shape)
    spectrum = rfft3(volume)
    wanted = tuple(min(n, 2 * math.ceil(n * pixel_size * voxels / detail / 2)) for n in shape)
    spectrum = resize_spectrum(spectrum, shape=shape, new_shape=wanted)
    sides = torch.tensor([n * pixel_size for n in reversed(shape)], dtype=torch.float64)
    voxel = sides / torch.tensor(wanted[::-1], dtype=torch.float64)
    k = _radius(wanted, voxel)
    spectrum *= torch.exp(-math.log(2) * (k * detail).square()).to(spectrum.real.dtype)
    return Grid(irfft3(spectrum, shape=wanted), voxel)


def _radius(shape: Sequence[int], voxel: Tensor) -> Tensor:
    """Spatial frequencies (d, h, w // 2 + 1) in 1/Å."""
    d, h, w = shape
    z, y = (torch.fft.fftfreq(n) / side for n, side in ((d, voxel[2]), (h, voxel[1])))
    x = torch.fft.rfftfreq(w) / voxel[0]
    return (z.square()[:, None, None] + y.square()[:, None] + x.square()).sqrt()


def shape_of(model: AtomicModel, *, detail: float, pixel_size: float, most: int = _POINTS) -> Shape:
    """Density of a model about the mean of its atoms, filtered as `sampled` does; at some points at most."""
    centred = replace(model, positions=model.positions - model.positions.mean(0))
    reach = float(np.linalg.norm(centred.positions, axis=1).max()) + 1.5 * detail
    half = math.ceil(reach / pixel_size)
    size = 2 * half + 1
    origin = (-half * pixel_size,) * 3
    blur = 4 * math.log(2) * detail**2
    volume = model_map(centred, shape=(size,) * 3, pixel_size=pixel_size, origin=origin, blur=blur)
    at_atoms = sample_volume(volume, torch.from_numpy(centred.positions / pixel_size + half).float())
    inside = volume > _EDGE * float(at_atoms.mean())
    where = inside.nonzero().flip(1)
    values = volume[inside].double()
    step = max(1, -(-len(values) // most))
    points, chosen = (where[::step].double() - half) * pixel_size, values[::step]
    chosen = chosen - chosen.mean()
    return Shape(
        torch.where(inside, volume - values.mean().float(), torch.zeros(())),
        inside.float(),
        pixel_size,
        points,
        chosen / chosen.norm(),
    )


def correlation(grid: Grid, shape: Shape, place: Place) -> float:
    """Correlation about the mean of a map and a model at a place."""
    return _correlation(grid, shape, place.rotation.numpy(), place.centre.numpy())[0]


def _correlation(
    grid: Grid, shape: Shape, rotation: NDArray[np.float64], centre: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Correlation, and how it grows with a shift (3,) in Å and a turn (3,) in radians about the centre."""
    turned, voxel = shape.points.numpy() @ rotation.T, grid.voxel.numpy()
    found, slopes = np.empty(len(turned)), np.empty((len(turned), 3))
    density_and_slopes(grid.volume.numpy(), (turned + centre) / voxel, found, slopes)
    found -= found.mean()
    norm = max(float(np.linalg.norm(found)), 1e-12)
    value = float(found @ shape.values.numpy()) / norm
    forces = ((shape.values.numpy() - value * found / norm) / norm)[:, None] * slopes / voxel
    # The mean is taken off the density, so that of what it is multiplied with counts for nothing.
    return value, forces.sum(0), np.cross(turned, forces).sum(0)


def climb(grid: Grid, shape: Shape, start: Place, *, scale: float, steps: int = _STEPS) -> Place:
    """Climb to the highest correlation near a place; a turn of one radian is as far as `scale` Å."""
    begin, centre = start.rotation.numpy(), start.centre.numpy()

    def turn(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        return from_rotation_vector(torch.rad2deg(torch.from_numpy(vector[:3] / scale))).numpy()

    def loss(vector: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        value, force, torque = _correlation(grid, shape, turn(vector) @ begin, centre + vector[3:])
        return -value, -np.concatenate([_left_jacobian(vector[:3] / scale).T @ torque / scale, force])

    how = {"maxiter": steps, "ftol": _ENOUGH}
    best = minimize(loss, np.zeros(6), jac=True, method="L-BFGS-B", options=how)
    rotation, shifted = turn(best.x) @ begin, centre + best.x[3:]
    return Place(torch.from_numpy(rotation), torch.from_numpy(shifted), -float(best.fun))


def _left_jacobian(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn (3, 3), on top of that by a vector in radians, which a change of the vector makes."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-6:
        return np.eye(3)
    x, y, z = axis = vector / angle
    across = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    sine, versine = math.sin(angle) / angle, (1 - math.cos(angle)) / angle
    return sine * np.eye(3) + (1 - sine) * np.outer(axis, axis) + versine * across


def scan(grid: Grid, shape: Shape, rotations: Tensor, *, near: Tensor, within: float) -> list[Place]:
    """Best shift for each of many rotations, by the correlation within the model's footprint.

    For each rotation (n, 3, 3) the sums of the map, of its square and of its product with the model's density
    over the footprint follow for all shifts by Fourier transforms. Centres within a distance in Å of a place
    (3,) are considered.
    """
    size = tuple(grid.volume.shape)
    centred = grid.volume - grid.volume.mean()
    ours = rfft3(torch.stack([centred, centred.square()]))
    half = len(shape.volume) // 2
    offsets, index = _offsets(size, grid.voxel, half * shape.pixel_size)
    both = torch.stack([shape.volume, shape.inside])
    barred = _distance(size, grid.voxel, near) > within
    found = []
    for rotation in report(list(rotations), "rotations tried"):
        where = (offsets @ rotation.double()) / shape.pixel_size + half
        placed = torch.zeros(2, math.prod(size))
        placed[:, index] = sample_volume(both, where.float())
        theirs = rfft3(placed.reshape(2, *size)).conj()
        products = torch.stack([ours[0] * theirs[0], ours[0] * theirs[1], ours[1] * theirs[1]])
        cross, total, square = irfft3(products, shape=size)
        count = float(placed[1].sum())
        varied = (square - total.square() / count).clamp_min(1e-3 * float(square.mean()))
        scores = (cross - float(placed[0].sum()) / count * total) / varied.sqrt()
        scores[barred] = -math.inf
        best = int(scores.argmax())
        norm = float((placed[0].square().sum() - placed[0].sum() ** 2 / count).sqrt())
        z, y, x = np.unravel_index(best, size)
        centre = torch.tensor([x, y, z], dtype=torch.float64) * grid.voxel
        found.append(Place(rotation.double(), centre, float(scores.flatten()[best]) / norm))
    return found


def _offsets(size: Sequence[int], voxel: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Steps (n, 3) in Å from the first voxel to those within a distance, and the voxels' indices (n,)."""
    axes = [torch.fft.fftfreq(n) * n for n in size]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    steps = torch.stack([x, y, z], dim=-1).reshape(-1, 3).double() * voxel
    index = (steps.norm(dim=1) <= reach).nonzero().squeeze(1)
    return steps[index], index


def _distance(size: Sequence[int], voxel: Tensor, place: Tensor) -> Tensor:
    """Distance in Å of each voxel from a place."""
    z, y, x = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in size], indexing="ij")
    return (torch.stack([x, y, z], dim=-1) * voxel - place).norm(dim=-1)
