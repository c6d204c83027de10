"""What all imports of images share: finding files, agreeing on a size, the optics table."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfmap.engine import Context
from halfmap.errors import ParameterError

if TYPE_CHECKING:
    from halfmap.steps.import_.step import ImportImages


def expand(patterns: Sequence[Path], project: Path) -> list[Path]:
    """Files that names and patterns stand for, each once, sorted as a microscope numbers them.

    Raises
    ------
    ParameterError
        If a pattern matches nothing.
    """
    files: set[Path] = set()
    for pattern in patterns:
        matches = glob.glob(str(project / pattern))
        if not matches:
            raise ParameterError("no file has this name or matches this pattern", path=pattern)
        files.update(Path(match) for match in matches)
    return sorted(files)


def keep_common_size(ctx: Context, headers: list[dict[str, Any]], *, unit: str) -> list[dict[str, Any]]:
    """Leave out, and name, images whose width and height differ from those of most."""
    sizes = Counter((header["width"], header["height"]) for header in headers)
    (width, height), _ = sizes.most_common(1)[0]
    kept = []
    for header in headers:
        if (header["width"], header["height"]) == (width, height):
            kept.append(header)
            continue
        size = f"{header['width']} × {header['height']}"
        reason = f"{header['file']}: is {size} px, the others {width} × {height}; import it under its own optics group"
        ctx.fail(unit, header["file"], reason)
    return kept


def common_pixel_size(step: ImportImages, headers: list[dict[str, Any]]) -> float:
    """The pixel size given, or else the one that all headers agree on.

    Raises
    ------
    ParameterError
        If the headers state none, or several.
    """
    if step.pixel_size is not None:
        return step.pixel_size
    stated = sorted({header["pixel_size"] for header in headers if header["pixel_size"]})
    hint = "give it with --pixel-size"
    if not stated:
        raise ParameterError("the files' headers state no pixel size", hint=hint)
    if stated[-1] - stated[0] > 1e-3 * stated[0]:
        raise ParameterError(f"the files' headers state pixel sizes from {stated[0]:g} to {stated[-1]:g} Å", hint=hint)
    return stated[0]


def optics_row(step: ImportImages, **more: Any) -> dict[str, Any]:
    """One row of the optics table, with further columns after RELION's."""
    return {
        "rlnOpticsGroupName": step.optics_group,
        "rlnOpticsGroup": 1,
        "rlnVoltage": step.voltage,
        "rlnSphericalAberration": step.spherical_aberration,
        "rlnAmplitudeContrast": step.amplitude_contrast,
        **more,
    }
