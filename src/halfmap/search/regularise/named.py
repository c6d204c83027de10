"""Regularisers by their names: those built in, and those that other packages add."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points

from halfmap.errors import ParameterError
from halfmap.search.regularise import Evidence, Filter, Regulariser
from halfmap.search.regularise.fsc import fsc
from halfmap.search.regularise.nonuniform import nonuniform
from halfmap.search.regularise.sidesplitter import sidesplitter

ENTRY_POINTS = "halfmap.regularisers"
"""Group of entry points under which a package names a `Regulariser` of its own."""

_BUILT_IN: dict[str, Regulariser] = {"fsc": fsc, "nonuniform": nonuniform, "sidesplitter": sidesplitter}


@dataclass(frozen=True)
class Named:
    """A regulariser that is looked up where it is used, so that its name is all that is kept of it."""

    name: str

    def __call__(self, evidence: Evidence) -> Filter:
        """Filter for all sums of an iteration."""
        return find(self.name)(evidence)


def find(name: str) -> Regulariser:
    """Regulariser of a name.

    Raises
    ------
    ParameterError
        If there is none, or its package cannot be loaded.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    added = {each.name: each for each in entry_points(group=ENTRY_POINTS)}
    if name not in added:
        known = ", ".join([*_BUILT_IN, *sorted(added)])
        raise ParameterError(f"there is no regulariser {name!r}", hint=f"give one of {known}")
    try:
        return added[name].load()
    except Exception as error:
        raise ParameterError(f"the regulariser {name!r} cannot be loaded: {error}") from error
