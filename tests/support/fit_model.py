"""A small atomic model without symmetry, as a PDB file, for tests of fitting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NAMES = ("N", "CA", "C", "O", "CB")


def write_model(path: Path, *, centre: tuple[float, float, float], residues: int = 24) -> NDArray[np.float64]:
    """Write a chain that bends three ways, about a centre in Å, and return its atoms' positions (n, 3)."""
    turn = np.linspace(0, 2 * np.pi, residues, endpoint=False)
    chain = np.stack(
        [9 * np.cos(turn), 6 * np.sin(turn), 5 * np.sin(2 * turn + 0.5) + 3 * np.cos(turn)], axis=1
    )
    offsets = np.array([[-1.2, 0.5, 0], [0, 0, 0], [1.1, 0.9, 0.3], [1.3, 2.0, 0.6], [-0.5, -1.0, 1.0]])
    positions = (chain[:, None] + offsets).reshape(-1, 3)
    positions += np.array(centre) - positions.mean(0)
    lines = []
    for i, (x, y, z) in enumerate(positions):
        name, residue = NAMES[i % len(NAMES)], i // len(NAMES) + 1
        lines.append(
            f"ATOM  {i + 1:5d}  {name:<3s} ALA A{residue:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00 20.00"
            f"           {name[0]}"
        )
    path.write_text("\n".join((*lines, "TER", "END", "")))
    return np.round(positions, 3)
