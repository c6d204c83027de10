"""Central slices of volumes: projections out of a Fourier transform, and reconstructions back into one.

The projection of a volume along z of a rotated frame is, in Fourier space, the slice of the volume's
transform at ``R.T @ (kx, ky, 0)``. `prepare_volume` makes the transform of a padded volume,
`extract_slices` cuts slices from it, `insert_slices` adds slices to a `SliceAccumulator` and is the exact
adjoint of cutting, and `finish_reconstruction` turns what was added up into a volume. `project_volume` and
`reconstruct` are the whole way in one call.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops import _slice_bodies as bodies
from halfmap.ops._slice_volume import (
    SliceAccumulator,
    SliceVolume,
    finish_reconstruction,
    prepare_volume,
    sample_multiplicity,
)
from halfmap.ops.fourier import ifft_centred

__all__ = [
    "SliceAccumulator",
    "SliceVolume",
    "extract_slices",
    "finish_reconstruction",
    "insert_slices",
    "prepare_volume",
    "project_volume",
    "reconstruct",
    "sample_multiplicity",
]

Backend = Literal["auto", "numba", "torch"]


def extract_slices(
    volume: SliceVolume,
    rotations: Tensor,
    *,
    size: int | None = None,
    radius_px: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Cut central slices from a volume's Fourier transform by linear interpolation.

    Parameters
    ----------
    volume : SliceVolume
        From `prepare_volume`.
    rotations : Tensor (..., 3, 3)
        Rotation matrices from volume to image coordinates. A matrix that also stretches gives stretched
        slices.
    size : int, optional
        Size of the slices in pixels, by default the volume's box. A smaller one gives the slices' low
        frequencies, as Fourier-cropped images have them, though not rescaled.
    radius_px : float, optional
        Largest frequency in Fourier pixels; samples beyond are zero. By default the largest circle that
        fits in the slice and the volume. A larger one reaches into the corners, as far as the volume goes.
    backend : {"auto", "numba", "torch"}
        Compiled kernels on the CPU, or torch operations on any device, which also record gradients with
        respect to the volume and the rotations. "auto" takes the kernels wherever they can do it.

    Returns
    -------
    Tensor (..., size, size // 2 + 1), complex
        Unshifted half-spectra whose origin is the image's centre, as `fourier.fft_centred` gives them.

    Raises
    ------
    ShapeError
        If the rotations are not 3 x 3 matrices.
    ParameterError
        If a rotation is not finite, or the backend cannot do it.

    Notes
    -----
    The Nyquist row of an even size is at -size / 2. Both bodies agree to rounding.

    Examples
    --------
    >>> volume = torch.zeros(8, 8, 8)
    >>> volume[4, 4, 4] = 1
    >>> slices = extract_slices(prepare_volume(volume), torch.eye(3))
    >>> slices.shape, round(slices[0, 0].real.item(), 5)
    (torch.Size([8, 5]), 1.0)
    """
    bricks = volume.bricks
    size = volume.box if size is None else size
    steps = _steps(rotations, volume.voxels_per_pixel, bricks)
    differentiable = torch.is_grad_enabled() and (bricks.requires_grad or rotations.requires_grad)
    body = _choose(backend, bricks, differentiable, bodies.extract_numba, bodies.extract_torch)
    radius = _default_radius(volume, size) if radius_px is None else radius_px
    slices = body(bricks, steps.reshape(-1, 3, 3), size=size, radius=float(radius), limit=float(volume.limit))
    return slices.reshape(*rotations.shape[:-2], size, size // 2 + 1)


def insert_slices(
    slices: Tensor,
    rotations: Tensor,
    *,
    out: SliceAccumulator,
    weights: Tensor | None = None,
    radius_px: float | None = None,
    backend: Backend = "auto",
) -> SliceAccumulator:
    """Add slices to a volume's Fourier transform: the adjoint of `extract_slices`.

    Parameters
    ----------
    slices : Tensor (..., size, size // 2 + 1), complex
        Unshifted half-spectra about the images' centres, already multiplied by whatever weights them (for
        example the CTF over the noise power).
    rotations : Tensor (..., 3, 3)
        With the same leading axes.
    out : SliceAccumulator
        Added to, in place.
    weights : Tensor (..., size, size // 2 + 1), optional
        Real weights to add up beside the slices (for example the squared CTF over the noise power); 1 by
        default.
    radius_px : float, optional
        As for `extract_slices`; samples beyond are left out.
    backend : {"auto", "numba", "torch"}
        As for `extract_slices`.

    Returns
    -------
    SliceAccumulator
        `out`.

    Raises
    ------
    ShapeError
        If slices, rotations and weights do not fit each other.
    ParameterError
        If a rotation is not finite, or the backend cannot do it.

    Notes
    -----
    Exactly adjoint in the real inner product over the stored samples:
    ``Re <extract(V), S> = Re <V, insert(S)>``. The column kx = 0 of a half-spectrum stores each sample twice
    and the others store it once, so that for a reconstruction slices and weights should be multiplied by
    `sample_multiplicity` first.

    With the kernels a voxel receives its samples in the order of the slices, whatever the number of
    threads, so sums repeat to the last bit. On a GPU torch adds in no fixed order unless
    ``torch.use_deterministic_algorithms`` is on.
    """
    size = slices.shape[-2]
    if slices.shape[:-2] != rotations.shape[:-2] or slices.shape[-1] != size // 2 + 1:
        raise ShapeError(
            f"slices {tuple(slices.shape)} and rotations {tuple(rotations.shape)} do not fit each other",
            hint="slices are (..., size, size // 2 + 1) and rotations (..., 3, 3)",
        )
    if weights is not None and weights.shape != slices.shape:
        raise ShapeError(f"weights of shape {tuple(weights.shape)} for slices of shape {tuple(slices.shape)}")
    flat = slices.reshape(-1, size, size // 2 + 1).to(out.values.dtype)
    flat_weights = None if weights is None else weights.reshape(flat.shape).to(out.data.dtype)
    steps = _steps(rotations, out.voxels_per_pixel, out.data).reshape(-1, 3, 3)
    body = _choose(backend, out.data, False, bodies.insert_numba, bodies.insert_torch)
    radius = _default_radius(out, size) if radius_px is None else radius_px
    body(out.data, flat, flat_weights, steps, radius=float(radius), limit=float(out.limit))
    return out


def project_volume(
    volume: Tensor | SliceVolume, rotations: Tensor, *, padding: float = 2.0, batch: int | None = None
) -> Tensor:
    """Project a volume along z of rotated frames.

    Parameters
    ----------
    volume : Tensor (d, d, d) or SliceVolume
        Real-space volume; a prepared one saves its transformation when there are several calls.
    rotations : Tensor (..., 3, 3)
        Rotation matrices from volume to image coordinates.
    padding : float
        As for `prepare_volume`; unused for a prepared volume.
    batch : int, optional
        Slices held in memory at a time, by default some 2^24 samples' worth.

    Returns
    -------
    Tensor (..., d, d)
        Sums of the volume along the viewing direction, in its units times voxels, about
        the centre ``d // 2``.

    Notes
    -----
    Frequencies beyond Nyquist's circle are zero.

    Examples
    --------
    >>> volume = torch.zeros(8, 8, 8)
    >>> volume[4, 4, 4] = 1
    >>> int(project_volume(volume, torch.eye(3)).argmax())
    36
    """
    prepared = volume if isinstance(volume, SliceVolume) else prepare_volume(volume, padding=padding)
    box = prepared.box
    flat = rotations.reshape(-1, 3, 3)
    batch = batch or max(1, 2**24 // box**2)
    parts = [
        ifft_centred(extract_slices(prepared, flat[i : i + batch]), shape=(box, box))
        for i in range(0, len(flat), batch)
    ]
    images = torch.cat(parts) if parts else prepared.bricks.real.new_zeros(0, box, box)
    return images.reshape(*rotations.shape[:-2], box, box)


def reconstruct(
    images_ft: Tensor,
    rotations: Tensor,
    *,
    ctf: Tensor | None = None,
    padding: float = 2.0,
    radius_px: float | None = None,
    regularisation: float = 1e-3,
    batch: int | None = None,
) -> Tensor:
    """Reconstruct a volume from images of known orientation by weighted back-projection.

    Parameters
    ----------
    images_ft : Tensor (n, size, size // 2 + 1), complex
        Images' half-spectra about their centres (`fourier.fft_centred`), the particle in the centre.
    rotations : Tensor (n, 3, 3)
        Rotation matrices from volume to image coordinates.
    ctf : Tensor (n, size, size // 2 + 1), optional
        CTF that each image was multiplied with; the reconstruction divides by it as least squares do.
    padding : float
        Size of the Fourier transform over `size`.
    radius_px : float, optional
        Largest frequency used, in Fourier pixels; Nyquist by default.
    regularisation : float
        Wiener's constant as a fraction of the mean weight.
    batch : int, optional
        Images weighted at a time, by default some 2^22 samples' worth.

    Returns
    -------
    Tensor (size, size, size)

    Notes
    -----
    Where images of noise power 1 sum to ``X = Σ CTF · image`` and ``W = Σ CTF²`` in a voxel, the volume's
    transform there is ``X / (W + constant)``, Wiener's filter for a signal of flat spectrum.
    """
    size = images_ft.shape[-2]
    dtype = torch.float64 if images_ft.dtype == torch.complex128 else torch.float32
    sums = SliceAccumulator.empty(
        size, padding=padding, radius_px=radius_px, dtype=dtype, device=images_ft.device
    )
    multiplicity = sample_multiplicity(size, device=images_ft.device)
    batch = batch or max(1, 2**22 // size**2)
    for i in range(0, len(images_ft), batch):
        part = slice(i, i + batch)
        slices, weights = images_ft[part] * multiplicity, multiplicity.expand(images_ft[part].shape)
        if ctf is not None:
            slices, weights = slices * ctf[part], weights * ctf[part] ** 2
        insert_slices(slices, rotations[part], out=sums, weights=weights, radius_px=radius_px)
    return finish_reconstruction(sums, regularisation=regularisation)


def _default_radius(volume: SliceVolume | SliceAccumulator, size: int) -> float:
    return min(size / 2, volume.limit / volume.voxels_per_pixel)


def _steps(rotations: Tensor, scale: float, like: Tensor) -> Tensor:
    """Rotations in voxels of the volume per Fourier pixel, checked, in the precision of the volume."""
    if rotations.ndim < 2 or rotations.shape[-2:] != (3, 3):
        raise ShapeError(f"rotations of shape {tuple(rotations.shape)} are not (..., 3, 3)")
    if not bool(torch.isfinite(rotations.detach()).all()):
        raise ParameterError("a rotation matrix holds a number that is not finite")
    dtype = torch.zeros(0, dtype=like.dtype).real.dtype
    return rotations.to(device=like.device, dtype=dtype) * scale


def _choose(backend: Backend, volume: Tensor, differentiable: bool, compiled, general):
    """Pick the body, refusing the kernels where they cannot go."""
    able = volume.device.type == "cpu" and not differentiable
    if backend == "auto":
        return compiled if able else general
    if backend not in ("numba", "torch"):
        raise ParameterError(f"there is no backend '{backend}' for slices", hint="use auto, numba or torch")
    if backend == "numba" and not able:
        raise ParameterError("the numba backend runs on the CPU and records no gradients", hint="use torch")
    return compiled if backend == "numba" else general
