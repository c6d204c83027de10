"""The expectation step on a part of a half set: poses, and what the images add up to at these."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.io.atomic import atomic_path
from halfmap.ops import symmetry
from halfmap.ops.symmetry import symmetric_distance
from halfmap.search.backprojector import Backprojection
from halfmap.search.disc import DiscImages, FourierDisc
from halfmap.search.lens_noise import LensNoise, NoiseSums, ring_means
from halfmap.search.local import LocalPoses
from halfmap.search.maxima import Maxima, climb, search_everywhere
from halfmap.search.noise import ResidualSums
from halfmap.search.polar import PolarGrid
from halfmap.search.pose_information import without_noise
from halfmap.search.prepared import PreparedImages, on_rings, prepare
from halfmap.search.projector import SplineVolume, sample_slices
from halfmap.search.sampling import DirectionSearch
from halfmap.search.stages import ascents, coarse_grid
from halfmap.search.stored_sums import store
from halfmap.steps.refine.searched import FAINT, SearchedSums

if TYPE_CHECKING:
    from halfmap.steps.refine.model import Model
    from halfmap.steps.refine.plan import Plan

BEST = (
    "row",
    *(f"r{i}{j}" for i in range(3) for j in range(3)),
    "x",
    "y",
    "share",
    "significant",
    "evidence",
    "pose_error",
    "view_error",
    "psi_error",
    "shift_error",
    "match",
    "norm",
    "turned",
    "error_before",
)
"""What is kept of each particle: its row; its best rotation and shift in Å; the part of the posterior that
this maximum holds; maxima that it is put back at; the logarithm of its likelihood over that of noise alone;
standard deviations of the rotation, of the view along an axis and of the angle in the plane in degrees, and
of the shift along an axis in Å; its product with the projection and the projection's norm over the noise,
without scale; the angle from its last pose, and the error of that."""

ROTATION = slice(1, 10)

_AROUND = 2.0
"""Steps of the grid of shifts within which they are searched about those found before."""

_COARSE_STARTS, _STARTS, MAXIMA = 24, 8, 4
"""Poses kept of the grid, of its finer part, and in the end."""

_TRUST = 0.01
"""Least weight of an image for the error of its pose: where all are bad, they count alike."""

_SAMPLES = 1 << 20
_BATCH = 64
"""Coefficients and images that are worked on at a time."""


@dataclass(frozen=True, eq=False)
class Part:
    """Some particles of one half set."""

    name: str
    half: int
    number: int
    rows: NDArray[np.intp]


@functools.lru_cache(maxsize=1)
def _load(path: Path, stamp: int, device: str) -> Model:
    from halfmap.steps.refine.model import Model

    return Model.load(path, device)


@functools.lru_cache(maxsize=1)
def load_poses(path: Path, stamp: int) -> dict[str, NDArray]:
    """Maxima of all particles, as the iteration before has found them; the stamp is the file's."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def reference_file(folder: Path, iteration: int, half: int, number: int) -> Path:
    """File of the map that particles of a part of a half set are compared with after an iteration."""
    return folder / f"it{iteration:03d}_reference{half + 1}_{number + 1}.npy"


def expect(
    part: Part, *, plan: Plan, model_file: Path, poses_file: Path | None, folder: Path
) -> dict[str, Any]:
    """Find the poses of the particles of a part, and write what they add up to as files.

    Parameters
    ----------
    part : Part
        The particles.
    plan, model_file
        The refinement and its model.
    poses_file : path, optional
        Maxima of the iteration before, if there was one.
    folder : path
        Where the files go.
    """
    model = _load(model_file, model_file.stat().st_mtime_ns, plan.device)
    reference = np.load(reference_file(folder, model.iteration, part.half, part.number))
    work = _Work.of(plan, model, part, torch.from_numpy(reference).to(plan.device))
    poses = None if poses_file is None else load_poses(poses_file, poses_file.stat().st_mtime_ns)
    searched = None if plan.searched is None else SearchedSums.empty(plan.n_groups, work.disc.radius + 1)
    sums = Backprojection.empty(
        work.disc.box,
        work.disc.radius,
        group=plan.step.symmetry,
        padding=plan.padding,
        device=plan.device,
    )
    noise = NoiseSums.empty(plan.n_groups, work.disc.radius + 1)
    best, maxima = [], []
    for rows, pictures in plan.source.images.stream(part.rows, work.batch):
        raw = work.view(rows, pictures)
        seen = work.searched_view(rows, raw) or raw
        found = work.find(rows, seen, poses)
        left, group = work.left(rows, raw, found), torch.from_numpy(plan.groups[rows])
        noise.add(left.power / left.count, raw.transfer, group)
        if searched is not None:
            searched.add(
                work.left(rows, seen, found),
                left,
                amplitude=seen.amplitude[:, : work.disc.radius + 1],
                transfer=seen.transfer,
                error=seen.error,
                scale=work.scale(rows),
                group=group,
            )
        found = work.in_one_frame(work.as_sure(rows, found))
        work.put_back(rows, raw, found, sums)
        best.append(work.table(rows, found, left, raw.masked, poses))
        maxima.append(work.kept(rows, found))
    del work  # Its volume is as large as the sums are.
    whole = sums if symmetry.order(plan.step.symmetry) == 1 else sums.symmetrised()
    sizes = store(folder / f"{part.name}_sums.npy", whole)
    path = folder / f"{part.name}.npz"
    with atomic_path(path, durable=False) as temporary, temporary.open("wb") as file:
        together = {name: np.concatenate([each[name] for each in maxima]) for name in maxima[0]}
        arrays = {"noise": noise.moments.numpy(), "best": np.concatenate(best), **together}
        if searched is not None:
            arrays |= {"searched": searched.noise.moments.numpy(), "match": searched.match.numpy()}
        np.savez(file, allow_pickle=False, **arrays)
    return {"part": part.name, "half": part.half, "sizes": sizes}


@dataclass(frozen=True, eq=False)
class _View:
    """Images of a batch, as they are and made ready.

    Attributes
    ----------
    pictures : Tensor (b, n, n)
    flipped : array (b,) of bool
    amplitude : Tensor (b, nyquist + 1)
        Of the signal over that of the raw images, on all rings.
    ready : PreparedImages
    transfer, error, power, masked : Tensor (b, rings)
        Mean squared CTF of the microscope; power of noise and bias in their micrographs over that of all;
        power of the noise of whole and of masked images.
    """

    pictures: Tensor
    flipped: NDArray[np.bool_]
    amplitude: Tensor
    ready: PreparedImages
    transfer: Tensor
    error: Tensor
    power: Tensor
    masked: Tensor


@dataclass(frozen=True, eq=False)
class _Work:
    """What all batches of a part share."""

    plan: Plan
    model: Model
    half: int
    disc: FourierDisc
    volume: SplineVolume
    search: DirectionSearch | None
    radii: tuple[float, ...]
    leakage: Tensor

    @classmethod
    def of(cls, plan: Plan, model: Model, part: Part, reference: Tensor) -> _Work:
        half = part.half
        disc = plan.whole_disc() if model.stage == "last" else plan.disc(model.radius)
        reach = min(model.radius + 1, len(reference) // 2)
        volume = SplineVolume.of(reference, radius_px=reach, padding=plan.padding)
        leaks = plan.leakage[: disc.radius + 1, : disc.radius + 1].float().to(plan.device)
        leaks = leaks / leaks.sum(1, keepdim=True)
        order, coarse = coarse_grid(model.radius, plan.side / plan.diameter)
        if model.stage != "everywhere":
            radii = (model.radius,) if model.iteration else ascents(coarse, model.radius)
            return cls(plan, model, half, disc, volume, None, radii, leaks)
        grid = PolarGrid(disc.box, coarse, plan.support_px(disc.box), device=plan.device)
        pixel_size, deviation = plan.side / disc.box, float(model.deviation_A[half])
        step = plan.side / (2 * math.pi * coarse) * math.sqrt(2)
        first = model.iteration == 0
        search = DirectionSearch(
            grid,
            volume,
            order=order,
            group=plan.step.symmetry,
            range_px=(plan.shift_range if first else _AROUND * step) / pixel_size,
            step_px=step / pixel_size,
            # About the shifts found before, which the prior has had its part in, there is none.
            deviation_px=deviation / pixel_size if first else math.inf,
            most=_COARSE_STARTS,
        )
        return cls(plan, model, half, disc, volume, search, ascents(coarse, model.radius), leaks)

    @property
    def pixel_size(self) -> float:
        return self.plan.side / self.disc.box

    @property
    def batch(self) -> int:
        return int(np.clip(_SAMPLES // len(self.disc.points), 4, _BATCH))

    @property
    def deviation_px(self) -> float:
        return float(self.model.deviation_A[self.half]) / self.pixel_size

    def view(self, rows: NDArray[np.intp], pictures: Tensor) -> _View:
        """Raw images made ready."""
        one = torch.ones(1, 1, device=self.plan.device)
        ready = self.made_ready(rows, pictures, self.plan.flipped)
        transfer = ring_means(self.disc, ready.ctf.square())
        power = self.noise(rows, transfer, self.model.noise)
        amplitude = one.expand(len(rows), self.plan.nyquist + 1)
        return _View(
            pictures, self.plan.flipped[rows], amplitude, ready, transfer, one, power, self.leaked(power)
        )

    def searched_view(self, rows: NDArray[np.intp], raw: _View) -> _View | None:
        """The images that poses are searched in, if those are others.

        Maps, which raw images make, leave their noise and their bias. How these differ from micrograph to
        micrograph is known by measurement. What a network makes of an image cannot say more of its pose than
        the image does: at the signal's amplitude there is no less noise than in the raw one.
        """
        searched, model = self.plan.searched, self.model
        if searched is None:
            return None
        of_micrograph = torch.from_numpy(self.plan.micrographs[rows])
        fitted = model.transfer[self.half, torch.from_numpy(self.plan.groups[rows])]
        amplitude = torch.where(fitted > FAINT, fitted, 0.0) * searched.amplitude[of_micrograph].to(fitted)
        pictures = searched.pictures(rows)
        ready = self.made_ready(rows, pictures, searched.flipped)
        ready = replace(ready, ctf=ready.ctf * amplitude[:, self.disc.rings])
        rings = self.disc.radius + 1
        error = searched.error[of_micrograph, :rings].to(fitted)
        power = self.noise(rows, raw.transfer, model.searched) * error
        power = power.maximum(raw.power * amplitude[:, :rings].square())
        return _View(
            pictures, searched.flipped[rows], amplitude, ready, raw.transfer, error, power, self.leaked(power)
        )

    def made_ready(
        self, rows: NDArray[np.intp], pictures: Tensor, flipped: NDArray[np.bool_]
    ) -> PreparedImages:
        return prepare(
            pictures.to(self.plan.device),
            self.plan.image_mask(),
            self.plan.source.ctf[torch.from_numpy(rows)],
            self.disc,
            self.pixel_size,
            phase_flipped=torch.from_numpy(flipped[rows]),
        )

    def noise(self, rows: NDArray[np.intp], transfer: Tensor, parts: Tensor) -> Tensor:
        """Power of the noise (b, rings) of one kind of images, by the mean squared CTF on the rings."""
        group = torch.from_numpy(self.plan.groups[rows]).to(transfer.device)
        return LensNoise(*parts[self.half]).of_images(group, transfer)

    def leaked(self, power: Tensor) -> Tensor:
        """Power of the noise of masked images."""
        return power.maximum(power @ self.leakage.T)

    def scale(self, rows: NDArray[np.intp]) -> Tensor:
        return self.model.scale[self.half, torch.from_numpy(self.plan.micrographs[rows])]

    def find(self, rows: NDArray[np.intp], seen: _View, poses: dict[str, NDArray] | None) -> Maxima:
        """Maxima of the posterior of each image."""
        scale = self.scale(rows)
        images = seen.ready.weighted(seen.ready.masked, scale, seen.masked)
        how = {"radii": self.radii, "deviation_px": self.deviation_px, "group": self.plan.step.symmetry}
        if self.search is None:
            assert poses is not None
            own, owner = _of_rows(poses["owner"], rows)
            rotations, given = torch.from_numpy(poses["rotations"][own]), self.plan.given
            return climb(
                self.volume,
                images,
                rotations,
                torch.from_numpy(poses["shifts_A"][own] / self.pixel_size),
                torch.from_numpy(owner).to(images.linear.device),
                prior=None if given is None else given.prior(rows[owner], rotations, self.pixel_size),
                priors=1 if given is None else len(given.equivalents),
                most=MAXIMA if given is None else max(MAXIMA, len(given.equivalents)),
                **how,
            )
        samples, transfer = on_rings(
            seen.pictures.to(self.plan.device),
            self.plan.image_mask(),
            self.plan.source.ctf[torch.from_numpy(rows)],
            self.search.grid,
            self.pixel_size,
            phase_flipped=torch.from_numpy(seen.flipped),
        )
        transfer = transfer * seen.amplitude[:, : transfer.shape[1], None]
        on_grid = samples, transfer * scale[:, None, None], seen.masked[:, : self.search.grid.rings]
        centres = None if poses is None else self.before(poses, rows)[1] / self.pixel_size
        maxima, _ = search_everywhere(
            self.search, self.volume, images, *on_grid, centres_px=centres, starts=_STARTS, **how
        )
        return maxima

    def before(self, poses: dict[str, NDArray], rows: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        """Best rotation and shift in Å of each particle in the iteration before."""
        first = np.searchsorted(poses["owner"], rows)
        return torch.from_numpy(poses["rotations"][first]), torch.from_numpy(poses["shifts_A"][first])

    def put_back(
        self,
        rows: NDArray[np.intp],
        raw: _View,
        found: Maxima,
        sums: Backprojection,
    ) -> None:
        """Add images at their poses to the sums."""
        weighted = raw.ready.weighted(raw.ready.whole, self.scale(rows), raw.power)
        weighted = self.trusted(weighted, found.poses, found.best)
        poses = found.poses.rotations, found.poses.shifts_px
        sums.add(weighted, *poses, found.shares, owner=found.owner)

    def as_sure(self, rows: NDArray[np.intp], found: Maxima) -> Maxima:
        """The same poses, less sure by the noise of the map that they were compared with."""
        poses, given = found.poses, self.plan.given
        prior: Tensor | float = 0.0
        if given is not None:
            of = rows[found.owner.cpu().numpy()]
            prior = given.prior(of, poses.rotations, self.pixel_size).precision.to(poses.precision)
        of_data = without_noise(poses.precision - prior, poses.rotations, self.model.information)
        return replace(found, poses=replace(poses, precision=of_data + prior))

    def in_one_frame(self, found: Maxima) -> Maxima:
        """The same poses against a map half way between those of both half sets."""
        poses = found.poses
        part = 0.5 if self.half == 0 else -0.5
        motion = self.model.motion(self.pixel_size)
        rotations, shifts = motion.of_poses(poses.rotations, poses.shifts_px, part)
        return replace(found, poses=replace(poses, rotations=rotations, shifts_px=shifts))

    def left(self, rows: NDArray[np.intp], seen: _View, found: Maxima) -> ResidualSums:
        """What the map leaves of each image (b, rings)."""
        rotations, shifts, owner = found.poses.rotations, found.poses.shifts_px, found.owner
        disc, scale, ready = self.disc, self.scale(rows), seen.ready
        known = disc.count(self.model.radius)
        slices = ready.whole.new_zeros(len(rotations), len(disc.points))
        slices[:, :known] = sample_slices(self.volume, rotations, disc.points[:known])
        moved = ready.whole[owner] * disc.shifts(shifts)
        return ResidualSums.of(
            disc, moved, ready.ctf[owner], slices, owner, scale=scale, weights=found.shares
        )

    def trusted(self, images: DiscImages, poses: LocalPoses, best: Tensor) -> DiscImages:
        """Images that count at each frequency by the part that is where it belongs, given the pose's error.

        What is far from an axis moves with the turns about it: what is compared turns about its own centre,
        which is where it is most surely. Image and weight lose the same, so that nothing is sharpened.
        """
        extent = self.plan.extent
        centred = poses.about(extent.centre_A / self.pixel_size)
        variance = centred.covariance[best].diagonal(dim1=1, dim2=2)
        distance = (extent.spread_A / self.pixel_size) ** 2
        moved = variance[:, 3:].mean(1) + distance * (variance[:, :2].mean(1) + variance[:, 2])
        squared = (self.disc.points.double() / self.disc.box).square().sum(1)
        left = torch.exp(-2 * math.pi**2 * moved[:, None] * squared).clamp_min(_TRUST).to(images.squared)
        left[:, squared == 0] = 1  # also where nothing determines the pose
        return DiscImages(images.disc, images.linear * left, images.squared * left)

    def kept(self, rows: NDArray[np.intp], found: Maxima) -> dict[str, NDArray]:
        """Maxima of a batch, as the next iteration begins at."""
        return {
            "owner": rows[found.owner.cpu().numpy()],
            "rotations": found.poses.rotations.cpu().numpy(),
            "shifts_A": found.poses.shifts_px.cpu().numpy() * self.pixel_size,
        }

    def table(
        self,
        rows: NDArray[np.intp],
        found: Maxima,
        left: ResidualSums,
        noise: Tensor,
        poses: dict[str, NDArray] | None,
    ) -> NDArray[np.float64]:
        """What is kept of each particle; see `BEST`."""
        best = found.best
        rotations = found.poses.rotations[best].cpu()
        variance = found.poses.covariance[best].diagonal(dim1=1, dim2=2).cpu()
        x, y, z = torch.rad2deg(variance[:, :3].sqrt()).clamp_max(104.0).unbind(1)
        turned = torch.full((len(rows),), 180.0, dtype=torch.float64)
        error_before = torch.zeros_like(turned)
        if poses is not None:
            error_before = torch.from_numpy(poses["best"][rows, BEST.index("pose_error")])
            turned = symmetric_distance(rotations, self.before(poses, rows)[0], self.plan.step.symmetry)
        columns = [
            torch.from_numpy(rows),
            *rotations.flatten(1).unbind(1),
            *(found.poses.shifts_px[best].cpu() * self.pixel_size).unbind(1),
            found.shares[best].cpu(),
            found.owner.bincount(minlength=len(rows)).cpu(),
            found.log_evidence.cpu(),
            (x.square() + y.square() + z.square()).sqrt(),
            ((x.square() + y.square()) / 2).sqrt(),
            z,
            variance[:, 3:].mean(1).sqrt().clamp_max(self.plan.shift_range / self.pixel_size)
            * self.pixel_size,
            (left.cross / noise)[:, 1:].sum(1).cpu(),
            (left.model / noise)[:, 1:].sum(1).cpu(),
            turned,
            error_before,
        ]
        return torch.stack([column.double() for column in columns], dim=1).numpy()


def _of_rows(owners: NDArray, rows: NDArray[np.intp]) -> tuple[NDArray, NDArray[np.intp]]:
    """Places in sorted `owners` of the entries of some rows, and which of the rows each belongs to."""
    first, stop = np.searchsorted(owners, rows), np.searchsorted(owners, rows, side="right")
    owner = np.repeat(np.arange(len(rows)), stop - first)
    begin = np.cumsum(stop - first) - (stop - first)
    return np.arange(len(owner)) - begin[owner] + first[owner], owner
