"""Run one function over many items: in this process, in local processes, or on a Dask cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
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
from dataclasses import dataclass, replace
from logging.handlers import QueueHandler
from multiprocessing import forkserver
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

from halfmap.engine.parameters import Form, Param
from halfmap.errors import HalfmapError
from halfmap.io.atomic import is_out_of_resources
from halfmap.log import log

Item = TypeVar("Item")

_ATTEMPTS = 2
"""How often an item may take its worker down before it counts as failed."""

_ATTENTION_s = 0.3
"""How often the wait for workers looks up to see whether it was interrupted."""

_PRELOADED = ("torch", "numba", "scipy.fft", "scipy.ndimage", "matplotlib.figure", "imagecodecs", "tifffile")
"""Libraries that take long to load and start no threads by that; polars does."""

_WORKER_DIED = "its worker process died twice, probably for want of memory; use fewer --workers"


class RunOptions(Form):
    """How a step runs, which changes nothing in what it computes."""

    executor: Literal["auto", "serial", "processes", "dask"] = Param(
        "auto",
        "where items run: in this process, in local processes, on a local Dask cluster",
        unit="none",
        section="Run",
    )
    workers: int = Param(1, "number of items run at a time", unit="none", section="Run", ge=1)
    device: str = Param(
        "auto", "auto, cpu, cuda or cuda:N; only auto may fall back to the CPU", unit="none", section="Run"
    )
    max_failures: int | None = Param(
        None,
        "stop when more items than this have failed; default: never while any succeed",
        unit="none",
        section="Run",
        ge=0,
    )


@dataclass(frozen=True)
class Outcome:
    """What came of one item: a result, or an error as the user should read it with its traceback."""

    result: Any = None
    error: str | None = None
    trace: str | None = None
    seconds: float = 0.0
    fatal: bool = False
    """Whether other items would fail alike, for want of disk space or permission."""
    messages: tuple[logging.LogRecord, ...] = ()
    """What a worker process logged, where nobody hears it."""


def attempt(function: Callable[[Any], Any], item: Any) -> Outcome:
    """Call `function(item)` and turn any exception into an `Outcome`."""
    start = time.perf_counter()
    fatal = False
    try:
        return Outcome(result=function(item), seconds=time.perf_counter() - start)
    except HalfmapError as error:
        message, trace, fatal = str(error), None, is_out_of_resources(error)
    except MemoryError:
        message = "out of memory; use fewer workers (--workers) or a machine with more memory"
        trace = traceback.format_exc()
    except Exception as error:
        message, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        fatal = is_out_of_resources(error)
    return Outcome(error=message, trace=trace, seconds=time.perf_counter() - start, fatal=fatal)


def _attempt_in_worker(function: Callable[[Any], Any], item: Any) -> Outcome:
    """As `attempt`, for another process than the job's: what is logged comes back with the outcome."""
    queue: SimpleQueue[logging.LogRecord] = SimpleQueue()
    handler, level = QueueHandler(queue), log.level  # type: ignore[arg-type] - it needs no more than put_nowait
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        outcome = attempt(function, item)
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
    return replace(outcome, messages=tuple(queue.get() for _ in range(queue.qsize())))


def run_items(
    function: Callable[[Item], Any], items: Sequence[Item], options: RunOptions
) -> Generator[tuple[int, Outcome]]:
    """Run `function` over `items` and yield ``(index, outcome)`` as they finish.

    Parameters
    ----------
    function : callable
        Importable function of one item (for workers it is pickled), returning plain data.
    items : sequence
        What to run it on; few are in flight at a time, so that a million cost no memory.
    options : RunOptions
        Executor and number of workers.
    """
    if (
        len(items) == 0
        or options.executor == "serial"
        or (options.executor == "auto" and options.workers == 1)
    ):
        for index, item in enumerate(items):
            yield index, attempt(function, item)
        return
    pending = list(enumerate(items))[::-1]
    attempts = [0] * len(items)
    while pending:
        # A worker that dies (killed, out of memory) breaks the whole pool: open another, try its items again.
        with _pool(options) as pool:
            yield from _drain(pool, function, pending, attempts, in_flight=2 * options.workers)


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
        # An item that broke a pool before runs alone, so that only the guilty one is blamed.
        limit = 1 if pending and attempts[pending[-1][0]] else in_flight
        while pending and not broken and len(running) < limit:
            index, item = pending.pop()
            try:
                # Submitting may start a worker.
                with _interrupts_held():
                    future = pool.submit(_attempt_in_worker, function, item)
                running[future] = index, item
            except BrokenExecutor:
                pending.append((index, item))
                broken = True
        # The system may hand Ctrl-C to any thread; this one hears of it when it wakes.
        done, _ = wait(running, timeout=_ATTENTION_s, return_when=FIRST_COMPLETED)
        for future in done:
            index, item = running.pop(future)
            try:
                yield index, future.result()
            except Exception as error:
                if not _is_loss_of_worker(error):
                    message = f"{type(error).__name__}: {error}"
                    yield index, Outcome(error=message, trace=traceback.format_exc())
                    continue
                broken = True
                attempts[index] += 1
                if attempts[index] < _ATTEMPTS:
                    pending.append((index, item))
                else:
                    yield index, Outcome(error=_WORKER_DIED)


def _is_loss_of_worker(error: Exception) -> bool:
    """Whether the worker is gone; else the item or its result could not be sent between processes."""
    if isinstance(error, BrokenExecutor | CancelledError):
        return True
    return type(error).__module__.partition(".")[0] == "distributed"  # KilledWorker, CommClosedError, …


def prepare_workers(options: RunOptions) -> None:
    """Start the process that local workers are copied from, unless the options ask for none.

    It loads the large libraries while this one goes on, and copies of it have them at once. This one cannot
    be copied itself: it may have threads, whose locks would stay locked in a copy for ever.
    """
    if not (options.executor == "processes" or (options.executor == "auto" and options.workers > 1)):
        return
    server, limits = forkserver._forkserver, _thread_limits(_threads(options))
    if getattr(server, "halfmap_limits", limits) != limits:
        # Libraries keep the number of threads that they began with.
        server._stop()  # type: ignore[attr-defined]
    before = {name: os.environ.get(name) for name in limits}
    os.environ.update(limits)
    try:
        forkserver.set_forkserver_preload(list(_PRELOADED))
        with _interrupts_held():
            forkserver.ensure_running()
        server.halfmap_limits = limits  # type: ignore[attr-defined]
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _threads(options: RunOptions) -> int:
    return max(1, (os.cpu_count() or 1) // options.workers)


@contextmanager
def _pool(options: RunOptions) -> Iterator[FuturesExecutor]:
    threads = _threads(options)
    if options.executor != "dask":
        prepare_workers(options)
        context = multiprocessing.get_context("forkserver")
        pool = ProcessPoolExecutor(options.workers, context, _start_worker, (threads,))
        try:
            yield pool
        except BaseException:
            # Interrupted, or stopped by a failure: nobody waits for the items in flight.
            for process in list((pool._processes or {}).values()):
                process.kill()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    else:
        from distributed import Client, LocalCluster

        environment = _thread_limits(threads)
        with _interrupts_held():
            cluster = LocalCluster(
                n_workers=options.workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address="127.0.0.1:0",  # any free port: two jobs cannot share the default one
                env=environment,
            )
        with cluster, Client(cluster) as client:
            yield client.get_executor(pure=False)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Put off Ctrl-C, and keep it from the processes started meanwhile: their parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _thread_limits(threads: int) -> dict[str, str]:
    names = (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "NUMBA_NUM_THREADS",
        "POLARS_MAX_THREADS",
    )
    return {name: str(threads) for name in names}


def _start_worker(threads: int) -> None:
    """Limit a worker's threads, leave interrupts to the parent, end with the parent however that ends."""
    import threading

    os.environ.update(_thread_limits(threads))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The process it is a copy of, which ends with the job's.
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
