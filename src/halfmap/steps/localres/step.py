"""The step that measures the resolution around each voxel."""

from __future__ import annotations

from pathlib import Path

from halfmap.engine import Context, Input, Out, Param
from halfmap.search.half_map_step import HalfMapStep

MEASURE, DIRECTIONS = "Measure", "Directions"


class LocalResStep(HalfMapStep, name="localres", label="relion.localres"):
    """Measure to what detail two half maps are known around each voxel, in two ways.

    One is their correlation in a window about the voxel, band by band of frequencies. The other is how strong
    their mean is there, by the amplitude of its monogenic signal, against the noise that their difference
    shows. Both take the raw half maps alone. The correlation is also taken in cones about six axes, which
    shows where the map is worse in one direction than in another.

    References
    ----------
    .. [1] Cardone, Heymann & Steven 2013, J. Struct. Biol. 184, 226-236, DOI 10.1016/j.jsb.2013.08.002
    .. [2] Vilas et al. 2018, Structure 26, 337-344, DOI 10.1016/j.str.2017.12.018
    .. [3] Vilas, Tagare, Vargas, Carazo & Sorzano 2020, Nat. Commun. 11, 55,
       DOI 10.1038/s41467-019-13742-w
    """

    outputs = {
        "map": Out("local_resolution.mrc", "DensityMap.mrc.relion.localres"),
        "monogenic": Out("local_resolution_monogenic.mrc", "DensityMap.mrc.halfmap.localres"),
        "best": Out("best_direction.mrc", "DensityMap.mrc.halfmap.localres", optional=True),
        "worst": Out("worst_direction.mrc", "DensityMap.mrc.halfmap.localres", optional=True),
        "table": Out("localres.star", "ProcessData.star.halfmap.localres"),
        "colours": Out("colour.cxc", "ProcessData.cxc.halfmap.chimerax"),
        "histogram": Out("histogram.png", "Image2D.png.halfmap.overview"),
        "slices": Out("slices.png", "Image2D.png.halfmap.overview"),
    }

    show: Path | None = Input(
        "map that the script for ChimeraX colours; default: the first half map",
        node="DensityMap.mrc",
        default=None,
    )
    threshold: float = Param(
        0.5, "local correlation at which the resolution is read off", unit="none", section=MEASURE, gt=0, lt=1
    )
    confidence: float = Param(
        95.0,
        "part of the noise's amplitudes that the map's must exceed",
        unit="%",
        section=MEASURE,
        advanced=True,
        gt=50,
        lt=100,
    )
    coarsest: float = Param(
        40.0, "coarsest resolution that is told apart", unit="Å", section=MEASURE, advanced=True, gt=0
    )
    directions: bool = Param(True, "correlate in cones about six axes too", unit="none", section=DIRECTIONS)

    def run(self, ctx: Context) -> None:
        """Go through the bands, follow each voxel until it is lost, write maps, table and pictures."""
        from halfmap.steps.localres import measure, pictures, tables

        halves, mask = self.read(ctx)
        found = measure.measure(self, halves, mask)
        tables.write(self, ctx, halves, found)
        pictures.draw(ctx, halves, mask, found)
