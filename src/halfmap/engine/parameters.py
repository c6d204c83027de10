"""Typed parameters with help, unit and section, declared once and read by every front end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from halfmap.errors import ParameterError
from halfmap.units import UNITS, Unit


def Param(
    default: Any,
    help: str,  # noqa: A002 - the word that argparse, tyro and users use
    *,
    unit: Unit,
    section: str,
    advanced: bool = False,
    **limits: Any,
) -> Any:
    """Declare a parameter of a step.

    Parameters
    ----------
    default
        Value used when none is given; ``...`` makes the parameter required.
    help : str
        One phrase for a structural biologist, without the unit.
    unit : str
        Unit from `halfmap.units.Unit`; ``"none"`` says that there is none.
    section : str
        Heading under which help and forms show it.
    advanced : bool
        Hidden from ``--help``, shown by ``--help-all``.
    **limits
        pydantic's constraints: ``ge``, ``gt``, ``le``, ``lt``, ``min_length``, …
    """
    if unit not in UNITS:
        raise ValueError(f"unit {unit!r} is not among {', '.join(UNITS)}")
    extra = {"unit": unit, "section": section, "advanced": advanced}
    return Field(default, description=help, json_schema_extra=extra, **limits)


def Input(
    help: str,  # noqa: A002
    *,
    node: str = "",
    default: Any = ...,
    section: str = "Input",
    **limits: Any,
) -> Any:
    """Declare an input file of a step: an edge of the project's graph.

    Parameters
    ----------
    help : str
        What the file holds.
    node : str
        RELION node type that it takes, "" for files from outside the project.
    default
        ``None`` makes the input optional.
    section : str
        Heading under which help and forms show it.
    **limits
        pydantic's constraints.
    """
    extra = {"unit": "none", "section": section, "advanced": False, "input": node}
    return Field(default, description=help, json_schema_extra=extra, **limits)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a step as command line, form and docs need it."""

    name: str
    annotation: Any
    help: str
    default: Any
    unit: str
    section: str
    advanced: bool
    node: str | None

    @property
    def option(self) -> str:
        """The parameter as an option of the command line."""
        return "--" + self.name.replace("_", "-")


class Form(BaseModel):
    """A frozen set of parameters, each declared by `Param` or `Input`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def parameters(cls) -> Iterator[Parameter]:
        """Every parameter with its help, unit, section and default, in the order of declaration."""
        for name, info in cls.model_fields.items():
            extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            yield Parameter(
                name=name,
                annotation=info.rebuild_annotation(),
                help=info.description or "",
                default=... if info.is_required() else info.default,
                unit=str(extra.get("unit", "")),
                section=str(extra.get("section", "")),
                advanced=bool(extra.get("advanced", False)),
                node=None if "input" not in extra else str(extra["input"]),
            )


FormType = TypeVar("FormType", bound=Form)


def parse_form(cls: type[FormType], values: Mapping[str, Any], *, hint: str | None = None) -> FormType:
    """Build a form from plain values.

    Parameters
    ----------
    cls : type of Form
        What to build.
    values : mapping
        Values by parameter name.
    hint : str, optional
        Where the user finds what is allowed.

    Raises
    ------
    ParameterError
        If a value is missing, of the wrong kind or out of its limits; names the option.
    """
    try:
        return cls(**values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            option = "--" + str(item["loc"][0]).replace("_", "-") + ": " if item["loc"] else ""
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "too_short":
                message = "nothing was given"
            elif isinstance(item["input"], int | float):
                message += f", not {item['input']:g}"
            problems.append(f"{option}{message[:1].lower()}{message[1:]}")
        raise ParameterError("; ".join(dict.fromkeys(problems)), hint=hint) from None
