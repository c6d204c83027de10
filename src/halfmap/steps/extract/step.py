"""The step that cuts particles out of micrographs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

from halfmap.engine import Context, Input, Out, Param, Step

SIZE, SELECTION, CONTRAST, OUTPUT = "Size", "Selection", "Contrast", "Output"

Background = Literal["ramp", "mean", "none"]
Edges = Literal["mirror", "repeat", "leave-out"]


class ExtractStep(Step, name="extract", label="relion.extract"):
    """Cut particles out of micrographs: a normalised stack with a CTF for every particle.

    The box is chosen from the particle's diameter and the defocus if none is given. Each particle gets the
    defocus at its own place. Given particles that were refined, they are cut anew about their refined
    centres, with poses and all else kept. Particles in masked areas, too near to the edge or too near to a
    better one are left out and counted. Micrographs are read one after the other, each once.

    References
    ----------
    .. [1] Scheres 2012, J. Struct. Biol. 180, 519-530, DOI 10.1016/j.jsb.2012.09.006
    .. [2] Rosenthal & Henderson 2003, J. Mol. Biol. 333, 721-745, DOI 10.1016/j.jmb.2003.07.013
    """

    outputs = {
        "particles": Out("particles.star", "ParticleGroupMetadata.star.relion"),
        "picture": Out("summary.png", "Image2D.png.halfmap.overview"),
        "images": Out("particles.png", "Image2D.png.halfmap.overview"),
    }

    micrographs: Path = Input("table of micrographs", node="MicrographGroupMetadata.star.relion")
    coordinates: Path = Input(
        "table of picking or import, or particles to be cut anew",
        node="MicrographCoordsGroup.star.relion",
    )
    images: Literal["raw", "denoised", "merged"] = Param(
        "raw",
        "images to cut from: raw, or those of denoise apply, which are not for final maps",
        unit="none",
        section=CONTRAST,
        advanced=True,
    )
    diameter: float | None = Param(
        None, "longest diameter of the particle; default: the picker's", unit="Å", section=SIZE, ge=20
    )
    box: int | None = Param(
        None,
        "side of the box, in pixels of the micrograph; default: from diameter and defocus",
        unit="px",
        section=SIZE,
        ge=16,
    )
    pixel_size: float | None = Param(
        None, "pixel size wanted of the particles; default: the micrographs'", unit="Å/px", section=SIZE, gt=0
    )
    scaled_box: int | None = Param(
        None, "side of the images that boxes are scaled to", unit="px", section=SIZE, advanced=True, ge=8
    )
    resolution: float | None = Param(
        None,
        "finest detail that the box must keep; default: 3 Å, or what the pixels allow",
        unit="Å",
        section=SIZE,
        gt=0,
    )
    min_score: float | None = Param(
        None, "leave out picks whose score is below this", unit="none", section=SELECTION
    )
    min_probability: float | None = Param(
        None, "leave out picks that are less probable than this", unit="none", section=SELECTION, ge=0, le=1
    )
    min_distance: float | None = Param(
        None,
        "of particles that are closer keep the best; 0 keeps all; default: a quarter of the diameter",
        unit="Å",
        section=SELECTION,
        ge=0,
    )
    use_masks: bool = Param(
        True, "leave out particles where the micrograph's mask says so", unit="none", section=SELECTION
    )
    edges: Edges = Param(
        "mirror",
        "boxes that stick out, as long as the particle does not: mirror the image at its edge, repeat the "
        "nearest pixels as RELION does, or leave them out",
        unit="none",
        section=SELECTION,
    )
    recentre: bool = Param(
        True, "cut about the centres that refinement found", unit="none", section=SELECTION
    )
    background: Background = Param(
        "ramp", "what to subtract outside the particle; none: do not normalise", unit="none", section=CONTRAST
    )
    background_diameter: float | None = Param(
        None,
        "circle outside of which is background; default: 1.25 times the diameter",
        unit="Å",
        section=CONTRAST,
        advanced=True,
        gt=0,
    )
    invert_contrast: bool = Param(
        True, "turn dark particles bright, unless the table says that they are", unit="none", section=CONTRAST
    )
    white_dust: float | None = Param(
        None,
        "replace pixels brighter than so many standard deviations by noise; default: none",
        unit="none",
        section=CONTRAST,
        gt=0,
    )
    black_dust: float | None = Param(
        None,
        "replace pixels darker than so many standard deviations by noise; default: none",
        unit="none",
        section=CONTRAST,
        gt=0,
    )
    phase_flip: bool = Param(
        False, "flip phases by the CTF, for programs that know none", unit="none", section=CONTRAST
    )
    defocus_of_micrographs: bool = Param(
        False,
        "take defocus from the micrographs even where particles have their own",
        unit="none",
        section=CONTRAST,
        advanced=True,
    )
    float16: bool = Param(False, "write half precision, half the size", unit="none", section=OUTPUT)

    def run(self, ctx: Context) -> None:
        """Place the particles, choose the box, cut micrograph after micrograph, tabulate, draw."""
        from halfmap.errors import ParameterError
        from halfmap.io.tables import read_micrographs, write_particles
        from halfmap.steps.extract import coordinates, micrograph, pictures, reading, tables

        if self.background == "none" and (self.white_dust or self.black_dust):
            raise ParameterError(
                "dust is told by the background's spread", hint="leave --background none out"
            )
        micrographs = read_micrographs(ctx.resolve(self.micrographs))
        picks = coordinates.read(self, ctx, micrographs)
        picks = coordinates.place(self, picks)
        plan = tables.make_plan(self, picks, tables.typical_values(ctx, picks))
        items = tables.list_items(self, ctx, picks, plan)
        (ctx.folder / micrograph.FOLDER).mkdir(exist_ok=True)
        extract = functools.partial(micrograph.extract_micrograph, step=self, folder=ctx.folder)
        versions = tables.versions(micrographs, items)
        done = ctx.map(
            extract,
            items,
            unit="micrograph",
            version=lambda item: versions[item.name],
            files=lambda item: item.key,
        )
        reading.forget_micrograph()
        particles = tables.tabulate(self, ctx, picks, plan, items, done)
        write_particles(ctx.folder / "particles.star", particles)
        names = [one["name"] for one in done]
        ctx.picture("particles.png", names, lambda path: pictures.draw_particles(path, ctx, particles))
        ctx.picture("summary.png", names, lambda path: pictures.draw_summary(path, particles))
