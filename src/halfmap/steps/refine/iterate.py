"""One iteration: parts of both half sets are searched, what they give added up, the model estimated anew."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.errors import ItemsFailedError
from halfmap.io.atomic import atomic_path, write_text
from halfmap.log import log
from halfmap.search.checkpoint import FOLDER, load_arrays, model_file, poses_file, save_arrays
from halfmap.search.halfmaps import radius_at
from halfmap.search.lens_noise import NoiseSums
from halfmap.search.stages import coarse_grid
from halfmap.search.stored_sums import StoredSums
from halfmap.steps.refine.expectation import BEST, Part, expect, reference_file
from halfmap.steps.refine.model import THRESHOLD, Maps, Model, maximise
from halfmap.steps.refine.plan import PARTS, Plan
from halfmap.steps.refine.searched import SearchedSums

if TYPE_CHECKING:
    from halfmap.engine import Context

_WAYS = {"everywhere": "all directions", "near": "near the poses before", "last": "all frequencies put back"}

_SUMMED = {"noise", "searched", "match"}
"""Arrays of parts that are added up."""

_UNEVEN = 0.9
"""Part of the squared correlation with the truth that is left, below which missing views are told of."""

_DOUBTFUL = 0.3
"""Correlation that random phases have within a mask, or half maps beyond their resolution, and should not."""


def begin(ctx: Context, plan: Plan, model: Model, reference: Tensor) -> Model:
    """Write the first model, the map (d, d, d) that all are compared with at first, and given poses."""
    folder = ctx.folder / FOLDER
    folder.mkdir(exist_ok=True)
    if plan.given is not None:
        best = np.zeros((len(plan.halves), len(BEST)))
        best[:, BEST.index("pose_error")] = plan.given.error_deg
        save_arrays(poses_file(folder, 0), best=best, **plan.given.starts())
    for half in (0, 1):
        for number in range(PARTS):
            _keep(folder, 0, half, number, reference)
    model.save(model_file(folder, 0))
    return model


def iterate(ctx: Context, plan: Plan, model: Model) -> Model:
    """Run one iteration and write its model.

    Parameters
    ----------
    ctx : Context
        Of the job.
    plan, model
        The refinement, and the model that the iteration before gave.

    Returns
    -------
    Model

    Raises
    ------
    ItemsFailedError
        If a part of the particles failed.
    """
    folder = ctx.folder / FOLDER
    name = f"it{model.iteration + 1:03d}"
    parts = [
        Part(f"{name}_half{half + 1}_{i % PARTS + 1}", half, i % PARTS, rows)
        for i, (half, rows) in enumerate(plan.parts())
    ]
    work = functools.partial(
        expect,
        plan=plan,
        model_file=model_file(folder, model.iteration),
        poses_file=poses_file(folder, model.iteration) if model.iteration or plan.given else None,
        folder=folder,
    )
    done = ctx.map(work, parts, key=_name, unit="part")
    if len(done) < len(parts):
        raise ItemsFailedError("a part of the particles failed", hint="see the errors above; then resume")
    noise, searched, best, poses = _collected(folder, done)
    sums = [
        StoredSums.open([folder / f"{one['part']}_sums.npy"], one["sizes"], device=plan.device)
        for one in done
    ]
    keep = functools.partial(_keep, folder, model.iteration + 1)
    new, maps = maximise(plan, model, (sums[:PARTS], sums[PARTS:]), noise, best, keep, searched)
    _say(folder, plan, model, new, best)
    save_arrays(poses_file(folder, new.iteration), best=best, **poses)
    if maps is not None:
        save_arrays(
            folder / "maps.npz", **{name: volume.cpu().numpy() for name, volume in vars(maps).items()}
        )
        _conclude(plan, new)
    new.save(model_file(folder, new.iteration))
    _tidy(folder, new.iteration)
    return new


def resume(ctx: Context) -> Model | None:
    """Give the model of the last iteration that was finished, if there is one."""
    return Model.last(ctx.folder / FOLDER, ctx.device)


def last_result(ctx: Context, model: Model) -> tuple[Maps, dict[str, NDArray]]:
    """Half maps and poses that the last iteration found."""
    folder = ctx.folder / FOLDER
    maps = {name: torch.from_numpy(array) for name, array in load_arrays(folder / "maps.npz").items()}
    return Maps(**maps), load_arrays(poses_file(folder, model.iteration))


def _name(part: Part) -> str:
    return part.name


def _keep(folder: Path, iteration: int, half: int, number: int, volume: Tensor) -> None:
    """Write the map that a part of a half set is compared with next."""
    with atomic_path(reference_file(folder, iteration, half, number), durable=False) as temporary:
        np.save(temporary, volume.cpu().numpy())


def _collected(
    folder: Path, done: list[dict[str, Any]]
) -> tuple[
    tuple[NoiseSums, NoiseSums],
    tuple[SearchedSums, SearchedSums] | None,
    NDArray[np.float64],
    dict[str, NDArray],
]:
    """What the parts found of the noise, and of each particle in the order of the table."""
    totals: dict[str, list[NDArray | float]] = {}
    best, maxima = [], []
    for one in done:
        half = one["half"]
        arrays = load_arrays(folder / f"{one['part']}.npz")
        for name in _SUMMED & arrays.keys():
            both = totals.setdefault(name, [0.0, 0.0])
            both[half] = both[half] + arrays.pop(name)
        best.append(arrays.pop("best"))
        maxima.append(arrays)
    table = np.concatenate(best)
    table = table[np.argsort(table[:, 0])]
    together = {name: np.concatenate([each[name] for each in maxima]) for name in maxima[0]}
    order = np.argsort(together["owner"], kind="stable")
    sums = {name: [torch.as_tensor(half) for half in both] for name, both in totals.items()}
    first, second = (NoiseSums(half) for half in sums["noise"])
    searched = None
    if "searched" in sums:
        one, other = (
            SearchedSums(NoiseSums(noise), match)
            for noise, match in zip(sums["searched"], sums["match"], strict=True)
        )
        searched = one, other
    return (first, second), searched, table, {name: array[order] for name, array in together.items()}


def _conclude(plan: Plan, model: Model) -> None:
    """Log the resolution that was reached, why there is no further iteration, and what is doubtful."""
    most, found = plan.step.most_iterations, model.resolution(plan)
    why = f"stopped by --most-iterations {most}" if model.limited else "resolution and poses improve no more"
    log.info("ended after %d iterations at %.2f Å: %s", model.iteration, found, why)
    if plan.step.sample is not None:
        return  # a trial, whose map nobody takes for the particle's
    if model.limited:
        log.warning(
            "it was stopped by --most-iterations %d before it converged: refine anew with more, or go on "
            "with its particles.star, its map.mrc as --reference, and --local",
            most,
        )
    randomised, corrected = model.curves[2], model.curves[3]
    fallen = min(radius_at(corrected, THRESHOLD) + 1, len(corrected) - 1)
    # Before these shells random phases are not looked at: they hold what the mask smears out of the others.
    if fallen >= model.from_shell + 2 and float(randomised[fallen]) > _DOUBTFUL:
        log.warning(
            "at %.2f Å the mask alone makes random phases correlate by %.2f: give a wider or softer --mask, "
            "and look at fsc.png",
            *(found, float(randomised[fallen])),
        )
    beyond = corrected[fallen + 1 :]
    if bool((beyond > _DOUBTFUL).any()):
        highest = int(beyond.argmax())
        log.warning(
            "the corrected FSC falls below %.3g at %.2f Å but is %.2f again at %.2f Å, so that the "
            "resolution is not sure: give more particles, or a wider or softer --mask, and look at fsc.png",
            *(THRESHOLD, found, float(beyond[highest]), plan.side / (fallen + 1 + highest)),
        )
    # The last shell is cut by the end of the images.
    seen = model.evenness[1 : max(min(fallen, plan.nyquist), 2)]
    if len(seen) and float(seen.min()) < _UNEVEN:
        log.warning(
            "much of the map's transform was hardly seen, for want of particles or of directions: half maps "
            "agree no less, but at %.1f Å this leaves %.2f of the map's squared correlation with the truth; "
            "see angular_distribution.png",
            *(plan.side / (int(seen.argmin()) + 1), float(seen.min())),
        )


def _say(folder: Path, plan: Plan, before: Model, model: Model, best: NDArray[np.float64]) -> None:
    """Log the iteration, and keep its figures for the picture of the progress."""
    median = {name: float(np.median(best[:, BEST.index(name)])) for name in ("pose_error", "shift_error")}
    order, _ = coarse_grid(before.radius, plan.side / plan.diameter)
    resolution = model.resolution(plan)
    step = 58.6 / 2**order
    figures = {
        "iteration": model.iteration,
        "stage": before.stage,
        "searched_A": plan.side / before.radius,
        "resolution_A": resolution,
        "step_deg": step if before.stage == "everywhere" else 0.0,
        "pose_error_deg": median["pose_error"],
        "shift_error_A": median["shift_error"],
        "turned_deg": model.turned,
        "jumped": model.jumped,
        "mean_share": float(best[:, BEST.index("share")].mean()),
        "mean_evidence": float(best[:, BEST.index("evidence")].mean()),
    }
    way = f"grid of {step:.1f}°" if before.stage == "everywhere" else _WAYS[before.stage]
    turned = f"; poses turned by {model.turned:.2f}°, {100 * model.jumped:.0f} % of them beyond their errors"
    log.info(
        "iteration %d, %s: compared to %.1f Å; resolution %.2f Å; median pose errors %.2f° and %.2f Å%s",
        *(model.iteration, way, figures["searched_A"], figures["resolution_A"]),
        *(median["pose_error"], median["shift_error"], turned if before.iteration or plan.given else ""),
    )
    write_text(folder / f"it{model.iteration:03d}.json", json.dumps(figures) + "\n")


def _tidy(folder: Path, number: int) -> None:
    """Remove the parts of this and earlier iterations, and what these began with."""
    for part in folder.glob("it[0-9][0-9][0-9]_half*.np[yz]"):
        if int(part.name[2:5]) <= number:
            part.unlink()
    for reference in folder.glob("it[0-9][0-9][0-9]_reference*.npy"):
        if int(reference.name[2:5]) < number:
            reference.unlink()
    for name in ("model", "poses"):
        (folder / f"it{number - 2:03d}_{name}.npz").unlink(missing_ok=True)
