"""A small model in maps that were made of it: where it goes, its scores, and what is written."""

from __future__ import annotations

import re
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from tests.support.fit_model import write_model

from halfmap.errors import FileFormatError, ParameterError, ShapeError
from halfmap.io.model_files import read_model_file
from halfmap.io.models import read_model
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.ops.rotations import from_rotation_vector
from halfmap.project import Project
from halfmap.search.model_density import model_map
from halfmap.steps.fit.step import FitStep

BOX, PIXEL, ORIGIN = 40, 1.1, (-11.0, 22.0, 55.0)
CENTRE = (12.0, 43.0, 75.0)
SHIFTED = slice(40, 60)
"""Atoms of residues 9 to 12."""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    monkeypatch.chdir(tmp_path)
    write_model(Path("model.pdb"), centre=CENTRE)
    return Project.open(tmp_path)


def made(path: str = "model.pdb", *, blur: float = 60.0) -> torch.Tensor:
    model = read_model(path, assembly=None)
    return model_map(model, shape=(BOX,) * 3, pixel_size=PIXEL, origin=ORIGIN, blur=blur)


def noisy(volume: torch.Tensor, seed: int, noise: float) -> torch.Tensor:
    random = torch.randn(volume.shape, generator=torch.Generator().manual_seed(seed))
    return volume + noise * volume.std() * random


def write(name: str, volume: torch.Tensor, *, origin=ORIGIN) -> str:
    write_mrc(name, volume.numpy(), pixel_size=PIXEL, origin=origin, stack=False)
    return name


def displace(vector: tuple[float, float, float], shift: tuple[float, float, float]) -> str:
    file = read_model_file("model.pdb")
    centre = file.model.positions.mean(0)
    rotation = from_rotation_vector(torch.tensor(vector, dtype=torch.float64)).numpy()
    file.write(Path("displaced.cif"), rotation=rotation, shift=centre + shift - rotation @ centre, columns={})
    return "displaced.cif"


def apart(one: str | Path, other: str | Path) -> float:
    first, second = (read_model_file(each).model.positions for each in (one, other))
    return float(np.sqrt(np.square(first - second).sum(1).mean()))


def test_a_model_in_its_own_map(project):
    job = project.run(FitStep(map=write("map.mrc", made()), model="model.pdb", resolution=3.0))
    star = read_star(job.outputs["table"])
    general, atoms, residues = star["general"], star["atoms"], star["residues"]
    fitted = read_model_file(job.outputs["model"])
    assert apart("model.pdb", job.outputs["model"]) < 1e-6
    assert set(fitted.model.b_factors.tolist()) == {20.0}
    assert general["hmFitMoved"] == 0
    assert "places" not in star
    assert general["hmMapModelResolutionHalf"] == pytest.approx(2 * PIXEL, rel=0.05)
    assert (star["fsc"]["rlnFourierShellCorrelationMaskedMaps"][1:18] > 0.99).all()
    # As they are written in the table of atoms, in the tables, and for ChimeraX.
    stored = fitted.document.sole_block().find_values("_atom_site.Q_score")
    np.testing.assert_allclose([float(each) for each in stored], atoms["hmQScore"], atol=6e-4)
    by_residue = atoms["hmQScore"].to_numpy().reshape(-1, 5).mean(1)
    np.testing.assert_allclose(residues["hmQScore"], by_residue, atol=1e-4)
    assert general["hmQScore"] == pytest.approx(float(atoms["hmQScore"].mean()), abs=1e-4)
    # Of a map to 2.2 Å, without noise.
    assert general["hmQScore"] > residues["hmQScoreExpected"].mean()
    lines = job.outputs["attributes"].read_text().splitlines()
    assert lines[3] == f"\t/A:1@N\t{atoms['hmQScore'][0]:.4f}"
    assert len(lines) == 3 + len(atoms)
    np.testing.assert_allclose(residues["hmQScoreExpected"], -0.1775 * 3.0 + 1.1192, atol=1e-6)
    assert residues["hmMapModelCorrelation"].min() > 0.98
    assert "hmFscQ" not in residues.columns
    assert residues["hmResidueNumber"].to_list() == list(range(1, 25))
    assert star["chains"]["hmAtoms"].to_list() == [120]
    assert read_header(job.outputs["map"]).origin == pytest.approx(ORIGIN)
    np.testing.assert_allclose(read_mrc(job.outputs["map"]), made().numpy(), atol=0.05 * float(made().max()))
    script = job.outputs["colours"].read_text()
    assert re.search(r'open "\.\./\.\./map\.mrc" id 2\n', script)
    for name in ("fsc", "residues", "slices"):
        assert job.outputs[name].stat().st_size > 5000


def test_the_number_of_the_first_voxel_is_as_good_as_an_origin(project):
    one = project.run(FitStep(map=write("map.mrc", made()), model="model.pdb"))
    write("start.mrc", made(), origin=(0.0, 0.0, 0.0))
    with mrcfile.open("start.mrc", "r+") as mrc:
        mrc.header.nxstart, mrc.header.nystart, mrc.header.nzstart = (round(each / PIXEL) for each in ORIGIN)
    two = project.run(FitStep(map="start.mrc", model="model.pdb"))
    scores = [read_star(job.outputs["table"])["atoms"]["hmQScore"].to_numpy() for job in (one, two)]
    np.testing.assert_allclose(scores[0], scores[1], atol=2e-3)


def test_a_displaced_model_comes_back_and_says_from_where(project):
    given = displace((30.0, -35.0, 10.0), (6.0, -8.0, 7.0))
    name = write("map.mrc", noisy(made(), 1, 0.5))
    job = project.run(FitStep(map=name, model=given, search="local"))
    assert apart("model.pdb", job.outputs["model"]) < 0.3
    star = read_star(job.outputs["table"])
    assert star["general"]["hmFitMoved"] == pytest.approx(apart(given, "model.pdb"), abs=0.3)
    best = star["places"].row(0, named=True)
    assert best["hmPlaceAngle"] == pytest.approx(np.linalg.norm([30, 35, 10]), abs=2.0)
    assert best["hmPlaceShift"] == pytest.approx(np.linalg.norm([6, 8, 7]), abs=0.3)
    matrix = np.array([float(each) for each in best["hmPlaceMatrix"].strip("[]").split(",")]).reshape(3, 4)
    start, end = (read_model_file(each).model.positions for each in (given, job.outputs["model"]))
    np.testing.assert_allclose(start @ matrix[:, :3].T + matrix[:, 3], end, atol=2e-3)


def test_fsc_q_is_above_zero_where_the_model_is_wrong(project):
    """Four residues are 3 Å beside their density, which the half maps know well."""
    truth = made(blur=0.0)
    names = [write(f"half{i}.mrc", noisy(truth, i, 0.3)) for i in (1, 2)]
    text = Path("model.pdb").read_text().splitlines()
    for i in range(SHIFTED.start, SHIFTED.stop):
        text[i] = f"{text[i][:46]}{float(text[i][46:54]) + 3.0:8.3f}{text[i][54:]}"
    Path("wrong.pdb").write_text("\n".join(text) + "\n")
    job = project.run(FitStep(map=write("map.mrc", truth), model="wrong.pdb", half1=names[0]))
    star = read_star(job.outputs["table"])
    residues = star["residues"]
    wrong = residues["hmResidueNumber"].is_in(range(9, 13)).to_numpy()
    away = residues["hmResidueNumber"].is_in([*range(1, 6), *range(16, 25)]).to_numpy()
    found = residues["hmFscQ"].to_numpy()
    assert found[wrong].min() > 1.0
    assert np.median(np.abs(found[away])) < 0.5
    assert residues["hmQScore"].to_numpy()[wrong].max() < 0.6
    difference = residues["hmMapModelLocalResolution"] - residues["hmHalfMapsLocalResolution"]
    np.testing.assert_allclose(found, difference, atol=1e-6)
    assert star["general"]["rlnFinalResolution"] < 4.0
    assert "half maps" in str(star["general"]["hmResolutionSource"])


def test_atoms_outside_have_no_scores(project):
    model = read_model_file("model.pdb").model
    beyond = model.positions[:, 0] > CENTRE[0]
    volume = made()[:, :, : int((CENTRE[0] - ORIGIN[0]) / PIXEL) + 1]
    job = project.run(FitStep(map=write("part.mrc", volume), model="model.pdb"))
    star = read_star(job.outputs["table"])
    assert star["general"]["hmAtomsOutside"] == pytest.approx(int(beyond.sum()), abs=6)
    outside = model.positions[:, 0] > CENTRE[0] + PIXEL
    assert star["atoms"]["hmQScore"].is_nan().to_numpy()[outside].all()


def test_a_map_without_the_model_is_warned_of(project, caplog):
    volume = made()
    project.run(FitStep(map=write("map.mrc", volume.max() - volume), model="model.pdb"))
    assert "little density at the model's atoms" in caplog.text


def test_what_cannot_be_done_says_so(project):
    name, model = write("map.mrc", made()), "model.pdb"
    far = displace((0.0, 0.0, 0.0), (100.0, 0.0, 0.0))
    for search in ("none", "local"):
        with pytest.raises(ParameterError, match=r"outside the map, which goes from \(-11.0, 22.0, 55.0\)"):
            project.run(FitStep(map=name, model=far, search=search))
    halves = [noisy(made(), seed, 1.0)[4:-4, 4:-4, 4:-4] for seed in (1, 2)]
    for number, half in enumerate(halves, 1):
        write(f"half{number}.mrc", half)
    with pytest.raises(ShapeError, match=r"has 32³ voxels of 1\.1 Å, but .* 40 × 40 × 40"):
        project.run(FitStep(map=name, model=model, half1="half1.mrc"))
    with pytest.raises(ShapeError, match="the mask has 32 × 32 × 32"):
        project.run(FitStep(map=name, model=model, mask="half1.mrc"))
    with pytest.raises(ParameterError, match="is no mask"):
        project.run(FitStep(map=name, model=model, mask=write("large.mrc", 7 * made())))
    with mrcfile.open(write("none.mrc", made()), "r+") as mrc:
        mrc.voxel_size = 0.0
    with pytest.raises(FileFormatError, match="states no voxel size"):
        project.run(FitStep(map="none.mrc", model=model))
    Path("empty.pdb").write_text("REMARK nothing\nEND\n")
    with pytest.raises(FileFormatError, match="holds no atoms"):
        project.run(FitStep(map=name, model="empty.pdb"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"half2": "b.mrc"}, "first half map"),
        ({"max_shift": 5.0}, "--max-shift is of --search local"),
        ({"search": "global", "max_angle": 5.0}, "--max-angle is of --search local"),
        ({"detail": 8.0}, "there is none"),
    ],
)
def test_options_that_would_do_nothing_are_refused(values, message):
    with pytest.raises(ParameterError, match=message):
        FitStep(map="a.mrc", model="a.pdb", **values)


def test_q_scores_are_of_the_width_asked_for(project):
    name = write("map.mrc", made())
    jobs = [project.run(FitStep(map=name, model="model.pdb", sigma=sigma)) for sigma in (0.6, 0.4)]
    means = [read_star(job.outputs["table"])["general"]["hmQScore"] for job in jobs]
    assert means[1] < means[0] - 0.02


def test_the_scale_of_the_map_is_the_models(project):
    """The model's map is closest to a map of another scale and blur."""
    truth = made(blur=150.0)
    job = project.run(FitStep(map=write("map.mrc", 37 * truth), model="model.pdb"))
    inside = read_mrc(job.outputs["mask"]) > 0.5
    found = read_mrc(job.outputs["map"])[inside]
    wanted = 37 * truth.numpy()[inside]
    assert np.abs(found - wanted).mean() < 0.02 * wanted.max()
