"""The command `halfmap run`: settings put together, the chain run, the report written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfmap.engine import RunOptions
from halfmap.engine.parameters import parse_form
from halfmap.project import Project
from halfmap.workflow.chain import Chain
from halfmap.workflow.record import read_record
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
        How each job runs.

    Raises
    ------
    ParameterError
        If the settings cannot be, or name a stage or parameter that there is not.
    HalfmapError
        What stopped a stage; what is done is kept.
    """
    record = read_record(project.root)
    now = project.with_project_paths(RunSettings.model_construct(**{**_defaults(), **given}))
    given = {name: getattr(now, name) for name in given}
    settings = parse_form(RunSettings, merged(given, record.options), hint="see: halfmap run --help")
    chain = Chain(project, settings, options, record)
    chain.run(STAGES)
    return chain


def _defaults() -> dict[str, Any]:
    return {name: field.default for name, field in RunSettings.model_fields.items()}
