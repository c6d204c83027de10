"""The two bodies of slice extraction and insertion: compiled kernels for the CPU, torch for any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from halfmap.ops import _slice_kernels as kernels

_TORCH_SAMPLES = 2**21
"""Samples that the torch bodies hold at a time: some 200 MB of positions, corners and weights."""

_SERIAL_SAMPLES = 2**15
"""Below so many samples a thread costs more to start than it saves."""

_LINE = 64
"""Bytes of a cache line."""


def allocate(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Make zeros, on the CPU in memory of large pages."""
    if torch.device(device).type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    return _large_pages(shape, dtype).zero_()


def empty_like(data: Tensor) -> Tensor:
    """Room for as much as `data` is, where it is, on the CPU in memory of large pages."""
    return torch.empty_like(data) if data.device.type != "cpu" else _large_pages(data.shape, data.dtype)


def _large_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory on the CPU with nothing in it yet.

    NumPy asks the system for large pages and torch does not. The kernels read and write far apart, and were
    measured twice as fast with them. It starts on a cache line, so that each brick of a volume fills one.
    """
    kind, count = torch.zeros(0, dtype=dtype).numpy().dtype, math.prod(shape)
    memory = np.empty(count + _LINE // kind.itemsize, dtype=kind)
    start = -memory.ctypes.data % _LINE // kind.itemsize
    return torch.from_numpy(memory[start : start + count]).view(*shape)


def extract_numba(bricks: Tensor, steps: Tensor, *, size: int, radius: float, limit: float) -> Tensor:
    """Slices (n, size, size // 2 + 1) of a volume in bricks; `steps` are in voxels per Fourier pixel."""
    slices = _large_pages((len(steps), size, size // 2 + 1), bricks.dtype)
    if slices.numel() == 0:
        return slices
    volume, out, rotations = _flat(bricks), torch.view_as_real(slices).flatten(-2).numpy(), _rotations(steps)
    origin = len(bricks) - 1
    k = np.arange(size // 2 + 1, dtype=volume.dtype)

    def cut(part: slice) -> None:
        kernels.extract(volume, origin, rotations[part], k, radius, limit, out[part])

    # More parts than threads: slices differ in how much of the volume they miss in the caches.
    threads = _threads(len(steps) * size * size // 2)
    bounds = np.linspace(0, len(steps), min(len(steps), 4 * threads if threads > 1 else 1) + 1).astype(int)
    _run(cut, [slice(a, b) for a, b in pairwise(bounds)], threads)
    return slices


def insert_numba(
    data: Tensor, slices: Tensor, weights: Tensor | None, steps: Tensor, *, radius: float, limit: float
) -> None:
    """Add slices (n, size, size // 2 + 1) and their weights to `data` (s, s, p, 4) in place."""
    if slices.numel() == 0:
        return
    # A view or an error, never a copy: what is added must arrive.
    volume = data.detach().view(-1).numpy()
    samples, rotations = _flat(slices).reshape(*slices.shape[:2], -1), _rotations(steps)
    density = np.empty((0, 0, 0), volume.dtype) if weights is None else weights.contiguous().numpy()
    n_rows, pitch, size = data.shape[0], data.shape[2], slices.shape[1]
    k = np.arange(size // 2 + 1, dtype=volume.dtype)

    def add(planes: tuple[int, int]) -> None:
        origin = n_rows // 2
        kernels.insert(volume, pitch, origin, rotations, k, radius, limit, samples, density, *planes)

    threads = _threads(len(steps) * size * size // 2)
    _run(add, _even_slabs(rotations, radius, n_rows, 3 * threads if threads > 1 else 1), threads)


def extract_torch(bricks: Tensor, steps: Tensor, *, size: int, radius: float, limit: float) -> Tensor:
    """As `extract_numba`, on any device and differentiable in `bricks` and `steps`."""
    flat, n, parts = bricks.reshape(-1), len(bricks), []
    where, pixels = _disc(size, radius, bricks.device)
    row = torch.arange(2 * n, device=bricks.device)
    layout = (row // 2 * 4 * n * n + row % 2 * 2, row // 2 * 4 * n + row % 2, 4)
    for part in _parts(len(steps), len(pixels)):
        at, corner_weights, flipped, inside = _corners(layout, n - 1, steps[part], pixels, limit)
        found = torch.zeros_like(inside, dtype=bricks.dtype)
        for places, weight in zip(at, corner_weights, strict=True):
            found = found + flat[places] * weight
        found = torch.where(flipped, found.conj(), found) * inside
        blank = bricks.new_zeros(len(found), size * (size // 2 + 1))
        parts.append(blank.index_copy(1, where, found))
    joined = torch.cat(parts) if parts else bricks.new_zeros(0)
    return joined.reshape(len(steps), size, size // 2 + 1)


def insert_torch(
    data: Tensor, slices: Tensor, weights: Tensor | None, steps: Tensor, *, radius: float, limit: float
) -> None:
    """As `insert_numba`, on any device."""
    size, flat = slices.shape[1], data.view(-1, 4)
    n_rows, _, pitch, _ = data.shape
    where, pixels = _disc(size, radius, data.device)
    row = torch.arange(n_rows, device=data.device)
    layout = (row * n_rows * pitch, row * pitch, 1)
    for part in _parts(len(steps), len(pixels)):
        at, corner_weights, flipped, inside = _corners(layout, n_rows // 2, steps[part], pixels, limit)
        found = slices[part].flatten(1)[:, where]
        density = torch.ones_like(found.real) if weights is None else weights[part].flatten(1)[:, where]
        imaginary = torch.where(flipped, -found.imag, found.imag)
        lanes = torch.stack([found.real, imaginary, density, torch.zeros_like(density)], dim=-1)
        lanes = lanes * inside[..., None]
        for places, weight in zip(at, corner_weights, strict=True):
            flat.index_add_(0, places.flatten(), (lanes * weight[..., None]).flatten(0, 1))


def _disc(size: int, radius: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places in the flattened half-spectrum, and (kx, ky), of its samples within the radius."""
    ky = torch.fft.fftfreq(size, 1 / size).round().to(torch.int64)
    kx = torch.arange(size // 2 + 1)
    pixels = torch.stack(torch.meshgrid(ky, kx, indexing="ij")[::-1], dim=-1).reshape(-1, 2)
    where = (pixels.square().sum(dim=-1) <= radius * radius).nonzero().squeeze(1)
    return where.to(device), pixels[where].to(device)


def _corners(
    layout: tuple[Tensor, Tensor, int], origin: int, steps: Tensor, pixels: Tensor, limit: float
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Indices and weights of the eight voxels about each sample, whether it is at -k and whether inside.

    `layout` is what each z, each y, and a step along x add to the index of a voxel.
    """
    z_start, y_start, x_step = layout
    position = pixels.to(steps) @ steps[:, :2]
    flipped = position[..., 0] < 0
    position = torch.where(flipped[..., None], -position, position)
    inside = (position.detach().abs() <= limit + kernels.EDGE).all(dim=-1)
    # Samples outside are kept, at the origin, so that every slice has as many; `inside` takes them out again.
    position = torch.where(inside[..., None], position, torch.zeros_like(position))
    base = position.detach().floor()
    x, y, z = (position - base).unbind(-1)
    ix, iy, iz = base.to(torch.int64).unbind(-1)
    near = ix * x_step
    at, weights = [], []
    y_rows = y_start[iy + origin], y_start[iy + origin + 1]
    for dz, wz in ((0, 1 - z), (1, z)):
        z_row = z_start[iz + origin + dz] + near
        for dy, wy in ((0, 1 - y), (1, y)):
            for dx, wx in ((0, 1 - x), (1, x)):
                at.append(z_row + y_rows[dy] + dx * x_step)
                weights.append(wz * wy * wx)
    return at, weights, flipped, inside


def _parts(n: int, samples: int) -> Iterator[slice]:
    """Divide `n` slices so that the torch bodies stay within their memory."""
    count = max(1, _TORCH_SAMPLES // max(1, samples))
    return (slice(i, i + count) for i in range(0, n, count))


def _flat(tensor: Tensor) -> np.ndarray:
    """The real numbers of a complex tensor in a row, copied only if they do not lie so."""
    return torch.view_as_real(tensor.detach().resolve_conj().contiguous()).view(-1).numpy()


def _rotations(steps: Tensor) -> np.ndarray:
    return np.ascontiguousarray(steps.detach().to(torch.float64).numpy())


def _threads(samples: int) -> int:
    return max(1, min(torch.get_num_threads(), samples // _SERIAL_SAMPLES))


def _even_slabs(rotations: np.ndarray, radius: float, n_rows: int, count: int) -> list[tuple[int, int]]:
    """Divide the planes of a volume so that each part gets about as many samples."""
    if count == 1:
        return [(0, n_rows)]
    grid = np.linspace(-radius, radius, 15)
    points = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    points = points[np.hypot(points[:, 0], points[:, 1]) <= radius]
    positions = points @ rotations[:: len(rotations) // 500 + 1, :2]
    z = np.where(positions[..., 0] < 0, -positions[..., 2], positions[..., 2])
    inner = np.quantile(z, np.arange(1, count) / count).round().astype(int) + n_rows // 2
    bounds = np.unique(np.clip(np.concatenate([[0], inner, [n_rows]]), 0, n_rows))
    return [(int(a), int(b)) for a, b in pairwise(bounds)]


def _run(function: Callable, items: Sequence, threads: int) -> None:
    """Call `function` on every item in some threads; the kernels hold no lock of the interpreter.

    Plain threads rather than the compiler's parallel loops: those bring an OpenMP runtime that ends a process
    which forks after using it, or a pool that two threads may not enter at once.
    """
    if threads == 1:
        for item in items:
            function(item)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(function, items))
