"""What to name in the place of an input that cannot be."""

from __future__ import annotations

import glob
from difflib import get_close_matches
from pathlib import Path

from halfmap.project.pipeline import PIPELINE_FILE, read_pipeline


def root_above(folder: Path) -> Path | None:
    """The first folder that holds a project: this one or one above it."""
    return next((each for each in (folder, *folder.parents) if (each / PIPELINE_FILE).exists()), None)


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
