"""The overview pictures of an import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    from halfmap.data import MicrographSet, MovieSet, ParticleSet
    from halfmap.engine import Context
    from halfmap.io.images import ImageStack
    from halfmap.io.volumes import MapFile

PANELS = 8
PARTICLES = 40
THUMBNAIL_px = 384
PARTICLE_px = 64
"""Averaging down to this makes particles stand out of their noise."""
TITLE_inch, LABEL_inch, GAP_inch = 0.4, 0.25, 0.1
MARKER_COLOUR, MISSING_COLOUR = "#ff9500", "#b03030"


def draw_movies(path: Path, ctx: Context, movies: MovieSet) -> None:
    """Draw the sums of a few movies, unaligned, gain applied, evenly drawn from those that are there."""
    from halfmap.io.gain import is_divided, read_gain

    rows = movies.rows.to_dicts()
    there = [row for row in rows if ctx.resolve(row["rlnMicrographMovieName"]).exists()]
    if not there:
        return  # all archived: an earlier picture stays
    optics = movies.optics.to_dicts()[0]
    gain = None
    if "rlnMicrographGainName" in optics:
        source = ctx.resolve(optics["rlnMicrographGainName"])
        gain = read_gain(source, divided=is_divided(source, rows[0]["rlnMicrographMovieName"]))
    chosen = [there[i] for i in _spread(len(there))]
    images = [_movie_sum(ctx.resolve(row["rlnMicrographMovieName"]), gain, optics) for row in chosen]
    names = [Path(row["rlnMicrographMovieName"]).name for row in chosen]
    dose = optics["rlnMicrographDoseRate"] * rows[0]["rlnImageSizeZ"]
    title = f"{_count(len(rows), 'movie')}, {_settings(rows[0], optics)}"
    title += f", {rows[0]['rlnImageSizeZ']} frames, {dose:.1f} e/Å²"
    _draw_panels(path, images, names, title)


def draw_micrographs(path: Path, ctx: Context, micrographs: MicrographSet) -> None:
    """Draw a few micrographs, evenly drawn from those that are there."""
    rows = micrographs.rows.to_dicts()
    files = (ctx.resolve(row["rlnMicrographName"]) for row in rows)
    there = [file for file in files if file.exists()]
    if not there:
        return  # all archived: an earlier picture stays
    chosen = [there[i] for i in _spread(len(there))]
    title = f"{_count(len(rows), 'micrograph')}, {_settings(rows[0], micrographs.optics.to_dicts()[0])}"
    _draw_panels(path, [_image(file) for file in chosen], [file.name for file in chosen], title)


def draw_particles(path: Path, particles: ParticleSet, stack: ImageStack) -> None:
    """Draw particles at random, the same ones every time."""
    import numpy as np

    rows = np.random.default_rng(0).permutation(len(stack))[:PARTICLES]
    images = stack.read(np.sort(rows))
    title = f"{_count(len(particles), 'particle')}, {stack.shape[1]} px"
    sizes = particles.optics["rlnImagePixelSize"].unique().to_list()
    title += f" of {', '.join(f'{size:.4g}' for size in sizes)} Å, {_count(len(stack.files), 'stack')}"
    names = [f"{row + 1}" for row in np.sort(rows)]
    _draw_panels(
        path, [_thumbnail(image, PARTICLE_px) for image in images], names, title, columns=8, inch=1.4
    )


def draw_coordinates(
    path: Path,
    ctx: Context,
    table: pl.DataFrame,
    picks: Mapping[str, pl.DataFrame],
    *,
    diameter_px: float | None = None,
) -> None:
    """Draw a few micrographs with their coordinates, as circles of a diameter if one is given."""
    names = table["rlnMicrographName"].to_list()
    chosen = [names[i] for i in _spread(len(names), 4)]
    images, points, titles, sizes = [], [], [], []
    for name in chosen:
        whole = _image(ctx.resolve(name), shrink=False)
        images.append(_thumbnail(whole))
        factor = _factor(whole)
        # A block's centre lies half a block from its first pixel.
        points.append(
            (picks[name].select("rlnCoordinateX", "rlnCoordinateY").to_numpy() + 0.5) / factor - 0.5
        )
        sizes.append(None if diameter_px is None else diameter_px / factor)
        titles.append(f"{Path(name).name}: {len(picks[name])}")
    total = sum(map(len, picks.values()))
    filled = sum(len(table) > 0 for table in picks.values())
    title = f"{_count(total, 'coordinate')} in {_count(filled, 'micrograph')}"
    _draw_panels(path, images, titles, title, points=points, sizes=sizes, columns=2, inch=4.5)


def draw_volumes(path: Path, volumes: Mapping[str, MapFile]) -> None:
    """Draw the three central slices of every volume."""
    images, titles = [], []
    for kind, volume in volumes.items():
        middle = volume.array.shape[0] // 2
        slices = {"xy": volume.array[middle], "xz": volume.array[:, middle], "yz": volume.array[:, :, middle]}
        images += [_thumbnail(image) for image in slices.values()]
        titles += [f"{kind}, {plane} plane" for plane in slices]
    first = next(iter(volumes.values()))
    box, size = first.array.shape[0], first.pixel_size
    title = f"{', '.join(volumes)}: {box}³ voxels of {size:.4g} Å, {box * size:.0f} Å wide"
    _draw_panels(path, images, titles, title, columns=3)


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def _settings(row: dict, optics: dict) -> str:
    size = f"{row['rlnImageSizeX']} × {row['rlnImageSizeY']} px"
    return f"{size}, {optics['rlnMicrographOriginalPixelSize']:.4g} Å/px, {optics['rlnVoltage']:g} kV"


def _spread(n: int, panels: int = PANELS) -> list[int]:
    """Places of a few items spread evenly over a list."""
    return sorted({round(i * (n - 1) / max(1, min(n, panels) - 1)) for i in range(min(n, panels))})


def _movie_sum(path: Path, gain: np.ndarray | None, optics: dict) -> np.ndarray:
    import numpy as np

    from halfmap.io.movies import open_movie

    grouping, upsampling = optics.get("rlnEERGrouping", 32), optics.get("rlnEERUpsampling", 1)
    movie = open_movie(path, eer_grouping=grouping, eer_upsampling=upsampling)
    total = np.zeros(movie.shape, np.float32)
    for frame in range(movie.n_frames):
        total += _numbers(movie.read(frame, frame + 1)[0])
    return _thumbnail(total if gain is None else total * gain)


def _numbers(image: np.ndarray) -> np.ndarray:
    """An image as float32 with NaN for all that is no number: both infinities have no sum."""
    import numpy as np

    image = image.astype(np.float32, copy=False)
    finite = np.isfinite(image)
    return image if finite.all() else np.where(finite, image, np.float32(np.nan))


def _image(path: Path, *, shrink: bool = True) -> np.ndarray:
    from halfmap.io.movies import open_movie

    image = _numbers(open_movie(path).read()[0])
    return _thumbnail(image) if shrink else image


def _factor(image: np.ndarray, size: int = THUMBNAIL_px) -> int:
    return max(1, min(image.shape) // size)


def _thumbnail(image: np.ndarray, size: int = THUMBNAIL_px) -> np.ndarray:
    """Shrink an image to about `size` by averaging blocks of pixels."""
    factor = _factor(image, size)
    h, w = (side // factor * factor for side in image.shape)
    blocks = image[:h, :w].reshape(h // factor, factor, w // factor, factor)
    # float64: the sum of what is no image may overflow.
    return blocks.mean(axis=(1, 3), dtype="float64")


def _flaw(image: np.ndarray, finite: np.ndarray) -> str:
    """Say what is wrong with an image as a whole, or nothing."""
    if not finite.all():
        return "holds NaN or infinity"
    return "blank" if image.min() == image.max() else ""


def _draw_panels(
    path: Path,
    images: list[np.ndarray],
    titles: list[str],
    title: str,
    *,
    points: list[np.ndarray] | None = None,
    sizes: list[float | None] | None = None,
    columns: int = 4,
    inch: float = 3.0,
) -> None:
    """Draw images side by side, each stretched between its 1st and 99th percentile."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.collections import EllipseCollection
    from matplotlib.figure import Figure

    from halfmap.io.atomic import atomic_path

    columns = min(columns, len(images))
    lines = -(-len(images) // columns)
    h, w = images[0].shape
    side = inch * h / w
    # No narrower than the title. matplotlib's own layout would take longer than all the drawing.
    width, height = max((inch + GAP_inch) * columns, 6.5), (side + LABEL_inch) * lines + TITLE_inch
    figure = Figure(figsize=(width, height))
    figure.suptitle(title, fontsize=10, y=1 - 0.3 * TITLE_inch / height, va="top")
    places = {
        "left": 0.01,
        "right": 0.99,
        "bottom": 0.05 / height,
        "top": 1 - (TITLE_inch + LABEL_inch) / height,
    }
    places |= {"wspace": GAP_inch / inch, "hspace": LABEL_inch / side}
    panels = figure.subplots(lines, columns, squeeze=False, gridspec_kw=places).ravel()
    for number, (panel, image, name) in enumerate(zip(panels, images, titles, strict=False)):
        finite = np.isfinite(image)
        low, high = np.percentile(image[finite], (1, 99)) if finite.any() else (0.0, 1.0)
        if low == high:
            low, high = image[finite].min(), image[finite].max()
        # Red where there is nothing to be seen, which no grey could say.
        colours = colormaps["gray"].with_extremes(bad=MISSING_COLOUR)
        panel.imshow(image, cmap=colours, vmin=low, vmax=high, origin="lower")
        panel.set_title(f"{name}: {flaw}" if (flaw := _flaw(image, finite)) else name, fontsize=7)
        if points is not None:
            size = sizes[number] if sizes else None
            style = {"facecolors": "none", "edgecolors": MARKER_COLOUR, "linewidths": 0.7}
            if size is None:
                panel.scatter(*points[number].T, s=36, **style)
            elif len(points[number]):
                circles = EllipseCollection(
                    size,
                    size,
                    0,
                    units="xy",
                    offsets=points[number],
                    offset_transform=panel.transData,
                    **style,
                )
                panel.add_collection(circles, autolim=False)
    for panel in panels:
        panel.set_axis_off()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
