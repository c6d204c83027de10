"""Jobs on a real SLURM: tables as from one process, whatever is killed meanwhile.

Run by hand where SLURM is installed: ``pytest -n 0 -m cluster``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import refine_simulation as particles
import toy_step as toy

from halfmap.engine import Context, RunOptions
from halfmap.engine.cluster import FOLDER
from halfmap.engine.executor import shared_workers
from halfmap.errors import ResourceError
from halfmap.io.mrc import read_mrc
from halfmap.project import Project
from halfmap.steps.ctf.step import CtfStep
from halfmap.steps.motion.step import MotionStep
from halfmap.steps.refine.step import RefineStep
from halfmap.steps.simulate.step import SimulateMovies

from .conftest import is_emptied, queue

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("slurm")]

ASKED = {
    "cluster": "slurm",
    "workers": 2,
    "queue": "day",
    "cores_per_worker": 1,
    "memory_per_worker": 4.0,
    "walltime": 1.0,
    "cluster_option": ("interface=lo",),
}


def words(**changes) -> list[str]:
    """The same on a command line."""
    found = []
    for name, value in (ASKED | changes).items():
        values = value if isinstance(value, tuple) else (value,)
        found += [f"--{name.replace('_', '-')}", *map(str, values)]
    return found


def worker_processes() -> list[psutil.Process]:
    """Those that do the work: children of what SLURM has started."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if "spawn_main" in line and "dask_worker" in " ".join(process.parent().cmdline()):
                found.append(process)
        except (psutil.Error, AttributeError):
            continue
    return found


def killer(job: Path, kill) -> threading.Thread:
    """A thread that kills something once the first item is done and both workers are there."""

    def wait() -> None:
        ledger = job / "items.jsonl"
        while not (ledger.exists() and ledger.stat().st_size and len(worker_processes()) == 2):
            time.sleep(0.05)
        kill()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def same_tables(one: Path, other: Path) -> list[str]:
    """Names of the tables of two jobs, which are byte for byte the same."""
    names = sorted(path.relative_to(one).as_posix() for path in one.rglob("*.star"))
    names = [name for name in names if name != "job.star"]
    others = [path.relative_to(other).as_posix() for path in other.rglob("*.star")]
    assert names == sorted(name for name in others if name != "job.star")
    assert [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()] == []
    return names


def test_movies_to_ctf_with_a_worker_process_killed(tmp_path):
    folders = tmp_path / "serial", tmp_path / "slurm"
    (folders[0] / "sim").mkdir(parents=True)
    simulation = SimulateMovies(
        assembly="none", pixel_size=3.0, width=320, height=320, particles=30, dose_per_frame=4.0,
        overlapping=0.0, broken=0.0, contaminants=0.0, carbon=0.0, n_movies=5, n_frames=6, seed=5,
    )  # fmt: skip
    simulation.run(Context(folder=folders[0] / "sim", project=folders[0]))
    shutil.copytree(folders[0], folders[1])
    thread = killer(folders[1] / "Motion/job001", lambda: worker_processes()[0].kill())
    for folder, options in zip(folders, (RunOptions(), RunOptions(**ASKED)), strict=True):
        project = Project.at(folder)
        with shared_workers(options, folder) as held:
            motion = project.run(
                MotionStep(movies=Path("sim/movies.star"), pictures=False), options, cluster=held
            )
            ctf = CtfStep(micrographs=motion.outputs["micrographs"], pictures=False)
            project.run(ctf, options, cluster=held)
    assert not thread.is_alive()
    logs = [(folders[1] / job / "run.out").read_text() for job in ("Motion/job001", "Ctf/job002")]
    assert ["submitted to SLURM" in text for text in logs] == [True, False]
    assert "corrected_micrographs.star" in same_tables(*(folder / "Motion/job001" for folder in folders))
    assert "micrographs_ctf.star" in same_tables(*(folder / "Ctf/job002" for folder in folders))
    for path in (folders[0] / "Motion/job001").rglob("*.mrc"):
        other = folders[1] / path.relative_to(folders[0])
        assert np.array_equal(read_mrc(path).data, read_mrc(other).data)
    assert is_emptied()


def test_a_refinement_with_a_job_taken_out_of_the_queue(tmp_path):
    folders = tmp_path / "serial", tmp_path / "slurm"
    folders[0].mkdir()
    particles.write_project(folders[0], n=80)
    shutil.copytree(folders[0], folders[1])
    step = RefineStep(
        particles=Path("particles.star"), reference=Path("reference.mrc"),
        diameter=particles.DIAMETER, initial_lowpass=25.0, most_iterations=2,
    )  # fmt: skip
    cancelled: list[str] = []

    def cancel() -> None:
        cancelled.append(queue()[0].split()[0])
        subprocess.run(["scancel", cancelled[0]], check=True)

    thread = killer(folders[1] / "Refine/job001", cancel)
    for folder, options in zip(folders, (RunOptions(), RunOptions(**ASKED)), strict=True):
        Project.at(folder).run(step, options)
    assert not thread.is_alive()
    assert "particles.star" in same_tables(*(folder / "Refine/job001" for folder in folders))
    maps = [read_mrc(folder / "Refine/job001/run_half1_class001_unfil.mrc").data for folder in folders]
    assert np.array_equal(*maps)
    assert f"ended in the queue: {cancelled[0]}" in (folders[1] / "Refine/job001/run.out").read_text()
    assert is_emptied()


def test_only_the_item_of_a_lost_worker_is_done_again(tmp_path):
    ctx = Context(folder=tmp_path, project=tmp_path, options=RunOptions(**ASKED))
    toy.Toy(n=8, once_deadly=(2, 5)).run(ctx)
    assert ctx.failures == []
    counts = Counter((tmp_path / "begun.txt").read_text().split())
    assert counts == Counter({str(number): 1 + (number in (2, 5)) for number in range(8)})
    assert not (tmp_path / FOLDER).exists()
    assert is_emptied()


SCRIPT = """
import signal
import sys
import toy_step
from halfmap.cli import main

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    sys.exit(main(["toy", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_nothing_is_left_in_the_queue_however_the_job_ends(tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, script, "--n", "9", "--slow", "2", "3", *words(), "--project", tmp_path / "P"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    folder = tmp_path / "P/Toy/job001"
    while len(list(folder.glob("*.begun"))) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    start = time.monotonic()
    os.kill(process.pid, how)
    shown = process.communicate(timeout=60)[1]
    while queue():
        # Workers without a scheduler find it out by themselves.
        assert time.monotonic() - start < (120 if how == signal.SIGKILL else 30)
        time.sleep(0.5)
    if how != signal.SIGKILL:
        assert process.returncode == 130, shown
        assert Project.at(tmp_path / "P").job(1).status == "Aborted"
    assert worker_processes() == []


def test_a_worker_that_sees_another_disk_is_found_out(tmp_path):
    project, shell = tmp_path / "project", tmp_path / "shell"
    project.mkdir()
    inner = f'mount -t tmpfs none {project} && exec bash "$@"'
    shell.write_text(f"#!/bin/sh\nexec unshare -m sh -c '{inner}' sh \"$@\"\n")
    shell.chmod(0o700)
    options = RunOptions(**ASKED | {"cluster_option": ("interface=lo", f"shebang=#!{shell}")})
    ctx = Context(folder=project, project=project, options=options)
    with pytest.raises(ResourceError, match=f"does not see {project}/Workers: projects must lie on"):
        toy.Toy(n=5).run(ctx)
    assert is_emptied()


def test_what_slurm_refuses_is_said_in_its_words(tmp_path):
    options = RunOptions(**ASKED | {"queue": "night"})
    ctx = Context(folder=tmp_path, project=tmp_path, options=options)
    with pytest.raises(ResourceError, match=r"SLURM refuses the workers: .*partition specified: night"):
        toy.Toy(n=5).run(ctx)
    assert is_emptied()
