"""Train the general model of `halfmap pick learned` from simulated micrographs of many structures.

Simulates micrographs of every structure under conditions drawn at random, trains on all but the structures
kept for validation, calibrates the scores on half of those, measures the other half, and writes the weights
with their record. Real data are never seen. See docs/pick_learned.md.
"""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial import KDTree
from torch import Tensor

from halfmap.engine import Context
from halfmap.engine.executor import RunOptions
from halfmap.io.images import read_image
from halfmap.io.micrographs import BACKGROUND_A, Image, cropped, flattened
from halfmap.io.mrc import write_mrc
from halfmap.io.star import read_star
from halfmap.log import log, shown_on_terminal
from halfmap.nets.picker import Picker
from halfmap.nets.training import train
from halfmap.nets.weights import save_weights
from halfmap.ops.fourier import irfft2, resize_spectrum, rfft2
from halfmap.ops.grids import frequencies
from halfmap.steps.pick.candidates import Candidates
from halfmap.steps.pick.learned import KIND, PIXELS, by_looks, judged, normalised
from halfmap.steps.pick.learned_examples import Example, batches
from halfmap.steps.simulate import exposure, micrograph, preparation, truth
from halfmap.steps.simulate.specimen import measure
from halfmap.steps.simulate.step import SimulateMicrographs

MODELS = Path(__file__).parents[2] / "shared" / "data" / "models"

VALIDATION = {
    "4hhb": "haemoglobin",
    "1kx5": "nucleosome",
    "6mhs": "TRPV3",
    "5a1a": "beta-galactosidase",
    "t20s": "proteasome",
    "6zu5": "80S ribosome",
}
CALIBRATION = ("4hhb", "6mhs", "t20s")
"""Those of them that the scores are calibrated on."""

HELD_OUT = ("6z6u", "4r8p", "3j5p", "4v5d", "4v6x", "30Srib")
"""Apoferritin, which real micrographs test, and homologues of the structures for validation."""

SKIPPED = (
    "7r6l 6u8k 1n2c 4hg6 2vpz 4q35 3v8x 1m56 3csl 4j3o 3sfd 4gxu 2hmi 1dlo 3e0c 1de4 4gam"
    " 1bgx 3r9a 1wdw 3wip 1fnm 3dl7 1mda 1qba 5agk 2d0f 3kpr 3pwp 1t6b 3hmx 2ajf 1h1v"
)
"""Of a size and shape that others have."""

FIELD_DIAMETERS = 25
PIXELS_PER_DIAMETER = 36
PER_STRUCTURE = 6
LARGEST_KDA = 4500.0
SHAPES = 24
OPTICS = ("defocus_u", "defocus_v", "defocus_angle", "voltage_kV", "cs_mm", "amplitude_contrast")


@dataclass(frozen=True)
class Structure:
    """What to simulate: an atomic model and the assembly to build, or a made-up shape without a file."""

    name: str
    file: str | None
    assembly: str
    seed: int


def list_structures() -> list[Structure]:
    """Structures to train and validate on, in the order of the index, and shapes that the index lacks."""
    table = pl.read_csv(MODELS / "INDEX.csv", infer_schema_length=None)
    found = []
    for number, row in enumerate(table.iter_rows(named=True)):
        name = row["file"].split(".")[0]
        # Assemblies of entire viruses would take an hour each: their protomers are shapes like others.
        whole = float(row["assembly1_mass_kDa"]) <= LARGEST_KDA and "raw rows" not in row["has_assembly"]
        has = row["has_assembly"].startswith("yes")
        assembly = "1" if whole and has else "none"
        mass = float(row["assembly1_mass_kDa"] if assembly == "1" else row["mass_kDa"])
        if name not in (*HELD_OUT, *SKIPPED.split()) and mass > 55:
            found.append(Structure(name, row["file"], assembly, number + 1))
    shapes = [Structure(f"shape{i:02d}", None, "none", 1000 + i) for i in range(SHAPES)]
    return sorted(found, key=lambda structure: structure.name not in VALIDATION) + shapes


def make_shape(path: Path, seed: int) -> float:
    """Write the map of a lumpy shell, barrel or rod of random size and wall; return its diameter in Å."""
    rng = np.random.default_rng(seed)
    diameter = float(np.exp(rng.uniform(np.log(90), np.log(350))))
    n = 80
    # The simulator takes three quarters of a map's edge for the molecule's diameter.
    unit = 2 * (np.arange(n) - n // 2) / (0.75 * n)
    z, y, x = np.meshgrid(unit, unit, unit, indexing="ij")
    lumps = gaussian_filter(rng.standard_normal((n, n, n)), rng.uniform(0.03, 0.08) * n, mode="wrap")
    lumps /= lumps.std()
    wall = rng.uniform(0.2, 0.7)
    length = rng.uniform(0.4, 1.0)
    kind = seed % 4
    if kind < 2:
        distance = np.sqrt(x**2 + (y / rng.uniform(0.8, 1)) ** 2 + (z / rng.uniform(0.8, 1)) ** 2)
    elif kind == 2:
        radius = math.sqrt(1 - (0.7 * length) ** 2)
        distance = np.maximum(np.hypot(x, y) / radius, np.where(np.abs(z) > 0.7 * length, 9.0, 0.0))
    else:
        radius, wall = rng.uniform(0.25, 0.5), 1.0
        distance = np.maximum(np.hypot(x, y) / radius, np.abs(z) / math.sqrt(1 - radius**2))
    inside = (distance + 0.06 * lumps < 0.95) & (distance - 0.06 * lumps > 0.95 * (1 - wall))
    density = gaussian_filter(inside * (1 + 0.35 * lumps), 1.0).astype(np.float32)
    write_mrc(path, density, pixel_size=diameter / (0.75 * n))
    return diameter


def draw_conditions(structure: Structure, source: Path, diameter: float) -> SimulateMicrographs:
    """What all micrographs of a structure share."""
    rng = np.random.default_rng([structure.seed, 0])
    side = FIELD_DIAMETERS * PIXELS_PER_DIAMETER
    return SimulateMicrographs(
        models=(source,),
        assembly=structure.assembly,
        atom_b_factor=60.0,
        pixel_size=diameter / PIXELS_PER_DIAMETER,
        width=side,
        height=side,
        n_micrographs=1,
        preferred_orientation=float(rng.uniform(0, 0.5)),
        broken=0.1,
        seed=structure.seed,
    )


def vary(step: SimulateMicrographs, diameter: float, rng: Generator) -> SimulateMicrographs:
    """Conditions of one more micrograph, drawn at random within what microscopes and specimens do."""
    field = FIELD_DIAMETERS * diameter
    coverage = math.exp(rng.uniform(math.log(0.04), math.log(0.7)))
    defocus = math.exp(rng.uniform(math.log(4000), math.log(35000)))
    return step.model_copy(
        update={
            "particles": round(coverage * FIELD_DIAMETERS**2 / (math.pi / 4)),
            "overlapping": float(rng.choice([0.0, 0.1, 0.4])),
            "broken": float(rng.choice([0.0, 0.1, 0.3])),
            "contaminants": float(rng.choice([0.3, 2.0])) * (field / 4000.0) ** 2,
            "carbon": 0.2,
            "voltage": float(rng.choice([200.0, 300.0])),
            "amplitude_contrast": float(rng.uniform(0.06, 0.12)),
            "defocus_min": defocus,
            "defocus_max": 1.001 * defocus,
            "astigmatism": float(rng.choice([100.0, 800.0])),
            "envelope_b_factor": float(rng.uniform(20, 200)),
            "ice_thickness": max(float(np.exp(rng.uniform(np.log(200), np.log(900)))), 1.1 * diameter),
            "ice_variation": float(rng.uniform(0.02, 0.25)),
            "ice_noise": float(rng.uniform(0.8, 1.8)),
            "efficiency": float(rng.uniform(0.5, 0.9)),
            "dose": float(np.exp(rng.uniform(np.log(15), np.log(70)))),
        }
    )


def simulate_structure(structure: Structure, *, folder: Path) -> dict[str, Any]:
    """Simulate micrographs of one structure and store each with its truth as an npz."""
    torch.set_num_threads(1)
    rng = np.random.default_rng([structure.seed, 1])
    names = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        if structure.file is None:
            source = scratch / "shape.mrc"
            diameter = make_shape(source, structure.seed)
        else:
            source = MODELS / structure.file
            diameter = measure(source, assembly=structure.assembly.replace("none", "") or None).diameter
        step = draw_conditions(structure, source, diameter)
        specimen = preparation.prepare(step, Context(folder=scratch, project=scratch), fragments=True)
        for index in range(PER_STRUCTURE):
            one = vary(step, diameter, rng)
            # Molecules pack closer than their longest distance.
            closer = replace(specimen, diameter=diameter * rng.uniform(0.75, 1.0))
            micrograph.simulate(index, step=one, specimen=closer, folder=scratch)
            names.append(store(structure, one, diameter, index, scratch, folder))
    return {"name": structure.name, "diameter": diameter, "files": names}


def store(
    structure: Structure, step: SimulateMicrographs, diameter: float, index: int, scratch: Path, folder: Path
) -> str:
    """Keep an image with positions, kinds and obstacles."""
    image = read_image(micrograph.micrograph_file(scratch, index))
    blocks = read_star(scratch / truth.FOLDER / f"{exposure.name(index)}.star")
    particles, obstacles = blocks.get("particles"), blocks.get("contaminants")
    columns = ("rlnCoordinateX", "rlnCoordinateY")
    xy = np.zeros((0, 2)) if particles is None else particles.select(columns).to_numpy()
    kind = np.zeros(0, "U11") if particles is None else particles["hmParticleKind"].to_numpy().astype("U11")
    around = np.zeros((0, 3))
    label = np.zeros(0, "U14")
    if obstacles is not None:
        around = obstacles.select(*columns, pl.col("hmRadius") / step.pixel_size).to_numpy()
        label = obstacles["hmContaminant"].to_numpy().astype("U14")
    path = folder / f"{structure.name}_{index}.npz"
    np.savez(
        path,
        image=image.astype(np.float16 if image.max() < 60000 else np.float32),
        xy=xy,
        kind=kind,
        obstacles=around,
        obstacle_kinds=label,
        diameter=diameter,
        pixel_size=step.pixel_size,
        **optics_of(step),
        dose=step.dose,
        ice=step.ice_thickness,
    )
    return path.name


def optics_of(step: SimulateMicrographs) -> dict[str, float]:
    """Arguments of `halfmap.ops.ctf.ctf`, but for the astigmatism, which coarse pixels do not show."""
    values = (
        step.defocus_min,
        step.defocus_min,
        0.0,
        step.voltage,
        step.spherical_aberration,
        step.amplitude_contrast,
    )
    return dict(zip(OPTICS, values, strict=True))


def simulate(folder: Path, workers: int) -> list[dict[str, Any]]:
    """Simulate all structures; goes on where it was interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    ctx = Context(folder=folder, project=folder, options=RunOptions(workers=workers))
    work = functools.partial(simulate_structure, folder=folder)
    return ctx.map(work, list_structures(), key=lambda structure: structure.name, unit="structure")


def load_simulated(path: Path) -> dict[str, Any]:
    """A simulated micrograph with its truth."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def augmented(path: Path, rng: Generator) -> Example:
    """A simulated micrograph as another microscope, another ice and another user would have it."""
    view = load_simulated(path)
    image = view["image"].astype(np.float32)
    image = (image - image.mean()) / image.std()
    whole = view["kind"] != "broken"
    centres, ignored = view["xy"][whole], np.zeros((0, 3))
    if rng.random() < 0.4:
        lumps = random_lumps(image.shape, rng)
        image -= lumps
        x, y = np.clip(np.rint(centres).astype(int), 0, np.array(image.shape)[::-1] - 1).T
        hidden = lumps[y, x] > 0.5
        ignored = np.concatenate([centres[hidden], np.full((hidden.sum(), 1), 0.4 * PIXELS_PER_DIAMETER)], 1)
        centres = centres[~hidden]
    wrong = math.exp(rng.uniform(math.log(0.75), math.log(1.3)))
    n = 2 * round(len(image) * PIXELS / PIXELS_PER_DIAMETER / wrong / 2)
    scale = n / len(image)
    spectrum = resize_spectrum(rfft2(torch.from_numpy(image)), shape=image.shape, new_shape=(n, n))
    small = irfft2(spectrum * random_transfer((n, n), rng), shape=(n, n)).numpy()
    small += random_background((n, n), small.std(), rng)
    if rng.random() < 0.2:
        small = np.clip(small, *np.percentile(small, (rng.uniform(0.1, 3), 100 - rng.uniform(0.1, 3))))
    return Example(normalised(small), centres * scale, ignored * scale)


def random_transfer(shape: tuple[int, int], rng: Generator) -> torch.Tensor:
    """A smooth gain of frequencies, with the blur of drift along a direction now and then."""
    ky, kx = frequencies(shape).unbind(-1)
    k = torch.hypot(kx, ky)
    gain = torch.exp(-rng.uniform(-2, 12) * k.square())
    gain *= torch.exp(0.25 * rng.normal() * torch.cos(2 * torch.pi * k * rng.uniform(0.5, 3)))
    if rng.random() < 0.3:
        length, angle = rng.uniform(0, 0.15) * PIXELS, rng.uniform(0, np.pi)
        gain *= torch.sinc(length * (kx * math.cos(angle) + ky * math.sin(angle)))
    return gain


def random_background(shape: tuple[int, int], spread: float, rng: Generator) -> NDArray[np.float32]:
    """White noise, and slow changes of the brightness."""
    result = np.zeros(shape, np.float32)
    if rng.random() < 0.5:
        result += np.float32(spread * rng.uniform(0, 1.5)) * rng.standard_normal(shape, dtype=np.float32)
    if rng.random() < 0.4:
        coarse = rng.standard_normal((shape[0] // 4 + 1, shape[1] // 4 + 1), dtype=np.float32)
        slow = gaussian_filter(coarse, math.exp(rng.uniform(math.log(1), math.log(12))))
        slow = np.kron(slow / slow.std(), np.ones((4, 4), np.float32))[: shape[0], : shape[1]]
        result += np.float32(spread * rng.uniform(0, 0.5)) * slow
    return result


def random_lumps(shape: tuple[int, int], rng: Generator) -> NDArray[np.float32]:
    """Dirt, aggregates, beads and fibres: what is dark and no particle."""
    result = np.zeros(shape, np.float32)
    for _ in range(rng.integers(1, 7)):
        depth = np.float32(math.exp(rng.uniform(math.log(1), math.log(8))))
        fibre = rng.random() < 0.2
        size = PIXELS_PER_DIAMETER * math.exp(rng.uniform(math.log(0.1), math.log(0.5 if fibre else 3)))
        centre = rng.uniform(0, shape)
        rows, columns = (
            slice(0, n) if fibre else slice(max(0, int(at - size)), min(n, int(at + size) + 1))
            for at, n in zip(centre, shape, strict=True)
        )
        y, x = (
            np.arange(rows.start, rows.stop) - centre[0],
            np.arange(columns.start, columns.stop) - centre[1],
        )
        angle = rng.uniform(0, np.pi)
        along = x * math.cos(angle) + y[:, None] * math.sin(angle)
        across = y[:, None] * math.cos(angle) - x * math.sin(angle)
        if fibre:
            inside = np.abs(across) < size / 4
        else:
            bearing = np.arctan2(across, along)
            outline = 1 + sum(
                rng.normal(0, 0.3 / m) * np.cos(m * bearing + rng.uniform(0, 6.3)) for m in range(2, 6)
            )
            inside = np.hypot(along * rng.uniform(0.5, 1), across) < size / 2 * outline
        coarse = rng.standard_normal((len(y) // 4 + 1, len(x) // 4 + 1))
        grain = np.kron(gaussian_filter(coarse, 0.7), np.ones((4, 4)))[: len(y), : len(x)]
        lump = inside * (1 + rng.uniform(0, 1.5) * grain)
        result[rows, columns] += depth * gaussian_filter(lump.astype(np.float32), rng.uniform(0.5, 2.5))
    return result


def endless(paths: list[Path], rng: Generator) -> Iterator[Example]:
    """Every micrograph again and again, each time augmented otherwise."""
    while True:
        for i in rng.permutation(len(paths)):
            yield augmented(paths[i], rng)


def bce(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean cross-entropy where the weight is 1."""
    value = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")
    return value / weight.sum()


@dataclass(frozen=True, eq=False)
class Scored:
    """Candidates of a simulated micrograph, best first.

    Attributes
    ----------
    log_odds : array (n,)
        Of being particles.
    hit : array (n,), bool
        Which are.
    particles : int
        That there are in all.
    """

    log_odds: NDArray
    hit: NDArray[np.bool_]
    particles: int


def scored(path: Path, find: Callable[[Image, float], Candidates]) -> Scored:
    """Candidates that are found in a simulated micrograph, given the particle's diameter."""
    view = load_simulated(path)
    image, diameter = coarse_image(view), float(view["diameter"])
    found = find(image, diameter)
    whole = view["xy"][view["kind"] != "broken"] / image.scale
    places = np.stack([found.x, found.y], axis=-1)
    hit = matches(places, whole, 0.25 * diameter / image.pixel_size)
    return Scored(found.score.astype(np.float64), hit, len(whole))


def coarse_image(view: dict[str, Any]) -> Image:
    """A simulated micrograph as picking loads it."""
    values, pixel = view["image"].astype(np.float32), float(view["pixel_size"])
    small = cropped(values, pixel, float(view["diameter"]) / PIXELS)
    scale = len(values) / len(small)
    mask = np.ones(small.shape, bool)
    optics = {name: float(view[name]) for name in OPTICS}
    flat = flattened(small, mask, BACKGROUND_A / (pixel * scale))
    return Image(flat, pixel * scale, mask, optics, (scale, scale), small)


def matches(places: NDArray, centres: NDArray, tolerance: float) -> NDArray[np.bool_]:
    """Which places, best first, are the first one near a centre."""
    found = np.zeros(len(places), bool)
    if not (len(places) and len(centres)):
        return found
    free = np.ones(len(centres), bool)
    for i, near in enumerate(KDTree(centres).query_ball_point(places, tolerance)):
        near = [j for j in near if free[j]]
        if near:
            best = min(near, key=lambda j: np.hypot(*(centres[j] - places[i])))
            free[best], found[i] = False, True
    return found


def measure_network(
    network: Picker, paths: list[Path], share: float, threshold: float = 0.0
) -> dict[str, float]:
    """Precision, recall and F1 of picking at a threshold, best F1 over all, and average precision."""
    find = functools.partial(judged, network=network, share=share)
    found = [scored(path, functools.partial(find, rng=_rng_of(path))) for path in paths]
    score = np.concatenate([one.log_odds for one in found])
    hit = np.concatenate([one.hit for one in found])
    total = max(1, sum(one.particles for one in found))
    order = np.argsort(-score, kind="stable")
    hit, score = hit[order], score[order]
    right = np.cumsum(hit)
    precision, recall = right / np.arange(1, len(hit) + 1), right / total
    f1 = 2 * right / (np.arange(1, len(hit) + 1) + total)
    taken = max(1, int((score > threshold).sum()))
    average = float(np.sum(precision * hit) / total)
    return {
        "particles": total,
        "precision": round(float(precision[taken - 1]), 4),
        "recall": round(float(recall[taken - 1]), 4),
        "F1": round(float(f1[taken - 1]), 4),
        "best_F1": round(float(f1.max()), 4),
        "AP": round(average, 4),
    }


def _rng_of(path: Path) -> Generator:
    """Random numbers of a file's name, whichever others are measured."""
    return np.random.default_rng(list(path.name.encode()))


def calibrate(network: Picker, paths: list[Path]) -> float:
    """Make the network's scores log-odds of candidates by their looks.

    Returns
    -------
    float
        Share of the candidates that are particles.
    """
    found = [scored(path, functools.partial(by_looks, network=network)) for path in paths]
    hit = np.concatenate([one.hit for one in found])
    scale, shift = logistic_fit(np.concatenate([one.log_odds for one in found]), hit)
    network.temperature.fill_(1 / scale)
    network.offset.fill_(shift)
    return float(hit.mean())


def logistic_fit(score: NDArray, hit: NDArray[np.bool_]) -> tuple[float, float]:
    """Scale and shift by which scores are log-odds of hits."""
    x, y = (torch.from_numpy(np.asarray(values, np.float64)) for values in (score, hit))
    fit = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([fit], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(fit[0].exp() * x + fit[1], y)
        value.backward()
        return value

    optimiser.step(loss)
    return math.exp(float(fit[0].detach())), float(fit[1].detach())


def split(folder: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """Files for training, and those of each structure for validation."""
    found: dict[str, list[Path]] = {name: [] for name in VALIDATION}
    training = []
    for path in sorted(folder.glob("*_[0-9].npz")):
        found.get(path.stem.rsplit("_", 1)[0], training).append(path)
    return training, found


def train_general(folder: Path, steps: int, seed: int = 1) -> tuple[Picker, dict[str, Any]]:
    """Train, calibrate and measure the general model."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    training, validation = split(folder)
    network = Picker().to(memory_format=torch.channels_last)
    examples = endless(training, rng)
    begin = time.process_time()
    losses = train(
        network.train(),
        batches(examples, size=24, per_example=16, pool=800, rng=rng),
        bce,
        steps=steps,
        learning_rate=4e-3,
        half=True,
    )
    seconds = time.process_time() - begin
    network.eval()
    share = calibrate(network, [path for name in CALIBRATION for path in validation[name]])
    results = {name: measure_network(network, paths, share) for name, paths in validation.items() if paths}
    record = {
        "kind": KIND,
        "version": 1,
        "parameters": sum(weight.numel() for weight in network.parameters()),
        "training": {
            "micrographs": len(training),
            "structures": sorted({path.stem.rsplit("_", 1)[0] for path in training}),
            "steps": steps,
            "batch": 24,
            "seed": seed,
            "cpu_seconds": round(seconds),
            "losses": [round(value, 5) for value in losses],
        },
        "validation": results,
        "calibrated_on": {"structures": CALIBRATION, "share_of_particles": round(share, 4)},
    }
    return network, record


def main() -> None:
    """Simulate, train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("picker"), help="folder of the simulations, kept")
    parser.add_argument("--weights", type=Path, default=Path("picker.npz"), help="file to write")
    parser.add_argument("--workers", type=int, default=1, help="processes that simulate")
    parser.add_argument("--steps", type=int, default=2400, help="batches to train on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with shown_on_terminal():
        simulate(options.work, options.workers)
        network, record = train_general(options.work, options.steps)
        save_weights(options.weights, network, record)
        for name, result in record["validation"].items():
            log.info("%-5s %s", name, result)


if __name__ == "__main__":
    main()
