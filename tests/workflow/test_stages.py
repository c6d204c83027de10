"""The stages of the chain: what each plans from what is known, and that its step takes it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from halfmap.data import ParticleSet
from halfmap.engine import RunOptions, parse_step, registered_steps
from halfmap.io.mrc import write_mrc
from halfmap.io.star import write_star
from halfmap.io.tables import write_particles
from halfmap.project import Project
from halfmap.steps import load_steps
from halfmap.workflow import measured, stages
from halfmap.workflow.chain import Chain, Plan, Skip
from halfmap.workflow.record import Stage
from halfmap.workflow.settings import RunSettings

load_steps()

FOUND = {
    "picks": lambda path: (2000, 50.0),
    "roundness": lambda path, root: 0.8,
    "poor_share": lambda path: 0.001,
    "farthest_origins": lambda path: 3.0,
    "read_particle_facts": lambda path: measured.Particles(2000, 3.0, 64, 120.0),
}
GROUP = {"rlnSymmetryGroup": "D2", "hmWeakestCorrelation": 0.9, "hmShareOfSignal": 0.97}


class Known(Chain):
    """A chain whose jobs have left what a test says, and no files."""

    def __init__(self, blocks: dict[str, list[dict[str, Any]]], **settings: Any) -> None:
        given = {"micrographs": (Path("m.mrc"),)} if not {"movies", "particles"} & set(settings) else {}
        super().__init__(Project(Path("/p")), RunSettings(**given | settings), RunOptions())
        self.blocks = blocks
        self.steps: dict[str, Any] = {}

    def output(self, stage: str, name: str) -> Path:
        assert self.has(stage), f"{stage} has no job"
        return Path(f"/p/{stage}/{name}.star")

    def job(self, stage: str) -> Any:
        return SimpleNamespace(folder=Path(f"/p/{stage}"), step=self.steps[stage])


def walk(monkeypatch, blocks: dict | None = None, found: dict | None = None, **settings: Any) -> Known:
    """Plan all stages, as if each had run well."""
    blocks = {
        "symmetry_general": [{"rlnSymmetryGroup": "C1"}],
        "symmetry_groups": [GROUP],
        "model_general": [{"rlnCurrentResolution": 6.1}],
        "model_classes": [{"rlnEstimatedResolution": each} for each in (8.0, 9.0, 20.0)],
        "coordinate_files": [],
        "": [{}, {}],
    } | (blocks or {})
    chain = Known(blocks, **settings)
    for name, function in (FOUND | (found or {})).items():
        monkeypatch.setattr(measured, name, function)

    def read_block(path: Path, block: str) -> list[dict[str, Any]]:
        return blocks.get(f"{path.parent.name}:{block}", blocks.get(block, []))

    monkeypatch.setattr(measured, "read_block", read_block)
    monkeypatch.setattr(stages, "_micrograph_pixel", lambda chain: 1.1)
    for name, function in stages.STAGES:
        plan = function(chain)
        if isinstance(plan, Plan):
            values = {key: value for key, value in plan.values.items() if value is not None}
            chain.steps[name] = parse_step(registered_steps()[plan.step], values)
            chain.done[name] = Stage(name, f"{name}/job/", plan.decisions)
        elif isinstance(plan, Skip):
            chain.done[name] = Stage(name, "", plan.decisions)
    return chain


def run_stages(chain: Known) -> list[str]:
    return [name for name in chain.done if chain.has(name)]


def test_every_stage_from_movies_is_a_step_that_takes_what_is_planned(monkeypatch):
    chain = walk(monkeypatch, movies=(Path("m*.tif"),), dose_per_frame=1.0, pixel_size=1.1)
    left_out = {"symmetric", "class3d", "clean"}
    assert run_stages(chain) == [
        name for name, _ in stages.STAGES if name not in left_out and not name.startswith("round-")
    ]
    assert chain.steps["refine"].particles == Path("/p/full-extract/particles.star")
    assert chain.steps["validate"].half1 == Path("/p/refine/half1.star")
    assert chain.steps["extract"].pixel_size == pytest.approx(3.0)


def test_from_micrographs_there_is_no_motion(monkeypatch):
    assert run_stages(walk(monkeypatch))[:2] == ["import", "ctf"]


def test_from_particles_nothing_is_picked_or_cut(monkeypatch):
    chain = walk(monkeypatch, particles=Path("p.star"))
    assert run_stages(chain)[:3] == ["import", "class2d", "select"]
    assert "full-extract" not in chain.done
    assert chain.steps["validate"].half1 == Path("/p/first-refine/half1.star")


def test_a_symmetry_that_is_given_is_not_looked_for(monkeypatch):
    chain = walk(monkeypatch, symmetry="D7")
    assert not {"symmetry", "round-O", "symmetric"} & set(run_stages(chain))
    assert {chain.steps[name].symmetry for name in ("abinitio", "first-refine", "refine", "validate")} == {
        "D7"
    }


def test_a_group_that_is_found_is_used_from_there_on(monkeypatch):
    chain = walk(monkeypatch, {"symmetry:symmetry_general": [{"rlnSymmetryGroup": "D2"}]})
    assert chain.steps["abinitio"].symmetry == "C1"
    assert {chain.steps[name].symmetry for name in ("symmetric", "first-refine", "validate")} == {"D2"}
    assert chain.steps["first-refine"].reference == Path("/p/symmetric/map.star")
    assert "97 %" in chain.done["symmetric"].decisions[0].why


def round_particles(reached: dict[str, float]) -> dict[str, list[dict[str, Any]]]:
    return {
        f"round-{group}-refine:model_general": [{"rlnCurrentResolution": each}]
        for group, each in reached.items()
    }


ROUND = {"roundness": lambda path, root: 0.98}


def test_round_particles_get_the_group_in_which_half_maps_agree_best(monkeypatch):
    blocks = round_particles({"C1": 14.0, "T": 12.9, "O": 8.2, "I2": 20.0})
    chain = walk(monkeypatch, blocks, ROUND)
    assert chain.steps["round-O"].symmetry == "O"
    assert chain.steps["round-C1-refine"].reference == Path("/p/abinitio/map.star")
    assert {chain.steps[name].symmetry for name in ("first-refine", "refine", "validate")} == {"O"}
    assert chain.steps["first-refine"].reference == Path("/p/round-O-refine/map.star")
    assert "8.2 Å O" in chain.done["symmetric"].decisions[0].why


def test_of_groups_that_do_as_well_round_particles_get_the_largest(monkeypatch):
    chain = walk(monkeypatch, round_particles({"C1": 14.0, "T": 8.0, "O": 8.2, "I2": 20.0}), ROUND)
    assert chain.steps["first-refine"].symmetry == "O"


def test_round_particles_without_symmetry_stay_without(monkeypatch):
    chain = walk(monkeypatch, round_particles({"C1": 7.0, "T": 12.9, "O": 15.0, "I2": 20.0}), ROUND)
    assert "symmetric" not in run_stages(chain)
    assert chain.steps["first-refine"].symmetry == "C1"
    assert chain.steps["first-refine"].reference == Path("/p/round-C1-refine/map.star")


def test_an_octahedral_first_map_needs_no_trial(monkeypatch):
    blocks = {
        "symmetry_general": [{"rlnSymmetryGroup": "O"}],
        "symmetry_groups": [GROUP | {"rlnSymmetryGroup": "O"}],
    }
    chain = walk(monkeypatch, blocks, ROUND)
    assert "round-C1-refine" not in chain.done
    assert chain.steps["symmetric"].symmetry == chain.steps["refine"].symmetry == "O"


def test_particles_that_fit_badly_are_sorted_in_3d(monkeypatch):
    chain = walk(monkeypatch, found={"poor_share": lambda path: 0.1})
    assert chain.steps["clean"].classes == (1, 2)  # 8 and 9 Å, not 20
    assert chain.steps["full-extract"].coordinates == Path("/p/clean/particles.star")


def test_pixels_that_hold_more_than_is_in_them_are_kept(monkeypatch):
    chain = walk(monkeypatch, {"model_general": [{"rlnCurrentResolution": 9.0}]})
    assert not {"full-extract", "refine"} & set(run_stages(chain))
    assert "9.0 Å is far from the 6.0 Å" in chain.done["full-extract"].decisions[0].why
    assert chain.steps["postprocess"].half1 == Path("/p/first-refine/half1.star")


def test_a_diameter_that_is_given_goes_to_all_that_use_one(monkeypatch):
    chain = walk(monkeypatch, diameter=100.0)
    for name in ("curate", "first-pick", "pick", "extract"):
        assert chain.steps[name].diameter == 100.0
    for name in ("class2d", "abinitio", "refine", "validate"):
        assert chain.steps[name].diameter == pytest.approx(110.0)


def particles(tmp_path: Path, **columns: Any) -> Path:
    n = len(next(iter(columns.values())))
    optics = {"rlnOpticsGroup": [1], "rlnImagePixelSize": [2.5], "rlnImageSize": [48]}
    rows = {"rlnImageName": [f"{i + 1}@a.mrcs" for i in range(n)], "rlnOpticsGroup": [1] * n, **columns}
    path = tmp_path / "particles.star"
    write_particles(path, ParticleSet(pl.DataFrame(optics), pl.DataFrame(rows)))
    return path


def test_what_tables_tell(tmp_path: Path):
    rng = np.random.default_rng(1)
    fit = rng.normal(50.0, 5.0, 1000)
    fit[:80] = 10.0
    x, y = rng.normal(0, 2.0, (2, 1000))
    path = particles(
        tmp_path,
        rlnLogLikeliContribution=fit,
        rlnOriginXAngst=x,
        rlnOriginYAngst=y,
        hmParticleDiameter=[120.0] * 1000,
    )
    assert measured.poor_share(path) == pytest.approx(0.08, abs=0.005)
    # 95 % of a round Gaussian of 2 Å lie within 2 * sqrt(-2 ln 0.05).
    assert measured.farthest_origins(path) == pytest.approx(4.9, abs=0.3)
    assert measured.read_particle_facts(path) == measured.Particles(1000, 2.5, 48, 120.0)


@pytest.mark.parametrize(("short", "wanted"), [(10.0, 1.0), (7.0, 0.7)])
def test_roundness_is_short_over_long_axis(tmp_path: Path, short: float, wanted: float):
    y, x = np.mgrid[:48, :48] - 24.0
    turned = 0.8 * x + 0.6 * y, -0.6 * x + 0.8 * y
    image = 3.0 + np.exp(-0.5 * ((turned[0] / 10.0) ** 2 + (turned[1] / short) ** 2) * 4)
    write_mrc(tmp_path / "a.mrcs", np.stack([image, image]).astype(np.float32), pixel_size=1.0, stack=True)
    write_star(tmp_path / "a.star", {"": pl.DataFrame({"rlnReferenceImage": ["1@a.mrcs", "2@a.mrcs"]})})
    assert measured.roundness(tmp_path / "a.star", tmp_path) == pytest.approx(wanted, abs=0.02)
