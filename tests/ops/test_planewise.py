"""Transforms of volumes plane by plane are those of the whole."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from halfmap.errors import ShapeError
from halfmap.ops import fourier, planewise


@pytest.mark.parametrize(
    ("shape", "new_shape"),
    [
        ((12, 14, 16), (8, 10, 9)),
        ((9, 8, 7), (12, 15, 16)),
        ((10, 12, 14), (15, 12, 7)),
        ((8, 8, 8), (8, 8, 8)),
    ],
)
def test_spectrum_and_volume_are_those_of_the_whole(shape, new_shape, monkeypatch):
    monkeypatch.setattr(planewise, "_BLOCK_BYTES", 1000)
    volume = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    whole = fourier.resize_spectrum(fourier.fft_centred(volume, ndim=3), shape=shape, new_shape=new_shape)
    spectrum = planewise.spectrum_of_planes(iter(volume), shape=shape, new_shape=new_shape)
    assert np.allclose(spectrum, whole.numpy(), atol=2e-6 * float(whole.abs().max()))
    back = planewise.volume_of_spectrum(spectrum, shape=new_shape)
    assert torch.allclose(back, fourier.resample(volume, new_shape=new_shape), atol=1e-5)


def test_too_few_planes_are_refused():
    with pytest.raises(ShapeError, match="3 planes"):
        planewise.spectrum_of_planes(iter(torch.zeros(3, 4, 4)), shape=(4, 4, 4), new_shape=(4, 4, 4))


def test_nothing_is_held_twice(monkeypatch):
    monkeypatch.setattr(planewise, "_BLOCK_BYTES", 1 << 18)
    n, fine = 96, 144
    planes = (torch.zeros(fine, fine) for _ in range(fine))
    tracemalloc.start()
    try:
        spectrum = planewise.spectrum_of_planes(planes, shape=(fine,) * 3, new_shape=(n,) * 3)
        planewise.volume_of_spectrum(spectrum, shape=(n,) * 3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The planes of the finer box, each cropped.
    assert peak < 1.3 * 8 * fine * n * (n // 2 + 1)
