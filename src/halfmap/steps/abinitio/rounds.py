"""Runs, two at a time, until two of them agree."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from halfmap.errors import ItemsFailedError
from halfmap.io.atomic import write_text
from halfmap.log import log
from halfmap.steps.abinitio.consensus import Agreement, Match, Pair, compare, match
from halfmap.steps.abinitio.plan import Plan
from halfmap.steps.abinitio.run import Line, Stretch, advance, read_maps

if TYPE_CHECKING:
    from halfmap.engine import Context

FOLDER = "Iterations"

_TOGETHER = 2
"""Runs that are made before they are compared with each other and with those before."""

_ROUND = 5
"""Iterations after which these runs wait for each other: what a stopped job has to do again at most."""

_SIGNS = "its own, and the same with the other sign of what is not spherical"


def run_until_two_agree(ctx: Context, plan: Plan) -> Agreement:
    """Make runs, two at a time, until two of all agree or no more are to be made.

    Parameters
    ----------
    ctx : Context
        Of the job.
    plan : Plan
        Sizes and schedule.

    Returns
    -------
    Agreement

    Raises
    ------
    ItemsFailedError
        If a run failed.
    """
    ended: list[Ended] = []
    matches: dict[tuple[int, int], list[Match]] = {}
    most = plan.step.restarts
    while True:
        runs = range(len(ended), min(len(ended) + _TOGETHER, most))
        ended += _run(ctx, plan, runs)
        matches |= _matches(ctx, plan, ended, runs)
        maps, evidence = torch.stack([read_maps(one.maps) for one in ended]), [one.evidence for one in ended]
        agreed = compare(plan, maps, np.array(evidence), matches)
        if agreed.agreed or runs.stop == most:
            break
        log.info("no two of %d runs agree yet (the likeliest %s)", runs.stop, agreed.best)
    agreed.tell()
    return agreed


def read_figures(folder: Path) -> list[dict[str, Any]]:
    """Figures of all iterations of all runs."""
    return [one for file in sorted(folder.glob("runs*.json")) for one in json.loads(file.read_text())]


@dataclass(frozen=True)
class Ended:
    """File of the maps that a run ended with, and log-evidence of particles that are the same in all."""

    maps: Path
    evidence: list[float]


def _run(ctx: Context, plan: Plan, runs: Sequence[int]) -> list[Ended]:
    """All iterations of some runs."""
    folder, total = ctx.folder / FOLDER, len(plan.iterations)
    work = functools.partial(advance, plan=plan, folder=folder)
    fork, choice = plan.fork
    lines, done = [Line(run, other=False) for run in runs], dict[Line, dict[str, Any]]()
    figures: dict[Line, list[dict[str, Any]]] = {line: [] for line in lines}
    for start, stop in itertools.pairwise(sorted({*range(0, total, _ROUND), fork, choice, total})):
        if start == fork:
            lines = [Line(run, other) for run in runs for other in (False, True)]
            figures |= {line: list(figures[Line(line.run, other=False)]) for line in lines}
            log.info(
                "from iteration %d to %d each run has two maps (log-evidence of one or the other), %s; "
                "the likelier goes on",
                *(fork + 1, choice, "two random starts" if fork == 0 else _SIGNS),
            )
        told = _all(ctx, work, [Stretch(line, start, stop) for line in lines], unit="run")
        done = dict(zip(lines, told, strict=True))
        for line, one in done.items():
            figures[line] += one["figures"]
        _tell(ctx, total, [figures[line][-1] for line in lines])
        if stop == choice:
            likely = {line: np.mean(one["evidence"]) for line, one in done.items()}
            lines = [max((line for line in lines if line.run == run), key=likely.__getitem__) for run in runs]
        _leave(folder, runs, {line.file(stop) for line in lines}, (start, stop))
    said = [each for line in lines for each in figures[line]]
    write_text(folder / f"runs{runs[0] + 1:02d}.json", json.dumps(said) + "\n")
    return [Ended(folder / line.file(total), done[line]["evidence"]) for line in lines]


def _leave(folder: Path, runs: Sequence[int], needed: set[str], iterations: tuple[int, int]) -> None:
    """Remove what runs had after some iterations, but for what is needed."""
    lines = [Line(run, other) for run in runs for other in (False, True)]
    for name in {line.file(number) for line in lines for number in iterations} - needed:
        (folder / name).unlink(missing_ok=True)


def _matches(
    ctx: Context, plan: Plan, ended: Sequence[Ended], runs: Sequence[int]
) -> dict[tuple[int, int], list[Match]]:
    """Each of some runs beside all before it."""
    numbers = [(one, other) for other in runs for one in range(other)]
    pairs = [Pair(one, other, ended[one].maps, ended[other].maps) for one, other in numbers]
    done = _all(ctx, functools.partial(match, plan=plan), pairs, unit="pair") if pairs else []
    return {each: [Match.of(plan, one) for one in told] for each, told in zip(numbers, done, strict=True)}


def _all(ctx: Context, work: Any, items: list[Any], *, unit: str) -> list[Any]:
    done = ctx.map(work, items, unit=unit)
    if len(done) < len(items):
        raise ItemsFailedError(f"a {unit} failed", hint="see the errors above; then resume")
    return done


def _tell(ctx: Context, total: int, last: list[dict[str, Any]]) -> None:
    """Log the figures of the last iteration of some runs."""
    runs = sorted({one["run"] for one in last})
    values = ", ".join(
        " or ".join(f"{one['mean_evidence']:.1f}" for one in last if one["run"] == run) for run in runs
    )
    names = " and ".join(map(str, runs))
    said = (
        f"{last[0]['particles']} particles at {last[0]['searched_A']:.0f} Å; "
        f"log-evidence of runs {names}: {values}"
    )
    log.info("iteration %d of %d: %s", last[0]["iteration"], total, said)
    ctx.round_done(last[0]["iteration"], total, said)
