"""Run stage after stage: what is done and still valid is kept, what is not is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfmap.engine import RunOptions, Step, parse_step, registered_steps
from halfmap.engine.words import value_of
from halfmap.errors import (
    FileFormatError,
    HalfmapError,
    ParameterError,
    ProjectError,
    ShapeError,
    TableError,
)
from halfmap.log import log
from halfmap.project import Job, Project
from halfmap.workflow.record import Decision, Record, Stage, write_record
from halfmap.workflow.settings import RunSettings, overrides, parse_override

if TYPE_CHECKING:
    from halfmap.engine.cluster import Cluster

GROWING = {
    "import movies",
    "import micrographs",
    "motion",
    "ctf",
    "curate",
    "pick blob",
    "pick template",
    "extract",
}
"""Steps that go on with new items when their input has become more."""


_CANNOT_BE = ParameterError, TableError, ShapeError, FileFormatError
"""Errors that are no reason to stop where there are other ways."""


@dataclass(frozen=True)
class Plan:
    """What a stage is to run: a step with its values, and the decisions behind them.

    The chain goes on without a stage that is one of several ways (`is_optional`), if its job cannot be made.
    """

    step: str
    values: dict[str, Any]
    decisions: tuple[Decision, ...] = ()
    is_optional: bool = False


@dataclass(frozen=True)
class Skip:
    """A stage that is not to run, and why."""

    decisions: tuple[Decision, ...] = ()


@dataclass
class Chain:
    """The chain in a project while it runs.

    Parameters
    ----------
    project : Project
        Where its jobs are.
    settings : RunSettings
        What is known of the data set.
    options : RunOptions
        How each job runs.
    record : Record
        What the chain has done there before.
    growing : bool
        Whether more files are to come, so that jobs may decide from those that are there for a while.
    cluster : Cluster, optional
        Workers that its jobs share.
    """

    project: Project
    settings: RunSettings
    options: RunOptions
    record: Record = field(default_factory=Record)
    growing: bool = False
    cluster: Cluster | None = None
    done: dict[str, Stage] = field(default_factory=dict)

    def has(self, stage: str) -> bool:
        """Whether a stage has a job, in this run of the chain or kept from an earlier one."""
        return stage in self.done and bool(self.done[stage].job)

    def asked(self, stage: str) -> bool:
        """Whether anything of a stage was set by hand."""
        return bool(overrides(self.settings.set, stage))

    def job(self, stage: str) -> Job:
        """The job of a stage."""
        return self.project.job(self.done[stage].job)

    def output(self, stage: str, name: str) -> Path:
        """An output of a stage's job, absolute."""
        outputs = self.job(stage).outputs
        if name not in outputs:
            raise ProjectError(
                f"its output {name!r} is gone",
                path=self.job(stage).folder,
                hint=f"make it again with --anew {stage}",
            )
        return outputs[name]

    def run(self, stages: Sequence[tuple[str, Callable[[Chain], Plan | Skip | None]]]) -> None:
        """Run `stages` in order, up to the one that the settings name.

        A stage's function sees the chain with all stages before it done, and returns what to run, `Skip`,
        or None where the stage has no place in this chain.

        Raises
        ------
        ParameterError
            If the settings name a stage or a parameter that there is not.
        HalfmapError
            What stopped a job.
        """
        self._check_names([name for name, _ in stages])
        before = {stage.name: stage for stage in self.record.stages}
        force = False
        for name, plan_stage in stages:
            force = force or name == self.settings.anew
            plan = plan_stage(self)
            decisions = () if plan is None else plan.decisions
            for decision in decisions:
                log.info("%s: %s", name, decision)
            job = ""
            if isinstance(plan, Plan):
                try:
                    step = self._step(name, plan)
                    job = self._bring_up_to_date(name, step, before.get(name), decisions, force=force).name
                except HalfmapError as error:
                    if not (plan.is_optional and isinstance(error, _CANNOT_BE)):
                        log.info("stopped at %s; any option of its step: --set %s.OPTION=VALUE", name, name)
                        raise
                    log.warning("%s: left out: %s", name, error)
                    decisions = (*decisions, Decision("left out", str(error)))
            if plan is not None or name in before:
                self._note(name, job, decisions)
            if name == self.settings.until:
                log.info("stopped after %s, as asked; `halfmap run` without --until goes on", name)
                return

    def _check_names(self, names: Sequence[str]) -> None:
        by_hand = (parse_override(word)[0] for word in self.settings.set)
        asked = (self.settings.until, self.settings.anew, *by_hand)
        for name in asked:
            if name is not None and name not in names:
                raise ParameterError(f"there is no stage {name!r}", hint=f"stages: {', '.join(names)}")

    def _step(self, stage: str, plan: Plan) -> Step:
        """The step of a stage, with what was set by hand in the place of what was planned."""
        cls = registered_steps()[plan.step]
        values = {name: value for name, value in plan.values.items() if value is not None}
        parameters = {parameter.name: parameter for parameter in cls.parameters()}
        for name, text in overrides(self.settings.set, stage).items():
            if name not in parameters:
                raise ParameterError(
                    f"{stage} has no parameter {name!r}", hint=f"see: halfmap {plan.step} --help"
                )
            values[name] = value_of(text, parameters[name])
        return parse_step(cls, values)

    def _bring_up_to_date(
        self, stage: str, step: Step, before: Stage | None, decisions: tuple[Decision, ...], *, force: bool
    ) -> Job:
        """The stage's job of an earlier run if it still holds, gone on with if it stopped, else a new one."""
        job = self._earlier(before)
        wanted = self.project.with_project_paths(step)
        if job is None or force or job.step != wanted:
            return self._run_anew(stage, step, decisions)
        changed, new = job.changed_inputs()
        grows = step.name in GROWING
        # Of files that are listed, those that have become others are done again; a gain is all movies'.
        lost = not grows or (step.name.startswith("import") and _named_singly(wanted) & set(changed))
        if changed and lost:
            log.info("%s: runs again, as %s has changed", stage, ", ".join(changed[:3]))
            return self._run_anew(stage, step, decisions)
        if job.status == "Succeeded" and not (changed or new) and (self.growing or not job.provisional()):
            log.info("%s: done before, in %s", stage, job.name)
            self.project.note_ended(job)
            return job
        log.info("%s: goes on with %s", stage, job.name)
        return self.project.resume(
            job.name, self.options, growing=self.growing, cluster=self.cluster, changes=(changed, new)
        )

    def _earlier(self, before: Stage | None) -> Job | None:
        if before is None or not before.job:
            return None
        try:
            return self.project.job(before.job)
        except HalfmapError:
            return None  # deleted, or of another version

    def _run_anew(self, stage: str, step: Step, decisions: tuple[Decision, ...]) -> Job:
        made: list[Job] = []

        def note(job: Job) -> None:
            # Before it runs: a kill must not make the next run begin it once more.
            made.append(job)
            self._note(stage, job.name, decisions)

        try:
            return self.project.run(
                step, self.options, on_made=note, growing=self.growing, cluster=self.cluster
            )
        except HalfmapError:
            if made and not made[0].folder.exists():  # refused; its number will be another job's
                self._forget(stage)
            raise

    def _note(self, name: str, job: str, decisions: tuple[Decision, ...]) -> None:
        before = next((each for each in self.record.stages if each.name == name), Stage(name, ""))
        replaced = dict.fromkeys((*before.replaced, *((before.job,) if before.job else ())))
        replaced.pop(job, None)
        self.done[name] = Stage(name, job, decisions, tuple(replaced))
        later = [each for each in self.record.stages if each.name not in self.done]
        self._write(later)

    def _forget(self, name: str) -> None:
        """Put what the record held of a stage before in the place of what was noted."""
        del self.done[name]
        self._write([each for each in self.record.stages if each.name not in self.done])

    def _write(self, later: Sequence[Stage]) -> None:
        """Write the record: the stages that are done in this run, and `later` ones of the run before."""
        options = self.settings.model_dump(mode="json", exclude_defaults=True, exclude={"until", "anew"})
        run = self.options.model_dump(mode="json", include=set(RunOptions.model_fields))
        stages = (*self.done.values(), *later)
        write_record(self.project.root, Record(options, stages, run, self.record.live))


def _named_singly(step: Step) -> set[str]:
    """Input files of a step that are not one of many."""
    values = (getattr(step, parameter.name) for parameter in step.parameters() if parameter.node is not None)
    return {value.as_posix() for value in values if isinstance(value, Path)}
