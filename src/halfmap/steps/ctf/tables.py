"""From the table of micrographs to the same with their CTFs."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from halfmap.data import MicrographSet
from halfmap.errors import TableError
from halfmap.steps.ctf.estimate import Optics
from halfmap.steps.ctf.micrograph import MicrographItem

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.ctf.step import CtfStep

_NEEDED = ("rlnMicrographPixelSize", "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast")
_MAGNIFICATION = ("rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11")
_IDENTITY = (1.0, 0.0, 0.0, 1.0)

_BRIGHTEST = 98
"""Percentile of an optics group's intensities that stands for the least ice."""


def list_micrographs(step: CtfStep, ctx: Context, micrographs: MicrographSet) -> list[MicrographItem]:
    """Every micrograph with the settings of its optics group.

    Raises
    ------
    TableError
        If the table lacks a setting.
    """
    optics = {row["rlnOpticsGroup"]: row for row in micrographs.optics.to_dicts()}
    rows = micrographs.rows.to_dicts()
    stems = Counter(Path(row["rlnMicrographName"]).stem for row in rows)
    items = []
    for number, row in enumerate(rows, start=1):
        group = optics[row["rlnOpticsGroup"]]
        settings = group | {key: value for key, value in row.items() if value is not None}
        for label in _NEEDED:
            value = settings.get(label)
            if value is None or not math.isfinite(value):
                raise TableError(
                    f"has no {label}",
                    path=micrographs.path,
                    row=number,
                    hint="import the micrographs with the microscope's settings",
                )
        name = row["rlnMicrographName"]
        used = (row.get("rlnMicrographNameNoDW") if step.use_unweighted else None) or name
        a, b, c, d = (
            float(settings.get(label, default))
            for label, default in zip(_MAGNIFICATION, _IDENTITY, strict=True)
        )
        items.append(
            MicrographItem(
                name=name,
                key=_key(name, unique=stems[Path(name).stem] == 1),
                path=ctx.resolve(used),
                pixel_size=float(settings["rlnMicrographPixelSize"]),
                optics=Optics(
                    voltage_kV=float(settings["rlnVoltage"]),
                    cs_mm=float(settings["rlnSphericalAberration"]),
                    amplitude_contrast=float(settings["rlnAmplitudeContrast"]),
                    phase_shift=float(settings.get("rlnPhaseShift") or 0.0),
                ),
                group=int(row["rlnOpticsGroup"]),
                magnification=None if (a, b, c, d) == _IDENTITY else (a, b, c, d),
            )
        )
    return items


def tabulate(ctx: Context, micrographs: MicrographSet, done: list[dict[str, Any]]) -> MicrographSet:
    """Add the CTF to the rows of the micrographs that have one; all other columns are kept."""
    by_name = {row["name"]: row for row in done}
    kept = micrographs.rows.filter(pl.col("rlnMicrographName").is_in(list(by_name)))
    rows = [by_name[name] for name in kept["rlnMicrographName"]]
    thickness = relative_thickness(rows)
    columns: dict[str, list[Any]] = {
        # RELION calls the file an MRC, whatever its suffix.
        "rlnCtfImage": [ctx.relative(row["image"]) + ":mrc" for row in rows]
    }
    for label in rows[0]:
        if label.startswith(("rln", "hm")):
            values = [row.get(label) for row in rows]
            # Beyond Nyquist there is no ice ring to be seen; a table has no empty cells.
            if any(value is not None for value in values):
                columns[label] = [math.nan if value is None else value for value in values]
    columns["hmIceThicknessRelative"] = thickness
    table = pl.DataFrame(columns)
    carried = kept.drop([label for label in columns if label in kept.columns])
    return MicrographSet(micrographs.optics, pl.concat([carried, table], how="horizontal"))


def relative_thickness(rows: list[dict[str, Any]]) -> list[float]:
    """Ice that a micrograph has more than the brightest of its optics group, in mean free paths.

    What is scattered out of the objective aperture, or loses energy where there is a filter, darkens the
    image by exp(-thickness / mean free path). Counts must not have been normalised, nor the dose changed.

    References
    ----------
    .. [1] Rice et al. 2018, J. Struct. Biol. 204, 38-44, DOI 10.1016/j.jsb.2018.06.007
    """
    intensity = np.array([row["intensity"] for row in rows], float)
    groups = np.array([row["group"] for row in rows])
    result = np.full(len(rows), math.nan)
    for group in np.unique(groups):
        inside = (groups == group) & (intensity > 0)
        if inside.any():
            brightest = np.percentile(intensity[inside], _BRIGHTEST)
            result[inside] = np.log(brightest / intensity[inside])
    return result.tolist()


def _key(name: str, *, unique: bool) -> str:
    """Name of the pictures: that of the micrograph, with its folders where two would get the same."""
    path = Path(name).with_suffix("")
    return path.name if unique else "_".join(part for part in path.parts if part not in ("/", ".."))
