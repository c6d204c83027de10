"""The step that finds symmetry: map in the standard setting, table, picture, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfmap.cli import main
from halfmap.errors import ParameterError, ShapeError
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.ops import fourier, grids
from halfmap.ops.interpolation import rotate_volume
from halfmap.ops.rotations import from_euler, random_rotations
from halfmap.ops.symmetry import operators, symmetrise_volume
from halfmap.project import Project
from halfmap.search.symmetry_map import Band
from halfmap.search.symmetry_search import FoundSymmetry, GroupScore
from halfmap.steps.symmetry.search import averaged, verdict
from halfmap.steps.symmetry.step import SymmetryStep

BOX, PIXEL = 36, 5.0


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    monkeypatch.chdir(tmp_path)
    return Project.open(tmp_path)


def tetramer(seed: int, noise: float) -> np.ndarray:
    """Blobs with C4 in some orientation."""
    generator = torch.Generator().manual_seed(7)
    turn = random_rotations(1, generator=generator)[0]
    places = (torch.randn(5, 3, generator=generator) * 22) @ operators("C4").float().transpose(-1, -2)
    line = (torch.arange(BOX) - BOX // 2) * PIXEL
    x, y, z = torch.exp(-(line - (places.reshape(-1, 3) @ turn.T)[..., None]).square() / (2 * 8.0**2)).unbind(
        1
    )
    volume = torch.einsum("nz,ny,nx->zyx", z, y, x)
    random = torch.randn(volume.shape, generator=torch.Generator().manual_seed(seed))
    return (volume + noise * random).numpy()


def write(name: str, array: np.ndarray) -> str:
    write_mrc(name, array, pixel_size=PIXEL, stack=False)
    return name


def test_the_map_is_written_in_the_standard_setting_with_its_scores(project):
    clean = write("clean.mrc", tetramer(0, 0.0))
    halves = [write(f"half{i}.mrc", tetramer(i, 0.4)) for i in (1, 2)]
    whole = write("map.mrc", (read_mrc(halves[0]) + read_mrc(halves[1])) / 2)
    step = SymmetryStep(map=whole, half1=halves[0], half2=halves[1], groups=("c2", "C4", "D4"), null_maps=2)
    job = project.run(step)
    tables = read_star(job.outputs["scores"])
    assert tables["symmetry_general"]["rlnSymmetryGroup"] == "C4"
    groups = tables["symmetry_groups"]
    assert groups["rlnSymmetryGroup"].to_list() == ["C2", "C4", "D4"]
    assert groups["hmVerdict"].to_list() == ["contained", "yes", "no"]
    turned = torch.from_numpy(read_mrc(job.outputs["map"]))
    assert read_header(job.outputs["map"]).pixel_size == PIXEL
    inside = grids.radius(turned.shape) < 12
    # Angles and centre of the table turn the clean map as the noisy one was turned.
    angles = groups.select("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi").to_numpy()[1].astype(float)
    rotation = from_euler(torch.tensor(angles))
    centre = torch.tensor([float(groups[f"hmCentre{axis}"][1]) for axis in "XYZ"]) / PIXEL
    moved = fourier.phase_shift(
        fourier.rfft3(torch.from_numpy(read_mrc(clean))), shape=(BOX,) * 3, shift_px=-centre
    )
    clean_turned = rotate_volume(fourier.irfft3(moved, shape=(BOX,) * 3), rotation, method="cubic")
    noise = (turned - clean_turned)[inside].std()
    assert float(noise) < 0.4
    assert np.corrcoef(clean_turned[inside], symmetrise_volume(clean_turned, "C4")[inside])[0, 1] > 0.97
    assert job.outputs["picture"].stat().st_size > 10_000


def test_groups_are_contained_by_their_operators_not_by_their_order():
    """C8 has as many operators as D4, and is none of its parts; C2 about any of its axes is, and no other."""
    turned = random_rotations(1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)[0]

    def score(group: str, axes: torch.Tensor, share: float = 0.95) -> GroupScore:
        return GroupScore(group, share, share, share, 0.0, 0.1, axes @ turned, torch.zeros(3), refined=True)

    nothing = torch.zeros(1)
    band = Band(torch.zeros(4, 4, 4), 1.0, 4.0, 10.0, 1.0, nothing, nothing)
    best = score("D4", torch.eye(3).double())
    found = FoundSymmetry(best, [best], 1.0, band, torch.zeros(3), PIXEL)
    straight, slightly = (from_euler(torch.tensor([20.0, tilt, 0.0])).double() for tilt in (0.0, 2.0))
    across = from_euler(torch.tensor([45.0, 90.0, 10.0])).double()
    askew = from_euler(torch.tensor([20.0, 30.0, 0.0])).double()
    said = {
        (group, name): verdict(found, score(group, axes), 0.9)
        for group in ("C2", "C4", "C8")
        for name, axes in (
            ("straight", straight),
            ("slightly", slightly),
            ("across", across),
            ("askew", askew),
        )
    }
    assert {pair for pair, word in said.items() if word == "contained"} == {
        ("C2", "straight"),
        ("C2", "slightly"),
        ("C2", "across"),
        ("C4", "straight"),
        ("C4", "slightly"),
    }
    assert set(said.values()) == {"contained", "nearly"}
    assert verdict(found, score("C2", straight, share=0.8), 0.9) == "nearly"


def test_symmetrise_averages_the_map(project):
    name = write("map.mrc", tetramer(3, 0.3))
    job = project.run(SymmetryStep(map=name, groups=("C4",), null_maps=0, symmetrise=True))
    turned = torch.from_numpy(read_mrc(job.outputs["map"]))
    inside = grids.radius(turned.shape) < 12
    assert np.corrcoef(turned[inside], symmetrise_volume(turned, "C4")[inside])[0, 1] > 0.999


def test_a_map_that_was_averaged_proves_nothing(project, caplog):
    """Noise that is symmetric too lets parts be more alike than noise around the particle says."""
    halves = [tetramer(seed, 0.4) for seed in (4, 5)]
    name = write("map.mrc", halves[0])
    job = project.run(SymmetryStep(map=name, groups=("C4",), null_maps=0, symmetrise=True))
    assert "averaged over" not in caplog.text
    again = project.run(SymmetryStep(map=str(job.outputs["map"]), groups=("C4",), null_maps=0))
    assert "seems to have been averaged over C4 already" in caplog.text
    general = read_star(again.outputs["scores"])["symmetry_general"]
    assert general["rlnSymmetryGroup"] == "C4"


def test_only_averaging_makes_parts_more_alike_than_their_noise():
    nothing = torch.zeros(1)
    band = Band(torch.zeros(4, 4, 4), 1.0, 4.0, 10.0, 1.0, nothing, nothing)

    def found(group: str, correlation: float, weakest: float, signal: float) -> FoundSymmetry:
        turn = torch.eye(3)
        score = GroupScore(
            group, correlation, weakest, correlation, 0.0, 0.1, turn, torch.zeros(3), refined=True
        )
        return FoundSymmetry(score, [score], signal, band, torch.zeros(3), PIXEL)

    assert averaged(found("C4", 0.98, 0.97, 0.9))
    assert averaged(found("D7", 0.997, 0.99, 0.97))
    assert not averaged(found("D7", 0.997, 0.99, 0.99))
    assert not averaged(found("C4", 0.93, 0.93, 0.9))
    assert not averaged(found("C1", 1.0, 1.0, 0.8))


def test_what_cannot_be_searched_is_refused(project, capsys):
    name = write("map.mrc", tetramer(3, 0.3))
    write("slab.mrc", tetramer(3, 0.3)[:20])
    write("small.mrc", tetramer(3, 0.3)[:20, :20, :20])
    with pytest.raises(ShapeError, match=r"slab\.mrc: is not cubic"):
        project.run(SymmetryStep(map="slab.mrc"))
    with pytest.raises(ShapeError, match=r"small\.mrc: has 20³ voxels of 5 Å, but .*map\.mrc 36³"):
        project.run(SymmetryStep(map=name, half1="small.mrc", half2="small.mrc"))
    with pytest.raises(ParameterError, match="there is no point group 'X9'"):
        project.run(SymmetryStep(map=name, groups=("C4", "X9")))
    with pytest.raises(ParameterError, match="no point group 'OCTAHEDRAL'; give O for octahedral"):
        project.run(SymmetryStep(map=name, groups=("octahedral",)))
    noise = np.random.default_rng(0).normal(size=(BOX,) * 3).astype(np.float32)
    with pytest.raises(ParameterError, match=r"noise\.mrc: no particle stands out"):
        project.run(SymmetryStep(map=write("noise.mrc", noise)))
    assert main(["symmetry", name, "--half1", "a.mrc"]) == 2
    assert "half maps come in pairs" in capsys.readouterr().err
