"""Movies that a microscope writes into a folder: which of them are whole, and which may still become so."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from halfmap.engine import Input, Param
from halfmap.engine.parameters import Form
from halfmap.errors import HalfmapError, ParameterError
from halfmap.io.atomic import atomic_path, writing
from halfmap.io.movies import MOVIE_SUFFIXES, open_movie
from halfmap.project.outcome import count

if TYPE_CHECKING:
    from halfmap.workflow.settings import RunSettings

FOLDER = "Arrived"
"""In the project, where each movie that is whole has a link."""

ARRIVED = Path(FOLDER, "**", "*")
"""What the import of a watched folder takes."""

_AT_A_TIME_s = 30.0
"""Time after which files that are not looked into yet wait for the next round."""

LIVE = "Live"

State = Literal["whole", "broken", "no movie", "listed"]


class Watch(Form):
    """Process the movies that a microscope writes into a folder while they arrive, up to 2D classes.

    Takes the settings of `halfmap run`, makes the same jobs, and can be followed by it in the same project.
    It ends by Ctrl-C or as --quiet-minutes and --hours say, and the same command goes on where it was.
    """

    folder: Path = Input("folder that movies are written into; those in folders below it, too", folder=True)
    pattern: str | None = Param(
        None,
        "names of the movies, such as '*_Fractions.tiff'; default: all movies",
        unit="none",
        section=LIVE,
    )
    quiet_minutes: float | None = Param(
        None, "end when no new movie has come for so long; default: by Ctrl-C", unit="min", section=LIVE, gt=0
    )
    hours: float | None = Param(None, "end after this time", unit="h", section=LIVE, gt=0)
    settle: float = Param(
        10.0, "time for which a file must not have changed", unit="s", section=LIVE, advanced=True, ge=0
    )
    patience: float = Param(
        5.0,
        "time after which a file that cannot be read whole counts as broken",
        unit="min",
        section=LIVE,
        advanced=True,
        gt=0,
    )
    class_minutes: float = Param(
        60.0,
        "time after which classes are made anew though particles are less than half as many more",
        unit="min",
        section=LIVE,
        advanced=True,
        gt=0,
    )

    def lasting(self) -> dict[str, Any]:
        """What holds for the next session too, plain."""
        plain = self.model_dump(mode="json", include={"pattern", "settle", "patience", "class_minutes"})
        return plain | {"folder": str(self.folder.absolute())}

    def arrivals(self, root: Path, settings: RunSettings) -> Arrivals:
        """The movies of the folder, for the project in the folder `root`.

        Raises
        ------
        ParameterError
            If there is no such folder.
        """
        left_out = tuple(root / path for path in (settings.gain, settings.defects) if path is not None)
        return Arrivals(self.folder, root, self.pattern or "", left_out, self.settle, 60 * self.patience)


@dataclass
class _Candidate:
    """A file that is not known to be whole: what it was when it was seen last, and since when."""

    stamp: tuple[int, int]
    since: float
    state: State | None = None


@dataclass
class Arrivals:
    """The movies below a folder, those that are whole linked into a project.

    The links are all that is remembered: whoever is killed finds them when it starts again.

    Parameters
    ----------
    folder : Path
        That is watched, with all folders in it.
    root : Path
        Folder of the project.
    pattern : str
        Names of the movies below the folder, such as ``*_Fractions.tiff``; "" for all movies of known kinds.
    left_out : sequence of Path
        Files that are no movies: gain reference, defects.
    settle_s : float
        Time for which size and date of a file must not have changed.
    patience_s : float
        Time after which a file that cannot be read, and does not change, counts as broken: it is linked as
        well, so that the import names it among those that failed.
    """

    folder: Path
    root: Path
    pattern: str = ""
    left_out: Sequence[Path] = ()
    settle_s: float = 10.0
    patience_s: float = 300.0
    _linked: set[str] = field(default_factory=set, init=False)
    _candidates: dict[str, _Candidate] = field(default_factory=dict, init=False)
    last_change: float = field(default_factory=lambda: time.monotonic(), init=False)
    """When a file was last seen to be new or to have changed, as of `time.monotonic`."""

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise ParameterError(
                "there is no such folder", path=self.folder, hint="name the one that movies are written into"
            )
        self.folder = self.folder.resolve()
        place = self.root / FOLDER
        for path in (each for each in place.rglob("*") if each.is_symlink()):
            name = path.relative_to(place).as_posix()
            if path.readlink() == self.folder / name:
                self._linked.add(name)

    @property
    def taken(self) -> int:
        """Movies that have a link."""
        return len(self._linked)

    @property
    def waiting(self) -> int:
        """Files that may become whole."""
        return sum(each.state in (None, "broken") for each in self._candidates.values())

    def take(self, *, last_s: float | None = None) -> int:
        """Look for files that have come or changed, link those that are whole, and count them.

        Parameters
        ----------
        last_s : float, optional
            No more looks follow: of files that cannot be read those are taken that are as old by their dates.
        """
        now, found = time.monotonic(), dict(self._files())
        self._candidates = {name: each for name, each in self._candidates.items() if name in found}
        for name, stamp in found.items():
            known = self._candidates.get(name)
            if known is None or known.stamp != stamp:
                self._candidates[name] = _Candidate(stamp, now)
                self.last_change = now
        new = 0
        for name in sorted(self._candidates, key=lambda name: (self._candidates[name].stamp[1], name)):
            each = self._candidates[name]
            age = now - each.since
            settled = age >= self.settle_s
            given_up = age >= self.patience_s
            if last_s is not None:
                given_up = settled and self._age(name) >= last_s
            if (each.state is None and settled) or (each.state == "broken" and given_up):
                each.state = _look_into(self.folder / name)
            if each.state == "whole" or (each.state == "broken" and given_up):
                self._link(name)
                new += 1
            if each.state == "whole":
                del self._candidates[name]
            elif each.state == "broken" and given_up:
                each.state = "listed"
            if time.monotonic() - now > _AT_A_TIME_s and last_s is None:
                break
        return new

    def take_last(self, broken_after_s: float | None = None) -> int:
        """Take what is whole and count it, waiting once for files that may still be written.

        Parameters
        ----------
        broken_after_s : float, optional
            Age by its dates from which on a file that cannot be read is broken; by default its patience.
        """
        last_s = self.patience_s if broken_after_s is None else broken_after_s
        new = self.take(last_s=last_s)
        if self.waiting:
            time.sleep(self.settle_s)
            new += self.take(last_s=last_s)
        return new

    @property
    def left(self) -> str:
        """What to say of files that may become whole when no one looks any more; "" if there are none."""
        files = count(self.waiting, "file")
        return f"{files} still written: left out; the same command takes them" if self.waiting else ""

    def _age(self, name: str) -> float:
        """Seconds since a file was written, or came under its name with an older date."""
        try:
            stat = (self.folder / name).stat()
        except OSError:
            return 0.0
        return time.time() - max(stat.st_mtime, stat.st_ctime)

    def _files(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Names below the folder, with size and date, of files that are not known to be whole."""
        own = {self.root.resolve(), *(path.resolve() for path in self.left_out)}
        names = {path.name for path in own}
        folders, links, seen = [""], list[str](), set[tuple[int, int]]()
        # A folder has one name here, its own before those of links to it: each movie counts once.
        while folders or links:
            inside = folders.pop() if folders else links.pop(0)
            try:
                stat = (self.folder / inside).stat()
                entries = [] if (stat.st_dev, stat.st_ino) in seen else _sorted(self.folder / inside)
            except OSError:
                continue  # removed, or the connection to the microscope is gone for a while
            seen.add((stat.st_dev, stat.st_ino))
            for entry in entries:
                name = f"{inside}{entry.name}"
                if entry.name.startswith(".") or (name in self._linked and name not in self._candidates):
                    continue
                if entry.name in names and Path(entry.path).resolve() in own:
                    continue
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(f"{name}/")
                elif self._wanted(name):
                    try:
                        stat = entry.stat()
                    except OSError:
                        continue
                    yield name, (stat.st_size, stat.st_mtime_ns)

    def _wanted(self, name: str) -> bool:
        if self.pattern:
            return fnmatch(name, self.pattern) or fnmatch(PurePosixPath(name).name, self.pattern)
        return name.lower().endswith(MOVIE_SUFFIXES)

    def _link(self, name: str) -> None:
        path = self.root / FOLDER / name
        target = self.folder / name
        if path.is_symlink() and path.readlink() != target:
            message = f"is another movie of the same name as {target}"
            raise ParameterError(message, path=path.readlink(), hint="give each session a project of its own")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, durable=False) as temporary:
            temporary.symlink_to(target)
        self._linked.add(name)


def _sorted(folder: Path) -> list[os.DirEntry[str]]:
    return sorted(os.scandir(folder), key=lambda entry: entry.name)


def _look_into(path: Path) -> State:
    """Whether a file can be read to its end."""
    try:
        movie = open_movie(path)
        if movie.n_frames < 2:
            return "no movie"
        movie.read(movie.n_frames - 1)
    except (HalfmapError, OSError):
        return "broken"
    return "whole"
