"""Read atomic models (mmCIF, PDB) as arrays, in their biological assembly; electron scattering factors."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray

from halfmap.errors import FileFormatError, ParameterError
from halfmap.io.assemblies import Copies, assemblies
from halfmap.io.binary import opened

# gemmi numbers elements like the periodic table, with deuterium after the last.
_ATOMIC_NUMBERS = np.array(
    [gemmi.Element(element).atomic_number for element in range(118)] + [118, 1], np.uint8
)
_FORMATS = "give a PDB or mmCIF file, plain or .gz"


@dataclass(frozen=True, eq=False)
class AtomicModel:
    """Atoms of a model as parallel arrays.

    Attributes
    ----------
    name : str
        Name of the file without its suffixes.
    positions : array (n, 3) float64
        (x, y, z) in Å.
    elements : array (n,) uint8
        Atomic numbers; deuterium counts as hydrogen.
    b_factors : array (n,) float32
        Isotropic B-factors, Å².
    occupancies : array (n,) float32
        Above 0; alternative locations are separate atoms that share an occupancy.
    chains, residue_names, atom_names : array (n,) str
        Labels; a further copy of chain A in an assembly is A-2, A-3 and so on.
    residue_numbers : array (n,) int32
        Numbers as in the file.
    """

    name: str
    positions: NDArray[np.float64]
    elements: NDArray[np.uint8]
    b_factors: NDArray[np.float32]
    occupancies: NDArray[np.float32]
    chains: NDArray[np.str_]
    residue_names: NDArray[np.str_]
    residue_numbers: NDArray[np.int32]
    atom_names: NDArray[np.str_]

    def __len__(self) -> int:
        """Count the atoms."""
        return len(self.positions)

    @cached_property
    def masses(self) -> NDArray[np.float64]:
        """Atomic masses times occupancies, Da (n,)."""
        weights = np.array([gemmi.Element(z).weight for z in range(119)], np.float64)
        return weights[self.elements] * self.occupancies.astype(np.float64)

    @property
    def mass_kDa(self) -> float:
        """Mass of the atoms that are there, so without hydrogens where those were left out."""
        return float(self.masses.sum()) / 1000

    @property
    def centre(self) -> NDArray[np.float64]:
        """Centre of mass, (x, y, z) in Å."""
        return np.average(self.positions, axis=0, weights=self.masses)

    @cached_property
    def diameter(self) -> float:
        """Largest distance between two atoms' centres, Å."""
        from scipy.spatial import ConvexHull, QhullError
        from scipy.spatial.distance import pdist

        corners = self.positions
        # There is no hull of fewer than four atoms or of all in one plane: take them all.
        with suppress(QhullError, ValueError):
            corners = corners[ConvexHull(corners).vertices]
        return float(pdist(corners).max()) if len(corners) > 1 else 0.0

    def centred(self) -> AtomicModel:
        """Move the centre of mass to the origin."""
        return replace(self, positions=self.positions - self.centre)

    def select(self, mask: NDArray) -> AtomicModel:
        """Take the atoms of a boolean mask or index array (n,)."""
        arrays = {
            field.name: getattr(self, field.name)[mask] for field in fields(self) if field.name != "name"
        }
        return replace(self, **arrays)


def read_model(
    path: str | Path,
    *,
    assembly: str | None = "1",
    waters: bool = False,
    hydrogens: bool = False,
    b_factor: float | None = None,
) -> AtomicModel:
    """Read the first model of a PDB or mmCIF file, as its biological assembly.

    Parameters
    ----------
    path : path
        PDB or mmCIF, plain or `.gz`; told apart by content.
    assembly : str or None
        Name of the assembly to build. None takes the atoms as they stand, and so does "1" where the file
        states no assembly, which is how models are deposited that are their own assembly.
    waters, hydrogens : bool
        Whether to keep them.
    b_factor : float, optional
        Isotropic B-factor in Å² for all atoms instead of the file's.

    Returns
    -------
    AtomicModel
        Atoms with an occupancy above 0.

    Raises
    ------
    FileFormatError
        If the file cannot be parsed, holds no atoms, or does not state the assembly.

    See Also
    --------
    read_models : all models of a file, for instance of several conformations.
    """
    return _read(path, assembly, waters, hydrogens, b_factor, all_models=False)[0]


def read_models(
    path: str | Path,
    *,
    assembly: str | None = "1",
    waters: bool = False,
    hydrogens: bool = False,
    b_factor: float | None = None,
) -> list[AtomicModel]:
    """Read all models of a PDB or mmCIF file; parameters and errors are those of `read_model`."""
    return _read(path, assembly, waters, hydrogens, b_factor, all_models=True)


def _read(
    path: str | Path,
    assembly: str | None,
    waters: bool,
    hydrogens: bool,
    b_factor: float | None,
    *,
    all_models: bool,
) -> list[AtomicModel]:
    path = Path(path)
    if b_factor is not None and not (np.isfinite(b_factor) and b_factor >= 0):
        raise ParameterError(f"the B-factor {b_factor} is not 0 Å² or more")
    structure = parse_structure(path)
    copies = _copies(structure, path, assembly)
    flat = gemmi.FlatStructure(structure)
    keep = flat.occ > 0
    if not waters:
        keep &= ~_is_water(flat.residue_names)
    if not hydrogens:
        keep &= _ATOMIC_NUMBERS[flat.elements] != 1
    numbers = np.unique(flat.model_num)
    models = []
    for number in numbers if all_models else numbers[:1]:
        model = _assemble(flat, keep & (flat.model_num == number), copies, path)
        if b_factor is not None:
            model = replace(model, b_factors=np.full(len(model), b_factor, np.float32))
        models.append(model)
    return models


def parse_structure(path: Path) -> gemmi.Structure:
    """Parse a PDB or mmCIF file, told apart by content; FileFormatError if it is none or holds no atoms."""
    with opened(path):
        pass  # says what is wrong with the file itself; the parser's own words are about its content
    try:
        structure = gemmi.read_structure(str(path), format=gemmi.CoorFormat.Detect)
    except Exception as error:  # the parser reports syntax in errors of several kinds
        detail = str(error).replace(str(path), path.name)
        raise FileFormatError(f"is not an atomic model ({detail})", path=path, hint=_FORMATS) from error
    if sum(model.count_atom_sites() for model in structure) == 0:
        raise FileFormatError("holds no atoms", path=path, hint=_FORMATS)
    return structure


def _copies(structure: gemmi.Structure, path: Path, assembly: str | None) -> list[Copies]:
    as_they_stand = [Copies((), False, np.eye(3, 4)[None])]
    if assembly is None:
        return as_they_stand
    stated = assemblies(structure, path)
    if assembly in stated:
        return stated[assembly]
    if not stated and assembly == "1":
        return as_they_stand
    known = f"it states {', '.join(stated)}" if stated else "it states none: ask for None"
    raise FileFormatError(f"states no assembly {assembly!r}", path=path, hint=known)


def _assemble(
    flat: gemmi.FlatStructure, keep: NDArray[np.bool_], copies: list[Copies], path: Path
) -> AtomicModel:
    chains, subchains = _text(flat.chain_ids), _text(flat.subchains)
    copied: Counter[str] = Counter()
    parts, positions, labels = [], [], []
    for group in copies:
        chosen = keep
        if group.names:
            chosen = keep & np.isin(subchains if group.are_subchains else chains, group.names)
        atoms = np.flatnonzero(chosen)
        names, which = np.unique(chains[atoms], return_inverse=True)
        for operator in group.operators:
            copied.update(names.tolist())
            copies_named = [f"{name}-{copied[name]}" if copied[name] > 1 else name for name in names.tolist()]
            parts.append(atoms)
            positions.append(flat.pos[atoms] @ operator[:, :3].T + operator[:, 3])
            labels.append(np.array(copies_named, np.str_)[which])
    index = np.concatenate(parts)
    if len(index) == 0:
        message = "holds no atoms that are to be kept (waters, hydrogens and zero occupancy left out)"
        raise FileFormatError(message, path=path, hint="keep waters or hydrogens, or give another model")
    return AtomicModel(
        name=path.name.removesuffix(".gz").rsplit(".", 1)[0],
        positions=np.concatenate(positions),
        elements=_ATOMIC_NUMBERS[flat.elements[index]],
        b_factors=flat.b_iso[index],
        occupancies=flat.occ[index],
        chains=np.concatenate(labels),
        residue_names=_text(flat.residue_names)[index],
        residue_numbers=flat.resnums[index],
        atom_names=_text(flat.atom_names)[index],
    )


def _text(letters: object) -> NDArray[np.str_]:
    """Fixed-width letters (n, width) as strings (n,)."""
    rows = np.ascontiguousarray(letters, dtype=np.int8)
    return rows.view(f"S{rows.shape[1]}").ravel().astype(np.str_)


def _is_water(residue_names: object) -> NDArray[np.bool_]:
    names, where = np.unique(_text(residue_names), return_inverse=True)
    return np.array([gemmi.find_tabulated_residue(str(name)).is_water() for name in names])[where]


@lru_cache(maxsize=256)
def scattering_coefficients(element: str | int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Look up the five Gaussians of a neutral atom's elastic electron scattering factor.

    Parameters
    ----------
    element : str or int
        Symbol, or atomic number up to 98.

    Returns
    -------
    a : array (5,) float64
        Amplitudes in Å.
    b : array (5,) float64
        Widths in Å²: f(k) = sum of a exp(-b k² / 4), k the spatial frequency in 1/Å, good to k = 4 1/Å.

    Raises
    ------
    ParameterError
        If there is no such element in the table.

    Notes
    -----
    The table is that of Peng et al. [1]_ (International Tables C, 4.3.2.2) as gemmi holds it, f of the first
    Born approximation for electrons of rest mass; the reference writes it over s = k / 2.

    References
    ----------
    .. [1] Peng, Ren, Dudarev & Whelan (1996) Acta Cryst. A52, 257. https://doi.org/10.1107/S0108767395014371

    Examples
    --------
    >>> from halfmap.io.models import scattering_coefficients
    >>> a, b = scattering_coefficients("C")
    >>> print(round(a.sum(), 4))
    2.5088
    """
    known = gemmi.Element(element if isinstance(element, str) else int(element))
    if known.atomic_number == 0 or known.c4322 is None:
        raise ParameterError(f"no electron scattering factor for element {element!r}", hint="use H to Cf")
    # gemmi stores single precision, the table has four decimals.
    values = np.round(np.array(known.c4322.get_coefs(), np.float64), 4)
    values.setflags(write=False)
    return values[:5], values[5:]
