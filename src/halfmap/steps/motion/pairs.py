"""Tracks of the whole field: every frame against every other one, and what agrees with most of the pairs."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from halfmap.ops.fourier import irfft2, rfft2

RESOLUTION_A = 30.0
"""Finer detail is not needed to find a track, only to refine it."""

_COARSEST_A = 600.0
"""Coarser than this are illumination and thickness, which stay where they are."""

_PAIRS_AT_A_TIME = 64
_EDGE = 0.05
"""Part of a field that fades out at each side: its edges are no features."""

_ROUNDS = 30
_NEAR_A = 1.0
"""Disagreement of a pair that is always normal."""

_NOTICEABLE = 4.0
"""Height of a peak over the spread of its correlation map below which it is likely to be noise."""


def pair_tracks(
    frames: NDArray[np.float32], *, pixel_size: float, largest: float, device: str = "cpu"
) -> tuple[NDArray, float]:
    """Displacements of the whole field, frame by frame.

    Whitened, low-passed frames are correlated pair by pair. The displacements are those that agree best with
    the peaks, least squares with Cauchy weights, so that no false peak can break a track.

    Parameters
    ----------
    frames : array (n, h, w)
        Frames with pixels of some 12 Å, any mean.
    pixel_size : float
        Å.
    largest : float
        Largest displacement between two frames that is looked for, Å.
    device : str
        Where transforms run.

    Returns
    -------
    displacements : array (n, 2)
        (x, y) in Å, the first zero.
    height : float
        Median height of the pairs' peaks over the spread of their maps; noise gives 3 to 4.
    """
    n = len(frames)
    spectra, shape = _whitened(frames, pixel_size, device)
    first, second = np.triu_indices(n, 1)
    reach = [min(int(np.ceil(largest / pixel_size)), side // 2 - 2) for side in shape]
    near = [
        torch.arange(-side, side + 1, device=device) % size for side, size in zip(reach, shape, strict=True)
    ]
    peaks, heights = [], []
    for start in range(0, len(first), _PAIRS_AT_A_TIME):
        some = slice(start, start + _PAIRS_AT_A_TIME)
        maps = irfft2(spectra[first[some]].conj() * spectra[second[some]], shape=shape)
        maps = maps[:, near[0][:, None], near[1]]
        place, height = _peaks(maps.cpu().numpy())
        peaks.append((place - np.array(reach)[::-1]) * pixel_size)
        heights.append(height)
    height = np.concatenate(heights)
    return _agreeing_tracks(n, first, second, np.concatenate(peaks), height), float(np.median(height))


def _whitened(
    frames: NDArray[np.float32], pixel_size: float, device: str
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Spectra divided by their mean amplitude, ring by ring, and low-passed."""
    h, w = frames.shape[1:]
    images = torch.from_numpy(frames).to(device)
    images = images - images.mean(dim=(-2, -1), keepdim=True)
    spectra = rfft2(images * torch.from_numpy(soft_edge(h, _EDGE)[:, None] * soft_edge(w, _EDGE)).to(images))
    ky, kx = np.fft.fftfreq(h, pixel_size)[:, None], np.fft.rfftfreq(w, pixel_size)
    k = np.hypot(ky, kx)
    ring = np.rint(k * pixel_size * max(h, w)).astype(np.int64)
    power = spectra.abs().square().mean(dim=0).double().cpu().numpy()
    mean = np.bincount(ring.ravel(), power.ravel()) / np.bincount(ring.ravel())
    weight = np.exp(-np.square(k * RESOLUTION_A)) * (k > 1 / _COARSEST_A) / np.sqrt(mean[ring] + 1e-30)
    return spectra * torch.from_numpy(weight.astype(np.float32)).to(device), (h, w)


def soft_edge(n: int, part: float) -> NDArray[np.float32]:
    """1, falling off to 0 as a cosine over this part of `n` pixels at both ends."""
    ramp = (np.minimum(np.arange(n), n - 1 - np.arange(n)) + 0.5) / max(1.0, part * n)
    return np.sin(np.pi / 2 * np.minimum(ramp, 1)).astype(np.float32) ** 2


def _peaks(maps: NDArray) -> tuple[NDArray, NDArray]:
    """Places (x, y) of the highest points of maps, between pixels by a parabola, and their heights."""
    m, _, w = maps.shape
    top = maps[:, 1:-1, 1:-1].reshape(m, -1).argmax(axis=1)
    y, x = top // (w - 2) + 1, top % (w - 2) + 1
    every = np.arange(m)
    height = maps[every, y, x]
    parts = []
    for dy, dx in ((0, 1), (1, 0)):
        after, before = maps[every, y + dy, x + dx], maps[every, y - dy, x - dx]
        curvature = 2 * height - after - before
        parts.append((after - before) / 2 / np.maximum(curvature, 1e-12 + 1e-6 * np.abs(height)))
    place = np.stack([x + np.clip(parts[0], -1, 1), y + np.clip(parts[1], -1, 1)], axis=-1)
    return place, height / np.maximum(maps.std(axis=(1, 2)), 1e-30)


def _agreeing_tracks(
    n: int, first: NDArray, second: NDArray, difference: NDArray, height: NDArray
) -> NDArray:
    """Places (n, 2) whose differences agree with most of those of the pairs."""
    trust = np.clip(height - _NOTICEABLE, 0.05, None)
    weight, places = trust, np.zeros((n, 2))
    for _ in range(_ROUNDS):
        laplacian, right = np.zeros((n, n)), np.zeros((n, 2))
        np.add.at(laplacian, (first, first), weight)
        np.add.at(laplacian, (second, second), weight)
        np.add.at(laplacian, (first, second), -weight)
        np.add.at(laplacian, (second, first), -weight)
        np.add.at(right, second, weight[:, None] * difference)
        np.add.at(right, first, -weight[:, None] * difference)
        places[1:] = np.linalg.solve(laplacian[1:, 1:], right[1:])
        off = np.linalg.norm(difference - (places[second] - places[first]), axis=1)
        weight = trust / (1 + np.square(off / max(1.5 * float(np.median(off)), _NEAR_A)))
    return places
