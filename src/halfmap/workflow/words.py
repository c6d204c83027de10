"""What steps say of their options, in the words of the chain."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from halfmap.engine import Step
from halfmap.engine.words import kind_of
from halfmap.errors import HalfmapError
from halfmap.log import log

_COMMAND = re.compile(r"(`halfmap [^`]*`|halfmap [a-z]\w* [^;,)]*)")
_OPTION = re.compile(
    r"--(?P<name>[a-z][a-z0-9-]*)"
    r"(?:=(?P<word>[^\s;,)]+)|[ ](?P<value>-?\d+(?:[.,]\d+)*|[A-Z]+\b))?"
)

_THE_SAME = {"diameter", "symmetry", "seed", "controls"}
"""Options of steps that `halfmap run` has under the same name, for all of them."""

_IN_A_SPHERE = {"class2d", "abinitio", "class3d", "refine", "validate"}
"""Steps whose diameter is that of a sphere, which the particle lies in, and not the particle's."""


@dataclass(frozen=True)
class Words:
    """Options of a stage's step, and what stands for them on the command line of the chain.

    Parameters
    ----------
    stage : str
        Of the chain.
    step : type of Step
        That it runs.
    """

    stage: str
    step: type[Step]

    def translate(self, text: str) -> str:
        """Put ``--set STAGE.PARAMETER=VALUE`` in the place of options that are the step's alone."""
        parts = _COMMAND.split(text)
        return "".join(part if i % 2 else _OPTION.sub(self._one, part) for i, part in enumerate(parts))

    def translate_error(self, error: HalfmapError) -> None:
        """Translate what an error says."""
        error.message = self.translate(error.message)
        error.hint = None if error.hint is None else self.translate(error.hint)

    def _one(self, match: re.Match[str]) -> str:
        known = {parameter.name: parameter for parameter in self.step.parameters()}
        word, value = match["name"].replace("-", "_"), match["word"] or match["value"]
        is_off = word not in known and word.startswith("no_")
        name = word.removeprefix("no_") if is_off else word
        if name not in known or self._means_the_same(name):
            return match[0]
        target = f"--set {self.stage}.{name.replace('_', '-')}="
        if kind_of(known[name])[0] is bool:
            return f"{target}{'false' if is_off else 'true'}" + (f" {value}" if value else "")
        return f"{target}{value or '...'}"

    def _means_the_same(self, name: str) -> bool:
        if self.step.name.startswith("import"):
            from halfmap.workflow.settings import RunSettings

            return name in RunSettings.model_fields
        return name in _THE_SAME and not (name == "diameter" and self.step.name in _IN_A_SPHERE)


@contextmanager
def log_in(words: Words) -> Iterator[None]:
    """Translate what is logged in the block."""

    def translated(record: logging.LogRecord) -> bool:
        with suppress(TypeError, ValueError):  # handlers say what is wrong with it
            record.msg, record.args = words.translate(record.getMessage()), None
        return True

    log.addFilter(translated)
    try:
        yield
    finally:
        log.removeFilter(translated)
