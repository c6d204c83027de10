"""The step that keeps good classes and particles of a classification."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from halfmap.engine import Context, Input, Out, Param, Step

HAND, SCORES = "By hand", "By scores"


class SelectStep(Step, name="select", label="relion.select.class2dauto"):
    """Keep the classes of a classification that show particles, by a score or by hand.

    Each class gets a score between 0 and 1: the share of its particles that are whole, single molecules, as
    far as its average, its signal-to-noise ratio and the fit of its particles tell. Classes of a good score
    are kept; of their particles, those that fit far worse than others are left out too. Which numbers tell,
    and how much, was learned from simulated data with known junk. Classes of a 3D classification are kept
    by hand.

    References
    ----------
    .. [1] Kimanius, Dong, Sharov, Nakane & Scheres 2021, Biochem. J. 478, 4169-4185,
       DOI 10.1042/BCJ20210708
    """

    outputs = {
        "particles": Out("particles.star", "ParticleGroupMetadata.star.relion"),
        "rejected": Out("rejected.star", "ParticleGroupMetadata.star.halfmap.rejected", optional=True),
        "averages": Out("class_averages.star", "Image2DGroupMetadata.star.relion.classaverages"),
        "model": Out("model.star", "OptimiserData.star.relion.select"),
        "picture": Out("classes.png", "Image2D.png.halfmap.overview"),
    }

    model: Path = Input("model of a classification (model.star)", node="OptimiserData.star.relion.class2d")
    particles: Path | None = Input(
        "its particles; default: those that lie beside the model",
        node="ParticleGroupMetadata.star.relion",
        default=None,
    )
    classes: tuple[int, ...] = Param(
        (), "numbers of the classes to keep, from 1, or ranges such as 1-5,8", unit="none", section=HAND
    )
    exclude: tuple[int, ...] = Param(
        (), "numbers or ranges of the classes to reject, all others are kept", unit="none", section=HAND
    )
    averages: Path | None = Input(
        "table of the class averages to keep (class_averages.star)",
        node="Image2DGroupMetadata.star.relion.classaverages",
        default=None,
        section=HAND,
    )
    min_score: float | None = Param(
        None, "least score of classes that are kept", unit="none", section=SCORES, ge=0, le=1
    )
    min_particle_score: float | None = Param(
        None,
        "least score of particles that are kept, 0 for all; classes named by hand are kept whole by default",
        unit="none",
        section=SCORES,
        ge=0,
        le=1,
    )
    images: bool = Param(
        True, "look at the particles' images too, beside their tables", unit="none", section=SCORES
    )
    min_particles: int = Param(
        1, "least number of particles in classes that are kept", unit="none", section=SCORES, ge=1
    )

    @property
    def by_hand(self) -> bool:
        """Whether the classes are named."""
        return bool(self.classes or self.exclude or self.averages)

    @model_validator(mode="after")
    def _check(self) -> SelectStep:
        given = [f"--{name}" for name in ("classes", "exclude", "averages") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"give one of {' and '.join(given)}, not both")
        if given and self.min_score is not None:
            raise ValueError(f"{given[0]} names the classes, so --min-score has nothing to choose")
        return self

    def run(self, ctx: Context) -> None:
        """Score classes and particles, choose, write what is kept and what is not, draw the averages."""
        from halfmap.steps.select import choice, classification, pictures, tables

        found = classification.read(self, ctx)
        chosen = choice.choose(self, ctx, found)
        tables.write(ctx, found, chosen)
        pictures.draw_classes(ctx.folder / "classes.png", found, chosen)
