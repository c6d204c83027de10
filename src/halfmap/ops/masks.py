"""Soft masks with cosine edges: spheres, circles, cylinders, and any binary mask made soft."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops import grids


def soft_sphere(
    shape: Sequence[int],
    *,
    radius: float,
    edge: float,
    pixel_size: float = 1.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Ball around the origin of a volume with a cosine edge.

    Parameters
    ----------
    shape : (d, h, w)
        Shape of the volume.
    radius, edge, pixel_size : float
        In Å, or all in pixels for a pixel size of 1. The mask is 1 up to `radius` and 0 from radius + edge
        on.
    device, dtype : optional
        Of the result.

    Returns
    -------
    Tensor (d, h, w)
        Values from 0 to 1, centred on voxel ``n // 2``.

    Raises
    ------
    ShapeError
        If the shape is not that of a volume.
    ParameterError
        If the radius is not positive or the edge negative.
    """
    _check(shape, 3, edge, radius=radius)
    outside = grids.radius(shape, pixel_size, device=device, dtype=torch.float64) - radius
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
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cylinder along z around the origin of a volume (d, h, w), 1 within `radius` and `length` in Å.

    The edge follows the distance to the cylinder, so that its rims are rounded; parameters as `soft_sphere`.
    """
    _check(shape, 3, edge, radius=radius, length=length)
    position = grids.coordinates(shape, pixel_size, device=device, dtype=torch.float64)
    across = (position[..., :2].square().sum(-1).sqrt_() - radius).clamp_(min=0)
    along = (position[..., 2].abs() - length / 2).clamp_(min=0)
    return _cosine_edge(torch.hypot(across, along), edge).to(dtype)


def soft_edge(
    mask: Tensor, *, width: float, pixel_size: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Add a cosine edge around a binary mask.

    Parameters
    ----------
    mask : Tensor (h, w) or (d, h, w)
        One image or volume; what is not zero is inside.
    width, pixel_size : float
        Width of the edge in Å, or in pixels for a pixel size of 1.
    dtype : optional
        Of the result.

    Returns
    -------
    Tensor, as `mask`
        1 inside, (1 + cos(pi distance / width)) / 2 at the Euclidean distance to the nearest voxel inside, 0
        beyond. An empty mask stays empty.

    Notes
    -----
    The exact distance transform runs on the CPU wherever the mask lies.
    """
    _check(mask.shape, mask.ndim, width)
    if mask.ndim not in (2, 3):
        raise ShapeError(f"a mask is one image or volume, not of shape {tuple(mask.shape)}")
    inside = mask != 0
    if not inside.any():
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    distance = torch.from_numpy(distance_transform_edt((~inside).cpu().numpy(), sampling=pixel_size))
    return _cosine_edge(distance, width).to(device=mask.device, dtype=dtype)


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
