"""SLURM for tests: munge, a controller and one node on the loopback interface, in a temporary folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

COMMANDS = "munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol"
SUPPORT = Path(__file__).resolve().parents[1] / "support"

CONFIGURATION = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MinJobAge=10
KillWait=2
NodeName=node NodeAddr=127.0.0.1 NodeHostname={host} CPUs=8 RealMemory=64000
PartitionName=day Nodes=node Default=YES MaxTime=7-0 State=UP
"""


def why_not() -> str | None:
    """Why SLURM cannot be run here."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: apt install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "SLURM's daemons are started as root"
    if importlib.util.find_spec("dask_jobqueue") is None:
        return "dask-jobqueue is not installed: pip install 'halfmap[cluster]'"
    return None


def free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def queue() -> list[str]:
    """Numbers and states of the jobs."""
    return said("squeue", "--noheader", "--format=%i %T").splitlines()


def is_emptied() -> bool:
    """Whether nothing is left in the queue once what ends there has ended."""
    end = time.monotonic() + 20
    while queue() and all("COMPLETING" in line for line in queue()) and time.monotonic() < end:
        time.sleep(0.2)
    return queue() == []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "cluster" in config.getoption("-m"):
        return
    skip = pytest.mark.skip(reason="starts a SLURM of its own; run by hand: pytest -n 0 -m cluster")
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A SLURM of one node with eight cores; its folder. Commands find it by SLURM_CONF."""
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no SLURM: {reason}")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    text = CONFIGURATION.format(
        folder=folder,
        controller_port=free_port(),
        node_port=free_port(),
        host=socket.gethostname().split(".")[0],
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(SUPPORT)}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    munge = ["munged", "--force", "--foreground", f"--key-file={folder}/key"]
    files = "socket", "pid-file", "seed-file", "log-file"
    munge += [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in files]
    daemons = []
    try:
        for command in (munge, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "node"]):
            with (folder / f"{command[0]}.out").open("w") as out:
                daemons.append(subprocess.Popen(command, stdout=out, stderr=out))
            time.sleep(1.0)
        end = time.monotonic() + 30
        while "idle" not in said("sinfo", "-h"):
            assert time.monotonic() < end, f"SLURM does not start, see {folder}"
            time.sleep(0.5)
        yield folder
    finally:
        for daemon in daemons[::-1]:
            daemon.terminate()
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            daemon.kill()
            daemon.wait()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
