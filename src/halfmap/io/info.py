"""What is in a file, in one screen: images, tables, coordinates, gain references, atomic models."""

from __future__ import annotations

import bz2
import gzip
import math
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from halfmap.errors import FileFormatError
from halfmap.io.binary import file_size, opened

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    from halfmap.io.assemblies import Copies
    from halfmap.io.mrc import MrcHeader

SAMPLED_px = 1 << 25
"""Pixels read for statistics; of larger files a few sections stand for all."""

_BEGINNING = 4096
_UNPACK = {".gz": gzip.open, ".bz2": bz2.open}
_KNOWN = "MRC, MRCS, MAP, STAR, CS, TIFF, EER, .gain, coordinates (.box, .txt, .csv), PDB and mmCIF are known"


def describe(path: str | Path) -> Group:
    """Describe a file for the terminal.

    The format is told by the suffix, and where that says nothing by the file's first bytes. Statistics of
    images are taken from at most `SAMPLED_px` pixels, so that a stack of any size takes a second and little
    memory; where that is less than all, the description says so.

    Parameters
    ----------
    path : path
        MRC image, stack or map (also `.gz`, `.bz2`), STAR or `.cs` table, TIFF or EER movie, gain reference,
        coordinates, atomic model.

    Returns
    -------
    rich.console.Group
        To be printed by rich.

    Raises
    ------
    FileFormatError, TableError
        If the file is missing, corrupt, or of no known format.
    """
    path = Path(path)
    size = file_size(path)
    parts = _DESCRIBERS[_format(path)](path)
    from rich.console import Group
    from rich.text import Text

    title = Text.assemble((path.name, "bold"), f"  {_bytes(size)}  in {path.absolute().parent}")
    return Group(title, "", *parts)


def facts(rows: Iterable[tuple[str, object]]) -> Table:
    """Lay out pairs of a name and a value as two columns; a value None leaves its row out."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, value in rows:
        if value is not None:
            # File names may hold brackets, which rich would read as mark-up.
            table.add_row(Text(name, style="cyan"), value if isinstance(value, Text) else Text(str(value)))
    return table


def warning(text: str) -> Text:
    """Give a value that is a reason to worry its colour."""
    from rich.text import Text

    return Text(text, style="yellow")


def _bytes(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _UNPACK:
        suffixes.pop()
    kind = _SUFFIXES.get(suffixes[-1] if suffixes else "")
    return kind or _format_by_content(path)


def _format_by_content(path: Path) -> str:
    with opened(path) as stream:
        start = stream.read(_BEGINNING)
    unpack = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open}.get(start[:2])
    if unpack is not None:
        try:
            with unpack(path, "rb") as stream:
                start = stream.read(_BEGINNING)
        except (OSError, EOFError, zlib.error) as error:
            raise FileFormatError("is corrupt compressed data", path=path, hint="copy it again") from error
    if start[:6] == b"\x93NUMPY" or start[:6] == b"\x94CSDAT":
        return "cs"
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if start[208:211] == b"MAP":
        return "mrc"
    if b"\0" not in start:
        if start.startswith((b"HEADER", b"ATOM  ", b"REMARK", b"CRYST1")) or b"_atom_site." in start:
            return "model"
        if any(line.startswith(b"data_") for line in start.splitlines()):
            return "model" if b"_entry.id" in start else "star"
    raise FileFormatError("is of no format that Halfmap knows", path=path, hint=_KNOWN)


def _spread(n: int, section_px: int) -> NDArray[np.int64]:
    """Sections to take statistics from: all, or as many as may be read, evenly spread."""
    wanted = max(1, min(n, SAMPLED_px // max(1, section_px)))
    return np.unique(np.linspace(0, n - 1, wanted).round().astype(np.int64))


def _statistics(
    read: Callable[[int], NDArray], sections: NDArray[np.int64], total: int, word: str
) -> list[tuple[str, object]]:
    """Minimum, mean, maximum and deviation, section by section."""
    count, mean, square, low, high, bad = 0, 0.0, 0.0, math.inf, -math.inf, 0
    for section in sections:
        values = read(int(section)).astype(np.float64, copy=False).ravel()
        finite = values[np.isfinite(values)]
        bad += values.size - finite.size
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            # Merged so that a large mean costs no precision (Chan, Golub & LeVeque 1983).
            difference = float(finite.mean()) - mean
            whole = count + finite.size
            square += float(finite.var()) * finite.size + difference**2 * count * finite.size / whole
            mean += difference * finite.size / whole
            count = whole
    label = "values" if len(sections) == total else f"values of {len(sections)} of {total:,} {word}s"
    rows: list[tuple[str, object]] = []
    if count:
        deviation = math.sqrt(square / count)
        text = f"min {low:.6g}, mean {mean:.6g}, max {high:.6g}, standard deviation {deviation:.6g}"
        rows.append((label, text))
    if bad:
        rows.append(("", warning(f"{bad:,} are NaN or infinite")))
    return rows


def _mrc(path: Path) -> list[RenderableType]:
    from halfmap.io.mrc import read_header, read_sections

    header = read_header(path)
    n, h, w = header.shape
    sections = _spread(n, h * w)
    if header.compression is not None:
        sections = np.arange(len(sections))  # the file is unpacked only as far as the last of them
    statistics = _statistics(lambda i: read_sections(header, i), sections, n, "section")
    return [facts([*_mrc_facts(header), *statistics])]


def _mrc_facts(header: MrcHeader) -> list[tuple[str, object]]:
    n, h, w = header.shape
    is_volume = n > 1 and not header.is_stack
    kind = f"volume of {w} × {h} × {n} voxels (x, y, z)" if is_volume else f"image of {w} × {h} px"
    if n > 1 and not is_volume:
        kind = f"stack of {n:,} images of {w} × {h} px"
    size: object = warning("not stated in the header")
    if header.pixel_size is not None:
        size = f"{header.pixel_size:.6g} Å"
        if is_volume and abs(header.voxel_size[2] - header.pixel_size) > 0.01 * header.pixel_size:
            size = warning(" × ".join(f"{value:.6g}" for value in header.voxel_size) + " Å, not cubes")
    extent = (w, h, n) if is_volume else (w, h)
    extended = header.data_offset - 1024
    return [
        ("holds", f"MRC {kind}"),
        ("pixel size", size),
        (
            "extent",
            " × ".join(f"{k * header.pixel_size:.1f}" for k in extent) + " Å" if header.pixel_size else None,
        ),
        ("type", f"{header.dtype} (mode {header.mode}{', big-endian' if header.byte_order == '>' else ''})"),
        ("compression", header.compression),
        (
            "origin",
            " , ".join(f"{v:g}" for v in header.origin) + " Å" if any(header.origin) else None,
        ),
        ("space group", header.space_group),
        ("extended header", f"{extended:,} bytes {header.extended_type}".strip() if extended else None),
    ]


def _tiff(path: Path) -> list[RenderableType]:
    from halfmap.io.tiff import EER_COMPRESSIONS, open_pages, read_tiff, tiff_info

    with open_pages(path) as (tiff, _):
        compressions = {int(page.compression) for page in tiff.pages[:2]}  # type: ignore[union-attr]
    if compressions & set(EER_COMPRESSIONS):
        return _eer(path)
    info = tiff_info(path)
    n, h, w = info.shape
    rows: list[tuple[str, object]] = [
        ("holds", f"TIFF {'movie of ' + format(n, ',') + ' frames' if n > 1 else 'image'} of {w} × {h} px"),
        ("pixel size", f"{info.pixel_size:.6g} Å" if info.pixel_size else warning("not stated in the tags")),
        ("type", f"{info.dtype}{' (two 4-bit pixels a byte)' if info.packed else ''}"),
        ("compression", info.compression),
    ]
    return [facts(rows + _statistics(lambda i: read_tiff(path, i), _spread(n, h * w), n, "frame"))]


def _eer(path: Path) -> list[RenderableType]:
    from halfmap.io.eer import eer_info, read_eer

    info = eer_info(path)
    h, w = info.shape
    first = min(32, info.n_frames)
    events = read_eer(path, 0, grouping=first)
    rows: list[tuple[str, object]] = [
        ("holds", f"EER movie of {info.n_frames:,} frames of {w} × {h} px"),
        ("electrons", f"{events.mean() / first:.4g} a pixel and frame, in the first {first} frames"),
        *[(f"  {name}", value) for name, value in list(info.metadata.items())[:16]],
    ]
    return [facts(rows)]


def _gain(path: Path) -> list[RenderableType]:
    from halfmap.io.gain import read_gain

    gain = read_gain(path)
    alive = gain[gain > 0]
    rows: list[tuple[str, object]] = [
        ("holds", f"gain reference of {gain.shape[1]} × {gain.shape[0]} px"),
        ("dead pixels", f"{gain.size - alive.size:,}"),
    ]
    return [facts(rows + _statistics(lambda _: gain, np.arange(1), 1, "image"))]


def _model(path: Path) -> list[RenderableType]:
    import gemmi

    from halfmap.io.assemblies import assemblies
    from halfmap.io.models import read_model

    units = read_model(path, assembly=None)
    structure = gemmi.read_structure(str(path), format=gemmi.CoorFormat.Detect)
    stated = assemblies(structure, path)
    elements, counts = np.unique(units.elements, return_counts=True)
    names = ", ".join(f"{gemmi.Element(int(z)).name} {n:,}" for z, n in zip(elements, counts, strict=True))
    chains = list(dict.fromkeys(units.chains.tolist()))
    shown = ", ".join(chains[:20]) + (f" and {len(chains) - 20} more" if len(chains) > 20 else "")
    rows: list[tuple[str, object]] = [
        ("holds", f"atomic model, {len(units):,} atoms without hydrogens and waters"),
        ("models", len(structure) if len(structure) > 1 else None),
        ("elements", names),
        ("chains", f"{len(chains)}: {shown}"),
        ("mass", f"{units.mass_kDa:.1f} kDa"),
        ("diameter", f"{units.diameter:.1f} Å"),
        ("B-factors", f"{units.b_factors.min():.1f} to {units.b_factors.max():.1f} Å²"),
        ("assemblies", _assemblies_text(stated)),
    ]
    if "1" in stated:
        whole = read_model(path, assembly="1")
        rows.append(
            ("assembly 1", f"{len(whole):,} atoms, {whole.mass_kDa:.1f} kDa, {whole.diameter:.1f} Å wide")
        )
    return [facts(rows)]


def _assemblies_text(stated: dict[str, list[Copies]]) -> str:
    if not stated:
        return "none stated: the file is its own"
    copies = [f"{name} ({max(len(c.operators) for c in parts)} copies)" for name, parts in stated.items()]
    return ", ".join(copies[:8]) + (f" and {len(copies) - 8} more" if len(copies) > 8 else "")


def _star(path: Path) -> list[RenderableType]:
    from halfmap.io.info_tables import describe_star

    return describe_star(path)


def _cs(path: Path) -> list[RenderableType]:
    from halfmap.io.info_tables import describe_cs

    return describe_cs(path)


def _coordinates(path: Path) -> list[RenderableType]:
    from halfmap.io.info_tables import describe_coordinates

    return describe_coordinates(path)


_SUFFIXES = {
    **dict.fromkeys((".mrc", ".mrcs", ".map", ".ccp4", ".st", ".rec"), "mrc"),
    **dict.fromkeys((".tif", ".tiff"), "tiff"),
    **dict.fromkeys((".cif", ".mmcif", ".pdb", ".ent"), "model"),
    **dict.fromkeys((".box", ".txt", ".csv"), "coordinates"),
    ".star": "star",
    ".cs": "cs",
    ".eer": "eer",
    ".gain": "gain",
}

_DESCRIBERS: dict[str, Callable[[Path], list[RenderableType]]] = {
    "mrc": _mrc,
    "tiff": _tiff,
    "eer": _eer,
    "gain": _gain,
    "model": _model,
    "star": _star,
    "cs": _cs,
    "coordinates": _coordinates,
}
