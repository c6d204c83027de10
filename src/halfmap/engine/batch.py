"""Workers that are jobs of a batch system: submitted, watched, replaced when they are lost, ended."""

from __future__ import annotations

import os
import shlex
import time
import uuid
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfmap.engine.interrupts import interrupts_put_off
from halfmap.engine.options import RunOptions
from halfmap.engine.progress import duration
from halfmap.engine.queues import QUEUES, SCHEDULER, given
from halfmap.errors import ResourceError
from halfmap.io.atomic import write_text, writing
from halfmap.log import log

_LOOK_s, _LOOK_CLOSER_s = 30.0, 5.0
"""How often the queue is asked for workers that have not come, and for those that were lost."""

_UNLISTED_s = 30.0
"""Time after its submission in which a job may not be listed yet."""

_PAUSE_s, _LONGEST_PAUSE_s = 5.0, 600.0
"""Time until others take the place of workers that have ended before they came; twice as long each time."""

_SILENCE_s = 60.0
"""Time without any worker after which what the queue says is told; then after twice the time, and so on."""

_ON = "worker on "
_ENTER = (
    # To both: most systems keep two logs, of which one may stay empty.
    f"echo {_ON}$(hostname); echo {_ON}$(hostname) >&2; "
    "cd {folder} 2> /dev/null && test -r ca.pem || {{ echo does not see {folder}: "
    "projects must lie on a disk that all machines share, under the same name; exit 1; }}"
)
"""First of what a job does."""

_KEYS = {"tls_ca_file": "ca.pem", "tls_worker_cert": "worker.pem", "tls_worker_key": "worker.key"}


@dataclass
class _Job:
    """A job in the queue: its number, when it was submitted, and looks in a row that have not found it."""

    number: str
    submitted: float
    missed: int = 0


class BatchWorkers:
    """Workers in a queue.

    Parameters
    ----------
    options : RunOptions
        Which batch system, how many and what each needs.
    folder : path
        Shared with them: for their keys and their logs.
    environment : mapping of str to str
        Variables that they run with.
    """

    def __init__(self, options: RunOptions, folder: Path, environment: dict[str, str]) -> None:
        self.options, self.folder, self.environment = options, folder, environment
        self.queue = QUEUES[options.cluster]
        self._jobs: dict[str, _Job] = {}
        self._seen: set[str] = set()
        self._lost = self._results = 0
        self._next = self._since = self._not_before = time.monotonic()
        self._patience, self._pause = _SILENCE_s, _PAUSE_s
        self._token = uuid.uuid4().hex[:8]
        self._count = 0

    def start(self) -> Any:
        """Start a scheduler in this process.

        Raises
        ------
        ResourceError
            If it finds no network to listen to.
        """
        from dask import config
        from distributed import Scheduler, Security, SpecCluster

        self._security = Security.temporary()
        with writing(self.folder):
            for field, name in _KEYS.items():
                number = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                with os.fdopen(number, "w", encoding="ascii") as file:
                    file.write(getattr(self._security, field))
        site = f"jobqueue.{self.options.cluster}"
        own = given(self.options)
        interface = own.get("interface") or config.get(f"{site}.interface", None)
        wanted = own.get(SCHEDULER) or config.get(f"{site}.scheduler-options", None) or {}
        place = {"interface": interface} if interface and not {"interface", "host"} & set(wanted) else {}
        settings = {
            "protocol": "tls://",
            "security": self._security,
            "dashboard_address": "127.0.0.1:0",  # any free port: two jobs cannot share the default one
            **place,
            **wanted,
        }
        try:
            self._cluster = SpecCluster(
                scheduler={"cls": Scheduler, "options": settings},
                security=self._security,
                silence_logs=50,  # pyright: ignore[reportArgumentType]
            )
        except Exception as error:
            raise ResourceError(
                f"no scheduler can be started for the workers: {error}",
                hint="see --cluster-option interface=NAME, or scheduler_options",
            ) from error
        return self._cluster

    def _script(self, address: str, name: str) -> str:
        from distributed import Security

        files = {field: f"./{name}" for field, name in _KEYS.items()}
        exports = [f"export {key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return self.queue.script(
            self.options,
            address,
            name,
            security=Security(require_encryption=True, **files),
            # Relative to the folder, which may have blanks: to batch systems these end a name.
            log_directory=".",
            job_script_prologue=[_ENTER.format(folder=shlex.quote(str(self.folder))), *exports],
        )

    def _submit(self) -> str:
        self._count += 1
        name = f"{self._token}-{self._count}"
        script = self._script(self._cluster.scheduler_address, name)
        write_text(self.folder / "worker.sh", script, durable=False)
        with interrupts_put_off():
            number = self.queue.submitted(script, self.folder)
            self._jobs[name] = _Job(number, time.monotonic())
        return number

    def tend(self, need: int, names: Set[str], results: int) -> None:
        """Submit what workers are missing; say what the queue does while there are none.

        Parameters
        ----------
        need : int
            How many workers there is work for.
        names : set of str
            Of the workers that are there.
        results : int
            How many items have been finished.

        Raises
        ------
        ResourceError
            If the batch system refuses them, or they end as soon as they begin.
        """
        now = time.monotonic()
        if results > self._results:
            self._results, self._lost = results, 0
        if names - self._seen:
            self._seen |= names
            self._pause = _PAUSE_s
        if names:
            self._since, self._patience = now, _SILENCE_s
        if len(self._jobs) < need and now >= self._not_before:
            new = ", ".join([self._submit() for _ in range(need - len(self._jobs))])
            log.info("submitted to %s: %s", self.queue.title, new)
        missing = self._jobs.keys() - names
        if missing and now >= self._next:
            closer = bool(missing & self._seen) or now - self._since < _SILENCE_s
            self._next = now + (_LOOK_CLOSER_s if closer else _LOOK_s)
            self._look(now, names)

    def _look(self, now: float, names: Set[str]) -> None:
        """Ask the queue for the jobs, and strike those off that have ended."""
        said = self.queue.lines([job.number for job in self._jobs.values()], self.folder)
        if said is None:
            self._say_silence(now, f"{self.queue.ask[0]} fails")
            return
        for name, job in self._jobs.items():
            job.missed = 0 if name in names or job.number in said else job.missed + 1
        ended = {name for name, job in self._jobs.items() if self._has_ended(name, job, now)}
        numbers = [self._jobs.pop(name).number for name in ended]
        self._lost += len(ended)
        self._refuse_hopeless(names)
        if ended:
            log.warning("ended in the queue: %s", ", ".join(numbers))
        if ended - self._seen:
            self._put_off(now, len(ended - self._seen))
        waiting = [said[job.number] for job in self._jobs.values() if job.number in said]
        self._say_silence(now, "; ".join(waiting[:3]))

    def _has_ended(self, name: str, job: _Job, now: float) -> bool:
        """Whether a job is over. Some systems list one late, and any may leave out one that has not come."""
        lost = name in self._seen and job.missed > 0
        return lost or (job.missed > 1 and now - job.submitted > _UNLISTED_s)

    def _put_off(self, now: float, number: int) -> None:
        """Wait before others take the place of workers that came to nothing: a broken machine takes all."""
        _, said = self._last_words()
        log.warning(
            "workers that ended before they came: %d%s; the next are submitted in %s",
            number,
            f", the last one with: {said}" if said else "",
            duration(self._pause),
        )
        self._not_before = now + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_s)

    def dismiss(self, names: Set[str]) -> None:
        """Take workers that have nothing to do out of the queue."""
        numbers = [self._jobs.pop(name).number for name in names & self._jobs.keys()]
        with interrupts_put_off():
            self.queue.ended(numbers, self.folder)
        log.info("let go, for want of work: %s", ", ".join(numbers))

    def _say_silence(self, now: float, what: str) -> None:
        if now - self._since > self._patience:
            waited = duration(now - self._since)
            log.warning("no worker for %s; %s says: %s", waited, self.queue.title, what or "nothing")
            self._patience *= 2

    def _refuse_hopeless(self, names: Set[str]) -> None:
        """End a job whose workers come to nothing, with what they have said last."""
        workers = self.options.workers
        never = not self._seen and self._lost >= min(workers, 3)
        # An item that takes its worker down may do so three times before it is given up.
        if names or not (never or self._lost > 3 * workers + 1):
            return
        log_file, said = self._last_words()
        if said:
            raise ResourceError(f"the workers end as soon as they begin: {said}", path=log_file)
        raise ResourceError(
            "the workers end as soon as they begin, and leave no log in their folder",
            path=self.folder,
            hint="do the cluster's machines see it under this name? It must lie on a disk that all share",
        )

    def _last_words(self) -> tuple[Path, str]:
        """The log that was written last, and the last of its lines that may say what went wrong."""
        ours = {*_KEYS.values(), "worker.sh"}
        logs = [path for path in self.folder.iterdir() if path.name not in ours and path.suffix != ".pickle"]
        for path in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True):
            lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
            host = next((line for line in lines if line.startswith(_ON)), None)
            if telling := [line for line in lines if line not in ("", host) and " - INFO - " not in line]:
                return path, f"{host}: {telling[-1]}" if host else telling[-1]
        return self.folder, ""

    def end(self) -> None:
        """Take all jobs out of the queue, and remove the keys."""
        with interrupts_put_off():
            self.queue.ended([job.number for job in self._jobs.values()], self.folder)
        self._jobs.clear()
        for name in _KEYS.values():
            (self.folder / name).unlink(missing_ok=True)
