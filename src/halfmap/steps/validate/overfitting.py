"""Whether the map holds more than its particles: refined anew by halves that never meet, and from noise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from halfmap.ops.fsc import resolution
from halfmap.ops.fsc_interval import resolution_interval
from halfmap.pictures import INK, MARGIN, QUIET, add_panel, add_text, new_figure, resolution_axis, save
from halfmap.search.halfmaps import radius_at
from halfmap.steps.validate import controls
from halfmap.steps.validate.controls import SMEARED, Control
from halfmap.steps.validate.finding import Finding, Given
from halfmap.steps.validate.sample import Growth, Sample

if TYPE_CHECKING:
    from halfmap.engine import Context

THRESHOLD = 0.143

_SAME, _OTHER = 1.1, 1.25
"""Resolution of independent halves over that of the map, up to which they are as good, and beyond which the
map's is not to be believed."""

_PASSED_A = 3.0, 5.0, 8.0
_SURELY, _LESS = 1.2, 1.5
"""Detail over the resolution from which on images that have no finer one are refined; and if none is."""

_BEYOND, _FAR = 1.1, 1.25
"""Frequency that noise is resolved to over that to which there is something, that is tolerated at most."""


def check_halves(ctx: Context, given: Given, sample: Sample, growth: Growth) -> tuple[Finding, Control]:
    """Refine the same particles anew, by half sets that never meet, and compare what the maps resolve.

    Only what is coarser than twice the resolution is taken from the map: what finer detail the particles
    hold, each half set finds for itself.
    """
    controls.begin(ctx, given)
    again = controls.refine(ctx, given, sample.table, "independent_halves")
    where = {"pixel_size": given.halves.pixel_size, "box": given.halves.box}
    own = growth.curves[-1]
    before = resolution(own, **where)
    intervals = [
        resolution_interval(curve, given.scatter, **where, seed=given.step.seed)
        for curve in (own, again.curve)
    ]
    ratio = again.resolution / before
    apart = intervals[1].fine > intervals[0].coarse
    more = len(given.particles or ()) > len(sample.particles)
    if ratio > _SAME and apart and more:
        light, words = (
            "amber",
            f"but the poses of the table were found with a map of all {len(given.particles or ()):,} "
            f"particles, these with maps of {len(sample.particles):,}: repeat with a larger --sample",
        )
    elif ratio > _OTHER and apart:
        light, words = (
            "red",
            "the poses were fitted to noise: report what independent half sets give, and refine with these",
        )
    elif ratio > _SAME and apart:
        light, words = "amber", "somewhat less: report this"
    else:
        light, words = "green", "the map's resolution is its particles'"
    sentence = (
        f"Half sets that are refined anew from {controls.first_detail(given):.0f} Å and never meet agree to "
        f"{again.resolution:.2f} Å, at the table's poses to {before:.2f} Å: {words}."
    )
    path = ctx.folder / "independent_halves.png"
    draw(
        path,
        given,
        {"at the poses of the table": own, "refined anew, half sets apart": again.curve},
        f"refined anew to {again.resolution:.2f} Å, as given {before:.2f} Å",
        1 / controls.first_detail(given),
    )
    values = {
        "resolution_given_poses_A": before,
        "resolution_independent_A": again.resolution,
        "interval_given_poses_A": list(intervals[0]),
        "interval_independent_A": list(intervals[1]),
        "ratio": ratio,
        "particles": len(sample.particles),
    }
    method = (
        "The particles are refined near their poses by two half sets that never meet, from the map "
        "low-passed at twice its resolution. Poses that were fitted to noise which both halves shared "
        "lose what they owe to it. Both resolutions are of maps of the same particles in the same mask."
    )
    return Finding(
        "Over-fitting: independent half sets", light, sentence, values, (path.name,), method
    ), again


def check_noise_beyond(ctx: Context, given: Given, sample: Sample, honest: Control) -> Finding:
    """Refine images whose fine detail is noise: what agrees beyond is what refinement makes of noise."""
    shell = controls.substituted_from(given)
    table = controls.changed(ctx, sample, "noise_beyond", controls.substituted(given, shell))
    control = controls.refine(ctx, given, table, "noise_beyond")
    side = given.side
    kept, found = side / shell, radius_at(control.curve, THRESHOLD)
    limit = shell + SMEARED
    if found > _FAR * limit:
        light, words = "red", "noise is resolved: refinement over-fits these particles"
    elif found > _BEYOND * limit:
        light, words = "amber", "some noise is resolved"
    else:
        light, words = "green", "noise adds nothing"
    sentence = (
        f"With random phases beyond {kept:.1f} Å half maps agree to {control.resolution:.1f} Å: {words}."
    )
    true = _freed(honest.curve, control.curve, limit)
    path = ctx.folder / "noise_beyond.png"
    curves = {
        "particles as they are": honest.curve,
        f"random phases beyond {kept:.1f} Å": control.curve,
        "less what noise gives": true,
    }
    draw(path, given, curves, f"noise beyond {kept:.1f} Å: {control.resolution:.1f} Å", 1 / kept)
    where = {"pixel_size": given.halves.pixel_size, "box": given.halves.box}
    values = {
        "random_phases_beyond_A": kept,
        "resolution_A": control.resolution,
        "resolution_less_noise_A": resolution(true, **where),
    }
    method = (
        "Phases of the images beyond this detail are made random, and the particles refined in the same way. "
        "Chen et al. 2013, DOI 10.1016/j.ultramic.2013.06.004."
    )
    return Finding(
        "Over-fitting: noise in place of fine detail", light, sentence, values, (path.name,), method
    )


def check_noise_alone(ctx: Context, given: Given, sample: Sample) -> Finding:
    """Refine images of nothing but noise against the map: what is resolved comes of the reference."""
    table = controls.changed(ctx, sample, "noise_alone", controls.substituted(given, 1))
    control = controls.refine(ctx, given, table, "noise_alone")
    begun = controls.first_detail(given)
    limit = round(given.side / begun) + SMEARED
    found = radius_at(control.curve, THRESHOLD)
    if found > _FAR * limit:
        light, words = "red", "noise is resolved: do not trust any map of such images without a control"
    elif found > _BEYOND * limit:
        light, words = "amber", "somewhat beyond what it began with"
    else:
        light, words = "green", "nothing beyond what it began with"
    sentence = (
        f"Images of nothing but noise, refined against the map to {begun:.0f} Å, agree to "
        f"{min(control.resolution, given.side):.0f} Å: {words}."
    )
    path = ctx.folder / "noise_alone.png"
    draw(
        path,
        given,
        {"nothing but noise": control.curve},
        f"noise alone: {control.resolution:.0f} Å",
        1 / begun,
    )
    values = {"begun_with_A": begun, "resolution_A": control.resolution}
    method = "All phases of the images are made random, and these refined in the same way."
    return Finding("Over-fitting: nothing but noise", light, sentence, values, (path.name,), method)


def check_passed_low(ctx: Context, given: Given, sample: Sample, honest: Control) -> Finding:
    """Refine images without their fine detail: what half maps agree in beyond was never in them."""
    runs: dict[float, Control] = {}
    beyond = 0.0
    for detail in details(given.resolution):
        name = f"passed_at_{detail:g}_A"
        table = controls.changed(ctx, sample, name, controls.passed_low(given, sample, detail))
        runs[detail] = controls.refine(ctx, given, table, name)
        limit = round(given.side / detail) + SMEARED
        beyond = max(beyond, radius_at(runs[detail].curve, THRESHOLD) / limit)
    if beyond > _FAR:
        light, words = "red", "refinement makes detail that is in no image"
    elif beyond > _BEYOND:
        light, words = "amber", "somewhat beyond"
    else:
        light, words = "green", "nothing beyond"
    kept = " and ".join(f"{detail:.3g}" for detail in runs)
    found = " and ".join(f"{run.resolution:.2f}" for run in runs.values())
    sentence = f"Of images without detail finer than {kept} Å half maps agree to {found} Å: {words}."
    path = ctx.folder / "passed_low.png"
    curves = {"particles as they are": honest.curve}
    curves |= {f"nothing beyond {detail:.3g} Å": run.curve for detail, run in runs.items()}
    draw(path, given, curves, f"images passed at {kept} Å: {found} Å", 1 / max(runs))
    values = {"passed_at_A": list(runs), "resolution_A": [run.resolution for run in runs.values()]}
    method = (
        "The images are low-pass filtered, noise of the same power takes the place of what was finer, and "
        "they are refined in the same way. "
        "Ramirez-Aportela et al. 2022, DOI 10.1107/S2052252522006959."
    )
    return Finding("Over-fitting: images without fine detail", light, sentence, values, (path.name,), method)


def details(resolution: float) -> list[float]:
    """Detail in Å at which images are passed: what is surely coarser than the resolution."""
    coarser = [each for each in _PASSED_A if each > _SURELY * resolution]
    return coarser or [round(_LESS * resolution, 1)]


def _freed(curve: Tensor, noise: Tensor, first: int) -> Tensor:
    """Correlation less what noise gives from a shell on: (FSC_t - FSC_n) / (1 - FSC_n)."""
    freed = (curve - noise) / (1 - noise).clamp_min(1e-3)
    return torch.where(torch.arange(len(curve)) >= first, freed, curve)


def draw(path: Path, given: Given, curves: dict[str, Tensor], title: str, mark: float) -> None:
    """Draw correlations against frequency, with a line at a frequency in 1/Å."""
    figure = new_figure(680, 420)
    add_text(figure, MARGIN, 420 - 30, title, size=13, weight="bold")
    add_text(figure, MARGIN, 420 - 50, "corrected correlation of half maps in one mask", size=10, color=QUIET)
    axes = add_panel(figure, 62, 62, 680 - 62 - MARGIN, 275)
    for (label, curve), colour in zip(curves.items(), (INK, "C1", "C0", "C2"), strict=False):
        axes.plot(np.arange(len(curve)) / given.side, curve.numpy(), label=label, lw=1.6, color=colour)
    axes.axhline(THRESHOLD, color=QUIET, lw=0.8, ls="--")
    axes.axvline(mark, color=QUIET, lw=0.8, ls=":")
    axes.set_ylim(-0.1, 1.04)
    resolution_axis(axes, (len(given.fsc.corrected) - 1) / given.side)
    axes.legend(fontsize=8, frameon=False)
    save(figure, path)
