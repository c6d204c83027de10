"""Correlation in cones against the full spectrum, and maps whose resolution along directions is known."""

from __future__ import annotations

import math

import pytest
import torch

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops import directional_fsc as directional
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.fsc import fsc
from halfmap.ops.grids import frequencies
from halfmap.ops.masks import soft_sphere

BOX = 64
SHAPE = (BOX,) * 3
MASK = soft_sphere(SHAPE, radius=0.35 * BOX, edge=4.0, pixel_size=1.0)
K = frequencies(SHAPE)
RADIUS = K.norm(dim=-1).clamp_min(1e-9)
COSINE = K[..., 2].abs() / RADIUS


def random(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def amplitude(end: torch.Tensor | float) -> torch.Tensor:
    """Amplitudes of the signal over the noise's: 10 at the origin, and an FSC of 0.143 at a frequency."""
    return 10 * torch.exp(-math.log(10 * math.sqrt(6)) * (RADIUS / end) ** 2)


def half_maps(seed: int, weight: torch.Tensor) -> list[torch.Tensor]:
    truth = irfft3(rfft3(random(seed)) * weight, shape=SHAPE)
    return [truth + random(10_000 + 2 * seed + i) for i in range(2)]


def test_all_directions_together_are_the_shell_correlation():
    a, b = half_maps(1, amplitude(0.25))
    found = directional.directional_fsc(a, b, mask=MASK)
    torch.testing.assert_close(found.whole, fsc(a * MASK, b * MASK).double(), atol=1e-5, rtol=0)
    everywhere = directional.directional_fsc(a, b, mask=MASK, directions=3, half_angle=90)
    torch.testing.assert_close(everywhere.curves[1, 8:], found.whole[8:], atol=1e-5, rtol=0)


def test_a_cone_is_that_of_the_coefficients_within_it():
    """Cells of 2° leave out or take in a few at the edge."""
    a, b = half_maps(2, amplitude(0.25))
    axis = torch.nn.functional.normalize(torch.tensor([[0.2, -0.5, 0.7]], dtype=torch.float64))
    found = directional.directional_fsc(a, b, directions=axis)
    fa, fb = (torch.fft.fftn(each.double()) for each in (a, b))
    k = torch.fft.fftfreq(BOX, dtype=torch.float64)
    z, y, x = torch.meshgrid(k, k, k, indexing="ij")
    vectors = torch.stack([x, y, z], dim=-1)
    radius = vectors.norm(dim=-1)
    cosine = (vectors @ axis[0]).abs() / radius.clamp_min(1e-9)
    for shell in (20, 27):
        inside = ((radius * BOX).round() == shell) & (cosine >= math.cos(math.radians(20)))
        cross = (fa[inside] * fb[inside].conj()).real.sum()
        expected = cross / (fa[inside].abs().norm() * fb[inside].abs().norm())
        assert float(found.curves[0, shell]) == pytest.approx(float(expected), abs=0.04)
        assert float(found.numbers[0, shell]) == pytest.approx(int(inside.sum()), rel=0.05)


def test_resolution_along_each_direction_is_the_known_one():
    end = 0.2 + 0.15 * COSINE.square()
    found = directional.directional_fsc(*half_maps(3, amplitude(end)), directions=200)
    along = found.directions[:, 2].abs()
    ends = found.last_shells() / BOX
    for low, high in ((0.0, 0.25), (0.5, 0.7), (0.93, 1.0)):
        inside = (along >= low) & (along <= high)
        # A cone of 20° holds some 3 % of the squared sine beside its axis.
        expected = 0.2 + 0.15 * float(along[inside].square().mean())
        assert float(ends[inside].mean()) == pytest.approx(expected, rel=0.06), low
    resolutions = found.resolutions(float(BOX))
    torch.testing.assert_close(resolutions, 1 / ends)
    assert directional.sphericity(found) < 0.95
    assert directional.occupancy(found).fall > 1.4


def test_isotropic_maps_are_not_flagged():
    """The statistic of Bingham exceeds its limit in one of twenty such maps."""
    over = []
    for seed in range(12):
        found = directional.directional_fsc(*(half * MASK for half in half_maps(seed, amplitude(0.25))))
        assert directional.area_ratio(found) > 0.5, seed
        occupied = directional.occupancy(found)
        assert occupied.fall < 1.6, seed
        assert directional.sphericity(found) > 0.72, seed
        middle = int((occupied.part - 0.5).abs().argmin())
        over.append(float(occupied.bingham[middle]) > occupied.limit)
    assert sum(over) <= 3


@pytest.mark.parametrize("gap", [30, 45])
def test_a_missing_cone_is_found(gap):
    weight = amplitude(0.25) * (math.cos(math.radians(gap)) > COSINE)
    found = directional.directional_fsc(*half_maps(4, weight), mask=MASK)
    assert directional.area_ratio(found) < 0.4
    worst = found.directions[found.last_shells().argmin()]
    assert float(worst[2].abs()) > math.cos(math.radians(15))
    occupied = directional.occupancy(found)
    # Signal a hundred times the noise keeps a direction whose cone leaves the gap by a hundredth.
    lost = 1 - math.cos(math.radians(gap - directional.HALF_ANGLE))
    assert 1 - float(occupied.part[12]) == pytest.approx(lost, rel=0.5)


def test_directions_of_less_signal_fail_the_test_of_bingham():
    found = directional.directional_fsc(
        *half_maps(5, amplitude(0.17 + 0.17 * (1 - COSINE.square()))), mask=MASK
    )
    occupied = directional.occupancy(found)
    middle = (occupied.part > 0.3) & (occupied.part < 0.7)
    assert float(occupied.bingham[middle].max()) > occupied.limit
    assert directional.area_ratio(found) < 0.7


def test_even_directions_are_even():
    axes = directional.even_directions(300)
    torch.testing.assert_close(axes.norm(dim=1), torch.ones(300, dtype=torch.float64))
    scatter = axes.T @ axes / 300
    torch.testing.assert_close(scatter, torch.eye(3, dtype=torch.float64) / 3, atol=0.005, rtol=0)
    cosine = (axes @ axes.T).abs().fill_diagonal_(0)
    nearest = torch.rad2deg(cosine.amax(1).acos())
    assert float(nearest.min()) > 4


def test_maps_without_noise_are_known_to_the_end():
    a = random(1)
    found = directional.directional_fsc(a, 2 * a)
    assert float(directional.area_ratio(found)) == pytest.approx(1)
    assert directional.sphericity(found) == pytest.approx(1)
    assert (found.last_shells() == BOX // 2).all()
    assert directional.occupancy(found).fall == 1


def test_what_cannot_be_compared_says_so():
    with pytest.raises(ShapeError, match="cannot be compared"):
        directional.directional_fsc(random(1), random(1)[1:])
    with pytest.raises(ParameterError, match="cones of 2°"):
        directional.directional_fsc(random(1), random(2), half_angle=2)
