"""A project in one screen: its jobs, their status, what they made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from halfmap.errors import HalfmapError, ProjectError
from halfmap.log import log
from halfmap.project.job import FAILURES_FILE, Job
from halfmap.project.project import Project

if TYPE_CHECKING:
    from rich.table import Table

_COLOURS = {"Succeeded": "green", "Failed": "red", "Aborted": "yellow", "Running": "cyan"}


def describe_project(path: Path) -> Table:
    """List the jobs of the project in the folder `path`, oldest first.

    Raises
    ------
    ProjectError
        If the folder is not a project.
    """
    from rich.table import Table

    project = Project.find(path)
    if project is None:
        raise ProjectError("is not a project", path=path, hint="a project has a default_pipeline.star")
    table = Table(title=f"Project {project.root}", title_justify="left", box=None, padding=(0, 2))
    for heading in ("job", "step", "status"):
        table.add_column(heading, no_wrap=True)
    table.add_column("made, and from what")
    pipeline = project.pipeline
    for process in pipeline.processes:
        step, status, left_out = process.label, process.status, 0
        if (project.root / process.name / "job.json").exists():
            try:
                job = Job.load(project.root, process.name)
                step, status = job.step.name, job.status
                left_out = _count_failures(job.folder)
            except HalfmapError as error:
                log.warning("%s", error)  # one job's record must not hide all others
        made = ", ".join(
            node.removeprefix(process.name) for name, node in pipeline.outputs if name == process.name
        )
        origin = ", ".join(node for node, name in pipeline.inputs if name == process.name)
        colour = _COLOURS.get(status, "white")
        table.add_row(
            process.name,
            step,
            f"[{colour}]{status}[/]" + (f"\n[red]{left_out} left out[/]" if left_out else ""),
            f"{made}\nfrom {origin}" if origin else made,
        )
    return table


def _count_failures(folder: Path) -> int:
    from halfmap.io.star import read_star

    path = folder / FAILURES_FILE
    return len(read_star(path)["failures"]) if path.exists() else 0
