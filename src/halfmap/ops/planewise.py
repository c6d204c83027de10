"""Centred transforms of volumes that come plane by plane: nothing is held twice.

`spectrum_of_planes` and `volume_of_spectrum` do to a large volume what `fourier.fft_centred`,
`fourier.resize_spectrum` and `fourier.ifft_centred` do, which each hold two to four copies of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.errors import ShapeError
from halfmap.ops import fourier

_BLOCK_BYTES = 1 << 26
"""Size of the parts in which the third axis is transformed."""


def spectrum_of_planes(
    planes: Iterable[Tensor], *, shape: Sequence[int], new_shape: Sequence[int]
) -> NDArray[np.complex64]:
    """Half-spectrum of a volume given plane by plane, cropped or padded to another box.

    Parameters
    ----------
    planes : iterable of Tensor (h, w)
        All planes of the volume, from z = 0 on.
    shape, new_shape : sequence of 3 int
        Shape (d, h, w) of the box now and wanted over the same field.

    Returns
    -------
    array (new_d, new_h, new_w // 2 + 1), complex64
        What ``resize_spectrum(fft_centred(volume, ndim=3), shape=shape, new_shape=new_shape)`` is.

    Raises
    ------
    ShapeError
        If there are more or fewer than d planes.

    Notes
    -----
    At its peak it holds max(d, new_d) planes of the new spectrum.
    """
    depth, new_depth = shape[0], new_shape[0]
    spectrum = np.empty((max(depth, new_depth), new_shape[1], new_shape[2] // 2 + 1), np.complex64)
    count = 0
    for count, plane in enumerate(planes, start=1):
        flat = fourier.fft_centred(plane, ndim=2)
        flat = fourier.resize_spectrum(flat, shape=shape[1:], new_shape=new_shape[1:])
        spectrum[(count - 1 - depth // 2) % depth] = flat.numpy()
    if count != depth:
        raise ShapeError(f"{count} planes are not those of a volume of {depth}")
    for rows in row_blocks(spectrum):
        block = fourier.fft2(torch.from_numpy(spectrum[:depth, rows]).permute(1, 2, 0)[..., None])
        block = fourier.resize_spectrum(block, shape=(depth, 1), new_shape=(new_depth, 1))
        spectrum[:new_depth, rows] = block[..., 0].permute(2, 0, 1).numpy()
        del block
    # Gives what a cropped spectrum no longer needs back to the system, without a copy.
    spectrum.resize((new_depth, *spectrum.shape[1:]), refcheck=False)
    return spectrum


def volume_of_spectrum(spectrum: NDArray[np.complex64], *, shape: Sequence[int]) -> Tensor:
    """Volume with its origin at ``n // 2`` of a half-spectrum, in whose memory it is written.

    Parameters
    ----------
    spectrum : array (d, h, w // 2 + 1), complex64
        From `spectrum_of_planes`; useless afterwards.
    shape : sequence of 3 int
        Shape (d, h, w) of the volume.

    Returns
    -------
    Tensor (d, h, w), float32
        A view of the spectrum's memory, not contiguous: its rows are longer than w.
    """
    for rows in row_blocks(spectrum):
        block = fourier.ifft2(torch.from_numpy(spectrum[:, rows]).permute(1, 2, 0)[..., None])[..., 0]
        spectrum[:, rows] = torch.fft.fftshift(block, dim=-1).permute(2, 0, 1).numpy()
        del block
    volume = spectrum.view(np.float32)[..., : shape[2]]
    for z in range(shape[0]):
        volume[z] = fourier.ifft_centred(torch.from_numpy(spectrum[z]), shape=shape[1:]).numpy()
    return torch.from_numpy(volume)


def row_blocks(spectrum: NDArray) -> list[slice]:
    """Rows of a spectrum (d, h, w) in parts that are small beside it."""
    depth, height, width = spectrum.shape
    rows = max(1, _BLOCK_BYTES // (depth * width * spectrum.itemsize))
    return [slice(first, min(height, first + rows)) for first in range(0, height, rows)]
