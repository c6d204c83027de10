"""What a step is given to run in: its folder, the loop over items, progress, failures."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from halfmap.engine.attempt import Outcome
from halfmap.engine.decisions import Decisions
from halfmap.engine.executor import run_items
from halfmap.engine.ledger import Ledger
from halfmap.engine.options import RunOptions
from halfmap.engine.progress import Progress, append_event, duration
from halfmap.engine.step import parse_step, registered_steps
from halfmap.errors import ItemsFailedError, ResourceError, TooManyFailedError
from halfmap.io.atomic import write_text, writing
from halfmap.io.names import name_in
from halfmap.log import log

if TYPE_CHECKING:
    from halfmap.engine.cluster import Cluster

Item = TypeVar("Item")

_EVENTS = "events.jsonl"

_WITHIN = "step.json"
"""Record of a step that another one has run, written when it has ended well."""


@dataclass(frozen=True)
class Failure:
    """An item that failed and why."""

    key: str
    reason: str
    unit: str = "item"


@dataclass
class Context:
    """The surroundings of one run of a step.

    Parameters
    ----------
    folder : path
        Folder of the job; everything the step writes goes here.
    project : path
        Root of the project; names inside STAR files are relative to it.
    options : RunOptions
        Executor, workers, device, failures allowed.
    device : str
        Device resolved from the options.
    cluster : Cluster, optional
        Workers that all loops share; without them each loop has its own.
    growing : bool
        Whether more items are to come: what is decided from all of them is kept for a while.
    """

    folder: Path
    project: Path
    options: RunOptions = field(default_factory=RunOptions)
    device: str = "cpu"
    cluster: Cluster | None = None
    growing: bool = False
    failures: list[Failure] = field(default_factory=list)
    _round_began: float = field(default_factory=lambda: time.monotonic(), init=False, repr=False)

    @property
    def decisions(self) -> Decisions:
        """What the job decides from all of its items."""
        return Decisions(self.folder, self.growing)

    def relative(self, path: str | Path) -> str:
        """Name of a file as tables store it: relative to the project, absolute when outside it."""
        return name_in(path, self.project).as_posix()

    def resolve(self, name: str | Path) -> Path:
        """Where a file named in a table lies."""
        return self.project / name

    def map(
        self,
        function: Callable[[Item], Any],
        items: Sequence[Item],
        *,
        key: Callable[[Item], str] | None = None,
        unit: str = "item",
        version: Callable[[Item], str | None] | None = None,
        files: Callable[[Item], str] | None = None,
        light: bool = False,
    ) -> list[Any]:
        """Run `function` over `items` and return the results of those that succeeded, in the items' order.

        The one loop over items. It resumes (finished items are read back from the job's ledger), shows
        progress, isolates errors (a failed item is listed in `failures` and the rest goes on), and runs on
        whatever executor the options name.

        Parameters
        ----------
        function : callable
            Importable function of one item; `functools.partial` carries what all items share. It writes its
            own files (whole or not at all) and returns plain data that JSON can hold.
        items : sequence
            The items, of any picklable kind.
        key : callable, optional
            Name of an item, unique among the items and the same in every run; by default its attribute
            `name`, or the item itself as text.
        unit : str
            Singular word for an item, unique among the loops of a step.
        version : callable, optional
            What an item's result depends on that may change until the job is resumed, as a short text. One
            that was done as another version is done again; None where it cannot be told. While more items are
            to come, one that failed is not tried again as the same version.
        files : callable, optional
            Name under which it writes its files, if that depends on the other items. It is done again where
            the name has changed, or another item has written under it since.
        light : bool
            Whether an item takes milliseconds, less than its way to a worker of a cluster.

        Raises
        ------
        ItemsFailedError
            If every item failed, or more than the options allow.
        ResourceError
            If an item found the disk full or the folder closed to it, as all others would.
        """
        keys = [(key or _name)(item) for item in items]
        if len(set(keys)) != len(keys):
            raise ValueError(f"two {unit}s have the same key")
        ledger = Ledger(self.folder / "items.jsonl")
        ledger.repair()
        wanted = set(keys)
        versions = {} if version is None else dict(zip(keys, map(version, items), strict=True))
        names = {} if files is None else dict(zip(keys, map(files, items), strict=True))
        before = ledger.done(unit, versions, names)
        results = {name: result for name, result in before.items() if name in wanted}
        failed = ledger.failed(unit, versions) if self.growing else {}
        failed = {name: reason for name, reason in failed.items() if name in wanted}
        ended = results.keys() | failed.keys()
        todo = [(name, item) for name, item in zip(keys, items, strict=True) if name not in ended]
        if results:
            log.info("%d of %d %ss were done before", len(results), len(keys), unit)
        failures_before = len(self.failures)
        for name, reason in failed.items():
            self.fail(unit, name, reason)
        progress = Progress(self.folder / _EVENTS, unit, done=len(ended), total=len(keys))
        rest = [item for _, item in todo]
        outcomes = run_items(
            function, rest, self.options, folder=self.folder, cluster=self.cluster, light=light
        )
        # Closing ends the workers before the job's lock is given back, however the loop ends.
        with progress, closing(outcomes):
            for index, outcome in outcomes:
                name = todo[index][0]
                _repeat(outcome.messages)
                if outcome.error is None:
                    results[name] = ledger.append(
                        unit, name, outcome.result, outcome.seconds, versions.get(name), names.get(name)
                    )
                else:
                    if outcome.lasting and (now := versions.get(name)) is not None:
                        ledger.append_failure(unit, name, outcome.error, now, names.get(name))
                    self._give_up(unit, name, outcome)
                progress.advance(name, outcome.seconds, outcome.error)
        if keys and not results:
            first = self.failures[failures_before].reason
            raise ItemsFailedError(f"every {unit} failed", hint=f"the first one: {first}")
        return [results[name] for name in keys if name in results]

    def run_within(self, name: str, folder: str, **values: Any) -> Path:
        """Run another step as part of this one, in a folder of this job's, unless that is done.

        It resumes as a job of its own does. What it was is kept beside its outputs.

        Parameters
        ----------
        name : str
            Of the step, as on the command line.
        folder : str
            Below this job's.
        values
            Parameters of the step.

        Returns
        -------
        Path
            Folder of its outputs.

        Raises
        ------
        HalfmapError
            What stopped it.
        """
        step = parse_step(registered_steps()[name], values)
        what = {"step": name, "parameters": step.model_dump(mode="json")}
        inner = Context(
            self.folder / folder, self.project, self.options, self.device, self.cluster, self.growing
        )
        path = inner.folder / _WITHIN
        done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if {key: done.get(key) for key in what} == what:
            inner.failures.extend(Failure(**failure) for failure in done["failures"])
        else:
            with writing(inner.folder):
                inner.folder.mkdir(parents=True, exist_ok=True)
            step.run(inner)
            record = what | {"failures": [asdict(failure) for failure in inner.failures]}
            write_text(path, json.dumps(record, indent=2) + "\n")
        self.failures.extend(inner.failures)
        self._check_failures()
        return inner.folder

    def picture(self, file: str, made_from: Sequence[str], draw: Callable[[Path], None]) -> None:
        """Draw a picture of all items; while more are to come, one of most of them is kept.

        Parameters
        ----------
        file : str
            Its name in the job's folder.
        made_from : sequence of str
            Names of the items.
        draw : callable
            Draws it to the path that it is given.
        """
        path = self.folder / file
        if self.decisions.hold(file, made_from) and self.growing and path.exists():
            return
        draw(path)
        self.decisions.note(file, made_from)

    def round_done(
        self, number: int, total: int | None, said: str, *, unit: str = "iteration", rest: float | None = None
    ) -> None:
        """Note that a round of loops is over, for those who ask how far the job is.

        Parameters
        ----------
        number : int
            Of the round, from 1.
        total : int, optional
            Rounds that there will be, if that is known.
        said : str
            What it gave, in a line.
        unit : str
            Singular word for a round.
        rest : float, optional
            Work of all rounds to come, in parts of that of this one, from which the time left is told.
        """
        now = time.monotonic()
        values = {"unit": unit, "done": number, "total": total, "said": said}
        if rest:
            values["left_s"] = round(rest * (now - self._round_began))
            log.info("about %s left", duration(values["left_s"]))
        self._round_began = now
        append_event(self.folder / _EVENTS, "round", values)

    def fail(self, unit: str, key: str, reason: str, trace: str | None = None) -> None:
        """Count an item as failed: it is logged, and listed in the job's ``failures.star``.

        Raises
        ------
        ItemsFailedError
            If more have failed, here and in `map` together, than the options allow.
        """
        self._record_failure(unit, key, reason, trace)
        self._check_failures()

    def _give_up(self, unit: str, key: str, outcome: Outcome) -> None:
        """Count an item as failed; end the loop if all others would fail alike, or enough have."""
        error = outcome.error or ""
        self._record_failure(unit, key, error, outcome.trace)
        if outcome.fatal:
            raise ResourceError(error)
        self._check_failures()

    def _record_failure(self, unit: str, key: str, reason: str, trace: str | None) -> None:
        self.failures.append(Failure(key=key, reason=reason, unit=unit))
        # Most reasons begin with the file's name, which is what most keys are.
        log.error("%s", reason if key in reason else f"{unit} {key}: {reason}")
        if trace:
            log.debug("%s", trace)

    def _check_failures(self) -> None:
        allowed = self.options.max_failures
        if allowed is None or len(self.failures) <= allowed:
            return
        units = {failure.unit for failure in self.failures}
        unit = units.pop() if len(units) == 1 else "item"
        raise TooManyFailedError(
            f"{len(self.failures)} {unit}{'' if len(self.failures) == 1 else 's'} failed, "
            f"more than the {allowed} allowed",
            hint=f"the last one: {self.failures[-1].reason}",
        )


def _name(item: object) -> str:
    return str(getattr(item, "name", item))


def _repeat(messages: Iterable[logging.LogRecord]) -> None:
    """Log what a worker process has logged, at the levels that are heard here."""
    for message in messages:
        if log.isEnabledFor(message.levelno):
            log.handle(message)
