"""What a class average looks like: its outline, texture, symmetry and strength."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.ndimage as ndi
import torch
from numpy.typing import NDArray
from scipy.spatial import ConvexHull, QhullError

from halfmap.ops.fourier import resample

_SIZE = 64
"""Pixels across the diameter that images are looked at with."""

_NAMES = ("strength", "edge", "slope", "radial", "largest", "area", "solidity", "elongation", "offset")
_NAMES += ("beside_blob", "detail", "negative")


def describe(
    averages: NDArray[np.float32], diameter_px: float, members: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """Describe class averages.

    Parameters
    ----------
    averages : array (k, box, box)
        Particles bright.
    diameter_px : float
        Of the mask.
    members : array (k,)
        Particles; the strength and area of an average are compared with those of most particles.

    Returns
    -------
    dict of array (k,)
        NaN for averages without members or contrast. ``strength``: logarithm of the standard deviation.
        ``edge``: variance near the mask over that inside. ``slope``: share of the variance that a plane
        explains, as at the edge of a carbon film. ``radial``: share that rings explain, as in a ball.
        ``largest``: share of the bright area in the largest blob. ``area``,
        ``solidity``, ``elongation``, ``offset``: of that blob; its size, how convex, how long and how far
        from the centre it is. ``beside_blob``: deviation outside it over its height. ``detail``: share of the
        variance within it that blurring takes away. ``negative``: depth of the darkest over the brightest.
    """
    small = _reduced(averages, diameter_px)
    values = np.full((len(small), len(_NAMES)), np.nan)
    for i, image in enumerate(small):
        if members[i] > 0 and np.isfinite(image).all() and image.std() > 0:
            values[i] = _describe(image)
    result = {name: values[:, j] for j, name in enumerate(_NAMES)}
    for name in ("strength", "area"):
        known = np.isfinite(result[name])
        if known.any():
            typical = np.median(np.repeat(result[name][known], members[known]))
            result[name] = result[name] - typical
            result[f"{name}_off"] = np.abs(result[name])
    return result


def _reduced(averages: NDArray[np.float32], diameter_px: float) -> NDArray[np.float64]:
    """Averages as `_SIZE` pixels across the diameter."""
    box = averages.shape[-1]
    new = max(16, 2 * round(0.5 * box * _SIZE / diameter_px))
    small = resample(torch.from_numpy(averages), new_shape=(new, new)).numpy().astype(np.float64)
    edge = max(0, new // 2 - _SIZE // 2 - 1)
    return small[:, edge : new - edge, edge : new - edge]


def _describe(image: NDArray[np.float64]) -> list[float]:
    n = image.shape[-1]
    y, x = (np.indices(image.shape) - n // 2) / (_SIZE / 2)
    radius = np.hypot(y, x)
    disc = radius < 0.97
    image = image - np.median(image[disc & (radius > 0.8)])
    inside = image[disc]
    variance = float(inside.var()) + 1e-30
    ring = (radius * _SIZE / 2).astype(int)
    profile = np.bincount(ring.ravel(), image.ravel()) / np.maximum(np.bincount(ring.ravel()), 1)
    plane = np.stack([x[disc], y[disc]])
    slope = ((plane @ (inside - inside.mean())) ** 2 / (plane**2).sum(1)).sum() / (inside.size * variance)
    near, core = image[disc & (radius > 0.75)], image[radius < 0.75]
    blurred = ndi.gaussian_filter(image, _SIZE / 40)
    bright = disc & (blurred > _otsu(blurred[disc]))
    labelled: Any = ndi.label(bright)
    labels, count = labelled
    sizes = np.bincount(labels.ravel())[1:]
    blob = labels == 1 + int(sizes.argmax()) if count else disc
    height = float(image[blob].mean()) if blob.any() else 1e-9
    area, solidity, elongation, offset = _outline(blob, x, y)
    around = disc & ~np.asarray(ndi.binary_dilation(blob, iterations=3), bool)
    texture = image - ndi.gaussian_filter(image, _SIZE / 14)
    return [
        0.5 * np.log(variance),
        np.log((near.var() + 1e-3 * variance) / (core.var() + 1e-3 * variance)),
        float(slope),
        float(profile[ring[disc]].var() / variance),
        float(sizes.max() / sizes.sum()) if count else 0.0,
        area,
        solidity,
        elongation,
        offset,
        float(np.log((image[around].std() if around.any() else 0.0) / max(abs(height), 1e-9) + 0.01)),
        float(np.log(texture[blob].var() / variance + 1e-3)),
        float(np.log(max(-blurred[disc].min(), 0.0) / max(blurred[disc].max(), 1e-9) + 0.03)),
    ]


def _outline(
    blob: NDArray[np.bool_], x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[float, float, float, float]:
    """Logarithm of the area over the mask's, solidity, logarithm of length over width, offset from centre."""
    points = np.stack([x[blob], y[blob]], axis=1)
    middle = points.mean(0)
    area = np.log(blob.sum() / (np.pi * (_SIZE / 2) ** 2))
    spread = np.cov((points - middle).T) if len(points) > 2 else np.eye(2)
    narrow, wide = np.maximum(np.linalg.eigvalsh(spread), 1e-6)
    try:
        # The hull of the pixels' centres lacks half a pixel all around.
        hull = ConvexHull(points)
        solidity = blob.sum() * (2 / _SIZE) ** 2 / (hull.volume + hull.area / _SIZE)
    except (QhullError, ValueError):
        solidity = 1.0
    return (
        float(area),
        float(min(solidity, 1.0)),
        float(0.5 * np.log(wide / narrow)),
        float(np.hypot(*middle)),
    )


def _otsu(values: NDArray[np.float64]) -> float:
    """Level that parts values into two groups of least variance.

    Otsu 1979, DOI 10.1109/TSMC.1979.4310076.
    """
    ordered = np.sort(values)
    below = np.arange(1, len(ordered))
    sums = np.cumsum(ordered)
    low, high = sums[:-1] / below, (sums[-1] - sums[:-1]) / (len(ordered) - below)
    between = below * (len(ordered) - below) * (high - low) ** 2
    return float(ordered[int(between.argmax())])
