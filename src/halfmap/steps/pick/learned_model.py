"""Make a model of a data set: the picks gathered, the network fine-tuned, the result drawn."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from halfmap.errors import ParameterError, TableError
from halfmap.io.coordinates import read_coordinates
from halfmap.io.micrographs import MicrographItem, list_micrographs
from halfmap.io.star import read_star
from halfmap.io.tables import read_micrographs
from halfmap.log import log
from halfmap.nets.picker import STRIDE, Picker, score_image
from halfmap.nets.weights import save_weights
from halfmap.steps.pick.candidates import find_peaks
from halfmap.steps.pick.learned import DISTANCE, PIXELS, load_network
from halfmap.steps.pick.learned_examples import Example
from halfmap.steps.pick.learned_pictures import draw_training
from halfmap.steps.pick.learned_training import fine_tune, prepare, read_example, write_example
from halfmap.steps.pick.tables import COORDINATES, DIAMETER, MICROGRAPH, X, Y

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.pick.step import PickTrain

_EXAMPLES = "Examples"
_FEWEST = 20
"""Picks below which a model is worth a warning."""


@dataclass(frozen=True, eq=False)
class Picked:
    """A micrograph with its picks: (x, y) in its pixels."""

    item: MicrographItem
    centres: NDArray


def run(step: PickTrain, ctx: Context) -> None:
    """Gather the picks, prepare their micrographs, train, write the model and its picture."""
    picked, diameter = gather(step, ctx)
    (ctx.folder / _EXAMPLES).mkdir(exist_ok=True)
    work = functools.partial(prepare_picked, diameter=diameter, folder=ctx.folder)
    done = ctx.map(work, picked, key=lambda each: each.item.key, unit="micrograph")
    examples = [read_example(ctx.folder / _EXAMPLES / f"{row['key']}.npz") for row in done]
    model = None if step.model is None else ctx.resolve(step.model)
    network, record = load_network(model, device=ctx.device)
    before = scores(network, examples)
    torch.manual_seed(step.seed)
    prior, losses = fine_tune(network, examples, rng=np.random.default_rng(step.seed), steps=step.steps)
    after = scores(network, examples)
    record = {
        **{key: record[key] for key in ("kind", "version", "parameters")},
        "started_from": {
            "model": "general" if model is None else str(step.model),
            "sha256": record["sha256"],
        },
        "diameter": diameter,
        "training": {
            "micrographs": [row["name"] for row in done],
            "picks": sum(len(example.centres) for example in examples),
            "share_of_positives": round(prior, 5),
            "steps": step.steps,
            "seed": step.seed,
            "losses": [round(value, 5) for value in losses],
        },
    }
    save_weights(ctx.folder / "model.npz", network, record)
    log.info("mean log-odds at the picks: %.1f before, %.1f after", before[0].mean(), after[0].mean())
    draw_training(ctx.folder / "training.png", losses, before, after)
    shutil.rmtree(ctx.folder / _EXAMPLES)


def gather(step: PickTrain, ctx: Context) -> tuple[list[Picked], float]:
    """Micrographs that have picks, and the particle's diameter in Å.

    Raises
    ------
    TableError
        If no pick belongs to any of the micrographs.
    ParameterError
        If the diameter is not given and the picks do not say it.
    """
    path = ctx.resolve(step.coordinates)
    tables = [block for block in read_star(path).values() if isinstance(block, pl.DataFrame)]
    named = next((table for table in tables if {MICROGRAPH, COORDINATES} <= set(table.columns)), None)
    if named is None:
        hint = "give the coordinates.star of import coordinates, or the autopick.star of a picker"
        raise TableError(f"has no columns {MICROGRAPH} and {COORDINATES}", path=path, hint=hint)
    files = dict(named.select(MICROGRAPH, COORDINATES).iter_rows())
    items = list_micrographs(read_micrographs(ctx.resolve(step.micrographs)), ctx.resolve, use_ctf=False)
    found, diameters = [], []
    for item in items:
        if item.name not in files:
            continue
        table = read_coordinates(ctx.resolve(files[item.name]))
        if len(table):
            found.append(Picked(item, table.select(X, Y).to_numpy()))
            diameters.extend(table[DIAMETER].to_list() if DIAMETER in table.columns else [])
    if not found:
        hint = "are they coordinates of other micrographs?"
        raise TableError("holds no picks of any of the micrographs", path=path, hint=hint)
    diameter = step.diameter or (float(np.median(diameters)) if diameters else None)
    if diameter is None:
        raise ParameterError("the picks do not say how large the particle is", hint="give --diameter in Å")
    if len(found) > step.most:
        chosen = np.random.default_rng([step.seed, 1]).choice(len(found), step.most, replace=False)
        found = [found[i] for i in sorted(chosen)]
    count = sum(len(each.centres) for each in found)
    several = "" if len(found) == 1 else "s"
    log.info("%d picks in %d micrograph%s, particles of %.0f Å", count, len(found), several, diameter)
    if count < _FEWEST:
        log.warning("%d picks are few to learn from; a hundred would do", count)
    return found, diameter


def prepare_picked(picked: Picked, *, diameter: float, folder: Path) -> dict[str, Any]:
    """Write a micrograph as the network sees it."""
    item = picked.item
    write_example(folder / _EXAMPLES / f"{item.key}.npz", prepare(item, picked.centres, diameter))
    return {"name": item.name, "key": item.key}


def scores(network: Picker, examples: list[Example]) -> tuple[NDArray, NDArray]:
    """Best scores near the picks, and scores of candidates that are far from any."""
    at_picks, elsewhere = [], []
    for example in examples:
        score = score_image(network, torch.from_numpy(example.image)).numpy()
        peaks = find_peaks(score, pixel_size=STRIDE, distance=DISTANCE * PIXELS)
        places = np.stack([peaks.x, peaks.y], axis=-1) * STRIDE
        apart = np.linalg.norm(places[:, None] - example.centres, axis=-1)
        near = apart < 0.25 * PIXELS
        lowest = float(score.min())
        at_picks.append(np.where(near, peaks.score[:, None], lowest).max(axis=0, initial=lowest))
        elsewhere.append(peaks.score[~near.any(axis=1)])
    return np.concatenate(at_picks), np.concatenate(elsewhere)
