"""Classifications with truth that `train_select.py` learns from: many structures, and the junk of picks.

The images are made as those of `class2d_data.py`, with other structures, boxes, pixels, defoci, ratios of
signal to noise and shares of junk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

import class2d_data
from halfmap.io.images import ImageStack
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.tables import read_particles
from halfmap.ops import fourier, rotations
from halfmap.ops.slices import SliceVolume, project_volume


@dataclass(frozen=True)
class Scene:
    """One data set.

    Parameters
    ----------
    models : tuple of 3 str
        Atomic models.
    longest_A : float
        Longest distance within any of them.
    shares : tuple of 3 float
        Of the structures among those that are no junk.
    junk : float
        Share of junk.
    box, pixel_A, snr, defocus_A, shift_A, n : numbers
        Of the images; the defoci are least and greatest.
    classes : tuple of int
        Numbers of classes, a classification each.
    neighbours : float
        Share of the good particles that have another one beside them in the box.
    """

    models: tuple[str, str, str]
    longest_A: float
    shares: tuple[float, float, float]
    junk: float
    box: int
    pixel_A: float
    snr: float
    classes: tuple[int, ...]
    neighbours: float = 0.15
    defocus_A: tuple[int, int] = (8000, 25000)
    shift_A: float = 6.0
    n: int = 1200


SCENES = {
    "spike": Scene(
        ("6xr8.pdb.gz", "1wcm.pdb.gz", "6qi8.cif.gz"), 184, (0.5, 0.3, 0.2), 0.2, 72, 3.6, 0.10, (14, 24)
    ),
    "channels": Scene(
        ("6mhs.pdb.gz", "2j8s.pdb.gz", "6vyk.pdb.gz"), 145, (0.6, 0.3, 0.1), 0.12, 64, 3.3, 0.10, (12, 20)
    ),
    "receptor": Scene(
        ("3kg2.pdb.gz", "4zxb.cif.gz", "5jzt.pdb.gz"), 188, (0.4, 0.3, 0.3), 0.3, 72, 3.6, 0.12, (14, 22)
    ),
    "ribosome": Scene(
        ("30Srib.pdb.gz", "1yyf.cif.gz", "2qrv.pdb.gz"),
        *(249, (0.6, 0.25, 0.15), 0.15, 80, 4.3, 0.12, (15, 24)),
        defocus_A=(10000, 30000),
    ),
    "small": Scene(
        ("4iib.pdb.gz", "2bs2.pdb.gz", "1exb.pdb.gz"),
        *(133, (0.4, 0.4, 0.2), 0.2, 64, 3.0, 0.07, (10, 20)),
        defocus_A=(6000, 20000),
    ),
    "nucleosome": Scene(
        ("1kx5.pdb.gz", "1igt.cif.gz", "1lnl.pdb.gz"), 169, (0.5, 0.2, 0.3), 0.25, 64, 3.8, 0.15, (12, 24)
    ),
    "enzyme": Scene(
        ("1e6v.pdb.gz", "1n2c.pdb.gz", "5fuu.pdb.gz"),
        *(146, (0.7, 0.2, 0.1), 0.1, 64, 3.4, 0.20, (12, 22)),
        defocus_A=(5000, 15000),
    ),
    "transporter": Scene(
        ("6m17.pdb.gz", "7cec.cif.gz", "7pbl.pdb.gz"),
        *(216, (0.6, 0.2, 0.2), 0.35, 72, 4.0, 0.14, (12, 20)),
        shift_A=9.0,
    ),
}
"""Structures that no test of the selection holds."""

CROWD = 1.5
"""Neighbours of a particle in crowded micrographs, on average."""

_DONE = "neighbours_added"
SHORT = "--iterations 12 --full-iterations 3"
JUNK = ("noise", "fragment", "pair", "crystal", "carbon")


def configure(name: str) -> None:
    """Tell the maker of the benchmark's data of another data set, which it knows by constants."""
    scene = SCENES[name]
    settings = {
        "BOX": scene.box,
        "PIXEL_A": scene.pixel_A,
        "SNR": scene.snr,
        "SEED": 100 + list(SCENES).index(name),
        "STRUCTURES": dict(zip(("first", "second", "third"), scene.models, strict=True)),
        "SHARES": {
            key: (1 - scene.junk) * share
            for key, share in zip(("first", "second", "third"), scene.shares, strict=True)
        },
        "JUNK": {key: scene.junk / (3 if key == "noise" else 6) for key in JUNK},
        "LONGEST_A": scene.longest_A,
    }
    settings["SIMULATED"] = (
        f"--pixel-size {scene.pixel_A} --box-size {scene.box} --defocus-min {scene.defocus_A[0]}"
        f" --defocus-max {scene.defocus_A[1]} --shift {scene.shift_A} --per-micrograph 100"
        f" --seed {settings['SEED']}"
    )
    for key, value in settings.items():
        setattr(class2d_data, key, value)


def make(name: str, folder: Path, models: Path, runs: int = 2) -> list[Path]:
    """Simulate a data set and classify it with each number of classes, up to `runs` of them; the jobs."""
    scene, own = SCENES[name], folder / name
    mask_A = 1.15 * scene.longest_A
    configure(name)
    class2d_data.make(own, models, scene.n)
    if not (own / _DONE).exists():
        _add_neighbours(scene, own, np.random.default_rng([class2d_data.SEED, 2]))
        (own / _DONE).touch()
    done = list(own.glob("Class2D/*/RELION_JOB_EXIT_SUCCESS"))
    for classes in scene.classes[len(done) : runs]:
        words = f"class2d particles.star --classes {classes} --diameter {mask_A:.0f} --seed {classes}"
        class2d_data.halfmap(f"{words} {SHORT}", own)
    return sorted(path.parent for path in own.glob("Class2D/*/RELION_JOB_EXIT_SUCCESS"))


def _add_neighbours(scene: Scene, folder: Path, rng: Generator) -> None:
    """Add another molecule beside some of the good particles, as far as the box shows it; no junk is that."""
    rows = read_particles(folder / "particles.star").rows
    counts = (is_good(kinds(folder, folder)) & (rng.random(len(rows)) < scene.neighbours)).astype(int)
    stacks = rows["rlnImageName"].str.split("@").list.last()
    for (name,), part in rows.with_row_index().group_by(stacks, maintain_order=True):
        images = torch.from_numpy(read_mrc(folder / str(name)).copy())
        images = _beside_others(folder, part, images, counts[part["index"].to_numpy()], rng)
        write_mrc(folder / str(name), images.numpy(), pixel_size=scene.pixel_A)


def crowded(name: str, folder: Path, job: Path) -> Tensor:
    """Images of a classification's particles, good and bad, as they would be in crowded micrographs.

    The classification was that of the images without these neighbours, which its mask leaves out but for
    their rims.
    """
    configure(name)
    rng = np.random.default_rng([class2d_data.SEED, 3])
    rows = read_particles(job / "particles.star").rows
    images = torch.from_numpy(ImageStack(rows["rlnImageName"], root=folder).read(np.arange(len(rows))))
    return _beside_others(folder, rows, images, rng.poisson(CROWD, len(rows)), rng)


def _beside_others(
    folder: Path, rows: pl.DataFrame, images: Tensor, counts: NDArray[np.int_], rng: Generator
) -> Tensor:
    """Images with as many other molecules beside each as `counts` says, normalised again."""
    scale = float(read_particles(folder / "Simulate/job001/particles.star").optics["hmSignalScale"][0])
    maps = class2d_data.truth_maps(folder)
    for place, (row, count) in enumerate(zip(rows.iter_rows(named=True), counts, strict=True)):
        if count:
            others = torch.stack([_neighbour(maps, rng) for _ in range(count)]).sum(0)
            images[place] += scale * class2d_data.imaged(others, row)
    return class2d_data.normalised(images)


def _neighbour(maps: list[SliceVolume], rng: Generator) -> Tensor:
    """Projected potential of a molecule about as near to the one in the centre as touching allows."""
    box = class2d_data.BOX
    away, angle = rng.uniform(0.8, 1.2) * class2d_data.LONGEST_A / class2d_data.PIXEL_A, rng.uniform(0, 6.283)
    turn = rotations.random_rotations(1, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))[0]
    field = torch.zeros(2 * box, 2 * box)
    field[box // 2 : -box // 2, box // 2 : -box // 2] = project_volume(maps[int(rng.integers(3))], turn)
    shift = away * np.array([np.cos(angle), np.sin(angle)])
    return fourier.shift_image(field, shift_px=torch.from_numpy(shift))


def kinds(folder: Path, job: Path) -> NDArray[np.str_]:
    """What the particles of a classification are, in the order of its table."""
    truth = pl.read_csv(folder / "truth.csv")
    named = dict(zip(truth["image"], truth["kind"], strict=True))
    return np.array([named[name] for name in read_particles(job / "particles.star").rows["rlnImageName"]])


def is_good(names: NDArray[np.str_]) -> NDArray[np.bool_]:
    """Which particles show a whole structure."""
    return ~np.isin(names, JUNK)
