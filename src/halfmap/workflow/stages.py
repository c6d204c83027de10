"""The stages of the chain, in order: what each is to run, decided from what is done before it."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from halfmap.workflow import first_map, measured
from halfmap.workflow.chain import Chain, Plan, Rule, Skip
from halfmap.workflow.first_map import AROUND, beyond_sphere, point_group, resolution_of, sphere_of
from halfmap.workflow.record import Decision

_FIRST_A = 15.0
"""Detail that the first classes, which serve as references of picking, are made to."""

_ACROSS = 40.0
"""Pixels across a particle in images that are scaled down, at the least."""

_COARSEST_PX_A = 3.5

_CLASS = 200
"""Particles in a 2D class on average."""

_FEW = 5
"""The same where there are very few, at the least."""

_SMALL_SET = 10_000
_POOR = 0.02
"""Share of particles that fit far worse than the others, from which on they are sorted in 3D."""

_AS_FINE = 1.25
"""Resolution of a 3D class over that of the finest one, up to which it is kept."""

_IN_BOX = 0.95
"""Diameter of a sphere over the box's side, at the most."""

_NYQUIST = 1.2
"""Resolution over that of two pixels up to which images count as too coarse for what is in them."""


def import_(chain: Chain) -> Plan:
    """List the files with the microscope's settings."""
    s = chain.settings
    optics = {
        "pixel_size": s.pixel_size,
        "voltage": s.voltage,
        "spherical_aberration": s.spherical_aberration,
        "amplitude_contrast": s.amplitude_contrast,
    }
    if s.source == "particles":
        values = {"particles": _given(chain, s.particles), "pixel_size": s.pixel_size}
        return Plan(values)
    files = tuple(_given(chain, path) for path in getattr(s, s.source))
    if s.source == "micrographs":
        return Plan({"micrographs": files, **optics})
    camera = {
        "gain": _given(chain, s.gain),
        "gain_rotation": s.gain_rotation,
        "gain_flip": s.gain_flip,
        "defects": _given(chain, s.defects),
        "dose_per_frame": s.dose_per_frame,
    }
    return Plan({"movies": files, **optics, **camera})


def motion(chain: Chain) -> Plan | None:
    """Correct the motion of movies."""
    if chain.settings.source != "movies":
        return None
    return Plan({"movies": chain.output("import", "movies")})


def ctf(chain: Chain) -> Plan | None:
    """Estimate the CTF of micrographs."""
    if chain.settings.source == "particles":
        return None
    before = "motion" if chain.has("motion") else "import"
    return Plan({"micrographs": chain.output(before, "micrographs")})


def curate(chain: Chain) -> Plan | None:
    """Leave out poor micrographs."""
    if not chain.has("ctf"):
        return None
    values = {"micrographs": chain.output("ctf", "micrographs"), "diameter": chain.settings.diameter}
    return Plan(values)


def first_pick(chain: Chain) -> Plan | None:
    """Pick without references."""
    if not chain.has("curate"):
        return None
    diameter = chain.settings.diameter
    values = {"micrographs": chain.output("curate", "micrographs"), "diameter": diameter}
    return Plan(values)


def first_extract(chain: Chain) -> Plan | None:
    """Cut small images for the first classes."""
    return _extract(chain, "first-pick", coarsest=_FIRST_A / 3)


def first_class2d(chain: Chain) -> Plan | None:
    """Make the first classes, quickly and coarsely."""
    if not chain.has("first-extract"):
        return None
    return _class2d(chain, "first-extract", finest=_FIRST_A, iterations=10, full_iterations=1)


def first_select(chain: Chain) -> Plan | None:
    """Choose among the first classes those that serve as references."""
    if not chain.has("first-class2d"):
        return None
    return Plan({"model": chain.output("first-class2d", "model")})


def pick(chain: Chain) -> Plan | None:
    """Pick with the first classes as references."""
    if not chain.has("first-select"):
        return None
    number, false = measured.picks(chain.output("first-pick", "coordinates"))
    averages = chain.output("first-select", "averages")
    classes = len(measured.read_block(averages, ""))
    why = f"made of {number:,} picks without references, {false:,.0f} of them false on average"
    values = {
        "micrographs": chain.output("curate", "micrographs"),
        "references": averages,
        "diameter": chain.settings.diameter or _diameter(chain, "first-extract"),
    }
    decision = Decision(f"{classes} class averages as references", why, "--set first-select.classes=NUMBERS")
    return Plan(values, (decision,))


def extract(chain: Chain) -> Plan | None:
    """Cut particles, scaled down."""
    return _extract(chain, "pick", coarsest=_COARSEST_PX_A)


def class2d(chain: Chain) -> Plan:
    """Sort particles into classes."""
    before = "extract" if chain.has("extract") else "import"
    return _class2d(chain, before, finest=8.0, iterations=None, full_iterations=None)


def select(chain: Chain) -> Plan:
    """Keep the classes that show the particle."""
    return Plan({"model": chain.output("class2d", "model")})


def class3d(chain: Chain) -> Plan | Skip:
    """Sort the refined particles, if some of them fit the map far worse than the others do."""
    particles = chain.output("first-refine", "particles")
    poor = measured.poor_share(particles)
    said = f"{100 * poor:.1f} % of the particles fit it far worse than the others"
    if poor < _POOR and not chain.asked("class3d"):
        return Skip((Decision("no clean-up in 3D", said, "--set class3d.classes=N"),))
    values = {
        "particles": particles,
        "reference": (chain.output("first-refine", "map"),),
        "classes": 3,
        "alignment": False,
        "symmetry": point_group(chain),
        "diameter": sphere_of(chain),
        "seed": chain.settings.seed,
    }
    return Plan(values, (Decision("clean-up in 3D, 3 classes", said, "--set class3d.classes=N"),))


def clean(chain: Chain) -> Plan | None:
    """Keep the classes that are nearly as fine as the best one."""
    if not chain.has("class3d"):
        return None
    rows = measured.read_block(chain.output("class3d", "model"), "model_classes")
    resolutions = [float(row["rlnEstimatedResolution"]) for row in rows]
    best = min(resolutions)
    kept = tuple(number for number, each in enumerate(resolutions, start=1) if each <= _AS_FINE * best)
    said = ", ".join(f"{each:.1f} Å" for each in resolutions)
    decision = Decision(
        f"classes {', '.join(map(str, kept))}",
        f"they are as fine as any, of {said}",
        "--set clean.classes=NUMBERS",
    )
    return Plan({"model": chain.output("class3d", "model"), "classes": kept}, (decision,))


def full_extract(chain: Chain) -> Plan | Skip | None:
    """Cut the particles anew with all the detail that the micrographs hold, if there is more in them."""
    if not chain.has("extract"):
        return None
    reached = resolution_of(chain, "first-refine")
    facts = measured.read_particle_facts(chain.output("extract", "particles"))
    finest = 2 * facts.pixel_size
    whole = _micrograph_pixel(chain)
    override = "--set full-extract.pixel-size=Å"
    wider = beyond_sphere(chain)
    if facts.pixel_size <= 1.01 * whole and wider is None:
        return Skip((Decision("particles stay as they are", "they were not scaled down"),))
    is_near, is_clean = reached <= _NYQUIST * finest, chain.has("clean")
    why = f"{reached:.1f} Å is {'near' if is_near else 'far from'} the {finest:.1f} Å that their pixels hold"
    if is_clean and not is_near:
        why = f"those that were sorted out may have kept the map from more than {reached:.1f} Å"
    elif wider and not is_near:
        why = "their boxes were made for a smaller particle"
    if not (is_near or is_clean or wider or chain.asked("full-extract")):
        return Skip((Decision(f"particles stay at {facts.pixel_size:.2f} Å/px", why, override),))
    values = {
        "micrographs": chain.output("curate", "micrographs"),
        "coordinates": chain.output("clean" if chain.has("clean") else "first-refine", "particles"),
        "diameter": wider[0] if wider else chain.settings.diameter,
    }
    made = Decision(f"particles cut anew at {whole:.2f} Å/px", why, override)
    return Plan(values, (made, wider[1]) if wider else (made,))


def refine(chain: Chain) -> Plan | Skip:
    """Refine the whole images, those that are left, or within a sphere that holds the map."""
    last = next((stage for stage in ("full-extract", "clean") if chain.has(stage)), "select")
    wider = beyond_sphere(chain)
    if last == "select" and wider is None and not chain.asked("refine"):
        return Skip()
    particles = chain.output(last, "particles")
    values = first_map.common(chain)
    decisions: tuple[Decision, ...] = ()
    if wider:
        facts = measured.read_particle_facts(particles)
        values["diameter"] = min(AROUND * wider[0], _IN_BOX * facts.box * facts.pixel_size)
        decisions = () if last == "full-extract" else (wider[1],)
    values |= {
        "particles": particles,
        "reference": chain.output("first-refine", "map"),
        "symmetry": point_group(chain),
    }
    return Plan(values, decisions)


def hand(chain: Chain) -> Plan:
    """Tell whether the map or its mirror image is right, and go on with the right one."""
    job = _refined(chain)
    values = {
        "half1": chain.output(job, "half1"),
        "map": chain.output(job, "map"),
        "mask": chain.job(job).folder / "mask.mrc",
        "particles": chain.output(job, "particles"),
        "symmetry": _made_with(chain)["symmetry"],
        "seed": chain.settings.seed,
    }
    return Plan(values)


def postprocess(chain: Chain) -> Plan:
    """Measure the resolution and sharpen the map."""
    mirrored, why = measured.hand(chain.output("hand", "told"))
    override = f"--set hand.mirror={'never' if mirrored else 'always'}"
    decision = Decision(f"map {'mirrored' if mirrored else 'not mirrored'}", why, override)
    values = {"half1": chain.output("hand", "half1"), "mask": chain.output("hand", "mask")}
    return Plan(values, (decision,))


def validate(chain: Chain) -> Plan:
    """Look for what may be wrong with the map."""
    values = {
        "half1": chain.output("hand", "half1"),
        "mask": chain.output("hand", "mask"),
        "particles": chain.output("hand", "particles"),
        "template": _templates(chain),
        **_made_with(chain),
        "controls": chain.settings.controls,
        "seed": chain.settings.seed,
    }
    return Plan(values)


STAGES: tuple[Rule, ...] = (
    ("import", "import {source}", import_),
    ("motion", "motion", motion),
    ("ctf", "ctf", ctf),
    ("curate", "curate", curate),
    ("first-pick", "pick blob", first_pick),
    ("first-extract", "extract", first_extract),
    ("first-class2d", "class2d", first_class2d),
    ("first-select", "select", first_select),
    ("pick", "pick template", pick),
    ("extract", "extract", extract),
    ("class2d", "class2d", class2d),
    ("select", "select", select),
    ("abinitio", "abinitio", first_map.abinitio),
    ("abinitio-trial", "refine", first_map.first_trial),
    ("symmetry", "symmetry", first_map.symmetry),
    ("symmetric", "abinitio", first_map.symmetric("symmetric")),
    ("less-symmetric", "abinitio", first_map.symmetric("less-symmetric")),
    ("round-T", "abinitio", first_map.round_map("T")),
    ("round-O", "abinitio", first_map.round_map("O")),
    ("round-I2", "abinitio", first_map.round_map("I2")),
    ("symmetric-trial", "refine", first_map.trial("symmetric")),
    ("less-symmetric-trial", "refine", first_map.trial("less-symmetric")),
    ("round-T-trial", "refine", first_map.trial("round-T")),
    ("round-O-trial", "refine", first_map.trial("round-O")),
    ("round-I2-trial", "refine", first_map.trial("round-I2")),
    ("first-refine", "refine", first_map.first_refine),
    ("class3d", "class3d", class3d),
    ("clean", "select", clean),
    ("full-extract", "extract", full_extract),
    ("refine", "refine", refine),
    ("hand", "hand", hand),
    ("postprocess", "postprocess", postprocess),
    ("validate", "validate", validate),
)
"""The chain."""


def _given(chain: Chain, path: Path | None) -> Path | None:
    """A file or pattern that the settings name from the project's folder, wherever the command is given."""
    if path is None or path.is_absolute():
        return path
    root = chain.project.root
    return root / path if (root / path).exists() else Path(glob.escape(str(root))) / path


def _extract(chain: Chain, picking: str, *, coarsest: float) -> Plan | None:
    if not chain.has(picking):
        return None
    whole = _micrograph_pixel(chain)
    diameter = chain.settings.diameter or _picked_diameter(chain, picking)
    wanted = max(whole, coarsest if diameter is None else min(coarsest, diameter / _ACROSS))
    stage = "extract" if picking == "pick" else "first-extract"
    size = "not scaled" if wanted <= whole else f"scaled to {wanted:.2f} Å/px"
    across = (
        "" if diameter is None else f"; the particle of {diameter:.0f} Å is {diameter / wanted:.0f} px across"
    )
    decision = Decision(
        f"particles {size}", f"for speed, until they are refined{across}", f"--set {stage}.pixel-size=Å"
    )
    values: dict[str, Any] = {
        "micrographs": chain.output("curate", "micrographs"),
        "coordinates": chain.output(picking, "coordinates"),
        "pixel_size": None if wanted <= whole else wanted,
        "diameter": chain.settings.diameter,
    }
    return Plan(values, (decision,))


def _class2d(
    chain: Chain, extraction: str, *, finest: float, iterations: int | None, full_iterations: int | None
) -> Plan:
    particles = chain.output(extraction, "particles")
    facts = measured.read_particle_facts(particles)
    stage = "class2d" if extraction != "first-extract" else "first-class2d"
    classes = min(max(round(facts.number / _CLASS), 8), 100, max(facts.number // _FEW, 1))
    resolution = max(finest, 2.2 * facts.pixel_size)
    made = Decision(f"{classes} classes", f"of {facts.number:,} particles", f"--set {stage}.classes=N")
    values = {
        "particles": particles,
        "classes": classes,
        "resolution": resolution,
        "iterations": iterations or (15 if facts.number < _SMALL_SET else 25),
        "full_iterations": full_iterations,
        "diameter": sphere_of(chain),
        "seed": chain.settings.seed,
    }
    return Plan(values, (made,))


def _diameter(chain: Chain, extraction: str) -> float | None:
    return measured.read_particle_facts(chain.output(extraction, "particles")).diameter


def _picked_diameter(chain: Chain, picking: str) -> float | None:
    if picking == "pick":
        return _diameter(chain, "first-extract")
    rows = measured.read_block(chain.output(picking, "coordinates"), "coordinate_files")
    for row in rows:
        table = measured.read_block(chain.project.root / row["rlnMicrographCoordinates"], "")
        if table and "hmParticleDiameter" in table[0]:
            return float(table[0]["hmParticleDiameter"])
    return None


def _micrograph_pixel(chain: Chain) -> float:
    from halfmap.io.tables import read_micrographs

    return float(read_micrographs(chain.output("curate", "micrographs")).pixel_size)


def _templates(chain: Chain) -> Path | None:
    """Stack of the class averages that particles were picked with."""
    if not chain.has("pick"):
        return None
    averages = measured.read_block(chain.output("first-select", "averages"), "")
    return chain.project.root / str(averages[0]["rlnReferenceImage"]).partition("@")[2]


def _refined(chain: Chain) -> str:
    return "refine" if chain.has("refine") else "first-refine"


def _made_with(chain: Chain) -> dict[str, Any]:
    """What the last refinement was told of the particle, by hand or not."""
    values = chain.job(_refined(chain)).step.model_dump()
    return {name: values[name] for name in ("symmetry", "diameter", "shift_range")}
