"""How large a particle's box must be, and how finely its image is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import scipy.fft

from halfmap.errors import ParameterError
from halfmap.units import electron_wavelength

ROOM = 1.5
"""Side of the box over the particle's diameter, at the least."""

FINEST_A = 3.0
"""Detail that the box keeps if nothing else is said: side chains."""

BACKGROUND = 1.25
"""Diameter of the circle outside of which is background over the particle's: picks are off by some pixels."""

RELION_BACKGROUND = 0.75
"""Diameter of that circle over the box where the particle's is not known, as RELION proposes it."""

_LOOSE = 1.15
"""By how much a box may be larger than needed for pixels as wanted and sizes good to transform."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """Size of the boxes and of their pixels.

    Attributes
    ----------
    size, scaled : int
        Side in pixels of the micrograph, and of the image that is stored.
    pixel_size : float
        Of the image that is stored, Å.
    reason : str
        In words, why it is so large.
    """

    size: int
    scaled: int
    pixel_size: float
    reason: str


def needed_extent(diameter: float, *, defocus: float, voltage_kV: float, resolution: float) -> float:
    """Side in Å of a box that holds a particle and what defocus moves out of it.

    Parameters
    ----------
    diameter : float
        Longest of the particle, Å.
    defocus : float
        Å.
    voltage_kV : float
        Acceleration voltage.
    resolution : float
        Finest detail that is to be kept, Å: a wave of it is moved by wavelength times defocus over its
        length, to both sides.

    Examples
    --------
    >>> round(needed_extent(150, defocus=15_000, voltage_kV=300, resolution=3))
    347
    """
    moved = electron_wavelength(voltage_kV) * abs(defocus) / resolution
    return max(ROOM * diameter, diameter + 2 * moved)


def choose_box(
    *,
    micrograph_pixel_size: float,
    diameter: float | None,
    box: int | None,
    scaled_box: int | None,
    pixel_size: float | None,
    resolution: float | None,
    defocus: float,
    voltage_kV: float,
) -> Box:
    """Choose what was left open.

    Parameters
    ----------
    micrograph_pixel_size : float
        Å.
    diameter : float or None
        Of the particle, Å.
    box, scaled_box : int or None
        Sides wanted, px.
    pixel_size : float or None
        Wanted of the images, Å.
    resolution : float or None
        Finest detail wanted, Å.
    defocus, voltage_kV : float
        Typical ones.

    Raises
    ------
    ParameterError
        If the sizes cannot be, or nothing says how large the box must be.
    """
    p = micrograph_pixel_size
    if pixel_size is not None and scaled_box is not None:
        raise ParameterError(
            "--pixel-size and --scaled-box say the same thing twice", hint="give one of them"
        )
    if pixel_size is not None and pixel_size < 0.999 * p:
        message = f"--pixel-size {pixel_size:g} is finer than the micrographs' {p:g} Å"
        raise ParameterError(message, hint="leave it out to keep their pixels")
    for option, side in (("--box", box), ("--scaled-box", scaled_box)):
        if side is not None and side % 2:
            raise ParameterError(f"{option} {side} is odd", hint=f"take {side + 1}")
    if box is None:
        if diameter is None:
            message = "neither the coordinates nor --diameter tell how large the particle is"
            raise ParameterError(message, hint="give --diameter, the particle's longest in Å, or --box")
        finest = max(resolution or FINEST_A, 2 * (pixel_size or p))
        extent = needed_extent(diameter, defocus=defocus, voltage_kV=voltage_kV, resolution=finest)
        reason = f"{ROOM:g} times the diameter of {diameter:.0f} Å"
        if extent > ROOM * diameter:
            reason = (
                f"the diameter of {diameter:.0f} Å and twice {(extent - diameter) / 2:.0f} Å, by which a "
            )
            reason += f"defocus of {defocus * 1e-4:.2f} µm moves waves of {finest:.3g} Å"
        box, scaled = _fitting(extent, p, scaled_box, pixel_size)
    else:
        reason = "given"
        scaled = scaled_box or box
        if pixel_size is not None:
            scaled = 2 * max(1, round(box * p / pixel_size / 2))
    if scaled > box:
        message = f"--scaled-box {scaled} is larger than the box of {box} px"
        raise ParameterError(message, hint="images are only made coarser")
    return Box(size=box, scaled=scaled, pixel_size=p * box / scaled, reason=reason)


def _fitting(extent: float, p: float, scaled_box: int | None, pixel_size: float | None) -> tuple[int, int]:
    """Even sides of box and image that hold an extent in Å, pixels nearest to those wanted."""
    least = extent / p
    if scaled_box is not None:
        size = _even_sizes(least, least)[0]
        return size, scaled_box
    if pixel_size is None:
        size = _even_sizes(least, least)[0]
        return size, size
    images = _even_sizes(extent / pixel_size, _LOOSE * extent / pixel_size)
    # Up: the box must hold the extent.
    pairs = [(2 * math.ceil(side * pixel_size / p / 2 - 1e-9), side) for side in images]
    # A box that is quick to transform as well, if its pixels come near to those wanted.
    quick = [pair for pair in pairs if _even_sizes(pair[0], pair[0])[0] == pair[0]]
    return min(quick or pairs)


def _even_sizes(least: float, most: float) -> Sequence[int]:
    """Even sides from `least` on whose transforms are quick (factors 2, 3 and 5): up to `most`, or one."""
    halves = [int(scipy.fft.next_fast_len(math.ceil(least / 2), real=True) or 1)]
    while 2 * (following := int(scipy.fft.next_fast_len(halves[-1] + 1, real=True) or 1)) <= most:
        halves.append(following)
    return [2 * half for half in halves]


def background_diameter(box: Box, diameter: float | None, wanted: float | None) -> float:
    """Diameter in Å of the circle around the particle.

    Raises
    ------
    ParameterError
        If it leaves no background in the box.
    """
    side = box.scaled * box.pixel_size
    if wanted is None:
        if diameter is None:
            return RELION_BACKGROUND * side
        # With a box only as large as the particle, the corners are left.
        return min(BACKGROUND * diameter, side)
    if wanted > side:
        message = f"--background-diameter {wanted:g} leaves no background in a box of {side:.0f} Å"
        raise ParameterError(message, hint=f"give less than {side:.0f}")
    return wanted


def typical(values: pl.Series) -> float:
    """Median of the values that are numbers; NaN if none is."""
    numbers = values.cast(pl.Float64).to_numpy()
    numbers = numbers[np.isfinite(numbers)]
    return float(np.median(numbers)) if len(numbers) else math.nan
