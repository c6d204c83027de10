"""Fourier shell and ring correlation, resolution at a threshold, correction for what a mask correlates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops.fourier import irfft3, rfft2, rfft3
from halfmap.ops.grids import ring_index, ring_sums


def fsc(a: Tensor, b: Tensor) -> Tensor:
    """Fourier shell correlation of volumes in real space.

    Parameters
    ----------
    a, b : Tensor (..., d, h, w)
        Two volumes, or two batches that broadcast.

    Returns
    -------
    Tensor (..., max(d, h, w) // 2 + 1)
        Correlation from -1 to 1 of each shell up to Nyquist, in the dtype of the volumes.

    Raises
    ------
    ShapeError
        If the volumes differ in size.

    See Also
    --------
    shell_correlation : the same from half-spectra.

    References
    ----------
    .. [1] Harauz G, van Heel M. Exact filters for general geometry three dimensional reconstruction. Optik
       73, 146-156 (1986).

    Examples
    --------
    >>> volume = torch.arange(512.0).reshape(8, 8, 8).sin()
    >>> fsc(volume, 2 * volume).round()
    tensor([1., 1., 1., 1., 1.])
    """
    _check_same(a, b, 3)
    return shell_correlation(rfft3(a), rfft3(b), shape=a.shape[-3:])


def frc(a: Tensor, b: Tensor) -> Tensor:
    """Fourier ring correlation (..., max(h, w) // 2 + 1) of images (..., h, w) in real space; see `fsc`."""
    _check_same(a, b, 2)
    return shell_correlation(rfft2(a), rfft2(b), shape=a.shape[-2:])


def shell_correlation(a: Tensor, b: Tensor, *, shape: Sequence[int]) -> Tensor:
    """Correlation of two half-spectra, ring by ring or shell by shell.

    Parameters
    ----------
    a, b : Tensor (..., h, w // 2 + 1) or (..., d, h, w // 2 + 1), complex
        Half-spectra, plain or centred alike.
    shape : sequence of 2 or 3 int
        Shape of the box in real space.

    Returns
    -------
    Tensor (..., max(shape) // 2 + 1)
        Real correlation per ring of `grids.ring_index` up to Nyquist; 0 where a spectrum has no power.

    Notes
    -----
    Sums run in float64 over the full spectrum: a coefficient whose Friedel mate is not stored counts twice.
    RELION counts every stored coefficient once, which gives those at kx = 0 double weight.
    """
    cross = ring_sums(a.real * b.real + a.imag * b.imag, shape=shape)
    power_a = ring_sums(a.real.square() + a.imag.square(), shape=shape)
    power_b = ring_sums(b.real.square() + b.imag.square(), shape=shape)
    norm = (power_a * power_b).sqrt()
    return torch.where(norm > 0, cross / norm.where(norm > 0, 1.0), 0.0).to(a.real.dtype)


def resolution(curve: Tensor, *, pixel_size: float, box: int, threshold: float = 0.143) -> float:
    """Resolution in Å at which a correlation first falls below a threshold.

    Parameters
    ----------
    curve : Tensor (n,)
        Correlation of the shells 0 to n - 1; not a number counts as 0.
    pixel_size : float
        In Å.
    box : int
        Longest side of the box in pixels: shell i is the frequency i / (box * pixel_size).
    threshold : float
        0.143 for half maps, 0.5 for a map against a reference.

    Returns
    -------
    float
        Resolution in Å, linear in frequency between shells. That of the last shell if the curve never falls
        below the threshold, infinite if it is below from shell 1 on.

    References
    ----------
    .. [1] Rosenthal PB, Henderson R. J Mol Biol 333, 721-745 (2003). DOI 10.1016/j.jmb.2003.07.013

    Examples
    --------
    >>> resolution(torch.tensor([1.0, 0.5, 0.0]), pixel_size=1.0, box=10, threshold=0.25)
    6.666666666666667
    """
    if curve.ndim != 1 or curve.numel() < 2:
        raise ShapeError(
            f"a correlation curve has one axis of two shells or more, not shape {tuple(curve.shape)}"
        )
    values = curve.nan_to_num(nan=0.0).tolist()
    # Shell 0 is the mean density: of maps with zero mean its correlation is that of rounding errors.
    below = next((i for i in range(1, len(values)) if values[i] < threshold), None)
    if below is None:
        return box * pixel_size / (len(values) - 1)
    if below == 1:
        return float("inf")
    above = values[below - 1]
    shell = below - 1 + (above - threshold) / (above - values[below])
    return box * pixel_size / shell


def phase_randomise(volume: Tensor, *, from_shell: int, generator: torch.Generator | None = None) -> Tensor:
    """Replace the phases of volumes from a shell on by random ones, keeping every amplitude.

    Parameters
    ----------
    volume : Tensor (..., d, h, w)
        Real volumes.
    from_shell : int
        First shell of `grids.ring_index` whose phases are replaced.
    generator : torch.Generator, optional
        Source of the random phases, on the volume's device.

    Returns
    -------
    Tensor (..., d, h, w)
        Volumes with the same power everywhere and the same phases below `from_shell`.

    Notes
    -----
    The phases are those of the transform of real white noise, so that they are uniform and Friedel mates stay
    conjugate.
    """
    shape = volume.shape[-3:]
    spectrum = rfft3(volume)
    noise = torch.randn(volume.shape, generator=generator, device=volume.device, dtype=volume.dtype)
    random = rfft3(noise)
    random = random * (spectrum.abs() / random.abs().clamp_(min=torch.finfo(volume.dtype).tiny))
    beyond = ring_index(shape, device=volume.device) >= from_shell
    return irfft3(torch.where(beyond, random, spectrum), shape=shape)


class CorrectedFSC(NamedTuple):
    """Curves (n_shells,) of two half maps before and after a mask, and the masked one corrected."""

    unmasked: Tensor
    masked: Tensor
    randomised: Tensor
    corrected: Tensor
    from_shell: int
    """First shell with random phases."""


def corrected_fsc(
    half1: Tensor,
    half2: Tensor,
    *,
    mask: Tensor,
    randomise_below: float = 0.8,
    draws: int = 1,
    generator: torch.Generator | None = None,
) -> CorrectedFSC:
    """FSC of masked half maps, corrected for the correlation that the mask itself brings.

    Phases of both maps are randomised from the shell on where the unmasked FSC falls below `randomise_below`.
    What correlation FSC_n the mask gives to these is taken from that of the masked maps, FSC_t: (FSC_t -
    FSC_n) / (1 - FSC_n), from two shells later on.

    Parameters
    ----------
    half1, half2 : Tensor (d, h, w)
        Unregularised, unmasked half maps.
    mask : Tensor (d, h, w)
        Soft mask from 0 to 1.
    randomise_below : float
        Value of the unmasked FSC below which phases are randomised.
    draws : int
        Times that phases are drawn; what the mask correlates is the mean.
    generator : torch.Generator, optional
        Source of the random phases.

    Returns
    -------
    CorrectedFSC
        Unmasked, masked, randomised and corrected curve, and the shell of randomisation. Where the unmasked
        curve never falls below the value nothing is randomised and the corrected curve is the masked one.

    Raises
    ------
    ShapeError
        If maps and mask differ in size.

    References
    ----------
    .. [1] Chen S et al. High-resolution noise substitution to measure overfitting and validate resolution in
       3D structure determination by single particle electron cryomicroscopy. Ultramicroscopy 135, 24-35
       (2013). DOI 10.1016/j.ultramic.2013.06.004
    """
    if not 0 < randomise_below < 1:
        raise ParameterError(f"phases cannot be randomised below an FSC of {randomise_below}", hint="0 to 1")
    _check_same(half1, half2, 3)
    _check_same(half1, mask, 3)
    unmasked = fsc(half1, half2)
    masked = fsc(half1 * mask, half2 * mask)
    fallen = (unmasked[1:] < randomise_below).nonzero()
    if not len(fallen):
        return CorrectedFSC(unmasked, masked, masked, masked, len(unmasked))
    start = int(fallen[0]) + 1
    randomised = torch.zeros_like(masked)
    for _ in range(draws):
        random1, random2 = (
            phase_randomise(half, from_shell=start, generator=generator) for half in (half1, half2)
        )
        randomised += fsc(random1 * mask, random2 * mask) / draws
    # The next two shells still hold signal that the mask smears out of those before them.
    corrected = masked.clone()
    corrected[start + 2 :] = ((masked - randomised) / (1 - randomised))[start + 2 :]
    return CorrectedFSC(unmasked, masked, randomised, corrected, start)


def _check_same(a: Tensor, b: Tensor, ndim: int) -> None:
    if a.ndim < ndim or a.shape[-ndim:] != b.shape[-ndim:]:
        raise ShapeError(f"{ndim}D boxes of shape {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
