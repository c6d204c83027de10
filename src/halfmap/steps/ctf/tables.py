"""From the table of micrographs to the same with their CTFs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from halfmap.data import MicrographSet
from halfmap.errors import TableError
from halfmap.io.names import unique_stems
from halfmap.log import log
from halfmap.steps.ctf import quality
from halfmap.steps.ctf.average import Optics
from halfmap.steps.ctf.micrograph import MicrographItem

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.ctf.step import CtfStep

_NEEDED = ("rlnMicrographPixelSize", "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast")
_MAGNIFICATION = ("rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11")
_IDENTITY = (1.0, 0.0, 0.0, 1.0)

_SURE = 5.0
"""Standard errors at which a wrong Cs is stated."""

_MOST = 0.5
"""Share of an optics group's micrographs that may lack Thon rings without a word."""

_BRIGHTEST = 98
"""Percentile of an optics group's intensities that stands for the least ice."""


def list_micrographs(step: CtfStep, ctx: Context, micrographs: MicrographSet) -> list[MicrographItem]:
    """Every micrograph with the settings of its optics group.

    Raises
    ------
    TableError
        If the table lacks a setting, or names a micrograph twice.
    """
    optics = {row["rlnOpticsGroup"]: row for row in micrographs.optics.to_dicts()}
    rows = micrographs.rows.to_dicts()
    keys = unique_stems([row["rlnMicrographName"] for row in rows], table=micrographs.path)
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
        if not 0 <= settings["rlnAmplitudeContrast"] <= 1:
            message = f"has rlnAmplitudeContrast {settings['rlnAmplitudeContrast']:g}"
            raise TableError(message, path=micrographs.path, row=number, hint="state a part, 0 to 1")
        name = row["rlnMicrographName"]
        used = (row.get("rlnMicrographNameNoDW") if step.use_unweighted else None) or name
        a, b, c, d = (
            float(settings.get(label, default))
            for label, default in zip(_MAGNIFICATION, _IDENTITY, strict=True)
        )
        items.append(
            MicrographItem(
                name=name,
                key=keys[number - 1],
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
        "rlnCtfImage": [ctx.relative(ctx.folder / row["image"]) + ":mrc" for row in rows]
    }
    # Small images have no tilt, whichever comes first.
    for label in dict.fromkeys(label for row in rows for label in row):
        if label.startswith(("rln", "hm")):
            values = [row.get(label) for row in rows]
            # Beyond Nyquist there is no ice ring to be seen; a table has no empty cells.
            if any(value is not None for value in values):
                columns[label] = [math.nan if value is None else value for value in values]
    columns["hmIceThicknessRelative"] = thickness
    table = pl.DataFrame(columns)
    carried = kept.drop([label for label in columns if label in kept.columns])
    return MicrographSet(micrographs.optics, pl.concat([carried, table], how="horizontal"))


def mean_cs(values: NDArray, errors: NDArray) -> tuple[float, float]:
    """Mean of a group's Cs weighted by their errors, and its error by them or by the scatter, the larger."""
    weight = errors**-2.0
    mean = float((weight * values).sum() / weight.sum())
    scatter = float((weight * (values - mean) ** 2).sum() / max(len(values) - 1, 1))
    return mean, math.sqrt(max(1.0, scatter) / float(weight.sum()))


def with_fitted_cs(
    items: list[MicrographItem], micrographs: MicrographSet, measured: list[dict[str, Any]]
) -> tuple[list[MicrographItem], MicrographSet]:
    """Give the micrographs that could be measured, and the optics, the mean Cs of their optics group.

    Where no micrograph of a group has Thon rings the stated Cs stays.
    """
    found: dict[int, float] = {}
    for group in sorted({row["group"] for row in measured}):
        rows = [row for row in measured if row["group"] == group and row["significance"] >= quality.WEAKEST]
        if not rows:
            log.warning("optics group %d: no micrograph has Thon rings, its Cs stays as stated", group)
            continue
        mean, error = mean_cs(*(np.array([row[key] for row in rows]) for key in ("cs", "error")))
        found[group] = mean
        log.info("optics group %d: Cs %.3f ± %.3f mm fits the rings best", group, mean, error)
    names = {row["name"] for row in measured}
    changed = [
        replace(item, optics=replace(item.optics, cs_mm=found.get(item.group, item.optics.cs_mm)))
        for item in items
        if item.name in names
    ]
    groups = pl.col("rlnOpticsGroup")
    fitted = groups.replace_strict(found, default=pl.col("rlnSphericalAberration"), return_dtype=pl.Float64)
    optics = micrographs.optics.with_columns(rlnSphericalAberration=fitted)
    rows = micrographs.rows.drop("rlnSphericalAberration", strict=False)
    return changed, MicrographSet(optics, rows, path=micrographs.path)


def tell(done: list[dict[str, Any]], failed: int) -> None:
    """Say in a line what was found in those with Thon rings, and how many others there are."""
    rows = [row for row in done if quality.has_rings(row)]
    text = f"{len(done):,} micrograph{'' if len(done) == 1 else 's'}"
    if rows:
        defocus = np.array([(row["rlnDefocusU"] + row["rlnDefocusV"]) / 2 for row in rows]) * 1e-4
        rings, astigmatism = (
            np.median([row[label] for row in rows]) for label in ("rlnCtfMaxResolution", "rlnCtfAstigmatism")
        )
        text += (
            f": median defocus {np.median(defocus):.2f} µm, {defocus.min():.2f} to {defocus.max():.2f} µm; "
            f"rings to {rings:.1f} Å, astigmatism {astigmatism:.0f} Å (medians)"
        )
    without = len(done) - len(rows)
    text += f"; {without:,} without Thon rings" if without else ""
    log.info("%s", text + (f"; {failed:,} failed" if failed else "; none failed"))


def warn_of_rings(done: list[dict[str, Any]], items: list[MicrographItem], step: CtfStep) -> None:
    """Say of which optics groups most micrographs have no Thon rings, and what that may come from."""
    used = {item.group: (item.pixel_size, item.optics.voltage_kV) for item in items}
    for group, (pixel_size, voltage) in sorted(used.items()):
        rows = [row for row in done if row["group"] == group]
        without = sum(not quality.has_rings(row) for row in rows)
        if without > _MOST * len(rows):
            plate = "" if step.fit_phase_shift else ", a phase plate (--fit-phase-shift)"
            plural, verb = "" if len(rows) == 1 else "s", "has" if without == 1 else "have"
            log.warning(
                "%d of %d micrograph%s of optics group %d %s no Thon rings; are %g Å/px and %g kV right? "
                "Else it may be a defocus beyond %g to %g Å (--defocus-min, --defocus-max)%s, images that "
                "were denoised or filtered, drift, or ice that is empty or too thick",
                *(without, len(rows), plural, group, verb, pixel_size, voltage),
                *(step.defocus_min, step.defocus_max, plate),
            )


def warn_of_cs(done: list[dict[str, Any]], items: list[MicrographItem]) -> None:
    """Say of which optics groups the rings fit another Cs better than the one that was used."""
    used = {item.group: (item.optics.cs_mm, item.pixel_size, item.optics.voltage_kV) for item in items}
    for group, (cs, pixel_size, voltage) in sorted(used.items()):
        rows = [row for row in done if row["group"] == group and quality.has_rings(row)]
        if not rows:
            continue
        labels = ("hmCtfCs", "hmCtfCsUncertainty")
        mean, error = mean_cs(*(np.array([row[label] for row in rows]) for label in labels))
        if abs(mean - cs) > _SURE * error:
            # A pixel size is misstated by a few per cent, no more.
            ratio = (cs / mean) ** 0.25 if mean * cs > 0 else math.inf
            pixel = f", or {pixel_size * ratio:.4g} Å per pixel," if abs(ratio - 1) < 0.1 else ""
            log.warning(
                "optics group %d: its fine rings fit a Cs of %.2f ± %.2f mm%s, the stated values are "
                "%.4g mm, %.4g Å per pixel and %g kV. Check them against the microscope's; if they are "
                "right, ignore this: thick ice (--fit-thickness) or particles off its middle look alike, "
                "and the fit ends where rings and values part, so that the defoci are good",
                *(group, mean, error, pixel, cs, pixel_size, voltage),
            )


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
