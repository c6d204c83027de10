"""The maps and tables of a refinement: half maps, filtered map, particles with poses, model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from halfmap.data import ParticleSet, Poses
from halfmap.io.mrc import write_mrc
from halfmap.io.star import write_star
from halfmap.io.tables import read_particles, write_particles
from halfmap.log import log
from halfmap.ops.symmetry import reduce_to_asymmetric_unit
from halfmap.search.folds import SUBSET
from halfmap.search.halfmaps import believed
from halfmap.search.model_tables import noise_tables, scale_table, spectrum_table
from halfmap.steps.refine.expectation import BEST, ROTATION
from halfmap.steps.refine.model import Maps, Model
from halfmap.steps.refine.plan import Plan
from halfmap.steps.refine.solvent import AROUND, reach

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.refine.step import RefineStep

HALF1, HALF2, WHOLE, MAP, MASK = (
    "run_half1_class001_unfil.mrc",
    "run_half2_class001_unfil.mrc",
    "run_class001_unfil.mrc",
    "map.mrc",
    "mask.mrc",
)

SAMPLE = "sample.star"

_COLUMNS = {
    "rlnMaxValueProbDistribution": "share",
    "rlnNrOfSignificantSamples": "significant",
    "rlnLogLikeliContribution": "evidence",
    "hmPoseUncertainty": "pose_error",
    "hmAngleViewError": "view_error",
    "hmAnglePsiError": "psi_error",
    "hmOriginError": "shift_error",
}


def read(step: RefineStep, ctx: Context) -> ParticleSet:
    """Read the particles, those of a sample from a table of their own, which they are listed in."""
    particles = read_particles(ctx.resolve(step.particles))
    if step.sample is None or step.sample >= len(particles):
        return particles
    path = ctx.folder / SAMPLE
    if not path.exists():
        drawn = np.random.default_rng(step.seed).permutation(len(particles))[: step.sample]
        write_particles(path, particles.select(np.isin(np.arange(len(particles)), drawn)))
    return read_particles(path)


def write(
    ctx: Context, plan: Plan, particles: ParticleSet, model: Model, result: tuple[Maps, dict[str, NDArray]]
) -> None:
    """Write maps, model and particles.

    Parameters
    ----------
    ctx, plan
        Job and refinement.
    particles : ParticleSet
        As they were given.
    model : Model
        Of the last iteration.
    result : Maps and dict of arrays
        Half maps and poses that it found.
    """
    maps, poses = result
    volumes = *maps.halves, maps.whole, maps.filtered, maps.mask
    for name, volume in zip((HALF1, HALF2, WHOLE, MAP, MASK), volumes, strict=True):
        write_mrc(ctx.folder / name, volume.numpy().astype(np.float32), pixel_size=plan.pixel_size)
    best = poses["best"]
    rotations = torch.from_numpy(best[:, ROTATION].reshape(-1, 3, 3))
    rotations = reduce_to_asymmetric_unit(rotations, plan.step.symmetry)
    shifts = torch.from_numpy(best[:, BEST.index("x") : BEST.index("y") + 1])
    values = {name: best[:, BEST.index(column)] for name, column in _COLUMNS.items()}
    values["rlnNrOfSignificantSamples"] = values["rlnNrOfSignificantSamples"].astype(np.int64)
    written = particles.with_poses(Poses(rotations, shifts)).with_columns(
        pl.Series(SUBSET, plan.halves + 1), *(pl.Series(name, column) for name, column in values.items())
    )
    write_particles(ctx.folder / "particles.star", written)
    _write_model(ctx, plan, model, best, _reach(plan, model, maps))


def _reach(plan: Plan, model: Model, maps: Maps) -> float | None:
    """Diameter of the map in Å, and a warning where the sphere cuts it."""
    diameter = reach(plan, maps.whole, model.resolution(plan))
    is_trial = plan.step.sample is not None
    if diameter is not None and diameter > plan.diameter and plan.mask is None and not is_trial:
        message = "the map is %.0f Å wide, and the sphere of %.0f Å cuts it: --diameter %.0f would hold it"
        log.warning(message, diameter, plan.diameter, AROUND * diameter)
    return diameter


def _write_model(ctx: Context, plan: Plan, model: Model, best: NDArray, found: float | None) -> None:
    # That of an image of the mean squared CTF, one half.
    noise = (model.noise[:, 0] + model.noise[:, 1] / 2).cpu().mean(0).numpy().astype(float)
    scale = model.scale.cpu().mean(0).numpy().astype(float)
    blocks = {
        "model_general": _general(plan, model, best) | ({} if found is None else {"hmMapDiameter": found}),
        "model_classes": _classes(ctx, plan, model, best),
        "model_class_1": _curves(plan, model),
        "model_groups": scale_table(plan.names, plan.micrographs, scale),
        **noise_tables(noise, box=plan.box, side=plan.side),
    }
    write_star(ctx.folder / "model.star", blocks)


def _general(plan: Plan, model: Model, best: NDArray) -> dict[str, str | int | float]:
    return {
        "rlnReferenceDimensionality": 3,
        "rlnDataDimensionality": 2,
        "rlnOriginalImageSize": plan.box,
        "rlnPixelSize": plan.pixel_size,
        "rlnParticleDiameter": plan.diameter,
        "rlnCurrentResolution": model.resolution(plan),
        "rlnCurrentIteration": model.iteration,
        "rlnNrClasses": 1,
        "rlnSymmetryGroup": plan.step.symmetry.upper(),
        "rlnSigmaOffsetsAngst": float(model.deviation_A.mean()),
        "rlnAveragePmax": float(best[:, BEST.index("share")].mean()),
        "rlnLogLikelihood": float(best[:, BEST.index("evidence")].sum()),
    }


def _classes(ctx: Context, plan: Plan, model: Model, best: NDArray) -> pl.DataFrame:
    """The one map, with its files, resolution and median errors of the poses."""
    return pl.DataFrame(
        {
            "rlnReferenceImage": [ctx.relative(ctx.folder / MAP)],
            "rlnUnfilteredMapHalf1": [ctx.relative(ctx.folder / HALF1)],
            "rlnUnfilteredMapHalf2": [ctx.relative(ctx.folder / HALF2)],
            "rlnMaskName": [ctx.relative(ctx.folder / MASK)],
            "rlnClassDistribution": [1.0],
            "rlnAccuracyRotations": [float(np.median(best[:, BEST.index("pose_error")]))],
            "rlnAccuracyTranslationsAngst": [float(np.median(best[:, BEST.index("shift_error")]))],
            "rlnEstimatedResolution": [model.resolution(plan)],
        }
    )


def _curves(plan: Plan, model: Model) -> pl.DataFrame:
    """Correlations of the half maps, and the signal-to-noise ratio that is believed of their mean."""
    unmasked, masked, randomised, corrected = model.curves.numpy().astype(float)
    shells = np.arange(len(corrected))
    fsc = believed(model.curves[3]).numpy().astype(float)
    return spectrum_table(
        plan.side,
        rlnAngstromResolution=plan.side / np.maximum(shells, 0.1),
        rlnGoldStandardFsc=corrected,
        rlnFourierShellCorrelationCorrected=corrected,
        rlnFourierShellCorrelationUnmaskedMaps=unmasked,
        rlnFourierShellCorrelationMaskedMaps=masked,
        rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps=randomised,
        hmViewEvenness=model.evenness.numpy().astype(float),
        rlnSsnrMap=2 * fsc / np.maximum(1 - fsc, 1e-3),
    )
