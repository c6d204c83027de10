"""The maps and the table of a comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from torch import Tensor

from halfmap.io.mrc import write_mrc
from halfmap.io.star import write_star
from halfmap.ops.rotations import angular_distance, to_euler
from halfmap.steps.compare.difference import Difference
from halfmap.steps.compare.pair import Pair

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.compare.step import CompareStep

REGION = {
    "hmRegionX": pl.Float64,
    "hmRegionY": pl.Float64,
    "hmRegionZ": pl.Float64,
    "hmRegionVolume": pl.Float64,
    "hmRegionMean": pl.Float64,
    "hmRegionPeak": pl.Float64,
}


def write(step: CompareStep, ctx: Context, pair: Pair, found: Difference) -> None:
    """Write the second map on the grid of the first, the difference, the correlations and the regions."""
    volumes: dict[str, Tensor] = {
        "b_on_a.mrc": pair.b,
        "b_scaled.mrc": found.scaled,
        "difference.mrc": found.sigmas,
        "local_correlation.mrc": found.local * (pair.mask > 0),
        "mask.mrc": pair.mask,
    }
    for name, volume in volumes.items():
        array = volume.numpy().astype(np.float32)
        write_mrc(ctx.folder / name, array, pixel_size=pair.pixel_size, origin=pair.origin, stack=False)
    blocks: dict[str, dict[str, str | int | float] | pl.DataFrame] = {
        "general": _general(step, ctx, pair, found),
        "fsc": _fsc(pair, found),
    }
    if found.regions:
        blocks["regions"] = pl.DataFrame(found.regions, schema=REGION)
    write_star(ctx.folder / "compare.star", blocks)


def _general(step: CompareStep, ctx: Context, pair: Pair, found: Difference) -> dict[str, str | int | float]:
    local = found.local[pair.inside]
    general: dict[str, str | int | float] = {
        "hmFirstMap": ctx.relative(pair.paths[0]),
        "hmSecondMap": ctx.relative(pair.paths[1]),
        "rlnPixelSize": pair.pixel_size,
        "rlnFinalResolution": found.resolution,
        "hmResolutionHalf": found.resolution_half,
        "hmComparedResolution": found.finest,
        "hmMapCorrelation": found.correlation,
        "hmLocalWindow": found.window,
        "hmLocalCorrelationMedian": float(local.median()),
        "hmDifferenceSigma": found.sigma,
        "hmDifferenceNoise": found.noise_from,
        "hmDifferenceLimit": step.sigma,
    }
    if not step.match_amplitudes:
        general["hmAmplitudeFactor"] = float(found.factor[0])
    if step.mask is not None:
        general["rlnMaskName"] = ctx.relative(ctx.resolve(step.mask))
    if pair.alignment is not None:
        alignment = pair.alignment
        rot, tilt, psi = to_euler(alignment.rotation).tolist()
        general |= {
            "rlnAngleRot": rot,
            "rlnAngleTilt": tilt,
            "rlnAnglePsi": psi,
            "hmTurnedBy": float(angular_distance(alignment.rotation, torch.eye(3, dtype=torch.float64))),
            **{
                f"hmShift{axis}": float(shift) * pair.pixel_size
                for axis, shift in zip("XYZ", alignment.shift_px, strict=True)
            },
            "hmMirrored": int(alignment.mirrored),
            "hmAlignedCorrelation": alignment.correlation,
            "hmChanceCorrelation": alignment.chance,
        }
        if pair.other_hand is not None:
            general["hmOtherHandCorrelation"] = pair.other_hand
    return general


def _fsc(pair: Pair, found: Difference) -> pl.DataFrame:
    shells, curves = np.arange(len(found.fsc.masked)), found.fsc
    return pl.DataFrame(
        {
            "rlnSpectralIndex": shells,
            "rlnResolution": shells / pair.side,
            "rlnAngstromResolution": pair.side / np.maximum(shells, 0.1),
            "rlnFourierShellCorrelationCorrected": curves.corrected.double().numpy(),
            "rlnFourierShellCorrelationUnmaskedMaps": curves.unmasked.double().numpy(),
            "rlnFourierShellCorrelationMaskedMaps": curves.masked.double().numpy(),
            "hmAmplitudeFactor": found.factor[: len(shells)].double().numpy(),
        }
    )
