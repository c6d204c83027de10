"""Particles of `extract` beside those that RELION cuts at the same coordinates."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from halfmap.data import MicrographSet
from halfmap.io.coordinates import write_coordinates
from halfmap.io.images import ImageStack
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.star import read_star, write_star
from halfmap.io.tables import read_particles, write_micrographs, write_particles
from halfmap.ops.ctf import ctf
from halfmap.project import Project
from halfmap.steps.extract.images import PhaseFlip, Recipe, cut_particles
from halfmap.steps.extract.step import ExtractStep

pytestmark = pytest.mark.relion

SIDE, BOX, PIXEL, DIAMETER = 512, 96, 1.5, 90.0


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A micrograph of noise, disks, a ramp and dust, with picks between pixels and near to the edges."""
    folder = tmp_path_factory.mktemp("project")
    rng = np.random.default_rng(3)
    picks = np.concatenate(
        [rng.uniform(60, SIDE - 60, (20, 2)), [[33.7, 250.2], [470.4, 40.9], [200, 479.5]]]
    )
    y, x = np.mgrid[:SIDE, :SIDE]
    image = 40 + 0.01 * x - 0.02 * y + rng.normal(0, 4, (SIDE, SIDE))
    for px, py in picks:
        image -= 3 * np.exp(-((x - px) ** 2 + (y - py) ** 2) / 300)
    image[rng.integers(0, SIDE, 60), rng.integers(0, SIDE, 60)] += 100
    write_mrc(folder / "m.mrc", image.astype(np.float32), pixel_size=PIXEL)
    optics = pl.DataFrame(
        {
            "rlnOpticsGroup": [1],
            "rlnOpticsGroupName": ["one"],
            "rlnVoltage": [300.0],
            "rlnSphericalAberration": [2.7],
            "rlnAmplitudeContrast": [0.1],
            "rlnMicrographPixelSize": [PIXEL],
        }
    )
    rows = pl.DataFrame(
        {
            "rlnMicrographName": ["m.mrc"],
            "rlnOpticsGroup": [1],
            "rlnDefocusU": [12_500.0],
            "rlnDefocusV": [12_000.0],
            "rlnDefocusAngle": [30.0],
        }
    )
    write_micrographs(folder / "micrographs.star", MicrographSet(optics, rows))
    table = pl.DataFrame(picks, schema=["rlnCoordinateX", "rlnCoordinateY"])
    write_coordinates(folder / "m_pick.star", table)
    files = {"rlnMicrographName": ["m.mrc"], "rlnMicrographCoordinates": ["m_pick.star"]}
    write_star(folder / "coordinates.star", {"coordinate_files": pl.DataFrame(files)})
    return folder


def _relion(folder: Path, name: str, *words: str) -> np.ndarray:
    command = ["relion_preprocess", "--i", "micrographs.star", "--part_dir", f"{name}/"]
    command += ["--part_star", f"{name}.star", "--extract", "--extract_size", str(BOX), *words]
    if "--reextract_data_star" not in words:
        command += ["--coord_dir", "./", "--coord_suffix", "_pick.star"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return read_mrc(folder / name / "m.mrcs")


def _ours(folder: Path, **options) -> tuple[np.ndarray, pl.DataFrame]:
    values = {"coordinates": "coordinates.star", "box": BOX, "diameter": DIAMETER, "min_distance": 0}
    values |= {"background_diameter": DIAMETER, "edges": "repeat"}
    step = ExtractStep(micrographs=Path("micrographs.star"), **(values | options))  # type: ignore[arg-type]
    job = Project.at(folder).run(step)
    rows = read_particles(job.folder / "particles.star").rows
    stack = ImageStack(rows["rlnImageName"], root=folder)
    return stack.read(np.arange(len(stack))), rows


def _correlation(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    a, b = (images.reshape(len(images), -1).astype(float) for images in (ours, theirs))
    a, b = (images - images.mean(axis=1, keepdims=True) for images in (a, b))
    return (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))


def _without_nyquist(images: np.ndarray) -> np.ndarray:
    """The last row and column of the spectrum, where two waves are one, each program has in its own way."""
    spectra = np.fft.rfft2(images)
    spectra[:, images.shape[1] // 2] = 0
    spectra[..., -1] = 0
    return np.fft.irfft2(spectra, s=images.shape[1:])


def test_boxes_are_cut_at_the_same_pixels_with_the_same_edges(project):
    theirs = _relion(project, "cut")
    ours, rows = _ours(project, background="none", invert_contrast=False)
    np.testing.assert_array_equal(ours, theirs)
    exact = read_star(project / "cut.star")["particles"]
    place = rows["rlnCoordinateX"] - rows["rlnOriginXAngst"] / PIXEL
    np.testing.assert_allclose(place, exact["rlnCoordinateX"], atol=1e-4)


@pytest.mark.parametrize("scaled", [BOX, 48])
@pytest.mark.parametrize("background", ["ramp", "mean"])
def test_normalised_and_inverted_particles_are_the_same(project, background, scaled):
    name = f"{background}{scaled}"
    radius = DIAMETER / 2 / PIXEL * scaled / BOX
    words = ["--scale", str(scaled), "--norm", "--bg_radius", f"{radius:g}", "--invert_contrast"]
    theirs = _relion(project, name, *words, *(["--no_ramp"] if background == "mean" else []))
    ours, _ = _ours(project, background=background, scaled_box=scaled)
    assert _correlation(ours, theirs).min() > 0.99
    assert _correlation(_without_nyquist(ours), _without_nyquist(theirs)).min() > 0.9999
    # The same level and spread too, which a correlation does not see.
    assert np.abs(ours.mean(axis=(1, 2)) - theirs.mean(axis=(1, 2))).max() < 0.01
    np.testing.assert_allclose(ours.std(axis=(1, 2)), theirs.std(axis=(1, 2)), rtol=0.01)


def test_dust_is_removed_in_the_same_places(project):
    words = ["--norm", "--bg_radius", f"{DIAMETER / 2 / PIXEL:g}", "--white_dust", "5", "--black_dust", "5"]
    theirs = _relion(project, "dust", *words, "--invert_contrast")
    ours, _ = _ours(project, white_dust=5, black_dust=5)
    # What noise dust is replaced by is chance.
    assert _correlation(ours, theirs).min() > 0.99
    dusty, _ = _ours(project)
    assert _correlation(dusty, theirs).min() < 0.95
    assert np.abs(dusty).max() > 15 > 8 > np.abs(ours).max()


def test_phases_are_flipped_where_theirs_are(project):
    theirs = _relion(project, "flip", "--phase_flip")
    _, rows = _ours(project)
    image = read_mrc(project / "m.mrc", 0).astype(np.float32)
    values = ctf(
        (BOX, BOX),
        pixel_size=PIXEL,
        defocus_u=12_500.0,
        defocus_v=12_000.0,
        defocus_angle=30.0,
        voltage_kV=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.1,
    )
    # RELION flips within the box, where the step takes a larger one.
    flip = PhaseFlip(BOX, lambda chosen: torch.where(values < 0, -1.0, 1.0))
    recipe = Recipe(box=BOX, scaled_box=BOX, circle=0.6, background="none", invert=False, mirror=False)
    x, y = (rows[f"rlnCoordinate{axis}"].to_numpy().astype(int) for axis in "XY")
    ours = np.concatenate([images for images, _ in cut_particles(image, x, y, recipe, flip=flip)])
    inside = np.all((x >= BOX // 2, x <= SIDE - BOX // 2, y >= BOX // 2, y <= SIDE - BOX // 2), axis=0)
    assert inside.sum() == 20
    assert _correlation(_without_nyquist(ours), _without_nyquist(theirs))[inside].min() > 0.999


def test_refined_particles_are_recentred_the_same(project):
    _, rows = _ours(project)
    rng = np.random.default_rng(5)
    _relion(project, "before")
    particles = read_particles(project / "before.star")
    moved = particles.with_columns(
        *(pl.Series(f"rlnOrigin{axis}Angst", rng.normal(0, 6, len(rows))) for axis in "XY"),
        *(pl.Series(f"rlnAngle{name}", rng.uniform(-90, 90, len(rows))) for name in ("Rot", "Tilt", "Psi")),
    )
    write_particles(project / "refined.star", moved)
    theirs = _relion(project, "again", "--reextract_data_star", "refined.star", "--recenter")
    table = read_star(project / "again.star")["particles"]
    ours, rows = _ours(project, coordinates="refined.star", background="none", invert_contrast=False)
    assert len(ours) >= 20
    by_name = dict(zip(moved.rows["rlnImageName"], range(len(moved)), strict=True))
    index = [by_name[name] for name in rows["rlnImageOriginalName"]]
    np.testing.assert_array_equal(ours, theirs[index])
    for label in ("rlnOriginXAngst", "rlnOriginYAngst"):
        np.testing.assert_allclose(rows[label], table[label][index], atol=1e-3)
    assert rows["rlnAngleTilt"].to_list() == moved.rows["rlnAngleTilt"][index].to_list()
