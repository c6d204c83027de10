"""Run one function over many items: in this process, in local processes, or on a cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Future,
    ProcessPoolExecutor,
    wait,
)
from concurrent.futures import Executor as FuturesExecutor
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from halfmap.engine.attempt import Outcome, attempt, attempt_in_worker
from halfmap.engine.device import gpus_to_share, take_gpu
from halfmap.engine.interrupts import ATTENTION_s, interrupts_held, terminate_as_interrupt
from halfmap.engine.options import RunOptions
from halfmap.ops.cores import usable_cores

if TYPE_CHECKING:
    from halfmap.engine.cluster import Cluster

Item = TypeVar("Item")

_ATTEMPTS = 2
"""How often an item may take its worker down before it counts as failed."""

_PRELOADED = ("torch", "numba", "scipy.fft", "scipy.ndimage", "matplotlib.figure", "imagecodecs", "tifffile")
"""Libraries that take long to load and start no threads by that; polars does."""

_WORKER_DIED = "its worker process died twice, probably for want of memory; use fewer --workers"


def run_items(
    function: Callable[[Item], Any],
    items: Sequence[Item],
    options: RunOptions,
    *,
    folder: Path,
    cluster: Cluster | None = None,
    light: bool = False,
) -> Generator[tuple[int, Outcome]]:
    """Run `function` over `items` and yield ``(index, outcome)`` as they finish.

    Parameters
    ----------
    function : callable
        Importable function of one item (for workers it is pickled), returning plain data.
    items : sequence
        What to run it on; few are in flight at a time, so that a million cost no memory.
    options : RunOptions
        Executor, cluster and number of workers.
    folder : path
        Of the job, where what workers of a cluster need is put.
    cluster : Cluster, optional
        Whose workers are there for several loops; else they end with this one.
    light : bool
        Whether an item takes less than its way to a worker of a cluster, so that none is asked.
    """
    away = options.cluster != "none" and not light
    if len(items) == 0 or not (away or _needs_processes(options)):
        for index, item in enumerate(items):
            yield index, attempt(function, item)
    elif away:
        with shared_workers(options, folder, cluster) as workers:
            assert workers is not None
            yield from workers.run(function, items)
    else:
        pending = list(enumerate(items))[::-1]
        attempts = [0] * len(items)
        while pending:
            # A worker that dies (killed, out of memory) breaks the whole pool: open another, try again.
            with _pool(options) as pool:
                yield from _drain(pool, function, pending, attempts, in_flight=2 * options.workers)


@contextmanager
def shared_workers(
    options: RunOptions, folder: Path, held: Cluster | None = None
) -> Iterator[Cluster | None]:
    """Workers of a cluster for all loops in the block; nothing where there is no cluster.

    Parameters
    ----------
    options : RunOptions
        What is asked for.
    folder : path
        Of the job or project; workers must see it under the same name.
    held : Cluster, optional
        Workers that a chain of jobs has already: they are taken if they are what is asked for.
    """
    if options.cluster == "none":
        yield None
        return
    from halfmap.engine.cluster import Cluster

    if held is not None and held.serves(options):
        yield held
        return
    with terminate_as_interrupt(), Cluster(options, folder) as own:
        yield own


def _needs_processes(options: RunOptions) -> bool:
    """Whether items run in local processes, not in this one."""
    wanted = options.executor == "processes" or (options.executor == "auto" and options.workers > 1)
    return wanted and options.cluster == "none"


def _drain(
    pool: FuturesExecutor,
    function: Callable[[Any], Any],
    pending: list[tuple[int, Any]],
    attempts: list[int],
    in_flight: int,
) -> Iterator[tuple[int, Outcome]]:
    """Run `pending` (taken from its end) until it is empty or the pool breaks; put back what was lost."""
    running: dict[Future[Outcome], tuple[int, Any]] = {}
    broken = False
    # Nothing is cancelled when the loop is left early: the pool kills its workers, and its own thread ends
    # what waits; a future that is already cancelled makes that thread fail.
    while running or (pending and not broken):
        while pending and not broken and len(running) < in_flight:
            # An item that broke a pool before runs alone, so that only the guilty one is blamed.
            if running and any(attempts[index] for index, _ in (*running.values(), pending[-1])):
                break
            index, item = pending.pop()
            try:
                # Submitting may start a worker.
                with interrupts_held():
                    future = pool.submit(attempt_in_worker, function, item)
                running[future] = index, item
            except BrokenExecutor:
                pending.append((index, item))
                broken = True
        # The system may hand Ctrl-C to any thread; this one hears of it when it wakes.
        done, _ = wait(running, timeout=ATTENTION_s, return_when=FIRST_COMPLETED)
        for future in done:
            index, item = running.pop(future)
            try:
                yield index, future.result()
            except (BrokenExecutor, CancelledError):
                broken = True
                attempts[index] += 1
                if attempts[index] < _ATTEMPTS:
                    pending.append((index, item))
                else:
                    yield index, Outcome(error=_WORKER_DIED)
            except Exception as error:
                # The item or its result could not be sent between processes.
                message = f"{type(error).__name__}: {error}"
                yield index, Outcome(error=message, trace=traceback.format_exc())


def prepare_workers(options: RunOptions) -> None:
    """Refuse workers that cannot be, and start the process that local ones are copied from, if it is needed.

    It loads the large libraries while this one goes on, and copies of it have them at once. This one cannot
    be copied itself: it may have threads, whose locks would stay locked in a copy for ever.

    Raises
    ------
    ParameterError, ResourceError
        If options of the cluster make no sense, or a package or command that it needs is missing.
    """
    options.refuse_idle()
    if options.cluster != "none":
        from halfmap.engine.cluster import require_cluster

        require_cluster(options)
        return
    if not _needs_processes(options):
        return
    server, limits = forkserver._forkserver, thread_limits(threads_of(options))
    if getattr(server, "halfmap_limits", limits) != limits:
        # Libraries keep the number of threads that they began with.
        server._stop()  # type: ignore[attr-defined]
    before = {name: os.environ.get(name) for name in limits}
    os.environ.update(limits)
    try:
        forkserver.set_forkserver_preload(list(_PRELOADED))
        with interrupts_held():
            forkserver.ensure_running()
        server.halfmap_limits = limits  # type: ignore[attr-defined]
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def threads_of(options: RunOptions) -> int:
    """Threads of a worker, whose cores are its own on a cluster and shared on this machine."""
    if options.is_remote:
        return options.cores_per_worker
    return max(1, usable_cores() // options.workers)


def thread_limits(threads: int) -> dict[str, str]:
    """Environment variables by which libraries take so many threads."""
    names = (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "NUMBA_NUM_THREADS",
        "POLARS_MAX_THREADS",
    )
    return {name: str(threads) for name in names}


@contextmanager
def _pool(options: RunOptions) -> Iterator[FuturesExecutor]:
    prepare_workers(options)
    context = multiprocessing.get_context("forkserver")
    gpus = gpus_to_share(options)
    count = context.Value("i", 0) if gpus else None
    pool = ProcessPoolExecutor(options.workers, context, _start_worker, (threads_of(options), gpus, count))
    try:
        yield pool
    except BaseException:
        # Interrupted, or stopped by a failure: nobody waits for the items in flight.
        for process in list((pool._processes or {}).values()):
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(threads: int, gpus: Sequence[str], count: Any) -> None:
    """Give a worker its threads and GPU, leave interrupts to the parent, end with it however that ends."""
    import threading

    os.environ.update(thread_limits(threads))
    if gpus:
        with count.get_lock():
            take_gpu(gpus, count.value)
            count.value += 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not the process it is a copy of: that one lives for as long as any of its copies does.
    asker = multiprocessing.parent_process()
    assert asker is not None

    def watch() -> None:
        asker.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
