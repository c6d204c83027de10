"""Samples a second of slice extraction and insertion, against torch-fourier-slice."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from halfmap.ops.fourier import fft_centred
from halfmap.ops.rotations import random_rotations
from halfmap.ops.slices import SliceAccumulator, extract_slices, insert_slices, prepare_volume

BAR = 20.0
"""Smallest ratio to torch-fourier-slice, both ways and at both paddings."""


def best(function: Callable[[], object], repeats: int) -> float:
    """Shortest of several times in seconds, after one call that compiles and warms up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def phantom(box: int) -> torch.Tensor:
    """Noise within a sphere: every Fourier coefficient counts."""
    axis = torch.arange(box) - box // 2
    inside = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < (0.4 * box) ** 2
    return torch.randn(box, box, box, generator=torch.Generator().manual_seed(0)) * inside


def measure_ours(box: int, padding: int, count: int, repeats: int) -> dict[str, float]:
    """Million samples a second of full squares and, counting only those, of Nyquist's circles."""
    prepared = prepare_volume(phantom(box), padding=padding)
    rotations = random_rotations(count, generator=torch.Generator().manual_seed(1))
    sums = SliceAccumulator.empty(box, padding=padding)
    k = torch.fft.fftfreq(box, 1 / box)[:, None] ** 2 + torch.arange(box // 2 + 1) ** 2
    rates = {}
    for name, radius, samples in (
        ("", float(box), count * k.numel()),
        ("_circle", box / 2, count * int((k <= (box / 2) ** 2).sum())),
    ):
        slices = extract_slices(prepared, rotations, radius_px=radius)
        weights = torch.ones_like(slices.real)
        seconds = best(lambda r=radius: extract_slices(prepared, rotations, radius_px=r), repeats)
        rates[f"extract{name}"] = samples / seconds / 1e6
        seconds = best(
            lambda s=slices, w=weights, r=radius: insert_slices(
                s, rotations, out=sums, weights=w, radius_px=r
            ),
            repeats,
        )
        rates[f"insert{name}"] = samples / seconds / 1e6
    return rates


def measure_theirs(box: int, padding: int, count: int, repeats: int) -> dict[str, float]:
    """Million samples a second of torch-fourier-slice, whose slices are as large as the padded volume."""
    from torch_fourier_slice.slice_extraction import extract_central_slices_rfft_3d
    from torch_fourier_slice.slice_insertion import insert_central_slices_rfft_3d

    padded = box * padding
    before = (padded - box) // 2
    volume = torch.nn.functional.pad(phantom(box), (before, padded - box - before) * 3)
    spectrum = torch.fft.fftshift(fft_centred(volume, ndim=3), dim=(-3, -2))
    # Its matrices take image to volume coordinates.
    rotations = random_rotations(count, generator=torch.Generator().manual_seed(1)).transpose(-1, -2)
    slices = extract_central_slices_rfft_3d(spectrum, rotations)
    check(volume, slices, rotations)
    seconds = best(lambda: extract_central_slices_rfft_3d(spectrum, rotations), repeats)
    rates = {"extract": slices.numel() / seconds / 1e6}
    shape = (padded, padded, padded)
    seconds = best(lambda: insert_central_slices_rfft_3d(slices, shape, rotations), repeats)
    return {**rates, "insert": slices.numel() / seconds / 1e6}


def check(volume: torch.Tensor, slices: torch.Tensor, rotations: torch.Tensor) -> None:
    """Stop unless both packages cut the same slices, short of Nyquist, where borders differ."""
    prepared = prepare_volume(volume, padding=1, correct_gridding=False)
    ours = extract_slices(prepared, rotations.transpose(-1, -2), radius_px=0.45 * len(volume))
    theirs = torch.fft.ifftshift(slices, dim=-2) * (ours.abs() > 0)
    difference = (theirs - ours).norm() / ours.norm()
    if difference > 1e-4:
        raise SystemExit(f"the slices differ by {difference:.1e}")


def main() -> None:
    """Measure, print a table, write JSON and fail if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--box", type=int, default=192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slices", type=int, default=400, help="in a call of ours")
    parser.add_argument("--their-slices", type=int, default=16, help="in a call of torch-fourier-slice")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/slices.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, dict[str, dict[str, float]]] = {}
    print(f"box {arguments.box}, {arguments.threads} threads, million samples a second")
    print(f"{'':24}{'halfmap':>10}{'(circle)':>10}{'t-f-slice':>11}{'ratio':>8}")
    for padding in (1, 2):
        ours = measure_ours(arguments.box, padding, arguments.slices, arguments.repeats)
        theirs = measure_theirs(arguments.box, padding, arguments.their_slices, arguments.repeats)
        ratio = {name: ours[name] / theirs[name] for name in theirs}
        result[f"padding {padding}"] = {"halfmap": ours, "torch_fourier_slice": theirs, "ratio": ratio}
        for name in theirs:
            print(
                f"{name + ', padding ' + str(padding):24}{ours[name]:10.1f}{ours[name + '_circle']:10.1f}"
                f"{theirs[name]:11.2f}{ratio[name]:8.0f}"
            )
    record = {
        "machine": {"processor": platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "numba", "torch-fourier-slice")},
        "box": arguments.box,
        "threads": arguments.threads,
        "bar": BAR,
        **result,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    if min(min(entry["ratio"].values()) for entry in result.values()) < BAR:
        raise SystemExit(f"below {BAR:.0f} x torch-fourier-slice")


if __name__ == "__main__":
    main()
