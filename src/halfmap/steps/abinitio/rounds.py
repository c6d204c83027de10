"""All runs, some iterations of each at a time."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from halfmap.errors import ItemsFailedError
from halfmap.io.atomic import write_text
from halfmap.log import log
from halfmap.steps.abinitio.plan import Plan
from halfmap.steps.abinitio.run import Stretch, advance, state_name

if TYPE_CHECKING:
    from halfmap.engine import Context

FOLDER = "Iterations"

_ROUND = 5
"""Iterations after which all runs wait for each other: what a stopped job has to do again at most."""


def run_all(ctx: Context, plan: Plan) -> tuple[Tensor, list[float]]:
    """Run all iterations of all runs.

    Parameters
    ----------
    ctx : Context
        Of the job.
    plan : Plan
        Sizes and schedule.

    Returns
    -------
    Tensor (runs, k, box, box, box)
        Maps of each.
    list of float
        Mean log-evidence of the particles in the last iteration of each.

    Raises
    ------
    ItemsFailedError
        If a run failed.
    """
    folder, total = ctx.folder / FOLDER, len(plan.iterations)
    work = functools.partial(advance, plan=plan, folder=folder)
    for start in range(0, total, _ROUND):
        stop = min(start + _ROUND, total)
        stretches = [Stretch(run, start, stop) for run in range(plan.step.restarts)]
        done = ctx.map(work, stretches, key=_name, unit="run")
        if len(done) < len(stretches):
            raise ItemsFailedError("a run failed", hint="see the errors above; then resume")
        figures = [each for one in done for each in one["figures"]]
        write_text(folder / f"it{stop:03d}.json", json.dumps(figures) + "\n")
        said = _said(figures, stop)
        log.info("iteration %d of %d: %s", stop, total, said)
        ctx.round_done(stop, total, said)
        for run in range(plan.step.restarts):
            (folder / f"{state_name(run, start)}.npz").unlink(missing_ok=True)
    maps = torch.stack([_maps(folder, run, total) for run in range(plan.step.restarts)])
    last = {one["run"]: one["mean_evidence"] for one in read_figures(folder) if one["iteration"] == total}
    return maps, [last[run + 1] for run in range(plan.step.restarts)]


def read_figures(folder: Path) -> list[dict[str, Any]]:
    """Figures of all iterations of all runs."""
    return [one for file in sorted(folder.glob("it*.json")) for one in json.loads(file.read_text())]


def _name(stretch: Stretch) -> str:
    return stretch.name


def _said(figures: list[dict[str, Any]], number: int) -> str:
    last = [one for one in figures if one["iteration"] == number]
    values = ", ".join(f"{one['mean_evidence']:.1f}" for one in last)
    return (
        f"{last[0]['particles']} particles at {last[0]['searched_A']:.0f} Å; log-evidence of runs: {values}"
    )


def _maps(folder: Path, run: int, iterations: int) -> Tensor:
    with np.load(folder / f"{state_name(run, iterations)}.npz") as file:
        return torch.from_numpy(file["maps"])
