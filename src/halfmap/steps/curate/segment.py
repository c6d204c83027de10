"""What of a micrograph is specimen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.ndimage as ndi
from numpy.typing import NDArray

from halfmap.steps.curate.edge import Edge, find_edge
from halfmap.steps.curate.features import Features, blur
from halfmap.steps.curate.objects import DIAMETER_A, background, find_objects

_MARGIN_A = 50.0
"""Of the mask around what is masked: Fresnel fringes, blurred outlines."""

_COARSE_A = 60.0


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What of a micrograph is no specimen.

    Parameters
    ----------
    mask : array (h, w) of bool
        True where something is in the way, or nothing is there.
    parts : dict of str to array (h, w) of bool
        The same by kind: ``carbon``, ``contaminant``, ``thick ice``, ``empty``.
    edge : Edge or None
        Of the carbon.
    coarse_contrast : float
        Robust standard deviation of the darkness of the specimen, blurred to 140 Å: particles make little,
        mottled crystalline ice much.
    """

    mask: NDArray[np.bool_]
    parts: dict[str, NDArray[np.bool_]]
    edge: Edge | None
    coarse_contrast: float


def segment(features: Features, *, diameter: float = DIAMETER_A) -> Segmentation:
    """Find what is no specimen: carbon, contaminants, ice too thick, holes in the ice.

    Parameters
    ----------
    features : Features
        Of the micrograph.
    diameter : float
        Of the largest particles, Å; what is no larger is masked only where it is far too dark.
    """
    margin = _MARGIN_A / features.pixel_size
    edge, carbon = find_edge(features)
    carbon = _grow(carbon, margin)
    objects = find_objects(features, diameter=diameter, ignored=carbon)
    grown = {"carbon": carbon} | {name: _grow(part, margin) for name, part in objects.items()}
    mask = np.logical_or.reduce(list(grown.values()))
    return Segmentation(mask, grown, edge, _coarse_contrast(features, mask))


def _coarse_contrast(features: Features, mask: NDArray[np.bool_]) -> float:
    if mask.all():
        return 0.0
    blurred = blur(features.level, _COARSE_A / features.pixel_size)
    low, high = np.percentile((background(blurred, mask) - blurred)[~mask], (15.87, 84.13))
    return float(high - low) / 2


def _grow(region: NDArray[np.bool_], margin: float) -> NDArray[np.bool_]:
    if not region.any():
        return region
    return np.asarray(ndi.distance_transform_edt(~region)) <= margin
