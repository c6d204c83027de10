"""What a micrograph is judged by: quantities, the limits beside which they are kept or not, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from halfmap.errors import ParameterError

if TYPE_CHECKING:
    import polars as pl

    from halfmap.data import MicrographSet
    from halfmap.steps.curate.step import CurateStep

FEWEST = 8
"""Micrographs of an optics group below which none is compared with the others."""

_QUARTER, _QUARTER_OF_NORMAL = 25.0, 0.6745
"""Percentile that tells the spread, so that a quarter of all may be bad, and its normal deviate."""

_MANY_WORSE = 0.25
"""Share of micrographs worse than fine that are too many to be told by comparison, if they are kept."""

NO_RINGS = "no Thon rings"


@dataclass(frozen=True)
class Criterion:
    """A quantity and what is known of it before any data.

    Parameters
    ----------
    name : str
        Of the parameters of the step: ``<name>_min``, ``<name>_max``.
    title, unit : str
        For people.
    columns : tuple of str
        Of the table; the quantity is their mean.
    fine : tuple of 2 float
        What is never rejected by comparison with other micrographs, however different it is; NaN if there is
        no such range.
    useless : tuple of 2 float
        Beyond which it is rejected whatever the others are.
    possible : tuple of 2 float
        Values that there are at all: a limit at or beyond them rejects nothing.
    spread : float
        Least standard deviation that is believed, as a share of the median.
    beside : str or None
        Column whose median stands for the quantity's own there, where that may be 0.
    """

    name: str
    title: str
    unit: str
    columns: tuple[str, ...]
    fine: tuple[float, float] = (-math.inf, math.inf)
    useless: tuple[float, float] = (-math.inf, math.inf)
    possible: tuple[float, float] = (0.0, math.inf)
    spread: float = 0.1
    beside: str | None = None

    @property
    def in_text(self) -> str:
        """Title within a sentence."""
        return self.title[:1].lower() + self.title[1:]


_INF = math.inf
CRITERIA = (
    Criterion("ctf_resolution", "Finest Thon rings", "Å", ("rlnCtfMaxResolution",), (-_INF, 5), (-_INF, 20)),
    Criterion("defocus", "Mean defocus", "Å", ("rlnDefocusU", "rlnDefocusV"), (3e3, 4e4), (200, 1e5)),
    Criterion(
        "defocus_uncertainty",
        "Error of the defocus",
        "Å",
        ("hmDefocusUncertainty",),
        (-_INF, 100),
        (-_INF, 1000),
    ),
    Criterion("astigmatism", "Astigmatism", "Å", ("rlnCtfAstigmatism",), (-_INF, 600), (-_INF, 1e4)),
    Criterion("motion_total", "Motion", "Å", ("rlnAccumMotionTotal",), (-_INF, 50), (-_INF, 1e3)),
    Criterion("motion_early", "Early motion", "Å", ("rlnAccumMotionEarly",), (-_INF, 15), (-_INF, 500)),
    Criterion("motion_late", "Late motion", "Å", ("rlnAccumMotionLate",), (-_INF, 40), (-_INF, 1e3)),
    Criterion("ice_ring", "Ice ring", "", ("rlnCtfIceRingDensity",), (-_INF, 0.5), (-_INF, 20)),
    Criterion(
        "ice_thickness",
        "Extra ice, mean free paths",
        "",
        ("hmIceThicknessRelative",),
        (-_INF, 0.3),
        (-_INF, 1.5),
    ),
    Criterion(
        "coarse_contrast",
        "Coarse contrast",
        "",
        ("hmCoarseContrast",),
        (-_INF, 0.01),
        (-_INF, 0.1),
        spread=0.2,
    ),
    Criterion(
        "mean",
        "Mean",
        "",
        ("hmMicrographMean",),
        (math.nan, math.nan),
        possible=(-_INF, _INF),
        beside="hmMicrographStd",
    ),
    Criterion("std", "Standard deviation", "", ("hmMicrographStd",), (math.nan, math.nan)),
    Criterion("phase_shift", "Phase shift", "°", ("rlnPhaseShift",), (20, 160), possible=(0, 180)),
    # No stage tilts by more than 70°.
    Criterion("tilt", "Tilt", "°", ("rlnMicrographTiltAngle",), (-_INF, 10), (-_INF, 70), spread=0.2),
    Criterion("masked", "Masked", "", ("hmMicrographMaskedFraction",), (-_INF, _INF), (-_INF, 0.7)),
)
MEASURED = {"hmMicrographMaskedFraction", "hmCoarseContrast", "hmMicrographMean", "hmMicrographStd"}
"""Columns that segmentation adds."""


@dataclass(frozen=True, eq=False)
class Judgement:
    """The verdict on every micrograph by one criterion.

    Parameters
    ----------
    criterion : Criterion
        Which.
    values : array (n,)
        NaN where a micrograph has none, which is then not judged by it.
    limits : dict of int to tuple of 2 float
        Lowest and highest value kept, of each optics group.
    severity : array (n,)
        0 at the group's median, 1 at its limit; above 1 is rejected.
    middle : dict of int to float
        Median of each optics group.
    """

    criterion: Criterion
    values: NDArray[np.float64]
    limits: dict[int, tuple[float, float]]
    severity: NDArray[np.float64]
    middle: dict[int, float]

    def kept(self) -> str:
        """State what is kept, if all optics groups have the same limits."""
        if len(set(self.limits.values())) > 1:
            return ""
        low, high = next(iter(self.limits.values()))
        if not math.isfinite(low):
            return f"kept to {as_text(high)}" if math.isfinite(high) else "no limit"
        return (
            f"kept {as_text(low)} to {as_text(high)}" if math.isfinite(high) else f"kept from {as_text(low)}"
        )

    def reason(self, row: int, group: int) -> str:
        """Say in words why a micrograph is rejected."""
        low, high = self.limits[group]
        value, unit = self.values[row], self.criterion.unit
        below = value < low
        text = f"{self.criterion.in_text} {as_text(value)} "
        text += f"{'below' if below else 'above'} {as_text(low if below else high)} {unit}".rstrip()
        return f"{text} (median {as_text(self.middle[group])})"

    def option(self, step: CurateStep) -> str:
        """The option by which the user has limited it, or nothing."""
        return _option(self.criterion, step)

    def is_loose(self) -> bool:
        """Whether many that are worse than fine are kept, as they are too many to stand out.

        Their spread is then such that nothing but the useless is rejected.
        """
        low, high = self.criterion.fine
        worse = ((self.values < low) | (self.values > high)) & (self.severity <= 1)
        ends = [end for end in self.criterion.useless if math.isfinite(end)]
        loosened = any(end in limits for limits in self.limits.values() for end in ends)
        return loosened and len(worse) >= FEWEST and bool(worse.mean() >= _MANY_WORSE)


def refuse_unknown(micrographs: MicrographSet, step: CurateStep) -> None:
    """Make sure that the table knows what the user has set limits of.

    Raises
    ------
    ParameterError
        If it lacks the columns, or they hold no value.
    """
    rows = micrographs.rows
    for criterion in CRITERIA:
        option = _option(criterion, step)
        unknown = [label for label in criterion.columns if not _has_values(rows, label)]
        if option and unknown and not MEASURED.issuperset(criterion.columns):
            raise ParameterError(
                f"{option} has nothing to limit: the table has no values of {unknown[0]}",
                path=micrographs.path,
                hint=f"leave {option} out, or curate the table of a step that measures it",
            )


def _has_values(rows: pl.DataFrame, label: str) -> bool:
    return label in rows.columns and bool(np.isfinite(_column(rows, label)).any())


def _column(rows: pl.DataFrame, label: str) -> NDArray[np.float64]:
    # A null becomes NaN; what is no number does, too.
    return rows[label].cast(float, strict=False).to_numpy()


def _given(criterion: Criterion, step: CurateStep) -> list[float | None]:
    """The user's lowest and highest value."""
    return [getattr(step, f"{criterion.name}_{side}", None) for side in ("min", "max")]


def _option(criterion: Criterion, step: CurateStep) -> str:
    sides = [
        side for side, limit in zip(("min", "max"), _given(criterion, step), strict=True) if limit is not None
    ]
    return f"--{criterion.name}-{sides[0]}".replace("_", "-") if sides else ""


def judge(micrographs: MicrographSet, step: CurateStep) -> list[Judgement]:
    """Judge every micrograph by every criterion that the table has values of.

    Parameters
    ----------
    micrographs : MicrographSet
        With the columns of CTF, motion and segmentation, as far as there are any.
    step : CurateStep
        Limits of the user, and how far from the others is too far.

    Notes
    -----
    A limit given by the user stands by itself. Otherwise a value is rejected that is beyond what can be of
    use, or that is at once farther from its optics group's median than `step.outliers` robust standard
    deviations and outside of the range that is fine in any data set. The standard deviation is that of the
    side in question, from percentiles, and never less than a share of the median, so that micrographs that
    are all alike are all kept. Infinite values are beyond every limit, and unknown ones within all.
    """
    rows = micrographs.rows
    groups = rows["rlnOpticsGroup"].to_numpy()
    found = []
    for criterion in CRITERIA:
        if not all(label in rows.columns for label in criterion.columns):
            continue
        values = np.mean([_column(rows, label) for label in criterion.columns], axis=0)
        beside = _column(rows, criterion.beside) if criterion.beside in rows.columns else values
        if np.isfinite(values).any():
            found.append(_judge(criterion, values, beside, groups, step))
    return found


def _judge(
    criterion: Criterion, values: NDArray, beside: NDArray, groups: NDArray, step: CurateStep
) -> Judgement:
    limits, middles = {}, {}
    severity = np.zeros(len(values))
    for group in map(int, np.unique(groups)):
        inside = (groups == group) & ~np.isnan(values)
        finite = inside & np.isfinite(values)
        known = values[finite]
        middle = float(np.median(known)) if len(known) else math.nan
        limits[group] = low, high = _limits(criterion, known, beside[finite], step)
        middles[group] = middle
        for limit, sign in ((low, -1), (high, 1)):
            if math.isfinite(limit) and len(known):
                # A limit on the wrong side of the median still rejects what is beyond it.
                reach = max(sign * (limit - middle), 1e-9 * max(abs(limit), 1e-9))
                beyond = sign * (values[inside] - limit)
                worse = np.maximum(1 + beyond / reach, 0)
                severity[inside] = np.maximum(severity[inside], worse)
    return Judgement(criterion, values, limits, severity, middles)


def _limits(criterion: Criterion, known: NDArray, beside: NDArray, step: CurateStep) -> tuple[float, float]:
    low, high = criterion.useless if step.automatic else (-math.inf, math.inf)
    if step.automatic and len(known) >= FEWEST:
        below, middle, above = np.percentile(known, (_QUARTER, 50, 100 - _QUARTER))
        least = criterion.spread * abs(float(np.nanmedian(beside)))
        down, up = (
            max(distance / _QUARTER_OF_NORMAL, least) for distance in (middle - below, above - middle)
        )
        # fmin and fmax pass over NaN.
        low = max(low, float(np.fmin(middle - step.outliers * down, criterion.fine[0])))
        high = min(high, float(np.fmax(middle + step.outliers * up, criterion.fine[1])))
    least, most = criterion.possible
    # Of counts, which are never negative, there is no negative mean either.
    nothing_below = low <= least or (low <= 0 and len(known) > 0 and known.min() >= 0)
    low, high = -math.inf if nothing_below else low, math.inf if high >= most else high
    lowest, highest = _given(criterion, step)
    return (low if lowest is None else lowest, high if highest is None else highest)


def reasons(
    judgements: Sequence[Judgement], micrographs: MicrographSet, *, automatic: bool
) -> list[list[str]]:
    """Why each micrograph is rejected, in words; empty for those that are kept."""
    rows = micrographs.rows
    groups = rows["rlnOpticsGroup"].to_list()
    words: list[list[str]] = [[] for _ in groups]
    if automatic and "hmCtfProblem" in rows.columns:
        for row, problem in enumerate(rows["hmCtfProblem"]):
            if NO_RINGS in (problem or ""):
                words[row].append(NO_RINGS)
    for judgement in judgements:
        for row in np.flatnonzero(judgement.severity > 1):
            words[row].append(judgement.reason(int(row), int(groups[row])))
    return words


def severity(judgements: Sequence[Judgement], count: int) -> NDArray[np.float64]:
    """How near each micrograph is to being rejected, or how far beyond: the worst of its criteria."""
    return np.max([j.severity for j in judgements], axis=0) if judgements else np.zeros(count)


def missing(micrographs: MicrographSet) -> list[str]:
    """Titles of the criteria that the table says nothing about."""
    have = micrographs.rows.columns
    return [c.in_text for c in CRITERIA if not all(label in have for label in c.columns)]


def tally(judgements: Sequence[Judgement], words: Sequence[Sequence[str]]) -> list[tuple[str, int]]:
    """How many micrographs each criterion rejects, the most frequent first."""
    found = [(j.criterion.in_text, int((j.severity > 1).sum())) for j in judgements]
    found.append((NO_RINGS, sum(NO_RINGS in own for own in words)))
    return sorted([item for item in found if item[1]], key=lambda item: -item[1])


def as_text(value: float) -> str:
    """Write a number with three digits or more, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
