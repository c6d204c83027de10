"""The files of a fit: the model with its scores, its map, tables, and what ChimeraX colours it by."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from halfmap.io.atomic import write_text
from halfmap.io.mrc import write_mrc
from halfmap.io.star import Block, write_star
from halfmap.ops.rotations import angular_distance
from halfmap.steps.fit.compare import Agreement
from halfmap.steps.fit.place import Given, Placed
from halfmap.steps.fit.scores import Scores

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.fit.step import FitStep

Q_COLUMN = "Q_score"
"""Of the table of atoms in mmCIF, as where Q-scores were first written."""

_COLOURS = ("#d7191c", "#fdae61", "#ffffbf", "#abd9e9", "#2c7bb6")
"""From no likeness to a well resolved atom; told apart by those who see no red or green."""


def write(
    step: FitStep, ctx: Context, given: Given, placed: Placed, agreement: Agreement, scored: Scores
) -> None:
    """Write model, maps, tables and scripts."""
    given.file.write(
        ctx.folder / "fitted.cif",
        rotation=placed.rotation,
        shift=placed.shift,
        columns={Q_COLUMN: scored.q_atoms},
    )
    for name, volume in (("model_map", agreement.volume), ("mask", agreement.mask)):
        array = volume.numpy().astype(np.float32)
        where = {"pixel_size": given.pixel_size, "origin": given.origin}
        write_mrc(ctx.folder / f"{name}.mrc", array, stack=False, **where)
    blocks: dict[str, Block] = {
        "general": _general(step, ctx, given, placed, agreement, scored),
        "fsc": _fsc(given, agreement),
    }
    if placed.places:
        blocks["places"] = _places(given, placed)
    blocks |= {
        "chains": _chains(placed, scored),
        "residues": _residues(given, placed, scored),
        "atoms": _atoms(given, placed, scored),
    }
    write_star(ctx.folder / "fit.star", blocks)
    write_text(ctx.folder / "q_score.defattr", _attributes(given, placed, scored))
    write_text(ctx.folder / "colour.cxc", _script(ctx, given))


def _general(
    step: FitStep, ctx: Context, given: Given, placed: Placed, agreement: Agreement, scored: Scores
) -> dict[str, str | int | float]:
    found: dict[str, str | int | float] = {
        "hmMapName": ctx.relative(given.path),
        "hmModelName": ctx.relative(given.file.path),
        "rlnPixelSize": given.pixel_size,
        "hmFitSearch": step.search,
        "hmFitMoved": placed.moved,
        "hmMapModelResolutionHalf": agreement.half,
        "hmMapModelResolution": agreement.threshold,
        "hmMapModelResolutionHalfUnmasked": agreement.whole_half,
        "hmMapModelResolutionUnmasked": agreement.whole_threshold,
        "hmQScore": _mean(scored.q_atoms),
        "hmQScoreSigma": step.sigma,
        "hmAtoms": len(placed.model),
        "hmAtomsOutside": int(np.isnan(scored.q_atoms).sum()),
    }
    if given.resolution is not None:
        found |= {"rlnFinalResolution": given.resolution, "hmResolutionSource": given.source}
    if given.halves is not None:
        found |= {
            "rlnUnfilteredMapHalf1": ctx.relative(given.halves.paths[0]),
            "rlnUnfilteredMapHalf2": ctx.relative(given.halves.paths[1]),
        }
    return found


def _fsc(given: Given, agreement: Agreement) -> pl.DataFrame:
    shells, side = np.arange(len(agreement.masked)), max(given.shape) * given.pixel_size
    return pl.DataFrame(
        {
            "rlnSpectralIndex": shells,
            "rlnResolution": shells / side,
            "rlnAngstromResolution": side / np.maximum(shells, 0.1),
            "rlnFourierShellCorrelationUnmaskedMaps": agreement.unmasked.double().numpy(),
            "rlnFourierShellCorrelationMaskedMaps": agreement.masked.double().numpy(),
        }
    )


def _places(given: Given, placed: Placed) -> pl.DataFrame:
    """Places with their turn and shift, and as a matrix of three rows of four that moves the given model."""
    centre = torch.from_numpy(given.file.model.positions.mean(0))
    still = torch.eye(3, dtype=torch.float64)
    rows = []
    for place in placed.places:
        shift = place.centre - place.rotation @ centre
        matrix = torch.cat([place.rotation, shift[:, None]], dim=1).flatten().tolist()
        rows.append(
            {
                "hmPlaceCorrelation": place.correlation,
                "hmPlaceAngle": float(angular_distance(place.rotation, still)),
                "hmPlaceShift": float((place.centre - centre).norm()),
                "hmPlaceMatrix": "[" + ",".join(f"{value:.6f}" for value in matrix) + "]",
            }
        )
    return pl.DataFrame(rows)


def _chains(placed: Placed, scored: Scores) -> pl.DataFrame:
    chains, first, of_atom = np.unique(placed.model.chains, return_index=True, return_inverse=True)
    residue_chain = of_atom[scored.residues.first]
    rows = []
    for number in np.argsort(first):
        inside = residue_chain == number
        row = {
            "hmChain": str(chains[number]),
            "hmAtoms": int((of_atom == number).sum()),
            "hmQScore": _mean(scored.q_atoms[of_atom == number]),
            "hmQScoreExpected": _mean(scored.expected[inside]),
            "hmMapModelCorrelation": _mean(scored.correlation[inside]),
        }
        if scored.fsc_q is not None:
            row["hmFscQ"] = _mean(scored.residues.mean(scored.fsc_q.difference)[inside])
        rows.append(row)
    return pl.DataFrame(rows)


def _residues(given: Given, placed: Placed, scored: Scores) -> pl.DataFrame:
    model, first = placed.model, scored.residues.first
    columns: dict[str, object] = {
        "hmChain": model.chains[first],
        "hmResidueName": model.residue_names[first],
        "hmResidueNumber": model.residue_numbers[first],
    }
    if given.file.insertions.astype(bool).any():
        columns["hmInsertionCode"] = given.file.insertions[first]
    columns |= {
        "hmAtoms": np.bincount(scored.residues.of_atom),
        "hmQScore": scored.q_residues,
        "hmQScoreExpected": scored.expected,
        "hmMapModelCorrelation": scored.correlation,
    }
    if scored.fsc_q is not None:
        mean = scored.residues.mean
        columns |= {
            "hmFscQ": mean(scored.fsc_q.difference),
            "hmFscQRelative": mean(scored.fsc_q.relative),
            "hmMapModelLocalResolution": mean(scored.fsc_q.model),
            "hmHalfMapsLocalResolution": mean(scored.fsc_q.halves),
        }
    return pl.DataFrame(columns)


def _atoms(given: Given, placed: Placed, scored: Scores) -> pl.DataFrame:
    model = placed.model
    columns: dict[str, object] = {
        "hmChain": model.chains,
        "hmResidueName": model.residue_names,
        "hmResidueNumber": model.residue_numbers,
    }
    if given.file.insertions.astype(bool).any():
        columns["hmInsertionCode"] = given.file.insertions
    columns |= {
        "hmAtomName": model.atom_names,
        "hmAtomX": np.round(model.positions[:, 0], 3),
        "hmAtomY": np.round(model.positions[:, 1], 3),
        "hmAtomZ": np.round(model.positions[:, 2], 3),
        "hmQScore": np.round(scored.q_atoms, 4),
    }
    if scored.fsc_q is not None:
        columns["hmFscQ"] = np.round(scored.fsc_q.difference, 3)
    return pl.DataFrame(columns)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _attributes(given: Given, placed: Placed, scored: Scores) -> str:
    """Q-scores as an attribute of atoms, as ChimeraX reads it."""
    model = placed.model
    lines = ["attribute: q_score", "match mode: any", "recipient: atoms"]
    lines += [
        f"\t/{chain}:{number}{code}@{name}\t{value:.4f}"
        for chain, number, code, name, value in zip(
            model.chains,
            model.residue_numbers,
            given.file.insertions,
            model.atom_names,
            scored.q_atoms,
            strict=True,
        )
        if not np.isnan(value)
    ]
    return "\n".join((*lines, ""))


def _script(ctx: Context, given: Given) -> str:
    """Commands of ChimeraX, which goes to the folder of a script before it runs it."""
    shown = os.path.relpath(given.path, ctx.folder)
    palette = ":".join(f"{i / 4:g},{colour}" for i, colour in enumerate(_COLOURS))
    return "\n".join(
        (
            "# Open in ChimeraX without other models: the model in its map, coloured by Q-score from 0 to 1.",
            'open "fitted.cif" id 1',
            f'open "{shown}" id 2',
            "volume #2 style surface step 1 transparency 0.6",
            'open "q_score.defattr" models #1',
            "show #1 atoms",
            "style #1 stick",
            f"color byattribute a:q_score #1 palette {palette} target acs key true",
            "",
        )
    )
