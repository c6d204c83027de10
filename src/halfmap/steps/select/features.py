"""What tells good classes and particles from bad ones, in numbers that do not depend on sizes and units."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from halfmap.steps.select.classification import Classification
from halfmap.steps.select.images import NAMES
from halfmap.steps.select.shape import describe

Features = dict[str, NDArray[np.float64]]

_BANDS = {"coarse": (1.5, 4.0), "middle": (4.0, 8.0), "fine": (8.0, 16.0)}
"""Waves across the diameter between which signal-to-noise ratios are averaged."""

_MANY, _LEAST_SPREAD_um, _FAR = 100, 0.05, 3.7
"""Particles and standard deviation of their defoci that it takes to see what changes with the defocus, and
how many median deviations away a particle does not count."""

_FEW = 8
"""Members of a class below which it has no median of its own."""


def class_features(found: Classification) -> Features:
    """Features of every class.

    Returns
    -------
    dict of array (k,)
        Of the average: `halfmap.steps.select.shape.describe`. ``resolution``: how many elements of resolution
        the diameter holds, as a logarithm, and ``resolution_beside`` how many more than the job's median has.
        ``signal_coarse``, … : logarithm of the signal-to-noise ratio in bands. ``occupancy``: share of the
        particles times the number of classes. Of the members: evidence, its spread, probabilities, entropy,
        errors of the pose and distances from the centre, each beside the same of all particles. NaN where the
        tables do not say.
    """
    members = found.members
    result = describe(found.averages, found.diameter / found.pixel_size, members)
    result["resolution"] = np.log(found.diameter / found.resolutions)
    result["resolution_beside"] = result["resolution"] - _middle(result["resolution"], members)
    result |= _signal(found)
    occupied = max(1, int((members > 0).sum()))
    with np.errstate(divide="ignore"):
        result["occupancy"] = np.log(np.where(members > 0, members / members.sum() * occupied, np.nan))
    measures = _measures(found)
    for name, (values, scale) in measures.items():
        spread = scale or _deviation(values)
        result[name] = (_by_class(found, values, np.nanmean) - np.nanmedian(values)) / spread
    if "evidence" in measures:
        values = measures["evidence"][0]
        widths = _by_class(found, values, np.nanstd)
        result["evidence_spread"] = np.log(np.maximum(widths, 1e-9) / max(float(np.nanstd(values)), 1e-9))
    return result


def particle_features(found: Classification, images: NDArray[np.float64] | None = None) -> Features:
    """Features of every particle beside the others of its class, and beside all.

    Parameters
    ----------
    found : Classification
    images : array (n, 15), optional
        Of `halfmap.steps.select.images.measure`.

    Returns
    -------
    dict of array (n,)
        ``x`` is how far a measure lies from its median among all particles, ``x_own`` from that of the
        particle's class, and ``x_off`` the size of the latter. What changes with the defocus is taken off.
    """
    result: Features = {}
    measures = _measures(found)
    if images is not None:
        measures |= {name: (values, None) for name, values in zip(NAMES, images.T, strict=True)}
    defocus = _defocus(found)
    for name, (values, scale) in measures.items():
        if not np.isfinite(values).any():
            continue
        if scale is None and defocus is not None:
            values = values - _trend(defocus, values)
        spread = scale or _deviation(values)
        middle = float(np.nanmedian(values))
        own = np.full(len(found.averages), middle)
        medians = _by_class(found, values, np.nanmedian)
        known = (found.members >= _FEW) & np.isfinite(medians)
        own[known] = medians[known]
        result[name] = (values - middle) / spread
        result[f"{name}_own"] = (values - own[found.number]) / spread
        result[f"{name}_off"] = np.abs(result[f"{name}_own"])
    return result


def _measures(found: Classification) -> dict[str, tuple[NDArray[np.float64], float | None]]:
    """Measures of the particles, and the scale of each where it has one of its own."""
    result: dict[str, tuple[NDArray[np.float64], float | None]] = {}
    entropy, evidence = found.column("hmPosteriorEntropy"), found.column("rlnLogLikeliContribution")
    # RELION's is not over noise alone, and says how noisy the image is.
    if entropy is not None and evidence is not None:
        result["evidence"] = (np.arcsinh(evidence / 10), None)
    if entropy is not None:
        result["entropy"] = (entropy, None)
    for name, label in (("greatest", "rlnMaxValueProbDistribution"), ("own_class", "hmClassProbability")):
        values = found.column(label)
        if values is not None:
            result[name] = (values, 0.25)
    for name, label in (("turn_error", "hmAnglePsiError"), ("shift_error", "hmOriginError")):
        values = found.column(label)
        if values is not None:
            result[name] = (np.log(np.maximum(values, 1e-3)), None)
    x, y = found.column("rlnOriginXAngst"), found.column("rlnOriginYAngst")
    if x is not None and y is not None:
        result["distance"] = (np.hypot(x, y) / found.diameter, 0.05)
    return result


def _defocus(found: Classification) -> NDArray[np.float64] | None:
    """Mean defocus of each particle in µm, if it is known and differs."""
    u, v = found.column("rlnDefocusU"), found.column("rlnDefocusV")
    if u is None or v is None or len(u) < _MANY:
        return None
    defocus = (u + v) / 2e4
    return defocus if np.isfinite(defocus).all() and defocus.std() > _LEAST_SPREAD_um else None


def _trend(defocus: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cubic (n,) in the defocus through most values, without those far from it."""
    place = (defocus - defocus.mean()) / defocus.std()
    powers = np.vander(np.clip(place, -3, 3), 4)
    inside = np.isfinite(values)
    curve = np.full(len(values), float(np.nanmedian(values)))
    for _ in range(4):
        rest = values - curve
        inside = np.isfinite(rest) & (np.abs(rest) <= _FAR * np.nanmedian(np.abs(rest)))
        factors = np.linalg.lstsq(powers[inside], values[inside], rcond=None)[0]
        curve = np.asarray(powers @ factors, np.float64)
    return curve


def _signal(found: Classification) -> Features:
    """Logarithm of the mean signal-to-noise ratio of the averages in some bands."""
    if found.ratio is None:
        return {}
    side = found.averages.shape[-1] * found.pixel_size
    waves = np.arange(found.ratio.shape[1]) * found.diameter / side
    result = {}
    for name, (low, high) in _BANDS.items():
        inside = (waves >= low) & (waves < high)
        if inside.any():
            values = np.log10(0.03 + np.maximum(found.ratio[:, inside].mean(1), 0))
            values = np.where(found.members > 0, values, np.nan)
            result[f"signal_{name}"] = values
            result[f"signal_{name}_beside"] = values - _middle(values, found.members)
    return result


def _by_class(found: Classification, values: NDArray[np.float64], statistic) -> NDArray[np.float64]:
    """Statistic of a measure (n,) for each class (k,); NaN for those without members."""
    order = np.argsort(found.number, kind="stable")
    bounds = np.searchsorted(found.number[order], np.arange(len(found.averages) + 1))
    result = np.full(len(found.averages), np.nan)
    for i, (first, last) in enumerate(itertools.pairwise(bounds)):
        own = values[order[first:last]]
        if np.isfinite(own).any():
            result[i] = statistic(own)
    return result


def _middle(values: NDArray[np.float64], weights: NDArray[np.int64]) -> float:
    """Median of the classes' values, each as often as it has particles."""
    known = np.isfinite(values) & (weights > 0)
    if not known.any():
        return math.nan
    order = np.argsort(values[known])
    total = np.cumsum(weights[known][order])
    return float(values[known][order][np.searchsorted(total, total[-1] / 2)])


def _deviation(values: NDArray[np.float64]) -> float:
    """Robust standard deviation."""
    low, high = np.nanpercentile(values, (16, 84))
    return max(float(high - low) / 2, 1e-6)
