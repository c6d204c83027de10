"""Images turned, moved and buried in noise on purpose, and what is found of that."""

from __future__ import annotations

import math

import pytest
import torch

from halfmap.ops.fourier import rfft2
from halfmap.ops.masks import soft_circle
from halfmap.search.polar import PolarGrid
from halfmap.search.template_bias import (
    aligned,
    averages,
    best_matches,
    common_signal,
    correlation,
    random_phases,
)

BOX = 40
GRID = PolarGrid(BOX, 16, 16.0)
SPOTS = (((0.0, 9.0), (6.0, -3.0), (-7.0, -5.0)), ((-9.0, 0.0), (3.0, 1.0), (7.0, 5.0), (2.0, -8.0)))


def figure(spots, turn: float = 0.0, shift=(0.0, 0.0)) -> torch.Tensor:
    """Spots turned by an angle in radians from x towards y, then moved."""
    axis = torch.arange(BOX) - BOX // 2
    image = torch.zeros(BOX, BOX)
    for a, b in spots:
        x = a * math.cos(turn) - b * math.sin(turn) + shift[0]
        y = a * math.sin(turn) + b * math.cos(turn) + shift[1]
        image += torch.exp(-((axis - x).square() + (axis[:, None] - y).square()) / 5)
    return image


TEMPLATES = GRID.sample(torch.stack([figure(spots) for spots in SPOTS]))
MASK = soft_circle((BOX, BOX), radius=14, edge=2)


def match(images: torch.Tensor, radius: int = 8):
    samples = GRID.sample(images)
    ctf, noise = torch.ones_like(samples.real), torch.ones(GRID.rings)
    return samples, best_matches(samples, ctf, noise, TEMPLATES, GRID, radius=radius, range_px=3)


@pytest.mark.parametrize(("number", "place"), [(0, 7), (1, 30), (1, 51)])
def test_a_match_says_how_an_image_was_turned_and_moved(number, place):
    step = BOX / (4 * 8)
    turn, shift = 2 * math.pi * place / GRID.angles, (2 * step, -step)
    image = figure(SPOTS[number], turn, shift)
    samples, found = match(image[None])
    assert found.template.tolist() == [number]
    assert found.angle.tolist() == [place]
    assert found.shift_px[0].tolist() == [-2 * step, step]
    assert float(found.correlation) == pytest.approx(1, abs=2e-3)
    back = aligned(samples, found, GRID)
    assert correlation(back, TEMPLATES[number][None], GRID, radius=16) > 0.995


def test_a_ctf_is_the_templates():
    """The image has been through the CTF; its template has not."""
    ring = torch.arange(GRID.rings) / GRID.rings
    ctf = (-torch.cos(6 * ring))[:, None].expand(1, -1, GRID.angles // 2)
    samples = GRID.sample(figure(SPOTS[1])[None]) * ctf
    noise = 1 + ring
    found = best_matches(samples, ctf, noise, TEMPLATES, GRID, radius=8, range_px=3)
    assert float(found.correlation) == pytest.approx(1, abs=2e-3)
    assert found.template.tolist() == [1]
    assert found.angle.tolist() == [0]


def noise(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, BOX, BOX, generator=torch.Generator().manual_seed(seed)) * MASK


def test_noise_averages_to_its_template_where_it_was_compared_and_nowhere_else():
    """Einstein from noise."""
    samples, found = match(noise(600, 1), radius=6)
    mean = averages(aligned(samples, found, GRID), found.template, 2)
    assert correlation(mean, TEMPLATES, GRID, radius=6) > 0.8
    back = aligned(samples, found, GRID)
    inside = common_signal(back, found.template, GRID, first=1, last=6)
    outside = common_signal(back, found.template, GRID, first=9, last=16)
    assert inside.sigmas > 20
    assert abs(outside.sigmas) < 4


def test_what_images_share_beyond_is_found():
    g = torch.Generator().manual_seed(3)
    turns = (torch.rand(300, generator=g) * 2 * math.pi).tolist()
    images = torch.stack([figure(SPOTS[i % 2], turn) for i, turn in enumerate(turns)])
    samples, found = match(images + 0.4 * noise(300, 4), radius=6)
    back = aligned(samples, found, GRID)
    shared = common_signal(back, found.template, GRID, first=9, last=14)
    assert shared.sigmas > 6
    assert float(shared.frc[9:12].mean()) > 0.3


def test_the_signal_expected_is_that_of_one_percent():
    """A template that is 1 % of the power of every image gives what is said."""
    g = torch.Generator().manual_seed(5)
    shape = (400, GRID.rings, GRID.angles // 2)

    def white(n: int) -> torch.Tensor:
        return torch.view_as_complex(torch.randn(n, *shape[1:], 2, generator=g))

    images = white(400) + 0.1 * white(1)
    found = common_signal(images, torch.zeros(400, dtype=torch.int64), GRID, first=9, last=16, generator=g)
    assert found.sigmas == pytest.approx(found.expected_sigmas, rel=0.25)
    assert found.sigmas > 20


def test_phases_are_random_and_amplitudes_are_not():
    images = noise(3, 6) + 1
    twins = random_phases(images, generator=torch.Generator().manual_seed(7))
    spectra, others = rfft2(images), rfft2(twins)
    torch.testing.assert_close(others.abs()[:, 1:], spectra.abs()[:, 1:], atol=1e-3, rtol=1e-3)
    assert float(twins.mean().abs()) < 1e-6
    apart = (others[:, 1:, 1:-1] / spectra[:, 1:, 1:-1]).angle()
    assert float(torch.polar(torch.ones_like(apart), apart).mean().abs()) < 0.06
