"""The steps that find particles in micrographs, one for every method, and what they share."""

from __future__ import annotations

import functools
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from halfmap.engine import Context, Input, Out, Param, Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from halfmap.io.micrographs import MicrographItem
    from halfmap.steps.pick.calibrate import Calibration
    from halfmap.steps.pick.micrograph import Method

PARTICLE, REFERENCES, SELECTION, OUTPUT = "Particle", "References", "Selection", "Output"
TRAINING = "Training"
AUTOPICK = "relion.autopick"
MODEL = "MlModel.npz.halfmap.picker"


class PickMicrographs(Step):
    """What all methods share: micrographs in, coordinates with probabilities out."""

    outputs = {
        "coordinates": Out("autopick.star", "MicrographCoordsGroup.star.relion"),
        "picture": Out("summary.png", "Image2D.png.halfmap.overview"),
    }

    micrographs: Path = Input(
        "table of micrographs, with their CTF if it is known", node="MicrographGroupMetadata.star.relion"
    )
    images: Literal["raw", "denoised", "merged"] = Param(
        "raw", "images to pick in: raw, or those of denoise apply", unit="none", section=PARTICLE
    )
    probability: float = Param(0.5, "least probability of a pick", unit="none", section=SELECTION, gt=0, lt=1)
    use_ctf: bool = Param(
        True, "make use of the CTF, where the table has it", unit="none", section=PARTICLE, advanced=True
    )
    seed: int = Param(
        1,
        "seed of the noise that scores are compared with",
        unit="none",
        section=SELECTION,
        advanced=True,
        ge=0,
    )
    pictures: bool = Param(True, "draw a picture of each micrograph", unit="none", section=OUTPUT)

    @abstractmethod
    def method(self, ctx: Context, items: list[MicrographItem]) -> Method:
        """Prepare what searches a micrograph."""

    def calibration(
        self, scores: NDArray, number: NDArray, null: NDArray | None, method: Method
    ) -> Calibration:
        """Threshold and probabilities, from all candidates' scores and micrographs, and scores of noise."""
        from halfmap.steps.pick.calibrate import calibrate

        return calibrate(scores, null, probability=self.probability, micrograph=number)

    def run(self, ctx: Context) -> None:
        """Search every micrograph, calibrate the scores of all, write the picks and draw them."""
        import numpy as np

        from halfmap.io.micrographs import list_micrographs
        from halfmap.io.tables import read_micrographs
        from halfmap.log import log
        from halfmap.steps.pick import micrograph, pictures, tables

        micrographs = read_micrographs(ctx.resolve(self.micrographs))
        items = list_micrographs(micrographs, ctx.resolve, use_ctf=self.use_ctf, images=self.images)
        if self.images != "raw":
            log.warning(
                "picking in %s micrographs: what is known of noise and of false picks is of raw ones, in "
                "which small particles are found more often, and fewer in empty ice; compare the pictures",
                self.images,
            )
        method = self.method(ctx, items)
        versions = micrograph.versions(micrographs, method)
        for folder in (tables.CANDIDATES, tables.FOLDER, micrograph.PICTURES):
            (ctx.folder / folder).mkdir(exist_ok=True)
        search = functools.partial(
            micrograph.search_micrograph, method=method, folder=ctx.folder, seed=self.seed
        )
        done = ctx.map(
            search,
            items,
            unit="micrograph",
            version=lambda item: versions[item.name],
            files=lambda item: item.key,
        )
        searched = {row["name"]: f"{row['key']} {versions[row['name']]}" for row in done}
        # While more are to come, those that have their picks keep them.
        held = ctx.decisions.hold("threshold", list(searched.values())) and ctx.growing
        before = tables.picked_before(ctx, searched)
        before = before if held else {}
        among = tables.calibrated_by(done, before)
        candidates, number, null = tables.gather(ctx, among)
        scores = np.concatenate([part.score for part in candidates])
        calibration = self.calibration(scores, number, null if len(null) else None, method)
        if calibration.kind == "none":
            log.warning("no particles are told apart from noise")
        picks = {
            row["name"]: (row["key"], tables.picks_of(part, calibration.part(i), method.diameter))
            for i, (row, part) in enumerate(zip(among, candidates, strict=True))
            if row["name"] not in before
        }
        table = tables.write_picks(ctx, picks, [row["name"] for row in done], before)
        tables.note_picked(ctx, searched)
        if not before:
            tables.say_picks(calibration)
            pictures.draw_summary(ctx.folder / "summary.png", scores, calibration, table, method.diameter)
            ctx.decisions.note("threshold", list(searched.values()))
        if self.pictures:
            draw = functools.partial(micrograph.draw_micrograph, diameter=method.diameter, folder=ctx.folder)
            new = {name: tables.version_of_picks(found) for name, (_, found) in picks.items()}
            drawn = [item for item in items if item.name in new]
            ctx.map(
                draw,
                drawn,
                unit="picture",
                version=lambda item: new[item.name],
                files=lambda item: item.key,
            )
        tables.refuse_nothing(table)


class PickBlob(PickMicrographs, name="pick blob", label=AUTOPICK):
    """Pick without references: the particle's size and mean profile are found in the micrographs.

    Balls and shells of all sizes are tried on some micrographs. The mean of what the best one finds is the
    next filter, until it changes no more. All filters know the CTF and the spectrum of the noise. The
    threshold comes from the scores of all candidates, and each pick has a probability.

    References
    ----------
    .. [1] Turin 1960, IRE Trans. Inf. Theory 6, 311-329, DOI 10.1109/TIT.1960.1057571
    .. [2] Efron 2004, J. Am. Stat. Assoc. 99, 96-104, DOI 10.1198/016214504000000089
    """

    diameter: float | None = Param(
        None,
        "diameter of the particle; default: found in the data",
        unit="Å",
        section=PARTICLE,
        ge=20,
        le=3000,
    )
    smallest: float = Param(
        50.0, "least diameter that is looked for", unit="Å", section=PARTICLE, ge=20, le=1000
    )
    largest: float = Param(
        500.0, "greatest diameter that is looked for", unit="Å", section=PARTICLE, ge=30, le=3000
    )
    contrast: Literal["dark", "bright"] = Param(
        "dark", "whether particles are darker or brighter than the ice", unit="none", section=PARTICLE
    )
    survey: int = Param(
        8,
        "micrographs that size and profile are found in",
        unit="none",
        section=PARTICLE,
        advanced=True,
        ge=1,
    )

    @model_validator(mode="after")
    def _check(self) -> PickBlob:
        if self.smallest >= self.largest:
            raise ValueError(f"--smallest ({self.smallest:g} Å) is not below --largest ({self.largest:g} Å)")
        return self

    def method(self, ctx: Context, items: list[MicrographItem]) -> Method:
        """Learn the particle from some micrographs."""
        from halfmap.steps.pick import survey

        survey.check_room(items, self.diameter or self.smallest)
        return survey.blob(self, ctx, items)


class PickTemplate(PickMicrographs, name="pick template", label=AUTOPICK):
    """Pick with references: class averages, or projections of a map in all directions, in all angles.

    Each reference is blurred by the micrograph's CTF and compared at every place in every in-plane angle, in
    units of the noise's standard deviation. The threshold comes from the scores of all candidates.

    References
    ----------
    .. [1] Roseman 2004, J. Struct. Biol. 145, 91-99, DOI 10.1016/j.jsb.2003.11.007
    .. [2] Scheres 2015, J. Struct. Biol. 189, 114-122, DOI 10.1016/j.jsb.2014.11.010
    """

    references: Path = Input(
        "class averages (.mrcs, or class_averages.star of `halfmap select`) with bright particles, or a map "
        "(.mrc)"
    )
    pixel_size: float | None = Param(
        None, "pixel size of the references; default: their header's", unit="Å/px", section=REFERENCES, gt=0
    )
    symmetry: str = Param("C1", "symmetry of the map", unit="none", section=REFERENCES)
    resolution: float | None = Param(
        None,
        "finest detail of the references that is used; default: 20 Å, or a fifth of a smaller particle",
        unit="Å",
        section=REFERENCES,
        ge=5,
        le=100,
    )
    angle_step: float | None = Param(
        None,
        "in-plane step; default: from diameter and resolution",
        unit="°",
        section=REFERENCES,
        gt=0,
        le=90,
    )
    diameter: float | None = Param(
        None, "diameter of the particle; default: that of the references", unit="Å", section=PARTICLE, ge=20
    )

    def method(self, ctx: Context, items: list[MicrographItem]) -> Method:
        """Read the references, or project the map, and look at some micrographs."""
        from halfmap.steps.pick import references, survey

        references.refuse_micrograph(ctx.resolve(self.references), items)
        template = references.prepare(self, ctx)
        survey.check_room(items, template.diameter)
        return survey.with_usual(template, survey.surveyed(items, template.pixel_size))

    def calibration(
        self, scores: NDArray, number: NDArray, null: NDArray | None, method: Method
    ) -> Calibration:
        """The same, of particles whose views differ in strength."""
        from halfmap.steps.pick.calibrate import calibrate
        from halfmap.steps.pick.template import Template

        assert isinstance(method, Template)
        return calibrate(
            scores, null, probability=self.probability, micrograph=number, scatter=method.scatter
        )


class PickLearned(PickMicrographs, name="pick learned", label=AUTOPICK):
    """Pick with a network trained on simulated micrographs, or fine-tuned on picks by ``pick train``.

    The micrograph is scaled to the particle's diameter and its background made even. A small convolutional
    network gives the log-odds of a particle's centre at every place. They were calibrated on simulated
    micrographs, and are lowered where a micrograph holds fewer particles than those, for candidates that are
    weaker than the other particles, as fragments are, and for those that noise of the micrograph's spectrum
    would give as well.

    References
    ----------
    .. [1] Ronneberger, Fischer & Brox 2015, DOI 10.1007/978-3-319-24574-4_28
    .. [2] Saerens, Latinne & Decaestecker 2002, Neural Comput. 14, 21-41, DOI 10.1162/089976602753284446
    .. [3] Theiler et al. 1992, Physica D 58, 77-94, DOI 10.1016/0167-2789(92)90102-S
    .. [4] Storey 2002, J. R. Stat. Soc. B 64, 479-498, DOI 10.1111/1467-9868.00346
    """

    model: Path | None = Input(
        "model of pick train; default: the general one", node=MODEL, default=None, section=PARTICLE
    )
    diameter: float | None = Param(
        None,
        "diameter of the particle; default: the model's, or found in the data",
        unit="Å",
        section=PARTICLE,
        ge=20,
        le=3000,
    )

    def method(self, ctx: Context, items: list[MicrographItem]) -> Method:
        """Read the network, and find the particle's diameter where none is known."""
        from halfmap.steps.pick import learned, survey

        model = None if self.model is None else ctx.resolve(self.model)
        record = learned.load_network(model)[1]
        diameter = self.diameter or record.get("diameter")
        if diameter is None:
            diameter = PickBlob(micrographs=self.micrographs).method(ctx, items).diameter
        survey.check_room(items, diameter)
        return learned.Learned(diameter, model, ctx.device)

    def calibration(
        self, scores: NDArray, number: NDArray, null: NDArray | None, method: Method
    ) -> Calibration:
        """Probabilities of the log-odds as they are."""
        from halfmap.steps.pick.learned_calibration import calibrate_log_odds

        return calibrate_log_odds(scores, probability=self.probability)


class PickTrain(Step, name="pick train", label="halfmap.pick.train"):
    """Fine-tune the network of ``pick learned`` on some picks of the data set at hand.

    What was picked is positive; everything else is unlabelled, since picks may have been left out. The share
    of particles in it is estimated by the general model.

    References
    ----------
    .. [1] Kiryo et al. 2017, NeurIPS 30, arXiv 1703.00593
    .. [2] Bepler et al. 2019, Nat. Methods 16, 1153-1160, DOI 10.1038/s41592-019-0575-8
    """

    outputs = {
        "model": Out("model.npz", MODEL),
        "picture": Out("training.png", "Image2D.png.halfmap.overview"),
    }

    micrographs: Path = Input("table of micrographs", node="MicrographGroupMetadata.star.relion")
    coordinates: Path = Input(
        "table that names the coordinates of some micrographs' picks",
        node="MicrographCoordsGroup.star.relion",
    )
    model: Path | None = Input("model to start from; default: the general one", node=MODEL, default=None)
    diameter: float | None = Param(
        None,
        "diameter of the particle; default: that of the picks",
        unit="Å",
        section=PARTICLE,
        ge=20,
        le=3000,
    )
    steps: int = Param(
        300, "batches to train on", unit="none", section=TRAINING, advanced=True, ge=10, le=10_000
    )
    most: int = Param(
        48,
        "micrographs to train on at the most, drawn from those with picks",
        unit="none",
        section=TRAINING,
        advanced=True,
        ge=1,
        le=1000,
    )
    seed: int = Param(1, "seed of all random numbers", unit="none", section=TRAINING, advanced=True, ge=0)

    def run(self, ctx: Context) -> None:
        """Read picks and micrographs, train, write the model and a picture."""
        from halfmap.steps.pick import learned_model

        learned_model.run(self, ctx)


class PickConsensus(Step, name="pick consensus", label=AUTOPICK):
    """Join the picks of two or more pickers: each with how many agree, and a probability.

    Picks of different pickers that are nearer than a distance are one particle, at their mean. How often each
    picker finds a particle, and how often it picks what is none, is estimated from their agreement alone.

    References
    ----------
    .. [1] Dawid & Skene 1979, Appl. Stat. 28, 20-28, DOI 10.2307/2346806
    """

    outputs = {
        "coordinates": Out("autopick.star", "MicrographCoordsGroup.star.relion"),
        "picture": Out("summary.png", "Image2D.png.halfmap.overview"),
    }

    coordinates: tuple[Path, ...] = Input(
        "tables that name the coordinates of each picker",
        node="MicrographCoordsGroup.star.relion",
        min_length=1,
    )
    micrographs: Path = Input("table of the micrographs", node="MicrographGroupMetadata.star.relion")
    diameter: float | None = Param(
        None, "diameter of the particle; default: the pickers'", unit="Å", section=PARTICLE, ge=20
    )
    distance: float | None = Param(
        None,
        "picks that are nearer are one; default: a third of the diameter",
        unit="Å",
        section=PARTICLE,
        gt=0,
    )
    probability: float = Param(0.5, "least probability of a pick", unit="none", section=SELECTION, gt=0, lt=1)
    precision: float | None = Param(
        None,
        "part of the picks that must be true on average; raises the least probability",
        unit="none",
        section=SELECTION,
        gt=0,
        lt=1,
    )
    pictures: bool = Param(True, "draw a picture of each micrograph", unit="none", section=OUTPUT)

    def run(self, ctx: Context) -> None:
        """Join the picks of every micrograph, weigh the pickers, write and draw what is left."""
        from halfmap.steps.pick import consensus

        consensus.run(self, ctx)


class PickExport(Step, name="pick export", label="halfmap.pick.export"):
    """Write picks in another program's format, a file a micrograph.

    EMAN's boxes, Topaz's tables, comma-separated values and STAR files can be written.
    """

    outputs = {"list": Out("exported.star", "Coordinates.star.halfmap.exported")}

    coordinates: Path = Input("table that names the coordinates", node="MicrographCoordsGroup.star.relion")
    format: Literal["box", "txt", "csv", "star"] = Param(
        "box", "format of the files", unit="none", section=OUTPUT
    )
    scale: float = Param(
        1.0,
        "multiply coordinates by this: by how much micrographs are larger elsewhere",
        unit="none",
        section=OUTPUT,
        gt=0,
    )
    box: int | None = Param(None, "side of the boxes of a .box file", unit="px", section=OUTPUT, ge=1)
    min_probability: float | None = Param(
        None, "leave out picks that are less probable", unit="none", section=SELECTION, ge=0, le=1
    )

    def run(self, ctx: Context) -> None:
        """Write the coordinates of every micrograph."""
        from halfmap.steps.pick import export

        export.run(self, ctx)
