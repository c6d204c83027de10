"""Projects of simulated particles to be refined, with the true poses."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import torch
from pose_simulation import Particle

from halfmap.data import ParticleSet, Poses
from halfmap.engine import RunOptions
from halfmap.io.mrc import write_mrc
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.ctf import ctf
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft2, resample, rfft2, shift_image
from halfmap.ops.rotations import random_rotations
from halfmap.ops.symmetry import operators, symmetric_distance
from halfmap.project import Project
from halfmap.steps.refine.step import RefineStep

BOX, PIXEL, DIAMETER, N, SHIFT_A = 36, 4.0, 100.0, 240, 4.0
SCALES = 0.8, 1.2
"""Strength of the signal in the first and in the last of four micrographs."""

OPTICS = {
    "rlnOpticsGroup": [1],
    "rlnOpticsGroupName": ["one"],
    "rlnVoltage": [300.0],
    "rlnSphericalAberration": [2.7],
    "rlnAmplitudeContrast": [0.1],
    "rlnImagePixelSize": [PIXEL],
    "rlnImageSize": [BOX],
}


def write_project(
    folder: Path,
    *,
    group: str = "C1",
    signal: float = 1.0,
    n: int = N,
    seed: int = 3,
    finest: float | None = None,
    atoms: torch.Tensor | None = None,
) -> Poses:
    """A table, a stack and a reference at another scale, box and pixel size; the true poses."""
    generator = torch.Generator().manual_seed(seed)
    if atoms is None:
        atoms = Particle.random(BOX, count=60, radius_px=11.0).atoms
    particle = Particle(torch.cat([atoms @ operator.T for operator in operators(group)]), BOX)
    rotations = random_rotations(n, generator=generator, dtype=torch.float64)
    shifts = torch.randn(n, 2, generator=generator, dtype=torch.float64) * (SHIFT_A / PIXEL)
    defocus = np.repeat(np.linspace(8000, 16000, 4), -(-n // 4))[:n]
    transfer = torch.stack(
        [
            ctf(
                (BOX, BOX),
                pixel_size=PIXEL,
                defocus_u=float(z),
                defocus_v=float(z),
                defocus_angle=0.0,
                voltage_kV=300.0,
                cs_mm=2.7,
                amplitude_contrast=0.1,
            )
            for z in defocus
        ]
    )
    clean = irfft2(rfft2(particle.images(rotations)) * transfer, shape=(BOX, BOX))
    clean = clean * torch.linspace(*SCALES, 4).repeat_interleave(-(-n // 4))[:n, None, None]
    clean = shift_image(clean, shift_px=-shifts)
    noise = torch.randn(n, BOX, BOX, generator=generator)
    # A fifth of the noise's variance within the particle's circle.
    scale = signal * math.sqrt(0.2 / float(clean[:, 6:-6, 6:-6].var()))
    images = scale * clean + noise
    if finest is not None:
        passed = low_pass((BOX, BOX), pixel_size=PIXEL, resolution=finest)
        images = irfft2(rfft2(images) * passed, shape=(BOX, BOX))
    (folder / "Stacks").mkdir(parents=True)
    write_mrc(folder / "Stacks/a.mrcs", images.numpy(), pixel_size=PIXEL, stack=True)
    rows = pl.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@Stacks/a.mrcs" for i in range(n)],
            "rlnMicrographName": [f"Motion/{int(z)}.mrc" for z in defocus],
            "rlnOpticsGroup": np.ones(n, np.int64),
            "rlnDefocusU": defocus,
            "rlnDefocusV": defocus,
            "rlnDefocusAngle": np.zeros(n),
            "someOtherColumn": np.arange(n),
        }
    )
    write_particles(folder / "particles.star", ParticleSet(pl.DataFrame(OPTICS), rows))
    truth = particle.volume()
    write_mrc(folder / "truth.mrc", truth.numpy(), pixel_size=PIXEL)
    smaller = 32
    coarse = 700.0 * resample(truth, new_shape=(smaller,) * 3).numpy()
    write_mrc(folder / "reference.mrc", coarse, pixel_size=PIXEL * BOX / smaller)
    return Poses(rotations, shifts * PIXEL)


def run(folder: Path, *, workers: int = 1, **parameters) -> Path:
    settings = {
        "particles": Path("particles.star"),
        "reference": Path("reference.mrc"),
        "diameter": DIAMETER,
        "initial_lowpass": 25.0,
        "most_iterations": 7,
    }
    options = RunOptions(workers=workers, device="cpu")
    return Project.at(folder).run(RefineStep(**(settings | parameters)), options).folder


def errors(job: Path, poses: Poses, group: str = "C1") -> torch.Tensor:
    found = read_particles(job / "particles.star").poses
    return symmetric_distance(found.rotations.double(), poses.rotations, group)
