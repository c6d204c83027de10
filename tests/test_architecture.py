from __future__ import annotations

import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest

from halfmap.engine import Step, registered_steps
from halfmap.engine.step import Out
from halfmap.io.star import read_star
from halfmap.project import Project
from halfmap.project.job import Job
from halfmap.steps import PIPELINE, load_steps
from halfmap.units import UNITS

ROOT = Path(__file__).resolve().parents[1]

load_steps()
STEPS = [cls for cls in registered_steps().values() if cls.__module__.startswith("halfmap.")]
every_step = pytest.mark.parametrize("cls", STEPS, ids=lambda cls: cls.name)
every_parameter = pytest.mark.parametrize(
    "parameter",
    [parameter for cls in STEPS for parameter in cls.parameters()],
    ids=[f"{cls.name} {parameter.option}" for cls in STEPS for parameter in cls.parameters()],
)


def example(cls: type[Step]) -> Step:
    """An instance with the least that the step can run on."""
    schema = cls.model_json_schema()
    values: dict = {"map": "a.mrc"} if cls.name == "import map" else {}
    if cls.name == "motion":
        values = {"movies": "a.star"}
    for name in set(schema.get("required", [])) - set(values):
        kind = schema["properties"][name]["type"]
        values[name] = {"array": ["a"], "string": "a", "number": 1.5, "integer": 3}[kind]
    return cls(**values)


def test_every_folder_of_steps_is_in_the_pipeline():
    folders = {path.parent.name for path in (ROOT / "src/halfmap/steps").glob("*/step.py")}
    assert folders == set(PIPELINE)
    assert {cls.name for cls in STEPS} >= {"import movies", "import particles", "simulate movies"}


@every_parameter
def test_a_parameter_says_what_it_is(parameter):
    assert len(parameter.help) >= 5
    assert parameter.help == parameter.help.strip().removesuffix(".")
    assert parameter.unit in UNITS
    assert parameter.section
    assert parameter.section[0].isupper()


@every_parameter
def test_units_are_not_repeated_in_help_texts(parameter):
    assert f"[{parameter.unit}]" not in parameter.help


@every_step
def test_a_step_documents_itself(cls):
    text = inspect.getdoc(cls) or ""
    first = text.splitlines()[0]
    assert first.endswith(".")
    assert len(first) <= 110
    assert text.count("\n\n") >= 1, "one line alone does not say how it works"


@every_step
def test_outputs_are_distinct_files_with_node_types(cls):
    assert cls.outputs
    assert all(isinstance(out, Out) for out in cls.outputs.values())
    files = [out.file for out in cls.outputs.values()]
    assert len(set(files)) == len(files)
    for out in cls.outputs.values():
        # RELION's node types: kind.extension[.program[.detail]]
        assert re.fullmatch(r"[A-Z]\w+\.\w+(\.\w+)*", out.node)
        assert out.node.split(".")[1] == Path(out.file).suffix[1:]


def test_inputs_take_node_types_that_some_step_makes():
    made = {out.node for cls in STEPS for out in cls.outputs.values()}
    for cls in STEPS:
        for parameter in cls.parameters():
            if parameter.node:
                assert any(node.startswith(parameter.node) for node in made), (cls.name, parameter.name)


@every_step
def test_json_schema_holds_every_parameter(cls):
    schema = json.loads(json.dumps(cls.model_json_schema()))
    assert set(schema["properties"]) == {parameter.name for parameter in cls.parameters()}
    for parameter in cls.parameters():
        entry = schema["properties"][parameter.name]
        assert (entry["description"], entry["unit"], entry["section"]) == (
            parameter.help,
            parameter.unit,
            parameter.section,
        )


@every_step
def test_job_records_derive_from_the_step(cls, tmp_path):
    project = Project.open(tmp_path)
    (tmp_path / cls.folder / "job001").mkdir(parents=True)
    Job(project.root, f"{cls.folder}/job001/", example(cls)).write_record()
    blocks = read_star(tmp_path / cls.folder / "job001/job.star")
    assert blocks["job"]["rlnJobTypeLabel"] == cls.label
    assert re.fullmatch(r"(relion|halfmap)(\.\w+)+", cls.label)
    names = [parameter.name for parameter in cls.parameters()]
    assert blocks["joboptions_values"]["rlnJobOptionVariable"].to_list() == names
    record = json.loads((tmp_path / cls.folder / "job001/job.json").read_text())
    assert (record["step"], list(record["parameters"])) == (cls.name, names)


@every_step
def test_manual_page_names_every_option_and_output(cls):
    spec = importlib.util.spec_from_file_location("build_step_pages", ROOT / "docs/build_step_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.step_page(cls)
    for parameter in cls.parameters():
        assert f"| `{parameter.option}` | {parameter.help} |" in page
    for out in cls.outputs.values():
        assert f"`{out.file}`" in page
