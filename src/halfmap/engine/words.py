"""Say in a sentence what is wrong with the words of a command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from halfmap.engine.parameters import Parameter
from halfmap.errors import ParameterError

_ONE = {float: "a number", int: "a whole number", Path: "a file name", str: "a word"}
_MANY = {float: "numbers", int: "whole numbers, or ranges such as 1-5,8", Path: "file names", str: "words"}

_RANGES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*,?")
_MOST = 100_000
"""Numbers that ranges may stand for: far more than anyone means."""


def translate(words: Iterable[str], parameters: Iterable[Parameter]) -> list[str]:
    """Put our options in the place of those of other programs that mean the same."""
    meant = {alias: parameter.option for parameter in parameters for alias in parameter.aliases}
    options = [(word, *word.partition("=")) for word in words]
    return [meant[name] + equals + value if name in meant else word for word, name, equals, value in options]


def expand(words: Iterable[str], parameters: Iterable[Parameter]) -> list[str]:
    """Put numbers in the place of ranges, ``1-5,8``, after options that take several whole numbers.

    Raises
    ------
    ParameterError
        If a range runs backwards, or stands for more numbers than can be meant, or such an option has none:
        it would count as not given. If an option of several values is given twice: only the last would count.
    """
    several = {parameter.option: kind_of(parameter)[0] for parameter in parameters if kind_of(parameter)[1]}
    many = {option for option, kind in several.items() if kind is int}
    expanded: list[str] = []
    given: set[str] = set()
    current = ""
    for word, following in pairwise([*words, "--"]):
        if word in many and _is_option(following):
            raise ParameterError(f"{word} has no numbers", hint="give some, or leave it out")
        if _is_option(word):
            name, _, value = word.partition("=")
            current = "--" + name[2:].replace("_", "-")
            if current in several and current in given and not _is_option(following):
                raise ParameterError(f"{current} is given twice", hint="put all its values after the first")
            given.add(current)
            if current not in many or not _RANGES.fullmatch(value):
                expanded.append(word)
                continue
            expanded.append(current)
            word = value
        if current in many and _RANGES.fullmatch(word):
            expanded += _numbers(word, current)
        else:
            expanded.append(word)
    return expanded


def _numbers(word: str, option: str) -> Iterator[str]:
    for part in word.rstrip(",").split(","):
        first, _, last = part.partition("-")
        start, stop = int(first), int(last or first)
        if stop < start:
            raise ParameterError(f"{option}: {part} runs backwards", hint=f"write {last}-{first}")
        if stop - start >= _MOST:
            raise ParameterError(f"{option}: {part} stands for {stop - start + 1:,} numbers")
        yield from map(str, range(start, stop + 1))


def value_of(text: str, parameter: Parameter) -> Any:
    """What a word stands for as the value of an option; several values are parted by commas.

    Raises
    ------
    ParameterError
        If it cannot be the option's value.
    """
    kind, many = kind_of(parameter)
    words = [each for each in text.split(",") if each] if many else [text]
    if many and kind is int:
        words = expand([parameter.option, text], [parameter])[1:]
    problem = None if kind is bool else _misfit(parameter.option, words, parameter)
    if problem:
        raise ParameterError(problem)
    if text == "None" and parameter.default is None:
        return None
    if get_origin(kind) is Literal:
        return next(each for each in get_args(kind) if str(each) == text)
    return tuple(words) if many else text


def explain(words: Sequence[str], parameters: Iterable[Parameter]) -> str | None:
    """Say what is wrong with a command line that could not be parsed: what was given, what is expected.

    Parameters
    ----------
    words : sequence of str
        Options and their values.
    parameters : iterable of Parameter
        What there is to be given.

    Returns
    -------
    str or None
        A sentence on the first wrong option, or on all that are missing; None if nothing seems wrong.
    """
    known = {parameter.option: parameter for parameter in parameters}
    off = {"--no-" + option[2:]: p for option, p in known.items() if kind_of(p)[0] is bool}
    given: dict[str, list[str]] = {}
    current = ""
    for word in words:
        if not _is_option(word):
            if not current:
                return f"{word!r} follows no option"
            given[current].append(word)
            continue
        name, equals, value = word.partition("=")
        current = "--" + name[2:].replace("_", "-") if name.startswith("--") else name
        if current not in known and current not in off:
            aliases = [alias for parameter in known.values() for alias in parameter.aliases]
            names = {name.lower(): name for name in (*aliases, *off, *known)}
            close = get_close_matches(current.lower(), names, n=1, cutoff=0.75)
            return f"there is no option {current}" + (f" (did you mean {names[close[0]]}?)" if close else "")
        given[current] = [value] if equals else []
    for option, values in given.items():
        problem = _misfit(option, values, (known | off)[option])
        if problem:
            return problem
    missing = [p for p in known.values() if p.default is ... and p.option not in given]
    return "; ".join(f"{p.option} is missing: {p.help}, {_expected(p)}" for p in missing) or None


def _is_option(word: str) -> bool:
    return word.startswith("-") and not _fits(word, float)


def _misfit(option: str, values: list[str], parameter: Parameter) -> str | None:
    kind, many = kind_of(parameter)
    if kind is bool:
        return f"{option} takes no value, but {' '.join(values)!r} was given" if values else None
    expected = f"{option} takes {_expected(parameter)}"
    wrong = next((value for value in values if not _fits(value, kind)), None)
    if not values and not many:
        return f"{expected}, but nothing was given"
    if wrong is not None and not (wrong == "None" and parameter.default is None):
        return f"{expected}, not {wrong!r}"
    if len(values) > 1 and not many:
        return f"{expected}, but {' '.join(values)!r} was given"
    return None


def _expected(parameter: Parameter) -> str:
    kind, many = kind_of(parameter)
    if get_origin(kind) is Literal:
        *others, last = map(str, get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    text = (_MANY if many else _ONE).get(kind, "values" if many else "a value")
    return text if parameter.unit == "none" else f"{text} ({parameter.unit})"


def kind_of(parameter: Parameter) -> tuple[Any, bool]:
    """Type of a parameter's value where one is given, and whether several may be."""
    kind = parameter.annotation
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        kinds = [part for part in get_args(kind) if part is not NoneType]
        kind = kinds[0] if len(kinds) == 1 else None
    return (get_args(kind)[0], True) if get_origin(kind) is tuple else (kind, False)


def _fits(word: str, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return word in map(str, get_args(kind))
    if kind not in (int, float):
        return True
    try:
        kind(word)
    except ValueError:
        return False
    return True
