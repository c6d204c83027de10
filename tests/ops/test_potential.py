"""Potentials of atoms against the analytic transform of their scattering factors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from halfmap.errors import ShapeError
from halfmap.io.models import scattering_coefficients
from halfmap.ops import fourier, grids
from halfmap.ops.potential import POTENTIAL_V_A2, atomic_volume, projected_atoms, scattering_factor


def gaussians(element: str) -> torch.Tensor:
    return torch.tensor(np.stack(scattering_coefficients(element), axis=-1))


def exact_spectrum(positions, elements, b_factors, shape, pixel_size) -> torch.Tensor:
    """Sum of f(k) exp(-B k² / 4) exp(-2 pi i k.r), atom by atom."""
    k = grids.frequencies(shape, pixel_size, dtype=torch.float64)
    length = k.norm(dim=-1)
    total = torch.zeros(length.shape, dtype=torch.complex128)
    for position, element, b in zip(positions, elements, b_factors, strict=True):
        factor = scattering_factor(gaussians(element), length.flatten()).reshape(length.shape)
        phase = -2 * math.pi * (k * position[: len(shape)].double()).sum(-1)
        total += (
            POTENTIAL_V_A2
            * factor
            * torch.exp(-b * length**2 / 4)
            * torch.polar(torch.ones_like(phase), phase)
        )
    return torch.where(length < 0.5 / pixel_size * (1 - 1e-6), total, 0)


POSITIONS = torch.tensor([[1.3, -2.2, 0.7], [-3.1, 4.4, 2.05], [0.0, 0.0, -5.5]])
ELEMENTS, B_FACTORS = ("C", "O", "S"), (0.0, 20.0, 80.0)


@pytest.mark.parametrize("shape", [(32, 32, 32), (24, 30, 36), (32, 40)])
def test_the_potential_is_the_exact_fourier_series_of_the_atoms(shape):
    pixel_size = 0.9
    arguments = {
        "coefficients": torch.stack([gaussians(element) for element in ELEMENTS]),
        "b_factors": torch.tensor(B_FACTORS),
        "shape": shape,
        "pixel_size": pixel_size,
    }
    box = (atomic_volume if len(shape) == 3 else projected_atoms)(POSITIONS, **arguments)
    spectrum = fourier.fft_centred(box.double(), ndim=len(shape)) * pixel_size ** len(shape)
    exact = exact_spectrum(POSITIONS, ELEMENTS, B_FACTORS, shape, pixel_size)
    # Gaussians are cut at 1e-5 of their peak and aliased by 1e-4 at Nyquist.
    assert (spectrum - exact).abs().max() < 2e-4 * exact.abs().max()


def test_the_projected_potential_of_carbon_has_the_analytic_integral_and_peak():
    carbon, b, pixel_size = gaussians("C"), 30.0, 0.4
    image = projected_atoms(
        torch.zeros(1, 3),
        coefficients=carbon[None],
        b_factors=torch.tensor([b]),
        shape=(64, 64),
        pixel_size=pixel_size,
    )
    total = POTENTIAL_V_A2 * 2.5088
    assert float(image.sum()) * pixel_size**2 == pytest.approx(total, rel=1e-4)
    peak = POTENTIAL_V_A2 * float((carbon[:, 0] * 4 * math.pi / (carbon[:, 1] + b)).sum())
    # What lies beyond Nyquist at B = 30 Å² is the tail exp(-b k² / 4) at k = 1.25 1/Å, below 1e-5.
    assert float(image[32, 32]) == pytest.approx(peak, rel=1e-4)


def test_a_projection_is_the_volume_summed_along_z():
    rng = np.random.default_rng(1)
    positions = torch.tensor(rng.uniform(-8, 8, (50, 3)))
    arguments = {
        "coefficients": gaussians("N").repeat(50, 1, 1),
        "b_factors": torch.tensor(rng.uniform(5, 60, 50)),
        "pixel_size": 1.0,
    }
    volume = atomic_volume(positions, shape=(40, 40, 40), **arguments)
    image = projected_atoms(positions, shape=(40, 40), **arguments)
    assert torch.allclose(volume.sum(0), image, atol=2e-3 * float(image.max()))


def test_coefficients_of_other_atoms_are_refused():
    with pytest.raises(ShapeError, match="do not fit"):
        atomic_volume(torch.zeros(2, 3), coefficients=torch.zeros(3, 5, 2), shape=(8, 8, 8), pixel_size=1.0)
    with pytest.raises(ShapeError, match="B-factors"):
        projected_atoms(
            torch.zeros(2, 3),
            coefficients=torch.zeros(2, 5, 2),
            b_factors=torch.zeros(3),
            shape=(8, 8),
            pixel_size=1.0,
        )
