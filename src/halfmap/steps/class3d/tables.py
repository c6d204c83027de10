"""The maps and tables of a classification: class maps, particles with poses and classes, model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.data import ParticleSet, Poses
from halfmap.io.mrc import write_mrc
from halfmap.io.star import write_star
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.fourier import resample
from halfmap.ops.symmetry import reduce_to_asymmetric_unit
from halfmap.search.folds import SUBSET
from halfmap.search.halfmaps import believed
from halfmap.search.model_tables import noise_tables, scale_table, spectrum_table
from halfmap.steps.class3d.expectation import BEST, ROTATION
from halfmap.steps.class3d.model import Model
from halfmap.steps.class3d.plan import Plan

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.class3d.step import Class3DStep

_COLUMNS = {
    "rlnMaxValueProbDistribution": "share",
    "hmClassProbability": "class_probability",
    "hmPosteriorEntropy": "entropy",
    "rlnLogLikeliContribution": "evidence",
}
_POSES = {
    "hmPoseUncertainty": "pose_error",
    "hmAngleViewError": "view_error",
    "hmAnglePsiError": "psi_error",
    "hmOriginError": "shift_error",
}

_NONE = 999.0
"""RELION's resolution of a class that has no particles."""

Result = tuple[Tensor, NDArray[np.float64]]


def read(step: Class3DStep, ctx: Context) -> ParticleSet:
    """Read the particles."""
    return read_particles(ctx.resolve(step.particles))


def write(ctx: Context, plan: Plan, particles: ParticleSet, model: Model, result: Result) -> None:
    """Write maps, model and particles.

    Parameters
    ----------
    ctx, plan
        Job and classification.
    particles : ParticleSet
        As they were given.
    model : Model
        Of the last iteration.
    result : Tensor (k, d, d, d) and array (n, columns)
        Filtered maps, and what was found for each particle; see `expectation.BEST`.
    """
    maps, best = result
    for number, volume in enumerate(maps):
        array = enlarged(plan, volume).numpy().astype(np.float32)
        write_mrc(ctx.folder / map_name(number), array, pixel_size=plan.full_pixel_size)
    _write_model(ctx, plan, model, best)
    columns = dict(_COLUMNS)
    if plan.step.alignment:
        columns |= _POSES
        rotations = torch.from_numpy(best[:, ROTATION].reshape(-1, 3, 3))
        shifts = torch.from_numpy(best[:, [BEST.index("x"), BEST.index("y")]])
        poses = Poses(reduce_to_asymmetric_unit(rotations, plan.step.symmetry), shifts)
        # Half sets have met in these maps: kept, they would seem not to have.
        particles = particles.with_rows(particles.rows.drop(SUBSET, strict=False)).with_poses(poses)
    written = particles.with_columns(
        pl.Series("rlnClassNumber", best[:, BEST.index("class")].astype(np.int64) + 1),
        *(pl.Series(label, best[:, BEST.index(name)]) for label, name in columns.items()),
    )
    write_particles(ctx.folder / "particles.star", written)


def map_name(number: int) -> str:
    """Name of the file of a map, from 0."""
    return f"class{number + 1:03d}.mrc"


def enlarged(plan: Plan, volume: Tensor) -> Tensor:
    """A map on the grid of the particles, its projections on their grey scale."""
    # There are more voxels along a projection.
    return resample(volume, new_shape=(plan.full_box,) * 3) * (plan.box / plan.full_box)


def members_of(model: Model, best: NDArray[np.float64]) -> NDArray[np.intp]:
    """Number of particles (k,) whose most probable class is each."""
    return np.bincount(best[:, BEST.index("class")].astype(np.intp), minlength=len(model.shares))


def _write_model(ctx: Context, plan: Plan, model: Model, best: NDArray[np.float64]) -> None:
    # That of an image of the mean squared CTF, one half.
    noise = (model.noise[0] + model.noise[1] / 2).cpu().numpy().astype(float)
    curves = model.curves.numpy().astype(float)
    blocks = {
        "model_general": _general(plan, model, best),
        "model_classes": _classes(ctx, plan, model, best),
        **{
            f"model_class_{i + 1}": spectrum_table(
                plan.side,
                rlnAngstromResolution=plan.side / np.maximum(np.arange(len(curve)), 0.1),
                rlnFourierShellCorrelationCorrected=curve,
                rlnSsnrMap=_ratio(model.curves[1 + i]),
                hmDifferenceCorrelation=different,
            )
            for i, (curve, different) in enumerate(
                zip(curves[1:], model.differences.numpy().astype(float), strict=True)
            )
        },
        "model_groups": scale_table(plan.names, plan.micrographs, model.scale.cpu().numpy().astype(float)),
        **noise_tables(noise, box=plan.box, side=plan.side),
    }
    write_star(ctx.folder / "model.star", blocks)


def _ratio(curve: Tensor) -> NDArray[np.float64]:
    """Signal over noise of the mean of two halves that correlate so."""
    fsc = believed(curve).numpy().astype(float)
    return 2 * fsc / np.maximum(1 - fsc, 1e-3)


def _general(plan: Plan, model: Model, best: NDArray[np.float64]) -> dict[str, str | int | float]:
    occupied = members_of(model, best) > 0
    resolutions = np.array(model.resolutions(plan)[1:])
    return {
        "rlnReferenceDimensionality": 3,
        "rlnDataDimensionality": 2,
        "rlnOriginalImageSize": plan.full_box,
        "rlnPixelSize": plan.full_pixel_size,
        "rlnParticleDiameter": plan.diameter,
        "rlnCurrentResolution": float(resolutions[occupied].min()),
        "rlnCurrentIteration": model.iteration,
        "rlnNrClasses": plan.classes,
        "rlnSymmetryGroup": plan.step.symmetry.upper(),
        "rlnSigmaOffsetsAngst": model.deviation_A,
        "rlnAveragePmax": float(best[:, BEST.index("share")].mean()),
        "rlnLogLikelihood": float(best[:, BEST.index("evidence")].sum()),
        "hmVariationAgreement": model.agreement,
    }


def _classes(ctx: Context, plan: Plan, model: Model, best: NDArray[np.float64]) -> pl.DataFrame:
    """Share, resolution and median errors of the poses of each class; 999 where it has no particles."""
    members = members_of(model, best)
    number = best[:, BEST.index("class")].astype(np.intp)

    def medians(name: str) -> list[float]:
        values = best[:, BEST.index(name)]
        return [float(np.median(values[number == i])) if members[i] else _NONE for i in range(len(members))]

    return pl.DataFrame(
        {
            "rlnReferenceImage": [ctx.relative(ctx.folder / map_name(i)) for i in range(len(members))],
            "rlnClassIndex": np.arange(len(members)) + 1,
            "rlnClassDistribution": model.shares.numpy(),
            "rlnAccuracyRotations": medians("pose_error"),
            "rlnAccuracyTranslationsAngst": medians("shift_error"),
            "rlnEstimatedResolution": np.where(members > 0, model.resolutions(plan)[1:], _NONE),
            "hmNrParticles": members,
        }
    )
