"""The step `ctf` from table to table."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest

from halfmap.data import MicrographSet
from halfmap.data.columns import COLUMNS
from halfmap.data.defocus import DefocusSurface
from halfmap.errors import HalfmapError, TableError
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_micrographs, write_micrographs
from halfmap.project import Project
from halfmap.steps.ctf.step import CtfStep
from halfmap.steps.ctf.tables import relative_thickness


def _rings(rng: np.random.Generator, defocus: float, size: int = 768) -> np.ndarray:
    from halfmap.ops.ctf import ctf

    value = ctf(
        (size, size),
        pixel_size=1.4,
        defocus_u=defocus + 150,
        defocus_v=defocus - 150,
        defocus_angle=30.0,
        voltage_kV=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.1,
    ).numpy()
    noise = np.fft.rfft2(rng.normal(size=(size, size)))
    return 40 + np.fft.irfft2(noise * np.sqrt(0.5 + value**2), s=(size, size)).astype(np.float32)


@pytest.fixture
def project(tmp_path):
    rng = np.random.default_rng(1)
    folder = tmp_path / "Images"
    folder.mkdir()
    write_mrc(folder / "a.mrc", _rings(rng, 9_000), pixel_size=1.4)
    write_mrc(folder / "b.mrc", np.ones((768, 768), np.float32), pixel_size=1.4)
    write_mrc(folder / "c.mrc", 20 + rng.normal(size=(768, 768)).astype(np.float32), pixel_size=1.4)
    optics = pl.DataFrame(
        {
            "rlnOpticsGroup": [1],
            "rlnOpticsGroupName": ["one"],
            "rlnVoltage": [300.0],
            "rlnSphericalAberration": [2.7],
            "rlnAmplitudeContrast": [0.1],
            "rlnMicrographPixelSize": [1.4],
        }
    )
    rows = pl.DataFrame(
        {
            "rlnMicrographName": [f"Images/{name}.mrc" for name in "abc"],
            "rlnOpticsGroup": [1, 1, 1],
            "someOtherColumn": [7, 8, 9],
        }
    )
    write_micrographs(tmp_path / "micrographs.star", MicrographSet(optics, rows))
    return tmp_path


def test_a_table_gets_its_ctfs_and_useless_micrographs_are_named(project):
    job = Project.open(project).run(CtfStep(micrographs="micrographs.star"))
    table = read_micrographs(job.folder / "micrographs_ctf.star")
    assert table.rows["rlnMicrographName"].to_list() == ["Images/a.mrc", "Images/c.mrc"]
    assert table.rows["someOtherColumn"].to_list() == [7, 9]
    failed = read_star(job.folder / "failures.star")
    assert "b.mrc" in str(failed)
    good, noise = table.rows.to_dicts()
    assert good["hmCtfProblem"] == "none"
    assert noise["hmCtfProblem"] == "no Thon rings"
    assert abs((good["rlnDefocusU"] + good["rlnDefocusV"]) / 2 - 9_000) < 5 * good["hmDefocusUncertainty"]
    assert abs(good["rlnCtfAstigmatism"] - 300) < 5 * good["hmDefocusUUncertainty"] * math.sqrt(2)
    assert abs(good["rlnDefocusAngle"] - 30) < 5 * good["hmDefocusAngleUncertainty"]
    assert float(table.ctf.defocus_u[0]) == pytest.approx(good["rlnDefocusU"], rel=1e-6)
    ours = [label for label in table.rows.columns if label.startswith("hm")]
    assert set(ours) <= set(COLUMNS)
    name, kind = good["rlnCtfImage"].split(":")
    assert kind == "mrc"
    assert read_mrc(project / name).squeeze().shape == (512, 512)
    assert (job.folder / "Micrographs" / "a.png").stat().st_size > 10_000
    assert (job.folder / "summary.png").exists()
    # Ice that lets half the light through is ln 2 free paths thicker.
    assert noise["hmIceThicknessRelative"] - good["hmIceThicknessRelative"] == pytest.approx(
        math.log(2), abs=0.01
    )


def test_a_table_without_the_microscope_is_refused(project):
    table = read_micrographs(project / "micrographs.star")
    broken = MicrographSet(table.optics.drop("rlnSphericalAberration"), table.rows)
    write_micrographs(project / "broken.star", broken)
    with pytest.raises(HalfmapError, match="rlnSphericalAberration"):
        Project.open(project).run(CtfStep(micrographs="broken.star"))


def test_the_surface_of_a_row_is_evaluated_at_particles():
    surface = DefocusSurface(np.array([100.0, -50, 8, 6, 4]), (1000, 2000))
    row = surface.columns()
    assert row["hmDefocusSurface"] == "[100,-50,8,6,4]"
    again = DefocusSurface.of_row(row)
    x, y = np.array([0.0, 1500.0]), np.array([250.0, 1000.0])
    u, v = np.array([-1.0, 0.5]), np.array([-0.5, 1.0])
    expected = 100 * u - 50 * v + 8 * (u * u - 1 / 3) + 6 * u * v + 4 * (v * v - 1 / 3)
    np.testing.assert_allclose(again.at(x, y), expected)
    assert DefocusSurface.of_row({}).at(5.0, 7.0) == 0
    with pytest.raises(TableError, match="five numbers"):
        DefocusSurface.of_row({"hmDefocusSurface": "[1,2]", "hmMicrographHeight": 5, "hmMicrographWidth": 5})


def test_the_mean_of_a_surface_is_zero():
    surface = DefocusSurface(np.array([100.0, -50, 80, 60, 40]), (600, 800))
    y, x = np.mgrid[0:600:5, 0:800:5] + 2.5
    assert abs(surface.at(x, y).mean()) < 0.05


def test_relative_thickness_is_against_the_brightest_of_the_group():
    rows = [{"intensity": 100.0, "group": 1}] * 99 + [
        {"intensity": 50.0, "group": 1},
        {"intensity": 3.0, "group": 2},
    ]
    values = relative_thickness(rows)
    assert values[0] == 0
    assert values[99] == pytest.approx(math.log(2))
    assert values[100] == 0
