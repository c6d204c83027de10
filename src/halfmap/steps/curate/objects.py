"""What is too large or too dark for a particle, and where there is nothing: regions of the level."""

from __future__ import annotations

import numpy as np
import scipy.ndimage as ndi
from numpy.typing import NDArray

from halfmap.steps.curate.features import Features, blur

DIAMETER_A = 300.0
"""Largest particle where none is stated: a ribosome."""

_DARKEST_PARTICLE = 1 / 3000
"""Darkness per Å of a solid particle's diameter: protein and nucleic acid at usual defocus, blurred."""

_MUCH_DARKER = 2.0
_DARKER_THAN_OTHERS = 2.2
_LEAST_SHARE = 0.5
"""Of `_MUCH_DARKER`: what single dark spots must reach where particles are few and say little."""

_FAINTEST = 0.03
"""Darkness of a large object: some 100 Å of ice."""

_WIDER = 1.4
"""Inner diameter of a large object, over the particle's: neither filaments nor clusters have it."""

_RARE = 3.5
"""How much darker than most dark spots something is that is no particle, if it is no smaller either."""

_SIGNIFICANT = 6.0
_SHARP = 0.25
_THICK = 0.35
"""Darkness of ice that nothing is seen in: 1400 Å more than in the brighter part of the field, or no beam."""

_BRIGHT = 0.06
_EDGE_A = 100.0


def background(level: NDArray, ignored: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
    """Level of the field by a cubic surface that objects, dark or bright, do not pull.

    Parameters
    ----------
    level : array (h, w)
        Blurred level.
    ignored : array (h, w) of bool, optional
        Places known to be no specimen.

    Notes
    -----
    Tukey's biweight; its scale is that of the residuals' median.
    """
    h, w = level.shape
    y, x = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
    orders = [(i, j) for i in range(4) for j in range(4 - i)]
    step = max(1, min(h, w) // 60)
    terms = np.stack([x[::step, ::step] ** i * y[::step, ::step] ** j for i, j in orders], axis=-1)
    terms = terms.reshape(-1, len(orders))
    values = level[::step, ::step].ravel().astype(np.float64)
    used = np.ones(len(values)) if ignored is None else 1.0 - ignored[::step, ::step].ravel()
    if used.sum() < 5 * len(orders):
        return np.full_like(level, np.median(level))
    # Three terms first: a cubic through a contaminant at a corner would be drawn in before it is known.
    factors = np.zeros(len(orders))
    residual = values - np.median(values[used > 0])
    for n, rounds in ((3, 6), (6, 6), (10, 8)):
        chosen = [k for k, (i, j) in enumerate(orders) if i + j <= {3: 1, 6: 2, 10: 3}[n]]
        for _ in range(rounds):
            scale = 1.4826 * np.median(np.abs(residual[used > 0])) + 1e-12
            weight = used * np.clip(1 - (residual / (4.7 * scale)) ** 2, 0, None) ** 2
            design = terms[:, chosen] * weight[:, None]
            normal = design.T @ terms[:, chosen] + 1e-6 * weight.sum() * np.eye(len(chosen))
            factors[:] = 0
            factors[chosen] = np.linalg.solve(normal, design.T @ values)
            residual = values - terms @ factors
    surface = sum(f * x**i * y**j for f, (i, j) in zip(factors, orders, strict=True))
    return np.asarray(surface, np.float32)


def find_objects(
    features: Features, *, diameter: float = DIAMETER_A, ignored: NDArray[np.bool_] | None = None
) -> dict[str, NDArray[np.bool_]]:
    """Find contaminants, thick ice and empty places.

    Parameters
    ----------
    features : Features
        Of the micrograph.
    diameter : float
        Of the largest particles, Å.
    ignored : array (h, w) of bool, optional
        What is masked already, for instance carbon.

    Returns
    -------
    dict of str to array (h, w) of bool
        ``contaminant``: darker than twice what a particle of that diameter can be, or wider than 1.4 of it
        with a sharp outline; ``thick ice``: too dark for anything; ``empty``: wide, brighter than ice, and
        without texture.
    """
    q = features.pixel_size
    shape = features.level.shape
    outside = np.zeros(shape, bool) if ignored is None else ignored
    if outside.all():
        return {name: np.zeros(shape, bool) for name in ("contaminant", "thick ice", "empty")}
    blurred = ndi.gaussian_filter(
        _filled(features.level, outside), max(diameter / 8 / q, 0.5), mode="nearest"
    )
    dark = background(blurred, outside) - blurred
    spread = _spread(dark[~outside])
    most, darkest = _spots(dark, outside, diameter / q)
    particle = _MUCH_DARKER * _DARKEST_PARTICLE * diameter
    limit = float(np.clip(_DARKER_THAN_OTHERS * darkest, _LEAST_SHARE * particle, particle))
    limit = max(limit, _SIGNIFICANT * spread)
    contaminant = _grown(dark, limit, max(limit / 2, min(1.1 * darkest, 0.8 * limit)), outside)
    rare = max(_RARE * most, _SIGNIFICANT * spread)
    top = np.asarray(ndi.maximum_filter(dark, size=max(3, round(diameter / q)), mode="nearest"))
    # Width is measured at half the depth, for blurred outlines are wide at their feet.
    body = (dark > top / 2) & ~outside
    contaminant |= _opened(body & (dark > rare), diameter / q)
    faint = max(_FAINTEST, 3 * spread)
    contaminant |= _wide(dark, body & (dark > faint), _WIDER * diameter / q, _EDGE_A / q)
    # Against the brighter part of the field: a surface would follow ice that thickens slowly.
    bright = float(np.percentile(blurred[~outside], 75))
    thick = _opened((blurred < bright - _THICK) & ~outside, 1.5 * diameter / q)
    plain = features.texture - np.median(features.texture[~outside])
    thin = (-dark > max(_BRIGHT, 3 * spread)) & ~outside
    empty = _wide(-dark, thin, 1.5 * _WIDER * diameter / q, _EDGE_A / q)
    empty &= blur(plain, 150 / q) < -0.3
    return {"contaminant": contaminant & ~outside, "thick ice": thick, "empty": empty}


def _spots(dark: NDArray, outside: NDArray[np.bool_], width: float) -> tuple[float, float]:
    """Depth of most and of the darkest dark spots: of particles where there are many, of noise elsewhere."""
    size = max(3, round(width / 2) | 1)
    spots = (ndi.maximum_filter(dark, size=size, mode="nearest") == dark) & (dark > 0) & ~outside
    if not spots.any():
        return 0.0, 0.0
    most, darkest = np.percentile(dark[spots], (80, 95))
    return float(most), float(darkest)


def _spread(values: NDArray) -> float:
    """Robust standard deviation."""
    if values.size == 0:
        return 0.0
    low, middle, high = np.percentile(values, (15.87, 50, 84.13))
    # Particles skew the distribution to the dark side; its bright side is noise.
    return float(min(high - middle, middle - low)) if high > low else 0.0


def _filled(level: NDArray, outside: NDArray[np.bool_]) -> NDArray:
    """Level with the nearest specimen's where there is none, so that edges do not blur into it."""
    if not outside.any() or outside.all():
        return level
    nearest = ndi.distance_transform_edt(outside, return_distances=False, return_indices=True)
    return level[tuple(np.asarray(nearest))]


def _grown(dark: NDArray, limit: float, least: float, outside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Regions that exceed the limit, each as far as it exceeds the lower one."""
    low = (dark > least) & ~outside
    label = _labelled(low)
    kept = np.unique(label[(dark > limit) & low])
    return np.isin(label, kept[kept > 0])


def _labelled(region: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Number of the connected part that each pixel is in, from 1; 0 outside."""
    label = np.empty(region.shape, np.int32)
    ndi.label(region, output=label)
    return label


def _opened(region: NDArray[np.bool_], width: float) -> NDArray[np.bool_]:
    """Parts of a region that a disc of a diameter in pixels reaches; the image's edge is no border."""
    reach = round(width)
    padded = np.pad(region, reach, mode="symmetric")
    core = np.asarray(ndi.distance_transform_edt(padded)) > width / 2
    if not core.any():
        return np.zeros_like(region)
    opened = np.asarray(ndi.distance_transform_edt(~core)) <= width / 2
    return opened[reach:-reach, reach:-reach] & region


def _wide(dark: NDArray, region: NDArray[np.bool_], width: float, edge: float) -> NDArray[np.bool_]:
    """Wide parts of a region whose outline is sharp: the level falls within `edge` pixels."""
    found = np.zeros_like(region)
    label = _labelled(_opened(region, width))
    slope = ndi.gaussian_gradient_magnitude(dark, max(edge / 4, 0.7), mode="nearest")
    for number, where in enumerate(ndi.find_objects(label), start=1):
        window = tuple(slice(max(0, s.start - 2), s.stop + 2) for s in where)
        own = np.asarray(label[window] == number, bool)
        inside = own & ~np.asarray(ndi.binary_erosion(own, border_value=1), bool)
        if not inside.any():
            continue
        depth = float(np.percentile(dark[window][own], 75))
        if np.median(slope[window][inside]) * edge > _SHARP * depth:
            found[window] |= own
    return found
