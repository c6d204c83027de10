"""The populations that candidates' scores are a mixture of."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import gaussian_kde

Values = NDArray[np.float64]

SCATTER = 0.12
"""Deviation of the particles' strengths over their mean; noise, as wide as the background's, comes on top."""

BINS = 256
_SLICE = 1_000_000
"""Candidates that are sorted into bins at a time."""

OWN = ("weights", "means", "deviations", "gaps", "spreads")
"""What each micrograph has of its own."""

_STRONGEST = 3.0
"""How much stronger than most a particle may be."""

_CONTAMINANTS = 0.1
"""Part of the others that are stronger than any particle."""

_NARROWEST = 0.05
LEAST = 1e-6
NOTHING = 1e-300


@dataclass(frozen=True, eq=False)
class Histogram:
    """Candidates of every micrograph by their scores.

    Attributes
    ----------
    score : array (bins,)
        Middles of the bins, finest where most scores are.
    count : array (micrographs, bins), float32
        Candidates.
    narrow : float
        Width below which nothing is told.
    """

    score: Values
    count: NDArray[np.float32]
    narrow: float

    def select(self, rows: NDArray[np.intp] | slice) -> Histogram:
        """Those of some micrographs."""
        return replace(self, count=self.count[rows])


def histogram(score: NDArray, group: NDArray[np.intp], count: int) -> Histogram:
    """Sort the scores (n,) of micrographs, whose numbers are below a count, into bins."""
    sample = score[:: max(1, len(score) // _SLICE)].astype(np.float64)
    low, middle, high = np.quantile(sample, (0.25, 0.5, 0.75))
    scale = max(high - low, LEAST * float(sample.std()), NOTHING)
    ends = np.arcsinh((np.array([score.min(), score.max()], np.float64) - middle) / scale)
    edges = np.linspace(ends[0], ends[1], BINS + 1)
    table = np.zeros((count, BINS), np.float32)
    for first in range(0, len(score), _SLICE):
        part = slice(first, first + _SLICE)
        place = (np.arcsinh((score[part] - middle) / scale) - ends[0]) * (BINS / max(np.ptp(ends), NOTHING))
        np.add.at(table, (group[part], np.clip(place, 0, BINS - 1).astype(np.intp)), 1)
    middles = middle + scale * np.sinh((edges[1:] + edges[:-1]) / 2)
    return Histogram(middles, table, max(_NARROWEST * float(sample.std()), 1e-9))


class Shape:
    """Density of the background's scores, standardised: that of the surrogate, or a normal one."""

    def __init__(self, null: NDArray | None) -> None:
        self.grid = np.linspace(-8, 8, 801)
        self.moments: tuple[float, float] | None = None
        if null is None or len(null) < 50 or null.std() == 0:
            self.density = np.exp(-(self.grid**2) / 2) / math.sqrt(2 * math.pi)
            return
        self.moments = float(null.mean()), float(null.std())
        sample = (null - null.mean()) / null.std()
        # Quantiles stand for a large sample.
        sample = np.quantile(sample, (np.arange(min(len(sample), 2000)) + 0.5) / min(len(sample), 2000))
        smooth = gaussian_kde(sample)(self.grid)
        self.density = 0.98 * smooth + 0.02 * np.exp(-(self.grid**2) / 8) / math.sqrt(8 * math.pi)

    def __call__(self, place: Values) -> Values:
        """Density of standardised scores."""
        return np.interp(place, self.grid, self.density, left=NOTHING, right=NOTHING)


@dataclass(frozen=True, eq=False)
class Mixture:
    """Populations of candidates in some micrographs.

    Attributes
    ----------
    shape : Shape
        Of the background.
    top : float
        Highest score of all.
    power : float
        Of the strengths of particles, that makes them normal; 0: their logarithm is.
    gap, spread, between : float
        Middle of the usual micrograph's particles, in deviations of its background; deviation over that
        within a micrograph; and variance of micrographs' middles over that.
    mean, deviation, share : float
        Of the usual micrograph's background; and the share of particles in its candidates.
    strong, others : float
        Stronger ones and others for every particle.
    weights : array (micrographs, 4)
        Parts of background, particles, stronger ones, and others in all candidates.
    means, deviations : array (micrographs,)
        Of the background.
    gaps, spreads : array (micrographs,)
        Middle of each micrograph's particles, from the background's mean, and their deviation over that.
    """

    shape: Shape
    top: float
    power: float
    gap: float
    spread: float
    between: float
    mean: float
    deviation: float
    share: float
    strong: float
    others: float
    weights: Values = field(default_factory=lambda: np.zeros(0))
    means: Values = field(default_factory=lambda: np.zeros(0))
    deviations: Values = field(default_factory=lambda: np.zeros(0))
    gaps: Values = field(default_factory=lambda: np.zeros(0))
    spreads: Values = field(default_factory=lambda: np.zeros(0))

    def densities(self, score: Values) -> Values:
        """Background, particles, strong ones and others, each times its weight: (4, micrographs, scores)."""
        gap = self.gaps[:, None]
        above = score - self.means[:, None]
        part = above / gap
        deviation = self.deviations[:, None]
        parts = [
            self.shape(above / deviation) * gap / deviation,
            _normal(part, self.spreads[:, None], self.power),
            _strong(part),
            _others(part, (self.top - self.means[:, None]) / gap),
        ]
        return self.weights.T[:, :, None] * np.maximum(np.stack(parts), NOTHING) / gap

    def select(self, rows: NDArray | slice) -> Mixture:
        """Those of some micrographs."""
        return replace(self, **{name: getattr(self, name)[rows] for name in OWN})

    def common(self, count: int, weights: Values) -> Mixture:
        """The usual micrograph, so many times, with the weights (4,) of its populations."""
        gap = self.gap * self.deviation
        return replace(
            self,
            weights=np.tile(weights, (count, 1)),
            means=np.full(count, self.mean),
            deviations=np.full(count, self.deviation),
            gaps=np.full(count, gap),
            spreads=np.full(count, self.spread),
        )

    @property
    def distance(self) -> float:
        """Ashman's D."""
        return math.sqrt(2) * self.gap / math.hypot(1.0, self.spread * self.gap)

    @property
    def limits(self) -> Values:
        """Score in each micrograph that not even a pair has."""
        return self.means + _STRONGEST * self.gaps


def _normal(part: Values, spread: Values, power: float) -> Values:
    """Density of particles over their strength, which is normal when raised to a power."""
    above = np.maximum(part, LEAST)
    place = stretched(above, power) / spread
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


def stretched(strength: Values, power: float) -> Values:
    """Box and Cox's transform, 0 at 1."""
    return np.log(strength) if power == 0 else (strength**power - 1) / power


def shrunk(value: Values, power: float) -> Values:
    """Its inverse."""
    return np.exp(value) if power == 0 else np.maximum(1 + power * value, LEAST) ** (1 / power)
