"""Vitreous ice as a source of noise: its structure, its contrast, its flow under the beam."""

from __future__ import annotations

import math
from collections.abc import Callable

import numba
import numpy as np
import torch
from numpy.random import Generator, SeedSequence
from numpy.typing import NDArray
from torch import Tensor

from halfmap.io.models import scattering_coefficients
from halfmap.ops import grids
from halfmap.ops.potential import POTENTIAL_V_A2, scattering_factor
from halfmap.steps.simulate.optics import Defocus, Microscope
from halfmap.steps.simulate.solvent import WATER_MOLECULES_PER_A3
from halfmap.units import electron_wavelength

DIFFUSION_A2_PER_DOSE = 1.1
"""Mean square displacement in Å² of a water molecule per e/Å² (McMullan et al. 2015, arXiv 1504.00947)."""

_TABLE = 4096


def structure_factor(frequency: Tensor) -> Tensor:
    """Structure factor of water molecules in low-density amorphous ice, at frequencies in 1/Å.

    Long waves are suppressed to 0.05 (as the compressibility of the glass at its transition), the first peak
    at 1/3.7 Å is the ring that micrographs show, single molecules scatter independently far beyond it.

    References
    ----------
    .. [1] Martelli et al. 2017, Phys. Rev. Lett. 119, 136002, DOI 10.1103/PhysRevLett.119.136002
    """
    rise = 1 - torch.exp(-((frequency / 0.27) ** 8))
    first = 1.0 * torch.exp(-0.5 * ((frequency - 0.268) / 0.020) ** 2)
    second = 0.3 * torch.exp(-0.5 * ((frequency - 0.49) / 0.040) ** 2)
    return 0.05 + 0.95 * rise + first + second


def potential_spectrum(frequency: Tensor, thickness: float) -> Tensor:
    """Power of the projected potential's fluctuations per area, V² Å⁴, of ice `thickness` Å thick."""
    oxygen, hydrogen = (torch.tensor(np.stack(scattering_coefficients(z), -1)) for z in ("O", "H"))
    molecule = scattering_factor(oxygen, frequency) + 2 * scattering_factor(hydrogen, frequency)
    single = (POTENTIAL_V_A2 * molecule).square()
    return thickness * WATER_MOLECULES_PER_A3 * single * structure_factor(frequency)


def tabulated(function: Callable[[Tensor], Tensor], frequency: Tensor) -> Tensor:
    """A smooth function of the frequency, looked up: spares dozens of exponentials per coefficient."""
    grid = torch.linspace(0, float(frequency.max()) + 1e-6, _TABLE, dtype=torch.float64)
    table = function(grid).float()
    return table[(frequency * ((_TABLE - 1) / float(grid[-1]))).round_().long()]


def noise_amplitude(
    shape: tuple[int, int], *, pixel_size: float, microscope: Microscope, defocus: Defocus, thickness: float
) -> Tensor:
    """Filter that turns white noise into the ice's image.

    Parameters
    ----------
    shape : tuple of 2 int
        Of the image.
    pixel_size : float
        In Å.
    microscope, defocus
        Optics, and the defocus of the slab's middle.
    thickness : float
        Of the slab in Å, along the beam.

    Returns
    -------
    Tensor (h, w // 2 + 1)
        Amplitude of the relative intensity for white noise of variance 1 per pixel.

    Notes
    -----
    Molecules at different heights scatter independently, so that powers add: the squared CTF averaged over
    a slab is (1 - cos(2 chi) sinc(lambda k² thickness)) / 2, which blurs the Thon rings of thick ice.
    """
    k = grids.frequency_radius(shape, pixel_size)
    amplitude = tabulated(lambda frequency: potential_spectrum(frequency, thickness).sqrt(), k)
    value = microscope.transfer(shape, pixel_size, defocus, amplitude_contrast=microscope.amplitude_contrast)
    slab = torch.sinc(electron_wavelength(microscope.voltage_kV) * thickness * k.square())
    transfer = ((1 - (1 - 2 * value.square()) * slab) / 2).clamp_(min=0).sqrt_()
    scale = 2 * microscope.phase_per_V_A / math.sqrt(1 - microscope.amplitude_contrast**2) / pixel_size
    amplitude *= scale * transfer * microscope.envelope(shape, pixel_size, defocus.mean)
    amplitude[0, 0] = 0
    return amplitude


def decay_rate(frequency: Tensor) -> Tensor:
    """Rate per e/Å² at which a wave of the ice's density is forgotten: (2 pi k)² times the diffusion / 6."""
    return (2 * math.pi * frequency).square() * DIFFUSION_A2_PER_DOSE / 6


def white_noise(shape: tuple[int, int], rng: Generator) -> NDArray[np.complex64]:
    """Half-spectrum (h, w // 2 + 1) of white noise of variance 1 per pixel."""
    h, w = shape
    noise = rng.standard_normal((h, w // 2 + 1, 2), dtype=np.float32)
    spectrum = noise.view(np.complex64)[..., 0]
    # An inverse real transform keeps half the power of the columns that are their own mirror images.
    edges = [0, -1] if w % 2 == 0 else [0]
    spectrum[:, edges] *= np.float32(math.sqrt(2))
    spectrum *= np.float32(math.sqrt(h * w / 2))
    return spectrum


class FlowingIce:
    """White noise that flows: frames of a random field whose waves fade as molecules diffuse.

    Every coefficient is an Ornstein-Uhlenbeck process of the exposure. A frame is its average over the
    frame's exposure: given the values at both ends it is (tanh(x/2) / x) (start + end) plus independent
    noise, x the decay within a frame, which makes frames of any length exact.

    Parameters
    ----------
    shape : tuple of 2 int
        Of the images.
    pixel_size : float
        In Å.
    dose_per_frame : float
        e/Å².
    seed : SeedSequence
        Source of randomness.
    """

    def __init__(
        self, shape: tuple[int, int], *, pixel_size: float, dose_per_frame: float, seed: SeedSequence
    ) -> None:
        self.shape = shape
        self._rng = np.random.Generator(np.random.SFC64(seed))
        x = (
            decay_rate(grids.frequency_radius(shape, pixel_size, dtype=torch.float64)).numpy()
            * dose_per_frame
        )
        kept = np.exp(-x)
        small = x < 1e-3
        safe = np.where(small, 1.0, x)
        ends = np.where(small, 0.5, np.tanh(safe / 2) / safe)
        whole = 2 * (safe - 1 + kept) / safe**2
        inner = np.where(small, x / 6, whole - ends**2 * 2 * (1 + kept))
        self._kept, self._ends = kept.astype(np.float32), ends.astype(np.float32)
        self._inner = np.sqrt(np.maximum(inner, 0)).astype(np.float32)
        self._state = white_noise(self.shape, self._rng)

    def next(self) -> NDArray[np.complex64]:
        """Half-spectrum (h, w // 2 + 1) of the next frame; of variance below 1 where it fades within one."""
        frame = np.empty_like(self._state)
        _advance(
            self._state,
            white_noise(self.shape, self._rng),
            white_noise(self.shape, self._rng),
            self._kept,
            self._ends,
            self._inner,
            frame,
        )
        return frame


@numba.njit(parallel=True, cache=True)
def _advance(
    state: NDArray,
    fresh: NDArray,
    bridge: NDArray,
    kept: NDArray,
    ends: NDArray,
    inner: NDArray,
    frame: NDArray,
) -> None:
    for y in numba.prange(state.shape[0]):
        for x in range(state.shape[1]):
            start = state[y, x]
            memory = kept[y, x]
            end = memory * start + math.sqrt(max(np.float32(0), 1 - memory * memory)) * fresh[y, x]
            state[y, x] = end
            frame[y, x] = ends[y, x] * (start + end) + inner[y, x] * bridge[y, x]


def fading(frequency: Tensor, dose: float) -> Tensor:
    """Amplitude that an average over an exposure of `dose` leaves of the ice's waves."""
    x = decay_rate(frequency) * dose
    whole = 2 * (x + torch.expm1(-x)) / x.square()
    return torch.where(x < 0.05, 1 - x / 3 + x.square() / 12, whole).sqrt()
