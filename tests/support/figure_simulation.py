"""Projects of simulated figures to be classified in two dimensions, with what was put in."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import torch

from halfmap.data import ParticleSet
from halfmap.engine import Context, RunOptions
from halfmap.io.mrc import write_mrc
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.ctf import ctf
from halfmap.project import Project
from halfmap.search.particles import ParticleImages
from halfmap.steps.class2d import plan
from halfmap.steps.class2d.step import Class2DStep

BOX, PIXEL, DIAMETER, N = 48, 3.0, 100.0, 240
OPTICS = {
    "rlnOpticsGroup": [1, 2],
    "rlnOpticsGroupName": ["one", "two"],
    "rlnVoltage": [300.0, 200.0],
    "rlnSphericalAberration": [2.7, 2.7],
    "rlnAmplitudeContrast": [0.1, 0.1],
    "rlnImagePixelSize": [PIXEL, PIXEL],
    "rlnImageSize": [BOX, BOX],
    "rlnImageDimensionality": [2, 2],
}
FIGURES = (
    ((0.0, 12.0), (9.0, -6.0), (-9.0, -6.0), (0.0, 3.0)),
    ((-13.0, 0.0), (-4.0, 2.0), (5.0, 0.0), (13.0, 6.0)),
    ((8.0, 8.0), (-8.0, 8.0), (-8.0, -8.0), (3.0, -9.0)),
)
"""Spots (x, y) of each figure in pixels; none looks the same turned or mirrored."""


def figure(number: int, turn: float, shift: tuple[float, float]) -> np.ndarray:
    """Spots turned by an angle from x towards y, then moved."""
    y, x = np.mgrid[:BOX, :BOX] - BOX // 2
    image = np.zeros((BOX, BOX))
    for a, b in FIGURES[number]:
        px = a * math.cos(turn) - b * math.sin(turn) + shift[0]
        py = a * math.sin(turn) + b * math.cos(turn) + shift[1]
        image += np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 1.6**2))
    return image


def write_project(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write particles of three figures; return the figure (n,), turn (n,) and shift (n, 2) of each."""
    random = np.random.default_rng(5)
    kinds = random.choice(3, N, p=(0.5, 0.3, 0.2))
    turns = random.uniform(-math.pi, math.pi, N)
    shifts = random.normal(0, 1.5, (N, 2))
    defocus = random.uniform(8000, 20000, N)
    groups = np.arange(N) % 2
    # Two micrographs, one with thinner ice.
    strength = np.where(np.arange(N) % 3 == 0, 4.0, 2.5)
    images = []
    for kind, turn, shift, z, group, s in zip(kinds, turns, shifts, defocus, groups, strength, strict=True):
        transfer = ctf(
            (BOX, BOX),
            pixel_size=PIXEL,
            defocus_u=z + 150,
            defocus_v=z - 150,
            defocus_angle=30.0,
            voltage_kV=OPTICS["rlnVoltage"][group],
            cs_mm=2.7,
            amplitude_contrast=0.1,
        )
        clean = torch.fft.rfft2(torch.from_numpy(figure(kind, turn, tuple(shift)))) * transfer
        images.append(torch.fft.irfft2(clean, s=(BOX, BOX)).numpy() * s + random.normal(0, 1, (BOX, BOX)))
    (folder / "Stacks").mkdir()
    half = N // 2
    for name, part in (("a", images[:half]), ("b", images[half:])):
        write_mrc(
            folder / f"Stacks/{name}.mrcs", np.stack(part), pixel_size=PIXEL, dtype=np.float32, stack=True
        )
    rows = pl.DataFrame(
        {
            "rlnImageName": [f"{i % half + 1:06d}@Stacks/{'ab'[i // half]}.mrcs" for i in range(N)],
            "rlnMicrographName": [f"Motion/{'thin' if s > 3 else 'thick'}.mrc" for s in strength],
            "rlnOpticsGroup": groups + 1,
            "rlnDefocusU": defocus + 150,
            "rlnDefocusV": defocus - 150,
            "rlnDefocusAngle": np.full(N, 30.0),
            "someOtherColumn": np.arange(N),
        }
    )
    write_particles(folder / "particles.star", ParticleSet(pl.DataFrame(OPTICS), rows))
    return kinds, turns, shifts


def run(folder: Path, *, workers: int = 1, **parameters):
    settings = {
        "particles": Path("particles.star"),
        "classes": 6,
        "diameter": DIAMETER,
        "resolution": 9.0,
        "iterations": 8,
        "full_iterations": 2,
    }
    options = RunOptions(workers=workers, device="cpu")
    return Project.at(folder).run(Class2DStep(**(settings | parameters)), options).folder


def planned_job(project: Path, **parameters) -> tuple[ParticleImages, plan.Plan]:
    """Images and plan of a classification of the project's particles."""
    settings = {"classes": 6, "diameter": DIAMETER, "resolution": 9.0} | parameters
    step = Class2DStep(particles=Path("particles.star"), **settings)
    ctx = Context(folder=project, project=project)
    return plan.make_plan(step, ctx, read_particles(project / "particles.star"))
