"""To what detail half maps agree, and whether the curve can be believed."""

from __future__ import annotations

from pathlib import Path

from halfmap.ops.fsc import resolution
from halfmap.pictures import MARGIN, QUIET, add_panel, add_text, draw_correlations, new_figure, save
from halfmap.search.halfmaps import radius_at
from halfmap.steps.validate.finding import Finding, Given, Light

_THRESHOLD, _HALF = 0.143, 0.5

_TIGHT = 0.1
"""Correlation by the mask at the resolution from which on it is too tight."""

_AGAIN = 0.3
"""Correlation beyond the resolution that there should not be."""

_GONE = 0.05
"""Correlation of whole maps at the last shells, from which on their noise is not independent."""

_LAST = 5


def check_agreement(given: Given, folder: Path) -> Finding:
    """Look at the correlation of the half maps, within the mask and without."""
    halves, fsc = given.halves, given.fsc
    where = {"pixel_size": halves.pixel_size, "box": halves.box}
    half = resolution(fsc.corrected, threshold=_HALF, **where)
    shell = radius_at(fsc.corrected, _THRESHOLD)
    fallen = min(shell + 1, len(fsc.corrected) - 1)
    by_mask = float(fsc.randomised[fallen]) if fsc.from_shell < fallen else 0.0
    beyond = fsc.corrected[fallen + 1 :]
    again = float(beyond.max()) if len(beyond) else 0.0
    to_the_end = shell >= len(fsc.corrected) - 2
    tail = float(fsc.unmasked[-_LAST:].mean())
    doubts = []
    if halves.last_shell < halves.box // 2:
        doubts.append(
            f"maps or images were filtered at {given.side / halves.last_shell:.3g} Å: nothing is said beyond"
        )
    if by_mask > _TIGHT:
        doubts.append(f"the mask alone correlates by {by_mask:.2f} there: give a wider or softer one")
    if again > _AGAIN:
        doubts.append(f"it is {again:.2f} again beyond")
    if to_the_end:
        doubts.append("it never falls: smaller pixels would show more, or the halves share their noise")
    elif tail > _GONE and halves.last_shell >= halves.box // 2:
        doubts.append(f"noise at the last shells correlates by {tail:.2f}: the halves are not independent")
    if not given.agrees:
        sentence = "Half maps do not agree: there is no map to examine; look at the particles and the mask."
        return _finding(given, folder, "red", sentence, half, by_mask, again, tail)
    light = "amber" if doubts else "green"
    sentence = (
        f"Half maps agree to {given.resolution:.2f} Å ({given.interval.fine:.2f} to "
        f"{given.interval.coarse:.2f} Å) at a correlation of {_THRESHOLD}, to {half:.2f} Å at {_HALF}"
    )
    sentence += f"; but {'; '.join(doubts)}." if doubts else "."
    return _finding(given, folder, light, sentence, half, by_mask, again, tail)


def _finding(
    given: Given,
    folder: Path,
    light: Light,
    sentence: str,
    half: float,
    by_mask: float,
    again: float,
    tail: float,
) -> Finding:
    path = folder / "fsc.png"
    _draw(path, given)
    values = {
        "resolution_A": given.resolution,
        "interval_95_A": list(given.interval),
        "resolution_half_A": half,
        "correlation_by_mask": by_mask,
        "highest_correlation_beyond": again,
        "correlation_of_last_shells": tail,
    }
    method = (
        "Fourier shell correlation within the mask, corrected by maps with random phases, and its interval "
        "from the scatter of masked noise. Chen et al. 2013, DOI 10.1016/j.ultramic.2013.06.004."
    )
    return Finding("Agreement of the half maps", light, sentence, values, (path.name,), method)


def _draw(path: Path, given: Given) -> None:
    figure = new_figure(680, 420)
    title = f"half maps agree to {given.resolution:.2f} Å" if given.agrees else "half maps do not agree"
    add_text(figure, MARGIN, 420 - 30, title, size=13, weight="bold")
    axes = add_panel(figure, 62, 62, 680 - 62 - MARGIN, 290)
    draw_correlations(axes, given.fsc[:4], side=given.side)
    axes.axhline(_THRESHOLD, color=QUIET, lw=0.8, ls="--")
    if given.agrees:
        axes.axvspan(1 / given.interval.coarse, 1 / given.interval.fine, color="C0", alpha=0.2, lw=0)
        axes.axvline(1 / given.resolution, color=QUIET, lw=0.8, ls="--")
    save(figure, path)
