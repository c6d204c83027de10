"""Matched filters of balls, shells and references, against plain correlation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from halfmap.io.micrographs import Image, coarser, flattened
from halfmap.steps.pick import template
from halfmap.steps.pick.blob import learn, peaks
from halfmap.steps.pick.extent import extent
from halfmap.steps.pick.filter import match, surrogate, whiten
from halfmap.steps.pick.obstacles import mask_obstacles
from halfmap.steps.pick.profiles import Profile, Shell, fit_shell
from halfmap.steps.pick.references import diameter_of, turned
from halfmap.steps.pick.template import best_of, components

PIXEL_A = 6.0


def _shell(shape, places, diameter, hollow=0.0):
    """Projections of balls or shells by their chords."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    image = np.zeros(shape)
    for px, py in places:
        r2 = ((x - px) ** 2 + (y - py) ** 2) * PIXEL_A**2
        image += 2 * np.sqrt(np.maximum((diameter / 2) ** 2 - r2, 0)) / diameter
        image -= 2 * np.sqrt(np.maximum((hollow * diameter / 2) ** 2 - r2, 0)) / diameter
    return image


def _micrograph(rng, diameter=120.0, hollow=0.0, n=60, contrast=1.2, size=300):
    places: list[tuple[float, float]] = []
    while len(places) < n:
        place = tuple(rng.uniform(5, size - 5, 2))
        if all(np.hypot(place[0] - x, place[1] - y) * PIXEL_A > diameter for x, y in places):
            places.append(place)
    image = rng.normal(size=(size, size)) - contrast * _shell((size, size), places, diameter, hollow)
    mask = np.ones(image.shape, bool)
    return Image(flattened(image.astype(np.float32), mask, 170), PIXEL_A, mask, None, (1, 1)), np.array(
        places
    )


def test_noise_scores_have_deviation_one_everywhere():
    rng = np.random.default_rng(0)
    noise = scipy.ndimage.gaussian_filter(rng.normal(size=(400, 500)), 0.8).astype(np.float32)
    mask = np.ones(noise.shape, bool)
    mask[100:160] = False
    white = whiten(Image(noise / noise.std() * mask, PIXEL_A, mask, None, (1, 1)), 240)
    template = Shell(120).transform(white.frequency).astype(np.float32)
    for each in (white, surrogate(white, rng)):
        score, coverage = match(each, template)
        inside = score[mask & (coverage > 0.95)]
        rim = score[mask & (coverage > 0.4) & (coverage < 0.7)]
        # Independent places: one a particle's area; 400 inside, fewer at the rims.
        assert inside.std() == pytest.approx(1, abs=0.15)
        assert rim.std() == pytest.approx(1, abs=0.25)


def test_a_match_is_the_correlation_with_the_filter():
    rng = np.random.default_rng(1)
    image, _ = _micrograph(rng, size=96, n=6)
    white = whiten(image, 240)
    template = Shell(100).transform(white.frequency).astype(np.float32)
    score, _ = match(white, template)
    kernel = np.fft.irfft2(template * white.ctf * np.sqrt(white.power) / white.noise, s=white.shape)
    kernel /= np.sqrt((kernel**2).sum())
    values = np.fft.irfft2(white.spectrum, s=white.shape)
    for y, x in ((40, 50), (48, 30)):
        moved = np.roll(kernel, (y, x), axis=(0, 1))
        covered = np.sqrt((moved[:96, :96] ** 2).sum())
        assert score[y, x] == pytest.approx((moved * values).sum() / covered, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(("diameter", "hollow"), [(130.0, 0.65), (180.0, 0.0)])
def test_size_and_hollowness_are_learned_from_noisy_images(diameter, hollow):
    rng = np.random.default_rng(2)
    images, places = zip(*(_micrograph(rng, diameter, hollow, n=40) for _ in range(2)), strict=True)
    particle = learn(images, smallest=80, largest=300)
    assert particle.diameter == pytest.approx(diameter, rel=0.1)
    assert (particle.hollow > 0.3) == (hollow > 0)
    found, _ = particle.search(images[0], rng)
    best = found.select(np.arange(40))
    gaps = np.hypot(best.x[:, None] - places[0][:, 0], best.y[:, None] - places[0][:, 1]).min(axis=0)
    assert (gaps < 4).mean() > 0.9


def _of_parts(rng, parts=60.0, size=300, n=20):
    """Micrograph of particles that are balls at the corners of octahedra, turned at random."""
    corners = np.concatenate([np.eye(3), -np.eye(3)]) * 75 / PIXEL_A
    places: list[NDArray] = []
    while len(places) < n:
        place = rng.uniform(20, size - 20, 2)
        if all(np.hypot(*(place - other)) * PIXEL_A > 230 for other in places):
            places.append(place)
    balls = [
        place + (corners @ turn.as_matrix().T)[:, :2]
        for place, turn in zip(places, Rotation.random(n, rng=rng), strict=True)
    ]
    image = rng.normal(size=(size, size)) - 2 * _shell((size, size), np.concatenate(balls), parts)
    mask = np.ones(image.shape, bool)
    flat = flattened(image.astype(np.float32), mask, 170)
    return Image(flat, PIXEL_A, mask, None, (1, 1)), np.array(places)


def test_parts_of_particles_are_not_taken_for_particles():
    rng = np.random.default_rng(8)
    images, places = zip(*(_of_parts(rng) for _ in range(3)), strict=True)
    particle = learn(images, smallest=60, largest=400)
    assert 170 < particle.diameter < 240  # balls of 60 Å, 75 Å from the middle
    found, _ = particle.search(images[0], rng)
    best = found.select(np.arange(20))
    gaps = np.hypot(best.x[:, None] - places[0][:, 0], best.y[:, None] - places[0][:, 1]).min(axis=0)
    assert (gaps < 6).mean() > 0.85


def test_signal_goes_on_as_far_as_particles_do():
    rng = np.random.default_rng(9)
    image, _ = _of_parts(rng)
    for size, least, most in ((60.0, 190.0, 320.0), (200.0, 190.0, 260.0)):
        white = whiten(coarser(image, size / 12), 2 * size)
        template = Shell(size, 0.0, 0.1).transform(white.frequency)
        found = peaks(white, template, size, 0.8)
        searched = [(white, found.select(found.score > 3.5))]
        assert least < extent(searched, size) < most, size


def test_bright_particles_are_found_when_they_are_asked_for():
    rng = np.random.default_rng(3)
    image, places = _micrograph(rng, n=40)
    bright = Image(-image.values, PIXEL_A, image.mask, None, (1, 1))
    particle = learn([bright], smallest=60, largest=300, diameter=120, sign=-1)
    found, _ = particle.search(bright, rng)
    best = found.select(np.arange(40))
    gaps = np.hypot(best.x[:, None] - places[:, 0], best.y[:, None] - places[:, 1]).min(axis=0)
    assert (gaps < 4).mean() > 0.9


def test_a_profile_gives_back_its_shell():
    k = np.arange(0, 0.05, 0.0005)
    shell = Shell(131.0, 0.65, 0.05)
    profile = Profile(k, shell.transform(k), np.full(len(k), 1e-6), 100)
    found = fit_shell(profile, 120.0)
    assert found.diameter == pytest.approx(131, rel=0.011)
    assert (found.hollow, found.blur) == (0.65, 0.05)


def test_large_dark_things_are_masked_and_particles_are_not():
    rng = np.random.default_rng(4)
    image, places = _micrograph(rng, n=30)
    y, x = np.mgrid[:300, :300]
    blob = (x - 220) ** 2 + (y - 80) ** 2 < 35**2
    dirty = Image(np.where(blob, image.values - 12, image.values), PIXEL_A, image.mask, None, (1, 1))
    masked = mask_obstacles(dirty, 120.0)
    assert not masked.mask[blob].any()
    # It has a radius of 35 pixels, a particle a diameter of 20.
    assert (~masked.mask).sum() < np.pi * (35 + 1.5 * 20) ** 2
    clean = mask_obstacles(image, 120.0)
    assert clean.mask[places[:, 1].astype(int), places[:, 0].astype(int)].all()


def test_components_score_as_all_kernels_do():
    rng = np.random.default_rng(5)
    image, _ = _micrograph(rng, size=80, n=5)
    white = whiten(image, 120)
    angles = np.arange(0, 360, 30.0)
    y, x = np.mgrid[-10:10, -10:10]
    bar = np.exp(-(x**2) / 40 - y**2 / 8) + 0.5 * np.exp(-((x - 4) ** 2) / 4 - (y - 3) ** 2 / 4)
    kernels = turned(bar[None].astype(np.float32), angles)[0]
    kernels = np.fft.ifftshift(kernels, axes=(1, 2))
    kernels /= np.sqrt((kernels**2).sum(axis=(1, 2), keepdims=True))
    parts, mixture = components(kernels.reshape(len(kernels), -1))
    assert len(parts) < len(kernels)
    score, best = best_of(white, parts.reshape(-1, 20, 20), mixture, "cpu")
    values = np.fft.irfft2(white.spectrum, s=white.shape)
    plain = np.empty((12, *white.shape))
    for i, kernel in enumerate(kernels):
        box = np.zeros(white.shape)
        box[:20, :20] = np.fft.fftshift(kernel)
        box = np.roll(box, (-10, -10), axis=(0, 1))
        plain[i] = np.fft.irfft2(np.fft.rfft2(values) * np.fft.rfft2(box).conj(), s=white.shape)
    expected = plain.max(axis=0)[:80, :80]
    # 2 % of the energy are left out, a seventh of the amplitude of noise at the most.
    assert np.sqrt(np.mean((score - expected) ** 2)) < 0.15
    chosen = np.take_along_axis(plain[:, :80, :80], best[None], axis=0)[0]
    assert np.sqrt(np.mean((chosen - expected) ** 2)) < 0.15


def test_a_turned_image_has_the_angle_of_its_pose():
    import torch

    from halfmap.ops.rotations import from_euler
    from halfmap.ops.slices import project_volume

    volume = torch.zeros(24, 24, 24)
    volume[12, 12, 18] = 1
    volume[12, 15, 12] = 0.6
    volume = torch.from_numpy(scipy.ndimage.gaussian_filter(volume.numpy(), 1.5))
    poses = from_euler(torch.tensor([[0.0, 0, 0], [0, 0, 40]]))
    plain, expected = project_volume(volume, poses).numpy()
    found = turned(plain[None], np.array([40.0]))[0, 0]
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.995


def test_the_diameter_of_references_is_where_they_fade():
    image = _shell((64, 64), [(32, 32)], 150.0).astype(np.float32)
    assert diameter_of(image[None], PIXEL_A) == pytest.approx(150, abs=2 * PIXEL_A)


def test_strips_of_a_micrograph_score_as_the_whole(monkeypatch):
    rng = np.random.default_rng(4)
    image, _ = _micrograph(rng, n=30)
    white = whiten(image, 150.0)
    kernels = rng.normal(size=(12, 20, 20)).astype(np.float32)
    kernels /= np.sqrt(np.sum(kernels**2, axis=(1, 2), keepdims=True))
    parts, mixture = components(kernels.reshape(12, -1))
    parts = parts.reshape(-1, 20, 20)
    whole, best = best_of(white, parts, mixture, "cpu")
    monkeypatch.setattr(template, "_MAPS_BYTES", 4 * len(parts) * 300 * 37)
    score, again = best_of(white, parts, mixture, "cpu")
    np.testing.assert_allclose(score, whole, atol=1e-4)
    assert (again == best).mean() > 0.999


@pytest.mark.parametrize(("n", "side"), [(40, 12), (300, 12)])
def test_components_in_a_random_subspace_are_the_exact_ones(monkeypatch, n, side):
    rng = np.random.default_rng(5)
    smooth = scipy.ndimage.gaussian_filter(rng.normal(size=(n, side, side)), (0, 2, 2)).astype(np.float32)
    kernels = smooth.reshape(n, -1)
    values = np.linalg.svd(kernels.astype(float), compute_uv=False) ** 2
    exact, mixture = components(kernels)
    held = np.sum((kernels @ exact.T) ** 2) / np.sum(kernels**2)
    assert held == pytest.approx(values[: len(exact)].sum() / values.sum(), abs=1e-5)
    assert held >= 0.98
    np.testing.assert_allclose(exact @ exact.T, np.eye(len(exact)), atol=1e-4)
    monkeypatch.setattr(template, "_EXACT", 0)
    monkeypatch.setattr(template, "_MOST", 30)
    found, again = components(kernels)
    assert len(found) == len(exact) <= 30
    # The same span, in which signs are free.
    np.testing.assert_allclose(found.T @ found, exact.T @ exact, atol=2e-2)
    np.testing.assert_allclose(again @ again.T, mixture @ mixture.T, atol=2e-2)
