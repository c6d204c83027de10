"""The graph of a project's jobs: how far each is, what it stands on, and why it no longer holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfmap.errors import HalfmapError
from halfmap.project import Job, Project
from halfmap.project.outcome import count, read_failures, shortened
from halfmap.workflow.record import Record, Stage, read_record

if TYPE_CHECKING:
    from rich.table import Table

_COLOURS = {"Succeeded": "green", "Failed": "red", "Aborted": "yellow", "Running": "cyan", "stale": "yellow"}


@dataclass(frozen=True)
class State:
    """How a job stands.

    Attributes
    ----------
    job : str
        Its folder in the project.
    step : str
        What it runs.
    stage : str
        Its stage of the chain; "" if it is in none.
    status : str
        As RELION says: Scheduled, Running, Succeeded, Failed or Aborted; or ``folder is gone``.
    parents : tuple of str
        Jobs whose files it reads.
    stale : tuple of str
        Why what it made no longer follows from its inputs; empty if it does.
    failures : int
        Items left out.
    is_replaced : bool
        Whether the chain has another job in its place, or needs none any more.
    """

    job: str
    step: str
    stage: str
    status: str
    parents: tuple[str, ...]
    stale: tuple[str, ...]
    failures: int
    is_replaced: bool = False


def states(project: Project) -> list[State]:
    """How the jobs of a project stand, in the order in which they were made.

    A job is stale where an input has changed since it was read, files have come that its patterns would take
    in, a job that it stands on is stale, or the chain has another job in its place.
    """
    pipeline, record = project.pipeline, read_record(project.root)
    makers = {node: name for name, node in pipeline.outputs}
    found: dict[str, State] = {}
    for process in pipeline.processes:
        mine = (makers[node] for node, name in pipeline.inputs if name == process.name and node in makers)
        parents = tuple(dict.fromkeys(mine))
        state = _state(project, process.name, process.label, process.status, parents, record)
        stale = [
            *state.stale,
            *(f"stands on {name}, which is stale" for name in parents if _is_stale(found, name)),
        ]
        found[process.name] = State(**{**vars(state), "stale": tuple(stale)})
    return list(found.values())


def _is_stale(found: dict[str, State], name: str) -> bool:
    return name in found and bool(found[name].stale)


def _state(
    project: Project, name: str, label: str, status: str, parents: tuple[str, ...], record: Record
) -> State:
    stage = next((each.name for each in record.stages if each.job == name), "")
    later = next((each for each in record.stages if name in each.replaced), None)
    step, stale, failures = label, list[str](), 0
    if not (project.root / name).exists():
        status = "folder is gone"
    elif (project.root / name / "job.json").exists():
        try:
            job = Job.load(project.root, name)
            step, status, failures = job.step.name, job.status, len(read_failures(job.folder))
            stale = _changes(job) if status == "Succeeded" else []
            stale += [_replaced(later)] if later else []
        except (HalfmapError, PermissionError) as error:
            stale = [str(error)]
    return State(name, step, stage, status, parents, tuple(stale), failures, later is not None)


def _replaced(stage: Stage) -> str:
    by = f"by {stage.job.rstrip('/')}" if stage.job else "and is not needed any more"
    return f"replaced {by} in the chain ({stage.name})"


def _changes(job: Job) -> list[str]:
    changed, new = job.changed_inputs()
    reasons = [f"changed since: {shortened(changed)}"] if changed else []
    if kept := job.provisional():
        _, few, many = min(kept, key=lambda one: one[1])
        reasons.append(f"provisional: decided from {few:,} of {many:,}")
    return reasons + ([f"{count(len(new), 'new file')}: {shortened(new)}"] if new else [])


def describe(project: Project) -> Table:
    """The states of a project's jobs as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Project {project.root}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    # Names of jobs say the step; more columns do not fit a terminal.
    for heading in ("job", "stage", "status"):
        table.add_column(heading, no_wrap=True)
    table.add_column("from", overflow="fold")
    table.add_column("why", overflow="fold")
    found = states(project)
    for state in found:
        word = "replaced" if state.is_replaced else "stale" if state.stale else state.status
        reasons = [*state.stale, *([f"{state.failures:,} left out"] if state.failures else [])]
        status = Text(word, style=_COLOURS.get(word, "white"))
        sources = " ".join(name.rstrip("/").rpartition("/")[2] for name in state.parents)
        table.add_row(state.job.rstrip("/"), state.stage, status, sources, "; ".join(reasons))
    table.caption, table.caption_justify = _advice(found), "left"
    return table


def _advice(found: Sequence[State]) -> str:
    if any(
        state.stage and (state.stale or state.status in ("Failed", "Aborted", "Scheduled")) for state in found
    ):
        return "`halfmap run` brings the chain up to date, and runs nothing else"
    stale = [state for state in found if state.stale and not state.is_replaced]
    if stale:
        return (
            f"`halfmap resume {stale[0].job.rstrip('/')}` takes new files in; what else is stale is run anew"
        )
    return ""
