"""Image formation, ice and damage against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.random import SeedSequence

from halfmap.ops import fourier, grids
from halfmap.ops.ctf import ctf, odd_aberration_phase
from halfmap.ops.dose import critical_dose
from halfmap.steps.simulate.damage import attenuation
from halfmap.steps.simulate.ice import (
    FlowingIce,
    decay_rate,
    fading,
    noise_amplitude,
    potential_spectrum,
    structure_factor,
    white_noise,
)
from halfmap.steps.simulate.optics import Defocus, Microscope
from halfmap.units import interaction_constant

SHAPE, PIXEL = (96, 96), 1.5
DEFOCUS = Defocus(15200.0, 14600.0, 25.0)


def microscope(**changes) -> Microscope:
    settings = {
        "voltage_kV": 300.0,
        "cs_mm": 2.7,
        "amplitude_contrast": 0.1,
        "phase_shift": 0.0,
        "focal_spread": 0.0,
        "convergence_mrad": 0.0,
        "b_factor": 0.0,
        "image_model": "weak-phase",
    }
    return Microscope(**{**settings, **changes})


def blob(height_V_A: float) -> torch.Tensor:
    return height_V_A * torch.exp(-0.5 * (grids.radius(SHAPE, PIXEL) / 12) ** 2)


def test_a_weak_phase_image_is_the_ctf_times_twice_the_phase():
    phase = interaction_constant(300.0) * blob(100.0)
    given = {"pixel_size": PIXEL, "voltage_kV": 300.0, "cs_mm": 2.7}
    transfer = ctf(
        SHAPE, defocus_u=15200.0, defocus_v=14600.0, defocus_angle=25.0, amplitude_contrast=0.1, **given
    ) * odd_aberration_phase(SHAPE, beam_tilt_mrad=(0.3, -0.2), **given)
    expected = -2 / math.sqrt(0.99) * fourier.fft_centred(phase, ndim=2) * transfer
    found = microscope().contrast(blob(100.0), pixel_size=PIXEL, defocus=DEFOCUS, beam_tilt_mrad=(0.3, -0.2))
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def test_protein_is_dark_in_an_underfocused_micrograph():
    spectrum = microscope().contrast(blob(300.0), pixel_size=PIXEL, defocus=DEFOCUS)
    image = fourier.ifft_centred(spectrum, shape=SHAPE)
    assert image[48, 48] < -0.05
    assert image[48, 48] == image.min()


@pytest.mark.parametrize("height", [1.0, 10.0])
def test_the_phase_object_tends_to_the_weak_phase_image(height):
    weak = microscope().contrast(blob(height), pixel_size=PIXEL, defocus=DEFOCUS)
    full = microscope(image_model="phase-object").contrast(blob(height), pixel_size=PIXEL, defocus=DEFOCUS)
    phase = interaction_constant(300.0) * height
    # The next term of exp(i phase) is the square of the phase.
    difference = fourier.ifft_centred(full - weak, shape=SHAPE).abs().max()
    assert difference < 3 * phase**2 + 1e-7
    assert difference > 0.1 * phase**2


def test_a_phase_object_conserves_electrons_but_for_its_absorption():
    potential = blob(1500.0)
    without = microscope(amplitude_contrast=0.0, image_model="phase-object")
    change = without.contrast(potential, pixel_size=PIXEL, defocus=DEFOCUS)[0, 0].real
    assert abs(float(change)) < 1e-3 * float((interaction_constant(300.0) * potential).sum())
    absorbing = microscope(amplitude_contrast=0.1, image_model="phase-object")
    change = absorbing.contrast(potential, pixel_size=PIXEL, defocus=DEFOCUS)[0, 0].real
    loss = (torch.exp(-2 * absorbing.absorption * interaction_constant(300.0) * potential) - 1).sum()
    assert float(change) == pytest.approx(float(loss), rel=1e-3)


def test_envelopes_are_those_of_wade_and_frank():
    k, wavelength = 0.25, 0.0196875
    grid = grids.frequency_radius(SHAPE, PIXEL)
    index = np.unravel_index(int((grid - k).abs().argmin()), grid.shape)
    k = float(grid[index])
    temporal = microscope(focal_spread=70.0).envelope(SHAPE, PIXEL, 15000.0)[index]
    assert float(temporal) == pytest.approx(
        math.exp(-0.5 * (math.pi * wavelength * 70 * k**2) ** 2), rel=1e-4
    )
    slope = 2.7e7 * wavelength**3 * k**3 - 15000 * wavelength * k
    spatial = microscope(convergence_mrad=0.02).envelope(SHAPE, PIXEL, 15000.0)[index]
    assert float(spatial) == pytest.approx(math.exp(-((math.pi * 2e-5 / wavelength * slope) ** 2)), rel=1e-3)
    assert float(microscope(b_factor=50.0).envelope(SHAPE, PIXEL, 0.0)[index]) == pytest.approx(
        math.exp(-50 * k**2 / 4), rel=1e-5
    )


def test_damage_is_the_average_of_what_is_left_during_the_exposure():
    k = torch.tensor([0.0, 0.02, 0.1, 0.3], dtype=torch.float64)
    moments = torch.linspace(20, 24, 4001, dtype=torch.float64)[:, None]
    left = torch.exp(-moments / (2 * critical_dose(k, voltage_kV=200.0)))
    average = torch.trapezoid(left, moments, dim=0) / 4
    assert torch.allclose(attenuation(k, start=20.0, end=24.0, voltage_kV=200.0), average, atol=1e-7)


def test_exposures_add_up():
    k = torch.linspace(0, 0.4, 50)
    parts = [attenuation(k, start=4.0 * i, end=4.0 * (i + 1), voltage_kV=300.0) for i in range(10)]
    assert torch.allclose(torch.stack(parts).mean(0), attenuation(k, start=0.0, end=40.0, voltage_kV=300.0))


def test_ice_scatters_like_independent_molecules_far_out_and_hardly_at_long_waves():
    assert float(structure_factor(torch.tensor(0.02))) == pytest.approx(0.05, abs=1e-3)
    assert float(structure_factor(torch.tensor(1.5))) == pytest.approx(1.0, abs=1e-6)
    k = torch.linspace(0.15, 0.35, 2001)
    assert 1 / float(k[structure_factor(k).argmax()]) == pytest.approx(3.7, abs=0.1)
    k = torch.tensor([1.5], dtype=torch.float64)
    assert float(potential_spectrum(k, 200.0)) == pytest.approx(2 * float(potential_spectrum(k, 100.0)))


def test_noise_of_the_ice_has_its_power_and_the_zeros_of_the_ctf():
    """Power of a thin slab: (2 sigma)² P(k) CTF², with white noise of power 1 per pixel."""
    flat = Defocus(15000.0, 15000.0, 0.0)
    amplitude = noise_amplitude(SHAPE, pixel_size=PIXEL, microscope=microscope(), defocus=flat, thickness=1.0)
    k = grids.frequency_radius(SHAPE, PIXEL)
    transfer = ctf(
        SHAPE,
        pixel_size=PIXEL,
        defocus_u=15000.0,
        defocus_v=15000.0,
        defocus_angle=0.0,
        voltage_kV=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.1,
    )
    power = potential_spectrum(k.flatten().double(), 1.0).reshape(k.shape)
    expected = 2 * interaction_constant(300.0) / math.sqrt(0.99) / PIXEL * power.sqrt() * transfer.abs()
    expected[0, 0] = 0
    # The table over frequency has 4096 entries, 1e-4 1/Å apart, across the peak of the structure factor.
    assert torch.allclose(amplitude.double(), expected, atol=5e-3 * float(expected.max()))


def test_thick_ice_fills_the_zeros():
    k = grids.frequency_radius(SHAPE, PIXEL)
    thin, thick = (
        noise_amplitude(SHAPE, pixel_size=PIXEL, microscope=microscope(), defocus=DEFOCUS, thickness=t)
        / potential_spectrum(k.flatten(), t).sqrt().reshape(k.shape)
        for t in (1.0, 1500.0)
    )
    # There sinc(lambda k² thickness) is below 0.25, so powers vary between 0.75 and 1.25 of their mean.
    ring = (k - 0.25).abs() < 0.03
    assert thin[ring].min() < 0.05 * thin[ring].max()
    assert thick[ring].min() > 0.75 * thick[ring].max()


def test_white_noise_has_variance_one():
    noise = white_noise((200, 240), np.random.default_rng(1))
    image = fourier.irfft2(torch.from_numpy(noise), shape=(200, 240))
    assert float(image.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / image.numel()))
    assert float(image.mean(dim=0).var()) == pytest.approx(1 / 200, rel=0.5)


def test_flowing_ice_forgets_as_molecules_diffuse():
    """Averages of an Ornstein-Uhlenbeck process over successive intervals, from its covariance exp(-x)."""
    shape, dose, n = (32, 32), 1.5, 2500
    ice = FlowingIce(shape, pixel_size=2.0, dose_per_frame=dose, seed=SeedSequence(6))
    frames = np.stack([ice.next() for _ in range(n)])[:, 1:, 1:-1] / np.sqrt(shape[0] * shape[1])
    x = (decay_rate(grids.frequency_radius(shape, 2.0, dtype=torch.float64)) * dose).numpy()[1:, 1:-1]
    variance = 2 * (x - 1 + np.exp(-x)) / x**2
    neighbours = ((1 - np.exp(-x)) / x) ** 2
    measured = np.square(np.abs(frames)).mean(axis=0)
    lag = (frames[1:] * frames[:-1].conj()).real.mean(axis=0)
    # Correlated frames: about n x / 2 independent ones for slow waves.
    error = np.sqrt(1 / (n * np.minimum(1, x / 2)))
    assert np.all(np.abs(measured - variance) < 5 * error)
    assert np.all(np.abs(lag - neighbours) < 5 * error)
    assert (measured / variance).mean() == pytest.approx(1, abs=0.01)
    fine = fading(grids.frequency_radius(shape, 2.0), dose)[1:, 1:-1]
    assert np.allclose(fine**2, variance, rtol=1e-4)
