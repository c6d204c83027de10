"""How many movies, micrographs and particles each job was given, kept and lost, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from halfmap.engine.ledger import Ledger
from halfmap.errors import HalfmapError
from halfmap.io.coordinates import read_coordinates
from halfmap.markup import Content, Markup, element, joined
from halfmap.workflow.report.graph import Node
from halfmap.workflow.report.tables import read_block, read_set
from halfmap.workflow.report.titles import title

if TYPE_CHECKING:
    import polars as pl

_UNITS = {
    "ParticleGroupMetadata": "particles",
    "MicrographCoords": "picks",
    "MicrographMovieGroupMetadata": "movies",
    "MicrographGroupMetadata": "micrographs",
}
"""What a file of a type lists, by the beginning of RELION's word for it; what a job is about comes first."""

_PARTICLES = ("picks", "particles")

_ASIDE = (".rejected", ".truth")
"""Ends of types that list something else than what goes on."""

_LEFT_OUT = {
    "defocus": "without a defocus",
    "outside": "outside their micrograph",
    "edge": "too near to the edge",
    "masked": "in masked areas",
    "duplicate": "close to a better one",
    "blank": "where the micrograph is blank",
    "broken": "with pixels that are not numbers",
    "overflow": "beyond the range of half precision",
}
"""Why particles are not extracted, by the word in the job's ledger."""

_ALL_GO_ON = ("hand",)
"""Steps that leave out nothing of what they write again."""

_FIGURES = re.compile(r" \S+ (below|above) .*")
"""What follows the quantity in the reason for which a micrograph is rejected."""


@dataclass(frozen=True)
class Count:
    """What a job made of what it was given.

    Parameters
    ----------
    node : Node
        The job.
    unit : str
        ``movies``, ``micrographs``, ``picks`` or ``particles``.
    kept : int
        How many there are after it.
    lost : tuple of (str, int)
        Reasons, and how many went for each.
    """

    node: Node
    unit: str
    kept: int
    lost: tuple[tuple[str, int], ...] = ()

    @property
    def given(self) -> int:
        """How many there were before."""
        return self.kept + sum(number for _, number in self.lost)


def count_all(nodes: Sequence[Node]) -> list[Count]:
    """Counts of the jobs that make tables of movies, micrographs, picks or particles.

    Parameters
    ----------
    nodes : sequence of Node
        In the order in which they were made.

    Notes
    -----
    What is kept are the rows of the job's tables. What is lost is known from the tables of what failed and
    was rejected and from the ledger; whatever of the job's input is in none of them is said to be left out
    otherwise, so that the numbers of a job add up.
    """
    made: dict[str, tuple[str, int]] = {}
    counts: list[Count] = []
    for node in nodes:
        files = {file: found for file, kind in node.outputs.items() if (found := _listed(node, file, kind))}
        made |= files
        found = None if node.step in _ALL_GO_ON else _of(node, files, made, nodes)
        if found:
            counts.append(found)
    return counts


def _listed(node: Node, file: str, kind: str) -> tuple[str, int] | None:
    """What a file lists, and how many."""
    unit = next((unit for start, unit in _UNITS.items() if kind.startswith(start)), None)
    if unit is None or kind.endswith(_ASIDE):
        return None
    path = node.root / file
    number = _picks(path, node.root) if unit == "picks" else _rows(path, unit)
    return None if number is None else (unit, number)


def _rows(path: Path, unit: str) -> int | None:
    table = read_set(path, unit)
    return None if table is None else table.rows.height


def _picks(path: Path, root: Path) -> int | None:
    table = read_block(path, "coordinate_files")
    if table is None:
        return None
    if "hmPicks" in table.columns:
        return int(table["hmPicks"].sum())
    if "rlnMicrographCoordinates" not in table.columns:
        return None
    try:
        return sum(len(read_coordinates(root / file)) for file in table["rlnMicrographCoordinates"])
    except (HalfmapError, OSError):
        return None  # of a format that only its picker knows


def _of(
    node: Node,
    files: Mapping[str, tuple[str, int]],
    made: Mapping[str, tuple[str, int]],
    nodes: Sequence[Node],
) -> Count | None:
    rejected = read_set(node.folder / "micrographs_rejected.star", "micrographs")
    if not files and rejected is not None:
        files = {"": ("micrographs", 0)}  # the table of those kept is not written where none is
    units = [unit for unit, _ in files.values()]
    unit = next((unit for unit in _UNITS.values() if unit in units), None)
    if unit is None:
        return None
    kept = sum(number for each, number in files.values() if each == unit)
    given = _given(node, unit, made, nodes)
    lost = Counter[str]()
    if rejected is not None:
        lost += _why_rejected(rejected.rows)
    if unit in ("movies", "micrographs"):
        failed = len({item for item, _ in node.failures})
        lost["failed"] = min(failed, max(given - kept - lost.total(), 0)) if given else failed
    if unit == "particles":
        lost += _left_out(node) + _unselected(node, kept)
    rest = given - kept - lost.total()
    if rest > 0:
        lost["left out otherwise"] += rest
    return Count(node, unit, kept, tuple((reason, n) for reason, n in lost.most_common() if n))


def _given(node: Node, unit: str, made: Mapping[str, tuple[str, int]], nodes: Sequence[Node]) -> int:
    """How many of the kind the job was given, or 0 if it began with none."""
    before = {"micrographs": ("micrographs", "movies"), "particles": ("picks", "particles")}
    units = before.get(unit, (unit,))
    found = [made[file] for file in node.inputs if file in made]
    # A classification is handed on by its model; its particles lie beside it.
    parents = set(node.parents()) if not found else set()
    for parent in nodes:
        if parent.name in parents:
            found += [made[file] for file in parent.outputs if file in made]
    for wanted in units:
        numbers = [number for each, number in found if each == wanted]
        if numbers:
            return max(numbers)
    return 0


def _why_rejected(rows: pl.DataFrame) -> Counter[str]:
    """Micrographs by the quantities for which they are rejected."""
    if "hmReason" not in rows.columns:
        return Counter({"rejected": rows.height})
    reasons = (str(text).split("; ") for text in rows["hmReason"])
    return Counter(" and ".join(_FIGURES.sub("", reason) for reason in own) for own in reasons)


def _left_out(node: Node) -> Counter[str]:
    """Particles that were not extracted, by reason."""
    found = Counter[str]()
    if node.step == "extract":
        for result in Ledger(node.folder / "items.jsonl").done("micrograph").values():
            for reason, number in result["left_out"].items():
                found[_LEFT_OUT.get(str(reason), str(reason))] += number
    return found


def _unselected(node: Node, kept: int) -> Counter[str]:
    """Particles that a selection rejects: those of rejected classes, and others."""
    table = read_set(node.folder / "rejected.star", "particles") if node.step == "select" else None
    if table is None or not kept:
        return Counter()
    if "hmReason" not in table.rows.columns:
        return Counter({"rejected": table.rows.height})
    return Counter(
        "in rejected classes" if str(reason).startswith("class ") else f"in kept classes, {reason}"
        for reason in table.rows["hmReason"]
    )


def draw(counts: Sequence[Count]) -> Markup:
    """The counts as a table with bars, micrographs and particles each to a scale of their own."""
    largest = Counter[bool]()
    for count in counts:
        of_particles = count.unit in _PARTICLES
        largest[of_particles] = max(largest[of_particles], count.given)
    return element(
        "div", [_line(count, largest[count.unit in _PARTICLES]) for count in counts], class_="funnel"
    )


def _line(count: Count, largest: int) -> Markup:
    def bar(number: int, class_: str) -> Markup | None:
        if not number:
            return None
        width = f"width:{100 * number / max(largest, 1):.2f}%"
        return element("span", class_=class_, style=width)

    lost = count.given - count.kept
    why: Content = None
    if lost:
        reasons = "; ".join(f"{number:,} {reason}" for reason, number in count.lost)
        reasons = count.lost[0][0] if len(count.lost) == 1 else reasons
        why = element("div", f"{lost:,} lost: {reasons}", class_="quiet")
    name = element("a", title(count.node), href=f"#{count.node.anchor}")
    return element(
        "div",
        element("div", name, element("div", count.node.name.rstrip("/"), class_="quiet"), class_="stage"),
        element(
            "div",
            joined(element("b", f"{count.kept:,}"), f" {one_or_many(count.kept, count.unit)}"),
            element("div", bar(count.kept, "kept"), bar(lost, "lost"), class_="bar", aria_hidden="true"),
            why,
        ),
    )


def one_or_many(number: int, plural: str) -> str:
    """The word for what is counted: particle, particles."""
    return plural.removesuffix("s") if number == 1 else plural
