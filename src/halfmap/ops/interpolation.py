"""Values of real images and volumes between their pixels, and volumes rotated about their origin."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from halfmap.errors import ParameterError, ShapeError

Method = Literal["linear", "cubic"]
Outside = Literal["zero", "nearest"]

_CHUNK_POINTS = 2**22
"""Positions handled at a time: their coordinates take some 100 MB."""

_CUBIC_POINTS = 2**16
"""Fewer, so that the many intermediates of one pass stay in the caches."""


def sample_image(
    image: Tensor, positions_px: Tensor, *, method: Method = "linear", outside: Outside = "zero"
) -> Tensor:
    """Interpolate images at positions between their pixels.

    Parameters
    ----------
    image : Tensor (..., h, w)
        Real images.
    positions_px : Tensor (*points, 2)
        Positions (x, y) in pixels, the same for every image; (0, 0) is the centre of the first pixel.
    method : {"linear", "cubic"}
        Bilinear, or bicubic by Keys' kernel with a = -1/2.
    outside : {"zero", "nearest"}
        What lies beyond the edges: zeros, or the nearest pixel of the edge.

    Returns
    -------
    Tensor (..., *points)
        Differentiable in the images and the positions.

    Raises
    ------
    ShapeError
        If the positions do not end in two coordinates.

    References
    ----------
    Keys 1981, 10.1109/TASSP.1981.1163711.

    Examples
    --------
    >>> image = torch.arange(12.0).reshape(3, 4)
    >>> sample_image(image, torch.tensor([[1.5, 2.0]]))
    tensor([9.5000])
    """
    return _sample(image, positions_px, 2, method, outside)


def sample_volume(
    volume: Tensor, positions_px: Tensor, *, method: Method = "linear", outside: Outside = "zero"
) -> Tensor:
    """Interpolate volumes (..., d, h, w) at positions (*points, 3) between their voxels: (..., *points).

    Positions are (x, y, z) in voxels and (0, 0, 0) is the centre of the first one; the rest is as for
    `sample_image`.
    """
    return _sample(volume, positions_px, 3, method, outside)


def rotate_volume(volume: Tensor, rotation: Tensor, *, method: Method = "linear") -> Tensor:
    """Rotate volumes about their origin, voxel ``n // 2``.

    Parameters
    ----------
    volume : Tensor (..., d, h, w)
        Real volumes.
    rotation : Tensor (3, 3)
        What was at x (from the origin) comes to ``rotation @ x``, so that the sum along z of a volume
        rotated by R is its projection with rotation matrix R.
    method : {"linear", "cubic"}
        Interpolation; cubic keeps more of the high frequencies and takes some six times as long.

    Returns
    -------
    Tensor (..., d, h, w)
        Zero where the rotated volume does not reach.

    Raises
    ------
    ShapeError
        If the rotation is not a 3 x 3 matrix.
    """
    if rotation.shape != (3, 3):
        raise ShapeError(f"a rotation of shape {tuple(rotation.shape)} is not a 3 x 3 matrix")
    d, h, w = volume.shape[-3:]
    origin = torch.tensor([w // 2, h // 2, d // 2], device=volume.device, dtype=volume.dtype)
    back = rotation.to(volume)
    y, x = torch.meshgrid(
        torch.arange(h, device=volume.device, dtype=volume.dtype),
        torch.arange(w, device=volume.device, dtype=volume.dtype),
        indexing="ij",
    )
    planes = []
    for z in torch.arange(d, device=volume.device, dtype=volume.dtype).split(
        max(1, _CHUNK_POINTS // (h * w))
    ):
        grid = torch.broadcast_tensors(x, y, z[:, None, None])
        # Multiplying rows by R from the right is R transposed on columns: where each voxel's content comes
        # from.
        positions = (torch.stack(grid, dim=-1) - origin) @ back + origin
        planes.append(_sample(volume, positions, 3, method, "zero"))
    return torch.cat(planes, dim=-3)


def _sample(array: Tensor, positions: Tensor, ndim: int, method: Method, outside: Outside) -> Tensor:
    if positions.shape[-1:] != (ndim,):
        raise ShapeError(f"positions of shape {tuple(positions.shape)} do not end in {ndim} coordinates")
    if array.ndim < ndim or array.is_complex():
        raise ShapeError(
            f"an array of shape {tuple(array.shape)} and type {array.dtype} is not real and {ndim}D"
        )
    if method not in ("linear", "cubic") or outside not in ("zero", "nearest"):
        raise ParameterError(f"there is no interpolation '{method}' with '{outside}' outside")
    channels = array.reshape(-1, *array.shape[-ndim:]).contiguous()
    points = positions.reshape(-1, ndim).to(array)
    body = _linear if method == "linear" else _cubic
    parts = [
        body(channels, part, outside)
        for part in points.split(_CHUNK_POINTS if method == "linear" else _CUBIC_POINTS)
    ]
    return torch.cat(parts, dim=-1).reshape(*array.shape[:-ndim], *positions.shape[:-1])


def _linear(channels: Tensor, points: Tensor, outside: Outside) -> Tensor:
    """(c, *shape), (n, ndim) -> (c, n)."""
    shape = torch.tensor(channels.shape[:0:-1], device=points.device, dtype=points.dtype)
    # torch counts from the edges of the outer pixels, -1 to 1.
    grid = (2 * points + 1) / shape - 1
    grid = grid.reshape(1, *[1] * (points.shape[1] - 1), *points.shape)
    mode = "zeros" if outside == "zero" else "border"
    found = grid_sample(channels[None], grid, mode="bilinear", padding_mode=mode, align_corners=False)
    return found.reshape(len(channels), len(points))


def _cubic(channels: Tensor, points: Tensor, outside: Outside) -> Tensor:
    """(c, *shape), (n, ndim) -> (c, n)."""
    axes = []
    for axis in range(points.shape[1]):
        size, stride = channels.shape[-1 - axis], channels.stride(-1 - axis)
        base = points[:, axis].detach().floor()
        weights, offsets = [], []
        for tap, weight in enumerate(_keys(points[:, axis] - base)):
            index = base.to(torch.int64) + (tap - 1)
            inside = (index >= 0) & (index < size)
            weights.append(weight * inside if outside == "zero" else weight)
            offsets.append(index.clamp(0, size - 1) * stride)
        axes.append((weights, offsets))
    return _blend(channels.flatten(1), axes, torch.zeros_like(axes[0][1][0]))


def _blend(flat: Tensor, axes: list[tuple[list[Tensor], list[Tensor]]], offset: Tensor) -> Tensor:
    """Weigh neighbours along the last axis of the list, each of them weighed along the axes before."""
    if not axes:
        return flat[:, offset]
    weights, offsets = axes[-1]
    found = weights[0] * _blend(flat, axes[:-1], offset + offsets[0])
    for weight, further in zip(weights[1:], offsets[1:], strict=True):
        found = found + weight * _blend(flat, axes[:-1], offset + further)
    return found


def _keys(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of the four pixels about a position at fraction `t` between the middle two."""
    return (
        -0.5 * t + t**2 - 0.5 * t**3,
        1 - 2.5 * t**2 + 1.5 * t**3,
        0.5 * t + 2 * t**2 - 1.5 * t**3,
        -0.5 * t**2 + 0.5 * t**3,
    )
