"""Reference-free picking: the size and the radial profile of the particle are found in the data."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from halfmap.errors import ItemsFailedError
from halfmap.io.micrographs import Image, coarser
from halfmap.log import log
from halfmap.steps.pick.calibrate import calibrate
from halfmap.steps.pick.candidates import Candidates, find_peaks
from halfmap.steps.pick.extent import extent
from halfmap.steps.pick.filter import (
    LEAST_COVERAGE,
    Whitened,
    excess,
    match,
    surrogate,
    whiten,
)
from halfmap.steps.pick.obstacles import mask_obstacles
from halfmap.steps.pick.profiles import Profile, Shell, fit_shell, mean_profile

PIXELS = 12
"""Pixels that a particle is wide in a micrograph that is searched."""

DISTANCE = 0.8
"""Least distance of two particles over the diameter: they may overlap a little in projection."""

_STEP = 1.12
_SHAPES = ((0.0, 0.03), (0.0, 0.1), (0.65, 0.03))
"""Hollowness and blur of the particles that the data are surveyed for."""

_PENALTY = 8.0
"""Log-likelihood that a particle must add for being one: the logarithm of the places where it may be."""

_CAP = 4.0
"""Times the median gain of particles that one of them counts for: what gains more is no particle."""

_LEAST = 3.5
"""Score, in standard deviations of noise, of candidates that belong to the mean where no more is known."""

_ROUNDS = 6
_PARTS = 1.8
"""Extent of the signal over a diameter, of whole particles 1.1 to 1.5, above which parts were found."""

_SPREAD = 1.5
"""Extent of the signal around parts over the particle's diameter, at the most."""

_SETTLED = 0.03

_SILENT_s = 10.0
"""Time after which the survey says how far it is."""


@dataclass(frozen=True, eq=False)
class Blob:
    """A radially symmetric particle; a method of picking.

    Attributes
    ----------
    diameter : float
        In Å.
    frequency, transform : array (n,)
        Transform of its projection at frequencies in 1/Å, 0 beyond.
    count : int
        Particles that it is the mean of.
    hollow : float
        Inner over outer diameter of the shell that is most like it.
    usual : float
        How dark it is, of `usual_darkness`; 0 where that is not known.
    """

    diameter: float
    frequency: NDArray
    transform: NDArray
    count: int = 0
    hollow: float = 0.0
    usual: float = 0.0

    @property
    def pixel_size(self) -> float:
        """That micrographs are searched at, in Å."""
        return self.diameter / PIXELS

    def specimen(self, image: Image) -> Image:
        """The micrograph with carbon and contaminants masked."""
        return mask_obstacles(image, self.diameter, usual=self.usual)

    def search(self, image: Image, rng: np.random.Generator) -> tuple[Candidates, NDArray[np.float32]]:
        """Candidates of a micrograph in its coarse pixels, and scores of noise alone."""
        white = whiten(image, 2 * self.diameter)
        template = np.interp(white.frequency, self.frequency, self.transform, right=0).astype(np.float32)
        found = peaks(white, template, self.diameter, DISTANCE)
        noise = peaks(surrogate(white, rng), template, self.diameter, DISTANCE)
        return found, noise.score


def peaks(white: Whitened, template: NDArray, diameter: float, distance: float) -> Candidates:
    """Candidates of a template."""
    score, coverage = match(white, template.astype(np.float32))
    mask = white.image.mask & (coverage > LEAST_COVERAGE)
    return find_peaks(score, pixel_size=white.image.pixel_size, distance=distance * diameter, mask=mask)


def learn(
    images: Sequence[Image],
    *,
    smallest: float,
    largest: float,
    diameter: float | None = None,
    sign: int = 1,
) -> Blob:
    """Find the particle of some micrographs: its size, unless that is known, and its radial profile.

    Parameters
    ----------
    images : sequence of Image
        Flat micrographs, of pixels no larger than a tenth of the smallest diameter.
    smallest, largest : float
        Diameters in Å between which the particle's is looked for.
    diameter : float, optional
        The particle's in Å, if it is known.
    sign : int
        1 of dark particles, -1 of bright ones.

    Raises
    ------
    ItemsFailedError
        If nothing stands out of the noise.

    Notes
    -----
    Balls and shells of all sizes are tried, and that one starts which explains most of the micrographs: the
    sum of log-likelihood ratios over its candidates. The mean of what it picks is the next filter, and so on.
    Where there is signal far beyond what was picked, these are parts of larger particles (`extent`), and the
    balls and shells that may be whole ones start anew.
    """
    survey = _survey(images, smallest, largest, diameter, sign)
    found = _settle(images, survey, diameter, sign)
    if found is None:
        raise _nothing_found(diameter)
    while diameter is None and found.of_parts:
        least, most = found.extent / _SPREAD, found.extent * _STEP
        larger = {shell: gain for shell, gain in survey.items() if least <= shell.diameter <= most}
        whole = _settle(images, larger, None, sign, least=least)
        if whole is None:
            break
        told = "what is %.0f Å wide is parts of particles, which go on to %.0f Å"
        log.info(told, found.diameter, found.extent)
        found = whole
    if found.of_parts:
        message = "around picks of %.0f Å there is more to %.0f Å: if these are parts, give --diameter"
        log.warning(message, found.diameter, found.extent)
    log.info("particles are %.0f Å wide, by %d of them", found.diameter, found.profile.count)
    k = found.profile.frequency
    return Blob(found.diameter, k, found.profile.transform(k), found.profile.count, found.shell.hollow)


@dataclass(frozen=True, eq=False)
class _Found:
    """What was settled on: diameter in Å, mean profile, the shell like it, extent of the signal in Å."""

    diameter: float
    profile: Profile
    shell: Shell
    extent: float

    @property
    def of_parts(self) -> bool:
        """Whether these are parts of larger particles."""
        return self.extent > _PARTS * self.diameter


def _settle(
    images: Sequence[Image],
    survey: dict[Shell, float],
    diameter: float | None,
    sign: int,
    *,
    least: float = 0.0,
) -> _Found | None:
    """From the shell that explains most to the mean of what the mean of its picks picks, and so on."""
    if not survey:
        return None
    template: Shell | Profile = max(survey, key=lambda shell: survey[shell])
    size, found = template.diameter, None
    for _ in range(_ROUNDS):
        searched = _search(images, template, size)
        profile = _profile(searched, size, whole=diameter is None)
        if profile is None:
            break
        shell = fit_shell(replace(profile, value=sign * profile.value), size)
        before, size, template = size, diameter or max(shell.diameter, least), profile
        found = _Found(size, profile, shell, extent(searched, before))
        if abs(size / before - 1) < _SETTLED:
            break
    return found


def _nothing_found(diameter: float | None) -> ItemsFailedError:
    known = "" if diameter is None else f" of {diameter:.0f} Å"
    message = f"no particles{known} stand out of the noise of the micrographs that were surveyed"
    other = "give --diameter" if diameter is None else "try without --diameter"
    return ItemsFailedError(
        message, hint=f"look at the micrographs: if there are particles, {other}, or pick with templates"
    )


def _survey(
    images: Sequence[Image], smallest: float, largest: float, diameter: float | None, sign: int
) -> dict[Shell, float]:
    """Log-likelihood that balls and shells add in all micrographs, of those that add any."""
    if diameter is not None:
        sizes = [diameter]
    else:
        count = max(1, round(math.log(largest / smallest) / math.log(_STEP))) + 1
        sizes = np.geomspace(smallest, largest, count).tolist()
    totals: dict[Shell, float] = {}
    told = time.monotonic()
    for number, size in enumerate(sizes):
        if time.monotonic() - told > _SILENT_s:
            told = time.monotonic()
            log.info("survey of %d micrographs: %d of %d diameters tried", len(images), number, len(sizes))
        shells = [Shell(size, hollow, blur, sign) for hollow, blur in _SHAPES]
        gains: dict[Shell, list[NDArray]] = {shell: [] for shell in shells}
        for image in images:
            coarse = mask_obstacles(coarser(image, size / 10), size, largest=min(largest, _LARGEST))
            white = whiten(coarse, 2 * size)
            for shell in shells:
                template = shell.transform(white.frequency)
                score = peaks(white, template, size, DISTANCE).score * excess(white, template)
                gain = np.where(score > 0, score**2 / 2 - _PENALTY, 0)
                gains[shell].append(gain[gain > 0])
        for shell, parts in gains.items():
            gain = np.concatenate(parts)
            total = float(np.minimum(gain, _CAP * np.median(gain)).sum()) if len(gain) else 0.0
            if total > 0:
                totals[shell] = total
    return totals


_LARGEST = 400.0
"""Diameter in Å of the largest thing that may be a particle while sizes are surveyed."""


def _search(
    images: Sequence[Image], template: Shell | Profile, size: float
) -> list[tuple[Whitened, Candidates]]:
    """Whitened micrographs and what a template finds in them."""
    searched = []
    for number, image in enumerate(images):
        white = whiten(mask_obstacles(coarser(image, size / PIXELS), size), 2 * size)
        values = template.transform(white.frequency)
        noise = peaks(surrogate(white, np.random.default_rng(number)), values, size, DISTANCE)
        searched.append((white, peaks(white, values, size, DISTANCE), noise.score))
    scores, null = (
        np.concatenate(parts) for parts in ([f.score for _, f, _ in searched], [n for *_, n in searched])
    )
    least = min(calibrate(scores, null).threshold, _LEAST)
    return [(white, found.select(found.score > least)) for white, found, _ in searched]


def _profile(searched: Sequence[tuple[Whitened, Candidates]], size: float, *, whole: bool) -> Profile | None:
    """Mean profile of what was found."""
    pixel_size = max(white.image.pixel_size for white, _ in searched)
    frequency = np.arange(0, 0.5 / pixel_size, 1 / (3 * size))
    total: Profile | None = None
    width = (3.0 if whole else 2.5) * size
    for white, found in searched:
        part = mean_profile(white, found, width=width, frequency=frequency)
        if part is not None:
            total = part if total is None else total + part
    return total
