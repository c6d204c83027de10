"""The step that compares two maps."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from halfmap.engine import Context, Input, Out, Param, Step

GRID, ALIGNMENT, DIFFERENCE = "Grid", "Alignment", "Difference"


class CompareStep(Step, name="compare", label="halfmap.compare"):
    """Compare two maps: put the second on the grid of the first, correlate them, and show where they differ.

    The boxes' centres are put onto each other; with --align the second map is also turned, moved and, where
    that fits better, mirrored onto the first. Both are correlated shell by shell within a soft mask, and in a
    window about each voxel. The amplitudes of the second are brought to those of the first, shell by shell,
    and what is left between them is given in standard deviations, with a list of where it is largest. These
    are of the noise around the particle, or of that about each voxel where half maps of both are given.

    References
    ----------
    .. [1] Chen et al. 2013, Ultramicroscopy 135, 24-35, DOI 10.1016/j.ultramic.2013.06.004
    .. [2] Joseph, Lagerstedt, Jakobi, Burnley, Patwardhan, Topf & Winn 2020, J. Chem. Inf. Model. 60,
       2552-2560, DOI 10.1021/acs.jcim.9b01103
    """

    outputs = {
        "map": Out("b_on_a.mrc", "DensityMap.mrc"),
        "scaled": Out("b_scaled.mrc", "DensityMap.mrc.halfmap.compare"),
        "difference": Out("difference.mrc", "DensityMap.mrc.halfmap.compare"),
        "correlation": Out("local_correlation.mrc", "DensityMap.mrc.halfmap.compare"),
        "mask": Out("mask.mrc", "Mask3D.mrc"),
        "table": Out("compare.star", "ProcessData.star.halfmap.compare"),
        "fsc": Out("fsc.png", "Image2D.png.halfmap.overview"),
        "slices": Out("slices.png", "Image2D.png.halfmap.overview"),
    }

    maps: tuple[Path, ...] = Input(
        "two maps: the first, on whose grid all is done, and the second, of any box and voxels",
        node="DensityMap.mrc",
    )
    mask: Path | None = Input(
        "soft mask on the grid of the first map; default: made of it", node="Mask3D.mrc", default=None
    )
    half_a: Path | None = Input(
        "half map of the first map, unfiltered, the other found by its name: they tell how strong noise is",
        node="DensityMap.mrc",
        default=None,
    )
    half_b: Path | None = Input("the same of the second map", node="DensityMap.mrc", default=None)
    pixel_size_a: float | None = Param(
        None, "voxel size of the first map; default: the header's", unit="Å/px", section=GRID, gt=0
    )
    pixel_size_b: float | None = Param(
        None, "voxel size of the second map; default: the header's", unit="Å/px", section=GRID, gt=0
    )
    align: bool = Param(False, "turn and move the second map onto the first", unit="none", section=ALIGNMENT)
    hands: bool = Param(
        True, "with --align, try the mirror image of the second map too", unit="none", section=ALIGNMENT
    )
    align_resolution: float = Param(
        15.0,
        "finest detail that the alignment compares, at least 3 pixels",
        unit="Å",
        section=ALIGNMENT,
        advanced=True,
        gt=0,
    )
    resolution: float | None = Param(
        None,
        "finest detail of the difference; default: where the maps correlate by 0.143",
        unit="Å",
        section=DIFFERENCE,
        gt=0,
    )
    match_amplitudes: bool = Param(
        True,
        "bring the second map's amplitudes to the first's in each shell; without, by one factor",
        unit="none",
        section=DIFFERENCE,
    )
    sigma: float = Param(
        4.0,
        "standard deviations from which on a difference is listed",
        unit="none",
        section=DIFFERENCE,
        gt=0,
    )
    window: float | None = Param(
        None,
        "standard deviation of the window that maps are correlated in; default: 0.7 times the resolution",
        unit="Å",
        section=DIFFERENCE,
        advanced=True,
        gt=0,
    )

    @model_validator(mode="after")
    def _check(self) -> CompareStep:
        if (self.half_a is None) != (self.half_b is None):
            raise ValueError(
                "the noise of the difference is of both maps: give --half-a and --half-b, or none"
            )
        return self

    def run(self, ctx: Context) -> None:
        """Read both maps, align the second, correlate them, subtract them, write maps, table and pictures."""
        from halfmap.steps.compare import difference, pair, pictures, tables

        both = pair.read(self, ctx)
        if self.align:
            both = pair.aligned(self, both)
        found = difference.compare(self, both)
        tables.write(self, ctx, both, found)
        pictures.draw(ctx, both, found)
