"""Workers of clusters: how they are asked for, lost, found wanting, and what they are sent."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import pickle
import signal
import stat
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import toy_step as toy

from halfmap.cli import parse_options
from halfmap.engine import Context, RunOptions, batch, cluster, executor, registered_steps, work
from halfmap.engine.executor import prepare_workers
from halfmap.engine.kubernetes import cluster_spec
from halfmap.engine.memory import require_memory_of_each
from halfmap.engine.queues import QUEUES
from halfmap.errors import ParameterError, ResourceError
from halfmap.steps import load_steps

load_steps()
SUPPORT = str(Path(toy.__file__).parent)
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
    problem = f"does not see the job's folder {tmp_path}/elsewhere: projects must lie on a disk that all"
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


def test_memory_is_that_of_each_worker():
    asked = RunOptions(cluster="slurm", workers=1000, memory_per_worker=0.2)
    require_memory_of_each(0.1e9, asked, purpose="this", hint="that")
    problem = "this needs 0.3 GB of memory in each worker, which has 0.2 GB; ask for more --memory-per-worker"
    with pytest.raises(ResourceError, match=problem):
        require_memory_of_each(0.3e9, asked, purpose="this", hint="that")
    with pytest.raises(ResourceError, match=r"this needs 100.1 GB of memory, .* are available; that"):
        require_memory_of_each(0.1e9, RunOptions(workers=1000), purpose="this", hint="that")


SUBMIT = """#!/bin/bash
n=$(( $(ls {state} | grep -c sh$) + 1 ))
cat > {state}/$n.sh
[ -e {state}/hold ] || {{ setsid bash {state}/$n.sh > {state}/$n.log 2>&1 & echo $! > {state}/$n.pid; }}
echo "Job <$n> is submitted"
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
    """Commands that look like those of PBS, SGE and LSF; the folder of their jobs."""
    state, commands = tmp_path / "state", tmp_path / "bin"
    state.mkdir()
    commands.mkdir()
    for names, text in ((("qsub", "bsub"), SUBMIT), (("qdel", "bkill"), CANCEL), (("qstat", "bjobs"), ASK)):
        for name in names:
            (commands / name).write_text(text.format(state=state))
            (commands / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", SUPPORT)
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
def test_workers_that_do_not_come_are_told_of_in_the_words_of_the_queue(
    batch_system, tmp_path, monkeypatch, caplog
):
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
    options = options_of("sge").model_copy(update={"cluster_option": ("interface=lo", "python=/no/python")})
    ctx = Context(folder=tmp_path, project=tmp_path, options=options)
    with pytest.raises(ResourceError, match=r"end as soon as they begin, and leave no log .* share"):
        toy.Toy(n=5).run(ctx)
    assert len(list(batch_system.glob("*.sh"))) <= 4


def test_pods_are_worded_for_the_operator(tmp_path, monkeypatch):
    pytest.importorskip("dask_kubernetes", reason="dask-kubernetes (halfmap[kubernetes]) is not installed")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with pytest.raises(ResourceError, match=r"there is no .*config, which says how to reach it"):
        prepare_workers(RunOptions(cluster="kubernetes"))
    (tmp_path / "config").touch()
    options = RunOptions(
        cluster="kubernetes",
        workers=7,
        device="cuda",
        cores_per_worker=3,
        cluster_option=("image=me/halfmap:1", "volume=lab:/data", "namespace=em"),
    )
    prepare_workers(options)
    spec = cluster_spec(options, "halfmap-1", {"OMP_NUM_THREADS": "3"})
    group = spec["spec"]["worker"]
    pod = group["spec"]["containers"][0]
    assert group["replicas"] == 7
    assert pod["image"] == "me/halfmap:1"
    assert pod["resources"]["limits"] == {"cpu": "3", "memory": "16000M", "nvidia.com/gpu": "1"}
    assert pod["volumeMounts"] == [{"name": "project", "mountPath": "/data"}]
    assert group["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "lab"}
    assert {"name": "OMP_NUM_THREADS", "value": "3"} in pod["env"]
    assert (
        "resources" not in spec["spec"]["scheduler"]["spec"]["containers"][0]
        or not (spec["spec"]["scheduler"]["spec"]["containers"][0]["resources"])
    )
    wrong = (((), "image="), (("image=a",), "volume="), (("image=a", "volume=b"), "CLAIM:FOLDER"))
    for wanting, problem in wrong:
        with pytest.raises(ParameterError, match=problem):
            prepare_workers(RunOptions(cluster="kubernetes", cluster_option=wanting))
