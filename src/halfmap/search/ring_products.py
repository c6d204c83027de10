"""Harmonics along rings, and products of matrices over rings, one for each harmonic."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.fft
import torch
from torch import Tensor

Precision = Literal["float32", "tf32", "bf16"]
"""Of factors, whose products are summed in float32 always; the others keep 11 and 8 bits of each number."""

_BLOCK = 16
"""Harmonics that are multiplied together, over the rings that any of them needs."""

_NOTHING = 1e-10
"""Part of the power that may be left out: the samples on rings are no better."""

_setting = threading.Lock()


@dataclass(frozen=True, eq=False)
class RingMatrices:
    """Matrices (m, rings, k), one for each harmonic, of the rings that have it.

    A ring has only as many harmonics as the circumference of the support is long on it: high harmonics are
    those of outer rings alone.

    Attributes
    ----------
    blocks : tuple of (slice, int, Tensor)
        Some harmonics, the innermost ring that has them, and their real matrices (m', 2 rings', 2 k), which
        do to interleaved numbers what complex ones do.
    precision : Precision
        In which products are taken.
    """

    blocks: tuple[tuple[slice, int, Tensor], ...]
    precision: Precision

    @classmethod
    def of(cls, harmonics: Tensor, precision: Precision = "float32") -> RingMatrices:
        """From complex ones (m, rings, k)."""
        count, rings = harmonics.shape[:2]
        areas = torch.arange(rings, device=harmonics.device).clamp(min=1 / 12)
        power = harmonics.abs().square().sum(2).double() * areas
        inside = power.cumsum(1) <= _NOTHING / count * power.sum()
        blocks = []
        for begin in range(0, count, _BLOCK):
            part = slice(begin, min(begin + _BLOCK, count))
            first = min(int(inside[part].sum(1).min()), rings - 1)
            matrix = _as_real_matrix(harmonics[part, first:])
            blocks.append((part, first, _rounded(matrix, precision)))
        return cls(tuple(blocks), precision)

    @property
    def operations(self) -> int:
        """Floating-point operations of a product with one row."""
        return sum(2 * matrix.numel() for _, _, matrix in self.blocks)

    def __call__(self, rows: Tensor) -> Tensor:
        """Products (m, ..., k) with complex rows (m, ..., rings)."""
        k = self.blocks[0][2].shape[-1]
        product = torch.empty(*rows.shape[:-1], k, device=rows.device)
        rows = _rounded(torch.view_as_real(rows).flatten(-2), self.precision)
        with _tf32(self.precision == "tf32", rows.device):
            for part, first, matrix in self.blocks:
                _multiply(rows[part, ..., 2 * first :], matrix, product[part])
        return torch.view_as_complex(product.unflatten(-1, (-1, 2)))


def harmonics_of(values: Tensor) -> Tensor:
    """Harmonics (angles / 2 + 1, ...) of real functions (angles, ...), contiguous."""
    if values.device.type != "cpu":
        return torch.fft.rfft(values, dim=0).contiguous()
    # Faster than torch's along this axis, by a factor of 2.
    return torch.from_numpy(scipy.fft.rfft(values.numpy(), axis=0, workers=torch.get_num_threads()))


def from_harmonics(harmonics: Tensor, angles: int) -> Tensor:
    """Real functions (angles, ...) of harmonics (angles / 2 + 1, ...), contiguous."""
    if harmonics.device.type != "cpu":
        return torch.fft.irfft(harmonics, n=angles, dim=0).contiguous()
    values = scipy.fft.irfft(harmonics.numpy(), angles, axis=0, workers=torch.get_num_threads())
    return torch.from_numpy(values)


def adjoint_product(left: Tensor, right: Tensor) -> Tensor:
    """Sums over b of conjugates of `left` (m, b, k) times `right` (m, b, a): (m, k, a), complex."""
    rows, columns = (torch.view_as_real(factor).flatten(2) for factor in (left, right))
    with _tf32(False, rows.device):
        parts = torch.empty(len(rows), rows.shape[2], columns.shape[2], device=rows.device)
        _multiply(rows.transpose(1, 2), columns, parts)
    parts = parts.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
    return torch.complex(
        parts[:, :, 0, :, 0] + parts[:, :, 1, :, 1], parts[:, :, 0, :, 1] - parts[:, :, 1, :, 0]
    )


def _as_real_matrix(matrix: Tensor) -> Tensor:
    """Real matrices (m, 2 a, 2 b) that do to interleaved numbers what complex ones (m, a, b) do."""
    # Twice as fast as the product of complex matrices.
    times_one = torch.view_as_real(matrix.resolve_conj())
    times_i = torch.stack([-times_one[..., 1], times_one[..., 0]], dim=-1)
    return torch.stack([times_one, times_i], dim=2).flatten(1, 2).flatten(2, 3)


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Product of matrices (m, ..., n, a) and (m, a, k)."""
    if left.is_cuda:
        left, out = left.flatten(1, -2), out.flatten(1, -2)
    if left.dtype == torch.bfloat16:
        out.copy_(torch.bmm(left, right, out_dtype=torch.float32))
    elif left.is_cuda:
        torch.bmm(left, right, out=out)
    else:
        # numpy's library is faster than torch's by a quarter with matrices as small as those of one image.
        right = right[:, None] if left.ndim > right.ndim else right
        np.matmul(left.numpy(), right.numpy(), out=out.numpy())


def _rounded(factor: Tensor, precision: Precision) -> Tensor:
    """Factor as the device multiplies it: a CPU, in float32, after rounding it."""
    if precision == "bf16":
        return factor.bfloat16() if factor.is_cuda else factor.bfloat16().float()
    if precision == "tf32" and not factor.is_cuda:
        bits = factor.view(torch.int32)
        return (bits + 0x0FFF + ((bits >> 13) & 1)).bitwise_and_(~0x1FFF).view(torch.float32)
    return factor


@contextmanager
def _tf32(allowed: bool, device: torch.device) -> Iterator[None]:
    """Set whether a GPU may round factors in the block; one thread at a time, as all share the setting."""
    if device.type != "cuda":
        yield
        return
    with _setting:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = allowed
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
