"""Scores of classes and particles by logistic regression, with the weights that come with Halfmap."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfmap.steps.select.features import Features

WEIGHTS = Path(__file__).with_name("score.json")

FARTHEST = 4.0
"""Standard deviations at which a feature is cut off."""


@dataclass(frozen=True, eq=False)
class Logistic:
    """Logistic regression on standardised features.

    Attributes
    ----------
    names : tuple of str
        Of the features.
    mean, deviation, weight : array (m,)
        A feature less its mean, over its deviation, times its weight adds to the logit.
    bias : float
        Logit of what is average in all.
    """

    names: tuple[str, ...]
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    weight: NDArray[np.float64]
    bias: float

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Logistic:
        """Make it of plain values, a row ``[name, mean, deviation, weight]`` each."""
        names, *numbers = zip(*record["features"], strict=True)
        mean, deviation, weight = (np.array(column, float) for column in numbers)
        return cls(tuple(names), mean, deviation, weight, float(record["bias"]))

    def record(self) -> dict[str, Any]:
        """Plain values that `from_record` takes."""
        rows = zip(
            self.names,
            *(np.round(values, 4).tolist() for values in (self.mean, self.deviation, self.weight)),
            strict=True,
        )
        return {"bias": round(self.bias, 4), "features": [list(row) for row in rows]}

    def standardised(self, features: Features) -> NDArray[np.float64]:
        """Features (n, m) as deviations from the mean; what is not known counts as average."""
        n = len(next(iter(features.values())))
        columns = [features.get(name, np.full(n, np.nan)) for name in self.names]
        z = (np.stack(columns, axis=1) - self.mean) / self.deviation
        return np.nan_to_num(np.clip(z, -FARTHEST, FARTHEST), nan=0.0)

    def __call__(self, features: Features) -> NDArray[np.float64]:
        """Probabilities (n,)."""
        return 1 / (1 + np.exp(-(self.standardised(features) @ self.weight + self.bias)))


@dataclass(frozen=True, eq=False)
class ParticleModel:
    """A regression for particles, and the least score that is kept if nothing else is asked."""

    logistic: Logistic
    least: float

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ParticleModel:
        """Make it of plain values."""
        return cls(Logistic.from_record(record), float(record["min_score"]))


@dataclass(frozen=True, eq=False)
class Scorer:
    """What scores classes and their particles, and where to draw the line.

    Attributes
    ----------
    classes : Logistic
        Of a class, that its particles are good.
    min_score : float
        Least score of classes that are kept if nothing else is asked.
    particles, particles_unseen : ParticleModel
        Of a particle, from its own features and the logit of its class (`CLASS_LOGIT`), with and without
        what was measured of its image.
    """

    classes: Logistic
    min_score: float
    particles: ParticleModel
    particles_unseen: ParticleModel


CLASS_LOGIT = "class"


@functools.lru_cache(maxsize=1)
def shipped() -> Scorer:
    """The scorer that comes with Halfmap."""
    record = json.loads(WEIGHTS.read_text(encoding="utf-8"))
    return Scorer(
        Logistic.from_record(record["classes"]),
        float(record["classes"]["min_score"]),
        ParticleModel.from_record(record["particles"]),
        ParticleModel.from_record(record["particles_unseen"]),
    )


def logit(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithm of the odds, of probabilities that are neither 0 nor 1."""
    inside = np.clip(probability, 1e-6, 1 - 1e-6)
    return np.log(inside / (1 - inside))
