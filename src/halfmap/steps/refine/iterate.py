"""One iteration: parts of both half sets are searched, what they give added up, the model estimated anew."""

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
from halfmap.search.backprojector import Backprojection
from halfmap.search.halfmaps import load_sums
from halfmap.search.lens_noise import NoiseSums
from halfmap.search.regularise import Halves
from halfmap.steps.refine.expectation import BEST, Part, coarse_grid, expect
from halfmap.steps.refine.model import Maps, Model, maximise
from halfmap.steps.refine.plan import PARTS, Plan

if TYPE_CHECKING:
    from halfmap.engine import Context

FOLDER = "Iterations"
_WAYS = {"everywhere": "all directions", "near": "near the poses before", "last": "all frequencies put back"}


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
    folder.mkdir(exist_ok=True)
    if model.iteration == 0:
        model.save(_model_file(folder, 0))
    name = f"it{model.iteration + 1:03d}"
    parts = [
        Part(f"{name}_half{half + 1}_{i % PARTS + 1}", half, i % PARTS, rows)
        for i, (half, rows) in enumerate(plan.parts())
    ]
    work = functools.partial(
        expect,
        plan=plan,
        model_file=_model_file(folder, model.iteration),
        poses_file=_poses_file(folder, model.iteration) if model.iteration else None,
        folder=folder,
    )
    done = ctx.map(work, parts, key=_name, unit="part")
    if len(done) < len(parts):
        raise ItemsFailedError("a part of the particles failed", hint="see the errors above; then resume")
    halves, noise, best, poses = _add_up(plan, folder, done)
    parts_of = [functools.partial(_sums, folder, one, plan) for one in done]
    new, maps = maximise(plan, model, halves, (parts_of[:PARTS], parts_of[PARTS:]), noise, best)
    _say(folder, plan, model, new, best)
    _save(_poses_file(folder, new.iteration), best=best, **poses)
    if new.done:
        _save(folder / "maps.npz", unfiltered=maps.unfiltered.cpu().numpy(), mask=maps.mask.cpu().numpy())
    new.save(_model_file(folder, new.iteration))
    _tidy(folder, new.iteration)
    return new


def resume(ctx: Context) -> Model | None:
    """Give the model of the last iteration that was finished, if there is one."""
    found = sorted((ctx.folder / FOLDER).glob("it*_model.npz"))
    return Model.load(found[-1], ctx.device) if found else None


def last_result(ctx: Context, model: Model) -> tuple[Maps, dict[str, NDArray]]:
    """Half maps and poses that the last iteration found."""
    folder = ctx.folder / FOLDER
    with np.load(folder / "maps.npz") as file:
        maps = Maps(*(torch.from_numpy(file[name]) for name in ("unfiltered", "mask")))
    with np.load(_poses_file(folder, model.iteration)) as file:
        return maps, {name: file[name] for name in file.files}


def _name(part: Part) -> str:
    return part.name


def _model_file(folder: Path, number: int) -> Path:
    return folder / f"it{number:03d}_model.npz"


def _poses_file(folder: Path, number: int) -> Path:
    return folder / f"it{number:03d}_poses.npz"


def _sums(folder: Path, one: dict[str, Any], plan: Plan) -> Backprojection:
    """What a part has added up."""
    file = folder / f"{one['part']}_sums.npy"
    return load_sums(file, one["box"], one["padded_box"], device=plan.device)


def _save(path: Path, **arrays: NDArray) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _add_up(
    plan: Plan, folder: Path, done: list[dict[str, Any]]
) -> tuple[Halves, tuple[NoiseSums, NoiseSums], NDArray[np.float64], dict[str, NDArray]]:
    """Sums of all parts, in their order, whoever made them; and poses in the order of the table."""
    halves: list[Backprojection | None] = [None, None]
    noise: list[NDArray | float] = [0.0, 0.0]
    best, maxima = [], []
    for one in done:
        half, part = one["half"], _sums(folder, one, plan)
        before = halves[half]
        halves[half] = part if before is None else before + part
        with np.load(folder / f"{one['part']}.npz") as file:
            arrays = {name: file[name] for name in file.files}
        noise[half] = noise[half] + arrays.pop("noise")
        best.append(arrays.pop("best"))
        maxima.append(arrays)
    table = np.concatenate(best)
    table = table[np.argsort(table[:, 0])]
    together = {name: np.concatenate([each[name] for each in maxima]) for name in maxima[0]}
    order = np.argsort(together["owner"], kind="stable")
    first, second = halves
    assert first is not None
    assert second is not None
    sums = [NoiseSums(torch.as_tensor(moments)) for moments in noise]
    return (
        (first, second),
        (sums[0], sums[1]),
        table,
        {name: array[order] for name, array in together.items()},
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
    log.info(
        "iteration %d, %s: compared to %.1f Å; resolution %.2f Å; median pose errors %.2f° and %.2f Å; "
        "poses turned by %.2f°, %.0f %% of them beyond their errors",
        *(model.iteration, way, figures["searched_A"], figures["resolution_A"]),
        *(median["pose_error"], median["shift_error"], model.turned, 100 * model.jumped),
    )
    write_text(folder / f"it{model.iteration:03d}.json", json.dumps(figures) + "\n")


def _tidy(folder: Path, number: int) -> None:
    """Remove the parts of this and earlier iterations, and what the one before it began with."""
    for part in folder.glob("it[0-9][0-9][0-9]_half*.np[yz]"):
        if int(part.name[2:5]) <= number:
            part.unlink()
    for name in ("model", "poses"):
        (folder / f"it{number - 2:03d}_{name}.npz").unlink(missing_ok=True)
