"""A project: a plain folder that Halfmap and RELION both read."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path

from halfmap.engine import RunOptions, Step
from halfmap.errors import ParameterError, ProjectError
from halfmap.io.atomic import writing
from halfmap.io.names import find_files, name_in, without_dots
from halfmap.log import log
from halfmap.project.job import FAILURES_FILE, Job
from halfmap.project.pipeline import PIPELINE_FILE, Pipeline, Process, edit_pipeline, read_pipeline


@dataclass(frozen=True)
class Project:
    """A project folder.

    Parameters
    ----------
    root : path
        The folder that holds ``default_pipeline.star``.

    Examples
    --------
    >>> from halfmap.project import Project
    >>> from halfmap.steps.import_.step import ImportMovies
    >>> project = Project.open("my_project")                                    # doctest: +SKIP
    >>> job = project.run(ImportMovies(movies=("Movies/*.tiff",), pixel_size=0.885))  # doctest: +SKIP
    >>> job.outputs["movies"]                                                   # doctest: +SKIP
    """

    root: Path

    @classmethod
    def open(cls, path: str | Path) -> Project:
        """Open the project in the folder `path`, making an empty one where there is none."""
        project = cls.at(path)
        with writing(project.root):
            project.root.mkdir(parents=True, exist_ok=True)
        if not (project.root / PIPELINE_FILE).exists():
            project._say_if_nested()
            with edit_pipeline(project.root):
                pass
        return project

    @classmethod
    def at(cls, path: str | Path) -> Project:
        """The project in the folder `path`; where there is none, its first job makes it."""
        return cls(without_dots(Path(path).expanduser()))

    @classmethod
    def find(cls, start: str | Path = ".") -> Project | None:
        """The innermost project that `start` lies in, found by walking up, or None."""
        root = _root_above(without_dots(start))
        if root is None:
            return None
        project = cls(root)
        project._say_if_nested()
        return project

    def _say_if_nested(self) -> None:
        outer = _root_above(self.root.parent)
        if outer is not None:
            log.warning(
                "%s is a project of its own inside the project %s, which is left alone", self.root, outer
            )

    @property
    def pipeline(self) -> Pipeline:
        """The graph as it is on disk now."""
        return read_pipeline(self.root / PIPELINE_FILE)

    def job(self, name: str | Path) -> Job:
        """The job called ``Import/job001``, ``job001`` or ``1``, or whose folder is given.

        Raises
        ------
        ProjectError
            If there is none.
        """
        wanted = str(name).rstrip("/")
        if wanted.isdigit():
            wanted = f"job{int(wanted):03d}"
        for process in self.pipeline.processes:
            folder = process.name.rstrip("/")
            if wanted in (folder, folder.split("/")[-1]) or Path(wanted).absolute() == self.root / folder:
                return Job.load(self.root, process.name)
        for record in self.root.glob("*/job*/job.json"):
            # Killed between its record and its entry in the graph.
            folder = record.parent.relative_to(self.root)
            if wanted in (folder.as_posix(), folder.name) or Path(wanted).absolute() == record.parent:
                return Job.load(self.root, f"{folder.as_posix()}/")
        raise ProjectError(f"has no job {name}", path=self.root, hint="see them with: halfmap info PROJECT")

    def new_job(self, step: Step) -> Job:
        """Make the next numbered job for `step` without running it.

        Raises
        ------
        ParameterError
            If an input file is not there.
        """
        step = self._with_project_paths(step)
        for path in step.inputs():
            if not find_files(path, self.root):
                raise ParameterError("input file does not exist", path=path)
        # Only now: a name typed wrongly makes no folder a project.
        Project.open(self.root)
        with edit_pipeline(self.root) as pipeline:
            # A process killed at this place has left the folder, but not the number.
            while any(self.root.glob(f"*/job{pipeline.counter:03d}")):
                pipeline.counter += 1
            name = f"{step.folder}/job{pipeline.counter:03d}/"
            pipeline.counter += 1
            with writing(self.root / name):
                (self.root / name).mkdir(parents=True)
            job = Job(self.root, name, step)
            job.write_record()
            _enter(pipeline, job)
        return job

    def run(self, step: Step, options: RunOptions | None = None) -> Job:
        """Run `step` as a new job and wait for its end.

        Raises
        ------
        HalfmapError
            What stopped the step.
        """
        job = self.new_job(step)
        self._run(job, options or RunOptions())
        return job

    def resume(self, name: str | Path, options: RunOptions | None = None) -> Job:
        """Go on with a job that was killed, interrupted or failed; finished items are kept.

        Items that failed in a job that ended well are tried again.

        Raises
        ------
        ProjectError
            If there is no such job, it runs, or it has ended well already without failures.
        """
        job = self.job(name)
        for change in job.changes():
            log.warning("%s since the job began; items done before are kept as they are", change)
        if job.status == "Succeeded" and not (job.folder / FAILURES_FILE).exists():
            if any(p.name == job.name and p.status != "Succeeded" for p in self.pipeline.processes):
                # Killed after its last file, before its entry in the graph.
                self._set_status(job, job.status)
                return job
            raise ProjectError("the job has ended well; there is nothing to resume", path=job.folder)
        job.note_resumption()
        self._run(job, options or RunOptions())
        return job

    def _run(self, job: Job, options: RunOptions) -> None:
        self._set_status(job, "Running")
        try:
            job.run(options)
        except KeyboardInterrupt:
            log.warning("interrupted; go on with: halfmap resume %s", os.path.relpath(job.folder))
            raise
        finally:
            self._set_status(job, job.status)

    def _set_status(self, job: Job, status: str) -> None:
        with edit_pipeline(self.root) as pipeline:
            if all(process.name != job.name for process in pipeline.processes):
                _enter(pipeline, job)
            pipeline.set_status(job.name, status)
            if status == "Succeeded":
                outputs = {
                    path.relative_to(self.root).as_posix(): type(job.step).outputs[name].node
                    for name, path in job.outputs.items()
                }
                pipeline.connect(job.name, [], outputs)

    def _with_project_paths(self, step: Step) -> Step:
        """Inputs as the project's tables name them: relative to its root where they lie inside it."""

        def localise(path: Path) -> Path:
            path = path.expanduser()
            here = Path.cwd()
            if not path.is_absolute() and not find_files(path, here):
                return path
            name = name_in(path, self.root)
            if path.is_absolute() or not name.is_absolute() or path.exists():
                return name
            # The folder's own brackets are none of the pattern's.
            return Path(glob.escape(str(here))) / path

        changes = {}
        for parameter in step.parameters():
            value = getattr(step, parameter.name)
            if parameter.node is not None and value is not None:
                changes[parameter.name] = (
                    tuple(map(localise, value)) if isinstance(value, tuple) else localise(value)
                )
        return step.model_copy(update=changes)


def _enter(pipeline: Pipeline, job: Job) -> None:
    """Add a job to the graph."""
    pipeline.processes.append(Process(job.name, job.step.label, "Scheduled"))
    pipeline.connect(job.name, [path.as_posix() for path in job.step.inputs()], {})


def _root_above(folder: Path) -> Path | None:
    """The first folder that holds a project: this one or one above it."""
    return next((each for each in (folder, *folder.parents) if (each / PIPELINE_FILE).exists()), None)
