"""One iteration: parts of the particles are compared, what they give added up, the model estimated anew."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from halfmap.errors import ItemsFailedError
from halfmap.io.atomic import atomic_path, write_text
from halfmap.log import log
from halfmap.search.checkpoint import FOLDER, model_file
from halfmap.search.sums import Sums
from halfmap.steps.class2d.expectation import SUMS, Shard, expect
from halfmap.steps.class2d.model import Model, Statistics, maximise
from halfmap.steps.class2d.plan import FOLDS, Iteration, Plan
from halfmap.steps.class2d.progress import detail
from halfmap.steps.class2d.reseed import reseed

if TYPE_CHECKING:
    from halfmap.engine import Context

_ATTRACTED, _MUCH = 0.35, 5.0
"""Part of the particles in one class, and its ratio to an equal share, that are warned of."""

_MARGIN = 1.6
"""Rings that are searched over those that have signal, so that resolution can grow."""


def iterate(ctx: Context, plan: Plan, model: Model, iteration: Iteration) -> Model:
    """Run one iteration and write its model.

    Parameters
    ----------
    ctx : Context
        Of the job.
    plan, model
        The classification, and the model that the iteration before gave.
    iteration : Iteration
        To run.

    Returns
    -------
    Model

    Raises
    ------
    ItemsFailedError
        If a part of the particles failed.
    """
    folder = ctx.folder / FOLDER
    folder.mkdir(exist_ok=True)
    if model.iteration == 0:
        model.save(model_file(folder, 0))
    radius = min(iteration.radius, max(plan.iterations[0].radius, round(_MARGIN * model.supported) + 4))
    name = f"it{iteration.number:03d}"
    parts = plan.shards(iteration)
    shards = [Shard(f"{name}_{i + 1:04d}", rows) for i, rows in enumerate(parts)]
    work = functools.partial(
        expect,
        plan=plan,
        model_file=model_file(folder, model.iteration),
        radius=radius,
        folder=folder,
    )
    done = ctx.map(work, shards, key=_name, unit="part")
    if len(done) < len(shards):
        raise ItemsFailedError("a part of the particles failed", hint="see the errors above; then resume")
    folds, statistics, best = _add_up(plan, folder, done)
    new = maximise(plan, model, iteration, plan.grids(radius)[-1], folds, statistics, best)
    new, seeded = reseed(plan, plan.source.images, new, best, iteration, radius)
    _say(ctx, plan, new, iteration, radius, best, seeded)
    with atomic_path(folder / f"{name}_best.npy") as temporary, temporary.open("wb") as file:
        np.save(file, best)
    new.save(model_file(folder, iteration.number))
    _tidy(folder, iteration)
    return new


def resume(ctx: Context) -> Model | None:
    """Give the model of the last iteration that was finished, if there is one."""
    return Model.last(ctx.folder / FOLDER, ctx.device)


def last_assignments(ctx: Context, plan: Plan) -> NDArray[np.float64]:
    """What the last iteration found for every particle, in the order of the table."""
    best = np.load(ctx.folder / FOLDER / f"it{plan.iterations[-1].number:03d}_best.npy")
    return best[np.argsort(best[:, 0])]


def _name(shard: Shard) -> str:
    return shard.name


def _add_up(
    plan: Plan, folder: Path, done: list[dict[str, Any]]
) -> tuple[list[Sums], Statistics, NDArray[np.float64]]:
    """Sums of each fold, of all its parts in their order, whoever made them."""
    groups = int(plan.groups.max()) + 1
    folds: list[Sums | None] = [None] * FOLDS
    statistics: Statistics | None = None
    best = []
    for one in done:
        with np.load(folder / one["file"]) as file:
            arrays = {name: torch.from_numpy(file[name]).to(plan.device) for name in file.files}
        part, before = Sums(*(arrays[name] for name in SUMS)), folds[one["fold"]]
        folds[one["fold"]] = part if before is None else before + part
        if statistics is None:
            rings, classes = arrays["spectra"].shape[-1], len(arrays["shares"])
            zeros = functools.partial(torch.zeros, dtype=torch.float64, device=plan.device)
            statistics = Statistics(zeros(groups, rings), zeros(groups, rings), zeros(groups), zeros(classes))
        found = arrays["best"].cpu().numpy()
        members = np.bincount(plan.groups[found[:, 0].astype(np.intp)], minlength=groups)
        statistics.power[arrays["groups"]] += arrays["spectra"][:, 0]
        statistics.signal[arrays["groups"]] += arrays["spectra"][:, 1]
        statistics.count += torch.from_numpy(members).to(statistics.count)
        statistics.shares += arrays["shares"]
        statistics.shift2 += one["shift2"]
        best.append(found)
    assert statistics is not None
    nothing = next(part for part in folds if part is not None).scaled(0.0)
    return [nothing if part is None else part for part in folds], statistics, np.concatenate(best)


def _say(
    ctx: Context,
    plan: Plan,
    model: Model,
    iteration: Iteration,
    radius: int,
    best: NDArray[np.float64],
    seeded: int,
) -> None:
    """Log the iteration, and keep its figures for the picture of the progress."""
    members = np.bincount(best[:, 1].astype(int), minlength=plan.step.classes)
    shares = members / members.sum()
    resolutions = model.resolutions(plan)
    occupied = members > 0
    figures = {
        "iteration": iteration.number,
        "particles": len(best),
        "searched_A": plan.side / radius,
        "side_A": plan.side,
        "median_resolution_A": float(np.median(resolutions[occupied])),
        "best_resolution_A": float(resolutions[occupied].min()),
        "mean_greatest_probability": float(best[:, 5].mean()),
        "mean_evidence": float(best[:, 10].mean()),
        "largest_share": float(shares.max()),
        "effective_classes": float(np.exp(-(shares[occupied] * np.log(shares[occupied])).sum())),
        "seeded": seeded,
    }
    log.info(
        "iteration %d of %d: %d particles at %.1f Å; %s; "
        "largest class %.0f %%, %.1f classes' worth; %d begun anew",
        *(iteration.number, len(plan.iterations), len(best)),
        *(figures["searched_A"], detail(figures), 100 * figures["largest_share"]),
        *(figures["effective_classes"], seeded),
    )
    share = figures["largest_share"]
    attracted = share > _ATTRACTED or share * plan.step.classes > _MUCH
    if iteration.last and attracted and share * plan.step.classes > 2:
        log.warning(
            "class %d holds %.0f %% of the particles: what it shows may be a blur of many views; more "
            "--classes, or another --diameter, may separate them",
            *(int(members.argmax()) + 1, 100 * figures["largest_share"]),
        )
    write_text(ctx.folder / FOLDER / f"it{iteration.number:03d}.json", json.dumps(figures) + "\n")


def _tidy(folder: Path, iteration: Iteration) -> None:
    """Remove the parts of this and earlier iterations, and the model before the one it began with."""
    for number in range(1, iteration.number + 1):
        for part in folder.glob(f"it{number:03d}_[0-9]*.npz"):
            part.unlink()
    for suffix in ("model.npz", "best.npy"):
        (folder / f"it{iteration.number - 2:03d}_{suffix}").unlink(missing_ok=True)
