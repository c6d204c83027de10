"""Simulated micrographs and scenes: Thon rings, tilt, decoys, contaminants, preferred views."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from halfmap.engine import Context, parse_step
from halfmap.errors import ParameterError
from halfmap.io.mrc import read_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_micrographs, read_particles
from halfmap.ops.ctf import ctf_1d
from halfmap.steps.simulate.scene import draw_scene, random_rotations
from halfmap.steps.simulate.specimen import Specimen
from halfmap.steps.simulate.step import SimulateMicrographs, SimulateMovies, SimulateParticles

SETTINGS = {
    "assembly": "none",
    "pixel_size": 2.0,
    "width": 256,
    "height": 256,
    "particles": 4,
    "contaminants": 0.0,
    "carbon": 0.0,
    "n_micrographs": 1,
    "seed": 3,
}


def simulate(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    step = SimulateMicrographs(**{**SETTINGS, **changes})
    step.run(Context(folder=folder, project=folder.parent))
    return folder


def specimen(**changes) -> Specimen:
    settings = {
        "folder": Path(),
        "box": 64,
        "pixel_size": 2.0,
        "fractions": (0.25, 0.75),
        "n_broken": 3,
        "diameter": 60.0,
    }
    return Specimen(**{**settings, **changes})


def scene(seed: int = 1, index: int = 0, **changes):
    settings = {**SETTINGS, "width": 2048, "height": 1024, "particles": 400, **changes}
    step = SimulateMicrographs(**settings)
    return draw_scene(index, step=step, specimen=specimen(), rng=np.random.default_rng(seed))


def radial_power(image: np.ndarray) -> np.ndarray:
    power = np.abs(np.fft.rfft2(image / image.mean() - 1)) ** 2 / image.size
    n = len(image)
    ring = np.rint(np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)) * n).astype(int)
    return np.bincount(ring.ravel(), power.ravel()) / np.bincount(ring.ravel())


def test_thon_rings_have_the_zeros_of_the_ctf(tmp_path):
    """Power of empty ice above shot noise follows the squared CTF over nine rings."""
    folder = simulate(
        tmp_path / "job001",
        width=768,
        height=768,
        particles=0,
        ice_noise=10.0,
        ice_thickness=20.0,
        ice_variation=0.0,
        dose=10.0,
        astigmatism=0.0,
        defocus_min=15000.0,
        defocus_max=15000.0,
    )
    power = radial_power(read_mrc(folder / "Micrographs/000001.mrc", 0))
    n = np.arange(20, 300)
    k = torch.tensor(n / 768 / 2.0)
    transfer = (
        ctf_1d(k, defocus=15000.0, voltage_kV=300.0, cs_mm=2.7, amplitude_contrast=0.1).square().numpy()
    )
    shot = 1 / (10 * 4 * 0.9 * np.exp(-20 / 4000))
    assert (transfer[1:-1] < np.minimum(transfer[:-2], transfer[2:])).sum() >= 9
    signal = power[n] - shot
    # At the zeros shot noise is what is left; a ring of radius r has an error of 1 / sqrt(pi r), here 0.04.
    assert abs(signal[transfer < 0.02].mean()) < 0.04 * signal[transfer > 0.9].mean()
    # What the power is besides the squared CTF varies slowly.
    local = np.convolve(signal, np.ones(31) / 31, "same") / np.convolve(transfer, np.ones(31) / 31, "same")
    middle = slice(15, -15)
    assert np.corrcoef((signal / local)[middle], transfer[middle])[0, 1] > 0.9


def test_all_files_are_there_and_halves_add_up(tmp_path):
    folder = simulate(
        tmp_path / "job001",
        n_micrographs=2,
        write_halves=True,
        write_clean=True,
        optics_groups=2,
        beam_tilt=0.4,
    )
    told = read_micrographs(folder / "micrographs.star")
    assert told.rows["rlnOpticsGroup"].to_list() == [1, 2]
    assert "rlnBeamTiltX" not in told.optics.columns
    row = told.rows.to_dicts()[0]
    whole, even, odd = (
        read_mrc(tmp_path / row[label], 0)
        for label in ("rlnMicrographName", "rlnMicrographNameEven", "rlnMicrographNameOdd")
    )
    assert np.array_equal(whole, even + odd)
    difference = (even - odd).var() / whole.mean()
    assert difference == pytest.approx(1, abs=4 * np.sqrt(2 / whole.size))
    truth = read_particles(folder / "truth_particles.star")
    assert np.allclose(truth.optics["rlnBeamTiltX"], [0.4, -0.4])
    assert truth.ctf.beam_tilt_mrad.abs().max() == pytest.approx(0.4)
    assert (
        read_micrographs(folder / "truth_micrographs.star").rows["rlnMicrographName"][0]
        == row["rlnMicrographName"]
    )
    assert (folder / "Truth/000002_clean.mrc").exists()
    assert (folder / "overview.png").exists()


def test_the_phase_object_makes_nearly_the_same_micrograph(tmp_path):
    weak, full = (
        read_mrc(
            simulate(tmp_path / model, image_model=model, write_clean=True, ice_variation=0.0)
            / "Truth/000001_clean.mrc",
            0,
        )
        for model in ("weak-phase", "phase-object")
    )
    contrast = weak.std()
    assert 0.002 * contrast < (weak - full).std() < 0.2 * contrast


def test_carbon_and_crystals_are_dark_and_listed(tmp_path):
    folder = simulate(
        tmp_path / "job001", carbon=1.0, contaminants=3.0, width=512, height=512, seed=4, write_clean=True
    )
    clean = read_mrc(folder / "Truth/000001_clean.mrc", 0)
    rows = read_star(folder / "truth_contaminants.star")["contaminants"].to_dicts()
    hole = next(row for row in rows if row["hmContaminant"] == "carbon outside")
    y, x = np.mgrid[:512, :512]
    away = np.hypot(x - hole["rlnCoordinateX"], y - hole["rlnCoordinateY"]) * 2.0 - hole["hmRadius"]
    carbon, free = clean[away > 100], np.median(clean[away < -150])
    assert carbon.size > 1000
    # exp(-2 * 0.1 * 0.7 rad - 120 / 1900) of the beam passes.
    assert 0.7 < carbon.mean() / free < 0.9
    crystals = [row for row in rows if row["hmContaminant"] == "ice crystal"]
    assert crystals
    for row in crystals:
        column, line = round(row["rlnCoordinateX"]), round(row["rlnCoordinateY"])
        if 10 < column < 500 and 10 < line < 500 and away[line, column] < -150:
            assert clean[line - 5 : line + 6, column - 5 : column + 6].mean() < 0.9 * free


def test_whole_particles_keep_apart_and_off_obstacles():
    made = scene(overlapping=0.0, broken=0.1, carbon=1.0, contaminants=4.0)
    position = made.molecules.position
    assert 200 < len(position) <= 400
    distance = np.linalg.norm(position[:, None] - position, axis=-1)
    assert distance[np.triu_indices(len(position), 1)].min() >= 60.0
    for crystal in made.crystals:
        assert np.hypot(*(position - [crystal.x, crystal.y]).T).min() > crystal.radius
    assert np.hypot(*(position - made.hole[:2]).T).max() < made.hole[2]
    assert np.all(position >= 0)
    assert np.all(position <= [4096, 2048])


def test_decoys_come_in_the_shares_asked():
    kinds, states = [], []
    for seed in range(10):
        molecules = scene(seed, overlapping=0.2, broken=0.1).molecules
        kinds.append(molecules.kind)
        states.append(molecules.state)
        distance = np.linalg.norm(molecules.position[:, None] - molecules.position, axis=-1)
        np.fill_diagonal(distance, np.inf)
        touched = distance.min(axis=0) <= 60
        assert touched[molecules.kind == "overlapping"].all()
        assert not touched[molecules.kind == "real"].any()
    kinds, states = np.concatenate(kinds), np.concatenate(states)
    # A tenth of nine in ten get a partner: 0.18 of 1.09, and some partners touch a third particle.
    assert 0.15 < np.mean(kinds == "overlapping") < 0.22
    assert np.mean(kinds == "broken") == pytest.approx(0.09, abs=0.02)
    assert set(states[kinds == "broken"]) == {2, 3, 4}
    assert np.mean(states[kinds != "broken"] == 1) == pytest.approx(0.75, abs=0.03)


def test_tilt_changes_the_defocus_across_the_view():
    made = scene(tilt=30.0, ice_thickness=62.0, ice_variation=0.0)
    axis = np.radians(made.tilt_axis)
    x, y = made.molecules.position.T
    across = -(x - 2048) * np.sin(axis) + (y - 1024) * np.cos(axis)
    defocus = [
        made.defocus_at(*place, depth).mean
        for place, depth in zip(made.molecules.position, made.molecules.depth, strict=True)
    ]
    expected = made.defocus.mean + np.tan(np.radians(30)) * across
    expected += made.molecules.depth / np.cos(np.radians(30))
    assert np.allclose(defocus, expected)
    assert np.ptp(defocus) > 1000


def test_particles_lie_inside_the_ice():
    made = scene(ice_thickness=500.0, ice_variation=0.0)
    room = (500 - 60) / 2
    assert 0.95 * room < np.abs(made.molecules.depth).max() <= room


def test_optics_groups_take_turns():
    groups = [scene(index=index, optics_groups=3, beam_tilt=0.6, particles=1) for index in range(4)]
    assert [made.group for made in groups] == [0, 1, 2, 0]
    assert all(np.hypot(*made.beam_tilt_mrad) == pytest.approx(0.6) for made in groups)


def test_orientations_are_uniform_or_preferred():
    def views(strength: float) -> np.ndarray:
        step = SimulateParticles(preferred_orientation=strength, seed=2)
        rotation = random_rotations(4000, step, np.random.default_rng(1))
        assert np.allclose(rotation @ rotation.transpose(0, 2, 1), np.eye(3), atol=1e-6)
        return rotation[:, 2]

    uniform, preferred = views(0.0), views(1.0)
    # Second moments of uniform directions are a third, with an error of 0.3 / sqrt(n).
    assert np.allclose(uniform.T @ uniform / 4000, np.eye(3) / 3, atol=0.02)
    assert np.abs(uniform.mean(axis=0)).max() < 0.04
    nearest = np.max(preferred @ preferred[:200].T, axis=1)
    assert np.mean(nearest > 0.95) > 0.95
    covered = np.histogram2d(preferred[:, 2], np.arctan2(preferred[:, 1], preferred[:, 0]), bins=6)[0]
    spread = np.histogram2d(uniform[:, 2], np.arctan2(uniform[:, 1], uniform[:, 0]), bins=6)[0]
    assert (covered > 20).sum() < 22
    assert (spread > 20).sum() == 36


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"morph_states": 4}, "two models"),
        ({"models": ("a.pdb", "b.pdb"), "fractions": (1.0,)}, "--fractions needs 2"),
        ({"fractions": (-1.0,)}, "--fractions must"),
        ({"defocus_min": 2e4, "defocus_max": 1e4}, "--defocus-min"),
        ({"box_size": 65}, "--box-size"),
        ({"tilt": 80}, "--tilt"),
    ],
)
def test_parameters_that_cannot_be_are_refused(values, message):
    with pytest.raises(ParameterError, match=message):
        parse_step(SimulateMovies, values)
