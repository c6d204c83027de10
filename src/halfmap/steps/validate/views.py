"""From which views the map is made, and what these leave of its signal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from halfmap.ops.orientation import efficiency, sample_fourier, view_density
from halfmap.ops.symmetry import order
from halfmap.pictures import INK, MARGIN, QUIET, add_panel, add_text, dress, new_figure, save
from halfmap.steps.validate.finding import Finding, Given

if TYPE_CHECKING:
    from torch import Tensor

_EVEN, _UNEVEN = 0.6, 0.35
"""Factor of compensation, and efficiency, from which on views are even enough, and below which not."""

_GAPS, _MANY_GAPS = 0.002, 0.05
"""Part of Fourier space without any slice, likewise."""

_RADIUS = 50.0
"""Fourier voxels at which slices are counted at most."""

_PASSING = 20.0
"""Slices that pass by each direction in the mean, at least: of as many, chance leaves no gaps."""

_MOST = 100_000
"""Particles whose views are counted, at most."""

_MISSED = (
    "; it may also be that the particle has a symmetry which was left out, so that poses crowd in a part of "
    "its equal views: look with `halfmap symmetry`, and refine with --symmetry"
)


def check_views(given: Given, folder: Path) -> Finding:
    """Measure how evenly the views of the particles sample Fourier space."""
    assert given.particles is not None
    rotations = given.particles.poses.rotations.double()
    if len(rotations) > _MOST:
        rng = np.random.default_rng(given.step.seed)
        rotations = rotations[torch.from_numpy(np.sort(rng.permutation(len(rotations))[:_MOST]))]
    group = given.step.symmetry
    # Nearer to the origin fewer particles leave no gaps by chance.
    enough = len(rotations) * order(group) / (2 * _PASSING)
    radius = max(1.0, min(_RADIUS, given.side / given.resolution, enough))
    sampling = sample_fourier(rotations, group=group, radius=radius)
    efficient, gaps = efficiency(sampling), sampling.unsampled
    factor = sampling.scf if gaps == 0 else sampling.scf_star
    worst = float(sampling.worst()[1][0])
    if gaps > _MANY_GAPS or min(factor, efficient) < _UNEVEN:
        light, words = "red", "views are missing: tilt the stage, or change grid, ice or detergent"
    elif gaps > _GAPS or min(factor, efficient) < _EVEN:
        light, words = "amber", "uneven: look at the map along the rarest views before you read it"
    else:
        light, words = "green", "even enough"
    if light != "green" and order(group) == 1:
        words += _MISSED
    sentence = (
        f"Efficiency of the views {efficient:.2f}, sampling compensation {factor:.2f}; "
        + (
            f"{100 * gaps:.1f} % of directions are in no slice"
            if gaps
            else f"the rarest direction has {worst:.2f} of the mean"
        )
        + f": {words}."
    )
    path = folder / "views.png"
    _draw(path, rotations, group, sampling.directions, sampling.relative)
    values = {
        "efficiency": efficient,
        "sampling_compensation_factor": sampling.scf,
        "sampling_compensation_factor_star": sampling.scf_star,
        "unsampled_part": gaps,
        "rarest_over_mean": worst,
        "radius_fourier_voxels": radius,
    }
    method = (
        "Slices through directions of Fourier space: 1 for evenly spread views, 0.81 for views from all "
        "sides of an axis, 0 for one view. Naydenova & Russo 2017, DOI 10.1038/s41467-017-00782-3; Baldwin & "
        "Lyumkis 2020, DOI 10.1016/j.pbiomolbio.2019.09.002."
    )
    return Finding("Views", light, sentence, values, (path.name,), method)


def _draw(path: Path, rotations: Tensor, group: str, directions: Tensor, sampling: Tensor) -> None:
    """Draw densities of views and of slices over the sphere, equal areas."""
    figure = new_figure(980, 330)
    places, density = view_density(rotations, group=group)
    panels = (
        ("particles seen from a direction, over the mean", places, density),
        ("slices that pass by a direction, over the mean", directions, sampling),
    )
    for i, (title, where, values) in enumerate(panels):
        left = MARGIN + 44 + i * 480
        add_text(figure, left, 330 - 34, title, size=11, color=INK)
        axes = add_panel(figure, left, 50, 340, 235)
        on_sphere(axes, where, values)
        bar = figure.colorbar(axes.collections[0], cax=add_panel(figure, left + 352, 50, 12, 235))
        bar.ax.tick_params(labelsize=8)
    add_text(figure, MARGIN, 6, "equal areas", size=8, color=QUIET)
    save(figure, path)


def on_sphere(axes, directions: Tensor, values: Tensor) -> None:
    """Draw values (d,) at directions (d, 3) over rot and the cosine of tilt."""
    x, y, z = directions.numpy().T
    bins = int(np.clip(math.sqrt(len(x) / 20), 6, 48))
    where = (np.degrees(np.arctan2(y, x)), z)
    edges = (2 * bins, bins)
    span = ((-180, 180), (-1, 1))
    total, rot, level = np.histogram2d(*where, bins=edges, range=span, weights=values.numpy())
    count, _, _ = np.histogram2d(*where, bins=edges, range=span)
    with np.errstate(invalid="ignore"):
        axes.pcolormesh(rot, level, (total / count).T, cmap="viridis")
    tilts = np.array([0, 30, 60, 90, 120, 150, 180])
    axes.set_yticks(np.cos(np.radians(tilts)), [f"{tilt}" for tilt in tilts])
    axes.set_xticks(np.arange(-180, 181, 60))
    dress(axes, "rot, °")
    axes.set_ylabel("tilt, °", fontsize=9, color=INK)
