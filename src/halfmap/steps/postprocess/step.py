"""The step that measures the resolution of a map and sharpens it."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from halfmap.engine import Context, Input, Out, Param
from halfmap.search.half_map_step import HalfMapStep

CORRELATION, SHARPENING, LOCAL = "Correlation", "Sharpening", "Local"


class Sharpening(HalfMapStep):
    """What post-processing and sharpening have in common."""

    randomise_below: float = Param(
        0.8,
        "correlation without a mask from which on phases are made random",
        unit="none",
        section=CORRELATION,
        advanced=True,
        gt=0,
        lt=1,
    )
    draws: int = Param(
        5,
        "times that random phases are drawn; the mean corrects",
        unit="none",
        section=CORRELATION,
        advanced=True,
        ge=1,
        le=100,
    )
    confidence: float = Param(
        95.0, "probability of the interval of the resolution", unit="%", section=CORRELATION, gt=50, lt=100
    )
    seed: int = Param(1, "seed of all random numbers", unit="none", section=CORRELATION, advanced=True, ge=0)
    b_factor: float | None = Param(
        None,
        "B-factor to sharpen with, below 0; default: from the Guinier plot",
        unit="Å²",
        section=SHARPENING,
    )
    guinier_from: float = Param(
        10.0, "coarsest detail that the Guinier plot is fitted at", unit="Å", section=SHARPENING, gt=0
    )
    guinier_to: float | None = Param(
        None,
        "finest detail that it is fitted at; default: the resolution",
        unit="Å",
        section=SHARPENING,
        advanced=True,
        gt=0,
    )
    lowpass: float | None = Param(
        None,
        "detail to which the map is filtered; default: the resolution",
        unit="Å",
        section=SHARPENING,
        gt=0,
    )
    weighting: bool = Param(
        True, "weight shells by their signal; without, all alike", unit="none", section=SHARPENING
    )
    mtf: Path | None = Input("MTF of the detector, as RELION's STAR files give it", default=None)
    mtf_pixel_size: float | None = Param(
        None,
        "pixel size of the detector that the MTF is of; default: the map's",
        unit="Å/px",
        section=SHARPENING,
        advanced=True,
        gt=0,
    )

    @model_validator(mode="after")
    def _check(self) -> Sharpening:
        if self.b_factor is not None and self.guinier_to is not None:
            raise ValueError("--guinier-to is of the fit that --b-factor replaces")
        if self.mtf_pixel_size is not None and self.mtf is None:
            raise ValueError("--mtf-pixel-size is of a detector whose --mtf is not given")
        return self


class PostprocessStep(Sharpening, name="postprocess", label="relion.postprocess"):
    """Measure the resolution of two half maps, and make maps to look at of them.

    The half maps are correlated shell by shell, without and within a soft mask, and corrected for what the
    mask alone correlates: maps whose phases are random beyond some shell show it. The resolution is where the
    corrected curve falls below 0.143, with an interval from the scatter of masked noise. The mean of the half
    maps is divided by the detector's MTF, weighted by its signal, sharpened by the B-factor of its Guinier
    plot and filtered at the resolution. What half maps agree in around each voxel filters it locally.

    References
    ----------
    .. [1] Rosenthal & Henderson 2003, J. Mol. Biol. 333, 721-745, DOI 10.1016/j.jmb.2003.07.013
    .. [2] Chen et al. 2013, Ultramicroscopy 135, 24-35, DOI 10.1016/j.ultramic.2013.06.004
    .. [3] Ramlaul, Palmer & Aylett 2019, J. Struct. Biol. 205, 30-40, DOI 10.1016/j.jsb.2018.11.011
    .. [4] Jakobi, Wilmanns & Sachse 2017, eLife 6, e27131, DOI 10.7554/eLife.27131
    """

    outputs = {
        "map": Out("postprocess.mrc", "DensityMap.mrc.relion.postprocess"),
        "masked": Out("postprocess_masked.mrc", "DensityMap.mrc.relion.postprocess"),
        "filtered": Out("locally_filtered.mrc", "DensityMap.mrc.halfmap.local", optional=True),
        "denoised": Out("denoised.mrc", "DensityMap.mrc.halfmap.local", optional=True),
        "scaled": Out("locally_scaled.mrc", "DensityMap.mrc.halfmap.local", optional=True),
        "mask": Out("mask.mrc", "Mask3D.mrc"),
        "curves": Out("postprocess.star", "ProcessData.star.relion.postprocess"),
        "xml": Out("fsc.xml", "ProcessData.xml.halfmap.fsc"),
        "fsc": Out("fsc.png", "Image2D.png.halfmap.overview"),
        "guinier": Out("guinier.png", "Image2D.png.halfmap.overview"),
        "slices": Out("slices.png", "Image2D.png.halfmap.overview"),
    }

    local: bool = Param(True, "make the maps that are filtered locally", unit="none", section=LOCAL)

    def run(self, ctx: Context) -> None:
        """Correlate the half maps, sharpen their mean, filter it locally, write tables and pictures."""
        from halfmap.steps.postprocess import correlate, local, pictures, sharpen, tables

        halves, mask = self.read(ctx)
        curves = correlate.correlate(self, halves, mask)
        sharpened = sharpen.sharpen(self, ctx, halves, curves)
        maps = local.local_maps(self, halves, mask, sharpened)
        tables.write(self, ctx, halves, mask, curves, sharpened, maps)
        pictures.draw(ctx, halves, mask, curves, sharpened, maps)


class SharpenStep(Sharpening, name="sharpen"):
    """Sharpen the mean of two half maps, to look at: with another B-factor, or what a network expects of it.

    As post-processing does it: the mean of the half maps is divided by the detector's MTF, weighted by its
    signal, sharpened by the B-factor of its Guinier plot and filtered at the resolution that the half maps
    have. With ``--learned`` each shell is, before it is sharpened, the mean of the images' map and of what a
    network says that it is of, as sure as both are. That map is for viewing only: its header says so, and no
    resolution is computed of it.

    References
    ----------
    .. [1] Rosenthal & Henderson 2003, J. Mol. Biol. 333, 721-745, DOI 10.1016/j.jmb.2003.07.013
    .. [2] Ramirez-Aportela, Carazo & Sorzano 2022, IUCrJ 9, 632-638, DOI 10.1107/S2052252522006959
    """

    outputs = {
        "map": Out("sharpened.mrc", "DensityMap.mrc.halfmap.sharpened"),
        "masked": Out("sharpened_masked.mrc", "DensityMap.mrc.halfmap.sharpened"),
        "learned": Out("learned.mrc", "DensityMap.mrc.halfmap.viewing", optional=True),
        "guinier": Out("guinier.png", "Image2D.png.halfmap.overview"),
        "slices": Out("slices.png", "Image2D.png.halfmap.overview"),
    }

    learned: bool = Param(
        False,
        "make a map with what a network expects as well, for viewing only",
        unit="none",
        section=SHARPENING,
    )
    weights: Path | None = Input(
        "weights of the network of --learned (.npz, with its .json beside it); default: those that ship",
        default=None,
        section=SHARPENING,
    )

    @model_validator(mode="after")
    def _check_weights(self) -> SharpenStep:
        if self.weights is not None and not self.learned:
            raise ValueError("--weights are of the network of --learned")
        return self

    def run(self, ctx: Context) -> None:
        """Correlate the half maps, sharpen their mean, ask the network, draw what comes of it."""
        from halfmap.steps.postprocess import correlate, learned, pictures, sharpen, tables

        halves, mask = self.read(ctx)
        network = learned.network(self, ctx)
        curves = correlate.correlate(self, halves, mask)
        sharpened = sharpen.sharpen(self, ctx, halves, curves)
        maps = {"sharpened.mrc": sharpened.volume, "sharpened_masked.mrc": sharpened.volume * mask}
        tables.write_maps(ctx, halves, maps)
        shown = {"sharpened": sharpened.volume}
        if network is not None:
            shown["with a network, for viewing only"] = learned.write(
                ctx, halves, mask, curves, sharpened, network
            )
        pictures.draw_guinier(ctx.folder / "guinier.png", sharpened, curves)
        pictures.draw_slices(ctx.folder / "slices.png", halves, mask, shown)
