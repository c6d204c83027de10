"""The whole page of a report: what came out, what was lost on the way, each job, and how to repeat it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import halfmap
from halfmap.errors import HalfmapError, ParameterError, ProjectError
from halfmap.io.atomic import write_text
from halfmap.log import log
from halfmap.markup import LIGHTS, Markup, WIDTH_px, element, facts, joined, light
from halfmap.markup import page as page_of
from halfmap.project import Project
from halfmap.steps import load_steps
from halfmap.workflow.record import Record, read_record
from halfmap.workflow.report import funnel, viewer
from halfmap.workflow.report.funnel import Count, one_or_many
from halfmap.workflow.report.graph import (
    Grouping,
    Node,
    choose,
    find_job,
    grouping_of,
    leading_to,
    measured_of,
    read_nodes,
)
from halfmap.workflow.report.jobs import as_text, list_jobs, list_others
from halfmap.workflow.report.measures import half_map_resolution
from halfmap.workflow.report.sections import findings_of, section, tell_grouping
from halfmap.workflow.report.tables import model_file, read_pairs, resolution
from halfmap.workflow.report.titles import in_text, title

REPORT_FILE = "report.html"
"""In the project's folder, where no other name is given."""

_LARGEST_bytes = 15_000_000
_WIDTHS_px = (WIDTH_px, 1000, 700, 450, 250)
"""Of pictures; the first with which the page is not too large is taken."""

_MAPS = (
    ("relion.postprocess", "postprocess_masked.mrc", "The sharpened map within its mask."),
    ("halfmap.hand", "map.mrc", "The refined map."),
    ("relion.refine3d", "map.mrc", "The refined map."),
    ("relion.refine3d", "run_class001.mrc", "The refined map."),
    ("relion.class3d", "class001.mrc", "The first class."),
    ("relion.initialmodel", "class001.mrc", "The first map."),
    ("relion.initialmodel", "initial_model.mrc", "The first map."),
)
"""What is shown in 3D, the first that there is: type of job, file, caption."""


@dataclass(frozen=True)
class Story:
    """What a report tells.

    Parameters
    ----------
    root : Path
        Folder of the project.
    last : Node
        The job that it is of.
    nodes : list of Node
        That one, what it comes from, the search for its point group, and what was measured of the map, in the
        order in which they were made.
    others : list of Node
        All other jobs of the project but the trials of point groups.
    counts : list of Count
        What the jobs kept and lost.
    record : Record
        Of the chain, if it made the project.
    grouping : Grouping
        How the chain came to the point group.
    """

    root: Path
    last: Node
    nodes: list[Node]
    others: list[Node]
    counts: list[Count]
    record: Record
    grouping: Grouping


def write_report(project: Project, wanted: str | Path | None = None, output: Path | None = None) -> Path:
    """Write the report of a project, or of one of its jobs.

    Parameters
    ----------
    project : Project
        Made by the chain, by hand, or by RELION.
    wanted : str, optional
        The job that the report ends with; default: the last finished validation, else post-processing, else
        refinement, else whatever job was last.
    output : path, optional
        Of the page; default: `REPORT_FILE` in the project's folder.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ProjectError
        If the project has no job, or not the one wanted.
    ParameterError
        If the page is to replace a folder, or lies in none.
    """
    path = output or project.root / REPORT_FILE
    if path.is_dir() or not path.parent.is_dir():
        hint = f"name a file, such as {REPORT_FILE}, in a folder that is there"
        raise ParameterError("no page can be written here", path=path, hint=hint)
    story = read_story(project, wanted)
    text = ""
    for width in _WIDTHS_px:
        text = tell(story, width=width)
        if len(text.encode()) <= _LARGEST_bytes:
            break
    write_text(path, text)
    log.info("report of %s: %s, %.1f MB", story.last.name, path, len(text.encode()) / 1e6)
    return path


def read_story(project: Project, wanted: str | Path | None = None) -> Story:
    """Read what a report tells; parameters and errors as of `write_report`."""
    load_steps()
    nodes = read_nodes(project)
    try:
        record = read_record(project.root)
    except HalfmapError as error:
        log.warning("left out of the report: %s", error)
        record = Record()
    if wanted is None:
        old = {job for stage in record.stages for job in stage.replaced}
        last = choose({name: node for name, node in nodes.items() if name not in old} or nodes)
    else:
        found = find_job(nodes, str(wanted))
        if found is None:
            hint = "see them with: halfmap info PROJECT"
            raise ProjectError(f"has no job {wanted}", path=project.root, hint=hint)
        last = found
    told = leading_to(nodes, last)
    grouping = grouping_of(nodes, told, record)
    told += measured_of(nodes, told)
    if grouping.search is not None and grouping.search not in told:
        told.append(grouping.search)
    told.sort(key=lambda node: node.number)
    names = {node.name for node in (*told, *grouping.trials)}
    others = [node for node in nodes.values() if node.name not in names]
    return Story(project.root, last, told, others, funnel.count_all(told), record, grouping)


def tell(story: Story, *, width: int = WIDTH_px) -> str:
    """The report as HTML, with pictures no wider than `width` pixels."""
    name = story.root.resolve().name
    kept = {count.node.name: count for count in story.counts}
    shown = _map_of(story.nodes)
    sections = [
        section(
            node,
            story.record.decisions(node.name),
            before=joined(
                tell_grouping(node, story.grouping), shown[1] if shown and node is shown[0] else None
            ),
            width=width,
            kept=_kept(kept.get(node.name)),
        )
        for node in story.nodes
    ]
    about = f"Halfmap {halfmap.__version__}, {time.strftime('%Y-%m-%d %H:%M')}. Project folder: {story.root}"
    others = list_others(story.others)
    return page_of(
        f"{name}: report",
        element("h1", name),
        element("p", f"How {story.last.name.rstrip('/')} ({in_text(story.last)}) came about."),
        element("p", about, class_="quiet"),
        _headline(story),
        _stopped(story),
        _contents(story, shown[0] if shown else None, others=others is not None),
        element(
            "section",
            element("h2", "What was kept and what was lost"),
            funnel.draw(story.counts),
            id="counts",
        )
        if story.counts
        else None,
        sections,
        element(
            "section",
            element("h2", "How to repeat it"),
            _options(story.record),
            list_jobs(story.nodes),
            id="jobs",
        ),
        element("section", element("h2", "Other jobs of the project"), others, id="others")
        if others
        else None,
        style=viewer.resource("report.css") + viewer.resource("viewer.css"),
        script=viewer.resource("viewer.js") if shown else "",
    )


def _kept(count: Count | None) -> str:
    if count is None:
        return ""
    text = f"{count.kept:,} {one_or_many(count.kept, count.unit)}"
    return text if count.given == count.kept else f"{text} of {count.given:,}"


def _map_of(nodes: Sequence[Node]) -> tuple[Node, Markup] | None:
    """The last map, to be turned, and the job that it is of."""
    for label, file, caption in _MAPS:
        for node in reversed(nodes):
            path = node.folder / file
            if node.label.startswith(label) and node.status == "Succeeded" and path.is_file():
                seen = viewer.view(path, f"{caption} {node.name}{file}.")
                if seen:
                    return node, seen
    return None


def _headline(story: Story) -> Markup | None:
    """The figures that are asked for first."""
    tiles: list[tuple[str, str, str]] = []
    found = _resolution(story.nodes)
    if found:
        tiles.append(("Resolution", *found))
    for unit in ("particles", "micrographs"):
        last = next((count for count in reversed(story.counts) if count.unit == unit), None)
        if last:
            tiles.append((unit.capitalize(), f"{last.kept:,}", f"after {in_text(last.node)}"))
    general = _model(story.nodes)
    if "rlnSymmetryGroup" in general:
        tiles.append(("Symmetry", str(general["rlnSymmetryGroup"]), "of the map"))
    if "rlnPixelSize" in general:
        box = general.get("rlnOriginalImageSize")
        tiles.append(("Voxel", f"{general['rlnPixelSize']:.4g} Å", f"in a box of {box} px" if box else ""))
    colours = Counter(one["light"] for node in story.nodes for one in findings_of(node))
    lights = [
        element("span", light(colour), f"{colours[colour]}", class_="count")
        for colour in LIGHTS
        if colours[colour]
    ]
    if not tiles and not lights:
        return None
    drawn = [
        element("div", element("span", name), element("strong", value), element("span", about))
        for name, value, about in tiles
    ]
    if lights:
        checks = element("strong", lights)
        drawn.append(element("div", element("span", "Checks"), checks, element("span", "of the map")))
    return element("div", drawn, class_="headline")


def _resolution(nodes: Sequence[Node]) -> tuple[str, str] | None:
    """The resolution and its interval, as they were measured best."""
    for node in reversed(nodes):
        found = half_map_resolution(node) if node.label.startswith("relion.postprocess") else None
        if found:
            return found[0], found[1] or "FSC = 0.143"
    for node in reversed(nodes):
        for finding in findings_of(node):
            values = finding["values"]
            if values.get("resolution_A") and values.get("interval_95_A"):
                fine, coarse = map(resolution, values["interval_95_A"])
                return resolution(values["resolution_A"]), f"{fine} to {coarse} at 95 %"
    general = _model(nodes)
    if "rlnCurrentResolution" in general:
        return resolution(float(general["rlnCurrentResolution"])), "FSC = 0.143"
    return None


def _model(nodes: Sequence[Node]) -> Mapping:
    """What the last refinement says of its map."""
    refined = [node for node in nodes if node.label.startswith("relion.refine3d")]
    return read_pairs(model_file(refined[-1].folder), "model_general") if refined else {}


def _stopped(story: Story) -> Markup | None:
    """What keeps the project from a validated map, if anything does."""
    last = story.last
    lost = next((count for count in story.counts if not count.kept), None)
    if last.status != "Succeeded":
        how = {"Failed": "has failed", "Aborted": "was interrupted", "Running": "is running"}
        text = f"{last.name.rstrip('/')} ({last.step}) {how.get(last.status, last.status.lower())}"
        text += f": {last.error}" if last.error else "."
        parts = [element("p", text)]
        if last.job and last.status in ("Failed", "Aborted"):
            parts.append(
                element("p", "To go on: ", element("code", f"halfmap resume {last.name.rstrip('/')}"))
            )
        colour = {"Failed": "red", "Running": "grey"}.get(last.status, "amber")
        return _notice(colour, "How far it is" if last.status == "Running" else "Where it stopped", parts)
    if lost:
        text = f"{lost.node.name.rstrip('/')} ({in_text(lost.node)}) leaves no {lost.unit}."
        return _notice("red", "Where it stopped", [element("p", text)])
    later = [
        node for node in story.others if node.number > last.number and node.status in ("Failed", "Aborted")
    ]
    if later:
        text = f"Later jobs did not end well: {_named(later)}. See the end of this page."
        return _notice("amber", "Since then", [element("p", text)])
    if not any(node.label.startswith("relion.refine3d") for node in story.nodes):
        text = f"The project has come to {in_text(last)} so far; no map has been refined of it."
        return _notice("grey", "How far it is", [element("p", text)])
    return None


def _named(nodes: Iterable[Node]) -> str:
    return ", ".join(
        f"{node.name.rstrip('/')} {node.status.lower()}" + (f" ({node.error})" if node.error else "")
        for node in nodes
    )


def _notice(colour: str, head: str, parts: list[Markup]) -> Markup:
    return element("section", element("h2", light(colour), head), parts, class_=colour, id="stopped")


def _contents(story: Story, with_map: Node | None, *, others: bool) -> Markup:
    """Links to the parts of the page."""
    links = [("counts", "Counts")] if story.counts else []
    times = Counter(title(node) for node in story.nodes)
    for node in story.nodes:
        name = title(node) if times[title(node)] == 1 else f"{title(node)} ({node.number})"
        links.append((node.anchor, f"{name}, in 3D" if node is with_map else name))
    links.append(("jobs", "How to repeat it"))
    links += [("others", "Other jobs")] if others else []
    return element("nav", [element("a", name, href=f"#{anchor}") for anchor, name in links])


def _options(record: Record) -> Markup | None:
    """What the chain was given and which of its stages it left out, if it made the project."""
    rows = [
        (element("code", f"--{name.replace('_', '-')}"), as_text(value))
        for name, value in record.options.items()
        if value is not None
    ]
    given = joined(element("p", "The chain ", element("code", "halfmap run"), " was given:"), facts(rows))
    left_out = [
        element("li", f"{stage.name}: ", str(decision))
        for stage in record.stages
        if not stage.job
        for decision in stage.decisions
    ]
    because = joined(element("p", "It left out:"), element("ul", left_out))
    return joined(given if rows else None, because if left_out else None)
