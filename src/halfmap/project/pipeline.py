"""The project's graph, ``default_pipeline.star``, as RELION 4 and 5 write it."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from halfmap.errors import FileFormatError, ProjectError, ResourceError
from halfmap.io.atomic import remove_temporaries, writing

PIPELINE_FILE = "default_pipeline.star"
_LOCK_FILE = ".halfmap_lock"
_PATIENCE_s = 60.0
_UNMARKED_s = 5.0


@dataclass
class Process:
    """A job in the graph: ``Import/job001/``, its alias, job type and status in RELION's words."""

    name: str
    label: str
    status: str
    alias: str = "None"


@dataclass
class Pipeline:
    """The whole graph: jobs, files with their types, and the edges between them."""

    counter: int = 1
    processes: list[Process] = field(default_factory=list)
    nodes: dict[str, str] = field(default_factory=dict)
    inputs: list[tuple[str, str]] = field(default_factory=list)
    outputs: list[tuple[str, str]] = field(default_factory=list)

    def set_status(self, name: str, status: str) -> None:
        """Set the status of the job called `name`."""
        for process in self.processes:
            if process.name == name:
                process.status = status

    def remove(self, name: str) -> None:
        """Take a job out, with the files that it has written."""
        written = {node for job, node in self.outputs if job == name}
        self.processes = [process for process in self.processes if process.name != name]
        self.outputs = [edge for edge in self.outputs if edge[0] != name]
        self.inputs = [edge for edge in self.inputs if edge[1] != name and edge[0] not in written]
        self.nodes = {node: kind for node, kind in self.nodes.items() if node not in written}

    def connect(self, name: str, inputs: list[str], outputs: dict[str, str]) -> None:
        """Record a job's edges: files it read that other jobs wrote, and files it wrote with their types."""
        self.inputs += [
            (node, name) for node in inputs if node in self.nodes and (node, name) not in self.inputs
        ]
        self.nodes.update(outputs)
        self.outputs += [(name, node) for node in outputs if (name, node) not in self.outputs]


def read_pipeline(path: Path) -> Pipeline:
    """Read a pipeline file.

    Raises
    ------
    FileFormatError
        If it is not one that RELION 4 or later, or Halfmap, wrote.
    """
    import polars as pl

    from halfmap.io.star import read_star

    blocks = read_star(path)

    def rows(block: str, *labels: str) -> list[tuple[str, ...]]:
        table = blocks.get(block)
        if not isinstance(table, pl.DataFrame):
            return []
        missing = [label for label in labels if label not in table.columns]
        if missing:
            raise FileFormatError(
                f"its table {block} has no column {missing[0]}",
                path=path,
                hint="projects of RELION 3 are converted by opening them once in RELION 4 or later",
            )
        return [tuple(str(value) for value in row) for row in table.select(labels).iter_rows()]

    general = blocks.get("pipeline_general")
    if not isinstance(general, dict) or "rlnPipeLineJobCounter" not in general:
        raise FileFormatError("is not a pipeline: it has no rlnPipeLineJobCounter", path=path)
    processes = rows(
        "pipeline_processes",
        "rlnPipeLineProcessName",
        "rlnPipeLineProcessTypeLabel",
        "rlnPipeLineProcessStatusLabel",
        "rlnPipeLineProcessAlias",
    )
    nodes = rows("pipeline_nodes", "rlnPipeLineNodeName", "rlnPipeLineNodeTypeLabel")
    inputs = rows("pipeline_input_edges", "rlnPipeLineEdgeFromNode", "rlnPipeLineEdgeProcess")
    outputs = rows("pipeline_output_edges", "rlnPipeLineEdgeProcess", "rlnPipeLineEdgeToNode")
    return Pipeline(
        counter=int(general["rlnPipeLineJobCounter"]),
        processes=[Process(*row) for row in processes],
        nodes={row[0]: row[1] for row in nodes},
        inputs=[(a, b) for a, b in inputs],
        outputs=[(a, b) for a, b in outputs],
    )


def write_pipeline(path: Path, pipeline: Pipeline) -> None:
    """Write a pipeline file, whole or not at all."""
    import polars as pl

    from halfmap.io.star import write_star

    def table(rows: list, *labels: str) -> pl.DataFrame:
        return pl.DataFrame({label: [row[i] for row in rows] for i, label in enumerate(labels)})

    blocks: dict = {"pipeline_general": {"rlnPipeLineJobCounter": pipeline.counter}}
    if pipeline.processes:
        blocks["pipeline_processes"] = table(
            [(p.name, p.alias, p.label, p.status) for p in pipeline.processes],
            "rlnPipeLineProcessName",
            "rlnPipeLineProcessAlias",
            "rlnPipeLineProcessTypeLabel",
            "rlnPipeLineProcessStatusLabel",
        )
    if pipeline.nodes:
        rows = [(name, kind, 1) for name, kind in pipeline.nodes.items()]
        labels = "rlnPipeLineNodeName", "rlnPipeLineNodeTypeLabel", "rlnPipeLineNodeTypeLabelDepth"
        blocks["pipeline_nodes"] = table(rows, *labels)
    if pipeline.inputs:
        blocks["pipeline_input_edges"] = table(
            pipeline.inputs, "rlnPipeLineEdgeFromNode", "rlnPipeLineEdgeProcess"
        )
    if pipeline.outputs:
        blocks["pipeline_output_edges"] = table(
            pipeline.outputs, "rlnPipeLineEdgeProcess", "rlnPipeLineEdgeToNode"
        )
    write_star(path, blocks)


@contextmanager
def edit_pipeline(root: Path) -> Iterator[Pipeline]:
    """Lock the project's pipeline file, give its content to change, write it back.

    The lock is the kernel's (``flock``), so it goes with the process that held it, however that ended. RELION
    is kept out by its own lock, a folder, with a mark in it by which one that a kill left behind is known.

    Raises
    ------
    ProjectError
        If another process holds the lock for a minute, or RELION has the project locked.
    ResourceError
        If the project lies on a file system without locks.
    """
    path = root / PIPELINE_FILE
    with writing(root):
        lock = (root / _LOCK_FILE).open("a")
    with lock:
        _wait_for(lambda: _try_lock(lock), root / _LOCK_FILE, hint="wait until it has ended")
        remove_temporaries(root, f".*~{PIPELINE_FILE}")
        with _relion_locked_out(root / ".relion_lock"):
            pipeline = read_pipeline(path) if path.exists() else Pipeline()
            yield pipeline
            if path.exists() and not pipeline.processes and pipeline.counter == Pipeline().counter:
                path.unlink()  # the first job was refused: there is no project yet
            else:
                write_pipeline(path, pipeline)


@contextmanager
def _relion_locked_out(folder: Path) -> Iterator[None]:
    ours = folder / "halfmap"
    if ours.exists():
        ours.unlink()
        folder.rmdir()
    _wait_for(lambda: _try_make(folder), folder, hint="wait for it, or delete this if none runs")
    ours.touch()
    try:
        yield
    finally:
        ours.unlink()
        folder.rmdir()


def _try_make(folder: Path) -> bool:
    # Nobody's mark in it: a kill between two lines of ours. RELION puts its own there at once.
    with suppress(OSError):
        if time.time() - folder.stat().st_mtime > _UNMARKED_s:
            folder.rmdir()
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ResourceError(
            f"its file system has no locks ({error.strerror})",
            path=file.name,
            hint="mount it with them (Lustre: -o flock), or keep the project elsewhere",
        ) from error
    return True


def _wait_for(ready: Callable[[], bool], path: Path, *, hint: str) -> None:
    deadline = time.monotonic() + _PATIENCE_s
    while not ready():
        if time.monotonic() > deadline:
            raise ProjectError("the project is locked by another program", path=path, hint=hint)
        time.sleep(0.05)
