"""Particles with truth for `class2d.py`: three structures, and the junk that picks bring along.

One run of `halfmap simulate particles` makes them all: the structures, fragments of two of them, and images
of a single atom, which are noise. To some of the latter pairs of touching molecules, ice crystals and the
edge of a carbon film are added, imaged by the lens at that row's defocus. So junk shares micrographs, CTFs
and noise with the rest. Every image is normalised as extraction does it.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import polars as pl
import torch
from numpy.random import Generator
from torch import Tensor

from halfmap.data import ParticleSet
from halfmap.io.images import ImageStack
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops import fourier, grids, rotations
from halfmap.ops.ctf import ctf
from halfmap.ops.slices import SliceVolume, prepare_volume, project_volume

BOX, PIXEL_A, SNR, SEED, N = 128, 2.0, 0.05, 6, 10_000
STRUCTURES = {"galactosidase": "5a1a.cif.gz", "proteasome": "t20s.pdb.gz", "hydroxylase": "4gam.pdb.gz"}
"""435, 606 and 240 kDa; their longest distances are 177, 173 and 124 Å."""

SHARES = {"galactosidase": 0.54, "proteasome": 0.27, "hydroxylase": 0.09}
JUNK = {"noise": 1 / 30, "fragment": 1 / 60, "pair": 1 / 60, "crystal": 1 / 60, "carbon": 1 / 60}
LONGEST_A = 177.0
MASK_A = 200.0
"""Diameter of the mask, given to every program."""

ICE_V, CARBON_V_A = 4.57, 1080.0
"""Mean potential of ice, and that of a carbon film of 120 Å over its thickness."""

SIMULATED = (
    f"--pixel-size {PIXEL_A} --box-size {BOX} --defocus-min 8000 --defocus-max 25000 --shift 7"
    f" --per-micrograph 100 --seed {SEED}"
)


def halfmap(words: str, folder: Path) -> None:
    """Run a step in a project's folder to its end."""
    command = [sys.executable, "-m", "halfmap", *words.split(), "--project", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"halfmap {words} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def half_a_molecule(source: Path, path: Path, rng: Generator) -> None:
    """Write the atoms on one side of a random plane through the middle."""
    structure = gemmi.read_structure(str(source))
    model = structure[0]
    middle, normal = model.calculate_center_of_mass(), gemmi.Vec3(*rng.standard_normal(3))
    for chain in model:
        for residue in chain:
            for i in range(len(residue) - 1, -1, -1):
                if normal.dot(residue[i].pos - middle) < 0:
                    del residue[i]
    structure.remove_empty_chains()
    structure.make_mmcif_document().write_file(str(path))


def single_atom(path: Path) -> None:
    """Write a model of one atom, whose image is nothing beside the noise."""
    atom, residue = gemmi.Atom(), gemmi.Residue()
    atom.name, atom.element, atom.b_iso = "CA", gemmi.Element("C"), 20.0
    residue.name, residue.seqid = "GLY", gemmi.SeqId("1")
    residue.add_atom(atom)
    chain, model, structure = gemmi.Chain("A"), gemmi.Model(1), gemmi.Structure()
    chain.add_residue(residue)
    model.add_chain(chain)
    structure.add_model(model)
    structure.setup_entities()
    structure.make_mmcif_document().write_file(str(path))


def simulate(folder: Path, models: Path, n: int) -> ParticleSet:
    """Images of structures, fragments and nothing, before the other junk is added; made once."""
    job = folder / "Simulate/job001"
    if (job / "RELION_JOB_EXIT_SUCCESS").exists():
        return read_particles(job / "particles.star")
    rng = np.random.default_rng(SEED)
    sources = [models / name for name in STRUCTURES.values()]
    for i in (0, 1):
        half_a_molecule(sources[i], folder / f"half{i + 1}.cif", rng)
    single_atom(folder / "atom.cif")
    names = [*map(str, sources), "half1.cif", "half2.cif", "atom.cif"]
    empty = sum(JUNK.values()) - JUNK["fragment"]
    shares = [*SHARES.values(), JUNK["fragment"] / 2, JUNK["fragment"] / 2, empty]
    # The ratio is asked of the mean over all images, of which the empty ones have no signal.
    snr = SNR * (sum(SHARES.values()) + JUNK["fragment"] / 2)
    words = f"simulate particles --models {' '.join(names)} --fractions {' '.join(map(str, shares))}"
    halfmap(f"{words} {SIMULATED} --snr {snr} --n-particles {n}", folder)
    return read_particles(job / "particles.star")


def truth_maps(folder: Path) -> list[SliceVolume]:
    """Potentials of the three structures, ready for projections."""
    job = folder / "Simulate/job001"
    paths = [job / "truth_map.mrc", job / "truth_map_class002.mrc", job / "truth_map_class003.mrc"]
    return [prepare_volume(torch.from_numpy(read_mrc(path).astype(np.float32))) for path in paths]


def imaged(potential: Tensor, row: dict[str, float]) -> Tensor:
    """Part of a larger projected potential (2n, 2n) that the lens images into the box (n, n)."""
    big = tuple(potential.shape)
    angles = {name: row[f"rlnDefocus{label}"] for name, label in (("u", "U"), ("v", "V"), ("angle", "Angle"))}
    transfer = ctf(
        big,
        pixel_size=PIXEL_A,
        defocus_u=angles["u"],
        defocus_v=angles["v"],
        defocus_angle=angles["angle"],
        voltage_kV=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.1,
    )
    image = fourier.irfft2(fourier.rfft2(potential) * transfer, shape=big)
    edge = big[0] // 2 - BOX // 2
    return image[edge : edge + BOX, edge : edge + BOX]


def pair(maps: list[SliceVolume], rng: Generator) -> Tensor:
    """Two molecules that touch or overlap, the box about the middle between them."""
    gap, angle = rng.uniform(0.6, 0.95) * LONGEST_A / PIXEL_A, rng.uniform(0, 2 * math.pi)
    away = 0.5 * gap * np.array([math.cos(angle), math.sin(angle)])
    middle = rng.normal(0, 5, 2)
    field = torch.zeros(2 * BOX, 2 * BOX)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    for side in (-1, 1):
        which = int(rng.choice(3, p=np.array(list(SHARES.values())) / sum(SHARES.values())))
        turn = rotations.random_rotations(1, generator=generator)[0]
        one = torch.zeros_like(field)
        one[BOX // 2 : -BOX // 2, BOX // 2 : -BOX // 2] = project_volume(maps[which], turn)
        field += fourier.shift_image(one, shift_px=torch.from_numpy(middle + side * away))
    return field


def crystal(rng: Generator) -> Tensor:
    """Potential of a lump of ice with an irregular outline."""
    y, x = (np.arange(2 * BOX) - BOX) * PIXEL_A, (np.arange(2 * BOX) - BOX) * PIXEL_A
    place, radius = rng.normal(0, 30, 2), rng.uniform(60, 150)
    dx, dy = np.meshgrid(x - place[0], y - place[1])
    angle = np.arctan2(dy, dx)
    outline = 1.0 + sum(
        rng.normal(0, 0.3 / order) * np.cos(order * angle + rng.uniform(0, 2 * math.pi))
        for order in range(2, 7)
    )
    depth = 1 - (np.hypot(dx, dy) / (radius * np.clip(outline, 0.4, 1.6))) ** 2
    height = rng.uniform(3, 10) * radius * np.sqrt(np.clip(depth, 0, None))
    return torch.from_numpy((ICE_V * height / PIXEL_A).astype(np.float32))


def carbon(rng: Generator) -> Tensor:
    """Potential of the rough edge of a carbon film through the box, with the film's own structure."""
    y, x = np.meshgrid(*[(np.arange(2 * BOX) - BOX) * PIXEL_A] * 2, indexing="ij")
    angle, place = rng.uniform(0, 2 * math.pi), rng.uniform(-80, 80)
    across, along = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    rough = sum(
        rng.normal(0, 8) * np.cos(2 * math.pi * along / wave + rng.uniform(0, 6.3)) for wave in (70, 160, 400)
    )
    film = 1 / (1 + np.exp(-np.clip((across - place - rough) / 8, -30, 30)))
    k = grids.frequency_radius((2 * BOX, 2 * BOX), PIXEL_A)
    white = torch.from_numpy(rng.standard_normal((2 * BOX, 2 * BOX), dtype=np.float32))
    texture = fourier.irfft2(fourier.rfft2(white) * torch.exp(-((6 * k) ** 2)), shape=white.shape)
    texture *= 0.05 / texture.std()
    return torch.from_numpy(film.astype(np.float32)) * (1 + texture) * (CARBON_V_A / PIXEL_A)


def normalised(images: Tensor) -> Tensor:
    """Images (n, box, box) whose background, beyond 1.25 times the particle, has mean 0 and deviation 1."""
    beyond = grids.radius((BOX, BOX), PIXEL_A) > 1.25 * LONGEST_A / 2
    around = images[:, beyond]
    return (images - around.mean(1)[:, None, None]) / around.std(1)[:, None, None]


def kinds_of(states: np.ndarray, rng: Generator) -> np.ndarray:
    """Name every image: a structure, or a kind of junk, of which the simulation left the noise to fill."""
    names = np.array([*STRUCTURES, "fragment", "fragment", "noise"], dtype="U16")[states - 1]
    empty = rng.permutation(np.flatnonzero(names == "noise"))
    # Two of five are left empty, one each becomes a pair, a crystal, an edge of carbon.
    for i, kind in enumerate(("noise", "noise", "pair", "crystal", "carbon")):
        names[empty[i::5]] = kind
    return names


def make(folder: Path, models: Path, n: int = N) -> Path:
    """Write ``particles.star``, its stacks and ``truth.csv`` unless they are there; the folder."""
    if (folder / "truth.csv").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    table = simulate(folder, models, n)
    rows, rng = table.rows, np.random.default_rng([SEED, 1])
    kinds = kinds_of(rows["rlnClassNumber"].to_numpy(), rng)
    maps, scale = truth_maps(folder), float(table.optics["hmSignalScale"][0])
    stack = ImageStack(rows["rlnImageName"], root=folder)
    makers = {"pair": lambda: pair(maps, rng), "crystal": lambda: crystal(rng), "carbon": lambda: carbon(rng)}
    (folder / "Particles").mkdir(exist_ok=True)
    names: list[str] = []
    for first in range(0, n, 100):
        which = np.arange(first, min(first + 100, n))
        images = torch.from_numpy(stack.read(which))
        for j in which:
            if kinds[j] in makers:
                images[j - first] += scale * imaged(makers[kinds[j]](), rows.row(int(j), named=True))
        name = f"Particles/{first // 100 + 1:06d}.mrcs"
        write_mrc(folder / name, normalised(images).numpy(), pixel_size=PIXEL_A)
        names += [f"{i + 1:06d}@{name}" for i in range(len(which))]
    known = [
        "rlnMicrographName",
        "rlnOpticsGroup",
        "rlnDefocusU",
        "rlnDefocusV",
        "rlnDefocusAngle",
        "rlnPhaseShift",
    ]
    told = rows.select(pl.Series("rlnImageName", names), *known)
    optics = table.optics.drop("hmSignalScale")
    for count, file in ((n, "particles.star"), (3000, "particles_3000.star"), (1000, "particles_1000.star")):
        write_particles(folder / file, ParticleSet(optics, told.head(count)))
    poses = rows.select("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst")
    described(folder, kinds, table, maps, scale)
    truth = pl.DataFrame({"row": np.arange(n), "image": names, "kind": kinds}).hstack(poses)
    truth.write_csv(folder / "truth.csv.part")
    (folder / "truth.csv.part").rename(folder / "truth.csv")
    return folder


def described(
    folder: Path, kinds: np.ndarray, table: ParticleSet, maps: list[SliceVolume], scale: float
) -> None:
    """Write ``about.json``: how many of each kind, and the structures' ratios of signal to noise."""
    inside = grids.radius((BOX, BOX), PIXEL_A) < LONGEST_A / 2
    about: dict[str, dict[str, float]] = {}
    for kind, count in zip(*np.unique(kinds, return_counts=True), strict=True):
        about[str(kind)] = {"particles": int(count)}
    for i, name in enumerate(STRUCTURES):
        some = np.flatnonzero(kinds == name)[:300]
        part = table.select(np.isin(np.arange(len(table)), some))
        clean = fourier.rfft2(project_volume(maps[i], part.poses.rotations))
        # The simulation's envelope is not in the table.
        settings: dict[str, Any] = part.ctf.for_ctf() | {"b_factor": 20.0}
        lens = ctf((BOX, BOX), **settings)
        clean = fourier.irfft2(clean * lens, shape=(BOX, BOX))
        about[name]["SNR"] = round(float(scale**2 * clean[:, inside].var(1).mean()), 4)
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")
