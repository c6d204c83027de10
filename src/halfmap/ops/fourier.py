"""The one place that calls an FFT library: transforms, centred boxes, Fourier crop and pad, shifts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import scipy.fft
import torch
from torch import Tensor

from halfmap.errors import ShapeError

_PRECISIONS = (torch.float32, torch.float64, torch.complex64, torch.complex128)
"""What is transformed as it is; counts and half precision become float32."""

_AXES = {1: (-1,), 2: (-2, -1), 3: (-3, -2, -1)}


def rfft2(image: Tensor) -> Tensor:
    """Half-spectrum of images (..., h, w) as (..., h, w // 2 + 1), unshifted, not normalised."""
    return _transform("rfftn", image, 2)


def irfft2(spectrum: Tensor, *, shape: Sequence[int]) -> Tensor:
    """Images of `shape` (h, w) from half-spectra (..., h, w // 2 + 1), divided by h w."""
    _check_spectrum(spectrum, shape, 2)
    return _transform("irfftn", spectrum, 2, shape)


def rfft3(volume: Tensor) -> Tensor:
    """Half-spectrum of volumes (..., d, h, w) as (..., d, h, w // 2 + 1), unshifted, not normalised."""
    return _transform("rfftn", volume, 3)


def irfft3(spectrum: Tensor, *, shape: Sequence[int]) -> Tensor:
    """Volumes of `shape` (d, h, w) from half-spectra (..., d, h, w // 2 + 1), divided by d h w."""
    _check_spectrum(spectrum, shape, 3)
    return _transform("irfftn", spectrum, 3, shape)


def fft2(image: Tensor) -> Tensor:
    """Full complex spectrum (..., h, w) of real or complex images, unshifted, without normalisation."""
    return _transform("fftn", image, 2)


def ifft2(spectrum: Tensor) -> Tensor:
    """Complex images (..., h, w) from full spectra, divided by h w."""
    return _transform("ifftn", spectrum, 2)


def fft1(rows: Tensor) -> Tensor:
    """Full complex spectrum (..., w) of rows, unshifted, without normalisation."""
    return _transform("fftn", rows, 1)


def rfft1(rows: Tensor) -> Tensor:
    """Half-spectrum (..., w // 2 + 1) of real rows, without normalisation."""
    return _transform("rfftn", rows, 1)


def ifft1(spectrum: Tensor) -> Tensor:
    """Complex rows (..., w) from full spectra, divided by w."""
    return _transform("ifftn", spectrum, 1)


def fft_centred(box: Tensor, *, ndim: int) -> Tensor:
    """Half-spectrum of boxes whose origin is the voxel ``n // 2`` of every axis.

    The box is rolled so that its origin comes to index 0 and then transformed, so that a real, symmetric box
    has a real spectrum; slices and rotations of the Fourier transform need exactly this one.

    Parameters
    ----------
    box : Tensor (..., h, w) or (..., d, h, w)
        Images or volumes.
    ndim : int
        2 for images, 3 for volumes.

    Returns
    -------
    Tensor (..., h, w // 2 + 1) or (..., d, h, w // 2 + 1)
        Complex half-spectrum, unshifted.
    """
    return _transform("rfftn", torch.fft.ifftshift(box, dim=_AXES[ndim]), ndim)


def ifft_centred(spectrum: Tensor, *, shape: Sequence[int]) -> Tensor:
    """Boxes of `shape` with their origin at ``n // 2`` from half-spectra; the inverse of `fft_centred`.

    Parameters
    ----------
    spectrum : Tensor (..., h, w // 2 + 1) or (..., d, h, w // 2 + 1)
        Complex half-spectrum, unshifted.
    shape : sequence of 2 or 3 int
        Shape of the box in real space; its length says whether it is an image or a volume.

    Returns
    -------
    Tensor (..., h, w) or (..., d, h, w)
        Real boxes.
    """
    ndim = len(shape)
    _check_spectrum(spectrum, shape, ndim)
    return torch.fft.fftshift(_transform("irfftn", spectrum, ndim, shape), dim=_AXES[ndim])


def resize_spectrum(spectrum: Tensor, *, shape: Sequence[int], new_shape: Sequence[int]) -> Tensor:
    """Crop or zero-pad half-spectra to those of a box with coarser or finer pixels.

    Parameters
    ----------
    spectrum : Tensor (..., h, w // 2 + 1) or (..., d, h, w // 2 + 1)
        Half-spectrum, unshifted, plain or of `fft_centred`: index 0 stays index 0, a centred origin the
        origin.
    shape, new_shape : sequence of 2 or 3 int
        Shape of the box in real space now and wanted; each axis may shrink or grow.

    Returns
    -------
    Tensor (..., new_h, new_w // 2 + 1) or (..., new_d, new_h, new_w // 2 + 1)
        Spectrum scaled so that the inverse transform keeps the mean and every surviving wave's amplitude.

    Raises
    ------
    ShapeError
        If the spectrum does not belong to a box of `shape`, or the two shapes differ in length.

    Notes
    -----
    An even axis holds the waves +n/2 and -n/2 in one coefficient. Growing gives half of it to each; shrinking
    adds the two that become one. Waves are then sampled exactly, and growing before shrinking changes
    nothing.
    """
    ndim = len(shape)
    if len(new_shape) != ndim:
        raise ShapeError(f"a box of shape {tuple(shape)} cannot be resized to {tuple(new_shape)}")
    _check_spectrum(spectrum, shape, ndim)
    result = _resize_half_axis(spectrum, shape[-1], new_shape[-1], ndim)
    for axis in range(-ndim, -1):
        result = _resize_full_axis(result, new_shape[axis], axis)
    return result * (prod(new_shape) / prod(shape))


def resample(image: Tensor, *, new_shape: Sequence[int]) -> Tensor:
    """Resample images or volumes to other pixel counts over the same field by Fourier crop or padding.

    Parameters
    ----------
    image : Tensor (..., h, w) or (..., d, h, w)
        Real images or volumes.
    new_shape : sequence of 2 or 3 int
        Shape wanted; its length says whether the input is images or volumes.

    Returns
    -------
    Tensor (..., *new_shape)
        The same mean and scale; the origin, voxel ``n // 2``, stays the origin. Index 0 stays index 0 as well
        where old and new sizes are even.

    Examples
    --------
    >>> resample(torch.ones(8, 8), new_shape=(4, 4)).shape
    torch.Size([4, 4])
    """
    ndim = len(new_shape)
    shape = tuple(image.shape[-ndim:])
    resized = resize_spectrum(fft_centred(image, ndim=ndim), shape=shape, new_shape=new_shape)
    return ifft_centred(resized, shape=new_shape)


def phase_shift(spectrum: Tensor, *, shape: Sequence[int], shift_px: Tensor) -> Tensor:
    """Multiply half-spectra by exp(-2 pi i k.s), which moves the box by +s pixels.

    Parameters
    ----------
    spectrum : Tensor (..., h, w // 2 + 1) or (..., d, h, w // 2 + 1)
        Complex half-spectra, unshifted.
    shape : sequence of 2 or 3 int
        Shape of the box in real space.
    shift_px : Tensor (..., 2) or (..., 3)
        Shifts (x, y[, z]) in pixels; leading axes broadcast against those of `spectrum`.

    Returns
    -------
    Tensor, as the broadcast of spectrum and shifts
        Shifted half-spectra, of the spectrum's dtype. Differentiable in both arguments.
    """
    ndim = len(shape)
    _check_spectrum(spectrum, shape, ndim)
    if shift_px.shape[-1:] != (ndim,):
        raise ShapeError(f"shifts of a {ndim}D box need {ndim} components, not {tuple(shift_px.shape[-1:])}")
    # One factor per axis, in double precision: exact for large shifts, and no sine over the whole grid.
    shift = shift_px.to(device=spectrum.device, dtype=torch.float64)
    result = spectrum
    for component, axis in enumerate(range(-1, -ndim - 1, -1)):
        n = shape[axis]
        grid = torch.fft.rfftfreq if axis == -1 else torch.fft.fftfreq
        k = grid(n, device=spectrum.device, dtype=torch.float64)
        angle = -2 * torch.pi * shift[..., component, None] * k
        factor = torch.polar(torch.ones_like(angle), angle).to(spectrum.dtype)
        grid_axes = tuple(k.numel() if other == axis else 1 for other in _AXES[ndim])
        result = result * factor.reshape(factor.shape[:-1] + grid_axes)
    return result


def shift_image(image: Tensor, *, shift_px: Tensor) -> Tensor:
    """Move images (..., h, w) by `shift_px` (..., 2) pixels along (x, y), periodic, by Fourier interpolation.

    Examples
    --------
    >>> dot = torch.zeros(8, 8)
    >>> dot[2, 3] = 1
    >>> shift_image(dot, shift_px=torch.tensor([1.0, 2.0]))[4, 4].round().item()
    1.0
    """
    shape = tuple(image.shape[-2:])
    return irfft2(phase_shift(rfft2(image), shape=shape, shift_px=shift_px), shape=shape)


def _transform(name: str, data: Tensor, ndim: int, shape: Sequence[int] | None = None) -> Tensor:
    axes = _AXES[ndim]
    if data.ndim < ndim:
        raise ShapeError(f"a {ndim}D transform needs {ndim} axes or more, not shape {tuple(data.shape)}")
    size = None if shape is None else tuple(shape)
    if data.dtype not in _PRECISIONS:
        data = data.to(torch.float32)
    # On AMD CPUs scipy's pocketfft took 0.4 of torch's time; on Intel ones, where torch has MKL, 1 to 1.8 of
    # it forward and 0.6 to 1 backward. Only torch records gradients.
    if data.device.type == "cpu" and not (data.requires_grad and torch.is_grad_enabled()):
        array = data.detach().resolve_conj().resolve_neg().numpy()
        function: Callable = getattr(scipy.fft, name)
        return torch.from_numpy(function(array, s=size, axes=axes, workers=torch.get_num_threads()))
    return getattr(torch.fft, name)(data, s=size, dim=axes)


def _check_spectrum(spectrum: Tensor, shape: Sequence[int], ndim: int) -> None:
    if len(shape) != ndim or ndim not in (2, 3):
        raise ShapeError(f"a {ndim}D spectrum cannot belong to a box of shape {tuple(shape)}")
    expected = (*shape[:-1], shape[-1] // 2 + 1)
    if tuple(spectrum.shape[-ndim:]) != expected:
        raise ShapeError(
            f"a half-spectrum of shape {tuple(spectrum.shape)} is not that of a box of shape {tuple(shape)}",
            hint=f"its last axes should be {expected}",
        )


def _resize_half_axis(spectrum: Tensor, n: int, m: int, ndim: int) -> Tensor:
    if m == n:
        return spectrum
    columns = min(n, m) // 2 + 1
    result = spectrum.new_zeros((*spectrum.shape[:-1], m // 2 + 1))
    result[..., :columns] = spectrum[..., :columns]
    if min(n, m) % 2 == 0:
        nyquist = spectrum[..., columns - 1]
        if m > n:
            result[..., columns - 1] = nyquist / 2
        else:
            other = _AXES[ndim - 1]
            mirrored = torch.roll(torch.flip(nyquist, other), [1] * len(other), other).conj()
            result[..., columns - 1] = nyquist + mirrored
    return result


def _resize_full_axis(spectrum: Tensor, m: int, axis: int) -> Tensor:
    n = spectrum.shape[axis]
    if m == n:
        return spectrum
    small = min(n, m)
    positive, negative = (small + 1) // 2, (small - 1) // 2
    source = spectrum.movedim(axis, 0)
    result = source.new_zeros((m, *source.shape[1:]))
    result[:positive] = source[:positive]
    if negative:
        result[-negative:] = source[-negative:]
    if small % 2 == 0:
        half = small // 2
        if m > n:
            result[half] = result[m - half] = source[half] / 2
        else:
            result[half] = source[half] + source[n - half]
    return result.movedim(0, axis)
