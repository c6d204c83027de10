"""Workers that are jobs of a batch system: submitted, watched, replaced when they are lost, ended."""

from __future__ import annotations

import os
import shlex
import time
import uuid
from collections.abc import Set
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

_SILENCE_s = 60.0
"""Time without any worker after which what the queue says is told; then after twice the time, and so on."""

_ENTER = (
    "cd {folder} && test -r ca.pem || {{ echo $(hostname) does not see {folder}: "
    "projects must lie on a disk that all machines share, under the same name; exit 1; }}"
)
"""First of what a job does."""

_KEYS = {"tls_ca_file": "ca.pem", "tls_worker_cert": "worker.pem", "tls_worker_key": "worker.key"}


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
        self._jobs: dict[str, str] = {}
        self._seen: set[str] = set()
        self._lost = self._results = 0
        self._next = self._since = time.monotonic()
        self._patience = _SILENCE_s
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

    def ask(self) -> None:
        """Submit the workers.

        Raises
        ------
        ResourceError
            If the batch system refuses them.
        """
        for _ in range(self.options.workers):
            self._submit()
        jobs = ", ".join(self._jobs.values())
        log.info("the workers are in the queue of %s: %s", self.queue.title, jobs)

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
            self._jobs[name] = self.queue.submitted(script, self.folder)
        return self._jobs[name]

    def tend(self, names: Set[str], results: int) -> None:
        """Submit jobs in the place of those that have ended; say what the queue does while there are none.

        Parameters
        ----------
        names : set of str
            Of the workers that are there.
        results : int
            How many items have been finished.

        Raises
        ------
        ResourceError
            If workers end as soon as they begin.
        """
        now = time.monotonic()
        if results > self._results:
            self._results, self._lost = results, 0
        self._seen |= set(names)
        if names:
            self._since, self._patience = now, _SILENCE_s
        missing = self._jobs.keys() - names
        if now < self._next or not missing:
            return
        closer = bool(missing & self._seen) or now - self._since < _SILENCE_s
        self._next = now + (_LOOK_CLOSER_s if closer else _LOOK_s)
        said = self.queue.lines(self._jobs.values(), self.folder)
        if said is None:
            self._say_silence(now, f"{self.queue.ask[0]} fails")
            return
        ended = {name for name in missing if self._jobs[name] not in said}
        for name in ended:
            del self._jobs[name]
        self._lost += len(ended)
        self._refuse_hopeless(names)
        if ended:
            new = ", ".join([self._submit() for _ in ended])
            log.warning("ended in the queue: %d; submitted in their place: %s", len(ended), new)
        waiting = [said[job] for job in self._jobs.values() if job in said]
        self._say_silence(now, "; ".join(waiting[:3]))

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
            "the workers end as soon as they begin, and leave no log in the job's folder",
            path=self.folder,
            hint="do the cluster's machines see it under this name? It must lie on a disk that all share",
        )

    def _last_words(self) -> tuple[Path, str]:
        """The log that was written last, and the last of its lines that may say what went wrong."""
        ours = {*_KEYS.values(), "worker.sh"}
        logs = [path for path in self.folder.iterdir() if path.name not in ours and path.suffix != ".pickle"]
        for path in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True):
            lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
            if telling := [line for line in lines if line and " - INFO - " not in line]:
                return path, telling[-1]
        return self.folder, ""

    def end(self) -> None:
        """Take all jobs out of the queue, and remove the keys."""
        with interrupts_put_off():
            self.queue.ended(self._jobs.values(), self.folder)
        self._jobs.clear()
        for name in _KEYS.values():
            (self.folder / name).unlink(missing_ok=True)
