"""Frequencies, positions and rings against numpy's axes and plain counting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfmap.ops import grids

SHAPES = [(6, 9), (7, 8), (5, 6, 8)]


@pytest.mark.parametrize("shape", SHAPES)
def test_frequencies_are_in_the_order_of_the_half_spectrum(shape):
    k = grids.frequencies(shape, 1.3)
    assert k.shape == (*shape[:-1], shape[-1] // 2 + 1, len(shape))
    assert k.dtype == torch.float32
    axes = [np.fft.fftfreq(n, 1.3) for n in shape[:-1]] + [np.fft.rfftfreq(shape[-1], 1.3)]
    for component, axis in enumerate(np.meshgrid(*axes, indexing="ij")[::-1]):
        np.testing.assert_allclose(k[..., component].numpy(), axis, rtol=1e-7)
    radius = grids.frequency_radius(shape, 1.3, dtype=torch.float64)
    torch.testing.assert_close(radius, grids.frequencies(shape, 1.3, dtype=torch.float64).norm(dim=-1))


@pytest.mark.parametrize("shape", SHAPES)
def test_positions_have_their_origin_at_the_middle(shape):
    r = grids.coordinates(shape, 2.0)
    middle = tuple(n // 2 for n in shape)
    assert r[middle].tolist() == [0.0] * len(shape)
    assert r[(0,) * len(shape)].tolist() == [-2.0 * (n // 2) for n in shape[::-1]]
    torch.testing.assert_close(grids.radius(shape, 2.0), r.norm(dim=-1))


def test_rings_are_rounded_radii_of_the_longest_side():
    rings = grids.ring_index((4, 8))
    # One row step is two of the finer Fourier pixels of the longer side.
    assert rings[:, 0].tolist() == [0, 2, 4, 2]
    assert rings[0].tolist() == [0, 1, 2, 3, 4]
    assert rings[1, 1] == round((1 + 4) ** 0.5)
    cube = grids.ring_index((6, 6, 6))
    assert cube[1, 1, 1] == 2  # sqrt(3) = 1.73
    assert cube[3, 3, 3] == 5  # sqrt(27) = 5.2


@pytest.mark.parametrize("slab", [1, 300, 2**22])
@pytest.mark.parametrize("shape", [(8, 8), (9, 9), (6, 9), (7, 6, 8)])
def test_ring_sums_are_those_of_the_full_spectrum(monkeypatch, shape, slab):
    monkeypatch.setattr(grids, "_SLAB", slab)
    rng = np.random.default_rng(0)
    box = rng.normal(size=(3, *shape))
    axes = tuple(range(1, box.ndim))
    power = np.abs(np.fft.fftn(box, axes=axes)) ** 2
    k2 = sum(
        (np.fft.fftfreq(n).reshape([-1 if j == i else 1 for j in range(len(shape))])) ** 2
        for i, n in enumerate(shape)
    )
    rings = np.round(np.sqrt(k2) * max(shape)).astype(int)
    expected = [[p[rings == ring].sum() for ring in range(max(shape) // 2 + 1)] for p in power]
    half = torch.from_numpy(power[..., : shape[-1] // 2 + 1]).contiguous()
    result = grids.ring_sums(half, shape=shape)
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("width", [6, 7])
def test_friedel_weights_count_every_coefficient_once(width):
    assert grids.friedel_weight((5, width)).sum() == width
