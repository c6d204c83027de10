"""A project: a plain folder that Halfmap and RELION both read."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from halfmap.engine import RunOptions, Step
from halfmap.engine.device import device_for
from halfmap.engine.executor import prepare_workers
from halfmap.engine.parameters import FormType
from halfmap.errors import HalfmapError, ParameterError, ProjectError
from halfmap.io.atomic import writing
from halfmap.io.names import find_files, name_in, without_dots
from halfmap.log import log
from halfmap.project.hints import file_in, nearest, not_made_yet, root_above
from halfmap.project.inputs import input_paths
from halfmap.project.job import Job
from halfmap.project.locks import making
from halfmap.project.outcome import FAILURES_FILE
from halfmap.project.pipeline import PIPELINE_FILE, Pipeline, Process, edit_pipeline, read_pipeline

if TYPE_CHECKING:
    from halfmap.engine.cluster import Cluster


@dataclass(frozen=True)
class Project:
    """A project folder.

    Parameters
    ----------
    root : path
        The folder that holds ``default_pipeline.star``.
    goes_on : str
        Command by which what is interrupted in it goes on; default: that of the job.

    Examples
    --------
    >>> from halfmap.project import Project
    >>> from halfmap.steps.import_.step import ImportMovies
    >>> project = Project.open("my_project")                                    # doctest: +SKIP
    >>> job = project.run(ImportMovies(movies=("Movies/*.tiff",), pixel_size=0.885))  # doctest: +SKIP
    >>> job.outputs["movies"]                                                   # doctest: +SKIP
    """

    root: Path
    goes_on: str = ""

    @classmethod
    def open(cls, path: str | Path) -> Project:
        """Open the project in the folder `path`, making an empty one where there is none.

        Raises
        ------
        ProjectError, ResourceError
            If the folder cannot be made or written.
        """
        project = cls.at(path)
        with making(project.root):
            project.root.mkdir(parents=True, exist_ok=True)
            if not (project.root / PIPELINE_FILE).exists():
                project._say_if_nested()
                with edit_pipeline(project.root):
                    pass
                log.info("a new project begins in %s", project.root)
        return project

    @classmethod
    def at(cls, path: str | Path) -> Project:
        """The project in the folder `path`; where there is none, its first job makes it."""
        return cls(without_dots(Path(path).expanduser()))

    @classmethod
    def find(cls, start: str | Path = ".") -> Project | None:
        """The innermost project that `start` lies in, found by walking up, or None."""
        root = root_above(without_dots(start))
        if root is None:
            return None
        project = cls(root)
        project._say_if_nested()
        return project

    def _say_if_nested(self) -> None:
        outer = root_above(self.root.parent)
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
        return self._make_job(self._checked(step))

    def _checked(self, step: Step) -> Step:
        """The step with its inputs as the project's tables name them, all of which are there."""
        takes_files = any(p.node and input_paths(step, p) for p in step.parameters())
        if takes_files and not self.root.exists():
            # What goes on in a project makes none of a name typed wrongly.
            hint = "is its name right? Only an import or a simulation makes it"
            raise ProjectError("there is no such project folder", path=self.root, hint=hint)
        step = self.with_project_paths(step)
        for parameter in step.parameters():
            for path in input_paths(step, parameter):
                found = find_files(path, self.root)
                if not found:
                    hint = not_made_yet(path, self.root) or nearest(path, self.root)
                    raise ParameterError("input file does not exist", path=path, hint=hint)
                if not parameter.is_folder and all(each.is_dir() for each in found):
                    many = isinstance(getattr(step, parameter.name), tuple)
                    hint = file_in(path, found[0], parameter.node or "", many=many)
                    raise ParameterError("is a folder, not a file", path=path, hint=hint)
        return step

    def _make_job(self, step: Step) -> Job:
        # Only now: a name typed wrongly makes no folder a project.
        self._say_if_from_elsewhere(step)
        Project.open(self.root)
        self._note_makers(step)
        with edit_pipeline(self.root) as pipeline:
            # A process killed at this place has left the folder, but not the number.
            while any(self.root.glob(f"*/job{pipeline.counter:03d}")):
                pipeline.counter += 1
            name = f"{step.folder}/job{pipeline.counter:03d}/"
            pipeline.counter += 1
            job = Job(self.root, name, step)
            with writing(job.folder):
                job.folder.mkdir(parents=True)
            try:
                job.write_record()
            except BaseException:
                shutil.rmtree(job.folder)
                raise
            pipeline.processes.append(Process(job.name, job.step.label, "Scheduled"))
            _connect(pipeline, job)
        return job

    def _say_if_from_elsewhere(self, step: Step) -> None:
        """Warn of tables of another project, in which names of files are relative to that one."""
        for parameter in step.parameters():
            for path in input_paths(step, parameter) if parameter.node else ():
                other = root_above((self.root / path).parent)
                if other is not None and name_in(other, self.root) != Path():
                    log.warning(
                        "%s is of the project %s and names files from there; to go on there: --project %s",
                        path,
                        other,
                        os.path.relpath(other),
                    )

    def run(
        self,
        step: Step,
        options: RunOptions | None = None,
        *,
        on_made: Callable[[Job], None] | None = None,
        growing: bool = False,
        cluster: Cluster | None = None,
    ) -> Job:
        """Run `step` as a new job and wait for its end; one that is refused before any work is taken back.

        Parameters
        ----------
        step : Step
            What to run.
        options : RunOptions, optional
            How.
        on_made : callable, optional
            Told of the job before it begins.
        growing : bool
            Whether more items are to come: what is decided from all of them is kept until there are half as
            many more, and the job is provisional.
        cluster : Cluster, optional
            Workers that a chain of jobs has, taken if they are what the options ask for.

        Raises
        ------
        HalfmapError
            What stopped the step.
        """
        options = options or RunOptions()
        step = self._checked(step)
        _check_machine(options)  # what is refused leaves no job behind
        job = self._make_job(step)
        if on_made is not None:
            on_made(job)
        try:
            self._run(job, options, is_new=True, growing=growing, cluster=cluster)
        except HalfmapError as error:
            if job.is_refused(error):
                self._take_back(job)
            raise
        return job

    def _take_back(self, job: Job) -> None:
        """Remove a job from the graph and the disk, and give its number to the next one if it is the last."""
        with edit_pipeline(self.root) as pipeline:
            pipeline.remove(job.name)
            number = int(job.name.rstrip("/").rsplit("job", 1)[1])
            if pipeline.counter == number + 1:
                pipeline.counter = number
        shutil.rmtree(job.folder, ignore_errors=True)
        with suppress(OSError):
            job.folder.parent.rmdir()

    def remove(self, name: str) -> None:
        """Delete a job that no other one reads from: its folder, and its place in the graph.

        Parameters
        ----------
        name : str
            As the graph has it: ``Class2D/job012/``.

        Raises
        ------
        ProjectError
            If another job reads what it has written, or it runs.
        """
        with edit_pipeline(self.root) as pipeline:
            written = {node for job, node in pipeline.outputs if job == name}
            readers = [job for node, job in pipeline.inputs if node in written]
            if readers:
                raise ProjectError(f"{readers[0]} reads from it", path=self.root / name)
            if (self.root / name / "job.json").exists() and Job.load(self.root, name).status == "Running":
                raise ProjectError("the job is running in another process", path=self.root / name)
            shutil.rmtree(self.root / name, ignore_errors=True)
            pipeline.remove(name)

    def resume(
        self,
        name: str | Path,
        options: RunOptions | None = None,
        *,
        growing: bool = False,
        cluster: Cluster | None = None,
        changes: tuple[list[str], list[str]] | None = None,
    ) -> Job:
        """Go on with a job that was killed, interrupted or failed; finished items are kept.

        Options that are not given are those that the job ran with last; `growing` and `cluster` are as of
        `run`. A job that ended well goes on too if items of it failed, which are tried again, if its inputs
        have changed or become more, or if it is provisional. Who has looked what has changed may give it
        (`changes`, as `Job.changed_inputs` does), as that asks for thousands of files.

        Raises
        ------
        ProjectError
            If there is no such job, it runs, or there is nothing for it to do.
        """
        job = self.job(name)
        options = job.options(options or RunOptions())
        changed, new = changes or job.changed_inputs()
        unfinished = changed or new or job.provisional() or (job.folder / FAILURES_FILE).exists()
        if job.status == "Succeeded" and not unfinished:
            if self.note_ended(job):
                return job
            raise ProjectError("the job has ended well; there is nothing to resume", path=job.folder)
        if job.status == "Running":
            raise ProjectError("the job is running in another process", path=job.folder)
        _check_machine(options)
        job.note_resumption()
        version = job.changed_version()
        self._run(
            job, options, [*changed, version] if version else changed, new, growing=growing, cluster=cluster
        )
        return job

    def _run(
        self,
        job: Job,
        options: RunOptions,
        changes: Sequence[str] = (),
        new: Sequence[str] = (),
        *,
        is_new: bool = False,
        growing: bool = False,
        cluster: Cluster | None = None,
    ) -> None:
        self._set_status(job, "Running")
        try:
            job.run(options, changes, new, is_new=is_new, growing=growing, cluster=cluster)
        except KeyboardInterrupt:
            log.warning("interrupted; go on with: %s", self.goes_on or job.resume_command)
            raise
        finally:
            self._set_status(job, job.status)

    def note_ended(self, job: Job) -> bool:
        """Enter in the graph a job that ended well but was killed before; False if it is there already."""
        graph = self.pipeline
        known = any(each.name == job.name and each.status == "Succeeded" for each in graph.processes)
        read = {path.as_posix() for path in job.step.inputs()} & graph.nodes.keys()
        if known and read <= {node for node, reader in graph.inputs if reader == job.name}:
            return False
        self._set_status(job, "Succeeded")
        return True

    def _note_makers(self, step: Step) -> None:
        """Enter those jobs in the graph that made a step's inputs and were killed before their own entry."""
        for folder in {path.parent for path in step.inputs() if not path.is_absolute()}:
            if (self.root / folder / "job.json").exists():
                with suppress(HalfmapError):  # of a step that this version lacks
                    job = Job.load(self.root, f"{folder.as_posix()}/")
                    if job.status == "Succeeded":
                        self.note_ended(job)

    def _set_status(self, job: Job, status: str) -> None:
        with edit_pipeline(self.root) as pipeline:
            if all(process.name != job.name for process in pipeline.processes):
                pipeline.processes.append(Process(job.name, job.step.label, "Scheduled"))
            _connect(pipeline, job)
            pipeline.set_status(job.name, status)
            if status == "Succeeded":
                outputs = {
                    path.relative_to(self.root).as_posix(): type(job.step).outputs[name].node
                    for name, path in job.outputs.items()
                }
                pipeline.connect(job.name, [], outputs)

    def with_project_paths(self, step: FormType) -> FormType:
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
            paths = tuple(map(localise, input_paths(step, parameter)))
            if paths:
                is_tuple = isinstance(getattr(step, parameter.name), tuple)
                changes[parameter.name] = paths if is_tuple else paths[0]
        return step.model_copy(update=changes)


def _check_machine(options: RunOptions) -> None:
    """Refuse a device that is not there. Workers are prepared meanwhile: to look for a device takes long."""
    prepare_workers(options)
    device_for(options)


def _connect(pipeline: Pipeline, job: Job) -> None:
    """Add a job's edges from files of other jobs to the graph."""
    pipeline.connect(job.name, [path.as_posix() for path in job.step.inputs()], {})
