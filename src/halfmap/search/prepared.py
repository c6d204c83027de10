"""Images made ready for the comparison with volumes: coefficients and CTFs, in a disc and on rings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from halfmap.data.ctf import CTFParameters
from halfmap.errors import TableError
from halfmap.ops.ctf import ctf, odd_aberration_phase
from halfmap.ops.fourier import fft_centred, ifft_centred, resize_spectrum
from halfmap.search.disc import DiscImages, FourierDisc
from halfmap.search.polar import PolarGrid
from halfmap.search.transfer import transfer_on_rings

_STRETCH = 1e-3
"""Difference of the magnification from that of the pixel size which moves nothing that can be seen."""


@dataclass(frozen=True, eq=False)
class PreparedImages:
    """A batch of images in a disc, before they are weighted.

    Attributes
    ----------
    disc : FourierDisc
        Its box is that of the search, which may be smaller than that of the images; coefficients are those
        of the images as they are.
    whole, masked : Tensor (b, p), complex
        Of the images, and of the images within their mask. Phases of odd aberrations are taken off.
    ctf : Tensor (b, p)
    """

    disc: FourierDisc
    whole: Tensor
    masked: Tensor
    ctf: Tensor

    def weighted(self, coefficients: Tensor, scale: Tensor, noise: Tensor) -> DiscImages:
        """Weight coefficients (b, p) as the likelihood does, with scales (b,) and noise (b, rings)."""
        return DiscImages.of(self.disc, coefficients, self.ctf * scale[:, None], noise)


def refuse_stretched(parameters: CTFParameters, table: Path | None = None) -> None:
    """Refuse images whose magnification differs with direction: slices would not fit them.

    Raises
    ------
    TableError
        With the row of the first, of the table that the parameters are all of.
    """
    off = (parameters.magnification - torch.eye(2).to(parameters.magnification)).abs().amax((1, 2))
    if bool((off > _STRETCH).any()):
        raise TableError(
            "the magnification differs with direction (_rlnMagMat00), which maps cannot be made with yet",
            path=table,
            row=None if table is None else int((off > _STRETCH).int().argmax()) + 1,
            hint="remove the columns _rlnMagMat00 to _rlnMagMat11 if less than a pixel at the particle's rim",
        )


def prepare(
    images: Tensor,
    mask: Tensor,
    parameters: CTFParameters,
    disc: FourierDisc,
    pixel_size: float,
    *,
    phase_flipped: Tensor | None = None,
) -> PreparedImages:
    """Transform images and compute their CTFs.

    Parameters
    ----------
    images : Tensor (b, n, n)
    mask : Tensor (n, n)
        What the particle may reach; see `PreparedImages.masked`.
    parameters : CTFParameters
        Of the b images.
    disc : FourierDisc
        Of a box of n pixels or less.
    pixel_size : float
        Å, of the disc's box.
    phase_flipped : Tensor (b,) of bool, optional
        Which images were multiplied by the sign of their CTF; default: none.

    Returns
    -------
    PreparedImages

    Raises
    ------
    TableError
        If the magnification of an image differs with direction.
    """
    refuse_stretched(parameters)
    whole, masked = (disc.pack(fft_centred(each, ndim=2)) for each in (images, images * mask))
    # Fourier cropping has changed the pixels.
    parameters = replace(parameters, pixel_size=torch.full_like(parameters.pixel_size, pixel_size))
    frequencies = (disc.points / disc.box).float().cpu()
    values = ctf(frequencies, **parameters.for_ctf()).expand(len(images), -1)
    if phase_flipped is not None:
        values = torch.where(phase_flipped[:, None], values.abs(), values)
    phases = odd_phases(parameters, disc)
    if phases is not None:
        whole, masked = whole * phases.conj(), masked * phases.conj()
    return PreparedImages(disc, whole, masked, values.to(disc.device))


def odd_phases(parameters: CTFParameters, disc: FourierDisc) -> Tensor | None:
    """Factors (b, p) of odd aberrations, of images whose pixels are the disc's; nothing without any."""
    odd = parameters.for_odd_aberrations()
    if odd is None:
        return None
    frequencies = (disc.points / disc.box).float().cpu()
    return odd_aberration_phase(frequencies, **odd).expand(len(parameters), -1).to(disc.device)


def on_rings(
    images: Tensor,
    mask: Tensor,
    parameters: CTFParameters,
    grid: PolarGrid,
    pixel_size: float,
    *,
    phase_flipped: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Samples and CTFs of masked images on the rings of a grid, as `prepare` has them in a disc.

    Parameters
    ----------
    images, mask, parameters, pixel_size, phase_flipped
        As for `prepare`.
    grid : PolarGrid
        Of a box of n pixels or less.

    Returns
    -------
    tuple of Tensor (b, rings, angles / 2)
    """
    shape, new = tuple(images.shape[-2:]), (grid.box, grid.box)
    spectra = resize_spectrum(fft_centred(images * mask, ndim=2), shape=shape, new_shape=new)
    cropped = ifft_centred(spectra * (shape[0] / grid.box) ** 2, shape=new)
    samples = grid.sample(cropped)
    transfer = transfer_on_rings(parameters, grid, pixel_size, phase_flipped=phase_flipped)
    if transfer.is_complex():
        samples = samples * (transfer / transfer.abs().clamp(min=1e-9)).conj()
        transfer = transfer.abs()
    return samples, transfer
