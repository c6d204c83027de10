"""An electron counting camera: where electrons are recorded, how many, and what its pixels do wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numba
import numpy as np
import torch
from numpy.random import SeedSequence
from numpy.typing import NDArray
from torch import Tensor

from halfmap.ops import grids

_COLUMNS_PER_AMPLIFIER = 64
_SMALL = 12.0
"""Below this mean counts are drawn by inversion, above by transformed rejection."""


@dataclass(frozen=True, eq=False)
class Camera:
    """A camera with its flaws.

    Parameters
    ----------
    gain : array (h, w), float32
        Reference to multiply recorded frames with; 0 at dead pixels.
    dead : array (n, 2), int
        Dead pixels (x, y).
    hot : array (n, 3), float
        Hot pixels (x, y) and the counts that they add to a frame on average.
    efficiency : float
        Part of the electrons that is counted, the DQE at zero frequency.
    mislocation_px : float
        Standard deviation along an axis, in pixels of the image, of where an electron is recorded.
    """

    gain: NDArray[np.float32]
    dead: NDArray
    hot: NDArray
    efficiency: float
    mislocation_px: float

    def mtf(self, frequency_px: Tensor | NDArray) -> NDArray:
        """Modulation transfer at frequencies in 1/px: the pixel's area and the error of the position."""
        frequency_px = np.asarray(frequency_px)
        blur = np.exp(-2 * (math.pi * self.mislocation_px * frequency_px) ** 2)
        return np.sinc(frequency_px) * blur

    def transfer(self, shape: tuple[int, int]) -> Tensor:
        """The same on the half-spectrum of an image, (h, w // 2 + 1); the pixel is a square."""
        k = grids.frequencies(shape)
        blur = torch.exp(-2 * (math.pi * self.mislocation_px) ** 2 * k.square().sum(-1))
        return torch.sinc(k[..., 0]) * torch.sinc(k[..., 1]) * blur

    def expose(self, electrons: NDArray[np.float32], seed: SeedSequence, *, bits: int) -> NDArray:
        """Record a frame.

        Each electron is counted with the pixel's sensitivity 1 / gain, so counts are Poisson distributed
        and uncorrelated: the noise is white, the signal has passed the MTF, and the DQE is efficiency * MTF².

        Parameters
        ----------
        electrons : array (h, w), float32
            Expected electrons per pixel, the MTF applied.
        seed : SeedSequence
            Decides every count, on any number of threads.
        bits : {8, 16}
            Of the integers returned; larger counts saturate.
        """
        counts = np.empty(electrons.shape, np.uint8 if bits == 8 else np.uint16)
        key = seed.generate_state(2, np.uint64)
        _count(electrons, self.gain, np.float32(self.efficiency), key[0], counts)
        limit = np.iinfo(counts.dtype).max
        x, y = self.hot[:, 0].astype(int), self.hot[:, 1].astype(int)
        extra = np.random.default_rng(key[1]).poisson(self.hot[:, 2])
        counts[y, x] = np.minimum(counts[y, x] + extra, limit).astype(counts.dtype)
        return counts


def build_camera(
    seed: SeedSequence,
    *,
    shape: tuple[int, int],
    upsampling: int,
    efficiency: float,
    mislocation_px: float,
    gain_spread: float,
    n_dead: int,
    n_hot: int,
) -> Camera:
    """Draw a camera.

    Parameters
    ----------
    seed : SeedSequence
        Decides its flaws.
    shape : tuple of 2 int
        Physical pixels (h, w).
    upsampling : {1, 2}
        2 records every physical pixel as 2 x 2.
    efficiency : float
        As in `Camera`.
    mislocation_px : float
        In physical pixels.
    gain_spread : float
        Standard deviation of the pixels' gains; amplifier stripes and a slope across the sensor come on top.
    n_dead, n_hot : int
        Physical pixels.
    """
    rng = np.random.default_rng(seed)
    h, w = shape
    gain = 1 + gain_spread * rng.standard_normal(shape)
    stripes = rng.normal(0, gain_spread / 2, -(-w // _COLUMNS_PER_AMPLIFIER))
    gain += np.repeat(stripes, _COLUMNS_PER_AMPLIFIER)[:w]
    slope = rng.normal(0, gain_spread, 2)
    gain += slope[0] * np.linspace(-1, 1, w) + slope[1] * np.linspace(-1, 1, h)[:, None]
    gain = np.clip(gain, 0.3, 3.0)
    places = rng.choice(h * w, n_dead + n_hot, replace=False)
    y, x = np.divmod(places, w)
    rates = rng.lognormal(2.5, 0.7, n_hot)
    gain /= gain.mean()
    gain[y[:n_dead], x[:n_dead]] = 0
    dead, hot = np.column_stack([x, y])[:n_dead], np.column_stack([x, y])[n_dead:]
    if upsampling > 1:
        gain = np.kron(gain, np.ones((upsampling, upsampling)))
        inside = np.array([(i, j) for j in range(upsampling) for i in range(upsampling)])
        dead, hot = ((places[:, None] * upsampling + inside).reshape(-1, 2) for places in (dead, hot))
        rates = np.repeat(rates, upsampling**2) / upsampling**2
    return Camera(
        gain=gain.astype(np.float32),
        dead=dead,
        hot=np.column_stack([hot, rates]),
        efficiency=efficiency,
        mislocation_px=mislocation_px * upsampling,
    )


@numba.njit(inline="always")
def _next(state: NDArray) -> float:
    """Uniform number in [0, 1) from SplitMix64 (Steele et al. 2014, DOI 10.1145/2660193.2660195)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.float64((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


@numba.njit
def _poisson(mean: float, state: NDArray) -> int:
    """One Poisson number: inversion, or Hörmann's PTRS (1993, DOI 10.1016/0167-6687(93)90997-4)."""
    if mean < _SMALL:
        left = _next(state)
        probability = math.exp(-mean)
        count = 0
        while left >= probability and count < 200:
            left -= probability
            count += 1
            probability *= mean / count
        return count
    log_mean, root = math.log(mean), math.sqrt(mean)
    b = 0.931 + 2.53 * root
    a = -0.059 + 0.02483 * b
    inverse_alpha = 1.1239 + 1.1328 / (b - 3.4)
    v_r = 0.9277 - 3.6224 / (b - 2)
    while True:
        u, v = _next(state) - 0.5, _next(state)
        us = 0.5 - abs(u)
        count = math.floor((2 * a / us + b) * u + mean + 0.43) if us > 0 else -1
        if us >= 0.07 and v <= v_r:
            return count
        if count < 0 or (us < 0.013 and v > us):
            continue
        density = count * log_mean - mean - math.lgamma(count + 1.0)
        if math.log(v) + math.log(inverse_alpha) - math.log(a / (us * us) + b) <= density:
            return count


@numba.njit(parallel=True, cache=True)
def _count(
    electrons: NDArray, gain: NDArray, efficiency: np.float32, key: np.uint64, counts: NDArray
) -> None:
    """Counts of every pixel; each row has a stream of its own, so that threads change nothing."""
    limit = 255 if counts.itemsize == 1 else 65535
    for y in numba.prange(electrons.shape[0]):
        state = np.empty(1, np.uint64)
        state[0] = key + np.uint64(y) * np.uint64(0xD1342543DE82EF95)
        _next(state)
        state[0] ^= state[0] >> np.uint64(29)
        for x in range(electrons.shape[1]):
            if gain[y, x] <= 0 or electrons[y, x] <= 0:
                counts[y, x] = 0
                continue
            mean = np.float64(electrons[y, x] * efficiency / gain[y, x])
            counts[y, x] = min(_poisson(mean, state), limit)
