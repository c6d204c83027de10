"""The command `halfmap run`: settings put together, the chain run, the report written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from halfmap.engine import RunOptions
from halfmap.engine.executor import shared_workers
from halfmap.engine.parameters import parse_form
from halfmap.errors import HalfmapError
from halfmap.log import log
from halfmap.project import Project
from halfmap.project.locks import chain_locked
from halfmap.project.outcome import count
from halfmap.workflow.arrivals import ARRIVED, Watch
from halfmap.workflow.chain import Chain
from halfmap.workflow.record import Record, read_record
from halfmap.workflow.report import write_report
from halfmap.workflow.settings import RunSettings, merged
from halfmap.workflow.stages import STAGES


def run_chain(project: Project, given: Mapping[str, Any], options: RunOptions) -> Chain:
    """Run the chain in a project, or go on with it.

    Parameters
    ----------
    project : Project
        Where its jobs are, or are to be made.
    given : mapping
        Settings that are given now, as `RunSettings` takes them; others are those of the run before.
    options : RunOptions
        How each job runs; what is not given is as of the run before.

    Raises
    ------
    ProjectError
        If another chain works in the project.
    ParameterError
        If the settings cannot be, or name a stage or parameter that there is not.
    HalfmapError
        What stopped a stage; what is done is kept.
    """
    with chain_locked(project.root):
        settings, record = settings_of(project, given), read_record(project.root)
        options = options.continued(record.run)
        _take_arrived(project, settings, record)
        project = replace(project, goes_on=f"halfmap run --project {os.path.relpath(project.root)}")
        chain = Chain(project, settings, options, record)
        try:
            with shared_workers(options, project.root) as chain.cluster:
                chain.run(STAGES)
        except HalfmapError:
            # What has been done is worth looking at, and the page says what stopped it.
            _report(chain)
            raise
        _report(chain)
    return chain


def _take_arrived(project: Project, settings: RunSettings, record: Record) -> None:
    """Take what has come into a watched folder since `halfmap live` ended."""
    if settings.movies != (ARRIVED,) or "folder" not in record.live:
        return
    watch = parse_form(Watch, record.live)
    if not watch.folder.is_dir():
        log.warning("%s is out of reach: what has come since is not taken", watch.folder)
        return
    arrivals = watch.arrivals(project.root, settings)
    new = arrivals.take_last()
    if new:
        log.info("%s taken that came into %s since", count(new, "movie"), watch.folder)
    if arrivals.left:
        log.warning("%s: %s", watch.folder, arrivals.left)


def _report(chain: Chain) -> None:
    made = [stage.job for stage in chain.done.values() if stage.job]
    if not made:
        return  # nor, maybe, a project
    try:
        names = {process.name for process in chain.project.pipeline.processes}
        jobs = [job for job in made if job in names]
        if jobs:
            write_report(chain.project, jobs[-1])
    except HalfmapError as error:
        log.warning("no report: %s", error)


def settings_of(project: Project, given: Mapping[str, Any]) -> RunSettings:
    """Settings of a project's chain: those `given` now, the others as of the run before.

    Raises
    ------
    ParameterError
        If they cannot be.
    """
    now = project.with_project_paths(RunSettings.model_construct(**{**_defaults(), **given}))
    given = {name: getattr(now, name) for name in given}
    options = read_record(project.root).options
    return parse_form(RunSettings, merged(given, options), hint="see: halfmap run --help")


def _defaults() -> dict[str, Any]:
    return {name: field.default for name, field in RunSettings.model_fields.items()}
