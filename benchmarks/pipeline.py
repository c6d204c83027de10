"""Movies to a map by `halfmap run`, and the same movies step by step through RELION's own tools.

Simulated movies of a symmetric particle with ice crystals, carbon and fragments among them. Both programs
get pixel size, dose, gain and point group. RELION gets the diameter too, our CTF values (its seconds hold no
CTF), and the right answer where a person would choose: of its 2D classes those are kept in which most
particles are whole ones, and our mask of its map. Its threshold of picking is the default. Its first map is
made in the group at once: without symmetry that takes hours. Where it is none, as by axes in the wrong place,
a person would make it again: its refinement begins with the truth instead, and the seconds of one run count.
As ours does, it works on images that are scaled down until particles are cut anew for the refinement, and
has as many 2D classes; their iterations are the default of each. Ours is given no diameter; its times hold
two rounds of picking and classes, the restarts of the first map, and two refinements.

Maps are compared with the truth that the movies were made from: the mean of the unfiltered half maps, turned
and moved onto it in the better hand, in one soft sphere. Wall seconds of both hold where nothing else runs.
RELION takes most of an hour; what it has done is kept in `--scratch`, step by step.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from class2d import rounded, timed
from class2d_data import halfmap
from halfmap.data import MicrographSet
from halfmap.io.coordinates import read_coordinates
from halfmap.io.mrc import read_header, read_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import read_micrographs, read_particles, write_micrographs, write_particles
from halfmap.ops.fourier import resample
from halfmap.ops.fsc import fsc, resolution
from halfmap.ops.masks import soft_sphere
from halfmap.search.volume_alignment import align_volume
from halfmap.workflow.record import read_record
from pick import X, Y, hits

WORKERS = 2
DEFOCUS = "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"
FIRST = "InitialModel/run_it300_class001.mrc"
COMPARED_A = 12.0
"""Detail by which maps are turned onto the truth."""


@dataclass(frozen=True)
class Case:
    """Movies: how they are made, and what is known of them.

    `first_A` is the detail of the first map that RELION's refinement begins with; all lengths are in Å.
    """

    words: str
    dose: float
    group: str
    diameter: float
    first_A: float


CASES = {
    "apoferritin": Case(
        "--n-movies 6 --width 1024 --height 1024 --pixel-size 1.4 --dose-per-frame 1.5 --seed 3",
        1.5,
        "O",
        128.0,
        20.0,
    ),
    "proteasome": Case(
        "--models {models}/t20s.pdb.gz --n-movies 6 --width 1024 --height 1024 --pixel-size 1.8"
        " --dose-per-frame 1.2 --n-frames 32 --defocus-min 6000 --defocus-max 22000 --seed 4",
        1.2,
        "D7",
        173.0,
        30.0,
    ),
}


def make(folder: Path, models: Path, case: Case) -> None:
    """Simulate the movies; made once."""
    if not (folder / "Simulate/job001/RELION_JOB_EXIT_SUCCESS").exists():
        folder.mkdir(parents=True, exist_ok=True)
        halfmap(f"simulate movies {case.words.format(models=models)} --workers {WORKERS}", folder)


def whole_particles(folder: Path) -> dict[str, NDArray[np.float64]]:
    """Places (n, 2) of the whole particles of each movie, by its stem."""
    table = read_star(folder / "Simulate/job001/truth_particles.star")["particles"]
    assert isinstance(table, pl.DataFrame)
    whole = table.filter(pl.col("hmParticleKind") != "broken")
    parts = whole.group_by("rlnMicrographName")
    return {Path(str(name)).stem: part.select(X, Y).to_numpy() for (name,), part in parts}


def found(picks: dict[str, pl.DataFrame], truth: dict[str, NDArray], tolerance: float) -> dict[str, float]:
    """Precision and recall of picks, by the stems of their micrographs."""
    right = sum(
        int(hits(picks[name], place, tolerance).sum()) for name, place in truth.items() if name in picks
    )
    made = sum(map(len, picks.values()))
    total = sum(map(len, truth.values()))
    return {"picks": made, "precision": right / max(made, 1), "recall": right / total}


def against_truth(folder: Path, case: Case, halves: list[Path]) -> dict[str, float]:
    """Resolutions in Å to which the mean of two half maps is the truth."""
    own = torch.stack([torch.from_numpy(read_mrc(path).astype(np.float32)) for path in halves]).mean(0)
    pixel_size = read_header(halves[0]).pixel_size
    truth_path = folder / "Simulate/job001/truth_map.mrc"
    truth, finer = (
        torch.from_numpy(read_mrc(truth_path).astype(np.float32)),
        read_header(truth_path).pixel_size,
    )
    assert pixel_size is not None and finer is not None
    box = len(own)
    # The truth in boxes as wide as ours, then of as many voxels.
    wide = round(box * pixel_size / finer / 2) * 2
    truth = resized(truth, wide)
    truth = resample(truth, new_shape=(box,) * 3)
    scaled = wide * finer / box
    mask = soft_sphere((box,) * 3, radius=0.55 * case.diameter, edge=8.0, pixel_size=pixel_size)
    how: dict[str, Any] = {"mask": mask, "radius_px": 0.55 * case.diameter / pixel_size}
    how["frequency"] = round(box * pixel_size / COMPARED_A)
    aligned = align_volume(own, truth, **how)
    curve = fsc(aligned.apply(own) * mask, truth * mask)
    return {
        f"truth {threshold:g} Å": resolution(curve, pixel_size=scaled, box=box, threshold=threshold)
        for threshold in (0.143, 0.5)
    }


def number(block: Any, label: str) -> float:
    """A value of a block of pairs."""
    return float(block[label])


def resized(volume: torch.Tensor, size: int) -> torch.Tensor:
    """A cube padded by zeros, or cut, about its centre."""
    margin = (size - len(volume)) // 2
    if margin >= 0:
        return torch.nn.functional.pad(volume, [margin] * 6)
    inside = slice(-margin, -margin + size)
    return volume[inside, inside, inside]


def ours(folder: Path, case: Case, truth: dict[str, NDArray]) -> dict[str, Any]:
    """Run the chain anew, and compare its picks and map with the truth."""
    project = folder / "halfmap"
    shutil.rmtree(project, ignore_errors=True)
    job = folder / "Simulate/job001"
    words = [sys.executable, "-m", "halfmap", "run", f"{job}/Movies/*.tiff", "--gain", f"{job}/gain.mrc"]
    words += ["--dose-per-frame", str(case.dose), "--symmetry", case.group, "--until", "postprocess"]
    words += ["--pixel-size", str(read_header(job / "truth_map.mrc").pixel_size)]
    row = timed(
        [*words, "--workers", str(WORKERS), "--project", str(project)], folder, folder / "halfmap.log"
    )
    stages = {stage.name: project / stage.job for stage in read_record(project).stages if stage.job}
    table = read_star(stages["pick"] / "autopick.star")["coordinate_files"]
    assert isinstance(table, pl.DataFrame)
    picks = {
        Path(each["rlnMicrographName"]).stem: read_coordinates(project / each["rlnMicrographCoordinates"])
        for each in table.to_dicts()
    }
    pixel_size = read_micrographs(stages["curate"] / "micrographs.star").pixel_size
    last = stages.get("refine", stages["first-refine"])
    halves = [last / f"run_half{half}_class001_unfil.mrc" for half in (1, 2)]
    general = read_star(stages["postprocess"] / "postprocess.star")["general"]
    particles = len(read_particles(last / "particles.star"))
    scores = found(picks, truth, case.diameter / 3 / pixel_size)
    stated = {"particles": particles, "half maps Å": number(general, "rlnFinalResolution")}
    return {"program": "Halfmap", **scores, **stated, **against_truth(folder, case, halves), **row}


def relion(folder: Path, case: Case, truth: dict[str, NDArray]) -> dict[str, Any]:
    """RELION's tools one after the other; a step that has ended is not run again."""
    steps = Relion(folder, case, truth)
    row = steps.run()
    halves = [folder / f"relion/Refine/run_half{half}_class001_unfil.mrc" for half in (1, 2)]
    return {"program": "RELION", **row, **against_truth(folder, case, halves), **steps.seconds()}


class Relion:
    """RELION 3.1's tools on the same movies."""

    def __init__(self, folder: Path, case: Case, truth: dict[str, NDArray]) -> None:
        self.folder, self.case, self.truth = folder, case, truth
        self.out = folder / "relion"
        self.out.mkdir(exist_ok=True)
        self.pixel_size = float(read_header(folder / "Simulate/job001/truth_map.mrc").pixel_size or 0)

    def run(self) -> dict[str, Any]:
        """All steps; what was found on the way."""
        self.find_particles()
        self.make_map()
        post = read_star(self.out / "PostProcess/post.star")["general"]
        picks = {
            path.name.removesuffix("_log.star"): read_coordinates(path)
            for path in (self.out / "LoG").rglob("*_log.star")
        }
        scores = found(picks, self.truth, self.case.diameter / 3 / self.pixel_size)
        particles = len(read_particles(self.out / "selected.star"))
        stated = {"particles": particles, "half maps Å": number(post, "rlnFinalResolution")}
        return {**scores, **stated, "first map found": self.has_first_map()}

    @property
    def box(self) -> int:
        """Side of the particles' images, px."""
        return 2 * round(1.5 * self.case.diameter / self.pixel_size / 2)

    @property
    def common(self) -> str:
        """Options of all classifications and refinements."""
        return (
            f"--particle_diameter {1.15 * self.case.diameter:.0f} --flatten_solvent --zero_mask"
            " --oversampling 1 --dont_combine_weights_via_disc --pool 3 --random_seed 1"
        )

    def find_particles(self) -> None:
        """From the movies to particles of good classes."""
        case, size, box = self.case, self.pixel_size, self.box
        small = 2 * round(box * size / min(3.5, case.diameter / 40) / 2)
        circle = round(0.625 * case.diameter * small / box / size)
        self.step(
            "Motion",
            "relion_run_motioncorr --use_own --i Simulate/job001/movies.star --o relion/Motion/"
            " --bin_factor 1 --bfactor 150 --gainref Simulate/job001/gain.mrc"
            " --defect_file Simulate/job001/defects.txt"
            f" --first_frame_sum 1 --last_frame_sum -1 --patch_x 3 --patch_y 3 --dose_per_frame {case.dose}"
            f" --preexposure 0 --dose_weighting --j {WORKERS}",
        )
        self.take_defocus()
        self.step(
            "LoG",
            "relion_autopick --i relion/micrographs.star --odir relion/LoG/ --pickname log --LoG --shrink 0"
            f" --LoG_diam_min {0.9 * case.diameter} --LoG_diam_max {1.1 * case.diameter} --lowpass 20"
            f" --angpix {size}",
        )
        self.step(
            "Extract",
            "relion_preprocess --i relion/micrographs.star --coord_dir relion/LoG/ --coord_suffix _log.star"
            " --part_star relion/particles.star --part_dir relion/Extract/ --extract --norm --invert_contrast"
            f" --extract_size {box} --scale {small} --bg_radius {circle}"
            " --white_dust -1 --black_dust -1",
        )
        classes = max(8, round(len(read_particles(self.out / "particles.star")) / 200))
        self.step(
            "Class2D",
            f"relion_refine --i relion/particles.star --o relion/Class2D/run --ctf --K {classes} --iter 25"
            f" --tau2_fudge 2 {self.common} --psi_step 12 --offset_range 5 --offset_step 2 --norm --scale"
            f" --j {WORKERS}",
        )
        self.choose()

    def make_map(self) -> None:
        """From these particles to a map."""
        case, size, box = self.case, self.pixel_size, self.box
        self.step(
            "InitialModel",
            "relion_refine --i relion/selected.star --o relion/InitialModel/run --sgd --denovo_3dref"
            " --ctf --K 1 --sgd_ini_iter 50 --sgd_inbetween_iter 200 --sgd_fin_iter 50 --sgd_write_iter 100"
            f" --sgd_ini_resol 35 --sgd_fin_resol 15 --sgd_ini_subset 100 --sgd_fin_subset 500"
            f" --sym {case.group} {self.common} --healpix_order 1 --offset_range 6 --offset_step 2 --pad 1"
            f" --j {WORKERS}",
        )
        self.step(
            "FullExtract",
            "relion_preprocess --i relion/micrographs.star --reextract_data_star relion/selected.star"
            " --recenter --part_star relion/full.star --part_dir relion/FullExtract/ --extract --norm"
            f" --invert_contrast --extract_size {box} --bg_radius {round(0.625 * case.diameter / size)}"
            " --white_dust -1 --black_dust -1",
        )
        self.step(
            "FullMap",
            f"relion_image_handler --i {self.first_map()} --o relion/initial.mrc"
            f" --rescale_angpix {size} --new_box {box}",
        )
        self.step(
            "Refine",
            "mpirun --allow-run-as-root --oversubscribe -n 3 relion_refine_mpi --auto_refine"
            " --split_random_halves --i relion/full.star --o relion/Refine/run --ref relion/initial.mrc --ctf"
            f" --ini_high {case.first_A} {self.common} --healpix_order 2"
            " --auto_local_healpix_order 4 --offset_range 5 --offset_step 2 --low_resol_join_halves 40 --norm"
            f" --scale --pad 2 --sym {case.group} --j 1",
        )
        self.step(
            "PostProcess",
            "relion_postprocess --i relion/Refine/run_half1_class001_unfil.mrc --o relion/PostProcess/post"
            f" --mask {self.mask()} --auto_bfac --autob_lowres 10",
        )

    def first_map(self) -> str:
        """RELION's first map, or the truth where it is none."""
        return f"relion/{FIRST}" if self.has_first_map() else "Simulate/job001/truth_map.mrc"

    def has_first_map(self) -> bool:
        """Whether RELION's first map is the particle to the detail that its refinement begins with."""
        reached = against_truth(self.folder, self.case, [self.out / FIRST])
        return reached["truth 0.5 Å"] <= self.case.first_A

    def mask(self) -> Path:
        """A mask of RELION's map, for which a person would choose a threshold."""
        made = sorted((self.folder / "Mask").glob("job*/mask.mrc"))
        if not made:
            halfmap("mask relion/Refine/run_class001.mrc", self.folder)
            made = sorted((self.folder / "Mask").glob("job*/mask.mrc"))
        return made[-1]

    def step(self, name: str, words: str) -> None:
        """Run a step in a folder of its own, unless that is done, and keep its seconds."""
        record = self.out / f"{name}.json"
        if record.exists():
            return
        shutil.rmtree(self.out / name, ignore_errors=True)
        (self.out / name).mkdir()
        seconds = timed(shlex.split(words), self.folder, self.out / f"{name}.log")
        record.write_text(json.dumps(seconds) + "\n")
        print(f"  RELION {name}: {seconds['wall s']:.0f} s", flush=True)

    def seconds(self) -> dict[str, float]:
        """Of all steps together, and the wall seconds of each."""
        each: dict[str, dict[str, float]] = {
            path.stem: json.loads(path.read_text()) for path in sorted(self.out.glob("*.json"))
        }
        total = {unit: sum(seconds[unit] for seconds in each.values()) for unit in ("wall s", "CPU s")}
        return total | {f"{name} s": seconds["wall s"] for name, seconds in each.items()}

    def take_defocus(self) -> None:
        """RELION's micrographs with our CTFs, those of our run when its steps began."""
        if (self.out / "micrographs.star").exists():
            return
        stages = {stage.name: stage.job for stage in read_record(self.folder / "halfmap").stages}
        ours_ = read_micrographs(self.folder / "halfmap" / stages["ctf"] / "micrographs_ctf.star").rows
        known = {Path(row["rlnMicrographName"]).stem: row for row in ours_.to_dicts()}
        theirs = read_micrographs(self.out / "Motion/corrected_micrographs.star")
        rows = [known[Path(name).stem] for name in theirs.rows["rlnMicrographName"]]
        columns = [pl.Series(label, [float(row[label]) for row in rows]) for label in DEFOCUS]
        table = MicrographSet(theirs.optics, theirs.rows.with_columns(*columns))
        write_micrographs(self.out / "micrographs.star", table)

    def choose(self) -> None:
        """Keep the classes in which most particles are whole ones."""
        table = read_particles(self.out / "Class2D/run_it025_data.star")
        tolerance = self.case.diameter / 3 / self.pixel_size
        right = np.zeros(len(table), bool)
        names = table.rows["rlnMicrographName"].map_elements(
            lambda name: Path(name).stem, return_dtype=pl.String
        )
        for name, place in self.truth.items():
            mine = np.flatnonzero((names == name).to_numpy())
            right[mine] = hits(table.rows[mine].select(X, Y), place, tolerance)
        number = table.rows["rlnClassNumber"].to_numpy()
        share = np.bincount(number, right) / np.maximum(np.bincount(number), 1)
        write_particles(self.out / "selected.star", table.select(share[number] > 0.5))


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    cells = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
    )
    print("  ".join(cells), flush=True)


def main() -> None:
    """Make the movies where they are not yet, run both programs, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("../shared/data/models"))
    parser.add_argument(
        "--scratch", type=Path, required=True, help="folder of projects; kept for the next run"
    )
    parser.add_argument("--cases", nargs="*", choices=CASES, default=["apoferritin"])
    parser.add_argument("--programs", nargs="*", choices=("Halfmap", "RELION"), default=["Halfmap", "RELION"])
    options = parser.parse_args()
    programs: dict[str, Callable[[Path, Case, dict[str, NDArray]], dict[str, Any]]] = {
        "Halfmap": ours,
        "RELION": relion,
    }
    rows = []
    for name in options.cases:
        case, folder = CASES[name], (options.scratch / name).resolve()
        make(folder, options.models.resolve(), case)
        truth = whole_particles(folder)
        for program in options.programs:
            rows.append({"data": name} | programs[program](folder, case, truth))
            show(rows[-1])
    path = Path(__file__).parent / "results" / "pipeline.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {(row["data"], row["program"]) for row in rows}
    rows += [row for row in kept if (row["data"], row["program"]) not in done]
    machine = platform.processor() or platform.machine()
    path.write_text(json.dumps(rounded({"machine": machine, "rows": rows}), indent=1) + "\n")


if __name__ == "__main__":
    main()
