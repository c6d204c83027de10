"""The report: one page that holds its pictures, and the same findings as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import halfmap
from halfmap.io.atomic import write_text
from halfmap.log import log
from halfmap.markup import LIGHTS, Markup, WIDTH_px, element, facts, folded, joined, light, picture
from halfmap.markup import page as page_of
from halfmap.steps.validate.finding import Finding, Given

if TYPE_CHECKING:
    from halfmap.engine import Context


def write(ctx: Context, given: Given, findings: list[Finding]) -> None:
    """Write ``report.html``, which needs no other file, and ``findings.json``."""
    general = {
        "halfmap": halfmap.__version__,
        "half_maps": [ctx.relative(path) for path in given.halves.paths],
        "mask": "made from the map"
        if given.step.mask is None
        else ctx.relative(ctx.resolve(given.step.mask)),
        "particles": None
        if given.step.particles is None
        else ctx.relative(ctx.resolve(given.step.particles)),
        "symmetry": given.step.symmetry,
        "box_px": given.halves.box,
        "pixel_size_A": given.halves.pixel_size,
        "diameter_A": given.diameter,
        "seed": given.step.seed,
    }
    content = _finite({"general": general, "findings": [_plain(finding) for finding in findings]})
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(ctx.folder / "findings.json", text + "\n")
    write_text(ctx.folder / "report.html", page(ctx.folder, general, findings))
    counts = Counter(finding.light for finding in findings)
    said = ", ".join(f"{counts[colour]} {colour}" for colour in LIGHTS if counts[colour])
    tell = log.warning if counts["red"] else log.info
    tell("%d findings: %s; open report.html", len(findings), said)


def _plain(finding: Finding) -> dict[str, Any]:
    return dataclasses.asdict(finding) | {"pictures": list(finding.pictures)}


def _finite(value: Any) -> Any:
    """The same as JSON has it: nothing where a number is not finite."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, str | bool | int | None):
        return value
    return float(value) if math.isfinite(value) else None


def page(folder: Path, general: dict[str, Any], findings: list[Finding]) -> str:
    """The report as HTML, with its pictures in it."""
    title = f"Is the map right? {', '.join(general['half_maps'])}"
    about = "; ".join(f"{name}: {value}" for name, value in general.items())
    told = [_plain(finding) for finding in findings]
    return page_of(
        title,
        element("h1", title),
        element("section", list_findings(told)),
        show_findings(told, folder),
        element("footer", about),
    )


def list_findings(findings: Sequence[dict[str, Any]]) -> Markup:
    """Findings in a table, each with its light and its sentence.

    Parameters
    ----------
    findings : sequence of dict
        As ``findings.json`` holds them.
    """
    rows = []
    for number, finding in enumerate(findings):
        name = element("a", light(finding["light"]), finding["name"], href=f"#finding{number}")
        rows.append(element("tr", element("td", name), element("td", finding["sentence"])))
    return element("table", rows, class_="findings")


def show_findings(findings: Sequence[dict[str, Any]], folder: Path, *, width: int = WIDTH_px) -> Markup:
    """Each finding with its pictures, its method and its figures.

    Parameters
    ----------
    findings : sequence of dict
        As ``findings.json`` holds them.
    folder : Path
        That of the job, where the pictures lie.
    width : int
        To which wider pictures are made smaller, px.
    """
    return joined(*(_section(folder, number, finding, width) for number, finding in enumerate(findings)))


def _section(folder: Path, number: int, finding: dict[str, Any], width: int) -> Markup:
    values = facts((name, _shown(value)) for name, value in finding["values"].items())
    return element(
        "section",
        element("h2", light(finding["light"]), finding["name"]),
        element("p", finding["sentence"]),
        [picture(folder / name, None, alt=finding["name"], width=width) for name in finding["pictures"]],
        element("p", finding["method"], class_="method") if finding["method"] else None,
        folded("Figures", values) if values else None,
        id=f"finding{number}",
        class_=finding["light"],
    )


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(each) for each in value)
    return str(value)
