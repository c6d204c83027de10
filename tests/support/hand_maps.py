"""Half maps of proteins of either hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from validate_given import given

from halfmap.io.half_maps import HalfMaps
from halfmap.io.models import read_model, scattering_coefficients
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.fsc import corrected_fsc, resolution
from halfmap.ops.masks import around_points, soft_edge
from halfmap.ops.potential import atomic_volume

PIXEL, DETAIL, NOISE = 1.6, 4.3, 0.6


def maps(shared_data: Path, name: str, chain: str | None, *, detail: float = DETAIL, flip: bool = False):
    """Half maps of a model with noise beyond a detail, and its mask."""
    model = read_model(shared_data / "models" / name)
    if chain is not None:
        model = model.select(model.chains == chain)
    model = model.centred()
    positions = torch.from_numpy(model.positions)
    box = 2 * int((float(positions.abs().max()) + 10) / PIXEL)
    shape = (box,) * 3
    gaussians = [np.stack(scattering_coefficients(int(each)), -1) for each in model.elements]
    clean = atomic_volume(
        positions,
        coefficients=torch.from_numpy(np.stack(gaussians)),
        shape=shape,
        pixel_size=PIXEL,
        b_factors=torch.full((len(model),), 80.0),
    )
    clean = irfft3(rfft3(clean) * low_pass(shape, pixel_size=PIXEL, resolution=detail), shape=shape)
    inside = around_points(shape, model.positions / PIXEL + box // 2, radius_px=4.0 / PIXEL)
    mask = soft_edge(torch.from_numpy(inside), extend=0.0, width=5.0, pixel_size=PIXEL)
    if flip:
        clean, mask = (each.flip(0).roll(1, 0) for each in (clean, mask))
    deviation = NOISE * float(clean[mask > 0.5].std())
    g = torch.Generator().manual_seed(1)
    noisy = [clean + deviation * torch.randn(shape, generator=g) for _ in range(2)]
    halves = HalfMaps(noisy[0], noisy[1], PIXEL, (0.0, 0.0, 0.0), (Path("a"), Path("b")), box // 2)
    curves = corrected_fsc(noisy[0], noisy[1], mask=mask, generator=g)
    reached = resolution(curves.corrected, pixel_size=PIXEL, box=box)
    return given(halves=halves, mask=mask, fsc=curves, resolution=reached)
