"""Whether tilt pairs show the tilt of the stage, and which hand they support."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Circle

from halfmap.data import ParticleSet
from halfmap.errors import TableError
from halfmap.pictures import INK, MARGIN, QUIET, add_panel, add_text, new_figure, save
from halfmap.search.tilt_pairs import NEAR_DEG, TiltPairs, compare_tilts, tilts
from halfmap.steps.validate.finding import Finding, Light

NAME = "Tilt pairs"

_RARE = 0.01
"""Probability of random pairs above which there is no cluster."""

_HALF = 0.5
"""Share of pairs below which only some of the poses are right."""

_OFF_DEG, _SURE = 5.0, 3.0
"""Difference from the nominal tilt that matters, and the standard errors that it must exceed."""

_ALONG_DEG = 20.0
"""From the axis given, or from its other end, within which it tells the hand."""

_METHOD = (
    "The poses of each pair give the rotation from the untilted to the tilted image; of all that the point "
    "group allows, the one nearest to what most pairs show. Images paired at random show what chance gives. "
    "A map of the other hand shows the tilt in the other direction. DOI 10.1016/j.jmb.2003.07.013"
)


def check_tilt(
    folder: Path,
    untilted: ParticleSet,
    tilted: ParticleSet,
    *,
    group: str,
    tilt_angle: float | None,
    tilt_axis: float | None = None,
    seed: int = 0,
) -> Finding:
    """Find whether tilt pairs show one common tilt, and draw them.

    Parameters
    ----------
    folder : path
        Where the picture goes.
    untilted, tilted : ParticleSet
        The same particles before and after the stage was tilted, row by row, with poses.
    group : str
        Point group of the map.
    tilt_angle : float or None
        Of the stage in degrees; its sign counts if the axis is known.
    tilt_axis : float, optional
        From x towards y in the images, in degrees; the tilt is by the right-hand rule about it.
    seed : int
        Of random pairs.

    Returns
    -------
    Finding
        Red if pairs show no common tilt, or that of the other hand; amber if less than half of them do, or
        angle or axis are not the nominal ones: an axis that is not the one given tells no hand.

    Raises
    ------
    TableError
        If the tables have not as many rows.
    ParameterError
        If there are fewer than five.
    """
    if len(untilted) != len(tilted):
        raise TableError(
            f"has {len(tilted)} particles, but {len(untilted)} are untilted",
            path=tilted.path,
            hint="give tables whose rows belong together",
        )
    found = compare_tilts(untilted.poses.rotations, tilted.poses.rotations, group=group, seed=seed)
    other_hand = _other_hand(found, tilt_angle, tilt_axis)
    values = _values(found, tilt_angle, tilt_axis, other_hand)
    picture = folder / "tilt.png"
    draw(picture, found, tilt_angle)
    light, sentence = _judge(found, values, tilt_angle, tilt_axis)
    return Finding(NAME, light, sentence, values=values, pictures=(picture.name,), method=_METHOD)


def _off_axis(found: TiltPairs, tilt_axis: float | None) -> float | None:
    """Angle in degrees, up to 90, between the axis and the one given, whichever way they point."""
    if tilt_axis is None:
        return None
    _, axis = tilts(found.common)
    return abs((float(axis) - tilt_axis + 90) % 180 - 90)


def _other_hand(found: TiltPairs, tilt_angle: float | None, tilt_axis: float | None) -> bool | None:
    """Whether pairs show the tilt in the other direction, if that can be told."""
    off = _off_axis(found, tilt_axis)
    if not tilt_angle or tilt_axis is None or off is None or off > _ALONG_DEG:
        return None
    angle, axis = (float(each) for each in tilts(found.common))
    along = np.cos(np.radians(axis - tilt_axis)) * angle * tilt_angle
    return bool(along < 0)


def _values(
    found: TiltPairs, tilt_angle: float | None, tilt_axis: float | None, other_hand: bool | None
) -> dict[str, Any]:
    angle, axis = (float(each) for each in tilts(found.common))
    values: dict[str, Any] = {
        "pairs": len(found.turns),
        "near_percent": 100 * found.share,
        "near_by_chance_percent": 100 * found.chance,
        "near_within_deg": NEAR_DEG,
        "probability_of_chance": found.probability,
        "tilt_angle_deg": angle,
        "tilt_angle_error_deg": found.angle_error_deg,
        "tilt_axis_deg": axis,
        "concentration": found.concentration,
    }
    if tilt_angle is not None:
        values["nominal_tilt_angle_deg"] = tilt_angle
    if tilt_axis is not None:
        values["nominal_tilt_axis_deg"] = tilt_axis
        values["tilt_axis_off_deg"] = _off_axis(found, tilt_axis)
    if other_hand is not None:
        values["other_hand"] = other_hand
    return values


def _judge(
    found: TiltPairs, values: dict[str, Any], tilt_angle: float | None, tilt_axis: float | None
) -> tuple[Light, str]:
    n, angle, axis = values["pairs"], values["tilt_angle_deg"], values["tilt_axis_deg"]
    if found.probability > _RARE:
        return "red", (
            f"{n} tilt pairs show no common tilt: {100 * found.share:.0f} % are near to one rotation, and "
            f"{100 * found.chance:.0f} % of random pairs; the poses, or the order of the rows, are wrong."
        )
    error = values["tilt_angle_error_deg"]
    direction = axis if angle >= 0 else axis + 180
    tilt = f"{abs(angle):.1f} ± {error:.1f}° about an axis at {direction:.0f}°"
    by_chance = f"by chance {100 * found.chance:.0f} %"
    sentence = f"{100 * found.share:.0f} % of {n} tilt pairs show a tilt of {tilt}, {by_chance}"
    other_hand = values.get("other_hand")
    if other_hand is not None:
        sentence += f"; its direction supports {'the other' if other_hand else 'this'} hand"
    if other_hand:
        return "red", f"{sentence}: mirror the map and its poses."
    if tilt_angle is not None:
        off = abs(abs(angle) - abs(tilt_angle))
        if off > _OFF_DEG and off > _SURE * error:
            advice = (
                f"the stage was tilted by {abs(tilt_angle):.0f}°: look at the magnification and the poses"
            )
            return "amber", f"{sentence}; {advice}."
    if values.get("tilt_axis_off_deg", 0.0) > _ALONG_DEG:
        advice = f"the axis is not the one given, {tilt_axis:g}°, and tells no hand: look at its convention"
        return "amber", f"{sentence}; {advice}."
    if found.share < _HALF:
        return "amber", f"{sentence}; the poses of the others are wrong: refine those that agree alone."
    return "green", f"{sentence}."


def draw(path: Path, found: TiltPairs, tilt_angle: float | None) -> None:
    """Draw angle and axis of the tilt of each pair, from the centre outwards and around it."""
    width, side, height = 520, 430, 520
    figure = new_figure(width, height)
    angle, axis = (float(each) for each in tilts(found.common))
    title = f"{100 * found.share:.0f} % of {len(found.turns)} tilt pairs show {abs(angle):.1f}°"
    add_text(figure, MARGIN, height - 30, title, size=13, weight="bold")
    nominal = "" if tilt_angle is None else f"; dashed: the stage's {abs(tilt_angle):g}°"
    detail = f"angle from the centre, axis around it{nominal}"
    add_text(figure, MARGIN, height - 50, detail, size=10, color=QUIET)
    axes = add_panel(figure, (width - side) / 2, MARGIN, side, side)
    angles, around = (each.numpy() for each in tilts(found.turns))
    x, y = angles * np.cos(np.radians(around)), angles * np.sin(np.radians(around))
    top = max(60.0, 1.4 * abs(angle), 0.0 if tilt_angle is None else 1.4 * abs(tilt_angle))
    top = max(top, float(np.quantile(abs(angles), 0.98)))
    near = found.near.numpy()
    axes.scatter(x[~near], y[~near], s=9, color=QUIET, alpha=0.6, linewidths=0)
    axes.scatter(x[near], y[near], s=9, color="C0", alpha=0.8, linewidths=0)
    for ring in range(30, int(top) + 1, 30):
        axes.add_patch(Circle((0, 0), ring, fill=False, color=QUIET, lw=0.5))
        axes.text(0, ring, f"{ring}°", fontsize=7, color=QUIET, ha="center", va="bottom")
    if tilt_angle is not None:
        axes.add_patch(Circle((0, 0), abs(tilt_angle), fill=False, color=INK, lw=1.0, ls="--"))
    middle = angle * np.cos(np.radians(axis)), angle * np.sin(np.radians(axis))
    axes.add_patch(Circle(middle, NEAR_DEG, fill=False, color="C0", lw=1.0))
    axes.set_xlim(-top, top)
    axes.set_ylim(-top, top)
    axes.set_aspect("equal")
    axes.set_axis_off()
    save(figure, path)
