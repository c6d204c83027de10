"""The beginning: the reference on the grid and grey scale of the particles, and the noise around them."""

from __future__ import annotations

import torch
from torch import Tensor

from halfmap.search import reference
from halfmap.search.lens_noise import LensNoise, NoiseSums
from halfmap.search.reference import grey_scale, in_box, noise_around, read_mask
from halfmap.steps.refine.model import Model
from halfmap.steps.refine.plan import Plan


def read_reference(plan: Plan) -> Tensor:
    """Read the reference and bring it onto the particles' grid, low-passed.

    Parameters
    ----------
    plan : Plan
        The refinement.

    Returns
    -------
    Tensor (box, box, box)
        On the reference's own grey scale.

    Raises
    ------
    FileFormatError, ShapeError, ParameterError
        If it is no cube, not finite, empty, of no pixel size or far from the particles' size; or if the mask
        is no mask.
    """
    if plan.mask is not None:
        _ = read_mask(plan.mask, plan.side)
    # Nothing is left from the ring of the resolution on.
    finest = plan.side / max(1, plan.ring(plan.step.initial_lowpass) - 1)
    path, box = plan.source.project / plan.step.reference, plan.box
    volume = reference.read_reference(path, box=box, pixel_size=plan.pixel_size, resolution=finest)
    return volume * plan.sphere(box).cpu()


def first_model(plan: Plan, volume: Tensor) -> tuple[Model, Tensor]:
    """Estimate the noise around the particles and the grey scale of the reference.

    Parameters
    ----------
    plan : Plan
        The refinement.
    volume : Tensor (box, box, box)
        From `read_reference`.

    Returns
    -------
    Model
    Tensor (d, d, d)
        The reference on the particles' grey scale, in the box of its resolution.
    """
    disc, seed = plan.whole_disc(), plan.step.seed
    how = {"pixel_size": plan.pixel_size, "diameter": plan.diameter, "seed": seed}
    noise, whole = noise_around(plan.source, plan.groups, disc, **how)
    limit = plan.ring(plan.step.initial_lowpass)
    factor = grey_scale(volume, noise, whole, limit=limit, seed=seed)
    powers = _powers(noise, whole, limit).to(plan.device)
    searched, transfer = torch.zeros(0), torch.zeros(0)
    if plan.searched is not None:
        found = _powers(*noise_around(plan.searched.source, plan.groups, disc, **how), limit)
        # On the grey scale of the raw images, as all the comparisons are.
        searched = (found * plan.searched.factor.square().median()).to(plan.device)
        transfer = torch.ones(2, *searched.shape[2:], device=plan.device)
    radius = min(limit + 2, plan.nyquist)
    first = plan.disc(radius)
    micrographs = int(plan.micrographs.max()) + 1
    model = Model(
        iteration=0,
        stage="everywhere" if plan.given is None else "near",
        radius=radius,
        padding=plan.padding,
        noise=powers,
        searched=searched,
        transfer=transfer,
        scale=torch.ones(2, micrographs, device=plan.device),
        deviation_A=torch.full((2,), plan.shift_range / 2, dtype=torch.float64),
        curves=torch.zeros(4, plan.box // 2 + 1),
        from_shell=plan.box // 2 + 1,
        finest=0,
        stale=0,
        turned=180.0,
        jumped=1.0,
        apart=torch.zeros(2, 3, dtype=torch.float64),
    )
    return model, in_box(volume, first.box) * factor


def _powers(noise: LensNoise, whole: NoiseSums, limit: int) -> Tensor:
    """Noise (2, 2, groups, rings) that both half sets begin with: that around the particles.

    Signal that the reference does not have yet is noise to the comparison.
    """
    everything = whole.fit()
    beyond = torch.arange(noise.detector.shape[1]) >= limit
    around = torch.stack([noise.detector, noise.specimen])
    first = torch.where(beyond, torch.stack([everything.detector, everything.specimen]), around)
    return torch.stack([first, first])
