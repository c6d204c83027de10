"""The step that sorts micrographs and masks what is no specimen."""

from __future__ import annotations

import functools
from pathlib import Path

from pydantic import model_validator

from halfmap.engine import Context, Input, Out, Param, Step

JUDGEMENT, SEGMENTATION = "Judgement", "Segmentation"
LIMITS, MORE = "Limits of CTF and motion", "Limits of ice and image"


class CurateStep(Step, name="curate", label="relion.select"):
    """Accept or reject micrographs by their CTF, motion, ice and image, and mask what is no specimen.

    Carbon beyond the edge of a hole, contaminants, ice too thick and empty places are found in the image and
    masked; picking and extraction pass over them. Then each micrograph is judged by every quantity that the
    table knows: it is rejected where it is beyond a limit given here, of no possible use, or at once unlike
    the others of its optics group and worse than what is fine in any data set. Micrographs that are all alike
    are all kept. Every rejection states its reason.

    References
    ----------
    .. [1] Sanchez-Garcia et al. 2020, J. Struct. Biol. 210, 107498, DOI 10.1016/j.jsb.2020.107498
    .. [2] Rice et al. 2018, J. Struct. Biol. 204, 38-44, DOI 10.1016/j.jsb.2018.06.007
    """

    outputs = {
        "micrographs": Out("micrographs.star", "MicrographGroupMetadata.star.relion.ctf"),
        "rejected": Out(
            "micrographs_rejected.star", "MicrographGroupMetadata.star.halfmap.rejected", optional=True
        ),
        "accepted_picture": Out("accepted.png", "Image2D.png.halfmap.overview"),
        "rejected_picture": Out("rejected.png", "Image2D.png.halfmap.overview", optional=True),
        "picture": Out("summary.png", "Image2D.png.halfmap.overview"),
    }

    micrographs: Path = Input("table of micrographs", node="MicrographGroupMetadata.star.relion")
    automatic: bool = Param(
        True, "reject what is unlike the others and poor, or useless", unit="none", section=JUDGEMENT
    )
    outliers: float = Param(
        4.0,
        "robust standard deviations from the median beyond which a micrograph is unlike the others",
        unit="none",
        section=JUDGEMENT,
        ge=1,
        le=100,
    )
    diameter: float | None = Param(
        None,
        "longest diameter of the particle, so that it is not taken for a contaminant; default: 300",
        unit="Å",
        section=SEGMENTATION,
        ge=50,
        le=5000,
    )
    ctf_resolution_max: float | None = Param(
        None, "coarsest resolution of the finest Thon rings", unit="Å", section=LIMITS, gt=0
    )
    defocus_min: float | None = Param(None, "lowest mean defocus", unit="Å", section=LIMITS)
    defocus_max: float | None = Param(None, "highest mean defocus", unit="Å", section=LIMITS)
    defocus_uncertainty_max: float | None = Param(
        None, "greatest standard error of the defocus", unit="Å", section=LIMITS, gt=0
    )
    astigmatism_max: float | None = Param(None, "greatest astigmatism", unit="Å", section=LIMITS, ge=0)
    phase_shift_min: float | None = Param(None, "least phase shift", unit="°", section=LIMITS)
    phase_shift_max: float | None = Param(None, "greatest phase shift", unit="°", section=LIMITS)
    tilt_max: float | None = Param(None, "greatest tilt", unit="°", section=LIMITS, ge=0)
    motion_total_max: float | None = Param(None, "longest motion", unit="Å", section=LIMITS, ge=0)
    motion_early_max: float | None = Param(None, "longest early motion", unit="Å", section=LIMITS, ge=0)
    motion_late_max: float | None = Param(None, "longest late motion", unit="Å", section=LIMITS, ge=0)
    ice_ring_max: float | None = Param(None, "strongest ice ring", unit="none", section=MORE)
    ice_thickness_max: float | None = Param(
        None, "thickest ice beyond the thinnest, in mean free paths", unit="none", section=MORE
    )
    masked_max: float | None = Param(None, "largest masked fraction", unit="none", section=MORE, ge=0, le=1)
    coarse_contrast_max: float | None = Param(
        None, "greatest contrast of detail as large as particles and larger", unit="none", section=MORE, ge=0
    )
    mean_min: float | None = Param(None, "lowest mean of the pixels", unit="none", section=MORE)
    mean_max: float | None = Param(None, "highest mean of the pixels", unit="none", section=MORE)
    std_min: float | None = Param(None, "least standard deviation of the pixels", unit="none", section=MORE)
    std_max: float | None = Param(
        None, "greatest standard deviation of the pixels", unit="none", section=MORE
    )

    @model_validator(mode="after")
    def _check(self) -> CurateStep:
        for name in ("defocus", "phase_shift", "mean", "std"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if low is not None and high is not None and low > high:
                option = name.replace("_", "-")
                raise ValueError(f"--{option}-min is greater than --{option}-max")
        return self

    def run(self, ctx: Context) -> None:
        """Segment micrograph after micrograph, judge them, write both tables, draw both."""
        from halfmap.data.versions import row_versions
        from halfmap.io.tables import read_micrographs
        from halfmap.steps.curate import criteria, micrograph, pictures, tables

        micrographs = read_micrographs(ctx.resolve(self.micrographs))
        items = tables.list_micrographs(ctx, micrographs)
        criteria.refuse_unknown(micrographs, self)
        (ctx.folder / micrograph.FOLDER).mkdir(exist_ok=True)
        work = functools.partial(micrograph.segment_micrograph, step=self, folder=ctx.folder)
        versions = row_versions(micrographs, "rlnMicrographName")
        done = ctx.map(
            work,
            items,
            unit="micrograph",
            version=lambda item: versions[item.name],
            files=lambda item: item.key,
        )
        table = tables.tabulate(ctx, micrographs, done)
        judgements = criteria.judge(table, self)
        tables.warn(table, judgements, self)
        reasons = criteria.reasons(judgements, table, automatic=self.automatic)
        thumbnails = [row["picture"] for row in done]
        names = [row["name"] for row in done]
        ctx.picture(
            "summary.png", names, lambda path: pictures.draw_summary(path, table, judgements, reasons)
        )
        ctx.picture(
            "accepted.png",
            names,
            lambda path: pictures.draw_sheets(path.parent, table, judgements, reasons, thumbnails),
        )
        tables.write_tables(ctx.folder, table, judgements, reasons)
