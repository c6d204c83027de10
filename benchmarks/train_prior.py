"""Train the network of refinement's learned regulariser on half maps simulated from atomic models.

Of every structure some maps are made, each under conditions drawn at random: pixel size, B-factors that vary
smoothly over the structure, chains that are loose, a detergent belt, errors of poses, uneven views, coloured
noise and the resolution at which half maps end. From one half map and the correlation of both within a mask,
made white as refinement makes them, the network learns the map that all views and no noise would
give with the same poses. Structures that are measured on elsewhere and
their homologues are left out; by others, also left out, it is known how far it errs. See docs/regularise.md.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import halfmap
from halfmap.errors import HalfmapError, ParameterError
from halfmap.io.models import AtomicModel, read_model
from halfmap.nets.map_prior import FULL, SMALL, MapPrior, loss, save_map_prior
from halfmap.nets.training import Progress, bfloat16_pays, train
from halfmap.ops.envelope import find_region
from halfmap.ops.filters import radial_average, radial_profile_to_grid
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.fsc import corrected_fsc
from halfmap.ops.grids import frequencies, frequency_radius
from halfmap.ops.masks import around_region, edge_around_region, soft_sphere
from halfmap.ops.rotations import random_rotations
from halfmap.search.halfmaps import believed
from halfmap.search.model_density import model_map
from halfmap.search.regularise.learned import White, ending
from priors import CASES

MODELS = Path(__file__).parents[2] / "shared" / "data" / "models"

MEASURED = (
    "5a1a 4iib 2d0f 2r6g 8zpm 3odu 4dkl 3pbl 1u19 3sn6 1wcm 4hg6 4hhb t20s 6z6u"
    " 4v6x 4v5d 6zu5 4upy 30Srib 2btv"
)
"""Structures that others are measured on, and their homologues."""

JUDGES = "1qba 2bs2 3sfd 4q35 7bv2 2zxe 7ez0 7xd6 7r6l"
"""Structures by which it is known how far the network errs, and their homologues."""

SIDES = 72, 136
"""Boxes of maps, from and to, px."""

MARGIN = 1.35
"""Side of a box over the structure's diameter."""

CROP = 48
"""Side of what is trained on at a time."""

LARGEST_A = 230.0
CORRELATIONS = np.array([0.143, 0.25, 0.4, 0.55, 0.7, 0.8, 0.88, 0.94, 0.97, 0.99, 1.0])

BELIEVED = 0.9
"""Weight that the network has beside the images at most, however right it is on average: it may be wrong of
one structure."""

LEAST = 0.5
"""Weight that voxels of unfiltered maps count for at least, over the mean; as of refinement's half maps."""


def drawn(model: AtomicModel, rng: np.random.Generator) -> AtomicModel:
    """A model turned at random, with B-factors that vary over it and a chain that may be loose."""
    turn = random_rotations(1, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))[0].numpy()
    places = (model.positions - model.centre) @ turn.T.astype(np.float64)
    width = float(np.abs(places).max())
    side = rng.normal(size=3)
    along = places @ (side / np.linalg.norm(side)) / width
    away = np.linalg.norm(places, axis=1) / width
    values = rng.uniform(20, 120) + np.clip(model.b_factors - np.median(model.b_factors), -20, 80)
    values += rng.uniform(0, 120) * np.clip(along, 0, 1) + rng.uniform(0, 120) * away**2
    chains = np.unique(model.chains)
    if len(chains) > 1 and rng.random() < 0.4:
        values[model.chains == rng.choice(chains)] += rng.uniform(50, 400)
    return replace(model, positions=places, b_factors=np.clip(values, 5, 500).astype(np.float32))


def belt(model: AtomicModel, n: int, pixel_size: float, rng: np.random.Generator) -> Tensor:
    """Detergent around the middle of a structure, coarse, 0 to 1."""
    places = torch.from_numpy(np.ascontiguousarray(model.positions)).float()
    axis = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=3)).float(), dim=0)
    at = float(rng.uniform(-0.4, 0.4)) * float((places @ axis).abs().max())
    grid = (torch.arange(n) - n // 2) * pixel_size
    z, y, x = torch.meshgrid(grid, grid, grid, indexing="ij")
    height = x * axis[0] + y * axis[1] + z * axis[2] - at
    within = ((places @ axis) - at).abs() < 15
    off = places[within] - (places[within] @ axis)[:, None] * axis
    reach = float(off.norm(dim=1).quantile(0.9)) if bool(within.any()) else 20.0
    distance = (x.square() + y.square() + z.square() - (height + at).square()).clamp_min(0).sqrt()
    region = (height.abs() < 17) & (distance < reach + float(rng.uniform(12, 28)))
    radius = frequency_radius((n,) * 3) / pixel_size
    return irfft3(rfft3(region.float()) * torch.exp(-((radius * 14) ** 2)), shape=(n,) * 3).clamp(0, 1)


def blurred(volume: Tensor, turns_deg: float, moves_px: float, rng: np.random.Generator) -> Tensor:
    """Mean of a map over errors of poses."""
    n, copies = len(volume), 6
    total = torch.zeros_like(volume)
    for _ in range(copies):
        vector = torch.from_numpy(rng.normal(size=3) * math.radians(turns_deg))
        cross = torch.zeros(3, 3, dtype=torch.float64)
        cross[0, 1], cross[0, 2], cross[1, 2] = -vector[2], vector[1], -vector[0]
        turn = torch.linalg.matrix_exp(cross - cross.T).float()
        move = torch.from_numpy(rng.normal(size=3) * moves_px * 2 / n).float()
        grid = nn.functional.affine_grid(torch.cat([turn, move[:, None]], 1)[None], [1, 1, n, n, n], False)
        total += nn.functional.grid_sample(volume[None, None], grid, align_corners=False)[0, 0]
    return total / copies


def seen_from(n: int, rng: np.random.Generator) -> Tensor:
    """Weight of each voxel of the half-spectrum, 1 in the mean: views from everywhere, or about an axis."""
    k = frequencies((n,) * 3)
    axis = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=3)), dim=0).to(k)
    cosine = (k @ axis).abs() / k.norm(dim=-1).clamp_min(1e-9)
    if rng.random() < 0.5:
        return torch.ones_like(cosine)
    if rng.random() < 0.6:  # Views along the axis leave out what lies along it.
        weight = rng.uniform(0.05, 0.5) + torch.exp(-(cosine**2) / (2 * rng.uniform(0.15, 0.6) ** 2))
    else:  # Views from its side leave out hardly anything but fill it thinly.
        weight = rng.uniform(0.3, 0.6) + cosine.square()
    return weight / weight.mean()


def mask_of(volume: Tensor, radius: float, resolution: float, pixel_size: float) -> Tensor:
    """Mask as refinement makes it of what it has found, noise and all."""
    n = len(volume)
    edge = edge_around_region(n, resolution=resolution, pixel_size=pixel_size)
    sphere = soft_sphere((n,) * 3, radius=radius, edge=edge, pixel_size=pixel_size)
    finest = max(15.0, 1.5 * resolution)
    try:
        found = find_region(volume * sphere, pixel_size=pixel_size, resolution=finest, blank=sphere < 0.5)
    except ParameterError:  # nothing stands out of the noise
        return sphere
    return around_region(found.region, resolution=resolution, pixel_size=pixel_size) * sphere


def simulate(model: AtomicModel, seed: list[int]) -> dict[str, Any]:
    """Network's inputs and target of a half map, and what is needed to judge it."""
    rng = np.random.default_rng(seed)
    noise = torch.Generator().manual_seed(int(rng.integers(2**31)))
    pixel_size = float(np.exp(rng.uniform(math.log(1.1), math.log(3.0))))
    side = MARGIN * model.diameter
    n = min(max(2 * math.ceil(side / pixel_size / 2), SIDES[0]), SIDES[1])
    pixel_size = max(pixel_size, side / n)
    shape = (n,) * 3
    turned = drawn(model, rng)
    truth = model_map(turned, shape=shape, pixel_size=pixel_size, origin=[-(n // 2) * pixel_size] * 3)
    if rng.random() < 0.25:
        inside = truth > 0.1 * truth.max()
        level = float(truth[inside].mean()) * float(rng.uniform(0.1, 0.4))
        truth = truth + level * belt(turned, n, pixel_size, rng) * ~inside
    resolution = pixel_size * float(rng.uniform(2.0, 3.5))
    finest = rng.uniform(0.0, 0.3)
    error = 0.5 * math.degrees(finest * resolution / (0.5 * model.diameter))
    signal = blurred(truth, error, 0.25 * finest * resolution / pixel_size, rng)
    radius = frequency_radius(shape) * n
    region = irfft3(rfft3(truth) * torch.exp(-((radius / (n * pixel_size) * 12) ** 2)), shape=shape)
    filled = float((region > 0.08 * region.max()).float().mean())
    # Noise is white but for a slope, and as strong as the signal at about the resolution asks for.
    at = min(n * pixel_size / resolution, n // 2 - 3)
    power = radial_average(rfft3(signal).abs().square(), shape=shape)
    slope = torch.exp(torch.tensor(float(rng.uniform(-0.5, 0.5))) * (radius / at))
    # What is outside of the mask is noise alone, and does not count.
    level = float(power[round(at)]) / filled * float(rng.uniform(1, 4))
    views = seen_from(n, rng)
    shrunk = (views / LEAST).clamp_max(1)

    def half(more: float) -> Tensor:
        white = rfft3(torch.randn(shape, generator=noise)) / n**1.5
        own = white * (level * more * slope / views).sqrt()
        return irfft3((rfft3(signal) + own) * shrunk, shape=shape)

    first, second = half(1.0), half(1.0)
    reach = 0.5 * turned.diameter * float(rng.uniform(1.0, 1.2))
    mask = mask_of(first + second, min(reach, side / 2 - 8), resolution, pixel_size)
    agreed = believed(corrected_fsc(first, second, mask=mask, generator=noise).corrected.float())
    # References are made without a part of the half set.
    volume = half(4 / 3)
    white = White.of(volume, mask, agreed, multiple=8)
    return {
        "seen": white.seen(volume),
        "target": white.target(signal),
        "inside": mask[white.place],
        "agreed": agreed,
        "unit": white.unit,
        "box": n,
        "pixel_size": pixel_size,
    }


def make(job: tuple[Path, Path, int, int]) -> Path | None:
    """Write the example of a number of a structure; made once."""
    folder, file, structure, number = job
    path = folder / f"{file.name.partition('.')[0]}_{number}.npz"
    if path.exists():
        return path
    torch.set_num_threads(1)
    try:
        model = read_model(file)
        if model.diameter > LARGEST_A:
            return None
        found = simulate(model, [structure, number])
    except HalfmapError as error:
        print(f"{file.name}: {error}", flush=True)
        return None
    halves = {name: found[name].numpy().astype(np.float16) for name in ("seen", "target", "inside")}
    rest = {name: np.asarray(found[name]) for name in ("agreed", "unit", "box", "pixel_size")}
    np.savez(path, allow_pickle=False, **halves, **rest)
    return path


def load(path: Path) -> dict[str, Any]:
    """An example as it was written."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def crop(example: dict[str, NDArray], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Part of an example about a voxel of the structure, turned at random by right angles."""
    inside = example["inside"]
    places = [[int(rng.integers(0, max(1, size - CROP + 1))) for size in inside.shape] for _ in range(4)]
    parts = [tuple(slice(at, at + CROP) for at in place) for place in places]
    part = max(parts, key=lambda each: float(inside[each].sum(dtype=np.float32)))
    arrays = [example["seen"][:, *part], example["target"][None, *part], inside[None, *part]]
    axes = rng.permutation(3)
    flips = rng.integers(0, 2, 3)
    # An odd permutation and an odd number of flips each make the mirror image.
    odd = np.linalg.det(np.eye(3)[axes]) < 0
    if (flips.sum() % 2 == 1) != odd:
        flips[0] = 1 - flips[0]
    out = []
    for each in arrays:
        turned = each.transpose(0, *(axes + 1))
        turned = np.flip(turned, tuple(1 + axis for axis in range(3) if flips[axis]))
        padded = np.zeros((len(turned), CROP, CROP, CROP), np.float32)
        padded[:, : turned.shape[1], : turned.shape[2], : turned.shape[3]] = turned
        out.append(torch.from_numpy(padded))
    return out[0], out[1], 0.05 + out[2]


def batches(files: list[Path], size: int, seed: int) -> Callable[[int], Iterator[tuple[Tensor, ...]]]:
    """Crops of examples, the same again from any step on."""

    def after(done: int) -> Iterator[tuple[Tensor, ...]]:
        step = done
        while True:
            rng = np.random.default_rng([seed, step])
            few = [load(files[i]) for i in rng.integers(0, len(files), max(1, size // 4))]
            picked = [crop(few[i % len(few)], rng) for i in range(size)]
            yield tuple(torch.stack(each) for each in zip(*picked, strict=True))
            step += 1

    return after


def judge(network: nn.Module, files: list[Path]) -> dict[str, list[float]]:
    """How far the network errs, by the correlation of half maps.

    For each bin of correlations: the share of the signal's power that makes the best mean of what the network
    says and the images, whose errors are related as it has seen them; the power of its errors over that of
    all that is there; and the same of Wiener's filter.
    """
    rows = []
    for path in files:
        example = load(path)
        seen, target, inside = (
            torch.from_numpy(example[name].astype(np.float32)) for name in ("seen", "target", "inside")
        )
        with torch.inference_mode():
            mean = network(seen[None])[0, 0]
        shape, agreed = (int(example["box"]),) * 3, torch.from_numpy(example["agreed"])
        images, said, filtered, truth = (
            _spectrum(each * inside, shape) * float(example["unit"])
            for each in (seen[1], mean, seen[0], target)
        )
        images = images * radial_profile_to_grid(agreed.clamp_min(1e-3).rsqrt(), shape=shape)
        off, wrong = images - truth, said - truth
        powers = (
            off.abs().square() - (wrong * off.conj()).real,
            (wrong - off).abs().square(),
            wrong.abs().square(),
            (filtered - truth).abs().square(),
        )
        shells = torch.stack([radial_average(each, shape=shape)[: len(agreed)] for each in powers])
        whole = ending(agreed) == 1
        counts = torch.arange(len(agreed)).square()
        rows.append(torch.cat([agreed[None], counts[None], shells * counts])[:, whole])
    agreed, counts, *sums = torch.cat(rows, dim=1).double().numpy()
    found: dict[str, list[float]] = {"correlation": [], "share": [], "power": [], "wiener": []}
    for low, high in itertools.pairwise(CORRELATIONS):
        own = (agreed > low) & (agreed <= high)
        if own.sum() < 5:
            continue
        number = counts[own].sum()
        likely, apart, power, wiener = (float(each[own].sum() / number) for each in sums)
        f = float((agreed[own] * counts[own]).sum() / number)
        weight = min(max(likely / apart, 1 - BELIEVED), BELIEVED)
        found["correlation"].append(f)
        # Of half sets without one of four parts, as the maps are that it sees.
        found["share"].append((1 / weight - 1) * (1 - f) / f * 4 / 3)
        found["power"].append(power)
        found["wiener"].append(wiener)
    return found


def _spectrum(part: Tensor, shape: tuple[int, int, int]) -> Tensor:
    whole = torch.zeros(shape)
    whole[tuple(slice(0, size) for size in part.shape)] = part
    return rfft3(whole)


def held_out(files: list[Path]) -> Callable[[nn.Module], float]:
    """Loss on crops of structures that nothing is trained on."""
    taken = [next(batches(files, 8, 99)(i)) for i in range(6)]

    def value(network: nn.Module) -> float:
        losses = [float(loss(network(seen), target, weight)) for seen, target, weight in taken]
        return float(np.mean(losses))

    return value


def main() -> None:
    """Simulate, train, judge, and write the weights with their record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of simulations, kept")
    parser.add_argument("--weights", type=Path, required=True, help="file to write, with .json beside it")
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--maps", type=int, default=4, help="of each structure")
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    assert {case.model.partition(".")[0] for case in CASES.values()} <= set(MEASURED.split())
    names = {path.name.partition(".")[0]: path for path in sorted(options.models.glob("*.gz"))}
    left_out = {*MEASURED.split(), *JUDGES.split()}
    trained = [name for name in names if name not in left_out]
    jobs = [
        (options.work, names[name], i, number)
        for i, name in enumerate([*trained, *JUDGES.split()])
        for number in range(options.maps)
    ]
    started = time.monotonic()
    with get_context("spawn").Pool(options.workers) as pool:
        made = [path for path in pool.imap_unordered(make, jobs) if path is not None]
    print(f"{len(made)} maps in {time.monotonic() - started:.0f} s", flush=True)
    judges = sorted(path for path in made if path.name.split("_")[0] in JUDGES.split())
    files = sorted(set(made) - set(judges))
    torch.manual_seed(1)
    network = MapPrior(SMALL if options.size == "small" else FULL).to(options.device).train()
    progress = Progress(held_out(judges), every=100, file=options.work / f"{options.size}.pt")
    started = time.monotonic()
    train(
        network,
        batches(files, options.batch, 1),
        loss,
        steps=options.steps,
        learning_rate=1e-3,
        half=bfloat16_pays(options.device),
        progress=progress,
    )
    seconds = time.monotonic() - started
    error = judge(network.eval().cpu(), judges)
    save_map_prior(
        options.weights,
        network,
        {
            "version": halfmap.__version__,
            "error": error,
            "losses": progress.losses,
            "steps": options.steps,
            "batch": options.batch,
            "maps": len(files),
            "structures": sorted({path.name.split("_")[0] for path in files}),
            "judges": sorted({path.name.split("_")[0] for path in judges}),
            "seconds": round(seconds),
            "machine": platform.processor() or platform.machine(),
        },
    )
    for each in zip(*error.values(), strict=True):
        print("  ".join(f"{name} {value:.3f}" for name, value in zip(error, each, strict=True)))


if __name__ == "__main__":
    main()
