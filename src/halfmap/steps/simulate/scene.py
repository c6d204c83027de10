"""What lies in a field of view: particles with their poses and heights, ice, carbon, contaminants."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.spatial import KDTree

from halfmap.ops.rotations import from_euler
from halfmap.steps.simulate.optics import Defocus

if TYPE_CHECKING:
    from halfmap.steps.simulate.specimen import Specimen
    from halfmap.steps.simulate.step import Simulate, SimulateExposures

REAL, OVERLAPPING, BROKEN = "real", "overlapping", "broken"

_PREFERRED_VIEWS = 3
_CONCENTRATION = 12.0
"""Of preferred views: von Mises-Fisher, a spread of about 17° per axis."""

_CRYSTAL_RADIUS_A = (80.0, 350.0)
_HOLE_RADIUS_A = 6000.0
_TRIES = 60
"""Places tried for a particle before the view counts as full."""


@dataclass(frozen=True, eq=False)
class Molecules:
    """Particles of a field of view.

    Parameters
    ----------
    position : array (n, 2)
        (x, y) in Å from the centre of the first pixel, in the middle of the first frame of a movie.
    depth : array (n,)
        How far below the middle of the ice, Å; deeper is more underfocus.
    rotation : array (n, 3, 3)
        From volume to image coordinates.
    state : array (n,), int
        Volume that they are projections of, from 0; fragments follow the whole states.
    kind : array (n,), str
        "real", "overlapping" or "broken".
    """

    position: NDArray
    depth: NDArray
    rotation: NDArray
    state: NDArray
    kind: NDArray


@dataclass(frozen=True)
class Crystal:
    """An ice crystal on the specimen: place and size in Å, and the seed of its shape."""

    x: float
    y: float
    radius: float
    seed: int


@dataclass(frozen=True, eq=False)
class Scene:
    """A field of view.

    Parameters
    ----------
    defocus : Defocus
        In the middle of the view and of the ice.
    size : tuple of 2 float
        Height and width in Å.
    tilt, tilt_axis : float
        Degrees; the axis from the x axis.
    thickness : float
        Mean thickness of the ice in Å, along its normal.
    thickness_bend : array (5,)
        Relative thickness: coefficients of x, y, x², x y, y² with x, y from -1 to 1.
    group : int
        Optics group, from 0.
    beam_tilt_mrad : tuple of 2 float
        Along x and y.
    hole : tuple of 3 float or None
        Centre and radius in Å of the hole in the carbon, if its edge is in view.
    crystals : tuple of Crystal
        Contaminants.
    molecules : Molecules
        Particles.
    """

    defocus: Defocus
    size: tuple[float, float]
    tilt: float
    tilt_axis: float
    thickness: float
    thickness_bend: NDArray
    group: int
    beam_tilt_mrad: tuple[float, float]
    hole: tuple[float, float, float] | None
    crystals: tuple[Crystal, ...]
    molecules: Molecules

    def height_gradient(self) -> tuple[float, float]:
        """Change of the defocus per Å along x and y, by the tilt."""
        slope, axis = math.tan(math.radians(self.tilt)), math.radians(self.tilt_axis)
        return -slope * math.sin(axis), slope * math.cos(axis)

    def defocus_at(self, x: float, y: float, depth: float) -> Defocus:
        """Defocus of something at (x, y) Å and `depth` Å below the ice's middle, along the ice's normal."""
        along_x, along_y = self.height_gradient()
        tilted = along_x * (x - self.size[1] / 2) + along_y * (y - self.size[0] / 2)
        return self.defocus.further(tilted + depth / math.cos(math.radians(self.tilt)))

    def relative_thickness(self, x: NDArray, y: NDArray) -> NDArray:
        """Thickness over its mean at x (w,) and y (h,) in Å: (h, w)."""
        u, v = 2 * x / self.size[1] - 1, (2 * y / self.size[0] - 1)[:, None]
        a, b, c, d, e = self.thickness_bend
        return np.maximum(1 + a * u + b * v + c * (u * u - 1 / 3) + d * u * v + e * (v * v - 1 / 3), 0.05)


def optics_groups(step: Simulate) -> list[tuple[float, float]]:
    """Beam tilt (x, y) in mrad of each optics group: one size, directions evenly around."""
    angles = 2 * np.pi * np.arange(step.optics_groups) / step.optics_groups
    return [(step.beam_tilt * math.cos(a), step.beam_tilt * math.sin(a)) for a in angles]


def random_defocus(step: Simulate, rng: Generator) -> Defocus:
    """Defocus of a micrograph within the limits, with a random astigmatism."""
    mean = rng.uniform(step.defocus_min, step.defocus_max)
    half = abs(rng.normal(0, step.astigmatism)) / 2
    return Defocus(mean + half, mean - half, rng.uniform(-90, 90))


def random_rotations(n: int, step: Simulate, rng: Generator) -> NDArray:
    """Draw orientations, uniform but for the share that has a preferred view: (n, 3, 3)."""
    # The preferred views belong to the data set, so that every micrograph has the same.
    views = np.random.default_rng([step.seed, 7]).normal(size=(_PREFERRED_VIEWS, 3))
    views /= np.linalg.norm(views, axis=1, keepdims=True)
    direction = rng.normal(size=(n, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    preferred = rng.random(n) < step.preferred_orientation
    centre = views[rng.integers(0, _PREFERRED_VIEWS, n)]
    cosine = 1 + np.log(rng.uniform(np.exp(-2 * _CONCENTRATION), 1, n)) / _CONCENTRATION
    across = np.cross(direction, centre)
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    near = cosine[:, None] * centre + np.sqrt(np.maximum(1 - cosine**2, 0))[:, None] * across
    direction = np.where(preferred[:, None], near, direction)
    rot = np.degrees(np.arctan2(direction[:, 1], direction[:, 0]))
    tilt = np.degrees(np.arccos(np.clip(direction[:, 2], -1, 1)))
    angles = np.stack([rot, tilt, rng.uniform(-180, 180, n)], axis=-1)
    return from_euler(torch.from_numpy(angles)).numpy()


def random_states(n: int, specimen: Specimen, rng: Generator) -> NDArray:
    """Draw the conformation of each of n whole particles, from 0."""
    return rng.choice(len(specimen.fractions), n, p=np.array(specimen.fractions))


def draw_scene(index: int, *, step: SimulateExposures, specimen: Specimen, rng: Generator) -> Scene:
    """Draw what lies in the field of view of micrograph `index`."""
    size = step.height * step.pixel_size, step.width * step.pixel_size
    group = index % step.optics_groups
    thickness = max(step.ice_thickness * (1 + step.ice_variation * rng.normal()), 0.3 * step.ice_thickness)
    hole = _random_hole(size, rng) if rng.random() < step.carbon else None
    crystals = tuple(_random_crystal(size, rng) for _ in range(rng.poisson(step.contaminants)))
    return Scene(
        defocus=random_defocus(step, rng),
        size=size,
        tilt=step.tilt,
        tilt_axis=rng.uniform(-90, 90),
        thickness=thickness,
        thickness_bend=step.ice_variation * rng.normal(size=5) * (0.8, 0.8, 0.6, 0.6, 0.6),
        group=group,
        beam_tilt_mrad=optics_groups(step)[group],
        hole=hole,
        crystals=crystals,
        molecules=_random_molecules(step, specimen, size, thickness, hole, crystals, rng),
    )


def _random_hole(size: tuple[float, float], rng: Generator) -> tuple[float, float, float]:
    """A hole whose edge crosses the view and leaves its centre free."""
    angle = rng.uniform(0, 2 * np.pi)
    distance = _HOLE_RADIUS_A - rng.uniform(0.15, 0.4) * min(size)
    x, y = size[1] / 2 + distance * np.cos(angle), size[0] / 2 + distance * np.sin(angle)
    return x, y, _HOLE_RADIUS_A


def _random_crystal(size: tuple[float, float], rng: Generator) -> Crystal:
    radius = math.exp(rng.uniform(*np.log(_CRYSTAL_RADIUS_A)))
    return Crystal(rng.uniform(0, size[1]), rng.uniform(0, size[0]), radius, int(rng.integers(2**31)))


def _random_molecules(
    step: SimulateExposures,
    specimen: Specimen,
    size: tuple[float, float],
    thickness: float,
    hole: tuple[float, float, float] | None,
    crystals: tuple[Crystal, ...],
    rng: Generator,
) -> Molecules:
    diameter = specimen.diameter
    free = _place(step.particles, size, diameter, hole, crystals, rng)
    kind = np.full(len(free), REAL, "U11")
    kind[rng.random(len(free)) < step.broken] = BROKEN
    # Every partner adds a particle and makes two of them overlap.
    hosts = np.flatnonzero((rng.random(len(free)) < step.overlapping / 2) & (kind == REAL))
    angle = rng.uniform(0, 2 * np.pi, len(hosts))
    away = diameter * rng.uniform(0.3, 0.75, len(hosts))
    partners = free[hosts] + away[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    inside = np.all((partners >= 0) & (partners < (size[1], size[0])), axis=1)
    seen = [
        ok and _is_free(x, y, diameter, hole, crystals) for ok, (x, y) in zip(inside, partners, strict=True)
    ]
    position = np.concatenate([free, partners[np.array(seen, bool)]])
    kind = np.concatenate([kind, np.full(sum(seen), REAL, "U11")])
    # Who overlaps is seen at the end: a partner may touch a third particle.
    near = np.unique(KDTree(position).query_pairs(diameter, output_type="ndarray")) if len(position) else []
    kind[near] = np.where(kind[near] == REAL, OVERLAPPING, kind[near])
    n = len(position)
    state = random_states(n, specimen, rng)
    fragments = len(specimen.fractions) + rng.integers(0, max(specimen.n_broken, 1), n)
    room = max(thickness - diameter, 0.1 * diameter) / 2
    return Molecules(
        position=position,
        depth=rng.uniform(-room, room, n),
        rotation=random_rotations(n, step, rng),
        state=np.where(kind == BROKEN, fragments, state),
        kind=kind,
    )


def _place(
    wanted: int,
    size: tuple[float, float],
    diameter: float,
    hole: tuple[float, float, float] | None,
    crystals: tuple[Crystal, ...],
    rng: Generator,
) -> NDArray:
    """Positions (n, 2) a diameter apart, off carbon and crystals; fewer than `wanted` if there is no room."""
    cell = diameter
    taken: dict[tuple[int, int], list[tuple[float, float]]] = {}
    places: list[tuple[float, float]] = []
    for x, y in rng.uniform((0, 0), (size[1], size[0]), (wanted * _TRIES, 2)).tolist():
        if len(places) == wanted:
            break
        if not _is_free(x, y, diameter, hole, crystals):
            continue
        column, row = int(x // cell), int(y // cell)
        near = (p for i in (-1, 0, 1) for j in (-1, 0, 1) for p in taken.get((column + i, row + j), ()))
        if any(math.hypot(x - p[0], y - p[1]) < diameter for p in near):
            continue
        taken.setdefault((column, row), []).append((x, y))
        places.append((x, y))
    return np.array(places).reshape(-1, 2)


def _is_free(
    x: float,
    y: float,
    diameter: float,
    hole: tuple[float, float, float] | None,
    crystals: tuple[Crystal, ...],
) -> bool:
    """Whether a particle at (x, y) Å touches neither carbon nor a crystal."""
    if hole and math.hypot(x - hole[0], y - hole[1]) > hole[2] - diameter / 2:
        return False
    return all(math.hypot(x - c.x, y - c.y) >= c.radius + diameter / 2 for c in crystals)
