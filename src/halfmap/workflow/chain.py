"""Run stage after stage: what is done and still valid is kept, what is not is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from halfmap.engine import RunOptions, Step, parse_step, registered_steps
from halfmap.engine.parameters import check_value
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
from halfmap.workflow.words import Words, log_in

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
    """What a stage is to run: values of its step, and the decisions behind them.

    The chain goes on without a stage that is one of several ways (`is_optional`), if its job cannot be made.
    """

    values: dict[str, Any]
    decisions: tuple[Decision, ...] = ()
    is_optional: bool = False


@dataclass(frozen=True)
class Skip:
    """A stage that is not to run, and why."""

    decisions: tuple[Decision, ...] = ()


Rule: TypeAlias = tuple[str, str, Callable[["Chain"], "Plan | Skip | None"]]
"""A stage: its name, its step, and what plans it. A step may depend on the chain's ``{source}``."""


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

    def asked(self, stage: str) -> dict[str, str]:
        """What of a stage was set by hand, by its names."""
        return overrides(self.settings.set, stage)

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

    def run(self, stages: Sequence[Rule]) -> None:
        """Run `stages` in order, up to the one that the settings name.

        A stage's function sees the chain with all stages before it done, and returns what to run, `Skip`,
        or None where the stage has no place in this chain.

        Raises
        ------
        ParameterError
            If the settings name a stage or a parameter that there is not, or a value that cannot be.
        HalfmapError
            What stopped a job.
        """
        steps = {name: self._class(step) for name, step, _ in stages}
        self._check_asked(steps)
        before = {stage.name: stage for stage in self.record.stages}
        force = False
        for name, _, plan_stage in stages:
            force = force or name == self.settings.anew
            plan = plan_stage(self)
            decisions = () if plan is None else plan.decisions
            if isinstance(plan, Plan):
                decisions = tuple(map(self._as_asked, decisions))
            for decision in decisions:
                log.info("%s: %s", name, decision)
            job = ""
            if isinstance(plan, Plan):
                words = Words(name, steps[name])
                try:
                    step = self._step(name, steps[name], plan)
                    with log_in(words):
                        job = self._bring_up_to_date(
                            name, step, before.get(name), decisions, force=force
                        ).name
                except HalfmapError as error:
                    words.translate_error(error)
                    if not (plan.is_optional and isinstance(error, _CANNOT_BE)):
                        self._say_stopped(name)
                        raise
                    log.warning("%s: left out: %s", name, error)
                    decisions = (*decisions, Decision("left out", str(error)))
            if plan is not None or name in before:
                self._note(name, job, decisions)
            if name == self.settings.until:
                log.info("stopped after %s, as asked; `halfmap run` without --until goes on", name)
                return

    def _class(self, step: str) -> type[Step]:
        return registered_steps()[step.format(source=self.settings.source) if "{" in step else step]

    def _check_asked(self, steps: Mapping[str, type[Step]]) -> None:
        """Refuse what was set by hand and cannot be, before anything runs."""
        for name in (self.settings.until, self.settings.anew):
            if name is not None:
                _check_stage(name, steps)
        for stage, parameter, text in map(parse_override, self.settings.set):
            _check_stage(stage, steps)
            known = {each.name: each for each in steps[stage].parameters()}
            hint = f"see: halfmap {steps[stage].name} --help"
            if parameter not in known:
                close = get_close_matches(parameter, known, n=1)
                guess = f"did you mean {stage}.{close[0].replace('_', '-')}? " if close else ""
                message = f"{stage} has no parameter {parameter.replace('_', '-')!r}"
                raise ParameterError(message, hint=guess + hint)
            try:
                check_value(steps[stage], parameter, value_of(text, known[parameter]), hint=hint)
            except ParameterError as error:
                Words(stage, steps[stage]).translate_error(error)
                raise

    def _as_asked(self, decision: Decision) -> Decision:
        """What to say of a decision, if what it is about was set by hand."""
        if not decision.override.startswith("--set "):
            return decision
        target = decision.override.removeprefix("--set ").partition("=")[0]
        stage, parameter, _ = parse_override(f"{target}=")
        value = self.asked(stage).get(parameter)
        if value is None:
            return decision
        return Decision(f"{parameter.replace('_', ' ')} {value}", "as asked", f"--set {target}=")

    def _say_stopped(self, stage: str) -> None:
        log.info("stopped at %s; any option of its step: --set %s.OPTION=VALUE", stage, stage)
        asked = [f"{stage}.{name.replace('_', '-')}" for name in self.asked(stage)]
        if asked:
            log.info(
                "set by hand, and kept until it is taken back: %s (--set %s=)", ", ".join(asked), asked[0]
            )

    def _step(self, stage: str, cls: type[Step], plan: Plan) -> Step:
        """The step of a stage, with what was set by hand in the place of what was planned."""
        values = {name: value for name, value in plan.values.items() if value is not None}
        parameters = {parameter.name: parameter for parameter in cls.parameters()}
        for name, text in self.asked(stage).items():
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


def _check_stage(name: str, stages: Iterable[str]) -> None:
    known = list(stages)
    if name not in known:
        close = get_close_matches(name, known, n=1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        raise ParameterError(f"there is no stage {name!r}", hint=f"{guess}stages: {', '.join(known)}")


def _named_singly(step: Step) -> set[str]:
    """Input files of a step that are not one of many."""
    values = (getattr(step, parameter.name) for parameter in step.parameters() if parameter.node is not None)
    return {value.as_posix() for value in values if isinstance(value, Path)}
