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

_ROUND_GROUPS = "T", "O", "I2"
"""Groups that round particles are tried with."""

_WITHIN = {
    "T": {"C2", "C3", "D2"},
    "O": {"C2", "C3", "C4", "D2", "D3", "D4", "T"},
    "I2": {"C2", "C3", "C5", "D2", "D3", "D5", "T"},
}
"""Groups that have part of the operators of these, which are not to be told from them by likelihood."""

_SURE = 2.0
"""Standard errors of a gain in log-likelihood from which on it counts.

They are those of means of micrographs, which also differ by how much each can say: in real apoferritin O
gains 3 to 4 of them, and wrong groups lose 3 to 17.
"""

_ABOVE_NULL = 5.0
"""Standard deviations that a group which is nearly there correlates above maps of random phases."""

_SAMPLE = 2_000
"""Particles that groups are tried with."""

_ITERATIONS, _RUNS = 4, 4
"""Of refinements that are only to tell the group; of their maps, at most."""

_GROUP = "--symmetry GROUP"

AROUND = 1.1
"""Diameter of a particle's sphere over its own."""

_WIDER = 1.6
"""Diameter of a map over that of its sphere beyond which it is not believed."""

_FIRST_A = 20.0
"""Detail of the first map that these refinements begin with; finer in T, O and I, shapeless at that."""


def abinitio(chain: Chain) -> Plan:
    """Make a first map, without symmetry where none is given."""
    symmetry = chain.settings.symmetry
    particles = chain.output("select", "particles")
    shifts = shift_range_of(particles)
    group = Decision("no symmetry", "none was given; it is looked for in this map", _GROUP)
    decisions = (() if symmetry else (group,)) + ((shifts[1],) if shifts else ())
    values = {
        "particles": particles,
        "symmetry": symmetry or "C1",
        "shift_range": shifts[0] if shifts else None,
        "diameter": sphere_of(chain),
        "seed": chain.settings.seed,
    }
    return Plan(values, decisions)


def symmetry(chain: Chain) -> Plan | Skip | None:
    """Look for a point group in the first map, if it is one.

    After the few iterations of its trial there are half maps, which tell how much symmetry noise leaves.
    """
    if chain.settings.symmetry:
        return None
    if _agreement(chain) is None:
        why = "no two runs agree, so that the first map is one of many that the images allow"
        return Skip((Decision("no symmetry looked for", why, f"--set abinitio.restarts=N, or {_GROUP}"),))
    values: dict[str, Any] = {"map": chain.output("abinitio", "map")}
    if chain.has("abinitio-trial"):
        values = {name: chain.output("abinitio-trial", name) for name in ("map", "half1", "half2")}
    return Plan(values, is_optional=True)


def symmetric(stage: str) -> Callable[[Chain], Plan | None]:
    """Stage that makes the first map anew in a group that is in it, or nearly so."""

    def plan(chain: Chain) -> Plan | None:
        group = next((group for group, made in _seen(chain).items() if made == stage), None)
        return None if group is None else _map_in(chain, group)

    return plan


def round_map(group: str) -> Callable[[Chain], Plan | None]:
    """Stage that makes a first map of round particles in a group."""

    def plan(chain: Chain) -> Plan | None:
        return _map_in(chain, group) if _is_round(chain) and group not in _seen(chain) else None

    return plan


def trial(stage: str) -> Callable[[Chain], Plan | None]:
    """Stage that refines a sample of the particles a little, from the map of another stage in its group."""

    def plan(chain: Chain) -> Plan | None:
        group = next((group for group, made in _tried(chain).items() if made == stage), None)
        if group is None:
            return None
        others = ", ".join(each for each in _tried(chain) if each != "C1")
        is_round = "class averages are round, as those of such groups are"
        why = is_round if _is_round(chain) else "it is in the first map, or nearly so"
        made = Decision(f"{others} tried beside no symmetry", why, _GROUP)
        return _trial(chain, stage, group, (made,))

    return plan


def first_trial(chain: Chain) -> Plan | None:
    """Refine a sample of the particles a little without symmetry, if one is to be looked for."""
    if chain.settings.symmetry or (_agreement(chain) is None and not _is_round(chain)):
        return None
    return _trial(chain, "abinitio", "C1")


def _trial(chain: Chain, stage: str, group: str, decisions: tuple[Decision, ...] = ()) -> Plan:
    values = {
        **common(chain),
        "reference": chain.output(stage, "map"),
        "symmetry": group,
        # With any less to begin with than the others, a group is behind them for its iterations.
        "initial_lowpass": None if group in _ROUND_GROUPS else _FIRST_A,
        "sample": _SAMPLE,
        "most_iterations": _ITERATIONS,
    }
    return Plan(values, decisions, is_optional=True)


def _agreement(chain: Chain) -> float | None:
    return measured.agreement(chain.output("abinitio", "model"))


def first_refine(chain: Chain) -> Plan:
    """Refine the images that are scaled down, in the group that particles are likeliest in."""
    group = point_group(chain)
    values = {
        **common(chain),
        "reference": chain.output(_tried(chain).get(group, "abinitio"), "map"),
        "symmetry": group,
    }
    decisions = () if chain.settings.symmetry else (_likeliest(chain)[1],)
    return Plan(values, decisions)


def common(chain: Chain) -> dict[str, Any]:
    """What all refinements of the first particles have in common."""
    particles = chain.output("select", "particles")
    shifts = shift_range_of(particles)
    return {
        "particles": particles,
        "shift_range": shifts[0] if shifts else None,
        "diameter": sphere_of(chain),
        "seed": chain.settings.seed,
    }


def shift_range_of(particles: Path) -> tuple[float, Decision] | None:
    """How far particles are searched from their boxes' centres, from where their classes have found them."""
    far = measured.farthest_origins(particles)
    if far is None:
        return None
    value = math.ceil(1.25 * far + 2.0)
    why = f"95 % of the particles lie within {far:.1f} Å of their boxes' centres in their classes"
    return value, Decision(f"shifts to {value} Å", why, "--set abinitio.shift-range=Å")


def sphere_of(chain: Chain) -> float | None:
    """Diameter of the sphere that holds the particle, if the particle's was given."""
    return None if chain.settings.diameter is None else AROUND * chain.settings.diameter


def beyond_sphere(chain: Chain) -> tuple[float, Decision] | None:
    """Diameter in Å of the first refined map, if none was given and the sphere about it is too small."""
    if chain.settings.diameter is not None or "diameter" in chain.asked("refine"):
        return None
    (general,) = measured.read_block(chain.output("first-refine", "model"), "model_general")
    wide, sphere = float(general.get("hmMapDiameter", 0.0)), float(general.get("rlnParticleDiameter", 0.0))
    if not sphere < wide < _WIDER * sphere:
        return None
    why = f"the first refined map goes on beyond its sphere of {sphere:.0f} Å"
    return wide, Decision(f"particle {wide:.0f} Å wide", why, "--set refine.diameter=Å")


def point_group(chain: Chain) -> str:
    """The point group that was given or found."""
    return chain.settings.symmetry or _likeliest(chain)[0]


def _map_in(chain: Chain, group: str) -> Plan:
    values = {**common(chain), "symmetry": group, "restarts": _RUNS}
    return Plan(values, is_optional=True)


def _surely_found(chain: Chain) -> str:
    """The group that was found in the first map."""
    if not chain.has("symmetry"):
        return "C1"
    (general,) = measured.read_block(chain.output("symmetry", "scores"), "symmetry_general")
    return str(general["rlnSymmetryGroup"])


def _seen(chain: Chain) -> dict[str, str]:
    """Groups that are in the first map, or nearly so, and the stages that make a map in each.

    Those are the largest one, and of the others the one that was found, or else is there best: a group that
    is nearly there may be the particle's, or have more operators than it.
    """
    from halfmap.ops.symmetry import order

    found = _surely_found(chain)
    nearly = dict[str, float]()
    if chain.has("symmetry"):
        rows = measured.read_block(chain.output("symmetry", "scores"), "symmetry_groups")
        there = [row for row in rows if _is_nearly_there(row)]
        nearly = {str(row["rlnSymmetryGroup"]): float(row["hmWeakestCorrelation"]) for row in there}
    groups = [each for each in nearly if order(each) > order(found)]
    groups += [found] if found != "C1" else []
    if not groups:
        return {}
    largest = max(groups, key=lambda each: (order(each), nearly.get(each, math.inf)))
    less = [each for each in groups if each != largest]
    if not less:
        return {largest: "symmetric"}
    best = max(less, key=lambda each: nearly.get(each, math.inf))
    return {largest: "symmetric", best: "less-symmetric"}


def _is_nearly_there(row: dict[str, Any]) -> bool:
    """Whether a group comes so near that particles should be asked.

    Without symmetry equal views are sorted apart by noise, and poses crowd in some of them: maps are less
    symmetric than their half maps agree. The less symmetric a particle is, the surer its images tell so.
    """
    null, spread = float(row["hmNullCorrelation"]), float(row["hmNullStd"])
    return row["hmVerdict"] == "nearly" and float(row["hmSearchCorrelation"]) > null + _ABOVE_NULL * spread


def _nearest(chain: Chain) -> str:
    """Which group came nearest to being found, in a clause."""
    if not chain.has("symmetry"):
        return ""
    scores = chain.output("symmetry", "scores")
    rows = measured.read_block(scores, "symmetry_groups")
    rows = [row for row in rows if math.isfinite(float(row["hmWeakestCorrelation"]))]
    if not rows:
        return ""
    nearest = max(rows, key=lambda row: float(row["hmWeakestCorrelation"]))
    (general,) = measured.read_block(scores, "symmetry_general")
    return (
        f": {nearest['rlnSymmetryGroup']} comes nearest, with a correlation of "
        f"{float(nearest['hmWeakestCorrelation']):.2f} where the noise leaves "
        f"{float(general['hmSignalCorrelation']):.2f}"
    )


def _is_round(chain: Chain) -> bool:
    """Whether particles are as round as those of T, O and I, and neither O nor I is surely in the first map.

    Views of such particles are all alike, and runs without symmetry agree in a shape that is none.
    """
    if chain.settings.symmetry or _surely_found(chain) in ("O", "I2"):
        return False
    return measured.roundness(chain.output("select", "averages"), chain.project.root) >= _ROUND


def _tried(chain: Chain) -> dict[str, str]:
    """Groups that there are to choose from, and the stages of their maps; none where there is no choice."""
    if chain.settings.symmetry:
        return {}
    groups = _seen(chain)
    if _is_round(chain):
        groups |= {group: f"round-{group}" for group in _ROUND_GROUPS if group not in groups}
    groups = {group: stage for group, stage in groups.items() if chain.has(stage)}
    return {"C1": "abinitio", **groups} if groups else {}


def _related(one: str, other: str) -> bool:
    """Whether one of two groups is part of the other."""
    return other in _parts(one) or one in _parts(other)


def _parts(group: str) -> set[str]:
    """Groups that have part of the operators of this one."""
    if group in _WITHIN:
        return _WITHIN[group]
    folds = int(group[1:])
    divisors = [n for n in range(2, folds + 1) if folds % n == 0]
    cyclic = {f"C{n}" for n in divisors}
    dihedral = {"C2"} | {f"D{n}" for n in divisors} if group[0] == "D" else set()
    return (cyclic | dihedral) - {group}


def _likeliest(chain: Chain) -> tuple[str, Decision]:
    """The group that surely makes particles likelier than no symmetry does, and than other groups.

    A map that is averaged over a group has less noise, and where data are few any group may do better than
    none: then others do as well. Of two groups of which one is part of the other, the likelier is taken.
    """
    trials = {group: f"{stage}-trial" for group, stage in _tried(chain).items()}
    tables = {group: chain.output(trial, "particles") for group, trial in trials.items() if chain.has(trial)}
    if "C1" not in tables or len(tables) == 1:
        seen = " and ".join(_seen(chain))
        why = f"no point group was found in the first map{_nearest(chain)}"
        if seen:
            why = f"{seen} seen in the first map could not be tried"
        return "C1", Decision("symmetry C1", why, _GROUP)

    from halfmap.ops.symmetry import order

    def gain(group: str, other: str) -> tuple[float, float]:
        folds = order(group) / order(other)
        if folds < 1:
            mean, error = gain(other, group)
            return -mean, error
        return measured.gain(tables[group], tables[other], folds=folds)

    def is_sure(group: str) -> bool:
        mean, error = measured.gain(tables[group])
        return mean > _SURE * error and all(is_ahead(group, other) for other in tables if other != group)

    def is_ahead(group: str, other: str) -> bool:
        mean, error = gain(group, other)
        return mean > (0.0 if _related(group, other) else _SURE * error)

    gains = {group: measured.gain(table)[0] for group, table in tables.items()}
    sure = [group for group in tables if group != "C1" and is_sure(group)]
    group = max(sure, key=lambda each: gains[each], default="C1")
    said = []
    for other in tables:
        if other != group:
            mean, error = gain(other, group)
            said.append(f"{mean:+.2f} ± {error:.2f} {'without' if other == 'C1' else f'in {other}'}")
    against = "no group makes particles surely likelier" if group == "C1" else "particles are likeliest in it"
    why = f"{against}, in maps that they had no share in: log-likelihood of each {', '.join(said)}"
    return group, Decision(f"symmetry {group}", why, _GROUP)


def resolution_of(chain: Chain, stage: str) -> float:
    """Resolution in Å of a stage's refinement."""
    return float(
        measured.read_block(chain.output(stage, "model"), "model_general")[0]["rlnCurrentResolution"]
    )
