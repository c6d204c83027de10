"""RELION's program makes the maps that we make of the same sums, ours those that RELION goes on with."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pose_simulation import Particle, simulate
from refine_simulation import BOX, DIAMETER, PIXEL, run, write_project

from halfmap.io.mrc import read_header, read_mrc
from halfmap.io.star import read_star
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.fsc import fsc as correlation_of
from halfmap.ops.grids import frequency_radius
from halfmap.ops.masks import soft_sphere
from halfmap.search.backprojector import Backprojection
from halfmap.search.disc import FourierDisc
from halfmap.search.halfmaps import HalfSums, solved
from halfmap.search.regularise import Evidence
from halfmap.search.regularise.external import VARIABLE, External
from halfmap.search.regularise.external_files import write

pytestmark = pytest.mark.relion

RADIUS = 14
PROGRAM = "relion_external_reconstruct"
SPHERE = soft_sphere((BOX,) * 3, radius=DIAMETER / 2, edge=8.0, pixel_size=PIXEL)


def relion(folder: Path, program: str, *arguments: object, **variables: str) -> None:
    command = [f"relion_{program}", *map(str, arguments)]
    known = os.environ | variables | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=known)
    assert done.returncode == 0, done.stdout + done.stderr


def read(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(read_mrc(path), np.float32))


def sums(seed: int, n: int) -> Backprojection:
    particle = replace(Particle.random(BOX, count=60, radius_px=11.0), box=BOX)
    drawn = simulate(particle, FourierDisc(BOX, RADIUS), n, snr=0.2, seed=seed)
    made = Backprojection.empty(BOX, RADIUS)
    made.add(drawn.images, drawn.rotations, drawn.shifts_px)
    return made.symmetrised()


def found(halves: tuple[Backprojection, Backprojection]) -> Evidence:
    held = HalfSums.of(halves)
    agreed = 0.999 / (1 + (torch.arange(RADIUS + 1) / 11) ** 8)
    maps = held.unfiltered()
    return Evidence(maps, SPHERE, agreed, held.prior(agreed), held.least, PIXEL, BOX, 4, "near")


def low(volume: torch.Tensor) -> torch.Tensor:
    """Particle of a map without the last shells, of which RELION leaves out what is beyond its sphere."""
    passed = frequency_radius((BOX,) * 3) * BOX <= RADIUS - 1
    return irfft3(rfft3(volume) * passed, shape=volume.shape) * SPHERE


def scale(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one * other).sum() / other.square().sum())


@pytest.mark.parametrize(("option", "least", "off"), [("--skip_gridding", 0.999, 0.002), ("", 0.99, 0.02)])
def test_relions_map_of_our_files_is_ours(tmp_path, option, least, off):
    """Without its density correction RELION's is ours; with it, what differs is where few images were."""
    half = sums(1, 800)
    evidence = found((half, sums(2, 800)))
    asked = write(
        tmp_path / "run_it004_half1_class001_external_reconstruct",
        half,
        box=BOX,
        prior=evidence.prior[0],
        correlation=evidence.correlation,
        pixel_size=PIXEL,
        diameter=DIAMETER,
    )
    relion(tmp_path, "external_reconstruct", asked.star, *option.split())
    ours, theirs = (low(each) for each in (solved(half, evidence.prior[0]), read(asked.result)))
    assert float(correlation_of(ours, theirs)[: RADIUS - 2].min()) > least
    assert scale(theirs, ours) == pytest.approx(1, abs=off)


def test_a_filter_by_relions_program(tmp_path):
    """In a box larger than that of the sums."""
    halves = sums(1, 200), sums(2, 200)
    evidence = found(halves)
    wide = replace(evidence, box=BOX + 12)
    made = External(tmp_path, DIAMETER, PROGRAM)(wide)(halves, "without_part1")
    for half, own in enumerate(made):
        ours = low(solved(halves[half], evidence.prior[half]))
        assert own.shape == (BOX,) * 3
        assert scale(low(own), ours) == pytest.approx(1, abs=0.03)
        assert float(correlation_of(low(own), ours)[: RADIUS - 1].min()) > 0.98


def test_refinement_with_relions_program(tmp_path):
    poses = write_project(tmp_path / "project", signal=2.0, n=100)
    external = {"regulariser": "external", "regulariser_everywhere": "external"}
    job = run(tmp_path / "project", most_iterations=3, external_program=PROGRAM, **external)
    assert len(poses.rotations) == 100
    curve = correlation_of(read(job / "map.mrc") * SPHERE, read(tmp_path / "project/truth.mrc") * SPHERE)
    assert float(curve[1:9].min()) > 0.7
    assert not (job / "External").exists()


def test_relion_goes_on_with_our_maps(tmp_path):
    write_project(tmp_path / "project", signal=3.0, n=40)
    folder = tmp_path / "project"
    (folder / "r").mkdir()
    before = set(folder.iterdir())
    words = (
        f"--i particles.star --ref truth.mrc --o r/run --ini_high 25 --ctf --particle_diameter {DIAMETER}"
        " --flatten_solvent --zero_mask --offset_range 2 --offset_step 2 --j 1 --iter 2 --K 1 --pad 2"
        " --firstiter_cc --tau2_fudge 4 --oversampling 0 --healpix_order 1 --random_seed 1 --dont_check_norm"
        " --external_reconstruct"
    )
    command = f"{sys.executable} -m halfmap external-reconstruct --threads 1"
    relion(folder, "refine", *words.split(), **{VARIABLE: command})
    assert set(folder.iterdir()) == before
    used = read(folder / "r/run_it002_class001.mrc") * SPHERE
    # On a grid of 30° little but the shape of the particle is found.
    assert float(correlation_of(used, read(folder / "truth.mrc") * SPHERE)[1:3].min()) > 0.8
    # Its own program makes the same map of its files.
    stem = folder / "r/run_it002_class001_external_reconstruct"
    ours = read(stem.with_suffix(".mrc"))
    assert float(correlation_of(used, ours * SPHERE)[:8].min()) > 0.99
    assert read_header(stem.with_suffix(".mrc")).require_pixel_size() == pytest.approx(PIXEL)
    assert read_star(stem.with_suffix(".star"))["external_reconstruct_general"]["rlnPaddingFactor"] == 2
    relion(folder, "external_reconstruct", stem.with_suffix(".star"), "--skip_gridding")
    theirs = read(stem.with_suffix(".mrc"))
    # Voxels halfway between two shells it counts for the outer one, and its priors of one map are steep.
    assert float((ours - theirs).square().mean().sqrt() / theirs.std()) < 0.03
