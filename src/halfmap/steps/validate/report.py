"""The report: one page that holds its pictures, and the same findings as JSON."""

from __future__ import annotations

import base64
import html
import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import halfmap
from halfmap.io.atomic import write_text
from halfmap.log import log
from halfmap.steps.validate.finding import Finding, Given

if TYPE_CHECKING:
    from halfmap.engine import Context

_COLOURS = {"red": "#c62828", "amber": "#ef8f00", "green": "#2e7d32", "grey": "#9e9e9e"}
_WORDS = {"red": "wrong", "amber": "look closer", "green": "well", "grey": "not looked at"}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto;
padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.1em; margin: 0; }
.light { display: inline-block; width: 0.9em; height: 0.9em; border-radius: 50%; margin-right: 0.5em; }
table { border-collapse: collapse; width: 100%; } td { padding: 0.35em 0.6em; vertical-align: top;
border-bottom: 1px solid #ddd; } td:first-child { white-space: nowrap; font-weight: 600; }
section { border: 1px solid #ddd; border-left-width: 6px; border-radius: 4px; padding: 0.8em 1em;
margin: 1em 0; }
img { max-width: 100%; } .method, .values, footer { color: #666; font-size: 0.87em; }
.values td { padding: 0.1em 0.6em; border: 0; font-weight: 400; } a { color: inherit; }
"""


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
    told = [
        {
            "name": finding.name,
            "light": finding.light,
            "sentence": finding.sentence,
            "values": finding.values,
            "pictures": list(finding.pictures),
            "method": finding.method,
        }
        for finding in findings
    ]
    content = _finite({"general": general, "findings": told})
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(ctx.folder / "findings.json", text + "\n")
    write_text(ctx.folder / "report.html", page(ctx.folder, general, findings))
    counts = Counter(finding.light for finding in findings)
    said = ", ".join(f"{counts[light]} {light}" for light in _COLOURS if counts[light])
    tell = log.warning if counts["red"] else log.info
    tell("%d findings: %s; open report.html", len(findings), said)


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
    rows = "".join(
        f'<tr><td><a href="#f{i}">{_light(finding)}{html.escape(finding.name)}</a></td>'
        f"<td>{html.escape(finding.sentence)}</td></tr>"
        for i, finding in enumerate(findings)
    )
    about = "; ".join(f"{html.escape(name)}: {html.escape(str(value))}" for name, value in general.items())
    sections = "".join(_section(folder, i, finding) for i, finding in enumerate(findings))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<table>{rows}</table>{sections}<footer>{about}</footer></body></html>\n"
    )


def _light(finding: Finding) -> str:
    colour, word = _COLOURS[finding.light], _WORDS[finding.light]
    how = f'style="background:{colour}" role="img" aria-label="{word}" title="{word}"'
    return f'<span class="light" {how}></span>'


def _section(folder: Path, number: int, finding: Finding) -> str:
    pictures = "".join(
        f'<p><img alt="{html.escape(finding.name)}" '
        f'src="data:image/png;base64,{_encoded(folder / name)}"></p>'
        for name in finding.pictures
    )
    values = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(_shown(value))}</td></tr>"
        for name, value in finding.values.items()
    )
    figures = (
        f'<details><summary class="values">figures</summary><table class="values">{values}</table></details>'
    )
    return (
        f'<section id="f{number}" style="border-left-color:{_COLOURS[finding.light]}"><h2>{_light(finding)}'
        f"{html.escape(finding.name)}</h2><p>{html.escape(finding.sentence)}</p>{pictures}"
        f'<p class="method">{html.escape(finding.method)}</p>{figures if values else ""}</section>'
    )


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(each) for each in value)
    return str(value)
