"""Motion correction against RELION's on simulated movies whose motion is known exactly.

Three sets of movies of 2048 x 2048 x 24 frames drift and deform more and more. Halfmap and RELION correct
the same movies in turns. Their tracks are compared with the true motion of every particle, their sums with
the noise-free images. It needs relion_run_motioncorr on the PATH, and a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from halfmap.data import MovieSet
from halfmap.data.motion import MotionTracks, spline_weights
from halfmap.io.motion import read_tracks
from halfmap.io.mrc import read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_micrographs, read_movies, write_movies
from halfmap.io.tiff import write_tiff_movie
from halfmap.ops.dose import dose_weights
from halfmap.ops.fourier import rfft2
from halfmap.ops.grids import frequencies, ring_sums
from halfmap.steps.simulate.motion import Motion, read_motion
from simulate import tree_memory_GB

SETS = {"d25": (25, 6, 1), "d40": (40, 8, 2), "d60": (60, 10, 3)}
"""Drift and local motion in Å, seed."""

PIXEL_A = 1.4
SIMULATED = "Simulate/job001"
PROGRAM = f"{sys.executable} -m halfmap"
SIMULATE = f"{PROGRAM} simulate movies --project . --pixel-size {PIXEL_A} --dose-per-frame 1.5"
HALFMAP = f"{PROGRAM} motion --project . --movies {SIMULATED}/movies.star"
RELION = (
    f"relion_run_motioncorr --use_own --i {SIMULATED}/movies.star --o Relion/ --bin_factor 1 --bfactor 150"
    f" --gainref {SIMULATED}/gain.mrc --defect_file {SIMULATED}/defects.txt --first_frame_sum 1"
    " --last_frame_sum -1 --patch_x 5 --patch_y 5 --dose_per_frame 1.5 --preexposure 0 --dose_weighting"
    " --save_noDW --grouping_for_ps 3"
)
BANDS_A = {"5 Å": (5.5, 4.5), "3.5 Å": (3.7, 3.3)}
SUMS = {"unweighted": "rlnMicrographNameNoDW", "dose weighted": "rlnMicrographName"}
TILE, MARGIN = 256, 128
LARGE = {
    "4096 x 4096 x 40": ((4096, 4096), 40, 0.8, 1.0, 1, 6.0),
    "4096 x 4096 x 50": ((4096, 4096), 50, 0.8, 1.0, 1, 6.0),
    "8184 x 11520 x 40, binned": ((8184, 11520), 40, 0.53, 0.7, 2, 10.0),
}
"""Shape, frames, pixel size in Å, counts per pixel and frame, binning, memory allowed in GB."""


@dataclass(frozen=True, eq=False)
class Truth:
    """What is true of a movie: its motion, particles in px of the first frame, noise-free image.

    Tiles (left, top) of the inner field are those without contaminants: the reflections of one ice crystal
    outweigh all particles.
    """

    motion: Motion
    x: NDArray
    y: NDArray
    clean: NDArray
    tiles: NDArray


def read_truth(stem: str) -> Truth:
    """Read what is true of a movie."""
    blocks, clean = read_star(f"{stem}.star"), read_mrc(f"{stem}_clean.mrc")[0]
    particles, contaminants = blocks["particles"], blocks.get("contaminants")
    assert isinstance(particles, pl.DataFrame)
    edges = [range(MARGIN, size - MARGIN - TILE + 1, TILE // 2) for size in clean.shape[::-1]]
    tiles = np.array([(left, top) for top in edges[1] for left in edges[0]])
    if isinstance(contaminants, pl.DataFrame):
        for x, y, radius, kind in contaminants.iter_rows():
            apart = np.hypot(*(tiles + TILE / 2 - (x, y)).T) - radius / PIXEL_A
            tiles = tiles[(-apart if kind == "carbon outside" else apart) > TILE / np.sqrt(2)]
    x, y = particles.select("rlnCoordinateX", "rlnCoordinateY").to_numpy().T
    return Truth(read_motion(f"{stem}_motion.star"), x, y, clean, tiles)


def simulate_set(folder: Path, name: str, n_movies: int) -> dict[str, Truth]:
    """Truth of every movie of a set, which is simulated unless it lies there already."""
    drift, local, seed = SETS[name]
    if not (folder / SIMULATED / "movies.star").exists():
        folder.mkdir(parents=True, exist_ok=True)
        motion = f"--drift {drift} --local-motion {local} --seed {seed}"
        run(f"{SIMULATE} {motion} --n-frames 24 --n-movies {n_movies} --write-clean", folder)
    rows = read_micrographs(folder / SIMULATED / "truth_movies.star").rows
    if len(rows) != n_movies:
        raise SystemExit(f"{folder} holds {len(rows)} movies, not {n_movies}")
    motions = rows.select("rlnMicrographName", "hmMotionFile").iter_rows()
    return {name: read_truth(f"{folder / motion}".removesuffix("_motion.star")) for name, motion in motions}


def run(words: str, folder: Path) -> float:
    """Run a command in a folder to its end: seconds on the wall."""
    start = time.monotonic()
    result = subprocess.run(words.split(), cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{words} failed:\n{(result.stdout + result.stderr)[-2000:]}")
    return time.monotonic() - start


def correct(program: str, folder: Path, cores: int) -> tuple[Path, dict[str, float]]:
    """Correct a set by a program: folder of the micrographs, and what it took."""
    if program == "RELION":
        shutil.rmtree(folder / "Relion", ignore_errors=True)
        return folder / "Relion", {program: run(f"{RELION} --j {cores}", folder)}
    wall = run(f"{HALFMAP} --workers {cores}", folder)
    job = max((folder / "Motion").glob("job*"))
    items = [json.loads(line)["seconds"] for line in (job / "items.jsonl").read_text().splitlines()]
    return job, {program: wall, f"{program}, in a worker": sum(items)}


def one_job(scratch: Path, cores: int) -> float:
    """Seconds a movie that Halfmap takes for the movies of all sets in one job."""
    optics, rows = [], []
    for number, name in enumerate(SETS, start=1):
        table = read_movies(scratch / name / SIMULATED / "movies.star")
        files = [label for label in table.optics.columns if label.endswith(("GainName", "DefectFile"))]
        home = pl.lit(f"{scratch / name}/")
        absolute = [(home + pl.col(label)).alias(label) for label in files]
        groups = pl.lit(number, pl.Int64).alias("rlnOpticsGroup")
        optics.append(table.optics.with_columns(groups, *absolute))
        movie = (home + pl.col("rlnMicrographMovieName")).alias("rlnMicrographMovieName")
        rows.append(table.rows.with_columns(groups, movie))
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        (Path(folder) / SIMULATED).mkdir(parents=True)
        together = MovieSet(pl.concat(optics), pl.concat(rows))
        write_movies(Path(folder) / SIMULATED / "movies.star", together)
        wall = run(f"{HALFMAP} --workers {cores}", Path(folder))
    return wall / len(together)


def warm_up() -> None:
    """Let Halfmap compile what it compiles once in an installation."""
    with tempfile.TemporaryDirectory() as folder:
        run(f"{SIMULATE} --width 512 --height 512 --n-frames 6 --particles 5 --n-movies 1", Path(folder))
        run(HALFMAP, Path(folder))


def variants(tracks: MotionTracks) -> dict[str, MotionTracks]:
    """Tracks as the program applies them, and parts of them."""
    found = {"": tracks}
    if tracks.local_grid is not None:
        found[", as RELION's polynomial"] = replace(tracks, local_grid=None)
    return found | {", global alone": replace(tracks, local_grid=None, local_coefficients=None)}


def track_error(tracks: MotionTracks, truth: Truth, x: NDArray, y: NDArray) -> NDArray:
    """Estimated minus true displacement (p, n, 2) in Å of what is at (x, y) px in the first frame."""
    x, y, frames = x[:, None], y[:, None], np.arange(tracks.n_used)
    pixel = tracks.pixel_size
    return -tracks.shift_at(x, y, frames) * pixel - truth.motion.trajectory(x * pixel, y * pixel, frames)


def particle_errors(tracks: MotionTracks, truth: Truth) -> NDArray:
    """Root mean square over frames of each particle's error in Å; what all frames share does no harm."""
    error = track_error(tracks, truth, truth.x, truth.y)
    error = error - error.mean(axis=1, keepdims=True)
    return np.sqrt(np.square(error).sum(axis=-1).mean(axis=-1))


def squared_misfit(tracks: MotionTracks, truth: Truth) -> float:
    """Mean square along an axis of the errors against the first frame, in units of the stated ones."""
    error = track_error(tracks, truth, truth.x, truth.y)[:, 1:]
    # At the nodes the stated error is that of global and local shift together.
    stated = tracks.global_error[1:, None, None] if tracks.local_error is None else tracks.local_error[1:]
    along_y = spline_weights(stated.shape[1], truth.y / (tracks.shape[0] - 1))
    along_x = spline_weights(stated.shape[2], truth.x / (tracks.shape[1] - 1))
    sigma = np.einsum("pi,nij,pj->pn", along_y, stated, along_x) * tracks.pixel_size
    return float(np.square(error / sigma[..., None]).mean())


def tile_spectra(image: NDArray, tiles: NDArray) -> torch.Tensor:
    """Half-spectra of tiles, tapered towards their edges."""
    window = torch.hann_window(TILE)
    cut = np.stack([image[top : top + TILE, left : left + TILE] for left, top in tiles])
    content = torch.from_numpy(cut.astype(np.float32))
    return rfft2((content - content.mean(dim=(-2, -1), keepdim=True)) * window * window[:, None])


def offsets(tracks: MotionTracks, truth: Truth) -> torch.Tensor:
    """Where the specimen is in the sum, against the noise-free image, at every tile: (tiles, 2) in Å.

    It stands where the error of its track is the mean of all frames', each counted by what is left of the
    signal at 4 Å. Particles are picked where they stand: no signal is lost by it.
    """
    left = dose_weights(torch.tensor(0.25), dose_per_frame=tracks.dose_per_frame, n_frames=tracks.n_used)
    error = track_error(tracks, truth, *(truth.tiles + TILE / 2).T)
    return -torch.einsum("n,pnc->pc", left / left.sum(), torch.from_numpy(error).float())


def signal_kept(image: NDArray, truth: Truth, offset: torch.Tensor) -> dict[str, float]:
    """Correlation of a sum with the noise-free image in bands of frequency, put on top of each other."""
    a, b = tile_spectra(image, truth.tiles), tile_spectra(truth.clean, truth.tiles)
    angle = 2 * torch.pi * torch.einsum("hwc,pc->phw", frequencies((TILE, TILE), PIXEL_A), offset)
    cross = (a * b.conj() * torch.polar(torch.ones(()), angle)).real
    sums = [part.sum(dim=0) for part in (cross, a.abs().square(), b.abs().square())]
    rings = [ring_sums(part, shape=(TILE, TILE)) for part in sums]
    frequency = torch.arange(len(rings[0])) / (TILE * PIXEL_A)
    kept = {}
    for name, (longest, shortest) in BANDS_A.items():
        band = (frequency >= 1 / longest) & (frequency <= 1 / shortest)
        together, power_a, power_b = (float(ring[band].sum()) for ring in rings)
        kept[name] = together / np.sqrt(power_a * power_b)
    return kept


def examine(folder: Path, job: Path, truths: dict[str, Truth]) -> list[dict[str, Any]]:
    """Figures of every movie that a program corrected, in the order of the truth."""
    found: dict[str, dict[str, Any]] = {}
    for row in read_micrographs(job / "corrected_micrographs.star").rows.to_dicts():
        tracks = read_tracks(folder / row["rlnMicrographMetadata"])
        truth = truths[tracks.movie]
        errors = {part: particle_errors(each, truth) for part, each in variants(tracks).items()}
        sums = {name: read_mrc(folder / row[label])[0] for name, label in SUMS.items()}
        offset = offsets(tracks, truth)
        signal = {
            f"{name}, {band}": value
            for name, image in sums.items()
            for band, value in signal_kept(image, truth, offset).items()
        }
        found[tracks.movie] = figures = {"errors": errors, "signal": signal}
        if "rlnMicrographNameEven" in row:
            halves = sum(read_mrc(folder / row[f"rlnMicrographName{half}"])[0] for half in ("Even", "Odd"))
            whole = sums["unweighted"]
            figures["even_odd"] = float(np.abs(halves - whole).max() / whole.std())
            figures["misfit"] = squared_misfit(tracks, truth)
    return [found[movie] for movie in truths]


def summarise_errors(name: str, movies: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Figures over all particles of a set by program and variant of its tracks; print them."""
    summary = {}
    for program, figures in movies.items():
        for part in figures[0]["errors"]:
            errors = [of_movie["errors"][part] for of_movie in figures]
            together = np.concatenate(errors)
            summary[program + part] = {
                "median": float(np.median(together)),
                "p95": float(np.percentile(together, 95)),
                "mean": float(together.mean()),
                "worst_movie_median": float(max(np.median(values) for values in errors)),
            }
            values = "".join(f"{value:10.2f}" for value in summary[program + part].values())
            print(f"{name:5s}{program + part:40s}{values}", flush=True)
    return summary


def summarise_signal(movies: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Signal kept in the mean of all movies, with standard errors from their spread; print it."""
    summary: dict[str, dict[str, float]] = {}
    for name in movies["RELION"][0]["signal"]:
        a, b = (np.array([of_movie["signal"][name] for of_movie in movies[p]]) for p in ("Halfmap", "RELION"))
        ratio = a.mean() / b.mean()
        values = {"Halfmap": a, "RELION": b, "ratio": ratio + (a - ratio * b) / b.mean()}
        summary[name], line = {}, ""
        for key, each in values.items():
            mean, error = float(each.mean()), float(each.std(ddof=1) / np.sqrt(len(each)))
            summary[name] |= {key: mean, f"{key}_error": error}
            line += f"{key:>9s} {mean:.4f} ± {error:.4f}"
        print(f"FRC {name:20s}{line}")
    return summary


def compare(scratch: Path, n_movies: int, cores: int) -> dict[str, Any]:
    """Simulate, correct and examine all sets."""
    everything: dict[str, list[dict[str, Any]]] = {"Halfmap": [], "RELION": []}
    accuracy, misfit, times = {}, {}, {}
    print(f"{'errors of particles, Å':45s}{'median':>10s}{'95 %':>10s}{'mean':>10s}{'worst movie':>13s}")

    def summarise(name: str, movies: dict[str, list[dict[str, Any]]]) -> None:
        accuracy[name] = summarise_errors(name, movies)
        misfit[name] = float(np.sqrt(np.mean([of_movie["misfit"] for of_movie in movies["Halfmap"]])))

    for number, name in enumerate(SETS):
        truths = simulate_set(scratch / name, name, n_movies)
        movies: dict[str, list[dict[str, Any]]] = {}
        seconds: dict[str, float] = {}
        # Whoever comes second finds the movies in memory.
        for program in sorted(everything, reverse=number % 2 == 1):
            job, taken = correct(program, scratch / name, cores)
            seconds |= taken
            movies[program] = examine(scratch / name, job, truths)
            everything[program] += movies[program]
        times[name] = {key: value / n_movies for key, value in sorted(seconds.items())}
        summarise(name, dict(sorted(movies.items())))
    summarise("all", everything)
    # The middle of the sets: on a shared machine one of them may be disturbed.
    sets = list(times.values())
    times["all"] = {key: float(np.median([of_set[key] for of_set in sets])) for key in sets[0]}
    times["all"]["Halfmap, one job of all sets"] = one_job(scratch, cores)
    print("error over the stated one: " + ", ".join(f"{name} {value:.2f}" for name, value in misfit.items()))
    for name, values in times.items():
        print(f"{name}: seconds a movie: " + "; ".join(f"{key} {value:.2f}" for key, value in values.items()))
    return {
        "error_A": accuracy,
        "error_over_stated": misfit,
        "seconds_per_movie": times,
        "signal": summarise_signal(everything),
        "even_odd_difference": max(of_movie["even_odd"] for of_movie in everything["Halfmap"]),
    }


def write_large_movie(folder: Path, shape: tuple[int, int], n: int, pixel_size: float, mean: float) -> None:
    """Write a TIFF movie of Poisson counts of a drifting pattern, its gain reference and its table."""
    rng, period, n_levels = np.random.default_rng(1), 1024, 64
    frequency = np.hypot(np.fft.fftfreq(period)[:, None], np.fft.rfftfreq(period))
    pattern = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(period, period))) / (frequency + 0.01))
    level = np.clip(n_levels * (0.5 + pattern / pattern.std() / 6), 0, n_levels - 1).astype(np.uint8)
    level = np.tile(level, [-(-size // period) for size in shape])[: shape[0], : shape[1]]
    # Counts by level and a random byte: the level's Poisson distribution in steps of 1/256.
    rates = mean * np.linspace(0.85, 1.15, n_levels)
    counts = np.array([np.sort(rng.poisson(rate, 2**16))[128::256] for rate in rates]).astype(np.uint8)

    def frames() -> Iterator[NDArray]:
        for frame in range(n):
            drift = np.array([20.0, -9.0]) * (1 - np.exp(-frame / 8)) / pixel_size
            moved = np.roll(level, tuple(np.rint(drift).astype(int)), axis=(0, 1))
            yield counts[moved, rng.integers(256, size=shape, dtype=np.uint8)]

    write_tiff_movie(folder / "movie.tiff", frames(), pixel_size=pixel_size)
    write_mrc(folder / "gain.mrc", rng.normal(1, 0.02, shape).astype(np.float32), pixel_size=pixel_size)
    optics = {"rlnOpticsGroupName": "opticsGroup1", "rlnOpticsGroup": 1, "rlnVoltage": 300.0}
    optics |= {"rlnMicrographGainName": "gain.mrc", "rlnMicrographDoseRate": mean / pixel_size**2}
    optics |= {"rlnMicrographOriginalPixelSize": pixel_size}
    rows = {"rlnMicrographMovieName": "movie.tiff", "rlnOpticsGroup": 1}
    rows |= {"rlnImageSizeX": shape[1], "rlnImageSizeY": shape[0], "rlnImageSizeZ": n}
    (folder / SIMULATED).mkdir(parents=True)
    write_movies(folder / SIMULATED / "movies.star", MovieSet(pl.DataFrame(optics), pl.DataFrame(rows)))


def measure_large(name: str, cores: int) -> dict[str, float]:
    """Correct one large movie: seconds, peak memory, memory allowed."""
    shape, n_frames, pixel_size, mean, binning, allowed_GB = LARGE[name]
    with tempfile.TemporaryDirectory() as folder:
        write_large_movie(Path(folder), shape, n_frames, pixel_size, mean)
        words = f"{HALFMAP} --binning {binning} --workers {cores}".split()
        start, peak = time.monotonic(), 0.0
        process = subprocess.Popen(words, cwd=folder, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, tree_memory_GB(process.pid))
            time.sleep(0.25)
        if process.returncode:
            raise SystemExit(f"halfmap motion failed on {name}")
    seconds = time.monotonic() - start
    print(f"{name}: {seconds:.1f} s, {peak:.2f} GB", flush=True)
    return {"seconds": seconds, "peak_GB": peak, "allowed_GB": allowed_GB}


def judge(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare figures with their bars, and print them."""
    ours, theirs = (record["error_A"]["all"][program] for program in ("Halfmap", "RELION"))
    wall = record["seconds_per_movie"]["all"]
    rows: list[tuple[str, float, float | None, str, float]] = [
        ("median error, Å", ours["median"], None, "<=", 0.5),
        ("95th percentile of errors, Å", ours["p95"], None, "<=", 1.2),
        ("median error, Å", ours["median"], theirs["median"], "<=", 0.5),
        ("95th percentile of errors, Å", ours["p95"], theirs["p95"], "<=", 0.5),
        ("seconds a movie, jobs of a set", wall["Halfmap"], wall["RELION"], "<=", 0.5),
        ("seconds a movie, one job of all", wall["Halfmap, one job of all sets"], wall["RELION"], "<=", 0.5),
        ("even + odd - sum, in its deviations", record["even_odd_difference"], None, "<=", 1e-5),
    ]
    rows += [(f"FRC {k}", v["Halfmap"], v["RELION"], ">=", 1.0) for k, v in record["signal"].items()]
    rows += [(f"GB, {k}", v["peak_GB"], None, "<=", v["allowed_GB"]) for k, v in record["large"].items()]
    verdicts = []
    print(f"\n{'':36s}{'Halfmap':>10s}{'RELION':>10s}{'ratio':>10s}")
    for name, value, other, sign, bar in rows:
        ratio = None if other is None else value / other
        judged = value if ratio is None else ratio
        met = judged <= bar if sign == "<=" else judged >= bar
        figures = "".join(f"{'' if v is None else format(v, '.3g'):>10s}" for v in (value, other, ratio))
        text = f"{sign} {bar:g}" + ("" if other is None else " x RELION's")
        print(f"{name:36s}{figures}  {text}: {'met' if met else 'missed'}")
        row = {"name": name, "Halfmap": value, "RELION": other, "ratio": ratio, "bar": text, "met": met}
        verdicts.append(row)
    return verdicts


def main() -> int:
    """Print tables and write JSON; exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--movies", type=int, default=6, help="in each of the three sets (default 6)")
    parser.add_argument("--cores", type=int, default=2, help="workers, and RELION's threads (default 2)")
    parser.add_argument("--scratch", type=Path, help="keep the movies here, and use those that lie here")
    parser.add_argument("--large", action="store_true", help="also time and memory of large movies")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/motion.json")
    arguments = parser.parse_args()
    warm_up()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (arguments.scratch or Path(temporary)).resolve()
        record = compare(scratch, arguments.movies, arguments.cores)
    large = LARGE if arguments.large else ()
    record["large"] = {name: measure_large(name, arguments.cores) for name in large}
    record["verdicts"] = judge(record)
    passed = all(entry["met"] for entry in record["verdicts"])
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    settings = {"machine": machine, "movies_per_set": arguments.movies, "cores_used": arguments.cores}
    arguments.out.write_text(json.dumps({**settings, **record, "passed": passed}, indent=2) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
