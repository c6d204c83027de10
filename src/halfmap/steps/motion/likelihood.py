"""How probable shifts are, given the spectra of patches of frames: aligned sums, gradients, information.

Frame f of patch p shows X_p(k) q_f(k) exp(-2 pi i k.d_pf), a specimen X that was displaced by d_pf and faded
by q_f, and noise of power N(k). With a specimen of power S_p(k) of which nothing else is known, the logarithm
of the likelihood of all displacements is, but for a constant,

    sum_p sum_k A_p(k) |Z_p(k)|²,   Z_p = sum_f q_f Y_pf exp(+2 pi i k.d_pf),   A_p = S_p / (N (N + S_p Q)),

Q = sum_f q_f². It compares every frame with every other one; the usual cross-correlation with the sum of the
other frames is its gradient, and the usual B-factor is replaced by the measured spectra S and N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from halfmap.ops.dose import critical_dose
from halfmap.ops.fourier import rfft2
from halfmap.ops.threads import in_threads
from halfmap.steps.motion import _likelihood_kernels as kernels

_SMOOTHING = np.array([0.25, 0.5, 0.25])
_WEAKEST = 0.02
"""Least power of specimen or noise in a patch over the average that is believed."""

_DIRECTIONS = 16
_OCTAVES = 0.5
"""Octaves over which a patch's power is compared with the average: carbon is of another colour."""


@dataclass(frozen=True, eq=False)
class Band:
    """The frequencies of patches that are compared, in rings.

    Attributes
    ----------
    shape : tuple of 2 int
        (h, w) of a patch.
    rows, columns : array of int
        Indices of the rows and columns of a half-spectrum that are kept.
    kx, ky : array
        Their frequencies in 1/Å.
    ring : array (rows, columns) int32
        Ring of each coefficient; `n_rings` outside of the band.
    weight : array (columns,)
        1/2 for columns that hold both halves of the spectrum.
    centre : array (n_rings,)
        Mean frequency of the rings, 1/Å.
    members : array (n_rings,)
        Coefficients of a ring, of each pair that says the same one.
    independent : float
        Part of them that are independent of each other; less than 1 where patches have soft edges.
    """

    shape: tuple[int, int]
    rows: NDArray
    columns: NDArray
    kx: NDArray
    ky: NDArray
    ring: NDArray
    weight: NDArray
    centre: NDArray
    members: NDArray
    independent: float = 1.0

    @property
    def n_rings(self) -> int:
        """Number of rings."""
        return len(self.centre)


def make_band(
    shape: tuple[int, int], *, pixel_size: float, low: float, high: float, independent: float = 1.0
) -> Band:
    """Rings from frequency `low` to `high` (1/Å), each as wide as a Fourier pixel of the longer side."""
    h, w = shape
    ky, kx = np.fft.fftfreq(h, pixel_size), np.fft.rfftfreq(w, pixel_size)
    rows, columns = np.flatnonzero(np.abs(ky) <= high), np.flatnonzero(kx <= high)
    ky, kx = ky[rows], kx[columns]
    k = np.hypot(ky[:, None], kx)
    width = 1 / (pixel_size * max(shape))
    number = np.rint(k / width).astype(np.int64)
    inside = (k >= max(low, width / 2)) & (k <= high)
    used = np.unique(number[inside])
    ring = np.where(inside, np.searchsorted(used, number), len(used)).astype(np.int32)
    weight = np.ones(len(kx))
    weight[kx == 0] = 0.5
    if w % 2 == 0:
        weight[columns == w // 2] = 0.5
    shares = np.broadcast_to(weight, k.shape)
    members = np.bincount(ring.ravel(), shares.ravel(), len(used) + 1)[:-1]
    centre = np.bincount(ring.ravel(), (shares * k).ravel(), len(used) + 1)[:-1] / members
    return Band(shape, rows, columns, kx, ky, ring, weight, centre, members, independent)


class Patches(Protocol):
    """Patches of a field, each through all frames (n, h, w); an array (p, n, h, w) is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> NDArray[np.float32]: ...


class PatchSpectra(Protocol):
    """Spectra of patches (p) of frames (n), turned back by the displacements found so far."""

    def power(self) -> NDArray:
        """Mean over the frames of |Y|², summed over the members of each ring: (p, rings)."""
        ...

    def turn(self, step: NDArray, damage: NDArray) -> NDArray:
        """Turn frames back by further displacements (p, n, 2) in Å; ring sums of |Z|²: (p, rings)."""
        ...

    def gradients(self, weights: NDArray, damage: NDArray) -> NDArray:
        """Derivatives (p, n, 2) of the log-likelihood by the displacements, for weights A (p, rings)."""
        ...


def patch_spectra(patches: Patches, band: Band, device: str) -> PatchSpectra:
    """Transform patches and keep the band; on a CPU by compiled code, elsewhere by torch."""
    if device == "cpu":
        return _CompiledSpectra(patches, band)
    return _TorchSpectra(patches, band, device)


class _CompiledSpectra:
    def __init__(self, patches: Patches, band: Band) -> None:
        self.band = band
        n = len(patches[0])
        # Rows of low frequency are the first and the last: slices copy ten times as fast as indices.
        low = int((band.ky >= 0).sum())
        self.spectra = np.empty((len(patches), n, len(band.rows), len(band.columns)), np.complex64)

        def transform(number: int) -> None:
            whole = rfft2(torch.from_numpy(patches[number])).numpy()
            self.spectra[number, :, :low] = whole[:, :low, : len(band.columns)]
            self.spectra[number, :, low:] = whole[:, low - len(band.rows) :, : len(band.columns)]

        in_threads(transform, range(len(patches)))
        self.sums = np.zeros((len(patches), *band.ring.shape), np.complex64)
        self.kx, self.ky = (k.astype(np.float32) for k in (band.kx, band.ky))

    def _each_patch(self, function, *arrays: NDArray) -> NDArray:
        return np.stack(in_threads(function, *arrays))

    def power(self) -> NDArray:
        band = self.band
        return self._each_patch(
            lambda spectra: kernels.ring_power(spectra, band.ring, band.weight, band.n_rings), self.spectra
        )

    def turn(self, step: NDArray, damage: NDArray) -> NDArray:
        band, fading = self.band, _with_outside(damage)
        return self._each_patch(
            lambda spectra, shift, total: kernels.turn_and_sum(
                spectra, shift, self.kx, self.ky, fading, band.ring, band.weight, total
            ),
            self.spectra,
            step,
            self.sums,
        )

    def gradients(self, weights: NDArray, damage: NDArray) -> NDArray:
        band, fading = self.band, _with_outside(damage)
        return self._each_patch(
            lambda spectra, total, weight: kernels.gradients(
                spectra, total, self.kx, self.ky, fading, weight, band.ring, band.weight
            ),
            self.spectra,
            self.sums,
            _with_outside(weights),
        )


class _TorchSpectra:
    def __init__(self, patches: Patches, band: Band, device: str) -> None:
        self.band, self.device = band, device
        parts = []
        for number in range(len(patches)):
            patch = patches[number]
            whole = rfft2(torch.from_numpy(patch).to(device))
            parts.append(whole[:, self._put(band.rows)][..., : len(band.columns)])
        self.spectra = torch.stack(parts)
        self.ring = self._put(band.ring.ravel().astype(np.int64))
        self.half = self._put(np.broadcast_to(band.weight, band.ring.shape).astype(np.float32).copy())
        self.kx, self.ky = (self._put(k.astype(np.float32)) for k in (band.kx, band.ky))

    def _put(self, array: NDArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _spread(self, by_ring: NDArray) -> torch.Tensor:
        """Values of rings (..., rings) at every coefficient (..., ky, kx)."""
        spread = self._put(_with_outside(by_ring))[..., self.ring]
        return spread.reshape(*by_ring.shape[:-1], *self.band.ring.shape)

    def _gather(self, values: torch.Tensor) -> NDArray:
        flat = (values * self.half).flatten(1)
        sums = flat.new_zeros(len(flat), self.band.n_rings + 1)
        return sums.index_add_(1, self.ring, flat)[:, :-1].double().cpu().numpy()

    def power(self) -> NDArray:
        return self._gather(self.spectra.abs().square().mean(dim=1))

    def turn(self, step: NDArray, damage: NDArray) -> NDArray:
        shift = self._put(2 * np.pi * step)
        along_x = torch.polar(torch.ones((), device=self.device).double(), shift[..., :1] * self.kx)
        along_y = torch.polar(torch.ones((), device=self.device).double(), shift[..., 1:] * self.ky)
        self.spectra *= along_y.to(torch.complex64)[..., :, None]
        self.spectra *= along_x.to(torch.complex64)[..., None, :]
        self.sums = (self.spectra * self._spread(damage)).sum(dim=1)
        return self._gather(self.sums.abs().square())

    def gradients(self, weights: NDArray, damage: NDArray) -> NDArray:
        slope = (self.sums.conj()[:, None] * self.spectra).imag * self._spread(damage)
        slope = slope * (self._spread(weights) * self.half)[:, None]
        gx, gy = (slope.sum(dim=-2) * self.kx).sum(-1), (slope.sum(dim=-1) * self.ky).sum(-1)
        return -4 * np.pi * torch.stack([gx, gy], dim=-1).double().cpu().numpy()


def _with_outside(by_ring: NDArray) -> NDArray[np.float32]:
    """Values of rings, and zero for what lies outside of the band."""
    return np.concatenate([by_ring, np.zeros((*by_ring.shape[:-1], 1))], axis=-1).astype(np.float32)


def damage_of(centre: NDArray, dose: NDArray, *, voltage_kV: float) -> NDArray:
    """Amplitude that is left of the specimen at frequencies (rings,) after doses (n,) e/Å²: (n, rings)."""
    critical = critical_dose(torch.from_numpy(centre), voltage_kV=voltage_kV).numpy()
    return np.exp(-dose[:, None] / (2 * critical))


def smear_of(centre: NDArray, track: NDArray) -> NDArray:
    """Amplitude left of frequencies (rings,) in frames that move along a track (n, 2) in Å: (n, rings).

    A frame sees the specimen go on by as much as the track does around it; the waves of a ring run in all
    directions.
    """
    length = np.linalg.norm(np.gradient(track, axis=0, edge_order=2), axis=1)
    angle = (np.arange(_DIRECTIONS) + 0.5) / _DIRECTIONS * np.pi / 2
    waves = np.sinc(length[:, None, None] * centre[:, None] * np.cos(angle))
    return np.maximum(waves.mean(axis=-1), 0)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Measured power of specimen and noise.

    Attributes
    ----------
    signal : array (p, rings)
        Power of a coefficient of the undamaged specimen in each patch.
    noise : array (p, rings)
        Power of a coefficient of the noise of a frame in each patch.
    """

    signal: NDArray
    noise: NDArray

    def weights(self, damage: NDArray) -> NDArray:
        """A (p, rings) of the likelihood."""
        return self.signal / (self.noise * (self.noise + self.signal * np.square(damage).sum(axis=0)))

    def information(self, band: Band, damage: NDArray) -> NDArray:
        """Expected information (p, n, n) of the displacements along one axis, 1/Å²: a Laplacian of frames."""
        # Of an isotropic spectrum either axis has half of k².
        share = self.weights(damage) * self.signal * (2 * np.pi * band.centre) ** 2
        share = share * band.members * band.independent
        squares = damage**2
        between = np.einsum("fb,gb,pb->pfg", squares, squares, share, optimize=True)
        laplacian = -between
        n = len(damage)
        laplacian[:, np.arange(n), np.arange(n)] += between.sum(axis=2)
        return laplacian


def measure_spectrum(aligned: NDArray, power: NDArray, band: Band, damage: NDArray) -> Spectrum:
    """Power of specimen and noise, from the aligned sums and the frames themselves.

    Parameters
    ----------
    aligned, power : array (p, rings)
        Ring sums of |Z|² and of the mean |Y|² of a frame.
    band : Band
        Rings.
    damage : array (n, rings)
        Amplitudes left of the specimen.

    Notes
    -----
    E|Z|² = Q (N + S Q) and E|Y|² = N + S mean(q²): two unknowns, two equations, ring by ring.
    """
    squares = np.square(damage)
    q2, mean = squares.sum(0), squares.mean(0)
    excess = aligned - q2 * power
    per_signal = q2 * (q2 - mean) * band.members
    # Numerator and denominator apart: where motion blurs a ring away, it says nothing of the specimen.
    signal = _smooth(excess.mean(0)) / _smooth(per_signal)
    total = power.mean(0) / band.members
    signal = np.clip(signal, 0, 0.9 * total / mean)
    noise = total - signal * mean
    # How much a ring says about the power of its patch.
    weight = signal / (noise * (noise + signal * q2))
    octave = np.log2(band.centre / band.centre[0])
    near = np.exp(-0.5 * np.square((octave[:, None] - octave) / (_OCTAVES / 2)))
    expected = near @ (weight * signal * per_signal)
    found = np.einsum("ab,pb->pa", near, excess * weight)
    scale = found / expected if expected.min() > 0 else np.ones_like(found)
    scale = np.maximum(scale, _WEAKEST)
    # Thick ice, or half a shadow: noise of the same colour, but not of the same power everywhere.
    louder = (power - band.members * scale * signal * mean).sum(axis=1) / (band.members * noise).sum()
    return Spectrum(scale * signal, np.maximum(louder, _WEAKEST)[:, None] * noise)


def _smooth(by_ring: NDArray) -> NDArray:
    return np.convolve(np.pad(by_ring, 1, mode="edge"), _SMOOTHING, mode="valid")
