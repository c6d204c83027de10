"""The expectation step on a part of the particles: probabilities, what they add up to, the best of each."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.errors import ResourceError
from halfmap.io.atomic import atomic_path
from halfmap.log import log
from halfmap.ops.threads import in_threads, one_torch_thread
from halfmap.search.inplane import InPlaneSearch, Posterior
from halfmap.search.particles import prefetched
from halfmap.search.sums import Sums
from halfmap.steps.class2d.model import Model, explained
from halfmap.steps.class2d.plan import Plan, to_device

Found = TypeVar("Found")

BEST = (
    "row",
    "class",
    "psi",
    "x",
    "y",
    "greatest",
    "class_probability",
    "entropy",
    "psi_error",
    "shift_error",
    "evidence",
    "match",
    "norm",
)
"""What is kept of each particle: its row, its most probable class from 0, the angle in degrees and shift in Å
that bring it onto the average, the largest probability of a pose in that class and that of the class, the
entropy in nats, errors of angle and shift, the logarithm of its likelihood over that of noise alone, and what
the posterior expects of its product with its average and of the average's norm, over the noise."""

EVIDENCE, MATCH, NORM = (BEST.index(name) for name in ("evidence", "match", "norm"))

_WINDOW = 4
"""Angles on either side of the best that are taken for the same peak, whose mean is the pose."""


SUMS = "linear", "squared", "expected"
"""Names of the sums in the file of a part."""


@dataclass(frozen=True, eq=False)
class Shard:
    """Particles of one fold in an iteration, those of an optics group one after the other."""

    name: str
    rows: NDArray[np.intp]


@functools.lru_cache(maxsize=1)
def _load(path: Path, stamp: int, device: str) -> Model:
    return Model.load(path, device)


def expect(shard: Shard, *, plan: Plan, model_file: Path, radius: int, folder: Path) -> dict[str, Any]:
    """Search the particles of a shard, and write what they add up to as a file.

    Parameters
    ----------
    shard : Shard
        Rows of particles.
    plan, model_file
        The classification and its model.
    radius : int
        Outer ring.
    folder : path
        Where the file goes.
    """
    model = _load(model_file, model_file.stat().st_mtime_ns, plan.device)
    grids = plan.grids(radius)
    fine = grids[-1]
    fold = int(plan.folds[shard.rows[0]])
    averages = fine.sample(model.without(fold))
    search = InPlaneSearch(
        grids,
        averages,
        torch.full((len(averages),), -math.log(len(averages)), device=plan.device),
        range_px=plan.range_px,
        deviation_px=model.deviation_px,
        precision=plan.step.precision,
    )
    one = functools.partial(_search_batch, plan=plan, search=search, averages=averages, model=model)
    inside = float(plan.support().square().mean())
    whole: Sums | None = None
    tables, shares, shift2, spectra = [], 0.0, 0.0, {}
    for group, members in itertools.groupby(_searched(one, plan, shard.rows, radius), key=_group):
        own: Sums | None = None
        power = 0.0
        for _, found in members:
            own = found.sums if own is None else own + found.sums
            power, shares = power + found.power, shares + found.shares
            shift2 += found.shift2
            tables.append(found.best)
        assert own is not None
        signal = explained(own, averages, model.noise[group, : fine.rings], fine)
        spectra[group] = torch.stack([torch.as_tensor(power), signal]) / inside
        whole = own if whole is None else whole + own
    table = np.concatenate(tables)
    path = folder / f"{shard.name}.npz"
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            **{name: getattr(whole, name).cpu().numpy() for name in SUMS},
            groups=np.array(list(spectra)),
            spectra=torch.stack(list(spectra.values())).cpu().numpy(),
            shares=torch.as_tensor(shares).cpu().numpy(),
            best=table,
        )
    return {"file": path.name, "fold": fold, "shift2": shift2}


def _searched(
    search: Callable[[NDArray[np.intp], Tensor], _Found], plan: Plan, rows: NDArray[np.intp], radius: int
) -> Iterator[tuple[int, _Found]]:
    """Optics group and what they give of batches of images of one group, several searched at a time."""
    images, size = plan.source.images, plan.batch(radius)
    groups = plan.groups[rows]
    batches = [batch for group in np.unique(groups) for batch in images.batches(rows[groups == group], size)]
    stream = prefetched((batch, images.get(batch)) for batch in batches)
    look = functools.partial(in_halves, search)
    while some := list(itertools.islice(stream, plan.ahead(radius))):
        for (batch, _), found in zip(some, in_threads(look, *zip(*some, strict=True)), strict=True):
            yield from ((int(plan.groups[batch[0]]), each) for each in found)


def _group(found: tuple[int, _Found]) -> int:
    return found[0]


@dataclass(frozen=True, eq=False)
class _Found:
    """What one batch of images gives."""

    sums: Sums
    power: Tensor
    shares: Tensor
    shift2: float
    best: NDArray[np.float64]


def in_halves(
    search: Callable[[NDArray[np.intp], Tensor], Found], rows: NDArray[np.intp], pictures: Tensor
) -> list[Found]:
    """Search a batch of images at once, or where memory does not suffice in halves, and these in halves.

    Raises
    ------
    ResourceError
        If memory does not suffice for one image.
    """
    try:
        return [search(rows, pictures)]
    except (MemoryError, RuntimeError) as error:
        # For want of memory torch raises the one on a GPU, and the other on a CPU.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate" not in str(error):
            raise
        if len(rows) == 1:
            raise ResourceError(
                "memory does not suffice to compare one image with all classes",
                hint="use fewer classes or a smaller --shift-range",
            ) from error
    log.warning("memory does not suffice for %d images at a time: they are halved", len(rows))
    half = len(rows) // 2
    first = in_halves(search, rows[:half], pictures[:half])
    return first + in_halves(search, rows[half:], pictures[half:])


# Threads work on batches, not within operations: none waits, and how many there are changes no sum.
@one_torch_thread()
def _search_batch(
    rows: NDArray[np.intp],
    pictures: Tensor,
    *,
    plan: Plan,
    search: InPlaneSearch,
    averages: Tensor,
    model: Model,
) -> _Found:
    grid = search.grid
    scale = model.scale[torch.from_numpy(plan.micrographs[rows]), None, None]
    samples = grid.sample(to_device(pictures, plan.device) * plan.support())
    ctf = plan.transfer(rows, grid) * scale
    if ctf.is_complex():  # an odd aberration is taken off the image
        samples, ctf = samples * (ctf / ctf.abs().clamp(min=1e-9)).conj(), ctf.abs()
    group = int(plan.groups[rows[0]])
    posterior = search(samples, ctf, model.noise[group : group + 1, : grid.rings])
    sums, match = Sums.of(posterior, averages, grid)
    best = _best(posterior, match, rows, search, plan.pixel_size)
    return _Found(
        sums,
        samples.abs().square().mean(2).sum(0).double(),
        posterior.mass.sum((0, 1)).double(),
        float(_expected_shift2(posterior).sum()),
        best,
    )


def _expected_shift2(posterior: Posterior) -> Tensor:
    """Expected squared shift (b,) along one axis, px²."""
    return 0.5 * (posterior.mass.sum(2) * posterior.shifts_px.square().sum(-1)).sum(1)


def _best(
    posterior: Posterior, match: Tensor, rows: NDArray[np.intp], search: InPlaneSearch, pixel_size: float
) -> NDArray[np.float64]:
    """Most probable class of each image, and mean pose about its best one there; see `BEST`."""
    angles = search.grid.angles
    probability = posterior.probability.transpose(0, 1)  # (b, angles, t, k)
    batch, _, shifts, _ = probability.shape
    by_class = posterior.mass.sum(1)
    kind = by_class.argmax(1)
    each = torch.arange(batch, device=kind.device)
    greatest, place = probability[each, :, :, kind].flatten(1).max(1)
    angle = place // shifts
    away = torch.arange(angles, device=place.device) - angles // 2
    whole = probability[each[:, None], (angle[:, None] + away) % angles, :, kind[:, None]]  # (b, angles, t)
    near = slice(angles // 2 - _WINDOW, angles // 2 + _WINDOW + 1)
    peak = whole[:, near] / whole[:, near].sum((1, 2), keepdim=True)
    step = 360 / angles
    turn = (peak.sum(2) * away[near]).sum(1)
    chance = whole.sum(2) / whole.sum((1, 2))[:, None]
    turn_error = ((chance * (away - turn[:, None]).square()).sum(1) + 1 / 12).sqrt()
    shift = (peak.sum(1)[..., None] * posterior.shifts_px).sum(1)
    spread = (peak.sum(1)[..., None] * (posterior.shifts_px - shift[:, None]).square()).sum(1).mean(1)
    information = -(probability * probability.clamp(min=1e-30).log()).sum((1, 2, 3))
    # The mean logarithm of the posterior is that of the prior and match - norm / 2, less the evidence.
    prior = by_class @ search.log_weights - _expected_shift2(posterior) / search.deviation_px**2
    norm = 2 * (match + prior + information - posterior.log_evidence - search.log_cells)
    columns = [
        torch.from_numpy(rows).to(place.device),
        kind,
        # The average turned by +angle from x to y is what RELION calls psi = -angle.
        -((angle + turn) * step + 180) % 360 - 180,
        shift[:, 0] * pixel_size,
        shift[:, 1] * pixel_size,
        greatest,
        by_class[each, kind],
        information,
        turn_error * step,
        (spread + search.step_px**2 / 12).sqrt() * pixel_size,
        posterior.log_evidence,
        match,
        norm,
    ]
    return torch.stack([column.double() for column in columns], dim=1).cpu().numpy()
