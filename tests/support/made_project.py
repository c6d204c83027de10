"""A project written by hand: its jobs' records and tables, with numbers that are known, and no work done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from halfmap.engine import Failure, Step
from halfmap.io.mrc import write_mrc
from halfmap.io.star import write_star
from halfmap.project import Project
from halfmap.project.job import Job
from halfmap.project.outcome import write_failures
from halfmap.project.pipeline import Process, edit_pipeline
from halfmap.steps.class2d.step import Class2DStep
from halfmap.steps.ctf.step import CtfStep
from halfmap.steps.curate.step import CurateStep
from halfmap.steps.extract.step import ExtractStep
from halfmap.steps.import_.step import ImportMovies
from halfmap.steps.motion.step import MotionStep
from halfmap.steps.pick.step import PickBlob
from halfmap.steps.postprocess.step import PostprocessStep
from halfmap.steps.refine.step import RefineStep
from halfmap.steps.select.step import SelectStep
from halfmap.steps.validate.step import ValidateStep

ODD = "<b>&.tiff"
"""A name that a page must not take for markup."""

OPTICS = pl.DataFrame(
    {
        "rlnOpticsGroupName": ["one"],
        "rlnOpticsGroup": [1],
        "rlnMicrographOriginalPixelSize": [1.25],
        "rlnVoltage": [300.0],
        "rlnSphericalAberration": [2.7],
        "rlnAmplitudeContrast": [0.1],
        "rlnImagePixelSize": [2.5],
        "rlnImageSize": [64],
        "rlnMicrographPixelSize": [1.25],
    }
)


def end(
    project: Project,
    step: Step,
    *,
    failed: Sequence[Failure] = (),
    status: str = "Succeeded",
    **tables: Mapping[str, Any],
) -> Job:
    """Make a job that has ended: its tables by the names of their files, without ``.star``."""
    job = project.new_job(step)
    for name, blocks in tables.items():
        write_star(job.folder / f"{name}.star", dict(blocks))
    write_failures(job.folder, failed)
    mark = {"Succeeded": "SUCCESS", "Failed": "FAILURE", "Aborted": "ABORTED"}[status]
    (job.folder / f"RELION_JOB_EXIT_{mark}").touch()
    kept = json.loads((job.folder / "job.json").read_text()) | {"seconds": 60.0}
    (job.folder / "job.json").write_text(json.dumps(kept))
    record(project, job, status)
    return job


def record(project: Project, job: Job, status: str = "Succeeded") -> None:
    """Enter what a job has written into the graph."""
    with edit_pipeline(project.root) as pipeline:
        pipeline.set_status(job.name, status)
        if status == "Succeeded":
            outputs = type(job.step).outputs
            there = {f"{job.name}{out.file}": out.node for out in outputs.values()}
            pipeline.connect(job.name, [], there)


def foreign(project: Project, name: str, label: str, inputs: list[str], outputs: dict[str, str]) -> Path:
    """A job as RELION leaves it."""
    with edit_pipeline(project.root) as pipeline:
        pipeline.processes.append(Process(name, label, "Succeeded"))
        pipeline.counter += 1
        pipeline.connect(name, inputs, outputs)
    folder = project.root / name
    folder.mkdir(parents=True)
    note = " ++++ Executing new job on Fri Nov 20 10:00:00 2026\n ++++ with the following command(s): \n"
    (folder / "note.txt").write_text(note + "`which relion_preprocess` --i x.star \n ++++ \n")
    return folder


def movies(n: int) -> dict[str, pl.DataFrame]:
    rows = {"rlnMicrographMovieName": [f"m{i}.tiff" for i in range(n)], "rlnOpticsGroup": [1] * n}
    return {"optics": OPTICS, "movies": pl.DataFrame(rows)}


def micrographs(n: int, **columns: list[Any]) -> dict[str, pl.DataFrame]:
    rows = {"rlnMicrographName": [f"Motion/{i}.mrc" for i in range(n)], "rlnOpticsGroup": [1] * n}
    return {"optics": OPTICS, "micrographs": pl.DataFrame(rows | columns)}


def particles(n: int, **columns: list[Any]) -> dict[str, pl.DataFrame]:
    rows = {"rlnImageName": [f"{i + 1:06d}@s.mrcs" for i in range(n)], "rlnOpticsGroup": [1] * n}
    return {"optics": OPTICS, "particles": pl.DataFrame(rows | columns)}


def to_micrographs(root: Path) -> Project:
    """Five movies, one broken; of four micrographs one is not corrected, and another one is rejected."""
    for name in ("a.tiff", "b.tiff", "c.tiff", "d.tiff", ODD):
        (root / name).write_bytes(b"")
    project = Project.open(root)
    end(
        project,
        ImportMovies(movies=(Path("*.tiff"),), pixel_size=1.25, dose_per_frame=1.5),
        failed=[Failure(ODD, f"{ODD}: is cut short", "movie")],
        movies=movies(4),
    )
    end(
        project,
        MotionStep(movies=Path("Import/job001/movies.star")),
        failed=[Failure("m3.tiff", "is black", "movie")],
        corrected_micrographs=micrographs(3, rlnAccumMotionTotal=[10.0, 20.0, 60.0]),
    )
    end(
        project,
        CtfStep(micrographs=Path("Motion/job002/corrected_micrographs.star")),
        micrographs_ctf=micrographs(3, rlnDefocusU=[1e4, 2e4, 3e4], rlnDefocusV=[1e4, 2e4, 3e4]),
    )
    return project


def whole(root: Path) -> Project:
    """A project from movies to a validated map."""
    project = to_micrographs(root)
    end(
        project,
        CurateStep(micrographs=Path("Ctf/job003/micrographs_ctf.star")),
        micrographs=micrographs(2),
        micrographs_rejected=micrographs(1, hmReason=["motion 60 above 50 Å (median 20); tilt 40 above 30"]),
    )
    picks = {"rlnMicrographName": ["Motion/0.mrc", "Motion/1.mrc"], "rlnMicrographCoordinates": ["0", "1"]}
    picks |= {"hmPicks": [40, 60], "hmPicksFalse": [1.0, 2.0]}
    end(
        project,
        PickBlob(micrographs=Path("Curate/job004/micrographs.star")),
        autopick={"coordinate_files": pl.DataFrame(picks)},
    )
    extract = end(
        project,
        ExtractStep(
            micrographs=Path("Curate/job004/micrographs.star"), coordinates=Path("Pick/job005/autopick.star")
        ),
        particles=particles(83),
    )
    results = [{"left_out": {"edge": 9, "duplicate": 2}}, {"left_out": {"edge": 3}}]
    lines = [
        json.dumps({"unit": "micrograph", "key": str(i), "seconds": 1, "result": result})
        for i, result in enumerate(results)
    ]
    (extract.folder / "items.jsonl").write_text("".join(f"{line}\n" for line in lines))
    classes = {"rlnReferenceImage": ["1@a.mrcs", "2@a.mrcs", "3@a.mrcs"], "rlnClassIndex": [1, 2, 3]}
    model = {"model_general": {"rlnNrClasses": 3}, "model_classes": pl.DataFrame(classes)}
    end(
        project,
        Class2DStep(particles=Path("Extract/job006/particles.star")),
        particles=particles(83),
        model=model,
    )
    end(
        project,
        SelectStep(model=Path("Class2D/job007/model.star")),
        particles=particles(70),
        rejected=particles(13, hmReason=["class 3"] * 10 + ["particle score below 0.3"] * 3),
        class_averages={"": pl.DataFrame(classes)[:2]},
        model=model,
    )
    (root / "first.mrc").write_bytes(b"")
    general = {"rlnCurrentResolution": 6.25, "rlnSymmetryGroup": "D2", "rlnPixelSize": 2.5}
    refine = end(
        project,
        RefineStep(
            particles=Path("Select/job008/particles.star"), reference=Path("first.mrc"), symmetry="D2"
        ),
        particles=particles(70, rlnRandomSubset=[1, 2] * 35),
        model={"model_general": general | {"rlnOriginalImageSize": 64}},
    )
    write_mrc(refine.folder / "map.mrc", ball(), pixel_size=2.5, stack=False)
    half = refine.folder / "run_half1_class001_unfil.mrc"
    half.write_bytes(b"")
    given = Path("Refine/job009") / half.name
    figures = {"rlnFinalResolution": 6.1, "hmResolutionFine": 5.9, "hmResolutionCoarse": 6.4}
    end(
        project,
        PostprocessStep(half1=given),
        postprocess={"general": figures | {"hmConfidence": 95.0, "rlnBfactorUsedForSharpening": -90.0}},
    )
    validate = end(project, ValidateStep(half1=given))
    finding = {"name": "Views & more", "light": "amber", "sentence": "Seen < often.", "values": {"a": 1.5}}
    findings = {"general": {}, "findings": [finding | {"pictures": [], "method": "By eye."}]}
    (validate.folder / "findings.json").write_text(json.dumps(findings))
    return project


def ball(n: int = 48, centre: tuple[float, float, float] = (0, 0, 0), radius: float = 12.0) -> np.ndarray:
    """A soft ball whose centre (x, y, z) is in voxels from the box's middle."""
    z, y, x = np.indices((n, n, n)) - n // 2
    apart = np.sqrt((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2)
    return (1 / (1 + np.exp(apart - radius))).astype(np.float32)
