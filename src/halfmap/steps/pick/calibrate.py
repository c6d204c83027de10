"""From scores to probabilities: which candidates of a job are particles, and how many of them are not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from halfmap.steps.pick.mixture import NOTHING, SCATTER, Histogram, Mixture, Values, histogram
from halfmap.steps.pick.mixture_fit import two_populations

_FEWEST = 8
_GRID = 512
_SURE = 3.0
"""Standard deviations by which candidates must be more than noise would give."""

_AT_ONCE = 256
_FLAT = 1e-6
_NARROW = 0.5
"""Width of the background's scores over the surrogate's, at the least."""

_PSEUDO_COUNT = 1.0
"""False candidates added at every threshold where the surrogate is all that false ones are known by."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the scores of all candidates of a job say.

    Attributes
    ----------
    threshold : float
        Least score of a pick, in a micrograph of the usual strength; infinite if there are none.
    kind : str
        ``two populations`` if background and particles were told apart, ``above noise`` if they were not but
        scores exceed those of noise, ``none`` if there are no particles to be seen.
    grid, probability : array (n,)
        Probability of a particle over the score, which falls only beyond what any particle has; in a
        micrograph of the usual strength.
    weights, means, deviations : tuple of float
        Background, particles, outliers: parts of all candidates; means and deviations of the first two.
    picked : int
        Candidates above the threshold.
    expected_false : float
        How many of these are no particles, on average.
    missed : float
        Particles below the threshold, on average.
    densities : tuple of 4 arrays
        Scores, and what background, particles and outliers have of all candidates there.
    parts : tuple of Calibration
        Threshold, grid and probability in each micrograph, where they differ.
    ceiling : float
        Greatest score of a pick: what is beyond is no particle.
    """

    threshold: float
    kind: Literal["two populations", "above noise", "none"]
    grid: Values
    probability: Values
    weights: tuple[float, float, float] = (1.0, 0.0, 0.0)
    means: tuple[float, float] = (0.0, 0.0)
    deviations: tuple[float, float] = (1.0, 1.0)
    picked: int = 0
    expected_false: float = 0.0
    missed: float = 0.0
    densities: tuple[Values, ...] = field(default=(np.zeros(0),) * 4, repr=False)
    parts: tuple[Calibration, ...] = field(default=(), repr=False)
    ceiling: float = math.inf

    def part(self, micrograph: int) -> Calibration:
        """What the scores of one micrograph say."""
        return self.parts[micrograph] if micrograph < len(self.parts) else self

    def of(self, score: NDArray) -> Values:
        """Probability of candidates by their scores."""
        return np.interp(score, self.grid, self.probability)

    def picks(self, score: NDArray) -> NDArray[np.bool_]:
        """Which candidates are picked."""
        return (score >= self.threshold) & (score <= self.ceiling)

    @property
    def false_discovery_rate(self) -> float:
        """Part of the picks that are expected to be false."""
        return self.expected_false / max(self.picked, 1)


def calibrate(
    score: NDArray,
    null: NDArray | None = None,
    *,
    probability: float = 0.5,
    micrograph: NDArray[np.intp] | None = None,
    scatter: float = SCATTER,
) -> Calibration:
    """Choose the threshold of a job and give every score its probability.

    Parameters
    ----------
    score : array (n,)
        Of all candidates of all micrographs, down to noise.
    null : array (m,), optional
        Scores that the same method gives where there are no particles, only noise.
    probability : float
        Least probability of a pick.
    micrograph : array (n,), optional
        Number of each candidate's micrograph from 0; default: all are of one.
    scatter : float
        Deviation of particles' strengths over their mean within a micrograph, at the most.

    Returns
    -------
    Calibration

    Notes
    -----
    Candidates are background, particles, or others: fragments, fewer the more of a particle they are, and a
    few things that are more than three times as strong as particles. Particles' strengths, their scores
    above the background's mean, are normal, or normal once raised to the power 1/2 or 0 (the logarithm),
    whichever is likeliest [4]_; and no wider than noise and strength explain, else fragments would pass for
    weak particles. Up to a fifth more are stronger than that, since they overlap or fit a reference well.
    Scores of the background have the shape of the surrogate's. Each micrograph has its own place and width of
    it, since noise between many particles is weaker than that of the whole micrograph, and its own share of
    particles, which may be none. In deviations of this background the middle of its particles is its own too,
    since defocus and ice change it. Middles are normal, and backgrounds lie between the surrogate's and that
    of the usual micrograph with particles: a micrograph that says little is taken for what the others are
    (empirical Bayes [2]_). All are found by expectation-maximisation on histograms; what micrographs have in
    common is learned from some hundreds that surely have particles. Scores hardly tell a few fragments from
    particles that differ more, so one to a hundred particles is expected beforehand. There are two
    populations if they are parted (Ashman [3]_) and likelier than background and any number of others.
    Else the surrogate, moved to the lower half of the candidates [1]_, says how many candidates noise would
    give: the ratio of the densities, made monotone [5]_. Probabilities rise with the score by isotonic
    regression, up to what is stronger than any particle; that leaves the number of false ones as it is.

    References
    ----------
    .. [1] Efron 2004, J. Am. Stat. Assoc. 99, 96-104, DOI 10.1198/016214504000000089 (the empirical null)
    .. [2] Efron & Morris 1975, J. Am. Stat. Assoc. 70, 311-319, DOI 10.1080/01621459.1975.10479864
    .. [3] Ashman, Bird & Zepf 1994, Astron. J. 108, 2348-2361, DOI 10.1086/117248
    .. [4] Box & Cox 1964, J. R. Stat. Soc. B 26, 211-243, DOI 10.1111/j.2517-6161.1964.tb00553.x
    .. [5] Strimmer 2008, BMC Bioinformatics 9, 303, DOI 10.1186/1471-2105-9-303
    """
    score = np.asarray(score)
    group = np.zeros(len(score), np.intp) if micrograph is None else np.asarray(micrograph, np.intp)
    count = int(group.max(initial=0)) + 1
    if not np.isfinite(score).all():
        score, group = score[np.isfinite(score)], group[np.isfinite(score)]
    null = None if null is None else np.asarray(null, np.float64)[np.isfinite(null)]
    if len(score) == 0:
        return Calibration(math.inf, "none", np.array([0.0, 1.0]), np.zeros(2))
    if len(score) < _FEWEST or score.max() == score.min():
        return _above_noise(score, null, probability)
    data = histogram(score, group, count)
    mixture = two_populations(data, null, scatter)
    if mixture is None:
        return _above_noise(score, null, probability)
    return _two_populations(score, group, data, mixture, probability)


def _two_populations(
    score: NDArray, group: NDArray[np.intp], data: Histogram, mixture: Mixture, probability: float
) -> Calibration:
    """What a mixture says of each micrograph, of a usual one, and of all candidates together."""
    number = data.count.sum(axis=1, dtype=np.float64)
    parts = tuple(_parts(data.score, mixture, number, probability))
    weights = number @ mixture.weights / number.sum()
    whole = parts[0]
    if len(parts) > 1:
        (whole,) = _parts(data.score, mixture.common(1, weights), np.ones(1), probability)
    picked, expected_false, missed = _counts(score, group, parts)
    dense = np.linspace(float(score.min()), float(score.max()), _GRID)
    shown = _mean_densities(dense, number, mixture)
    return replace(
        whole,
        kind="two populations",
        weights=(float(weights[0]), float(weights[1] + weights[2]), float(weights[3])),
        means=(mixture.mean, mixture.mean + mixture.gap * mixture.deviation),
        deviations=(mixture.deviation, mixture.spread * mixture.gap * mixture.deviation),
        picked=picked,
        expected_false=expected_false,
        missed=missed,
        densities=(dense, shown[0], shown[1] + shown[2], shown[3]),
        parts=parts,
    )


def _counts(
    score: NDArray, group: NDArray[np.intp], parts: tuple[Calibration, ...]
) -> tuple[int, float, float]:
    """Picks, how many of them are false on average, and particles that are not picked."""
    if (group[1:] < group[:-1]).any():
        ranked = np.argsort(group, kind="stable")
        score, group = score[ranked], group[ranked]
    picked, false, missed = 0, 0.0, 0.0
    each = np.split(score, np.searchsorted(group, np.arange(1, len(parts))))
    for part, own in zip(parts, each, strict=True):
        likely, chosen = part.of(own), part.picks(own)
        picked += int(chosen.sum())
        false += float((1 - likely[chosen]).sum())
        missed += float(likely[~chosen].sum())
    return picked, false, missed


def _mean_densities(dense: Values, number: Values, mixture: Mixture) -> Values:
    """Densities of all micrographs together, each by its number of candidates."""
    total = np.zeros((4, len(dense)))
    for first in range(0, len(number), _AT_ONCE):
        rows = slice(first, first + _AT_ONCE)
        total += np.einsum("k,pks->ps", number[rows], mixture.select(rows).densities(dense))
    return total / number.sum()


def _parts(score: Values, mixture: Mixture, number: Values, probability: float) -> Iterator[Calibration]:
    """Threshold and probabilities of each micrograph by its number of candidates."""
    width = np.gradient(score)
    for first in range(0, len(number), _AT_ONCE):
        rows = slice(first, first + _AT_ONCE)
        own = mixture.select(rows)
        density = own.densities(score)
        total = density.sum(axis=0) + NOTHING
        likely = (density[1] + density[2]) / total
        for k, limit in enumerate(own.limits):
            rising = _monotone(score, likely[k], limit, total[k] * width + NOTHING)
            yield _part(score, rising, probability)


def _part(grid: Values, likely: Values, probability: float) -> Calibration:
    """Threshold of one micrograph, or of a usual one."""
    chosen = np.flatnonzero(likely >= probability)
    bend = _bends(likely)
    kept = grid[bend], likely[bend]
    if len(chosen) == 0:
        return Calibration(math.inf, "two populations", *kept)
    first, last = chosen[0], chosen[-1]
    threshold, ceiling = float(grid[first]), math.inf
    if first > 0:
        threshold = float(np.interp(probability, likely[first - 1 : first + 1], grid[first - 1 : first + 1]))
    if last < len(grid) - 1:
        ceiling = float(np.interp(-probability, -likely[last : last + 2], grid[last : last + 2]))
    return Calibration(threshold, "two populations", *kept, ceiling=ceiling)


def _bends(likely: Values) -> NDArray[np.bool_]:
    """Points of a curve that are not between two of the same probability."""
    bend = np.ones(len(likely), bool)
    step = np.abs(np.diff(likely)) > _FLAT
    bend[1:-1] = step[1:] | step[:-1]
    return bend


def _monotone(score: Values, likely: Values, limit: float, weights: Values) -> Values:
    """Probabilities that never fall with the score, up to a limit beyond which they never rise."""
    below = int(np.searchsorted(score, limit, side="right"))
    result = np.empty(len(score))
    for part, increasing in ((slice(0, below), True), (slice(below, None), False)):
        if len(score[part]):
            result[part] = isotonic_regression(likely[part], weights=weights[part], increasing=increasing).x
    return np.clip(result, 0, 1)


def _above_noise(score: NDArray, null: NDArray | None, probability: float) -> Calibration:
    """Candidates that score higher than noise does, told by the surrogate."""
    score = np.sort(score).astype(np.float64)
    none = Calibration(
        math.inf,
        "none",
        np.array([0.0, 1.0]),
        np.zeros(2),
        means=(float(score.mean()), float(score.mean())),
        deviations=(float(score.std()), 0.0),
    )
    if null is None or len(null) == 0:
        return none
    ranked = _empirical_null(score, np.sort(null))
    # The number of places searched is that of the null, unless that is of a part of the data.
    higher = len(ranked) - np.searchsorted(ranked, score, side="left")
    false = higher * max(1.0, len(score) / len(ranked)) + _PSEUDO_COUNT
    found = len(score) - np.arange(len(score))
    # False ones for every candidate: the slope of a convex curve (Grenander).
    local = isotonic_regression(-np.diff(false, append=0.0), increasing=False).x
    likely = np.clip(1 - local, 0, 1)
    if likely[-1] < probability:
        return none
    first = int(np.searchsorted(likely, probability))
    count, expected = len(score) - first, float((1 - likely[first:]).sum())
    # Both counts are of Poisson's distribution.
    if count < _FEWEST / 2 or count - expected <= _SURE * math.sqrt(found[first] + false[first]):
        return none
    missed = float(likely[:first].sum())
    share = (count - expected + missed) / len(score)
    bend = _bends(likely)
    return Calibration(
        threshold=float(score[first]),
        kind="above noise",
        grid=score[bend],
        probability=likely[bend],
        weights=(1 - share, share, 0.0),
        means=(float(ranked.mean()), float(score[first:].mean())),
        deviations=(float(ranked.std()), float(score[first:].std())),
        picked=count,
        expected_false=expected,
        missed=missed,
    )


def _empirical_null(score: Values, null: Values) -> Values:
    """Scores of noise, moved and stretched to the lower half of the candidates unless that is far off."""
    if null.std() == 0:
        return null
    low = np.linspace(0.05, 0.5, 19)
    slope, offset = np.polyfit(np.quantile(null, low), np.quantile(score, low), 1)
    moved = slope * null + offset
    far = abs(float(moved.mean() - null.mean())) > float(null.std())
    return null if far or not _NARROW <= slope <= 1 / _NARROW else moved
