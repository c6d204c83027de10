"""The picture of a mask: its outline on slices and projections of the map, and where the threshold lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from halfmap.io.volumes import MapFile
from halfmap.pictures import MARGIN, QUIET, add_panel, add_text, new_figure, save
from halfmap.steps.mask.build import Mask

_TILE, _GAP, _HEAD, _LABEL = 260, 10, 62, 20
_CORE, _REACH = "#ff9500", "#1f9fe0"
_NAMES = ("xy", "xz", "yz")


def draw_mask(path: Path, volume: MapFile, mask: Mask) -> None:
    """Draw slices through the mask's middle and projections, with outlines, and the map's densities.

    Parameters
    ----------
    path : path
        PNG file to write.
    volume : MapFile
        Map that the mask is for.
    mask : Mask
        The mask, not inverted.
    """
    soft = mask.array.numpy()
    rows = 2 if mask.levels is None else 3
    width = 3 * _TILE + 2 * _GAP + 2 * MARGIN
    height = _HEAD + rows * (_TILE + _LABEL) + MARGIN
    figure = new_figure(width, height)
    add_text(figure, MARGIN, height - 30, f"Mask: {mask.text}", size=10, weight="bold")
    depth, rows_y, columns = soft.shape
    box = f"box {columns} × {rows_y} × {depth} voxels of {volume.pixel_size:.4g} Å"
    inside = f"{100 * float((soft > 0.5).mean()):.1f} % of the box inside"
    add_text(figure, MARGIN, height - 48, f"{box}; {inside}", color=QUIET)
    colours = "orange: fully inside, blue: edge of the mask"
    add_text(figure, width - MARGIN, height - 48, colours, color=QUIET, ha="right")
    middle = _middle(soft)
    for column in range(3):
        axis = column
        left = MARGIN + column * (_TILE + _GAP)
        bottom = height - _HEAD - _LABEL - _TILE
        add_text(figure, left, bottom + _TILE + 3, f"{_NAMES[axis]}, slice {middle[axis] + 1}", size=8)
        axes = add_panel(figure, left, bottom, _TILE, _TILE)
        _draw(axes, np.take(volume.array, middle[axis], axis), np.take(soft, middle[axis], axis))
        bottom -= _TILE + _LABEL
        add_text(figure, left, bottom + _TILE + 3, f"{_NAMES[axis]}, projection", size=8)
        axes = add_panel(figure, left, bottom, _TILE, _TILE)
        _draw(axes, np.asarray(volume.array.sum(axis)), np.asarray(soft.max(axis)))
    if mask.levels is not None:
        _draw_densities(
            add_panel(figure, MARGIN + 40, MARGIN + 28, width - 2 * MARGIN - 50, _TILE - 40), mask
        )
    save(figure, path)


def _middle(soft: NDArray) -> tuple[int, int, int]:
    """Voxel (z, y, x) in the middle of the mask."""
    total = soft.sum(dtype=np.float64)
    places = []
    for axis in range(3):
        profile = soft.sum(axis=tuple(other for other in range(3) if other != axis), dtype=np.float64)
        places.append(round(float((profile * np.arange(len(profile))).sum() / total)))
    return places[0], places[1], places[2]


def _draw(axes: Axes, image: NDArray, soft: NDArray) -> None:
    low, high = np.percentile(image, (0.5, 99.5))
    axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-30), origin="lower")
    # A mask that covers all of a slice has no outline there.
    for level, colour in ((0.999, _CORE), (0.01, _REACH)):
        if soft.min() < level < soft.max():
            axes.contour(soft, levels=[level], colors=[colour], linewidths=1.2)
    axes.set_axis_off()


def _draw_densities(axes: Axes, mask: Mask) -> None:
    """Histogram of the blurred map with solvent, noise and threshold."""
    assert mask.levels is not None and mask.blurred is not None and mask.region is not None
    levels, values = mask.levels, mask.blurred.numpy().ravel()
    edges = np.linspace(values.min(), values.max(), 201)
    counts = np.histogram(values, edges)[0]
    inside = np.histogram(values[mask.region.numpy().ravel()], edges)[0]
    axes.stairs(counts, edges, color=QUIET, fill=True, alpha=0.35, label="all voxels")
    axes.stairs(inside, edges, color=_CORE, fill=True, alpha=0.6, label="particle")
    noise = (levels.solvent - levels.noise, levels.solvent + levels.noise)
    axes.axvspan(*noise, color=_REACH, alpha=0.25, label="solvent and noise")
    axes.axvline(mask.threshold, color="black", lw=1, label="threshold")
    axes.axvline(levels.particle, color="black", lw=1, ls=":", label="mean above it")
    axes.set_yscale("log")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("density of the blurred map", fontsize=8)
    axes.set_ylabel("voxels", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
