"""Whether the half maps agree as far in every direction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from halfmap.ops.directional_fsc import (
    HALF_ANGLE,
    THRESHOLD,
    DirectionalFSC,
    Occupancy,
    area_ratio,
    directional_fsc,
    occupancy,
    sphericity,
)
from halfmap.pictures import INK, MARGIN, QUIET, add_panel, add_text, new_figure, resolution_axis, save
from halfmap.steps.validate.finding import Finding, Given
from halfmap.steps.validate.views import on_sphere

_EVEN, _UNEVEN = 0.7, 0.5
"""Ratio of the areas under the curves of cones, from which on they are alike, and below which they differ."""

_MOST, _LEAST = 0.9, 0.1
"""Occupancies between which directions are lost one after the other."""

_APART, _FAR_APART = 1.2, 1.5
"""Resolution of the worst twentieth of directions over that of the best, likewise."""

_TAIL = 0.05


def check_directions(given: Given, folder: Path) -> Finding:
    """Correlate the half maps in cones about many directions."""
    found = directional_fsc(given.halves.first, given.halves.second, mask=given.mask)
    left = occupancy(found)
    resolutions = found.resolutions(given.side)
    best, worst = (float(resolutions.quantile(q)) for q in (_TAIL, 1 - _TAIL))
    ratio, round_ = area_ratio(found), sphericity(found)
    between = (left.part < _MOST) & (left.part > _LEAST)
    significant = bool((left.bingham[between] > left.limit).any())
    spread = worst / best
    if significant and (ratio < _UNEVEN or spread > _FAR_APART):
        light, words = "red", "detail along the worst direction is not there: do not read it from the map"
    elif significant and (ratio < _EVEN or spread > _APART):
        light, words = "amber", "some directions are worse: see where before you read the map"
    elif significant:
        light, words = "green", "differences between directions are real but small"
    else:
        light, words = "green", "no direction is worse than chance has it"
    sentence = (
        f"Half maps agree to {best:.2f} Å along the best twentieth of directions and to {worst:.2f} Å along "
        f"the worst; areas under the curves of cones have the ratio {ratio:.2f}: {words}."
    )
    path = folder / "directions.png"
    _draw(path, given, found, left)
    values = {
        "resolution_best_A": best,
        "resolution_worst_A": worst,
        "worst_direction_xyz": [float(x) for x in found.directions[int(resolutions.argmax())]],
        "cone_area_ratio": ratio,
        "sphericity": round_,
        "occupancy_0.9_A": given.side / max(left.shell_of(_MOST), 1e-6),
        "occupancy_0.5_A": given.side / max(left.shell_of(0.5), 1e-6),
        "occupancy_0.1_A": given.side / max(left.shell_of(_LEAST), 1e-6),
        "bingham_greatest": float(left.bingham[between].max()) if bool(between.any()) else 0.0,
        "bingham_limit": left.limit,
        "cone_half_angle_deg": HALF_ANGLE,
    }
    method = (
        "Correlation in cones about 300 directions, the part of these that is above 0.143 (FSO) and "
        "Bingham's test of whether they are spread evenly. Tan et al. 2017, DOI 10.1038/nmeth.4347; "
        "Vilas & Tagare 2023, DOI 10.1038/s41592-023-01874-3."
    )
    return Finding("Directions", light, sentence, values, (path.name,), method)


def _draw(path: Path, given: Given, found: DirectionalFSC, left: Occupancy) -> None:
    """Draw all curves with the occupancy, and the resolution over the sphere."""
    figure = new_figure(980, 350)
    add_text(figure, MARGIN + 44, 350 - 34, "correlation in cones; directions left", size=11)
    axes = add_panel(figure, MARGIN + 44, 60, 400, 240)
    frequency = np.arange(found.curves.shape[1]) / given.side
    axes.plot(frequency, found.curves.numpy().T, color="C0", lw=0.3, alpha=0.25)
    axes.plot(frequency, found.whole.numpy(), color=INK, lw=1.8, label="all directions")
    axes.plot(frequency, left.part.numpy(), color="C1", lw=1.8, label="directions above 0.143")
    unlike = (left.part < _MOST) & (left.part > _LEAST) & (left.bingham > left.limit)
    if bool(unlike.any()):
        axes.plot(
            frequency[unlike.numpy()],
            left.part[unlike].numpy(),
            "o",
            ms=4,
            color="C3",
            label="not evenly spread",
        )
    axes.axhline(THRESHOLD, color=QUIET, lw=0.8, ls="--")
    axes.set_ylim(-0.1, 1.04)
    resolution_axis(axes, frequency[-1])
    axes.legend(fontsize=8, frameon=False)
    add_text(figure, 560, 350 - 34, "resolution along each direction, Å", size=11)
    sphere = add_panel(figure, 560, 60, 330, 240)
    both = torch.cat([found.directions, -found.directions])
    on_sphere(sphere, both, found.resolutions(given.side).repeat(2))
    bar = figure.colorbar(sphere.collections[0], cax=add_panel(figure, 902, 60, 12, 240))
    bar.ax.tick_params(labelsize=8)
    save(figure, path)
