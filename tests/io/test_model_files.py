"""Models that go back to a file, and where maps lie in their coordinates."""

from __future__ import annotations

import gzip

import gemmi
import mrcfile
import numpy as np
import pytest
import torch
from tests.support.fit_model import write_model

from halfmap.errors import FileFormatError
from halfmap.io.model_files import model_origin, read_model_file
from halfmap.io.mrc import write_mrc
from halfmap.io.volumes import read_volume
from halfmap.ops.rotations import from_rotation_vector

TURN = from_rotation_vector(torch.tensor([20.0, -50.0, 70.0], dtype=torch.float64)).numpy()
SHIFT = np.array([3.0, -7.0, 11.0])

CIF = """data_test
_entry.id test
_em_3d_reconstruction.entry_id test
_em_3d_reconstruction.resolution 3.4
_exptl.entry_id test
_exptl.method 'ELECTRON MICROSCOPY'
loop_
_citation.id
_citation.title
primary 'A title; with "quotes"'
loop_
_pdbx_struct_oper_list.id
_pdbx_struct_oper_list.type
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
1 'identity operation' 1 0 0 0 0 1 0 0 0 0 1 0
2 'point symmetry operation' -1 0 0 100 0 -1 0 60 0 0 1 0
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
_atom_site.pdbx_PDB_ins_code
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
_atom_site.occupancy
_atom_site.B_iso_or_equiv
_atom_site.auth_seq_id
_atom_site.auth_asym_id
_atom_site.pdbx_PDB_model_num
ATOM 1 N N . GLY A 1 1 ? 10 20 30 1 50 5 X 1
ATOM 2 C CA A GLY A 1 1 ? 11 20 30 0.5 50 5 X 1
ATOM 3 C CA B GLY A 1 1 ? 11.5 20 30 0.5 50 5 X 1
ATOM 4 H HA . GLY A 1 1 ? 11 21 30 1 50 5 X 1
HETATM 5 O O . HOH B 2 . ? 15 20 30 1 60 101 X 1
ATOM 6 N N . ALA A 1 2 A 12 22 30 1 50 5 X 1
ATOM 7 N N . GLY A 1 1 ? 10 20 31 1 50 5 X 2
loop_
_atom_site_anisotrop.id
_atom_site_anisotrop.U[1][1]
_atom_site_anisotrop.U[1][2]
_atom_site_anisotrop.U[1][3]
_atom_site_anisotrop.U[2][2]
_atom_site_anisotrop.U[2][3]
_atom_site_anisotrop.U[3][3]
1 0.9 0.1 0 0.2 0 0.1
"""


@pytest.fixture
def cif(tmp_path):
    path = tmp_path / "test.cif"
    path.write_text(CIF)
    return path


def test_atoms_are_those_that_scatter(cif):
    file = read_model_file(cif)
    assert file.rows.tolist() == [0, 1, 2, 4, 5]
    assert file.model.elements.tolist() == [7, 6, 6, 8, 7]
    assert file.model.positions[3].tolist() == [15, 20, 30]
    assert file.model.residue_numbers.tolist() == [5, 5, 5, 101, 5]
    assert file.insertions.tolist() == ["", "", "", "", "A"]
    assert file.alternatives.tolist() == [0, 1, 2, 0, 0]
    assert set(file.model.chains) == {"X"}
    assert file.resolution == 3.4


def test_all_moves_and_nothing_is_lost(cif, tmp_path):
    file = read_model_file(cif)
    path = tmp_path / "moved.cif"
    scores = np.array([0.1234, 0.5, np.nan, 0.75, 1.0])
    file.write(path, rotation=TURN, shift=SHIFT, columns={"Q_score": scores})
    before, after = gemmi.cif.read(str(cif)).sole_block(), gemmi.cif.read(str(path)).sole_block()
    assert after.find_value("_em_3d_reconstruction.resolution") == "3.4"
    assert gemmi.cif.as_string(after.find_loop("_citation.title")[0]) == 'A title; with "quotes"'
    tags = [f"_atom_site.Cartn_{axis}" for axis in "xyz"]
    start, end = (
        np.array([[float(v) for v in block.find_loop(tag)] for tag in tags]).T for block in (before, after)
    )
    np.testing.assert_allclose(end, start @ TURN.T + SHIFT, atol=6e-4)
    assert list(after.find_loop("_atom_site.Q_score")) == ["0.123", "0.500", "?", "?", "0.750", "1.000", "?"]
    assert list(after.find_loop("_atom_site.B_iso_or_equiv")) == list(
        before.find_loop("_atom_site.B_iso_or_equiv")
    )
    row = after.find("_atom_site_anisotrop.", [f"U[{i}][{j}]" for i, j in ((1, 1), (1, 2), (1, 3))])[0]
    tensor = TURN @ np.array([[0.9, 0.1, 0], [0.1, 0.2, 0], [0, 0, 0.1]]) @ TURN.T
    np.testing.assert_allclose([float(each) for each in row], tensor[0], atol=1e-4)


def test_assemblies_move_with_the_model(cif, tmp_path):
    """The second copy of what has moved is what has moved of the second copy."""
    path = tmp_path / "moved.cif"
    read_model_file(cif).write(path, rotation=TURN, shift=SHIFT, columns={})
    place = np.array([10.0, 20.0, 30.0])
    copies = []
    for name in (cif, path):
        block = gemmi.cif.read(str(name)).sole_block()
        matrix, vector = (
            np.array(
                [[float(each) for each in row] for row in block.find("_pdbx_struct_oper_list.", tags)][1]
            )
            for tags in (
                [f"matrix[{i}][{j}]" for i in (1, 2, 3) for j in (1, 2, 3)],
                [f"vector[{i}]" for i in (1, 2, 3)],
            )
        )
        start = place if name == cif else TURN @ place + SHIFT
        copies.append(matrix.reshape(3, 3) @ start + vector)
    np.testing.assert_allclose(copies[1], TURN @ copies[0] + SHIFT, atol=1e-4)


def test_a_model_that_stays_is_written_as_it_was(cif, tmp_path):
    path = tmp_path / "same.cif"
    read_model_file(cif).write(path, rotation=np.eye(3), shift=np.zeros(3), columns={})
    values = [
        list(gemmi.cif.read(str(each)).sole_block().find_loop("_atom_site.Cartn_x")) for each in (cif, path)
    ]
    assert values[0] == values[1]


def test_pdb_files_become_mmcif(tmp_path):
    positions = write_model(tmp_path / "a.pdb", centre=(10.0, -20.0, 30.0))
    packed = tmp_path / "a.pdb.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.pdb").read_bytes()))
    file = read_model_file(packed)
    np.testing.assert_allclose(file.model.positions, positions, atol=1e-6)
    assert file.model.atom_names[:5].tolist() == ["N", "CA", "C", "O", "CB"]
    assert file.resolution is None
    file.write(tmp_path / "b.cif", rotation=TURN, shift=SHIFT, columns={"Q_score": np.zeros(len(positions))})
    again = read_model_file(tmp_path / "b.cif")
    np.testing.assert_allclose(again.model.positions, positions @ TURN.T + SHIFT, atol=6e-4)


def test_no_atoms(tmp_path, cif):
    path = tmp_path / "h.cif"
    path.write_text(
        "\n".join(
            line for line in CIF.splitlines() if " HA " in line or not line.startswith(("ATOM", "HETATM"))
        )
    )
    with pytest.raises(FileFormatError, match="hydrogens left out"):
        read_model_file(path)
    path.write_text("nothing")
    with pytest.raises(FileFormatError, match=r"not an atomic model|holds no atoms"):
        read_model_file(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_where_a_map_begins(tmp_path, suffix):
    """By the origin if there is one, else by the number of the first voxel, of whatever axis that is."""
    path = tmp_path / "a.mrc"
    write_mrc(path, np.random.default_rng(1).normal(size=(4, 5, 6)).astype("f4"), pixel_size=1.5, stack=False)
    with mrcfile.open(path, "r+") as mrc:
        mrc.header.nxstart, mrc.header.nystart, mrc.header.nzstart = 10, -20, 30
        # Columns along y, rows along x.
        mrc.header.mapc, mrc.header.mapr = 2, 1
    name = path
    if suffix:
        name = tmp_path / "a.mrc.gz"
        name.write_bytes(gzip.compress(path.read_bytes()))
    assert model_origin(read_volume(name)) == pytest.approx((-30.0, 15.0, 45.0))
    with mrcfile.open(path, "r+") as mrc:
        mrc.header.origin = (1.0, 2.0, 3.0)
    assert model_origin(read_volume(path)) == pytest.approx((1.0, 2.0, 3.0))
