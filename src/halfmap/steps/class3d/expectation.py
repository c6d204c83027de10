"""The expectation step on a part of a fold: classes, poses, and what the images add up to."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.io.atomic import atomic_path
from halfmap.ops import symmetry
from halfmap.ops.threads import one_torch_thread
from halfmap.search.backprojector import Backprojection
from halfmap.search.checkpoint import load_arrays
from halfmap.search.disc import DiscImages, FourierDisc
from halfmap.search.given_poses import Expansion
from halfmap.search.lens_noise import LensNoise, NoiseSums, ring_means
from halfmap.search.local import LocalPoses
from halfmap.search.maxima import Maxima, climb, search_everywhere
from halfmap.search.noise import ResidualSums
from halfmap.search.polar import PolarGrid
from halfmap.search.prepared import PreparedImages, on_rings, prepare
from halfmap.search.projector import SplineVolume, sample_slices
from halfmap.search.sampling import DirectionSearch
from halfmap.search.stages import ascents, coarse_grid
from halfmap.search.stored_sums import store

if TYPE_CHECKING:
    from halfmap.steps.class3d.model import Model
    from halfmap.steps.class3d.plan import Plan

BEST = (
    "row",
    "class",
    *(f"r{i}{j}" for i in range(3) for j in range(3)),
    "x",
    "y",
    "share",
    "class_probability",
    "entropy",
    "evidence",
    "pose_error",
    "view_error",
    "psi_error",
    "shift_error",
    "match",
    "norm",
)
"""What is kept of each particle: its row; its most probable class; its best rotation and shift in Å there;
the part of that class' posterior that this pose holds; the probability of the class; the entropy of classes
and poses in nats; the logarithm of its likelihood over that of noise alone; standard deviations of the
rotation, of the view along an axis and of the angle in the plane in degrees, and of the shift along an axis
in Å; its product with the projection and the projection's norm over the noise, without scale."""

ROTATION = slice(2, 11)

_AROUND = 2.0
"""Steps of the grid of shifts within which they are searched about those found before."""

_COARSE_STARTS, _STARTS, _KEPT = 24, 8, 4
"""Poses kept of the grid, of its finer part, and of all classes together for the next iteration."""

_NEGLIGIBLE = 1e-3
"""Probability of a class and a pose that is not worth putting an image back."""

_WIDEST = 104.0
"""Standard deviation in degrees of an angle of which nothing is known."""

_SAMPLES, _BATCH = 1 << 20, 64
"""Coefficients and images that are worked on at a time."""


@dataclass(frozen=True, eq=False)
class Part:
    """Some particles of one fold."""

    name: str
    fold: int
    rows: NDArray[np.intp]


@functools.lru_cache(maxsize=1)
def _load(path: Path, stamp: int, device: str) -> Model:
    from halfmap.steps.class3d.model import Model

    return Model.load(path, device)


@functools.lru_cache(maxsize=1)
def _load_poses(path: Path, stamp: int) -> dict[str, NDArray]:
    """Poses of all particles: those given, or maxima that the iteration before has found."""
    return load_arrays(path)


def expect(
    part: Part, *, plan: Plan, model_file: Path, poses_file: Path | None, folder: Path
) -> dict[str, Any]:
    """Find classes and poses of the particles of a part, and write what they add up to as files.

    Parameters
    ----------
    part : Part
        The particles.
    plan, model_file
        The classification and its model.
    poses_file : path, optional
        Poses to begin from, if there are any.
    folder : path
        Where the files go.
    """
    model = _load(model_file, model_file.stat().st_mtime_ns, plan.device)
    poses = None if poses_file is None else _load_poses(poses_file, poses_file.stat().st_mtime_ns)
    work = _Work.of(plan, model, part, poses)
    disc, k = plan.disc, len(model.shares)
    group, device = plan.step.symmetry, plan.device
    sums = [Backprojection.empty(plan.box, disc.radius, group=group, device=device) for _ in range(k)]
    noise = NoiseSums.empty(plan.n_groups, disc.radius + 1)
    overlap, best, maxima = torch.zeros(k, k, dtype=torch.float64), [], []
    for rows, pictures in plan.source.images.stream(part.rows, work.batch):
        batch = prepared(plan, model, rows, pictures, disc, plan.pixel_size)
        found = work.find(batch, pictures)
        classes, evidence = work.classes(rows, found)
        left = work.put_back(batch, found, classes, sums)
        noise.add(left.power / left.count, batch.transfer, torch.from_numpy(plan.groups[rows]))
        overlap += (classes.T @ classes).cpu()
        best.append(work.table(batch, found, classes, evidence, left))
        maxima.append(work.kept(rows, found, classes))
    sizes: list[int] = []
    for number, own in enumerate(sums):
        whole = own if symmetry.order(group) == 1 else own.symmetrised()
        sizes = store(folder / f"{part.name}_class{number + 1:03d}_sums.npy", whole)
    with atomic_path(folder / f"{part.name}.npz", durable=False) as temporary, temporary.open("wb") as file:
        together = {name: np.concatenate([each[name] for each in maxima]) for name in maxima[0]}
        arrays = {"noise": noise.moments.numpy(), "overlap": overlap.numpy(), "best": np.concatenate(best)}
        np.savez(file, allow_pickle=False, **arrays, **together)
    return {"part": part.name, "fold": part.fold, "classes": k, "sizes": sizes}


@dataclass(frozen=True, eq=False)
class _Batch:
    """Images made ready: rows, coefficients, mean squared CTF and noise on rings, scale."""

    rows: NDArray[np.intp]
    ready: PreparedImages
    transfer: Tensor
    noise: Tensor
    scale: Tensor
    images: DiscImages


@one_torch_thread()
def prepared(
    plan: Plan, model: Model, rows: NDArray[np.intp], pictures: Tensor, disc: FourierDisc, pixel_size: float
) -> _Batch:
    """Coefficients, CTFs and weights of some images."""
    ready = prepare(
        pictures.to(plan.device),
        plan.image_mask(),
        plan.source.ctf[torch.from_numpy(rows)],
        disc,
        pixel_size,
        phase_flipped=torch.from_numpy(plan.flipped[rows]),
    )
    transfer = ring_means(disc, ready.ctf.square())
    group = torch.from_numpy(plan.groups[rows]).to(plan.device)
    noise = LensNoise(*model.noise).of_images(group, transfer)
    scale = model.scale[torch.from_numpy(plan.micrographs[rows])] * model.contrast[torch.from_numpy(rows)]
    images = ready.weighted(ready.masked, scale, noise)
    return _Batch(rows, ready, transfer, noise, scale, images)


@dataclass(frozen=True, eq=False)
class _Work:
    """What all batches of a part share."""

    plan: Plan
    model: Model
    poses: dict[str, NDArray] | None
    volumes: tuple[SplineVolume, ...]
    searches: tuple[DirectionSearch, ...]
    radii: tuple[float, ...]

    @classmethod
    @one_torch_thread()
    def of(cls, plan: Plan, model: Model, part: Part, poses: dict[str, NDArray] | None) -> _Work:
        reach = min(model.radius + 1, plan.box // 2)
        volumes = tuple(SplineVolume.of(each, radius_px=reach) for each in model.references[part.fold])
        if model.stage != "everywhere":
            return cls(plan, model, poses, volumes, (), (model.radius,))
        order, coarse = coarse_grid(model.radius, plan.side / plan.diameter)
        grid = PolarGrid(plan.box, coarse, plan.support_px, device=plan.device)
        step = plan.box / (2 * math.pi * coarse) * math.sqrt(2)
        how = {
            "order": order,
            "group": plan.step.symmetry,
            "range_px": plan.shift_range / plan.pixel_size if poses is None else _AROUND * step,
            "step_px": step,
            # About the shifts found before, which the prior has had its part in, there is none.
            "deviation_px": math.inf if poses else model.deviation_A / plan.pixel_size,
            "most": _COARSE_STARTS,
        }
        searches = tuple(DirectionSearch(grid, volume, **how) for volume in volumes)
        return cls(plan, model, poses, volumes, searches, ascents(coarse, model.radius))

    @property
    def batch(self) -> int:
        return int(np.clip(_SAMPLES // len(self.plan.disc.points), 4, _BATCH))

    @property
    def deviation_px(self) -> float:
        return self.model.deviation_A / self.plan.pixel_size

    def find(self, batch: _Batch, pictures: Tensor) -> list[Maxima]:
        """Likely poses of each image against each map."""
        if self.model.stage == "given":
            return self._at_given(batch)
        if self.model.stage == "near":
            return self._near(batch)
        with one_torch_thread():
            samples, transfer = on_rings(
                pictures.to(self.plan.device),
                self.plan.image_mask(),
                self.plan.source.ctf[torch.from_numpy(batch.rows)],
                self.searches[0].grid,
                self.plan.pixel_size,
                phase_flipped=torch.from_numpy(self.plan.flipped[batch.rows]),
            )
            scaled = transfer * batch.scale[:, None, None]
        on_grid = samples, scaled, batch.noise[:, : self.searches[0].grid.rings]
        centres = None
        if self.poses is not None:
            first = np.searchsorted(self.poses["owner"], batch.rows)
            centres = torch.from_numpy(self.poses["shifts_A"][first] / self.plan.pixel_size)
        how = {"radii": self.radii, "deviation_px": self.deviation_px, "group": self.plan.step.symmetry}
        return [
            search_everywhere(
                search, volume, batch.images, *on_grid, centres_px=centres, starts=_STARTS, **how
            )[0]
            for search, volume in zip(self.searches, self.volumes, strict=True)
        ]

    def _near(self, batch: _Batch) -> list[Maxima]:
        """Climb from the poses of the iteration before."""
        assert self.poses is not None
        own, owner = _of_rows(self.poses["owner"], batch.rows)
        start = (
            torch.from_numpy(self.poses["rotations"][own]),
            torch.from_numpy(self.poses["shifts_A"][own] / self.plan.pixel_size),
            torch.from_numpy(owner).to(self.plan.device),
        )
        how = {"radii": self.radii, "deviation_px": self.deviation_px, "group": self.plan.step.symmetry}
        return [climb(volume, batch.images, *start, **how) for volume in self.volumes]

    def _at_given(self, batch: _Batch) -> list[Maxima]:
        """Compare at the poses given, which are off by as much as is stated or as the image allows."""
        assert self.poses is not None
        device = self.plan.device
        rotations = torch.from_numpy(self.poses["rotations"][batch.rows]).to(device)
        shifts = torch.from_numpy(self.poses["shifts_A"][batch.rows] / self.plan.pixel_size).to(device)
        radius = self.model.radius
        expanded = [
            Expansion.of(volume, batch.images, rotations, shifts, radius=radius) for volume in self.volumes
        ]
        stated = torch.from_numpy(self.poses["precision"][batch.rows]).to(device)
        fisher = torch.stack([each.matrix for each in expanded]).mean(0)
        precision = torch.diag_embed(stated) if stated.shape[1] else _positive(fisher)
        whole = torch.arange(len(batch.rows), device=device)
        ones = torch.ones(len(whole), dtype=torch.float64, device=device)
        return [
            Maxima(
                LocalPoses(rotations, shifts, each.value, precision),
                whole,
                ones,
                each.evidence(precision),
            )
            for each in expanded
        ]

    def classes(self, rows: NDArray[np.intp], found: list[Maxima]) -> tuple[Tensor, Tensor]:
        """Probabilities (b, classes) of the classes, and the evidence (b,) of all of them."""
        logs = torch.stack([each.log_evidence for each in found], dim=1).double()
        logs = logs + self.model.shares.to(logs).clamp_min(1e-12).log()
        classes, evidence = logs.softmax(1), logs.logsumexp(1)
        forced = self.model.forced[torch.from_numpy(rows)].to(classes.device)
        drawn = torch.eye(classes.shape[1], dtype=classes.dtype, device=classes.device)[forced.clamp_min(0)]
        return torch.where(forced[:, None] < 0, classes, drawn), evidence

    @one_torch_thread()
    def put_back(
        self, batch: _Batch, found: list[Maxima], classes: Tensor, sums: list[Backprojection]
    ) -> ResidualSums:
        """Add images at their poses to the sums of classes; what the maps leave of each (b, rings)."""
        ready, disc = batch.ready, self.plan.disc
        weighted = ready.weighted(ready.whole, batch.scale, batch.noise)
        known, total = disc.count(self.model.radius), None
        for number, (own, each) in enumerate(zip(sums, found, strict=True)):
            weights = (each.shares * classes[each.owner, number]).float()
            kept = weights > _NEGLIGIBLE
            rotations, shifts, owner = (
                each.poses.rotations[kept],
                each.poses.shifts_px[kept],
                each.owner[kept],
            )
            weights = weights[kept]
            own.add(weighted, rotations, shifts, weights, owner=owner)
            slices = ready.whole.new_zeros(len(rotations), len(disc.points))
            volume = self.volumes[number]
            slices[:, :known] = sample_slices(volume, rotations, disc.points[:known])
            moved = ready.whole[owner] * disc.shifts(shifts)
            left = ResidualSums.of(
                disc, moved, ready.ctf[owner], slices, owner, scale=batch.scale, weights=weights
            )
            total = left if total is None else total + left
        assert total is not None
        return total

    @one_torch_thread()
    def table(
        self, batch: _Batch, found: list[Maxima], classes: Tensor, evidence: Tensor, left: ResidualSums
    ) -> NDArray[np.float64]:
        """What is kept of each particle; see `BEST`."""
        classes, plan = classes.cpu(), self.plan
        chosen, b = classes.argmax(1), torch.arange(len(classes))
        poses = torch.stack([self._best(each) for each in found])[chosen, b]
        entropy = -torch.xlogy(classes, classes).sum(1)
        for number, each in enumerate(found):
            own = -torch.xlogy(each.shares, each.shares).double().cpu()
            own = torch.zeros(len(b), dtype=torch.float64).index_add_(0, each.owner.cpu(), own)
            entropy += classes[:, number] * own
        variance = poses[:, 12:17]
        degrees = torch.rad2deg(variance[:, :3].sqrt()).clamp_max(_WIDEST).square()
        shift = variance[:, 3:].mean(1).sqrt() * plan.pixel_size
        columns = [
            torch.from_numpy(batch.rows),
            chosen,
            *poses[:, :9].unbind(1),
            *(poses[:, 9:11] * plan.pixel_size).unbind(1),
            poses[:, 11],
            classes[b, chosen],
            entropy,
            evidence.cpu(),
            degrees.sum(1).sqrt(),
            degrees[:, :2].mean(1).sqrt(),
            degrees[:, 2].sqrt(),
            shift.clamp_max(plan.shift_range),
            (left.cross / batch.noise)[:, 1:].sum(1).cpu(),
            (left.model / batch.noise)[:, 1:].sum(1).cpu(),
        ]
        return torch.stack([column.double() for column in columns], dim=1).numpy()

    def _best(self, found: Maxima) -> Tensor:
        """Rotation, shift, share and variances (n, 17) of the best pose of each image."""
        first, poses = found.best, found.poses
        parts = (
            poses.rotations[first].flatten(1),
            poses.shifts_px[first],
            found.shares[first, None],
            poses.covariance[first].diagonal(dim1=1, dim2=2),
        )
        return torch.cat([part.double().cpu() for part in parts], dim=1)

    def kept(self, rows: NDArray[np.intp], found: list[Maxima], classes: Tensor) -> dict[str, NDArray]:
        """The most probable poses of each image over all classes, as the next iteration begins at."""
        if self.model.stage == "given":
            return {}
        weight = torch.cat([f.shares * classes[f.owner, i] for i, f in enumerate(found)])
        owner = torch.cat([each.owner for each in found])
        order = torch.argsort(weight, descending=True, stable=True)
        order = order[torch.argsort(owner[order], stable=True)]
        whose = owner[order]
        rank = torch.arange(len(order), device=order.device) - torch.searchsorted(whose, whose)
        order = order[(rank < _KEPT) & ((weight[order] > _NEGLIGIBLE) | (rank == 0))].cpu()
        return {
            "owner": rows[owner.cpu()[order].numpy()],
            "rotations": torch.cat([each.poses.rotations for each in found]).cpu()[order].numpy(),
            "shifts_A": torch.cat([each.poses.shifts_px for each in found]).cpu()[order].numpy()
            * self.plan.pixel_size,
        }


def _positive(matrix: Tensor) -> Tensor:
    """Matrices (b, 5, 5) with what they hardly determine kept from nothing."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    return matrix + torch.diag_embed(1e-3 * diagonal + 1e-6)


def _of_rows(owners: NDArray, rows: NDArray[np.intp]) -> tuple[NDArray, NDArray[np.intp]]:
    """Places in sorted `owners` of the entries of some rows, and which of the rows each belongs to."""
    first, stop = np.searchsorted(owners, rows), np.searchsorted(owners, rows, side="right")
    owner = np.repeat(np.arange(len(rows)), stop - first)
    begin = np.cumsum(stop - first) - (stop - first)
    return np.arange(len(owner)) - begin[owner] + first[owner], owner
