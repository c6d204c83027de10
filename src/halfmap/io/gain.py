"""Read gain references, turn them as RELION names it, and find the orientation that fits the movies.

Convention: the gain is multiplied onto the counts, and a pixel with gain 0 is dead. Rows are in MRC order.
EER is the exception in RELION: the camera's own `.gain` file is multiplied and its rows are those of the
events, not flipped as in other TIFFs; any other file given for EER movies is a mean image to divide by.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfmap.errors import FileFormatError, ParameterError, ShapeError
from halfmap.io.images import read_image

_DM_SUFFIXES = (".dm3", ".dm4")
BACKGROUND_px = 65
"""Structure of the mean frame larger than this is illumination and ice, not the camera; odd, so that the
filter has no side."""

WINDOW_px = 4096
"""Side of the middle of frames that orientations are compared on: millions of pixels tell enough."""

_NORMAL_RANGE = 4.107
"""Standard deviations that the middle 96 % of a normal distribution span."""


def is_divided(gain: str | Path, movie: str | Path) -> bool:
    """Tell whether RELION divides movies by this reference: EER movies with anything but a `.gain` file."""
    return Path(movie).suffix.lower() in (".eer", ".ecc") and Path(gain).suffix.lower() != ".gain"


def read_gain(
    path: str | Path,
    *,
    rotation: int = 0,
    flip: int = 0,
    shape: tuple[int, int] | None = None,
    divided: bool = False,
) -> NDArray[np.float32]:
    """Read a gain reference to multiply frames with.

    Parameters
    ----------
    path : path
        MRC, TIFF or EER `.gain`.
    rotation : int
        RELION's --gain_rot (MotionCor2's RotGain): quarter turns, 0 to 3, that take row 0 to the last column.
        Done before the flip.
    flip : int
        RELION's --gain_flip (MotionCor2's FlipGain): 0 none, 1 upside down (y), 2 left to right (x).
    shape : tuple of 2 int, optional
        (y, x) of the frames, to which the reference is then fitted as `match_gain` does.
    divided : bool
        Whether the file is to be divided by, as RELION has it for EER (see `is_divided`); the inverse is
        then returned, scaled to a mean count of one.

    Returns
    -------
    ndarray (y, x) float32
        Factors; 0 where a pixel is dead.

    Raises
    ------
    FileFormatError
        If the file cannot be read, or holds NaN, infinity, or nothing above 0.
    ParameterError
        If the rotation or the flip is not one of RELION's.
    ShapeError
        If the reference does not fit the frames.
    """
    path = Path(path)
    if path.suffix.lower() in _DM_SUFFIXES:
        raise FileFormatError(
            "is in Digital Micrograph's format", path=path, hint="convert it with IMOD's dm2mrc"
        )
    gain = read_image(path).astype(np.float32)
    if path.suffix.lower() == ".gain":
        gain = gain[::-1]
    if not np.isfinite(gain).all():
        n = int((~np.isfinite(gain)).sum())
        raise FileFormatError(f"holds {n} NaN or infinite values", path=path, hint="make the reference again")
    if not (gain > 0).any():
        raise FileFormatError("holds no value above 0", path=path, hint="make the reference again")
    gain = orient_gain(np.maximum(gain, 0), rotation=rotation, flip=flip)
    if shape is not None:
        gain = match_gain(gain, shape, path=path)
    if divided:
        alive = gain > 0
        gain = np.divide(gain[alive].mean(), gain, out=np.zeros_like(gain), where=alive)
    return np.ascontiguousarray(gain)


def orient_gain(gain: NDArray, *, rotation: int = 0, flip: int = 0) -> NDArray:
    """Turn, then flip, a gain reference (y, x) as RELION's --gain_rot and --gain_flip; see `read_gain`."""
    if rotation not in (0, 1, 2, 3):
        raise ParameterError(
            f"a gain rotation of {rotation} quarter turns cannot be", hint="give 0, 1, 2 or 3"
        )
    if flip not in (0, 1, 2):
        raise ParameterError(f"there is no gain flip {flip}", hint="give 0 (none), 1 (y) or 2 (x)")
    turned = np.rot90(gain, -rotation)
    return (turned, turned[::-1], turned[:, ::-1])[flip]


def match_gain(
    gain: NDArray[np.float32], shape: tuple[int, int], *, path: str | Path | None = None
) -> NDArray[np.float32]:
    """Bring a gain reference (y, x) to the pixels of frames of `shape`, equal or a factor of two apart.

    Notes
    -----
    Super-resolution frames get the value of the physical pixel. Frames of physical pixels get the mean of
    the four, and are dead where one of them is, for its counts are missing.

    Raises
    ------
    ShapeError
        If neither size fits; the message names both and says whether a quarter turn would help.
    """
    fits = _fit(gain.shape, shape)
    if fits == 1:
        return gain
    if fits == 2:
        return gain.repeat(2, axis=0).repeat(2, axis=1)
    if fits == 0.5:
        blocks = gain.reshape(shape[0], 2, shape[1], 2)
        return np.where((blocks > 0).all(axis=(1, 3)), blocks.mean(axis=(1, 3)), 0).astype(gain.dtype)
    message = f"the gain reference is {gain.shape[0]} x {gain.shape[1]} px (y, x), the movie "
    message += f"{shape[0]} x {shape[1]} px"
    turned = _fit(gain.shape[::-1], shape) is not None
    hint = (
        "turned by a quarter it fits: gain rotation 1 or 3"
        if turned
        else "it belongs to another camera or mode"
    )
    raise ShapeError(message, path=path, hint=hint)


def may_fit(gain_shape: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Tell whether a gain reference of a shape (y, x) fits frames of another in any orientation."""
    return _fit(gain_shape, shape) is not None or _fit(gain_shape[::-1], shape) is not None


def _fit(gain_shape: tuple[int, ...], shape: tuple[int, ...]) -> float | None:
    ratios = {frame / reference for frame, reference in zip(shape, gain_shape, strict=True)}
    ratio = ratios.pop()
    return ratio if not ratios and ratio in (0.5, 1, 2) else None


@dataclass(frozen=True)
class GainOrientation:
    """How well a gain reference fits the movies in one orientation.

    Attributes
    ----------
    rotation, flip : int
        As `read_gain` takes them.
    correlation : float
        Of the inverse gain with the mean frame, both without their large-scale structure.
    share : float
        Part of the reference's pattern that the mean frame shows: 1 for raw frames and the right reference,
        0 for another one and for frames that were corrected, -1 for the reciprocal of the right one.
    error : float
        Standard deviation of `share` by chance, in the orientation where it is largest; infinite where the
        frames or the reference cannot tell anything.
    """

    rotation: int
    flip: int
    correlation: float
    share: float
    error: float


def rank_orientations(
    gain: str | Path | NDArray, mean_frame: NDArray, *, divided: bool = False
) -> list[GainOrientation]:
    """Rank the orientations of a gain reference by how well they explain the mean of raw frames.

    A sensitive pixel has a small gain and counts more, so the inverse of the right orientation looks like
    the mean frame. The wrong one is a common mistake and costs much: alignment then follows the fixed
    pattern of the camera. Of large frames the middle 4096 x 4096 px are compared. What chance gives is the
    root mean square correlation over all shifts of one image against the other, so that stripes and ice,
    whose pixels are no independent witnesses, count for what they are.

    Parameters
    ----------
    gain : path or array (y, x)
        Reference as it comes, not turned.
    mean_frame : array (h, w)
        Mean or sum of frames, not gain corrected; a hundred frames of several movies make it clear.
    divided : bool
        As `read_gain`.

    Returns
    -------
    list of GainOrientation
        Those with the largest absolute share first. Eight orientations under their twelve names, the plainest
        name of equal ones first; four under six if only those fit the shape of the frame.

    Raises
    ------
    FileFormatError
        As `read_gain`.
    ShapeError
        If the reference fits in no orientation.

    Examples
    --------
    >>> import numpy as np
    >>> from halfmap.io.gain import rank_orientations
    >>> rng = np.random.default_rng(3)
    >>> gain = rng.normal(1, 0.05, (200, 300)).astype(np.float32)
    >>> frame = rng.poisson(50 / np.rot90(gain, -1)[::-1])
    >>> best = rank_orientations(gain, frame)[0]
    >>> best.rotation, best.flip
    (1, 1)
    """
    path = gain if isinstance(gain, str | Path) else None
    reference = read_gain(path, divided=divided) if path is not None else np.asarray(gain, np.float32)
    shape = (mean_frame.shape[0], mean_frame.shape[1])
    turns = [
        rotation for rotation in range(4) if _fit(np.rot90(reference, rotation).shape, shape) is not None
    ]
    if not turns:
        match_gain(reference, shape, path=path)  # raises
    upright = _middle(match_gain(reference, shape[:: -1 if 0 not in turns else 1]))
    inverse = np.divide(1, upright, out=np.zeros_like(upright), where=upright > 0)
    pattern = _camera_pattern(inverse, upright > 0)
    frame = _middle(mean_frame)
    camera = _camera_pattern(frame, np.ones(frame.shape, bool))
    size, power = float(np.linalg.norm(pattern)), float(np.linalg.norm(camera))
    known = size * power > 0
    # A half turn leaves the spectrum as it is.
    unlike = [orient_gain(pattern, rotation=turn, flip=flip) for turn in turns[:2] for flip in (0, 1)]
    error = max(_chance(turned, camera) for turned in unlike) / size**2 if known else np.inf
    fits = []
    for flip in (0, 1, 2):
        for rotation in turns:
            turned = orient_gain(pattern, rotation=rotation, flip=flip)
            product = float(np.vdot(turned, camera)) if known else 0.0
            correlation, share = (product / (scale or 1.0) for scale in (size * power, size**2))
            fits.append(GainOrientation(rotation, flip, correlation, share, error))
    # Rounding makes equal orientations tie, so that fewer operations and smaller numbers come first.
    return sorted(
        fits, key=lambda f: (-round(abs(f.share), 5), (f.rotation > 0) + (f.flip > 0), f.flip, f.rotation)
    )


def _middle(image: NDArray) -> NDArray:
    """Middle of an image, the same whichever way the image is turned."""
    margins = [max(0, -((WINDOW_px - size) // 2)) for size in image.shape]
    return image[margins[0] : image.shape[0] - margins[0], margins[1] : image.shape[1] - margins[1]]


def _chance(image: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Root mean square over all shifts of the sum of products of two images without a mean."""
    from scipy.fft import rfft2

    spectrum = np.abs(np.asarray(rfft2(image))) * np.abs(np.asarray(rfft2(other)))
    # Parseval; all columns but the first and, if the width is even, the last stand for two.
    power = np.square(spectrum, dtype=np.float64).sum(axis=0)
    alone = [0] if image.shape[1] % 2 else [0, -1]
    return float(np.sqrt(2 * power.sum() - power[alone].sum()) / image.size)


def _camera_pattern(image: NDArray, alive: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Fixed pattern of an image in parts of its mean, without large structure and outliers.

    It is 0 where not `alive`, and all over where the image is flat or its mean is not above 0.
    """
    from scipy.ndimage import uniform_filter

    image = np.where(alive, image, image[alive].mean()).astype(np.float32)
    # Hot and dead pixels would outweigh all others and bleed into the background.
    centre, spread = _centre_and_spread(image)
    image = np.clip(image, centre - 10 * spread, centre + 10 * spread)
    level = float(image.mean(dtype=np.float64))
    if level <= 0:
        return np.zeros_like(image)
    image -= uniform_filter(image, BACKGROUND_px)
    centre, spread = _centre_and_spread(image)
    kept = alive & (np.abs(image - centre) <= 5 * spread)
    # Not the median: that of few counts is far off their mean.
    mean = image.sum(where=kept, dtype=np.float64) / max(int(kept.sum()), 1)
    return np.where(kept, (image - np.float32(mean)) / np.float32(level), 0)


def _centre_and_spread(image: NDArray[np.float32]) -> tuple[float, float]:
    """Median, and the standard deviation of a normal distribution with as many values near it."""
    # Of a million pixels quantiles are good to a thousandth of the spread; all of them take seconds.
    sample = image.ravel()[:: image.size // 1_000_000 | 1]
    # Not the median deviation: of less than an electron a pixel, more than half of the counts are equal.
    low, centre, high = (float(value) for value in np.quantile(sample, (0.02, 0.5, 0.98)))
    return centre, (high - low) / _NORMAL_RANGE or float(image.std())
