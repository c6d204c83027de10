"""The pictures of a CTF estimation: one of every micrograph, one of the whole job."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from halfmap.data.defocus import surface_terms
from halfmap.pictures import (
    HEIGHT,
    INK,
    MARGIN,
    QUIET,
    SHADE,
    STEPS,
    TOP,
    add_head,
    add_panel,
    add_text,
    new_figure,
    save,
)
from halfmap.steps.ctf.estimate import CtfEstimate
from halfmap.steps.ctf.quality import THRESHOLD, Profile, has_rings
from halfmap.steps.ctf.tiles import TileSpectra

_WIDTH = 1560

_SPECTRUM, _FIELD = 430, 360
_DATA, _MODEL, _BAND, _ERROR = INK, "#e0312f", "#c9d6e6", "#8fa9c6"
_RINGS_A = (10, 5, 3.5)

_SUMMARY_WIDTH, _SUMMARY_HEAD, _ROW_HEIGHT = 1500, 52, 190
_PANELS = (
    ("Mean defocus", "µm", "defocus", 1e-4),
    ("Astigmatism", "Å", "rlnCtfAstigmatism", 1),
    ("Standard error of the mean defocus", "Å", "hmDefocusUncertainty", 1),
    ("Finest resolution with rings", "Å", "rlnCtfMaxResolution", 1),
    ("Figure of merit", "", "rlnCtfFigureOfMerit", 1),
    ("Tilt", "°", "rlnMicrographTiltAngle", 1),
    ("Power in the ice ring, over what is beside it", "", "rlnCtfIceRingDensity", 1),
    ("Phase shift", "°", "rlnPhaseShift", 1),
    ("Cs at which the rings fit best", "mm", "hmCtfCs", 1),
    ("Thickness of the ice", "Å", "hmCtfIceThickness", 1),
)
_ERRORS = {
    "rlnMicrographTiltAngle": "hmTiltUncertainty",
    "rlnPhaseShift": "hmPhaseShiftUncertainty",
    "hmCtfCs": "hmCtfCsUncertainty",
    "hmCtfIceThickness": "hmCtfIceThicknessUncertainty",
}
"""Standard errors that are drawn; that of the defocus has a panel of its own."""

_KINDS = 4
"""Problems that the summary's title has room for."""

_OUTLIER = 12.0
"""Median deviations above the median at which an axis ends."""


def draw_micrograph(
    path: str | Path,
    found: CtfEstimate,
    spectra: TileSpectra,
    *,
    profile: Profile,
    data: NDArray,
    model: NDArray,
    image: NDArray,
    row: dict[str, Any],
    title: str,
) -> None:
    """Draw the spectrum with its model, the equiphase profile, and the defocus over the field.

    Parameters
    ----------
    path : path
        PNG file to write.
    found : CtfEstimate
        The fit.
    spectra : TileSpectra
        What it was made to.
    profile : Profile
        Averaged over places of one phase.
    data, model : array (box, box)
        Flattened spectrum and squared CTF, the zero frequency in the middle.
    image : array (h, w)
        The micrograph.
    row : dict
        Columns of the table.
    title : str
        Line above the picture.
    """
    figure = new_figure(_WIDTH, HEIGHT)
    add_text(figure, MARGIN, HEIGHT - 16, Path(title).name[-60:], size=13, weight="bold", va="top")
    if row["hmCtfProblem"] != "none":
        text = row["hmCtfProblem"]
        add_text(figure, _WIDTH - MARGIN, HEIGHT - 16, text, size=13, color=_MODEL, va="top", ha="right")
    _draw_spectrum(figure, data, model, spectra.bins.extent, row)
    left = _WIDTH - MARGIN - 66 - _FIELD
    _draw_profile(figure, profile, row, MARGIN + _SPECTRUM + 70, left - 36)
    _draw_field(figure, found, spectra, image, left, row)
    save(figure, path)


def draw_summary(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Draw what was found in all micrographs of a job, one after the other and as histograms.

    Parameters
    ----------
    path : path
        PNG file to write.
    rows : list of dict
        Columns of the table, a micrograph each. Quantities that none has are
        left out.
    """
    series = []
    for title, unit, key, factor in _PANELS:
        values = np.array([_value(row, key) for row in rows]) * factor
        if np.isfinite(values).any():
            errors = np.array([_value(row, _ERRORS[key]) for row in rows]) if key in _ERRORS else None
            series.append((title, unit, values, errors))
    height = _SUMMARY_HEAD + _ROW_HEIGHT * len(series) + 20
    figure = new_figure(_SUMMARY_WIDTH, height)
    marked = sum(row["hmCtfProblem"] != "none" for row in rows)
    title = f"{len(rows):,} micrograph{'' if len(rows) == 1 else 's'}"
    title += f", {marked:,} of them with problems (red): {_commonest(rows)}" if marked else ""
    add_text(figure, 24, height - 18, title, size=13, weight="bold", va="top")
    bad = np.array([row["hmCtfProblem"] != "none" for row in rows])
    for number, (name, unit, values, errors) in enumerate(series):
        bottom = height - _SUMMARY_HEAD - _ROW_HEIGHT * (number + 1) + 34
        _draw_quantity(figure, bottom, name, unit, values, bad, errors, last=number == len(series) - 1)
    save(figure, path)


def _commonest(rows: list[dict[str, Any]]) -> str:
    """Kinds of problems that micrographs have, without their figures, the most frequent first."""
    problems = [row["hmCtfProblem"].split("; ") for row in rows if row["hmCtfProblem"] != "none"]
    kinds = Counter(problem.partition(":")[0] for own in problems for problem in own)
    named = [f"{kind} ({number:,})" for kind, number in kinds.most_common(_KINDS)]
    return ", ".join(named) + (", …" if len(kinds) > _KINDS else "")


def _value(row: dict[str, Any], key: str) -> float:
    if key == "defocus":
        return (row["rlnDefocusU"] + row["rlnDefocusV"]) / 2
    value = row.get(key)
    return math.nan if value is None else float(value)


def _draw_spectrum(figure: Figure, data: NDArray, model: NDArray, extent: float, row: dict[str, Any]) -> None:
    axes = add_panel(figure, MARGIN, TOP - _SPECTRUM, _SPECTRUM, _SPECTRUM)
    box = len(data)
    factor = max(1, box // _SPECTRUM)
    n = box // factor * factor
    small, rings = (_blocks(values[:n, :n], factor) for values in (data, model))
    small = _smoothed(small)
    axis = np.arange(len(small)) - len(small) // 2
    radius = np.hypot(axis[:, None], axis)
    used = small[(radius > 0.08 * len(small)) & (radius < 0.5 * len(small))]
    low, high = np.percentile(used, (2, 98)) if len(used) else (0, 1)
    grey = np.clip((small - low) * (255 / max(high - low, 1e-9)), 0, 255)
    middle = len(small) // 2
    grey[:, :middle] = 255 * np.clip(rings[:, :middle], 0, 1)
    axes.imshow(
        grey.astype(np.uint8),
        cmap="gray",
        origin="lower",
        extent=(0, 1, 0, 1),
        aspect="auto",
        vmin=0,
        vmax=255,
    )
    axes.set_axis_off()
    edge = 2 * extent / box
    angle = np.linspace(0, 2 * np.pi, 121)
    kept = [ring for ring in _RINGS_A if ring > edge]
    circles = [0.5 + edge / 2 / r * np.stack([np.cos(angle), np.sin(angle)], axis=-1) for r in kept]
    style = {"colors": "#b8f0ff", "linewidths": 1.0, "linestyles": (0, (4, 4)), "alpha": 0.8}
    axes.add_collection(LineCollection(circles, **style), autolim=False)
    for ring in kept:
        place = 0.5 + edge / 2 / ring * math.sqrt(0.5)
        axes.text(place, place, f"{ring:g} Å", color="white", size=9, ha="center", va="center", bbox=SHADE)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    sides = f"right: data, edges at {edge:.3g} Å"
    if not has_rings(row):
        add_head(figure, MARGIN, "Defocus unknown", f"left: best fit to noise, {sides}")
        return
    head = f"Defocus {row['rlnDefocusU']:,.0f} / {row['rlnDefocusV']:,.0f} Å at {row['rlnDefocusAngle']:.1f}°"
    detail = f"mean ± {row['hmDefocusUncertainty']:.1f} Å"
    if row["hmDefocusAngleUncertainty"] < 45:
        detail += f", angle ± {row['hmDefocusAngleUncertainty']:.1f}°"
    if "rlnPhaseShift" in row:
        detail += f", phase shift {row['rlnPhaseShift']:.1f} ± {row['hmPhaseShiftUncertainty']:.1f}°"
    add_head(figure, MARGIN, head, f"{detail}; left: model, {sides}")


def _draw_profile(figure: Figure, profile: Profile, row: dict[str, Any], left: float, right: float) -> None:
    height = (TOP - 62) * 0.7
    axes = add_panel(figure, left, TOP - height, right - left, height)
    k = profile.frequency
    # Noise and model in view at all frequencies: both over the rings' strength there.
    window = np.ones(max(9, len(k) // 8))
    power = np.convolve(profile.data**2, window, "same") / np.convolve(np.ones(len(k)), window, "same")
    noise = np.convolve(profile.error**2, window, "same") / np.convolve(np.ones(len(k)), window, "same")
    scale = 1 / np.sqrt(2 * power + 9 * noise + 1e-12)
    axes.fill_between(
        k,
        (profile.model - 2 * profile.error - profile.model_error) * scale,
        (profile.model + 2 * profile.error + profile.model_error) * scale,
        color=_BAND,
        linewidth=0,
    )
    axes.plot(k, profile.model * scale, color=_MODEL, lw=1.2)
    axes.plot(k, profile.data * scale, color=_DATA, lw=0.9)
    below = add_panel(figure, left, 62, right - left, TOP - 62 - height - 14)
    below.plot(k, profile.correlation, color="#1f77d0", lw=1.2)
    below.axhline(THRESHOLD, color=QUIET, lw=0.8, ls=(0, (4, 3)))
    for panel in (axes, below):
        if has_rings(row):
            panel.axvline(1 / row["rlnCtfMaxResolution"], color="#1f77d0", lw=0.9, ls=(0, (2, 2)))
        panel.set_xlim(k[0], k[-1])
        panel.grid(color="#e6e6e6", lw=0.7)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=9, color=QUIET)
        panel.axvline(1 / row["hmCtfFitResolution"], color=QUIET, lw=0.9)
    resolutions = [r for r in (20, 10, 7, 5, 4, 3.5, 3, 2.5, 2) if k[0] < 1 / r < k[-1]]
    for panel in (axes, below):
        panel.set_xticks([1 / r for r in resolutions], [f"{r:g}" for r in resolutions])
    axes.tick_params(labelbottom=False)
    axes.set(ylim=(-1.7, 1.7))
    below.set(ylim=(-1.05, 1.05), yticks=[-1, -0.5, 0, 0.5, 1])
    axes.set_ylabel("rings, at even strength", size=9, labelpad=2)
    below.set_ylabel("correlation", size=9, labelpad=2)
    below.set_xlabel("resolution (Å)", size=9, labelpad=2)
    detail = "black: data at equal phase; red: model; band: two standard errors; grey line: end of fit"
    title = f"Rings seen to {row['rlnCtfMaxResolution']:.2f} Å" if has_rings(row) else "No rings seen"
    add_head(figure, left - 36, title, detail)


def _draw_field(
    figure: Figure,
    found: CtfEstimate,
    spectra: TileSpectra,
    image: NDArray,
    left: float,
    row: dict[str, Any],
) -> None:
    h, w = spectra.shape
    size = _FIELD / max(h, w)
    axes = add_panel(figure, left, TOP - h * size, w * size, h * size)
    factor = max(1, max(h, w) // _FIELD)
    # Every pixel of a few rows: means of whole blocks would take longer than all else.
    thin = image[:: max(1, factor // 2)]
    small = _blocks(thin[: len(thin) // 2 * 2, : w // factor * factor], 2, factor)
    low, high = np.percentile(small[::2, ::2], (1, 99))
    grey = np.clip((small - low) / max(high - low, 1e-9), 0, 1)
    axes.imshow(grey, cmap="gray", origin="lower", extent=(-1, 1, -1, 1), aspect="auto", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    if not has_rings(row):
        add_head(figure, left, "The micrograph", "nothing is known of its defocus")
        return
    grid = np.linspace(-1, 1, 33)
    surface = surface_terms(grid, grid[:, None])[..., 1:] @ found.surface[1:]
    terms = surface_terms(*spectra.centres.T)[:, 1:]
    own = terms @ found.surface[1:] + found.fit.tile_offset
    sure = found.fit.tile_error < 5 * np.median(found.fit.tile_error)
    reach = max(float(np.abs(surface).max()), 1.5 * float(np.median(found.fit.tile_error)), 20.0)
    shade = axes.imshow(
        surface,
        cmap="coolwarm",
        origin="lower",
        extent=(-1, 1, -1, 1),
        aspect="auto",
        vmin=-reach,
        vmax=reach,
        alpha=0.35,
        interpolation="bilinear",
    )
    axes.scatter(
        *spectra.centres[sure].T,
        c=np.clip(own[sure], -reach, reach),
        cmap="coolwarm",
        vmin=-reach,
        vmax=reach,
        s=float(np.clip(6000 / len(own), 14, 60)),
        edgecolors="black",
        linewidths=0.5,
    )
    axes.set(xlim=(-1, 1), ylim=(-1, 1), xticks=[], yticks=[])
    bar = add_panel(figure, left + w * size + 10, TOP - h * size, 12, h * size)
    bar.imshow(
        np.linspace(-1, 1, 64)[:, None],
        cmap="coolwarm",
        origin="lower",
        aspect="auto",
        extent=(0, 1, -reach, reach),
        alpha=shade.get_alpha() or 1,
    )
    bar.set(xticks=[])
    bar.yaxis.tick_right()
    bar.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
    bar.tick_params(labelsize=8, color=QUIET)
    state = found.plane.state
    text = "One defocus fits the field" if not np.any(found.surface[1:]) else "Defocus over the field (Å)"
    detail = "dots: each tile by itself"
    if len(state.surface) >= 3:
        slope = state.surface[1:3] / (np.array([w, h]) * spectra.pixel_size / 2)
        detail += f"; tilt {math.degrees(math.atan(float(np.hypot(*slope)))):.1f}"
        detail += f" ± {row['hmTiltUncertainty']:.1f}°" if "hmTiltUncertainty" in row else "°"
    add_head(figure, left, text, f"{detail}; misfit {found.fit.misfit:.2f}")


def _draw_quantity(
    figure: Figure,
    bottom: float,
    title: str,
    unit: str,
    values: NDArray,
    bad: NDArray,
    errors: NDArray | None,
    *,
    last: bool,
) -> None:
    height, width = _ROW_HEIGHT - 62, _SUMMARY_WIDTH - 456
    axes = add_panel(figure, 80, bottom, width, height)
    side = add_panel(figure, 80 + width + 24, bottom, 320, height)
    known = values[np.isfinite(values)]
    middle = float(np.median(known))
    sureness = _sureness(errors, unit)
    head = f"{title}, median {middle:{'.3g' if sureness else '.4g'}} {unit}".strip()
    add_text(figure, 80, bottom + height + 6, head + sureness, size=11)
    spread = float(np.median(np.abs(known - middle)))
    high = min(float(known.max()), middle + max(_OUTLIER * spread, 0.2 * abs(middle)))
    low = min(0.0, max(float(known.min()), middle - max(_OUTLIER * spread, 0.2 * abs(middle))))
    high = high + 0.1 * (high - low) if high > low else low + 1
    number = np.arange(1, len(values) + 1)
    size = float(np.clip(80 / math.sqrt(len(values)), 2, 5))
    inside = np.clip(values, low, high)
    if errors is not None:
        axes.vlines(number, inside - errors, inside + errors, color=_ERROR, lw=1.2, zorder=1)
    for chosen, colour in ((~bad, "#1f77d0"), (bad, _MODEL)):
        axes.plot(number[chosen], inside[chosen], "o", color=colour, ms=size, mew=0, clip_on=False)
    bins = np.linspace(low, high, int(np.clip(2 * math.sqrt(len(values)), 14, 40)) + 1)
    counts = np.histogram(np.clip(known, low, high), bins)[0]
    side.stairs(counts, bins, orientation="horizontal", color="#1f77d0", fill=True)
    axes.set(xlim=(0.5, len(values) + 0.5), ylim=(low, high))
    side.set_ylim(low, high)
    axes.set_ylabel(unit, size=10)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=STEPS, min_n_ticks=1))
    side.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=STEPS, min_n_ticks=1))
    for panel in (axes, side):
        panel.yaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
        panel.grid(color="#e6e6e6", lw=0.7)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=9)
    side.tick_params(labelleft=False)
    if last:
        axes.set_xlabel("micrograph, in the order of the table", size=10)
        side.set_xlabel("micrographs", size=10)


def _sureness(errors: NDArray | None, unit: str) -> str:
    """Standard error of a value, for the head of its panel."""
    known = np.array([]) if errors is None else errors[np.isfinite(errors)]
    return f", each ± {np.median(known):.2g} {unit}" if len(known) else ""


def _blocks(image: NDArray, rows: int, columns: int | None = None) -> NDArray:
    """Means of blocks of pixels, whose size divides the image's."""
    columns = columns or rows
    h, w = image.shape[0] // rows, image.shape[1] // columns
    sums = image[: h * rows].reshape(h, rows, -1).sum(axis=1, dtype=np.float32)
    return sums[:, : w * columns].reshape(h, w, columns).mean(axis=2) / rows


def _smoothed(image: NDArray) -> NDArray:
    """An image smoothed by a binomial of three pixels along each axis, periodic."""
    for axis in (0, 1):
        image = image / 2 + (np.roll(image, 1, axis) + np.roll(image, -1, axis)) / 4
    return image
