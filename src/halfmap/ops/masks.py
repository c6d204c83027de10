"""Soft masks with cosine edges: spheres, circles, cylinders, particles, any binary mask made soft."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops import grids

_EXTEND_A, _EDGE_A = (3.0, 5.0), (10.0, 24.0)
"""What a mask leaves around a particle, and its edge: least and most."""

_EXTEND, _EDGE = 0.5, 2.5
"""The same, over the detail that the map has."""

_EDGE_PX, _EDGE_OF_BOX = 3.0, 1 / 8
"""Least edge in voxels, and the greatest over the side of the box."""


def soft_sphere(
    shape: Sequence[int],
    *,
    radius: float,
    edge: float,
    pixel_size: float = 1.0,
    centre: Sequence[float] = (0.0, 0.0, 0.0),
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Ball in a volume with a cosine edge.

    Parameters
    ----------
    shape : (d, h, w)
        Shape of the volume.
    radius, edge, pixel_size : float
        In Å, or all in pixels for a pixel size of 1. The mask is 1 up to `radius` and 0 from radius + edge
        on.
    centre : (x, y, z)
        Of the ball, from the origin, voxel ``n // 2``.
    device, dtype : optional
        Of the result.

    Returns
    -------
    Tensor (d, h, w)
        Values from 0 to 1.

    Raises
    ------
    ShapeError
        If the shape is not that of a volume.
    ParameterError
        If the radius is not positive or the edge negative.
    """
    _check(shape, 3, edge, radius=radius)
    x, y, z = _axes(shape, pixel_size, centre, device)
    outside = (x.square() + y.square() + z.square()).sqrt_() - radius
    return _cosine_edge(outside, edge).to(dtype)


def soft_circle(
    shape: Sequence[int],
    *,
    radius: float,
    edge: float,
    pixel_size: float = 1.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Disc around the origin of an image (h, w) with a cosine edge; `soft_sphere` in two dimensions."""
    _check(shape, 2, edge, radius=radius)
    outside = grids.radius(shape, pixel_size, device=device, dtype=torch.float64) - radius
    return _cosine_edge(outside, edge).to(dtype)


def soft_cylinder(
    shape: Sequence[int],
    *,
    radius: float,
    length: float,
    edge: float,
    pixel_size: float = 1.0,
    centre: Sequence[float] = (0.0, 0.0, 0.0),
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cylinder along z in a volume (d, h, w), 1 within `radius` and `length` in Å.

    The edge follows the distance to the cylinder, so that its rims are rounded; parameters as `soft_sphere`.
    """
    _check(shape, 3, edge, radius=radius, length=length)
    x, y, z = _axes(shape, pixel_size, centre, device)
    across = ((x.square() + y.square()).sqrt_() - radius).clamp_(min=0)
    along = (z.abs() - length / 2).clamp_(min=0)
    return _cosine_edge(torch.hypot(across, along), edge).to(dtype)


def soft_edge(
    mask: Tensor,
    *,
    width: float,
    extend: float = 0.0,
    pixel_size: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Add a cosine edge around a binary mask.

    Parameters
    ----------
    mask : Tensor (h, w) or (d, h, w)
        One image or volume; what is not zero is inside.
    width, extend, pixel_size : float
        Width of the edge, and how far the mask grows before it begins, in Å, or in pixels for a pixel size
        of 1.
    dtype : optional
        Of the result.

    Returns
    -------
    Tensor, as `mask`
        1 inside and up to `extend` from the nearest voxel inside, (1 + cos(pi distance / width)) / 2 at the
        Euclidean distance beyond that, 0 from `width` on. An empty mask stays empty.

    Notes
    -----
    The exact distance transform runs on the CPU wherever the mask lies.
    """
    _check(mask.shape, mask.ndim, width)
    if not extend >= 0:
        raise ParameterError(f"a mask can be extended by 0 or more, not by {extend}")
    if mask.ndim not in (2, 3):
        raise ShapeError(f"a mask is one image or volume, not of shape {tuple(mask.shape)}")
    inside = mask != 0
    if not inside.any():
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    distance = torch.from_numpy(distance_transform_edt((~inside).cpu().numpy(), sampling=pixel_size))
    return _cosine_edge(distance - extend, width).to(device=mask.device, dtype=dtype)


def around_region(region: Tensor, *, resolution: float, pixel_size: float) -> Tensor:
    """Soft mask of a particle, of a softness that suits what its map resolves.

    Parameters
    ----------
    region : Tensor (d, h, w)
        Voxels of the particle, as of `envelope.find_region`.
    resolution : float
        Of the map in Å; infinite where it is not known.
    pixel_size : float
        In Å.

    Returns
    -------
    Tensor (d, h, w), float32
        1 in the region and half a detail around it (3 to 5 Å), then an edge of 2.5 details (10 to 24 Å, at
        least three voxels, and otherwise at most an eighth of the box).

    Notes
    -----
    A mask smears what is coarse over frequencies about the inverse of its edge away. Where the spectrum falls
    steeply, half maps correlate there by nothing else, and so do maps of random phases [1]_. A wide edge
    prevents it at less cost than a wide margin: noise counts by the square of the mask.

    References
    ----------
    .. [1] Chen S et al. High-resolution noise substitution to measure overfitting and validate resolution in
       3D structure determination by single particle electron cryomicroscopy. Ultramicroscopy 135, 24-35
       (2013). DOI 10.1016/j.ultramic.2013.06.004
    """
    extend = min(max(_EXTEND * resolution, _EXTEND_A[0]), _EXTEND_A[1])
    width = edge_around_region(max(region.shape), resolution=resolution, pixel_size=pixel_size)
    return soft_edge(region, extend=extend, width=width, pixel_size=pixel_size)


def edge_around_region(box: int, *, resolution: float, pixel_size: float) -> float:
    """Width in Å of the edge that `around_region` makes in a box of so many pixels."""
    widest = min(_EDGE_A[1], _EDGE_OF_BOX * box * pixel_size)
    return max(min(max(_EDGE * resolution, _EDGE_A[0]), widest), _EDGE_PX * pixel_size)


def around_points(
    shape: Sequence[int], points_px: NDArray[np.float64], *, radius_px: float
) -> NDArray[np.bool_]:
    """Voxels whose centres are within a distance of any of some points.

    Parameters
    ----------
    shape : (d, h, w)
        Shape of the volume.
    points_px : array (n, 3)
        Points (x, y, z) in voxels from the first one.
    radius_px : float
        Distance in voxels. The voxel nearest to a point is always inside.

    Returns
    -------
    array (d, h, w) of bool
        Points outside the box count as far as they reach into it.
    """
    inside = np.zeros(tuple(shape), np.bool_)
    nearest = np.rint(points_px).astype(np.int64)
    reach = math.ceil(radius_px + 0.5)
    limits = np.array(tuple(shape)[::-1])
    steps = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 3), axis=-1).reshape(-1, 3)
    # A voxel of the nearest one's neighbourhood is at most half its diagonal nearer than it looks.
    for step in steps[np.linalg.norm(steps, axis=1) <= radius_px + 0.87]:
        voxels = nearest + step
        near = np.square(voxels - points_px).sum(axis=1) <= radius_px**2
        near |= not step.any()
        near &= ((voxels >= 0) & (voxels < limits)).all(axis=1)
        x, y, z = voxels[near].T
        inside[z, y, x] = True
    return inside


def _axes(
    shape: Sequence[int], pixel_size: float, centre: Sequence[float], device: torch.device | str | None
) -> list[Tensor]:
    """Positions x, y, z in Å from a centre, to be broadcast to (d, h, w)."""
    axes = []
    for axis, (size, middle) in enumerate(zip(reversed(shape), centre, strict=True)):
        line = (torch.arange(size, device=device, dtype=torch.float64) - size // 2) * pixel_size - middle
        axes.append(line.reshape([-1] + [1] * axis))
    return axes


def _cosine_edge(distance: Tensor, width: float) -> Tensor:
    """1 where the distance outside is not positive, 0 from `width` on, a half cosine between."""
    if width == 0:
        return (distance <= 0).to(distance.dtype)
    return 0.5 + 0.5 * torch.cos(torch.pi * (distance / width).clamp_(0, 1))


def _check(shape: Sequence[int], ndim: int, edge: float, **lengths: float) -> None:
    if len(shape) != ndim:
        raise ShapeError(f"a {ndim}D mask needs {ndim} sizes, not the shape {tuple(shape)}")
    for name, value in lengths.items():
        if not value > 0:
            raise ParameterError(f"the {name} of a mask must be positive, not {value}")
    if not edge >= 0:
        raise ParameterError(f"the edge of a mask must be 0 or more, not {edge}")
