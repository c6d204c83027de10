"""Contrast transfer function and phases of odd aberrations in RELION's signs, for one image or a batch."""

# Why not torch-ctf (0.6): it casts wavelength and phase to float32 whatever the input (error of the CTF
# 3.5e-4 at 0.85 Å/px, 4096 px, 3 µm, against 8.5e-6 here; gradients cannot be checked in double), its odd
# Zernike terms are the bare monomials and not RELION's polynomials, and it took 0.96 s for 4096 x 4096 pixels
# where this takes 0.04 s. Here all aberrations are one polynomial of the frequency whose large one-axis terms
# are reduced in double precision.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import factorial
from typing import cast

import torch
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.units import electron_wavelength

_Polynomial = dict[tuple[int, int], Tensor]
"""Coefficients (...,) in double precision of x**i * y**j by their powers (i, j)."""


def ctf(
    shape: Sequence[int] | Tensor,
    *,
    pixel_size: float | Tensor,
    defocus_u: float | Tensor,
    defocus_v: float | Tensor,
    defocus_angle: float | Tensor,
    voltage_kV: float | Tensor,
    cs_mm: float | Tensor,
    amplitude_contrast: float | Tensor,
    phase_shift: float | Tensor = 0.0,
    b_factor: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
    magnification: Tensor | None = None,
    even_zernike: Tensor | Sequence[float] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Contrast transfer function of an image, positive at low frequency in underfocus.

    The phase of the lens is a polynomial of the frequency: defocus and astigmatism of degree 2, spherical
    aberration of degree 4, Zernike terms of any even degree. It is differentiable in every parameter.

    Parameters
    ----------
    shape : (h, w) or Tensor (m, 2)
        Shape of the image in real space, whose half-spectrum is filled; or frequencies (kx, ky) in 1/px.
    pixel_size : float or Tensor (...,)
        In Å; this and all further numbers broadcast against each other to the batch of the result.
    defocus_u, defocus_v : float or Tensor (...,)
        Defocus in Å along the two principal axes, positive in underfocus.
    defocus_angle : float or Tensor (...,)
        Angle in degrees from the x axis towards y to the axis of `defocus_u`.
    voltage_kV, cs_mm : float or Tensor (...,)
        Acceleration voltage in kV, spherical aberration in mm.
    amplitude_contrast : float or Tensor (...,)
        Fraction of amplitude contrast, 0 to 1.
    phase_shift : float or Tensor (...,)
        Of a phase plate, in degrees.
    b_factor : float or Tensor (...,)
        Envelope exp(-B k² / 4), in Å².
    scale : float or Tensor (...,)
        Factor on the whole CTF.
    magnification : Tensor (..., 2, 2), optional
        Anisotropic magnification (``rlnMagMat00`` to ``11``): takes frequencies of the image to true ones.
    even_zernike : Tensor (..., n) or sequence of float, optional
        Symmetric aberrations in radian, in the order of ``rlnEvenZernike``; see `zernike_index`.
    device : optional
        Of the result; by default that of the first tensor among the parameters, else the CPU.

    Returns
    -------
    Tensor (..., h, w // 2 + 1) or (..., m)
        CTF, float32 unless a parameter is a float64 tensor.

    Raises
    ------
    ShapeError
        If `shape` is not that of an image or a matrix is not 2 by 2.

    Notes
    -----
    CTF = sin(chi) with chi = pi lambda D(k) k² - pi/2 Cs lambda³ k⁴ + phase shift + asin(amplitude contrast)
    - the Zernike sum. RELION keeps values away from zero by 1e-8, this does not. In the row of the Nyquist
    frequency of an even height ky is negative here, while RELION has it positive: astigmatic values differ in
    that row alone.

    References
    ----------
    .. [1] Rohou A, Grigorieff N. CTFFIND4. J Struct Biol 192, 216-221 (2015). DOI 10.1016/j.jsb.2015.08.008
    .. [2] Zivanov J, Nakane T, Scheres SHW. Estimation of high-order aberrations and anisotropic
       magnification from cryo-EM data sets in RELION-3.1. IUCrJ 7, 253-267 (2020). DOI
       10.1107/S2052252520000081

    Examples
    --------
    >>> optics = dict(voltage_kV=300, cs_mm=2.7, amplitude_contrast=0.1)
    >>> values = ctf((64, 64), pixel_size=1.5, defocus_u=15e3, defocus_v=14e3, defocus_angle=30.0, **optics)
    >>> values.shape, round(values[0, 0].item(), 6)
    (torch.Size([64, 33]), 0.1)
    """
    given = [
        pixel_size,
        defocus_u,
        defocus_v,
        defocus_angle,
        voltage_kV,
        cs_mm,
        amplitude_contrast,
        phase_shift,
    ]
    device, dtype = _device_and_dtype([*given, b_factor, scale, magnification, even_zernike], device)
    pixel, df_u, df_v, angle, voltage, cs, contrast, plate = (_double(value, device) for value in given)
    x, y = _true_frequency(pixel, magnification, device)
    r2 = _sum([_product(x, x), _product(y, y)])
    chi = _defocus_and_spherical(x, y, r2, df_u, df_v, angle, _wavelength(voltage), cs)
    chi = _sum([chi, {(0, 0): torch.deg2rad(plate) + torch.asin(contrast)}])
    if even_zernike is not None:
        chi = _sum([chi, _times(_zernike_sum(even_zernike, 0, x, y, r2, device), -1.0)])
    result = torch.sin(_evaluate(chi, shape, dtype, wrap=True))
    if isinstance(b_factor, Tensor) or b_factor != 0:
        decay = _times(r2, -0.25 * _double(b_factor, device))
        result = result * torch.exp(_evaluate(decay, shape, dtype))
    if isinstance(scale, Tensor) or scale != 1:
        axes = (None,) if isinstance(shape, Tensor) else (None, None)
        result = result * _double(scale, device)[..., *axes].to(dtype)
    return result


def odd_aberration_phase(
    shape: Sequence[int] | Tensor,
    *,
    pixel_size: float | Tensor,
    voltage_kV: float | Tensor,
    cs_mm: float | Tensor,
    beam_tilt_mrad: Tensor | Sequence[float] | None = None,
    odd_zernike: Tensor | Sequence[float] | None = None,
    magnification: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Phase factor of the antisymmetric aberrations: FT of image = FT of projection * CTF * this factor.

    Parameters
    ----------
    shape : (h, w) or Tensor (m, 2)
        As for `ctf`.
    pixel_size, voltage_kV, cs_mm, magnification, device
        As for `ctf`.
    beam_tilt_mrad : Tensor (..., 2) or two floats, optional
        Beam tilt (x, y) in mrad, as ``rlnBeamTiltX`` and ``rlnBeamTiltY``.
    odd_zernike : Tensor (..., n) or sequence of float, optional
        Antisymmetric aberrations in radian, in the order of ``rlnOddZernike``; see `zernike_index`. Where
        both are given they add up.

    Returns
    -------
    Tensor (..., h, w // 2 + 1) or (..., m)
        Complex factors of modulus 1; multiply by the conjugate to remove the aberration from an image.

    Notes
    -----
    The phase is -2 pi Cs lambda² k² (b.k) for a beam tilt b in radian, plus the Zernike sum. The sign is
    RELION's, whose version 3.1 however drops Zernike terms (3, ±1) where a beam tilt is given too. The
    coefficients at the Nyquist frequency of an even axis stand for both signs of the frequency, so that an
    odd phase cannot be represented there.

    References
    ----------
    .. [1] Zivanov J, Nakane T, Scheres SHW. IUCrJ 7, 253-267 (2020). DOI 10.1107/S2052252520000081
    .. [2] Glaeser RM, Typke D, Tiemeijer PC, Pulokas J, Cheng A. J Struct Biol 174, 1-10 (2011).
       DOI 10.1016/j.jsb.2010.12.005
    """
    given = [pixel_size, voltage_kV, cs_mm]
    device, dtype = _device_and_dtype([*given, beam_tilt_mrad, odd_zernike, magnification], device)
    pixel, voltage, cs = (_double(value, device) for value in given)
    x, y = _true_frequency(pixel, magnification, device)
    r2 = _sum([_product(x, x), _product(y, y)])
    phase: _Polynomial = {(0, 0): torch.zeros((), dtype=torch.float64, device=device)}
    if beam_tilt_mrad is not None:
        tilt = _double(beam_tilt_mrad, device)
        coma = _product(r2, _sum([_times(x, tilt[..., 0]), _times(y, tilt[..., 1])]))
        phase = _sum([phase, _times(coma, -2e-3 * torch.pi * cs * 1e7 * _wavelength(voltage) ** 2)])
    if odd_zernike is not None:
        phase = _sum([phase, _zernike_sum(odd_zernike, 1, x, y, r2, device)])
    angle = _evaluate(phase, shape, dtype, wrap=True)
    return torch.complex(torch.cos(angle), torch.sin(angle))


def ctf_1d(
    frequency: Tensor,
    *,
    defocus: float | Tensor,
    voltage_kV: float | Tensor,
    cs_mm: float | Tensor,
    amplitude_contrast: float | Tensor,
    phase_shift: float | Tensor = 0.0,
    b_factor: float | Tensor = 0.0,
) -> Tensor:
    """CTF without astigmatism at given frequencies; signs and units as `ctf`.

    Parameters
    ----------
    frequency : Tensor (n,)
        Spatial frequencies in 1/Å.
    defocus, voltage_kV, cs_mm, amplitude_contrast, phase_shift, b_factor : float or Tensor (...,)
        Parameters, in Å, kV, mm, fraction, degrees, Å².

    Returns
    -------
    Tensor (..., n)
        CTF in the dtype of `frequency`.

    Examples
    --------
    >>> ctf_1d(torch.zeros(1), defocus=1e4, voltage_kV=300, cs_mm=2.7, amplitude_contrast=0.07).item()
    0.07000000029802322
    """
    given = [defocus, voltage_kV, cs_mm, amplitude_contrast, phase_shift, b_factor]
    df, voltage, cs, contrast, plate, b = (_double(value, frequency.device)[..., None] for value in given)
    wavelength = _wavelength(voltage)
    k2 = frequency.to(torch.float64).square()
    chi = torch.pi * wavelength * df * k2 - 0.5e7 * torch.pi * cs * wavelength**3 * k2.square()
    chi = chi + torch.deg2rad(plate) + torch.asin(contrast)
    return (torch.sin(chi) * torch.exp(-b / 4 * k2)).to(frequency.dtype)


def zernike_index(n: int, m: int) -> int:
    """Place of the Zernike polynomial of degree `n` and azimuthal order `m` in RELION's coefficient lists.

    Even degrees are counted in ``rlnEvenZernike``, odd ones in ``rlnOddZernike``; m > 0 is cos(m phi), m < 0
    is sin(-m phi). Two-fold astigmatism is (2, ±2), defocus (2, 0), tetrafoil (4, ±4), coma of a beam tilt
    (3, ±1), trefoil (3, ±3). Radius is the frequency in 1/Å, not a fraction of an aperture.

    Examples
    --------
    >>> zernike_index(4, -4), zernike_index(4, 4), zernike_index(3, -3), zernike_index(3, 3)
    (4, 8, 2, 5)
    """
    if n < 0 or abs(m) > n or (n - m) % 2:
        raise ParameterError(f"there is no Zernike polynomial of degree {n} and order {m}")
    k = n // 2
    return k * k + k + ((m + n) // 2 if n % 2 else m // 2)


def _device_and_dtype(
    values: Sequence, device: torch.device | str | None
) -> tuple[torch.device, torch.dtype]:
    tensors = [value for value in values if isinstance(value, Tensor)]
    if device is None:
        device = tensors[0].device if tensors else "cpu"
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.device(device), torch.float64 if double else torch.float32


def _double(value: float | Tensor | Sequence[float], device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=device)


def _wavelength(voltage_kV: Tensor) -> Tensor:
    # The formula is plain arithmetic, so that it takes double-precision tensors too.
    return cast(Tensor, electron_wavelength(cast(float, voltage_kV)))


def _defocus_and_spherical(
    x: _Polynomial,
    y: _Polynomial,
    r2: _Polynomial,
    df_u: Tensor,
    df_v: Tensor,
    angle: Tensor,
    wavelength: Tensor,
    cs: Tensor,
) -> _Polynomial:
    mean, half = (df_u + df_v) / 2, (df_u - df_v) / 2
    cos, sin = half * torch.cos(2 * torch.deg2rad(angle)), half * torch.sin(2 * torch.deg2rad(angle))
    defocus = _sum(
        [
            _times(_product(x, x), mean + cos),
            _times(_product(y, y), mean - cos),
            _times(_product(x, y), 2 * sin),
        ]
    )
    spherical = _times(_product(r2, r2), -0.5e7 * cs * wavelength**2)
    return _times(_sum([defocus, spherical]), torch.pi * wavelength)


def _true_frequency(
    pixel: Tensor, magnification: Tensor | None, device: torch.device
) -> tuple[_Polynomial, _Polynomial]:
    """Undistorted frequencies in 1/Å as polynomials of those of the image in 1/px."""
    if magnification is None:
        return {(1, 0): 1 / pixel}, {(0, 1): 1 / pixel}
    if magnification.shape[-2:] != (2, 2):
        raise ShapeError(f"magnification must be 2 by 2 matrices, not of shape {tuple(magnification.shape)}")
    matrix = _double(magnification, device) / pixel[..., None, None]
    return (
        {(1, 0): matrix[..., 0, 0], (0, 1): matrix[..., 0, 1]},
        {(1, 0): matrix[..., 1, 0], (0, 1): matrix[..., 1, 1]},
    )


def _zernike_sum(
    coefficients: Tensor | Sequence[float],
    parity: int,
    x: _Polynomial,
    y: _Polynomial,
    r2: _Polynomial,
    device: torch.device,
) -> _Polynomial:
    """Sum of coefficient * R_n^|m|(r) * cos or sin(|m| phi); r^m cos and sin are parts of (x + i y)^m."""
    values = _double(coefficients, device)
    one: _Polynomial = {(0, 0): torch.ones((), dtype=torch.float64, device=device)}
    powers = [one]
    harmonics = [(one, _times(one, 0.0))]
    terms = []
    for (n, m), value in zip(_orders(parity), values.unbind(-1), strict=False):
        while len(harmonics) <= abs(m):
            cos, sin = harmonics[-1]
            cos, sin = (
                _sum([_product(cos, x), _times(_product(sin, y), -1.0)]),
                _sum([_product(cos, y), _product(sin, x)]),
            )
            harmonics.append((cos, sin))
        angular = harmonics[abs(m)][0 if m >= 0 else 1]
        for power, factor in _radial(n, abs(m)):
            while len(powers) <= power:
                powers.append(_product(powers[-1], r2))
            terms.append(_times(_product(powers[power], angular), factor * value))
    return _sum(terms)


def _orders(parity: int) -> Iterator[tuple[int, int]]:
    """Degrees and azimuthal orders (n, m) in the order of RELION's lists."""
    n = parity
    while True:
        yield from ((n, m) for m in range(-n, n + 1, 2))
        n += 2


def _radial(n: int, m: int) -> Iterator[tuple[int, float]]:
    """Powers of r² and their factors in R_n^m(r) / r^m."""
    for k in range((n - m) // 2 + 1):
        factor = (-1) ** k * factorial(n - k)
        factor /= factorial(k) * factorial((n + m) // 2 - k) * factorial((n - m) // 2 - k)
        yield (n - m) // 2 - k, factor


def _product(a: _Polynomial, b: _Polynomial) -> _Polynomial:
    return _sum([{(i + k, j + m): u * v} for (i, j), u in a.items() for (k, m), v in b.items()])


def _times(a: _Polynomial, factor: float | Tensor) -> _Polynomial:
    return {power: value * factor for power, value in a.items()}


def _sum(polynomials: Sequence[_Polynomial]) -> _Polynomial:
    result: _Polynomial = {}
    for polynomial in polynomials:
        for power, value in polynomial.items():
            result[power] = result[power] + value if power in result else value
    return result


def _evaluate(
    polynomial: _Polynomial, shape: Sequence[int] | Tensor, dtype: torch.dtype, *, wrap: bool = False
) -> Tensor:
    """Values (..., h, w // 2 + 1) or (..., m) of a polynomial of frequencies in 1/px, up to whole turns.

    Terms in x alone and y alone hold nearly all of a phase of hundreds of radian. They are summed on their
    axis in double precision and wrapped to one turn, so that the grid needs single precision only.
    """
    if isinstance(shape, Tensor):
        x, y = shape.double().unbind(-1)
        powers = torch.stack([x**i * y**j for i, j in polynomial])
        values = torch.stack(torch.broadcast_tensors(*polynomial.values()), dim=-1) @ powers
        return (torch.remainder(values, 2 * torch.pi) if wrap else values).to(dtype)
    if len(shape) != 2:
        raise ShapeError(f"an image has two axes, not shape {tuple(shape)}")
    device = next(iter(polynomial.values())).device
    kx = torch.fft.rfftfreq(shape[1], dtype=torch.float64, device=device)
    ky = torch.fft.fftfreq(shape[0], dtype=torch.float64, device=device)
    rows: dict[int, Tensor] = {}
    column = torch.zeros_like(ky)
    for (i, j), value in polynomial.items():
        if i == 0 and j > 0:
            column = column + value[..., None] * ky**j
        else:
            rows[j] = rows.get(j, 0.0) + value[..., None] * kx**i
    row = rows.pop(0, torch.zeros_like(kx))
    if wrap:
        row, column = torch.remainder(row, 2 * torch.pi), torch.remainder(column, 2 * torch.pi)
    result = row[..., None, :].to(dtype) + column[..., :, None].to(dtype)
    for j, mixed in rows.items():
        result = torch.addcmul(result, (ky**j)[:, None].to(dtype), mixed[..., None, :].to(dtype))
    return result
