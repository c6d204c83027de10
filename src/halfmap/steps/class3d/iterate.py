"""One iteration: parts of the folds are compared, what they give added up, the model estimated anew."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from halfmap.errors import ItemsFailedError
from halfmap.io.atomic import write_text
from halfmap.log import log
from halfmap.search.checkpoint import FOLDER, load_arrays, model_file, poses_file, save_arrays
from halfmap.search.lens_noise import NoiseSums
from halfmap.search.stored_sums import StoredSums
from halfmap.steps.class3d.expectation import BEST, Part, expect
from halfmap.steps.class3d.model import Model, maximise
from halfmap.steps.class3d.plan import Plan
from halfmap.steps.class3d.reseed import reseed
from halfmap.steps.class3d.start import GIVEN
from halfmap.steps.class3d.variation import agreement, by_chance, part

if TYPE_CHECKING:
    from halfmap.engine import Context

_WAYS = {"everywhere": "all poses", "near": "near the poses before", "given": "poses of the table"}


_COMMON = 1.5
"""Correlation of what halves differ in, over what chance seldom exceeds, below which they may have nothing in
common."""


def iterate(ctx: Context, plan: Plan, model: Model) -> Model:
    """Run one iteration and write its model.

    Parameters
    ----------
    ctx : Context
        Of the job.
    plan, model
        The classification, and the model that the iteration before gave.

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
    name = f"it{model.iteration + 1:03d}"
    items = [Part(f"{name}_part{i + 1:03d}", fold, rows) for i, (fold, rows) in enumerate(plan.parts())]
    before = poses_file(folder, model.iteration) if model.iteration else None
    work = functools.partial(
        expect,
        plan=plan,
        model_file=model_file(folder, model.iteration),
        poses_file=folder / GIVEN if model.stage == "given" else before,
        folder=folder,
    )
    done = ctx.map(work, items, key=_name, unit="part")
    if len(done) < len(items):
        raise ItemsFailedError("a part of the particles failed", hint="see the errors above; then resume")
    noise, overlaps, best, poses = _add_up(folder, done, plan.n_folds)
    earlier = load_arrays(before)["best"] if before is not None and model.parted else None
    load = functools.partial(_sums, plan, folder, done)
    new, maps = maximise(plan, model, load, noise, best, overlaps, earlier)
    seeded = 0
    if new.done:
        new = replace(new, agreement=agreement(plan, new, best))
    elif model.parted:
        new, seeded = reseed(plan, new, best)
    elif new.stage != "everywhere":
        new = part(plan, new, best)
    _say(folder, plan, model, new, best, seeded)
    save_arrays(poses_file(folder, new.iteration), best=best, **poses)
    if new.done:
        save_arrays(folder / "maps.npz", maps=maps.cpu().numpy().astype(np.float32))
    new.save(model_file(folder, new.iteration))
    _tidy(folder, new.iteration)
    return new


def resume(ctx: Context) -> Model | None:
    """Give the model of the last iteration that was finished, if there is one."""
    return Model.last(ctx.folder / FOLDER, ctx.device)


def last_result(ctx: Context, model: Model) -> tuple[torch.Tensor, NDArray[np.float64]]:
    """Filtered maps (k, d, d, d), and what the last iteration found for each particle; see `BEST`."""
    folder = ctx.folder / FOLDER
    maps = torch.from_numpy(load_arrays(folder / "maps.npz")["maps"])
    return maps, load_arrays(poses_file(folder, model.iteration))["best"]


def said(ctx: Context, model: Model) -> str:
    """What an iteration gave, in a line."""
    figures = json.loads((ctx.folder / FOLDER / f"it{model.iteration:03d}.json").read_text())
    if len(figures["members"]) == 1:
        return f"one map to {figures['resolution_A']:.1f} Å, before classes part"
    members = np.array(figures["members"])
    shares = ", ".join(f"{100 * share:.0f}" for share in members / members.sum())
    return f"classes of {shares} %{_moved(figures['changed'], ' of the particles changed theirs')}"


def _moved(changed: float, words: str) -> str:
    """What share of the particles changed their class; nothing where there were no classes before."""
    return f"; {100 * changed:.1f} %{words}" if changed < 1 else ""


def _name(part: Part) -> str:
    return part.name


def _sums(plan: Plan, folder: Path, done: list[dict[str, Any]], number: int, fold: int) -> StoredSums:
    """What all parts of a fold add up to for a class, in their order, whoever made them."""
    own = [one["part"] for one in done if one["fold"] == fold]
    files = [folder / f"{name}_class{number + 1:03d}_sums.npy" for name in own]
    return StoredSums.open(files, done[0]["sizes"], device=plan.device)


def _add_up(
    folder: Path, done: list[dict[str, Any]], n_folds: int
) -> tuple[NoiseSums, NDArray[np.float64], NDArray[np.float64], dict[str, NDArray]]:
    """Moments of the noise, overlaps of classes, what was found for each particle, poses; see `maximise`."""
    noise, best, maxima = 0.0, [], []
    k = done[0]["classes"]
    overlaps = np.zeros((n_folds, k, k))
    for one in done:
        arrays = load_arrays(folder / f"{one['part']}.npz")
        noise = noise + arrays.pop("noise")
        overlaps[one["fold"]] += arrays.pop("overlap")
        best.append(arrays.pop("best"))
        maxima.append(arrays)
    table = np.concatenate(best)
    together = {name: np.concatenate([each[name] for each in maxima]) for name in maxima[0]}
    if "owner" in together:
        order = np.argsort(together["owner"], kind="stable")
        together = {name: array[order] for name, array in together.items()}
    return NoiseSums(torch.as_tensor(noise)), overlaps, table[np.argsort(table[:, 0])], together


def _say(
    folder: Path, plan: Plan, before: Model, model: Model, best: NDArray[np.float64], seeded: int
) -> None:
    """Log the iteration, and keep its figures for the picture of the progress."""
    k = len(before.shares)
    members = np.bincount(best[:, BEST.index("class")].astype(np.intp), minlength=k)
    resolutions = model.resolutions(plan)
    figures = {
        "iteration": model.iteration,
        "searched_A": plan.side / before.radius,
        "resolution_A": resolutions[0],
        "differing_A": plan.side / before.differing,
        "members": members.tolist(),
        "shares": (model if before.parted else before).shares.tolist(),
        "changed": model.changed,
        "probability": float(best[:, BEST.index("class_probability")].mean()),
    }
    log.info(
        "iteration %d, %s: compared to %.1f Å; map of all to %.1f Å",
        *(model.iteration, _WAYS[before.stage], figures["searched_A"], resolutions[0]),
    )
    if before.parted:
        log.info(
            "classes of %s particles to %s Å%s; mean probability %.2f%s",
            " + ".join(f"{count:,}" for count in members),
            ", ".join(f"{each:.1f}" for each, count in zip(resolutions[1:], members, strict=True) if count),
            *(_moved(model.changed, " changed theirs"), figures["probability"]),
            f"; {seeded} begun anew" if seeded else "",
        )
    if model.done:
        chance = by_chance(plan)
        log.info(
            "two halves of the particles correlate by %.2f in what they differ in; "
            "chance seldom exceeds %.2f",
            *(model.agreement, chance),
        )
        if model.agreement < _COMMON * chance:
            log.warning(
                "halves of the particles, each by itself, do not differ in the same: the classes may be of "
                "noise; fewer --classes, more particles, or a --focus-mask may show more"
            )
    write_text(folder / f"it{model.iteration:03d}.json", json.dumps(figures) + "\n")


def _tidy(folder: Path, number: int) -> None:
    """Remove the parts of this and earlier iterations, and what the one before it began with."""
    for file in folder.glob("it[0-9][0-9][0-9]_part*.np[yz]"):
        if int(file.name[2:5]) <= number:
            file.unlink()
    for name in ("model", "poses"):
        (folder / f"it{number - 2:03d}_{name}.npz").unlink(missing_ok=True)
