"""How a step runs, which changes nothing in what it computes: where, on how much, and how patiently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from halfmap.engine.parameters import Form, Param
from halfmap.errors import ParameterError

_SECTION = "Cluster"

_USED = {
    "none": (),
    "local": (),
    "kubernetes": ("cores_per_worker", "memory_per_worker", "cluster_option"),
}
"""Options of workers that say something to a cluster; to batch systems all of them do."""


class RunOptions(Form):
    """How a step runs, which changes nothing in what it computes."""

    executor: Literal["auto", "serial", "processes"] = Param(
        "auto",
        "where items run without a --cluster: in this process, or in local processes",
        unit="none",
        section="Run",
    )
    workers: int = Param(1, "number of items run at a time", unit="none", section="Run", ge=1)
    device: str = Param(
        "auto",
        "auto, cpu, cuda or cuda:N; only auto may fall back to the CPU; to a --cluster auto is the CPU, and "
        "cuda asks for a GPU for each worker",
        unit="none",
        section="Run",
    )
    max_failures: int | None = Param(
        None,
        "stop when more items than this have failed; default: never while any succeed",
        unit="none",
        section="Run",
        ge=0,
    )
    cluster: Literal["none", "local", "slurm", "pbs", "lsf", "sge", "kubernetes"] = Param(
        "none",
        "cluster whose jobs are the workers; local: Dask on this machine, to try it",
        unit="none",
        section=_SECTION,
    )
    queue: str | None = Param(
        None,
        "queue that workers are submitted to, which SLURM calls a partition; default: the cluster's",
        unit="none",
        section=_SECTION,
        advanced=True,
    )
    account: str | None = Param(
        None,
        "account or project that workers are charged to; default: the cluster's",
        unit="none",
        section=_SECTION,
        advanced=True,
    )
    walltime: float = Param(
        24.0,
        "time after which the cluster ends a worker; another one takes its place",
        unit="h",
        section=_SECTION,
        advanced=True,
        gt=0,
    )
    cores_per_worker: int = Param(
        4, "cores asked for each worker", unit="none", section=_SECTION, advanced=True, ge=1
    )
    memory_per_worker: float = Param(
        16.0, "memory asked for each worker", unit="GB", section=_SECTION, advanced=True, gt=0
    )
    cluster_option: tuple[str, ...] = Param(
        (),
        "further options of dask-jobqueue or dask-kubernetes, as KEY=VALUE",
        unit="none",
        section=_SECTION,
        advanced=True,
    )

    @model_validator(mode="after")
    def _one_place(self) -> RunOptions:
        if self.executor != "auto" and self.cluster != "none":
            raise ValueError(f"--executor {self.executor} and --cluster {self.cluster} exclude each other")
        for word in self.cluster_option:
            if not word.partition("=")[0] or "=" not in word:
                raise ValueError(f"--cluster-option takes KEY=VALUE, not {word!r}")
        return self

    @property
    def is_remote(self) -> bool:
        """Whether workers are on other machines than this process."""
        return self.cluster not in ("none", "local")

    def refuse_idle(self) -> None:
        """Refuse options that say nothing to the cluster that is asked for.

        Raises
        ------
        ParameterError
            If there are any.
        """
        for parameter in self.parameters():
            name, used = parameter.name, _USED.get(self.cluster)
            if parameter.section != _SECTION or name == "cluster" or used is None or name in used:
                continue
            if getattr(self, name) != parameter.default:
                where = "without a --cluster" if self.cluster == "none" else f"to --cluster {self.cluster}"
                raise ParameterError(f"{parameter.option} says nothing {where}", hint="leave it out")

    def continued(self, kept: Mapping[str, Any]) -> RunOptions:
        """These options where they are given by name, the others as kept of an earlier run.

        Another cluster or executor than before takes nothing over that was said of where items run.
        """
        fields = RunOptions.model_fields
        given = {name: getattr(self, name) for name in fields if name in self.model_fields_set}
        before = {name: value for name, value in kept.items() if name in fields}
        if any(name in given and given[name] != before.get(name) for name in ("executor", "cluster")):
            place = {each.name for each in RunOptions.parameters() if each.section == _SECTION}
            before = {name: value for name, value in before.items() if name not in place | {"executor"}}
        return RunOptions(**before | given)
