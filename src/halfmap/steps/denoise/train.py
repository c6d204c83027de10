"""Train a network to predict one half of micrographs from the other."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import mse_loss

import halfmap
from halfmap.errors import ParameterError
from halfmap.io.names import unique_stems
from halfmap.io.tables import read_micrographs
from halfmap.log import log
from halfmap.nets.denoiser import FULL, KIND, SMALL, Denoiser, Shape, load_denoiser, save_denoiser
from halfmap.nets.training import Progress, bfloat16_pays, train
from halfmap.nets.weights import shipped
from halfmap.steps.denoise.halves import COARSER, HalvesItem, list_halves, load_halves
from halfmap.steps.denoise.independence import refuse_dependent
from halfmap.steps.denoise.patches import drawn, endless, keep, kept

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.denoise.step import DenoiseTrain

PREPARED = "prepared"

_PLAIN = {
    "small": Shape(kind="plain", blocks=2, filters=16),
    "full": Shape(kind="plain", blocks=2, filters=32),
}
_WIDE = {"small": SMALL, "full": FULL}

_HELD_OUT = 64
"""Patches that the loss on held-out micrographs is the mean of."""

_LOOKS, _APART = 30, 50
"""How often a training looks at them, and the least number of batches between two looks."""


def run(step: DenoiseTrain, ctx: Context) -> None:
    """Prepare halves, refuse those that are not independent, train, keep the weights that were best."""
    from halfmap.steps.denoise import pictures

    items = _chosen(step, ctx)
    (ctx.folder / PREPARED).mkdir(exist_ok=True)
    work = functools.partial(
        prepare, folder=ctx.folder / PREPARED, pixel_size=step.pixel_size, flip=step.phase_flip
    )
    done = ctx.map(work, items, key=lambda item: item.key, unit="micrograph")
    by_key = {item.key: item for item in items}
    paths = {row["key"]: ctx.folder / PREPARED / f"{row['key']}.npy" for row in done}
    for key, path in paths.items():
        if not path.exists():  # a training that had ended goes on
            work(by_key[key])
    images = [kept(path) for path in paths.values()]
    refuse_dependent([row["correlation"] for row in done], [by_key[key] for key in paths])
    trained, held_out = _parted(images, step.patch, step.held_out)
    network, before = _network(step, ctx)
    progress = _progress(step, ctx, held_out)
    batch = step.batch or _batch(ctx.device)
    said = "micrographs" if len(images) > 1 else "micrograph, a quarter of it held out"
    log.info(
        "%s network, %s weights, %d batches of %d patches from %d %s",
        *(network.shape.kind, f"{sum(weight.numel() for weight in network.parameters()):,}"),
        *(step.steps, batch, len(images), said),
    )
    losses = train(
        network,
        endless(trained, patch=step.patch, batch=batch, seed=step.seed),
        mse_loss,
        steps=step.steps,
        learning_rate=step.learning_rate,
        half=bfloat16_pays(ctx.device),
        report=max(1, step.steps // 50),
        progress=progress,
    )
    network.eval().cpu()
    record = {
        "version": halfmap.__version__,
        "pixel_size": step.pixel_size,
        "phase_flipped": step.phase_flip,
        "patch": step.patch,
        "micrographs": len(images),
        "tables": [path.as_posix() for path in step.micrographs],
        "steps": step.steps,
        "seed": step.seed,
        "began_with": before,
        "held_out_loss": [list(each) for each in progress.losses],
    }
    save_denoiser(ctx.folder / "model.npz", network, record)
    nothing = _error_of_nothing(held_out, step.patch, step.seed)
    log.info("loss on what was held out: %.4f; of an empty image it is %.4f", progress.best[0], nothing)
    pictures.draw_training(
        ctx.folder / "training.png", network, held_out[0], losses, progress.losses, step.steps
    )
    # As large as all micrographs together.
    del images, trained, held_out
    shutil.rmtree(ctx.folder / PREPARED)


def prepare(item: HalvesItem, *, folder: Path, pixel_size: float, flip: bool) -> dict[str, Any]:
    """Write the halves of a micrograph as the network sees them, and tell how they correlate."""
    halves = load_halves(item, pixel_size, flip=flip)
    keep(folder / f"{item.key}.npy", halves)
    return {"key": item.key, "correlation": halves.correlation}


def _chosen(step: DenoiseTrain, ctx: Context) -> list[HalvesItem]:
    """Micrographs of all tables, drawn at random where there are more than are wanted."""
    items: list[HalvesItem] = []
    for path in step.micrographs:
        table = read_micrographs(ctx.resolve(path))
        items += list_halves(
            table,
            ctx.resolve,
            use_ctf=step.phase_flip,
            thin=step.thin,
            seed=step.seed,
            electron=step.electron,
        )
    coarse = [item for item in items if item.pixel_size > COARSER * step.pixel_size]
    if coarse:
        size = max(item.pixel_size for item in coarse)
        raise ParameterError(
            f"pixels of {coarse[0].name} are of {coarse[0].pixel_size:g} Å, coarser than --pixel-size "
            f"{step.pixel_size:g}",
            hint=f"give --pixel-size {size:g}, or leave them out",
        )
    keys = unique_stems([str(item.even) for item in items])
    items = [replace(item, key=key) for item, key in zip(items, keys, strict=True)]
    if len(items) > step.most:
        rng = np.random.default_rng(step.seed)
        items = [items[i] for i in sorted(rng.choice(len(items), step.most, replace=False).tolist())]
    return items


def _parted(images: Sequence[NDArray], patch: int, share: float) -> tuple[list[NDArray], list[NDArray]]:
    """Micrographs to train on, and those that are held out; of a single one, a quarter."""
    small = [image for image in images if min(image.shape[1:]) < patch]
    if small:
        h, w = small[0].shape[1:]
        raise ParameterError(
            f"patches of {patch} px do not fit into {w} × {h} px", hint="give a smaller --patch"
        )
    if len(images) > 1:
        number = min(max(1, round(share * len(images))), len(images) - 1)
        # Spread over the data set, as sessions change while they last.
        out = {int(i) for i in np.linspace(0, len(images) - 1, number + 2)[1:-1].round()}
        return [image for i, image in enumerate(images) if i not in out], [images[i] for i in sorted(out)]
    border = images[0].shape[2] * 3 // 4
    if images[0].shape[2] - border < patch:
        raise ParameterError("one micrograph is too small to hold a part of it out", hint="give more of them")
    return [images[0][:, :, :border]], [images[0][:, :, border:]]


def _network(step: DenoiseTrain, ctx: Context) -> tuple[Denoiser, str]:
    torch.manual_seed(step.seed)
    if step.general and step.model is not None:
        raise ParameterError("there are two models to go on with", hint="give --model or --general")
    if step.general and (step.size == "full" or step.network == "plain"):
        raise ParameterError(
            "the general model is a small, wide network", hint="leave out --general, or --size and --network"
        )
    if step.general or step.model is not None:
        path = shipped(KIND) if step.model is None else ctx.resolve(step.model)
        network, record = load_denoiser(path)
        wanted = step.pixel_size, step.phase_flip
        if (record["pixel_size"], record["phase_flipped"]) != wanted:
            raise ParameterError(
                f"was trained at {record['pixel_size']:g} Å/px, phases "
                f"{'' if record['phase_flipped'] else 'not '}flipped",
                path=path,
                hint="go on as it was made",
            )
        before = "the general one" if step.model is None else step.model.as_posix()
        return network.train().to(ctx.device), before
    size = step.size if step.size != "auto" else ("full" if ctx.device.startswith("cuda") else "small")
    shape = (_WIDE if step.network == "wide" else _PLAIN)[size]
    return Denoiser(shape).to(ctx.device), ""


def _progress(step: DenoiseTrain, ctx: Context, held_out: Sequence[NDArray]) -> Progress:
    one, other = drawn(held_out, patch=step.patch, batch=_HELD_OUT, rng=np.random.default_rng(step.seed))
    half = bfloat16_pays(ctx.device)

    def loss(network: nn.Module) -> float:
        total = 0.0
        for given, wanted in zip(one.split(16), other.split(16), strict=True):
            with torch.autocast(torch.device(ctx.device).type, torch.bfloat16, enabled=half):
                found = network(given.to(ctx.device))
            total += float(mse_loss(found.float().cpu(), wanted)) * len(given)
        return total / _HELD_OUT

    return Progress(loss, every=max(_APART, math.ceil(step.steps / _LOOKS)), file=ctx.folder / "training.pt")


def _error_of_nothing(held_out: Sequence[NDArray], patch: int, seed: int) -> float:
    _, other = drawn(held_out, patch=patch, batch=_HELD_OUT, rng=np.random.default_rng(seed))
    return float(other.square().mean())


def _batch(device: str) -> int:
    return 32 if device.startswith("cuda") else 8
