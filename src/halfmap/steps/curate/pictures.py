"""The pictures of a curation: a thumbnail of every micrograph, sheets of them, and all that was judged."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
import numpy as np
import scipy.ndimage as ndi
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from halfmap.data import MicrographSet
from halfmap.io.atomic import atomic_path
from halfmap.pictures import INK, QUIET, STEPS, add_panel, add_text, new_figure, save
from halfmap.steps.curate.criteria import Judgement, as_text, severity
from halfmap.steps.curate.features import Features, blur
from halfmap.steps.curate.segment import Segmentation

_COLOURS = {
    "carbon": "#3fbf5f",
    "contaminant": "#ff5a4f",
    "thick ice": "#ffb020",
    "empty": "#5aa0ff",
}
_KEPT, _LOST, _LIMIT = "#1f77d0", "#e0312f", "#222222"

_ACROSS, _ROWS = 6, 6
"""Thumbnails of a sheet."""

_CELL, _GAP, _TEXT, _HEAD, _MARGIN = 240, 14, 78, 96, 24
_WRAP = 38

_PANEL_WIDTH, _PANEL_HEIGHT, _PANEL_GAP = 440, 150, 92
_PANELS = 3


def draw_thumbnail(path: str | Path, features: Features, found: Segmentation) -> None:
    """Draw a micrograph small, with the outline of what is masked, a colour a kind.

    Parameters
    ----------
    path : path
        PNG file to write.
    features : Features
        Of the micrograph.
    found : Segmentation
        What is masked.
    """
    grey = blur(features.preview, 0.8)
    specimen = ~np.kron(found.mask, np.ones((2, 2), bool))
    low, high = np.percentile(grey[specimen] if specimen.any() else grey, (0.5, 99.5))
    grey = np.clip((grey - low) / max(float(high - low), 1e-9), 0, 1)
    picture = np.repeat((255 * grey).astype(np.uint8)[..., None], 3, axis=-1)
    for name, part in found.parts.items():
        fine = np.kron(part, np.ones((2, 2), bool))
        inner = np.asarray(ndi.binary_erosion(fine, iterations=2, border_value=1), bool)
        outline = fine & ~inner
        picture[outline] = [int(_COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)]
    with atomic_path(path) as temporary:
        # The first row of a micrograph is at the bottom, as in all our pictures.
        matplotlib.image.imsave(temporary, picture[::-1], format="png", pil_kwargs={"compress_level": 1})


def draw_sheets(
    folder: Path,
    table: MicrographSet,
    judgements: Sequence[Judgement],
    reasons: Sequence[Sequence[str]],
    thumbnails: Sequence[str],
) -> None:
    """Draw contact sheets of those accepted and those rejected, the closest decisions first.

    Parameters
    ----------
    folder : Path
        Of the job; gets ``accepted.png`` and, if any is rejected, ``rejected.png``.
    table : MicrographSet
        All micrographs that were judged.
    judgements : sequence of Judgement
        By each criterion.
    reasons : sequence of sequence of str
        Why each micrograph is rejected.
    thumbnails : sequence of str
        Picture of each micrograph, named from the folder.
    """
    worst = severity(judgements, len(reasons))
    lost = np.array([bool(own) for own in reasons])
    for name, chosen, sign in (("accepted", ~lost, -1), ("rejected", lost, 1)):
        rows = np.flatnonzero(chosen)
        if not len(rows):
            (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier run with others
            continue
        shown, detail = _choose(rows, sign * worst, accepted=name == "accepted")
        title = f"{len(rows):,} of {len(reasons):,} micrographs {name}"
        cells = [
            (folder / thumbnails[row], *_caption(table, judgements, reasons, worst, row)) for row in shown
        ]
        _draw_sheet(folder / f"{name}.png", title, detail, cells)


def _choose(rows: NDArray, order: NDArray, *, accepted: bool) -> tuple[list[int], str]:
    """Rows for a sheet: all if they fit, else half of them the closest decisions and half a sample."""
    ranked = rows[np.argsort(order[rows], kind="stable")]
    room = _ACROSS * _ROWS
    close = "the nearest to rejection first" if accepted else "the nearest to acceptance first"
    if len(ranked) <= room:
        return ranked.tolist(), close
    rest = ranked[room // 2 :]
    sample = rest[np.linspace(0, len(rest) - 1, room - room // 2).round().astype(int)]
    half = f"the {room // 2} nearest to {'rejection' if accepted else 'acceptance'}"
    return [
        *ranked[: room // 2].tolist(),
        *sample.tolist(),
    ], f"{half}, then a sample of the others in that order"


def _caption(
    table: MicrographSet,
    judgements: Sequence[Judgement],
    reasons: Sequence[Sequence[str]],
    worst: NDArray,
    row: int,
) -> tuple[str, list[str], bool]:
    """Name, lines of text, and whether they are reasons."""
    own = table.rows.row(row, named=True)
    name = Path(own["rlnMicrographName"]).stem
    if reasons[row]:
        return name, textwrap.wrap("; ".join(reasons[row]), _WRAP), True
    facts = []
    if own.get("rlnDefocusU") is not None and own.get("rlnDefocusV") is not None:
        facts.append(f"{(own['rlnDefocusU'] + own['rlnDefocusV']) / 2e4:.2f} µm")
    if own.get("rlnCtfMaxResolution") is not None:
        facts.append(f"rings to {own['rlnCtfMaxResolution']:.1f} Å")
    if own.get("rlnAccumMotionTotal") is not None:
        facts.append(f"motion {own['rlnAccumMotionTotal']:.0f} Å")
    lines = textwrap.wrap(", ".join(facts), _WRAP)
    if own["hmMicrographMaskedFraction"] > 0:
        lines += textwrap.wrap(f"masked: {own['hmMaskedBy']}".replace(" %", "\u00a0%"), _WRAP)
    if judgements and worst[row] > 0.8:
        nearest = max(judgements, key=lambda j: j.severity[row]).criterion
        lines.append(f"nearly rejected by {nearest.in_text}"[:_WRAP])
    return name, lines, False


def _draw_sheet(
    path: Path, title: str, detail: str, cells: Sequence[tuple[Path, str, list[str], bool]]
) -> None:
    across = min(_ACROSS, max(len(cells), 3))
    down = -(-len(cells) // across)
    width = 2 * _MARGIN + across * _CELL + (across - 1) * _GAP
    height = _HEAD + down * (_CELL + _TEXT) + _MARGIN
    figure = new_figure(width, height)
    add_text(figure, _MARGIN, height - 20, title, size=14, weight="bold", va="top")
    add_text(figure, _MARGIN, height - 46, detail, size=10, color=QUIET, va="top")
    _draw_key(figure, _MARGIN, height - 76)
    for number, (picture, name, lines, is_reason) in enumerate(cells):
        left = _MARGIN + number % across * (_CELL + _GAP)
        top = height - _HEAD - number // across * (_CELL + _TEXT)
        image = matplotlib.image.imread(picture)
        scale = _CELL / max(image.shape[:2])
        h, w = (n * scale for n in image.shape[:2])
        axes = add_panel(figure, left, top - h, w, h)
        axes.imshow(image, aspect="auto", interpolation="antialiased")
        axes.set_axis_off()
        short = name if len(name) <= _WRAP - 2 else "…" + name[-(_WRAP - 3) :]
        add_text(figure, left, top - h - 3, short, size=8, weight="bold", va="top")
        kept = lines[:4]
        if len(lines) > 4:
            kept[-1] = kept[-1][: _WRAP - 2] + " …"
        for k, line in enumerate(kept):
            colour = _LOST if is_reason else INK
            add_text(figure, left, top - h - 17 - 13 * k, line, size=7.5, color=colour, va="top")
    save(figure, path)


def _draw_key(figure: Figure, left: float, bottom: float) -> None:
    w, h = figure.get_size_inches() * figure.dpi
    for number, (name, colour) in enumerate(_COLOURS.items()):
        x = left + 130 * number
        box = Rectangle((x / w, bottom / h), 14 / w, 10 / h, fill=False, ec=colour, lw=2)
        box.set_transform(figure.transFigure)
        figure.add_artist(box)
        add_text(figure, x + 22, bottom - 2, name, size=9)


def draw_summary(
    path: str | Path,
    table: MicrographSet,
    judgements: Sequence[Judgement],
    reasons: Sequence[Sequence[str]],
) -> None:
    """Draw a histogram of every quantity with its limits.

    Parameters
    ----------
    path : path
        PNG file to write.
    table : MicrographSet
        All micrographs that were judged.
    judgements : sequence of Judgement
        By each criterion.
    reasons : sequence of sequence of str
        Why each micrograph is rejected.
    """
    down = -(-len(judgements) // _PANELS)
    width = 2 * _MARGIN + _PANELS * _PANEL_WIDTH + (_PANELS - 1) * 56 + 30
    height = 108 + down * (_PANEL_HEIGHT + _PANEL_GAP)
    figure = new_figure(width, height)
    lost = sum(bool(own) for own in reasons)
    title = f"{len(reasons) - lost:,} of {len(reasons):,} micrographs kept"
    add_text(figure, _MARGIN, height - 20, title, size=14, weight="bold", va="top")
    detail = "red: rejected by this quantity; dashed: limits of the optics groups; end bars hold all beyond"
    add_text(figure, _MARGIN, height - 46, detail, size=10, color=QUIET, va="top")
    for number, judgement in enumerate(judgements):
        left = _MARGIN + 40 + number % _PANELS * (_PANEL_WIDTH + 46)
        bottom = height - 118 - number // _PANELS * (_PANEL_HEIGHT + _PANEL_GAP) - _PANEL_HEIGHT
        _draw_histogram(figure, left, bottom, judgement)
    save(figure, path)


def _draw_histogram(figure: Figure, left: float, bottom: float, judgement: Judgement) -> None:
    axes = add_panel(figure, left, bottom, _PANEL_WIDTH - 20, _PANEL_HEIGHT)
    finite = np.isfinite(judgement.values)
    values, lost = judgement.values[finite], judgement.severity[finite] > 1
    ends = sorted({limit for pair in judgement.limits.values() for limit in pair if np.isfinite(limit)})
    low, high = _span(values, ends)
    bins = np.linspace(low, high, int(np.clip(2 * np.sqrt(len(values)), 20, 60)) + 1)
    inside = np.clip(values, low, high)
    axes.hist([inside[~lost], inside[lost]], bins=list(bins), stacked=True, color=[_KEPT, _LOST])
    for limit in ends:
        if low <= limit <= high:
            axes.axvline(limit, color=_LIMIT, lw=1.1, ls=(0, (4, 3)))
    axes.set_xlim(low, high)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=STEPS, min_n_ticks=1))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
    axes.grid(color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, color=QUIET)
    c = judgement.criterion
    text = f"{c.title}{f' ({c.unit})' if c.unit else ''}"
    add_text(figure, left, bottom + _PANEL_HEIGHT + 21, text, size=11)
    count = int(lost.sum())
    facts = [
        f"median {as_text(float(np.median(values)))}",
        judgement.kept(),
        f"{count:,} rejected" if count else "",
    ]
    colour = _LOST if count else QUIET
    text = ", ".join(filter(None, facts))
    add_text(figure, left, bottom + _PANEL_HEIGHT + 5, text, size=9, color=colour)


def _span(values: NDArray, limits: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis: the bulk of the values, and limits that are not far beyond it."""
    near, middle, far = np.percentile(values, (2, 50, 98))
    reach = max(float(far - near), 0.05 * abs(float(middle)), 1e-9)
    low, high = max(float(values.min()), near - 1.5 * reach), min(float(values.max()), far + 1.5 * reach)
    for limit in limits:
        if near - 2 * reach < limit < far + 2 * reach:
            low, high = min(low, limit), max(high, limit)
    if not high > low:
        # All alike: an axis that shows where, not their last digits.
        low, high = min(0.9 * low, 1.1 * low), max(0.9 * low, 1.1 * low) or 1.0
    room = 0.04 * (high - low)
    return (0.0 if low >= 0 and low < room else low - room), high + room
