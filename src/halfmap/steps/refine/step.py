"""The step that refines a map and the poses of its particles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from halfmap.engine import Context, Input, Out, Param, Step

MAP, SEARCH, LOCAL, SCHEDULE = "Map", "Search", "Local refinement", "Schedule"
REFERENCES = "Maps to compare with"


class RefineStep(Step, name="refine", label="relion.refine3d"):
    """Refine a map from particles and a reference, with two half sets that never meet.

    The particles are split into two halves, each with a map, noise, scales and poses of its own; only what is
    coarser than 40 Å is shared. In each iteration every particle is compared with the map of its half, in all
    directions until the poses settle and near its poses afterwards, and is put back where it fits. The maps
    are filtered by their correlation, which also says how much detail the next comparison uses. It ends by
    itself when neither the resolution nor the poses improve.

    A local refinement begins at the poses of the table, from RELION, cryoSPARC or here, and stays near them
    by a normal prior about a fulcrum. Relaxed, it chooses between a pose's equivalents under a point group
    that the particle has nearly.

    Poses may be searched in denoised or merged images of the same particles (--searched), whose noise is what
    maps leave of them, in each micrograph as it was measured to be noisier or more biased than others. Maps,
    and so half maps and resolutions, are made of the raw images alone.

    References
    ----------
    .. [1] Scheres 2012, J. Struct. Biol. 180, 519-530, DOI 10.1016/j.jsb.2012.09.006
    .. [2] Scheres & Chen 2012, Nat. Methods 9, 853-854, DOI 10.1038/nmeth.2115
    .. [3] Chen, McMullan, Faruqi, Murshudov, Short, Scheres & Henderson 2013, Ultramicroscopy 135, 24-35,
       DOI 10.1016/j.ultramic.2013.06.004
    """

    outputs = {
        "map": Out("map.mrc", "DensityMap.mrc.relion.refine3d"),
        "half1": Out("run_half1_class001_unfil.mrc", "DensityMap.mrc.relion.halfmap.refine3d"),
        "half2": Out("run_half2_class001_unfil.mrc", "DensityMap.mrc.halfmap.half2"),
        "particles": Out("particles.star", "ParticleGroupMetadata.star.relion.refine3d"),
        "model": Out("model.star", "OptimiserData.star.relion.refine3d"),
        "fsc": Out("fsc.png", "Image2D.png.halfmap.overview"),
        "slices": Out("slices.png", "Image2D.png.halfmap.overview"),
        "directions": Out("angular_distribution.png", "Image2D.png.halfmap.overview"),
        "progress": Out("progress.png", "Image2D.png.halfmap.overview"),
    }

    particles: Path = Input("table of particles", node="ParticleGroupMetadata.star.relion")
    searched: Path | None = Input(
        "the same particles cut from denoised or merged micrographs, to find poses in; maps are made of the "
        "raw ones",
        default=None,
        node="ParticleGroupMetadata.star.relion",
    )
    reference: Path = Input("map to begin with, of any scale and pixel size", node="DensityMap.mrc")
    symmetry: str = Param("C1", "point group of the particle", unit="none", section=MAP)
    mask: Path | None = Input(
        "mask of the particle, 0 to 1; default: made from the map in each iteration",
        default=None,
        node="Mask3D.mrc",
    )
    diameter: float | None = Param(
        None,
        "diameter of the sphere that holds the particle; default: 1.15 times the particle's",
        unit="Å",
        section=MAP,
        gt=0,
    )
    initial_lowpass: float | None = Param(
        None,
        "detail of the reference that is used at first; default: 40, or finer in T, O and I, whose "
        "maps have no shape at that",
        unit="Å",
        section=MAP,
        gt=0,
    )
    shift_range: float | None = Param(
        None,
        "farthest that particles may be from the centre of their box; default: an eighth of the diameter",
        unit="Å",
        section=SEARCH,
        gt=0,
    )
    regulariser: str = Param(
        "fsc",
        "filter of the maps that particles are compared with once their poses are nearly sure: fsc, "
        "nonuniform, sidesplitter, learned, external, or one that a package adds",
        unit="none",
        section=REFERENCES,
    )
    regulariser_everywhere: str = Param(
        "fsc", "the same before, while all directions are searched", unit="none", section=REFERENCES
    )
    external_program: str | None = Param(
        None,
        "program of the external filter, with its arguments, as RELION calls one for --external_reconstruct; "
        "default: that of the environment variable RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE",
        unit="none",
        section=REFERENCES,
    )
    weights: Path | None = Input(
        "weights of the network of the learned filter (.npz, with its .json beside it); default: those that "
        "ship",
        default=None,
        section=REFERENCES,
    )
    phase_flipped: bool = Param(
        False,
        "the particles' phases were flipped by the CTF before, though the table does not say so",
        unit="none",
        section=SEARCH,
    )
    local: bool = Param(
        False,
        "begin at the poses of the table and search near them alone",
        unit="none",
        section=LOCAL,
    )
    turn_deviation: float = Param(
        10.0,
        "standard deviation of turns about an axis from the table's",
        unit="°",
        section=LOCAL,
        gt=0,
    )
    shift_deviation: float = Param(
        5.0,
        "standard deviation of shifts along an axis from the table's",
        unit="Å",
        section=LOCAL,
        gt=0,
    )
    fulcrum: tuple[float, float, float] | None = Param(
        None,
        "point (x, y, z) that turns leave in its place, from the box's centre; default: the mask's centre",
        unit="Å",
        section=LOCAL,
    )
    relax: str = Param(
        "C1",
        "point group whose equivalents of each pose are tried: the particle deviates from it, or has less",
        unit="none",
        section=LOCAL,
    )
    sample: int | None = Param(
        None,
        "refine so many of the particles, drawn at random, to try something; default: all",
        unit="none",
        section=SCHEDULE,
        advanced=True,
        ge=1,
    )
    most_iterations: int = Param(
        30, "iterations after which it ends in any case", unit="none", section=SCHEDULE, advanced=True, ge=1
    )
    memory: float = Param(
        2.0, "memory in which all processes together keep images", unit="GB", section=SCHEDULE, ge=0
    )
    seed: int = Param(1, "seed of all random numbers", unit="none", section=SCHEDULE, ge=0)

    def run(self, ctx: Context) -> None:
        """Check what is given, start from the reference, iterate until nothing improves, tabulate, draw."""
        from halfmap.steps.refine import iterate, pictures, plan, start, tables

        particles = tables.read(self, ctx)
        images, planned = plan.make_plan(self, ctx, particles)
        model = iterate.resume(ctx)
        if model is None:
            reference = start.read_reference(planned)
            images.check()
            model = iterate.begin(ctx, planned, *start.first_model(planned, reference))
        planned = replace(planned, padding=model.padding)
        while not model.done:
            model = iterate.iterate(ctx, planned, model)
        result = iterate.last_result(ctx, model)
        tables.write(ctx, planned, particles, model, result)
        pictures.draw(ctx, planned, model, result)
