"""What went wrong in a job: the table of items that failed, and the lines at its end that say so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from halfmap.engine import Failure
from halfmap.project.messages import WARNINGS_FILE

FAILURES_FILE = "failures.star"
"""Table of the items of a job that failed, and why."""

SHOWN = 3
"""Failures and warnings told in full; files name the others."""


def write_failures(folder: Path, failures: Sequence[Failure]) -> None:
    """Write the table of failures of a job in `folder`; without any there is none."""
    import polars as pl

    from halfmap.io.star import write_star

    path = folder / FAILURES_FILE
    path.unlink(missing_ok=True)
    if failures:
        columns = {"hmItem": [f.key for f in failures], "hmReason": [f.reason for f in failures]}
        table = pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String))
        write_star(path, {"failures": table})


def read_failures(folder: Path) -> list[tuple[str, str]]:
    """Items of the job in `folder` that failed, with their reasons."""
    from halfmap.io.star import read_star

    path = folder / FAILURES_FILE
    table = read_star(path)["failures"] if path.exists() else None
    return [(str(key), str(reason)) for key, reason in table.iter_rows()] if table is not None else []  # pyright: ignore


def closing_lines(
    name: str,
    failures: Sequence[Failure],
    warnings: Sequence[str],
    *,
    resume: str | None,
    in_view: Sequence[str] = (),
) -> Iterator[str]:
    """What the end of a job's run says of it: how many items failed and why, how to go on, warnings.

    What is all in view still is counted only.

    Parameters
    ----------
    name : str
        Folder of the job in its project.
    failures : sequence of Failure
        Items that failed.
    warnings : sequence of str
        Warnings given.
    resume : str, optional
        Command that goes on with the job, if that is of use.
    in_view : sequence of str
        Lines shown just before.
    """
    if failures:
        units = {failure.unit for failure in failures}
        unit = units.pop() if len(units) == 1 else "item"
        head = f"{count(len(failures), unit)} failed, named in {name}{FAILURES_FILE}"
        # Most reasons name the item.
        texts = [f.reason if f.key in f.reason else f"{f.key}: {f.reason}" for f in failures]
        yield from _listed(head, texts, in_view)
        if resume:
            yield f"  once mended or replaced, `{resume}` does only what is missing"
    if warnings:
        head = f"{count(len(warnings), 'warning')}, in {name}{WARNINGS_FILE} too"
        yield from _listed(head, warnings, in_view)


def _listed(head: str, texts: Sequence[str], in_view: Sequence[str]) -> Iterator[str]:
    if all(any(line.endswith(text) for line in in_view) for text in texts):
        yield head
        return
    yield f"{head}:"
    yield from (f"  {text}" for text in texts[:SHOWN])
    if len(texts) > SHOWN:
        yield f"  and {len(texts) - SHOWN:,} more"


def count(number: int, word: str) -> str:
    """A number of things in words: 1 movie, 2 movies."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def shortened(names: Sequence[str]) -> str:
    """The first of many names and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")
