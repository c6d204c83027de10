"""The overview pictures of a simulation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from halfmap.io.atomic import atomic_path
from halfmap.io.movies import open_movie
from halfmap.io.mrc import read_mrc
from halfmap.io.star import read_star
from halfmap.steps.simulate import exposure as exposures
from halfmap.steps.simulate import truth
from halfmap.steps.simulate.motion import Motion, read_motion

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.simulate.step import SimulateMicrographs, SimulateMovies, SimulateParticles

_THUMBNAIL_px = 700
_TILE = 512
_COLOURS = {"real": "tab:green", "overlapping": "tab:orange", "broken": "tab:red"}


def draw_movies(step: SimulateMovies, ctx: Context, rows: list[dict[str, Any]], *, diameter: float) -> None:
    """Draw the first movie, aligned by its true drift, its power spectrum, its motion, the truth map.

    Circles around particles are of their diameter, which is in Å.
    """
    from halfmap.steps.simulate.movie import movie_file

    index = rows[0]["index"]
    pixel = step.pixel_size / (2 if step.super_resolution else 1)
    motion = read_motion(ctx.folder / truth.FOLDER / f"{exposures.name(index)}_motion.star")
    image = _aligned_sum(
        movie_file(step, ctx.folder, index), read_mrc(ctx.folder / "gain.mrc", 0), motion, pixel
    )
    figure = Figure(figsize=(15, 10), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(2, 1, 1))
    _draw_view(figure.add_subplot(grid[:, 0]), image, ctx.folder, index, pixel, diameter)
    _draw_spectrum(figure.add_subplot(grid[0, 1]), image, pixel)
    _draw_motion(figure.add_subplot(grid[1, 1]), motion, step)
    _draw_map(figure.add_subplot(grid[0, 2]), ctx.folder)
    _draw_profile(figure.add_subplot(grid[1, 2]), image, pixel)
    dose = step.n_frames * step.dose_per_frame
    figure.suptitle(
        f"{len(rows)} movies, {rows[0]['width']} × {rows[0]['height']} px, {step.n_frames} frames, "
        f"{pixel:g} Å/px, {step.voltage:g} kV, {dose:g} e/Å²"
    )
    _save(figure, ctx.folder)


def draw_micrographs(
    step: SimulateMicrographs, ctx: Context, rows: list[dict[str, Any]], *, diameter: float
) -> None:
    """Draw the first micrograph, its power spectrum, and the truth map; circles are of a diameter in Å."""
    from halfmap.steps.simulate.micrograph import micrograph_file

    index = rows[0]["index"]
    image = read_mrc(micrograph_file(ctx.folder, index), 0)
    figure = Figure(figsize=(13, 10), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=(3, 1))
    _draw_view(figure.add_subplot(grid[:, 0]), image, ctx.folder, index, step.pixel_size, diameter)
    _draw_spectrum(figure.add_subplot(grid[0, 1]), image, step.pixel_size)
    _draw_profile(figure.add_subplot(grid[1, 1]), image, step.pixel_size)
    _draw_map(figure.add_subplot(grid[2, 1]), ctx.folder)
    figure.suptitle(
        f"{len(rows)} micrographs, {step.width} × {step.height} px, {step.pixel_size:g} Å/px, "
        f"{step.voltage:g} kV, {step.dose:g} e/Å²"
    )
    _save(figure, ctx.folder)


def draw_particles(step: SimulateParticles, ctx: Context, stacks: list[dict[str, Any]]) -> None:
    """Draw the first particles, and the truth map."""
    from halfmap.steps.simulate.particles import stack_file

    path = stack_file(ctx.folder, stacks[0]["index"])
    images = read_mrc(path, slice(0, min(32, len(stacks[0]["class"])))).astype(np.float32)
    figure = Figure(figsize=(13, 7), layout="constrained")
    wide, narrow = figure.subplots(1, 2, width_ratios=(3, 1))
    low, high = np.percentile(images, (1, 99))
    wide.imshow(_montage(images, columns=8), cmap="gray", vmin=low, vmax=high, origin="lower")
    wide.set_axis_off()
    _draw_map(narrow, ctx.folder)
    ratio = f"signal-to-noise ratio {step.snr:g}" if step.snr else "no noise"
    figure.suptitle(f"{step.n_particles} particles, {step.pixel_size:g} Å/px, {step.voltage:g} kV, {ratio}")
    _save(figure, ctx.folder)


def _save(figure: Figure, folder: Path) -> None:
    with atomic_path(folder / "overview.png") as temporary:
        figure.savefig(temporary, dpi=100)


def _aligned_sum(path: Path, gain: NDArray, motion: Motion, pixel: float) -> NDArray[np.float32]:
    """Sum of the frames, gain applied, each moved back by the whole pixels of the view's common motion."""
    movie = open_movie(path)
    total = np.zeros(movie.shape, np.float32)
    for frame in range(movie.n_frames):
        x, y = np.rint(motion.common(frame) / pixel).astype(int)
        total += np.roll(movie.read(frame, frame + 1)[0] * gain, (-y, -x), axis=(0, 1))
    return total


def _montage(images: NDArray, columns: int) -> NDArray:
    n, h, w = images.shape
    lines = -(-n // columns)
    sheet = np.zeros((lines * h, columns * w), images.dtype)
    for i, image in enumerate(images):
        top, left = (lines - 1 - i // columns) * h, i % columns * w
        sheet[top : top + h, left : left + w] = image
    return sheet


def _draw_view(axes: Axes, image: NDArray, folder: Path, index: int, pixel: float, diameter: float) -> None:
    """An image with its particles circled by kind."""
    factor = max(1, max(image.shape) // _THUMBNAIL_px)
    h, w = (size // factor * factor for size in image.shape)
    small = image[:h, :w].reshape(h // factor, factor, w // factor, factor).mean(axis=(1, 3))
    low, high = np.percentile(small, (0.5, 99.5))
    axes.imshow(small, cmap="gray", vmin=low, vmax=high, origin="lower", extent=(0, w, 0, h))
    particles = read_star(folder / truth.FOLDER / f"{exposures.name(index)}.star").get("particles")
    if isinstance(particles, pl.DataFrame):
        for kind, colour in _COLOURS.items():
            chosen = np.array(particles["hmParticleKind"]) == kind
            x, y = (np.array(particles[label])[chosen] for label in ("rlnCoordinateX", "rlnCoordinateY"))
            circles = EllipseCollection(
                *(diameter / pixel, diameter / pixel, 0),
                units="xy",
                offsets=np.stack([x, y], axis=-1),
                offset_transform=axes.transData,
                facecolors="none",
                edgecolors=colour,
                linewidths=0.7,
                label=kind,
            )
            axes.add_collection(circles, autolim=False)
        axes.legend(
            handles=[Line2D([], [], color=colour, label=kind) for kind, colour in _COLOURS.items()],
            loc="upper right",
            fontsize=8,
        )
    axes.set(
        xlim=(0, w),
        ylim=(0, h),
        title=f"{exposures.name(index)} (px)" + (f", shrunk {factor} times" if factor > 1 else ""),
    )


def _power(image: NDArray) -> NDArray:
    """Mean power of tiles of the image relative to its mean, half-spectrum."""
    size = min(_TILE, *image.shape)
    window = np.hanning(size)[:, None] * np.hanning(size)
    image = np.clip(image, *np.percentile(image, (0.01, 99.99))) / image.mean() - 1
    starts = [(y, x) for y in _starts(image.shape[0], size) for x in _starts(image.shape[1], size)]
    total = sum(np.abs(np.fft.rfft2(image[y : y + size, x : x + size] * window)) ** 2 for y, x in starts)
    return total / len(starts) / np.square(window).sum()


def _starts(length: int, size: int) -> NDArray:
    return np.arange(0, length - size + 1, size // 2)


def _draw_spectrum(axes: Axes, image: NDArray, pixel: float) -> None:
    power = np.log(np.fft.fftshift(_power(image), axes=0))
    full = np.concatenate([np.roll(power[::-1, :0:-1], 1, axis=0)[:, :-1], power], axis=1)
    low, high = np.percentile(full, (2, 99))
    limit = 0.5 / pixel
    axes.imshow(full, cmap="gray", vmin=low, vmax=high, origin="lower", extent=(-limit, limit, -limit, limit))
    axes.set(title="power spectrum (1/Å)")


def _draw_profile(axes: Axes, image: NDArray, pixel: float) -> None:
    power = _power(image)
    size = power.shape[0]
    radius = np.rint(np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)) * size).astype(int)
    profile = np.bincount(radius.ravel(), power.ravel()) / np.bincount(radius.ravel())
    k = np.arange(2, size // 2)
    axes.semilogy(k / size / pixel, profile[2 : size // 2] * pixel**2, lw=1)
    axes.set(title="radial mean of the power (Å²)", xlabel="1/Å")


def _draw_motion(axes: Axes, motion: Motion, step: SimulateMovies) -> None:
    """Tracks of a coarse grid of points, five times longer than they are, and the common one."""
    frames = np.linspace(0, motion.n_frames - 1, 4 * motion.n_frames)
    height, width = step.height * step.pixel_size, step.width * step.pixel_size
    stretch = 0.02 * max(height, width)
    for y in np.linspace(0.1, 0.9, 5) * height:
        for x in np.linspace(0.1, 0.9, 5) * width:
            track = np.array(
                [motion.local_field(np.array([x]), np.array([y]), frame)[0, 0] for frame in frames]
            )
            axes.plot(x + stretch * track[:, 0], y + stretch * track[:, 1], lw=1)
            axes.plot(x, y, "k.", ms=3)
    common = motion.common(frames)
    axes.set(
        title=f"local motion, {stretch:.0f} times enlarged\ndrift {np.linalg.norm(common[-1]):.1f} Å",
        aspect="equal",
    )


def _draw_map(axes: Axes, folder: Path) -> None:
    volume = read_mrc(folder / "truth_map.mrc")
    axes.imshow(np.concatenate([volume.sum(axis=axis) for axis in (0, 1, 2)]), cmap="gray", origin="lower")
    axes.set(title="truth map along z, y, x")
    axes.set_axis_off()
