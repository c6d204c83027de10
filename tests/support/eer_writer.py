"""Write electron events as an EER movie, after the public description of the format."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

METADATA = (
    '<metadata><item name="exposureTime" unit="s">4.5</item><item name="camera">Falcon</item></metadata>'
)


@dataclass
class Events:
    """Electrons of one frame: (x, y) pixels, and their place in them in quarters (2 bits) or halves (1)."""

    x: np.ndarray
    y: np.ndarray
    sub_x: np.ndarray
    sub_y: np.ndarray


def random_events(rng: np.random.Generator, shape: tuple[int, int], n: int, sub_pixels: int = 4) -> Events:
    y, x = np.divmod(rng.choice(shape[0] * shape[1], n, replace=False), shape[1])
    return Events(x, y, rng.integers(0, sub_pixels, n), rng.integers(0, sub_pixels, n))


def counts(
    frames: list[Events], shape: tuple[int, int], upsampling: int = 1, sub_pixels: int = 4
) -> np.ndarray:
    """Histogram of events by plain arithmetic."""
    image = np.zeros((shape[0] * upsampling, shape[1] * upsampling), int)
    for events in frames:
        x = events.x * upsampling + events.sub_x * upsampling // sub_pixels
        y = events.y * upsampling + events.sub_y * upsampling // sub_pixels
        np.add.at(image, (y, x), 1)
    return image


def encode(
    events: Events, shape: tuple[int, int], skip_bits: int, sub_bits: int, *, wasteful: bool = False
) -> bytes:
    """Bit stream of a frame; `sub_bits` for each direction."""
    position = np.sort(events.y * shape[1] + events.x)
    order = np.argsort(events.y * shape[1] + events.x)
    most = (1 << skip_bits) - 1
    skips = np.diff(np.append(position, shape[0] * shape[1]), prepend=-1) - 1
    # Quarters 0, 1, 2, 3 are the signed numbers -2, -1, 0, 1.
    flip = 1 << (sub_bits - 1)
    symbols = (events.sub_x[order] ^ flip) | ((events.sub_y[order] ^ flip) << sub_bits)
    symbols = np.append(symbols, 0)  # after the last skip comes nothing
    overflows = skips // most
    last = np.cumsum(overflows + 1) - 1
    codes = np.full(last[-1] + 1, most, np.int64)
    widths = np.full(len(codes), skip_bits + (2 * sub_bits if wasteful else 0))
    codes[last] = skips % most + (symbols << skip_bits)
    widths[last] = skip_bits + 2 * sub_bits
    bits = (codes[:, None] >> np.arange(skip_bits + 2 * sub_bits)) & 1
    kept = np.arange(skip_bits + 2 * sub_bits) < widths[:, None]
    return np.packbits(bits[kept].astype(np.uint8), bitorder="little").tobytes()


def write_eer(
    path: Path,
    frames: list[bytes],
    shape: tuple[int, int],
    *,
    compression: int = 65001,
    code_tags: dict[int, int] | None = None,
    summed_first: bool = False,
) -> None:
    """Wrap encoded frames in a TIFF, a strip each."""
    out = bytearray(struct.pack("<2sHI", b"II", 42, 0))
    link = 4
    pages = [(frame, compression, 8) for frame in frames]
    if summed_first:
        pages.insert(0, (bytes(shape[0] * shape[1]), 1, 8))
    for number, (data, kind, bits) in enumerate(pages):
        at = len(out)
        out += data + bytes(len(data) % 2)
        tags = {256: (4, shape[1]), 257: (4, shape[0]), 258: (3, bits), 259: (3, kind), 262: (3, 1)}
        tags |= {273: (4, at), 277: (3, 1), 278: (4, shape[0]), 279: (4, len(data))}
        tags |= {tag: (3, value) for tag, value in (code_tags or {}).items()}
        entries = {tag: struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in tags.items()}
        if number == 0:
            text = METADATA.encode()
            entries[65001] = struct.pack("<HHII", 65001, 7, len(text), len(out))
            out += text + bytes(len(text) % 2)
        out[link : link + 4] = struct.pack("<I", len(out))
        out += struct.pack("<H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries))
        link = len(out)
        out += bytes(4)
    path.write_bytes(out)
