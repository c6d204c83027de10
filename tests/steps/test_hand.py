"""The step that tells the hand: what is mirrored, what is left, and what is refused."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from hand_maps import maps

from halfmap.cli import main
from halfmap.data import ParticleSet, Poses
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.rotations import random_rotations
from halfmap.ops.slices import project_volume
from halfmap.project import Project
from halfmap.search.volume_alignment import inverted
from halfmap.steps.hand.mirror import mirrored_poses
from halfmap.steps.hand.step import HandStep

FEW = 20


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    monkeypatch.chdir(tmp_path)
    return Project.open(tmp_path)


def refined(path, box: int = 48) -> ParticleSet:
    """Particles with random poses."""
    optics = {"rlnOpticsGroup": [1], "rlnImagePixelSize": [1.6], "rlnImageSize": [box]}
    rows = {"rlnImageName": [f"{i + 1}@a.mrcs" for i in range(FEW)], "rlnOpticsGroup": [1] * FEW}
    generator = torch.Generator().manual_seed(3)
    shifts = torch.randn(FEW, 2, generator=generator, dtype=torch.float64)
    poses = Poses(random_rotations(FEW, generator=generator), shifts)
    found = ParticleSet(pl.DataFrame(optics), pl.DataFrame(rows)).with_poses(poses)
    write_particles(path, found)
    return found


def files(what) -> dict[str, str]:
    """Half maps and mask of `maps`, written."""
    volumes = {"half1": what.halves.first, "half2": what.halves.second, "mask": what.mask}
    for name, volume in volumes.items():
        write_mrc(f"{name}_in.mrc", volume.numpy(), pixel_size=what.halves.pixel_size, stack=False)
    return {name: f"{name}_in.mrc" for name in ("half1", "mask")}


@pytest.mark.parametrize("flip", [False, True])
def test_a_mirror_image_is_mirrored_and_no_other_map(project, shared_data, flip):
    what = maps(shared_data, "4hhb.cif.gz", "A", flip=flip)
    particles = refined("particles.star", len(what.mask))
    job = project.run(HandStep(**files(what), particles="particles.star"))
    told = read_star(job.outputs["told"])["hand"]
    assert (told["hmMirrored"], told["hmHand"]) == ((1, "left") if flip else (0, "right"))
    for name, given in (
        ("half1", what.halves.first),
        ("half2", what.halves.second),
        ("mask", what.mask),
        ("map", what.halves.mean),
    ):
        wanted = inverted(given) if flip else given
        np.testing.assert_allclose(read_mrc(job.outputs[name]), wanted.numpy(), atol=1e-6)
    psi = read_particles(job.outputs["particles"]).rows["rlnAnglePsi"].to_numpy()
    turned = (psi - particles.rows["rlnAnglePsi"].to_numpy()) % 360
    np.testing.assert_allclose(turned, 180.0 if flip else 0.0, atol=1e-4)
    assert job.outputs["picture"].stat().st_size > 5000


def test_a_coarse_map_is_left_unless_it_is_to_be_mirrored(project, shared_data):
    given = files(maps(shared_data, "4hhb.cif.gz", "A", detail=9.0))
    for mirror in ("if-left-handed", "always", "never"):
        job = project.run(HandStep(**given, mirror=mirror))
        told = read_star(job.outputs["told"])["hand"]
        assert told["hmHand"] == "too coarse"
        assert told["hmMirrored"] == int(mirror == "always")
        first = torch.from_numpy(np.array(read_mrc("half1_in.mrc")))
        wanted = inverted(first) if mirror == "always" else first
        np.testing.assert_array_equal(read_mrc(job.outputs["half1"]), wanted.numpy())
        assert "particles" not in job.outputs
        assert "picture" not in job.outputs


def test_the_mirrored_map_gives_the_same_projections_in_the_mirrored_poses(tmp_path):
    """Of a map that is nothing like its mirror image, in a box of even size."""
    generator = torch.Generator().manual_seed(5)
    axis = torch.arange(48.0) - 24
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    volume = torch.zeros(48, 48, 48)
    for place in 8 * torch.randn(6, 3, generator=generator):
        volume += torch.exp(-((x - place[0]) ** 2 + (y - place[1]) ** 2 + (z - place[2]) ** 2) / 8)
    before = refined(tmp_path / "particles.star")
    after = mirrored_poses(before)
    one, two = (
        project_volume(each, poses.rotations.float())
        for each, poses in ((volume, before.poses), (inverted(volume), after.poses))
    )
    scale = float(one.std())
    assert float((one - two).std()) < 1e-3 * scale
    # Those of the map as it was are not these.
    unlike = project_volume(volume, after.poses.rotations.float())
    assert float((one - unlike).std()) > 0.3 * scale
    torch.testing.assert_close(before.poses.shifts_A, after.poses.shifts_A)


def test_particles_without_poses_are_refused(project, shared_data, capsys):
    given = files(maps(shared_data, "4hhb.cif.gz", "A", detail=9.0))
    particles = refined("particles.star")
    rows = particles.rows.drop("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
    write_particles("bare.star", particles.with_rows(rows))
    assert main(["hand", given["half1"], "--particles", "bare.star"]) == 2
    assert "bare.star" in (said := capsys.readouterr().err)
    assert "no poses" in said
    assert main(["hand", given["half1"], "--symmetry", "Q3"]) == 2
    refined("small.star", 20)
    assert main(["hand", given["half1"], "--particles", "small.star"]) == 2
    assert "have boxes of 32 Å" in capsys.readouterr().err


@pytest.mark.parametrize(("mirror", "flip"), [("never", True), ("always", False)])
def test_what_is_asked_for_against_the_helices_is_done_and_told(project, shared_data, caplog, mirror, flip):
    given = files(maps(shared_data, "4hhb.cif.gz", "A", flip=flip))
    job = project.run(HandStep(**given, map="half1_in.mrc", mirror=mirror))
    told = read_star(job.outputs["told"])["hand"]
    assert told["hmHand"] == ("left" if flip else "right")
    assert told["hmMirrored"] == int(mirror == "always")
    assert "not the one asked for" in caplog.text
    # The map that was given goes along.
    np.testing.assert_array_equal(read_mrc(job.outputs["map"]), read_mrc(job.outputs["half1"]))
