"""How far poses of images taken before and after the stage was tilted show that tilt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy.optimize import root_scalar
from scipy.special import chdtr
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops import symmetry
from halfmap.ops.rotations import angular_distance, mean_rotation

NEAR_DEG = 15.0
"""Of the common rotation, where a pair is said to show it: tilts that are found scatter by 5 to 10°."""

_FEWEST = 5

_SAMPLE, _CANDIDATES = 300, 20
"""Pairs that a common rotation is searched with, and those of them whose own rotations are tried."""

_ROUNDS = 8
_DRAWS = 99
"""Times that images are paired at random."""

_CELLS = 1 << 22

_STRAIGHT, _WIDE = 1e-9, 2.0
"""Least and greatest variance that is told from none and from any, over the square of `NEAR_DEG`."""


@dataclass(frozen=True, eq=False)
class TiltPairs:
    """Rotations from untilted to tilted images.

    Attributes
    ----------
    common : Tensor (3, 3), float64
        Rotation that most pairs show, from the untilted image's frame to the tilted one's.
    turns : Tensor (n, 3, 3), float64
        Of each pair; of all that its point group allows, the one nearest to it.
    residual_deg : Tensor (n,)
        Angle between both.
    probability : float
        That as many pairs at random are as near to a common rotation.
    chance : float
        Share of these that are near.
    """

    common: Tensor
    turns: Tensor
    residual_deg: Tensor
    probability: float
    chance: float

    @property
    def near(self) -> Tensor:
        """Which pairs (n,) show the common rotation."""
        return self.residual_deg < NEAR_DEG

    @property
    def share(self) -> float:
        """Of pairs that do."""
        return float(self.near.double().mean())

    @property
    def concentration(self) -> float:
        """Fisher's concentration of the tilted directions; 0 if they scatter as evenly as is looked at.

        It is that of near pairs, corrected for those which scatter farther, as if alike about all axes.
        """
        directions = self.turns[self.near][:, :, 2]
        n, resultant = len(directions), float(directions.sum(0).norm())
        return _untruncated((n - resultant) / (n - 1)) if n > 2 else 0.0

    @property
    def angle_error_deg(self) -> float:
        """Standard error of the common tilt angle: of what near pairs are tilted by about the common axis."""
        directions = self.turns[self.near][:, :, 2]
        if len(directions) < 2:
            return math.inf
        axis = torch.deg2rad(tilts(self.common)[1])
        # A tilt about this axis moves the direction from z towards (sin, -cos).
        sideways = directions[:, 0] * axis.sin() - directions[:, 1] * axis.cos()
        angles = torch.rad2deg(torch.atan2(sideways, directions[:, 2]))
        return float(angles.std() / len(angles) ** 0.5)


def compare_tilts(untilted: Tensor, tilted: Tensor, *, group: str, seed: int = 0) -> TiltPairs:
    """Find the rotation that pairs of poses have in common.

    Each pair of poses gives a rotation from one image to the other, as often as the point group has
    operators. The rotations of some pairs are tried on all; the one that most are near to is refined by
    averaging these. Untilted images paired with other tilted ones show what chance gives.

    Parameters
    ----------
    untilted, tilted : Tensor (n, 3, 3)
        Rotations of the same particles before and after, in the same order.
    group : str
        Point group of the map.
    seed : int
        Of the samples.

    Returns
    -------
    TiltPairs

    Raises
    ------
    ShapeError
        If there are not as many of both.
    ParameterError
        If there are fewer than five.

    References
    ----------
    .. [1] Rosenthal & Henderson 2003, J. Mol. Biol. 333, 721-745, DOI 10.1016/j.jmb.2003.07.013
    .. [2] Fisher 1953, Proc. R. Soc. A 217, 295-305, DOI 10.1098/rspa.1953.0064 (concentration)
    """
    if untilted.shape != tilted.shape:
        raise ShapeError(f"{len(untilted)} untilted and {len(tilted)} tilted images are no pairs")
    if len(untilted) < _FEWEST:
        raise ParameterError(f"{len(untilted)} tilt pairs are too few", hint=f"give {_FEWEST} or more")
    generator = torch.Generator().manual_seed(seed)
    operators = symmetry.operators(group)
    before, after = untilted.double(), tilted.double()
    chosen = torch.randperm(len(before), generator=generator)[:_SAMPLE]
    common, support = _common(before[chosen], after[chosen], operators)
    turns, residual = _nearest(before, after, operators, common)

    supports, shares = [], []
    for _ in range(_DRAWS):
        order = torch.randperm(len(chosen), generator=generator)
        other = chosen[order], chosen[order.roll(1)]
        found, by_chance = _common(before[other[0]], after[other[1]], operators)
        _, apart = _nearest(before[other[0]], after[other[1]], operators, found)
        supports.append(by_chance)
        shares.append(float((apart < NEAR_DEG).double().mean()))
    probability = (1 + sum(each >= support for each in supports)) / (1 + _DRAWS)
    return TiltPairs(common, turns, residual, probability, sum(shares) / _DRAWS)


def _untruncated(square: float) -> float:
    """Concentration of directions that rotations within `NEAR_DEG` scatter by a mean square about each axis.

    Rotations that scatter alike about three axes are near with the probability that a chi-squared variable of
    three degrees of freedom is below ``t = (NEAR_DEG / sigma)**2``; their mean square about one is that of
    all by the ratio of the probabilities for five degrees and for three.
    """
    reach = math.radians(NEAR_DEG) ** 2

    def excess(log_variance: float) -> float:
        t = reach / math.exp(log_variance)
        return math.exp(log_variance) * float(chdtr(5, t) / chdtr(3, t)) - square

    narrow, wide = math.log(reach * _STRAIGHT), math.log(_WIDE * reach)
    if excess(narrow) >= 0:
        return 1 / (reach * _STRAIGHT)
    if excess(wide) <= 0:
        return 0.0
    return math.exp(-float(root_scalar(excess, bracket=(narrow, wide)).root))


def tilts(turns: Tensor) -> tuple[Tensor, Tensor]:
    """Angle, -180 to 180, and axis, above -90 to 90, of tilts in degrees: (..., 3, 3) -> (...) twice.

    The axis is in the plane of the tilted image, from x towards y; the angle is by the right-hand rule about
    it. What the images are turned by in their plane besides is left out.
    """
    x, y, z = turns[..., :, 2].unbind(-1)
    angle = torch.rad2deg(torch.atan2(torch.hypot(x, y), z))
    axis = torch.rad2deg(torch.atan2(x, -y))
    back = (axis <= -90) | (axis > 90)
    return torch.where(back, -angle, angle), torch.where(back, axis - 180 * axis.sign(), axis)


def _common(before: Tensor, after: Tensor, operators: Tensor) -> tuple[Tensor, float]:
    """Rotation that most pairs are near, and how many by a soft count."""
    every = (after[:, None] @ operators) @ before[:, None].mT
    candidates = every[:_CANDIDATES].flatten(0, 1)
    support = torch.zeros(len(candidates), dtype=torch.float64)
    for part in _parts(len(every), len(operators) * len(candidates)):
        traces = every[part].flatten(2) @ candidates.flatten(1).T
        support += _weights(traces.amax(1)).sum(0)
    common = candidates[support.argmax()]
    weights = torch.zeros(0)
    for _ in range(_ROUNDS):
        traces, place = (every.flatten(2) @ common.flatten()).max(1)
        weights = _weights(traces)
        common = mean_rotation(every[torch.arange(len(every)), place], weights=weights)
    return common, float(weights.sum())


def _nearest(before: Tensor, after: Tensor, operators: Tensor, common: Tensor) -> tuple[Tensor, Tensor]:
    every = (after[:, None] @ operators) @ before[:, None].mT
    place = (every.flatten(2) @ common.flatten()).argmax(1)
    turns = every[torch.arange(len(every)), place]
    return turns, angular_distance(common, turns)


def _weights(traces: Tensor) -> Tensor:
    """1 where rotations are the same, falling to 0 where they differ by as much as pairs may."""
    angles = ((traces - 1) / 2).clamp(-1, 1).arccos()
    return (1 - (angles / math.radians(NEAR_DEG)).square()).clamp_min(0)


def _parts(n: int, cells: int) -> Iterator[slice]:
    step = max(1, _CELLS // cells)
    return (slice(start, start + step) for start in range(0, n, step))
