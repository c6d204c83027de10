"""Which jobs a report is of: those that a result comes from, whoever made them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from halfmap.errors import HalfmapError, ProjectError
from halfmap.io.names import without_dots
from halfmap.log import log
from halfmap.project import Project
from halfmap.project.job import Job
from halfmap.project.messages import read_error, read_warnings
from halfmap.project.outcome import read_failures
from halfmap.project.pipeline import Pipeline, Process
from halfmap.workflow.record import Decision, Record
from halfmap.workflow.report.tables import read_pairs

RESULTS = ("halfmap.validate", "relion.postprocess", "relion.refine3d")
"""Types of the jobs that a report is of by default, the first that there is."""

_HAND = "halfmap.hand"

_MEASURES = (_HAND, "relion.postprocess", "relion.localres", "halfmap.validate", "halfmap.fit")
"""Types of the jobs that look at a refined map."""

_SEARCH, _REFINED = "symmetry", "first-refine"
"""Stages of the chain that look for a point group in the first map, and that begin with what was decided."""

_TRIAL, _DECIDED = "-trial", "symmetry "
"""Ends of stages that refine a sample in one point group; how the decision between them begins."""

GONE = "Folder gone"


@dataclass(frozen=True)
class Node:
    """A job in the graph of a project, made by Halfmap or by RELION.

    Parameters
    ----------
    root : Path
        Folder of the project.
    name : str
        Folder of the job in it, such as ``Refine/job011/``.
    label : str
        Type of the job in RELION's words, such as ``relion.refine3d``.
    status : str
        In RELION's words, or `GONE`.
    inputs : tuple of str
        Files of other jobs that it read.
    outputs : dict of str to str
        Files that it wrote, with their types.
    job : Job or None
        If it is one of Halfmap's.
    """

    root: Path
    name: str
    label: str
    status: str
    inputs: tuple[str, ...]
    outputs: Mapping[str, str]
    job: Job | None

    @property
    def folder(self) -> Path:
        """Folder of the job."""
        return self.root / self.name

    @property
    def number(self) -> int:
        """Of the job, by which jobs are in the order in which they were made."""
        digits = self.name.rstrip("/").rsplit("job", 1)[-1]
        return int(digits) if digits.isdigit() else 0

    @property
    def anchor(self) -> str:
        """Name of its section in the page."""
        return f"job{self.number:03d}"

    @property
    def step(self) -> str:
        """Name of its step, or the type of a job that is not Halfmap's."""
        return self.label if self.job is None else self.job.step.name

    @cached_property
    def record(self) -> dict[str, Any]:
        """What ``job.json`` holds; nothing for a job of RELION's."""
        try:
            return json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    @cached_property
    def failures(self) -> list[tuple[str, str]]:
        """Items that failed, and why."""
        try:
            return read_failures(self.folder)
        except (HalfmapError, KeyError, OSError):
            return []

    @cached_property
    def warnings(self) -> list[str]:
        """What the job has warned of."""
        with suppress(OSError):
            return read_warnings(self.folder) if self.job else []
        return []

    @cached_property
    def error(self) -> str | None:
        """What it ended with, if it failed."""
        with suppress(OSError):
            return read_error(self.folder) if self.job and self.status == "Failed" else None
        return None

    def parents(self) -> Iterator[str]:
        """Folders of the jobs that made its inputs."""
        named = [path.as_posix() for path in self.job.step.inputs()] if self.job else []
        for file in (*self.inputs, *named):
            parts = file.split("/")
            if len(parts) > 2 and file not in self.outputs:
                yield f"{parts[0]}/{parts[1]}/"


def read_nodes(project: Project) -> dict[str, Node]:
    """Every job of a project by its folder, in the order in which they were made.

    Raises
    ------
    FileFormatError
        If its pipeline file cannot be read.
    """
    pipeline = project.pipeline
    nodes = [_node(project.root, pipeline, process) for process in pipeline.processes]
    return {node.name: node for node in sorted(nodes, key=lambda node: node.number)}


def _node(root: Path, pipeline: Pipeline, process: Process) -> Node:
    job, status = None, process.status
    if not (root / process.name).exists():
        status = GONE
    elif (root / process.name / "job.json").exists():
        try:
            job = Job.load(root, process.name)
            status = job.status
        except (HalfmapError, OSError) as error:
            log.warning("%s", error)  # one job's record must not hide all others
    return Node(
        root=root,
        name=process.name,
        label=process.label,
        status=status,
        inputs=tuple(file for file, name in pipeline.inputs if name == process.name),
        outputs={
            file: pipeline.nodes.get(file, "") for name, file in pipeline.outputs if name == process.name
        },
        job=job,
    )


def choose(nodes: Mapping[str, Node]) -> Node:
    """The job that a report is of by default.

    It is the last finished validation, else the last finished post-processing, else the last finished
    refinement, else whatever was last.

    Raises
    ------
    ProjectError
        If there is no job.
    """
    for label in RESULTS:
        for node in reversed(list(nodes.values())):
            if node.status == "Succeeded" and node.label.startswith(label):
                return node
    if not nodes:
        raise ProjectError("the project has no job to report of", hint="begin with halfmap import")
    return list(nodes.values())[-1]


def find_job(nodes: Mapping[str, Node], wanted: str) -> Node | None:
    """The job called ``Refine/job011``, ``job011`` or ``11``, or in whose folder a path leads."""
    wanted = wanted.rstrip("/")
    place = without_dots(wanted)
    if wanted.isdigit():
        wanted = f"job{int(wanted):03d}"
    for node in nodes.values():
        if wanted in (node.name.rstrip("/"), node.folder.name):
            return node
        folder = without_dots(node.folder)
        if place == folder or folder in place.parents:
            return node
    return None


def leading_to(nodes: Mapping[str, Node], last: Node) -> list[Node]:
    """The job `last` and all that it comes from, in the order in which they were made."""
    found: dict[str, Node] = {}
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node.name not in found:
            found[node.name] = node
            waiting += [nodes[name] for name in node.parents() if name in nodes]
    return [node for node in nodes.values() if node.name in found]


def measured_of(nodes: Mapping[str, Node], told: Sequence[Node]) -> list[Node]:
    """The last finished job of each kind that looks at the last refined map among those `told` of."""
    refined = [node for node in told if node.label.startswith("relion.refine3d")]
    known = {node.label for node in told}
    of_map = {refined[-1].name} if refined else set[str]()
    turned = [node for node in told if node.label == _HAND]
    if turned and _mirrored(turned[-1]):
        of_map = {turned[-1].name}
    else:
        of_map |= {node.name for node in turned}
    found: list[Node] = []
    for label in _MEASURES:
        for node in reversed(list(nodes.values())):
            looks = node.label == label and node.status == "Succeeded" and of_map & set(node.parents())
            if looks and label not in known:
                found.append(node)
                # What is of the maps that it was given is of the other hand.
                of_map = {node.name} if _mirrored(node) else of_map | {node.name}
                break
    return found


@dataclass(frozen=True)
class Grouping:
    """How the chain came to the point group of what it refined.

    Parameters
    ----------
    search : Node or None
        The job that looked for one in the first map.
    trials : tuple of Node
        Refinements of a sample of the particles, in one group each.
    refined : Node or None
        The first refinement in the group that was decided for.
    decision : Decision or None
        Which group, and why.
    """

    search: Node | None = None
    trials: tuple[Node, ...] = ()
    refined: Node | None = None
    decision: Decision | None = None


def grouping_of(nodes: Mapping[str, Node], told: Sequence[Node], record: Record) -> Grouping:
    """How the chain came to the point group, if the jobs `told` of come after its search for one.

    No map descends from that search: where it finds a group the first map is made anew, and else goes on as
    it is.
    """
    names = {node.name for node in told}
    stages = {stage.name: stage for stage in record.stages}
    order = list(stages)
    begin = order.index(_SEARCH) + 1 if _SEARCH in stages else 0
    after = any(stages[name].job in names for name in order[begin:]) if begin else False
    search = nodes.get(stages[_SEARCH].job) if after else None
    first = stages.get(_REFINED)
    if first is None or first.job not in names:
        return Grouping(search)
    decision = next((one for one in first.decisions if one.chosen.startswith(_DECIDED)), None)
    jobs = [stage.job for name, stage in stages.items() if name.endswith(_TRIAL)]
    trials = tuple(nodes[job] for job in jobs if job in nodes and nodes[job].status == "Succeeded")
    return Grouping(search, trials, nodes[first.job], decision)


def _mirrored(node: Node) -> bool:
    """Whether a job has written the mirror image of the map that it was given."""
    return node.label == _HAND and bool(read_pairs(node.folder / "hand.star", "hand").get("hmMirrored", 0))
