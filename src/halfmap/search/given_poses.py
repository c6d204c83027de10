"""Likelihood of images about poses that are given: what several volumes are compared by without a search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfmap.ops.threads import in_threads
from halfmap.search import _pose_kernels as kernels
from halfmap.search.disc import DiscImages
from halfmap.search.local import likelihood_derivatives
from halfmap.search.projector import SplineVolume, parts


@dataclass(frozen=True, eq=False)
class Expansion:
    """Log-likelihood about one pose of each image, to second order.

    Attributes
    ----------
    value : Tensor (b,), float64
        At the pose, over that of noise alone.
    gradient, matrix : Tensor (b, 5), (b, 5, 5), float64
        First derivatives, and Fisher's information: by turns in radians about x, y and z of the image, and by
        shifts along x and y in pixels.
    """

    value: Tensor
    gradient: Tensor
    matrix: Tensor

    @classmethod
    def of(
        cls,
        volume: SplineVolume,
        images: DiscImages,
        rotations: Tensor,
        shifts_px: Tensor,
        *,
        radius: float | None = None,
    ) -> Expansion:
        """Expand at one pose of each image.

        Parameters
        ----------
        volume : SplineVolume
        images : DiscImages
            b of them.
        rotations, shifts_px : Tensor (b, 3, 3), (b, 2)
            Poses; shifts move the images.
        radius : float, optional
            Largest frequency used, in Fourier pixels; by default the disc's.
        """
        disc, count = images.disc, images.disc.count(radius or images.disc.radius)
        points = volume.check(disc.points[:count])
        if volume.values.device.type != "cpu":
            return cls(*likelihood_derivatives(volume, images, rotations, shifts_px, points))
        _ = volume.turns(rotations)
        real = volume.values.real.dtype
        linear = torch.view_as_real(images.linear).flatten(1).to(real).numpy()
        squared, found = images.squared.to(real).numpy(), torch.empty(len(images), 21, dtype=torch.float64)
        turn, move, sums = rotations.double().numpy(), shifts_px.double().numpy(), found.numpy()
        fixed, shape = (volume.flat(), volume.origin, volume.scale), (disc.box, disc.radius, points.numpy())

        def expand(part: tuple[int, int]) -> None:
            for n in range(*part):
                image = linear[n, : 2 * count], squared[n, :count]
                kernels.evaluate(*fixed, turn[n], move[n], *shape, *image, sums[n])

        in_threads(expand, parts(len(images)))
        matrix = found.new_empty(len(images), 5, 5)
        row, column = torch.tril_indices(5, 5)
        matrix[:, row, column] = matrix[:, column, row] = found[:, 6:]
        return cls(found[:, 0], found[:, 1:6], matrix)

    def evidence(self, precision: Tensor) -> Tensor:
        """Logarithm (b,) of the likelihood averaged over normal priors about the poses.

        Parameters
        ----------
        precision : Tensor (b, 5, 5), float64
            Inverses of their covariances, positive definite.
        """
        total = self.matrix + precision
        gain = (self.gradient * torch.linalg.solve(total, self.gradient)).sum(1)
        narrowed = torch.linalg.slogdet(total).logabsdet - torch.linalg.slogdet(precision).logabsdet
        return self.value + 0.5 * gain - 0.5 * narrowed
