"""The command `halfmap live`: the chain kept up to date while a microscope writes movies."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import create_model

from halfmap.engine import RunOptions
from halfmap.engine.decisions import GROWTH
from halfmap.engine.executor import shared_workers
from halfmap.engine.parameters import parse_form
from halfmap.errors import (
    HalfmapError,
    ItemsFailedError,
    ProjectError,
    ResourceError,
    TableError,
    TooManyFailedError,
)
from halfmap.log import log, terminal_filtered
from halfmap.project import Project
from halfmap.project.locks import chain_locked
from halfmap.workflow.arrivals import ARRIVED, Arrivals, Watch
from halfmap.workflow.chain import Chain
from halfmap.workflow.live_page import FEWEST, PAGE, look, write_page
from halfmap.workflow.measured import read_particle_facts
from halfmap.workflow.record import read_record
from halfmap.workflow.run import settings_of
from halfmap.workflow.settings import RunSettings
from halfmap.workflow.stages import STAGES

if TYPE_CHECKING:
    from halfmap.engine.cluster import Cluster

LAST_STAGE, LAST_OF_ROUND = "first-class2d", "first-extract"
"""Stages up to which the chain runs when classes are due, and else."""

_LOOK_s = 3.0
"""Time between two looks into the folder."""

_AGAIN_s = 60.0
"""Time after which a round is tried again that could not be."""

_PASSING = (ItemsFailedError, TableError, ProjectError, ResourceError)
"""Errors of a round that more movies, another process or somebody who frees the disk may mend."""


_NOT_LIVE = {"movies", "micrographs", "particles", "until", "anew"}

_KNOWN: dict[str, Any] = {
    name: (info.rebuild_annotation(), info)
    for name, info in RunSettings.model_fields.items()
    if name not in _NOT_LIVE
}

LiveSettings = create_model("LiveSettings", __base__=Watch, __doc__=Watch.__doc__, **_KNOWN)
"""What `halfmap live` takes: what is watched, and what is known of the data set."""


def run_live(project: Project, given: Mapping[str, Any], options: RunOptions) -> None:
    """Watch a folder and keep the chain up to date, until it is quiet or the time is over.

    Parameters
    ----------
    project : Project
        Where the jobs are, or are to be made.
    given : mapping
        Values of `LiveSettings` that are given.
    options : RunOptions
        How each job runs; what of all is not given is as of the session before.

    Raises
    ------
    ProjectError
        If another chain works in the project.
    ParameterError
        If the settings cannot be.
    HalfmapError
        What stopped a job and no movie to come can mend; what is done is kept.
    """
    with chain_locked(project.root):
        _run_session(project, given, options)


def _run_session(project: Project, given: Mapping[str, Any], options: RunOptions) -> None:
    record = read_record(project.root)
    options = options.continued(record.run)
    asked = {name: value for name, value in given.items() if name in Watch.model_fields}
    watch = parse_form(Watch, {**record.live, **asked})
    known = {name: value for name, value in given.items() if name not in Watch.model_fields}
    known["movies"] = (project.root / ARRIVED,)
    settings = settings_of(project, known)
    arrivals = watch.arrivals(project.root, settings)
    project = replace(project, goes_on="the same command")
    with terminal_filtered(_Terminal()), shared_workers(options, project.root) as cluster:
        Session(project, settings, options, watch, arrivals, cluster).run()


@dataclass
class Session:
    """One run of `halfmap live`.

    Parameters
    ----------
    project, settings, options
        As of `Chain`.
    watch : Watch
        What is watched, and until when.
    arrivals : Arrivals
        The movies.
    cluster : Cluster, optional
        Workers that all jobs share.
    """

    project: Project
    settings: RunSettings
    options: RunOptions
    watch: Watch
    arrivals: Arrivals
    cluster: Cluster | None = None
    _classed: tuple[int, float] = field(default=(0, 0.0), init=False)
    """Particles of the last classes, and the date of their table."""
    _classed_at: float = field(default=0.0, init=False)
    """When those classes were first seen, as of `time.monotonic`: dates are of the file server's clock."""
    _not_ours: set[str] = field(default_factory=set, init=False)
    """Jobs that had been replaced before the session began."""
    _needed: tuple[Path, ...] = field(default=(), init=False)
    """Files and folders that others write, all there when the session began."""
    _said: str = field(default="", init=False)

    def run(self) -> None:
        """Go round until it is over, then bring everything up to date once more with nothing more to come."""
        stages = read_record(self.project.root).stages
        self._not_ours = {name for stage in stages for name in stage.replaced}
        self._needed = tuple(
            path for path in (self.arrivals.folder, *self.arrivals.left_out) if path.exists()
        )
        _say(f"watching {self.arrivals.folder}; Ctrl-C ends, the same command goes on")
        try:
            self._go_round()
        except KeyboardInterrupt:
            _say("stopped; the same command goes on, and `halfmap run` with this project goes on to a map")
            raise
        self._take_last(is_quiet=self._is_quiet())
        if self.arrivals.taken:
            _say("no more is waited for; what was decided from a part of the movies is decided from all")
            self._finish()

    def _go_round(self) -> None:
        begun, tried, behind = time.monotonic(), 0.0, True
        while not self._is_late(begun):
            new = self.arrivals.take()
            behind = behind or new > 0
            if behind and self.arrivals.taken and (new or time.monotonic() - tried > _AGAIN_s):
                behind, tried = not self._round(), time.monotonic()
            elif self._is_quiet():
                return
            else:
                time.sleep(min(_LOOK_s, self.watch.settle / 2 + 0.1))

    def _take_last(self, *, is_quiet: bool) -> None:
        """Take what is whole, waiting once for files that may still be written.

        Where nothing has changed for long enough to end, what cannot be read is broken.
        """
        self.arrivals.take_last(0.0 if is_quiet else None)
        if self.arrivals.left:
            _say(self.arrivals.left)

    def _finish(self) -> None:
        self._bring_up_to_date(LAST_OF_ROUND, growing=False)
        if self._particles() >= FEWEST:
            self._bring_up_to_date(LAST_STAGE, growing=False)
        else:
            _say(f"fewer than {FEWEST} particles: no classes are made")

    def _is_late(self, begun: float) -> bool:
        hours = self.watch.hours
        return hours is not None and time.monotonic() - begun > 3600 * hours

    def _is_quiet(self) -> bool:
        minutes = self.watch.quiet_minutes
        return minutes is not None and time.monotonic() - self.arrivals.last_change > 60 * minutes

    def _round(self) -> bool:
        """Bring the chain up to date; False if something was in the way that may pass."""
        try:
            self._bring_up_to_date(LAST_OF_ROUND, growing=True)
            if self._classes_are_due():
                self._bring_up_to_date(LAST_STAGE, growing=True)
                self._see_classes()
        except HalfmapError as error:
            if not self._may_pass(error):
                raise
            if str(error) != self._said:
                _say(f"waiting: {error}")
            self._said = str(error)
            return False
        self._said = ""
        return True

    def _may_pass(self, error: HalfmapError) -> bool:
        """Whether a round that an error ended may go well later, as it is."""
        if not all(path.exists() for path in self._needed):
            return True  # the microscope's disk is out of reach for a while
        return isinstance(error, _PASSING) and not isinstance(error, TooManyFailedError)

    def _bring_up_to_date(self, stage: str, *, growing: bool) -> None:
        start = time.monotonic()
        settings = self.settings.model_copy(update={"until": stage})
        record = replace(read_record(self.project.root), live=self.watch.lasting())
        chain = Chain(self.project, settings, self.options, record, growing, self.cluster)
        try:
            chain.run(STAGES)
            self._remove_replaced(chain)
        except HalfmapError as error:
            if self._may_pass(error):
                self._show(chain, time.monotonic() - start)
            raise
        self._show(chain, time.monotonic() - start)

    def _show(self, chain: Chain, seconds: float) -> None:
        seen = look(chain, self.arrivals.taken, self.arrivals.waiting)
        write_page(self.project.root / PAGE, seen, self.arrivals.folder)
        _say(f"{seen.line()}; {seconds:.0f} s")

    def _remove_replaced(self, chain: Chain) -> None:
        """Delete jobs that others have taken the place of, so that the disk holds each thing once.

        What had been replaced before goes only if a session had made it.
        """
        there = {process.name for process in self.project.pipeline.processes}
        # What reads a file goes before what wrote it.
        for stage in reversed(list(chain.done.values())):
            for name in there.intersection(stage.replaced):
                with suppress(HalfmapError):  # something else reads from it
                    if name not in self._not_ours or self.project.job(name).was_growing:
                        self.project.remove(name)

    def _classes_are_due(self) -> bool:
        """Whether there are half as many particles more than in the last classes, or new ones for long."""
        self._see_classes()
        now, before = self._particles(), self._classed[0]
        late = now > before and time.monotonic() - self._classed_at > 60 * self.watch.class_minutes
        return now >= FEWEST and (now >= GROWTH * before or late)

    def _see_classes(self) -> None:
        """Note of how many particles the last classes are, and since when they are there."""
        stages = {stage.name: stage.job for stage in read_record(self.project.root).stages}
        table = self.project.root / stages.get(LAST_STAGE, "no job") / "particles.star"
        if table.exists() and table.stat().st_mtime != self._classed[1]:
            self._classed = read_particle_facts(table).number, table.stat().st_mtime
            self._classed_at = time.monotonic()

    def _particles(self) -> int:
        record = read_record(self.project.root)
        job = next(stage.job for stage in record.stages if stage.name == LAST_OF_ROUND)
        return read_particle_facts(self.project.job(job).outputs["particles"]).number


class _Terminal:
    """What is printed: lines of the session, and warnings, each once."""

    def __init__(self) -> None:
        self._shown: set[str] = set()

    def __call__(self, record: logging.LogRecord) -> bool:
        if getattr(record, "live", False):
            return True
        if record.levelno < logging.WARNING or record.getMessage() in self._shown:
            return False
        self._shown.add(record.getMessage())
        return True


def _say(text: str) -> None:
    log.info("%s  %s", time.strftime("%H:%M:%S"), text, extra={"live": True})
