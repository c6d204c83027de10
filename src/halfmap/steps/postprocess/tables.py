"""The maps, tables and the XML file of a post-processing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
import polars as pl
from numpy.typing import NDArray
from torch import Tensor

from halfmap.io.atomic import write_text
from halfmap.io.half_maps import HalfMaps
from halfmap.io.mrc import write_mrc
from halfmap.io.star import write_star
from halfmap.steps.postprocess.correlate import Curves
from halfmap.steps.postprocess.local import LocalMaps
from halfmap.steps.postprocess.sharpen import Guinier, Sharpened

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.postprocess.step import PostprocessStep

_DENSE = 0.476
"""Share of a mask that is particle and not solvent, as RELION and cisTEM take it to be."""

_NOTHING = -99.0
"""RELION's logarithm of an amplitude that is not there."""


def write(
    step: PostprocessStep,
    ctx: Context,
    halves: HalfMaps,
    mask: Tensor,
    curves: Curves,
    sharpened: Sharpened,
    maps: LocalMaps | None,
) -> None:
    """Write maps, curves and Guinier plot, with RELION's names, and the correlation for deposition."""
    volumes = {
        "postprocess.mrc": sharpened.volume,
        "postprocess_masked.mrc": sharpened.volume * mask,
        "mask.mrc": mask,
    }
    if maps is not None:
        volumes |= {
            "locally_filtered.mrc": maps.filtered,
            "denoised.mrc": maps.denoised,
            "locally_scaled.mrc": maps.scaled,
        }
    write_maps(ctx, halves, volumes)
    blocks = {
        "general": _general(step, ctx, halves, curves, sharpened),
        "fsc": _fsc(halves, mask, curves),
        "guinier": _guinier(sharpened.guinier),
    }
    write_star(ctx.folder / "postprocess.star", blocks)
    write_text(ctx.folder / "fsc.xml", fsc_xml(curves, halves.box * halves.pixel_size))


def write_maps(ctx: Context, halves: HalfMaps, volumes: dict[str, Tensor], *, label: str = "") -> None:
    """Write maps where the half maps are."""
    where = {"pixel_size": halves.pixel_size, "origin": halves.origin}
    for name, volume in volumes.items():
        array = volume.numpy().astype(np.float32)
        write_mrc(ctx.folder / name, array, **where, stack=False, label=label)


def _general(
    step: PostprocessStep, ctx: Context, halves: HalfMaps, curves: Curves, sharpened: Sharpened
) -> dict[str, str | int | float]:
    guinier = sharpened.guinier
    found: dict[str, str | int | float] = {
        "rlnFinalResolution": curves.resolution,
        "hmResolutionFine": curves.interval.fine,
        "hmResolutionCoarse": curves.interval.coarse,
        "hmResolutionHalf": curves.resolution_half,
        "hmResolutionHalfFine": curves.interval_half.fine,
        "hmResolutionHalfCoarse": curves.interval_half.coarse,
        "hmConfidence": step.confidence,
        "hmIndependentShare": curves.share,
        "rlnBfactorUsedForSharpening": guinier.b_factor,
        "rlnLowPassUsed": sharpened.lowpass,
        "rlnUnfilteredMapHalf1": ctx.relative(halves.paths[0]),
        "rlnUnfilteredMapHalf2": ctx.relative(halves.paths[1]),
        "rlnPixelSize": halves.pixel_size,
        "rlnRandomiseFrom": halves.box * halves.pixel_size / curves.fsc.from_shell,
        "rlnMaskName": ctx.relative(ctx.folder / "mask.mrc" if step.mask is None else ctx.resolve(step.mask)),
    }
    if math.isfinite(guinier.intercept):
        found |= {
            "rlnFittedSlopeGuinierPlot": guinier.b_factor / 4,
            "rlnFittedInterceptGuinierPlot": guinier.intercept,
            "rlnCorrelationFitGuinierPlot": guinier.correlation,
            "hmBfactorError": guinier.error,
        }
    return found


def _fsc(halves: HalfMaps, mask: Tensor, curves: Curves) -> pl.DataFrame:
    shells, side = np.arange(len(curves.fsc.corrected)), halves.box * halves.pixel_size
    unmasked, masked, randomised, corrected = (
        curve.double().numpy() for curve in (curves.fsc[0], curves.fsc[1], curves.fsc[2], curves.fsc[3])
    )
    more = _DENSE / max(float((mask > 0.5).double().mean()), 1e-6)
    full = more * unmasked / (1 + (more - 1) * unmasked)
    return pl.DataFrame(
        {
            "rlnSpectralIndex": shells,
            "rlnResolution": shells / side,
            "rlnAngstromResolution": side / np.maximum(shells, 0.1),
            "rlnFourierShellCorrelationCorrected": corrected,
            "rlnFourierShellCorrelationParticleMaskFraction": full,
            "rlnFourierShellCorrelationUnmaskedMaps": unmasked,
            "rlnFourierShellCorrelationMaskedMaps": masked,
            "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps": randomised,
        }
    )


def _guinier(guinier: Guinier) -> pl.DataFrame:
    line = guinier.intercept + guinier.b_factor / 4 * guinier.squared
    columns = {
        "rlnResolutionSquared": guinier.squared,
        "rlnLogAmplitudesOriginal": guinier.original,
        "rlnLogAmplitudesMTFCorrected": guinier.detected,
        "rlnLogAmplitudesWeighted": guinier.weighted,
        "rlnLogAmplitudesSharpened": guinier.sharpened,
        "rlnLogAmplitudesIntercept": line,
    }
    return pl.DataFrame({name: _finite(values) for name, values in columns.items()})


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isfinite(values), values, _NOTHING)


def fsc_xml(curves: Curves, side: float) -> str:
    """Corrected correlation as XML, for deposition."""
    title = "Halfmap corrected FSC of masked half maps"
    root = ElementTree.Element("fsc", title=title, xaxis="Resolution (A-1)", yaxis="Correlation Coefficient")
    for shell, value in enumerate(curves.fsc.corrected.tolist()):
        point = ElementTree.SubElement(root, "coordinate")
        ElementTree.SubElement(point, "x").text = f"{shell / side:.6f}"
        ElementTree.SubElement(point, "y").text = f"{value:.6f}"
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
