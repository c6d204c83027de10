from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_step as toy

from halfmap.engine import RunOptions
from halfmap.errors import HalfmapError, ItemsFailedError, ProjectError
from halfmap.io.star import read_star
from halfmap.project import Project
from halfmap.project.pipeline import edit_pipeline


@pytest.fixture
def project(tmp_path) -> Project:
    return Project.open(tmp_path / "project")


def test_a_finished_job_has_the_files_a_relion_user_looks_for(project):
    job = project.run(toy.Toy(n=3, bad=(1,)))
    assert job.name == "Toy/job001/"
    assert job.status == "Succeeded"
    names = {path.name for path in job.folder.iterdir()}
    wanted = {
        "job.star",
        "job.json",
        "note.txt",
        "run.out",
        "run.err",
        "events.jsonl",
        "RELION_JOB_EXIT_SUCCESS",
    }
    assert wanted <= names
    assert job.outputs == {"table": job.folder / "squares.txt"}
    assert read_star(job.folder / "failures.star")["failures"]["hmItem"].to_list() == ["1"]
    assert "1.mrc: is a bad number" in (job.folder / "run.err").read_text()
    assert "done in" in (job.folder / "run.out").read_text()


def test_job_star_has_relions_blocks_and_values(project):
    job = project.run(toy.Toy(n=3, bad=(1, 2)))
    blocks = read_star(job.folder / "job.star")
    assert blocks["job"]["rlnJobTypeLabel"] == "halfmap.toy"
    options = dict(blocks["joboptions_values"].iter_rows())
    assert options == {"n": "3", "bad": "1,2", "deadly": "", "seconds": "0.0"}


def test_record_names_version_parameters_and_packages(project):
    record = json.loads((project.run(toy.Toy(n=1)).folder / "job.json").read_text())
    assert record["parameters"] == {"n": 1, "bad": [], "deadly": [], "seconds": 0.0}
    assert {"halfmap", "packages", "python", "created", "inputs"} <= set(record)


def test_pipeline_lists_jobs_nodes_and_edges(project):
    project.run(toy.Toy(n=1))
    project.run(toy.Toy(n=2))
    pipeline = project.pipeline
    assert pipeline.counter == 3
    assert [(p.name, p.status) for p in pipeline.processes] == [
        ("Toy/job001/", "Succeeded"),
        ("Toy/job002/", "Succeeded"),
    ]
    assert pipeline.nodes["Toy/job002/squares.txt"] == "LogFile.pdf.toy"
    assert ("Toy/job001/", "Toy/job001/squares.txt") in pipeline.outputs


def test_a_failed_job_says_so_and_resumes(project):
    with pytest.raises(ItemsFailedError):
        project.run(toy.Toy(n=2, bad=(0, 1)))
    job = project.job(1)
    assert job.status == "Failed"
    assert "every number failed" in (job.folder / "run.err").read_text()
    with pytest.raises(ItemsFailedError):
        project.resume("job001")


def test_a_job_that_ended_well_is_not_resumed(project):
    project.run(toy.Toy(n=1))
    with pytest.raises(ProjectError, match="ended well"):
        project.resume(1)


def test_unknown_job_is_named(project):
    with pytest.raises(ProjectError, match="has no job job007"):
        project.job("job007")


def test_project_is_found_from_inside(project):
    job = project.run(toy.Toy(n=1))
    found = Project.find(job.folder)
    assert found is not None
    assert found.root == project.root


def _add_job(root) -> None:
    Project(root).new_job(toy.Toy(n=1))


def test_two_processes_number_their_jobs_apart(project):
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        pool.map(_add_job, [project.root] * 12)
    pipeline = project.pipeline
    assert [p.name for p in pipeline.processes] == [f"Toy/job{i:03d}/" for i in range(1, 13)]
    assert pipeline.counter == 13


def test_an_edit_that_fails_leaves_the_pipeline_alone(project):
    before = (project.root / "default_pipeline.star").read_bytes()
    with pytest.raises(RuntimeError), edit_pipeline(project.root) as pipeline:
        pipeline.counter = 99
        raise RuntimeError
    assert (project.root / "default_pipeline.star").read_bytes() == before


SCRIPT = """
import sys
sys.path.insert(0, {support!r})
import toy_step as toy
from halfmap.project import Project
Project.open({root!r}).run(toy.Toy(n=40, seconds=0.02))
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_a_stopped_job_resumes_to_the_same_result(project, tmp_path, sent):
    undisturbed = Project.open(tmp_path / "other").run(toy.Toy(n=40, seconds=0.0))
    support = str(Path(toy.__file__).parent)
    script = SCRIPT.format(support=support, root=str(project.root))
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    folder = project.root / "Toy/job001"
    while not (folder / "5.txt").exists():
        time.sleep(0.005)
    process.send_signal(sent)
    process.wait()
    assert not (folder / "39.txt").exists()
    assert project.job(1).status == "Aborted"
    assert (folder / "RELION_JOB_EXIT_ABORTED").exists() == (sent == signal.SIGTERM)
    job = project.resume(1, RunOptions())
    assert job.outputs["table"].read_bytes() == undisturbed.outputs["table"].read_bytes()
    calls = (folder / "calls.txt").read_text().split()
    assert len(calls) <= 41  # at most the item in flight ran twice
    assert not list(folder.glob(".*~*"))


def test_a_running_job_is_not_resumed_by_another_process(project):
    script = SCRIPT.format(support=str(Path(toy.__file__).parent), root=str(project.root))
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        while not (project.root / "Toy/job001/1.txt").exists():
            time.sleep(0.005)
        assert project.job(1).status == "Running"
        with pytest.raises(HalfmapError, match="running in another process"):
            project.resume(1)
    finally:
        process.kill()
        process.wait()
