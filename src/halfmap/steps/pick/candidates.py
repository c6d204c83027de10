"""Places where a particle may be: what every method of picking gives of a micrograph."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from halfmap.io.atomic import atomic_path

_PACKING = 0.9069
"""Share of a plane that equal circles cover at the most."""

_SEARCHED = "searched", "shape"

Values = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Candidates:
    """Candidates of one micrograph, best first.

    Attributes
    ----------
    x, y : array (n,)
        Centres in pixels, 0 at the first stored one; of the micrograph, unless a function says otherwise.
    score : array (n,)
        Larger is better, of one scale in all micrographs of a job.
    diameter : array (n,), optional
        In Å, where each candidate has its own.
    angle : array (n,), optional
        In-plane angle of the best reference in degrees, `rlnAnglePsi`.
    reference : array (n,), optional
        Number of the best reference from 1.
    """

    x: Values
    y: Values
    score: Values
    diameter: Values | None = None
    angle: Values | None = None
    reference: Values | None = None

    def __len__(self) -> int:
        """Count the candidates."""
        return len(self.x)

    def select(self, index: NDArray) -> Candidates:
        """Those of an index or a boolean mask, in its order."""
        return Candidates(**{name: values[index] for name, values in self.columns().items()})

    def scaled(self, x: float, y: float) -> Candidates:
        """The same in pixels that are 1 / x as wide and 1 / y as high."""
        return replace(self, x=np.float32(x) * self.x, y=np.float32(y) * self.y)

    def pixels(self, shape: tuple[int, ...]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows and columns of the nearest pixels of an image."""
        y, x = (
            np.clip(np.rint(values), 0, n - 1).astype(np.intp)
            for values, n in zip((self.y, self.x), shape, strict=True)
        )
        return y, x

    def columns(self) -> dict[str, Values]:
        """Arrays by name, of those that there are."""
        return {name: values for name, values in vars(self).items() if values is not None}


def find_peaks(
    score: NDArray,
    *,
    pixel_size: float,
    distance: float,
    mask: NDArray[np.bool_] | None = None,
    edge: float = 0.0,
) -> Candidates:
    """Local maxima of a map of scores that lie apart, the higher one first where two are close.

    Parameters
    ----------
    score : array (h, w)
        Score of a particle with its centre there.
    pixel_size : float
        Of the map in Å.
    distance : float
        Least distance of two candidates in Å.
    mask : array (h, w), bool, optional
        Where centres may be.
    edge : float
        Distance from the map's edges in Å at which no centre may be.

    Returns
    -------
    Candidates
        Best first, coordinates in pixels of the map with fractions from a parabola through the neighbours.
        There are as many as there are maxima, but not more than circles as wide as the distance would fill
        the map: down to what is noise only.
    """
    score = np.asarray(score, np.float32)
    inside = np.isfinite(score) if mask is None else mask & np.isfinite(score)
    border = math.ceil(edge / pixel_size - 1e-6)
    if border > 0:
        inside = inside.copy()
        inside[:border] = inside[-border:] = False
        inside[:, :border] = inside[:, -border:] = False
    # Masked places count as neighbours: on a slope up to what is masked there is no maximum.
    known = np.where(np.isfinite(score), score, -np.inf)
    tops = (scipy.ndimage.maximum_filter(known, size=3, mode="constant", cval=-np.inf) == known) & inside
    y, x = np.nonzero(tops)
    # The same order for equal scores, whatever the sort.
    order = np.lexsort((x, y, -score[y, x]))
    y, x = y[order], x[order]
    most = math.ceil(_PACKING * inside.sum() / (math.pi / 4 * max(distance / pixel_size, 1.0) ** 2)) + 1
    kept = separate(x, y, distance / pixel_size, most)
    y, x = y[kept], x[kept]
    dy, dx = _vertex(score, y, x, axis=0), _vertex(score, y, x, axis=1)
    return Candidates(
        (x + dx).astype(np.float32), (y + dy).astype(np.float32), score[y, x].astype(np.float32)
    )


def separate(x: NDArray, y: NDArray, distance: float, most: int | None = None) -> NDArray[np.intp]:
    """Indices of points, taken in their order, that are at least a distance from all taken before.

    Parameters
    ----------
    x, y : array (n,)
        Points, the best first.
    distance : float
        In the unit of the points.
    most : int, optional
        How many to take.
    """
    if len(x) == 0:
        return np.zeros(0, np.intp)
    side = max(distance / math.sqrt(2), 1e-6)
    column, row = (np.floor((values - values.min()) / side).astype(int) for values in (x, y))
    # A square of this side holds one point at the most, and all that are near lie two squares around.
    owner = np.full((row.max() + 5, column.max() + 5), -1, np.intp)
    kept: list[int] = []
    for i in range(len(x)):
        near = owner[row[i] : row[i] + 5, column[i] : column[i] + 5]
        near = near[near >= 0]
        if len(near) and np.min((x[near] - x[i]) ** 2 + (y[near] - y[i]) ** 2) < distance**2:
            continue
        owner[row[i] + 2, column[i] + 2] = i
        kept.append(i)
        if most is not None and len(kept) >= most:
            break
    return np.array(kept, np.intp)


def _vertex(score: NDArray, y: NDArray, x: NDArray, *, axis: int) -> NDArray[np.float32]:
    """Place of the maximum between pixels along an axis, at most half a pixel away."""
    place = [y, x]
    length = score.shape[axis]
    before, after = list(place), list(place)
    before[axis], after[axis] = np.maximum(place[axis] - 1, 0), np.minimum(place[axis] + 1, length - 1)
    middle = score[y, x]
    left, right = score[tuple(before)], score[tuple(after)]
    curvature = left + right - 2 * middle
    with np.errstate(invalid="ignore", divide="ignore"):
        shift = np.where(curvature < 0, (left - right) / (2 * curvature), 0)
    return np.clip(np.nan_to_num(shift), -0.5, 0.5).astype(np.float32)


def write_candidates(
    path: str | Path, candidates: Candidates, null: NDArray, searched: NDArray[np.bool_]
) -> None:
    """Write a micrograph's candidates, scores of its surrogate's, and where it was searched.

    The file is written whole or not at all.
    """
    arrays: dict[str, Any] = candidates.columns() | {"null": np.asarray(null, np.float32)}
    arrays |= {"searched": np.packbits(searched), "shape": np.array(searched.shape)}
    with atomic_path(path, durable=False) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def read_candidates(path: str | Path) -> tuple[Candidates, Values]:
    """Read what `write_candidates` wrote: candidates, and scores where there are no particles."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files if name not in _SEARCHED}
    null = arrays.pop("null")
    return Candidates(**arrays), null


def read_searched(path: str | Path) -> NDArray[np.bool_]:
    """Where a micrograph was searched, by the file that `write_candidates` wrote."""
    with np.load(path, allow_pickle=False) as file:
        packed, shape = (file[name] for name in _SEARCHED)
    return np.unpackbits(packed, count=math.prod(shape)).reshape(shape).astype(bool)
