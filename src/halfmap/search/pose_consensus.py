"""How far two refinements of the same particles agree, whatever frames their maps are in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halfmap.data.poses import Poses
from halfmap.errors import ShapeError
from halfmap.ops import symmetry
from halfmap.ops.rotations import mean_rotation, to_rotation_vector

_SAMPLE, _CANDIDATES = 4000, 200
"""Particles that frames are searched with, and those of them whose own frames are tried."""

_ASCENTS, _ROUNDS = 4, 12
"""Candidates that are refined, and how often."""

_WIDE, _WIDEST_DEG = 4.0, 20.0
"""Where refining begins: so many tolerances, but no more degrees."""

_FITS = 5
"""Times that the shift of the origin is fitted: outliers count less each time."""

_DRAWS = 4
"""Of random pairs."""

_CELLS = 1 << 22
"""Particles, operators and candidates compared at a time."""

_OTHER_HAND = (-1.0, -1.0, 1.0)


@dataclass(frozen=True, eq=False)
class Frame:
    """How the frame of a second map differs from that of a first.

    Attributes
    ----------
    rotation : Tensor (3, 3), float64
        F in ``R2 = R1 F``.
    shift_A : Tensor (3,), float64
        s in ``t2 = t1 + (R1 F s)``, of which images see x and y.
    mirrored : bool
        Whether the second map is of the other hand; then ``R1`` is turned by 180° in the plane before.
    """

    rotation: Tensor
    shift_A: Tensor
    mirrored: bool

    def of_poses(self, poses: Poses) -> Poses:
        """Poses against the first map, as they are against the second."""
        rotations = _of_hand(poses.rotations, self.mirrored).double() @ self.rotation
        return Poses(rotations, poses.shifts_A.double() + (rotations @ self.shift_A)[:, :2])


@dataclass(frozen=True, eq=False)
class Consensus:
    """What two refinements agree in.

    Attributes
    ----------
    frame : Frame
        Of the second map.
    turns_deg : Tensor (n, 3), float64
        Rotation vector, in the image's frame, from the first pose to the second's nearest equivalent: x and y
        change the viewing direction, z the angle in the plane.
    moves_A : Tensor (n, 2), float64
        Difference of the shifts.
    agree : Tensor (n,) of bool
        Which particles differ by less than both tolerances.
    chance : float
        Share that agrees with orientations dealt anew among particles, after the same search.
    chance_error : float
        Its standard error.
    chance_angles_deg : Tensor (m,)
        Angles between poses of different particles.
    """

    frame: Frame
    turns_deg: Tensor
    moves_A: Tensor
    agree: Tensor
    chance: float
    chance_error: float
    chance_angles_deg: Tensor

    @property
    def share(self) -> float:
        """Of particles that agree."""
        return float(self.agree.double().mean())

    @property
    def beyond_chance(self) -> float:
        """Share that agrees of those that chance would leave apart (Cohen's kappa)."""
        return (self.share - self.chance) / max(1 - self.chance, 1e-9)

    @property
    def sigmas_above_chance(self) -> float:
        """By how many standard errors more particles agree than by chance."""
        counted = self.share * (1 - self.share) / len(self.agree)
        return (self.share - self.chance) / max(math.hypot(self.chance_error, math.sqrt(counted)), 1e-9)

    @property
    def angles_deg(self) -> Tensor:
        """Angles (n,) between both poses."""
        return self.turns_deg.norm(dim=1)


def compare_poses(
    first: Poses, second: Poses, *, group: str, angle_deg: float, shift_A: float, seed: int = 0
) -> Consensus:
    """Compare two sets of poses of the same particles.

    The frames of both maps may differ by any rotation, a shift of the origin and the hand. Each of some
    hundred particles says what the rotation would be, and that which brings most of a sample together is
    refined by averaging over those; the shift is fitted by least squares. The same is done with orientations
    of different particles: preferred views and point groups make poses agree by chance.

    Parameters
    ----------
    first, second : Poses
        Of the same particles, in the same order.
    group : str
        Point group of the maps.
    angle_deg, shift_A : float
        Differences that count as agreement.
    seed : int
        Of the samples.

    Returns
    -------
    Consensus

    Raises
    ------
    ShapeError
        If there are not as many poses in both, or none.

    References
    ----------
    .. [1] Sorzano et al. 2022, Acta Cryst. D78, 410-423, DOI 10.1107/S2059798322001978
    .. [2] Cohen 1960, Educ. Psychol. Meas. 20, 37-46, DOI 10.1177/001316446002000104 (beyond chance)
    """
    if len(first) != len(second) or not len(first):
        raise ShapeError(f"{len(first)} and {len(second)} poses are not of the same particles")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(first), generator=generator)[:_SAMPLE]
    one, two = first[chosen], second[chosen]
    frame = find_frame(one, two, group=group, angle_deg=angle_deg)
    turns, moves = differences(first, second, frame, group=group)

    shares, angles = [], []
    for _ in range(_DRAWS):
        other = Poses(two.rotations[_derangement(len(chosen), generator)], two.shifts_A)
        found = find_frame(one, other, group=group, angle_deg=angle_deg)
        by_chance, _ = differences(one, other, found, group=group)
        # Shifts stay each particle's own: that they agree says nothing of orientations.
        shares.append(float(_within(by_chance, moves[chosen], angle_deg, shift_A).double().mean()))
        angles.append(by_chance.norm(dim=1))
    chance = sum(shares) / _DRAWS
    counted = chance * (1 - chance) / len(chosen)
    drawn = sum((each - chance) ** 2 for each in shares) / (_DRAWS - 1)
    agree = _within(turns, moves, angle_deg, shift_A)
    return Consensus(frame, turns, moves, agree, chance, math.sqrt(counted + drawn), torch.cat(angles))


def find_frame(first: Poses, second: Poses, *, group: str, angle_deg: float) -> Frame:
    """Find the frame of a second map in that of a first, by poses of the same particles.

    Parameters
    ----------
    first, second : Poses
        Some thousand; all of them are compared with all candidates.
    group, angle_deg
        As for `compare_poses`.

    Returns
    -------
    Frame
        In which most particles agree, of either hand.
    """
    operators = symmetry.operators(group)
    best: tuple[float, Tensor, bool] | None = None
    for mirrored in (False, True):
        relative = _of_hand(first.rotations, mirrored).double().mT @ second.rotations.double()
        support, rotation = _best_rotation(relative, operators, math.radians(angle_deg))
        # Of two hands that do alike, the same one.
        if best is None or support > best[0]:
            best = support, rotation, mirrored
    assert best is not None
    _, rotation, mirrored = best
    frame = Frame(rotation, torch.zeros(3, dtype=torch.float64), mirrored)
    turns, moves = differences(first, second, frame, group=group)
    near = turns.norm(dim=1) < angle_deg
    rows = (_of_hand(first.rotations, mirrored).double() @ rotation)[near, :2]
    return Frame(rotation, _origin(rows, moves[near]), mirrored)


def differences(first: Poses, second: Poses, frame: Frame, *, group: str) -> tuple[Tensor, Tensor]:
    """Rotation vectors (n, 3) in degrees and shifts (n, 2) in Å from first poses to second ones."""
    operators = symmetry.operators(group)
    there = frame.of_poses(first)
    second_rotations = second.rotations.double()
    turns = []
    for part in _parts(len(first), len(operators)):
        apart = there.rotations[part].mT @ second_rotations[part]
        identity = torch.eye(3, dtype=torch.float64)[None]
        _, nearest = _cosines(apart, operators, identity)
        equivalent = second_rotations[part] @ operators[nearest[:, 0]]
        turns.append(to_rotation_vector(equivalent @ there.rotations[part].mT))
    return torch.cat(turns), second.shifts_A.double() - there.shifts_A


def _best_rotation(relative: Tensor, operators: Tensor, tolerance: float) -> tuple[float, Tensor]:
    """How many relative rotations (n, 3, 3) are near the rotation that most are near, and that."""
    wide = max(tolerance, min(_WIDE * tolerance, math.radians(_WIDEST_DEG)))
    candidates = relative[:_CANDIDATES]
    support = torch.zeros(len(candidates), dtype=torch.float64)
    for part in _parts(len(relative), len(operators) * len(candidates)):
        cosines, _ = _cosines(relative[part], operators, candidates)
        support += _weights(cosines, wide).sum(0)
    refined = [
        _refined(candidates[index], relative, operators, wide, tolerance)
        for index in support.argsort(descending=True, stable=True)[:_ASCENTS]
    ]
    return max(refined, key=lambda each: each[0])


def _refined(
    rotation: Tensor, relative: Tensor, operators: Tensor, wide: float, tolerance: float
) -> tuple[float, Tensor]:
    support = 0.0
    for number in range(_ROUNDS):
        width = wide * (tolerance / wide) ** min(1.0, 2 * number / _ROUNDS)
        cosines, nearest = _cosines(relative, operators, rotation[None])
        weights = _weights(cosines[:, 0], width)
        support = float((cosines[:, 0] > math.cos(min(tolerance, math.pi))).double().sum())
        if float(weights.sum()) > 0:
            rotation = mean_rotation(relative @ operators[nearest[:, 0]], weights=weights)
    return support, rotation


def _cosines(relative: Tensor, operators: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines (n, c) of the angles from candidates to the nearest of each one's equivalents, and which."""
    equivalents = (relative[:, None] @ operators).flatten(2)
    traces = equivalents @ candidates.flatten(1).T
    largest, nearest = traces.max(dim=1)
    return ((largest - 1) / 2).clamp(-1, 1), nearest


def _weights(cosines: Tensor, width: float) -> Tensor:
    """1 at no angle, 0 from a width in radians on."""
    return (1 - cosines.arccos().square() / width**2).clamp_min(0)


def _origin(rows: Tensor, moves: Tensor) -> Tensor:
    """Shift (3,) of the origin whose projections by rows (n, 2, 3) are moves (n, 2), but for outliers."""
    shift = torch.zeros(3, dtype=torch.float64)
    if len(rows) < 3:
        return shift
    weights = torch.ones(len(rows), dtype=torch.float64)
    for _ in range(_FITS):
        normal = torch.einsum("n,nij,nik->jk", weights, rows, rows)
        right = torch.einsum("n,nij,ni->j", weights, rows, moves)
        # Views from one side do not tell the shift along them.
        shift = torch.linalg.pinv(normal, rtol=1e-6, hermitian=True) @ right
        left = (moves - rows @ shift).norm(dim=1)
        scale = 2 * left.median().clamp_min(1e-6)
        weights = 1 / (1 + (left / scale) ** 2)
    return shift


def _within(turns_deg: Tensor, moves_A: Tensor, angle_deg: float, shift_A: float) -> Tensor:
    return (turns_deg.norm(dim=1) < angle_deg) & (moves_A.norm(dim=1) < shift_A)


def _of_hand(rotations: Tensor, mirrored: bool) -> Tensor:
    """Poses against the map inverted through its origin, if it is."""
    return rotations.new_tensor(_OTHER_HAND)[:, None] * rotations if mirrored else rotations


def _derangement(n: int, generator: torch.Generator) -> Tensor:
    """Permutation that leaves nothing in its place, if there is one."""
    order = torch.randperm(n, generator=generator)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return other


def _parts(n: int, cells: int) -> Iterator[slice]:
    step = max(1, _CELLS // cells)
    return (slice(start, start + step) for start in range(0, n, step))
