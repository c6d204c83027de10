"""A live session that is killed twice ends with the tables and images of a run over all movies at once."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.live_movies import DOSE, PIXEL_A, write_movie

from halfmap.engine import RunOptions
from halfmap.project import Project
from halfmap.project.outcome import read_failures
from halfmap.steps import load_steps
from halfmap.workflow.chain import Chain
from halfmap.workflow.live import LAST_OF_ROUND
from halfmap.workflow.record import read_record
from halfmap.workflow.settings import RunSettings
from halfmap.workflow.stages import STAGES

MOVIES = 4
SET = ("motion.pictures=no", "ctf.pictures=no", "first-pick.pictures=no", "first-pick.survey=2")
OPTIONS = {"pixel_size": PIXEL_A, "dose_per_frame": DOSE, "diameter": 84.0}


@pytest.fixture(scope="module")
def movies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("movies")
    for number in range(MOVIES):
        write_movie(folder / f"{'ab'[number % 2]}/m{number}.mrc", number)
    broken = folder / "a/broken.mrc"
    broken.write_bytes((folder / "a/m0.mrc").read_bytes()[:3000])
    return folder


@pytest.fixture(scope="module")
def at_once(movies: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    load_steps()
    root = tmp_path_factory.mktemp("at_once")
    (root / "Arrived").symlink_to(movies)
    settings = RunSettings(movies=(root / "Arrived/**/*",), **OPTIONS, set=SET, until=LAST_OF_ROUND)
    chain = Chain(Project.open(root), settings, RunOptions())
    chain.run(STAGES)
    return made(root)


def made(root: Path) -> dict[str, bytes]:
    """Tables, images and failures of a project by stage, numbers of jobs apart."""
    found = {}
    for stage in read_record(root).stages:
        folder = root / stage.job
        for pattern in ("*.star", "coordinates/*", "Particles/*.mrcs", "Micrographs/*.mrc"):
            for path in folder.glob(pattern):
                if path.name != "job.star":
                    content = path.read_bytes()
                    if path.suffix == ".star":
                        content = re.sub(rb"job\d{3}", b"job", content.replace(bytes(root), b"."))
                    found[f"{stage.name}: {path.relative_to(folder)}"] = content
    return found


def live(folder: Path, root: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "halfmap", "live", str(folder), "--project", str(root)]
    for name, value in OPTIONS.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    command += ["--settle", "0.2", "--patience", "60", "--quiet-minutes", "0.05", "--set", *SET]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def kill_when(process: subprocess.Popen, root: Path, *, done: int, unit: str, job: str) -> None:
    """Kill a session and its workers when so many items of a job are done."""
    ledger = root / job / "items.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        lines = ledger.read_bytes().split(b"\n")[:-1] if ledger.exists() else []
        if sum(json.loads(line)["unit"] == unit for line in lines) >= done:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return
        time.sleep(0.01)
    process.kill()
    raise AssertionError(process.communicate()[1])


def arrive(movies: Path, folder: Path, names: list[str], *, half: tuple[str, ...] = ()) -> None:
    for name in names:
        content = (movies / name).read_bytes()
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content[: len(content) // 3] if name in half else content)


def test_killed_twice_it_ends_as_if_all_movies_had_been_there(
    movies: Path, at_once: dict[str, bytes], tmp_path: Path
):
    folder, root = tmp_path / "in", tmp_path / "P"
    names = sorted(path.relative_to(movies).as_posix() for path in movies.rglob("m*.mrc"))
    random.Random(1).shuffle(names)
    arrive(movies, folder, ["a/broken.mrc", *names[:2]], half=(names[1],))
    kill_when(live(folder, root), root, done=1, unit="movie", job="Motion/job002")
    arrive(movies, folder, names[:3], half=(names[2],))
    kill_when(live(folder, root), root, done=2, unit="micrograph", job="Ctf/job003")
    arrive(movies, folder, names)
    last = live(folder, root)
    said = last.communicate(timeout=300)[1]
    assert last.returncode == 0, said
    # Whatever a part of the movies decided has been decided again from all of them.
    found = made(root)
    assert found.keys() == at_once.keys()
    assert [name for name in found if found[name] != at_once[name]] == []
    assert [key for key, _ in read_failures(root / "Import/job001")] == ["Arrived/a/broken.mrc"]
    assert f"{MOVIES + 1} movies (1 failed), {MOVIES} done" in said
    page = (root / "live.html").read_text()
    assert "a/broken.mrc" in page and "data:image/png" in page and 'src="http' not in page
