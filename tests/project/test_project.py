from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import toy_step as toy

from halfmap.engine import Context, Input, Out, Param, RunOptions, Step
from halfmap.engine.ledger import Ledger
from halfmap.errors import (
    HalfmapError,
    ItemsFailedError,
    ParameterError,
    ProjectError,
    ResourceError,
    TableError,
)
from halfmap.io.names import find_files
from halfmap.io.star import read_star
from halfmap.project import Project, inputs
from halfmap.project.overview import describe_project
from halfmap.project.pipeline import edit_pipeline
from halfmap.steps.import_.step import ImportMovies
from halfmap.steps.motion.step import MotionStep


class Reading(Step, name="reading"):
    """Name files."""

    files: tuple[Path, ...] = Input("files")

    def run(self, ctx: Context) -> None:
        pass


class Unfinished(Reading, name="unfinished"):
    """End without the output."""

    outputs = {"table": Out("table.star", "LogFile.star.toy")}


class Refusing(Reading, name="refusing"):
    """Refuse, or fail, after so much work."""

    error: str = Param("table", "what it ends with", unit="none", section="Toy")
    items: int = Param(0, "items done before", unit="none", section="Toy")
    writes: bool = Param(False, "leave a file behind", unit="none", section="Toy")
    unwanted: tuple[str, ...] = Param((), "items that fail", unit="none", section="Toy")

    def run(self, ctx: Context) -> None:
        if self.items:
            ctx.map(str, range(self.items))
        if self.writes:
            (ctx.folder / "half.txt").touch()
        for name in self.unwanted:
            ctx.fail("thing", name, "is unwanted")
        errors = {"table": TableError, "parameter": ParameterError, "resource": ResourceError}
        raise (errors | {"items": ItemsFailedError})[self.error]("is refused")


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
    assert options["bad"] == "1,2"
    assert {"n": "3", "deadly": "", "seconds": "0.0"}.items() <= options.items()


def test_record_names_version_parameters_and_packages(project):
    record = json.loads((project.run(toy.Toy(n=1)).folder / "job.json").read_text())
    assert record["parameters"] == toy.Toy(n=1).model_dump(mode="json")
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


@pytest.mark.parametrize("values", [{}, {"error": "parameter", "items": 2}], ids=str)
def test_a_job_that_is_refused_before_any_work_leaves_nothing(project, caplog, values):
    (project.root / "in.txt").touch()
    project.run(toy.Toy(n=1))
    before = project.pipeline
    caplog.set_level("INFO", logger="halfmap")
    with pytest.raises(HalfmapError, match="is refused"):
        project.run(Refusing(files=("in.txt",), **values))
    assert project.pipeline == before
    assert not (project.root / Refusing.folder).exists()
    assert "Refusing/job002/: refused before any work, and removed again" in caplog.text
    assert "halfmap resume" not in caplog.text
    assert project.run(toy.Toy(n=1)).name == "Toy/job002/"


@pytest.mark.parametrize("values", [{"items": 2}, {"writes": True}, {"error": "resource"}], ids=str)
def test_a_job_that_has_worked_is_kept_when_it_fails(project, caplog, values):
    (project.root / "in.txt").touch()
    caplog.set_level("INFO", logger="halfmap")
    with pytest.raises(HalfmapError, match="is refused"):
        project.run(Refusing(files=("in.txt",), **values))
    assert project.job(1).status == "Failed"
    assert "once the cause is mended, `halfmap resume" in caplog.text
    # Nor is it taken away from whoever resumes it.
    with pytest.raises(HalfmapError, match="is refused"):
        project.resume(1)
    assert [(p.name, p.status) for p in project.pipeline.processes] == [("Refusing/job001/", "Failed")]


@pytest.mark.parametrize("values", [{"error": "items"}, {"error": "parameter", "unwanted": ("a",)}], ids=str)
def test_a_job_that_would_end_alike_again_is_not_offered_to_be_resumed(project, caplog, values):
    (project.root / "in.txt").touch()
    caplog.set_level("INFO", logger="halfmap")
    with pytest.raises(HalfmapError, match="is refused"):
        project.run(Refusing(files=("in.txt",), writes=True, **values))
    assert "failed after" in caplog.text
    assert "halfmap resume" not in caplog.text


def test_the_number_of_a_refused_job_is_left_alone_if_another_has_come_since(project, monkeypatch):
    (project.root / "in.txt").touch()
    monkeypatch.setattr(Refusing, "run", lambda self, ctx: _interrupted_by(project))
    with pytest.raises(TableError):
        project.run(Refusing(files=("in.txt",)))
    assert [p.name for p in project.pipeline.processes] == ["Toy/job002/"]
    assert project.pipeline.counter == 3


def _interrupted_by(project: Project) -> None:
    project.new_job(toy.Toy(n=1))
    raise TableError("is refused")


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


INTERRUPTED = """
import os, signal, sys
sys.path.insert(0, {support!r})
import toy_step
from halfmap.cli import main
if __name__ == "__main__":
    os.chdir({root!r})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    sys.exit(main(["toy", "--n", "9", "--slow", "2", "3", "4", *{options!r}]))
"""


def _is_worker(entry: psutil.Process, group: int) -> bool:
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        return os.getpgid(entry.pid) == group and "spawn_main" in " ".join(entry.cmdline())
    return False


@pytest.mark.parametrize(
    "options",
    [[], ["--workers", "2", "--executor", "processes"], ["--workers", "2", "--cluster", "local"]],
    ids=["serial", "processes", "cluster"],
)
def test_ctrl_c_waits_for_no_item_and_says_how_to_go_on(project, tmp_path, options):
    script = tmp_path / "script.py"
    support = str(Path(toy.__file__).parent)
    script.write_text(INTERRUPTED.format(support=support, root=str(project.root), options=options))
    process = subprocess.Popen(
        [sys.executable, script], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    folder = project.root / "Toy/job001"
    ledger = Ledger(folder / "items.jsonl")
    try:
        while len(list(folder.glob("*.begun"))) < (2 if options else 1) or len(ledger.done("number")) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to workers too
        shown = process.communicate(timeout=60)[1]  # an item would take ten minutes
        workers = [entry for entry in psutil.process_iter(["cmdline"]) if _is_worker(entry, process.pid)]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert workers == []
    assert process.returncode == 130
    assert shown.splitlines()[-1] == "interrupted; go on with: halfmap resume Toy/job001"
    assert "Traceback" not in shown
    job = project.job(1)
    assert job.status == "Aborted"
    assert sorted(ledger.done("number")) == ["0", "1"]


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


def test_a_kill_amid_writing_leaves_no_temporary_file(project):
    script = SCRIPT.format(support=str(Path(toy.__file__).parent), root=str(project.root))
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    folder = project.root / "Toy/job001"
    while not (folder / "2.txt").exists():
        time.sleep(0.005)
    process.kill()
    process.wait()
    (folder / "Movies").mkdir()
    (folder / f"Movies/.{process.pid}~3.tiff").write_bytes(b"half")
    (project.root / f".{process.pid}~default_pipeline.star").write_bytes(b"half")
    project.resume(1)
    assert not list(project.root.rglob(".*~*"))


def test_a_folder_that_a_killed_process_left_without_a_number_is_passed_over(project):
    (project.root / "Import/job001").mkdir(parents=True)
    assert project.new_job(toy.Toy(n=1)).name == "Toy/job002/"
    assert project.new_job(toy.Toy(n=1)).name == "Toy/job003/"


def test_asking_for_the_status_does_not_keep_a_job_from_starting(project):
    job = project.new_job(toy.Toy(n=1))
    (job.folder / ".lock").touch()
    with (job.folder / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        release = threading.Timer(0.1, fcntl.flock, (file, fcntl.LOCK_UN))
        release.start()
        job.run(RunOptions())
        release.join()
    assert job.status == "Succeeded"


def test_a_file_is_no_project(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="is a file where a folder belongs"):
        Project.open(tmp_path / "file")


def test_a_folder_that_cannot_be_made_is_one_sentence():
    if not Path("/proc/self").exists():
        pytest.skip("no file system that refuses folders")
    with pytest.raises(ProjectError, match=r"/proc/xx: no project can be made here"):
        Project.open("/proc/xx")


def test_a_record_that_cannot_be_read_does_not_hide_the_other_jobs(project, caplog):
    project.run(toy.Toy(n=1))
    project.run(toy.Toy(n=1))
    (project.root / "Toy/job001/job.json").write_text("{")
    table = describe_project(project.root)
    assert table.row_count == 2
    assert "cannot be read as a job's record" in caplog.text


@pytest.mark.parametrize("name", ["../movies/a.tiff", "../movies/*.tiff"])
def test_inputs_are_named_from_the_projects_folder_wherever_one_stands(tmp_path, monkeypatch, name):
    project = Project.open(tmp_path / "a [b] project")
    (project.root / "movies").mkdir()
    (project.root / "movies/a.tiff").touch()
    (project.root / "elsewhere").mkdir()
    monkeypatch.chdir(project.root / "elsewhere")
    (tmp_path / "link").symlink_to(project.root)
    for root in (project.root, tmp_path / "link", Path("../elsewhere/..")):
        job = Project.open(root).new_job(Reading(files=(Path(name),)))
        assert [path.as_posix() for path in job.step.inputs()] == [name.removeprefix("../")]
        record = json.loads((job.folder / "job.json").read_text())
        assert [Path(entry["path"]).name for entry in record["inputs"]] == ["a.tiff"]
        assert "bytes" in record["inputs"][0]


def test_patterns_work_in_folders_with_brackets_outside_the_project(project, tmp_path, monkeypatch):
    (tmp_path / "a [b]").mkdir()
    (tmp_path / "a [b]/1.tiff").touch()
    monkeypatch.chdir(tmp_path / "a [b]")
    job = project.new_job(Reading(files=(Path("*.tiff"),)))
    assert find_files(job.step.inputs()[0], project.root) == [tmp_path / "a [b]/1.tiff"]


def test_a_wrong_input_makes_no_project(tmp_path):
    with pytest.raises(HalfmapError, match="does not exist"):
        Project.at(tmp_path / "new").run(Reading(files=(Path("none.tiff"),)))
    assert not (tmp_path / "new").exists()


def test_a_job_killed_before_its_entry_in_the_graph_is_entered_by_resume(project):
    job = project.run(toy.Toy(n=1))
    with edit_pipeline(project.root) as pipeline:
        pipeline.set_status(job.name, "Running")
        pipeline.nodes.clear()
        pipeline.outputs.clear()
    project.resume(1)
    assert [p.status for p in project.pipeline.processes] == ["Succeeded"]
    assert project.pipeline.outputs == [("Toy/job001/", "Toy/job001/squares.txt")]


def test_resume_tries_failed_items_of_a_finished_job_again(project, monkeypatch):
    job = project.run(toy.Toy(n=3, bad=(1,)))
    record = json.loads((job.folder / "job.json").read_text())
    record["parameters"]["bad"] = []  # whatever was wrong with the item has been mended
    (job.folder / "job.json").write_text(json.dumps(record))
    again = project.resume(1)
    assert len(again.outputs["table"].read_text().splitlines()) == 3
    assert not (job.folder / "failures.star").exists()
    assert "Executing continued job" in (job.folder / "note.txt").read_text()


def test_resume_says_what_has_changed_since(project, caplog):
    with pytest.raises(ItemsFailedError):
        project.run(toy.Toy(n=1, bad=(0,)))
    path = project.root / "Toy/job001/job.json"
    record = json.loads(path.read_text())
    source = project.root / "movies.star"
    source.write_text("x")
    record["halfmap"] = "0.0.1"
    record["inputs"] = [{"path": str(source), "bytes": 7, "modified": 0.0}]
    path.write_text(json.dumps(record))
    with pytest.raises(ItemsFailedError):
        project.resume(1)
    said = "changed since the job ran before: movies.star, Halfmap, 0.0.1 then; items done then are kept"
    assert said in caplog.text
    assert said in (project.root / "Toy/job001/run.err").read_text()


def test_a_project_that_was_moved_goes_on_as_if_nothing_had_changed(project, tmp_path, caplog):
    (project.root / "a.tiff").touch()
    with pytest.raises(ProjectError):
        project.run(Unfinished(files=(Path("*.tiff"),)))
    project.root.rename(tmp_path / "moved")
    moved = Project.open(tmp_path / "moved")
    with pytest.raises(ProjectError, match="without writing"):
        moved.resume(1)
    assert "changed" not in caplog.text
    assert "new since" not in caplog.text


class Table(Reading, name="table"):
    """Name a table, files and a folder, and end without the output."""

    outputs = Unfinished.outputs
    table: Path = Input("a table")
    stacks: Path = Input("a folder", folder=True)


def _copied(project: Project, folder: Path) -> Project:
    """As ``cp -r`` copies: with the dates of now."""
    shutil.copytree(project.root, folder, copy_function=shutil.copyfile)
    for number, path in enumerate(sorted(folder.rglob("*"))):
        os.utime(path, (1e9 + number, 1e9 + number))
    return Project.at(folder)


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        (None, None),
        (lambda root: (root / "rows.star").write_bytes(b"r" * 99_999 + b"x" + b"r" * 100_000), "rows.star"),
        (lambda root: (root / "a.tiff").write_bytes(b"a" * 199_999 + b"x"), "a.tiff"),
        (lambda root: (root / "b.tiff").write_bytes(b"x" + b"b" * 199_999), "b.tiff"),
        (lambda root: (root / "b.tiff").write_bytes(b"b" * 200_001), "b.tiff"),
    ],
    ids=["none", "table", "end", "beginning", "size"],
)
def test_a_copied_project_warns_of_other_contents_and_not_of_other_dates(
    project, tmp_path, caplog, change, warned
):
    for name, letter in (("rows.star", b"r"), ("a.tiff", b"a"), ("b.tiff", b"b")):
        (project.root / name).write_bytes(letter * 200_000)
    (project.root / "Stacks").mkdir()
    with pytest.raises(ProjectError):
        project.run(Table(files=(Path("*.tiff"),), table=Path("rows.star"), stacks=Path("Stacks")))
    copy = _copied(project, tmp_path / "copy")
    if change:
        change(copy.root)
    with pytest.raises(ProjectError, match="without writing"):
        copy.resume(1)
    said = [line for line in caplog.text.splitlines() if "changed since" in line]
    assert len(said) == (warned is not None)
    assert warned is None or f"ran before: {warned};" in said[0]
    # What it is now is known from now on.
    caplog.clear()
    with pytest.raises(ProjectError, match="without writing"):
        copy.resume(1)
    assert "changed since" not in caplog.text


def test_an_input_of_unchanged_date_is_not_read_again(project, monkeypatch):
    (project.root / "a.tiff").write_bytes(b"a")
    read = []
    monkeypatch.setattr(inputs, "_digest", lambda path, size, whole: read.append(path.name) or "sum")
    with pytest.raises(ProjectError):
        project.run(Unfinished(files=(Path("*.tiff"),)))
    with pytest.raises(ProjectError):
        project.resume(1)
    assert read == ["a.tiff"]


def test_files_that_have_come_since_let_a_job_that_ended_well_go_on(project, caplog):
    (project.root / "a.tiff").touch()
    caplog.set_level("INFO", logger="halfmap")
    project.run(Reading(files=(Path("*.tiff"),)))
    with pytest.raises(ProjectError, match="nothing to resume"):
        project.resume(1)
    for name in "bcdef":
        (project.root / f"{name}.tiff").touch()
    assert project.resume(1).status == "Succeeded"
    assert "new since the job ran before: b.tiff, c.tiff, d.tiff and 2 more" in caplog.text
    with pytest.raises(ProjectError, match="nothing to resume"):
        project.resume(1)
    (project.root / "a.tiff").unlink()
    caplog.clear()
    project.resume(1)
    assert "changed since the job ran before: a.tiff;" in caplog.text


def test_a_job_whose_folder_is_gone_says_so(project):
    job = project.run(toy.Toy(n=1))
    shutil.rmtree(job.folder)
    with pytest.raises(ProjectError, match=r"Toy/job001: the folder of this job is gone; put it back"):
        project.resume(1)
    assert "folder is gone" in next(iter(describe_project(project.root).columns[2].cells))


def test_a_job_that_cannot_be_recorded_leaves_no_folder(project, monkeypatch):
    def full(*_: object) -> None:
        raise ResourceError("no space left on the disk")

    monkeypatch.setattr("halfmap.project.job.Job.write_record", full)
    with pytest.raises(ResourceError):
        project.run(toy.Toy(n=1))
    assert not list(project.root.glob("Toy/*"))
    assert project.pipeline.processes == []


def test_a_full_disk_under_the_log_is_told_once_and_without_a_traceback(project, capsys):
    """Messages that cannot be written must not bury the error that says why."""
    job = project.new_job(toy.Toy(n=1))
    (job.folder / "run.out").symlink_to("/dev/full")
    (job.folder / "run.err").symlink_to("/dev/full")
    job.run(RunOptions())
    assert capsys.readouterr().err == ""


def test_a_wrong_parameter_in_python_is_one_sentence_on_all_that_is_wrong():
    with pytest.raises(ParameterError) as error:
        ImportMovies(movies=(), dose=3, voltage="high", gain_flip=7)  # pyright: ignore
    assert str(error.value) == (
        "ImportMovies: voltage must be a valid number, not 'high'; "
        "movies: nothing was given; "
        "dose_per_frame is missing: exposure of each stored frame; "
        "gain_flip must be 0, 1 or 2, not 7; "
        "there is no dose"
    )
    with pytest.raises(ParameterError, match=r"there is no dose_per_fram \(did you mean dose_per_frame\?\)"):
        ImportMovies(movies=("a.tif",), dose_per_fram=1)  # pyright: ignore
    with pytest.raises(ParameterError, match="RunOptions: workers must be greater than or equal to 1, not 0"):
        RunOptions(workers=0)
    with pytest.raises(ParameterError, match=r"^MotionStep: A.mrc is no table of movies"):
        MotionStep(movies=Path("A.mrc"))


def test_relion_is_locked_out_during_an_edit_and_only_then(project):
    lock = project.root / ".relion_lock"
    with edit_pipeline(project.root):
        assert lock.is_dir()
    assert not lock.exists()


def test_our_own_relion_lock_left_by_a_kill_is_removed(project):
    (project.root / ".relion_lock").mkdir()
    (project.root / ".relion_lock/halfmap").touch()
    with edit_pipeline(project.root) as pipeline:
        pipeline.counter = 5
    assert project.pipeline.counter == 5


def test_relions_own_lock_is_waited_for(project, monkeypatch):
    (project.root / ".relion_lock").mkdir()
    monkeypatch.setattr("halfmap.project.pipeline._PATIENCE_s", 0.1)
    with pytest.raises(ProjectError, match="locked by another program"), edit_pipeline(project.root):
        pass
    assert (project.root / ".relion_lock").exists()


def test_a_project_inside_another_is_said_to_be_one(project, caplog):
    assert not caplog.text
    inner = Project.open(project.root / "inner")
    said = f"{inner.root} is a project of its own inside the project {project.root}, which is left alone"
    assert [record.getMessage() for record in caplog.records] == [said]
    found = Project.find(inner.root)
    assert found is not None
    assert found.root == inner.root
    assert caplog.text.count(said) == 2
    found = Project.find(project.root)
    assert found is not None
    assert found.root == project.root
    assert caplog.text.count(said) == 2


def test_a_first_job_that_is_refused_leaves_no_project(tmp_path):
    """The folder is no project afterwards: others in it are not said to be inside one."""
    project = Project.open(tmp_path)
    assert Project.find(tmp_path) is not None
    with edit_pipeline(project.root) as pipeline:
        pipeline.counter = 1
    assert Project.find(tmp_path) is None
