"""The overview pictures of an import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from halfmap.data import MovieSet
    from halfmap.engine import Context

PANELS = 8
THUMBNAIL_px = 384


def draw_movies(path: Path, ctx: Context, movies: MovieSet) -> None:
    """Draw the sums of a few movies, unaligned, gain applied, evenly drawn from the list."""
    import numpy as np

    from halfmap.io.mrc import read_mrc

    rows = movies.rows.to_dicts()
    optics = movies.optics.to_dicts()[0]
    gain_name = optics.get("rlnMicrographGainName")
    gain = read_mrc(ctx.resolve(gain_name)) if gain_name else None
    chosen = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, PANELS).round().astype(int))]
    images, titles = [], []
    for row in chosen:
        images.append(_movie_sum(ctx.resolve(row["rlnMicrographMovieName"]), gain, optics))
        titles.append(Path(row["rlnMicrographMovieName"]).name)
    dose = optics["rlnMicrographDoseRate"] * rows[0]["rlnImageSizeZ"]
    title = (
        f"{len(rows)} movies, {rows[0]['rlnImageSizeX']} × {rows[0]['rlnImageSizeY']} px, "
        f"{rows[0]['rlnImageSizeZ']} frames, {optics['rlnMicrographOriginalPixelSize']:g} Å/px, "
        f"{optics['rlnVoltage']:g} kV, {dose:.1f} e/Å²"
    )
    draw_panels(path, images, titles, title)


def _movie_sum(path: Path, gain: np.ndarray | None, optics: dict) -> np.ndarray:
    from halfmap.io.movies import open_movie

    eer = {"eer_grouping": optics.get("rlnEERGrouping", 32), "eer_upsampling": optics.get("rlnEERUpsampling", 1)}
    movie = open_movie(path, **eer)
    total = sum(movie.read(i, i + 1)[0].astype("float32") for i in range(movie.n_frames))
    return thumbnail(total if gain is None else total * gain)


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Shrink an image to about `THUMBNAIL_px` by averaging blocks of pixels."""
    factor = max(1, min(image.shape) // THUMBNAIL_px)
    h, w = (size // factor * factor for size in image.shape)
    return image[:h, :w].reshape(h // factor, factor, w // factor, factor).mean(axis=(1, 3))


def draw_panels(path: Path, images: list[np.ndarray], titles: list[str], title: str) -> None:
    """Draw images side by side, each stretched between its 1st and 99th percentile."""
    import numpy as np
    from matplotlib.figure import Figure

    from halfmap.io.atomic import atomic_path

    columns = min(4, len(images))
    lines = -(-len(images) // columns)
    figure = Figure(figsize=(3 * columns, 3.2 * lines + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for panel, image, name in zip(figure.subplots(lines, columns, squeeze=False).flat, images, titles, strict=False):
        low, high = np.percentile(image, (1, 99))
        panel.imshow(image, cmap="gray", vmin=low, vmax=high, origin="lower")
        panel.set_title(name, fontsize=7)
    for panel in figure.axes:
        panel.set_axis_off()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
