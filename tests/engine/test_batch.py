"""Workers in the queue of a batch system: submitted, counted, replaced, given up, left nowhere."""

from __future__ import annotations

import importlib.util
import os
import socket
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy_step as toy

from halfmap.engine import Context, RunOptions, batch, cluster
from halfmap.engine.batch import BatchWorkers
from halfmap.engine.executor import prepare_workers
from halfmap.engine.queues import QUEUES
from halfmap.errors import ResourceError
from halfmap.project import Project
from halfmap.workflow import run as workflow
from halfmap.workflow.chain import Plan

jobqueue = pytest.mark.skipif(
    importlib.util.find_spec("dask_jobqueue") is None,
    reason="dask-jobqueue (halfmap[cluster]) is not installed",
)

SUBMIT = """#!/bin/bash
n=$(( $(ls {state} | grep -c sh$) + 1 ))
cat > {state}/$n.sh
echo $n >> {state}.submitted
[ -e {state}/hold ] || {{ setsid bash {state}/$n.sh > {state}/$n.log 2>&1 & echo $! > {state}/$n.pid; }}
echo "Welcome to the Stampede3 Supercomputer"
echo "Your job $n (halfmap) has been submitted"
echo "Job <$n> is submitted to queue <day>."
echo "Submitted batch job $n"
echo "$n.server"
"""
CANCEL = """#!/bin/bash
for n in "$@"; do kill -9 -- -$(cat {state}/$n.pid); rm -f {state}/$n.*; done 2> /dev/null
"""
ASK = """#!/bin/bash
cd {state}
for f in *.sh; do
  n=${{f%.sh}}
  if [ -e hold ]; then echo "$n.server Priority"; continue; fi
  kill -0 $(cat $n.pid) 2> /dev/null && echo "$n RUN"
done
true
"""


@pytest.fixture
def batch_system(tmp_path, monkeypatch) -> Path:
    """Commands that look like those of batch systems, which say much; the folder of their jobs."""
    state, commands = tmp_path / "state", tmp_path / "bin"
    state.mkdir()
    commands.mkdir()
    texts = (("sbatch", "qsub", "bsub"), SUBMIT), (("qdel", "bkill"), CANCEL), (("qstat", "bjobs"), ASK)
    for names, text in texts:
        for name in names:
            (commands / name).write_text(text.format(state=state))
            (commands / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(toy.__file__).parent))
    return state


def options_of(kind: str, workers: int = 2) -> RunOptions:
    return RunOptions(
        cluster=kind,
        workers=workers,
        cores_per_worker=1,
        memory_per_worker=2,
        cluster_option=("interface=lo",),
    )


@jobqueue
@pytest.mark.parametrize("kind", ["pbs", "lsf", "sge"])
def test_workers_come_from_a_queue_and_leave_nothing_in_it(kind, batch_system, tmp_path):
    folder = tmp_path / "a job"
    folder.mkdir()
    prepare_workers(options_of(kind))
    ctx = Context(folder=folder, project=folder, options=options_of(kind))
    toy.Toy(n=5, bad=(1,)).run(ctx)
    assert (folder / "squares.txt").read_text().split() == ["0", "0", "2", "4", "3", "9", "4", "16"]
    assert [failure.key for failure in ctx.failures] == ["1"]
    assert list(batch_system.iterdir()) == []
    assert not (folder / cluster.FOLDER).exists()


@jobqueue
def test_a_chain_of_jobs_has_its_workers_from_one_submission(batch_system, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/on/this/machine")
    scripts: list[str] = []
    script = BatchWorkers._script

    def recorded(self, address, name):
        scripts.append(script(self, address, name))
        return scripts[-1]

    monkeypatch.setattr(BatchWorkers, "_script", recorded)
    project = Project.at(tmp_path / "project")
    (project.root).mkdir()
    stages = [(f"stage-{n}", "toy", lambda _, n=n: Plan({"n": n})) for n in (3, 4, 5)]
    monkeypatch.setattr(workflow, "STAGES", stages)
    monkeypatch.setattr(workflow, "_report", lambda chain: None)
    chain = workflow.run_chain(project, {"particles": Path("particles.star")}, options_of("pbs"))
    assert [(chain.job(name).folder / "squares.txt").exists() for name, _, _ in stages] == [True] * 3
    assert len(batch_system.with_suffix(".submitted").read_text().split()) == 2
    assert list(batch_system.iterdir()) == []
    assert not (project.root / cluster.FOLDER).exists()
    assert "TMPDIR" not in scripts[0]


@jobqueue
def test_workers_that_do_not_come_are_told_of_in_the_words_of_the_queue(batch_system, tmp_path, monkeypatch):
    (batch_system / "hold").touch()
    monkeypatch.setattr(batch, "_SILENCE_s", 0.5)
    monkeypatch.setattr(batch, "_LOOK_s", 0.1)
    warned: list[str] = []

    def interrupt(text: str, *values: object) -> None:
        warned.append(text % values)
        raise KeyboardInterrupt

    monkeypatch.setattr(batch.log, "warning", interrupt)
    ctx = Context(folder=tmp_path, project=tmp_path, options=options_of("pbs"))
    with pytest.raises(KeyboardInterrupt):
        toy.Toy(n=5).run(ctx)
    assert warned[0].endswith("PBS says: 1.server Priority; 2.server Priority")
    assert [path.name for path in batch_system.iterdir()] == ["hold"]


@jobqueue
def test_workers_that_end_at_once_stop_the_job_with_their_last_words(batch_system, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "_LOOK_CLOSER_s", 0.2)
    monkeypatch.setattr(batch, "_UNLISTED_s", 0.5)
    (tmp_path / cluster.FOLDER).mkdir()
    (tmp_path / cluster.FOLDER / "worker.e1").write_text("words of an earlier attempt\n")
    options = options_of("sge").model_copy(update={"cluster_option": ("interface=lo", "python=/no/python")})
    ctx = Context(folder=tmp_path, project=tmp_path, options=options)
    with pytest.raises(ResourceError, match=r"end as soon as they begin, and leave no log .* share"):
        toy.Toy(n=5).run(ctx)
    assert len(list(batch_system.glob("*.sh"))) <= 4


@pytest.mark.parametrize("kind", QUEUES)
def test_the_number_of_a_job_is_found_whatever_else_a_site_says(kind, batch_system, tmp_path):
    for number in "1", "2":
        assert QUEUES[kind].submitted("true\n", tmp_path) == number


class Queue:
    """A queue that lists some of the jobs submitted to it, at times of a clock of its own."""

    title, ask = "SLURM", ("squeue",)

    def __init__(self) -> None:
        self.now, self.submitted_jobs, self.cancelled = 0.0, [], []
        self.alive: set[str] = set()

    def submitted(self, script: str, folder: Path) -> str:
        self.submitted_jobs.append(str(len(self.submitted_jobs) + 1))
        return self.submitted_jobs[-1]

    def lines(self, numbers, folder):
        return {number: number for number in numbers if number in self.alive}

    def ended(self, numbers, folder):
        self.cancelled += numbers


@pytest.fixture
def queue(monkeypatch) -> Queue:
    found = Queue()
    monkeypatch.setattr(batch, "time", SimpleNamespace(monotonic=lambda: found.now))
    monkeypatch.setattr(batch, "QUEUES", {"slurm": found})
    monkeypatch.setattr(BatchWorkers, "_script", lambda *_: "")
    return found


def workers_of(folder: Path, number: int) -> BatchWorkers:
    workers = BatchWorkers(RunOptions(cluster="slurm", workers=number), folder, {})
    workers._cluster = SimpleNamespace(scheduler_address="x")
    return workers


def test_a_job_that_is_not_listed_at_once_or_for_once_has_not_ended(queue, tmp_path):
    workers = workers_of(tmp_path, 4)
    for second in range(120):
        queue.now = float(second)
        # LSF lists a job some seconds after it is submitted; and one look finds nothing.
        queue.alive = set() if second < 20 or 60 <= second < 64 else {"1", "2", "3", "4"}
        workers.tend(4, set(), 0)
    assert queue.submitted_jobs == ["1", "2", "3", "4"]
    # All have come by now; then one is lost, and another takes its place.
    workers.tend(4, set(workers._jobs), 0)
    for second in range(120, 160):
        queue.now = float(second)
        queue.alive = {"1", "2", "3", "5"}
        names = {name for name, job in workers._jobs.items() if job.number in queue.alive}
        workers.tend(4, names, 0)
    assert queue.submitted_jobs == ["1", "2", "3", "4", "5"]


def test_a_worker_that_is_lost_is_replaced_at_the_next_look(queue, tmp_path):
    workers = workers_of(tmp_path, 2)
    workers.tend(2, set(), 0)
    first, second = workers._jobs
    queue.alive = {"1", "2"}
    workers.tend(2, {first, second}, 0)
    queue.alive = {"1"}
    for _ in range(3):
        queue.now += batch._LOOK_CLOSER_s
        workers.tend(2, {first}, 0)
    assert queue.submitted_jobs == ["1", "2", "3"]


def test_the_last_words_name_the_machine_whichever_log_they_are_in(tmp_path):
    for name, folder in (("seen", tmp_path), ("not", tmp_path / "elsewhere")):
        workers = workers_of(tmp_path / name, 1)
        workers.folder.mkdir()
        (tmp_path / "ca.pem").touch()
        text = f"{batch._ENTER.format(folder=folder)}\nexec /no/python\n"
        with (workers.folder / "1.out").open("w") as out, (workers.folder / "1.err").open("w") as err:
            subprocess.run(["bash"], input=text, text=True, stdout=out, stderr=err, check=False)
        _, said = workers._last_words()
        told = "/no/python: No such file" if name == "seen" else f"does not see {folder}: projects must lie"
        assert said.startswith(f"worker on {socket.gethostname()}: ")
        assert told in said


def test_a_machine_on_which_all_workers_end_is_no_reason_for_a_storm(queue, tmp_path, caplog):
    (tmp_path / "slurm-7.out").write_text("worker on node13\n/no/python: No such file\n")
    workers = workers_of(tmp_path, 20)
    workers.tend(20, set(), 0)
    good = next(iter(workers._jobs))
    queue.alive = {"1"}
    for tick in range(12_000):
        queue.now = 0.3 * tick
        workers.tend(20, {good}, tick // 100)
    assert 40 < len(queue.submitted_jobs) < 300
    assert "the last one with: worker on node13: /no/python: No such file" in caplog.text
    # Once the machine is mended, all come.
    for _ in range(2200):
        queue.now += 0.3
        queue.alive = {"1", *queue.submitted_jobs[-19:]}
        workers.tend(20, {good} if len(workers._jobs) < 20 else set(workers._jobs), 1000)
    assert len(workers._jobs) == 20
    assert workers._pause == batch._PAUSE_s


def test_as_many_workers_are_submitted_as_there_is_work_for(queue, tmp_path):
    workers = workers_of(tmp_path, 50)
    workers.tend(1, set(), 0)
    assert len(queue.submitted_jobs) == 1
    workers.tend(5, set(), 0)
    assert len(queue.submitted_jobs) == 5
    names = set(workers._jobs)
    queue.alive = set(queue.submitted_jobs)
    workers.tend(5, names, 0)
    workers.dismiss(set(sorted(names)[:1]))
    assert len(queue.cancelled) == 1
    queue.alive = {"3", "4", "5"}
    for _ in range(200):
        queue.now += 1
        workers.tend(2, {name for name, job in workers._jobs.items() if job.number in queue.alive}, 0)
    assert len(queue.submitted_jobs) == 5
