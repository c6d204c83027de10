"""Refinement with other filters of its references: as good where there is signal, and nothing without."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from refine_simulation import BOX, DIAMETER, PIXEL, errors, run, write_project

from halfmap.data import Poses
from halfmap.errors import FileFormatError, ParameterError
from halfmap.io.star import read_star
from halfmap.nets.map_prior import MapPrior, Shape, save_map_prior

NAMES = "nonuniform", "sidesplitter", "learned"
SIDE = BOX * PIXEL


def eager(folder: Path) -> Path:
    """Weights of a network that adds to whatever it sees, and is believed in."""
    torch.manual_seed(0)
    network = MapPrior(Shape(filters=8, levels=2, blocks=1))
    with torch.no_grad():
        for each in network.leave.parameters():
            each.normal_(0, 0.02)
    record = {"error": {"correlation": [0.0, 1.0], "share": [0.2, 0.2], "power": [0.5, 0.5]}}
    save_map_prior(folder / "w.npz", network, record)
    return Path("w.npz")


def chosen(name: str, folder: Path) -> dict[str, object]:
    more = {"weights": eager(folder)} if name == "learned" else {}
    return {"regulariser": name, "regulariser_everywhere": name, **more}


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> tuple[Path, Poses]:
    folder = tmp_path_factory.mktemp("regularised")
    return folder, write_project(folder)


@pytest.fixture(scope="module")
def plain(truth) -> Path:
    return run(truth[0], most_iterations=5)


@pytest.mark.parametrize("name", NAMES)
def test_map_and_poses_are_found(truth, plain, name):
    folder, poses = truth
    job = run(folder, most_iterations=5, **chosen(name, folder))
    found, before = (
        read_star(each / "model.star")["model_general"]["rlnCurrentResolution"] for each in (job, plain)
    )
    assert SIDE / found > SIDE / before - 1.01
    assert float(errors(job, poses).median()) < 1.35 * float(errors(plain, poses).median())


@pytest.mark.parametrize("name", NAMES)
def test_noise_has_no_resolution(tmp_path, name):
    """As with Wiener's filter: nothing beyond the reference's detail and the smearing of the mask."""
    write_project(tmp_path, signal=0.0)
    job = run(tmp_path, most_iterations=4, **chosen(name, tmp_path))
    blocks = read_star(job / "model.star")
    smeared = SIDE / 25.0 + SIDE / DIAMETER + 1
    assert blocks["model_general"]["rlnCurrentResolution"] > SIDE / smeared
    beyond = blocks["model_class_1"]["rlnGoldStandardFsc"].to_numpy()[math.ceil(smeared) : BOX // 2]
    count = 2 / 3 * math.pi * ((BOX / 2) ** 3 - smeared**3) * math.pi / 6 * (DIAMETER / SIDE) ** 3
    assert abs(beyond.mean()) < 3 / math.sqrt(count)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_reported_beyond_what_images_hold(tmp_path, name):
    """Particles without anything finer than 15 Å."""
    write_project(tmp_path, group="D2", n=160, signal=2.0, finest=15.0)
    job = run(tmp_path, symmetry="D2", most_iterations=4, **chosen(name, tmp_path))
    general = read_star(job / "model.star")["model_general"]
    empty = math.ceil(SIDE / 15.0 + 1)
    assert SIDE / empty < general["rlnCurrentResolution"]


def test_what_is_missing_is_said_before_the_first_iteration(truth, tmp_path):
    folder, _ = truth
    with pytest.raises(ParameterError, match="no regulariser 'best'"):
        run(folder, regulariser="best")
    (folder / "nothing.npz").write_bytes(b"")
    with pytest.raises(FileFormatError, match=r"nothing\.json is missing"):
        run(folder, regulariser="learned", weights=Path("nothing.npz"))
