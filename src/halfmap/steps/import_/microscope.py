"""What all imports of images share: finding files, agreeing on a size, the optics table."""

from __future__ import annotations

import filecmp
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfmap.engine import Context
from halfmap.errors import ParameterError
from halfmap.io.binary import sum_of_ends
from halfmap.io.names import find_files, name_in
from halfmap.log import log

if TYPE_CHECKING:
    from halfmap.steps.import_.step import ImportImages


USUAL_PIXEL_SIZE_A = 0.3, 8.0
"""Of micrographs that particles are solved from; beyond, a unit or a digit was mistaken."""

SAME, CALIBRATED = 0.003, 0.06
"""Differences of pixel sizes: by rounding, and of what a microscope states from what calibration gives."""


def expand(patterns: Sequence[Path], project: Path) -> list[Path]:
    """Files that names and patterns stand for, each once, sorted as a microscope numbers them.

    Raises
    ------
    ParameterError
        If a pattern matches nothing.
    """
    files: set[Path] = set()
    for pattern in patterns:
        matches = find_files(pattern, project)
        if not matches:
            raise ParameterError("no file has this name or matches this pattern", path=pattern)
        files.update(matches)
    return sorted(files)


def examine_all(
    ctx: Context, examine: Callable[[Path], dict[str, Any]], files: Sequence[Path], *, unit: str
) -> list[dict[str, Any]]:
    """Examine every file; leave out, and name, those that cannot be read, copies, and odd sizes."""
    work = functools.partial(_examine, examine=examine, project=ctx.project)
    headers = ctx.map(work, files, key=ctx.relative, unit=unit, version=_stamp, light=True)
    headers = [header | {"file": str(ctx.resolve(header["file"]))} for header in headers]
    return _keep_common_size(ctx, _without_copies(ctx, headers, unit=unit), unit=unit)


def _examine(path: Path, *, examine: Callable[[Path], dict[str, Any]], project: Path) -> dict[str, Any]:
    # What the job remembers must hold when the project has been moved.
    return examine(path) | {"file": name_in(path, project).as_posix(), "contents": sum_of_ends(path)}


def _stamp(path: Path) -> str | None:
    """Size and date of a file; of one that is gone they are not known."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return f"{stat.st_size} {stat.st_mtime:.3f}"


def contents(headers: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The column by which later steps notice that a file has become another; none of older records."""
    found = [header.get("contents", "") for header in headers]
    return {"hmContents": found} if all(found) else {}


def _without_copies(ctx: Context, headers: list[dict[str, Any]], *, unit: str) -> list[dict[str, Any]]:
    """Leave out, and name, all but one of the files that hold the same, which would count twice."""
    alike: dict[str, list[str]] = {}
    for header in headers:
        alike.setdefault(header.get("contents") or header["file"], []).append(header["file"])
    copies = set[str]()
    for files in (files for files in alike.values() if len(files) > 1):
        # One that was moved stays under the name that all was made under.
        files.sort(key=lambda file: Path(file).exists())
        for i, file in enumerate(files):
            first = next(
                (other for other in files[:i] if other not in copies and _is_copy(file, other)), None
            )
            if first is not None:
                copies.add(file)
                ctx.fail(unit, ctx.relative(file), f"is the same {unit} as {ctx.relative(first)}")
    return [header for header in headers if header["file"] not in copies]


def _is_copy(file: str, other: str) -> bool:
    """Whether two files with the same ends are the same throughout, as far as they are there."""
    if not (Path(file).exists() and Path(other).exists()):
        return True
    # Ends may be blank; what is compared is remembered while neither file changes.
    return Path(file).samefile(other) or filecmp.cmp(file, other, shallow=False)


def _keep_common_size(ctx: Context, headers: list[dict[str, Any]], *, unit: str) -> list[dict[str, Any]]:
    sizes = Counter((header["width"], header["height"]) for header in headers)
    (width, height), _ = sizes.most_common(1)[0]
    kept = []
    for header in headers:
        if (header["width"], header["height"]) == (width, height):
            kept.append(header)
            continue
        key = ctx.relative(header["file"])
        size = f"{header['width']} × {header['height']}"
        reason = (
            f"is {size} px, most others are {width} × {height}; import those of its size by themselves, "
            "with another --optics-group"
        )
        ctx.fail(unit, key, reason)
    return kept


def optics_row(step: ImportImages, headers: list[dict[str, Any]]) -> dict[str, Any]:
    """Make the one row of the optics table, as far as it is the same for movies and micrographs.

    Raises
    ------
    ParameterError
        If no pixel size is given and the headers state none, or several.
    """
    return {
        "rlnOpticsGroupName": step.optics_group,
        "rlnOpticsGroup": 1,
        "rlnMicrographOriginalPixelSize": _common_pixel_size(step, headers),
        "rlnVoltage": step.voltage,
        "rlnSphericalAberration": step.spherical_aberration,
        "rlnAmplitudeContrast": step.amplitude_contrast,
    }


def _common_pixel_size(step: ImportImages, headers: list[dict[str, Any]]) -> float:
    """Pixel size as given, or else the one that all headers agree on; an unlikely one is warned of.

    Raises
    ------
    ParameterError
        If an unlikely one is given and the headers state another, or none is given and they state none.
    """
    size = step.pixel_size or _size_in_headers(headers)
    low, high = USUAL_PIXEL_SIZE_A
    if not low <= size <= high:
        if step.pixel_size is not None:
            _refuse_unlikely(size, headers)
        text = "is the pixel size of %g Å right? usual ones are between %g and %g Å%s"
        nm = f"; if it is in nm, it is {10 * size:g} Å" if low <= 10 * size <= high else ""
        log.warning(text, size, low, high, nm)
    if step.pixel_size is not None:
        _compare_with_headers(size, headers)
    return size


def _refuse_unlikely(size: float, headers: list[dict[str, Any]]) -> None:
    low, high = USUAL_PIXEL_SIZE_A
    likely = [
        float(f"{stated:.4g}")
        for stated in (header["pixel_size"] for header in headers)
        if stated and stated != 1 and low <= stated <= high
    ]
    if likely:
        other, number = Counter(likely).most_common(1)[0]
        message = (
            f"--pixel-size {size:g} Å is not a usual one ({low:g} to {high:g} Å), and the headers of "
            f"{number} of {len(headers)} files say {other:g} Å"
        )
        raise ParameterError(message, hint=f"give --pixel-size {other:g}, or mend the headers")


def _compare_with_headers(size: float, headers: list[dict[str, Any]]) -> None:
    """Say where headers state another pixel size than the one given, which is taken nevertheless."""
    # Headers that say exactly 1 Å were often never set.
    stated = Counter(
        float(f"{header['pixel_size']:.4g}")
        for header in headers
        if header["pixel_size"] and header["pixel_size"] != 1 and abs(header["pixel_size"] / size - 1) > SAME
    )
    if not stated:
        return
    other, count = stated.most_common(1)[0]
    ratio = other / size
    files = f"{count} of {len(headers)} files"
    text = f"--pixel-size {size:g} Å is taken, but the headers of {files} say {other:g} Å"
    if min(abs(ratio - 2), abs(1 / ratio - 2)) < CALIBRATED:
        log.warning("%s: is one of them that of super-resolution or binned pixels?", text)
    elif abs(ratio - 1) > CALIBRATED:
        log.warning("%s: which is right? A wrong one makes every later size and resolution wrong", text)
    else:
        log.info("%s", text)


def _size_in_headers(headers: list[dict[str, Any]]) -> float:
    stated = sorted(header["pixel_size"] for header in headers if header["pixel_size"])
    hint = "give it with --pixel-size"
    if not stated:
        raise ParameterError("the files' headers state no pixel size", hint=hint)
    if stated[-1] - stated[0] > 1e-3 * stated[0]:
        message = f"the files' headers state pixel sizes from {stated[0]:g} to {stated[-1]:g} Å"
        raise ParameterError(message, hint=hint)
    # Headers hold float32, whose digits beyond the sixth are not what anybody entered.
    size = float(f"{stated[0]:.6g}")
    log.info("pixel size %g Å, from the headers", size)
    if size == 1.0:
        log.warning("headers that say exactly 1 Å were often never set; if so, give --pixel-size")
    return size
