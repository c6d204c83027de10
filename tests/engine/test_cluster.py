"""Workers of clusters: how they are asked for, lost, found wanting, and what they are sent."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import pickle
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import toy_step as toy

from halfmap.cli import parse_options
from halfmap.engine import Context, RunOptions, cluster, executor, registered_steps, work
from halfmap.engine.device import GpuOfWorker
from halfmap.engine.executor import prepare_workers
from halfmap.engine.memory import require_memory_of_each
from halfmap.engine.queues import QUEUES
from halfmap.errors import ParameterError, ResourceError
from halfmap.project import Project
from halfmap.steps import load_steps

load_steps()
ASKED = {
    "workers": 2,
    "queue": "day",
    "account": "lab",
    "walltime": 1.5,
    "cores_per_worker": 3,
    "memory_per_worker": 20.0,
    "device": "cuda",
}
jobqueue = pytest.mark.skipif(
    importlib.util.find_spec("dask_jobqueue") is None,
    reason="dask-jobqueue (halfmap[cluster]) is not installed",
)


def run(folder: Path, step: toy.Toy, **options) -> Context:
    ctx = Context(folder=folder, project=folder, options=RunOptions(**options))
    step.run(ctx)
    return ctx


def begun(folder: Path) -> Counter[int]:
    return Counter(map(int, (folder / "begun.txt").read_text().split()))


def script(kind: str, *options: str, **asked) -> str:
    given = RunOptions(cluster=kind, cluster_option=options, **asked)
    return QUEUES[kind].script(given, "tls://10.0.0.1:5", "w1")


@jobqueue
@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        (
            "slurm",
            "-p day|-A lab|--cpus-per-task=3|--mem=19G|-t 01:30:00|--gres=gpu:1|-n 1",
        ),
        ("pbs", "-q day|-A lab|-l select=1:ncpus=3:mem=20000mb:ngpus=1|-l walltime=01:30:00"),
        ("lsf", '-q day|-P "lab"|-n 3|-M 20000000|-W 01:30|-gpu num=1'),
        ("sge", "-q day|-P lab|-pe smp 3|-l mem_free=20000M|-l h_rt=01:30:00|-l gpu=1"),
    ],
)
def test_options_are_said_in_the_words_of_each_system(kind, lines):
    mark = {"slurm": "#SBATCH", "pbs": "#PBS", "lsf": "#BSUB", "sge": "#$"}[kind]
    text = script(kind, **ASKED)
    said = [line.removeprefix(f"{mark} ") for line in text.splitlines() if line.startswith(f"{mark} ")]
    assert set(lines.split("|")) <= set(said)
    command = text.strip().splitlines()[-1]
    assert "-m distributed.cli.dask_worker tls://10.0.0.1:5 --name w1 --nthreads 1" in command
    bare = script(kind)
    assert "gpu" not in bare.lower()
    assert "lab" not in bare


@jobqueue
def test_ctrl_c_is_left_alone():
    before = signal.getsignal(signal.SIGINT)
    for name in [name for name in sys.modules if name.startswith("dask_jobqueue")]:
        del sys.modules[name]
    script("slurm")
    assert signal.getsignal(signal.SIGINT) is before


@jobqueue
def test_further_options_add_to_lists_and_stand_in_the_place_of_ours():
    extra = 'job_extra_directives=["--gpus=h100:1", "--exclusive"]'
    text = script("slurm", extra, "python=/opt/python", **ASKED)
    assert "#SBATCH --gpus=h100:1\n#SBATCH --exclusive\n" in text
    assert "--gres" not in text
    assert "/opt/python -m distributed" in text
    twice = script("slurm", "job_script_prologue=module load cuda", "job_script_prologue=module load gcc")
    assert "module load cuda\nmodule load gcc\n" in twice
    spec = script("sge", "job_extra_directives=-pe threaded 3", "resource_spec=h_vmem=7G", **ASKED)
    assert "-pe smp" not in spec
    assert "#$ -l h_vmem=7G" in spec
    with pytest.raises(ParameterError, match="slurm knows no interfase; did you mean interface"):
        script("slurm", "interfase=lo")
    with pytest.raises(ParameterError, match="knows no security"):
        script("slurm", "security=x")


def test_options_that_say_nothing_are_refused():
    for options, problem in (
        ({"queue": "day"}, "--queue says nothing without a --cluster"),
        ({"cluster": "local", "cores_per_worker": 2}, "--cores-per-worker says nothing to --cluster local"),
        ({"cluster": "kubernetes", "walltime": 2.0}, "--walltime says nothing to --cluster kubernetes"),
    ):
        with pytest.raises(ParameterError, match=problem):
            prepare_workers(RunOptions(**options))
    with pytest.raises(ParameterError, match="--executor serial and --cluster slurm exclude each other"):
        RunOptions(executor="serial", cluster="slurm")
    with pytest.raises(ParameterError, match="takes KEY=VALUE, not 'interface'"):
        RunOptions(cluster="slurm", cluster_option=("interface",))


@pytest.mark.parametrize(
    ("kind", "package", "extra"),
    [
        ("slurm", "dask_jobqueue", "cluster"),
        ("lsf", "cryptography", "cluster"),
        ("kubernetes", "dask_kubernetes", "kubernetes"),
    ],
)
def test_a_missing_package_is_said_before_there_is_a_job(kind, package, extra, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )
    problem = rf"--cluster {kind} cannot be used here: .* pip install 'halfmap\[{extra}\]'"
    with pytest.raises(ResourceError, match=problem):
        prepare_workers(RunOptions(cluster=kind))


@jobqueue
def test_a_missing_command_is_said_before_there_is_a_job(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for kind in QUEUES:
        with pytest.raises(ResourceError, match=r"used here: there is no command [bq]?s?(batch|sub)"):
            prepare_workers(RunOptions(cluster=kind))


def test_options_are_read_from_a_command_line():
    words = (
        "a.star --cluster slurm --workers 9 --walltime 2.5 --cluster-option interface=ib0 python=/opt/python"
    )
    _, options = parse_options(words.split(), registered_steps()["ctf"], prog="halfmap ctf", description="")
    assert (options.cluster, options.workers, options.walltime) == ("slurm", 9, 2.5)
    assert options.cluster_option == ("interface=ib0", "python=/opt/python")
    twice = [*words.split(), "--cluster-option", "log_directory=x"]
    with pytest.raises(ParameterError, match=r"--cluster-option is given twice; put all its values after"):
        parse_options(twice, registered_steps()["ctf"], prog="halfmap ctf", description="")


def test_a_resumed_job_keeps_what_was_said_of_its_place_unless_that_changes():
    first = RunOptions(cluster="slurm", workers=9, queue="day", cluster_option=("interface=ib0",))
    kept = first.model_dump(mode="json")
    assert RunOptions().continued(kept) == first
    assert RunOptions(queue="night").continued(kept) == first.model_copy(update={"queue": "night"})
    assert RunOptions(cluster="none").continued(kept) == RunOptions(workers=9)
    assert RunOptions(executor="serial").continued(kept) == RunOptions(workers=9, executor="serial")
    local = RunOptions(executor="processes", workers=3).model_dump(mode="json")
    assert RunOptions(cluster="pbs").continued(local) == RunOptions(cluster="pbs", workers=3)


def test_a_worker_that_is_killed_costs_only_its_item(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="halfmap")
    (tmp_path / "serial").mkdir()
    (tmp_path / "cluster").mkdir()
    run(tmp_path / "serial", toy.Toy(n=8))
    ctx = run(tmp_path / "cluster", toy.Toy(n=8, once_deadly=(3,)), cluster="local", workers=2)
    assert ctx.failures == []
    texts = [(tmp_path / name / "squares.txt").read_text() for name in ("serial", "cluster")]
    assert texts[0] == texts[1]
    assert begun(tmp_path / "cluster") == Counter({number: 1 + (number == 3) for number in range(8)})
    assert caplog.text.count("its item is tried again on another") == 1
    assert not (tmp_path / "cluster" / cluster.FOLDER).exists()


def test_an_item_that_kills_its_workers_is_blamed_alone(tmp_path):
    ctx = run(tmp_path, toy.Toy(n=6, deadly=(1,)), cluster="local", workers=2)
    assert [failure.key for failure in ctx.failures] == ["1"]
    assert "its worker was lost 3 times" in ctx.failures[0].reason
    assert begun(tmp_path) == Counter({number: 3 if number == 1 else 1 for number in range(6)})


def test_the_loss_of_workers_on_a_cluster_has_more_causes_than_memory(tmp_path):
    lost = cluster.Cluster(RunOptions(cluster="slurm"), tmp_path)._lost(3)
    assert lost is not None
    for cause in ("--memory-per-worker", "--walltime", "taken by the cluster"):
        assert cause in (lost.error or "")


def test_workers_stay_from_loop_to_loop(tmp_path):
    options = RunOptions(cluster="local", workers=1)
    with executor.shared_workers(options, tmp_path) as workers:
        ctx = Context(tmp_path, tmp_path, options, cluster=workers)
        first = ctx.map(toy.process_number, [1, 2], unit="first")
        second = ctx.map(toy.process_number, [1, 2], unit="second")
    assert len({*first, *second}) == 1
    assert os.getpid() not in first


def test_a_worker_that_sees_another_disk_is_found_out_at_once(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere" / cluster.FOLDER / "work.pickle"
    monkeypatch.setattr(cluster, "write_work", lambda *_: elsewhere)
    problem = f"does not see the folder {tmp_path}/elsewhere: projects must lie on a disk that all"
    with pytest.raises(ResourceError, match=problem):
        run(tmp_path, toy.Toy(n=50), cluster="local", workers=2)
    assert not (tmp_path / "begun.txt").exists()


def test_a_worker_of_another_version_or_that_lacks_the_code_is_told(tmp_path):
    path = work.write_work(tmp_path, toy.process_number, [1])
    outcome = work.run_item(path, 0, "0.0")
    assert outcome.fatal
    assert "this job 0.0: install the same" in (outcome.error or "")
    data = path.read_bytes().replace(b"process_number", b"process_nothing"[:14])
    path = tmp_path / "other.pickle"
    path.write_bytes(data)
    outcome = work.run_item(path, 0, work.halfmap.__version__)
    assert outcome.fatal
    assert "cannot load its work: AttributeError" in (outcome.error or "")


def test_what_items_share_does_not_pass_the_scheduler(tmp_path, monkeypatch):
    from distributed import Client

    shared = np.arange(250_000)
    sent, submit = [], Client.submit

    def recorded(self, *args, **options):
        sent.append(len(pickle.dumps(args)))
        return submit(self, *args, **options)

    monkeypatch.setattr(Client, "submit", recorded)
    ctx = Context(tmp_path, tmp_path, RunOptions(cluster="local", workers=1))
    parts = np.split(shared, 5)
    sums = ctx.map(functools.partial(toy.sum_of, shared=shared), parts, key=lambda part: str(part[0]))
    assert sums == [int(part.sum() + shared.sum()) for part in parts]
    assert len(sent) == 5
    assert max(sent) < 1000


def test_what_a_loop_has_left_in_a_worker_goes_before_the_next(tmp_path, monkeypatch):
    cleared = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: cleared.append(True))
    paths = [work.write_work(tmp_path, toy.process_number, [1, 2]) for _ in range(2)]
    for path in paths:
        for number in range(2):
            assert work.run_item(path, number, work.halfmap.__version__).result == os.getpid()
    assert len(cleared) == 2


def test_jobs_of_a_chain_share_workers_that_are_what_each_asks_for(tmp_path):
    options = RunOptions(cluster="local", workers=2)
    with executor.shared_workers(options, tmp_path) as held:
        assert held is not None
        for same in (options, options.model_copy(update={"max_failures": 3})):
            with executor.shared_workers(same, tmp_path / "job", held) as found:
                assert found is held
        for other in ({"workers": 3}, {"device": "cpu"}):
            with executor.shared_workers(options.model_copy(update=other), tmp_path / "job", held) as found:
                assert found is not held
        with executor.shared_workers(RunOptions(), tmp_path / "job", held) as found:
            assert found is None


def test_sigterm_between_jobs_ends_workers_as_ctrl_c_does(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(KeyboardInterrupt),
        executor.shared_workers(RunOptions(cluster="local"), tmp_path),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_workers_without_work_for_long_are_let_go_and_asked_for_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_IDLE_s", 0.5)
    with executor.shared_workers(RunOptions(cluster="local", workers=1), tmp_path) as workers:
        assert workers is not None
        ((_, first),) = workers.run(toy.process_number, [1])
        end = time.monotonic() + 20
        while (tmp_path / cluster.FOLDER).exists():
            assert time.monotonic() < end
            time.sleep(0.1)
        ((_, second),) = workers.run(toy.process_number, [1])
    assert first.result != second.result
    assert not (tmp_path / cluster.FOLDER).exists()


class Recorded:
    """Workers that note what is asked of them."""

    def __init__(self) -> None:
        self.needed, self.dismissed = [], []

    def tend(self, need, names, results):
        self.needed.append(need)

    def dismiss(self, names):
        self.dismissed.append(set(names))


def test_never_more_workers_than_items_and_none_that_idles_for_long(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cluster.time, "monotonic", lambda: now[0])
    shared, asked = cluster.Cluster(RunOptions(cluster="slurm", workers=50), tmp_path), Recorded()
    shared._workers = asked
    names = {"tls://1": "a", "tls://2": "b", "tls://3": "c"}
    shared._tend({}, set(), 1)
    shared._tend({}, set(), 70)
    assert asked.needed == [1, 50]
    for minute in range(12):
        now[0] = 60.0 * minute
        shared._tend(names, {"tls://1"} if minute < 3 else {"tls://1", "tls://2"}, 0)
    assert asked.dismissed == [{"c"}]
    now[0] += 900
    shared._tend(names, {"tls://1"}, 1)
    assert asked.dismissed == [{"c"}]


def test_each_worker_asks_a_gpu_of_its_own_and_the_log_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("halfmap.project.job.device_for", lambda options: GpuOfWorker("cpu"))
    job = Project.at(tmp_path).run(toy.Toy(n=1))
    assert "toy on a GPU of each worker" in (job.folder / "run.out").read_text()


def test_memory_is_that_of_each_worker():
    asked = RunOptions(cluster="slurm", workers=1000, memory_per_worker=0.2)
    require_memory_of_each(0.1e9, asked, purpose="this", hint="that")
    problem = "this needs 0.3 GB of memory in each worker, which has 0.2 GB; ask for more --memory-per-worker"
    with pytest.raises(ResourceError, match=problem):
        require_memory_of_each(0.3e9, asked, purpose="this", hint="that")
    with pytest.raises(ResourceError, match=r"this needs 100.1 GB of memory, .* are available; that"):
        require_memory_of_each(0.1e9, RunOptions(workers=1000), purpose="this", hint="that")
