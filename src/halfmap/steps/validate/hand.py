"""Whether a map has the right hand, by its alpha helices."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from halfmap.ops.filters import low_pass, radial_average, radial_profile_to_grid
from halfmap.ops.fourier import irfft3, resample, rfft3
from halfmap.pictures import INK, MARGIN, QUIET, add_panel, add_text, dress, new_figure, save
from halfmap.search.helix_hand import HelixHand, fit_helices
from halfmap.steps.validate.finding import Finding, Given, Light

NAME = "Hand"

_COARSEST_A, _FINEST_A = 5.2, 4.0
"""Resolutions at which the turns of a helix, 5.4 Å high, still show, and beyond which side chains would."""

_HELIX = 0.65
"""Correlation from which on a place holds a helix: of simulated maps of beta sheets and nucleic acids hardly
any place reaches it, of helices most do."""

_FEWEST = 8
"""Places, copies by the symmetry counted once: of fewer even the sign test of one hand alone is not rare."""

_SURE, _RARE = 3.0, 0.01
"""Standard errors by which one hand must fit better, and the sign test's probability."""

_EVEN_A = 10.0
"""Resolution beyond which the map's power is made even, as that of atoms is."""

_VOXELS = 3.0
"""That a period of the finest detail is sampled by."""

_METHOD = (
    "Ideal alpha helices of 11 residues, right-handed and left-handed, were fitted to the places that look "
    "most like a helix of either hand, by their correlation within a cylinder. Those of proteins are "
    "right-handed. Places share half of it at most, and copies by the symmetry count once."
)


def check_hand(given: Given, folder: Path) -> Finding:
    """Find whether the helices of a map are right-handed, and draw how well either hand fits.

    Parameters
    ----------
    given : Given
        With half maps, mask, resolution and the map's symmetry.
    folder : path
        Where the picture goes.

    Returns
    -------
    Finding
        Red if left-handed helices fit better, amber if neither do; grey if the resolution is not enough or
        there are no helices.
    """
    if given.resolution > _COARSEST_A:
        sentence = (
            f"The hand was not looked at: at {given.resolution:.1f} Å the turns of a helix do not show; they "
            f"do from {_COARSEST_A:g} Å on."
        )
        return Finding(NAME, "grey", sentence, method=_METHOD)
    detail = max(given.resolution, _FINEST_A)
    ready = prepare(given, detail)
    every = fit_helices(
        ready.volume,
        pixel_size=ready.pixel_size,
        resolution=detail,
        mask=ready.mask,
        group=given.step.symmetry,
        origin_px=ready.origin_px,
    )
    found = every.above(_HELIX)
    values: dict[str, Any] = {
        "places": len(every.right),
        "helix_places": len(found.right),
        "detail_A": detail,
    }
    picture = folder / "hand.png"
    if len(every.right):
        draw(picture, every)
    pictures = (picture.name,) if len(every.right) else ()
    if len(found.right) < _FEWEST:
        sentence = (
            f"The hand was not told: {len(found.right)} places of the map look like an alpha helix, copies "
            f"counted once, and {_FEWEST} are needed; nucleic acids and beta sheets do not show it this way."
        )
        return Finding(NAME, "grey", sentence, values=values, pictures=pictures, method=_METHOD)
    values |= {
        "prefer_right": int((found.right > found.left).sum()),
        "difference": found.difference,
        "difference_sigmas": found.sigmas,
        "sign_probability": found.sign_probability,
        "median_correlation_right": float(found.right.median()),
        "median_correlation_left": float(found.left.median()),
    }
    light, sentence = _judge(found, values)
    return Finding(NAME, light, sentence, values=values, pictures=pictures, method=_METHOD)


class Prepared(NamedTuple):
    """Map to be searched, its mask, voxels in Å, and where (x, y, z) the middle of the half maps is in it."""

    volume: Tensor
    mask: Tensor
    pixel_size: float
    origin_px: Tensor


def prepare(given: Given, detail: float) -> Prepared:
    """Mean of the half maps with even power to some detail, cut to the particle in voxels of a third."""
    shape, mask, pixel_size = tuple(given.mask.shape), given.mask, given.halves.pixel_size
    spectrum = rfft3(given.halves.mean * mask)
    power = radial_average(spectrum.abs().square(), shape=shape)
    first = min(round(given.side / _EVEN_A), len(power) - 1)
    # What is coarser has the shape of the particle, which helices in it have too.
    power[:first] = power[first]
    known = given.fsc.corrected.clamp(0, 1)
    known = 2 * known / (1 + known)
    weight = known[: len(power)] / power.clamp_min(1e-30).sqrt()
    passed = low_pass(shape, pixel_size=pixel_size, resolution=detail)
    even = irfft3(spectrum * radial_profile_to_grid(weight, shape=shape) * passed, shape=shape) * mask

    part, side = _around(mask)
    new = 2 * round(side * pixel_size * _VOXELS / detail / 2)
    cut, inside = (resample(each[part].contiguous(), new_shape=(new,) * 3) for each in (even, mask))
    origin = torch.tensor([len(mask) // 2 - each.start for each in reversed(part)]) * new / side
    return Prepared(cut, inside, side * pixel_size / new, origin)


def _around(mask: Tensor) -> tuple[tuple[slice, ...], int]:
    """Even cube that holds a mask, as far as the box goes, and its side."""
    places = (mask > 0).nonzero()
    low, high = places.amin(0), places.amax(0) + 1
    side = min(len(mask), int((high - low).max()) + 2)
    side -= side % 2 if side == len(mask) else -(side % 2)
    starts = ((low + high - side) // 2).clamp(0, len(mask) - side).tolist()
    return tuple(slice(start, start + side) for start in starts), side


def _judge(found: HelixHand, values: dict[str, Any]) -> tuple[Light, str]:
    right, n = values["prefer_right"], values["helix_places"]
    sure = abs(found.sigmas) > _SURE and found.sign_probability < _RARE
    by = f"mean difference of correlations {found.difference:+.3f}, {abs(found.sigmas):.0f} standard errors"
    if sure and found.difference > 0:
        return "green", f"The hand is right: at {right} of {n} places right-handed helices fit better ({by})."
    if sure:
        return "red", (
            f"The map is a mirror image: at {n - right} of {n} places left-handed helices fit better ({by}); "
            "mirror it, and the poses, or refine again from a mirrored reference."
        )
    return "amber", (
        f"The hand cannot be told: at {right} of {n} places right-handed helices fit better ({by}); look at "
        "helices by eye, or fit a known structure."
    )


def draw(path: Path, every: HelixHand) -> None:
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
