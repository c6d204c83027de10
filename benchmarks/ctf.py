"""CTF estimation against the truth of simulated micrographs, beside CTFFIND, and on real ones.

The true defocus of a micrograph is that of the middle of its field and of the middle plane of its ice.
Particles lie evenly above and below that plane and ice scatters evenly about it, so that neither shifts the
mean. A particle's own defocus differs by its height and its place in a tilted field; it is compared as well.

Contrast is usable where the ice is no thicker than 500 Å and Thon rings are visible about 8 Å: where the
square of the true CTF stands out of the micrograph's own spectrum by `VISIBLE` standard errors. No program's
verdict decides that. `--ctffind` names an executable of CTFFIND 5; its values are kept in the scratch folder
for the next time. `--real` is the folder of the folders in `REAL`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from halfmap.data import MicrographSet
from halfmap.data.columns import parse_vector
from halfmap.data.defocus import DefocusSurface
from halfmap.io.mrc import read_mrc
from halfmap.io.tables import read_micrographs, read_particles, write_micrographs
from halfmap.ops.ctf import ctf
from halfmap.ops.fourier import rfft2
from halfmap.ops.grids import frequency_radius
from halfmap.steps.ctf.average import Optics
from halfmap.steps.ctf.estimate import estimate_ctf
from halfmap.steps.ctf.fit import maximise
from halfmap.steps.ctf.micrograph import MicrographItem, fit_spectra
from halfmap.steps.ctf.step import CtfStep
from halfmap.steps.ctf.tiles import checked_image
from simulate import tree_memory_GB

SIMULATED = "Simulate/job001"
LARGE = "--width 4096 --height 4096 --particles 300"
SETS = {
    "low": "8 --defocus-min 4000 --defocus-max 10000 --astigmatism 150 --pixel-size 0.85",
    "middle": "8 --defocus-min 10000 --defocus-max 20000 --pixel-size 1.06",
    "high": "8 --defocus-min 20000 --defocus-max 35000 --astigmatism 300 --pixel-size 1.4",
    "round": "4 --defocus-min 5000 --defocus-max 20000 --astigmatism 0 --pixel-size 1.2",
    "astigmatic": "8 --defocus-min 6000 --defocus-max 25000 --astigmatism 600 --pixel-size 1.06",
    "thin ice": "6 --defocus-min 5000 --defocus-max 25000 --ice-thickness 150 --pixel-size 1",
    "thick ice": "6 --defocus-min 8000 --defocus-max 30000 --ice-thickness 800 --pixel-size 1.2",
    "tilt 10": "5 --defocus-min 8000 --defocus-max 25000 --tilt 10 --carbon 0 --pixel-size 1.06",
    "tilt 20": "5 --defocus-min 8000 --defocus-max 25000 --tilt 20 --carbon 0 --pixel-size 1.2",
    "tilt 30": "5 --defocus-min 8000 --defocus-max 25000 --tilt 30 --carbon 0 --pixel-size 1.4",
    "phase plate": "6 --defocus-min 4000 --defocus-max 12000 --phase-shift 90 --pixel-size 1.06",
    "4k": f"5 --defocus-min 4000 --defocus-max 30000 --pixel-size 0.85 {LARGE}",
    "4k tilt 15": f"3 --defocus-min 8000 --defocus-max 25000 --tilt 15 --carbon 0 --pixel-size 1.06 {LARGE}",
}
"""Micrographs and options of each set; its number is the seed. The simulator leaves carbon films untilted."""

OURS = {"phase plate": ["--fit-phase-shift"], "thick ice": ["--fit-thickness"]}
"""Options of our step beyond its defaults."""
LABELS = {
    "name": "rlnMicrographName",
    "angle": "rlnDefocusAngle",
    "phase": "rlnPhaseShift",
    "tilt": "rlnMicrographTiltAngle",
    "axis": "rlnMicrographTiltAxisDirection",
    "sigma defocus": "hmDefocusUncertainty",
    "sigma angle": "hmDefocusAngleUncertainty",
    "sigma phase": "hmPhaseShiftUncertainty",
    "sigma tilt": "hmTiltUncertainty",
    "sigma axis": "hmTiltAxisUncertainty",
    "sigma cs": "hmCtfCsUncertainty",
    "thickness": "hmCtfIceThickness",
    "sigma thickness": "hmCtfIceThicknessUncertainty",
    "problem": "hmCtfProblem",
    "surface": "hmDefocusSurface",
}
SEARCHES = {
    "CTFFIND 30-5": ((30, 5, 3000, 50000, 100), 1),
    "CTFFIND 30-3.5": ((30, 3.5, 3000, 50000, 100), 1),
    "CTFFIND step 500": ((30, 5, 3000, 50000, 500), 1),
    "CTFFIND threads": ((30, 5, 3000, 50000, 100), os.cpu_count() or 1),
    "CTFFIND tilt": ((30, 5, 3000, 50000, 100), 1),
}
"""Resolutions, defoci and step in Å; threads. Two are for their time alone, one is for tilted fields."""
REAL = {
    "apoferritin_empiar10146": ("apo_*.mrc", 1.5, "ctffind4.csv"),
    "krios_k2_0.85A": ("fei-extended.mrc", 0.8538, None),
}
"""Micrographs, pixel size in Å, values of CTFFIND 4.1.14; all at 300 kV, 2.7 mm, amplitude contrast 0.07."""

QUANTITIES = ("defocus", "particles", "astigmatism", "angle", "phase", "tilt", "axis", "cs", "thickness")
"""In Å or degrees, Cs in mm."""
CS_MM = 2.7
PARTICLE = ("rlnCoordinateX", "rlnCoordinateY", "rlnDefocusU", "rlnDefocusV")
PERIODS = {"angle": 180.0, "axis": 360.0}
DRAWS = 30
VISIBLE, THICKEST_A, BAND_A, BOX = 10.0, 500.0, (12.0, 7.0), 512
MEDIANS = {"defocus": 30.0, "angle": 5.0, "tilt": 2.0, "axis": 5.0, "phase": 5.0}
P95_A, WITHIN_1, WITHIN_2, SECONDS_4K, MEMORY_GB = 100.0, (0.60, 0.76), 0.90, 1.5, 2.0


def run(words: list[str], folder: Path, answers: str = "") -> tuple[float, float]:
    """Run a command in a folder to its end: seconds, and peak memory of it and its children in GB."""
    start, peak = time.monotonic(), 0.0
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryFile("w+") as told:
        told.write(answers)
        told.seek(0)
        process = subprocess.Popen(words, cwd=folder, stdin=told, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, tree_memory_GB(process.pid))
            time.sleep(0.02 if answers else 0.2)
        seconds = time.monotonic() - start
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(words)} failed:\n{log.read()[-2000:]}")
    return seconds, peak


def halfmap(words: str, folder: Path) -> tuple[float, float]:
    """Run a step in a project's folder."""
    return run([sys.executable, "-m", "halfmap", *words.split(), "--project", "."], folder)


def place(scratch: Path, name: str) -> Path:
    """Project folder of a set."""
    return scratch / name.replace(" ", "_")


def simulate(scratch: Path, workers: int) -> None:
    """Simulate what does not lie in the scratch folder already."""
    # One call lays down the atoms; the sets take its map, which spares them a minute each.
    jobs = {"specimen": "1 --width 512 --height 512 --particles 20 --pixel-size 0.85 --carbon 0 --seed 100"}
    model = f"--models {place(scratch, 'specimen') / SIMULATED / 'truth_map.mrc'} --workers {workers}"
    jobs |= {name: f"{SETS[name]} {model} --seed {seed}" for seed, name in enumerate(SETS, start=1)}
    for name, words in jobs.items():
        folder = place(scratch, name)
        if not (folder / SIMULATED / "micrographs.star").exists():
            folder.mkdir(parents=True, exist_ok=True)
            halfmap(f"simulate micrographs --broken 0 --n-micrographs {words}", folder)


def values_of(row: dict[str, Any]) -> dict[str, Any]:
    """Quantities compared, and their stated errors, from RELION's columns and ours."""
    u, v = row["rlnDefocusU"], row["rlnDefocusV"]
    found = {"defocus": (u + v) / 2, "astigmatism": u - v, "sigma astigmatism": None}
    if "hmDefocusUUncertainty" in row:
        # Whatever their covariance, var U + var V = 2 var mean + var (U - V) / 2.
        of_u, of_v, of_mean = (row[f"hmDefocus{part}Uncertainty"] for part in ("U", "V", ""))
        found["sigma astigmatism"] = max(2 * (of_u**2 + of_v**2) - 4 * of_mean**2, 0.0) ** 0.5
    found |= {key: row.get(label) for key, label in LABELS.items()}
    if (truth := row.get("rlnMicrographIceThickness")) is not None:
        found["thickness"] = truth / np.cos(np.radians(row["rlnMicrographTiltAngle"]))
    return found | {"cs": row.get("hmCtfCs", CS_MM)}


def ring_strength(image: NDArray, pixel_size: float, expected: torch.Tensor) -> float:
    """Standard errors by which the square of a CTF (BOX, BOX // 2 + 1) stands out of a spectrum about 8 Å."""
    window = torch.hann_window(BOX)
    tiles = torch.from_numpy(image.astype(np.float32)).unfold(0, BOX, BOX).unfold(1, BOX, BOX)
    tiles = (tiles - tiles.mean(dim=(-2, -1), keepdim=True)) * window * window[:, None]
    k = frequency_radius((BOX, BOX), pixel_size)
    band = (k > 1 / BAND_A[0]) & (k < 1 / BAND_A[1])
    values = rfft2(tiles).abs().square().mean(dim=(0, 1))[band].double().numpy()
    x = (k[band] / k[band].max()).square()
    terms = torch.stack([expected[band].square(), *(x**i for i in range(4))], dim=-1).double().numpy()
    found = np.linalg.lstsq(terms, values, rcond=None)[0]
    variance = np.square(values - terms @ found).mean() * np.linalg.inv(terms.T @ terms)[0, 0]
    return float(found[0] / np.sqrt(variance))


def read_truth(scratch: Path) -> pl.DataFrame:
    """What is true of all simulated micrographs."""
    rows = []
    for name in SETS:
        table = read_micrographs(place(scratch, name) / SIMULATED / "truth_micrographs.star")
        waves = ctf((BOX, BOX), **table.ctf.for_ctf())
        for truth, wave in zip(table.rows.to_dicts(), waves, strict=True):
            image = read_mrc(place(scratch, name) / truth["rlnMicrographName"])[0]
            rings, ice = ring_strength(image, table.pixel_size, wave), truth["rlnMicrographIceThickness"]
            row = {"set": name, "pixel": table.pixel_size, "size": len(image), "ice": ice, "rings": rings}
            rows.append(row | {"usable": rings >= VISIBLE and ice <= THICKEST_A} | values_of(truth))
    return pl.DataFrame(rows, infer_schema_length=None)


def run_ours(folder: Path, table: str, *options: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Values of our step for a table of micrographs, and what it took."""
    seconds, peak = halfmap(" ".join(["ctf --workers 1 --micrographs", table, *options]), folder)
    job = max((folder / "Ctf").glob("job*"))
    inside = [json.loads(line)["seconds"] for line in (job / "items.jsonl").read_text().splitlines()]
    rows = [values_of(row) for row in read_micrographs(job / "micrographs_ctf.star").rows.to_dicts()]
    return rows, {"seconds": seconds / len(rows), "inside": float(np.median(inside)), "peak_GB": peak}


def run_ctffind(
    program: Path, path: Path, variant: str, pixel: float, amplitude: float, *, phase: bool = False
) -> dict[str, Any]:
    """Values of CTFFIND for a micrograph, and what they took."""
    search, threads = SEARCHES[variant]
    tilt = variant == "CTFFIND tilt"
    # Astigmatism is not known, searched exhaustively or restrained; phase shift in radian, or else a tilt;
    # no thickness, no expert's options.
    ends = ["yes", 0, 3.15, 0.2] if phase else ["no", "yes" if tilt else "no"]
    answers = [path, "fit.mrc", pixel, 300, 2.7, amplitude, BOX, *search, *["no"] * 3, *ends, "no", "no", ""]
    with tempfile.TemporaryDirectory() as folder:
        words = [str(program), "-j", str(threads)]
        seconds, peak = run(words, Path(folder), "\n".join(map(str, answers)))
        _, u, v, angle, shift, _, _, axis, steepness, *_ = np.loadtxt(Path(folder) / "fit.txt").tolist()
    found = {"defocus": (u + v) / 2, "astigmatism": u - v, "angle": angle, "phase": float(np.degrees(shift))}
    # Its axes are counted the other way round, as the simulated fields show.
    found |= {"tilt": steepness, "axis": -axis} if tilt else {"tilt": None, "axis": None}
    return found | {"seconds": seconds, "peak_GB": peak}


def all_of_ctffind(program: Path, scratch: Path, truth: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Values of CTFFIND in all variants."""
    found = {}
    for variant in SEARCHES:
        kept, rows = place(scratch, f"{variant}.json"), []
        which = {"CTFFIND tilt": pl.col("tilt") > 0}
        which |= dict.fromkeys(("CTFFIND step 500", "CTFFIND threads"), pl.col("set").is_in(["middle", "4k"]))
        for row in truth.filter(which.get(variant, pl.lit(True))).to_dicts() if not kept.exists() else ():
            path, phase = place(scratch, row["set"]) / row["name"], row["phase"] > 0
            values = run_ctffind(program, path, variant, row["pixel"], 0.1, phase=phase)
            rows.append({"set": row["set"], "name": row["name"], "size": row["size"], **values})
        if rows:
            kept.write_text(json.dumps(rows))
        found[variant] = pl.DataFrame(json.loads(kept.read_text()), infer_schema_length=None)
    return found


def errors_of(found: pl.DataFrame, truth: pl.DataFrame, scratch: Path) -> pl.DataFrame:
    """Estimates minus truth, a column a quantity; null where there is no estimate or no sense in one."""
    both = truth.join(found, on=["set", "name"], suffix=" found", maintain_order="left")
    sense = {"angle": both["astigmatism"] > 200, "phase": both["phase"] > 0}
    sense |= dict.fromkeys(("tilt", "axis"), both["tilt"] >= 10)
    errors: dict[str, NDArray] = {}
    for key in ("defocus", "astigmatism", "cs", "thickness", *sense):
        if f"{key} found" not in both.columns or not both[f"{key} found"].count():
            errors[key] = np.full(len(both), np.nan)
            continue
        error = both[f"{key} found"].cast(pl.Float64).to_numpy() - both[key].to_numpy()
        if key in PERIODS:
            error = (error + PERIODS[key] / 2) % PERIODS[key] - PERIODS[key] / 2
        errors[key] = np.where(sense[key], error, np.nan) if key in sense else error
    rows = both.to_dicts()
    errors["particles"] = np.array([particle_error(row, place(scratch, row["set"])) for row in rows])
    sigmas = [f"sigma {key} found" for key in errors if f"sigma {key} found" in both.columns]
    columns = [pl.Series(key, values).fill_nan(None) for key, values in errors.items()]
    return both.select("set", "usable", *sigmas).with_columns(columns)


def particle_error(row: dict[str, Any], folder: Path) -> float:
    """Root mean square over a micrograph's particles of the error of their own defocus."""
    particles = read_truth_particles(folder).filter(pl.col("rlnMicrographName") == row["name"])
    x, y, u, v = (particles[label].to_numpy() for label in PARTICLE)
    slope, axis = np.tan(np.radians(row["tilt found"] or 0.0)), np.radians(row["axis found"] or 0.0)
    middle = row["size"] / 2
    rise = slope * (np.cos(axis) * (y - middle) - np.sin(axis) * (x - middle)) * row["pixel"]
    if row.get("surface found"):
        rise = DefocusSurface(np.array(parse_vector(row["surface found"])), (row["size"],) * 2).at(x, y)
    return float(np.sqrt(np.square(row["defocus found"] + rise - (u + v) / 2).mean()))


@functools.cache
def read_truth_particles(folder: Path) -> pl.DataFrame:
    """Particles of a set as they are."""
    return read_particles(folder / SIMULATED / "truth_particles.star").rows


def figures(errors: pl.DataFrame) -> dict[str, dict[str, float]]:
    """Median and 95th percentile of the errors' sizes, shares within one and two stated errors."""
    found = {}
    for key in QUANTITIES:
        sizes = errors[key].abs().drop_nulls().to_numpy()
        if not len(sizes):
            continue
        found[key] = {"n": len(sizes), "median": np.median(sizes), "p95": np.quantile(sizes, 0.95)}
        if (sigma := f"sigma {key} found") in errors.columns and errors[sigma].count():
            ratio = (errors[key].abs() / errors[sigma].cast(pl.Float64)).drop_nulls().to_numpy()
            found[key] |= {f"within {times}": (ratio <= times).mean() for times in (1, 2)}
    return {key: {name: float(value) for name, value in values.items()} for key, values in found.items()}


def tabulate(errors: dict[str, pl.DataFrame]) -> dict[str, Any]:
    """Print errors of the mean defocus set by set, then of all quantities."""
    some = next(iter(errors.values()))
    heads = "".join(f"{program:>22s}" for program in errors)
    print(f"Errors in Å or °, median / 95th percentile (number)\n{'defocus':18s}{'usable':>8s}{heads}")
    record: dict[str, Any] = {}
    for name in SETS:
        chosen = {program: of.filter(pl.col("set") == name) for program, of in errors.items()}
        record[name] = {program: figures(of).get("defocus") for program, of in chosen.items()}
        usable = some.filter(pl.col("set") == name)["usable"].sum()
        print(f"{name:18s}{usable:8d}" + cells(record[name]))
    for which, allowed in (("usable", [True]), ("all", [True, False])):
        chosen = {program: of.filter(pl.col("usable").is_in(allowed)) for program, of in errors.items()}
        record[which] = {program: figures(of) for program, of in chosen.items()}
        print(f"\n{which:26s}{heads}")
        for key in QUANTITIES:
            found = {program: of.get(key) for program, of in record[which].items()}
            stated = (found.get("Halfmap") or {}).get("within 1")
            shares = "" if stated is None else f"  within: {stated:.0%}, {found['Halfmap']['within 2']:.0%}"
            print(f"{key:26s}{cells(found)}{shares}")
    return record


def cells(found: dict[str, dict[str, float] | None]) -> str:
    """Figures of all programs in a row."""
    texts = [f"{f['median']:.3g} / {f['p95']:.3g} ({f['n']:.0f})" if f else "" for f in found.values()]
    return "".join(f"{text:>22s}" for text in texts)


def tabulate_costs(costs: pl.DataFrame) -> dict[str, Any]:
    """Print medians of seconds a micrograph by program and size, largest memory."""
    torch.set_num_threads(1)
    image, fft = torch.randn(4096, 4096), np.inf
    for _ in range(5):
        start = time.perf_counter()
        torch.fft.rfft2(image)
        fft = min(fft, time.perf_counter() - start)
    record: dict[str, Any] = {"fft_seconds": fft}
    print(f"\nFFT of 4096 x 4096 on one thread: {fft:.3f} s\n{'':24s}seconds    inside    in FFTs        GB")
    for (program, size), rows in costs.group_by("program", "size", maintain_order=True):
        whole, inside, peak = (rows[key].to_numpy() for key in ("seconds", "inside", "peak_GB"))
        found = [float(x) for x in (np.median(whole), np.median(inside), np.median(inside) / fft, peak.max())]
        print(f"{program!s:18s}{size:6d}" + "".join(f"{value:10.2f}" for value in found))
        record[f"{program} {size}"] = dict(zip(("seconds", "inside", "ffts", "peak_GB"), found, strict=True))
    return record


def bootstrap(scratch: Path, truth: pl.DataFrame) -> dict[str, list[float]]:
    """Print stated errors over those of a bootstrap over tiles, for a usable micrograph of each set of 2k.

    What all tiles share, like the roughness of the spectrum, is in the stated errors alone.
    """
    found: dict[str, list[float]] = {"defocus": [], "astigmatism, cos": [], "astigmatism, sin": []}
    step = CtfStep(micrographs=Path("micrographs.star"))
    rows = truth.filter(pl.col("usable") & (pl.col("size") == 2048) & (pl.col("phase") == 0))
    for row in rows.unique("set", keep="first", maintain_order=True).to_dicts():
        optics = Optics(voltage_kV=300.0, cs_mm=CS_MM, amplitude_contrast=0.1)
        path = place(scratch, row["set"]) / row["name"]
        item = MicrographItem(row["name"], path.stem, path, row["pixel"], optics, 1, None)
        image = checked_image(read_mrc(path)[0], row["name"])
        spectra, average, problem = fit_spectra(image, item, step)
        whole = estimate_ctf(spectra, average, problem)
        state, t, m = whole.fit.state, len(spectra.power), len(whole.fit.state.surface)
        rng, values = np.random.default_rng(len(found["defocus"])), []
        for _ in range(DRAWS):
            some = rng.integers(0, t, t)
            drawn = replace(whole.problem, power=spectra.power[some], terms=whole.problem.terms[some])
            start = replace(state, profile=state.profile[some], relative=state.relative[some])
            best = maximise(drawn, start, iterations=5).state
            values.append([best.surface[0], *best.astigmatism])
        # Tiles overlap, and are correlated where they do.
        scatter = np.std(values, axis=0, ddof=1) * np.sqrt(spectra.overlap)
        stated = np.sqrt(np.diag(whole.covariance))[[0, m, m + 1]]
        for ratios, ratio in zip(found.values(), stated / scatter, strict=True):
            ratios.append(float(ratio))
    print(f"\nStated errors over those of {DRAWS} draws of the tiles, {len(found['defocus'])} micrographs")
    for key, ratios in found.items():
        print(f"{key:26s}median {np.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    return found


def summarise(record: dict[str, Any]) -> dict[str, Any]:
    """Print ours beside CTFFIND's at usable contrast: errors, calibration, costs."""
    peer = "CTFFIND 30-5"
    ours, theirs = record["usable"]["Halfmap"], record["usable"].get(peer, {})
    tilted = record["usable"].get("CTFFIND tilt", {})
    rows: list[tuple[str, float, float | None]] = []
    for key, found in ours.items():
        other = (tilted if key in ("tilt", "axis") else theirs).get(key, {})
        rows += [(f"{key}, {part}", found[part], other.get(part)) for part in ("median", "p95")]
    costs = record["costs"]
    for part in ("inside", "peak_GB"):
        rows += [
            (f"{part} {size}", costs[f"Halfmap {size}"][part], costs.get(f"{peer} {size}", {}).get(part))
            for size in (2048, 4096)
        ]
    print(f"\n{'usable contrast':26s}{'Halfmap':>10s}{peer:>16s}{'ratio':>8s}")
    table = {}
    for name, mine, other in rows:
        ratio = mine / other if other else None
        texts = [f"{mine:10.3g}", f"{other:16.3g}" if other else "", f"{ratio:8.2f}" if ratio else ""]
        print(f"{name:26s}" + "".join(texts))
        table[name] = {"halfmap": mine, "ctffind": other, "ratio": ratio}
    for key, found in ours.items():
        if "within 1" in found:
            print(f"{key:26s}within 1, 2 errors: {found['within 1']:.0%}, {found['within 2']:.0%}")
    return table


def compare_real(real: Path, scratch: Path, program: Path | None) -> list[dict[str, Any]]:
    """Print mean defocus, astigmatism and angle of real micrographs, and ours minus theirs."""
    rows = []
    for name, (pattern, pixel, csv) in REAL.items():
        folder = scratch / "real" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "Micrographs").unlink(missing_ok=True)
        (folder / "Micrographs").symlink_to((real / name).resolve())
        files = [f"Micrographs/{path.name}" for path in sorted((real / name).glob(pattern))]
        optics = {"rlnOpticsGroupName": "opticsGroup1", "rlnOpticsGroup": 1, "rlnMicrographPixelSize": pixel}
        optics |= {"rlnVoltage": 300.0, "rlnSphericalAberration": 2.7, "rlnAmplitudeContrast": 0.07}
        names = pl.DataFrame({"rlnMicrographName": files, "rlnOpticsGroup": 1})
        write_micrographs(folder / "micrographs.star", MicrographSet(pl.DataFrame(optics), names))
        lines = pl.read_csv(real / name / csv).to_dicts() if csv else []
        stored = {f"Micrographs/{line['micrograph']}": values_of(line) for line in lines}
        for ours in run_ours(folder, "micrographs.star")[0]:
            found = {"Halfmap": ours}
            if ours["name"] in stored:
                found["CTFFIND 4"] = stored[ours["name"]]
            for variant in list(SEARCHES)[:2] if program else ():
                assert program is not None
                found[variant] = run_ctffind(program, folder / ours["name"], variant, pixel, 0.07)
            print(f"\n{ours['name']}, stated error of the defocus {ours['sigma defocus']} Å")
            for label, values in found.items():
                parts = [values["defocus"], values["astigmatism"], values["angle"]]
                parts += [ours["defocus"] - values["defocus"]]
                print(f"    {label:16s}" + "".join(f"{part:10.1f}" for part in parts))
            rows.append({"name": ours["name"], **found})
    return rows


def judge(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare figures at usable contrast with their bars, and print them."""
    ours, costs, inf = record["usable"]["Halfmap"], record["costs"], float("inf")
    medians = {key: ours.get(key, {}).get("median", inf) for key in MEDIANS}
    rows = [(f"{key}, median", medians[key], -inf, bar) for key, bar in MEDIANS.items()]
    rows += [
        ("micrographs without values", record["missing"], -inf, 0),
        ("defocus, 95th percentile", ours["defocus"]["p95"], -inf, P95_A),
    ]
    for key, found in ours.items():
        # Fewer errors than these cannot tell a share; of Cs none is asked for.
        if key != "cs" and "within 1" in found and found["n"] >= 30:
            rows += [(f"{key} within one stated error", found["within 1"], *WITHIN_1)]
            rows += [(f"{key} within two", found["within 2"], WITHIN_2, inf)]
    rows += [("seconds, 4096 x 4096", costs["Halfmap 4096"]["inside"], -inf, SECONDS_4K)]
    rows += [("GB", max(costs[f"Halfmap {size}"]["peak_GB"] for size in (2048, 4096)), -inf, MEMORY_GB)]
    verdicts = []
    print()
    for name, value, least, most in rows:
        met, bar = bool(least <= value <= most), " to ".join(f"{x:g}" for x in (least, most) if abs(x) < inf)
        print(f"{name:40s}{value:9.3g}  bar {bar}: {'met' if met else 'missed'}")
        verdicts.append({"name": name, "value": value, "bar": bar, "met": met})
    return verdicts


def main() -> int:
    """Print tables and write JSON; exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scratch", type=Path, help="keep the micrographs here, and use those that lie here")
    parser.add_argument("--ctffind", type=Path, help="executable of CTFFIND 5")
    parser.add_argument("--real", type=Path, help="folder with the folders of real micrographs")
    parser.add_argument("--workers", type=int, default=2, help="of the simulation (default 2)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/ctf.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (arguments.scratch or Path(temporary)).resolve()
        simulate(scratch, arguments.workers)
        truth, table = read_truth(scratch), f"{SIMULATED}/micrographs.star"
        run_ours(place(scratch, "specimen"), table)  # compiles what is compiled once in an installation
        found, costs, ours = {}, [], []
        for (name, size), _ in truth.group_by("set", "size", maintain_order=True):
            rows, cost = run_ours(place(scratch, str(name)), table, *OURS.get(str(name), []))
            ours += [{"set": name, **row} for row in rows]
            costs.append({"program": "Halfmap", "size": size, **cost})
        found["Halfmap"] = pl.DataFrame(ours, infer_schema_length=None)
        if arguments.ctffind:
            found |= all_of_ctffind(arguments.ctffind.resolve(), scratch, truth)
        for program, table in list(found.items())[1:]:
            rows = table.with_columns(program=pl.lit(program), inside=pl.col("seconds"))
            costs += rows.select("program", "size", "seconds", "inside", "peak_GB").to_dicts()
        resampled = bootstrap(scratch, truth)
        errors = {program: errors_of(table, truth, scratch) for program, table in found.items()}
        missing = len(truth) - len(found["Halfmap"])
        record = {"missing": missing} | tabulate(errors) | {"costs": tabulate_costs(pl.DataFrame(costs))}
        if arguments.real:
            record["real"] = compare_real(arguments.real.resolve(), scratch, arguments.ctffind)
    record |= {"bootstrap": resampled, "summary": summarise(record)}
    record["problems"] = [row for row in ours if row["problem"] != "none"]
    print(f"\nSimulated micrographs with a stated problem: {len(record['problems'])}")
    record["verdicts"] = judge(record)
    passed = all(entry["met"] for entry in record["verdicts"])
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    arguments.out.write_text(json.dumps({"machine": machine, **record, "passed": passed}, indent=2) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
