"""Power spectra of overlapping tiles of a micrograph, in polar bins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from halfmap.errors import FileFormatError
from halfmap.io.images import checked_micrograph
from halfmap.ops.threads import in_threads
from halfmap.steps.ctf._kernels import add_to_bins
from halfmap.steps.ctf.directions import level_directions
from halfmap.units import electron_wavelength

BOX = 512
PIXEL_SIZE_A = 1.4
"""Tiles have this many pixels of this size or larger; finer detail shows no Thon rings."""

N_SECTORS = 18
"""Sectors of half a turn."""

_SMALLEST = 256
"""Pixels of the smallest tile, for images that are smaller than `BOX`."""

LAGS = 32
_MOST_GAIN = 5.0
"""Fine rings are never worth more than this many times the ones that a tile resolves well."""

_FEWEST_RINGS = 24
"""Of the spectrum, which a smooth curve and its Thon rings can be told apart in."""

_OUTLIER = 8.0
"""Standard deviations, robustly measured, at which pixels are clipped."""


@dataclass(frozen=True, eq=False)
class Bins:
    """Geometry of the polar bins of a spectrum: rings one Fourier pixel wide, sectors of half a turn.

    Attributes
    ----------
    index : array (box, box // 2 + 1), int32
        Bin of each coefficient of the half-spectrum, ring after ring; -1 outside.
    count : array (r, s)
        Coefficients in each bin, of two Friedel mates one.
    k2, k2_cos, k2_sin, k4 : array (r, s)
        Means over the bin of k², k² cos 2 phi, k² sin 2 phi, k⁴ in 1/Å², 1/Å⁴; with them the phase of the
        lens is that of the bin's coefficients on average, wherever in the bin they lie.
    frequency : array (r,)
        Of the rings in 1/Å.
    extent : float
        Side of the tile in Å.
    """

    index: NDArray[np.int32]
    count: NDArray[np.float64]
    k2: NDArray[np.float64]
    k2_cos: NDArray[np.float64]
    k2_sin: NDArray[np.float64]
    k4: NDArray[np.float64]
    frequency: NDArray[np.float64]
    extent: float


@dataclass(frozen=True, eq=False)
class TileSpectra:
    """Spectra of the tiles of a micrograph.

    Attributes
    ----------
    power : array (t, r, s), float32
        Mean power in the bins.
    bins : Bins
        Where they are.
    centres : array (t, 2)
        (x, y) of the tiles' middles in parts of the micrograph: -1 to 1 from edge to edge.
    correlation : array (2, LAGS + 1)
        Coefficients of all tiles over the independent ones among them, along y and x, for signals that go
        up and down over the coefficients with so many `LAGS`-ths of a wave each; see `independence`.
    overlap : float
        How much of that is because tiles overlap.
    shape : tuple of 2 int
        (y, x) of the micrograph in pixels.
    pixel_size : float
        Of the micrograph in Å.
    average : array (box, box // 2 + 1), float32
        Mean over tiles of the power over the tile's mean power; for pictures.
    """

    power: NDArray[np.float32]
    bins: Bins
    centres: NDArray[np.float64]
    correlation: NDArray[np.float64]
    overlap: float
    shape: tuple[int, int]
    pixel_size: float
    average: NDArray[np.float32]


def checked_image(image: NDArray, name: str) -> NDArray[np.float32]:
    """Give a micrograph as float32, hot pixels clipped, or say why it cannot be used.

    Parameters
    ----------
    image : array (h, w)
        As read.
    name : str
        File, for the error.

    Raises
    ------
    FileFormatError
        As `halfmap.io.images.checked_micrograph`.
    """
    image, median, deviation = checked_micrograph(image, name)
    reach = _OUTLIER * deviation
    return np.clip(image, median - reach, median + reach)


def tile_sides(shape: tuple[int, int], pixel_size: float, extent: float, name: str) -> tuple[int, int]:
    """Side of tiles in pixels, and in pixels of `PIXEL_SIZE_A` or larger to which spectra are cropped.

    Raises
    ------
    FileFormatError
        If the micrograph is smaller than the smallest tile.
    """
    half = scipy.fft.next_fast_len(math.ceil(extent / pixel_size / 2), real=True)
    side = 2 * int(half or 0)
    if side > min(shape):
        side = min(shape) // 2 * 2
        if side < _SMALLEST:
            message = f"is of {shape[1]} × {shape[0]} px, smaller than a tile of {_SMALLEST} px"
            raise FileFormatError(message, path=name, hint="leave it out")
    cropped = side
    if pixel_size < PIXEL_SIZE_A:
        cropped = 2 * round(side * pixel_size / PIXEL_SIZE_A / 2)
    return side, cropped


def tile_spectra(
    image: NDArray[np.float32],
    *,
    pixel_size: float,
    lowest: float,
    highest: float,
    extent: float = BOX * PIXEL_SIZE_A,
    magnification: NDArray | None = None,
    name: str = "image",
) -> TileSpectra:
    """Power spectra of tapered, half overlapping tiles, averaged in polar bins.

    Parameters
    ----------
    image : array (h, w)
        Micrograph.
    pixel_size : float
        In Å.
    lowest, highest : float
        Frequencies in 1/Å that rings are wanted of.
    extent : float
        Side of the tiles in Å, at the least; for micrographs that are smaller, as large as they are.
    magnification : array (2, 2), optional
        Anisotropic magnification: takes frequencies of the image to true ones.
    name : str
        File, for errors.

    Returns
    -------
    TileSpectra

    Notes
    -----
    The taper is a Hann window along each axis. Welch's overlap of one half then loses little: tiles are
    correlated by 1/6 in amplitude.

    References
    ----------
    .. [1] Welch 1967, IEEE Trans. Audio Electroacoust. 15, 70-73, DOI 10.1109/TAU.1967.1161901
    """
    side, cropped = tile_sides(image.shape, pixel_size, extent, name)
    matrix = None if magnification is None else tuple(magnification.ravel().tolist())
    n_rings = math.floor(min(highest * side * pixel_size, cropped / 2 - 1)) - math.ceil(
        lowest * side * pixel_size
    )
    if n_rings < _FEWEST_RINGS:
        finest = max(1 / highest, 2 * side * pixel_size / cropped)
        message = (
            f"pixels of {pixel_size:g} Å, in tiles of {side}, resolve too few frequencies "
            f"between {1 / lowest:.3g} and {finest:.3g} Å"
        )
        hint = "is the pixel size right? if so, take smaller pixels, or a wider range of resolutions"
        raise FileFormatError(message, path=name, hint=hint)
    bins = polar_bins(cropped, side * pixel_size, lowest, highest, matrix)
    starts = [_starts(length, side) for length in image.shape]
    window = np.sin(np.pi * (np.arange(side) + 0.5) / side).astype(np.float32) ** 2
    corners = [(y, x) for y in starts[0] for x in starts[1]]
    power = np.zeros((len(corners), bins.count.size))
    # A sum for every row of tiles, added in order: the same for any number of threads.
    averages = np.zeros((len(starts[0]), cropped, cropped // 2 + 1), np.float32)

    def row(number: int) -> None:
        first = number * len(starts[1])
        for t in range(first, first + len(starts[1])):
            y, x = corners[t]
            spectrum = _cropped_transform(image[y : y + side, x : x + side], window, cropped)
            add_to_bins(spectrum, bins.index, power[t])
            square = spectrum.real**2 + spectrum.imag**2
            averages[number] += square * np.float32(1 / max(float(power[t].sum()), 1e-30))

    in_threads(row, range(len(starts[0])))
    filled = np.maximum(bins.count, 1)
    centres = np.array([[x, y] for y, x in corners], float) + (side - 1) / 2
    correlation = np.stack([correlation_of(window, start) for start in starts])
    return TileSpectra(
        power=level_directions(
            power.reshape(-1, *bins.count.shape) / filled, bins.count, bins.frequency, 0.5 / pixel_size
        ).astype(np.float32),
        bins=bins,
        centres=2 * centres / (image.shape[1], image.shape[0]) - 1,
        correlation=correlation,
        overlap=float(np.prod(correlation[:, 0]) / correlation_of(window, [0])[0] ** 2),
        shape=(image.shape[0], image.shape[1]),
        pixel_size=pixel_size,
        average=averages.sum(axis=0),
    )


def _starts(length: int, side: int) -> list[int]:
    """First pixels of tiles spread evenly, overlapping by half or a little more."""
    count = math.ceil(2 * (length - side) / side) + 1
    return np.linspace(0, length - side, count).round().astype(int).tolist()


def _cropped_transform(tile: NDArray, window: NDArray[np.float32], cropped: int) -> NDArray[np.complex64]:
    """Half-spectrum of a tapered tile, cut off at the Nyquist frequency of `cropped` pixels."""
    tapered = (tile - tile.mean()) * window[:, None] * window
    # Columns that are not wanted are dropped between the transforms along the two axes.
    rows = np.asarray(scipy.fft.rfft(tapered, axis=1))[:, : cropped // 2 + 1]
    spectrum = np.asarray(scipy.fft.fft(rows, axis=0))
    if cropped < len(tile):
        half = cropped // 2
        spectrum = np.concatenate([spectrum[:half], spectrum[-half:]])
    return spectrum


def correlation_of(window: NDArray, starts: list[int]) -> NDArray[np.float64]:
    """Coefficients of tiles along one axis over the independent ones among them, (LAGS + 1,).

    The covariance of the powers of two coefficients is the squared modulus of that of their amplitudes, which
    is the transform of the product of the two tapers. A signal that is a wave over the coefficients (Thon
    rings are, of a length that depends on the defocus) meets of it what, by Parseval, the product of the
    tapers has in common with itself moved by a part of the tile.
    """
    w = window[:: max(1, len(window) // 128)].astype(np.float64)
    n, step = len(w), len(window) / len(w)
    result = np.zeros(LAGS + 1)
    gaps = np.abs(np.subtract.outer(starts, starts)).ravel() / step
    for gap in np.rint(gaps).astype(int):
        if gap < n:
            both = w[: n - gap] * w[gap:]
            for i in range(LAGS + 1):
                lag = round(i * n / LAGS)
                if lag < len(both):
                    result[i] += float(both[: len(both) - lag] @ both[lag:])
    return n * result / (w @ w) ** 2 / len(starts)


def independence(spectra: TileSpectra, phase: NDArray, defocus: float) -> NDArray[np.float64]:
    """Independent values that a coefficient of one tile is worth for the rings of a defocus, (r, s).

    Parameters
    ----------
    spectra : TileSpectra
        Spectra.
    phase : array (5, r, s)
        See `phase_terms`.
    defocus : float
        In Å.

    Notes
    -----
    Fine rings are blurred by the taper, and so is the noise of their scale: what they tell is lost more
    slowly than their contrast.
    """
    bins = spectra.bins
    chi = (phase[0] * defocus + phase[3]).mean(axis=1)
    waves = np.abs(np.gradient(2 * chi, bins.frequency)) / (2 * np.pi * bins.extent)
    angle = (np.arange(bins.count.shape[1]) + 0.5) * np.pi / bins.count.shape[1]
    lags = np.linspace(0, 1, LAGS + 1)
    x = np.interp(waves[:, None] * np.abs(np.cos(angle)), lags, spectra.correlation[1])
    y = np.interp(waves[:, None] * np.abs(np.sin(angle)), lags, spectra.correlation[0])
    most = float(np.prod(spectra.correlation[:, 0]))
    return 1 / np.maximum(x * y, most / _MOST_GAIN)


@lru_cache(maxsize=8)
def polar_bins(
    box: int,
    extent: float,
    lowest: float,
    highest: float,
    magnification: tuple[float, ...] | None = None,
    n_sectors: int = N_SECTORS,
) -> Bins:
    """Polar bins of the half-spectrum of a box.

    Parameters
    ----------
    box : int
        Side in pixels.
    extent : float
        The same side in Å.
    lowest, highest : float
        Frequencies of the first and last ring in 1/Å; none is beyond Nyquist.
    magnification : tuple of 4 float, optional
        Matrix that takes frequencies of the image to true ones, row by row.
    n_sectors : int
        Sectors of half a turn; the first begins at the x axis.
    """
    ky, kx = np.fft.fftfreq(box)[:, None] * box, np.arange(box // 2 + 1)[None]
    ring = np.rint(np.hypot(kx, ky)).astype(int)
    first = max(1, math.ceil(lowest * extent))
    last = min(box // 2 - 1, math.floor(highest * extent))
    sector = np.floor(np.mod(np.arctan2(ky, kx), np.pi) * (n_sectors / np.pi)).astype(int) % n_sectors
    inside = (ring >= first) & (ring <= last)
    # The first column holds both Friedel mates, where all others hold one of them.
    inside[:, 0] &= ky[:, 0] > 0
    index = np.where(inside, (ring - first) * n_sectors + sector, -1).astype(np.int32)
    x, y = np.broadcast_to(kx / extent, ring.shape), np.broadcast_to(ky / extent, ring.shape)
    if magnification is not None:
        a, b, c, d = magnification
        x, y = a * x + b * y, c * x + d * y
    shape = (last - first + 1, n_sectors)
    count = np.bincount(index[inside], minlength=shape[0] * shape[1]).astype(np.float64)

    def mean(values: NDArray) -> NDArray:
        sums = np.bincount(index[inside], weights=values[inside], minlength=len(count))
        return (sums / np.maximum(count, 1)).reshape(shape)

    square = x * x + y * y
    return Bins(
        index=index,
        count=count.reshape(shape),
        k2=mean(square),
        k2_cos=mean(x * x - y * y),
        k2_sin=mean(2 * x * y),
        k4=mean(square * square),
        frequency=np.arange(first, last + 1) / extent,
        extent=extent,
    )


def phase_terms(
    bins: Bins, *, voltage_kV: float, cs_mm: float, amplitude_contrast: float, fixed_phase: float = 0.0
) -> NDArray[np.float64]:
    """What the phase chi of the CTF is made of in every bin.

    Parameters
    ----------
    bins : Bins
        Bins.
    voltage_kV, cs_mm, amplitude_contrast : float
        The microscope.
    fixed_phase : float
        Known phase shift in degrees.

    Returns
    -------
    array (5, r, s)
        Factors of mean defocus, of the astigmatism's cosine and sine component in Å, the part that is known,
        and the factor of a change of Cs in mm, so that chi is the sum of factor times parameter, with the
        sign and constants of `halfmap.ops.ctf.ctf`.
    """
    wavelength = electron_wavelength(voltage_kV)
    aberration = -0.5e7 * np.pi * wavelength**3 * bins.k4
    known = cs_mm * aberration + math.asin(amplitude_contrast) + math.radians(fixed_phase)
    squares = [np.pi * wavelength * term for term in (bins.k2, bins.k2_cos, bins.k2_sin)]
    return np.stack([*squares, known, aberration])
