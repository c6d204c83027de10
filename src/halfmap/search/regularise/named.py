"""Regularisers by their names: those built in, and those that other packages add."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from halfmap.errors import ParameterError
from halfmap.nets.weights import shipped
from halfmap.search.regularise import Evidence, Filter, Regulariser
from halfmap.search.regularise.external import External
from halfmap.search.regularise.fsc import fsc
from halfmap.search.regularise.learned import WEIGHTS, Learned
from halfmap.search.regularise.nonuniform import nonuniform
from halfmap.search.regularise.sidesplitter import sidesplitter

ENTRY_POINTS = "halfmap.regularisers"
"""Group of entry points under which a package names a `Regulariser` of its own."""


@dataclass(frozen=True)
class Settings:
    """What some regularisers need beside what an iteration has found.

    Attributes
    ----------
    folder : path
        Of the job, for files.
    diameter : float or None
        Of the particle, Å.
    external_program : str or None
        See `External`.
    weights : path or None
        Of the network of `Learned`.
    device : str
    """

    folder: Path = Path()
    diameter: float | None = None
    external_program: str | None = None
    weights: Path | None = None
    device: str = "cpu"


_BUILT_IN: dict[str, Regulariser] = {"fsc": fsc, "nonuniform": nonuniform, "sidesplitter": sidesplitter}


def _external(settings: Settings) -> Regulariser:
    made = External(settings.folder, settings.diameter, settings.external_program)
    made.command()  # Whether there is a program should be known before the first iteration.
    return made


def _learned(settings: Settings) -> Regulariser:
    made = Learned(settings.weights or shipped(WEIGHTS), settings.device)
    made.network()  # Whether it can be read should be known before the first iteration.
    return made


_MADE: dict[str, Callable[[Settings], Regulariser]] = {"external": _external, "learned": _learned}
"""Those that are made with settings."""


@dataclass(frozen=True)
class Named:
    """A regulariser that is looked up where it is used, so that these are all that is kept of it."""

    name: str
    settings: Settings = Settings()

    def __call__(self, evidence: Evidence) -> Filter:
        """Filter for all sums of an iteration."""
        return find(self.name, self.settings)(evidence)


def find(name: str, settings: Settings = Settings()) -> Regulariser:
    """Regulariser of a name, with the settings that it needs of those given.

    Raises
    ------
    ParameterError
        If there is none, its package cannot be loaded, or its settings do not do.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    if name in _MADE:
        return _MADE[name](settings)
    added = {each.name: each for each in entry_points(group=ENTRY_POINTS)}
    if name not in added:
        known = ", ".join([*_BUILT_IN, *_MADE, *sorted(added)])
        raise ParameterError(f"there is no regulariser {name!r}", hint=f"give one of {known}")
    try:
        return added[name].load()
    except Exception as error:
        raise ParameterError(f"the regulariser {name!r} cannot be loaded: {error}") from error
