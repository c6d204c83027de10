"""Our particle images and RELION's, from one map and one table that we wrote: poses, shifts, CTFs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from halfmap.data import ParticleSet
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops import fourier, grids
from halfmap.ops.ctf import ctf
from halfmap.ops.slices import project_volume

BOX, PIXEL, N = 64, 1.7, 24


@pytest.fixture(scope="module")
def projected(tmp_path_factory) -> tuple[Path, ParticleSet]:
    """A lopsided map, a table of particles, and the images that RELION makes of them."""
    folder = tmp_path_factory.mktemp("relion_project")
    rng = np.random.default_rng(3)
    places = rng.normal(0, BOX / 9, (60, 3))
    r = grids.coordinates((BOX,) * 3).numpy()
    blobs = (
        w * np.exp(-((r - p) ** 2).sum(-1) / 4.5) for p, w in zip(places, rng.uniform(1, 3, 60), strict=True)
    )
    write_mrc(folder / "map.mrc", sum(blobs).astype(np.float32), pixel_size=PIXEL)
    u = rng.uniform(8000, 25000, N)
    rows = pl.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@none.mrcs" for i in range(N)],
            "rlnMicrographName": ["one.mrc"] * N,
            "rlnOpticsGroup": [1] * N,
            "rlnAngleRot": rng.uniform(-180, 180, N),
            "rlnAngleTilt": rng.uniform(0, 180, N),
            "rlnAnglePsi": rng.uniform(-180, 180, N),
            "rlnOriginXAngst": rng.normal(0, 5, N),
            "rlnOriginYAngst": rng.normal(0, 5, N),
            "rlnDefocusU": u,
            "rlnDefocusV": u - rng.uniform(0, 900, N),
            "rlnDefocusAngle": rng.uniform(-90, 90, N),
            "rlnPhaseShift": rng.uniform(0, 90, N),
        }
    )
    optics = pl.DataFrame(
        {
            "rlnOpticsGroupName": ["opticsGroup1"],
            "rlnOpticsGroup": [1],
            "rlnVoltage": [300.0],
            "rlnSphericalAberration": [2.7],
            "rlnAmplitudeContrast": [0.1],
            "rlnImagePixelSize": [PIXEL],
            "rlnImageSize": [BOX],
            "rlnImageDimensionality": [2],
        }
    )
    write_particles(folder / "particles.star", ParticleSet(optics=optics, rows=rows))
    command = "relion_project --i map.mrc --ang particles.star --o theirs --ctf"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder, read_particles(folder / "particles.star")


@pytest.mark.relion
def test_images_agree_in_every_shell_to_four_fifths_of_nyquist(projected):
    folder, particles = projected
    shape = (BOX, BOX)
    volume = torch.from_numpy(read_mrc(folder / "map.mrc")).double()
    poses = particles.poses
    images = project_volume(volume, poses.rotations.double())
    spectra = fourier.rfft2(images) * ctf(shape, **particles.ctf.for_ctf())
    ours = fourier.phase_shift(spectra, shape=shape, shift_px=-poses.shifts_A / PIXEL)
    theirs = fourier.rfft2(torch.from_numpy(read_mrc(folder / "theirs.mrcs")).double())
    index = grids.ring_index(shape)
    errors = []
    for shell in range(1, int(0.8 * BOX / 2) + 1):
        ring = index == shell
        errors.append(float((ours - theirs)[:, ring].norm() / theirs[:, ring].norm()))
    # Poses and shifts are single precision in memory, and the wavelengths differ by 6.4e-6 (phases to 60).
    assert max(errors) < 1e-3
