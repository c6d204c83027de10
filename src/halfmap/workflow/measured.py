"""Numbers that finished jobs have left in their tables, from which later stages are decided."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LIKELY = "rlnLogLikeliContribution"

_TWO_ERRORS = 0.97725
"""Part of the normal distribution below two standard deviations."""

_AT_75, _AT_95 = 0.6745, 1.6449
"""Quantiles of the normal distribution."""

_OUTLINE = 0.1
_NO_AGREEMENT = 900.0


@dataclass(frozen=True)
class Particles:
    """What a table of particles says of all of them.

    Attributes
    ----------
    number : int
        Of particles.
    pixel_size : float
        Of their images, Å.
    box : int
        Side of their images, px.
    diameter : float or None
        Of the particle, Å.
    """

    number: int
    pixel_size: float
    box: int
    diameter: float | None


def read_particle_facts(path: Path) -> Particles:
    """Number, sizes and diameter of the particles of a table."""
    from halfmap.io.tables import read_particles

    table = read_particles(path)
    diameter = None
    if "hmParticleDiameter" in table.rows.columns:
        diameter = float(table.rows["hmParticleDiameter"].median())  # type: ignore[arg-type]
        diameter = diameter if math.isfinite(diameter) and diameter > 0 else None
    return Particles(len(table), float(table.pixel_size), int(table.box_size), diameter)


def farthest_origins(path: Path, *, share: float = 0.95) -> float | None:
    """Distance in Å from the centres of their boxes that a share of the particles stays within."""
    from halfmap.io.tables import read_particles

    rows = read_particles(path).rows
    names = "rlnOriginXAngst", "rlnOriginYAngst"
    if not set(names) <= set(rows.columns) or not len(rows):
        return None
    far = (rows[names[0]].pow(2) + rows[names[1]].pow(2)).sqrt()
    value = far.quantile(share)
    return None if value is None else float(value)


def poor_share(path: Path) -> float:
    """Share of the particles that fit the map of their refinement far worse than the others do.

    Their log-likelihood is more than three standard deviations below the mean of the others. Both are those
    of a normal distribution by what is above its upper quartile, where hardly any of the poor ones are.
    """
    import numpy as np

    from halfmap.io.tables import read_particles

    values = read_particles(path).rows["rlnLogLikeliContribution"].to_numpy()
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0
    quartile, high = np.quantile(values, [0.75, 0.95])
    deviation = (high - quartile) / (_AT_95 - _AT_75)
    return float(np.mean(values < quartile - (_AT_75 + 3.0) * deviation))


def gain(particles: Path, over: Path | None = None, *, folds: float = 1.0) -> tuple[float, float]:
    """Mean, and its standard error, of the log-likelihoods that a refinement leaves each particle with.

    They are those over noise alone, averaged over all poses: where a map says nothing of the particles the
    mean is no more than nothing, however their poses were searched. Each is by a map that the particle had
    no share in.

    A map may have more symmetry than its group, and particles as many poses that are as likely, of which a
    refinement keeps only the best. `folds` of them are allowed for: where as many are left as it keeps, the
    others are taken to be as likely as the least likely one of these.

    Parameters
    ----------
    particles : path
        Table of a refinement.
    over : path, optional
        That of another one; then of what the same particles gain by the first.
    folds : float
        Poses that the group of the first has for one of that of the other.

    Notes
    -----
    Particles of a micrograph have its defocus, ice and scale in common: the standard error is that of means
    of micrographs if that is larger.
    """
    import polars as pl
    from scipy.stats import t as student

    name, value, micrograph = "rlnImageName", _LIKELY, "rlnMicrographName"
    rows = _evidence(particles, 1.0)
    if over is not None:
        rows = rows.join(_evidence(over, folds).select(name, value), on=name, suffix="_over")
        rows = rows.with_columns(pl.col(value) - pl.col(f"{value}_over"))
    rows = rows.filter(pl.col(value).is_finite())
    if not len(rows):
        return math.nan, math.nan
    each = rows[value]
    mean, error = float(each.mean()), float(each.std(ddof=0)) / math.sqrt(len(each))  # type: ignore[arg-type]
    if micrograph in rows.columns:
        apart = rows.group_by(micrograph).agg((pl.col(value) - mean).sum())[value]
        n = len(apart)
        if n > 1:
            together = math.sqrt(float((apart * apart).sum()) * n / (n - 1)) / len(each)
            # The scatter of few is not well known: two errors are to be as sure as if it were.
            together *= float(student.ppf(_TWO_ERRORS, n - 1)) / 2
            error = max(error, together)
    return mean, error


def _evidence(path: Path, folds: float) -> Any:
    """Log-likelihoods of particles, with what poses that a refinement has not kept may add at the most."""
    import polars as pl

    from halfmap.io.tables import read_particles
    from halfmap.steps.refine.expectation import MAXIMA

    rows = read_particles(path).rows
    if folds > MAXIMA:
        least = (1.0 - pl.col("rlnMaxValueProbDistribution")) / (MAXIMA - 1)
        is_full = pl.col("rlnNrOfSignificantSamples") >= MAXIMA
        more = pl.when(is_full).then((folds - MAXIMA) * least).otherwise(0.0)
        rows = rows.with_columns(pl.col(_LIKELY) + more.log1p())
    names = "rlnImageName", "rlnMicrographName", _LIKELY
    return rows.select(name for name in names if name in rows.columns)


def agreement(model: Path) -> float | None:
    """Resolution in Å to which the runs of a first map agree; None if no two of them do."""
    found = min(float(row["hmRunAgreement"]) for row in read_block(model, "model_classes"))
    return None if found >= _NO_AGREEMENT else found


def hand(told: Path) -> tuple[bool, str]:
    """Whether the hand of a map was changed, and why, by the table that says so."""
    (row,) = read_block(told, "hand")
    mirrored, verdict, places = bool(row["hmMirrored"]), row["hmHand"], row.get("hmHelixPlaces", 0)
    if mirrored != (verdict == "left"):
        return mirrored, "as asked"
    right = row.get("hmRightHanded", 0)
    why = {
        "too coarse": f"at {row['rlnEstimatedResolution']:.1f} Å helices do not show which hand is right",
        "too few": f"{places} places with helices are too few to tell which hand is right",
        "either": f"neither hand surely fits better: right-handed helices do at {right} of {places} places",
        "right": f"right-handed helices fit better at {right} of {places} places",
        "left": f"left-handed helices fitted better at {places - right} of {places} places",
    }
    return mirrored, why[verdict]


def read_block(path: Path, block: str) -> list[dict[str, Any]]:
    """Rows of a block of a STAR file, one for a list of pairs; none where there is no such block."""
    from halfmap.io.star import read_star

    found = read_star(path).get(block)
    if found is None:
        return []
    return [found] if isinstance(found, dict) else found.to_dicts()


def picks(path: Path) -> tuple[int, float]:
    """Number of picks of a picking job's table, and how many of them are false on average."""
    rows = read_block(path, "coordinate_files")
    number = sum(int(row["hmPicks"]) for row in rows)
    return number, sum(float(row.get("hmPicksFalse", 0.0)) for row in rows)


def roundness(averages: Path, root: Path) -> float:
    """Short over long axis of the outline of class averages, the median of them.

    The axes are those of inertia of what is brighter than a tenth of the brightest pixel, the border's mean
    taken off.

    Parameters
    ----------
    averages : path
        Table of class averages.
    root : path
        Folder that names in it are relative to.
    """
    import numpy as np

    from halfmap.io.mrc import read_mrc

    values = []
    for row in read_block(averages, ""):
        number, _, stack = str(row["rlnReferenceImage"]).rpartition("@")
        values.append(_axes(np.asarray(read_mrc(root / stack)[int(number) - 1], np.float64)))
    return float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan


def _axes(image: Any) -> float:
    import numpy as np

    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]).mean()
    weight = np.clip(image - border, 0.0, None)
    weight[weight < _OUTLINE * weight.max()] = 0.0
    y, x = np.nonzero(weight)
    if len(x) < 3:
        return math.nan
    low, high = np.linalg.eigvalsh(np.cov(np.stack([y, x]), aweights=weight[y, x]))
    return math.sqrt(max(low, 0.0) / high)
