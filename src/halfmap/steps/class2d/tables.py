"""The tables of a classification: particles with their classes and poses, and the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from halfmap.data import ParticleSet
from halfmap.io.mrc import write_mrc
from halfmap.io.star import write_star
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.fourier import resample
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
    full = (plan.full_box, plan.full_box)
    averages = resample(model.averages.cpu(), new_shape=full).numpy().astype(np.float32)
    write_mrc(ctx.folder / AVERAGES, averages, pixel_size=plan.full_pixel_size, stack=True)
    _write_model(ctx, plan, model, best)
    rows = particles.rows.with_columns(
        pl.Series("rlnClassNumber", best[:, 1].astype(np.int64) + 1),
        pl.lit(0.0).alias("rlnAngleRot"),
        pl.lit(0.0).alias("rlnAngleTilt"),
        *(pl.Series(name, best[:, i]) for name, i in _COLUMNS.items()),
    )
    rows = rows.drop("rlnOriginX", "rlnOriginY", strict=False)
    write_particles(ctx.folder / "particles.star", ParticleSet(particles.optics, rows))


def _write_model(ctx: Context, plan: Plan, model: Model, best: NDArray[np.float64]) -> None:
    members = np.bincount(best[:, 1].astype(int), minlength=plan.step.classes)
    resolutions = model.resolutions(plan)
    stack = ctx.relative(ctx.folder / AVERAGES)
    general = {
        "rlnReferenceDimensionality": 2,
        "rlnDataDimensionality": 2,
        "rlnOriginalImageSize": plan.full_box,
        "rlnPixelSize": plan.full_pixel_size,
        "rlnParticleDiameter": plan.diameter,
        "rlnCurrentResolution": float(resolutions[members > 0].min()),
        "rlnCurrentIteration": model.iteration,
        "rlnNrClasses": plan.step.classes,
        "rlnSigmaOffsetsAngst": model.deviation_px * plan.pixel_size,
        "rlnAveragePmax": float(best[:, 5].mean()),
        "rlnLogLikelihood": float(best[:, 10].sum()),
    }
    within = np.zeros((plan.step.classes, 2))
    np.add.at(within, best[:, 1].astype(int), best[:, 8:10])
    within /= np.maximum(members, 1)[:, None]
    classes = pl.DataFrame(
        {
            "rlnReferenceImage": [f"{i + 1:06d}@{stack}" for i in range(plan.step.classes)],
            "rlnClassIndex": np.arange(plan.step.classes) + 1,
            "rlnClassDistribution": members / members.sum(),
            "rlnAccuracyRotations": np.where(members > 0, within[:, 0], 999.0),
            "rlnAccuracyTranslationsAngst": np.where(members > 0, within[:, 1], 999.0),
            "rlnEstimatedResolution": np.where(members > 0, resolutions, 999.0),
            "hmNrParticles": members,
        }
    )
    spectra = {
        f"model_class_{i + 1}": pl.DataFrame(
            {
                "rlnSpectralIndex": np.arange(len(ratio)),
                "rlnResolution": np.arange(len(ratio)) / plan.side,
                "rlnSsnrMap": ratio,
            }
        )
        for i, ratio in enumerate(model.ratio.cpu().numpy().astype(float))
    }
    noise = {
        f"model_optics_group_{i + 1}": pl.DataFrame(
            {
                "rlnSpectralIndex": np.arange(len(power)),
                "rlnResolution": np.arange(len(power)) / plan.side,
                # Of real and imaginary part each, of a transform divided by the number of pixels: RELION's.
                "rlnSigma2Noise": power / (2 * plan.box**4),
            }
        )
        for i, power in enumerate(model.noise.cpu().numpy().astype(float))
    }
    groups = pl.DataFrame(
        {
            "rlnGroupNumber": np.arange(len(model.scale)) + 1,
            "rlnGroupName": plan.names,
            "rlnGroupNrParticles": np.bincount(plan.micrographs),
            "rlnGroupScaleCorrection": model.scale.cpu().numpy().astype(float),
        }
    )
    blocks = {
        "model_general": general,
        "model_classes": classes,
        **spectra,
        "model_groups": groups,
        **noise,
    }
    write_star(ctx.folder / "model.star", blocks)
