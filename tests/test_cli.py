from __future__ import annotations

import errno
import fcntl
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_step

import halfmap
from halfmap import cli
from halfmap.cli import main, parse_options
from halfmap.engine import RunOptions, registered_steps
from halfmap.errors import ProjectError
from halfmap.io.mrc import write_mrc
from halfmap.project import Project
from halfmap.project.pipeline import Process, edit_pipeline
from halfmap.steps import load_steps
from halfmap.steps.class2d.step import Class2DStep
from halfmap.workflow.settings import RunSettings

load_steps()
STEPS = [cls for cls in registered_steps().values() if cls.__module__.startswith("halfmap.")]
every_step = pytest.mark.parametrize("cls", STEPS, ids=lambda cls: cls.name)


def options(text: str) -> set[str]:
    """Long options that a help text offers."""
    words = text.replace(",", " ").replace("|", " ").split()
    return {word for word in words if word.startswith("--")}


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_step_and_command(words, capsys):
    assert main(words) == 0
    shown = capsys.readouterr().out
    for name in [*(cls.name for cls in STEPS), "info", "resume", "doctor"]:
        assert name in shown


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"halfmap {halfmap.__version__}\n"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["import", "movie"], "import movies"),
        (["simulate", "partciles"], "simulate particles"),
        (["inffo", "a.mrc"], "info"),
        (["docter"], "doctor"),
    ],
)
def test_a_misspelt_command_is_guessed(words, meant, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err.rstrip().endswith(f"did you mean '{meant}'?")


def test_an_unknown_command_points_to_help(capsys):
    assert main(["xyzzy"]) == 2
    assert capsys.readouterr().err == "halfmap: there is no command 'xyzzy'; see: halfmap --help\n"


@pytest.mark.parametrize("words", [["import"], ["import", "--help"]])
def test_a_family_lists_its_members_alone(words, capsys):
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "import coordinates" in shown
    assert "simulate" not in shown


@every_step
def test_help_shows_every_option_that_is_not_advanced(cls, capsys):
    assert main([*cls.name.split(), "--help"]) == 0
    shown = options(capsys.readouterr().out)
    for parameter in cls.parameters():
        assert (parameter.option in shown) == (not parameter.advanced)
    assert {"--workers", "--executor", "--cluster", "--device", "--project", "--max-failures"} <= shown


@every_step
def test_help_all_shows_every_option(cls, capsys):
    assert main([*cls.name.split(), "--help-all"]) == 0
    assert {parameter.option for parameter in cls.parameters()} <= options(capsys.readouterr().out)


@every_step
def test_help_leaves_references_to_the_manual_and_units_in_brackets(cls, capsys):
    assert main([*cls.name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "References" not in shown
    assert "doi" not in shown.lower()
    for parameter in cls.parameters():
        if parameter.unit != "none" and not parameter.advanced:
            assert f"[{parameter.unit}]" in " ".join(shown.replace("│", " ").split())


def test_inputs_come_first_in_help(capsys):
    main(["import", "movies", "--help"])
    shown = capsys.readouterr().out
    assert shown.index("--movies") < shown.index("--pixel-size")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "--dose-per-frame is missing: exposure of each stored frame, a number (e/Å²)"),
        (["--dose-per-frame", "much"], "--dose-per-frame takes a number (e/Å²), not 'much'"),
        (["--dose-per-frame"], "--dose-per-frame takes a number (e/Å²), but nothing was given"),
        (["--dose-per-frame", "1", "2"], "--dose-per-frame takes a number (e/Å²), but '1 2' was given"),
        (["--dose-per-frame", "-1"], "--dose-per-frame must be greater than 0, not -1"),
        (["--dose-per-frame", "1", "--pixel_size=abc"], "--pixel-size takes a number (Å/px), not 'abc'"),
        (["--dose-per-frame", "1", "--workers", "1.5"], "--workers takes a whole number, not '1.5'"),
        (["--dose-per-frame", "1", "--gain-rotation", "7"], "--gain-rotation takes 0, 1, 2 or 3, not '7'"),
        (["--dose-per-frame", "1", "--check-gain", "no"], "--check-gain takes no value, but 'no' was given"),
        (["--dose-per-frame", "1", "--no-such-option", "7"], "there is no option --no-such-option"),
        (
            ["--dose-per-frame", "1", "--pixelsize", "7"],
            "there is no option --pixelsize (did you mean --pixel-size?)",
        ),
        (["--dose-per-frame", "1", "--cs", "7"], "there is no option --cs (did you mean --Cs?)"),
        (["--dose-per-frame", "nan"], "--dose-per-frame must be a finite number, not nan"),
        (["--dose-per-frame", "inf"], "--dose-per-frame must be a finite number, not inf"),
        (["--dose-per-frame", "1", "-x", "7"], "there is no option -x"),
        (["--dose-per-frame", "1", "--movies"], "--movies: nothing was given"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_makes_no_job(words, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["import", "movies", "--movies", "a.tif", *words]) == 2
    assert capsys.readouterr() == ("", f"halfmap: {problem}; see: halfmap import movies --help\n")
    assert list(tmp_path.iterdir()) == []


def test_all_missing_options_are_named(capsys):
    assert main(["import", "movies"]) == 2
    assert re.findall("--[a-z-]+(?= is missing)", capsys.readouterr().err) == ["--movies", "--dose-per-frame"]
    assert main(["resume"]) == 2
    assert capsys.readouterr().err.startswith("halfmap: --job is missing")


def test_what_cannot_be_explained_is_said_in_the_parsers_words_without_a_frame(monkeypatch, capsys):
    monkeypatch.setattr("halfmap.cli.explain", lambda *_: None)
    assert main(["import", "movies", "a.tif"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "--dose-per-frame" in shown
    assert not set("╭│─") & set(shown)


def test_a_tuple_takes_bare_words_after_its_option(tmp_path):
    assert main(["toy", "--n", "6", "--bad", "1", "3", "--seconds", "0", "--project", str(tmp_path)]) == 0
    job = Project.open(tmp_path).job(1)
    assert job.step.model_dump()["bad"] == (1, 3)
    assert (job.folder / "squares.txt").read_text().split() == ["0", "0", "2", "4", "4", "16", "5", "25"]


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (["1-3,5"], (1, 2, 3, 5)),
        (["1-3", "5"], (1, 2, 3, 5)),
        (["1-3,", "5"], (1, 2, 3, 5)),
        (["4-4"], (4,)),
        (["=0-1,7"], (0, 1, 7)),
    ],
)
def test_whole_numbers_may_be_given_as_ranges(tmp_path, words, numbers):
    option = ["--bad" + words[0]] if words[0].startswith("=") else ["--bad", *words]
    assert main(["toy", "--n", "9", *option, "--project", str(tmp_path)]) == 0
    assert Project.open(tmp_path).job(1).step.model_dump()["bad"] == numbers


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--bad", "1", "5-3"], "--bad: 5-3 runs backwards; write 3-5"),
        (["--bad=5-3"], "--bad: 5-3 runs backwards; write 3-5"),
        (["--bad"], "--bad has no numbers; give some, or leave it out"),
        (["--bad", "--n", "3"], "--bad has no numbers; give some, or leave it out"),
        (["--bad", "0-99999999999"], "--bad: 0-99999999999 stands for 100,000,000,000 numbers"),
        (["--bad", "1-b"], "--bad takes whole numbers, or ranges such as 1-5,8, not '1-b'"),
        (["--bad", "1--3"], "--bad takes whole numbers, or ranges such as 1-5,8, not '1--3'"),
        (["--n", "1-3"], "--n takes a whole number, not '1-3'"),
    ],
)
def test_ranges_that_cannot_be_are_one_sentence(tmp_path, monkeypatch, capsys, words, problem):
    monkeypatch.chdir(tmp_path)
    assert main(["toy", *words]) == 2
    said = capsys.readouterr().err.removesuffix("\n").removesuffix("; see: halfmap toy --help")
    assert said == f"halfmap: {problem}"
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_tuple_are_bare_words_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        write_mrc(f"{name}.mrc", np.random.default_rng(1).normal(size=(16, 16)), pixel_size=1.5)
    assert main(["import", "micrographs", "--micrographs", "a.mrc", "b.mrc", "--voltage", "200"]) == 0
    assert [str(path) for path in Project.open(".").job(1).step.inputs()] == ["a.mrc", "b.mrc"]


def test_a_job_that_failed_leaves_its_mark_and_exit_code_2(tmp_path, capsys):
    words = ["toy", "--n", "2", "--bad", "0", "1", "--project", str(tmp_path)]
    assert main(words) == 2
    assert "every number failed" in capsys.readouterr().err
    assert Project.open(tmp_path).job(1).status == "Failed"


def test_resume_finishes_a_failed_job(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    step = toy_step.Toy(n=3)
    job = Project.open(".").new_job(step)
    assert main(["resume", "job001"]) == 0
    assert job.status == "Succeeded"
    assert main(["resume", "1"]) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert main(["resume", "77"]) == 2
    assert "has no job 77" in capsys.readouterr().err


def test_resume_outside_a_project_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["resume", "1"]) == 2
    assert "no project here" in capsys.readouterr().err


def test_info_describes_files_and_projects(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_mrc("map.mrc", np.zeros((4, 4, 4), np.float32), pixel_size=2.5)
    assert main(["toy", "--n", "1"]) == 0
    capsys.readouterr()
    assert main(["info", "map.mrc", "."]) == 0
    shown = capsys.readouterr().out
    assert "volume of 4 × 4 × 4 voxels" in shown
    assert "2.5 Å" in shown
    assert "Toy/job001/" in shown
    assert "Succeeded" in shown


def test_info_of_what_is_not_there(tmp_path, capsys):
    assert main(["info", str(tmp_path / "no.mrc")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert main(["info", str(tmp_path)]) == 2
    assert "is not a project" in capsys.readouterr().err
    assert main(["info"]) == 0


def test_doctor_examines_the_machine(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for word in ("torch", "Memory", "Disk", "CPU", halfmap.__version__):
        assert word in shown


def test_a_pipe_that_closes_early_is_no_error():
    command = f"{sys.executable} -m halfmap import movies --help-all | head -1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_start_up_imports_no_heavy_package():
    heavy = "{'torch', 'polars', 'numba', 'scipy', 'pandas', 'matplotlib', 'gemmi', 'dask', 'numpy'}"
    code = (
        "import sys; from halfmap.cli import main; main(['--help']); main(['import']); "
        f"print('HEAVY', sorted({heavy} & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert shown.stdout.splitlines()[-1] == "HEAVY []"


def test_resume_makes_no_project_of_a_misspelt_folder(tmp_path, capsys):
    assert main(["resume", "1", "--project", str(tmp_path / "misspelt")]) == 2
    assert "misspelt: no project here; name its folder with --project" in capsys.readouterr().err
    assert not (tmp_path / "misspelt").exists()


def test_a_wrong_input_leaves_the_folder_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["import", "movies", "none/*.tiff", "--dose-per-frame", "1"]) == 2
    assert capsys.readouterr().err == "halfmap: none/*.tiff: input file does not exist\n"
    assert not list(tmp_path.iterdir())


def test_doctor_knows_help_from_a_folder(capsys):
    assert main(["doctor", "--help"]) == 0
    assert "halfmap doctor [FOLDER]" in capsys.readouterr().out
    assert main(["doctor", "/no/such/folder"]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_messages_come_once_however_often_a_process_calls(tmp_path, capsys):
    for _ in range(2):
        main(["toy", "--n", "1", "--project", str(tmp_path)])
    assert capsys.readouterr().err.count("job002/: done in") == 1


def test_seldom_needed_options_are_taken_without_help_all():
    cls = registered_steps()["simulate particles"]
    values, _ = parse_options(
        ["--focal-spread", "12.5"], cls, prog="halfmap simulate particles", description=""
    )
    assert values["focal_spread"] == 12.5


def test_what_is_named_counts_though_it_is_the_default():
    words = ["--gain-flip", "0", "--controls", "--seed=1"]
    values, _ = parse_options(words, RunSettings, prog="halfmap run", description="", named_only=True)
    assert values == {"gain_flip": 0, "controls": True, "seed": 1}
    values, _ = parse_options(
        ["--no-controls", "--set", "ctf.box=512"],
        RunSettings,
        prog="halfmap run",
        description="",
        named_only=True,
    )
    assert values == {"controls": False, "set": ("ctf.box=512",)}


def test_info_goes_on_after_a_file_that_it_cannot_read(tmp_path, capsys):
    write_mrc(tmp_path / "good.mrc", np.zeros((4, 6), np.float32), pixel_size=1.5)
    (tmp_path / "bad.mrc").write_bytes(b"no map")
    assert main(["info", str(tmp_path / "bad.mrc"), str(tmp_path / "good.mrc")]) == 2
    captured = capsys.readouterr()
    assert "6 × 4 px" in captured.out
    assert "1 of 2 could not be described" in captured.err


def test_info_of_a_jobs_folder_is_of_that_job(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["toy", "--n", "4", "--bad", "1"]) == 0
    assert main(["toy", "--n", "1"]) == 0
    capsys.readouterr()
    assert main(["info", "Toy/job001"]) == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "Toy/job001/ toy",
        "status Succeeded",
        "--n 4",
        "--bad 1",
        "done 3 of 4 numbers, 1 failed",
        "table Toy/job001/squares.txt",
        "failures 1 left out, named in Toy/job001/failures.star",
        "warnings 4 given, in Toy/job001/run.err",
        "number 2 is looked at",
        "go on with halfmap resume Toy/job001",
    ):
        assert line in shown
    assert not any("number 3 is looked at" in line for line in shown)
    assert any("is a bad number" in line for line in shown)
    assert not any("job002" in line for line in shown)


def test_info_of_a_folder_inside_a_job_is_of_that_job(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["toy", "--n", "1"]) == 0
    inside = tmp_path / "Toy/job001/Parts/first"
    inside.mkdir(parents=True)
    capsys.readouterr()
    for place, title in ((inside, "Toy/job001/"), (inside.parents[2], "Project")):
        monkeypatch.chdir(place)
        assert main(["info", "."]) == 0
        assert capsys.readouterr().out.split()[0] == title


def test_an_input_that_its_job_has_yet_to_write(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.star", "job.star"):
        Path(name).touch()
    step = Class2DStep(particles=Path("a.star"))
    job = Project.open(".").new_job(step)
    said = "halfmap: Class2D/job001/model.star: input file does not exist; its job "
    with (job.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["select", "Class2D/job001/model.star"]) == 2
        running = "is running and writes it at the end: see halfmap info Class2D/job001\n"
        assert capsys.readouterr().err == said + running
        assert main(["select", "Class2D/job001/jo.star"]) == 2
        assert "did you mean Class2D/job001/job.star?" in capsys.readouterr().err
    monkeypatch.chdir("Class2D")
    assert main(["select", "job001/model.star"]) == 2
    stopped = "has not ended well (aborted); go on with: halfmap resume job001\n"
    assert capsys.readouterr().err == said.replace("Class2D/", "") + stopped


def test_a_misspelt_project_folder_is_refused_by_steps_that_go_on(tmp_path, monkeypatch, capsys):
    """Also where their files are found from the folder that one stands in."""
    monkeypatch.chdir(tmp_path)
    Path("particles.star").touch()
    assert main(["class2d", "particles.star", "--project", "misspelt"]) == 2
    assert f"{tmp_path}/misspelt: there is no such project folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["particles.star"]
    assert main(["toy", "--project", "new"]) == 0
    assert (tmp_path / "new/Toy/job001").is_dir()


def test_the_last_lines_of_a_job_name_outputs_failures_and_warnings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["toy", "--n", "9", "--bad", "1", "2", "4", "5", "8"]) == 0
    lines = capsys.readouterr().err.splitlines()
    place = next(i for i, line in enumerate(lines) if "done in" in line)
    assert lines[place + 1 :] == [
        "  table        Toy/job001/squares.txt",
        "5 numbers failed, named in Toy/job001/failures.star:",
        *(f"  {n}.mrc: is a bad number; leave it out" for n in (1, 2, 4)),
        "  and 2 more",
        "  once mended or replaced, `halfmap resume Toy/job001` does only what is missing",
        "9 warnings, in Toy/job001/run.err too:",
        *(f"  number {n} is looked at" for n in range(3)),
        "  and 6 more",
    ]
    assert any(line.startswith("9 of 9 numbers, 5 failed, ") for line in lines)
    assert lines[place + 1 :] == [
        line.partition(" INFO ")[2]
        for line in Path("Toy/job001/run.out").read_text().splitlines()[place + 1 - len(lines) :]
    ]


def test_what_is_in_view_still_is_not_said_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["toy", "--n", "2", "--bad", "1"]) == 0
    shown = capsys.readouterr().err
    assert shown.count("1.mrc: is a bad number") == shown.count("number 1 is looked at") == 1
    lines = shown.splitlines()
    place = next(i for i, line in enumerate(lines) if "done in" in line)
    assert lines[place + 2 :] == [
        "1 number failed, named in Toy/job001/failures.star",
        "  once mended or replaced, `halfmap resume Toy/job001` does only what is missing",
        "2 warnings, in Toy/job001/run.err too",
    ]


def test_a_job_that_failed_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["toy", "--n", "2", "--bad", "0", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "2 numbers failed, named in Toy/job001/failures.star" in lines
    assert lines[-1].startswith("halfmap: every number failed; the first one: 0.mrc: is a bad number")


@pytest.mark.parametrize("options", [["--device", "cuda:99"], ["--n", "-1"]])
def test_a_run_refused_at_once_leaves_nothing(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    assert main(["toy", *options]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_job_keeps_the_options_that_are_not_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = []
    monkeypatch.setattr(
        toy_step.Toy, "run", lambda self, ctx: runs.append(ctx.options.model_dump(exclude={"project"}))
    )
    assert main(["toy", "--workers", "3", "--executor", "serial", "--max-failures", "7"]) == 2
    assert main(["resume", "1"]) == 2
    assert main(["resume", "1", "--workers=1"]) == 2
    assert main(["resume", "1"]) == 2
    first = RunOptions(executor="serial", workers=3, max_failures=7).model_dump()
    assert runs == [first, first, first | {"workers": 1}, first | {"workers": 1}]
    with pytest.raises(ProjectError):
        Project.open(".").resume(1, RunOptions(device="cpu"))
    assert runs[-1] == first | {"workers": 1, "device": "cpu"}


def test_a_new_project_is_announced_and_a_table_of_another_one_warned_of(tmp_path, monkeypatch, capsys):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    write_mrc("a.mrc", np.random.default_rng(1).normal(size=(64, 64)), pixel_size=1.5)
    assert main(["import", "micrographs", "a.mrc"]) == 0
    assert f"a new project begins in {tmp_path}/one\n" in capsys.readouterr().err
    assert main(["import", "micrographs", "a.mrc"]) == 0
    assert "new project" not in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "two")
    table = tmp_path / "one/Import/job001/micrographs.star"
    Path("picks.star").write_text("data_\n\nloop_\n_rlnCoordinateX\n_rlnCoordinateY\n1 1\n")
    words = ["import", "coordinates", "picks.star", "--micrographs", str(table)]
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert f"{table} is of the project {tmp_path}/one" in shown
    assert "to go on there: --project ../one\n" in shown
    assert f"a new project begins in {tmp_path}/two\n" in shown


def test_relions_names_of_options_mean_ours(capsys):
    cls = registered_steps()["import movies"]
    words = ["a.tif", "--dose_per_frame", "1.5", "--angpix=0.8", "--kV", "200", "--gain_rot", "3"]
    values, _ = parse_options(words, cls, prog="halfmap import movies", description="")
    assert (values["pixel_size"], values["voltage"], values["gain_rotation"]) == (0.8, 200, 3)
    assert main(["import", "movies", "a.tif", "--dose-per-frame", "1", "--angpix", "x"]) == 2
    assert "--pixel-size takes a number (Å/px), not 'x'" in capsys.readouterr().err
    main(["import", "movies", "--help"])
    assert "--angpix, --kV" in capsys.readouterr().out


@every_step
def test_names_of_options_are_distinct(cls):
    parameters = [*cls.parameters(), *RunOptions.parameters()]
    names = [name.replace("_", "-") for p in parameters for name in (p.option, *p.aliases)]
    assert len(set(names)) == len(names)


@every_step
def test_help_speaks_of_no_none(cls, capsys):
    main([*cls.name.split(), "--help-all"])
    shown = capsys.readouterr().out
    for word in ("{None}", "None", "default: True", "default: False"):
        assert word not in shown


def test_a_folder_in_the_place_of_a_file_and_a_misspelt_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("Movies").mkdir()
    Path("Movies/a.tif").touch()
    for words, problem in (
        (["Movies"], "Movies: is a folder, not a file; name what lies in it: 'Movies/*'"),
        (["Movies/aa.tif"], "Movies/aa.tif: input file does not exist; did you mean Movies/a.tif?"),
        (["Movies/*.mrc"], "Movies/*.mrc: input file does not exist"),
    ):
        assert main(["import", "movies", *words, "--dose-per-frame", "1"]) == 2
        assert capsys.readouterr().err == f"halfmap: {problem}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["Movies"]


def test_a_jobs_folder_in_the_place_of_what_it_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    step = {"label": "relion.class2d", "alias": "None", "status": "Succeeded"}
    with edit_pipeline(tmp_path) as pipeline:
        for number, outputs in enumerate(({"particles": "", "model": ""}, {}), start=1):
            name = f"Class2D/job{number:03d}/"
            Path(name).mkdir(parents=True)
            pipeline.processes.append(Process(name, **step))
            made = {out.file: out.node for key, out in Class2DStep.outputs.items() if key in outputs}
            pipeline.connect(name, [], {name + file: node for file, node in made.items()})
    Path("Class2D/job001/model.star").touch()
    for step, folder, hint in (
        ("select", "Class2D/job001", "did you mean Class2D/job001/model.star?"),
        ("class2d", "Class2D/job001/", "did you mean Class2D/job001/particles.star?"),
        ("select", "Class2D/job002", "name the file in it"),
        ("select", "Class2D", "name the file in it"),
        ("import particles", "Class2D/job001", "name the file in it"),
    ):
        assert main([*step.split(), folder]) == 2
        said = f"halfmap: {folder.rstrip('/')}: is a folder, not a file; {hint}\n"
        assert capsys.readouterr().err == said


def test_a_disk_that_refuses_is_one_sentence_wherever_it_comes_up(monkeypatch, capsys):
    def refuse(_: list[str]) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/data/movies")

    monkeypatch.setitem(cli._COMMANDS, "doctor", refuse)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == (
        "halfmap: /data/movies: permission denied; check the permissions of it and the folders above\n"
    )

    def fail(_: list[str]) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/ours")

    monkeypatch.setitem(cli._COMMANDS, "doctor", fail)
    with pytest.raises(FileNotFoundError):
        main(["doctor"])


def test_warnings_of_worker_processes_are_in_the_jobs_files_and_last_lines(tmp_path, capsys):
    words = ["toy", "--n", "3", "--workers", "2", "--project", str(tmp_path)]
    assert main(words) == 0
    folder = tmp_path / "Toy/job001"
    for text in ((folder / "run.out").read_text(), (folder / "run.err").read_text()):
        assert text.count("WARNING number 2 is looked at") == 1
    assert "3 warnings, in Toy/job001/run.err too\n" in capsys.readouterr().err
