"""All checks, in the order of the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from halfmap.errors import HalfmapError, ItemsFailedError, ResourceError
from halfmap.io.tables import write_particles
from halfmap.log import log
from halfmap.steps.validate.agreement import check_agreement
from halfmap.steps.validate.consensus import check_consensus, compare
from halfmap.steps.validate.directions import check_directions
from halfmap.steps.validate.finding import Finding, Given
from halfmap.steps.validate.growing import check_growth
from halfmap.steps.validate.hand import check_hand
from halfmap.steps.validate.held_out import check_held_out
from halfmap.steps.validate.known import check_known_map
from halfmap.steps.validate.overfitting import (
    check_halves,
    check_noise_alone,
    check_noise_beyond,
    check_passed_low,
)
from halfmap.steps.validate.picks import check_picks
from halfmap.steps.validate.restart import check_restart
from halfmap.steps.validate.sample import Growth, Sample, draw_sample, grow
from halfmap.steps.validate.tilt import check_tilt
from halfmap.steps.validate.views import check_views

if TYPE_CHECKING:
    from halfmap.engine import Context

_DIRECTIONS, _HAND, _VIEWS = "Directions", "Hand", "Views"
_GROWTH, _CONTROLS = (
    "Resolution against particles (ResLog)",
    "Controls: over-fitting, prediction, a new begin",
)
_PASSED = "Over-fitting: images without fine detail"
_KNOWN = "A known map in real noise"
_CONSENSUS, _PICKS, _TILT = "Consensus of two refinements", "Einstein from noise", "Tilt pairs"


class Findings(list[Finding]):
    """Findings so far; each is told as it comes."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        self._ctx = ctx

    def add(self, finding: Finding) -> None:
        """Add one, and tell it."""
        self.append(finding)
        log.info("%s: %s: %s", finding.light.upper(), finding.name, finding.sentence)
        self._ctx.round_done(len(self), None, f"{finding.name}: {finding.light}", unit="check")

    def make(self, name: str, check: Callable[[], Finding]) -> None:
        """Make a check; one that cannot be made is grey, and says why.

        Raises
        ------
        ResourceError, ItemsFailedError
            What all other checks would meet as well, and a resumed job may not.
        """
        try:
            self.add(check())
        except (ResourceError, ItemsFailedError):
            raise
        except HalfmapError as error:
            self.grey(name, str(error))

    def grey(self, name: str, why: str) -> None:
        """Add what was not looked at."""
        self.add(Finding(name, "grey", f"Not looked at: {why.rstrip('.')}."))


def make_all(ctx: Context, given: Given) -> list[Finding]:
    """Make every check that what is given allows; those that it does not are listed as grey."""
    found = Findings(ctx)
    found.add(check_agreement(given, ctx.folder))
    if not given.agrees:
        found.grey("All other checks", "the half maps do not agree")
        return found
    found.make(_DIRECTIONS, lambda: check_directions(given, ctx.folder))
    found.make(_HAND, lambda: check_hand(given, ctx.folder))
    if given.particles is None:
        for name in (_VIEWS, _GROWTH, _CONTROLS, _CONSENSUS, _PICKS):
            found.grey(name, "give --particles, with their poses")
    else:
        found.make(_VIEWS, lambda: check_views(given, ctx.folder))
        _look_at_images(ctx, given, found)
        _compare_with_others(ctx, given, found)
    if given.tilted is not None and given.untilted is not None:
        found.make(_TILT, lambda: _tilt(ctx, given))
    return found


def _look_at_images(ctx: Context, given: Given, found: Findings) -> None:
    """Add what the images of the particles say."""
    sample = draw_sample(ctx, given)
    if sample is None:
        its = f"{given.halves.box} px of {given.halves.pixel_size:g} Å"
        for name in (_GROWTH, _CONTROLS):
            found.grey(name, f"the images have another box or pixel size than the half maps, {its}")
        return
    growth = grow(ctx, given, sample)
    found.make(_GROWTH, lambda: check_growth(given, growth, ctx.folder))
    if not given.step.controls:
        found.grey(_CONTROLS, "--no-controls")
        return
    try:
        _control(ctx, given, sample, growth, found)
    except (ResourceError, ItemsFailedError):
        raise
    except HalfmapError as error:
        found.grey(_CONTROLS, str(error))


def _control(ctx: Context, given: Given, sample: Sample, growth: Growth, found: Findings) -> None:
    """Run the controls."""
    finding, honest = check_halves(ctx, given, sample, growth)
    found.add(finding)
    found.add(check_held_out(given, sample, honest, ctx.folder))
    found.add(check_noise_beyond(ctx, given, sample, honest))
    found.make(_PASSED, lambda: check_passed_low(ctx, given, sample, honest))
    found.add(check_noise_alone(ctx, given, sample))
    found.make(_KNOWN, lambda: check_known_map(ctx, given, sample))
    found.add(check_restart(ctx, given, sample))


def _compare_with_others(ctx: Context, given: Given, found: Findings) -> None:
    """Add what a second refinement, and the template of the picks, say."""
    step, other = given.step, given.other
    if other is None:
        found.grey(
            _CONSENSUS, "give the particles of a second refinement, begun apart from this one (--other)"
        )
    else:
        found.make(_CONSENSUS, lambda: _consensus(ctx, given))
    if step.template is None:
        found.grey(_PICKS, "give the map or stack that the particles were picked with (--template)")
    else:
        template = ctx.resolve(step.template)
        found.make(_PICKS, lambda: check_picks(given, template, ctx.folder, project=ctx.project))


def _consensus(ctx: Context, given: Given) -> Finding:
    """Compare poses, and write the particles that agree."""
    assert given.other is not None
    group = given.step.symmetry
    compared = compare(given, given.other, group=group)
    if bool(compared.consensus.agree.any()):
        write_particles(ctx.folder / "reliable.star", compared.consistent)
    return check_consensus(given, given.other, ctx.folder, group=group, compared=compared)


def _tilt(ctx: Context, given: Given) -> Finding:
    assert given.untilted is not None
    assert given.tilted is not None
    step = given.step
    how = {"group": step.symmetry, "tilt_angle": step.tilt_angle, "tilt_axis": step.tilt_axis}
    return check_tilt(ctx.folder, given.untilted, given.tilted, **how, seed=step.seed)
