"""The command `halfmap external-reconstruct`: maps for RELION, which calls it in every iteration."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfmap.engine import Input, Param
from halfmap.engine.parameters import Form
from halfmap.errors import FileFormatError, HalfmapError, ParameterError
from halfmap.io.mrc_writer import write_mrc
from halfmap.io.star import read_star
from halfmap.log import log
from halfmap.ops._slice_volume import _envelope
from halfmap.ops.masks import soft_sphere
from halfmap.search.backprojector import Backprojection
from halfmap.search.halfmaps import HalfSums, believed, solved
from halfmap.search.reference import read_mask
from halfmap.search.regularise import Evidence
from halfmap.search.regularise.external_files import Request, read
from halfmap.search.regularise.named import Settings, find

_FILTER, _PARTICLE, _RUN = "Filter", "Particle", "Run"

_LOOK_s = 0.5

_EDGE_PX = 3.0
"""Width of the edge of the sphere in the box beyond which RELION wants no detail."""

_EDGE_A = 8.0
_WIDE = 0.9
"""Diameter over the box's side, where none is known."""


class ReconstructSettings(Form):
    """Make a map that RELION asks for (relion_refine --external_reconstruct).

    To be named in the environment variable RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE, with its options. It reads
    the sums of images that RELION has written, makes the map, and writes it where RELION reads it, in
    RELION's units. Filters other than fsc need both half maps: files of the other half set are waited for.
    The last, joined map is made by fsc in any case.
    """

    star: Path = Input("STAR file that RELION has written")
    regulariser: str = Param(
        "fsc",
        "filter of the maps: fsc, nonuniform, sidesplitter, learned, or one that a package adds",
        unit="none",
        section=_FILTER,
    )
    weights: Path | None = Param(
        None,
        "weights of the network of the learned filter (.npz); default: those that ship",
        unit="none",
        section=_FILTER,
    )
    mask: Path | None = Param(
        None,
        "mask of the particle, 0 to 1; default: RELION's, else a sphere of the diameter",
        unit="none",
        section=_PARTICLE,
    )
    diameter: float | None = Param(
        None, "diameter of the particle; default: RELION's", unit="Å", section=_PARTICLE, gt=0
    )
    pixel_size: float | None = Param(
        None, "pixel size of the map; default: RELION's", unit="Å/px", section=_PARTICLE, gt=0
    )
    threads: int = Param(
        1, "threads of each process; there are two at a time", unit="none", section=_RUN, ge=1
    )
    wait: float = Param(
        1800.0, "longest time to wait for the files of the other half set", unit="s", section=_RUN, ge=0
    )


@dataclass(frozen=True)
class _Known:
    """What RELION's other files say of the particle: pixel size and diameter in Å, mask."""

    pixel_size: float | None = None
    diameter: float | None = None
    mask: Path | None = None


def reconstruct(settings: ReconstructSettings) -> None:
    """Read what is asked for, make the map and write it, whole or not at all.

    Raises
    ------
    HalfmapError
        If a file cannot be used, the regulariser is none that can be used here, or the files of the other
        half set have not come.
    """
    torch.set_num_threads(settings.threads)
    if settings.regulariser == "external":
        raise ParameterError("external would have another program make the map", hint="name that to RELION")
    regulariser = find(settings.regulariser, Settings(weights=settings.weights))
    request = read(settings.star)
    half = _half(settings.star)
    known = _known(request)
    pixel_size = settings.pixel_size or known.pixel_size
    if pixel_size is None:
        log.warning("the pixel size is not known: the map's header says 1 Å (--pixel-size)")
    if half is None or settings.regulariser == "fsc":
        if settings.regulariser != "fsc":
            log.info("%s is not of a half set: made by fsc", settings.star.name)
        volume = solved(request.sums(), request.prior)
    else:
        other, sums = _mate(settings, half)
        requests = (request, other) if half == 0 else (other, request)
        own = request.sums()
        halves = HalfSums.of((own, sums) if half == 0 else (sums, own))
        agreed = believed(torch.from_numpy(request.correlation).float())
        evidence = Evidence(
            maps=halves.unfiltered(),
            mask=_mask(settings, known, request.box, pixel_size),
            correlation=agreed,
            prior=torch.stack([each.prior for each in requests]),
            least=halves.least,
            pixel_size=pixel_size or 1.0,
            box=request.box,
            iteration=_iteration(settings.star) or 1,
            stage="near",
        )
        volume = regulariser(evidence)(halves.halves, settings.star.stem)[half]
    # RELION's coefficients are divided by the number of pixels.
    volume = _flattened(volume * float(request.box) ** 2, request.padded_box)
    if not bool(torch.isfinite(volume).all()):
        raise FileFormatError("makes a map of values that are not numbers", path=settings.star)
    write_mrc(request.result, volume.numpy(), pixel_size=pixel_size or 1.0, stack=False)


def _flattened(volume: Tensor, padded_box: int) -> Tensor:
    """The same with its mean outside of the sphere in the box, as RELION leaves it.

    RELION does so before it divides the map by the envelope of interpolation.
    """
    n = len(volume)
    envelope = _envelope(n, padded_box, volume)
    inside = soft_sphere((n,) * 3, radius=n / 2, edge=_EDGE_PX)
    outside, volume = 1 - inside, volume * envelope
    mean = (volume * outside).sum() / outside.sum()
    return (volume * inside + mean * outside) / envelope


def _half(star: Path) -> int | None:
    found = re.search(r"_half([12])_", star.name)
    return None if found is None else int(found[1]) - 1


def _iteration(star: Path) -> int | None:
    found = re.search(r"_it(\d+)_", star.name)
    return None if found is None else int(found[1])


def _before(star: Path, ending: str) -> Path | None:
    """RELION's file of the iteration before, beside a STAR file."""
    iteration = _iteration(star)
    if not iteration:
        return None
    stem = star.name[: star.name.index("_it")]
    path = star.with_name(f"{stem}_it{iteration - 1:03d}_{ending}")
    return path if path.exists() else None


def _mate(settings: ReconstructSettings, half: int) -> tuple[Request, Backprojection]:
    """What is asked for of the other half set, and its sums, once all their files are there.

    RELION writes the STAR file last; one that is older than the iteration is of an earlier attempt.
    """
    star = settings.star
    path = star.with_name(star.name.replace(f"_half{half + 1}_", f"_half{2 - half}_"))
    began = _before(star, "optimiser.star")
    since = 0.0 if began is None else began.stat().st_mtime
    until = time.monotonic() + settings.wait
    while True:
        try:
            if path.exists() and path.stat().st_mtime >= since:
                other = read(path)
                return other, other.sums()
            reason = "is not there" if not path.exists() else "is of an earlier attempt"
        except HalfmapError as error:
            reason = f"cannot be read: {error}"
        if time.monotonic() >= until:
            raise FileFormatError(
                f"of the other half set {reason}, after {settings.wait:g} s",
                path=path,
                hint="RELION makes both half maps at a time: see its messages, or give a longer --wait",
            )
        time.sleep(min(_LOOK_s, max(until - time.monotonic(), 0)))


def _known(request: Request) -> _Known:
    """What is known of the particle: what the file itself says, else RELION's of the iteration before."""
    optimiser = _general(_before(request.star, "optimiser.star"), "optimiser_general")
    model: Mapping[str, object] = {}
    for ending in ("half1_model.star", "half2_model.star", "model.star"):
        model = model or _general(_before(request.star, ending), "model_general")
    mask = optimiser.get("rlnSolventMaskName")
    return _Known(
        request.pixel_size or _positive(model.get("rlnPixelSize")),
        request.diameter or _positive(optimiser.get("rlnParticleDiameter")),
        Path(mask) if isinstance(mask, str) and mask not in ("", "None") else None,
    )


def _general(path: Path | None, block: str) -> Mapping[str, object]:
    """Block of values of a file, if it is there and can be read: what it says may be said by options."""
    if path is None:
        return {}
    try:
        found = read_star(path).get(block)
    except HalfmapError as error:
        log.warning("%s", error)
        return {}
    return found if isinstance(found, Mapping) else {}


def _positive(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _mask(settings: ReconstructSettings, known: _Known, box: int, pixel_size: float | None) -> Tensor:
    """Mask (box, box, box) of the particle."""
    path = settings.mask or known.mask
    if path is not None and pixel_size is not None:
        mask = read_mask(path, box * pixel_size)
        if len(mask) != box:
            raise ParameterError(f"{path}: the mask has {len(mask)} voxels a side, the map {box}")
        return mask
    if path is not None:
        raise ParameterError(
            "the pixel size is not known, without which the mask cannot be used", hint="give --pixel-size"
        )
    side = box * (pixel_size or 1.0)
    diameter = settings.diameter or known.diameter
    if diameter is None or pixel_size is None:
        diameter = _WIDE * side
        log.warning("the particle's diameter is not known: it is taken for %.0f %% of the box", 100 * _WIDE)
    edge = min(_EDGE_A, side / 8) if pixel_size is not None else 3.0
    radius = min(diameter / 2, side / 2 - edge)
    return soft_sphere((box,) * 3, radius=radius, edge=edge, pixel_size=pixel_size or 1.0)
