"""Spherical harmonics of volumes, and how much of a volume turning about each axis leaves in place."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln, lpmv
from torch import Tensor

from halfmap.errors import ParameterError
from halfmap.ops.interpolation import sample_volume


def expand(volume: Tensor, *, radii_px: Tensor, degree: int) -> list[Tensor]:
    """Expand a volume in spherical harmonics on shells about its origin, voxel ``n // 2``.

    Parameters
    ----------
    volume : Tensor (d, h, w)
        Real volume.
    radii_px : Tensor (r,)
        Radii of the shells in voxels.
    degree : int
        Highest degree.

    Returns
    -------
    list of Tensor (2 l + 1, r), complex128
        For each degree l from 0 coefficients of the orders -l to l: f = sum of f_lm Y_lm, orthonormal
        harmonics with the Condon-Shortley phase.

    Notes
    -----
    Gauss-Legendre nodes in latitude and evenly spaced longitudes, exact up to twice the degree.
    """
    nodes, weights = np.polynomial.legendre.leggauss(degree + 1)
    longitudes = 2 * math.pi * np.arange(2 * degree + 2) / (2 * degree + 2)
    sine = np.sqrt(1 - nodes**2)
    directions = np.stack(
        np.broadcast_arrays(
            sine[:, None] * np.cos(longitudes), sine[:, None] * np.sin(longitudes), nodes[:, None]
        ),
        axis=-1,
    )
    origin = torch.tensor([n // 2 for n in volume.shape[::-1]], dtype=torch.float64)
    places = origin + radii_px.double()[:, None, None, None] * torch.from_numpy(directions)
    shells = sample_volume(volume.cpu(), places, method="cubic").double().numpy()
    waves = np.fft.fft(shells, axis=-1) * (2 * math.pi / len(longitudes))
    coefficients = []
    for ell, table in enumerate(_legendre(degree)):
        orders = np.arange(-ell, ell + 1)
        weighted = table * weights
        coefficients.append(torch.from_numpy(np.einsum("mt,rtm->mr", weighted, waves[..., orders])))
    return coefficients


def axial_power(coefficients: list[Tensor], *, tilts: NDArray[np.float64], n_rot: int) -> NDArray[np.float64]:
    """Power of each wave number around every axis of a grid.

    Parameters
    ----------
    coefficients : list of Tensor (2 l + 1, r)
        As `expand` gives them, each shell times the square root of its weight.
    tilts : array (t,)
        Angles of the axes from z in degrees.
    n_rot : int
        Longitudes of the axes, evenly spaced from 0.

    Returns
    -------
    array (t, n_rot, degree + 1)
        Power of the waves exp(±i m a) for the angle a about the axis, of m = 0 to the highest degree. Turning
        by the angle a about the axis correlates the volume with itself by the sum of power times cos(m a).
    """
    degree = len(coefficients) - 1
    angles = np.deg2rad(tilts)
    rots = 2 * np.pi * np.arange(n_rot) / n_rot
    waves = np.zeros((2 * degree + 1, len(tilts), degree + 1), np.complex128)
    for ell, values in enumerate(coefficients):
        product = (values @ values.conj().T).numpy()
        # Real volumes hold every order with its opposite; those from 0 up suffice.
        d = rotation_y(ell, angles)[:, :, ell:]
        twice = np.where(np.arange(ell + 1) > 0, 2, 1)
        for apart in range(2 * ell + 1):
            # Pairs of orders of one difference turn with the longitude as one.
            pairs = d[:, apart:] * d[:, : 2 * ell + 1 - apart]
            waves[apart, :, : ell + 1] += twice * np.einsum("tkm,k->tm", pairs, np.diagonal(product, -apart))
    waves[1:] *= 2
    return np.einsum(
        "atm,fa->tfm", waves, np.exp(1j * rots[:, None] * np.arange(len(waves))), optimize=True
    ).real


def rotation_y(degree: int, angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Wigner's small d of turning about y by `angles` in radians: (a, 2 l + 1, 2 l + 1), orders -l to l.

    Notes
    -----
    exp(-i angle J_y) from the eigenvectors of J_y, which is stable at every degree (Feng et al. 2015,
    DOI 10.1103/PhysRevE.92.043307).
    """
    values, vectors = _angular_momentum(degree)
    phases = np.exp(-1j * np.asarray(angles)[:, None] * values)
    return ((vectors * phases[:, None, :]) @ vectors.conj().T).real


@lru_cache(maxsize=64)
def _angular_momentum(degree: int) -> tuple[NDArray[np.float64], NDArray[np.complex128]]:
    """Eigenvalues and eigenvectors of J_y."""
    m = np.arange(-degree, degree)
    raising = np.diag(np.sqrt(degree * (degree + 1) - m * (m + 1)), -1)
    values, vectors = np.linalg.eigh((raising - raising.T) / 2j)
    return np.rint(values), vectors


@lru_cache(maxsize=8)
def _legendre(degree: int) -> list[NDArray[np.float64]]:
    """Normalised associated Legendre functions at the nodes, by degree: (2 l + 1, nodes)."""
    if not 0 <= degree <= 60:
        raise ParameterError(f"spherical harmonics go to degree 60 here, not {degree}")
    nodes, _ = np.polynomial.legendre.leggauss(degree + 1)
    tables = []
    for ell in range(degree + 1):
        m = np.arange(ell + 1)[:, None]
        logarithm = math.log((2 * ell + 1) / (4 * math.pi)) + gammaln(ell - m + 1) - gammaln(ell + m + 1)
        positive = np.exp(logarithm / 2) * lpmv(m, ell, nodes)
        negative = (-1.0) ** m[:0:-1] * positive[:0:-1]
        tables.append(np.concatenate([negative, positive]))
    return tables
