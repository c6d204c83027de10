"""The figures of each kind of job, from its tables in RELION's words, whoever wrote them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from halfmap.markup import Content
from halfmap.workflow.report.graph import Node
from halfmap.workflow.report.tables import (
    Listed,
    described,
    middle,
    model_file,
    numbers,
    read_block,
    read_pairs,
    read_set,
    resolution,
    short,
    spread,
    spread_with_error,
)

if TYPE_CHECKING:
    import polars as pl

Fact = tuple[str, Content]

_UM = 1e-4

_SURE = 3.0
"""Standard errors from which on a tilt is more than noise."""

_NEAREST = 3
"""Point groups that are told of, those that come nearest to holding."""

_NO_AGREEMENT = 900.0
"""Å, from which on it stands for none."""


def listed(node: Node, kind: str, unit: str) -> Listed | None:
    """The table of a job whose type begins with `kind`."""
    file = next((file for file, each in node.outputs.items() if each.startswith(kind)), None)
    return None if file is None else read_set(node.root / file, unit)


def particles(node: Node) -> Listed | None:
    """The particles that a job wrote."""
    return listed(node, "ParticleGroupMetadata", "particles")


def _micrographs(node: Node) -> Listed | None:
    return listed(node, "MicrographGroupMetadata", "micrographs")


def _known(rows: Iterable[tuple[str, Content]]) -> list[Fact]:
    return [(name, value) for name, value in rows if value is not None]


def _import(node: Node) -> list[Fact]:
    movies = listed(node, "MicrographMovieGroupMetadata", "movies")
    found = movies or _micrographs(node) or particles(node)
    if found is None:
        return []
    optics, rows = found.optics, found.rows
    facts = [
        ("Pixel size", _setting(optics, "rlnMicrographOriginalPixelSize", "Å")),
        ("Pixel size of the images", _setting(optics, "rlnImagePixelSize", "Å")),
        ("Voltage", _setting(optics, "rlnVoltage", "kV")),
        ("Spherical aberration", _setting(optics, "rlnSphericalAberration", "mm")),
        ("Amplitude contrast", _setting(optics, "rlnAmplitudeContrast", "")),
        ("Exposure of each frame", _setting(optics, "rlnMicrographDoseRate", "e/Å²")),
        ("Frames", _setting(rows, "rlnImageSizeZ", "")),
        ("Size", _size(rows)),
        ("Optics groups", str(optics.height)),
    ]
    return _known(facts)


def _setting(rows: pl.DataFrame, label: str, unit: str) -> str | None:
    values = numbers(rows, label)
    if values is None:
        return None
    return " or ".join(f"{value:g} {unit}".strip() for value in sorted(set(values.to_list()))[:4])


def _size(rows: pl.DataFrame) -> str | None:
    if not {"rlnImageSizeX", "rlnImageSizeY"} <= set(rows.columns):
        return None
    sizes = sorted(set(rows.select("rlnImageSizeX", "rlnImageSizeY").iter_rows()))
    return " or ".join(f"{x} × {y} px" for x, y in sizes[:4])


def _motion(node: Node) -> list[Fact]:
    found = _micrographs(node)
    if found is None:
        return []
    rows = found.rows
    return _known(
        [
            ("Motion over all frames", spread(rows, "rlnAccumMotionTotal", "Å")),
            ("Motion over the first 4 e/Å²", spread(rows, "rlnAccumMotionEarly", "Å")),
            ("Motion after them", spread(rows, "rlnAccumMotionLate", "Å")),
            ("Motion of parts against the field", spread(rows, "hmLocalMotion", "Å")),
            ("Standard error of the shifts", spread(rows, "hmMotionUncertainty", "Å")),
            ("Bad pixels replaced", spread(rows, "hmBadPixels", "")),
        ]
    )


def _ctf(node: Node) -> list[Fact]:
    found = _micrographs(node)
    if found is None:
        return []
    rows = found.rows
    facts: list[tuple[str, Content]] = [
        ("Defocus (larger axis)", spread(rows, "rlnDefocusU", "µm", _UM)),
        ("Standard error of the defocus", spread(rows, "hmDefocusUncertainty", "Å")),
        ("Astigmatism", spread(rows, "rlnCtfAstigmatism", "Å")),
        ("Finest Thon rings", spread(rows, "rlnCtfMaxResolution", "Å")),
        ("Phase shift", spread_with_error(_ringed(rows), "rlnPhaseShift", "hmPhaseShiftUncertainty", "°")),
        ("Tilt", _tilt(_ringed(rows))),
        ("Cs at which the rings fit best", _cs(found.optics, _ringed(rows))),
    ]
    if "hmCtfProblem" in rows.columns:
        problems = rows.filter(rows["hmCtfProblem"] != "none")
        facts.append(("CTFs not to be trusted", f"{problems.height:,} of {rows.height:,}"))
    return _known(facts)


def _ringed(rows: pl.DataFrame) -> pl.DataFrame:
    """Micrographs with Thon rings; of others a fit tells nothing."""
    import polars as pl

    if "hmCtfProblem" not in rows.columns:
        return rows
    return rows.filter(~pl.col("hmCtfProblem").str.contains("no Thon rings", literal=True))


def _tilt(rows: pl.DataFrame) -> str | None:
    tilt, error = "rlnMicrographTiltAngle", "hmTiltUncertainty"
    found = spread_with_error(rows, tilt, error, "°")
    if found is None or error not in rows.columns:
        return found
    both = rows.select(tilt, error).drop_nulls().drop_nans()
    sure = both.filter(both[tilt] > _SURE * both[error]).height
    # A tilt is never below 0, so that noise alone makes one of about its error.
    return f"{found}; beyond {_SURE:g} standard errors in {sure:,} of {both.height:,}"


def _cs(optics: pl.DataFrame, rows: pl.DataFrame) -> str | None:
    """Mean of each optics group with its error, beside what was used."""
    from halfmap.steps.ctf.tables import mean_cs

    labels = ("hmCtfCs", "hmCtfCsUncertainty")
    if not {*labels, "rlnOpticsGroup"} <= set(rows.columns):
        return None
    known = rows.select("rlnOpticsGroup", *labels).drop_nulls().drop_nans()
    known = known.filter(known[labels[1]] > 0)
    stated = {row["rlnOpticsGroup"]: row.get("rlnSphericalAberration") for row in optics.to_dicts()}
    said = []
    for (group,), own in known.sort("rlnOpticsGroup").group_by("rlnOpticsGroup", maintain_order=True):
        mean, error = mean_cs(*(own[label].to_numpy() for label in labels))
        used = stated.get(group)
        text = f"{mean:.2f} ± {error:.2g} mm" + (f" ({used:g} mm was used)" if used is not None else "")
        said.append(text if len(stated) == 1 else f"group {group}: {text}")
    return "; ".join(said) or None


def _picks(node: Node) -> list[Fact]:
    file = next((file for file, kind in node.outputs.items() if kind.startswith("MicrographCoords")), None)
    rows = None if file is None else read_block(node.root / file, "coordinate_files")
    if rows is None or "hmPicks" not in rows.columns:
        return []
    picks, false = rows["hmPicks"], middle(rows, "hmPicksFalse")
    facts: list[tuple[str, Content]] = [("Picks in a micrograph", spread(rows, "hmPicks", ""))]
    if false is not None:
        facts.append(("Of all picks, false on average", short(float(rows["hmPicksFalse"].sum()))))
    facts.append(("Micrographs without a pick", f"{int((picks == 0).sum()):,} of {rows.height:,}"))
    return _known(facts)


def _images(node: Node) -> list[Fact]:
    found = particles(node)
    if found is None:
        return []
    optics, rows = found.optics, found.rows
    micrographs = rows["rlnMicrographName"].n_unique() if "rlnMicrographName" in rows.columns else None
    return _known(
        [
            ("Micrographs with particles", None if micrographs is None else f"{micrographs:,}"),
            ("Box", _setting(optics, "rlnImageSize", "px")),
            ("Pixel size", _setting(optics, "rlnImagePixelSize", "Å")),
            ("Particle's diameter", spread(rows, "hmParticleDiameter", "Å")),
        ]
    )


def _classes(node: Node) -> list[Fact]:
    model = model_file(node.folder)
    general, rows = read_pairs(model, "model_general"), read_block(model, "model_classes")
    if rows is None:
        return []
    resolutions = numbers(rows, "rlnEstimatedResolution")
    best = None if resolutions is None else float(resolutions.min())  # pyright: ignore[reportArgumentType]
    median = middle(rows, "rlnEstimatedResolution")
    facts: list[tuple[str, Content]] = [
        ("Classes", str(rows.height)),
        ("Best class's detail", None if best is None else resolution(best)),
        ("Median class's detail", None if median is None else resolution(median)),
        ("Mask's diameter", _value(general, "rlnParticleDiameter", "Å")),
    ]
    if "hmGoodLost" in general:
        facts.append(("Good particles expected lost", f"{100 * float(general['hmGoodLost']):.1f} %"))
    return _known(facts)


def _selected(node: Node) -> list[Fact]:
    kept = read_block(node.folder / "class_averages.star", "")
    whole = read_block(model_file(node.folder), "model_classes")
    facts = _classes(node) if whole is not None else []
    if kept is not None and whole is not None:
        facts[0] = ("Classes kept", f"{kept.height} of {whole.height}")
    return facts


def _value(pairs: dict[str, Any], label: str, unit: str) -> str | None:
    value = pairs.get(label)
    return f"{short(float(value))} {unit}".strip() if isinstance(value, int | float) else None


def _first_map(node: Node) -> list[Fact]:
    model = model_file(node.folder)
    general, runs = read_pairs(model, "model_general"), read_block(model, "model_runs")
    facts: list[tuple[str, Content]] = [("Symmetry", general.get("rlnSymmetryGroup"))]
    if runs is not None and {"hmRunKept", "hmRunAgreement"} <= set(runs.columns):
        classes = read_block(model, "model_classes")
        agreed = None if classes is None else middle(classes, "hmRunAgreement")
        if agreed is not None and agreed >= _NO_AGREEMENT:
            facts.append(("Runs from random poses that agree", f"none of {runs.height}"))
        elif agreed is not None:
            facts += [
                ("Runs from random poses that agree", f"{int(runs['hmRunKept'].sum())} of {runs.height}"),
                ("They agree to", resolution(agreed)),
            ]
    return _known(facts)


def _sorted(node: Node) -> list[Fact]:
    rows = read_block(model_file(node.folder), "model_classes")
    if rows is None or "rlnClassDistribution" not in rows.columns:
        return []
    facts: list[Fact] = []
    for row in rows.iter_rows(named=True):
        text = f"{100 * row['rlnClassDistribution']:.1f} % of the particles"
        if row.get("rlnEstimatedResolution"):
            text += f", to {resolution(row['rlnEstimatedResolution'])}"
        facts.append((f"Class {row.get('rlnClassIndex', len(facts) + 1)}", text))
    return facts


def _refined(node: Node) -> list[Fact]:
    general = read_pairs(model_file(node.folder), "model_general")
    rows = read_block(model_file(node.folder), "model_classes")
    facts: list[tuple[str, Content]] = []
    if "rlnCurrentResolution" in general:
        facts.append(("Resolution (FSC = 0.143)", resolution(float(general["rlnCurrentResolution"]))))
    facts += [
        ("Symmetry", general.get("rlnSymmetryGroup")),
        ("Particles of the half sets", _halves(node)),
        ("Box", _value(general, "rlnOriginalImageSize", "px")),
        ("Voxel", _value(general, "rlnPixelSize", "Å")),
        ("Mask's diameter", _value(general, "rlnParticleDiameter", "Å")),
        ("Iterations", _value(general, "rlnCurrentIteration", "")),
    ]
    if rows is not None:
        facts += [
            ("Error of the angles", _with(middle(rows, "rlnAccuracyRotations"), "°")),
            ("Error of the shifts", _with(middle(rows, "rlnAccuracyTranslationsAngst"), "Å")),
        ]
    return _known(facts)


def _with(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{short(value)} {unit}"


def _halves(node: Node) -> str | None:
    found = particles(node)
    if found is None or "rlnRandomSubset" not in found.rows.columns:
        return None
    sets = found.rows["rlnRandomSubset"].value_counts().sort("rlnRandomSubset")
    return " and ".join(f"{count:,}" for count in sets["count"])


def half_map_resolution(node: Node) -> tuple[str, str] | None:
    """The resolution that a post-processing measured, and its interval."""
    general = read_pairs(node.folder / "postprocess.star", "general")
    if "rlnFinalResolution" not in general:
        return None
    fine, coarse = general.get("hmResolutionFine"), general.get("hmResolutionCoarse")
    interval = ""
    if fine and coarse:
        interval = f"{resolution(fine)} to {resolution(coarse)} at {general.get('hmConfidence', 95):g} %"
    return resolution(float(general["rlnFinalResolution"])), interval


def _measured(node: Node) -> list[Fact]:
    general = read_pairs(node.folder / "postprocess.star", "general")
    found = half_map_resolution(node)
    if found is None:
        return []
    facts: list[tuple[str, Content]] = [("Resolution (FSC = 0.143)", found[0])]
    if found[1]:
        facts.append(("Its interval", found[1]))
    if "hmResolutionHalf" in general:
        facts.append(("Resolution (FSC = 0.5)", resolution(float(general["hmResolutionHalf"]))))
    bfactor, error = general.get("rlnBfactorUsedForSharpening"), general.get("hmBfactorError")
    if bfactor is not None:
        by = "" if not error else f" ± {error:.0f}"
        facts.append(("B-factor for sharpening", f"{bfactor:.0f}{by} Å²"))
    facts.append(("Mask", general.get("rlnMaskName")))
    return _known(facts)


def _general_of(file: str, block: str) -> Callable[[Node], list[Fact]]:
    def facts(node: Node) -> list[Fact]:
        return list(described(read_pairs(node.folder / file, block)))

    return facts


def _symmetry(node: Node) -> list[Fact]:
    """The group found, and how near others came."""
    general = read_pairs(node.folder / "symmetry.star", "symmetry_general")
    rows = read_block(node.folder / "symmetry.star", "symmetry_groups")
    if not general:
        return []
    group = str(general["rlnSymmetryGroup"])
    facts: list[Fact] = [("Point group found", "none (C1)" if group == "C1" else group)]
    if rows is not None and {"rlnSymmetryGroup", "hmWeakestCorrelation"} <= set(rows.columns):
        ranked = rows.drop_nans("hmWeakestCorrelation").sort("hmWeakestCorrelation", descending=True)
        said = {row["rlnSymmetryGroup"]: _nearness(row) for row in ranked.iter_rows(named=True)}
        own = said.pop(group, None)
        if own:
            facts.append(("Correlation under its weakest operators", own))
        near = [f"{name} {text}" for name, text in list(said.items())[:_NEAREST]]
        if near:
            facts.append(("Nearest otherwise" if own else "Nearest", ", ".join(near)))
    if "hmSignalCorrelation" in general:
        signal = float(general["hmSignalCorrelation"])
        share = getattr(node.job.step, "least_share", None) if node.job else None
        needed = "" if share is None else f"; a group needs {share * signal:.2f}"
        facts.append(("Noise leaves of a perfect symmetry", f"{signal:.2f}{needed}"))
    labels = ("rlnParticleDiameter", "hmComparedResolution")
    return facts + list(described({label: general[label] for label in labels if label in general}))


def _nearness(row: dict[str, Any]) -> str:
    """How alike a map is under a group's weakest operators, and what that was judged."""
    verdict = str(row.get("hmVerdict", ""))
    judged = {"nearly": " (nearly)", "contained": " (part of it)"}.get(verdict, "")
    return f"{float(row['hmWeakestCorrelation']):.2f}{judged}"


def _local(node: Node) -> list[Fact]:
    rows = read_block(node.folder / "localres.star", "local_resolution")
    facts: list[Fact] = []
    for row in rows.iter_rows(named=True) if rows is not None else ():
        low, high = (resolution(row[f"hmLocalQuantile{q}"]) for q in ("05", "95"))
        facts.append(
            (f"By {row['hmLocalMethod']}", f"median {resolution(row['hmLocalMedian'])}, 90 % {low} to {high}")
        )
    return facts


def _hand(node: Node) -> list[Fact]:
    told = read_pairs(node.folder / "hand.star", "hand")
    if not told:
        return []
    mirrored, verdict = bool(told["hmMirrored"]), str(told["hmHand"])
    hands = {"right": "right", "left": "left: a mirror image"}
    facts: list[Fact] = [
        ("Hand of the map given", hands.get(verdict, f"not told ({verdict})")),
        ("Map and poses", "mirrored" if mirrored else "left as they are"),
    ]
    if "hmHelixPlaces" in told:
        places, right = int(told["hmHelixPlaces"]), int(told["hmRightHanded"])
        facts.append(("Right-handed helices fitted better", f"at {right:,} of {places:,} places"))
    return facts


_FACTS: dict[str, Callable[[Node], list[Fact]]] = {
    "relion.import": _import,
    "relion.motioncorr": _motion,
    "relion.ctffind": _ctf,
    "relion.autopick": _picks,
    "relion.extract": _images,
    "relion.class2d": _classes,
    "relion.select.class2d": _selected,
    "relion.initialmodel": _first_map,
    "relion.class3d": _sorted,
    "relion.refine3d": _refined,
    "relion.postprocess": _measured,
    "relion.localres": _local,
    "halfmap.symmetry": _symmetry,
    "halfmap.hand": _hand,
    "halfmap.fit": _general_of("fit.star", "general"),
    "halfmap.compare": _general_of("compare.star", "general"),
}


def facts_of(node: Node) -> list[Fact]:
    """The figures of a job; none of a kind without any, or where its tables are not there."""
    find = next((find for start, find in _FACTS.items() if node.label.startswith(start)), None)
    return [] if find is None else find(node)
