"""Polar samples against direct Fourier sums, and against the images they came from."""

import math

import pytest
import torch

from halfmap.errors import ParameterError
from halfmap.ops.masks import soft_circle
from halfmap.search.polar import PolarGrid, from_hartley, hartley

BOX, RADIUS, SUPPORT = 48, 16, 18.0


@pytest.fixture(scope="module")
def grid():
    return PolarGrid(BOX, RADIUS, SUPPORT)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(3, BOX, BOX, generator=generator)
    return noise * soft_circle((BOX, BOX), radius=SUPPORT - 3, edge=3)


def direct(images: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Fourier sums of images (b, n, n) at frequencies (m, 2) in Fourier pixels."""
    n = images.shape[-1]
    y, x = torch.meshgrid(torch.arange(n) - n // 2, torch.arange(n) - n // 2, indexing="ij")
    positions = torch.stack([x.flatten(), y.flatten()]).double()
    waves = torch.exp(-2j * math.pi / n * (frequencies.double() @ positions))
    return images.flatten(1).to(torch.complex128) @ waves.T


def test_samples_are_fourier_sums(grid, images):
    expected = direct(images, grid.frequencies.reshape(-1, 2))
    found = grid.sample(images).flatten(1)
    # Kaiser and Bessel's kernel of 6 points at twofold oversampling.
    assert (found - expected).abs().max() < 3e-4 * expected.abs().max()


def test_images_is_adjoint_to_sample_with_weights(grid, images):
    generator = torch.Generator().manual_seed(2)
    samples = torch.randn(3, grid.rings, grid.angles // 2, dtype=torch.complex64, generator=generator)
    one = (hartley(grid.sample(images)) * hartley(samples) * grid.weights).double().sum()
    other = (images * grid.images(samples)).double().sum() * BOX**2
    assert float(one) == pytest.approx(float(other), rel=1e-5)


def test_sums_over_rings_stand_for_sums_over_pixels(grid):
    """A smooth image, all of whose frequencies lie within the rings."""
    y, x = torch.meshgrid(torch.arange(BOX) - BOX // 2, torch.arange(BOX) - BOX // 2, indexing="ij")
    first = torch.exp(-((x - 3.0) ** 2 + (y + 2.0) ** 2) / 16)
    second = torch.exp(-((x + 1.0) ** 2 + (y - 1.0) ** 2) / 20) * x
    pair = torch.stack([first, second])
    rings = hartley(grid.sample(pair))
    # What the correction at the centre leaves is of the fourth order in the spacing over the width, 1 : 2.7.
    found = (rings[0] * rings[1] * grid.weights).sum() / BOX**2
    assert float(found) == pytest.approx(float((first * second).sum()), rel=5e-3)
    # Rings one Fourier pixel apart leave a halo of 2 % of an object that fills a third of the box.
    assert torch.allclose(grid.images(grid.sample(pair)), pair, atol=0.02 * float(pair.abs().max()))


def test_finer_grid_holds_the_coarser(grid, images):
    fine = PolarGrid(BOX, 8, SUPPORT).finer(2, 16)
    coarse = PolarGrid(BOX, 8, SUPPORT)
    assert torch.allclose(fine.sample(images)[:, :9, ::2], coarse.sample(images), atol=1e-3)
    assert fine.angles >= PolarGrid(BOX, 16, SUPPORT).angles - 8


def test_shifts_move_images(grid, images):
    moved = torch.roll(images, (2, -3), (1, 2))
    factors = grid.shifts(torch.tensor([[-3.0, 2.0]]))
    expected = grid.sample(moved)
    # The moved image reaches beyond the support, where samples hold no more than rounding of the kernel.
    assert torch.allclose(grid.sample(images) * factors, expected, atol=2e-3 * float(expected.abs().max()))


def test_hartley_pair(grid, images):
    samples = grid.sample(images)
    assert torch.allclose(from_hartley(hartley(samples)), samples, atol=1e-4)
    one, other = hartley(samples[:1]), hartley(samples[1:2])
    product = 2 * (samples[:1].conj() * samples[1:2]).real.sum()
    assert float((one * other).sum()) == pytest.approx(float(product), rel=1e-4)


@pytest.mark.parametrize(("radius", "support"), [(0, 10.0), (30, 10.0), (10, 0.0), (10, 30.0)])
def test_grids_that_cannot_be(radius, support):
    with pytest.raises(ParameterError):
        PolarGrid(BOX, radius, support)
