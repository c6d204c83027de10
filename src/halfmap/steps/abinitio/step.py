"""The step that makes maps from particles without a reference."""

from __future__ import annotations

from pathlib import Path

from halfmap.engine import Context, Input, Out, Param, Step

MAP, SEARCH, SCHEDULE = "Map", "Search", "Schedule"


class AbInitioStep(Step, name="abinitio", label="relion.initialmodel"):
    """Make maps from particles without a reference.

    Runs begin from particles at random poses, two at a time, each on its own and with the likelier of two
    starts. In each iteration of a run, some of the particles are compared with the maps in all directions,
    and put back with the probabilities of their poses; detail grows from iteration to iteration. Then the
    maps of all runs are turned and moved onto each other, either hand of them, and compared, until two agree.
    Runs that agree are averaged, those that do not are left out. At the end all particles are compared with
    the average, and make the final maps. The hand is open.

    References
    ----------
    .. [1] Punjani, Rubinstein, Fleet & Brubaker 2017, Nat. Methods 14, 290-296, DOI 10.1038/nmeth.4169
    .. [2] Cappé & Moulines 2009, J. R. Stat. Soc. B 71, 593-613, DOI 10.1111/j.1467-9868.2009.00698.x
    .. [3] Scheres 2012, J. Mol. Biol. 415, 406-418, DOI 10.1016/j.jmb.2011.11.010
    """

    outputs = {
        "map": Out("class001.mrc", "DensityMap.mrc.relion.initialmodel"),
        "particles": Out("particles.star", "ParticleGroupMetadata.star.relion"),
        "model": Out("model.star", "OptimiserData.star.relion.initialmodel"),
        "maps": Out("maps.png", "Image2D.png.halfmap.overview"),
        "runs": Out("runs.png", "Image2D.png.halfmap.overview"),
        "progress": Out("progress.png", "Image2D.png.halfmap.overview"),
    }

    particles: Path = Input("table of particles", node="ParticleGroupMetadata.star.relion")
    classes: int = Param(1, "number of maps", unit="none", section=MAP, ge=1, le=20)
    symmetry: str = Param("C1", "point group of the particle", unit="none", section=MAP)
    diameter: float | None = Param(
        None,
        "diameter of the sphere that holds the particle; default: 1.15 times the particle's",
        unit="Å",
        section=MAP,
        gt=0,
    )
    resolution: float | None = Param(
        None,
        "finest detail that is used; default: 15, or finer in T, O and I, whose maps have no shape at that",
        unit="Å",
        section=SEARCH,
        gt=0,
    )
    shift_range: float | None = Param(
        None,
        "farthest that particles may be from the centre of their box; default: a tenth of the diameter",
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
    restarts: int = Param(
        8,
        "runs from random poses at most; no more are made once two agree",
        unit="none",
        section=SCHEDULE,
        ge=1,
    )
    iterations: int = Param(40, "iterations of each run", unit="none", section=SCHEDULE, ge=2, le=1000)
    batch: int | None = Param(
        None,
        "particles of the first iteration, of the last 2.5 times as many; default: 200 a map",
        unit="none",
        section=SCHEDULE,
        advanced=True,
        ge=10,
    )
    memory: float = Param(
        2.0, "memory in which all processes together keep images", unit="GB", section=SCHEDULE, ge=0
    )
    seed: int = Param(1, "seed of all random numbers", unit="none", section=SCHEDULE, ge=0)

    def run(self, ctx: Context) -> None:
        """Run from random poses until two runs agree, combine them, place all particles, draw."""
        from halfmap.steps.abinitio import assign, pictures, plan, rounds, spectra, tables

        particles = tables.read(self, ctx)
        images, planned = plan.make_plan(self, ctx, particles)
        spectra.estimate(planned, images, ctx.folder / rounds.FOLDER)
        agreed = rounds.run_until_two_agree(ctx, planned)
        result = assign.assign(ctx, planned, agreed)
        tables.write(ctx, planned, particles, agreed, result)
        pictures.draw(ctx, planned, agreed, result)
