"""Samples a second of slice extraction and insertion, against torch-fourier-slice."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from halfmap.ops.fourier import fft_centred
from halfmap.ops.rotations import random_rotations
from halfmap.ops.slices import SliceAccumulator, SliceVolume, extract_slices, insert_slices, prepare_volume

BAR = 20.0
"""Smallest ratio to torch-fourier-slice, both ways and at both paddings."""


def best(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Shortest times in seconds of functions that take turns, so that all meet the same machine."""
    times = [[float("inf")] for _ in functions]
    for repeat in range(repeats + 1):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if repeat:  # the first call compiles and warms up
                seconds.append(time.perf_counter() - start)
    return [min(seconds) for seconds in times]


def phantom(box: int, padded: int) -> torch.Tensor:
    """Noise within a sphere, so that every Fourier coefficient counts, in a padded box."""
    axis = torch.arange(box) - box // 2
    inside = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < (0.4 * box) ** 2
    noise = torch.randn(box, box, box, generator=torch.Generator().manual_seed(0)) * inside
    before = (padded - box) // 2
    return torch.nn.functional.pad(noise, (before, padded - box - before) * 3)


def check(prepared: SliceVolume, spectrum: torch.Tensor) -> None:
    """Stop unless both packages cut the same slices, short of Nyquist, where their borders differ."""
    from torch_fourier_slice.slice_extraction import extract_central_slices_rfft_3d

    rotations = random_rotations(4, generator=torch.Generator().manual_seed(2))
    ours = extract_slices(prepared, rotations, radius_px=0.45 * prepared.box)
    theirs = extract_central_slices_rfft_3d(spectrum, rotations.transpose(-1, -2))
    theirs = torch.fft.ifftshift(theirs, dim=-2) * (ours.abs() > 0)
    if (difference := float((theirs - ours).norm() / ours.norm())) > 1e-4:
        raise SystemExit(f"the slices differ by {difference:.1e}")


def measure(
    box: int, padding: int, count: int, their_count: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Rates of both packages in million samples a second, and in images a second.

    The samples are the same: all of a square slice through the padded volume, one voxel apart, which is how
    torch-fourier-slice works. For images of the unpadded box Halfmap needs only every `padding`-th of them.
    """
    from torch_fourier_slice.slice_extraction import extract_central_slices_rfft_3d
    from torch_fourier_slice.slice_insertion import insert_central_slices_rfft_3d

    padded = box * padding
    volume = phantom(box, padded)
    spectrum = torch.fft.fftshift(fft_centred(volume, ndim=3), dim=(-3, -2))
    prepared = prepare_volume(volume, padding=1, correct_gridding=False)
    check(prepared, spectrum)
    thin = SliceVolume(prepared.bricks, box, padded)
    sums = SliceAccumulator.empty(padded, padding=1)
    thin_sums = SliceAccumulator(sums.data, box, padded)
    many = random_rotations(count, generator=torch.Generator().manual_seed(1))
    # Its matrices take image to volume coordinates.
    few = many[:their_count].transpose(-1, -2)
    square = {"radius_px": float(padded)}
    slices = extract_slices(prepared, many, **square)
    thin_slices = extract_slices(thin, many)
    weights, thin_weights = torch.ones_like(slices.real), torch.ones_like(thin_slices.real)
    their_slices = extract_central_slices_rfft_3d(spectrum, few)
    seconds = {
        "extract": best(
            (
                lambda: extract_slices(prepared, many, **square),
                lambda: extract_central_slices_rfft_3d(spectrum, few),
                lambda: extract_slices(thin, many),
            ),
            repeats,
        ),
        "insert": best(
            (
                lambda: insert_slices(slices, many, out=sums, weights=weights, **square),
                lambda: insert_central_slices_rfft_3d(their_slices, (padded,) * 3, few),
                lambda: insert_slices(thin_slices, many, out=thin_sums, weights=thin_weights),
            ),
            repeats,
        ),
    }
    samples = padded * (padded // 2 + 1) / 1e6
    return {
        name: {
            "halfmap_Msamples_per_s": samples * count / ours,
            "torch_fourier_slice_Msamples_per_s": samples * their_count / theirs,
            "ratio": (count / ours) / (their_count / theirs),
            "halfmap_images_per_s": count / thinned,
            "torch_fourier_slice_images_per_s": their_count / theirs,
            "image_ratio": (count / thinned) / (their_count / theirs),
        }
        for name, (ours, theirs, thinned) in seconds.items()
    }


def main() -> None:
    """Measure, print a table, write JSON and fail if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--box", type=int, default=192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--slices", type=int, default=400, help="in a call of ours, divided by padding squared"
    )
    parser.add_argument("--their-slices", type=int, default=16, help="in a call of torch-fourier-slice")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/slices.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {}
    print(f"box {arguments.box}, {arguments.threads} threads")
    print(f"{'':24}{'million samples a second':^30}{'images a second':^30}")
    print(f"{'':24}" + 2 * f"{'halfmap':>10}{'t-f-slice':>12}{'ratio':>8}")
    for padding in (1, 2):
        count = arguments.slices // padding**2
        rates = measure(arguments.box, padding, count, arguments.their_slices, arguments.repeats)
        for name, row in rates.items():
            a, b, ratio, c, d, image_ratio = row.values()
            title = f"{name}, padding {padding}"
            print(f"{title:24}{a:10.1f}{b:12.2f}{ratio:8.1f}{c:10.0f}{d:12.1f}{image_ratio:8.0f}")
            result[title] = row
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
    if min(row["ratio"] for row in result.values()) < BAR:
        raise SystemExit(f"below {BAR:.0f} x torch-fourier-slice")


if __name__ == "__main__":
    main()
