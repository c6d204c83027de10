"""All particles against the maps that runs agree in: poses, classes, and the final maps."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.errors import ItemsFailedError
from halfmap.io.atomic import atomic_path
from halfmap.log import log
from halfmap.ops import symmetry
from halfmap.search.backprojector import Backprojection
from halfmap.search.checkpoint import load_arrays, save_arrays
from halfmap.search.halfmaps import load_sums, save_sums
from halfmap.steps.abinitio.consensus import Agreement
from halfmap.steps.abinitio.expectation import BATCH, Comparison, Posterior
from halfmap.steps.abinitio.plan import Plan
from halfmap.steps.abinitio.rounds import FOLDER
from halfmap.steps.abinitio.run import empty_sums, solve
from halfmap.steps.abinitio.spectra import Spectra

if TYPE_CHECKING:
    from halfmap.engine import Context

BEST = (
    "row",
    "class",
    *(f"r{i}{j}" for i in range(3) for j in range(3)),
    "x",
    "y",
    "share",
    "class_probability",
    "evidence",
    "pose_error",
    "shift_error",
)
"""What is kept of each particle: its row; its most probable class; its best rotation and shift in Å there;
the part of that class' posterior that this maximum holds; the probability of the class; the logarithm of its
likelihood over that of noise alone; standard deviations of the rotation in degrees and of the shift in Å."""

ROTATION = slice(2, 11)

_WIDEST = 104.0
"""Standard deviation in degrees of an angle of which nothing is known."""

_REFERENCES, _RESULT = "references.npy", "result.npz"


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the particles."""

    name: str
    rows: NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Result:
    """Final maps (k, box, box, box), and what was found for each particle (n, columns); see `BEST`."""

    maps: Tensor
    best: NDArray[np.float64]

    @property
    def members(self) -> NDArray[np.intp]:
        """Number of particles (k,) whose most probable class is each."""
        return np.bincount(self.best[:, BEST.index("class")].astype(np.intp), minlength=len(self.maps))


def assign(ctx: Context, plan: Plan, agreed: Agreement) -> Result:
    """Place all particles, and make the final maps of them.

    Raises
    ------
    ItemsFailedError
        If a part of the particles failed.
    """
    folder = ctx.folder / FOLDER
    file = folder / _RESULT
    if not file.exists():
        placed = _place_all(ctx, plan, agreed, folder)
        save_arrays(file, maps=placed.maps.numpy(), best=placed.best)
    for part in (*folder.glob("part*.npy"), folder / _REFERENCES):
        part.unlink(missing_ok=True)
    kept = load_arrays(file)
    return Result(torch.from_numpy(kept["maps"]), kept["best"])


def _place_all(ctx: Context, plan: Plan, agreed: Agreement, folder: Path) -> Result:
    with atomic_path(folder / _REFERENCES) as temporary, temporary.open("wb") as file:
        np.save(file, agreed.maps.numpy())
    parts = [Part(f"part{i + 1:02d}", rows) for i, rows in enumerate(plan.parts())]
    done = ctx.map(functools.partial(place, plan=plan, folder=folder), parts, key=_name, unit="part")
    if len(done) < len(parts):
        raise ItemsFailedError("a part of the particles failed", hint="see the errors above; then resume")
    sums: list[Backprojection] = []
    for number in range(plan.step.classes):
        together: Backprojection | None = None
        for one in done:
            part = load_sums(_sums_file(folder, one["part"], number), one["box"], one["padded_box"])
            together = part if together is None else together + part
        assert together is not None
        sums.append(together)
    maps = solve(plan, Spectra.load(folder, "cpu"), sums, plan.radius)
    best = np.concatenate([np.load(folder / f"{one['part']}.npy") for one in done])
    result = Result(maps, best[np.argsort(best[:, 0])])
    share, error = (result.best[:, BEST.index(name)] for name in ("share", "pose_error"))
    log.info(
        "particles placed: %s in the maps; median pose error %.1f°, the best pose holds %.2f on average",
        *(", ".join(f"{count:,}" for count in result.members), float(np.median(error)), float(share.mean())),
    )
    return result


def place(part: Part, *, plan: Plan, folder: Path) -> dict[str, Any]:
    """Find the poses of some particles, and write these and what the images add up to as files."""
    references = torch.from_numpy(np.load(folder / _REFERENCES)).to(plan.device)
    spectra = Spectra.load(folder, plan.device)
    compare = Comparison(plan, spectra, references, radius=plan.radius, refined=True)
    sums, best = empty_sums(plan), []
    for rows, pictures in plan.images.stream(part.rows, BATCH):
        posterior = compare(rows, pictures)
        posterior.add_to(sums)
        best.append(_table(plan, posterior))
    for number, own in enumerate(sums):
        whole = own if symmetry.order(plan.step.symmetry) == 1 else own.symmetrised()
        save_sums(_sums_file(folder, part.name, number), whole)
    with atomic_path(folder / f"{part.name}.npy", durable=False) as temporary, temporary.open("wb") as file:
        np.save(file, np.concatenate(best))
    return {"part": part.name, "box": plan.box, "padded_box": sums[0].sums.padded_box}


def _name(part: Part) -> str:
    return part.name


def _sums_file(folder: Path, part: str, number: int) -> Path:
    return folder / f"{part}_class{number + 1:03d}_sums.npy"


def _table(plan: Plan, posterior: Posterior) -> NDArray[np.float64]:
    """What is kept of each particle; see `BEST`."""
    chosen = posterior.classes.argmax(1).cpu()
    whole = torch.arange(len(chosen))
    tables = [_poses(plan, posterior, number) for number in range(len(posterior.found))]
    poses = torch.stack(tables)[chosen, whole]
    columns = [
        torch.from_numpy(posterior.rows),
        chosen,
        *poses[:, :12].unbind(1),
        posterior.classes.cpu()[whole, chosen],
        posterior.log_evidence.cpu(),
        *poses[:, 12:].unbind(1),
    ]
    return torch.stack([column.double() for column in columns], dim=1).numpy()


def _poses(plan: Plan, posterior: Posterior, number: int) -> Tensor:
    """Rotation, shift, share and errors (b, 14) of the best pose of each image against one map."""
    found = posterior.found[number]
    n = len(posterior.rows)
    first = torch.searchsorted(found.owner, torch.arange(n, device=found.owner.device))
    errors = torch.full((n, 2), _WIDEST, dtype=torch.float64)
    errors[:, 1] = plan.shift_range
    if found.maxima is not None:
        variance = found.maxima.poses.covariance[first].diagonal(dim1=1, dim2=2).cpu()
        errors[:, 0] = torch.rad2deg(variance[:, :3].sum(1).sqrt()).clamp_max(_WIDEST)
        shift = variance[:, 3:].mean(1).sqrt() * plan.pixel_size
        errors[:, 1] = shift.clamp_max(plan.shift_range)
    shifts = found.shifts_px[first].cpu() * plan.pixel_size
    return torch.cat(
        [
            found.rotations[first].flatten(1).cpu(),
            shifts,
            found.shares[first, None].double().cpu(),
            errors,
        ],
        dim=1,
    )
