"""From a micrograph and places in it to particle images: cut, phase flipped, scaled, normalised."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import scipy.fft
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.ops.fourier import irfft2, rfft2
from halfmap.ops.threads import in_threads
from halfmap.steps.extract._kernels import N_STATISTICS, FRAYED_px, cut, normalise
from halfmap.steps.extract.step import Background

_BATCH_BYTES = 1 << 20
"""Of the boxes that a thread holds at a time, as large as its cache."""

_SUBTRACT: dict[Background, int] = {"none": 0, "mean": 1, "ramp": 2}


@dataclass(frozen=True, eq=False)
class Circle:
    """The circle around a particle, outside of which its image is background.

    Parameters
    ----------
    starts, stops : array (m,)
        First column inside in each row, and the first behind it.
    solve : array (3, 3)
        See `_kernels.normalise`.
    """

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    solve: NDArray[np.float64]


@lru_cache(maxsize=8)
def circle_of(box: int, diameter: float) -> Circle:
    """Circle of a diameter in pixels about pixel ``box // 2``."""
    place = np.arange(box) - box // 2
    inside = place[:, None] ** 2 + place**2 <= (diameter / 2) ** 2
    starts = np.where(inside.any(axis=1), inside.argmax(axis=1), 0)
    stops = starts + inside.sum(axis=1)
    y, x = np.nonzero(~inside)
    terms = np.stack([np.ones(len(x)), x - box // 2, y - box // 2])
    return Circle(starts, stops, np.linalg.inv(terms @ terms.T).astype(np.float64))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to every particle image; all sizes in pixels.

    Attributes
    ----------
    box, scaled_box : int
        Side of the box that is cut, and that it is scaled to by cropping its Fourier transform; both even.
    circle : float
        Diameter of the circle outside of which is background, as a share of the side of the box.
    background : str
        What is subtracted: ``ramp``, ``mean`` or ``none``; without, the spread is not normalised either.
    invert : bool
        Whether dark particles are to become bright.
    mirror : bool
        Whether the micrograph is mirrored at its edges, or its outermost pixels repeated.
    white_dust, black_dust : float or None
        Standard deviations of the background beyond which a pixel is replaced by noise.
    """

    box: int
    scaled_box: int
    circle: float
    background: Background
    invert: bool
    mirror: bool
    white_dust: float | None = None
    black_dust: float | None = None


@dataclass(frozen=True, eq=False)
class PhaseFlip:
    """How phases are flipped: in a larger box, into which the particle's own waves were moved by defocus.

    Parameters
    ----------
    box : int
        Side of the larger box, even.
    signs : callable
        Takes a slice of the particles to the signs (k, box, box // 2 + 1) of their CTFs.
    """

    box: int
    signs: Callable[[slice], Tensor]


def cut_particles(
    image: NDArray[np.float32],
    x: NDArray[np.int64],
    y: NDArray[np.int64],
    recipe: Recipe,
    *,
    ready: Callable[[int], object] | None = None,
    flip: PhaseFlip | None = None,
    rng: np.random.Generator | None = None,
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float64]]]:
    """Cut particles out of a micrograph and make images of them, some at a time.

    Parameters
    ----------
    image : array (h, w)
        Micrograph, no smaller than a box.
    x, y : array (n,)
        Pixel that becomes the middle ``box // 2``.
    recipe : Recipe
        What to do.
    ready : callable, optional
        Called with the number of rows of the image, from the first one, that the next boxes are made of.
    flip : PhaseFlip, optional
        How to flip phases, if they are to be.
    rng : Generator, optional
        Of the noise in place of dust.

    Yields
    ------
    images : array (k, scaled_box, scaled_box)
        Of the next k particles.
    statistics : array (k, N_STATISTICS)
        Mean and standard deviation of the background before it was normalised; mean, standard deviation and
        skewness within the circle of the finished image.
    """
    side = recipe.box if flip is None else flip.box
    step = torch.get_num_threads() * max(1, _BATCH_BYTES // (4 * side**2))
    circle = circle_of(recipe.scaled_box, recipe.circle * recipe.scaled_box)
    for first in range(0, len(x), step):
        chosen = slice(first, min(first + step, len(x)))
        boxes = np.empty((len(x[chosen]), side, side), np.float32)
        left, top = x[chosen] - side // 2, y[chosen] - side // 2
        if ready is not None:
            # What sticks out is mirrored.
            ready(max(int(top.max()) + side, 2 * FRAYED_px + 1 - int(top.min())))
        _in_parts(partial(cut, image, recipe.mirror), left, top, boxes)
        if recipe.white_dust is not None or recipe.black_dust is not None:
            _remove_dust(boxes, recipe, rng or np.random.default_rng(0))
        if flip is not None:
            boxes = _flip_phases(boxes, flip.signs(chosen), recipe.box)
        if recipe.scaled_box != recipe.box:
            boxes = _scale(boxes, recipe.scaled_box)
        yield boxes, _normalise(boxes, circle, recipe.background, invert=recipe.invert)


def _in_parts(function: Callable[..., None], *arrays: NDArray) -> None:
    """Call a function on parts of the arrays, one for each thread."""
    count = len(arrays[0])
    if torch.get_num_threads() == 1 or count == 1:
        function(*arrays)
        return
    edges = np.linspace(0, count, min(count, torch.get_num_threads()) + 1).astype(int).tolist()
    in_threads(function, *([array[slice(*pair)] for pair in pairwise(edges)] for array in arrays))


def _flip_phases(boxes: NDArray[np.float32], signs: Tensor, box: int) -> NDArray[np.float32]:
    """Multiply the Fourier transforms by signs, and cut the middle out."""
    flipped = irfft2(rfft2(torch.from_numpy(boxes)) * signs, shape=boxes.shape[1:]).numpy()
    first = boxes.shape[1] // 2 - box // 2
    return np.ascontiguousarray(flipped[:, first : first + box, first : first + box])


def _scale(boxes: NDArray[np.float32], scaled_box: int) -> NDArray[np.float32]:
    """Crop the Fourier transforms.

    As `ops.fourier.resample`, in two thirds of its time and with another Nyquist frequency: where two waves
    become one, their sum is right for a sampled function, but holds the noise of both. RELION too takes
    their mean.
    """
    threads, half = torch.get_num_threads(), scaled_box // 2
    # Columns that are not wanted are dropped between the transforms along the two axes.
    rows = np.asarray(scipy.fft.rfft(boxes, axis=2, workers=threads))[..., : half + 1]
    rows[..., half].imag = 0
    columns = np.asarray(scipy.fft.fft(rows, axis=1, workers=threads))
    spectra = np.concatenate([columns[:, :half], columns[:, -half:]], axis=1)
    spectra[:, half] = (columns[:, half] + columns[:, -half]) / 2
    spectra *= np.float32((scaled_box / boxes.shape[1]) ** 2)
    return np.asarray(scipy.fft.irfft2(spectra, s=(scaled_box, scaled_box), workers=threads))


def _normalise(
    images: NDArray[np.float32], circle: Circle, background: Background, *, invert: bool
) -> NDArray[np.float64]:
    """Normalise images in place; their statistics."""
    statistics = np.empty((len(images), N_STATISTICS))
    subtract, sign = _SUBTRACT[background], -1.0 if invert else 1.0
    how = (circle.starts, circle.stops, circle.solve, subtract, subtract > 0, sign)
    _in_parts(partial(normalise, *how), images, statistics)
    return statistics


def _remove_dust(boxes: NDArray[np.float32], recipe: Recipe, rng: np.random.Generator) -> None:
    """Replace what is too bright or too dark by noise like the background's; on the way, that is flattened.

    Before scaling, which would smear what is a single pixel here.
    """
    circle = circle_of(boxes.shape[1], recipe.circle * recipe.box)
    level, spread = _normalise(boxes, circle, recipe.background, invert=False)[:, :2].astype(np.float32).T
    dust = (boxes > (recipe.white_dust or math.inf)) | (boxes < -(recipe.black_dust or math.inf))
    boxes[dust] = rng.standard_normal(np.count_nonzero(dust), np.float32)
    boxes *= spread[:, None, None]
    boxes += level[:, None, None]
