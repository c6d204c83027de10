"""The tables of a classification: particles with their classes and poses, and the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from halfmap.data import ParticleSet
from halfmap.data.views import OF_POSES
from halfmap.io.mrc import write_mrc
from halfmap.io.star import write_star
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.fourier import resample
from halfmap.search.model_tables import noise_tables, scale_table, spectrum_table
from halfmap.steps.class2d.model import Model
from halfmap.steps.class2d.plan import Plan

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.class2d.step import Class2DStep

AVERAGES = "class_averages.mrcs"

_COLUMNS = {
    "rlnAnglePsi": 2,
    "rlnOriginXAngst": 3,
    "rlnOriginYAngst": 4,
    "rlnMaxValueProbDistribution": 5,
    "hmClassProbability": 6,
    "hmPosteriorEntropy": 7,
    "hmAnglePsiError": 8,
    "hmOriginError": 9,
    "rlnLogLikeliContribution": 10,
}
"""Columns of the particles' table, and of `expectation.BEST`."""

_NO_ANGLE = 360 / 12**0.5
"""Standard deviation of an angle that nothing is known of; about one of several peaks it would be larger."""


def read(step: Class2DStep, ctx: Context) -> ParticleSet:
    """Read the particles."""
    return read_particles(ctx.resolve(step.particles))


def write(ctx: Context, plan: Plan, particles: ParticleSet, model: Model, best: NDArray[np.float64]) -> None:
    """Write averages, model and particles.

    Parameters
    ----------
    ctx, plan
        Job and classification.
    particles : ParticleSet
        As they were given.
    model : Model
        Of the last iteration.
    best : array (n, columns)
        What that found for each particle; see `expectation.BEST`.
    """
    best = best.copy()
    best[:, _COLUMNS["hmAnglePsiError"]] = best[:, _COLUMNS["hmAnglePsiError"]].clip(max=_NO_ANGLE)
    best[:, _COLUMNS["hmClassProbability"]] = best[:, _COLUMNS["hmClassProbability"]].clip(max=1.0)
    full = (plan.full_box, plan.full_box)
    averages = resample(model.averages.cpu(), new_shape=full).numpy().astype(np.float32)
    write_mrc(ctx.folder / AVERAGES, averages, pixel_size=plan.full_pixel_size, stack=True)
    _write_model(ctx, plan, model, best)
    # What an earlier refinement said of its poses does not hold for these.
    rows = particles.rows.drop(*OF_POSES, "rlnOriginX", "rlnOriginY", strict=False).with_columns(
        pl.Series("rlnClassNumber", best[:, 1].astype(np.int64) + 1),
        pl.lit(0.0).alias("rlnAngleRot"),
        pl.lit(0.0).alias("rlnAngleTilt"),
        *(pl.Series(name, best[:, i]) for name, i in _COLUMNS.items()),
    )
    write_particles(ctx.folder / "particles.star", ParticleSet(particles.optics, rows))


def _write_model(ctx: Context, plan: Plan, model: Model, best: NDArray[np.float64]) -> None:
    ratios = model.ratio.cpu().numpy().astype(float)
    blocks = {
        "model_general": _general(plan, model, best),
        "model_classes": _classes(ctx, plan, model, best),
        **{f"model_class_{i + 1}": spectrum_table(plan.side, rlnSsnrMap=row) for i, row in enumerate(ratios)},
        "model_groups": scale_table(plan.names, plan.micrographs, model.scale.cpu().numpy().astype(float)),
        **noise_tables(model.noise.cpu().numpy().astype(float), box=plan.box, side=plan.side),
    }
    write_star(ctx.folder / "model.star", blocks)


def _general(plan: Plan, model: Model, best: NDArray[np.float64]) -> dict[str, int | float]:
    occupied = np.unique(best[:, 1].astype(int))
    return {
        "rlnReferenceDimensionality": 2,
        "rlnDataDimensionality": 2,
        "rlnOriginalImageSize": plan.full_box,
        "rlnPixelSize": plan.full_pixel_size,
        "rlnParticleDiameter": plan.diameter,
        "rlnCurrentResolution": float(model.resolutions(plan)[occupied].min()),
        "rlnCurrentIteration": model.iteration,
        "rlnNrClasses": plan.step.classes,
        "rlnSigmaOffsetsAngst": model.deviation_px * plan.pixel_size,
        "rlnAveragePmax": float(best[:, 5].mean()),
        "rlnLogLikelihood": float(best[:, 10].sum()),
    }


def _classes(ctx: Context, plan: Plan, model: Model, best: NDArray[np.float64]) -> pl.DataFrame:
    """Share, resolution and mean errors of the poses of each class; 999 where it has no particles."""
    classes, of_class = plan.step.classes, best[:, 1].astype(int)
    members = np.bincount(of_class, minlength=classes)
    errors = np.zeros((classes, 2))
    np.add.at(errors, of_class, best[:, 8:10])
    errors /= np.maximum(members, 1)[:, None]
    stack = ctx.relative(ctx.folder / AVERAGES)
    return pl.DataFrame(
        {
            "rlnReferenceImage": [f"{i + 1:06d}@{stack}" for i in range(classes)],
            "rlnClassIndex": np.arange(classes) + 1,
            "rlnClassDistribution": members / members.sum(),
            "rlnAccuracyRotations": np.where(members > 0, errors[:, 0], 999.0),
            "rlnAccuracyTranslationsAngst": np.where(members > 0, errors[:, 1], 999.0),
            "rlnEstimatedResolution": np.where(members > 0, model.resolutions(plan), 999.0),
            "hmNrParticles": members,
        }
    )
