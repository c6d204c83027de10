"""Jobs and locks that a kill left half made."""

from __future__ import annotations

import os
import time

import toy_step as toy

from halfmap.io.atomic import write_text
from halfmap.project import Project
from halfmap.project.pipeline import PIPELINE_FILE, edit_pipeline


def test_a_job_killed_before_its_entry_in_the_graph_is_resumed(tmp_path):
    project = Project.open(tmp_path)
    empty = (tmp_path / PIPELINE_FILE).read_text()
    job = project.new_job(toy.Toy(n=3))
    # The record is on disk, the graph is still the one before.
    write_text(tmp_path / PIPELINE_FILE, empty)
    resumed = project.resume("job001")
    assert resumed.name == job.name
    assert resumed.status == "Succeeded"
    assert [(p.name, p.status) for p in project.pipeline.processes] == [(job.name, "Succeeded")]
    assert project.run(toy.Toy(n=1)).name.endswith("job002/")


def test_a_lock_folder_without_a_mark_is_taken_over_once_it_is_old(tmp_path):
    Project.open(tmp_path)
    lock = tmp_path / ".relion_lock"
    lock.mkdir()
    os.utime(lock, (time.time() - 60,) * 2)
    with edit_pipeline(tmp_path) as pipeline:
        assert (lock / "halfmap").exists()
        assert pipeline.processes == []
    assert not lock.exists()
