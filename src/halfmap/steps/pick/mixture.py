"""The populations that candidates' scores are a mixture of, by expectation-maximisation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.stats import gaussian_kde

Values = NDArray[np.float64]

SCATTER = 0.12
"""Deviation of the particles' strengths over their mean; noise, as wide as the background's, comes on top."""

_ROUNDS = 300
_SAMPLE = 50_000
"""Candidates that the best start is chosen by, at the least."""

_STARTS = (0.5, 0.7, 0.85, 0.95)
_OTHERS = (0.02, 0.2)
"""Quantiles at which background and particles are parted to begin with, and parts of fragments."""

_BETWEEN = 0.2
_ALIKE = 0.01
"""Deviation of micrographs' means over the mean to begin with, and over their standard errors at least."""

_MOST = 0.3
_FEW = 0.02
_EXPECTED = 0.01
"""Fragments for every particle at the most; in all candidates where there are no particles; and for every
particle beforehand, since scores hardly tell a few fragments from particles that differ more."""

_STRONG = 0.2
_STRONGEST = 3.0
"""Particles that are stronger than most, at the most, and how much stronger they may be."""

_CONTAMINANTS = 0.1
"""Part of the others that are stronger than any particle."""

_POWERS = (1.0, 0.5, 0.0)
"""Of particles' strengths, one of which is normal: between noise that adds and strengths that multiply."""

_SEPARATION = 2.5
"""Ashman's D, at the least, of two populations that are told apart."""

_EVIDENCE = 10.0
"""Schwarz's criterion by which two populations must be likelier than one."""

_NARROWEST = 0.05
_LEAST = 1e-6
_NOTHING = 1e-300


class Shape:
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
        """Density of scores whose background has a mean and a deviation."""
        place = (score - mean) / deviation
        return np.interp(place, self.grid, self.density, left=_NOTHING, right=_NOTHING) / deviation


@dataclass(frozen=True, eq=False)
class Mixture:
    """Populations of candidates in some micrographs.

    Attributes
    ----------
    shape : Shape
        Of the background.
    top : float
        Highest score of all.
    weights : array (4,)
        Parts of background, particles, stronger ones, and others in all candidates.
    mean, deviation : float
        Of the background.
    power : float
        Of the strengths of particles, that makes them normal; 0: their logarithm is.
    gaps, spreads : array (micrographs,)
        Middle of each micrograph's particles, from the background's mean, and their deviation over that.
    gap : float
        Of the usual micrograph.
    """

    shape: Shape
    top: float
    weights: Values
    mean: float
    deviation: float
    power: float
    gaps: Values
    spreads: Values
    gap: float

    def densities(self, score: Values, group: NDArray[np.intp]) -> Values:
        """Background, particles, strong ones and others, each times its weight: (4, n) of scores (n,)."""
        gap, spread = self.gaps[group], self.spreads[group]
        part = (score - self.mean) / gap
        parts = [
            self.shape(score, self.mean, self.deviation) * gap,
            _normal(part, spread, self.power),
            _strong(part),
            _others(part, (self.top - self.mean) / gap),
        ]
        return self.weights[:, None] * np.maximum(np.stack(parts), _NOTHING) / gap

    @property
    def usual(self) -> Mixture:
        """The same of one micrograph of the usual strength."""
        spread = np.array([np.median(self.spreads)])
        return replace(self, gaps=np.array([self.gap]), spreads=spread)

    @property
    def distance(self) -> float:
        """Ashman's D."""
        spread = float(np.median(self.spreads))
        return math.sqrt(2) * self.gap / math.hypot(self.deviation, spread * self.gap)

    def limits(self) -> Values:
        """Score in each micrograph that not even a pair has."""
        return self.mean + _STRONGEST * self.gaps


def _normal(part: Values, spread: Values, power: float) -> Values:
    """Density of particles over their strength, which is normal when raised to a power."""
    above = np.maximum(part, _LEAST)
    place = _stretched(above, power) / spread
    density = np.exp(-(place**2) / 2) * above ** (power - 1) / (math.sqrt(2 * math.pi) * spread)
    return np.where(part > 0, density, 0)


def _strong(part: Values) -> Values:
    """Density of particles that overlap, or fit a reference better than most: ever fewer."""
    falling = 2 * (_STRONGEST - part) / (_STRONGEST - 1) ** 2
    return np.where((part > 1) & (part <= _STRONGEST), falling, 0)


def _others(part: Values, top: Values) -> Values:
    """Density of fragments, fewer the more of it they are, and of what no particle is as strong as."""
    fragments = (1 - _CONTAMINANTS) * 1.5 * (1 - part**2)
    beyond = _CONTAMINANTS / np.maximum(top - _STRONGEST, 1)
    return np.where(part > _STRONGEST, beyond, np.where((part >= 0) & (part < 1), fragments, 0))


@dataclass(frozen=True, eq=False)
class Fit:
    """A mixture, its log-likelihood, and each candidate's probability of being a particle."""

    mixture: Mixture
    likelihood: float
    likely: Values


def two_populations(
    score: Values, group: NDArray[np.intp], count: int, null: NDArray | None, scatter: float
) -> Fit | None:
    """Fit background, particles and others.

    Parameters
    ----------
    score : array (n,)
        Of all candidates, ascending.
    group : array (n,)
        Number of each one's micrograph, below `count`.
    count : int
        Micrographs.
    null : array (m,), optional
        Scores of noise.
    scatter : float
        Deviation of particles' strengths over their mean within a micrograph, at the most.

    Returns
    -------
    Fit or None
        None if there are not two populations.
    """
    shape = Shape(null)
    step = max(1, len(score) // _SAMPLE)
    few, own = score[::step], group[::step]
    n = len(few)
    fits = [
        _expectation_maximisation(few, own, _start(few, count, shape, start), scatter)
        for start in product(_STARTS, _OTHERS)
    ]
    best = max(fits, key=lambda fit: fit.likelihood)
    # Noise adds to strengths, which multiply: one of the two prevails.
    fits += [
        _expectation_maximisation(few, own, replace(best.mixture, power=power), scatter)
        for power in _POWERS[1:]
    ]
    fits = [fit for fit in fits if fit.mixture.distance >= _SEPARATION and fit.likely.sum() >= 2]
    if not fits:
        return None
    best = max(fits, key=lambda fit: fit.likelihood)
    # Others alone may not explain what a second population does.
    alone = _expectation_maximisation(few, own, _start(few, count, shape, None), scatter)
    price = 3 * math.log(n) + (count - 1) * math.log(max(n / count, 1))
    if 2 * (best.likelihood - alone.likelihood) - price < _EVIDENCE:
        return None
    if step > 1:
        best = _expectation_maximisation(score, group, replace(best.mixture, top=float(score[-1])), scatter)
    return best


def _start(score: Values, count: int, shape: Shape, start: tuple[float, float] | None) -> Mixture:
    """Mixture to begin with: scores parted at a quantile; of None: there are no particles."""
    n, top = len(score), float(score[-1])
    low, high = score, score[n:]
    weights = np.array([1 - _FEW, 0.0, 0.0, _FEW])
    if start is not None:
        cut = min(max(int(start[0] * n), 3), n - 3)
        low, high = score[:cut], score[cut:]
        weights = np.array([len(low), (1 - start[1]) * len(high), 0.02 * len(high), start[1] * len(high)])
        weights /= weights.sum()
    narrow = _narrowest(score)
    mean, deviation = float(low.mean()), max(float(low.std()), narrow)
    gap = max(float(high.mean() if len(high) else top) - mean, narrow)
    spread = max(float(high.std()), narrow) / gap if len(high) else 1.0
    gaps, spreads = np.full(count, gap), np.full(count, spread)
    return Mixture(shape, top, weights, mean, deviation, _POWERS[0], gaps, spreads, gap)


def _narrowest(score: Values) -> float:
    return max(_NARROWEST * float(score.std()), 1e-9)


def _expectation_maximisation(
    score: Values, group: NDArray[np.intp], mixture: Mixture, scatter: float
) -> Fit:
    """Fit from a start; what has no particles there stays without."""
    n, narrow = len(score), _narrowest(score)
    empty = mixture.weights[1] == 0
    between, spread = _BETWEEN**2, float(np.median(mixture.spreads))
    before, likelihood = -math.inf, -math.inf
    shares = np.zeros((4, n))
    for _ in range(_ROUNDS):
        parts = mixture.densities(score, group)
        total = parts.sum(axis=0) + _NOTHING
        likelihood = float(np.log(total).sum())
        shares = parts / total
        if likelihood - before < 1e-6 * n:
            break
        before = likelihood
        sums = shares.sum(axis=1) + 1e-12
        sums[2] = min(sums[2], _STRONG * sums[1])
        particles = sums[1] + sums[2]
        sums[3] = _FEW * n if empty else min(sums[3] + _EXPECTED * particles, _MOST * particles)
        mean = float(shares[0] @ score / shares[0].sum())
        deviation = max(math.sqrt(float(shares[0] @ (score - mean) ** 2 / shares[0].sum())), narrow)
        mixture = replace(mixture, weights=sums / sums.sum(), mean=mean, deviation=deviation)
        if not empty:
            mixture, spread, between = _moved(mixture, score, group, shares[1], scatter, spread, between)
    return Fit(mixture, likelihood, shares[1] + shares[2])


def _moved(
    mixture: Mixture,
    score: Values,
    group: NDArray[np.intp],
    share: Values,
    scatter: float,
    spread: float,
    between: float,
) -> tuple[Mixture, float, float]:
    """Particles' places by their shares of the scores; their spread, and the variance between micrographs."""
    count, power = len(mixture.gaps), mixture.power
    above = np.maximum(score - mixture.mean, _LEAST * mixture.gap)
    number = np.bincount(group, share, count) + 1e-9
    means = np.bincount(group, share * _stretched(above / mixture.gap, power), count) / number
    centres, centre, between = _centres(means, np.asarray(spread**2 / number, np.float64), between)
    gaps, gap = (mixture.gap * _shrunk(values, power) for values in (centres, np.array([centre])))
    spread = math.sqrt(float(share @ _stretched(above / gaps[group], power) ** 2 / share.sum()))
    narrow = _narrowest(score)
    spreads = np.maximum(np.minimum(spread, mixture.deviation / gaps + scatter), narrow / gaps)
    spread = float(np.average(spreads, weights=number))
    return replace(mixture, gaps=gaps, spreads=spreads, gap=float(gap[0])), spread, between


def _stretched(strength: Values, power: float) -> Values:
    """Box and Cox's transform, 0 at 1."""
    return np.log(strength) if power == 0 else (strength**power - 1) / power


def _shrunk(value: Values, power: float) -> Values:
    """Its inverse."""
    return np.exp(value) if power == 0 else np.maximum(1 + power * value, _LEAST) ** (1 / power)


def _centres(means: Values, variances: Values, between: float) -> tuple[Values, float, float]:
    """Means of micrographs from those of their particles, their own mean, and the variance between them."""
    weights = 1 / (variances + between)
    centre = float(np.average(means, weights=weights))
    trust = between * weights
    centres = centre + trust * (means - centre)
    least = _ALIKE**2 * float(variances.min())
    between = max(float(np.mean((centres - centre) ** 2 + trust * variances)), least)
    return centres, centre, between
