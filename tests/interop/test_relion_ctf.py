"""RELION reads the micrographs with their CTFs, and gives the particles that it extracts their values."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from halfmap.data import MicrographSet
from halfmap.engine import Context
from halfmap.io.mrc import write_mrc
from halfmap.io.star import read_star, write_star
from halfmap.io.tables import read_micrographs, read_particles, write_micrographs
from halfmap.ops.ctf import ctf
from halfmap.steps.ctf.step import CtfStep

pytestmark = pytest.mark.relion

SIDE, PIXEL = 768, 1.4


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Two micrographs with Thon rings, their CTFs estimated in `ctf`."""
    if not shutil.which("relion_preprocess"):
        pytest.skip("Debian's relion package is not installed")
    folder = tmp_path_factory.mktemp("relion") / "project"
    (folder / "Images").mkdir(parents=True)
    (folder / "ctf").mkdir()
    rng, names = np.random.default_rng(1), []
    for defocus in (9_000.0, 14_000.0):
        names.append(f"Images/{defocus:.0f}.mrc")
        values = ctf(
            (SIDE, SIDE),
            pixel_size=PIXEL,
            defocus_u=defocus + 150,
            defocus_v=defocus - 150,
            defocus_angle=30.0,
            voltage_kV=300.0,
            cs_mm=2.7,
            amplitude_contrast=0.1,
        ).numpy()
        noise = np.fft.rfft2(rng.normal(size=(SIDE, SIDE)))
        image = 40 + np.fft.irfft2(noise * np.sqrt(0.5 + values**2), s=(SIDE, SIDE))
        write_mrc(folder / names[-1], image.astype(np.float32), pixel_size=PIXEL)
    optics = {"rlnOpticsGroupName": "one", "rlnOpticsGroup": 1, "rlnMicrographPixelSize": PIXEL}
    optics |= {"rlnVoltage": 300.0, "rlnSphericalAberration": 2.7, "rlnAmplitudeContrast": 0.1}
    rows = pl.DataFrame({"rlnMicrographName": names, "rlnOpticsGroup": 1})
    write_micrographs(folder / "micrographs.star", MicrographSet(pl.DataFrame(optics), rows))
    step = CtfStep(micrographs=Path("micrographs.star"), fit_thickness=True)
    step.run(Context(folder=folder / "ctf", project=folder))
    return folder


def _relion(folder: Path, *words: str) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_relion_keeps_every_column_and_row(project):
    table = "ctf/micrographs_ctf.star"
    _relion(project, "relion_star_handler", "--i", table, "--o", "again.star")
    ours, theirs = (read_micrographs(project / name) for name in (table, "again.star"))
    assert theirs.rows["rlnMicrographName"].to_list() == ours.rows["rlnMicrographName"].to_list()
    for label in ours.rows.columns:
        if label.startswith("rln") and ours.rows[label].dtype.is_float():
            np.testing.assert_allclose(theirs.rows[label], ours.rows[label], rtol=1e-5, atol=1e-5)
    assert theirs.optics["rlnSphericalAberration"].to_list() == [2.7]


def test_relion_extracts_particles_with_our_defoci(project):
    (project / "Picks" / "Images").mkdir(parents=True)
    micrographs = read_micrographs(project / "ctf/micrographs_ctf.star").rows.to_dicts()
    for row in micrographs:
        coordinates = {"rlnCoordinateX": [200.0, 400.0, 600.0], "rlnCoordinateY": [300.0, 350.0, 500.0]}
        stem = Path(row["rlnMicrographName"]).stem
        write_star(project / f"Picks/Images/{stem}_pick.star", {"": pl.DataFrame(coordinates)})
    words = "relion_preprocess --i ctf/micrographs_ctf.star --coord_dir Picks/ --coord_suffix _pick.star"
    words += " --part_star particles.star --part_dir Extract/ --extract --extract_size 64"
    _relion(project, *words.split())
    particles = read_particles(project / "particles.star")
    assert len(particles.rows) == 6
    for row in micrographs:
        mine = particles.rows.filter(pl.col("rlnMicrographName") == row["rlnMicrographName"])
        assert len(mine) == 3
        for label in ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"):
            np.testing.assert_allclose(mine[label], row[label], rtol=1e-5)
        truth = float(Path(row["rlnMicrographName"]).stem)
        mean = (row["rlnDefocusU"] + row["rlnDefocusV"]) / 2
        assert abs(mean - truth) < 5 * row["hmDefocusUncertainty"]
        assert math.isfinite(row["hmCtfCsUncertainty"])


def test_relion_finds_the_picture_of_the_fit(project):
    image = read_micrographs(project / "ctf/micrographs_ctf.star").rows["rlnCtfImage"][0]
    header = _relion(project, "relion_image_handler", "--i", image, "--stats")
    assert "512 x 512" in header
    assert "optics" in read_star(project / "ctf/micrographs_ctf.star")
