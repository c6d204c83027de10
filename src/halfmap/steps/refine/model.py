"""The model of a refinement: the maps of both half sets, noise, scales; and its estimation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.log import log
from halfmap.ops.fsc import CorrectedFSC, corrected_fsc, resolution
from halfmap.search.checkpoint import Checkpoint
from halfmap.search.frames import Motion, motion_between
from halfmap.search.halfmaps import HalfSums, believed, joined, radius_at, solved
from halfmap.search.lens_noise import NoiseSums
from halfmap.search.pose_information import nothing_but_signal, pose_information
from halfmap.search.regularise import Evidence, Regulariser
from halfmap.search.shared_map import added
from halfmap.search.stored_sums import StoredSums
from halfmap.steps.refine.expectation import BEST
from halfmap.steps.refine.plan import PARTS, Plan
from halfmap.steps.refine.searched import FAINT, SearchedSums
from halfmap.steps.refine.solvent import solvent_mask

Keep = Callable[[int, int, Tensor], None]
Stage = Literal["everywhere", "near", "last", "done"]

THRESHOLD = 0.143
_JOIN_A = 40.0
"""What is coarser, half sets share."""

_LEAKED = 5.0
"""Power of masked images over that of whole ones on a ring that holds nothing of its own."""

_STRONG = 2.0
"""Amplitude of denoised images over that of raw ones, at the most."""

_ALIKE = 0.1
"""Standard deviation of their differences from ring to ring that is expected."""

_MORE = 2
"""Rings that are compared over those that have signal."""

_SCALES = 0.2
"""Standard deviation of scales that is expected; none is believed to be off by more than three."""

_STALE = 2
"""Iterations without improvement after which there will be none."""

_STILL, _SETTLED = 0.1, 0.5
"""Change of the poses over their errors at which they keep their basins, and that does the map no harm."""

_RESTING = 0.2
"""The same at which one iteration without improvement is enough: the next begins where this one did."""

_SURE_DEG = 58.6 / 2**4
"""Median error of poses, a step of HEALPix order 4, below which maps are filtered as near the end."""

_JUMPING = 0.03
"""Share of the poses that turn beyond their errors while it pays to search everywhere."""


@dataclass(frozen=True, eq=False)
class Model(Checkpoint):
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
    padding : float
        Of transforms, over the box.
    noise : Tensor (2, 2, groups, rings)
        Power of the noise of each half set and optics group, on all rings: that of the detector and that of
        the specimen; see `lens_noise`.
    searched : Tensor (2, 2, groups, rings)
        The same of the images that poses are searched in, if those are others; empty without.
    transfer : Tensor (2, groups, rings)
        Amplitude of their signal over that of the raw images, for each half set; empty without.
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
    apart : Tensor (2, 3), float64
        Turn in degrees and move in Å of the half maps against each other.
    information : Tensor (2, 6, 6), float64
        What maps say of turns and moves, with their noise and without; see `pose_information`.
    evenness : Tensor (shells,)
        What directions that were hardly seen leave of the correlation of unfiltered maps with what is there,
        squared; see `HalfSums`.
    sure : bool
        Whether poses were once sure enough that maps are filtered as near the end.
    limited : bool
        Whether it ends for want of iterations.
    """

    on_device = "noise", "scale", "searched", "transfer"
    iteration: int
    stage: Stage
    radius: int
    padding: float
    noise: Tensor
    scale: Tensor
    deviation_A: Tensor
    curves: Tensor
    from_shell: int
    finest: int
    stale: int
    turned: float
    jumped: float
    apart: Tensor
    information: Tensor = field(default_factory=nothing_but_signal)
    evenness: Tensor = field(default_factory=lambda: torch.ones(1))
    searched: Tensor = field(default_factory=lambda: torch.zeros(0))
    transfer: Tensor = field(default_factory=lambda: torch.zeros(0))
    sure: bool = False
    limited: bool = False

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.stage == "done"

    def motion(self, pixel_size: float) -> Motion:
        """Of the half maps against each other, in pixels of some size."""
        return Motion(self.apart[0], self.apart[1] / pixel_size)

    def resolution(self, plan: Plan) -> float:
        """Resolution in Å of the half maps within their mask, corrected for it; none is the box's side."""
        found = resolution(self.curves[3], pixel_size=plan.pixel_size, box=plan.box, threshold=THRESHOLD)
        return min(found, plan.side)


@dataclass(frozen=True, eq=False)
class Maps:
    """What comes of a refinement.

    Attributes
    ----------
    halves : Tensor (2, d, d, d)
        Half maps, unfiltered.
    mask : Tensor (d, d, d)
        That they were compared in.
    whole, filtered : Tensor (d, d, d)
        Of all particles: unfiltered, and with the least error within the mask that the correlation of the
        half maps allows.
    """

    halves: Tensor
    mask: Tensor
    whole: Tensor
    filtered: Tensor


def maximise(
    plan: Plan,
    model: Model,
    parts: tuple[Sequence[StoredSums], Sequence[StoredSums]],
    noise: tuple[NoiseSums, NoiseSums],
    best: NDArray[np.float64],
    keep: Keep,
    searched: tuple[SearchedSums, SearchedSums] | None = None,
) -> tuple[Model, Maps | None]:
    """Estimate the model anew from what the images of both half sets add up to.

    Parameters
    ----------
    plan, model
        The refinement, and the model that the sums were made with.
    parts : pair of sequence of StoredSums
        Of the images of each part of both half sets.
    noise : pair of NoiseSums
        Of what the maps leave unexplained.
    best : array (n, columns)
        What was found for each particle, in the order of the table; see `expectation.BEST`.
    keep : callable
        Takes the maps that the next iteration compares with: half set, part, filtered and masked map in the
        box of its resolution. Each part of a half set has one that its own particles had no share in: they
        would fit their own noise in it.
    searched : pair of SearchedSums, optional
        Of the images that poses are searched in, where those are others.

    Returns
    -------
    Model
    Maps or None
        If there is nothing left to do.
    """
    sums = HalfSums.of((added(parts[0]), added(parts[1])))
    first, second = sums.unfiltered()
    mask = solvent_mask(plan, first + second, model.resolution(plan))
    generator = torch.Generator(device=first.device).manual_seed(plan.step.seed + model.iteration)
    compared = corrected_fsc(first, second, mask=mask, generator=generator)
    curves = _padded(compared, plan.box // 2 + 1)
    curves[3, _empty_from(plan, noise) :] = 0
    agreed = believed(curves[3])
    prior = sums.prior(agreed)
    masked = first * mask, second * mask
    powers = _noise(model.noise, noise)
    model = model if searched is None else _with_searched(model, searched)
    new = replace(
        model,
        iteration=model.iteration + 1,
        noise=powers,
        scale=torch.stack([_scale(plan, model, half, best) for half in (0, 1)]),
        deviation_A=_deviation(plan, best),
        curves=curves,
        from_shell=compared.from_shell,
        apart=_apart(plan, *masked, curves[3]),
        evenness=_to_shells(sums.evenness.mean(0).cpu().float(), curves.shape[1]),
        information=pose_information(
            *masked,
            correlation=curves[1] * (agreed > 0),
            noise=_compared_noise(powers if searched is None else model.searched, model.transfer),
            share=1 - 1 / PARTS,
        ),
        **_changes(plan, best),
    )
    del masked
    error = float(np.median(best[:, BEST.index("pose_error")]))
    new = _scheduled(plan, model, new, box=len(mask), error=error)
    if new.done:
        return new, Maps(torch.stack([first, second]), mask, *_of_all(sums, prior, mask))
    evidence = Evidence(
        (first, second),
        mask,
        agreed,
        prior,
        sums.least * (1 - 1 / PARTS),
        plan.side / len(mask),
        plan.box,
        new.iteration,
        new.stage,
    )
    if new.sure and not model.sure and plan.step.regulariser != plan.step.regulariser_everywhere:
        log.info("poses are nearly sure: from here on maps are filtered by %s", plan.step.regulariser)
    _references(plan, plan.regularisers[int(new.sure)], evidence, parts, keep)
    return new, None


def _apart(plan: Plan, first: Tensor, second: Tensor, correlation: Tensor) -> Tensor:
    """Turn and move (2, 3) of masked half maps against each other; none where given poses say how they are.

    Nothing but what is coarse keeps half sets in one frame, and what half maps agree in, and the map of both,
    lose detail by half a degree between them.
    """
    if plan.given is not None:
        return torch.zeros(2, 3, dtype=torch.float64)
    found = motion_between(first, second, believed(correlation), plan.step.symmetry)
    return torch.stack([found.turn_deg, found.move_px * (plan.side / len(first))])


def _of_all(sums: HalfSums[StoredSums], prior: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (d, d, d) of both half sets together: unfiltered, and filtered within the mask.

    The sums have twice the weight and half the noise, so that the same prior gives Wiener's filter of what
    the mean of two maps that correlate by f has of the signal, 2 f / (1 + f).
    """
    first, second = sums.halves
    both = first + second
    return solved(both, least=sums.least.sum(0)), solved(both, prior.mean(0)) * mask


def _references(
    plan: Plan,
    made_by: Regulariser,
    evidence: Evidence,
    parts: tuple[Sequence[StoredSums], Sequence[StoredSums]],
    keep: Keep,
) -> None:
    """Make filtered maps (d, d, d), each of a half set without one of its parts."""
    radius = plan.side / _JOIN_A
    filtered = made_by(evidence)
    for number in range(len(parts[0])):
        one, other = (added([each for i, each in enumerate(own) if i != number]) for own in parts)
        first, second = (each * evidence.mask for each in filtered((one, other), f"without_part{number + 1}"))
        keep(0, number, joined(first, second, radius=radius))
        keep(1, number, joined(second, first, radius=radius))


def _scheduled(plan: Plan, model: Model, new: Model, *, box: int, error: float) -> Model:
    """The same with what the next iteration does; the median error of poses is in degrees."""
    ring = radius_at(new.curves[3], THRESHOLD)
    better = ring > model.finest
    stale = 0 if better else model.stale + 1
    still, settled = (new.turned > model.turned or new.turned < part * error for part in (_STILL, _SETTLED))
    resting = model.radius >= plan.nyquist or new.turned < _RESTING * error
    exhausted = stale >= _STALE or (stale > 0 and resting)
    nearer = model.stage == "everywhere" and (new.jumped < _JUMPING or bool(stale and still))
    ends = exhausted and settled and not nearer
    stage, limited = model.stage, model.limited
    if model.stage == "last":
        stage = "done"
    elif new.iteration + 1 >= plan.step.most_iterations:
        stage, limited = "last", not ends
    elif nearer:
        stage, stale = "near", 0
    elif ends:
        stage = "last"
    if stage == "last" and plan.disc(model.radius).radius == plan.nyquist:
        stage = "done"  # All frequencies have been put back already.
    least = plan.ring(plan.step.initial_lowpass)
    radius = min(max(ring, least) + _MORE, plan.nyquist, box // 2 - 1)
    finest = max(ring, model.finest)
    # Once and for all: filters that take turns would take back what each has found.
    sure = model.sure or (stage != "everywhere" and error <= _SURE_DEG)
    return replace(new, stage=stage, sure=sure, limited=limited, radius=radius, finest=finest, stale=stale)


def _to_shells(values: Tensor, shells: int) -> Tensor:
    """Values of the first shells, and the last one for all others."""
    return torch.cat([values[:shells], values[-1:].expand(max(0, shells - len(values)))])


def _padded(curves: CorrectedFSC, shells: int) -> Tensor:
    """Curves (4, shells), zero where they were not measured."""
    found = torch.stack([curves.unmasked, curves.masked, curves.randomised, curves.corrected]).cpu().float()
    padded = found.new_zeros(4, shells)
    n = min(shells, found.shape[1])
    padded[:, :n] = found[:, :n].nan_to_num(nan=0.0)
    return padded


def _empty_from(plan: Plan, sums: tuple[NoiseSums, NoiseSums]) -> int:
    """First shell of which images hold hardly more than what leaks there when they are masked.

    Images that were low-passed have nothing beyond, but the mask of the particle smears what half maps agree
    in before: it correlates, and random phases do not take it away where a spectrum falls so steeply.
    """
    count, _, _, power, _ = (sums[0].moments + sums[1].moments).sum(1)
    own = power / count.clamp_min(1)
    leaks = plan.leakage[: len(own), : len(own)] @ own
    empty = (leaks > _LEAKED * own) & (torch.arange(len(own)) > plan.ring(_JOIN_A))
    return int(empty.int().argmax()) if bool(empty.any()) else plan.box


def _compared_noise(powers: Tensor, transfer: Tensor) -> Tensor:
    """Noise (rings,) of images of the mean squared CTF, one half, at the amplitude of raw images."""
    power = powers[:, 0] + powers[:, 1] / 2
    return (power if not len(transfer) else power / transfer.square().clamp_min(FAINT**2)).mean((0, 1))


def _with_searched(model: Model, searched: tuple[SearchedSums, SearchedSums]) -> Model:
    """Noise and amplitude of the images that poses are searched in, where they were seen."""
    noise = _noise(model.searched, (searched[0].noise, searched[1].noise))
    transfer = model.transfer.clone()
    power = (noise[:, 0] + noise[:, 1] / 2).double()
    for half, each in enumerate(searched):
        before, (cross, norm) = transfer[half].double(), each.match.to(power).clamp_min(0)
        rings = norm.shape[1]
        # What it is by the images, and how surely.
        found = before[:, :rings] * cross / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        sure = norm / (before[:, :rings].square() * power[half, :, :rings])
        for ring in range(1, model.radius + 1):
            like = 1 / _ALIKE**2
            mean = sure[:, ring] * found[:, ring] + like * before[:, ring - 1]
            before[:, ring] = mean / (sure[:, ring] + like)
        before[:, model.radius + 1 :] = before[:, model.radius, None]
        transfer[half] = before.to(transfer)
    return replace(model, searched=noise, transfer=transfer.clamp(FAINT, _STRONG))


def _noise(before: Tensor, sums: tuple[NoiseSums, NoiseSums]) -> Tensor:
    """Power of what maps do not explain, where it was seen."""
    noise = before.clone()
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
