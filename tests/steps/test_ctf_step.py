"""The step `ctf` from table to table."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from matplotlib.axes import Axes

from halfmap.data import MicrographSet
from halfmap.data.columns import COLUMNS
from halfmap.data.defocus import DefocusSurface
from halfmap.errors import HalfmapError, TableError
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_micrographs, write_micrographs
from halfmap.project import Project
from halfmap.steps.ctf import pictures
from halfmap.steps.ctf.average import Optics
from halfmap.steps.ctf.micrograph import MicrographItem
from halfmap.steps.ctf.step import CtfStep
from halfmap.steps.ctf.tables import relative_thickness, tell, warn_of_rings


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


def test_a_table_gets_its_ctfs_and_useless_micrographs_are_named(project, caplog):
    caplog.set_level("INFO", "halfmap")
    job = Project.open(project).run(CtfStep(micrographs="micrographs.star"))
    table = read_micrographs(job.folder / "micrographs_ctf.star")
    assert table.rows["rlnMicrographName"].to_list() == ["Images/a.mrc", "Images/c.mrc"]
    assert table.rows["someOtherColumn"].to_list() == [7, 9]
    failed = read_star(job.folder / "failures.star")
    assert "b.mrc" in str(failed)
    assert any(said.endswith("1 without Thon rings; 1 failed") for said in caplog.messages)
    good, noise = table.rows.to_dicts()
    assert good["hmCtfProblem"] == "none"
    assert noise["hmCtfProblem"] == "no Thon rings"
    # Of a defocus that only the range of the search is known of.
    assert noise["hmDefocusUncertainty"] == pytest.approx(47_000 / math.sqrt(12), rel=1e-5)
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
    # A project may be moved between a kill and the resumption.
    assert str(project) not in (job.folder / "items.jsonl").read_text()
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


def test_an_amplitude_contrast_in_per_cent_is_refused(project):
    table = read_micrographs(project / "micrographs.star")
    optics = table.optics.with_columns(rlnAmplitudeContrast=pl.lit(10.0))
    write_micrographs(project / "broken.star", MicrographSet(optics, table.rows))
    with pytest.raises(HalfmapError, match="rlnAmplitudeContrast 10"):
        Project.open(project).run(CtfStep(micrographs="broken.star"))


def test_a_micrograph_named_twice_is_refused(project):
    table = read_micrographs(project / "micrographs.star")
    rows = pl.concat([table.rows, table.rows[:1]])
    write_micrographs(project / "broken.star", MicrographSet(table.optics, rows))
    with pytest.raises(HalfmapError, match=r"row 4: lists Images/a\.mrc again"):
        Project.open(project).run(CtfStep(micrographs="broken.star"))


def test_an_empty_range_of_defocus_is_refused(project):
    step = CtfStep(micrographs="micrographs.star", defocus_min=9_000.0, defocus_max=9_000.0)
    with pytest.raises(HalfmapError, match="not below"):
        Project.open(project).run(step)


def test_a_small_micrograph_does_not_take_the_tilt_from_the_others(project):
    rng = np.random.default_rng(2)
    write_mrc(project / "Images" / "a.mrc", _rings(rng, 9_000)[:300, :300], pixel_size=1.4)
    image = _rings(rng, 9_000)
    image[0, 0] = np.nan
    write_mrc(project / "Images" / "b.mrc", image, pixel_size=1.4)
    job = Project.open(project).run(CtfStep(micrographs="micrographs.star", pictures=False))
    small, large, _ = read_micrographs(job.folder / "micrographs_ctf.star").rows.to_dicts()
    assert math.isnan(small["rlnMicrographTiltAngle"])
    assert large["rlnMicrographTiltAngle"] < 5 * large["hmTiltUncertainty"]
    # One pixel that is not a number does not make the intensity one.
    assert abs(large["hmIceThicknessRelative"]) < 0.1


def test_cs_is_fitted_for_every_optics_group_that_has_rings(project):
    rng = np.random.default_rng(3)
    write_mrc(project / "Images" / "b.mrc", _rings(rng, 14_000), pixel_size=1.4)
    table = read_micrographs(project / "micrographs.star")
    groups = {"rlnOpticsGroup": [1, 2], "rlnOpticsGroupName": ["one", "two"]}
    optics = pl.concat([table.optics, table.optics]).with_columns(
        *(pl.Series(label, values) for label, values in groups.items()),
        rlnSphericalAberration=pl.Series([2.0, 1.3]),
    )
    rows = table.rows.with_columns(rlnOpticsGroup=pl.Series([1, 1, 2]))
    write_micrographs(project / "wrong.star", MicrographSet(optics, rows))
    job = Project.open(project).run(CtfStep(micrographs="wrong.star", fit_cs=True, pictures=False))
    found = read_micrographs(job.folder / "micrographs_ctf.star")
    cs = found.optics["rlnSphericalAberration"].to_list()
    first, second, noise = found.rows.to_dicts()
    errors = np.array([row["hmCtfCsUncertainty"] for row in (first, second)])
    error = float((errors**-2.0).sum() ** -0.5)
    assert error < 0.15
    assert abs(cs[0] - 2.7) < 4 * error
    # Noise has no Cs: the stated one stays.
    assert cs[1] == 1.3
    assert noise["hmCtfProblem"] == "no Thon rings"
    for row, truth in ((first, 9_000), (second, 14_000)):
        assert row["hmCtfProblem"] == "none"
        mean = (row["rlnDefocusU"] + row["rlnDefocusV"]) / 2
        # What is wrong with Cs the defocus makes up for, the more the larger the error of Cs.
        assert abs(mean - truth) < 5 * row["hmDefocusUncertainty"] + 100 * error


def test_a_wrong_pixel_size_is_suspected_where_most_have_no_rings(caplog):
    optics = Optics(voltage_kV=300, cs_mm=2.7, amplitude_contrast=0.1)
    items = [
        MicrographItem(str(i), str(i), Path(str(i)), pixel, optics, group, None)
        for i, (group, pixel) in enumerate([(1, 0.15)] * 3 + [(2, 1.5)] * 2)
    ]
    strengths = [4, 5, 60, 5, 70]
    done = [
        {"group": item.group, "hmCtfSignificance": strength}
        for item, strength in zip(items, strengths, strict=True)
    ]
    warn_of_rings(done, items, CtfStep(micrographs=Path("m.star")))
    [said] = caplog.messages
    assert said.startswith(
        "2 of 3 micrographs of optics group 1 have no Thon rings; are 0.15 Å/px and 300 kV right?"
    )
    assert "beyond 3000 to 50000 Å (--defocus-min, --defocus-max), a phase plate (--fit-phase-shift)" in said


def test_a_line_sums_up_what_was_found(caplog):
    caplog.set_level("INFO", "halfmap")
    columns = ("rlnDefocusU", "rlnDefocusV", "rlnCtfMaxResolution", "rlnCtfAstigmatism", "hmCtfSignificance")
    values = [
        (9_100, 8_900, 3.5, 200.0, 80),
        (12_200, 11_800, 4.0, 400.0, 70),
        (20_000, 19_900, 6.0, 100.0, 60),
        (40_000, 3_000, 30.0, 9_000.0, 4),
    ]
    done = [dict(zip(columns, row, strict=True)) for row in values]
    tell(done, 2)
    tell(done[-1:], 0)
    assert caplog.messages == [
        "4 micrographs: median defocus 1.20 µm, 0.90 to 2.00 µm; rings to 4.0 Å, astigmatism 200 Å "
        "(medians); 1 without Thon rings; 2 failed",
        "1 micrograph; 1 without Thon rings; none failed",
    ]


def test_errors_are_drawn_with_what_they_belong_to(tmp_path, monkeypatch):
    said, bars = [], []
    monkeypatch.setattr(pictures, "add_text", lambda figure, x, y, text, **style: said.append(text))
    monkeypatch.setattr(Axes, "vlines", lambda *given, **style: bars.append(given[2:]))
    common = {"hmCtfProblem": "none", "rlnDefocusU": 9_000.0, "rlnDefocusV": 9_000.0}
    tilts = [{"rlnMicrographTiltAngle": t, "hmTiltUncertainty": e} for t, e in ((1.0, 0.8), (3.0, 0.4))]
    # A table of an older version has no error of Cs.
    pictures.draw_summary(tmp_path / "a.png", [common | {"hmCtfCs": 2.7} | tilt for tilt in tilts])
    assert "Tilt, median 2 °, each ± 0.6 °" in said
    assert "Cs at which the rings fit best, median 2.7 mm" in said
    low, high = bars[0]
    np.testing.assert_allclose((low, high), ([0.2, 2.6], [1.8, 3.4]))


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
