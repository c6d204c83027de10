"""A project or a job in one screen: jobs, their status, what they made."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from halfmap.engine.progress import duration
from halfmap.errors import HalfmapError, ProjectError
from halfmap.log import log
from halfmap.project.hints import job_around
from halfmap.project.job import Job
from halfmap.project.messages import WARNINGS_FILE, read_error, read_warnings
from halfmap.project.outcome import FAILURES_FILE, SHOWN, count, read_failures
from halfmap.project.project import Project

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_COLOURS = {"Succeeded": "green", "Failed": "red", "Aborted": "yellow", "Running": "cyan"}


def describe_folder(path: Path) -> Table | Group:
    """Describe the job that the folder `path` is or lies in, or else the project.

    Raises
    ------
    ProjectError
        If the folder lies in neither.
    """
    folder = job_around(path)
    project = None if folder is None else Project.find(folder)
    return describe_project(path) if project is None or folder is None else describe_job(project.job(folder))


def describe_job(job: Job) -> Group:
    """Show a job's state, parameters, finished items, outputs and failures."""
    from rich.console import Group
    from rich.text import Text

    from halfmap.io.info import facts, warning

    step = job.step
    given = [p for p in step.parameters() if getattr(step, p.name) != p.default]
    rest = sum(1 for _ in step.parameters()) - len(given)
    values = step.model_dump(mode="json")
    status = Text(job.status, style=_COLOURS.get(job.status, "white"))
    rows: list[tuple[str, object]] = [("status", status), ("project", job.root)]
    for parameter in given:
        unit = "" if parameter.unit == "none" else f" {parameter.unit}"
        value = values[parameter.name]
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        rows.append((parameter.option, text + unit))
    rows.append(("", f"{rest} other parameters at their defaults"))
    rows += _progress(job)
    rows += [(name, f"{job.name}{path.name}") for name, path in job.outputs.items()]
    failures, warnings = read_failures(job.folder), read_warnings(job.folder)
    if failures:
        rows.append(("failures", warning(f"{len(failures):,} left out, named in {job.name}{FAILURES_FILE}")))
        rows += [(f"  {key}", reason) for key, reason in failures[:SHOWN]]
        rows.append(("", "once mended or replaced, resuming does only what is missing"))
    if warnings:
        rows.append(("warnings", warning(f"{len(warnings):,} given, in {job.name}{WARNINGS_FILE}")))
        rows += [("", text) for text in warnings[:SHOWN]]
    if job.status == "Failed" and (error := read_error(job.folder)):
        rows.append(("error", warning(error)))
    if job.status in ("Failed", "Aborted") or failures:
        rows.append(("go on with", job.resume_command))
    return Group(Text.assemble((job.name, "bold"), f"  {step.name}"), "", facts(rows))


def _progress(job: Job) -> list[tuple[str, str]]:
    """The last round that is over, items done of each loop since, from their last events, and time left."""
    path = job.folder / "events.jsonl"
    round_done, left, last = "", 0.0, dict[str, str]()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # cut short by a kill
        if event["event"] == "round":
            of = "" if event["total"] is None else f" of {event['total']:,}"
            round_done = f"{event['unit']} {event['done']:,}{of}: {event['said']}"
            left = event.get("left_s", 0) + event["time"] - time.time()
            last.clear()
            continue
        failed = event.get("failed", 0)
        text = f"{event['done'] - failed:,} of {count(event['total'], event['unit'])}"
        last[event["unit"]] = f"{text}, {failed:,} failed" if failed else text
    label = "since then" if round_done else "done"
    rows = [("done", round_done)] if round_done else []
    rows += [(label, text) for text in last.values()]
    return [*rows, ("left", f"about {duration(left)}")] if left > 0 and job.status == "Running" else rows


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
    table = Table(title=f"Project {project.root}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("job", "step", "status"):
        table.add_column(heading, no_wrap=True)
    table.add_column("made, and from what", overflow="fold")
    pipeline = project.pipeline
    for process in pipeline.processes:
        step, status, left_out = process.label, process.status, 0
        try:
            if not (project.root / process.name).exists():
                status = "folder is gone"
            elif (project.root / process.name / "job.json").exists():
                job = Job.load(project.root, process.name)
                step, status = job.step.name, job.status
                left_out = len(read_failures(job.folder))
        except (HalfmapError, PermissionError) as error:
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
