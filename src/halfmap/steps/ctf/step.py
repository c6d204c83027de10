"""The step that estimates the CTF of micrographs."""

from __future__ import annotations

import functools
from pathlib import Path

from halfmap.engine import Context, Input, Out, Param, Step

SEARCH, MODEL, OUTPUT = "Search", "Model", "Output"


class CtfStep(Step, name="ctf", label="relion.ctffind"):
    """Estimate defocus, astigmatism and tilt of micrographs, with their errors.

    Power spectra of overlapping tiles are kept in polar bins. Matched filters search the whole range of
    defocus and astigmatism. Then the likelihood of all tiles' spectra is maximised: defocus, astigmatism,
    phase shift where it is wanted, and a plane or curved surface of defocus if the tiles support it,
    together with smooth curves for background and contrast of the rings. The information gives each a
    standard error. Micrographs without Thon rings are kept and marked; those that cannot be used are named
    and left out.

    References
    ----------
    .. [1] Rohou & Grigorieff 2015, J. Struct. Biol. 192, 216-221, DOI 10.1016/j.jsb.2015.08.008
    .. [2] Zhang 2016, J. Struct. Biol. 193, 1-12, DOI 10.1016/j.jsb.2015.11.003
    .. [3] Whittle 1953, Ark. Mat. 2, 423-434, DOI 10.1007/BF02590998
    """

    outputs = {
        "micrographs": Out("micrographs_ctf.star", "MicrographGroupMetadata.star.relion.ctf"),
        "picture": Out("summary.png", "Image2D.png.halfmap.overview"),
    }

    micrographs: Path = Input("table of micrographs", node="MicrographGroupMetadata.star.relion")
    defocus_min: float = Param(3_000.0, "lowest mean defocus", unit="Å", section=SEARCH, ge=500, le=100_000)
    defocus_max: float = Param(50_000.0, "highest mean defocus", unit="Å", section=SEARCH, ge=500, le=100_000)
    resolution_min: float = Param(
        30.0, "coarsest detail that is fitted", unit="Å", section=SEARCH, ge=10, le=100
    )
    resolution_max: float = Param(
        3.0, "finest detail that may be fitted", unit="Å", section=SEARCH, ge=2, le=10
    )
    fit_phase_shift: bool = Param(False, "find the phase shift of a phase plate", unit="none", section=MODEL)
    fit_tilt: bool = Param(
        True, "let the defocus change over the field; off: one defocus", unit="none", section=MODEL
    )
    fit_thickness: bool = Param(
        False, "find the thickness of the ice from the nodes of the rings", unit="none", section=MODEL
    )
    fit_cs: bool = Param(False, "find one Cs for each optics group and use it", unit="none", section=MODEL)
    use_unweighted: bool = Param(
        True, "use the sums without dose weighting where the table names them", unit="none", section=MODEL
    )
    pictures: bool = Param(True, "draw a picture of each micrograph", unit="none", section=OUTPUT)

    def run(self, ctx: Context) -> None:
        """Estimate micrograph after micrograph, tabulate them, draw the summary."""
        from halfmap.data.versions import row_versions
        from halfmap.errors import ParameterError
        from halfmap.io.tables import read_micrographs, write_micrographs
        from halfmap.steps.ctf import micrograph, pictures, tables

        if self.defocus_min >= self.defocus_max:
            raise ParameterError("--defocus-min is not below --defocus-max")
        micrographs = read_micrographs(ctx.resolve(self.micrographs))
        items = tables.list_micrographs(self, ctx, micrographs)
        versions = row_versions(micrographs, "rlnMicrographName")
        if self.fit_cs:
            measure = functools.partial(micrograph.measure_cs, step=self)
            measured = ctx.map(measure, items, unit="Cs estimate", version=lambda item: versions[item.name])
            items, micrographs = tables.with_fitted_cs(items, micrographs, measured)
        (ctx.folder / micrograph.FOLDER).mkdir(exist_ok=True)
        estimate = functools.partial(micrograph.estimate_micrograph, step=self, folder=ctx.folder)
        # A fitted Cs is that of all micrographs.
        done = ctx.map(
            estimate,
            items,
            unit="micrograph",
            version=lambda item: f"{versions[item.name]} {item.optics.cs_mm:.9g}",
            files=lambda item: item.key,
        )
        table = tables.tabulate(ctx, micrographs, done)
        write_micrographs(ctx.folder / "micrographs_ctf.star", table)
        tables.warn_of_rings(done, items, self)
        tables.warn_of_cs(done, items)
        names = [row["name"] for row in done]
        ctx.picture("summary.png", names, lambda path: pictures.draw_summary(path, done))
        tables.tell(done, micrographs.rows.height - len(done))
