"""Whether a second refinement of the same particles finds the same poses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from halfmap.data import ParticleSet
from halfmap.data.views import numbers
from halfmap.errors import ParameterError, TableError
from halfmap.ops.orientation import Attraction, attraction
from halfmap.pictures import INK, MARGIN, QUIET, add_panel, add_text, dress, new_figure, save
from halfmap.search.pose_consensus import Consensus, compare_poses
from halfmap.steps.validate.finding import Finding, Given, Light

NAME = "Consensus of two refinements"

_IMAGE = "rlnImageName"
_ERRORS = ("hmAngleViewError", "hmAnglePsiError", "hmOriginError")

_RED, _AMBER = 0.2, 0.5
"""Share of particles, beyond chance, below which poses are not to be relied on: 50 to 70 % agree in usual
projects, 20 % in hard ones."""

_SURE = 3.0
"""Standard errors by which particles must agree more than random pairs do."""

_RARE, _STRONG = 0.01, 1.5
"""Chance that views which draw particles are none, and how many times their part of wrong poses they hold,
for them to be told of."""

_SIGMAS = 2.0
"""Stated standard deviations within which poses should agree."""

_METHOD = (
    "The frames of both maps may differ by a rotation, a shift and the hand; the one that most particles "
    "agree in is found from the poses alone. A particle agrees if its rim and its centre move by less than "
    "the map's resolution. Orientations of different particles show what chance gives. Views that hold more "
    "of the poses that disagree than their part of the sphere, however many particles both have lost, draw "
    "particles. "
    "DOI 10.1107/S2059798322001978"
)


@dataclass(frozen=True, eq=False)
class Compared:
    """Particles of both refinements, and how their poses differ.

    Attributes
    ----------
    first, second : ParticleSet
        Those in both, in the same order.
    consensus : Consensus
    angle_deg, shift_A : float
        Differences that count as agreement.
    """

    first: ParticleSet
    second: ParticleSet
    consensus: Consensus
    angle_deg: float
    shift_A: float

    @property
    def consistent(self) -> ParticleSet:
        """Particles of the first refinement that have the same pose in both.

        Raises
        ------
        TableError
            If there is none.
        """
        return self.first.select(self.consensus.agree)


def compare(given: Given, other: ParticleSet, *, group: str) -> Compared:
    """Compare the poses of the particles given with those of another refinement.

    Raises
    ------
    TableError
        If there are no particles, none is in both tables, or one is there twice.
    """
    if given.particles is None:
        raise TableError("there are no particles to compare those of the other refinement with")
    first, second = match(given.particles, other)
    angle = min(180.0, math.degrees(given.resolution / (given.diameter / 2)))
    found = compare_poses(
        first.poses,
        second.poses,
        group=group,
        angle_deg=angle,
        shift_A=given.resolution,
        seed=given.step.seed,
    )
    return Compared(first, second, found, angle, given.resolution)


def check_consensus(
    given: Given, other: ParticleSet, folder: Path, *, group: str, compared: Compared | None = None
) -> Finding:
    """Find whether two refinements of the same particles agree, and draw by how much.

    Parameters
    ----------
    given : Given
        With particles.
    other : ParticleSet
        The same images with the poses of a second refinement.
    folder : path
        Where the picture goes.
    group : str
        Point group of the maps.
    compared : Compared, optional
        What `compare` has given, if that is there.

    Returns
    -------
    Finding
        Red below 20 % of agreement beyond chance, or if it may be chance; amber below 50 %.

    Raises
    ------
    TableError
        As `compare`.
    """
    compared = compare(given, other, group=group) if compared is None else compared
    pull = _attraction(compared, group)
    values = _values(given, other, compared) | ({} if pull is None else _pulled(pull))
    picture = folder / "consensus.png"
    draw(picture, compared)
    return Finding(
        NAME,
        *_judge(compared, pull, most=max(len(given.particles or ()), len(other))),
        values=values,
        pictures=(picture.name,),
        method=_METHOD,
    )


def match(first: ParticleSet, second: ParticleSet) -> tuple[ParticleSet, ParticleSet]:
    """Rows of both tables that are of the same images, in the order of the first.

    Images are the same if number and stack are; where no stacks have the same path, if the stacks' names are
    the same and each is one stack alone.

    Raises
    ------
    TableError
        If a table has no images, none is in both, or one is there twice.
    """
    keys = [_keys(each) for each in (first, second)]
    for key in ("stack", "name"):
        if key == "name" and any(_ambiguous(each) for each in keys):
            break
        pairs = keys[0].join(keys[1], on=["number", key], how="inner", maintain_order="left")
        if pairs.height:
            one, two = (pairs[label].to_numpy() for label in ("row", "row_right"))
            return first.with_rows(first.rows[one]), second.with_rows(second.rows[two])
    message = "no image is in both tables"
    if first.path is not None:
        message += f": none of {first.path}"
    raise TableError(
        message, path=second.path, hint="give a second refinement of the same extracted particles"
    )


def _keys(particles: ParticleSet) -> pl.DataFrame:
    """Number, path and name of the stack, and row, of every image."""
    if _IMAGE not in particles.rows.columns:
        message = f"the particles have no images (_{_IMAGE})"
        raise TableError(message, path=particles.path, hint="give a table of extracted particles")
    parts = (
        particles.rows[_IMAGE].str.splitn("@", 2).struct.rename_fields(["first", "second"]).struct.unnest()
    )
    paths = parts.select(pl.coalesce("second", "first")).to_series()
    distinct = paths.unique()
    plain = [str(PurePosixPath(_collapsed(path))) for path in distinct]
    frame = pl.DataFrame(
        {
            "number": pl.select(
                pl.when(parts["second"].is_null())
                .then(1)
                .otherwise(parts["first"].str.strip_chars().cast(pl.Int64, strict=False))
            ).to_series(),
            "stack": paths.replace_strict(distinct, plain),
            "name": paths.replace_strict(distinct, [PurePosixPath(path).name for path in plain]),
        }
    ).with_row_index("row")
    twice = ~frame.select(pl.struct("number", "stack").is_first_distinct()).to_series()
    if twice.any():
        row = twice.arg_max() or 0
        message = f"lists {particles.rows[_IMAGE][row]} more than once"
        raise TableError(message, path=particles.path, row=row + 1, hint="keep one row an image")
    return frame


def _collapsed(path: str) -> str:
    """A path without ``.`` and ``..``."""
    kept: list[str] = []
    for part in path.split("/"):
        if part == ".." and kept and kept[-1] not in ("", ".."):
            kept.pop()
        elif part != "." and (part or not kept):
            kept.append(part)
    return "/".join(kept)


def _ambiguous(keys: pl.DataFrame) -> bool:
    return keys["stack"].n_unique() != keys["name"].n_unique()


def _values(given: Given, other: ParticleSet, compared: Compared) -> dict[str, Any]:
    found, agree = compared.consensus, compared.consensus.agree
    moves = found.moves_A.norm(dim=1)
    assert given.particles is not None
    values: dict[str, Any] = {
        "particles": len(given.particles),
        "particles_other": len(other),
        "particles_in_both": len(compared.first),
        "agree_percent": 100 * found.share,
        "agree_by_chance_percent": 100 * found.chance,
        "agree_beyond_chance_percent": 100 * found.beyond_chance,
        "tolerance_deg": compared.angle_deg,
        "tolerance_A": compared.shift_A,
        "median_angle_deg": _median(found.angles_deg[agree]),
        "median_shift_A": _median(moves[agree]),
        "median_angle_of_all_deg": _median(found.angles_deg),
        "median_shift_of_all_A": _median(moves),
        "other_hand": found.frame.mirrored,
        "origin_moved_by_A": float(found.frame.shift_A.norm()),
    }
    return values | _stated(compared)


def _stated(compared: Compared) -> dict[str, Any]:
    """Share of particles that differ by no more than both tables say they may."""
    tables = (compared.first, compared.second)
    if any(label not in table.rows.columns for table in tables for label in _ERRORS[:2]):
        return {}
    view, psi = (
        torch.from_numpy(np.hypot(*(numbers(table, label) for table in tables))).clamp_min(1e-6)
        for label in _ERRORS[:2]
    )
    turns = compared.consensus.turns_deg
    angles = (turns[:, :2] / view[:, None]).square().sum(1) + (turns[:, 2] / psi).square()
    values = {"angles_within_stated_errors_percent": 100 * float((angles < _SIGMAS**2).double().mean())}
    if all(_ERRORS[2] in table.rows.columns for table in tables):
        origin = torch.from_numpy(np.hypot(*(numbers(table, _ERRORS[2]) for table in tables))).clamp_min(1e-6)
        shifts = compared.consensus.moves_A.norm(dim=1) / origin
        values["shifts_within_stated_errors_percent"] = 100 * float((shifts < _SIGMAS).double().mean())
    return values


def _attraction(compared: Compared, group: str) -> Attraction | None:
    """Which views particles are drawn to, if enough agree and enough do not."""
    found = compared.consensus
    there = found.frame.of_poses(compared.first.poses).rotations
    try:
        return attraction(there, compared.second.poses.rotations.double(), group=group)
    except ParameterError:
        return None


def _pulled(pull: Attraction) -> dict[str, Any]:
    (direction,), (gain,) = pull.strongest()
    x, y, z = direction.tolist()
    return {
        "views_lost_percent": 100 * pull.lost,
        "attraction_index": pull.index,
        "attraction_index_by_chance": pull.expected,
        "attraction_probability": pull.probability,
        "attraction_gain": float(gain),
        "attracting_rot_deg": math.degrees(math.atan2(y, x)),
        "attracting_tilt_deg": math.degrees(math.acos(max(-1.0, min(1.0, z)))),
    }


def _judge(compared: Compared, pull: Attraction | None, *, most: int) -> tuple[Light, str]:
    found, n = compared.consensus, len(compared.first)
    which = f"{n} particles" if n == most else f"the {n} particles in both tables (of {most})"
    sentence = (
        f"{100 * found.share:.0f} % of {which} have the same pose in both refinements, to "
        f"{compared.angle_deg:.1f}° and {compared.shift_A:.1f} Å, where chance alone would make "
        f"{100 * found.chance:.0f} %"
    )
    if found.frame.mirrored:
        sentence += "; the two maps are mirror images of each other"
    if pull is not None and pull.probability < _RARE and float(pull.strongest()[1]) > _STRONG:
        values = _pulled(pull)
        sentence += (
            f"; the view at rot {values['attracting_rot_deg']:.0f}°, tilt "
            f"{values['attracting_tilt_deg']:.0f}° of the second map has drawn at least "
            f"{values['attraction_gain']:.1f} times its part of the wrong ones"
        )
    if found.sigmas_above_chance <= _SURE or found.beyond_chance < _RED:
        advice = "the poses cannot be relied on: look at the particles, the reference and the symmetry again"
        return "red", f"{sentence}; {advice}."
    if found.beyond_chance < _AMBER:
        return "amber", f"{sentence}; refine those that agree alone, and see whether the map becomes better."
    return "green", f"{sentence}."


def _median(values: Tensor) -> float | None:
    return float(values.median()) if len(values) else None


def draw(path: Path, compared: Compared) -> None:
    """Draw how far poses are apart, of particles and of random pairs."""
    found = compared.consensus
    width, height = 680, 440
    figure = new_figure(width, height)
    title = (
        f"{100 * found.share:.0f} % of {len(compared.first)} particles have the same pose in both refinements"
    )
    add_text(figure, MARGIN, height - 30, title, size=13, weight="bold")
    detail = f"chance alone: {100 * found.chance:.0f} %; dashed: the map's resolution at the particle's rim"
    add_text(figure, MARGIN, height - 50, detail, size=10, color=QUIET)
    panels = (62, 62, 400, 290), (530, 62, 132, 290)
    axes, shifts = (add_panel(figure, *panel) for panel in panels)
    edges = np.geomspace(0.05, 180, 61)
    curves = (found.angles_deg, "particles", "C0"), (found.chance_angles_deg, "random pairs", QUIET)
    for angles, label, colour in curves:
        counts, _ = np.histogram(angles.clamp(0.05, 180).numpy(), edges)
        share = 100 * counts / len(angles)
        axes.stairs(share, edges, label=label, color=colour, fill=True, alpha=0.25)
        axes.stairs(share, edges, color=colour, lw=1.3)
    axes.axvline(compared.angle_deg, color=INK, lw=1.0, ls="--")
    axes.set_xscale("log")
    ticks = (0.1, 0.3, 1, 3, 10, 30, 100)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylabel("pairs of poses, %", fontsize=9, color=INK)
    dress(axes, "angle between both poses, degrees")
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))

    moves, top = found.moves_A.norm(dim=1).numpy(), 3 * compared.shift_A
    counts, edges = np.histogram(moves.clip(0, top), 30, (0, top))
    shifts.stairs(100 * counts / len(moves), edges, color="C0", fill=True, alpha=0.25)
    shifts.stairs(100 * counts / len(moves), edges, color="C0", lw=1.3)
    shifts.axvline(compared.shift_A, color=INK, lw=1.0, ls="--")
    dress(shifts, "between both shifts, Å")
    save(figure, path)
