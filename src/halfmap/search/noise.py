"""Power of the noise and scale of the images, group by group, from what a map leaves unexplained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfmap.search.disc import FourierDisc
from halfmap.search.projector import SplineVolume, sample_slices

_RANGE = 0.2, 5.0
"""Of scales that are believed; a group of a few bad images has any."""


@dataclass(frozen=True, eq=False)
class ResidualSums:
    """Sums over images, ring by ring for each group, in double precision.

    Attributes
    ----------
    power : Tensor (g, rings)
        Of images less their models.
    count : Tensor (g, rings)
        Coefficients.
    cross, model : Tensor (g, rings)
        Of images times models, and of squared models, both without scale.
    """

    power: Tensor
    count: Tensor
    cross: Tensor
    model: Tensor

    @classmethod
    def empty(cls, groups: int, rings: int) -> ResidualSums:
        """Sums of nothing."""
        return cls(*torch.zeros(4, groups, rings, dtype=torch.float64))

    @classmethod
    def of(
        cls,
        disc: FourierDisc,
        coefficients: Tensor,
        ctf: Tensor,
        slices: Tensor,
        group: Tensor,
        *,
        scale: Tensor,
        weights: Tensor | None = None,
    ) -> ResidualSums:
        """From images at their poses.

        Parameters
        ----------
        disc : FourierDisc
        coefficients : Tensor (n, p), complex
            Of images, moved by the shifts of their poses.
        ctf : Tensor (n, p)
            Without scale.
        slices : Tensor (n, p), complex
            Of the map, at their poses.
        group : Tensor (n,) int64
        scale : Tensor (g,)
            Of each group, with which the residual is taken.
        weights : Tensor (n,), optional
            Probability of each pose; 1 by default.
        """
        model = ctf * slices
        residual = (coefficients - scale[group, None].to(ctf) * model).abs().square()
        terms = torch.stack(
            [
                residual,
                torch.ones_like(residual),
                (coefficients * model.conj()).real,
                model.abs().square(),
            ]
        )
        terms = terms.double() * disc.multiplicity
        if weights is not None:
            terms *= weights[:, None]
        rings = terms.new_zeros(4, len(group), disc.radius + 1).index_add_(2, disc.rings, terms)
        return cls(*terms.new_zeros(4, len(scale), disc.radius + 1).index_add_(1, group, rings))

    def __add__(self, other: ResidualSums) -> ResidualSums:
        return ResidualSums(
            self.power + other.power,
            self.count + other.count,
            self.cross + other.cross,
            self.model + other.model,
        )

    def noise(self) -> Tensor:
        """Power (g, rings) of the noise; groups without images have the mean of the others."""
        mean = self.power.sum(0) / self.count.sum(0).clamp_min(1)
        return torch.where(self.count > 0, self.power / self.count.clamp_min(1), mean)

    def scale(self, noise: Tensor, *, from_ring: int = 1) -> Tensor:
        """Scales (g,) that fit best, their mean over images 1, from noise (g, rings); 1 without images."""
        part = slice(from_ring, None)
        cross = (self.cross / noise)[:, part].sum(1)
        model = (self.model / noise)[:, part].sum(1)
        found = torch.where(model > 0, cross / model.clamp_min(torch.finfo(model.dtype).tiny), 1.0)
        images = self.count[:, 0]
        mean = (found * images).sum() / images.sum().clamp_min(1)
        found = torch.where(images > 0, found / mean, 1.0)
        return found.clamp(*_RANGE)


def residuals(
    disc: FourierDisc,
    volume: SplineVolume,
    coefficients: Tensor,
    ctf: Tensor,
    group: Tensor,
    rotations: Tensor,
    shifts_px: Tensor,
    *,
    scale: Tensor,
    owner: Tensor | None = None,
    weights: Tensor | None = None,
) -> ResidualSums:
    """Sums of images (b, p) at poses (n), as `refine_poses` and `Backprojection.add` take them."""
    owner = torch.arange(len(rotations), device=rotations.device) if owner is None else owner
    slices = sample_slices(volume, rotations, disc.points)
    moved = coefficients[owner] * disc.shifts(shifts_px)
    return ResidualSums.of(disc, moved, ctf[owner], slices, group[owner], scale=scale, weights=weights)
