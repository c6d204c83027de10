"""One run from random poses: some iterations, from the file of the last one to the next."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.errors import FileFormatError
from halfmap.io.atomic import atomic_path
from halfmap.ops.rotations import random_rotations
from halfmap.ops.slices import SliceAccumulator
from halfmap.ops.threads import one_torch_thread
from halfmap.search.backprojector import Backprojection, shells_of
from halfmap.search.lens_noise import ring_means
from halfmap.search.prepared import prepare
from halfmap.search.symmetry_map import spherical_average
from halfmap.steps.abinitio.expectation import BATCH, Comparison
from halfmap.steps.abinitio.plan import Iteration, Plan
from halfmap.steps.abinitio.spectra import Spectra

_BEYOND = 1e6
"""Factor of the reciprocal of the signal's power where frequencies are not used yet."""


@dataclass(frozen=True)
class Line:
    """A run, from 0, and whether it is the other of its two at a time; see `Plan.fork`."""

    run: int
    other: bool

    def file(self, iterations: int) -> str:
        """Name of what it has after some iterations."""
        return f"run{self.run + 1:02d}{'_other' if self.other else ''}_it{iterations:03d}.npz"


@dataclass(frozen=True)
class Stretch:
    """Some iterations of a run, from 0: those from `start` to before `stop`."""

    line: Line
    start: int
    stop: int

    @property
    def name(self) -> str:
        """In the job's ledger."""
        return self.line.file(self.stop)


@dataclass(frozen=True, eq=False)
class State:
    """Maps (k, box, box, box) of a run, and the sums that they come from."""

    maps: Tensor
    sums: list[Backprojection]

    def save(self, path: Path) -> None:
        """Write both as one file."""
        sums = torch.stack([own.sums.data[..., :3] for own in self.sums]).cpu().numpy()
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, maps=self.maps.cpu().numpy(), sums=sums)

    @classmethod
    def load(cls, path: Path, plan: Plan) -> State:
        """Read what `save` wrote.

        Raises
        ------
        FileFormatError
            If it holds something else.
        """
        sums = empty_sums(plan)
        with np.load(path) as file:
            if set(file.files) != {"maps", "sums"} or len(file["sums"]) != len(sums):
                hint = "start anew"
                raise FileFormatError("is of another version of Halfmap", path=path, hint=hint)
            for own, data in zip(sums, file["sums"], strict=True):
                own.sums.data[..., :3] = torch.from_numpy(data).to(plan.device)
            return cls(torch.from_numpy(file["maps"]).to(plan.device), sums)


def read_maps(path: Path) -> Tensor:
    """Maps (k, box, box, box) of a file of `State.save`."""
    with np.load(path) as file:
        return torch.from_numpy(file["maps"])


def empty_sums(plan: Plan) -> list[Backprojection]:
    """Sums of nothing, for each map."""
    empty = functools.partial(Backprojection.empty, plan.box, plan.radius, group=plan.step.symmetry)
    return [empty(device=plan.device) for _ in range(plan.step.classes)]


def advance(stretch: Stretch, *, plan: Plan, folder: Path) -> dict[str, Any]:
    """Run some iterations of a run, and write what it has then.

    Parameters
    ----------
    stretch : Stretch
        The iterations.
    plan : Plan
        Sizes and schedule.
    folder : path
        Of spectra and states.

    Returns
    -------
    dict
        Figures of each iteration; where runs are compared, the log-evidence of particles that are the same
        in all.
    """
    spectra = Spectra.load(folder, plan.device)
    line, total = stretch.line, len(plan.iterations)
    fork, choice = plan.fork
    if not stretch.start:
        state = _begin(plan, spectra, line)
    elif line.other and stretch.start == fork:
        state = _turned(plan, State.load(folder / Line(line.run, other=False).file(fork), plan))
    else:
        state = State.load(folder / line.file(stretch.start), plan)
    figures = []
    for iteration in plan.iterations[stretch.start : stretch.stop]:
        state, said = _iterate(plan, spectra, state, iteration, plan.batch(line.run, iteration))
        figures.append({"run": line.run + 1, **said})
    state.save(folder / line.file(stretch.stop))
    if stretch.stop not in (choice, total):
        return {"figures": figures}
    return {
        "figures": figures,
        "evidence": _evidence(plan, spectra, state, plan.iterations[stretch.stop - 1].radius),
    }


def _turned(plan: Plan, state: State) -> State:
    """Maps whose part that is not spherical has the other sign.

    Projections of a ball are the same in all directions. While little is added to it, the likelihood, which
    is averaged over directions, depends on the square of that and not on its sign: half of the runs have
    the wrong one, and keep it.
    """
    maps = torch.stack([2 * spherical_average(each) - each for each in state.maps])
    return State(maps, empty_sums(plan))


def _evidence(plan: Plan, spectra: Spectra, state: State, radius: int) -> list[float]:
    """Log-evidence of some particles, always the same."""
    compare = Comparison(plan, spectra, state.maps, radius=radius, refined=False)
    return [
        evidence
        for rows, pictures in plan.images.stream(plan.judges(), BATCH)
        for evidence in compare(rows, pictures).log_evidence.tolist()
    ]


def solve(plan: Plan, spectra: Spectra, sums: list[Backprojection], radius: int) -> Tensor:
    """Maps (k, box, box, box) of greatest posterior, from frequencies to a radius."""
    with one_torch_thread():
        shells, data = shells_of(sums[0].sums), sums[0].sums.data
        reciprocal = spectra.signal.reciprocal().to(data)[shells.clamp_max(plan.radius)]
        prior = torch.where(shells > radius, _BEYOND * reciprocal, reciprocal)
        return torch.stack([own.solve(prior) for own in sums]) * plan.sphere().to(data.device)


def _begin(plan: Plan, spectra: Spectra, line: Line) -> State:
    """Maps of particles at random poses, others for each map."""
    first, sums = plan.iterations[0], empty_sums(plan)
    rows = plan.beginning(line.run)
    generator = torch.Generator().manual_seed(int(plan.random(line.run, 2, int(line.other)).integers(2**63)))
    for some, pictures in plan.images.stream(rows, BATCH):
        parameters, flipped = plan.source.ctf[torch.from_numpy(some)], torch.from_numpy(plan.flipped[some])
        with one_torch_thread():
            ready = prepare(
                pictures.to(plan.device),
                plan.image_mask(),
                parameters,
                plan.disc,
                plan.pixel_size,
                phase_flipped=flipped,
            )
            group = torch.from_numpy(plan.groups[some]).to(plan.device)
            noise = spectra.noise.of_images(group, ring_means(plan.disc, ready.ctf.square()))
        images = ready.weighted(ready.whole, torch.ones(len(some)), noise)
        for own in sums:
            rotations = random_rotations(len(some), generator=generator, dtype=torch.float64)
            own.add(images, rotations.to(plan.device), torch.zeros(len(some), 2, device=plan.device))
    return State(solve(plan, spectra, sums, first.radius), sums)


def _iterate(
    plan: Plan, spectra: Spectra, state: State, iteration: Iteration, rows: NDArray[np.intp]
) -> tuple[State, dict[str, Any]]:
    """One iteration on some particles, and its figures."""
    compare = Comparison(plan, spectra, state.maps, radius=iteration.radius, refined=False)
    sums = empty_sums(plan)
    evidence, spread, members = 0.0, 0.0, torch.zeros(plan.step.classes, dtype=torch.float64)
    for some, pictures in plan.images.stream(rows, BATCH):
        posterior = compare(some, pictures)
        posterior.add_to(sums)
        evidence += float(posterior.log_evidence.sum())
        spread += sum(
            float((one.shares * one.shares.clamp_min(1e-30).log()).sum()) for one in posterior.found
        )
        members += posterior.classes.sum(0).double().cpu()
    rate = iteration.rate
    if rate < 1:
        sums = [_blend(own, before, rate) for own, before in zip(sums, state.sums, strict=True)]
    maps = solve(plan, spectra, sums, iteration.radius)
    shares = (members / members.sum()).tolist()
    return State(maps, sums), {
        "iteration": iteration.number,
        "particles": len(rows),
        "searched_A": plan.side / iteration.radius,
        "mean_evidence": evidence / len(rows),
        "entropy": -spread / len(rows) / len(shares),
        "shares": shares,
    }


def _blend(new: Backprojection, old: Backprojection, rate: float) -> Backprojection:
    """New sums beside part of the old ones."""
    data = new.sums.data + (1 - rate) * old.sums.data
    return Backprojection(SliceAccumulator(data, new.sums.box, new.sums.padded_box), new.group)
