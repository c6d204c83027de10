"""Join the picks of several pickers, and learn from their agreement how far each is to be believed."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.spatial import KDTree

from halfmap.errors import ParameterError, TableError
from halfmap.io.coordinates import read_coordinates
from halfmap.io.micrographs import list_micrographs
from halfmap.io.tables import read_micrographs
from halfmap.log import log
from halfmap.steps.pick import micrograph, pictures, tables
from halfmap.steps.pick.candidates import separate
from halfmap.steps.pick.export import read_list

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.io.micrographs import MicrographItem
    from halfmap.steps.pick.step import PickConsensus

_ROUNDS = 500
_PACKING = 0.9
"""Share of a micrograph that particles cover at the most: so many places for one there are."""

_SHARE = 1 / 3
"""Distance at which picks are one, over the diameter."""

_SAME_px, _SAME = 0.1, 0.5
"""Distance at which picks are the same one, and the share of such that two pickers do not have by chance."""


@dataclass(frozen=True, eq=False)
class Joined:
    """Picks of all pickers in one micrograph, joined.

    Attributes
    ----------
    x, y : array (n,)
        Means of the picks that were joined, weighted with their probabilities.
    votes : array (n, pickers), bool
        Which pickers have it.
    own : array (n, pickers)
        Probabilities that these gave it; NaN where they gave none.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    votes: NDArray[np.bool_]
    own: NDArray[np.float64]


def join(pickers: list[NDArray[np.float64]], distance: float) -> Joined:
    """Join picks of one micrograph that are near to each other, at most one of each picker.

    Parameters
    ----------
    pickers : list of arrays (n, 3)
        x, y and probability (NaN if unknown) of the picks of each.
    distance : float
        At which two picks are one particle, in the unit of the coordinates.

    Notes
    -----
    Pairs of different pickers are joined in the order of their distance, as long as all picks of both groups
    are of different pickers and the groups' centres lie within the distance.
    """
    owner = np.concatenate([np.full(len(picks), i) for i, picks in enumerate(pickers)]).astype(int)
    every = np.concatenate([picks.reshape(-1, 3) for picks in pickers])
    n, count = len(every), len(pickers)
    pairs = KDTree(every[:, :2]).query_pairs(distance, output_type="ndarray") if n else np.zeros((0, 2), int)
    pairs = pairs[owner[pairs[:, 0]] != owner[pairs[:, 1]]]
    gaps = np.hypot(*(every[pairs[:, 0], :2] - every[pairs[:, 1], :2]).T)
    group = np.arange(n)
    members: dict[int, list[int]] = {i: [i] for i in range(n)}
    for i, j in pairs[np.lexsort((pairs[:, 1], pairs[:, 0], gaps))].tolist():
        a, b = int(group[i]), int(group[j])
        if a == b or {owner[m] for m in members[a]} & {owner[m] for m in members[b]}:
            continue
        apart = every[members[a], :2].mean(axis=0) - every[members[b], :2].mean(axis=0)
        if np.hypot(*apart) > distance:
            continue
        group[members[b]] = a
        members[a] += members.pop(b)
    votes, own = np.zeros((len(members), count), bool), np.full((len(members), count), np.nan)
    places = np.zeros((len(members), 2))
    for k, part in enumerate(members.values()):
        weight = np.nan_to_num(every[part, 2], nan=0.5) + 1e-3
        places[k] = weight @ every[part, :2] / weight.sum()
        votes[k, owner[part]] = True
        own[k, owner[part]] = every[part, 2]
    return Joined(places[:, 0], places[:, 1], votes, own)


def weigh(votes: NDArray[np.bool_], empty: float) -> tuple[NDArray[np.float64], NDArray, NDArray]:
    """Probability of a particle from who picked it, and how good each picker is.

    Parameters
    ----------
    votes : array (n, pickers), bool
        Which pickers have each pick.
    empty : float
        Places without any pick, where there is room for a particle.

    Returns
    -------
    probability : array (n,)
        Of being a particle.
    found, false : arrays (pickers,)
        Parts of the particles that each picks, and of the places without one.

    Notes
    -----
    Latent classes by expectation-maximisation: given what a place is, pickers err independently. Pickers that
    share their errors look better than they are. Two pickers are taken to be equally often wrong; even so
    their three counts do not settle four numbers, and the start, in which picks that both have are true and
    half of the others, has a say.

    References
    ----------
    .. [1] Dawid & Skene 1979, Appl. Stat. 28, 20-28, DOI 10.2307/2346806
    """
    patterns, index, count = np.unique(votes, axis=0, return_inverse=True, return_counts=True)
    pickers = votes.shape[1]
    patterns = np.vstack([patterns, np.zeros((1, pickers), bool)])
    weight = np.append(count.astype(float), max(empty, 1.0))
    agree = patterns.sum(axis=1) / pickers
    likely = np.clip(agree, 0.02, 0.98)
    likely[-1] = 0.01
    found, false = np.full(pickers, 0.5), np.full(pickers, 0.01)
    for _ in range(_ROUNDS):
        true, other = weight * likely, weight * (1 - likely)
        # One observation of each kind keeps rates from 0 and 1.
        found = (true @ patterns + 1) / (true.sum() + 2)
        false = (other @ patterns + 0.5) / (other.sum() + 2)
        if pickers == 2:
            false[:] = false.mean()
        share = np.clip(true.sum() / weight.sum(), 1e-6, 1 - 1e-6)
        log_odds = math.log(share / (1 - share)) + np.where(
            patterns, np.log(found / false), np.log((1 - found) / (1 - false))
        ).sum(axis=1)
        new = 1 / (1 + np.exp(-np.clip(log_odds, -50, 50)))
        if np.abs(new - likely).max() < 1e-9:
            break
        likely = new
    return likely[:-1][index.ravel()], found, false


def with_own(probability: NDArray, joined: Joined) -> NDArray[np.float64]:
    """Sharpen probabilities by what pickers themselves gave each pick.

    A picker's own odds, over those of its average pick, multiply the odds from the votes. Pickers are
    deceived by the same things, fragments most of all: a pick is no more probable than the picker that is
    surest of it says.
    """
    odds = np.clip(probability, 1e-9, 1 - 1e-9)
    log_odds = np.log(odds / (1 - odds))
    surest = np.full(len(odds), -math.inf)
    for i in range(joined.votes.shape[1]):
        own = np.clip(joined.own[:, i], 0.02, 0.98)
        given = np.isfinite(own)
        surest[given] = np.maximum(surest[given], joined.own[given, i])
        # What a picker without probabilities says has no bound.
        surest[joined.votes[:, i] & ~given] = 1.0
        if given.sum() < 2:
            continue
        mean = float(np.clip(own[given].mean(), 0.02, 0.98))
        log_odds[given] += np.log(own[given] / (1 - own[given])) - math.log(mean / (1 - mean))
    return np.minimum(1 / (1 + np.exp(-np.clip(log_odds, -30, 30))), surest)


def run(step: PickConsensus, ctx: Context) -> None:
    """Join the picks of every micrograph, weigh the pickers, write and draw what is left."""
    if len(step.coordinates) < 2:
        raise ParameterError("a consensus needs two pickers or more", hint="give more --coordinates")
    if len({ctx.resolve(path).resolve() for path in step.coordinates}) < len(step.coordinates):
        raise ParameterError("a table of --coordinates is given twice", hint="give each picker's once")
    items = list_micrographs(read_micrographs(ctx.resolve(step.micrographs)), ctx.resolve, use_ctf=False)
    lists = [read_list(ctx.resolve(path)) for path in step.coordinates]
    shared = [item for item in items if all(item.name in names for names in lists)]
    if not shared:
        hint = "all pickers must have searched the same micrographs"
        raise TableError("no micrograph is in all tables of picks", path=step.coordinates[-1], hint=hint)
    if len(shared) < len(items):
        log.warning(
            "%d of %d micrographs are not in all tables and are left out",
            len(items) - len(shared),
            len(items),
        )
    read = {
        item.name: [read_coordinates(ctx.resolve(names[item.name])) for names in lists] for item in shared
    }
    diameter = step.diameter or _diameter(read)
    distance = step.distance or _SHARE * diameter
    columns = {name: [_columns(table) for table in each] for name, each in read.items()}
    for i, j in combinations(range(len(lists)), 2):
        if (share := coinciding([(each[i], each[j]) for each in columns.values()])) > _SAME:
            log.warning(
                "%.0f %% of the picks of %s and %s are the same to %.1f px: they are no two witnesses",
                *(100 * share, step.coordinates[i], step.coordinates[j], _SAME_px),
            )
    joined = {item.name: join(columns[item.name], distance / item.pixel_size) for item in shared}
    votes = np.concatenate([part.votes for part in joined.values()])
    if len(votes) == 0:
        log.warning("none of the pickers has picked anything")
    probability, found, false = weigh(votes, _places(shared, diameter) - len(votes))
    for path, good, bad in zip(step.coordinates, found, false, strict=True):
        log.info(
            "%s: finds %.1f %% of the particles, and %.2f %% of the other places", path, 100 * good, 100 * bad
        )
    own = np.concatenate([part.own for part in joined.values()])
    whole = Joined(np.zeros(len(votes)), np.zeros(len(votes)), votes, own)
    probability = with_own(probability, whole)
    least = _least(probability, step.probability, step.precision)
    picks, start = {}, 0
    for item in shared:
        part = joined[item.name]
        likely = probability[start : start + len(part.x)]
        start += len(part.x)
        picks[item.name] = (item.key, _table(part, likely, least, diameter, distance / item.pixel_size))
    table = tables.write_picks(ctx, picks)
    log.info("%d picks, %.1f of them false on average", table["hmPicks"].sum(), table["hmPicksFalse"].sum())
    pictures.draw_agreement(ctx.folder / "summary.png", votes, probability, least, table)
    if step.pictures:
        (ctx.folder / micrograph.PICTURES).mkdir(exist_ok=True)
        draw = functools.partial(micrograph.draw_micrograph, diameter=diameter, folder=ctx.folder)
        ctx.map(draw, shared, key=lambda item: item.name, unit="picture")
    tables.refuse_nothing(table)


def coinciding(pairs: list[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> float:
    """Share of the picks of one picker that are another's as well; of the picker that has fewer.

    Parameters
    ----------
    pairs : list of pairs of arrays (n, 3)
        Picks of both in every micrograph, in pixels.
    """
    least = min(sum(map(len, picks)) for picks in zip(*pairs, strict=True))
    same = 0
    for one, other in pairs:
        if len(one) and len(other):
            gaps, _ = KDTree(other[:, :2]).query(one[:, :2])
            same += int((gaps <= _SAME_px).sum())
    return same / least if least else 0.0


def _columns(table: pl.DataFrame) -> NDArray[np.float64]:
    own = (
        table[tables.PROBABILITY]
        if tables.PROBABILITY in table.columns
        else pl.Series([math.nan] * len(table))
    )
    return np.stack(
        [table[tables.X].to_numpy(), table[tables.Y].to_numpy(), own.cast(pl.Float64).to_numpy()], axis=-1
    ).astype(np.float64)


def _diameter(read: dict[str, list[pl.DataFrame]]) -> float:
    """Median of what the pickers say."""
    parts = [
        table[tables.DIAMETER].to_numpy()
        for each in read.values()
        for table in each
        if tables.DIAMETER in table.columns and len(table)
    ]
    if not parts:
        raise TableError("the picks state no diameter", hint="give --diameter")
    return float(np.median(np.concatenate(parts)))


def _places(items: list[MicrographItem], diameter: float) -> float:
    """How many particles there is room for."""
    from halfmap.io.movies import open_movie

    area = 0.0
    for item in items:
        height, width = open_movie(item.path).shape
        area += height * width * item.pixel_size**2
    return _PACKING * area / (math.pi / 4 * diameter**2)


def _least(probability: NDArray, least: float, precision: float | None) -> float:
    """Least probability of a pick, raised until so many are true on average."""
    if precision is None or len(probability) == 0:
        return least
    ranked = np.sort(probability)[::-1]
    mean = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    enough = np.flatnonzero(mean >= precision)
    return max(least, float(ranked[enough[-1]])) if len(enough) else math.inf


def _table(part: Joined, likely: NDArray, least: float, diameter: float, distance_px: float) -> pl.DataFrame:
    order = np.lexsort((part.x, part.y, -likely))
    order = order[likely[order] >= least]
    order = order[separate(part.x[order], part.y[order], distance_px)]
    return pl.DataFrame(
        {
            tables.X: part.x[order].round(2),
            tables.Y: part.y[order].round(2),
            tables.SCORE: likely[order].round(6),
            tables.PROBABILITY: likely[order].round(4),
            tables.AGREEMENT: part.votes[order].sum(axis=1).astype(np.int64),
            tables.DIAMETER: np.full(len(order), round(diameter, 1)),
        }
    )
