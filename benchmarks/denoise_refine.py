"""How near the truth poses found in denoised images are, and the map of raw particles that they make.

Simulated micrographs are denoised by a network trained on their own halves. Particles are cut at their true
places from raw, denoised and merged micrographs, and refined from the truth low-passed at 30 Å: raw ones
alone, and raw ones with their poses searched in the others. Maps are compared with the truth in a soft
sphere, poses with the true ones. Maps are made of raw particles in all rows.

Besides, particles of each kind are put together at their true poses, by least squares with their CTFs, and
raw ones at the poses that were found in each, all and parts of them: to what detail these maps agree with the
truth, and how much fainter than it they are (the B-factor, Å², to where they agree by 0.5).
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from class2d import last_job, rounded
from denoise import CASES, jobs, make, run, show
from halfmap.data import ParticleSet, Poses
from halfmap.io.images import ImageStack
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_micrographs, read_particles, write_particles
from halfmap.ops.ctf import ctf
from halfmap.ops.filters import radial_average
from halfmap.ops.fourier import fft_centred, phase_shift, resample, rfft3
from halfmap.ops.fsc import fsc, resolution
from halfmap.ops.masks import soft_sphere
from halfmap.ops.slices import reconstruct
from halfmap.ops.symmetry import operators
from pipeline import resized
from refine import differences

PIXEL_A = 1.8


@dataclass(frozen=True)
class Particle:
    """A case of `denoise`: its point group and diameter in Å."""

    group: str
    diameter: float


PARTICLES = {
    "haemoglobin, 60 kDa": Particle("C2", 75.0),
    "proteasome, 600 kDa": Particle("D7", 175.0),
}


def cut(folder: Path, table: Path, number: int, diameter: float) -> dict[str, Path]:
    """Particles at their true places, of each kind of image."""
    known = {str(name) for name in read_micrographs(table).rows["rlnMicrographName"]}
    truth = read_particles(folder / "Simulate/job001/truth_particles.star")
    wanted = truth.rows["rlnMicrographName"].is_in(list(known)) & (truth.rows["hmParticleKind"] == "real")
    rows = truth.rows.filter(wanted)
    rows = rows.sample(min(number, len(rows)), seed=1).sort("rlnMicrographName", "rlnCoordinateY")
    write_particles(folder / "places.star", ParticleSet(truth.optics, rows))
    found = {}
    for images in ("raw", "denoised", "merged"):
        how = f"--coordinates places.star --images {images} --pixel-size {PIXEL_A} --diameter {diameter}"
        run(f"extract {table} {how} --min-distance 0", folder)
        found[images] = last_job(folder, "Extract") / "particles.star"
    return found


def truth_map(folder: Path, box: int, pixel_size: float) -> Path:
    """The truth in the particles' box and pixels, as near as whole numbers come."""
    path = folder / "Simulate/job001/truth_map.mrc"
    volume, finer = torch.from_numpy(read_mrc(path).astype(np.float32)), read_header(path).pixel_size
    assert finer is not None
    wide = round(box * pixel_size / finer / 2) * 2
    out = folder / "truth.mrc"
    made = resample(resized(volume, wide), new_shape=(box,) * 3)
    write_mrc(out, made.numpy(), pixel_size=wide * finer / box, stack=False)
    return out


def refined(folder: Path, particle: Particle, raw: Path, searched: Path | None) -> dict[str, Any]:
    """A refinement against the truth."""
    words = f"refine {raw} --reference truth.mrc --symmetry {particle.group} --initial-lowpass 30"
    words += f" --diameter {1.1 * particle.diameter} --workers 2"
    seconds = run(words + ("" if searched is None else f" --searched {searched}"), folder)
    job = last_job(folder, "Refine")
    names = [f"run_half{half}_class001_unfil.mrc" for half in (1, 2)]
    one, other, truth = (
        torch.from_numpy(read_mrc(path).astype(np.float32))
        for path in (job / names[0], job / names[1], folder / "truth.mrc")
    )
    pixel_size = read_header(folder / "truth.mrc").pixel_size
    assert pixel_size is not None
    mask = soft_sphere(one.shape, radius=0.55 * particle.diameter, edge=8.0, pixel_size=pixel_size)
    curve = fsc((one + other) * mask, truth * mask)
    general = read_star(job / "model.star")["model_general"]
    at = {"pixel_size": pixel_size, "box": len(mask)}
    row: dict[str, Any] = {"half maps Å": float(general["rlnCurrentResolution"])}  # pyright: ignore[reportArgumentType, reportCallIssue]
    row |= {f"truth {level:g} Å": resolution(curve, threshold=level, **at) for level in (0.143, 0.5)}
    return (
        row
        | poses(folder / raw, job, particle.group)
        | {f"{name} s": value for name, value in seconds.items()}
    )


def poses(raw: Path, job: Path, group: str) -> dict[str, float]:
    """Errors of the poses, and how many are within one standard deviation as stated (68 % would be right)."""
    found, truth = read_particles(job / "particles.star"), read_particles(raw)
    turn, move = differences(found.poses, truth.poses, group)
    angle = turn.norm(dim=1)
    stated = torch.from_numpy(found.rows["hmAngleViewError"].to_numpy())[:, None]
    return {
        "particles": len(angle),
        "median angle °": float(angle.median()),
        **{f"beyond {at}°": float((angle > at).double().mean()) for at in (0.5, 1, 2, 5, 10)},
        "median shift Å": float(move.norm(dim=1).median()),
        "views within stated": float((turn[:, :2].abs() < stated).double().mean()),
    }


def put_together(table: Path, folder: Path, poses: Poses, group: str, rows: Tensor) -> Tensor:
    """Map (d, d, d) of some of a table's images at given poses, by least squares."""
    particles = read_particles(folder / table)
    box, pixel_size = particles.box_size, float(particles.optics["rlnImagePixelSize"][0])
    images = ImageStack(particles.rows["rlnImageName"], root=folder).read(rows.numpy())
    spectra = fft_centred(torch.from_numpy(np.asarray(images, np.float32)), ndim=2)
    moves = poses.shifts_A[rows] / pixel_size
    spectra = phase_shift(spectra, shape=(box, box), shift_px=moves)
    lens = ctf((box, box), **particles.ctf[rows].for_ctf()).float()
    copies = [poses.rotations[rows] @ one.float() for one in operators(group)]
    n = len(copies)
    return reconstruct(spectra.repeat(n, 1, 1), torch.cat(copies), ctf=lens.repeat(n, 1, 1))


def fidelity(volume: Tensor, folder: Path, diameter: float) -> dict[str, float]:
    """Detail to which a map agrees with the truth, Å, and its B-factor against it, Å²."""
    truth = torch.from_numpy(read_mrc(folder / "truth.mrc").astype(np.float32))
    pixel_size = read_header(folder / "truth.mrc").pixel_size
    assert pixel_size is not None
    mask = soft_sphere(volume.shape, radius=0.55 * diameter, edge=8.0, pixel_size=pixel_size)
    box = len(truth)
    curve = fsc(volume * mask, truth * mask)
    row = {
        f"truth {level:g} Å": resolution(curve, threshold=level, pixel_size=pixel_size, box=box)
        for level in (0.143, 0.5)
    }
    one, other = rfft3(volume * mask), rfft3(truth * mask)
    gain = radial_average((one * other.conj()).real, shape=volume.shape) / radial_average(
        other.abs().square(), shape=volume.shape
    )
    frequency = torch.arange(len(gain)) / (box * pixel_size)
    finest = 1 / row["truth 0.5 Å"] if row["truth 0.5 Å"] < np.inf else 0.0
    seen = (frequency > 1 / 20) & (frequency < finest) & (gain > 0)
    if int(seen.sum()) > 4:
        slope = np.polyfit(frequency[seen].numpy() ** 2, gain[seen].log().numpy(), 1)[0]
        row["B-factor Å²"] = -4 * float(slope)
    return row


def by_numbers(folder: Path, particle: Particle, raw: Path, job: Path) -> dict[str, float]:
    """Detail to which maps of raw particles at a job's poses agree with the truth by 0.5, by how many."""
    poses, generator = read_particles(job / "particles.star").poses, torch.Generator().manual_seed(3)
    order, row = torch.randperm(len(poses), generator=generator), {}
    for share in (4, 2, 1):
        rows = order[: len(poses) // share]
        volume = put_together(raw, folder, poses, particle.group, rows)
        row[f"{len(rows)}, Å"] = fidelity(volume, folder, particle.diameter)["truth 0.5 Å"]
    return row


def main() -> None:
    """Run the cases, print, and keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("../shared/data/models"))
    parser.add_argument("--scratch", type=Path, required=True, help="that of denoise.py may be taken")
    parser.add_argument("--cases", nargs="*", choices=PARTICLES, default=list(PARTICLES))
    parser.add_argument("--micrographs", type=int, default=22)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--general", action="store_true", help="denoise with the general network, untrained")
    options = parser.parse_args()
    rows = []
    for case in options.cases:
        folder = (options.scratch / CASES[case].partition(".")[0]).resolve()
        make(folder, (options.models / CASES[case]).resolve(), options.micrographs, options.side)
        table, model = Path("Simulate/job001/micrographs.star"), ""
        if not options.general:
            run(f"denoise train {table} --size small --steps {options.steps}", folder)
            model = f"--model {jobs(folder)[-1] / 'model.npz'}"
        run(f"denoise apply {table} {model} --workers 2", folder)
        made = jobs(folder)[-1] / "micrographs.star"
        particle = PARTICLES[case]
        tables = cut(folder, made, options.particles, particle.diameter)
        first = read_particles(tables["raw"])
        truth_map(folder, first.box_size, float(first.optics["rlnImagePixelSize"][0]))
        for images in ("raw", "denoised", "merged"):
            searched = None if images == "raw" else tables[images]
            true = read_particles(folder / tables[images]).poses
            at_truth = put_together(tables[images], folder, true, particle.group, torch.arange(len(true)))
            alone = fidelity(at_truth, folder, particle.diameter)
            rows.append(
                {"data": case, "searched": images}
                | {f"true poses, {images}, {name}": value for name, value in alone.items()}
                | refined(folder, particle, tables["raw"], searched)
                | by_numbers(folder, particle, tables["raw"], last_job(folder, "Refine"))
            )
            show(rows[-1])
    machine = platform.processor() or platform.machine()
    plain = rounded({"machine": machine, "steps": options.steps, "rows": rows})
    path = Path(__file__).parent / "results" / "denoise_refine.json"
    path.write_text(json.dumps(plain, indent=1) + "\n")


if __name__ == "__main__":
    main()
