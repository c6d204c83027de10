"""From scores to probabilities: which candidates of a job are particles, and how many of them are not."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from halfmap.steps.pick.mixture import SCATTER, Mixture, Values, two_populations

_FEWEST = 8
_GRID = 512
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
    Their middle is each micrograph's own, since defocus and ice change it, and these are normal: with few
    particles, or none, a micrograph is taken for a usual one (empirical Bayes [2]_). Scores of the
    background have the shape of the surrogate's, but place and width of their own: noise between particles
    is weaker than that of the whole micrograph. The parts are found by expectation-maximisation. Scores
    hardly tell a few fragments from particles that differ more, so one to a hundred particles is expected
    beforehand. Where two populations are no likelier than one, or not parted (Ashman [3]_), the surrogate
    alone says how many candidates noise would give. Probabilities are made to rise with the score by
    isotonic regression, up to what is stronger than any particle; that leaves the number of false ones as it
    is.

    References
    ----------
    .. [1] Efron 2004, J. Am. Stat. Assoc. 99, 96-104, DOI 10.1198/016214504000000089 (the empirical null)
    .. [2] Efron & Morris 1975, J. Am. Stat. Assoc. 70, 311-319, DOI 10.1080/01621459.1975.10479864
    .. [3] Ashman, Bird & Zepf 1994, Astron. J. 108, 2348-2361, DOI 10.1086/117248
    .. [4] Box & Cox 1964, J. R. Stat. Soc. B 26, 211-243, DOI 10.1111/j.2517-6161.1964.tb00553.x
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
    fit = two_populations(score, group, count, null, scatter) if len(score) >= _FEWEST else None
    if fit is None:
        return _above_noise(score, null, probability)
    mixture, limits = fit.mixture, fit.mixture.limits()
    likely = np.zeros(len(score))
    parts = []
    ranked = np.argsort(group, kind="stable")
    for number, members in enumerate(np.split(ranked, np.searchsorted(group[ranked], np.arange(1, count)))):
        grid, likely[members] = _monotone(score[members], fit.likely[members], limits[number])
        parts.append(_part(grid, likely[members], probability))
    kept = likely >= probability
    dense = np.linspace(score[0], score[-1], _GRID)
    whole = parts[0]
    if count > 1:
        usual = mixture.usual
        density = usual.densities(dense, np.zeros(_GRID, np.intp))
        total = density.sum(axis=0) + 1e-300
        rising = _monotone(dense, (density[1] + density[2]) / total, usual.limits()[0], total)
        whole = _part(*rising, probability)
    shown = _mean_densities(dense, group, mixture)
    return replace(
        whole,
        kind="two populations",
        weights=(mixture.weights[0], mixture.weights[1] + mixture.weights[2], mixture.weights[3]),
        means=(mixture.mean, mixture.mean + mixture.gap),
        deviations=(mixture.deviation, float(mixture.usual.spreads[0]) * mixture.gap),
        picked=int(kept.sum()),
        expected_false=float((1 - likely[kept]).sum()),
        missed=float(likely[~kept].sum()),
        densities=(dense, shown[0], shown[1] + shown[2], shown[3]),
        parts=tuple(parts),
    )


def _mean_densities(dense: Values, group: NDArray[np.intp], mixture: Mixture) -> Values:
    """Densities of all micrographs together, each by its number of candidates."""
    total = np.zeros((4, len(dense)))
    for number, count in enumerate(np.bincount(group)):
        same = np.full(len(dense), number, np.intp)
        total += count / len(group) * mixture.densities(dense, same)
    return total


def _part(grid: Values, likely: Values, probability: float) -> Calibration:
    """Threshold of one micrograph, or of a usual one."""
    if len(grid) == 0:
        return Calibration(math.inf, "none", np.array([0.0, 1.0]), np.zeros(2))
    chosen = np.flatnonzero(likely >= probability)
    if len(chosen) == 0:
        return Calibration(math.inf, "two populations", grid, likely)
    ceiling = math.inf if chosen[-1] == len(grid) - 1 else float(grid[chosen[-1]])
    return Calibration(float(grid[chosen[0]]), "two populations", grid, likely, ceiling=ceiling)


def _monotone(
    score: Values, likely: Values, limit: float, weights: Values | None = None
) -> tuple[Values, Values]:
    """Probabilities that never fall with the score, up to a limit beyond which they never rise."""
    below = int(np.searchsorted(score, limit, side="right"))
    result = np.empty(len(score))
    for part, increasing in ((slice(0, below), True), (slice(below, None), False)):
        if len(score[part]):
            own = None if weights is None else weights[part]
            result[part] = isotonic_regression(likely[part], weights=own, increasing=increasing).x
    return score, np.clip(result, 0, 1)


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
    grid, likely = _monotone(score, np.asarray(local, np.float64), math.inf)
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
