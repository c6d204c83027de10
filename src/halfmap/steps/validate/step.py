"""The step that examines a map."""

from __future__ import annotations

from pathlib import Path

from halfmap.engine import Context, Input, Out, Param
from halfmap.search.half_map_step import HalfMapStep

PARTICLES, CONTROLS = "Particles", "Controls"


class ValidateStep(HalfMapStep, name="validate", label="halfmap.validate"):
    """Examine a map as a careful reviewer would, and write one report with a light for each finding.

    Half maps alone show to what detail they agree, whether evenly in all directions, and which hand they
    have. With the particles it is seen from which views the map is made, how it grows with their number, and
    what controls give that are run from them: half sets that are refined anew from a coarse map and never
    meet, images whose fine detail is noise or was filtered away, nothing but noise, a map that is known put
    into the noise of the particles, and a map made without any reference. A second refinement of the same
    particles shows which poses can be relied on.

    References
    ----------
    .. [1] Rosenthal & Rubinstein 2015, Curr. Opin. Struct. Biol. 34, 135-144, DOI 10.1016/j.sbi.2015.07.002
    .. [2] Chen et al. 2013, Ultramicroscopy 135, 24-35, DOI 10.1016/j.ultramic.2013.06.004
    .. [3] Stagg, Noble, Spilman & Chapman 2014, J. Struct. Biol. 185, 418-426, DOI 10.1016/j.jsb.2013.10.010
    .. [4] Naydenova & Russo 2017, Nat. Commun. 8, 629, DOI 10.1038/s41467-017-00782-3
    .. [5] Ramirez-Aportela, Carazo & Sorzano 2022, IUCrJ 9, 632-638, DOI 10.1107/S2052252522006959
    """

    outputs = {
        "report": Out("report.html", "ProcessData.html.halfmap.validation"),
        "findings": Out("findings.json", "ProcessData.json.halfmap.validation"),
        "reliable": Out("reliable.star", "ParticleGroupMetadata.star.relion", optional=True),
    }

    particles: Path | None = Input(
        "particles of the map, with their poses",
        node="ParticleGroupMetadata.star.relion",
        section=PARTICLES,
        default=None,
    )
    symmetry: str = Param("C1", "point group that the map was made with", unit="none", section=PARTICLES)
    diameter: float | None = Param(
        None,
        "diameter of the sphere that holds the particle; default: that of the mask",
        unit="Å",
        section=PARTICLES,
        gt=0,
    )
    other: Path | None = Input(
        "particles of a second refinement of the same images, begun apart from the first",
        node="ParticleGroupMetadata.star.relion",
        section=PARTICLES,
        default=None,
    )
    template: Path | None = Input(
        "map or stack that the particles were picked with",
        node="DensityMap.mrc",
        section=PARTICLES,
        default=None,
    )
    tilted: Path | None = Input(
        "particles of the tilted images of tilt pairs, with poses, row by row as --untilted",
        node="ParticleGroupMetadata.star.relion",
        section=PARTICLES,
        default=None,
    )
    untilted: Path | None = Input(
        "particles of the untilted images of tilt pairs; default: --particles",
        node="ParticleGroupMetadata.star.relion",
        section=PARTICLES,
        default=None,
    )
    tilt_angle: float | None = Param(
        None, "angle that the stage was tilted by", unit="°", section=PARTICLES, ge=-90, le=90
    )
    tilt_axis: float | None = Param(
        None,
        "direction of the tilt axis in the images, by the right-hand rule; with it pairs tell the hand",
        unit="°",
        section=PARTICLES,
        ge=-360,
        le=360,
    )
    controls: bool = Param(
        True,
        "run controls on the images: they take about as long as a refinement each",
        unit="none",
        section=CONTROLS,
    )
    regulariser: str = Param(
        "fsc",
        "filter of maps that controls refine with: that which the map was refined with, as refine has it",
        unit="none",
        section=CONTROLS,
    )
    external_program: str | None = Param(
        None, "program of the external filter, as refine has it", unit="none", section=CONTROLS
    )
    weights: Path | None = Input(
        "weights of the learned filter's network, as refine has them", default=None, section=CONTROLS
    )
    sample: int = Param(
        5000, "particles that the checks on images take at most", unit="none", section=CONTROLS, ge=200
    )
    shift_range: float | None = Param(
        None,
        "farthest that particles may be from their boxes' centres; default: as refine and abinitio have it",
        unit="Å",
        section=CONTROLS,
        gt=0,
    )
    memory: float = Param(
        2.0, "memory in which all processes together keep images", unit="GB", section=CONTROLS, ge=0
    )
    seed: int = Param(1, "seed of all random numbers", unit="none", section=CONTROLS, ge=0)

    def run(self, ctx: Context) -> None:
        """Read what is given, make every check that it allows, write the report."""
        from halfmap.steps.validate import checks, examine, report

        given = examine.read(self, ctx)
        findings = checks.make_all(ctx, given)
        report.write(ctx, given, findings)
