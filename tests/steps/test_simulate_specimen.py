"""Molecules against ice: volume, mean potential, maps, morphs, fragments."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from halfmap.errors import ParameterError
from halfmap.io.models import read_model
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.ops import fourier
from halfmap.steps.simulate import preparation
from halfmap.steps.simulate.projector import project
from halfmap.steps.simulate.solvent import ICE_POTENTIAL_V, solvent_density
from halfmap.steps.simulate.specimen import (
    Specimen,
    State,
    measure,
    plan_states,
    potential,
    prepare_state,
    truth_file,
)

SHIPPED = Path(preparation.__file__).with_name(preparation.SHIPPED_MODEL)
BOX, PIXEL = 64, 1.5

ATOM = "ATOM  {:5d}  {:<3s} {:3s} A{:4d}    {:8.3f}{:8.3f}{:8.3f}  1.00 20.00          {:>2s}\n"


def write_pdb(path: Path, positions: np.ndarray, element: str = "C") -> Path:
    rows = [ATOM.format(i + 1, element, "UNX", i + 1, *xyz, element) for i, xyz in enumerate(positions)]
    path.write_text("".join(rows) + "END\n")
    return path


@pytest.fixture(scope="module")
def subunit():
    return read_model(SHIPPED, assembly=None)


def test_ice_has_the_potential_of_its_neutral_atoms():
    # 0.0314 molecules / Å³ times 47.878 V Å² times 3.041 Å.
    assert pytest.approx(4.575, abs=0.005) == ICE_POTENTIAL_V


def test_a_protein_displaces_its_partial_specific_volume_of_water():
    whole = read_model(SHIPPED).centred()
    box, pixel = 176, 1.0
    density = solvent_density(whole, box=box, pixel_size=pixel)
    volume = float((1 - density).sum()) * (box * pixel / density.shape[0]) ** 3
    # Heavy atoms and 1/14 of their mass in hydrogens; proteins have 0.72 to 0.75 cm³/g.
    mass = whole.masses.sum() * 1.075
    assert volume / mass * 0.6022 == pytest.approx(0.735, abs=0.025)


def test_water_is_bulk_far_out_and_none_inside(subunit):
    density = solvent_density(subunit.centred(), box=80, pixel_size=1.0)
    assert float(density[0, 0, 0]) == pytest.approx(1, abs=1e-3)
    edge = torch.cat([density[0].flatten(), density[:, 0].flatten(), density[:, :, -1].flatten()])
    assert torch.allclose(edge, torch.ones_like(edge), atol=0.01)
    spacing = 80 / density.shape[0]
    index = np.rint(subunit.centred().positions[:, ::-1] / spacing + density.shape[0] // 2).astype(int)
    at_atoms = density[tuple(index.T)]
    # The nearest voxel may be 0.8 Å away, and the surface 1.5 Å, from which water falls off over 1 Å.
    assert float(at_atoms.mean()) < 0.06
    assert float(at_atoms.max()) < 0.35
    # The hydration layer holds a little more water than bulk.
    assert 1.02 < float(density.max()) < 1.2


def test_protein_has_a_little_over_three_volts_against_ice(subunit):
    volume, mass = potential(
        State(0, (str(SHIPPED),)), box=BOX, pixel_size=PIXEL, assembly=None, b_factor=None
    )
    assert mass == pytest.approx(
        21.0 * 0.92, rel=0.06
    )  # one ferritin heavy chain without its disordered ends
    displaced = mass * 1e3 / 0.6022 * 0.735
    contrast = float(volume.sum()) * PIXEL**3 / displaced
    assert contrast == pytest.approx(3.4, abs=0.4)
    assert abs(float(volume[0, 0].mean())) < 0.1


def test_a_b_factor_of_its_own_blurs_the_molecule():
    sharp, blurred = (
        potential(State(0, (str(SHIPPED),)), box=BOX, pixel_size=PIXEL, assembly=None, b_factor=b)[0]
        for b in (20.0, 120.0)
    )
    assert float(sharp.sum()) == pytest.approx(float(blurred.sum()), rel=2e-3)
    assert float(sharp.max()) > 1.5 * float(blurred.max())


def specimen(tmp_path, **changes) -> Specimen:
    settings = {
        "folder": tmp_path / "Specimen",
        "box": BOX,
        "pixel_size": PIXEL,
        "fractions": (1.0,),
        "n_broken": 0,
        "diameter": 60.0,
    }
    return Specimen(**{**settings, **changes})


def prepare(state: State, made: Specimen, tmp_path: Path, **changes) -> dict:
    settings = {
        "specimen": made,
        "truth_folder": tmp_path,
        "truth_box": BOX,
        "assembly": None,
        "b_factor": None,
        "seed": 1,
    }
    return prepare_state(state, **{**settings, **changes})


def test_the_truth_map_projects_to_the_images(tmp_path):
    made = specimen(tmp_path)
    row = prepare(State(0, (str(SHIPPED),)), made, tmp_path)
    assert row["state"] == 0
    assert row["contrast_V"] == pytest.approx(3.7, abs=0.6)
    truth = torch.from_numpy(read_mrc(truth_file(tmp_path, 0)))
    image = project(made.transform(0), torch.eye(3)[None], box=made.fine_box, pixel_size=made.fine_pixel)[0]
    image = fourier.resample(image, new_shape=(BOX, BOX))
    flat = truth.sum(0) * PIXEL
    low = fourier.rfft2(torch.stack([image, flat]))[:, :20, :20]
    assert torch.allclose(low[0], low[1], atol=3e-3 * float(low.abs().max()))


def test_fragments_are_parts_of_the_first_state(tmp_path):
    made = specimen(tmp_path, n_broken=2)
    prepare(State(0, (str(SHIPPED),)), made, tmp_path)

    def mass(number: int) -> float:
        image = project(
            made.transform(number), torch.eye(3)[None], box=made.fine_box, pixel_size=made.fine_pixel
        )
        return float(image.sum())

    for fragment in (1, 2):
        assert 0.25 < mass(fragment) / mass(0) < 0.75
    assert mass(1) != mass(2)


def test_a_map_becomes_a_specimen_of_its_own_scale(tmp_path):
    made = specimen(tmp_path)
    prepare(State(0, (str(SHIPPED),)), made, tmp_path)
    truth = read_mrc(truth_file(tmp_path, 0))
    write_mrc(tmp_path / "other.mrc", 7.5 * truth + 3, pixel_size=PIXEL)
    volume, mass = potential(
        State(0, (str(tmp_path / "other.mrc"),)), box=BOX, pixel_size=PIXEL, assembly=None, b_factor=None
    )
    assert mass == 0
    # On the same grid nothing is interpolated; the scale is set by the mean inside the molecule.
    scale = float((volume * torch.from_numpy(truth)).sum() / np.square(truth).sum())
    assert np.allclose(volume.numpy(), scale * truth, atol=0.02 * truth.max())
    assert scale == pytest.approx(1, abs=0.2)
    assert measure(tmp_path / "other.mrc", assembly=None).diameter == pytest.approx(0.75 * BOX * PIXEL)


def test_a_map_keeps_its_frequencies_on_another_grid(tmp_path):
    grid = (np.arange(48) - 24) * 2.0
    wave = np.cos(2 * np.pi * grid / 12.0)
    window = np.exp(-0.5 * (grid / 12) ** 2)
    box = (window * wave)[:, None, None] * window[:, None] * window
    write_mrc(tmp_path / "wave.mrc", box.astype(np.float32), pixel_size=2.0)
    state = State(0, (str(tmp_path / "wave.mrc"),))
    volume, _ = potential(state, box=64, pixel_size=1.5, assembly=None, b_factor=None)
    fine = (np.arange(64) - 32) * 1.5
    window = np.exp(-0.5 * (fine / 12) ** 2)
    exact = (window * np.cos(2 * np.pi * fine / 12))[:, None, None] * window[:, None] * window
    scale = float((volume.numpy() * exact).sum() / np.square(exact).sum())
    assert np.abs(volume.numpy() / scale - exact).max() < 2e-3


def test_morphs_move_atoms_in_straight_lines(tmp_path):
    rng = np.random.default_rng(1)
    first = rng.uniform(-10, 10, (40, 3))
    second = first + np.array([8.0, 0, 0])
    names = (write_pdb(tmp_path / "a.pdb", first), write_pdb(tmp_path / "b.pdb", second))
    states = plan_states(names, morph_states=5)
    assert [state.mix for state in states] == [0, 0.25, 0.5, 0.75, 1]
    start, middle = (
        potential(states[i], box=48, pixel_size=1.0, assembly=None, b_factor=None)[0] for i in (0, 2)
    )
    # Half of the way is a shift of four voxels along x; the water is computed on voxels of its own.
    shifted = torch.roll(start, 4, dims=2)
    assert float((shifted - middle).norm() / middle.norm()) < 0.1
    assert float((start - middle).norm() / middle.norm()) > 0.5


def test_models_of_other_atoms_cannot_be_morphed(tmp_path):
    rng = np.random.default_rng(1)
    names = (
        str(write_pdb(tmp_path / "a.pdb", rng.uniform(-5, 5, (10, 3)))),
        str(write_pdb(tmp_path / "b.pdb", rng.uniform(-5, 5, (11, 3)))),
    )
    with pytest.raises(ParameterError, match="same atoms"):
        potential(State(0, names, 0.5), box=48, pixel_size=1.0, assembly=None, b_factor=None)


def test_a_box_that_is_too_small_is_refused_with_the_size_needed():
    with pytest.raises(ParameterError, match="--box-size"):
        potential(State(0, (str(SHIPPED),)), box=24, pixel_size=1.5, assembly=None, b_factor=None)


def test_hydrogens_are_those_of_the_residues(subunit):
    from halfmap.steps.simulate.specimen import _hydrogens_per_atom

    counted = _hydrogens_per_atom(subunit)
    one = subunit.select(subunit.residue_numbers == subunit.residue_numbers[0])
    assert set(one.residue_names) == {"SER"}
    assert float(_hydrogens_per_atom(one).sum()) == pytest.approx(5)  # C3H5NO2 in a chain
    assert counted.sum() / len(subunit) == pytest.approx(1.0, abs=0.1)
    unknown = replace(one, residue_names=np.full(len(one), "ZZZ"))
    assert float(_hydrogens_per_atom(unknown).sum()) == pytest.approx(1.2 * 4)


def test_preparing_twice_gives_the_same_bytes_on_any_number_of_threads(tmp_path):
    made = functools.partial(specimen, n_broken=1)
    before = torch.get_num_threads()
    contents = []
    for threads in (1, 2):
        folder = tmp_path / str(threads)
        torch.set_num_threads(threads)
        try:
            prepare(State(0, (str(SHIPPED),)), made(folder), folder)
        finally:
            torch.set_num_threads(before)
        contents.append({path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 3
