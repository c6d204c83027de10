"""Unit marks for parameters, and the physical constants, each in one place."""

from __future__ import annotations

from typing import Literal, get_args

Unit = Literal[
    "Å",
    "Å²",
    "1/Å",
    "px",
    "°",
    "nm",
    "mm",
    "mrad",
    "kV",
    "eV",
    "e/Å²",
    "kDa",
    "Å/px",
    "s",
    "min",
    "h",
    "GB",
    "%",
    "g/cm³",
    "none",
]
"""Units a parameter may state; ``none`` says that it has none."""

UNITS: tuple[str, ...] = get_args(Unit)

PLANCK_J_s = 6.62607015e-34
ELEMENTARY_CHARGE_C = 1.602176634e-19
ELECTRON_MASS_kg = 9.1093837015e-31
SPEED_OF_LIGHT_m_per_s = 299_792_458.0
ELECTRON_REST_ENERGY_eV = 510_998.95


def electron_wavelength(voltage_kV: float) -> float:
    """Relativistic wavelength of an electron in Å after acceleration through `voltage_kV`.

    Examples
    --------
    >>> round(electron_wavelength(300.0), 6)
    0.019687
    """
    energy_J = voltage_kV * 1e3 * ELEMENTARY_CHARGE_C
    momentum = (
        2 * ELECTRON_MASS_kg * energy_J * (1 + energy_J / (2 * ELECTRON_MASS_kg * SPEED_OF_LIGHT_m_per_s**2))
    ) ** 0.5
    return PLANCK_J_s / momentum * 1e10


def interaction_constant(voltage_kV: float) -> float:
    """Phase in radian that one V·Å of projected potential gives an electron at `voltage_kV`.

    Notes
    -----
    sigma = 2 pi (m0 c² + e V) / (lambda e V (2 m0 c² + e V)); Kirkland, Advanced Computing in Electron
    Microscopy, 2010, eq. 5.6 (DOI 10.1007/978-1-4419-6533-2).
    """
    energy_eV = voltage_kV * 1e3
    rest = ELECTRON_REST_ENERGY_eV
    return (
        2
        * 3.141592653589793
        / (electron_wavelength(voltage_kV) * energy_eV)
        * (rest + energy_eV)
        / (2 * rest + energy_eV)
    )
