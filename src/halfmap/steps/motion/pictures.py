"""The pictures of a motion correction: one of every movie, one of the whole job."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection, LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import IdentityTransform
from numpy.typing import NDArray

from halfmap.data.motion import EARLY_DOSE_e_per_A2, MotionTracks, accumulated_motion
from halfmap.pictures import (
    DPI,
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

_WIDTH = 1500

_FIELD_WIDTH, _FIELD_HEIGHT = 600, 430
_SPECTRUM = 430
_NARROWEST = 440
"""Where the first panel ends for the next at the least: its head needs the room."""

_PALE = "#b8f0ff"
_DOSE_COLOURS = LinearSegmentedColormap.from_list("dose", ["#ffe84a", "#ff9500", "#ff2d55", "#b312d6"])
"""From bright to deep, all of which stand out of grey and of white."""

_PIECES = 8
"""Pieces of different colour in a local track."""

_DRAWN_FRAMES = 60
_MAGNIFICATIONS = (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)
_RINGS_A = (10, 5, 3.5)
_BARS_A = (1000, 500, 200, 100, 50, 20, 10)

_SUMMARY_WIDTH, _SUMMARY_HEAD, _ROW_HEIGHT = 1500, 52, 230
_NAMED = 6
"""Outliers named in a plot of the summary at the most."""

_LINES = 5
"""Lines below its point at which there may be room for a name."""

_OUTLIER = 6.0
"""Standard deviations, robustly measured, from the median."""


def draw_movie(
    path: str | Path,
    tracks: MotionTracks,
    *,
    micrograph: NDArray,
    spectrum: NDArray,
    spectrum_pixel_size: float,
    title: str,
) -> None:
    """Draw a micrograph with its local motion, the track of the whole field, and the power spectrum.

    Parameters
    ----------
    path : path
        PNG file to write.
    tracks : MotionTracks
        Motion of the movie; everything local may be missing.
    micrograph : array (h, w)
        The aligned sum, of any pixel size.
    spectrum : array (s, s)
        Its amplitude spectrum, the zero frequency at (s // 2, s // 2).
    spectrum_pixel_size : float
        Å per pixel of the image that the spectrum is of.
    title : str
        Line above the picture.

    Notes
    -----
    Motion is drawn as the displacement of the specimen, minus the shifts of the tracks.
    """
    figure = new_figure(_WIDTH, HEIGHT)
    add_text(figure, MARGIN, HEIGHT - 16, _elided(title, 150), size=13, weight="bold", va="top")
    right = _draw_field(figure, tracks, micrograph)
    left = _WIDTH - MARGIN - _SPECTRUM
    _draw_track(figure, tracks, max(right, _NARROWEST) + 78, left - 84)
    _draw_spectrum(figure, spectrum, spectrum_pixel_size, left)
    save(figure, path)


def draw_summary(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Draw the motion of all movies of a job, one after the other and as histograms.

    Parameters
    ----------
    path : path
        PNG file to write.
    rows : list of dict
        One of each movie in the order of the table: `name`, its file; `total`, `early`, `late`, the motion
        of the whole field in Å; `spread`, the root mean square of local motion in Å; `error`, the mean
        standard error of shifts in Å; `misfit`, the scatter of the patches over that expected;
        `peak_height`, the peaks of pairs of frames over their noise. What is missing, None or not finite is
        left out; other keys are ignored.
    """
    names = [Path(str(row.get("name", ""))).stem for row in rows]
    border = f"{EARLY_DOSE_e_per_A2:g} e/Å²"
    panels: list[tuple[str, str, list[tuple[str, str, str]]]] = [
        (
            "Motion of the whole field",
            "Å",
            [
                ("total", "total", "#333333"),
                ("late", f"late, after {border}", "#1f77d0"),
                ("early", f"early, up to {border}", "#f28e1c"),
            ],
        ),
        ("Local motion, root mean square", "Å", [("spread", "", "#1f77d0")]),
        ("Mean standard error of the shifts", "Å", [("error", "", "#1f77d0")]),
        ("Misfit of the patches, 1 = as expected", "", [("misfit", "", "#1f77d0")]),
        (
            "Peaks of pairs of frames over their noise; below 4.5 a guess",
            "",
            [("peak_height", "", "#1f77d0")],
        ),
    ]
    height = _SUMMARY_HEAD + _ROW_HEIGHT * len(panels) + 20
    figure = new_figure(_SUMMARY_WIDTH, height)
    values = {key: _column(rows, key) for _, _, kinds in panels for key, _, _ in kinds}
    add_text(figure, 24, height - 18, _summary_title(rows, values), size=13, weight="bold", va="top")
    for number, (title, unit, kinds) in enumerate(panels):
        bottom = height - _SUMMARY_HEAD - _ROW_HEIGHT * (number + 1) + 32
        last = number == len(panels) - 1
        series = [(values[key], label, colour) for key, label, colour in kinds]
        _draw_quantity(figure, bottom, title, unit, series, names, last=last)
    save(figure, path)


def _elided(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    half = (longest - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def _shown(axes: Axes, image: NDArray[np.uint8]) -> None:
    """Show grey values as they are, over the whole panel."""
    axes.imshow(
        np.repeat(image[..., None], 3, axis=2),
        origin="lower",
        interpolation="bilinear",
        extent=(0, 1, 0, 1),
        aspect="auto",
    )
    axes.set_axis_off()


def _grey(image: NDArray, low: float, high: float) -> NDArray[np.uint8]:
    """Stretch values to 0 ... 255."""
    if not high > low:
        return np.full(image.shape, 128, np.uint8)
    return np.clip((image - low) * (255 / (high - low)), 0, 255).astype(np.uint8)


def _blurred(image: NDArray) -> NDArray:
    """An image smoothed by a binomial of three pixels along each axis."""
    for axis in (0, 1):
        if image.shape[axis] > 2:
            image = np.moveaxis(image, axis, 0)
            inner = image[1:-1] / 2 + (image[:-2] + image[2:]) / 4
            image = np.moveaxis(np.concatenate([image[:1], inner, image[-1:]]), 0, axis)
    return image


def _thumbnail(image: NDArray, height: float, width: float) -> NDArray:
    """Shrink an image to about a size by averaging blocks of pixels."""
    factor = max(1, min(round(image.shape[0] / height), round(image.shape[1] / width)))
    h, w = image.shape[0] // factor, image.shape[1] // factor
    # Rows first: sums of whole rows run at the speed of the memory.
    rows = image[: h * factor].reshape(h, factor, -1).sum(axis=1, dtype=np.float32)
    return rows[:, : w * factor].reshape(h, w, factor).mean(axis=2) / factor


def _draw_field(figure: Figure, tracks: MotionTracks, micrograph: NDArray) -> float:
    """Draw the micrograph and the local tracks; return where the panel ends."""
    h, w = tracks.shape
    scale = min(_FIELD_WIDTH / w, _FIELD_HEIGHT / h)
    axes = add_panel(figure, MARGIN, TOP - h * scale, w * scale, h * scale)
    small = np.nan_to_num(_blurred(_thumbnail(micrograph, h * scale, w * scale)))
    _shown(axes, _grey(small, *np.percentile(small[::2, ::2], (1, 99))))
    # The picture counts from the edge of the first pixel, tracks from its centre.
    axes.set(xlim=(0, 1), ylim=(0, 1))
    places, model, measured = _local_tracks(tracks)
    magnification = _magnification(tracks, places, model, measured)
    size = np.array([w, h])
    start = (places + 0.5) / size
    if len(measured):
        paths = start[:, None] + magnification * measured / size
        known = [path[np.isfinite(path).all(axis=1)] for path in paths]
        lines = LineCollection([path for path in known if len(path)], colors=_PALE, linewidths=0.9, alpha=0.8)
        axes.add_collection(lines, autolim=False)
    if len(model):
        paths = start[:, None] + magnification * model / size
        outline = LineCollection(list(paths), colors="black", linewidths=3.4, alpha=0.55, capstyle="round")
        axes.add_collection(outline, autolim=False)
        axes.add_collection(_coloured(paths, linewidths=2.0), autolim=False)
        axes.plot(*start.T, "o", ms=4.2, mfc="white", mec="black", mew=0.8)
        detail = "colour: model; pale: measured in patches; dot: start" if len(measured) else "dot: start"
        add_head(figure, MARGIN, f"Local motion × {magnification:g}, without the whole field's track", detail)
    else:
        add_head(figure, MARGIN, "Micrograph", "no local motion estimated")
    _draw_bar(figure, TOP - h * scale, scale / tracks.pixel_size, magnification if len(model) else None)
    return MARGIN + w * scale


def _local_tracks(tracks: MotionTracks) -> tuple[NDArray, NDArray, NDArray]:
    """Places (p, 2), displacements there by the model (p, n, 2), and as measured, in px of the movie.

    Without a local model there are no tracks, without patches none measured.
    """
    h, w = tracks.shape
    none = np.zeros((0, 0, 2))
    if tracks.local_grid is None and tracks.local_coefficients is None:
        return np.zeros((0, 2)), none, none
    places = tracks.patch_centres
    if not len(places):
        y, x = ((np.arange(n) + 0.5) / n * side - 0.5 for n, side in ((5, h), (round(5 * w / h) or 1, w)))
        places = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    frames = np.unique(np.linspace(0, tracks.n_used - 1, _DRAWN_FRAMES).round().astype(int))
    shift = tracks.shift_at(places[:, :1], places[:, 1:], frames) - tracks.global_shift[frames]
    return places, -shift, -tracks.patch_shifts if len(tracks.patch_centres) else none


def _magnification(tracks: MotionTracks, places: NDArray, model: NDArray, measured: NDArray) -> float:
    """A round number by which the longest local track gets about a third of the distance of patches."""
    if not len(places):
        return 1.0
    distance = np.linalg.norm(places[:, None] - places, axis=-1)
    distance[distance == 0] = math.inf
    nearest = np.median(distance.min(axis=1))
    spacing = float(nearest) if np.isfinite(nearest) else 0.5 * min(tracks.shape)
    reach = float(np.linalg.norm(model, axis=-1).max())
    if len(measured):
        # Where the model is all but still, what was measured must not run over its neighbours.
        lengths = np.nan_to_num(np.linalg.norm(measured, axis=-1)).max(axis=1)
        reach = max(reach, 0.5 * float(np.median(lengths)))
    wanted = max(1.0, min(0.4 * spacing / max(reach, 1e-9), 1000.0))
    power = 10.0 ** math.floor(math.log10(wanted))
    return power * max(step for step in _MAGNIFICATIONS if step * power <= wanted * 1.001)


def _coloured(paths: NDArray, **style: Any) -> LineCollection:
    """Tracks (p, n, 2) in pieces coloured by the progress of the exposure."""
    n = paths.shape[1]
    ends = np.unique(np.linspace(0, n - 1, min(n, _PIECES + 1)).round().astype(int))
    pieces, colours = [], []
    for first, last in pairwise(ends):
        pieces += list(paths[:, first : last + 1])
        colours += [_DOSE_COLOURS((first + last) / 2 / (n - 1))] * len(paths)
    return LineCollection(pieces, colors=colours, capstyle="round", **style)


def _draw_bar(figure: Figure, top: float, px_per_A: float, magnification: float | None) -> None:
    """Draw a bar of a round length below the micrograph, and say what it means for the tracks."""
    longest = 0.4 * _FIELD_WIDTH / px_per_A
    length = next((length for length in _BARS_A if length <= longest), _BARS_A[-1])
    end, y = MARGIN + length * px_per_A, top - 16
    bar = LineCollection(
        [[(MARGIN, y), (end, y)]], colors=INK, linewidths=4, transform=IdentityTransform(), capstyle="butt"
    )
    figure.add_artist(bar)
    motion = f" of specimen, {length / magnification:.3g} Å of local motion" if magnification else ""
    add_text(figure, end + 10, y, f"{length / 10:g} nm{motion}", va="center")


def _draw_track(figure: Figure, tracks: MotionTracks, left: float, right: float) -> None:
    """Draw the track of the whole field in Å between two places."""
    bottom = 62
    width, height = right - left, TOP - bottom
    axes = add_panel(figure, left, bottom, width, height)
    track = -tracks.global_shift * tracks.pixel_size
    error = tracks.global_error * tracks.pixel_size
    known = np.isfinite(error)
    centre = (track.max(axis=0) + track.min(axis=0)) / 2
    span = np.ptp(track, axis=0) + 2.2 * (float(error[known].max()) if known.any() else 0.0)
    scale = 1.16 * max(*(span / (width, height)), 0.5 / width)
    x, y = (
        (middle - scale * side / 2, middle + scale * side / 2)
        for middle, side in zip(centre, (width, height), strict=True)
    )
    axes.set(xlim=x, ylim=y)
    if known.any():
        diameter = 2 * error[known]
        axes.add_collection(
            EllipseCollection(
                diameter,
                diameter,
                np.zeros(len(diameter)),
                units="xy",
                offsets=track[known],
                offset_transform=axes.transData,
                facecolors="#d5dde8",
                linewidths=0,
            ),
            autolim=False,
        )
    axes.plot(*track.T, color="#9aa4b0", lw=0.8)
    progress = np.linspace(0, 1, len(track))
    axes.scatter(
        *track.T,
        c=progress,
        cmap=_DOSE_COLOURS,
        s=26 if len(track) < 60 else 12,
        linewidths=0.5,
        edgecolors="#444444",
        zorder=3,
    )
    axes.plot(*track[0], "o", ms=11, mfc="none", mec=INK, mew=1.3, zorder=4)
    axes.grid(color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    for direction in (axes.xaxis, axes.yaxis):
        direction.set_major_locator(MaxNLocator(6, steps=STEPS))
    axes.tick_params(labelsize=9, color=QUIET)
    axes.set_xlabel("displacement of the specimen along x (Å)", size=9, labelpad=2)
    axes.set_ylabel("along y (Å)", size=9, labelpad=2)
    _draw_dose_bar(figure, tracks, right + 14, bottom, height)
    total, early, late = accumulated_motion(tracks)
    detail = "circle: start"
    if known.any():
        detail += f", band: standard error, {np.mean(error[known]):.2g} Å on average"
    add_head(
        figure, left - 50, f"Whole field: {total:.1f} Å in all, {early:.1f} early, {late:.1f} late", detail
    )


def _draw_dose_bar(figure: Figure, tracks: MotionTracks, left: float, bottom: float, height: float) -> None:
    """A strip with the colours of the exposure, from the middle of the first frame to that of the last."""
    height -= 20
    y = bottom + np.linspace(0, height, 65)
    strip = [[(left + 5, low), (left + 5, high + 1)] for low, high in pairwise(y)]
    colours = _DOSE_COLOURS(np.linspace(0, 1, len(strip)))
    style = {"linewidths": 10 * 72 / DPI, "capstyle": "butt", "antialiaseds": False}
    figure.add_artist(LineCollection(strip, colors=colours, transform=IdentityTransform(), **style))
    first, last, unit = float(tracks.first_frame), float(tracks.last_frame), "frame"
    if tracks.dose_per_frame > 0:
        first, last = (tracks.pre_exposure + tracks.dose_per_frame * (frame - 0.5) for frame in (first, last))
        unit = "e/Å²"
    for part in (0, 0.5, 1):
        value = f"{first + part * (last - first):.3g}"
        add_text(figure, left + 14, bottom + part * height, value, size=8, va="center")
    add_text(figure, left - 2, bottom + height + 8, unit, size=8)


@lru_cache(maxsize=4)
def _rings(size: int) -> tuple[NDArray, NDArray, NDArray]:
    """Radius in whole pixels of a centred spectrum, the order of its pixels by it, and where rings begin."""
    axis = np.arange(size) - size // 2
    radius = np.rint(np.hypot(axis[:, None], axis)).astype(np.int32)
    order = np.argsort(radius.ravel(), kind="stable")
    return radius, order, np.cumsum(np.bincount(radius.ravel()))


def _draw_spectrum(figure: Figure, spectrum: NDArray, pixel_size: float, left: float) -> None:
    """Draw the power spectrum without its background, a quarter of it averaged over the angle."""
    axes = add_panel(figure, left, TOP - _SPECTRUM, _SPECTRUM, _SPECTRUM)
    spectrum = _thumbnail(spectrum, _SPECTRUM, _SPECTRUM)
    image, average = _whitened(spectrum)
    middle = spectrum.shape[0] // 2
    radius = _rings(spectrum.shape[0])[0]
    used = image[radius > 0.06 * len(image)][::3]
    shown = _grey(image, *(np.percentile(used, (1.5, 99.5)) if len(used) else (0, 0)))
    shown[:middle, middle:] = _grey(average, -2, 2)[:middle, middle:]
    _shown(axes, shown)
    edge = 2 * pixel_size
    rings = np.array([ring for ring in _RINGS_A if ring > edge])
    # Radii as parts of the panel, the half of which is the edge.
    radii = edge / 2 / rings
    angle = np.linspace(0, 2 * np.pi, 121)
    centre = (middle + 0.5) / len(spectrum)
    circles = centre + radii[:, None, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    style = {"colors": _PALE, "linewidths": 1.0, "linestyles": (0, (4, 4)), "alpha": 0.9}
    axes.add_collection(LineCollection(list(circles), **style), autolim=False)
    for ring, r in zip(rings, radii, strict=True):
        x = y = centre + r * math.sqrt(0.5)
        axes.text(x, y, f"{ring:g} Å", color="white", size=9, ha="center", va="center", bbox=SHADE)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    detail = f"edges at {edge:.3g} Å; lower right: averaged over angles"
    add_head(figure, left, "Power spectrum", detail)


def _whitened(spectrum: NDArray) -> tuple[NDArray, NDArray[np.float32]]:
    """Logarithm of a spectrum over a smooth background; and its median over angles, of even contrast."""
    radius, order, ends = _rings(len(spectrum))
    known = spectrum[np.isfinite(spectrum) & (spectrum > 0)]
    floor = float(known.min()) if len(known) else 1.0
    values = np.log(np.maximum(np.nan_to_num(spectrum), floor)).astype(np.float32)
    rings = np.split(values.ravel()[order], ends[:-1])
    median = np.array([np.partition(ring, len(ring) // 2)[len(ring) // 2] for ring in rings])
    # A smooth curve, as the median itself would take the Thon rings away with the background.
    first, last = 3, max(len(spectrum) // 2, 4)
    k = np.sqrt(np.clip(np.arange(len(median)), first, last))
    fitted = slice(first, last + 1)
    degree = min(6, (last - first) // 4)
    background = np.polynomial.Polynomial.fit(k[fitted], median[fitted], degree)(k)
    profile = median - background
    image = values - background.astype(np.float32)[radius]
    window = np.ones(max(3, len(spectrum) // 16))
    power = np.convolve(profile**2, window, "same") / np.convolve(np.ones(len(profile)), window, "same")
    # Standard error of a median; both halves of a spectrum are the same.
    noise = 1.25 * float(image.std()) * np.sqrt(2 / np.diff(ends, prepend=0))
    even = profile / np.sqrt(power + (3 * noise) ** 2 + 1e-12)
    return _blurred(image), even.astype(np.float32)[radius]


def _column(rows: list[dict[str, Any]], key: str) -> NDArray:
    """A quantity of all movies, NaN where it is not known."""
    found = [row.get(key) for row in rows]
    values = np.array([math.nan if value is None else value for value in found], np.float64)
    values[~np.isfinite(values)] = math.nan
    return values


def _summary_title(rows: list[dict[str, Any]], values: dict[str, NDArray]) -> str:
    """Number of movies, and medians."""
    title = f"{len(rows):,} movie{'' if len(rows) == 1 else 's'}"
    dose = _column(rows, "dose")
    if np.isfinite(dose).any():
        title += f" of {np.nanmedian(dose):.3g} e/Å²"
    words = {"total": "moved {:.1f} Å", "spread": "{:.1f} Å locally", "error": "standard error {:.2g} Å"}
    parts = [
        text.format(np.nanmedian(values[key]))
        for key, text in words.items()
        if np.isfinite(values[key]).any()
    ]
    medians = "" if len(rows) == 1 or not parts else " (medians)"
    return ", ".join([title, *parts]) + medians


def _draw_quantity(
    figure: Figure,
    bottom: float,
    title: str,
    unit: str,
    series: list[tuple[NDArray, str, str]],
    names: list[str],
    *,
    last: bool,
) -> None:
    """Draw quantities of one kind movie by movie, and their histograms beside."""
    height, width = _ROW_HEIGHT - 62, _SUMMARY_WIDTH - 456
    axes = add_panel(figure, 80, bottom, width, height)
    side = add_panel(figure, 80 + width + 24, bottom, 320, height)
    add_text(figure, 80, bottom + height + 6, title, size=11)
    known = np.concatenate([values[np.isfinite(values)] for values, _, _ in series])
    low, high = _range(series[0][0] if np.isfinite(series[0][0]).any() else known)
    axes.set(xlim=(0.5 - 0.01 * len(names), len(names) + 0.5 + 0.01 * len(names)), ylim=(low, high))
    side.set_ylim(low, high)
    if not len(known):
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=QUIET)
        for panel in (axes, side):
            panel.set(xticks=[], yticks=[])
        return
    number = np.arange(1, len(names) + 1)
    size = float(np.clip(80 / math.sqrt(len(names)), 2, 5))
    bins = np.linspace(low, high, int(np.clip(2 * math.sqrt(len(names)), 14, 40)) + 1)
    for zorder, (values, label, colour) in zip((3.2, 3.1, 3), series, strict=False):
        inside = values <= high
        axes.plot(number[inside], values[inside], "o", color=colour, ms=size, mew=0, label=label)
        above = values > high
        axes.plot(
            number[above], np.full(above.sum(), high), "^", color=colour, ms=7, clip_on=False, zorder=zorder
        )
        counts = np.histogram(np.clip(values[np.isfinite(values)], low, high), bins)[0]
        side.stairs(counts, bins, orientation="horizontal", color=colour, fill=len(series) == 1, lw=1.4)
        if len(names) > 1:
            side.axhline(float(np.nanmedian(values)), color=colour, lw=0.9, ls=(0, (4, 3)))
    if len(series) > 1:
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1.005, 0.985),
            ncols=len(series),
            fontsize=9,
            frameon=False,
            markerscale=5 / size,
            handletextpad=0.1,
            columnspacing=1.2,
        )
    _name_outliers(axes, series[0][0], names, unit, width, height)
    axes.set_ylabel(unit, size=10)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=STEPS, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    side.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=STEPS, min_n_ticks=1))
    side.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    for panel in (axes, side):
        panel.grid(color="#e6e6e6", lw=0.7)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=9)
    side.tick_params(labelleft=False)
    if last:
        axes.set_xlabel("movie, in the order of the table", size=10)
        side.set_xlabel("movies", size=10)


def _range(values: NDArray) -> tuple[float, float]:
    """Limits of an axis from zero on; the largest outliers are left above."""
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    typical, scatter = _median_and_scatter(values)
    high = (
        min(float(values.max()), typical + 2 * _OUTLIER * scatter) if len(values) > 4 else float(values.max())
    )
    return min(0.0, float(values.min())), 1.12 * high or 1.0


def _median_and_scatter(values: NDArray) -> tuple[float, float]:
    """Median, and standard deviation as the median deviation has it, at least a twentieth of it."""
    median = float(np.median(values))
    return median, max(1.4826 * float(np.median(np.abs(values - median))), 0.05 * abs(median))


def _name_outliers(
    axes: Axes, values: NDArray, names: list[str], unit: str, width: float, height: float
) -> None:
    """Write the names of the largest outliers beside them or a few lines below, where there is room."""
    finite = np.isfinite(values)
    if finite.sum() <= 4:
        return
    median, scatter = _median_and_scatter(values[finite])
    order = np.argsort(np.where(finite, -values, math.inf))[: 2 * _NAMED]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    taken: list[tuple[float, float]] = []
    for index in order[values[order] > median + _OUTLIER * scatter]:
        text = f"{_elided(names[index], 40)} ({values[index]:.3g}{f' {unit}' if unit else ''})"
        length = 6.4 * len(text)
        x = float(index + 1 - left) / (right - left) * width
        y = min(float(values[index] - low) / (high - low), 1.0) * height
        begins = x + 14 if x + 14 + length < width else x - 14 - length
        for line in range(_LINES):
            place = min(y, height - 8) - line * 14
            if all(abs(place - b) >= 14 or abs(begins - a) >= length + 10 for a, b in taken):
                break
        else:
            continue
        taken.append((begins, place))
        axes.annotate(
            text,
            (x, y),
            xycoords="axes pixels",
            xytext=(begins if begins > x else begins + length, place),
            textcoords="axes pixels",
            size=8,
            color="#444444",
            ha="left" if begins > x else "right",
            va="center_baseline",
            zorder=1.5,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops={
                "arrowstyle": "-",
                "color": "#999999",
                "lw": 0.6,
                "shrinkA": 0,
                "shrinkB": 3,
                "relpos": (float(begins < x), 0.5),
            },
        ).set_parse_math(False)
        if len(taken) == _NAMED:
            break
