"""Typed parameters with help, unit and section, declared once and read by every front end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
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
    aliases: tuple[str, ...] = (),
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
    aliases : tuple of str
        What RELION or MotionCor call an option that means exactly the same; the command line takes it too.
    **limits
        pydantic's constraints: ``ge``, ``gt``, ``le``, ``lt``, ``min_length``, …
    """
    if unit not in UNITS:
        raise ValueError(f"unit {unit!r} is not among {', '.join(UNITS)}")
    extra: dict[str, Any] = {"unit": unit, "section": section, "advanced": advanced}
    if aliases:
        extra["aliases"] = list(aliases)
    return Field(default, description=help, json_schema_extra=extra, **limits)


def Input(
    help: str,  # noqa: A002
    *,
    node: str = "",
    default: Any = ...,
    section: str = "Input",
    aliases: tuple[str, ...] = (),
    folder: bool = False,
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
    aliases : tuple of str
        As of `Param`.
    folder : bool
        Whether a folder is wanted, where else a file is.
    **limits
        pydantic's constraints.
    """
    extra: dict[str, Any] = {"unit": "none", "section": section, "advanced": False, "input": node}
    extra["folder"] = folder
    if aliases:
        extra["aliases"] = list(aliases)
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
    aliases: tuple[str, ...]
    is_folder: bool

    @property
    def option(self) -> str:
        """The parameter as an option of the command line."""
        return _as_option(self.name)


class Form(BaseModel):
    """A frozen set of parameters, each declared by `Param` or `Input`.

    Raises
    ------
    ParameterError
        If any is missing, unknown, of the wrong kind or out of its limits; names all of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = _problems(type(self), error, str)
            raise ParameterError(f"{type(self).__name__}: {problems}") from None

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
                aliases=tuple(f"--{alias}" for alias in extra.get("aliases", ())),  # pyright: ignore
                is_folder=bool(extra.get("folder", False)),
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
    form = cls.__new__(cls)
    try:
        BaseModel.__init__(form, **values)
    except ValidationError as error:
        raise ParameterError(_problems(cls, error, _as_option), hint=hint) from None
    return form


def check_value(cls: type[Form], name: str, value: Any, *, hint: str | None = None) -> None:
    """Refuse a value that one parameter of a form cannot have, whatever the others are.

    Raises
    ------
    ParameterError
        If it is of the wrong kind or out of its limits.
    """
    form = cls.__new__(cls)
    try:
        BaseModel.__init__(form, **{name: value})
    except ValidationError as error:
        mine = [item for item in error.errors() if item["loc"][:1] == (name,)]
        if mine:
            raise ParameterError(_clauses(cls, mine, _as_option), hint=hint) from None


def _as_option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _problems(cls: type[Form], error: ValidationError, named: Callable[[str], str]) -> str:
    """All that pydantic found wrong, a clause each."""
    return _clauses(cls, error.errors(), named)


def _clauses(cls: type[Form], items: Iterable[Any], named: Callable[[str], str]) -> str:
    known = {parameter.name: parameter for parameter in cls.parameters()}
    clauses = []
    for item in items:
        name = str(item["loc"][0]) if item["loc"] else ""
        value = item["input"]
        message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        message = message.partition(", unable to parse")[0]
        if not name:
            clauses.append(message)
        elif item["type"] == "missing":
            clauses.append(f"{named(name)} is missing: {known[name].help}")
        elif item["type"] == "extra_forbidden":
            close = get_close_matches(name, known, n=1)
            guess = f" (did you mean {named(close[0])}?)" if close else ""
            clauses.append(f"there is no {named(name)}{guess}")
        elif item["type"] == "too_short":
            clauses.append(f"{named(name)}: nothing was given")
        else:
            number = f", not {value:g}" if isinstance(value, int | float) else ""
            given = f", not {value!r}" if isinstance(value, str) else number
            clauses.append(f"{named(name)}{' ' if message.startswith('must') else ': '}{message}{given}")
    return "; ".join(dict.fromkeys(clauses))
