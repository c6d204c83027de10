"""Whether the half maps agree as far in every direction."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from halfmap.ops.directional_chance import isotropic_draws
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
from halfmap.ops.symmetry import order
from halfmap.pictures import INK, MARGIN, QUIET, add_panel, add_text, new_figure, resolution_axis, save
from halfmap.steps.validate.finding import Finding, Given, Light
from halfmap.steps.validate.views import on_sphere

_EVEN, _UNEVEN = 0.7, 0.5
"""Ratio of the areas under the curves of cones, from which on they are alike, and below which they differ."""

_MOST, _LEAST = 0.9, 0.1
"""Occupancies between which directions are lost one after the other."""

_APART, _FAR_APART = 1.2, 1.5
"""Resolution of the worst twentieth of directions over that of the best, likewise."""

_TAIL = 0.05

_EVERY = 10
"""Of the cones that are drawn, one in so many shows where curves are by chance."""


_SURE = 0.99
"""Part of what chance gives, beyond which a difference is real."""


class _Spread(NamedTuple):
    """How much directions differ."""

    best: float
    """Resolution in Å of the best twentieth of directions."""
    worst: float
    ratio: float
    """Of the areas under curves."""

    @property
    def apart(self) -> float:
        """Worst over best."""
        return self.worst / self.best

    @classmethod
    def of(cls, found: DirectionalFSC, side: float) -> _Spread:
        """As the curves have it."""
        resolutions = found.resolutions(side)
        best, worst = (float(resolutions.quantile(q)) for q in (_TAIL, 1 - _TAIL))
        return cls(best, worst, area_ratio(found))


class _Chance(NamedTuple):
    """What isotropic maps give."""

    ratio: float
    """Of areas, that one in a hundred is below."""
    apart: float
    """Worst resolution over the best, that one in a hundred is above."""
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    """Curves (shells,) between which 99 % of cones are."""


def check_directions(given: Given, folder: Path) -> Finding:
    """Correlate the half maps in cones about many directions."""
    group = given.step.symmetry
    masked = directional_fsc(given.halves.first, given.halves.second, mask=given.mask)
    found, chance = _corrected(masked, given), _by_chance(masked, given)
    left = occupancy(found, order=order(group))
    spread, round_ = _Spread.of(found, given.side), sphericity(found)
    between = (left.part < _MOST) & (left.part > _LEAST)
    real = spread.ratio < chance.ratio or spread.apart > chance.apart
    light, words = _judge(spread, real)
    sentence = (
        f"Half maps agree to {spread.best:.2f} Å along the best twentieth of directions and to "
        f"{spread.worst:.2f} Å along the worst; areas under the curves of cones have the ratio "
        f"{spread.ratio:.2f} ({chance.ratio:.2f} or more by chance): {words}."
    )
    path = folder / "directions.png"
    _draw(path, given, found, left, chance)
    values = {
        "resolution_best_A": spread.best,
        "resolution_worst_A": spread.worst,
        "worst_direction_xyz": [float(x) for x in found.directions[int(found.last_shells().argmin())]],
        "cone_area_ratio": spread.ratio,
        "cone_area_ratio_by_chance": chance.ratio,
        "worst_over_best": spread.apart,
        "worst_over_best_by_chance": chance.apart,
        "beyond_chance": real,
        "sphericity": round_,
        "occupancy_0.9_A": given.side / max(left.shell_of(_MOST), 1e-6),
        "occupancy_0.5_A": given.side / max(left.shell_of(0.5), 1e-6),
        "occupancy_0.1_A": given.side / max(left.shell_of(_LEAST), 1e-6),
        "bingham_greatest": float(left.bingham[between].max()) if bool(between.any()) else 0.0,
        "bingham_limit": left.limit,
        "cone_half_angle_deg": HALF_ANGLE,
    }
    method = (
        "Correlation in cones about 300 directions, corrected for the mask by that of random phases, "
        "the same in all directions, against 300 draws of what noise makes of the curve of all directions in "
        f"such cones ({group}, 99 %); the part of directions that is above 0.143 (FSO), with Bingham's "
        "statistic. Tan et al. 2017, DOI 10.1038/nmeth.4347; Vilas & Tagare 2023, DOI "
        "10.1038/s41592-023-01874-3."
    )
    return Finding("Directions", light, sentence, values, (path.name,), method)


def _corrected(found: DirectionalFSC, given: Given) -> DirectionalFSC:
    """Without what the mask correlates, and without what a filter has left."""
    curves = given.fsc
    last = given.halves.last_shell
    return found.corrected(curves.randomised, from_shell=curves.from_shell, last_shell=last)


def _by_chance(masked: DirectionalFSC, given: Given) -> _Chance:
    """Draw maps that are the same in all directions."""
    spreads, curves = [], []
    for drawn in isotropic_draws(masked, given.scatter, group=given.step.symmetry, seed=given.step.seed):
        even = _corrected(drawn, given)
        spreads.append(_Spread.of(even, given.side))
        curves.append(even.curves[::_EVERY].numpy())
    low, high = np.quantile(np.concatenate(curves), (0.5 - _SURE / 2, 0.5 + _SURE / 2), axis=0)
    ratio = float(np.quantile([each.ratio for each in spreads], 1 - _SURE))
    return _Chance(ratio, float(np.quantile([each.apart for each in spreads], _SURE)), low, high)


def _judge(spread: _Spread, real: bool) -> tuple[Light, str]:
    """Light, and what to do."""
    if not real:
        return "green", "no direction is worse than chance has it"
    if spread.ratio < _UNEVEN or spread.apart > _FAR_APART:
        return "red", "detail along the worst direction is not there: do not read it from the map"
    if spread.ratio < _EVEN or spread.apart > _APART:
        return "amber", "some directions are worse: see where before you read the map"
    return "green", "differences between directions are real but small"


def _draw(path: Path, given: Given, found: DirectionalFSC, left: Occupancy, chance: _Chance) -> None:
    """Draw all curves with the occupancy, and the resolution over the sphere."""
    figure = new_figure(980, 350)
    add_text(figure, MARGIN + 44, 350 - 34, "correlation in cones; directions left", size=11)
    axes = add_panel(figure, MARGIN + 44, 60, 400, 240)
    frequency = np.arange(found.curves.shape[1]) / given.side
    axes.plot(frequency, found.curves.numpy().T, color="C0", lw=0.3, alpha=0.25)
    axes.plot(frequency, found.whole.numpy(), color=INK, lw=1.8, label="all directions")
    axes.plot(frequency, left.part.numpy(), color="C1", lw=1.8, label="directions above 0.143")
    axes.fill_between(frequency, chance.low, chance.high, color=QUIET, alpha=0.25, lw=0, label="by chance")
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
