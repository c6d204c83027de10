"""Read Falcon EER movies: electron events summed to fractions, on the sensor's grid or at half pixels.

Rows are in the order of the events, which is how RELION reads EER: unlike other TIFFs they are not flipped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray

from halfmap.errors import FileFormatError, ParameterError
from halfmap.io.binary import decoding_threads, file_size, opened
from halfmap.io.eer_kernel import PADDING_BYTES, LONGEST_CODE_bits, count_events, decode_events
from halfmap.io.tiff import EER_COMPRESSIONS, frame_numbers, frame_page, frame_pieces, open_pages

_LEGACY_FOOTER = b"ThermoFisherECComp"
_METADATA_TAG = 65001
_TRUNCATED = "copy or transfer the file again"


@dataclass(frozen=True)
class EerInfo:
    """What an EER movie holds, without decoding a frame.

    Attributes
    ----------
    path : Path
        File it was read from.
    n_frames : int
        Raw frames, not fractions.
    shape : tuple of 2 int
        (y, x) pixels of the sensor.
    metadata : dict of str to str
        The acquisition's own record (exposure, dose, camera), values with their unit.
    """

    path: Path
    n_frames: int
    shape: tuple[int, int]
    metadata: dict[str, str]
    first_frame: int
    skip_bits: int
    horizontal_bits: int
    vertical_bits: int

    def n_fractions(self, grouping: int) -> int:
        """Count the fractions of `grouping` frames; frames left over at the end are dropped, as in RELION."""
        return self.n_frames // grouping


def eer_info(path: str | Path) -> EerInfo:
    """Read what an EER movie holds without decoding a frame.

    Raises
    ------
    FileFormatError
        If the file is missing, truncated, not an EER movie, or of a kind without a TIFF around its frames.
    """
    path = Path(path)
    _refuse_legacy(path)
    with open_pages(path) as (tiff, n_pages):
        first = frame_page(tiff, path, 0)
        metadata = _metadata(first)
        # Some programs put the sum of all frames before them.
        summed = int(int(first.compression) not in EER_COMPRESSIONS)
        page = frame_page(tiff, path, summed) if summed < n_pages else first
        if int(page.compression) not in EER_COMPRESSIONS:
            raise FileFormatError("is a TIFF without electron events", path=path, hint="name it .tif")
        skip, horizontal, vertical = _code(page)
        shape = (page.imagelength, page.imagewidth)
    if min(shape) <= 0 or shape[0] * shape[1] > 1 << 30:
        raise FileFormatError(f"has the impossible shape {shape[0]} x {shape[1]}", path=path, hint=_TRUNCATED)
    if skip < 2 or skip > 14 or horizontal != vertical or skip + 2 * horizontal > LONGEST_CODE_bits:
        code = f"{skip} + {horizontal} + {vertical} bits"
        raise FileFormatError(f"has events of {code}, which is no known kind", path=path, hint=_TRUNCATED)
    return EerInfo(path, n_pages - summed, shape, metadata, summed, skip, horizontal, vertical)


def _refuse_legacy(path: Path) -> None:
    size = file_size(path)
    with opened(path) as stream:
        stream.seek(max(0, size - 24))
        if stream.read(24).startswith(_LEGACY_FOOTER):
            message = "is an EER prototype without a TIFF around its frames"
            raise FileFormatError(message, path=path, hint="convert it with the microscope's software")


def _code(page: tifffile.TiffPage) -> tuple[int, int, int]:
    """Bits of an event: empty pixels before it, horizontal and vertical sub-pixel."""
    if int(page.compression) == 65000:
        return 8, 2, 2
    if int(page.compression) == 65001:
        return 7, 2, 2
    horizontal = int(page.tags.valueof(65008, default=2))
    return (
        int(page.tags.valueof(65007, default=7)),
        horizontal,
        int(page.tags.valueof(65009, default=horizontal)),
    )


def _metadata(page: tifffile.TiffPage) -> dict[str, str]:
    value = page.tags.valueof(_METADATA_TAG, default=b"")
    text = value.encode() if isinstance(value, str) else bytes(value) if isinstance(value, bytes) else b""
    try:
        items = ElementTree.fromstring(text.strip(b"\0")).findall(".//item")
    except ElementTree.ParseError:
        return {}
    return {
        item.attrib["name"]: f"{(item.text or '').strip()} {item.attrib.get('unit', '')}".strip()
        for item in items
        if "name" in item.attrib
    }


def read_eer(
    path: str | Path,
    fractions: int | slice | Sequence[int] | NDArray | None = None,
    *,
    grouping: int = 32,
    upsampling: int = 1,
    workers: int | None = None,
) -> NDArray:
    """Sum the events of an EER movie to fractions.

    Parameters
    ----------
    path : path
        EER movie.
    fractions : int, slice, sequence of int or None
        Fractions counted from 0, in the order they are to come; None for all. Memory is that of these.
    grouping : int
        Frames summed to a fraction; frames left over at the end are dropped.
    upsampling : int
        1 for the sensor's pixels, 2 for half pixels from the events' sub-pixel positions.
    workers : int, optional
        Threads, each working on a fraction; as many as there are processors, at most 8, if not given.

    Returns
    -------
    ndarray (n, y, x), or (y, x) for one fraction
        Counts of electrons, uint8, or uint16 where a fraction has more than 255 frames.

    Raises
    ------
    FileFormatError
        As `eer_info`; if a frame's events do not add up to its pixels, which is how damage shows.
    ParameterError
        If the grouping or the upsampling is not possible.

    Notes
    -----
    The stream is a run-length code: empty pixels to skip, then two or one bits each of the event's
    horizontal and vertical place in its pixel [1]_. Where the 8-bit code does not add up it is read once
    more as prototypes wrote it, with a symbol after each overflow.

    References
    ----------
    .. [1] Guo et al. (2020) IUCrJ 7, 860. https://doi.org/10.1107/S205225252000929X
    """
    info = eer_info(path)
    if grouping < 1:
        raise ParameterError(f"a fraction of {grouping} frames cannot be", hint="give 1 or more")
    if upsampling not in (1, 2) or (upsampling == 2 and info.horizontal_bits == 0):
        raise ParameterError(
            f"EER cannot be read at upsampling {upsampling}", path=path, hint="choose 1 or 2"
        )
    if info.n_fractions(grouping) == 0:
        message = f"has {info.n_frames} frames, fewer than one fraction of {grouping}"
        raise FileFormatError(message, path=path, hint="sum fewer frames to a fraction")
    chosen = frame_numbers(info.path, info.n_fractions(grouping), fractions)
    height, width = (upsampling * n for n in info.shape)
    out = np.zeros((len(chosen), height, width), np.uint8 if grouping <= 255 else np.uint16)
    with open_pages(info.path) as (tiff, _), opened(info.path) as stream:
        numbers = [list(range(grouping * fraction, grouping * (fraction + 1))) for fraction in chosen]
        pages = [[frame_page(tiff, path, info.first_frame + n) for n in group] for group in numbers]

        def fill(k: int) -> None:
            for number, page in zip(numbers[k], pages[k], strict=True):
                data = _events(info, stream.fileno(), number, page)
                _add(info, number, data, upsampling, out[k])

        with ThreadPoolExecutor(workers or decoding_threads()) as pool:
            list(pool.map(fill, range(len(chosen))))
    return out[0] if isinstance(fractions, int | np.integer) else out


def _events(info: EerInfo, descriptor: int, number: int, page: tifffile.TiffPage) -> NDArray[np.uint8]:
    """Raw bytes of a frame, all its strips together, with padding."""
    shape = (page.imagelength, page.imagewidth)
    if shape != info.shape or int(page.compression) not in EER_COMPRESSIONS:
        raise FileFormatError(f"frame {number + 1} is not like the first", path=info.path, hint=_TRUNCATED)
    pieces = frame_pieces(info.path, number, page)
    raw = b"".join(os.pread(descriptor, count, offset) for offset, count in pieces)
    return np.frombuffer(raw + bytes(PADDING_BYTES), np.uint8)


def _add(info: EerInfo, number: int, data: NDArray[np.uint8], upsampling: int, image: NDArray) -> None:
    sub_bits = info.horizontal_bits + info.vertical_bits
    capacity = 8 * len(data) // (info.skip_bits + sub_bits) + 1
    positions, symbols = np.empty(capacity, np.uint32), np.empty(capacity, np.uint8)
    for wasteful in (False, True) if info.skip_bits == 8 else (False,):
        n = decode_events(
            data, info.skip_bits, sub_bits, wasteful, info.shape[0] * info.shape[1], positions, symbols
        )
        if n >= 0:
            bits = info.horizontal_bits, info.vertical_bits
            count_events(positions[:n], symbols[:n], info.shape[1], *bits, upsampling, image)
            return
    message = (
        f"frame {number + 1} is corrupt: its events do not add up to {info.shape[0]} x {info.shape[1]} pixels"
    )
    raise FileFormatError(message, path=info.path, hint=_TRUNCATED)
