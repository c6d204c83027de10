"""A map to turn and to zoom in a page: its voxels as 8-bit numbers, and a picture for where that fails."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from halfmap.errors import HalfmapError
from halfmap.log import log
from halfmap.markup import Content, Markup, element, encoded

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

LARGEST_px = 96
"""Side of the box that is shown."""

_ROOM = 1.1
"""Side of that box over the particle's diameter."""

_WITHIN = 0.5
"""Share of the particle's low-resolution envelope that its surface encloses at first."""

_FILLED = 0.02
"""Share of the box for that where no particle stands out."""

_TILT_deg, _TURN_deg = 20.0, 30.0
"""By which the map is turned at first, about x and then about y, to look solid."""

_FINE_px, _PICTURE_px = 200, 480
"""Side of the box that the picture is made of, and of the picture."""

_BYTE = 255


@dataclass(frozen=True, eq=False)
class Shown:
    """A map as it is shown.

    Parameters
    ----------
    voxels : array (n, n, n) of uint8
        In the order z, y, x.
    low, high : float
        Densities that 0 and 255 stand for.
    level : float
        Density of the surface that is shown at first.
    pixel_size : float
        Å.
    """

    voxels: NDArray[np.uint8]
    low: float
    high: float
    level: float
    pixel_size: float

    @property
    def level_byte(self) -> float:
        """The level on the scale of the voxels."""
        return (self.level - self.low) / (self.high - self.low) * _BYTE


def view(path: Path, caption: Content) -> Markup | None:
    """The map in a file, to be turned; None if the file cannot be shown."""
    try:
        shown = prepare(path)
    except (HalfmapError, OSError) as error:
        log.warning("left out of the report: %s", error)
        return None
    width = len(shown.voxels) * shown.pixel_size
    return element(
        "figure",
        element(
            "div",
            element("img", src=encoded(still(shown)), alt=f"Surface of the map {path.name}"),
            element(
                "canvas",
                tabindex=0,
                hidden=True,
                role="img",
                aria_label="Surface of the map; drag or use the arrow keys to turn it",
            ),
            class_="stage3d",
        ),
        element(
            "div",
            _slider("Contour", "level"),
            _slider("Cut", "cut"),
            element("button", "Reset", type="button"),
            class_="controls",
            hidden=True,
        ),
        element(
            "p",
            "Drag to turn, wheel or pinch to zoom; or arrow keys, + and −.",
            class_="quiet how",
            hidden=True,
        ),
        element(
            "p",
            "This is a picture: to turn the map, the browser needs WebGL 2 and scripts.",
            class_="quiet still",
        ),
        element(
            "figcaption", caption, f" The box is {width:.0f} Å wide, its voxels {shown.pixel_size:.3g} Å."
        ),
        element("script", Markup(base64.b64encode(shown.voxels.tobytes()).decode()), type="text/plain"),
        class_="viewer",
        data_size=len(shown.voxels),
        data_low=f"{shown.low:.6g}",
        data_high=f"{shown.high:.6g}",
        data_level=f"{shown.level:.6g}",
        data_tilt=_TILT_deg,
        data_turn=_TURN_deg,
    )


def _slider(title: str, name: str) -> Markup:
    slider = element("input", type="range", min=0, max=1000, value=0, class_=name, aria_label=title)
    return element("label", element("span", title), slider, element("output"))


@cache
def resource(name: str) -> str:
    """The viewer's script or style."""
    return files("halfmap.workflow.report").joinpath(name).read_text(encoding="utf-8")


def prepare(path: Path) -> Shown:
    """Read a map, cut it to the particle, and make it small.

    Raises
    ------
    FileFormatError, ShapeError
        If it is no cubic map with densities and a voxel size.

    Notes
    -----
    The box is as wide as the particle's envelope and not more than `LARGEST_px`; detail finer than two of its
    voxels is left out in Fourier space. The surface shown at first encloses half of the envelope's volume,
    which is what is left of a particle at low resolution once its solvent can be seen.
    """
    import torch

    from halfmap.io.volumes import read_volume
    from halfmap.ops.regrid import regrid

    volume = read_volume(path, cubic=True)
    array, n, pixel = torch.from_numpy(volume.array), len(volume.array), volume.pixel_size
    extent, share = _particle(array, pixel)
    side = min(n * pixel, _ROOM * extent)
    size = min(LARGEST_px, max(16, round(side / pixel)))
    small = regrid(array, pixel_size=pixel, box=size, new_pixel_size=max(side / size, pixel)).numpy()
    high = float(small.max())
    low = max(float(small.min()), -0.25 * high)
    step = max(side / size, pixel)
    wanted = share * n**3 * (pixel / step) ** 3 / size**3
    level = float(np.quantile(small, min(max(1 - wanted, 0.0), 1.0)))
    level = min(max(level, 0.05 * high), 0.95 * high)
    bytes_ = np.rint((small.clip(low, high) - low) / (high - low) * _BYTE).astype(np.uint8)
    return Shown(bytes_, low, high, level, step)


def _particle(array: Tensor, pixel: float) -> tuple[float, float]:
    """Diameter of the particle about the box's middle, Å, and the share of the box within its surface."""
    import torch

    from halfmap.errors import ParameterError
    from halfmap.ops.envelope import find_region

    n = len(array)
    try:
        region = find_region(array, pixel_size=pixel).region
    except ParameterError:  # nothing stands out
        return n * pixel, _FILLED
    places = torch.nonzero(region).double() - n // 2
    return 2 * float(places.abs().max() + 1) * pixel, _WITHIN * float(region.double().mean())


def still(shown: Shown) -> Image:
    """A picture of the surface as the viewer shows it first.

    Notes
    -----
    Looked at along z from above, y upwards. Of each line of sight the first voxel above the level is found,
    its depth interpolated, and shaded by the slope of the density there.
    """
    from PIL import Image
    from scipy.ndimage import affine_transform, map_coordinates

    n = len(shown.voxels)
    tilt, turn = np.deg2rad((_TILT_deg, _TURN_deg))
    about_x = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    about_y = np.array([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]])
    back = (
        n / _FINE_px * (about_x @ about_y).T[::-1, ::-1]
    )  # from the eye's axes to the map's, in the order z, y, x
    middle = np.full(3, (n - 1) / 2)
    offset = middle - back @ np.full(3, (_FINE_px - 1) / 2)
    turned = affine_transform(
        shown.voxels.astype(np.float32),
        back,
        offset=offset.tolist(),
        output_shape=3 * (_FINE_px,),
        order=1,
    )[::-1]  # nearest first
    level = shown.level_byte
    above = turned > level
    hit: NDArray[np.bool_] = np.any(above, axis=0)
    first = above.argmax(axis=0)
    y, x = np.indices(hit.shape)
    before, here = turned[np.maximum(first - 1, 0), y, x], turned[first, y, x]
    depth = first - np.where(first > 0, (here - level) / np.maximum(here - before, 1e-6), 0)
    slopes = [
        map_coordinates(turned, (depth + dz, y + dy, x + dx), order=1, mode="nearest")
        - map_coordinates(turned, (depth - dz, y - dy, x - dx), order=1, mode="nearest")
        for dz, dy, dx in _FINE_px / n * 0.75 * np.eye(3)
    ]
    normal = np.stack((-slopes[2], -slopes[1], slopes[0]))
    normal /= np.maximum(np.linalg.norm(normal, axis=0), 1e-6)
    light = np.array((-0.35, 0.5, 0.8)) / np.linalg.norm((-0.35, 0.5, 0.8))
    bright = 0.35 + 0.65 * np.einsum("i,iyx->yx", light, normal).clip(0)
    bright *= 1 - 0.45 * depth / _FINE_px
    colour = bright[..., None] * np.array((120, 170, 215)) * 1.15
    ground = np.array((246, 247, 248))
    rgb = np.where(hit[..., None], colour, ground).clip(0, _BYTE).astype(np.uint8)
    picture = Image.fromarray(rgb[::-1])
    return picture.resize((_PICTURE_px, _PICTURE_px), Image.Resampling.BILINEAR)
