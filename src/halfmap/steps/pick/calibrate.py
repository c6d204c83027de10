"""From scores to probabilities: which candidates of a job are particles, and how many of them are not."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.stats import gaussian_kde

Values = NDArray[np.float64]

_FEWEST = 8
_ROUNDS = 300
_STARTS = (0.5, 0.7, 0.85, 0.95)
_OUTLIERS = (0.02, 0.2)
"""Quantiles at which background and particles are parted to begin with, and parts of outliers."""

SCATTER = 0.12
"""Deviation of the particles' strengths over their mean; noise, as wide as the background's, comes on top."""

_BETWEEN = 0.2
_ALIKE = 0.01
"""Deviation of micrographs' means over the mean to begin with, and over their standard errors at least."""

_MOST = 0.3
_FEW = 0.02
"""Outliers for every particle at the most, and in all candidates where there are none."""

_SEPARATION = 2.5
"""Ashman's D, at the least, of two populations that are told apart."""

_EVIDENCE = 10.0
"""Schwarz's criterion by which two populations must be likelier than one."""

_GRID = 512
_NARROWEST = 0.05
_SURE = 3.0
"""Standard deviations by which candidates must be more than noise would give."""

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
        Probability of a particle over the score, which never falls; in a micrograph of the usual strength.
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

    def part(self, micrograph: int) -> Calibration:
        """What the scores of one micrograph say."""
        return self.parts[micrograph] if self.parts else self

    def of(self, score: NDArray) -> Values:
        """Probability of candidates by their scores."""
        return np.interp(score, self.grid, self.probability)

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
    Candidates are of three kinds: background, particles, and a few of neither kind (fragments, contaminants),
    nine tenths of them evenly between the two and one tenth above. Particles' scores are normal, and no wider
    than noise and their strength explain: else fragments would pass for weak particles. Their mean is each
    micrograph's own, since defocus and ice change it, and these means are normal: with few particles, or
    none, a micrograph is taken for a usual one (empirical Bayes). Scores of the
    background have the shape of the surrogate's, but place and
    width of their own: noise between particles is weaker than that of the whole micrograph. The parts are
    found by expectation-maximisation. Where two populations are no likelier than one, or not parted
    (Ashman), the surrogate alone says how many candidates noise would give. Probabilities are made to rise
    with the score by isotonic regression, which leaves the number of false ones as it is.

    References
    ----------
    .. [1] Efron 2004, J. Am. Stat. Assoc. 99, 96-104, DOI 10.1198/016214504000000089 (the empirical null)
    .. [2] Efron & Morris 1975, J. Am. Stat. Assoc. 70, 311-319, DOI 10.1080/01621459.1975.10479864
    .. [3] Ashman, Bird & Zepf 1994, Astron. J. 108, 2348-2361, DOI 10.1086/117248
    """
    score = np.asarray(score, np.float64)
    group = np.zeros(len(score), np.intp) if micrograph is None else np.asarray(micrograph, np.intp)
    count = int(group.max(initial=0)) + 1
    order = np.argsort(score, kind="stable")
    order = order[np.isfinite(score[order])]
    score, group = score[order], group[order]
    null = None if null is None else np.asarray(null, np.float64)[np.isfinite(null)]
    if len(score) == 0:
        return Calibration(math.inf, "none", np.array([0.0, 1.0]), np.zeros(2))
    shape = _Shape(null)
    fit = _two_populations(score, group, count, shape, scatter) if len(score) >= _FEWEST else None
    if fit is None:
        return _above_noise(score, null, probability)
    likely = np.zeros(len(score))
    parts = []
    ranked = np.argsort(group, kind="stable")
    for members in np.split(ranked, np.searchsorted(group[ranked], np.arange(1, count))):
        grid, likely[members] = _rising(score[members], fit.likely[members])
        parts.append(_part(grid, likely[members], probability))
    kept = likely >= probability
    dense = np.linspace(score[0], score[-1], _GRID)
    whole = parts[0]
    if count > 1:
        usual = _densities(dense, np.zeros(_GRID, np.intp), fit.weights, fit.usual, shape, score[-1])
        total = usual.sum(axis=0) + 1e-300
        whole = _part(*_rising(dense, usual[1] / total, total), probability)
    return replace(
        whole,
        kind="two populations",
        weights=fit.weights,
        means=(fit.places.mean, fit.centre),
        deviations=(fit.places.deviation, float(fit.usual.spreads[0])),
        picked=int(kept.sum()),
        expected_false=float((1 - likely[kept]).sum()),
        missed=float(likely[~kept].sum()),
        densities=(dense, *_mean_densities(dense, group, fit, shape, score[-1])),
        parts=tuple(parts),
    )


def _part(grid: Values, likely: Values, probability: float) -> Calibration:
    """Threshold of one micrograph, or of a usual one."""
    if len(grid) == 0:
        return Calibration(math.inf, "none", np.array([0.0, 1.0]), np.zeros(2))
    first = int(np.searchsorted(likely, probability))
    return Calibration(float(grid[first]) if first < len(grid) else math.inf, "two populations", grid, likely)


class _Shape:
    """Density of the background's scores, standardised: that of the surrogate, or a normal one."""

    def __init__(self, null: NDArray | None) -> None:
        self.grid = np.linspace(-8, 8, 801)
        if null is None or len(null) < 50 or null.std() == 0:
            self.density = np.exp(-(self.grid**2) / 2) / math.sqrt(2 * math.pi)
            return
        sample = (null - null.mean()) / null.std()
        # Quantiles stand for a large sample.
        sample = np.quantile(sample, (np.arange(min(len(sample), 2000)) + 0.5) / min(len(sample), 2000))
        smooth = gaussian_kde(sample)(self.grid)
        self.density = 0.98 * smooth + 0.02 * np.exp(-(self.grid**2) / 8) / math.sqrt(8 * math.pi)

    def __call__(self, score: Values, mean: float, deviation: float) -> Values:
        place = (score - mean) / deviation
        return np.interp(place, self.grid, self.density, left=1e-300, right=1e-300) / deviation


Weights = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class _Places:
    """Mean and deviation of the background; means and deviations of each micrograph's particles."""

    mean: float
    deviation: float
    centres: Values
    spreads: Values


@dataclass(frozen=True, eq=False)
class _Fit:
    """Log-likelihood, weights and places; the usual micrograph's mean; each candidate's probability."""

    likelihood: float
    weights: Weights
    places: _Places
    centre: float
    likely: Values

    @property
    def usual(self) -> _Places:
        """Places in a micrograph of the usual strength."""
        spread = np.array([np.median(self.places.spreads)])
        return replace(self.places, centres=np.array([self.centre]), spreads=spread)

    @property
    def distance(self) -> float:
        """Ashman's D."""
        spread = float(np.median(self.places.spreads))
        return math.sqrt(2) * (self.centre - self.places.mean) / math.hypot(self.places.deviation, spread)


def _densities(
    score: Values, group: NDArray[np.intp], weights: Weights, places: _Places, shape: _Shape, top: float
) -> Values:
    """Background, particles and outliers at some scores, each times its weight: (3, n)."""
    centre, spread = places.centres[group], places.spreads[group]
    particle = np.exp(-((score - centre) ** 2) / (2 * spread**2)) / (math.sqrt(2 * math.pi) * spread)
    gap = np.maximum(centre - places.mean, 1e-9)
    other = np.where(score <= centre, 0.9 / gap, 0.1 / np.maximum(top - centre, gap))
    other = np.where(score < places.mean, 1e-300, other)
    return np.stack(
        [
            weights[0] * shape(score, places.mean, places.deviation),
            weights[1] * particle,
            weights[2] * other,
        ]
    )


def _mean_densities(
    dense: Values, group: NDArray[np.intp], fit: _Fit, shape: _Shape, top: float
) -> tuple[Values, ...]:
    """Densities of all micrographs together, each by its number of candidates."""
    total = np.zeros((3, len(dense)))
    for number, count in enumerate(np.bincount(group)):
        same = np.full(len(dense), number, np.intp)
        total += count / len(group) * _densities(dense, same, fit.weights, fit.places, shape, top)
    return tuple(total)


def _two_populations(
    score: Values, group: NDArray[np.intp], count: int, shape: _Shape, scatter: float
) -> _Fit | None:
    """Fit of background and particles; None if there are not two populations."""
    n = len(score)
    starts = product(_STARTS, _OUTLIERS)
    fits = [_expectation_maximisation(score, group, count, shape, start, scatter) for start in starts]
    fits = [fit for fit in fits if fit.distance >= _SEPARATION and fit.weights[1] * n >= 2]
    if not fits:
        return None
    best = max(fits, key=lambda fit: fit.likelihood)
    # Outliers alone may not explain what a second population does.
    alone = _expectation_maximisation(score, group, count, shape, None, scatter)
    price = 3 * math.log(n) + (count - 1) * math.log(max(n / count, 1))
    if 2 * (best.likelihood - alone.likelihood) - price < _EVIDENCE:
        return None
    return best


def _expectation_maximisation(
    score: Values,
    group: NDArray[np.intp],
    count: int,
    shape: _Shape,
    start: tuple[float, float] | None,
    scatter: float,
) -> _Fit:
    """Fit from a start; of None: there are no particles."""
    n, top = len(score), float(score[-1])
    narrow = max(_NARROWEST * float(score.std()), 1e-9)
    low, high = score, score[n:]
    weights: Weights = (1 - _FEW, 0.0, _FEW)
    if start is not None:
        cut = min(max(int(start[0] * n), 3), n - 3)
        low, high = score[:cut], score[cut:]
        weights = (len(low) / n, (1 - start[1]) * len(high) / n, start[1] * len(high) / n)
    centre = float(high.mean()) if len(high) else top
    spread = max(float(high.std()), narrow) if len(high) else 1.0
    mean = float(low.mean())
    places = _Places(
        mean, max(float(low.std()), narrow), np.full(count, centre), np.full(count, spread, np.float64)
    )
    between = (_BETWEEN * (centre - mean)) ** 2
    before, likelihood = -math.inf, -math.inf
    shares = np.zeros((3, n))
    for _ in range(_ROUNDS):
        parts = _densities(score, group, weights, places, shape, top)
        total = parts.sum(axis=0) + 1e-300
        likelihood = float(np.log(total).sum())
        shares = parts / total
        if likelihood - before < 1e-6 * n:
            break
        before = likelihood
        sums = shares.sum(axis=1) + 1e-12
        most = _FEW * n if start is None else _MOST * sums[1]
        sums[2] = min(sums[2], most)
        weights = (float(sums[0] / sums.sum()), float(sums[1] / sums.sum()), float(sums[2] / sums.sum()))
        mean = float(shares[0] @ score / sums[0])
        deviation = max(math.sqrt(float(shares[0] @ (score - mean) ** 2 / sums[0])), narrow)
        centres, spreads = places.centres, places.spreads
        if start is not None:
            number = np.bincount(group, shares[1], count) + 1e-9
            means = np.bincount(group, shares[1] * score, count) / number
            centres, centre, between = _centres(means, np.asarray(spread**2 / number, np.float64), between)
            spread = math.sqrt(float(shares[1] @ (score - centres[group]) ** 2 / sums[1]))
            most_wide = deviation + scatter * np.maximum(centres - mean, 0.0)
            spreads = np.maximum(np.minimum(spread, most_wide), narrow)
            spread = float(np.average(spreads, weights=number))
        places = _Places(mean, deviation, centres, spreads)
    return _Fit(likelihood, weights, places, centre, shares[1])


def _centres(means: Values, variances: Values, between: float) -> tuple[Values, float, float]:
    """Means of micrographs from those of their particles, their own mean, and the variance between them."""
    weights = 1 / (variances + between)
    centre = float(np.average(means, weights=weights))
    trust = between * weights
    centres = centre + trust * (means - centre)
    least = _ALIKE**2 * float(variances.min())
    between = max(float(np.mean((centres - centre) ** 2 + trust * variances)), least)
    return centres, centre, between


def _rising(score: Values, likely: Values, weights: Values | None = None) -> tuple[Values, Values]:
    """Probabilities that never fall with the score, their sum as it was."""
    return score, np.clip(np.asarray(isotonic_regression(likely, weights=weights).x), 0, 1)


def _above_noise(score: Values, null: NDArray | None, probability: float) -> Calibration:
    """Candidates that score higher than noise does, told by a surrogate of the same size."""
    none = Calibration(math.inf, "none", score, np.zeros(len(score)), means=(float(score.mean()), 0.0))
    if null is None or len(null) == 0:
        return none
    ranked = np.sort(null)
    higher = len(ranked) - np.searchsorted(ranked, score, side="left")
    found = len(score) - np.arange(len(score))
    # The number of places searched is that of the null, not of the candidates.
    false = higher + _PSEUDO_COUNT
    # Between two scores: how many were found, how many noise would give.
    increments = np.diff(false, append=0.0)
    local = np.clip(1 + increments, 0, 1)
    grid, likely = _rising(score, np.asarray(local, np.float64))
    rate = np.minimum(false / found, 1)
    # Both counts are of Poisson's distribution.
    sure = found - false > _SURE * np.sqrt(found + false)
    kept = (rate <= 1 - probability) & sure
    if not kept.any() or found[kept.argmax()] < _FEWEST / 2:
        return none
    first = int(kept.argmax())
    count = int(found[first])
    expected = float(min(false[first], count))
    likely = np.where(
        np.arange(len(score)) >= first, np.maximum(likely, probability), np.minimum(likely, probability)
    )
    return Calibration(
        threshold=float(score[first]),
        kind="above noise",
        grid=grid,
        probability=likely,
        weights=(1 - (count - expected) / len(score), (count - expected) / len(score), 0.0),
        means=(float(ranked.mean()), float(score[first:].mean())),
        deviations=(float(ranked.std()), float(score[first:].std())),
        picked=count,
        expected_false=expected,
    )
