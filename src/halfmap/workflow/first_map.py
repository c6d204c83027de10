"""The stages that make the first map, find its point group, and refine it with small images."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halfmap.workflow import measured
from halfmap.workflow.chain import Chain, Plan, Skip
from halfmap.workflow.record import Decision

_ROUND = 0.94
"""Short over long axis of class averages: 0.98 and more in T, O and I, 0.88 of RNA polymerase II."""

_ROUND_GROUPS = "I2", "O", "T"
_TRIED = *_ROUND_GROUPS, "C1"
"""Groups that round particles are tried with, the largest first."""

_AS_GOOD = 1.1
"""Resolution over the finest one, up to which the larger group is taken."""

_FEW_ITERATIONS = 4
"""Of refinements that are only to tell the group."""


def abinitio(chain: Chain) -> Plan:
    """Make a first map, without symmetry where none is given."""
    symmetry = chain.settings.symmetry
    particles = chain.output("select", "particles")
    shifts = shift_range_of(particles)
    group = Decision("no symmetry", "none was given; it is looked for in this map", "--symmetry")
    decisions = (() if symmetry else (group,)) + ((shifts[1],) if shifts else ())
    values = {
        "particles": particles,
        "symmetry": symmetry or "C1",
        "shift_range": shifts[0] if shifts else None,
        "diameter": sphere_of(chain),
        "seed": chain.settings.seed,
    }
    return Plan("abinitio", values, decisions)


def symmetry(chain: Chain) -> Plan | None:
    """Look for a point group in the first map."""
    if chain.settings.symmetry:
        return None
    return Plan("symmetry", {"map": chain.output("abinitio", "map")})


def round_map(group: str) -> Callable[[Chain], Plan | None]:
    """Stage that makes a first map of round particles in a group."""

    def plan(chain: Chain) -> Plan | None:
        if not _is_round(chain):
            return None
        first = chain.job("abinitio").step.model_dump()
        return Plan("abinitio", {**first, "symmetry": group, "resolution": None})

    return plan


def round_refine(group: str) -> Callable[[Chain], Plan | None]:
    """Stage that refines the map of round particles in a group a little, to see what half maps agree in."""

    def plan(chain: Chain) -> Plan | None:
        if not _is_round(chain):
            return None
        first = chain.job("abinitio").step.model_dump()
        values = {name: first[name] for name in ("particles", "shift_range", "diameter", "seed")}
        values["reference"] = chain.output("abinitio" if group == "C1" else f"round-{group}", "map")
        values |= {"symmetry": group, "most_iterations": _FEW_ITERATIONS}
        why = "class averages are round, as those of these groups are; half maps are to tell which"
        made = Decision("T, O and I tried", why, "--symmetry")
        return Plan("refine", values, (made,) if group == "C1" else ())

    return plan


def symmetric(chain: Chain) -> Plan | Skip | None:
    """Make the first map anew in the group that was found in it."""
    if not chain.has("symmetry"):
        return None
    group, decision = _group(chain)
    if group == "C1" or _is_round(chain):
        return Skip((decision,))
    first = chain.job("abinitio").step.model_dump()
    return Plan("abinitio", {**first, "symmetry": group, "resolution": None}, (decision,))


def first_refine(chain: Chain) -> Plan:
    """Refine the images that are scaled down."""
    tried = f"round-{point_group(chain)}-refine"
    start = next(stage for stage in ("symmetric", tried, "abinitio") if chain.has(stage))
    particles = chain.output("select", "particles")
    shifts = shift_range_of(particles)
    values = {
        "particles": particles,
        "reference": chain.output(start, "map"),
        "symmetry": point_group(chain),
        "shift_range": shifts[0] if shifts else None,
        "diameter": sphere_of(chain),
        "seed": chain.settings.seed,
    }
    return Plan("refine", values)


def shift_range_of(particles: Path) -> tuple[float, Decision] | None:
    """How far particles are searched from their boxes' centres, from where their classes have found them."""
    far = measured.farthest_origins(particles)
    if far is None:
        return None
    value = math.ceil(1.25 * far + 2.0)
    why = f"95 % of the particles lie within {far:.1f} Å of their boxes' centres in their classes"
    return value, Decision(f"shifts to {value} Å", why, "--set abinitio.shift-range=10")


def sphere_of(chain: Chain) -> float | None:
    """Diameter of the sphere that holds the particle, if the particle's was given."""
    return None if chain.settings.diameter is None else 1.1 * chain.settings.diameter


def _is_round(chain: Chain) -> bool:
    """Whether particles are as round as those of T, O and I, none of which was found in the first map.

    Views of such particles are all alike, and runs without symmetry agree in a shape that is none.
    """
    if not chain.has("symmetry") or _found(chain)[0] in (*_ROUND_GROUPS, "I"):
        return False
    return measured.roundness(chain.output("select", "averages"), chain.project.root) >= _ROUND


def _group(chain: Chain) -> tuple[str, Decision]:
    """The point group, and how it was found."""
    if _is_round(chain):
        return _group_of_round(chain)
    group, row = _found(chain)
    if row is None:
        return "C1", Decision("symmetry C1", "no point group holds in the first map", "--symmetry")
    why = (
        f"its weakest operators correlate by {row['hmWeakestCorrelation']:.2f} in the first map, "
        f"{100 * row['hmShareOfSignal']:.0f} % of what its noise leaves of a perfect symmetry"
    )
    return group, Decision(f"symmetry {group}", why, "--symmetry")


def _group_of_round(chain: Chain) -> tuple[str, Decision]:
    """The largest group of those in which half maps agree to about the finest detail."""
    reached = {group: resolution_of(chain, f"round-{group}-refine") for group in _TRIED}
    finest = min(reached.values())
    group = next(group for group in _TRIED if reached[group] <= _AS_GOOD * finest)
    said = ", ".join(f"{each:.1f} Å {'without' if name == 'C1' else name}" for name, each in reached.items())
    why = f"class averages are round, and half maps of a few iterations agree to {said}"
    return group, Decision(f"symmetry {group}", why, "--symmetry")


def _found(chain: Chain) -> tuple[str, dict[str, Any] | None]:
    """The group that was found in the first map, and its scores; C1 has none."""
    scores = chain.output("symmetry", "scores")
    group = str(measured.read_block(scores, "symmetry_general")[0]["rlnSymmetryGroup"])
    rows = measured.read_block(scores, "symmetry_groups")
    return group, next((row for row in rows if row["rlnSymmetryGroup"] == group), None)


def point_group(chain: Chain) -> str:
    """The point group that was given or found."""
    return chain.settings.symmetry or _group(chain)[0]


def resolution_of(chain: Chain, stage: str) -> float:
    """Resolution in Å of a stage's refinement."""
    return float(
        measured.read_block(chain.output(stage, "model"), "model_general")[0]["rlnCurrentResolution"]
    )
