"""Atomic models that go back to a file: read with all that it says, moved, scored and written as mmCIF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray

from halfmap.errors import FileFormatError
from halfmap.io.atomic import atomic_path
from halfmap.io.binary import opened
from halfmap.io.models import AtomicModel, parse_structure
from halfmap.io.mrc_header import inflate, read_header
from halfmap.io.volumes import MapFile

_START_BYTE = 16
"""Where an MRC header says at which voxel the map begins."""

_POSITION = ("Cartn_x", "Cartn_y", "Cartn_z")
_NONE = (".", "?", "")
_OPERATORS = "_pdbx_struct_oper_list.", "_struct_ncs_oper."


@dataclass(frozen=True, eq=False)
class ModelFile:
    """An atomic model with the file that it came from.

    Attributes
    ----------
    path : Path
    document : gemmi.cif.Document
        All that the file says; a PDB file's content as mmCIF.
    model : AtomicModel
        Atoms of the first model as they stand, waters among them, hydrogens and those of no occupancy not.
    rows : array (n,) int64
        Where they are in the table of atoms.
    alternatives : array (n,) int64
        Alternative location of each, 0 where there is but one.
    insertions : array (n,) str
        Insertion codes of their residues.
    resolution : float or None
        Of the map that it was made for, Å, where the file says so.
    """

    path: Path
    document: gemmi.cif.Document
    model: AtomicModel
    rows: NDArray[np.int64]
    alternatives: NDArray[np.int64]
    insertions: NDArray[np.str_]
    resolution: float | None

    def write(
        self,
        path: Path,
        *,
        rotation: NDArray[np.float64],
        shift: NDArray[np.float64],
        columns: Mapping[str, NDArray[np.float64]],
    ) -> None:
        """Write the model as mmCIF, moved and with columns added to its table of atoms.

        Parameters
        ----------
        path : path
            File to write.
        rotation : array (3, 3)
        shift : array (3,)
            Atoms come to rotation @ x + shift, Å. All models and hydrogens move; so do anisotropic
            B-factors, and the operators of assemblies with them.
        columns : mapping of str to array (n,)
            Values of the atoms of `model` by the column's name without ``_atom_site.``; other atoms, and what
            is not a number, get a question mark. A column that is there is replaced.
        """
        document = gemmi.cif.read_string(self.document.as_string())
        block = _atom_block(document, self.path)
        loop = block.find_loop("_atom_site.Cartn_x").get_loop()
        if not np.array_equal(rotation, np.eye(3)) or np.any(shift):
            places = _floats(block, _POSITION, self.path) @ rotation.T + shift
            for name, values in zip(_POSITION, places.T, strict=True):
                _set(block, f"_atom_site.{name}", [f"{value:.3f}" for value in values])
            _turn_tensors(block, rotation)
            _move_operators(block, rotation, shift)
        for name, values in columns.items():
            texts = np.full(loop.length(), "?", object)
            texts[self.rows] = ["?" if np.isnan(value) else f"{value:.3f}" for value in values]
            if f"_atom_site.{name}" not in loop.tags:
                loop.add_columns([f"_atom_site.{name}"], value="?")
            _set(block, f"_atom_site.{name}", texts.tolist())
        with atomic_path(path) as temporary:
            document.write_file(str(temporary), gemmi.cif.WriteOptions(gemmi.cif.Style.Aligned))


def read_model_file(path: str | Path) -> ModelFile:
    """Read an atomic model that is to be written again.

    Parameters
    ----------
    path : path
        PDB or mmCIF, plain or ``.gz``.

    Raises
    ------
    FileFormatError
        If it cannot be read, or holds no atoms but hydrogens.
    """
    path = Path(path)
    structure = parse_structure(path)
    if structure.input_format == gemmi.CoorFormat.Mmcif:
        document = gemmi.cif.read(str(path))
    else:
        structure.setup_entities()
        structure.assign_label_seq_id()
        document = structure.make_mmcif_document()
    block = _atom_block(document, path)
    numbers = np.array([gemmi.Element(each).atomic_number for each in _texts(block, "type_symbol")], np.uint8)
    models = _texts(block, "pdbx_PDB_model_num", missing="1")
    occupancies = np.array([_number(each, 1.0) for each in _texts(block, "occupancy", missing="1")])
    wanted = (numbers != 1) & (occupancies > 0) & (models == models[0])
    rows = np.flatnonzero(wanted)
    if not len(rows):
        message = "holds no atoms with an occupancy above 0, hydrogens left out"
        raise FileFormatError(message, path=path, hint="give another model")
    b_factors = np.array([_number(each, 0.0) for each in _texts(block, "B_iso_or_equiv", missing="0")])
    alternatives = np.unique(
        [each if each not in _NONE else "" for each in _texts(block, "label_alt_id", missing=".")],
        return_inverse=True,
    )
    first = 0 if "" in alternatives[0] else 1
    insertions = np.array(
        ["" if each in _NONE else each for each in _texts(block, "pdbx_PDB_ins_code", missing="?")]
    )
    model = AtomicModel(
        name=path.name.removesuffix(".gz").rsplit(".", 1)[0],
        positions=_floats(block, _POSITION, path)[rows],
        elements=numbers[rows],
        b_factors=np.clip(b_factors[rows], 0, None).astype(np.float32),
        occupancies=occupancies[rows].astype(np.float32),
        chains=_texts(block, "auth_asym_id", "label_asym_id")[rows],
        residue_names=_texts(block, "auth_comp_id", "label_comp_id")[rows],
        residue_numbers=np.array(
            [int(_number(each, 0)) for each in _texts(block, "auth_seq_id", "label_seq_id")], np.int32
        )[rows],
        atom_names=_texts(block, "auth_atom_id", "label_atom_id")[rows],
    )
    return ModelFile(
        path, document, model, rows, alternatives[1][rows] + first, insertions[rows], _resolution(structure)
    )


def model_origin(volume: MapFile) -> tuple[float, float, float]:
    """Where a map's first voxel is in the coordinates of models, (x, y, z) in Å.

    Notes
    -----
    Headers state it in two ways: the origin in Å, or the number of the first voxel. The origin counts if it
    is not zero, else the number, as in most programs that show models in maps.
    """
    if any(volume.origin):
        return volume.origin
    header = read_header(volume.path)
    if header.compression is None:
        with opened(volume.path) as stream:
            stream.seek(_START_BYTE)
            raw = stream.read(12)
    else:
        raw = bytes(inflate(volume.path, header.compression, _START_BYTE, _START_BYTE + 12))
    starts = np.frombuffer(raw, f"{header.byte_order}i4")
    # Starts are of columns, rows and sections, which may be any of x, y and z.
    axes = header.stored_axes[::-1]
    x, y, z = (float(starts[axes.index(axis)]) * volume.pixel_size for axis in (1, 2, 3))
    return x, y, z


def _resolution(structure: gemmi.Structure) -> float | None:
    """Of a map; a crystal's says nothing about the map that its model is put into."""
    method = dict(structure.info).get("_exptl.method", "").upper()
    return structure.resolution if "ELECTRON MICROSCOPY" in method and structure.resolution > 0 else None


def _atom_block(document: gemmi.cif.Document, path: Path) -> gemmi.cif.Block:
    for block in document:
        if block.find_loop("_atom_site.Cartn_x"):
            return block
    raise FileFormatError("holds no table of atoms", path=path, hint="give a PDB or mmCIF file of a model")


def _texts(block: gemmi.cif.Block, *names: str, missing: str | None = None) -> NDArray[np.str_]:
    """Values of the first column that is there."""
    for name in names:
        found = block.find_values(f"_atom_site.{name}")
        if found:
            return np.array([gemmi.cif.as_string(each) or each for each in found])
    length = len(block.find_values("_atom_site.Cartn_x"))
    return np.full(length, missing or "?")


def _number(text: str, missing: float) -> float:
    return missing if text in _NONE else gemmi.cif.as_number(text, missing)


def _floats(block: gemmi.cif.Block, names: tuple[str, ...], path: Path) -> NDArray[np.float64]:
    columns = [block.find_values(f"_atom_site.{name}") for name in names]
    found = np.array([[gemmi.cif.as_number(each) for each in column] for column in columns]).T
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0]) + 1
        raise FileFormatError("an atom's position is no number", path=path, row=row, hint="mend the file")
    return found


def _set(block: gemmi.cif.Block, tag: str, texts: list[str]) -> None:
    column = block.find_values(tag)
    for number, text in enumerate(texts):
        column[number] = text


def _turn_tensors(block: gemmi.cif.Block, rotation: NDArray[np.float64]) -> None:
    """Anisotropic B-factors turn with their atoms."""
    for kind in ("U", "B"):
        pairs = [(i, j) for i in range(3) for j in range(i, 3)]
        table = block.find("_atom_site_anisotrop.", [f"{kind}[{i + 1}][{j + 1}]" for i, j in pairs])
        for row in table:
            tensor = np.zeros((3, 3))
            for number, (i, j) in enumerate(pairs):
                tensor[i, j] = tensor[j, i] = gemmi.cif.as_number(row[number], 0.0)
            tensor = rotation @ tensor @ rotation.T
            for number, (i, j) in enumerate(pairs):
                row[number] = f"{tensor[i, j]:.4f}"


def _move_operators(
    block: gemmi.cif.Block, rotation: NDArray[np.float64], shift: NDArray[np.float64]
) -> None:
    """Operators x -> A x + b of assemblies, for coordinates that have moved."""
    tags = [f"matrix[{i}][{j}]" for i in (1, 2, 3) for j in (1, 2, 3)] + [f"vector[{i}]" for i in (1, 2, 3)]
    for prefix in _OPERATORS:
        for row in block.find(prefix, tags):
            values = np.array([gemmi.cif.as_number(row[i], 0.0) for i in range(12)])
            matrix, vector = values[:9].reshape(3, 3), values[9:]
            moved = rotation @ matrix @ rotation.T
            offset = rotation @ vector + shift - moved @ shift
            for i, value in enumerate((*moved.ravel(), *offset)):
                row[i] = f"{value:.10f}" if i < 9 else f"{value:.5f}"
