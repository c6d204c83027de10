"""Write the manual's page of steps from their definitions."""

from __future__ import annotations

import inspect
from pathlib import Path

from halfmap.engine import Step, registered_steps
from halfmap.steps import load_steps


def step_page(cls: type[Step]) -> str:
    """One step as Markdown: what it does, its parameters by section, its outputs."""
    lines = [f"## `halfmap {cls.name}`", "", inspect.getdoc(cls) or "", ""]
    lines += ["| Option | Meaning | Unit | Default |", "|---|---|---|---|"]
    for parameter in cls.parameters():
        default = "required" if parameter.default is ... else f"`{parameter.default}`"
        unit = "" if parameter.unit == "none" else parameter.unit
        lines.append(f"| `{parameter.option}` | {parameter.help} | {unit} | {default} |".replace("||", "|"))
    lines += ["", "| Output | File | RELION's node type |", "|---|---|---|"]
    lines += [f"| {name} | `{out.file}` | `{out.node}` |" for name, out in cls.outputs.items()]
    return "\n".join(lines)


def main() -> None:
    """Write ``docs/steps.md``."""
    load_steps()
    pages = [
        step_page(cls).replace("References\n----------", "**References**\n")
        for cls in registered_steps().values()
    ]
    text = "# Steps\n\nIn the order of the pipeline.\n\n" + "\n\n".join(pages) + "\n"
    Path(__file__).with_name("steps.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
