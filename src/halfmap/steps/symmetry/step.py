"""The step that finds the point group of a map and puts it into the standard setting."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from halfmap.engine import Context, Input, Out, Param, Step

COMPARISON, DECISION, OUTPUT = "Comparison", "Decision", "Output"


class SymmetryStep(Step, name="symmetry"):
    """Find the point group of a map in any orientation, and put the map into the standard setting.

    C2 to C12, D2 to D12, T, O and I are tried about all axes. The score of a group is the correlation of the
    map with itself under its operators, over all resolution shells by their signal, the spherical average
    left out. It is compared with what the noise of the map would leave of a perfect symmetry, and with maps
    of random phases. The largest group holds whose weakest operators come up to the noise's mark.

    References
    ----------
    .. [1] Crowther 1972, in: The Molecular Replacement Method, Gordon & Breach, 173-178
    """

    outputs = {
        "map": Out("map.mrc", "DensityMap.mrc"),
        "scores": Out("symmetry.star", "PointGroups.star.halfmap"),
        "picture": Out("symmetry.png", "Image2D.png.halfmap.overview"),
    }

    map: Path = Input("map, best without any symmetry imposed", node="DensityMap.mrc")
    half1: Path | None = Input(
        "first half map, which tell how much noise there is; default: the noise around the particle",
        node="DensityMap.mrc.halfmap",
        default=None,
    )
    half2: Path | None = Input("second half map", node="DensityMap.mrc.halfmap", default=None)
    pixel_size: float | None = Param(
        None, "voxel size; default: the header's", unit="Å/px", section=COMPARISON, advanced=True, gt=0
    )
    diameter: float | None = Param(
        None, "diameter of the particle; default: measured on the map", unit="Å", section=COMPARISON, gt=0
    )
    resolution: float = Param(
        15.0, "finest detail that is compared, at least 3 pixels", unit="Å", section=COMPARISON, gt=0, le=100
    )
    groups: tuple[str, ...] = Param((), "point groups to try; default: all", unit="none", section=COMPARISON)
    least_share: float = Param(
        0.9,
        "least correlation under a group's weakest operators, in parts of what the noise leaves",
        unit="none",
        section=DECISION,
        gt=0,
        le=1.2,
    )
    null_maps: int = Param(
        10,
        "maps of random phases that scores are compared with; 0 for none",
        unit="none",
        section=DECISION,
        advanced=True,
        ge=0,
        le=1000,
    )
    seed: int = Param(1, "seed of the random phases", unit="none", section=DECISION, advanced=True, ge=0)
    symmetrise: bool = Param(False, "average the map over the group found", unit="none", section=OUTPUT)

    @model_validator(mode="after")
    def _check(self) -> SymmetryStep:
        if (self.half1 is None) != (self.half2 is None):
            raise ValueError("half maps come in pairs: give both --half1 and --half2")
        if self.null_maps == 1:
            raise ValueError("--null-maps must be 0, or 2 or more to tell how they scatter")
        return self

    def run(self, ctx: Context) -> None:
        """Read the map, find its group and axes, write it turned, the scores and a picture."""
        from halfmap.steps.symmetry import pictures, search

        volume, halves = search.read(self, ctx)
        found = search.find(self, volume, halves)
        turned = search.turn(found, volume, symmetrise=self.symmetrise)
        search.write(ctx, found, volume, turned, least_share=self.least_share)
        pictures.draw_symmetry(
            ctx.folder / "symmetry.png", found, turned, volume.pixel_size, self.least_share
        )
