"""Poses of images against a volume: a whole grid at a low radius, then finer where they are likely."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from halfmap.ops import symmetry
from halfmap.ops.rotations import grid_rotations, psi_count, subdivide, view_direction
from halfmap.ops.threads import in_threads, one_blas_thread, one_torch_thread
from halfmap.search import _pose_kernels as kernels
from halfmap.search.disc import DiscImages
from halfmap.search.inplane import Images, References, log_likelihood, shift_grid
from halfmap.search.polar import PolarGrid
from halfmap.search.projector import SplineVolume, parts, polar_references, sample_slices
from halfmap.search.ring_products import Precision

MASS = 0.999
"""Part of the posterior that the poses kept hold, unless they would be too many."""

_CELLS = 1 << 22
"""Poses compared at a time by a thread: more leave the cache, fewer make it read references too often."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """Likely poses of a batch of images, those of one image one after the other, the best first.

    Attributes
    ----------
    order, psi_step : int, float
        Of the `rotations.healpix_grid` they belong to.
    step_px : float
        Of the grid of shifts.
    owner : Tensor (n,) int64
        Image of each.
    row : Tensor (n,) int64
        Row of the grid.
    shifts_px : Tensor (n, 2) float64
        (x, y), moving the image.
    log_probability : Tensor (n,) float64
        Of all cells searched, those that were left out among them.
    log_evidence : Tensor (b,) float64
        Logarithm of the likelihood summed over all that was searched, each with its prior.
    """

    order: int
    psi_step: float
    step_px: float
    owner: Tensor
    row: Tensor
    shifts_px: Tensor
    log_probability: Tensor
    log_evidence: Tensor

    @property
    def probability(self) -> Tensor:
        """Probabilities (n,), those of each image summing to 1."""
        probability = self.log_probability.exp()
        total = probability.new_zeros(len(self.log_evidence)).index_add_(0, self.owner, probability)
        return probability / total[self.owner]

    @property
    def rotations(self) -> Tensor:
        """Rotations (n, 3, 3), float64."""
        return grid_rotations(self.row, order=self.order, psi_step=self.psi_step)

    def best(self, most: int = 1) -> Tensor:
        """Indices of the best `most` of each image, or as many as there are."""
        first = torch.searchsorted(self.owner, torch.arange(len(self.log_evidence)))
        return (torch.arange(len(self.owner)) - first[self.owner] < most).nonzero().squeeze(1)


class DirectionSearch:
    """Compare images with projections along all directions, at all angles in the plane, at a grid of shifts.

    Parameters
    ----------
    grid : PolarGrid
        Its angles are those in the plane.
    volume : SplineVolume
        Reference, of the grid's box.
    order : int
        HEALPix order of the directions.
    group : str
        Point group; directions of one asymmetric unit are searched.
    range_px, step_px : float
        Largest shift, and step of the grid of shifts.
    deviation_px : float
        Standard deviation of the normal prior of shifts.
    most : int
        Largest number of poses kept for an image.
    precision : {"float32", "tf32", "bf16"}
        Of the factors of the scores.

    Notes
    -----
    Turning a projection by the angle a, from x to y, gives the projection with the angle psi less by a: the
    poses are those of `rotations.healpix_grid` with a psi step of 360° / angles.
    """

    def __init__(
        self,
        grid: PolarGrid,
        volume: SplineVolume,
        *,
        order: int,
        group: str = "C1",
        range_px: float,
        step_px: float,
        deviation_px: float = math.inf,
        most: int = 64,
        precision: Precision = "float32",
    ) -> None:
        self.grid, self.order, self.step_px, self.most = grid, order, step_px, most
        self.psi_step = 360.0 / grid.angles
        self.rows = _unit_rows(order, self.psi_step, group)
        rotations = grid_rotations(self.rows, order=order, psi_step=self.psi_step)
        self.references = References.of(polar_references(volume, rotations, grid), precision)
        self.shifts_px = shift_grid(float(range_px), step_px).to(grid.device)
        self._cells = grid.angles, len(self.shifts_px), len(self.rows)
        self._log_prior = self.shifts_px.square().sum(1).div(-2 * deviation_px**2)[:, None]

    @property
    def batch(self) -> int:
        """Images compared at a time."""
        return max(1, _CELLS // math.prod(self._cells))

    def __call__(self, samples: Tensor, ctf: Tensor, noise: Tensor) -> Candidates:
        """Candidates of images given as samples and CTFs (b, rings, angles / 2) and noise (b or 1, rings)."""
        noise = noise.expand(len(samples), -1)
        compare = functools.partial(self._compare, samples, ctf, noise)
        parts = [slice(first, first + self.batch) for first in range(0, len(samples), self.batch)]
        # Threads work on parts, not within operations: how many there are changes nothing.
        threaded = samples.device.type == "cpu" and torch.get_num_threads() > 1
        with one_blas_thread():
            found = in_threads(one_torch_thread()(compare), parts) if threaded else list(map(compare, parts))
        places, logs, counts, evidence = (torch.cat(parts) for parts in zip(*found, strict=True))
        kept = torch.arange(places.shape[1]) < counts[:, None]
        angle, shift, direction = np.unravel_index(places[kept].numpy(), self._cells)
        row = self.rows[torch.from_numpy(direction)] + torch.from_numpy(-angle % self.grid.angles)
        owner = torch.repeat_interleave(torch.arange(len(samples)), counts)
        shifts_px = self.shifts_px.cpu()[torch.from_numpy(shift)].double()
        grid = self.order, self.psi_step, self.step_px
        return Candidates(*grid, owner, row, shifts_px, logs[kept], evidence)

    def _compare(
        self, samples: Tensor, ctf: Tensor, noise: Tensor, part: slice
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Best cells of some of the images; see `_select`."""
        images = Images.of(samples[part], ctf[part], noise[part], self.grid)
        shifted = images.shifted(self.shifts_px.expand(len(images.power), -1, 2), self.grid)
        return _select(log_likelihood(images, shifted, self.references, self._log_prior), self.most)


def subdivided(
    candidates: Candidates,
    volume: SplineVolume,
    images: DiscImages,
    *,
    radius: float | None = None,
    deviation_px: float = math.inf,
    most: int = 64,
) -> Candidates:
    """Divide likely cells into eight rotations and four shifts, and compare those with the images anew.

    Parameters
    ----------
    candidates : Candidates
        Of the images.
    volume : SplineVolume
    images : DiscImages
    radius : float, optional
        Largest frequency compared, in Fourier pixels; by default the disc's.
    deviation_px : float
        Standard deviation of the normal prior of shifts.
    most : int
        Largest number of poses kept for an image.

    Returns
    -------
    Candidates
        On the grid of half the steps; the posterior is that over the children of the candidates given.
    """
    quarter = candidates.step_px / 4
    parts_px = torch.tensor([[x, y] for y in (-quarter, quarter) for x in (-quarter, quarter)]).double()
    rows = subdivide(candidates.row, order=candidates.order, psi_step=candidates.psi_step)
    order, psi_step = candidates.order + 1, 180.0 / psi_count(candidates.order, candidates.psi_step)
    shifts = (candidates.shifts_px[:, None] + parts_px)[:, None].expand(-1, 8, 4, 2).reshape(-1, 4, 2)
    owner, rows = candidates.owner.repeat_interleave(8), rows.flatten()
    # Poses of one rotation and several shifts share a slice.
    _, whose = torch.unique(owner * (rows.max() + 1) + rows, return_inverse=True)
    ordered = torch.argsort(whose, stable=True)
    first = torch.searchsorted(whose[ordered], torch.arange(int(whose.max()) + 2))
    slice_owner, slice_row = owner[ordered[first[:-1]]], rows[ordered[first[:-1]]]
    shifts = shifts[ordered].flatten(0, 1)
    rotations = grid_rotations(slice_row, order=order, psi_step=psi_step)
    logs = score_poses(volume, images, rotations, shifts, owner=slice_owner, first=4 * first, radius=radius)
    logs -= shifts.square().sum(1) / (2 * deviation_px**2)
    owner, rows = owner[ordered].repeat_interleave(4), rows[ordered].repeat_interleave(4)
    kept, log_probability, evidence = _keep(logs, owner, len(images), most)
    grid = order, psi_step, candidates.step_px / 2
    return Candidates(*grid, owner[kept], rows[kept], shifts[kept], log_probability, evidence)


def score_poses(
    volume: SplineVolume,
    images: DiscImages,
    rotations: Tensor,
    shifts_px: Tensor,
    *,
    owner: Tensor,
    first: Tensor,
    radius: float | None = None,
) -> Tensor:
    """Log-likelihoods of poses, one by one.

    Parameters
    ----------
    volume : SplineVolume
    images : DiscImages
    rotations : Tensor (n, 3, 3)
    shifts_px : Tensor (s, 2)
        Moving the images: those of the first rotation, of the second, …
    owner : Tensor (n,) int64
        Image that each rotation is compared with.
    first : Tensor (n + 1,) int64
        Where the shifts of each rotation begin.
    radius : float, optional
        Largest frequency compared, in Fourier pixels; by default the disc's.

    Returns
    -------
    Tensor (s,), float64
        ``Σ Re(X* CTF P) / σ² - ½ Σ |CTF P|² / σ²`` over the full circle.
    """
    disc, count = images.disc, images.disc.count(radius or images.disc.radius)
    points = volume.check(disc.points[:count])
    if volume.values.device.type != "cpu":
        rotations, shifts_px = rotations.to(points), shifts_px.to(points.device)
        owner, first = owner.to(points.device), first.to(points.device)
        return _score_torch(volume, images, rotations, shifts_px, owner, first, points).cpu()
    out = torch.empty(len(shifts_px), dtype=torch.float64)
    real = volume.values.real.dtype
    turns, linear = volume.turns(rotations).numpy(), torch.view_as_real(images.linear).flatten(1)
    image = linear.to(real).numpy(), images.squared.to(real).numpy()
    # Poses of a grid share few shifts.
    pairs = torch.view_as_complex(shifts_px.double().contiguous()).numpy()
    distinct, shift = np.unique(pairs, return_inverse=True)
    waves = disc.shifts(torch.view_as_real(torch.from_numpy(distinct)))[:, :count]
    waves = torch.view_as_real(waves).permute(0, 2, 1).to(real).contiguous().numpy()
    whose, begin, found = owner.numpy(), first.numpy(), out.numpy()

    def score(part: tuple[int, int]) -> None:
        a, b = part
        poses = turns[a:b], whose[a:b], begin[a : b + 1], shift, waves
        kernels.score(volume.flat(), volume.origin, *poses, points.numpy(), *image, found)

    in_threads(score, parts(len(turns)))
    return out


def _score_torch(
    volume: SplineVolume,
    images: DiscImages,
    rotations: Tensor,
    shifts_px: Tensor,
    owner: Tensor,
    first: Tensor,
    points: Tensor,
) -> Tensor:
    """As `_pose_kernels.score`, on any device."""
    slices = sample_slices(volume, rotations, points)
    power = (images.squared[owner, : len(points)] * slices.abs().square()).sum(1)
    products = images.linear[owner, : len(points)] * slices.conj()
    whose = torch.repeat_interleave(torch.arange(len(owner), device=owner.device), first.diff())
    waves = images.disc.shifts(shifts_px)[:, : len(points)]
    return ((products[whose] * waves).real.sum(1) - power[whose] / 2).double()


def _select(likely: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best cells of posteriors (angles, b, t, k), on the CPU.

    Places in (angles, t, k) and log-probabilities (b, most), best first, how many hold the mass (b,), and the
    logarithms of the sums over all cells (b,).
    """
    if likely.device.type != "cpu":
        return _select_torch(likely, most)
    b, cells = likely.shape[1], likely.numpy()
    places, logs = torch.zeros(b, most, dtype=torch.int64), torch.zeros(b, most, dtype=torch.float64)
    into = places.numpy(), logs.numpy()
    found = [kernels.select(cells[:, i], MASS, most, into[0][i], into[1][i]) for i in range(b)]
    counts, evidence = zip(*found, strict=True)
    return places, logs, torch.tensor(counts), torch.tensor(evidence, dtype=torch.float64)


def _select_torch(likely: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_select`, on any device."""
    cells = likely.transpose(0, 1).flatten(1)
    evidence = cells.logsumexp(1)
    best = cells.topk(min(most, cells.shape[1]), dim=1)
    logs = (best.values - evidence[:, None]).double()
    before = logs.exp().cumsum(1) - logs.exp()
    return best.indices.cpu(), logs.cpu(), (before < MASS).sum(1).cpu(), evidence.double().cpu()


def _keep(logs: Tensor, owner: Tensor, n: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of what holds the mass of each image, best first, log-probabilities, and log-evidence (n,)."""
    greatest = logs.new_full((n,), -math.inf).scatter_reduce_(0, owner, logs, "amax")
    total = logs.new_zeros(n).index_add_(0, owner, (logs - greatest[owner]).exp())
    evidence = greatest + total.log()
    log_probability = logs - evidence[owner]
    ordered = torch.argsort(log_probability, descending=True, stable=True)
    ordered = ordered[torch.argsort(owner[ordered], stable=True)]
    whose, probability = owner[ordered], log_probability[ordered].exp()
    begin = torch.searchsorted(whose, torch.arange(n + 1))[:-1].clamp_max(len(whose) - 1)
    before = probability.cumsum(0) - probability
    rank = torch.arange(len(whose)) - begin[whose]
    kept = ordered[(rank < most) & (before - before[begin][whose] < MASS)]
    return kept, log_probability[kept], evidence


def _unit_rows(order: int, psi_step: float, group: str) -> Tensor:
    """Rows of the grid at psi 0, one for each direction in the asymmetric unit."""
    rows = torch.arange(12 * 4**order) * psi_count(order, psi_step)
    if symmetry.order(group) == 1:
        return rows
    directions = view_direction(grid_rotations(rows, order=order, psi_step=psi_step))
    # On the border rounding could leave out a direction and its equivalents: both sides are taken.
    aside = 1e-6 * torch.tensor([0.3, 0.5, -0.8], dtype=torch.float64)
    beside = torch.stack([directions + aside, directions - aside])
    return rows[symmetry.in_asymmetric_unit(beside, group).any(0)]
