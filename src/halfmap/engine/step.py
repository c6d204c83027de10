"""The one definition of a step, from which command line, schema, docs, job files and graph all derive."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from halfmap.engine.parameters import Form, parse_form

if TYPE_CHECKING:
    from halfmap.engine.context import Context

_REGISTRY: dict[str, type[Step]] = {}


@dataclass(frozen=True)
class Out:
    """One output of a step.

    Parameters
    ----------
    file : str
        Name inside the job folder.
    node : str
        RELION's node type; what an input must name to accept this output.
    optional : bool
        Whether a job may end well without writing it.
    """

    file: str
    node: str
    optional: bool = False


_FOLDERS = {
    "abinitio": "InitialModel",
    "class2d": "Class2D",
    "class3d": "Class3D",
    "postprocess": "PostProcess",
    "localres": "LocalRes",
}
"""Where RELION's spelling is another."""


class Step(Form):
    """A step of the pipeline: its parameters as a frozen model, and `run`.

    A subclass registers itself under `name`, the words that call it on the command line::

        class CtfStep(Step, name="ctf", label="relion.ctffind"):
            ...

    Abstract families (shared parameters) give no name and are not registered.

    Attributes
    ----------
    name : str
        Words on the command line, for instance ``"simulate movies"``.
    label : str
        RELION's job type where it has one, else ``halfmap.<name>``.
    folder : str
        Folder of the project that holds the jobs of this step.
    outputs : mapping of str to Out
        Files that a finished job holds.
    """

    name: ClassVar[str] = ""
    label: ClassVar[str] = ""
    folder: ClassVar[str] = ""
    outputs: ClassVar[Mapping[str, Out]] = {}

    def __init_subclass__(cls, *, name: str = "", label: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = name
        if not name:
            return
        if name in _REGISTRY and _REGISTRY[name].__module__ != cls.__module__:
            raise ValueError(f"two steps are called {name!r}")
        cls.label = label or f"halfmap.{name.replace(' ', '.')}"
        cls.folder = _FOLDERS.get(name) or name.split()[0].capitalize()
        _REGISTRY[name] = cls

    @abstractmethod
    def run(self, ctx: Context) -> None:
        """Do the work inside ``ctx.folder``; reads as the paragraph of a methods section."""

    def inputs(self) -> list[Path]:
        """Every input file that this instance names."""
        paths: list[Path] = []
        for parameter in self.parameters():
            value = getattr(self, parameter.name)
            if parameter.node is None or value is None:
                continue
            paths.extend(value if isinstance(value, tuple | list) else [value])
        return [Path(path) for path in paths]


def registered_steps() -> dict[str, type[Step]]:
    """All registered steps by name, in the order in which they registered."""
    return dict(_REGISTRY)


def parse_step(cls: type[Step], values: Mapping[str, Any]) -> Step:
    """Build a step from plain values; `ParameterError` if one is missing, wrong or out of range."""
    return parse_form(cls, values, hint=f"see: halfmap {cls.name} --help")
