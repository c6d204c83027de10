"""The stages of the chain: what each plans from what is known, and that its step takes it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from halfmap.data import ParticleSet
from halfmap.engine import RunOptions, parse_step
from halfmap.io.mrc import write_mrc
from halfmap.io.star import write_star
from halfmap.io.tables import write_particles
from halfmap.ops.symmetry import operators
from halfmap.project import Project
from halfmap.steps import load_steps
from halfmap.workflow import first_map, measured, stages
from halfmap.workflow.chain import Chain, Plan, Skip
from halfmap.workflow.record import Stage
from halfmap.workflow.settings import RunSettings

load_steps()

FOUND = {
    "picks": lambda path: (2000, 50.0),
    "roundness": lambda path, root: 0.8,
    "poor_share": lambda path: 0.001,
    "farthest_origins": lambda path: 3.0,
    "agreement": lambda path: 14.0,
    "read_particle_facts": lambda path: measured.Particles(2000, 3.0, 64, 120.0),
}


HAND = {
    "hmMirrored": 0,
    "hmHand": "right",
    "hmHelixPlaces": 30,
    "hmRightHanded": 29,
    "rlnEstimatedResolution": 3.9,
}


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
        "model_general": [{"rlnCurrentResolution": 6.1}],
        "model_classes": [{"rlnEstimatedResolution": each} for each in (8.0, 9.0, 20.0)],
        "coordinate_files": [],
        "hand": [HAND],
        "": 2 * [{"rlnReferenceImage": "000001@Class2D/job006/run_classes.mrcs"}],
    } | (blocks or {})
    chain = Known(blocks, **settings)
    for name, function in (FOUND | (found or {})).items():
        monkeypatch.setattr(measured, name, function)

    def read_block(path: Path, block: str) -> list[dict[str, Any]]:
        return blocks.get(f"{path.parent.name}:{block}", blocks.get(block, []))

    monkeypatch.setattr(measured, "read_block", read_block)
    monkeypatch.setattr(stages, "_micrograph_pixel", lambda chain: 1.1)
    for name, step, function in stages.STAGES:
        plan = function(chain)
        if isinstance(plan, Plan):
            values = {key: value for key, value in plan.values.items() if value is not None}
            chain.steps[name] = parse_step(chain._class(step), values)
            chain.done[name] = Stage(name, f"{name}/job/", plan.decisions)
        elif isinstance(plan, Skip):
            chain.done[name] = Stage(name, "", plan.decisions)
    return chain


def run_stages(chain: Known) -> list[str]:
    return [name for name in chain.done if chain.has(name)]


def test_every_stage_from_movies_is_a_step_that_takes_what_is_planned(monkeypatch):
    chain = walk(monkeypatch, movies=(Path("m*.tif"),), dose_per_frame=1.0, pixel_size=1.1)
    left_out = {"class3d", "clean"}
    assert run_stages(chain) == [
        name
        for name, _, _ in stages.STAGES
        if name not in left_out and not name.startswith(("round-", "symmetric", "less-symmetric"))
    ]
    assert chain.steps["refine"].particles == Path("/p/full-extract/particles.star")
    assert chain.steps["hand"].half1 == Path("/p/refine/half1.star")
    assert chain.steps["validate"].half1 == Path("/p/hand/half1.star")
    assert chain.steps["validate"].particles == Path("/p/hand/particles.star")
    assert chain.steps["validate"].template == Path("/p/Class2D/job006/run_classes.mrcs")
    assert chain.steps["extract"].pixel_size == pytest.approx(3.0)


def test_from_micrographs_there_is_no_motion(monkeypatch):
    assert run_stages(walk(monkeypatch))[:2] == ["import", "ctf"]


def test_from_particles_nothing_is_picked_or_cut(monkeypatch):
    chain = walk(monkeypatch, particles=Path("p.star"))
    assert run_stages(chain)[:3] == ["import", "class2d", "select"]
    assert "full-extract" not in chain.done
    assert chain.steps["hand"].half1 == Path("/p/first-refine/half1.star")


def test_a_symmetry_that_is_given_is_not_looked_for(monkeypatch):
    chain = walk(monkeypatch, symmetry="D7")
    assert not {"symmetry", "round-O", "symmetric", "abinitio-trial"} & set(run_stages(chain))
    assert {chain.steps[name].symmetry for name in ("abinitio", "first-refine", "refine", "validate")} == {
        "D7"
    }


ROUND = {"roundness": lambda path, root: 0.98}
D2 = {"symmetry:symmetry_general": [{"rlnSymmetryGroup": "D2"}]}


def evidence(**means: float) -> dict[str, Any]:
    """What `measured.gain` tells of trials, by their stages; standard errors are 0.1."""

    def gain(particles: Path, over: Path | None = None, *, folds: float = 1.0) -> tuple[float, float]:
        own, other = (
            0.0 if each is None else means[each.parent.name.removesuffix("-trial").replace("-", "_")]
            for each in (particles, over)
        )
        return own - other, 0.1

    return {"gain": gain}


def test_a_group_that_is_found_is_used_where_particles_are_likelier_in_it(monkeypatch):
    chain = walk(monkeypatch, D2, evidence(abinitio=20.0, symmetric=21.0))
    assert chain.steps["abinitio"].symmetry == chain.steps["abinitio-trial"].symmetry == "C1"
    names = "symmetric", "symmetric-trial", "first-refine", "validate"
    assert {chain.steps[name].symmetry for name in names} == {"D2"}
    assert chain.steps["first-refine"].reference == Path("/p/symmetric/map.star")
    begun = {chain.steps[name].initial_lowpass for name in ("abinitio-trial", "symmetric-trial")}
    assert begun == {20.0}, "a group that begins with less is behind the other"
    assert "-1.00 ± 0.10 without" in chain.done["first-refine"].decisions[0].why
    assert not [name for name in run_stages(chain) if name.startswith("round-")]


@pytest.mark.parametrize("found", [20.15, 19.0])
def test_a_group_that_makes_particles_no_likelier_is_not_used(monkeypatch, found):
    chain = walk(monkeypatch, D2, evidence(abinitio=20.0, symmetric=found))
    assert {chain.steps[name].symmetry for name in ("first-refine", "refine", "validate")} == {"C1"}
    assert chain.steps["first-refine"].reference == Path("/p/abinitio/map.star")


NOT_THERE = {"hmVerdict": "no", "hmSearchCorrelation": 0.5, "hmNullCorrelation": 0.1, "hmNullStd": 0.01}


def scores(found: str = "C1", *, search: float = 0.6, **nearly: float) -> dict[str, Any]:
    """What the search for a group says: what it found, and correlations of those that are nearly there."""
    there = NOT_THERE | {"hmVerdict": "nearly", "hmSearchCorrelation": search}
    rows = [{"rlnSymmetryGroup": group, "hmWeakestCorrelation": c, **there} for group, c in nearly.items()]
    rows += [{"rlnSymmetryGroup": "D4", "hmWeakestCorrelation": 0.3, **NOT_THERE}]
    general = [{"rlnSymmetryGroup": found, "hmSignalCorrelation": 0.95}]
    return {"symmetry_groups": rows, "symmetry_general": general}


@pytest.mark.parametrize(("search", "tried"), [(0.6, "D2"), (0.13, None)])
def test_a_group_that_is_nearly_there_is_put_to_the_particles(monkeypatch, search: float, tried: str | None):
    known = evidence(abinitio=20.0, symmetric=30.0, less_symmetric=25.0)
    chain = walk(monkeypatch, scores(search=search, C2=0.85, D2=0.8), known)
    assert chain.has("symmetric") == (tried is not None)
    assert chain.steps["refine"].symmetry == (tried or "C1")


@pytest.mark.parametrize("found", ["C1", "C3"])
def test_a_group_within_one_that_is_nearly_there_may_be_all_there_is(monkeypatch, found: str):
    nearly = {"D3": 0.7, "C2": 0.72} | ({"C3": 0.8} if found == "C1" else {})
    known = evidence(abinitio=20.0, symmetric=22.0, less_symmetric=30.0)
    chain = walk(monkeypatch, scores(found, **nearly), known)
    assert (chain.steps["symmetric"].symmetry, chain.steps["less-symmetric"].symmetry) == ("D3", "C3")
    assert chain.steps["refine"].symmetry == "C3"
    assert chain.steps["first-refine"].reference == Path("/p/less-symmetric/map.star")
    assert "-8.00 ± 0.10 in D3" in chain.done["first-refine"].decisions[0].why


def test_a_group_is_not_lost_because_its_own_parts_are_as_likely(monkeypatch):
    known = evidence(abinitio=20.0, symmetric=30.1, less_symmetric=30.0)
    chain = walk(monkeypatch, scores(D6=0.75, D3=0.85), known)
    assert chain.steps["refine"].symmetry == "D6"


@pytest.mark.parametrize(
    ("group", "parts"),
    [("C6", "C2 C3"), ("D2", "C2"), ("D4", "C2 C4 D2"), ("D3", "C2 C3"), ("C5", ""), ("D7", "C2 C7")],
)
def test_groups_within_another_are_those_whose_operators_it_has(group: str, parts: str):
    assert first_map._parts(group) == set(parts.split())
    turns = {name: len(operators(name)) for name in (group, *parts.split())}
    for part in parts.split():
        assert turns[group] % turns[part] == 0


def test_a_group_is_looked_for_in_half_maps_and_what_came_nearest_is_said(monkeypatch):
    rows = [
        {"rlnSymmetryGroup": "C2", "hmWeakestCorrelation": 0.4, **NOT_THERE},
        {"rlnSymmetryGroup": "D2", "hmWeakestCorrelation": 0.53, **NOT_THERE},
    ]
    general = [{"rlnSymmetryGroup": "C1", "hmSignalCorrelation": 0.99}]
    chain = walk(monkeypatch, {"symmetry_groups": rows, "symmetry_general": general})
    step = chain.steps["symmetry"]
    assert (step.map, step.half1) == tuple(
        Path(f"/p/abinitio-trial/{name}.star") for name in ("map", "half1")
    )
    (decision,) = chain.done["first-refine"].decisions
    assert "D2 comes nearest, with a correlation of 0.53 where the noise leaves 0.99" in decision.why


def test_round_particles_get_the_group_that_they_are_likeliest_in(monkeypatch):
    known = evidence(abinitio=24.0, round_T=23.0, round_O=27.0, round_I2=22.0)
    chain = walk(monkeypatch, found=ROUND | known)
    assert chain.steps["round-O"].symmetry == "O"
    assert chain.steps["abinitio-trial"].reference == Path("/p/abinitio/map.star")
    assert {chain.steps[name].symmetry for name in ("first-refine", "refine", "validate")} == {"O"}
    assert chain.steps["first-refine"].reference == Path("/p/round-O/map.star")


@pytest.mark.parametrize(
    ("why", "means"),
    [
        ("all groups are as good as a ball", {"abinitio": 20.0, "T": 22.0, "O": 22.1, "I2": 22.2}),
        ("no map says anything", {"abinitio": -3.0, "T": -2.0, "O": -1.0, "I2": -2.0}),
        ("likelier without", {"abinitio": 30.0, "T": 22.0, "O": 24.0, "I2": 21.0}),
    ],
)
def test_round_particles_that_no_group_stands_out_in_stay_without(monkeypatch, why, means):
    known = {name if name == "abinitio" else f"round_{name}": mean for name, mean in means.items()}
    chain = walk(monkeypatch, found=ROUND | evidence(**known))
    assert chain.steps["first-refine"].symmetry == "C1", why
    assert chain.steps["first-refine"].reference == Path("/p/abinitio/map.star")


def test_a_group_that_was_found_in_round_particles_is_tried_as_well(monkeypatch):
    known = evidence(abinitio=24.0, symmetric=28.0, round_T=23.0, round_O=25.0, round_I2=22.0)
    chain = walk(monkeypatch, {"symmetry:symmetry_general": [{"rlnSymmetryGroup": "D7"}]}, ROUND | known)
    assert chain.steps["first-refine"].symmetry == "D7"


def test_an_octahedral_first_map_needs_no_other_groups(monkeypatch):
    blocks = {"symmetry_general": [{"rlnSymmetryGroup": "O"}]}
    chain = walk(monkeypatch, blocks, ROUND | evidence(abinitio=20.0, symmetric=25.0))
    assert "round-T" not in chain.done
    assert chain.steps["symmetric"].symmetry == chain.steps["refine"].symmetry == "O"


def test_no_symmetry_is_looked_for_where_no_runs_agree(monkeypatch):
    chain = walk(monkeypatch, D2, {"agreement": lambda model: None})
    assert "no two runs agree" in chain.done["symmetry"].decisions[0].why
    assert chain.steps["validate"].symmetry == "C1"


def test_particles_that_fit_badly_are_sorted_in_3d(monkeypatch):
    chain = walk(monkeypatch, found={"poor_share": lambda path: 0.1})
    assert chain.steps["clean"].classes == (1, 2)  # 8 and 9 Å, not 20
    assert chain.steps["refine"].shift_range == chain.steps["first-refine"].shift_range
    assert chain.steps["full-extract"].coordinates == Path("/p/clean/particles.star")


def test_cleaned_particles_that_stay_as_they_are_are_searched_as_far_as_before(monkeypatch):
    found = {"poor_share": lambda path: 0.1, "farthest_origins": lambda path: 30.0}
    chain = walk(monkeypatch, {"model_general": [{"rlnCurrentResolution": 9.0}]}, found)
    assert chain.steps["refine"].shift_range == chain.steps["first-refine"].shift_range == 40.0
    assert chain.steps["validate"].shift_range == 40.0


@pytest.mark.parametrize(
    ("told", "chosen", "why"),
    [
        ({}, "map not mirrored", "right-handed helices fit better at 29 of 30 places"),
        (
            {"hmMirrored": 1, "hmHand": "left", "hmRightHanded": 2},
            "map mirrored",
            "left-handed helices fitted better at 28 of 30 places",
        ),
        (
            {"hmHand": "either", "hmRightHanded": 12},
            "map not mirrored",
            "neither hand surely fits better: right-handed helices do at 12 of 30 places",
        ),
        ({"hmHand": "left", "hmRightHanded": 2}, "map not mirrored", "as asked"),
        ({"hmHand": "too coarse"}, "map not mirrored", "at 3.9 Å helices do not show which hand is right"),
        ({"hmMirrored": 1, "hmHand": "too coarse"}, "map mirrored", "as asked"),
    ],
)
def test_what_is_said_of_the_hand(monkeypatch, told, chosen, why):
    chain = walk(monkeypatch, {"hand": [HAND | told]})
    (decision,) = chain.done["postprocess"].decisions
    assert (decision.chosen, decision.why) == (chosen, why)


def test_few_particles_are_sorted_into_few_classes(monkeypatch):
    found = {"read_particle_facts": lambda path: measured.Particles(23, 3.0, 64, 120.0)}
    assert walk(monkeypatch, found=found).steps["class2d"].classes == 4


def test_pixels_that_hold_more_than_is_in_them_are_kept(monkeypatch):
    chain = walk(monkeypatch, {"model_general": [{"rlnCurrentResolution": 9.0}]})
    assert not {"full-extract", "refine"} & set(run_stages(chain))
    assert "9.0 Å is far from the 6.0 Å" in chain.done["full-extract"].decisions[0].why
    assert chain.steps["hand"].half1 == Path("/p/first-refine/half1.star")
    assert chain.steps["postprocess"].half1 == Path("/p/hand/half1.star")


def test_what_is_set_of_a_stage_makes_it_run(monkeypatch):
    blocks = {"model_general": [{"rlnCurrentResolution": 9.0}]}
    chain = walk(monkeypatch, blocks, set=("class3d.classes=4", "full-extract.pixel-size=1.5"))
    assert {"class3d", "clean", "full-extract", "refine"} <= set(run_stages(chain))


def test_a_diameter_that_is_given_goes_to_all_that_use_one(monkeypatch):
    chain = walk(monkeypatch, diameter=100.0)
    for name in ("curate", "first-pick", "pick", "extract"):
        assert chain.steps[name].diameter == 100.0
    for name in ("class2d", "abinitio", "refine", "validate"):
        assert chain.steps[name].diameter == pytest.approx(110.0)


def test_a_map_that_its_sphere_cut_is_refined_in_a_larger_one(monkeypatch):
    wide = {"rlnCurrentResolution": 9.0, "rlnParticleDiameter": 142.0, "hmMapDiameter": 174.0}
    chain = walk(monkeypatch, {"model_general": [wide]})
    assert chain.steps["full-extract"].diameter == 174.0
    assert chain.steps["refine"].diameter == pytest.approx(min(1.1 * 174, 0.95 * 64 * 3))
    assert chain.done["full-extract"].decisions[1].chosen == "particle 174 Å wide"
    # Of particles that cannot be cut anew, the refinement says it.
    chain = walk(monkeypatch, {"model_general": [wide]}, particles=(Path("p.star")))
    assert chain.steps["refine"].diameter == pytest.approx(min(1.1 * 174, 0.95 * 64 * 3))
    assert chain.done["refine"].decisions[0].chosen == "particle 174 Å wide"
    for other in ({"hmMapDiameter": 130.0}, {"hmMapDiameter": 300.0}, {}):
        general = {key: value for key, value in wide.items() if key != "hmMapDiameter"} | other
        assert "refine" not in run_stages(walk(monkeypatch, {"model_general": [general]}))
    assert "refine" not in run_stages(walk(monkeypatch, {"model_general": [wide]}, diameter=130.0))
    chain = walk(monkeypatch, {"model_general": [wide]}, set=("refine.diameter=150",))
    assert "full-extract" not in run_stages(chain), "no wider boxes for a sphere that a person has set"
    assert chain.has("refine")


def particles(tmp_path: Path, **columns: Any) -> Path:
    n = len(next(iter(columns.values())))
    optics = {"rlnOpticsGroup": [1], "rlnImagePixelSize": [2.5], "rlnImageSize": [48]}
    rows = {"rlnImageName": [f"{i + 1}@a.mrcs" for i in range(n)], "rlnOpticsGroup": [1] * n, **columns}
    path = tmp_path / "particles.star"
    write_particles(path, ParticleSet(pl.DataFrame(optics), pl.DataFrame(rows)))
    return path


def test_what_particles_gain_is_of_those_that_both_have(tmp_path: Path):
    values = np.random.default_rng(2).normal(3.0, 1.0, 400)
    first = particles(tmp_path, rlnLogLikeliContribution=values)
    mean, error = measured.gain(first)
    assert (mean, error) == (pytest.approx(values.mean()), pytest.approx(values.std() / 20))
    (tmp_path / "b").mkdir()
    other = particles(tmp_path / "b", rlnLogLikeliContribution=values[:300] - 0.5)
    mean, error = measured.gain(first, other)
    assert mean == pytest.approx(0.5)
    assert error < 1e-9


def test_particles_of_a_micrograph_are_not_independent(tmp_path: Path):
    rng = np.random.default_rng(3)
    of = np.repeat(np.arange(20), 30)
    values = rng.normal(0, 1, 20)[of] + 0.1 * rng.normal(0, 1, 600)
    names = [f"{number}.mrc" for number in of]
    _, error = measured.gain(particles(tmp_path, rlnLogLikeliContribution=values, rlnMicrographName=names))
    assert error == pytest.approx(1 / np.sqrt(20), rel=0.4)


def test_poses_that_were_not_kept_may_be_as_likely_as_those_that_were(tmp_path: Path):
    """A map of no group that has C6 by itself, and one of C6: the particles say the same of both."""
    of_both = np.random.default_rng(4).normal(20.0, 3.0, 200)
    (tmp_path / "c1").mkdir()
    (tmp_path / "c6").mkdir()
    many = {"rlnMaxValueProbDistribution": np.full(200, 0.25), "rlnNrOfSignificantSamples": np.full(200, 4)}
    none = particles(tmp_path / "c1", rlnLogLikeliContribution=of_both - np.log(6 / 4), **many)
    one = {"rlnMaxValueProbDistribution": np.full(200, 1.0), "rlnNrOfSignificantSamples": np.full(200, 1)}
    six = particles(tmp_path / "c6", rlnLogLikeliContribution=of_both, **one)
    assert measured.gain(six, none)[0] == pytest.approx(np.log(6 / 4))
    assert measured.gain(six, none, folds=6)[0] == pytest.approx(0.0, abs=1e-9)
    # Where one pose stands out, there is nothing to be added.
    sure = particles(tmp_path, rlnLogLikeliContribution=of_both, **one)
    assert measured.gain(six, sure, folds=6)[0] == 0.0


@pytest.mark.parametrize("junk", [0.0, 0.1, 0.3, 0.4])
def test_the_share_of_poor_particles_is_told_where_it_is_large(tmp_path: Path, junk: float):
    rng = np.random.default_rng(5)
    poor = rng.random(3000) < junk
    values = np.where(poor, rng.normal(14.0, 1.0, 3000), rng.normal(20.0, 1.0, 3000))
    share = measured.poor_share(particles(tmp_path, rlnLogLikeliContribution=values))
    # With nearly half of them poor some of those are above the quartile's place, and a few are missed.
    assert share == pytest.approx(poor.mean(), rel=0.1, abs=0.01)


@pytest.mark.parametrize(("written", "told"), [(14.5, 14.5), (999.0, None)])
def test_how_far_runs_agree(tmp_path: Path, written: float, told: float | None):
    path = tmp_path / "model.star"
    write_star(path, {"model_classes": pl.DataFrame({"rlnClassIndex": [1], "hmRunAgreement": [written]})})
    assert measured.agreement(path) == told


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
