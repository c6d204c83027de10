"""The likelihood of shifts: kernels against plain sums, gradients, spectra and information against truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfmap.ops.dose import critical_dose
from halfmap.steps.motion.likelihood import (
    Band,
    Spectrum,
    _TorchSpectra,
    damage_of,
    make_band,
    measure_spectrum,
    patch_spectra,
    smear_of,
)

PIXEL = 3.0
P, N = 3, 5


def band_of(shape: tuple[int, int] = (24, 30), *, low: float = 0.0, high: float = 0.14) -> Band:
    return make_band(shape, pixel_size=PIXEL, low=low, high=high)


def random_patches(shape: tuple[int, int], *, p: int = P, n: int = N, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(p, n, *shape)).astype(np.float32)


def random_damage(n_rings: int, n: int = N) -> np.ndarray:
    return np.random.default_rng(2).uniform(0.2, 1, (n, n_rings))


def random_steps(p: int = P, n: int = N, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 4, (p, n, 2))


def with_zero(by_ring: np.ndarray) -> np.ndarray:
    return np.concatenate([by_ring, np.zeros((*by_ring.shape[:-1], 1))], axis=-1)


class Plain:
    """All of the band's sums over whole spectra in double precision, coefficient after coefficient."""

    def __init__(self, patches: np.ndarray, band: Band, shift: np.ndarray) -> None:
        self.band, (h, w) = band, band.shape
        self.ky, self.kx = np.meshgrid(np.fft.fftfreq(h, PIXEL), np.fft.fftfreq(w, PIXEL), indexing="ij")
        # Rings of the half-spectrum, at every coefficient of the whole one.
        half = np.full((h, w // 2 + 1), band.n_rings)
        half[np.ix_(band.rows, band.columns)] = band.ring
        other = half[(-np.arange(h)) % h][:, (-np.arange(w // 2 + 1, w)) % w]
        self.ring = np.concatenate([half, other], axis=1)
        phase = 2 * np.pi * (shift[..., 0, None, None] * self.kx + shift[..., 1, None, None] * self.ky)
        self.spectra = np.fft.fft2(patches.astype(np.float64)) * np.exp(1j * phase)

    def by_ring(self, values: np.ndarray) -> np.ndarray:
        """Half of the sum over the whole spectrum."""
        return np.stack(
            [values[..., self.ring == ring].sum(axis=-1) / 2 for ring in range(self.band.n_rings)], axis=-1
        )

    def aligned(self, damage: np.ndarray) -> np.ndarray:
        return (self.spectra * with_zero(damage)[:, self.ring]).sum(axis=1)

    def likelihood(self, weights: np.ndarray, damage: np.ndarray) -> float:
        return float((weights * self.by_ring(np.abs(self.aligned(damage)) ** 2)).sum())


def body_of(name: str, patches: np.ndarray, band: Band):
    return patch_spectra(patches, band, "cpu") if name == "compiled" else _TorchSpectra(patches, band, "cpu")


@pytest.mark.parametrize("shape", [(24, 30), (25, 30), (24, 31), (27, 21)], ids=str)
@pytest.mark.parametrize("body", ["compiled", "torch"])
def test_sums_of_both_bodies_are_those_of_a_plain_one(shape, body):
    # All there is, with the Nyquist frequency, whose column stands for itself in even sizes.
    band = band_of(shape, high=1.0)
    patches, damage = random_patches(shape), random_damage(band.n_rings)
    spectra = body_of(body, patches, band)
    still = Plain(patches, band, np.zeros((P, N, 2)))
    expected = still.by_ring(np.abs(still.spectra) ** 2).mean(axis=1)
    assert np.allclose(spectra.power(), expected, rtol=1e-5)
    found = spectra.turn(np.zeros((P, N, 2)), damage)
    assert np.allclose(found, still.by_ring(np.abs(still.aligned(damage)) ** 2), rtol=1e-5)


@pytest.mark.parametrize("shape", [(24, 30), (25, 31)], ids=str)
@pytest.mark.parametrize("body", ["compiled", "torch"])
def test_turns_add_up(shape, body):
    # Waves of the Nyquist frequency cannot be moved by parts of a pixel.
    band = band_of(shape, low=0.02, high=0.16)
    patches, damage = random_patches(shape), random_damage(band.n_rings)
    spectra = body_of(body, patches, band)
    first, second = random_steps(), random_steps(seed=4)
    spectra.turn(first, damage[::-1].copy())
    found = spectra.turn(second, damage)
    moved = Plain(patches, band, first + second)
    expected = moved.by_ring(np.abs(moved.aligned(damage)) ** 2)
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.max())


@pytest.mark.parametrize("body", ["compiled", "torch"])
def test_gradients_are_the_slopes_of_the_likelihood(body):
    shape = (25, 31)
    band = band_of(shape, low=0.02)
    patches, damage = random_patches(shape), random_damage(band.n_rings)
    weights = np.random.default_rng(5).uniform(0.1, 1, (P, band.n_rings)) / 1e4
    spectra = body_of(body, patches, band)
    at, step = random_steps(), 1e-3
    spectra.turn(at, damage)
    found = spectra.gradients(weights, damage)
    for p, f, axis in [(0, 0, 0), (0, 0, 1), (1, 3, 0), (1, 3, 1), (2, 4, 0), (2, 4, 1)]:
        values = []
        for sign in (1, -1):
            moved = at.copy()
            moved[p, f, axis] += sign * step
            values.append(Plain(patches, band, moved).likelihood(weights, damage))
        slope = (values[0] - values[1]) / (2 * step)
        assert found[p, f, axis] == pytest.approx(slope, rel=1e-3, abs=1e-4 * np.abs(found).max())
    # A common shift of all frames changes nothing.
    assert np.abs(found.sum(axis=1)).max() < 1e-4 * np.abs(found).max()


def test_torch_and_compiled_bodies_agree():
    band = band_of((32, 40), low=0.01)
    patches, damage = random_patches((32, 40)), random_damage(band.n_rings)
    weights = np.random.default_rng(5).uniform(0.1, 1, (P, band.n_rings))
    ours, torchs = patch_spectra(patches, band, "cpu"), _TorchSpectra(patches, band, "cpu")
    assert type(ours) is not type(torchs)
    assert np.allclose(ours.power(), torchs.power(), rtol=1e-5)
    for seed in (3, 4):
        steps = random_steps(seed=seed)
        assert np.allclose(ours.turn(steps, damage), torchs.turn(steps, damage), rtol=1e-4)
        a, b = ours.gradients(weights, damage), torchs.gradients(weights, damage)
        assert np.abs(a - b).max() < 1e-4 * np.abs(a).max()


@pytest.mark.parametrize("shape", [(16, 16), (17, 16), (16, 17), (21, 12)], ids=str)
def test_rings_count_every_wave_once(shape):
    low, high = 0.03, 0.6 / PIXEL
    band = band_of(shape, low=low, high=high)
    ky, kx = np.meshgrid(*(np.fft.fftfreq(side, PIXEL) for side in shape), indexing="ij")
    k = np.hypot(ky, kx)
    inside = (k >= low) & (k <= high)
    # A wave and its complex conjugate are one.
    assert band.members.sum() == pytest.approx(inside.sum() / 2)
    width = 1 / (PIXEL * max(shape))
    number = np.rint(k / width).astype(int)
    rings = np.unique(number[inside])
    assert band.n_rings == len(rings)
    for ring, members, centre in zip(rings, band.members, band.centre, strict=True):
        of_ring = inside & (number == ring)
        assert members == pytest.approx(of_ring.sum() / 2)
        assert centre == pytest.approx(k[of_ring].mean())
        assert abs(centre / width - ring) <= 0.5
    assert band.ring.max() <= band.n_rings


def test_the_mean_of_a_patch_is_never_compared():
    band = band_of((16, 20), low=0.0)
    assert band.ring[0, 0] == band.n_rings
    assert band.centre.min() >= 0.5 / (PIXEL * 20)


def simulate(
    rng: np.random.Generator,
    shape: tuple[int, int],
    band: Band,
    signal: np.ndarray,
    noise: np.ndarray,
    damage: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
) -> np.ndarray:
    """Patches (p, n, h, w) of noise and of specimens displaced by shift (p, n, 2), of given spectra."""
    h, w = shape
    ky, kx = np.fft.fftfreq(h, PIXEL)[:, None], np.fft.rfftfreq(w, PIXEL)
    ring = np.full((h, w // 2 + 1), band.n_rings)
    ring[np.ix_(band.rows, band.columns)] = band.ring
    p, n = len(scale), len(damage)
    # White noise of unit variance has the power h w.
    specimen = np.fft.rfft2(rng.normal(size=(p, 1, h, w))) / np.sqrt(h * w)
    own = np.fft.rfft2(rng.normal(size=(p, n, h, w))) / np.sqrt(h * w)
    phase = np.exp(-2j * np.pi * (shift[..., 0, None, None] * kx + shift[..., 1, None, None] * ky))
    seen = specimen * np.sqrt(with_zero(scale * signal)[:, ring])[:, None] * phase
    spectra = seen * with_zero(damage)[:, ring] + own * np.sqrt(with_zero(noise)[ring])
    return np.fft.irfft2(spectra, s=shape).astype(np.float32)


def spectra_of(band: Band, *, level: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """A specimen that gets weaker towards fine detail, and coloured noise."""
    return level * np.exp(-((band.centre / 0.08) ** 2)) + 1e-3, 1.0 + 4 * band.centre


@pytest.mark.parametrize("level", [0.05, 0.5, 3.0])
def test_spectra_of_specimen_and_noise_are_found(level):
    shape, p, n = (48, 48), 30, 12
    band = band_of(shape, low=0.01)
    signal, noise = spectra_of(band, level=level)
    # Fine detail is gone after the first few frames, as it is after real doses.
    damage = damage_of(band.centre, np.arange(n) * 4.0 + 2, voltage_kV=300.0)
    shift = random_steps(p, n)
    patches = simulate(
        np.random.default_rng(7), shape, band, signal, noise, damage, np.ones((p, band.n_rings)), shift
    )
    spectra = patch_spectra(patches, band, "cpu")
    power = spectra.power()
    found = measure_spectrum(spectra.turn(shift, damage), power, band, damage)
    # Neighbouring rings are averaged, and the innermost have few members.
    outer = slice(4, -1)
    mean_noise, mean_signal = found.noise.mean(axis=0), found.signal.mean(axis=0)
    assert np.allclose(mean_noise[outer], noise[outer], rtol=0.1)
    assert mean_noise[outer].mean() == pytest.approx(noise[outer].mean(), rel=0.02)
    spread = noise / np.square(damage).sum(0) + signal
    error = 3.5 * spread / np.sqrt(p * band.members)
    assert np.all(np.abs(mean_signal - signal)[outer] < (error + 0.08 * signal)[outer])
    strong = signal > 0.3 * signal.max()
    ratio = (band.members * mean_signal)[strong].sum() / (band.members * signal)[strong].sum()
    assert ratio == pytest.approx(1, abs=0.06)


def test_signal_is_not_overrated_where_only_the_first_frames_have_any():
    """E|Z|² and E|Y|² themselves, without chance, give back the spectra they were made of."""
    band = band_of((48, 48), low=0.01)
    signal, noise = spectra_of(band)
    signal = np.full_like(signal, 0.2)
    damage = damage_of(band.centre, np.arange(20) * 3.0 + 1.5, voltage_kV=300.0)
    q2 = np.square(damage).sum(0)
    aligned = (band.members * q2 * (noise + signal * q2))[None]
    power = (band.members * (noise + signal * np.square(damage).mean(0)))[None]
    found = measure_spectrum(aligned, power, band, damage)
    assert np.allclose(found.signal, signal, rtol=1e-6)
    assert np.allclose(found.noise, noise, rtol=1e-6)


def test_power_of_each_patch_is_found():
    shape, n = (64, 64), 10
    band = band_of(shape, low=0.01)
    signal, noise = spectra_of(band, level=1.0)
    damage = np.ones((n, band.n_rings))
    scale = np.tile([[2.0], [1.5], [0.4], [0.1]], (4, band.n_rings))
    still = np.zeros((len(scale), n, 2))
    patches = simulate(np.random.default_rng(7), shape, band, signal, noise, damage, scale, still)
    spectra = patch_spectra(patches, band, "cpu")
    found = measure_spectrum(spectra.turn(still, damage), spectra.power(), band, damage)
    # An octave about 0.06 1/Å has hundreds of waves.
    middle = int(np.argmin(np.abs(band.centre - 0.06)))
    by_kind = found.signal[:, middle].reshape(4, 4).mean(axis=0)
    assert by_kind / by_kind.mean() == pytest.approx(scale[:4, 0], rel=0.1, abs=0.02)
    assert found.signal.min() > 0


def test_noise_of_each_patch_is_found():
    shape, n = (64, 64), 10
    band = band_of(shape, low=0.01)
    signal, noise = spectra_of(band, level=1.0)
    damage = np.ones((n, band.n_rings))
    still = np.zeros((8, n, 2))
    patches = simulate(
        np.random.default_rng(9), shape, band, signal, noise, damage, np.ones((8, band.n_rings)), still
    )
    quiet = simulate(
        np.random.default_rng(9), shape, band, signal, 0 * noise, damage, np.ones((8, band.n_rings)), still
    )
    louder = np.where(np.arange(8) % 2, 3.0, 1.0).astype(np.float32)
    patches = quiet + louder[:, None, None, None] * (patches - quiet)
    spectra = patch_spectra(patches, band, "cpu")
    found = measure_spectrum(spectra.turn(still, damage), spectra.power(), band, damage)
    expected = np.square(louder)[:, None] * noise
    outer = slice(4, -1)
    assert np.allclose(found.noise[:, outer].mean(axis=1), expected[:, outer].mean(axis=1), rtol=0.06)


def test_noise_alone_gives_hardly_any_weight():
    shape, p, n = (48, 48), 9, 8
    band = band_of(shape, low=0.01)
    damage = np.ones((n, band.n_rings))
    patches = random_patches(shape, p=p, n=n)
    spectra = patch_spectra(patches, band, "cpu")
    found = measure_spectrum(spectra.turn(np.zeros((p, n, 2)), damage), spectra.power(), band, damage)
    assert np.all(found.signal < 0.1 * found.noise)
    assert np.allclose(found.noise.mean(), 48 * 48, rtol=0.03)
    assert np.isfinite(found.signal).all()
    assert np.isfinite(found.information(band, damage)).all()


def test_information_is_the_mean_curvature_of_the_likelihood():
    """At the true displacements: covariance of gradients and their slope against them, patch by patch."""
    shape, p, n = (32, 32), 400, 4
    band = band_of(shape, low=0.02, high=0.12)
    signal, noise = spectra_of(band, level=0.6)
    damage = np.exp(-np.arange(n)[:, None] * band.centre * 5)
    truth = random_steps(p, n)
    scale = np.tile([[1.0], [0.3]], (p // 2, band.n_rings))
    patches = simulate(np.random.default_rng(8), shape, band, signal, noise, damage, scale, truth)
    spectra = patch_spectra(patches, band, "cpu")
    known = Spectrum(scale * signal, np.broadcast_to(noise, scale.shape))
    weights = known.weights(damage)
    spectra.turn(truth, damage)
    gradient = spectra.gradients(weights, damage)
    information = known.information(band, damage)
    assert np.allclose(information.sum(axis=-1), 0, atol=1e-9 * information.max())
    step = np.zeros((p, n, 2))
    step[:, 1, 0] = step[:, 1, 1] = 0.1
    spectra.turn(step, damage)
    ahead = spectra.gradients(weights, damage)
    spectra.turn(-2 * step, damage)
    curvature = (spectra.gradients(weights, damage) - ahead) / 0.2
    for kind in (0, 1):
        expected = information[kind]
        some = slice(kind, None, 2)
        # 400 gradients have a covariance to 7 % of the largest.
        covariance = np.einsum("pfx,pgx->fg", gradient[some], gradient[some]) / p
        assert np.abs(covariance - expected).max() < 0.2 * expected.max()
        measured = curvature[some].mean(axis=(0, 2))
        assert np.abs(measured - expected[1]).max() < 0.08 * expected[1].max()


def test_damage_has_its_limits():
    centre = np.array([0.02, 0.1, 0.2])
    left = damage_of(centre, np.array([0.0, 5.0, 50.0]), voltage_kV=300.0)
    assert np.allclose(left[0], 1)
    assert np.all(np.diff(left, axis=0) < 0)
    assert np.all(np.diff(left[1:], axis=1) < 0)
    at_critical = critical_dose(torch.tensor(0.1)).item()
    assert damage_of(centre, np.array([at_critical]), voltage_kV=300.0)[0, 1] == pytest.approx(np.exp(-0.5))
    assert np.all(
        damage_of(centre, np.array([5.0]), voltage_kV=200.0)
        < damage_of(centre, np.array([5.0]), voltage_kV=300.0)
    )


def test_smear_has_its_limits():
    centre = np.array([0.01, 0.05, 0.1, 0.16])
    still = np.zeros((5, 2))
    assert np.allclose(smear_of(centre, still), 1)
    steady = np.arange(5)[:, None] * np.array([3.0, 4.0])
    smeared = smear_of(centre, steady)
    # 5 Å along one direction: 1 - (pi k 5)² / 6 in the mean of cos² for coarse waves.
    assert np.allclose(smeared[:, 0], 1 - (np.pi * 0.05) ** 2 / 12, atol=1e-4)
    assert np.all(np.diff(smeared, axis=1) < 0)
    angles = np.linspace(0, 2 * np.pi, 3600, endpoint=False)
    for k, value in zip(centre, smeared[2], strict=True):
        assert value == pytest.approx(np.sinc(5 * k * np.cos(angles)).mean(), abs=1e-3)
    assert np.all(smear_of(centre, 100 * steady) >= 0)
    # Only frames next to a jump are smeared by it.
    jump = np.repeat([[0.0, 0.0], [8.0, 0.0]], 4, axis=0)
    one = smear_of(centre, jump)
    assert np.allclose(one[[1, 2, 5, 6]], 1)
    assert np.all(one[[3, 4]] < 1)
