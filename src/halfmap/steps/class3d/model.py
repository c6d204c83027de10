"""The model of a classification: maps of the classes, shares, noise, scales; and its estimation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.ops.fsc import fsc, resolution
from halfmap.ops.threads import one_torch_thread
from halfmap.search.checkpoint import Checkpoint
from halfmap.search.halfmaps import believed, joined, radius_at, solved
from halfmap.search.lens_noise import NoiseSums
from halfmap.search.shared_map import Chance, Folded, added, kept, where_strong
from halfmap.search.stored_sums import StoredSums
from halfmap.steps.class3d.expectation import BEST
from halfmap.steps.class3d.plan import Plan

Loaded = Callable[[int, int], StoredSums]
Stage = Literal["everywhere", "near", "given", "done"]

THRESHOLD = 0.143
FREE = -1
"""Class of a particle whose class is not drawn but found."""

_MORE = 2
"""Rings that are compared over those that have signal."""

_SCALES = 0.2
"""Standard deviation of scales that is expected; none is believed to be off by more than three."""

_CONTRASTS, _FAINTEST = 0.3, 0.1
"""Greatest standard deviation of the particles' contrasts that is believed, and the least contrast."""

_LEAST = 0.2
"""Correlation of differences that is believed in any case, so that these can grow."""

_NEARBY, _WEAK = 0.5, 0.1
"""Standard deviation of what counts as nearby over the finest waves, and weight of a difference anywhere."""

_INSIDE = 0.5
"""Value of a mask in the region that it is of."""

_BACKGROUND = 1.5
"""Diameter over waves that are so long that they tell of the background, and of nothing that moves."""

_STALE = 2
"""Iterations without improvement after which there will be none."""

_SETTLED = 0.01
"""Share of the particles that change their class when classes stand."""

_JOIN_A = 40.0
"""Detail up to which halves whose poses are searched have it in common, which keeps them in one frame."""

_SEARCHES = 5
"""Iterations that search all poses before classes part."""


@dataclass(frozen=True, eq=False)
class Model(Checkpoint):
    """What is estimated.

    Attributes
    ----------
    iteration : int
        Number of the iteration that gave it; 0 to begin with.
    stage : str
        What the next iteration does: search all poses, near the last ones, or take those given; or that there
        is none.
    radius : int
        Rings that it compares.
    references : Tensor (folds, k, d, d, d)
        Maps that each fold is compared with, without its particles; one before classes part.
    noise : Tensor (2, groups, rings)
        Power of the noise of each optics group: that of the detector and that of the specimen.
    scale : Tensor (micrographs,)
        Strength of the particles' signal in each micrograph; 1 in the mean over particles.
    contrast : Tensor (n,)
        Strength of each particle's signal over that of its micrograph.
    shares : Tensor (k,)
        Of the particles in each class.
    deviation_A : float
        Standard deviation of the particles' shifts along an axis.
    forced : Tensor (n,) int64
        Class that each particle is put into by the next iteration, whatever it finds, or `FREE`.
    curves : Tensor (1 + classes, shells)
        FSC between the halves of all particles, and of each class.
    differences : Tensor (classes, shells)
        FSC between the halves of what each class has that all particles have not.
    differing : int
        Largest ring at which the next maps of classes may differ.
    finest : int
        Largest ring at which the first curve has ever been above its threshold.
    stale : int
        Iterations since then.
    changed : float
        Share of the particles that have changed their class.
    agreement : float
        Correlation of what two halves differ in most, each by itself; see `variation.agreement`. In the end.
    """

    on_device: ClassVar = ("references", "noise", "scale", "contrast")

    iteration: int
    stage: Stage
    radius: int
    references: Tensor
    noise: Tensor
    scale: Tensor
    contrast: Tensor
    shares: Tensor
    deviation_A: float
    forced: Tensor
    curves: Tensor
    differences: Tensor
    differing: int
    finest: int
    stale: int
    changed: float
    agreement: float

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.stage == "done"

    @property
    def parted(self) -> bool:
        """Whether there are classes, and not one map."""
        return self.references.shape[1] > 1

    @property
    def reach(self) -> int:
        """Largest ring at which halves agree in a difference between classes, 0 if there is none."""
        return max(_reach(curve[: self.differing + 1]) for curve in self.differences)

    def resolutions(self, plan: Plan) -> list[float]:
        """Resolution in Å to which halves agree, of all particles and of each class; none is the side."""
        how = {"pixel_size": plan.pixel_size, "box": plan.box, "threshold": THRESHOLD}
        return [min(resolution(curve, **how), plan.side) for curve in self.curves]


@one_torch_thread()
def maximise(
    plan: Plan,
    model: Model,
    load: Loaded,
    noise: NoiseSums,
    best: NDArray[np.float64],
    overlaps: NDArray[np.float64],
    before: NDArray[np.float64] | None,
) -> tuple[Model, Tensor]:
    """Estimate the model anew from what the images add up to.

    Parameters
    ----------
    plan, model
        The classification, and the model that the sums were made with.
    load : callable
        Gives the sums of a class and a fold.
    noise : NoiseSums
        Of what the maps leave unexplained.
    best : array (n, columns)
        What was found for each particle, in the order of the table; see `expectation.BEST`.
    overlaps : array (folds, k, k)
        Sums over the particles of each fold of products of the probabilities of two classes.
    before : array (n, columns), optional
        The same of the iteration before.

    Returns
    -------
    Model
    Tensor (k, d, d, d)
        Filtered maps of all particles of each class, not masked.
    """
    k, seed = overlaps.shape[1], plan.step.seed + model.iteration
    folds = [added([load(number, fold) for number in range(k)]) for fold in range(plan.n_folds)]
    shared = _Shared.of(plan, Folded.of(folds, plan.solvent(), seed=seed))
    maps, references = shared.filtered.repeat(k, 1, 1, 1), shared.bases[:, None].repeat(1, k, 1, 1, 1)
    curves, differences = torch.zeros_like(model.curves), torch.zeros_like(model.differences)
    curves[0] = shared.whole.curve
    chance = Chance.of(model.references, overlaps)
    for number in range(k if k > 1 else 0):
        own = Folded.of([load(number, fold) for fold in range(plan.n_folds)], plan.solvent(), seed=seed)
        curves[1 + number] = own.curve
        differences[number], of_all, of_others = _difference(plan, model, shared, own, chance, number)
        maps[number] += of_all
        references[:, number] += of_others
    fitted, scale = noise.fit(), _scale(plan, model, best)
    new = replace(
        model,
        iteration=model.iteration + 1,
        references=references * plan.solvent(),
        noise=torch.stack([fitted.detector, fitted.specimen]).to(model.noise),
        scale=scale,
        contrast=contrast(best, scale.cpu().numpy()[plan.micrographs]).to(scale),
        shares=torch.from_numpy(overlaps.sum((0, 1)) / overlaps.sum()),
        deviation_A=_deviation(plan, best),
        curves=curves,
        differences=differences,
        changed=_changed(best, before),
    )
    return _scheduled(plan, model, new), maps


@dataclass(frozen=True, eq=False)
class _Shared:
    """Maps of all particles: of all folds filtered (d, d, d) and not, and for each (folds, d, d, d)."""

    whole: Folded
    filtered: Tensor
    mean: Tensor
    bases: Tensor
    means: Tensor

    @classmethod
    def of(cls, plan: Plan, whole: Folded) -> _Shared:
        # The sums of both halves have twice the weight and half the noise: the prior is that of one.
        priors = whole.sums.prior(believed(whole.curve))
        prior = priors.mean(0)
        means = torch.stack([_without(plan, whole, fold) for fold in range(plan.n_folds)])
        if plan.step.alignment:
            bases = _bases_of_halves(plan, whole, priors)
        else:
            bases = torch.stack([solved(whole.total, prior, without=fold) for fold in whole.folds])
        return cls(whole, solved(whole.total, prior), whole.unfiltered(), bases, means)


def _without(plan: Plan, sums: Folded, fold: int) -> Tensor:
    """Unfiltered map (d, d, d) of the folds that a fold is compared with."""
    half = 2 * fold // plan.n_folds if plan.step.alignment else None
    return sums.unfiltered(sums.folds[fold], half=half)


def _bases_of_halves(plan: Plan, whole: Folded, priors: Tensor) -> Tensor:
    """Filtered maps (folds, d, d, d), of the other folds of the half; coarse detail is of both."""
    each, radius, found = plan.n_folds // 2, plan.side / _JOIN_A, []
    halves = [solved(sums, prior) for sums, prior in zip(whole.sums.halves, priors, strict=True)]
    for fold, own in enumerate(whole.folds):
        half = fold // each
        base = solved(whole.sums.halves[half], priors[half], without=own)
        found.append(joined(base, halves[1 - half], radius=radius))
    return torch.stack(found)


def _difference(
    plan: Plan, model: Model, shared: _Shared, own: Folded, chance: Chance, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What a class has that all particles have not.

    Returns
    -------
    Tensor (shells,)
        How its halves agree in that.
    Tensor (d, d, d)
        Of all folds.
    Tensor (folds, d, d, d)
        Of those that each fold is compared with, within the part where classes may differ.
    """
    part, solvent = plan.compared_part(), plan.solvent()
    shells = torch.arange(model.differences.shape[1])
    waves = shells > round(_BACKGROUND * plan.side / plan.diameter)
    within = (waves & (shells <= model.differing)).float()
    each = plan.n_folds // 2
    halves = [
        (
            own.maps[half]
            - shared.whole.maps[half]
            - chance.mean(number, range(half * each, (half + 1) * each))
        )
        * part
        for half in (0, 1)
    ]
    agreed = fsc(*halves).cpu().float().nan_to_num(nan=0.0) * waves
    how = {"sigma_px": _NEARBY * plan.box / model.differing, "least": _WEAK}
    trusted, allowed = agreed * within, agreed.clamp_min(_LEAST) * within
    noise = _noise_within(halves, allowed, part)
    if _reach(trusted):
        # They agree better where they differ strongly: it is a part of the particle that moves.
        strong = where_strong(kept(halves[0] + halves[1], allowed) / 2, noise, **how)
        there = fsc(halves[0] * strong, halves[1] * strong).cpu().float().nan_to_num(nan=0.0) * within
        trusted, allowed = trusted.maximum(there), allowed.maximum(there)
        noise = _noise_within(halves, allowed, part)
    references = []
    for fold, means in enumerate(shared.means):
        others = plan.others(fold)
        by_chance = chance.mean(number, others)
        apart = _without(plan, own, fold) - means - by_chance
        found = kept(
            apart * part, allowed, halves=2 * len(others) / plan.n_folds if plan.step.alignment else 2
        )
        found *= where_strong(found, noise * plan.n_folds / len(others), **how)
        # What noise that was sorted leaves is taken from the data, and put back without noise.
        references.append((found + kept(by_chance, within)) * part)
    difference = kept((own.unfiltered() - shared.mean) * solvent, trusted)
    return agreed, difference * where_strong(difference, noise, **how), torch.stack(references)


def _noise_within(halves: Sequence[Tensor], correlation: Tensor, part: Tensor) -> float:
    """Mean square, within a mask, of the noise in what is kept of the mean of two halves."""
    return float(kept(halves[0] - halves[1], correlation)[part > _INSIDE].square().mean()) / 4


def _scheduled(plan: Plan, model: Model, new: Model) -> Model:
    """The same with what the next iteration does."""
    ring = radius_at(new.curves[0], THRESHOLD)
    differing = min(max(new.reach, plan.first_ring) + _MORE, plan.finest)
    stale = 0 if ring > model.finest or differing > model.differing else model.stale + 1
    radius = min(max(ring, plan.first_ring) + _MORE, plan.finest)
    new = replace(
        new,
        radius=radius,
        finest=max(ring, model.finest),
        differing=differing,
        stale=stale,
        forced=torch.full_like(model.forced, FREE),
    )
    if new.iteration >= plan.step.iterations:
        return replace(new, stage="done")
    searches = min(_SEARCHES, plan.step.iterations // 2)
    if model.stage == "everywhere" and (stale or new.iteration >= searches or model.radius == plan.finest):
        return replace(new, stage="near", stale=0)
    if model.stage != "everywhere" and stale >= _STALE and new.changed < _SETTLED:
        return replace(new, stage="done")
    return new


def _reach(curve: Tensor) -> int:
    """Last of two shells on end in which a correlation is above the threshold, 0 if there are none."""
    both = (curve[1:-1] >= THRESHOLD) & (curve[2:] >= THRESHOLD)
    return int(both.nonzero().max()) + 2 if bool(both.any()) else 0


def _scale(plan: Plan, model: Model, best: NDArray[np.float64]) -> Tensor:
    """Scale of each micrograph that its particles match the maps best with, under a normal prior."""
    n = len(model.scale)
    match, norm = (np.bincount(plan.micrographs, best[:, BEST.index(name)], n) for name in ("match", "norm"))
    prior = 1 / _SCALES**2
    scale = np.clip((match + prior) / (norm + prior), 1 - 3 * _SCALES, 1 + 3 * _SCALES)
    return torch.from_numpy(scale / scale[plan.micrographs].mean()).to(model.scale)


def contrast(best: NDArray[np.float64], scale: NDArray[np.floating]) -> Tensor:
    """Strength (n,) of each particle's signal over that of its micrograph.

    Parameters
    ----------
    best : array (n, columns)
        What was found for each particle; see `expectation.BEST`.
    scale : array (n,)
        Of its micrograph.

    Notes
    -----
    Else a class would gather the faint ones. What an image matches beyond its micrograph's scale has the
    variance of the noise, which is known, and that of the contrast, which is what is left of it in the mean
    over particles. Each particle's is its mean under a normal prior of that variance.
    """
    match, norm = (best[:, BEST.index(name)] for name in ("match", "norm"))
    power, more = scale**2 * norm, scale * match - scale**2 * norm
    variance = np.clip((more**2 - power).sum() / max((power**2).sum(), 1e-30), 0, _CONTRASTS**2)
    found = 1 + variance * more / (1 + variance * power)
    return torch.from_numpy(np.clip(found, _FAINTEST, None))


def _deviation(plan: Plan, best: NDArray[np.float64]) -> float:
    """Standard deviation of shifts, wide enough never to decide."""
    shifts = best[:, BEST.index("x") : BEST.index("y") + 1]
    return float(np.clip(np.sqrt((shifts**2).mean()), plan.pixel_size, plan.shift_range))


def _changed(best: NDArray[np.float64], before: NDArray[np.float64] | None) -> float:
    """Share of the particles in another class than before; all, where there was only one map before."""
    number = BEST.index("class")
    if before is None or not before[:, number].any():
        return 1.0
    return float((best[:, number] != before[:, number]).mean())
