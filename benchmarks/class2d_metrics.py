"""What `class2d.py` measures: classes against the truth of simulated particles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from halfmap.io.mrc import read_mrc
from halfmap.io.tables import read_particles
from halfmap.ops import fourier, grids, masks, rotations
from halfmap.ops.fsc import frc, resolution
from halfmap.ops.slices import SliceVolume, extract_slices, project_volume

DETAIL_A, COARSE_A = 8.0, 20.0
"""Correlations are averaged from the first ring to the former; the search of views begins with the latter."""

SEEDS, STEPS, ALIKE = 24, 12, 0.95
"""Views that the search climbs from, steps in a round, and how alike two views are of which one will do."""

ROUNDS = ((20.0, 0.5), (16.0, 0.4), (12.0, 0.3), (10.0, 0.2), (8.0, 0.15), (8.0, 0.05))
"""Resolution in Å up to which each round compares, and the length of its steps in pixels."""

TURN = 1.8
"""Degrees that count as a pixel."""


@dataclass(frozen=True, eq=False)
class Truth:
    """Of the particles, in the order of their table.

    Parameters
    ----------
    images : array (n,) of str
        Names of the images.
    kinds : array (n,) of str
        Structure or kind of junk.
    structures : tuple of str
        Which of the kinds are structures, in the order of `maps`.
    rotations, origins : Tensor (n, 3, 3), (n, 2)
        True poses and origins in Å.
    maps : list of SliceVolume
        Their potentials.
    pixel_size : float
        In Å.
    """

    images: NDArray[np.str_]
    kinds: NDArray[np.str_]
    structures: tuple[str, ...]
    rotations: Tensor
    origins: Tensor
    maps: list[SliceVolume]
    pixel_size: float

    @property
    def labels(self) -> NDArray[np.str_]:
        """Structures, and junk of all kinds as one."""
        return np.where(np.isin(self.kinds, self.structures), self.kinds, "junk")


@dataclass(frozen=True, eq=False)
class Classes:
    """Result of a classification of the first n particles of the truth.

    Parameters
    ----------
    number : array (n,)
        Class of each particle, from 0.
    psi, origins : Tensor (n,), (n, 2)
        In-plane angles in degrees and origins in Å.
    averages : Tensor (k, box, box)
        Class averages.
    """

    number: NDArray[np.int64]
    psi: Tensor
    origins: Tensor
    averages: Tensor


def read_truth(
    folder: Path, structures: tuple[str, ...], maps: list[SliceVolume], pixel_size: float
) -> Truth:
    """Truth from ``truth.csv``."""
    table = pl.read_csv(folder / "truth.csv")
    angles = table.select("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi").to_numpy()
    origins = table.select("rlnOriginXAngst", "rlnOriginYAngst").to_numpy()
    return Truth(
        images=table["image"].to_numpy().astype(str),
        kinds=table["kind"].to_numpy().astype(str),
        structures=structures,
        rotations=rotations.from_euler(torch.from_numpy(angles)),
        origins=torch.from_numpy(origins),
        maps=maps,
        pixel_size=pixel_size,
    )


def read_classes(particles: Path, averages: Path, truth: Truth) -> Classes:
    """Classes from a program's particles and averages, in the order of the truth."""
    rows = read_particles(particles).rows
    place = {name: i for i, name in enumerate(truth.images)}
    order = np.argsort([place[name] for name in rows["rlnImageName"]])
    rows = rows[order]
    if rows["rlnImageName"].to_list() != truth.images[: len(rows)].tolist():
        raise SystemExit(f"{particles}: not the first {len(rows)} particles")
    return Classes(
        number=rows["rlnClassNumber"].to_numpy().astype(np.int64) - 1,
        psi=torch.from_numpy(rows["rlnAnglePsi"].to_numpy().astype(np.float64)),
        origins=torch.from_numpy(rows.select("rlnOriginXAngst", "rlnOriginYAngst").to_numpy()),
        averages=torch.from_numpy(np.atleast_3d(read_mrc(averages)).astype(np.float32)),
    )


def adjusted_rand(a: ArrayLike, b: ArrayLike) -> float:
    """Adjusted Rand index of two partitions (Hubert & Arabie 1985, DOI 10.1007/BF01908075).

    Examples
    --------
    >>> adjusted_rand([0, 0, 1, 1], [5, 5, 3, 3])
    1.0
    >>> round(adjusted_rand([0, 0, 1, 2], [0, 0, 1, 1]), 4)
    0.5714
    >>> round(adjusted_rand([0, 1, 0, 1], [0, 0, 1, 1]), 4)
    -0.5
    """
    _, rows = np.unique(a, return_inverse=True)
    _, columns = np.unique(b, return_inverse=True)
    table = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(table, (rows, columns), 1)

    def pairs(counts: NDArray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, in_a, in_b = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = in_a * in_b / pairs(table.sum(keepdims=True))
    most = (in_a + in_b) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def majorities(number: NDArray, labels: NDArray, k: int) -> NDArray[np.str_]:
    """The label most members of each class have; empty classes are called empty.

    Examples
    --------
    >>> majorities(np.array([0, 0, 0, 2]), np.array(["a", "b", "b", "a"]), 3).tolist()
    ['b', 'empty', 'a']
    """
    names, which = np.unique(labels, return_inverse=True)
    counts = np.zeros((k, len(names)), int)
    np.add.at(counts, (number, which), 1)
    return np.where(counts.any(1), names[counts.argmax(1)], "empty").astype(str)


def structure_scores(classes: Classes, truth: Truth) -> dict[str, float]:
    """How well classes tell structures apart and junk from the rest, each named after most of its members."""
    labels = truth.labels[: len(classes.number)]
    named = majorities(classes.number, labels, len(classes.averages))[classes.number]
    good = labels != "junk"
    # Among particles that are no junk, a class is named after the structure of most.
    of_good = majorities(classes.number[good], labels[good], len(classes.averages))[classes.number[good]]
    rarest = truth.structures[-1]
    return {
        "ARI": adjusted_rand(labels[good], of_good),
        "ARI with junk": adjusted_rand(labels, named),
        "junk in junk classes": float((named[~good] == "junk").mean()),
        "good in junk classes": float((named[good] == "junk").mean()),
        "rarest recalled": float((named[labels == rarest] == rarest).mean()),
        "rarest precision": float((labels[named == rarest] == rarest).mean()) if rarest in named else 0.0,
    }


def occupancy(classes: Classes) -> dict[str, float]:
    """How evenly classes are filled: attraction is the largest share times the number of classes.

    Examples
    --------
    >>> none = torch.zeros(0)
    >>> row = occupancy(Classes(np.array([0, 0, 0, 1]), none, none, torch.zeros(4, 2, 2)))
    >>> {name: round(value, 3) for name, value in row.items()}
    {'largest share': 0.75, 'attraction': 3.0, 'empty classes': 2, 'effective classes': 1.755}
    """
    k = len(classes.averages)
    share = np.bincount(classes.number, minlength=k) / len(classes.number)
    filled = share[share > 0]
    return {
        "largest share": float(share.max()),
        "attraction": float(share.max() * k),
        "empty classes": int((share == 0).sum()),
        "effective classes": float(np.exp(-(filled * np.log(filled)).sum())),
    }


def selection_scores(kept: NDArray[np.bool_], truth: Truth) -> dict[str, float]:
    """What a selection keeps of the structures and rejects of the junk, all of it and by kind."""
    kinds, labels = truth.kinds[: len(kept)], truth.labels[: len(kept)]
    row = {
        "junk rejected": float((~kept[labels == "junk"]).mean()),
        "good lost": float((~kept[labels != "junk"]).mean()),
    }
    for kind in np.unique(kinds):
        part = ~kept[kinds == kind]
        row[f"{kind} lost" if kind in truth.structures else f"{kind} rejected"] = float(part.mean())
    return row


def own_truth(classes: Classes, truth: Truth) -> Tensor:
    """Means (k, box, box) of the members' clean projections, turned and moved by the poses estimated."""
    box = classes.averages.shape[-1]
    k, n = len(classes.averages), len(classes.number)
    turn = rotations.from_euler(torch.stack([0 * classes.psi, 0 * classes.psi, classes.psi], -1))
    aligned = turn.mT @ truth.rotations[:n]
    # The particle sits at minus its true origin; moving it by the estimated one leaves the difference.
    left = (classes.origins - truth.origins[:n]) / truth.pixel_size
    left = (turn[:, :2, :2].mT @ left[..., None])[..., 0]
    sums = torch.zeros(k, box, box // 2 + 1, dtype=torch.complex64)
    for structure, volume in zip(truth.structures, truth.maps, strict=True):
        members = np.flatnonzero(truth.kinds[:n] == structure)
        for first in range(0, len(members), 500):
            some = torch.from_numpy(members[first : first + 500])
            slices = extract_slices(volume, aligned[some].float())
            moved = fourier.phase_shift(slices, shape=(box, box), shift_px=left[some])
            sums.index_add_(0, torch.from_numpy(classes.number[some]), moved)
    counts = torch.from_numpy(np.bincount(classes.number, minlength=k)).clamp(min=1)
    return fourier.ifft_centred(sums / counts[:, None, None], shape=(box, box))


def whitened(spectra: Tensor, *, radius: int) -> Tensor:
    """Spectra (..., s, s // 2 + 1) as vectors (..., m) whose products are the mean FRC up to a ring."""
    size = spectra.shape[-2]
    ring = grids.ring_index((size, size))
    weight = grids.friedel_weight((size, size)).sqrt().float() * torch.ones(size, 1)
    inside = (ring >= 1) & (ring <= radius)
    ring, values = ring[inside] - 1, (spectra * weight)[..., inside]
    power = torch.zeros(*values.shape[:-1], radius).index_add_(-1, ring, values.abs().square())
    scale = torch.where(power > 0, power, torch.inf).rsqrt() / radius**0.5
    values = values * scale[..., ring]
    return torch.view_as_real(values).flatten(-2)


@dataclass(frozen=True, eq=False)
class View:
    """A projection of a structure: its number, rotation, shift (x, y) in pixels, and mean FRC."""

    structure: int
    rotation: Tensor
    shift_px: Tensor
    score: float


class ViewSearch:
    """Finds the clean projection that is most like an image, by the mean FRC up to 8 Å.

    All views on a grid of 15° with 6° in the plane, and shifts of 2 px up to 8, are compared up to 20 Å; from
    the best it climbs, seeing ever more detail up to 8 Å.
    """

    def __init__(self, truth: Truth, box: int) -> None:
        self.maps, self.box = truth.maps, box
        self.field_A = box * truth.pixel_size
        self.grid = rotations.healpix_grid(2, psi_step=6.0)
        self.table = torch.cat([self._views(volume, self.grid, COARSE_A) for volume in self.maps])
        steps = torch.arange(-8.0, 8.1, 2.0)
        self.shifts = torch.cartesian_prod(steps, steps)

    def _views(
        self, volume: SliceVolume, turns: Tensor, detail_A: float, shifts: Tensor | None = None
    ) -> Tensor:
        radius = int(self.field_A / detail_A)
        slices = extract_slices(volume, turns, size=2 * radius + 2, radius_px=radius)
        return self._vectors(slices, shifts, radius)

    def _images(self, image: Tensor, detail_A: float, shifts: Tensor | None = None) -> Tensor:
        radius = int(self.field_A / detail_A)
        size = 2 * radius + 2
        spectrum = fourier.fft_centred(image, ndim=2)
        spectrum = fourier.resize_spectrum(spectrum, shape=image.shape, new_shape=(size, size))
        return self._vectors(spectrum, shifts, radius)

    def _vectors(self, spectra: Tensor, shifts: Tensor | None, radius: int) -> Tensor:
        """Vectors to compare, after shifts in pixels of the box."""
        size = 2 * radius + 2
        if shifts is not None:
            spectra = fourier.phase_shift(spectra, shape=(size, size), shift_px=shifts * size / self.box)
        return whitened(spectra, radius=radius)

    def find(self, image: Tensor, generator: torch.Generator) -> View:
        """Most similar view of an image (box, box)."""
        score, shift = (self.table @ self._images(image, COARSE_A, -self.shifts).T).max(1)
        seeds = self._unlike(score)
        which, turn, place = (
            seeds // len(self.grid),
            self.grid[seeds % len(self.grid)],
            self.shifts[shift[seeds]],
        )
        for detail_A, length in ROUNDS:
            target = self._images(image, detail_A)
            turn, place, score = self._climb(target, which, turn, place, detail_A, length)
            kept = score.topk(max(3, len(turn) * 2 // 3)).indices
            which, turn, place, score = which[kept], turn[kept], place[kept], score[kept]
        return View(int(which[0]), turn[0], place[0], float(score[0]))

    def _unlike(self, score: Tensor) -> Tensor:
        """The best views of the table that are not like better ones."""
        order = score.topk(min(40 * SEEDS, len(score))).indices.tolist()
        chosen: list[int] = []
        for i in order:
            if not chosen or float((self.table[chosen] @ self.table[i]).max()) < ALIKE:
                chosen.append(i)
            if len(chosen) == SEEDS:
                break
        return torch.tensor(chosen)

    def _climb(
        self, target: Tensor, which: Tensor, turn: Tensor, place: Tensor, detail_A: float, length: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotations, shifts and scores of views after some steps uphill, the best on each way."""
        steps = torch.full((len(turn), 5), 1e-4, requires_grad=True)
        climber = torch.optim.Adam([steps], lr=length, maximize=True)
        best, top = torch.zeros(len(turn), 5), torch.full((len(turn),), -1.0)
        for _ in range(STEPS):
            turns = rotations.from_rotation_vector(TURN * steps[:, :3]) @ turn
            places = place + steps[:, 3:]
            score = torch.zeros(len(turn))
            for i in which.unique().tolist():
                of = torch.nonzero(which == i)[:, 0]
                views = self._views(self.maps[i], turns[of], detail_A, places[of])
                score = score.index_add(0, of, views @ target)
            better = score.detach() > top
            top = torch.where(better, score.detach(), top)
            best = torch.where(better[:, None], steps.detach(), best)
            climber.zero_grad()
            score.sum().backward()
            climber.step()
        return rotations.from_rotation_vector(TURN * best[:, :3]) @ turn, place + best[:, 3:], top

    def image(self, view: View) -> Tensor:
        """The view's clean projection (box, box)."""
        return fourier.shift_image(
            project_volume(self.maps[view.structure], view.rotation), shift_px=view.shift_px
        )


def average_scores(classes: Classes, truth: Truth, mask_A: float) -> tuple[dict[str, float], list[dict]]:
    """FRC of class averages with clean projections: mean over rings to 8 Å, and frequency where it is 0.5.

    Means over the classes of which most members are of a structure, weighted by the number of members that
    are no junk. "view" compares with the single view of any structure that is most alike: what is mixed,
    turned wrongly or noisy loses; as the view is searched for, pure noise has 0.16. "own" compares with the
    mean of the members' own projections (`own_truth`) at the poses that the program gives: it tells noise
    and a wrong correction of the CTF, and no misalignment that is in the average as in the poses.
    """
    box, pixel = classes.averages.shape[-1], truth.pixel_size
    mask = masks.soft_circle((box, box), radius=mask_A / 2, edge=10.0, pixel_size=pixel)
    labels = truth.labels[: len(classes.number)]
    named = majorities(classes.number, labels, len(classes.averages))
    own, search = own_truth(classes, truth), ViewSearch(truth, box)
    generator = torch.Generator().manual_seed(1)
    last = int(search.field_A / DETAIL_A) + 1
    rows: list[dict] = []
    for i in np.flatnonzero(~np.isin(named, ("junk", "empty"))):
        members = labels[classes.number == i]
        average = classes.averages[i] * mask
        view = search.find(average, generator)
        curves = {"own": frc(average, own[i] * mask), "view": frc(average, search.image(view) * mask)}
        row = {"class": int(i) + 1, "name": str(named[i]), "good": int((members != "junk").sum())}
        row |= {"members": len(members), "purity": float((members == named[i]).mean())}
        row |= {"view of": truth.structures[view.structure]}
        for key, curve in curves.items():
            row[f"FRC {key}"] = float(curve[1:last].mean())
            # The frequency, as resolutions of curves that are never above the threshold are infinite.
            row[f"1/A {key}"] = 1 / resolution(curve, pixel_size=pixel, box=box, threshold=0.5)
        rows.append(row)
    weight = np.array([row["good"] for row in rows], float)
    mean = {key: float(np.average([row[key] for row in rows], weights=weight)) for key in _AVERAGED}
    same = np.average([row["view of"] == row["name"] for row in rows], weights=weight)
    return {
        "FRC own": mean["FRC own"],
        "FRC view": mean["FRC view"],
        "A own": 1 / mean["1/A own"],
        "A view": 1 / mean["1/A view"],
        "named right": float(same),
    }, rows


_AVERAGED = ("FRC own", "FRC view", "1/A own", "1/A view")
