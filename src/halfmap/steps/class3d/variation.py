"""How classes part: along what the particles differ in most, in coarse detail, at the poses they have."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from torch import Tensor

from halfmap.ops import symmetry
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft3, resample, rfft3
from halfmap.ops.threads import one_torch_thread
from halfmap.search.backprojector import Backprojection
from halfmap.search.disc import DiscImages, FourierDisc
from halfmap.search.halfmaps import least_weights, solved
from halfmap.search.local import slice_tangents
from halfmap.search.projector import SplineVolume, sample_slices
from halfmap.search.reference import in_box
from halfmap.steps.class3d.expectation import BEST, ROTATION, prepared
from halfmap.steps.class3d.model import Model
from halfmap.steps.class3d.plan import Plan

_MOST, _BATCH = 20_000, 256
"""Particles that are looked at, and how many at a time."""

_STEPS, _MORE = 12, 3
"""Applications of the covariance, and volumes beyond those wanted, for it to converge sooner."""

_AXES = 6
"""Axes along which particles are grouped, at most."""

_BEGINNINGS = 10
"""Of the grouping."""

_EACH = 4.0
"""Particles for each number that is to be found out about a volume."""

_FINER = 2.0
"""Finest detail that is looked at, over that of the reference at first."""

_CONTRAST = 0.2
"""Standard deviation of particles' contrasts about those that are known."""

_DRAWN, _SELDOM = 100, 0.95
"""Pairs of halves of noise that chance is judged by, and the part of them that it is said to be below."""

_FAINT = 1e-3
"""Variance along an axis, over the greatest, that there is at least."""


@one_torch_thread()
def part(plan: Plan, model: Model, best: NDArray[np.float64]) -> Model:
    """Give each class a map: that of all particles, and a part of what these differ in most.

    Parameters
    ----------
    plan : Plan
        The classification.
    model : Model
        With one map for each fold.
    best : array (n, columns)
        What was found for each particle; see `expectation.BEST`.

    Returns
    -------
    Model
        With a map for each fold and class.

    Notes
    -----
    The covariance of the particles' volumes is applied to a few random ones, again and again, as in an
    orthogonal iteration. Images give it: one that is the slice of a volume with noise gives itself, times its
    product with the slice of the random volume; what noise gives with itself is known in the mean, and taken
    off. Errors of poses and of contrast make particles differ as well: they are noise along the ways in which
    a projection changes with these. Coordinates of the particles along the
    strongest axes [1]_ are grouped about as many centres as there are classes. So it matters little which
    random volumes it begins with, where the particles differ in something that can be seen.

    References
    ----------
    .. [1] Tagare, Kucukelbir, Sigworth, Wang & Rao 2015, J. Struct. Biol. 191, 245-262,
       DOI 10.1016/j.jsb.2015.05.007
    """
    seed, rows = plan.step.seed, _some(plan)
    ring = _detail(plan, len(rows))
    seen = _Seen.of(plan, model, best, rows, ring)
    axes, variance = seen.strongest(_axes(plan), seed)
    spread = variance.clamp_min(_FAINT * float(variance[0].clamp_min(1e-30))).sqrt()
    places = seen.places(axes, spread)
    centres, number = _grouped(places.cpu().numpy(), plan.classes, np.random.default_rng((seed, 3)))
    moved = torch.einsum("km,mzyx->kzyx", torch.from_numpy(centres).to(axes) * spread.to(axes), axes)
    differences = torch.stack([in_box(each, plan.box) for each in moved]) * plan.compared_part()
    return replace(
        model,
        references=model.references + differences,
        shares=torch.from_numpy(np.bincount(number, minlength=plan.classes) / len(number)),
        differing=ring,
    )


@one_torch_thread()
def agreement(plan: Plan, model: Model, best: NDArray[np.float64]) -> float:
    """How far two halves of the particles, each by itself, agree in what they differ in most.

    Parameters
    ----------
    plan, model, best
        As for `part`, with any number of maps.

    Returns
    -------
    float
        The greatest correlation, 0 to 1, of a mixture of the axes of one half with one of the other's.

    Notes
    -----
    Unlike the maps of classes, of which both halves had the same ones to be compared with, these have nothing
    in common but poses that were given, and the map of all.
    """
    rows = _some(plan)
    ring = _detail(plan, len(rows) // 2)
    axes = []
    for half in (0, 1):
        own = rows[plan.halves[rows] == half]
        seen = _Seen.of(plan, model, best, own, ring)
        axes.append(seen.strongest(_axes(plan), plan.step.seed + half)[0].flatten(1))
    return float(torch.linalg.svdvals(axes[0] @ axes[1].T)[0].clamp_max(1))


def by_chance(plan: Plan) -> float:
    """Correlation as of `agreement` that axes of random directions exceed once in twenty times."""
    numbers = max(_axes(plan), round(_numbers(plan, _detail(plan, len(_some(plan)) // 2))))
    rng, found = np.random.default_rng(plan.step.seed), []
    for _ in range(_DRAWN):
        axes = [np.linalg.qr(rng.standard_normal((numbers, _axes(plan))))[0] for _ in range(2)]
        found.append(float(np.linalg.norm(axes[0].T @ axes[1], ord=2)))
    return float(np.quantile(found, _SELDOM))


def _axes(plan: Plan) -> int:
    """Axes along which particles are grouped."""
    return min(plan.classes - 1, _AXES)


def _numbers(plan: Plan, ring: int) -> float:
    """Numbers that make up what classes differ in, to a ring."""
    return 4 / 3 * math.pi * ring**3 * float((plan.compared_part() > 0.5).float().mean())


def _some(plan: Plan) -> NDArray[np.intp]:
    """Rows of the particles that are looked at."""
    return np.sort(np.random.default_rng((plan.step.seed, 2)).permutation(len(plan.folds))[:_MOST])


def _grouped(
    places: NDArray[np.float64], k: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Centres (k, m) of places (n, m), and the nearest of each: the best of several beginnings."""
    found = []
    for _ in range(_BEGINNINGS):
        start = places[rng.choice(len(places), k, replace=False)]
        centres, number = kmeans2(places, start, minit="matrix", missing="warn")
        found.append((float(np.square(places - centres[number]).sum()), centres, number))
    return min(found, key=lambda one: one[0])[1:]


def _detail(plan: Plan, n: int) -> int:
    """Largest ring at which n particles are enough to find out what they differ in."""
    enough = (n / _EACH / _numbers(plan, 1)) ** (1 / 3)
    return int(min(max(enough, plan.first_ring), _FINER * plan.first_ring, plan.finest))


@dataclass(frozen=True, eq=False)
class _Seen:
    """Some particles in coarse detail: what their images have that the map of all has not.

    Attributes
    ----------
    images : DiscImages
        Moved to the centre, less the map of all particles and what errors of pose and contrast may give.
    tangents : Tensor (n, t, p), complex
        What errors of pose and contrast may give; see `unknown_ways`.
    rotations : Tensor (n, 3, 3)
    mask : Tensor (d, d, d)
        Where classes may differ.
    group : str
    """

    images: DiscImages
    tangents: Tensor
    rotations: Tensor
    mask: Tensor
    group: str

    @classmethod
    def of(
        cls, plan: Plan, model: Model, best: NDArray[np.float64], rows: NDArray[np.intp], ring: int
    ) -> _Seen:
        """Read the images, in a box that holds what is wanted of them."""
        box = min(plan.box, 2 * (ring + 3))
        disc, pixel_size = FourierDisc(box, ring, plan.device), plan.side / box
        common = torch.einsum("k,fkzyx->fzyx", model.shares.to(model.references), model.references)
        volumes = [SplineVolume.of(in_box(each, box), radius_px=ring) for each in common]
        shifts_px = torch.from_numpy(best[:, [BEST.index("x"), BEST.index("y")]] / pixel_size)
        rotations = torch.from_numpy(best[:, ROTATION].reshape(-1, 3, 3)).to(plan.device)
        precision = _precision(best, pixel_size)
        linear, squared, tangents, order = [], [], [], []
        for some, pictures in plan.source.images.stream(rows, _BATCH):
            images = prepared(plan, model, some, pictures, disc, pixel_size).images
            moved = images.linear * disc.shifts(shifts_px[some].to(plan.device))
            ways = moved.new_empty(len(some), 6, len(disc.points))
            for fold, volume in enumerate(volumes):
                own = torch.from_numpy(plan.folds[some] == fold)
                slices, tangent = slice_tangents(volume, rotations[some][own], disc.points)
                moved[own] -= images.squared[own] * slices
                ways[own] = torch.cat([tangent, slices[:, None]], dim=1)
            ways = unknown_ways(ways, images.squared, precision[some])
            moved = moved - images.squared * part_along(ways, moved)
            linear.append(moved)
            squared.append(images.squared)
            tangents.append(ways)
            order.append(some)
        together = DiscImages(disc, torch.cat(linear), torch.cat(squared))
        mask = resample(plan.compared_part(), new_shape=(box,) * 3).clamp(0, 1)
        return cls(together, torch.cat(tangents), rotations[np.concatenate(order)], mask, plan.step.symmetry)

    def strongest(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Orthonormal axes (count, d, d, d) that the particles vary along most, and variances (count,)."""
        generator = torch.Generator().manual_seed(seed)
        volumes = torch.randn(count + _MORE, *self.mask.shape, generator=generator).to(self.mask)
        volumes = self.smooth(volumes)
        for _ in range(_STEPS):
            volumes = self.applied(_orthonormal(volumes))
        axes, variance = self.principal(_orthonormal(volumes))
        return axes[:count], variance[:count]

    def smooth(self, volumes: Tensor) -> Tensor:
        """Volumes (m, d, d, d) to the detail that is compared, within the mask."""
        disc = self.images.disc
        shape = (disc.box,) * 3
        passed = low_pass(shape, pixel_size=1.0, resolution=disc.box / disc.radius).to(volumes.device)
        return irfft3(rfft3(volumes) * passed, shape=shape) * self.mask

    def applied(self, volumes: Tensor) -> Tensor:
        """The covariance times volumes (m, d, d, d)."""
        linear, squared, every = self.images.linear, self.images.squared, torch.arange(len(self.images))
        found = []
        for volume in volumes:
            spline = SplineVolume.of(volume, radius_px=self.images.disc.radius)
            both = [self.slices(spline, rows) for rows in every.split(_BATCH)]
            slices, own = (torch.cat(each) for each in zip(*both, strict=True))
            along = (linear * slices.conj()).real.sum(1, keepdim=True)
            found.append(self._put_back(linear * along - squared * own))
        return torch.stack(found)

    def principal(self, volumes: Tensor) -> tuple[Tensor, Tensor]:
        """Axes (m, d, d, d) in the span of orthonormal volumes, and variances (m,) along them."""
        along, gram = self._products(volumes)
        inverse = torch.linalg.inv(gram.mean(0))
        variance, turn = torch.linalg.eigh(inverse @ (along.T @ along / len(along) - gram.mean(0)) @ inverse)
        axes = torch.einsum("mj,mzyx->jzyx", turn.flip(1).to(volumes), volumes)
        return axes, variance.flip(0)

    def places(self, axes: Tensor, spread: Tensor) -> Tensor:
        """Posterior means (n, m) of the particles' coordinates, in standard deviations (m,)."""
        along, gram = self._products(axes * spread.to(axes)[:, None, None, None])
        return torch.linalg.solve(gram + torch.eye(len(axes)).to(gram), along)

    def slices(self, volume: SplineVolume, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Slices (b, p) at the poses of some images, and less what errors of pose and contrast may give.

        The images are less that already, so that their products are with the slices as they are.
        """
        slices = sample_slices(volume, self.rotations[rows], self.images.disc.points)
        ways = self.tangents[rows]
        return slices, slices - part_along(ways, slices * self.images.squared[rows])

    def _products(self, volumes: Tensor) -> tuple[Tensor, Tensor]:
        """Products (n, m) of images with slices of volumes, and (n, m, m) of the weighted slices."""
        found = []
        splines = [SplineVolume.of(volume, radius_px=self.images.disc.radius) for volume in volumes]
        for rows in torch.arange(len(self.images)).split(_BATCH):
            both = [self.slices(each, rows) for each in splines]
            slices, own = (torch.stack(each, dim=1) for each in zip(*both, strict=True))
            along = (self.images.linear[rows, None] * slices.conj()).real.sum(2)
            weighted = own * self.images.squared[rows, None]
            found.append((along.double(), (weighted @ slices.conj().transpose(1, 2)).real.double()))
        return torch.cat([along for along, _ in found]), torch.cat([gram for _, gram in found])

    def _put_back(self, linear: Tensor) -> Tensor:
        """Map (d, d, d), within the mask, of coefficients (n, p)."""
        disc, squared = self.images.disc, self.images.squared
        sums = Backprojection.empty(disc.box, disc.radius, group=self.group, device=str(linear.device))
        sums.add(DiscImages(disc, linear, squared), self.rotations, linear.new_zeros(len(linear), 2).real)
        whole = sums if symmetry.order(self.group) == 1 else sums.symmetrised()
        return solved(whole, least=least_weights(whole)) * self.mask


def _precision(best: NDArray[np.float64], pixel_size: float) -> Tensor:
    """Inverse variances (n, 6) of turns in radians, shifts in pixels, and contrast."""
    view, psi, shift = (best[:, BEST.index(name)] for name in ("view_error", "psi_error", "shift_error"))
    turns, moves = np.radians([view, view, psi]), np.stack([shift, shift]) / pixel_size
    contrast = np.full((1, len(best)), _CONTRAST)
    return torch.from_numpy(np.concatenate([turns, moves, contrast]).T ** -2.0)


def unknown_ways(ways: Tensor, weights: Tensor, precision: Tensor) -> Tensor:
    """What images may have of ways in which they change, by amounts of which something is known.

    Parameters
    ----------
    ways : Tensor (n, t, p), complex
    weights : Tensor (n, p)
        Of the images.
    precision : Tensor (n, t)
        Inverse variances of the amounts.

    Returns
    -------
    Tensor (n, t, p), complex
        Combinations U of the ways T for which the weights W less ``W U* U W`` are those of images with errors
        along the ways: the inverse of ``1 / W + T* T / precision``.
    """
    gram = ((ways * weights[:, None]) @ ways.conj().transpose(1, 2)).real.double()
    factor = torch.linalg.cholesky(gram + torch.diag_embed(precision.to(gram)))
    return (
        torch.linalg.solve_triangular(factor, torch.eye(factor.shape[1]).to(factor), upper=False).to(ways)
        @ ways
    )


def part_along(ways: Tensor, weighted: Tensor) -> Tensor:
    """Sum (n, p) of ways (n, t, p), each times its product with weighted images (n, p)."""
    product = (ways.conj() @ weighted[..., None]).real.to(ways)
    return (product.transpose(1, 2) @ ways)[:, 0]


def _orthonormal(volumes: Tensor) -> Tensor:
    """Volumes (m, d, d, d) that span the same, orthogonal to each other and of norm 1."""
    basis, _ = torch.linalg.qr(volumes.flatten(1).double().T)
    return basis.T.reshape(volumes.shape).to(volumes)
