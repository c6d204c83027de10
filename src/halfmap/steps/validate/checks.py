"""All checks, in the order of the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from halfmap.io.tables import write_particles
from halfmap.log import log
from halfmap.steps.validate import examine
from halfmap.steps.validate.agreement import check_agreement
from halfmap.steps.validate.consensus import check_consensus, compare
from halfmap.steps.validate.directions import check_directions
from halfmap.steps.validate.finding import Finding, Given
from halfmap.steps.validate.growing import check_growth
from halfmap.steps.validate.hand import check_hand
from halfmap.steps.validate.held_out import check_held_out
from halfmap.steps.validate.overfitting import check_halves, check_noise_alone, check_noise_beyond
from halfmap.steps.validate.picks import check_picks
from halfmap.steps.validate.restart import check_restart
from halfmap.steps.validate.sample import draw_sample, grow
from halfmap.steps.validate.tilt import check_tilt
from halfmap.steps.validate.views import check_views

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.validate.step import ValidateStep

_ON_IMAGES = "Resolution against particles, over-fitting, prediction, a map begun anew"


def make_all(step: ValidateStep, ctx: Context, given: Given) -> list[Finding]:
    """Make every check that what is given allows; those that it does not are listed as grey."""
    found = [
        check_agreement(given, ctx.folder),
        check_directions(given, ctx.folder),
        check_hand(given, ctx.folder),
    ]
    _say(found)
    if given.particles is None:
        sentence = "Not looked at: give --particles, with their poses."
        found.append(Finding(f"Views, {_ON_IMAGES.lower()}", "grey", sentence))
    else:
        found.append(check_views(given, ctx.folder))
        _say(found[-1:])
        found += _of_images(ctx, given)
        found += _of_others(step, ctx, given)
    if step.tilted is not None:
        untilted = (
            given.particles if step.untilted is None else examine.with_poses(ctx.resolve(step.untilted))
        )
        assert untilted is not None
        tilted = examine.with_poses(ctx.resolve(step.tilted))
        found.append(
            check_tilt(
                ctx.folder,
                untilted,
                tilted,
                group=step.symmetry,
                tilt_angle=step.tilt_angle,
                tilt_axis=step.tilt_axis,
                seed=step.seed,
            )
        )
        _say(found[-1:])
    return found


def _of_images(ctx: Context, given: Given) -> list[Finding]:
    """What the images of the particles say."""
    sample = draw_sample(ctx, given)
    if sample is None:
        sentence = (
            f"Not looked at: the images have another box or pixel size than the half maps, "
            f"{given.halves.box} px of {given.halves.pixel_size:g} Å."
        )
        return [Finding(_ON_IMAGES, "grey", sentence)]
    growth = grow(ctx, given, sample)
    found = [check_growth(given, growth, ctx.folder)]
    _say(found)
    if not given.step.controls:
        sentence = "Not looked at: --no-controls."
        return [*found, Finding("Over-fitting, prediction, a map begun anew", "grey", sentence)]
    finding, honest = check_halves(ctx, given, sample, growth)
    found.append(finding)
    _say(found[-1:])
    for check in (
        lambda: check_held_out(given, sample, honest, ctx.folder),
        lambda: check_noise_beyond(ctx, given, sample, honest),
        lambda: check_noise_alone(ctx, given, sample),
        lambda: check_restart(ctx, given, sample),
    ):
        found.append(check())
        _say(found[-1:])
    return found


def _of_others(step: ValidateStep, ctx: Context, given: Given) -> list[Finding]:
    """What comparison with a second refinement, and with the template, says."""
    assert given.particles is not None
    found = []
    if step.other is None:
        sentence = (
            "Not looked at: give the particles of a second refinement, begun apart from the first (--other)."
        )
        found.append(Finding("Consensus of two refinements", "grey", sentence))
    else:
        other = examine.with_poses(ctx.resolve(step.other))
        compared = compare(given, other, group=step.symmetry)
        found.append(check_consensus(given, other, ctx.folder, group=step.symmetry, compared=compared))
        if bool(compared.consensus.agree.any()):
            write_particles(ctx.folder / "reliable.star", compared.consistent)
        _say(found[-1:])
    if step.template is None:
        sentence = "Not looked at: give the map or stack that the particles were picked with (--template)."
        found.append(Finding("Einstein from noise", "grey", sentence))
    else:
        found.append(check_picks(given, ctx.resolve(step.template), ctx.folder, project=ctx.project))
        _say(found[-1:])
    return found


def _say(findings: list[Finding]) -> None:
    for finding in findings:
        log.info("%s: %s: %s", finding.light.upper(), finding.name, finding.sentence)
