"""Classes that have lost their particles take over a part of the largest ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from halfmap.ops.threads import one_torch_thread
from halfmap.search.particles import ParticleImages
from halfmap.steps.class2d.model import Model
from halfmap.steps.class2d.plan import Iteration, Plan
from halfmap.steps.class2d.start import aligned_averages, left

_STARVED = 0.15
"""Particles, over those of an equal share, below which a class begins anew."""

_NAMES = "sets", "weights", "left", "signal", "agreed"

_MOST = 400
"""Particles of a part at the most: what it is needs no more."""


@one_torch_thread()
def reseed(
    plan: Plan,
    images: ParticleImages,
    model: Model,
    best: NDArray[np.float64],
    iteration: Iteration,
    radius: int,
) -> tuple[Model, int]:
    """Replace starving averages by averages of those particles of large classes that fit these least.

    Parameters
    ----------
    plan, images, model
        The classification, its images, and the model that was just estimated.
    best : array (n, columns)
        What was found for each particle; see `expectation.BEST`.
    iteration : Iteration
        That was run.
    radius : int
        Outer ring that it used.

    Returns
    -------
    model, number of classes that begin anew

    Notes
    -----
    A class that is no more than a blur of many views wins against any sharp one that begins from few
    particles. Half of its own particles, as it has aligned them, begin as well as it is itself. The half that
    fits less is what most likely is something else: another view, another structure, or no particle.
    """
    classes = plan.step.classes
    if iteration.last:
        return model, 0
    of_class = best[:, 1].astype(int)
    members = np.bincount(of_class, minlength=classes)
    equal = len(best) / classes
    starved = np.flatnonzero(members < _STARVED * equal)
    large = np.argsort(-members, kind="stable")[: len(starved)]
    large = large[members[large] > equal]
    starved = starved[: len(large)]
    if len(starved) == 0:
        return model, 0
    new = {name: getattr(model, name).clone() for name in _NAMES}
    for hungry, parent in zip(starved, large, strict=True):
        own = best[of_class == parent]
        worse = own[np.argsort(own[:, 10], kind="stable")[: len(own) // 2]]
        some = worse[
            np.random.default_rng((plan.step.seed, iteration.number, int(parent))).permutation(len(worse))
        ]
        some = some[:_MOST][np.argsort(some[:_MOST, 0])]
        signal = model.signal[parent]
        averages, weights = aligned_averages(
            plan, images, some[:, 0].astype(np.intp), some[:, 2:5], model.noise, signal, radius
        )
        new["sets"][:, hungry], new["weights"][:, hungry] = averages, weights
        new["left"][:, hungry] = left(weights, signal)
        new["signal"][hungry], new["agreed"][hungry] = signal, model.agreed[parent]
    return replace(model, **new), len(starved)
