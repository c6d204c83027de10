"""How the resolution grows with the number of particles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfmap.ops.fsc import resolution
from halfmap.ops.fsc_interval import Interval, resolution_interval
from halfmap.pictures import INK, MARGIN, QUIET, add_panel, add_text, dress, new_figure, save
from halfmap.steps.validate.finding import Finding, Given
from halfmap.steps.validate.sample import Growth

_SAME = 1.15
"""Resolution of the half maps given over that of maps of the same particles, up to which they are alike."""

_FLAT = 1.05
"""Resolution of a quarter of the particles over that of all, below which more particles add nothing."""

_NYQUIST = 1.1
"""Resolution over that of the last shell, up to which pixels limit it."""

_LABELS = 0.06
"""Distance of labels over the height of the picture, at least."""


def check_growth(given: Given, growth: Growth, folder: Path) -> Finding:
    """Fit a line to squared frequency against the logarithm of the number of particles.

    Its slope is 2 / B: the B-factor says how fast the signal of a particle fades with frequency, whatever it
    is that blurs it.
    """
    where = {"pixel_size": given.halves.pixel_size, "box": given.halves.box}
    found = np.array([resolution(curve, **where) for curve in growth.curves])
    intervals = [
        resolution_interval(curve, given.scatter, **where, draws=500, seed=given.step.seed)
        for curve in growth.curves
    ]
    finest = 2 * given.halves.pixel_size
    slope = line(growth.particles, found, intervals, coarsest=given.side / 3, finest=_NYQUIST * finest)
    b_factor = 2 / slope if slope > 0 else float("inf")
    double = 1 / np.sqrt(1 / found[-1] ** 2 + slope * np.log(2)) if np.isfinite(found[-1]) else float("nan")
    values = {
        "particles": growth.particles.tolist(),
        "resolution_A": [float(each) if np.isfinite(each) else None for each in found],
        "b_factor_A2": b_factor if np.isfinite(b_factor) else None,
        "resolution_of_twice_as_many_A": float(double),
    }
    limited = found[-1] <= _NYQUIST * finest
    none = not np.isfinite(found[-1])
    all_of_them = given.particles is not None and growth.particles[-1] == len(given.particles)
    if none or (all_of_them and found[-1] > _SAME * given.resolution):
        light, words = (
            "red",
            f"the half maps given agree to {given.resolution:.2f} Å: they are not of these particles at "
            "these poses, or of another point group",
        )
    elif found[-3] <= _FLAT * found[-1] and not limited:
        light, words = "amber", "a quarter of them is as good: what limits the map is not their number"
    elif limited:
        light, words = "green", "the pixels limit it, not the particles"
    elif not np.isfinite(b_factor):
        light, words = "green", "the curve of fewer of them is too coarse for a line"
    else:
        light, words = "green", f"twice as many would give about {double:.2f} Å, if they are as good"
    sentence = f"{growth.particles[-1]:,} particles give " + ("no map" if none else f"{found[-1]:.2f} Å")
    if np.isfinite(b_factor):
        sentence += f", and the more there are the finer, by a B-factor of {b_factor:.0f} Å²"
    path = folder / "growth.png"
    _draw(path, growth, found, intervals)
    method = (
        "Half maps of a sixteenth of the particles, an eighth and so on, at the poses of the table. "
        "Stagg et al. 2014, DOI 10.1016/j.jsb.2013.10.010."
    )
    return Finding(
        "Resolution against particles (ResLog)", light, f"{sentence}: {words}.", values, (path.name,), method
    )


def line(
    particles: NDArray[np.intp],
    found: NDArray[np.float64],
    intervals: list[Interval],
    *,
    coarsest: float,
    finest: float,
) -> float:
    """Slope of squared frequency, 1/Å², over the logarithm of the number of particles.

    By resolutions within bounds in Å: beyond these the box or the pixels say what they are. Zero if there are
    less than three.
    """
    known = np.isfinite(found) & (found < coarsest) & (found > finest)
    if known.sum() < 3:
        return 0.0
    y = 1 / found[known] ** 2
    error = np.array([1 / each.fine**2 - 1 / each.coarse**2 for each in intervals])[known]
    x = np.log(particles[known])
    return float(np.polyfit(x, y, 1, w=1 / np.maximum(error, 1e-3 * y.max()))[0])


def _apart(values: NDArray[np.float64]) -> list[int]:
    """Numbers of values, the last and those some way from others, so that labels do not meet."""
    kept = [len(values) - 1]
    for i in reversed(range(len(values) - 1)):
        if np.abs(values[i] - values[kept]).min() > _LABELS * np.ptp(values):
            kept.append(i)
    return kept


def _draw(path: Path, growth: Growth, found: NDArray[np.float64], intervals: list[Interval]) -> None:
    figure = new_figure(560, 400)
    title = f"{growth.particles[-1]:,} particles: {found[-1]:.2f} Å"
    add_text(figure, MARGIN, 400 - 30, title, size=13, weight="bold")
    add_text(figure, MARGIN, 400 - 50, "with intervals of 95 %", size=10, color=QUIET)
    axes = add_panel(figure, 70, 56, 560 - 70 - MARGIN, 280)
    low, high = (np.array([getattr(each, name) for each in intervals]) for name in ("coarse", "fine"))
    y = 1 / found**2
    axes.errorbar(
        growth.particles,
        y,
        yerr=np.maximum([y - 1 / low**2, 1 / high**2 - y], 0),
        marker="o",
        ms=4,
        color=INK,
        lw=1.2,
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(growth.particles, [f"{n:,}" for n in growth.particles])
    axes.minorticks_off()
    shown = _apart(y)
    axes.set_yticks(y[shown], [f"{each:.2f}" for each in found[shown]])
    axes.set_ylabel("resolution, Å (squared frequency)", fontsize=9, color=INK)
    dress(axes, "particles")
    save(figure, path)
