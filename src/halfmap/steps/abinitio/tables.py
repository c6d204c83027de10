"""The maps and tables of a job: class maps, particles with poses and classes, model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from torch import Tensor

from halfmap.data import ParticleSet, Poses
from halfmap.io.mrc import write_mrc
from halfmap.io.star import write_star
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.fourier import resample
from halfmap.ops.symmetry import reduce_to_asymmetric_unit
from halfmap.search.folds import SUBSET
from halfmap.steps.abinitio.assign import BEST, ROTATION, Result
from halfmap.steps.abinitio.consensus import Agreement
from halfmap.steps.abinitio.plan import Plan

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.abinitio.step import AbInitioStep

_COLUMNS = {
    "rlnMaxValueProbDistribution": "share",
    "hmClassProbability": "class_probability",
    "rlnLogLikeliContribution": "evidence",
    "hmPoseUncertainty": "pose_error",
    "hmOriginError": "shift_error",
}

_NONE = 999.0
"""RELION's resolution of a map that has none."""


def read(step: AbInitioStep, ctx: Context) -> ParticleSet:
    """Read the particles."""
    return read_particles(ctx.resolve(step.particles))


def write(ctx: Context, plan: Plan, particles: ParticleSet, agreed: Agreement, result: Result) -> None:
    """Write maps, model and particles.

    Parameters
    ----------
    ctx, plan
        Job and sizes.
    particles : ParticleSet
        As they were given.
    agreed : Agreement
        Of the runs.
    result : Result
        Final maps and poses.
    """
    for number, volume in enumerate(result.maps):
        array = enlarged(plan, volume).numpy().astype(np.float32)
        write_mrc(ctx.folder / map_name(number), array, pixel_size=plan.full_pixel_size)
    _write_model(ctx, plan, agreed, result)
    best = result.best
    rotations = torch.from_numpy(best[:, ROTATION].reshape(-1, 3, 3))
    poses = Poses(
        reduce_to_asymmetric_unit(rotations, plan.step.symmetry),
        torch.from_numpy(best[:, [BEST.index("x"), BEST.index("y")]]),
    )
    written = particles.with_poses(poses).with_columns(
        pl.Series("rlnClassNumber", best[:, BEST.index("class")].astype(np.int64) + 1),
        *(pl.Series(label, best[:, BEST.index(name)]) for label, name in _COLUMNS.items()),
    )
    # Half sets have met in these maps: kept, they would seem not to have.
    write_particles(ctx.folder / "particles.star", written.with_rows(written.rows.drop(SUBSET, strict=False)))


def map_name(number: int) -> str:
    """Name of the file of a map, from 0."""
    return f"class{number + 1:03d}.mrc"


def enlarged(plan: Plan, volume: Tensor) -> Tensor:
    """A map on the grid of the particles, its projections on their grey scale."""
    # There are more voxels along a projection.
    return resample(volume, new_shape=(plan.full_box,) * 3) * (plan.box / plan.full_box)


def _write_model(ctx: Context, plan: Plan, agreed: Agreement, result: Result) -> None:
    best, members = result.best, result.members
    resolutions = np.where(np.isfinite(agreed.classes), agreed.classes, _NONE)
    number = best[:, BEST.index("class")].astype(np.intp)

    def medians(name: str) -> list[float]:
        values = best[:, BEST.index(name)]
        return [float(np.median(values[number == i])) if members[i] else _NONE for i in range(len(members))]

    general = {
        "rlnReferenceDimensionality": 3,
        "rlnDataDimensionality": 2,
        "rlnOriginalImageSize": plan.full_box,
        "rlnPixelSize": plan.full_pixel_size,
        "rlnParticleDiameter": plan.diameter,
        "rlnCurrentIteration": len(plan.iterations),
        "rlnNrClasses": plan.step.classes,
        "rlnSymmetryGroup": plan.step.symmetry.upper(),
        "rlnAveragePmax": float(best[:, BEST.index("share")].mean()),
        "rlnLogLikelihood": float(best[:, BEST.index("evidence")].sum()),
    }
    classes = pl.DataFrame(
        {
            "rlnReferenceImage": [ctx.relative(ctx.folder / map_name(i)) for i in range(len(members))],
            "rlnClassIndex": np.arange(len(members)) + 1,
            "rlnClassDistribution": members / members.sum(),
            "rlnAccuracyRotations": medians("pose_error"),
            "rlnAccuracyTranslationsAngst": medians("shift_error"),
            "hmRunAgreement": resolutions,
            "hmNrParticles": members,
        }
    )
    pairs = agreed.resolutions
    runs = pl.DataFrame(
        {
            "hmRun": np.arange(len(pairs)) + 1,
            "hmRunKept": np.isin(np.arange(len(pairs)), agreed.kept).astype(np.int64),
            "hmRunAgreement": [_agreement(pairs, run) for run in range(len(pairs))],
            "hmRunOverChance": [float(line.max(initial=0.0)) for line in agreed.over_chance],
            "hmRunEvidence": agreed.evidence,
        }
    )
    shells = np.arange(agreed.curves.shape[1])
    curves = {
        f"model_class_{i + 1}": pl.DataFrame(
            {
                "rlnSpectralIndex": shells,
                "rlnResolution": shells / plan.side,
                "rlnAngstromResolution": plan.side / np.maximum(shells, 0.1),
                "hmRunCorrelation": curve,
            }
        )
        for i, curve in enumerate(agreed.curves.numpy().astype(float))
    }
    blocks = {"model_general": general, "model_classes": classes, "model_runs": runs, **curves}
    write_star(ctx.folder / "model.star", blocks)


def _agreement(pairs: np.ndarray, run: int) -> float:
    """Resolution to which a run agrees best with another."""
    others = np.delete(pairs[run], run)
    return float(others.min()) if len(others) and np.isfinite(others).any() else _NONE
