"""The step that sorts particles into conformations."""

from __future__ import annotations

from pathlib import Path

from halfmap.engine import Context, Input, Out, Param, Step

MAP, SEARCH, SCHEDULE = "Map", "Search", "Schedule"


class Class3DStep(Step, name="class3d", label="relion.class3d"):
    """Sort particles into conformations, each with a map of its own.

    Every particle is compared with the map of every class, and adds to each in proportion to the probability
    that it shows it; maps, shares and noise are estimated in turn (expectation-maximisation). Classes begin
    along what the particles differ in most, at the poses that one reference gives them, or from a reference
    each. A class differs from the map of all particles only in what its halves agree in. Each fourth of the
    particles is compared with maps of the others, so that none finds its own noise. It ends by itself when
    hardly any particle changes its class.

    References
    ----------
    .. [1] Scheres, Gao, Valle, Herman, Eggermont, Frank & Carazo 2007, Nat. Methods 4, 27-29,
       DOI 10.1038/nmeth992
    .. [2] Scheres 2012, J. Struct. Biol. 180, 519-530, DOI 10.1016/j.jsb.2012.09.006
    .. [3] Bai, Rajendra, Yang, Shi & Scheres 2015, eLife 4, e11182, DOI 10.7554/eLife.11182
    .. [4] Tagare, Kucukelbir, Sigworth, Wang & Rao 2015, J. Struct. Biol. 191, 245-262,
       DOI 10.1016/j.jsb.2015.05.007
    """

    outputs = {
        "particles": Out("particles.star", "ParticleGroupMetadata.star.relion"),
        "model": Out("model.star", "OptimiserData.star.relion.class3d"),
        "first": Out("class001.mrc", "DensityMap.mrc.relion.class3d"),
        "picture": Out("classes.png", "Image2D.png.halfmap.overview"),
        "fsc": Out("fsc.png", "Image2D.png.halfmap.overview"),
        "directions": Out("angular_distribution.png", "Image2D.png.halfmap.overview"),
        "progress": Out("progress.png", "Image2D.png.halfmap.overview"),
    }

    particles: Path = Input("table of particles", node="ParticleGroupMetadata.star.relion")
    reference: tuple[Path, ...] = Input(
        "map that all classes begin from, or one for each class",
        min_length=1,
        node="DensityMap.mrc",
    )
    classes: int | None = Param(
        None, "number of classes, 2 to 100; default: as many as there are references, or 4", unit="none",
        section=MAP, ge=2, le=100,
    )  # fmt: skip
    alignment: bool = Param(
        True, "search the poses; without, those of the table are kept", unit="none", section=SEARCH
    )
    symmetry: str = Param("C1", "point group of the particle", unit="none", section=MAP)
    focus_mask: Path | None = Input(
        "mask, 0 to 1, of the part by which particles are sorted; elsewhere all classes are alike",
        default=None,
        node="Mask3D.mrc",
    )
    mask: Path | None = Input(
        "mask of the particle, 0 to 1; default: the sphere of its diameter",
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
    initial_lowpass: float = Param(
        40.0, "detail of the reference that is used at first", unit="Å", section=MAP, gt=0
    )
    resolution: float = Param(10.0, "finest detail that is compared", unit="Å", section=SEARCH, gt=0)
    shift_range: float | None = Param(
        None,
        "farthest that particles may be from the centre of their box; default: an eighth of the diameter",
        unit="Å",
        section=SEARCH,
        gt=0,
    )
    phase_flipped: bool = Param(
        False,
        "the particles' phases were flipped by the CTF before, though the table does not say so",
        unit="none",
        section=SEARCH,
    )
    iterations: int = Param(
        25, "iterations after which it ends in any case", unit="none", section=SCHEDULE, ge=2, le=500
    )
    memory: float = Param(
        2.0, "memory in which all processes together keep images", unit="GB", section=SCHEDULE, ge=0
    )
    seed: int = Param(1, "seed of all random numbers", unit="none", section=SCHEDULE, ge=0)

    def run(self, ctx: Context) -> None:
        """Check what is given, start from the reference, iterate until classes stand, tabulate, draw."""
        from halfmap.steps.class3d import iterate, pictures, plan, start, tables

        particles = tables.read(self, ctx)
        images, planned = plan.make_plan(self, ctx, particles)
        model = iterate.resume(ctx)
        if model is None:
            references = start.read_references(planned)
            images.check()
            start.keep_poses(ctx, planned, particles)
            model = start.first_model(planned, references)
        while not model.done:
            model = iterate.iterate(ctx, planned, model)
            ctx.round_done(model.iteration, None, iterate.said(ctx, model))
        result = iterate.last_result(ctx, model)
        tables.write(ctx, planned, particles, model, result)
        pictures.draw(ctx, planned, model, result)
