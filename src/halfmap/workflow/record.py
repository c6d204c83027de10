"""What the chain has done in a project: its stages, the job of each, and the decisions made from the data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halfmap.errors import FileFormatError
from halfmap.io.atomic import write_text

RECORD_FILE = "halfmap_run.json"
"""In the project's folder."""


@dataclass(frozen=True)
class Decision:
    """One choice that was made from the data.

    Parameters
    ----------
    chosen : str
        What was chosen, such as ``diameter 130 Å``.
    why : str
        From what, in a phrase.
    override : str
        Option that chooses otherwise, such as ``--diameter``.
    """

    chosen: str
    why: str
    override: str = ""

    def __str__(self) -> str:
        text = f"{self.chosen}: {self.why}"
        return f"{text} (else {self.override})" if self.override else text


@dataclass(frozen=True)
class Stage:
    """A stage of the chain that has run: its name, its job, and the decisions that shaped the job.

    Parameters
    ----------
    name : str
        Such as ``motion`` or ``refine``; unique in the chain.
    job : str
        Folder of the job in the project, such as ``Motion/job002/``.
        Empty if the stage was found not to be needed.
    decisions : tuple of Decision
        In the order in which they were made.
    replaced : tuple of str
        Earlier jobs of the stage, which others have taken the place of.
    """

    name: str
    job: str
    decisions: tuple[Decision, ...] = ()
    replaced: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """The chain of a project: what it was given, and its stages in order.

    Parameters
    ----------
    options : mapping
        What is known of the data set, as of `RunSettings`.
    stages : tuple of Stage
        Its stages.
    run : mapping
        How its jobs ran last, as of `RunOptions`.
    live : mapping
        What of `halfmap live` goes on holding, as of `Watch`.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    run: Mapping[str, Any] = field(default_factory=dict)
    live: Mapping[str, Any] = field(default_factory=dict)

    def decisions(self, job: str) -> tuple[Decision, ...]:
        """The decisions that shaped the job in the folder `job`; none if the chain has not made it."""
        return next((stage.decisions for stage in self.stages if stage.job == job), ())


def read_record(root: Path) -> Record:
    """Read the record of the project in the folder `root`; an empty one if the chain has not run there.

    Raises
    ------
    FileFormatError
        If the file is no such record.
    """
    path = root / RECORD_FILE
    if not path.exists():
        return Record()
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        stages = tuple(
            Stage(
                each["name"],
                each["job"],
                tuple(Decision(**made) for made in each["decisions"]),
                tuple(each.get("replaced", ())),
            )
            for each in plain["stages"]
        )
        return Record(plain["options"], stages, plain.get("run", {}), plain.get("live", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            "is not a record of `halfmap run`", path=path, hint="remove it, and the chain begins anew"
        ) from error


def write_record(root: Path, record: Record) -> None:
    """Write the record of the project in the folder `root`, whole or not at all."""
    write_text(root / RECORD_FILE, json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n")
