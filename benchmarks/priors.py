"""Refinements of the same simulated particles by each regulariser: what they gain, and what they invent.

β-galactosidase (D2), the same with views of which most are within 40° of its axis, the maltose transporter
(C1) in a detergent belt that is another in every one of a dozen states, and β-galactosidase with much more
noise. Same particles, half sets, seeds and start for all. Resolutions are of unregularised half maps, and of
these against the truth: in a soft sphere, and about the atoms alone; Q-score and FSC-Q (`halfmap fit`) are
of the mean of both half maps, post-processed, at the model's true place. The worst direction is that of 300
cones in which map and truth agree least far. Attraction is the part of the poses wrong by 15° or more that is
too many in some direction (nothing where hardly any are).

As a warning, half maps are compared at 0.5 once more after the network of the learned regulariser has told of
each what it is of; beside it is how much of that is true.

Controls: particles that were low-passed at 5 and at 8 Å, and 2,000 of noise alone against a map at 30 Å.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor

from class2d import last_job, rounded, timed
from class2d_data import halfmap
from halfmap.data import ParticleSet
from halfmap.errors import ParameterError
from halfmap.io.model_files import read_model_file
from halfmap.io.models import AtomicModel, read_model
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_particles, write_particles
from halfmap.nets.weights import shipped
from halfmap.ops import symmetry
from halfmap.ops.attraction import attraction
from halfmap.ops.directional_fsc import directional_fsc
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft2, irfft3, rfft2, rfft3
from halfmap.ops.fsc import corrected_fsc, fsc, resolution
from halfmap.ops.masks import around_points, soft_edge, soft_sphere
from halfmap.ops.rotations import angular_distance
from halfmap.search.halfmaps import believed
from halfmap.search.model_density import model_map
from halfmap.search.regularise.learned import WEIGHTS, Learned, posterior_mean

SEED, START_A = 5, 40.0
POSES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst", "rlnClassNumber")
REGULARISERS = "fsc", "nonuniform", "sidesplitter", "learned"
CONE_DEG, OTHERS = 40.0, 0.05
"""Views that are kept, and the share of all others that is."""

STATES = 12
"""Of the detergent."""


@dataclass(frozen=True)
class Case:
    """Particles to be refined: model, how they are made, point group, and the sphere around them in Å."""

    model: str
    words: str
    group: str
    diameter: float
    start_A: float = START_A
    views: Literal["all", "cone"] = "all"
    belt: bool = False
    images: Literal["as simulated", "noise"] | float = "as simulated"


_GALACTOSIDASE = Case(
    "5a1a.cif.gz",
    "--box-size 160 --pixel-size 1.5 --n-particles 3000 --envelope-b-factor 120 --snr 0.04",
    "D2",
    205.0,
)

CASES = {
    "galactosidase": _GALACTOSIDASE,
    "noise x5": replace(_GALACTOSIDASE, words=_GALACTOSIDASE.words.replace("0.04", "0.008")),
    "noise x10": replace(_GALACTOSIDASE, words=_GALACTOSIDASE.words.replace("0.04", "0.004")),
    "cone": replace(_GALACTOSIDASE, words=_GALACTOSIDASE.words.replace("3000", "12000"), views="cone"),
    "belt": Case(
        "2r6g.pdb.gz", "--box-size 128 --pixel-size 1.6 --n-particles 3000 --snr 0.03", "C1", 170.0, belt=True
    ),
    "passed at 5": replace(_GALACTOSIDASE, images=5.0),
    "passed at 8": replace(_GALACTOSIDASE, images=8.0),
    "noise alone": replace(
        _GALACTOSIDASE, words=_GALACTOSIDASE.words.replace("3000", "2000"), start_A=30.0, images="noise"
    ),
}


def make(folder: Path, models: Path, case: Case) -> None:
    """Simulate particles, and write them without poses, with half sets, and the reference; made once."""
    if (folder / "input.star").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    box, pixel_size = int(_value(case, "--box-size")), _value(case, "--pixel-size")
    specimen = str(models / case.model)
    if case.belt:
        specimen = " ".join(map(str, in_detergent(folder, models / case.model, box, pixel_size)))
    halfmap(f"simulate particles {specimen} {case.words} --shift 4 --seed 12 --workers 2", folder)
    job = folder / "Simulate/job001"
    particles = read_particles(job / "particles.star")
    kept = np.ones(len(particles), bool)
    rng = np.random.default_rng(SEED)
    if case.views == "cone":
        tilt = particles.rows["rlnAngleTilt"].to_numpy()
        near = np.minimum(tilt, 180 - tilt) < CONE_DEG
        kept = near | (rng.random(len(tilt)) < OTHERS)
    particles = particles.select(kept)
    n = len(particles)
    halves = rng.permutation(np.arange(n) % 2) + 1
    write_particles(folder / "truth.star", particles)
    rows = particles.rows.drop(*(name for name in POSES if name in particles.rows.columns))
    rows = rows.with_columns(pl.Series("rlnRandomSubset", halves))
    truth = model_map(
        read_model(models / case.model).centred(),
        shape=(box,) * 3,
        pixel_size=pixel_size,
        origin=[-(box // 2) * pixel_size] * 3,
    )
    passed = low_pass(tuple(truth.shape), pixel_size=pixel_size, resolution=case.start_A)
    write_mrc(folder / "truth.mrc", truth.numpy(), pixel_size=pixel_size)
    place = (box // 2) * pixel_size - read_model(models / case.model).centre
    read_model_file(models / case.model).write(
        folder / "model.cif", rotation=np.eye(3), shift=place, columns={}
    )
    reference = irfft3(rfft3(truth) * passed, shape=tuple(truth.shape))
    write_mrc(folder / "reference.mrc", reference.numpy(), pixel_size=pixel_size)
    if case.images != "as simulated":
        for path in sorted((job / "Particles").glob("*.mrcs")):
            spoil(path, case.images, pixel_size)
    write_particles(folder / "input.star", ParticleSet(particles.optics, rows))


def _value(case: Case, option: str) -> float:
    words = case.words.split()
    return float(words[words.index(option) + 1])


def in_detergent(folder: Path, path: Path, box: int, pixel_size: float) -> list[Path]:
    """Maps of a membrane protein in belts of the same shape and another content each.

    The belt is where hydrophobic residues face outwards the most: here, about the middle third of the longest
    axis of inertia.
    """
    model = read_model(path).centred()
    shape = (box,) * 3
    volume = model_map(model, shape=shape, pixel_size=pixel_size, origin=[-(box // 2) * pixel_size] * 3)
    _, _, axes = np.linalg.svd(model.positions - model.positions.mean(0), full_matrices=False)
    axis = torch.from_numpy(axes[0].copy()).float()
    place = (torch.arange(box) - box // 2) * pixel_size
    z, y, x = torch.meshgrid(place, place, place, indexing="ij")
    height = x * axis[0] + y * axis[1] + z * axis[2]
    distance = (x.square() + y.square() + z.square() - height.square()).clamp_min(0).sqrt()
    inside = about(model, box, pixel_size, reach=3.0).float()
    along = torch.from_numpy(model.positions).float() @ axis
    off = torch.from_numpy(model.positions).float() - along[:, None] * axis
    reach = float(off[along.abs() < 15].norm(dim=1).quantile(0.9))
    belt = ((height.abs() < 16) & (distance < reach + 22)).float() * (1 - inside)
    level = 0.6 * float(volume[inside > 0.5].mean())
    soft = low_pass(shape, pixel_size=pixel_size, resolution=8.0)
    found = []
    for state in range(STATES):
        generator = torch.Generator().manual_seed(state)
        content = 1 + irfft3(rfft3(torch.randn(shape, generator=generator)) * soft, shape=shape) * 4
        file = folder / f"belt{state + 1}.mrc"
        write_mrc(file, (volume + level * belt * content).numpy(), pixel_size=pixel_size)
        found.append(file)
    return found


def about(model: AtomicModel, box: int, pixel_size: float, *, reach: float) -> Tensor:
    """Voxels (box, box, box) within some Å of an atom."""
    points = model.positions / pixel_size + box // 2
    return torch.from_numpy(around_points((box,) * 3, points, radius_px=reach / pixel_size))


def spoil(stack: Path, images: str | float, pixel_size: float) -> None:
    """Write white noise over a stack of particles, or pass them low."""
    old = torch.from_numpy(np.array(read_mrc(stack), np.float32))
    if isinstance(images, str):
        new = torch.randn(old.shape, generator=torch.Generator().manual_seed(int(stack.stem)))
    else:
        shape = tuple(old.shape[1:])
        new = irfft2(rfft2(old) * low_pass(shape, pixel_size=pixel_size, resolution=images), shape=shape)
    write_mrc(stack, new.numpy(), pixel_size=pixel_size, stack=True)


def refined(folder: Path, models: Path, case: Case, regulariser: str, workers: int) -> dict[str, Any]:
    """Refine by a regulariser, and compare with the truth."""
    words = f"refine input.star --reference reference.mrc --symmetry {case.group} --diameter {case.diameter}"
    words += f" --initial-lowpass {case.start_A} --regulariser {regulariser} --workers {workers} --project ."
    seconds = timed([sys.executable, "-m", "halfmap", *words.split()], folder, folder / "refine.log")
    job = last_job(folder, "Refine")
    general = read_star(job / "model.star")["model_general"]
    row = {"regulariser": regulariser, "iterations": general["rlnCurrentIteration"]}
    row["half maps Å"] = general["rlnCurrentResolution"]
    row["pose error °"] = float(np.median(read_particles(job / "particles.star").rows["hmPoseUncertainty"]))
    row["came on"] = "maps are filtered by" in (folder / "refine.log").read_text()
    row |= seconds
    return row if case.images == "noise" else row | against_truth(folder, models, case, job)


def against_truth(folder: Path, models: Path, case: Case, job: Path) -> dict[str, Any]:
    """How far the mean of the half maps is right, in Å, and Q-scores of the model in it."""
    halves = [job / f"run_half{i}_class001_unfil.mrc" for i in (1, 2)]
    first, second, truth = (_read(path) for path in (*halves, folder / "truth.mrc"))
    pixel_size = read_header(folder / "truth.mrc").pixel_size
    assert pixel_size is not None
    box, mean = len(truth), (first + second) / 2
    model = read_model(models / case.model).centred()
    near = soft_edge(about(model, box, pixel_size, reach=4.0), width=6.0, pixel_size=pixel_size)
    sphere = soft_sphere((box,) * 3, radius=case.diameter / 2, edge=8.0, pixel_size=pixel_size)

    def half(one: Tensor, other: Tensor, threshold: float = 0.5) -> float:
        return resolution(fsc(one, other), pixel_size=pixel_size, box=box, threshold=threshold)

    def agrees(mask: Tensor) -> float:
        return half(mean * mask, truth * mask)

    mask = _read(job / "mask.mrc")
    generator = torch.Generator().manual_seed(SEED)
    curve = believed(corrected_fsc(first, second, mask=mask, generator=generator).corrected.float())
    network = Learned(shipped(WEIGHTS)).network()
    told = [posterior_mean(each, mask, curve, *network) * mask for each in (first, second)]
    cones = directional_fsc(mean * near, truth * near)
    ends = box * pixel_size / cones.last_shells(0.5).clamp_min(1)
    halfmap(f"postprocess {halves[0]} --mask {job / 'mask.mrc'}", folder)
    sharp = last_job(folder, "PostProcess") / "postprocess.mrc"
    halfmap(f"fit {sharp} --model model.cif --half1 {halves[0]} --mask {job / 'mask.mrc'}", folder)
    fitted = read_star(last_job(folder, "Fit") / "fit.star")
    return {
        "truth 0.5 Å": agrees(sphere),
        "atoms 0.5 Å": agrees(near),
        "worst direction Å": float(ends.max()),
        "median direction Å": float(ends.median()),
        "Q-score": fitted["general"]["hmQScore"],
        "FSC-Q Å": float(np.nanmean(fitted["residues"]["hmFscQ"])),
        "half maps 0.5 Å": half(first * mask, second * mask),
        "network's 0.5 Å": half(*told),
        # Of one half map, whose square half maps of equal merit agree to.
        "of it true Å": half(told[0], truth * mask, 0.5**0.5),
        **of_poses(folder, case, job),
    }


def of_poses(folder: Path, case: Case, job: Path) -> dict[str, float | None]:
    """How far poses are off, in degrees, and how much some directions attract those that are wrong."""
    truth, found = (
        read_particles(path).poses.rotations.double()
        for path in (folder / "truth.star", job / "particles.star")
    )
    turns = symmetry.operators(case.group).double()
    off = torch.stack([angular_distance(found, truth @ turn) for turn in turns]).amin(0)
    row: dict[str, float | None] = {
        "turned °": float(off.median()),
        "off by 15° %": 100 * float((off > 15).double().mean()),
    }
    try:
        row["attraction"] = attraction(truth, found, group=case.group).index
    except ParameterError:
        row["attraction"] = None
    return row


def _read(path: Path) -> Tensor:
    return torch.from_numpy(np.array(read_mrc(path), np.float32))


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
    print("  ".join(f"{name} {cell}" for name, cell in zip(row, cells, strict=True)), flush=True)


def main() -> None:
    """Make the data where they are not yet, refine, print, and keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("../shared/data/models"))
    parser.add_argument("--scratch", type=Path, required=True, help="folder of projects, kept")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--regularisers", nargs="*", default=list(REGULARISERS))
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    models = options.models.resolve()
    for name in options.cases:
        case, folder = CASES[name], (options.scratch / name.replace(" ", "_")).resolve()
        make(folder, models, case)
        for regulariser in options.regularisers:
            row = {"data": name} | refined(folder, models, case, regulariser, options.workers)
            show(row)
            keep(row)


def keep(row: dict[str, Any]) -> None:
    """Put a row in the place of the one before it of the same data and regulariser."""
    path = Path(__file__).parent / "results" / "priors.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [each for each in rows if any(each[name] != row[name] for name in ("data", "regulariser"))]
    machine = platform.processor() or platform.machine()
    path.write_text(json.dumps(rounded({"machine": machine, "rows": [*rows, row]}), indent=1) + "\n")


if __name__ == "__main__":
    main()
