"""The section of a job in a report: figures, decisions, pictures, what failed in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from halfmap.engine.progress import duration
from halfmap.log import log
from halfmap.markup import Content, Markup, element, facts, folded, joined, picture, table
from halfmap.steps.validate.report import list_findings, show_findings
from halfmap.workflow.record import Decision
from halfmap.workflow.report.graph import Grouping, Node
from halfmap.workflow.report.measures import facts_of
from halfmap.workflow.report.times import elapsed
from halfmap.workflow.report.titles import title

_PICTURE = "Image2D.png"
_EXAMPLES = 4
"""Micrographs shown with their picks."""

_SHOWN = 10
"""Failed items and warnings that are listed at most."""

_CAPTIONS = {
    "Simulate": "What was simulated.",
    "Import": "What was imported.",
    "Motion/summary.png": "Motion of each movie: median and spread of what was measured.",
    "Ctf/summary.png": "CTF of each micrograph.",
    "Curate/summary.png": "What micrographs are judged by; red is rejected.",
    "Curate/accepted.png": "Micrographs that are kept.",
    "Curate/rejected.png": "Micrographs that are rejected, and why.",
    "Pick/summary.png": "Scores of the candidates, and what of them is false.",
    "Extract/particles.png": "Particles as they were cut.",
    "Extract/summary.png": "What the particles' images are like.",
    "Class2D/classes.png": "Class averages, with particles and detail of each.",
    "Select/classes.png": "Class averages; those with a blue frame are kept.",
    "InitialModel/maps.png": "Slices and projections of the first map.",
    "InitialModel/runs.png": "To what resolution runs from different random poses agree.",
    "Class3D/classes.png": "Slices and projections of the classes.",
    "Refine/slices.png": "Central slices of the map; the line is the mask.",
    "Refine/fsc.png": "Fourier shell correlation of the half maps.",
    "Refine/angular_distribution.png": "Directions that the refinement gave the particles.",
    "Symmetry/symmetry.png": "Correlation of the map with itself under the operators of each group.",
    "Hand/hand.png": "How well right-handed and left-handed helices fit each place.",
    "PostProcess/slices.png": "Central slices of the maps; the line is the mask.",
    "PostProcess/fsc.png": "Fourier shell correlation of the half maps.",
    "PostProcess/guinier.png": "Guinier plot: amplitudes against resolution, with the line of the B-factor.",
    "LocalRes/slices.png": "Local resolution in central slices.",
    "progress.png": "Progress from iteration to iteration.",
}
"""By folder and file; by the file, or by the folder alone, for all others."""

_ASIDE = ("progress.png", "Extract/summary.png", "Pick/summary.png", "Curate/summary.png")
"""Pictures that are folded away."""

_SMALL = ("hand.png", "fsc.png", "guinier.png", "angular_distribution.png", "runs.png")
"""Pictures of which two go side by side."""

_FIRST = {"Refine": ("slices.png", "fsc.png"), "PostProcess": ("slices.png", "fsc.png")}


def section(
    node: Node, decisions: Sequence[Decision], *, before: Content = None, width: int, kept: str = ""
) -> Markup:
    """All that is told of a job.

    Parameters
    ----------
    node : Node
        The job.
    decisions : sequence of Decision
        That the chain made for it from the data.
    before
        What comes before its pictures, such as its map.
    width : int
        To which wider pictures are made smaller, px.
    kept : str
        What it has left, in words.
    """
    ended = "" if node.status == "Succeeded" else f", {node.status.lower()}"
    maker = "" if node.job else "made by another program"
    return element(
        "section",
        element("h2", title(node)),
        element("p", _under(node.name.rstrip("/") + ended, elapsed(node), maker), class_="quiet"),
        element("p", element("strong", kept)) if kept else None,
        facts(facts_of(node)),
        _decided(decisions),
        before,
        _findings(node, width),
        _pictures(node, width),
        _failed(node),
        _warned(node),
        id=node.anchor,
        class_={"Failed": "red", "Aborted": "amber"}.get(node.status),
    )


def _under(name: str, seconds: float | None, maker: str) -> str:
    took = "" if seconds is None else f"took {duration(seconds)}"
    return " · ".join(filter(None, (name, took, maker)))


def _decided(decisions: Sequence[Decision]) -> Markup | None:
    if not decisions:
        return None
    rows = [
        (decision.chosen, decision.why, element("code", decision.override) if decision.override else "")
        for decision in decisions
    ]
    return joined(element("h3", "Decided from the data"), table(("Choice", "Why", "To override"), rows))


def tell_grouping(node: Node, grouping: Grouping) -> Markup | None:
    """How the point group was decided on: with the search for one, else with the first refinement in it."""
    if node is not (grouping.search or grouping.refined):
        return None
    # A refinement has the decision in its own table.
    decision = grouping.decision if node is grouping.search else None
    tried = ", ".join(f"{_group_of(trial)} in {trial.name.rstrip('/')}" for trial in grouping.trials)
    said = f"Point groups tried by refining a sample of the particles a little: {tried}."
    return joined(
        element("p", "Decided in the end: ", element("strong", decision.chosen), f": {decision.why}.")
        if decision
        else None,
        element("p", said) if tried else None,
    )


def _group_of(trial: Node) -> str:
    return str(getattr(trial.job.step, "symmetry", "")) if trial.job else "a group"


def _findings(node: Node, width: int) -> Markup | None:
    """What a validation has found."""
    found = findings_of(node)
    if not found:
        return None
    every = folded(
        "Each finding with its pictures and figures", show_findings(found, node.folder, width=width)
    )
    return joined(list_findings(found), every)


def findings_of(node: Node) -> list[dict]:
    """The findings of a validation; none of any other job."""
    path = node.folder / "findings.json"
    if node.step != "validate" or not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["findings"]
    except (OSError, ValueError, KeyError):
        log.warning("%s: cannot be read, and is left out of the report", path)
        return []


def _pictures(node: Node, width: int) -> Markup:
    """Its pictures: what matters open, what is for those who look closer folded."""
    if node.step == "validate":
        return Markup()
    files = [file.removeprefix(node.name) for file, kind in node.outputs.items() if kind.startswith(_PICTURE)]
    if node.step == "curate":
        files = [*dict.fromkeys([*files, "rejected.png"])]
        files = [file for file in files if file != "rejected.png" or (node.folder / file).exists()]
    kind = node.name.split("/", maxsplit=1)[0]
    first = _FIRST.get(kind, ())
    files.sort(key=lambda file: first.index(file) if file in first else len(first))
    aside = [file for file in files if file in _ASIDE or f"{kind}/{file}" in _ASIDE]
    shown = [_picture(node, file, kind, width) for file in files if file not in aside]
    more = [_picture(node, file, kind, width) for file in aside]
    return joined(
        element("div", shown, class_="pictures") if shown else None,
        _examples(node, width),
        folded("More pictures", element("div", more, class_="pictures")) if more else None,
    )


def _picture(node: Node, file: str, kind: str, width: int) -> Markup:
    caption = _CAPTIONS.get(f"{kind}/{file}") or _CAPTIONS.get(file) or _CAPTIONS.get(kind)
    shown = picture(node.folder / file, caption or file, alt=f"{title(node)}: {file}", width=width)
    return element("div", shown, class_="small" if file in _SMALL else None)


def _examples(node: Node, width: int) -> Markup | None:
    """A few micrographs with their picks, from all over the list."""
    if node.label != "relion.autopick":
        return None
    found = sorted((node.folder / "Micrographs").glob("*.png"))
    if not found:
        return None
    step = max((len(found) - 1) / max(_EXAMPLES - 1, 1), 1.0)
    some = [found[round(i * step)] for i in range(min(_EXAMPLES, len(found)))]
    shown = [picture(path, None, alt=f"Picks in {path.stem}", width=width // 2) for path in some]
    head = f"{len(some)} of {len(found):,} micrographs with their picks"
    return joined(element("h3", head), element("div", shown, class_="tiles"))


def _failed(node: Node) -> Markup | None:
    if not node.failures:
        return None
    rows = [(Path(item).name, reason) for item, reason in node.failures[:_SHOWN]]
    more = len(node.failures) - _SHOWN
    rest = (
        element("p", f"and {more:,} more, in {node.name}failures.star", class_="quiet") if more > 0 else None
    )
    return joined(element("h3", f"{len(node.failures):,} failed"), table(("Item", "Why"), rows), rest)


def _warned(node: Node) -> Markup | None:
    if not node.warnings:
        return None
    texts = node.warnings[:_SHOWN]
    more = len(node.warnings) - _SHOWN
    return folded(
        f"{len(node.warnings):,} warning{'' if len(node.warnings) == 1 else 's'}",
        element("ul", [element("li", text) for text in texts]),
        element("p", f"and {more:,} more, in {node.name}run.err", class_="quiet") if more > 0 else None,
    )
