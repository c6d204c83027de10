"""The step that tells the hand of a map, and mirrors what has the wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from halfmap.engine import Context, Input, Out, Param
from halfmap.search.half_map_step import HalfMapStep

HAND = "Hand"


class HandStep(HalfMapStep, name="hand"):
    """Tell whether a map is right or a mirror image, and mirror its half maps and poses if it is one.

    Images of particles are the same for a structure and its mirror image, so that one refinement in two ends
    with the wrong hand. Alpha helices are right-handed: ideal ones of either hand are fitted to the places of
    the map that look most like one. The turns of helices show at 5.2 Å and better. What is written has the
    right hand as far as it could be told: all of it as it was given, or all of it mirrored.

    References
    ----------
    .. [1] Rosenthal & Henderson 2003, J. Mol. Biol. 333, 721-745, DOI 10.1016/j.jmb.2003.07.013
    """

    outputs = {
        "map": Out("map.mrc", "DensityMap.mrc.halfmap.hand"),
        "half1": Out("half1.mrc", "DensityMap.mrc.relion.halfmap.refine3d"),
        "half2": Out("half2.mrc", "DensityMap.mrc.halfmap.half2"),
        "mask": Out("mask.mrc", "Mask3D.mrc"),
        "particles": Out("particles.star", "ParticleGroupMetadata.star.relion.refine3d", optional=True),
        "told": Out("hand.star", "Hand.star.halfmap"),
        "picture": Out("hand.png", "Image2D.png.halfmap.overview", optional=True),
    }

    map: Path | None = Input(
        "map to mirror along, such as the refinement's; default: the mean of the half maps",
        node="DensityMap.mrc",
        default=None,
    )
    particles: Path | None = Input(
        "the refined particles, whose poses are mirrored with the map",
        node="ParticleGroupMetadata.star.relion.refine3d",
        default=None,
    )
    symmetry: str = Param("C1", "point group that the map was made with", unit="none", section=HAND)
    mirror: Literal["if-left-handed", "always", "never"] = Param(
        "if-left-handed",
        "mirror a map whose helices are left-handed; always or never where the hand is known from elsewhere",
        unit="none",
        section=HAND,
    )
    seed: int = Param(1, "seed of all random numbers", unit="none", section=HAND, advanced=True, ge=0)

    def run(self, ctx: Context) -> None:
        """Read the maps and the poses, tell the hand, write them in the right one."""
        from halfmap.steps.hand import mirror

        given = mirror.read(self, ctx)
        hand = mirror.tell(self, given)
        mirror.write(self, ctx, given, hand)
