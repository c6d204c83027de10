from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from halfmap.cli import main
from halfmap.errors import FileFormatError, ParameterError, ShapeError
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.project import Project
from halfmap.steps.import_.step import ImportMap

BOX = 12


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    monkeypatch.chdir(tmp_path)
    return Project.open(tmp_path)


def volume(seed: int = 0, box: int = BOX) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(box, box, box)).astype(np.float32)


def write(name: str, array: np.ndarray, pixel_size: float = 1.25, **options) -> str:
    write_mrc(name, array, pixel_size=pixel_size, **options)
    return name


def test_all_volumes_are_copied_with_their_voxel_size_and_origin(project):
    mask = (volume(3) > 0).astype(np.float32)
    step = ImportMap(
        map=write("a.mrc", volume(), origin=(1.0, -2.0, 3.5)),
        half1=write("h1.mrc", volume(1)),
        half2=write("h2.mrc", volume(2)),
        mask=write("m.mrc", mask),
    )
    job = project.run(step)
    assert set(job.outputs) == {"map", "half1", "half2", "mask", "picture"}
    for name, array in {"map": volume(), "half1": volume(1), "half2": volume(2), "mask": mask}.items():
        np.testing.assert_array_equal(read_mrc(job.outputs[name]), array)
        assert read_header(job.outputs[name]).pixel_size == 1.25
        assert not read_header(job.outputs[name]).is_stack
    assert read_header(job.outputs["map"]).origin == (1.0, -2.0, 3.5)
    assert project.pipeline.nodes[f"{job.name}mask.mrc"] == "Mask3D.mrc"
    # RELION finds the second half map by its name.
    assert job.outputs["half1"].name.replace("half1", "half2") == job.outputs["half2"].name


def test_only_what_is_given_is_written(project):
    job = project.run(ImportMap(mask=write("m.mrc", np.ones((BOX,) * 3, np.float32))))
    assert set(job.outputs) == {"mask", "picture"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to import"),
        (["--half1", "h1.mrc"], "half maps come in pairs"),
        (["--map", "h1.mrc", "--pixel-size", "0"], "--pixel-size must be greater than 0"),
        (["--map", "no.mrc"], "no.mrc: input file does not exist"),
    ],
)
def test_wrong_options_make_no_job(project, words, message, capsys):
    write("h1.mrc", volume())
    assert main(["import", "map", *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("Import").exists()


def no_pixel_size(name: str) -> str:
    data = bytearray(Path(write(name, volume())).read_bytes())
    data[40:52] = bytes(12)  # the cell's size
    Path(name).write_bytes(data)
    return name


BAD = {
    "slab": (lambda: write("b.mrc", volume()[:8]), ShapeError, "is not cubic: 12 × 12 × 8 voxels"),
    "image": (lambda: write("b.mrc", volume()[0]), FileFormatError, "holds images, not a volume"),
    "stack": (lambda: write("b.mrcs", volume()), FileFormatError, "holds images, not a volume"),
    "nan": (lambda: write("b.mrc", np.where(volume() > 2, np.nan, volume())), FileFormatError, "are NaN"),
    "flat": (lambda: write("b.mrc", 0 * volume()), FileFormatError, "is the same everywhere"),
    "no pixel size": (lambda: no_pixel_size("b.mrc"), FileFormatError, "give it with --pixel-size"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_map_is_refused_and_nothing_written(project, kind):
    make, error, message = BAD[kind]
    with pytest.raises(error, match=message):
        project.run(ImportMap(map=make()))
    assert not list(project.root.glob("Import/job001/*.mrc"))
    assert not list(project.root.glob("Import/job001/*.png"))


def test_a_truncated_map_is_refused(project):
    Path("b.mrc").write_bytes(Path(write("a.mrc", volume())).read_bytes()[:-4])
    with pytest.raises(FileFormatError, match=r"b\.mrc: is truncated"):
        project.run(ImportMap(map="b.mrc"))


def test_a_missing_pixel_size_can_be_given(project):
    job = project.run(ImportMap(map=no_pixel_size("b.mrc"), pixel_size=0.83))
    assert read_header(job.outputs["map"]).pixel_size == pytest.approx(0.83, rel=1e-6)


def test_volumes_that_do_not_belong_together_are_refused(project):
    write("a.mrc", volume())
    with pytest.raises(ShapeError, match=r"has 10³ voxels of 1.25 Å, but .*a.mrc has 12³"):
        project.run(ImportMap(map="a.mrc", mask=write("m.mrc", np.ones((10,) * 3, np.float32))))
    with pytest.raises(ShapeError, match=r"of 1.3 Å, but .*a.mrc has 12³ voxels of 1.25 Å"):
        project.run(ImportMap(map="a.mrc", mask=write("m.mrc", np.ones((BOX,) * 3, np.float32), 1.3)))
    with pytest.raises(ParameterError, match="is identical to"):
        project.run(ImportMap(half1="a.mrc", half2=write("h2.mrc", volume())))


def test_a_mask_beyond_one_is_no_mask(project):
    with pytest.raises(FileFormatError, match="is no mask: its values go from -"):
        project.run(ImportMap(mask=write("m.mrc", volume())))


def test_real_maps(project, shared_data):
    job = project.run(ImportMap(map=shared_data / "maps/emd-5168-5170-actin/emd_5168.map"))
    assert read_header(job.outputs["map"]).shape == (100, 100, 100)
    with pytest.raises(ShapeError, match="is not cubic: 89 × 81 × 63"):
        project.run(ImportMap(map=shared_data / "maps/emd-30342-mapq-crop/mapq_390_emd_30342_A_z4.mrc"))
