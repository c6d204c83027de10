"""The steps that make masks: files, boxes and origins, where models lie, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from halfmap.cli import main
from halfmap.errors import FileFormatError, ParameterError
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.ops import grids, masks
from halfmap.project import Project
from halfmap.steps.mask.step import MaskCylinder, MaskMap, MaskModel, MaskSphere

SHAPE, PIXEL, ORIGIN = (24, 26, 28), 4.0, (10.0, -20.0, 30.0)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    monkeypatch.chdir(tmp_path)
    return Project.open(tmp_path)


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def write(name: str, array: np.ndarray) -> str:
    write_mrc(name, array, pixel_size=PIXEL, origin=ORIGIN, stack=False)
    return name


def ball(radius: float) -> np.ndarray:
    return (grids.radius(SHAPE, PIXEL) <= radius).numpy()


def test_mask_of_a_map_holds_the_particle_and_keeps_box_and_origin(project):
    particle = ball(28.0)
    name = write("map.mrc", 50 + 3 * particle.astype(np.float32) + 0.3 * noise())
    job = project.run(MaskMap(map=name, extend=4.0, soft_edge=12.0))
    mask = read_mrc(job.outputs["mask"])
    header = read_header(job.outputs["mask"])
    assert mask.shape == SHAPE and header.pixel_size == PIXEL and header.origin == ORIGIN
    assert project.pipeline.nodes[f"{job.name}mask.mrc"] == "Mask3D.mrc"
    assert (mask[particle] == 1).mean() > 0.99
    # Extension and edge end 16 Å beyond the surface, which is known to a voxel.
    assert mask[~ball(28.0 + 16.0 + PIXEL)].max() == 0
    assert job.outputs["picture"].stat().st_size > 10_000


def test_inverted_mask_is_one_minus_the_mask(project):
    name = write("map.mrc", noise())
    one, other = (
        read_mrc(project.run(MaskSphere(map=name, diameter=50.0, invert=invert)).outputs["mask"])
        for invert in (False, True)
    )
    np.testing.assert_allclose(one + other, 1, atol=1e-6)
    assert one[12, 13, 14] == 1


def test_shapes_are_those_of_the_masks(project):
    name = write("map.mrc", noise())
    centre = (8.0, -4.0, 2.0)
    step = MaskCylinder(map=name, diameter=30.0, length=40.0, centre=centre, soft_edge=8.0)
    found = read_mrc(project.run(step).outputs["mask"])
    expected = masks.soft_cylinder(SHAPE, radius=15.0, length=40.0, edge=8.0, pixel_size=PIXEL, centre=centre)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def atoms(name: str, places: np.ndarray, chains: str) -> str:
    lines = [
        f"ATOM  {i + 1:5d}  CA  ALA {chain}{i + 1:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00 20.00           C"
        for i, ((x, y, z), chain) in enumerate(zip(places, chains, strict=True))
    ]
    with open(name, "w", encoding="ascii") as file:  # noqa: PTH123
        file.write("\n".join([*lines, "END\n"]))
    return name


@pytest.mark.parametrize("origin", ["header", "box", "mass"])
def test_the_map_tells_where_the_model_lies(project, origin):
    """Atoms are put where the convention says; of all conventions the density chooses that one."""
    voxels = np.array([[6, 8, 10], [20, 18, 12], [9, 17, 15], [15, 6, 7]])
    density = np.zeros(SHAPE, np.float32)
    density[voxels[:, 2], voxels[:, 1], voxels[:, 0]] = 1
    name = write("map.mrc", density + 0.01 * noise())
    middle = np.array([14, 13, 12])
    places = {
        "header": voxels * PIXEL + np.array(ORIGIN),
        "box": (voxels - middle) * PIXEL,
        "mass": (voxels - voxels.mean(axis=0) + [3, 1, 2]) * PIXEL,
    }[origin]
    if origin == "mass":
        whole = np.zeros(SHAPE, np.float32)
        shifted = np.rint(voxels - voxels.mean(axis=0) + middle).astype(int)
        whole[shifted[:, 2], shifted[:, 1], shifted[:, 0]] = 1
        name, voxels = write("moved.mrc", whole + 0.01 * noise()), shifted
    model = atoms("model.pdb", places, "AABB")
    job = project.run(MaskModel(map=name, model=model, chains=("B",), extend=0.0, soft_edge=0.0))
    mask = read_mrc(job.outputs["mask"])
    inside = np.array([mask[z, y, x] for x, y, z in voxels])
    assert inside.tolist() == [0, 0, 1, 1]


def test_a_map_whose_header_counts_its_first_voxel_holds_the_model_there(project):
    """Without an origin in Å the number of the first voxel counts, and the mask lies where the map does."""
    write_mrc("map.mrc", noise(), pixel_size=PIXEL, stack=False)
    with Path("map.mrc").open("r+b") as file:
        file.seek(16)
        file.write(np.array([-5, 2, 7], "<i4").tobytes())
    voxel = np.array([6, 8, 10])
    model = atoms("model.pdb", (voxel + np.array([-5, 2, 7]))[None] * PIXEL, "A")
    job = project.run(MaskModel(map="map.mrc", model=model, origin="header", extend=0.0, soft_edge=0.0))
    mask = read_mrc(job.outputs["mask"])
    assert np.argwhere(mask == mask.max()).mean(axis=0).tolist() == voxel[::-1].tolist()
    assert read_header(job.outputs["mask"]).origin == (-20.0, 8.0, 28.0)


def test_a_blank_map_gives_box_and_voxels_but_no_place(project, caplog):
    """Told where the model lies, or given a shape, nothing is asked of the density."""
    name = write("blank.mrc", np.zeros(SHAPE, np.float32))
    model = atoms("model.pdb", np.array([[0.0, 0, 0], [0, 8, 4]]), "AA")
    for step in (MaskModel(map=name, model=model, origin="box"), MaskSphere(map=name, diameter=40.0)):
        assert read_mrc(project.run(step).outputs["mask"]).max() == 1
    assert "density" not in caplog.text
    for step in (MaskModel(map=name, model=model), MaskMap(map=name)):
        with pytest.raises(FileFormatError, match="is the same everywhere"):
            project.run(step)


def test_what_cannot_be_masked_is_refused(project, capsys):
    name = write("noise.mrc", noise())
    with pytest.raises(ParameterError, match=r"noise\.mrc: no particle stands out of the noise"):
        project.run(MaskMap(map=name))
    with pytest.raises(ParameterError, match="nothing of the map at 15 Å is above the threshold 99"):
        project.run(MaskMap(map=name, threshold=99.0))
    with pytest.raises(ParameterError, match="the mask is empty"):
        project.run(MaskSphere(map=name, diameter=20.0, centre=(900.0, 0.0, 0.0), soft_edge=0.0))
    # The corners of the box are 90 Å from its centre; seen along z, 76 Å.
    for shape in (MaskSphere(map=name, diameter=184.0), MaskCylinder(map=name, diameter=9000.0, invert=True)):
        with pytest.raises(ParameterError, match="holds the whole box of 112 × 104 × 96 Å; give a smaller"):
            project.run(shape)
    assert read_mrc(project.run(MaskSphere(map=name, diameter=120.0)).outputs["mask"]).min() == 0
    model = atoms("model.pdb", np.array([[0.0, 0, 0], [4, 4, 4]]), "AB")
    with pytest.raises(ParameterError, match=r"model\.pdb: has no chain 'X'; it has A, B"):
        project.run(MaskModel(map=name, model=model, chains=("X",)))
    far = atoms("far.pdb", np.array([[5e3, 0, 0], [5e3, 4, 4]]), "AB")
    with pytest.raises(ParameterError, match="no atom of the model lies in the box"):
        project.run(MaskModel(map=name, model=far, origin="box"))
    bad = noise()
    bad[0, 0, 0] = np.nan
    with pytest.raises(FileFormatError, match=r"bad\.mrc: holds 1 voxels that are NaN"):
        project.run(MaskMap(map=write("bad.mrc", bad)))
    assert main(["mask", name, "--threshold", "1", "--level", "0.4"]) == 2
    assert "--level has nothing to do" in capsys.readouterr().err


@pytest.mark.relion
def test_extension_and_edge_are_those_of_relion(tmp_path):
    import subprocess

    inside = torch.from_numpy(ball(20.0))
    inside[5, 5, 5] = True
    write_mrc(tmp_path / "in.mrc", inside.float().numpy(), pixel_size=PIXEL, stack=False)
    words = ["relion_mask_create", "--i", "in.mrc", "--o", "out.mrc", "--ini_threshold", "0.5"]
    words += ["--extend_inimask", "2", "--width_soft_edge", "5"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    theirs = read_mrc(tmp_path / "out.mrc")
    # RELION extends voxel by voxel, up to but not at the distance, and measures the edge from the last voxel.
    less, more = (masks.soft_edge(inside, width=5.0, extend=extend).numpy() for extend in (1.0, 2.0))
    assert (less <= theirs + 1e-5).all()
    assert (theirs <= more + 1e-5).all()
