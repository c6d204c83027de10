"""The step that puts an atomic model into a map and says how well it fits."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from halfmap.engine import Context, Input, Out, Param, Step

PLACE, SCORES, MAPS = "Place", "Scores", "Map"


class FitStep(Step, name="fit", label="halfmap.fit"):
    """Put an atomic model into a map, and score how well each atom and residue fits.

    Left where it is, or moved as one body: over the rotations and shifts about where it is, or all in the
    map, by the correlation of the density that its atoms would give with the map's where the model is.
    Then map and model are correlated shell by shell within a soft mask about the model. Each atom has its
    Q-score: how much the density about it looks like that of a well resolved atom. With half maps each
    residue has its FSC-Q: the detail to which map and model agree there, against that of the half maps.

    References
    ----------
    .. [1] Roseman 2000, Acta Cryst. D56, 1332-1340, DOI 10.1107/S0907444900010908
    .. [2] Pintilie et al. 2020, Nat. Methods 17, 328-334, DOI 10.1038/s41592-020-0731-1
    .. [3] Ramírez-Aportela et al. 2021, Nat. Commun. 12, 42, DOI 10.1038/s41467-020-20295-w
    .. [4] Peng, Ren, Dudarev & Whelan 1996, Acta Cryst. A52, 257-276, DOI 10.1107/S0108767395014371
    """

    outputs = {
        "model": Out("fitted.cif", "AtomCoords.cif.halfmap.fit"),
        "map": Out("model_map.mrc", "DensityMap.mrc.halfmap.model"),
        "mask": Out("mask.mrc", "Mask3D.mrc"),
        "table": Out("fit.star", "ProcessData.star.halfmap.fit"),
        "colours": Out("colour.cxc", "ProcessData.cxc.halfmap.chimerax"),
        "attributes": Out("q_score.defattr", "ProcessData.defattr.halfmap.chimerax"),
        "fsc": Out("fsc.png", "Image2D.png.halfmap.overview"),
        "residues": Out("residues.png", "Image2D.png.halfmap.overview"),
        "slices": Out("slices.png", "Image2D.png.halfmap.overview"),
    }

    map: Path = Input("map (MRC)", node="DensityMap.mrc")
    model: Path = Input("atomic model (mmCIF, PDB)", node="AtomCoords.cif")
    half1: Path | None = Input(
        "first unfiltered half map, for the residues' FSC-Q", node="DensityMap.mrc", default=None
    )
    half2: Path | None = Input(
        "second half map; default: the file named as the first but for half2",
        node="DensityMap.mrc",
        default=None,
    )
    mask: Path | None = Input(
        "soft mask that map and model are correlated in; default: made about the model",
        node="Mask3D.mrc",
        default=None,
    )
    pixel_size: float | None = Param(
        None, "voxel size as calibrated; default: the header's", unit="Å/px", section=MAPS, gt=0
    )
    resolution: float | None = Param(
        None,
        "resolution of the map, for the search and the Q-scores to be expected; default: by the half maps, "
        "or as the model's file says",
        unit="Å",
        section=MAPS,
        gt=0,
        le=100,
    )
    search: Literal["none", "local", "global"] = Param(
        "none",
        "where the model may go: it stays where it is, goes to the best place within --max-angle and "
        "--max-shift, or to the best in the map",
        unit="none",
        section=PLACE,
    )
    max_angle: float = Param(
        60.0, "largest turn of a local search; 0 with no shift: it only climbs", unit="°", section=PLACE, ge=0
    )
    max_shift: float = Param(20.0, "largest shift of a local search", unit="Å", section=PLACE, ge=0)
    detail: float = Param(
        10.0,
        "detail that a search begins at, or as fine as model and box allow",
        unit="Å",
        section=PLACE,
        advanced=True,
        ge=4,
        le=100,
    )
    sigma: float = Param(
        0.6,
        "width of the Gaussian that atoms are compared with; the data bank's scores are of 0.4",
        unit="Å",
        section=SCORES,
        advanced=True,
        gt=0,
        le=2,
    )

    @model_validator(mode="after")
    def _check(self) -> FitStep:
        if self.half2 is not None and self.half1 is None:
            raise ValueError("--half2 is of a first half map, --half1, that is not given")
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        for name in ("max_angle", "max_shift"):
            if getattr(self, name) != defaults[name] and self.search != "local":
                raise ValueError(f"--{name.replace('_', '-')} is of --search local")
        if self.detail != defaults["detail"] and self.search == "none":
            raise ValueError("--detail is of a search, and there is none: give --search local or global")
        return self

    def run(self, ctx: Context) -> None:
        """Place the model, make its map, correlate both, score atoms and residues, write and draw."""
        from halfmap.steps.fit import compare, pictures, place, scores, tables

        given = place.read(self, ctx)
        placed = place.place(self, given)
        agreement = compare.compare(self, ctx, given, placed)
        scored = scores.score(self, given, placed, agreement)
        tables.write(self, ctx, given, placed, agreement, scored)
        pictures.draw(ctx, given, placed, agreement, scored)
