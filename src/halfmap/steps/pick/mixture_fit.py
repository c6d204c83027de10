"""Expectation-maximisation of the populations of candidates' scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from halfmap.steps.pick.mixture import (
    BINS,
    LEAST,
    NOTHING,
    OWN,
    Histogram,
    Mixture,
    Shape,
    Values,
    shrunk,
    stretched,
)

_ROUNDS = 300
_MICROGRAPHS = 256
"""Micrographs that what they have in common is learned from, at the most."""

_STARTS = (*product((0.5, 0.7, 0.85, 0.95), (0.02, 0.2)), (0.985, 0.02), (0.995, 0.02))
"""Quantiles at which background and particles are parted to begin with, and parts of fragments."""

_OWN_STARTS = (0.5, 0.8, 0.95, 0.98, 0.995)
"""The same of each micrograph by itself."""

_BETWEEN = 0.2
_ALIKE = 0.01
_ANY = 1.0
"""Deviation of micrographs' means over the mean to begin with; over their standard errors at least; and over
the mean where micrographs are searched for particles of any strength."""

_CERTAIN = 10.0
"""Particles of a micrograph by which half as much is learned from it as from one with many."""

_DOUBT, _LITTLE = 50.0, 1.0
"""Candidates' weight with which a micrograph's background is taken for that of the others, with particles and
without."""

_MOST = 0.3
_EXPECTED = 0.01
"""Fragments for every particle at the most; and beforehand, since scores hardly tell a few fragments from
particles that differ more."""

_STRONG = 0.2
"""Particles that are stronger than most for every other one, at the most."""

_POWERS = (1.0, 0.5, 0.0)
"""Of particles' strengths, one of which is normal: between noise that adds and strengths that multiply."""

_SEPARATION = 2.5
"""Ashman's D, at the least, of two populations that are told apart."""

_STRONGER = 2.0
"""Deviations of the surrogate's scores that the background's mean may be above theirs."""

_DOUBTFUL = 3.0
"""Twice the log-likelihood by which a micrograph with particles must be likelier than one without."""

_EVIDENCE = 10.0
"""Schwarz's criterion by which two populations must be likelier than one."""


def two_populations(data: Histogram, null: NDArray | None, scatter: float) -> Mixture | None:
    """Fit background, particles and others; micrographs without particles have no weight of them.

    Parameters
    ----------
    data : Histogram
        Of all candidates.
    null : array (m,), optional
        Scores of noise.
    scatter : float
        Deviation of particles' strengths over their mean within a micrograph, at the most.

    Returns
    -------
    Mixture or None
        None if there are not two populations.
    """
    shape = Shape(null)
    count = len(data.count)
    chosen = np.unique(np.linspace(0, count - 1, min(count, _MICROGRAPHS)).round().astype(np.intp))
    few = data.select(chosen)
    fits = [_fit(few, _start(few, shape, start), scatter) for start in _STARTS]
    best = max(fits, key=lambda fit: fit[1].sum())[0]
    # Noise adds to strengths, which multiply: one of the two prevails.
    fits += [_fit(few, replace(best, power=power), scatter) for power in _POWERS[1:]]
    fits = [fit for fit in fits if fit[0].distance >= _SEPARATION and _particles(few, fit[0]) >= 2]
    if not fits:
        return None
    mixture = max(fits, key=lambda fit: fit[1].sum())[0]
    # Others alone may not explain what a second population does.
    fitted, likelihood = _one_by_one(few, replace(mixture, between=_ANY**2), scatter)
    gain = 2 * (likelihood - _alone(few, shape)[1]) - _DOUBTFUL
    # None without particles is worse by more than what others, which it lacks then, are worth.
    least = -np.log(np.maximum(few.count.sum(axis=1, dtype=np.float64), 1))
    evidence = np.maximum(gain, least).sum()
    if evidence - 3 * math.log(few.count.sum()) < _EVIDENCE:
        return None
    full = gain > 0
    # What micrographs have in common is learned from those that surely have particles.
    sure, _ = _fit(
        few.select(np.flatnonzero(full)), replace(fitted.select(full), between=mixture.between), scatter
    )
    # Noise between particles is weaker than that of the surrogate: else all are particles.
    stronger = shape.moments is not None and sure.mean > shape.moments[0] + _STRONGER * shape.moments[1]
    if sure.distance < _SEPARATION or stronger:
        return None
    parts = [
        _each(data.select(slice(first, first + _MICROGRAPHS)), sure, scatter)
        for first in range(0, count, _MICROGRAPHS)
    ]
    return replace(sure, **{n: np.concatenate([getattr(part, n) for part in parts]) for n in OWN})


def _each(data: Histogram, common: Mixture, scatter: float) -> Mixture:
    """Fit micrographs by what they have in common, with particles or without."""
    fitted, likelihood = _one_by_one(data, common, scatter)
    alone, other = _alone(data, common.shape)
    alone = replace(alone, weights=np.tile([1.0, 0.0, 0.0, 0.0], (len(data.count), 1)))
    none = replace(alone, gaps=common.gap * alone.deviations, spreads=fitted.spreads)
    return _mixed(2 * (likelihood - other) < _DOUBTFUL, none, fitted)


def _one_by_one(data: Histogram, common: Mixture, scatter: float) -> tuple[Mixture, Values]:
    """Fit micrographs with particles, each from the best of some starts, by what they have in common."""
    fits = (_fit(data, start, scatter, learn=False) for start in _own_starts(data, common))
    fitted, best = next(fits)
    best = best - _unusual(fitted)
    for found, likelihood in fits:
        likelihood = likelihood - _unusual(found)
        fitted, best = _mixed(likelihood > best, found, fitted), np.maximum(likelihood, best)
    return fitted, best


def _own_starts(data: Histogram, common: Mixture) -> Iterator[Mixture]:
    """The usual micrograph, and each one's scores parted at some quantiles."""
    usual = common.common(len(data.count), common.weights.mean(axis=0))
    yield usual
    total = data.count.sum(axis=1, keepdims=True)
    below = np.cumsum(data.count, axis=1)
    for part in _OWN_STARTS:
        low = np.where(below <= part * total, data.count, 0)
        means, deviations = _background(low, data, usual)
        high = data.count - low
        above = (high @ data.score + LEAST * data.score[-1]) / (high.sum(axis=1) + LEAST) - means
        share = np.array([part, 1 - part, 0.0, 0.0]) + (1 - part) * np.array([0, -0.04, 0.02, 0.02])
        yield replace(
            usual,
            weights=np.tile(share, (len(total), 1)),
            means=means,
            deviations=deviations,
            gaps=np.maximum(above, data.narrow),
        )


def _mixed(first: NDArray[np.bool_], one: Mixture, other: Mixture) -> Mixture:
    """Micrographs of one mixture, the rest of another."""
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in OWN}
    chosen = {
        name: np.where(first if new.ndim == 1 else first[:, None], new, old)
        for name, (new, old) in pairs.items()
    }
    return replace(other, **chosen)


def _unusual(mixture: Mixture) -> Values:
    """Log-likelihood that micrographs lose since their particles are stronger or weaker than usual."""
    place = stretched(mixture.gaps / (mixture.gap * mixture.deviations), mixture.power)
    return place**2 / (2 * mixture.between)


def _particles(data: Histogram, mixture: Mixture) -> float:
    return float(data.count.sum(axis=1) @ mixture.weights[:, 1:3].sum(axis=1))


def _start(data: Histogram, shape: Shape, start: tuple[float, float]) -> Mixture:
    """Mixture to begin with: scores parted at a quantile."""
    total = data.count.sum(axis=0, dtype=np.float64)
    cut = int(np.clip(np.searchsorted(np.cumsum(total), start[0] * total.sum()), 1, BINS - 1))
    low, high = data.count.copy(), total.copy()
    low[:, cut:], high[:cut] = 0, 0
    mean, deviation = _moments(total - high, data)
    if not high.any():
        high[-1] = 1
    middle, width = _moments(high, data)
    gap = max(middle - mean, data.narrow)
    share = high.sum() / total.sum()
    weights = np.array([1 - share, (1 - start[1]) * share, 0.02 * share, start[1] * share])
    mixture = Mixture(
        shape,
        float(data.score[-1]),
        _POWERS[0],
        gap=gap / deviation,
        spread=width / gap,
        between=_BETWEEN**2,
        mean=mean,
        deviation=deviation,
        share=share,
        strong=0.02,
        others=start[1],
    )
    mixture = mixture.common(len(data.count), weights / weights.sum())
    means, deviations = _background(low, data, mixture)
    return replace(mixture, means=means, deviations=deviations, gaps=mixture.gap * deviations)


def _moments(count: Values, data: Histogram) -> tuple[float, float]:
    mean = float(np.average(data.score, weights=count))
    return mean, max(math.sqrt(float(np.average((data.score - mean) ** 2, weights=count))), data.narrow)


def _background(
    share: NDArray, data: Histogram, mixture: Mixture, doubt: float = _DOUBT
) -> tuple[Values, Values]:
    """Place and width of each micrograph's background by its share (micrographs, bins) of the candidates.

    Where it is little they are as in other micrographs: as of noise without particles, as in the usual
    micrograph with as many as that has, and between these in proportion.
    """
    mean, deviation = mixture.mean, mixture.deviation
    if mixture.shape.moments is not None and mixture.share > 0:
        full = np.minimum(mixture.weights[:, 1:3].sum(axis=1) / mixture.share, 1)
        mean, deviation = (
            noise + full * (usual - noise)
            for noise, usual in zip(mixture.shape.moments, (mean, deviation), strict=True)
        )
    number = share.sum(axis=1, dtype=np.float64) + doubt
    means = (share @ data.score + doubt * mean) / number
    square = (share * (data.score - means[:, None]) ** 2).sum(axis=1, dtype=np.float64)
    return means, np.maximum(np.sqrt((square + doubt * deviation**2) / number), data.narrow)


def _alone(data: Histogram, shape: Shape) -> tuple[Mixture, Values]:
    """Background and others without particles, in each micrograph; and their log-likelihoods."""
    total = data.count.sum(axis=0, dtype=np.float64)
    mean, deviation = _moments(total, data)
    top = float(data.score[-1])
    mixture = Mixture(
        shape,
        top,
        _POWERS[0],
        gap=1.0,
        spread=1.0,
        between=0.0,
        mean=mean,
        deviation=deviation,
        share=0.0,
        strong=0.0,
        others=0.0,
    ).common(len(data.count), np.array([0.98, 0.0, 0.0, 0.02]))
    before, likelihood = -math.inf, np.zeros(len(data.count))
    for _ in range(_ROUNDS):
        mixture = replace(mixture, gaps=np.maximum(top - mixture.means, data.narrow) * (1 + LEAST))
        shares, likelihood = _expected(data, mixture)
        if likelihood.sum() - before < LEAST * total.sum():
            break
        before = likelihood.sum()
        means, deviations = _background(shares[0], data, mixture, _LITTLE)
        sums = shares.sum(axis=2).T
        sums[:, 0] += LEAST
        mixture = replace(
            mixture, means=means, deviations=deviations, weights=sums / sums.sum(axis=1, keepdims=True)
        )
    return mixture, likelihood


def _expected(data: Histogram, mixture: Mixture) -> tuple[Values, Values]:
    """Candidates of each population (4, micrographs, bins), and each micrograph's log-likelihood."""
    parts = mixture.densities(data.score)
    total = parts.sum(axis=0) + NOTHING
    likelihood = (data.count * np.log(total)).sum(axis=1)
    return parts * (data.count / total), likelihood


def _fit(data: Histogram, mixture: Mixture, scatter: float, *, learn: bool = True) -> tuple[Mixture, Values]:
    """Fit from a start: each micrograph's own, and what they have in common if that is to be learned."""
    n, before = float(data.count.sum()), -math.inf
    likelihood = np.zeros(len(data.count))
    for _ in range(_ROUNDS):
        shares, likelihood = _expected(data, mixture)
        if likelihood.sum() - before < LEAST * n:
            break
        before = likelihood.sum()
        sums = shares.sum(axis=2) + 1e-12
        if learn:
            mixture = _learned(mixture, sums)
        particles = sums[1] + sums[2]
        weights = np.stack(
            [
                sums[0],
                particles * (1 - mixture.strong),
                particles * mixture.strong,
                particles * mixture.others,
            ],
            axis=1,
        )
        means, deviations = _background(shares[0], data, mixture)
        mixture = replace(
            mixture,
            weights=weights / weights.sum(axis=1, keepdims=True),
            means=means,
            deviations=deviations,
        )
        mixture = _moved(mixture, data, shares[1], scatter, learn=learn)
    return mixture, likelihood


def _learned(mixture: Mixture, sums: Values) -> Mixture:
    """Parts of strong ones and others, and the background of the usual micrograph with particles."""
    ordinary, strong, others = sums[1:].sum(axis=1)
    strong = min(strong, _STRONG * ordinary)
    particles = ordinary + strong
    usual = sums[0] * sums[1] / (sums[1] + _CERTAIN) + 1e-12
    return replace(
        mixture,
        strong=strong / particles,
        others=min(others / particles + _EXPECTED, _MOST),
        mean=float(np.average(mixture.means, weights=usual)),
        deviation=float(np.average(mixture.deviations, weights=usual)),
        share=float(np.average((sums[1] + sums[2]) / sums.sum(axis=0), weights=usual)),
    )


def _moved(mixture: Mixture, data: Histogram, share: Values, scatter: float, *, learn: bool) -> Mixture:
    """Particles' places and spreads by their shares (micrographs, bins) of the candidates."""
    power = mixture.power
    unit = mixture.gap * mixture.deviations
    above = np.maximum((data.score - mixture.means[:, None]) / unit[:, None], LEAST)
    number = share.sum(axis=1) + 1e-9
    means = (share * stretched(above, power)).sum(axis=1) / number
    certain = number / (number + _CERTAIN)
    variances = mixture.spread**2 / number
    centre, between = 0.0, mixture.between
    if learn:
        centre = float(np.average(means, weights=certain / (variances + between)))
    trust = between / (variances + between)
    centres = centre + trust * (means - centre)
    gaps = unit * shrunk(centres, power)
    spread, gap = mixture.spread, mixture.gap
    if learn:
        gap *= float(shrunk(np.array([centre]), power)[0])
        least = _ALIKE**2 * float(variances.min())
        between = float(np.average((centres - centre) ** 2 + trust * variances, weights=certain))
        square = float((share * stretched(above * (unit / gaps)[:, None], power) ** 2).sum())
        spread, between = math.sqrt(square / number.sum()), max(between, least)
    widest = mixture.deviations / gaps + scatter
    spreads = np.maximum(np.minimum(spread, widest), data.narrow / gaps)
    if learn:
        spread = float(np.average(spreads, weights=number))
    return replace(mixture, gaps=gaps, spreads=spreads, gap=gap, spread=spread, between=between)
