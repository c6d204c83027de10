"""Scores of atoms and residues: Q-score, local correlation, FSC-Q."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import gemmi
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.io.model_files import ModelFile
from halfmap.log import log
from halfmap.ops.q_score import SIGMA_A, q_scores
from halfmap.steps.fit.compare import Agreement
from halfmap.steps.fit.fscq import FscQ, fsc_q
from halfmap.steps.fit.place import Given, Placed

if TYPE_CHECKING:
    from halfmap.steps.fit.step import FitStep

EXPECTED = {"protein": (-0.1775, 1.1192), "nucleic": (-0.1377, 0.9973)}
"""Slope per Å and value at 0 Å of the mean Q-score of models in maps of a resolution, by kind of residue."""

COARSEST_A = 5.0
"""Resolution to which the relation holds."""

_NEAR_A = 2.0
"""About atoms, or half the resolution, where map and model are correlated for each residue."""


@dataclass(frozen=True, eq=False)
class Residues:
    """Residues of a model, in the order of its file.

    Attributes
    ----------
    of_atom : array (n,) int64
        Residue of each atom.
    first : array (r,) int64
        First atom of each.
    kinds : list of str
        protein, nucleic, water or other.
    """

    of_atom: NDArray[np.int64]
    first: NDArray[np.int64]
    kinds: list[str]

    def mean(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean over the atoms of each residue (r,), of those that have a value."""
        known = ~np.isnan(values)
        count = np.bincount(self.of_atom[known], minlength=len(self.first))
        total = np.bincount(self.of_atom[known], values[known], minlength=len(self.first))
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of a model; not a number for what lies outside the map.

    Attributes
    ----------
    residues : Residues
    q_atoms, q_residues : arrays (n,) and (r,)
    expected : array (r,)
        Q-score of residues of the kind in maps of this resolution; not a number where that is not known.
    correlation : array (r,)
        Of the map with the model's map about each residue's atoms.
    fsc_q : FscQ or None
        Of the atoms.
    """

    residues: Residues
    q_atoms: NDArray[np.float64]
    q_residues: NDArray[np.float64]
    expected: NDArray[np.float64]
    correlation: NDArray[np.float64]
    fsc_q: FscQ | None


def score(step: FitStep, given: Given, placed: Placed, agreement: Agreement) -> Scores:
    """Score atoms and residues."""
    places = placed.model.positions - np.array(given.origin)
    q = q_scores(
        given.volume,
        torch.from_numpy(places),
        pixel_size=given.pixel_size,
        sigma=step.sigma,
        groups=torch.from_numpy(given.file.alternatives),
    ).numpy()
    residues = residues_of(given.file)
    quality = None
    if given.halves is not None:
        quality = fsc_q(given, places / given.pixel_size, agreement)
    found = Scores(
        residues,
        q,
        residues.mean(q),
        _expected(step, given, residues),
        _correlations(given, places, residues, agreement.volume),
        quality,
    )
    _tell(found)
    return found


def residues_of(file: ModelFile) -> Residues:
    """Group a model's atoms by chain, number, insertion code and name of their residues."""
    model = file.model
    labels = zip(
        model.chains.tolist(),
        model.residue_numbers.tolist(),
        file.insertions.tolist(),
        model.residue_names.tolist(),
        strict=True,
    )
    numbers: dict[tuple[str, int, str, str], int] = {}
    of_atom = np.array([numbers.setdefault(label, len(numbers)) for label in labels], np.int64)
    first = np.unique(of_atom, return_index=True)[1]
    return Residues(of_atom, first, [_kind(str(name)) for name in model.residue_names[first]])


def _kind(name: str) -> str:
    known = gemmi.find_tabulated_residue(name)
    if known.is_water():
        return "water"
    if known.is_amino_acid():
        return "protein"
    return "nucleic" if known.is_nucleic_acid() else "other"


def _expected(step: FitStep, given: Given, residues: Residues) -> NDArray[np.float64]:
    """The relation is of Gaussians of 0.6 Å."""
    nothing = (float("nan"), float("nan"))
    known = given.resolution is not None and given.resolution <= COARSEST_A and step.sigma == SIGMA_A
    table = EXPECTED if known else {}
    slopes = np.array([table.get(kind, nothing) for kind in residues.kinds]).reshape(-1, 2)
    return slopes[:, 0] * (given.resolution or 0.0) + slopes[:, 1]


def _correlations(
    given: Given, places: NDArray[np.float64], residues: Residues, model: Tensor
) -> NDArray[np.float64]:
    """Correlation about the mean of map and model's map at the voxels near each residue's atoms."""
    ours, theirs = given.volume.numpy(), model.numpy()
    limits = np.array(given.shape[::-1])
    reach = max(_NEAR_A, (given.resolution or 0.0) / 2, given.pixel_size)
    half = int(np.ceil(reach / given.pixel_size)) + 1
    axis = np.arange(-half, half + 1)
    steps = np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(-1, 3)
    found = np.full(len(residues.first), np.nan)
    order = np.argsort(residues.of_atom, kind="stable")
    ends = np.searchsorted(residues.of_atom[order], np.arange(len(found) + 1))
    for number in range(len(found)):
        atoms = places[order[ends[number] : ends[number + 1]]] / given.pixel_size
        voxels = (np.rint(atoms).astype(np.int64)[:, None] + steps).reshape(-1, 3)
        apart = voxels - np.repeat(atoms, len(steps), axis=0)
        near = np.square(apart).sum(1) <= (reach / given.pixel_size) ** 2
        near &= ((voxels >= 0) & (voxels < limits)).all(axis=1)
        x, y, z = voxels[near].T
        flat = np.unique((z * limits[1] + y) * limits[0] + x)
        if len(flat) > 2:
            a, b = ours.ravel()[flat].astype(float), theirs.ravel()[flat].astype(float)
            a, b = a - a.mean(), b - b.mean()
            norm = np.sqrt(np.square(a).sum() * np.square(b).sum())
            found[number] = (a * b).sum() / norm if norm > 0 else np.nan
    return found


def _tell(found: Scores) -> None:
    q = found.q_atoms[~np.isnan(found.q_atoms)]
    known = ~np.isnan(found.expected)
    if known.any():
        count = np.bincount(found.residues.of_atom, minlength=len(known))
        expected = np.average(found.expected[known], weights=count[known])
        log.info(
            "mean Q-score of the atoms %.3f; to be expected at this resolution: %.2f", q.mean(), expected
        )
    else:
        log.info("mean Q-score of the atoms %.3f", q.mean() if len(q) else np.nan)
    if found.fsc_q is not None:
        values = found.residues.mean(found.fsc_q.difference)
        values = values[~np.isnan(values)]
        low, median, high = np.quantile(values, (0.05, 0.5, 0.95)) if len(values) else (np.nan,) * 3
        log.info("FSC-Q of residues: median %.2f Å, 90 %% within %.2f to %.2f Å", median, low, high)
