"""What the steps that work on two half maps have in common: which these are, and the mask of the particle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from halfmap.engine import Context, Input, Param, Step

if TYPE_CHECKING:
    from torch import Tensor

    from halfmap.io.half_maps import HalfMaps


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
