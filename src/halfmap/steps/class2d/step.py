"""The step that classifies particles in two dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from halfmap.engine import Context, Input, Out, Param, Step
from halfmap.log import log

SEARCH, CTF, SCHEDULE = "Search", "CTF", "Schedule"


class Class2DStep(Step, name="class2d", label="relion.class2d"):
    """Sort particles into classes that look alike, turned and moved onto each other, and average each class.

    Every particle is compared with every class average at all angles in the plane and all shifts, and adds
    to each in proportion to the posterior probability; averages, noise, shifts and the scale of each
    micrograph are estimated in turn (expectation-maximisation). Each fourth of the particles is compared with
    averages of the others, so that none finds its own noise. It starts from single particles at low
    resolution, with random parts of the data, and ends with all particles at the resolution that the averages
    have. Classes that lose their particles start again from particles of the largest ones.

    References
    ----------
    .. [1] Scheres, Valle, Nunez, Sorzano, Marabini, Herman & Carazo 2005, J. Mol. Biol. 348, 139-149,
       DOI 10.1016/j.jmb.2005.02.031
    .. [2] Scheres 2012, J. Struct. Biol. 180, 519-530, DOI 10.1016/j.jsb.2012.09.006
    .. [3] Cappé & Moulines 2009, J. R. Stat. Soc. B 71, 593-613, DOI 10.1111/j.1467-9868.2009.00698.x
    """

    outputs = {
        "particles": Out("particles.star", "ParticleGroupMetadata.star.relion"),
        "model": Out("model.star", "OptimiserData.star.relion.class2d"),
        "averages": Out("class_averages.mrcs", "Image2DStack.mrcs.halfmap.averages"),
        "picture": Out("classes.png", "Image2D.png.halfmap.overview"),
        "progress": Out("progress.png", "Image2D.png.halfmap.overview"),
    }

    particles: Path = Input("table of particles", node="ParticleGroupMetadata.star.relion")
    classes: int = Param(50, "number of classes, 1 to 1000", unit="none", section=SEARCH, ge=1, le=1000)
    diameter: float | None = Param(
        None,
        "diameter of the circle that class averages are kept in; default: 1.15 times the particle's",
        unit="Å",
        section=SEARCH,
        gt=0,
    )
    resolution: float = Param(
        6.0, "finest detail that is used for the search", unit="Å", section=SEARCH, gt=0
    )
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
        section=CTF,
    )
    intact_first_peak: bool = Param(
        False,
        "leave amplitudes alone up to the CTF's first peak; helps where classes turn into blobs",
        unit="none",
        section=CTF,
    )
    iterations: int = Param(25, "iterations, 2 to 500", unit="none", section=SCHEDULE, ge=2, le=500)
    full_iterations: int | None = Param(
        None,
        "of these, the last ones with all particles, at least 1; default: 4, or half of fewer than 8",
        unit="none",
        section=SCHEDULE,
        ge=1,
    )
    first_batch: int | None = Param(
        None,
        "particles of the first iteration, at least 10; default: 100 a class, at least 2000",
        unit="none",
        section=SCHEDULE,
        advanced=True,
        ge=10,
    )
    first_resolution: float = Param(
        25.0, "detail that the first iteration uses", unit="Å", section=SCHEDULE, advanced=True, gt=0
    )
    precision: Literal["float32", "tf32", "bf16"] = Param(
        "float32",
        "of the factors of the scores; the others are faster on a GPU, and move few particles",
        unit="none",
        section=SEARCH,
        advanced=True,
    )
    memory: float = Param(
        2.0, "memory in which all processes together keep images", unit="GB", section=SCHEDULE, ge=0
    )
    seed: int = Param(1, "seed of all random numbers", unit="none", section=SCHEDULE, ge=0)

    def run(self, ctx: Context) -> None:
        """Check the images, start from some of them, iterate, tabulate, draw."""
        from halfmap.steps.class2d import iterate, pictures, plan, progress, reach, start, tables

        particles = tables.read(self, ctx)
        images, planned = plan.make_plan(self, ctx, particles)
        images.check()
        reach.check_diameter(planned, images)
        model = iterate.resume(ctx) or start.first_model(planned, images)
        figures = ctx.folder / iterate.FOLDER
        if model.iteration:
            log.info("going on after iteration %d of %d", model.iteration, self.iterations)
        for iteration in planned.iterations[model.iteration :]:
            model = iterate.iterate(ctx, planned, model, iteration)
            said, rest = progress.said(figures, model.iteration), planned.rest(iteration)
            ctx.round_done(model.iteration, self.iterations, said, rest=rest)
            pictures.draw_so_far(ctx, planned, model)
        done = iterate.last_assignments(ctx, planned)
        tables.write(ctx, planned, particles, model, done)
        pictures.draw(ctx, planned, model, done)
