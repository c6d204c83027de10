"""What a step decides from all of its items, and how long that holds while more are to come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from halfmap.io.atomic import write_text

GROWTH = 1.5
"""Items over those that a decision was made from, up to which it is kept while more are to come.

Each decision that falls has all items done again. With this factor that is less than three times the work
of doing each once, however many there will be.
"""

_FILE = "decisions.json"


@dataclass(frozen=True)
class Decisions:
    """Decisions of a job that all of its items have a part in, such as the particle's size.

    Parameters
    ----------
    folder : path
        Of the job.
    growing : bool
        Whether more items are to come, so that what is decided now will be decided again anyway.
    """

    folder: Path
    growing: bool = False

    def hold(self, what: str, made_from: Sequence[str]) -> bool:
        """Whether a decision of an earlier run holds.

        It does if it was made from the same items, or while more are to come, until there are half as many
        more. Then the job is provisional. One that does not hold is forgotten at once: who is killed while
        what follows from a new one is written makes it once more.

        Parameters
        ----------
        what : str
            Name of the decision, unique in the job.
        made_from : sequence of str
            Names of the items that it would be made from now, and what else it depends on.
        """
        kept = self._read()
        if what not in kept:
            return False
        same = kept[what]["of"] == digest(made_from)
        if not same and not (self.growing and len(made_from) < GROWTH * kept[what]["items"]):
            self._write({name: entry for name, entry in kept.items() if name != what})
            return False
        now = None if same else len(made_from)
        if now != kept[what]["now"]:
            self._write(kept | {what: kept[what] | {"now": now}})
        return True

    def note(self, what: str, made_from: Sequence[str]) -> None:
        """Note that a decision has been made, when all that follows from it is written."""
        entry = {"items": len(made_from), "of": digest(made_from), "now": None}
        self._write(self._read() | {what: entry})

    def provisional(self) -> list[tuple[str, int, int]]:
        """Decisions made from fewer items than there are: what, from how many, of how many."""
        found = self._read().items()
        return [(what, one["items"], one["now"]) for what, one in found if one["now"] is not None]

    def _read(self) -> dict[str, dict]:
        path = self.folder / _FILE
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _write(self, entries: dict[str, dict]) -> None:
        write_text(self.folder / _FILE, json.dumps(entries, indent=2) + "\n")


def digest(parts: Iterable[str]) -> str:
    """A short sum of texts, by which the same are known again."""
    total = hashlib.blake2b(digest_size=12)
    for part in parts:
        total.update(part.encode() + b"\n")
    return total.hexdigest()
