"""Workers on a cluster, from the first loop that needs them to the end of the job or of the chain of jobs."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import halfmap
from halfmap.engine.attempt import Outcome
from halfmap.engine.batch import BatchWorkers
from halfmap.engine.device import gpus_to_share
from halfmap.engine.executor import thread_limits, threads_of
from halfmap.engine.interrupts import ATTENTION_s, interrupts_held, interrupts_put_off
from halfmap.engine.kubernetes import KubernetesWorkers
from halfmap.engine.kubernetes import require as require_kubernetes
from halfmap.engine.options import RunOptions
from halfmap.engine.progress import duration
from halfmap.engine.queues import QUEUES
from halfmap.engine.work import run_item, write_work
from halfmap.errors import ResourceError
from halfmap.io.atomic import writing
from halfmap.log import log

Item = TypeVar("Item")

FOLDER = "Workers"
"""Below the job's or the project's: what workers read, and what they log."""

_TRIES = 3
"""How often the worker of an item may be lost before the item counts as failed."""

_END_s = 10.0
"""How long the end of the workers may take before nobody waits for it."""

_IDLE_s = 600.0
"""Time after which workers that have nothing to do are let go: others wait in the queue for their place."""

_NO_LIMITS = {
    # What an item takes is its own affair: Dask would stop giving work to a worker that has used much.
    **dict.fromkeys(
        (f"DASK_DISTRIBUTED__WORKER__MEMORY__{name}" for name in ("TARGET", "SPILL", "PAUSE", "TERMINATE")),
        "False",
    ),
}

_HANDED_ON = ("PYTHONPATH",)
"""Variables of this process that workers need too."""


class Workers(Protocol):
    """Where workers come from."""

    def start(self) -> Any:
        """Start a scheduler of Dask's."""

    def tend(self, need: int, names: Set[str], results: int) -> None:
        """See to it that there are as many workers as there is need of; those of some names are there."""

    def dismiss(self, names: Set[str]) -> None:
        """End some that have nothing to do."""

    def end(self) -> None:
        """End them at once."""


class LocalWorkers:
    """Workers on this machine, which Dask starts again where they die."""

    def __init__(self, options: RunOptions, environment: dict[str, str]) -> None:
        self.options, self.environment = options, environment
        self._cluster: Any = None

    def start(self) -> Any:
        """Start scheduler and workers, which keep no Ctrl-C from their parent."""
        from distributed import LocalCluster

        with interrupts_held():
            self._cluster = LocalCluster(
                n_workers=self.options.workers,
                threads_per_worker=1,
                processes=True,
                memory_limit=None,
                dashboard_address="127.0.0.1:0",  # any free port: two jobs cannot share the default one
                silence_logs=50,
                env=self.environment,
            )
        return self._cluster

    def tend(self, need: int, names: Set[str], results: int) -> None:
        """Nothing: Dask does."""

    def dismiss(self, names: Set[str]) -> None:
        """Nothing: nobody waits for their place."""

    def end(self) -> None:
        """Kill them: each waits for what it is at when it is asked to end."""
        for nanny in self._cluster.workers.values() if self._cluster is not None else ():
            nanny.auto_restart = False
            with suppress(ProcessLookupError, TypeError):
                os.kill(nanny.pid, signal.SIGKILL)


def require_cluster(options: RunOptions) -> None:
    """Refuse a cluster that cannot be used from this machine.

    Raises
    ------
    ResourceError, ParameterError
        If a package or command is missing, or options make no sense to it.
    """
    if options.cluster in QUEUES:
        QUEUES[options.cluster].require(options)
    elif options.cluster == "kubernetes":
        require_kubernetes(options)


class Cluster:
    """Workers of loops one after the other, which are asked for when the first begins and end with the block.

    Parameters
    ----------
    options : RunOptions
        Which cluster, how many workers, what each needs.
    folder : path
        Of the job or the project, which workers must see under the same name.

    Notes
    -----
    Never more are asked for than the loop has items. Those that have had nothing to do for ten minutes, in a
    loop or between loops, are let go; what comes later asks anew.

    Each worker has one item at a time. A worker that is lost (killed, out of memory or of time) costs that
    item alone, which is tried again on another; one whose workers are lost three times counts as failed.
    """

    def __init__(self, options: RunOptions, folder: Path) -> None:
        self.options, self.folder = options, folder / FOLDER
        self._workers: Workers | None = None
        self._dask: Any = None
        self._client: Any = None
        self._gpus: tuple[str, ...] = ()
        self._results = 0
        self._used: dict[str, float] = {}
        self._lock, self._is_busy = threading.RLock(), False
        self._leave: threading.Timer | None = None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(keep_logs=error is not None)

    def serves(self, options: RunOptions) -> bool:
        """Whether these are the workers that a job with such options would ask for."""
        names = RunOptions.model_fields.keys() - {"max_failures"}
        return all(getattr(options, name) == getattr(self.options, name) for name in names)

    def run(self, function: Callable[[Item], Any], items: Sequence[Item]) -> Generator[tuple[int, Outcome]]:
        """Run `function` over `items` and yield ``(index, outcome)`` as they finish; see `run_items`.

        Raises
        ------
        ResourceError
            If the cluster gives no workers, or its connection is lost.
        """
        path: Path | None = None
        try:
            self._begin()
            path = write_work(self.folder, function, items)
            yield from self._run(path, len(items))
        except BaseException:
            # Nobody waits for the items in flight.
            self.close(keep_logs=True)
            raise
        finally:
            if path is not None:
                path.unlink(missing_ok=True)
            self._rest()

    def _begin(self) -> None:
        with self._lock:
            if self._leave is not None:
                self._leave.cancel()
            self._is_busy, self._used = True, {}
            if self._client is None:
                self._open()

    def _rest(self) -> None:
        """Let the workers go if no other loop begins for long."""
        self._is_busy = False
        if self._client is not None:
            self._leave = threading.Timer(_IDLE_s, self._let_go)
            self._leave.daemon = True
            self._leave.start()

    def _let_go(self) -> None:
        with self._lock:
            if not self._is_busy and self._client is not None:
                log.info("nothing to do for %s: the workers are let go until there is", duration(_IDLE_s))
                self.close()

    def _open(self) -> None:
        from distributed import Client

        with writing(self.folder):
            # Whoever was killed has left logs, which tell nothing of these workers.
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        environment = thread_limits(threads_of(self.options)) | _NO_LIMITS
        environment |= {name: os.environ[name] for name in _HANDED_ON if name in os.environ}
        if self.options.cluster == "local":
            self._gpus = gpus_to_share(self.options)
            self._workers = LocalWorkers(self.options, environment)
        elif self.options.cluster == "kubernetes":
            self._workers = KubernetesWorkers(self.options, environment)
        else:
            self._workers = BatchWorkers(self.options, self.folder, environment)
        with interrupts_put_off():
            self._dask = self._workers.start()
            self._client = Client(self._dask, set_as_default=False)

    def _run(self, path: Path, count: int) -> Generator[tuple[int, Outcome]]:
        pending, lost = deque(range(count)), [0] * count
        running: dict[Future[Outcome], tuple[int, str]] = {}
        while pending or running:
            names = self._connected()
            busy = {address for _, address in running.values()}
            self._tend(names, busy, len(pending))
            for address in [address for address in names if address not in busy][: len(pending)]:
                index = pending.popleft()
                running[self._submit(path, index, address)] = index, address
            if not running:
                time.sleep(ATTENTION_s)
                continue
            done, _ = wait(running, timeout=ATTENTION_s, return_when=FIRST_COMPLETED)
            gone = {future for future, (_, address) in running.items() if address not in names} - done
            for future in (*done, *gone):
                index, _ = running.pop(future)
                outcome = _outcome(future) if future in done else None
                if outcome is None:
                    future.cancel()
                    lost[index] += 1
                    outcome = self._lost(lost[index])
                    if outcome is None:
                        pending.append(index)
                        continue
                self._results += 1
                yield index, outcome

    def _tend(self, names: dict[str, str], busy: Set[str], pending: int) -> None:
        """Have as many workers as there is work for, and let go of those that have had none for long."""
        assert self._workers is not None
        now = time.monotonic()
        self._used = {each: now if each in busy else self._used.get(each, now) for each in names}
        idle = {each for each, last in self._used.items() if now - last > _IDLE_s}
        if idle and not pending:
            self._workers.dismiss({names[each] for each in idle})
            self._used.update(dict.fromkeys(idle, now))
        need = min(self.options.workers, pending + len(busy))
        self._workers.tend(need, set(names.values()), self._results)

    def _connected(self) -> dict[str, str]:
        """Addresses of the workers that are there, with their names."""
        try:
            workers = self._client.scheduler_info(n_workers=-1)["workers"]
        except (OSError, TimeoutError) as error:
            raise ResourceError(f"the connection to the workers' scheduler is lost: {error}") from error
        return {address: str(one["name"]) for address, one in workers.items()}

    def _submit(self, path: Path, index: int, address: str) -> Future[Outcome]:
        # Each by name to one worker, so that what is lost with a worker is known.
        pool = self._client.get_executor(pure=False, workers=[address])
        return pool.submit(run_item, path, index, halfmap.__version__, self._gpus)

    def _lost(self, times: int) -> Outcome | None:
        """What comes of an item whose worker was lost, if it is not tried again."""
        if times < _TRIES:
            log.warning("a worker was lost; its item is tried again on another")
            return None
        why = "probably for want of memory; use fewer --workers"
        if self.options.is_remote:
            why = (
                "for want of memory (ask for more --memory-per-worker), at the end of the worker's time "
                "(--walltime), or taken by the cluster for others' jobs"
            )
        return Outcome(error=f"its worker was lost {times} times: {why}")

    def close(self, *, keep_logs: bool = False) -> None:
        """End the workers at once, whatever they do; nothing of them is left in a queue."""
        with interrupts_put_off(), self._lock:
            if self._leave is not None:
                self._leave.cancel()
            if self._workers is None:
                return
            self._workers.end()
            for each in (self._client, self._dask):
                if each is not None:
                    with suppress(Exception):
                        each.close(timeout=_END_s)
            self._workers = self._client = self._dask = None
            if not keep_logs:
                # A batch system may be writing the last lines of a log still.
                shutil.rmtree(self.folder, ignore_errors=True)


def _outcome(future: Future[Outcome]) -> Outcome | None:
    """What came of an item, or nothing if its worker went with it."""
    try:
        return future.result()
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("distributed", "concurrent", "asyncio"):
            return None
        # The result could not be sent.
        return Outcome(error=f"{type(error).__name__}: {error}")
