"""Which classes and particles are kept, by their scores or by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from halfmap.errors import ItemsFailedError, ParameterError, TableError
from halfmap.io.star import read_star
from halfmap.steps.select import images
from halfmap.steps.select.classification import Classification
from halfmap.steps.select.features import class_features, particle_features
from halfmap.steps.select.score import CLASS_LOGIT, Logistic, logit, shipped

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.select.step import SelectStep

_NAMED = 5
"""Wrong numbers that a message names."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What is kept.

    Attributes
    ----------
    class_score : array (k,)
        Score of each class; 0 where it has no particles.
    particle_score : array (n,) or None
        Score of each particle, 0 where it has no class; None if particles were not scored.
    class_kept : array (k,) of bool
    kept : array (n,) of bool
    min_particle_score : float
        That was asked of particles in kept classes.
    """

    class_score: NDArray[np.float64]
    particle_score: NDArray[np.float64] | None
    class_kept: NDArray[np.bool_]
    kept: NDArray[np.bool_]
    min_particle_score: float

    @property
    def good_lost(self) -> float | None:
        """Share of the good particles that is expected to be rejected, by the particles' scores."""
        if self.particle_score is None or not self.particle_score.any():
            return None
        return float(self.particle_score[~self.kept].sum() / self.particle_score.sum())

    @property
    def junk_kept(self) -> float | None:
        """Share of what is kept that is expected to be junk."""
        return None if self.particle_score is None else float(1 - self.particle_score[self.kept].mean())


def score_particles(
    found: Classification, model: Logistic, of_classes: NDArray[np.float64], measured: NDArray | None
) -> NDArray[np.float64]:
    """Scores (n,) of particles, by their tables, classes and what was measured of their images."""
    features = particle_features(found, measured)
    features[CLASS_LOGIT] = logit(of_classes)[found.number]
    return np.where(found.number >= 0, model(features), 0.0)


def choose(step: SelectStep, ctx: Context, found: Classification) -> Choice:
    """Choose classes and particles.

    Raises
    ------
    ParameterError
        If a class is named that does not exist, or maps are to be chosen by scores.
    ItemsFailedError
        If nothing is left.
    """
    scorer = shipped()
    if found.of_maps and (not step.by_hand or step.min_particle_score):
        raise ParameterError(
            "scores are of class averages, not of maps",
            path=found.path,
            hint="name the classes to keep with --classes, or those to reject with --exclude",
        )
    of_classes = np.zeros(len(found.members))
    if not found.of_maps:
        of_classes = np.where(found.members > 0, scorer.classes(class_features(found)), 0.0)
    if step.by_hand:
        class_kept = _named(step, ctx, found)
    else:
        class_kept = of_classes >= (scorer.min_score if step.min_score is None else step.min_score)
    if step.by_hand and not found.members[class_kept].any():
        names = ", ".join(str(number + 1) for number in np.flatnonzero(class_kept)) or "none"
        raise ParameterError(
            f"the classes kept ({names}) have no particles",
            hint="look at the picture of the classes for those that have",
        )
    class_kept &= found.members >= step.min_particles
    kept = (found.number >= 0) & class_kept[found.number]
    of_particles, limit = None, step.min_particle_score or 0.0
    if not step.by_hand or limit > 0:
        measured = images.measure(ctx, found) if step.images else None
        model = scorer.particles if step.images else scorer.particles_unseen
        of_particles = score_particles(found, model.logistic, of_classes, measured)
        limit = model.least if step.min_particle_score is None else limit
        kept &= of_particles >= limit
    if not kept.any():
        best = int(of_classes.argmax())
        raise ItemsFailedError(
            f"all {len(kept)} particles are rejected; the best class, {best + 1}, has a score of "
            f"{of_classes[best]:.2f}",
            hint="name classes with --classes, or lower --min-score, --min-particle-score or --min-particles",
        )
    return Choice(of_classes, of_particles, class_kept, kept, limit)


def _named(step: SelectStep, ctx: Context, found: Classification) -> NDArray[np.bool_]:
    """Classes (k,) that are kept by hand."""
    classes = len(found.averages)
    if step.averages is not None:
        return _mask(_numbers_in(ctx.resolve(step.averages)), classes, str(step.averages))
    if step.classes:
        return _mask(step.classes, classes, "--classes")
    return ~_mask(step.exclude, classes, "--exclude")


def _mask(numbers: Iterable[int], classes: int, where: str) -> NDArray[np.bool_]:
    wrong = sorted({number for number in numbers if not 1 <= number <= classes})
    if wrong:
        names = ", ".join(map(str, wrong[:_NAMED])) + (" …" if len(wrong) > _NAMED else "")
        raise ParameterError(f"{where}: there is no class {names}", hint=f"classes are 1 to {classes}")
    mask = np.zeros(classes, bool)
    mask[[number - 1 for number in numbers]] = True
    return mask


def _numbers_in(path: Path) -> list[int]:
    """Numbers of the classes whose averages a table names."""
    for table in read_star(path).values():
        if isinstance(table, pl.DataFrame) and "rlnReferenceImage" in table.columns:
            names = table["rlnReferenceImage"].to_list()
            numbers = [re.match(r"(\d+)@", name) for name in names]
            return [int(number.group(1)) if number else 1 for number in numbers]
    raise TableError("names no class averages (_rlnReferenceImage)", path=path, hint="is it the right file?")
