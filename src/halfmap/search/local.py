"""Poses refined continuously: the maximum of the posterior near a pose, and its width."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfmap.ops import symmetry
from halfmap.ops.rotations import from_rotation_vector, to_rotation_vector
from halfmap.ops.threads import in_threads
from halfmap.search import _pose_kernels as kernels
from halfmap.search.disc import DiscImages
from halfmap.search.projector import SplineVolume, parts, sample_gradients

_TRIALS = 15
"""Largest number of poses tried for each image; three to six are usual."""

_GAIN = 2e-3
"""Of the log-likelihood: a step that promises less is a twentieth of the posterior's width."""

_NOTHING = 1e30
"""Logarithm below all others, of a pose that nothing determines."""

_LEAST_PRECISION = 1e-9
"""Part of the largest precision below which a pose counts as undetermined."""


@dataclass(frozen=True, eq=False)
class LocalPoses:
    """Maxima of the posterior, one for each pose that was refined.

    Attributes
    ----------
    rotations : Tensor (n, 3, 3), float64
    shifts_px : Tensor (n, 2), float64
        (x, y), moving the images so that they are centred.
    log_likelihood : Tensor (n,), float64
        With the prior, but for a constant.
    precision : Tensor (n, 5, 5), float64
        Inverse of the covariance of turns about x, y and z of the image, in radians, and of shifts along x
        and y, in pixels.
    """

    rotations: Tensor
    shifts_px: Tensor
    log_likelihood: Tensor
    precision: Tensor

    @property
    def covariance(self) -> Tensor:
        """Of turns in radians and shifts in pixels, (n, 5, 5); infinite where nothing is determined."""
        scale = self.precision.diagonal(dim1=1, dim2=2).sqrt()
        bad = ~(scale > _LEAST_PRECISION * scale.amax(1, keepdim=True)).all(1)
        scale = torch.where(bad[:, None], torch.ones_like(scale), scale)
        unit = self.precision / (scale[:, :, None] * scale[:, None, :])
        factor, failed = torch.linalg.cholesky_ex(torch.where(bad[:, None, None], _eye(unit), unit))
        bad |= failed != 0
        inverse = torch.cholesky_inverse(torch.where(bad[:, None, None], _eye(unit), factor))
        inverse = inverse / (scale[:, :, None] * scale[:, None, :])
        return torch.where(bad[:, None, None], torch.full_like(inverse, math.inf), inverse)

    @property
    def deviations(self) -> Tensor:
        """Standard deviations (n, 5): turns about x, y and z of the image in degrees, shifts in pixels."""
        deviations = self.covariance.diagonal(dim1=1, dim2=2).sqrt()
        return deviations * deviations.new_tensor([180 / math.pi] * 3 + [1, 1])

    def about(self, point_px: Tensor) -> LocalPoses:
        """The same, precise as to turns about a point (3,) of the map and to shifts of its projection."""
        back = levers(self.rotations, -point_px)
        return replace(self, precision=back.transpose(1, 2) @ self.precision @ back)

    def shares(self, owner: Tensor, group: str = "C1") -> Tensor:
        """Part (n,) that each maximum holds of the posterior of its image, all of which sum to 1.

        Parameters
        ----------
        owner : Tensor (n,) of int
            Image of each.
        group : str
            Point group, whose equivalent poses are one.

        Notes
        -----
        Laplace's approximation: a normal distribution about each maximum. Of those that are one and the same,
        nearer to each other than a standard deviation, the best has the whole share.
        """
        logs = self.log_likelihood - 0.5 * torch.linalg.slogdet(self.precision).logabsdet
        logs = torch.where(logs.isfinite(), logs, torch.full_like(logs, -_NOTHING))
        order = torch.argsort(self.log_likelihood, descending=True, stable=True)
        order = order[torch.argsort(owner[order], stable=True)]
        operators = symmetry.operators(group).to(self.rotations)
        same = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        for apart in range(1, int(owner.bincount().max()) if len(owner) else 0):
            near = self._distance(order[:-apart], order[apart:], operators) < 1
            same[apart:] |= near & (owner[order[:-apart]] == owner[order[apart:]])
        logs[order[same]] = -math.inf
        n = int(owner.max()) + 1 if len(owner) else 0
        greatest = logs.new_full((n,), -math.inf).scatter_reduce_(0, owner, logs, "amax")
        shares = (logs - greatest[owner]).exp()
        return shares / shares.new_zeros(n).index_add_(0, owner, shares)[owner]

    def _distance(self, first: Tensor, second: Tensor, operators: Tensor) -> Tensor:
        """Between some poses and the nearest equivalents of others, in standard deviations of the first."""
        turns = self.rotations[second, None] @ operators @ self.rotations[first, None].transpose(-1, -2)
        nearest = turns.diagonal(dim1=-2, dim2=-1).sum(-1).argmax(1)
        turn = turns[torch.arange(len(turns), device=turns.device), nearest]
        shift = self.shifts_px[second] - self.shifts_px[first]
        apart = torch.cat([torch.deg2rad(to_rotation_vector(turn)), shift], dim=1)
        return torch.einsum("ni,nij,nj->n", apart, self.precision[first], apart).clamp_min(0).sqrt()


@dataclass(frozen=True, eq=False)
class PosePrior:
    """Normal priors of poses, each about one that is given.

    Attributes
    ----------
    rotations : Tensor (n, 3, 3), float64
    shifts_px : Tensor (n, 2), float64
        Moving the images.
    precision : Tensor (n, 5, 5), float64
        Inverse of the covariance of turns about x, y and z of the image, in radians, and of shifts along x
        and y, in pixels.
    """

    rotations: Tensor
    shifts_px: Tensor
    precision: Tensor

    @classmethod
    def of_shifts(cls, rotations: Tensor, deviation_px: float) -> PosePrior:
        """Of shifts about none, the same for all poses; rotations (n, 3, 3) are free."""
        precision = torch.diag(
            rotations.new_tensor([0.0, 0, 0, 1, 1], dtype=torch.float64) * deviation_px**-2
        )
        shifts = precision.new_zeros(len(rotations), 2)
        return cls(rotations.double(), shifts, precision.expand(len(rotations), 5, 5))

    @classmethod
    def about(
        cls, rotations: Tensor, shifts_px: Tensor, *, turn_deg: float, shift_px: float, fulcrum_px: Tensor
    ) -> PosePrior:
        """About poses, with a point of the particle that turns leave where it is.

        Parameters
        ----------
        rotations, shifts_px : Tensor (n, 3, 3), (n, 2)
            Poses; shifts move the images.
        turn_deg, shift_px : float
            Standard deviations about and along an axis.
        fulcrum_px : Tensor (3,)
            The point (x, y, z) in the map, from the centre of its box; shifts are those of its projection.
        """
        rotations, shifts = rotations.double(), shifts_px.double()
        onto = levers(rotations, fulcrum_px)
        widths = rotations.new_tensor([math.radians(turn_deg)] * 3 + [shift_px] * 2)
        return cls(rotations, shifts, onto.transpose(1, 2) @ (onto / widths.square()[:, None]))

    def __getitem__(self, which: Tensor) -> PosePrior:
        """Those of some poses."""
        return PosePrior(self.rotations[which], self.shifts_px[which], self.precision[which])

    def to(self, device: torch.device) -> PosePrior:
        """The same on a device."""
        return PosePrior(*(each.to(device) for each in vars(self).values()))

    def apart(self, rotations: Tensor, shifts_px: Tensor) -> Tensor:
        """Turns in radians and shifts in pixels (n, 5) from the poses that the priors are about."""
        turns = torch.deg2rad(to_rotation_vector(rotations @ self.rotations.transpose(1, 2)))
        return torch.cat([turns, shifts_px - self.shifts_px], dim=1)


def levers(rotations: Tensor, point_px: Tensor) -> Tensor:
    """Turn small changes of poses into those with a point of the map in the place of the box's centre.

    Parameters
    ----------
    rotations : Tensor (n, 3, 3)
    point_px : Tensor (3,)
        (x, y, z) from the centre of the box.

    Returns
    -------
    Tensor (n, 5, 5)
        Onto turns, in radians, and shifts. A turn w moves the projection of the point p by ``w × R p`` in an
        image whose own shift does not change. The inverse is that of the opposite point.
    """
    x, y, z = (rotations @ point_px.to(rotations)).unbind(1)
    none = torch.zeros_like(x)
    moved = torch.stack([none, z, -y, -z, none, x], dim=1).reshape(-1, 2, 3)
    onto = torch.eye(5, dtype=rotations.dtype, device=rotations.device).repeat(len(rotations), 1, 1)
    onto[:, 3:, :3] = -moved
    return onto


def refine_poses(
    volume: SplineVolume,
    images: DiscImages,
    rotations: Tensor,
    shifts_px: Tensor,
    *,
    owner: Tensor | None = None,
    radius: float | None = None,
    deviation_px: float = math.inf,
    prior: PosePrior | None = None,
) -> LocalPoses:
    """Climb from poses to the maxima of the posterior near them.

    Parameters
    ----------
    volume : SplineVolume
    images : DiscImages
        b of them.
    rotations, shifts_px : Tensor (n, 3, 3), (n, 2)
        Where to begin; shifts move the images.
    owner : Tensor (n,) of int, optional
        Image of each pose; by default the poses are one for each image.
    radius : float, optional
        Largest frequency used, in Fourier pixels; by default the disc's.
    deviation_px : float
        Standard deviation of the normal prior of shifts.
    prior : PosePrior, optional
        Of the n poses, instead.

    Returns
    -------
    LocalPoses

    Notes
    -----
    Levenberg's damped Gauss-Newton steps on ``Re Σ X* P - ½ Σ W |P|²``, X the weighted image and P the slice.
    A turn by the small vector w, in the frame of the image, changes the slice at k by ``-(R ∇P) · (w × k)``.
    The matrix of the last step is Fisher's information: its inverse is the covariance of the pose, if the
    map is right and the noise as modelled.

    References
    ----------
    .. [1] Marquardt 1963, J. Soc. Ind. Appl. Math. 11, 431-441, DOI 10.1137/0111030
    """
    disc, count = images.disc, images.disc.count(radius or images.disc.radius)
    device = volume.values.device
    owner = torch.arange(len(rotations), device=device) if owner is None else owner.to(device)
    points = volume.check(disc.points[:count])
    rotations, shifts_px = (pose.to(device, torch.float64, copy=True) for pose in (rotations, shifts_px))
    prior = (prior or PosePrior.of_shifts(rotations, deviation_px)).to(device)
    if device.type != "cpu":
        return _climb_torch(volume, images, rotations, shifts_px, owner, points, prior)
    _ = volume.turns(rotations)
    real = volume.values.real.dtype
    linear = torch.view_as_real(images.linear).flatten(1).to(real).numpy()
    squared, sums = images.squared.to(real).numpy(), torch.empty(len(rotations), 21, dtype=torch.float64)
    turn, move, found, whose = rotations.numpy(), shifts_px.numpy(), sums.numpy(), owner.numpy()
    fixed = volume.flat(), volume.origin, volume.scale
    shape = disc.box, disc.radius, points.numpy()
    centre, middle, precision = (each.contiguous().numpy() for each in vars(prior).values())

    def climb(part: tuple[int, int]) -> None:
        for n in range(*part):
            image = linear[whose[n], : 2 * count], squared[whose[n], :count]
            about = centre[n], middle[n], precision[n]
            kernels.polish(*fixed, turn[n], move[n], *shape, *image, about, _TRIALS, _GAIN, found[n])

    in_threads(climb, parts(len(rotations)))
    return LocalPoses(rotations, shifts_px, sums[:, 0], _symmetric(sums[:, 6:]))


def slice_tangents(volume: SplineVolume, rotations: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Slices, and how they change with the pose, on any device.

    Parameters
    ----------
    volume : SplineVolume
    rotations : Tensor (b, 3, 3)
    points : Tensor (p, 2)
        Frequencies in Fourier pixels.

    Returns
    -------
    slices : Tensor (b, p), complex
    tangents : Tensor (b, 5, p), complex
        Derivatives by turns in radians about x, y and z of the image, and by the shift in pixels that centres
        the image, which moves the slice the other way.
    """
    slices, slopes = sample_gradients(volume, rotations, points)
    x, y = points.to(slices.real).unbind(1)
    hx, hy, hz = (slopes @ rotations.transpose(1, 2).to(slopes)).unbind(-1)
    step = 2j * math.pi / volume.box * slices
    return slices, torch.stack([-y * hz, x * hz, y * hx - x * hy, step * x, step * y], dim=1)


def likelihood_derivatives(
    volume: SplineVolume, images: DiscImages, rotations: Tensor, shifts_px: Tensor, points: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-likelihood, gradient and Gauss-Newton matrix at one pose of each image, on any device.

    Parameters
    ----------
    volume, images
        As for `refine_poses`.
    rotations, shifts_px : Tensor (b, 3, 3), (b, 2)
    points : Tensor (p, 2)
        The first of the disc.

    Returns
    -------
    tuple of Tensor (b,), (b, 5), (b, 5, 5), float64
        By turns in radians about the axes of the image, and shifts in pixels.
    """
    slices, tangents = slice_tangents(volume, rotations, points)
    weight = images.squared[:, : len(points)].to(slices.real)
    wave = images.disc.shifts(shifts_px)[:, : len(points)]
    shifted = (images.linear[:, : len(points)] * wave).to(slices)
    columns = torch.view_as_real(tangents)
    lacking = shifted - weight * slices
    value = ((shifted + lacking) * slices.conj()).real.double().sum(1) / 2
    gradient = (columns * torch.view_as_real(lacking)[:, None]).sum((2, 3)).double()
    weighted = (columns * weight[:, None, :, None]).flatten(2)
    return value, gradient, (weighted @ columns.flatten(2).transpose(1, 2)).double()


def _climb_torch(
    volume: SplineVolume,
    images: DiscImages,
    rotations: Tensor,
    shifts_px: Tensor,
    owner: Tensor,
    points: Tensor,
    prior: PosePrior,
) -> LocalPoses:
    """As `_pose_kernels.polish`, all poses at a time."""
    mine = DiscImages(images.disc, images.linear[owner], images.squared[owner])

    def evaluate(rotations: Tensor, shifts_px: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, gradient, matrix = likelihood_derivatives(volume, mine, rotations, shifts_px, points)
        apart = prior.apart(rotations, shifts_px)
        pull = (prior.precision @ apart[..., None])[..., 0]
        return value - (apart * pull).sum(1) / 2, gradient - pull, matrix + prior.precision

    value, gradient, matrix = evaluate(rotations, shifts_px)
    damping = torch.full_like(value, kernels.BEGIN)
    for _ in range(1, _TRIALS):
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag_embed(damping[:, None] * diagonal))
        able = (failed == 0) & (damping <= kernels.MOST)
        factor = torch.where(able[:, None, None], factor, _eye(factor))
        step = torch.cholesky_solve(gradient[..., None], factor)[..., 0]
        able &= (step * gradient).sum(1) / 2 >= _GAIN
        if not bool(able.any()):
            break
        step = torch.where(able[:, None], step, torch.zeros_like(step))
        other = from_rotation_vector(torch.rad2deg(step[:, :3])) @ rotations
        moved = shifts_px + step[:, 3:]
        tried = evaluate(other, moved)
        better = able & (tried[0] > value)
        rotations = torch.where(better[:, None, None], other, rotations)
        shifts_px = torch.where(better[:, None], moved, shifts_px)
        value = torch.where(better, tried[0], value)
        gradient = torch.where(better[:, None], tried[1], gradient)
        matrix = torch.where(better[:, None, None], tried[2], matrix)
        eased = (damping / kernels.EASE).clamp_min(kernels.LEAST)
        damping = torch.where(better, eased, damping * kernels.EASE**2)
    return LocalPoses(rotations, shifts_px, value, matrix)


def _symmetric(triangles: Tensor) -> Tensor:
    """Matrices (n, 5, 5) from lower triangles (n, 15), row by row."""
    row, column = torch.tril_indices(5, 5)
    matrices = triangles.new_empty(len(triangles), 5, 5)
    matrices[:, row, column] = triangles
    matrices[:, column, row] = triangles
    return matrices


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)
