"""What the steps that work on two half maps have in common: which these are, and the mask of the particle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from halfmap.engine import Context, Input, Param, Step
from halfmap.errors import TableError

if TYPE_CHECKING:
    from torch import Tensor

    from halfmap.data import ParticleSet
    from halfmap.io.half_maps import HalfMaps

_ANGLES = "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"


class HalfMapStep(Step):
    """A step on two half maps of any program, within a mask."""

    half1: Path = Input("first half map, unfiltered", node="DensityMap.mrc")
    half2: Path | None = Input(
        "second half map; default: the file named as the first but for half2",
        node="DensityMap.mrc",
        default=None,
    )
    mask: Path | None = Input(
        "soft mask of the particle; default: made from the map", node="Mask3D.mrc", default=None
    )
    pixel_size: float | None = Param(
        None, "voxel size as calibrated; default: the headers'", unit="Å/px", section="Half maps", gt=0
    )

    def read(self, ctx: Context) -> tuple[HalfMaps, Tensor]:
        """Read the half maps, and the mask, or make one of their mean.

        Raises
        ------
        FileFormatError, ShapeError, ParameterError
            If half maps or mask cannot be used.
        """
        from halfmap.io.half_maps import particle_mask, read_half_maps

        second = None if self.half2 is None else ctx.resolve(self.half2)
        halves = read_half_maps(ctx.resolve(self.half1), second, pixel_size=self.pixel_size)
        return halves, particle_mask(halves, None if self.mask is None else ctx.resolve(self.mask))


def refined_particles(path: Path) -> ParticleSet:
    """Particles of a table that has their poses.

    Raises
    ------
    TableError
        If it has none.
    """
    from halfmap.io.tables import read_particles

    found = read_particles(path)
    missing = next((name for name in _ANGLES if name not in found.rows.columns), None)
    if missing is not None:
        hint = "give those of a refinement"
        raise TableError(f"the particles have no poses (column _{missing})", path=path, hint=hint)
    return found
