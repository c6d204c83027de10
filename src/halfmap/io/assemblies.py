"""Biological assemblies of atomic models: which chains, moved by which operators."""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Copies:
    """Chains of an asymmetric unit and the operators that copy them.

    Attributes
    ----------
    names : tuple of str
        Chains; none means all.
    are_subchains : bool
        Whether the names are mmCIF's label_asym_id, not the chains' names.
    operators : array (n, 3, 4) float64
        Rotation and shift (Å) of each copy.
    """

    names: tuple[str, ...]
    are_subchains: bool
    operators: NDArray[np.float64]


def assemblies(structure: gemmi.Structure, path: Path) -> dict[str, list[Copies]]:
    """Assemblies that a model file states, by name.

    gemmi's reading comes first. It skips mmCIF files that lack tables it expects, and PDB files whose BIOMT
    rows stand without the BIOMOLECULE line, so those are read here from the operators themselves.
    """
    stated = {assembly.name: _from_gemmi(assembly) for assembly in structure.assemblies}
    if stated:
        return stated
    if structure.input_format == gemmi.CoorFormat.Mmcif:
        return _from_mmcif(gemmi.cif.read(str(path))[0])
    return _from_biomt(path)


def _from_gemmi(assembly: gemmi.Assembly) -> list[Copies]:
    found = []
    for generator in assembly.generators:
        matrices = [
            np.column_stack([operator.transform.mat.tolist(), operator.transform.vec.tolist()])
            for operator in generator.operators
        ]
        names = tuple(generator.chains) or tuple(generator.subchains)
        found.append(Copies(names, not generator.chains, np.array(matrices).reshape(-1, 3, 4)))
    return found


def _from_mmcif(block: gemmi.cif.Block) -> dict[str, list[Copies]]:
    tags = [f"matrix[{i}][{j}]" for i in (1, 2, 3) for j in (1, 2, 3)] + [f"vector[{i}]" for i in (1, 2, 3)]
    operators = {}
    for row in block.find("_pdbx_struct_oper_list.", ["id", *tags]):
        values = np.array([gemmi.cif.as_number(row[i]) for i in range(1, 13)])
        operators[gemmi.cif.as_string(row[0])] = np.column_stack([values[:9].reshape(3, 3), values[9:]])
    found: dict[str, list[Copies]] = {}
    table = block.find(
        "_pdbx_struct_assembly_gen.",
        ["assembly_id", "oper_expression", "?asym_id_list", "?entity_inst_id"],
    )
    for row in table:
        # The older entity_inst_id names chains, asym_id_list subchains.
        are_subchains = row.has(2)
        listed = row.str(2) if are_subchains else row.str(3) if row.has(3) else ""
        names = tuple(name.strip() for name in listed.split(",") if name.strip())
        chains = [
            _product([operators[key] for key in keys if key in operators])
            for keys in product(*_operator_lists(row.str(1)))
        ]
        if chains:
            found.setdefault(row.str(0), []).append(Copies(names, are_subchains, np.array(chains)))
    return found


def _operator_lists(expression: str) -> list[list[str]]:
    """Operator names of an expression such as `1,2`, `(1-60)` or `(1-5)(P,2)`, a list for each factor."""
    lists = []
    for factor in re.findall(r"[^()]+", expression):
        names: list[str] = []
        for part in factor.replace(" ", "").split(","):
            bounds = re.fullmatch(r"(\d+)-(\d+)", part)
            if bounds:
                names += [str(i) for i in range(int(bounds[1]), min(int(bounds[2]), 100_000) + 1)]
            elif part:
                names.append(part)
        if names:
            lists.append(names)
    return lists


def _product(operators: list[NDArray]) -> NDArray:
    """Apply the rightmost operator first, as the dictionary of mmCIF has it."""
    total = np.eye(4)
    for operator in operators:
        total = total @ np.vstack([operator, [0, 0, 0, 1]])
    return total[:3]


def _from_biomt(path: Path) -> dict[str, list[Copies]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="latin-1") as stream:
        rows = re.findall(r"^REMARK 350 +BIOMT[123] +\d+((?: +-?\d+\.\d+){4})", stream.read(), flags=re.M)
    if not rows or len(rows) % 3:
        return {}
    values = np.array([row.split() for row in rows], dtype=np.float64)
    return {"1": [Copies((), False, values.reshape(-1, 3, 4))]}
