"""What to name in the place of an input that cannot be."""

from __future__ import annotations

import glob
import os
from difflib import get_close_matches
from pathlib import Path

from halfmap.errors import HalfmapError
from halfmap.io.names import without_dots
from halfmap.project.job import Job
from halfmap.project.pipeline import PIPELINE_FILE, read_pipeline


def root_above(folder: Path) -> Path | None:
    """The first folder that holds a project: this one or one above it."""
    return next((each for each in (folder, *folder.parents) if (each / PIPELINE_FILE).exists()), None)


def job_around(path: Path) -> Path | None:
    """The folder of the job that a folder is or lies in, if it does."""
    path = without_dots(path)
    root = root_above(path)
    folders = (each for each in (path, *path.parents) if root is not None and root in each.parents)
    return next((each for each in folders if (each / "job.json").exists()), None)


def not_made_yet(path: Path, root: Path) -> str | None:
    """Hint at an output of a job that has not ended well, as the reason for which it is not there."""
    for place in (Path.cwd() / path, root / path):
        folder, project = job_around(place.parent), root_above(place.parent)
        if folder is None or project is None:
            continue
        try:
            job = Job.load(project, f"{folder.relative_to(project).as_posix()}/")
        except HalfmapError:
            continue  # that record is another command's affair
        if job.status == "Succeeded" or place.name not in {
            out.file for out in type(job.step).outputs.values()
        }:
            continue
        if job.status == "Running":
            return f"its job is running and writes it at the end: see halfmap info {os.path.relpath(folder)}"
        return f"its job has not ended well ({job.status.lower()}); go on with: {job.resume_command}"
    return None


def nearest(path: Path, root: Path) -> str | None:
    """Hint at a file whose name is nearly the one that is not there."""
    for folder in {Path.cwd() / path.parent, root / path.parent}:
        names = [each.name for each in folder.iterdir()] if folder.is_dir() else []
        close = get_close_matches(path.name, names, n=1)
        if close and not glob.has_magic(path.name):
            return f"did you mean {path.parent / close[0]}?"
    return None


def file_in(path: Path, folder: Path, node: str, *, many: bool) -> str:
    """Hint at what is meant by a folder in the place of a file: what that job made of the type asked for.

    Parameters
    ----------
    path : path
        The folder as it was named.
    folder : path
        Where it lies.
    node : str
        RELION node type that is asked for; "" for files from outside the project.
    many : bool
        Whether several files may be given.
    """
    root = root_above(folder)
    if root is not None and node:
        job = f"{folder.relative_to(root).as_posix()}/"
        pipeline = read_pipeline(root / PIPELINE_FILE)
        made = [file for name, file in pipeline.outputs if name == job]
        meant = sorted((file for file in made if pipeline.nodes.get(file, "").startswith(node)), key=len)
        if meant:
            return f"did you mean {path / meant[0].removeprefix(job)}?"
    return f"name what lies in it: '{path}/*'" if many else "name the file in it"
