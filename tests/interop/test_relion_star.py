"""RELION reads the STAR files we write, and we read those it writes, with equal values."""

from __future__ import annotations

import subprocess

import numpy as np
import polars as pl
import pytest

from halfmap.data import ParticleSet
from halfmap.data.columns import parse_vector
from halfmap.io.tables import read_particles, write_particles

pytestmark = pytest.mark.relion


def star_handler(*arguments: str) -> None:
    command = ["relion_star_handler", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def particles() -> ParticleSet:
    rng = np.random.default_rng(0)
    n = 50
    optics = pl.DataFrame(
        {
            "rlnOpticsGroup": [1, 2],
            "rlnOpticsGroupName": ["first group", "second"],
            "rlnVoltage": [300.0, 200.0],
            "rlnSphericalAberration": [2.7, 0.01],
            "rlnAmplitudeContrast": [0.1, 0.07],
            "rlnImagePixelSize": [1.06, 1.345],
            "rlnImageSize": [64, 128],
            "rlnImageDimensionality": [2, 2],
            "rlnCtfDataAreCtfPremultiplied": [False, True],
            "rlnOddZernike": ["[0.1,-0.2,3]", "[0,0,0]"],
        }
    )
    names = ["01", "1e5", "nan", 'a "b" c', "it's", "'q", '"', "x y  z"]
    rows = pl.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@Extract/job 003/stack.mrcs" for i in range(n)],
            "rlnMicrographName": [names[i % len(names)] for i in range(n)],
            "rlnOpticsGroup": rng.choice([1, 2], n),
            "rlnCoordinateX": rng.uniform(0, 4000, n).round(2),
            "rlnDefocusU": rng.uniform(1e4, 2e4, n),
            "rlnAngleRot": rng.uniform(-180, 180, n),
            "rlnLogLikeliContribution": rng.normal(0, 1e7, n),
            "rlnOriginXAngst": rng.normal(0, 1e-4, n),
            "rlnClassNumber": rng.integers(1, 5, n),
            "rlnRandomSubset": rng.choice([1, 2], n),
            "rlnAnglePsiFlip": rng.choice([True, False], n),
            "hmPoseUncertainty": rng.uniform(0, 1, n),
        }
    )
    return ParticleSet(optics, rows)


def assert_equal(found: pl.DataFrame, expected: pl.DataFrame) -> None:
    """Equal to the digits RELION prints: 12 characters, that is five after the point or the first digit."""
    assert set(found.columns) == set(expected.columns)
    for label in expected.columns:
        if label == "rlnOddZernike":
            assert [parse_vector(t) for t in found[label]] == [parse_vector(t) for t in expected[label]]
        elif expected[label].dtype == pl.Float64:
            np.testing.assert_allclose(found[label], expected[label], rtol=5e-6, atol=5e-6, err_msg=label)
        else:
            assert found[label].to_list() == expected[label].to_list(), label


def test_select(particles, tmp_path):
    ours, theirs = tmp_path / "ours.star", tmp_path / "theirs.star"
    write_particles(ours, particles)
    star_handler("--i", str(ours), "--o", str(theirs), "--select", "rlnClassNumber", "--minval", "2")
    found = read_particles(theirs)
    expected = particles.select(pl.col("rlnClassNumber") >= 2)
    assert 0 < len(expected) < len(particles)
    # Repeated spaces within a quoted string become one in RELION.
    names = expected.rows["rlnMicrographName"].str.replace("  ", " ", literal=True)
    assert_equal(found.optics, expected.optics)
    assert_equal(found.rows, expected.rows.with_columns(names))


def test_combine(particles, tmp_path):
    first = particles.select(pl.col("rlnRandomSubset") == 1)
    second = particles.select(pl.col("rlnRandomSubset") == 2)
    paths = [tmp_path / "first.star", tmp_path / "second.star"]
    for path, part in zip(paths, (first, second), strict=True):
        write_particles(path, part)
    star_handler("--i", " ".join(map(str, paths)), "--combine", "--o", str(tmp_path / "both.star"))
    found = read_particles(tmp_path / "both.star")
    expected = pl.concat([first.rows, second.rows])
    assert found.rows["rlnImageName"].to_list() == expected["rlnImageName"].to_list()
    np.testing.assert_allclose(found.rows["rlnDefocusU"], expected["rlnDefocusU"], rtol=5e-6)
    voltages = pl.concat([first.column("rlnVoltage"), second.column("rlnVoltage")])
    assert found.column("rlnVoltage").to_list() == voltages.to_list()


@pytest.mark.parametrize("name", ["relion5.star", "relion31.6opticsgroups.star"])
def test_same_file_directly_and_through_relion(shared_data, tmp_path, name):
    path = shared_data / "metadata/cryodrgn-cs-star" / name
    direct = read_particles(path)
    write_particles(tmp_path / "ours.star", direct)
    for source in (path, tmp_path / "ours.star"):
        theirs = tmp_path / "theirs.star"
        star_handler("--i", str(source), "--o", str(theirs), "--select", "rlnOpticsGroup", "--minval", "0")
        found = read_particles(theirs)
        for label in ("rlnOddZernike", "rlnEvenZernike"):
            for mine, other in zip(direct.optics[label], found.optics[label], strict=True):
                np.testing.assert_allclose(parse_vector(other), parse_vector(mine), rtol=5e-6)
        vectors = ("rlnOddZernike", "rlnEvenZernike")
        assert_equal(found.optics.drop(vectors), direct.optics.drop(vectors))
        assert_equal(found.rows, direct.rows)
