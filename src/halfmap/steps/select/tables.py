"""The tables of a selection: particles kept and rejected, class averages, and the model with its scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from halfmap.io.star import write_star
from halfmap.io.tables import write_particles
from halfmap.log import log
from halfmap.steps.select.choice import Choice
from halfmap.steps.select.classification import Classification

if TYPE_CHECKING:
    from halfmap.engine import Context

_SHARE = 0.05
"""Expected loss of good particles that is worth a warning."""


def write(ctx: Context, found: Classification, chosen: Choice) -> None:
    """Write all tables, and say how much is kept and how much of it is expected to be good."""
    particles = found.particles
    if not found.of_maps:
        of_class = np.where(found.number >= 0, chosen.class_score[found.number], 0.0)
        particles = particles.with_columns(pl.Series("rlnClassScore", of_class))
    if chosen.particle_score is not None:
        particles = particles.with_columns(pl.Series("hmParticleScore", chosen.particle_score))
    write_particles(ctx.folder / "particles.star", particles.select(chosen.kept))
    if not chosen.kept.all():
        reasons = pl.Series("hmReason", _reasons(found, chosen))
        write_particles(ctx.folder / "rejected.star", particles.with_columns(reasons).select(~chosen.kept))
    classes = found.classes
    if not found.of_maps:
        score = pl.Series("rlnClassScore", chosen.class_score)
        classes = classes.with_columns(score, score.alias("rlnPredictedClassScore"))
    write_star(ctx.folder / "class_averages.star", {"": classes.filter(pl.Series(chosen.class_kept))})
    general = dict(found.blocks["model_general"])
    if chosen.good_lost is not None:
        general["hmGoodLost"] = chosen.good_lost
    blocks = {**found.blocks, "model_general": general, "model_classes": classes}
    write_star(ctx.folder / "model.star", blocks)
    _say(found, chosen)


def _reasons(found: Classification, chosen: Choice) -> list[str]:
    """Why each particle is rejected; nothing for those kept."""
    in_class = (found.number >= 0) & chosen.class_kept[found.number]
    return [
        ""
        if kept
        else "no class"
        if number < 0
        else f"particle score below {chosen.min_particle_score:g}"
        if inside
        else f"class {number + 1}"
        for number, inside, kept in zip(found.number.tolist(), in_class, chosen.kept, strict=True)
    ]


def _say(found: Classification, chosen: Choice) -> None:
    occupied = found.members > 0
    log.info(
        "%d of %d classes and %d of %d particles kept, %d rejected within kept classes",
        *(int((chosen.class_kept & occupied).sum()), int(occupied.sum()), int(chosen.kept.sum())),
        *(
            len(chosen.kept),
            int((~chosen.kept & chosen.class_kept[found.number] & (found.number >= 0)).sum()),
        ),
    )
    if chosen.good_lost is None or chosen.junk_kept is None:
        return
    text = "expected by the scores: %.1f %% of the good particles lost, %.1f %% junk among those kept"
    log.info(text, 100 * chosen.good_lost, 100 * chosen.junk_kept)
    if chosen.good_lost > _SHARE:
        log.warning("more than %d %% of the good particles may be lost: see classes.png", 100 * _SHARE)
