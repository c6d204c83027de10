"""Poses of the table that a local refinement begins at and stays near to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.data import ParticleSet
from halfmap.errors import ParameterError, TableError
from halfmap.ops import symmetry
from halfmap.search.local import PosePrior

if TYPE_CHECKING:
    from halfmap.steps.refine.step import RefineStep


@dataclass(frozen=True, eq=False)
class GivenPoses:
    """Poses of the table, and how far from them or their equivalents they may be.

    Attributes
    ----------
    rotations, shifts_A : Tensor (n, 3, 3), (n, 2), float64
    equivalents : Tensor (m, 3, 3)
        Turns of the map after which it may look nearly the same; a pose is near one of as many, each of which
        is as probable.
    turn_deg, shift_A : float
        Standard deviations of the normal prior about and along an axis.
    fulcrum_A : Tensor (3,)
        Point of the map, from its centre, that turns leave where it is.
    """

    rotations: Tensor
    shifts_A: Tensor
    equivalents: Tensor
    turn_deg: float
    shift_A: float
    fulcrum_A: Tensor

    def starts(self) -> dict[str, NDArray]:
        """Where the first iteration begins, in the form that an iteration leaves its poses in."""
        n, m = len(self.rotations), len(self.equivalents)
        return {
            "owner": np.repeat(np.arange(n), m),
            "rotations": (self.rotations[:, None] @ self.equivalents).flatten(0, 1).numpy(),
            "shifts_A": self.shifts_A.repeat_interleave(m, 0).numpy(),
        }

    def prior(self, rows: NDArray[np.intp], rotations: Tensor, pixel_size: float) -> PosePrior:
        """Priors of poses (k, 3, 3), each about the nearest equivalent of what its row (k,) is given."""
        mates = self.rotations[rows, None] @ self.equivalents
        nearest = torch.einsum("kij,kmij->km", rotations.cpu(), mates).argmax(1)
        return PosePrior.about(
            mates[torch.arange(len(rows)), nearest],
            self.shifts_A[rows] / pixel_size,
            turn_deg=self.turn_deg,
            shift_px=self.shift_A / pixel_size,
            fulcrum_px=self.fulcrum_A / pixel_size,
        )

    @property
    def error_deg(self) -> float:
        """Standard deviation of a whole turn."""
        return math.sqrt(3) * self.turn_deg


def given_poses(step: RefineStep, particles: ParticleSet, centre_A: Tensor) -> GivenPoses | None:
    """Take the poses of the table where the refinement is to be a local one.

    Parameters
    ----------
    step, particles
        Parameters and table.
    centre_A : Tensor (3,)
        Of what is compared, which turns leave where it is unless a fulcrum is given.

    Raises
    ------
    ParameterError
        If equivalents or a fulcrum are given without it.
    TableError
        If the table has no poses.
    """
    if not step.local:
        for name, value, usual in (("relax", step.relax, "C1"), ("fulcrum", step.fulcrum, None)):
            if value != usual:
                raise ParameterError(
                    f"--{name} is of a local refinement", hint="add --local, or leave it out"
                )
        return None
    if "rlnAngleRot" not in particles.rows.columns:
        raise TableError(
            "the particles have no poses to begin a local refinement at (column _rlnAngleRot)",
            path=particles.path,
            hint="leave out --local, and all directions are searched",
        )
    poses = particles.poses
    return GivenPoses(
        rotations=poses.rotations.double(),
        shifts_A=poses.shifts_A.double(),
        equivalents=_distinct(symmetry.operators(step.relax), symmetry.operators(step.symmetry)),
        turn_deg=step.turn_deviation,
        shift_A=step.shift_deviation,
        fulcrum_A=centre_A if step.fulcrum is None else torch.tensor(step.fulcrum, dtype=torch.float64),
    )


def _distinct(operators: Tensor, same: Tensor) -> Tensor:
    """Those of some operators (m, 3, 3) that are not others followed by one of a group's (k, 3, 3)."""
    kept: list[Tensor] = []
    for each in operators:
        if not any(bool(torch.isclose(each, other @ same, atol=1e-3).all((1, 2)).any()) for other in kept):
            kept.append(each)
    return torch.stack(kept)
