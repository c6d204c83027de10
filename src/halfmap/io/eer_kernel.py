"""Decode the events of one EER frame and count them on a grid."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

# A code of at most 16 bits starts anywhere in a byte, so three bytes are read at a time.
PADDING_BYTES = 4
LONGEST_CODE_bits = 16


@numba.njit(nogil=True, cache=True)
def decode_events(
    data: NDArray[np.uint8],
    skip_bits: int,
    sub_bits: int,
    wasteful: bool,
    n_pixels: int,
    positions: NDArray[np.uint32],
    symbols: NDArray[np.uint8],
) -> int:  # pragma: no cover - compiled
    """Decode a frame into pixel positions and sub-pixel symbols; the number of events, -1 if it is corrupt.

    Parameters
    ----------
    data : array (bytes + 4,) uint8
        Bit stream, lowest bit first, and padding.
    skip_bits, sub_bits : int
        Bits that count the empty pixels before an event, and bits of its sub-pixel symbol. The largest count
        says that there is no event yet.
    wasteful : bool
        Whether such a largest count is followed by a symbol without meaning, as in prototypes.
    n_pixels : int
        Pixels of the frame: counts and events must add up to just that.
    positions, symbols : array (capacity,)
        Filled; the capacity is that of the shortest codes.
    """
    overflow = (1 << skip_bits) - 1
    sub_mask = (1 << sub_bits) - 1
    end = 8 * (len(data) - 4)
    bit, pixel, n_events = 0, 0, 0
    while bit + skip_bits <= end:
        byte = bit >> 3
        word = (data[byte] | (data[byte + 1] << 8) | (data[byte + 2] << 16)) >> (bit & 7)
        skip = word & overflow
        bit += skip_bits
        pixel += skip
        if pixel >= n_pixels:
            return n_events if pixel == n_pixels else -1
        if skip == overflow:
            if wasteful:
                bit += sub_bits
            continue
        positions[n_events] = pixel
        symbols[n_events] = (word >> skip_bits) & sub_mask
        n_events += 1
        pixel += 1
        bit += sub_bits
    # An event in the very last pixel leaves nothing to skip, and some encoders then write nothing.
    return n_events if pixel == n_pixels else -1


@numba.njit(nogil=True, cache=True)
def count_events(
    positions: NDArray[np.uint32],
    symbols: NDArray[np.uint8],
    width: int,
    horizontal_bits: int,
    vertical_bits: int,
    upsampling: int,
    image: NDArray[np.uint16],
) -> None:  # pragma: no cover - compiled
    """Add events to an image of the sensor's grid (upsampling 1) or of half pixels (2).

    A symbol holds the horizontal place in its low bits and the vertical one above, each a signed number: the
    top bit is 1 for the lower half.
    """
    for i in range(len(positions)):
        y, x = positions[i] // width, positions[i] % width
        if upsampling == 2:
            x = 2 * x + (1 - ((symbols[i] >> (horizontal_bits - 1)) & 1))
            y = 2 * y + (1 - ((symbols[i] >> (horizontal_bits + vertical_bits - 1)) & 1))
        image[y, x] += 1
