"""The end of a report: how every job was run, so that it can be run again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from halfmap.engine import RunOptions
from halfmap.engine.progress import duration
from halfmap.markup import Markup, element, facts, folded, joined, table
from halfmap.workflow.report.graph import Node
from halfmap.workflow.report.times import began, elapsed
from halfmap.workflow.report.titles import title

_COMMAND = "++++ with the following command(s):"


def list_jobs(nodes: Sequence[Node]) -> Markup:
    """Every job that led to the result: its time, its parameters, its versions and its command."""
    rows = []
    for node in nodes:
        start, seconds = began(node), elapsed(node)
        rows.append(
            (
                element("a", node.name.rstrip("/"), href=f"#{node.anchor}"),
                node.step,
                node.status,
                "" if start is None else f"{start:%Y-%m-%d %H:%M}",
                "" if seconds is None else duration(seconds),
            )
        )
    total = sum(elapsed(node) or 0.0 for node in nodes)
    return joined(
        table(("Job", "Step", "Status", "Began", "Took"), rows),
        element("p", f"All together: {duration(total)}.") if total else None,
        [_details(node) for node in nodes],
    )


def _details(node: Node) -> Markup:
    record = node.record
    packages = ", ".join(f"{name} {version}" for name, version in record.get("packages", {}).items())
    versions = [("Halfmap", record.get("halfmap")), ("Python", record.get("python")), ("Packages", packages)]
    commands = command_of(node)
    changed = _changed(node)
    return folded(
        f"{node.name.rstrip('/')}: {title(node)}",
        element("pre", commands) if commands else None,
        table(("Option", "Value", "Meaning"), changed) if changed else _no_parameters(node),
        facts([(name, value) for name, value in versions if value]),
    )


def _no_parameters(node: Node) -> Markup:
    text = "All parameters are at their defaults." if node.job else "Its parameters are in its job.star."
    return element("p", text, class_="quiet")


def _changed(node: Node) -> list[tuple[Markup, str, str]]:
    """Parameters and run options that are not at their defaults."""
    if node.job is None:
        return []
    step = node.job.step
    rows = []
    values = step.model_dump(mode="json")
    for parameter in step.parameters():
        if getattr(step, parameter.name) != parameter.default:
            unit = "" if parameter.unit == "none" else f" {parameter.unit}"
            rows.append(
                (element("code", parameter.option), as_text(values[parameter.name]) + unit, parameter.help)
            )
    run = node.record.get("run", {})
    for parameter in RunOptions.parameters():
        value = run.get(parameter.name, parameter.default)
        if value != parameter.default:
            rows.append((element("code", parameter.option), as_text(value), parameter.help))
    return rows


def as_text(value: object) -> str:
    """The value of a parameter as people read it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def command_of(node: Node) -> str:
    """The command that does the same again, as the job's note tells; "" if there is none."""
    text = ""
    with suppress(OSError):
        text = (node.folder / "note.txt").read_text(encoding="utf-8", errors="replace")
    lines = text.split(_COMMAND, maxsplit=1)[1:]
    if not lines:
        return ""
    kept = (line.strip() for line in lines[0].splitlines() if not line.strip().startswith("++++"))
    return "\n".join(filter(None, kept))


def list_others(nodes: Sequence[Node]) -> Markup | None:
    """Jobs of the project that did not lead to the result: those that ended badly with the reason."""
    if not nodes:
        return None
    bad = [node for node in nodes if node.status not in ("Succeeded", "Running", "Scheduled")]
    good = [node for node in nodes if node not in bad]
    rows = [(node.name.rstrip("/"), node.step, node.status, node.error or "") for node in bad]
    names = ", ".join(
        node.name.rstrip("/") + ("" if node.status == "Succeeded" else f" ({node.status.lower()})")
        for node in good
    )
    return joined(
        table(("Job", "Step", "Status", "Error"), rows) if rows else None,
        element("p", f"Not part of what is shown: {names}.") if good else None,
    )
