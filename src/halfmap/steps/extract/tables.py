"""From placed particles to the work of each micrograph, and from what came of it to the table."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from halfmap.data import MicrographSet, ParticleSet
from halfmap.data.optics import GROUP
from halfmap.data.versions import row_versions
from halfmap.errors import HalfmapError, ParameterError, TableError
from halfmap.io.atomic import write_text
from halfmap.io.micrographs import image_of
from halfmap.io.names import unique_stems
from halfmap.log import log
from halfmap.steps.extract import coordinates
from halfmap.steps.extract.box import Box, background_diameter, choose_box, needed_extent, typical
from halfmap.steps.extract.coordinates import CUT, DEFOCUS, IMAGE, INDEX, MICROGRAPH, PIXEL, Picks
from halfmap.steps.extract.images import Recipe
from halfmap.steps.extract.micrograph import FOLDER, REASONS, MicrographItem, unpacked
from halfmap.steps.extract.reading import image_shape

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.extract.step import ExtractStep

DIAMETER = "hmParticleDiameter"
MASK = "hmMicrographMask"
BRIGHT = "hmContrastSign"
SCORES = (coordinates.PROBABILITY, coordinates.SCORE, "rlnMaxValueProbDistribution")
"""What says which of two duplicates is the better one: the first of these that there is."""

STATISTICS = (
    "hmBackgroundMean",
    "hmBackgroundStd",
    "hmParticleMean",
    "hmParticleStd",
    "hmParticleSkewness",
)
OUTLYING = "hmParticleZScore"
POWERS = "hmDenoisingPowers"

_TYPICAL = "typical.json"
_DIGITS = 6

_CLOSE = 0.25
"""Distance of duplicates over the diameter."""

_WORDS = {
    "defocus": "without a defocus that is a number",
    "outside": "outside their micrograph",
    "edge": "too near to the edge",
    "masked": "in masked areas",
    "duplicate": "close to a better one",
    "blank": "where the micrograph is blank",
    "broken": "with pixels that are not numbers",
    "overflow": "with pixels beyond the range of half precision",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done to all particles.

    Attributes
    ----------
    recipe : Recipe
        To their images.
    box : Box
        Sizes.
    micrograph_pixel_size : float
        Å.
    diameter : float or None
        Of the particle, Å.
    circle : float
        Diameter outside of which is background, Å.
    """

    recipe: Recipe
    box: Box
    micrograph_pixel_size: float
    diameter: float | None
    circle: float


@dataclass(frozen=True)
class Typical:
    """What most particles are like, from which their box is chosen: diameter and defocus in Å, or NaN."""

    diameter: float
    defocus: float


def typical_values(ctx: Context, picks: Picks) -> Typical:
    """Medians of all particles; while more are to come, those of an earlier run for a while."""
    path, names = ctx.folder / _TYPICAL, picks.rows[MICROGRAPH].unique(maintain_order=True).to_list()
    if ctx.decisions.hold("box", names) and ctx.growing and path.exists():
        return Typical(**json.loads(path.read_text(encoding="utf-8")))
    rows = picks.rows
    found = Typical(
        diameter=typical(rows[DIAMETER]) if DIAMETER in rows.columns else math.nan,
        defocus=typical((rows[DEFOCUS[0]] + rows[DEFOCUS[1]]) / 2),
    )
    write_text(path, json.dumps(vars(found)))
    ctx.decisions.note("box", names)
    return found


def make_plan(step: ExtractStep, picks: Picks, most: Typical) -> Plan:
    """Choose box and circle.

    Parameters
    ----------
    step : ExtractStep
        What is asked for.
    picks : Picks
        The particles.
    most : Typical
        What most of them are like.

    Raises
    ------
    ParameterError
        If the sizes asked for cannot be, or nothing says how large the particle is.
    """
    rows = picks.rows
    micrographs = picks.micrographs.select(pl.Series(np.arange(len(picks.micrographs)) == rows[INDEX][0]))
    pixel_size = float(micrographs.column(PIXEL)[0])
    found = most.diameter
    diameter = step.diameter or (found if math.isfinite(found) else None)
    if diameter is not None and not 0.5 <= diameter / found <= 2 and math.isfinite(found):
        log.warning("--diameter is %.0f Å, but the picks are of particles of %.0f Å", diameter, found)
    voltage = float(micrographs.column("rlnVoltage")[0])
    defocus = most.defocus
    box = choose_box(
        micrograph_pixel_size=pixel_size,
        diameter=diameter,
        box=step.box,
        scaled_box=step.scaled_box,
        pixel_size=step.pixel_size,
        resolution=step.resolution,
        defocus=defocus,
        voltage_kV=voltage,
    )
    side = box.size * pixel_size
    log.info("box: %d px, %.0f Å (%s)", box.size, side, box.reason)
    if box.scaled != box.size:
        log.info("scaled to %d px of %.5g Å", box.scaled, box.pixel_size)
    if diameter is not None and step.box is not None:
        finest = max(step.resolution or 0.0, 2 * box.pixel_size)
        needed = needed_extent(diameter, defocus=defocus, voltage_kV=voltage, resolution=finest)
        if needed > 1.02 * side:
            message = "a particle of %.0f Å at %.2f µm defocus and %.3g Å needs a box of %.0f px"
            log.warning(message, diameter, defocus * 1e-4, finest, needed / pixel_size)
    circle = background_diameter(box, diameter, step.background_diameter)
    log.info("background: outside a circle of %.0f Å", circle)
    recipe = Recipe(
        box=box.size,
        scaled_box=box.scaled,
        circle=circle / side,
        background=step.background,
        invert=step.invert_contrast,
        mirror=step.edges == "mirror",
        white_dust=step.white_dust,
        black_dust=step.black_dust,
    )
    return Plan(recipe=recipe, box=box, micrograph_pixel_size=pixel_size, diameter=diameter, circle=circle)


def list_items(step: ExtractStep, ctx: Context, picks: Picks, plan: Plan) -> list[MicrographItem]:
    """Every micrograph that has particles, with what its worker needs to know.

    Raises
    ------
    TableError
        If phases are to be flipped and a setting of the microscope is missing.
    ParameterError
        If no micrograph is as large as a box.
    """
    rows, known = picks.rows, picks.micrographs.rows
    distance = step.min_distance if step.min_distance is not None else _CLOSE * (plan.diameter or 0.0)
    margin = (plan.diameter or plan.circle) / plan.micrograph_pixel_size / 2
    margin = plan.box.size // 2 if step.edges == "leave-out" else margin
    label = next((label for label in SCORES if label in rows.columns), None)
    names = known[MICROGRAPH].to_list()
    keys = dict(zip(names, unique_stems(names, table=picks.micrographs.path), strict=True))
    bright = picks.micrographs.column(BRIGHT, default=-1.0)
    for_ctf = _with_pixel_size(picks, plan.micrograph_pixel_size) if step.phase_flip else None
    items = []
    for first, last, micrograph in coordinates.by_micrograph(rows):
        part = rows[first:last]
        row = known.row(micrograph, named=True)
        name = row[MICROGRAPH]
        defocus = part.select(pl.col(DEFOCUS).cast(pl.Float64)).to_numpy()
        has_defocus = np.asarray(np.isfinite(defocus).all(axis=1))
        if not has_defocus.any():
            ctx.fail(
                "micrograph", name, "its defocus is not a number; estimate the CTF anew, or leave it out"
            )
            continue
        mask = row.get(MASK) if step.use_masks else None
        cut = part.select(CUT).to_numpy()
        shift = part.select(coordinates.ORIGINS).to_numpy() / plan.micrograph_pixel_size
        dark = bright[micrograph] != 1
        items.append(
            MicrographItem(
                name=name,
                key=keys[name],
                # By the name, not the place in the list: a part of the data gives the same.
                seed=zlib.crc32(name.encode()),
                path=ctx.resolve(image_of(row, step.images, table=picks.micrographs.path)),
                mask=None if mask in (None, "", "None") else ctx.resolve(mask),
                cut=cut,
                place=cut - shift,
                score=None if label is None else part[label].cast(pl.Float64).to_numpy(),
                has_defocus=has_defocus,
                pixel_size=plan.box.pixel_size,
                recipe=replace(plan.recipe, invert=plan.recipe.invert and dark),
                margin_px=margin,
                min_distance_px=distance / plan.micrograph_pixel_size,
                ctf=None if for_ctf is None else for_ctf.with_rows(for_ctf.rows[first:last]),
            )
        )
    if not items:
        message = "no micrograph that has particles has a defocus"
        raise TableError(message, path=picks.micrographs.path, hint="estimate the CTF first: halfmap ctf")
    _check_room(items, plan)
    return items


def versions(micrographs: MicrographSet, items: list[MicrographItem]) -> dict[str, str]:
    """By what the stack of each micrograph is known again: itself, its particles, how they are cut."""
    rows = row_versions(micrographs, MICROGRAPH)
    return {item.name: f"{rows[item.name]} {_work(item)}" for item in items}


def _work(item: MicrographItem) -> str:
    plain = item.recipe, item.pixel_size, item.margin_px, item.min_distance_px, item.mask is None
    total = hashlib.blake2b(repr(plain).encode(), digest_size=8)
    for values in (item.cut, item.place, item.score, item.has_defocus):
        if values is not None:
            total.update(np.ascontiguousarray(values).tobytes())
    if item.ctf is not None:
        total.update(item.ctf.rows.write_csv().encode())
    return total.hexdigest()


def _check_room(items: list[MicrographItem], plan: Plan) -> None:
    """Refuse a box that fits into no micrograph; if it fits into some, the others fail one by one."""
    shapes = []
    for item in items:
        try:
            shapes.append(image_shape(item.path))
        except HalfmapError:
            continue  # its turn comes
        if plan.box.size <= min(shapes[-1]):
            return
    if shapes:
        height, width = max(shapes, key=min)
        side = plan.box.size * plan.micrograph_pixel_size
        message = f"a box of {plan.box.size} px, {side:.0f} Å, is larger than the micrographs,"
        message += f" {width} × {height} px"
        raise ParameterError(message, hint="give a smaller --box or --diameter (in Å)")


def _with_pixel_size(picks: Picks, pixel_size: float) -> ParticleSet:
    """Columns that the CTF depends on, for images with pixels of the micrograph."""
    labels = [label for label in (GROUP, *coordinates.CTF) if label in picks.rows.columns]
    rows = picks.rows.select(MICROGRAPH, coordinates.X, coordinates.Y, *labels)
    optics = picks.optics.with_columns(pl.lit(pixel_size).alias("rlnImagePixelSize"))
    particles = ParticleSet(optics, rows)
    particles.with_rows(rows[:1]).ctf.for_ctf()
    return particles


def tabulate(
    step: ExtractStep,
    ctx: Context,
    picks: Picks,
    plan: Plan,
    items: list[MicrographItem],
    done: list[dict[str, Any]],
) -> ParticleSet:
    """Table of the particles that were cut, with the names of their images; all other columns are kept.

    Raises
    ------
    TableError
        If none was.
    """
    rows = picks.rows
    stacks = {item.name: ctx.relative(ctx.folder / FOLDER / f"{item.key}.mrcs") for item in items}
    firsts = {rows[MICROGRAPH][first]: first for first, _, _ in coordinates.by_micrograph(rows)}
    chosen = [firsts[one["name"]] + unpacked(one["kept"], np.int32).astype(np.int64) for one in done]
    numbers = np.concatenate([np.arange(len(one)) + 1 for one in chosen])
    names = pl.Series([stacks[one["name"]] for one in done], dtype=pl.String)
    stack = names[np.repeat(np.arange(len(done)), [len(one) for one in chosen])]
    _say_left_out(step, done, len(numbers), sum(len(item.cut) for item in items))
    kept = rows[np.concatenate(chosen)].drop(INDEX, *CUT)
    if IMAGE in kept.columns and "rlnImageOriginalName" not in kept.columns:
        kept = kept.with_columns(pl.col(IMAGE).alias("rlnImageOriginalName"))
    statistics = np.concatenate([unpacked(one["statistics"], np.float32) for one in done])
    statistics = _rounded(statistics.astype(np.float64)).reshape(-1, len(STATISTICS))
    images = pl.DataFrame({"number": numbers, "stack": stack}).select(
        (pl.col("number").cast(pl.String).str.zfill(6) + "@" + pl.col("stack")).alias(IMAGE)
    )
    kept = kept.with_columns(
        images[IMAGE],
        *(pl.Series(label, values) for label, values in zip(STATISTICS, statistics.T, strict=True)),
        pl.Series(OUTLYING, outlyingness(statistics[:, 2:])),
    )
    kept = kept.drop(POWERS, strict=False)
    if step.images != "raw":
        measured = picks.micrographs.rows.select(MICROGRAPH, POWERS)
        kept = kept.join(measured, on=MICROGRAPH, how="left", maintain_order="left")
    return ParticleSet(_optics(step, picks, plan, kept), kept)


def outlyingness(values: np.ndarray) -> np.ndarray:
    """Largest distance of a row's values from their medians, in robust standard deviations.

    Parameters
    ----------
    values : array (n, k)
        Statistics of the particles.
    """
    distance = np.abs(values - np.median(values, axis=0))
    spread = 1.4826 * np.median(distance, axis=0)
    return (distance / np.where(spread > 0, spread, np.inf)).max(axis=1).round(2)


def _say_left_out(step: ExtractStep, done: list[dict[str, Any]], kept: int, total: int) -> None:
    counts = Counter[str]()
    for one in done:
        counts.update(one["left_out"])
    reasons = [f"{counts[reason]} {_WORDS[reason]}" for reason in REASONS if counts[reason]]
    if not kept:
        hint = (
            "are the coordinates in pixels of these micrographs?"
            if counts["edge"] + counts["outside"]
            else None
        )
        raise TableError(f"none of {total} particles is left: {', '.join(reasons)}", hint=hint)
    if reasons:
        log.info("%d of %d particles are left out: %s", total - kept, total, ", ".join(reasons))
    used = sum(bool(one["kept"]) for one in done)
    log.info("%d particles of %d micrograph%s", kept, used, "" if used == 1 else "s")


def _rounded(values: np.ndarray) -> np.ndarray:
    """To six digits, as many as a table shows."""
    digits = _DIGITS - 1 - np.floor(np.log10(np.maximum(np.abs(values), 1e-30)))
    # Divided by whole powers of ten, which are exact, decimals are the nearest there are.
    power = 10.0 ** np.abs(digits)
    return np.where(digits > 0, np.rint(values * power) / power, np.rint(values / power) * power)


def _optics(step: ExtractStep, picks: Picks, plan: Plan, rows: pl.DataFrame) -> pl.DataFrame:
    """Optics groups of the particles, with what their images are."""
    optics = picks.optics.filter(pl.col(GROUP).is_in(rows[GROUP].unique().implode()))
    columns: dict[str, Any] = {
        "rlnImagePixelSize": plan.box.pixel_size,
        "rlnImageSize": plan.box.scaled,
        "rlnImageDimensionality": 2,
        "rlnCtfDataArePhaseFlipped": step.phase_flip,
        "rlnCtfDataAreCtfPremultiplied": False,
        "hmImageKind": step.images,
        "hmIsNormalised": step.background != "none",
    }
    if step.invert_contrast:
        columns[BRIGHT] = 1
    else:
        signs = picks.micrographs.column(BRIGHT, default=-1.0).cast(pl.Int64)
        known = dict(zip(picks.micrographs.rows[MICROGRAPH], signs, strict=True))
        one = dict(zip(rows[GROUP], rows[MICROGRAPH], strict=True))
        optics = optics.with_columns(pl.Series(BRIGHT, [known[one[group]] for group in optics[GROUP]]))
    if "rlnMicrographOriginalPixelSize" not in optics.columns:
        columns["rlnMicrographOriginalPixelSize"] = plan.micrograph_pixel_size
    return optics.with_columns(pl.lit(value).alias(label) for label, value in columns.items())
