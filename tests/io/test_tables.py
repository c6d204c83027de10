"""Particles, micrographs and movies from files of every age, and back."""

from __future__ import annotations

import math

import polars as pl
import pytest

from halfmap.data import MicrographSet, MovieSet, ParticleSet
from halfmap.errors import FileFormatError, TableError
from halfmap.io.star import read_star, write_star
from halfmap.io.tables import (
    read_micrographs,
    read_movies,
    read_particles,
    write_micrographs,
    write_movies,
    write_particles,
)

PARTICLE_FILES = {
    "metadata/cryodrgn-cs-star/relion5.star": (17, 1, 0.89),
    "metadata/cryodrgn-cs-star/relion31.6opticsgroups.star": (139, 6, None),
    "metadata/cryodrgn-cs-star/empiar_10076_7.star": (7, 1, 5e4 / 38168),
    "metadata/cryodrgn-cs-star/FinalRefinement-OriginalParticles-PfCRT.star": (5, 1, 1.035),
    "metadata/topaz-empiar10025-star/particles.star": (1500, 1, 3.733333e4 / 38023),
    "metadata/relion-tutorial-empiar10017-star/ap_s_c2d.star": (8915, 1, 14e4 / 39548),
    "metadata/relion-tutorial-empiar10017-star/relion_ap_s_c2d_red.star": (9, 1, 14e4 / 39548),
    "particles/cryodrgn-relion31-filament5/relion31.star": (5, 1, 2.806),
    "particles/aspire-sample17/sample_particles_relion30.star": (17, 2, None),
    "particles/aspire-sample17/sample_particles_relion31.star": (17, 2, 1.4),
}


@pytest.mark.parametrize("name", PARTICLE_FILES)
def test_real_particles(shared_data, tmp_path, name):
    n, n_groups, pixel_size = PARTICLE_FILES[name]
    particles = read_particles(shared_data / name)
    assert len(particles) == n
    assert particles.optics.height == n_groups
    if pixel_size is not None:
        assert particles.pixel_size == pytest.approx(pixel_size, rel=1e-12)
    write_particles(tmp_path / "copy.star", particles)
    copy = read_particles(tmp_path / "copy.star")
    assert copy.optics.equals(particles.optics)
    assert copy.rows.equals(particles.rows)


@pytest.mark.parametrize("name", [name for name in PARTICLE_FILES if "relion31" not in name])
def test_nothing_of_an_old_file_is_lost(shared_data, name):
    """Every value of the file is in the rows or in their optics groups, origins in Å instead of pixels."""
    blocks = read_star(shared_data / name)
    original = next(block for label, block in blocks.items() if label != "optics")
    particles = read_particles(shared_data / name)
    for label in original.columns:
        if label in ("rlnOriginX", "rlnOriginY") and "optics" not in blocks:
            in_pixels = particles.rows[f"{label}Angst"] / particles.column("rlnImagePixelSize")
            assert (in_pixels - original[label]).abs().max() < 1e-9
        else:
            assert particles.column(label).equals(original[label]), label


def test_real_micrographs(shared_data, tmp_path):
    micrographs = read_micrographs(shared_data / "metadata/topaz-empiar10025-star/ctf_params.star")
    assert len(micrographs) == 30
    assert micrographs.pixel_size == pytest.approx(2.5e4 / 38023)
    write_micrographs(tmp_path / "copy.star", micrographs)
    assert list(read_star(tmp_path / "copy.star")) == ["optics", "micrographs"]
    assert read_micrographs(tmp_path / "copy.star").rows.equals(micrographs.rows)


def test_movies(tmp_path):
    optics = pl.DataFrame({"rlnOpticsGroup": [1], "rlnMicrographOriginalPixelSize": [0.8]})
    rows = pl.DataFrame({"rlnMicrographMovieName": ["a b.tif"], "rlnOpticsGroup": [1]})
    write_movies(tmp_path / "movies.star", MovieSet(optics, rows), comment="simulated")
    movies = read_movies(tmp_path / "movies.star")
    assert movies.pixel_size == 0.8
    assert movies.rows.equals(rows)
    assert movies.path == tmp_path / "movies.star"


def test_optics_written_as_keys(tmp_path):
    rows = pl.DataFrame({"rlnImageName": ["1@a.mrcs"], "rlnOpticsGroup": [1]})
    write_star(tmp_path / "a.star", {"optics": {"rlnOpticsGroup": 1, "rlnVoltage": 300.0}, "particles": rows})
    assert read_particles(tmp_path / "a.star").column("rlnVoltage").to_list() == [300.0]


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (read_micrographs, "metadata/cryodrgn-cs-star/relion5.star"),
        (read_micrographs, "metadata/topaz-empiar10025-star/particles.star"),
        (read_particles, "metadata/topaz-empiar10025-star/ctf_params.star"),
        (read_particles, "micrographs/contaminated_ucsf/Ucsf_stack_1142_DW_autopick.star"),
        (read_movies, "metadata/cryodrgn-cs-star/relion5.star"),
    ],
)
def test_files_of_other_things(shared_data, read, name):
    with pytest.raises(TableError, match="is it the right file"):
        read(shared_data / name)


def test_errors_name_file_and_row(tmp_path):
    optics = pl.DataFrame({"rlnOpticsGroup": [1], "rlnImagePixelSize": [math.nan]})
    rows = pl.DataFrame({"rlnImageName": ["1@a.mrcs", "2@a.mrcs"], "rlnOpticsGroup": [1, 2]})
    path = tmp_path / "particles.star"
    write_star(path, {"optics": optics, "particles": rows})
    with pytest.raises(TableError, match="_rlnImagePixelSize of optics group 1 is nan") as caught:
        read_particles(path)
    assert (caught.value.path, caught.value.row) == (path, 1)
    write_star(path, {"optics": optics.with_columns(rlnImagePixelSize=1.0), "particles": rows})
    with pytest.raises(TableError, match="optics group 2 is missing") as caught:
        read_particles(path)
    assert (caught.value.path, caught.value.row) == (path, 2)
    write_star(path, {"optics": optics, "particles": rows.clear()})
    with pytest.raises(TableError, match="no particles"):
        read_particles(path)


def test_wrong_suffix(tmp_path):
    rows = pl.DataFrame({"rlnMicrographName": ["a.mrc"], "rlnOpticsGroup": [1]})
    micrographs = MicrographSet(pl.DataFrame({"rlnOpticsGroup": [1]}), rows)
    with pytest.raises(FileFormatError, match="written as STAR"):
        write_micrographs(tmp_path / "micrographs.csv", micrographs)


def test_cryosparc_by_suffix(shared_data, tmp_path):
    path = shared_data / "particles/cryodrgn-empiar10076-7/empiar_10076_7.cs"
    particles = read_particles(path)
    assert isinstance(particles, ParticleSet)
    write_particles(tmp_path / "copy.cs", particles)
    assert read_particles(tmp_path / "copy.cs").rows.equals(particles.rows)
    with pytest.raises(TableError, match="holds particles, not micrographs"):
        read_micrographs(path)


@pytest.mark.parametrize(
    "labels",
    [
        ("rlnMicrographName", "rlnMicrographCoordinates"),
        ("rlnMicrographName", "rlnCoordinateX"),
        ("rlnCoordinateX", "rlnCoordinateY"),
    ],
)
def test_coordinates_are_told_from_micrographs(tmp_path, labels):
    rows = pl.DataFrame({label: ["1"] for label in labels})
    write_star(tmp_path / "picks.star", {"coordinate_files": rows})
    with pytest.raises(TableError, match=r"picks\.star: holds coordinates, not micrographs; give the table"):
        read_micrographs(tmp_path / "picks.star")
