"""FFT front, Fourier crop and pad, and shifts against plain sums of waves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from halfmap.errors import ShapeError
from halfmap.ops import fourier


def random_box(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def waves(shape: tuple[int, ...], ks: np.ndarray, phases: np.ndarray) -> torch.Tensor:
    """Sum of cosines of k periods over the box, each with its phase at the origin n // 2."""
    axes = [(np.arange(n) - n // 2) / n for n in shape]
    grid = np.meshgrid(*axes, indexing="ij")
    total = np.zeros(shape)
    for k, phase in zip(ks, phases, strict=True):
        total += np.cos(2 * np.pi * sum(c * g for c, g in zip(k, grid, strict=True)) + phase)
    return torch.from_numpy(total)


@pytest.mark.parametrize("shape", [(7, 8), (8, 7), (3, 6, 6)])
def test_forward_is_the_plain_sum(shape):
    box = random_box(2, *shape)
    ndim = len(shape)
    spectrum = fourier.rfft2(box) if ndim == 2 else fourier.rfft3(box)
    matrices = [np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n) for n in shape]
    letters = "zyx"[3 - ndim :]
    sums = ",".join(f"{c.upper()}{c}" for c in letters)
    expected = np.einsum(f"{sums},b{letters}->b{letters.upper()}", *matrices, box.numpy())
    np.testing.assert_allclose(spectrum.numpy(), expected[..., : shape[-1] // 2 + 1], atol=1e-11)


@pytest.mark.parametrize("shape", [(9, 12), (6, 7, 8), (5, 5, 5)])
def test_round_trips(shape):
    box = random_box(2, *shape)
    ndim = len(shape)
    forward, back = (fourier.rfft2, fourier.irfft2) if ndim == 2 else (fourier.rfft3, fourier.irfft3)
    torch.testing.assert_close(back(forward(box), shape=shape), box)
    centred = fourier.fft_centred(box, ndim=ndim)
    torch.testing.assert_close(fourier.ifft_centred(centred, shape=shape), box)
    torch.testing.assert_close(fourier.ifft2(fourier.fft2(box)).real, box)


@pytest.mark.parametrize(("n", "dtype"), [(16, torch.float32), (15, torch.float64)])
def test_centred_transform_has_its_origin_at_the_middle(n, dtype):
    box = torch.zeros(n, n, n, dtype=dtype)
    box[n // 2, n // 2, n // 2] = 2.0
    spectrum = fourier.fft_centred(box, ndim=3)
    assert spectrum.dtype == (torch.complex64 if dtype == torch.float32 else torch.complex128)
    torch.testing.assert_close(spectrum, torch.full_like(spectrum, 2.0))


def test_dtypes_follow_the_input_and_counts_become_float32():
    counts = torch.arange(64, dtype=torch.uint8).reshape(8, 8)
    assert fourier.rfft2(counts).dtype == torch.complex64
    assert fourier.rfft2(counts.to(torch.float16)).dtype == torch.complex64
    assert fourier.rfft2(counts.double()).dtype == torch.complex128
    assert fourier.irfft2(fourier.rfft2(counts), shape=(8, 8)).dtype == torch.float32


def test_gradients_pass_and_both_libraries_agree():
    box = random_box(2, 6, 7)
    tracked = box.clone().requires_grad_()
    torch.testing.assert_close(fourier.rfft2(tracked).detach(), fourier.rfft2(box))
    shift = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: fourier.shift_image(x, shift_px=s), (tracked, shift))
    assert torch.autograd.gradcheck(lambda x: fourier.resample(x, new_shape=(8, 4)), tracked)


@pytest.mark.parametrize(
    ("shape", "new_shape"),
    [
        *itertools.product([(8, 10), (9, 7)], [(12, 12), (13, 16), (8, 10), (6, 6), (5, 7), (6, 20)]),
        ((8, 9, 6), (6, 7, 8)),
        ((6, 6, 6), (12, 12, 12)),
    ],
)
def test_resampling_samples_the_same_waves(shape, new_shape):
    limit = [(min(n, m) - 1) // 2 for n, m in zip(shape, new_shape, strict=True)]
    rng = np.random.default_rng(3)
    ks = np.stack([rng.integers(-most, most + 1, size=12) for most in limit], axis=1)
    phases = rng.uniform(0, 2 * np.pi, size=12)
    box = waves(shape, ks, phases)
    before = box.clone()
    resampled = fourier.resample(box, new_shape=new_shape)
    torch.testing.assert_close(resampled, waves(new_shape, ks, phases))
    torch.testing.assert_close(box, before, rtol=0, atol=0)


@pytest.mark.parametrize("k", [(0, 4), (3, 4), (4, 0), (4, 2), (4, 4)])
def test_nyquist_waves_of_even_boxes(k):
    small, large = (8, 8), (12, 16)
    # A cosine whose Nyquist part has phase 0 at the origin is what an even box can hold.
    phases = np.zeros(1)
    mirror = [tuple(c * s for c, s in zip(k, signs, strict=True)) for signs in [(1, 1), (1, -1)]]
    fine = sum(waves(large, np.array([m]), phases) for m in mirror)
    coarse = sum(waves(small, np.array([m]), phases) for m in mirror)
    torch.testing.assert_close(fourier.resample(coarse, new_shape=large), fine)
    torch.testing.assert_close(fourier.resample(fine, new_shape=small), coarse)


@pytest.mark.parametrize("shape", [(6, 8), (7, 9), (4, 5, 6)])
def test_growing_then_shrinking_changes_nothing(shape):
    box = random_box(2, *shape)
    larger = tuple(2 * n + 3 for n in shape)
    grown = fourier.resample(box, new_shape=larger)
    torch.testing.assert_close(grown.mean(), box.mean())
    torch.testing.assert_close(fourier.resample(grown, new_shape=shape), box)


@pytest.mark.parametrize("new_shape", [(6, 8), (20, 16), (9, 8), (6, 14)])
def test_resized_spectra_are_those_of_real_boxes(new_shape):
    resized = fourier.resize_spectrum(fourier.rfft2(random_box(12, 12)), shape=(12, 12), new_shape=new_shape)
    torch.testing.assert_close(fourier.rfft2(fourier.irfft2(resized, shape=new_shape)), resized)


@pytest.mark.parametrize("shape", [(8, 9), (7, 10), (6, 7, 8)])
def test_whole_shifts_roll_the_box(shape):
    ndim = len(shape)
    box = random_box(*shape)
    shift = (2, -3, 1)[:ndim]
    forward, back = (fourier.rfft2, fourier.irfft2) if ndim == 2 else (fourier.rfft3, fourier.irfft3)
    moved = fourier.phase_shift(forward(box), shape=shape, shift_px=torch.tensor(shift, dtype=torch.float64))
    expected = torch.roll(box, shift[::-1], tuple(range(ndim)))
    torch.testing.assert_close(back(moved, shape=shape), expected)


def test_fractional_shifts_of_a_batch_move_waves():
    shape = (9, 11)
    ks, phases = np.array([[1, 2], [-3, 4], [2, 0]]), np.array([0.3, 1.0, -2.0])
    shifts = torch.tensor([[0.25, -1.5], [3.3, 0.0]], dtype=torch.float64)
    moved = fourier.shift_image(waves(shape, ks, phases), shift_px=shifts)
    assert moved.shape == (2, *shape)
    for image, (x, y) in zip(moved, shifts.tolist(), strict=True):
        lag = 2 * np.pi * (ks[:, 0] * y / shape[0] + ks[:, 1] * x / shape[1])
        torch.testing.assert_close(image, waves(shape, ks, phases - lag))


def test_shapes_that_do_not_fit_are_refused():
    spectrum = torch.zeros(8, 5, dtype=torch.complex64)
    with pytest.raises(ShapeError, match="half-spectrum of shape"):
        fourier.irfft2(spectrum, shape=(8, 10))
    with pytest.raises(ShapeError, match="cannot be resized"):
        fourier.resize_spectrum(spectrum, shape=(8, 8), new_shape=(4, 4, 4))
    with pytest.raises(ShapeError, match="2 components"):
        fourier.phase_shift(spectrum, shape=(8, 8), shift_px=torch.zeros(3))
    with pytest.raises(ShapeError, match="needs 2 axes"):
        fourier.rfft2(torch.zeros(8))
