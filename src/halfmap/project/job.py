"""One job: its folder, its record of what was run, its status, and running it."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import halfmap
from halfmap.engine import Context, RunOptions, Step, parse_step, registered_steps
from halfmap.engine.decisions import Decisions
from halfmap.engine.device import GpuOfWorker, device_for
from halfmap.engine.executor import shared_workers
from halfmap.engine.interrupts import terminate_as_interrupt
from halfmap.errors import (
    FileFormatError,
    HalfmapError,
    ItemsFailedError,
    ParameterError,
    ProjectError,
    ShapeError,
    TableError,
)
from halfmap.io.atomic import remove_temporaries, write_text, writing
from halfmap.log import log
from halfmap.project.inputs import Entry, changed_since, record_inputs
from halfmap.project.locks import is_locked, locked
from halfmap.project.messages import WARNINGS_FILE, WarningsSeen, logging_to
from halfmap.project.outcome import FAILURES_FILE, closing_lines, shortened, write_failures

if TYPE_CHECKING:
    from halfmap.engine.cluster import Cluster

_MARKERS = {
    "Succeeded": "RELION_JOB_EXIT_SUCCESS",
    "Failed": "RELION_JOB_EXIT_FAILURE",
    "Aborted": "RELION_JOB_EXIT_ABORTED",
}
_RECORDS = {"job.json", "job.star", "note.txt", "run.out", WARNINGS_FILE, ".lock", *_MARKERS.values()}
"""Files that any job has, whatever its step has done."""

_LEDGERS = {"events.jsonl", "items.jsonl", FAILURES_FILE, "decisions.json"}
_RECORDED_PACKAGES = ("numpy", "scipy", "torch", "numba", "polars", "gemmi")


@dataclass(frozen=True)
class Job:
    """A job of a project.

    Parameters
    ----------
    root : path
        Folder of the project.
    name : str
        Folder of the job inside it, as RELION writes it: ``Import/job001/``.
    step : Step
        What it runs, with its parameters.
    """

    root: Path
    name: str
    step: Step

    @property
    def folder(self) -> Path:
        """Folder of the job."""
        return self.root / self.name

    @property
    def status(self) -> str:
        """One of ``Scheduled Running Succeeded Failed Aborted``, as the folder's markers and lock say."""
        for status, marker in _MARKERS.items():
            if (self.folder / marker).exists():
                return status
        if not (self.folder / ".lock").exists():
            return "Scheduled"
        return "Running" if is_locked(self.folder / ".lock") else "Aborted"

    @property
    def outputs(self) -> dict[str, Path]:
        """Files that the job has written, by name."""
        files = {name: self.folder / out.file for name, out in type(self.step).outputs.items()}
        return {name: path for name, path in files.items() if path.exists()}

    @classmethod
    def load(cls, root: Path, name: str) -> Job:
        """Read a job back from its folder.

        Raises
        ------
        ProjectError, FileFormatError
            If it is no job of Halfmap's, or of a step that this version lacks.
        """
        path = root / name / "job.json"
        if not path.parent.exists():
            raise ProjectError(
                "the folder of this job is gone", path=path.parent, hint="put it back, or run the step anew"
            )
        if not path.exists():
            raise ProjectError("is not a job of Halfmap's: it has no job.json", path=root / name)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            step, parameters = record["step"], record["parameters"]
        except PermissionError as error:
            raise ProjectError("may not be read", path=path, hint="check its permissions") from error
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError("cannot be read as a job's record", path=path) from error
        if step not in registered_steps():
            raise ProjectError(f"ran the step {step!r}, which Halfmap {halfmap.__version__} lacks", path=path)
        return cls(root, name, parse_step(registered_steps()[step], parameters))

    def write_record(self) -> None:
        """Write what is run: ``job.json`` (ours), ``job.star`` and ``note.txt`` (RELION's)."""
        from halfmap.io.star import write_star

        parameters = self.step.model_dump(mode="json")
        record = {
            "halfmap": halfmap.__version__,
            "step": self.step.name,
            "label": self.step.label,
            "parameters": parameters,
            "inputs": record_inputs(self.step, self.root),
            "outputs": {name: asdict(out) for name, out in type(self.step).outputs.items()},
            "command": sys.argv,
            "created": _now(),
            "python": platform.python_version(),
            "packages": {name: metadata.version(name) for name in _RECORDED_PACKAGES},
        }
        write_text(self.folder / "job.json", json.dumps(record, indent=2) + "\n")
        values = {name: _as_relion(value) for name, value in parameters.items()}
        options: dict[str, Any] = {
            "rlnJobTypeLabel": self.step.label,
            "rlnJobIsContinue": 0,
            "rlnJobIsTomo": 0,
        }
        write_star(
            self.folder / "job.star",
            {
                "job": options,
                "joboptions_values": _string_table(
                    rlnJobOptionVariable=list(values), rlnJobOptionValue=list(values.values())
                ),
            },
        )
        command = " ".join([f"halfmap {self.step.name}", *_as_options(self.step)])
        note = f" ++++ Executing new job on {_now()}\n ++++ with the following command(s):\n{command}\n"
        write_text(self.folder / "note.txt", note)

    def _record(self) -> dict[str, Any]:
        return json.loads((self.folder / "job.json").read_text(encoding="utf-8"))

    def _keep(self, **values: Any) -> None:
        """Add values to the record."""
        write_text(self.folder / "job.json", json.dumps(self._record() | values, indent=2) + "\n")

    def _keep_end(self, seconds: float, inputs: list[Entry]) -> None:
        """Add to the record how long the job ran, in all its runs together, and of which inputs."""
        # A full disk has been told already.
        with suppress(HalfmapError):
            self._keep(seconds=round(self._record().get("seconds", 0.0) + seconds, 1), inputs=inputs)

    def options(self, given: RunOptions) -> RunOptions:
        """Options to go on with: those `given` by name, the others as when the job ran last."""
        return given.continued(self._record().get("run", {}))

    def provisional(self) -> list[tuple[str, int, int]]:
        """What the job has decided from fewer items than it has: what, from how many, of how many."""
        return Decisions(self.folder).provisional()

    @property
    def was_growing(self) -> bool:
        """Whether more items were to come when the job ran last."""
        return bool(self._record().get("growing"))

    def changed_version(self) -> str | None:
        """Say which version of Halfmap the job began with, if it was another one."""
        version = self._record().get("halfmap")
        return None if version == halfmap.__version__ else f"Halfmap, {version} then"

    def changed_inputs(self) -> tuple[list[str], list[str]]:
        """Input files that have changed since the job ran last, and those that are new."""
        return changed_since(self.step, self.root, self._record().get("inputs", []))

    def note_resumption(self) -> None:
        """Add to ``note.txt`` that the job goes on, as RELION does."""
        with (
            writing(self.folder / "note.txt"),
            (self.folder / "note.txt").open("a", encoding="utf-8") as file,
        ):
            file.write(f" ++++ Executing continued job on {_now()}\n")

    def is_refused(self, error: HalfmapError | None) -> bool:
        """Whether the step has ended with a user's error before it did anything worth keeping.

        What checks of items have found is worth nothing to a job whose parameters cannot be.
        """
        if not isinstance(error, ParameterError | TableError | FileFormatError | ShapeError):
            return False
        worthless = _RECORDS | _LEDGERS if isinstance(error, ParameterError) else _RECORDS
        return {path.name for path in self.folder.iterdir()} <= worthless

    def run(
        self,
        options: RunOptions,
        changes: Sequence[str] = (),
        new: Sequence[str] = (),
        *,
        is_new: bool = False,
        growing: bool = False,
        cluster: Cluster | None = None,
    ) -> None:
        """Run the job, or go on with it where it stopped.

        Parameters
        ----------
        options : RunOptions
            How it runs.
        changes : sequence of str
            What has changed since it ran before, to be warned of.
        new : sequence of str
            Input files that have come since.
        is_new : bool
            Whether it runs for the first time and will be taken back if it is refused.
        growing : bool
            Whether more items are to come.
        cluster : Cluster, optional
            Workers that a chain of jobs has, taken if they are what the options ask for.

        Raises
        ------
        HalfmapError
            What stopped the step; the folder is then marked as failed.
        KeyboardInterrupt
            If it was interrupted; the folder is then marked as aborted and can be resumed.
        """
        device = device_for(options)
        with (
            locked(self.folder / ".lock", "the job is running in another process"),
            logging_to(self.folder) as seen,
            terminate_as_interrupt(),
            shared_workers(options, self.folder, cluster) as workers,
        ):
            for marker in _MARKERS.values():
                (self.folder / marker).unlink(missing_ok=True)
            remove_temporaries(self.folder)
            self._keep(
                run=options.model_dump(mode="json", include=set(RunOptions.model_fields)), growing=growing
            )
            # As they are before the step looks at them, and in the record only when it has ended: what comes
            # meanwhile, and whatever a kill leaves undone, is new to the next run.
            inputs = record_inputs(self.step, self.root, self._record().get("inputs", []))
            ctx = Context(self.folder, self.root, options, device, workers, growing)
            where = "a GPU of each worker" if isinstance(device, GpuOfWorker) else device
            log.info("%s: halfmap %s %s on %s", self.name, halfmap.__version__, self.step.name, where)
            if changes:
                text = "changed since the job ran before: %s; items done then are kept unless theirs has"
                log.log(logging.INFO if growing else logging.WARNING, text, shortened(changes))
            if new:
                log.info("new since the job ran before: %s", shortened(new))
            if gone := [entry["path"] for entry in inputs if entry.get("gone")]:
                text = "gone since the job ran before: %s; what came of them is kept"
                log.log(logging.INFO if growing else logging.WARNING, text, shortened(gone))
            start = time.monotonic()
            status, advice, stopped_by = "Failed", "", None
            try:
                self.step.run(ctx)
                self._check_outputs()
                status = "Succeeded"
            except KeyboardInterrupt:
                status = "Aborted"
                raise
            except HalfmapError as error:
                stopped_by = error
                log.error("%s", error, extra={"quiet": True})
                # The same parameters, or all that was kept, would end alike.
                is_final = isinstance(error, ParameterError | ItemsFailedError)
                if not (is_final or ctx.failures):
                    advice = f"; once the cause is mended, `{self.resume_command}` goes on"
                raise
            except BaseException as error:
                log.exception("%s", error, extra={"quiet": True})
                raise
            finally:
                write_failures(self.folder, ctx.failures)
                self._keep_end(time.monotonic() - start, inputs)
                self._end(status)
                if is_new and self.is_refused(stopped_by):
                    log.info("%s: refused before any work, and removed again", self.name)
                else:
                    how = {"Succeeded": "done in", "Failed": "failed after", "Aborted": "interrupted after"}
                    log.info("%s: %s %.1f s%s", self.name, how[status], time.monotonic() - start, advice)
                    resume = None if isinstance(stopped_by, ParameterError) else self.resume_command
                    self._say_outcome(ctx, seen, resume)

    def _say_outcome(self, ctx: Context, seen: WarningsSeen, resume: str | None) -> None:
        here, in_view = Path.cwd(), list(seen.last)
        width = max([12, *map(len, self.outputs)])
        for name, path in self.outputs.items():
            shown = path.relative_to(here) if path.is_relative_to(here) else path
            log.info("  %-*s %s", width, name, shown)
        for line in closing_lines(self.name, ctx.failures, seen.texts, resume=resume, in_view=in_view):
            log.info("%s", line)

    @property
    def resume_command(self) -> str:
        """What to type to go on with the job, from where the process stands."""
        return f"halfmap resume {os.path.relpath(self.folder)}"

    def _end(self, status: str) -> None:
        write_text(self.folder / _MARKERS[status], "")

    def _check_outputs(self) -> None:
        for name, out in type(self.step).outputs.items():
            if not out.optional and not (self.folder / out.file).exists():
                raise ProjectError(
                    f"the step ended without writing its output {name!r}", path=self.folder / out.file
                )


def _string_table(**columns: list[str]) -> Any:
    import polars as pl

    return pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String))


def _as_relion(value: Any) -> str:
    if isinstance(value, bool):
        return "Yes" if value else "No"
    if isinstance(value, list):
        return ",".join(_as_relion(item) for item in value)
    return "" if value is None else str(value)


def _as_options(step: Step) -> Iterator[str]:
    """The command line that asks for the same thing, without what is default anyway."""
    import shlex

    values = step.model_dump(mode="json")
    for parameter in step.parameters():
        value = getattr(step, parameter.name)
        if value == parameter.default:
            continue
        if isinstance(value, bool):
            yield parameter.option if value else parameter.option.replace("--", "--no-", 1)
            continue
        plain = values[parameter.name]
        words = plain if isinstance(plain, list) else [plain]
        yield " ".join([parameter.option, *(shlex.quote(str(word)) for word in words)])


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
