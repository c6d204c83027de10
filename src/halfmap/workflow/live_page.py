"""How a live session stands: a line for the terminal, and a page with its figures over time."""

from __future__ import annotations

import io
import re
import time
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from halfmap.io.atomic import write_text
from halfmap.markup import Content, Markup, data_address, element, facts, joined, page, picture, table
from halfmap.project.outcome import count, read_failures
from halfmap.workflow.arrivals import FOLDER
from halfmap.workflow.measured import read_particle_facts

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

    from halfmap.workflow.chain import Chain

PAGE = "live.html"
"""In the project's folder."""

FEWEST = 200
"""Particles from which classes show something."""

_AGAIN_s = 30
"""After which a browser looks at the page again."""

_POINTS = 3000
"""Micrographs that are drawn, the last ones."""

_SHOWN = 30
"""Failures that are listed, the last ones."""

_SERIES = (
    ("rlnDefocusU", "defocus, µm", 1e-4),
    ("rlnCtfMaxResolution", "rings to, Å", 1.0),
    ("rlnAccumMotionTotal", "motion, Å", 1.0),
    ("rlnCtfIceRingDensity", "ice rings", 1.0),
    ("hmIceThicknessRelative", "ice, free paths", 1.0),
    ("hmPicks", "picks", 1.0),
)
"""What is drawn against time: column, title, factor."""

_WIDTH, _HEIGHT = 1100, 110

_BESIDE = 0.02
"""Room beside the first and the last point, in parts of the time between them; so that axes hide none."""

_ABOVE = 0.1
"""The same above and below."""


@dataclass(frozen=True)
class Standing:
    """How a session stands.

    Attributes
    ----------
    taken, waiting : int
        Movies that were whole, and files that are not yet.
    failures : list of tuple of 3 str
        Job, item and reason of what was left out.
    micrographs : DataFrame or None
        Those with a CTF by the ``time`` of their movies, in seconds since 1970 (null if they were gone before
        it was noted), whether they are ``kept``; None before the first one.
    picks : int
        In all.
    classes : path or None
        Picture of the last classes.
    particles : int
        Cut so far, as long as there are no classes.
    """

    taken: int
    waiting: int
    failures: list[tuple[str, str, str]]
    micrographs: pl.DataFrame | None
    picks: int
    classes: Path | None
    particles: int = 0

    def line(self) -> str:
        """The session in a line."""
        movies = count(self.taken, "movie")
        beside = [f"{self.waiting:,} waiting"] if self.waiting else []
        beside += [f"{len(self.failures):,} failed"] if self.failures else []
        parts = [f"{movies} ({', '.join(beside)})" if beside else movies]
        if self.micrographs is not None:
            last = self.micrographs.row(-1, named=True)
            parts.append(f"{self.micrographs.height:,} done, {int(self.micrographs['kept'].sum()):,} kept")
            parts.append(
                f"last: {last['rlnDefocusU'] * 1e-4:.2f} µm, rings to {last['rlnCtfMaxResolution']:.1f} Å"
            )
        if self.picks:
            parts.append(count(self.picks, "pick"))
        if self.classes is not None:
            parts.append(f"classes of {_clock(self.classes.stat().st_mtime)}")
        return ", ".join(parts)


def look(chain: Chain, taken: int, waiting: int) -> Standing:
    """See how a session stands from the files of its jobs.

    Parameters
    ----------
    chain : Chain
        That has run, or has come as far as it could.
    taken, waiting : int
        As of `Standing`.
    """
    folders = {name: chain.project.root / stage.job for name, stage in chain.done.items() if stage.job}
    # What did not run in this round stands as it stood.
    for stage in chain.record.stages:
        if stage.job and stage.name not in folders:
            folders[stage.name] = chain.project.root / stage.job
    failures = [
        (folders[name].parent.name, key, reason)
        for name in ("import", "motion", "ctf", "curate", "first-pick", "first-extract")
        if name in folders
        for key, reason in read_failures(folders[name])
    ]
    micrographs = _micrographs(folders)
    picked = 0 if micrographs is None else int(micrographs["hmPicks"].sum())
    classes = folders.get("first-class2d", Path()) / "classes.png"
    standing = Standing(taken, waiting, failures, micrographs, picked, None)
    if classes.exists():
        return replace(standing, classes=classes)
    cut = folders.get("first-extract", Path()) / "particles.star"
    return replace(standing, particles=read_particle_facts(cut).number if cut.exists() else 0)


def _micrographs(folders: dict[str, Path]) -> pl.DataFrame | None:
    """Micrographs with a CTF, by the time of their movies."""
    import polars as pl

    from halfmap.io.star import read_star
    from halfmap.io.tables import read_micrographs
    from halfmap.project.inputs import times_of

    path = folders.get("ctf", Path()) / "micrographs_ctf.star"
    if not path.exists():
        return None
    rows = read_micrographs(path).rows
    name, when = "rlnMicrographName", times_of(folders["import"])
    movies = rows["rlnMicrographMovieName" if "rlnMicrographMovieName" in rows.columns else name]
    rows = rows.with_columns(
        pl.Series("time", [when.get(movie) for movie in movies], dtype=pl.Float64),
        pl.Series("kept", [True] * rows.height),
        pl.lit(0).alias("hmPicks"),
    )
    kept = folders.get("curate", Path()) / "micrographs.star"
    if kept.exists():
        rows = rows.with_columns(kept=pl.col(name).is_in(read_micrographs(kept).rows[name].to_list()))
    picks = folders.get("first-pick", Path()) / "autopick.star"
    found = read_star(picks)["coordinate_files"] if picks.exists() else None
    if isinstance(found, pl.DataFrame):
        rows = rows.drop("hmPicks").join(found.select(name, "hmPicks"), on=name, how="left")
        rows = rows.with_columns(pl.col("hmPicks").fill_null(0))
    return rows.sort("time", maintain_order=True)


def write_page(path: Path, seen: Standing, folder: Path) -> None:
    """Write the page of a session, which looks at itself again while it is open.

    Parameters
    ----------
    path : Path
        Of the page.
    seen : Standing
        How the session stands.
    folder : Path
        That is watched.
    """
    parts: list[Content] = [
        element("h1", "Live"),
        facts(
            [
                ("Folder", str(folder)),
                ("Now", seen.line()),
                ("Written", time.strftime("%Y-%m-%d %H:%M:%S")),
            ]
        ),
    ]
    timed = None if seen.micrographs is None else seen.micrographs.drop_nulls("time")
    if timed is not None and timed.height:
        parts.append(element("h2", "Over time"))
        parts.append(element("figure", element("img", src=_drawn(timed), alt="figures over time")))
    parts.append(element("h2", "Classes"))
    if seen.classes is not None:
        parts.append(picture(seen.classes, f"Of {_clock(seen.classes.stat().st_mtime)}."))
    else:
        parts.append(element("p", _why_no_classes(seen.particles)))
    if seen.failures:
        watched = _Watched(path.parent, folder)
        rows = [(job, watched.name(file), watched.name(why)) for job, file, why in seen.failures[-_SHOWN:]]
        parts += [element("h2", f"{len(seen.failures):,} left out"), table(("Job", "File", "Why"), rows)]
    script = f"setTimeout(() => location.reload(), {1000 * _AGAIN_s});"
    write_text(path, page(f"Live: {folder.name}", joined(*parts), script=script), durable=False)


def _why_no_classes(particles: int) -> str:
    if particles < FEWEST:
        there = count(particles, "particle") if particles else "none"
        return f"The first ones are made once there are {FEWEST} particles; so far there are {there}."
    return f"The first ones come next: there are {count(particles, 'particle')}, and {FEWEST} are enough."


class _Watched:
    """Names of movies in the watched folder, in the place of those of their links in the project."""

    def __init__(self, root: Path, folder: Path) -> None:
        root = root.absolute()
        # Names are absolute, from the project, or from wherever the command was given.
        self._link = re.compile(
            rf"{re.escape(str(root / FOLDER))}/|(?<!\S)(?:(?:\S*?/)?{re.escape(root.name)}/)?{FOLDER}/"
        )
        self._folder = folder

    def name(self, text: str) -> str:
        """The same text with the paths that one has seen."""
        return self._link.sub(lambda _: f"{self._folder}/", text)


def _drawn(micrographs: pl.DataFrame) -> Markup:
    """The series over time as a picture that the page holds."""
    from halfmap.pictures import DPI, add_panel, new_figure

    rows = micrographs.tail(_POINTS)
    series = [each for each in _SERIES if each[0] in rows.columns]
    figure = new_figure(_WIDTH, _HEIGHT * len(series) + 50)
    for place, (label, title, factor) in enumerate(reversed(series)):
        axes = add_panel(figure, 80, 40 + _HEIGHT * place, _WIDTH - 100, _HEIGHT - 16)
        _draw_series(axes, rows, label, title, factor)
        if place:
            axes.set_xticklabels([])
    held = io.BytesIO()
    figure.savefig(held, dpi=DPI, format="png")
    return Markup(data_address(held.getvalue(), "image/png"))


def _draw_series(axes: Axes, rows: pl.DataFrame, label: str, title: str, factor: float) -> None:
    import polars as pl

    from halfmap.pictures import INK

    values = factor * rows[label].cast(pl.Float64).to_numpy()
    axes.margins(y=_ABOVE)
    times = [datetime.fromtimestamp(value) for value in rows["time"]]
    kept = rows["kept"].to_numpy()
    for chosen, colour in ((~kept, "#d05050"), (kept, INK)):
        shown = [when for when, one in zip(times, chosen, strict=True) if one]
        axes.plot(shown, values[chosen], ".", markersize=3, color=colour)  # pyright: ignore[reportArgumentType]
    room = max(_BESIDE * (times[-1] - times[0]), timedelta(seconds=30))
    axes.set_xlim(times[0] - room, times[-1] + room)  # pyright: ignore[reportArgumentType]
    axes.set_ylabel(title, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M", time.localtime(seconds))
