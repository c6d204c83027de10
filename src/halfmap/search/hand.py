"""The hand of a map: its half maps made ready, the helices of either hand in them, and what they tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from halfmap.io.half_maps import HalfMaps
from halfmap.ops.filters import low_pass, radial_average, radial_profile_to_grid
from halfmap.ops.fourier import irfft3, resample, rfft3
from halfmap.pictures import INK, MARGIN, QUIET, add_panel, add_text, dress, new_figure, save
from halfmap.search.helix_hand import HelixHand, fit_helices

_COARSEST_A, _FINEST_A = 5.2, 4.0
"""Resolutions at which the turns of a helix, 5.4 Å high, still show, and beyond which side chains would."""

_HELIX = 0.65
"""Correlation from which on a place holds a helix: of simulated maps of beta sheets and nucleic acids hardly
any place reaches it, of helices most do."""

_FEWEST = 8
"""Places, copies by the symmetry counted once: of fewer even the sign test of one hand alone is not rare."""

_RARE = 0.003, 0.01
"""Probabilities below which one hand fits better: of so great a mean difference, and the sign test's."""

_EVEN_A = 10.0
"""Resolution beyond which the map's power is made even, as that of atoms is."""

_VOXELS = 3.0
"""That a period of the finest detail is sampled by."""

Verdict = Literal["right", "left", "either", "too few", "too coarse"]
"""Which helices fit better: of the right hand, of the other, neither surely; or why there is no telling."""


@dataclass(frozen=True, eq=False)
class Hand:
    """What the helices of a map tell of its hand.

    Attributes
    ----------
    resolution : float
        Of the map, Å.
    places : HelixHand or None
        Places that look most like a helix of either hand; None of a map that is too coarse.
    """

    resolution: float
    places: HelixHand | None

    @property
    def helices(self) -> HelixHand | None:
        """Places that surely hold one."""
        return None if self.places is None else self.places.above(_HELIX)

    @property
    def verdict(self) -> Verdict:
        """Which hand the map has."""
        found = self.helices
        if found is None:
            return "too coarse"
        if len(found.right) < _FEWEST:
            return "too few"
        if found.probability >= _RARE[0] or found.sign_probability >= _RARE[1]:
            return "either"
        return "right" if found.difference > 0 else "left"

    @property
    def sentence(self) -> str:
        """The verdict, with its figures."""
        found = self.helices
        if found is None:
            return (
                f"The hand was not looked at: at {self.resolution:.1f} Å the turns of a helix do not show; "
                f"they do from {_COARSEST_A:g} Å on"
            )
        n, right = len(found.right), int((found.right > found.left).sum())
        if self.verdict == "too few":
            return (
                f"The hand was not told: {n} places of the map look like an alpha helix, copies counted "
                f"once, and {_FEWEST} are needed; nucleic acids and beta sheets do not show it this way"
            )
        errors = f"{abs(found.sigmas):.0f} standard errors"
        by = f"mean difference of correlations {found.difference:+.3f}, {errors}"
        if self.verdict == "left":
            return (
                f"The map is a mirror image: at {n - right} of {n} places left-handed helices fit better "
                f"({by})"
            )
        told = "The hand is right" if self.verdict == "right" else "The hand cannot be told"
        return f"{told}: at {right} of {n} places right-handed helices fit better ({by})"

    @property
    def values(self) -> dict[str, Any]:
        """Figures, by names with units at their ends."""
        places, found = self.places, self.helices
        if places is None or found is None:
            return {}
        values: dict[str, Any] = {
            "places": len(places.right),
            "helix_places": len(found.right),
            "detail_A": _detail(self.resolution),
        }
        if len(found.right) >= _FEWEST:
            values |= {
                "prefer_right": int((found.right > found.left).sum()),
                "difference": found.difference,
                "difference_sigmas": found.sigmas,
                "difference_probability": found.probability,
                "sign_probability": found.sign_probability,
                "median_correlation_right": float(found.right.median()),
                "median_correlation_left": float(found.left.median()),
            }
        return values


def tell_hand(halves: HalfMaps, mask: Tensor, *, fsc: Tensor, resolution: float, group: str = "C1") -> Hand:
    """Tell whether a map or its mirror image is right, by its alpha helices, which are right-handed.

    Ideal helices of 11 residues of both hands are fitted to the places of the mean of the half maps, its
    power made even, that look most like a helix of any hand. The hand is told if one fits better, on average
    and at more places, than chance allows.

    Parameters
    ----------
    halves : HalfMaps
    mask : Tensor (n, n, n)
        Of the particle.
    fsc : Tensor (n // 2 + 1,)
        Of the half maps within the mask, corrected for it.
    resolution : float
        Of the map, Å; from 5.2 Å on the turns of helices show.
    group : str
        Point group of the map; copies of a place by it count once.

    Returns
    -------
    Hand
    """
    if resolution > _COARSEST_A:
        return Hand(resolution, None)
    detail = _detail(resolution)
    ready = prepare(halves, mask, fsc=fsc, detail=detail)
    places = fit_helices(
        ready.volume,
        pixel_size=ready.pixel_size,
        resolution=detail,
        mask=ready.mask,
        group=group,
        origin_px=ready.origin_px,
    )
    return Hand(resolution, places)


class Prepared(NamedTuple):
    """Map to be searched, its mask, voxels in Å, and where (x, y, z) the middle of the half maps is in it."""

    volume: Tensor
    mask: Tensor
    pixel_size: float
    origin_px: Tensor


def prepare(halves: HalfMaps, mask: Tensor, *, fsc: Tensor, detail: float) -> Prepared:
    """Mean of the half maps with even power to some detail, cut to the particle in voxels of a third."""
    shape, pixel_size = tuple(mask.shape), halves.pixel_size
    spectrum = rfft3(halves.mean * mask)
    power = radial_average(spectrum.abs().square(), shape=shape)
    first = min(round(halves.box * pixel_size / _EVEN_A), len(power) - 1)
    # What is coarser has the shape of the particle, which helices in it have too.
    power[:first] = power[first]
    known = fsc.nan_to_num(0.0).clamp(0, 1)
    known = 2 * known / (1 + known)
    weight = known[: len(power)] / power.clamp_min(1e-30).sqrt()
    passed = low_pass(shape, pixel_size=pixel_size, resolution=detail)
    even = irfft3(spectrum * radial_profile_to_grid(weight, shape=shape) * passed, shape=shape) * mask

    part, side = _around(mask)
    new = 2 * round(side * pixel_size * _VOXELS / detail / 2)
    cut, inside = (resample(each[part].contiguous(), new_shape=(new,) * 3) for each in (even, mask))
    origin = torch.tensor([len(mask) // 2 - each.start for each in reversed(part)]) * new / side
    return Prepared(cut, inside, side * pixel_size / new, origin)


def _detail(resolution: float) -> float:
    return max(resolution, _FINEST_A)


def _around(mask: Tensor) -> tuple[tuple[slice, ...], int]:
    """Even cube that holds a mask, as far as the box goes, and its side."""
    places = (mask > 0).nonzero()
    low, high = places.amin(0), places.amax(0) + 1
    side = min(len(mask), int((high - low).max()) + 2)
    side -= side % 2 if side == len(mask) else -(side % 2)
    starts = ((low + high - side) // 2).clamp(0, len(mask) - side).tolist()
    return tuple(slice(start, start + side) for start in starts), side


def draw_hand(path: Path, every: HelixHand) -> None:
    """Draw the correlation of right-handed and of left-handed helices at each place."""
    width, height, side = 680, 420, 290
    figure = new_figure(width, height)
    add_text(figure, MARGIN, height - 30, "helices of either hand", size=13, weight="bold")
    detail = f"{len(every.right)} places that look most like one; dashed: from {_HELIX:g} on they count"
    add_text(figure, MARGIN, height - 50, detail, size=10, color=QUIET)
    right, left = every.right.numpy(), every.left.numpy()
    counts = every.best.numpy() > _HELIX
    axes = add_panel(figure, 62, 62, side, side)
    low, high = min(right.min(), left.min()) - 0.03, max(right.max(), left.max()) + 0.03
    axes.plot((low, high), (low, high), color=QUIET, lw=0.8)
    axes.plot((low, _HELIX, _HELIX), (_HELIX, _HELIX, low), color=INK, lw=0.8, ls="--")
    for chosen, colour in ((~counts, QUIET), (counts, "C0")):
        axes.scatter(right[chosen], left[chosen], s=10, color=colour, alpha=0.8, linewidths=0)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_ylabel("left-handed helix, correlation", fontsize=9, color=INK)
    dress(axes, "right-handed helix, correlation")

    axes = add_panel(figure, 62 + side + 74, 62, width - side - 62 - 74 - MARGIN, side)
    apart = right - left
    reach = max(0.05, float(abs(apart).max()))
    edges = np.linspace(-reach, reach, 31)
    axes.hist((apart[counts], apart[~counts]), edges.tolist(), stacked=True, color=("C0", "#cccccc"))
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_ylabel("places", fontsize=9, color=INK)
    dress(axes, "right-handed less left-handed")
    save(figure, path)
