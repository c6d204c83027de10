"""The command ``halfmap``, built from the registry of steps."""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import halfmap
from halfmap.engine import Param, RunOptions, Step, parse_step, registered_steps
from halfmap.engine.parameters import Form, Input, Parameter, parse_form
from halfmap.engine.words import expand, explain, kind_of, translate
from halfmap.errors import FileFormatError, HalfmapError, ParameterError
from halfmap.log import log, shown_on_terminal
from halfmap.steps import load_steps

EXIT_OK, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 2, 130
_MACHINE_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG),
)
"""Errors of disks and rights, which are no defects of ours wherever they come up."""

_FRAME = dict.fromkeys(map(ord, "╭╮╰╯│─"), " ")
_METAVARS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}
INPUT_SECTION = "Input"
"""Section that help shows first: nobody can start without it."""


class _Run(RunOptions):
    """Run options as the command line takes them."""

    project: Path | None = Param(
        None,
        "project folder; default: the one around this folder, else this folder",
        unit="none",
        section="Run",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        Words after ``halfmap``; default: the process's own.

    Returns
    -------
    int
        0 when done, 2 for an error that the user can mend, 130 when interrupted. A defect of Halfmap's shows
        its traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with shown_on_terminal():
            _dispatch(words)
    except HalfmapError as error:
        print(f"halfmap: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_USER_ERROR
    except BrokenPipeError:
        # The reader (head, less) has seen enough; Python must not complain at its end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in _MACHINE_ERRORS:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        hint = "; check the permissions of it and the folders above" if error.errno == errno.EACCES else ""
        print(f"halfmap: {where}{(error.strerror or '').lower()}{hint}", file=sys.stderr)  # noqa: T201
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemExit as end:
        return int(end.code or 0)
    return EXIT_OK


def _dispatch(words: list[str]) -> None:
    load_steps()
    steps = registered_steps()
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in steps:
            return _run_step(steps[name], words[length:])
        if name in _COMMANDS:
            return _COMMANDS[name](words[length:])
    family = {name: step for name, step in steps.items() if words and name.startswith(words[0] + " ")}
    if family and set(words[1:]) <= {"-h", "--help"}:
        return _print_list(f"halfmap {words[0]} COMMAND [OPTIONS]", {"Commands": _summaries(family)})
    if words and words[0] not in ("-h", "--help", "help"):
        known = [*(family or steps), *_COMMANDS]
        raise ParameterError(f"there is no command {words[0]!r}", hint=_did_you_mean(words, known))
    commands = {name: inspect.getdoc(command) or "" for name, command in _COMMANDS.items() if name[0] != "-"}
    _print_list(
        "halfmap COMMAND [OPTIONS]        halfmap COMMAND --help",
        {"Steps, in the order of the pipeline": _summaries(steps), "Other commands": commands},
    )
    return None


def _run_step(cls: type[Step], words: list[str]) -> None:
    from halfmap.project import Project

    # References are for the manual: --help would run their lines together.
    description = (inspect.getdoc(cls) or "").split("\n\nReferences\n")[0]
    values, run = parse_options(words, cls, prog=f"halfmap {cls.name}", description=description)
    step = parse_step(cls, values)
    project = Project.at(run.project) if run.project else Project.find() or Project.at(".")
    project.run(step, run)


def _resume(words: list[str]) -> None:
    """Go on with a job that was killed, interrupted or failed."""
    from halfmap.project import Project

    class Resume(Form):
        job: str = Param(..., "the job: Import/job001, job001 or 1", unit="none", section="Job")

    values, run = parse_options(
        words, Resume, prog="halfmap resume", description=inspect.getdoc(_resume) or ""
    )
    project = Project.find(run.project) if run.project else Project.find(values["job"]) or Project.find()
    if project is None:
        where = run.project or Path.cwd()
        raise ParameterError("no project here", path=where, hint="name its folder with --project")
    project.resume(values["job"], run)


def _run_chain(words: list[str]) -> None:
    """Run the whole chain: from movies, micrographs or particles to a validated map and a report."""
    from halfmap.project import Project
    from halfmap.workflow.run import run_chain
    from halfmap.workflow.settings import RunSettings

    description = inspect.getdoc(RunSettings) or ""
    given, run = parse_options(
        words, RunSettings, prog="halfmap run", description=description, named_only=True
    )
    project = Project.at(run.project) if run.project else Project.find() or Project.at(".")
    run_chain(project, given, run)


def _live(words: list[str]) -> None:
    """Process movies while a microscope writes them into a folder, up to 2D classes."""
    from halfmap.project import Project
    from halfmap.workflow.live import LiveSettings, run_live

    description = inspect.getdoc(LiveSettings) or ""
    given, run = parse_options(
        words, LiveSettings, prog="halfmap live", description=description, named_only=True
    )
    project = Project.at(run.project) if run.project else Project.find() or Project.at(".")
    run_live(project, given, run)


def _external_reconstruct(words: list[str]) -> None:
    """Make a map that RELION asks for (--external_reconstruct); writes neither job nor project."""
    from halfmap.workflow.external_reconstruct import ReconstructSettings, reconstruct

    if words and words[-1].endswith(".star") and words[-2:-1] != ["--star"]:
        # RELION adds the file's name to whatever is in its environment variable.
        words = [words[-1], *words[:-1]]
    description = inspect.getdoc(ReconstructSettings) or ""
    values, _ = parse_options(
        words, ReconstructSettings, prog="halfmap external-reconstruct", description=description, runs=False
    )
    reconstruct(parse_form(ReconstructSettings, values, hint="see: halfmap external-reconstruct --help"))


def _status(words: list[str]) -> None:
    """Show the graph of a project: how far each job is, what it stands on, and why it no longer holds."""
    if words[:1] in (["-h"], ["--help"]):
        return _print_list("halfmap status [PROJECT]", {})
    from rich.console import Console

    from halfmap.project import Project
    from halfmap.workflow.status import describe

    path = Path(words[0] if words else ".")
    project = Project.find(path)
    if project is None:
        raise ParameterError("is not a project", path=path, hint="a project has a default_pipeline.star")
    Console().print(describe(project))
    return None


def _report(words: list[str]) -> None:
    """Write one page, which needs no other file, of how a project came to its map."""
    from halfmap.project import Project
    from halfmap.workflow.report import write_report

    class Report(Form):
        what: str | None = Input(
            "the project's folder, or a job (Refine/job011, job011 or 11); default: the project around here",
            default=None,
            section="Report",
        )
        output: Path | None = Param(
            None, "name of the page; default: report.html in the project", unit="none", section="Report"
        )

    values, _ = parse_options(
        words, Report, prog="halfmap report", description=inspect.getdoc(_report) or "", runs=False
    )
    what = values["what"]
    project = Project.find(what) if what and Path(what).exists() else Project.find()
    if project is None:
        raise ParameterError("no project here", path=what or Path.cwd(), hint="name its folder")
    inside = what and not (Path(what).is_dir() and Path(what).resolve() == project.root.resolve())
    write_report(project, what if inside else None, values["output"])


def _info(words: list[str]) -> None:
    """Show what is in a file (MRC, STAR, CS, TIFF, EER), a job or a project, in one screen."""
    if not words or words[0] in ("-h", "--help"):
        return _print_list("halfmap info FILE|JOB|PROJECT ...", {})
    from rich.console import Console

    from halfmap.io.info import describe
    from halfmap.project.overview import describe_folder

    problems = []
    for word in words:
        path = Path(word)
        try:
            Console().print(describe_folder(path) if path.is_dir() else describe(path))
        except HalfmapError as error:
            if len(words) == 1:
                raise
            log.error("%s", error)
            problems.append(word)
    if problems:
        raise FileFormatError(
            f"{len(problems)} of {len(words)} could not be described: {', '.join(problems)}"
        )
    return None


def _doctor(words: list[str]) -> None:
    """Check this installation: versions, devices, memory, disk, optional parts."""
    if words[:1] in (["-h"], ["--help"]):
        return _print_list("halfmap doctor [FOLDER]", {})
    from rich.console import Console

    from halfmap.engine.doctor import examine

    folder = Path(words[0] if words else ".")
    if not folder.is_dir():
        raise ParameterError("is not a folder", path=folder, hint="name the one where projects are to lie")
    Console().print(examine(folder))
    return None


def _version(words: list[str]) -> None:
    """Print the version."""
    print(f"halfmap {halfmap.__version__}")  # noqa: T201


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "run": _run_chain,
    "live": _live,
    "status": _status,
    "report": _report,
    "info": _info,
    "resume": _resume,
    "doctor": _doctor,
    "external-reconstruct": _external_reconstruct,
    "--version": _version,
}


def _summaries(steps: dict[str, type[Step]]) -> dict[str, str]:
    return {name: (inspect.getdoc(step) or "").splitlines()[0] for name, step in steps.items()}


def _did_you_mean(words: list[str], known: list[str]) -> str:
    from difflib import get_close_matches

    # The second word may be a file; and ctffind begins as ctf does.
    close = [name for name in known if len(name) > 2 and words[0].startswith(name)]
    close = close or get_close_matches(" ".join(words[:2]), known, n=1, cutoff=0.75)
    close = close or get_close_matches(words[0], known, n=1)
    return f"did you mean {close[0]!r}?" if close else "see: halfmap --help"


def _print_list(usage: str, groups: dict[str, dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        "[bold]Halfmap[/]: single-particle cryo-EM from the microscope's movies to a validated map\n"
    )
    console.print(f"Usage: {usage}\n", markup=False)
    for title, group in groups.items():
        table = Table(box=None, show_header=False, padding=(0, 2))
        for name, summary in group.items():
            table.add_row(f"[bold]{name}[/]", summary)
        console.print(f"{title}:", table, "")


def parse_options(
    words: Sequence[str],
    form: type[Form],
    *,
    prog: str,
    description: str,
    runs: bool = True,
    named_only: bool = False,
) -> tuple[dict[str, Any], _Run]:
    """Parse a command line into a form's plain values and the run options; ``--help`` prints and exits.

    A command that does not run a job (`runs`) takes no run options. Of a form whose other values are those of
    an earlier run, only what the words name is given (`named_only`), also where it is the default.
    """
    import tyro

    # Seldom needed options are left out of the short help, and of nothing else.
    everything = not {"-h", "--help"} & set(words)
    words = ["--help" if word == "--help-all" else word for word in words]
    parameters = [*form.parameters(), *(_Run.parameters() if runs else ())]
    words = expand(translate(words, parameters), parameters)
    main_input = next((p for p in parameters if p.default is ... or p.node is not None), None)
    if main_input and words and not words[0].startswith("-"):
        # The first thing a step needs may be given without its option: halfmap import movies 'Movies/*.tiff'
        words = [main_input.option, *words]
    if main_input and not everything:
        description += f"\n\nWhat follows the command at once is taken for {main_input.option}."
    aliases = [alias for parameter in parameters for alias in parameter.aliases]
    if not everything and aliases:
        description += f"\n\nRELION's names are understood too: {', '.join(aliases)}."
    if not everything and any(parameter.advanced for parameter in parameters):
        description += "\n\nSeldom needed options: --help-all"
    sections: dict[str, list[Parameter]] = {}
    for parameter in sorted(parameters, key=lambda parameter: parameter.section != INPUT_SECTION):
        sections.setdefault(parameter.section, []).append(parameter)
    layout = make_dataclass(
        "Options", [_section(title, members, everything) for title, members in sections.items()], kw_only=True
    )
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(
                layout, args=words, prog=prog, description=description, config=(tyro.conf.OmitArgPrefixes,)
            )
    except SystemExit as end:
        if not end.code:
            raise
        # tyro frames what it says; what explain cannot tell is said in its words without the frame.
        said = " ".join(complaint.getvalue().translate(_FRAME).split())
        raise ParameterError(explain(words, parameters) or said, hint=f"see: {prog} --help") from None
    values = {name: value for part in vars(parsed).values() for name, value in vars(part).items()}
    run = {name: values.pop(name) for name in _Run.model_fields if runs}
    # A resumed job keeps its own options where none are named.
    named = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    named |= {name.removeprefix("no_") for name in named}
    given = {name: value for name, value in run.items() if name in named}
    if named_only:
        values = {name: value for name, value in values.items() if name in named}
    return values, parse_form(_Run, given, hint=f"see: {prog} --help")


def _section(title: str, members: list[Parameter], everything: bool) -> tuple[str, Any, Any]:
    """A section of a form as a nested dataclass, which tyro shows under a heading of its own."""
    import tyro

    columns = []
    for parameter in members:
        help_text = parameter.help if parameter.unit == "none" else f"{parameter.help} [{parameter.unit}]"
        marks: list[Any] = [
            tyro.conf.arg(
                help=help_text,
                help_behavior_hint=_default(parameter),
                metavar=_METAVARS.get(kind_of(parameter)[0]) if parameter.default is None else None,
            )
        ]
        if parameter.advanced and not everything:
            marks.append(tyro.conf.Suppress)
        default = field() if parameter.default is ... else field(default=parameter.default)
        columns.append((parameter.name, Annotated[(parameter.annotation, *marks)], default))
    section = make_dataclass(title.title().replace(" ", ""), columns, kw_only=True)
    required = any(parameter.default is ... for parameter in members)
    return title.lower().replace(" ", "_"), section, field() if required else field(default_factory=section)


def _default(parameter: Parameter) -> str | None:
    """What help says of the value that is taken when none is given; None leaves it to tyro."""
    if parameter.default in (None, ()):
        return "" if "default:" in parameter.help else "(optional)"
    if isinstance(parameter.default, bool):
        return f"(default: {'on' if parameter.default else 'off'})"
    return None
