"""Estimate the CTF of one micrograph."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from halfmap.data.columns import format_vector
from halfmap.data.defocus import DefocusSurface
from halfmap.io.images import read_image
from halfmap.io.mrc import write_mrc
from halfmap.ops.ctf import ctf
from halfmap.steps.ctf import quality
from halfmap.steps.ctf.average import Optics, fit_average, start_of
from halfmap.steps.ctf.estimate import CtfEstimate, estimate_ctf, fit_spherical_aberration
from halfmap.steps.ctf.fit import Fit
from halfmap.steps.ctf.likelihood import Problem
from halfmap.steps.ctf.search import Search
from halfmap.steps.ctf.tiles import BOX, PIXEL_SIZE_A, TileSpectra, checked_image, tile_spectra
from halfmap.units import electron_wavelength

if TYPE_CHECKING:
    from halfmap.steps.ctf.step import CtfStep

FOLDER = "Micrographs"

_FINE_RINGS_A = 4.5
"""Resolution at which the rings of a high defocus must still be resolved by a tile."""

_SHARE_OF_TILE = 0.3
"""What a Thon ring's period may be, inverted, of a tile's side: finer ones lose their contrast."""

_COARSE_A = 10.0
_ICE = 0.5
_UNEVEN = 0.25
"""Part of the rings' strength that may change with the direction."""

_STRONG_A, _STRONG = 1500.0, 0.15
"""Astigmatism in Å and in parts of the defocus that no microscopist would have left."""

_SURE = 5.0
"""Standard errors at which a problem is stated."""

_UNKNOWN_DIRECTION = 180 / math.sqrt(12)
"""Standard deviation of an angle of which nothing is known within half a turn."""


@dataclass(frozen=True)
class MicrographItem:
    """A micrograph of the table with the settings of its optics group; plain data for a worker."""

    name: str
    key: str
    path: Path
    pixel_size: float
    optics: Optics
    group: int
    magnification: tuple[float, float, float, float] | None


def estimate_micrograph(item: MicrographItem, *, step: CtfStep, folder: Path) -> dict[str, Any]:
    """Estimate a micrograph's CTF, write its pictures and return what the table needs.

    Raises
    ------
    FileFormatError
        If the micrograph cannot be read, is blank, saturated or too small.
    """
    image = checked_image(read_image(item.path), item.name)
    spectra, average, problem = fit_spectra(image, item, step)
    found = estimate_ctf(spectra, average, problem, fit_tilt=step.fit_tilt, fit_thickness=step.fit_thickness)
    error = math.sqrt(max(float(found.covariance[0, 0]), 0.0))
    profile = quality.equiphase_profile(found.problem, found.fit.state, spectra.bins, error)
    row = describe(found, spectra, item, profile)
    if not quality.has_rings(row):
        row |= unknown(row, step)
    row |= {"intensity": float(image[::4, ::4].mean(dtype=np.float64))}
    return row | _write(item, step, folder, found, spectra, image, profile, row)


def measure_cs(item: MicrographItem, *, step: CtfStep) -> dict[str, Any]:
    """Cs in mm at which a micrograph's rings fit best, its standard error and the rings' significance."""
    spectra, average, problem = fit_spectra(checked_image(read_image(item.path), item.name), item, step)
    free, problem = fit_spherical_aberration(spectra, average, problem)
    profile = quality.equiphase_profile(problem, free.state, spectra.bins, 0.0)
    return {
        "name": item.name,
        "group": item.group,
        "cs": item.optics.cs_mm + free.state.cs_change,
        "error": float(np.sqrt(free.covariance[-1, -1])) * max(1.0, free.misfit),
        "significance": quality.significance(profile),
    }


def fit_spectra(
    image: NDArray[np.float32], item: MicrographItem, step: CtfStep
) -> tuple[TileSpectra, Fit, Problem]:
    """Spectra of tiles as large as the rings need, and the fit of their average."""
    search = Search(lowest=step.defocus_min, highest=step.defocus_max, free_phase=step.fit_phase_shift)
    spectra = _spectra(image, item, step, BOX * PIXEL_SIZE_A)
    average, problem = fit_average(spectra, item.optics, search)
    extent = needed_extent(average.state.surface[0], item.optics.voltage_kV)
    if extent > 1.2 * spectra.bins.extent and min(image.shape) * item.pixel_size > 1.5 * extent:
        spectra = _spectra(image, item, step, extent)
        average, problem = fit_average(spectra, item.optics, search, start=start_of(average))
    return spectra, average, problem


def needed_extent(defocus: float, voltage_kV: float) -> float:
    """Side of the tiles in Å that resolves the rings of a defocus in Å: once or twice the ordinary one."""
    ordinary = BOX * PIXEL_SIZE_A
    period = 2 * electron_wavelength(voltage_kV) * defocus / _FINE_RINGS_A
    return ordinary if period <= _SHARE_OF_TILE * ordinary else 2 * ordinary


def _spectra(image: NDArray[np.float32], item: MicrographItem, step: CtfStep, extent: float) -> TileSpectra:
    return tile_spectra(
        image,
        pixel_size=item.pixel_size,
        lowest=1 / step.resolution_min,
        highest=1 / step.resolution_max,
        extent=extent,
        magnification=None if item.magnification is None else np.array(item.magnification),
        name=item.name,
    )


def describe(
    found: CtfEstimate, spectra: TileSpectra, item: MicrographItem, profile: quality.Profile
) -> dict[str, Any]:
    """State an estimate in the columns of the table."""
    state, covariance = found.fit.state, found.covariance
    m = len(state.surface)
    surface_error = np.zeros(5)
    surface_error[: m - 1] = np.sqrt(np.maximum(np.diag(covariance)[1:m], 0))
    uneven, uneven_error, direction = quality.anisotropy(profile)
    row: dict[str, Any] = {
        "name": item.name,
        "key": item.key,
        "group": item.group,
        **defoci_of(found),
        "rlnCtfFigureOfMerit": quality.figure_of_merit(found.problem, state),
        "rlnCtfMaxResolution": quality.resolution_limit(profile),
        "rlnCtfIceRingDensity": quality.ice_ring(spectra.power, spectra.bins.count, spectra.bins.frequency),
        **tilt_of(found, spectra),
        **DefocusSurface(found.surface[1:], spectra.shape).columns(),
        "hmDefocusSurfaceUncertainty": format_vector(surface_error.round(2)),
        "hmCtfFitResolution": found.finest,
        "hmCtfMisfit": found.fit.misfit,
        "hmCtfSignificance": quality.significance(profile),
        "hmCtfAnisotropy": uneven,
        "hmCtfAnisotropyUncertainty": uneven_error,
        "hmCtfAnisotropyAngle": direction,
        "hmCtfCs": item.optics.cs_mm + found.cs_change,
        "hmCtfCsUncertainty": found.cs_error,
    }
    if found.problem.free_phase:
        row["rlnPhaseShift"] = math.degrees(state.phase_shift) % 180
        row["hmPhaseShiftUncertainty"] = math.degrees(math.sqrt(max(float(covariance[-2, -2]), 0.0)))
    if found.thickness is not None:
        row["hmCtfIceThickness"] = found.thickness.value
        row["hmCtfIceThicknessUncertainty"] = found.thickness.error
    row = {key: float(v) if isinstance(v, np.floating) else v for key, v in row.items()}
    row["hmCtfProblem"] = "; ".join(problems(row)) or "none"
    return row


def unknown(row: dict[str, Any], step: CtfStep) -> dict[str, float]:
    """Errors of a micrograph without Thon rings: those of knowing nothing but what was searched.

    The information of a fit to noise is about the noise. What is evenly spread over a range has a standard
    deviation of its length over the root of 12.
    """
    searched = (step.defocus_max - step.defocus_min) / math.sqrt(12)
    errors = {
        "hmDefocusUncertainty": searched,
        "hmDefocusUUncertainty": searched,
        "hmDefocusVUncertainty": searched,
        "hmDefocusAngleUncertainty": _UNKNOWN_DIRECTION,
        "hmPhaseShiftUncertainty": _UNKNOWN_DIRECTION,
        "hmTiltUncertainty": _UNKNOWN_DIRECTION / 2,
        "hmTiltAxisUncertainty": 2 * _UNKNOWN_DIRECTION,
        "hmCtfCsUncertainty": math.nan,
    }
    return {label: error for label, error in errors.items() if label in row}


def defoci_of(found: CtfEstimate) -> dict[str, float]:
    """Defoci along both axes and the angle of the first, with their errors."""
    state = found.fit.state
    m = len(state.surface)
    cosine, sine = (float(value) for value in state.astigmatism)
    half = math.hypot(cosine, sine)
    along = np.array([cosine, sine]) / half if half > 0 else np.array([1.0, 0.0])
    places = [0, m, m + 1]
    block = found.covariance[np.ix_(places, places)]

    def error(*weights: float) -> float:
        vector = np.array(weights)
        return math.sqrt(max(float(vector @ block @ vector), 0.0))

    turned = math.degrees(error(0, -along[1], along[0]) / max(2 * half, 1e-9))
    return {
        "rlnDefocusU": float(state.surface[0]) + half,
        "rlnDefocusV": float(state.surface[0]) - half,
        "rlnDefocusAngle": math.degrees(math.atan2(sine, cosine)) / 2,
        "rlnCtfAstigmatism": 2 * half,
        "hmDefocusUncertainty": error(1, 0, 0),
        "hmDefocusUUncertainty": error(1, *along),
        "hmDefocusVUncertainty": error(1, *-along),
        "hmDefocusAngleUncertainty": min(turned, _UNKNOWN_DIRECTION),
    }


def tilt_of(found: CtfEstimate, spectra: TileSpectra) -> dict[str, float]:
    """Tilt and direction of its axis with their errors, from the plane that fits best; none if not fitted."""
    surface = found.plane.state.surface
    if len(surface) < 3:
        return {}
    half = np.array([spectra.shape[1], spectra.shape[0]]) * spectra.pixel_size / 2
    slope = surface[1:3] / half
    covariance = found.plane_covariance[1:3, 1:3] / np.outer(half, half)
    steep = float(np.hypot(*slope))
    along = slope / max(steep, 1e-12)
    across = np.array([-along[1], along[0]])
    error, side = (math.sqrt(max(float(v @ covariance @ v), 0.0)) for v in (along, across))
    return {
        "rlnMicrographTiltAngle": math.degrees(math.atan(steep)),
        "rlnMicrographTiltAxisDirection": math.degrees(math.atan2(-slope[0], slope[1])),
        "hmTiltUncertainty": math.degrees(error / (1 + steep**2)),
        "hmTiltAxisUncertainty": min(math.degrees(side / max(steep, 1e-12)), 2 * _UNKNOWN_DIRECTION),
    }


def problems(row: dict[str, Any]) -> list[str]:
    """Reasons not to trust a micrograph's CTF, in words."""
    if not quality.has_rings(row):
        found = ["no Thon rings"]
    else:
        uneven, error = row["hmCtfAnisotropy"], row["hmCtfAnisotropyUncertainty"]
        size = (row["rlnDefocusU"] + row["rlnDefocusV"]) / 2
        reasons = {
            "Thon rings end early": row["rlnCtfMaxResolution"] > _COARSE_A,
            f"drift: rings fade along {row['hmCtfAnisotropyAngle']:.0f}°": uneven > _UNEVEN
            and uneven > _SURE * error,
            "strong astigmatism": row["rlnCtfAstigmatism"] > max(_STRONG_A, _STRONG * size),
            "defocus uncertain": row["hmDefocusUncertainty"] > 200,
            "defocus varies within the field": row["hmCtfMisfit"] > 2,
        }
        found = [reason for reason, holds in reasons.items() if holds]
    if row["rlnCtfIceRingDensity"] is not None and row["rlnCtfIceRingDensity"] > _ICE:
        found.append("strong ice ring")
    return found


def _write(
    item: MicrographItem,
    step: CtfStep,
    folder: Path,
    found: CtfEstimate,
    spectra: TileSpectra,
    image: NDArray,
    profile: quality.Profile,
    row: dict[str, Any],
) -> dict[str, Any]:
    from halfmap.steps.ctf import pictures

    data, model = whole_spectra(found, spectra, item)
    half = data.shape[1] // 2
    both = data.copy()
    both[:, :half] = model[:, :half]
    # As the job's folder has it: the project may move before the job is resumed.
    files = {"image": f"{FOLDER}/{item.key}.ctf"}
    write_mrc(folder / files["image"], both, pixel_size=spectra.bins.extent / len(both))
    if step.pictures:
        pictures.draw_micrograph(
            folder / FOLDER / f"{item.key}.png",
            found,
            spectra,
            profile=profile,
            data=data,
            model=model,
            image=image,
            row=row,
            title=item.name,
        )
    return files


def whole_spectra(
    found: CtfEstimate, spectra: TileSpectra, item: MicrographItem
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Spectrum over its smooth part, and |CTF|, both (box, box) with the zero frequency in the middle."""
    box = len(spectra.average)
    state = found.fit.state
    half = np.hypot(*state.astigmatism)
    model = ctf(
        (box, box),
        pixel_size=spectra.bins.extent / box,
        defocus_u=float(state.surface[0] + half),
        defocus_v=float(state.surface[0] - half),
        defocus_angle=math.degrees(math.atan2(state.astigmatism[1], state.astigmatism[0])) / 2,
        voltage_kV=item.optics.voltage_kV,
        cs_mm=item.optics.cs_mm,
        amplitude_contrast=item.optics.amplitude_contrast,
        phase_shift=math.degrees(state.phase_shift)
        + (0.0 if found.problem.free_phase else item.optics.phase_shift),
        magnification=None if item.magnification is None else torch.tensor(item.magnification).reshape(2, 2),
    ).square()
    return _whole(flattened(spectra)), _whole(model.numpy())


def flattened(spectra: TileSpectra) -> NDArray[np.float32]:
    """Averaged half-spectrum over a smooth background, less 1, of even contrast over frequencies."""
    average = spectra.average.astype(np.float64)
    box = len(average)
    ky, kx = np.fft.fftfreq(box)[:, None] * box, np.arange(average.shape[1])[None]
    ring = np.minimum(np.rint(np.hypot(kx, ky)).astype(int), box // 2)
    count = np.bincount(ring.ravel())
    mean = np.bincount(ring.ravel(), weights=average.ravel()) / np.maximum(count, 1)
    place = np.sqrt(np.arange(len(mean)))
    used = slice(4, len(mean) - 1)
    curve = np.polynomial.Polynomial.fit(place[used], np.log(np.maximum(mean[used], 1e-30)), 8)
    smooth = np.exp(curve(np.clip(place, place[4], place[-2])))
    return np.clip(average / smooth[ring] - 1, -1, 3).astype(np.float32)


def _whole(half: NDArray) -> NDArray[np.float32]:
    """Full spectrum (n, n) of a real image from its half, the zero frequency in the middle."""
    n = len(half)
    middle = n // 2
    whole = np.empty((n, n), np.float32)
    shifted = np.fft.fftshift(half, axes=0)
    whole[:, middle:] = shifted[:, :middle]
    whole[1:, 1:middle] = whole[1:, middle + 1 :][::-1, ::-1]
    whole[0, 1:middle] = whole[0, middle + 1 :][::-1]
    whole[:, 0] = shifted[:, middle]
    return whole
