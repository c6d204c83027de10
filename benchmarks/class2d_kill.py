"""Kill `halfmap class2d` in an iteration, in the last one and while it writes, resume it, compare all files.

300 particles in three optics groups. The command is run with parts of 100 particles instead of 2048, so that
every iteration has several. Kills come at a random moment after so many parts, with one worker and with two;
all are compared with one undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl

import kill_resume
from class2d_data import STRUCTURES
from class2d_data import halfmap as made
from halfmap.data import ParticleSet
from halfmap.io.tables import read_particles, write_particles
from kill_resume import fingerprint, halfmap

N, GROUPS, ITERATIONS = 300, 3, 6
SMALL_PARTS = (
    "from halfmap.steps.class2d import plan; plan._SHARD = 100; "
    "import sys; from halfmap.cli import main; sys.exit(main())"
)
COMMAND = kill_resume.COMMAND = [sys.executable, "-c", SMALL_PARTS]
OPTIONS = (
    f"class2d particles.star --classes 5 --diameter 200 --iterations {ITERATIONS} --full-iterations 2"
    " --first-batch 200 --resolution 12"
)
JOB = "Class2D/job001"
LAST = GROUPS * ITERATIONS
MOMENTS = {
    "before the first part": (0, 6.0),
    "in an iteration": (7, 0.5),
    "between iterations": (9, 0.3),
    "in the last iteration": (LAST - 2, 0.5),
    "writing": (LAST, 0.4),
    "writing, later": (LAST, 2.0),
}
"""Parts done before a kill, and the most seconds that it waits after these."""


def particles(folder: Path, models: Path) -> Path:
    """Simulate the particles, give them three optics groups: folder of a project without jobs."""
    folder.mkdir()
    words = f"simulate particles {models / STRUCTURES['galactosidase']} --box-size 64 --pixel-size 4"
    made(f"{words} --n-particles {N} --snr 0.1 --shift 8 --seed 3", folder)
    table = read_particles(folder / "Simulate/job001/particles.star")
    shutil.move(folder / "Simulate/job001/Particles", folder / "Particles")
    name = pl.col("rlnImageName").str.replace("Simulate/job001/", "")
    group = (pl.int_range(pl.len()) * GROUPS // N + 1).alias("rlnOpticsGroup")
    optics = pl.concat(
        table.optics.with_columns(
            pl.lit(i + 1, pl.Int64).alias("rlnOpticsGroup"), rlnOpticsGroupName=pl.lit(f"group{i + 1}")
        )
        for i in range(GROUPS)
    )
    rows = table.rows.with_columns(name, group)
    write_particles(folder / "particles.star", ParticleSet(optics.drop("hmSignalScale"), rows))
    shutil.rmtree(folder / "Simulate")
    (folder / "default_pipeline.star").unlink()
    return folder


def parts(project: Path) -> int:
    """Parts that the job's ledger has."""
    path = project / JOB / "items.jsonl"
    return path.read_bytes().count(b'"part"') if path.exists() else 0


def kill(project: Path, workers: int, done: int, most_s: float, draw: random.Random) -> dict[str, Any]:
    """Start a classification and kill it with its workers."""
    command = [*COMMAND, *OPTIONS.split(), "--workers", str(workers), "--project", "."]
    process = subprocess.Popen(
        command, cwd=project, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and parts(project) < done:
        time.sleep(0.005)
    wait_s = draw.uniform(0, most_s)
    time.sleep(wait_s)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    # A job that has ended may be killed as its process goes.
    ended = (project / JOB / "RELION_JOB_EXIT_SUCCESS").exists()
    models = [path.name[:5] for path in (project / JOB / "Iterations").glob("it*_model.npz")]
    return {
        "parts": parts(project),
        "wait s": round(wait_s, 2),
        "model": max(models, default=""),
        "ended": ended,
    }


def main() -> int:
    """Print a row a kill; exit code 1 if any file differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("../shared/data/models"))
    parser.add_argument("--repeat", type=int, default=1, help="kills at each moment")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as scratch:
        source = particles(Path(scratch) / "source", options.models.resolve())
        project = Path(scratch) / "project"
        words = OPTIONS.replace("particles.star", f"{project}/particles.star").split()
        expected: dict[str, str] = {}
        for workers in options.workers:
            shutil.copytree(source, project)
            done = halfmap(project, workers, *words)
            if done.returncode:
                raise SystemExit(done.stderr)
            found = fingerprint(project / JOB)
            expected = expected or found
            print(
                f"undisturbed, workers {workers}: {len(found)} files, same as the first: {found == expected}"
            )
            shutil.rmtree(project)
        for workers in options.workers:
            for name, (after, most_s) in MOMENTS.items():
                for _ in range(options.repeat):
                    shutil.copytree(source, project)
                    row: dict[str, Any] = {"workers": workers, "moment": name}
                    row |= kill(project, workers, after, most_s, draw)
                    begun = (project / "default_pipeline.star").exists()
                    begun = begun and (project / JOB / "job.json").exists()
                    # A kill before the job is on record leaves nothing to go on with.
                    done = halfmap(project, workers, *(("resume", "job001") if begun else words))
                    found = fingerprint(project / JOB)
                    differ = sorted(
                        file
                        for file in expected.keys() | found.keys()
                        if expected.get(file) != found.get(file)
                    )
                    # What had ended before the kill has nothing to resume.
                    row |= {"resume": done.returncode, "differ": differ}
                    row["same"] = not differ and done.returncode == (2 if row["ended"] else 0)
                    if done.returncode:
                        row["message"] = (done.stderr.strip().splitlines() or [""])[-1]
                    rows.append(row)
                    print(row, flush=True)
                    shutil.rmtree(project)
    path = Path(__file__).parent / "results" / "class2d_kill.json"
    path.write_text(json.dumps({"options": OPTIONS, "kills": rows}, indent=1) + "\n")
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
