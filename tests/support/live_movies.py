"""Small movies with Thon rings and round particles, made in milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from halfmap.io.mrc import write_mrc
from halfmap.ops.ctf import ctf

SIDE, PIXEL_A, FRAMES, DOSE = 320, 2.0, 4, 10.0
_RADIUS_A, _APART_A = 42.0, 95.0


def write_movie(path: Path, seed: int) -> None:
    """Write a movie: balls in ice at its own defocus, the signal convolved by the CTF, counted electrons."""
    rng = np.random.default_rng(seed)
    defocus = rng.uniform(9_000, 16_000)
    transfer = ctf(
        (SIDE, SIDE),
        pixel_size=PIXEL_A,
        defocus_u=defocus + 100,
        defocus_v=defocus - 100,
        defocus_angle=30.0,
        voltage_kV=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.1,
    ).numpy()
    specimen = 0.35 * _balls(rng) + rng.normal(0, 0.12, (SIDE, SIDE))
    # Matter is dark, and the CTF positive, at low frequencies.
    seen = -np.fft.irfft2(np.fft.rfft2(specimen) * transfer, (SIDE, SIDE))
    mean = DOSE * PIXEL_A**2
    frames = rng.poisson(np.clip(mean * (1 + seen), 0.1, None), (FRAMES, SIDE, SIDE))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mrc(path, frames.astype(np.uint16), pixel_size=PIXEL_A)


def _balls(rng: np.random.Generator) -> np.ndarray:
    """Projection of balls of one size that do not touch, 1 through the middle of one."""
    x = np.arange(SIDE) * PIXEL_A
    image, places = np.zeros((SIDE, SIDE)), list[np.ndarray]()
    for place in rng.uniform(_RADIUS_A, SIDE * PIXEL_A - _RADIUS_A, (200, 2)):
        if all(np.hypot(*(place - other)) > _APART_A for other in places):
            places.append(place)
            squared = (x[:, None] - place[0]) ** 2 + (x - place[1]) ** 2
            image += np.sqrt(np.clip(1 - squared / _RADIUS_A**2, 0, None))
    return image
