"""Image formation: from projected potential to relative intensity at the detector."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from halfmap.ops import fourier, grids
from halfmap.ops.ctf import ctf, odd_aberration_phase
from halfmap.units import electron_wavelength, interaction_constant

ImageModel = Literal["weak-phase", "phase-object"]


@dataclass(frozen=True)
class Defocus:
    """Defocus along two axes, Å, positive = underfocus, and the angle of the first in degrees."""

    u: float
    v: float
    angle: float

    @property
    def mean(self) -> float:
        """Mean of both axes."""
        return (self.u + self.v) / 2

    def further(self, distance: float) -> Defocus:
        """Defocus of a point that lies `distance` Å deeper in underfocus."""
        return Defocus(self.u + distance, self.v + distance, self.angle)


@dataclass(frozen=True)
class Microscope:
    """What all images share.

    Parameters
    ----------
    voltage_kV, cs_mm, amplitude_contrast : float
        As in the optics table.
    phase_shift : float
        Of a phase plate, degrees.
    focal_spread : float
        Standard deviation in Å of the focus over the electrons' energies and the lens current.
    convergence_mrad : float
        Semi-angle of the illumination.
    b_factor : float
        Å², all other losses, exp(-B k² / 4) on amplitudes.
    image_model : {"weak-phase", "phase-object"}
        Linear in the potential, or the squared modulus of the wave.
    """

    voltage_kV: float
    cs_mm: float
    amplitude_contrast: float
    phase_shift: float
    focal_spread: float
    convergence_mrad: float
    b_factor: float
    image_model: ImageModel

    @property
    def phase_per_V_A(self) -> float:
        """Phase in radian of an electron that passed one V Å."""
        return interaction_constant(self.voltage_kV)

    @property
    def absorption(self) -> float:
        """Amplitude over phase contrast: the imaginary part of the potential over its real part."""
        return self.amplitude_contrast / math.sqrt(1 - self.amplitude_contrast**2)

    def transfer(
        self, shape: tuple[int, int], pixel_size: float, defocus: Defocus, *, amplitude_contrast: float
    ) -> Tensor:
        """CTF (h, w // 2 + 1) without envelope; with amplitude contrast 0 and 1 the sine and cosine."""
        return ctf(
            shape,
            pixel_size=pixel_size,
            defocus_u=defocus.u,
            defocus_v=defocus.v,
            defocus_angle=defocus.angle,
            voltage_kV=self.voltage_kV,
            cs_mm=self.cs_mm,
            amplitude_contrast=amplitude_contrast,
            phase_shift=self.phase_shift,
        )

    def envelope(self, shape: tuple[int, int], pixel_size: float, defocus: float) -> Tensor:
        """Loss of amplitude by partial coherence and by `b_factor`, (h, w // 2 + 1).

        References
        ----------
        .. [1] Wade & Frank 1977, Optik 49, 81-92
        .. [2] Frank 1973, Optik 38, 519-536
        """
        k2 = grids.frequency_radius(shape, pixel_size).square()
        wavelength = electron_wavelength(self.voltage_kV)
        temporal = 0.5 * (math.pi * wavelength * self.focal_spread * k2).square()
        gradient = self.cs_mm * 1e7 * wavelength**3 * k2 - defocus * wavelength
        spatial = (math.pi * self.convergence_mrad * 1e-3 / wavelength * gradient).square() * k2
        return torch.exp(-temporal - spatial - self.b_factor * k2 / 4)

    def contrast(
        self,
        projection: Tensor,
        *,
        pixel_size: float,
        defocus: Defocus,
        beam_tilt_mrad: tuple[float, float] = (0.0, 0.0),
    ) -> Tensor:
        """Spectrum of the relative change of intensity that an object causes.

        Parameters
        ----------
        projection : Tensor (h, w)
            Projected potential in V Å against the surrounding ice, origin at ``n // 2``.
        pixel_size : float
            In Å.
        defocus : Defocus
            At the object.
        beam_tilt_mrad : tuple of 2 float
            Along x and y.

        Returns
        -------
        Tensor (h, w // 2 + 1)
            Centred half-spectrum of I - 1; protein is dark in underfocus.

        Notes
        -----
        The wave behind the object is exp((i - a) phase), a from the amplitude contrast. The weak-phase model
        keeps its linear term, -2 phase * CTF / sqrt(1 - A²). The phase object keeps all; the envelope
        and the beam tilt then act on the intensity as they do on its linear part.
        """
        shape = (projection.shape[0], projection.shape[1])
        phase = self.phase_per_V_A * projection
        if self.image_model == "weak-phase":
            transfer = self.transfer(shape, pixel_size, defocus, amplitude_contrast=self.amplitude_contrast)
            scale = -2 / math.sqrt(1 - self.amplitude_contrast**2)
            spectrum = scale * transfer * fourier.fft_centred(phase, ndim=2)
        else:
            damping = torch.exp(-self.absorption * phase)
            real, imaginary = self.propagate(
                damping * torch.cos(phase) - 1, damping * torch.sin(phase), pixel_size, defocus
            )
            intensity = 2 * real + real.square() + imaginary.square()
            spectrum = fourier.fft_centred(intensity, ndim=2)
        spectrum = spectrum * self.envelope(shape, pixel_size, defocus.mean)
        if beam_tilt_mrad != (0.0, 0.0):
            spectrum = spectrum * odd_aberration_phase(
                shape,
                pixel_size=pixel_size,
                voltage_kV=self.voltage_kV,
                cs_mm=self.cs_mm,
                beam_tilt_mrad=beam_tilt_mrad,
            )
        return spectrum

    def propagate(
        self, real: Tensor, imaginary: Tensor, pixel_size: float, defocus: Defocus
    ) -> tuple[Tensor, Tensor]:
        """Image of the scattered part of a wave: real and imaginary part (h, w) in, and out.

        The phase of the lens is even in the frequency, so cosine and sine of it are real filters.
        """
        shape = (real.shape[0], real.shape[1])
        sine = self.transfer(shape, pixel_size, defocus, amplitude_contrast=0.0)
        cosine = self.transfer(shape, pixel_size, defocus, amplitude_contrast=1.0)
        a, b = fourier.fft_centred(real, ndim=2), fourier.fft_centred(imaginary, ndim=2)
        return (
            fourier.ifft_centred(a * cosine - b * sine, shape=shape),
            fourier.ifft_centred(a * sine + b * cosine, shape=shape),
        )
