"""The steps that make soft masks: around the particle of a map, of simple shape, around an atomic model."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from halfmap.engine import Context, Input, Out, Param, Step

if TYPE_CHECKING:
    from halfmap.io.volumes import MapFile
    from halfmap.steps.mask.build import Mask

PARTICLE, SHAPE, EDGE = "Particle", "Shape", "Edge"
MASK_CREATE = "relion.maskcreate"


class MakeMask(Step):
    """What all masks share: a map whose box and voxels they have, a soft edge, a file and a picture."""

    outputs = {
        "mask": Out("mask.mrc", "Mask3D.mrc"),
        "picture": Out("mask.png", "Image2D.png.halfmap.overview"),
    }

    map: Path = Input("map (MRC), whose box and pixel size the mask has", node="DensityMap.mrc")
    soft_edge: float | None = Param(
        None, "width of the cosine edge; default: 6 pixels", unit="Å", section=EDGE, ge=0
    )
    invert: bool = Param(False, "make it 0 inside and 1 outside", unit="none", section=EDGE)
    pixel_size: float | None = Param(
        None, "voxel size; default: the header's", unit="Å/px", section=EDGE, advanced=True, gt=0
    )

    @property
    def box_alone(self) -> bool:
        """Whether the map's density plays no part, so that there need be none."""
        return True

    @abstractmethod
    def build(self, ctx: Context, volume: MapFile) -> Mask:
        """Make the mask for a map."""

    def run(self, ctx: Context) -> None:
        """Read the map, make the mask, write it and draw it over the map."""
        from halfmap.io.volumes import read_volume
        from halfmap.steps.mask import build, pictures

        path = ctx.resolve(self.map)
        volume = read_volume(path, pixel_size=self.pixel_size, may_be_flat=self.box_alone)
        mask = self.build(ctx, volume)
        build.write(ctx.folder / "mask.mrc", volume, mask, invert=self.invert)
        pictures.draw_mask(ctx.folder / "mask.png", volume, mask)


class MaskMap(MakeMask, name="mask", label=MASK_CREATE):
    """Make a soft mask around the particle of a map; for other masks see: mask sphere, cylinder, model.

    The map is blurred, to 15 Å or as far as it takes for the particle to stand out of the noise. The mode of
    its density is the solvent. The particle's surface is halfway between the solvent and the mean of what is
    above the surface, or three standard deviations of the noise above the solvent if that is higher. Large
    pieces are kept, small holes filled, and the mask is extended and gets a cosine edge.

    References
    ----------
    .. [1] Ridler & Calvard 1978, IEEE Trans. Syst. Man Cybern. 8, 630-632, DOI 10.1109/TSMC.1978.4310039
    """

    threshold: float | None = Param(
        None, "density of the blurred map at the surface; default: found", unit="none", section=PARTICLE
    )
    lowpass: float | None = Param(
        None,
        "resolution that the map is blurred to; default: 15 Å, more if the noise needs it",
        unit="Å",
        section=PARTICLE,
        gt=0,
        le=200,
    )
    level: float = Param(
        0.5,
        "where the surface is between solvent (0) and particle (1); less takes in weak parts",
        unit="none",
        section=PARTICLE,
        gt=0,
        lt=1,
    )
    least_piece: float = Param(
        10.0,
        "volume of separate pieces that are kept, of the largest one; 100 keeps this one only",
        unit="%",
        section=PARTICLE,
        advanced=True,
        ge=0,
        le=100,
    )
    largest_hole: float = Param(
        10.0,
        "volume of holes that are filled, of the particle's; 0 fills none",
        unit="%",
        section=PARTICLE,
        advanced=True,
        ge=0,
    )
    extend: float | None = Param(
        None, "how far it reaches beyond the surface; default: 3 pixels", unit="Å", section=EDGE, ge=0
    )

    @model_validator(mode="after")
    def _check(self) -> MaskMap:
        if self.threshold is not None and "level" in self.model_fields_set:
            raise ValueError("--threshold says where the surface is, so --level has nothing to do")
        return self

    @property
    def box_alone(self) -> bool:
        """The particle is found in it."""
        return False

    def build(self, ctx: Context, volume: MapFile) -> Mask:
        """Find the particle."""
        from halfmap.steps.mask.build import around_particle

        return around_particle(self, volume)


class MaskSphere(MakeMask, name="mask sphere", label=MASK_CREATE):
    """Make a soft mask that is a sphere, in the box of a map.

    It is one within the sphere and falls to zero outside over the soft edge, as a cosine. The map gives box
    and pixel size alone; what is in it plays no part.
    """

    diameter: float = Param(..., "diameter, without the edge", unit="Å", section=SHAPE, gt=0)
    centre: tuple[float, float, float] = Param(
        (0.0, 0.0, 0.0), "centre (x, y, z), from the box's centre", unit="Å", section=SHAPE
    )

    def build(self, ctx: Context, volume: MapFile) -> Mask:
        """Make the sphere."""
        from halfmap.steps.mask.build import sphere

        return sphere(self, volume)


class MaskCylinder(MakeMask, name="mask cylinder", label=MASK_CREATE):
    """Make a soft mask that is a cylinder along z, in the box of a map.

    It is one within the cylinder and falls to zero outside over the soft edge, as a cosine, at its ends as at
    its side. The map gives box and pixel size alone; what is in it plays no part.
    """

    diameter: float = Param(..., "diameter, without the edge", unit="Å", section=SHAPE, gt=0)
    length: float | None = Param(
        None, "length along z; default: the whole box", unit="Å", section=SHAPE, gt=0
    )
    centre: tuple[float, float, float] = Param(
        (0.0, 0.0, 0.0), "centre (x, y, z), from the box's centre", unit="Å", section=SHAPE
    )

    def build(self, ctx: Context, volume: MapFile) -> Mask:
        """Make the cylinder."""
        from halfmap.steps.mask.build import cylinder

        return cylinder(self, volume)


class MaskModel(MakeMask, name="mask model", label=MASK_CREATE):
    """Make a soft mask around an atomic model, or some of its chains, in the box of a map.

    Everything within 3 Å of an atom is inside, small holes are filled, and the mask is extended and gets a
    cosine edge. Where the model's coordinates begin is told by the map: of the header's origin, the box's
    centre, and the model's centre of mass in the box's centre, the one with the highest density at the atoms.
    """

    model: Path = Input("atomic model (mmCIF, PDB)")
    chains: tuple[str, ...] = Param((), "chains to take; default: all", unit="none", section=SHAPE)
    assembly: str = Param(
        "none", "biological assembly to build; none takes the atoms as they stand", unit="none", section=SHAPE
    )
    origin: Literal["auto", "header", "box", "mass"] = Param(
        "auto",
        "where the model's coordinates begin: as the map's header says, at the box's centre, "
        "or so that its centre of mass is there",
        unit="none",
        section=SHAPE,
    )
    extend: float | None = Param(
        None, "how far it reaches beyond the surface; default: 3 pixels", unit="Å", section=EDGE, ge=0
    )

    @property
    def box_alone(self) -> bool:
        """Unless it tells where the model lies."""
        return self.origin != "auto"

    def build(self, ctx: Context, volume: MapFile) -> Mask:
        """Place the model and mark what is near its atoms."""
        from halfmap.steps.mask.build import around_model

        return around_model(self, ctx.resolve(self.model), volume)
