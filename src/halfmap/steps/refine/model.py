"""The model of a refinement: the maps of both half sets, noise, scales; and its estimation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.errors import FileFormatError
from halfmap.io.atomic import atomic_path
from halfmap.ops.fsc import CorrectedFSC, corrected_fsc, resolution
from halfmap.search.backprojector import Backprojection
from halfmap.search.halfmaps import HalfSums, believed, joined, radius_at, without
from halfmap.search.lens_noise import NoiseSums
from halfmap.search.regularise import Halves
from halfmap.steps.refine.expectation import BEST
from halfmap.steps.refine.plan import Plan
from halfmap.steps.refine.solvent import solvent_mask

Loaded = Callable[[], Backprojection]
Stage = Literal["everywhere", "near", "last", "done"]

THRESHOLD = 0.143
_JOIN_A = 40.0
_MORE = 2
"""Rings that are compared over those that have signal."""

_SCALES = 0.2
"""Standard deviation of scales that is expected; none is believed to be off by more than three."""

_STALE = 2
"""Iterations without improvement after which there will be none."""

_SETTLED = 0.1
"""Change of the poses over their errors that is none."""

_JUMPING = 0.03
"""Share of the poses that turn beyond their errors while it pays to search everywhere."""


@dataclass(frozen=True, eq=False)
class Model:
    """What is estimated.

    Attributes
    ----------
    iteration : int
        Number of the iteration that gave it; 0 to begin with.
    stage : str
        What the next iteration does: search everywhere, near the last poses, or once more with all
        frequencies; or that there is none.
    radius : int
        Rings that it compares.
    references : Tensor (2, parts, d, d, d)
        Maps of both half sets, filtered and masked, in the box of their resolution. Each part of a half set
        has one that its own particles had no share in: they would fit their own noise in it.
    noise : Tensor (2, 2, groups, rings)
        Power of the noise of each half set and optics group, on all rings: that of the detector and that of
        the specimen; see `lens_noise`.
    scale : Tensor (2, micrographs)
        Strength of the particles' signal in each micrograph; 1 in the mean over particles.
    deviation_A : Tensor (2,)
        Standard deviation of the particles' shifts along an axis.
    curves : Tensor (4, shells)
        FSC of the half maps: unmasked, masked, with random phases, corrected.
    from_shell : int
        First shell with random phases.
    finest : int
        Largest ring at which the corrected curve has ever been above its threshold.
    stale : int
        Iterations since then.
    turned : float
        Median change of the poses in degrees.
    jumped : float
        Share of the poses that changed beyond three of their standard deviations, then or now.
    """

    iteration: int
    stage: Stage
    radius: int
    references: Tensor
    noise: Tensor
    scale: Tensor
    deviation_A: Tensor
    curves: Tensor
    from_shell: int
    finest: int
    stale: int
    turned: float
    jumped: float

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.stage == "done"

    def resolution(self, plan: Plan) -> float:
        """Resolution in Å of the half maps within their mask, corrected for it; none is the box's side."""
        found = resolution(self.curves[3], pixel_size=plan.pixel_size, box=plan.box, threshold=THRESHOLD)
        return min(found, plan.side)

    def save(self, path: Path) -> None:
        """Write all of it as one file."""
        arrays = {
            name: value.cpu().numpy() if isinstance(value, Tensor) else np.array(value)
            for name, value in vars(self).items()
        }
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path, device: str) -> Model:
        """Read what `save` wrote.

        Raises
        ------
        FileFormatError
            If another version wrote it.
        """
        with np.load(path) as file:
            values: dict[str, Any] = {
                name: file[name].item() if file[name].ndim == 0 else torch.from_numpy(file[name]).to(device)
                for name in file.files
            }
        if values.keys() != cls.__dataclass_fields__.keys():
            raise FileFormatError(
                "is of another version of Halfmap, which this one cannot go on from",
                path=path,
                hint="start the refinement anew",
            )
        return cls(**values)


@dataclass(frozen=True, eq=False)
class Maps:
    """Half maps, unfiltered (2, d, d, d), and the mask (d, d, d) that they were compared in."""

    unfiltered: Tensor
    mask: Tensor


def maximise(
    plan: Plan,
    model: Model,
    halves: Halves,
    parts: tuple[Sequence[Loaded], Sequence[Loaded]],
    noise: tuple[NoiseSums, NoiseSums],
    best: NDArray[np.float64],
) -> tuple[Model, Maps]:
    """Estimate the model anew from what the images of both half sets add up to.

    Parameters
    ----------
    plan, model
        The refinement, and the model that the sums were made with.
    halves : pair of Backprojection
        Of the images of each half set.
    parts : pair of sequence of callable
        Give what each part of a half set has of these.
    noise : pair of NoiseSums
        Of what the maps leave unexplained.
    best : array (n, columns)
        What was found for each particle, in the order of the table; see `expectation.BEST`.

    Returns
    -------
    Model
    Maps
    """
    sums = HalfSums.of(halves)
    first, second = sums.unfiltered()
    mask = solvent_mask(plan, first + second, model.resolution(plan))
    generator = torch.Generator(device=first.device).manual_seed(plan.step.seed + model.iteration)
    compared = corrected_fsc(first, second, mask=mask, generator=generator)
    curves = _padded(compared, plan.box // 2 + 1)
    prior = sums.prior(believed(curves[3]))
    if model.stage == "last":
        references = torch.stack([half.solve(prior) * mask for half in halves])[:, None]
    else:
        references = _references(plan, sums, prior, (first * mask, second * mask), mask, parts)
    new = replace(
        model,
        iteration=model.iteration + 1,
        references=references,
        noise=_noise(model, noise),
        scale=torch.stack([_scale(plan, model, half, best) for half in (0, 1)]),
        deviation_A=_deviation(plan, best),
        curves=curves,
        from_shell=compared.from_shell,
        **_changes(plan, best),
    )
    error = float(np.median(best[:, BEST.index("pose_error")]))
    return _scheduled(plan, model, new, box=halves[0].sums.box, error=error), Maps(
        torch.stack([first, second]), mask
    )


def _references(
    plan: Plan,
    sums: HalfSums,
    prior: Tensor,
    masked: tuple[Tensor, Tensor],
    mask: Tensor,
    parts: tuple[Sequence[Loaded], Sequence[Loaded]],
) -> Tensor:
    """Filtered maps (2, parts, d, d, d), each of a half set without one of its parts."""
    radius = plan.side / _JOIN_A
    references = torch.stack([mask.new_empty(len(own), *mask.shape) for own in parts])
    for half, own in enumerate(parts):
        for i, part in enumerate(own):
            left = without(sums.halves[half], part()).solve(prior) * mask
            references[half, i] = joined(left, masked[1 - half], radius=radius)
    return references


def _scheduled(plan: Plan, model: Model, new: Model, *, box: int, error: float) -> Model:
    """The same with what the next iteration does; the median error of poses is in degrees."""
    ring = radius_at(new.curves[3], THRESHOLD)
    better = ring > model.finest
    stale = 0 if better else model.stale + 1
    settled = new.turned < _SETTLED * error or new.turned > model.turned
    stage: Stage = model.stage
    if model.stage == "last":
        stage = "done"
    elif new.iteration + 1 >= plan.step.most_iterations:
        stage = "last"
    elif model.stage == "everywhere" and (new.jumped < _JUMPING or (stale and settled)):
        stage, stale = "near", 0
    elif stale >= _STALE and settled:
        stage = "last"
    least = plan.ring(plan.step.initial_lowpass)
    radius = min(max(ring, least) + _MORE, plan.nyquist, box // 2 - 1)
    return replace(new, stage=stage, radius=radius, finest=max(ring, model.finest), stale=stale)


def _padded(curves: CorrectedFSC, shells: int) -> Tensor:
    """Curves (4, shells), zero where they were not measured."""
    found = torch.stack([curves.unmasked, curves.masked, curves.randomised, curves.corrected]).cpu().float()
    padded = found.new_zeros(4, shells)
    n = min(shells, found.shape[1])
    padded[:, :n] = found[:, :n].nan_to_num(nan=0.0)
    return padded


def _noise(model: Model, sums: tuple[NoiseSums, NoiseSums]) -> Tensor:
    """Power of what maps do not explain, where it was seen."""
    noise = model.noise.clone()
    for half, each in enumerate(sums):
        found = each.fit()
        rings = found.detector.shape[1]
        noise[half, :, :, :rings] = torch.stack([found.detector, found.specimen]).to(noise)
    return noise


def _scale(plan: Plan, model: Model, half: int, best: NDArray[np.float64]) -> Tensor:
    """Scale of each micrograph that its particles match the map best with, under a normal prior."""
    own = plan.halves == half
    micrograph = plan.micrographs[own]
    n = model.scale.shape[1]
    match, norm = (np.bincount(micrograph, best[own, BEST.index(name)], n) for name in ("match", "norm"))
    prior = 1 / _SCALES**2
    scale = np.clip((match + prior) / (norm + prior), 1 - 3 * _SCALES, 1 + 3 * _SCALES)
    return torch.from_numpy(scale / scale[micrograph].mean()).to(model.scale)


def _deviation(plan: Plan, best: NDArray[np.float64]) -> Tensor:
    """Standard deviation of shifts of each half set, wide enough never to decide."""
    shifts = best[:, BEST.index("x") : BEST.index("y") + 1]
    found = [float(np.sqrt((shifts[plan.halves == half] ** 2).mean())) for half in (0, 1)]
    return torch.tensor(np.clip(found, plan.pixel_size, plan.shift_range))


def _changes(plan: Plan, best: NDArray[np.float64]) -> dict[str, float]:
    turned, now, before = (best[:, BEST.index(name)] for name in ("turned", "pose_error", "error_before"))
    return {
        "turned": float(np.median(turned)),
        "jumped": float((turned > 3 * np.maximum(now, before)).mean()),
    }
