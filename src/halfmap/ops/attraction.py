"""Views that attract particles: where wrong poses go, by two independent sets of poses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops._views import checked_views, sphere
from halfmap.ops.symmetry import operators, order

_CELLS, _FINE = 3, 6
"""HEALPix orders: of the directions, and of those that measure the areas about them."""

_FEWEST_PARTICLES = 50
"""That agree, and that do not, for attraction to be told."""

_PARTS = 26
"""Tried of the lost views that may be right."""


@dataclass(frozen=True, eq=False)
class Attraction:
    """Which views particles fall into that are lost.

    Attributes
    ----------
    directions : Tensor (d, 3)
        Viewing directions, spread over the sphere.
    gain : Tensor (d,)
        Wrong poses about each direction over what wrong poses in no particular direction would leave there:
        1 by chance, and not below 0.
    deviation : Tensor (d,)
        How far above chance, in standard deviations of chance.
    lost : float
        Part of the particles whose views disagree.
    index : float
        Part of the wrong poses that is too many somewhere: 0 none, 1 all, in a few directions. By chance
        above 0 as well; see `expected`.
    expected : float
        Mean index if nothing attracts.
    probability : float
        That the greatest deviation is as great if nothing attracts.
    """

    directions: Tensor
    gain: Tensor
    deviation: Tensor
    lost: float
    index: float
    expected: float
    probability: float

    def strongest(self, count: int = 1) -> tuple[Tensor, Tensor]:
        """Directions (count, 3) that attract most, and their gain (count,)."""
        first = torch.argsort(-self.deviation, stable=True)[:count]
        return self.directions[first], self.gain[first]


def attraction(
    first: Tensor,
    second: Tensor,
    *,
    group: str = "C1",
    tolerance: float = 15.0,
    half_angle: float = 15.0,
    draws: int = 500,
    seed: int = 0,
) -> Attraction:
    """Find directions that attract particles, from two independent sets of poses of the same particles.

    Where both sets agree on a particle's viewing direction, it is taken to be right. Where they do not, the
    particle is lost, and one or both of its poses are wrong. Right ones are in each direction as often as
    among those that agree. A direction that holds more wrong poses than its share of the sphere attracts.

    Parameters
    ----------
    first, second : Tensor (n, 3, 3)
        Rotations of the particles from two refinements that share no reference, in one frame.
    group : str
        Point group.
    tolerance : float
        Angle in degrees between viewing directions within which they agree.
    half_angle : float
        Of the cones in which particles are counted, degrees.
    draws : int
        Times that chance is drawn.
    seed : int
        Of these draws.

    Returns
    -------
    Attraction

    Raises
    ------
    ShapeError
        If the sets are not of as many particles.
    ParameterError
        If angles are not between 1° and 60°, or too few particles agree or disagree to say anything: 50 each.

    Notes
    -----
    Of N particles, A agree. Of both views of the other L, ``W`` are wrong and ``C = 2 L - W`` right. If d of
    all these, and a of both views of those that agree, are in a cone, ``w = d - C a / (2 A)`` wrong ones are.
    Were they anywhere, ``W u`` would be in a cone that holds the part u of the sphere: the gain is
    ``w / (W u)``. The index is the mean over the sphere of what the gain exceeds 1 by.

    How many of the views are right is not known. If both sets lost particles independently, it would be
    ``C = 2 (sqrt(A N) - A)``; but junk is lost in both, and then it is less, down to none. Of all C up to
    that, the one is taken whose greatest deviation from chance is least: nothing is reported that particles
    lost in both explain, and gains are lower bounds.

    The null distribution is drawn, and each draw treated likewise: as many views of the lost are right as was
    found, as those of the particles that agree, the wrong ones evenly over the sphere, a with the scatter of
    as many particles.

    Particles that both sets have lost to the same direction count as right, which makes the gain smaller than
    it is.
    """
    if first.shape != second.shape:
        raise ShapeError(f"{len(first)} and {len(second)} rotations are not of the same particles")
    if not (1 <= tolerance <= 60 and 1 <= half_angle <= 60):
        raise ParameterError("viewing directions cannot be compared by such an angle", hint="1° to 60°")
    views = [checked_views(each, None)[0] for each in (first, second)]
    agree = _cosine_of_nearest(views[0], views[1], group) >= math.cos(math.radians(tolerance))
    lost, agreed = int((~agree).sum()), int(agree.sum())
    if min(lost, agreed) < _FEWEST_PARTICLES:
        raise ParameterError(
            f"of {len(agree)} particles {agreed} agree on their view and {lost} do not: too few to compare",
            hint=f"{_FEWEST_PARTICLES} of each",
        )
    directions = sphere(group, healpix_order=_CELLS)
    cones = _cones(directions, order(group), half_angle)
    known = _in_cells(torch.cat([each[agree] for each in views]), directions, order(group)) / (2 * agreed)
    area = _in_cells(sphere(group, healpix_order=_FINE), directions, order(group))
    area /= area.sum()
    found = _in_cells(torch.cat([each[~agree] for each in views]), directions, order(group))
    own = _Excess.of(found[:, None], known[:, None], area, np.array([agreed]), len(agree), cones)
    drawn = _by_chance(known, area, agreed, len(agree), float(own.right[0]), draws, seed)
    chance = _Excess.of(*drawn[:2], area, drawn[2], len(agree), cones)
    above = own.deviations[:, 0]
    greatest = chance.deviations.max(0)
    return Attraction(
        directions,
        torch.from_numpy((own.relative[:, 0] + 1).clip(min=0)).repeat(order(group)),
        torch.from_numpy(above).repeat(order(group)),
        lost / len(agree),
        float(own.relative.clip(min=0).mean()),
        float(chance.relative.clip(min=0).mean()),
        float((1 + (greatest >= above.max()).sum()) / (1 + draws)),
    )


class _Excess(NamedTuple):
    """Wrong poses about each direction beyond those that fall there evenly, (cells, data sets)."""

    relative: NDArray[np.float64]
    """Over these."""
    deviations: NDArray[np.float64]
    right: NDArray[np.float64]
    """Part of the views of the lost that is right (data sets), by which the greatest deviation is least."""

    @classmethod
    def of(
        cls,
        found: NDArray[np.float64],
        known: NDArray[np.float64],
        area: NDArray[np.float64],
        agreed: NDArray[np.int64],
        total: int,
        cones: NDArray[np.float64],
    ) -> _Excess:
        """Of both views of the lost (cells, sets), and the parts of the known that each cell has."""
        views = 2 * (total - agreed)
        if_independent = 2 * (np.sqrt(agreed * total) - agreed) / views
        found, usual, evenly = cones @ found, cones @ known, (cones @ area)[:, None]
        scatter, even_scatter = cones**2 @ known, (cones**2 @ area)[:, None]
        relative, deviations = (np.full(found.shape, np.inf) for _ in range(2))
        right = np.zeros(len(agreed))
        for part in np.linspace(1, 0, _PARTS)[:, None] * if_independent:
            seen, wrong = part * views, (1 - part) * views
            excess = found - seen * usual - wrong * evenly
            # Counts scatter as Poisson's, the known ones by their number.
            spread = wrong * even_scatter + seen * (1 + seen / agreed) * scatter
            above = excess / np.sqrt(spread)
            less = above.max(0) < deviations.max(0)
            deviations, right = np.where(less, above, deviations), np.where(less, part, right)
            relative = np.where(less, excess / (wrong * evenly), relative)
        return cls(relative, deviations, right)


def _by_chance(
    known: NDArray[np.float64],
    area: NDArray[np.float64],
    agreed: int,
    total: int,
    right: float,
    draws: int,
    seed: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Lost views and parts of known ones in each cell (cells, draws), and how many agree, by chance.

    A part of the lost views is right.
    """
    generator = np.random.default_rng(seed)
    lost = 1 - agreed / total
    # A particle that one set has lost has one right view, of two.
    both, one, none = generator.multinomial(
        total, (1 - lost, 2 * right * lost, (1 - 2 * right) * lost), draws
    ).T
    found = generator.multinomial(one + 2 * none, area) + generator.multinomial(one, known)
    return found.T.astype(float), (generator.multinomial(both, known) / both[:, None]).T, both


def _in_cells(views: Tensor, directions: Tensor, copies: int) -> NDArray[np.float64]:
    """Count views by the nearest of the directions of `sphere`, equivalent ones together."""
    unit = len(directions) // copies
    nearest = KDTree(directions.numpy()).query(views.numpy())[1] % unit
    return np.bincount(nearest, minlength=unit).astype(float)


def _cones(directions: Tensor, copies: int, half_angle: float) -> NDArray[np.float64]:
    """Which cells are in the cone about each (unit, unit): more than once, if their equivalents are too."""
    unit = len(directions) // copies
    inside = directions[:unit] @ directions.T >= math.cos(math.radians(half_angle))
    return inside.reshape(unit, copies, unit).sum(1).double().numpy()


def _cosine_of_nearest(a: Tensor, b: Tensor, group: str) -> Tensor:
    """Cosine (n,) between directions (n, 3) and the nearest equivalents of others."""
    return torch.stack([(a * (b @ operator)).sum(1) for operator in operators(group)]).amax(0)
