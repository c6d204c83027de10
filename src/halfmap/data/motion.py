"""The motion of a movie's specimen as it was estimated: frame by frame, and across the field."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halfmap.errors import ShapeError

EARLY_DOSE_e_per_A2 = 4.0
"""RELION's border between early and late motion."""

N_COEFFICIENTS = 18
"""Coefficients along one axis of RELION's polynomial."""


@dataclass(frozen=True, eq=False, kw_only=True)
class MotionTracks:
    """Shifts that bring the frames of a movie onto the first used one, with their errors.

    A shift is what is applied to a frame, minus the displacement of the specimen, in pixels of the movie.
    The shift at a place is the frame's own (`global_shift`) plus a local one. Halfmap's local model is a grid
    of nodes for every frame, between which natural cubic splines run; RELION's is a polynomial.

    Parameters
    ----------
    movie : str
        Movie file, relative to the project's folder.
    shape : tuple of 2 int
        (y, x) of its frames.
    n_frames : int
        Frames of the movie.
    first_frame, last_frame : int
        Frames used, counted from 1, both included.
    pixel_size : float
        Å per pixel of the movie.
    dose_per_frame, pre_exposure : float
        Exposure of a frame, and before the first of the movie, e/Å².
    voltage_kV : float
        Acceleration voltage.
    binning : float
        Pixel size of the micrograph over that of the movie.
    gain, defects : str or None
        Gain reference and defect file, relative to the project's folder.
    eer_grouping, eer_upsampling : int or None
        How an EER movie was read.
    global_shift : array (n, 2)
        (x, y) of every used frame in px; the first is zero.
    global_error : array (n,)
        Its standard error along an axis in px; NaN where it is not known.
    local_coefficients : array (2, 18) or None
        RELION's polynomial in px, for x and y; see `polynomial_terms`.
    local_grid : array (n, gy, gx, 2) or None
        Local shift (x, y) at the nodes in px. Nodes are spread evenly from the centre of the first pixel to
        that of the last.
    local_error : array (n, gy, gx) or None
        Standard error along an axis, at the nodes, of the global and the local shift together, in px.
    patch_centres : array (p, 2)
        Centres (x, y) in px of the patches that the local model was fitted to; may be empty.
    patch_shifts : array (p, n, 2)
        Local shifts measured in the patches, in px; NaN where a frame has none of its own.
    patch_errors : array (p, n)
        Their standard errors along an axis in px; NaN where they are not known.
    hot_pixels : array (m, 2)
        Bad pixels (x, y) found in this movie, beside those of the gain reference and the defect file.

    Raises
    ------
    ShapeError
        If the arrays do not belong together.
    """

    movie: str
    shape: tuple[int, int]
    n_frames: int
    first_frame: int
    last_frame: int
    pixel_size: float
    dose_per_frame: float
    pre_exposure: float
    voltage_kV: float
    binning: float = 1.0
    gain: str | None = None
    defects: str | None = None
    eer_grouping: int | None = None
    eer_upsampling: int | None = None
    global_shift: NDArray
    global_error: NDArray
    local_coefficients: NDArray | None = None
    local_grid: NDArray | None = None
    local_error: NDArray | None = None
    patch_centres: NDArray = field(default_factory=lambda: np.zeros((0, 2)))
    patch_shifts: NDArray = field(default_factory=lambda: np.zeros((0, 0, 2)))
    patch_errors: NDArray = field(default_factory=lambda: np.zeros((0, 0)))
    hot_pixels: NDArray = field(default_factory=lambda: np.zeros((0, 2), np.int32))

    def __post_init__(self) -> None:
        n, p = self.n_used, len(self.patch_centres)
        if not 1 <= self.first_frame <= self.last_frame <= self.n_frames:
            message = f"frames {self.first_frame} to {self.last_frame} are not in a movie of {self.n_frames}"
            raise ShapeError(message)
        expected: dict[str, tuple[int, ...]] = {"global_shift": (n, 2), "global_error": (n,)}
        if self.local_coefficients is not None:
            expected["local_coefficients"] = (2, N_COEFFICIENTS)
        if self.local_grid is not None:
            nodes = self.local_grid.shape[1:3]
            expected |= {"local_grid": (n, *nodes, 2), "local_error": (n, *nodes)}
        if p:
            expected |= {"patch_centres": (p, 2), "patch_shifts": (p, n, 2), "patch_errors": (p, n)}
        for name, shape in expected.items():
            found = np.shape(getattr(self, name))
            if found != shape:
                raise ShapeError(f"{name} of motion tracks has the shape {found}, not {shape}")

    @property
    def n_used(self) -> int:
        """Frames used."""
        return self.last_frame - self.first_frame + 1

    def shift_at(self, x: ArrayLike, y: ArrayLike, frame: ArrayLike) -> NDArray:
        """Shift of what lies at (x, y) in the first used frame.

        Parameters
        ----------
        x, y : array (...,)
            Pixels of the movie, 0 at the centre of the first.
        frame : array (...,) of int
            Counted from 0 at the first used frame. All three are broadcast against each other.

        Returns
        -------
        array (..., 2)
            (x, y) in px: the global shift, plus the local one by Halfmap's model where there is one,
            otherwise by RELION's.
        """
        if self.local_grid is None:
            return self.polynomial_shift_at(x, y, frame)
        x, y, frame = np.broadcast_arrays(x, y, frame)
        height, width = self.shape
        gy, gx = self.local_grid.shape[1:3]
        along_y = spline_weights(gy, np.divide(y, max(height - 1, 1)))
        along_x = spline_weights(gx, np.divide(x, max(width - 1, 1)))
        shift = np.empty((*x.shape, 2))
        for number in np.unique(frame):
            at = frame == number
            rows = np.einsum("pi,ijc->pjc", along_y[at], self.local_grid[number])
            shift[at] = np.einsum("pjc,pj->pc", rows, along_x[at])
        return shift + self.global_shift[frame]

    def polynomial_shift_at(self, x: ArrayLike, y: ArrayLike, frame: ArrayLike) -> NDArray:
        """As `shift_at`, by RELION's polynomial; the global shift alone where there is none."""
        x, y, frame = np.broadcast_arrays(x, y, frame)
        shift = self.global_shift[frame]
        if self.local_coefficients is None:
            return shift
        return shift + polynomial_terms(x, y, frame, self.shape) @ self.local_coefficients.T

    def local_field(self, x: NDArray, y: NDArray, frame: int) -> NDArray:
        """Local shift alone on the grid of x (w,) and y (h,), as `shift_at` has it: (h, w, 2) in px."""
        if self.local_grid is not None:
            height, width = self.shape
            gy, gx = self.local_grid.shape[1:3]
            along_y = spline_weights(gy, np.asarray(y) / max(height - 1, 1))
            along_x = spline_weights(gx, np.asarray(x) / max(width - 1, 1))
            planes = [along_y @ self.local_grid[frame, :, :, axis] @ along_x.T for axis in (0, 1)]
            return np.stack(planes, axis=-1)
        return self.polynomial_shift_at(x, np.asarray(y)[:, None], frame) - self.global_shift[frame]


def polynomial_terms(x: ArrayLike, y: ArrayLike, frame: ArrayLike, shape: tuple[int, int]) -> NDArray:
    """Terms of RELION's polynomial for the local shift, in the order of its coefficients.

    Parameters
    ----------
    x, y : array (...,)
        Pixels of the movie, 0 at the centre of the first.
    frame : array (...,)
        Counted from 0 at the first used frame.
    shape : tuple of 2 int
        (y, x) of the frames.

    Returns
    -------
    array (..., 18)
        z, z², z³ for each of 1, x, x², y, y², xy, where z is the frame, and x and y are fractions of the
        field from its middle.
    """
    x, y, z = np.broadcast_arrays(*(np.asarray(value, np.float64) for value in (x, y, frame)))
    x, y = x / shape[1] - 0.5, y / shape[0] - 0.5
    space = np.stack([np.ones_like(x), x, x * x, y, y * y, x * y], axis=-1)
    time = np.stack([z, z * z, z * z * z], axis=-1)
    return (space[..., :, None] * time[..., None, :]).reshape(*x.shape, N_COEFFICIENTS)


def spline_weights(n_nodes: int, position: ArrayLike) -> NDArray:
    """Weights of evenly spaced nodes in the natural cubic spline that runs through their values.

    Parameters
    ----------
    n_nodes : int
        Nodes, 1 or more; of one the spline is a constant, of two a line.
    position : array (...,)
        0 at the first node, 1 at the last; what lies outside is moved to the nearer of them.

    Returns
    -------
    array (..., n_nodes)
        Weights, which sum to one.

    Examples
    --------
    >>> spline_weights(3, [0.0, 0.25]) @ [1.0, 2.0, 1.0]
    array([1.    , 1.6875])
    """
    position = np.asarray(position, np.float64)
    if n_nodes == 1:
        return np.ones((*position.shape, 1))
    place = np.clip(position, 0, 1) * (n_nodes - 1)
    left = np.clip(np.floor(place).astype(int), 0, n_nodes - 2)
    u = (place - left)[..., None]
    values = np.eye(n_nodes)
    # Second derivatives at the nodes as functions of the values; those at the ends are zero.
    bends = np.zeros((n_nodes, n_nodes))
    inner = n_nodes - 2
    system = 4 * np.eye(inner) + np.eye(inner, k=1) + np.eye(inner, k=-1)
    bends[1:-1] = np.linalg.solve(system, 6 * np.diff(values, n=2, axis=0))
    line = (1 - u) * values[left] + u * values[left + 1]
    cubic = ((1 - u) ** 3 - (1 - u)) * bends[left] + (u**3 - u) * bends[left + 1]
    return line + cubic / 6


def accumulated_motion(tracks: MotionTracks) -> tuple[float, float, float]:
    """Length of the global track in Å: in all, early, and late.

    Returns
    -------
    tuple of 3 float
        rlnAccumMotionTotal, rlnAccumMotionEarly and rlnAccumMotionLate. A step counts as early if its second
        frame ends within the first 4 e/Å², the exposure before the movie included.

    Notes
    -----
    RELION sums the same steps with the same border, but writes the sums in pixels of the movie, although its
    label says Å.
    """
    steps = np.linalg.norm(np.diff(tracks.global_shift, axis=0), axis=1) * tracks.pixel_size
    frames = np.arange(tracks.first_frame + 1, tracks.last_frame + 1)
    dose = tracks.dose_per_frame
    last_early = (EARLY_DOSE_e_per_A2 - tracks.pre_exposure) / dose if dose > 0 else math.inf
    early = frames <= last_early
    return float(steps.sum()), float(steps[early].sum()), float(steps[~early].sum())
