"""Classes that have lost their particles take over a part of the largest ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from halfmap.steps.class3d.expectation import BEST
from halfmap.steps.class3d.model import FREE, Model
from halfmap.steps.class3d.plan import Plan

_STARVED = 0.04
"""Particles, over those of an equal share, below which a class begins anew."""

_EARLY = 0.6
"""Part of the iterations in which classes may begin anew."""


def reseed(plan: Plan, model: Model, best: NDArray[np.float64]) -> tuple[Model, int]:
    """Put that half of a large class' particles that fits it least into a class that starves.

    Parameters
    ----------
    plan, model
        The classification, and the model that was just estimated.
    best : array (n, columns)
        What was found for each particle; see `expectation.BEST`.

    Returns
    -------
    model, number of classes that begin anew

    Notes
    -----
    Particles that a class explains less than others are what most likely is something else. They are moved
    in the next iteration only, and free again after it.
    """
    k = len(model.shares)
    if k == 1 or model.iteration >= _EARLY * plan.step.iterations or model.done:
        return model, 0
    of_class = best[:, BEST.index("class")].astype(np.intp)
    members = np.bincount(of_class, minlength=k)
    equal = len(best) / k
    starved = np.flatnonzero(members < _STARVED * equal)
    large = np.argsort(-members, kind="stable")[: len(starved)]
    large = large[members[large] > equal]
    forced = np.full(len(best), FREE)
    for hungry, parent in zip(starved, large, strict=False):
        own = np.flatnonzero(of_class == parent)
        worse = own[np.argsort(best[own, BEST.index("evidence")], kind="stable")[: len(own) // 2]]
        forced[own], forced[worse] = parent, hungry
    seeded = min(len(starved), len(large))
    return replace(model, forced=torch.from_numpy(forced)) if seeded else model, seeded
