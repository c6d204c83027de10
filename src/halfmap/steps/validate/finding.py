"""What a check finds, and what all checks are given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from halfmap.data import ParticleSet
from halfmap.io.half_maps import HalfMaps
from halfmap.ops.fsc import CorrectedFSC
from halfmap.ops.fsc_interval import Interval, Scatter

if TYPE_CHECKING:
    from torch import Tensor

    from halfmap.steps.validate.step import ValidateStep

_FEWEST = 3
"""Shells that half maps agree in at least, if they agree at all."""

Light = Literal["green", "amber", "red", "grey"]
"""All is well; look closer; something is wrong; not looked at."""


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Attributes
    ----------
    name : str
        What was looked at, in a few words.
    light : str
        Green, amber, red; grey where it could not be looked at.
    sentence : str
        What was found, with its figure, and what to do if it is not green.
    values : dict
        Figures, as JSON holds them, by names with units at their ends.
    pictures : tuple of str
        Files in the job's folder.
    method : str
        How it was measured, in a sentence or two, with the source's DOI.
    """

    name: str
    light: Light
    sentence: str
    values: dict[str, Any] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()
    method: str = ""


@dataclass(frozen=True, eq=False)
class Given:
    """What is examined.

    Attributes
    ----------
    step : ValidateStep
        Parameters.
    halves : HalfMaps
    mask : Tensor (n, n, n)
    fsc : CorrectedFSC
        Of the half maps within the mask.
    resolution : float
        Å, where it falls below 0.143.
    interval : Interval
        In which that truly is.
    scatter : Scatter
        Of masked noise.
    particles : ParticleSet or None
        With their poses.
    diameter : float
        Of the sphere that holds the particle, Å.
    other, untilted, tilted : ParticleSet or None
        Of a second refinement, and of tilt pairs, with their poses.
    """

    step: ValidateStep
    halves: HalfMaps
    mask: Tensor
    fsc: CorrectedFSC
    resolution: float
    interval: Interval
    scatter: Scatter
    particles: ParticleSet | None
    diameter: float
    other: ParticleSet | None = None
    untilted: ParticleSet | None = None
    tilted: ParticleSet | None = None

    @property
    def agrees(self) -> bool:
        """Whether the half maps surely agree in more than the first few shells."""
        return self.interval.coarse < self.side / _FEWEST

    @property
    def side(self) -> float:
        """Side of the box in Å."""
        return self.halves.box * self.halves.pixel_size
