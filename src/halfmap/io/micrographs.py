"""Micrographs as they are looked at: coarse pixels, even background, what is unusable masked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.ndimage
import torch
from numpy.typing import NDArray

from halfmap.errors import FileFormatError, TableError
from halfmap.io.images import checked_micrograph, read_image
from halfmap.io.mrc import read_mrc
from halfmap.io.names import unique_stems
from halfmap.log import log
from halfmap.ops.ctf import ctf
from halfmap.ops.fourier import irfft2, resize_spectrum, rfft2

if TYPE_CHECKING:
    from halfmap.data import MicrographSet

BACKGROUND_A = 1000.0
"""Width of the Gaussian that estimates the slow background, where nothing else is said."""

_CTF = {
    "defocus_u": "rlnDefocusU",
    "defocus_v": "rlnDefocusV",
    "defocus_angle": "rlnDefocusAngle",
    "voltage_kV": "rlnVoltage",
    "cs_mm": "rlnSphericalAberration",
    "amplitude_contrast": "rlnAmplitudeContrast",
}
_SUSPECT = "no Thon rings"

ImageKind = Literal["raw", "denoised", "merged"]
"""Images that there may be of a micrograph."""

_IMAGES: dict[ImageKind, str] = {
    "raw": "rlnMicrographName",
    "denoised": "hmMicrographNameDenoised",
    "merged": "hmMicrographNameMerged",
}

_OUTLIER = 6.0
"""Robust standard deviations from the median at which a pixel is hot or dead."""

SMALLEST_px = 32
"""Side of a micrograph that can be searched, at the least."""


@dataclass(frozen=True)
class MicrographItem:
    """A micrograph of the table; plain data for a worker.

    Attributes
    ----------
    name, key : str
        As in the table, and for files of its own.
    path : path
        The image.
    pixel_size : float
        In Å.
    mask : path or None
        Image that is not 0 where the specimen is usable, of any size.
    optics : dict or None
        Arguments of `halfmap.ops.ctf.ctf`; None without a CTF.
    """

    name: str
    key: str
    path: Path
    pixel_size: float
    mask: Path | None = None
    optics: dict[str, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True, eq=False)
class Image:
    """A micrograph in coarser pixels.

    Attributes
    ----------
    values : array (h, w), float32
        Mean 0 and standard deviation 1 where usable, 0 elsewhere; particles are dark.
    pixel_size : float
        In Å; along y and x the same to a part in h and w.
    mask : array (h, w), bool
        Where the specimen is usable.
    optics : dict or None
        Arguments of `halfmap.ops.ctf.ctf`; None without a CTF.
    scale : tuple of 2 float
        (x, y): what a coordinate here is to be multiplied with to be one of the micrograph.
    level : array (h, w), float32, optional
        The same before its background was subtracted; of any scale.
    background : float
        Width in Å of the Gaussian average that was subtracted.
    """

    values: NDArray[np.float32]
    pixel_size: float
    mask: NDArray[np.bool_]
    optics: dict[str, Any] | None
    scale: tuple[float, float]
    level: NDArray[np.float32] | None = None
    background: float = BACKGROUND_A

    def ctf(self, shape: tuple[int, int] | None = None) -> NDArray[np.float32]:
        """CTF on the half-spectrum of a shape, by default that of the image; without one that is known, -1.

        The sign is that of dark particles: projections of them, times this, look as they do in the image.
        """
        h, w = self.values.shape if shape is None else shape
        if self.optics is None:
            return np.full((h, w // 2 + 1), -1, np.float32)
        return -ctf((h, w), pixel_size=self.pixel_size, **self.optics).numpy()


def image_of(row: Mapping[str, Any], kind: ImageKind, *, table: Path | None = None, number: int = 1) -> str:
    """Name of the file that holds a micrograph's image of a kind.

    Parameters
    ----------
    row : mapping
        Of the table of micrographs.
    kind : str
        ``raw``, or what `halfmap denoise apply` has made of it.
    table : path, optional
        File of the table, for messages.
    number : int
        Of the row, from 1, for messages.

    Raises
    ------
    TableError
        If there is no such image.
    """
    name = row.get(_IMAGES[kind])
    if not name:
        hint = "make them with halfmap denoise apply, and give the table that it writes"
        raise TableError(f"names no {kind} micrograph", path=table, row=number, hint=hint)
    return str(name)


def list_micrographs(
    micrographs: MicrographSet,
    resolve: Callable[[str], Path],
    *,
    use_ctf: bool = True,
    images: ImageKind = "raw",
) -> list[MicrographItem]:
    """Every micrograph with its mask and its CTF, where the table has them.

    Parameters
    ----------
    micrographs : MicrographSet
        The table.
    resolve : callable
        Where a file named in it lies.
    use_ctf : bool
        Whether the CTF is wanted.
    images : str
        Which image of each is wanted.

    Raises
    ------
    TableError
        If a micrograph has no such image or no positive pixel size, or is listed twice, or a column of the
        CTF is missing.
    """
    if use_ctf:
        _refuse_half_a_ctf(micrographs)
    optics = {row["rlnOpticsGroup"]: row for row in micrographs.optics.to_dicts()}
    rows = micrographs.rows.to_dicts()
    keys = unique_stems([row["rlnMicrographName"] for row in rows], table=micrographs.path)
    items = []
    for number, row in enumerate(rows, start=1):
        settings = optics[row["rlnOpticsGroup"]] | {k: v for k, v in row.items() if v is not None}
        size = settings.get("rlnMicrographPixelSize") or settings.get("rlnMicrographOriginalPixelSize")
        if size is None or not (math.isfinite(size) and size > 0):
            hint = "import the micrographs with the microscope's settings"
            message = "has no rlnMicrographPixelSize that is a positive number"
            raise TableError(message, path=micrographs.path, row=number, hint=hint)
        name = row["rlnMicrographName"]
        mask = row.get("hmMicrographMask")
        items.append(
            MicrographItem(
                name=name,
                key=keys[number - 1],
                path=resolve(image_of(row, images, table=micrographs.path, number=number)),
                pixel_size=float(size),
                mask=None if mask in (None, "", "None") else resolve(str(mask)),
                optics=_optics(settings) if use_ctf else None,
            )
        )
    without = sum(item.optics is None for item in items)
    if use_ctf and without:
        log.warning("%d of %d micrographs have no CTF and are taken without it", without, len(items))
    return items


def _refuse_half_a_ctf(micrographs: MicrographSet) -> None:
    """Refuse a table with a defocus but without all else that a CTF needs."""
    missing = [
        name for name in _CTF.values() if name not in {*micrographs.rows.columns, *micrographs.optics.columns}
    ]
    if missing and not {"rlnDefocusU", "rlnDefocusV"} <= set(missing):
        hint = "estimate the CTF again, or take --no-use-ctf"
        raise TableError(f"has a defocus but no {', '.join(missing)}", path=micrographs.path, hint=hint)


def _optics(settings: dict[str, Any]) -> dict[str, Any] | None:
    values = {name: settings.get(label) for name, label in _CTF.items()}
    if any(value is None or not math.isfinite(value) for value in values.values()):
        return None
    if _SUSPECT in str(settings.get("hmCtfProblem", "")):
        return None
    values["phase_shift"] = settings.get("rlnPhaseShift") or 0.0
    return {name: float(value) for name, value in values.items() if value is not None}


def load(
    item: MicrographItem,
    pixel_size: float,
    *,
    background: float = BACKGROUND_A,
) -> Image:
    """Read a micrograph, mend its pixels, make it coarse and even.

    Parameters
    ----------
    item : MicrographItem
        What to read.
    pixel_size : float
        Wanted in Å; the micrograph's own where that is coarser.
    background : float
        Width in Å (two standard deviations) of the Gaussian average that is subtracted.

    Raises
    ------
    FileFormatError
        If the micrograph cannot be read, is blank, not finite, too small, or masked as a whole.
    """
    raw = mended(np.asarray(read_image(item.path), np.float32), item.name)
    values = cropped(raw, item.pixel_size, pixel_size)
    if min(values.shape) < SMALLEST_px:
        height, width = (length * item.pixel_size for length in raw.shape)
        message = f"is of {width:.0f} × {height:.0f} Å, too small for such particles"
        raise FileFormatError(message, path=item.name, hint="leave it out")
    scale = (raw.shape[1] / values.shape[1], raw.shape[0] / values.shape[0])
    size = item.pixel_size * math.sqrt(scale[0] * scale[1])
    mask = _mask(item, values.shape, raw.shape)
    flat = flattened(values, mask, background / size)
    return Image(flat, size, mask, item.optics, scale, values, background)


def coarser(image: Image, pixel_size: float) -> Image:
    """The same micrograph in pixels of about a size in Å, or as it is where these are finer."""
    values = cropped(image.values, image.pixel_size, pixel_size)
    if values.shape == image.values.shape:
        return image
    ratio = [old / new for old, new in zip(image.values.shape, values.shape, strict=True)]
    mask = image.mask[
        np.ix_(*((np.arange(n) * r).astype(int) for n, r in zip(values.shape, ratio, strict=True)))
    ]
    low, high = np.percentile(values[mask], (16, 84))
    values = np.where(mask, values * np.float32(2 / max(high - low, 1e-12)), 0)
    size = image.pixel_size * math.sqrt(ratio[0] * ratio[1])
    scale = (image.scale[0] * ratio[1], image.scale[1] * ratio[0])
    level = None if image.level is None else cropped(image.level, image.pixel_size, pixel_size)
    return Image(values, size, mask, image.optics, scale, level, image.background)


def cropped(values: NDArray[np.float32], pixel_size: float, wanted: float) -> NDArray[np.float32]:
    """Fourier crop to pixels of about a wanted size, the first one in its place; never to finer ones."""
    if wanted <= pixel_size:
        return values
    shape = values.shape
    small = tuple(_even(length * pixel_size / wanted) for length in shape)
    spectrum = resize_spectrum(rfft2(torch.from_numpy(values)), shape=shape, new_shape=small)
    return irfft2(spectrum, shape=small).numpy()


def _even(length: float) -> int:
    return max(2, 2 * round(length / 2))


def mended(image: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """Replace pixels that are hot, dead or no numbers, or say why the image cannot be used."""
    image, median, deviation = checked_micrograph(image, name)
    reach = _OUTLIER * deviation
    odd = np.abs(image - median) > reach
    if odd.any():
        image = image.copy()
        near = scipy.ndimage.uniform_filter(np.where(odd, 0, image), 5)
        count = scipy.ndimage.uniform_filter((~odd).astype(np.float32), 5)
        alone = count > 0.5
        image[odd] = np.where(
            alone[odd],
            near[odd] / np.maximum(count[odd], 0.1),
            np.clip(image[odd], median - reach, median + reach),
        )
    return image


def _mask(item: MicrographItem, shape: tuple[int, ...], raw: tuple[int, ...]) -> NDArray[np.bool_]:
    """Mask at the places of coarse pixels: each is where a micrograph's pixel is, the first at the first."""
    if item.mask is None:
        return np.ones(shape, np.bool_)
    mask = np.asarray(read_mrc(item.mask)).squeeze() > 0
    rows, columns = (
        np.minimum((np.arange(n) * length / n + 0.5) * m / length, m - 1).astype(int)
        for n, m, length in zip(shape, mask.shape, raw, strict=True)
    )
    usable = mask[np.ix_(rows, columns)]
    if not usable.any():
        raise FileFormatError("is masked as a whole", path=item.name, hint="leave it out")
    return usable


def flattened(
    values: NDArray[np.float32], mask: NDArray[np.bool_], background_px: float
) -> NDArray[np.float32]:
    """Subtract the slow background and divide by the deviation, with the masked part left out of both."""
    sigma = background_px / 2
    weight = local_mean(mask.astype(np.float32), sigma)
    middle = np.float32(np.median(values[mask]))
    mean = local_mean(np.where(mask, values - middle, 0), sigma) / np.maximum(weight, 1e-3)
    result = np.where(mask, values - middle - mean, 0)
    low, high = np.percentile(result[mask][:: max(1, mask.sum() // 200_000)], (16, 84))
    return (result * np.float32(2 / max(high - low, 1e-12))).astype(np.float32)


def local_mean(values: NDArray[np.float32], sigma_px: float) -> NDArray[np.float32]:
    """Gaussian average, at the edges mirrored; coarse where it is wide, for speed."""
    step = max(1, int(sigma_px / 4))
    if step == 1:
        return np.asarray(scipy.ndimage.gaussian_filter(values, sigma_px, mode="reflect"), np.float32)
    h, w = values.shape
    padded = np.pad(values, ((0, -h % step), (0, -w % step)), mode="symmetric")
    blocks = padded.reshape(padded.shape[0] // step, step, -1, step).mean(axis=(1, 3))
    smooth = scipy.ndimage.gaussian_filter(blocks, sigma_px / step, mode="reflect")
    y, x = ((np.arange(n) + 0.5) / step - 0.5 for n in (h, w))
    places = np.meshgrid(y, x, indexing="ij")
    return np.asarray(scipy.ndimage.map_coordinates(smooth, places, order=1, mode="nearest"), np.float32)
