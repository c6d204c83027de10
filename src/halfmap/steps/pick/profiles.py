"""Radial models of particles: balls and shells with blurred edges, and the mean of what was picked."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from halfmap.steps.pick.candidates import Candidates
from halfmap.steps.pick.filter import Whitened

HOLLOW = (0.0, 0.4, 0.55, 0.65, 0.75)
BLUR = (0.02, 0.05, 0.08, 0.11, 0.15)
"""What is tried when a particle's mean profile is known."""

_REACH = 0.4


@dataclass(frozen=True)
class Shell:
    """A ball, or a shell, with a blurred edge.

    Attributes
    ----------
    diameter : float
        Outer one in Å.
    hollow : float
        Inner diameter over the outer one, 0 of a ball.
    blur : float
        Standard deviation of the blur over the diameter: how far a particle is from round.
    sign : int
        1 of particles denser than the ice, dark in the micrograph; -1 of bright ones.
    """

    diameter: float
    hollow: float = 0.0
    blur: float = 0.0
    sign: int = 1

    def transform(self, frequency: NDArray) -> NDArray:
        """Transform of its projection at frequencies in 1/Å, 1 at zero for a ball."""
        turn = np.pi * self.diameter * np.asarray(frequency, np.float64)
        value = _ball(turn)
        if self.hollow > 0:
            value = value - self.hollow**3 * _ball(turn * self.hollow)
        return self.sign * value * np.exp(-2 * (turn * self.blur) ** 2)


@dataclass(frozen=True, eq=False)
class Profile:
    """Transform of a radially symmetric particle at some frequencies.

    Attributes
    ----------
    frequency : array (n,)
        In 1/Å.
    value : array (n,)
        Transform of the projection.
    variance : array (n,)
        Of the value.
    count : int
        Particles that it is the mean of.
    """

    frequency: NDArray
    value: NDArray
    variance: NDArray
    count: int

    def transform(self, frequency: NDArray) -> NDArray:
        """Value at frequencies in 1/Å, shrunk where noise is as strong; 0 beyond the last one."""
        square = self.value**2
        sure = self.value * np.maximum(1 - self.variance / np.maximum(square, 1e-30), 0)
        return np.interp(frequency, self.frequency, sure, right=0)

    def __add__(self, other: Profile) -> Profile:
        """Mean of two, each weighted by its certainty."""
        a, b = 1 / self.variance, 1 / other.variance
        value = (a * self.value + b * other.value) / (a + b)
        return Profile(self.frequency, value, 1 / (a + b), self.count + other.count)


def _ball(x: NDArray) -> NDArray:
    """Transform of a ball at 2 pi k R = x, over its volume."""
    safe = np.maximum(x, 1e-2)
    return np.where(x < 1e-2, 1 - x * x / 10, 3 * (np.sin(safe) - safe * np.cos(safe)) / safe**3)


def mean_profile(
    white: Whitened, candidates: Candidates, *, width: float, frequency: NDArray
) -> Profile | None:
    """Radial transform of the mean particle, the CTF undone.

    Parameters
    ----------
    white : Whitened
        Micrograph.
    candidates : Candidates
        Particles, coordinates in pixels of `white.image`.
    width : float
        Of the boxes that are cut out, in Å.
    frequency : array (n,)
        Where the profile is wanted, evenly spaced from 0 in 1/Å.

    Returns
    -------
    Profile or None
        None if no particle's box lies inside the micrograph.

    Notes
    -----
    The least-squares estimate over all Fourier coefficients of a ring, weighted with the noise's spectrum.
    """
    image = white.image
    size = 2 * round(width / image.pixel_size / 2)
    y, x = np.rint(candidates.y).astype(int), np.rint(candidates.x).astype(int)
    h, w = image.values.shape
    half = size // 2
    whole = (y >= half) & (x >= half) & (y + half <= h) & (x + half <= w)
    if not whole.any():
        return None
    ky, kx = scipy.fft.fftfreq(size), scipy.fft.rfftfreq(size)
    total = np.zeros((size, size // 2 + 1), np.complex128)
    for i in np.flatnonzero(whole):
        box = image.values[y[i] - half : y[i] + half, x[i] - half : x[i] + half]
        dy, dx = float(candidates.y[i]) - y[i], float(candidates.x[i]) - x[i]
        back = np.exp(2j * np.pi * dy * ky)[:, None] * np.exp(2j * np.pi * dx * kx)
        total += np.asarray(scipy.fft.rfft2(scipy.fft.ifftshift(box))) * back
    count = int(whole.sum())
    radius = np.hypot(ky[:, None], kx) / image.pixel_size
    ring = np.rint(radius / frequency[1]).astype(int)
    used = (ring < len(frequency)) & (radius > 0)
    noise = np.interp(radius, *white.profile)
    ctf = image.ctf((size, size))
    n = len(frequency)
    top = np.bincount(ring[used], weights=(total.real * ctf / noise)[used], minlength=n)
    bottom = np.bincount(ring[used], weights=(ctf**2 / noise)[used], minlength=n)
    bottom = np.maximum(bottom, 1e-9 * bottom.max())
    return Profile(frequency, top / (count * bottom), size * size / (2 * count * bottom), count)


def fit_shell(profile: Profile, diameter: float) -> Shell:
    """Ball or shell that is most likely to have a mean profile, of about a diameter in Å."""
    k = profile.frequency
    used = k > 1 / (4 * diameter)
    weight, value = 1 / profile.variance[used], profile.value[used]
    best, shell = -np.inf, Shell(diameter)
    for size in diameter * np.exp(np.arange(-_REACH, _REACH + 0.01, 0.02)):
        for hollow, blur in product(HOLLOW, BLUR):
            trial = Shell(float(size), hollow, blur)
            model = trial.transform(k[used])
            overlap = float(np.sum(model * value * weight))
            gain = overlap * abs(overlap) / float(np.sum(model * model * weight))
            if gain > best:
                best, shell = gain, trial
    return shell
