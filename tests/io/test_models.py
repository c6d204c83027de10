"""Atomic models: atoms, assemblies, what is left out, and electron scattering."""

from __future__ import annotations

import csv
import gzip
import re
from pathlib import Path

import numpy as np
import pytest

from halfmap.errors import FileFormatError, ParameterError
from halfmap.io.models import read_model, read_models, scattering_coefficients


def atom(serial: int, name: str, residue: str, chain: str, row: int, x: float, occ: float, b: float, el: str):
    kind = "HETATM" if residue == "HOH" else "ATOM"
    place = f"{x:8.3f}{0.0:8.3f}{0.0:8.3f}{occ:6.2f}{b:6.2f}"
    return f"{kind:<6}{serial:5d} {name:<4} {residue:>3} {chain}{row:4d}    {place}          {el:>2}\n"


ATOMS = (
    atom(1, " CA ", "ALA", "A", 1, 1.0, 1.0, 20.0, "C")
    + atom(2, " HA ", "ALA", "A", 1, 2.0, 1.0, 20.0, "H")
    + atom(3, " D  ", "ALA", "A", 1, 2.5, 1.0, 20.0, "D")
    + atom(4, " OG ", "SER", "A", 2, 3.0, 0.4, 30.0, "O")
    + atom(5, " OG ", "SER", "A", 2, 3.5, 0.6, 31.0, "O")
    + atom(6, " SG ", "CYS", "B", 7, 5.0, 1.0, 40.0, "S")
    + atom(7, " CB ", "CYS", "B", 7, 6.0, 0.0, 40.0, "C")
    + atom(8, " O  ", "HOH", "A", 9, 9.0, 1.0, 50.0, "O")
)
BIOMT = """REMARK 350 BIOMOLECULE: 1
REMARK 350 APPLY THE FOLLOWING TO CHAINS: A
REMARK 350   BIOMT1   1  1.000000  0.000000  0.000000        0.00000
REMARK 350   BIOMT2   1  0.000000  1.000000  0.000000        0.00000
REMARK 350   BIOMT3   1  0.000000  0.000000  1.000000        0.00000
REMARK 350   BIOMT1   2 -1.000000  0.000000  0.000000        0.50000
REMARK 350   BIOMT2   2  0.000000 -1.000000  0.000000        0.00000
REMARK 350   BIOMT3   2  0.000000  0.000000  1.000000        2.00000
"""
MMCIF = """data_x
loop_
_atom_site.group_PDB
_atom_site.id
_atom_site.type_symbol
_atom_site.label_atom_id
_atom_site.label_alt_id
_atom_site.label_comp_id
_atom_site.label_asym_id
_atom_site.label_entity_id
_atom_site.label_seq_id
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
_atom_site.occupancy
_atom_site.B_iso_or_equiv
_atom_site.auth_seq_id
_atom_site.auth_asym_id
_atom_site.pdbx_PDB_model_num
ATOM 1 C CA . ALA A 1 1 1 2 3 1.0 20 1 X 1
ATOM 2 S SG . CYS B 1 1 5 0 0 1.0 20 1 Y 1
"""
OPERATORS = """loop_
_pdbx_struct_oper_list.id
_pdbx_struct_oper_list.matrix[1][1]
_pdbx_struct_oper_list.matrix[1][2]
_pdbx_struct_oper_list.matrix[1][3]
_pdbx_struct_oper_list.vector[1]
_pdbx_struct_oper_list.matrix[2][1]
_pdbx_struct_oper_list.matrix[2][2]
_pdbx_struct_oper_list.matrix[2][3]
_pdbx_struct_oper_list.vector[2]
_pdbx_struct_oper_list.matrix[3][1]
_pdbx_struct_oper_list.matrix[3][2]
_pdbx_struct_oper_list.matrix[3][3]
_pdbx_struct_oper_list.vector[3]
1 1 0 0 0 0 1 0 0 0 0 1 0
2 1 0 0 10 0 1 0 0 0 0 1 0
P 0 -1 0 0 1 0 0 0 0 0 1 0
"""


def write(folder: Path, text: str, name: str = "model.pdb") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_atoms_as_the_file_has_them(tmp_path: Path) -> None:
    model = read_model(write(tmp_path, ATOMS + "END\n"))
    assert model.name == "model"
    # Hydrogens, deuterium, water and zero occupancy are left out.
    assert model.elements.tolist() == [6, 8, 8, 16]
    assert model.positions[:, 0].tolist() == [1, 3, 3.5, 5]
    assert model.occupancies.tolist() == pytest.approx([1, 0.4, 0.6, 1])
    assert model.b_factors.tolist() == [20, 30, 31, 40]
    assert model.chains.tolist() == ["A", "A", "A", "B"]
    assert model.residue_names.tolist() == ["ALA", "SER", "SER", "CYS"]
    assert model.residue_numbers.tolist() == [1, 2, 2, 7]
    assert model.atom_names.tolist() == ["CA", "OG", "OG", "SG"]
    assert model.mass_kDa == pytest.approx((12.011 + 15.999 + 32.06) / 1000, rel=1e-4)
    assert model.diameter == pytest.approx(4)


def test_what_may_be_kept(tmp_path: Path) -> None:
    path = write(tmp_path, ATOMS)
    assert read_model(path, hydrogens=True).elements.tolist() == [6, 1, 1, 8, 8, 16]
    assert "HOH" in read_model(path, waters=True).residue_names
    assert set(read_model(path, b_factor=55).b_factors) == {55}


def test_the_centre_of_mass_goes_to_the_origin(tmp_path: Path) -> None:
    model = read_model(write(tmp_path, ATOMS))
    expected = np.average(model.positions[:, 0], weights=[12.011, 0.4 * 15.999, 0.6 * 15.999, 32.06])
    assert model.centre == pytest.approx([expected, 0, 0], rel=1e-3)
    assert model.centred().centre == pytest.approx(np.zeros(3), abs=1e-9)
    assert np.allclose(np.diff(model.centred().positions, axis=0), np.diff(model.positions, axis=0))
    assert model.select(model.chains == "B").elements.tolist() == [16]


def test_an_assembly_copies_its_chains(tmp_path: Path) -> None:
    path = write(tmp_path, BIOMT + ATOMS)
    model = read_model(path)
    assert model.chains.tolist() == ["A", "A", "A", "A-2", "A-2", "A-2"]
    assert model.positions[3:].tolist() == [[-0.5, 0, 2], [-2.5, 0, 2], [-3, 0, 2]]
    assert len(read_model(path, assembly=None)) == 4
    with pytest.raises(FileFormatError, match="states no assembly '2'; it states 1"):
        read_model(path, assembly="2")


def test_biomt_rows_alone_are_an_assembly_of_all_chains(tmp_path: Path) -> None:
    rows = "".join(line + "\n" for line in BIOMT.splitlines() if "BIOMT" in line)
    path = tmp_path / "a.pdb.gz"
    path.write_bytes(gzip.compress((rows + ATOMS).encode()))
    model = read_model(path)
    assert (model.name, len(model)) == ("a", 8)
    assert sorted(set(model.chains.tolist())) == ["A", "A-2", "B", "B-2"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("1 1 A", [[1, 2, 3]]),
        ("1 1,2 A", [[1, 2, 3], [11, 2, 3]]),
        ("1 '(1-2)' A,B", [[1, 2, 3], [5, 0, 0], [11, 2, 3], [15, 0, 0]]),
        # The right-hand operator acts first: a shift by 10 along x, then a quarter turn.
        ("1 (P)(2) A", [[-2, 11, 3]]),
        ("1 (2)(P) A", [[8, 1, 3]]),
        ("1 1 A\n1 2 B", [[1, 2, 3], [15, 0, 0]]),
    ],
)
@pytest.mark.parametrize("names", ["asym_id_list", "entity_inst_id"])
def test_mmcif_assemblies(tmp_path: Path, names: str, rows: str, expected: list) -> None:
    if names == "entity_inst_id":  # the older tables name chains, here X and Y
        rows = re.sub(r"\bA\b", "X", re.sub(r"\bB\b", "Y", rows))
    table = "loop_\n" + "".join(
        f"_pdbx_struct_assembly_gen.{tag}\n" for tag in ("assembly_id", "oper_expression", names)
    )
    model = read_model(write(tmp_path, MMCIF + OPERATORS + table + rows + "\n", "a.cif"))
    assert model.positions.tolist() == expected


def test_several_models_are_several_conformations(tmp_path: Path) -> None:
    second = ATOMS.replace("   1.000   0.000", "  -8.000   0.000")
    path = write(tmp_path, f"MODEL        1\n{ATOMS}ENDMDL\nMODEL        2\n{second}ENDMDL\nEND\n")
    assert read_model(path).positions[0, 0] == 1
    assert [model.positions[0, 0] for model in read_models(path)] == [1, -8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not an atomic model"),
        ("HEADER nothing\nEND\n", "holds no atoms"),
        ("data_x\nloop_\n_atom_site.id\n_atom_site.type_symbol\n1\n", "is not an atomic model"),
        (atom(1, " O  ", "HOH", "A", 9, 9.0, 1.0, 50.0, "O"), "holds no atoms that are to be kept"),
    ],
)
def test_files_that_are_no_models(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text, "a.cif" if text.startswith("data_") else "a.pdb")
    with pytest.raises(FileFormatError, match=message) as caught:
        read_model(path)
    assert str(path) in str(caught.value)


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no such file"):
        read_model(tmp_path / "none.pdb")
    with pytest.raises(FileFormatError, match="states no assembly '3'; it states none"):
        read_model(write(tmp_path, ATOMS), assembly="3")
    with pytest.raises(ParameterError, match="B-factor -1"):
        read_model(write(tmp_path, ATOMS), b_factor=-1)
    (tmp_path / "a.pdb.gz").write_bytes(gzip.compress(ATOMS.encode())[:-20])
    with pytest.raises(FileFormatError, match="is not an atomic model"):
        read_model(tmp_path / "a.pdb.gz")


def test_scattering_is_that_of_electrons() -> None:
    # The table of Peng et al. (1996) for carbon, and f(0) of three elements, which for X-rays would be Z.
    a, b = scattering_coefficients("C")
    assert a.tolist() == [0.0893, 0.2563, 0.7570, 1.0487, 0.3575]
    assert b.tolist() == [0.2465, 1.7100, 6.4094, 18.6113, 50.2523]
    sums = [scattering_coefficients(symbol)[0].sum() for symbol in ("H", "N", "O")]
    assert sums == pytest.approx([0.529, 2.211, 1.983], abs=5e-3)
    assert np.array_equal(scattering_coefficients(6)[0], a)
    with pytest.raises(ParameterError, match="no electron scattering factor for element 'Xx'"):
        scattering_coefficients("Xx")
    with pytest.raises(ValueError, match="read-only"):
        a[0] = 1


@pytest.mark.parametrize(
    "name", ["5a1a.cif.gz", "6z6u.pdb.gz", "1lnl.pdb.gz", "1rug.cif.gz", "1cgm.cif.gz", "2vf9.cif.gz"]
)
def test_real_assemblies_weigh_what_their_index_says(shared_data: Path, name: str) -> None:
    with (shared_data / "models/INDEX.csv").open(newline="") as stream:
        index = {row["file"]: row for row in csv.DictReader(stream)}
    model = read_model(shared_data / "models" / name)
    assert model.mass_kDa == pytest.approx(float(index[name]["assembly1_mass_kDa"]), rel=2e-3, abs=0.06)
    unit = read_model(shared_data / "models" / name, assembly=None)
    assert unit.mass_kDa == pytest.approx(float(index[name]["mass_kDa"]), rel=2e-3, abs=0.06)


def test_an_icosahedral_assembly_is_symmetric(shared_data: Path) -> None:
    model = read_model(shared_data / "models/1f2n.cif.gz").centred()
    tensor = np.cov(model.positions.T, bias=True)
    # The inertia of cubic and icosahedral groups has no direction.
    assert tensor / np.trace(tensor) == pytest.approx(np.eye(3) / 3, abs=1e-4)
