"""The beginning: references on the particles' grid and grey scale, the noise, and poses that are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from halfmap.data import ParticleSet
from halfmap.data.views import numbers
from halfmap.errors import ParameterError, TableError
from halfmap.search import reference
from halfmap.search.checkpoint import FOLDER, save_arrays
from halfmap.search.reference import grey_scale, noise_around
from halfmap.steps.class3d.model import _MORE, FREE, Model
from halfmap.steps.class3d.plan import Plan

if TYPE_CHECKING:
    from halfmap.engine import Context

GIVEN = "given_poses.npz"
"""File of the poses of the table."""

_VIEW, _PSI, _ALL, _ORIGIN = "hmAngleViewError", "hmAnglePsiError", "hmPoseUncertainty", "hmOriginError"
_SEEN = 0.5
"""Value of a mask in the region that it is of."""

_LEAST_DEG, _LEAST_A = 0.1, 0.1
"""Errors of a pose below which none is believed to be."""


def read_references(plan: Plan) -> Tensor:
    """Read the references and bring them onto the particles' grid, low-passed.

    Parameters
    ----------
    plan : Plan
        The classification.

    Returns
    -------
    Tensor (references, box, box, box)
        On the references' own grey scale.

    Raises
    ------
    FileFormatError, ShapeError, ParameterError
        If one is no cube, not finite, empty, of no pixel size or far from the particles' size; or if a mask
        is no mask.
    """
    solvent = plan.solvent().cpu()
    if float(plan.compared_part().max()) < _SEEN:
        raise ParameterError(
            f"{plan.focus or plan.mask}: the mask lies outside of the particle",
            hint="is it in the particles' box, and --diameter large enough?",
        )
    finest = plan.side / max(1, plan.first_ring - 1)
    how = {"box": plan.box, "pixel_size": plan.pixel_size, "resolution": finest}
    paths = [plan.source.project / each for each in plan.step.reference]
    return torch.stack([reference.read_reference(path, **how) * solvent for path in paths])


def first_model(plan: Plan, references: Tensor) -> Model:
    """Estimate the noise around the particles and the grey scale of the references.

    Parameters
    ----------
    plan : Plan
        The classification.
    references : Tensor (references, box, box, box)
        From `read_references`.

    Returns
    -------
    Model
    """
    disc, seed, limit = plan.disc, plan.step.seed, plan.first_ring
    how = {"pixel_size": plan.pixel_size, "diameter": plan.diameter, "seed": seed}
    noise, whole = noise_around(plan.source, plan.groups, disc, **how)
    scaled = torch.stack(
        [each * grey_scale(each, noise, whole, limit=limit, seed=seed) for each in references]
    )
    mean = scaled.mean(0)
    scaled = mean + (scaled - mean) * plan.compared_part().to(scaled)
    # Signal that the references do not have yet is noise to the comparison.
    everything = whole.fit()
    beyond = torch.arange(disc.radius + 1) >= limit
    powers = [
        torch.where(beyond, whole_part, around)
        for whole_part, around in (
            (everything.detector, noise.detector),
            (everything.specimen, noise.specimen),
        )
    ]
    k = len(references)
    return Model(
        iteration=0,
        stage="everywhere" if plan.step.alignment else "given",
        radius=min(limit + _MORE, plan.finest),
        references=scaled.to(plan.device).expand(plan.n_folds, -1, -1, -1, -1).clone(),
        noise=torch.stack(powers).to(plan.device),
        scale=torch.ones(int(plan.micrographs.max()) + 1, device=plan.device),
        contrast=torch.ones(len(plan.groups), device=plan.device),
        shares=torch.full((k,), 1 / k, dtype=torch.float64),
        deviation_A=plan.shift_range / 2,
        forced=torch.full((len(plan.groups),), FREE),
        curves=torch.zeros(1 + plan.classes, plan.box // 2 + 1),
        differences=torch.zeros(plan.classes, plan.box // 2 + 1),
        differing=limit + _MORE,
        finest=0,
        stale=0,
        changed=1.0,
        agreement=0.0,
    )


def keep_poses(ctx: Context, plan: Plan, particles: ParticleSet) -> None:
    """Write the poses of the table, and how sure they are, for the processes that compare.

    Raises
    ------
    TableError
        If poses are wanted and there are none.
    """
    if plan.step.alignment:
        return
    poses = particles.poses
    if float(poses.rotations[:, 2].std(0).max()) < 1e-3:
        raise TableError(
            "all particles are seen from one direction",
            path=particles.path,
            hint="give particles from halfmap refine or abinitio, or leave out --no-alignment",
        )
    (ctx.folder / FOLDER).mkdir(exist_ok=True)
    save_arrays(
        ctx.folder / FOLDER / GIVEN,
        rotations=poses.rotations.double().numpy(),
        shifts_A=poses.shifts_A.double().numpy(),
        precision=_precision(particles, plan.pixel_size),
    )


def _precision(particles: ParticleSet, pixel_size: float) -> np.ndarray:
    """Diagonals (n, 5) of the inverse covariances of the table's poses, or (n, 0) where it has none."""
    columns = set(particles.rows.columns)

    def errors(label: str, least: float) -> np.ndarray:
        return np.maximum(numbers(particles, label), least)

    if _ORIGIN not in columns:
        return np.empty((len(particles), 0))
    if {_VIEW, _PSI} <= columns:
        view, psi = errors(_VIEW, _LEAST_DEG), errors(_PSI, _LEAST_DEG)
    elif _ALL in columns:
        view = psi = errors(_ALL, _LEAST_DEG) / 3**0.5
    else:
        return np.empty((len(particles), 0))
    shift = errors(_ORIGIN, _LEAST_A) / pixel_size
    deviations = np.stack([*np.radians([view, view, psi]), shift, shift], axis=1)
    return deviations**-2.0
