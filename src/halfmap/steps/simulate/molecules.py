"""Images of the particles of a field of view, and their sum where they are in a frame."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.ops import fourier, grids
from halfmap.steps.simulate.optics import Defocus, Microscope
from halfmap.steps.simulate.projector import project
from halfmap.steps.simulate.scene import Scene
from halfmap.steps.simulate.specimen import Specimen
from halfmap.steps.simulate.warp import displace
from halfmap.units import electron_wavelength

_BATCH = 16
_LARGEST_PATCH = 1024


@dataclass(frozen=True, eq=False)
class ParticleImages:
    """Particles of one field of view as the lens images them, undamaged.

    Parameters
    ----------
    spectra : array (n, p, p // 2 + 1), complex64
        Centred half-spectra of the relative change of intensity, MTF applied.
    centre_px : array (n, 2)
        (x, y) in pixels of the frame, in the middle of the first frame of a movie.
    """

    spectra: NDArray[np.complex64]
    centre_px: NDArray

    @property
    def patch(self) -> int:
        """Pixels p along an edge of the images."""
        return self.spectra.shape[1]

    def layer(
        self, shape: tuple[int, int], *, moved_px: NDArray, smear_px: NDArray, damage: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Sum of the particles in a frame.

        Parameters
        ----------
        shape : tuple of 2 int
            Of the frame.
        moved_px : array (n, 2)
            Displacement (x, y) of each particle; exact to any fraction of a pixel.
        smear_px : array (n, 2)
            Way of each particle during the frame, along which its image is blurred.
        damage : array (p, p // 2 + 1), float32
            Filter of the frame.

        Returns
        -------
        array (h, w), float32
            Relative change of the intensity.
        """
        total = np.zeros(shape, np.float32)
        place = self.centre_px + moved_px
        nearest = np.rint(place).astype(int)
        for first in range(0, len(self.spectra), _BATCH):
            part = slice(first, first + _BATCH)
            moved = np.empty_like(self.spectra[part])
            displace(self.spectra[part], damage, place[part] - nearest[part], smear_px[part], moved)
            images = fourier.irfft2(torch.from_numpy(moved), shape=(self.patch, self.patch)).numpy()
            for image, (x, y) in zip(images, nearest[part], strict=True):
                _add(total, np.fft.fftshift(image), x - self.patch // 2, y - self.patch // 2)
        return total


def image_particles(
    scene: Scene, *, specimen: Specimen, microscope: Microscope, pixel_size: float, mtf_of_patch: Tensor
) -> ParticleImages:
    """Project all particles of a scene and pass them through the lens, each at its own defocus.

    Parameters
    ----------
    scene, specimen, microscope
        What, of what, and by what.
    pixel_size : float
        Of the frame in Å, which is that of the specimen.
    mtf_of_patch : Tensor (p, p // 2 + 1)
        MTF of the camera, which sets the size of the patches; see `patch_size`.
    """
    molecules = scene.molecules
    patch = mtf_of_patch.shape[0]
    spectra = np.empty((len(molecules.state), patch, patch // 2 + 1), np.complex64)
    for state in np.unique(molecules.state):
        transform = specimen.transform(int(state))
        for i in np.flatnonzero(molecules.state == state):
            projection = project_to_pixels(transform, molecules.rotation[i : i + 1], specimen)[0]
            x, y = molecules.position[i]
            contrast = microscope.contrast(
                fit(projection, patch),
                pixel_size=pixel_size,
                defocus=scene.defocus_at(x, y, molecules.depth[i]),
                beam_tilt_mrad=scene.beam_tilt_mrad,
            )
            spectra[i] = (contrast * mtf_of_patch).numpy()
    return ParticleImages(spectra, molecules.position / pixel_size)


def project_to_pixels(transform: NDArray, rotations: NDArray, specimen: Specimen) -> Tensor:
    """Projected potential (n, box, box) in V Å at the specimen's pixel size, up to Nyquist's circle."""
    fine, shape = (specimen.fine_box,) * 2, (specimen.box,) * 2
    projections = project(
        transform, torch.from_numpy(rotations), box=specimen.fine_box, pixel_size=specimen.fine_pixel
    )
    spectra = fourier.fft_centred(projections, ndim=2)
    spectra = fourier.resize_spectrum(spectra, shape=fine, new_shape=shape)
    return fourier.ifft_centred(spectra * (grids.frequency_radius(shape) < 0.5), shape=shape)


def fit(image: Tensor, size: int) -> Tensor:
    """Crop or pad images with zeros to `size`, the origin ``n // 2`` staying the origin."""
    n = image.shape[-1]
    if size <= n:
        start = n // 2 - size // 2
        return image[..., start : start + size, start : start + size]
    before = size // 2 - n // 2
    after = size - n - before
    return torch.nn.functional.pad(image, (before, after, before, after))


def reach(microscope: Microscope, defocus: float, pixel_size: float) -> float:
    """How far in Å the lens spreads what lies at a point, at the frequencies that pass the envelope."""
    k = torch.linspace(0, 0.5 / pixel_size, 256)
    wavelength = electron_wavelength(microscope.voltage_kV)
    spread = (wavelength * defocus * k - microscope.cs_mm * 1e7 * wavelength**3 * k**3).abs()
    spatial = (math.pi * microscope.convergence_mrad * 1e-3 / wavelength * spread).square()
    temporal = 0.5 * (math.pi * wavelength * microscope.focal_spread * k.square()).square()
    passing = -spatial - temporal - microscope.b_factor * k.square() / 4 > math.log(0.05)
    return float(spread[passing].max())


def patch_size(specimen: Specimen, microscope: Microscope, defocus: Defocus, pixel_size: float) -> int:
    """Even size in pixels of patches that hold a particle with all that the lens spreads."""
    extent = specimen.diameter + 2 * reach(microscope, defocus.u, pixel_size) + 20
    return min(fast_even(extent / pixel_size), _LARGEST_PATCH)


def fast_even(size: float) -> int:
    """Smallest even size from `size` on with no prime factor above 7, whose Fourier transform is fast."""
    n = 2 * math.ceil(size / 2)
    while True:
        rest = n
        for factor in (2, 3, 5, 7):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return n
        n += 2


def _add(total: NDArray, image: NDArray, x: int, y: int) -> None:
    """Add an image whose first pixel falls on (x, y), as far as it lies inside."""
    h, w = total.shape
    top, left = max(0, y), max(0, x)
    bottom, right = min(h, y + image.shape[0]), min(w, x + image.shape[1])
    if top < bottom and left < right:
        total[top:bottom, left:right] += image[top - y : bottom - y, left - x : right - x]
