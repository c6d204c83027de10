"""Batch systems: how jobs are worded, submitted, asked for and ended in SLURM, PBS, LSF and SGE."""

from __future__ import annotations

import getpass
import inspect
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from halfmap.engine.options import RunOptions
from halfmap.errors import ParameterError, ResourceError

_NAME = "halfmap"
_ANSWER_s = 60.0
"""How long a batch system may take to answer."""

_LISTS = "worker_extra_args", "job_script_prologue", "job_extra_directives", "job_directives_skip"
"""Arguments of dask-jobqueue that are lists, to which each KEY=VALUE adds."""

OURS = "scheduler", "name", "security", "protocol", "processes", "nanny"
"""Arguments that are not the user's: the workers are of no use to Halfmap without them."""

SCHEDULER = "scheduler_options"
"""Key of what goes to the scheduler in this process."""


@dataclass(frozen=True)
class Queue:
    """A batch system.

    Attributes
    ----------
    title : str
        As people call it.
    job : str
        Class of dask-jobqueue that words its jobs.
    submit, cancel, ask : tuple of str
        Commands: one that reads a job's script, one to be followed by numbers of jobs, and one that lists the
        user's jobs, a line each that begins with the number.
    number : str
        Pattern of what the first says of a job that is submitted, around its number: sites have it say more.
    arguments : callable
        Of the class, from the options: how cores, memory, time, GPU and account are asked for here.
    """

    title: str
    job: str
    submit: tuple[str, ...]
    cancel: tuple[str, ...]
    ask: tuple[str, ...]
    number: str
    arguments: Callable[[RunOptions], dict[str, Any]]

    def require(self, options: RunOptions) -> None:
        """Refuse a batch system whose commands or whose package are not here, and options that it knows not.

        Raises
        ------
        ResourceError, ParameterError
            If it cannot be used on this machine, or not so.
        """
        missing = self.missing()
        if missing is not None:
            raise ResourceError(f"--cluster {options.cluster} cannot be used here: {missing}")
        self.script(options, "tls://127.0.0.1:1", "first")

    def missing(self) -> str | None:
        """What it lacks to be used on this machine, with the remedy."""
        from importlib.util import find_spec

        for package in ("dask_jobqueue", "cryptography"):
            if find_spec(package) is None:
                return f"{package.replace('_', '-')} is missing: pip install 'halfmap[cluster]'"
        if shutil.which(self.submit[0]) is None:
            return f"there is no command {self.submit[0]}: start the job where {self.title} takes jobs"
        return None

    def script(self, options: RunOptions, address: str, name: str, **ours: Any) -> str:
        """Text of a job that starts a worker.

        Parameters
        ----------
        options : RunOptions
            Of the job.
        address, name : str
            Of the scheduler, and of the worker.
        **ours
            What dask-jobqueue is told beside, to which lists in the options add.

        Raises
        ------
        ParameterError
            If dask-jobqueue knows an option not, or its value cannot be.
        """
        from dask import config

        job = _job_class(self.job)
        arguments = self.arguments(options) | ours
        users = given(options, {*_parameters(job), SCHEDULER} - set(OURS))
        users.pop(SCHEDULER, None)
        for key in _LISTS:
            site = config.get(f"jobqueue.{job.config_name}.{key.replace('_', '-')}", None) or []
            theirs = [*site, *users.pop(key, [])]
            kept = [one for one in arguments.get(key, []) if not _says_same(one, theirs)]
            arguments |= {key: [*kept, *theirs]} if kept or theirs else {}
        arguments |= users
        try:
            text = job(address, name=name, processes=1, nanny=True, **arguments).job_script()
        except (TypeError, ValueError) as error:
            raise ParameterError(f"dask-jobqueue refuses what it is given: {error}") from error
        return text

    def submitted(self, script: str, folder: Path) -> str:
        """Submit a job from a folder, and give its number.

        Raises
        ------
        ResourceError
            If it is refused; says why.
        """
        said = run_command(self.submit, folder, script)
        number = re.search(self.number, said.stdout, re.MULTILINE)
        if said.returncode or number is None:
            why = " ".join((said.stderr or said.stdout).split()) or "without a word"
            raise ResourceError(
                f"{self.title} refuses the workers: {why}",
                hint=f"the job's text is {folder / 'worker.sh'}",
            )
        return number[1]

    def ended(self, numbers: Iterable[str], folder: Path) -> None:
        """Take jobs out of the queue, whether they wait or run."""
        numbers = list(numbers)
        if numbers:
            run_command((*self.cancel, *numbers), folder)

    def lines(self, numbers: Iterable[str], folder: Path) -> dict[str, str] | None:
        """What the queue says of jobs, by number, without those it no longer has; None if it is dumb."""
        said = run_command(tuple(word.format(user=getpass.getuser()) for word in self.ask), folder)
        wanted, found = set(numbers), {}
        for line in said.stdout.splitlines():
            words = line.split()
            if words and (number := words[0].partition(".")[0].partition("_")[0]) in wanted:
                found[number] = " ".join(words)
        # LSF fails where there are no jobs, which it says.
        dumb = said.returncode != 0 and "no unfinished job" not in said.stderr.lower()
        return None if dumb else found


def _job_class(name: str) -> Any:
    """The class of dask-jobqueue that words jobs of a batch system."""
    before = signal.getsignal(signal.SIGINT)
    module = import_module(f"dask_jobqueue.{name.lower()}")
    # Version 0.9 has Ctrl-C end the process as if all were well as soon as it is imported.
    signal.signal(signal.SIGINT, before)
    return getattr(module, f"{name}Job")


def given(options: RunOptions, known: Iterable[str] | None = None) -> dict[str, Any]:
    """The values of ``--cluster-option`` by key: JSON where it is, else words; those of lists together.

    Parameters
    ----------
    options : RunOptions
        Of the job.
    known : iterable of str, optional
        Keys that there are; without them any is taken.

    Raises
    ------
    ParameterError
        If a key is not known.
    """
    from difflib import get_close_matches

    keys, found = None if known is None else sorted(known), dict[str, Any]()
    for word in options.cluster_option:
        key, _, text = word.partition("=")
        key = key.strip().replace("-", "_")
        if keys is not None and key not in keys:
            close = get_close_matches(key, keys, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it is one of: {', '.join(keys)}"
            raise ParameterError(f"--cluster-option: {options.cluster} knows no {key}", hint=hint)
        value = _value(text)
        if key in _LISTS:
            found.setdefault(key, []).extend(value if isinstance(value, list) else [text])
        else:
            found[key] = value
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False}.get(text, text)


def _parameters(job: type) -> Iterable[str]:
    for each in (job, *job.__mro__):
        yield from (
            name
            for name, one in inspect.signature(each.__init__).parameters.items()
            if one.kind is not one.VAR_KEYWORD and one.kind is not one.VAR_POSITIONAL and name != "self"
        )


def _says_same(ours: str, theirs: Sequence[str]) -> bool:
    """Whether one of the user's directives asks for what one of ours does, and stands in its place."""
    if not ours.startswith("-"):
        return False
    flag = ours.replace("=", " ").split()[0]
    return any(
        one.replace("=", " ").split()[:1] == [flag] or ("gpu" in ours and "gpu" in one) for one in theirs
    )


def run_command(
    command: Sequence[str], folder: Path | None = None, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of a cluster, which a Ctrl-C on the terminal does not reach; if it hangs, it fails."""
    try:
        return subprocess.run(
            command,
            cwd=folder,
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            timeout=_ANSWER_s,
            start_new_session=True,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _clock(hours: float) -> str:
    minutes = max(1, round(60 * hours))
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def _common(options: RunOptions) -> dict[str, Any]:
    # One item at a time is worked on, with as many threads as it has cores.
    return {
        "job_name": _NAME,
        "cores": 1,
        "memory": f"{options.memory_per_worker}GB",
        "queue": options.queue,
        "walltime": f"{_clock(options.walltime)}:00",
    }


def _slurm(options: RunOptions) -> dict[str, Any]:
    gpu = ["--gres=gpu:1"] if options.device == "cuda" else []
    return _common(options) | {
        "account": options.account,
        "job_cpu": options.cores_per_worker,
        "job_extra_directives": gpu,
    }


def _pbs(options: RunOptions) -> dict[str, Any]:
    gpu = ":ngpus=1" if options.device == "cuda" else ""
    memory = f"mem={_megabytes(options)}mb"
    return _common(options) | {
        "account": options.account,
        "resource_spec": f"select=1:ncpus={options.cores_per_worker}:{memory}{gpu}",
    }


def _lsf(options: RunOptions) -> dict[str, Any]:
    return _common(options) | {
        "project": options.account,
        "ncpus": options.cores_per_worker,
        "walltime": _clock(options.walltime),
        "use_stdin": True,
        "job_extra_directives": ["-gpu num=1"] if options.device == "cuda" else [],
    }


def _sge(options: RunOptions) -> dict[str, Any]:
    cores = [f"-pe smp {options.cores_per_worker}"] if options.cores_per_worker > 1 else []
    gpu = ["-l gpu=1"] if options.device == "cuda" else []
    return _common(options) | {
        "project": options.account,
        "resource_spec": f"mem_free={_megabytes(options)}M",
        "job_extra_directives": [*cores, *gpu],
    }


def _megabytes(options: RunOptions) -> int:
    return round(1000 * options.memory_per_worker)


QUEUES: Mapping[str, Queue] = {
    "slurm": Queue(
        title="SLURM",
        job="SLURM",
        submit=("sbatch",),
        cancel=("scancel",),
        ask=("squeue", "--noheader", "--user={user}", "--format=%i %T %r"),
        number=r"^Submitted batch job (\d+)",
        arguments=_slurm,
    ),
    "pbs": Queue(
        title="PBS",
        job="PBS",
        submit=("qsub",),
        cancel=("qdel",),
        ask=("qstat", "-u", "{user}"),
        number=r"^(\d+)(?:\.\S+)?\s*$",
        arguments=_pbs,
    ),
    "lsf": Queue(
        title="LSF",
        job="LSF",
        submit=("bsub",),
        cancel=("bkill",),
        ask=("bjobs", "-noheader", "-o", "jobid stat pend_reason"),
        number=r"Job <(\d+)>",
        arguments=_lsf,
    ),
    "sge": Queue(
        title="SGE",
        job="SGE",
        submit=("qsub",),
        cancel=("qdel",),
        ask=("qstat",),
        number=r"(?:[Yy]our job |^)(\d+)(?: \(|\s*$)",
        arguments=_sge,
    ),
}
